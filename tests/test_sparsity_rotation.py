"""The rotation behind norms keeps the function, makes deciding columns orthogonal, and comes off without a trace."""

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreshock.core.config import Spec
from foreshock.core.errors import ConfigError, UserError
from foreshock.core.model_config import ModelConfig, NormSlots
from foreshock.probes.contributions import column_norms, matrix_of
from foreshock.proxy.model import Proxy
from foreshock.sparsity.readers import readers_of
from foreshock.sparsity.rotation import BUFFER, rotate
from foreshock.sparsity.unchanged import check_unchanged

VOCAB, WIDTH = 29, 16
TOKENS = torch.randint(VOCAB, (3, 7), generator=torch.Generator().manual_seed(5))
FP32, FP64 = 1e-5, 1e-12


def stirred(model: nn.Module) -> nn.Module:
    """Gains, biases and weights that are nowhere 1 or 0, so that what is folded wrongly shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in dict.fromkeys(model.parameters()):
        around = 1.0 if parameter.ndim == 1 else 0.0
        spread = 0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        parameter.data = around + spread * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def proxy(norm: str, mlp: str = "gelu", **slots: Spec) -> nn.Module:
    spec = Spec.parse(norm)
    norms = NormSlots(pre_attn=spec, pre_mlp=spec, final=spec, **slots)
    return stirred(Proxy(ModelConfig(width=WIDTH, depth=2, heads=2, mlp=Spec.parse(mlp), norms=norms), VOCAB, 7))


def hugging_face(name: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="pip install 'foreshock[hf]' to run it")
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCAB, **settings)
    kind = {"Llama": "LlamaForCausalLM", "Gemma2": "Gemma2ForCausalLM", "GPT2": "GPT2LMHeadModel"}
    return stirred(getattr(transformers, kind.get(name, f"{name}ForCausalLM"))(config))


SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def with_torchs_norms(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(WIDTH, eps=1e-6)
            norm.weight = module.get_parameter("weight")
            model.set_submodule(name, norm)
    return model


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "proxy with LayerNorm": lambda: proxy("layer_norm"),
    "proxy with RMSNorm": lambda: proxy("rms_norm", "swiglu"),
    "Llama": lambda: hugging_face("Llama", **SIZES),
    "Llama, tied": lambda: hugging_face("Llama", **SIZES, tie_word_embeddings=True),
    "Llama with torch's norms": lambda: with_torchs_norms(MODELS["Llama"]()),
    "Gemma-2": lambda: hugging_face("Gemma2", **SIZES, head_dim=4),
    "GPT-2": lambda: hugging_face("GPT2", n_embd=WIDTH, n_layer=2, n_head=2, n_positions=8),
    "Phi-3": lambda: hugging_face("Phi3", **SIZES),
}


# Hugging Face's RMSNorms are taken in fp32 in a model of fp64 too: a rounding there hides what fp64 would show.
IN_FP64 = ("proxy with LayerNorm", "proxy with RMSNorm", "GPT-2", "Llama with torch's norms")


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        given = model(TOKENS)
    return given if isinstance(given, Tensor) else given.logits


def state(model: nn.Module) -> dict[str, tuple[int, Tensor, bool]]:
    """Every parameter: which object it is, its bits, and whether it is trained."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: (id(value), value.detach().clone(), value.requires_grad) for name, value in named}


def same(one: dict[str, tuple[int, Tensor, bool]], other: dict[str, tuple[int, Tensor, bool]]) -> bool:
    equal = all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2]
        for a, b in zip(one.values(), other.values(), strict=False)
    )
    return list(one) == list(other) and equal


def traces(model: nn.Module) -> list[Any]:
    """Attributes, hooks and buffers of all modules."""
    return [
        (name, sorted(vars(m)), list(m._buffers), sorted(m._non_persistent_buffers_set), len(m._forward_hooks),
         len(m._forward_pre_hooks), m.training)
        for name, m in model.named_modules()
    ]  # fmt: skip


