"""Which channels must be cut together, and which cannot be cut at all.

Every channel of every activation gets a number; tensors that share a channel (through a residual add, a pool, a
depthwise convolution, a concat, a gather, a gate) share its number. A number can be cut when no output of the model and
no operator that fixes its channel order reads it.

Cutting a channel must be the same as giving its layers weights and biases of 0. What a sigmoid makes of 0 is 1/2: such
a channel is *lifted*, and cannot be cut where a layer or a sum reads it. The product of a lifted channel and one that
is 0 is 0 again: so the gate's layers can be cut with the channels that they gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from edgecomp.curves import FUNCTIONS, GATES
from edgecomp.errors import GraphError
from edgecomp.graph import Array, Graph, Node, Op, frozen
from edgecomp.ops import ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Channels:
    """The channel numbers of a float graph.

    Attributes:
        of: activation tensor -> int64 (C,) channel numbers; flattened (F,), each number repeated H*W times.
        locked: bool, by channel number: True where the channel cannot be cut.
    """

    of: Mapping[str, Array]
    locked: Array


def is_depthwise(graph: Graph, node: Node) -> bool:
    """Tell whether a conv2d has one input channel a group, so that output channel k*m+j belongs to input channel k."""
    return node.op is Op.CONV2D and node.attrs["groups"] != 1 and graph.weight(node).shape[1] == 1


def gather_nodes(graph: Graph) -> tuple[Node, ...]:
    """List what reads some channels of a tensor; like a layer, each of them needs one channel that stays."""
    return tuple(node for node in graph.nodes if node.op is Op.GATHER)


def number_channels(graph: Graph) -> Channels:
    """Number the channels of a float graph and join those that must be cut together."""
    parent: list[int] = []

    def fresh(count: int) -> Array:
        start = len(parent)
        parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(a: Array, b: Array) -> None:
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            parent[root(i)] = root(j)

    of: dict[str, Array] = {}
    lifted: dict[str, Array] = {}
    locked: list[Array] = []
    for name in graph.inputs:
        of[name] = fresh(graph.tensors[name].shape[1])
        lifted[name] = np.zeros(len(of[name]), dtype=bool)
        locked.append(of[name])
    for node in graph.nodes:
        read = [name for name in node.inputs if name in of]
        x, shape = of[read[0]], graph.tensors[node.outputs[0]].shape
        up = lifted[read[0]]
        match node.op:
            case Op.CONV2D if is_depthwise(graph, node):
                y = fresh(shape[1])
                join(y, np.repeat(x, shape[1] // len(x)))
                up = np.zeros(shape[1], dtype=bool)
            case Op.CONV2D if node.attrs["groups"] != 1:
                # Groups must stay of equal size: cutting them is left to a planner that counts per group.
                y = fresh(shape[1])
                locked += [x, y]
                up = np.zeros(shape[1], dtype=bool)
            case Op.CONV2D | Op.LINEAR:
                y = fresh(shape[1])
                locked.append(x[up])
                up = np.zeros(shape[1], dtype=bool)
            case Op.ADD:
                y = x
                join(x, of[node.inputs[1]])
                up = up | lifted[node.inputs[1]]
            case Op.MUL:
                y = x
                join(x, of[node.inputs[1]])
                up = up & lifted[node.inputs[1]]
            case Op.CONCAT if node.attrs["axis"] == 1:
                y = np.concatenate([of[name] for name in node.inputs])
                up = np.concatenate([lifted[name] for name in node.inputs])
            case Op.GATHER:
                order = list(ints(node.attrs, "indices"))
                y, up = x[order], up[order]
            case Op.FLATTEN:
                y, up = (np.repeat(value, shape[1] // len(x)) for value in (x, up))
            case Op.RESHAPE if ints(node.attrs, "shape")[1:2] == (len(x),):
                y = x
            case Op.CLIP if not cast("float", node.attrs["low"]) <= 0 <= cast("float", node.attrs["high"]):
                y, up = x, np.ones(len(x), dtype=bool)
            case Op.MAX_POOL | Op.AVG_POOL | Op.GLOBAL_AVG_POOL | Op.CLIP:
                y = x
            case op if op in FUNCTIONS:
                y, up = x, up | (op in GATES)
            case _:
                # Softmax and reshape mix or move channels; a concat along H or W has its own order on each side.
                for name in node.inputs:
                    locked.append(of[name])
                y = fresh(shape[1] if len(shape) > 1 else 0)
                locked.append(y)
                up = np.zeros(len(y), dtype=bool)
        of[node.outputs[0]], lifted[node.outputs[0]] = y, up
    locked += [of[name] for name in graph.outputs]
    roots = np.array([root(i) for i in range(len(parent))], dtype=np.int64)
    flags = np.zeros(len(parent), dtype=bool)
    for numbers in locked:
        flags[roots[numbers]] = True
    return Channels(of={name: frozen(roots[numbers]) for name, numbers in of.items()}, locked=frozen(flags))


def kept_numbers(graph: Graph, channels: Channels, keep: Mapping[str, tuple[bool, ...]]) -> Array:
    """Turn keep flags of layers into flags by channel number.

    Args:
        graph: float.
        channels: of `graph`.
        keep: layer name -> a flag for each output channel.

    Returns:
        bool by channel number.

    Raises:
        GraphError: coupled channels are treated differently, or a locked channel is cut.
    """
    kept = np.ones(len(channels.locked), dtype=bool)
    owner: dict[int, str] = {}
    for node in graph.layers():
        numbers = channels.of[node.outputs[0]]
        for index, (number, flag) in enumerate(zip(numbers.tolist(), keep[node.name], strict=True)):
            if not flag and channels.locked[number]:
                raise GraphError(f"layer {node.name!r}: channel {index} cannot be cut: the model's output needs it")
            if number in owner and kept[number] != flag:
                raise GraphError(
                    f"layer {node.name!r}: channel {index} is coupled with layer {owner[number]!r}; "
                    "both must keep it or both drop it"
                )
            kept[number] = flag
            owner.setdefault(number, node.name)
    return kept
