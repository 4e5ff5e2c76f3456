"""The runs of this paper: scenarios in each of which a plain hypernetwork and MIP learn the same."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from foreshock.core.config import Json, Spec
from foreshock.core.run_config import DataConfig, OptimConfig, RecordConfig, RunConfig, TrainConfig
from foreshock.reproductions._scale import Scale, named
from foreshock.study.grid import Size

SLOPE = "magnitude_slope/slope/wrapped.hypernetwork"
"""The row of a run that says how what is predicted follows the size of γ."""
PLAIN: dict[str, Json] = {"encoding": "identity", "base": False}
"""θ = h(γ), each tensor initialised with its own variance, as MIP's are."""
MIP: dict[str, Json] = {}
"""θ = θ0 + h([cos(γπ/2), sin(γπ/2)]), the defaults of the task."""
SIZE = Size.parse("32x2")
"""Width and hidden layers of the network that is conditioned."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What both methods are compared in."""

    id: str
    """Part of the names of its claims."""
    says: str
    """What it is, in a few words."""
    options: Mapping[str, Json]
    """Options of the task."""
    settings: tuple[str, ...] = ()
    """Overrides of the base recipe."""
    lrs: str = "adam"
    """Which learning rates are tried: adam or sgd."""


SCENARIOS = (
    Scenario(id="adam_1", says="Adam, one hyper-input", options={}),
    Scenario(id="adam_8", says="Adam, 8 hyper-inputs", options={"inputs": 8}),
    Scenario(id="adam_32", says="Adam, 32 hyper-inputs", options={"inputs": 32}),
    Scenario(id="sgd_1", says="SGD, one hyper-input", options={}, settings=("optim.name=sgd",), lrs="sgd"),
    Scenario(id="sgd_8", says="SGD, 8 hyper-inputs", options={"inputs": 8}, settings=("optim.name=sgd",), lrs="sgd"),
    Scenario(id="gelu", says="Adam, GELU in h", options={"activation": "gelu"}),
    Scenario(id="tanh", says="Adam, tanh in h", options={"activation": "tanh"}),
    Scenario(id="narrow", says="Adam, one narrow hidden layer in h", options={"hidden": [8]}),
    Scenario(id="deep", says="Adam, four hidden layers in h", options={"hidden": [16, 32, 64, 128]}),
    Scenario(
        id="proxy_1",
        says="Adam, a conditioned Transformer, one hyper-input",
        options={"network": "proxy"},
        settings=("data.batch_size=16", "train.steps=150"),
    ),
    Scenario(
        id="proxy_8",
        says="Adam, a conditioned Transformer, 8 hyper-inputs",
        options={"network": "proxy", "inputs": 8},
        settings=("data.batch_size=16", "train.steps=150"),
    ),
)
"""Optimizers, numbers of hyper-inputs, activations and shapes of h, and what is conditioned."""


@dataclass(frozen=True, kw_only=True)
class Conditions(Scale):
    """A scale of this paper."""

    sgd_lrs: tuple[float, ...]
    """Learning rates of SGD with momentum; `lrs` are those of Adam."""

    def rates(self, scenario: Scenario) -> tuple[float, ...]:
        """The learning rates of a scenario."""
        return self.sgd_lrs if scenario.lrs == "sgd" else self.lrs

    def arm(self, scenario: Scenario, method: Mapping[str, Json]) -> str:
        """A method in a scenario, by the name that tables give it."""
        return named(self.base, f"task={Spec('condition', {**scenario.options, **method})}", *scenario.settings)


def cpu() -> Conditions:
    """Two cores, about half an hour."""
    base = RunConfig(
        task=Spec("condition"),
        data=DataConfig(batch_size=64),
        optim=OptimConfig(weight_decay=0.0, clip_norm=None),
        train=TrainConfig(steps=300, eval_every=15, eval_batches=5),
        record=RecordConfig(
            monitors=(Spec("loss"), Spec("magnitude_slope", {"modules": "wrapped.hypernetwork"})), log_every=30
        ),
    )
    return Conditions(
        base=base,
        lrs=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        sgd_lrs=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        seeds=tuple(range(6)),  # runs are short, and seeds scatter by as much as methods differ
    )


def gpu() -> Conditions:
    """One device, about a day; the same networks, trained ten times as long."""
    at = cpu()
    longer = replace(at.base.train, steps=3000, eval_every=100)
    return replace(at, base=replace(at.base, train=longer, runtime=replace(at.base.runtime, device="cuda")))
