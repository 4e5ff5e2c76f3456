"""The corpus of two languages, its documents as ids, sampling and perplexity."""

import ast
import hashlib
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from foreshock.core.config import Spec
from foreshock.core.errors import ConfigError
from foreshock.core.run_config import DataConfig, TrainConfig
from foreshock.proxy.data.prepare import prepare
from foreshock.proxy.data.source import parse_source
from foreshock.proxy.data.sources import languages
from foreshock.proxy.data.sources.languages import SPLITS, SYNTAX, Languages, documents, opening
from foreshock.tasks._languages import codec_of, language_ids, losses, neutral_prompts, perplexity, sample
from foreshock.training.setup import build_model
from tests.conftest import tiny_config

KEYWORDS = {"def", "int", "for", "in", "range", "if", "else", "while", "return", "print", "printf", "and", "or", "not"}
BYTES = DataConfig(source=Spec("languages"), tokenizer=Spec("bytes"), seq_len=16, batch_size=4)
FEW = TrainConfig(steps=2)
ALL = sys.maxsize
GOLDEN = (
    "694b2aeaf42d2ed4a71261784b58b463a0fc5f55ed87becdd4f21c133853b382",
    "48d7ef30399deff967e982ed6aa0a4910540db3f5e8edd1ef846ed2eed1a5517",
)


@pytest.fixture(autouse=True)
def _small_corpus(monkeypatch):
    monkeypatch.setattr(languages, "LENGTH", 100_000)


def words(document: bytes) -> Counter:
    """Identifiers and numbers, without keywords and what C's loops and printf add."""
    text = document.decode().split("\n", 2)[2].replace('"%d\\n", ', "")
    text = re.sub(r"for \(int (\w) = 0; \1 < (\S+); \1\+\+\)", r"for \1 in range(\2)", text)
    return Counter(word for word in re.findall(r"\w+", text) if word not in KEYWORDS)


# --- the corpus -------------------------------------------------------------------------------------------------


def test_golden():
    """These texts are the same on every machine and with every version of numpy."""
    corpus = b"".join(Languages().documents(20_000))
    assert hashlib.sha256(corpus).hexdigest() == GOLDEN[0]
    labelled = b"".join(documents(5, "c", seed=3, split="fit"))
    assert hashlib.sha256(labelled).hexdigest() == GOLDEN[1]


def test_the_corpus_is_one_stream_whatever_the_limit():
    whole = list(Languages().documents(ALL))
    part = list(Languages().documents(30_000))
    assert part == whole[: len(part)]
    assert sum(map(len, part)) <= 30_000 < sum(map(len, whole[: len(part) + 1]))
    assert sum(map(len, whole)) <= 100_000
    assert list(Languages(seed=1).documents(30_000)) != part
    assert list(Languages().documents(10)) == []


def test_the_corpus_holds_both_languages_alike():
    kinds = [b"\ndef " in document for document in Languages().documents(ALL)]
    # A fair coin: five standard deviations.
    assert abs(np.mean(kinds) - 0.5) < 5 * 0.5 / math.sqrt(len(kinds))
    # The language of a document says nothing of that of the next.
    same = [a == b for a, b in pairwise(kinds)]
    assert abs(np.mean(same) - 0.5) < 5 * 0.5 / math.sqrt(len(same))


def test_python_is_python():
    for document in documents(60, "python", seed=0, split="fit"):
        tree = ast.parse(document.split(b"\n", 2)[2])
        compile(tree, "document", "exec")


@pytest.mark.slow
def test_c_is_c(tmp_path):
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler: put gcc or clang on the PATH")
    for at, document in enumerate(documents(100, "c", seed=0, split="fit")):
        file = tmp_path / f"{at}.c"
        file.write_bytes(b"#include <stdio.h>\n" + document.split(b"\n", 2)[2])
        subprocess.run([compiler, "-fsyntax-only", "-Wno-everything", file], check=True)


def test_both_languages_write_one_program_with_the_same_words():
    """The same tree, written twice: every identifier and number occurs as often, in lines of the same indentation."""
    for index in range(100):
        program = languages._program_of(languages._Draws(5, index), "fit")
        python, c = (languages._written(program, syntax) for syntax in SYNTAX.values())
        assert opening(python) == opening(c) == python[: len(opening(python))]
        assert words(python) == words(c)
        indents = [[len(line) - len(line.lstrip()) for line in t.decode().split("\n")] for t in (python, c)]
        closed = [line.strip() for line in c.decode().split("\n")]
        assert indents[0] == [n for n, line in zip(indents[1], closed, strict=True) if line != "}"]


