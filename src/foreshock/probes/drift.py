"""How far two models' activations are apart, layer by layer: of two checkpoints, two precisions, or an edit.

Shapes: B samples of T tokens, K tokens sampled from all batches, D neurons.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from foreshock.core.errors import ConfigError, require, unknown_path
from foreshock.core.files import jsonable
from foreshock.probes.batches import Batches
from foreshock.probes.hooks import blocks_of, path
from foreshock.probes.magnitude import modules_of
from foreshock.probes.paired import TOKENS, Pairs, Sample, paired_samples
from foreshock.probes.wasserstein import wasserstein

LARGEST = 5
"""Neurons that are named."""
FLOOR = 0.01
"""Least standard deviation of a neuron, as a share of the RMS over the layer's: below, it counts as that share."""


@dataclass(frozen=True, kw_only=True)
class LayerDrift:
    """How far apart the activations of one layer are."""

    relative: float
    """Mean over neurons of W₁ / σ, σ the neuron's standard deviation in model_a; dimensionless."""
    distance: float
    """Mean over neurons of W₁, the Wasserstein distance between its values in the two models; activation units."""
    paired: float
    """‖b - a‖ / ‖a‖ over all values of the same tokens; dimensionless. At least 0 where distributions are equal."""
    neurons: tuple[tuple[int, float], ...]
    """The neurons with the largest W₁ / σ, and that; largest first."""
    tokens: int
    """How many were compared."""
    not_finite: tuple[int, int]
    """Values that are not finite, in model_a and in model_b, among all tokens; with any, the layer is at infinity."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far apart two models are, by layer; `print` it for a table."""

    by_layer: Mapping[str, LayerDrift]
    """By module path, in the order of the model."""
    notes: Mapping[str, str]
    """Why a layer that was chosen is not in `by_layer`, by path."""

    @property
    def worst(self) -> str:
        """The layer with the largest relative distance; the first of those that are equal."""
        return max(self.by_layer, key=lambda name: self.by_layer[name].relative)

    def as_json(self) -> dict[str, Any]:
        """All of it as texts, numbers, lists and mappings; what is not finite as a text."""
        fields: dict[str, Any] = jsonable(asdict(self) | {"worst": self.worst})
        return fields

    def __str__(self) -> str:
        """A table, one layer a line, and what is to be said besides."""
        width = max(map(len, [*self.by_layer, "layer"]))
        lines = [f"{'layer':<{width}}  W1/sd      W1         paired     largest neurons (W1/sd)"]
        for name, layer in self.by_layer.items():
            numbers = "  ".join(f"{value:<9.3g}" for value in (layer.relative, layer.distance, layer.paired))
            lines.append(f"{name:<{width}}  {numbers}  " + ", ".join(f"{j} ({far:.3g})" for j, far in layer.neurons))
        for which, model in enumerate(("model_a", "model_b")):
            bad = {name: count for name, layer in self.by_layer.items() if (count := layer.not_finite[which])}
            if bad:
                first = next(iter(bad))
                lines.append(f"{model} is not finite in {len(bad)} layers, first in {first}: {bad[first]:,} values")
        return "\n".join([*lines, *(f"{name}: {note}" for name, note in self.notes.items())])


