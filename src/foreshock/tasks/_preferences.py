"""Examples with hyper-inputs γ that say how much each of several labelings counts: what a conditioned model learns.

Labeling 0 is the true one. With D hyper-inputs there are D more, and an example, or each of its tokens, is labelled by
labeling i with probability γ_i / D, and truly otherwise: the best a model can do is to follow γ. (The trade-off between
tasks that hypernetworks of a Pareto front learn, 2010.04104, with labels drawn in place of weighted losses.)

Shapes: B batch, D hyper-inputs, T tokens; `...` nothing or T.
"""

import math

import numpy as np
from numpy.typing import NDArray

from foreshock.core.draws import uniform, words

_PURPOSE = 0x707265666572
"""Keeps this stream of random numbers apart from every other one of the same seed."""

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


def hyper_inputs(batch_size: int, inputs: int, *, step: int, seed: int) -> Floats:
    """γ (B, D), uniform in [0, 1): a pure function of (seed, step)."""
    return _uniform((batch_size, inputs), step=2 * step, seed=seed)


def labelled(labelings: Labels, gamma_BD: Floats, *, step: int, seed: int) -> Labels:
    """One label for every example or token, a pure function of (seed, step).

    Args:
        labelings: (1 + D, B, ...), the true one first.
        gamma_BD: hyper-inputs.
        step: 1 for the first training step.
        seed: of the run.
    """
    shape = labelings.shape[1:]
    # Labeling i where u falls into the i-th of D stretches of length γ_i / D.
    ends_BD = gamma_BD.cumsum(axis=1) / gamma_BD.shape[1]
    u = _uniform(shape, step=2 * step + 1, seed=seed)
    place = (u.reshape(len(u), -1, 1) >= ends_BD[:, None, :]).sum(-1).reshape(shape)
    chosen = np.where(place < gamma_BD.shape[1], place + 1, 0)
    labels: Labels = np.take_along_axis(labelings, chosen[None], axis=0)[0]
    return labels


def of_classes(labels_B: Labels, inputs: int, classes: int) -> Labels:
    """Labelings (1 + D, B) of images in ten classes: the i-th calls class c, modulo 10, m · c + i.

    m is 1 for i below 10, then 3, 7 and 9, which have no factor in common with 10: all 40 differ.
    """
    which = np.arange(inputs + 1)[:, None]
    return (np.array([1, 3, 7, 9])[which // classes] * labels_B[None] + which) % classes


def of_tokens(tokens: Labels, inputs: int) -> Labels:
    """Labelings (1 + D, B, T) of token ids (B, T + 1): the next id; the id at a position; the one before it; and so on.

    Where there is none so far back, the first id.
    """
    seen = tokens[:, :-1]
    back = np.arange(seen.shape[1])[None] - np.arange(inputs)[:, None]
    return np.concatenate([tokens[None, :, 1:], np.moveaxis(seen[:, back.clip(min=0)], 1, 0)])


def _uniform(shape: tuple[int, ...], *, step: int, seed: int) -> Floats:
    return uniform(words(math.prod(shape), _PURPOSE, seed, step)).reshape(shape)
