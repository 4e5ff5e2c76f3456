"""The training FLOPs that a run records are those of the blocks that ran."""

from collections.abc import Callable, Mapping

import pytest
from torch import Tensor

from foreshock.core.config import from_json
from foreshock.core.contracts import Observer, StepInfo
from foreshock.core.run_config import RunConfig
from foreshock.core.run_folder import RunFolder
from foreshock.proxy.data.prepare import TokenData, prepare
from foreshock.training.batches import token_batches
from foreshock.training.loop import Loop
from foreshock.training.panel import Panel
from foreshock.training.setup import build_training
from tests.conftest import tiny_config

WIDTH, SEQ_LEN, BATCH = 16, 16, 4
BLOCK = 6 * 12 * WIDTH**2 + 12 * WIDTH * SEQ_LEN
"""FLOPs of a block a token: 6 a weight, and attention."""


class Shares(Observer):
    """Keeps what it is told of the FLOPs, by step."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[float, bool]] = {}

    def read(self, info: StepInfo) -> Mapping[str, Tensor | float]:
        self.seen[info.step] = (info.flops_share, info.seconds > 0)
        return {}


def watched(folder: RunFolder) -> tuple[Loop, Shares, TokenData]:
    config = from_json(RunConfig, folder.config())
    data = prepare(config.data, config.train)
    training, shares = build_training(config, data.vocab_size), Shares()
    training.panel = Panel({"shares": shares})
    return Loop(folder, training, token_batches(data, config)), shares, data


def head_of(data: TokenData) -> int:
    return 6 * WIDTH * data.vocab_size


def test_a_run_that_leaves_blocks_out_records_the_flops_of_those_that_ran(
    make_folder: Callable[..., RunFolder],
) -> None:
    """Blocks in steps 1-12: 2 2 2 3 3 4 4 4 4 4 4 4; a logged step tells the mean since the last one."""
    options = "begin=0.25,interval=0.1667,groups=2"
    folder = make_folder(tiny_config(f"arch_warmup:{options}+model.depth=4+record.log_every=4+record.monitors=[]"))
    loop, shares, data = watched(folder)
    assert loop.run() == "done"
    assert loop.training.interventions["arch_warmup"].unlocks == [(4, 1), (6, 1)]  # type: ignore[attr-defined]
    blocks = [2, 2, 2, 3, 3, 4, 4, 4, 4, 4, 4, 4]
    cost = [head_of(data) + count * BLOCK for count in blocks]
    assert folder.status()["flops"] == pytest.approx(sum(cost) * BATCH * SEQ_LEN, rel=1e-13)
    whole = head_of(data) + 4 * BLOCK
    # A quarter of the run is logged too. The first step has nothing before it, and no speed.
    assert shares.seen.pop(1) == (1.0, False)
    spans = {3: (1, 3), 4: (3, 4), 8: (4, 8), 12: (8, 12)}
    for step, (first, end) in spans.items():
        mean = sum(cost[first - 1 : end - 1]) / (end - first) / whole
        assert shares.seen[step] == (pytest.approx(mean, rel=1e-12), True)


def test_a_whole_model_spends_all_of_its_flops_to_the_last_bit(make_folder: Callable[..., RunFolder]) -> None:
    folder = make_folder(tiny_config("record.log_every=4+record.monitors=[]"))
    loop, shares, data = watched(folder)
    assert loop.run() == "done"
    assert folder.status()["flops"] == 12 * BATCH * SEQ_LEN * (head_of(data) + BLOCK)
    assert {share for share, _ in shares.seen.values()} == {1.0}


@pytest.mark.parametrize("stop", [2, 4, 7])
def test_a_resumed_run_records_the_flops_of_all_its_sittings(make_folder: Callable[..., RunFolder], stop: int) -> None:
    arm = "arch_warmup:begin=0.25,interval=0.1667,groups=2+model.depth=4+record.monitors=[]"
    straight, parts = make_folder(tiny_config(arm), "straight"), make_folder(tiny_config(arm), "parts")
    assert watched(straight)[0].run() == "done"
    first = watched(parts)[0]
    assert first.run(stop=lambda: first.progress.step >= stop) == "interrupted"
    blocks = [2, 2, 2, 3, 3, 4, 4, 4, 4, 4, 4, 4][:stop]
    cost = sum(head_of(watched(parts)[2]) + count * BLOCK for count in blocks)
    assert parts.status()["flops"] == pytest.approx(cost * BATCH * SEQ_LEN, rel=1e-13)
    assert watched(parts)[0].run() == "done"
    assert parts.status()["flops"] == straight.status()["flops"]
