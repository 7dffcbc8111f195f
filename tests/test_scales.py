"""Sums come out the same in every arithmetic: that of onnxruntime on x86 and on Arm, of XNNPACK, and ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgecomp import quantmath
from edgecomp.compress import compress, fuse_clips
from edgecomp.graph import Array, Graph, Node, Op, QuantParams, Tensor
from edgecomp.ops import OPS
from edgecomp.plan import ActRange
from edgecomp.scales import MOST_STEPS, activation_params, sums_are_exact
from tests.graphs import GRAPHS, Build, plan_for
from tests.onnx_run import onnx_run

F = np.float32
A, B = (codes.ravel() for codes in np.meshgrid(np.arange(-128, 128), np.arange(-128, 128), indexing="ij"))
EXTREME = [(1023, 1023, 1023), (1023, 1022, 1021), (1, 1023, 1023), (1022, 1, 511), (1023, 1021, 9), (511, 512, 1023)]
RANDOM = [
    (int(a), int(b), int(c) | 1) for a, b, c in np.random.default_rng(7).integers(1, MOST_STEPS + 1, size=(60, 3))
]
ZEROS = [(int(a), int(b), int(c)) for a, b, c in np.random.default_rng(8).integers(-128, 128, size=(66, 3))]
Scales = tuple[np.float32, np.float32, np.float32]


def fused(product: tuple[Array, F], plus: Array) -> Array:
    """Multiply and add with one rounding to float32: a product of a code and a float32 is exact in float64."""
    return (product[0].astype(np.float64) * np.float64(product[1]) + np.float64(plus)).astype(F)


def in_float(scales: Scales, zeros: tuple[int, int, int], fma: bool) -> Array:
    """Add as MLAS does on x86: uint8 codes times ratios of scales, and one number for the three zero points."""
    za, zb, zc = (z + 128 for z in zeros)
    r_a, r_b = scales[0] / scales[2], scales[1] / scales[2]
    fixed = F(zc) - (r_a * F(za) + r_b * F(zb))
    a, b = (A + 128).astype(F), (B + 128).astype(F)
    total = fused((a, r_a), fused((b, r_b), fixed)) if fma else (fixed + a * r_a) + b * r_b
    return np.clip(np.rint(total), 0, 255).astype(np.int64) - 128


def in_integers(bits: int, *, away: bool) -> Callable[[Scales, tuple[int, int, int]], Array]:
    """Add with multipliers of so many bits and one shift, middles away from zero or up: MLAS on Arm 22, XNNPACK 21."""

    def add(scales: Scales, zeros: tuple[int, int, int]) -> Array:
        ratios = [float(scales[0] / scales[2]), float(scales[1] / scales[2])]
        shift = bits - 1 - int(np.floor(np.log2(max(ratios))))
        m_a, m_b = (int(np.rint(ratio * 2.0**shift)) for ratio in ratios)
        total = (A - zeros[0]) * m_a + (B - zeros[1]) * m_b
        if away:
            total = total - (total < 0)
        return np.clip(((total + (1 << (shift - 1))) >> shift) + zeros[2], -128, 127)

    return add


def by_the_reference(scales: Scales, zeros: tuple[int, int, int]) -> Array:
    names = ("a", "b", "c")
    tensors = {
        n: Tensor(name=n, shape=A.shape, quant=QuantParams(bits=8, scale=np.array(s), zero_point=np.array(z)))
        for n, s, z in zip(names, scales, zeros, strict=True)
    }
    node = Node(name="c", op=Op.ADD, inputs=("a", "b"), outputs=("c",), attrs={"clamp": (-128, 127)})
    found: Array = OPS[Op.ADD].compute_integer(node, tensors, {"a": A, "b": B}).astype(np.int64)
    return found


ARITHMETIC: dict[str, Callable[[Scales, tuple[int, int, int]], Array]] = {
    "float32": lambda scales, zeros: in_float(scales, zeros, fma=False),
    "float32, fused": lambda scales, zeros: in_float(scales, zeros, fma=True),
    "22 bits": in_integers(22, away=True),
    "21 bits": in_integers(21, away=False),
    "reference": by_the_reference,
}


def exact(steps: tuple[int, int, int], zeros: tuple[int, int, int]) -> Array:
    """Round (a * na + b * nb) / nc in whole numbers; there is no middle, for nc is odd."""
    total = (A - zeros[0]) * steps[0] + (B - zeros[1]) * steps[1]
    return np.clip((2 * total + steps[2]) // (2 * steps[2]) + zeros[2], -128, 127)


def scales_of(steps: tuple[int, int, int]) -> Scales:
    a, b, c = (F(n * 1.2345e-5) for n in steps)
    return a, b, c


@pytest.mark.parametrize("name", ARITHMETIC)
def test_all_pairs_of_codes_have_the_exact_sum(name: str) -> None:
    for steps, zeros in zip(EXTREME + RANDOM, ZEROS, strict=True):
        scales = scales_of(steps)
        assert sums_are_exact(*map(float, scales))
        np.testing.assert_array_equal(ARITHMETIC[name](scales, zeros), exact(steps, zeros), err_msg=f"{steps} {zeros}")


def test_with_free_scales_they_differ() -> None:
    """What the tests above hold would not hold by itself."""
    apart = 0
    for zeros in ZEROS[:20]:
        scales = scales_of((701, 512, 800))
        scales = (scales[0] * F(1.0003), scales[1] * F(1.00071), scales[2])
        assert not sums_are_exact(*map(float, scales))
        apart += int((ARITHMETIC["float32, fused"](scales, zeros) != ARITHMETIC["22 bits"](scales, zeros)).sum())
    assert apart > 0


def test_onnxruntime_computes_the_exact_sum() -> None:
    nodes, constants, wanted = [], [], {}
    for i, (steps, zeros) in enumerate(zip(EXTREME + RANDOM, ZEROS, strict=True)):
        for side, scale, zero in zip("abc", scales_of(steps), zeros, strict=True):
            constants.append(numpy_helper.from_array(np.array(scale), f"{side}{i}.scale"))
            constants.append(numpy_helper.from_array(np.uint8(zero + 128), f"{side}{i}.zero"))
        inputs = ["a", f"a{i}.scale", f"a{i}.zero", "b", f"b{i}.scale", f"b{i}.zero", f"c{i}.scale", f"c{i}.zero"]
        nodes.append(helper.make_node("QLinearAdd", inputs, [f"c{i}"], domain="com.microsoft"))
        wanted[f"c{i}"] = exact(steps, zeros) + 128
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info(n, TensorProto.UINT8, [None]) for n in "ab"],
        [helper.make_tensor_value_info(n, TensorProto.UINT8, [None]) for n in wanted],
        constants,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    given = {"a": (A + 128).astype(np.uint8), "b": (B + 128).astype(np.uint8)}
    found = onnx_run(model.SerializeToString(), given)
    for name, codes in wanted.items():
        np.testing.assert_array_equal(found[name], codes, err_msg=name)


@pytest.mark.parametrize(
    ("scales", "told"),
    [
        ((1.0, 1.0, 1.0), True),
        ((3.0, 0.5, 0.5), True),
        ((1 / 3, 2 / 3, 1.0), True),
        ((1.0, 1.0, 2.0), False),  # 1 and 0 have their sum in the middle
        ((1 / 1025, 1.0, 1.0), False),
        ((1.0, 1024.0, 1.0), False),
        ((0.31830987, 0.70710677, 1.0), False),
    ],
)
def test_which_scales_are_exact(scales: tuple[float, float, float], told: bool) -> None:
    assert sums_are_exact(*(float(F(s)) for s in scales)) is told


# ---- in a network ----------------------------------------------------------------------------------------------------


def chosen_scales(graph: Graph, ranges: dict[str, ActRange]) -> dict[str, float]:
    return {name: float(q.scale) for name, q in activation_params(fuse_clips(graph), ranges).items()}


def chain(n: int = 4) -> Graph:
    """A chain of residual blocks whose first sum is read by all later ones."""
    b = Build(0, (3, 8, 8))
    x = first = b.conv("stem", "input", 4)
    for i in range(n):
        y = b.conv(f"conv{i}", x, 4)
        x = b.node(Op.CLIP, f"out{i}", (b.node(Op.ADD, f"sum{i}", (x, y), {}),), {"low": 0.0, "high": np.inf})
    x = b.node(Op.ADD, "skip", (x, first), {})
    return b.graph(b.linear("fc", b.node(Op.FLATTEN, "flat", (x,), {}), 4))


def ranges_of(graph: Graph, **high: float) -> dict[str, ActRange]:
    rng = np.random.default_rng(0)
    activations = [name for name, tensor in graph.tensors.items() if tensor.data is None]
    return {name: ActRange(low=-0.3, high=high.get(name, float(rng.uniform(1, 6)))) for name in activations}


@pytest.mark.parametrize("name", [n for n in GRAPHS if any(node.op is Op.ADD for node in GRAPHS[n]().nodes)])
def test_sums_of_a_compressed_network_are_exact(name: str) -> None:
    quantized = compress(GRAPHS[name](), plan_for(GRAPHS[name](), 4))
    for node in quantized.nodes:
        if node.op is Op.ADD:
            scales = [quantized.tensors[n].quant for n in (*node.inputs, *node.outputs)]
            assert sums_are_exact(*(float(q.scale) for q in scales if q is not None)), node.name


def test_a_chain_of_sums_has_one_step_and_hardly_coarser_scales() -> None:
    graph = chain()
    ranges = ranges_of(graph)
    found = chosen_scales(graph, ranges)
    adds = [node for node in fuse_clips(graph).nodes if node.op is Op.ADD]
    assert len(adds) == 5
    for node in adds:
        assert sums_are_exact(*(found[n] for n in (*node.inputs, *node.outputs))), node.name
    for name, scale in found.items():
        free = (ranges[name].high - ranges[name].low) / 255
        if name not in ("fc", "flat", "skip"):  # two share a scale
            assert free * (1 - 1e-6) <= scale <= free * (1 + 3 / (MOST_STEPS / 6)), name
    assert found["input"] == float(F((ranges["input"].high + 0.3) / 255))  # takes part in none
    assert max(found, key=lambda n: found[n]) in {n for node in adds for n in (*node.inputs, *node.outputs)}


def test_what_only_sums_read_may_be_far_finer_and_the_rest_may_not() -> None:
    graph = chain()
    dead = chosen_scales(graph, ranges_of(graph) | {"conv2": ActRange(low=0.0, high=0.001)})
    assert sums_are_exact(dead["out1"], dead["conv2"], dead["out2"])
    assert dead["conv2"] >= dead["out2"] / MOST_STEPS * (1 - 1e-6)
    weight = graph.tensors["stem.weight"]
    assert weight.data is not None
    faint = replace(weight, data=weight.data * F(1e-3))  # else so fine a scale is raised before sums are looked at
    graph = replace(graph, tensors={**graph.tensors, "stem.weight": faint})
    ranges = ranges_of(graph) | {"stem": ActRange(low=0.0, high=0.009)}  # which the next convolution reads, too
    far = chosen_scales(graph, ranges)
    for name in ("out0", "out1", "out2", "conv1"):
        assert far[name] == float(F((ranges[name].high + 0.3) / 255)), name


def test_a_term_that_is_fixed_stays() -> None:
    b = Build(0, (3, 8, 8))
    x = b.conv("conv", "input", 4)
    gate = b.function(Op.SIGMOID, "gate", b.conv("logits", "input", 4))
    graph = b.graph(b.linear("fc", b.node(Op.FLATTEN, "flat", (b.node(Op.ADD, "sum", (x, gate), {}),), {}), 4))
    ranges = ranges_of(graph, sum=3.9)
    found = chosen_scales(graph, ranges)
    assert found["gate"] == float(quantmath.UNIT.scale)
    assert sums_are_exact(found["conv"], found["gate"], found["sum"])
    loud = {name: replace(r, high=4000.0) if name in ("sum", "conv", "flat") else r for name, r in ranges.items()}
    free = chosen_scales(graph, loud)
    assert free["gate"] == float(quantmath.UNIT.scale)
    assert free["sum"] == float(F(4000.3 / 255))


def test_it_settles() -> None:
    """Choosing again, for the ranges that were found, changes nothing."""
    graph = chain()
    params = activation_params(fuse_clips(graph), ranges_of(graph))
    rounds = []
    for _ in range(2):
        ranges = {n: ActRange(low=-0.3, high=255 * float(q.scale) - 0.3) for n, q in params.items()}
        ranges |= {n: ranges[n.replace("sum", "out")] for n in graph.tensors if n.startswith("sum")}
        params = activation_params(fuse_clips(graph), ranges)
        rounds.append({n: float(q.scale) for n, q in params.items()})
    for one, other in pairwise(rounds):
        assert one == other
