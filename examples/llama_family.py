"""A Llama family, scaled down: Hugging Face's own model code at any width, depth and number of heads.

    foreshock study --model examples/llama_family.py:build --sizes 32x2 64x3 --out out/llama

Everything that makes it a Llama stays (RMS norms, RoPE, SwiGLU, grouped queries, an untied head); only its sizes are
those of a proxy. Run as a script, it makes the smallest study of it that shows a report.
"""

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def build(width: int, depth: int, heads: int, vocab_size: int) -> nn.Module:
    """A Llama of these sizes, freshly initialised as transformers does it; nothing is downloaded."""
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),  # the query heads that share a key head stay two at every size
        intermediate_size=round(8 / 3 * width),
        vocab_size=vocab_size,
        max_position_embeddings=1024,
        initializer_range=width**-0.5,  # 0.02, the default, is that of a width of 2,500
        use_cache=False,
    )
    return LlamaForCausalLM(config)


if __name__ == "__main__":
    from dataclasses import replace

    import foreshock
    from foreshock.core.config import replace_at

    study = foreshock.recipes.quick()
    base = replace_at(replace_at(study.base, "model.build", "llama_family:build"), "train.steps", 60)
    sizes = (foreshock.Size.parse("32x2"), foreshock.Size.parse("64x2"))
    result = foreshock.run_study(
        replace(study, name="llama", base=base, sizes=sizes, lrs=(1e-2, 1e-1), arms=(foreshock.Arm(),)), "out/llama"
    )
    for failure in result.failures:
        raise SystemExit(f"{failure.label}: {failure.reason}")
    print(result.out / "report.html")
