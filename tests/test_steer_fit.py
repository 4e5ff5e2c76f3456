"""Fitting maps: planted ones, end to end against site by site, and a model left as it was."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from foreshock.core.errors import UserError
from foreshock.probes.generators import Generators
from foreshock.probes.wasserstein import wasserstein
from foreshock.steer import LinearAcT, LinEAS, MeanAcT, Method, fit


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shifted_channels(width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    omega = 0.6 + 0.9 * torch.rand(width, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return x(32, width), omega, x(width, seed=8)


@pytest.mark.parametrize("more", [False, True])
def test_lineas_recovers_a_planted_map(more: bool) -> None:
    source, omega, b = shifted_channels()
    target = (omega * source + b)[torch.randperm(32, generator=torch.Generator().manual_seed(1))]
    target = target.repeat(2, 1) if more else target  # every quantile twice: the same distribution
    method = LinEAS(steps=200, dampen=1.0, batch=64)
    with fit(nn.Sequential(nn.Identity()), source, target, sites="0", method=method) as steering:
        own = steering.maps["0"]
    # Gradient descent on a quadratic of each (ω, b): the error falls by at least 1 - lr·λ_min a step, λ_max·lr < 2.
    columns = torch.stack([source.T, torch.ones_like(source.T)], dim=-1)
    curvature = torch.linalg.eigvalsh(2 / 8 * columns.mT @ columns)
    assert curvature.max() * 0.1 < 2
    rate = torch.maximum((1 - 0.1 * curvature[:, 0]).abs(), (1 - 0.1 * curvature[:, 1]).abs()).max()
    start = torch.stack([omega - 1, b]).norm(dim=0).max()
    left = float(start * rate**200) + 1e-12
    assert left < 1e-3
    assert (own.omega_D - omega).abs().max() <= left
    assert (own.b_D - b).abs().max() <= left


def test_the_support_falls_with_gamma() -> None:
    source, counts = x(32, 8), []
    away = torch.logspace(-3, -0.3, 8, dtype=torch.float64)  # channels that differ little go first
    for gamma in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0):
        method = LinEAS(steps=40, gamma=gamma)
        with fit(nn.Sequential(nn.Identity()), source, source * (1 + away) + away, sites="0", method=method) as own:
            counts.append(own.support.counts["0"])
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 8
    assert len(set(counts)) >= 4
    assert counts[-1] == 0


def test_a_step_of_lineas_is_the_one_on_paper() -> None:
    source, _, _ = shifted_channels()
    target = 2 * x(32, 8, seed=3) + 1
    method = LinEAS(steps=1, gamma=0.05, l1=0.7, group=0.4)
    losses: list[float] = []
    model = nn.Sequential(nn.Identity())
    steering = fit(model, source, target, sites="0", method=method, on_step=lambda _, loss: losses.append(loss))
    own = steering.maps["0"]
    order = source.argsort(dim=0)
    away = source.gather(0, order) - target.sort(dim=0).values
    assert losses == [pytest.approx(float(away.square().sum(0).mean()))]
    stepped = {"omega_D": -0.1 * (2 * away * source.gather(0, order)).sum(0) / 8, "b_D": -0.1 * (2 * away).sum(0) / 8}
    for name, z in stepped.items():
        softened = z.sign() * (z.abs() - 0.1 * 0.05 * 0.7).clamp(min=0)
        shrunk = softened * max(1 - 0.1 * 0.05 * 0.4 * math.sqrt(8) / float(softened.norm()), 0)
        torch.testing.assert_close(getattr(own, name), shrunk + (name == "omega_D"))


class Deep(nn.Module):
    """Four layers, each with a norm after it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.GELU()) for _ in range(4)
        )

    def forward(self, z: Tensor) -> Tensor:
        for block in self.blocks:
            z = z + block(z)
        return z


Sets = tuple[Tensor, Tensor]
"""A source and a target."""


