"""The module of RMSNorm."""

from torch import Tensor, nn


class UpcastingRMSNorm(nn.RMSNorm):
    """RMSNorm in the precision of its scale; torch's has no kernel for bf16 inputs and an fp32 scale."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return super().forward(x.to(self.weight.dtype))
