"""Public checks of the plug-in contracts: give them your own plug-in as `package.module:Class`.

Each check raises an AssertionError that says what the contract asks for. Those of monitors and interventions train a
tiny proxy on random tokens for a few steps on the CPU.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NoReturn
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from foreshock.core import plugins
from foreshock.core.config import Spec, canonical_json, from_json
from foreshock.core.contracts import Context, Intervention, Need, Observer
from foreshock.core.model_config import ModelConfig
from foreshock.core.run_config import DataConfig, RecordConfig, RunConfig, RuntimeConfig, TrainConfig, edited
from foreshock.testing_forecasters import check_forecaster as check_forecaster
from foreshock.testing_tasks import check_task as check_task
from foreshock.training.checkpoint import pack, unpack
from foreshock.training.loss import loss_function
from foreshock.training.panel import Panel
from foreshock.training.setup import Training, build_training, training_flops
from foreshock.training.step import train_step

STEPS = 5
"""Length of a trial run, in optimizer steps."""
VOCAB_SIZE = 13

TRIAL = RunConfig(
    model=ModelConfig(width=16, depth=2, heads=2),
    data=DataConfig(seq_len=12, batch_size=4),
    train=TrainConfig(steps=STEPS),
    record=RecordConfig(monitors=()),
)
"""The run that plug-ins are tried on."""

Rows = dict[str, list[float]]


def check_monitor(spec: Spec | str) -> None:
    """Check that a monitor keeps the contract of `core.contracts.Monitor` and `Observer`.

    It leaves every bit of the training and its random state alone, never copies to the host (unless it needs the
    loss), names its rows after its file, reports what is non-finite instead of dropping it, shares nothing with a
    second observer of the same model but the state it is given, hooks modules only if its needs say so, and leaves no
    hook behind.

    Raises:
        AssertionError: it does not.
    """
    spec = Spec.parse(spec) if isinstance(spec, str) else spec
    bare = _state(_trial(TRIAL))
    watched = build_training(TRIAL, VOCAB_SIZE)
    state = torch.get_rng_state()
    rows = _watch(watched, spec)
    _check(_same(_state(watched), bare), f"{spec}: training must have the same bits with and without it")
    _check(torch.equal(torch.get_rng_state(), state), f"{spec}: it must not draw from the global random state")
    _check_rows(spec, rows)
    _check_non_finite(spec, rows)
    _check_two_observers(spec, rows)


def check_intervention(spec: Spec | str) -> None:
    """Check that an intervention keeps the contract of `core.contracts.Intervention`.

    The config survives JSON, and `edit_config` leaves the one it is given alone; training is finite in fp32 and
    bf16; every trainable parameter gets a gradient within five steps; a run resumed from a checkpoint has the same
    bits; undoing its edits gives back the model that was; with its neutral options it changes no bit of a run, and
    where it declares none it changes some.

    Raises:
        AssertionError: it does not.
    """
    spec = plugins.resolve("interventions", Spec.parse(spec) if isinstance(spec, str) else spec)
    config = replace(TRIAL, interventions=(spec,))
    text = canonical_json(config)
    _check(from_json(RunConfig, json.loads(text)) == config, f"{spec}: its options must survive JSON")
    edited(config)
    _check(canonical_json(config) == text, f"{spec}: edit_config must return a new config, not change the given one")
    _check_trains(spec, config)
    bf16 = _trial(replace(config, runtime=RuntimeConfig(precision="bf16")))
    _check(_all_finite(bf16), f"{spec}: parameters must stay finite in bf16")
    _check_resumes(spec, config)
    _check_restores(spec, config)
    _check_neutral(spec)


def _check_rows(spec: Spec, rows: list[Rows]) -> None:
    group = spec.name.partition(":")[0].rpartition(".")[2]
    _check(any(rows), f"{spec}: read must return rows on some step")
    for key in {key for row in rows for key in row}:
        _check(key.startswith(f"{group}/"), f"{spec}: row {key!r} must start with the file name, '{group}/'")


def _check_non_finite(spec: Spec, rows: list[Rows]) -> None:
    """Poison one element of every parameter: whatever depends on the model must show it."""
    other = build_training(replace(TRIAL, train=replace(TRIAL.train, seed=1)), VOCAB_SIZE)
    differing = _watch(other, spec)[0]
    depends = [key for key, value in rows[0].items() if value != differing.get(key)]
    for poison in (math.nan, math.inf):
        training = build_training(TRIAL, VOCAB_SIZE)
        with torch.no_grad():
            for parameter in training.model.parameters():
                parameter.view(-1)[0] = poison
        poisoned = _watch(training, spec, steps=1)[0]
        for key in depends:
            _check(key in poisoned, f"{spec}: row {key!r} must not vanish when the model holds {poison}")
            bad = any(not math.isfinite(value) for value in poisoned[key])
            _check(bad, f"{spec}: row {key!r} must be non-finite when the model holds {poison}, is {poisoned[key]}")


def _check_two_observers(spec: Spec, rows: list[Rows]) -> None:
    training = build_training(TRIAL, VOCAB_SIZE)
    before = _hooks(training)
    first, second = _attach(training, spec), _attach(training, spec)
    hooked = _hooks(training) != before
    waits = Need.LOSS in _needs(spec)
    apart = [_observed_step(training, first, 1, waits=waits)]
    first.close()
    second.load_state_dict(first.state_dict())
    apart.append(_observed_step(training, second, 2, waits=waits))
    second.close()
    _check(_same_rows(apart, rows[:2]), f"{spec}: two observers of one model must not share state")
    _check(_hooks(training) == before, f"{spec}: close must remove every hook")
    declared = bool(_needs(spec) & {Need.ACTIVATIONS, Need.ATTENTION})
    _check(hooked == declared, f"{spec}: needs must name ACTIVATIONS or ATTENTION exactly if it hooks modules")


def _check_trains(spec: Spec, config: RunConfig) -> None:
    training = build_training(config, VOCAB_SIZE)
    missing = {name for name, parameter in training.model.named_parameters() if parameter.requires_grad}
    for step in range(1, STEPS + 1):
        info = train_step(training, step, _tokens(step))
        _check(math.isfinite(info.loss.item()), f"{spec}: the loss must stay finite, step {step} gives {info.loss}")
        reached = {name for name, p in training.model.named_parameters() if p.grad is not None and p.grad.any()}
        missing -= reached
    _check(not missing, f"{spec}: every trainable parameter must get a gradient, {sorted(missing)} got none")
    _check(_all_finite(training), f"{spec}: parameters must stay finite")


def _check_resumes(spec: Spec, config: RunConfig) -> None:
    interrupted = build_training(config, VOCAB_SIZE)
    _train(interrupted, range(1, 3))
    payload = pack(interrupted, {})
    resumed = build_training(config, VOCAB_SIZE)
    unpack(resumed, payload)
    _train(resumed, range(3, STEPS + 1))
    same = _same(_state(resumed), _state(_trial(config)))
    _check(same, f"{spec}: a resumed run must have the bits of an uninterrupted one; is all its state in state_dict?")


def _check_restores(spec: Spec, config: RunConfig) -> None:
    never = build_training(replace(edited(config), interventions=()), VOCAB_SIZE)
    restored = build_training(config, VOCAB_SIZE)
    for edit in reversed(restored.edits):
        _check(bool(edit.touched), f"{spec}: an edit must name what it touched")
        edit.undo()
    same = _same(dict(restored.model.state_dict()), dict(never.model.state_dict()))
    _check(same, f"{spec}: undoing its edits must give back every tensor of the model under its name")
    _check(_hooks(restored) == _hooks(never), f"{spec}: undoing its edits must remove every hook")
    outputs = [training.model(_tokens(1)[:, :-1]) for training in (restored, never)]
    _check(_same_bits(*outputs), f"{spec}: the model must compute what it did once its edits are undone")


def _check_neutral(spec: Spec) -> None:
    declared: type[Intervention] = plugins.declaration("interventions", spec.name)
    base = _state(_trial(TRIAL))
    if declared.neutral is None:
        changed = _state(_trial(replace(TRIAL, interventions=(spec,))))
        _check(not _same(changed, base), f"{spec}: without a neutral setting it must change something")
        return
    neutral = Spec(spec.name, {**spec.options, **declared.neutral})
    state = _state(_trial(replace(TRIAL, interventions=(neutral,))))
    _check(_same(state, base), f"{neutral}: its neutral setting must not change a bit")


def _trial(config: RunConfig) -> Training:
    training = build_training(config, VOCAB_SIZE)
    _train(training, range(1, STEPS + 1))
    return training


def _train(training: Training, steps: range) -> None:
    for step in steps:
        train_step(training, step, _tokens(step))


def _tokens(step: int) -> Tensor:
    shape = (TRIAL.data.batch_size, TRIAL.data.seq_len + 1)
    return torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(step))


def _attach(training: Training, spec: Spec) -> Observer:
    context = Context(
        model=training.model,
        output_module=training.output_module,
        optimizer=training.optimizer,
        config=training.config,
        flops_per_token=training_flops(training.model, training.config),
        tokens_per_step=training.config.data.batch_size * training.config.data.seq_len,
        loss_fn=loss_function(training.interventions, training.config.runtime),
    )
    observer: Observer = plugins.load("monitors", spec).attach(context)
    return observer


def _watch(training: Training, spec: Spec, steps: int = STEPS) -> list[Rows]:
    """Train with one observer that reads every step."""
    observer = _attach(training, spec)
    rows = [_observed_step(training, observer, step, waits=Need.LOSS in _needs(spec)) for step in range(1, steps + 1)]
    observer.close()
    return rows


def _needs(spec: Spec) -> frozenset[Need]:
    needs: frozenset[Need] = plugins.declaration("monitors", spec.name).needs  # type: ignore[attr-defined]
    return needs


def _observed_step(training: Training, observer: Observer, step: int, *, waits: bool) -> Rows:
    """One step seen by one observer, which may copy to the host in `read` if it `waits`."""
    training.panel = Panel({"checked": observer})
    with no_host_sync():
        info = train_step(training, step, _tokens(step), logged=True)
    info.seconds = 1.0
    with nullcontext() if waits else no_host_sync():
        found = observer.read(info)
    training.panel = Panel({})
    return _to_rows(found)


def _to_rows(found: Mapping[str, Tensor | float]) -> Rows:
    rows: Rows = {}
    for key, value in found.items():
        tensor = torch.as_tensor(value)
        _check(tensor.dim() <= 1, f"row {key!r} must be a number, a 0-d or a 1-d tensor, has shape {tensor.shape}")
        _check(not tensor.requires_grad, f"row {key!r} must be detached")
        rows[key] = tensor.reshape(-1).tolist()
    return rows


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Raise an AssertionError when a tensor's value is copied to the host, even on the CPU, where that is free."""
    with ExitStack() as stack:
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
            stack.enter_context(mock.patch.object(torch.Tensor, name, _refuse(f"Tensor.{name}")))
        stack.enter_context(_NoHostSync())  # type: ignore[no-untyped-call]
        yield


