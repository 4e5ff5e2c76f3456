"""Judges of what a steered model makes: of the language of a text, and of the class of a digit.

Each is trained on data that no model and no fit has seen, and says how often it is right on data new to itself.

Shapes: N images or fragments, K classes, A letters of an alphabet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreshock.core.errors import ConfigError, require
from foreshock.images.data import ImageData, Images, Labels, image_data

Floats = NDArray[np.float64]

FRAGMENT = 40
"""Bytes of the fragments on which a judge of texts is scaled and tested."""
_FEWEST = 10
"""Documents of each language below which a third of them is too few."""
_WEIGHT = 4.0
"""Counts that the distribution after a shorter context is worth against those after the longer one."""
_BINS = 10
"""Bins of probability in the calibration error."""
_WIDTH, _STRENGTH = 0.02, 100.0
"""Of the judge of digits: factor on the squared distance in the kernel; inverse of the penalty on its weights."""


@dataclass(frozen=True, kw_only=True)
class TextJudge:
    """P(second language) of a text: the logistic function of a scaled log-likelihood ratio of two Markov chains."""

    accuracy: float
    """Share of unseen fragments on whose side it is, from 0 to 1."""
    calibration_error: float
    """Mean over unseen fragments of |P − how often it is so among the fragments of a similar P|, from 0 to 1."""
    scale: float
    """Factor on the log-likelihood ratio: below 1 because neighbouring bytes say the same thing twice."""
    fragments: int
    """How many unseen fragments these are measured on."""
    letters: NDArray[np.int64]
    """(256,): the number of each byte in the alphabet; 0 for all that training did not show."""
    ratio: Floats
    """(A, A, A): log p(third | first two, second language) − the same of the first language."""

    def probability(self, text: bytes) -> float:
        """P(second language); 1/2 for a text of fewer than three bytes, which says nothing."""
        return float(_sigmoid(self.scale * _log_ratio(text, self.letters, self.ratio)))

    def share(self, text: bytes) -> float:
        """Mean of P(second language) over the text's fragments of 40 bytes; over the whole of a shorter text."""
        return float(np.mean([self.probability(piece) for piece in fragments([text]) or [text]]))


def train_text_judge(first: Sequence[bytes], second: Sequence[bytes]) -> TextJudge:
    """A judge between two languages, from documents of each.

    Three fifths of the documents give the chains' counts, a fifth the scale (of the greatest likelihood on their
    fragments of 40 bytes), and a fifth accuracy and calibration error. A chain is of order two:
    p(c | ab) = (n(abc) + κ p(c | b)) / (n(ab) + κ), and likewise down to the uniform distribution, with κ = 4.

    Args:
        first: Documents of the language whose P is 0.
        second: Documents of the language whose P is 1.

    Raises:
        ConfigError: fewer than ten documents of a language, or documents shorter than a fragment.
    """
    for name, given in (("first", first), ("second", second)):
        require(len(given) >= _FEWEST, name, f"must be at least {_FEWEST} documents", len(given))
    letters = _alphabet([*_part(first, 0, 3), *_part(second, 0, 3)])
    chains = [np.log(_chain(_part(given, 0, 3), letters)) for given in (first, second)]
    ratio: Floats = chains[1] - chains[0]
    # A byte that training did not show says nothing; how rare the chains hold it to be tells their lengths alone.
    ratio[0], ratio[:, 0], ratio[:, :, 0] = 0, 0, 0

    def scored(start: int, stop: int) -> tuple[Floats, Floats]:
        pieces = [fragments(_part(given, start, stop)) for given in (first, second)]
        require(min(map(len, pieces)) > 0, "documents", f"must hold fragments of {FRAGMENT} bytes", 0)
        scores = [_log_ratio(piece, letters, ratio) for piece in (*pieces[0], *pieces[1])]
        return np.array(scores), np.repeat([0.0, 1.0], [len(piece) for piece in pieces])

    scale = _likeliest_scale(*scored(3, 4))
    scores_N, truth_N = scored(4, 5)
    p_N = _sigmoid(scale * scores_N)
    return TextJudge(
        accuracy=float(((p_N > 0.5) == truth_N).mean()),
        calibration_error=calibration_error(p_N, truth_N),
        scale=scale,
        fragments=len(p_N),
        letters=letters,
        ratio=ratio,
    )


def fragments(documents: Sequence[bytes]) -> list[bytes]:
    """The documents cut into pieces of 40 bytes, from the start of each; the rest of each is left out."""
    return [d[at : at + FRAGMENT] for d in documents for at in range(0, len(d) - FRAGMENT + 1, FRAGMENT)]


