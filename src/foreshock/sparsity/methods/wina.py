"""Weight-informed scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from foreshock.core.errors import ConfigError
from foreshock.sparsity.method import Method, Site
from foreshock.sparsity.names import FUSED_GATE_UP, FUSED_QKV, GATES, INTERLEAVED, KEYS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

WITH_NORMS = KEYS | GATES | FUSED_QKV | FUSED_GATE_UP | INTERLEAVED
"""Last parts of the paths of the linears whose column norms the authors' code uses: keys, gates and what holds them."""


@dataclass(frozen=True, kw_only=True)
class Wina(Method):
    """score_j = |x_j| · c_j, c_j = ‖W_:,j‖ (2505.19427).

    ‖W(x - m⊙x)‖² = Σ_dropped x_j² c_j² where WᵀW is diagonal: there the largest scores are the best mask of every
    token. Elsewhere they are a bound on what is lost. Norms follow the weight when it changes.
    """

    norms: Literal["everywhere", "paper"] = "everywhere"
    """Where c_j is used: by the formula for every linear; by the authors' code only for keys and gates, and for the
    linears that hold these with others, all other linears having c_j = 1."""

    def sites(self, model: nn.Module, linears: Mapping[str, nn.Module]) -> list[Site]:
        """The inputs of all linears.

        Raises:
            ConfigError: with the paper's choice, no linear is one that it uses norms for: this would be teal.
        """
        if self.norms == "paper" and not any(map(_has_norms, linears)):
            raise ConfigError(
                "wina:norms=paper uses column norms for keys and gates, and none of the linears is named as one of "
                f"these ({', '.join(sorted(WITH_NORMS))}); use norms=everywhere"
            )
        return super().sites(model, linears)

    def scores(self, signal: Tensor, site: Site) -> Tensor:
        """|x_j| · c_j, or |x_j|."""
        from foreshock.probes.contributions import contributions
        from foreshock.probes.precision import accurate

        if self.norms == "everywhere" or _has_norms(site.path):
            return contributions(signal, site.linear)
        return accurate(signal.detach().abs())


def _has_norms(path: str) -> bool:
    return path.rpartition(".")[2] in WITH_NORMS