class _NoHostSync(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operators whose result the host waits for."""

    refused = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in self.refused:
            _refuse(func.name())()
        return func(*args, **(kwargs or {}))


def _refuse(what: str) -> Any:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError(f"{what} copies to the host while training is observed; return the tensor instead")

    return refuse


def _state(training: Training) -> dict[str, Tensor]:
    """Every tensor that training has changed: parameters, buffers, optimizer state."""
    tensors: dict[str, Tensor] = dict(training.model.state_dict())
    for i, state in enumerate(training.optimizer.state_dict()["state"].values()):
        tensors |= {f"{i}/{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors


def _same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(_same_bits(ours[name], theirs[name]) for name in ours)


def _same_bits(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(_bytes(ours), _bytes(theirs))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _same_rows(ours: list[Rows], theirs: list[Rows]) -> bool:
    # As text, so that nan equals nan.
    return repr([sorted(row.items()) for row in ours]) == repr([sorted(row.items()) for row in theirs])


def _all_finite(training: Training) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in training.model.parameters())


def _hooks(training: Training) -> list[int]:
    """How many hooks of each kind every module, the parameters and the optimizer hold."""
    owners: list[nn.Module | Tensor | torch.optim.Optimizer] = [
        *training.model.modules(),
        *training.model.parameters(),
        training.optimizer,
    ]
    return [len(value or ()) for owner in owners for name, value in sorted(vars(owner).items()) if "hooks" in name]


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
