"""linear_norms against slow references: gradients by `torch.autograd.grad`, sums by loops in double precision."""

import gc
import itertools
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from foreshock.core.config import Spec
from foreshock.core.contracts import Monitor, Observer
from foreshock.core.errors import UserError
from foreshock.core.run_config import RunConfig, RuntimeConfig
from foreshock.monitors.linear_norms import LinearNorms
from foreshock.proxy.presets import llama
from foreshock.training.panel import Row, to_host
from foreshock.training.setup import Training
from foreshock.training.step import train_step
from tests.observed import CONFIG, VOCAB, T, context_of, cured, info_of, logged_step, norm, rows_of, tokens, trained

LLAMA = replace(CONFIG, model=llama(width=16, depth=2, heads=2))


def watched(model: nn.Module, monitor: Monitor, loss: Callable[[], Tensor]) -> Row:
    """One logged forward and backward pass of any model."""
    observer = monitor.attach(context_of(model))
    row = observe(observer, loss)
    observer.close()
    return row


def observe(observer: Observer, *losses: Callable[[], Tensor]) -> Row:
    observer.begin()
    for loss in losses:
        info = info_of(loss())
        info.loss.backward()
    observer.gradients(info)
    return to_host(observer.read(info))


@dataclass(kw_only=True)
class Flow:
    """W (features in, features out), X, Y of one linear and the gradient at Y, in double precision."""

    weight: Tensor
    x: Tensor
    y: Tensor
    grad_y: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def grad_x(self) -> Tensor:
        """By the chain rule."""
        return self.grad_y @ self.weight.T


def flows_of(linears: Mapping[str, nn.Module], loss: Callable[[], Tensor]) -> dict[str, Flow]:
    """Every linear of one forward pass, its gradients by `torch.autograd.grad` on the captured outputs."""
    inputs, outputs = {}, {}

    def capture(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach(), output

        return hook

    handles = [linear.register_forward_hook(capture(name)) for name, linear in linears.items()]
    gradients = torch.autograd.grad(loss(), list(outputs.values()))
    for handle in handles:
        handle.remove()
    flows = {}
    for (name, y), grad_y in zip(outputs.items(), gradients, strict=True):
        linear: Any = linears[name]
        linear.eval()  # a power iteration happens in training mode only
        weight = linear.weight.detach() if hasattr(linear, "nf") else linear.weight.detach().T
        linear.train()
        flows[name] = Flow(
            weight=weight.double(), x=inputs[name].double(), y=y.detach().double(), grad_y=grad_y.double()
        )
    return flows


def token_norm(x: Tensor) -> float:
    found = [norm(token) for token in x.flatten(0, -2)]
    return sum(found) / len(found)


def sizes(weight: Tensor, **tensors: Tensor) -> dict[str, float]:
    found = {"weight": norm(weight)}
    for name, tensor in tensors.items():
        found |= {name: norm(tensor), f"{name}_token": token_norm(tensor)}
    return found


def expected_sizes(flows: Mapping[str, Flow], fused: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
    """All rows, those of fused linears from concatenated tensors."""
    found = {
        name: sizes(flow.weight, input=flow.x, output=flow.y, grad_input=flow.grad_x, grad_output=flow.grad_y)
        for name, flow in flows.items()
    }
    for name, members in fused.items():
        parts = [flows[member] for member in members]
        found[name] = sizes(
            torch.cat([part.weight for part in parts], -1),
            input=parts[0].x,
            output=torch.cat([part.y for part in parts], -1),
            grad_input=torch.stack([part.grad_x for part in parts]).sum(0),
            grad_output=torch.cat([part.grad_y for part in parts], -1),
        )
    return {f"linear_norms/{key}/{name}": value for name, row in found.items() for key, value in row.items()}


def proxy_linears(model: nn.Module) -> dict[str, nn.Module]:
    roles = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.gate", "mlp.fc2")
    found = {}
    for block, role in itertools.product(range(2), roles):
        parent, _, name = role.partition(".")
        linear = getattr(getattr(model.blocks[block], parent), name)
        if linear is not None:
            found[f"blocks.{block}.{name}"] = linear
    return found


def loss_of(training: Training, step: int) -> Tensor:
    batch = tokens(step)
    logits = training.model(batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    return loss + 0.1 * logits.logsumexp(-1).square().mean()


@pytest.mark.parametrize("arm", ["none", "qk_norm", "qkv_norm", "reordered_norm", "sigma_reparam", "layer_scale"])
@pytest.mark.parametrize("base", [CONFIG, LLAMA], ids=["gelu", "swiglu"])
def test_linear_norms_of_the_proxy(base: RunConfig, arm: str) -> None:
    """Before clipping, with extra losses; in `qkv_norm` and `reordered_norm` X is the residual stream itself."""
    config = cured(base, arm)
    config = replace(config, interventions=(*config.interventions, Spec("z_loss", {"weight": 0.1})))
    row = logged_step(trained(config, "linear_norms"))
    twin = trained(config)
    flows = flows_of(proxy_linears(twin.model), lambda: loss_of(twin, 3))
    fused = {f"blocks.{i}.qkv": tuple(f"blocks.{i}.{role}" for role in "qkv") for i in range(2)}
    if base is LLAMA:
        fused |= {f"blocks.{i}.gate_up": (f"blocks.{i}.gate", f"blocks.{i}.fc1") for i in range(2)}
    del row["monitors/seconds"]
    # Single precision and sums of at most 64 products: a few times 2^-24 · √64.
    assert row == pytest.approx(expected_sizes(flows, fused), rel=1e-5)


def test_fused_gradient_is_that_of_the_norm_before() -> None:
    """The sum of the shares is the gradient at the tensor that q, k and v share."""
    row = logged_step(trained(CONFIG, "linear_norms"))
    twin = trained(CONFIG)
    shared = []
    twin.model.blocks[1].pre_attn_norm.register_forward_hook(lambda _m, _i, output: shared.append(output))
    batch = tokens(3)
    logits = twin.model(batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    (gradient,) = torch.autograd.grad(loss, shared)
    assert row["linear_norms/grad_input/blocks.1.qkv"] == pytest.approx(norm(gradient), rel=1e-5)
    assert row["linear_norms/grad_input_token/blocks.1.qkv"] == pytest.approx(token_norm(gradient), rel=1e-5)


def llama_model() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_hidden_layers=2, **shape))


def gpt2_model() -> nn.Module:
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=T, **ends))


