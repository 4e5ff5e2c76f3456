"""How each quantity of the monitors would be recorded, read off the model and the optimizer without running them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from foreshock.core.contracts import Context, Monitor, Need
from foreshock.core.errors import UserError
from foreshock.probes.attention import Capture
from foreshock.probes.curvature.backends import choose_backend
from foreshock.probes.curvature.edge import edge_of
from foreshock.probes.curvature.space import ParameterSpace
from foreshock.probes.hooks import blocks_of, path
from foreshock.probes.moments import is_adam, is_sgd
from foreshock.probes.shards import is_distributed, readable
from foreshock.training.doctor.row import Row
from foreshock.training.doctor.subject import Subject

NO_ATTENTION = (
    "no module was found that attends: a model without attention has none, and one that hides it is seen where it "
    "calls torch.nn.functional.scaled_dot_product_attention by that attribute"
)
NOT_GIVEN = "the doctor was given no optimizer"


def rows_of(subject: Subject, monitors: Mapping[str, Monitor]) -> tuple[Row, ...]:
    """One row for each quantity, way of recording it and reason, in the order of the monitors.

    Of monitors that have no rules here it is said whether they attach: for that moment there are hooks on the model.
    """
    rows: list[Row] = []
    for name, monitor in monitors.items():
        rules = _RULES.get(name)
        rows += [_by_attaching(subject, name, monitor)] if rules is None else rules(subject, monitor)
    return tuple(rows)


def understands(group: Mapping[str, Any]) -> int:
    """Tensors of optimizer state that a group's updates are read from; -1 if they are not understood.

    Adam and AdamW have 2, SGD has 1, or 0 without momentum.
    """
    if is_adam(group):
        return 2
    if is_sgd(group):
        return int(bool(group["momentum"]))
    return -1


def _loss(_subject: Subject, _monitor: Monitor) -> Iterator[Row]:
    yield Row(quantity="loss/train", how="exact", why="what step(loss) is given")


def _optim(_subject: Subject, _monitor: Monitor) -> Iterator[Row]:
    yield Row(quantity="optim/lr", how="exact", why="of the optimizer's first group, as the update used it")


def _attention(subject: Subject, monitor: Any) -> Iterator[Row]:
    queries: int | None = monitor.queries
    quantity = "attention_logits/bound" if queries == 0 else "attention_logits/max"
    if not subject.attention:
        yield Row(quantity=quantity, how="blind", why=NO_ATTENTION)
    seen = {name: _of_queries(capture, queries, subject.seq_len) for name, capture in subject.attention.items()}
    yield from _grouped(quantity, {name: (capture.exactness, _from(capture)) for name, capture in seen.items()})
    if queries == 0:
        return
    recomputed = "of the weights that the same queries and keys give"
    yield from _grouped(
        "attention_logits/entropy",
        {
            name: ("blind", capture.note) if capture.note.startswith("no entropy") else (capture.exactness, recomputed)
            for name, capture in seen.items()
            if capture.exactness != "blind"
        },
    )


def _of_queries(capture: Capture, queries: int | None, seq_len: int) -> Capture:
    """How an attention is captured if only so many queries are looked at."""
    if capture.exactness == "blind" or queries is None or queries >= seq_len:
        return capture
    how, note = ("sample", f"{queries} queries of {seq_len}") if queries else ("bound", "max ‖q‖ · max ‖k‖ · scale")
    notes = [note, *([capture.note] if capture.note else [])]
    return Capture(source=capture.source, exactness=how, note="; ".join(notes))  # type: ignore[arg-type]


def _from(capture: Capture) -> str:
    if capture.exactness == "blind":
        return capture.note
    return f"from {capture.source}" + (f"; {capture.note}" if capture.note else "")


def _output(subject: Subject, _monitor: Monitor) -> Iterator[Row]:
    if subject.head is subject.inner:
        why = (
            f"which module makes the output logits is not known of {type(subject.inner).__name__}: give it as "
            "output_module"
        )
        yield Row(quantity="output_logits/max", how="blind", why=why)
    else:
        yield Row(quantity="output_logits/max", how="exact", why=f"what comes out of {subject.head_path!r}")


def _norms(subject: Subject, _monitor: Monitor) -> Iterator[Row]:
    parameters = {path(name): parameter for name, parameter in subject.inner.named_parameters()}
    reads = {name: readable(parameter) for name, parameter in parameters.items()}
    unread = ("blind", "numbers of this kind mean nothing without their scales, or are on other ranks")
    sizes = {name: ("exact", _over_ranks(p)) if reads[name] else unread for name, p in parameters.items()}
    yield from _grouped("norms/parameter", sizes)
    frozen = ("blind", "frozen: it has no gradient")
    seen = {
        name: ("exact", "before clipping, unscaled" + _scaled(subject.optimizer)) if reads[name] else unread
        for name in parameters
    }
    yield from _grouped("norms/gradient", {n: seen[n] if p.requires_grad else frozen for n, p in parameters.items()})
    groups = {} if subject.optimizer is None else {p: g for g in subject.optimizer.param_groups for p in g["params"]}
    updates = {name: _update(p, groups.get(p), subject.optimizer) for name, p in parameters.items()}
    yield from _grouped("norms/update", updates)


def _over_ranks(parameter: Tensor) -> str:
    return "from the parts on all ranks" if is_distributed(parameter) else "after the update"


def _scaled(optimizer: Optimizer | None) -> str:
    fused = optimizer is not None and any(group.get("fused") for group in optimizer.param_groups)
    return "; the optimizer is fused: under a GradScaler call scaler.unscale_(optimizer) first" if fused else ""


def _update(parameter: Tensor, group: Mapping[str, Any] | None, optimizer: Optimizer | None) -> tuple[str, str]:
    """How the update of one parameter is recorded, and why."""
    if optimizer is None:
        return "blind", NOT_GIVEN
    kind = type(optimizer).__name__
    if group is None:
        return "blind", f"not among the parameters of this {kind}"
    if not parameter.requires_grad:
        return "blind", "frozen: it has no update"
    if understands(group) < 0:
        return "blind", f"the state of {kind} is not understood: of Adam, AdamW, SGD and their like it is"
    return "exact", f"from the state of {kind}, without weight decay"


def _blocks(subject: Subject, _monitor: Monitor) -> Iterator[Row]:
    quantity, blocks = "block_outputs/rms", blocks_of(subject.inner)
    if not blocks:
        why = "no blocks found: there is no ModuleList or Sequential of like modules, or its members are mere lists"
        yield Row(quantity=quantity, how="blind", why=why)
    runs = ("exact", "what comes out of the block, or the first tensor of it")
    yield from _grouped(quantity, dict.fromkeys(blocks, runs))


def _throughput(_subject: Subject, _monitor: Monitor) -> Iterator[Row]:
    yield Row(quantity="throughput/step_s", how="exact", why="time from step to step, from the second row on")


def _curvature(subject: Subject, monitor: Any) -> Iterator[Row]:
    quantity = "curvature/eigenvalue"
    try:
        backend = _curvature_backend(subject, monitor.preconditioned)
    except UserError as error:
        yield Row(quantity=quantity, how="blind", why=str(error))
        return
    sample = (
        f"of the loss on the batch of the step, with an interval, by {monitor.hvps} products or more "
        f"({backend.replace('_', ' ')}); takes up to {monitor.share:.0%} of the time"
    )
    without = f"give watch loss_fn, and step(loss, batch); then a sample, {sample}"
    given = subject.loss_fn is not None
    yield Row(quantity=quantity, how="sample" if given else "blind", why=sample if given else without)


def _curvature_backend(subject: Subject, preconditioned: bool) -> str:
    """What would make its products.

    Raises:
        UserError: the curvature could not be measured, whatever the loss is.
    """
    if subject.optimizer is None:
        raise UserError(NOT_GIVEN)
    if preconditioned:
        edge_of(subject.optimizer)
    return choose_backend(subject.model, ParameterSpace(subject.model.parameters()))[0]


def _by_attaching(subject: Subject, name: str, monitor: Monitor) -> Row:
    """A monitor without rules here: whether it attaches."""
    if Need.LOSS in monitor.needs:
        why = "evaluates the loss: give watch loss_fn, and step(loss, batch)"
        return Row(quantity=name, how="blind" if subject.loss_fn is None else "sample", why=why)
    context = Context(model=subject.inner, output_module=subject.head, optimizer=subject.optimizer)
    try:
        monitor.attach(context).close()
    except UserError as error:
        return Row(quantity=name, how="blind", why=str(error))
    return Row(quantity=name, how="exact", why=(type(monitor).__doc__ or "").partition("\n")[0])


def _grouped(quantity: str, found: Mapping[str, tuple[str, str]]) -> Iterator[Row]:
    """One row for each way and reason, in the order in which they come first."""
    for how, why in dict.fromkeys(found.values()):
        paths = tuple(name for name, verdict in found.items() if verdict == (how, why))
        yield Row(quantity=quantity, paths=paths, how=how, why=why)  # type: ignore[arg-type]


_RULES: Mapping[str, Callable[[Subject, Any], Iterator[Row]]] = {
    "loss": _loss,
    "optim": _optim,
    "attention_logits": _attention,
    "output_logits": _output,
    "norms": _norms,
    "block_outputs": _blocks,
    "throughput": _throughput,
    "curvature": _curvature,
}
"""What is known of the monitors that most people take."""
