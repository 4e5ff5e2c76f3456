"""What Hessian-vector products get along with: checkpoints, compiled code, autocast, low precision, Hugging Face."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreshock.core.errors import UserError
from foreshock.probes.curvature._rounding import arithmetic
from foreshock.probes.curvature.backends import BACKENDS, choose_backend
from foreshock.probes.curvature.backends import finite_differences as differences
from foreshock.probes.curvature.backends.double_backward import double_backward
from foreshock.probes.curvature.backends.finite_differences import central_differences, one_sided_differences
from foreshock.probes.curvature.backends.forward_over_reverse import forward_over_reverse
from foreshock.probes.curvature.space import ParameterSpace
from tests.curvature_models import (
    dense_hessian,
    direction,
    next_token,
    problem,
    relative,
    tiny,
    tokens,
    under_autocast,
)

ROUNDING, DIFFERENCED = 1e-10, 2e-6
"""As in `test_curvature_products`."""
EXACT = ("double_backward", "forward_over_reverse")


@pytest.mark.parametrize("reentrant", [False, True])
def test_differences_go_through_activation_checkpoints(reentrant: bool) -> None:
    u_N = direction(problem(tiny())[1])
    for backend in (central_differences, one_sided_differences):
        found = []
        for option in (None, reentrant):
            with backend(*problem(tiny(dropout=0.3, reentrant=option))) as product:
                found.append(product(u_N))
        # The same kernels run in another order of recomputation.
        assert relative(found[1], found[0]) < DIFFERENCED


def test_what_exact_products_do_with_activation_checkpoints() -> None:
    u_N = direction(problem(tiny())[1])
    with double_backward(*problem(tiny())) as plain, double_backward(*problem(tiny(reentrant=False))) as saved:
        assert relative(saved(u_N), plain(u_N)) < ROUNDING
    with pytest.raises(UserError, match="central_differences"), double_backward(*problem(tiny(reentrant=True))):
        pass
    for reentrant in (True, False):
        losses, space = problem(tiny(reentrant=reentrant))
        with pytest.raises(UserError, match="central_differences"), forward_over_reverse(losses, space) as product:
            product(u_N)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_differences_go_through_compiled_models_without_compiling_again(whole: bool) -> None:
    torch._dynamo.reset()
    model, twin = tiny(torch.float32), tiny(torch.float32)
    if whole:
        model = torch.compile(model, backend="aot_eager")
    else:
        model.mlp.compile(backend="aot_eager")
    next_token(model, tokens()).backward()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    losses, space = problem(model)
    u_N = direction(space)
    with central_differences(losses, space) as product, central_differences(*problem(twin)) as reference:
        assert relative(product(u_N), reference(u_N)) < 1e-3  # rounding of gradients, over a step of 1e-3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
    for backend in (double_backward, forward_over_reverse):
        with pytest.raises(UserError, match="does not work on a model that torch"), backend(losses, space):
            pass
    assert choose_backend(model, space)[0] == "central_differences"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_forward_over_reverse_can_be_compiled() -> None:
    """Once: other batches of the same shape, and other contexts, use the same graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses, space = problem(tiny())
    u_N = direction(space)
    for batch in (tokens(0), tokens(1)):
        with forward_over_reverse(losses.on([batch]), space, compile=True) as product:
            found_N = product(u_N)
        assert relative(found_N, dense_hessian(losses.model, [batch]) @ u_N) < ROUNDING
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_attention_is_written_out_for_second_derivatives_alone() -> None:
    """What is refused without it works, and the caller's choice of kernels is as before."""
    model, space = tiny(), ParameterSpace(tiny().parameters())
    gradients = torch.autograd.grad(next_token(model, tokens()), tuple(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(gradients, tuple(model.parameters()), gradients)
    flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    with double_backward(*problem(model)) as product:
        assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == flags
        product(direction(space))
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == flags


class Cube(torch.autograd.Function):
    """x³ whose backward pass hides from autograd, as one made of kernels does, or does not."""

    hides = True

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * (x.detach() if Cube.hides else x) ** 2 * slope


@pytest.mark.parametrize("hides", [True, False])
def test_a_function_that_loses_second_derivatives_is_found(hides: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cube, "hides", hides)
    model = nn.ParameterDict({"x": nn.Parameter(torch.ones(3, dtype=torch.float64))})
    losses, space = problem(model, None, loss_fn=lambda m, _: Cube.apply(m["x"]).sum() + (m["x"] ** 2).sum())
    if hides:
        with pytest.raises(UserError, match="CubeBackward"), double_backward(losses, space):
            pass
    else:
        with double_backward(losses, space) as product:
            assert torch.equal(product(torch.ones(3, dtype=torch.float64)), torch.full((3,), 8.0, dtype=torch.float64))


def test_the_cache_of_autocast_hides_a_move_and_is_cleared() -> None:
    """Under an outer autocast; the naive difference sees nothing of the weights that autocast casts."""
    model = tiny(torch.float32)
    losses, space = problem(model)
    u_N = direction(space)
    with double_backward(*problem(tiny())) as product:
        exact_N = product(u_N.double()).float()
    with torch.autocast("cpu", torch.bfloat16):
        before = next_token(model, tokens())
        naive = []
        for sign in (1, -1):
            with space.movable() as place:
                place([p + 3e-2 * sign * part for p, part in zip(space.parameters, space.split(u_N), strict=True)])
                naive.append(space.flatten(torch.autograd.grad(next_token(model, tokens()), space.parameters)))
        with central_differences(losses, space) as product:
            ours_N = product(u_N)
        assert torch.equal(next_token(model, tokens()), before)
    assert relative((naive[0] - naive[1]) / 6e-2, exact_N) > 0.5
    assert relative(ours_N, exact_N) < 0.2


def half(kind: str) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A model whose weights lie on the grid of bf16, wide enough for steps to be short for each of them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(32, 48), nn.Linear(48, 192), nn.GELU(), nn.Linear(192, 32)).bfloat16()
    return (model, next_token) if kind == "parameters" else (model.float(), under_autocast)


@pytest.mark.parametrize("kind", ["parameters", "autocast"])
@pytest.mark.parametrize("backend", [central_differences, one_sided_differences])
def test_steps_that_round_away_in_half_precision(
    kind: str, backend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Rayleigh quotient along a top eigenvector, in a wide model; without noise much of it is lost."""
    batch = torch.randint(32, (8, 16), generator=torch.Generator().manual_seed(0))
    reference = problem(half("parameters")[0].float().double(), batch)
    u_N = direction(reference[1])
    with double_backward(*reference) as product:
        for _ in range(10):
            u_N = product(u_N) / product(u_N).norm()
        exact = float(u_N @ product(u_N))
    model, loss_fn = half(kind)
    losses, space = problem(model, batch, loss_fn=loss_fn)
    assert losses.facts(space).lowest == torch.bfloat16

    def quotient() -> float:
        with backend(losses, space, relative=3e-3) as product:
            return float(u_N @ product(u_N.float()).double())

    assert 0.7 * exact < quotient() < 1.3 * exact
    monkeypatch.setattr(differences, "dither", lambda *_: None)
    assert quotient() < 0.6 * exact
    gradient_N = losses.gradient(space)
    with pytest.raises(UserError, match="take a new base"), one_sided_differences(losses, space, base=gradient_N):
        pass


def test_the_least_precise_type_is_seen_inside_compiled_code() -> None:
    torch._dynamo.reset()
    model = tiny(torch.float32)
    compiled = torch.compile(lambda tokens_BT: under_autocast(model, tokens_BT), backend="aot_eager")
    for loss_fn, lowest in (
        (next_token, torch.float32),
        (under_autocast, torch.bfloat16),
        (lambda _, batch: compiled(batch), torch.bfloat16),
    ):
        losses, space = problem(model, loss_fn=loss_fn)
        assert losses.facts(space).lowest == lowest
    losses, space = problem(tiny())
    assert losses.facts(space).lowest == torch.float64


def test_tf32_counts_as_half_precision(request: pytest.FixtureRequest) -> None:
    on_cuda = [arithmetic(kind, torch.device("cuda")) for kind in (torch.float32, torch.float64, torch.bfloat16)]
    assert on_cuda == [torch.float32, torch.float64, torch.bfloat16]
    # Not by setattr of monkeypatch: the setting is no attribute that could be deleted.
    torch.backends.cuda.matmul.allow_tf32 = True
    request.addfinalizer(lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", False))
    on_cuda = [arithmetic(kind, torch.device("cuda")) for kind in (torch.float32, torch.float64, torch.bfloat16)]
    assert on_cuda == [torch.float16, torch.float64, torch.bfloat16]
    assert arithmetic(torch.float32, torch.device("cpu")) == torch.float32


def hugging_face(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=8, **sizes)
        return transformers.GPT2LMHeadModel(config).double().eval()
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, **sizes
    )
    return transformers.LlamaForCausalLM(config).double()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_hugging_face_models(kind: str) -> None:
    """All back ends agree on a model built from its config; the chosen one is exact.

    The library takes its loss in fp32, whatever the model is in, and every result has that precision.
    """
    model = hugging_face(kind)
    batch = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
    losses, space = problem(model, batch, loss_fn=lambda m, ids: m(input_ids=ids, labels=ids).loss)
    u_N = direction(space)
    with double_backward(losses, space) as product:
        exact_N = product(u_N)
    for name, backend in BACKENDS.items():
        with backend(losses, space) as product:
            assert relative(product(u_N), exact_N) < (1e-6 if name in EXACT else 1e-2), name
    assert losses.facts(space).lowest == torch.float32
    assert choose_backend(model, space)[0] == "double_backward"
    model.config._attn_implementation = "flash_attention_2"
    name, reason = choose_backend(model, space)
    assert name == "central_differences"
    assert "flash_attention_2" in reason
    model.config._attn_implementation = "sdpa"
    next(
        module for module in model.modules() if hasattr(module, "gradient_checkpointing")
    ).gradient_checkpointing = True
    assert choose_backend(model, space)[0] == "central_differences"


def test_the_choice_is_determined_and_gives_its_reason() -> None:
    model = tiny()
    space = ParameterSpace(model.parameters())
    assert choose_backend(model, space) == choose_backend(model, space)
    assert choose_backend(model, space)[0] in BACKENDS
    space.dim = 10**9
    name, reason = choose_backend(model, space)
    assert name == "central_differences"
    assert reason.startswith("with over 50,000,000 parameters the graph of a second derivative may not fit, so that")
    with pytest.raises(UserError, match="DistributedDataParallel"):
        choose_backend(nn.DataParallel(model), space)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing was run on a GPU")
def test_on_cuda_with_fused_attention_and_dropout() -> None:
    """Differences go through fused attention; products repeat, and the generator of the device is put back.

    Exact and differenced products agree to what one-sided steps of 1e-3 leave in fp32.
    """
    model = tiny(torch.float32, dropout=0.3).cuda()
    losses, space = problem(model, tokens().cuda())
    state = torch.cuda.get_rng_state()
    with double_backward(losses, space) as product:
        exact_N = product(direction(space))
    for backend in (central_differences, one_sided_differences):
        with backend(losses, space) as product:
            assert relative(product(direction(space)), exact_N) < 2e-2
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert choose_backend(model, space)[0] == "double_backward"
    assert choose_backend(model.bfloat16(), ParameterSpace(model.parameters()))[0] == "central_differences"
