"""Maps merged into parameters equal maps by hooks, and come out again to the bit."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from foreshock.core.errors import ConfigError, UserError
from foreshock.steer import AffineMap, Steering, fit

D = 6


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def affine(size: int = D, seed: int = 0) -> AffineMap:
    return AffineMap(omega_D=1 + x(size, seed=seed + 50), b_D=x(size, seed=seed + 60))


class GemmaRMSNorm(nn.Module):
    """Multiplies by 1 + weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, z: Tensor) -> Tensor:
        scaled: Tensor = z * z.square().mean(-1, keepdim=True).rsqrt() * (1 + self.weight)
        return scaled


def transposed() -> nn.Module:
    linear: nn.Module = Conv1D(D, D)  # type: ignore[no-untyped-call]
    return linear


class Feeds(nn.Module):
    """A norm that two linears read, one of them without bias; and, if asked to, something else too."""

    def __init__(self, norm: nn.Module, *, leaks: bool = False, linears: bool = True) -> None:
        super().__init__()
        self.norm, self.up, self.gate = norm, transposed(), nn.Linear(D, D, bias=False)
        self.leaks, self.linears = leaks, linears

    def forward(self, z: Tensor) -> Tensor:
        n: Tensor = self.norm(z)
        if not self.linears:
            return n
        out: Tensor = self.up(n) * self.gate(n).tanh()
        return out + n if self.leaks else out


def ready(model: nn.Module) -> nn.Module:
    """In doubles, with parameters and statistics that are nothing special, in eval mode."""
    model = model.double().eval()
    for seed, (name, tensor) in enumerate(model.state_dict().items()):
        if tensor.is_floating_point():
            drawn = x(*tensor.shape, seed=seed + 100)
            tensor.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn)
    return model


IMAGE, TOKENS = (3, D, 5, 4), (3, 5, D)

