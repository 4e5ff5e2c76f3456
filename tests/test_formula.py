"""Formulas: graphs, their text, what they compute, and their fingerprints, against naive recomputation.

Tolerances: float64 sums of a few hundred terms of order 1 agree to 1e-13; 1e-10 leaves room for division by small
standard deviations.
"""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foreshock import layers
from foreshock.core.errors import ConfigError
from foreshock.layers.formula import EVONORM, Formula, Graph, Node, canonical, fingerprint, module_of, parse, to_text
from foreshock.layers.formula.graph import FIRST, MAX_OPERATIONS, depends_on_x
from foreshock.layers.formula.primitives import AGGREGATIONS, ARITY, COMMUTATIVE, SERIES, primitives_of
from foreshock.layers.formula.signature import simplified

EPS = 1e-5


def images(seed: int = 0, shape: tuple[int, ...] = (3, 8, 4, 5)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


def layer_of(text: str, channels: int = 8, **options: object) -> Formula:
    """In float64, with v0, v1, γ and β away from where they start."""
    layer = module_of(text, channels, **options).double()
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            parameter.add_(0.5 * noise)
    return layer


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    nodes: list[Node] = []
    for index in range(FIRST, FIRST + draw(st.integers(1, MAX_OPERATIONS))):
        op = draw(st.sampled_from(sorted(ARITY)))
        nodes.append(Node(op, tuple(draw(st.integers(0, index - 1)) for _ in range(ARITY[op]))))
    if not depends_on_x(nodes):
        nodes[-1] = Node("neg", (0,))
    return Graph(tuple(nodes))


# What is computed


def naive(name: str, x: Tensor, v1: Tensor, groups: int) -> Tensor:
    """The table of the paper, one sample, channel and group at a time."""
    out = torch.empty_like(x)
    B, C = x.shape[:2]
    for b in range(B):
        for c in range(C):
            image, size = x[b, c], C // groups
            batch_std = ((x[:, c] - x[:, c].mean()).square().mean() + EPS).sqrt()
            image_std = ((image - image.mean()).square().mean() + EPS).sqrt()
            image_rms = (image.square().mean() + EPS).sqrt()
            group = x[b, c // size * size : c // size * size + size]
            group_std = ((group - group.mean()).square().mean() + EPS).sqrt()
            group_rms = (group.square().mean() + EPS).sqrt()
            out[b, c] = {
                "evonorm_b0": image / torch.maximum(batch_std, v1[c] * image + image_std),
                "evonorm_b1": image / torch.maximum(batch_std, (image + 1) * image_rms),
                "evonorm_b2": image / torch.maximum(batch_std, image_rms - image),
                "evonorm_s0": image / (1 + (-v1[c] * image).exp()) / group_std,
                "evonorm_s1": image / (1 + (-image).exp()) / group_std,
                "evonorm_s2": image / (1 + (-image).exp()) / group_rms,
            }[name]
    return out


@pytest.mark.parametrize("name", EVONORM)
def test_the_published_layers_are_those_of_the_table(name: str) -> None:
    layer = layer_of(EVONORM[name], groups=4)
    x = images()
    v1 = layer.v1 if layer.v1 is not None else torch.ones(8)
    expected = naive(name, x, v1, 4) * layer.weight[:, None, None] + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", EVONORM)
def test_the_published_layers_equal_those_written_by_hand(name: str) -> None:
    """In training and in evaluation, running statistics included."""
    kind = getattr(layers, f"EvoNorm2d{name[-2:].upper()}")
    by_hand = kind(8, **({"groups": 4} if name[-2] == "s" else {}), eps=EPS).double()
    layer = module_of(EVONORM[name], 8, groups=4).double()
    for seed in range(3):
        x, y = images(seed).requires_grad_(), images(seed).requires_grad_()
        torch.testing.assert_close(layer(x), by_hand(y), rtol=1e-10, atol=1e-10)
    for out in (layer(x), by_hand(y)):
        out.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.eval()(images(9)), by_hand.eval()(images(9)), rtol=1e-10, atol=1e-10)


ELEMENTS = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "max": max,
    "neg": lambda a: -a,
    "sigmoid": lambda a: 1 / (1 + math.exp(-a)),
    "tanh": math.tanh,
    "exp": math.exp,
    "signed_log": lambda a: math.copysign(1, a) * math.log(abs(a) + EPS),
    "abs": abs,
    "square": lambda a: a * a,
    "signed_sqrt": lambda a: a / math.sqrt(abs(a) + EPS),
}


