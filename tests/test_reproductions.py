"""Claims: what they take is what they need, and planted runs yield the verdict that was planted."""

import math
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock import reproductions
from foreshock.analysis.forecasters import quarter
from foreshock.analysis.forecasters.attention_logits import AttentionLogits
from foreshock.analysis.sensitivity import lr_sensitivity
from foreshock.core.arms import Arm, arm_name
from foreshock.core.errors import ConfigError
from foreshock.core.run_config import RunConfig, resolve
from foreshock.reproductions import _measures as m
from foreshock.reproductions import claims_of
from foreshock.reproductions._claim import Claim, Result, above, below, configs_at, judge, within
from foreshock.reproductions._evidence import Evidence
from foreshock.reproductions._scale import Scale, sizes_of
from foreshock.reproductions.small_scale_proxies.recipes import LRS
from foreshock.reproductions.small_scale_proxies.reference import LOSS_INIT, PUBLISHED
from foreshock.study.grid import Size

EVERY = [(paper, scale) for paper in reproductions.names() for scale in reproductions.load(paper).SCALES]
SIZES = sizes_of("32x2", "64x3")
LOSS_0, BIGRAM = 5.5, 2.4


@dataclass(frozen=True)
class Point:
    """The run for which a record is planted."""

    arm: str
    size: Size
    lr: float
    seed: int


@dataclass(frozen=True)
class Record:
    """What a run says."""

    loss: float = 2.0
    logit: float = 10.0
    logged: Callable[[str, float], float] = field(default=lambda key, step: 1.0)


def judged(claim: Claim, at: Scale, plant: Callable[[Point], Record], *, lacking: int = 0) -> Result:
    """The claim judged by planted runs of its own."""
    with planted_runs(claim, at, plant) as rows:
        return judge(claim, at, rows[lacking:], {})


