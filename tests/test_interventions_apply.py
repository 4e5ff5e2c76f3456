"""Interventions on models and loops that are not foreshock's."""

import copy
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from foreshock import interventions
from foreshock.core.arms import Arm
from foreshock.core.config import Spec
from foreshock.core.contracts import Context, Edit, Intervention, StepInfo
from foreshock.core.errors import ConfigError, UserError
from foreshock.core.run_config import RunConfig
from foreshock.interventions._apply import Applied
from foreshock.interventions._layers import DynamicTanh
from foreshock.proxy.optim import build_optimizer, set_learning_rate
from foreshock.proxy.schedules import schedule_factor
from foreshock.training.setup import build_training
from foreshock.training.step import train_step

VOCAB = 13


class Transformer(nn.Module):
    """A small Transformer that owes nothing to foreshock: fused QKV, biases, learned positions."""

    def __init__(self, width: int = 8, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(VOCAB, width)
        self.positions = nn.Parameter(torch.zeros(6, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth + 1))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.lm_head = nn.Linear(width, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions[: ids.shape[1]]
        for i, qkv in enumerate(self.qkv):
            q, k, v = (
                part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in qkv(self.norms[2 * i](x)).chunk(3, dim=-1)
            )
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out[i](mixed.transpose(1, 2).flatten(2))
            x = x + self.down[i](F.gelu(self.up[i](self.norms[2 * i + 1](x))))
        logits: Tensor = self.lm_head(self.norms[-1](x))
        return logits


def transformer() -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Transformer()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2, num_key_value_heads=1))


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits


def batch(seed: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCAB, (4, 7), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def train(model: nn.Module, optimizer: Optimizer, applied: Applied | None, steps: range) -> None:
    for step in steps:
        inputs, targets = batch(step)
        logits = logits_of(model, inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        (loss if applied is None else applied.loss(loss, logits, inputs, targets)).backward()
        optimizer.step()


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def snapshot_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Everything that taking interventions off has to restore, parameters by identity."""
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "state": [(name, value.tolist()) for name, value in model.state_dict().items()],
        "groups": [[id(p) for p in group["params"]] for group in optimizer.param_groups],
        "names": [list(group.get("param_names", ())) for group in optimizer.param_groups],
        "settings": [
            {key: value for key, value in group.items() if key not in ("params", "param_names")}
            for group in optimizer.param_groups
        ],
        "optimizer state": sorted(id(parameter) for parameter in optimizer.state),
        "hooks": [
            (name, len(value))
            for owner in [*model.modules(), optimizer]
            for name, value in vars(owner).items()
            if "hooks" in name and value
        ],
    }


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make a class loadable as `planted:<its name>`."""
    module = ModuleType("planted")
    monkeypatch.setitem(sys.modules, "planted", module)

    def add(member: type) -> str:
        setattr(module, member.__name__, member)
        return f"planted:{member.__name__}"

    return add


ON_ANY_MODEL = ["z_loss", "sigma_reparam", "logit_softcap:limit=2", "output_centering", "dyt"]
ON_ANY_MODEL += ["output_centering:mode=centring"]


@pytest.mark.parametrize("build", [transformer, llama])
@pytest.mark.parametrize("make", [adamw, sgd])
@pytest.mark.parametrize("name", ON_ANY_MODEL)
def test_interventions_change_training_and_taking_them_off_restores_everything(
    build: Any, make: Any, name: str
) -> None:
    model = build()
    optimizer = make(model)
    train(model, optimizer, None, range(1, 2))
    before = snapshot_of(model, optimizer)
    twin = copy.deepcopy(model)
    twin_optimizer = make(twin)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    interventions.apply(model, name, optimizer).remove()
    assert snapshot_of(model, optimizer) == before

    applied = interventions.apply(model, name, optimizer)
    train(model, optimizer, applied, range(2, 5))
    train(twin, twin_optimizer, None, range(2, 5))
    trained = dict(model.named_parameters())
    differs = [n for n, p in twin.named_parameters() if n not in trained or not torch.equal(p, trained[n])]
    assert differs
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained.values())
    applied.remove()
    after = snapshot_of(model, optimizer)
    for part in ("modules", "parameters", "groups", "names", "settings", "hooks"):
        assert after[part] == before[part], part
    train(model, optimizer, applied, range(5, 6))  # the loop goes on as if nothing were there
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("build", [transformer, llama])
def test_what_was_touched_is_named(build: Any) -> None:
    model = build()
    given = ["sigma_reparam", Spec("dyt"), "logit_softcap", "output_centering", "z_loss"]
    with interventions.apply(model, given, adamw(model)) as applied:
        assert list(applied.touched) == ["sigma_reparam", "dyt", "logit_softcap", "output_centering", "z_loss"]
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        norms = [name for name, module in model.named_modules() if isinstance(module, DynamicTanh)]
        assert applied.touched["sigma_reparam"] == (*[name for name in linears if name != "lm_head"], "group 0")
        assert sorted(applied.touched["dyt"]) == sorted([*norms, "group 0"])
        assert len(norms) == 5
        assert applied.touched["logit_softcap"] == applied.touched["output_centering"] == ("lm_head",)
        assert applied.touched["z_loss"] == ()


@pytest.mark.parametrize(
    "arm", ["z_loss:weight=0.01", "sigma_reparam", "dyt+output_centering:mode=centring", "qk_clip:tau=0.1"]
)
def test_a_hand_written_loop_on_the_proxy_has_the_bits_of_foreshocks_own(arm: str) -> None:
    config = Arm.parse(f"{arm}+model.width=16+data.seq_len=6+optim.clip_norm=null").apply(RunConfig())
    ours = build_training(config, VOCAB)
    theirs = build_training(Arm.parse("model.width=16+data.seq_len=6").apply(RunConfig()), VOCAB)
    optimizer = build_optimizer(theirs.model, config.optim, config.model.roles)
    applied = interventions.apply(theirs.model, arm, optimizer, output_module=theirs.model.head)
    for step in range(1, 5):
        tokens = torch.randint(VOCAB, (4, 7), generator=torch.Generator().manual_seed(step))
        train_step(ours, step, tokens)
        lr = config.optim.lr * schedule_factor(step, config.train.steps, config.optim.lr, config.schedule)
        set_learning_rate(optimizer, lr)
        logits = theirs.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        applied.loss(loss, logits).backward()
        optimizer.step()
    found, expected = theirs.model.state_dict(), ours.model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_new_parameters_join_the_group_of_their_kind_and_old_ones_leave() -> None:
    model = transformer()
    vectors = {name: p for name, p in model.named_parameters() if p.dim() < 2}
    matrices = {name: p for name, p in model.named_parameters() if p.dim() >= 2}
    optimizer = torch.optim.AdamW(
        [{"params": list(matrices.items()), "weight_decay": 0.1}, {"params": list(vectors.items()), "weight_decay": 0}]
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    norms = {id(p) for name, p in vectors.items() if name.startswith("norms")}
    before = snapshot_of(model, optimizer)
    with interventions.apply(model, ["dyt", "sigma_reparam"], optimizer) as applied:
        assert applied.touched["dyt"][-1] == applied.touched["sigma_reparam"][-1] == "group 1"
        current = {name: id(p) for name, p in model.named_parameters()}
        members = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
        assert members[0] == {id(p) for p in matrices.values()}
        assert members[1] == set(current.values()) - members[0]
        assert not members[1] & norms
        for group in optimizer.param_groups:
            assert len(group["param_names"]) == len(group["params"])
        assert "norms.0.alpha" in optimizer.param_groups[1]["param_names"]
        train(model, optimizer, applied, range(1, 3))
        scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-4]
    after = snapshot_of(model, optimizer)
    assert (after["groups"], after["names"]) == (before["groups"], before["names"])


def test_without_a_group_of_its_kind_the_first_one_takes_a_parameter() -> None:
    model = transformer()
    optimizer = torch.optim.SGD([model.lm_head.weight], lr=0.1)
    with interventions.apply(model, "dyt", optimizer) as applied:
        assert applied.touched["dyt"][-1] == "group 0"


@pytest.mark.parametrize("name", ["sigma_reparam+dyt", "output_centering:mode=centring+z_loss"])
def test_a_resumed_run_has_the_same_bits(name: str) -> None:
    def start() -> tuple[nn.Module, Optimizer, Applied]:
        model = transformer()
        optimizer = adamw(model)
        return model, optimizer, interventions.apply(model, name, optimizer)

    whole, interrupted, resumed = start(), start(), start()
    train(*whole, range(1, 6))
    train(*interrupted, range(1, 3))
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in interrupted], buffer)
    buffer.seek(0)
    for part, state in zip(resumed, torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*resumed, range(3, 6))
    found, expected = resumed[0].state_dict(), whole[0].state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_states_of_other_interventions_are_refused() -> None:
    model = transformer()
    state = interventions.apply(model, "z_loss").state_dict()
    with pytest.raises(UserError, match=r"the state of \['z_loss'\], in force are \['dyt'\]"):
        interventions.apply(model, "dyt").load_state_dict(state)


@dataclass(frozen=True, kw_only=True)
class SkipEven(Intervention):
    """Takes back every second update, and keeps count."""

    def build(self, context: Context) -> Intervention:
        return _SkipEvenRuntime()