def summed_distance(model: nn.Module, fitted: Sets, held: Sets, method: Method) -> float:
    steering = fit(model, *fitted, sites="blocks.*.1", method=method)
    kept: list[Tensor] = []
    norms = [model.get_submodule(f"blocks.{layer}.1") for layer in range(4)]
    handles = [norm.register_forward_hook(lambda _m, _i, out: kept.append(out)) for norm in norms]
    model(held[0])
    steering.remove()
    model(held[1])
    for handle in handles:
        handle.remove()
    return sum(float(wasserstein(a, b).mean()) for a, b in zip(kept[:4], kept[4:], strict=True))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_end_to_end_beats_site_by_site_on_held_out_samples(seed: int) -> None:
    torch.manual_seed(seed)
    model = Deep().double()
    source, target = x(32, 8, seed=seed + 10), x(32, 8, seed=seed + 20).sinh() + x(8, seed=seed)
    held = x(512, 8, seed=seed + 30), x(512, 8, seed=seed + 40).sinh() + x(8, seed=seed)
    with torch.no_grad():
        ours = summed_distance(model, (source, target), held, LinEAS(steps=100))
        apart = summed_distance(model, (source, target), held, LinearAcT(incremental=False))
        untouched = summed_distance(model, (source, target), held, LinEAS(steps=1, lr=1e-12))
    assert ours < apart
    assert ours < 0.5 * untouched


def test_a_model_that_runs_without_gradients_is_refused_by_lineas_alone() -> None:
    class Halting(nn.Sequential):
        def __call__(self, z: Tensor) -> Tensor:
            with torch.no_grad():
                out: Tensor = super().__call__(z)
            return out

    model, (source, omega, b) = Halting(nn.LayerNorm(8)).double(), shifted_channels()
    with pytest.raises(UserError, match=r"no gradients reach 0, .* method='linear_act'"):
        fit(model, source, omega * source + b, method="lineas")
    with fit(model, source, omega * source + b, method="linear_act") as steering:
        assert steering.support == 1


def test_incremental_maps_see_the_ones_before_them() -> None:
    source, omega, b = shifted_channels()
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with fit(model, source, omega * source + b, sites=["1", "0"], method="linear_act") as steering:
        first, second = steering.maps["0"], steering.maps["1"]
        torch.testing.assert_close(model(source), omega * source + b)
    torch.testing.assert_close(first.omega_D, omega)
    torch.testing.assert_close(second.omega_D, torch.ones_like(omega))  # nothing is left to do
    with fit(model, source, omega * source + b, sites="*", method=LinearAcT(incremental=False)) as steering:
        torch.testing.assert_close(steering.maps["1"].omega_D, omega)


