"""Compress for some of the classes: which ones, with what weight, and the network that answers with them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgecomp.curves import FUNCTIONS
from edgecomp.errors import UsageError
from edgecomp.graph import WEIGHTED, Array, Graph, Node, Op
from edgecomp.ops import OPS
from edgecomp.verify import verify_float

_KEEPS_CLASSES = FUNCTIONS | {
    Op.SOFTMAX, Op.FLATTEN, Op.RESHAPE, Op.CLIP, Op.GLOBAL_AVG_POOL, Op.AVG_POOL, Op.MAX_POOL,
}  # fmt: skip
"""What may stand between the layer whose rows are the classes and the output."""
_NAMES_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The classes a device is for.

    Attributes:
        indices: their numbers in the whole model, in the order of the new outputs.
        weights: how much each counts when relevance is averaged; above 0.
    """

    indices: tuple[int, ...]
    weights: tuple[float, ...]

    def class_weights(self) -> Array | None:
        """Give the weights float64 (n,) as `relevance.score` takes them; None where they are equal."""
        return None if len(set(self.weights)) == 1 else np.array(self.weights, dtype=np.float64)


def parse_classes(text: str, known: Sequence[str]) -> Selection:
    """Read `NAME[=WEIGHT],...`; a number that is no name is the index of a class.

    Args:
        text: as given to --classes.
        known: the names of all classes.

    Raises:
        UsageError: an unknown or repeated class, a weight that is none, fewer than two classes.
    """
    indices: list[int] = []
    weights: list[float] = []
    for part in text.split(","):
        name, weight = part.strip(), 1.0
        if name not in known and "=" in name:
            name, _, value = name.rpartition("=")
            name, weight = name.strip(), _weight(value, part)
        indices.append(_index(name, known))
        weights.append(weight)
        if indices[-1] in indices[:-1]:
            raise UsageError(f"--classes: {name!r:.60} stands twice; name each class once")
    if len(indices) < 2:
        raise UsageError(f"--classes {text!r:.60}: one class, expected at least two to choose between")
    return Selection(indices=tuple(indices), weights=tuple(weights))


def _index(name: str, known: Sequence[str]) -> int:
    if name in known:
        return known.index(name)
    if name.isascii() and name.isdigit() and len(name) < 9 and int(name) < len(known):
        return int(name)
    names = ", ".join(known[:_NAMES_SHOWN]) + (f" and {len(known) - _NAMES_SHOWN} more" * (len(known) > _NAMES_SHOWN))
    raise UsageError(f"--classes: no class {name!r:.60}; known are {names}, or 0 to {len(known) - 1}")


def _weight(text: str, part: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = float("nan")
    if not 0 < weight < 1e30:
        raise UsageError(f"--classes: {part.strip()!r:.60}: expected a weight above 0 behind the =")
    return weight


def select_classes(graph: Graph, indices: Sequence[int]) -> Graph:
    """Keep some outputs of a classifier, in the order given: the rows of its last layer, and nothing else changes.

    Args:
        graph: float, with one output of one value a class.
        indices: of the classes, each once.

    Raises:
        UsageError: an index is out of range or repeated, or the outputs are not the rows of one conv2d or linear layer,
            followed by nothing that mixes them but a softmax.
    """
    if len(graph.outputs) != 1:
        raise UsageError(f"graph {graph.name!r} has {len(graph.outputs)} outputs; classes are chosen from one")
    n_classes = int(np.prod(graph.tensors[graph.outputs[0]].shape))
    if len(set(indices)) != len(indices) or not all(0 <= i < n_classes for i in indices) or not indices:
        raise UsageError(f"classes {list(indices)!r:.80}: expected each once, from 0 to {n_classes - 1}")
    layer, between = _last_layer(graph, n_classes)
    rows = np.array(indices)
    tensors = dict(graph.tensors)
    for name in layer.inputs[1:]:
        data = tensors[name].data
        assert data is not None
        tensors[name] = replace(tensors[name], data=data[rows], shape=(len(rows), *data.shape[1:]))
    nodes = []
    for original in graph.nodes:
        node = original
        if node.name in between and node.op is Op.RESHAPE:
            shape = graph.tensors[node.outputs[0]].shape
            node = replace(node, attrs={"shape": (1, len(rows), *shape[2:])})
        if node.name == layer.name or node.name in between:
            out = OPS[node.op].shape([tensors[name].shape for name in node.inputs], node.attrs)
            tensors[node.outputs[0]] = replace(tensors[node.outputs[0]], shape=out)
        nodes.append(node)
    smaller = replace(graph, nodes=tuple(nodes), tensors=tensors)
    verify_float(smaller)
    return smaller


def _last_layer(graph: Graph, n_classes: int) -> tuple[Node, set[str]]:
    """Find the layer whose rows are the classes, and the names of the nodes between it and the output."""
    producer, consumers = graph.producer(), graph.consumers()
    name, between = graph.outputs[0], set[str]()
    while True:
        node = producer.get(name)
        shape = graph.tensors[name].shape
        where = "the input" if node is None else f"{node.name} ({node.op})"
        readers = len(consumers[name]) + (name in graph.outputs)
        if node is None or readers != 1 or len(shape) < 2 or shape[1] != n_classes:
            raise UsageError(f"--classes: the outputs come from {where}, whose channels are not the classes alone")
        if node.op in WEIGHTED:
            shared = [i for i in node.inputs[1:] if len(consumers[i]) != 1]
            if node.attrs.get("groups", 1) != 1 or shared:
                raise UsageError(f"--classes: {where} has groups or shares its weights; its rows cannot be chosen")
            return node, between
        if node.op not in _KEEPS_CLASSES or (node.op is Op.SOFTMAX and node.attrs["axis"] not in (1, 1 - len(shape))):
            raise UsageError(f"--classes: {where} mixes the outputs; expected a linear layer or convolution there")
        between.add(node.name)
        name = node.inputs[0]
