"""Findings are computed: plant the opposite and they say the opposite."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from foreshock.analysis.findings import finding
from foreshock.analysis.tables import analyse
from foreshock.core.run_folder import RunFolder
from tests.fabricate import Planned, Planted, fabricate_study, plausible


def findings(path: Path, **options: object) -> list[str]:
    folder = path if (path / "study.json").exists() else fabricate_study(path, **{"steps": 40} | options)  # type: ignore[arg-type]
    return finding(analyse(folder))


def swapped(run: Planned) -> Planted:
    """The cure and the disease exchanged."""
    other = "none" if run.arm == "qk_norm" else "qk_norm"
    return plausible(Planned(**vars(run) | {"arm": other}))


def flat(run: Planned) -> Planted:
    return Planted(final=2.0 + 0.001 * run.lr)


def test_the_instability_and_its_cure(tmp_path: Path) -> None:
    found = findings(tmp_path / "s")
    assert found[0].startswith("The instability shows in `none` at 96×4 (442,368 block parameters)")
    assert "4 diverged" in found[0]
    assert "lowest learning rate that went wrong is 0.03" in found[0]
    assert "With `qk_norm` the instability part at 96×4" in found[1]
    assert "7.5 times smaller" in found[1]
    assert "one seed: there is no interval" in found[1]


def test_a_cure_that_does_harm_is_said_to(tmp_path: Path) -> None:
    text = "\n".join(findings(tmp_path / "s", plant=swapped))
    assert "7.5 times larger: no cure here" in text


def test_no_instability_is_said_to_be_none(tmp_path: Path) -> None:
    found = findings(tmp_path / "s", plant=flat)
    assert found[0].startswith("The instability did not show in `none`")
    assert "highest tried (1)" in found[0]
    assert any("at least 1 at 96×4" in text for text in found)
    assert not any("shows" in text for text in found)


def test_noise_gets_no_verdict(tmp_path: Path) -> None:
    """Every run is stable, and the parts differ six-fold."""

    def noisy(run: Planned) -> Planted:
        return Planted(final=2.0 + (0.003 if run.arm == "none" else 0.02) * (run.lr == 1.0))

    found = findings(tmp_path / "s", plant=noisy, sizes=[(32, 2), (64, 3)], lrs=[1e-2, 1e-1, 1.0], seeds=[0, 1])
    assert found[0].startswith("The instability did not show in `none`")
    nothing = (
        "With `qk_norm` no run from the best learning rate upward went wrong at 64×3 (147,456 block parameters), nor"
    )
    assert found[1].startswith(nothing)
    text = "\n".join(found)
    assert all(word not in text for word in ("times", "no cure", "nats instead of", "interval", "smallest to largest"))


def test_one_learning_rate_has_no_instability_part(tmp_path: Path) -> None:
    text = "\n".join(findings(tmp_path / "s", lrs=[1e-2], seeds=[0, 1]))
    assert "cannot be said from one learning rate" in text
    assert "nstability part" not in text
    assert "such intervals" not in text


def test_growth_is_said_only_with_an_interval(tmp_path: Path) -> None:
    text = "\n".join(findings(tmp_path / "s", sizes=[(32, 2), (64, 3)]))
    assert "Largest attention logit" in text
    assert "growing" not in text


def test_arms_of_which_the_same_is_said_share_a_sentence(tmp_path: Path) -> None:
    arms = ["none", *(f"optim.weight_decay={x}" for x in (0.0, 1e-3, 1e-2, 0.1, 0.2))]
    many, few = (findings(tmp_path / str(len(a)), arms=a, sizes=[(32, 2)], plant=flat) for a in (arms, arms[:2]))
    assert len(many) == len(few)
    assert sum("`optim.weight_decay=0.1` and `optim.weight_decay=0.2`" in text for text in many) == 3


def test_many_arms_are_ranked_by_what_the_seeds_say(tmp_path: Path) -> None:
    """Seven arms beside the base: four that help, one that does harm, one that is noise, one on which all is well."""
    parts = {"none": 1.0, "dyt": 0.4, "peri_ln": 0.1, "qk_norm": 0.3, "soft_cap": 0.2, "z_loss": 1.5, "zclip": 1.0}

    def plant(run: Planned) -> Planted:
        part = parts[run.arm] + 0.01 * run.seed
        if run.arm == "zclip":
            part += 0.3 * (run.seed - 0.5)
        return Planted(final=2.0 + (part if run.lr == 1.0 else 0.0) + (run.lr == 1e-3), max_logit=100 * parts[run.arm])

    arms = ["none", "soft_cap", "zclip", "dyt", "z_loss", "qk_norm", "peri_ln"]
    for more in ([], ["qk_clip"]):
        parts["qk_clip"] = 0.05
        text = "\n".join(
            findings(
                tmp_path / str(len(more)),
                arms=arms + more,
                sizes=[(64, 3)],
                lrs=[1e-3, 1e-2, 1.0],
                seeds=[0, 1, 2],
                plant=plant,
            )
        )
        ranked = "arms at 64×3 (147,456 block parameters): a smaller instability part than `none` (0.337 nats"
        assert (f"5 {ranked}" in text) is bool(more)
    assert "`qk_clip` 0.02, `peri_ln` 0.0367, `soft_cap` 0.07, `qk_norm` 0.103, `dyt` 0.137." in text
    assert "1 arm at 64×3 (147,456 block parameters): a larger instability part than `none`, no cure here" in text
    assert "the seeds do not tell from that of `none`" in text
    assert "paired over 3 seeds): `zclip` 0.387." in text
    ends = "100 in `none`; 5 in `qk_clip`; 10 in `peri_ln`; 20 in `soft_cap`; 100 in `zclip`; 150 in `z_loss`; in"
    assert f"{ends} 2 other arms between these" in text


@pytest.mark.parametrize(("best", "said"), [(2.15, True), (2.05, False)])
def test_a_cure_that_learns_less_is_said_to(tmp_path: Path, best: float, said: bool) -> None:
    """2.15 is more than 5 % above 2.0; the instability part alone would call the arm a cure."""

    def plant(run: Planned) -> Planted:
        floor, part = (best, 0.01) if run.arm == "qk_norm" else (2.0, 0.5)
        return Planted(final=floor + part * (run.lr == 1.0) + 0.3 * (run.lr == 1e-3))

    found = findings(tmp_path / "s", plant=plant, sizes=[(64, 3)], lrs=[1e-3, 1e-2, 1.0])
    text = "\n".join(found)
    sentence = (
        "The best loss is more than 5% above that of `none` at 64×3 (147,456 block parameters), 2: `qk_norm` 2.15."
    )
    assert (sentence in text) is said
    assert "times smaller" in text


def test_a_torn_record_is_said(tmp_path: Path) -> None:
    folder = fabricate_study(tmp_path / "s", steps=40, sizes=[(32, 2)])
    run = next((folder / "runs").iterdir())
    content = (run / "metrics.jsonl").read_bytes()
    assert not any("torn" in text for text in findings(folder))
    (run / "metrics.jsonl").write_bytes(content[:-20])
    assert any("The record of 1 finished run lacks its last logged steps" in text for text in findings(folder))


def test_studies_that_share_runs_lack_none(tmp_path: Path) -> None:
    grid = {"arms": ["none"], "sizes": [(32, 2)], "steps": 40}
    one = fabricate_study(tmp_path / "a", **grid, lrs=[1e-2, 1e-1])  # type: ignore[arg-type]
    other = fabricate_study(tmp_path / "b", **grid, lrs=[1e-1, 1.0])  # type: ignore[arg-type]
    text = "\n".join(finding(analyse([one, other])))
    assert "not started" not in text
    assert "lack learning rates" not in text


def test_several_seeds_give_intervals_and_their_number(tmp_path: Path) -> None:
    text = "\n".join(findings(tmp_path / "s", seeds=[0, 1, 2]))
    assert "Paired over 3 seeds the difference is" in text
    assert "which excludes zero" in text
    assert "6 such intervals were computed" in text


def test_an_interval_that_holds_zero_is_said_to(tmp_path: Path) -> None:
    def noisy(run: Planned) -> Planted:
        sign = 1 if (run.arm == "none") == (run.seed % 2 == 0) else -1
        return Planted(final=2.0 if run.lr < 0.05 else 2.6 + 0.3 * sign)

    text = "\n".join(findings(tmp_path / "s", sizes=[(32, 2)], seeds=[0, 1, 2, 3], plant=noisy))
    assert "which includes zero, so the seeds do not settle it" in text
    assert "times" not in text  # no verdict on what is not settled


def test_attention_logits_compare_at_one_point_and_name_the_critical_line(tmp_path: Path) -> None:
    text = next(t for t in findings(tmp_path / "s") if t.startswith("Largest attention logit"))
    assert "at 96×4 (442,368 block parameters) and learning rate 0.03: 7,840 in `none` (growing as N^0.50" in text
    assert text.endswith("saw every run diverge: no arm here.")
    far = next(t for t in findings(tmp_path / "f", lrs=[0.01, 1.0]) if t.startswith("Largest attention logit"))
    assert "learning rate 1: 2,140,000 in `none`" in far
    assert "63.4 in `qk_norm`" in far
    assert far.endswith("saw every run diverge: `none`.")


def test_nonfinite_attention_logits_are_counted(tmp_path: Path) -> None:
    def blown(run: Planned) -> Planted:
        return Planted(final=math.nan if run.lr > 0.5 else 2.0, max_logit=math.inf if run.lr > 0.5 else 20.0)

    text = "\n".join(findings(tmp_path / "s", arms=["none"], sizes=[(32, 2)], plant=blown))
    assert "In 1 of 7 runs an attention logit was not finite" in text
    assert "learning rate 0.3: 20 in `none`" in text


def test_output_logits_drift_or_not(tmp_path: Path) -> None:
    def drifting(run: Planned) -> Planted:
        return Planted(final=2.0, log_z=-300.0 if run.arm == "none" and run.lr == 1.0 else 6.0)

    text = "\n".join(findings(tmp_path / "s", sizes=[(32, 2)], plant=drifting))
    assert "Output logits drift in `none` (1 of 7 runs): log Z more than doubles" in text
    assert "The furthest is `none` at 32×2 (24,576 block parameters) and learning rate 1: log Z goes from" in text
    assert "to -300." in text
    assert "Output logits do not drift in `qk_norm`" in text


@pytest.mark.parametrize(("status", "word"), [("failed", "3 failed"), ("interrupted", "3 interrupted")])
def test_missing_runs_are_said(tmp_path: Path, status: str, word: str) -> None:
    def cut(run: Planned) -> Planted:
        planted = plausible(run)
        return Planted(**vars(planted) | {"status": status}) if run.lr == 1.0 and run.arm == "none" else planted

    text = "\n".join(findings(tmp_path / "s", plant=cut))
    assert f"3 of 42 runs are left out: {word}." in text
    assert "3 of 6 loss curves lack learning rates" in text


def test_runs_that_never_started_are_said(tmp_path: Path) -> None:
    folder = fabricate_study(tmp_path / "s", steps=40, sizes=[(32, 2)])
    gone = next((folder / "runs").iterdir())
    for path in sorted(gone.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    gone.rmdir()
    assert "1 of 14 planned runs has not started." in findings(folder)


def test_nothing_finished(tmp_path: Path) -> None:
    found = findings(tmp_path / "s", sizes=[(32, 2)], plant=lambda run: Planted(final=2.0, status="running", steps=10))
    assert found == ["No run has finished with a held-out loss yet (14 running): nothing can be concluded."]


def test_the_bigram_clause_that_is_off_is_said(tmp_path: Path) -> None:
    text = "\n".join(findings(tmp_path / "s", sizes=[(32, 2)], plant=lambda run: Planted(final=2.4)))
    assert "In 2 loss curves no run clearly beats the count bigram" in text


def test_other_data_is_said(tmp_path: Path) -> None:
    small = {"arms": ["none"], "sizes": [(32, 2)], "steps": 40}
    one = fabricate_study(tmp_path / "a", **small)  # type: ignore[arg-type]
    other = fabricate_study(tmp_path / "b", **small, data_hash="0123456789")  # type: ignore[arg-type]
    tables = analyse([one, other])
    text = "\n".join(finding(tables))
    assert "Not all runs saw the same tokens" in text


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"arms": ["none"], "sizes": [(32, 2)], "lrs": [1e-2]}, "One run (`none`, 32×2"),
        ({"arms": ["none"], "lrs": [1e-2]}, "Whether the instability shows in `none` at 96×4"),
        ({"arms": ["qk_norm"]}, "The instability shows in `qk_norm`"),
        ({"arms": ["qk_norm", "z_loss"], "sizes": [(64, 3)]}, "The instability shows in `qk_norm`"),
    ],
)
def test_any_shape_of_study(tmp_path: Path, options: dict[str, object], start: str) -> None:
    found = findings(tmp_path / "s", **options)
    assert found[0].startswith(start)
    assert all(text.endswith(".") and "nan" not in text and "None" not in text for text in found)


def test_a_run_without_monitors_still_has_findings(tmp_path: Path) -> None:
    folder = fabricate_study(tmp_path / "s", arms=["none"], sizes=[(32, 2)], lrs=[1e-2, 1e-1], steps=40)
    for run in (folder / "runs").iterdir():
        rows = RunFolder(run).metrics()
        (run / "metrics.jsonl").unlink()
        log = RunFolder(run)
        for row in rows:
            log.append_metrics({k: v for k, v in row.items() if k == "step" or k.startswith("loss/")})
        log.close()
    found = findings(folder)
    assert "Attention logits were not recorded." in found
    assert "Output logits were not recorded." in found


def test_every_number_moves_with_the_record(tmp_path: Path) -> None:
    """The same study with another planted strength has no sentence with a number in common."""

    def stronger(run: Planned) -> Planted:
        planted = plausible(run)
        return Planted(final=planted.final * 1.1, max_logit=planted.max_logit * 7, log_z=planted.log_z + 30)

    plants: list[Callable[[Planned], Planted]] = [plausible, stronger]
    one, other = (
        findings(tmp_path / plant.__name__, plant=plant, sizes=[(32, 2), (64, 3)], seeds=[0, 1, 2]) for plant in plants
    )
    same = set(one) & set(other)
    assert all("such intervals" in text or "stays stable in" in text for text in same)


# --- sentences that once were false


ONE = {"sizes": [(32, 2)], "steps": 20}
"""One size, and little to write."""


def finals(losses: dict[float, float], **more: object) -> Callable[[Planned], Planted]:
    """A plant of final losses by LR, and with a flat training curve: failures at the end only."""
    return lambda run: Planted(final=losses[run.lr], train=lambda step: 5.0, **more)  # type: ignore[arg-type]


def test_runs_far_above_their_initial_loss_are_no_stable_best(tmp_path: Path) -> None:
    losses = {10.0: 723.0, 30.0: 1.46e6, 100.0: 900.0}
    found = findings(tmp_path / "s", **ONE, arms=["none"], lrs=list(losses), plant=finals(losses))
    assert found[0] == (
        "Nothing was learned in `none` at 32×2 (24,576 block parameters): at the learning rates tried (10 to 100) no "
        "run ended below its loss at initialisation (5.7 nats). Try lower learning rates or more steps."
    )
    text = "\n".join(found)
    assert "none (even the best run is not stable) at 32×2" in text
    assert "best learning rate" not in text


def test_a_grid_whose_best_is_the_highest_does_not_reach_the_edge(tmp_path: Path) -> None:
    losses = {1e-2: 2.4, 1e-1: 2.0}
    found = findings(tmp_path / "s", **ONE, arms=["none"], lrs=list(losses), plant=finals(losses))
    assert "cannot be said: the best learning rate (0.1, loss 2) is the highest tried" in found[0]
    assert "did not show" not in found[0]


def test_the_run_that_moves_furthest_is_that_of_the_largest_distance(tmp_path: Path) -> None:
    ends = {1e-3: 5.6, 1e-2: 6.87, 1e-1: 0.022}
    found = findings(
        tmp_path / "s",
        **ONE,
        arms=["none"],
        lrs=list(ends),
        plant=lambda run: Planted(final=2.0 + run.lr, log_z=ends[run.lr]),
    )
    assert any(text.startswith("Output logits do not drift") and text.endswith("to 0.022.") for text in found)


def test_output_logits_that_turn_negative_drift(tmp_path: Path) -> None:
    found = findings(tmp_path / "s", **ONE, arms=["none"], plant=lambda run: Planted(final=2.0, log_z=-7.0))
    assert any(text.startswith("Output logits drift in `none` (7 of 7 runs)") for text in found)


def test_intervals_are_counted_only_where_one_is_given(tmp_path: Path) -> None:
    """Several seeds at the small size, one at the large one, which the sentence is about."""
    grid = {"steps": 20, "lrs": [1e-2, 1e-1, 1.0]}
    small = fabricate_study(tmp_path / "a", **grid, sizes=[(32, 2)], seeds=[0, 1, 2])  # type: ignore[arg-type]
    large = fabricate_study(tmp_path / "b", **grid, sizes=[(64, 3)])  # type: ignore[arg-type]
    text = "\n".join(finding(analyse([small, large])))
    assert "This is one seed: there is no interval" in text
    assert "such intervals" not in text


def test_nothing_is_called_negligible_that_has_a_number_elsewhere(tmp_path: Path) -> None:
    def plant(run: Planned) -> Planted:
        return Planted(final={1e-2: 2.0, 1e-1: 2.1, 1.0: 2.4 if run.arm == "z_loss" else 2.15}[run.lr])

    found = findings(tmp_path / "s", **ONE, arms=["none", "qk_norm", "z_loss"], lrs=[1e-2, 1e-1, 1.0], plant=plant)
    text = "\n".join(found)
    assert "With `qk_norm` no run from the best learning rate upward went wrong" in text
    assert (
        "With `z_loss` the instability part at 32×2 (24,576 block parameters) is 0.167 nats instead of 0.0833" in text
    )
    assert "negligible" not in text


def test_without_the_base_arm_it_is_said_that_nothing_is_compared(tmp_path: Path) -> None:
    grid = {**ONE, "lrs": [1e-2, 1e-1]}
    text = "\n".join(findings(tmp_path / "s", arms=["qk_norm", "z_loss"], **grid))
    assert "No run of the base recipe (`none`) has finished here, so that no arm is compared with it." in text


def test_an_arm_on_other_learning_rates_is_said_not_to_be_compared(tmp_path: Path) -> None:
    one = fabricate_study(tmp_path / "a", **ONE, arms=["none"], lrs=[1e-3, 1e-2, 1.0])  # type: ignore[arg-type]
    other = fabricate_study(tmp_path / "b", **ONE, arms=["qk_norm"], lrs=[1e-3, 1e-1, 1.0])  # type: ignore[arg-type]
    text = "\n".join(finding(analyse([one, other])))
    assert "`qk_norm` is not compared with `none`: no size, seed and learning rates are the same." in text
    assert "nats instead of" not in text
    assert "its charts leave out 1 of 2 curves, which has others than 0.001, 0.01, 1." in text


def test_sensitivities_over_other_learning_rates_are_not_averaged(tmp_path: Path) -> None:
    """Seeds 1 and 2 share a grid of two rates, seed 0 has a third: its part is another quantity."""
    losses = {1e-2: 2.0, 1e-1: 2.4, 1.0: 3.2}
    long = fabricate_study(tmp_path / "a", **ONE, arms=["none"], lrs=list(losses), plant=finals(losses))  # type: ignore[arg-type]
    short = fabricate_study(tmp_path / "b", **ONE, arms=["none"], lrs=[1e-2, 1e-1], seeds=[1, 2], plant=finals(losses))  # type: ignore[arg-type]
    text = "\n".join(finding(analyse([long, short])))
    assert "this costs 0.2 nats" in text  # (2.4 − 2.0) / 2 in both
    assert "its charts leave out 1 of 3 curves, which has others than 0.01, 0.1." in text


def test_one_of_something_is_singular(tmp_path: Path) -> None:
    text = "\n".join(findings(tmp_path / "s", **ONE, arms=["none"], plant=lambda run: Planted(final=2.4 + run.lr / 9)))
    assert "In 1 loss curve no run clearly beats" in text
