"""The handle: what it counts, takes off and keeps; and its state dicts."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import nn

from foreshock.core.errors import ConfigError
from foreshock.sparsity import sparsify
from foreshock.testing import no_host_sync
from tests.masked_models import METHODS, hooks_of, mlp, x


@pytest.mark.parametrize(("prefill", "dense"), [("all", 0), (1.0, 0), (0.5, 5), (0.99, 1), (0, 10)])
@torch.no_grad()
def test_the_last_tokens_of_a_prefill_are_masked_and_single_ones_always(prefill: Any, dense: int) -> None:
    linear, given = nn.Linear(8, 3), x(2, 10, 8, dtype=torch.float32)
    full = linear(given)
    with sparsify(linear, "wina", 0.5) as everywhere:
        masked = linear(given)
    with sparsify(linear, "wina", 0.5, prefill=prefill) as handle:
        found = linear(given)
        assert torch.equal(found[:, :dense], full[:, :dense])
        assert torch.equal(found[:, dense:], masked[:, dense:])
        assert handle.measured()[""] == pytest.approx(everywhere.measured()[""] * (10 - dense) / 10)
        assert torch.allclose(linear(given[:, :1]), masked[:, :1], rtol=1e-6, atol=1e-6)
        assert torch.allclose(linear(given[0]), masked[0], rtol=1e-6, atol=1e-6)  # rows are samples


@torch.no_grad()
def test_measured_counts_zeros_since_attach_without_waiting_for_the_device() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2), nn.Linear(2, 2))
    given = x(9, 8).float()
    with sparsify(model, "wina", {"0": 0.25, "2": 0.125}) as handle:
        assert handle.measured() == {}
        with no_host_sync():
            hidden = model[:2](given)
            model[2](hidden)
        kept = hidden * (hidden * model[2].weight.norm(dim=0) >= 0)
        zeros = float((kept == 0).float().mean())
        assert handle.measured() == {"0": 0.25, "2": pytest.approx(max(zeros, 0.125), abs=0.02)}
        assert zeros > 0.3  # ReLU's own zeros count, and are dropped before all others
        assert handle.sparsities == {"0": 0.25, "2": 0.125}


@pytest.mark.parametrize("method", METHODS)
def test_gradients_flow_through_what_is_kept(method: str) -> None:
    linear, given = nn.Linear(10, 10, dtype=torch.float64), x(3, 10).requires_grad_()
    with sparsify(linear, method, 0.5):
        assert torch.autograd.gradcheck(linear, (given,))  # the mask is constant around almost every point
        linear(given).sum().backward()
    assert linear.weight.grad is not None
    assert given.grad is not None
    dropped = (given.grad == 0).sum(-1)
    assert dropped.tolist() == ([5, 5, 5] if "r_sparse" not in method else [0, 0, 0])


def test_training_under_masks_changes_what_is_kept_and_nothing_is_left_in_the_graph() -> None:
    model = mlp(torch.float32).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = x(16, 10, dtype=torch.float32)
    with sparsify(model, "wina", 0.5, given):
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(given).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_bf16_and_autocast_work(method: str) -> None:
    model, given = mlp(torch.bfloat16), x(4, 10, dtype=torch.bfloat16)
    with torch.inference_mode(), sparsify(model, method, 0.5, given) as handle:
        assert model(given).dtype == torch.bfloat16
        assert all(0 < error < 1 for error in handle.error(given).values())
    full = mlp(torch.float32)
    with sparsify(full, method, 0.5), torch.autocast("cpu", dtype=torch.bfloat16):
        assert full(given.float()).dtype == torch.bfloat16


def test_copies_made_under_masks_are_dense() -> None:
    model, given = mlp(), x(4, 10)
    dense = model(given)
    with sparsify(model, "wina", 0.5):
        other = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        assert not torch.equal(model(given), dense)
    buffer.seek(0)
    assert torch.equal(other(given), dense)
    assert torch.equal(torch.load(buffer, weights_only=False)(given), dense)


@pytest.mark.parametrize("method", METHODS)
def test_removal_is_exact_and_comes_after_exceptions_too(method: str) -> None:
    model, given = mlp(), x(4, 10)
    before, dense, names = hooks_of(model), model(given), [set(vars(m)) for m in model.modules()]
    handle = sparsify(model, method, 0.5, given)
    masked = model(given)
    assert not torch.equal(masked, dense)
    handle.remove()
    handle.remove()
    assert torch.equal(model(given), dense)
    with pytest.raises(RuntimeError), sparsify(model, method, 0.5):
        model(x(4, 11))
    assert torch.equal(model(given), dense)
    assert hooks_of(model) == before
    assert [set(vars(m)) for m in model.modules()] == names
    handle.attach()
    assert torch.equal(model(given), masked)
    handle.remove()


@torch.no_grad()
def test_what_is_not_finite_still_shows() -> None:
    linear = nn.Linear(6, 3)
    with sparsify(linear, "wina", 0.5):
        for wrong in (math.nan, math.inf):
            given = torch.ones(2, 6)
            given[0, 5] = wrong
            assert not linear(given)[0].isfinite().any()
            assert linear(given)[1].isfinite().all()


# ---- state dicts ----


@pytest.mark.parametrize("method", [*METHODS, "wina"])
@pytest.mark.parametrize("gate", ["topk", "threshold"])
@torch.no_grad()
def test_state_dicts_round_trip_through_a_file_of_plain_tensors_and_numbers(method: str, gate: Any) -> None:
    model, given = mlp(), x(2, 6, 10)
    with sparsify(model, method, {"0": 0.25, "2": 0.5}, x(40, 10, seed=1), gate=gate, prefill=0.5) as handle:
        found, state = model(given), handle.state_dict()
        torch.save(state, buffer := io.BytesIO())
        buffer.seek(0)
        read = torch.load(buffer, weights_only=True)
        thresholds = handle.thresholds
        assert bool(thresholds) == (gate == "threshold")
    with sparsify(mlp(), method, 0.9) as other:
        other.load_state_dict(read)
        assert torch.equal(other.model(given), found)
        assert other.thresholds == thresholds
        assert other.sparsities == {"0": 0.25, "2": 0.5}
        assert other.gate == gate
        again = other.state_dict()
    assert str(again) == str(state)


def broken(**changes: Any) -> dict[str, Any]:
    with sparsify(mlp(), "r_sparse:alpha=0.6", 0.5, x(9, 10)) as handle:
        return handle.state_dict() | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "wina", "options": {}}, "must be of r_sparse"),
        ({"options": {"alpha": 0.5}}, "must be of r_sparse"),
        ({"gate": "treshold"}, "did you mean 'threshold'"),
        ({"prefill": 2.0}, "share in"),
        ({"sparsities": {"0": 0.5}}, "it lacks"),
        ({"sparsities": {"0": 0.5, "2": 0.5, "1": 0.5}}, "unknown linear '1'"),
        ({"sparsities": {"0": 1.5, "2": 0.5}}, "must be a number in"),
        ({"thresholds": {"0": 0.5}}, "must be those of the masked linears"),
        ({"thresholds": {"0": 0.5, "2": math.nan}}, "must be a number"),
        ({"gate": "topk"}, "gate=topk"),
        ({"factors": {}}, "must be of shapes"),
    ],
)
def test_states_that_do_not_fit_change_nothing(changes: dict[str, Any], words: str) -> None:
    model, given = mlp(), x(4, 10)
    with sparsify(model, "r_sparse:alpha=0.6", 0.25) as handle:
        before = model(given)
        with pytest.raises(ConfigError, match=words):
            handle.load_state_dict(broken(**changes))
        with pytest.raises(ConfigError, match="must hold 'gate'"):
            handle.load_state_dict({"method": "wina", "options": {}})
        assert torch.equal(model(given), before)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_afterwards_the_model_computes_the_same() -> None:
    model, given = mlp(), x(4, 10)
    with sparsify(model, "r_sparse:alpha=0.6", 0.5, given):
        masked = model(given)
        compiled: Any = torch.compile(model, backend="eager")
        for _ in range(3):
            assert torch.equal(compiled(given), masked)
    torch.compiler.reset()