class Words(nn.Module):
    """Embeds, and normalises: called as models of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.drop = nn.Embedding(20, 6), nn.LayerNorm(6), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.get_buffer("calls").add_(1)
        normed: Tensor = self.norm(self.drop(self.embed(input_ids)))
        return normed


def words(count: int, low: int, seed: int) -> Tensor:
    return torch.randint(low, low + 10, (count, 5), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pool", ["mean", "last", "max"])
def test_masked_tokens_do_not_count(pool: Any) -> None:
    torch.manual_seed(0)
    model, source, target = Words(), words(6, 0, 1), words(6, 8, 2)
    plain = fit(model, source, target, method=MeanAcT(pool=pool)).maps["norm"]
    padded = torch.cat([source, torch.full((6, 3), 19)], dim=1)
    mask = torch.tensor([1] * 5 + [0] * 3).expand(6, 8)
    rows = [
        {"input_ids": padded[:2], "attention_mask": mask[:2]},
        {"input_ids": padded[2:], "attention_mask": mask[2:]},
    ]
    model.norm._forward_hooks.clear()
    torch.testing.assert_close(fit(model, rows, target, method=MeanAcT(pool=pool)).maps["norm"].b_D, plain.b_D)
    model.norm._forward_hooks.clear()
    ignored = fit(model, padded, target, method=MeanAcT(pool=pool)).maps["norm"].b_D
    assert not torch.allclose(ignored, plain.b_D, atol=1e-3)


def test_batches_of_any_form_and_minibatches_are_the_same_each_time() -> None:
    torch.manual_seed(0)
    model, source, target = Words(), words(40, 0, 1), words(12, 8, 2)
    forms: list[Any] = [
        source,
        [source[:7], source[7:]],
        [(source[:30], None), (source[30:],)],
        {"input_ids": source},
        [{"input_ids": source[:1]}, {"input_ids": source[1:]}],
        DataLoader(source, batch_size=9),  # type: ignore[arg-type]
    ]
    found = []
    for form in forms:
        with fit(model, form, target, method="lineas:steps=5,batch=8") as steering:
            found.append(steering.maps["norm"].b_D)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])  # sums in another order
    with fit(model, source, target, method=LinEAS(steps=5, batch=8)) as again:
        assert torch.equal(again.maps["norm"].b_D, found[0])
    with fit(model, source, target, method=LinEAS(steps=5, batch=8, seed=1)) as other_draw:
        assert not torch.equal(other_draw.maps["norm"].b_D, found[0])


@pytest.mark.parametrize("fails", [False, True])
def test_a_fit_leaves_the_model_as_it_was(fails: bool) -> None:
    torch.manual_seed(0)
    model = Words().train()
    model.norm.eval()
    model.embed.weight.requires_grad_(False)
    model.norm.weight.grad = torch.ones(6)
    source, target, generators = words(8, 0, 1), words(8, 8, 2), Generators()

    def on_step(step: int, _loss: float) -> None:
        if fails and step == 2:
            raise KeyboardInterrupt

    try:
        fit(model, source, target, method="lineas:steps=4", on_step=on_step).remove()
    except KeyboardInterrupt:
        assert fails
    assert generators.agree_with(Generators())
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True]
    assert torch.equal(model.norm.weight.grad, torch.ones(6))
    assert model.norm.bias.grad is None
    assert model.get_buffer("calls") == 0
    assert not any(module._forward_hooks for module in model.modules())


class Heads(nn.Module):
    """A norm within each of two heads, with the tokens before or after the heads."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.norm, self.tokens = nn.LayerNorm(4), tokens

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        B, T, _ = hidden.shape
        normed: Tensor = self.norm(hidden.view(B, T, 2, 4).transpose(1, self.tokens)).transpose(1, self.tokens)
        return normed.flatten(2)


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("tokens", [1, 2])
def test_masked_tokens_do_not_count_in_heads_either(tokens: int, pool: Any) -> None:
    hidden, mask = x(6, 5, 8), torch.ones(6, 5, dtype=torch.long)
    mask[:, :2] = 0
    other = hidden.masked_fill(mask[..., None] == 0, 100.0)
    other[..., 0] *= 1 + 9 * (mask == 0)
    maps = []
    for given in (hidden, other):
        source = {"hidden": given, "attention_mask": mask}
        target = {"hidden": x(6, 5, 8, seed=1), "attention_mask": mask}
        with fit(Heads(tokens).double(), source, target, sites="norm", method=MeanAcT(pool=pool)) as steering:
            maps.append(steering.maps["norm"].b_D)
    assert torch.equal(*maps)


class Named(NamedTuple):
    """Positional inputs with names."""

    hidden: Tensor


def test_named_tuples_are_cut_into_minibatches_too() -> None:
    source, target, model = x(9, 3), x(9, 3, seed=1), nn.Sequential(nn.LayerNorm(3)).double()
    method = LinEAS(steps=2, batch=4)
    with fit(model, [Named(source)], [Named(target)], sites="0", method=method) as named:
        pass
    with fit(model, source, target, sites="0", method=method) as plain:
        pass
    assert torch.equal(named.maps["0"].b_D, plain.maps["0"].b_D)
