"""What cannot be fitted is told before any work, with what to do about it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreshock.core.errors import ConfigError, UserError
from foreshock.steer import LinearAcT, LinEAS, fit


class Odd(nn.Module):
    """Sites that cannot be fitted."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.whole, self.flat, self.rows = (nn.Identity() for _ in range(5))
        self.log, self.wide = nn.Identity(), nn.Identity()

    def forward(self, z: Tensor) -> Tensor:
        self.whole(z.long())
        self.flat(z.sum())
        self.rows(z.repeat(2, 1))
        self.log(z.log())
        self.wide(z[:, : 2 if z[0, 0] > 1.5 else 3])
        twice: Tensor = self.twice(self.twice(z))
        return twice


ONES = torch.ones(5, 3)


@pytest.mark.parametrize(
    ("site", "source", "target", "message"),
    [
        ("twice", ONES, ONES, "'twice' is called several times"),
        ("never", ONES, ONES, "never called in a forward pass: never"),
        ("whole", ONES, ONES, "'whole' gives no tensor of real numbers"),
        ("flat", ONES, ONES, "'flat' gives a tensor .* rows must be samples"),
        ("rows", ONES, ONES, "'rows' gives a tensor .10, 3. for 5 samples"),
        ("log", ONES, -ONES, "'log': 5 of 5 samples of the target give activations that are not finite"),
        ("log", 0 * ONES, ONES, "samples of the source give activations that are not finite"),
        ("wide", ONES, 2 * ONES, "'wide' gives 3 channels for the source and 2 for the target"),
        ("log", ONES[:3], ONES, "source must hold at least 4 samples, got 3"),
        ("log", ONES, [], "target must hold at least 4 samples, got 0"),
        ("log", ONES, ["text"], "holds no tensor whose rows are samples"),
        ("log", ONES, 3, "target must be a tensor"),
        ("lag", ONES, ONES, "unknown module 'lag'; did you mean '(flat|log)'"),
    ],
)
def test_what_cannot_be_fitted_is_told(site: str, source: Any, target: Any, message: str) -> None:
    model = Odd()
    with pytest.raises(UserError, match=message):
        fit(model, source, target, sites=site, method="mean_act")
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: fit(Odd(), ONES, ONES, sites="log", method="linaes"),
            "unknown method 'linaes'; did you mean 'lineas'",
        ),
        (lambda: fit(Odd(), ONES, ONES, sites="log", method=LinEAS), "method must be the name"),  # type: ignore[arg-type]
        (lambda: fit(Odd(), ONES, ONES), "no norms over features; name modules of it, such as twice, never"),
        (lambda: LinEAS(gamma=1.1), r"lineas:gamma must be in \[0, 1\]"),
        (lambda: LinEAS(gamma=-0.1), r"lineas:gamma must be in \[0, 1\]"),
        (lambda: LinEAS(batch=3), "lineas:batch must be at least 4"),
        (lambda: LinEAS(pool="mena"), "did you mean 'mean'"),  # type: ignore[arg-type]
        (lambda: LinEAS(p=3), "p must be 1 or 2"),
        (lambda: LinearAcT(quantiles=(0.6, 0.4)), "two rising numbers"),
        (lambda: fit(Odd(), ONES, ONES, sites="log", method="linear_act:quantiles=[0.5]"), "two rising numbers"),
        (lambda: fit(Odd(), ONES, ONES, sites=[]), "sites must name at least one module"),
        (lambda: fit(Odd(), ONES, 2 * ONES, sites="log", method=LinEAS(lr=1e30)), "give a smaller lr"),
    ],
)
def test_options_out_of_range_are_told(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ConfigError, UserError), match=message):
        make()