@contextmanager
def planted_runs(claim: Claim, at: Scale, plant: Callable[[Point], Record]) -> Iterator[pl.DataFrame]:
    """The runs of a claim; quantities are logged at 1, 2, … 100 % of the steps, and where blocks join, by percent."""
    points = [Point(arm, size, lr, seed) for arm, size, lr in sorted(claim.number.runs, key=str) for seed in at.seeds]
    records = {str(point): plant(point) for point in points}
    rows = [_row(point, records[str(point)], at.base.train.steps) for point in points]

    def logged(self: Evidence, arm: str, size: Size, lr: float, key: str) -> pl.DataFrame:
        record, whole = records[str(Point(arm, size, lr, self.runs["seed"][0]))], at.base.train.steps
        percents = {-(-percent * whole // 100): float(percent) for percent in range(1, 101)}
        joining = {step + i: 100 * (step + i) / whole for step in getattr(at, "joins", ()) for i in range(4)}
        steps = dict(sorted((percents | joining).items()))
        values = [float(record.logged(key, percent)) for percent in steps.values()]
        return pl.DataFrame({"step": list(steps), "value": values})

    with mock.patch.object(Evidence, "logged", logged):
        yield pl.DataFrame(rows)


def _row(point: Point, record: Record, steps: int) -> dict[str, Any]:
    return {
        "run_id": str(point),
        "arm": point.arm,
        "interventions": point.arm,
        "width": point.size.width,
        "depth": point.size.depth,
        "heads": point.size.heads,
        "params": m.params_of(point.size),
        "lr": point.lr,
        "seed": point.seed,
        "status": "done",
        "early_stop": False,
        "nonfinite": not math.isfinite(record.loss),
        "train_rise": 0.0,
        "steps": steps,
        "loss_init": LOSS_0,
        "loss_final": record.loss,
        "loss_capped": min(record.loss, LOSS_0) if math.isfinite(record.loss) else LOSS_0,
        "bigram_loss": BIGRAM,
        "max_attention_logit": record.logit,
        "planned_lrs": None,
        "outcome": None,
        "below_best": None,
        "bigram_clause": None,
    }


# Every claim of every paper


@pytest.mark.parametrize(("paper", "scale"), EVERY)
def test_claims_are_well_formed(paper: str, scale: str) -> None:
    """Ids are unique; arms are written as tables name them; every run can be made; three seeds or more."""
    at, claims = claims_of(paper, scale)
    assert len({claim.id for claim in claims}) == len(claims) >= 20
    assert len(at.seeds) >= 3
    base = resolve(at.base)
    for claim in claims:
        assert claim.id.isidentifier()
        assert not claim.statement.endswith(".")
        assert claim.on_sensitivity is bool(re.search(r"\bS\b|^the same difference", claim.statistic))
    for arm in {arm for claim in claims for arm, _, _ in claim.number.runs}:
        assert arm_name(resolve(Arm.parse(arm).apply(at.base)), base) == arm
    configs = configs_at(claims[0].places(at), at)
    assert configs == list(map(resolve, configs))
    assert {(c.model.width, c.optim.lr, c.train.seed, arm_name(c, base)) for c in configs} == {
        (size.width, lr, seed, arm) for arm, size, lr in claims[0].number.runs for seed in at.seeds
    }


def lively(point: Point) -> Record:
    """Everything depends on everything a little, and every grid has an edge: no number is nan or there by chance."""
    u = zlib.crc32(f"{point.arm} {point.size} {point.lr} {point.seed}".encode()) / 2**32
    decades = math.log10(point.lr / 1e-2)
    return Record(
        loss=2.0 + 0.2 * decades**2 + 0.1 * u + (1.0 if point.lr > 0.05 else 0.0),
        logit=10 ** (1 + decades + u),
        # Peaks, and dips to below 1, so that there is something to detect.
        logged=lambda key, step: (
            (1 + u + _of(key) + step / 100 + 3 * (step % 17 == round(16 * _of(key)))) * (0.1 if step % 11 == 0 else 1)
        ),
    )


def _of(key: str) -> float:
    """A number in [0, 1] that is a key's own."""
    return zlib.crc32(key.encode()) / 2**32


@pytest.mark.parametrize(("paper", "scale"), EVERY)
def test_every_claim_finds_its_number_in_its_own_runs(paper: str, scale: str) -> None:
    """A number that looks for a block, a quantity or a run that it does not take would find nothing."""
    at, claims = claims_of(paper, scale)
    for claim in claims:
        result = judged(claim, at, lively)
        assert result.interval is not None, (claim.id, result.note)
        assert result.interval.low <= result.interval.mean <= result.interval.high
        assert (result.carried_by is None) is not claim.on_sensitivity


@pytest.mark.parametrize("paper", reproductions.names())
def test_every_curve_of_a_claim_counts(paper: str) -> None:
    """An arm at a size that the number does not depend on would waste runs, and withhold a verdict without need."""
    at, claims = claims_of(paper, "cpu")
    at = replace(at, seeds=at.seeds[:1])

    def value(claim: Claim, plant: Callable[[Point], Record]) -> float:
        with planted_runs(claim, at, plant) as runs:
            return claim.number.of(Evidence(runs=runs, found={}))

    for claim in claims:
        before = value(claim, lively)
        for place in {(arm, size) for arm, size, _ in claim.number.runs}:

            def moved(point: Point, place: tuple[str, Size] = place) -> Record:
                record = lively(point)
                if (point.arm, point.size) != place:
                    return record
                return Record(
                    loss=2.5 - 0.3 * math.log10(point.lr),
                    logit=3 * record.logit,
                    logged=lambda key, step: (
                        record.logged(key, step) * (1 - step * (1 + point.lr)) * (1 - step % 2 * 2)
                    ),
                )

            assert value(claim, moved) != before, (claim.id, place)


def test_unfinished_runs_leave_a_claim_not_run() -> None:
    at, claims = claims_of("small-scale-proxies", "cpu")
    result = judged(claims[0], at, lively, lacking=2)
    assert result.verdict == "not run"
    assert result.note == "2 of its runs have not finished"


# Each kind of number, planted


AT = Scale(base=RunConfig(), lrs=(1e-3, 1e-2, 1e-1))


def made(number: m.Number, *, on_s: bool = False) -> Claim:
    return Claim(
        id="made", source="", statement="", statistic="", number=number, margin=above(0.0), on_sensitivity=on_s
    )


def planted(shift: float, scatter: float) -> Callable[[Point], Record]:
    """qk_norm differs from none by `shift` in everything, give or take `scatter` between seeds; no run depends on N."""

    def plant(point: Point) -> Record:
        x = (shift + scatter * (point.seed - 1)) * (point.arm == "qk_norm")
        beyond = point.lr > 0.05
        return Record(
            loss=2.0 + (0.3 - 0.2 * x if beyond else 0.5 * (point.lr < 5e-3)) + (0.0 if beyond else 0.1 * x),
            logit=10 ** (1 + x),
            logged=lambda key, step: 10 ** (x * (1.0 if step > 90 else step / 100)),
        )

    return plant


BIG = SIZES[-1]
KINDS: dict[str, tuple[Callable[[str], m.Number], float]] = {
    "loss": (lambda arm: m.loss(arm, BIG, 1e-2), 0.1),
    "best loss": (lambda arm: AT.best_loss(arm, BIG), 0.1),
    "largest logit": (lambda arm: m.largest_logit(arm, BIG, 1e-2), 1.0),
    "late": (lambda arm: m.log10(m.late("norms/grad_norm", arm, BIG, 1e-2)), 1.0),
    "growth": (lambda arm: m.growth("norms/grad_norm", arm, BIG, 1e-2), 0.99),
    "sensitivity": (lambda arm: AT.sensitivity(arm, BIG), -0.3 / 3),
    "sensitivity over few": (lambda arm: m.sensitivity(arm, BIG, (1e-2, 1e-1)), -0.3 / 2),
    "mean": (lambda arm: m.mean_of([m.loss(arm, BIG, 1e-2), m.largest_logit(arm, BIG, 1e-2)]), 1.1 / 2),
    "largest": (lambda arm: m.largest_of([m.loss(arm, BIG, 1e-2), m.largest_logit(arm, BIG, 1e-2)]), 0.1),
    "smallest": (lambda arm: m.smallest_of([m.loss(arm, BIG, 1e-2), m.largest_logit(arm, BIG, 1e-2)]), 1.0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shift", "scatter", "verdict"),
    [(0.5, 0.01, "confirmed"), (-0.5, 0.01, "contradicted"), (0.05, 0.4, "inconclusive")],
)
def test_planted_runs_yield_the_planted_verdict(kind: str, shift: float, scatter: float, verdict: str) -> None:
    """Mean and t interval of three seeds: shift and 4.30 · scatter / √3, in the unit of the number."""
    of, unit = KINDS[kind]
    mirrored = {"confirmed": "contradicted", "contradicted": "confirmed"}
    result = judged(made(of("qk_norm") - of("none")), AT, planted(shift, scatter))
    assert result.verdict == (verdict if unit > 0 else mirrored.get(verdict, verdict))
    assert result.interval is not None
    assert result.interval.mean == pytest.approx(unit * shift, rel=1e-6)
    half = 4.302653 * abs(unit) * scatter / 3**0.5
    assert result.interval.high - result.interval.mean == pytest.approx(half, rel=1e-6)


@pytest.mark.parametrize(("power", "verdict"), [(1.5, "confirmed"), (-1.5, "contradicted")])
def test_slopes_are_per_decade_of_n(power: float, verdict: str) -> None:
    def plant(point: Point) -> Record:
        return Record(logit=m.params_of(point.size) ** (power + 0.01 * point.seed))

    sizes = sizes_of("32x2", "64x3", "96x4")
    result = judged(made(m.per_decade(lambda size: m.largest_logit("none", size, 1e-2), sizes)), AT, plant)
    assert result.verdict == verdict
    assert result.interval is not None
    assert result.interval.mean == pytest.approx(power + 0.01)


LADDER = sizes_of("32x2", "48x2", "64x2", "80x3", "96x3", "128x4")


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.2, "confirmed"), (1 / 1.2, "confirmed"), (9.0, "contradicted"), (1 / 9, "contradicted")]
)
def test_a_forecast_misses_by_what_the_largest_size_departs_from_the_law(factor: float, verdict: str) -> None:
    """Logits follow a power law of N, apart from those of the largest size at one of three learning rates."""

    def plant(point: Point) -> Record:
        departs = factor if point.size == LADDER[-1] and point.lr == 1e-2 else 1.0
        value = departs * (1 + 0.001 * point.seed) * m.params_of(point.size) ** (0.5 + point.lr)
        return Record(logged=lambda key, step: value)

    number = m.forecast_miss(
        AttentionLogits(),
        lambda size, lr: m.at_step("a/b", "none", size, lr, quarter(AT.base.train.steps)),
        LADDER,
        (1e-3, 1e-2, 1e-1),
    )
    result = judged(replace(made(number), margin=below(math.log10(3))), AT, plant)
    assert result.verdict == verdict
    assert result.interval is not None
    assert result.interval.mean == pytest.approx(abs(math.log10(factor)), rel=1e-6)


