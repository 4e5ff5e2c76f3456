"""Optimizers with independent or coupled weight decay, grouped by what the parametrization says."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foreshock.core.model_config import Roles
from foreshock.core.run_config import OptimConfig
from foreshock.proxy.parametrization import rules


def build_optimizer(model: nn.Module, config: OptimConfig, roles: Roles) -> Optimizer:
    """The optimizer, one parameter group for each pair of LR and decay multipliers.

    AdamW subtracts lr_t · wd · θ. Independent decay s_t · λ · θ (2309.14322 sec. 2.1) is therefore wd = λ / η with
    η the group's peak learning rate; coupled decay is wd = λ. `sgd` decays the same way, before its step; `adam`
    adds λ · θ to the gradient.
    """
    members: dict[tuple[float, float], list[Tensor]] = defaultdict(list)
    for _, parameter, rule in rules(model, roles):
        members[rule.lr_multiplier, rule.decay_multiplier].append(parameter)
    groups = []
    for (lr_multiplier, decay_multiplier), parameters in members.items():
        peak = config.lr * lr_multiplier
        decay = config.weight_decay * decay_multiplier
        if config.name != "adam" and config.decay == "independent":
            decay /= peak
        groups.append({"params": parameters, "lr": peak, "lr_multiplier": lr_multiplier, "weight_decay": decay})
    betas = (config.beta1, config.beta2)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, eps=config.eps, fused=True)
    if config.name == "adam":
        return torch.optim.Adam(groups, betas=betas, eps=config.eps, fused=True)
    return _decoupled_sgd(groups, momentum=config.beta1)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set this step's learning rate η·s_t; each group's multiplier applies."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_multiplier", 1.0)


def _decoupled_sgd(groups: list[dict[str, Any]], momentum: float) -> Optimizer:
    """SGD whose decay leaves gradient and momentum alone."""
    for group in groups:
        group["decoupled_decay"] = group.pop("weight_decay")
    optimizer = torch.optim.SGD(groups, momentum=momentum, fused=True)

    def decay(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            with torch.no_grad():
                torch._foreach_mul_(group["params"], 1 - group["lr"] * group["decoupled_decay"])

    optimizer.register_step_pre_hook(decay)
    return optimizer
