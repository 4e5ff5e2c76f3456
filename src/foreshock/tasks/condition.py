"""Train a model whose parameters a hypernetwork predicts from hyper-inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from foreshock.core.config import to_json
from foreshock.core.errors import require
from foreshock.core.run_config import edited
from foreshock.core.task import Task
from foreshock.images.data import image_data
from foreshock.tasks.train import Train

if TYPE_CHECKING:
    from torch import nn

    from foreshock.core.run_config import RunConfig
    from foreshock.core.run_folder import RunFolder, Status
    from foreshock.training.batches import Batches

SECONDS_PER_WEIGHT = 2e-9
"""CPU seconds a step, example and predicted parameter."""


@dataclass(frozen=True, kw_only=True)
class Condition(Task):
    """A classifier of digits or a proxy on tokens learns to follow hyper-inputs γ, which predict its parameters.

    γ says with which probability each of D other labelings takes the place of the true one. With the defaults the
    parameters are θ0 + h([cos(γπ/2), sin(γπ/2)]); `encoding`, `base` and `init` are switched one by one.
    """

    network: Literal["mlp", "proxy"] = "mlp"
    """A perceptron of `model.depth` hidden layers of `model.width` on digits, all of it predicted; or the proxy that
    `model` describes on the tokens of `data`, of which the MLPs and norms of its blocks are predicted."""
    inputs: int = 1
    """D, how many hyper-inputs there are."""
    hidden: tuple[int, ...] = (16, 64)
    """Widths of the hidden layers of h."""
    activation: str = "leaky_relu"
    """Of h: elu, gelu, leaky_relu, relu, silu or tanh."""
    norm: str | None = None
    """In h, before its activations: layer_norm, rms_norm or null."""
    encoding: str = "cos_sin"
    """cos_sin, or identity for h(γ)."""
    base: bool = True
    """Whether θ0 is added to what h predicts."""
    init: str = "per_tensor"
    """How the last layer of h starts: per_tensor, joint or zero."""

    def __post_init__(self) -> None:
        require(1 <= self.inputs <= 39, "condition:inputs", "must be from 1 to 39", self.inputs)

    @property
    def builds_proxy(self) -> bool:
        """Whether the settings of `model` reach it."""
        return self.network == "proxy"

    def check(self, config: RunConfig) -> None:
        """Train the model for a step."""
        from foreshock.training.run import rehearse

        built = edited(config)
        scaled = [role for role, own in to_json(built.model.roles).items() if own["lr"] != 1 or own["decay"] != 1]
        rule = "must have lr and decay 1 in task condition, whose optimizer knows no roles"
        require(not scaled, "model.roles", rule, ", ".join(scaled))
        batches, classes = self._batches(config)
        rehearse(config, self._build(config, classes), classes, batches)

    def data(self, config: RunConfig, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """Load the digits, or tokenize the corpus."""
        return Train().data(config, progress) if self.network == "proxy" else dict(image_data("digits").manifest)

    def rough_seconds(self, config: RunConfig) -> float:
        """That of the proxy, twice; or start-up + steps · examples · parameters · a constant."""
        if self.network == "proxy":
            return 2 * Train().rough_seconds(config)
        model, examples = config.model, config.train.steps * config.data.batch_size
        return 1.0 + examples * (64 + model.depth * model.width) * model.width * SECONDS_PER_WEIGHT

    def run(self, config: RunConfig, folder: RunFolder, stop: Callable[[], bool]) -> Status:
        """Train from where the folder stands."""
        from foreshock.training.run import check_same_data, ready_process, train
        from foreshock.training.setup import build_training

        manifest = self.data(config)
        check_same_data(folder, manifest)
        ready_process(config)
        batches, classes = self._batches(config)
        model = self._build(config, classes)
        facts = {"params": sum(p.numel() for p in model.parameters() if p.requires_grad)}
        return train(folder, build_training(config, classes, model), batches, manifest, facts, stop)

    def _batches(self, config: RunConfig) -> tuple[Batches, int]:
        """What it learns from, and the number of classes."""
        from foreshock.proxy.data.prepare import prepare
        from foreshock.tasks._conditioned import digit_batches, token_batches

        if self.network == "proxy":
            tokens = prepare(config.data, config.train)
            return token_batches(tokens, config, self.inputs), tokens.vocab_size
        digits = image_data("digits")
        return digit_batches(digits, config, self.inputs), digits.classes

    def _build(self, config: RunConfig, classes: int) -> nn.Module:
        from foreshock.hypernetworks.design import Design
        from foreshock.tasks._conditioned import conditioned

        design = Design(
            hidden=self.hidden,
            activation=self.activation,
            norm=self.norm,
            encoding=self.encoding,
            base=self.base,
            init=self.init,
        )
        return conditioned(edited(config), self.network, self.inputs, design, classes)
