"""What each ATen operator of an exported program means in edgecomp's graph: one row of `TRANSLATORS` an operator."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import torch

from edgecomp.errors import CaptureError, GraphError
from edgecomp.graph import WEIGHTED, Array, Op
from edgecomp.ops import Shape
from edgecomp.pytorch.calls import Activation, Arranged, Call, Expanded, Padded, Value, in_graph, operator_name


def _with_bias(weight: Array, bias: Array | None) -> dict[str, Array]:
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias.reshape(-1)}


# ---- layers with weights ---------------------------------------------------------------------------------------------


def _conv(call: Call) -> Value:
    if call.args.get("transposed"):
        raise call.refuse("that is transposed is not supported")
    weight = call.weight("weight")
    if weight.ndim not in (3, 4):
        raise call.refuse(f"with a kernel of shape {weight.shape} is not supported")
    x, around = call.padded("input", ndim=weight.ndim)
    weight = weight.reshape(in_graph(weight.shape))
    dilation = call.pair("dilation")
    padding = call.args["padding"]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        # As torch does: where the sum is odd, the larger part goes to the right and to the bottom.
        pads = (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
    else:
        h, w = (0, 0) if padding == "valid" else call.pair("padding")
        pads = (h, w, h, w)
    return call.emit(
        Op.CONV2D,
        [x],
        weights=_with_bias(weight, call.constant("bias")),
        stride=call.pair("stride"),
        pads=tuple(a + b for a, b in zip(pads, around, strict=True)),
        dilation=dilation,
        groups=int(call.args["groups"]),
    )


def _linear(call: Call) -> Value:
    weights = _with_bias(call.weight("weight"), call.constant("bias"))
    return call.emit(Op.LINEAR, [call.activation("input", ndim=2)], weights=weights)


def _matmul(call: Call) -> Value:
    """Multiply activations (N, F) by a weight (F, O)."""
    weight = call.weight("mat2" if "mat2" in call.args else "other")
    if weight.ndim != 2:
        raise call.refuse(f"with a weight of shape {weight.shape} is not supported")
    return call.emit(Op.LINEAR, [call.activation("self", ndim=2)], weights={"weight": weight.T})


def _addmm(call: Call) -> Value:
    bias, weight = call.weight("self"), call.weight("mat2")
    if call.args["alpha"] != 1 or call.args["beta"] != 1 or bias.size != weight.shape[1]:
        raise call.refuse("with alpha, beta or a bias that is not one number an output is not supported")
    return call.emit(Op.LINEAR, [call.activation("mat1", ndim=2)], weights=_with_bias(weight.T, bias))


def _batch_norm(call: Call) -> Value:
    """Scale and shift each channel: inside the layer before where that layer's output goes nowhere else."""
    x = call.activation("input")
    mean, variance = call.constant("running_mean"), call.constant("running_var")
    if call.args.get("training") or mean is None or variance is None:
        raise call.refuse("that takes its statistics from the batch is not supported: call model.eval() before export")
    variance = variance.astype(np.float64) + float(call.args["eps"])
    if not (variance > 0).all():
        raise CaptureError(f"layer {call.layer!r}: running_var holds a negative number; expected a variance")
    weight, bias = call.constant("weight"), call.constant("bias")
    scale = (1.0 if weight is None else weight.astype(np.float64)) / np.sqrt(variance)
    shift = (0.0 if bias is None else bias.astype(np.float64)) - mean.astype(np.float64) * scale
    if len(x.shape) not in (2, 3, 4):
        raise call.refuse(f"on a tensor of shape {x.shape} is not supported, only 2 to 4 dimensions")
    folded = _fold(call, x, scale, shift)
    if folded is None:
        folded = _scale_channels(call, x, scale, shift)
    return (folded, None, None) if isinstance(call.node.meta["val"], (list, tuple)) else folded


def _fold(call: Call, x: Activation, scale: Array, shift: Array) -> Activation | None:
    """Multiply the layer that writes x, or give None where x is not a layer's or has another reader."""
    build = call.build
    index = next((i for i, node in enumerate(build.nodes) if node.outputs[0] == x.name), None)
    if index is None or build.nodes[index].op not in WEIGHTED or not call.sole(x):
        return None
    node = build.nodes[index]
    weight = cast("Array", build.tensors[node.inputs[1]].data).astype(np.float64)
    bias = build.tensors[node.inputs[2]].data if len(node.inputs) > 2 else None
    build.store(node.inputs[1], weight * scale.reshape((-1,) + (1,) * (weight.ndim - 1)))
    build.store(f"{node.name}.bias", shift if bias is None else bias.astype(np.float64) * scale + shift)
    build.nodes[index] = dataclasses.replace(node, inputs=(*node.inputs[:2], f"{node.name}.bias"))
    return x


