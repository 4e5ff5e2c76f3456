"""The contracts between floors: what a step reports, and what interventions, monitors and attention look like.

Shapes: B batch, T tokens (S when they are keys), D width, H heads, K head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from foreshock.core.run_config import RunConfig


@dataclass(kw_only=True)
class StepInfo:
    """What one training step has made so far; filled in as the step proceeds, handed to every plug-in."""

    step: int
    """1 for the first optimizer step."""
    inputs_BT: Tensor
    """Token ids the model saw; inputs of another kind where a task has such."""
    targets_BT: Tensor
    """Token ids it had to predict, or one class an input."""
    logits_BTV: Tensor
    """Output logits, before any loss."""
    loss: Tensor
    """Mean cross-entropy in nats per token, without extra losses; 0-d."""
    extra_losses: dict[str, Tensor] = field(default_factory=dict)
    """Loss terms added by interventions, by intervention name; 0-d."""
    lr: float = 0.0
    """η·s_t of this step, before any per-group multiplier; less where an intervention limits it."""
    grad_norm: Tensor | None = None
    """Global L2 norm of the gradients, unscaled and before clipping; 0-d, set after the backward pass."""
    clip_factor: Tensor | None = None
    """What clipping multiplied the gradients by, in (0, 1]; 0-d."""
    seconds: float = 0.0
    """Mean wall-clock seconds a step since the last logged step, monitors included; 0 before the first."""
    flops_share: float = 1.0
    """Share of the model's training FLOPs that those steps spent; below 1 while blocks are left out."""
    updated: bool = True
    """Whether the optimizer made its update; not so where a GradScaler skipped it."""
    batch: Any = None
    """The batch as somebody else's loop or another task has it, where it is no token ids (B, T+1)."""
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """What plug-ins have to tell of this step besides numbers, by name and with facts; goes to events.jsonl."""


@dataclass(kw_only=True)
class Context:
    """What a plug-in may attach to."""

    model: nn.Module
    """The model."""
    output_module: nn.Module
    """The module that makes the output logits."""
    optimizer: Optimizer | None = None
    """The optimizer; None while interventions are built, which get it in `edit_optimizer`."""
    config: RunConfig | None = None
    """The run's config, if it is one of foreshock's own runs."""
    flops_per_token: float = 0.0
    """Training FLOPs a token by the stated convention; 0 where unknown."""
    tokens_per_step: int = 0
    """Tokens of one optimizer step."""
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None
    """The training loss (0-d) of a model on a batch, extra losses included; None if it is not known."""


class Need(Enum):
    """What a monitor has to be given; `foreshock.testing` checks that it takes no more than it declares."""

    ACTIVATIONS = auto()
    """Module outputs, through forward hooks."""
    ATTENTION = auto()
    """The AttentionCall of every attention, on steps where it is read."""
    GRADIENTS = auto()
    """Gradients after unscaling and before clipping."""
    OPTIMIZER = auto()
    """Optimizer state after the update."""
    LOGITS = auto()
    """Output logits."""
    LOSS = auto()
    """The training loss, evaluated again on batches of its choice. Read after all others, and may wait for the
    device."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What an intervention changed in a model or an optimizer, and how to take it back."""

    touched: tuple[str, ...]
    """Names of the modules, or of the parameter groups as `group 0`."""
    undo: Callable[[], None]
    """Puts back what was there; what was learned meanwhile by the parameters that stay is kept."""


class Intervention:
    """A cure. A plug-in is a frozen dataclass in `interventions/<name>.py` that overrides the phases it uses.

    Phases run in the order below; inside a phase, in the order of the config. An intervention without state is
    its own runtime; one with state overrides `build` and returns a runtime that has `state_dict` and
    `load_state_dict`.
    """

    conflicts: ClassVar[frozenset[str]] = frozenset()
    """Names of interventions it cannot be combined with."""
    neutral: ClassVar[Mapping[str, Any] | None] = None
    """Options under which it changes no bit of a run; None if there are none."""
    semantics: ClassVar[int] = 1
    """Raised when its meaning changes, so that older runs are not taken for new ones."""
    reaches_any_model: ClassVar[bool] = False
    """Whether one that overrides `edit_config` does the same to a model that is not the proxy by `edit_model`."""

    def edit_config(self, config: RunConfig) -> RunConfig:
        """The config to build instead of this one; where a cure is a setting, this is all of it."""
        return config

    def check(self, config: RunConfig) -> None:
        """Refuse, before anything is built, a run that it cannot work in.

        Args:
            config: what all interventions together made of the config.

        Raises:
            ConfigError: a setting that it cannot work with.
        """

    def build(self, context: Context) -> Intervention:
        """The runtime whose phases below are called during training."""
        return self

    def edit_model(self, model: nn.Module) -> Edit | None:
        """Change any model in place, after it was built and initialised and before its optimizer is built.

        Raises:
            UserError: there is nothing in this model that it could change.
        """
        return None

    def edit_optimizer(self, optimizer: Optimizer) -> Edit | None:
        """Change an optimizer in place, before the first step.

        Raises:
            UserError: it cannot work with this optimizer.
        """
        return None

    def extra_loss(self, info: StepInfo) -> Tensor | None:
        """A loss term (0-d) added to the cross-entropy before the backward pass."""
        return None

    def before_update(self, info: StepInfo) -> Tensor | None:
        """After the backward pass, before clipping; may return a 0-d keep in {0, 1} that gates the update."""
        return None

    def after_update(self, info: StepInfo) -> None:
        """After the optimizer step."""

    def flops_share(self, step: int) -> float:
        """Share of the blocks' training FLOPs spent in the steps 1 to `step`, at least 1; 1 if no block is left out."""
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same bits."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`."""


