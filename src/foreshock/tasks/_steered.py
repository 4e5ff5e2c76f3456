"""What `steer` measures of a model of two languages.

Shapes: N documents or samples, T tokens, D channels of a site.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foreshock import steer
from foreshock.core.errors import require
from foreshock.core.run_config import edited
from foreshock.probes.batches import evaluating
from foreshock.probes.channels import channel_dim
from foreshock.probes.hooks import Hook, first_tensor
from foreshock.probes.norms import norms_of
from foreshock.probes.wasserstein import wasserstein
from foreshock.proxy.data.sources.languages import documents
from foreshock.tasks._judges import FRAGMENT, TextJudge, train_text_judge
from foreshock.tasks._languages import (
    Codec,
    codec_of,
    device_of,
    language_ids,
    losses,
    neutral_prompts,
    sample,
)
from foreshock.tasks.steer import METHODS
from foreshock.training.setup import build_model

if TYPE_CHECKING:
    from foreshock.core.run_config import RunConfig
    from foreshock.proxy.data.prepare import TokenData
    from foreshock.tasks.steer import Steer
    from foreshock.training.panel import Row

TITLE, LENGTH = 48, 104
"""Tokens at the start of a document, the title among them, that maps are not fitted to, and tokens of a document."""
BEGINNING = 56
"""Tokens of the beginning of a Python document that is continued."""
WRITTEN = FRAGMENT
"""Tokens that are written after a prompt."""
TESTED, PROMPTS, JUDGED = 64, 32, 200
"""Documents of each language that losses and distances are of; prompts of each kind; documents a judge learns from."""
STRENGTHS = {"iti_strong": 4.0, "iti_proj": 0.5}
"""λ that is not 1; that of ITI after projections is its authors'."""
FEW = 300
"""Ids of the model that schemes are tried on."""


def examined(model: nn.Module, data: TokenData, config: RunConfig, task: Steer) -> Row:
    """The rows of `Steer` on languages."""
    codec, seed = codec_of(data), config.train.seed
    bench = _Bench(model, codec, seed)
    fit = [
        language_ids(task.samples, language, codec=codec, tokens=LENGTH, seed=seed, split="fit")[:, TITLE:]
        for language in ("python", "c")
    ]
    rows: Row = {"steer/judge_accuracy": bench.judge.accuracy, **bench.measured("none", None)}
    for scheme in task.tried:
        source, target = (ids.to(device_of(model)) for ids in fit)
        with fitted(model, source, target, sites_of(model, scheme), scheme, task) as steering:
            rows |= bench.measured(scheme, steering)
    return rows


def check(config: RunConfig, task: Steer) -> None:
    """Put every kind of scheme on an untrained model once.

    Raises:
        ConfigError: sequences too short for what is written.
        UserError: a scheme that this model has no place for.
    """
    require(config.data.seq_len >= LENGTH, "data.seq_len", f"must be at least {LENGTH} here", config.data.seq_len)
    model = build_model(edited(config), FEW)
    ids_NT = torch.arange(8 * 16).reshape(8, 16)
    for scheme in task.tried:
        steering = fitted(model, ids_NT[:4], ids_NT[4:], sites_of(model, scheme), scheme, task, steps=1)
        steering.remove()


def sites_of(model: nn.Module, scheme: str) -> Sequence[str] | None:
    """Where the maps of a scheme are."""
    where = _parts(scheme)[1]
    return {"mlp": None, "norms": list(norms_of(model)), "proj": ["*.proj"]}[where]


def fitted(
    model: nn.Module,
    source: Any,
    target: Any,
    sites: Sequence[str] | None,
    scheme: str,
    task: Steer,
    steps: int | None = None,
) -> steer.Steering:
    """The maps of a scheme, in force."""
    name, where, gamma = _parts(scheme)
    method: str | steer.Method = METHODS[name]
    if name == "lineas":
        method = steer.LinEAS(steps=steps or task.fit_steps, lr=task.fit_lr, gamma=gamma)
    steering = steer.fit(model, source, target, sites=sites, method=method)
    steering.strength = STRENGTHS.get(name, STRENGTHS.get(f"{name}_{where}", 1.0))
    return steering


