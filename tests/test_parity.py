"""ONNX files in onnxruntime against the reference: whole tensors, operator by operator and network by network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from edgecomp import quantmath, reference
from edgecomp.compress import compress
from edgecomp.exporters.to_onnx import to_onnx
from edgecomp.graph import Array, Graph, Op
from edgecomp.plan import Io
from edgecomp.quantmath import WEIGHT_BITS
from tests.graphs import GRAPHS, alone, dense, images, multiplied, plan_for
from tests.onnx_run import onnx_run
from tests.tflite_cases import CASES, made

ALL = {**GRAPHS, "multiplied": multiplied, "dense": dense}
N_IMAGES = 8

# How far onnxruntime may be from the reference when it is given the reference's own inputs: steps of the last place,
# and the share of elements that may be off at all. Where products are rescaled, onnxruntime multiplies by a float32
# factor: a sum within some millionths of a tie can go the other way. Average pools add float32 numbers, and round ties
# to even with the zero point included: on a 2x2 window a quarter of all means are ties. Its softmax rounds down here
# and there where the scale is not the usual 1/256.
EXACT = (0, 0.0)
NEAR_TIES = (1, 1e-4)
TOLERANCE: dict[Op, tuple[int, float]] = {
    Op.CONV2D: NEAR_TIES,
    Op.LINEAR: NEAR_TIES,
    Op.ADD: NEAR_TIES,
    Op.MUL: NEAR_TIES,
    Op.SIGMOID: NEAR_TIES,
    Op.HARD_SIGMOID: NEAR_TIES,
    Op.SILU: NEAR_TIES,
    Op.HARD_SWISH: NEAR_TIES,
    Op.GLOBAL_AVG_POOL: NEAR_TIES,
    Op.AVG_POOL: (1, 0.3),
    Op.SOFTMAX: (1, 3e-2),
    Op.CONCAT: EXACT,
    Op.GATHER: EXACT,
    Op.MAX_POOL: EXACT,
    Op.CLIP: EXACT,
    Op.FLATTEN: EXACT,
    Op.RESHAPE: EXACT,
    Op.QUANTIZE: EXACT,
    Op.DEQUANTIZE: EXACT,
}
INEXACT = {Op.AVG_POOL, Op.SOFTMAX}


def close(got: Array, want: Array, steps: float, what: str) -> int:
    """Compare whole arrays; give how many elements differ; name the worst where it is too far off."""
    assert got.shape == want.shape, what
    assert got.dtype == want.dtype, what
    off = np.abs(got.astype(np.float64) - want.astype(np.float64))
    worst = np.unravel_index(off.argmax(), off.shape)
    text = f"{what}: at {worst} got {got[worst]}, want {want[worst]}; {(off > steps).sum()} of {off.size} are off"
    assert off[worst] <= steps, text
    return int((off > 0).sum())


def quantized_with_input(graph: Graph, bits: int, io: Io) -> tuple[Graph, Array]:
    quantized = compress(graph, plan_for(graph, bits, io=io))
    x, q = images(graph, N_IMAGES), quantized.tensors["input"].quant
    return quantized, x if q is None else quantmath.quantize(x, q)


def every_network() -> Iterator[tuple[str, Graph, int]]:
    for name, make in ALL.items():
        for bits in (2, 5, 8):
            yield f"{name}, {bits} bits", make(), bits
    for case in CASES:
        yield case, made(case), 4


def test_the_table_is_complete() -> None:
    assert set(TOLERANCE) == set(Op)


def test_every_operator_on_the_references_inputs() -> None:
    differ = dict.fromkeys(Op, 0)
    elements = dict.fromkeys(Op, 0)
    for what, graph, bits in every_network():
        for io in Io:
            quantized, x = quantized_with_input(graph, bits, io)
            values = reference.run(quantized, {"input": x})
            for node in quantized.nodes:
                if io is Io.FLOAT and node.op not in (Op.QUANTIZE, Op.DEQUANTIZE, Op.SOFTMAX):
                    continue  # the same node as with int8 borders
                single = alone(quantized, node)
                got = onnx_run(to_onnx(single).data, {name: values[name] for name in single.inputs})
                want = values[node.outputs[0]]
                if want.dtype == np.int8 or node.op is Op.DEQUANTIZE:
                    steps = TOLERANCE[node.op][0]
                    differ[node.op] += close(got[node.outputs[0]], want, steps, f"{what}, {node.name}, {io}")
                    elements[node.op] += want.size
                else:
                    close(got[node.outputs[0]], want, 1e-6, f"{what}, {node.name}, {io}")
    for op, (_, share) in TOLERANCE.items():
        assert elements[op] > 300, op
        assert differ[op] <= share * elements[op], (op, differ[op], elements[op])


def after(graph: Graph, ops: set[Op]) -> set[str]:
    """Tensors that one of `ops` writes, or that are computed from such tensors."""
    found: set[str] = set()
    for node in graph.nodes:
        if node.op in ops or found & set(node.inputs):
            found |= set(node.outputs)
    return found


@pytest.mark.parametrize("io", Io)
@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("name", ALL)
def test_whole_networks(name: str, bits: int, io: Io) -> None:
    """One file, run as it is. Equal outputs; behind average pools, close to them."""
    graph, x = quantized_with_input(ALL[name](), bits, io)
    want = reference.run(graph, {"input": x})[graph.outputs[0]]
    ((output, got),) = onnx_run(to_onnx(graph).data, {"input": x}).items()
    assert output == graph.outputs[0]
    close(got, want, behind_pools(name, graph), f"{name}, {bits} bits, {io}")
    assert bool(after(graph, INEXACT)) == (name in ("separable", "branches"))


def behind_pools(name: str, graph: Graph) -> float:
    """How far an output may be off, in its own unit: nothing but for what an average pool did before it."""
    last = graph.producer()[graph.outputs[0]]
    codes = graph.tensors[graph.outputs[0]].quant is not None
    if name == "separable":  # a step of the pool moves logits, and probabilities by some hundredths at most
        return 12 if codes else 0.05
    if name == "branches":
        q = graph.tensors[last.inputs[0]].quant
        return 1 if codes or q is None else 1.001 * float(q.scale)
    return 0


@pytest.mark.parametrize("io", Io)
@pytest.mark.parametrize("name", ALL)
def test_every_tensor_inside(name: str, io: Io) -> None:
    """The same nodes with every integer tensor as an output: equal up to the first average pool."""
    graph, x = quantized_with_input(ALL[name](), 3, io)
    names = tuple(n.outputs[0] for n in graph.nodes if graph.tensors[n.outputs[0]].quant is not None)
    want = reference.run(graph, {"input": x})
    got = onnx_run(to_onnx(replace(graph, outputs=names)).data, {"input": x})
    exact = [tensor for tensor in names if tensor not in after(graph, INEXACT)]
    assert len(exact) >= 4
    for tensor in exact:
        assert close(got[tensor], want[tensor], 0, f"{name}, {tensor}, {io}") == 0


@pytest.mark.parametrize("name", ALL)
def test_images_in_one_batch_or_one_by_one(name: str) -> None:
    graph, x = quantized_with_input(ALL[name](), 4, Io.INT8)
    data = to_onnx(graph).data
    (whole,) = onnx_run(data, {"input": x}).values()
    for i in range(3):
        (single,) = onnx_run(data, {"input": x[i : i + 1]}).values()
        assert np.array_equal(single[0], whole[i])


@pytest.mark.parametrize("name", ALL)
def test_cut_networks(name: str) -> None:
    """Pruned shapes, odd channel counts included, in the file that is delivered."""
    graph = ALL[name]()
    # The free layers of each network, coupled ones together.
    drop: dict[str, dict[str, tuple[int, ...]]] = {
        "plain": {"conv1": (0, 5, 7), "conv2": (1,), "fc1": (0, 19)},
        "residual": {"stem": (3,), "block.conv2": (0, 4), "block.shortcut": (0, 4), "end.conv": (0, 4)},
        "separable": {"expand": (2, 9, 15), "dw": (2, 9, 15)},
        "branches": {"stem": (5,), "a": (0,), "b": (1, 2), "mix": (7,)},
        "multiplied": {"stem": (1,), "dw1": (2, 3), "dw2": (4, 5, 6, 7)},
        "dense": {"stem": (0,), "conv1": (2,), "conv2": (0, 1), "side": (3,)},
        "gated": {
            "expand": (0, 5), "dw": (0, 5), "se.fc2": (0, 5), "se.fc1": (3,),
            "conv": (9,), "se2.fc2": (9,), "side": (9,), "fc1": (1, 2, 3),
        },
        "shuffled": {"stem": (2,), "right": (0, 5), "expand": (1,), "dw": (1,), "project": (3,), "end": (4, 6)},
    }
    quantized = compress(graph, plan_for(graph, 3, drop=drop[name]))
    x = images(graph, N_IMAGES)
    want = reference.run(quantized, {"input": x})[quantized.outputs[0]]
    (got,) = onnx_run(to_onnx(quantized).data, {"input": x}).values()
    close(got, want, behind_pools(name, quantized), name)
    before, left = ([g.weight(n).shape for n in g.layers()] for g in (graph, quantized))
    assert sum(map(np.prod, left)) < sum(map(np.prod, before))
