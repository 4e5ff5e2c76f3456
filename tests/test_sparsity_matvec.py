"""A matvec that skips what is zero, against dense masking and fp64, and the handle that puts it into a model."""

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foreshock.core.config import Spec
from foreshock.core.errors import ConfigError, UserError
from foreshock.core.model_config import ModelConfig
from foreshock.probes.linears import linears_of
from foreshock.proxy.model import Proxy
from foreshock.sparsity import matvec
from foreshock.sparsity.matvec import decode, skip_zeros, sparse_matvec

TOKENS = torch.randint(29, (2, 6), generator=torch.Generator().manual_seed(1))
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 29,
    "pad_token_id": 0,
}


def hugging_face(name: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="pip install 'foreshock[hf]' to run it")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval()


def proxy() -> nn.Module:
    torch.manual_seed(0)
    return Proxy(ModelConfig(width=16, depth=2, heads=2, mlp=Spec("swiglu")), 29, 8).eval()


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "proxy": proxy,
    "Llama": lambda: hugging_face("Llama", **SIZES),
    "Gemma-2": lambda: hugging_face("Gemma2", **SIZES, head_dim=4),
    "GPT-2": lambda: hugging_face("GPT2", n_embd=16, n_layer=2, n_head=2, n_positions=8, vocab_size=29),
}


