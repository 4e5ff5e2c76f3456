"""Labelled documents as token ids and back, sampling, and perplexity: what steering a language model is measured by.

Shapes: N documents, T tokens, S tokens of a sample, V vocabulary. Whatever hooks are on the model act in all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from foreshock.core.config import Spec
from foreshock.core.errors import ConfigError, require
from foreshock.probes.batches import evaluating
from foreshock.proxy.data.sources.languages import documents, opening
from foreshock.proxy.data.tokenizers.bytes import VOCAB_SIZE

if TYPE_CHECKING:
    from foreshock.proxy.data.prepare import TokenData

_ROWS = 64
"""Sequences in one forward pass: bounds the memory of the logits."""


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Text to the ids a model was trained on, and back."""

    vocab_size: int
    """V."""
    eos: int
    """Id after every document."""
    encode: Callable[[bytes], list[int]]
    """The ids of a document, without the one after it."""
    decode: Callable[[Sequence[int]], bytes]
    """The text of ids; the end of a document has none."""


def codec_of(data: TokenData) -> Codec:
    """The tokenizer that made these tokens.

    Raises:
        ConfigError: the tokens come from a source that holds ids, from a tokenizer that cannot be read back, or the
            library `tokenizers` is missing.
    """
    made_by, saved = data.manifest.get("tokenizer"), data.folder / "tokenizer.json"
    name = made_by["name"] if made_by else None
    if name == "bytes":
        return _byte_codec()
    if name == "bpe" and saved.is_file():
        return _bpe_codec(saved)
    shown = "a source that holds ids" if name is None else str(Spec(**dict(made_by or {})))
    raise ConfigError(f"data.tokenizer: tokens of {shown} cannot be read back as text; take bytes or bpe")


def _byte_codec() -> Codec:
    eos = VOCAB_SIZE - 1
    return Codec(vocab_size=VOCAB_SIZE, eos=eos, encode=list, decode=lambda ids: bytes(i for i in ids if i != eos))


def _bpe_codec(saved: Path) -> Codec:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError("data.tokenizer: bpe needs the library `tokenizers`; pip install foreshock[bpe]") from error
    tokenizer = Tokenizer.from_file(str(saved))
    tokenizer.encode_special_tokens = True  # as when it was learnt; it is not written down
    eos = 0
    return Codec(
        vocab_size=tokenizer.get_vocab_size(),
        eos=eos,
        encode=lambda text: tokenizer.encode(text.decode(errors="replace")).ids,
        decode=lambda ids: tokenizer.decode([i for i in ids if i != eos]).encode(),
    )


