"""The monitor `curvature_estimators` against dense eigenvalues, and what a reading says of its eigenvector's turn.

Shapes: B batch, T tokens, N parameters.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from foreshock.core.contracts import Context, Observer, StepInfo
from foreshock.core.errors import ConfigError
from foreshock.monitors.curvature_estimators import ESTIMATORS, CurvatureEstimators
from foreshock.probes.curvature.preconditioner import read_preconditioner
from foreshock.probes.curvature.space import ParameterSpace
from foreshock.probes.curvature.tracker import CurvatureTracker
from tests.curvature_models import next_token, tiny, tokens


def moved(steps: int = 5) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = tiny().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step_on(model, optimizer, range(steps))
    return model, optimizer


def step_on(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        next_token(model, tokens(step)).backward()
        optimizer.step()


def read(observer: Observer, tokens_BT: Tensor) -> dict[str, float]:
    nothing = torch.zeros(())
    info = StepInfo(step=1, inputs_BT=tokens_BT[:, :-1], targets_BT=tokens_BT[:, 1:], logits_BTV=nothing, loss=nothing)
    return {name.removeprefix("curvature_estimators/"): float(value) for name, value in observer.read(info).items()}


def dense(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens_BT: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors (columns) of G, from a Hessian that is differentiated twice by torch."""
    space = ParameterSpace(model.parameters())
    root_N = read_preconditioner(optimizer, space).inverse_root_N
    names = [name for name, _ in model.named_parameters()]

    def loss(flat_N: Tensor) -> Tensor:
        weights = dict(zip(names, space.split(flat_N), strict=True))
        logits_BTV = torch.func.functional_call(model, weights, (tokens_BT[:, :-1],))
        return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())

    flat_N = space.flatten([parameter.detach() for parameter in space.parameters])
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        hessian_NN = torch.autograd.functional.hessian(loss, flat_N)
    assert isinstance(hessian_NN, Tensor)
    whitened_NN = root_N[:, None] * hessian_NN * root_N
    values, vectors = np.linalg.eigh(((whitened_NN + whitened_NN.T) / 2).numpy())
    return values, vectors


def test_errors_are_those_against_the_largest_eigenvalue() -> None:
    """The reference is the dense one to its tolerance, and every estimator is as far off as its row says."""
    model, optimizer = moved()
    batch_BT = tokens(9)[:2]
    context = Context(model=model, output_module=model, optimizer=optimizer, loss_fn=next_token)
    rows = read(CurvatureEstimators(sequences=2).attach(context), batch_BT)
    values, _ = dense(model, optimizer, batch_BT)
    # A residual of 0.1 % of λ bounds the error of the Rayleigh quotient by the same share.
    assert rows["reference"] == pytest.approx(values[-1], rel=1e-3)
    assert {name for name in rows if name.startswith("error/")} == {f"error/{name}" for name in ESTIMATORS}
    for name, (method, hvps, _) in ESTIMATORS.items():
        alone = CurvatureTracker(model, optimizer, next_token, method, hvps, tolerance=None).measure(batch_BT)
        assert rows[f"error/{name}"] == pytest.approx(alone.eigenvalue / rows["reference"] - 1, abs=1e-9)


def test_warm_estimators_settle_on_one_batch_and_cold_ones_begin_anew() -> None:
    """Read five times on the same batch, the warm start has had five times the products."""
    model, optimizer = moved()
    context = Context(model=model, output_module=model, optimizer=optimizer, loss_fn=next_token)
    observer = CurvatureEstimators(sequences=2).attach(context)
    rows = [read(observer, tokens(9)[:2]) for _ in range(5)]
    assert abs(rows[-1]["error/lanczos_3"]) < 0.1 * abs(rows[0]["error/lanczos_3"])
    assert len({row["error/cold_lanczos_9"] for row in rows}) == 5
    assert rows[-1]["turn"] < 0.05 < rows[0]["turn"]


def test_state_carries_every_estimator() -> None:
    model, optimizer = moved()
    context = Context(model=model, output_module=model, optimizer=optimizer, loss_fn=next_token)
    first, second = (CurvatureEstimators(sequences=2).attach(context) for _ in range(2))
    read(first, tokens(8))
    second.load_state_dict(first.state_dict())
    assert read(first, tokens(9)) == read(second, tokens(9))


def test_the_turn_is_the_angle_between_eigenvectors() -> None:
    """In the coordinates of the later reading, into which the first eigenvector is carried as a direction."""
    model, optimizer = moved()
    tracker = CurvatureTracker(model, optimizer, next_token, hvps=40)
    space = ParameterSpace(model.parameters())
    batch_BT = tokens(9)
    directions = []
    for steps in (range(0), range(5, 7)):
        step_on(model, optimizer, steps)
        turn = tracker.measure(batch_BT).turn
        root_N = read_preconditioner(optimizer, space).inverse_root_N.numpy()
        directions.append(root_N * dense(model, optimizer, batch_BT)[1][:, -1])
    seen = root_N != 0
    first, second = (direction[seen] / root_N[seen] for direction in directions)
    cosine = abs(first @ second) / (np.linalg.norm(first) * np.linalg.norm(second))
    assert turn == pytest.approx(math.acos(cosine), abs=1e-3)


def test_a_tracker_that_forgets_begins_at_random() -> None:
    model, optimizer = moved()
    tracker = CurvatureTracker(model, optimizer, next_token)
    tracker.measure(tokens(9))
    for _ in range(5):
        settled = tracker.measure(tokens(9)).turn
    assert settled < 0.05
    tracker.forget()
    assert tracker.measure(tokens(9)).turn > 0.5


@pytest.mark.parametrize("fixed", [False, True])
def test_the_sequences_are_those_of_the_step_unless_they_are_fixed(fixed: bool) -> None:
    model, optimizer = moved()
    context = Context(model=model, output_module=model, optimizer=optimizer, loss_fn=next_token)
    observer = CurvatureEstimators(sequences=2, fixed=fixed).attach(context)
    first, second = (read(observer, tokens(seed))["reference"] for seed in (8, 9))
    assert (first == pytest.approx(second, rel=1e-3)) is fixed


def test_bad_settings_and_contexts_are_refused() -> None:
    with pytest.raises(ConfigError, match="curvature_estimators:sequences"):
        CurvatureEstimators(sequences=0)
    model = tiny()
    with pytest.raises(ConfigError, match="loss_fn"):
        CurvatureEstimators().attach(Context(model=model, output_module=model))
