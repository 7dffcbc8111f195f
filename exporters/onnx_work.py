"""What the layers of an ONNX file of ours ask of a processor, counted from the file alone, with numpy alone.

The exporter gives each operator of the graph's its name; what unpacks, rounds, clamps and gates beside it has none.
Nothing is decoded: what unpacks a weight ends with its shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from edgecomp.errors import BundleError
from edgecomp.work import Work, conv_work, linear_work, other_work

from .modelfacts import MEANT_BY_DAMAGED
from .onnx_model import DOMAIN
from .onnx_parts import INPUT, Constant, Node, Parts, parts_of, shown
from .protobuf import fields, view, whole

_Shape = tuple[int, ...]
_FREE = frozenset({"Clip", "DequantizeLinear", "Flatten", "QuantizeLinear", "Relu", "Reshape"})
_BESIDE = frozenset({"QuantizeLinear", "DequantizeLinear", "Clip", "Sigmoid", "Add"})
"""Operators on activations that may have no name."""


def onnx_work(data: bytes, where: str) -> tuple[Work, ...]:
    """Count every operator that costs time, for one image, as `edgecomp.work.work_of` does from a graph.

    Args:
        data: an ONNX file that edgecomp wrote: float or quantized, packed or plain.
        where: names it in errors.

    Raises:
        BundleError: it is no ONNX file, damaged, or edgecomp did not write it.
    """
    try:
        parts = parts_of(memoryview(data))
        work = _Counting(parts).work() if parts.ours else None
    except MEANT_BY_DAMAGED as e:
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise BundleError(f"{where}: is damaged or no ONNX file: {reason}") from e
    if work is None:
        raise BundleError(f"{where}: edgecomp did not write it; expected a file that build or export wrote, or a model")
    return work


class _Counting:
    """The shapes of a file's tensors, node by node."""

    def __init__(self, parts: Parts) -> None:
        self._nodes = parts.nodes
        self._constants: Mapping[bytes, Constant] = parts.constants
        # Of what is computed from constants only the shape is known that a reshape gives, if any.
        self._fixed: dict[bytes, _Shape | None] = {name: c.shape for name, c in parts.constants.items()}
        self._shapes = {name: shape for raw in parts.around.get(INPUT, ()) for name, shape in _inputs(raw)}
        self._gates: set[bytes] = set()

    def work(self) -> tuple[Work, ...]:
        found = []
        for node in self._nodes:
            if len(node.outputs) != 1 or node.domain == DOMAIN or not self._reads_activations(node):
                self._fix(node)
                continue
            name, shape = _name(node), self._shape(node)
            self._shapes[node.outputs[0]] = shape
            if name and node.op not in _FREE:
                found.append(self._counted(name, node, shape))
            elif not name:
                self._beside(node)
        return tuple(found)

    def _reads_activations(self, node: Node) -> bool:
        for name in node.inputs:
            if name and name not in self._fixed and name not in self._shapes:
                raise ValueError(f"{shown(*node.outputs)} is made of {shown(name)}, which nothing gives before it")
        return any(name in self._shapes for name in node.inputs)

    def _fix(self, node: Node) -> None:
        """Note what is computed beforehand."""
        if self._reads_activations(node):
            raise ValueError(f"{shown(*node.outputs)} is computed in a way that this edgecomp does not know")
        shape = None
        if node.op == "Reshape":
            shape = tuple(self._integers(node.inputs[1]))
        elif node.op == "DequantizeLinear":
            shape = self._fixed[node.inputs[0]]
        self._fixed |= dict.fromkeys(node.outputs, shape)

    def _beside(self, node: Node) -> None:
        """Follow the gate of a function that the file has no operator for."""
        if node.op not in _BESIDE:
            raise ValueError(f"{shown(*node.outputs)} is given by a {node.op} without a name")
        if node.op in ("Sigmoid", "Add") or node.inputs[0] in self._gates:
            self._gates.add(node.outputs[0])

    def _counted(self, name: str, node: Node, shape: _Shape) -> Work:
        if node.op == "Conv":
            given, weight = self._shapes[node.inputs[0]], self._weight(node, 4)
            strides = _numbers(node, "strides")
            return conv_work(
                name,
                in_shape=(given[1], given[2], given[3]),
                out_shape=(shape[1], shape[2], shape[3]),
                kernel=(weight[2], weight[3]),
                stride=(strides[0], strides[1]),
                groups=node.number("group", 1),
            )
        if node.op == "Gemm":
            outputs, inputs = self._weight(node, 2)
            return linear_work(name, inputs, outputs)
        read = (n for n in node.inputs if n in self._shapes and n not in self._gates)
        return other_work(name, sum(math.prod(self._shapes[n]) for n in read), math.prod(shape))

    def _weight(self, node: Node, rank: int) -> _Shape:
        shape = self._fixed.get(node.inputs[1])
        if shape is None or len(shape) != rank or min(shape) < 1:
            raise ValueError(f"{shown(node.inputs[1])} is no weight of {rank} axes")
        return shape

    def _integers(self, name: bytes) -> list[int]:
        values = self._constants[name].values()
        if values.ndim != 1 or values.dtype.kind != "i":
            raise ValueError(f"{shown(name)} is no list of whole numbers")
        return [int(v) for v in values]

    # ---- shapes ----

    def _shape(self, node: Node) -> _Shape:
        if node.op not in _SHAPES:
            raise ValueError(f"{shown(*node.outputs)} is given by {node.op!r:.60}, which edgecomp does not write")
        shape = _SHAPES[node.op](self, node, self._shapes.get(node.inputs[0], ()))
        if not shape or min(shape) < 1:
            raise ValueError(f"{shown(*node.outputs)} has the shape {list(shape)}")
        return shape

    def same(self, node: Node, given: _Shape) -> _Shape:
        known = [self._shapes.get(name) or self._fixed.get(name) or () for name in node.inputs]
        # A QuantizeLinear's scale, the limits of a Clip: they do not widen what they are applied to.
        return np.broadcast_shapes(*known) if node.op in ("Add", "Mul") else given

    def conv(self, node: Node, given: _Shape) -> _Shape:
        weight, groups = self._weight(node, 4), node.number("group", 1)
        if len(given) != 4 or groups < 1 or weight[1] * groups != given[1] or weight[0] % groups:
            raise ValueError(f"{shown(*node.outputs)}: a weight {list(weight)} does not fit an input {list(given)}")
        return (given[0], weight[0], *self.window(node, given, weight[2:])[2:])

    def window(self, node: Node, given: _Shape, kernel: Sequence[int] = ()) -> _Shape:
        kernel = kernel or _numbers(node, "kernel_shape")
        strides, pads = _numbers(node, "strides"), _numbers(node, "pads")
        dilations = _numbers(node, "dilations") if "dilations" in node.attributes else [1, 1]
        if not len(kernel) == len(strides) == len(dilations) == len(given) - 2 == len(pads) - 2 == 2 or 0 in strides:
            raise ValueError(f"{shown(*node.outputs)}: its window is not one of two axes")
        reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
        sizes = [(given[2 + i] + pads[i] + pads[2 + i] - reach[i]) // strides[i] + 1 for i in (0, 1)]
        return (*given[:2], *sizes)

    def gemm(self, node: Node, given: _Shape) -> _Shape:
        outputs, inputs = self._weight(node, 2)
        if len(given) != 2 or given[1] != inputs:
            raise ValueError(f"{shown(*node.outputs)}: {inputs} features do not fit an input {list(given)}")
        return given[0], outputs

    def mean(self, node: Node, given: _Shape) -> _Shape:
        return (*given[:2], *[1] * (len(given) - 2))

    def concat(self, node: Node, given: _Shape) -> _Shape:
        shapes, axis = [self._shapes[name] for name in node.inputs], _signed(node, "axis") % len(given)
        if len({s[:axis] + s[axis + 1 :] for s in shapes}) != 1:
            raise ValueError(f"{shown(*node.outputs)} joins what differs beside axis {axis}")
        return (*given[:axis], sum(s[axis] for s in shapes), *given[axis + 1 :])

    def slice(self, node: Node, given: _Shape) -> _Shape:
        first, stop, axis = (self._integers(name) for name in node.inputs[1:])
        if axis != [1] or not 0 <= first[0] <= stop[0] <= given[1]:
            raise ValueError(f"{shown(*node.outputs)}: no slice of channels")
        return (given[0], stop[0] - first[0], *given[2:])

    def gather(self, node: Node, given: _Shape) -> _Shape:
        return (given[0], len(self._integers(node.inputs[1])), *given[2:])

    def flatten(self, node: Node, given: _Shape) -> _Shape:
        return given[0], math.prod(given[1:])

    def reshape(self, node: Node, given: _Shape) -> _Shape:
        shape = (given[0], *self._integers(node.inputs[1])[1:])
        if math.prod(shape) != math.prod(given):
            raise ValueError(f"{shown(*node.outputs)}: {list(given)} does not fit {list(shape)}")
        return shape


_SHAPES: Mapping[str, Callable[[_Counting, Node, _Shape], _Shape]] = {
    **dict.fromkeys(
        ("Add", "Clip", "DequantizeLinear", "HardSigmoid", "HardSwish", "Mul", "QuantizeLinear", "Relu", "Sigmoid",
         "Softmax"), _Counting.same,
    ),
    "AveragePool": _Counting.window,
    "Concat": _Counting.concat,
    "Conv": _Counting.conv,
    "Flatten": _Counting.flatten,
    "Gather": _Counting.gather,
    "Gemm": _Counting.gemm,
    "GlobalAveragePool": _Counting.mean,
    "MaxPool": _Counting.window,
    "Reshape": _Counting.reshape,
    "Slice": _Counting.slice,
}  # fmt: skip


# ---- fields that only this reader needs ------------------------------------------------------------------------------


def _inputs(raw: memoryview) -> list[tuple[bytes, _Shape]]:
    """Read an input: its name and, for one image, its shape."""
    ((_, message, _),) = fields(raw)
    inside = {number: view(value) for number, value, _ in fields(view(message)) if number in (1, 2)}
    shape: list[int] = []
    for number in (1, 2):  # TypeProto.tensor_type, its shape
        inside[2] = {n: view(v) for n, v, _ in fields(inside[2]) if n == number}[number]
    for _, dim, _ in fields(inside[2]):
        known = [whole(v) for n, v, _ in fields(view(dim)) if n == 1]
        shape.append(known[0] if shape and known else 1 if not shape else 0)
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"input {shown(bytes(inside[1]))} has the shape {shape}")
    return [(bytes(inside[1]), tuple(shape))]


def _name(node: Node) -> str:
    found = [view(v) for attribute, raw in node.others if not attribute for n, v, _ in fields(raw) if n == 3]
    name = bytes(found[-1]).decode("utf-8") if found else ""
    if not name.isprintable():
        raise ValueError(f"the name of {shown(*node.outputs)} is not printable")
    return name


def _numbers(node: Node, attribute: str) -> list[int]:
    return [whole(value) for number, value, _ in fields(node.attributes[attribute]) if number == 8]


def _signed(node: Node, attribute: str) -> int:
    (value,) = (value for number, value, _ in fields(node.attributes[attribute]) if number == 3)
    if not isinstance(value, int):
        raise TypeError("bytes where a number is expected")
    return value - (1 << 64 if value >> 63 else 0)
