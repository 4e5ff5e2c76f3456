"""Fabricated study folders with planted curves: for tests of whatever reads run folders.

folder = fabricate_study(tmp_path / "study")                    # the instability shows, qk_norm cures it
folder = fabricate_study(path, plant=lambda run: Planted(final=2.0, max_logit=10.0))
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foreshock.core import files
from foreshock.core.arms import Arm
from foreshock.core.config import to_json
from foreshock.core.run_config import RunConfig, resolve, run_id
from foreshock.core.run_folder import RunFolder
from foreshock.study.grid import STUDY_FORMAT

LOSS_INIT = 5.7
"""Planted held-out loss at initialisation."""
BIGRAM_LOSS = 2.42
"""Planted loss of the count bigram."""
HEAD_DIMENSION = 16


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The run for which a curve is planted."""

    arm: str
    width: int
    depth: int
    lr: float
    seed: int
    steps: int

    @property
    def params(self) -> int:
        return 12 * self.depth * self.width**2


@dataclass(frozen=True, kw_only=True)
class Planted:
    """What the run's record says."""

    final: float
    """Last held-out loss; may be nan or inf."""
    max_logit: float = 10.0
    """Largest attention logit: grows linearly from 2 to this at the last step planned, in block 0."""
    status: str = "done"
    early_stop: bool = False
    log_z: float = 5.5
    """log Z of the output logits at the last step."""
    train: Callable[[int], float] | None = None
    """Training loss at a step; None falls exponentially from the initial to the final loss."""
    steps: int | None = None
    """Steps completed; None is all of them."""


def plausible(run: Planned) -> Planted:
    """Shaped like the quick study: without qk_norm, the usable LR falls with size and attention logits explode."""
    cured = "qk_norm" in run.arm
    growth = (run.params / 24_576) ** 0.5
    best_lr = 0.02 if cured else 0.015 / growth**0.6
    decades = math.log10(run.lr / best_lr)
    floor = 2.1 - 0.12 * math.log(growth) + 0.01 * math.sin(7.0 * run.seed)
    slope = (0.12 if cured else 0.55) * growth**0.2
    final = floor + (0.35 * decades**2 if decades < 0 else slope * decades * (1 + 0.1 * math.cos(run.seed)))
    logit = 4 * (run.lr / 1e-3) ** 0.4 if cured else 8 * growth * (run.lr / 1e-3) ** 1.6
    return Planted(final=min(final, 3.2), max_logit=logit, log_z=5.5 + 2 * max(decades, 0.0))


def fabricate_study(
    path: Path,
    *,
    arms: Sequence[str] = ("none", "qk_norm"),
    sizes: Sequence[tuple[int, int]] = ((32, 2), (64, 3), (96, 4)),
    lrs: Sequence[float] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    seeds: Sequence[int] = (0,),
    steps: int = 100,
    log_every: int = 10,
    plant: Callable[[Planned], Planted] = plausible,
    data_hash: str = "feed5eed",
    name: str = "fabricated",
) -> Path:
    """Write a study folder (study.json, runs/<run_id>/…) with the planted curves, and return its path."""
    base = RunConfig()
    base = replace(base, train=replace(base.train, steps=steps), record=replace(base.record, log_every=log_every))
    path.mkdir(parents=True, exist_ok=True)
    study = {
        "format": STUDY_FORMAT,
        "name": name,
        "base": to_json(resolve(base)),
        "arms": list(arms),
        "sizes": [f"{width}x{depth}" for width, depth in sizes],
        "lrs": list(lrs),
        "seeds": list(seeds),
    }
    run_ids = []
    for arm in arms:
        for width, depth in sizes:
            for lr in lrs:
                for seed in seeds:
                    planned = Planned(arm=arm, width=width, depth=depth, lr=lr, seed=seed, steps=steps)
                    config = _config(base, planned)
                    run_ids.append(run_id(config, data_hash))
                    folder = RunFolder(path / "runs" / run_ids[-1])
                    fabricate_run(folder, config, planned, plant(planned), data_hash=data_hash)
    files.write_json(path / "study.json", study | {"run_ids": run_ids})
    return path


def fabricate_run(
    folder: RunFolder, config: RunConfig, planned: Planned, planted: Planted, *, data_hash: str = "feed5eed"
) -> None:
    """Write one run folder, whole."""
    folder.create(to_json(resolve(config)))
    folder.write_manifest({"run_id": run_id(config, data_hash), **_manifest(config, planned, data_hash)})
    done = config.train.steps if planted.steps is None else planted.steps
    for row in _rows(config, planned, planted, done):
        folder.append_metrics(row)
    folder.append_event("started")
    folder.close()
    facts = {"step": done, "steps": config.train.steps, "wall_s": 0.05 * done, "early_stop": planted.early_stop}
    losses = {"loss_init": LOSS_INIT, "loss_held_out": planted.final}
    folder.write_status(planted.status, **facts, **losses)  # type: ignore[arg-type]


