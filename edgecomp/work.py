"""What a network asks of a processor, layer by layer: multiply-adds by kind of operator, and elements moved.

Counted from shapes alone, the same for every runtime and precision. Not here: how long it takes (`latency`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from edgecomp.graph import WEIGHTED, Graph, Node, Op
from edgecomp.ops import ints

_IMAGE_CHANNELS = 4
_WINOGRAD_CHANNELS = 16
_FREE = frozenset({Op.CLIP, Op.FLATTEN, Op.RESHAPE, Op.QUANTIZE, Op.DEQUANTIZE})


class Kind(StrEnum):
    """Kinds of operators, as their kernels differ in speed."""

    FIRST = "first"
    DENSE3X3 = "dense3x3"
    DENSE = "dense"
    POINTWISE = "pointwise"
    DEPTHWISE = "depthwise"
    LINEAR = "linear"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One operator's work for one image.

    Attributes:
        name: of the layer.
        kind: FIRST reads an image of at most 4 channels, larger than 1x1; DENSE3X3 are 3x3 convolutions of stride 1
            with 16 channels or more, which runtimes may compute by Winograd's algorithm; DENSE are all others that are
            larger than 1x1, those in few groups too; OTHER has no weights.
        macs: multiply-adds.
        weights: elements of the weight.
        inputs: elements of all activations that are read.
        outputs: elements that are written.
        summands: that one output sums up.
        out_channels: of a group.
    """

    name: str
    kind: Kind
    macs: int
    weights: int
    inputs: int
    outputs: int
    summands: int
    out_channels: int


def conv_work(
    name: str,
    *,
    in_shape: tuple[int, int, int],
    out_shape: tuple[int, int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Work:
    """Count a convolution from (C, H, W) to (C, H, W)."""
    inputs, outputs = in_shape[0] // groups, out_shape[0] // groups
    taps = math.prod(kernel)
    if groups == in_shape[0] and groups > 1:
        kind = Kind.DEPTHWISE
    elif groups == 1 and in_shape[0] <= _IMAGE_CHANNELS and in_shape[1:] != (1, 1):
        kind = Kind.FIRST
    elif taps == 1:
        kind = Kind.LINEAR if out_shape[1:] == (1, 1) else Kind.POINTWISE
    elif kernel == (3, 3) and stride == (1, 1) and min(inputs, outputs) >= _WINOGRAD_CHANNELS:
        kind = Kind.DENSE3X3
    else:
        kind = Kind.DENSE
    weights = out_shape[0] * inputs * taps
    return Work(
        name=name,
        kind=kind,
        macs=weights * out_shape[1] * out_shape[2],
        weights=weights,
        inputs=math.prod(in_shape),
        outputs=math.prod(out_shape),
        summands=inputs * taps,
        out_channels=outputs,
    )


def linear_work(name: str, inputs: int, outputs: int) -> Work:
    """Count a fully connected layer."""
    return Work(
        name=name,
        kind=Kind.LINEAR,
        macs=inputs * outputs,
        weights=inputs * outputs,
        inputs=inputs,
        outputs=outputs,
        summands=inputs,
        out_channels=outputs,
    )


def other_work(name: str, inputs: int, outputs: int) -> Work:
    """Count an operator without weights."""
    return Work(
        name=name, kind=Kind.OTHER, macs=0, weights=0, inputs=inputs, outputs=outputs, summands=0, out_channels=0
    )


def work_of(graph: Graph) -> tuple[Work, ...]:
    """Count every operator of a graph that costs time: activations that kernels apply as they write are not there."""
    return tuple(_counted(graph, node) for node in graph.nodes if node.op not in _FREE)


def _counted(graph: Graph, node: Node) -> Work:
    if node.op in WEIGHTED:
        weight = graph.weight(node).shape
        found, written = (graph.tensors[name].shape for name in (node.inputs[0], node.outputs[0]))
        if node.op is Op.LINEAR:
            return linear_work(node.name, weight[1], weight[0])
        strides, groups = ints(node.attrs, "stride"), node.attrs["groups"]
        assert isinstance(groups, int)
        return conv_work(
            node.name,
            in_shape=_image(found),
            out_shape=_image(written),
            kernel=(weight[2], weight[3]),
            stride=(strides[0], strides[1]),
            groups=groups,
        )
    inputs = sum(math.prod(t.shape) for t in (graph.tensors[name] for name in node.inputs) if t.data is None)
    return other_work(node.name, inputs, sum(math.prod(graph.tensors[name].shape) for name in node.outputs))


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return shape[1], shape[2], shape[3]


def total_macs(work: Iterable[Work]) -> int:
    """Sum up the multiply-adds."""
    return sum(w.macs for w in work)
