"""The synthetic corpus has structure beyond bigrams that the smallest proxy of the quick study learns."""

import dataclasses

import pytest

from foreshock.core.config import Spec, to_json
from foreshock.core.files import read_lines
from foreshock.core.model_config import ModelConfig
from foreshock.core.run_config import DataConfig, OptimConfig, RunConfig, resolve
from foreshock.core.run_folder import RunFolder
from foreshock.proxy.data.bigram import bigram_of
from foreshock.proxy.data.prepare import prepare
from foreshock.training.run import run_on_tokens


@pytest.mark.slow
def test_a_small_proxy_beats_the_bigram_but_not_the_entropy(tmp_path):
    config = resolve(
        RunConfig(
            model=ModelConfig(width=32, depth=2, heads=2),
            data=DataConfig(source=Spec("synthetic_v1")),
            optim=OptimConfig(lr=1e-2),
        )
    )
    config = dataclasses.replace(config, record=dataclasses.replace(config.record, monitors=()))
    folder = RunFolder(tmp_path / "run")
    folder.create(to_json(config))
    run_on_tokens(config, folder, lambda: False)
    folder.close()
    tokens = prepare(config.data, config.train)
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    loss = [row["loss/held_out"] for row in rows if "loss/held_out" in row][-1]
    assert tokens.manifest["entropy"] < loss < bigram_of(tokens, config.data, config.train) - 0.3
