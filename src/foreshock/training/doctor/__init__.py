"""What watching a model would give, and what it would cost, said before anything is watched."""

from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from foreshock.core import plugins
from foreshock.core.config import Spec
from foreshock.core.contracts import Monitor
from foreshock.core.errors import require
from foreshock.training.doctor.cost import Estimate, estimate
from foreshock.training.doctor.examination import Examination
from foreshock.training.doctor.facts import facts_of
from foreshock.training.doctor.quantities import rows_of
from foreshock.training.doctor.row import Row
from foreshock.training.doctor.subject import subject_of
from foreshock.training.doctor.trial import Measured, measure
from foreshock.training.updates import inner_optimizer
from foreshock.training.watched import DEFAULT, check, unwrap

__all__ = ["Estimate", "Examination", "Measured", "Row", "doctor"]


def doctor(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    every: int = 20,
    batch_size: int | None = None,
    seq_len: int | None = None,
    monitors: Iterable[str | Spec] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    batch: Any = None,
    output_module: nn.Module | None = None,
    trial: bool = True,
) -> Examination:
    """What `foreshock.watch` would record of a model: exactly, as a sample, as a bound, or not at all, and why.

    The model is left as it is and does not run. With `loss_fn` and `batch` a copy of it and of its optimizer is
    trained for some steps, and what watching cost there is measured; that takes the memory of the copy.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 3))
    >>> examination = doctor(model, torch.optim.AdamW(model.parameters()))
    >>> [row.how for row in examination.rows if row.quantity == "attention_logits/max"]
    ['blind']
    >>> [row.why for row in examination.rows if row.quantity == "output_logits/max"]
    ["what comes out of '2'"]

    Args:
        model: as it is given to `watch`.
        optimizer: what trains it; without one nothing is said of updates and curvature.
        every: optimizer steps between logged steps, which the cost is stated for.
        batch_size: sequences of a step, for the estimated cost; by default those of `batch`, or 8.
        seq_len: tokens of a sequence; by default those of `batch`, or 1024, or less where the model's config says so.
        monitors: as of `watch`.
        loss_fn: as of `watch`: `loss_fn(model, batch)` is the training loss.
        batch: what `loss_fn` takes; given both, the cost is measured, in training mode on this one batch.
        output_module: as of `watch`.
        trial: whether the cost is measured where it can be.

    Raises:
        ConfigError: a value out of range, or an unknown monitor or option.
        UserError: what `watch` would refuse too; a trial in a process group, or of a model that is watched already,
            cannot be copied, or fails on the batch.
    """
    require(every >= 1, "every", "must be at least 1 step", every)
    optimizer = None if optimizer is None else inner_optimizer(optimizer)
    check(model, optimizer or cast(Optimizer, _Everything(model)))
    names = [*DEFAULT, "curvature"] if monitors is None else list(monitors)
    specs = [name if isinstance(name, Spec) else Spec.parse(name) for name in names]
    declared: dict[str, Monitor] = {str(spec.name): plugins.load("monitors", spec) for spec in specs}
    subject = subject_of(model, optimizer, loss_fn, output_module, batch, batch_size, seq_len)
    rows = rows_of(subject, declared)
    measured = None
    if trial and loss_fn is not None and batch is not None:
        measured = measure(subject, batch, None if monitors is None else specs, rows)
    return Examination(
        rows=rows, facts=facts_of(subject), estimate=estimate(subject, declared, rows, every), measured=measured
    )


class _Everything:
    """Stands for the optimizer that nobody gave: of all parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.param_groups = [{"params": list(unwrap(model).parameters())}]
