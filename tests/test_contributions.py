"""Column norms against naive sums, after every way a weight can change; contributions against their formula."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from transformers.pytorch_utils import Conv1D

from foreshock.core.errors import UserError
from foreshock.probes.contributions import column_norms, contributions, inputs_of, matrix_of


def naive(matrix_MN: Tensor) -> Tensor:
    """One column at a time, in fp64."""
    return torch.stack([column.double().square().sum().sqrt() for column in matrix_MN.detach().unbind(1)])


def agrees(linear: Any) -> bool:
    # Both are the rounded root of the same sum: fp32 squares and sums of 3 to 5 numbers, each within 2⁻²⁴.
    return torch.allclose(column_norms(linear).double(), naive(linear.weight), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_a_linear_in_fp32_or_better(dtype: torch.dtype) -> None:
    linear = nn.Linear(4, 3, dtype=dtype)
    assert column_norms(linear).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert column_norms(linear).shape == (4,)
    assert agrees(linear)
    assert not column_norms(linear).requires_grad


def test_of_conv1d_whose_weight_is_transposed() -> None:
    conv = Conv1D(3, 5)  # type: ignore[no-untyped-call]
    assert matrix_of(conv).shape == (3, 5)
    assert inputs_of(conv) == 5
    assert torch.allclose(column_norms(conv).double(), naive(conv.weight.T), rtol=1e-6)


def test_of_a_fused_linear_the_squares_of_its_parts_add_up() -> None:
    parts = [nn.Linear(6, m) for m in (6, 2, 2)]
    fused = nn.Linear(6, 10)
    fused.load_state_dict({name: torch.cat([part.state_dict()[name] for part in parts]) for name in ("weight", "bias")})
    squares = torch.stack([column_norms(part).square() for part in parts]).sum(0)
    assert torch.allclose(column_norms(fused).square(), squares, rtol=1e-6)


def in_place(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight.mul_(2)


def one_element(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight[0, 0] += 3


def by_optimizer(linear: nn.Linear) -> None:
    linear(torch.ones(1, linear.in_features, dtype=linear.weight.dtype)).sum().backward()
    torch.optim.SGD(linear.parameters(), lr=1.0).step()


def by_fused_optimizer(linear: nn.Linear) -> None:
    linear(torch.ones(1, linear.in_features, dtype=linear.weight.dtype)).sum().backward()
    version = linear.weight._version
    torch.optim.AdamW(linear.parameters(), lr=1.0, fused=True).step()
    assert linear.weight._version == version  # what makes it a case of its own


def in_inference_mode(linear: nn.Linear) -> None:
    with torch.inference_mode():
        linear.weight.add_(1)


def loaded(linear: nn.Linear) -> None:
    linear.load_state_dict(nn.Linear(4, 3).state_dict())


def assigned(linear: nn.Linear) -> None:
    linear.load_state_dict(nn.Linear(4, 3).state_dict(), assign=True)


def replaced(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(torch.randn(3, 4))


def to_half(linear: nn.Linear) -> None:
    linear.to(torch.bfloat16)


def to_double(linear: nn.Linear) -> None:
    linear.double()


def set_data(linear: nn.Linear) -> None:
    linear.weight.data = torch.randn(3, 4)


def moved_within_its_storage(linear: nn.Linear) -> None:
    both = torch.randn(2, 3, 4)
    linear.weight.data = both[0]
    column_norms(linear)
    linear.weight.data = both[1]


def parametrized(linear: nn.Linear) -> None:
    parametrize.register_parametrization(linear, "weight", Doubled())


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


CHANGES: list[Callable[[nn.Linear], None]] = [
    *(in_place, one_element, by_optimizer, by_fused_optimizer, in_inference_mode, loaded, assigned, replaced),
    *(to_half, to_double, set_data, moved_within_its_storage, parametrized),
]


@pytest.mark.parametrize("change", CHANGES)
def test_kept_until_the_weight_changes(change: Callable[[nn.Linear], None]) -> None:
    linear = nn.Linear(4, 3)
    before = column_norms(linear)
    assert column_norms(linear) is before
    change(linear)
    assert agrees(linear)
    assert column_norms(linear) is not before
    assert agrees(linear)


def test_storage_that_is_taken_again_is_not_taken_for_the_old_one() -> None:
    linear = nn.Linear(4, 3)
    for _ in range(50):  # the allocator gives freed memory out again
        linear.weight.data = torch.randn(3, 4)
        assert agrees(linear)
        linear.weight.data = torch.randn(3, 4)
        linear.weight.data = torch.randn(3, 4)


def test_a_parametrized_weight_is_the_one_in_force_and_reading_it_changes_no_state() -> None:
    torch.manual_seed(0)
    linear: Any = parametrizations.spectral_norm(nn.Linear(4, 3))
    state = {name: value.clone() for name, value in linear.state_dict().items()}
    norms = column_norms(linear)
    assert all(torch.equal(value, state[name]) for name, value in linear.state_dict().items())
    assert all(module.training for module in linear.modules())
    assert torch.allclose(norms.double(), naive(linear.eval().weight), rtol=1e-6)
    with torch.no_grad():
        linear.get_parameter("parametrizations.weight.original")[:, 0] *= 3
    assert agrees(linear)
    parametrize.remove_parametrizations(linear, "weight")
    assert agrees(linear)


def test_copies_have_norms_of_their_own_and_nothing_is_kept_alive() -> None:
    linear = nn.Linear(4, 3)
    before = column_norms(linear)
    other = copy.deepcopy(linear)
    in_place(other)
    assert torch.equal(column_norms(linear), before)
    assert agrees(other)
    gone = weakref.ref(linear), weakref.ref(linear.weight)
    del linear
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_norms_of_inference_tensors_are_made_anew_and_are_no_inference_tensors_elsewhere() -> None:
    with torch.inference_mode():
        made_there = nn.Linear(4, 3)
        column_norms(made_there)
        made_there.weight.mul_(2)
        assert agrees(made_there)
    here = nn.Linear(4, 3)
    with torch.inference_mode():
        norms = column_norms(here)
    assert not norms.is_inference()


@given(st.integers(1, 5), st.integers(1, 6), st.lists(st.integers(1, 3), max_size=2), st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_contributions_are_the_sizes_of_the_columns_times_the_input(
    outputs: int, inputs: int, tokens: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inputs, outputs, dtype=torch.float64)
    x = torch.randn(*tokens, inputs, dtype=torch.float64, generator=generator, requires_grad=True)
    found = contributions(x, linear)
    assert found.shape == x.shape
    assert not found.requires_grad
    terms = linear.weight * x[..., None, :]  # the summands of y, (…, M, N)
    assert torch.allclose(found, terms.norm(dim=-2), rtol=1e-12)


def test_of_low_precision_inputs_nothing_is_rounded_again() -> None:
    linear = nn.Linear(6, 4)
    x = torch.randn(5, 6).bfloat16()
    found = contributions(x, linear)
    assert found.dtype == torch.float32
    assert torch.equal(found, x.float().abs() * column_norms(linear))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.LayerNorm(4), "no linear"),
        (nn.Bilinear(2, 2, 2), "no linear"),
        (nn.Linear(4, 3, device="meta"), "meta device"),
    ],
)
def test_what_has_no_column_norms_says_so(module: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        column_norms(module)


def test_a_quantised_weight_says_so() -> None:
    linear = nn.Linear(4, 3)
    linear.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"torch.int8.*quantised"):
        column_norms(linear)