def calibration_error(p_N: Floats, truth_N: Floats) -> float:
    """Σ over ten equal bins of P of (share of samples in the bin) · |mean P − mean truth| (1706.04599, eq. 3)."""
    bins_N = np.minimum((p_N * _BINS).astype(np.int64), _BINS - 1)
    gaps = np.bincount(bins_N, p_N - truth_N, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(p_N))


def _part(documents: Sequence[bytes], start: int, stop: int) -> Sequence[bytes]:
    """From `start` to `stop` fifths of the documents."""
    return documents[len(documents) * start // 5 : len(documents) * stop // 5]


def _alphabet(documents: Sequence[bytes]) -> NDArray[np.int64]:
    seen = np.unique(np.frombuffer(b"".join(documents), np.uint8))
    letters = np.zeros(256, dtype=np.int64)
    letters[seen] = np.arange(1, len(seen) + 1)
    return letters


def _chain(documents: Sequence[bytes], letters: NDArray[np.int64]) -> Floats:
    """p(third | first two), (A, A, A)."""
    size = int(letters.max()) + 1
    p: Floats = np.full(size, 1 / size)
    for order in range(3):
        counts = np.zeros((size,) * (order + 1))
        for document in documents:
            ids = letters[np.frombuffer(document, np.uint8)]
            np.add.at(counts, tuple(ids[at : len(ids) - order + at] for at in range(order + 1)), 1)
        # The distribution after the shorter context is the same whatever stands before it: it is broadcast there.
        p = (counts + _WEIGHT * p) / (counts.sum(-1, keepdims=True) + _WEIGHT)
    return p


def _log_ratio(text: bytes, letters: NDArray[np.int64], ratio: Floats) -> float:
    ids = letters[np.frombuffer(text, np.uint8)]
    return float(ratio[ids[:-2], ids[1:-1], ids[2:]].sum())


def _likeliest_scale(scores_N: Floats, truth_N: Floats) -> float:
    """The s from 0.01 to 1 that makes the truth likeliest under sigmoid(s · score), by a fine grid.

    Where all fragments are told apart the likelihood only grows with s; 1 is what the chains themselves say.
    """
    scales = np.geomspace(0.01, 1, 201)
    signed_N = (2 * truth_N - 1) * scores_N
    return float(scales[np.argmin([np.logaddexp(0, -s * signed_N).mean() for s in scales])])


def _sigmoid(x: Any) -> Any:
    return np.exp(-np.logaddexp(0, -x))


@dataclass(frozen=True, kw_only=True)
class DigitJudge:
    """P(class) of digit images."""

    accuracy: float
    """Share of images it was not trained on whose class it names, from 0 to 1."""
    images: int
    """How many images these are."""
    predict: Callable[[Images], Floats]
    """Images (N, 1, S, S), scaled as the data's, to P (N, K); rows sum to 1."""

    def classes(self, images: Images) -> Labels:
        """The likeliest class of each image, (N,)."""
        labels_N: Labels = self.predict(images).argmax(1)
        return labels_N


def train_digit_judge(data: ImageData | None = None) -> DigitJudge:
    """A judge of digits, trained on the held-out part: no generator that learns from the training part has seen it.

    Its accuracy is measured on the training part, which is new to it. It is logistic regression with the Gaussian
    kernel exp(−0.02 ‖x − x'‖²) over all images it was trained on, by scikit-learn.

    Args:
        data: Images; scikit-learn's digits by default.

    Raises:
        ConfigError: scikit-learn is missing.
    """
    data = image_data("digits") if data is None else data
    try:
        from sklearn.kernel_approximation import Nystroem
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError as error:
        raise ConfigError(
            "the judge of digits needs scikit-learn, which is missing; pip install 'foreshock[images]'"
        ) from error
    # With a component for every image the kernel is exact, and the seed does no more than order them.
    kernel = Nystroem(gamma=_WIDTH, n_components=len(data.held_out_images), random_state=0)
    model = make_pipeline(kernel, LogisticRegression(C=_STRENGTH, max_iter=1000))
    model.fit(_flat(data.held_out_images), data.held_out_labels)

    def predict(images: Images) -> Floats:
        p_NK: Floats = model.predict_proba(_flat(images))
        return p_NK

    right = predict(data.train_images).argmax(1) == data.train_labels
    return DigitJudge(accuracy=float(right.mean()), images=len(right), predict=predict)


def _flat(images: Images) -> Floats:
    return images.reshape(len(images), -1).astype(np.float64)
