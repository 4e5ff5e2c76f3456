"""Greedy allocation against a slow reference that masks by hand, and its promises."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from foreshock.core.errors import ConfigError
from foreshock.sparsity import Greedy, sparsify
from foreshock.sparsity.gates import whole
from foreshock.sparsity.selection import targets


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Block(nn.Module):
    """A small and a large linear, side by side, and one that reads what they give."""

    def __init__(self, width: int, small: int) -> None:
        super().__init__()
        self.small = nn.Linear(width, small, bias=False, dtype=torch.float64)
        self.large = nn.Linear(width, 3 * width, bias=False, dtype=torch.float64)
        self.down = nn.Linear(3 * width, width, bias=False, dtype=torch.float64)

    def forward(self, hidden: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        repeated = F.pad(self.small(hidden), (0, self.large.out_features - self.small.out_features))
        return hidden + scale * self.down(torch.tanh(self.large(hidden)) + repeated), None


class Stack(nn.Module):
    """Two blocks in a ModuleList, called with an argument by name, and a head."""

    def __init__(self, width: int = 8, small: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(width, small), Block(width, small)])
        self.head = nn.Linear(width, 3, dtype=torch.float64)

    def forward(self, hidden: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            hidden, _ = block(hidden, scale=1.0 + i)
        out: Tensor = self.head(hidden)
        return out


WEIGHTS = {"small": 2 * 8 / 64, "large": 3.0, "down": 3.0}
"""Sizes over that of a square matrix of the width, 8."""
UNTIED = WEIGHTS | {"small": 1.0}
"""With `small` as wide as the stream, a step of 0.375 is 1 or 3 channels of each: errors are never equal."""


def by_hand(linear: nn.Linear, given: Tensor, sparsity: float) -> Tensor:
    scores = given.abs() * linear.weight.norm(dim=0)
    kept = scores.argsort(dim=-1, descending=True)[..., : whole(linear.in_features, 1 - sparsity)]
    return F.linear(given * torch.zeros_like(scores).scatter_(-1, kept, 1.0), linear.weight)


def slow_block(block: Any, hidden: Tensor, scale: float, sparsities: dict[str, float]) -> Tensor:
    repeated = F.pad(by_hand(block.small, hidden, sparsities["small"]), (0, 16))
    wide = torch.tanh(by_hand(block.large, hidden, sparsities["large"])) + repeated
    return hidden + scale * by_hand(block.down, wide, sparsities["down"])


def slow_greedy(block: Any, batches: list[Tensor], scale: float, target: float, step: float) -> dict[str, float]:
    found = dict.fromkeys(UNTIED, 0.0)
    caps = {name: max(target, 1 - 1 / getattr(block, name).in_features) for name in UNTIED}
    total = sum(UNTIED.values())

    def error(sparsities: dict[str, float]) -> float:
        errors = []
        for hidden in batches:
            missed = slow_block(block, hidden, scale, sparsities) - block(hidden, scale)[0]
            last = missed[:, hidden.shape[1] * 3 // 4 :]
            errors.append(float(last.square().sum(1).sqrt().mean()))
        return sum(errors) / len(errors)

    while (left := target * total - sum(UNTIED[name] * found[name] for name in found)) > 1e-9 * total:
        sizes = {n: min(step / UNTIED[n], caps[n] - found[n], left / UNTIED[n]) for n in found}
        tried = {n: error(found | {n: found[n] + size}) for n, size in sizes.items() if size > 1e-12}
        best = min(tried, key=lambda n: tried[n])
        found[best] += sizes[best]
    return found


@pytest.mark.parametrize("target", [0.3, 0.6])
@torch.no_grad()
def test_greedy_top_k_is_the_slow_reference(target: float) -> None:
    model: Any = Stack(small=8)
    batches = [x(3, 8, 8), x(2, 5, 8, seed=1)]
    with sparsify(model, "wina", target, batches, gate="topk", allocation=Greedy(step=0.375)) as handle:
        found = handle.sparsities
    first, second = model.blocks
    expected = [
        slow_greedy(first, batches, 1.0, target, 0.375),
        slow_greedy(second, [first(hidden)[0] for hidden in batches], 2.0, target, 0.375),
    ]
    for i, by_name in enumerate(expected):
        for name, sparsity in by_name.items():
            assert found[f"blocks.{i}.{name}"] == pytest.approx(sparsity, abs=1e-9)
    assert len({round(value, 6) for value in found.values()}) > 2  # it is no uniform one


@given(st.floats(0, 0.97), st.sampled_from([0.2, 0.5, 1.0]), st.sampled_from(["wina", "teal", "r_sparse"]))
@settings(deadline=None, max_examples=8)
def test_every_block_has_the_target_and_every_linear_less_than_all(target: float, step: float, method: str) -> None:
    model = Stack()
    with sparsify(model, method, target, [x(2, 4, 8)], allocation=Greedy(step=step)) as handle:
        for i in range(2):
            own = {name: handle.sparsities[f"blocks.{i}.{name}"] for name in WEIGHTS}
            effective = sum(WEIGHTS[name] * own[name] for name in own) / sum(WEIGHTS.values())
            assert effective == pytest.approx(target, abs=1e-8)
            assert all(0 <= value < 1 for value in own.values())


def test_what_costs_nothing_is_dropped_first() -> None:
    model: Any = Stack()
    with torch.no_grad():
        model.blocks[0].small.weight.mul_(1e-6)
        model.blocks[1].large.weight.mul_(1e-6)
    with sparsify(model, "teal", 0.3, [x(2, 4, 8)], allocation=Greedy(step=0.1)) as handle:
        found = handle.sparsities
    assert found["blocks.0.small"] == 1 - 1 / 8  # as far as it goes: one channel stays
    assert found["blocks.0.large"] < 0.5
    assert found["blocks.1.large"] > 0.3
    assert found["blocks.1.small"] == 0  # all that `down` has to read


@torch.no_grad()
def test_thresholds_in_force_are_those_of_the_sparsities_found_and_heads_get_the_target() -> None:
    model, given = Stack(), x(8, 6, 8)
    with sparsify(model, "teal", 0.5, given, modules=["blocks.*", "head"], allocation=Greedy(step=0.5)) as handle:
        assert handle.sparsities["head"] == 0.5
        assert handle.gate == "threshold"
        first = handle.thresholds["blocks.0.large"]
        assert first == pytest.approx(float(given.abs().quantile(handle.sparsities["blocks.0.large"])), rel=2**-7)
        assert handle.measured() == {}  # trials are not counted
        model(given)
        measured = handle.measured()
    for path in ("blocks.0.small", "blocks.0.large"):  # later linears read what earlier masks left
        assert measured[path] == pytest.approx(handle.sparsities[path], abs=0.01)


def test_a_model_without_blocks_counts_as_one_and_target_zero_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    given = x(20, 6).float()
    with sparsify(model, "wina", 0.4, given, allocation="greedy") as handle:
        weights = {"0": 54, "2": 36}
        effective = sum(weights[path] * value for path, value in handle.sparsities.items()) / 90
        assert effective == pytest.approx(0.4, abs=1e-9)
    dense = model(given)
    with sparsify(model, "wina", 0.0, given, allocation="greedy"):
        assert torch.equal(model(given), dense)


@torch.no_grad()
def test_blocks_that_keep_caches_are_tried_without_them() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config: Any = LlamaConfig(vocab_size=11, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)  # type: ignore[arg-type]
    model: Any = LlamaForCausalLM(config)
    ids = torch.randint(11, (2, 8))
    by_cache = []
    for use_cache in (True, False):
        batches = [{"input_ids": ids, "use_cache": use_cache}]
        with sparsify(model, "wina", 0.5, batches, allocation=Greedy(step=0.5)) as handle:
            by_cache.append(handle.sparsities)
    assert by_cache[0] == by_cache[1]


@pytest.mark.parametrize("step", [0.0, -0.1, 1.5])
def test_steps_out_of_range_say_so(step: float) -> None:
    with pytest.raises(ConfigError, match="allocation: step"):
        Greedy(step=step)


def test_globs_give_sparsities_and_the_last_one_holds() -> None:
    paths = ["0.q", "0.k", "1.q", "1.mlp"]
    assert targets({"*": 0.5, "*.k": 0.25, "1.*": 0.75}, paths) == dict(
        zip(paths, [0.5, 0.25, 0.75, 0.75], strict=True)
    )
    assert targets({"*.q": 0.5}, paths) == dict(zip(paths, [0.5, 0.0, 0.5, 0.0], strict=True))
    assert targets(0, paths) == dict.fromkeys(paths, 0.0)
