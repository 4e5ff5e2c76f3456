"""The B series of 2004.02967: x over the larger of the batch's standard deviation and a function of the sample.

Shapes: B batch, C channels, H and W the image.
"""

import torch
from torch import Tensor

from foreshock.core.errors import ConfigError, require
from foreshock.layers._channels import Factory, PerChannel, at_least_fp32, check_eps


class SeriesB(PerChannel):
    """γ · x / max(√(s²_bhw + ε), rival(x)) + β on images (B, C, H, W).

    The variance is that of the batch in training, and a running one in evaluation: it starts at 1, and after every
    training forward is (1 - momentum) · itself + momentum · the batch's unbiased variance.
    """

    channel_dim = 1
    running_var: Tensor

    def __init__(self, num_features: int, apply_act: bool, momentum: float, eps: float, factory: Factory) -> None:
        super().__init__(num_features, factory)
        check_eps(self, eps)
        require(0 <= momentum <= 1, f"{type(self).__name__}: momentum", "must be in [0, 1]", momentum)
        self.apply_act, self.momentum, self.eps = apply_act, momentum, eps
        self.register_buffer("running_var", torch.ones(num_features, **factory))

    def rival(self, x: Tensor) -> Tensor:
        """What the batch's standard deviation is compared with, (B, C, H, W)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The layer, computed in at least fp32 and rounded once, to the dtype of x."""
        self.check_input(x)
        y = at_least_fp32(x)
        if self.apply_act:
            batch_std_C = (self._variance(y) + self.eps).sqrt()
            y = y / torch.maximum(self.along_channels(batch_std_C, y), self.rival(y))
        return self.affine(y).to(x.dtype)

    def _variance(self, x: Tensor) -> Tensor:
        """s²_bhw (C), and in training the step of the running one."""
        if not self.training:
            return self.running_var.to(x.dtype)
        n = x.numel() // x.shape[1]
        if n < 2:
            raise ConfigError(
                f"{type(self).__name__} needs two values or more of each channel to train on, got {tuple(x.shape)}; "
                "give a larger batch or image, or a layer of the S series"
            )
        variance_C = x.var((0, 2, 3), unbiased=False)
        with torch.no_grad():
            step_C = (variance_C * (n / (n - 1))).to(self.running_var.dtype)
            self.running_var.lerp_(step_C, self.momentum)
        return variance_C

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.weight.numel()}, apply_act={self.apply_act}, momentum={self.momentum}, eps={self.eps}"
