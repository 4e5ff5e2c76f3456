"""CurvatureTracker on what people train: Hugging Face models, compiled code, checkpoints, bf16.

Readings are compared with scipy's `eigsh` on exact products in fp64, P written out from the optimizer's state.

Shapes: B batch, T tokens, V vocabulary; N parameters.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from foreshock.core.errors import UserError
from foreshock.core.model_config import ModelConfig
from foreshock.probes.curvature.backends import BACKENDS
from foreshock.probes.curvature.backends.double_backward import double_backward
from foreshock.probes.curvature.losses import Losses
from foreshock.probes.curvature.reading import Reading
from foreshock.probes.curvature.space import ParameterSpace
from foreshock.probes.curvature.tracker import CurvatureTracker
from foreshock.proxy.model import Proxy
from foreshock.proxy.parametrization import initialise
from tests.curvature_models import VOCABULARY, next_token, tiny, tokens, under_autocast

LossFn = Callable[[nn.Module, Any], Tensor]
EXACT = ("double_backward", "forward_over_reverse")


def adamw(model: nn.Module, loss_fn: LossFn, steps: int = 4) -> torch.optim.AdamW:
    """Train a little."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        loss_fn(model, tokens(step)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def reference(model: nn.Module, optimizer: torch.optim.AdamW, loss_fn: LossFn, preconditioned: bool = True) -> float:
    """The top eigenvalue by `eigsh` to 1e-10, of a copy in fp64 that nothing wraps."""
    twin = copy.deepcopy(model).double()
    space = ParameterSpace(twin.parameters())
    states = [optimizer.state[parameter] for parameter in model.parameters()]
    roots = [((s["exp_avg_sq"].double() / (1 - 0.999 ** s["step"].double())).sqrt() + 1e-8) for s in states]
    root_N = torch.cat([root.flatten() for root in roots]).sqrt() if preconditioned else torch.ones(space.dim)
    root_N = root_N.double().where(torch.cat([root.flatten() for root in roots]) > 1e-8, torch.inf)
    with double_backward(Losses(twin, loss_fn, [tokens()]), space) as product:

        def apply(v_N: np.ndarray) -> np.ndarray:
            u_N = torch.from_numpy(v_N.reshape(-1)) / root_N
            return (product(u_N) / root_N).numpy()

        operator = LinearOperator((space.dim, space.dim), matvec=apply, dtype=np.float64)
        start_N = np.random.default_rng(0).standard_normal(space.dim)
        return float(eigsh(operator, k=1, which="LA", v0=start_N, tol=1e-10, return_eigenvectors=False)[0])


def holds(reading: Reading, truth: float, slack: float = 1e-9) -> bool:
    """Whether the interval holds the truth, up to a rounding of it."""
    return reading.low - slack * truth <= truth <= reading.high + slack * truth


def hugging_face(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=8, **sizes)
        return transformers.GPT2LMHeadModel(config).double().eval()
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, **sizes
    )
    return transformers.LlamaForCausalLM(config).double()


def of_logits(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """The loss in the model's own precision; the library's is in fp32."""
    return next_token(lambda ids: model(input_ids=ids).logits, ids_BT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("preconditioned", [True, False])
def test_hugging_face_models(kind: str, preconditioned: bool) -> None:
    """To 1e-4 with exact products, within the interval with all of them; tied and grouped weights as they come."""
    model = hugging_face(kind)
    optimizer = adamw(model, of_logits)
    truth = reference(model, optimizer, of_logits, preconditioned)
    for backend in (None, *BACKENDS):
        tracker = CurvatureTracker(
            model, optimizer, of_logits, hvps=30, preconditioned=preconditioned, tolerance=1e-3, backend=backend
        )
        reading = tracker.measure(tokens())
        assert holds(reading, truth), (backend, reading, truth)
        if backend is None or backend in EXACT:
            assert reading.eigenvalue == pytest.approx(truth, rel=1e-4)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_compiled_model_reads_as_it_does_uncompiled() -> None:
    """With products of its own and with the gradient of training, through the graphs that train."""
    torch._dynamo.reset()
    plain, model = tiny(), compiled(tiny())
    truth = reference(plain, adamw(plain, next_token), next_token)
    optimizer = adamw(model, next_token)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    tracker = CurvatureTracker(model, optimizer, next_token, hvps=25)
    assert holds(tracker.measure(tokens()), truth)
    next_token(model, tokens()).backward()
    assert holds(tracker.measure(tokens(), gradient=tracker.fresh_gradient()), truth)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_models_read_as_they_do_without(reentrant: bool) -> None:
    plain, model = tiny(), tiny(reentrant=reentrant)
    truth = reference(plain, adamw(plain, next_token), next_token)
    optimizer = adamw(model, next_token)
    for backend in ("central_differences", "one_sided_differences", *(() if reentrant else ("double_backward",))):
        reading = CurvatureTracker(model, optimizer, next_token, hvps=25, backend=backend).measure(tokens())
        assert holds(reading, truth), backend
        assert reading.eigenvalue == pytest.approx(truth, rel=5e-2)


def proxy(dtype: torch.dtype) -> nn.Module:
    """The project's own, without biases: keys' have no gradient, so that P is ε and differences are noise there."""
    model = Proxy(ModelConfig(width=32, depth=2, heads=2), VOCABULARY, 8)
    initialise(model, ModelConfig().roles, seed=0)
    return model.to(dtype)


def cross_entropy_in_fp32(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    logits_BTV = model(tokens_BT[:, :-1])
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), tokens_BT[:, 1:].flatten())


def autocast(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    return under_autocast(model, tokens_BT)


@pytest.mark.slow
@pytest.mark.parametrize("preconditioned", [True, False])
@pytest.mark.parametrize("kind", ["autocast", "parameters"])
def test_in_bf16_the_readings_of_all_back_ends_agree_within_their_intervals(kind: str, preconditioned: bool) -> None:
    """Any two intervals have a value in common; what rounding does to a product is in each."""
    model = proxy(torch.float32 if kind == "autocast" else torch.bfloat16)
    loss_fn = autocast if kind == "autocast" else cross_entropy_in_fp32
    optimizer = adamw(model, loss_fn)
    readings = {}
    for backend in BACKENDS:
        tracker = CurvatureTracker(model, optimizer, loss_fn, hvps=8, preconditioned=preconditioned, backend=backend)
        if (kind, backend) == ("autocast", "forward_over_reverse"):  # torch mixes the types there
            with pytest.raises(UserError, match="use central_differences"):
                tracker.measure(tokens())
        else:
            readings[backend] = tracker.measure(tokens())
    assert overlap(readings.values()), readings
    assert all(reading.eigenvalue > 0 for reading in readings.values())


def overlap(readings: Iterable[Reading]) -> bool:
    """Whether any two intervals meet, which for intervals on a line is that all of them do."""
    ends = [(reading.low, reading.high) for reading in readings]
    return max(low for low, _ in ends) <= min(high for _, high in ends)