class _SkipEvenRuntime(Intervention):
    def __init__(self) -> None:
        self.calls = torch.zeros(())
        self.norms: list[Tensor] = []

    def before_update(self, info: StepInfo) -> Tensor:
        assert info.grad_norm is not None
        self.norms.append(info.grad_norm)
        self.calls += 1
        return self.calls % 2

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"].clone()


@pytest.mark.parametrize("make", [adamw, sgd])
def test_keep_gates_parameters_and_optimizer_state(make: Any, plant: Any) -> None:
    """A loop whose even steps are taken back is the loop without them, bit for bit."""
    gated, plain = transformer(), transformer()
    optimizer, plain_optimizer = make(gated), make(plain)
    applied = interventions.apply(gated, plant(SkipEven), optimizer)
    for step in range(1, 6):
        train(gated, optimizer, applied, range(step, step + 1))
        if step % 2:
            train(plain, plain_optimizer, None, range(step, step + 1))
    assert all(torch.equal(a, b) for a, b in zip(gated.parameters(), plain.parameters(), strict=True))
    assert applied.state_dict() == {"steps": 5, "planted:SkipEven": {"calls": torch.tensor(5.0)}}
    runtime: Any = applied._runtimes["planted:SkipEven"]
    total = torch.cat([p.grad.flatten() for p in gated.parameters()]).norm()
    torch.testing.assert_close(runtime.norms[-1], total)


def test_a_refused_step_takes_back_decay_that_is_a_hook_of_the_optimizer(plant: Any) -> None:
    model = transformer()
    optimizer = sgd(model)

    def decay(optimizer: Optimizer, *_: Any) -> None:
        with torch.no_grad():
            model.lm_head.weight.mul_(0.5)

    optimizer.register_step_pre_hook(decay)
    applied = interventions.apply(model, plant(SkipEven), optimizer)
    train(model, optimizer, applied, range(1, 2))
    before = model.lm_head.weight.detach().clone()
    train(model, optimizer, applied, range(2, 3))
    assert torch.equal(model.lm_head.weight, before)


def test_every_refusal_wins_over_every_consent(plant: Any) -> None:
    class Always(SkipEven):
        """Consents."""

        def build(self, context: Context) -> Intervention:
            class Runtime(Intervention):
                def before_update(self, info: StepInfo) -> Tensor:
                    return torch.ones(())

            return Runtime()

    model = transformer()
    optimizer = sgd(model)
    applied = interventions.apply(model, [plant(SkipEven), plant(Always)], optimizer)
    train(model, optimizer, applied, range(1, 2))
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, applied, range(2, 3))
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@dataclass(frozen=True, kw_only=True)
class Wrecks(Intervention):
    """Changes model and optimizer, then finds that it cannot go on."""

    def edit_model(self, model: nn.Module) -> Edit:
        handle = model.register_forward_hook(lambda *_: None)
        return Edit(touched=("",), undo=handle.remove)

    def edit_optimizer(self, optimizer: Optimizer) -> Edit:
        raise UserError("not with this optimizer")


@pytest.mark.parametrize(
    ("given", "kind", "complaint"),
    [
        ("qknorm", ConfigError, "unknown intervention 'qknorm'; did you mean 'qk_norm'"),
        ("dyt:alhpa=1", ConfigError, "did you mean 'alpha'"),
        ("dyt:alpha=-1", ConfigError, "dyt:alpha must be a finite number above 0"),
        (["dyt", "dyt:alpha=1"], ConfigError, "must name each intervention once"),
        ("qk_clip+sigma_reparam", ConfigError, "cannot combine qk_clip with sigma_reparam"),
        ("dyt+optim.lr=1", UserError, "changes a run.s config"),
        ("dyt+qk_norm", UserError, "head cannot be told from Transformer"),
        ("dyt+qk_clip", UserError, "finds no linears that make the queries"),
        (["dyt", "planted:Wrecks"], UserError, "not with this optimizer"),
    ],
)
def test_a_refusal_gives_its_reason_and_changes_nothing(given: Any, kind: type, complaint: str, plant: Any) -> None:
    plant(Wrecks)
    model = transformer()
    optimizer = adamw(model)
    before = snapshot_of(model, optimizer)
    with pytest.raises(kind, match=complaint):
        interventions.apply(model, given, optimizer)
    assert snapshot_of(model, optimizer) == before


@pytest.mark.parametrize("given", ["qk_clip", "output_centering:mode=centring", "planted:SkipEven", "planted:Wrecks"])
def test_what_acts_on_the_optimizer_asks_for_it(given: str, plant: Any) -> None:
    plant(SkipEven)
    plant(Wrecks)
    model = transformer()
    with pytest.raises(UserError, match=f"{given.partition(':mode')[0]} acts on the optimizer's steps: give"):
        interventions.apply(model, given)