def outputs(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        given = model(tokens)
    return given if isinstance(given, Tensor) else given.logits


@contextmanager
def masked(model: nn.Module, share: float = 0.5) -> Iterator[None]:
    """The larger half of every token's inputs, the rest zero, by hooks before the linears."""

    def mask(_module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        x = inputs[0]
        least = x.abs().kthvalue(int(x.shape[-1] * (1 - share)) or 1, dim=-1, keepdim=True).values
        return (torch.where(x.abs() > least, x, 0.0),)

    handles = [linear.register_forward_pre_hook(mask) for linear in linears_of(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bound(x_N: Tensor, weight_NM: Tensor) -> Tensor:
    """How far a sum of rounded products in any order can be from the exact one: γ_{K+1} Σ|x w|, twice rounded."""
    sizes_M = x_N.double().abs() @ weight_NM.double().abs()
    K, low = len(x_N) + 1, torch.finfo(x_N.dtype).eps
    # Sums are in fp32 at least; partial sums and the result are rounded to the dtype itself.
    return sizes_M * (1.01 * K * max(2**-24, 2**-24 if low > 2**-24 else low) + 2 * low)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    N=st.integers(1, 70),
    M=st.integers(1, 40),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_it_is_dense_masking(seed: int, N: int, M: int, share: float, dtype: torch.dtype, index: torch.dtype) -> None:
    torch.manual_seed(seed)
    x_N, weight_NM = torch.randn(N).to(dtype), torch.randn(N, M).to(dtype)
    kept_K = torch.randperm(N)[: round(share * N)].to(index)
    mask_N = torch.zeros(N, dtype=torch.bool).index_fill(0, kept_K.long(), True)
    found = sparse_matvec(x_N, weight_NM, kept_K)
    assert found.dtype == dtype
    exact = torch.zeros(M, dtype=torch.float64)
    for j in kept_K.tolist():  # a naive sum, one column at a time
        exact += x_N[j].double() * weight_NM[j].double()
    limit = bound(x_N[mask_N], weight_NM[mask_N])
    assert ((found.double() - exact).abs() <= limit).all()
    dense = (x_N * mask_N) @ weight_NM
    assert ((found.double() - dense.double()).abs() <= 2 * limit).all()
    assert torch.equal(decode(x_N[None], weight_NM, mask_N), decode(x_N[None], weight_NM, mask_N.nonzero().view(-1)))


def test_nothing_kept_is_the_bias() -> None:
    weight_NM, bias_M, none = torch.randn(5, 3), torch.randn(3), torch.zeros(0, dtype=torch.long)
    assert torch.equal(sparse_matvec(torch.randn(5), weight_NM, none), torch.zeros(3))
    assert torch.equal(decode(torch.randn(1, 1, 5), weight_NM, none, bias_M), bias_M.view(1, 1, 3))
    assert torch.equal(decode(torch.randn(1, 5), weight_NM, torch.zeros(1, 5, dtype=torch.bool), bias_M), bias_M[None])


def test_what_is_left_out_is_not_read() -> None:
    weight_NM = torch.ones(4, 2)
    weight_NM[1] = torch.inf
    found = sparse_matvec(torch.tensor([1.0, 0.0, 2.0, 3.0]), weight_NM, torch.tensor([3, 0]))
    assert torch.equal(found, torch.tensor([4.0, 4.0]))


def test_what_is_not_finite_shows() -> None:
    found = decode(torch.tensor([[1.0, torch.nan]]), torch.ones(2, 2), torch.tensor([0, 1]))
    assert found.isnan().all()


@pytest.mark.parametrize(
    ("x", "weight", "kept", "message"),
    [
        (torch.ones(4), torch.ones(2, 4).T, torch.tensor([0]), "weight_NM must be a contiguous matrix"),
        (torch.ones(3), torch.ones(4, 2), torch.tensor([0]), "x_N must have 4 numbers"),
        (torch.ones(4).double(), torch.ones(4, 2), torch.tensor([0]), "x_N must be torch.float32"),
        (torch.ones(4), torch.ones(4, 2), torch.tensor([0.0]), "kept_K must be indices"),
    ],
)
def test_what_does_not_fit_is_refused(x: Tensor, weight: Tensor, kept: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sparse_matvec(x, weight, kept)


def test_several_tokens_and_short_masks_are_refused() -> None:
    with pytest.raises(ConfigError, match="x_1N must be one token"):
        decode(torch.ones(2, 4), torch.ones(4, 2), torch.tensor([0]))
    with pytest.raises(ConfigError, match="kept must have 4 numbers as a mask"):
        decode(torch.ones(1, 4), torch.ones(4, 2), torch.ones(3, dtype=torch.bool))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many inputs were kept, at each call of the gather."""
    seen: list[int] = []

    def counted(x_N: Tensor, weight_NM: Tensor, kept_K: Tensor) -> Tensor:
        seen.append(len(kept_K))
        return sparse_matvec(x_N, weight_NM, kept_K)

    monkeypatch.setattr(matvec, "sparse_matvec", counted)
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_a_masked_model_decodes_the_same(name: str, calls: list[int]) -> None:
    model = MODELS[name]().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    linears, one, dense = linears_of(model), TOKENS[:1, :1], outputs(model, TOKENS)
    with masked(model):
        expected = outputs(model, one), outputs(model, TOKENS)
        with skip_zeros(linears, smallest=0) as skipping:
            assert skipping.linears == tuple(linears)
            # Sums of at most 64 terms in fp64 through two blocks: some 10² · 2⁻⁵³ of the size.
            torch.testing.assert_close(outputs(model, one), expected[0], rtol=1e-6, atol=1e-6)
            assert len(calls) == len(linears)  # every linear, once
            torch.testing.assert_close(outputs(model, TOKENS), expected[1], rtol=1e-6, atol=1e-6)
            assert len(calls) == len(linears)  # no more: several tokens
        assert torch.equal(outputs(model, one), expected[0])
    assert torch.equal(outputs(model, TOKENS), dense)


@pytest.mark.parametrize("name", MODELS)
def test_it_comes_off_without_a_trace(name: str) -> None:
    model = MODELS[name]()
    before = {key: (id(p), p.detach().clone(), p.stride()) for key, p in model.named_parameters()}
    held = [(key, sorted(vars(module))) for key, module in model.named_modules()]
    expected = outputs(model, TOKENS), outputs(model, TOKENS[:1, :1])
    skipping = skip_zeros(linears_of(model), smallest=0)
    assert all(torch.equal(p, before[key][1]) and id(p) == before[key][0] for key, p in model.named_parameters())
    with pytest.raises(RuntimeError, match="mine"), skipping:
        raise RuntimeError("mine")
    skipping.remove()  # twice is once
    after = {key: (id(p), p, p.stride()) for key, p in model.named_parameters()}
    assert all(after[key][::2] == was[::2] and torch.equal(after[key][1], was[1]) for key, was in before.items())
    assert [(key, sorted(vars(module))) for key, module in model.named_modules()] == held
    assert torch.equal(outputs(model, TOKENS), expected[0])
    assert torch.equal(outputs(model, TOKENS[:1, :1]), expected[1])


def test_a_copy_skips_with_its_own_weights(calls: list[int]) -> None:
    linear = nn.Linear(6, 4)
    skip_zeros({"0": linear}, smallest=0)
    x = torch.tensor([[1.0, 0.0, 2.0, 0.0, 0.0, 3.0]])
    with torch.no_grad():
        for copied in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
            torch.testing.assert_close(copied(x), linear(x))
            copied.weight.zero_()
            assert torch.equal(copied(x), copied.bias[None])
    assert calls == [3] * 6


def test_dense_inputs_and_gradients_go_the_usual_way(calls: list[int]) -> None:
    linear = nn.Linear(8, 4)
    x = torch.randn(1, 8)
    x[:, :4] = 0.0
    expected = linear(x)
    with skip_zeros({"0": linear}, smallest=0):
        linear(x).sum().backward()
        torch.testing.assert_close(linear.get_parameter("weight").grad, x.expand(4, 8), rtol=0, atol=0)
        with torch.no_grad():
            linear(torch.randn(1, 8))  # nothing is zero
            linear(torch.cat([x, x]))  # two tokens
            with torch.autocast("cpu", torch.bfloat16):
                assert linear(x).dtype == torch.bfloat16
            assert calls == []
            torch.testing.assert_close(linear(x), expected)
            assert calls == [4]


def test_several_tokens_of_width_one_are_no_single_token(calls: list[int]) -> None:
    linear = nn.Linear(1, 4)
    with skip_zeros({"0": linear}, smallest=0), torch.no_grad():
        assert linear(torch.zeros(3, 1)).shape == (3, 4)
        assert calls == []


def test_tied_linears_are_laid_out_once_and_back() -> None:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    with skip_zeros({"one": one, "other": other}, smallest=0):
        assert other.weight is one.weight
        assert one.weight.T.is_contiguous()
        assert not one.weight.is_contiguous()
    assert one.weight.is_contiguous()


def test_a_failure_half_way_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = {"one": nn.Linear(4, 4), "other": nn.Linear(4, 4)}

    def fail(linear: nn.Module) -> None:
        if linear is linears["other"]:
            raise MemoryError

    monkeypatch.setattr(matvec, "_Forward", fail)
    with pytest.raises(MemoryError):
        skip_zeros(linears, smallest=0)
    assert all(linear.weight.is_contiguous() and "forward" not in vars(linear) for linear in linears.values())


class Own(nn.Linear):
    """A linear that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


def test_what_is_left_says_why() -> None:
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    skipping = skip_zeros(
        {"own": Own(4, 4), "norm": nn.LayerNorm(4), "computed": parametrized, "small": nn.Linear(4, 4)}
    )
    assert skipping.linears == ()
    assert skipping.left == {
        "own": "Own has a forward of its own",
        "norm": "LayerNorm is no linear",
        "computed": "its weight is parametrized",
        "small": "it has 16 weights, fewer than 2097152",
    }


def test_bad_input_is_refused() -> None:
    linear = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="linears must name at least one linear"):
        skip_zeros({})
    skip_zeros({"0": linear}, smallest=0)
    with pytest.raises(UserError, match="0 has a forward that was put in its place"):
        skip_zeros({"1": nn.Linear(4, 4), "0": linear}, smallest=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_is_dense_masking(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, or interpreted on the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="pip install triton to run it")
    from foreshock.sparsity._triton import matvec_of_zeros

    torch.manual_seed(0)
    for N, M, share in ((1, 1, 1.0), (15, 129, 0.5), (700, 300, 0.4), (257, 128, 0.0)):
        x_N, weight_NM = torch.randn(N).to(dtype), torch.randn(N, M).to(dtype)
        mask_N = torch.rand(N) < share
        weight_NM[~mask_N] = torch.inf  # not read
        x_N = torch.where(mask_N, x_N, 0.0).to(dtype)
        found = matvec_of_zeros(x_N.to(device), weight_NM.to(device)).cpu()
        exact = x_N[mask_N].double() @ weight_NM[mask_N].double()
        assert found.dtype == dtype
        assert ((found.double() - exact).abs() <= bound(x_N[mask_N], weight_NM[mask_N])).all()
    with pytest.raises(ConfigError, match="must be N numbers and a contiguous"):
        matvec_of_zeros(torch.ones(3), torch.ones(4, 2))
    with pytest.raises(ConfigError, match="must be bf16, fp16 or fp32"):
        matvec_of_zeros(torch.ones(4).double(), torch.ones(4, 2).double())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_linear_on_a_gpu_skips_zeros(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    linear = nn.Linear(512, 256).to("cuda", dtype)
    x = torch.randn(1, 512, device="cuda", dtype=dtype) * (torch.rand(1, 512, device="cuda") < 0.5)
    with torch.no_grad():
        expected = linear(x)
        with skip_zeros({"0": linear}, smallest=0):
            limit = bound(x[0].cpu(), linear.weight.detach().T.cpu()) + 0.01
            assert ((linear(x) - expected).abs().double().cpu() <= 2 * limit).all()


def test_without_triton_a_gpu_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "foreshock.sparsity._triton", raising=False)
    with pytest.raises(UserError, match="pip install triton"):
        import foreshock.sparsity._triton  # noqa: F401


def test_inputs_by_name_go_the_usual_way() -> None:
    linear, x = nn.Linear(8, 4), torch.eye(8)[:1]
    with torch.no_grad():
        y = linear(input=x)
        with skip_zeros({"linear": linear}, smallest=0):
            assert torch.allclose(linear(input=x), y)
