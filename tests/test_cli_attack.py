"""`foreshock attack`: a user's model and known-good ones of its size, what is printed, what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from foreshock.cli.attack import Attack, subjects_of
from foreshock.core.errors import ConfigError, UserError
from foreshock.core.files import number
from foreshock.probes.attack import LIMIT, LR, STEPS, attack
from foreshock.proxy.data.tokenizers.bytes import VOCAB_SIZE
from foreshock.proxy.family import build_own
from foreshock.proxy.model import Proxy
from foreshock.study.grid import Size

HERE = "tests.test_cli_attack"
TINY: dict[str, Any] = {"size": "16x1", "steps": "2", "batch_size": "2", "seq_len": "8"}


class Family(nn.Module):
    """A causal mean of the tokens before, and residual blocks with an activation."""

    def __init__(self, width: int, depth: int, vocab_size: int, *, cliff: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm, self.cliff = nn.LayerNorm(width), cliff

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        for block in self.blocks:
            y = block(x)
            x = x + (y * y.mul(3).exp() if self.cliff else F.gelu(y))
        logits: Tensor = self.head(x if self.cliff else self.norm(x))
        return logits


def good(width: int, depth: int, heads: int, vocab_size: int) -> nn.Module:
    return Family(width, depth, vocab_size, cliff=False)


def bad(width: int, depth: int, heads: int, vocab_size: int) -> nn.Module:
    return Family(width, depth, vocab_size, cliff=True)


def failing(width: int, depth: int, heads: int, vocab_size: int) -> nn.Module:
    raise ValueError("no such size")


def infinite(width: int, depth: int, heads: int, vocab_size: int) -> nn.Module:
    model = Family(width, depth, vocab_size, cliff=False)
    nn.init.constant_(model.head.bias, math.inf)
    return model


def sizeless() -> nn.Module:
    return nn.Linear(2, 2)


def answer(capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    command = Attack(model=f"{HERE}:good", json=True)
    assert replace(command, **{**TINY, **options}).run() == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_json_holds_every_attack_as_the_function_gives_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, seeds="2")
    assert {name: found[name] for name in ("size", "seeds", "steps", "lr", "limit")} == {
        "size": "16x1",
        "seeds": 2,
        "steps": 2,
        "lr": LR,
        "limit": LIMIT,
    }
    assert [(m["model"], m["reference"]) for m in found["models"]] == [
        (f"{HERE}:good", False),
        ("LayerNorm, GELU", True),
        ("RMSNorm, SwiGLU", True),
        ("LayerNorm, GELU, qk-norm", True),
    ]
    for entry in found["models"]:
        assert [row["seed"] for row in entry["seeds"]] == [0, 1]
        assert entry["seeds"][0]["trace"] != entry["seeds"][1]["trace"]
        assert all(len(row["trace"]) == 3 and not row["rejected"] for row in entry["seeds"])
        assert all(sum(row["by_block"].values()) == pytest.approx(1) for row in entry["seeds"])
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB_SIZE, (2, 9), generator=generator)
    config = replace(reference(), build=f"{HERE}:good")
    again = attack(
        build_own(config, VOCAB_SIZE, 1),
        lambda model: F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()),
        steps=2,
    )
    assert found["models"][0]["seeds"][1] == {"seed": 1, **again.as_json()}


def reference() -> Any:
    from foreshock.core.model_config import ModelConfig

    return ModelConfig(width=16, depth=1, heads=1)


def test_references_are_of_the_same_size_and_see_the_same_tokens() -> None:
    subjects = subjects_of(f"{HERE}:good", Size.parse("32x3x2"), (2, 8))
    seen = []
    for build in subjects.values():
        model, loss_fn = build(0)
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        loss_fn(model)
    assert all(torch.equal(tokens, seen[0]) for tokens in seen)
    for name in list(subjects)[1:]:
        proxy = subjects[name](0)[0]
        assert isinstance(proxy, Proxy)
        assert (len(proxy.blocks), proxy.embed.embedding_dim, proxy.blocks[0].attn.heads) == (3, 32, 2)  # type: ignore
    normed, llama = (subjects[name](0)[0].blocks[0] for name in ("LayerNorm, GELU, qk-norm", "RMSNorm, SwiGLU"))  # type: ignore
    assert isinstance(normed.attn.q_norm, nn.Module)  # type: ignore[union-attr]
    assert not isinstance(normed.attn.q_norm, nn.Identity)  # type: ignore[union-attr]
    assert llama.mlp.gate is not None  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_cliff_is_told_beside_references_that_have_none(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, model=f"{HERE}:bad", steps="40", seeds="1")
    own, *references = (entry["seeds"] for entry in found["models"])
    assert [row["rejected"] for row in own] == [True]
    assert number(own[0]["peak_gradient_norm"]) > LIMIT
    assert not any(row["rejected"] for rows in references for row in rows)


def test_the_table_names_models_verdicts_and_blocks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert replace(Attack(model=f"{HERE}:good", limit="1e-3", seeds="2"), **TINY).run() == 0
    screen = capsys.readouterr().out
    for text in ("LayerNorm, GELU, qk-norm", "RMSNorm, SwiGLU", "2 of 2", "0, 0", "blocks.0", "limit 0.001", "above"):
        assert text in screen
    assert replace(Attack(model=f"{HERE}:good", seeds="1"), **TINY).run() == 0
    assert "0 of 1" in capsys.readouterr().out


def test_options_are_read_from_the_command_line() -> None:
    line = [
        "my_model:build",
        "--size",
        "32x2",
        "--steps",
        "9",
        "--limit",
        "1e4",
        "--lr",
        "0.1",
        "--seeds",
        "3",
        "--json",
    ]
    expected = Attack(model="my_model:build", size="32x2", steps="9", limit="1e4", lr="0.1", seeds="3", json=True)
    assert tyro.cli(Attack, args=line) == expected
    assert Attack(model="m:f").options() == {"steps": STEPS, "lr": LR, "limit": LIMIT}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "big"}, "WIDTHxDEPTH"),
        ({"steps": "0"}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": "1.5"}, "--steps: cannot read '1.5'"),
        ({"lr": "2"}, "lr must be between 0 and 1"),
        ({"limit": "0"}, "limit must be above 0"),
        ({"limit": "high"}, "--limit: cannot read 'high'"),
        ({"seeds": "0"}, "--seeds must be at least 1, got 0"),
        ({"batch_size": "0"}, "--batch-size must be at least 1"),
        ({"seq_len": "1"}, "--seq-len must be at least 2"),
        ({"model": "no_such_module:build"}, "cannot import 'no_such_module:build'"),
        ({"model": f"{HERE}:sizeless"}, r"must be called as build\(width, depth, heads, vocab_size\)"),
        ({"model": f"{HERE}:failing"}, "failed: ValueError: no such size"),
        ({"model": f"{HERE}:infinite"}, "loss_fn must be finite where the attack begins"),
        ({"model": "no_such_file.py:build"}, "there is no file"),
    ],
)
def test_bad_input_is_a_clear_error(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(Attack(model=f"{HERE}:good"), **{**TINY, **options}).run()


def test_a_size_that_no_reference_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="head dimension"):
        subjects_of(f"{HERE}:good", Size.parse("30x2x2"), (2, 8))