def hugging_face_loss(model: nn.Module) -> Tensor:
    batch = tokens(1)
    return F.cross_entropy(model(input_ids=batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())


def test_linear_norms_of_llama() -> None:
    """By module name; keys and values are narrower than queries."""
    model = llama_model()
    linears = {name: m for name, m in model.model.layers.named_modules(prefix="model.layers") if type(m) is nn.Linear}
    flows = flows_of(linears, lambda: hugging_face_loss(model))
    fused = {}
    for layer in ("model.layers.0", "model.layers.1"):
        fused[f"{layer}.self_attn.qkv"] = tuple(f"{layer}.self_attn.{part}_proj" for part in "qkv")
        fused[f"{layer}.mlp.gate_up"] = tuple(f"{layer}.mlp.{part}_proj" for part in ("gate", "up"))
    row = watched(model, LinearNorms(), lambda: hugging_face_loss(model))
    assert row == pytest.approx(expected_sizes(flows, fused), rel=1e-5)


def test_linear_norms_of_gpt2_whose_linears_are_transposed() -> None:
    model = gpt2_model()
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    paths = [f"transformer.h.{i}.{name}" for i in (0, 1) for name in names]
    flows = flows_of({path: model.get_submodule(path) for path in paths}, lambda: hugging_face_loss(model))
    row = watched(model, LinearNorms(), lambda: hugging_face_loss(model))
    assert row == pytest.approx(expected_sizes(flows, {}), rel=1e-5)


def sequence() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))


