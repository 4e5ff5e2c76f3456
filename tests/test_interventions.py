"""What each intervention does, against its formula."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.core import plugins
from foreshock.core.config import Spec, replace_at
from foreshock.core.contracts import StepInfo
from foreshock.core.errors import ConfigError
from foreshock.core.model_config import ModelConfig
from foreshock.core.run_config import RecordConfig, RunConfig, edited, resolve
from foreshock.interventions.qk_norm import QkNorm
from foreshock.interventions.z_loss import ZLoss
from foreshock.probes.attention import statistics, tap_attention
from foreshock.proxy.model import Proxy


def info_of(logits: torch.Tensor) -> StepInfo:
    ids = torch.zeros(logits.shape[:-1], dtype=torch.long)
    return StepInfo(step=1, inputs_BT=ids, targets_BT=ids, logits_BTV=logits, loss=torch.zeros(()))


@given(weight=st.floats(1e-6, 10), seed=st.integers(0, 100))
@settings(deadline=None)
def test_z_loss_and_its_gradient_follow_the_formula(weight: float, seed: int) -> None:
    """d/d logit = 2 · weight · ln Z · softmax / positions."""
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    loss = ZLoss(weight=weight).extra_loss(info_of(logits))
    loss.backward()
    rows = logits.detach().double()
    log_z = rows.exp().sum(-1, keepdim=True).log()
    torch.testing.assert_close(loss.detach().double(), weight * log_z.square().mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.grad.double(), 2 * weight * log_z * rows.softmax(-1) / 6, rtol=1e-4, atol=1e-6)


def test_z_loss_does_not_overflow_and_is_fp32() -> None:
    logits = torch.full((1, 1, 4), 5000.0, dtype=torch.bfloat16)
    loss = ZLoss(weight=1.0).extra_loss(info_of(logits))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((logits[0, 0, 0].item() + math.log(4)) ** 2, rel=1e-6)


def test_z_loss_at_weight_0_adds_nothing_even_to_infinite_logits() -> None:
    assert ZLoss(weight=0.0).extra_loss(info_of(torch.full((1, 1, 2), math.inf))) is None


@pytest.mark.parametrize("weight", [-1e-4, math.nan, math.inf])
def test_z_loss_refuses_a_weight_that_is_none(weight: float) -> None:
    with pytest.raises(ConfigError, match="z_loss:weight must be a finite number"):
        plugins.load("interventions", Spec("z_loss", {"weight": weight}))


@pytest.mark.parametrize("over", ["head", "width"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_qk_norm_changes_the_norms_of_q_and_k_alone(over: str, norm: str) -> None:
    base = RunConfig(record=RecordConfig(monitors=()))
    expected = base
    for path, value in {"norms.q": Spec(norm), "norms.k": Spec(norm), "attention.qkv_norm_over": over}.items():
        expected = replace_at(expected, f"model.{path}", value)
    assert QkNorm(over=over, norm=norm).edit_config(base) == expected


def test_qk_norm_offers_the_nearest_option() -> None:
    with pytest.raises(ConfigError, match="did you mean 'rms_norm'"):
        plugins.load("interventions", Spec("qk_norm", {"norm": "rmsnorm"}))


@pytest.mark.parametrize(("over", "dim"), [("head", 4), ("width", 8)])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_qk_norm_bounds_the_attention_logits(over: str, dim: int, norm: str) -> None:
    """Per head |logit| <= √K at scale 1 whatever the weights; over the width the norms of q and k are √D at most."""
    model = ModelConfig(width=8, depth=1, heads=2)
    spec = Spec("qk_norm", {"over": over, "norm": norm})
    config = edited(replace(RunConfig(model=model), interventions=(spec,)))
    proxy = Proxy(config.model, vocab_size=11, seq_len=6)
    attn = proxy.blocks[0].attn
    assert attn.q_norm.weight.shape == attn.k_norm.weight.shape == (dim,)
    with torch.no_grad():
        attn.q.weight.mul_(1e3)
        attn.k.weight.mul_(1e3)
    taps = tap_attention(proxy)
    taps.listen()
    proxy(torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0)))
    largest = statistics(taps.take()["blocks.0"]).max_abs_H.amax().item()
    bound = dim / 4**0.5  # √dim · √dim / √K
    assert 0.1 * bound < largest <= bound * (1 + 1e-5)
    bare = Proxy(model, vocab_size=11, seq_len=6)
    assert isinstance(bare.blocks[0].attn.q_norm, torch.nn.Identity)


def test_multipliers_combine_whatever_the_base_multiplies_by() -> None:
    """0.3 · 0.1 · (1/3) is another float in another order: that is no conflict."""
    base = replace_at(replace_at(RunConfig(), "model.roles.q.lr", 0.3), "model.width", 192)
    specs = (Spec("muparam"), Spec("qk_lr", {"multiplier": 0.1}))
    config = resolve(replace(base, model=replace(base.model, heads=12), interventions=specs))
    assert edited(config).model.roles.q.lr == pytest.approx(0.3 * 0.1 / 3, rel=1e-12)
