"""Taps: what they see, when they see it, and that compiling does not blind them."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from foreshock.core.config import Spec
from foreshock.core.contracts import StepInfo
from foreshock.core.errors import UserError
from foreshock.core.model_config import AttentionConfig, ModelConfig
from foreshock.probes.attention import tap_attention
from foreshock.probes.hooks import Taps, blocks_of, tap_outputs
from foreshock.probes.moments import rms
from foreshock.proxy.model import Proxy

VOCAB, T = 11, 6


def proxy(**attention: Spec) -> Proxy:
    torch.manual_seed(0)
    return Proxy(ModelConfig(width=8, depth=2, heads=2, attention=AttentionConfig(**attention)), VOCAB, T)


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (2, T), generator=torch.Generator().manual_seed(seed))


def info() -> StepInfo:
    zero = torch.zeros(())
    return StepInfo(step=1, inputs_BT=zero, targets_BT=zero, logits_BTV=zero, loss=zero)


def test_taps_see_only_training_passes_between_listen_and_take() -> None:
    module = nn.Linear(2, 2)
    seen: list[Tensor] = []
    taps = Taps({"it": module}, lambda output: seen.append(output) or output.detach())
    module(torch.ones(2))
    taps.listen()
    with torch.no_grad():
        module(torch.ones(2))
    assert not seen
    expected = module(torch.full((2,), 3.0))
    assert torch.equal(taps.take()["it"], expected)
    module(torch.ones(2))
    assert len(seen) == 1


def test_taps_keep_the_last_pass_and_leave_out_what_did_not_run() -> None:
    ran, idle = nn.Identity(), nn.Identity()
    taps = Taps({"ran": ran, "idle": idle}, lambda output: output.detach())
    taps.listen()
    ran(torch.ones(1))
    ran(torch.full((1,), 2.0))
    assert taps.take() == {"ran": torch.full((1,), 2.0)}


def test_taps_that_never_fire_say_so() -> None:
    module = nn.Linear(2, 2)
    compiled = torch.compile(module, backend="eager")
    compiled(torch.ones(2))
    taps = Taps({"it": module}, lambda output: output.detach())
    taps.listen()
    compiled(torch.ones(2))
    with pytest.raises(UserError, match="before the first compiled call"):
        taps.take()
    torch._dynamo.reset()


def test_close_removes_every_hook() -> None:
    module = nn.Linear(2, 2)
    for at in ("input", "output"):
        taps = Taps({"it": module}, lambda _: torch.ones(()), at=at)
        assert module._forward_hooks or module._forward_pre_hooks
        taps.close()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_tap_outputs_reduces_the_output_and_takes_the_first_of_a_tuple() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return 2 * x, 7

    module = Pair()
    observer = tap_outputs({"pair": module}, rms, name="outputs/rms")
    observer.begin()
    module(torch.tensor([3.0, 4.0], requires_grad=True))
    row = observer.read(info())
    assert row == {"outputs/rms/pair": pytest.approx(2 * 12.5**0.5)}
    assert not row["outputs/rms/pair"].requires_grad


def test_outputs_in_bf16_are_reduced_in_fp32() -> None:
    module = nn.Identity()
    observer = tap_outputs({"it": module}, rms, name="rms")
    observer.begin()
    output = torch.linspace(1, 2, 1000).bfloat16()
    module(output)
    value = observer.read(info())["rms/it"]
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(output.double().square().mean().sqrt().item(), rel=1e-6)


def test_blocks_are_the_largest_list_of_modules() -> None:
    experts = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    model = nn.ModuleDict({"small": nn.ModuleList([nn.Linear(1, 1)]), "layers": nn.ModuleList([experts])})
    assert blocks_of(model) == {"layers.0": experts}
    assert list(blocks_of(torch.compile(proxy(), backend="eager"))) == ["blocks.0", "blocks.1"]
    assert blocks_of(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize("attention", [{}, {"score": Spec("cap")}, {"probability": Spec("clipped_softmax")}])
def test_compiled_taps_make_two_graphs_and_see_what_eager_sees(attention: dict[str, Spec]) -> None:
    """fullgraph: a graph break raises. Several observers listen together, so there is one more graph, not one each."""
    model = proxy(**attention)
    outputs, calls = tap_outputs(blocks_of(model), rms, name="rms"), tap_attention(model)

    def listen_to(forward: nn.Module, batch: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        outputs.begin()
        calls.listen()
        forward(batch).sum().backward()
        return dict(outputs.read(info())), {path: call.q_BHTK for path, call in calls.take().items()}

    eager = [listen_to(model, tokens(seed)) for seed in (1, 2)]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(tokens()).sum().backward()
    assert counter.frame_count == 1
    found = [listen_to(compiled, tokens(1))]
    compiled(tokens()).sum().backward()
    found.append(listen_to(compiled, tokens(2)))
    compiled(tokens()).sum().backward()
    assert counter.frame_count == 2
    torch._dynamo.reset()
    torch.testing.assert_close(found, eager)
    assert found[0][0].keys() == {"rms/blocks.0", "rms/blocks.1"}
    assert found[0][1].keys() == {"blocks.0", "blocks.1"}
