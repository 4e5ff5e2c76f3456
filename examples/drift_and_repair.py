"""A training that goes wrong, seen in its channels, measured by layer, and repaired as far as affine maps can.

Run it as `python examples/drift_and_repair.py out/drift`. A tiny proxy is trained to a healthy checkpoint. From there a
few steps at a learning rate that is too high make a spike, and many of them, at one higher still, ruin it. Maps by
channel move the activations of both back towards the checkpoint's. Of the spike they undo a part; the ruined model they
make worse, whose head has learned to do with other activations.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foreshock
from foreshock import steer
from foreshock.core.model_config import ModelConfig
from foreshock.core.run_config import DataConfig, RunConfig
from foreshock.core.run_folder import RunFolder
from foreshock.training.setup import build_model

VOCAB, LENGTH, BATCH = 32, 48, 16
HEALTHY_STEPS, HEALTHY_LR = 400, 3e-3
DAMAGES = {"spike": (3, 3e-2), "ruin": (40, 1e-1)}
"""Steps and learning rate."""
CONFIG = RunConfig(model=ModelConfig(width=64, depth=3, heads=4), data=DataConfig(seq_len=LENGTH))


def sequences(count: int, seed: int) -> Tensor:
    """Token ids: half of them repeat what stood four places before, the others follow their predecessor by a table."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(VOCAB, (VOCAB, 2), generator=torch.Generator().manual_seed(0))
    tokens = [torch.randint(VOCAB, (count,), generator=generator) for _ in range(4)]
    for _ in range(LENGTH - 3):
        coin, which = torch.randint(2, (2, count), generator=generator)
        tokens.append(torch.where(coin == 1, tokens[-4], table[tokens[-1], which]))
    return torch.stack(tokens, 1)


FITTED, HELD_OUT = sequences(64, seed=1), sequences(64, seed=2)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy, in nats per token."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out(model: nn.Module) -> float:
    """The loss on sequences that nothing was fitted to."""
    return float(loss_of(model, HELD_OUT))


def train(model: nn.Module, lr: float, steps: int, out: Path, *, seed: int) -> None:
    """Train, with the channels' contributions on record."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    monitors = ["loss", "channel_contributions"]
    with foreshock.watch(model, optimizer, out=out, every=1 if steps < 10 else 10, monitors=monitors, budget=None) as w:
        for step in range(steps):
            loss = loss_of(model, sequences(BATCH, seed=seed + step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            w.step(loss)


def channels(out: Path) -> str:
    """The quantities of the last logged step, each as its mean over all linears."""
    row = [row for row in RunFolder(out).metrics() if any(key.startswith("channel_") for key in row)][-1]
    found = []
    for quantity in ("top_share", "effective", "dead", "outlier"):
        values = [value for key, value in row.items() if key.startswith(f"channel_contributions/{quantity}/")]
        found.append(f"{quantity} {sum(values) / len(values):.3f}")
    return ", ".join(found)


def repaired(model: nn.Module, healthy: nn.Module, method: str) -> str:
    """Held-out loss and what is left of the error at the head's input, under maps after all norms."""
    with steer.repair(model, healthy, FITTED[:, :-1], method=method):
        left = foreshock.drift(healthy, model, HELD_OUT[:, :-1], modules="final_norm").by_layer["final_norm"]
        return f"{held_out(model):.3f}, relative error of the final norm {left.paired:.3f}"


def main(out: Path) -> None:
    """Train, damage, compare, repair."""
    healthy = build_model(CONFIG, VOCAB)
    train(healthy, HEALTHY_LR, HEALTHY_STEPS, out / "healthy", seed=1000)
    print(f"healthy: held-out loss {held_out(healthy):.3f}; channels: {channels(out / 'healthy')}")
    for name, (steps, lr) in DAMAGES.items():
        model = copy.deepcopy(healthy)
        train(model, lr, steps, out / name, seed=5000)
        print(f"\n{name}, {steps} steps at a learning rate of {lr:g}: channels: {channels(out / name)}")
        print(foreshock.drift(healthy, model, HELD_OUT[:, :-1]))
        final = foreshock.drift(healthy, model, HELD_OUT[:, :-1], modules="final_norm").by_layer["final_norm"]
        print(f"held-out loss {held_out(model):.3f}, relative error of the final norm {final.paired:.3f}")
        for method in ("paired", "linear_act"):
            print(f"  repaired by {method}: {repaired(model, healthy, method)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "out/drift_and_repair"))
