"""Sizes of what enters, makes and leaves every linear of a block, forward and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foreshock.core.contracts import Context, Merge, Monitor, Need, Observer


@dataclass(frozen=True, kw_only=True)
class LinearNorms(Monitor):
    """L2 norms of W, X and Y of every linear Y = X W in the blocks, and of the gradients at X and Y.

    Source: 2410.16682, which watches W, X and Y of QKV, Proj, FC1 and FC2, and the gradients at the inputs of QKV
    and FC1; how it reduces them is not known, so that both ways are recorded. Rows, each with the path
    `<block>.<role>` (`blocks.0.q`) in the proxy and the module's name elsewhere:

    - `linear_norms/weight`: ‖W‖_F, the weight in the forward pass: before the update, and of a parametrized linear
      what the parametrization makes of it.
    - `linear_norms/input`, `/output`: ‖X‖_F, ‖Y‖_F over batch, tokens and features; it grows with √tokens.
    - `linear_norms/input_token`, `/output_token`: mean over batch and tokens of the L2 norm over features.
    - `linear_norms/grad_input`, `/grad_output`: ‖∂loss/∂X‖_F, ‖∂loss/∂Y‖_F; `/grad_input_token`,
      `/grad_output_token`: the mean over tokens. The loss is what `backward` was called on, extra losses and any
      loss scale included; with a mean over n tokens the gradient at one of them is of order 1/n.

    The gradient at X of a linear is its own share g_Y Wᵀ. Linears that read the same X have rows of their own and
    one more set of what they would be as one matrix: `qkv` (q, k and v: the paper's QKV) and `gate_up` (gate and
    fc1, the FC1 of a gated MLP). There W and Y are the concatenations, and the gradient at X is the sum of the
    shares, which is what reaches the norm before them. That they are given one tensor is checked at every step:
    without it, as in cross-attention, there is no such row.

    X and Y are those of the last training forward of the step, gradients are summed up over all its backward passes
    (√Σ‖·‖²; mean over all tokens). Linears are seen where they are called as modules with one positional input,
    also compiled and under activation checkpointing; `nn.MultiheadAttention` calls none, and of a linear that tensor
    parallelism cuts the weight alone is read. In a model without ModuleLists all linears are taken. Cost on logged
    steps: one pass over X, Y and their gradients in fp32, one more over the gradient at a shared X, and one number a
    token is kept; on other steps nothing.
    """

    needs = frozenset({Need.ACTIVATIONS, Need.GRADIENTS})
    merges: ClassVar = {
        "weight": Merge.ROOT_MEAN_SQUARE,
        "input": Merge.NORM,
        "output": Merge.NORM,
        "grad_input": Merge.GRADIENT_NORM,
        "grad_output": Merge.GRADIENT_NORM,
        "grad_input_token": Merge.GRADIENT_MEAN,
        "grad_output_token": Merge.GRADIENT_MEAN,
    }

    def attach(self, context: Context) -> Observer:
        """Hooks on every linear."""
        from foreshock.monitors._paths import linear_path
        from foreshock.probes.hooks import TapsObserver
        from foreshock.probes.linears import LinearTaps, fused_of, linears_of

        linears = {linear_path(name, context): linear for name, linear in linears_of(context.model).items()}
        taps = LinearTaps(linears, fused_of(list(linears)))
        return TapsObserver(taps, lambda seen: {f"linear_norms/{key}": value for key, value in seen.items()})
