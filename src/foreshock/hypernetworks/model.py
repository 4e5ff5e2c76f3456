"""Any model with some of its parameters predicted from hyper-inputs: θ = θ0 + h(E(γ)).

Shapes: B batch, D hyper-inputs, P predicted numbers.
"""

import warnings
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from foreshock.core.errors import ConfigError, require
from foreshock.hypernetworks.design import MIP, Design
from foreshock.hypernetworks.network import Hypernetwork, initialise
from foreshock.hypernetworks.selection import Choice, select, usual_variance

_ONLY_TENSORS = (
    "may have a row for each sample where the model answers with tensors alone (with use_cache=False, models of "
    "transformers do); else give one gamma for the batch. It answers with more"
)


def hypernetize(
    model: nn.Module, *, parameters: Choice, input_dim: int, design: Design = MIP, seed: int = 0
) -> "Hypernetized":
    """Predict some parameters of a model from hyper-inputs γ in [0, 1] (MIP, ICLR 2024).

        θ(γ) = θ0 + h(E(γ)),   E(γ) = [cos(γπ/2), sin(γπ/2)]

    θ0 are the model's own parameters of now. A plain hypernetwork h(γ) with a rectifier predicts parameters in
    proportion to ‖γ‖; the encoding has the same norm for every γ.

    Args:
        model: any module. It is neither copied nor changed, and goes on to share its parameters with the result.
        parameters: which ones: a glob of names (`"*.weight"`), a list of them, or a function of (name, parameter).
        input_dim: D, how many hyper-inputs there are.
        design: encoding, base, initialisation and layers of h.
        seed: the weights of h follow from it; no global generator moves.

    Raises:
        ConfigError: a name that matches nothing, or a parameter or module that this cannot work with.
    """
    require(type(input_dim) is int and input_dim >= 1, "input_dim", "must be a whole number of at least 1", input_dim)
    require(isinstance(model, nn.Module), "model", "must be a torch.nn.Module", type(model).__name__)
    require(isinstance(design, Design), "design", "must be a Design, such as foreshock.hypernetworks.MIP", design)
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError("model: parameters of a ScriptModule cannot be replaced; give the module it was made from")
    chosen = select(model, parameters)
    dtype = reduce(torch.promote_types, (parameter.dtype for parameter in chosen.values()), torch.float32)
    network = Hypernetwork(input_dim, sum(parameter.numel() for parameter in chosen.values()), design, dtype)
    shares = [(parameter.numel(), usual_variance(parameter, design.base)) for parameter in chosen.values()]
    initialise(network, shares, design.init, seed)
    network.to(next(iter(chosen.values())).device)
    return Hypernetized(model, tuple(chosen), network, base=design.base)


class Hypernetized(nn.Module):
    """A model some of whose parameters are predicted; called as `wrapped(gamma, *inputs, **kwargs)`."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], hypernetwork: Hypernetwork, *, base: bool) -> None:
        """See `hypernetize`."""
        super().__init__()
        self.model, self.hypernetwork = model, hypernetwork
        self.names, self.base = names, base
        self.training = model.training

    def forward(self, gamma: Tensor, /, *inputs: Any, **kwargs: Any) -> Any:
        """The model's output under the parameters predicted from γ.

        Args:
            gamma: (D,), the same for the whole batch; or (B, D), a row for each sample. Every tensor among the inputs
                then has B as its first dimension, and the result is that of a loop which gives the model one sample at
                a time, as a batch of one. An output without dimensions, such as a loss, becomes one for each sample.
            inputs: the model's own.
            kwargs: the same.

        Raises:
            ConfigError: hyper-inputs of another shape or outside [0, 1], inputs without the batch of `gamma`, or a
                module that cannot take samples one by one.
        """
        parameters = self.predict_parameters(gamma)
        if gamma.dim() == 1:
            return functional_call(self.model, parameters, inputs, kwargs)
        return self._each(parameters, len(gamma), inputs, kwargs)

    def predict_parameters(self, gamma: Tensor) -> dict[str, Tensor]:
        """The predicted parameters by name: shaped like the model's own for γ (D,), (B, *shape) for γ (B, D).

        Values outside [0, 1] raise where γ is on the CPU. Elsewhere, and in compiled code, to look at them would wait
        for the device: there they become nan, and so does all that is predicted from them.

        Raises:
            ConfigError: hyper-inputs of another shape, or outside [0, 1].
        """
        numbers = self.hypernetwork(_inside(gamma, self.hypernetwork.input_dim))
        own = {name: attrgetter(name)(self.model) for name in self.names}
        parts = numbers.split([parameter.numel() for parameter in own.values()], dim=-1)
        predicted = {}
        for (name, parameter), part in zip(own.items(), parts, strict=True):
            shaped = part.reshape((*gamma.shape[:-1], *parameter.shape)).to(parameter.device, parameter.dtype)
            predicted[name] = parameter + shaped if self.base else shaped
        return predicted

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """All that is trained: without a base, what is predicted stands in for the model's own, which is left out."""
        replaced = set() if self.base else {id(attrgetter(name)(self.model)) for name in self.names}
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if id(parameter) not in replaced:
                yield name, parameter

    def extra_repr(self) -> str:
        """What is predicted."""
        return f"predicts {', '.join(self.names)}; base={self.base}"

    def _each(self, parameters: Mapping[str, Tensor], batch: int, inputs: Any, kwargs: Any) -> Any:
        """The output for every sample under its own parameters, all samples at once."""
        leaves, tree = tree_flatten((inputs, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for tensor in tensors:
            right = tensor.dim() > 0 and len(tensor) == batch
            require(right, "inputs", f"must have the {batch} samples of gamma first", tuple(tensor.shape))
        self._check_samples()

        def one(own: dict[str, Tensor], sample: list[Tensor]) -> Any:
            rest = iter(sample)
            given = [next(rest)[None] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, named = tree_unflatten(given, tree)
            output = functional_call(self.model, own, args, named)
            for part in tree_flatten(output)[0]:
                require(isinstance(part, Tensor), "gamma", _ONLY_TENSORS, type(part).__name__)
            return tree_map(lambda part: part[0] if part.dim() else part, output)

        with warnings.catch_warnings():  # what torch cannot batch it loops over, to the same result
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return torch.vmap(one, randomness="different")(dict(parameters), tensors)

    def _check_samples(self) -> None:
        for name, module in self.model.named_modules():
            kind = type(module).__name__
            if isinstance(module, _NormBase) and module.training and module.track_running_stats:
                raise ConfigError(
                    f"gamma: with a row for each sample, {kind} {name!r} would keep statistics of single samples; "
                    "call eval() on it, or give one gamma for the batch"
                )
            if isinstance(module, nn.RNNBase):
                raise ConfigError(
                    f"gamma: torch cannot run {kind} {name!r} with parameters for each sample; give one gamma at a time"
                )


def _inside(gamma: Tensor, input_dim: int) -> Tensor:
    """Hyper-inputs of the right shape and range."""
    require(isinstance(gamma, Tensor), "gamma", "must be a tensor", gamma)
    shaped = gamma.dim() in (1, 2) and gamma.shape[-1] == input_dim and len(gamma) > 0 and not gamma.is_complex()
    require(shaped, "gamma", f"must be real, ({input_dim},) or (batch, {input_dim})", (*gamma.shape, gamma.dtype))
    inside = (gamma >= 0) & (gamma <= 1)
    if gamma.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where(inside, gamma, torch.nan)
    if not inside.all():
        raise ConfigError(f"gamma must be in [0, 1], and holds {gamma[~inside][0].item():g}; scale each to its range")
    return gamma
