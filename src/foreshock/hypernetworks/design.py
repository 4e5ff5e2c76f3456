"""What a hypernetwork is made of, and the two designs that are compared: MIP and the plain one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foreshock.core.errors import require, unknown

ACTIVATIONS = {
    "elu": "ELU",
    "gelu": "GELU",
    "leaky_relu": "LeakyReLU",
    "relu": "ReLU",
    "silu": "SiLU",
    "tanh": "Tanh",
}
"""Classes of `torch.nn`, by name."""
NORMS = {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm"}
"""The same for norms."""
ENCODINGS = ("cos_sin", "identity")
INITS = ("per_tensor", "joint", "zero")


@dataclass(frozen=True, kw_only=True)
class Design:
    """How parameters are predicted; the defaults are magnitude invariant parametrizations (MIP, ICLR 2024).

    θ = θ0 + h(E(γ)), h fully connected. Its three parts are `encoding`, `base` and `init`, each by itself.
    """

    hidden: tuple[int, ...] = (16, 64)
    """Widths of the hidden layers; none for a linear h."""
    activation: str = "leaky_relu"
    """After every hidden layer: elu, gelu, leaky_relu, relu, silu or tanh."""
    norm: str | None = None
    """Before every activation: layer_norm, rms_norm or None. It may make h forget how large its input is."""
    bias: bool = True
    """Whether the linear layers of h have biases, which start at zero."""
    encoding: str | None = "cos_sin"
    """cos_sin, E(γ) = [cos(γπ/2), sin(γπ/2)]; or identity, the same as None."""
    base: bool = True
    """Whether the model's own parameters are θ0, and trained with h; without them θ = h(E(γ))."""
    init: str = "per_tensor"
    """How the last layer starts: per_tensor, every tensor predicted with the variance that is usual for its own shape;
    joint, Kaiming by fan-out as one matrix; zero, so that the model starts as it was."""

    def __post_init__(self) -> None:
        whole = isinstance(self.hidden, tuple) and all(type(width) is int and width >= 1 for width in self.hidden)
        require(whole, "hidden", "must be a tuple of widths of at least 1", self.hidden)
        _known("activation", self.activation, ACTIVATIONS)
        _known("encoding", self.encoding or "identity", ENCODINGS)
        _known("init", self.init, INITS)
        if self.norm is not None:
            _known("norm", self.norm, NORMS)
        require(self.init != "zero" or self.base, "init", "may be zero only with base=True, or all is zero", self.init)


def _known(field: str, value: Any, known: Any) -> None:
    if value not in known:
        raise unknown(field, str(value), sorted(known))


MIP = Design()
"""All three parts of MIP."""
PLAIN = Design(encoding=None, base=False, init="joint", bias=False)
"""None of them, and no biases: what it predicts is proportional to γ where the activation is a rectifier."""
