"""What one run is. The defaults written here are the base recipe: 2309.14322 with qk-norm and z-loss off.

Every section is one frozen dataclass; a field's docstring gives its meaning and unit. `record` says what a run
writes down and is outside the run id; everything else determines the bits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal

from foreshock.core import plugins as plugin_loader
from foreshock.core.config import Spec, digest, field_types, from_json, plugin, plugins, to_json
from foreshock.core.errors import require
from foreshock.core.model_config import ModelConfig, Roles
from foreshock.core.own_model import OWN_MODEL_SEMANTICS, check_interventions, check_settings

SEMANTICS = {"train": 1, "data": 1, "proxy": 1, "optim": 1}
"""Raised by one when the meaning of a component changes, so that older runs are not taken for new ones."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from and how they are batched."""

    source: Spec = plugin("proxy.data.sources", "local_python")
    """The corpus."""
    tokenizer: Spec = plugin("proxy.data.tokenizers", "bytes")
    """Text to token ids; ignored by sources that already hold ids."""
    seq_len: int = 64
    """Tokens a sequence, T."""
    batch_size: int = 16
    """Sequences a step, B."""

    def __post_init__(self) -> None:
        require(self.seq_len >= 2, "data.seq_len", "must be at least 2", self.seq_len)
        require(self.batch_size >= 1, "data.batch_size", "must be at least 1", self.batch_size)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer (2309.14322 sec. 2.1)."""

    name: Literal["adamw", "adam", "sgd", "muon", "lion", "adafactor"] = "adamw"
    """All take decoupled decay but adam, which adds it to the gradient (L2). muon is Muon on the blocks' linears,
    adamw on the rest, at one learning rate."""
    lr: float = 1e-2
    """Peak learning rate η."""
    beta1: float = 0.9
    """Decay of the first moment; the momentum of sgd and muon; unused by adafactor."""
    beta2: float = 0.95
    """Decay of the second moment, and of the only one of lion; unused by sgd and adafactor."""
    eps: float = 1e-8
    """Epsilon of adam and adamw, in units of the gradient."""
    weight_decay: float = 1e-4
    """λ: applied to every tensor."""
    decay: Literal["independent", "coupled"] = "independent"
    """independent: θ -= s_t·λ·θ; coupled: θ -= s_t·η·λ·θ, with s_t the schedule in [0, 1]."""
    clip_norm: float | None = 1.0
    """Global gradient norm above which gradients are scaled down; None switches clipping off."""

    def __post_init__(self) -> None:
        positive = math.isfinite(self.lr) and self.lr > 0
        require(positive, "optim.lr", "must be a finite number above 0", self.lr)
        require(0 <= self.beta1 < 1, "optim.beta1", "must be in [0, 1)", self.beta1)
        require(0 <= self.beta2 < 1, "optim.beta2", "must be in [0, 1)", self.beta2)
        positive = math.isfinite(self.eps) and self.eps > 0
        require(positive, "optim.eps", "must be a finite number above 0", self.eps)
        valid = math.isfinite(self.weight_decay) and self.weight_decay >= 0
        require(valid, "optim.weight_decay", "must be a finite number, 0 or more", self.weight_decay)
        clip = self.clip_norm is None or (math.isfinite(self.clip_norm) and self.clip_norm > 0)
        require(clip, "optim.clip_norm", "must be a finite number above 0, or null for no clipping", self.clip_norm)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over time: η·s_t."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after warm-up."""
    warmup: float = 0.1
    """Linear warm-up, as a fraction of the steps."""
    min_lr: float = 1e-5
    """Absolute learning rate at the end of the decay."""
    decay_fraction: float = 0.2
    """Final decay of wsd, as a fraction of the steps; unused by the others."""

    def __post_init__(self) -> None:
        rule = "must be a fraction of the steps in [0, 1]: warm-up cannot be longer than training"
        require(0 <= self.warmup <= 1, "schedule.warmup", rule, self.warmup)
        valid = math.isfinite(self.min_lr) and self.min_lr >= 0
        require(valid, "schedule.min_lr", "must be a finite number, 0 or more", self.min_lr)
        require(0 < self.decay_fraction <= 1, "schedule.decay_fraction", "must be in (0, 1]", self.decay_fraction)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, from which seed, and when to look at held-out data."""

    steps: int = 250
    """Optimizer steps."""
    seed: int = 0
    """Seed of initialisation and data order."""
    eval_every: int = 125
    """Steps between held-out evaluations; the first and the last step are always evaluated."""
    eval_batches: int = 16
    """Batches of one held-out evaluation, the same ones every time."""
    patience: int = 3
    """Stop early after this many evaluations in a row above the loss at initialisation."""

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every", "eval_batches", "patience"):
            require(getattr(self, name) >= 1, f"train.{name}", "must be at least 1", getattr(self, name))
        require(self.seed >= 0, "train.seed", "must be 0 or more", self.seed)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """What the bits depend on besides the recipe: device type, precision, threads."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Device type."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32 throughout, or bf16 autocast with fp32 parameters."""
    compile: bool = False
    """Whether the model runs under torch.compile."""
    threads: int = 1
    """CPU threads of one run."""

    def __post_init__(self) -> None:
        require(self.threads >= 1, "runtime.threads", "must be at least 1", self.threads)


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """What a run writes down. Outside the run id: it never changes the bits."""

    monitors: tuple[Spec, ...] = plugins(
        "monitors", "loss", "optim", "attention_logits", "output_logits", "norms", "block_outputs", "throughput"
    )
    """Monitors to attach."""
    log_every: int = 20
    """Steps between logged steps; the first, the last and step ⌈steps/4⌉ are always logged."""
    checkpoint_every: int = 100
    """Steps between checkpoints of an unfinished run."""
    keep_checkpoint: bool = False
    """Whether a finished run keeps its last checkpoint."""

    def __post_init__(self) -> None:
        require(self.log_every >= 1, "record.log_every", "must be at least 1", self.log_every)
        require(self.checkpoint_every >= 1, "record.checkpoint_every", "must be at least 1", self.checkpoint_every)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: everything that determines its bits, and what it records."""

    task: Spec = plugin("tasks", "train")
    """What the run does: train the model on tokens, or another experiment."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Architecture."""
    data: DataConfig = field(default_factory=DataConfig)
    """Corpus and batches."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over time."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, seed, evaluation."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Device, precision, threads."""
    interventions: tuple[Spec, ...] = plugins("interventions")
    """Cures, applied in this order inside each phase."""
    record: RecordConfig = field(default_factory=RecordConfig)
    """What is written down."""


