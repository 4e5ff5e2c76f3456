"""The cures of 2410.16682 and their kin, against plain computation and the blocks of published models.

Shapes: B batch, T tokens, S keys, D width, H heads, K head dimension.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    ChameleonConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Swinv2Config,
)
from transformers.models.chameleon.modeling_chameleon import ChameleonRotaryEmbedding, ChameleonSwinDecoderLayer
from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer

from foreshock.core import plugins
from foreshock.core.arms import Arm
from foreshock.core.config import Spec, replace_at
from foreshock.core.contracts import AttentionCall
from foreshock.core.errors import ConfigError
from foreshock.core.model_config import ModelConfig, Roles
from foreshock.core.run_config import RecordConfig, RunConfig, edited, resolve
from foreshock.probes.attention import AttentionCore, logits, probabilities, tap_attention
from foreshock.proxy.layers.probabilities.clipped_softmax import ClippedSoftmax
from foreshock.proxy.model import Proxy
from foreshock.proxy.parametrization import initialise, role_of
from foreshock.proxy.presets import llama
from tests.test_proxy_model import to_hugging_face

WIDTH, DEPTH, HEADS, VOCAB, T = 64, 2, 4, 97, 16
BASE = RunConfig(model=ModelConfig(width=WIDTH, depth=DEPTH, heads=HEADS), record=RecordConfig(monitors=()))
LLAMA = replace(BASE, model=llama(width=WIDTH, depth=DEPTH, heads=HEADS))


def built(arm: str, base: RunConfig = BASE) -> Proxy:
    """The initialised proxy of an arm, its norms and gains moved off their initial values."""
    model = fresh(arm, base)
    move_gains(model)
    return model


def fresh(arm: str, base: RunConfig = BASE) -> Proxy:
    """The proxy of an arm as a run starts with it."""
    model = Proxy(edited(resolve(Arm.parse(arm).apply(base))).model, VOCAB, T)
    initialise(model, Roles(), seed=0)
    return model


def move_gains(model: nn.Module) -> None:
    """Draw the scales of norms and the gains uniformly from [0.5, 1.5]."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if role_of(name) in ("norm", "gain"):
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)


def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, T), generator=torch.Generator().manual_seed(1))


