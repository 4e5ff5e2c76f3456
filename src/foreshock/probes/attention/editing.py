"""Which change is due at an attention call, by the module that makes it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.core.contracts import AttentionCall
from foreshock.core.errors import UserError
from foreshock.probes.attention import x_transformers
from foreshock.probes.attention.stage import Heard, Slot, Stage, callers

Change = Callable[[AttentionCall, nn.Module], AttentionCall]
"""Gives the call of a module with other queries, keys, scale or score. It sees no mask, bias or dropout: they stay.

The module is the one that runs: of a copied model, the copy.
"""


def _unread() -> AttentionCall:
    raise AssertionError("a call that is only marked is never read")


_CHANGED = Heard("", _unread, ())


class Editing(Stage):
    """The stage of one model whose calls are changed: followed in every pass, training or not, also of its copies."""

    hook = staticmethod(lambda call: call)

    def __init__(self, model: nn.Module, changes: Mapping[str, Change], once: bool = False) -> None:
        """Args: the model, the change for each module that attends, by path, and whether it may call only once."""
        self._changes, self._once = changes, once
        self._begun: dict[str, Any] = {}
        super().__init__(model, apart=x_transformers.is_attend)
        # What an interrupted pass left behind is nobody's: the model begins anew.
        self._handles.append(model.register_forward_pre_hook(self._reset, prepend=True))
        modules = callers(model)
        for slot in self.slots:
            if slot.path in changes:
                self._handles.append(modules[slot.path].register_forward_hook(_must_have_changed(slot)))

    def active(self) -> bool:
        """Always."""
        return True

    def entered(self, slot: Slot, module: nn.Module) -> None:
        """Remember which module was entered, and how."""
        slot.module = module
        if isinstance(module, nn.MultiheadAttention):
            _leave_compiled_code()
        if not torch.compiler.is_compiling():
            self._begun[slot.path] = _checkpoint(), torch.is_grad_enabled()

    def changed(
        self, q: Tensor, k: Tensor, scale: float | None, score: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor, float | None, Callable[[Tensor], Tensor] | None]:
        """Queries, keys, scale (None for 1/√K) and score of a call as the running module's change leaves them.

        Raises:
            UserError: the module makes a call that was not foreseen, or would make it again without being seen.
        """
        slot = self.current
        if slot is None:
            return q, k, scale, score
        if slot.path not in self._changes:
            raise UserError(
                f"{slot.path} makes an attention call that its code did not tell of, so that it would stay as it is "
                "while others are changed; make the call in the forward of that module"
            )
        if not torch.compiler.is_compiling():
            self._check_checkpoint(slot)
        if slot.heard and self._once:
            raise UserError(
                f"{slot.path} makes several attention calls in one pass, which would share the parameters that are put "
                "on it; give each a module of its own"
            )
        slot.heard = (_CHANGED,)
        assert slot.module is not None
        given = q.shape[-1] ** -0.5 if scale is None else scale
        call = AttentionCall(q_BHTK=q, k_BHSK=k, scale=given, causal=False, score=score)
        call = self._changes[slot.path](call, slot.module)
        return call.q_BHTK, call.k_BHSK, scale if call.scale == given else call.scale, call.score

    def _reset(self, _module: nn.Module, _inputs: Any) -> None:
        self.current = None

    def _check_checkpoint(self, slot: Slot) -> None:
        """A checkpoint that begins inside a module runs again without it, and its call would then not be changed."""
        begun = self._begun.pop(slot.path, None)  # absent at a second call, and if compiled code entered the module
        if begun is not None and begun != (_checkpoint(), torch.is_grad_enabled()):
            raise UserError(
                f"{slot.path} calls its attention under a checkpoint, or without gradients, that begin inside it; put "
                "the whole module under the checkpoint"
            )


def _leave_compiled_code() -> None:
    """torch.compile takes the function of nn.MultiheadAttention as a whole, and would not see its call changed."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break("attention of nn.MultiheadAttention can be changed in code that is not compiled only")


def _checkpoint() -> Any:
    """The innermost activation checkpoint of the kind that is not reentrant, by its hook on saved tensors."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks and "checkpoint" in getattr(hooks[0], "__qualname__", "") else None


def _must_have_changed(slot: Slot) -> Callable[..., None]:
    def after(module: nn.Module, *_: Any) -> None:
        if not slot.heard:
            what = (
                "call it with need_weights=False, outside torch's fast path"
                if isinstance(module, nn.MultiheadAttention)
                else "take its path that calls torch.nn.functional.scaled_dot_product_attention"
            )
            raise UserError(f"{slot.path} ran without an attention call that could be changed: {what}")

    return after
