"""Outputs of the same layers in two models, at the same tokens.

Shapes: B samples of T tokens; N tokens of a batch (all dimensions of an output but that of neurons), K tokens sampled
from all batches, D neurons.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from foreshock.core.errors import require
from foreshock.probes.batches import Batches, batches_of, call, evaluating, mask_of, spread
from foreshock.probes.channels import channel_dim
from foreshock.probes.hooks import Taps, first_tensor
from foreshock.probes.precision import accurate

TOKENS = 2048
"""Most tokens of a layer that are kept."""

Pairs = Mapping[str, tuple[nn.Module, nn.Module]]
"""The same module of both models, by path."""


class Sample:
    """A uniform sample of one layer's tokens, the same ones of both models, from a stream of batches."""

    def __init__(self, most: int) -> None:
        """Of at most so many tokens."""
        self._most, self._generator = most, torch.Generator().manual_seed(0)
        self._ranks_K = torch.empty(0, dtype=torch.float64)
        self.not_finite = (0, 0)
        self.a_KD: Tensor = torch.empty(0)
        self.b_KD: Tensor = torch.empty(0)

    def add(self, a_ND: Tensor, b_ND: Tensor) -> None:
        """Take tokens of one batch: every token draws a number, and the smallest stay."""
        counts = [int((~given.isfinite()).sum()) for given in (a_ND, b_ND)]
        self.not_finite = (self.not_finite[0] + counts[0], self.not_finite[1] + counts[1])
        ranks_N = torch.rand(len(a_ND), generator=self._generator, dtype=torch.float64)
        new = ranks_N.argsort()[: self._most]
        self._ranks_K = torch.cat([self._ranks_K, ranks_N[new]])
        kept = self._ranks_K.argsort()[: self._most]
        self._ranks_K = self._ranks_K[kept]
        self.a_KD, self.b_KD = (
            torch.cat([old, values])[kept] if len(old) else values[kept]
            for old, given in ((self.a_KD, a_ND), (self.b_KD, b_ND))
            for values in [accurate(given[new.to(given.device)]).cpu()]
        )


@torch.no_grad()
def paired_samples(
    model_a: nn.Module, model_b: nn.Module, batches: Batches, layers: Pairs, most: int = TOKENS
) -> tuple[dict[str, Sample], dict[str, str]]:
    """Outputs of both models' layers at the same tokens, by path; and of those that have none why.

    Raises:
        ConfigError: outputs of different shapes, or fewer than two tokens.
        UserError: no hook fired.
    """
    samples: dict[str, Sample] = {}
    taps = [_Outputs({name: pair[i] for name, pair in layers.items()}) for i in (0, 1)]
    with ExitStack() as stack:
        for tap in taps:
            stack.callback(tap.close)
        for batch in batches_of(batches, "batches"):
            a, b = (_outputs(model, tap, batch) for model, tap in zip((model_a, model_b), taps, strict=True))
            for name in a:
                if name in b:
                    shapes = tuple(a[name].shape), tuple(b[name].shape)
                    require(shapes[0] == shapes[1], name, "must give outputs of one shape in both models", shapes)
                    samples.setdefault(name, Sample(most)).add(a[name], b[name])
    few = {name: len(sample.a_KD) for name, sample in samples.items() if len(sample.a_KD) < 2}
    require(not few, "batches", "must hold at least two tokens that count", few)
    notes = {name: "it was not called, or gave no real numbers by neuron" for name in layers if name not in samples}
    return {name: samples[name] for name in layers if name in samples}, notes


class _Outputs(Taps[Any]):
    """What modules return, in an evaluation; copied, as modules that come later may change it in place."""

    unfired = "none of the modules was called: the model was compiled before; give the model as it was before compiling"

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(modules, self._copied, training=False)
        self.modules = modules

    @staticmethod
    def _copied(output: Any) -> Tensor | None:
        found = first_tensor(output)
        return None if found is None else found.detach().clone()


def _outputs(model: nn.Module, tap: _Outputs, batch: Any) -> dict[str, Tensor]:
    """The outputs (N, D) heard in one forward pass, without masked tokens."""
    tap.listen()
    mask = run(model, batch)
    found = {name: tokens_of(z, mask, channel_dim(tap.modules[name], z)) for name, z in tap.take().items()}
    return {name: tokens_ND for name, tokens_ND in found.items() if tokens_ND is not None}


def run(model: nn.Module, batch: Any) -> Tensor | None:
    """One forward pass in evaluation mode that leaves nothing behind; gives the batch's mask (B, T), if it has one."""
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    if like is not None:
        batch = tree_map(lambda leaf: _moved(leaf, like) if isinstance(leaf, Tensor) else leaf, batch)
    with evaluating(model):
        call(model, batch)
    return mask_of(batch)


def _moved(given: Tensor, like: Tensor) -> Tensor:
    return given.to(like.device, like.dtype) if given.is_floating_point() else given.to(like.device)


def tokens_of(output: Tensor, mask: Tensor | None, dim: int = -1) -> Tensor | None:
    """The tokens (N, D) of an output that count, neurons in that dimension; None if it has no tokens besides."""
    if output.ndim < 2:
        return None
    output = output.movedim(dim, -1)
    counted = spread(mask, output.shape[:-1])
    return output.flatten(0, -2) if counted is None else output[counted.to(output.device)]