def relative(new: Tensor, old: Tensor) -> float:
    return float((new.double() - old.double()).norm() / old.double().norm())


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in MODELS), *((name, torch.float64) for name in IN_FP64)]
)
def test_outputs_stay_and_come_back_to_the_bit(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]().to(dtype)
    before, parameters, found = outputs(model), state(model), traces(model)
    with rotate(model, TOKENS) as rotated:
        # A product with Q and rounded weights: about √D roundings of 2⁻²⁴ (2⁻⁵³) at each of eight places.
        assert 0 < relative(outputs(model), before) < (FP32 if dtype == torch.float32 else FP64)
        assert len(rotated.readers) == 4
        assert rotated.macs == 4 * WIDTH**2
    assert torch.equal(outputs(model), before)
    assert same(state(model), parameters)
    assert traces(model) == found


@pytest.mark.parametrize(
    ("name", "rows"),
    [(name, None) for name in MODELS if name not in ("GPT-2", "Phi-3")]
    + [("GPT-2", {"attn.c_attn": slice(16, 32)}), ("Phi-3", {"qkv_proj": slice(16, 24), "gate_up_proj": slice(24)})],
)
def test_the_columns_that_decide_are_orthogonal(name: str, rows: dict[str, slice] | None) -> None:
    model = MODELS[name]().double()

    def off_diagonal(path: str) -> float:
        own = next((cut for end, cut in (rows or {}).items() if path.endswith(end)), slice(None))
        W = matrix_of(model.get_submodule(path))[own]
        gram = W.T @ W
        return float((gram - gram.diag().diag()).norm() / gram.norm())

    with rotate(model, TOKENS) as rotated:
        turned = {path: off_diagonal(path) for path in rotated.deciding.values()}
    assert len(turned) == 4
    assert max(turned.values()) < 1e-13  # some D roundings of 2⁻⁵³
    assert min(off_diagonal(path) for path in turned) > 0.1
    expected = {"k", "k_proj", "c_attn", "qkv_proj", "gate", "fc1", "gate_proj", "c_fc", "gate_up_proj"}
    assert {path.rpartition(".")[2] for path in turned} <= expected


def test_the_keys_decide_before_queries_and_the_gate_before_up() -> None:
    rotated = rotate(MODELS["Llama"](), TOKENS)
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert rotated.deciding["model.layers.0.input_layernorm"] == f"{attention}.k_proj"
    assert rotated.deciding["model.layers.0.post_attention_layernorm"] == f"{mlp}.gate_proj"
    assert rotated.readers["model.layers.0.input_layernorm"] == tuple(f"{attention}.{own}_proj" for own in "qkv")
    assert rotated.readers["model.layers.0.post_attention_layernorm"] == (f"{mlp}.gate_proj", f"{mlp}.up_proj")


def test_shared_keys_leave_columns_that_are_exactly_zero() -> None:
    model = MODELS["Llama"]()
    with rotate(model, TOKENS) as rotated:
        for norm, linear in rotated.deciding.items():
            norms = column_norms(model.get_submodule(linear))
            # Keys: 2 heads of 4 are 8 rows, of 16 inputs; gates have more rows than inputs.
            assert rotated.zero_columns[norm] == int((norms == 0).sum()) == (8 if linear.endswith("k_proj") else 0)
            assert (norms[:-1] >= norms[1:]).all()  # in the order of the singular values
        # So half of the inputs make all of the keys.
        norm, keys = "model.layers.0.input_layernorm", model.get_submodule("model.layers.0.self_attn.k_proj")
        x_D = torch.randn(WIDTH)
        assert torch.equal(keys(x_D), keys(torch.where(column_norms(keys) > 0, x_D, 0.0)))
        assert norm in rotated.zero_columns


def test_a_rank_that_is_missing_shows_as_zero_columns() -> None:
    linear = nn.Linear(6, 12)
    model = nn.Sequential(nn.LayerNorm(6), linear).double()
    with torch.no_grad():
        linear.weight[:, 4:] = linear.weight[:, :2] @ torch.randn(2, 2).double()
    assert rotate(model, torch.randn(3, 6).double()).zero_columns == {"0": 2}


