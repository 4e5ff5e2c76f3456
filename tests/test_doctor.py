"""What the doctor says: of curvature on this machine, and of a model, beside what a watched training then records."""

import copy
import json
import random
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import foreshock
from foreshock.cli.doctor import curvature_products
from foreshock.cli.main import main
from foreshock.core.errors import ConfigError, UserError
from foreshock.core.run_config import RunConfig
from foreshock.core.run_folder import RunFolder
from foreshock.probes.curvature.backends import BACKENDS, choose_backend
from foreshock.probes.curvature.space import ParameterSpace
from foreshock.study import machine
from foreshock.training.doctor import Examination, doctor
from foreshock.training.doctor.cost import CPU, Work
from foreshock.training.setup import build_training
from tests.watched_models import Attention, NanoGPT, batch_of, built, loss_of

PAGE = Path(__file__).parent.parent / "docs" / "doctor.md"


def test_the_back_end_is_the_one_that_a_run_would_take_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    """As `choose_backend` says of the model of a run that is built from the base recipe."""
    model = build_training(RunConfig(), vocab_size=257).model
    expected = choose_backend(model, ParameterSpace(model.parameters()))
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["curvature"]
    assert (found["backend"], found["reason"]) == expected
    assert found["backend"] in BACKENDS
    assert main(["doctor"]) == 0
    screen = capsys.readouterr().out
    assert f"backend {expected[0]}" in screen
    assert expected[1] in screen


def test_without_torch_it_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "torch_version", lambda: None)
    assert curvature_products() == "unknown without torch"


class Encoder(nn.Module):
    """`nn.TransformerEncoder` between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)))


class ByHand(nn.Module):
    """Softmax of q kᵀ in its own code."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        weights = torch.softmax(q @ k.mT + torch.full((x.shape[1],) * 2, -torch.inf).triu(1), -1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Classes(nn.Module):
    """A perceptron of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.last = nn.Embedding(50, 8), nn.Linear(8, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.embed(tokens).relu())


class Lists(nn.Module):
    """Its blocks are mere lists, as those of x-transformers are: nothing calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(8), nn.Linear(8, 8)]) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for norm, linear in self.layers:  # type: ignore[misc]
            x = x + linear(norm(x))
        return self.head(x)


class Sign(torch.optim.Optimizer):
    """Steps by the sign, as nothing here understands."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.grad.sign()


def by_hand() -> nn.Module:
    model = NanoGPT(width=16)
    model.h[1].attn = ByHand(16, 2)
    return model


def frozen() -> nn.Module:
    model = NanoGPT(width=16)
    model.wte.requires_grad_(False)
    return model


def hugging_face(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
        "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    }[name]
    config = transformers.AutoConfig.for_model(name, vocab_size=50, bos_token_id=0, eos_token_id=1, **sizes)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


def sequence_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of what answers with logits, or with an object that holds them."""
    output = model(tokens[:, :-1])
    return F.cross_entropy(getattr(output, "logits", output).flatten(0, 1), tokens[:, 1:].flatten())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "nanoGPT": lambda: NanoGPT(width=16),
    "TransformerEncoder": Encoder,
    "one attention by hand": by_hand,
    "no attention": lambda: nn.Sequential(nn.Embedding(50, 8), nn.GELU(), nn.Linear(8, 50)),
    "no attention, own class": Classes,
    "a frozen table": frozen,
    "blocks that are lists": Lists,
}
SLOW = {name: lambda name=name: hugging_face(name) for name in ("gpt2", "llama")}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True),
    "one that is not understood": Sign,
}


