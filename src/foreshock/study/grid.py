"""The grid of a study: sizes × learning rates × arms × seeds, expanded into runs."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from foreshock.core import plugins
from foreshock.core.arms import AXES, Arm
from foreshock.core.config import canonical_json, field_types, parse_value, replace_at, split_outside, to_json
from foreshock.core.errors import ConfigError, RunFolderError, require
from foreshock.core.own_model import is_setting
from foreshock.core.run_config import RunConfig, bits_of, builder_of, resolve
from foreshock.study.estimate import rough_seconds

HEAD_DIMENSION = 16
"""Features per head when only width and depth are given: constant, so that scale changes nothing else."""

STUDY_FORMAT = 2
"""Version of study.json and of the configs of its runs; another one is refused."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """One rung of a ladder."""

    width: int
    """Residual width d, in features."""
    depth: int
    """Number of blocks L."""
    heads: int
    """Attention heads."""

    @classmethod
    def parse(cls, text: str) -> "Size":
        """Read WIDTHxDEPTH (head dimension 16) or WIDTHxDEPTHxHEADS.

        >>> Size.parse("64x3")
        Size(width=64, depth=3, heads=4)

        Raises:
            ConfigError: not of this form, or the width is no multiple of the head dimension or of the heads.
        """
        match = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?", text.strip())
        if match is None:
            raise ConfigError(
                f"sizes: cannot read {text!r}; write WIDTHxDEPTH such as 64x3, WIDTHxDEPTHxHEADS, "
                f"or a ladder: {', '.join(LADDERS)}"
            )
        width, depth = int(match[1]), int(match[2])
        heads = int(match[3]) if match[3] else width // HEAD_DIMENSION
        if match[3] is None and (width % HEAD_DIMENSION or width == 0):
            raise ConfigError(
                f"sizes: model.width={width} is not a multiple of the head dimension {HEAD_DIMENSION}; "
                f"choose another width, or give model.heads as in {width}x{depth}xHEADS"
            )
        if heads == 0 or width % heads:
            fits = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0 and width // n % 2 == 0)
            raise ConfigError(
                f"sizes: model.width={width} is not a multiple of model.heads={heads}; "
                f"choose another width, or heads among {fits or 'those of an even width'}"
            )
        return cls(width=width, depth=depth, heads=heads)

    def __str__(self) -> str:
        usual = self.heads * HEAD_DIMENSION == self.width
        return f"{self.width}x{self.depth}" if usual else f"{self.width}x{self.depth}x{self.heads}"


def _ladder(*texts: str) -> tuple[Size, ...]:
    return tuple(Size.parse(text) for text in texts)


JOINT = _ladder("32x2", "64x3", "96x4", "128x4")
"""Width and depth grow together."""
WIDTH_ONLY = _ladder("32x3", "64x3", "96x3", "128x3")
"""Depth is fixed at 3."""
DEPTH_ONLY = _ladder("64x1", "64x2", "64x4", "64x8")
"""Width is fixed at 64."""
LADDERS = {"joint": JOINT, "width-only": WIDTH_ONLY, "depth-only": DEPTH_ONLY}
"""Ladders by their name on the command line."""


def parse_sizes(texts: Iterable[str]) -> tuple[Size, ...]:
    """Read sizes, each as `Size.parse` does or the name of a ladder.

    Raises:
        ConfigError: a text is neither.
    """
    return tuple(size for text in texts for size in LADDERS.get(text) or (Size.parse(text),))


def parse_arms(texts: Iterable[str], base: RunConfig | None = None) -> tuple[Arm, ...]:
    """Arms as on the command line; `all` stands for the base recipe and every intervention at its defaults.

    Where the model of a base recipe is the user's own, `all` leaves out what is a setting of the proxy.

    >>> [str(arm) for arm in parse_arms(["none", "qk_norm+z_loss"])]
    ['none', 'qk_norm+z_loss']
    """
    arms: list[Arm] = []
    for text in texts:
        every = ["none", *plugins.names("interventions")] if text.strip() == "all" else [text]
        meant = reachable(map(Arm.parse, every), base or RunConfig()) if len(every) > 1 else map(Arm.parse, every)
        arms += [arm for arm in meant if arm not in arms]
    return tuple(arms)


def reachable(arms: Iterable[Arm], base: RunConfig) -> tuple[Arm, ...]:
    """Those arms, which nobody named, that reach the model of a base recipe: all of them, unless it is the user's own.

    What is a setting of the proxy is left out, also where it may reach other models: theirs may be out of reach.
    """

    def reaches(arm: Arm) -> bool:
        if any(is_setting(plugins.declaration("interventions", spec.name)) for spec in arm.interventions):
            return False
        try:
            arm.apply(base)
        except ConfigError:
            return False
        return True

    return tuple(arm for arm in arms if builder_of(base) is None or reaches(arm))


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question asked of a ladder of proxies: every combination of the axes is one run.

    A value given twice counts once; arms are equal if they make the same config of the base recipe.

    Raises:
        ConfigError: an axis without a value, an arm that is none, or an override of an axis.
    """

    name: str
    """What the report calls it."""
    base: RunConfig = field(default_factory=RunConfig)
    """The base recipe; arms are named by their difference from it."""
    sizes: tuple[Size, ...] = JOINT[:3]
    """Sizes of the proxies."""
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    """Peak learning rates η."""
    arms: tuple[Arm, ...] = (Arm(),)
    """What distinguishes the curves; `Arm()` is the base recipe itself."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of initialisation and data order."""

    def __post_init__(self) -> None:
        for axis in ("sizes", "lrs", "arms", "seeds"):
            require(len(getattr(self, axis)) > 0, axis, "must name at least one value", getattr(self, axis))
        for path in (path for arm in self.arms for path, _ in arm.overrides if path in AXES):
            raise ConfigError(f"interventions: {path} is an axis of the grid; use --sizes, --lrs or --seeds")
        arms: dict[str, Arm] = {}
        for arm in self.arms:
            arms.setdefault(canonical_json(bits_of(arm.apply(self.base))), arm)
        object.__setattr__(self, "arms", tuple(arms.values()))
        for axis in ("sizes", "lrs", "seeds"):
            object.__setattr__(self, axis, tuple(dict.fromkeys(getattr(self, axis))))