def test_linears_see_what_the_paper_shows_them() -> None:
    """The residual stream rotated by Q, behind an RMSNorm of gain 1: the input of the linears is the same."""
    torch.manual_seed(0)
    norm, linear = nn.RMSNorm(8, eps=1e-6).double(), nn.Linear(8, 12).double()
    model = nn.Sequential(norm, linear)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = torch.randn(5, 8).double()
    seen: list[Tensor] = []
    rotate(model, x)
    linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(x)
    paper = nn.functional.rms_norm(x @ norm.get_buffer(BUFFER), (8,), eps=1e-6)
    torch.testing.assert_close(seen[0], paper, rtol=0, atol=1e-13)  # orthogonal Q: RMS is kept to rounding


def test_no_mean_is_subtracted() -> None:
    """Far from zero, an RMSNorm of centred inputs is another function; the rotated one is the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 8))
    x = torch.randn(9, WIDTH) + 3.0
    before = model(x).detach()
    centred = model(x - x.mean(-1, keepdim=True)).detach()
    with rotate(model, x):
        assert relative(model(x).detach(), before) < FP32
    assert relative(centred, before) > 0.3


def test_a_bias_of_the_norm_moves_into_linears_without_one() -> None:
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(6), nn.Linear(6, 4, bias=False)
    model = nn.Sequential(norm, linear)
    nn.init.normal_(norm.bias)
    x = torch.randn(5, 6)
    before, expected = model(x).detach(), linear(norm.bias).detach()
    with rotate(model, x):
        assert not norm.get_parameter("bias").any()
        assert (norm.get_parameter("weight") == 1).all()
        torch.testing.assert_close(linear.get_parameter("bias").detach(), expected)
        assert relative(model(x).detach(), before) < FP32
    assert linear._parameters["bias"] is None
    assert torch.equal(model(x), before)


def test_one_plus_weight_becomes_one() -> None:
    model = MODELS["Gemma-2"]()
    with rotate(model, TOKENS) as rotated:
        norms = [model.get_submodule(name) for name in rotated.readers]
        assert not any(norm.get_parameter("weight").any() for norm in norms)


def test_norms_without_parameters_are_rotated_too() -> None:
    model = nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 4)).double()
    x = torch.randn(5, 6).double()
    before = model(x).detach()
    with rotate(model, x):
        assert relative(model(x).detach(), before) < FP64
    assert torch.equal(model(x), before)


def test_bf16_is_rounded_once() -> None:
    model = MODELS["Llama"]().bfloat16()
    before = outputs(model)
    with rotate(model, TOKENS):
        assert relative(outputs(model), before) < 0.05  # some √8 · 2⁻⁸ · √8
    assert torch.equal(outputs(model), before)


def test_what_is_no_candidate_is_left_alone_and_says_why() -> None:
    gemma = MODELS["Gemma-2"]()
    left = rotate(gemma, TOKENS).left
    assert set(left) == {
        "model.norm",
        *(f"model.layers.{i}.{name}_layernorm" for i in (0, 1) for name in ("post_attention", "post_feedforward")),
    }
    assert "no linear reads its output" in left["model.layers.0.post_attention_layernorm"]
    llama = rotate(MODELS["Llama, tied"](), TOKENS)
    assert list(llama.left) == ["model.norm"]
    with_heads = rotate(proxy("rms_norm", q=Spec("rms_norm"), k=Spec("rms_norm")), TOKENS)
    assert "no linear reads" in with_heads.left["blocks.0.attn.k_norm"]
    assert with_heads.left["final_norm"] == "its output is read by head, which is in no block"


def test_tied_embeddings_are_not_touched() -> None:
    model = MODELS["Llama, tied"]()
    embedding = model.get_parameter("model.embed_tokens.weight")
    bits = embedding.detach().clone()
    with rotate(model, TOKENS):
        assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight") is embedding
        assert torch.equal(embedding, bits)


def test_only_the_norms_that_are_asked_for() -> None:
    model = MODELS["Llama"]()
    with rotate(model, TOKENS, norms="*.input_layernorm") as rotated:
        assert list(rotated.readers) == ["model.layers.0.input_layernorm", "model.layers.1.input_layernorm"]
        assert list(rotated.left) == ["model.norm"]


def test_any_linear_can_decide() -> None:
    model = MODELS["Llama"]().double()
    norm, linear = "model.layers.0.input_layernorm", "model.layers.0.self_attn.v_proj"
    with rotate(model, TOKENS, deciding={norm: linear}) as rotated:
        assert rotated.deciding[norm] == linear
        W = matrix_of(model.get_submodule(linear))
        gram = W.T @ W
        assert (gram - gram.diag().diag()).norm() < 1e-13 * gram.norm()


def test_copies_and_pickles_stay_rotated() -> None:
    model = MODELS["proxy with RMSNorm"]()
    rotated = rotate(model, TOKENS)
    turned = outputs(model)
    assert torch.equal(outputs(copy.deepcopy(model)), turned)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model))), turned)
    rotated.remove()
    rotated.remove()  # twice is once


def test_state_that_is_saved_has_the_same_names() -> None:
    model = MODELS["proxy with LayerNorm"]()
    names = list(model.state_dict())
    with rotate(model, TOKENS):
        added = set(model.state_dict()) - set(names)
        # A norm's bias goes into linears that have none; Q is not saved.
        assert all(name.endswith(".bias") for name in added)


def test_training_mode_and_generators_stay() -> None:
    model = hugging_face("GPT2", n_embd=WIDTH, n_layer=1, n_head=2, n_positions=8).train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    rotate(model, TOKENS)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_moved_comes_back_in_its_new_dtype() -> None:
    model = MODELS["proxy with RMSNorm"]()
    expected = copy.deepcopy(model).double()
    rotated = rotate(model, TOKENS)
    model.double()
    rotated.remove()
    assert torch.equal(outputs(model), outputs(expected))


class Twice(nn.Module):
    """A norm read by a linear and by something else, or a linear with two inputs."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm, self.linear, self.how = nn.LayerNorm(6), nn.Linear(6, 6), how

    def forward(self, x: Tensor) -> Tensor:
        n: Tensor = self.norm(x)
        y: Tensor
        if self.how == "residual":
            y = n + self.linear(n)
        elif self.how == "shared":
            y = self.linear(n) + self.linear(x)
        elif self.how == "reshaped":
            y = self.linear(n.view(-1, 6))
        else:  # in place, which no function that makes a tensor shows
            y = self.linear(n.add_(2.0))
        return y


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("residual", "norm: its output is read by add too"),
        ("reshaped", "norm: no linear reads its output; view does"),
        ("shared", "linear reads its output and gets other inputs too"),
    ],
)
def test_readers_that_do_not_allow_it(how: str, message: str) -> None:
    torch.manual_seed(0)
    model = Twice(how)
    parameters, found = state(model), traces(model)
    for norms in (None, "norm"):
        with pytest.raises(
            UserError, match=message.replace("norm: ", "norm.*: ") if norms is None else "norm cannot be"
        ):
            rotate(model, torch.randn(3, 6), norms=norms)
    assert same(state(model), parameters)
    assert traces(model) == found


