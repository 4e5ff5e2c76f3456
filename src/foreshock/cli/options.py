"""Options that say which runs are meant: shared by the commands that train a study."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

if TYPE_CHECKING:
    from pathlib import Path

    from foreshock.core.run_config import RunConfig
    from foreshock.study import grid

Number = TypeVar("Number", int, float)

Settings = Annotated[
    tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH.TO.FIELD=VALUE ...")
]
"""Values of an option that may be given several times, with several values each."""


def shown_as(metavar: str) -> Any:
    """How the values of an option are called in the help."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """A recipe and what is to differ from it."""

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RECIPE]")] = "quick"
    """The study to start from: quick, small or cures."""
    out: Annotated[str | None, shown_as("DIR")] = None
    """Folder for everything; default out/RECIPE."""
    workers: Annotated[str | None, shown_as("N")] = None
    """Runs side by side; default: as many as the processors carry, or one a CUDA device."""
    sizes: Annotated[tuple[str, ...] | None, shown_as("WIDTHxDEPTH ...")] = None
    """Widths x depths, such as 32x2 64x3 (head dimension 16), or 40x2x4 with the number of heads; or a ladder: joint,
    width-only, depth-only."""
    lrs: Annotated[tuple[str, ...] | None, shown_as("LR ...")] = None
    """Peak learning rates."""
    seeds: Annotated[tuple[str, ...] | None, shown_as("SEED ...")] = None
    """Seeds of initialisation and data order."""
    steps: Annotated[str | None, shown_as("N")] = None
    """Optimizer steps a run."""
    batch_size: Annotated[str | None, shown_as("N")] = None
    """Sequences a step."""
    seq_len: Annotated[str | None, shown_as("N")] = None
    """Tokens a sequence."""
    interventions: Annotated[tuple[str, ...] | None, shown_as("ARM ...")] = None
    """Arms: none, qk_norm, qk_norm+z_loss, z_loss:weight=1e-3, qk_norm+optim.weight_decay=0; `all` is none and every
    intervention at its defaults."""
    model: Annotated[str | None, shown_as("MODULE:FUNCTION")] = None
    """A model family of your own in place of foreshock's: build(width, depth, heads, vocab_size) -> nn.Module, as
    my_module:build or path/to/file.py:build."""
    data: Annotated[str | None, shown_as("SOURCE")] = None
    """Corpus: local-python, synthetic-v1, a .txt, .jsonl or .bin file, or a directory."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train; cuda means bf16 and torch.compile, which pays off from some millions of parameters."""
    set: Settings = ()
    """path.to.field=value: change the base recipe for all arms."""
    vary: Settings = ()
    """path.to.field=v1,v2: multiply the arms by these values."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show what would run and how long it would take; touch nothing in the folder."""

    def study(self) -> "grid.Study":
        """The recipe with every option applied.

        Raises:
            ConfigError: an unknown name (the nearest is offered), or a value out of range.
        """
        from dataclasses import replace

        from foreshock.core.run_config import OptimConfig, TrainConfig
        from foreshock.study import grid, recipes

        study = recipes.load(self.recipe)
        self.check_recipe_is_first(recipes.names())
        base = self.base(study.base)
        axes: dict[str, Any] = {
            "sizes": None if self.sizes is None else grid.parse_sizes(self.sizes),
            "lrs": read_numbers("--lrs", self.lrs, float, "1e-3 1e-2"),
            "seeds": read_numbers("--seeds", self.seeds, int, "0 1 2"),
            "arms": grid.reachable(study.arms, base)
            if self.interventions is None
            else grid.parse_arms(self.interventions, base),
        }
        for lr in axes["lrs"] or ():
            check_value("--lrs", OptimConfig, lr=lr)
        for seed in axes["seeds"] or ():
            check_value("--seeds", TrainConfig, seed=seed)
        study = replace(study, base=base, **{k: v for k, v in axes.items() if v is not None})
        return grid.vary(study, [setting for group in self.vary for setting in group])

    def check_recipe_is_first(self, recipes: list[str]) -> None:
        """Raise a ConfigError if an option has taken the recipe for one of its values."""
        from foreshock.core.errors import ConfigError

        axes = {name: getattr(self, name) or () for name in ("sizes", "lrs", "seeds", "interventions")}
        settings = {name: [s for group in getattr(self, name) for s in group] for name in ("set", "vary")}
        for name, values in (axes | settings).items():
            for recipe in set(values) & set(recipes):
                raise ConfigError(f"--{name}: {recipe!r} is a recipe; put it before the options: {recipe} --{name} …")

    def base(self, base: "RunConfig") -> "RunConfig":
        """The recipe's base with device, lengths, corpus and `--set` applied, in this order."""
        from dataclasses import replace

        from foreshock.core.config import replace_at
        from foreshock.core.errors import ConfigError
        from foreshock.proxy.data.source import parse_source
        from foreshock.study.grid import override

        if self.device == "cuda":
            base = replace(base, runtime=replace(base.runtime, device="cuda", precision="bf16", compile=True))
        given = {
            "model.build": None if self.model is None else read_builder(self.model),
            "train.steps": read_number("--steps", self.steps, int, "250"),
            "data.batch_size": read_number("--batch-size", self.batch_size, int, "16"),
            "data.seq_len": read_number("--seq-len", self.seq_len, int, "64"),
            "data.source": None if self.data is None else parse_source(self.data),
        }
        settings = [setting for group in self.set for setting in group]
        for path, value in given.items():
            if value is not None:
                if path in [setting.partition("=")[0].strip() for setting in settings]:
                    raise ConfigError(f"--set {path}: an option of its own sets it already; give it in one place")
                base = replace_at(base, path, value)
        return override(base, settings)