def test_no_word_tells_the_language():
    """Over many different programs the languages use every identifier about equally often."""
    counts = [Counter(), Counter()]
    for count, language in zip(counts, SYNTAX, strict=True):
        for document in documents(300, language, seed=0, split="train"):
            # A function's name is a verb and a noun: one of 120, too rare to count.
            count.update({part for word in words(document) if not word.isdigit() for part in word.split("_")})
    assert counts[0].keys() == counts[1].keys()
    for word in counts[0]:
        shares = [count[word] / 300 for count in counts]
        spread = math.sqrt(2 * np.mean(shares) * (1 - np.mean(shares)) / 300)
        assert abs(shares[0] - shares[1]) <= 5 * spread, word


def test_labelled_documents_depend_on_their_own_index_and_differ_between_seeds():
    ten = documents(10, "python", seed=0, split="judge")
    assert documents(4, "python", seed=0, split="judge") == ten[:4]
    assert not set(documents(10, "python", seed=1, split="judge")) & set(ten)
    assert all(d.split(b"\n")[2].startswith(b"def ") for d in ten)
    assert all(d.split(b"\n")[2].startswith(b"int ") for d in documents(10, "c", seed=0, split="judge"))


def test_no_program_is_in_two_splits_nor_in_both_languages():
    """Across seeds too, and against the corpus; compared as programs, not as texts."""
    seen = {}
    for split in SPLITS:
        for language in SYNTAX:
            for seed in (0, 1):
                for document in documents(15, language, seed=seed, split=split):
                    seen.setdefault(frozenset(words(document).items()), set()).add(split)
    assert all(len(splits) == 1 for splits in seen.values())
    assert len(seen) == len(SPLITS) * len(SYNTAX) * 2 * 15
    corpus = {frozenset(words(document).items()) for document in Languages().documents(ALL)}
    assert all(splits == {"train"} for program, splits in seen.items() if program in corpus)
    assert sorted(eighth for eighths in SPLITS.values() for eighth in eighths) == list(range(8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count must be at least 1"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"language": "pyton"}, "did you mean 'python'"),
        ({"split": "trian"}, "did you mean 'train'"),
    ],
)
def test_documents_refuses(arguments, message):
    given = {"count": 1, "language": "c", "seed": 0, "split": "fit"} | arguments
    with pytest.raises(ConfigError, match=message):
        documents(given.pop("count"), given.pop("language"), **given)


def test_a_config_can_name_it():
    assert parse_source("languages:seed=2") == Spec("languages", {"seed": 2})
    with pytest.raises(ConfigError, match="languages:seed must be 0 or more"):
        parse_source("languages:seed=-1")
    data = prepare(BYTES, FEW)
    assert data.manifest["languages"] == ["python", "c"]
    assert data.manifest["documents"]["held_out"] > 0


# --- ids --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["bytes", "bpe"])
def data(request):
    if request.param == "bpe":
        pytest.importorskip("tokenizers")
    spec = Spec("bytes") if request.param == "bytes" else Spec("bpe", {"vocab_size": 300})
    return prepare(replace(BYTES, tokenizer=spec), FEW)


def test_the_codec_is_the_one_that_made_the_tokens(data):
    codec = codec_of(data)
    assert codec.vocab_size == data.vocab_size
    # The corpus is the documents in their order, an end id after each; the held-out ones are elsewhere.
    ends = np.flatnonzero(data.train_tokens == codec.eos)
    first = data.train_tokens[: ends[0]].tolist()
    corpus = set(Languages().documents(ALL))
    assert codec.decode(first) in corpus
    assert codec.encode(codec.decode(first)) == first
    document = "\nnaïve <|endoftext|>\n".encode()
    assert codec.decode([*codec.encode(document), codec.eos]) == document


def test_tokens_that_are_no_text_are_refused():
    with pytest.raises(ConfigError, match="a source that holds ids cannot be read back"):
        codec_of(prepare(replace(BYTES, source=Spec("synthetic_v1")), FEW))


def test_ids_of_documents(data):
    codec = codec_of(data)
    rows_NT = language_ids(6, "c", codec=codec, tokens=40, seed=0, split="fit")
    assert rows_NT.shape == (6, 40)
    assert rows_NT.dtype == torch.int64
    assert (rows_NT[:, 0] == codec.eos).all()
    whole = documents(6, "c", seed=0, split="fit")
    assert [codec.decode(row) for row in rows_NT.tolist()] == [
        d[: len(codec.decode(r))] for d, r in zip(whole, rows_NT.tolist(), strict=True)
    ]
    for prompt, document in zip(
        neutral_prompts(3, codec=codec, seed=0, split="fit"), documents(3, "python", seed=0, split="fit"), strict=True
    ):
        assert codec.decode(prompt.tolist()) == opening(document)
    with pytest.raises(ConfigError, match="tokens is more than 6 documents in c"):
        language_ids(6, "c", codec=codec, tokens=5000, seed=0, split="fit")
    with pytest.raises(ConfigError, match="tokens must be at least 2"):
        language_ids(6, "c", codec=codec, tokens=1, seed=0, split="fit")