CASES: Mapping[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "layer_norm": (lambda: nn.Sequential(nn.LayerNorm(D)), "0", TOKENS),
    "layer_norm_without_bias": (lambda: nn.Sequential(nn.LayerNorm(D, bias=False)), "0", TOKENS),
    "linear": (lambda: nn.Sequential(nn.Linear(D, D)), "0", TOKENS),
    "linear_without_bias": (lambda: nn.Sequential(nn.Linear(D, D, bias=False)), "0", TOKENS),
    "conv1d_of_transformers": (lambda: nn.Sequential(transposed()), "0", TOKENS),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(D, D, 3, bias=False)), "0", IMAGE),
    "batch_norm": (lambda: nn.Sequential(nn.BatchNorm2d(D)), "0", IMAGE),
    "group_norm": (lambda: nn.Sequential(nn.GroupNorm(2, D)), "0", IMAGE),
    "rms_norm": (lambda: Feeds(nn.RMSNorm(D)), "norm", TOKENS),
    "gemma_norm": (lambda: Feeds(GemmaRMSNorm(D)), "norm", TOKENS),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_merged_is_hooked_and_comes_out_to_the_bit(case: str, strength: float) -> None:
    make, site, shape = CASES[case]
    model, z = ready(make()), x(*shape, seed=3)
    state, before = copy.deepcopy(model.state_dict()), model(z)
    steering = Steering(model, {site: affine()}, strength=strength).attach()
    hooked = model(z)
    assert not torch.allclose(hooked, before, atol=1e-2)
    merged = steering.merge(example=z)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(model(z), hooked, rtol=1e-10, atol=1e-10)  # roundings of a double, 1e6 times over
    assert set(merged.touched) == {
        name for name, value in model.state_dict().items() if name not in state or not torch.equal(value, state[name])
    }
    merged.undo()
    merged.undo()
    assert steering.attached
    assert torch.equal(model(z), hooked)
    steering.remove()
    assert torch.equal(model(z), before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_scale_alone_needs_no_place_for_a_shift() -> None:
    model, z = ready(Feeds(nn.RMSNorm(D), leaks=True)), x(*TOKENS)
    steering = Steering(model, {"norm": AffineMap(omega_D=affine().omega_D, b_D=torch.zeros(D).double())})
    with steering:
        hooked = model(z)
    with steering.merge() as merged:
        assert merged.touched == ("norm.weight",)
        torch.testing.assert_close(model(z), hooked, rtol=1e-10, atol=1e-10)
    with Steering(model, {"norm": affine()}, strength=0).merge() as nothing:
        assert nothing.touched == ()


def test_norm_and_what_reads_it_may_both_be_sites() -> None:
    model, z = ready(Feeds(nn.RMSNorm(D))), x(*TOKENS)
    steering = Steering(model, {"gate": affine(seed=1), "norm": affine(), "up": affine(seed=2)})
    with steering:
        hooked = model(z)
    with steering.merge(example=(z,)):
        torch.testing.assert_close(model(z), hooked, rtol=1e-10, atol=1e-10)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    model[1].weight = model[0].weight
    return model


def ranged() -> AffineMap:
    return AffineMap(**affine().tensors(), low_D=-torch.ones(D).double(), high_D=torch.ones(D).double())


@pytest.mark.parametrize(
    ("model", "site", "own", "message"),
    [
        (Feeds(nn.RMSNorm(D)), "norm", affine(), r"no bias for a shift: norm; pass merge\(example="),
        (nn.Sequential(nn.Identity()), "0", affine(), "cannot be merged into Identity"),
        (nn.Sequential(nn.LayerNorm(D, elementwise_affine=False)), "0", affine(), "has no weight"),
        (tied(), "1", affine(), r"weight is shared \(0.weight, 1.weight\)"),
        (nn.Sequential(parametrizations.spectral_norm(nn.Linear(D, D))), "0", affine(), "computes its weight"),
        (nn.Sequential(nn.LayerNorm((5, D))), "0", affine(), "normalises several dimensions"),
        (nn.Sequential(nn.LayerNorm(D)), "0", ranged(), "range of quantiles cannot be merged"),
    ],
)
def test_what_cannot_be_merged_is_told(model: nn.Module, site: str, own: AffineMap, message: str) -> None:
    check_refused(model, site, own, message, None)


@pytest.mark.parametrize(
    ("options", "message"), [({"leaks": True}, "more than linears reads"), ({"linears": False}, "no linear reads")]
)
def test_a_shift_that_others_read_is_not_folded(options: dict[str, bool], message: str) -> None:
    check_refused(Feeds(nn.RMSNorm(D), **options), "norm", affine(), message, x(*TOKENS))


def test_other_maps_in_force_at_the_site_are_composed_not_merged_past() -> None:
    model = ready(nn.Sequential(nn.LayerNorm(D)))
    with (
        Steering(model, {"0": affine()}),
        pytest.raises(UserError, match="other maps are in force there too"),
    ):
        Steering(model, {"0": affine(seed=1)}).merge()


def test_what_else_changes_the_output_of_a_site_is_not_merged_past() -> None:
    model: Any = ready(nn.Sequential(nn.LayerNorm(D)))
    turned = x(D, D, seed=3)
    model[0].register_forward_hook(lambda _norm, _inputs, output: output @ turned)
    steering = Steering(model, {"0": affine()}).attach()
    hooked = model(x(*TOKENS))
    with pytest.raises(UserError, match="another forward hook is on it"):
        steering.merge()
    assert torch.equal(model(x(*TOKENS)), hooked)


def test_a_shift_is_folded_before_maps_of_others_after_the_linears() -> None:
    model, z = ready(Feeds(nn.RMSNorm(D))), x(*TOKENS)
    steering = Steering(model, {"norm": affine()}).attach()
    with Steering(model, {"gate": affine(seed=1)}):
        hooked = model(z)
        with steering.merge(example=z):
            torch.testing.assert_close(model(z), hooked)


def test_merged_maps_are_not_put_on_a_second_time() -> None:
    model = ready(nn.Sequential(nn.LayerNorm(D)))
    steering = Steering(model, {"0": affine()}).attach()
    merged = steering.merge()
    once = model(x(*TOKENS))
    for again in (steering.merge, steering.attach, steering.__enter__):
        with pytest.raises(UserError, match=r"merged already; undo\(\) that first"):
            again()
    assert torch.equal(model(x(*TOKENS)), once)
    merged.undo()
    assert steering.attached
    with steering.merge():
        assert torch.equal(model(x(*TOKENS)), once)


def check_refused(model: nn.Module, site: str, own: AffineMap, message: str, example: Tensor | None) -> None:
    model = ready(model)
    steering = Steering(model, {site: own}).attach()
    state, z = copy.deepcopy(model.state_dict()), x(*TOKENS)
    hooked = model(z)
    with pytest.raises(UserError, match=message):
        steering.merge(example=example)
    assert steering.attached
    assert torch.equal(model(z), hooked)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_masked_linear_is_not_merged_into() -> None:
    """Masks choose inputs by the weights: with ω in them they would choose others."""
    from foreshock.sparsity import sparsify

    model = nn.Sequential(nn.Linear(D, D))
    steering = Steering(model, {"0": affine()})
    with sparsify(model, "wina", 0.5, modules="0"), pytest.raises(UserError, match="another forward hook"):
        steering.merge()
    steering.merge()


def test_a_state_of_another_width_is_refused() -> None:
    steering = Steering(nn.Sequential(nn.LayerNorm(D)), {"0": affine()})
    other = Steering(nn.Sequential(nn.LayerNorm(3)), {"0": affine(3)})
    with pytest.raises(ConfigError, match="must have 6 channels"):
        steering.load_state_dict(other.state_dict())


def test_what_was_fitted_needs_no_example_to_be_merged() -> None:
    """The shift of an RMSNorm goes into the linear behind it, which is found on the source."""
    model = nn.Sequential(nn.RMSNorm(D), nn.Linear(D, D)).double()
    steering = fit(model, x(16, D), x(16, D, seed=1) + 1, sites="0", method="mean_act")
    hooked = model(x(5, D, seed=2))
    with steering.merge():
        assert not steering.attached
        torch.testing.assert_close(model(x(5, D, seed=2)), hooked)