def resolve(config: RunConfig) -> RunConfig:
    """The config with every plug-in's options filled in and every name and value checked; needs no torch.

    Raises:
        ConfigError: an unknown plug-in or option, conflicting interventions, a value out of range, or what only the
            proxy has, asked of a model of the user's own.
    """
    resolved: RunConfig = _resolve_specs(from_json(RunConfig, to_json(config)))
    check_settings(resolved.model, _resolve_specs(ModelConfig(build=resolved.model.build)), builder_of(resolved))
    check_conflicts(resolved)
    return resolved


def check_conflicts(config: RunConfig) -> None:
    """Raise a ConfigError if an intervention is given twice, two of them exclude each other, or one cannot work here.

    Two exclude each other if one says so, unless its options or the other's are neutral, or if they want the same
    setting at different values: then the order in which they edit the config would matter.
    """
    given = [spec.name for spec in config.interventions]
    cures = {spec.name: plugin_loader.load("interventions", spec) for spec in config.interventions}
    active = {name for name, cure in cures.items() if not _is_neutral(cure)}
    for name, cure in cures.items():
        require(given.count(name) == 1, "interventions", "must name each intervention once", given)
        clash = sorted(set(cure.conflicts) & active) if name in active else []
        require(not clash, "interventions", f"cannot combine {name} with {', '.join(clash)}; drop one", given)
    check_interventions(builder_of(config), cures)
    # From multipliers of 1: there alone x·y and y·x are the same number to the last digit.
    start = replace(config, model=replace(config.model, roles=Roles()))
    for (first, one), (second, other) in combinations(cures.items(), 2):
        same = one.edit_config(other.edit_config(start)) == other.edit_config(one.edit_config(start))
        rule = f"cannot combine {first} with {second}: they want different values of one setting; drop one"
        require(same, "interventions", rule, given)
    built = edited(config)
    for cure in cures.values():
        cure.check(built)


