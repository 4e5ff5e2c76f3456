"""Interventions on a model that is not the proxy, in somebody else's training loop."""

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foreshock.core import plugins
from foreshock.core.arms import Arm
from foreshock.core.config import Spec
from foreshock.core.contracts import Context, Edit, Intervention, StepInfo
from foreshock.core.errors import UserError
from foreshock.probes.updates import Snapshot, restore_unless, snapshot


def apply(model: nn.Module, interventions: Iterable[str | Spec] | str, optimizer: Optimizer | None = None) -> "Applied":
    """Put interventions on any model, reversibly.

    Give it the optimizer of the model where an intervention acts on gradients, updates or parameters of its own;
    parameters that an intervention adds join the optimizer's first group. Inside the loop:

        with foreshock.interventions.apply(model, ["z_loss", "zclip"], optimizer) as applied:
            ...
            loss = applied.loss(cross_entropy, logits=logits)
            loss.backward()
            optimizer.step()      # before_update and after_update run as hooks of this call

    Args:
        model: what is trained, before it is compiled.
        interventions: names, `name:option=value` texts, or specs; one text may join several by `+`.
        optimizer: its optimizer.

    Raises:
        ConfigError: an unknown name or option, or interventions that exclude each other.
        UserError: one of them cannot reach this model; nothing is changed then.
    """
    return Applied(model, _parse(interventions), optimizer)


