"""Spikes and surges that were planted are found, with the lead that was planted."""

import math

import numpy as np
import pytest

from foreshock.reproductions import claims_of, configs_at
from foreshock.reproductions.curvature.growth import _fresh, _joining, _warming
from foreshock.reproductions.curvature.recipes import Depths
from foreshock.reproductions.curvature.rivals import _steps_of_equal_flops
from foreshock.reproductions.curvature.spikes import PAST, WINDOW, seen, spikes

STEPS = 400


def noise(seed: int) -> np.ndarray:
    """A falling loss; no value is farther than 3 deviations from its neighbours."""
    uniform = np.random.default_rng(seed).uniform(-1, 1, STEPS)  # never beyond 2.7 deviations of its own kind
    return 4 - np.linspace(0, 0.2, STEPS) + 0.1 * uniform


@pytest.mark.parametrize("at", [[50], [50, 200, 399], [30, 30 + WINDOW]])
def test_planted_spikes_are_found_and_no_others(at: list[int]) -> None:
    loss = noise(0)
    loss[at] += 2
    assert spikes(loss).tolist() == at
    assert spikes(noise(1)).size == 0


def test_a_long_spike_is_one_and_a_loss_that_is_not_finite_is_a_spike() -> None:
    loss = noise(0)
    loss[100 : 100 + WINDOW] += 2
    loss[300:] = math.nan
    assert spikes(loss).tolist() == [100, 300]


def test_nothing_is_a_spike_before_there_is_a_past() -> None:
    loss = noise(0)
    loss[PAST - 1] += 2
    assert spikes(loss).size == 0


def test_a_surge_leads_its_spike_by_what_was_planted() -> None:
    loss, ratio = noise(0), np.full(STEPS, 0.5)
    spiked, lead = np.array([60, 150, 240]), 4
    loss[spiked] += 2
    for t in (*(spiked - lead), 330):  # the last surge has no spike
        ratio[t : t + 3] = 2.0
    found = seen(loss, ratio)
    assert found.leads_of_spikes.tolist() == [lead] * 3
    assert found.surged_at_spikes.all()
    assert found.announced_at_surges.tolist() == [True, True, True, False]
    assert found.largest_at_spikes.tolist() == [2.0] * 3
    # A surge of 3 steps is in the WINDOW before each of the 2 + WINDOW steps after its first; a spike in that after
    # each of the WINDOW steps before it. The last surge began 1 to WINDOW steps before WINDOW steps, as did the others.
    assert found.surged.sum() == 4 * (2 + WINDOW)
    assert found.announced.sum() == 3 * WINDOW
    assert found.leads.mean() == (1 + WINDOW) / 2


def test_a_curvature_that_rises_with_the_spike_itself_announces_nothing() -> None:
    """What a row logs of λ is after the step whose loss it has."""
    loss, ratio = noise(0), np.full(STEPS, 0.5)
    loss[[60, 150]] += 2
    ratio[[60, 150]] = 2.0
    found = seen(loss, ratio)
    assert not found.surged_at_spikes.any()
    assert not found.leads_of_spikes.size


def test_unrelated_surges_are_no_evidence() -> None:
    """Spikes and surges at random: over many seeds no number differs from chance."""
    gains, leads = [], []
    for seed in range(40):
        random = np.random.default_rng(seed)
        loss, ratio = noise(seed), np.where(random.random(STEPS) < 0.05, 2.0, 0.5)
        loss[random.choice(np.arange(PAST, STEPS), 8, replace=False)] += 2
        found = seen(loss, ratio)
        gains.append(found.surged_at_spikes.mean() - found.surged.mean())
        if found.leads_of_spikes.size:
            leads.append(found.leads_of_spikes.mean() - found.leads.mean())
    # Eight spikes a seed, each a chance of about 1/2: a mean over 40 seeds scatters by 0.5 / √320 = 0.03; and a lead,
    # of a standard deviation of at most half the window, by 5 / √160 for the four of a seed that have one.
    assert abs(np.mean(gains)) < 4 * 0.5 / math.sqrt(8 * 40)
    assert abs(np.mean(leads)) < 4 * 5 / math.sqrt(4 * 40)


def test_a_curvature_that_is_not_finite_is_past_the_edge() -> None:
    ratio = np.full(STEPS, 0.5)
    ratio[100:] = math.nan
    found = seen(noise(0), ratio)  # its first entry is of the second step
    assert not found.surged[:100].any()
    assert found.surged[100:].all()


def test_a_run_that_ended_at_once_tells_nothing_and_breaks_nothing() -> None:
    found = seen(np.array([4.0, math.nan]), np.array([1.0, math.nan]))
    assert not found.surged_at_spikes.size
    assert not spikes(np.array([4.0])).size


def test_what_blocks_do_when_they_join_is_told_from_what_a_fresh_second_moment_does() -> None:
    """Joining steps of eight blocks, half of them waiting, in 250 steps with a warm-up of 25."""
    at, _ = claims_of("curvature", "cpu")
    assert isinstance(at, Depths)
    assert at.joins == (26, 32, 38, 44)
    assert _fresh(at) == (26, 27, 28, 32, 33, 34, 38, 39, 40, 44, 45, 46)
    assert _joining(at) == (29, 30, 31, 35, 36, 37, 41, 42, 43, *range(47, 55))
    assert _warming(at) == range(6, 26)


def test_what_is_recorded_goes_by_size() -> None:
    at, claims = claims_of("curvature", "cpu")
    assert isinstance(at, Depths)
    for claim in claims:
        for config in configs_at(claim.places(at)[:2], at):
            names = {spec.name for spec in config.record.monitors}
            shape = (config.model.width, config.model.depth)
            small = shape in [(size.width, size.depth) for size in (at.estimated, at.probed)]
            assert ("curvature_estimators" in names) is small
            assert "curvature" in names or shape == (at.probed.width, at.probed.depth)


def test_equal_flops_are_those_of_the_blocks() -> None:
    """Half of eight blocks for 25 of the steps, then one more every six: counted by hand."""
    at, _ = claims_of("curvature", "cpu")
    assert isinstance(at, Depths)
    saved = 25 * 4 + 6 * (3 + 2 + 1)
    blocks = at.deep.depth * at.base.train.steps
    assert _steps_of_equal_flops(at) == round(at.base.train.steps * blocks / (blocks - saved))
