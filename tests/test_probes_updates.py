"""A step that is taken back leaves nothing behind."""

import pytest
import torch

from foreshock.probes.updates import restore_unless, snapshot


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_refused_step_changes_nothing_and_a_kept_one_everything(kind: type[torch.optim.Optimizer]) -> None:
    """keep = 0 leaves parameters and state as they were, keep = 1 is an ordinary step, bit for bit."""
    options = {"lr": 0.1} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    gated, plain = (torch.nn.Parameter(torch.arange(4.0)) for _ in range(2))
    gated_optimizer, plain_optimizer = kind([gated], **options), kind([plain], **options)
    for step, keep in enumerate([0.0, 1.0, 0.0, 1.0]):
        gradient = torch.full((4,), float("nan")) if keep == 0 else torch.arange(4.0) - step
        gated.grad, plain.grad = gradient.clone(), gradient.clone()
        before = snapshot(gated_optimizer)
        gated_optimizer.step()
        restore_unless(torch.tensor(keep), gated_optimizer, before)
        if keep:
            plain_optimizer.step()
        assert torch.equal(gated, plain)
    for name, value in plain_optimizer.state[plain].items():
        assert torch.equal(gated_optimizer.state[gated][name], value)