@pytest.mark.parametrize("op", ELEMENTS)
def test_element_wise_primitives(op: str) -> None:
    graph = Graph((Node(op, (0, 3)[: ARITY[op]]),))
    layer = Formula(graph, 1).double()
    x = images(shape=(1, 1, 3, 4))
    expected = [ELEMENTS[op](*(value, 1.0)[: ARITY[op]]) for value in x.flatten().tolist()]
    assert layer(x).flatten().tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("op", AGGREGATIONS)
def test_aggregations_are_means_over_the_named_axes(op: str) -> None:
    x, (kind, over) = images(), AGGREGATIONS[op]
    B, C, H, W = x.shape
    out = module_of(f"{op}(x)", C, groups=2).double()(x)
    assert out.shape == x.shape
    for b in range(B):
        for c in range(C):
            batch = range(B) if "b" in over else [b]
            channels = {"whc": range(C), "whg": range(c // 4 * 4, c // 4 * 4 + 4)}.get(over, [c])
            values = torch.stack([x[i, j] for i in batch for j in channels])
            mean, square = values.mean(), values.square().mean()
            expected = {"mean": mean, "rms": (square + EPS).sqrt(), "std": (square - mean**2 + EPS).sqrt()}[kind]
            torch.testing.assert_close(out[b, c], expected.expand(H, W), rtol=1e-10, atol=1e-10)


def test_statistics_of_what_does_not_vary_along_an_axis_are_those_of_the_expanded_values() -> None:
    x = images()
    for inner in ("v1", "rms_whc(x)", "std_bwh(x)", "mean_wh(x)", "mean_whg(x)"):
        for op in AGGREGATIONS:
            layer = layer_of(f"{op}({inner}) + 0 * x", groups=2)
            full = layer_of(f"{op}({inner} + 0 * x) + 0 * x", groups=2)
            torch.testing.assert_close(layer(x), full(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", EVONORM)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    layer = layer_of(EVONORM[name], 4, groups=2)
    assert torch.autograd.gradcheck(layer, (images(shape=(2, 4, 2, 3)).requires_grad_(),))


def test_roots_and_logarithms_have_finite_slopes_at_zero() -> None:
    for text in ("signed_sqrt(x)", "signed_log(x)", "std_wh(x)", "rms_whc(x)"):
        x = torch.zeros(2, 4, 3, 3, requires_grad=True)
        module_of(text, 4)(x).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all(), text


def test_running_statistics_follow_the_batches() -> None:
    layer = module_of("(mean_bwh(x) + rms_bwh(x)) / std_bwh(x) + 0 * x", 8).double()
    mean, square, var = torch.zeros(8).double(), torch.ones(8).double(), torch.ones(8).double()
    for seed in range(4):
        x = images(seed)
        layer(x)
        mean = 0.9 * mean + 0.1 * x.mean((0, 2, 3))
        square = 0.9 * square + 0.1 * x.square().mean((0, 2, 3))
        var = 0.9 * var + 0.1 * x.var((0, 2, 3), correction=1)
    expected = (mean + (square + EPS).sqrt()) / (var + EPS).sqrt()
    out = layer.eval()(images(9))
    torch.testing.assert_close(out, expected[:, None, None].expand_as(out), rtol=1e-10, atol=1e-10)
    assert torch.equal(out[:1], layer(images(9)[:1])), "in evaluation a sample is alone"


def test_low_precision_statistics_are_taken_in_float32() -> None:
    """The mean square of values at 300 overflows float16 (above 65504)."""
    x = torch.full((2, 4, 3, 3), 300.0, dtype=torch.float16)
    out = module_of("x / rms_wh(x)", 4)(x)
    assert out.dtype == torch.float16
    assert out.tolist() == torch.ones_like(out).tolist()


def test_tokens_never_look_at_another_token() -> None:
    series = [f"x * sigmoid(v1 * x) / {kind}_{over}(x)" for kind in ("rms", "std") for over in SERIES["T"]]
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 3] += 1.0
    for text in series:
        layer = module_of(text, 8, layout="token", groups=2)
        before, after = layer(x), layer(changed)
        assert torch.equal(before[:, [0, 1, 2, 4, 5]], after[:, [0, 1, 2, 4, 5]])
        assert not torch.equal(before[:, 3], after[:, 3])


def test_a_token_is_an_image_of_one_pixel() -> None:
    x = images(shape=(5, 8, 1, 1))
    for text in ("x * sigmoid(v1 * x) / std_whg(x)", "tanh(x) - mean_whc(x * v0)", "x / rms_whc(square(x))"):
        token = layer_of(text, layout="token", groups=4)
        image = layer_of(text, groups=4)
        torch.testing.assert_close(token(x[:, :, 0, 0]), image(x)[:, :, 0, 0], rtol=1e-12, atol=1e-12)


def test_groups_are_of_four_channels_or_more_in_images_and_one_in_tokens() -> None:
    text = EVONORM["evonorm_s0"]
    assert [module_of(text, channels).groups for channels in (8, 64, 48, 37)] == [2, 16, 12, 1]
    assert module_of(text, 64, layout="token").groups == 1


def test_only_what_is_used_becomes_a_parameter() -> None:
    names = [name for name, _ in module_of("x * sigmoid(v1 * x)", 4).named_parameters()]
    assert names == ["weight", "bias", "v1"]


# Text


def test_known_texts() -> None:
    assert {name: to_text(parse(text)) for name, text in EVONORM.items()} == EVONORM
    assert to_text(parse("sigmoid(x*v1) * x")) == "x * sigmoid(x * v1)"
    assert to_text(parse("x - (v0 - tanh(x))")) == "x - (v0 - tanh(x))"
    assert to_text(parse("a = exp(x); b = tanh(a); a")) == "exp(x)"
    assert to_text(parse("exp(x) / exp(x)")) == "a = exp(x); a / a"


@given(graphs())
def test_text_is_read_back_as_the_canonical_form(graph: Graph) -> None:
    text = to_text(graph)
    assert parse(text) == canonical(graph)
    assert to_text(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x +", "cannot read"),
        ("sgmoid(x)", "did you mean 'sigmoid'"),
        ("x * v2", "did you mean 'v"),
        ("x", "must apply a primitive"),
        ("v0 + v1", "does not depend on x"),
        ("x ** 2", "no part of a formula"),
        ("x + 1", "only number is 0"),
        ("x + 0.0", "only number is 0"),
        ("x + False", "only number is 0"),
        ("max(x)", "takes 2 inputs, got 1"),
        ("tanh(x, out=x)", "no part of a formula"),
        ("", "must end with an expression"),
        ("a = tanh(x)", "must end with an expression"),
        ("x = tanh(x); x", "must give each name once"),
        ("exp = tanh(x); x", "must give each name once"),
        ("import os; tanh(x)", "name = expression"),
        ("__import__('os').system('true')", "no part of a formula"),
        ("-" * 1900 + "x", "cannot read|1 to 10 primitives"),
        ("tanh(x)" * 500, "at most 2000"),
        ("tanh(x)\0", "cannot read"),
        ("+".join(f"exp({'tanh(' * i}x{')' * i})" for i in range(7)), "1 to 10 primitives, got 1[1-9]"),
    ],
)
def test_what_is_no_formula_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(text)


@given(st.text(alphabet="x v01ab+-*/()=;,.tanhmx_", max_size=40))
def test_any_text_is_a_formula_or_a_config_error(text: str) -> None:
    try:
        graph = parse(text)
    except ConfigError:
        return
    assert parse(to_text(graph)) == graph


# Graphs


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ((), "1 to 10 primitives, got 0"),
        ((Node("tanh", (0,)),) * 11, "1 to 10"),
        ((Node("tan", (0,)),), "did you mean 'tanh'"),
        ((Node("add", (0,)),), "takes 2 inputs, got 1"),
        ((Node("tanh", (4,)),), "below its own"),
        ((Node("tanh", (-1,)),), "below its own"),
        ((Node("tanh", (0,)), Node("tanh", (3,))), "does not depend on x"),
    ],
)
def test_what_is_no_graph_is_refused(nodes: tuple[Node, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Graph(nodes)


@given(graphs())
def test_the_canonical_form_is_one_and_smallest(graph: Graph) -> None:
    small = canonical(graph)
    assert canonical(small) == small
    assert len(set(small.nodes)) == len(small.nodes) <= len(graph.nodes)
    used = {i for node in small.nodes for i in node.inputs}
    assert set(range(FIRST, FIRST + len(small.nodes) - 1)) <= used


@given(graphs())
def test_the_canonical_form_does_not_see_the_order_of_commuting_inputs(graph: Graph) -> None:
    turned = [Node(n.op, n.inputs[::-1] if n.op in COMMUTATIVE else n.inputs) for n in graph.nodes]
    assert canonical(Graph(tuple(turned))) == canonical(graph)


def test_the_canonical_form_does_not_see_the_order_of_nodes() -> None:
    one = Graph((Node("tanh", (0,)), Node("exp", (0,)), Node("div", (4, 5))))
    other = Graph((Node("exp", (0,)), Node("neg", (2,)), Node("tanh", (0,)), Node("div", (6, 4))))
    assert canonical(one) == canonical(other)
    assert canonical(Graph((*one.nodes[:2], Node("div", (5, 4))))) != canonical(one)


@pytest.mark.parametrize(
    "layer", [{"layout": "pixel"}, {"groups": 3}, {"groups": 0}, {"eps": 0.0}, {"layout": "token"}, {"channels": 0}]
)
def test_layers_that_cannot_exist_are_refused(layer: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        module_of(**{"text": "x / std_wh(x)", "channels": 8, **layer})


@pytest.mark.parametrize(("layout", "shape"), [("image", (2, 3, 8)), ("image", (2, 7, 3, 3)), ("token", (2, 8, 7))])
def test_inputs_of_another_shape_are_refused(layout: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="takes"):
        module_of("x / std_whc(x)", 8, layout=layout)(torch.zeros(shape))


# Fingerprints


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x / std_wh(x)", "-x / -std_wh(x)"),
        ("x * (x + v0)", "x * x + v0 * x"),
        ("square(x)", "abs(x) * abs(x)"),
        ("x / rms_whc(x) / v1", "x / (rms_whc(x) * v1)"),
        ("tanh(x)", "0 - tanh(0 - x)"),
        ("max(x, v0)", "max(v0, max(x, v0))"),
        ("x + 0 * exp(x)", "x * exp(0)"),
        ("x - x", "0 * x"),
        ("mean_bwh(mean_wh(x))", "mean_wh(mean_bwh(x))"),
        ("x * mean_wh(v0)", "x * v0"),
        ("x * exp(rms_whc(0))", "x * exp(0)"),
    ],
)
def test_what_is_equal_by_algebra_has_one_fingerprint(one: str, other: str) -> None:
    assert fingerprint(parse(one)) == fingerprint(parse(other))


def test_what_differs_has_fingerprints_of_its_own() -> None:
    texts = [f"{op}(x)" for op in AGGREGATIONS] + [f"{op}(x)" for op, arity in ARITY.items() if arity == 1]
    texts += ["x * v0", "x * v1", "x * 0", "x + v0", "x / v0", "v0 / x", *EVONORM.values()]
    found = {fingerprint(parse(text)): text for text in texts}
    assert len(found) == len({to_text(parse(text)) for text in texts})


def test_every_maximum_is_seen_from_both_sides() -> None:
    """Else max(a, b) would be taken for a."""
    values = ["0", "x", "v0", "v1", "tanh(x)"]
    values += [f"mean_{over}({of})" for of in ("x", "v0", "v1", "x * v0") for over in ("whc", "wh", "whg")]
    values += ["mean_bwh(x)", "mean_bwh(x * v0)", "mean_bwh(x * v1)"]
    for one, other in combinations(values, 2):
        # Times x, so that statistics alone are layers too.
        a, b, larger = (fingerprint(parse(f"({form}) * x")) for form in (one, other, f"max({one}, {other})"))
        assert larger not in (a, b) or a == b, (one, other)


def test_fingerprints_do_not_see_the_last_bits() -> None:
    """Values near a power of two, where the exponent of the rounded value may differ."""
    assert fingerprint(parse("x * (v1 / v1)")) == fingerprint(parse("x * exp(0)")) == fingerprint(parse("x + 0 * v0"))
    chain = "x + v0 + v1 + tanh(x)"
    assert fingerprint(parse(chain)) == fingerprint(parse("tanh(x) + (v1 + (x + v0))"))


@given(graphs())
def test_the_fingerprint_is_that_of_the_canonical_form(graph: Graph) -> None:
    assert fingerprint(graph) == fingerprint(canonical(graph))


@given(graphs())
def test_what_is_simplified_computes_the_same_with_no_more_nodes(graph: Graph) -> None:
    short = simplified(graph)
    assert fingerprint(short) == fingerprint(graph)
    assert len(short.nodes) <= len(canonical(graph).nodes)
    assert simplified(short) == short


@pytest.mark.parametrize(
    ("text", "shorter"),
    [
        ("tanh(0 + x)", "tanh(x)"),
        ("tanh(-(-x))", "tanh(x)"),
        ("tanh(x) / (mean_wh(v1) / v1)", "tanh(x)"),
        ("max(0, mean_whg(x)) + x", "x + max(0, mean_whg(x))"),
        ("x + 0", "x + 0"),
        ("max(tanh(x), abs(x) * x) + 0 * exp(x)", "max(tanh(x), x * abs(x))"),
        ("max(square(x), abs(x) * x)", "square(x)"),
        ("exp(x) - exp(x) + tanh(x)", "tanh(x)"),
        ("a = exp(-exp(x) - exp(x)); tanh(a * a * a * a * x) / (a * a * a * a)", None),
    ],
)
def test_what_is_simplified(text: str, shorter: str | None) -> None:
    expected = to_text(parse(text)) if shorter is None else shorter
    assert to_text(simplified(parse(text))) == expected


# Primitives


def test_series_hold_the_index_sets_they_say() -> None:
    assert [len(primitives_of(series)) for series in "BST"] == [12 + 12, 12 + 9, 12 + 6]
    with pytest.raises(ConfigError, match="unknown series 'C'"):
        primitives_of("C")