def test_documents_that_are_too_short_make_room_for_the_next():
    codec = codec_of(prepare(BYTES, FEW))
    rows_NT = language_ids(10, "python", codec=codec, tokens=300, seed=0, split="fit")
    long = [d for d in documents(60, "python", seed=0, split="fit") if len(d) >= 299]
    assert [codec.decode(row) for row in rows_NT.tolist()] == [d[:299] for d in long[:10]]


# --- sampling and perplexity ------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Logits of the next id from a table, by the last id alone."""

    def __init__(self, logits_VV):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(logits_VV))

    def forward(self, ids_NT):
        return self.table[ids_NT]


def proxy():
    config = tiny_config()
    return build_model(config, 20), config


def naive_sample(model, prompt, luck, eos, temperature):
    """One prompt at a time, without padding; the first token whose cumulative probability exceeds the number."""
    ids, out = prompt.tolist(), []
    for number in luck.tolist():
        logits = model(torch.tensor([ids]))[0, -1].double()
        if temperature == 0:
            chosen = int(logits.argmax())
        else:
            p, below = (logits / temperature).softmax(-1).tolist(), 0.0
            for chosen, each in enumerate(p):  # noqa: B007
                below += each
                if number < below:
                    break
        if chosen == eos:
            break
        ids.append(chosen)
        out.append(chosen)
    return out


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_sampling_equals_one_prompt_at_a_time(temperature):
    model, _ = proxy()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(20, (length,), generator=generator) for length in (1, 5, 3, 8, 2)]
    luck = torch.rand(5, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    got = sample(model, prompts, new_tokens=8, eos=7, temperature=temperature, seed=4)
    with torch.no_grad():
        assert got == [naive_sample(model, *pair, 7, temperature) for pair in zip(prompts, luck, strict=True)]
    assert got == sample(model, prompts, new_tokens=8, eos=7, temperature=temperature, seed=4)


def test_samples_follow_the_probabilities(monkeypatch):
    table = np.array([[0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [1 / 3, 1 / 3, 1 / 3]])
    model = Chain(np.log(table))
    monkeypatch.setattr("foreshock.tasks._languages._ROWS", 1000)
    got = sample(model, [torch.tensor([0])] * 3000, new_tokens=1, eos=9, seed=1)
    shares = np.bincount([ids[0] for ids in got], minlength=3) / 3000
    # Five standard deviations of a share of 3000.
    np.testing.assert_allclose(shares, table[0], atol=5 * 0.5 / math.sqrt(3000))


def test_sampling_draws_on_no_global_generator_and_leaves_the_model_as_it_was():
    model, _ = proxy()
    model.train()
    model.blocks[0].eval()
    before, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    sample(model, [torch.tensor([1, 2])], new_tokens=3, eos=0)
    losses(model, torch.ones(2, 5, dtype=torch.long))
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_hooks_act_while_sampling_and_scoring():
    model = Chain(torch.zeros(4, 4))
    ids = torch.tensor([[0, 1, 2]])
    assert perplexity(model, ids) == pytest.approx(4, rel=1e-12)
    favoured = torch.tensor([0.0, 0.0, 60.0, 0.0])
    handle = model.register_forward_hook(lambda _module, _inputs, out: out + favoured)
    assert sample(model, [torch.tensor([0])], new_tokens=3, eos=1) == [[2, 2, 2]]
    assert perplexity(model, ids) > 1e12
    handle.remove()
    assert perplexity(model, ids) == pytest.approx(4, rel=1e-12)


def test_losses_are_those_of_a_loop():
    model, _ = proxy()
    ids_NT = torch.randint(20, (70, 6), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = [
            np.mean([-float(model(row[None, :t])[0, -1].double().log_softmax(-1)[row[t]]) for t in range(1, 6)])
            for row in ids_NT
        ]
    # The model works in float32: logits of order one, to about 1e-6 whatever the batch.
    np.testing.assert_allclose(losses(model, ids_NT).numpy(), expected, atol=1e-5)
    assert perplexity(model, ids_NT) == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)


def test_perplexity_of_the_impossible_is_infinite():
    assert perplexity(Chain(torch.tensor([[0.0, -1e6], [0.0, 0.0]])), torch.tensor([[0, 1]])) == math.inf


def test_sampling_refuses():
    model = Chain(torch.zeros(2, 2))
    with pytest.raises(ConfigError, match="prompts must be one or more"):
        sample(model, [], new_tokens=1, eos=0)
    with pytest.raises(ConfigError, match="prompts must be one or more"):
        sample(model, [torch.tensor([], dtype=torch.long)], new_tokens=1, eos=0)
    with pytest.raises(ConfigError, match="new_tokens must be at least 1"):
        sample(model, [torch.tensor([0])], new_tokens=0, eos=0)
    with pytest.raises(ConfigError, match="temperature must be 0 or more"):
        sample(model, [torch.tensor([0])], new_tokens=1, eos=0, temperature=-1.0)
    with pytest.raises(ConfigError, match="a document of two tokens"):
        losses(model, torch.zeros(1, 1, dtype=torch.long))
