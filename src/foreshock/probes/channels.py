"""Which dimension of a module's output holds its channels."""

from torch import Tensor, nn

from foreshock.probes.norms import is_norm

CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
"""Modules of torch's whose channels are dimension 1, whatever follows."""


def channel_dim(module: nn.Module, output: Tensor) -> int:
    """The last dimension, but the second of images (B, C, H, W).

    Linears and norms over features have it last whatever the number of dimensions, as a norm per head has.
    """
    if isinstance(module, CHANNELS_FIRST):
        return 1
    last = is_norm(module) or isinstance(module, nn.Linear) or output.ndim < 4
    return -1 if last else 1
