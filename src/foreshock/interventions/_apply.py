"""Interventions on a model that is not the proxy, in somebody else's training loop."""

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from foreshock.core import plugins
from foreshock.core.arms import Arm
from foreshock.core.config import Spec
from foreshock.core.contracts import Context, Edit, Intervention, StepInfo
from foreshock.core.errors import UserError
from foreshock.core.run_config import RunConfig, check_conflicts
from foreshock.interventions._attention import is_foreshocks_own
from foreshock.interventions._find import find_output_module
from foreshock.interventions._parameter_groups import follow
from foreshock.probes.given import NotGiven
from foreshock.probes.updates import Snapshot, restore_unless, snapshot


def apply(
    model: nn.Module,
    interventions: Iterable[str | Spec] | str | Spec,
    optimizer: Optimizer | None = None,
    *,
    output_module: nn.Module | None = None,
) -> "Applied":
    """Put interventions on any model, reversibly.

    What comes back names what was touched, and makes the loss to call `backward` on; its phases before and after an
    update run as hooks of `optimizer.step()`. Leaving the `with` block, or `remove()`, takes everything off again.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> inputs, targets = torch.randn(16, 4), torch.randint(3, (16,))
    >>> with apply(model, "dyt+z_loss:weight=1e-3", optimizer) as applied:
    ...     for _ in range(2):
    ...         logits = model(inputs)
    ...         loss = torch.nn.functional.cross_entropy(logits, targets)
    ...         optimizer.zero_grad()
    ...         applied.loss(loss, logits=logits).backward()
    ...         optimizer.step()
    >>> applied.touched
    {'dyt': ('1', 'group 0'), 'z_loss': ()}
    >>> type(model[1]).__name__
    'LayerNorm'

    The optimizer follows the model: a parameter that an intervention adds joins the first group that trains one of
    its kind (vectors and numbers, or matrices), and one that it takes out leaves its group until it is back. So
    schedulers go on as they were, and optimizer states are loaded after this call. What acts before the update sees
    the gradients as `optimizer.step()` finds them, clipped if the loop clips.

    Args:
        model: what is trained; before `torch.compile`, and before a wrapper that spreads it over devices.
        interventions: names, `name:option=value` texts or specs, applied in this order; a text may join several by
            `+`, which are then sorted by name.
        optimizer: the optimizer of the model. Needed by interventions that act on gradients, updates or settings of
            the optimizer; without it, build yours afterwards, from the parameters the model then has.
        output_module: the linear that makes the output logits. By default what `get_output_embeddings()` gives, in
            a model without that method the last `nn.Linear`.

    Raises:
        ConfigError: an unknown name or option, one given twice, or interventions that exclude each other.
        UserError: one of them cannot reach this model; nothing is changed then.
    """
    return Applied(model, _parse(interventions), optimizer, output_module)


