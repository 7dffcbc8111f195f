"""Operators: real numbers against torch in float64, integers against loops over whole numbers."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgecomp import reference
from edgecomp.compress import compress
from edgecomp.errors import GraphError
from edgecomp.exporters import to_onnx, to_tflite
from edgecomp.graph import Graph, Node, Op, QuantParams, Tensor
from edgecomp.ops import OPS
from edgecomp.plan import Io
from edgecomp.quantmath import add_multipliers, bias_scale, multiplier
from tests.graphs import GRAPHS, Build, images, plan_for

# ---- real numbers ----------------------------------------------------------------------------------------------------

CONVS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, object]]] = {
    "plain": ((2, 3, 7, 6), (4, 3, 3, 3), {}),
    "strided": ((2, 3, 7, 6), (4, 3, 3, 2), {"stride": (2, 3)}),
    "padded": ((1, 3, 5, 6), (4, 3, 3, 3), {"pads": (1, 1, 1, 1)}),
    "unevenly padded": ((1, 3, 5, 6), (4, 3, 3, 3), {"pads": (0, 2, 3, 1)}),
    "dilated": ((2, 3, 9, 8), (4, 3, 3, 2), {"dilation": (2, 3)}),
    "grouped": ((2, 6, 7, 6), (4, 3, 3, 3), {"groups": 2}),
    "depthwise": ((2, 3, 7, 6), (6, 1, 3, 3), {"groups": 3}),
    "all at once": (
        (2, 6, 9, 8),
        (9, 2, 2, 3),
        {"groups": 3, "stride": (2, 1), "pads": (1, 0, 2, 3), "dilation": (2, 1)},
    ),
    "one pixel": ((3, 4, 1, 1), (5, 4, 1, 1), {}),
}


def conv_attrs(given: Mapping[str, object]) -> dict[str, object]:
    return {"stride": (1, 1), "pads": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1, **given}


def padded(x: np.ndarray, pads: tuple[int, ...], value: float = 0.0) -> torch.Tensor:
    top, left, bottom, right = pads
    return F.pad(torch.from_numpy(x), (left, right, top, bottom), value=value)


def check(op: Op, values: list[np.ndarray], attrs: Mapping[str, object], want: torch.Tensor) -> None:
    """The operator gives what torch gives, in its dtype, and its shape rule says so beforehand."""
    row = OPS[op]
    got = row.compute(values, attrs)  # type: ignore[arg-type]
    assert got.dtype == np.float64
    assert row.shape([v.shape for v in values], attrs) == got.shape == tuple(want.shape)  # type: ignore[arg-type]
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CONVS)
def test_conv(case: str, bias: bool) -> None:
    shape, kernel, given = CONVS[case]
    rng = np.random.default_rng(0)
    attrs = conv_attrs(given)
    values = [rng.standard_normal(shape), rng.standard_normal(kernel), rng.standard_normal(kernel[0])][: 2 + bias]
    tensors = [torch.from_numpy(v) for v in values[1:]]
    x = padded(values[0], attrs["pads"])  # type: ignore[arg-type]
    want = F.conv2d(x, *tensors, stride=attrs["stride"], dilation=attrs["dilation"], groups=attrs["groups"])  # type: ignore[call-overload]
    check(Op.CONV2D, values, attrs, want)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((3, 7)), rng.standard_normal((5, 7)), rng.standard_normal(5)][: 2 + bias]
    check(Op.LINEAR, values, {}, F.linear(*(torch.from_numpy(v) for v in values)))


POOLS: dict[str, tuple[tuple[int, int], dict[str, object]]] = {
    "2x2": ((2, 2), {"stride": (2, 2)}),
    "3x2 overlapping": ((3, 2), {"stride": (1, 1)}),
    "padded": ((3, 3), {"stride": (2, 1), "pads": (1, 1, 1, 1)}),
}


@pytest.mark.parametrize("case", POOLS)
def test_max_pool(case: str) -> None:
    kernel, given = POOLS[case]
    # All below zero: padding with zeros would win.
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 7)) - 10
    attrs = {"pads": (0, 0, 0, 0), "dilation": (1, 1), "kernel": kernel, **given}
    padding = attrs["pads"][0]  # type: ignore[index]
    want = F.max_pool2d(torch.from_numpy(x), kernel, stride=attrs["stride"], padding=padding)  # type: ignore[arg-type]
    check(Op.MAX_POOL, [x], attrs, want)


def test_max_pool_dilated_and_unevenly_padded() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 7)) - 10
    attrs = {"pads": (0, 1, 2, 0), "dilation": (2, 1), "kernel": (3, 2), "stride": (1, 2)}
    want = F.max_pool2d(padded(x, (0, 1, 2, 0), -np.inf), (3, 2), stride=(1, 2), dilation=(2, 1))
    check(Op.MAX_POOL, [x], attrs, want)


@pytest.mark.parametrize("include_pad", [0, 1])
@pytest.mark.parametrize("case", POOLS)
def test_avg_pool(case: str, include_pad: int) -> None:
    kernel, given = POOLS[case]
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 7)) + 10
    attrs = {"pads": (0, 0, 0, 0), "kernel": kernel, "include_pad": include_pad, **given}
    padding = attrs["pads"][0]  # type: ignore[index]
    want = F.avg_pool2d(
        torch.from_numpy(x), kernel, stride=attrs["stride"], padding=padding, count_include_pad=bool(include_pad)  # type: ignore[arg-type]
    )
    check(Op.AVG_POOL, [x], attrs, want)


OTHERS: dict[str, tuple[Op, dict[str, object], Callable[..., torch.Tensor], int]] = {
    "add": (Op.ADD, {}, lambda a, b: a + b, 2),
    "mul": (Op.MUL, {}, lambda a, b: a * b, 2),
    "sigmoid": (Op.SIGMOID, {}, torch.sigmoid, 1),
    "hard sigmoid": (Op.HARD_SIGMOID, {}, F.hardsigmoid, 1),
    "silu": (Op.SILU, {}, F.silu, 1),
    "hard swish": (Op.HARD_SWISH, {}, F.hardswish, 1),
    "concat channels": (Op.CONCAT, {"axis": 1}, lambda *t: torch.cat(t, 1), 3),
    "concat rows": (Op.CONCAT, {"axis": 2}, lambda *t: torch.cat(t, 2), 2),
    "concat last": (Op.CONCAT, {"axis": -1}, lambda *t: torch.cat(t, -1), 2),
    "gather": (Op.GATHER, {"indices": (2, 0, 0)}, lambda x: x[:, [2, 0, 0]], 1),
    "channel shuffle": (Op.GATHER, {"indices": (0, 1, 2)}, lambda x: F.channel_shuffle(x, 3), 1),
    "global avg pool": (Op.GLOBAL_AVG_POOL, {}, lambda x: F.adaptive_avg_pool2d(x, 1), 1),
    "relu": (Op.CLIP, {"low": 0.0, "high": np.inf}, F.relu, 1),
    "relu6": (Op.CLIP, {"low": 0.0, "high": 0.75}, lambda x: x.clamp(0, 0.75), 1),
    "hardtanh": (Op.CLIP, {"low": -0.5, "high": 0.25}, lambda x: F.hardtanh(x, -0.5, 0.25), 1),
    "flatten": (Op.FLATTEN, {}, lambda x: x.flatten(1), 1),
    "reshape": (Op.RESHAPE, {"shape": (2, 6, 2, 5)}, lambda x: x.reshape(2, 6, 2, 5), 1),
    "softmax": (Op.SOFTMAX, {"axis": 1}, lambda x: F.softmax(x, 1), 1),
    "softmax last": (Op.SOFTMAX, {"axis": -1}, lambda x: F.softmax(x, -1), 1),
    "quantize": (Op.QUANTIZE, {}, lambda x: x, 1),
    "dequantize": (Op.DEQUANTIZE, {}, lambda x: x, 1),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_operators(case: str) -> None:
    op, attrs, torch_form, count = OTHERS[case]
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((2, 3, 4, 5)) for _ in range(count)]
    check(op, values, attrs, torch_form(*(torch.from_numpy(v) for v in values)))


@pytest.mark.parametrize("first", [True, False])
def test_mul_of_one_value_a_channel(first: bool) -> None:
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(shape) for shape in ((2, 3, 1, 1), (2, 3, 4, 5))]
    values = values if first else values[::-1]
    check(Op.MUL, values, {}, torch.from_numpy(values[0]) * torch.from_numpy(values[1]))


CURVES = {
    Op.SIGMOID: torch.sigmoid,
    Op.HARD_SIGMOID: F.hardsigmoid,
    Op.SILU: F.silu,
    Op.HARD_SWISH: F.hardswish,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("op", CURVES)
def test_functions_far_from_zero(op: Op) -> None:
    """Flat ends and corners, without overflow."""
    x = np.array([[-1e3, -100.0, -40, -3.5, -3, -1e-9, 0, 1e-9, 2.5, 3, 3.5, 40, 1e3]])
    check(op, [x], {}, CURVES[op](torch.from_numpy(x)))
    assert OPS[op].compute([x.astype(np.float32)], {}).dtype == np.float32


def test_softmax_of_large_values() -> None:
    x = np.array([[1e4, 1e4 - 1, -1e4]])
    check(Op.SOFTMAX, [x], {"axis": 1}, F.softmax(torch.from_numpy(x), 1))


BAD_SHAPES = {
    "conv channels": (Op.CONV2D, [(1, 4, 5, 5), (2, 3, 3, 3)], conv_attrs({}), "do not fit together"),
    "conv groups": (Op.CONV2D, [(1, 6, 5, 5), (3, 3, 3, 3)], conv_attrs({"groups": 2}), "do not fit together"),
    "conv of rows": (Op.CONV2D, [(1, 4), (2, 4, 1, 1)], conv_attrs({}), "do not fit together"),
    "window": (Op.CONV2D, [(1, 3, 4, 4), (2, 3, 3, 3)], conv_attrs({"dilation": (2, 2)}), "larger than the padded"),
    "linear": (Op.LINEAR, [(1, 4), (3, 5)], {}, "do not fit together"),
    "linear of an image": (Op.LINEAR, [(1, 4, 1, 1), (3, 4)], {}, "do not fit together"),
    "add": (Op.ADD, [(1, 4, 2, 2), (1, 4, 1, 1)], {}, "expected equal shapes"),
    "mul": (Op.MUL, [(1, 4, 2, 2), (1, 4, 2, 1)], {}, "expected equal shapes, or"),
    "mul of another channel": (Op.MUL, [(1, 4, 2, 2), (1, 1, 1, 1)], {}, "expected equal shapes, or"),
    "mul of rows": (Op.MUL, [(1, 4), (1, 1)], {}, "expected equal shapes, or"),
    "concat": (Op.CONCAT, [(1, 4, 2, 2), (1, 4, 3, 2)], {"axis": 1}, "differ beside axis 1"),
    "gather nothing": (Op.GATHER, [(1, 4, 2, 2)], {"indices": ()}, "expected at least one, from 0 to 3"),
    "gather beyond": (Op.GATHER, [(1, 4, 2, 2)], {"indices": (0, 4)}, "expected at least one, from 0 to 3"),
    "reshape": (Op.RESHAPE, [(1, 4, 2, 2)], {"shape": (1, 5, 3)}, "does not fit"),
    "reshape of the batch": (Op.RESHAPE, [(1, 4, 2, 2)], {"shape": (2, 8)}, "does not fit"),
}


@pytest.mark.parametrize("case", BAD_SHAPES)
def test_shape_rules_refuse(case: str) -> None:
    op, shapes, attrs, message = BAD_SHAPES[case]
    with pytest.raises(GraphError, match=message):
        OPS[op].shape(shapes, attrs)  # type: ignore[arg-type]


# ---- integers, by loops over Python's whole numbers ------------------------------------------------------------------


def params(scale: float, zero_point: int) -> QuantParams:
    return QuantParams(bits=8, scale=np.array(scale), zero_point=np.array(zero_point))


def one_node(
    op: Op, shapes: list[tuple[int, ...]], quants: list[QuantParams], attrs: Mapping[str, object], **weights: Tensor
) -> Graph:
    """A graph of a single node on int8 inputs "x0", "x1"..., with the last of `quants` for its output "y"."""
    names = [f"x{i}" for i in range(len(shapes))]
    tensors = {n: Tensor(name=n, shape=(1, *s[1:]), quant=q) for n, s, q in zip(names, shapes, quants, strict=False)}
    tensors |= {t.name: t for t in weights.values()}
    inputs = (*names, *(t.name for t in weights.values()))
    shape = OPS[op].shape([tensors[i].shape for i in inputs], attrs)  # type: ignore[arg-type]
    tensors["y"] = Tensor(name="y", shape=shape, quant=quants[-1])
    node = Node(name="n", op=op, inputs=inputs, outputs=("y",), attrs=attrs)  # type: ignore[arg-type]
    return Graph(name="g", nodes=(node,), tensors=tensors, inputs=tuple(names), outputs=("y",))


def codes(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    x = rng.integers(-128, 128, shape).astype(np.int8)
    x.flat[:2] = -128, 127
    return x


def half_up(value: Fraction) -> int:
    return (value + Fraction(1, 2)).__floor__()


def half_even(value: Fraction) -> int:
    return round(value)


def clamp(value: int, low: int = -128, high: int = 127) -> int:
    return min(max(value, low), high)


def layer_weights(rng: np.random.Generator, shape: tuple[int, ...], input_scale: float) -> dict[str, Tensor]:
    o = shape[0]
    scale = rng.uniform(0.005, 0.02, o).astype(np.float32)
    zero = np.zeros(o, dtype=np.int32)
    weight = QuantParams(bits=8, scale=scale, zero_point=zero, axis=0)
    bias = QuantParams(bits=32, scale=bias_scale(np.float32(input_scale), scale), zero_point=zero, axis=0)
    return {
        "weight": Tensor(name="w", shape=shape, data=rng.integers(-127, 128, shape).astype(np.int8), quant=weight),
        "bias": Tensor(name="b", shape=(o,), data=rng.integers(-9000, 9000, o).astype(np.int32), quant=bias),
    }


def rescaled(graph: Graph, channel: int, total: int, clamp_to: tuple[int, int]) -> int:
    x, w, y = (graph.tensors[n].quant for n in ("x0", "w", "y"))
    assert x is not None
    assert w is not None
    assert y is not None
    factor = multiplier(np.array(float(w.scale[channel]) * float(x.scale) / float(y.scale)))
    value = Fraction(total * int(factor.mantissa), 2 ** int(factor.shift))
    return clamp(half_up(value) + int(y.zero_point), *clamp_to)


@pytest.mark.parametrize("case", CONVS)
def test_conv_in_integers(case: str) -> None:
    shape, kernel, given = CONVS[case]
    rng = np.random.default_rng(3)
    attrs = conv_attrs(given) | {"clamp": (-128, 90)}
    weights = layer_weights(rng, kernel, 0.03)
    graph = one_node(Op.CONV2D, [shape], [params(0.03, 17), params(0.11, -9)], attrs, **weights)
    x = codes(rng, shape)
    got = reference.run(graph, {"x0": x})["y"]
    assert got.dtype == np.int8
    w, b = (graph.tensors[n].data for n in "wb")
    assert w is not None
    assert b is not None
    (top, left, _, _), (sh, sw), (dh, dw) = attrs["pads"], attrs["stride"], attrs["dilation"]  # type: ignore[misc, has-type]
    per_out, per_in = kernel[0] // int(attrs["groups"]), kernel[1]  # type: ignore[call-overload]
    for n, o, row, column in np.ndindex(got.shape):
        total = int(b[o])
        for i, kh, kw in np.ndindex(kernel[1:]):
            r, c = row * sh - top + kh * dh, column * sw - left + kw * dw
            if 0 <= r < shape[2] and 0 <= c < shape[3]:  # padding is real 0: nothing to add
                total += (int(x[n, o // per_out * per_in + i, r, c]) - 17) * int(w[o, i, kh, kw])
        assert got[n, o, row, column] == rescaled(graph, o, total, (-128, 90)), (n, o, row, column)


@pytest.mark.parametrize("clamp_to", [(-128, 127), (-40, 33)])
def test_linear_in_integers(clamp_to: tuple[int, int]) -> None:
    rng = np.random.default_rng(4)
    weights = layer_weights(rng, (6, 50), 0.03)
    graph = one_node(Op.LINEAR, [(3, 50)], [params(0.03, -17), params(0.05, 3)], {"clamp": clamp_to}, **weights)
    x = codes(rng, (3, 50))
    got = reference.run(graph, {"x0": x})["y"]
    w, b = (graph.tensors[n].data for n in "wb")
    assert w is not None
    assert b is not None
    for n, o in np.ndindex(got.shape):
        total = int(b[o]) + sum((int(x[n, i]) + 17) * int(w[o, i]) for i in range(50))
        assert got[n, o] == rescaled(graph, o, total, clamp_to), (n, o)


@pytest.mark.parametrize("scales", [(0.02, 0.05, 0.06), (0.02, 0.02, 0.02), (1e-4, 0.5, 0.4), (3.0, 0.5, 0.01)])
def test_add_in_integers(scales: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(5)
    a, b, y = (params(scale, zero) for scale, zero in zip(scales, (4, -128, -7), strict=True))
    shape = (2, 3, 4, 5)
    graph = one_node(Op.ADD, [shape, shape], [a, b, y], {"clamp": (-100, 127)})
    values = {"x0": codes(rng, shape), "x1": codes(rng, shape)}
    got = reference.run(graph, values)["y"]
    m_a, m_b, shift = add_multipliers(float(a.scale), float(b.scale), float(y.scale))
    for index in np.ndindex(shape):
        p, q = int(values["x0"][index]) - 4, int(values["x1"][index]) + 128
        assert got[index] == clamp(half_up(Fraction(p * m_a + q * m_b, 2**shift)) - 7, -100)
        # And against the real sum, where it is not close to a tie.
        real = (p * Fraction(float(a.scale)) + q * Fraction(float(b.scale))) / Fraction(float(y.scale))
        if abs(real - half_up(real)) < Fraction(499, 1000):
            assert got[index] == clamp(half_up(real) - 7, -100)


@pytest.mark.parametrize("shapes", [((2, 3, 4, 5), (2, 3, 4, 5)), ((2, 3, 1, 1), (2, 3, 4, 5)), ((2, 7), (2, 7))])
@pytest.mark.parametrize("scales", [(0.02, 1 / 256, 0.004), (0.02, 0.03, 0.1), (3.0, 0.5, 0.02)])
def test_mul_in_integers(shapes: tuple[tuple[int, ...], ...], scales: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(5)
    a, b, y = (params(scale, zero) for scale, zero in zip(scales, (4, -128, -7), strict=True))
    graph = one_node(Op.MUL, list(shapes), [a, b, y], {"clamp": (-100, 120)})
    values = {"x0": codes(rng, shapes[0]), "x1": codes(rng, shapes[1])}
    got = reference.run(graph, values)["y"]
    factor = multiplier(np.array(float(a.scale) * float(b.scale) / float(y.scale)))
    x0, x1 = (np.broadcast_to(values[name], shapes[1]) for name in ("x0", "x1"))
    for index in np.ndindex(shapes[1]):
        product = (int(x0[index]) - 4) * (int(x1[index]) + 128)
        want = half_up(Fraction(product * int(factor.mantissa), 2 ** int(factor.shift)))
        assert got[index] == clamp(want - 7, -100, 120), index


# Scales of input and output, and which functions are then no product with a gate in codes.
CURVE_SCALES = {
    (0.05, 0.04): set[Op](),
    (0.1, 1 / 256): {Op.SILU, Op.HARD_SWISH},
    (0.5, 0.7): set[Op](),
    (0.001, 0.0001): set[Op](),
}


@pytest.mark.parametrize("scales", CURVE_SCALES, ids=str)
@pytest.mark.parametrize("op", CURVES)
def test_functions_in_integers(op: Op, scales: tuple[float, float]) -> None:
    """Every code, against torch in float64 and one rounding; or a rounded gate, and a rounded product with it."""
    x, y = params(scales[0], 9), params(scales[1], -100)
    graph = one_node(op, [(1, 256)], [x, y], {})
    every = np.arange(-128, 128).astype(np.int8)[None]
    got = reference.run(graph, {"x0": every[:, ::-1]})["y"][0, ::-1]
    assert got.dtype == np.int8
    x_step, y_step = (float(np.float32(scale)) for scale in scales)
    real = (torch.arange(-128, 128).double() - 9) * x_step
    exact = [clamp(half_even(Fraction(v)) - 100) for v in (CURVES[op](real) / y_step).tolist()]
    want = exact
    if op in (Op.SILU, Op.HARD_SWISH):
        steps = 256 if op is Op.SILU else 255
        gate = torch.sigmoid(real) if op is Op.SILU else F.hardsigmoid(real)
        shares = [min(half_even(Fraction(v * steps)), 255) for v in gate.tolist()]
        factor = multiplier(np.array(x_step * float(np.float32(1 / steps)) / y_step))
        products = [
            half_up(Fraction((code - 9) * share * int(factor.mantissa), 2 ** int(factor.shift)))
            for code, share in zip(range(-128, 128), shares, strict=True)
        ]
        by_gate = [clamp(product - 100) for product in products]
        apart = max(abs(a - b) for a, b in zip(by_gate, exact, strict=True))
        assert (apart > 1) == (op in CURVE_SCALES[scales])
        want = exact if apart > 1 else by_gate
    assert got.tolist() == want


@pytest.mark.parametrize("include_pad", [0, 1])
@pytest.mark.parametrize("case", POOLS)
def test_avg_pool_in_integers(case: str, include_pad: int) -> None:
    """Half to even, counted from the zero point; ties are a quarter of all 2x2 means."""
    (kh, kw), given = POOLS[case]
    attrs = {"pads": (0, 0, 0, 0), "kernel": (kh, kw), "include_pad": include_pad, **given}
    shape, zero = (2, 2, 6, 7), -5
    graph = one_node(Op.AVG_POOL, [shape], [params(0.1, zero), params(0.1, zero)], attrs)
    x = codes(np.random.default_rng(6), shape)
    got = reference.run(graph, {"x0": x})["y"]
    (top, left, _, _), (sh, sw) = attrs["pads"], attrs["stride"]  # type: ignore[misc]
    ties = 0
    for n, c, row, column in np.ndindex(got.shape):
        inside = [
            int(x[n, c, r, q]) - zero
            for r in range(row * sh - top, row * sh - top + kh)
            for q in range(column * sw - left, column * sw - left + kw)
            if 0 <= r < 6 and 0 <= q < 7
        ]
        mean = Fraction(sum(inside), kh * kw if include_pad else len(inside))
        ties += mean.denominator == 2
        assert got[n, c, row, column] == half_even(mean) + zero, (n, c, row, column)
    assert ties or kw == 3


@pytest.mark.parametrize("scales", [(0.1, 0.1), (0.1, 0.03)])
def test_global_avg_pool_in_integers(scales: tuple[float, float]) -> None:
    shape = (3, 4, 5, 6)
    graph = one_node(Op.GLOBAL_AVG_POOL, [shape], [params(scales[0], 9), params(scales[1], -20)], {})
    x = codes(np.random.default_rng(7), shape)
    got = reference.run(graph, {"x0": x})["y"]
    a, y = (float(np.float32(s)) for s in scales)
    factor = multiplier(np.array(a / (y * 30)))
    for n, c in np.ndindex(3, 4):
        total = sum(int(v) - 9 for v in x[n, c].flat)
        assert got[n, c, 0, 0] == clamp(half_up(Fraction(total * int(factor.mantissa), 2 ** int(factor.shift))) - 20)
        assert abs(got[n, c, 0, 0] + 20 - total / 30 * a / y) < 0.501


def test_max_pool_in_integers_never_picks_padding() -> None:
    attrs = {"pads": (1, 1, 1, 1), "kernel": (3, 3), "stride": (2, 2), "dilation": (1, 1)}
    shape = (2, 2, 5, 5)
    graph = one_node(Op.MAX_POOL, [shape], [params(0.1, 40), params(0.1, 40)], attrs)
    x = np.random.default_rng(8).integers(-128, -100, shape).astype(np.int8)  # far below the zero point
    got = reference.run(graph, {"x0": x})["y"]
    assert got.dtype == np.int8
    for n, c, row, column in np.ndindex(got.shape):
        r, q = max(2 * row - 1, 0), max(2 * column - 1, 0)
        assert got[n, c, row, column] == x[n, c, r : 2 * row + 2, q : 2 * column + 2].max()


def test_codes_that_only_move() -> None:
    rng = np.random.default_rng(9)
    q, shape = params(0.1, 4), (2, 3, 4, 5)
    a, b = codes(rng, shape), codes(rng, shape)
    concat = one_node(Op.CONCAT, [shape, shape], [q, q, q], {"axis": 1})
    assert np.array_equal(reference.run(concat, {"x0": a, "x1": b})["y"], np.concatenate([a, b], axis=1))
    clip = one_node(Op.CLIP, [shape], [q, q], {"low": 0.0, "high": 1.0, "clamp": (4, 14)})
    want = [clamp(int(v), 4, 14) for v in a.flat]
    assert np.array_equal(reference.run(clip, {"x0": a})["y"], np.array(want).reshape(shape))
    flat = one_node(Op.FLATTEN, [shape], [q, q], {})
    assert np.array_equal(reference.run(flat, {"x0": a})["y"], a.reshape(2, 60))
    shaped = one_node(Op.RESHAPE, [shape], [q, q], {"shape": (1, 6, 2, 5)})
    assert np.array_equal(reference.run(shaped, {"x0": a})["y"], a.reshape(2, 6, 2, 5))


def test_softmax_in_integers() -> None:
    shape = (5, 7)
    x = codes(np.random.default_rng(10), shape)
    graph = one_node(Op.SOFTMAX, [shape], [params(0.05, 11), params(1 / 256, -128)], {"axis": 1})
    got = reference.run(graph, {"x0": x})["y"]
    real = torch.softmax((torch.from_numpy(x).double() - 11) * float(np.float32(0.05)), 1).numpy()
    for index in np.ndindex(shape):
        assert abs(int(got[index]) + 128 - min(real[index] * 256, 255)) <= 0.5 + 1e-4


def test_borders() -> None:
    x = np.random.default_rng(11).standard_normal((2, 3)).astype(np.float32)
    q = params(0.02, -3)
    tensors = {
        "x": Tensor(name="x", shape=(1, 3)),
        "c": Tensor(name="c", shape=(1, 3), quant=q),
        "y": Tensor(name="y", shape=(1, 3)),
    }
    nodes = (
        Node(name="c", op=Op.QUANTIZE, inputs=("x",), outputs=("c",)),
        Node(name="y", op=Op.DEQUANTIZE, inputs=("c",), outputs=("y",)),
    )
    values = reference.run(Graph(name="g", nodes=nodes, tensors=tensors, inputs=("x",), outputs=("y",)), {"x": x})
    for index in np.ndindex(x.shape):
        code = clamp(round(float(x[index] / np.float32(0.02))) - 3)
        assert values["c"][index] == code
        assert values["y"][index] == np.float32(code + 3) * np.float32(0.02)


# ---- the interpreter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", GRAPHS)
def test_images_do_not_see_each_other(name: str, bits: int | None) -> None:
    """Codes are equal to the last bit; on real numbers BLAS may sum in another order."""
    graph = GRAPHS[name]()
    x = images(graph, 5).astype(np.float64)
    if bits is not None:
        graph, x = compress(graph, plan_for(graph, bits)), x.astype(np.float32)
    whole = reference.run(graph, {"input": x})
    for i in range(5):
        single = reference.run(graph, {"input": x[i : i + 1]})
        assert single.keys() == whole.keys()
        for tensor, values in single.items():
            assert values.dtype == whole[tensor].dtype
            atol = 0 if values.dtype == np.int8 else 1e-12 if bits is None else 1e-6
            np.testing.assert_allclose(values[0], whole[tensor][i], rtol=0, atol=atol)


def test_every_activation_comes_back_and_weights_do_not() -> None:
    graph = GRAPHS["residual"]()
    values = reference.run(graph, {"input": images(graph, 2)})
    assert values.keys() == {name for name, t in graph.tensors.items() if t.data is None}
    assert all(v.shape == (2, *graph.tensors[name].shape[1:]) for name, v in values.items())
    assert all(v.dtype == np.float32 for v in values.values())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input 'input' is missing; the graph takes input"),
        ({"x": np.zeros((1, 3, 8, 8))}, "input 'input' is missing"),
        ({"input": np.zeros((1, 3, 8, 9))}, r"has shape \(1, 3, 8, 9\), expected \(N, 3, 8, 8\)"),
        ({"input": np.zeros((3, 8, 8))}, r"expected \(N, 3, 8, 8\)"),
        ({"input": np.zeros((1, 3, 8, 8), dtype=np.int8)}, "is int8, expected float"),
    ],
)
def test_run_refuses(inputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(GraphError, match=message) as e:
        reference.run(GRAPHS["plain"](), inputs)
    assert "\n" not in str(e.value)


def test_run_refuses_floats_for_codes() -> None:
    graph = GRAPHS["plain"]()
    quantized = compress(graph, plan_for(graph, io=Io.INT8))
    with pytest.raises(GraphError, match="is float32, expected int8"):
        reference.run(quantized, {"input": images(graph, 1)})


def test_run_needs_parameters_of_every_code() -> None:
    graph = one_node(Op.GLOBAL_AVG_POOL, [(1, 2, 3, 3)], [params(1, 0), params(1, 0)], {})
    bare = replace(graph, tensors={**graph.tensors, "x0": Tensor(name="x0", shape=(1, 2, 3, 3))})
    with pytest.raises(GraphError, match="tensor 'x0' has no quantization parameters"):
        reference.run(bare, {"x0": np.zeros((1, 2, 3, 3))})


# ---- one row an operator, everywhere ---------------------------------------------------------------------------------


@pytest.mark.parametrize("op", Op)
def test_every_operator_is_known_everywhere(op: Op) -> None:
    assert op in OPS
    assert OPS[op].compute_integer is not None
    assert op in to_onnx._EMIT
    assert op in to_tflite._HANDLERS


def test_every_operator_is_tested_here() -> None:
    """Each operator is named in this file by a test of real numbers and by one of integers, borders aside."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(test_conv)))  # type: ignore[arg-type]
    found: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Op":
            found[node.attr] = found.get(node.attr, 0) + 1
    assert {op.name for op in Op if found.get(op.name, 0) < 2} == set()


def test_build_and_rows_agree_on_attributes() -> None:
    """The attributes that this suite's builder writes are those of the table, for every operator in the graphs."""
    for make in GRAPHS.values():
        for node in make().nodes:
            assert set(node.attrs) == set(OPS[node.op].attributes)
    b = Build(0, (3, 4, 4))
    with pytest.raises(GraphError):
        b.node(Op.ADD, "add", ("input", b.conv("c", "input", 4)), {})
