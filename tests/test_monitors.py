"""Every monitor against a slow naive reference, on a real training step of the proxy and on models that are not it."""

import copy
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreshock.core import plugins
from foreshock.core.config import Spec
from foreshock.core.contracts import Context, StepInfo
from foreshock.core.model_config import ModelConfig
from foreshock.core.run_config import DataConfig, OptimConfig, RecordConfig, RunConfig, TrainConfig
from foreshock.monitors.norms import Norms
from foreshock.monitors.output_logits import OutputLogits
from foreshock.monitors.throughput import Throughput
from foreshock.proxy.model import Proxy
from foreshock.training.panel import Row
from foreshock.training.setup import build_training
from foreshock.training.step import train_step
from tests.observed import entries_by_role

VOCAB, T, HEADS, BLOCKS = 11, 8, 2, ("blocks.0", "blocks.1")

CONFIG = RunConfig(
    model=ModelConfig(width=16, depth=2, heads=HEADS),
    data=DataConfig(seq_len=T, batch_size=3),
    optim=OptimConfig(lr=0.05, weight_decay=0.1, clip_norm=0.5),
    train=TrainConfig(steps=4),
    interventions=(Spec("z_loss", {"weight": 0.1}),),
    record=RecordConfig(monitors=tuple(Spec(name) for name in plugins.names("monitors"))),
)


@dataclass(kw_only=True)
class Logged:
    """One logged step, and all that is needed to work out its rows by hand."""

    row: Row
    info: StepInfo
    before: Proxy
    gradients: Mapping[str, Tensor]
    after: Proxy


@pytest.fixture(scope="module", params=["none", "qk_norm"])
def logged(request: pytest.FixtureRequest) -> Logged:
    cures = () if request.param == "none" else (Spec(request.param),)
    training = build_training(replace(CONFIG, interventions=CONFIG.interventions + cures), VOCAB)
    for step in (1, 2):
        train_step(training, step, tokens(step))
    before = copy.deepcopy(training.model)
    for module in before.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    info = train_step(training, 3, tokens(3), logged=True)
    info.seconds = 0.5
    row = training.panel.read(info)
    return Logged(row=row, info=info, before=before, gradients=gradients_of(before), after=training.model)


def tokens(step: int) -> Tensor:
    return torch.randint(VOCAB, (3, T + 1), generator=torch.Generator().manual_seed(step))