def read_builder(text: str) -> str:
    """The name of a builder, `module:function`, whose folder is then one that modules are imported from.

    That is the folder of the file for `path/to/file.py:function`, and else the current one.

    Raises:
        ConfigError: there is no such file, or another module of its name is found first.
    """
    import importlib.util
    import sys
    from pathlib import Path

    from foreshock.core.errors import ConfigError

    module, colon, function = text.rpartition(":")
    if not colon or not module.endswith(".py"):
        import_from(Path.cwd())
        return text
    file = Path(module).resolve()
    if not file.is_file():
        raise ConfigError(f"--model: there is no file {module!r}; give path/to/file.py:function, or module:function")
    import_from(file.parent)
    loaded = getattr(sys.modules.get(file.stem), "__file__", None)
    found = importlib.util.find_spec(file.stem) if loaded is None else None
    origin = loaded if found is None else found.origin
    if not file.stem.isidentifier() or origin is None or Path(origin).resolve() != file:
        raise ConfigError(f"--model: {module!r} cannot be imported as {file.stem!r}, another module's name; rename it")
    return f"{file.stem}:{function}"


def import_from(folder: "Path") -> None:
    """Import modules from a folder first, here and in workers, as Python does from that of a script."""
    import importlib
    import sys

    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()


def check_value(option: str, section: type, **value: float) -> None:
    """Raise a ConfigError that names the option if a section of the config refuses a value."""
    from foreshock.core.errors import ConfigError

    try:
        section(**value)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from error


def read_numbers(
    option: str, texts: tuple[str, ...] | None, kind: type[Number], example: str
) -> tuple[Number, ...] | None:
    """The values of an option as numbers; None if it was not given."""
    return None if texts is None else tuple(_number(option, text, kind, example) for text in texts)


def read_number(option: str, text: str | None, kind: type[Number], example: str) -> Number | None:
    """The value of an option as a number; None if it was not given."""
    return None if text is None else _number(option, text, kind, example)


def _number(option: str, text: str, kind: type[Number], example: str) -> Number:
    """Read a number, or say how one is written: the parser's own message is about types."""
    from foreshock.core.errors import ConfigError

    try:
        return kind(text)
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"{option}: cannot read {text!r}; write {what}, as in {option} {example}") from error
