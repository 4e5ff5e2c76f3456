"""Expansion of a study into runs: counts, order, names, and what is refused."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.core.arms import Arm, arm_name
from foreshock.core.config import Spec, canonical_json, from_json
from foreshock.core.errors import ConfigError, RunFolderError
from foreshock.core.run_config import RunConfig, bits_of, resolve
from foreshock.study import recipes
from foreshock.study.estimate import duration, estimate, measure, rough_seconds, shape_key
from foreshock.study.grid import (
    DEPTH_ONLY,
    JOINT,
    WIDTH_ONLY,
    Size,
    Study,
    check_study_format,
    expand,
    override,
    parse_sizes,
    shape_of,
    study_to_json,
    vary,
)

TINY = Study(name="tiny", sizes=(Size(width=32, depth=1, heads=2),), lrs=(1e-2,))


def arms_of(study: Study) -> list[str]:
    return sorted({arm_name(config, resolve(study.base)) for config in expand(study)})


@given(st.integers(1, 40), st.integers(1, 9))
def test_a_size_reads_what_it_writes(heads: int, depth: int) -> None:
    size = Size.parse(f"{16 * heads}x{depth}")
    assert size == Size(width=16 * heads, depth=depth, heads=heads)
    assert Size.parse(str(size)) == size
    odd = Size.parse(f"{40 * heads}x{depth}x{4 * heads}")
    assert Size.parse(str(odd)) == odd


@pytest.mark.parametrize("text", ["33x2", "0x2", "64", "64x", "64x3x", "axb", "64x-1", "64 x 3", "64x3x4x5"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="sizes"):
        Size.parse(text)


def test_ladders_keep_the_head_dimension_and_grow() -> None:
    for ladder in (JOINT, WIDTH_ONLY, DEPTH_ONLY):
        assert all(size.width == 16 * size.heads for size in ladder)
        params = [size.width**2 * size.depth for size in ladder]
        assert params == sorted(set(params))
    assert len({size.depth for size in WIDTH_ONLY}) == 1
    assert len({size.width for size in DEPTH_ONLY}) == 1


def test_ladders_are_given_by_name() -> None:
    assert parse_sizes(["width-only", "40x2x4", "joint"]) == (*WIDTH_ONLY, Size.parse("40x2x4"), *JOINT)
    assert parse_sizes(["depth-only"]) == DEPTH_ONLY
    with pytest.raises(ConfigError, match="depth-only"):
        parse_sizes(["depth"])


def test_the_recipes_are_what_they_say() -> None:
    quick = expand(recipes.quick())
    assert len(quick) == 3 * 7 * 2
    assert {shape_of(config) for config in quick} == {"32x2", "64x3", "96x4"}
    assert {config.optim.lr for config in quick} == {1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0}
    assert arms_of(recipes.quick()) == ["none", "qk_norm"]
    small = recipes.small()
    assert len(expand(small)) == 4 * len(small.lrs) * 4 * 3
    assert arms_of(small) == ["none", "qk_norm", "qk_norm+optim.weight_decay=0", "qk_norm+z_loss"]
    for name in recipes.names():
        assert recipes.load(name).name == name


def test_expansion_is_deterministic_and_longest_first_within_a_seed() -> None:
    study = replace(recipes.quick(), seeds=(1, 0))
    configs = expand(study)
    assert [canonical_json(c) for c in configs] == [canonical_json(c) for c in expand(study)]
    assert [c.train.seed for c in configs] == [1] * 42 + [0] * 42
    seconds = [rough_seconds(c) for c in configs[:42]]
    assert seconds == sorted(seconds, reverse=True)


def test_equal_runs_are_listed_once() -> None:
    twice = replace(
        TINY, lrs=(1e-2, 0.01), seeds=(0, 0), arms=(Arm(), Arm.parse("none"), Arm.parse("optim.beta2=0.95"))
    )
    assert len(expand(twice)) == 1
    assert (twice.lrs, twice.seeds, twice.arms) == ((1e-2,), (0,), (Arm(),))
    assert replace(TINY, sizes=(*JOINT, *JOINT)).sizes == JOINT


def test_arms_that_mean_the_same_are_one_arm_in_the_order_given() -> None:
    texts = ("qk_norm", "none", "optim.weight_decay=1e-4", "qk_norm+optim.weight_decay=1e-4", "z_loss:weight=1e-4")
    study = replace(TINY, arms=tuple(map(Arm.parse, (*texts, "z_loss"))))
    assert [str(arm) for arm in study.arms] == ["qk_norm", "none", "z_loss:weight=0.0001"]
    # What is the same is decided by the base recipe.
    other = replace(TINY, base=override(TINY.base, ["optim.weight_decay=0"]), arms=tuple(map(Arm.parse, texts)))
    assert [str(arm) for arm in other.arms] == [
        "qk_norm",
        "none",
        "optim.weight_decay=0.0001",
        "qk_norm+optim.weight_decay=0.0001",
        "z_loss:weight=0.0001",
    ]


NAMES = st.from_regex(r"[A-Za-z_][a-z0-9_]{0,6}", fullmatch=True).filter(lambda name: name != "none")
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(".".join)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = SCALARS | st.sampled_from(["a+b.txt", "1e+3", "a,b", "text:path=a+b", "1", "true", " x"]) | st.lists(SCALARS)
SPECS = st.builds(Spec, NAMES | st.tuples(PATHS, NAMES).map(":".join), st.dictionaries(NAMES, VALUES, max_size=3))
ARMS = st.builds(
    lambda specs, overrides: Arm(
        interventions=tuple(sorted(specs, key=str)), overrides=tuple(sorted(overrides.items()))
    ),
    st.lists(SPECS, max_size=3),
    st.dictionaries(PATHS, VALUES, max_size=3),
)


@given(ARMS)
def test_an_arm_reads_what_it_writes(arm: Arm) -> None:
    assert Arm.parse(str(arm)) == arm


@pytest.mark.parametrize("text", ['data.source=text:path="a+b.txt"', 'data.source="text:path=a+b.txt"'])
def test_a_quoted_plus_is_part_of_a_value(text: str) -> None:
    arm = Arm.parse(f"qk_norm + {text} + optim.eps=1e+3")
    assert [spec.name for spec in arm.interventions] == ["qk_norm"]
    assert dict(arm.overrides)["optim.eps"] == 1000
    config = resolve(arm.apply(RunConfig()))
    assert config.data.source.options["path"] == "a+b.txt"
    named = Arm.parse(arm_name(config, resolve(RunConfig())))
    assert resolve(named.apply(RunConfig())) == config


@pytest.mark.parametrize("text", ["data.source=text:path=a+b.txt", "optim.beta2=0.9+optim.beta2=x"])
def test_an_arm_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"in double quotes|must set optim\.beta2 once"):
        Arm.parse(text)


@pytest.mark.parametrize("content", [[], "x", None, {"format": "2"}, {"format": None}, {"format": 99}, {"format": 1}])
def test_a_study_file_that_is_none_is_refused(content: object) -> None:
    with pytest.raises(RunFolderError, match=r"restore the file, or remove it|upgrade foreshock|written by an older"):
        check_study_format(content, "study.json")


def test_the_recipes_are_listed_by_name() -> None:
    assert recipes.names() == ["cures", "quick", "small"]
    with pytest.raises(ConfigError, match="did you mean 'quick'"):
        recipes.load("quik")


def test_an_option_at_its_default_is_the_same_arm() -> None:
    arms = (Arm.parse("z_loss"), Arm.parse("z_loss:weight=1e-4"), Arm.parse("z_loss:weight=1e-3"))
    assert arms_of(replace(TINY, arms=arms)) == ["z_loss", "z_loss:weight=0.001"]


def test_vary_multiplies_arms_and_the_base_value_is_the_base_arm() -> None:
    study = replace(TINY, arms=(Arm(), Arm.parse("qk_norm")))
    study = vary(study, ["optim.weight_decay=1e-4,0", "optim.beta2=0.95,0.99"])
    assert len(expand(study)) == 8
    assert arms_of(study) == sorted(
        [
            "none",
            "optim.beta2=0.99",
            "optim.beta2=0.99+optim.weight_decay=0",
            "optim.weight_decay=0",
            "qk_norm",
            "qk_norm+optim.beta2=0.99",
            "qk_norm+optim.beta2=0.99+optim.weight_decay=0",
            "qk_norm+optim.weight_decay=0",
        ]
    )


def test_varying_a_plug_in_keeps_its_commas() -> None:
    study = vary(TINY, ["model.norms.pre_attn=layer_norm,rms_norm", "optim.clip_norm=1,null"])
    assert len(arms_of(study)) == 4
    norms = {config.model.norms.pre_attn.name for config in expand(study) if config.model.norms.pre_attn}
    assert norms == {"layer_norm", "rms_norm"}
    assert {config.optim.clip_norm for config in expand(study)} == {1.0, None}


def test_set_changes_the_base_and_no_arms_name() -> None:
    study = replace(TINY, base=override(TINY.base, ["optim.beta2=0.99", "train.steps=7"]))
    assert arms_of(study) == ["none"]
    (config,) = expand(study)
    assert (config.optim.beta2, config.train.steps) == (0.99, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optim.beta3=1"], "optim.beta2"),
        (["optim.beta2"], "path.to.field=value"),
        (["=3"], "path.to.field=value"),
        (["optim.beta2="], "path.to.field=value"),
        (["optim.beta2=2"], "optim.beta2"),
        (["optim.lr=0.1"], "--lrs"),
        (["model.width=64"], "--sizes"),
        (["train.seed=1"], "--seeds"),
        (["schedule.warmup=1.5"], "warm-up"),
    ],
)
def test_bad_settings_name_field_and_fix(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(RunConfig(), settings)
    with pytest.raises(ConfigError, match=message):
        vary(TINY, settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lrs": ()}, "lrs"),
        ({"sizes": ()}, "sizes"),
        ({"arms": ()}, "arms"),
        ({"seeds": ()}, "seeds"),
        ({"lrs": (0.0,)}, "optim.lr"),
        ({"lrs": (float("nan"),)}, "optim.lr"),
        ({"seeds": (-1,)}, "train.seed"),
        ({"sizes": (Size(width=33, depth=2, heads=2),)}, "model.width"),
        ({"sizes": (Size(width=30, depth=2, heads=2),)}, "even head dimension"),
        ({"arms": (Arm.parse("qknorm"),)}, "qk_norm"),
        ({"arms": (Arm.parse("qk_norm+qk_norm"),)}, "once"),
        ({"arms": (Arm.parse("z_loss:wait=1"),)}, "weight"),
        ({"arms": (Arm.parse("optim.lr=1"),)}, "--lrs"),
        ({"arms": (Arm.parse("optim.weightdecay=1"),)}, "optim.weight_decay"),
    ],
)
def test_bad_grids_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(replace(TINY, **change))  # type: ignore[arg-type]


def test_a_vary_of_what_an_arm_sets_or_of_the_record_is_refused() -> None:
    with pytest.raises(ConfigError, match="one place"):
        vary(replace(TINY, arms=(Arm.parse("optim.beta2=0.9"),)), ["optim.beta2=0.99"])
    with pytest.raises(ConfigError, match="--set"):
        vary(TINY, ["record.log_every=1,2"])


def test_study_json_gives_the_arms_and_the_base_back() -> None:
    study = vary(replace(TINY, arms=(Arm(), Arm.parse("z_loss:weight=1e-3"))), ["optim.weight_decay=0,1e-4"])
    written = study_to_json(study, ["a", "b"])
    read = replace(study, base=from_json(RunConfig, written["base"]), arms=tuple(map(Arm.parse, written["arms"])))
    assert [bits_of(c) for c in expand(read)] == [bits_of(c) for c in expand(study)]
    assert tuple(map(Size.parse, written["sizes"])) == study.sizes
    assert written["run_ids"] == ["a", "b"]


def test_the_estimate_fills_slots_in_order_and_trusts_measurements() -> None:
    configs = expand(replace(TINY, lrs=(1e-3, 1e-2, 1e-1)))
    measured = measure((config, seconds) for config, seconds in zip(configs, (3.0, 10.0, 4.0), strict=True))
    assert measured == {shape_key(configs[0]): 4.0}
    assert estimate(configs, 2, measured).seconds == 8.0
    assert estimate(configs, 2, measured).measured
    assert not estimate(configs, 2, {}).measured
    assert "rough" in str(estimate(configs, 2, {}))
    assert estimate([], 2, {}).seconds == 0.0


@pytest.mark.parametrize(("size", "prototype"), [("32x2", 4.5), ("64x3", 12.0), ("128x4", 36.0)])
def test_the_rough_model_is_within_a_factor_of_two_of_the_prototype(size: str, prototype: float) -> None:
    study = replace(TINY, sizes=(Size.parse(size),), base=override(RunConfig(), ["train.steps=300"]))
    assert prototype / 2 < rough_seconds(expand(study)[0]) < prototype * 2


def test_durations_are_readable() -> None:
    assert [duration(s) for s in (0.2, 59.7, 3599.6)] == ["0 s", "1 min 0 s", "1 h 0 min"]
