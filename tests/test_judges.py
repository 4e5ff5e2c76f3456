"""Judges: on planted data, on documents and digits they have not seen."""

import dataclasses
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.core.errors import ConfigError
from foreshock.images.data import image_data
from foreshock.proxy.data.sources.languages import documents
from foreshock.tasks import _judges as judges
from foreshock.tasks._judges import calibration_error, fragments, train_digit_judge, train_text_judge


def planted(p_same: float, count: int, seed: int, length: int = 400) -> list[bytes]:
    """Documents of a and b in which a letter is followed by itself with a given probability."""
    rng = np.random.default_rng(seed)
    turns = np.cumsum(rng.random((count, length)) > p_same, axis=1) % 2
    return [bytes(row) for row in (turns + ord("a")).astype(np.uint8)]


def truth(text: bytes, p_first: float, p_second: float) -> float:
    """P(second) of a fragment by the chain's own probabilities, from the third letter on."""
    same = sum(a == b for a, b in pairwise(text[1:]))
    other = len(text) - 2 - same
    log_ratio = same * math.log(p_second / p_first) + other * math.log((1 - p_second) / (1 - p_first))
    return 1 / (1 + math.exp(-log_ratio))


@pytest.fixture(scope="module")
def text_judge():
    return train_text_judge(*(documents(150, name, seed=0, split="judge") for name in ("python", "c")))


