"""Known families as settings of the proxy."""

from foreshock.core.config import Spec
from foreshock.core.model_config import ModelConfig, NormSlots


def llama(*, width: int, depth: int, heads: int) -> ModelConfig:
    """Llama's block: RMSNorm, SwiGLU, RoPE (2302.13971), with as many key heads as query heads."""
    rms = Spec("rms_norm")
    return ModelConfig(
        width=width,
        depth=depth,
        heads=heads,
        mlp=Spec("swiglu"),
        norms=NormSlots(pre_attn=rms, pre_mlp=rms, final=rms),
    )