def expand(study: Study) -> list[RunConfig]:
    """Every run of a study, resolved and checked; runs with the same bits are listed once.

    The order is seed by seed, and inside a seed the longest runs first: slots then run empty together, and what is
    there after an interruption is a whole picture at the sizes that matter most.

    Raises:
        ConfigError: an unknown name (the nearest is offered), a value out of range, or conflicting interventions.
    """
    runs: dict[str, RunConfig] = {}
    for seed, size, lr, arm in product(study.seeds, study.sizes, study.lrs, study.arms):
        config = resolve(at_point(arm.apply(study.base), size, lr, seed))
        runs.setdefault(canonical_json(bits_of(config)), config)
    return sorted(runs.values(), key=lambda config: (study.seeds.index(config.train.seed), -rough_seconds(config)))


def at_point(config: RunConfig, size: Size, lr: float, seed: int) -> RunConfig:
    """The config at one point of a grid."""
    sized = replace(config.model, width=size.width, depth=size.depth, heads=size.heads)
    return replace(config, model=sized, optim=replace(config.optim, lr=lr), train=replace(config.train, seed=seed))


def override(base: RunConfig, settings: Iterable[str]) -> RunConfig:
    """The base recipe with `path=value` settings; they hold for every arm and are part of no arm's name.

    Raises:
        ConfigError: not of this form, an unknown field, a bad value, a path that is an axis of the grid, or one
            given twice.
    """
    seen: set[str] = set()
    for setting in settings:
        path, text = _setting(setting, "--set")
        if path in seen:
            raise ConfigError(f"--set {path}: given twice; give one value, or compare several with --vary")
        seen.add(path)
        base = replace_at(base, path, parse_value(text))
    return base


def vary(study: Study, settings: Iterable[str]) -> Study:
    """The study with its arms multiplied by every value of every `path=v1,v2` setting.

    A value that the base recipe already has adds nothing to an arm.

    Raises:
        ConfigError: not of this form, an unknown field, a bad value, or a path that is an axis or already overridden.
    """
    for setting in settings:
        path, text = _setting(setting, "--vary")
        if path.startswith("record."):
            raise ConfigError(f"--vary {path}: what a run records changes no result; use --set")
        values = [parse_value(value) for value in split_outside(text, ",") if value.strip()]
        study = replace(study, arms=tuple(_with(arm, study.base, path, v) for arm in study.arms for v in values))
    return study


def _with(arm: Arm, base: RunConfig, path: str, value: Any) -> Arm:
    """The arm with one override more, unless it is what the base recipe says anyway."""
    if path in dict(arm.overrides):
        raise ConfigError(f"--vary {path}: an arm of --interventions sets it already; give it in one place")
    same = bits_of(replace_at(base, path, value)) == bits_of(base)
    return arm if same else replace(arm, overrides=tuple(sorted((*arm.overrides, (path, value)))))


def _setting(text: str, option: str) -> tuple[str, str]:
    path, equals, value = text.partition("=")
    path = path.strip()
    if not equals or not path or not value.strip():
        raise ConfigError(f"{option}: cannot read {text!r}; write path.to.field=value, such as optim.beta2=0.99")
    if path in AXES:
        raise ConfigError(f"{option} {path}: this is an axis of the grid; use --sizes, --lrs or --seeds")
    return path, value


def study_to_json(study: Study, run_ids: Iterable[str]) -> dict[str, Any]:
    """The content of study.json: the study, and the runs that it plans."""
    return {
        "format": STUDY_FORMAT,
        "name": study.name,
        "base": to_json(resolve(study.base)),
        "sizes": [str(size) for size in study.sizes],
        "lrs": list(study.lrs),
        "arms": [str(arm) for arm in study.arms],
        "seeds": list(study.seeds),
        "run_ids": list(run_ids),
    }


def shape_of(config: RunConfig) -> str:
    """The size of a run, as on the command line."""
    return str(Size(**{name: getattr(config.model, name) for name in field_types(Size)}))


def check_study_format(found: Any, where: object) -> None:
    """Raise a RunFolderError if a study.json is none, or was written by another version."""
    version = found.get("format", STUDY_FORMAT) if isinstance(found, Mapping) else None
    if not isinstance(version, int):
        raise RunFolderError(f"{where} is not what `foreshock study` writes; restore the file, or remove it")
    if version > STUDY_FORMAT:
        raise RunFolderError(
            f"{where} was written by a newer foreshock (format {version}, this one reads {STUDY_FORMAT}); "
            "upgrade foreshock or choose another --out"
        )
    if version < STUDY_FORMAT:
        raise RunFolderError(
            f"{where} was written by an older foreshock (format {version}, this one reads {STUDY_FORMAT}), whose "
            "runs had other settings; run the study again with another --out"
        )