def distance(model: nn.Module, steering: steer.Steering, source: Any, target: Any, run: Callable[[Any], Any]) -> float:
    """Σ over sites of the mean over channels of W₁ between mapped source and target, over that of the unmapped."""
    steering.remove()
    plain, aims = (_pooled(model, steering, given, run) for given in (source, target))
    steering.attach()
    mapped = _pooled(model, steering, source, run)
    left, before = (
        sum(float(wasserstein(each[site], aims[site], p=1).mean()) for site in aims) for each in (mapped, plain)
    )
    return left / before


class _Bench:
    """Everything that is the same for all schemes: documents, prompts, and the judge."""

    def __init__(self, model: nn.Module, codec: Codec, seed: int) -> None:
        self.model, self.codec, self.seed = model, codec, seed
        self.source, self.target = (
            language_ids(TESTED, language, codec=codec, tokens=LENGTH, seed=seed, split="evaluation")
            for language in ("python", "c")
        )
        self.prompts = neutral_prompts(PROMPTS, codec=codec, seed=seed, split="evaluation")
        self.prompts += list(self.source[:PROMPTS, :BEGINNING])
        self.judge: TextJudge = train_text_judge(
            *(documents(JUDGED, language, seed=seed, split="judge") for language in ("python", "c"))
        )

    def measured(self, scheme: str, steering: steer.Steering | None) -> Row:
        """The rows of one scheme, whose maps are in force."""
        texts = sample(self.model, self.prompts, new_tokens=WRITTEN, eos=self.codec.eos, seed=self.seed)
        shares = [self.judge.share(self.codec.decode(ids)) for ids in texts]
        rows: Row = {
            "steer/share": sum(shares[:PROMPTS]) / PROMPTS,
            "steer/turned": sum(shares[PROMPTS:]) / PROMPTS,
            "steer/loss_source": float(losses(self.model, self.source).mean()),
            "steer/loss_target": float(losses(self.model, self.target).mean()),
        }
        if steering is not None:
            device = device_of(self.model)
            source, target = (ids[:, TITLE:].to(device) for ids in (self.source, self.target))
            rows["steer/distance"] = distance(self.model, steering, source, target, self.model)
            rows["steer/support"] = float(steering.support)
            steering.remove()
        rows["steer/loss_written"] = self._loss_of(texts)
        return {f"{name}/{scheme}": value for name, value in rows.items()}

    def _loss_of(self, texts: Sequence[Sequence[int]]) -> float:
        """Nats per written token, the end id included, of the model as it is; texts that ended at once have one."""
        total, count = 0.0, 0
        for prompt, ids in zip(self.prompts, texts, strict=True):
            written = [*ids, self.codec.eos][:WRITTEN]
            row = torch.cat([prompt, torch.tensor(written)])
            whole = float(losses(self.model, row[None])) * (len(row) - 1)
            total += whole - float(losses(self.model, prompt[None])) * (len(prompt) - 1)
            count += len(written)
        return total / count


@torch.no_grad()
def _pooled(model: nn.Module, steering: steer.Steering, given: Any, run: Callable[[Any], Any]) -> Mapping[str, Tensor]:
    """Mean over places of what the sites put out, after maps that are in force, (N, D) by site."""
    modules, seen = dict(model.named_modules()), dict[str, Tensor]()

    def listen(site: str) -> Hook:
        def read(module: nn.Module, _inputs: Any, output: Any) -> None:
            z = first_tensor(output)
            if z is not None:
                z_NPD = z.movedim(channel_dim(module, z), -1)
                seen[site] = z_NPD.reshape(len(z), -1, z_NPD.shape[-1]).mean(1)

        return Hook(read)

    handles = [modules[site].register_forward_hook(listen(site)) for site in steering.maps]
    try:
        with evaluating(model):
            run(given)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _parts(scheme: str) -> tuple[str, str, float]:
    """Method, sites and γ."""
    found = re.fullmatch(r"(\w+)_(mlp|norms|proj)(?:_gamma_(.+))?", scheme)
    assert found is not None  # `Steer` knows its schemes
    return found[1], found[2], float(found[3] or 0)
