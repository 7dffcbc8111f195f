"""The network as a value: tensors, nodes, graph. Knows no operator's meaning and no file format.

Shape letters, used everywhere in this library: N batch, C channels, H W image, O I kernel output and input channels,
KH KW kernel, G groups, F features. Image tensors are NCHW, kernels OIHW, linear weights OI; N is 1 in every stored
shape, and whoever runs a graph may bring more images at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import numpy as np

from edgecomp.errors import GraphError

Array = np.ndarray[Any, np.dtype[Any]]
Attribute = int | float | tuple[int, ...] | tuple[float, ...]


class Op(StrEnum):
    """Every operator a graph may hold; what each one means stands in `ops.OPS`."""

    CONV2D = "conv2d"
    LINEAR = "linear"
    ADD = "add"
    MUL = "mul"
    CONCAT = "concat"
    GATHER = "gather"
    MAX_POOL = "max_pool"
    AVG_POOL = "avg_pool"
    GLOBAL_AVG_POOL = "global_avg_pool"
    CLIP = "clip"
    SIGMOID = "sigmoid"
    HARD_SIGMOID = "hard_sigmoid"
    SILU = "silu"
    HARD_SWISH = "hard_swish"
    FLATTEN = "flatten"
    RESHAPE = "reshape"
    SOFTMAX = "softmax"
    QUANTIZE = "quantize"
    DEQUANTIZE = "dequantize"


WEIGHTED = frozenset({Op.CONV2D, Op.LINEAR})
"""The operators with weights: what a plan calls a layer."""


def frozen(array: Array) -> Array:
    """Give a C-contiguous, read-only view or copy of `array`, so that values inside values cannot change."""
    array = np.asarray(array, order="C").view()
    array.flags.writeable = False
    return array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantParams:
    """real = scale * (code - zero_point).

    Attributes:
        bits: logical width of a code: 2-8 for weights, 8 for activations, 32 for biases. All codes are signed.
        scale: float32 () or (C,), above zero.
        zero_point: int32, same shape; 0 for weights and biases.
        axis: channel axis of the tensor, or None for one scale per tensor.
    """

    bits: int
    scale: Array
    zero_point: Array
    axis: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", frozen(np.asarray(self.scale, dtype=np.float32)))
        object.__setattr__(self, "zero_point", frozen(np.asarray(self.zero_point, dtype=np.int32)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tensor:
    """One value in the graph.

    Attributes:
        name: unique in the graph.
        shape: static; N is 1.
        data: None for an activation; else float32, or integer codes (int8 weights, int32 biases), one code an element.
        quant: None for a float tensor.
    """

    name: str
    shape: tuple[int, ...]
    data: Array | None = None
    quant: QuantParams | None = None

    def __post_init__(self) -> None:
        if self.data is not None:
            if tuple(self.data.shape) != self.shape:
                raise GraphError(f"tensor {self.name!r}: data has shape {self.data.shape}, expected {self.shape}")
            object.__setattr__(self, "data", frozen(self.data))


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One operation.

    Attributes:
        name: PyTorch's qualified layer name, e.g. "layer1.0.conv2", kept to the last report line.
        op: what it does.
        inputs: tensor names; weights and bias follow the activation.
        outputs: tensor names.
        attrs: see `ops.OPS` for the attributes of each operator.
    """

    name: str
    op: Op
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Attribute] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plain = {key: _plain(key, value) for key, value in sorted(self.attrs.items())}
        object.__setattr__(self, "attrs", MappingProxyType(plain))


def _plain(key: str, value: Attribute) -> Attribute:
    """Turn numbers into Python's own, limits into floats: the digest is made from how they are written."""
    if isinstance(value, (tuple, list)):
        return tuple(int(v) for v in value)
    return float(value) if key in ("low", "high") else int(value)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Graph:
    """A network.

    Attributes:
        name: the model's name, for people.
        nodes: in an order in which they can run.
        tensors: by name; weights and activations.
        inputs: names of the graph's inputs.
        outputs: names of the graph's outputs.
    """

    name: str
    nodes: tuple[Node, ...]
    tensors: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    def layers(self) -> tuple[Node, ...]:
        """List the nodes with weights, in running order."""
        return tuple(node for node in self.nodes if node.op in WEIGHTED)

    def weight(self, node: Node) -> Tensor:
        """Look up the weight of a layer: conv2d (O, I/G, KH, KW), linear (O, I)."""
        return self.tensors[node.inputs[1]]

    def bias(self, node: Node) -> Tensor | None:
        """Look up the bias (O,) of a layer, if it has one."""
        return self.tensors[node.inputs[2]] if len(node.inputs) > 2 else None

    def producer(self) -> dict[str, Node]:
        """Map each tensor name to the node that writes it; inputs and weights are missing."""
        return {name: node for node in self.nodes for name in node.outputs}

    def consumers(self) -> dict[str, list[Node]]:
        """Map each tensor name to the nodes that read it, in running order."""
        readers: dict[str, list[Node]] = {name: [] for name in self.tensors}
        for node in self.nodes:
            for name in node.inputs:
                readers[name].append(node)
        return readers

    def digest(self) -> str:
        """Identify the content: sha256 over a canonical form, independent of dict order and of the graph's name."""
        import hashlib  # here, as it loads a library of 4 MB that measuring on a device does without

        h = hashlib.sha256(b"edgecomp graph 1\n")
        for line in _canonical_lines(self):
            h.update(line.encode() + b"\n")
        for name in sorted(self.tensors):
            data = self.tensors[name].data
            if data is not None:
                h.update(name.encode() + b"\0")
                h.update(np.ascontiguousarray(data).astype(data.dtype.newbyteorder("<"), copy=False).data)
        return h.hexdigest()


def _canonical_lines(graph: Graph) -> Iterable[str]:
    yield f"inputs {graph.inputs!r}"
    yield f"outputs {graph.outputs!r}"
    for node in graph.nodes:
        yield f"node {node.name!r} {node.op.value} {node.inputs!r} {node.outputs!r} {dict(node.attrs)!r}"
    for name in sorted(graph.tensors):
        t = graph.tensors[name]
        dtype = "-" if t.data is None else t.data.dtype.name
        quant = "-"
        if t.quant is not None:
            q = t.quant
            quant = f"{q.bits} {q.scale.tobytes().hex()} {q.zero_point.tobytes().hex()} {q.axis}"
        yield f"tensor {name!r} {t.shape!r} {dtype} {quant}"