def test_a_step_that_a_run_did_not_reach_tells_nothing() -> None:
    result = judged(made(m.at_step("a/b", "none", BIG, 1e-2, AT.base.train.steps + 1)), AT, lively)
    assert result.note == "the runs do not tell the number in seed 0, 1, 2"


WIDE = replace(AT, lrs=(1e-3, 1e-2, 3e-2, 1e-1, 1.0))


def edges(point: Point) -> Record:
    """The best LR is 1e-2; without qk_norm 3e-2 is the last stable one, with it 1e-1."""
    bad = point.lr > (0.5 if point.arm == "qk_norm" else 0.05)
    return Record(loss={1e-3: 2.5, 1e-2: 2.0}.get(point.lr, 3.0 if bad else 2.01 + 0.001 * point.seed))


NEXT, STEP = math.log10(3e-2), math.log10(1e-1 / 3e-2)


@pytest.mark.parametrize(
    ("number", "expected", "off"),
    [
        (WIDE.best_lr("none", BIG), (NEXT - 3) / 2, (NEXT + 3) / 2),
        (abs(WIDE.best_lr("none", BIG)), (3 - NEXT) / 2, (NEXT + 3) / 2),
        (WIDE.stable_lr("none", BIG), NEXT + STEP / 2, STEP / 2),
        (WIDE.stable_lr("qk_norm", BIG), -0.5, 0.5),
        (WIDE.stable_lr("qk_norm", BIG) - WIDE.stable_lr("none", BIG), -0.5 - NEXT - STEP / 2, 0.5 + STEP / 2),
        (m.per_decade(lambda size: WIDE.stable_lr("none", size), SIZES), 0.0, STEP / math.log10(6)),
        (m.mean_of([WIDE.stable_lr("none", BIG), m.loss("none", BIG, 1e-2)]), 1 + (NEXT + STEP / 2) / 2, STEP / 4),
        (m.largest_of([WIDE.stable_lr("none", BIG), WIDE.stable_lr("qk_norm", BIG)]), -0.5, 0.5),
    ],
)
def test_learning_rates_are_known_to_what_the_grid_leaves_open(number: m.Number, expected: float, off: float) -> None:
    """With no scatter at all the interval is that; N of 32x2 and 64x3 differ sixfold."""
    result = judged(made(number), WIDE, edges)
    assert result.interval is not None
    assert result.interval.mean == pytest.approx(expected)
    assert result.interval.low == pytest.approx(expected - off)
    assert result.interval.high == pytest.approx(expected + off)