def gradients_of(model: Proxy) -> dict[str, Tensor]:
    batch = tokens(3)
    logits = model(batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss = loss + 0.1 * logits.exp().sum(-1).log().square().mean()
    found = torch.autograd.grad(loss, list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def test_losses(logged: Logged) -> None:
    model, batch, row = logged.before, tokens(3), logged.row
    log_probabilities = model(batch[:, :-1]).detach().log_softmax(-1)
    total = sum(-float(log_probabilities[b, t, batch[b, t + 1]]) for b in range(3) for t in range(T))
    assert row["loss/train"] == pytest.approx(total / (3 * T), rel=1e-5)
    log_z = model(batch[:, :-1]).detach().exp().sum(-1).log()
    assert row["loss/z_loss"] == pytest.approx(0.1 * float(log_z.square().mean()), rel=1e-5)
    assert row["loss/total"] == pytest.approx(row["loss/train"] + row["loss/z_loss"], rel=1e-6)


def test_learning_rate(logged: Logged) -> None:
    assert logged.row["optim/lr"] == logged.info.lr > 0


def test_output_logits(logged: Logged) -> None:
    values = logged.before(tokens(3)[:, :-1]).detach().double()
    log_z = [math.log(sum(math.exp(v) for v in position)) for position in values.flatten(0, 1).tolist()]
    expected = {
        "mean": values.mean().item(),
        "min": values.min().item(),
        "max": values.max().item(),
        "log_z": sum(log_z) / len(log_z),
        "log_z_squared": sum(z * z for z in log_z) / len(log_z),
    }
    found = {key.removeprefix("output_logits/"): v for key, v in logged.row.items() if key.startswith("output_")}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def block_inputs(model: Proxy) -> list[Tensor]:
    """The residual stream before each block, and after the last."""
    x = model.embed(tokens(3)[:, :-1])
    stream = [x]
    for block in model.blocks:
        stream.append(block(stream[-1], (model.rope_cos[:T], model.rope_sin[:T])))
    return [x.detach() for x in stream]


def test_block_outputs(logged: Logged) -> None:
    for path, x in zip(BLOCKS, block_inputs(logged.before)[1:], strict=True):
        values = x.flatten().tolist()
        rms = math.sqrt(sum(v * v for v in values) / len(values))
        assert logged.row[f"block_outputs/rms/{path}"] == pytest.approx(rms, rel=1e-5)


def rotated_heads(x_BTD: Tensor, linear: nn.Module, norm: nn.Module) -> Tensor:
    """Queries or keys (H, B, T, K): project, cut into heads, normalise, turn each pair as a complex number."""
    heads = [norm(part) for part in linear(x_BTD).chunk(HEADS, -1)]
    half = heads[0].shape[-1] // 2
    angles = [[t * 10_000 ** (-2 * i / (2 * half)) for i in range(half)] for t in range(T)]
    turn = torch.polar(torch.ones(T, half), torch.tensor(angles))
    turned = [torch.complex(head[..., :half], head[..., half:]) * turn for head in heads]
    return torch.stack([torch.cat([z.real, z.imag], -1) for z in turned])


def test_attention_logits(logged: Logged) -> None:
    for path, block, x in zip(BLOCKS, logged.before.blocks, block_inputs(logged.before), strict=False):
        attn = block.attn
        inputs = block.pre_attn_norm(x)
        q, k = (rotated_heads(inputs, getattr(attn, n), getattr(attn, f"{n}_norm")).detach() for n in "qk")
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        per_head = [
            [scores[h, b, t, s].item() for b in range(3) for t in range(T) for s in range(t + 1)] for h in (0, 1)
        ]
        entropy = [0.0, 0.0]
        for h in (0, 1):
            for b in range(3):
                for t in range(T):
                    weights = scores[h, b, t, : t + 1].softmax(-1).tolist()
                    entropy[h] -= sum(w * math.log(w) for w in weights) / (3 * T)
        row = {key.split("/")[1]: v for key, v in logged.row.items() if key.endswith(f"/{path}") and "attention" in key}
        largest = [max(map(abs, values)) for values in per_head]
        assert row.pop("max_per_head") == pytest.approx([max(values) for values in per_head], rel=1e-4)
        assert row.pop("max_abs_per_head") == pytest.approx(largest, rel=1e-4)
        assert row.pop("entropy_per_head") == pytest.approx(entropy, rel=1e-4)
        expected = {
            "max": max(max(values) for values in per_head),
            "max_abs": max(largest),
            "entropy": sum(entropy) / 2,
            "q_norm": q.norm(dim=-1).mean().item(),
            "q_norm_max": q.norm(dim=-1).max().item(),
            "k_norm": k.norm(dim=-1).mean().item(),
            "k_norm_max": k.norm(dim=-1).max().item(),
        }
        assert row == pytest.approx(expected, rel=1e-4)


def by_role(values: Mapping[str, Tensor]) -> dict[str, float]:
    """RMS over all elements of the same layer and role."""
    return {path: math.sqrt(sum(v * v for v in found) / len(found)) for path, found in entries_by_role(values).items()}


def test_norms(logged: Logged) -> None:
    before, after = (dict(model.named_parameters()) for model in (logged.before, logged.after))
    lr, decay = logged.info.lr, 0.1 / 0.05
    updates = {name: (before[name] * (1 - lr * decay) - after[name]).detach() for name in before}
    expected = {
        "gradient": by_role(logged.gradients),
        "parameter": by_role(after),
        "update": by_role(updates),
        "unscaled_update": by_role({name: update / lr for name, update in updates.items()}),
    }
    for quantity, values in expected.items():
        prefix = f"norms/{quantity}/"
        found = {key.removeprefix(prefix): v for key, v in logged.row.items() if key.startswith(prefix)}
        assert found == pytest.approx(values, rel=1e-3), quantity
    assert {"blocks.1.fc2", "blocks.0.norm", "embedding", "head", "norm"} <= expected["gradient"].keys()
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in logged.gradients.values()))
    assert logged.row["norms/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert logged.row["norms/clip_factor"] == pytest.approx(0.5 / norm, rel=1e-4)
    assert norm > 0.5, "clipping must be at work, or the gradients could be the clipped ones"


def test_throughput(logged: Logged) -> None:
    assert logged.row["throughput/step_s"] == 0.5
    assert logged.row["throughput/tokens_per_s"] == 3 * T / 0.5
    assert "throughput/mfu" not in logged.row


def info_of(logits: Tensor, **options: object) -> StepInfo:
    ids = torch.zeros(logits.shape[:-1], dtype=torch.long)
    return StepInfo(step=1, inputs_BT=ids, targets_BT=ids, logits_BTV=logits, loss=torch.ones(()), **options)


def context_of(model: nn.Module, **options: object) -> Context:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return Context(model=model, output_module=model, optimizer=optimizer, **options)


def test_throughput_counts_flops_where_the_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreshock.monitors.throughput._device_name", lambda context: "NVIDIA H100 PCIe")
    observer = Throughput().attach(context_of(nn.Linear(1, 1), flops_per_token=756e9, tokens_per_step=50))
    info = info_of(torch.zeros(1, 1, 2), seconds=0.1)
    assert observer.read(info)["throughput/mfu"] == pytest.approx(0.5)
    info.flops_share = 0.25
    rows = observer.read(info)
    assert rows["throughput/mfu"] == pytest.approx(0.125), "blocks that are left out cost nothing"
    assert rows["throughput/tokens_per_s"] == pytest.approx(500), "and their tokens are trained on"
    info.seconds = 0.0
    assert observer.read(info) == {}, "no speed before the first interval"


def test_output_logits_in_chunks_and_in_low_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = 20 * torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    monkeypatch.setattr("foreshock.monitors.output_logits.CHUNK_ELEMENTS", 15)
    row = OutputLogits().attach(context_of(nn.Linear(1, 1))).read(info_of(logits))
    exact = logits.double()
    assert row["output_logits/mean"].item() == pytest.approx(exact.mean().item(), rel=1e-5)
    assert row["output_logits/log_z"].item() == pytest.approx(exact.logsumexp(-1).mean().item(), rel=1e-5)
    assert row["output_logits/log_z_squared"].item() == pytest.approx(
        exact.logsumexp(-1).square().mean().item(), rel=1e-5
    )


def test_norms_of_any_model_go_by_parameter_name_and_group() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(2, 1, bias=False))
    context = context_of(model)
    context.optimizer.param_groups[0]["params"] = list(model[0].parameters())
    context.optimizer.add_param_group({"params": [model[1].weight], "lr": 0.25})
    observer = Norms().attach(context)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    model[0].bias.grad = None
    observer.begin()
    info = info_of(torch.zeros(1, 1, 2))
    observer.gradients(info)
    for gradient in (model[0].weight.grad, model[1].weight.grad):
        gradient.mul_(0.5)  # clipping
    context.optimizer.step()
    row = {key: value.item() for key, value in observer.read(info).items()}
    assert {key for key in row if "gradient" in key} == {"norms/gradient/0.weight", "norms/gradient/1.weight"}
    assert row["norms/gradient/0.weight"] == 2.0
    assert row["norms/unscaled_update/0.weight"] == 1.0
    assert row["norms/update/0.weight"] == 0.5
    assert row["norms/update/1.weight"] == 0.25
    assert row["norms/parameter/0.bias"] == pytest.approx(abs(model[0].bias.item()))
    assert "norms/grad_norm" not in row


def test_declarations_need_no_torch() -> None:
    code = (
        "import sys; from foreshock.core import plugins\n"
        "for family in ('monitors', 'interventions'):\n"
        "    for name in plugins.names(family): plugins.declaration(family, name)()\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
