"""Whole trainings of many families, watched with every default monitor: rows are there, and no monitor stops."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foreshock
from foreshock.core.run_folder import RunFolder
from tests.watched_models import NanoGPT

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

DECODER = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32}
ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

Built = tuple[nn.Module, Callable[[nn.Module], Tensor], str]
"""A model, its loss on one batch, and the path of its first attention."""


def language(name: str, config: str, path: str, **sizes: Any) -> Callable[[], Built]:
    def build() -> Built:
        transformers = pytest.importorskip("transformers")
        model = getattr(transformers, name)(getattr(transformers, config)(**sizes))
        return model, lambda m: m(tokens(), labels=tokens()).loss, path

    return build


def tokens() -> Tensor:
    return torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))


def vit() -> Built:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=3, hidden_dropout_prob=0.0, **ENCODER)
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = transformers.ViTForImageClassification(config)
    return model, lambda m: m(pixels, labels=torch.tensor([0, 1, 2, 0])).loss, ""


def bert() -> Built:
    transformers = pytest.importorskip("transformers")
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **ENCODER))
    return model, lambda m: m(tokens(), labels=tokens()).loss, "bert.encoder.layer.0.attention.self"


class EncoderDecoder(nn.Module):
    """`nn.Transformer` between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.transformer = nn.Transformer(32, 4, 1, 1, 48, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.transformer(x, x, tgt_mask=nn.Transformer.generate_square_subsequent_mask(16)))


def plain(model: Callable[[], nn.Module], path: str) -> Callable[[], Built]:
    return lambda: (model(), lambda m: F.cross_entropy(m(tokens()).flatten(0, 1), tokens().flatten()), path)


FAMILIES: dict[str, Callable[[], Built]] = {
    "gpt2": language(
        "GPT2LMHeadModel", "GPT2Config", "transformer.h.0.attn", vocab_size=50, n_embd=32, n_layer=2, n_head=4
    ),
    "llama": language("LlamaForCausalLM", "LlamaConfig", "model.layers.0.self_attn", **DECODER, **HEADS),
    "qwen2": language("Qwen2ForCausalLM", "Qwen2Config", "model.layers.0.self_attn", **DECODER, **HEADS),
    "gemma2": language("Gemma2ForCausalLM", "Gemma2Config", "model.layers.0.self_attn", **DECODER, **HEADS),
    "vit": vit,
    "bert": bert,
    "nn.Transformer": plain(EncoderDecoder, "transformer.encoder.layers.0.self_attn"),
    "nanogpt": plain(NanoGPT, "h.0.attn"),
}
HUB = ("gpt2", "llama", "qwen2", "gemma2", "vit", "bert")


def watched(family: str, folder: Path, prepare: Callable[[nn.Module], Any]) -> tuple[dict[str, Any], str]:
    """The row of the third of four steps, and the path of the first attention."""
    torch.manual_seed(0)
    model, loss_of, path = FAMILIES[family]()
    called = prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with foreshock.watch(called, optimizer, folder, every=3, budget=None) as w:
        for _ in range(4):
            loss = loss_of(called)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            w.step(loss)
    stopped = [event for event in RunFolder(folder).events() if event["event"] == "monitor_stopped"]
    assert not stopped, stopped
    (row,) = (row for row in RunFolder(folder).metrics() if row["step"] == 3)
    return row, path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_watched_eagerly(family: str, tmp_path: Path) -> None:
    """Every default monitor has rows, finite ones."""
    row, path = watched(family, tmp_path / "run", lambda model: model)
    groups = {key.partition("/")[0] for key in row}
    assert {"loss", "optim", "attention_logits", "output_logits", "norms", "block_outputs", "throughput"} <= groups
    attention = [key.removeprefix("attention_logits/max/") for key in row if key.startswith("attention_logits/max/")]
    assert path in attention or (not path and len(attention) == 2)
    values = [x for value in row.values() for x in (value if isinstance(value, list) else [value])]
    assert torch.tensor(values).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_family_has_the_same_rows(family: str, tmp_path: Path) -> None:
    """As eager ones: the backend runs the traced graphs as they are."""

    def compiled(model: nn.Module) -> Any:
        torch.compiler.reset()
        return torch.compile(model, backend="eager")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what tracing a model of transformers has to say
        found, _ = watched(family, tmp_path / "compiled", compiled)
    expected, _ = watched(family, tmp_path / "eager", lambda model: model)
    same(found, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", HUB)
def test_a_checkpointed_family_has_the_same_rows(family: str, reentrant: bool, tmp_path: Path) -> None:
    """Both kinds of activation checkpointing compute a block twice, and count it once."""

    def checkpointed(model: Any) -> Any:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        return model

    found, _ = watched(family, tmp_path / "checkpointed", checkpointed)
    expected, _ = watched(family, tmp_path / "eager", lambda model: model)
    same(found, expected)


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    timed = ("throughput", "monitors")
    assert found.keys() == expected.keys()
    for key in found:
        if not key.startswith(timed):
            assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-7), key
