"""Batches are pure functions of seed and step; the bigram against slow and exact references."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.core.draws import permutation
from foreshock.core.errors import DataError
from foreshock.proxy.data import bigram
from foreshock.proxy.data.batches import ORDER, held_out_batches, train_batch, window_count
from foreshock.proxy.data.bigram import bigram_loss
from foreshock.proxy.data.sources import synthetic_v1
from foreshock.proxy.data.sources.synthetic_v1 import SyntheticV1

shapes = st.fixed_dictionaries({"seq_len": st.integers(2, 9), "batch_size": st.integers(1, 5)})


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 200), st.integers(0, 3), st.integers(0, 2))
def test_each_epoch_takes_each_window_once(shape, extra, seed, epoch):
    length = shape["batch_size"] * (shape["seq_len"] + 1) + extra
    tokens = np.arange(length, dtype=np.uint16)  # a token says where it stands
    windows = (length - 1) // shape["seq_len"]
    steps = windows // shape["batch_size"]
    seen = []
    for step in range(epoch * steps + 1, (epoch + 1) * steps + 1):
        batch = train_batch(tokens, step, seed=seed, **shape)
        assert batch.shape == (shape["batch_size"], shape["seq_len"] + 1)
        assert batch.dtype == np.int64
        assert (np.diff(batch, axis=1) == 1).all()
        assert (batch[:, 0] % shape["seq_len"] == 0).all()
        seen += (batch[:, 0] // shape["seq_len"]).tolist()
    assert len(set(seen)) == len(seen) == steps * shape["batch_size"]
    assert windows - len(seen) < shape["batch_size"]
    assert max(seen) < windows


def test_a_batch_depends_on_seed_and_step_alone():
    tokens = np.random.default_rng(0).integers(0, 99, 1000).astype(np.uint16)
    shape = {"seq_len": 8, "batch_size": 4}
    forwards = {step: train_batch(tokens, step, seed=1, **shape) for step in range(1, 100)}
    permutation.cache_clear()
    for step in reversed(range(1, 100)):
        assert np.array_equal(train_batch(tokens, step, seed=1, **shape), forwards[step])
    steps_per_epoch = window_count(tokens, 8) // 4
    assert not np.array_equal(forwards[1], train_batch(tokens, 1, seed=2, **shape))
    assert not np.array_equal(forwards[1], forwards[1 + steps_per_epoch])


def test_window_order_is_the_same_everywhere():
    assert permutation(10, ORDER, 0, 0).tolist() == [1, 2, 3, 7, 0, 9, 4, 5, 6, 8]


def test_window_order_is_uniform():
    """Every window is first equally often over seeds: chi-squared with 9 degrees of freedom, bound at p = 1e-6."""
    first = np.bincount(
        [permutation(10, ORDER, seed, epoch)[0] for seed in range(100) for epoch in range(20)], minlength=10
    )
    assert ((first - 200) ** 2 / 200).sum() < 45


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 300), st.integers(1, 6))
def test_held_out_windows_are_distinct_and_even(shape, extra, count):
    length = shape["batch_size"] * (shape["seq_len"] + 1) + extra
    batches = held_out_batches(np.arange(length, dtype=np.uint16), count=count, **shape)
    windows = (length - 1) // shape["seq_len"]
    assert len(batches) == min(count, windows // shape["batch_size"])
    assert all(batch.shape == (shape["batch_size"], shape["seq_len"] + 1) for batch in batches)
    rows = np.concatenate(batches)
    assert (np.diff(rows, axis=1) == 1).all()
    starts = rows[:, 0] // shape["seq_len"]
    gaps = np.diff([*starts, windows])
    assert starts[0] == 0
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_held_out_too_small_names_the_fields():
    with pytest.raises(DataError, match=r"data\.batch_size=4 x data\.seq_len=8 .* lower"):
        held_out_batches(np.zeros(30, dtype=np.uint16), seq_len=8, batch_size=4, count=1)


def naive_bigram(train, batches, vocab_size):
    pairs, singles, losses = Counter(pairwise(train.tolist())), Counter(train[:-1].tolist()), []
    for row in np.concatenate(batches).tolist():
        losses += [-math.log((pairs[p] + 1) / (singles[p[0]] + vocab_size)) for p in pairwise(row)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("vocab_size", [7, 300, 5000, 60_000])
@pytest.mark.parametrize("chunk", [11, 1 << 22])
def test_bigram_equals_a_dictionary(vocab_size, chunk, monkeypatch):
    """Vocabularies on both sides of the size up to which all pairs are tabulated; chunks that cut pairs."""
    monkeypatch.setattr(bigram, "_CHUNK", chunk)
    random = np.random.default_rng(vocab_size)
    train = (vocab_size * random.random(1500) ** 4).astype(np.uint16)
    batches = [(vocab_size * random.random((3, 6)) ** 4).astype(np.int64) for _ in range(4)]
    assert bigram_loss(train, batches, vocab_size) == pytest.approx(naive_bigram(train, batches, vocab_size), rel=1e-12)


def test_bigram_reaches_the_entropy_of_a_first_order_chain():
    """p(b | a) known: the loss is the entropy rate, up to sampling (spread about 0.004)."""
    moves = np.array([[0.8, 0.1, 0.1], [0.2, 0.2, 0.6], [0.5, 0.5, 0.0]])
    random, state, chain = np.random.default_rng(0), 0, []
    for draw in random.random(60_000):
        state = int(np.searchsorted(moves[state].cumsum(), draw))
        chain.append(state)
    tokens = np.array(chain, dtype=np.uint16)
    values, vectors = np.linalg.eig(moves.T)
    stationary = np.real(vectors[:, np.argmax(values.real)])
    stationary /= stationary.sum()
    rate = -sum(stationary[a] * p * math.log(p) for a in range(3) for p in moves[a] if p > 0)
    held_out = held_out_batches(tokens[40_000:], seq_len=10, batch_size=10, count=10_000)
    assert bigram_loss(tokens[:40_000], held_out, 3) == pytest.approx(rate, abs=0.02)


def test_bigram_of_synthetic_is_its_first_order_entropy():
    """The planted gap: what two symbols of context say beyond one, from the stationary distribution."""
    moves = np.zeros((256, 256))
    for state, row in enumerate(synthetic_v1.transitions(np.random.PCG64(0))):
        np.add.at(moves[state], row, 1 / 256)
    stationary = np.linalg.matrix_power(moves, 200)[0]
    joint = (stationary[:, None] * moves).reshape(16, 16, 16, 16).sum(axis=(0, 2))  # (last, next)
    exact = -(joint * np.log(joint / joint.sum(1, keepdims=True))).sum()
    tokens = np.concatenate(list(SyntheticV1().chunks(1_000_000)))
    held_out = held_out_batches(tokens[800_000:], seq_len=64, batch_size=16, count=190)
    assert bigram_loss(tokens[:800_000], held_out, 16) == pytest.approx(exact, abs=0.01)
    assert exact - synthetic_v1.entropy_rate() > 1.0