def language_ids(count: int, language: str, *, codec: Codec, tokens: int, seed: int, split: str) -> Tensor:
    """The first T tokens of each of N documents in one language, (N, T), the end id before them as in training.

    Documents too short for T tokens are left out, and the next ones taken.

    Args:
        count: N.
        language: `python` or `c`.
        codec: The model's tokenizer.
        tokens: T, the end id included.
        seed: Of the documents.
        split: `train`, `fit`, `judge` or `evaluation`.

    Raises:
        ConfigError: an argument out of range, or T is more than most documents hold.
    """
    require(tokens >= 2, "tokens", "must be at least 2, the end id and one of the document", tokens)
    # Half as many again: documents shorter than the mean are about half of all.
    rows: list[list[int]] = []
    for document in documents(count + count // 2 + 8, language, seed=seed, split=split):
        ids = [codec.eos, *codec.encode(document)][:tokens]
        if len(ids) == tokens:
            rows.append(ids)
    rule = f"is more than {count} documents in {language} of {len(rows)} read hold; lower it"
    require(len(rows) >= count, "tokens", rule, tokens)
    return torch.tensor(rows[:count])


def neutral_prompts(count: int, *, codec: Codec, seed: int, split: str) -> list[Tensor]:
    """Openings that leave the language to the model: the end id, an empty line, a title; N of them, (T,) each."""
    whole = documents(count, "python", seed=seed, split=split)
    return [torch.tensor([codec.eos, *codec.encode(opening(document))]) for document in whole]


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Sequence[Tensor],
    *,
    new_tokens: int,
    eos: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continue each prompt, with the ids that come before the end id.

    A token is the one at which the cumulative probability softmax(logits/temperature) passes a uniform number. Those
    numbers depend on the seed alone: two models, or one with and without an edit, are sampled with the same luck.
    Shorter prompts are filled up on the right, where a causal model does not see it.

    Args:
        model: Ids (N, T) to logits (N, T, V), causal; left in the mode it was in.
        prompts: N tensors of ids, of any lengths; T + S must be within what the model takes.
        new_tokens: S, the most ids of a continuation.
        eos: Id that ends a continuation.
        temperature: 0 takes the likeliest token.
        seed: Of the uniform numbers.

    Raises:
        ConfigError: no prompts, an empty one, or a number out of range.
    """
    require(len(prompts) > 0 and all(len(p) > 0 for p in prompts), "prompts", "must be one or more, none empty", "")
    require(new_tokens >= 1, "new_tokens", "must be at least 1", new_tokens)
    require(temperature >= 0, "temperature", "must be 0 or more", temperature)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids_NT = torch.full((len(prompts), int(lengths.max()) + new_tokens), eos)
    for row, prompt in zip(ids_NT, prompts, strict=True):
        row[: len(prompt)] = prompt
    luck_NS = torch.rand(len(prompts), new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with evaluating(model):
        for start in range(0, len(prompts), _ROWS):
            rows = torch.arange(start, min(start + _ROWS, len(prompts)))
            _continue(model, ids_NT, rows, lengths[rows], luck_NS[rows], temperature)
    starts = zip(ids_NT.tolist(), lengths.tolist(), strict=True)
    continuations = [row[start : start + new_tokens] for row, start in starts]
    return [ids[: ids.index(eos)] if eos in ids else ids for ids in continuations]


def _continue(
    model: nn.Module, ids_NT: Tensor, rows: Tensor, lengths: Tensor, luck_NS: Tensor, temperature: float
) -> None:
    """Write the continuations of some rows in place. What follows an end id is cut off by the caller."""
    device, each, own_NT = device_of(model), torch.arange(len(rows)), ids_NT[rows]
    for step, luck_N in enumerate(luck_NS.T):
        seen = int(lengths.max()) + step
        logits_NTV = model(own_NT[:, :seen].to(device))
        logits_NV = logits_NTV[each, lengths + step - 1].double().cpu()
        if temperature == 0:
            chosen_N = logits_NV.argmax(-1)
        else:
            total_NV = (logits_NV / temperature).softmax(-1).cumsum(-1)
            # Scaled by the last sum, which rounding may leave below one: luck never passes the last token.
            chosen_N = torch.searchsorted(total_NV, luck_N[:, None] * total_NV[:, -1:], right=True)[:, 0]
        own_NT[each, lengths + step] = chosen_N.clamp(max=logits_NV.shape[-1] - 1)
    ids_NT[rows] = own_NT


@torch.no_grad()
def losses(model: nn.Module, ids_NT: Tensor) -> Tensor:
    """Mean over a document's tokens but the first of −log p(token | those before it), (N,), in nats and float64.

    Raises:
        ConfigError: no documents, or of one token.
    """
    require(len(ids_NT) > 0 and ids_NT.shape[1] > 1, "ids", "must hold a document of two tokens", list(ids_NT.shape))
    means: list[Tensor] = []
    with evaluating(model):
        for start in range(0, len(ids_NT), _ROWS):
            rows_NT = ids_NT[start : start + _ROWS].to(device_of(model))
            log_NVT = model(rows_NT[:, :-1]).double().log_softmax(-1).transpose(1, 2)
            means.append(nn.functional.nll_loss(log_NVT, rows_NT[:, 1:], reduction="none").mean(1).cpu())
    return torch.cat(means)


def perplexity(model: nn.Module, ids_NT: Tensor) -> float:
    """Exponential of the mean loss a token of documents (N, T); infinite beyond what exp can give."""
    loss = float(losses(model, ids_NT).mean())
    return math.exp(loss) if loss < math.log(np.finfo(float).max) else math.inf


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies."""
    return next(model.parameters()).device
