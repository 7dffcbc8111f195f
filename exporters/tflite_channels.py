"""Channels taken from a tensor, put in another order, or joined, as operators of TFLite that XNNPACK and Micro take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgecomp.graph import Node
from edgecomp.ops import ints

from .layout import stored_axis, stored_shape

if TYPE_CHECKING:
    from .to_tflite import _Writer


_MOST_SLICED_AXES = 4
"""Of STRIDED_SLICE in TFLite Micro; its GATHER has no such limit."""
_MOST_JOINED = 10
"""Of CONCATENATION in TFLite Micro (kMaxInputNum)."""


def write_concat(writer: _Writer, node: Node) -> None:
    """Join tensors; where TFLite Micro takes no more at once, those joined already and nine others by the next."""
    result = writer.result(node)
    axis = stored_axis(int(node.attrs["axis"]), len(result.shape))  # type: ignore[arg-type]
    inputs = [writer.number[name] for name in node.inputs]
    sizes = [stored_shape(writer.graph.tensors[name].shape)[axis] for name in node.inputs]
    while writer.micro and len(inputs) > _MOST_JOINED:
        size = sum(sizes[:_MOST_JOINED])
        shape = list(stored_shape(result.shape))
        shape[axis] = size
        joined = writer.scratch(f"{node.name}.joined", shape, result)
        version = 1 if result.quant is None else 2
        writer.file.operator(
            "CONCATENATION", version, inputs[:_MOST_JOINED], [joined], "ConcatenationOptions", axis=axis
        )
        inputs, sizes = [joined, *inputs[_MOST_JOINED:]], [size, *sizes[_MOST_JOINED:]]
    writer.operator("CONCATENATION", node, inputs, "ConcatenationOptions", axis=axis)


def write_gather(writer: _Writer, node: Node) -> None:
    """Write a run of channels as a slice, a shuffle by a transpose, and only the rest as GATHER."""
    like, shape, indices = writer.source(node), writer.result(node).shape, ints(node.attrs, "indices")
    x, axis, n = writer.number[node.inputs[0]], stored_axis(1, len(shape)), len(indices)
    if len(shape) <= _MOST_SLICED_AXES and indices == tuple(range(indices[0], indices[0] + n)):
        # The other axes whole, by masks: XNNPACK takes no SLICE whose batch is open.
        begin, end = (np.array([*[0] * axis, i], dtype=np.int32) for i in (indices[0], indices[0] + n))
        inputs = [x, *map(writer.constant, (begin, end, np.ones(axis + 1, dtype=np.int32)))]
        others = (1 << axis) - 1
        writer.operator("STRIDED_SLICE", node, inputs, "StridedSliceOptions", beginMask=others, endMask=others)
    elif (groups := shuffled_groups(indices, like.shape[1])) is not None:
        n_pixels = math.prod(shape) // n
        rows = writer.scratch(f"{node.name}.rows", (n_pixels, groups, n // groups), like)
        turned = writer.scratch(f"{node.name}.turned", (n_pixels, n // groups, groups), like)
        writer.reshape(x, rows, (groups, n // groups))
        writer.transpose(rows, (0, 2, 1), turned, like, stray=0)
        writer.reshape(turned, writer.activation(node.outputs[0]), stored_shape(shape)[1:])
    else:
        order = writer.constant(np.array(indices, dtype=np.int32))
        writer.operator("GATHER", node, [x, order], "GatherOptions", axis=axis)


def shuffled_groups(indices: Sequence[int], n_channels: int) -> int | None:
    """Find G such that the indices read channels, in G groups of equal size, by turns: a channel shuffle; else None."""
    step = indices[1] - indices[0] if len(indices) > 1 else 0
    if len(indices) != n_channels or step <= 0 or n_channels % step:
        return None
    groups = n_channels // step
    shuffled = np.arange(n_channels).reshape(groups, step).T.ravel()
    return groups if np.array_equal(indices, shuffled) else None