def test_on_planted_chains_the_judge_is_bayes():
    judge = train_text_judge(planted(0.4, 200, 1), planted(0.6, 200, 2))
    # The chains have order one and two letters: 48,000 bytes a language settle every probability to about 0.01, so
    # the log ratio of 38 letters to about 38 · 0.01 · sqrt(2)/sqrt(38) ~ 0.1, and P to less than 0.05.
    pieces = fragments(planted(0.4, 20, 3) + planted(0.6, 20, 4))
    got = np.array([judge.probability(piece) for piece in pieces])
    exact = np.array([truth(piece, 0.4, 0.6) for piece in pieces])
    assert np.abs(got - exact).mean() < 0.05
    assert 0.8 <= judge.scale <= 1
    # The accuracy is the Bayes rule's: over the same pieces, to five standard deviations of a share.
    labels = np.repeat([0, 1], len(pieces) // 2)
    best = ((exact > 0.5) == labels).mean()
    spread = math.sqrt(best * (1 - best) * (1 / judge.fragments + 1 / len(pieces)))
    assert abs(judge.accuracy - best) < 5 * spread
    assert judge.calibration_error < 0.06


def test_bytes_that_say_a_thing_twice_are_discounted():
    """Every letter written twice: a chain of order two takes an echo for evidence, and the scale takes it back."""
    doubled = [
        [bytes(np.repeat(list(d), 2).astype(np.uint8)) for d in planted(p, 400, n)] for n, p in enumerate((0.45, 0.55))
    ]
    judge = train_text_judge(*(each[:200] for each in doubled))
    pieces = [fragments(each[200:]) for each in doubled]
    truths = np.repeat([0.0, 1.0], [len(each) for each in pieces])

    def error(judge: judges.TextJudge) -> float:
        return calibration_error(np.array([judge.probability(p) for each in pieces for p in each]), truths)

    assert judge.scale < 0.9
    assert error(judge) < 0.75 * error(dataclasses.replace(judge, scale=1.0))


def test_languages_that_are_one_cannot_be_told_apart():
    judge = train_text_judge(planted(0.5, 200, 1), planted(0.5, 200, 2))
    assert abs(judge.accuracy - 0.5) < 5 * 0.5 / math.sqrt(judge.fragments)
    # What the chains learnt is chance, and the scale takes most of it back.
    assert abs(judge.probability(planted(0.5, 1, 3)[0][:40]) - 0.5) < 0.1


def test_the_accuracy_is_of_documents_that_neither_chain_nor_scale_has_seen():
    """The last fifth alone is swapped between the languages: the judge is wrong there, and says so."""
    a, b = planted(0.1, 100, 1), planted(0.9, 100, 2)
    assert train_text_judge(a, b).accuracy > 0.99
    assert train_text_judge(a[:80] + b[80:], b[:80] + a[80:]).accuracy < 0.01


def test_chains_sum_to_one_and_equal_a_slow_reading():
    text = [b"abcabdabcab", b"bca"]
    letters = judges._alphabet(text)
    chain = judges._chain(text, letters)
    np.testing.assert_allclose(chain.sum(-1), 1, rtol=1e-12)
    size, joined = int(letters.max()) + 1, [[int(letters[byte]) for byte in d] for d in text]

    def p(context: tuple[int, ...], letter: int) -> float:
        runs = [tuple(d[i : i + len(context) + 1]) for d in joined for i in range(len(d) - len(context))]
        before = sum(run[:-1] == context for run in runs)
        shorter = p(context[1:], letter) if context else 1 / size
        return (runs.count((*context, letter)) + 4 * shorter) / (before + 4)

    for a in range(size):
        for b in range(size):
            for c in range(size):
                assert chain[a, b, c] == pytest.approx(p((a, b), c), rel=1e-12)


def test_it_tells_the_languages_apart_in_documents_of_another_split(text_judge):
    assert text_judge.accuracy > 0.98
    assert text_judge.calibration_error < 0.02
    pieces = [fragments(documents(60, name, seed=9, split="evaluation")) for name in ("python", "c")]
    p = [np.array([text_judge.probability(piece) for piece in each]) for each in pieces]
    assert (p[0] < 0.5).mean() > 0.98
    assert (p[1] > 0.5).mean() > 0.98


def test_a_text_of_both_languages_is_shared(text_judge):
    python, c = (b"".join(documents(8, name, seed=1, split="fit")) for name in ("python", "c"))
    assert text_judge.share(python[:1200]) < 0.05
    assert text_judge.share(c[:1200]) > 0.95
    assert text_judge.share(python[:1200] + c[:1200]) == pytest.approx(0.5, abs=0.05)
    assert text_judge.share(c[:12]) == text_judge.probability(c[:12])


def test_texts_that_say_nothing(text_judge):
    assert text_judge.probability(b"") == text_judge.probability(b"de") == 0.5
    # Bytes never seen, and what stands beside them.
    assert text_judge.probability(bytes(range(200, 240))) == text_judge.probability(b"\xffde\xffde") == 0.5
    assert text_judge.share(b"") == 0.5


@settings(deadline=None)
@given(text=st.binary(max_size=60))
def test_any_bytes_have_a_probability(text_judge, text):
    assert 0 <= text_judge.probability(text) <= 1


def test_calibration_error_by_hand():
    p = np.array([0.05, 0.05, 0.95, 1.0, 0.5])
    y = np.array([0.0, 1.0, 1.0, 1.0, 0.0])
    assert calibration_error(p, y) == pytest.approx((0.9 + 0.05 + 0.5) / 5)
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    # Ten bins of 2000: each share has a standard deviation of at most 0.011.
    assert calibration_error(p, (rng.random(20_000) < p).astype(float)) < 0.02
    assert calibration_error(p, (rng.random(20_000) < 0.5).astype(float)) == pytest.approx(0.25, abs=0.02)


def test_fragments_are_whole():
    assert fragments([b"x" * 39, b"y" * 85]) == [b"y" * 40] * 2


def test_the_text_judge_refuses():
    with pytest.raises(ConfigError, match="second must be at least 10 documents, got 9"):
        train_text_judge([b"x" * 50] * 10, [b"y" * 50] * 9)
    with pytest.raises(ConfigError, match="fragments of 40 bytes"):
        train_text_judge([b"x" * 50] * 10, [b"y" * 30] * 10)


# --- digits -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return image_data("digits")


def test_the_judge_of_digits_is_right_on_images_it_has_not_seen(digits):
    judge = train_digit_judge()
    right = judge.classes(digits.train_images) == digits.train_labels
    assert judge.images == len(right) == len(digits.train_labels)
    assert judge.accuracy == right.mean() > 0.97
    p = judge.predict(digits.train_images)
    assert p.shape == (len(right), 10)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-9)
    # Graded: what it is sure of it gets right more often.
    sure = p.max(1) > 0.9
    assert right[sure].mean() > right[~sure].mean()
    assert np.array_equal(train_digit_judge().predict(digits.held_out_images), judge.predict(digits.held_out_images))


def test_the_judge_of_digits_learns_from_the_held_out_part_alone(digits):
    """With the labels of one part turned round, judge and accuracy follow the part they should."""
    turned = dataclasses.replace(digits, held_out_labels=9 - digits.held_out_labels)
    assert train_digit_judge(turned).accuracy < 0.05
    other = dataclasses.replace(digits, train_labels=9 - digits.train_labels, train_images=-digits.train_images)
    same = train_digit_judge(other).predict(digits.held_out_images)
    assert np.array_equal(same, train_digit_judge().predict(digits.held_out_images))


def test_without_scikit_learn_the_judge_of_digits_says_what_to_install(digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ConfigError, match=r"pip install 'foreshock\[images\]'"):
        train_digit_judge(digits)