def test_what_was_not_seen_is_undone() -> None:
    torch.manual_seed(0)
    model = Twice("in place")
    parameters, found = state(model), traces(model)
    with pytest.raises(UserError, match="changed the model's outputs"):
        rotate(model, torch.randn(3, 6))
    assert same(state(model), parameters)
    assert traces(model) == found


def test_a_failure_in_the_last_run_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["proxy with LayerNorm"]()
    parameters, found = state(model), traces(model)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("foreshock.sparsity.rotation.check_unchanged", fail)
    with pytest.raises(KeyboardInterrupt):
        rotate(model, TOKENS)
    assert same(state(model), parameters)
    assert traces(model) == found


def test_an_exception_inside_the_context_removes_it() -> None:
    model = MODELS["proxy with LayerNorm"]()
    before, parameters, found = outputs(model), state(model), traces(model)
    with pytest.raises(RuntimeError, match="mine"), rotate(model, TOKENS):
        raise RuntimeError("mine")
    assert torch.equal(outputs(model), before)
    assert same(state(model), parameters)
    assert traces(model) == found


def quantised() -> nn.Module:
    class Int8(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.to(x.dtype).T

    linear = Int8(6, 4)
    linear.weight = nn.Parameter(torch.ones(4, 6, dtype=torch.int8), requires_grad=False)
    return nn.Sequential(nn.LayerNorm(6), linear)


def parametrized() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)))


