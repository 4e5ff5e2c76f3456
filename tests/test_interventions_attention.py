"""Interventions on the attention of models that are not foreshock's, against the same written out in their code."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from foreshock import interventions
from foreshock.core import plugins
from foreshock.core.errors import ConfigError, UserError
from foreshock.core.model_config import ModelConfig, NormSlots
from foreshock.interventions._projections import SAME_SIZE
from foreshock.probes.attention import largest_logits, tap_attention
from foreshock.proxy.layers.norms._upcasting import UpcastingRMSNorm
from foreshock.proxy.model import Proxy
from tests import watched_models as nano
from tests.attention_reference import listened, spread

D, H, K, T = 32, 4, 8, 7
EPS = torch.finfo(torch.float32).eps
Score = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = F.scaled_dot_product_attention
    yield
    assert F.scaled_dot_product_attention is before


def capped(scores: Tensor) -> Tensor:
    return 0.3 * torch.tanh(scores / 0.3)


def sized(x: Tensor) -> Tensor:
    return math.sqrt(20.0) * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class Written(nano.Attention):
    """The attention of the nanoGPT with one of the interventions in its own code."""

    def __init__(self, width: int, heads: int, norm: str, score: Score) -> None:
        super().__init__(width, heads)
        kinds: dict[str, Callable[[], Any]] = {
            "layer_norm": lambda: nn.LayerNorm(width // heads, eps=1e-6, bias=False),
            "rms_norm": lambda: nn.RMSNorm(width // heads, eps=1e-6),
            "sized": lambda: sized,
            "": nn.Identity,
        }
        self.foreshock_q_norm, self.foreshock_k_norm = kinds[norm](), kinds[norm]()
        self.score = score

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (y.view(B, T, self.heads, -1).transpose(1, 2) for y in self.qkv(x_BTD).split(D, -1))
        q, k = self.foreshock_q_norm(q), self.foreshock_k_norm(k)
        scores = self.score(q @ k.mT / math.sqrt(q.shape[-1]))
        y = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


def plain(scores: Tensor) -> Tensor:
    return scores


CASES: dict[str, tuple[str, Score]] = {
    "soft_temp:beta=0.25": ("", lambda scores: scores / 4),
    "soft_cap:limit=0.3": ("", capped),
    "qk_norm": ("layer_norm", plain),
    "qk_norm:norm=rms_norm": ("rms_norm", plain),
    "attention_logit_scale:kappa=20": ("sized", plain),
    "qk_norm+soft_cap:limit=0.3": ("layer_norm", capped),
}


def written(norm: str, score: Score) -> nano.NanoGPT:
    model, _ = nano.built()
    for block in model.h:
        attention = Written(32, 2, norm, score)
        attention.load_state_dict({**attention.state_dict(), **block.attn.state_dict()})
        block.attn = attention
    return model


def large(model: nn.Module) -> nn.Module:
    """Queries and keys ten times as large, so that a change of attention is felt."""
    with torch.no_grad():
        for block in model.h:  # type: ignore[union-attr]
            block.attn.qkv.weight[: 2 * D] *= 10
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, applied: Any = None, steps: int = 3) -> None:
    for step in range(steps):
        loss = nano.loss_of(model, nano.batch_of(step))
        optimizer.zero_grad()
        (loss if applied is None else applied.loss(loss)).backward()
        optimizer.step()


@pytest.mark.parametrize("spec", CASES)
def test_training_is_that_of_the_model_that_has_it_in_its_code(spec: str) -> None:
    """SGD: three steps multiply a difference of rounding by little, where Adam divides it by itself."""
    model, theirs = large(nano.built()[0]), large(written(*CASES[spec]))
    before = state(model)
    untouched = model(nano.batch_of(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    applied = interventions.apply(model, spec, optimizer)
    assert {path for paths in applied.touched.values() for path in paths} >= {"h.0.attn", "h.1.attn"}
    assert not torch.allclose(model(nano.batch_of(0)), untouched, atol=1e-3)
    torch.testing.assert_close(model(nano.batch_of(0)), theirs(nano.batch_of(0)), atol=2e-5, rtol=2e-5)
    train(model, optimizer, applied)
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1))
    learned = state(model)
    assert learned.keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(learned[name], value, atol=1e-4, rtol=1e-4, msg=name)
    gains = [name for name in learned if "foreshock" in name]
    assert bool(gains) == ("qk_norm" in spec)
    assert all(not torch.equal(learned[name], torch.ones(16)) for name in gains)
    applied.remove()
    model.load_state_dict(before)
    assert list(model.state_dict()) == list(before)
    assert torch.equal(model(nano.batch_of(0)), untouched)
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.parameters())


def test_gains_are_saved_and_loaded_with_the_model() -> None:
    model, optimizer = nano.built()
    with interventions.apply(model, "qk_norm", optimizer) as applied:
        train(model, optimizer, applied)
        saved, logits = state(model), model(nano.batch_of(0))
    other, _ = nano.built(seed=1)
    with interventions.apply(other, "qk_norm") as applied:
        other.load_state_dict(saved)
        assert torch.equal(other(nano.batch_of(0)), logits)
        assert applied.touched == {"qk_norm": ("h.0.attn", "h.1.attn")}
        names = [name for name, _ in other.named_parameters() if "h.0.attn.foreshock" in name]
        assert names == ["h.0.attn.foreshock_q_norm.weight", "h.0.attn.foreshock_k_norm.weight"]


def test_a_copy_of_the_model_has_gains_of_its_own() -> None:
    model, _ = nano.built()
    with interventions.apply(large(model), "qk_norm"):
        before = model(nano.batch_of(0))
        copy = deepcopy(model)
        with torch.no_grad():
            for name, parameter in copy.named_parameters():
                if "foreshock" in name:
                    parameter.fill_(3.0)
        assert torch.equal(model(nano.batch_of(0)), before)
        assert not torch.allclose(copy(nano.batch_of(0)), before, atol=1e-3)


@pytest.mark.parametrize("spec", ["soft_temp:beta=1", "attention_logit_scale:kappa=null", "qk_clip:tau=null"])
def test_neutral_settings_change_nothing(spec: str) -> None:
    (model, optimizer), (other, others) = nano.built(), nano.built()
    applied = interventions.apply(model, spec, optimizer)
    assert applied.touched[spec.partition(":")[0]] == ()
    train(model, optimizer, applied)
    train(other, others)
    assert same(state(model), state(other))


def test_all_but_those_that_reach_any_model_are_as_before() -> None:
    from foreshock.core.contracts import Intervention

    reaching = set()
    for name in plugins.names("interventions"):
        cls = plugins.declaration("interventions", name)
        if cls.reaches_any_model:
            assert cls.edit_config is not Intervention.edit_config
            assert cls.edit_model is not Intervention.edit_model
            reaching.add(name)
    assert reaching == {"attention_logit_scale", "qk_norm", "soft_cap", "soft_temp"}


@pytest.mark.parametrize("spec", ["soft_temp", "soft_cap", "qk_norm", "attention_logit_scale"])
def test_foreshocks_own_model_is_left_to_its_config(spec: str) -> None:
    model = Proxy(ModelConfig(width=16, depth=1, heads=2), 11, T)
    with pytest.raises(UserError, match="is a setting that foreshock builds its proxy by"):
        interventions.apply(model, spec)
    norms = NormSlots()
    assert norms.q is None
    cure = plugins.load("interventions", plugins.resolve("interventions", interventions_spec(spec)))
    assert cure.edit_model(model) is None


def interventions_spec(text: str) -> Any:
    from foreshock.core.config import Spec

    return Spec.parse(text)


class Nameless(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.mix = nn.Linear(D, 3 * D)
        vars(self).update(attributes)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (H, K)).transpose(1, 2) for y in self.mix(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


class Normed(nano.Attention):
    def __init__(self) -> None:
        super().__init__(D, H)
        self.q_norm, self.k_norm = nn.LayerNorm(K), nn.Identity()


@pytest.mark.parametrize(
    ("make", "spec", "complaint"),
    [
        (Nameless, "qk_norm", r"head cannot be told from 0 \(Nameless\); give that module an attribute head_dim"),
        (Nameless, "qk_clip", "finds no linears that make the queries and keys of 0: its parts are mix"),
        (lambda: nano.Attention(D, H), "qk_norm:over=width", "over=width is for foreshock's own model"),
        (Normed, "qk_norm", "qk_norm does not go with the norm on queries or keys that 0 has: q_norm"),
        (Normed, "attention_logit_scale", "attention_logit_scale does not go with .* that 0 has: q_norm"),
        (Normed, "qk_clip", "qk_clip does not go with the norm on queries or keys that 0 has: q_norm"),
        (lambda: nn.MultiheadAttention(D, H), "soft_cap", "cannot be changed.*need_weights=False: 0"),
        (lambda: nn.MultiheadAttention(D, H, add_zero_attn=True), "qk_clip", "cannot read every attention: 0: it adds"),
        (lambda: nn.Linear(D, D), "soft_cap", "has no attention that can be changed"),
        (lambda: nn.Linear(D, D), "qk_clip", "finds no attention in Sequential"),
    ],
)
def test_a_refusal_gives_its_reason_and_changes_nothing(
    make: Callable[[], nn.Module], spec: str, complaint: str
) -> None:
    model = nn.Sequential(make(), nn.Linear(D, D))
    before, optimizer = state(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=complaint):
        interventions.apply(model, spec, optimizer)
    assert same(state(model), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_wrong_head_dim_is_named_when_it_shows() -> None:
    model = nn.Sequential(Nameless(head_dim=K))
    x = torch.ones(1, T, D)
    with interventions.apply(model, "qk_norm"):
        assert model[0].get_parameter("foreshock_q_norm.weight").shape == (K,)
        model(x)
    model = nn.Sequential(Nameless(num_heads=2, head_dim=3))
    with interventions.apply(model, "qk_norm"), pytest.raises(UserError, match=r"of 0 have dimension 8.*looked like 3"):
        model(x)


def test_two_transforms_of_scores_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot combine"):
        interventions.apply(nano.built()[0], "soft_cap+soft_temp")


def maxima(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    taps = tap_attention(model)
    calls = listened(taps, run)
    taps.close()
    return {path: largest_logits(call) for path, call in calls.items()}


def clip(model: nn.Module, run: Callable[[], Tensor], tau: float, alpha: float = 0.5) -> dict[str, Tensor]:
    """One update that moves nothing, and what qk_clip makes of it: the weights before it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = state(model)
    with interventions.apply(model, f"qk_clip:tau={tau},alpha={alpha}", optimizer) as applied:
        applied.loss(run()).backward()
        optimizer.step()
    return before


