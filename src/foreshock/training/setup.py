"""From a config to everything a step touches: model, optimizer, interventions, monitors."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foreshock.core import plugins
from foreshock.core.contracts import Context, Edit, Intervention, Monitor
from foreshock.core.errors import ConfigError
from foreshock.core.run_config import RecordConfig, RunConfig, builder_of, edited
from foreshock.interventions._find import find_output_module
from foreshock.proxy.family import build_own
from foreshock.proxy.model import Proxy
from foreshock.proxy.optim import build_optimizer
from foreshock.proxy.parametrization import block_parameters, flops_per_token, initialise
from foreshock.training.loss import loss_function
from foreshock.training.panel import Panel, attach_all


@dataclass(kw_only=True)
class Training:
    """Everything a step touches."""

    config: RunConfig
    """The run's config after every `edit_config`."""
    model: nn.Module
    """The model: the proxy, or one of the user's own."""
    output_module: nn.Module
    """What makes its output logits."""
    flops_per_token: float
    """Training FLOPs a token by the convention of `training_flops`; 0 of a task's own model."""
    tokens_per_step: int
    """Tokens of one optimizer step; examples where a task has those."""
    parameters: tuple[nn.Parameter, ...]
    """What is trained, listed once: walking the modules every step costs a tiny proxy a per cent."""
    forward: Callable[[Tensor], Tensor]
    """What is called: the model, compiled if the config says so."""
    optimizer: Optimizer
    """The optimizer."""
    interventions: dict[str, Intervention]
    """Runtimes by name, in the order of the config."""
    edits: tuple[Edit, ...]
    """What they changed in model and optimizer."""
    before_update: tuple[Intervention, ...]
    """Those of them that act between the backward pass and clipping."""
    panel: Panel
    """The monitors."""
    unheard: dict[str, str]
    """Default monitors that a model of the user's own has nothing for, and why; those that stop are added."""
    device: torch.device
    """Where it runs."""


def check_runtime(config: RunConfig) -> None:
    """Raise a ConfigError if this machine cannot run the config."""
    if config.runtime.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("runtime.device is 'cuda' but torch sees no CUDA device; use --device cpu")


def build_training(config: RunConfig, vocab_size: int, model: nn.Module | None = None) -> Training:
    """Build, initialise and attach, in the order of the phases.

    Args:
        config: the run.
        vocab_size: V, the number of ids or of classes.
        model: a task's own model, initialised; by default the one that the config describes.

    Raises:
        ConfigError: CUDA asked for and absent, or a plug-in that does not fit.
    """
    check_runtime(config)
    config = edited(config)
    device = torch.device(config.runtime.device)
    own = model is not None
    model = (build_model(config, vocab_size) if model is None else model).to(device)
    output_module = head_of(model, vocab_size)
    interventions: dict[str, Intervention] = {}
    context = Context(
        model=model,
        output_module=output_module,
        config=config,
        loss_fn=loss_function(interventions, config.runtime),
        flops_per_token=0.0 if own else training_flops(model, config, output_module),
        tokens_per_step=config.data.batch_size * (1 if own else config.data.seq_len),
    )
    interventions |= {s.name: plugins.load("interventions", s).build(context) for s in config.interventions}
    edits = [intervention.edit_model(model) for intervention in interventions.values()]
    optimizer = build_optimizer(model, config.optim, config.model.roles)  # after the edits: parameters may be new
    edits += [intervention.edit_optimizer(optimizer) for intervention in interventions.values()]
    context = replace(context, optimizer=optimizer)
    unheard: dict[str, str] = {}
    return Training(
        config=config,
        model=model,
        output_module=output_module,
        flops_per_token=0.0 if own else training_flops(model, config, output_module),
        tokens_per_step=context.tokens_per_step,
        parameters=tuple(p for p in model.parameters() if p.requires_grad),
        # A hook that is registered after compiling never fires, so the panel attaches first.
        panel=_panel(config, context, unheard, lenient=own or builder_of(config) is not None),
        unheard=unheard,
        forward=torch.compile(model) if config.runtime.compile else model,
        optimizer=optimizer,
        interventions=interventions,
        edits=tuple(edit for edit in edits if edit is not None),
        before_update=tuple(
            i for i in interventions.values() if type(i).before_update is not Intervention.before_update
        ),
        device=device,
    )


def _panel(config: RunConfig, context: Context, unheard: dict[str, str], *, lenient: bool) -> Panel:
    """The monitors, attached. Those of the defaults that a model other than the proxy lacks are noted, and left out."""
    monitors: dict[str, Monitor] = {spec.name: plugins.load("monitors", spec) for spec in config.record.monitors}
    lenient = lenient and monitors.keys() >= {spec.name for spec in RecordConfig().monitors}
    observers, left_out = attach_all(monitors, lambda _, monitor: monitor.attach(context), lenient=lenient)
    unheard |= left_out

    def note(name: str, error: Exception) -> None:
        unheard[name] = str(error)

    return Panel(observers, stopped=note if lenient else None)


def build_model(config: RunConfig, vocab_size: int) -> nn.Module:
    """The initialised model of a run: the proxy, or what `model.build` makes.

    Raises:
        ConfigError: the user's own function gives no model that can be trained.
    """
    if config.model.build is not None:
        return build_own(config.model, vocab_size, config.train.seed)
    model = Proxy(config.model, vocab_size, config.data.seq_len)
    initialise(model, config.model.roles, config.train.seed)
    return model


def head_of(model: nn.Module, vocab_size: int | None = None) -> nn.Module:
    """What makes the output logits; the model itself where no linear of its own has an output for each of the ids."""
    if isinstance(model, Proxy):
        return model.head
    found = find_output_module(model)
    weight = getattr(found, "weight", None)
    matrix = isinstance(weight, Tensor) and weight.dim() == 2 and vocab_size in (None, len(weight))
    return found if matrix else model


def head_parameters(output_module: nn.Module) -> int:
    """Entries of the head's matrix; 0 where no module of its own makes the logits."""
    weight = getattr(output_module, "weight", None)
    return weight.numel() if isinstance(weight, Tensor) else 0


def training_flops(model: nn.Module, config: RunConfig, output_module: nn.Module | None = None) -> float:
    """Training FLOPs a token of this model, by the convention of `flops_per_token`."""
    shape, head = config.model, head_parameters(head_of(model) if output_module is None else output_module)
    return flops_per_token(block_parameters(model), head, shape.depth, shape.width, config.data.seq_len)
