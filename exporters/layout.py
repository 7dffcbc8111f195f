"""NCHW to NHWC for formats that keep channels last: shapes, axes, padding, and the order of flattened features.

Decides only; writes nothing and knows no file format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgecomp.curves import FUNCTIONS
from edgecomp.graph import Array, Graph, Node, Op
from edgecomp.ops import ints
from edgecomp.quantmath import ACT_MIN

TO_NHWC = (0, 2, 3, 1)
"""Permutation that turns an NCHW array into NHWC."""
TO_NCHW = (0, 3, 1, 2)
"""Permutation that turns an NHWC array into NCHW."""
Shape = tuple[int, ...]
Pads = tuple[int, int, int, int]
_ELEMENTWISE = FUNCTIONS | {Op.CLIP, Op.SOFTMAX, Op.QUANTIZE, Op.DEQUANTIZE}


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPadding:
    """What a window operator must see around its image.

    Attributes:
        same: TensorFlow's SAME padding does exactly this.
        pads: top, left, bottom, right, as far as any window reaches.
    """

    same: bool
    pads: Pads


def stored_shape(shape: Shape) -> Shape:
    """Give the shape an activation has in a channels-last file: rank 4 becomes NHWC, all others stay."""
    return tuple(shape[i] for i in TO_NHWC) if len(shape) == 4 else shape


def stored_axis(axis: int, rank: int) -> int:
    """Give the place of a graph axis, which may be negative, in a channels-last file."""
    axis %= rank
    return TO_NHWC.index(axis) if rank == 4 else axis


def moves_data(shape: Shape) -> bool:
    """Tell whether NCHW and NHWC of a (N, C, H, W) shape differ in memory: not if channels or pixels are single."""
    return len(shape) == 4 and shape[1] != 1 and shape[2] * shape[3] != 1


def never_negative(graph: Graph, name: str) -> bool:
    """Tell whether a tensor cannot hold a value below zero, as far as what writes it says."""
    quant = graph.tensors[name].quant
    if quant is not None:
        return int(quant.zero_point) == ACT_MIN
    node = graph.producer().get(name)
    if node is None:
        return False
    if "low" in node.attrs:
        return float(node.attrs["low"]) >= 0  # type: ignore[arg-type]
    passes = node.op in (Op.MAX_POOL, Op.AVG_POOL, Op.CONCAT, Op.GATHER)
    return passes and all(never_negative(graph, source) for source in node.inputs)


def window_padding(shape: Shape, kernel: Sequence[int], node: Node) -> WindowPadding:
    """Find the padding that a window operator really uses, and whether SAME says the same.

    Pads that no window reaches (stride 2 on an even image leaves the last row out) count as absent.

    Args:
        shape: of the operator's input, (N, C, H, W).
        kernel: KH, KW.
        node: with attributes pads, stride and perhaps dilation.
    """
    explicit, stride = ints(node.attrs, "pads"), ints(node.attrs, "stride")
    dilation = ints(node.attrs, "dilation") if "dilation" in node.attrs else (1, 1)
    used: list[tuple[int, int]] = []
    same: list[tuple[int, int] | None] = []
    for axis in (0, 1):
        extent, step, before, after = shape[2 + axis], stride[axis], explicit[axis], explicit[2 + axis]
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        n_out = (extent + before + after - reach) // step + 1
        needed = (n_out - 1) * step + reach - extent
        used.append((before, max(0, needed - before)))
        n_same = -(-extent // step)
        total = max(0, (n_same - 1) * step + reach - extent)
        same.append((total // 2, total - total // 2) if n_same == n_out else None)
    pads = (used[0][0], used[1][0], used[0][1], used[1][1])
    return WindowPadding(same=used == same, pads=pads)


def feature_orders(graph: Graph) -> dict[str, Array]:
    """Find the rank-2 tensors whose features a channels-last file may store in another order than the graph.

    A flatten in NHWC gives features in (H, W, C) order. That costs nothing as long as every reader is indifferent or is
    a linear layer, whose weight columns can be permuted instead. A flatten that feeds a graph output, a reshape, or a
    sum or product of two different orders is left out, with all that follows from it: it has to restore the order by a
    transpose.

    Returns:
        by tensor name, int64 (F,): entry j is the graph's feature that lies at place j. Tensors that lie in the graph's
        order are missing.
    """
    restored: set[str] = set()
    while True:
        orders, blamed = _walk(graph, restored)
        if not blamed:
            return orders
        restored |= blamed


def _walk(graph: Graph, restored: set[str]) -> tuple[dict[str, Array], set[str]]:
    """Follow the orders from all flattens but `restored`; blame the flattens whose order meets a reader that minds."""
    orders: dict[str, Array] = {}
    sources: dict[str, set[str]] = {}
    blamed: set[str] = set()
    for node in graph.nodes:
        names = [name for name in node.inputs if name in orders]
        out = node.outputs[0]
        origin = set().union(*(sources[name] for name in names))
        order: Array | None = None
        if node.op is Op.FLATTEN and not names:
            shape = graph.tensors[node.inputs[0]].shape
            if moves_data(shape) and node.name not in restored:
                order = np.arange(int(np.prod(shape[1:]))).reshape(shape[1:]).transpose(1, 2, 0).ravel()
                origin = {node.name}
        elif not names or node.op is Op.LINEAR:
            continue
        elif node.op in _ELEMENTWISE or node.op is Op.FLATTEN:
            order = orders[names[0]]
        elif node.op is Op.CONCAT:
            order = _concatenated(graph, node, orders)
        elif node.op in (Op.ADD, Op.MUL) and len(names) == 2 and np.array_equal(orders[names[0]], orders[names[1]]):
            order = orders[names[0]]
        else:
            blamed |= origin
        if order is not None:
            orders[out], sources[out] = order, origin
    for name in graph.outputs:
        blamed |= sources.get(name, set())
    return orders, blamed


def _concatenated(graph: Graph, node: Node, orders: dict[str, Array]) -> Array:
    parts, start = [], 0
    for name in node.inputs:
        n_features = graph.tensors[name].shape[1]
        parts.append(start + orders.get(name, np.arange(n_features)))
        start += n_features
    return np.concatenate(parts)
