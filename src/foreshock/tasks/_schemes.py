"""The schemes of activation sparsity that `sparsify` tries."""

from __future__ import annotations

from dataclasses import dataclass

SHARES = (0.25, 0.4, 0.5, 0.65)
"""Shares of the inputs of linears that are dropped: those of the published tables (2505.19427)."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A way to drop them."""

    method: str
    """As `foreshock.sparsify` takes it."""
    rotated: bool = False
    """Whether keys and gates get orthogonal columns first."""
    equal: bool = False
    """Whether it drops as much less as the rotations would cost, and so does the work of the rotated scheme."""
    calibrated: bool = False
    """Whether gates are thresholds from training data, and no number of channels per token."""
    greedy: bool = False
    """Whether the linears of a block differ in what they drop; thresholds as well."""
    mlp: bool = False
    """Whether only the linears that cats spares are masked; these must be there."""


SCHEMES = {
    "wina": Scheme(method="wina"),
    "teal": Scheme(method="teal"),
    "wina_paper": Scheme(method="wina:norms=paper"),
    "r_sparse": Scheme(method="r_sparse"),
    "r_sparse_half": Scheme(method="r_sparse:alpha=0.5"),
    "wina_rotated": Scheme(method="wina", rotated=True),
    "wina_paper_rotated": Scheme(method="wina:norms=paper", rotated=True),
    "teal_rotated": Scheme(method="teal", rotated=True),
    "wina_equal": Scheme(method="wina", equal=True),
    "teal_equal": Scheme(method="teal", equal=True),
    "wina_threshold": Scheme(method="wina", calibrated=True),
    "teal_threshold": Scheme(method="teal", calibrated=True),
    "wina_greedy": Scheme(method="wina", greedy=True),
    "teal_greedy": Scheme(method="teal", greedy=True),
    "cats": Scheme(method="cats", mlp=True),
    "wina_mlp": Scheme(method="wina", mlp=True),
    "teal_mlp": Scheme(method="teal", mlp=True),
}
"""All of them, by name."""
USUAL = tuple(name for name, scheme in SCHEMES.items() if not scheme.mlp)
"""Those for models without gated MLPs too."""
