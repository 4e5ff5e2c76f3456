"""Names of arms: every difference from the base recipe is in the name, and the name makes the config again."""

import itertools
from dataclasses import replace

import pytest

from foreshock.core.arms import Arm, arm_name
from foreshock.core.config import Spec, replace_at
from foreshock.core.errors import ConfigError
from foreshock.core.run_config import RunConfig, resolve

CURES = ("qk_norm", "qk_norm:over=width", "z_loss", "z_loss:weight=0.5")


def recipe(*interventions: str, **settings: object) -> RunConfig:
    config = replace(RunConfig(), interventions=tuple(map(Spec.parse, interventions)))
    for path, value in settings.items():
        config = replace_at(config, path.replace("__", "."), value)
    return resolve(config)


@pytest.mark.parametrize(
    ("base", "ours", "name"),
    [
        (["qk_norm"], [], "-qk_norm"),
        (["qk_norm"], ["z_loss"], "-qk_norm+z_loss"),
        (["qk_norm:over=width"], ["qk_norm"], "-qk_norm:over=width+qk_norm"),
        (["qk_norm"], ["qk_norm:over=width"], "-qk_norm+qk_norm:over=width"),
        (["qk_norm", "z_loss"], ["z_loss"], "-qk_norm"),
        (["qk_norm", "z_loss"], ["z_loss", "qk_norm"], 'interventions=["z_loss","qk_norm"]'),
        (["z_loss"], ["qk_norm", "z_loss"], 'interventions=["qk_norm","z_loss"]'),
        (["qk_norm"], ["qk_norm"], "none"),
    ],
)
def test_what_a_run_lacks_of_the_base_is_in_its_name(base: list[str], ours: list[str], name: str) -> None:
    config = recipe(*ours)
    assert arm_name(config, recipe(*base)) == name
    assert resolve(Arm.parse(name).apply(recipe(*base))) == config


def test_every_pair_of_recipes_is_told_apart_and_made_again() -> None:
    """All orders of up to two cures, over every base."""
    sets = [[], *([c] for c in CURES), *map(list, itertools.permutations(CURES, 2))]
    recipes = [recipe(*s) for s in sets if len({c.partition(":")[0] for c in s}) == len(s)]
    for base in recipes:
        names = [arm_name(config, base) for config in recipes]
        assert len(set(names)) == len(recipes)
        assert [resolve(Arm.parse(name).apply(base)) for name in names] == recipes
        assert all(str(Arm.parse(name)) == name for name in names)


@pytest.mark.parametrize(("theirs", "ours"), list(itertools.product(CURES, [*CURES, "none"])))
@pytest.mark.parametrize("decay", [1e-4, 0.5])
def test_missing_cures_and_overrides_go_together(theirs: str, ours: str, decay: float) -> None:
    base = recipe(theirs)
    config = recipe(*([] if ours == "none" else [ours]), optim__weight_decay=decay)
    assert resolve(Arm.parse(arm_name(config, base)).apply(base)) == config


@pytest.mark.parametrize("text", ["-z_loss", "-qk_norm:over=width", "-qk_norm+-qk_norm"])
def test_what_the_base_does_not_have_cannot_be_taken_away(text: str) -> None:
    with pytest.raises(ConfigError, match=r"must take away what the base recipe has \((qk_norm|none)\)"):
        Arm.parse(text).apply(recipe("qk_norm"))


def test_a_user_may_write_it_loosely() -> None:
    assert str(Arm.parse("z_loss + -qk-norm + optim.eps=1e+3")) == "-qk_norm+z_loss+optim.eps=1000"