class Applied:
    """Interventions in force on a model; a context manager that takes them off again."""

    touched: dict[str, tuple[str, ...]]
    """What each intervention changed: module names, or parameter groups of the optimizer."""

    def __init__(self, model: nn.Module, specs: list[Spec], optimizer: Optimizer | None) -> None:
        self.touched = {}
        self._optimizer = optimizer
        self._edits: list[Edit] = []
        self._handles: list[Any] = []
        self._info: StepInfo | None = None
        self._before: tuple[Tensor, Snapshot] | None = None
        self._steps = 0
        declared = {spec.name: plugins.load("interventions", spec) for spec in specs}
        _check(declared, optimizer)
        context = Context(model=model, output_module=_output_module(model))
        self._runtimes: dict[str, Intervention] = {name: cure.build(context) for name, cure in declared.items()}
        try:
            for name, runtime in self._runtimes.items():
                self._attach(name, runtime, model)
        except BaseException:
            self.remove()
            raise
        if optimizer is not None and any(_acts_on_steps(runtime) for runtime in self._runtimes.values()):
            self._handles = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    def loss(
        self,
        loss: Tensor,
        logits: Tensor | None = None,
        inputs: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """The loss to call `backward` on: the given one (0-d, nats per token) plus what interventions add.

        Args:
            loss: the training loss.
            logits: output logits (B, T, V), needed by interventions that add to the loss.
            inputs: token ids (B, T), for those that read them.
            targets: token ids (B, T), for those that read them.

        Raises:
            UserError: an intervention needs the logits and they are not given.
        """
        nothing = torch.empty(0, device=loss.device)
        self._info = StepInfo(
            step=self._steps + 1,
            inputs_BT=nothing if inputs is None else inputs,
            targets_BT=nothing if targets is None else targets,
            logits_BTV=nothing if logits is None else logits,
            loss=loss,
            lr=self._optimizer.param_groups[0]["lr"] if self._optimizer is not None else 0.0,
        )
        for name, runtime in self._runtimes.items():
            if type(runtime).extra_loss is Intervention.extra_loss:
                continue
            if logits is None:
                raise UserError(f"{name} adds to the loss: call applied.loss(loss, logits=…) with the output logits")
            extra = runtime.extra_loss(self._info)
            if extra is not None:
                self._info.extra_losses[name] = extra.detach()
                loss = loss + extra
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same bits, beside model and optimizer."""
        return {"steps": self._steps, **{name: runtime.state_dict() for name, runtime in self._runtimes.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of `state_dict`."""
        self._steps = state["steps"]
        for name, runtime in self._runtimes.items():
            runtime.load_state_dict(state[name])

    def remove(self) -> None:
        """Take everything off, last first: modules, parameter groups and hooks are as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        while self._edits:
            self._edits.pop().undo()

    def __enter__(self) -> "Applied":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _attach(self, name: str, runtime: Intervention, model: nn.Module) -> None:
        known = set(model.parameters())
        edits = [runtime.edit_model(model)]
        added = [parameter for parameter in model.parameters() if parameter not in known and parameter.requires_grad]
        if self._optimizer is not None:
            edits += [_join(self._optimizer, added), runtime.edit_optimizer(self._optimizer)]
        found = [edit for edit in edits if edit is not None]
        self._edits += found
        self.touched[name] = tuple(part for edit in found for part in edit.touched)

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._info is None:
            raise UserError("call applied.loss(loss, …) before the backward pass of every step")
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._info.grad_norm = torch.nn.utils.get_total_norm(gradients)
        keep = None
        for runtime in self._runtimes.values():
            wanted = runtime.before_update(self._info)
            if wanted is not None:
                keep = wanted if keep is None else keep * wanted
        self._before = None if keep is None else (keep, snapshot(optimizer))

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        assert self._info is not None
        if self._before is not None:
            restore_unless(self._before[0], optimizer, self._before[1])
        for runtime in self._runtimes.values():
            runtime.after_update(self._info)
        self._steps += 1
        self._info = self._before = None


def _parse(interventions: Iterable[str | Spec] | str) -> list[Spec]:
    specs: list[Spec] = []
    for part in [interventions] if isinstance(interventions, str) else interventions:
        arm = Arm(interventions=(part,)) if isinstance(part, Spec) else Arm.parse(part)
        if arm.overrides:
            raise UserError(f"{part!r} holds a setting of a run; a model takes interventions only")
        specs += arm.interventions
    return specs


def _check(declared: Mapping[str, Intervention], optimizer: Optimizer | None) -> None:
    """Refuse what can be refused before anything is touched."""
    for name, cure in declared.items():
        clash = sorted(set(cure.conflicts) & declared.keys())
        if clash:
            raise UserError(f"cannot combine {name} with {', '.join(clash)}; drop one")
        kind = type(cure)
        if kind.edit_config is not Intervention.edit_config:
            raise UserError(
                f"{name} is a setting of the proxy's blocks: it cannot reach a model that foreshock did not build; "
                f"use it as an arm of `foreshock study`, or build it into the model ({kind.__doc__})"
            )
        if optimizer is None and (_acts_on_steps(cure) or kind.edit_optimizer is not Intervention.edit_optimizer):
            raise UserError(f"{name} acts on the optimizer's steps: give apply(…, optimizer=…)")


def _acts_on_steps(cure: Intervention) -> bool:
    kind = type(cure)
    return kind.before_update is not Intervention.before_update or kind.after_update is not Intervention.after_update


def _join(optimizer: Optimizer, added: list[nn.Parameter]) -> Edit | None:
    """Train new parameters with the settings of the first group, in a group of their own."""
    if not added:
        return None
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "param_names")}
    group = {**settings, "params": added}
    optimizer.add_param_group(group)

    def undo() -> None:
        optimizer.param_groups[:] = [other for other in optimizer.param_groups if other is not group]
        for parameter in added:
            optimizer.state.pop(parameter, None)

    return Edit(touched=(f"group {len(optimizer.param_groups) - 1}",), undo=undo)


def _output_module(model: nn.Module) -> nn.Module:
    """What makes the output logits: `get_output_embeddings()` where there is one, else the last Linear, else itself."""
    get = getattr(model, "get_output_embeddings", None)
    found = get() if callable(get) else None
    if isinstance(found, nn.Module):
        return found
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linears[-1] if linears else model
