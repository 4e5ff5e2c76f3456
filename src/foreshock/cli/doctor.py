"""`foreshock doctor`: what this machine offers and what runs here; of a model, what watching it would give."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from foreshock.cli.options import read_builder, read_number, shown_as

if TYPE_CHECKING:
    from foreshock.training.doctor import Examination


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Show versions, processors, devices and the token cache, and what runs here.

    With a model: what foreshock.watch would record of it exactly, as a sample, as a bound or not at all, why, and at
    what cost.
    """

    model: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[MODULE:FUNCTION]")] = None
    """What builds the model: build(width, depth, heads, vocab_size), as `study --model` takes it; or build(), which
    returns the model, (model, optimizer) or (model, optimizer, loss_fn, batch)."""
    size: Annotated[str | None, shown_as("WIDTHxDEPTH")] = None
    """Size to build at, such as 64x2, or 64x2x4 with the number of heads (default 64x2)."""
    batch_size: Annotated[str | None, shown_as("N")] = None
    """Sequences a step."""
    seq_len: Annotated[str | None, shown_as("N")] = None
    """Tokens a sequence."""
    every: Annotated[str | None, shown_as("N")] = None
    """Optimizer steps between logged steps (default 20)."""
    monitors: Annotated[tuple[str, ...] | None, shown_as("MONITOR ...")] = None
    """Monitors, such as norms attention_logits:queries=64; by default those of foreshock.watch."""
    estimate: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only count what it would cost; train nothing."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object and nothing else."""

    def run(self) -> int:
        """Look and show.

        Raises:
            ConfigError: torch is missing or too old; a model that cannot be built; an option that needs one.
        """
        from foreshock.cli.output import console, print_json
        from foreshock.study.machine import check_torch

        if self.model is not None:
            return self.examine_model(self.model)
        self.refuse_options()
        facts = examine()
        if self.json:
            print_json(facts)
        screen = console(quiet=self.json)
        for name, value in facts.items():
            screen.print(f"{name:<12} {shown(value)}", markup=False, soft_wrap=True)
        check_torch()
        return 0

    def refuse_options(self) -> None:
        """Raise a ConfigError if an option was given that says something of a model."""
        from foreshock.core.errors import ConfigError

        named = ("size", "batch_size", "seq_len", "every", "monitors", "estimate")
        for name in named:
            if getattr(self, name) not in (None, False):
                option = name.replace("_", "-")
                raise ConfigError(f"--{option}: give a model too: foreshock doctor my_module:build --{option} …")

    def examine_model(self, model: str) -> int:
        """Build a model, examine it, show what was found."""
        from foreshock.cli.output import print_json
        from foreshock.study.grid import Size
        from foreshock.study.machine import check_torch

        numbers: dict[str, Any] = {
            "batch_size": read_number("--batch-size", self.batch_size, int, "8"),
            "seq_len": read_number("--seq-len", self.seq_len, int, "64"),
        }
        every = read_number("--every", self.every, int, "20")
        size = None if self.size is None else Size.parse(self.size)
        check_torch()
        from foreshock.training.doctor import doctor
        from foreshock.training.doctor.builder import build_for_doctor

        given = {name: number for name, number in numbers.items() if number is not None}
        name = read_builder(model)
        built = build_for_doctor(name, None if size is None else (size.width, size.depth, size.heads), **given)
        examination = doctor(
            built.model,
            built.optimizer,
            every=20 if every is None else every,
            batch_size=numbers["batch_size"],
            seq_len=numbers["seq_len"] or built.seq_len,
            monitors=self.monitors,
            loss_fn=built.loss_fn,
            batch=built.batch,
            trial=not self.estimate,
        )
        if self.json:
            print_json(examination.as_json())
        else:
            show(examination)
        return 0


def show(examination: "Examination") -> None:
    """Facts, a table of what would be recorded, and the cost."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from foreshock.cli.output import console
    from foreshock.training.doctor.examination import shown as in_words

    screen = console()
    width = max(map(len, examination.facts))
    for name, value in examination.facts.items():
        screen.print(f"{name:<{width}}  {in_words(value)}", markup=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("quantity", "of", "how", "why"):
        table.add_column(name, no_wrap=name == "quantity", overflow="fold")
    colours = {"exact": "green", "sample": "yellow", "bound": "yellow", "blind": "red"}
    for row in examination.rows:
        table.add_row(Text(row.quantity), Text(row.where), Text(row.how, style=colours[row.how]), Text(row.why))
    screen.print(table)
    for cost in (examination.estimate, examination.measured):
        if cost is not None:
            screen.print(str(cost), markup=False, soft_wrap=True)


def examine() -> dict[str, Any]:
    """Everything the doctor looks at."""
    from foreshock.core.manifest import environment
    from foreshock.core.run_config import RuntimeConfig
    from foreshock.proxy.data.cache import cache_folder
    from foreshock.study import machine

    here = environment()
    devices, runtime = machine.cuda_devices(), RuntimeConfig()
    return {
        "python": here["python"],
        "packages": here["packages"],
        "platform": here["platform"],
        "processors": machine.processors(),
        "threads": f"{runtime.threads} a run, {machine.check_workers(None, runtime)} runs side by side",
        "device": f"{len(devices)} CUDA" if devices else "cpu",
        "cache": str(cache_folder()),
        "runs here": ["cpu, fp32", *(["cuda, bf16 and compile"] if devices else [])],
        "curvature": curvature_products(),
    }


def curvature_products() -> dict[str, str] | str:
    """The back end that makes Hessian-vector products of the base proxy, and why it is chosen."""
    from foreshock.core.errors import ConfigError
    from foreshock.study.machine import check_torch

    try:
        check_torch()
    except ConfigError:
        return "unknown without torch"
    from foreshock.core.run_config import RunConfig
    from foreshock.proxy.data.tokenizers.bytes import VOCAB_SIZE
    from foreshock.proxy.model import Proxy
    from foreshock.training.doctor.facts import products_of

    config = RunConfig()
    return products_of(Proxy(config.model, VOCAB_SIZE, config.data.seq_len))


def shown(value: Any) -> str:
    """A fact for people."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
