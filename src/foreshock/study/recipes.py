"""Recipes: studies ready to run, by name. A recipe is a function without arguments that returns a Study.

Add one by writing a function here and naming it in `__all__`: its name is the name on the command line.
"""

from dataclasses import replace

from foreshock.core.arms import Arm
from foreshock.core.errors import unknown
from foreshock.core.run_config import RunConfig
from foreshock.study.grid import JOINT, Size, Study, parse_arms

__all__ = ["cures", "quick", "small"]


def quick() -> Study:
    """Three sizes, seven learning rates, with and without qk-norm: 42 runs, under five minutes on two cores."""
    return Study(
        name="quick",
        base=_base(steps=250, eval_every=125, log_every=10),
        sizes=JOINT[:3],
        arms=(Arm(), Arm.parse("qk_norm")),
    )


def small() -> Study:
    """Four sizes, three seeds, and the cures of both classic instabilities; about 90 minutes on two cores.

    Asks whether output logits diverge too: late, at high learning rate, without weight decay and z-loss.
    """
    return Study(
        name="small",
        base=_base(steps=1000, eval_every=250, log_every=20),
        sizes=tuple(map(Size.parse, ("32x2", "48x2", "64x3", "80x3"))),
        arms=tuple(Arm.parse(t) for t in ("none", "qk_norm", "qk_norm+z_loss", "qk_norm+optim.weight_decay=0")),
        seeds=(0, 1, 2),
    )


def cures() -> Study:
    """Every intervention at its defaults on one size, three seeds; about an hour and a half on two cores."""
    return replace(quick(), name="cures", sizes=(Size.parse("64x3"),), arms=parse_arms(["all"]), seeds=(0, 1, 2))


def names() -> list[str]:
    """The recipes, sorted."""
    return sorted(__all__)


def load(name: str) -> Study:
    """The study that a recipe makes.

    Raises:
        ConfigError: no such recipe; the nearest name is offered.
    """
    if name not in names():
        raise unknown("recipe", name, names())
    study = globals()[name]()
    assert isinstance(study, Study)
    return study


def _base(*, steps: int, eval_every: int, log_every: int) -> RunConfig:
    """The base recipe at another length."""
    base = RunConfig()
    return replace(
        base,
        train=replace(base.train, steps=steps, eval_every=eval_every),
        record=replace(base.record, log_every=log_every),
    )