@pytest.mark.parametrize("lrs", [(1e-3, 1e-2, 3e-2), (1e-2, 3e-2, 1e-1)])
def test_a_learning_rate_at_the_end_of_the_grid_is_not_known(lrs: tuple[float, ...]) -> None:
    """The last stable LR is the highest tried, and the best one the lowest."""
    number = m.stable_lr("none", BIG, lrs) if lrs[-1] < 0.05 else m.best_lr("none", BIG, lrs)
    assert judged(made(number), WIDE, edges).note == "the runs do not tell the number in seed 0, 1, 2"


def test_a_number_that_the_runs_do_not_tell_is_inconclusive_and_says_where() -> None:
    """In seed 1 even the best run is unstable: there is no largest stable LR."""

    def plant(point: Point) -> Record:
        return Record(loss=math.nan if point.seed == 1 else 2.0 + abs(math.log10(point.lr) + 2))

    result = judged(made(AT.stable_lr("none", BIG)), AT, plant)
    assert result.verdict == "inconclusive"
    assert result.note == "the runs do not tell the number in seed 1"


def test_one_seed_has_no_interval() -> None:
    result = judged(made(m.loss("none", BIG, 1e-2)), replace(AT, seeds=(4,)), lively)
    assert (result.verdict, result.note) == ("inconclusive", "one seed: there is no interval")


