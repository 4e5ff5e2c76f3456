"""Lion: the sign of a momentum."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lion(Optimizer):
    """`θ ← θ - η·(sign(β1·m + (1-β1)·g) + λ·θ)`, then `m ← β2·m + (1-β2)·g` (2302.06675 algorithm 2).

    Every entry moves by η, so that the best η is several times smaller than AdamW's. One buffer a parameter.
    Where g or m is not finite the parameter becomes nan: torch's sign of nan is 0, which would freeze it unseen.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "decoupled_weight_decay": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step; returns what the closure does, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        gradients = [parameter.grad for parameter in parameters]
        moments = [self._moment(parameter) for parameter in parameters]
        beta1, beta2 = group["betas"]
        mixed = torch._foreach_lerp(moments, gradients, 1 - beta1)
        signs = torch._foreach_sign(mixed)
        torch._foreach_add_(signs, torch._foreach_mul(mixed, 0.0))  # nan where the mixture is not finite, else 0
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, signs, alpha=-group["lr"])
        torch._foreach_lerp_(moments, gradients, 1 - beta2)

    def _moment(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
        moment: Tensor = state["exp_avg"]
        return moment