def _config(base: RunConfig, planned: Planned) -> RunConfig:
    config = Arm.parse(planned.arm).apply(base)
    heads = max(planned.width // HEAD_DIMENSION, 1)
    return replace(
        config,
        model=replace(config.model, width=planned.width, depth=planned.depth, heads=heads),
        optim=replace(config.optim, lr=planned.lr),
        train=replace(config.train, seed=planned.seed),
    )


def _manifest(config: RunConfig, planned: Planned, data_hash: str) -> dict[str, Any]:
    vocabulary = 256
    return {
        "python": "3.11.0",
        "packages": {"foreshock": "0.1.0", "torch": "2.13.0"},
        "platform": "Linux",
        "processor": "x86_64",
        "git": "0" * 40,
        "command": ["foreshock", "study", "quick"],
        "started": 1_700_000_000.0,
        "device": "cpu",
        "params": planned.params,
        "params_total": planned.params + 2 * vocabulary * planned.width,
        "flops_per_token": 6.0 * planned.params,
        "tokens_per_step": config.data.batch_size * config.data.seq_len,
        "data": {
            "source": "local_python",
            "tokenizer": "bytes",
            "hash": data_hash,
            "vocabulary": vocabulary,
            "documents": 120,
            "train_tokens": 4_000_000,
            "held_out_tokens": 400_000,
            "versions": {"python": "3.11.0"},
        },
        "bigram_loss": BIGRAM_LOSS,
    }


def logged_steps(config: RunConfig, done: int) -> list[int]:
    """Steps that the training loop logs: the first, the last, the quarter and every log_every-th."""
    always = {1, config.train.steps, math.ceil(config.train.steps / 4)}
    every = config.record.log_every
    return [s for s in range(1, done + 1) if s in always or s % every == 0 or s == done]


def _rows(config: RunConfig, planned: Planned, planted: Planted, done: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"step": 0, "loss/held_out": LOSS_INIT}]
    for step in logged_steps(config, done):
        row = {"step": step, **_losses(planned, planted, step)}
        if step == done or step % config.train.eval_every == 0:
            row["loss/held_out"] = planted.final if step == done else row["loss/train"] + 0.02
        row |= _global_rows(planned, planted, step)
        for block in range(config.model.depth):
            row |= _block_rows(config, planned, planted, step, block)
        rows.append(row)
    return rows


def _losses(planned: Planned, planted: Planted, step: int) -> dict[str, float]:
    final = planted.final if math.isfinite(planted.final) else LOSS_INIT
    decay = math.exp(-6 * step / planned.steps)
    train = planted.train(step) if planted.train else final + (LOSS_INIT - final) * decay
    if planted.train is None and not math.isfinite(planted.final) and step > planned.steps // 2:
        train = planted.final
    return {"loss/train": train, "loss/total": train, "loss/lr": planned.lr * min(1.0, 10 * step / planned.steps)}


def _global_rows(planned: Planned, planted: Planted, step: int) -> dict[str, Any]:
    done = step / planned.steps
    log_z = 5.5 + (planted.log_z - 5.5) * done
    return {
        "output_logits/mean": -0.1 - (planted.log_z - 5.5) * done,
        "output_logits/min": -6.0 * log_z / 5.5,
        "output_logits/max": 6.0 * log_z / 5.5,
        "output_logits/log_z": log_z,
        "norms/grad_norm": 1.5 - done,
        "norms/clip_factor": min(1.0, 1 / (1.5 - done)),
        "throughput/tokens_per_s": 2e4,
        "throughput/mfu": 0.0,
        "monitors/seconds": 0.001,
    }


def _block_rows(config: RunConfig, planned: Planned, planted: Planted, step: int, block: int) -> dict[str, Any]:
    done = step / planned.steps
    where = f"blocks.{block}"
    grown = 2.0 + (planted.max_logit - 2.0) * done if math.isfinite(planted.max_logit) else planted.max_logit
    top = grown * 0.8**block
    heads = [top * 0.9**head for head in range(config.model.heads)]
    row = {
        f"attention_logits/max/{where}": top,
        f"attention_logits/max_abs/{where}": abs(top) * 1.1,
        f"attention_logits/max_per_head/{where}": heads,
        f"attention_logits/max_abs_per_head/{where}": [abs(h) * 1.1 for h in heads],
        f"attention_logits/q_norm/{where}": 4.0 + done,
        f"attention_logits/k_norm/{where}": 4.0 + 2 * done,
        f"attention_logits/entropy/{where}": 3.0 - 2 * done,
        f"block_outputs/rms/{where}": 1.0 + planned.lr**0.5 * (block + 1) * done,
    }
    for role in ("q", "k", "v", "proj", "fc1", "fc2"):
        row |= {
            f"norms/gradient/{where}.{role}": 1e-3 * (1 - 0.5 * done),
            f"norms/parameter/{where}.{role}": 0.1 + planned.lr * done,
            f"norms/update/{where}.{role}": planned.lr * 0.3,
            f"norms/unscaled_update/{where}.{role}": 0.3,
        }
    return row