def _scale_channels(call: Call, x: Activation, scale: Array, shift: Array) -> Activation:
    """Write scale and shift as a depthwise 1x1 convolution; features (N, F) become F channels of one pixel for it."""
    name = call.build.unique(call.layer, functional=call.functional)
    image = x
    if len(x.shape) == 2:
        reshaped = call.build.unique(f"{name}.reshape", functional=True)
        image = call.build.emit(reshaped, Op.RESHAPE, [x], shape=(*x.shape, 1, 1))
    out = call.build.emit(
        name,
        Op.CONV2D,
        [image],
        weights={"weight": scale.reshape(-1, 1, 1, 1), "bias": shift},
        stride=(1, 1),
        pads=(0, 0, 0, 0),
        dilation=(1, 1),
        groups=x.shape[1],
    )
    return Activation(name, x.shape) if image is x else _flatten_after(call, out)


def _flatten_after(call: Call, x: Activation) -> Activation:
    """Flatten what this call has just written."""
    return call.build.emit(call.build.unique(f"{x.name}.flatten", functional=True), Op.FLATTEN, [x])


# ---- elementwise -----------------------------------------------------------------------------------------------------


def _clip(low: float | str, high: float | str) -> Callable[[Call], Value]:
    """Translate to clip; a bound is a number, or the name of the argument that holds it."""

    def translate(call: Call) -> Value:
        bounds = []
        for bound, absent in ((low, -math.inf), (high, math.inf)):
            value = call.args[bound] if isinstance(bound, str) else bound
            if isinstance(value, (Activation, torch.Tensor)):
                raise call.refuse("with a tensor as its bound is not supported")
            bounds.append(absent if value is None else float(value))
        return call.emit(Op.CLIP, [call.activation("self")], low=bounds[0], high=bounds[1])

    return translate


def _add(call: Call) -> Value:
    if call.args["alpha"] != 1:
        raise call.refuse(f"with alpha={call.args['alpha']} is not supported")
    a, b = call.activation("self"), call.activation("other")
    if a.shape != b.shape:
        raise call.refuse(f"of shapes {a.shape} and {b.shape} is not supported, only equal shapes")
    return call.emit(Op.ADD, [a, b])


def _mul(call: Call) -> Value:
    factors = []
    for name in ("self", "other"):
        value = call.args[name]
        factors.append(value.inner if isinstance(value, Expanded) else call.activation(name))
    a, b = factors
    if all(isinstance(call.args[name], Expanded) for name in ("self", "other")):
        raise call.refuse("of two tensors that were expanded is not supported")
    if len(a.shape) == len(b.shape):
        with contextlib.suppress(GraphError):
            return call.emit(Op.MUL, factors)
    raise call.refuse(f"of shapes {a.shape} and {b.shape} is not supported, only equal shapes, or one value a channel "
                      "(N, C, 1, 1)")  # fmt: skip


def _function(op: Op) -> Callable[[Call], Value]:
    """Translate to a function of one number."""
    return lambda call: call.emit(op, [call.activation("self")])


def _expand(call: Call) -> Value:
    x, shape = call.activation("self"), call.out_shape()
    if shape != x.shape and len(shape) in (3, 4) and x.shape == (*shape[:2], 1, 1)[: len(shape)]:
        return Expanded(x, shape)
    return _same(call)


def _cat(call: Call) -> Value:
    parts = call.args["tensors"]
    for part in parts:
        call.refuse_unfinished(part)
    if not all(isinstance(part, Activation) for part in parts):
        raise call.refuse("with a constant tensor is not supported")
    ndim = len(parts[0].shape)
    axis = int(call.args["dim"]) % ndim
    if axis != 1 or ndim not in (2, 3, 4):
        raise call.refuse(f"along axis {axis} of {ndim} is not supported, only channels (axis 1)")
    return cast("Value", parts[0]) if len(parts) == 1 else call.emit(Op.CONCAT, parts, axis=axis)


