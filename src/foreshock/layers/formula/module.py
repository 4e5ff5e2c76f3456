"""A formula as a layer: y = γ · f(x) + β, for images (B, C, H, W) or tokens (…, D)."""

import torch
from torch import Tensor, nn

from foreshock.core.errors import ConfigError, require
from foreshock.layers.formula.evaluate import evaluate, index_sets_of, statistic
from foreshock.layers.formula.graph import FIRST, Graph, canonical
from foreshock.layers.formula.primitives import AGGREGATIONS, SOURCES
from foreshock.layers.formula.text import parse, to_text
from foreshock.layers.groups import groups_of

MOMENTUM = 0.1
"""Weight of the new batch in running statistics."""

_V0, _V1 = SOURCES.index("v0"), SOURCES.index("v1")


def module_of(
    text: str, channels: int, *, layout: str = "image", groups: int | None = None, eps: float = 1e-5
) -> "Formula":
    """The layer of a formula's text.

    Args:
        text: a formula such as `x * sigmoid(x * v1) / std_whg(x)`.
        channels: C of images, D of tokens.
        layout: "image" for (B, C, H, W) or "token" for (…, D).
        groups: as for `Formula`.
        eps: as for `Formula`.

    Raises:
        ConfigError: the text is no formula, or its layer does not exist; see `Formula`.
    """
    return Formula(parse(text), channels, layout=layout, groups=groups, eps=eps)


class Formula(nn.Module):
    """The layer of an expression graph, with γ = 1 and β = 0 a channel as EvoNorm has them (2004.02967).

    v0 and v1 are parameters if the formula uses them. Statistics over a batch are those of the batch while training,
    and running ones in evaluation (a variance n/(n - 1) times that of the batch); every other statistic is the
    sample's own. In the layout "token" all statistics are a single token's, so the layer is causal.
    """

    def __init__(
        self, graph: Graph, channels: int, *, layout: str = "image", groups: int | None = None, eps: float = 1e-5
    ) -> None:
        """Build the layer.

        Args:
            graph: the formula.
            channels: C of images, D of tokens.
            layout: "image" for (B, C, H, W) or "token" for (…, D).
            groups: channel groups of the index set whg; for images as `layers.groups` says and 1 for tokens unless
                given.
            eps: ε in √(s² + ε), and where else the formula has a root or a logarithm.

        Raises:
            ConfigError: no such layout, channels below 1, groups that do not divide them, ε not above 0, or index sets
                over the batch or single channels of images in the layout "token".
        """
        super().__init__()
        require(channels >= 1, "channels", "must be at least 1", channels)
        require(eps > 0, "eps", "must be above 0", eps)
        self.graph, self.layout, self.channels, self.eps = canonical(graph), layout, channels, eps
        self.groups = _default_groups(channels, layout) if groups is None else groups
        divides = self.groups >= 1 and channels % self.groups == 0
        require(divides, "groups", f"must be at least 1 and divide the {channels} channels", self.groups)
        _check_index_sets(self.graph, layout)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        used = {i for node in self.graph.nodes for i in node.inputs}
        self.v0 = nn.Parameter(torch.zeros(channels)) if _V0 in used else None
        self.v1 = nn.Parameter(torch.ones(channels)) if _V1 in used else None
        for index, node in enumerate(self.graph.nodes, FIRST):
            if AGGREGATIONS.get(node.op, ("", ""))[1] == "bwh":
                start = torch.zeros if node.op == "mean_bwh" else torch.ones
                self.register_buffer(f"running_{index}", start(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The formula of x, times γ plus β."""
        self._check(x)

        def aggregate(index: int, value: Tensor) -> Tensor:
            op = self.graph.nodes[index - FIRST].op
            over_batch = AGGREGATIONS[op][1] == "bwh"
            if over_batch and not self.training:
                return self._a_channel(self.get_buffer(f"running_{index}"))
            found = statistic(op, value, self.layout, self.groups)
            if over_batch:
                self._follow(index, found, x.numel() // self.channels)
            return found

        zero = x.new_zeros((1,) * x.dim())
        v0, v1 = (zero if v is None else self._a_channel(v).to(x.dtype) for v in (self.v0, self.v1))
        out = evaluate(self.graph, (x, zero, v0, v1), aggregate, self.eps)
        return out * self._a_channel(self.weight).to(x.dtype) + self._a_channel(self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        """The formula and what it is for."""
        return f"{to_text(self.graph)!r}, channels={self.channels}, layout={self.layout}, groups={self.groups}"

    def _check(self, x: Tensor) -> None:
        image = self.layout == "image"
        fits = x.dim() == 4 if image else x.dim() >= 1
        if not fits or x.shape[1 if image else -1] != self.channels:
            takes = f"(B, {self.channels}, H, W)" if image else f"(…, {self.channels})"
            raise ConfigError(f"the formula's layer for {self.layout}s takes {takes}, got {tuple(x.shape)}")

    def _a_channel(self, vector_C: Tensor) -> Tensor:
        return vector_C[None, :, None, None] if self.layout == "image" else vector_C

    @torch.no_grad()
    def _follow(self, index: int, found: Tensor, samples: int) -> None:
        """Move a running statistic towards that of a batch, `samples` values a channel."""
        running_C = self.get_buffer(f"running_{index}")
        unbiased = samples / max(1, samples - 1) if self.graph.nodes[index - FIRST].op == "std_bwh" else 1.0
        running_C.lerp_((found.flatten() * unbiased).to(running_C.dtype).expand_as(running_C), MOMENTUM)


def _default_groups(channels: int, layout: str) -> int:
    return groups_of(channels) if layout == "image" else 1


def _check_index_sets(graph: Graph, layout: str) -> None:
    missing = graph.index_sets - set(index_sets_of(layout))
    if missing:
        raise ConfigError(
            f"the formula {to_text(graph)!r} has statistics over {', '.join(sorted(missing))}, which would mix tokens "
            f"in the layout {layout!r}; use {' or '.join(index_sets_of(layout))}"
        )