def hidden(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


# What each edit sets, below `model.`; null empties a slot.
EDITS = {
    "soft_temp": {"attention.score": "temperature:beta=0.5"},
    "soft_temp:beta=1": {},
    "soft_cap": {"attention.score": "cap:limit=50.0"},
    "soft_cap:limit=25": {"attention.score": "cap:limit=25.0"},
    "soft_clip": {"attention.probability": "clipped_softmax:zeta=1.03,gamma=-0.03"},
    "soft_clip:zeta=1": {"attention.probability": "clipped_softmax:zeta=1.0,gamma=-0.03"},
    "soft_clip:zeta=1,gamma=0": {},
    "layer_scale": {"residual": "scaled:init=1e-4"},
    "qk_fc_norm": dict.fromkeys(["norms.q", "norms.k", "norms.post_proj", "norms.post_fc2"], "layer_norm"),
    "qkv_norm": dict.fromkeys(["norms.q", "norms.k", "norms.v"], "layer_norm") | {"norms.pre_attn": None},
    "qkv_norm:keep_pre_norm=true,norm=rms_norm": dict.fromkeys(["norms.q", "norms.k", "norms.v"], "rms_norm"),
    "qk_norm_cap:over=width": {
        "norms.q": "layer_norm",
        "norms.k": "layer_norm",
        "attention.score": "cap:limit=50.0",
        "attention.qkv_norm_over": "width",
    },
    "proj_fc2_norm": dict.fromkeys(["norms.post_proj", "norms.post_fc2"], "layer_norm"),
    "peri_ln:norm=rms_norm": dict.fromkeys(
        ["norms.pre_attn", "norms.post_proj", "norms.pre_mlp", "norms.post_fc2"], "rms_norm"
    ),
    "reordered_norm": {
        "norms.pre_attn": None,
        "norms.q": "rms_norm",
        "norms.k": "rms_norm",
        "norms.post_proj": "rms_norm",
        "norms.pre_mlp": None,
        "norms.post_fc2": "rms_norm",
        "attention.qkv_norm_over": "width",
    },
    "res_post_norm": {
        "norms.pre_attn": None,
        "norms.post_proj": "layer_norm:gain=0.0",
        "norms.pre_mlp": None,
        "norms.post_fc2": "layer_norm:gain=0.0",
    },
}


@pytest.mark.parametrize("arm", EDITS)
def test_edit_changes_its_settings_alone(arm: str) -> None:
    expected = BASE
    for path, value in EDITS[arm].items():
        expected = replace_at(expected, f"model.{path}", value)
    config = Arm.parse(arm).apply(BASE)
    assert replace(edited(config), interventions=()) == expected


# The block, written out: one query of one head at a time, in fp64.


def softmax(scores_S: np.ndarray) -> np.ndarray:
    exponentials = [math.exp(score) for score in scores_S]
    return np.array([value / sum(exponentials) for value in exponentials])


def normalised(x_D: np.ndarray, kind: str, scale_D: np.ndarray) -> np.ndarray:
    if kind == "layer_norm":
        x_D = x_D - x_D.mean()
    return scale_D * x_D / math.sqrt((x_D**2).mean() + 1e-6)


def rotated(x_K: np.ndarray, position: int) -> np.ndarray:
    out, half = np.empty_like(x_K), len(x_K) // 2
    for i in range(half):
        angle = position * 10_000.0 ** (-i / half)
        cos, sin = float(np.float32(math.cos(angle))), float(np.float32(math.sin(angle)))
        out[i], out[i + half] = x_K[i] * cos - x_K[i + half] * sin, x_K[i + half] * cos + x_K[i] * sin
    return out


def plain_block(
    x_TD: np.ndarray,
    of: dict[str, np.ndarray],
    slots: dict[str, str],
    over: str = "head",
    score: Callable[[float], float] = lambda s: s,
    weigh: Callable[[np.ndarray], np.ndarray] = softmax,
) -> np.ndarray:
    """One block by the diagrams of 2410.16682; `of` holds its parameters by name, `slots` the kind of each norm."""

    def norm(x_TD: np.ndarray, slot: str) -> np.ndarray:
        if slot not in slots:
            return x_TD
        scale = of[f"attn.{slot}_norm.weight" if slot in "qkv" else f"{slot}_norm.weight"]
        parts = HEADS if slot in "qkv" and over == "head" else 1
        rows = [np.concatenate([normalised(p, slots[slot], scale) for p in np.split(x_D, parts)]) for x_D in x_TD]
        return np.stack(rows)

    n_TD = norm(x_TD, "pre_attn")
    q_TD, k_TD, v_TD = (norm(n_TD @ of[f"attn.{name}.weight"].T, name) for name in "qkv")
    K = WIDTH // HEADS
    mixed_TD = np.zeros_like(x_TD)
    for head in range(HEADS):
        part = slice(head * K, (head + 1) * K)
        for t in range(len(x_TD)):
            q_K = rotated(q_TD[t, part], t)
            scores = [score(q_K @ rotated(k_TD[s, part], s) / math.sqrt(K)) for s in range(t + 1)]
            mixed_TD[t, part] = weigh(np.array(scores)) @ v_TD[: t + 1, part]
    attended_TD = norm(mixed_TD @ of["attn.proj.weight"].T, "post_proj")
    h_TD = x_TD + of.get("attn_residual.gain", 1.0) * attended_TD
    up_TF = norm(h_TD, "pre_mlp") @ of["mlp.fc1.weight"].T
    active_TF = 0.5 * up_TF * (1 + np.tanh(math.sqrt(2 / math.pi) * (up_TF + 0.044715 * up_TF**3)))
    return h_TD + of.get("mlp_residual.gain", 1.0) * norm(active_TF @ of["mlp.fc2.weight"].T, "post_fc2")


def ln(slots: str) -> dict[str, str]:
    return dict.fromkeys(slots.split(), "layer_norm")


def rms(slots: str) -> dict[str, str]:
    return dict.fromkeys(slots.split(), "rms_norm")


PRE = ln("pre_attn pre_mlp")
BLOCKS: dict[str, dict[str, Any]] = {
    "none": {"slots": PRE},
    "soft_temp": {"slots": PRE, "score": lambda s: s * 0.5},
    "soft_cap:limit=1.5": {"slots": PRE, "score": lambda s: 1.5 * math.tanh(s / 1.5)},
    "soft_clip": {"slots": PRE, "weigh": lambda s: np.array([min(max(1.06 * p - 0.03, 0), 1) for p in softmax(s)])},
    "layer_scale": {"slots": PRE},
    "qk_norm": {"slots": PRE | ln("q k")},
    "qk_norm:over=width,norm=rms_norm": {"slots": PRE | rms("q k"), "over": "width"},
    "qk_fc_norm": {"slots": PRE | ln("q k post_proj post_fc2")},
    "qk_fc_norm:over=width,norm=rms_norm": {"slots": PRE | rms("q k post_proj post_fc2"), "over": "width"},
    "qkv_norm": {"slots": ln("pre_mlp q k v")},
    "qkv_norm:over=width,norm=rms_norm": {"slots": ln("pre_mlp") | rms("q k v"), "over": "width"},
    "qkv_norm:keep_pre_norm=true": {"slots": PRE | ln("q k v")},
    "qk_norm_cap:limit=2": {"slots": PRE | ln("q k"), "score": lambda s: 2 * math.tanh(s / 2)},
    "proj_fc2_norm": {"slots": PRE | ln("post_proj post_fc2")},
    "proj_fc2_norm:norm=rms_norm": {"slots": PRE | rms("post_proj post_fc2")},
    "peri_ln": {"slots": ln("pre_attn pre_mlp post_proj post_fc2")},
    "reordered_norm": {"slots": rms("q k post_proj post_fc2"), "over": "width"},
    "reordered_norm:over=head,norm=layer_norm": {"slots": ln("q k post_proj post_fc2")},
    "res_post_norm": {"slots": ln("post_proj post_fc2")},
    "res_post_norm:norm=rms_norm": {"slots": rms("post_proj post_fc2")},
}


@pytest.mark.parametrize("arm", BLOCKS)
def test_block_is_that_of_the_diagram(arm: str) -> None:
    """In fp64, to rounding; the scores are large enough that each arm differs from the base block."""
    model = built(arm).double()
    block = model.blocks[0]
    with torch.no_grad():
        block.attn.q.weight.mul_(4)
    x_BTD = hidden(1, T, WIDTH).double()
    rope = (model.get_buffer("rope_cos"), model.get_buffer("rope_sin"))
    ours_TD = block(x_BTD, rope)[0].detach()
    of = {name: parameter.detach().numpy() for name, parameter in block.named_parameters()}
    expected_TD = torch.from_numpy(plain_block(x_BTD[0].numpy(), of, **BLOCKS[arm]))
    torch.testing.assert_close(ours_TD, expected_TD, rtol=1e-9, atol=1e-9)
    if arm != "none":
        of_base = dict.fromkeys(("pre_attn_norm.weight", "pre_mlp_norm.weight"), np.ones(WIDTH)) | of
        of_base = {name: value for name, value in of_base.items() if not name.endswith("gain")}
        base_TD = torch.from_numpy(plain_block(x_BTD[0].numpy(), of_base, PRE))
        assert (base_TD - expected_TD).abs().max() > 0.01


# Whole models and blocks of transformers.


def check_parity(ours: Proxy, theirs: nn.Module, rename: dict[str, str], one_plus: bool = False) -> None:
    """Same weights give the same logits and gradients, to fp32 rounding.

    Args:
        ours: the proxy.
        theirs: the other model.
        rename: parts of parameter names of the proxy, and of the other where it differs from Llama's.
        one_plus: whether norms are 1 + weight there, and embeddings are multiplied by √D.
    """

    def name_there(name: str) -> str:
        for mine, other in rename.items():
            name = name.replace(mine, other)
        return to_hugging_face(name)

    factors = {"embed.weight": math.sqrt(WIDTH)} if one_plus else {}
    state = {}
    for name, parameter in ours.named_parameters():
        shift = 1 if one_plus and role_of(name) == "norm" else 0
        state[name_there(name)] = parameter.detach() / factors.get(name, 1) - shift
    theirs.load_state_dict(state)
    logits_BTV, expected_BTV = ours(tokens()), theirs(tokens(), use_cache=False).logits
    torch.testing.assert_close(logits_BTV, expected_BTV, rtol=1e-5, atol=1e-5)
    logits_BTV.square().mean().backward()
    expected_BTV.square().mean().backward()
    named = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        there = named[name_there(name)].grad / factors.get(name, 1)
        torch.testing.assert_close(parameter.grad, there, rtol=1e-4, atol=1e-6, msg=name)


def shape_of(ours: Proxy) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": ours.blocks[0].mlp.fc1.out_features,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": False,
        "max_position_embeddings": T,
        "attn_implementation": "eager",
        "pad_token_id": None,  # its embedding would get no gradient
        "bos_token_id": None,
        "eos_token_id": None,
    }


