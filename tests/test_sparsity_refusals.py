"""Bad input is answered with what to do, before anything is changed."""

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from foreshock.core.errors import ConfigError, UserError
from foreshock.sparsity import sparsify
from tests.masked_models import hooks_of, mlp, x


def never(**_: Any) -> nn.Module:
    class Never(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(10, 4), nn.Linear(10, 4)

        def forward(self, given: Tensor) -> Tensor:
            out: Tensor = self.used(given)
            return out

    return Never()


def infinite() -> Tensor:
    given = x(8, 10)
    given[3, 4] = math.inf
    return given


@pytest.mark.parametrize(
    ("named", "error", "words"),
    [
        *(({"sparsity": s}, ConfigError, "share that is dropped") for s in (1.0, -0.1, math.nan, math.inf, True, "1")),
        ({"sparsity": {"0": 0.5, "2": 1.0}}, ConfigError, r"sparsity\['2'\] must be"),
        ({"sparsity": {"3": 0.5}}, ConfigError, r"unknown linear '3'; did you mean"),
        ({"sparsity": {}}, ConfigError, "names no linear"),
        ({"method": "vina"}, ConfigError, "did you mean 'wina'"),
        ({"method": "wina:norm=paper"}, ConfigError, "did you mean 'norms'"),
        ({"method": "r_sparse:alpha=1.5"}, ConfigError, r"alpha must be in \[0, 1\]"),
        ({"method": 0.5}, ConfigError, "name of a method"),
        ({"method": "wina:norms=paper"}, ConfigError, "none of the linears"),
        ({"method": "cats"}, ConfigError, "gated MLPs"),
        ({"gate": "top_k"}, ConfigError, "did you mean 'topk'"),
        ({"gate": "threshold"}, ConfigError, "give calibration="),
        ({"allocation": "gready"}, ConfigError, "did you mean 'greedy'"),
        ({"allocation": "greedy"}, ConfigError, "give calibration="),
        ({"allocation": "greedy", "calibration": x(4, 10), "sparsity": {"0": 0.5}}, ConfigError, "one number"),
        ({"calibration": []}, ConfigError, "at least one batch"),
        ({"calibration": torch.zeros(0, 10)}, ConfigError, "at least one batch"),
        ({"calibration": ["text"]}, ConfigError, "mappings of inputs by name"),
        ({"calibration": infinite()}, UserError, "0, or its weight, is not finite"),
        ({"calibration": infinite(), "gate": "topk", "allocation": "greedy"}, UserError, "not finite"),
        ({"calibration": x(4, 11)}, RuntimeError, "size of tensor"),
        ({"modules": "3"}, ConfigError, "unknown linear '3'; did you mean"),
        ({"modules": ["0", "1"]}, UserError, "1 is a Tanh, and no linear"),
        ({"modules": []}, ConfigError, "names no linear"),
        ({"prefill": 1.5}, ConfigError, "last tokens of a pass"),
        ({"prefill": "last"}, ConfigError, "last tokens of a pass"),
    ],
)
def test_bad_input_says_what_to_do_and_changes_nothing(named: dict[str, Any], error: type, words: str) -> None:
    model, given = mlp(), x(4, 10)
    dense = model(given)
    with pytest.raises(error, match=words):
        sparsify(model, **named)
    assert hooks_of(model) == 0
    assert torch.equal(model(given), dense)
    with sparsify(model, "wina", 0.5):  # and none counts as sparsified
        pass


def test_models_that_cannot_be_sparsified_say_why() -> None:
    with pytest.raises(ConfigError, match="no linears"):
        sparsify(nn.Sequential(nn.Tanh()))
    with pytest.raises(UserError, match="compiled"):
        sparsify(cast(nn.Module, torch.compile(cast(nn.Module, mlp()), backend="eager")))
    inside = mlp()
    inside[0].compile(backend="eager")
    with pytest.raises(UserError, match="0 is compiled"):
        sparsify(inside)
    with pytest.raises(UserError, match="unused read no tokens in calibration"):
        sparsify(never(), calibration=x(4, 10, dtype=torch.float32))
    with pytest.raises(UserError, match="meta device"):
        sparsify(nn.Linear(4, 4, device="meta"))
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="quantised"):
        sparsify(quantised)
    linear = nn.Linear(4, 4)
    with sparsify(linear), pytest.raises(UserError, match="by position"):
        linear(input=torch.ones(4))


def test_two_handles_are_in_force_together_on_different_linears_alone() -> None:
    model, given = mlp(), x(4, 10)
    dense = model(given)
    with sparsify(model, "wina", 0.5, modules="0"):
        with pytest.raises(UserError, match="0 is sparsified by another handle"):
            sparsify(model, "teal", 0.5)
        with sparsify(model, "teal", 0.5, modules="2") as other:
            model(given)
        assert other.measured() == {"2": 0.5}
        with pytest.raises(UserError, match="removed"):
            other.error(given)
    with sparsify(model, "teal", 0.5):
        pass
    assert torch.equal(model(given), dense)


def test_linears_that_torch_reads_without_calling_them_are_left_out() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    given = x(2, 5, 8, dtype=torch.float32)
    with torch.no_grad(), sparsify(encoder, "wina", 0.5) as handle:
        encoder(given)
        assert handle.measured().keys() == handle.sparsities.keys()
    with pytest.raises(UserError, match="NonDynamicallyQuantizableLinear, which MultiheadAttention never calls"):
        sparsify(encoder, modules="*.out_proj")
