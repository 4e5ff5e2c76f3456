"""Train a model on tokens: the task behind every run of a study."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foreshock.core.task import Task
from foreshock.proxy.data.bigram import bigram_of
from foreshock.proxy.data.prepare import prepare

if TYPE_CHECKING:
    from foreshock.core.run_config import RunConfig
    from foreshock.core.run_folder import RunFolder, Status

START_UP = 1.0
"""Seconds a run spends before its first step."""
SECONDS_PER_WIDTH = 1.3e-7
"""Single-threaded CPU seconds a token, block and feature of width: what small matrices cost besides arithmetic."""
CPU_FLOPS = 60e9
"""Single-threaded fp32 FLOP/s on matrices of this size."""
CUDA_FLOPS = 1.5e14
"""Attainable bf16 FLOP/s of one device."""
CUDA_STEP = 0.01
"""Seconds a step costs on a device however small the model."""


@dataclass(frozen=True, kw_only=True)
class Train(Task):
    """The model that `model` describes, the proxy or one of the user's own, learns to predict the next token."""

    @property
    def builds_proxy(self) -> bool:
        """It is what `model` is there for."""
        return True

    def data(self, config: RunConfig, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """Tokenize the corpus, and count its pairs."""
        tokens = prepare(config.data, config.train, progress)
        bigram_of(tokens, config.data, config.train)  # here once, or the first runs would each count for themselves
        return tokens.manifest | {"hash": tokens.hash}

    def rough_seconds(self, config: RunConfig) -> float:
        """start-up + tokens · L · (a·d + 72·d² / FLOP/s).

        From single-threaded runs of 300 steps of 16 × 64 tokens that took 4.5 s at 32×2, 12 s at 64×3, 36 s at 128×4.
        """
        model, steps = config.model, config.train.steps
        tokens = steps * config.data.batch_size * config.data.seq_len
        flops = tokens * model.depth * 72.0 * model.width**2
        if config.runtime.device == "cuda":
            return START_UP + steps * CUDA_STEP + flops / CUDA_FLOPS
        overhead = tokens * model.depth * model.width * SECONDS_PER_WIDTH
        return START_UP + (overhead + flops / CPU_FLOPS) / config.runtime.threads

    def run(self, config: RunConfig, folder: RunFolder, stop: Callable[[], bool]) -> Status:
        """Train from where the folder stands."""
        from foreshock.training.run import run_on_tokens

        return run_on_tokens(config, folder, stop)
