"""Interventions that edit any model, against their formulas, other libraries and slow references."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foreshock.core import plugins
from foreshock.core.arms import Arm
from foreshock.core.config import Spec
from foreshock.core.contracts import Context, Edit, Intervention, StepInfo
from foreshock.core.errors import ConfigError, UserError
from foreshock.core.model_config import ModelConfig, NormSlots
from foreshock.core.run_config import RunConfig
from foreshock.interventions._layers import DynamicTanh, SpectralGain
from foreshock.probes.attention import largest_logits, statistics, tap_attention
from foreshock.proxy.model import Proxy, rotate
from foreshock.proxy.parametrization import block_parameters, initialise, role_of
from foreshock.testing import check_intervention, no_host_sync
from foreshock.training.setup import build_training
from foreshock.training.step import train_step

VOCAB = 11
EPS = torch.finfo(torch.float32).eps


def build_proxy(**norms: Spec) -> Proxy:
    model = ModelConfig(width=16, depth=2, heads=2, norms=NormSlots(**norms))
    proxy = Proxy(model, vocab_size=VOCAB, seq_len=6)
    initialise(proxy, model.roles, seed=0)
    return proxy


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (3, 6), generator=torch.Generator().manual_seed(seed))


def info_of(logits: Tensor | None = None) -> StepInfo:
    nothing = torch.empty(0)
    logits = nothing if logits is None else logits
    return StepInfo(step=1, inputs_BT=nothing, targets_BT=nothing, logits_BTV=logits, loss=torch.zeros(()))


def put_on(model: nn.Module, spec: str, output_module: nn.Module | None = None) -> tuple[Intervention, Edit | None]:
    cure = plugins.load("interventions", Spec.parse(spec))
    runtime = cure.build(Context(model=model, output_module=output_module or model.get_submodule("head")))
    return runtime, runtime.edit_model(model)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def hooks_of(model: nn.Module) -> int:
    return sum(len(value) for m in model.modules() for name, value in vars(m).items() if "hooks" in name and value)


@pytest.mark.parametrize(
    "spec", ["sigma_reparam:gamma=one", "output_centering:mode=centring", "qk_clip:tau=0.01", "logit_softcap:limit=1"]
)
def test_the_contract_holds_for_options_that_are_not_the_default(spec: str) -> None:
    check_intervention(spec)


@pytest.mark.parametrize("spec", ["sigma_reparam", "output_centering:mode=centring", "qk_clip:tau=0.01", "dyt"])
def test_a_step_waits_for_nothing_on_the_device(spec: str) -> None:
    training = build_training(Arm.parse(f"{spec}+model.width=16+data.seq_len=6").apply(RunConfig()), VOCAB)
    train_step(training, 1, tokens())
    with no_host_sync():
        train_step(training, 2, tokens(1))


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("sigma_reparam:gamma=two", "did you mean 'one'|Known: one, sigma"),
        ("logit_softcap:limit=0", "logit_softcap:limit must be a finite number above 0"),
        ("logit_softcap:limit=NaN", "logit_softcap:limit must be a finite number above 0"),
        ("output_centering:weight=-1", "output_centering:weight must be a finite number, 0 or more"),
        ("output_centering:weight=Infinity", "output_centering:weight must be a finite number, 0 or more"),
        ("output_centering:mode=centering", "did you mean 'centring'"),
        ("dyt:alpha=0", "dyt:alpha must be a finite number above 0"),
        ("qk_clip:tau=-1", "qk_clip:tau must be from 1e-6 to 1e12"),
        ("qk_clip:alpha=1.5", "qk_clip:alpha must be in"),
    ],
)
def test_options_out_of_range_are_refused_by_name(spec: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        plugins.load("interventions", Spec.parse(spec))


# sigma_reparam


def random_matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(rows=st.integers(1, 20), columns=st.integers(1, 20), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_sigma_is_the_spectral_norm(rows: int, columns: int, seed: int) -> None:
    """A backward-stable SVD is off by at most about max(m, n)·eps of the largest singular value."""
    weight = random_matrix(rows, columns, seed=seed)
    layer = SpectralGain(weight, gain=None)
    exact = torch.linalg.svdvals(weight.double())[0]
    torch.testing.assert_close(layer.sigma(weight).double(), exact, rtol=(rows + columns) * EPS, atol=0)
    assert torch.equal(layer(weight), weight)
    unit = SpectralGain(weight, gain=1.0)(weight)
    norm = torch.linalg.svdvals(unit.detach().double())[0]
    torch.testing.assert_close(norm, torch.ones_like(norm), rtol=2 * (rows + columns) * EPS, atol=0)


def test_power_iteration_converges_at_the_rate_of_the_spectral_gap() -> None:
    """From tan θ between u and the singular vector, sigma after k iterations is at least σ₁ cos φ,
    tan φ = (σ₂/σ₁)^(2k-1) tan θ, and never above σ₁.
    """
    left, _ = torch.linalg.qr(random_matrix(6, 6, seed=1, dtype=torch.float64))
    right, _ = torch.linalg.qr(random_matrix(5, 5, seed=2, dtype=torch.float64))
    spectrum = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    weight = left[:, :5] * spectrum @ right.T
    layer = SpectralGain(weight, gain=None)
    layer.u.copy_((right[:, 0] + 2 * right[:, 1]) / math.sqrt(5))
    found = []
    for k in range(1, 13):
        layer.advance(weight)
        angle = math.atan((2 / 3) ** (2 * k - 1) * 2)
        found.append(layer.sigma(weight).item())
        assert 3 * math.cos(angle) * (1 - 1e-12) <= found[-1] <= 3 * (1 + 1e-12)
    assert found[0] < 2.5 < 2.9999 < found[-1]


@pytest.mark.parametrize("gain", [None, 0.7])
def test_gradients_of_gain_and_weight_are_those_of_the_formula(gain: float | None) -> None:
    """Against central differences of sum(C · γ W / σ(W)), σ by another routine; their error is about h² = 1e-10."""
    weight = nn.Parameter(random_matrix(4, 5, dtype=torch.float64))
    coefficients = random_matrix(4, 5, seed=3, dtype=torch.float64)
    layer = SpectralGain(weight, gain).double()
    (coefficients * layer(weight)).sum().backward()
    gamma, h = layer.gain.item(), 1e-5

    def reference(weight: Tensor, gamma: float) -> float:
        return (coefficients * weight).sum().item() * gamma / torch.linalg.svdvals(weight)[0].item()

    raw = weight.detach()
    for i, j in [(0, 0), (1, 3), (3, 4)]:
        step = torch.zeros_like(raw)
        step[i, j] = h
        slope = (reference(raw + step, gamma) - reference(raw - step, gamma)) / (2 * h)
        assert weight.grad[i, j].item() == pytest.approx(slope, rel=1e-7, abs=1e-8)
    slope = (reference(raw, gamma + h) - reference(raw, gamma - h)) / (2 * h)
    assert layer.gain.grad.item() == pytest.approx(slope, rel=1e-8)


def test_sigma_reparam_takes_the_linears_of_the_blocks_and_leaves_the_rest() -> None:
    proxy = build_proxy()
    before, n = bits(proxy), block_parameters(proxy)
    output = proxy(tokens())
    _, edit = put_on(proxy, "sigma_reparam")
    assert edit is not None
    parts = ["attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert edit.touched == tuple(f"blocks.{i}.{part}" for i in range(2) for part in parts)
    assert block_parameters(proxy) == n
    roles = {name: role_of(name) for name, _ in proxy.named_parameters() if name.startswith("blocks.1.attn.q")}
    prefix = "blocks.1.attn.q.parametrizations.weight"
    assert roles == {f"{prefix}.original": "q", f"{prefix}.0.gain": "gain"}
    with torch.no_grad():
        assert torch.equal(proxy(tokens()), output)
    edit.undo()
    assert same(bits(proxy), before)
    assert hooks_of(proxy) == 0
    assert type(proxy.blocks[0].attn.q) is nn.Linear


def test_undoing_sigma_reparam_after_training_keeps_the_function_and_the_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    parameters = dict(model.named_parameters())
    _, edit = put_on(model, "sigma_reparam:gamma=one", output_module=model[4])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        model(random_matrix(5, 4, seed=seed)).square().sum().backward()
        optimizer.step()
    raw = model[0].parametrizations.weight.original.detach().clone()
    model.eval()
    learned = model(random_matrix(5, 4, seed=9))
    edit.undo()
    assert torch.equal(model(random_matrix(5, 4, seed=9)), learned)
    assert not torch.allclose(model[0].weight, raw)
    restored = dict(model.named_parameters())
    assert list(restored) == list(parameters)
    assert all(restored[name] is parameters[name] for name in parameters)


def test_only_training_forwards_follow_the_weight_and_reading_it_never_does() -> None:
    linear = nn.Linear(6, 5)
    model = nn.ModuleDict({"body": linear, "head": nn.Linear(5, 2)})
    put_on(model, "sigma_reparam")
    layer = linear.parametrizations.weight[0]
    with torch.no_grad():
        linear.parametrizations.weight.original.copy_(random_matrix(5, 6))
    started, x = layer.u.clone(), random_matrix(3, 6, seed=1)
    with torch.no_grad():
        linear(x)
    model.eval()
    linear(x)
    model.train()
    _ = linear.weight, linear.weight
    assert torch.equal(layer.u, started)
    expected = random_matrix(5, 6).T @ (random_matrix(5, 6) @ started)
    linear(x)
    torch.testing.assert_close(layer.u, expected / expected.norm(), rtol=20 * EPS, atol=20 * EPS)
    followed = layer.u.clone()
    _ = linear.weight, linear.weight
    assert torch.equal(layer.u, followed)


def test_two_forward_passes_may_come_before_their_backward_passes() -> None:
    linear = nn.Linear(6, 5)
    put_on(nn.ModuleDict({"body": linear, "head": nn.Linear(5, 2)}), "sigma_reparam")
    losses = [linear(random_matrix(3, 6, seed=seed)).sum() for seed in range(2)]
    (losses[0] + losses[1]).backward()
    assert linear.parametrizations.weight[0].gain.grad.isfinite().all()


def test_sigma_stays_in_fp32_under_autocast() -> None:
    weight = random_matrix(9, 7)
    plain = SpectralGain(weight, gain=1.0)
    expected = plain(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(SpectralGain(weight, gain=1.0)(weight), expected)
        plain.advance(weight)
    half = SpectralGain(weight.bfloat16(), gain=1.0)
    assert half(weight.bfloat16()).dtype == torch.bfloat16
    assert half.u.dtype == torch.float32


def test_sigma_reparam_survives_compilation_as_one_graph() -> None:
    torch._dynamo.reset()
    runs = []
    for compiled in (False, True):
        proxy = build_proxy()
        put_on(proxy, "sigma_reparam:gamma=one")
        forward = torch.compile(proxy, backend="eager", fullgraph=True) if compiled else proxy
        for seed in range(2):
            forward(tokens(seed)).square().mean().backward()
            with torch.no_grad():
                for parameter in proxy.parameters():
                    parameter -= 0.1 * parameter.grad
        runs.append(bits(proxy))
    assert runs[0].keys() == runs[1].keys()
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, msg=name)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (nn.Sequential(nn.LayerNorm(4)), "finds no nn.Linear in Sequential besides the output module"),
        (nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(4, 2)), "cannot reach '1': nn.MultiheadAttention"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), "'0': its weight is parametrized"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "divide '1' by its spectral norm: its weight starts at zero"),
    ],
)
def test_sigma_reparam_says_what_it_cannot_reach_and_changes_nothing(model: nn.Sequential, complaint: str) -> None:
    if "zero" in complaint:
        nn.init.zeros_(model[1].weight)
    before = bits(model)
    with pytest.raises(UserError, match=complaint):
        put_on(model, "sigma_reparam", output_module=nn.Identity())
    assert same(bits(model), before)


# logit_softcap


def test_logit_softcap_is_gemma_2s_final_cap_bit_for_bit() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    size = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 2, "attn_implementation": "eager"}
    theirs = Gemma2ForCausalLM(Gemma2Config(**size, final_logit_softcapping=30.0))
    ours = Gemma2ForCausalLM(Gemma2Config(**size, final_logit_softcapping=None))
    with torch.no_grad():
        theirs.lm_head.weight.mul_(1e3)
    ours.load_state_dict(theirs.state_dict())
    ids = tokens()
    raw = ours(ids).logits
    assert raw.abs().amax() > 60  # so that the cap is felt
    _, edit = put_on(ours, "logit_softcap", output_module=ours.get_output_embeddings())
    assert edit is not None
    assert edit.touched == ("lm_head",)
    capped = ours(ids).logits
    assert torch.equal(capped, theirs(ids).logits)
    capped.square().sum().backward()
    theirs(ids).logits.square().sum().backward()
    assert torch.equal(ours.lm_head.weight.grad, theirs.lm_head.weight.grad)
    edit.undo()
    assert torch.equal(ours(ids).logits, raw)


def test_logit_softcap_keeps_the_dtype_of_the_output_module() -> None:
    proxy = build_proxy()
    with torch.no_grad():
        proxy.head.weight.mul_(1e3)
    put_on(proxy, "logit_softcap:limit=5")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = proxy(tokens())
    assert logits.dtype == torch.bfloat16
    assert 4.5 < logits.abs().amax() <= 5


@pytest.mark.parametrize("name", ["logit_softcap", "output_centering", "output_centering:mode=centring"])
def test_without_a_linear_for_the_logits_an_intervention_asks_for_it(name: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"give it as apply\(…, output_module=…\)"):
        put_on(model, name, output_module=model)
    with pytest.raises(UserError, match="the linear that makes the output logits"):
        put_on(model, name, output_module=nn.Linear(2, 2))
    assert hooks_of(model) == 0


# output_centering


def test_mu_loss_and_its_gradient_follow_the_formula() -> None:
    """weight · |μ|², and 2 · weight · μ / V for every row."""
    proxy = build_proxy()
    with torch.no_grad():
        proxy.head.weight.add_(0.5)
    runtime, edit = put_on(proxy, "output_centering:weight=0.3")
    assert edit is not None
    assert edit.touched == ("head",)
    loss = runtime.extra_loss(info_of())
    assert loss is not None
    loss.backward()
    mean = proxy.head.weight.detach().double().mean(0)
    torch.testing.assert_close(loss.detach().double(), 0.3 * mean.square().sum(), rtol=50 * EPS, atol=0)
    expected = (2 * 0.3 * mean / VOCAB).expand(VOCAB, -1)
    torch.testing.assert_close(proxy.head.weight.grad.double(), expected, rtol=50 * EPS, atol=50 * EPS)


def test_mu_centering_empties_the_mean_row_and_leaves_the_softmax_alone() -> None:
    proxy = build_proxy()
    with torch.no_grad():
        proxy.head.weight.add_(random_matrix(16))
        before = proxy(tokens())
        runtime, _ = put_on(proxy, "output_centering:mode=centring")
        assert torch.equal(proxy(tokens()), before)  # nothing happens before the first update
        runtime.after_update(info_of())
        after = proxy(tokens())
    # A mean of V numbers of size 4 at most, and each of the differences, is rounded to eps.
    assert proxy.head.weight.mean(0).abs().amax() <= VOCAB * 4 * EPS
    shift = (after - before).mean(-1, keepdim=True)
    assert shift.abs().amax() > 0.5
    # D products of size 4 · 4 at most, rounded to eps each, twice.
    torch.testing.assert_close(after - before, shift.expand_as(before), rtol=0, atol=2 * 16 * 16 * EPS)
    torch.testing.assert_close(after.softmax(-1), before.softmax(-1), rtol=0, atol=4 * 16 * 16 * EPS)


def test_mu_centering_acts_after_every_update_of_training() -> None:
    arm = "output_centering:mode=centring+model.width=16+data.seq_len=6+optim.lr=0.1"
    training = build_training(Arm.parse(arm).apply(RunConfig()), VOCAB)
    for step in range(1, 4):
        train_step(training, step, tokens(step))
        assert training.model.head.weight.mean(0).abs().amax() <= VOCAB * 4 * EPS


# dyt


@given(alpha=st.floats(0.01, 5), seed=st.integers(0, 50))
@settings(deadline=None, max_examples=20)
def test_dynamic_tanh_follows_the_formula_element_by_element(alpha: float, seed: int) -> None:
    scale, shift, x = (random_matrix(*shape, seed=seed) for shape in [(4,), (4,), (2, 3, 4)])
    layer = DynamicTanh(scale, shift, alpha)
    found = layer(x).detach()
    for b in range(2):
        for t in range(3):
            for d in range(4):
                expected = scale[d].item() * math.tanh(alpha * x[b, t, d].item()) + shift[d].item()
                # |scale|, |shift| < 8 and |alpha x| rounded to eps: three roundings of at most 8 each.
                assert found[b, t, d].item() == pytest.approx(expected, abs=3 * 8 * EPS)


def test_dyt_replaces_every_norm_of_the_proxy_and_keeps_its_roles() -> None:
    proxy = build_proxy(q=Spec("rms_norm"), v=Spec("layer_norm", {"gain": 0.5}))
    before, output = bits(proxy), proxy(tokens())
    _, edit = put_on(proxy, "dyt:alpha=0.25")
    assert edit is not None
    slots = ["pre_attn_norm", "attn.q_norm", "attn.v_norm", "pre_mlp_norm"]
    names = [f"blocks.{i}.{slot}" for i in range(2) for slot in slots] + ["final_norm"]
    assert sorted(edit.touched) == sorted(names)
    for name in names:
        layer = proxy.get_submodule(name)
        assert isinstance(layer, DynamicTanh)
        assert layer.alpha.item() == 0.25
        assert (layer.weight == (0.5 if "v_norm" in name else 1.0)).all()
        found = {leaf: role_of(f"{name}.{leaf}") for leaf, _ in layer.named_parameters()}
        assert found == {"weight": "norm", "bias": "gain", "alpha": "gain"}
    x = random_matrix(2, 16)
    torch.testing.assert_close(proxy.final_norm(x), (0.25 * x).tanh())
    edit.undo()
    assert same(bits(proxy), before)
    assert torch.equal(proxy(tokens()), output)


def test_dyt_knows_norms_of_other_libraries_and_keeps_a_shared_one_shared() -> None:
    from transformers import Gemma2Config, Gemma2Model

    size = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 4}
    gemma = Gemma2Model(Gemma2Config(**size, num_attention_heads=2, num_key_value_heads=2))
    _, edit = put_on(gemma, "dyt", output_module=gemma)
    assert edit is not None
    assert len(edit.touched) == 2 * 4 + 1
    assert (gemma.norm.weight == 1).all()  # Gemma's own weight starts at 0 and counts as 1 + weight
    assert gemma(tokens()).last_hidden_state.isfinite().all()

    norm = nn.LayerNorm(4)
    model = nn.Sequential(norm, nn.Linear(4, 4), norm)
    _, edit = put_on(model, "dyt", output_module=model)
    assert edit is not None
    assert edit.touched == ("0", "2")
    assert model[0] is model[2]
    edit.undo()
    assert model[0] is model[2] is norm


def test_dyt_takes_over_scale_shift_device_and_dtype_of_torchs_norms() -> None:
    model = nn.Sequential(nn.LayerNorm((2, 3)), nn.LayerNorm(4, elementwise_affine=False)).double()
    nn.init.constant_(model[0].bias, 0.5)
    model[0].eval()
    put_on(model, "dyt", output_module=model)
    assert model[0].weight.shape == model[0].bias.shape == (2, 3)
    assert model[0].weight.dtype == model[0].alpha.dtype == torch.float64
    assert (model[0].bias == 0.5).all()
    assert (model[0].training, model[1].training) == (False, True)
    assert model[1].weight.shape == (4,)


def test_dyt_refuses_a_model_without_norms_and_a_norm_without_a_size() -> None:
    with pytest.raises(UserError, match="dyt finds no LayerNorm or RMSNorm inside Sequential"):
        put_on(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "dyt", output_module=nn.Identity())

    class BareRMSNorm(nn.Module):
        pass

    model = nn.Sequential(nn.LayerNorm(3), BareRMSNorm())
    with pytest.raises(UserError, match="dyt cannot tell the size of '1': BareRMSNorm has no weight"):
        put_on(model, "dyt", output_module=nn.Identity())
    assert type(model[0]) is nn.LayerNorm


# qk_clip


def scale_heads(proxy: Proxy, factors: list[list[float]]) -> None:
    """Give the heads of each block logits of very different sizes."""
    with torch.no_grad():
        for block, row in zip(proxy.blocks, factors, strict=True):
            for linear in (block.attn.q, block.attn.k):
                linear.weight.view(2, 8, 16).mul_(torch.tensor(row)[:, None, None])


def maxima(proxy: Proxy) -> list[list[float]]:
    """The largest logit of each block and head by explicit loops, in fp64, from what each attention sees."""
    inputs: list[Tensor] = []
    handles = [b.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for b in proxy.blocks]
    with torch.no_grad():
        proxy(tokens())
    for handle in handles:
        handle.remove()
    found = []
    rope = (proxy.get_buffer("rope_cos").double(), proxy.get_buffer("rope_sin").double())
    for block, x in zip(proxy.blocks, inputs, strict=True):
        q, k = ((x.double() @ w.weight.double().T).view(3, 6, 2, 8) for w in (block.attn.q, block.attn.k))
        q, k = (rotate(part.transpose(1, 2), rope) for part in (q, k))
        logits = [
            [(q[b, h, t] @ k[b, h, s]).item() / math.sqrt(8) for b in range(3) for t in range(6) for s in range(t + 1)]
            for h in range(2)
        ]
        found.append([max(head) for head in logits])
    return found


def clip_once(proxy: Proxy, spec: str) -> None:
    runtime, edit = put_on(proxy, spec)
    assert edit is not None
    proxy(tokens())
    runtime.after_update(info_of())
    edit.undo()


def test_qk_clip_brings_large_heads_to_tau_and_leaves_the_others_bit_for_bit() -> None:
    proxy = build_proxy()
    scale_heads(proxy, [[1.0, 20.0], [20.0, 1.0]])
    before, sizes = bits(proxy), maxima(proxy)
    (small, large), (large_too, small_too) = sizes
    tau = 2 * max(small, small_too)
    assert tau < min(large, large_too)
    clip_once(proxy, f"qk_clip:tau={tau}")
    after = bits(proxy)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"blocks.{i}.attn.{side}.weight" for i in range(2) for side in "qk"}
    for i, (clipped, spared) in enumerate([(1, 0), (0, 1)]):
        for side in "qk":
            new, old = (state[f"blocks.{i}.attn.{side}.weight"].view(2, 8, 16) for state in (after, before))
            assert torch.equal(new[spared], old[spared])
            expected = old[clipped].double() * math.sqrt(tau / sizes[i][clipped])
            # S is a sum of K products of fp32 sums over D inputs; √, the quotient and the product add an eps each.
            torch.testing.assert_close(new[clipped].double(), expected, rtol=(8 + 16 + 3) * EPS, atol=0)
    # Block 1 sees other inputs now that block 0 has changed; for block 0 they are the same.
    assert maxima(proxy)[0][1] == pytest.approx(tau, rel=2 * (8 + 16 + 3) * EPS)
    assert maxima(proxy)[0][0] == small


@pytest.mark.parametrize(("alpha", "power_q", "power_k"), [(0.0, 0.0, 1.0), (1.0, 1.0, 0.0), (0.25, 0.25, 0.75)])
def test_alpha_divides_the_factor_between_queries_and_keys(alpha: float, power_q: float, power_k: float) -> None:
    proxy = build_proxy()
    before, sizes = bits(proxy), maxima(proxy)
    tau = min(max(0.01, s) for s in sizes[0]) / 10
    clip_once(proxy, f"qk_clip:tau={tau},alpha={alpha}")
    for h in range(2):
        for side, power in (("q", power_q), ("k", power_k)):
            new, old = (p[f"blocks.0.attn.{side}.weight"].view(2, 8, 16)[h] for p in (bits(proxy), before))
            expected = old.double() * min(1.0, tau / sizes[0][h]) ** power
            torch.testing.assert_close(new.double(), expected, rtol=(8 + 16 + 3) * EPS, atol=0)


def test_qk_clip_leaves_negative_and_non_finite_logits_alone() -> None:
    proxy = build_proxy()
    with torch.no_grad():
        proxy.blocks[0].attn.k.weight.copy_(-proxy.blocks[0].attn.q.weight)
        proxy.blocks[1].attn.q.weight.mul_(math.inf)
    runtime, _ = put_on(proxy, "qk_clip:tau=1e-6")
    attn = proxy.blocks[0].attn
    x = random_matrix(1, 1, 16)
    rope = (proxy.get_buffer("rope_cos")[:1], proxy.get_buffer("rope_sin")[:1])
    before = bits(proxy)
    attn(x, rope)  # one token: its only logit is -|q|² / √K
    runtime.after_update(info_of())
    assert all(torch.equal(value, before[name]) for name, value in bits(proxy).items())
    proxy.blocks[1].attn(x, rope)
    runtime.after_update(info_of())
    nan = {name for name, value in before.items() if not value.isfinite().all()}
    assert nan == {"blocks.1.attn.q.weight"}
    assert all(torch.equal(value, before[name]) for name, value in bits(proxy).items() if name not in nan)


def test_qk_clip_does_not_see_evaluations() -> None:
    plain, evaluated = build_proxy(), build_proxy()
    for proxy in (plain, evaluated):
        runtime, _ = put_on(proxy, "qk_clip:tau=0.1")
        proxy(tokens())
        if proxy is evaluated:
            with torch.no_grad():
                proxy(tokens(5))
        runtime.after_update(info_of())
    assert same(bits(plain), bits(evaluated))
    assert not same(bits(plain), bits(build_proxy()))


def test_largest_logits_are_those_of_the_statistics() -> None:
    proxy = build_proxy()
    taps = tap_attention(proxy)
    taps.listen()
    proxy(tokens())
    for call in taps.take().values():
        assert torch.equal(largest_logits(call), statistics(call).max_H)


@pytest.mark.parametrize("side", ["q", "k"])
def test_qk_clip_refuses_norms_on_queries_or_keys(side: str) -> None:
    proxy = build_proxy(**{side: Spec("layer_norm")})
    with pytest.raises(UserError, match=f"cannot act through the norm on {side} in 'blocks.0.attn'"):
        put_on(proxy, "qk_clip")
    assert hooks_of(proxy) == 0


def test_every_intervention_that_normalises_queries_or_keys_conflicts_with_qk_clip() -> None:
    clip = plugins.load("interventions", Spec("qk_clip"))
    for name in plugins.names("interventions"):
        cure = plugins.load("interventions", Spec(name))
        norms = cure.edit_config(RunConfig()).model.norms
        excluded = name in clip.conflicts or "qk_clip" in cure.conflicts
        assert excluded or (norms.q is None and norms.k is None), name
    with pytest.raises(ConfigError, match="cannot combine qk_clip with qk_norm; drop one"):
        Arm.parse("qk_clip+qk_norm").apply(RunConfig())


@pytest.mark.parametrize(
    ("attention", "complaint"),
    [
        (lambda core: SimpleNamespace(core=core, q=nn.Linear(2, 2)), "finds no linear 'k'"),
        (
            lambda core: SimpleNamespace(
                core=core, q=nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), k=nn.Linear(2, 2)
            ),
            "its weight is parametrized",
        ),
    ],
)
def test_qk_clip_says_what_it_cannot_find(attention: Callable[[nn.Module], SimpleNamespace], complaint: str) -> None:
    from foreshock.probes.attention import AttentionCore

    with pytest.raises(UserError, match="finds no attention in Sequential"):
        put_on(nn.Sequential(nn.Linear(2, 2)), "qk_clip", output_module=nn.Identity())
    model = nn.Module()
    for name, module in vars(attention(AttentionCore())).items():
        setattr(model, name, module)
    with pytest.raises(UserError, match=complaint):
        put_on(cast(nn.Module, nn.Sequential(model)), "qk_clip", output_module=nn.Identity())
