"""What an optimizer is about to do, read from its state, and root mean squares of many tensors at once."""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from foreshock.probes.precision import accurate, accurate_dtype
from foreshock.probes.shards import held, is_distributed, readable, shards


def unscaled_update(optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
    """The optimizer's output before the learning rate, from its state after a step; None where it is unknown.

    Adam and AdamW: `(m / (1 - β1ᵗ)) / (√(v / (1 - β2ᵗ)) + ε)`. SGD: the momentum buffer (with Nesterov
    `g + μ·buffer`), or the gradient where there is no momentum. Decoupled decay is no part of it. An optimizer
    is known by the keys of its groups and state, so subclasses and fused versions are read as well. Of a parameter
    that is cut over ranks it is the part held here.
    """
    for group in optimizer.param_groups:
        if any(member is parameter for member in group["params"]):
            return next((update for _, update in _updates([parameter], group, optimizer)), None)
    return None


def unscaled_updates(optimizer: Optimizer) -> Iterator[tuple[Tensor, Mapping[str, Any], Tensor]]:
    """Every parameter with its group and its `unscaled_update`, made one at a time; unknown ones are left out."""
    for group in optimizer.param_groups:
        for parameter, update in _updates(group["params"], group, optimizer):
            yield parameter, group, update


def _updates(
    parameters: Sequence[Tensor], group: Mapping[str, Any], optimizer: Optimizer
) -> Iterator[tuple[Tensor, Tensor]]:
    """The parameters of one group with what the optimizer made of them."""
    states = adam_states(optimizer, group, parameters)
    if states:
        yield from _adam_updates(states, group)
    elif is_sgd(group):
        for parameter in parameters:
            update = _sgd_update(parameter, group, optimizer.state.get(parameter, {}))
            if update is not None and readable(update):
                yield parameter, _local(update)


@torch.no_grad()
def _adam_updates(
    states: Mapping[Tensor, Mapping[str, Any]], group: Mapping[str, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    held_here = [local_state(state) for state in states.values()]
    moments = zip(adam_means(held_here, group), adam_roots(held_here, group), strict=True)
    for parameter, (mean, root) in zip(states, moments, strict=True):
        yield parameter, mean.div_(root.add_(group["eps"]))


def is_adam(group: Mapping[str, Any]) -> bool:
    """Whether a parameter group is one of torch's Adam or AdamW, by its keys."""
    # "amsgrad" tells them from RAdam and NAdam, whose moments are combined in another way.
    return group.keys() >= {"betas", "eps", "amsgrad"}


def is_sgd(group: Mapping[str, Any]) -> bool:
    """Whether a parameter group is one of torch's SGD, by its keys."""
    return group.keys() >= {"momentum", "dampening", "nesterov"}


def adam_states(
    optimizer: Optimizer, group: Mapping[str, Any], parameters: Iterable[Tensor]
) -> dict[Tensor, Mapping[str, Any]]:
    """State of those among a group's parameters that torch's Adam or AdamW has stepped; empty for other optimizers."""
    if not is_adam(group):
        return {}
    return {p: state for p in parameters if "exp_avg_sq" in (state := optimizer.state.get(p, {}))}


def local_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Optimizer state of one parameter, as far as it is held here; itself where nothing is cut over ranks."""
    if not any(isinstance(value, Tensor) and is_distributed(value) for value in state.values()):
        return state
    return {name: _local(value) if isinstance(value, Tensor) else value for name, value in state.items()}


def _local(tensor: Tensor) -> Tensor:
    return held(tensor) if is_distributed(tensor) else tensor


def adam_means(states: Collection[Mapping[str, Any]], group: Mapping[str, Any]) -> Iterator[Tensor]:
    """Adam's bias-corrected first moment m / (1 - β1ᵗ) of each state, made one at a time, in at least fp32."""
    for state, correction in zip(states, _corrections(states, group["betas"][0]), strict=True):
        yield accurate(state["exp_avg"]) / correction


def adam_roots(states: Collection[Mapping[str, Any]], group: Mapping[str, Any]) -> Iterator[Tensor]:
    """√(v / (1 - β2ᵗ)), v the second moment, or the largest so far with amsgrad; otherwise as `adam_means`."""
    second_moment = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
    for state, correction in zip(states, _corrections(states, group["betas"][1]), strict=True):
        yield (accurate(state[second_moment]) / correction).sqrt_()


def _corrections(states: Collection[Mapping[str, Any]], beta: float) -> Sequence[Tensor]:
    """1 - βᵗ for each state (0-d), t its step."""
    if not states:
        return ()
    # Fused and capturable versions keep the step on the device: stay a tensor, so that nothing is copied.
    steps = torch.stack([torch.as_tensor(state["step"]).double() for state in states])
    corrections: Sequence[Tensor] = (1 - beta**steps).unbind()
    return corrections


def _sgd_update(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor | None:
    gradient = parameter.grad
    buffer: Tensor | None = state.get("momentum_buffer")
    if not group["momentum"] or buffer is None:
        return gradient
    if group["nesterov"]:
        return None if gradient is None else gradient + group["momentum"] * buffer
    return buffer


def rms(tensor: Tensor) -> Tensor:
    """Root mean square over all elements, 0-d, in at least fp32.

    >>> rms(torch.tensor([3.0, 4.0, 0.0, 0.0]))
    tensor(2.5000)
    """
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=accurate_dtype(tensor))
    return norm / math.sqrt(tensor.numel())


def l2_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The L2 norm of each tensor, 0-d each, in one batched call and at least fp32.

    Of a tensor that is cut over ranks it is √shards · ‖part held here‖, without communication: the root mean square of
    that over all ranks is the norm of the whole.
    """
    if not tensors:
        return []
    parts = [held(tensor) for tensor in tensors]
    norms = list(torch._foreach_norm(parts, dtype=accurate_dtype(*parts)))
    cuts = [shards(tensor) for tensor in tensors]
    return [norm * math.sqrt(cut) if cut > 1 else norm for norm, cut in zip(norms, cuts, strict=True)]


def total_norm(tensors: Iterable[Tensor]) -> Tensor | None:
    """The L2 norm of all tensors together, 0-d, of those that can be read; None if there are none.

    Over ranks it is merged as `l2_norms` are, by the root mean square.
    """
    norms = l2_norms([tensor for tensor in tensors if readable(tensor)])
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])) if norms else None


def grouped_rms(keys: Sequence[str], norms: Sequence[Tensor], sizes: Sequence[int]) -> dict[str, Tensor]:
    """Root mean square over all tensors of the same key, from the tensors' L2 norms and element counts.

    `rms(key) = √(Σ norm² / Σ size)`, sums over the tensors of the key.
    """
    if not keys:
        return {}
    counts: Counter[str] = Counter()
    for key, size in zip(keys, sizes, strict=True):
        counts[key] += size
    # Counts stay Python numbers: an index or count tensor would be a copy to the device, which waits for it.
    shares = torch._foreach_div(list(norms), [math.sqrt(counts[key]) for key in keys])
    members: dict[str, list[Tensor]] = defaultdict(list)
    for key, share in zip(keys, shares, strict=True):
        members[key].append(share)
    return {key: torch.linalg.vector_norm(torch.stack(own)) if own[1:] else own[0] for key, own in members.items()}
