"""Steering models of transformers, the proxy, and images: default sites, fits, merges, and nothing left behind."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from foreshock.core.config import Spec
from foreshock.core.errors import UserError
from foreshock.core.model_config import AttentionConfig, ModelConfig, NormSlots
from foreshock.proxy.model import Proxy
from foreshock.steer import LinearAcT, MeanAcT, Steering, fit

VOCAB, T = 40, 7

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL))


def gemma2() -> nn.Module:
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, sliding_window=4))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=T, n_embd=16, n_layer=2, n_head=2))


def proxy() -> nn.Module:
    return Proxy(ModelConfig(width=16, depth=2, heads=2), VOCAB, T)


MODELS = {
    "llama": (llama, "model.layers.{}.post_attention_layernorm"),
    "gpt2": (gpt2, "transformer.h.{}.ln_2"),
    "proxy": (proxy, "blocks.{}.pre_mlp_norm"),
    "gemma2": (
        gemma2,
        "model.layers.{}.post_attention_layernorm model.layers.{}.pre_feedforward_layernorm "
        "model.layers.{}.post_feedforward_layernorm",
    ),
}


def tokens(low: int, seed: int, count: int = 8) -> Tensor:
    return torch.randint(low, low + 20, (count, T), generator=torch.Generator().manual_seed(seed))


def made(name: str) -> tuple[nn.Module, list[str]]:
    torch.manual_seed(0)
    make, sites = MODELS[name]
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, [site.format(block) for block in range(2) for site in sites.split()]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(ids)
    found: Tensor = getattr(output, "logits", output)
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["lineas:steps=4,lr=0.5", "linear_act", "aura"])
def test_transformers_are_steered_and_left_as_they_were(name: str, method: str, tmp_path: Path) -> None:
    model, sites = made(name)
    ids, source, target = tokens(0, 5), tokens(0, 1), tokens(20, 2)
    before, state = logits(model, ids), copy.deepcopy(model.state_dict())
    steering = fit(model, source, target, method=method)
    assert list(steering.maps) == sites
    steered = logits(model, ids)
    assert not torch.allclose(steered, before, atol=1e-4)
    steering.save(tmp_path / "maps.pt")
    steering.strength = 0
    assert torch.equal(logits(model, ids), before)
    steering.remove()
    assert torch.equal(logits(model, ids), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    with Steering.load(model, tmp_path / "maps.pt"):
        assert torch.equal(logits(model, ids), steered)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize(
    ("name", "sites"), [("llama", None), ("gpt2", None), ("proxy", None), ("gemma2", "*.pre_feed*")]
)
def test_merged_is_hooked(name: str, sites: str | None) -> None:
    model, _ = made(name)
    ids = tokens(0, 5)
    before = logits(model, ids)
    steering = fit(model, tokens(0, 1), tokens(20, 2), sites=sites, method="linear_act")
    hooked = logits(model, ids)
    with steering.merge(example=ids[:1]) as merged:
        # A thousand roundings of fp32 of logits of a few units.
        torch.testing.assert_close(logits(model, ids), hooked, rtol=1e-4, atol=1e-4)
        assert merged.touched
    steering.remove()
    assert torch.equal(logits(model, ids), before)


def test_a_post_norm_has_no_linear_to_fold_a_shift_into() -> None:
    model, _ = made("gemma2")
    with (
        fit(model, tokens(0, 1), tokens(20, 2), sites="*.post_feed*", method="linear_act") as steering,
        pytest.raises(UserError, match=r"no linear reads the output of model.layers.0.post_feedforward_layernorm"),
    ):
        steering.merge(example=tokens(0, 5))


def test_batches_of_tokenizers_are_taken_as_they_are() -> None:
    model, sites = made("llama")
    source, target = tokens(0, 1), tokens(20, 2)
    mask = torch.ones_like(source)
    mask[:, -2:] = 0
    padded = {"input_ids": source, "attention_mask": mask}
    with fit(model, padded, target, method="mean_act") as steering:
        masked = steering.maps[sites[0]].b_D
    with fit(model, source[:, :-2], target, method="mean_act") as steering:
        torch.testing.assert_close(masked, steering.maps[sites[0]].b_D, rtol=1e-4, atol=1e-5)


def test_half_precision_keeps_its_dtype_and_fits_in_more() -> None:
    model, sites = made("llama")
    model = model.bfloat16()
    with fit(model, tokens(0, 1), tokens(20, 2), method="lineas:steps=3") as steering:
        assert logits(model, tokens(0, 5)).dtype == torch.bfloat16
        assert steering.maps[sites[0]].omega_D.dtype == torch.float32
        hooked = logits(model, tokens(0, 5)).float()
        with steering.merge(example=tokens(0, 5)):
            # Some twenty roundings of 2^-9 on the way, at random.
            assert (logits(model, tokens(0, 5)).float() - hooked).square().mean().sqrt() < 0.02 * hooked.std()


def test_a_norm_per_head_has_its_channels_last() -> None:
    norms = NormSlots(q=Spec("rms_norm"))
    config = ModelConfig(width=16, depth=1, heads=2, norms=norms, attention=AttentionConfig(qkv_norm_over="head"))
    torch.manual_seed(0)
    model, ids = Proxy(config, VOCAB, T), tokens(0, 1)
    kept: list[Tensor] = []
    q_norm = model.get_submodule("blocks.0.attn.q_norm")
    q_norm.register_forward_hook(lambda _m, _i, out: kept.append(out.detach()))
    steering = fit(model, ids, tokens(20, 2), sites="*.q_norm", method=MeanAcT())
    source_BTHK, target_BTHK = kept[0], kept[1]
    assert source_BTHK.shape == (8, T, 2, 8)
    expected = target_BTHK.mean((0, 1, 2)) - source_BTHK.mean((0, 1, 2))
    torch.testing.assert_close(steering.maps["blocks.0.attn.q_norm"].b_D, expected)


class Painter(nn.Module):
    """An image of a latent and a class, in one step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(3, 12), nn.BatchNorm2d(4)
        self.grow, self.paint = nn.ConvTranspose2d(12, 4, 4), nn.Conv2d(4, 1, 3)

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        painted: Tensor = self.paint(self.norm(self.grow((latent + self.embed(label))[..., None, None])).relu_())
        return painted


