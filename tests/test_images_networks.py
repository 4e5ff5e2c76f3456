"""Small image networks: twins, shapes, gradients, initial values, learning."""

import hashlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from foreshock.core.errors import ConfigError
from foreshock.images.data import ImageData, held_out_batches, image_data, train_batch
from foreshock.images.networks import build_network, initialise
from foreshock.probes.hooks import blocks_of

NETWORKS = ["resnet", "mobilenet", "plain"]


def batch_norm_relu(channels: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


def group_norm_silu(channels: int) -> nn.Module:
    return nn.Sequential(nn.GroupNorm(1, channels), nn.SiLU())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("depth", [2, 3])
def test_logits_blocks_and_gradients(name, depth):
    seen: list[int] = []

    def layer(channels: int) -> nn.Module:
        seen.append(channels)
        return batch_norm_relu(channels)

    network = build_network(name, layer, width=4, depth=depth, classes=5, in_channels=3)
    logits = network(torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (6, 5)
    assert list(blocks_of(network)) == [f"blocks.{i}" for i in range(depth)]
    assert seen == [module.num_features for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    nn.functional.cross_entropy(logits, torch.arange(6) % 5).backward()
    for path, parameter in network.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, path


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_halve_the_resolution_and_double_the_channels(name):
    network = build_network(name, batch_norm_relu, width=4, depth=5, classes=2)
    shapes = []
    x = network.stem(torch.ones(2, 1, 12, 12))
    for block in network.blocks:
        x = block(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(4, 12, 12)] * 3 + [(8, 6, 6)] * 2
    assert all(conv.bias is None for conv in network.modules() if isinstance(conv, nn.Conv2d))


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_a_block_that_keeps_the_shape_adds_to_its_input(name):
    network = build_network(name, group_norm_silu, width=4, depth=2, classes=2)
    block = network.blocks[0]
    last = block.conv2 if name == "resnet" else block.project
    nn.init.zeros_(last.weight)
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x), x)


def test_a_plain_network_is_a_chain():
    network = build_network("plain", lambda _: nn.ReLU(), width=3, depth=3, classes=2)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    weights = [network.stem.weight, *(block.conv.weight for block in network.blocks)]
    y = nn.functional.conv2d(x, weights[0], padding=1)
    for weight, stride in zip(weights[1:], (1, 1, 2), strict=True):
        y = nn.functional.conv2d(y.relu(), weight, padding=1, stride=stride)
    torch.testing.assert_close(network(x), nn.functional.linear(y.relu().mean((2, 3)), network.head.weight))


@pytest.mark.parametrize("name", NETWORKS)
def test_twins_differ_in_their_layers_alone(name):
    def values(layer: Callable[[int], nn.Module], seed: int, depth: int = 3) -> dict[str, torch.Tensor]:
        network = build_network(name, layer, width=4, depth=depth, classes=5)
        initialise(network, seed)
        return {
            path: p.detach() for path, p in network.named_parameters() if "layer" not in path and "last" not in path
        }

    torch.manual_seed(1)
    normed = values(batch_norm_relu, 7)
    torch.manual_seed(2)
    twin = values(lambda _: nn.PReLU(), 7)
    assert list(normed) == list(twin)
    assert all(torch.equal(normed[path], twin[path]) for path in normed)
    other = values(batch_norm_relu, 8)
    assert not any(torch.equal(normed[path], other[path]) for path in normed if path != "head.bias")
    assert torch.equal(values(batch_norm_relu, 7, depth=4)["stem.weight"], normed["stem.weight"])


def test_initial_values_follow_their_names():
    """The stem by hand, from the documented hash; every convolution's spread; and layers left as they were made."""
    network = build_network("resnet", lambda c: nn.PReLU(c, init=0.125), width=32, depth=2, classes=10)
    initialise(network, 3)
    seed = int.from_bytes(hashlib.sha256(b"3/init/stem.weight").digest()[:8]) >> 1
    drawn = torch.randn(32, 1, 3, 3, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(network.stem.weight, drawn * math.sqrt(2 / 9))
    for path, parameter in network.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if path == "head.bias" else 0.125)).all()
            continue
        fan_in = parameter[0].numel()
        std = math.sqrt((1 if path == "head.weight" else 2) / fan_in)
        # The standard deviation of n normal numbers is off by 1/sqrt(2n) of itself; five of those.
        assert parameter.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * parameter.numel()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "resnets"}, "unknown network 'resnets'; did you mean 'resnet'"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"depth": 1}, "depth must be at least 2"),
        ({"classes": 1}, "classes must be at least 2"),
        ({"in_channels": 0}, "in_channels must be at least 1"),
    ],
)
def test_wrong_networks_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        build_network(layer=batch_norm_relu, **{"name": "resnet", "width": 4, "depth": 2, "classes": 2} | given)


def accuracy(name: str, data: ImageData, steps: int) -> float:
    network = build_network(name, batch_norm_relu, width=8, depth=2, classes=data.classes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for step in range(1, steps + 1):
        images, labels = map(torch.from_numpy, train_batch(data, step, batch_size=64, seed=0))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        images, labels = map(torch.from_numpy, held_out_batches(data, batch_size=320, count=1)[0])
        return (network(images).argmax(1) == labels).double().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("source", ["digits", "shapes"])
def test_networks_learn(name, source):
    """Far above chance (1/10 and 1/8) after 80 batches; the standard error of a share of 320 answers is below 0.03."""
    if source == "digits":
        pytest.importorskip("sklearn")
    assert accuracy(name, image_data(source), 80) > {"digits": 0.85, "shapes": 0.4}[source]