class Observer:
    """A monitor attached to one run. Never changes the run, never copies to the host."""

    def begin(self) -> None:
        """A logged step starts: hooks must listen until `read`."""

    def gradients(self, info: StepInfo) -> None:
        """Gradients are there, unscaled and not yet clipped."""

    def updated(self, info: StepInfo) -> None:
        """The optimizer has just made its update: gradients are still there, and learning rates those of the step.

        A loop that reads at once, as that of the proxy, does not call it.
        """

    def read(self, info: StepInfo) -> Mapping[str, Tensor | float]:
        """The step is over: rows `group/quantity[/module path]` to 0-d tensors, short 1-d tensors or numbers.

        A 1-d tensor becomes a list of numbers (per head). Hooks stop listening.
        """
        return {}

    def captured(self) -> Mapping[str, str]:
        """How what it reads was captured, by module path, once that is known: exact, a sample or a bound, and where."""
        return {}

    def close(self) -> None:
        """Remove every hook: the model is as it was."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same readings."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`."""


class Merge(Enum):
    """What one process with the whole batch and the whole model would read, from the values x_r of R ranks.

    D is the number of batches among them: R, or less where ranks share one under tensor parallelism.
    """

    MEAN = auto()
    """mean(x_r): means over tokens or entries, and what is the same on all ranks."""
    MAX = auto()
    """max(x_r)."""
    MIN = auto()
    """min(x_r)."""
    ROOT_MEAN_SQUARE = auto()
    """√mean(x_r²): root mean squares; and norms of parameters, each rank's scaled to the whole (`probes.shards`)."""
    NORM = auto()
    """√(D·mean(x_r²)): an L2 norm over all tokens of the batch, as the root of the sum of squares."""
    GRADIENT_MEAN = auto()
    """mean(x_r) / D, of gradients at activations: a rank's loss is a mean over its own tokens, D times too few."""
    GRADIENT_NORM = auto()
    """√(mean(x_r²) / D): an L2 norm of gradients at the activations of all tokens."""


class Monitor:
    """A frozen declaration in `monitors/<name>.py`: what it needs, and how to attach it.

    Where several ranks train together, each observer reads what its own rank holds and never communicates; the rows
    are merged afterwards, all at once. Only what it gives as a tensor is merged, a Python float stays rank by rank.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    """What it has to be given."""
    merges: ClassVar[Mapping[str, Merge]] = {}
    """How a quantity (`input_token` of the row `linear_norms/input_token/<path>`) is merged over ranks. Those that are
    not here have MAX or MIN if `max` or `min` is one of the words of their name (`q_norm_max`), and MEAN otherwise."""

    def attach(self, context: Context) -> Observer:
        """Attach to a model and optimizer; the observer alone holds hooks, buffers and history."""
        raise TypeError(f"{type(self).__name__} must override attach")


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """One attention, whoever makes it: all that is needed to recompute its scores."""

    q_BHTK: Tensor
    """Queries as they enter the score."""
    k_BHSK: Tensor
    """Keys as they enter the score; grouped-query attention has fewer heads of them, each for a run of query heads."""
    scale: float
    """Score multiplier in force; the attention logit is scale · q·k."""
    causal: bool = True
    """Whether a query sees keys up to its own position only."""
    mask: Tensor | None = None
    """Boolean, True where a query may look, broadcastable to (B, H, T, S)."""
    window: int | None = None
    """Keys a query may look back to, itself included; None for all."""
    score: Callable[[Tensor], Tensor] | None = None
    """Transform of the attention logits before the probabilities."""
    bias: Tensor | None = None
    """Added to the scores after that transform, broadcastable to (B, H, T, S)."""
    probability: Callable[[Tensor], Tensor] | None = None
    """What turns masked scores (-inf where masked) into weights; None is the softmax."""
    first_query: int = 0
    """Position, among the keys, of the first query."""
    query_stride: int = 1
    """Positions from one query to the next; above 1 in a sample of the queries."""
    opaque: str = ""
    """Why the weights cannot be recomputed from all this; empty if they can. The logits can be in any case."""