def _softmax(call: Call) -> Value:
    x = call.activation("self")
    axis = int(call.args["dim"]) % len(x.shape)
    if axis == 0:
        raise call.refuse("along the batch is not supported")
    if call.args.get("half_to_float") or call.args.get("dtype") not in (None, torch.float32):
        raise call.refuse("with a change of dtype is not supported")
    return call.emit(Op.SOFTMAX, [x], axis=3 if (len(x.shape), axis) == (3, 2) else axis)


# ---- pools -----------------------------------------------------------------------------------------------------------


def _extra(call: Call, x: Activation, reach: Sequence[int]) -> tuple[int, int]:
    """Give the rows and columns past torch's padding that ceil_mode's last windows touch."""
    out, size = in_graph(call.out_shape())[2:], in_graph(x.shape)[2:]
    stride, padding = call.pair("stride"), call.pair("padding")
    needed = [(out[i] - 1) * stride[i] + reach[i] - size[i] - 2 * padding[i] for i in (0, 1)]
    return max(0, needed[0]), max(0, needed[1])


def _pooled(call: Call) -> Activation:
    """Read what a pool pools: a signal or an image, as the operator's name says."""
    return call.activation("self", ndim=3 if "1d" in operator_name(call.node) else 4)


def _max_pool(call: Call) -> Value:
    x = _pooled(call)
    kernel, dilation, (h, w) = call.pair("kernel_size"), call.pair("dilation"), call.pair("padding")
    down, right = _extra(call, x, [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)])
    pooled = call.emit(
        Op.MAX_POOL,
        [x],
        kernel=kernel,
        stride=call.pair("stride"),
        pads=(h, w, h + down, w + right),
        dilation=dilation,
    )
    return (pooled, None) if isinstance(call.node.meta["val"], (list, tuple)) else pooled


def _avg_pool(call: Call) -> Value:
    if call.args.get("divisor_override") is not None:
        raise call.refuse("with divisor_override is not supported")
    x = _pooled(call)
    kernel, (h, w) = call.pair("kernel_size"), call.pair("padding")
    down, right = _extra(call, x, kernel)
    include = bool(call.args["count_include_pad"]) and (h, w) != (0, 0)
    if include and (down, right) != (0, 0):
        # torch then counts its padding but not what ceil_mode adds: neither of the two ways to count that we know.
        raise call.refuse("with ceil_mode, padding and count_include_pad together is not supported")
    return call.emit(
        Op.AVG_POOL,
        [x],
        kernel=kernel,
        stride=call.pair("stride"),
        pads=(h, w, h + down, w + right),
        include_pad=int(include),
    )


