"""Interventions that are parametrizations, initial values and residual rules, against their formulas.

Shapes: B batch, T tokens, D width, H heads, K head dimension, V vocabulary.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foreshock.core import plugins
from foreshock.core.config import Spec, replace_at
from foreshock.core.errors import ConfigError
from foreshock.core.model_config import ModelConfig, RoleMultipliers
from foreshock.core.run_config import (
    DataConfig,
    OptimConfig,
    RecordConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    check_conflicts,
    edited,
)
from foreshock.probes.attention import probabilities, statistics, tap_attention
from foreshock.proxy.model import Proxy, rotate
from foreshock.proxy.optim import set_learning_rate
from foreshock.proxy.parametrization import LINEAR_ROLES, role_of
from foreshock.training.setup import Training, build_training
from foreshock.training.step import train_step

VOCAB = 13
BASE = RunConfig(
    model=ModelConfig(width=16, depth=3, heads=2),
    data=DataConfig(seq_len=6, batch_size=2),
    optim=OptimConfig(lr=0.02, weight_decay=0.1),
    schedule=ScheduleConfig(name="constant", warmup=0.0),
    train=TrainConfig(steps=5),
    record=RecordConfig(monitors=()),
)
ARCHITECTURES = [
    "muparam:variant=full",
    "head_dim_scale",
    "zero_init_query",
    "squared_relu_attention",
    "attention_logit_scale:kappa=5",
    "deepnorm",
    "depth_scaled_norm",
    "ngpt",
    "zero_init_residual",
    "embedding_scaling",
]


def arm(*cures: str, base: RunConfig = BASE) -> RunConfig:
    return replace(base, interventions=tuple(Spec.parse(cure) for cure in cures))


def built(*cures: str, base: RunConfig = BASE, vocab: int = VOCAB) -> Training:
    return build_training(arm(*cures, base=base), vocab)


def tokens(seed: int = 0, length: int = 7) -> Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


def train(training: Training, steps: int) -> None:
    for step in range(1, steps + 1):
        train_step(training, step, tokens(step))


def group_of(training: Training, parameter: Tensor) -> dict:
    (group,) = [g for g in training.optimizer.param_groups if any(p is parameter for p in g["params"])]
    return group


def attention_of(model: Proxy, ids: Tensor) -> dict:
    taps = tap_attention(model)
    taps.listen()
    model(ids)
    return taps.take()


def test_the_parameters_that_a_cure_leaves_alone_start_with_the_same_bits() -> None:
    base = dict(built().model.state_dict())
    changed = {
        "muparam:variant=full,base_width=4": {"q", "head"},
        "zero_init_query": {"q"},
        "deepnorm": {"v", "proj", "fc1", "fc2"},
        "zero_init_residual": {"proj", "fc2"},
        "embedding_scaling": {"embedding"},
        "qk_lr": set(),
        "no_embedding_decay": set(),
        "ngpt": set(),
    }
    for cure, roles in changed.items():
        ours = dict(built(cure).model.state_dict())
        for name in base.keys() & ours.keys():
            assert torch.equal(ours[name], base[name]) == (role_of(name) not in roles), (cure, name)


@pytest.mark.parametrize("cure", ARCHITECTURES)
def test_no_position_sees_what_comes_after_it(cure: str) -> None:
    training = built(cure)
    train(training, 2)
    ids = tokens(9)[:, :-1]
    other = ids.clone()
    other[:, 4:] = (other[:, 4:] + 1) % VOCAB
    ours, theirs = training.model(ids), training.model(other)
    assert torch.equal(ours[:, :4], theirs[:, :4])
    assert not torch.equal(ours[:, 4:], theirs[:, 4:])


@pytest.mark.parametrize("variant", ["simple", "intermediate", "full"])
def test_muparam_multiplies_by_hand_derived_values(variant: str) -> None:
    """Width 128 against 64 with SwiGLU: hidden sizes 8/3 · 64 and 8/3 · 128, rounded up to 8s, are 176 and 344."""
    base = replace(BASE, model=ModelConfig(width=128, depth=1, heads=2, mlp=Spec("swiglu")))
    config = edited(arm(f"muparam:variant={variant},base_width=64", base=base))
    halved = RoleMultipliers(lr=0.5)
    expected = dict.fromkeys(("q", "k", "v", "proj", "fc1", "gate"), halved)
    expected["fc2"] = RoleMultipliers(lr=176 / 344)
    expected["head"] = RoleMultipliers(lr=0.5, init=1.0 if variant == "simple" else math.sqrt(0.5))
    if variant == "full":
        expected["q"] = RoleMultipliers(lr=0.5, init=0.0)
    expected |= dict.fromkeys(("embedding", "norm", "gain"), RoleMultipliers())
    for role, multipliers in expected.items():
        assert getattr(config.model.roles, role) == multipliers, role
    assert config.model.attention.scale_power == (1.0 if variant == "full" else 0.5)
    gelu = edited(arm("muparam:base_width=64", base=replace(base, model=ModelConfig(width=128, heads=2))))
    assert gelu.model.roles.fc2 == halved


def test_muparam_starts_the_head_at_its_standard_deviation() -> None:
    """sqrt(64) / 128; the standard deviation of n truncated normals is off by less than 5 / sqrt(2n)."""
    base = replace(BASE, model=ModelConfig(width=128, depth=1, heads=2))
    weight = built("muparam:variant=intermediate,base_width=64", base=base, vocab=997).model.head.weight
    assert weight.std().item() == pytest.approx(8 / 128, rel=5 / math.sqrt(2 * weight.numel()))


@pytest.mark.parametrize("variant", ["simple", "intermediate"])
def test_muparam_changes_no_bit_at_its_base_width(variant: str) -> None:
    ours, theirs = built(f"muparam:variant={variant},base_width=16"), built()
    train(ours, 3)
    train(theirs, 3)
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(mine, other)


WIDTHS = (32, 64, 128, 256)


def changes(width: int, cures: tuple[str, ...], seed: int) -> dict[str, float]:
    """RMS of what three Adam steps on eight tokens change: ΔW x for each linear, x its first input; and the logits."""
    base = replace(
        BASE,
        model=ModelConfig(width=width, depth=2, heads=2),
        data=DataConfig(seq_len=8, batch_size=1),
        optim=OptimConfig(lr=1e-4, weight_decay=0.0),
        train=TrainConfig(steps=3, seed=seed),
    )
    training = built(*cures, base=base)
    batch = torch.randint(VOCAB, (1, 9), generator=torch.Generator().manual_seed(seed))
    linears = {n: m for n, m in training.model.named_modules() if isinstance(m, torch.nn.Linear)}
    inputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].detach()))
        for name, module in linears.items()
    ]
    before = training.model(batch[:, :-1]).detach()
    weights = {name: module.weight.detach().clone() for name, module in linears.items()}
    for handle in handles:
        handle.remove()
    for step in range(1, 4):
        train_step(training, step, batch)
    moved = {name: inputs[name] @ (linears[name].weight.detach() - weights[name]).T for name in linears}
    moved["logits"] = training.model(batch[:, :-1]).detach() - before
    return {name: change.square().mean().sqrt().item() for name, change in moved.items()}


def slopes(*cures: str) -> dict[str, float]:
    """Exponent of the width in each change: least squares in logarithms, mean over three seeds."""
    tables = [[changes(width, cures, seed) for seed in range(3)] for width in WIDTHS]
    x = torch.tensor(WIDTHS).double().log()
    x = x - x.mean()
    found = {}
    for name in tables[0][0]:
        sizes = torch.tensor([sum(table[name] for table in row) / 3 for row in tables]).double()
        found[name] = ((x * sizes.log()).sum() / x.square().sum()).item()
    return found


def test_coordinate_check_across_widths() -> None:
    """How the size of a change grows with the width d.

    An Adam step is about η·sign(gradient). ΔW x then grows as η·d where it is aligned with x, as it is for few
    tokens, and as η·√d where it is not: exponents 1 and 1/2 in the standard parametrization, 0 and -1/2 with
    η ∝ 1/d. Half-way between lies the bound. Changed features reach the logits through a head of standard
    deviation 1/√d, aligned: √d more, so that logits grow faster than d in the standard parametrization, as √d in
    muParam simple, and not at all once the head's standard deviation falls as 1/d.
    """
    standard, simple, full = slopes(), slopes("muparam"), slopes("muparam:variant=full")
    for name in standard.keys() - {"logits"}:
        assert standard[name] == pytest.approx(1, abs=0.25), name
        assert simple[name] == pytest.approx(0, abs=0.25), name
        assert full[name] == pytest.approx(0, abs=0.25), name
    assert standard["logits"] > 1
    assert simple["logits"] == pytest.approx(0.5, abs=0.25)
    assert full["logits"] == pytest.approx(0, abs=0.25)


@pytest.mark.parametrize(
    ("cure", "multipliers"),
    [
        ("muparam:base_width=4", dict.fromkeys([*LINEAR_ROLES, "head"], 0.25)),
        ("qk_lr:multiplier=0.3", {"q": 0.3, "k": 0.3}),
        ("embedding_scaling:factor=3,scale_lr=true", {"embedding": 3.0}),
    ],
)
def test_learning_rates_are_multiplied_and_independent_decay_is_not(cure: str, multipliers: dict[str, float]) -> None:
    """With no gradient a step at schedule factor s leaves θ · (1 - s·λ), whatever the multiplier."""
    training = built(cure)
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    set_learning_rate(training.optimizer, 0.5 * 0.02)
    for name, parameter in training.model.named_parameters():
        multiplier = multipliers.get(role_of(name), 1.0)
        assert group_of(training, parameter)["lr"] == pytest.approx(0.5 * 0.02 * multiplier), name
        parameter.grad = torch.zeros_like(parameter)
    training.optimizer.step()
    for name, parameter in training.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.5 * 0.1), rtol=1e-6, atol=0)


def test_multipliers_multiply() -> None:
    config = replace_at(arm("muparam:base_width=4", "qk_lr:multiplier=0.5"), "model.roles.q.lr", 3.0)
    roles = edited(config).model.roles
    assert (roles.q.lr, roles.k.lr, roles.v.lr) == (3 * 0.25 * 0.5, 0.25 * 0.5, 0.25)


def test_no_embedding_decay_spares_the_embedding_alone() -> None:
    training = built("no_embedding_decay")
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    for parameter in training.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    training.optimizer.step()
    for name, parameter in training.model.named_parameters():
        expected = before[name] * (1.0 if name == "embed.weight" else 1 - 0.1)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("cure", "power"), [("head_dim_scale", 1.0), ("head_dim_scale:power=0.75", 0.75)])
def test_head_dim_scale_divides_the_logits(cure: str, power: float) -> None:
    """At the same weights the logits of the first block are those of 1/√K times K^(1/2 - power), K = 8."""
    ours = attention_of(built(cure).model, tokens()[:, :-1])["blocks.0"]
    theirs = attention_of(built().model, tokens()[:, :-1])["blocks.0"]
    expected = statistics(theirs).max_abs_H * 8 ** (0.5 - power)
    torch.testing.assert_close(statistics(ours).max_abs_H, expected, rtol=1e-5, atol=0)


def test_zero_init_query_looks_everywhere_alike() -> None:
    training = built("zero_init_query")
    weights = probabilities(attention_of(training.model, tokens()[:, :-1])["blocks.1"])
    alike = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
    torch.testing.assert_close(weights, alike.expand_as(weights), rtol=1e-6, atol=0)
    train(training, 1)
    assert all(not block.attn.k.weight.grad.any() and block.attn.q.weight.grad.any() for block in training.model.blocks)
    train(training, 1)
    assert all(block.attn.k.weight.grad.any() for block in training.model.blocks)


def test_squared_relu_attention_follows_its_formula_pair_by_pair() -> None:
    """relu(q·k / √K)² / √T, T = 6 also for the first query."""
    training = built("squared_relu_attention")
    attn = training.model.blocks[0].attn
    x_BTD = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
    rope = (training.model.rope_cos, training.model.rope_sin)
    q, k, v = (linear(x_BTD).view(2, 6, 2, 8).transpose(1, 2).detach() for linear in (attn.q, attn.k, attn.v))
    q, k = rotate(q, rope), rotate(k, rope)
    mixed_BHTK = torch.zeros(2, 2, 6, 8)
    for b in range(2):
        for h in range(2):
            for t in range(6):
                for s in range(t + 1):
                    logit = (q[b, h, t] @ k[b, h, s]).item() / math.sqrt(8)
                    mixed_BHTK[b, h, t] += max(logit, 0.0) ** 2 / math.sqrt(6) * v[b, h, s]
    expected = attn.proj(mixed_BHTK.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x_BTD, rope), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kappa", [0.5, 30.0, 1e4])
def test_attention_logit_scale_forces_the_size_of_queries_and_keys(kappa: float) -> None:
    """Mean square κ per head, so |q·k| / √K <= κ·K / √K = κ·√K, whatever the weights; nothing new to learn."""
    model = built(f"attention_logit_scale:kappa={kappa}").model
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in built().model.named_parameters()}
    plain = attention_of(built().model, tokens()[:, :-1])["blocks.0"].q_BHTK
    forced = attention_of(model, tokens()[:, :-1])["blocks.0"].q_BHTK
    expected = math.sqrt(kappa) * plain / (plain.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(forced, expected, rtol=1e-5, atol=1e-6 * math.sqrt(kappa))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q.weight.mul_(1e3)
            block.attn.k.weight.mul_(1e3)
    for call in attention_of(model, tokens()[:, :-1]).values():
        mean_square = call.k_BHSK.square().mean(-1)
        torch.testing.assert_close(mean_square, torch.full_like(mean_square, kappa), rtol=1e-5, atol=0)
        largest = statistics(call).max_abs_H.amax().item()
        assert 0.3 * kappa * math.sqrt(8) < largest <= kappa * math.sqrt(8) * (1 + 1e-5)


def test_a_query_of_zero_stays_finite_under_attention_logit_scale() -> None:
    training = built("attention_logit_scale", "zero_init_query")
    train(training, 2)
    assert all(p.isfinite().all() and p.grad.isfinite().all() for p in training.model.parameters())


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def test_deepnorm_against_plain_code() -> None:
    """x = LN(α x + F(x)) twice a block, α = (2·3)^¼, nothing before the sub-layers or the head."""
    model = built("deepnorm").model
    ids = tokens()[:, :-1]
    x_BTD = model.embed(ids)
    for block in model.blocks:
        rope = (model.rope_cos, model.rope_sin)
        x_BTD = layer_norm(6**0.25 * x_BTD + block.attn(x_BTD, rope))
        x_BTD = layer_norm(6**0.25 * x_BTD + block.mlp(x_BTD))
    torch.testing.assert_close(model(ids), x_BTD @ model.head.weight.T, rtol=1e-5, atol=1e-5)
    norms = [name for name, _ in model.named_parameters() if role_of(name) == "norm"]
    assert norms == [f"blocks.{i}.{part}_residual.norm.weight" for i in range(3) for part in ("attn", "mlp")]


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_deepnorm_divides_initial_values(mlp: str) -> None:
    """By (8·3)^¼ for v, proj, fc1, fc2 and a gate; q and k stay (2203.00555 fig. 2; torchscale)."""
    config = replace(BASE, model=replace(BASE.model, mlp=Spec(mlp)))
    base = dict(built(base=config).model.named_parameters())
    for name, parameter in built("deepnorm", base=config).model.named_parameters():
        if role_of(name) in LINEAR_ROLES:
            beta = 1.0 if role_of(name) in ("q", "k") else 24**-0.25
            torch.testing.assert_close(parameter, beta * base[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_depth_scaled_norm_divides_by_the_root_of_the_block_number(norm: str) -> None:
    model = built(f"depth_scaled_norm:norm={norm}").model
    x_BTD = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2)) + 1
    plain = layer_norm(x_BTD) if norm == "layer_norm" else x_BTD / (x_BTD.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    for number, block in enumerate(model.blocks, start=1):
        for slot in (block.pre_attn_norm, block.pre_mlp_norm):
            torch.testing.assert_close(slot(x_BTD), plain / math.sqrt(number), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.final_norm(x_BTD), layer_norm(x_BTD), rtol=1e-5, atol=1e-6)
    one = replace(BASE, model=replace(BASE.model, depth=1))
    ids = tokens()[:, :-1]
    assert torch.equal(built("depth_scaled_norm", base=one).model(ids), built(base=one).model(ids))


def test_zero_init_residual_starts_as_the_identity() -> None:
    training = built("zero_init_residual")
    model, ids = training.model, tokens(1)[:, :-1]
    assert torch.equal(model(ids), model.head(model.final_norm(model.embed(ids))))
    train(training, 1)
    for name, parameter in model.named_parameters():
        if role_of(name) in LINEAR_ROLES:
            assert parameter.grad.any() == (role_of(name) in ("proj", "fc2")), name


def test_embedding_scaling_gives_unit_standard_deviation() -> None:
    """The standard deviation of n normals is off by less than 5 / sqrt(2n)."""
    weight = built("embedding_scaling", vocab=997).model.embed.weight
    assert weight.std().item() == pytest.approx(1, rel=5 / math.sqrt(2 * weight.numel()))
    half = built("embedding_scaling:factor=0.5", vocab=997).model.embed.weight
    torch.testing.assert_close(half, weight / 8, rtol=1e-6, atol=0)  # √16 against 0.5


def test_embedding_scaling_with_its_learning_rate_is_a_factor_on_the_output() -> None:
    """Under Adam and independent decay, with next to no epsilon and without clipping."""
    base = replace(BASE, optim=replace(BASE.optim, eps=1e-20, clip_norm=None))
    scaled, hooked = built("embedding_scaling:factor=4,scale_lr=true", base=base), built(base=base)
    hooked.model.embed.register_forward_hook(lambda *args: 4 * args[2])
    train(scaled, 4)
    train(hooked, 4)
    ids = tokens()[:, :-1]
    torch.testing.assert_close(scaled.model(ids), hooked.model(ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled.model.embed.weight, 4 * hooked.model.embed.weight, rtol=1e-5, atol=1e-6)


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def test_ngpt_against_plain_code() -> None:
    """With learnt scales of any sign: what is stored is 1/√16 of its worth."""
    model = built("ngpt").model
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if role_of(name) == "gain":
                torch.testing.assert_close(parameter, torch.full_like(parameter, 0.25))
                parameter.normal_(0, 0.25, generator=generator)
    ids, (cos, sin) = tokens()[:, :-1], (model.rope_cos, model.rope_sin)
    h_BTD = model.embed(ids)
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        q, k, v = (linear(h_BTD).view(2, 6, 2, 8).transpose(1, 2) for linear in (attn.q, attn.k, attn.v))
        q, k = unit(q) * 4 * attn.q_norm.scale, unit(k) * 4 * attn.k_norm.scale
        scores = math.sqrt(8) * rotate(q, (cos, sin)) @ rotate(k, (cos, sin)).transpose(-2, -1)
        weights = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf).softmax(-1)
        attended = attn.proj((weights @ v).transpose(1, 2).flatten(2))
        rate = (0.05 * 4 * block.attn_residual.alpha).abs()
        h_BTD = unit(unit(h_BTD) + rate * (unit(attended) - unit(h_BTD)))
        transformed = mlp.fc2(F.gelu(mlp.fc1(h_BTD) * math.sqrt(16), approximate="tanh"))
        rate = (0.05 * 4 * block.mlp_residual.alpha).abs()
        h_BTD = unit(h_BTD + rate * (unit(transformed) - h_BTD))
    expected = model.head(4 * model.final_norm.scale * h_BTD)
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)


def test_ngpt_bounds_attention_logits_at_the_start() -> None:
    for call in attention_of(built("ngpt").model, tokens()[:, :-1]).values():
        assert statistics(call).max_abs_H.amax() <= math.sqrt(8) * (1 + 1e-5)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_ngpt_keeps_the_vectors_of_every_matrix_at_unit_norm(mlp: str) -> None:
    """Rows of what reads the residual stream, columns of what writes to it; nothing decays."""
    training = built("ngpt", base=replace(BASE, model=replace(BASE.model, mlp=Spec(mlp))))
    assert all(group["weight_decay"] == 0 for group in training.optimizer.param_groups)
    train(training, 2)
    seen = set()
    for name, parameter in training.model.named_parameters():
        seen.add(role_of(name))
        if role_of(name) != "gain":
            lengths = parameter.norm(dim=0 if role_of(name) in ("proj", "fc2") else 1)
            torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-6, atol=0)
            assert lengths.numel() * 16 == parameter.numel()
    assert seen == {*LINEAR_ROLES, "embedding", "head", "gain"} - ({"gate"} if mlp == "gelu" else set())


def test_one_setting_wanted_at_two_values_is_refused() -> None:
    for pair in (
        ("attention_logit_scale", "qk_norm"),
        ("ngpt", "head_dim_scale"),
        ("deepnorm", "depth_scaled_norm"),
        ("ngpt", "deepnorm"),
    ):
        with pytest.raises(ConfigError, match=f"cannot combine {pair[0]} with {pair[1]}"):
            check_conflicts(arm(*pair))
    check_conflicts(arm("muparam:variant=full", "head_dim_scale", "zero_init_query", "qk_lr", "embedding_scaling"))


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("muparam", "base_width", 0),
        ("head_dim_scale", "power", math.nan),
        ("attention_logit_scale", "kappa", 0.0),
        ("attention_logit_scale", "kappa", math.inf),
        ("embedding_scaling", "factor", -1.0),
        ("qk_lr", "multiplier", 0.0),
        ("qk_lr", "multiplier", math.inf),
    ],
)
def test_options_out_of_range_are_refused(name: str, option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}:{option} must be"):
        plugins.load("interventions", Spec(name, {option: value}))


def test_layers_refuse_options_out_of_range() -> None:
    for family, spec, rule in (
        ("norms", Spec("fixed_rms", {"rms": 0.0}), "fixed_rms:rms must be"),
        ("norms", Spec("fixed_rms", {"eps": -1.0}), "fixed_rms:eps must be"),
        ("norms", Spec("unit", {"stored": 0.0}), "unit:stored must be"),
        ("residuals", Spec("normalised", {"init": math.nan}), "normalised:init must be"),
    ):
        with pytest.raises(ConfigError, match=rule):
            plugins.load(f"proxy.layers.{family}", spec)
