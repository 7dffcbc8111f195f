"""Coupled channels: a table by hand, and "cut one alone and see whether shapes break"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from edgecomp import reference
from edgecomp.compress import cut
from edgecomp.errors import GraphError
from edgecomp.graph import Graph, Node, Op
from edgecomp.groups import is_depthwise, kept_numbers, number_channels
from edgecomp.ops import OPS
from tests.graphs import GRAPHS, Build, dense, multiplied

ALL = {**GRAPHS, "multiplied": multiplied, "dense": dense}

# Layers whose channels are cut together, in the same order; a layer's output that cannot be cut stands in LOCKED.
TOGETHER: dict[str, list[set[str]]] = {
    "plain": [{"conv1"}, {"conv2"}, {"fc1"}],
    "residual": [{"stem"}, {"block.conv1"}, {"block.conv2", "block.shortcut", "end.conv"}],
    "separable": [{"expand", "dw"}],
    "branches": [{"stem"}, {"a"}, {"b"}, {"mix"}],
    "multiplied": [{"stem", "dw1", "dw2"}],
    "dense": [{"stem"}, {"conv1"}, {"conv2"}, {"side"}],
    "gated": [
        {"stem", "project"},
        {"expand", "dw", "se.fc2"},
        {"se.fc1"},
        {"conv", "se2.fc2", "side"},
        {"se2.fc1"},
        {"fc1"},
    ],
    "shuffled": [{"stem"}, {"right"}, {"expand", "dw"}, {"project"}, {"end"}],
}
LOCKED = {
    "plain": {"fc2"},
    "residual": {"fc"},
    "separable": {"stem", "project", "grouped", "fc"},  # a grouped convolution reads the sum
    "branches": {"fc"},
    "multiplied": {"fc"},
    "dense": {"fc"},
    "gated": {"fc2"},
    "shuffled": {"fc"},
}


def layer(graph: Graph, name: str) -> Node:
    return next(node for node in graph.layers() if node.name == name)


@pytest.mark.parametrize("name", ALL)
def test_by_hand(name: str) -> None:
    graph = ALL[name]()
    channels = number_channels(graph)
    numbers = {node.name: channels.of[node.outputs[0]] for node in graph.layers()}
    assert {n for n, of in numbers.items() if channels.locked[of].all()} == LOCKED[name]
    assert {n for n, of in numbers.items() if channels.locked[of].any()} == LOCKED[name]
    for one in numbers:
        for other in numbers:
            shared = bool(set(numbers[one].tolist()) & set(numbers[other].tolist()))
            together = any({one, other} <= group for group in TOGETHER[name])
            if one not in LOCKED[name]:
                assert shared == together, (one, other)


def test_numbers_by_hand() -> None:
    """Within a group: add keeps order, a depthwise multiplier repeats, concat appends, flatten repeats H*W times."""
    residual = number_channels(ALL["residual"]())
    assert residual.of["block.conv2"].tolist() == residual.of["block.shortcut"].tolist()
    assert len(set(residual.of["block.conv2"].tolist())) == 12
    doubled = number_channels(ALL["multiplied"]())
    stem = doubled.of["stem"].tolist()
    assert len(set(stem)) == 4
    assert doubled.of["dw1"].tolist() == [n for n in stem for _ in range(2)]
    assert doubled.of["dw2"].tolist() == [n for n in stem for _ in range(4)]
    assert doubled.of["flatten"].tolist() == [n for n in stem for _ in range(4 * 9)]
    grown = number_channels(ALL["dense"]())
    want = [*grown.of["stem"].tolist(), *grown.of["conv1"].tolist(), *grown.of["conv2"].tolist()]
    assert grown.of["cat2"].tolist() == want
    assert grown.of["cat"].tolist() == [n for n in want for _ in range(9)] + grown.of["side"].tolist()
    mixed = number_channels(ALL["shuffled"]())
    stem, right, project = (mixed.of[name].tolist() for name in ("stem", "right", "project"))
    by_turns = [n for pair in zip(stem, right, strict=True) for n in pair]
    assert mixed.of["shuffle1"].tolist() == by_turns
    assert mixed.of["chunk2"].tolist() == by_turns[6:]
    threes = [(by_turns[i], by_turns[i + 4] if i < 2 else project[i - 2], project[i + 2]) for i in range(4)]
    assert mixed.of["shuffle2"].tolist() == [n for three in threes for n in three]
    end = mixed.of["end"].tolist()
    assert mixed.of["some"].tolist() == [end[7], end[0], end[1], end[2], end[4], end[4]]
    for channels in (residual, doubled, grown, mixed):
        for numbers in channels.of.values():
            assert not numbers.flags.writeable


@pytest.mark.parametrize("name", ALL)
def test_every_activation_has_a_number_for_each_channel(name: str) -> None:
    graph = ALL[name]()
    channels = number_channels(graph)
    for tensor in graph.tensors.values():
        if tensor.data is None:
            assert channels.of[tensor.name].shape == (tensor.shape[1],)
    assert channels.locked[channels.of["input"]].all()
    assert channels.locked[channels.of[graph.outputs[0]]].all()


# ---- cut and see -----------------------------------------------------------------------------------------------------


def shapes_hold(graph: Graph, removed: Mapping[str, int]) -> bool:
    """Take `removed` rows from the weights of layers and let every reader shrink as its input does; do shapes hold?

    Readers of a dense convolution or linear layer lose as many columns as their input lost channels. A depthwise
    convolution has no columns to lose: its rows must be as many as its input channels ask for. The output of the model
    must stay as it is.
    """
    shapes = {name: graph.tensors[name].shape for name in graph.inputs}
    try:
        for node in graph.nodes:
            inputs = [shapes[i] for i in node.inputs if i in shapes]
            attrs = dict(node.attrs)
            if node.op in (Op.CONV2D, Op.LINEAR):
                rows, *rest = graph.weight(node).shape
                before = graph.tensors[node.inputs[0]].shape[1]
                if is_depthwise(graph, node):
                    # Its file would say groups = inputs, and rows = groups x multiplier.
                    attrs["groups"] = inputs[0][1]
                    if rows - removed.get(node.name, 0) != inputs[0][1] * (rows // before):
                        return False
                elif attrs.get("groups", 1) == 1:
                    rest[0] -= before - inputs[0][1]
                inputs.append((rows - removed.get(node.name, 0), *rest))
            shapes[node.outputs[0]] = OPS[node.op].shape(inputs, attrs)
    except GraphError:
        return False
    return all(shapes[name] == graph.tensors[name].shape for name in graph.outputs)


def removable(graph: Graph, name: str) -> bool:
    return shapes_hold(graph, {name: 1})


# Counting cannot tell which channels a gather reads: its numbers are checked by hand, and by cutting.
@pytest.mark.parametrize("name", sorted(ALL.keys() - {"shuffled"}))
def test_coupled_is_what_breaks_shapes(name: str) -> None:
    """A channel can be cut alone exactly when shapes hold; a coupled group exactly when all its layers are cut."""
    graph = ALL[name]()
    channels = number_channels(graph)
    owners: dict[int, set[str]] = {}
    for node in graph.layers():
        for number in channels.of[node.outputs[0]].tolist():
            owners.setdefault(number, set()).add(node.name)
    for node in graph.layers():
        number = int(channels.of[node.outputs[0]][0])
        free = not channels.locked[number]
        alone = free and owners[number] == {node.name}
        assert removable(graph, node.name) == alone, node.name
        if free:
            group = {n: int((channels.of[layer(graph, n).outputs[0]] == number).sum()) for n in owners[number]}
            assert shapes_hold(graph, group), group
            for left_out in group:
                assert not shapes_hold(graph, {n: c for n, c in group.items() if n != left_out}) or len(group) == 1


# ---- what locks ------------------------------------------------------------------------------------------------------


def softmax_inside(b: Build) -> str:
    return b.conv("d", b.node(Op.SOFTMAX, "s", (b.conv("c", "input", 4),), {"axis": 1}), 2)


def reshaped(b: Build) -> str:
    return b.conv("d", b.node(Op.RESHAPE, "r", (b.conv("c", "input", 4),), {"shape": (1, 8, 3, 6)}), 2)


def stacked(b: Build) -> str:
    x = b.node(Op.CONCAT, "cat", (b.conv("c", "input", 4), b.conv("e", "input", 4)), {"axis": 2})
    return b.conv("d", x, 2)


def grouped(b: Build) -> str:
    return b.conv("d", b.conv("g", b.conv("c", "input", 4), 4, groups=2), 2)


def added_to_the_input(b: Build) -> str:
    return b.conv("d", b.node(Op.ADD, "add", (b.conv("c", "input", 3), "input"), {}), 2)


def depthwise_on_the_input(b: Build) -> str:
    return b.conv("d", b.conv("c", "input", 6, groups=3), 2)


def lifted(b: Build) -> str:
    return b.conv("d", b.clip("clip", b.conv("c", "input", 4), 0.5, 2.0), 2)


def lowered(b: Build) -> str:
    return b.conv("d", b.clip("clip", b.conv("c", "input", 4), -2.0, -0.5), 2)


def halved(b: Build) -> str:
    return b.conv("d", b.function(Op.SIGMOID, "s", b.conv("c", "input", 4)), 2)


def halved_and_pooled(b: Build) -> str:
    x = b.function(Op.HARD_SWISH, "h", b.function(Op.HARD_SIGMOID, "s", b.conv("c", "input", 4)))
    return b.conv("d", b.max_pool("p", b.clip("r", x)), 2)


def halved_and_flattened(b: Build) -> str:
    x = b.function(Op.SIGMOID, "s", b.conv("c", "input", 4))
    return b.linear("d", b.node(Op.FLATTEN, "f", (x,), {}), 2)


def halved_and_added(b: Build) -> str:
    x = b.function(Op.SIGMOID, "s", b.conv("c", "input", 4))
    return b.conv("d", b.node(Op.ADD, "add", (b.conv("e", "input", 4), x), {}), 2)


def two_gates(b: Build) -> str:
    x, y = (b.function(Op.SIGMOID, f"s{name}", b.conv(name, "input", 4)) for name in "ce")
    return b.conv("d", b.mul("m", x, y), 2)


def gate_read_twice(b: Build) -> str:
    x = b.function(Op.SIGMOID, "s", b.conv("c", "input", 4))
    y = b.mul("m", x, b.conv("e", "input", 4))
    return b.conv("d", b.node(Op.CONCAT, "cat", (y, x), {"axis": 1}), 2)


def gate_of_the_input(b: Build) -> str:
    return b.conv("d", b.mul("m", b.function(Op.SIGMOID, "s", b.conv("c", "input", 3)), "input"), 2)


@pytest.mark.parametrize(
    "build",
    [
        softmax_inside, reshaped, stacked, grouped, added_to_the_input, depthwise_on_the_input, lifted, lowered,
        halved, halved_and_pooled, halved_and_flattened, halved_and_added, two_gates, gate_read_twice,
        gate_of_the_input,
    ],
    ids=lambda build: build.__name__,
)
def test_locked(build: Callable[[Build], str]) -> None:
    b = Build(0, (3, 6, 6))
    graph = b.graph(build(b))
    channels = number_channels(graph)
    assert channels.locked[channels.of["c"]].all()


def gate(b: Build) -> str:
    return b.conv("d", b.mul("m", b.function(Op.SIGMOID, "s", b.conv("c", "input", 4)), b.conv("e", "input", 4)), 2)


def gate_limited(b: Build) -> str:
    x = b.clip("r", b.function(Op.HARD_SIGMOID, "s", b.conv("c", "input", 4)), 0.25, 0.75)
    return b.conv("d", b.mul("m", b.function(Op.SILU, "h", b.conv("e", "input", 4)), x), 2)


def gate_before_depthwise(b: Build) -> str:
    """The depthwise rows go with the channel, bias and all."""
    return b.conv("d", b.conv("w", b.function(Op.SIGMOID, "s", b.conv("c", "input", 4)), 8, groups=4), 2)


def gate_of_features(b: Build) -> str:
    """Squeeze and excitation by linear layers, as it was first published."""
    x = b.conv("e", "input", 4)
    y = b.node(Op.FLATTEN, "f", (b.node(Op.GLOBAL_AVG_POOL, "p", (x,), {}),), {})
    y = b.function(Op.SIGMOID, "s", b.linear("c", b.clip("r", b.linear("l", y, 3)), 4))
    return b.conv("d", b.mul("m", x, b.node(Op.RESHAPE, "v", (y,), {"shape": (1, 4, 1, 1)})), 2)


@pytest.mark.parametrize(
    "build", [gate, gate_limited, gate_before_depthwise, gate_of_features], ids=lambda build: build.__name__
)
def test_gates_are_cut_with_what_they_gate(build: Callable[[Build], str]) -> None:
    """And the cut graph gives what one with rows and biases of zero gives."""
    b = Build(0, (3, 6, 6))
    graph = b.graph(build(b))
    channels = number_channels(graph)
    assert not channels.locked[channels.of["c"]].any()
    keep = {node.name: [True] * graph.weight(node).shape[0] for node in graph.layers()}
    tensors = dict(graph.tensors)
    for node in graph.layers():
        gone = np.isin(channels.of[node.outputs[0]], channels.of["c"][[0, 2]])
        keep[node.name] = (~gone).tolist()
        for name in node.inputs[1:]:
            data = np.array(tensors[name].data)
            data[gone] = 0
            tensors[name] = replace(tensors[name], data=data)
    x = {"input": np.random.default_rng(0).standard_normal((2, 3, 6, 6))}
    want = reference.run(replace(graph, tensors=tensors), x)["d"]
    smaller = cut(graph, {name: tuple(flags) for name, flags in keep.items()})
    assert smaller.tensors["c"].shape[1] == 2
    np.testing.assert_allclose(reference.run(smaller, x)["d"], want, rtol=0, atol=1e-12)


def test_only_the_channels_that_are_read_are_locked() -> None:
    b = Build(0, (3, 6, 6))
    x, y = b.conv("c", "input", 4), b.conv("e", "input", 3)
    z = b.node(Op.ADD, "add", (b.clip("r", y), "input"), {})
    graph = b.graph(b.conv("d", b.node(Op.CONCAT, "cat", (x, z), {"axis": 1}), 2))
    channels = number_channels(graph)
    assert channels.locked[channels.of["cat"]].tolist() == [False] * 4 + [True] * 3
    assert channels.of["e"].tolist() == channels.of["input"].tolist()


# ---- keep flags ------------------------------------------------------------------------------------------------------


def keeping(graph: Graph, **dropped: tuple[int, ...]) -> dict[str, tuple[bool, ...]]:
    names = {node.name: graph.weight(node).shape[0] for node in graph.layers()}
    return {n: tuple(i not in dropped.get(n.replace(".", "_"), ()) for i in range(c)) for n, c in names.items()}


def test_kept_numbers() -> None:
    graph = ALL["residual"]()
    channels = number_channels(graph)
    keep = keeping(graph, stem=(1, 7), block_conv2=(3,), block_shortcut=(3,), end_conv=(3,))
    kept = kept_numbers(graph, channels, keep)
    assert kept[channels.of["stem"]].tolist() == list(keep["stem"])
    assert kept[channels.of["flatten"]].tolist() == list(keep["end.conv"])
    assert kept[channels.of["block.conv1"]].all()
    assert kept[channels.of["input"]].all()


@pytest.mark.parametrize(
    "dropped",
    [
        {"block_conv2": (3,)},
        {"block_shortcut": (3,)},
        {"end_conv": (3,)},
        {"block_conv2": (3,), "block_shortcut": (3,)},
        {"block_conv2": (3,), "block_shortcut": (3,), "end_conv": (4,)},
    ],
    ids=str,
)
def test_coupled_channels_are_refused(dropped: dict[str, tuple[int, ...]]) -> None:
    graph = ALL["residual"]()
    message = r"layer '.*': channel \d+ is coupled with layer '.*'; both must keep it or both drop it"
    with pytest.raises(GraphError, match=message):
        kept_numbers(graph, number_channels(graph), keeping(graph, **dropped))


@pytest.mark.parametrize(("name", "dropped"), [("plain", {"fc2": (0,)}), ("separable", {"grouped": (5,)})])
def test_locked_channels_are_refused(name: str, dropped: dict[str, tuple[int, ...]]) -> None:
    graph = ALL[name]()
    ((layer_name, (index,)),) = dropped.items()
    with pytest.raises(GraphError, match=f"layer '{layer_name}': channel {index} cannot be cut"):
        kept_numbers(graph, number_channels(graph), keeping(graph, **dropped))


def test_half_a_depthwise_pair_is_refused() -> None:
    graph = ALL["multiplied"]()
    with pytest.raises(GraphError, match="channel 1 is coupled with layer"):
        kept_numbers(graph, number_channels(graph), keeping(graph, stem=(0,), dw1=(0,), dw2=(0, 1, 2, 3)))


def test_depthwise() -> None:
    graph = ALL["separable"]()
    assert [node.name for node in graph.layers() if is_depthwise(graph, node)] == ["dw"]
    b = Build(0, (1, 4, 4))
    graph = b.graph(b.conv("c", "input", 3))
    assert not is_depthwise(graph, graph.layers()[0])
    assert np.array_equal(number_channels(graph).locked, [True] * 4)
