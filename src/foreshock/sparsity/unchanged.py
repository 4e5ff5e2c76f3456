"""Whether an edit that should keep a model's function did: its outputs before and after, on one batch."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from foreshock.core.errors import UserError
from foreshock.probes.batches import call, evaluating


def run(model: nn.Module, inputs: Any) -> Any:
    """The model's output on one batch, in evaluation mode, without gradients; everything is afterwards as it was.

    Args:
        model: any module.
        inputs: a tensor; a tuple or list of positional inputs; or a mapping of inputs by name.
    """
    with torch.no_grad(), evaluating(model):
        return call(model, inputs)


def check_unchanged(before: Any, after: Any) -> None:
    """All real numbers in two outputs agree, ‖new - old‖ ≤ √ε ‖old‖, ε that of their dtype, or of fp32 if it is finer.

    Many models take norms in fp32 whatever their own dtype. Rounding stays far below that, and an edit that does not
    keep the function changes outputs by far more.

    Raises:
        UserError: they do not.
    """
    for old, new in zip(_numbers(before), _numbers(after), strict=True):
        rounding = max(torch.finfo(old.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
        if not (new.double() - old.double()).norm() <= rounding * old.double().norm():
            raise UserError(
                "the rotation changed the model's outputs on the inputs given, and was undone: something else reads "
                "the output of a norm in a way that was not seen, or changes it in place, or the outputs are not "
                "finite; name the norms that are safe in `norms`"
            )


def _numbers(outputs: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]
