"""The search as a state machine: what is drawn, who is selected, how it resumes, and that it beats random search."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import cosine_similarity

from foreshock.core.errors import ConfigError, UserError
from foreshock.layers.formula import EVONORM, Graph, Node, fingerprint, parse
from foreshock.layers.formula.graph import MAX_OPERATIONS, depends_on_x
from foreshock.layers.formula.primitives import primitives_of
from foreshock.layers.formula.signature import signature
from foreshock.search import evolve
from foreshock.search.evolve import advance, propose
from foreshock.search.report import clopper_pearson, log_row, protocol_reports, ranking
from foreshock.search.selection import pareto_front, population, select
from foreshock.search.settings import LayerSearch
from foreshock.search.state import Candidate, Evaluation, State
from foreshock.search.variation import below, mutate, random_graph

GOLDEN = [
    "tanh(-rms_wh(tanh(mean_whg(x))))", "x * v1", "rms_whg(exp(x))",
    "x * signed_sqrt(x)", "x * std_whc(0)", "x * exp(rms_whc(-0))",
]  # fmt: skip
SMALL = LayerSearch(series="S", initial=10, window=20, tournament=0.2, audit=0.3)


@cache
def planted() -> object:
    return signature(parse(EVONORM["evonorm_s0"]))


def nearness(graph: Graph, audit: bool) -> Evaluation:
    """One less the cosine between what a graph computes and what S0 does; far ones are rejected.

    The scale does not matter: γ would take it away.
    """
    values = signature(graph)
    distance = 1 - float(cosine_similarity(values, planted(), dim=0)) if values.isfinite().all() else math.inf
    scores = {"one": distance, "two": math.sqrt(abs(distance))}
    accepted = distance < 0.6
    return Evaluation(
        rejected_by="" if accepted else "quality", scores=scores if accepted or audit else {}, seconds={}, steps={}
    )


def searched(seed: int, settings: LayerSearch, count: int, start: State | None = None) -> State:
    state = start or State(seed)
    for _ in range(count):
        state = advance(state, settings, nearness)
    return state


def candidate(index: int, *scores: float, rejected_by: str = "") -> Candidate:
    evaluation = Evaluation(
        rejected_by=rejected_by, scores={f"arch{i}": score for i, score in enumerate(scores)}, seconds={}, steps={}
    )
    known = {"graph": Graph((Node("tanh", (0,)),)), "formula": "tanh(x)", "fingerprint": str(index)}
    return Candidate(index=index, parent=None, redrawn=0, evaluation=evaluation, **known)


# Graphs


@given(st.integers(0, 10**6), st.sampled_from("BST"))
def test_random_graphs_are_full_and_of_their_series(seed: int, series: str) -> None:
    graph = random_graph(primitives_of(series), Random(seed))
    assert len(graph.nodes) == MAX_OPERATIONS
    assert depends_on_x(graph.nodes)
    assert {node.op for node in graph.nodes} <= set(primitives_of(series))


@given(st.integers(0, 10**6))
def test_a_mutation_draws_one_node_anew(seed: int) -> None:
    graph = random_graph(primitives_of("S"), Random(seed))
    child = mutate(graph, primitives_of("S"), Random(seed + 1))
    changed = [a != b for a, b in zip(graph.nodes, child.nodes, strict=True)]
    assert sum(changed) == 1
    assert depends_on_x(child.nodes)


def test_mutations_reach_every_node_primitive_and_input() -> None:
    graph = parse("x * sigmoid(x * v1) / std_whg(x)")
    children = [mutate(graph, primitives_of("B"), Random(seed)) for seed in range(3000)]
    changed = [
        (place, node) for child in children for place, node in enumerate(child.nodes) if node != graph.nodes[place]
    ]
    assert {place for place, _ in changed} == set(range(len(graph.nodes)))
    assert {node.op for _, node in changed} == set(primitives_of("B"))
    assert {i for place, node in changed if place == 4 for i in node.inputs} == set(range(8))


def test_draws_are_uniform() -> None:
    draw = Random(0)
    counts = [0] * 7
    for _ in range(7000):
        counts[below(7, draw)] += 1
    # Six standard deviations of a binomial count: √(7000 · 1/7 · 6/7) ≈ 29.
    assert all(abs(count - 1000) < 6 * 29.3 for count in counts)


# Selection


def test_the_window_holds_the_youngest_accepted() -> None:
    state = State(0, tuple(candidate(i, 0.5, rejected_by="quality" if i % 3 else "") for i in range(30)))
    alive = population(state, replace(SMALL, window=4))
    assert [c.index for c in alive] == [18, 21, 24, 27]


def test_a_tournament_of_all_is_won_by_the_best_mean_and_the_older_of_equals() -> None:
    living = [candidate(0, 0.9, 0.9), candidate(1, 0.1, 0.5), candidate(2, 0.2, 0.4), candidate(3, math.inf, 0.0)]
    settings = replace(SMALL, tournament=1.0)
    assert {select(living, settings, Random(seed)).index for seed in range(20)} == {1}


def test_a_pareto_tournament_is_won_by_any_of_the_front() -> None:
    living = [candidate(0, 0.9, 0.9), candidate(1, 0.1, 0.5), candidate(2, 0.2, 0.4), candidate(3, math.inf, 0.0)]
    settings = replace(SMALL, tournament=1.0, strategy="pareto")
    assert {select(living, settings, Random(seed)).index for seed in range(40)} == {1, 2, 3}


def test_a_tournament_draws_its_share_of_the_living() -> None:
    living = [candidate(i, float(i)) for i in range(100)]
    settings = replace(SMALL, tournament=0.05)
    winners = [select(living, settings, Random(seed)).index for seed in range(2000)]
    # The smallest of 5 out of 100 without replacement: mean (100 - 5) / 6, deviation 14, of 2000 0.32; six of them.
    assert sum(winners) / 2000 == pytest.approx(95 / 6, abs=1.9)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_the_pareto_front_is_what_nothing_dominates(pairs: list[tuple[int, int]]) -> None:
    found = {c.index for c in pareto_front([candidate(i, float(a), float(b)) for i, (a, b) in enumerate(pairs)])}
    naive = {i for i, (a, b) in enumerate(pairs) if not [1 for c, d in pairs if c <= a and d <= b and (c < a or d < b)]}
    assert found == naive


# The state machine


def test_random_candidates_come_first_then_mutations_of_the_living() -> None:
    state = searched(1, SMALL, 60)
    assert all(c.parent is None for c in state.candidates[:10])
    children = [c for c in state.candidates if c.parent is not None]
    assert len(children) == 50
    for child in children:
        before = State(1, state.candidates[: child.index])
        assert child.parent in {c.index for c in population(before, SMALL)}


def test_no_candidate_computes_what_an_earlier_one_did() -> None:
    state = searched(2, SMALL, 150)
    assert len({fingerprint(c.graph) for c in state.candidates}) == 150
    assert [c.fingerprint for c in state.candidates] == [fingerprint(c.graph) for c in state.candidates]
    assert sum(c.redrawn for c in state.candidates) > 0


def test_a_search_that_resumes_makes_the_same_candidates() -> None:
    """Stopped among the random ones and among the mutations, through the text of a file."""
    for settings in (SMALL, replace(SMALL, strategy="pareto"), replace(SMALL, strategy="random", series="B")):
        whole = searched(3, settings, 20)
        for stop in (1, 13):
            text = json.dumps(searched(3, settings, stop).to_json(), allow_nan=False)
            assert searched(3, settings, 20 - stop, State.from_json(json.loads(text))) == whole


def test_a_seed_means_the_same_search_everywhere() -> None:
    """Written down once: a change of these formulas makes every stored search another one."""
    state = searched(0, SMALL, 13)
    assert [c.formula for c in state.candidates[:3] + state.candidates[10:]] == GOLDEN


def test_each_line_of_a_log_is_a_candidate() -> None:
    state = searched(3, SMALL, 20)
    lines = [json.dumps(c.to_json(), allow_nan=False) for c in state.candidates]
    assert State(3, tuple(Candidate.from_json(json.loads(line)) for line in lines)) == state


def test_what_is_evaluated_is_the_formula() -> None:
    seen: list[Graph] = []
    state = State(3)
    for _ in range(30):
        state = advance(state, SMALL, lambda graph, audit: (seen.append(graph), nearness(graph, audit))[1])
    assert [parse(c.formula) for c in state.candidates] == seen
    assert [fingerprint(graph) for graph in seen] == [c.fingerprint for c in state.candidates]


def test_seeds_draw_different_candidates() -> None:
    one, other = (searched(seed, SMALL, 5) for seed in (0, 1))
    assert not {c.graph for c in one.candidates} & {c.graph for c in other.candidates}


def test_what_is_audited_changes_no_later_candidate() -> None:
    audits: list[bool] = []

    def recorded(graph: Graph, audit: bool) -> Evaluation:
        audits.append(audit)
        return nearness(graph, audit)

    state, none = State(4), searched(4, replace(SMALL, audit=0.0), 60)
    for _ in range(60):
        state = advance(state, SMALL, recorded)
    assert [c.graph for c in state.candidates] == [c.graph for c in none.candidates]
    assert 0 < sum(audits) < 60


def test_a_random_search_has_no_parents_and_shares_the_initial_candidates() -> None:
    random = searched(5, replace(SMALL, strategy="random"), 30)
    assert all(c.parent is None for c in random.candidates)
    assert random.candidates[:10] == searched(5, SMALL, 30).candidates[:10]


def test_without_survivors_the_search_stays_random() -> None:
    state = State(0)
    for _ in range(20):
        state = advance(state, SMALL, lambda *_: Evaluation(rejected_by="numerics", scores={}, seconds={}, steps={}))
    assert [c.parent for c in state.candidates] == [None] * 20


def test_a_search_without_new_formulas_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evolve, "primitives_of", lambda _: ("neg",))
    state = searched(0, SMALL, 1)
    with pytest.raises(UserError, match="no new formula in 1000 draws"):
        searched(0, SMALL, 3, state)


@pytest.mark.slow
def test_tournaments_find_a_planted_layer_in_fewer_evaluations_than_random_search() -> None:
    """Paired over 16 seeds; both share their first 30 candidates. A level counts as reached after the budget if not."""
    budget, level = 250, 0.12
    settings = LayerSearch(series="S", initial=30, window=50, tournament=0.2, audit=0)

    def evaluations(seed: int, strategy: str) -> int:
        state = searched(seed, replace(settings, strategy=strategy), budget)
        return next((c.index for c in state.accepted if c.evaluation.scores["one"] <= level), budget)

    pairs = [(evaluations(seed, "average"), evaluations(seed, "random")) for seed in range(16)]
    faster, slower = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
    assert binomtest(faster, faster + slower, alternative="greater").pvalue < 0.01, pairs


# What is reported


def test_the_log_row_counts_and_scores() -> None:
    state = State(0, (candidate(0, 0.5, 0.7), candidate(1, 0.1, rejected_by="attack"), candidate(2, 0.2, 0.4)))
    assert log_row(state) == {
        "search/evaluated": 3.0,
        "search/best_score": pytest.approx(0.3),
        "search/rejected_attack": 1.0,
        "search/score/arch0": 0.2,
        "search/score/arch1": 0.4,
    }
    assert log_row(State(0, state.candidates[:2])).keys() == {
        "search/evaluated", "search/best_score", "search/rejected_attack"
    }  # fmt: skip
    assert log_row(State(0)) == {"search/evaluated": 0.0, "search/best_score": math.inf}


def test_the_ranking_has_the_accepted_alone_the_best_first() -> None:
    state = State(0, tuple(candidate(i, s, rejected_by=r) for i, (s, r) in enumerate(
        [(0.5, ""), (0.1, "attack"), (0.2, ""), (0.5, ""), (math.inf, "")]
    )))  # fmt: skip
    assert [c.index for c in ranking(state)] == [2, 0, 3, 4]
    assert [c.index for c in ranking(state, 1)] == [2]


def test_what_protocols_were_worth() -> None:
    """Two architectures of 10 steps. A step of training takes 0.1 s; the attack takes 3 s a candidate."""

    def evaluated(rejected_by: str, stages: dict[str, tuple[float, int]], *scores: float) -> Evaluation:
        return Evaluation(
            rejected_by=rejected_by,
            scores={f"arch{i}": score for i, score in enumerate(scores)},
            seconds={name: seconds for name, (seconds, _) in stages.items()},
            steps={name: steps for name, (_, steps) in stages.items()},
        )

    start = {"numerics": (0.2, 2)}
    learnt = start | {"quality": (0.6, 6)}
    withstood = learnt | {"attack": (3.0, 0)}
    found = [
        evaluated("", withstood | {"training": (1.2, 12)}, 0.2, 0.4),
        evaluated("", withstood | {"training": (1.2, 12)}, 0.6, 0.6),
        evaluated("numerics", {"numerics": (0.1, 1)}),
        evaluated("quality", start | {"quality": (0.2, 2)}),
        evaluated("quality", learnt | {"training": (1.2, 12)}, 0.9, 0.9),
        evaluated("quality", learnt | {"training": (1.2, 12)}, 0.1, 0.1),
        evaluated("attack", withstood | {"training": (0.4, 4)}, 0.2, math.inf),
    ]
    state = State(0, tuple(replace(candidate(i), evaluation=e) for i, e in enumerate(found)))
    numerics, quality, attack = protocol_reports(state, LayerSearch(train_steps=10, quality_steps=3))
    assert (numerics.asked, numerics.rejected, numerics.audited, numerics.steps_saved) == (7, 1, 0, 19)
    assert numerics.seconds_saved == pytest.approx(1.9)
    assert math.isnan(numerics.precision)
    assert numerics.interval == (0.0, 1.0)
    assert (quality.asked, quality.rejected, quality.audited, quality.bad) == (6, 3, 2, 1)
    assert quality.precision == 0.5
    assert quality.seconds == pytest.approx(3.2)
    assert quality.steps_saved == 16 + 12 + 12
    assert quality.seconds_saved == pytest.approx(4.0)
    assert (attack.asked, attack.rejected, attack.audited, attack.bad, attack.precision) == (3, 1, 1, 1, 1.0)
    assert attack.seconds_saved == pytest.approx(1.2 - 9.0)


def test_the_interval_is_that_of_scipy() -> None:
    for hits, trials in ((0, 5), (5, 5), (3, 17), (0, 0)):
        expected = binomtest(hits, trials).proportion_ci(0.95) if trials else (0.0, 1.0)
        assert clopper_pearson(hits, trials) == pytest.approx(tuple(expected), abs=1e-9)


# Settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strategy": "avrage"}, "did you mean 'average'"),
        ({"series": "C"}, "unknown value for series"),
        ({"protocols": ("atack",)}, "did you mean 'attack'"),
        ({"protocols": ("attack", "attack")}, "each once"),
        ({"initial": 0}, "initial"),
        ({"window": 1}, "window"),
        ({"tournament": 0.0}, "tournament"),
        ({"tournament": math.nan}, "tournament"),
        ({"train_steps": 0}, "train_steps"),
        ({"quality_steps": 101}, "quality_steps must be from 1 to train_steps, 100"),
        ({"quality_gate": math.nan}, "quality_gate"),
        ({"attack_steps": 0}, "attack_steps"),
        ({"attack_limit": 0.0}, "attack_limit"),
        ({"audit": 1.5}, "audit"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LayerSearch(**settings)


def test_the_settings_of_a_protocol_that_is_not_asked_do_not_matter() -> None:
    assert LayerSearch(protocols=(), train_steps=5).protocols == ()


def test_a_proposal_depends_on_the_state_alone() -> None:
    state = searched(6, SMALL, 30)
    assert propose(state, SMALL) == propose(State.from_json(state.to_json()), SMALL)


def test_settings_formulas_and_reports_need_no_torch() -> None:
    """Planning a search and reading what it found work where torch is not wanted."""
    modules = "foreshock.search.settings, foreshock.search.report, foreshock.layers.formula.text"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
