"""Padding and feature orders against the reference interpreter, which knows neither."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgecomp import reference
from edgecomp.exporters import layout
from edgecomp.graph import Graph, Node, Op
from tests.graphs import Build, images


def window(attrs: dict[str, tuple[int, ...]]) -> Node:
    return Node(name="w", op=Op.MAX_POOL, inputs=("input",), outputs=("w",), attrs=attrs)


def pooled(x: np.ndarray, attrs: dict[str, tuple[int, ...]]) -> np.ndarray:
    b = Build(0, x.shape[1:])
    return reference.run(b.graph(b.node(Op.MAX_POOL, "w", ("input",), attrs)), {"input": x})["w"]


def test_window_padding_keeps_every_window() -> None:
    checked = 0
    for extent, kernel, stride, dilation, before, after in itertools.product(
        (5, 6, 7, 8), (1, 2, 3), (1, 2, 3), (1, 2), (0, 1, 2), (0, 1, 2)
    ):
        reach = dilation * (kernel - 1) + 1
        if max(before, after) * 2 > reach:
            continue
        x = np.random.default_rng(extent).standard_normal((1, 1, extent, 6))
        attrs = {"kernel": (kernel, 1), "stride": (stride, 1), "dilation": (dilation, 1), "pads": (before, 0, after, 0)}
        found = layout.window_padding(x.shape, (kernel, 1), window(attrs))
        want, got = pooled(x, attrs), pooled(x, attrs | {"pads": found.pads})
        np.testing.assert_array_equal(got, want, err_msg=str(attrs))
        # TensorFlow's SAME: ceil(extent / stride) windows, what is missing split with the larger half after.
        missing = max((-(-extent // stride) - 1) * stride + reach - extent, 0)
        same = want.shape[2] == -(-extent // stride) and found.pads[::2] == (missing // 2, (missing + 1) // 2)
        assert found.same == same, attrs
        checked += 1
    assert checked == 276


# extent, kernel, stride, pads -> same, effective pads
PADDINGS = {
    "3x3 of a CNN": (8, 3, 1, (1, 1, 1, 1), True, (1, 1, 1, 1)),
    "stride 2 on even: the last row is never read": (8, 3, 2, (1, 1, 1, 1), False, (1, 1, 0, 0)),
    "stride 2 on odd": (9, 3, 2, (1, 1, 1, 1), True, (1, 1, 1, 1)),
    "TensorFlow's own stride 2 on even": (8, 3, 2, (0, 0, 1, 1), True, (0, 0, 1, 1)),
    "ceil mode": (7, 2, 2, (0, 0, 1, 1), True, (0, 0, 1, 1)),
    "none, with rows left over": (8, 3, 2, (0, 0, 0, 0), False, (0, 0, 0, 0)),
    "patches that fit": (8, 2, 2, (0, 0, 0, 0), True, (0, 0, 0, 0)),
    "too much": (8, 3, 1, (2, 2, 2, 2), False, (2, 2, 2, 2)),
}


@pytest.mark.parametrize("case", PADDINGS)
def test_window_padding_known(case: str) -> None:
    extent, kernel, stride, pads, same, effective = PADDINGS[case]
    node = window({"kernel": (kernel, kernel), "stride": (stride, stride), "pads": pads})
    found = layout.window_padding((1, 1, extent, extent), (kernel, kernel), node)
    assert (found.same, found.pads) == (same, effective)


def flat(b: Build, name: str, x: str) -> str:
    return b.node(Op.FLATTEN, name, (x,), {})


def to_linear(b: Build) -> str:
    return b.linear("fc", b.clip("relu", flat(b, "f", "input")), 4)


def to_output(b: Build) -> str:
    return b.clip("relu", flat(b, "f", "input"))


def to_both(b: Build) -> str:
    x = flat(b, "f", "input")
    return b.node(Op.ADD, "add", (x, b.linear("fc", x, 24)), {})


def to_concat(b: Build) -> str:
    x = b.linear("fc1", flat(b, "f", "input"), 5)
    y = flat(b, "g", b.max_pool("pool", "input"))
    return b.linear("fc2", b.node(Op.CONCAT, "cat", (x, y, flat(b, "h", "input")), {"axis": 1}), 4)


def to_sum(b: Build) -> str:
    x = b.node(Op.ADD, "add", (flat(b, "f", "input"), flat(b, "g", b.clip("relu", "input"))), {})
    return b.linear("fc", x, 4)


def to_reshape(b: Build) -> str:
    return b.node(Op.RESHAPE, "shaped", (flat(b, "f", "input"),), {"shape": (1, 4, 2, 3)})


# tensors that may lie in another order, of all rank-2 tensors
ORDERS = {
    to_linear: {"f", "relu"},
    to_output: set(),
    to_both: set(),
    to_concat: {"f", "g", "h", "cat"},
    to_sum: {"f", "g", "add"},
    to_reshape: set(),
}


def in_nhwc(graph: Graph, x: np.ndarray) -> dict[str, np.ndarray]:
    """Run on NHWC images, flattening in their own order: what a channels-last file does, without permuting weights."""
    values = {"input": x}
    for node in graph.nodes:
        v = [values[name] for name in node.inputs if name in values]
        out = reference.run(graph, {"input": x})[node.outputs[0]]
        match node.op:
            case Op.FLATTEN:
                out = v[0].transpose(0, 2, 3, 1).reshape(len(x), -1)
            case Op.CONCAT:
                out = np.concatenate(v, axis=1)
            case Op.CLIP if out.ndim == 2:
                out = np.maximum(v[0], 0)
            case Op.ADD:
                out = v[0] + v[1]
        values[node.outputs[0]] = out
    return values


@pytest.mark.parametrize("build", ORDERS, ids=lambda f: f.__name__)
def test_feature_orders(build) -> None:  # type: ignore[no-untyped-def]
    b = Build(0, (3, 2, 4))
    graph = b.graph(build(b))
    x = images(graph, 2)
    orders = layout.feature_orders(graph)
    assert set(orders) == ORDERS[build]
    canonical, stored = reference.run(graph, {"input": x}), in_nhwc(graph, x)
    for name, order in orders.items():
        assert sorted(order) == list(range(order.size)), name
        np.testing.assert_array_equal(stored[name], canonical[name][:, order], err_msg=name)


def test_no_order_where_nothing_moves() -> None:
    b = Build(0, (5, 1, 1))
    assert layout.feature_orders(b.graph(b.linear("fc", flat(b, "f", "input"), 4))) == {}


@pytest.mark.parametrize(("axis", "stored"), [(0, 0), (1, 3), (2, 1), (3, 2), (-1, 2), (-3, 3)])
def test_axes(axis: int, stored: int) -> None:
    assert layout.stored_axis(axis, 4) == stored
    assert layout.stored_shape((1, 3, 5, 7))[stored] == (1, 3, 5, 7)[axis]
    assert layout.stored_axis(axis % 2, 2) == axis % 2