@pytest.mark.parametrize("site", ["norm", "grow"])
def test_images_are_steered_by_channel(site: str) -> None:
    torch.manual_seed(0)
    model = Painter().train()
    latents = torch.randn(2, 20, 12)
    statistics = copy.deepcopy(model.norm.state_dict())
    source, target = [(latents[0], torch.zeros(20).long())], [(latents[1], torch.ones(20).long())]
    steering = fit(model, source, target, sites=site, method=LinearAcT())
    assert model.training
    assert all(torch.equal(value, statistics[name]) for name, value in model.norm.state_dict().items())
    model.eval()
    kept: list[Tensor] = []
    model.get_submodule(site).register_forward_hook(lambda _m, _i, out: kept.append(out.detach().mean((2, 3))))
    before = model(*source[0])
    steering.remove()
    assert not torch.allclose(model(*source[0]), before)
    model(*target[0])
    mapped, untouched, wanted = kept
    torch.testing.assert_close(mapped.mean(0), wanted.mean(0))
    assert (mapped.std(0) - wanted.std(0)).abs().max() < (untouched.std(0) - wanted.std(0)).abs().max()


def test_importing_and_declaring_methods_needs_no_torch() -> None:
    code = (
        "import sys, foreshock.steer; from foreshock.core import plugins; from foreshock.core.config import Spec\n"
        "[plugins.resolve('steer.methods', Spec(name)) for name in plugins.names('steer.methods')]\n"
        "print(plugins.names('steer.methods')); assert 'torch' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(["aura", "gaussian_act", "iti", "linear_act", "lineas", "mean_act"])
