"""Counted multiply-accumulates give the published tables digit by digit, and agree with torch's own counter."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from foreshock.core.config import Spec
from foreshock.core.errors import ConfigError, UserError
from foreshock.core.model_config import ModelConfig
from foreshock.probes.linears import linears_of
from foreshock.proxy.model import Proxy
from foreshock.sparsity.macs import PUBLISHED, Shape, macs, macs_of, rows, shape_of
from foreshock.sparsity.rotation import rotate

WITH_ROTATIONS = {
    "Qwen2.5-7B": ("12.9", "26.7", "36.0", "49.8"),
    "Llama-2-7B": ("8.3", "23.0", "32.8", "47.5"),
    "Llama-3-8B": ("8.9", "22.9", "32.2", "46.1"),
    "Phi-4-14B": ("9.3", "23.7", "33.4", "47.8"),
}
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 29,
    "pad_token_id": 0,
}


def hugging_face(name: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="pip install 'foreshock[hf]' to run it")
    config = getattr(transformers, f"{name}Config")(**settings)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


def proxy(mlp: str) -> nn.Module:
    return Proxy(ModelConfig(width=16, depth=3, heads=2, mlp=Spec.parse(mlp)), 29, 7)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tables_are_recounted_as_printed(name: str) -> None:
    printed = PUBLISHED[name]
    assert f"{macs(printed.shape).total / 1e9:.2f}" == printed.dense
    for sparsity, figure in printed.sparse.items():
        assert f"{macs(printed.shape, sparsity).total / 1e9:.2f}" == figure
    assert f"{100 * (1 - float(printed.sparse[0.65]) / float(printed.dense)):.1f}" == printed.saving
    # Phi-4's saving is that of the rounded totals; the exact ones give a tenth less.
    assert f"{100 * macs(printed.shape, 0.65).saving:.1f}" == {"Phi-4-14B": "62.6"}.get(name, printed.saving)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_the_rotations_leave_of_the_saving(name: str) -> None:
    shape = PUBLISHED[name].shape
    found = tuple(f"{100 * macs(shape, s, rotations=True).saving:.1f}" for s in (0.25, 0.4, 0.5, 0.65))
    assert found == WITH_ROTATIONS[name]
    assert macs(shape, rotations=True).saving < 0


def test_rows_are_the_printed_figures() -> None:
    found = rows(PUBLISHED["Phi-4-14B"].shape)
    assert [row["GMACs"] for row in found] == ["14.15", "10.74", "8.69", "7.33", "5.28"]
    assert [row["saving with rotations"] for row in found][1:] == [f"{x} %" for x in WITH_ROTATIONS["Phi-4-14B"]]
    assert found[0]["sparsity"] == "0 %"


@given(
    sizes=st.tuples(*[st.integers(1, 64)] * 5),
    sparsity=st.floats(0, 1, exclude_max=True),
    gated=st.booleans(),
    rotations=st.booleans(),
)
def test_a_sum_over_every_weight_is_the_same(
    sizes: tuple[int, ...], sparsity: float, gated: bool, rotations: bool
) -> None:
    layers, d, kv, f, vocab = sizes
    found = macs(
        Shape(layers=layers, width=d, kv_width=kv, hidden=f, vocab=vocab, gated=gated), sparsity, rotations=rotations
    )
    total = 0.0
    for _ in range(layers):
        for inputs, outputs in [(d, d), (d, kv), (d, kv), (d, d), (d, f), (f, d), *([(d, f)] if gated else [])]:
            total += inputs * outputs * (1 - sparsity)
        total += 2 * d * d if rotations else 0
    assert found.total == pytest.approx(total + d * vocab, rel=1e-12)  # a sum of some 10³ terms in fp64


@pytest.mark.parametrize(
    ("name", "settings", "shape"),
    [
        ("Llama", SMALL, {"kv_width": 8}),
        ("Llama", SMALL | {"tie_word_embeddings": True}, {"kv_width": 8}),
        ("Llama", SMALL | {"head_dim": 8}, {"kv_width": 16, "q_width": 32}),
        ("Gemma2", SMALL | {"head_dim": 4}, {"kv_width": 8}),
        ("Phi3", SMALL, {"kv_width": 8}),
        (
            "GPT2",
            {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_inner": 24, "vocab_size": 29},
            {"kv_width": 16, "gated": False},
        ),
    ],
)
def test_the_shape_of_a_model(name: str, settings: dict[str, Any], shape: dict[str, Any]) -> None:
    model = hugging_face(name, **settings)
    expected = Shape(**({"layers": 3, "width": 16, "hidden": 24, "vocab": 29} | shape))
    assert shape_of(model) == expected
    assert macs(expected).total == macs_of(model, {}).total
    uniform = macs_of(model, dict.fromkeys(linears_of(model), 0.4))
    assert uniform.total == pytest.approx(macs(expected, 0.4).total, rel=1e-12)
    assert uniform.saving == pytest.approx(macs(expected, 0.4).saving, rel=1e-12)


def test_the_shape_of_the_proxy() -> None:
    assert shape_of(proxy("gelu")) == Shape(layers=3, width=16, kv_width=16, hidden=64, vocab=29, gated=False)
    gated = shape_of(proxy("swiglu"))
    hidden = len(proxy("swiglu").get_parameter("blocks.0.mlp.fc1.weight"))
    assert (gated.gated, gated.hidden) == (True, hidden)


def test_torchs_counter_agrees() -> None:
    """It counts attention too: the difference at two lengths is quadratic, and what is left for one token is linear."""
    model = proxy("swiglu").eval()

    def flops(tokens: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, tokens, dtype=torch.long))
        return int(sum(count for name, count in counter.get_flop_counts()["Global"].items() if name.__name__ == "mm"))

    per_token = macs_of(model, {}).total
    for tokens in (1, 5):
        assert flops(tokens) == 2 * tokens * per_token


def test_sparsity_by_linear() -> None:
    model = proxy("gelu")
    found = macs_of(model, {"blocks.0.attn.k": 0.5, "blocks.2.mlp.fc2": 0.75, "head": 0.25}, rotations=1000)
    assert found.linears == macs_of(model, {}).linears - 0.5 * 16 * 16 - 0.75 * 64 * 16
    assert (found.head, found.rotations) == (0.75 * 16 * 29, 1000)
    assert found.total == found.linears + found.head + 1000
    assert found.dense == macs_of(model, {}).total
    assert found.saving == 1 - found.total / found.dense


def test_what_a_rotation_adds() -> None:
    model = hugging_face("Llama", **SMALL)
    with rotate(model, torch.zeros(1, 4, dtype=torch.long)) as rotated:
        uniform = dict.fromkeys(linears_of(model), 0.5)
        found = macs_of(model, uniform, rotations=rotated.macs)
        assert found == macs(shape_of(model), 0.5, rotations=True)


def test_a_plain_stack_of_linears_is_counted() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    assert macs_of(model, {"0": 0.5}).total == 12 + 12
    with pytest.raises(UserError, match="use macs_of"):
        shape_of(model)


def test_blocks_that_differ_have_no_shape() -> None:
    model = proxy("gelu")
    model.get_submodule("blocks.1.mlp").fc1 = nn.Linear(16, 63)
    with pytest.raises(UserError, match="blocks differ"):
        shape_of(model)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_outside_is_refused(sparsity: float) -> None:
    with pytest.raises(ConfigError, match=r"sparsity must be in \[0, 1\)"):
        macs(PUBLISHED["Qwen2.5-7B"].shape, sparsity)
    with pytest.raises(ConfigError, match=r"sparsities\['blocks.0.attn.k'\] must be in"):
        macs_of(proxy("gelu"), {"blocks.0.attn.k": sparsity})


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown linear 'blocks.0.attn.kk'; did you mean 'blocks.0.attn.k'"):
        macs_of(proxy("gelu"), {"blocks.0.attn.kk": 0.5})
    with pytest.raises(ConfigError, match="rotations must be 0 or more"):
        macs_of(proxy("gelu"), {}, rotations=-1)
    with pytest.raises(UserError, match="has no linears"):
        macs_of(nn.LayerNorm(3), {})
    with pytest.raises(ConfigError, match="kv_width must be at least 1"):
        Shape(layers=1, width=1, kv_width=0, hidden=1, vocab=1)
    with pytest.raises(ConfigError, match="vocab must be 0 or more"):
        Shape(layers=1, width=1, kv_width=1, hidden=1, vocab=-1)


def test_models_without_numbers_are_counted() -> None:
    """On the meta device, where models of billions are laid out."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 11008), nn.Linear(11008, 4096))
    assert macs_of(model, {"0": 0.5}).total == 4096 * 11008 * 1.5