def builder_of(config: RunConfig) -> str | None:
    """Who builds the model: the user's function or a task, by name; None where it is foreshock's proxy."""
    if plugin_loader.load("tasks", config.task).builds_proxy:
        return config.model.build
    rule = f"cannot be trained by task {config.task.name}, which builds its own model; leave it out"
    require(config.model.build is None, "model.build", rule, config.model.build)
    return f"task {config.task.name}"


def _is_neutral(cure: Any) -> bool:
    return cure.neutral is not None and all(getattr(cure, name) == value for name, value in cure.neutral.items())


def edited(config: RunConfig) -> RunConfig:
    """The config after every intervention's `edit_config`, in order: what is built."""
    for spec in config.interventions:
        config = plugin_loader.load("interventions", spec).edit_config(config)
    return config


def run_id(config: RunConfig, data_hash: str) -> str:
    """Twelve hex digits that change exactly when the bits of a run may change.

    Hash of the resolved config before any `edit_config` and without `record`, the hash of the tokens used, the
    semantics versions of the components and interventions involved, and the source of the user's own plug-ins and of
    the file that builds a model of the user's own.
    """
    semantics: dict[str, Any] = dict(SEMANTICS)
    if config.model.build is not None:
        semantics["own_model"] = OWN_MODEL_SEMANTICS
        semantics[f"{config.model.build} source"] = plugin_loader.source_digest(config.model.build)
    for spec in config.interventions:
        semantics[spec.name] = plugin_loader.load("interventions", spec).semantics
    if config.task.name != "train":
        semantics[f"task {config.task.name}"] = plugin_loader.load("tasks", config.task).semantics
    for name in _names_of_plugins(replace(config, record=RecordConfig(monitors=()))):
        if ":" in name:
            semantics[f"{name} source"] = plugin_loader.source_digest(name)
    return digest({**bits_of(config), "data_hash": data_hash, "semantics": semantics})


def bits_of(config: RunConfig) -> dict[str, Any]:
    """The resolved config as JSON without `record`: what determines the bits."""
    bits = {key: value for key, value in to_json(resolve(config)).items() if key != "record"}
    # As in the configs of runs from before there were these settings.
    if config.model.build is None:
        del bits["model"]["build"]
    if config.task == Spec("train"):
        bits["task"] = "train"
    return bits


def _names_of_plugins(config: Any) -> Iterator[str]:
    """The name of every plug-in in a config, through nested sections."""
    for name in field_types(type(config)):
        value = getattr(config, name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Spec):
                yield item.name
            elif hasattr(type(item), "__dataclass_fields__"):
                yield from _names_of_plugins(item)


def _resolve_specs(config: Any) -> Any:
    """Resolve every field declared with a plug-in family, through nested sections."""
    changes: dict[str, Any] = {}
    for name in field_types(type(config)):
        value = getattr(config, name)
        family = type(config).__dataclass_fields__[name].metadata.get("family")
        if family is None:
            changes[name] = _resolve_specs(value) if hasattr(type(value), "__dataclass_fields__") else value
        elif isinstance(value, Spec):
            changes[name] = plugin_loader.resolve(family, value)
        elif isinstance(value, tuple):
            changes[name] = tuple(plugin_loader.resolve(family, spec) for spec in value)
    return replace(config, **changes)
