"""Tensors that may be cut over ranks (DTensors): what is held here, and how it counts towards the whole.

Nothing here communicates. A sum over a whole tensor is the mean over the ranks of `shards(tensor)` times the sum over
the part that each of them holds, however unevenly it is cut and however many ranks hold the same part.
"""

import math
import sys

import torch
from torch import Tensor, nn

from foreshock.core.errors import UserError
from foreshock.probes.curvature.space import is_distributed as is_distributed


def readable(tensor: Tensor) -> bool:
    """Whether there is something to measure here: real or complex numbers, and not only a term of a sum over ranks.

    Not so for quantised weights, tensors without elements, DTensors that wait to be summed up (`Partial`), and those
    that live on other ranks.

    Raises:
        UserError: the tensor is on the meta device.
    """
    if tensor.is_meta:
        raise UserError(
            "a parameter is on the meta device and has no values; materialise the model before it is watched: "
            "model.to_empty(device=...), then initialise it or load a checkpoint"
        )
    if is_distributed(tensor):
        waits = any(placement.is_partial() for placement in tensor.placements)
        if waits or tensor.device_mesh.get_coordinate() is None:
            return False
    # An fp8 or integer weight means nothing without the scales that are kept elsewhere.
    numeric = tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype.itemsize > 1)
    return numeric and tensor.numel() > 0


def held(tensor: Tensor) -> Tensor:
    """The values held here, real and without graph: the local shard of a DTensor, those that a sparse tensor has."""
    local: Tensor = tensor.detach()
    if is_distributed(local):
        local = local.to_local()
    if local.layout == torch.sparse_coo:
        local = local.coalesce().values()
    return torch.view_as_real(local.resolve_conj()) if local.is_complex() else local


def shards(tensor: Tensor) -> int:
    """Into how many different parts a tensor is cut over the ranks; 1 for all but DTensors."""
    return math.prod(_cuts(tensor))


def tensor_parallel(model: nn.Module) -> int:
    """How many ranks share the work on one batch, each with its own part of matrices and heads; 1 without such.

    Known by DTensor parameters that no `fully_shard` gathers for the forward pass, and below one by a second cut.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    units = [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    gathered = {parameter for unit in units for parameter in unit.parameters()}
    cuts = ((_cuts(parameter), parameter in gathered) for parameter in model.parameters())
    return max((math.prod(sizes[1:] if whole else sizes) for sizes, whole in cuts), default=1)


def _cuts(tensor: Tensor) -> list[int]:
    """The sizes of the mesh dimensions that a tensor is cut along."""
    if not is_distributed(tensor):
        return []
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return [size for size, placement in sizes if not placement.is_replicate()]
