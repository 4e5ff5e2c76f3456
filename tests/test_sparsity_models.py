"""The proxy, Llama with grouped queries, Gemma-2, GPT-2, and Phi-3 with fused linears: sites, masks, exact removal."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from foreshock.core.config import Spec
from foreshock.core.errors import ConfigError
from foreshock.core.model_config import ModelConfig
from foreshock.probes.contributions import matrix_of
from foreshock.probes.generators import Generators
from foreshock.proxy.model import Proxy
from foreshock.proxy.parametrization import initialise
from foreshock.sparsity import sparsify
from foreshock.sparsity.method import Site
from foreshock.sparsity.methods.wina import Wina

VOCAB = 23
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def proxy(mlp: str) -> nn.Module:
    config = ModelConfig(width=16, depth=2, heads=2, mlp=Spec(mlp))
    model = Proxy(config, vocab_size=VOCAB, seq_len=12)
    initialise(model, config.roles, seed=0)
    return model


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "proxy": lambda: proxy("gelu"),
    "proxy_swiglu": lambda: proxy("swiglu"),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**TINY, head_dim=4)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**TINY)),
    "gpt2": gpt2,
}
GATED = {"proxy_swiglu", "llama", "gemma2", "phi3"}
LINEARS = {
    "proxy": {"q", "k", "v", "proj", "fc1", "fc2"},
    "proxy_swiglu": {"q", "k", "v", "proj", "gate", "fc1", "fc2"},
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gemma2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    output = model(ids)
    found: Tensor = getattr(output, "logits", output)
    return found


def batch(name: str) -> Any:
    """Padded where the model takes a mask."""
    if name.startswith("proxy"):
        return tokens(1)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    return [{"input_ids": tokens(1), "attention_mask": mask}]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("method", "gate"),
    [
        ("wina", "topk"),
        ("wina:norms=paper", "threshold"),
        ("teal", "topk"),
        ("cats", "threshold"),
        ("r_sparse", "topk"),
    ],
)
@torch.no_grad()
def test_attach_and_detach_are_exact_inverses(name: str, method: str, gate: Any) -> None:
    model, ids = build(name), tokens()
    dense, weights = logits(model, ids), {key: value.clone() for key, value in model.state_dict().items()}
    if method == "cats" and name not in GATED:
        with pytest.raises(ConfigError, match="gated MLPs"):
            sparsify(model, method)
        return
    generators = Generators()
    with sparsify(model, method, 0.5, batch(name), gate=gate) as handle:
        masked = logits(model, ids)
        assert masked.isfinite().all()
        assert not torch.equal(masked, dense)
        assert generators.agree_with(Generators())
        covered = LINEARS[name] & {"up_proj", "down_proj", "fc1", "fc2"} if method == "cats" else LINEARS[name]
        assert {path.rpartition(".")[2] for path in handle.sparsities} == covered
        assert handle.measured().keys() == handle.sparsities.keys()
        assert all(0 < error < 1 for error in handle.error(batch(name)).values())
    assert torch.equal(logits(model, ids), dense)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not any("sparsity" in type(value).__module__ for m in model.modules() for value in vars(m).values())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_masks_are_those_of_every_linears_own_input(name: str) -> None:
    model, ids = build(name), tokens()
    heard: list[tuple[str, Tensor]] = []
    with sparsify(model, "wina", 0.25) as handle:
        paths = list(handle.sparsities)
        hooks = [
            model.get_submodule(path).register_forward_pre_hook(
                lambda _, inputs, path=path: heard.append((path, inputs[0]))
            )
            for path in paths
        ]
        logits(model, ids)
        for hook in hooks:
            hook.remove()
    assert sorted(path for path, _ in heard) == sorted(paths)
    for path, given in heard:
        inputs = matrix_of(model.get_submodule(path)).shape[1]
        assert given.shape == (2, 8, inputs)
        assert ((given != 0).sum(-1) == inputs * 3 // 4).all()


def test_norms_of_the_paper_are_those_of_keys_and_gates() -> None:
    paper = Wina(norms="paper")
    for name, wanted in {
        "proxy_swiglu": {"k", "gate"},
        "llama": {"k_proj", "gate_proj"},
        "phi3": {"qkv_proj", "gate_up_proj"},
        "gpt2": {"c_attn"},
    }.items():
        model = build(name)
        linears = {path: model.get_submodule(path) for path in sparsify_paths(model)}
        with_norms = set()
        for site in paper.sites(model, linears):
            ones = torch.ones(matrix_of(site.linear).shape[1])
            scores = paper.scores(ones, site)
            expected = Wina().scores(ones, site)
            (with_norms.add(leaf(site)) if torch.equal(scores, expected) else None)
            assert torch.equal(scores, expected if leaf(site) in wanted else ones)
        assert with_norms == wanted


def sparsify_paths(model: nn.Module) -> list[str]:
    with sparsify(model) as handle:
        return list(handle.sparsities)


def leaf(site: Site) -> str:
    return site.path.rpartition(".")[2]


@torch.no_grad()
def test_cats_of_fused_linears_scores_the_half_that_is_the_gate() -> None:
    model: Any = build("phi3")
    mlp = model.model.layers[0].mlp
    given = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    gate, up = F.linear(given, mlp.gate_up_proj.weight).chunk(2, dim=-1)
    kept = F.silu(gate).abs().argsort(dim=-1, descending=True)[:, :12]
    mask = torch.zeros_like(gate).scatter_(-1, kept, 1.0)
    expected = F.linear(F.silu(gate) * up * mask, mlp.down_proj.weight)
    with sparsify(model, "cats", 0.5):
        assert torch.allclose(mlp(given), expected, rtol=1e-5, atol=1e-7)  # fp32 sums of 24 numbers


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@torch.no_grad()
def test_decoding_with_a_cache_masks_single_tokens_though_the_prefill_is_dense(name: str) -> None:
    model, ids = build(name), tokens()
    with sparsify(model, "wina", 0.5, prefill=0.0) as handle:
        dense = model(ids[:, :7], use_cache=True)
        assert set(handle.measured().values()) == {0.0}
        step = model(ids[:, 7:], past_key_values=dense.past_key_values)
        assert set(handle.measured().values()) == {0.5 / 8}
    assert torch.equal(dense.logits, model(ids[:, :7]).logits)
    assert not torch.allclose(step.logits[:, 0], model(ids).logits[:, -1])


def test_modes_gradients_and_requirements_are_left_as_they_were() -> None:
    model = build("gpt2").train()
    model.get_submodule("transformer.h.0.mlp").eval()
    modes = [module.training for module in model.modules()]
    next(model.parameters()).requires_grad_(False)
    with sparsify(model, "wina", 0.5, batch("gpt2")) as handle:
        handle.error(batch("gpt2"))
        assert [module.training for module in model.modules()] == modes
        assert all(parameter.grad is None for parameter in model.parameters())
        torch.autograd.backward(logits(model, tokens()).sum())
    assert sum(parameter.grad is None for parameter in model.parameters()) == 1
