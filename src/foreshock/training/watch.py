"""Watch somebody else's training: two lines in a loop, and a run folder like that of a study."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from foreshock.core import plugins
from foreshock.core.config import Spec
from foreshock.core.errors import UserError, require
from foreshock.core.run_folder import WATCH
from foreshock.probes.processes import rank
from foreshock.training.cadence import Cadence
from foreshock.training.updates import inner_optimizer
from foreshock.training.watch_record import Record
from foreshock.training.watched import attach, check, manifest_of
from foreshock.training.watching import Sink, Watch


def watch(
    model: nn.Module,
    optimizer: Optimizer,
    out: str | Path,
    every: int = 20,
    monitors: Iterable[str | Spec] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    budget: float | None = 0.02,
    *,
    output_module: nn.Module | None = None,
    sinks: Sequence[str | Sink] = (),
    resume: bool = False,
) -> Watch:
    """Record what breaks Transformers while anybody's loop trains a model; `foreshock report OUT` shows it.

    >>> import tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 3))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> inputs, targets = torch.randn(16, 4), torch.randint(3, (16,))
    >>> folder = tempfile.TemporaryDirectory()
    >>> with watch(model, optimizer, out=folder.name + "/run", every=10) as w:
    ...     for _ in range(20):
    ...         loss = torch.nn.functional.cross_entropy(model(inputs), targets)
    ...         optimizer.zero_grad()
    ...         loss.backward()
    ...         optimizer.step()
    ...         w.step(loss)
    >>> w.steps, w.steps_logged
    (20, 3)
    >>> folder.cleanup()

    Args:
        model: what is trained; also compiled (but not yet called), in DDP, or sharded by `fully_shard` (FSDP2).
        optimizer: what trains it.
        out: folder of this run; rank 0 writes it.
        every: optimizer steps between logged steps; the first one is always logged.
        monitors: names, or `name:option=value` texts; by default those of a study, without what this model lacks.
        loss_fn: `loss_fn(model, batch)` is the loss that is trained (0-d), for the monitor `curvature`, which it adds
            to the default ones; `step` then needs the batch.
        budget: share of training's time that watching may take; above it the interval is raised. None never raises it.
        output_module: what makes the output logits. By default what `get_output_embeddings()` gives, in a model
            without that method the last `nn.Linear`.
        sinks: where rows also go: `wandb`, `tensorboard`, `mlflow`, or a function of step and row.
        resume: go on with the record in `out`, after its last step, or after that of `load_state_dict`.

    Raises:
        ConfigError: a value out of range, an unknown monitor, option or sink.
        UserError: nothing to watch, an optimizer of another model, parameters without values.
        RunFolderError: `out` holds a run already, or cannot be written.
    """
    require(isinstance(every, int) and every >= 1, "every", "must be at least 1 step, a whole number", every)
    require(budget is None or 0 < budget <= 1, "budget", "must be a share of the time in (0, 1], or None", budget)
    optimizer = inner_optimizer(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"watch takes the one torch optimizer that trains the model, got {type(optimizer).__name__}")
    check(model, optimizer)
    given = None if monitors is None else [monitors] if isinstance(monitors, str | Spec) else list(monitors)
    specs = None if given is None else [m if isinstance(m, Spec) else Spec.parse(m) for m in given]
    wanted = [sinks] if isinstance(sinks, str) or callable(sinks) else sinks
    opened = [sink if callable(sink) else _open(sink, Path(out)) for sink in wanted] if rank() == 0 else []
    watched = attach(model, optimizer, specs, loss_fn, output_module)
    config = {"task": WATCH, "every": every, "budget": budget, "monitors": list(watched.observers)}
    try:
        record = Record(Path(out) if rank() == 0 else None, config, manifest_of(model), resume=resume)
    except BaseException:
        watched.close()
        raise
    return Watch(optimizer, watched, record, Cadence(every, budget), opened)


def _open(sink: str, folder: Path) -> Sink:
    opened: Sink = plugins.load("integrations.sinks", Spec.parse(sink)).open(folder)
    return opened
