"""Each rule against its matrix form in numpy: shares q_ji of output j's relevance for input i, written out in full."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgecomp.errors import UsageError
from edgecomp.graph import Array, Graph, Op
from edgecomp.ops import OPS
from edgecomp.pytorch.network import Network
from edgecomp.pytorch.propagate import Start, Step, explain
from edgecomp.pytorch.relevance import conservation, score
from edgecomp.pytorch.rules import (
    COMPOSITES,
    AlphaBeta,
    Choice,
    Composite,
    Epsilon,
    Flat,
    Gamma,
    Rule,
    WSquare,
    ZPlus,
    parse_composite,
    share,
)
from edgecomp.pytorch.sums import WeightForm
from tests.graphs import GRAPHS, Build, images

EPSILON = 0.01


def stab(z: Array) -> Array:
    return z + EPSILON * np.where(z >= 0, 1, -1)


def matrix_form(rule: Rule, m: Array, bias: Array, there: Array, a: Array, r: Array) -> tuple[Array, Array]:
    """Give q_ji R_j, (outputs, inputs), and the biases' shares (outputs,), of one image.

    Args:
        rule: which.
        m: the layer as a dense matrix (outputs, inputs).
        bias: (outputs,).
        there: where the matrix has a weight, be it 0 by chance.
        a: (inputs,).
        r: (outputs,).
    """
    contribution, z = m * a, m @ a + bias
    up, down = np.maximum(contribution, 0), np.minimum(contribution, 0)
    bias_up, bias_down = np.maximum(bias, 0), np.minimum(bias, 0)
    match rule:
        case Epsilon():
            s = r / stab(z)
            return contribution * s[:, None], bias * s
        case Gamma(gamma=g):
            # Where z is positive what pushes it up is made stronger, and the other way round.
            agree = np.where(z[:, None] > 0, up, np.where(z[:, None] < 0, down, -contribution / g))
            bias_agree = np.where(z > 0, bias_up, np.where(z < 0, bias_down, -bias / g))
            parts, bias_part = contribution + g * agree, bias + g * bias_agree
            s = r / stab(parts.sum(1) + bias_part)
            return parts * s[:, None], bias_part * s
        case ZPlus():
            s = r / stab(up.sum(1) + bias_up)
            return up * s[:, None], bias_up * s
        case AlphaBeta(alpha=alpha, beta=beta):
            s, t = alpha * r / stab(up.sum(1) + bias_up), -beta * r / stab(down.sum(1) + bias_down)
            return up * s[:, None] + down * t[:, None], bias_up * s + bias_down * t
        case Flat():
            return there * (r / stab(there.sum(1)))[:, None], np.zeros_like(bias)
        case WSquare():
            return m**2 * (r / stab((m**2).sum(1)))[:, None], np.zeros_like(bias)


def layers() -> Iterator[tuple[str, Graph]]:
    for groups in (1, 2, 4):
        b = Build(20 + groups, (4, 5, 4))
        x = b.conv("layer", "input", 8, (3, 2), stride=(2, 1), pads=(1, 0, 2, 1), dilation=(1, 2), groups=groups)
        yield f"conv{groups}", b.graph(x)
    b = Build(30, (12,))
    yield "linear", b.graph(b.linear("layer", "input", 7))
    b = Build(31, (3, 4, 4))
    yield "no bias", b.graph(b.conv("layer", "input", 5, bias=False))


LAYERS = dict(layers())
RULES = (Epsilon(), Gamma(gamma=0.4), ZPlus(), AlphaBeta(), AlphaBeta(alpha=3.5, beta=2.5), Flat(), WSquare())


def run_rule(graph: Graph, rule: Rule, x: Array, r: Array) -> Step:
    node, network = graph.nodes[0], Network(graph, dtype=torch.float64)
    values = [torch.from_numpy(x), *(network.weights()[name] for name in node.inputs[1:])]
    z = network.run(torch.from_numpy(x))[node.outputs[0]]
    r_out = torch.from_numpy(r).reshape(z.shape)
    r_in, terms = share(rule, node, values, z, r_out, epsilon=EPSILON)
    return Step(node=node, inputs=(values[0],), s=None, terms=terms, r_out=r_out, r_in=(r_in,))


def dense(graph: Graph, weight: Array) -> Array:
    """A layer as a matrix (outputs, inputs): what it does to each unit vector."""
    node = graph.nodes[0]
    shape = graph.tensors["input"].shape[1:]
    units = np.eye(int(np.prod(shape))).reshape(-1, *shape)
    return np.asarray(OPS[node.op].compute([units, weight], node.attrs)).reshape(len(units), -1).T


@pytest.mark.parametrize("sign", ["any", "positive"])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_shares_are_those_of_the_matrix_form(name: str, rule: Rule, sign: str) -> None:
    graph = LAYERS[name]
    node = graph.nodes[0]
    weight = np.asarray(graph.weight(node).data, dtype=np.float64)
    m, there = dense(graph, weight), dense(graph, np.ones_like(weight))
    rng = np.random.default_rng(4)
    x = rng.standard_normal((3, *graph.tensors["input"].shape[1:]))
    x = np.maximum(x, 0) if sign == "positive" else x
    r = rng.standard_normal((3, len(m)))
    bias_tensor = graph.bias(node)
    bias = np.zeros(len(m))
    if bias_tensor is not None:
        bias = np.repeat(np.asarray(bias_tensor.data, dtype=np.float64), len(m) // len(weight))
    step = run_rule(graph, rule, x, r)
    to_bias = 0.0
    for i in range(len(x)):
        shares, bias_shares = matrix_form(rule, m, bias, there, x[i].ravel(), r[i])
        np.testing.assert_allclose(step.r_in[0][i].flatten(), shares.sum(0), rtol=1e-9, atol=1e-12)
        to_bias += bias_shares.sum()
    lost, whole = step.lost()
    assert whole == pytest.approx(np.abs(r).sum())
    assert lost == pytest.approx(abs(r.sum() - float(step.r_in[0].sum()) - to_bias), abs=1e-9)


def used_weights(graph: Graph, weight: Array) -> Array:
    """Which weight, counted from 1, links an input to an output: int (outputs, inputs), 0 for none."""
    numbers = np.arange(1, weight.size + 1, dtype=np.float64).reshape(weight.shape)
    return np.rint(dense(graph, numbers)).astype(np.int64)


def with_head(name: str) -> Graph:
    """The layer of `LAYERS`, a ReLU and a linear layer of 3 classes behind it."""
    alone = LAYERS[name]
    b = Build(40, alone.tensors["input"].shape[1:])
    b.nodes, b.tensors = list(alone.nodes), dict(alone.tensors)
    x = b.clip("relu", "layer")
    x = x if len(b.tensors[x].shape) == 2 else b.node(Op.FLATTEN, "flatten", (x,), {})
    return b.graph(b.linear("fc", x, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_weights_as_the_rule_sees_them_are_sums_of_its_shares(name: str, rule: Rule, dtype: torch.dtype) -> None:
    graph = with_head(name)
    composite = Composite(name="one", choices=(Choice(rule=rule, depth=0.0),), epsilon=EPSILON)
    node = graph.nodes[0]
    weight = np.asarray(graph.weight(node).data, dtype=np.float64)
    m, used = dense(graph, weight), used_weights(graph, weight)
    bias_tensor = graph.bias(node)
    channel_bias = np.zeros(len(weight)) if bias_tensor is None else np.asarray(bias_tensor.data, dtype=np.float64)
    bias = np.repeat(channel_bias, len(m) // len(weight))
    x, labels = images(graph, 5), np.array([0, 1, 2, 2, 0])
    steps = explain(Network(graph, dtype=torch.float64), x, labels, composite=composite)
    r_out = next(step.r_out for step in steps if step.node.name == "layer").flatten(1).numpy()
    shares_rule: Rule = Epsilon() if isinstance(rule, Flat) else rule  # Flat says nothing of weights
    per_sample = np.zeros((len(x), *weight.shape))
    for i in range(len(x)):
        shares, _ = matrix_form(shares_rule, m, bias, (used > 0) * 1.0, x[i].astype(np.float64).ravel(), r_out[i])
        summed = np.bincount(used.ravel(), weights=shares.ravel(), minlength=weight.size + 1)
        per_sample[i] = summed[1:].reshape(weight.shape)
    found = score(
        graph, [(x[:3], labels[:3]), (x[3:], labels[3:])], composite=composite, weight_form=WeightForm.RULE, dtype=dtype
    )
    layer = found.layers["layer"]
    tolerance = 1e-6 if dtype == torch.float64 else 1e-3
    for value, expected in (
        (layer.weight, per_sample.mean(0)),
        (layer.weight_abs, np.abs(per_sample).mean(0)),
        (layer.weight_cost, ((per_sample / weight) ** 2).mean(0)),
    ):
        np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    assert found.rule == "one, epsilon 0.01; weights as the rule sees them"
    if isinstance(rule, ZPlus):
        # Why it is not the default: from a positive input no negative weight would ever get anything.
        positive = score(graph, [(np.abs(x), labels)], composite=composite, weight_form=WeightForm.RULE)
        own = score(graph, [(np.abs(x), labels)], composite=composite)
        assert not positive.layers["layer"].weight[weight < 0].any()
        assert own.layers["layer"].weight[weight < 0].any()


# ---- composites ------------------------------------------------------------------------------------------------------


def rules_of(text: str, make: Callable[[], Graph]) -> list[Rule]:
    return list(parse_composite(text).rules(make()).values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epsilon", [Epsilon()] * 4),
        ("gamma", [Gamma(gamma=0.25)] * 4),
        ("gamma:0.5", [Gamma(gamma=0.5)] * 4),
        ("plus", [ZPlus()] * 4),
        ("alpha2-beta1", [AlphaBeta(alpha=2, beta=1)] * 4),
        ("epsilon-plus", [ZPlus(), ZPlus(), Epsilon(), Epsilon()]),
        ("Epsilon-Plus-Flat ", [Flat(), ZPlus(), Epsilon(), Epsilon()]),
        ("epsilon-wsquare:0.1", [WSquare(), Epsilon(), Epsilon(), Epsilon()]),
        ("epsilon-gamma:1", [Gamma(gamma=1), Gamma(gamma=1), Epsilon(), Epsilon()]),
        ("epsilon-alpha2-beta1-flat", [Flat(), AlphaBeta(), Epsilon(), Epsilon()]),
        ("lower-gamma-wsquare:0.3", [WSquare(), Gamma(gamma=0.3), Epsilon(), Epsilon()]),
    ],
)
def test_names_give_each_layer_its_rule(text: str, expected: list[Rule]) -> None:
    assert rules_of(text, GRAPHS["plain"]) == expected


def test_depth_is_counted_along_the_longest_way() -> None:
    # stem 0; conv1 and the shortcut 1; conv2 2; end.conv 3; fc 4.
    rules = parse_composite("lower-gamma-flat").rules(GRAPHS["residual"]())
    assert [name for name, rule in rules.items() if rule == Flat()] == ["stem"]
    assert {name for name, rule in rules.items() if rule == Epsilon()} == {"end.conv", "fc"}
    assert {name for name, rule in rules.items() if rule == Gamma()} == {
        "block.conv1", "block.conv2", "block.shortcut",
    }  # fmt: skip


def test_all_layers_that_read_the_image_are_first() -> None:
    b = Build(1, (3, 4, 4))
    x = b.node(
        Op.ADD,
        "add",
        (b.conv("left", "input", 4), b.conv("right", b.max_pool("p", "input", (1, 1), stride=(1, 1)), 4)),
        {},
    )
    graph = b.graph(b.linear("fc", b.node(Op.FLATTEN, "flatten", (x,), {}), 2))
    rules = parse_composite("epsilon-wsquare").rules(graph)
    assert rules == {"left": WSquare(), "right": WSquare(), "fc": Epsilon()}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epsilon", "epsilon 1e-06"),
        ("epsilon:0.01", "epsilon 0.01"),
        ("gamma", "gamma:0.25, epsilon 1e-06"),
        ("epsilon-plus-flat", "epsilon-plus-flat, epsilon 1e-06"),
        ("epsilon-flat:0.5", "epsilon-flat, epsilon 0.5"),
    ],
)
def test_a_composite_says_what_it_is(text: str, said: str) -> None:
    assert str(parse_composite(text)) == said


@given(st.sampled_from(COMPOSITES), st.sampled_from(["", "-flat", "-wsquare"]), st.floats(1e-9, 100))
def test_every_listed_name_can_be_read(listed: str, suffix: str, number: float) -> None:
    name, colon, _ = listed.partition(":")
    found = parse_composite(f"{name}{suffix}{colon}{number if colon else ''}")
    assert found.name.startswith(name + suffix)
    assert not suffix or found.choices[0].depth == 0
    if colon:
        gammas = [choice.rule.gamma for choice in found.choices if isinstance(choice.rule, Gamma)]
        assert (gammas or [found.epsilon]) == [number]


@given(st.text(max_size=20))
def test_what_is_no_name_is_refused(text: str) -> None:
    name = text.strip().lower().partition(":")[0]
    if any(name.startswith(listed.partition(":")[0]) for listed in COMPOSITES):
        return
    with pytest.raises(UsageError, match="expected"):
        parse_composite(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrp", "rule 'lrp' is unknown; expected alpha2-beta1, epsilon:X, epsilon-alpha2-beta1"),
        ("plus:1", "rule 'plus:1' is unknown"),
        ("gamma:much", "'much' is not a number; expected e.g. gamma:0.1"),
        ("gamma:-1", "-1 is out of range; expected 1e-12 to"),
        ("gamma:nan", "nan is out of range"),
        ("epsilon:0", "0 is out of range; expected 1e-12 to"),
        ("flat", "rule 'flat' is unknown"),
    ],
)
def test_wrong_names_are_answered_with_what_there_is(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_composite(text)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.0, -1.0), (float("inf"), float("inf"))])
def test_alpha_and_beta_must_fit(alpha: float, beta: float) -> None:
    with pytest.raises(UsageError, match="alpha one more"):
        AlphaBeta(alpha=alpha, beta=beta)


# ---- starts, conservation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [Start.LOGIT, Start.ONE, Start.SOFTMAX])
def test_relevance_starts_with_what_was_asked_for(start: Start) -> None:
    graph = GRAPHS["separable"]()  # ends in a softmax, which is not explained
    x, labels = images(graph, 4), np.array([3, 0, 9, 3])
    network = Network(graph, dtype=torch.float64)
    values = network.run(torch.from_numpy(x).double())
    expected = {
        Start.LOGIT: values["fc"].numpy()[range(4), labels],
        Start.ONE: np.ones(4),
        Start.SOFTMAX: values["softmax"].numpy()[range(4), labels],
    }
    first = next(iter(explain(network, x, labels, start=start)))
    assert first.node.name == "fc"
    np.testing.assert_allclose(first.r_out, np.eye(10)[labels] * expected[start][:, None], rtol=1e-12)
    found = score(graph, [(x, labels)], start=start)
    assert found.rule == ("epsilon 1e-06" if start is Start.LOGIT else f"epsilon 1e-06; start {start}")


@pytest.mark.parametrize("text", ["epsilon", "gamma", "plus", "epsilon-plus-flat", "epsilon-gamma-wsquare"])
@pytest.mark.parametrize("name", ["residual", "branches", "separable"])
def test_relevance_is_conserved_by_every_rule_but_for_epsilon(name: str, text: str) -> None:
    graph = GRAPHS[name]()
    x, labels = images(graph, 4), np.array([1, 2, 3, 4])
    composite = parse_composite(text)
    precise = Composite(name=composite.name, choices=composite.choices, epsilon=1e-12)
    kept = conservation(graph, x, labels, composite=precise)
    assert kept.keys() == {node.name for node in graph.layers()}
    # Where two branches are added without a ReLU between, some outputs have no positive contribution for ZPlus to use.
    some_lost = "plus" in text and name != "branches"
    assert max(kept.values()) < (0.05 if some_lost else 1e-8)
    assert sorted(kept.values())[-2] < 1e-8
    found = score(graph, [(x, labels)], composite=composite, dtype=torch.float64)
    assert found.conservation == pytest.approx(conservation(graph, x, labels, composite=composite), abs=1e-12)
    single = score(graph, [(x[:2], labels[:2]), (x[2:], labels[2:])], composite=composite)
    assert max(single.conservation.values()) < 0.05


def test_alpha_beta_gains_where_nothing_is_negative() -> None:
    b = Build(2, (3,))
    graph = b.graph(b.linear("fc", "input", 2, bias=False))
    tensors = dict(graph.tensors)
    weight = tensors["fc.weight"]
    tensors["fc.weight"] = type(weight)(name=weight.name, shape=weight.shape, data=np.ones((2, 3), dtype=np.float32))
    graph = Graph(name="ones", nodes=graph.nodes, tensors=tensors, inputs=graph.inputs, outputs=graph.outputs)
    x = np.array([[1, 2, 3]], dtype=np.float32)
    found = conservation(graph, x, np.array([0]), composite=parse_composite("alpha2-beta1"))
    assert found["fc"] == pytest.approx(1.0, rel=1e-5)
