"""`foreshock attack`: push a model's weights to where its gradient is largest, beside known-good models of its size."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from foreshock.cli.options import read_builder, read_number, shown_as

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from foreshock.core.model_config import ModelConfig
    from foreshock.probes.attack import Attack as Found
    from foreshock.study.grid import Size

    Subject = Callable[[int], tuple[nn.Module, Callable[[nn.Module], Tensor]]]
    """Seed -> a model and its loss on a batch of that seed."""

SHOWN = 3
"""Blocks whose share is shown, those with the largest."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Attack a model: push its weights to where the gradient of its loss is largest, and see whether that ends.

    Shown beside foreshock's own Transformer of the same size, with known-good layers, on the same tokens.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODULE:FUNCTION")]
    """What builds the model: build(width, depth, heads, vocab_size), as `study --model` takes it."""
    size: Annotated[str, shown_as("WIDTHxDEPTH")] = "64x2"
    """Size to build at, such as 64x2, or 64x2x4 with the number of heads."""
    steps: Annotated[str | None, shown_as("N")] = None
    """Most steps of an attack (default 100)."""
    lr: Annotated[str | None, shown_as("LR")] = None
    """Share of a tensor's norm that a step moves it by (default 0.03)."""
    limit: Annotated[str | None, shown_as("NORM")] = None
    """Gradient norm above which a model is rejected; by default what separates known-good from planted bad layers."""
    seeds: Annotated[str, shown_as("N")] = "2"
    """Seeds of initial values and tokens, from 0 on."""
    batch_size: Annotated[str, shown_as("N")] = "4"
    """Sequences of the batch, of random tokens."""
    seq_len: Annotated[str, shown_as("N")] = "32"
    """Tokens a sequence."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object and nothing else."""

    def run(self) -> int:
        """Build, attack, show; 0 whatever the verdict.

        Raises:
            UserError: an option out of range, or a model that cannot be built or attacked.
        """
        from foreshock.cli.output import console, print_json
        from foreshock.study.grid import Size
        from foreshock.study.machine import check_torch

        size = Size.parse(self.size)
        options = self.options()
        shape = (self.number("batch_size", 1), self.number("seq_len", 2))
        seeds = self.number("seeds", 1)
        check_torch()
        subjects = subjects_of(read_builder(self.model), size, shape)
        screen = console(quiet=self.json)
        found = attack_all(subjects, seeds, options, screen)
        if self.json:
            print_json({"size": str(size), "seeds": seeds, **options, "models": entries(found)})
        else:
            show(found, screen)
        return 0

    def number(self, name: str, least: int) -> int:
        """A whole number of at least so much.

        Raises:
            ConfigError: it is none.
        """
        from foreshock.core.errors import require

        option = f"--{name.replace('_', '-')}"
        value = read_number(option, getattr(self, name), int, str(max(least, 4)))
        assert value is not None
        require(value >= least, option, f"must be at least {least}", value)
        return value

    def options(self) -> dict[str, Any]:
        """Steps, step length and limit, checked.

        Raises:
            ConfigError: one is out of range.
        """
        from foreshock.probes.attack import LIMIT, LR, STEPS, check_options

        steps = read_number("--steps", self.steps, int, "100")
        lr = read_number("--lr", self.lr, float, "0.03")
        limit = read_number("--limit", self.limit, float, "1e6")
        options: dict[str, Any] = {
            "steps": STEPS if steps is None else steps,
            "lr": LR if lr is None else lr,
            "limit": LIMIT if limit is None else limit,
        }
        check_options(**options)
        return options


def subjects_of(name: str, size: "Size", shape: tuple[int, int]) -> "dict[str, Subject]":
    """The user's model, and foreshock's Transformer of the same size with three known-good sets of layers.

    Args:
        name: of what builds the user's model.
        size: of all.
        shape: sequences, and tokens of each.

    Raises:
        ConfigError: the function cannot be imported, or the size is none of foreshock's Transformer.
    """
    from dataclasses import replace

    from foreshock.core.config import Spec
    from foreshock.core.model_config import ModelConfig, NormSlots
    from foreshock.proxy.family import load_builder
    from foreshock.proxy.presets import llama

    load_builder(name)
    base = ModelConfig(width=size.width, depth=size.depth, heads=size.heads)
    normed = NormSlots(q=Spec("layer_norm"), k=Spec("layer_norm"))
    configs = {
        name: replace(base, build=name),
        "LayerNorm, GELU": base,
        "RMSNorm, SwiGLU": llama(width=size.width, depth=size.depth, heads=size.heads),
        "LayerNorm, GELU, qk-norm": replace(base, norms=normed),
    }
    return {title: subject(config, shape) for title, config in configs.items()}