def drift(
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Batches,
    *,
    modules: str | Sequence[str] | None = None,
    max_tokens: int = TOKENS,
) -> Drift:
    """Compare the distributions of every neuron's activations in two models on the same batches.

    For neuron j of a layer W₁(j) = mean_k |a_(k)j - b_(k)j|, sorted over tokens (2503.10679's distance with p = 1 and a
    mean). It ignores which token a value belongs to: that is what `paired` adds, and W₁ ≤ mean |b - a|. The layer's
    `relative` is the mean of W₁(j) / max(σ_j, 0.01·√mean σ²), σ_j over tokens in model_a.

    Both run in evaluation mode, without gradients, drawing the same random numbers; afterwards modes, buffers and
    the global generators are as they were. The last dimension of a layer's output is its neurons, all others are
    tokens; of several calls in a forward pass the last is taken. What `torch.compile` returned runs as it was
    before. Inputs go to each model's device, real ones to its dtype. The tokens compared are a uniform sample of a
    fixed seed. Values that are not finite are counted and not refused, so that it can be seen where a diverged
    model breaks first. Cost: two forward passes a batch, and 2·K·D numbers of each layer in memory.

    Args:
        model_a: the reference; its σ is the unit.
        model_b: another checkpoint, a copy in another precision, or a copy with an edit.
        batches: a tensor (B, …), a mapping of inputs by name, or several batches, each a tensor, a tuple of positional
            inputs or a mapping. Positions where a mapping's `attention_mask` (B, T) is 0 do not count.
        modules: globs of module names. The default: the blocks, or the children of a model that has none.
        max_tokens: most tokens K of a layer that are compared.

    Raises:
        ConfigError: no layer in common, or a glob that matches none (the nearest are offered); outputs of different
            shapes; fewer than two tokens; nothing measured.
        UserError: the model was compiled before, so that no hook fires.
    """
    require(max_tokens >= 2, "max_tokens", "must be at least 2", max_tokens)
    model_a, model_b = (getattr(model, "_orig_mod", model) for model in (model_a, model_b))
    layers = common_modules(model_a, model_b, modules)
    samples, notes = paired_samples(model_a, model_b, batches, layers, max_tokens)
    if not samples:
        raise ConfigError(f"modules: nothing could be measured; {'; '.join(f'{k}: {v}' for k, v in notes.items())}")
    return Drift(by_layer={name: _compared(sample) for name, sample in samples.items()}, notes=notes)


def common_modules(model_a: nn.Module, model_b: nn.Module, patterns: str | Sequence[str] | None) -> Pairs:
    """The modules of model_a that the globs, or the default, choose and that model_b has as well.

    Raises:
        ConfigError: there is none; the nearest names are offered.
    """
    require(patterns is None or bool(patterns), "modules", "must name at least one module, or be left out", patterns)
    chosen = modules_of(model_a, patterns) if patterns is not None else blocks_of(model_a)
    chosen = chosen or {path(name): child for name, child in model_a.named_children()}
    require(bool(chosen), "model_a", "must have modules to compare, as blocks or children", type(model_a).__name__)
    others = {path(name): module for name, module in model_b.named_modules() if name}
    common = {name: (module, others[name]) for name, module in chosen.items() if name in others}
    if not common:
        raise unknown_path("module of model_b", next(iter(chosen)), list(others))
    return common


def _compared(sample: Sample) -> LayerDrift:
    a_KD, b_KD = sample.a_KD, sample.b_KD
    if any(sample.not_finite):
        bad_D = (~(a_KD.isfinite() & b_KD.isfinite())).sum(0)
        named = tuple((int(j), math.inf) for j in bad_D.argsort(descending=True, stable=True)[:LARGEST] if bad_D[j])
        away = {"relative": math.inf, "distance": math.inf, "paired": math.inf}
        return LayerDrift(**away, neurons=named, tokens=len(a_KD), not_finite=sample.not_finite)
    distance_D = wasserstein(a_KD, b_KD, p=1).double()
    sd_D = a_KD.double().std(0, correction=0)
    unit_D = sd_D.clamp(min=FLOOR * float(sd_D.square().mean().sqrt()))
    relative_D = torch.where(distance_D > 0, distance_D / unit_D, 0.0)
    largest = relative_D.argsort(descending=True, stable=True)[:LARGEST]
    difference, size = (b_KD - a_KD).double().square().sum().sqrt(), a_KD.double().square().sum().sqrt()
    return LayerDrift(
        relative=float(relative_D.mean()),
        distance=float(distance_D.mean()),
        paired=float(difference / size) if difference else 0.0,
        neurons=tuple((int(j), float(relative_D[j])) for j in largest),
        tokens=len(a_KD),
        not_finite=(0, 0),
    )