class Applied:
    """Interventions in force on a model; a context manager that takes them off again."""

    touched: dict[str, tuple[str, ...]]
    """What each intervention changed: names of modules, and parameter groups of the optimizer as `group 0`."""

    def __init__(
        self, model: nn.Module, specs: list[Spec], optimizer: Optimizer | None, output_module: nn.Module | None
    ) -> None:
        _check_model(model)
        self._optimizer = optimizer
        output_module = find_output_module(model) if output_module is None else output_module
        self._runtimes = _build(specs, Context(model=model, output_module=output_module))
        self._edits: list[Edit] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._steps = 0
        self._info: StepInfo | None = None
        self._before: tuple[Tensor, Snapshot] | None = None
        self._in_force = True
        self.touched = dict.fromkeys(self._runtimes, ())
        if optimizer is None:
            _check_without_optimizer(self._runtimes)
        try:
            for name, runtime in self._runtimes.items():
                self._edit(name, runtime, model)
        except BaseException:
            self.remove()
            raise
        if optimizer is not None and any(_acts_on_steps(r) or _adds_to_loss(r) for r in self._runtimes.values()):
            self._handles = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]
            # First of all hooks: decay that is a hook itself is part of the step that may be taken back.
            cast(Any, optimizer)._optimizer_step_pre_hooks.move_to_end(self._handles[0].id, last=False)

    def loss(
        self,
        loss: Tensor,
        logits: Tensor | None = None,
        inputs: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """The loss to call `backward` on: the given one plus what interventions add. Needed once a step.

        With gradient accumulation, call it on every micro-batch's mean loss and divide what comes back.

        Args:
            loss: the training loss of the batch, 0-d.
            logits: output logits (…, V), for interventions that read them.
            inputs: token ids the model saw, for those that read them.
            targets: token ids it had to predict, for those that read them.

        Raises:
            UserError: an intervention reads a tensor that is not given.
        """
        if not self._in_force:
            return loss
        given = {"inputs": inputs, "targets": targets, "logits": logits}
        advice = "an intervention in force reads the {0}: call applied.loss(loss, {0}=…)"
        tensors = {
            name: cast(Tensor, NotGiven(advice.format(name))) if tensor is None else tensor
            for name, tensor in given.items()
        }
        self._info = StepInfo(
            step=self._steps + 1,
            inputs_BT=tensors["inputs"],
            targets_BT=tensors["targets"],
            logits_BTV=tensors["logits"],
            loss=loss,
            lr=self._optimizer.param_groups[0]["lr"] if self._optimizer is not None else 0.0,
        )
        for name, runtime in self._runtimes.items():
            extra = runtime.extra_loss(self._info)
            if extra is not None:
                self._info.extra_losses[name] = extra.detach()
                loss = loss + extra
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same bits, beside model and optimizer."""
        return {"steps": self._steps, **{name: runtime.state_dict() for name, runtime in self._runtimes.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of `state_dict`.

        Raises:
            UserError: the state is that of other interventions.
        """
        ours, theirs = set(self._runtimes), set(state) - {"steps"}
        if ours != theirs:
            raise UserError(f"this is the state of {sorted(theirs)}, in force are {sorted(ours)}")
        self._steps = state["steps"]
        for name, runtime in self._runtimes.items():
            runtime.load_state_dict(state[name])

    def remove(self) -> None:
        """Take everything off, last first: modules, parameter groups and hooks are as they were."""
        self._in_force = False
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

    def _edit(self, name: str, runtime: Intervention, model: nn.Module) -> None:
        before = dict(model.named_parameters())
        self._keep(name, runtime.edit_model(model))
        if self._optimizer is not None:
            self._keep(name, follow(self._optimizer, before, dict(model.named_parameters())))
            self._keep(name, runtime.edit_optimizer(self._optimizer))

    def _keep(self, name: str, edit: Edit | None) -> None:
        if edit is not None:
            self._edits.append(edit)  # at once, so that a later failure undoes it
            self.touched[name] += edit.touched

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) > 1 or kwargs.get("closure") is not None:
            raise UserError("interventions cannot see into step(closure): compute the loss before optimizer.step()")
        if getattr(optimizer, "grad_scale", None) is not None:
            raise UserError("the gradients are still scaled: call scaler.unscale_(optimizer) before scaler.step")
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
        for runtime in self._runtimes.values():
            runtime.after_update(self._info)
        if self._before is not None:  # last: what came after the update is part of what is skipped
            restore_unless(self._before[0], optimizer, self._before[1])
        self._steps += 1
        self._info = self._before = None


def _parse(interventions: Iterable[str | Spec] | str | Spec) -> list[Spec]:
    specs: list[Spec] = []
    for part in [interventions] if isinstance(interventions, str | Spec) else interventions:
        arm = Arm(interventions=(part,)) if isinstance(part, Spec) else Arm.parse(part)
        if arm.overrides or arm.removed:
            raise UserError(f"{part!r} changes a run's config; a model takes interventions only")
        specs += arm.interventions
    return specs


def _build(specs: list[Spec], context: Context) -> dict[str, Intervention]:
    """The runtimes by name, once it is certain that they go together and none is a setting of the proxy alone."""
    check_conflicts(RunConfig(interventions=tuple(specs)))
    declared = {spec.name: plugins.load("interventions", spec) for spec in specs}
    for name, cure in declared.items():
        setting = type(cure).edit_config is not Intervention.edit_config
        if setting and (not cure.reaches_any_model or is_foreshocks_own(context.model)):
            what = (type(cure).__doc__ or "").strip().partition("\n")[0]
            raise UserError(
                f"{name} is a setting that foreshock builds its proxy by, and cannot reach a model that is there "
                f"already; compare it by `foreshock study --interventions {name}`, or build it into yours: {what}"
            )
    return {name: cure.build(context) for name, cure in declared.items()}


def _check_model(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise UserError("the model is compiled, and would not notice: apply interventions before torch.compile")
    if isinstance(model, DistributedDataParallel):
        raise UserError("apply interventions before DistributedDataParallel, which looks at parameters only once")
    if next(model.parameters(), None) is None:
        raise UserError(f"{type(model).__name__} has no parameters: there is nothing to train")


def _check_without_optimizer(runtimes: Mapping[str, Intervention]) -> None:
    for name, runtime in runtimes.items():
        if _acts_on_steps(runtime) or type(runtime).edit_optimizer is not Intervention.edit_optimizer:
            raise UserError(f"{name} acts on the optimizer's steps: give the optimizer, apply(model, …, optimizer)")


def _acts_on_steps(runtime: Intervention) -> bool:
    kind = type(runtime)
    return kind.before_update is not Intervention.before_update or kind.after_update is not Intervention.after_update


def _adds_to_loss(runtime: Intervention) -> bool:
    return type(runtime).extra_loss is not Intervention.extra_loss