def test_a_model_without_blocks_and_outputs_changed_in_place() -> None:
    """The ReLU overwrites the output; the data need no gradient, so there is none at the first input."""
    model, x = sequence(), torch.randn(5, 3)
    y = x @ model[0].weight.T + model[0].bias
    hidden = y.relu()
    out = hidden @ model[2].weight.T + model[2].bias
    loss = out.square().sum()
    grad_y, grad_hidden, grad_out = torch.autograd.grad(loss, [y, hidden, out])
    expected = {
        "0": sizes(model[0].weight, input=x, output=y, grad_output=grad_y),
        "2": sizes(model[2].weight, input=hidden, output=out, grad_input=grad_hidden, grad_output=grad_out),
    }
    row = watched(model, LinearNorms(), lambda: model(x).square().sum())
    expected = {f"linear_norms/{key}/{name}": value for name, found in expected.items() for key, value in found.items()}
    assert row == pytest.approx(expected, rel=1e-5)


def test_frozen_layers_stay_frozen() -> None:
    model, x = sequence(), torch.randn(5, 3)
    model[0].requires_grad_(False)
    observer = LinearNorms().attach(context_of(model))
    observer.begin()
    assert not model[0](x).requires_grad, "watching must not make the backward pass longer"
    row = observe(observer, lambda: model(x).sum())
    assert "linear_norms/output/0" in row
    assert rows_of(row, "linear_norms/grad_input") == {}
    assert rows_of(row, "linear_norms/grad_output").keys() == {"2"}


def test_several_passes_add_up_their_gradients() -> None:
    model, (first, last) = sequence(), torch.randn(2, 5, 3)
    rows = [watched(model, LinearNorms(), lambda x=x: model(x).square().sum()) for x in (first, last)]
    observer = LinearNorms().attach(context_of(model))
    both = observe(observer, *(lambda x=x: model(x).square().sum() for x in (first, last)))
    for key, value in both.items():
        one, other = (row[key] for row in rows)
        if "grad" not in key:
            assert value == other, "of the last pass"
        elif "token" in key:
            assert value == pytest.approx((one + other) / 2, rel=1e-6)
        else:
            assert value == pytest.approx(math.hypot(one, other), rel=1e-6)


