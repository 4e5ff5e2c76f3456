"""Taps on the attention of any model, by whichever seam it is reached."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from foreshock.core.contracts import AttentionCall
from foreshock.core.errors import UserError, require
from foreshock.probes import hooks
from foreshock.probes.attention import flex, huggingface, multihead, sdpa, x_transformers
from foreshock.probes.attention.capture import Capture, Exactness
from foreshock.probes.attention.core import core_paths, tap_cores
from foreshock.probes.attention.plan import strangers
from foreshock.probes.attention.scores import sampled
from foreshock.probes.attention.stage import Stage

_WHAT_IS_SEEN = (
    "attention is seen where a module calls torch.nn.functional.scaled_dot_product_attention (or flex_attention) by "
    "its attribute, in nn.MultiheadAttention, in models of transformers and in those of x-transformers"
)


class AttentionTaps(Protocol):
    """Taps on the attention of a model: as `hooks.Tapping`, and how each was captured."""

    def listen(self) -> None:
        """Forget what was seen and listen until `take`."""

    def take(self) -> dict[str, AttentionCall]:
        """The calls since `listen`, by path; stops listening."""
        ...

    def captures(self) -> dict[str, Capture]:
        """How each attention was captured when it was last taken, by path; empty before."""
        ...

    def close(self) -> None:
        """Leave the model, and the functions it calls, as they were."""


def tap_attention(model: nn.Module, queries: int | None = None) -> AttentionTaps:
    """Taps on every attention of a model: the calls of one training forward, q and k detached, by path.

    A model that has an AttentionCore is tapped there and only there; the path is that of the enclosing block
    where it holds one attention. In any other model attention is heard at `F.scaled_dot_product_attention` and
    `flex_attention`, as attributes of their modules, in `nn.MultiheadAttention`, at transformers' attention
    interface and in x-transformers' `Attend`; the path is that of the attention module. A module that makes several
    calls in one pass has the later ones as `path#2` and so on; of several passes the last is kept.

    Args:
        model: any model; the hooks make `nn.TransformerEncoder` leave its fast path in evaluation.
        queries: how many queries of each sequence to keep, evenly strided; None, or 0 for a norm bound, for all.

    Raises:
        ConfigError: `queries` is negative.
        UserError: no module of the model could ever be heard.
    """
    require(queries is None or queries >= 0, "queries", "must be None, or at least 0", queries)
    cores = core_paths(model)
    return _CoreTaps(tap_cores(cores), queries) if cores else _SeamTaps(model, queries)


class _CoreTaps:
    def __init__(self, taps: hooks.Taps[AttentionCall], queries: int | None) -> None:
        self._taps, self._queries = taps, queries
        self._captures: dict[str, Capture] = {}

    def listen(self) -> None:
        self._taps.listen()

    def take(self) -> dict[str, AttentionCall]:
        return _kept(self._taps.take(), {}, self._queries, self._captures)

    def captures(self) -> dict[str, Capture]:
        return dict(self._captures)

    def close(self) -> None:
        self._taps.close()


class _SeamTaps:
    def __init__(self, model: nn.Module, queries: int | None) -> None:
        self._queries = queries
        self._captures: dict[str, Capture] = {}
        self._stage = Stage(model, apart=x_transformers.is_attend)
        self._strangers = strangers(model)
        if not self._stage.slots:
            raise UserError(f"this model has no attention that could be seen: {_WHAT_IS_SEEN}")
        self._ends = [sdpa.attach(self._stage), flex.attach(self._stage)]
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention) and not multihead.refusal(module):
                multihead.attach(self._stage, module)
            if x_transformers.is_attend(module) and not x_transformers.refusal(module):
                x_transformers.attach(self._stage, module)
        interface = huggingface.interface(model)
        if interface is not None:
            self._ends.append(huggingface.attach(self._stage, interface))

    def listen(self) -> None:
        self._stage.listen()

    def take(self) -> dict[str, AttentionCall]:
        """As of the protocol.

        Raises:
            UserError: nothing was heard; the message says whether the modules ran.
        """
        self._stage.listening = False
        calls: dict[str, AttentionCall] = {}
        sources: dict[str, str] = {}
        for slot in self._stage.slots:
            heard = [] if slot.path in self._strangers else slot.heard or ()
            for i, (source, read, arguments) in enumerate(heard, 1):
                path = slot.path if i == 1 else f"{slot.path}#{i}"
                calls[path], sources[path] = read(*arguments), source
        if not calls:
            raise UserError(self._nothing())
        self._stage.forget()
        return _kept(calls, sources, self._queries, self._captures)

    def captures(self) -> dict[str, Capture]:
        return dict(self._captures)

    def close(self) -> None:
        for end in self._ends:
            end()
        self._ends.clear()
        self._stage.close()

    def _nothing(self) -> str:
        idle = [slot.path for slot in self._stage.slots if slot.heard is None]
        if idle:
            return (
                f"no attention was seen, and {len(idle)} modules did not run in a training pass ({idle[0]}, …): the "
                "model was compiled, or replaced, before the monitors were attached; attach them before the first "
                "compiled call"
            )
        return (
            f"no attention was seen, though every module ran: {_WHAT_IS_SEEN}; call one of these, or leave the "
            "monitors of attention out"
        )


def _kept(
    calls: dict[str, AttentionCall], sources: dict[str, str], queries: int | None, captures: dict[str, Capture]
) -> dict[str, AttentionCall]:
    """The calls with as many queries as asked for; how they were captured goes to `captures`."""
    kept = {path: sampled(call, queries) if queries else call for path, call in calls.items()}
    captures.clear()
    for path, call in kept.items():
        exactness: Exactness = "bound" if queries == 0 else "sample" if call.query_stride > 1 else "exact"
        note = f"no entropy: {call.opaque}" if call.opaque and queries != 0 else ""
        captures[path] = Capture(source=sources.get(path, "AttentionCore"), exactness=exactness, note=note)
    return kept


class AttentionObserver(hooks.TapsObserver[AttentionCall]):
    """Rows made of attention calls, which can say how each attention was captured."""

    def __init__(self, taps: AttentionTaps, rows: Callable[[dict[str, AttentionCall]], dict[str, Tensor]]) -> None:
        super().__init__(taps, rows)
        self._attention = taps

    def captured(self) -> dict[str, str]:
        """How each attention was captured when it was last read, by path, in words; empty before."""
        return {path: str(capture) for path, capture in self._attention.captures().items()}


def observe_attention(
    model: nn.Module,
    group: str,
    quantities: Callable[[AttentionCall], dict[str, Tensor]],
    queries: int | None = None,
) -> AttentionObserver:
    """An observer with rows `group/<quantity>/<path>` of every attention, paths and `queries` as in `tap_attention`.

    They are made between the backward pass and the update: a score transform may own parameters, and they are then
    still those of the forward pass.
    """
    return AttentionObserver(
        tap_attention(model, queries),
        lambda calls: {
            f"{group}/{name}/{path}": value for path, call in calls.items() for name, value in quantities(call).items()
        },
    )
