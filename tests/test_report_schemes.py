"""Charts of what schemes do to a trained model: planted rows stand where they belong."""

from typing import Any

import polars as pl
import pytest

from foreshock.analysis.metrics import METRICS_SCHEMA
from foreshock.report.charts.schemes import LEAST, loss_vs_work, turned_vs_cost

RUNS = pl.DataFrame({"run_id": ["a", "b"], "size": ["8×1 (768)"] * 2, "params": [768, 768]})


def logged(group: str, values: dict[str, tuple[float, float]]) -> pl.LazyFrame:
    """Rows of two runs by `quantity/module`; an earlier step says something else."""
    rows = [
        {"run_id": run, "step": step, "group": group, "quantity": key.split("/")[0], "module": key.split("/")[1]}
        | {"head": None, "value": pair[i] if step else 99.0}
        for key, pair in values.items()
        for i, run in enumerate(RUNS["run_id"])
        for step in (0, 9)
    ]
    return pl.DataFrame(rows, schema=METRICS_SCHEMA).lazy()


def points(spec: Any) -> list[dict[str, Any]]:
    return [row for rows in spec["datasets"].values() for row in rows]


def test_masks_stand_at_their_work_and_the_loss_that_they_add() -> None:
    metrics = logged(
        "sparsify",
        {
            "loss/dense": (1.0, 2.0),
            "loss/teal_50": (1.1, 2.3),
            "macs/teal_50": (0.5, 0.5),
            "loss/wina_rotated_25": (1.0, 1.9),
            "macs/wina_rotated_25": (0.9, 0.9),
            "loss/wina_mlp_25": (1.5, 2.5),
            "macs/wina_mlp_25": (0.9, 0.9),
        },
    )
    spec = loss_vs_work(RUNS, metrics)
    assert spec is not None
    teal, wina = sorted(points(spec), key=lambda point: str(point["method"]))
    assert (teal["method"], teal["added"], teal["share"], teal["work"]) == ("teal", "nothing", 50, 50)
    assert teal["value"] == pytest.approx(0.2)
    assert (wina["method"], wina["added"], wina["work"]) == ("wina", "rotated", 90)
    assert wina["value"] == LEAST  # it lowers the loss, by 0.05
    assert [panel["title"] for panel in spec["concat"]] == ["8×1 (768)"]


def test_steering_stands_at_its_cost_and_its_reach() -> None:
    metrics = logged(
        "steer",
        {
            "loss_target/none": (0.2, 0.4),
            "turned/none": (0.1, 0.1),
            "loss_target/lineas_mlp_gamma_0.1": (0.3, 0.5),
            "turned/lineas_mlp_gamma_0.1": (0.4, 0.6),
            "loss_target/mean_act_norms": (1.2, 1.4),
            "turned/mean_act_norms": (0.9, 0.7),
        },
    )
    spec = turned_vs_cost(RUNS, metrics)
    assert spec is not None
    first, second = points(spec)
    assert (first["scheme"], first["site"]) == ("lineas", "mlp")
    assert (first["cost"], first["value"]) == pytest.approx((0.1, 0.5))
    assert (second["scheme"], second["site"]) == ("mean_act", "norms")
    assert (second["cost"], second["value"]) == pytest.approx((1.0, 0.8))


def test_runs_of_other_tasks_have_no_such_charts() -> None:
    other = logged("loss", {"train/": (1.0, 1.0)})
    assert loss_vs_work(RUNS, other) is None
    assert turned_vs_cost(RUNS, other) is None
