"""Muon for the matrices and AdamW for the rest, behind one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer


class MuonWithAdamW(Optimizer):
    """Steps the groups of a Muon and of an AdamW, which own nothing: groups and state are this optimizer's.

    So `state_dict`, `load_state_dict`, hooks and learning rates are those of one ordinary optimizer. A group is
    Muon's if it has the key `ns_steps`; what is added later has to have all keys of one or the other.
    """

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._muon, self._adamw = muon, adamw

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step; returns what the closure does, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Handed over anew each time: loading a checkpoint replaces both.
        for part, is_muon in ((self._muon, True), (self._adamw, False)):
            part.param_groups = [group for group in self.param_groups if ("ns_steps" in group) is is_muon]
            part.state = self.state
            part.step()  # type: ignore[no-untyped-call]
        return loss
