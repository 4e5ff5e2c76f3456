"""Move what a drifted model puts out towards a healthy one, site by site, in closed form.

Shapes: K tokens, the same ones of both models, D channels of a site.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from foreshock.core import plugins
from foreshock.core.config import Spec
from foreshock.core.errors import UserError, unknown, unknown_path
from foreshock.probes.batches import Batches, batches_of
from foreshock.probes.hooks import Hook, blocks_of, path
from foreshock.probes.norms import norms_of
from foreshock.probes.paired import TOKENS, Sample, paired_samples, run
from foreshock.steer._sites import sites_of
from foreshock.steer.handle import Steering
from foreshock.steer.maps import AffineMap
from foreshock.steer.methods._contract import LocalMethod
from foreshock.steer.methods.linear_act import ROUNDING

METHODS = ("paired", "linear_act", "gaussian_act", "mean_act")
"""Closed forms: least squares over the same tokens, or over sorted ones, moments, and means."""


def repair(
    model: nn.Module,
    healthy: nn.Module,
    batches: Batches,
    *,
    sites: str | Sequence[str] | None = None,
    method: str = "paired",
    max_tokens: int = TOKENS,
) -> Steering:
    """Fit maps T(z) = ω ⊙ z + b after sites of a drifted model, so that it puts out what a healthy one does there.

    `paired` minimises Σ_k (h_k - ω x_k - b)² by channel, x and h the outputs of the drifted and the healthy model
    at the same token: ω = Σ x̃ h̃ / Σ x̃² of centred values, b = h̄ - ω x̄. Both models see the same batches, so
    that pairs are known: this is the least error that maps by channel can leave, with the sign of a flipped
    channel, and a channel that has lost its relation to the healthy one is drawn to its mean. `linear_act`
    (2410.23054) sorts x and h first, as must be done with unpaired samples: it restores the distribution, whichever
    token a value belongs to.

    Sites are taken in the order of calls, each fitted under the maps before it. Only what is affine by channel can
    be repaired so, and only while the layers behind still expect the healthy activations, as soon after a spike: a
    model that has been trained on since can get worse. `foreshock.drift` before and after, and the loss on other
    batches, tell which it is. Both models are left as they were, but for the maps.

    Args:
        model: the drifted one, before `torch.compile`.
        healthy: a checkpoint from before, or a copy in another precision, with modules of the same names.
        batches: as `foreshock.drift` takes them: a tensor (B, …), a mapping, or several batches.
        sites: globs of module names. The default: all norms, whose parameters `Steering.merge` writes maps into; the
            blocks of a model without norms.
        method: `paired`, or on the same tokens `linear_act`, `gaussian_act` or `mean_act`, which ignore the pairing.
        max_tokens: most tokens that a site is fitted to; a uniform sample of them.

    Returns:
        The maps in force, as a context manager that takes them off.

    Raises:
        ConfigError: unknown sites or method, or a site that healthy has not (the nearest are offered); fewer than two
            tokens; outputs of different shapes.
        UserError: a site is never called, or several times in a pass, or is not finite in one of the models.
    """
    if method.partition(":")[0] not in METHODS:
        raise unknown("method of repair", method, list(METHODS))
    fit_map = _paired if method == "paired" else _local(method)
    batches = batches if isinstance(batches, Tensor | Mapping) else list(batches)
    known = {path(name): module for name, module in healthy.named_modules() if name}
    named = _chosen(model, sites)
    for site in named:
        if site not in known:
            raise unknown_path("site of healthy", site, list(known))
    maps: dict[str, AffineMap] = {}
    for site in _in_order(model, named, batches):
        with Steering(model, maps):
            found, _ = paired_samples(model, healthy, batches, {site: (named[site], known[site])}, max_tokens)
        maps[site] = fit_map(*_finite(site, found.get(site)))
    return Steering(model, maps).attach()


def _chosen(model: nn.Module, sites: str | Sequence[str] | None) -> Mapping[str, nn.Module]:
    return sites_of(model, sites) if sites is not None else norms_of(model) or blocks_of(model) or sites_of(model, None)


def _in_order(model: nn.Module, sites: Mapping[str, nn.Module], batches: Batches) -> list[str]:
    """The sites in the order in which a forward pass calls them."""
    order: list[str] = []

    def heard(site: str) -> Hook:
        return Hook(lambda *_: order.append(site))

    handles = [module.register_forward_hook(heard(site)) for site, module in sites.items()]
    try:
        with torch.no_grad():
            run(model, next(batches_of(batches, "batches")))
    finally:
        for handle in handles:
            handle.remove()
    silent = [site for site in sites if site not in order]
    if silent:
        raise UserError(f"never called in a forward pass: {', '.join(silent)}; name other sites, before torch.compile")
    repeated = [site for site in sites if order.count(site) > 1]
    if repeated:
        raise UserError(f"called several times in a pass: {', '.join(repeated)}; name sites that are called once")
    return order


def _finite(site: str, sample: Sample | None) -> tuple[Tensor, Tensor]:
    """Outputs (K, D) of the drifted and the healthy model."""
    if sample is None:
        raise UserError(f"site {site!r} gives no real numbers by channel; name a module that does")
    for name, wrong in zip(("the model", "healthy"), sample.not_finite, strict=True):
        if wrong:
            raise UserError(
                f"site {site!r}: {wrong:,} values are not finite in {name}, and no affine map brings them back; "
                "take an earlier checkpoint, or leave the inputs out that lead there"
            )
    return sample.a_KD, sample.b_KD


def _paired(x_KD: Tensor, h_KD: Tensor) -> AffineMap:
    """The line of least squares from x to h by channel; where x spreads no more than by rounding, a shift alone."""
    dtype = x_KD.dtype
    rounding_D = ROUNDING * torch.finfo(dtype).eps * x_KD.abs().amax(0).double()
    x_KD, h_KD = x_KD.double(), h_KD.double()
    x_D, h_D = x_KD.mean(0), h_KD.mean(0)
    spread_D = (x_KD - x_D).square().sum(0)
    slope_D = ((x_KD - x_D) * (h_KD - h_D)).sum(0) / spread_D
    omega_D = slope_D.where(spread_D > len(x_KD) * rounding_D.square(), 1.0)
    return AffineMap(omega_D=omega_D.to(dtype), b_D=(h_D - omega_D * x_D).to(dtype))


def _local(method: str) -> Callable[[Tensor, Tensor], AffineMap]:
    loaded: LocalMethod = plugins.load("steer.methods", Spec.parse(method))
    return loaded.map
