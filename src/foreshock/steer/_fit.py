"""Fit affine maps from two sets of samples."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from foreshock.core import plugins
from foreshock.core.config import Spec
from foreshock.core.errors import UserError, require
from foreshock.steer._activations import Fitting, OnStep
from foreshock.steer._samples import Given, Samples, frozen
from foreshock.steer._sites import sites_of
from foreshock.steer.handle import Steering
from foreshock.steer.methods._contract import Method


def fit(
    model: nn.Module,
    source: Given,
    target: Given,
    *,
    sites: str | Sequence[str] | None = None,
    method: str | Method = "lineas",
    on_step: OnStep | None = None,
) -> Steering:
    """Fit maps T(z) = ω ⊙ z + b after sites of a frozen model, which bring what it makes of a source to a target.

    The samples are unpaired: distributions are matched, channel by channel, over one vector a sample, which is pooled
    over its tokens or places (all dimensions but the first and the channels). The maps then act on all tokens and
    places. Channels are in the last dimension; in outputs of four dimensions and more (B, C, H, W) in the second,
    unless the site is a norm over features or a linear. Sources: LinEAS 2503.10679, AcT 2410.23054.

    Anything that is a module may be steered: it is called with the batches as they are. It is fitted in eval mode, and
    left as it was, but for the maps: mode, parameters and what they want, buffers, global generators.

    Args:
        model: any module, before `torch.compile`.
        source: samples to be mapped: a tensor (N, …) whose rows are samples; or several batches, each a tensor, a
            tuple of positional inputs or a mapping by name. Of a mapping with `attention_mask` (B, T), masked tokens
            do not count. At least four samples.
        target: samples of what they are to be like; as many, or not.
        sites: globs of module names. The default: the norms of each block but for its first, which in Llama, GPT-2 and
            the proxy is the norm before the MLP; see `_sites.sites_of`.
        method: `lineas`, `mean_act`, `gaussian_act`, `linear_act`, `iti` or `aura`; such a name with options, as
            `lineas:gamma=0.001,steps=300`; or a method such as `LinEAS(gamma=0.001)`.
        on_step: called with the step and the loss after every step of methods that take steps.

    Returns:
        The maps in force, as a context manager that takes them off.

    Raises:
        ConfigError: unknown sites or method (the nearest are offered), an option out of range, too few samples.
        UserError: a site is never called, or several times in a pass, gives no real numbers, or numbers that are not
            finite or whose shape differs between source and target; the loss diverges. The model is as it was then.
    """
    chosen = plugins.load("steer.methods", Spec.parse(method)) if isinstance(method, str) else method
    require(isinstance(chosen, Method), "method", "must be the name of a method, or one such as LinEAS()", method)
    modules = sites_of(model, sites)
    fitting = Fitting(
        model=model,
        sites=modules,
        source=Samples(source, "source"),
        target=Samples(target, "target"),
        on_step=on_step or _unheard,
    )
    with frozen(model):
        order = _check(fitting, chosen)
        fitting = replace(fitting, sites={site: modules[site] for site in order})
        maps = chosen.maps(fitting)
    for site, own in maps.items():
        if not (own.omega_D.isfinite().all() and own.b_D.isfinite().all()):
            raise UserError(f"site {site!r}: the fitted map is not finite; leave the site out, or give more samples")
    example, _ = next(fitting.source.batches())
    return Steering(model, maps, example=example).attach()


def _check(fitting: Fitting, method: Method) -> list[str]:
    """The sites in the order of calls; an error where their activations cannot be fitted."""
    sources, targets = fitting.sources(method.pool), fitting.targets(method.pool)
    for name, activations in (("source", sources), ("target", targets)):
        _check_finite(activations, name)
    for site, source_ND in sources.items():
        sizes = source_ND.shape[1], targets[site].shape[1]
        if sizes[0] != sizes[1]:
            raise UserError(f"site {site!r} gives {sizes[0]} channels for the source and {sizes[1]} for the target")
    return list(sources)


def _check_finite(activations: Mapping[str, Tensor], name: str) -> None:
    for site, z_ND in activations.items():
        wrong = int((~z_ND.isfinite()).any(dim=1).sum())
        if wrong:
            raise UserError(
                f"site {site!r}: {wrong} of {len(z_ND)} samples of the {name} give activations that are not finite; "
                "leave those samples out, or mend the model"
            )


def _unheard(_step: int, _loss: float) -> None:
    """Nobody is told."""
