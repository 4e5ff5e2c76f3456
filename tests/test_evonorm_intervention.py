"""EvoNorm put into the proxy and into other people's models."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreshock.core import plugins
from foreshock.core.config import Spec
from foreshock.core.contracts import Edit
from foreshock.core.errors import ConfigError, UserError
from foreshock.core.model_config import ModelConfig, NormSlots
from foreshock.core.run_config import RunConfig
from foreshock.interventions import apply
from foreshock.proxy.model import Proxy
from foreshock.proxy.parametrization import initialise, role_of
from foreshock.testing import check_intervention


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def proxy(mlp: str = "gelu", **norms: Spec) -> Proxy:
    config = ModelConfig(width=16, depth=2, heads=2, mlp=Spec(mlp), norms=NormSlots(**norms))
    model = Proxy(config, vocab_size=11, seq_len=6)
    initialise(model, config.roles, seed=0)
    return model


def put_on(model: nn.Module, spec: str) -> Edit:
    edit: Edit = plugins.load("interventions", Spec.parse(spec)).edit_model(model)
    return edit


TOKEN_IDS = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("at", ["mlp", "norms", "both"])
@pytest.mark.parametrize("layer", ["s0", "s1", "s2"])
def test_the_contract_holds_for_every_option(layer: str, at: str) -> None:
    check_intervention(f"evonorm:layer={layer},at={at}")


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("layer", ["s0", "s1", "s2"])
def test_the_proxys_mlp_normalises_what_it_activates(mlp: str, layer: str) -> None:
    model = proxy(mlp)
    state, output = {k: v.clone() for k, v in model.state_dict().items()}, model(TOKEN_IDS)
    edit = put_on(model, f"evonorm:layer={layer}")
    assert edit.touched == ("blocks.0.mlp.activate", "blocks.1.mlp.activate")
    new = {name: role_of(name) for name, _ in model.named_parameters() if name not in state}
    leaves = {"weight": "norm", "bias": "gain"} | ({"v": "gain"} if layer == "s0" else {})
    assert new == {f"{path}.norm.{leaf}": role for path in edit.touched for leaf, role in leaves.items()}
    part: Any = model.blocks[0].mlp
    x, gated = random(2, 16, dtype=torch.float32), part.gate is not None
    hidden = (part.gate if gated else part.fc1)(x)
    over = hidden.var(-1, False, keepdim=True) if layer != "s2" else hidden.square().mean(-1, True)
    activated = F.silu(hidden) / (over + 1e-5).sqrt() * (part.fc1(x) if gated else 1)
    torch.testing.assert_close(part(x), part.fc2(activated))
    model(TOKEN_IDS).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    edit.undo()
    assert list(model.state_dict()) == list(state)
    assert torch.equal(model(TOKEN_IDS), output)


def test_norms_give_way_to_the_form_without_activation() -> None:
    model = proxy(q=Spec("rms_norm"), v=Spec("layer_norm", {"gain": 0.5}))
    state, output = {k: v.clone() for k, v in model.state_dict().items()}, model(TOKEN_IDS)
    edit = put_on(model, "evonorm:layer=s2,at=both")
    slots = ["pre_attn_norm", "attn.q_norm", "attn.v_norm", "pre_mlp_norm", "mlp.activate"]
    assert sorted(edit.touched) == sorted([f"blocks.{i}.{slot}" for i in range(2) for slot in slots] + ["final_norm"])
    x = random(2, 16, dtype=torch.float32)
    for name, scale in {"blocks.1.attn.v_norm": 0.5, "final_norm": 1.0}.items():
        layer = model.get_submodule(name)
        dim = layer.get_parameter("weight").numel()
        assert {role_of(f"{name}.{leaf}") for leaf, _ in layer.named_parameters()} == {"norm", "gain"}
        torch.testing.assert_close(layer(x[:, :dim]), scale * F.rms_norm(x[:, :dim], (dim,), eps=1e-3))
    edit.undo()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(TOKEN_IDS), output)


def test_scale_shift_dtype_mode_and_whether_they_are_trained_are_taken_over() -> None:
    parts = [nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)]
    model = nn.Sequential(*parts).double()
    norm: Any = model[2]
    nn.init.constant_(norm.bias, 0.5)
    model[0].requires_grad_(False)
    norm.requires_grad_(False)
    model.eval()
    edit = put_on(model, "evonorm:at=both")
    assert edit.touched == ("1", "4", "2")
    assert [model[i].weight.numel() for i in (1, 4, 2)] == [6, 8, 6]
    assert (model[2].bias == 0.5).all()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert [all(p.requires_grad for p in model[i].parameters()) for i in (1, 4, 2)] == [False, True, False]
    assert not any(module.training for module in model.modules())
    edit.undo()
    assert [type(module).__name__ for module in model] == ["Linear", "GELU", "LayerNorm", "Linear", "ReLU", "Linear"]
    assert model[2] is norm


def test_a_shared_norm_stays_shared_and_an_image_norm_stays() -> None:
    class LayerNorm2d(nn.LayerNorm):
        """As timm's: over the channels of images."""

    norm, kept = nn.LayerNorm(4), LayerNorm2d(4)
    model = nn.Sequential(norm, nn.Linear(4, 4), norm, kept)
    edit = put_on(model, "evonorm:at=norms")
    assert edit.touched == ("0", "2")
    assert model[0] is model[2]
    assert model[3] is kept
    edit.undo()
    assert model[0] is model[2] is norm


