"""Monitors on models that are not the proxy: odd parameters, odd outputs, hooks that fail."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreshock.core.contracts import Context, Monitor
from foreshock.core.errors import UserError
from foreshock.monitors.block_outputs import BlockOutputs
from foreshock.monitors.gains import Gains
from foreshock.monitors.gradient_epsilon import GradientEpsilon
from foreshock.monitors.linear_norms import LinearNorms
from foreshock.monitors.norms import Norms
from foreshock.monitors.output_logits import OutputLogits
from foreshock.probes.linears import LinearTaps
from foreshock.probes.moments import total_norm
from foreshock.training.panel import Panel, to_host
from tests.test_panel import info


class Odd(nn.Module):
    """A sparse gradient, frozen, tied, empty, quantised and low-precision parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3, sparse=True)
        self.linears = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.linears[1].weight = self.linears[0].weight
        self.linears[1].bias.requires_grad_(False)
        self.empty = nn.Parameter(torch.zeros(0))
        self.int8 = nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)
        self.fp8 = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)
        self.gain = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for linear in self.linears:
            x = linear(x * self.gain)
        return x


@pytest.mark.parametrize("kind", ["sgd", "adamw", "sparse_adam"])
def test_odd_parameters_are_read_or_left_out(kind: str) -> None:
    torch.manual_seed(0)
    model = Odd()
    dense = [p for name, p in model.named_parameters() if p.requires_grad and name != "embed.weight"]
    sgd = torch.optim.SGD([*dense, model.embed.weight], lr=0.5, momentum=0.9, nesterov=True)
    optimizer = {
        "sgd": sgd,
        "adamw": torch.optim.AdamW(dense),
        "sparse_adam": torch.optim.SparseAdam([model.embed.weight]),
    }[kind]
    context = Context(model=model, output_module=model.linears[1], optimizer=optimizer)
    monitors = {
        "norms": Norms(),
        "gradient_epsilon": GradientEpsilon(),
        "gains": Gains(),
        "linear_norms": LinearNorms(),
    }
    panel = Panel({name: monitor.attach(context) for name, monitor in monitors.items()})
    step = info()
    for _ in range(2):
        optimizer.zero_grad()
        panel.begin()
        model(torch.tensor([1, 1, 2])).square().sum().backward()
        step.grad_norm = total_norm(p.grad for p in model.parameters() if p.grad is not None)
        panel.gradients(step)
        optimizer.step()
        row = panel.read(step)
    assert all(math.isfinite(value) for value in row.values())
    gradient = model.embed.weight.grad.to_dense()
    assert row["norms/gradient/embed.weight"] == pytest.approx(gradient.square().mean().sqrt().item(), rel=1e-6)
    squares = sum(p.grad.to_dense().square().sum().item() for p in model.parameters() if p.grad is not None)
    if kind != "sparse_adam":
        assert row["norms/grad_norm"] == pytest.approx(math.sqrt(squares), rel=1e-6)
    assert total_norm([model.empty, model.int8]) is None
    assert row["norms/parameter/linears.1.bias"] > 0
    for left_out in ("empty", "int8", "fp8", "linears.1.weight"):
        assert not any(key.endswith(f"/{left_out}") for key in row if not key.startswith("linear_norms"))
    assert row["linear_norms/weight/linears.1"] == row["linear_norms/weight/linears.0"]
    if kind == "sgd":
        buffer = optimizer.state[model.embed.weight]["momentum_buffer"].to_dense()
        update = (gradient + 0.9 * buffer).square().mean().sqrt().item()
        assert row["norms/unscaled_update/embed.weight"] == pytest.approx(update, rel=1e-6)
        assert row["norms/update/embed.weight"] == pytest.approx(0.5 * update, rel=1e-6)


