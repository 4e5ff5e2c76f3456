"""Masks on the inputs of a model's linears: from what the user asks to a handle in force."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from foreshock.core import plugins
from foreshock.core.config import Spec
from foreshock.core.errors import ConfigError, UserError, require, unknown
from foreshock.probes.batches import Batches, batches_of
from foreshock.probes.hooks import path
from foreshock.sparsity.allocation import Greedy, Threshold, allocate
from foreshock.sparsity.calibration import observe
from foreshock.sparsity.handle import GATES, Sparsified, check_share
from foreshock.sparsity.masks import Mask
from foreshock.sparsity.method import Method
from foreshock.sparsity.quantiles import Quantiles
from foreshock.sparsity.selection import Target, chosen_linears, targets

ALLOCATIONS = ("greedy", "uniform")


def sparsify(
    model: nn.Module,
    method: str | Spec = "wina",
    sparsity: Target = 0.5,
    calibration: Batches | None = None,
    *,
    modules: str | Sequence[str] | None = None,
    gate: Literal["topk", "threshold"] | None = None,
    prefill: float | Literal["all"] = "all",
    allocation: Literal["uniform", "greedy"] | Greedy = "uniform",
) -> Sparsified:
    """Let every linear y = W x of a model read m⊙x, m ∈ {0, 1}ᴺ chosen token by token, until the handle is removed.

    m keeps the channels of the largest scores: |x_j| ‖W_:,j‖ (`wina`, 2505.19427; `r_sparse`, 2504.19449, which adds
    a low-rank product of the others), |x_j| (`teal`, 2408.14690), or |act(gate x)_j| in gated MLPs (`cats`,
    2404.08763).
    With `gate="topk"` these are int(N(1-s)) channels of each token, of equal ones the first; with `"threshold"` those
    above the s-quantile of the scores of the calibration tokens, over the tokens that count. s = 0 changes no bit.

    Nothing is made faster: inputs are masked and multiplied densely, as for every figure on quality. Linears that share
    an input mask it each for itself. Embeddings and the head stay dense, tied or not. Gradients flow through what is
    kept; scores follow the weights when these change, thresholds and low-rank products do not. Calibration runs in
    evaluation mode and leaves the model as it was.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> with sparsify(model, "teal", 0.75, modules="0") as handle:
    ...     _ = model(torch.randn(3, 8))
    >>> handle.measured()
    {'0': 0.75}

    Args:
        model: any module, before `torch.compile`.
        method: a name, a text `name:option=value`, or a spec; see `foreshock.sparsity.methods`.
        sparsity: s, the share that is dropped, in [0, 1); or such shares by glob of linears, of which the last one that
            names a linear holds, and linears that none names stay dense.
        calibration: a tensor (samples, …), or batches: tensors, tuples of positional inputs, mappings of inputs by
            name. Positions whose `attention_mask` is 0 do not count for thresholds.
        modules: globs of linears. Default: those inside of blocks, or else those that `sparsity` names.
        gate: None is `"threshold"` where there is calibration, and else `"topk"`.
        prefill: in a pass of T > 1 tokens the last int(prefill · T) are masked, the others are dense; `"all"` is 1. The
            authors' code of WINA has 0.99, of TEAL 0.5. T is the dimension before the last of inputs of three or more.
        allocation: `"uniform"`, every linear has s; `"greedy"`, or a `Greedy` with its step: every block has s, its
            linears differ. Greedy needs calibration.

    Returns:
        The handle, a context manager: `remove()`, `sparsities`, `thresholds`, `measured()`, `error(batches)`,
        `state_dict()` and `load_state_dict()`.

    Raises:
        ConfigError: an unknown name or option, a number out of range, a glob that matches nothing (the nearest are
            offered), a model without linears (cats: without gated MLPs), calibration that is needed and not given or
            that is empty.
        UserError: a glob names what is no linear, a weight cannot be read, the model or a part of it is compiled, or a
            linear is sparsified by another handle, or in calibration not called or not finite. The model is left as it
            was.
    """
    require(isinstance(method, str | Spec), "method", "must be the name of a method, or a Spec", method)
    spec = plugins.resolve("sparsity.methods", Spec.parse(method) if isinstance(method, str) else method)
    kind, options = _gate(gate, calibration), _allocation(allocation, sparsity, calibration)
    share = check_share("prefill", prefill)
    _check_uncompiled(model)
    own: Method = plugins.load("sparsity.methods", spec)
    sites = own.sites(model, chosen_linears(model, modules, sparsity))
    asked = targets(sparsity, [site.path for site in sites])
    batches = [] if calibration is None else list(batches_of(calibration, "calibration"))
    masks = [Mask(site, own, share) for site in sites]
    handle = Sparsified(model, spec, masks, kind, share)
    try:
        handle.attach()
        _settle(model, masks, batches, asked, kind, options)
    except BaseException:
        handle.remove()
        raise
    return handle


def _settle(
    model: nn.Module,
    masks: Sequence[Mask],
    batches: Sequence[Any],
    asked: dict[str, float],
    gate: str,
    options: Greedy | None,
) -> None:
    """Give every mask its sparsity and threshold."""
    # Observed for greedy top-k gates too: it finds what is not called and not finite.
    seen = observe(model, masks, batches) if gate == "threshold" or options is not None else {}
    threshold = _thresholds(seen) if gate == "threshold" else _no_threshold
    if options is not None:
        asked = allocate(model, masks, batches, next(iter(asked.values())), options, threshold)
    for mask in masks:
        sparsity = asked[mask.site.path]
        mask.set(sparsity, threshold(mask, sparsity) if sparsity else None)
        mask.settle()


def _no_threshold(_mask: Mask, _sparsity: float) -> None:
    """With top-k gates."""


def _thresholds(seen: Mapping[str, Quantiles]) -> Threshold:
    def threshold(mask: Mask, sparsity: float) -> float:
        return seen[mask.site.path].quantile(1 - mask.method.kept(sparsity))

    return threshold


def _gate(gate: str | None, calibration: Batches | None) -> str:
    if gate is None:
        return "topk" if calibration is None else "threshold"
    if gate not in GATES:
        raise unknown("gate", gate, list(GATES))
    if gate == "threshold" and calibration is None:
        raise ConfigError('gate="threshold" takes thresholds from data: give calibration=, or use gate="topk"')
    return gate


def _allocation(allocation: str | Greedy, sparsity: Target, calibration: Batches | None) -> Greedy | None:
    """The options of greedy allocation; None where it is uniform."""
    if not isinstance(allocation, Greedy) and allocation not in ALLOCATIONS:
        raise unknown("allocation", allocation, list(ALLOCATIONS))
    if allocation == "uniform":
        return None
    if calibration is None:
        raise ConfigError('allocation="greedy" tries sparsities on data: give calibration=, or use "uniform"')
    require(isinstance(sparsity, int | float), "sparsity", "must be one number with greedy allocation", sparsity)
    return allocation if isinstance(allocation, Greedy) else Greedy()


def _check_uncompiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            which = path(name) or "the model"
            raise UserError(f"sparsify: {which} is compiled, and may never call what is put on; sparsify it before")