@pytest.mark.parametrize("limit", [1.5, 50.0])
def test_peri_ln_and_soft_cap_are_gemma_2(limit: float) -> None:
    ours = built(f"peri_ln:norm=rms_norm+soft_cap:limit={limit}", LLAMA)
    head_dim = WIDTH // HEADS
    config = Gemma2Config(
        **shape_of(ours),
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        hidden_activation="silu",
        attn_logit_softcapping=limit,
        final_logit_softcapping=None,
    )
    theirs = Gemma2ForCausalLM(config)
    assert theirs.config._attn_implementation == "eager"  # the only one there that caps
    rename = {
        "post_proj_norm": "post_attention_layernorm",
        "pre_mlp_norm": "pre_feedforward_layernorm",
        "post_fc2_norm": "post_feedforward_layernorm",
    }
    check_parity(ours, theirs, rename, one_plus=True)


def test_reordered_norm_is_olmo_2() -> None:
    ours = built("reordered_norm", LLAMA)
    theirs = Olmo2ForCausalLM(Olmo2Config(**shape_of(ours)))
    rename = {"post_proj_norm": "post_attention_layernorm", "post_fc2_norm": "post_feedforward_layernorm"}
    check_parity(ours, theirs, rename)


def test_res_post_norm_is_the_order_of_swin_v2() -> None:
    """Swin-v2's layer around our attention and MLP, its windows as large as the image."""
    model = built("res_post_norm")
    block = model.blocks[0]
    rope = (model.get_buffer("rope_cos"), model.get_buffer("rope_sin"))

    class Attend(nn.Module):
        def forward(self, x_BTD: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
            return (block.attn(x_BTD, rope),)

    config = Swinv2Config(window_size=4, layer_norm_eps=1e-6, hidden_act="gelu")
    layer = Swinv2Layer(config, dim=WIDTH, input_resolution=(4, 4), num_heads=HEADS)
    layer.attention, layer.intermediate, layer.output = Attend(), block.mlp, nn.Identity()
    layer.layernorm_before.weight, layer.layernorm_after.weight = (
        block.post_proj_norm.weight,
        block.post_fc2_norm.weight,
    )
    x_BTD = hidden(2, T, WIDTH)
    torch.testing.assert_close(block(x_BTD, rope), layer(x_BTD, (4, 4))[0], rtol=1e-5, atol=1e-5)


def test_res_post_norm_and_qk_norm_are_chameleon() -> None:
    """Chameleon 34B's layer: residual post-norm with RMSNorm, LayerNorm (eps 1e-5) on each head of q and k."""
    config = edited(resolve(Arm.parse("res_post_norm:norm=rms_norm+qk_norm").apply(LLAMA))).model
    qk = Spec("layer_norm", {"eps": 1e-5})
    model = Proxy(replace(config, norms=replace(config.norms, q=qk, k=qk)), VOCAB, T)
    initialise(model, Roles(), seed=0)
    move_gains(model)
    block = model.blocks[0]
    theirs = ChameleonConfig(**shape_of(model))
    layer = ChameleonSwinDecoderLayer(theirs, layer_idx=0)
    of = {}
    for name, parameter in block.named_parameters():
        name = name.replace("post_proj_norm", "input_layernorm").replace("post_fc2_norm", "post_attention_layernorm")
        per_head = name.startswith(("attn.q_norm", "attn.k_norm"))
        of[to_hugging_face(f"blocks.{name}").removeprefix("model.layers.")] = (
            parameter.expand(HEADS, -1) if per_head else parameter
        )
    missing, unexpected = layer.load_state_dict(of, strict=False)
    assert not unexpected
    assert set(missing) == {"self_attn.q_norm.bias", "self_attn.k_norm.bias"}
    x_BTD = hidden(2, T, WIDTH)
    causal = torch.full((T, T), -math.inf).triu(1)[None, None]
    rope = ChameleonRotaryEmbedding(theirs)(x_BTD, torch.arange(T)[None])
    expected_BTD = layer(x_BTD, attention_mask=causal, position_embeddings=rope)[0]
    ours_BTD = block(x_BTD, (model.get_buffer("rope_cos"), model.get_buffer("rope_sin")))
    torch.testing.assert_close(ours_BTD, expected_BTD, rtol=1e-5, atol=1e-5)


# What each cure promises.


def test_res_post_norm_starts_as_the_identity() -> None:
    model = fresh("res_post_norm")
    embedded_BTD = model.embed(tokens())
    torch.testing.assert_close(model(tokens()), model.head(model.final_norm(embedded_BTD)), rtol=0, atol=0)


def test_layer_scale_starts_at_its_value_and_is_a_gain() -> None:
    model = fresh("layer_scale:init=0.01")
    gains = {name: p for name, p in model.named_parameters() if role_of(name) == "gain"}
    assert gains.keys() == {f"blocks.{i}.{part}_residual.gain" for i in range(DEPTH) for part in ("attn", "mlp")}
    assert all(torch.equal(gain, torch.full((WIDTH,), 0.01)) for gain in gains.values())


def test_layer_scale_is_the_base_with_rows_of_proj_and_fc2_scaled() -> None:
    scaled, base = built("layer_scale"), built("none")
    with torch.no_grad():
        for ours, plain in zip(scaled.blocks, base.blocks, strict=True):
            plain.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.endswith(".gain")})
            plain.attn.proj.weight.mul_(ours.attn_residual.gain[:, None])
            plain.mlp.fc2.weight.mul_(ours.mlp_residual.gain[:, None])
        base.final_norm.load_state_dict(scaled.final_norm.state_dict())
    torch.testing.assert_close(scaled(tokens()), base(tokens()), rtol=1e-5, atol=1e-5)