@pytest.mark.parametrize(("low_lr", "carried"), [(True, "under-training"), (False, "instability")])
def test_the_part_that_carries_a_number_of_sensitivity_is_told(low_lr: bool, carried: str) -> None:
    """qk_norm takes away what the lowest LR costs, or what the highest does."""

    def plant(point: Point) -> Record:
        there = point.lr < 5e-3 if low_lr else point.lr > 5e-2
        cost = 0.9 if there and point.arm == "none" else 0.3
        return Record(loss=2.0 + cost * (point.lr != 1e-2) + 0.01 * point.seed * (point.lr != 1e-2))

    number = AT.sensitivity("none", BIG) - AT.sensitivity("qk_norm", BIG)
    for sign, claimed in ((1, number), (-1, AT.sensitivity("qk_norm", BIG) - AT.sensitivity("none", BIG))):
        result = judged(made(claimed, on_s=True), AT, plant)
        assert result.carried_by == carried
        assert result.undertraining is not None
        assert result.instability is not None
        assert result.interval is not None
        assert result.undertraining + result.instability == pytest.approx(result.interval.mean)
        assert result.interval.mean == pytest.approx(sign * 0.2)


def test_of_several_ranges_of_learning_rates_the_least_sensitive_counts_with_its_own_parts() -> None:
    """From 1e-3 to 1e-1 S is 0.9/3, all of it under-training; from 1e-2 to 1 it is 0.6/3, all of it instability."""

    def plant(point: Point) -> Record:
        return Record(loss={1e-3: 2.9, 1e-2: 2.0, 1e-1: 2.0, 1.0: 2.6}[point.lr] + 0.01 * point.seed)

    ranges = ((1e-3, 1e-2, 1e-1), (1e-2, 1e-1, 1.0))
    result = judged(made(m.least_sensitivity("none", BIG, ranges), on_s=True), AT, plant)
    assert result.interval is not None
    assert result.interval.mean == pytest.approx(0.2)
    assert (result.undertraining, result.instability) == (pytest.approx(0.0), pytest.approx(0.2))


# Margins


@given(low=st.floats(-2, 2), width=st.floats(0, 2), threshold=st.floats(0.01, 1))
def test_verdicts_of_margins(low: float, width: float, threshold: float) -> None:
    """`below` is `above` mirrored; a narrower interval never turns a decided claim round; within excludes above."""
    high = low + width
    mirrored = {"confirmed": "contradicted", "contradicted": "confirmed", "inconclusive": "inconclusive"}
    assert below(threshold).verdict(low, high) == mirrored[above(threshold).verdict(low, high)]
    middle = (low + high) / 2
    for margin in (above(threshold), below(threshold), within(threshold)):
        wide, narrow = margin.verdict(low, high), margin.verdict(middle, middle)
        assert wide in ("inconclusive", narrow)
    if within(threshold).verdict(low, high) == "confirmed":
        assert above(threshold).verdict(low, high) == "contradicted"


def test_rounding_decides_nothing() -> None:
    """0.1 + 0.2 - 0.3 is above 0 in floating point."""
    assert above(0.0).verdict(0.1 + 0.2 - 0.3, 1.0) == "inconclusive"


def test_no_effect_needs_a_margin() -> None:
    with pytest.raises(ConfigError, match="must be above 0"):
        within(0.0)


# Points of reference


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row.params} {row.arm}")
def test_published_sensitivities_follow_from_published_losses(row: Any) -> None:
    """To the last digit printed, in the convention in which they were published, and as the mean."""
    s = lr_sensitivity(LRS, row.losses, LOSS_INIT)
    total = math.fsum(row.losses) - len(LRS) * min(row.losses)
    assert s.lr_sensitivity_n_minus_1 == pytest.approx(total / 6)
    assert s == pytest.approx(total / 7)
    assert abs(s.lr_sensitivity_n_minus_1 - row.s_n_minus_1) <= 0.0005 + 1e-12


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("small-scale-proxy", "cpu", ()), "did you mean 'small-scale-proxies'"),
        (("small-scale-proxies", "gpus", ()), "did you mean 'gpu'"),
        (("small-scale-proxies", "cpu", ("qk_norm_ss",)), "did you mean 'qk_norm_s'"),
    ],
)
def test_unknown_names_offer_the_nearest(arguments: tuple[Any, ...], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        claims_of(*arguments)


def test_claims_asked_for_come_in_their_order_of_priority() -> None:
    _, every = claims_of("small-scale-proxies", "cpu")
    _, two = claims_of("small-scale-proxies", "cpu", (every[5].id, every[1].id))
    assert [claim.id for claim in two] == [every[1].id, every[5].id]
