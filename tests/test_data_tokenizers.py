"""Tokenizers: bytes are exact, BPE round-trips and is the same every time."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.core.errors import ConfigError
from foreshock.proxy.data.sources.local_python import LocalPython
from foreshock.proxy.data.tokenizers.bpe import Bpe
from foreshock.proxy.data.tokenizers.bytes import Bytes


@given(st.binary())
def test_bytes_round_trip(document):
    encoder = Bytes().fit([])
    ids = encoder.encode(document)
    assert bytes(ids.tolist()) == document
    assert ids.dtype == np.uint16
    assert (encoder.vocab_size, encoder.eos) == (257, 256)


def test_bpe_without_the_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install foreshock\[bpe\]"):
        Bpe().fit([])


@pytest.mark.parametrize("size", [256, 0, 2**21])
def test_bpe_size_out_of_range(size):
    with pytest.raises(ConfigError, match="bpe:vocab_size must be from 257"):
        Bpe(vocab_size=size)


@pytest.fixture(scope="module")
def documents():
    pytest.importorskip("tokenizers")
    return list(LocalPython().documents(300_000))


@pytest.fixture(scope="module")
def encoder(documents):
    return Bpe(vocab_size=1000).fit(documents)


def test_bpe_is_the_same_every_time(documents, encoder):
    assert Bpe(vocab_size=1000).fit(documents).saved == encoder.saved


def test_bpe_learns_the_size_asked_for_and_compresses(documents, encoder):
    assert encoder.vocab_size == 1000
    ids = encoder.encode(documents[0])
    assert ids.max() < 1000
    assert len(ids) < len(documents[0]) / 2


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_bpe_round_trip_of_any_text(encoder, text):
    from tokenizers import Tokenizer

    ids = encoder.encode(text.encode()).tolist()
    assert Tokenizer.from_str(encoder.saved).decode(ids, skip_special_tokens=False) == text


def test_bpe_text_never_holds_the_end_of_a_document(encoder):
    from tokenizers import Tokenizer

    text = "before <|endoftext|> after"
    ids = encoder.encode(text.encode())
    assert encoder.eos == 0
    assert encoder.eos not in ids
    assert Tokenizer.from_str(encoder.saved).decode(ids.tolist()) == text


def test_bpe_of_a_tiny_corpus_reports_the_size_it_has():
    pytest.importorskip("tokenizers")
    encoder = Bpe().fit([b"ab ab"])
    assert 257 < encoder.vocab_size < 300