@pytest.mark.parametrize("monitor", [Norms(), Gains()])
def test_parameters_without_values_are_an_error(monitor: Monitor) -> None:
    model = nn.Linear(2, 2, device="meta")
    observer = monitor.attach(Context(model=model, output_module=model))
    with pytest.raises(UserError, match="materialise the model"):
        observer.read(info())


class Block(nn.Module):
    def __init__(self, shape: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Any:
        return self.shape(2 * x)


@pytest.mark.parametrize(
    "shape",
    [
        lambda x: x,
        lambda x: (x, None),
        lambda x: (None, torch.arange(3), x, -7 * x),
        lambda x: [x],
        lambda x: {"attention_mask": x > 0, "hidden": x, "other": 3 * x},
        lambda x: ((x, 3 * x), 5 * x),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_real_tensor_of_an_output_counts(shape: Callable[[Tensor], Any], compiled: bool) -> None:
    model = nn.ModuleList([Block(shape), Block(lambda x: None), Block(lambda x: torch.arange(3))])
    model.weight = nn.Parameter(torch.ones(2))
    observer = BlockOutputs().attach(Context(model=nn.ModuleDict({"blocks": model}), output_module=model))

    def passes(x: Tensor) -> None:
        for block in model:
            block(x * 3)

    observer.begin()
    (torch.compile(passes, fullgraph=True, backend="eager") if compiled else passes)(model.weight)
    assert to_host(observer.read(info())) == {"block_outputs/rms/blocks.0": 6.0}


def test_blocks_without_any_such_output_have_no_rows() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(lambda x: None)])})
    observer = BlockOutputs().attach(Context(model=model, output_module=model))
    observer.begin()
    model["blocks"][0](torch.ones(3))
    assert observer.read(info()) == {}


def test_transformers_outputs_are_mappings() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(lambda x: outputs.BaseModelOutput(last_hidden_state=x))])})
    observer = BlockOutputs().attach(Context(model=model, output_module=model))
    observer.begin()
    model["blocks"][0](torch.ones(3))
    assert to_host(observer.read(info())) == {"block_outputs/rms/blocks.0": 2.0}


@pytest.mark.parametrize("shape", [(4, 3), (3,), (2, 2, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_logits_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    row = to_host(OutputLogits().attach(Context(model=nn.Identity(), output_module=nn.Identity())).read(info(logits)))
    exact = logits.double()
    log_z = exact.exp().sum(-1).log()
    expected = {"mean": exact.mean(), "min": exact.min(), "max": exact.max(), "log_z": log_z.mean()}
    expected["log_z_squared"] = log_z.square().mean()
    assert row == pytest.approx({f"output_logits/{k}": v.item() for k, v in expected.items()}, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("logits", [None, torch.zeros(()), torch.zeros(0, 3), torch.zeros(2, 3, dtype=torch.int64)])
def test_no_output_logits_no_rows(logits: Any) -> None:
    step = info()
    step.logits_BTV = logits
    assert OutputLogits().attach(Context(model=nn.Identity(), output_module=nn.Identity())).read(step) == {}


# Dynamo itself makes an instance of `torch.autograd.Function` where it traces one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("place", ["enter", "leave"])
def test_a_tap_that_fails_does_not_reach_the_forward_pass(
    monkeypatch: pytest.MonkeyPatch, place: str, compiled: bool
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.ones(1, 2)
    expected = model(x)
    taps = LinearTaps({"0": model[0], "1": model[1]}, {})

    def fail(*_: Any) -> Any:
        raise ArithmeticError(place)

    monkeypatch.setattr(f"foreshock.probes.linears._Tap.{place}", fail)
    torch._dynamo.reset()  # no guard tells it of a method that is patched
    forward = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    taps.listen()
    found = forward(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert model[0].weight.grad is not None
    with pytest.raises(ArithmeticError, match=place):
        taps.take()
    monkeypatch.undo()
    torch._dynamo.reset()
    taps.listen()
    forward(x).sum().backward()
    assert taps.take().keys() >= {"weight/0", "input/1", "grad_output/1"}
