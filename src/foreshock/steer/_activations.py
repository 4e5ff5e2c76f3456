"""What sites put out for a set of samples, one vector a sample, with or without maps in force.

Shapes: N samples, B of them in a batch, T tokens, D channels; other dimensions are places (of an image, or tokens).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.core.errors import UserError
from foreshock.probes.batches import call, mask_of, spread
from foreshock.probes.channels import channel_dim
from foreshock.probes.precision import accurate
from foreshock.steer._samples import Samples
from foreshock.steer._sites import change_first
from foreshock.steer.maps import AffineMap
from foreshock.steer.methods._contract import Pool

OnStep = Callable[[int, float], None]
"""Told the step and the loss there."""


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """What a method may look at: a frozen model, its sites, and the two sets of samples."""

    model: nn.Module
    """In eval mode; its parameters want no gradients."""
    sites: Mapping[str, nn.Module]
    """By path."""
    source: Samples
    """What is to be mapped."""
    target: Samples
    """Whose distribution it is to be mapped to."""
    on_step: OnStep
    """To be told of every step, by methods that take steps."""

    @torch.no_grad()
    def sources(self, pool: Pool, maps: Mapping[str, AffineMap] | None = None) -> dict[str, Tensor]:
        """Pooled activations (N, D) of the source by site, in the order of calls; outputs of sites with maps mapped."""
        return self.read(self.source.batches(), pool, maps)

    @torch.no_grad()
    def targets(self, pool: Pool) -> dict[str, Tensor]:
        """Pooled activations (N, D) of the target by site, in the order of calls."""
        return self.read(self.target.batches(), pool)

    def read(
        self, batches: Iterable[tuple[Any, int]], pool: Pool, maps: Mapping[str, AffineMap] | None = None
    ) -> dict[str, Tensor]:
        """Pooled activations (N, D) by site; with a graph where gradients are on. Other places act as in `_read`."""
        parts = [_read(self.model, self.sites, batch, size, pool=pool, maps=maps or {}) for batch, size in batches]
        return {site: torch.cat([part[site] for part in parts]) for site in parts[0]}


def _read(
    model: nn.Module,
    sites: Mapping[str, nn.Module],
    batch: Any,
    size: int,
    *,
    pool: Pool,
    maps: Mapping[str, AffineMap],
) -> dict[str, Tensor]:
    """Pooled activations (B, D) of one batch."""
    seen: dict[str, Tensor] = {}
    mask_BT = mask_of(batch)

    def hook(site: str) -> Callable[..., Any]:
        def listen(module: nn.Module, _inputs: Any, output: Any) -> Any:
            if site in seen:
                raise UserError(f"site {site!r} is called several times in one pass; name sites that are called once")

            def change(z: Tensor) -> Tensor:
                dim = channel_dim(module, z)
                z = maps[site](z, dim) if site in maps else z
                seen[site] = _pooled(z, dim, mask_BT, pool, site, size)
                return z

            changed = change_first(output, change)
            if changed is None:
                raise UserError(f"site {site!r} gives no tensor of real numbers; name a module that does")
            return changed if site in maps else None

        return listen

    handles = [module.register_forward_hook(hook(site)) for site, module in sites.items()]
    try:
        call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    silent = [site for site in sites if site not in seen]
    if silent:
        raise UserError(
            f"never called in a forward pass: {', '.join(silent)}; name other sites, and fit before torch.compile"
        )
    return seen


def _pooled(z: Tensor, dim: int, mask_BT: Tensor | None, pool: Pool, site: str, size: int) -> Tensor:
    """One vector a sample, (B, D), in at least fp32; masked tokens do not count."""
    if z.ndim < 2 or len(z) != size:
        raise UserError(f"site {site!r} gives a tensor {tuple(z.shape)} for {size} samples; its rows must be samples")
    z = accurate(z)
    if z.ndim == 2:
        return z.clone()  # what follows may write into it in place
    z = z.movedim(dim, -1)
    counted, z_BPD = spread(mask_BT, z.shape[:-1]), z.flatten(1, -2)
    mask_BP = z_BPD.new_ones(z_BPD.shape[:2]) > 0 if counted is None else counted.flatten(1).to(z.device)
    if not mask_BP.any(dim=1).all():
        raise UserError(f"site {site!r}: a sample has no token or place that counts; leave empty samples out")
    if pool == "last":
        at_B = mask_BP.shape[1] - 1 - mask_BP.flip(1).int().argmax(dim=1)
        return z_BPD[torch.arange(size, device=z.device), at_B]
    if pool == "max":
        return z_BPD.masked_fill(~mask_BP[..., None], -torch.inf).amax(dim=1)
    kept_BPD = z_BPD.where(mask_BP[..., None], 0.0)
    return kept_BPD.sum(dim=1) / mask_BP.sum(dim=1, keepdim=True)
