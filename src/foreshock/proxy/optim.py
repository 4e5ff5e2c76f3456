"""Optimizers with independent or coupled weight decay, grouped by what the parametrization says."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foreshock.core.model_config import Roles
from foreshock.core.run_config import OptimConfig
from foreshock.proxy.optimizers.lion import Lion
from foreshock.proxy.optimizers.muon import MuonWithAdamW
from foreshock.proxy.parametrization import block_matrices, rules

Group = dict[str, Any]


def build_optimizer(model: nn.Module, config: OptimConfig, roles: Roles) -> Optimizer:
    """The optimizer, one parameter group for each pair of LR and decay multipliers: one in all but the proxy.

    Decoupled decay subtracts lr_t · wd · θ. Independent decay s_t · λ · θ (2309.14322 sec. 2.1) is therefore
    wd = λ / η with η the group's peak learning rate; coupled decay is wd = λ. All but `adam` decay so, `sgd` before
    its step; `adam` adds λ · θ to the gradient. A group's key `independent_decay` tells which of the two it is.
    """
    members: dict[tuple[bool, float, float], list[Tensor]] = defaultdict(list)
    matrices = set(block_matrices(model)) if config.name == "muon" else set()
    for _, parameter, rule in rules(model, roles):
        for_muon = parameter in matrices and parameter.dim() == 2
        members[for_muon, rule.lr_multiplier, rule.decay_multiplier].append(parameter)
    groups: list[Group] = []
    for (for_muon, lr_multiplier, decay_multiplier), parameters in members.items():
        peak = config.lr * lr_multiplier
        decay = config.weight_decay * decay_multiplier
        independent = config.name != "adam" and config.decay == "independent"
        group = {"params": parameters, "lr": peak, "lr_multiplier": lr_multiplier, "independent_decay": independent}
        group["weight_decay"] = decay / peak if independent else decay
        groups.append(group | ({"for_muon": True} if for_muon else {}))
    return BUILDERS[config.name](groups, config)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set this step's learning rate η·s_t; each group's multiplier applies."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_multiplier", 1.0)


def _adamw(groups: list[Group], config: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def _adam(groups: list[Group], config: OptimConfig) -> Optimizer:
    return torch.optim.Adam(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def _sgd(groups: list[Group], config: OptimConfig) -> Optimizer:
    """SGD whose decay leaves gradient and momentum alone."""
    for group in groups:
        group["decoupled_decay"] = group.pop("weight_decay")
    optimizer = torch.optim.SGD(groups, momentum=config.beta1, fused=True)

    def decay(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            stepped = [p for p in group["params"] if p.grad is not None]  # as torch's decoupled decay has it
            if stepped:
                with torch.no_grad():
                    torch._foreach_mul_(stepped, 1 - group["lr"] * group["decoupled_decay"])

    optimizer.register_step_pre_hook(decay)
    return optimizer


def _muon(groups: list[Group], config: OptimConfig) -> Optimizer:
    """Muon on the blocks' matrices, AdamW on embedding, head, norms and gains.

    Muon's update is scaled by 0.2·√max(rows, columns), which gives it the RMS of 0.2 that AdamW's has in large
    runs (Moonlight, 2502.16982): one learning rate and one decay then serve both. Nesterov momentum β1,
    five Newton-Schulz steps in bf16.
    """
    matrices = [group for group in groups if "for_muon" in group]
    others = [group for group in groups if "for_muon" not in group]
    muon = torch.optim.Muon(matrices, momentum=config.beta1, adjust_lr_fn="match_rms_adamw")
    return MuonWithAdamW(muon, _adamw(others, config))


def _lion(groups: list[Group], config: OptimConfig) -> Optimizer:
    return Lion(groups, betas=(config.beta1, config.beta2))


def _adafactor(groups: list[Group], config: OptimConfig) -> Optimizer:
    """Adafactor as in torch: η·max(RMS(θ), 1e-3), update clipping at 1, β2 = 1 - t^-0.8, no momentum.

    Its relative step is min(η_t, 1/√t): a learning rate above 1/√t is not in force. Copies to the host at every step.
    """
    return torch.optim.Adafactor(groups)


BUILDERS: dict[str, Callable[[list[Group], OptimConfig], Optimizer]] = {
    "adamw": _adamw,
    "adam": _adam,
    "sgd": _sgd,
    "muon": _muon,
    "lion": _lion,
    "adafactor": _adafactor,
}
"""What builds the optimizer of each `optim.name`."""
