"""Train a model of two languages, or a generator of digits, and see how far each way of steering turns it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from foreshock.core.errors import require, unknown
from foreshock.images.data import image_data
from foreshock.tasks._plain import check_plain
from foreshock.tasks.train import Train

if TYPE_CHECKING:
    from foreshock.core.run_config import RunConfig
    from foreshock.core.run_folder import RunFolder, Status

METHODS = {
    "mean_act": "mean_act",
    "gaussian_act": "gaussian_act",
    "linear_act": "linear_act",
    "linear_act_at_once": "linear_act:incremental=false",
    "iti": "iti",
    "iti_strong": "iti",
    "aura": "aura",
    "lineas": "lineas",
}
"""Ways to fit, by name; `iti_strong` is at a strength of its own."""
SITES = ("mlp", "norms", "proj")
"""The norms before the MLPs, which are the default of `steer.fit`; all norms; the output projections of attention."""
GAMMAS = (0.003, 0.01, 0.03, 0.1)
"""Strengths of the regulariser that the support is followed over, at the first of `SITES`."""
IMAGE_GAMMAS = (0.01, 0.03, 0.1, 0.3)
"""The same for the generator, whose maps are at all of its norms."""
SCHEMES = {
    "languages": (
        *(f"{method}_{sites}" for sites in SITES for method in METHODS),
        *(f"lineas_mlp_gamma_{gamma:g}" for gamma in GAMMAS),
    ),
    "digits": (
        *(f"{method}_norms" for method in METHODS),
        *(f"lineas_norms_gamma_{gamma:g}" for gamma in IMAGE_GAMMAS),
    ),
}
"""What is tried: a method, where its maps are, and γ."""
SECONDS_PER_FIT, SECONDS_PER_SCHEME = 0.06, 2.5
"""Rough CPU seconds of a step of LinEAS, and of all else that a scheme takes, at the width and depth of 64 and 3."""
IMAGE_SECONDS = 0.02
"""Rough CPU seconds of a training step of the generator, and of a step of all fits of one scheme to it."""


@dataclass(frozen=True, kw_only=True)
class Steer(Train):
    """Trains, and at the last step fits maps by every scheme from 32 unpaired samples, and measures what they do.

    `on=languages`: as `train`, on `data.source=languages`. Maps are fitted to pieces of code without their titles, and
    lead from Python to C; documents and prompts are new to model, fit and judge. Rows, with the scheme, or `none`, in
    place of the path: `steer/share`, mean P(C) of what is written after openings that leave the language open, by a
    judge of texts; `steer/turned`, the same after the beginning of a Python document; `steer/loss_source` and
    `steer/loss_target`, in nats per token of Python and of C; `steer/loss_written`, what the untouched model makes of
    the texts; `steer/distance`, Σ over sites of the mean over channels of W₁ between mapped Python and C, of vectors
    pooled as means, as a share of what it is without maps; `steer/support`, the share of channels that are changed.

    `on=digits`: a one-step generator of `model.width` channels and `model.depth` blocks is trained for `train.steps`;
    interventions and the rest of the model play no part. Every class is induced from another one, and every class
    removed by maps towards all others. Rows: `steer/share`, P(induced class), and `steer/energy`, the energy distance
    from its real images, in standard deviations of a pixel; `steer/removed`, P(class) after its removal, and
    `steer/kept`, how often the others are still recognised; distance and support of what induces. Means over classes.
    """

    on: Literal["languages", "digits"] = "languages"
    """A language model, or a generator of images."""
    schemes: tuple[str, ...] | None = None
    """Which are tried; all by default."""
    fit_steps: int = 150
    """Steps of LinEAS; the paper takes 1,000, of models in which each of them does less."""
    fit_lr: float = 0.1
    """Learning rate of LinEAS, the paper's."""
    samples: int = 32
    """Samples of either set that maps are fitted to."""

    def __post_init__(self) -> None:
        if self.on not in SCHEMES:
            raise unknown("on", self.on, list(SCHEMES))
        for scheme in self.tried:
            if scheme not in SCHEMES[self.on]:
                raise unknown("scheme", scheme, list(SCHEMES[self.on]))
        require(self.fit_steps >= 1, "steer:fit_steps", "must be at least 1", self.fit_steps)
        require(self.fit_lr > 0, "steer:fit_lr", "must be above 0", self.fit_lr)
        require(self.samples >= 4, "steer:samples", "must be at least 4", self.samples)

    @property
    def tried(self) -> tuple[str, ...]:
        """The schemes, by name."""
        return SCHEMES[self.on] if self.schemes is None else self.schemes

    @property
    def builds_proxy(self) -> bool:
        """It is what is steered, but for digits."""
        return self.on == "languages"

    def check(self, config: RunConfig) -> None:
        """See that the data are what the maps are about, and that nothing is asked for that plays no part."""
        if self.on == "languages":
            self._check_source(config)
            from foreshock.tasks._steered import check

            check(config, self)
        else:
            check_plain(config)
            from foreshock.tasks._steered_images import built

            built(config)

    def data(self, config: RunConfig, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """Tokenize the corpus, or load the images."""
        if self.on == "digits":
            return dict(image_data("digits").manifest)
        self._check_source(config)
        return super().data(config, progress)

    def rough_seconds(self, config: RunConfig) -> float:
        """That of training, and of the fits; every scheme costs about as much as every other, but for LinEAS."""
        slow = sum(scheme.startswith("lineas") for scheme in self.tried)
        if self.on == "digits":
            return 5.0 + IMAGE_SECONDS * (config.train.steps + slow * self.fit_steps * 10)
        share = config.model.width * config.model.depth / (64 * 3)
        fits = slow * self.fit_steps * SECONDS_PER_FIT + len(self.tried) * SECONDS_PER_SCHEME
        return super().rough_seconds(config) + share * fits

    def run(self, config: RunConfig, folder: RunFolder, stop: Callable[[], bool]) -> Status:
        """Train from where the folder stands, and measure at the end; digits take seconds, and are not interrupted."""
        if self.on == "digits":
            from foreshock.tasks._steered_images import run

            return run(config, folder, self)
        from foreshock.tasks._steered import examined
        from foreshock.training.run import run_on_tokens

        return run_on_tokens(config, folder, stop, lambda model, data: examined(model, data, config, self))

    def _check_source(self, config: RunConfig) -> None:
        source = config.data.source
        require(source.name == "languages", "data.source", "must be languages for task steer:on=languages", str(source))