def recorded(model: nn.Module, optimizer: torch.optim.Optimizer, out: Path, **options: Any) -> RunFolder:
    """What watching it records in three steps, all of them logged."""
    model.train()
    # The warnings are of monitors that stop, as the doctor said they would.
    with (
        warnings.catch_warnings(action="ignore"),
        foreshock.watch(model, optimizer, out, every=1, loss_fn=sequence_loss, budget=None, **options) as w,
    ):
        for step in range(3):
            loss = sequence_loss(model, batch_of(step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            w.step(loss, batch_of(step))
    return RunFolder(out)


def check_against(examination: Examination, folder: RunFolder) -> None:
    """Every row of the examination says what the record holds, and the record holds nothing that no row said."""
    keys = {key for row in folder.metrics() for key in row}
    for row in examination.rows:
        for key in row.keys:
            there = any(k == key or k.startswith(f"{key}/") for k in keys)
            assert there == (row.how != "blind"), (key, row)
        told = {key for other in examination.rows if other.quantity == row.quantity for key in other.keys}
        # A group alone stands for all that its monitor records.
        assert "/" not in row.quantity or {k for k in keys if f"{k}/".startswith(f"{row.quantity}/")} <= told, row
    captured = folder.manifest()["captured"].get("attention_logits", {})
    logits = [row for row in examination.rows if row.quantity in ("attention_logits/max", "attention_logits/bound")]
    for path, how in captured.items():
        (row,) = (row for row in logits if path in row.paths)
        assert how.startswith(f"{row.how}, from "), path
        assert row.why.startswith(how.partition(";")[0].removeprefix(f"{row.how}, ")), path


# Which model it is does not change what is said of an optimizer.
CASES = [(name, "AdamW") for name in MODELS] + [
    (name, optimizer) for name in ("nanoGPT", "a frozen table") for optimizer in OPTIMIZERS if optimizer != "AdamW"
]


@pytest.mark.parametrize(("name", "optimizer"), CASES)
def test_every_row_is_what_a_watched_training_records(name: str, optimizer: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    stepping = OPTIMIZERS[optimizer](model.parameters())
    examination = doctor(model, stepping, loss_fn=sequence_loss)
    check_against(examination, recorded(model, stepping, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_every_row_of_a_model_of_transformers(name: str, tmp_path: Path) -> None:
    model = SLOW[name]()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    examination = doctor(model, optimizer, loss_fn=sequence_loss)
    assert [len(row.paths) for row in examination.rows if row.quantity == "attention_logits/max"] == [2]
    assert (examination.facts["heads"], examination.facts["width"], examination.facts["depth"]) == (2, 16, 2)
    check_against(examination, recorded(model, optimizer, tmp_path / "run"))


@pytest.mark.parametrize(("queries", "how"), [(4, "sample"), (16, "exact"), (0, "bound")])
def test_samples_and_bounds_are_named_so(queries: int, how: str, tmp_path: Path) -> None:
    """Sequences have 16 tokens: 16 queries are all of them."""
    model, optimizer = built()
    monitors = [f"attention_logits:queries={queries}", "gains"]
    examination = doctor(model, optimizer, monitors=monitors, seq_len=16)
    assert examination.rows[0].how == how
    check_against(examination, recorded(model, optimizer, tmp_path / "run", monitors=monitors))


def why(examination: Examination, quantity: str, how: str) -> str:
    (row,) = (row for row in examination.rows if row.quantity == quantity and row.how == how)
    return row.why


def test_what_is_blind_says_why_and_what_to_do() -> None:
    model = by_hand()
    hand = doctor(model, torch.optim.AdamW(model.parameters()))
    (row,) = (row for row in hand.rows if row.quantity == "attention_logits/max" and row.how == "blind")
    assert row.paths == ("h.1.attn",)
    assert "softmax" in row.why
    assert "call torch.nn.functional.scaled_dot_product_attention" in row.why
    assert "give watch loss_fn" in why(hand, "curvature/eigenvalue", "blind")
    assert "no optimizer" in why(doctor(model), "norms/update", "blind")
    foreign = doctor(model, Sign(model.parameters()), loss_fn=sequence_loss)
    assert "Sign" in why(foreign, "norms/update", "blind")
    assert "preconditioned=False" in why(foreign, "curvature/eigenvalue", "blind")
    assert "frozen" in why(doctor(frozen()), "norms/gradient", "blind")
    assert "output_module" in why(doctor(nn.Linear(2, 2)), "output_logits/max", "blind")
    assert "ModuleList" in why(doctor(nn.Linear(2, 2)), "block_outputs/rms", "blind")
    assert "mere lists" in why(doctor(Lists()), "block_outputs/rms", "blind")


def test_the_facts_are_those_of_the_model() -> None:
    model, optimizer = built(depth=3)
    facts = doctor(model, optimizer).facts
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert (facts["width"], facts["depth"], facts["heads"]) == (32, 3, 2)
    assert facts["output module"] == "lm_head"
    assert facts["blocks"] == ["h.0", "h.1", "h.2"]
    assert (facts["wrappers"], facts["activation checkpointing"]) == ([], "not found")
    assert facts["optimizer"]["updates"] == "read from its state"
    assert facts["optimizer"]["edge of stability"].startswith("known, (2 - η·wd)·(1 + β) / ((1 - β)·η)")
    assert facts["curvature products"]["backend"] == choose_backend(model, ParameterSpace(model.parameters()))[0]
    unknown = doctor(model, Sign(model.parameters())).facts["optimizer"]
    assert unknown["updates"] == "not understood"
    assert unknown["edge of stability"].startswith("not known: ")


def test_wrappers_and_checkpoints_are_found() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, optimizer = built()
    model.h[0] = checkpoint_wrapper(model.h[0])
    examination = doctor(torch.compile(model, backend="eager"), optimizer)
    (wrapper,) = examination.facts["wrappers"]
    assert "torch.compile" in wrapper
    assert "first compiled call" in wrapper
    assert examination.facts["activation checkpointing"].startswith("1 modules are wrapped")
    assert examination.facts["blocks"] == ["h.0", "h.1"]
    (row,) = (row for row in examination.rows if row.quantity == "attention_logits/max")
    assert row.paths == ("h.0.attn", "h.1.attn")


class Recomputes(NanoGPT):
    """Its own code makes checkpoints."""

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, tokens, use_reentrant=False)


def test_code_that_makes_checkpoints_is_named() -> None:
    assert doctor(Recomputes(width=16)).facts["activation checkpointing"] == "code of Recomputes can"


@pytest.mark.slow
def test_checkpoints_of_transformers_are_found() -> None:
    model: Any = hugging_face("gpt2")
    assert doctor(model).facts["activation checkpointing"] == "not found"
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    examination = doctor(model)
    assert examination.facts["activation checkpointing"].startswith("switched on in the model")
    assert examination.facts["curvature products"]["backend"] == "central_differences"


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_ranks_are_named_and_nothing_is_measured_there() -> None:
    from torch.distributed.fsdp import fully_shard

    model, optimizer = built()
    (wrapper,) = doctor(nn.parallel.DistributedDataParallel(model), optimizer).facts["wrappers"]
    assert wrapper.startswith("DistributedDataParallel")
    model, _ = built()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    examination = doctor(model, optimizer)
    assert examination.facts["wrappers"] == ["FSDP2 (begin to watch on every rank; rows are of all parts)"]
    assert "sharded" in examination.facts["curvature products"]["reason"]
    assert why(examination, "norms/parameter", "exact") == "from the parts on all ranks"
    with pytest.raises(UserError, match="leave loss_fn and batch out on several ranks"):
        doctor(model, optimizer, loss_fn=loss_of, batch=batch_of(0))


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that an examination might change."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "hooks": [len(getattr(module, kind)) for module in model.modules() for kind in kinds],
        "modes": [module.training for module in model.modules()],
        "tensors": copy.deepcopy([*model.state_dict().values()]),
        "gradients": copy.deepcopy([parameter.grad for parameter in model.parameters()]),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "steps": len(optimizer._optimizer_step_post_hooks),
        "random": (torch.get_rng_state(), random.getstate()),
        "functions": [F.scaled_dot_product_attention, torch.nn.utils.clip_grad_norm_],
    }


def same(one: Any, other: Any) -> bool:
    """Bit for bit, all the way down."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def noisy() -> nn.Module:
    """It draws random numbers, and keeps running statistics."""
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def test_model_optimizer_and_generators_are_left_as_they_were() -> None:
    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        random.random()
        return model(batch).square().mean()

    model = noisy()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(5, 4)
    loss_fn(model, batch).backward()
    optimizer.step()
    model.eval()
    before = state_of(model, optimizer)
    found = doctor(model, optimizer, monitors=["norms", "output_logits", "gains"])
    assert found.measured is None
    assert same(before, state_of(model, optimizer))
    found = doctor(model, optimizer, loss_fn=loss_fn, batch=batch, monitors=["norms", "output_logits", "gains"])
    assert found.measured is not None
    assert found.measured.missing == ()
    assert same(before, state_of(model, optimizer))


def test_a_trial_says_what_fired_and_what_did_not() -> None:
    """A model whose code only looks as if it called the function: the plan expects it, the trial does not see it."""

    class Pretends(Attention):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] < 0:
                return F.scaled_dot_product_attention(x, x, x)
            return self.proj(x)

    model, optimizer = built()
    fine = doctor(model, optimizer, loss_fn=loss_of, batch=batch_of(0)).measured
    assert fine is not None
    assert fine.missing == ()
    assert fine.stopped == {}
    assert sorted(fine.captured) == ["h.0.attn", "h.1.attn"]
    assert min(fine.plain_s, fine.unlogged_s, fine.logged_s) > 0
    model.h[0].attn = Pretends(32, 2)
    found = doctor(model, torch.optim.SGD(model.parameters(), lr=1e-3), loss_fn=loss_of, batch=batch_of(0))
    assert found.measured is not None
    # What is left out of the forward pass has no gradient either.
    unused = [f"norms/{q}/h.0.attn.qkv.{p}" for q in ("gradient", "update") for p in ("weight", "bias")]
    attention = [f"attention_logits/{q}/h.0.attn" for q in ("max", "entropy")]
    assert list(found.measured.missing) == attention + unused
    assert "expected and not recorded: attention_logits/max/h.0.attn" in str(found)


# NanoGPT(32, 2, 2, 50) by hand. Parameters: tables 50·32 + 64·32, in each block two norms 2·64, qkv 32·96 + 96, proj
# 32·32 + 32, MLP 32·128 + 128 + 128·32 + 32, at last a norm 64 and the head 32·50.
PARAMETERS = 1600 + 2048 + 2 * (128 + 3168 + 1056 + 4224 + 4128) + 64 + 1600
IN_PRODUCTS = 2 * (3072 + 1024 + 4096 + 4096) + 1600


def test_the_estimate_counts_what_a_hand_counts() -> None:
    model, optimizer = built()
    found = doctor(model, optimizer, batch_size=4, seq_len=16, every=10).estimate
    tokens, pairs = 4 * 16, 2 * 4 * 16 * 16
    assert found.step == Work(
        flops=6 * IN_PRODUCTS * tokens + 12 * pairs * 32,
        bytes=4 * (PARAMETERS * 10 + 34 * 2 * tokens * 32 + 6 * tokens * 50),
    )
    assert found.extra == {
        "attention_logits": Work(flops_fp32=2 * pairs * 32, bytes=10 * pairs * 2 * 4),
        "norms": Work(bytes=4 * PARAMETERS * (3 + 12)),
        "output_logits": Work(bytes=8 * tokens * 50 * 4),
        "block_outputs": Work(bytes=2 * tokens * 32 * 4),
    }
    extra_s = 131_072 / 76e9 + (163_840 + 1_843_200 + 102_400 + 16_384) / 6e9
    step_s = 10_838_016 / 76e9 + 1_862_656 / 6e9
    assert found.logged_ratio == pytest.approx(1 + extra_s / step_s, rel=1e-12)
    assert found.share == pytest.approx(extra_s / (10 * step_s + extra_s), rel=1e-12)
    assert 0.02 * step_s * found.interval(0.02) >= extra_s > 0.02 * step_s * (found.interval(0.02) - 1)
    assert found.machine == CPU


def test_sizes_of_the_estimate_are_those_of_the_batch_unless_others_are_given() -> None:
    model, optimizer = built()

    def sizes(**given: Any) -> tuple[int, int]:
        found = doctor(model, optimizer, loss_fn=loss_of, trial=False, **given)
        assert found.measured is None
        return found.estimate.batch_size, found.estimate.seq_len

    assert sizes() == (8, 1024)
    assert sizes(batch={"pixels": torch.zeros(3, 5), "ids": [torch.zeros(6, 7, dtype=torch.int64)]}) == (6, 7)
    assert sizes(batch=batch_of(0), batch_size=2) == (2, 17)
    assert sizes(batch=batch_of(0), seq_len=5) == (4, 5)


def test_the_estimate_follows_what_is_recorded() -> None:
    model, _ = built()
    sgd = torch.optim.SGD(model.parameters(), lr=1e-2)

    def extra(optimizer: Any, *monitors: str) -> dict[str, Work]:
        found = doctor(model, optimizer, monitors=monitors, batch_size=4, seq_len=16)
        return dict(found.estimate.extra)

    pairs = 2 * 4 * 4 * 16
    sample = {"attention_logits": Work(flops_fp32=2 * pairs * 32, bytes=10 * pairs * 2 * 4)}
    assert extra(sgd, "attention_logits:queries=4") == sample
    assert extra(sgd, "attention_logits:queries=0") == {"attention_logits": Work(bytes=2 * 2 * 4 * 16 * 32 * 4)}
    assert extra(sgd, "norms") == {"norms": Work(bytes=4 * PARAMETERS * (3 + 1))}
    assert extra(Sign(model.parameters()), "norms") == {"norms": Work(bytes=4 * PARAMETERS * 3)}
    assert doctor(model, sgd, monitors=["gains"]).estimate.uncounted == ("gains",)
    # A head that is the table too: its matrix is multiplied by, the positions are looked up.
    model.lm_head.weight = model.wte.weight
    step = doctor(model, sgd, batch_size=1, seq_len=1).estimate.step
    assert step.flops == 6 * IN_PRODUCTS + 12 * 2 * 32


def test_a_model_that_is_watched_is_examined_but_not_measured(tmp_path: Path) -> None:
    model, optimizer = built()
    before = doctor(model, optimizer).rows
    with foreshock.watch(model, optimizer, tmp_path / "run"):
        assert doctor(model, optimizer).rows == before
        with pytest.raises(UserError, match="listens to this model"):
            doctor(model, optimizer, loss_fn=loss_of, batch=batch_of(0))
    assert doctor(model, optimizer, loss_fn=loss_of, batch=batch_of(0)).measured is not None


def test_what_cannot_be_examined_says_what_to_do() -> None:
    model, optimizer = built()
    other, _ = built()
    with pytest.raises(UserError, match="holds no parameter of this NanoGPT"):
        doctor(other, optimizer)
    with pytest.raises(UserError, match="no parameters"):
        doctor(nn.GELU())
    with pytest.raises(ConfigError, match="every must be at least 1"):
        doctor(model, optimizer, every=0)
    with pytest.raises(ConfigError, match="seq_len must be at least 1"):
        doctor(model, optimizer, seq_len=0)
    with pytest.raises(ConfigError, match="did you mean 'norms'"):
        doctor(model, optimizer, monitors=["norm"])
    with pytest.raises(UserError, match="training step with loss_fn"):
        doctor(model, optimizer, loss_fn=loss_of, batch="text")

    class Locked(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("a handle")

    locked = Locked(2, 2)
    with pytest.raises(UserError, match=r"cannot be copied.*leave loss_fn and batch out.*a handle"):
        doctor(locked, loss_fn=lambda model, batch: model(batch).sum(), batch=torch.ones(1, 2))


BUILDERS = """
import torch
from tests.watched_models import NanoGPT, batch_of, built, loss_of

def family(width, depth, heads, vocab_size):
    return NanoGPT(width, depth, heads, vocab_size)
def parts():
    return (*built(), loss_of, batch_of(0))
def model():
    return built()[0]
def pair():
    return built()
def pieces(path):
    return built()[0]
def number():
    return 3
def three():
    return (*built(), loss_of)
def fails():
    raise OSError("no such checkpoint")
def narrow(width, depth, heads, vocab_size):
    return NanoGPT(width, depth, heads, vocab_size - 1)
constant = 1
"""


@pytest.fixture
def builders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of somebody's own, in the current folder."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(BUILDERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    return name


SMALL = ["--size", "16x1x2", "--batch-size", "2", "--seq-len", "8"]


def test_the_command_examines_and_measures_a_model_family(builders: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", f"{builders}:family", *SMALL, "--every", "7", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["facts"]["width"], found["facts"]["depth"], found["facts"]["heads"]) == (16, 1, 2)
    assert found["measured"]["captured"] == {"h.0.attn": "exact, from F.scaled_dot_product_attention"}
    assert found["measured"]["missing"] == []
    assert (found["estimate"]["batch_size"], found["estimate"]["seq_len"], found["estimate"]["every"]) == (2, 8, 7)
    assert main(["doctor", f"{builders}.py:family", *SMALL, "--estimate"]) == 0
    screen = capsys.readouterr().out
    assert "estimated by counting, for 2 sequences of 8 tokens" in screen
    assert "measured" not in screen
    assert re.search(r"attention_logits/max\s+h\.0\.attn\s+exact", screen)


@pytest.mark.parametrize(("name", "measured"), [("parts", True), ("model", False), ("pair", False)])
def test_the_command_takes_the_objects_of_a_training(
    name: str, measured: bool, builders: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", f"{builders}:{name}", "--monitors", "norms", "attention_logits:queries=0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["measured"] is not None) == measured
    assert [row["how"] for row in found["rows"] if row["quantity"] == "attention_logits/bound"] == ["bound"]
    assert (found["facts"]["optimizer"] is None) == (name == "model")


REFUSED = {
    "no such module": (["nowhere_at_all:build"], "cannot import 'nowhere_at_all:build'"),
    "no such function": (["{}:nothing"], "has no attribute 'nothing'"),
    "no function named": (["{}"], "give package.module:function"),
    "no function": (["{}:constant"], "is no function"),
    "other arguments": (["{}:pieces"], "build(width, depth, heads, vocab_size)"),
    "no module": (["{}:number"], "returned int; the doctor takes build("),
    "three things": (["{}:three"], "returned NanoGPT, AdamW, function; the doctor takes"),
    "fails": (["{}:fails"], "failed: OSError: no such checkpoint"),
    "another vocabulary": (["{}:narrow", *SMALL], "must be (2, 8, 257)"),
    "sizes for what takes none": (["{}:parts", "--size", "16x1"], "--size"),
    "size unreadable": (["{}:family", "--size", "big"], "WIDTHxDEPTH"),
    "batch unreadable": (["{}:family", "--batch-size", "x"], "--batch-size: cannot read 'x'"),
    "batch zero": (["{}:family", "--batch-size", "0"], "--batch-size must be at least 1"),
    "unknown monitor": (["{}:parts", "--monitors", "norm"], "did you mean 'norms'"),
    "options without a model": (["--size", "16x1"], "give a model too"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_builder_that_cannot_be_examined_ends_with_2(
    case: str, builders: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, said = REFUSED[case]
    assert main(["doctor", *(argument.format(builders) for argument in arguments)]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert told.out == ""


def test_the_page_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its commands run on the module that it shows."""
    page = PAGE.read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if block.startswith("# my_"))
    (tmp_path / "my_training.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    commands = re.findall(r"^foreshock (doctor .*?)(?: +#.*)?$", page, re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        assert main(command.split()) == 0
    assert "attention_logits/max" in capsys.readouterr().out


def test_a_loss_of_another_model_is_refused_and_leaves_no_gradient() -> None:
    """It would train the model that is asked about, and not its copy."""
    model, optimizer = built()
    with pytest.raises(UserError, match="does not use the model that it is given"):
        doctor(model, optimizer, loss_fn=lambda _, tokens: loss_of(model, tokens), batch=batch_of(1))
    assert all(parameter.grad is None for parameter in model.parameters())