class Apart(nn.Module):
    """Projections of their own, grouped queries, cross-attention: as many layouts as there are names for them."""

    def __init__(self, keys: int, q: str, k: str) -> None:
        super().__init__()
        self.add_module(q, nn.Linear(D, H * K))
        self.add_module(k, nn.Linear(D, keys * K))
        self.wv = nn.Linear(D, keys * K)
        self.names = q, k

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        q = self.get_submodule(self.names[0])(x).unflatten(-1, (-1, K)).transpose(1, 2)
        k, v = (
            part(memory).unflatten(-1, (-1, K)).transpose(1, 2) for part in (self.get_submodule(self.names[1]), self.wv)
        )
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(-2)


class Together(nn.Module):
    """One projection of all, its rows in either order."""

    def __init__(self, keys: int, grouped: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, (H + 2 * keys) * K)
        self.keys, self.grouped = keys, grouped

    def forward(self, x: Tensor) -> Tensor:
        y, J = self.qkv(x).unflatten(-1, (-1, K)), self.keys
        if self.grouped:
            y = y.unflatten(-2, (J, H // J + 2))
            q, k, v = y[..., :-2, :].flatten(2, 3), y[..., -2, :], y[..., -1, :]
        else:
            q, k, v = y.split([H, J, J], -2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(-2)


LAYOUTS: dict[str, Callable[[], nn.Module]] = {
    "separate": lambda: Apart(H, "q_proj", "k_proj"),
    "grouped queries": lambda: Apart(2, "wq", "wk"),
    "one head of keys": lambda: Apart(1, "to_q", "to_k"),
    "fused": lambda: Together(H, grouped=False),
    "fused, head by head": lambda: Together(H, grouped=True),
    "fused, grouped queries": lambda: Together(2, grouped=False),
    "fused, group by group": lambda: Together(2, grouped=True),
}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_qk_clip_brings_large_heads_to_tau_and_leaves_the_others_bit_for_bit(layout: str, alpha: float) -> None:
    model = spread(nn.Sequential(LAYOUTS[layout]()), 0.5)
    x = torch.randn(3, T, D, generator=torch.Generator().manual_seed(1))
    before = maxima(model, lambda: model(x).sum())["0"]
    tau = float(before.sort().values[1:3].mean())
    assert (before > tau).sum() == 2
    weights = clip(model, lambda: model(x).sum(), tau, alpha)
    after = maxima(model, lambda: model(x).sum())["0"]
    # Sums of K products of sums over D inputs, twice, and some ten roundings of the factors and products by them.
    torch.testing.assert_close(after, before.clamp(max=tau), rtol=(2 * (D + K) + 10) * EPS, atol=0)
    changed = {name for name, value in state(model).items() if not torch.equal(value, weights[name])}
    assert changed
    assert not any("wv" in name for name in changed)
    if layout.startswith(("separate", "fused")) and "group" not in layout:
        assert torch.equal(after[before <= tau], before[before <= tau])


@pytest.mark.filterwarnings("ignore:.*enable_nested_tensor.*:UserWarning")
@pytest.mark.parametrize("kdim", [None, D])
def test_qk_clip_on_torchs_own_multihead_attention(kdim: int | None) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(D, H, batch_first=True)
            if kdim is not None:
                self.attend = nn.MultiheadAttention(D, H, kdim=kdim, vdim=D + 1, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(x, x, x if kdim is None else F.pad(x, (0, 1)))[0]

    model = spread(Outer(), 0.5)
    x = torch.randn(3, T, D, generator=torch.Generator().manual_seed(1))
    before = maxima(model, lambda: model(x).sum())["attend"]
    tau = float(before.sort().values[1:3].mean())
    clip(model, lambda: model(x).sum(), tau)
    after = maxima(model, lambda: model(x).sum())["attend"]
    torch.testing.assert_close(after, before.clamp(max=tau), rtol=(2 * (D + K) + 10) * EPS, atol=0)


def test_qk_clip_holds_the_logits_of_a_training() -> None:
    (model, optimizer), (free, frees) = nano.built(lr=0.03), nano.built(lr=0.03)
    tau = 0.5
    with interventions.apply(model, f"qk_clip:tau={tau}", optimizer) as applied:
        train(model, optimizer, applied, steps=12)
    train(free, frees, steps=12)

    def largest(one: nn.Module) -> float:
        return max(float(v.max()) for v in maxima(one, lambda: nano.loss_of(one, nano.batch_of(11))).values())

    # A factor is made for logits from before the update, which adds what one step adds.
    held, grown = largest(model), largest(free)
    assert held < 2 * tau < 4 * tau < grown, (held, grown)


def test_qk_clip_refuses_rows_that_it_cannot_tell() -> None:
    class Shuffled(Together):
        def forward(self, x: Tensor) -> Tensor:
            self.qkv.weight.data.mul_(1.0)
            y = self.qkv(x).unflatten(-1, (K, -1)).transpose(-1, -2)  # heads along the last dimension
            q, k, v = (part.transpose(1, 2) for part in y.split([H, H, H], -2))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)

    model = spread(nn.Sequential(Shuffled(H, grouped=False)), 0.5)
    x = torch.randn(3, T, D, generator=torch.Generator().manual_seed(1))
    before = state(model)
    with pytest.raises(UserError, match="cannot tell which outputs of its projections 0 makes queries and keys of"):
        clip(model, lambda: model(x).sum(), 1.0)
    assert same(state(model), before)
    assert 0 < SAME_SIZE < 0.1


def test_qk_clip_of_a_compiled_model() -> None:
    """One graph that tells which rows make queries, and one that does not."""
    states = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, optimizer = nano.built(lr=0.03)
        counter = CompileCounterWithBackend("eager")
        with interventions.apply(model, "qk_clip:tau=0.1", optimizer) as applied:
            called = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
            for step in range(4):
                optimizer.zero_grad()
                applied.loss(nano.loss_of(called, nano.batch_of(step))).backward()
                optimizer.step()
        assert counter.frame_count == 2 * compiled
        states.append(state(model))
    torch._dynamo.reset()
    assert same(*states)


@pytest.mark.parametrize("spec", ["qk_norm+soft_cap", "attention_logit_scale+soft_temp"])
def test_autocast_and_low_precision(spec: str) -> None:
    model, _ = nano.built()
    with interventions.apply(model, spec), torch.autocast("cpu", dtype=torch.bfloat16):
        nano.loss_of(model, nano.batch_of(0)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    half = nano.built()[0].bfloat16()
    with interventions.apply(half, spec):
        assert half(nano.batch_of(0)).dtype == torch.bfloat16
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_qk_clip_in_bf16() -> None:
    model = spread(nn.Sequential(LAYOUTS["fused, group by group"]()), 0.5).bfloat16()
    x = torch.randn(3, T, D, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = maxima(model, lambda: model(x).sum())["0"]
    tau = float(before.min()) / 2
    clip(model, lambda: model(x).sum(), tau)
    after = maxima(model, lambda: model(x).sum())["0"]
    # Weights, outputs and q·k of sums that cancel: some ten roundings of 2^-8.
    torch.testing.assert_close(after, torch.full_like(after, tau), rtol=10 * 2**-8, atol=0)


# Models of transformers

hf = pytest.mark.slow  # importing transformers takes seconds
both = pytest.mark.parametrize("attention", ["eager", "sdpa"])
TOKENS = torch.randint(50, (2, T), generator=torch.Generator().manual_seed(1))
DECODER: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": D,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": H,
    "num_key_value_heads": 2,
    "head_dim": K,
    "max_position_embeddings": 16,
}


def decoder(family: str, attention: str, std: float = 0.3, **changed: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="pip install 'foreshock[hf]' to run it")
    config = getattr(transformers, f"{family}Config")(**{**DECODER, **changed})
    config._attn_implementation = attention
    return spread(getattr(transformers, f"{family}ForCausalLM")(config), std)


def gpt2(attention: str) -> Any:
    transformers = pytest.importorskip("transformers", reason="pip install 'foreshock[hf]' to run it")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=D, n_layer=2, n_head=H, attn_pdrop=0.0)
    config.resid_pdrop = config.embd_pdrop = 0.0
    config._attn_implementation = attention
    return spread(transformers.GPT2LMHeadModel(config), 0.3)


def loss_and_gradients(model: Any, keys: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(TOKENS, attention_mask=keys, labels=TOKENS)
    output.loss.backward()
    return {"logits": output.logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, value in theirs.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(ours[name], value, atol=2e-4 * max(scale, 1e-2), rtol=2e-4, msg=name)


@hf
@both
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_qk_norm_on_a_llama_acts_after_the_rotation(
    attention: str, padded: bool, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = decoder("Llama", attention), decoder("Llama", attention)
    from transformers.models.llama import modeling_llama

    norms = [nn.LayerNorm(K, eps=1e-6, bias=False) if norm == "layer_norm" else UpcastingRMSNorm(K, eps=1e-6)] * 2
    rotate = modeling_llama.apply_rotary_pos_emb
    keys = torch.ones(2, T, dtype=torch.long)
    keys[0, -2:] = 0 if padded else 1
    unchanged = loss_and_gradients(ours, keys)
    with interventions.apply(ours, f"qk_norm:norm={norm}") as applied:
        assert applied.touched["qk_norm"] == ("model.layers.0.self_attn", "model.layers.1.self_attn")
        found = loss_and_gradients(ours, keys)
    again = loss_and_gradients(ours, keys)
    assert all(torch.equal(again[name], unchanged[name]) for name in unchanged)
    with monkeypatch.context() as patched:

        def normed(q: Tensor, k: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
            q, k = rotate(q, k, *args, **options)
            return norms[0](q), norms[1](k)

        patched.setattr(modeling_llama, "apply_rotary_pos_emb", normed)
        expected = loss_and_gradients(theirs, keys)
    assert not torch.allclose(expected["logits"], unchanged["logits"], atol=1e-2)
    close(found, expected)


@hf
@both
def test_qk_norm_by_rms_is_qwen_3s_where_its_gains_are_one(attention: str) -> None:
    """Qwen3 normalises before the rotation, which keeps the size of a vector, and so commutes with the norm."""
    theirs, ours = decoder("Qwen3", attention), decoder("Llama", attention)
    for name, parameter in theirs.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            nn.init.ones_(parameter)
    assert theirs.config.rms_norm_eps == ours.config.rms_norm_eps == 1e-6
    ours.load_state_dict({n: v for n, v in theirs.state_dict().items() if "q_norm" not in n and "k_norm" not in n})
    ours.config.rope_parameters = theirs.config.rope_parameters
    expected = loss_and_gradients(theirs)
    with interventions.apply(ours, "qk_norm:norm=rms_norm"):
        found = loss_and_gradients(ours)
    close(found, {name: value for name, value in expected.items() if "q_norm" not in name and "k_norm" not in name})
    with pytest.raises(UserError, match="qk_norm does not go with the norm on queries or keys"):
        interventions.apply(theirs, "qk_norm")


@hf
def test_soft_cap_is_gemma_2s_own_bit_for_bit() -> None:
    """Its scale, 16^-½, is a power of two: it may multiply queries or scores."""
    limit, size = 1.5, {"query_pre_attn_scalar": 16, "sliding_window": 3}
    theirs = decoder("Gemma2", "eager", attn_logit_softcapping=limit, **size)
    ours = decoder("Gemma2", "eager", attn_logit_softcapping=None, **size)
    unchanged = loss_and_gradients(ours)
    expected = loss_and_gradients(theirs)
    with interventions.apply(ours, f"soft_cap:limit={limit}"):
        found = loss_and_gradients(ours)
    assert torch.equal(found["logits"], expected["logits"])
    assert not torch.equal(found["logits"], unchanged["logits"])
    close(found, expected)
    with pytest.raises(UserError, match="its scores are capped already"):
        interventions.apply(theirs, "soft_cap")


@hf
@both
@pytest.mark.parametrize("spec", ["soft_cap:limit=0.3", "soft_temp:beta=0.25"])
def test_scores_of_gpt_2_are_transformed(attention: str, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = gpt2(attention), gpt2("eager")
    from transformers.models.gpt2 import modeling_gpt2

    score = CASES[spec][1]

    def written_out(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> tuple[Tensor, Tensor]:
        weights = (score(q @ k.mT * K**-0.5).masked_fill(~torch.ones(T, T).tril().bool(), -math.inf)).softmax(-1)
        return (weights @ v).transpose(1, 2), weights

    with interventions.apply(ours, spec):
        found = loss_and_gradients(ours)
        outputs = ours(TOKENS, output_attentions=True) if attention == "eager" else None
    with monkeypatch.context() as patched:
        patched.setattr(modeling_gpt2, "eager_attention_forward", written_out)
        expected = loss_and_gradients(theirs)
        weights = theirs(TOKENS, output_attentions=True).attentions
    close(found, expected)
    if outputs is not None:
        for ours_, theirs_ in zip(outputs.attentions, weights, strict=True):
            torch.testing.assert_close(ours_, theirs_, atol=1e-5, rtol=1e-5)


@hf
@both
def test_keys_of_a_cache_are_changed_like_those_of_one_pass(attention: str) -> None:
    model = decoder("Llama", attention).eval()
    with interventions.apply(model, "qk_norm+soft_cap:limit=0.3"), torch.no_grad():
        whole = model(TOKENS).logits
        start = model(TOKENS[:, :-1], use_cache=True)
        last = model(TOKENS[:, -1:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(last, whole[:, -1:], atol=1e-4, rtol=1e-4)


@hf
@both
def test_gradient_checkpointing_of_transformers(attention: str) -> None:
    plain_, again = decoder("Llama", attention), decoder("Llama", attention)
    newer = getattr(again, "activation_checkpointing_enable", None)  # the older name warns where both are there
    (newer or again.gradient_checkpointing_enable)({"use_reentrant": False})
    with interventions.apply(plain_, "qk_norm+soft_cap:limit=0.3"):
        expected = loss_and_gradients(plain_.train())
    with interventions.apply(again, "qk_norm+soft_cap:limit=0.3"):
        found = loss_and_gradients(again.train())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@hf
@both
def test_a_llama_compiles_to_one_graph(attention: str) -> None:
    model = decoder("Llama", attention)
    with interventions.apply(model, "qk_norm+soft_cap:limit=0.3"):
        expected = loss_and_gradients(model)["logits"]
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        found = compiled(TOKENS).logits
        torch._dynamo.reset()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@hf
def test_kernels_whose_scores_are_out_of_reach_are_refused() -> None:
    model = decoder("Llama", "sdpa")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match=r"inside flash_attention_2 cannot be transformed; use model.set_attn_impl"):
        interventions.apply(model, "soft_cap")
    with interventions.apply(model, "qk_norm"):  # its queries and keys are not
        pass


@hf
@both
@pytest.mark.parametrize("family", ["GPT2", "Llama", "Qwen2", "GPTNeoX"])
def test_qk_clip_finds_the_heads_of_transformers(family: str, attention: str) -> None:
    changed = {"num_key_value_heads": H} if family == "GPTNeoX" else {}
    model = gpt2(attention) if family == "GPT2" else decoder(family, attention, 0.5, **changed)
    run = lambda: model(TOKENS, labels=TOKENS).loss  # noqa: E731
    sizes = maxima(model, run)
    first = next(iter(sizes))
    tau = float(sizes[first].sort().values[1:3].mean())
    clip(model, run, tau)
    # Block 1 sees other inputs once block 0 has changed. Rotations add some ten roundings to each product.
    after = maxima(model, run)[first]
    torch.testing.assert_close(after, sizes[first].clamp(max=tau), rtol=(2 * (D + K) + 30) * EPS, atol=0)


@hf
def test_qk_clip_refuses_a_model_that_normalises_its_queries() -> None:
    with pytest.raises(UserError, match=r"qk_clip does not go with the norm on queries or keys that .*q_norm"):
        interventions.apply(model := decoder("Qwen3", "sdpa"), "qk_clip", torch.optim.SGD(model.parameters(), lr=0.1))


# Models of x-transformers


def of_x_transformers(**options: Any) -> nn.Module:
    package = pytest.importorskip("x_transformers", reason="make test-all installs x-transformers")
    layers = package.Decoder(dim=D, depth=2, heads=H, attn_dim_head=K, **options)
    return spread(package.TransformerWrapper(num_tokens=50, max_seq_len=16, attn_layers=layers))


@hf
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_soft_cap_is_the_clamp_of_x_transformers() -> None:
    theirs = of_x_transformers(attn_softclamp_logits=True, attn_logit_softclamp_value=0.3)
    ours = of_x_transformers(attn_flash=True)
    before = ours(TOKENS)
    with interventions.apply(ours, "soft_cap:limit=0.3"):
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS), atol=1e-4, rtol=1e-4)
    assert torch.equal(ours(TOKENS), before)
    with pytest.raises(UserError, match="build the model with attn_flash=True"):
        interventions.apply(of_x_transformers(), "soft_cap")
    with pytest.raises(UserError, match="scales its queries by a factor of their own"):
        interventions.apply(of_x_transformers(attn_flash=True, attn_qk_norm=True), "qk_norm")


@hf
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("options", [{}, {"rotary_pos_emb": True}, {"attn_kv_heads": 2}, {"alibi_pos_bias": True}])
def test_qk_norm_bounds_the_logits_of_x_transformers(options: dict[str, Any]) -> None:
    """By RMSNorm with gains of 1 a query and a key have length √K at most, and so their logit is √K at most."""
    model = of_x_transformers(attn_flash=True, **options)
    assert max(float(v.max()) for v in maxima(model, lambda: model(TOKENS).sum()).values()) > math.sqrt(K)
    with interventions.apply(model, "qk_norm:norm=rms_norm") as applied:
        assert len(applied.touched["qk_norm"]) == 2
        for max_H in maxima(model, lambda: model(TOKENS).sum()).values():
            assert (max_H <= math.sqrt(K) * (1 + 10 * EPS)).all()