def test_without_an_optimizer_the_users_own_takes_the_parameters_that_are_then_there() -> None:
    model = transformer()
    with interventions.apply(model, "dyt") as applied:
        optimizer = adamw(model)
        train(model, optimizer, applied, range(1, 3))
        assert model.norms[0].alpha in optimizer.state


def test_the_loop_is_told_what_it_forgot() -> None:
    model = transformer()
    optimizer = adamw(model)
    inputs, targets = batch(0)
    with interventions.apply(model, ["z_loss", "output_centering:mode=centring"], optimizer) as applied:
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        with pytest.raises(UserError, match=r"call applied\.loss\(loss, …\) before the backward pass"):
            optimizer.step()
        with pytest.raises(UserError, match=r"reads the logits: call applied\.loss\(loss, logits=…\)"):
            applied.loss(loss)
        with pytest.raises(UserError, match=r"interventions cannot see into step\(closure\)"):
            optimizer.step(lambda: loss)
    with interventions.apply(model, "output_centering", optimizer) as applied:
        assert applied.loss(loss) > loss  # needs no logits


def test_a_tensor_that_is_not_given_cannot_be_read_by_a_function_either(plant: Any) -> None:
    @dataclass(frozen=True, kw_only=True)
    class ReadsTargets(Intervention):
        def extra_loss(self, info: StepInfo) -> Tensor:
            return torch.sum(info.targets_BT)

    model = transformer()
    with pytest.raises(UserError, match="reads the targets"):
        interventions.apply(model, plant(ReadsTargets)).loss(torch.zeros(()))


def test_gradients_that_are_still_scaled_are_refused() -> None:
    model = transformer()
    optimizer = adamw(model)
    with interventions.apply(model, "output_centering:mode=centring", optimizer) as applied:
        applied.loss(model(batch(0)[0]).sum()).backward()
        optimizer.grad_scale = torch.tensor(2.0)  # what GradScaler leaves to optimizers that unscale themselves
        with pytest.raises(UserError, match=r"call scaler\.unscale_\(optimizer\) before"):
            optimizer.step()


def test_compiled_and_distributed_models_are_refused() -> None:
    with pytest.raises(UserError, match=r"before torch\.compile"):
        interventions.apply(torch.compile(transformer(), backend="eager"), "dyt")
    model = transformer()
    model.compile(backend="eager")
    with pytest.raises(UserError, match=r"before torch\.compile"):
        interventions.apply(model, "dyt")
    wrapped = object.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    with pytest.raises(UserError, match="before DistributedDataParallel"):
        interventions.apply(wrapped, "dyt")


def test_the_output_module_is_the_heads_or_the_given_one() -> None:
    assert interventions.apply(llama(), "logit_softcap").touched == {"logit_softcap": ("lm_head",)}
    assert interventions.apply(transformer(), "logit_softcap").touched == {"logit_softcap": ("lm_head",)}
    model = transformer()
    applied = interventions.apply(model, "logit_softcap", output_module=model.up[0])
    assert applied.touched == {"logit_softcap": ("up.0",)}
    headless: Any = llama()
    with pytest.raises(UserError, match="LlamaModel has none that can be told from the others"):
        interventions.apply(headless.model, "logit_softcap")
    assert "down_proj" in interventions.apply(headless.model, "sigma_reparam").touched["sigma_reparam"][-1]


def test_one_text_a_list_and_specs_mean_the_same() -> None:
    for given in ("z_loss+dyt:alpha=0.3", ["dyt:alpha=0.3", "z_loss"], [Spec("dyt", {"alpha": 0.3}), Spec("z_loss")]):
        model = transformer()
        applied = interventions.apply(model, given)
        assert list(applied.touched) == ["dyt", "z_loss"]
        assert model.norms[0].alpha.item() == pytest.approx(0.3)
    assert list(interventions.apply(transformer(), Spec("z_loss")).touched) == ["z_loss"]
    assert interventions.apply(transformer(), "none").touched == {}


def test_leaving_the_block_takes_interventions_off_even_after_an_error() -> None:
    model = transformer()
    with pytest.raises(ZeroDivisionError), interventions.apply(model, "dyt+logit_softcap"):
        raise ZeroDivisionError
    assert not any(isinstance(module, DynamicTanh) for module in model.modules())
    assert not model.lm_head._forward_hooks


def test_an_unknown_attribute_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'aply'"):
        _ = interventions.aply  # type: ignore[attr-defined]