@pytest.mark.parametrize("at", ["mlp", "norms", "both"])
@pytest.mark.parametrize("activation", [F.gelu, nn.ReLU()], ids=["function", "module"])
def test_torchs_encoder_evaluates_what_it_trains(at: str, activation: Any) -> None:
    """Its fused path, padding included, would compute ReLU and LayerNorm with what it finds."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation=activation, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    plain = encoder.train()(x, src_key_padding_mask=padding)[~padding]
    with apply(encoder, f"evonorm:at={at}") as applied:
        assert len(applied.touched["evonorm"]) == {"mlp": 2, "norms": 4, "both": 6}[at]
        expected = encoder.train()(x, src_key_padding_mask=padding)[~padding]
        with torch.no_grad():
            found = encoder.eval()(x, src_key_padding_mask=padding)[~padding]
        torch.testing.assert_close(found, expected)
        assert (expected - plain).abs().amax() > 0.01
    assert torch.equal(encoder.train()(x, src_key_padding_mask=padding)[~padding], plain)


def test_it_is_trained_in_somebodys_loop_and_taken_off_again() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    members = list(optimizer.param_groups[0]["params"])
    with apply(model, "evonorm:at=both", optimizer) as applied:
        assert applied.touched == {"evonorm": ("1", "2", "group 0")}
        assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
        before = [p.detach().clone() for p in model.parameters()]
        applied.loss(model(random(5, 4, dtype=torch.float32)).square().mean()).backward()
        optimizer.step()
        assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert list(optimizer.param_groups[0]["params"]) == members == list(model.parameters())


@pytest.mark.slow
def test_models_of_transformers_are_reached() -> None:
    from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

    gpt2 = GPT2Model(GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=8))
    assert put_on(gpt2, "evonorm").touched == ("h.0.mlp.act", "h.1.mlp.act")
    assert gpt2.h[0].mlp.act.weight.shape == (32,)
    size = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    llama = LlamaModel(LlamaConfig(**size, num_attention_heads=2, num_key_value_heads=2))
    assert put_on(llama, "evonorm:at=both").touched[:2] == ("layers.0.mlp.act_fn", "layers.1.mlp.act_fn")
    assert llama.layers[0].mlp.act_fn.weight.shape == (12,)
    for model in (gpt2, llama):
        assert model(TOKEN_IDS).last_hidden_state.isfinite().all()


class BareRMSNorm(nn.Module):
    pass


@pytest.mark.parametrize(
    ("model", "at", "complaint"),
    [
        (nn.Sequential(nn.GELU(), nn.Linear(2, 2)), "mlp", "finds no GELU, ReLU or SiLU behind a linear in Sequential"),
        (nn.Sequential(nn.Linear(2, 2), nn.Tanh()), "both", "finds no GELU, ReLU or SiLU .* evonorm:at=norms"),
        (nn.Sequential(nn.Linear(2, 2), nn.GELU()), "norms", "finds no LayerNorm or RMSNorm inside Sequential"),
        (nn.Sequential(nn.Linear(2, 2), nn.GELU()), "both", "finds no LayerNorm or RMSNorm .* evonorm:at=mlp"),
        (nn.Sequential(nn.LayerNorm(3), BareRMSNorm()), "norms", "cannot replace '1': BareRMSNorm has no size"),
        (nn.Sequential(nn.LayerNorm((2, 3))), "norms", "cannot replace '0': LayerNorm has no size, or not just one"),
    ],
)
def test_a_model_without_a_place_is_refused_and_left_alone(model: nn.Sequential, at: str, complaint: str) -> None:
    before = list(model)
    with pytest.raises(UserError, match=complaint):
        put_on(model, f"evonorm:at={at}")
    assert list(model) == before


@pytest.mark.parametrize(
    ("interventions", "norms", "complaint"),
    [
        (("evonorm:at=both", "dyt"), NormSlots(), "evonorm:at must be mlp beside dyt"),
        (("evonorm:at=norms",), NormSlots(pre_attn=None, pre_mlp=None, final=None), "must have a layer_norm or an rms"),
        (("evonorm", "dyt"), NormSlots(pre_attn=None, pre_mlp=None, final=None), ""),
    ],
)
def test_a_run_it_cannot_work_in_is_refused_while_planning(
    interventions: tuple[str, ...], norms: NormSlots, complaint: str
) -> None:
    specs = tuple(Spec.parse(text) for text in interventions)
    config = RunConfig(interventions=specs, model=ModelConfig(norms=norms))
    cure = plugins.load("interventions", specs[0])
    if complaint:
        with pytest.raises(ConfigError, match=complaint):
            cure.check(config)
    else:
        cure.check(config)


def test_options_that_do_not_exist_are_refused() -> None:
    for spec, complaint in {"evonorm:layer=b0": "s0, s1, s2", "evonorm:at=norm": "did you mean 'norms'"}.items():
        with pytest.raises(ConfigError, match=complaint):
            put_on(nn.Identity(), spec)