class Mixer(nn.Module):
    """Queries of one tensor, keys and values of another or of the same."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(memory), self.v(memory))


def test_linears_of_different_inputs_do_not_count_as_one() -> None:
    torch.manual_seed(0)
    model, x, memory = Mixer(), *(torch.randn(2, 5, 4, requires_grad=True) for _ in range(2))
    row = watched(model, LinearNorms(), lambda: model(x, memory).sum())
    assert rows_of(row, "linear_norms/grad_input").keys() == {"q", "k", "v"}
    row = watched(model, LinearNorms(), lambda: model(x, x).sum())
    assert rows_of(row, "linear_norms/grad_input").keys() == {"q", "k", "v", "qkv"}
    (gradient,) = torch.autograd.grad(model(x, x).sum(), x)
    assert row["linear_norms/grad_input/qkv"] == pytest.approx(norm(gradient), rel=1e-5)


def test_a_pass_broken_off_does_not_blind_the_next() -> None:
    """As when recomputing stops as soon as it has what it wants."""
    torch.manual_seed(0)
    model, x, other = Mixer(), *(torch.randn(2, 5, 4, requires_grad=True) for _ in range(2))
    expected = watched(model, LinearNorms(), lambda: model(x, x).sum())
    observer = LinearNorms().attach(context_of(model))
    observer.begin()
    for broken_off in (model.q, model.k):
        broken_off(other)
    info = info_of(model(x, x).sum())
    info.loss.backward()
    observer.gradients(info)
    assert to_host(observer.read(info)) == expected


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("part", ["block", "attention"])
def test_activation_checkpointing_counts_nothing_twice(part: str, reentrant: bool) -> None:
    """Recomputing runs the hooks again, and may stop in the middle of the part recomputed."""
    model = trained(CONFIG).model
    row = watched(model, LinearNorms(), lambda: model(tokens(1)[:, :-1]).square().mean())
    for block in model.blocks:
        whole = block if part == "block" else block.attn
        inner = whole.forward
        whole.forward = lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=reentrant)
    again = watched(model, LinearNorms(), lambda: model(tokens(1)[:, :-1]).square().mean())
    assert again == row


def test_weight_is_read_where_the_run_reads_it() -> None:
    """Every reading of torch's spectral norm in training mode is a power iteration more."""
    torch.manual_seed(0)
    model, twin = (spectral_norm(nn.Linear(4, 4, bias=False), n_power_iterations=1) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    x = torch.randn(5, 4)
    row = watched(model, LinearNorms(), lambda: model(x).sum())
    twin(x).sum().backward()
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    twin.eval()
    assert row["linear_norms/weight/"] == pytest.approx(norm(twin.weight), rel=1e-6)
    assert norm(twin.parametrizations.weight.original) != pytest.approx(norm(twin.weight), rel=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arm", ["qkv_norm", "reordered_norm", "deepnorm", "ngpt", "sigma_reparam"])
def test_watching_changes_no_bit_where_the_residual_stream_is_the_input(arm: str, precision: str) -> None:
    """Where X has other users, their gradients must go on being summed up in the same order."""
    config = replace(cured(CONFIG, arm), runtime=RuntimeConfig(precision=precision))
    bare, seen = trained(config), trained(config, "linear_norms", "qk_cosine", "gradient_epsilon", "gains")
    train_step(bare, 3, tokens(3))
    row = logged_step(seen)
    assert row["linear_norms/grad_input/blocks.0.qkv"] > 0
    for name, value in bare.model.state_dict().items():
        assert torch.equal(seen.model.state_dict()[name], value), name


def test_bf16_is_reduced_in_fp32() -> None:
    model = nn.Linear(4, 512, bias=False).bfloat16()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    row = watched(model, LinearNorms(), lambda: model(x).float().square().sum())
    y = model(x).detach().double()
    assert row["linear_norms/output/"] == pytest.approx(norm(y), rel=1e-6)
    assert row["linear_norms/weight/"] == pytest.approx(norm(model.weight.double()), rel=1e-6)


def test_nothing_is_held_after_a_logged_step_nor_done_on_others() -> None:
    training = trained(CONFIG, "linear_norms", "qk_cosine")
    inputs, outputs = [], []

    def remember(_module: nn.Module, args: Any, output: Tensor) -> None:
        inputs.append(weakref.ref(args[0]))
        outputs.append((weakref.ref(output), output.grad_fn.name()))

    handle = training.model.blocks[0].attn.k.register_forward_hook(remember)
    logged_step(training)
    train_step(training, 4, tokens(4))
    handle.remove()
    gc.collect()
    assert [reference() for reference in inputs] == [None, None]
    assert [reference() for reference, _ in outputs] == [None, None]
    assert [name.startswith("_Tee") for _, name in outputs] == [True, False]


def test_a_model_compiled_before_says_so() -> None:
    model = sequence()
    compiled = torch.compile(model, backend="eager")
    compiled(torch.ones(1, 3))
    observer = LinearNorms().attach(context_of(model))
    with pytest.raises(UserError, match="before the first compiled call"):
        observe(observer, lambda: compiled(torch.ones(1, 3)).sum())
    torch._dynamo.reset()


# Dynamo itself makes an instance of `torch.autograd.Function` where it traces one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_linears_make_two_graphs_and_see_what_eager_sees() -> None:
    """fullgraph: a graph break raises; aot_eager: the backward pass is traced as well; one weight is computed."""
    torch.manual_seed(0)
    model = Mixer()
    parametrize.register_parametrization(model.k, "weight", nn.Softplus())
    observer = LinearNorms().attach(context_of(model))
    batches = torch.randn(3, 2, 5, 4)

    def listen_to(forward: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Row:
        return observe(observer, lambda: forward(x, x).square().sum())

    x, *others = (batch.requires_grad_() for batch in batches.unbind())
    eager = [listen_to(model, other) for other in others]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    found = []
    for other in others:
        compiled(x, x).sum().backward()
        found.append(listen_to(compiled, other))
    assert counter.frame_count == 2
    torch._dynamo.reset()
    for ours, theirs in zip(found, eager, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert rows_of(ours, "linear_norms/grad_input").keys() == {"q", "k", "v", "qkv"}
