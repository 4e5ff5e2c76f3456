"""Steps that are shorter than the precision of what they move.

Weights that lie exactly on the grid of a low-precision type (its own parameters, or those loaded from a checkpoint in
bf16 and trained under autocast) round back to where they were after a short step. A difference of gradients is then too
small without a word: by half in a small language model. With noise of up to one unit in the last place, the same for
both gradients, the step is right on average. Shapes: N the trainable parameters held here as one vector.
"""

import torch
from torch import Tensor

from foreshock.core.errors import UserError
from foreshock.probes.curvature.space import ParameterSpace, local_part

HALF = (torch.bfloat16, torch.float16)


def arithmetic(lowest: torch.dtype, device: torch.device) -> torch.dtype:
    """The type whose precision products have, of the least precise in a graph: TF32 does not show in it.

    TF32 has the precision of float16, which stands for it.
    """
    tf32 = device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return torch.float16 if tf32 and lowest == torch.float32 else lowest


@torch.no_grad()
def dither(space: ParameterSpace, lowest: torch.dtype) -> Tensor | None:
    """Noise (N), the same at every call: uniform in ± one unit in the last place where a weight is on the grid.

    None for types that are not half precision. Weights of 0 have no grid about them.
    """
    if lowest not in HALF:
        return None
    parts = []
    for parameter in space.parameters:
        part = local_part(parameter)
        generator = torch.Generator(part.device).manual_seed(0)
        noise = torch.rand(part.shape, generator=generator, device=part.device) * 2 - 1
        ulp = torch.ldexp(torch.full_like(noise, torch.finfo(lowest).eps), torch.frexp(part.float()).exponent - 1)
        parts.append(torch.where(_on_grid(part, lowest), noise * ulp, 0.0))
    return space.flatten(parts)


def require_off_grid(space: ParameterSpace, lowest: torch.dtype) -> None:
    """A gradient that is there already had no noise. Waits for the device in half precision.

    Raises:
        UserError: most weights lie on the grid, so that it cannot serve.
    """
    if lowest not in HALF:
        return
    count = sum(_on_grid(local_part(parameter), lowest).sum().to(space.device) for parameter in space.parameters)
    if bool(2 * count > space.dim):
        raise UserError(
            f"most weights are exactly those of {str(lowest).removeprefix('torch.')}, in which short steps round away "
            f"when a gradient is reused; take a new base gradient, or use central_differences"
        )


def _on_grid(part: Tensor, lowest: torch.dtype) -> Tensor:
    return (part.to(lowest).to(part.dtype) == part) & (part != 0)
