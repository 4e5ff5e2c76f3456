"""Candidates on architectures: training, rejection protocols, audits, and what of it is repeatable."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foreshock.core.errors import ConfigError
from foreshock.core.model_config import ModelConfig
from foreshock.images.data import image_data
from foreshock.layers.formula import EVONORM, Formula, Graph, parse
from foreshock.probes.attack import attack
from foreshock.proxy.data.prepare import TokenData
from foreshock.search.architecture import Architecture, Batch, Trial, build, loss_on, schedule
from foreshock.search.architectures import image_architecture, proxy_architecture
from foreshock.search.evaluator import Evaluator, attack_of
from foreshock.search.evolve import advance
from foreshock.search.references import levels
from foreshock.search.settings import LayerSearch
from foreshock.search.state import Evaluation, State

FEATURES, HIDDEN, CLASSES = 3, 16, 3
SETTINGS = LayerSearch(
    series="T", initial=3, window=10, tournament=0.5, train_steps=30, quality_steps=10, quality_gate=0.2, audit=0.0
)
GOOD, USELESS, EXPLODING = parse("x * sigmoid(x * v1) / std_whg(x)"), parse("0 * x"), parse("x / 0")


def batch(step: int) -> Batch:
    """Points of classes that a planted teacher tells apart by absolute values: no linear network can."""
    x = torch.randn(32, FEATURES, generator=torch.Generator().manual_seed(step))
    return x, x.abs()[:, :CLASSES].argmax(-1)


def tiny(name: str = "mlp", lr: float = 0.1) -> Architecture:
    def build(layer: Callable[[int], nn.Module]) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, HIDDEN), layer(HIDDEN), nn.Linear(HIDDEN, CLASSES))

    return Architecture(
        name=name,
        layout="token",
        chance=math.log(CLASSES),
        lr=lr,
        build=build,
        batch=batch,
        held_out=lambda: [batch(10**6), batch(10**6 + 1)],
    )


def never(model: nn.Module, loss_fn: Callable[[nn.Module], Tensor]) -> bool:
    return False


def evaluator(settings: LayerSearch = SETTINGS, count: int = 2, attack: object = never) -> Evaluator:
    return Evaluator([tiny(f"mlp{i}") for i in range(count)], settings, 0, attack)


def facts(evaluation: Evaluation) -> tuple[object, ...]:
    """All but the time it took."""
    return evaluation.rejected_by, dict(evaluation.scores), dict(evaluation.steps)


# Training


def test_training_is_adam_with_warm_up_and_decay() -> None:
    """Against a loop written here, with the unfused optimizer and the textbook formula of the schedule."""
    trial = Trial(tiny(), lambda c: Formula(GOOD, c, layout="token"), steps=20, seed=3)
    reference = build(tiny(), lambda c: Formula(GOOD, c, layout="token"), 3)
    optimizer = torch.optim.Adam(reference.parameters(), lr=0.0)
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 0.1 * min(1, (step + 1) / 2) * (20 - step) / 20
        optimizer.zero_grad()
        inputs, targets = batch(step)
        F.cross_entropy(reference(inputs), targets).backward()
        optimizer.step()
    trial.run_to(20)
    for one, other in zip(trial.model.parameters(), reference.parameters(), strict=True):
        # Twenty float32 updates, in which each may round differently by 1e-7 of its size of order 1.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    losses = [F.cross_entropy(reference(x), y).item() for x, y in (batch(10**6), batch(10**6 + 1))]
    assert trial.score() == pytest.approx(sum(losses) / 2 / math.log(3), rel=1e-4)


def test_the_schedule_of_one_step_is_the_peak() -> None:
    assert schedule(0, 1) == 1.0
    assert [schedule(step, 20) for step in (0, 1, 10, 19)] == pytest.approx([0.5, 0.95, 0.5, 0.05])


def test_training_in_pieces_is_training_at_once() -> None:
    one, other = (Trial(tiny(), lambda c: Formula(GOOD, c, layout="token"), steps=20, seed=0) for _ in range(2))
    one.run_to(20)
    for steps in (1, 7, 7, 20):
        other.run_to(steps)
        other.score()
    assert one.losses == other.losses


def test_networks_of_all_layers_start_with_the_same_weights() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, other = (build(tiny(), lambda c, g=g: Formula(g, c, layout="token"), 0) for g in (GOOD, USELESS))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.get_parameter("2.weight"), other.get_parameter("2.weight"))
    assert not torch.equal(build(tiny(), lambda _: nn.Identity(), 1).get_parameter("2.weight"), one[2].weight)


def test_a_run_that_is_not_finite_ends_and_scores_infinity() -> None:
    trial = Trial(tiny(), lambda c: Formula(EXPLODING, c, layout="token"), steps=20, seed=0)
    trial.run_to(20)
    assert len(trial.losses) == 1
    assert not trial.starts_finite
    assert trial.score() == trial.recent_loss() == math.inf


# Protocols


def test_a_good_layer_passes_and_is_scored_on_every_architecture() -> None:
    found = evaluator()(GOOD, False)
    assert found.accepted
    assert found.scores.keys() == {"mlp0", "mlp1"}
    assert all(score < 0.8 for score in found.scores.values())
    assert list(found.seconds) == ["numerics", "quality", "attack", "training"]
    assert dict(found.steps) == {"numerics": 2, "quality": 18, "attack": 0, "training": 40}


@pytest.mark.parametrize(("graph", "protocol"), [(EXPLODING, "numerics"), (USELESS, "quality")])
def test_bad_layers_are_rejected_by_the_protocol_for_them(graph: Graph, protocol: str) -> None:
    found = evaluator()(graph, False)
    assert found.rejected_by == protocol
    assert list(found.seconds)[-1] == protocol
    assert found.scores == {}
    assert found.score == math.inf


def test_gradients_that_are_not_finite_are_rejected_though_the_loss_is() -> None:
    """The slope of √ of 0 is infinite; the ε of roots is too small to be there after 1e-30."""

    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 0).abs().sqrt()

    trial = Trial(tiny(), lambda _: Root(), steps=3, seed=0)
    trial.run_to(1)
    assert trial.finite
    assert not trial.starts_finite


def test_the_attack_sees_the_first_architecture_as_it_starts() -> None:
    seen: list[tuple[nn.Module, float]] = []

    def stub(model: nn.Module, loss_fn: Callable[[nn.Module], Tensor]) -> bool:
        seen.append((model, loss_fn(model).item()))
        return True

    found = evaluator(attack=stub)(GOOD, False)
    assert found.rejected_by == "attack"
    fresh = build(tiny("mlp0"), lambda c: Formula(GOOD, c, layout="token"), 0)
    [(model, loss)] = seen
    assert loss == loss_on(fresh, batch(0)).item()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_protocols_are_asked_in_the_given_order_or_not_at_all() -> None:
    asked = evaluator(replace(SETTINGS, protocols=("attack", "numerics")))(GOOD, False)
    assert list(asked.seconds) == ["attack", "numerics", "training"]
    alone = evaluator(replace(SETTINGS, protocols=()))(USELESS, False)
    assert alone.accepted
    assert list(alone.seconds) == ["training"]
    assert alone.scores["mlp0"] > 0.9


def test_protocols_change_no_bit_of_the_scores() -> None:
    orders = [("numerics", "quality", "attack"), ("attack", "quality"), ()]
    real = [Evaluator([tiny()], replace(SETTINGS, protocols=order, attack_steps=2), 0) for order in orders]
    scores = [dict(found(GOOD, False).scores) for found in real]
    assert scores[0] == scores[1] == scores[2]


def test_what_is_audited_is_trained_to_the_end_and_stays_rejected() -> None:
    found = evaluator()(USELESS, True)
    assert found.rejected_by == "quality"
    assert found.scores == evaluator(replace(SETTINGS, protocols=()))(USELESS, False).scores
    assert evaluator()(EXPLODING, True).scores == {"mlp0": math.inf, "mlp1": math.inf}


def test_a_protocol_stops_at_the_first_architecture_that_fails() -> None:
    assert evaluator()(USELESS, False).steps == {"numerics": 2, "quality": 9}


def test_the_stability_attack_rejects_a_cliff_and_not_evonorm() -> None:
    rejects = attack_of(replace(SETTINGS, attack_steps=20, attack_limit=1e6))
    for graph, verdict in ((parse("x * exp(x) * exp(x) * exp(x)"), True), (GOOD, False), (EXPLODING, True)):
        model = build(tiny(), lambda c, g=graph: Formula(g, c, layout="token"), 0)
        assert rejects(model, lambda model: loss_on(model, batch(0))) is verdict


def test_evaluations_repeat_to_the_bit() -> None:
    one, other = evaluator(), evaluator()
    other(USELESS, False)
    assert facts(one(GOOD, False)) == facts(other(GOOD, False)) == facts(other(GOOD, True))


def test_a_search_on_architectures_resumes_to_the_bit() -> None:
    settings = replace(SETTINGS, audit=0.5, quality_gate=0.01)

    def searched(state: State, count: int) -> State:
        evaluate = evaluator(settings, count=1)
        for _ in range(count):
            state = advance(state, settings, evaluate)
        return state

    whole = searched(State(0), 12)
    resumed = searched(State.from_json(searched(State(0), 5).to_json()), 7)
    assert [(c.graph, facts(c.evaluation)) for c in whole.candidates] == [
        (c.graph, facts(c.evaluation)) for c in resumed.candidates
    ]
    assert any(c.evaluation.accepted for c in whole.candidates)
    assert any(not c.evaluation.accepted for c in whole.candidates)


def test_architectures_that_cannot_be_searched_are_refused() -> None:
    for architectures, series, said in (
        ([], "T", "at least one"),
        ([tiny(), tiny()], "T", "names of their own"),
        ([tiny()], "S", "mixes the tokens of mlp; use series T"),
    ):
        with pytest.raises(ConfigError, match=said):
            Evaluator(architectures, replace(SETTINGS, series=series), 0)


# Known layers, to set the protocols by


def test_levels_are_what_the_protocols_would_see() -> None:
    layers = {"good": lambda a: lambda c: Formula(GOOD, c, layout=a.layout), "none": lambda a: lambda _: nn.Identity()}
    settings = replace(SETTINGS, attack_steps=3)
    found = {level.layer: level for level in levels([tiny()], layers, settings, 0)}
    trial = Trial(tiny(), lambda c: Formula(GOOD, c, layout="token"), steps=30, seed=0)
    trial.run_to(10)
    normed = Trial(tiny(), lambda c: nn.Sequential(nn.LayerNorm(c), nn.GELU()), steps=30, seed=0)
    normed.run_to(10)
    start, ends = normed.losses[0], [sum(each.losses[5:10]) / 5 for each in (trial, normed)]
    quality = (start - ends[0]) / (start - ends[1])
    trial.run_to(30)
    model = build(tiny(), lambda c: Formula(GOOD, c, layout="token"), 0)
    peak = attack(model, lambda model: loss_on(model, batch(0)), steps=3).peak_gradient_norm
    good = found["good"]
    assert (good.architecture, good.quality, good.score, good.peak_gradient_norm) == (
        "mlp", pytest.approx(quality), trial.score(), peak
    )  # fmt: skip
    assert found["none"].score > good.score
    # Limits between: what the levels say is what the protocols decide.
    for gate, limit, verdict in (
        (good.quality - 1e-6, peak * 1.01, ""),
        (good.quality + 1e-6, 1e9, "quality"),
        (0.01, peak * 0.99, "attack"),
    ):
        settings = replace(settings, quality_gate=gate, attack_limit=limit)
        assert Evaluator([tiny()], settings, 0)(GOOD, False).rejected_by == verdict


# The architectures that come with it


def check(architectures: Sequence[Architecture], graph: Graph, settings: LayerSearch) -> None:
    found = Evaluator(architectures, settings, 0, never)(graph, False)
    assert found.accepted
    assert found.scores.keys() == {a.name for a in architectures}
    assert all(score < 1 for score in found.scores.values())


def test_image_networks_take_formulas() -> None:
    data = image_data("shapes", size=8)
    architecture = image_architecture("resnet", data, size=(4, 2), lr=0.01, batch_size=16, seed=0)
    settings = replace(SETTINGS, series="B", protocols=("numerics",), train_steps=20)
    check([architecture], parse(EVONORM["evonorm_b0"]), settings)
    assert architecture.name == "resnet_shapes"
    assert all(torch.equal(a, b) for a, b in zip(architecture.batch(3), architecture.batch(3), strict=True))
    layers = [m for m in build(architecture, lambda c: Formula(GOOD, c), 0).modules() if isinstance(m, Formula)]
    assert len(layers) >= 3


def test_proxies_take_formulas_after_fc1(tmp_path: Path) -> None:
    ids = (torch.randint(8, (4000,), generator=torch.Generator().manual_seed(0)).cumsum(0) % 8).numpy()
    tokens = TokenData(
        train_tokens=ids[:3000], held_out_tokens=ids[3000:], vocab_size=8, hash="", manifest={}, folder=tmp_path
    )
    model = ModelConfig(width=16, depth=2, heads=2)
    architecture = proxy_architecture(model, tokens, seq_len=16, batch_size=8, lr=0.01, seed=0)
    built = build(architecture, lambda c: Formula(GOOD, c, layout="token"), 0)
    layers = {name: m.channels for name, m in built.named_modules() if isinstance(m, Formula)}
    assert layers == {"blocks.0.mlp.activate": 64, "blocks.1.mlp.activate": 64}
    shares = [(ids[:3000] == i).mean() for i in range(8)]
    assert architecture.chance == pytest.approx(-sum(p * math.log(p) for p in shares))
    inputs, targets = architecture.batch(0)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    # Guessing by equal logits costs ln 8; the layer must be reached by gradients.
    trial = Trial(architecture, lambda c: Formula(GOOD, c, layout="token"), steps=3, seed=0)
    before = trial.model.get_parameter("blocks.0.mlp.activate.v1").detach().clone()
    trial.run_to(3)
    assert not torch.equal(before, trial.model.get_parameter("blocks.0.mlp.activate.v1"))
    assert trial.losses[0] == pytest.approx(math.log(8), rel=0.5)