class Pair(nn.Module):
    """Two linears behind a norm whose names tell nothing."""

    def __init__(self, one: str, other: str, outputs: int = 6) -> None:
        super().__init__()
        self.norm, self.names = nn.LayerNorm(6), (one, other)
        for name in self.names:
            self.add_module(name, nn.Linear(6, outputs))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        first, second = (self.get_submodule(name)(n) for name in self.names)
        both: Tensor = first * second
        return both


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (quantised(), "0 cannot be rotated: 1 reads it, and the weight of a Int8 of torch.int8"),
        (parametrized(), "the weight of 1 is parametrized"),
        (Pair("a", "b"), r"\(a, b\) do not tell which decides; name one: deciding=\{'norm': 'a'\}"),
        (Pair("c_attn", "b"), "6 inputs and 6 outputs is no fused q, k, v"),
        (nn.Sequential(nn.Linear(6, 6)), "no norm was seen running"),
        (nn.Sequential(nn.LayerNorm((3, 6)), nn.Linear(6, 6)), "several dimensions"),
    ],
)
def test_it_says_when_it_cannot(model: nn.Module, message: str) -> None:
    parameters, found = state(model), traces(model)
    with pytest.raises(UserError, match=message):
        rotate(model, torch.ones(3, 6) + torch.arange(6))
    assert same(state(model), parameters)
    assert traces(model) == found


def test_bad_names_are_refused() -> None:
    model, norm = MODELS["Llama"](), "model.layers.0.input_layernorm"
    with pytest.raises(ConfigError, match=r"unknown norm '\*.input_layernrm'; did you mean"):
        rotate(model, TOKENS, norms="*.input_layernrm")
    with pytest.raises(ConfigError, match="unknown linear behind"):
        rotate(model, TOKENS, deciding={norm: "model.layers.0.self_attn.o_proj"})
    with pytest.raises(ConfigError, match="unknown norm in deciding"):
        rotate(model, TOKENS, deciding={"model.norm": "lm_head"})
    with pytest.raises(UserError, match=r"model\.norm cannot be rotated"):
        rotate(model, TOKENS, norms="model.norm")


def test_a_rotation_on_a_rotation_is_refused() -> None:
    model = MODELS["proxy with RMSNorm"]()
    first = rotate(model, TOKENS)
    with pytest.raises(UserError, match="it is rotated already"):
        rotate(model, TOKENS)
    first.remove()
    rotate(model, TOKENS)


def test_weights_replaced_meanwhile_are_not_thrown_away() -> None:
    model = MODELS["proxy with RMSNorm"]()
    rotated = rotate(model, TOKENS)
    keys = model.get_submodule("blocks.0.attn.k")
    held, keys.weight = keys.weight, nn.Parameter(torch.zeros(WIDTH, WIDTH))
    turned = state(model)
    with pytest.raises(UserError, match="the weight of a Linear was replaced"):
        rotated.remove()
    assert same(state(model), turned)
    keys.weight = held
    rotated.remove()


def test_readers_tell_shapes_from_uses() -> None:
    """To ask for a shape, or to cast to the dtype there is, uses nothing."""

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            n = self.norm(x)
            assert n.shape[-1] == n.size(-1) == 6
            y: Tensor = self.linear(n.to(torch.float32))
            return y

    readers = readers_of(Asks(), torch.randn(2, 6))["norm"]
    assert (readers.linears, readers.other, readers.mixed) == (("linear",), None, ())


def test_the_check_takes_rounding_and_nothing_more() -> None:
    old = torch.ones(100)
    check_unchanged(
        {"a": old, "tokens": torch.arange(3)}, {"a": old + 3e-4, "tokens": torch.arange(3)}
    )  # √2⁻²³ = 3.5e-4
    for new in (old + 4e-4, old * torch.nan):
        with pytest.raises(UserError, match="changed the model's outputs"):
            check_unchanged((old,), (new,))