def _adaptive_pool(call: Call) -> Value:
    x = _pooled(call)
    out, size = in_graph(call.out_shape())[2:], in_graph(x.shape)[2:]
    maximum = "max" in operator_name(call.node)
    if out == size:
        pooled = x
    elif out == (1, 1) and not maximum:
        pooled = call.emit(Op.GLOBAL_AVG_POOL, [x])
    elif size[0] % out[0] or size[1] % out[1]:
        raise call.refuse(f"from {size} to {out} is not supported, only to (1, 1) or to sizes that divide the input's")
    else:
        step = (size[0] // out[0], size[1] // out[1])
        if maximum:
            pooled = call.emit(Op.MAX_POOL, [x], kernel=step, stride=step, pads=(0, 0, 0, 0), dilation=(1, 1))
        else:
            pooled = call.emit(Op.AVG_POOL, [x], kernel=step, stride=step, pads=(0, 0, 0, 0), include_pad=0)
    return (pooled, None) if maximum else pooled


def _mean(call: Call) -> Value:
    x = call.activation("self")
    axes = sorted(int(axis) % len(x.shape) for axis in call.args.get("dim") or ())
    rest = [n for axis, n in enumerate(x.shape) if axis not in axes]
    if not axes or axes[0] < 2 or math.prod(rest) != x.shape[1] or call.args["dtype"] not in (None, torch.float32):
        raise call.refuse(f"over axes {axes or 'all'} is not supported, only over all of space (2, 3)")
    pooled = call.emit(Op.GLOBAL_AVG_POOL, [x])
    return _flatten_after(call, pooled) if len(call.out_shape()) == 2 else pooled


# ---- some channels, or all in another order --------------------------------------------------------------------------


_NO_SHUFFLE = "is not supported, only of axes that a view has made of the channels: a channel shuffle"


def _gather(call: Call, x: Activation, indices: Array) -> Activation:
    if np.array_equal(indices, np.arange(x.shape[1])):
        return x
    return call.emit(Op.GATHER, [x], indices=tuple(indices.tolist()))


def _channel_shuffle(call: Call) -> Value:
    x, groups = call.activation("self"), int(call.args["groups"])
    return _gather(call, x, np.arange(x.shape[1]).reshape(groups, -1).T.ravel())


def _transpose(call: Call) -> Value:
    """Let axes of channels change places, as between the two views of a channel shuffle."""
    value = call.args["self"]
    x = value if isinstance(value, Arranged) else _ungrouped(call, call.activation("self"))
    order = np.arange(len(call.out_shape()))
    if "dims" in call.args:
        order = np.array(call.args["dims"]) % len(order)
    else:
        axes = [call.args["dim0"], call.args["dim1"]]
        order[axes] = order[axes[::-1]]
    ends = [0, *range(1 + x.channels.ndim, len(order))]
    if not np.array_equal(order[ends], ends):
        raise call.refuse(_NO_SHUFFLE)
    return Arranged(x.inner, x.channels.transpose([i - 1 for i in order[1 : 1 + x.channels.ndim]]))


def _ungrouped(call: Call, x: Activation) -> Arranged:
    """See an activation whose channels a view has put into several axes as what the view was of."""
    view = next((node for node in call.build.nodes if node.outputs[0] == x.name and node.op is Op.RESHAPE), None)
    if view is None:
        raise call.refuse(_NO_SHUFFLE)
    source = Activation(view.inputs[0], call.build.tensors[view.inputs[0]].shape)
    axes = _channel_axes(x.shape, source)
    if len(axes) < 2:
        raise call.refuse(_NO_SHUFFLE)
    return Arranged(source, np.arange(source.shape[1]).reshape(axes))


def _channel_axes(shape: Shape, source: Activation) -> Shape:
    """Give the axes of a view that are the channels of what it is of; () if it has none that are.

    A signal is an image of one row here, and has no row in the model.
    """
    rest = source.shape[2:]
    for others in (rest, rest[1:]) if rest[:1] == (1,) else (rest,):
        axes = shape[1 : len(shape) - len(others)]
        if shape[1 + len(axes) :] == others and math.prod(axes) == source.shape[1]:
            return axes
    return ()


def _regrouped(call: Call, x: Arranged) -> Value:
    """Put channels that changed places into one axis again, or into others."""
    shape = call.out_shape()
    axes = _channel_axes(shape, x.inner)
    if shape[:1] != (1,) or not axes:
        raise call.refuse(f"of channels that were transposed, to {shape}, is not supported, only to (N, C, H, W)")
    channels = x.channels.reshape(axes)
    return _gather(call, x.inner, channels) if channels.ndim == 1 else Arranged(x.inner, channels)


def _parts(call: Call) -> Value:
    """Cut channels into runs: chunk and split."""
    x, axis = call.activation("self"), int(call.args["dim"]) % len(call.out_shape())
    if axis != 1:
        raise call.refuse(f"along axis {axis} is not supported, only channels (axis 1)")
    borders = np.cumsum([part.shape[1] for part in call.node.meta["val"]])[:-1]
    # A part without channels has nothing to give; whoever reads it is refused.
    return tuple(_gather(call, x, run) if run.size else None for run in np.split(np.arange(x.shape[1]), borders))


def _slice(call: Call) -> Value:
    """Take a run of channels: slice and narrow."""
    x, shape = call.activation("self"), call.out_shape()
    if shape == x.shape:
        return x
    axis = int(call.args["dim"]) % len(shape)
    if axis != 1 or not shape[1]:
        raise call.refuse(f"of {x.shape} to {shape} is not supported, only of channels (axis 1)")
    start, step = int(call.args["start"] or 0), int(call.args.get("step", 1))
    return _gather(call, x, np.arange(x.shape[1])[start:][::step][: shape[1]])


# ---- shape, and what disappears --------------------------------------------------------------------------------------


def _reshape(call: Call) -> Value:
    name = "input" if "input" in call.args else "self"
    if isinstance(call.args[name], Arranged):
        return _regrouped(call, call.args[name])
    x, shape = call.activation(name), call.out_shape()
    if shape == x.shape:
        return x
    if not shape or shape[0] != 1:
        raise call.refuse(f"from {x.shape} to {shape} is not supported: the first axis must stay the batch of 1")
    if in_graph(shape) == in_graph(x.shape):
        return Activation(x.name, shape)
    return call.emit(Op.FLATTEN, [x]) if len(shape) == 2 else call.emit(Op.RESHAPE, [x], shape=in_graph(shape))


def _same(call: Call) -> Value:
    name = "input" if "input" in call.args else "self"
    if call.args.get("train"):
        raise call.refuse("that stays on after training is not supported: pass training=self.training to it")
    if isinstance(call.args[name], Arranged) and call.node.meta["val"].dtype == torch.float32:
        return cast("Value", call.args[name])
    x = call.activation(name)
    if call.node.meta["val"].dtype != torch.float32 or call.out_shape() != x.shape:
        raise call.refuse(f"to {call.node.meta['val'].dtype} {call.out_shape()} is not supported")
    return x


def _pad(call: Call) -> Value:
    """Put zeros around an image or a signal: "same" padding of other frameworks, or that of causal convolutions."""
    ndim = min(4, max(3, len(call.out_shape())))
    x, around = call.padded("self", ndim=ndim)
    mode, value = call.args.get("mode", "constant"), call.args.get("value")
    if mode != "constant" or value not in (None, 0):
        raise call.refuse(f"with mode {mode!r} and value {value} is not supported, only with zeros")
    left, right, top, bottom, *others = *(int(n) for n in call.args["pad"]), *(0,) * 4
    if any(others) or min(left, right, top, bottom) < 0 or (ndim == 3 and (top, bottom) != (0, 0)):
        raise call.refuse(f"by {call.args['pad']} is not supported, only outwards and around the image")
    return Padded(x, (around[0] + top, around[1] + left, around[2] + bottom, around[3] + right))


_RESHAPES = ("flatten", "view", "reshape", "_unsafe_view", "squeeze", "unsqueeze", "unflatten", "view_as")
_SAME = ("dropout", "feature_dropout", "alpha_dropout", "detach", "alias", "contiguous", "to")
_EXPANDS = ("expand", "expand_as")
_COPIES = ("clone", "_to_copy", "lift_fresh_copy")

_TRANSPOSES = ("transpose", "permute")
_PARTS = ("chunk", "split", "split_with_sizes")
_SLICES = ("slice", "narrow")

VIEWS = frozenset((*_RESHAPES, *_SAME, *_EXPANDS, *_TRANSPOSES, *_PARTS, *_SLICES, "getitem"))
"""Operators whose output shares memory with their input: what is then done in place to one is done to the other."""

TRANSLATORS: Mapping[str, Callable[[Call], Value]] = {
    "conv1d": _conv,
    "conv2d": _conv,
    "convolution": _conv,
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "addmm": _addmm,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "relu": _clip(0.0, math.inf),
    "relu6": _clip(0.0, 6.0),
    "hardtanh": _clip("min_val", "max_val"),
    "clamp": _clip("min", "max"),
    "clip": _clip("min", "max"),
    "clamp_min": _clip("min", math.inf),
    "clamp_max": _clip(-math.inf, "max"),
    "sigmoid": _function(Op.SIGMOID),
    "hardsigmoid": _function(Op.HARD_SIGMOID),
    "silu": _function(Op.SILU),
    "hardswish": _function(Op.HARD_SWISH),
    "add": _add,
    "mul": _mul,
    "cat": _cat,
    "concat": _cat,
    "concatenate": _cat,
    "softmax": _softmax,
    "_softmax": _softmax,
    "max_pool1d": _max_pool,
    "max_pool1d_with_indices": _max_pool,
    "max_pool2d": _max_pool,
    "max_pool2d_with_indices": _max_pool,
    "avg_pool1d": _avg_pool,
    "avg_pool2d": _avg_pool,
    "adaptive_avg_pool1d": _adaptive_pool,
    "adaptive_avg_pool2d": _adaptive_pool,
    "_adaptive_avg_pool2d": _adaptive_pool,
    "adaptive_max_pool1d": _adaptive_pool,
    "adaptive_max_pool2d": _adaptive_pool,
    "mean": _mean,
    "pad": _pad,
    "constant_pad_nd": _pad,
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(_EXPANDS, _expand),
    **dict.fromkeys(_TRANSPOSES, _transpose),
    **dict.fromkeys(_PARTS, _parts),
    **dict.fromkeys(_SLICES, _slice),
    "channel_shuffle": _channel_shuffle,
    **dict.fromkeys((*_SAME, *_COPIES), _same),
}
