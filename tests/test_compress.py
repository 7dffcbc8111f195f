"""Compression: cut = mask on real numbers, and what becomes of clips, scales, biases and borders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from edgecomp import quantmath, reference
from edgecomp.benchmarks.runners import runner_class
from edgecomp.compress import compress, cut, fuse_clips
from edgecomp.errors import GraphError, PlanError
from edgecomp.exporters.to_tflite import to_tflite
from edgecomp.graph import Graph, Op, QuantParams
from edgecomp.groups import gather_nodes, number_channels
from edgecomp.ops import SHARES_SCALE
from edgecomp.plan import ActRange, CompressionPlan, Io
from edgecomp.verify import verify_quantized
from tests.graphs import GRAPHS, Build, dense, images, multiplied, plan_for

ALL = {**GRAPHS, "multiplied": multiplied, "dense": dense}


# ---- cut = mask ------------------------------------------------------------------------------------------------------


def random_keep(graph: Graph, rng: np.random.Generator, share: float) -> dict[str, tuple[bool, ...]]:
    """Drop each free channel number with the given probability, but keep one channel of each layer and gather."""
    channels = number_channels(graph)
    kept = channels.locked | (rng.random(len(channels.locked)) >= share)
    for node in (*graph.layers(), *gather_nodes(graph)):
        numbers = channels.of[node.outputs[0]]
        if not kept[numbers].any():
            kept[rng.choice(numbers)] = True
    return {node.name: tuple(kept[channels.of[node.outputs[0]]].tolist()) for node in graph.layers()}


def masked(graph: Graph, keep: Mapping[str, tuple[bool, ...]]) -> Graph:
    """Set weights and biases of dropped channels to zero; shapes stay."""
    tensors = dict(graph.tensors)
    for node in graph.layers():
        for name in node.inputs[1:]:
            data = np.array(tensors[name].data)
            data[~np.array(keep[node.name])] = 0
            tensors[name] = replace(tensors[name], data=data)
    return replace(graph, tensors=tensors)


def output(graph: Graph, x: np.ndarray) -> np.ndarray:
    return reference.run(graph, {"input": x})[graph.outputs[0]]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.95])
@pytest.mark.parametrize("name", ALL)
def test_cut_is_mask(name: str, share: float) -> None:
    dropped = 0
    for seed in range(8):
        graph = ALL[name](seed)
        keep = random_keep(graph, np.random.default_rng(seed), share)
        x = images(graph, 3, seed).astype(np.float64)
        smaller = cut(graph, keep)
        got, want = output(smaller, x), output(masked(graph, keep), x)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)
        for node in smaller.layers():
            assert smaller.weight(node).shape[0] == sum(keep[node.name])
        gone = sum(flags.count(False) for flags in keep.values())
        n_weights = [sum(g.weight(node).data.size for node in g.layers()) for g in (graph, smaller)]  # type: ignore[union-attr]
        assert (n_weights[1] < n_weights[0]) == (gone > 0)
        dropped += gone
    assert dropped


def test_cut_by_hand() -> None:
    """Rows of the layer, columns of its reader, H*W columns a channel behind a flatten; values and not only shapes."""
    graph = GRAPHS["plain"]()
    keep = {node.name: (True,) * graph.weight(node).shape[0] for node in graph.layers()}
    keep["conv2"] = tuple(i != 1 for i in range(12))
    smaller = cut(graph, keep)
    data = {name: t.data for name, t in graph.tensors.items() if t.data is not None}
    new = {name: t.data for name, t in smaller.tensors.items() if t.data is not None}
    assert np.array_equal(new["conv2.weight"], np.delete(data["conv2.weight"], 1, axis=0))
    assert np.array_equal(new["conv2.bias"], np.delete(data["conv2.bias"], 1))
    assert np.array_equal(new["fc1.weight"], np.delete(data["fc1.weight"], range(4, 8), axis=1))
    assert smaller.tensors["pool2"].shape == (1, 11, 2, 2)
    for name in ("conv1.weight", "conv1.bias", "fc1.bias", "fc2.weight"):
        assert np.array_equal(new[name], data[name])


def test_depthwise_groups_follow() -> None:
    graph = multiplied()
    keep = random_keep(graph, np.random.default_rng(0), 1.0)  # one number is left
    smaller = cut(graph, keep)
    groups = {n.name: (n.attrs["groups"], smaller.weight(n).shape) for n in smaller.layers() if n.op is Op.CONV2D}
    assert groups == {"stem": (1, (1, 2, 3, 3)), "dw1": (1, (2, 1, 3, 3)), "dw2": (2, (4, 1, 3, 3))}


def test_nothing_to_cut() -> None:
    graph = GRAPHS["plain"]()
    assert cut(graph, {n.name: (True,) * graph.weight(n).shape[0] for n in graph.layers()}) is graph


# ---- the plan must fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ({"block.conv2": (3,)}, "is coupled with layer"),
        ({"fc": (0,)}, "plan: layer 'fc': channel 0 cannot be cut"),
        ({"stem": tuple(range(8))}, "plan: layer 'stem' keeps no channel"),
    ],
)
def test_plans_that_cannot_be_cut(drop: dict[str, tuple[int, ...]], message: str) -> None:
    graph = GRAPHS["residual"]()
    with pytest.raises(PlanError, match=message) as e:
        compress(graph, plan_for(graph, drop=drop))
    assert "\n" not in str(e.value)


def test_another_graphs_plan() -> None:
    plan = plan_for(GRAPHS["plain"](seed=1))
    with pytest.raises(PlanError, match=r"made for the graph .*, this one is"):
        compress(GRAPHS["plain"](seed=0), plan)


# ---- whole ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_pure_and_deterministic(name: str) -> None:
    graph, again = ALL[name](), ALL[name]()
    keep = random_keep(graph, np.random.default_rng(2), 0.3)
    drop = {n: tuple(i for i, flag in enumerate(flags) if not flag) for n, flags in keep.items()}
    plan = plan_for(graph, 3, drop=drop)
    text = plan.to_json()
    before = graph.digest()
    first = compress(graph, plan)
    assert graph.digest() == before
    assert plan.to_json() == text
    assert compress(again, CompressionPlan.from_json(text)).digest() == first.digest()
    assert compress(graph, plan_for(graph, 4, drop=drop)).digest() != first.digest()


@pytest.mark.parametrize("name", ALL)
def test_eight_bits_are_close_to_real_numbers(name: str) -> None:
    graph = ALL[name]()
    x = images(graph, 32)  # those the ranges come from
    want = output(graph, x)
    error = {
        bits: float(np.sqrt(np.mean((output(compress(graph, plan_for(graph, bits)), x) - want) ** 2)) / want.std())
        for bits in (8, 6, 4, 2)
    }
    assert error[8] < 0.05
    assert error[8] < error[6] < error[4] < error[2]


def test_compressed_is_cut_then_quantized() -> None:
    """Cutting before rounding: scales are those of the weights that remain."""
    graph = GRAPHS["plain"]()
    drop = {"conv1": (0, 5), "conv2": (1,)}
    plan = plan_for(graph, 4, drop=drop)
    small = cut(graph, {n: layer.keep for n, layer in plan.layers.items()})
    uncut = plan_for(small, 4)
    direct = compress(small, replace(uncut, ranges=plan.ranges))
    assert compress(graph, plan).digest() == direct.digest()


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_by_layer(bits: int) -> None:
    graph = GRAPHS["plain"]()
    widths = {"conv1": 8, "conv2": bits, "fc1": 10 - bits, "fc2": 8}
    quantized = compress(graph, plan_for(graph, widths))
    found = {n.name: quantized.weight(n).quant for n in quantized.layers()}
    assert {n: q.bits for n, q in found.items() if q is not None} == widths
    limit = 2 ** (bits - 1) - 1
    codes = quantized.tensors["conv2.weight"].data
    assert codes is not None
    assert np.abs(codes).max() == limit
    scale = found["conv2"].scale  # type: ignore[union-attr]
    off = np.abs(codes * scale[:, None, None, None] - graph.tensors["conv2.weight"].data)  # type: ignore[operator]
    inside = np.abs(codes) < limit
    assert (off <= scale[:, None, None, None] * (0.5 + 1e-5))[inside].all()


# ---- probabilities ---------------------------------------------------------------------------------------------------


def scale_of(quantized: Graph, name: str) -> tuple[float, int]:
    q = quantized.tensors[name].quant
    assert q is not None
    return float(q.scale), int(q.zero_point)


def test_codes_of_probabilities() -> None:
    """Steps of 1/256 wherever nothing else shares the scale, through what only moves codes too."""
    b = Build(0, (3, 6, 6))
    gate = b.max_pool("pool", b.function(Op.SIGMOID, "alone", b.conv("c", "input", 4)))
    x = b.mul("m", gate, b.conv("d", "input", 4, stride=(2, 2)))
    y = b.node(Op.CONCAT, "cat", (b.function(Op.SIGMOID, "beside", b.conv("e", x, 4)), x), {"axis": 1})
    graph = b.graph(b.function(Op.SIGMOID, "s", b.node(Op.FLATTEN, "f", (y,), {})))
    quantized = compress(graph, plan_for(graph, io=Io.INT8))
    for name in ("alone", "pool", "s"):
        assert scale_of(quantized, name) == (1 / 256, -128)
    assert scale_of(quantized, "beside") == scale_of(quantized, "m") == scale_of(quantized, "cat")
    assert scale_of(quantized, "beside")[0] != 1 / 256
    flat = b.node(Op.SOFTMAX, "soft", (b.linear("fc", "f", 5),), {"axis": 1})
    graph = b.graph(b.node(Op.FLATTEN, "last", (flat,), {}))
    quantized = compress(graph, plan_for(graph))
    assert scale_of(quantized, "last") == scale_of(quantized, "soft") == (1 / 256, -128)


@pytest.mark.parametrize("op", [Op.SOFTMAX, Op.SIGMOID])
def test_probabilities_at_the_end_are_real_numbers(op: Op) -> None:
    b = Build(0, (3, 6, 6))
    x = b.linear("fc", b.node(Op.FLATTEN, "f", ("input",), {}), 5)
    graph = b.graph(b.node(op, "p", (x,), {"axis": 1} if op is Op.SOFTMAX else {}))
    quantized = compress(graph, plan_for(graph))
    assert [n.op for n in quantized.nodes][-2:] == [Op.DEQUANTIZE, op]
    assert quantized.tensors["p"].quant is None
    values = reference.run(quantized, {"input": images(graph, 4)})
    logits = values["p.logits"].astype(np.float64)
    want = np.exp(logits) / (np.exp(logits).sum(1, keepdims=True) if op is Op.SOFTMAX else 1 + np.exp(logits))
    np.testing.assert_allclose(values["p"], want, rtol=1e-5)


# ---- clips -----------------------------------------------------------------------------------------------------------


def test_fused_clips_become_clamps() -> None:
    graph = GRAPHS["separable"]()
    quantized = compress(graph, plan_for(graph))
    assert Op.CLIP not in {n.op for n in quantized.nodes}
    nodes = {n.name: n for n in quantized.nodes}
    assert nodes["expand"].outputs == ("expand.relu6",)
    assert "expand" not in quantized.tensors
    # 0..6 was widened by nothing: the codes are all used, or end at the code of 6.
    expand = quantized.tensors["expand.relu6"].quant
    assert expand is not None
    assert nodes["expand"].attrs["clamp"] == (-128, min(127, round(6 / float(expand.scale)) - 128))
    assert nodes["stem"].attrs["clamp"] == (-128, 127)
    assert nodes["add"].attrs["clamp"] == (-128, 127)
    assert not {"low", "high"} & set(nodes["expand"].attrs)


@pytest.mark.parametrize(("low", "high"), [(0.0, np.inf), (-0.25, 0.5), (0.0, 0.1), (-np.inf, 0.2), (0.5, 2.0)])
@pytest.mark.parametrize("fused", [True, False])
def test_clamps_mean_the_clip(fused: bool, low: float, high: float) -> None:
    """In codes as on real numbers: nothing below low or above high, to half a step."""
    b = Build(0, (3, 6, 6))
    x = b.conv("c", "input", 4) if fused else b.max_pool("c", "input", (1, 1), stride=(1, 1))
    graph = b.graph(b.clip("clip", x, low, high))
    plan = plan_for(graph, io=Io.INT8)
    wide = {n: ActRange(low=-3, high=3) for n in plan.ranges}  # wider than the clip, so that the clamp must act
    quantized = compress(graph, replace(plan, ranges=wide))
    assert (Op.CLIP in {n.op for n in quantized.nodes}) != fused
    q = quantized.tensors["clip"].quant
    assert q is not None
    step = float(q.scale)
    codes = np.random.default_rng(0).integers(-128, 128, (4, 3, 6, 6)).astype(np.int8)
    values = (output(quantized, codes).astype(int) - int(q.zero_point)) * step
    ends = [max(low, -3), min(high, 3)]
    assert values.min() >= ends[0] - step
    assert values.max() <= ends[1] + step
    assert abs(values.min() - ends[0]) <= step
    assert abs(values.max() - ends[1]) <= step


def two_readers(b: Build) -> str:
    x = b.conv("c", "input", 3)
    return b.node(Op.ADD, "add", (b.clip("relu", x), x), {})


def is_output(b: Build) -> str:
    x = b.conv("c", "input", 3)
    b.clip("relu", x)
    return x


def of_the_input(b: Build) -> str:
    return b.conv("c", b.clip("relu", "input"), 3)


def of_a_pool(b: Build) -> str:
    return b.conv("c", b.clip("relu", b.max_pool("p", "input")), 3)


def of_a_clip(b: Build) -> str:
    return b.clip("relu", b.clip("first", b.conv("c", "input", 3), -1, 1))


@pytest.mark.parametrize("build", [two_readers, is_output, of_the_input, of_a_pool, of_a_clip])
def test_clips_that_stay(build: object) -> None:
    b = Build(0, (3, 6, 6))
    graph = b.graph(build(b))  # type: ignore[operator]
    if build is is_output:
        graph = replace(graph, outputs=("c", "relu"))
    fused = fuse_clips(graph)
    assert "relu" in {n.name for n in fused.nodes}
    for io in Io:
        quantized = compress(graph, plan_for(graph, io=io))
        relu = next(n for n in quantized.nodes if n.name == "relu")
        q = quantized.tensors["relu"].quant
        assert q is not None
        assert relu.attrs["clamp"] == (int(q.zero_point), 127)


def test_a_clip_named_like_a_tensor_stays() -> None:
    """Nodes and tensors have names of their own: fusing behind tensor "x" must not take away a node named "x"."""
    b = Build(0, (3, 6, 6))
    x = b.max_pool("pool", "input", stride=(1, 1))
    x = b.clip("relu", b.conv("c", b.clip("free", x), 3))
    graph = b.graph(x)
    names = {"free": "c", "c": "d"}
    nodes = tuple(replace(n, name=names.get(n.name, n.name)) for n in graph.nodes)
    fused = fuse_clips(replace(graph, nodes=nodes))
    assert [n.name for n in fused.nodes] == ["pool", "c", "d"]


# ---- scales ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_shared_scales_hold_every_range(name: str) -> None:
    graph = ALL[name]()
    plan = plan_for(graph, io=Io.INT8)
    quantized = compress(graph, plan)
    for tensor in quantized.tensors.values():
        if tensor.data is None and tensor.name != "softmax":
            r, q = plan.ranges[tensor.name], tensor.quant
            assert q is not None
            ends = (np.array([-128, 127]) - int(q.zero_point)) * float(q.scale)
            assert ends[0] <= min(r.low, 0) + float(q.scale) / 2 * 1.001
            assert ends[1] >= max(r.high, 0) - float(q.scale) / 2 * 1.001
    for node in quantized.nodes:
        if node.op in SHARES_SCALE:
            quants = [quantized.tensors[t].quant for t in (*node.inputs, *node.outputs)]
            assert len({(float(q.scale), int(q.zero_point)) for q in quants if q is not None}) == 1


def test_softmax_output_is_fixed() -> None:
    graph = GRAPHS["separable"]()
    q = compress(graph, plan_for(graph, io=Io.INT8)).tensors["softmax"].quant
    assert q is not None
    assert (float(q.scale), int(q.zero_point)) == (1 / 256, -128)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e-12, 1e-7])
@pytest.mark.parametrize("bits", [2, 8])
def test_dead_channels_keep_their_bias(bits: int, size: float) -> None:
    """Weight decay drives weights of unused channels towards zero; the bias that BatchNorm left there must survive."""
    graph = GRAPHS["plain"]()
    weight, bias = np.array(graph.tensors["fc1.weight"].data), np.array(graph.tensors["fc1.bias"].data)
    weight[3] = np.where(weight[3] > 0, size, -size)
    bias[3] = 0.7
    tensors = dict(graph.tensors)
    tensors["fc1.weight"] = replace(tensors["fc1.weight"], data=weight)
    tensors["fc1.bias"] = replace(tensors["fc1.bias"], data=bias)
    graph = replace(graph, tensors=tensors)
    quantized = compress(graph, plan_for(graph, bits))
    values = reference.run(quantized, {"input": images(graph, 4)})["relu3"]
    q = quantized.tensors["relu3"].quant
    b = quantized.tensors["fc1.bias"].quant
    assert q is not None
    assert b is not None
    got = (values[:, 3].astype(int) - int(q.zero_point)) * float(q.scale)
    # Half a step of the output, and of the bias's own code.
    assert np.abs(got - 0.7).max() <= float(q.scale) / 2 + float(b.scale[3]) / 2 + 1e-4


# ---- borders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "residual", "branches", "dense"])
def test_float_borders(name: str) -> None:
    graph = ALL[name]()
    quantized = compress(graph, plan_for(graph))
    assert [quantized.nodes[0].op, quantized.nodes[-1].op] == [Op.QUANTIZE, Op.DEQUANTIZE]
    assert quantized.inputs == ("input",)
    assert quantized.tensors["input"].quant is None
    assert quantized.tensors[quantized.outputs[0]].quant is None
    inside = [t for t in quantized.tensors.values() if t.quant is None]
    assert {t.name for t in inside} == {*quantized.inputs, *quantized.outputs}


@pytest.mark.parametrize("name", ALL)
def test_integer_borders_compute_the_same_codes(name: str) -> None:
    graph = ALL[name]()
    real, whole = (compress(graph, plan_for(graph, io=io)) for io in (Io.FLOAT, Io.INT8))
    assert not {Op.QUANTIZE, Op.DEQUANTIZE} & {n.op for n in whole.nodes}
    assert whole.inputs == graph.inputs
    assert whole.outputs == graph.outputs
    values = reference.run(real, {"input": images(graph, 4)})
    codes = reference.run(whole, {"input": values["input.quantized"]})
    for tensor, value in codes.items():
        if tensor not in ("input", "softmax"):
            assert np.array_equal(value, values[tensor]), tensor


def test_a_final_softmax_is_float_behind_the_border() -> None:
    graph = GRAPHS["separable"]()
    quantized = compress(graph, plan_for(graph))
    assert [n.op for n in quantized.nodes[-2:]] == [Op.DEQUANTIZE, Op.SOFTMAX]
    assert quantized.outputs == ("softmax",)
    assert quantized.tensors["softmax"].quant is None
    got = output(quantized, images(graph, 8))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=0, atol=1e-6)
    assert len(np.unique(got)) > 70  # not in steps of 1/256


def softmax_of_the_input(b: Build) -> Graph:
    return b.graph(b.node(Op.SOFTMAX, "softmax", ("input",), {"axis": 1}))


def softmax_read_again(b: Build) -> Graph:
    x = b.node(Op.SOFTMAX, "softmax", (b.linear("fc", "input", 5),), {"axis": 1})
    b.linear("more", x, 3)
    return replace(b.graph("softmax"), outputs=("softmax", "more"))


def two_softmaxes_of_one_tensor(b: Build) -> Graph:
    x = b.linear("fc", "input", 5)
    for name in ("softmax", "other"):
        b.node(Op.SOFTMAX, name, (x,), {"axis": 1})
    return replace(b.graph("softmax"), outputs=("softmax", "other", "fc"))


@pytest.mark.parametrize("build", [softmax_of_the_input, softmax_read_again, two_softmaxes_of_one_tensor])
@pytest.mark.parametrize("io", Io)
def test_odd_places_of_softmax(build: object, io: Io) -> None:
    graph = build(Build(0, (7,)))  # type: ignore[operator]
    quantized = compress(graph, plan_for(graph, io=io))
    assert verify_quantized(quantized) is None  # type: ignore[func-returns-value]
    x = images(graph, 8)
    values = reference.run(graph, {"input": x})
    q = quantized.tensors["input"].quant
    got = reference.run(quantized, {"input": x if q is None else quantmath.quantize(x, q)})
    for asked, given in zip(graph.outputs, quantized.outputs, strict=True):
        tensor: QuantParams | None = quantized.tensors[given].quant
        assert (tensor is None) == (io is Io.FLOAT)
        real = got[given] if tensor is None else (got[given].astype(int) - int(tensor.zero_point)) * float(tensor.scale)
        assert np.abs(real - values[asked]).max() < 0.05


def test_cut_refuses_what_is_coupled() -> None:
    graph = GRAPHS["residual"]()
    keep = {n.name: (True,) * graph.weight(n).shape[0] for n in graph.layers()}
    keep["end.conv"] = (False,) + (True,) * 11
    with pytest.raises(GraphError, match="coupled"):
        cut(graph, keep)


@pytest.mark.parametrize("op", [None, Op.HARD_SIGMOID, Op.HARD_SWISH, Op.SILU])
def test_no_term_is_finer_than_a_sum_can_take(op: Op | None) -> None:
    """XNNPACK adds nothing finer than 1/1024 of a step of the sum, and a hard-sigmoid is a sum of x / 6 and 1/2."""
    b = Build(0, (3, 8, 8))
    x, y = b.conv("loud", "input", 8), b.conv("faint", "input", 8)
    for name, tensor in b.tensors.items():
        if name.startswith("faint.") and tensor.data is not None:
            b.tensors[name] = replace(tensor, data=tensor.data * np.float32(2e-5))
    y = y if op is None else b.function(op, "function", y)
    graph = b.graph(b.linear("fc", b.node(Op.FLATTEN, "flat", (b.node(Op.ADD, "sum", (x, y), {}),), {}), 4))
    quantized = compress(graph, plan_for(graph, 8))
    scale = {n: float(t.quant.scale) for n, t in quantized.tensors.items() if t.quant is not None and t.data is None}
    assert scale[y] >= scale["sum"] / 1024
    if op in (Op.HARD_SIGMOID, Op.HARD_SWISH):
        assert scale["faint"] / 6 >= (scale["function"] if op is Op.HARD_SIGMOID else 1 / 255) / 1024
    found = to_tflite(quantized)
    x_in = images(graph, 4)
    wanted = reference.run(quantized, {"input": x_in})[quantized.outputs[0]]
    assert np.abs(runner_class("litert")(found.data).run(x_in) - wanted).max() <= 1.01 * scale["fc"]
