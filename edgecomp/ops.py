"""What every operator means: arity, attributes, shape rule, and its reference computation in float and in integers.

This is the definition of correct: slow, plain, numpy. `reference` walks it; exporters are measured against it.
Float functions keep the dtype they are given (float64 in tests). Integer functions take int8 codes and give int8 codes.
All functions take any number of images N, whatever the stored shape says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from edgecomp import quantmath
from edgecomp.curves import CURVES, curve_codes
from edgecomp.errors import GraphError
from edgecomp.graph import Array, Attribute, Node, Op, QuantParams, Tensor

SHARES_SCALE = frozenset({Op.MAX_POOL, Op.AVG_POOL, Op.CONCAT, Op.GATHER, Op.FLATTEN, Op.RESHAPE, Op.CLIP})
"""Operators that only move, compare or average codes: all they read and write has one scale and zero point."""
PROBABILITIES = frozenset({Op.SOFTMAX, Op.SIGMOID})
"""Operators that make probabilities of logits; their codes are steps of 1/256, `quantmath.UNIT`."""

Shape = tuple[int, ...]
Attrs = Mapping[str, Attribute]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRow:
    """One operator.

    Attributes:
        arity: smallest and largest number of inputs.
        attributes: names, all required.
        optional: attributes that only a quantized node carries.
        shape: input shapes and attributes -> output shape.
        compute: input values and attributes -> output value, on real numbers.
        compute_integer: node, tensors by name, values by name -> codes of the output; None where an integer form makes
            no sense.
    """

    arity: tuple[int, int]
    attributes: tuple[str, ...]
    optional: tuple[str, ...] = ()
    shape: Callable[[Sequence[Shape], Attrs], Shape]
    compute: Callable[[Sequence[Array], Attrs], Array]
    compute_integer: Callable[[Node, Mapping[str, Tensor], Mapping[str, Array]], Array] | None


def ints(attrs: Attrs, name: str) -> tuple[int, ...]:
    """Read an attribute that is a tuple of whole numbers."""
    return cast("tuple[int, ...]", attrs[name])


def clamp_codes(node: Node) -> tuple[int, int]:
    """Give the codes a fused activation clamps to: the whole int8 range where nothing is fused."""
    low, high = ints(node.attrs, "clamp")
    return low, high


# ---- windows ---------------------------------------------------------------------------------------------------------


def _window_shape(x: Shape, kernel: Shape, attrs: Attrs) -> tuple[int, int]:
    top, left, bottom, right = ints(attrs, "pads")
    (sh, sw), (dh, dw) = ints(attrs, "stride"), ints(attrs, "dilation") if "dilation" in attrs else (1, 1)
    h = (x[2] + top + bottom - dh * (kernel[0] - 1) - 1) // sh + 1
    w = (x[3] + left + right - dw * (kernel[1] - 1) - 1) // sw + 1
    if h < 1 or w < 1:
        raise GraphError(f"window {kernel} with dilation {(dh, dw)} is larger than the padded image {x[2:]}")
    return h, w


def _windows(x: Array, kernel: Shape, attrs: Attrs, fill: float) -> Array:
    """Cut x (N, C, H, W), padded with `fill`, into (N, C, OH, OW, KH, KW), without copying."""
    top, left, bottom, right = ints(attrs, "pads")
    (sh, sw), (dh, dw) = ints(attrs, "stride"), ints(attrs, "dilation") if "dilation" in attrs else (1, 1)
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    reach = (dh * (kernel[0] - 1) + 1, dw * (kernel[1] - 1) + 1)
    view = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(2, 3))
    return view[:, :, ::sh, ::sw, ::dh, ::dw]


def _correlate(x: Array, weight: Array, attrs: Attrs) -> Array:
    """Sum of products of a convolution, x already free of its zero point: (N, O, OH, OW)."""
    groups = int(cast("int", attrs["groups"]))
    windows = _windows(x, weight.shape[2:], attrs, 0)
    n, _, oh, ow = windows.shape[:4]
    o, i = weight.shape[:2]
    out = np.empty((n, o, oh, ow), dtype=np.result_type(x, weight))
    per = o // groups
    for g in range(groups):
        columns = windows[:, g * i : (g + 1) * i].transpose(0, 2, 3, 1, 4, 5).reshape(n * oh * ow, -1)
        product = columns @ weight[g * per : (g + 1) * per].reshape(per, -1).T
        out[:, g * per : (g + 1) * per] = product.reshape(n, oh, ow, per).transpose(0, 3, 1, 2)
    return out


# ---- weighted operators ----------------------------------------------------------------------------------------------


def _conv_shape(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    x, weight = shapes[0], shapes[1]
    groups = int(cast("int", attrs["groups"]))
    if len(x) != 4 or len(weight) != 4 or x[1] != weight[1] * groups or weight[0] % groups:
        raise GraphError(f"conv2d: input {x}, weight {weight} and groups {groups} do not fit together")
    return (x[0], weight[0], *_window_shape(x, weight[2:], attrs))


def _conv(values: Sequence[Array], attrs: Attrs) -> Array:
    out = _correlate(values[0], values[1], attrs)
    return out + values[2].reshape(1, -1, 1, 1) if len(values) > 2 else out


def _accumulator_to_codes(
    node: Node, tensors: Mapping[str, Tensor], values: Mapping[str, Array], total: Array
) -> Array:
    """Add the bias to sums of products (N, O, ...) held exactly in float64, rescale per channel, clamp."""
    column = (1, -1) + (1,) * (total.ndim - 2)
    accumulator = total.astype(np.int64)
    if len(node.inputs) > 2:
        accumulator = accumulator + values[node.inputs[2]].astype(np.int64).reshape(column)
    x, w, y = (_quant(tensors, name) for name in (node.inputs[0], node.inputs[1], node.outputs[0]))
    factor = quantmath.multiplier(w.scale.astype(np.float64) * float(x.scale) / float(y.scale))
    factor = quantmath.Multiplier(mantissa=factor.mantissa.reshape(column), shift=factor.shift.reshape(column))
    low, high = clamp_codes(node)
    return quantmath.requantize(accumulator, factor, int(y.zero_point), low=low, high=high)


def _centred(name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Array]) -> Array:
    """Codes without their zero point, in float64: products and sums of them are exact up to 2^53, and BLAS is fast."""
    return values[name].astype(np.float64) - float(_quant(tensors, name).zero_point)


def _conv_integer(node: Node, tensors: Mapping[str, Tensor], values: Mapping[str, Array]) -> Array:
    x = _centred(node.inputs[0], tensors, values)
    total = _correlate(x, values[node.inputs[1]].astype(np.float64), node.attrs)
    return _accumulator_to_codes(node, tensors, values, total)


def _linear_shape(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    x, weight = shapes[0], shapes[1]
    if len(x) != 2 or len(weight) != 2 or x[1] != weight[1]:
        raise GraphError(f"linear: input {x} and weight {weight} do not fit together")
    return (x[0], weight[0])


def _linear(values: Sequence[Array], attrs: Attrs) -> Array:
    out = values[0] @ values[1].T
    return out + values[2] if len(values) > 2 else out


def _linear_integer(node: Node, tensors: Mapping[str, Tensor], values: Mapping[str, Array]) -> Array:
    total = _centred(node.inputs[0], tensors, values) @ values[node.inputs[1]].astype(np.float64).T
    return _accumulator_to_codes(node, tensors, values, total)


# ---- elementwise and pools -------------------------------------------------------------------------------------------


def _same_shape(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    if any(s != shapes[0] for s in shapes):
        raise GraphError(f"inputs of shapes {list(shapes)}: expected equal shapes")
    return shapes[0]


def _add(values: Sequence[Array], attrs: Attrs) -> Array:
    return values[0] + values[1]


def _add_integer(node: Node, tensors: Mapping[str, Tensor], values: Mapping[str, Array]) -> Array:
    a, b = (values[name].astype(np.int64) - int(_quant(tensors, name).zero_point) for name in node.inputs)
    scale_a, scale_b = (float(_quant(tensors, name).scale) for name in node.inputs)
    y = _quant(tensors, node.outputs[0])
    m_a, m_b, shift = quantmath.add_multipliers(scale_a, scale_b, float(y.scale))
    total = (a * m_a + b * m_b + (1 << (shift - 1))) >> shift
    low, high = clamp_codes(node)
    result: Array = np.clip(total + int(y.zero_point), low, high).astype(np.int8)
    return result


def _mul_shape(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    a, b = shapes
    if a == b or (len(a) == 4 and b == (*a[:2], 1, 1)):
        return a
    if len(b) == 4 and a == (*b[:2], 1, 1):
        return b
    raise GraphError(f"inputs of shapes {list(shapes)}: expected equal shapes, or (N, C, 1, 1) beside (N, C, H, W)")


def _mul(values: Sequence[Array], attrs: Attrs) -> Array:
    return values[0] * values[1]


def _mul_integer(node: Node, tensors: Mapping[str, Tensor], values: Mapping[str, Array]) -> Array:
    a, b = node.inputs
    quants = (_quant(tensors, a), _quant(tensors, b))
    product = quantmath.multiply(values[a], values[b], quants, _quant(tensors, node.outputs[0]))
    result: Array = np.clip(product, *clamp_codes(node)).astype(np.int8)
    return result


def _curve(op: Op) -> OpRow:
    """Make the row of a function of one number."""

    def integer(node: Node, tensors: Mapping[str, Tensor], values: Mapping[str, Array]) -> Array:
        table = curve_codes(op, _quant(tensors, node.inputs[0]), _quant(tensors, node.outputs[0]))
        result: Array = table[values[node.inputs[0]].astype(np.int64) - quantmath.ACT_MIN]
        return result

    return OpRow(
        arity=(1, 1),
        attributes=(),
        shape=_same_shape,
        compute=lambda values, attrs: CURVES[op](values[0]),
        compute_integer=integer,
    )


def _clip(values: Sequence[Array], attrs: Attrs) -> Array:
    low, high = cast("float", attrs["low"]), cast("float", attrs["high"])
    return np.clip(values[0], low, high).astype(values[0].dtype, copy=False)


def _clip_integer(node: Node, tensors: Mapping[str, Tensor], values: Mapping[str, Array]) -> Array:
    low, high = clamp_codes(node)
    return np.clip(values[node.inputs[0]], low, high).astype(np.int8)


def _concat_shape(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    axis = cast("int", attrs["axis"]) % len(shapes[0])
    rests = {s[:axis] + s[axis + 1 :] for s in shapes}
    if len(rests) != 1:
        raise GraphError(f"concat: shapes {list(shapes)} differ beside axis {axis}")
    return (*shapes[0][:axis], sum(s[axis] for s in shapes), *shapes[0][axis + 1 :])


def _concat(values: Sequence[Array], attrs: Attrs) -> Array:
    return np.concatenate(values, axis=cast("int", attrs["axis"]))


def _gather_shape(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    n, n_channels, *rest = shapes[0]
    indices = ints(attrs, "indices")
    if not indices or not all(0 <= i < n_channels for i in indices):
        raise GraphError(f"gather: indices {indices!r:.60}, expected at least one, from 0 to {n_channels - 1}")
    return (n, len(indices), *rest)


def _gather(values: Sequence[Array], attrs: Attrs) -> Array:
    return np.take(values[0], ints(attrs, "indices"), axis=1)


def _pool_shape(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    x = shapes[0]
    return (*x[:2], *_window_shape(x, ints(attrs, "kernel"), attrs))


def _max_pool(values: Sequence[Array], attrs: Attrs) -> Array:
    # In padding the smallest value there is, so that it never wins.
    x = values[0]
    lowest = quantmath.ACT_MIN if x.dtype == np.int8 else -np.inf
    result: Array = _windows(x, ints(attrs, "kernel"), attrs, lowest).max(axis=(4, 5))
    return result


def window_counts(shape: Shape, attrs: Attrs) -> Array:
    """Count what an average pool divides by: (1, 1, OH, OW), all of the window or only what lies inside the image."""
    kernel = ints(attrs, "kernel")
    if attrs["include_pad"]:
        return np.full((1, 1, 1, 1), kernel[0] * kernel[1], dtype=np.float64)
    result: Array = _windows(np.ones((1, 1, *shape[2:])), kernel, attrs, 0).sum(axis=(4, 5))
    return result


def _avg_pool(values: Sequence[Array], attrs: Attrs) -> Array:
    x = values[0]
    total = _windows(x, ints(attrs, "kernel"), attrs, 0).sum(axis=(4, 5))
    result: Array = (total / window_counts(x.shape, attrs)).astype(x.dtype)
    return result


def _avg_pool_integer(node: Node, tensors: Mapping[str, Tensor], values: Mapping[str, Array]) -> Array:
    # Input and output share scale and zero point. Ties are common here (a quarter of all 2x2 means): they go to the
    # even neighbour. onnxruntime does so after adding the zero point: with an odd one its ties differ by a step.
    x = _centred(node.inputs[0], tensors, values)
    total = _windows(x, ints(node.attrs, "kernel"), node.attrs, 0).sum(axis=(4, 5)).astype(np.int64)
    count = window_counts(x.shape, node.attrs).astype(np.int64)
    below, rest = np.divmod(total, count)
    mean = below + (2 * rest + (below & 1) > count)
    result: Array = (mean + int(_quant(tensors, node.outputs[0]).zero_point)).astype(np.int8)
    return result


def _global_avg_shape(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    return (*shapes[0][:2], 1, 1)


def _global_avg(values: Sequence[Array], attrs: Attrs) -> Array:
    result: Array = values[0].mean(axis=(2, 3), keepdims=True)
    return result


def _global_avg_integer(node: Node, tensors: Mapping[str, Tensor], values: Mapping[str, Array]) -> Array:
    x, y = _quant(tensors, node.inputs[0]), _quant(tensors, node.outputs[0])
    total = _centred(node.inputs[0], tensors, values).sum(axis=(2, 3), keepdims=True).astype(np.int64)
    _, _, h, w = values[node.inputs[0]].shape
    factor = quantmath.multiplier(np.float64(x.scale) / (float(y.scale) * h * w))
    return quantmath.requantize(total, factor, int(y.zero_point))


# ---- shape, softmax, borders -----------------------------------------------------------------------------------------


def _flatten_shape(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    return (shapes[0][0], int(np.prod(shapes[0][1:])))


def _flatten(values: Sequence[Array], attrs: Attrs) -> Array:
    return values[0].reshape(values[0].shape[0], -1)


def _reshape_shape(shapes: Sequence[Shape], attrs: Attrs) -> Shape:
    shape = ints(attrs, "shape")
    if np.prod(shape) != np.prod(shapes[0]) or shape[0] != shapes[0][0]:
        raise GraphError(f"reshape: {shapes[0]} does not fit {shape}")
    return shape


def _reshape(values: Sequence[Array], attrs: Attrs) -> Array:
    return values[0].reshape(values[0].shape[0], *ints(attrs, "shape")[1:])


def _softmax(values: Sequence[Array], attrs: Attrs) -> Array:
    axis = cast("int", attrs["axis"])
    x = values[0] - values[0].max(axis=axis, keepdims=True)
    e = np.exp(x)
    result: Array = (e / e.sum(axis=axis, keepdims=True)).astype(values[0].dtype)
    return result


def _softmax_integer(node: Node, tensors: Mapping[str, Tensor], values: Mapping[str, Array]) -> Array:
    x = quantmath.dequantize(values[node.inputs[0]], _quant(tensors, node.inputs[0])).astype(np.float64)
    return quantmath.quantize(_softmax([x], node.attrs), _quant(tensors, node.outputs[0]))


def _identity(values: Sequence[Array], attrs: Attrs) -> Array:
    return values[0]


def _quantize(node: Node, tensors: Mapping[str, Tensor], values: Mapping[str, Array]) -> Array:
    return quantmath.quantize(values[node.inputs[0]], _quant(tensors, node.outputs[0]))


def _dequantize(node: Node, tensors: Mapping[str, Tensor], values: Mapping[str, Array]) -> Array:
    return quantmath.dequantize(values[node.inputs[0]], _quant(tensors, node.inputs[0]))


def _quant(tensors: Mapping[str, Tensor], name: str) -> QuantParams:
    params = tensors[name].quant
    if params is None:
        raise GraphError(f"tensor {name!r} has no quantization parameters")
    return params


def _on_codes(
    compute: Callable[[Sequence[Array], Attrs], Array],
) -> Callable[[Node, Mapping[str, Tensor], Mapping[str, Array]], Array]:
    """Make the integer form of an operator that only moves or compares codes: inputs and output share their scale."""

    def integer(node: Node, tensors: Mapping[str, Tensor], values: Mapping[str, Array]) -> Array:
        return compute([values[name] for name in node.inputs], node.attrs)

    return integer


OPS: Mapping[Op, OpRow] = {
    # x (N, C, H, W), weight (O, C/G, KH, KW), bias (O,). pads = top, left, bottom, right; zeros.
    Op.CONV2D: OpRow(
        arity=(2, 3),
        attributes=("stride", "pads", "dilation", "groups"),
        optional=("clamp",),
        shape=_conv_shape,
        compute=_conv,
        compute_integer=_conv_integer,
    ),
    # x (N, F), weight (O, F), bias (O,)
    Op.LINEAR: OpRow(
        arity=(2, 3),
        attributes=(),
        optional=("clamp",),
        shape=_linear_shape,
        compute=_linear,
        compute_integer=_linear_integer,
    ),
    # two tensors of one shape
    Op.ADD: OpRow(
        arity=(2, 2),
        attributes=(),
        optional=("clamp",),
        shape=_same_shape,
        compute=_add,
        compute_integer=_add_integer,
    ),
    # two tensors of one shape, or (N, C, 1, 1) beside (N, C, H, W): the gate of squeeze and excitation
    Op.MUL: OpRow(
        arity=(2, 2),
        attributes=(),
        optional=("clamp",),
        shape=_mul_shape,
        compute=_mul,
        compute_integer=_mul_integer,
    ),
    Op.CONCAT: OpRow(
        arity=(1, 1 << 16),
        attributes=("axis",),
        shape=_concat_shape,
        compute=_concat,
        compute_integer=_on_codes(_concat),
    ),
    # out[:, k] = x[:, indices[k]]: a channel shuffle, or some of the channels
    Op.GATHER: OpRow(
        arity=(1, 1),
        attributes=("indices",),
        shape=_gather_shape,
        compute=_gather,
        compute_integer=_on_codes(_gather),
    ),
    Op.MAX_POOL: OpRow(
        arity=(1, 1),
        attributes=("kernel", "stride", "pads", "dilation"),
        shape=_pool_shape,
        compute=_max_pool,
        compute_integer=_on_codes(_max_pool),
    ),
    # include_pad: 1 divides by the whole window, 0 by what lies inside the image
    Op.AVG_POOL: OpRow(
        arity=(1, 1),
        attributes=("kernel", "stride", "pads", "include_pad"),
        shape=_pool_shape,
        compute=_avg_pool,
        compute_integer=_avg_pool_integer,
    ),
    # mean over H and W, both kept as 1
    Op.GLOBAL_AVG_POOL: OpRow(
        arity=(1, 1), attributes=(), shape=_global_avg_shape, compute=_global_avg, compute_integer=_global_avg_integer
    ),
    # ReLU is low 0, high inf; ReLU6 low 0, high 6. In a quantized graph input and output share their scale.
    Op.CLIP: OpRow(
        arity=(1, 1),
        attributes=("low", "high"),
        optional=("clamp",),
        shape=_same_shape,
        compute=_clip,
        compute_integer=_clip_integer,
    ),
    # see `curves`
    **{op: _curve(op) for op in CURVES},
    # (N, C, H, W) -> (N, C*H*W)
    Op.FLATTEN: OpRow(
        arity=(1, 1),
        attributes=(),
        shape=_flatten_shape,
        compute=_flatten,
        compute_integer=_on_codes(_flatten),
    ),
    Op.RESHAPE: OpRow(
        arity=(1, 1),
        attributes=("shape",),
        shape=_reshape_shape,
        compute=_reshape,
        compute_integer=_on_codes(_reshape),
    ),
    Op.SOFTMAX: OpRow(
        arity=(1, 1), attributes=("axis",), shape=_same_shape, compute=_softmax, compute_integer=_softmax_integer
    ),
    # float32 -> codes, and back: the borders of a quantized graph
    Op.QUANTIZE: OpRow(
        arity=(1, 1), attributes=(), shape=_same_shape, compute=_identity, compute_integer=_quantize
    ),
    Op.DEQUANTIZE: OpRow(
        arity=(1, 1), attributes=(), shape=_same_shape, compute=_identity, compute_integer=_dequantize
    ),
}
