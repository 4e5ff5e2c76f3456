"""What `condition` trains: the model with its hypernetwork, and batches whose inputs begin with γ.

Shapes: B batch, D hyper-inputs, F features of an image, T tokens.
"""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from foreshock.core.draws import stream_seed
from foreshock.core.run_config import RunConfig
from foreshock.hypernetworks import Design, Hypernetized, hypernetize
from foreshock.images.data import ImageData, Images, held_out_batches, train_batch
from foreshock.proxy.data import batches as tokens_of
from foreshock.proxy.data.prepare import TokenData
from foreshock.tasks import _preferences as preferences
from foreshock.training.batches import Batches
from foreshock.training.setup import build_model

LEVELS = 1 << 20
"""γ is a multiple of 1/LEVELS, so that it can stand among token ids."""
HELD_OUT = 1 << 32
"""Steps of evaluations are counted from here, on seed 0: no training step draws the same."""
PREDICTED = ("blocks.*.mlp.*.weight", "blocks.*norm.weight")
"""What is predicted of a proxy."""


class Conditioned(nn.Module):
    """A model whose inputs (B, D + …) begin with γ."""

    def __init__(self, wrapped: Hypernetized, inputs: int) -> None:
        super().__init__()
        self.wrapped, self.inputs = wrapped, inputs

    def forward(self, packed: Tensor) -> Tensor:
        """The model's logits for each example under the parameters of its own γ."""
        gamma_BD = packed[:, : self.inputs].float() / LEVELS
        logits: Tensor = self.wrapped(gamma_BD, packed[:, self.inputs :])
        return logits


class Perceptron(nn.Module):
    """Linear layers with ReLU between them; no norm anywhere."""

    def __init__(self, features: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        widths = [features, *[width] * depth]
        self.blocks = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.head = nn.Linear(width, classes)

    def forward(self, x_BF: Tensor) -> Tensor:
        """Logits (B, classes)."""
        for block in self.blocks:
            x_BF = block(x_BF).relu()
        logits: Tensor = self.head(x_BF)
        return logits


def conditioned(config: RunConfig, network: str, inputs: int, design: Design, classes: int) -> Conditioned:
    """The model and its hypernetwork, initialised from the run's seed."""
    seed = config.train.seed
    if network == "proxy":
        model: nn.Module = build_model(config, classes)
        chosen: str | tuple[str, ...] = PREDICTED
    else:
        model, chosen = Perceptron(64, config.model.width, config.model.depth, classes), "*"
        _initialise(model, seed)
    wrapped = hypernetize(
        model, parameters=chosen, input_dim=inputs, design=design, seed=stream_seed(seed, "hypernetwork")
    )
    if not design.base:  # what is predicted takes the place of these
        for name in wrapped.names:
            model.get_parameter(name).requires_grad_(False)
    return Conditioned(wrapped, inputs)


def digit_batches(data: ImageData, config: RunConfig, inputs: int) -> Batches:
    """Digits (B, D + 64) and labels (B)."""
    size, seed = config.data.batch_size, config.train.seed

    def packed(images: Images, labels: preferences.Labels, step: int, seed: int) -> tuple[Tensor, Tensor]:
        gamma_BD = _hyper_inputs(len(images), inputs, step, seed)
        labelings = preferences.of_classes(labels, inputs, data.classes)
        targets = preferences.labelled(labelings, gamma_BD / LEVELS, step=step, seed=seed)
        features = np.concatenate([gamma_BD, images.reshape(len(images), -1)], axis=1).astype(np.float32)
        return torch.from_numpy(features), torch.from_numpy(targets)

    def at(step: int) -> tuple[Tensor, Tensor]:
        return packed(*train_batch(data, step, batch_size=size, seed=seed), step, seed)

    held_out = held_out_batches(data, batch_size=size, count=config.train.eval_batches)
    return Batches(at=at, held_out=[packed(*pair, step, 0) for step, pair in enumerate(held_out, HELD_OUT)])


def token_batches(data: TokenData, config: RunConfig, inputs: int) -> Batches:
    """Ids (B, D + T) and targets (B, T)."""
    shape = {"seq_len": config.data.seq_len, "batch_size": config.data.batch_size}
    seed = config.train.seed

    def packed(tokens: preferences.Labels, step: int, seed: int) -> tuple[Tensor, Tensor]:
        gamma_BD = _hyper_inputs(len(tokens), inputs, step, seed)
        labelings = preferences.of_tokens(tokens, inputs)
        targets = preferences.labelled(labelings, gamma_BD / LEVELS, step=step, seed=seed)
        ids = np.concatenate([gamma_BD.astype(np.int64), tokens[:, :-1]], axis=1)
        return torch.from_numpy(ids), torch.from_numpy(targets)

    def at(step: int) -> tuple[Tensor, Tensor]:
        return packed(tokens_of.train_batch(data.train_tokens, step, seed=seed, **shape), step, seed)

    held_out = tokens_of.held_out_batches(data.held_out_tokens, count=config.train.eval_batches, **shape)
    return Batches(at=at, held_out=[packed(tokens, step, 0) for step, tokens in enumerate(held_out, HELD_OUT)])


def _hyper_inputs(batch_size: int, inputs: int, step: int, seed: int) -> preferences.Floats:
    """LEVELS · γ (B, D), whole numbers that fp32 holds."""
    return np.rint(LEVELS * preferences.hyper_inputs(batch_size, inputs, step=step, seed=seed))


def _initialise(model: nn.Module, seed: int) -> None:
    """Weights normal with variance 2/fan_in (1502.01852) from (seed, name), biases zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(stream_seed(seed, f"init/{name}"))
            if parameter.dim() == 2:
                parameter.normal_(0.0, math.sqrt(2 / parameter.shape[1]), generator=generator)
            else:
                parameter.zero_()
