"""Architectures to search on: small image networks, and Transformer proxies whose MLPs activate by the layer."""

import math

import numpy as np
import torch

from foreshock.core.model_config import ModelConfig
from foreshock.images import networks
from foreshock.images.data import ImageData, held_out_batches, train_batch
from foreshock.proxy.data import batches as token_batches
from foreshock.proxy.data.prepare import TokenData
from foreshock.proxy.model import Block, Proxy
from foreshock.proxy.parametrization import initialise
from foreshock.search.architecture import Architecture, Batch, LayerFactory

_HELD_OUT_BATCHES = 4
_COUNTED = 1_000_000


def image_architecture(
    network: str, data: ImageData, *, size: tuple[int, int], lr: float, batch_size: int, seed: int
) -> Architecture:
    """A network of `foreshock.images` on small images, with the layer wherever it has a norm and its activation.

    Args:
        network: its name, such as `resnet`.
        data: the images.
        size: its width and depth.
        lr: peak learning rate of Adam.
        batch_size: images of a batch.
        seed: of its weights and of the order of the images.

    Raises:
        ConfigError: an unknown network (when it is built), or batches larger than the data.
    """
    width, depth = size

    def build(layer: LayerFactory) -> torch.nn.Module:
        model = networks.build_network(network, layer, width=width, depth=depth, classes=data.classes)
        networks.initialise(model, seed)
        return model

    def at(step: int) -> Batch:
        images, labels = train_batch(data, step + 1, batch_size=batch_size, seed=seed)
        return torch.from_numpy(images), torch.from_numpy(labels)

    held_out = [
        (torch.from_numpy(images), torch.from_numpy(labels))
        for images, labels in held_out_batches(data, batch_size=batch_size, count=_HELD_OUT_BATCHES)
    ]
    return Architecture(
        name=f"{network}_{data.name}",
        layout="image",
        chance=math.log(data.classes),
        lr=lr,
        build=build,
        batch=at,
        held_out=lambda: held_out,
    )


def proxy_architecture(
    model: ModelConfig, data: TokenData, *, seq_len: int, batch_size: int, lr: float, seed: int
) -> Architecture:
    """A Transformer proxy with the layer after fc1, in place of the MLP's activation; guessing is by token frequency.

    Args:
        model: what the proxy is made of.
        data: its tokens.
        seq_len: tokens of a sequence.
        batch_size: sequences of a batch.
        lr: peak learning rate of Adam.
        seed: of its weights and of the order of the sequences.

    Raises:
        DataError: the tokens do not fill a batch.
    """
    shape = {"seq_len": seq_len, "batch_size": batch_size}

    def build(layer: LayerFactory) -> torch.nn.Module:
        proxy = Proxy(model, data.vocab_size, seq_len)
        initialise(proxy, model.roles, seed)
        for block in proxy.blocks:
            assert isinstance(block, Block)
            block.mlp.activate = layer(block.mlp.fc1.out_features)
        return proxy

    def at(step: int) -> Batch:
        rows = token_batches.train_batch(data.train_tokens, step + 1, seed=seed, **shape)
        return _cut(torch.from_numpy(rows))

    rows = token_batches.held_out_batches(data.held_out_tokens, count=_HELD_OUT_BATCHES, **shape)
    held_out = [_cut(torch.from_numpy(batch)) for batch in rows]
    return Architecture(
        name="proxy",
        layout="token",
        chance=_entropy(data),
        lr=lr,
        build=build,
        batch=at,
        held_out=lambda: held_out,
    )


def _entropy(data: TokenData) -> float:
    """Entropy in nats of the frequencies of the first million training tokens: what guessing by them costs."""
    counts = np.bincount(data.train_tokens[:_COUNTED])
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _cut(ids: torch.Tensor) -> Batch:
    """Inputs and targets (B, T) of ids (B, T + 1)."""
    return ids[:, :-1], ids[:, 1:]