def subject(config: "ModelConfig", shape: tuple[int, int]) -> "Subject":
    """A model and the cross-entropy of the next of random tokens, by seed; the tokens are those of any other model."""

    def build(seed: int) -> "tuple[nn.Module, Callable[[nn.Module], Tensor]]":
        import torch
        import torch.nn.functional as F

        from foreshock.proxy.data.tokenizers.bytes import VOCAB_SIZE

        batch_size, seq_len = shape
        generator = torch.Generator().manual_seed(seed)
        tokens_BT = torch.randint(VOCAB_SIZE, (batch_size, seq_len + 1), generator=generator)
        model = built(config, tokens_BT[:, :-1], VOCAB_SIZE, seed)

        def loss_fn(model: "nn.Module") -> "Tensor":
            return F.cross_entropy(model(tokens_BT[:, :-1]).flatten(0, 1), tokens_BT[:, 1:].flatten())

        return model, loss_fn

    return build


def built(config: "ModelConfig", tokens_BT: "Tensor", vocab_size: int, seed: int) -> "nn.Module":
    """The model that a config describes, initialised.

    Raises:
        ConfigError: the user's function fails, or gives no model from such token ids to logits.
    """
    from foreshock.core.errors import ConfigError, UserError
    from foreshock.proxy.family import build_own, check_logits
    from foreshock.proxy.model import Proxy
    from foreshock.proxy.parametrization import initialise

    if config.build is None:
        proxy = Proxy(config, vocab_size, tokens_BT.shape[1])
        initialise(proxy, config.roles, seed)
        return proxy
    try:
        model = build_own(config, vocab_size, seed)
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"{config.build} failed: {type(error).__name__}: {error}") from error
    check_logits(model, tokens_BT, vocab_size, config.build)
    return model


def attack_all(
    subjects: "Mapping[str, Subject]", seeds: int, options: Mapping[str, Any], screen: "Console"
) -> "dict[str, list[Found]]":
    """One attack for each seed of each model, with a bar of their steps on a terminal."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from foreshock.probes.attack import attack

    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    found: dict[str, list[Found]] = {name: [] for name in subjects}
    with Progress(*columns, console=screen, transient=True, disable=screen.quiet or not screen.is_terminal) as bar:
        task = bar.add_task("", total=len(subjects) * seeds * options["steps"])
        for number, (name, build) in enumerate(subjects.items()):
            for seed in range(seeds):
                begun = (number * seeds + seed) * options["steps"]
                model, loss_fn = build(seed)

                def told(step: int, norm: float, begun: int = begun, name: str = name) -> None:
                    bar.update(task, completed=begun + step, description=f"{name}: gradient norm {norm:.2g}")

                found[name].append(attack(model, loss_fn, on_step=told, **options))
    return found


def entries(found: "Mapping[str, list[Found]]") -> list[dict[str, Any]]:
    """What was found as JSON, the user's model first."""
    return [
        {"model": name, "reference": number > 0, "seeds": [{"seed": s, **a.as_json()} for s, a in enumerate(attacks)]}
        for number, (name, attacks) in enumerate(found.items())
    ]


def show(found: "Mapping[str, list[Found]]", screen: "Console") -> None:
    """A table, one row a model, and what the verdict of the user's own means."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("model", "gradient norm", "at its peak", "rejected", "at step", "largest shares at the peak"):
        table.add_column(column, justify="right" if column in ("gradient norm", "at its peak") else "left")
    for name, attacks in found.items():
        worst = max(attacks, key=lambda attack: attack.peak_gradient_norm)
        steps = [attack.step for attack in attacks if attack.step is not None]
        verdict = f"{len(steps)} of {len(attacks)}"
        table.add_row(
            Text(name),
            f"{worst.trace[0]:.2g}",
            f"{worst.peak_gradient_norm:.2g}",
            Text(verdict, style="red" if steps else "green"),
            ", ".join(map(str, steps)) or "–",
            Text(shares(worst)),
        )
    screen.print(table)
    own, limit = next(iter(found.items())), next(iter(found.values()))[0].limit
    screen.print(Text(f"limit {limit:g}; of each model the seed with the largest peak. {own[0]}: {own[1][0].reason}"))


def shares(attack: "Found") -> str:
    """The blocks with the largest share of the squared gradient norm at the peak."""
    largest = sorted(attack.by_block.items(), key=lambda item: -item[1])[:SHOWN]
    return ", ".join(f"{name} {share:.0%}" for name, share in largest)