def test_soft_temp_is_the_base_with_smaller_queries() -> None:
    cool, base = built("soft_temp:beta=0.25"), built("none")
    for block in base.blocks:
        with torch.no_grad():
            block.attn.q.weight.mul_(0.25)
    torch.testing.assert_close(cool(tokens()), base(tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arm", ["soft_cap:limit=3", "qk_norm_cap:limit=3"])
def test_a_cap_bounds_the_scores_whatever_the_weights(arm: str) -> None:
    """The logits exceed the limit, the scores do not, and no weight is below e^-2c of another in its row."""
    model = built(arm)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in (".q.", ".k.", "q_norm", "k_norm")):
                parameter.mul_(10)
    taps = tap_attention(model)
    taps.listen()
    model(tokens())
    call = taps.take()["blocks.1"]
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    assert logits(call)[..., seen].abs().max() > 100
    assert call.score is not None
    assert call.score(logits(call)).abs().max() <= 3
    weights_BHTS = probabilities(call).detach()
    torch.testing.assert_close(weights_BHTS.sum(-1), torch.ones(2, HEADS, T))
    least = torch.where(seen, weights_BHTS, math.inf).amin(-1)
    assert bool((least >= math.exp(-6) * weights_BHTS.amax(-1) * (1 - 1e-5)).all())


def test_qk_norm_cap_leaves_normed_logits_below_the_limit_almost_alone() -> None:
    """Per head the norms bound |S| by √K = 4 at scale 1; c·tanh(S/c) then differs from S by at most S³/3c²."""
    model = fresh("qk_norm_cap")
    taps = tap_attention(model)
    taps.listen()
    model(tokens())
    call = taps.take()["blocks.0"]
    assert call.score is not None
    scores = logits(call)
    assert scores.abs().max() <= 4 * (1 + 1e-5)
    assert (call.score(scores) - scores).abs().max() <= 4**3 / (3 * 50**2)


@given(
    zeta=st.floats(1, 1.5),
    gamma=st.floats(-0.5, 0),
    scores=st.lists(st.floats(-20, 20), min_size=1, max_size=40),
    masked=st.integers(0, 3),
)
@settings(deadline=None)
def test_clipped_softmax_and_its_gradient(zeta: float, gamma: float, scores: list[float], masked: int) -> None:
    """In [0, 1], 0 where masked, and without gradient exactly where it is clipped."""
    kind = ClippedSoftmax(zeta=zeta, gamma=gamma)
    scores_S = torch.tensor([*scores, *[-math.inf] * masked], dtype=torch.float64)
    p_S = torch.from_numpy(softmax(scores_S.numpy()))
    stretched_S = (zeta - gamma) * p_S + gamma
    weights_S = kind(scores_S)
    torch.testing.assert_close(weights_S, stretched_S.clip(0, 1))
    assert bool((weights_S[len(scores) :] == 0).all())
    jacobian_SS = torch.autograd.functional.jacobian(kind, scores_S)
    inside_S = (stretched_S > 1e-9) & (stretched_S < 1 - 1e-9)
    outside_S = (stretched_S < -1e-9) | (stretched_S > 1 + 1e-9)
    expected_SS = (zeta - gamma) * (p_S.diag() - p_S[:, None] * p_S)
    torch.testing.assert_close(jacobian_SS[inside_S], expected_SS[inside_S])
    assert bool((jacobian_SS[outside_S] == 0).all())


@pytest.mark.parametrize(("keys", "total"), [(1, 1.0), (4, 1.06 - 4 * 0.03), (35, 1.06 - 35 * 0.03), (36, 0.0)])
def test_rows_of_soft_clip_do_not_sum_to_one(keys: int, total: float) -> None:
    """Equal scores: each weight is 1.06 / keys - 0.03, clipped; beyond 35 keys a query looks nowhere."""
    config = edited(Arm.parse("soft_clip").apply(BASE)).model.attention
    kind = plugins.load("proxy.layers.probabilities", config.probability)
    assert kind(torch.zeros(keys)).sum().item() == pytest.approx(total, abs=1e-6)


def test_soft_clip_stops_the_gradient_of_saturated_attention() -> None:
    """Each query sees one key far above the others: weights are exactly 0 and 1, and q and k get no gradient."""
    eye = torch.eye(8)[None, None]
    q, k, v = (30 * eye).requires_grad_(), (30 * eye).requires_grad_(), eye.clone().requires_grad_()
    core = AttentionCore()
    out = core(AttentionCall(q_BHTK=q, k_BHSK=k, scale=1.0, probability=ClippedSoftmax()), v)
    assert torch.equal(out, eye)
    (out * hidden(1, 1, 8, 8)).sum().backward()
    assert not q.grad.any()
    assert not k.grad.any()
    assert v.grad.all()


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_norms_start_at_their_gain(kind: str) -> None:
    norm = plugins.load("proxy.layers.norms", Spec(kind, {"gain": 0.25})).build(4, 0)
    x_D = torch.tensor([1.0, 2.0, -4.0, 3.0])
    expected = 0.25 * normalised(x_D.double().numpy(), kind, np.ones(4))
    torch.testing.assert_close(norm(x_D), torch.from_numpy(expected).float())
    assert bool((plugins.load("proxy.layers.norms", Spec(kind)).build(4, 0).weight == 1).all())


def test_rms_norm_computes_in_fp32_on_bf16_inputs() -> None:
    """To fp32 rounding, and without torch's warning of a slow path."""
    norm = plugins.load("proxy.layers.norms", Spec("rms_norm")).build(WIDTH, 0)
    x_TD = hidden(T, WIDTH).bfloat16()
    expected_TD = [normalised(x_D.double().numpy(), "rms_norm", np.ones(WIDTH)) for x_D in x_TD]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TD = norm(x_TD)
    torch.testing.assert_close(y_TD, torch.from_numpy(np.stack(expected_TD)).float(), rtol=1e-6, atol=1e-6)


# Combinations.


@pytest.mark.parametrize(
    ("whole", "parts"),
    [
        ("qk_norm_cap:limit=25", "qk_norm+soft_cap:limit=25"),
        ("qk_fc_norm:over=width", "qk_norm:over=width+proj_fc2_norm"),
        ("peri_ln", "proj_fc2_norm"),
        ("qkv_norm", "qkv_norm:keep_pre_norm=true+model.norms.pre_attn=null"),
        ("reordered_norm:over=head", "res_post_norm:norm=rms_norm,gain=1+qk_norm:norm=rms_norm"),
    ],
)
def test_cures_made_of_others(whole: str, parts: str) -> None:
    one, other = (resolve(replace(edited(Arm.parse(arm).apply(BASE)), interventions=())) for arm in (whole, parts))
    assert one == other


@pytest.mark.parametrize(
    "arm",
    [
        "soft_cap+soft_temp",
        "qk_norm_cap+soft_cap:limit=25",
        "qk_norm_cap+soft_temp",
        "qk_norm:over=width+qkv_norm",
        "qk_norm:norm=rms_norm+qk_fc_norm",
        "peri_ln+qkv_norm",
        "peri_ln+reordered_norm",
        "proj_fc2_norm+res_post_norm",
    ],
)
def test_cures_that_want_one_slot_are_refused(arm: str) -> None:
    specs = Arm.parse(arm).interventions
    with pytest.raises(ConfigError, match=f"cannot combine {specs[0].name} with {specs[1].name}: .* drop one"):
        resolve(replace(BASE, interventions=specs))


@pytest.mark.parametrize(
    "arm", ["soft_cap+soft_temp:beta=1", "soft_clip+soft_cap", "layer_scale+qk_fc_norm", "peri_ln+qk_norm_cap"]
)
def test_cures_that_do_not_meet_combine(arm: str) -> None:
    assert bool(built(arm)(tokens()).isfinite().all())


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("soft_temp:beta=0", "soft_temp:beta must be a finite number above 0, got 0"),
        ("soft_temp:beta=Infinity", "soft_temp:beta must be a finite number above 0, got inf"),
        ("soft_cap:limit=-50", "soft_cap:limit must be a finite number above 0, got -50"),
        ("soft_cap:limit=Infinity", "soft_cap:limit must be a finite number above 0, got inf"),
        ("soft_cap:limit=null", "soft_cap:limit must be of type float"),
        ("qk_norm_cap:limit=NaN", "qk_norm_cap:limit must be a finite number above 0, got nan"),
        ("soft_clip:zeta=0.9", "soft_clip:zeta must be a finite number, 1 or more, got 0.9"),
        ("soft_clip:gamma=0.01", "soft_clip:gamma must be a finite number, 0 or less, got 0.01"),
        ("layer_scale:init=-1", "layer_scale:init must be a finite number, 0 or more, got -1"),
        ("res_post_norm:gain=NaN", "res_post_norm:gain must be a finite number, 0 or more, got nan"),
        ("qkv_norm:keep_pre_norm=1", "qkv_norm:keep_pre_norm must be of type bool"),
        ("peri_ln:norm=layernorm", "did you mean 'layer_norm'"),
        ("reordered_norm:over=heads", "did you mean 'head'"),
    ],
)
def test_options_out_of_range(spec: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        resolve(replace(BASE, interventions=(Spec.parse(spec),)))


@pytest.mark.parametrize(
    ("family", "spec", "complaint"),
    [
        ("scores", "cap:limit=Infinity", "cap:limit"),
        ("scores", "temperature:beta=NaN", "temperature:beta"),
        ("probabilities", "clipped_softmax:zeta=0.5", "clipped_softmax:zeta"),
        ("probabilities", "clipped_softmax:gamma=0.5", "clipped_softmax:gamma"),
        ("residuals", "scaled:init=Infinity", "scaled:init"),
        ("norms", "layer_norm:gain=NaN", "layer_norm:gain"),
        ("norms", "rms_norm:eps=-1", "rms_norm:eps"),
    ],
)
def test_options_of_layers_out_of_range(family: str, spec: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"{complaint} must be a finite number"):
        plugins.load(f"proxy.layers.{family}", Spec.parse(spec))
