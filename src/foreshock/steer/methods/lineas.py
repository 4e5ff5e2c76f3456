"""LinEAS: all maps end to end, by proximal gradient descent on a sum of Wasserstein distances."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foreshock.core.errors import UserError, require
from foreshock.steer.methods._contract import Method, Pool, check_pool

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from foreshock.steer._activations import Fitting
    from foreshock.steer._samples import Samples
    from foreshock.steer.maps import AffineMap


@dataclass(frozen=True, kw_only=True)
class LinEAS(Method):
    """Maps at all sites at once, so that each is fitted to what the ones before it make of the source (2503.10679).

    The source runs through the model with all maps T(z) = ω ⊙ z + b (at first 1 and 0), the target once through the
    untouched one. The loss, with pooled vectors x of the source after the map and y of the target, sorted:

        L = mean over sites of mean over channels of Σᵢ |x₍ᵢ₎ - y₍ᵢ₎|^p  + γ (λ₁ R₁ + λ_G R_G)(ω - 1) + the same of b

    Σᵢ is the paper's: over the samples, with neither 1/N nor a root, so that the learning rate means something at a
    number of samples only. R₁ is the sum of |entries| of a site's vector, R_G is √D times its length. Every step is one
    of SGD without momentum on the first term, and then the exact proximal step of the second, at thresholds of the
    current learning rate times γ λ: entries, and whole sites, become exactly 1 and 0. The learning rate falls by a
    cosine from `lr` to `lr · dampen`.

    The first term's gradients are divided by channels and sites and the thresholds are not: the γ at which the
    support shrinks is the smaller the more there are of both.
    """

    steps: int = 1000
    """Steps of SGD. The paper: 1,000 for 32 samples, 10,000 for 1,024."""
    lr: float = 0.1
    """Learning rate at the first step."""
    dampen: float = 0.1
    """Share of it that is left at the last step, in [0, 1]. That it is dampened is the paper's, this number ours."""
    batch: int = 32
    """Samples of either set in a step, drawn anew without replacement; all of them, where there are no more."""
    gamma: float = 0.0
    """γ, strength of the regulariser, in [0, 1]."""
    l1: float = 1.0
    """λ₁, weight of single entries in it, 0 or more."""
    group: float = 1.0
    """λ_G, weight of whole sites in it, 0 or more."""
    p: int = 2
    """Power of the distances, 1 or 2. Which one made the paper's results is not known."""
    pool: Pool = "mean"
    """`mean`, `last` or `max` of a sample's tokens or places; the mean is AcT's, the paper does not say."""
    seed: int = 0
    """Of the drawing of samples; nothing else is random."""

    def __post_init__(self) -> None:
        check_pool(self.pool)
        require(isinstance(self.steps, int) and self.steps >= 1, "lineas:steps", "must be 1 or more", self.steps)
        require(math.isfinite(self.lr) and self.lr > 0, "lineas:lr", "must be a finite number above 0", self.lr)
        require(self.batch >= 4, "lineas:batch", "must be at least 4: fewer samples have no distribution", self.batch)
        require(self.p in (1, 2), "lineas:p", "must be 1 or 2", self.p)
        for name in ("gamma", "dampen"):
            require(0 <= getattr(self, name) <= 1, f"lineas:{name}", "must be in [0, 1]", getattr(self, name))
        for name in ("l1", "group"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"lineas:{name}", "must be a finite number, 0 or more", value)

    def maps(self, fitting: Fitting) -> Mapping[str, AffineMap]:
        """The maps after the last step.

        Raises:
            UserError: the loss is not finite at a step; the step is named.
        """
        import torch

        from foreshock.steer.maps import AffineMap

        targets = fitting.targets(self.pool)
        maps = {
            site: AffineMap(omega_D=torch.ones_like(target_MD[0]), b_D=torch.zeros_like(target_MD[0]))
            for site, target_MD in targets.items()
        }
        generator = torch.Generator().manual_seed(self.seed)
        for step in range(self.steps):
            sources = _drawn(fitting.source, self.batch, generator)
            rows = _indices(len(fitting.target), self.batch, generator)
            chosen = {site: target_MD[rows.to(target_MD.device)] for site, target_MD in targets.items()}
            loss, gradients = self._gradients(fitting, sources, chosen, maps)
            if not math.isfinite(loss):
                raise UserError(f"lineas: the loss is {loss} at step {step}; give a smaller lr, it was {self.lr:g}")
            lr = self.lr * (self.dampen + (1 - self.dampen) * (1 + math.cos(math.pi * step / self.steps)) / 2)
            maps = {site: self._stepped(own, *gradients[site], lr) for site, own in maps.items()}
            fitting.on_step(step, loss)
        return maps

    def _gradients(
        self,
        fitting: Fitting,
        sources: Iterable[tuple[Any, int]],
        targets: Mapping[str, Tensor],
        maps: Mapping[str, AffineMap],
    ) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
        """The first term of the loss, and its gradients for ω and b by site."""
        import torch

        from foreshock.probes.wasserstein import wasserstein
        from foreshock.steer.maps import AffineMap

        with torch.enable_grad():
            leaves = {
                site: AffineMap(omega_D=own.omega_D.clone().requires_grad_(), b_D=own.b_D.clone().requires_grad_())
                for site, own in maps.items()
            }
            mapped = fitting.read(sources, self.pool, leaves)
            cut = [site for site, source_ND in mapped.items() if not source_ND.requires_grad]
            if cut:
                raise UserError(
                    f"lineas: no gradients reach {', '.join(cut)}, as the model runs them under torch.no_grad; call "
                    "the part that does not, name other sites, or take method='linear_act'"
                )
            distances = [
                len(source_ND) * wasserstein(source_ND, targets[site], p=self.p).mean()
                for site, source_ND in mapped.items()
            ]
            loss = torch.stack([distance.to(distances[0].device) for distance in distances]).mean()
            flat = [tensor for own in leaves.values() for tensor in (own.omega_D, own.b_D)]
            gradients = iter(torch.autograd.grad(loss, flat))
        return loss.item(), {site: (next(gradients), next(gradients)) for site in leaves}

    def _stepped(self, own: AffineMap, of_omega_D: Tensor, of_b_D: Tensor, lr: float) -> AffineMap:
        """The map after a step of SGD and one of the regulariser."""
        from foreshock.steer.maps import AffineMap
        from foreshock.steer.prox import sparse_group

        l1, group = lr * self.gamma * self.l1, lr * self.gamma * self.group * math.sqrt(len(own.b_D))
        away_D = sparse_group(own.omega_D - lr * of_omega_D - 1, l1, group)
        return AffineMap(omega_D=1 + away_D, b_D=sparse_group(own.b_D - lr * of_b_D, l1, group))


def _drawn(samples: Samples, batch: int, generator: Generator) -> Iterable[tuple[Any, int]]:
    return samples.take(_indices(len(samples), batch, generator))


def _indices(number: int, batch: int, generator: Generator) -> Tensor:
    """Which samples a step sees, rising; all where there are no more than in a batch."""
    import torch

    if number <= batch:
        return torch.arange(number)
    return torch.randperm(number, generator=generator)[:batch].sort().values
