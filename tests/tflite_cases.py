"""Small graphs for exporters, one feature each, with the operators that a TFLite file of them should have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgecomp.graph import Graph, Op
from tests.graphs import Build


def flat(b: Build, name: str, x: str) -> str:
    return b.node(Op.FLATTEN, name, (x,), {})


def reshape(b: Build, x: str, *shape: int) -> str:
    return b.node(Op.RESHAPE, "reshaped", (x,), {"shape": shape})


def gather(b: Build, x: str, *indices: int) -> str:
    return b.node(Op.GATHER, "gathered", (x,), {"indices": indices})


def add(b: Build, x: str, y: str) -> str:
    return b.node(Op.ADD, "add", (x, y), {})


def flat_concat_linear(b: Build) -> str:
    x = flat(b, "f", b.conv("c", "input", 4))
    y = flat(b, "g", b.max_pool("p", "input"))
    return b.linear("fc", b.clip("relu", b.node(Op.CONCAT, "cat", (x, y), {"axis": 1})), 9)


def flat_sum_linear(b: Build) -> str:
    return b.linear("fc", add(b, flat(b, "f", b.conv("c", "input", 4)), flat(b, "g", b.conv("d", "input", 4))), 9)


def flat_sum_of_two_orders(b: Build) -> str:
    return b.linear("fc", add(b, flat(b, "f", "input"), b.linear("fc1", flat(b, "g", "input"), 192)), 9)


def flat_product_linear(b: Build) -> str:
    x, y = b.conv("c", "input", 4), b.function(Op.SIGMOID, "s", b.conv("d", "input", 4))
    return b.linear("fc", b.mul("m", flat(b, "f", x), flat(b, "g", y)), 9)


def beside(b: Build, x: str) -> str:
    """Let x share its scale with the input."""
    return b.node(Op.CONCAT, "cat", (x, "input"), {"axis": 1})


@dataclass(frozen=True, kw_only=True)
class Case:
    """A small graph.

    Attributes:
        build: makes it from an input of `shape`, gives the output's name.
        ops: the operators of its 8-bit file with int8 input and output.
        steps: how far the output may be from the reference: one last-place step for each operator that rounds, twice
            that behind a softmax's exponential.
    """

    build: Callable[[Build], str]
    ops: str
    shape: tuple[int, ...] = (3, 8, 8)
    steps: int = 1


CASES = {
    "conv": Case(build=lambda b: b.conv("c", "input", 5), ops="CONV_2D"),
    "conv relu": Case(build=lambda b: b.clip("r", b.conv("c", "input", 5)), ops="CONV_2D+RELU"),
    "conv relu6": Case(build=lambda b: b.clip("r", b.conv("c", "input", 5), 0, 6), ops="CONV_2D+RELU"),
    "conv hardtanh": Case(build=lambda b: b.clip("r", b.conv("c", "input", 5), -1, 1), ops="CONV_2D+RELU_N1_TO_1"),
    "conv clip": Case(build=lambda b: b.clip("r", b.conv("c", "input", 5), -0.5, 0.25), ops="CONV_2D"),
    "conv without bias": Case(build=lambda b: b.conv("c", "input", 5, bias=False), ops="CONV_2D"),
    "conv 1x1": Case(
        build=lambda b: b.clip("r", b.conv("c", "input", 7, (1, 1), pads=(0, 0, 0, 0))),
        ops="CONV_2D+RELU",
        shape=(5, 6, 4),
    ),
    "conv 1x1 stride 2": Case(
        build=lambda b: b.conv("c", "input", 7, (1, 1), stride=(2, 2), pads=(0, 0, 0, 0)), ops="CONV_2D"
    ),
    "conv 3x2": Case(
        build=lambda b: b.conv("c", "input", 5, (3, 2), stride=(1, 2), pads=(0, 0, 0, 0)),
        ops="CONV_2D",
        shape=(3, 7, 9),
    ),
    "conv dilated": Case(build=lambda b: b.conv("c", "input", 5, pads=(2, 2, 2, 2), dilation=(2, 2)), ops="CONV_2D"),
    "conv dilated, odd pads": Case(
        build=lambda b: b.conv("c", "input", 5, pads=(1, 0, 2, 3), dilation=(2, 1)), ops="PAD CONV_2D"
    ),
    "conv asymmetric pads": Case(build=lambda b: b.conv("c", "input", 5, pads=(1, 0, 2, 3)), ops="PAD CONV_2D"),
    "conv stride 2, even": Case(build=lambda b: b.conv("c", "input", 5, stride=(2, 2)), ops="PAD CONV_2D"),
    "conv stride 2, odd": Case(build=lambda b: b.conv("c", "input", 5, stride=(2, 2)), ops="CONV_2D", shape=(3, 9, 9)),
    "conv pads bottom and right": Case(
        build=lambda b: b.conv("c", "input", 5, stride=(2, 2), pads=(0, 0, 1, 1)), ops="CONV_2D"
    ),
    "conv depthwise": Case(
        build=lambda b: b.clip("r", b.conv("c", "input", 6, groups=6)), ops="DEPTHWISE_CONV_2D+RELU", shape=(6, 8, 8)
    ),
    "conv depthwise multiplier": Case(
        build=lambda b: b.conv("c", "input", 9, groups=3, stride=(2, 2)), ops="PAD DEPTHWISE_CONV_2D"
    ),
    "conv depthwise dilated": Case(
        build=lambda b: b.conv("c", "input", 3, groups=3, pads=(2, 2, 2, 2), dilation=(2, 2)), ops="DEPTHWISE_CONV_2D"
    ),
    "conv grouped": Case(build=lambda b: b.conv("c", "input", 4, groups=2), ops="CONV_2D", shape=(6, 8, 8)),
    "conv grouped dilated": Case(
        build=lambda b: b.conv("c", "input", 6, groups=2, pads=(2, 2, 2, 2), dilation=(2, 2)),
        ops="CONV_2D",
        shape=(4, 8, 8),
    ),
    "conv of one channel": Case(build=lambda b: b.conv("c", "input", 4), ops="CONV_2D", shape=(1, 8, 8)),
    "residual add": Case(
        build=lambda b: b.clip("r", add(b, b.conv("c", "input", 3), "input")), ops="CONV_2D ADD+RELU", steps=2
    ),
    # A step of the convolution is several of the product.
    "mul": Case(build=lambda b: b.mul("m", b.conv("c", "input", 3), "input"), ops="CONV_2D MUL", steps=4),
    "mul relu": Case(
        build=lambda b: b.clip("r", b.mul("m", b.conv("c", "input", 3), "input")), ops="CONV_2D MUL+RELU", steps=4
    ),
    "sigmoid": Case(build=lambda b: b.function(Op.SIGMOID, "s", b.max_pool("p", "input")), ops="MAX_POOL_2D LOGISTIC"),
    "sigmoid beside others": Case(
        build=lambda b: beside(b, b.function(Op.SIGMOID, "s", "input")),
        ops="LOGISTIC QUANTIZE CONCATENATION",
    ),
    "softmax beside others": Case(
        build=lambda b: beside(b, b.node(Op.SOFTMAX, "s", ("input",), {"axis": 1})),
        ops="SOFTMAX QUANTIZE CONCATENATION",
    ),
    "hard sigmoid": Case(build=lambda b: b.function(Op.HARD_SIGMOID, "s", "input"), ops="MUL ADD+RELU"),
    "hard sigmoid of features": Case(
        build=lambda b: b.function(Op.HARD_SIGMOID, "s", "input"), ops="MUL ADD+RELU", shape=(17,)
    ),
    "hard sigmoid beside others": Case(
        build=lambda b: beside(b, b.function(Op.HARD_SIGMOID, "s", "input")),
        ops="MUL ADD MAXIMUM MINIMUM CONCATENATION",
    ),
    "silu": Case(build=lambda b: b.function(Op.SILU, "s", "input"), ops="LOGISTIC MUL"),
    "silu of what is mostly below zero": Case(
        build=lambda b: b.function(Op.SILU, "s", b.clip("r", "input", -20, 0.1)),
        ops="MAXIMUM MINIMUM DEQUANTIZE LOGISTIC MUL QUANTIZE",
    ),
    "hard swish": Case(build=lambda b: b.function(Op.HARD_SWISH, "s", "input"), ops="MUL ADD MUL"),
    "hard swish of what is mostly below zero": Case(
        build=lambda b: b.function(Op.HARD_SWISH, "s", b.clip("r", "input", -20, 0.1)),
        ops="MAXIMUM MINIMUM DEQUANTIZE HARD_SWISH QUANTIZE",
    ),
    "squeeze and excitation": Case(
        build=lambda b: b.squeezed("se", "input", 4, None, Op.HARD_SIGMOID),
        ops="MEAN CONV_2D+RELU CONV_2D MUL ADD+RELU MUL",
        steps=2,
    ),
    "flatten to product to linear": Case(
        build=flat_product_linear, ops="CONV_2D CONV_2D LOGISTIC RESHAPE RESHAPE MUL FULLY_CONNECTED", steps=3
    ),
    "concat": Case(
        build=lambda b: b.node(Op.CONCAT, "cat", (b.conv("c", "input", 5), b.conv("d", "input", 4)), {"axis": 1}),
        ops="CONV_2D CONV_2D CONCATENATION",
    ),
    "concat of rows": Case(
        build=lambda b: b.node(Op.CONCAT, "cat", (b.conv("c", "input", 5), b.conv("d", "input", 5)), {"axis": -2}),
        ops="CONV_2D CONV_2D CONCATENATION",
    ),
    "gather a run": Case(build=lambda b: gather(b, "input", 2, 3, 4), ops="STRIDED_SLICE", shape=(6, 8, 8)),
    "gather a run of features": Case(build=lambda b: gather(b, "input", 2, 3, 4), ops="STRIDED_SLICE", shape=(6,)),
    "shuffle in two groups": Case(
        build=lambda b: gather(b, "input", 0, 3, 1, 4, 2, 5), ops="RESHAPE TRANSPOSE RESHAPE", shape=(6, 8, 8)
    ),
    "shuffle in three groups": Case(
        build=lambda b: gather(b, "input", 0, 2, 4, 1, 3, 5), ops="RESHAPE TRANSPOSE RESHAPE", shape=(6,)
    ),
    "gather in any order": Case(build=lambda b: gather(b, "input", 5, 0, 1, 1), ops="GATHER", shape=(6, 8, 8)),
    "gather a run of groups": Case(
        build=lambda b: flat(b, "f", gather(b, reshape(b, "input", 1, 3, 2, 8, 8), 1, 2)),
        ops="TRANSPOSE RESHAPE GATHER RESHAPE",
        shape=(6, 8, 8),
    ),
    "gather of features": Case(build=lambda b: gather(b, "input", 0, 3, 1, 4, 2), ops="GATHER", shape=(6,)),
    "max pool": Case(build=lambda b: b.max_pool("p", "input", (3, 2)), ops="MAX_POOL_2D"),
    "max pool padded": Case(
        build=lambda b: b.max_pool("p", "input", (3, 3), pads=(1, 1, 1, 1)), ops="PADV2 MAX_POOL_2D"
    ),
    "max pool padded, after relu": Case(
        build=lambda b: b.max_pool("p", b.clip("r", b.conv("c", "input", 5)), (3, 3), pads=(1, 1, 1, 1)),
        ops="CONV_2D+RELU PAD MAX_POOL_2D",
    ),
    "max pool SAME": Case(
        build=lambda b: b.max_pool("p", "input", (3, 3), stride=(1, 1), pads=(1, 1, 1, 1)), ops="MAX_POOL_2D"
    ),
    "max pool ceil mode": Case(build=lambda b: b.max_pool("p", "input", (3, 3), pads=(0, 0, 1, 1)), ops="MAX_POOL_2D"),
    "avg pool": Case(build=lambda b: b.avg_pool("p", "input"), ops="AVERAGE_POOL_2D"),
    "avg pool counts padding": Case(
        build=lambda b: b.avg_pool("p", "input", (3, 3), pads=(1, 1, 1, 1)), ops="PAD AVERAGE_POOL_2D"
    ),
    "avg pool counts padding, SAME": Case(
        build=lambda b: b.avg_pool("p", "input", (3, 3), stride=(1, 1), pads=(1, 1, 1, 1)), ops="PAD AVERAGE_POOL_2D"
    ),
    "avg pool leaves padding out": Case(
        build=lambda b: b.avg_pool("p", "input", (3, 3), stride=(1, 1), pads=(1, 1, 1, 1), include_pad=0),
        ops="AVERAGE_POOL_2D",
    ),
    "global avg pool": Case(build=lambda b: b.node(Op.GLOBAL_AVG_POOL, "p", ("input",), {}), ops="MEAN"),
    "clip alone": Case(
        build=lambda b: b.clip("r", b.max_pool("p", "input"), -0.5, 0.25), ops="MAX_POOL_2D MAXIMUM MINIMUM"
    ),
    "relu alone": Case(build=lambda b: b.clip("r", b.max_pool("p", "input")), ops="MAX_POOL_2D RELU"),
    "relu6 alone": Case(
        build=lambda b: b.clip("r", b.max_pool("p", "input"), 0, 1.5), ops="MAX_POOL_2D MAXIMUM MINIMUM"
    ),
    "linear": Case(build=lambda b: b.clip("r", b.linear("fc", "input", 9)), ops="FULLY_CONNECTED+RELU", shape=(17,)),
    "linear without bias": Case(
        build=lambda b: b.linear("fc", "input", 9, bias=False), ops="FULLY_CONNECTED", shape=(6,)
    ),
    "flatten to linear": Case(
        build=lambda b: b.linear("fc", flat(b, "f", b.max_pool("p", "input")), 9),
        ops="MAX_POOL_2D RESHAPE FULLY_CONNECTED",
    ),
    "flatten to concat to linear": Case(
        build=flat_concat_linear, ops="CONV_2D RESHAPE MAX_POOL_2D RESHAPE CONCATENATION RELU FULLY_CONNECTED", steps=2
    ),
    "flatten to sum to linear": Case(
        build=flat_sum_linear, ops="CONV_2D RESHAPE CONV_2D RESHAPE ADD FULLY_CONNECTED", steps=3
    ),
    "flatten to sum of two orders": Case(
        build=flat_sum_of_two_orders,
        ops="TRANSPOSE RESHAPE RESHAPE FULLY_CONNECTED ADD FULLY_CONNECTED",
        steps=3,
    ),
    "flatten to output": Case(build=lambda b: flat(b, "f", "input"), ops="TRANSPOSE RESHAPE"),
    "flatten of pixels": Case(build=lambda b: flat(b, "f", "input"), ops="RESHAPE", shape=(7, 1, 1)),
    "flatten of a plane": Case(build=lambda b: flat(b, "f", "input"), ops="RESHAPE", shape=(1, 4, 5)),
    "reshape image": Case(build=lambda b: reshape(b, "input", 1, 6, 4, 8), ops="TRANSPOSE RESHAPE TRANSPOSE"),
    "reshape to rows": Case(build=lambda b: reshape(b, "input", 1, 3, 64), ops="TRANSPOSE RESHAPE"),
    "reshape to image": Case(build=lambda b: reshape(b, "input", 1, 2, 3, 4), ops="RESHAPE TRANSPOSE", shape=(24,)),
    "softmax": Case(
        build=lambda b: b.node(Op.SOFTMAX, "s", (b.clip("r", "input", -1.25, 1),), {"axis": 1}),
        ops="MAXIMUM MINIMUM SOFTMAX",
        shape=(10,),
    ),
    "softmax of channels": Case(
        build=lambda b: b.node(Op.SOFTMAX, "s", (b.max_pool("p", "input"),), {"axis": 1}), ops="MAX_POOL_2D SOFTMAX"
    ),
}


def made(case: str) -> Graph:
    b = Build(7, CASES[case].shape)
    return b.graph(CASES[case].build(b))
