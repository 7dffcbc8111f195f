"""What stands in an ONNX file: packed bytes, names, borders; and what onnxruntime makes of it when it loads it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgecomp import quantmath, reference
from edgecomp.artifact import AtRest
from edgecomp.benchmarks.onnx_runtime import optimized
from edgecomp.compress import compress
from edgecomp.errors import ExportError
from edgecomp.exporters import export
from edgecomp.exporters.to_onnx import to_onnx
from edgecomp.graph import Graph, Node, Op
from edgecomp.ops import ints
from edgecomp.packing import FIELDS, pack, packed_bytes, unpack
from edgecomp.plan import Io
from edgecomp.quantmath import WEIGHT_BITS
from tests.graphs import GRAPHS, Build, dense, images, multiplied, plan_for
from tests.onnx_run import onnx_run

ALL = {**GRAPHS, "multiplied": multiplied, "dense": dense}


@cache
def compressed(name: str, bits: int, io: Io) -> Graph:
    graph = ALL[name]()
    return compress(graph, plan_for(graph, bits, io=io))


@cache
def file_of(name: str, bits: int, io: Io) -> bytes:
    return to_onnx(compressed(name, bits, io)).data


def initializers(data: bytes) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(data).graph.initializer}


cases = pytest.mark.parametrize(
    ("name", "bits", "io"), [(name, bits, io) for name in ALL for bits in WEIGHT_BITS for io in Io]
)


@cases
def test_file(name: str, bits: int, io: Io) -> None:
    """Legal by the onnx package, free batch, borders as planned; layers under their own names."""
    graph, data = compressed(name, bits, io), file_of(name, bits, io)
    proto = onnx.load_from_string(data)
    assert onnx.checker.check_model(proto, full_check=True) is None
    assert (proto.ir_version, [(o.domain, o.version) for o in proto.opset_import]) == (8, [("", 18)])
    kind = onnx.TensorProto.FLOAT if io is Io.FLOAT else onnx.TensorProto.INT8
    for info, names in ((proto.graph.input, graph.inputs), (proto.graph.output, graph.outputs)):
        assert [i.name for i in info] == list(names)
        assert [i.type.tensor_type.elem_type for i in info] == [kind]
        dims = [d.dim_param or d.dim_value for d in info[0].type.tensor_type.shape.dim]
        assert dims == ["N", *graph.tensors[names[0]].shape[1:]]
    types = {n.name: n.op_type for n in proto.graph.node}
    for node in graph.layers():
        assert types[node.name] == ("Conv" if node.op is Op.CONV2D else "Gemm")


@cases
def test_weights_are_packed(name: str, bits: int, io: Io) -> None:
    """The file's bytes are those of `packing`, and unpack to the codes; no other tensor of a weight's size is there."""
    graph = compressed(name, bits, io)
    exported = to_onnx(graph)
    stored = initializers(exported.data)
    assert [w.layer for w in exported.weights] == [n.name for n in graph.layers()]
    for node, weight in zip(graph.layers(), exported.weights, strict=True):
        codes = graph.weight(node).data
        assert codes is not None
        assert (weight.bits, weight.stored_bits, weight.stored_bytes) == (bits, bits, packed_bytes(codes.size, bits))
        if bits == 8:
            assert stored[f"{node.name}.weight"].dtype == np.int8
            assert np.array_equal(stored[f"{node.name}.weight"], codes)
            continue
        fields = tuple(stored[f"{node.name}.weight.{i}"].reshape(-1) for i in range(len(FIELDS[bits])))
        for got, want in zip(fields, pack(codes, bits), strict=True):
            assert got.dtype == np.uint8
            assert np.array_equal(got, want)
        assert np.array_equal(unpack(fields, bits, codes.size), codes.reshape(-1))
        assert f"{node.name}.weight" not in stored
    weight_bytes = sum(weight.stored_bytes for weight in exported.weights)
    channels = sum(graph.weight(n).shape[0] for n in graph.layers())
    # Beside codes: for each channel scale (4) and zero point (1), bias, its scale and zero point (12); small constants.
    # And what is gathered: four bytes an index.
    indices = sum(len(ints(n.attrs, "indices")) for n in graph.nodes if n.op is Op.GATHER)
    assert sum(v.nbytes for v in stored.values()) <= weight_bytes + 17 * channels + 400 + 4 * indices


@cases
def test_onnxruntime_folds_and_fuses(name: str, bits: int, io: Io) -> None:
    graph = compressed(name, bits, io)
    found = optimized(file_of(name, bits, io))
    ops = found.operators
    assert found.widened == ()
    assert set(found.in_float) <= {"Softmax"}
    assert ops["QLinearConv"] == sum(n.op is Op.CONV2D for n in graph.nodes)
    assert ops["QGemm"] == sum(n.op is Op.LINEAR for n in graph.nodes)
    # A hard-swish is a sum, limited, and a product; a silu a sigmoid and a product.
    assert ops["QLinearAdd"] == sum(n.op in (Op.ADD, Op.HARD_SIGMOID, Op.HARD_SWISH) for n in graph.nodes)
    assert ops["QLinearMul"] == sum(n.op in (Op.MUL, Op.SILU, Op.HARD_SWISH) for n in graph.nodes)
    assert ops["QLinearSigmoid"] == sum(n.op in (Op.SIGMOID, Op.SILU) for n in graph.nodes)
    # Nothing of the unpacking is left, and no operator runs on real numbers but a softmax behind the border.
    assert not {"BitShift", "BitwiseAnd", "BitwiseOr", "Where", "Slice", "Conv", "Gemm", "MatMul"} & set(ops)
    assert not {"Add", "Mul", "Sigmoid", "HardSigmoid", "HardSwish"} & set(ops)
    assert ops["DequantizeLinear"] == (1 if io is Io.FLOAT else 2)
    assert ops["QuantizeLinear"] == (1 if io is Io.FLOAT else 2)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("name", ["plain", "separable", "residual"])
def test_int8_files_hold_codes_as_they_are(name: str, bits: int) -> None:
    """Nothing is left to unpack, whatever the width, and the answers are those of the packed file."""
    graph = compressed(name, bits, Io.INT8)
    exported = export(graph, "onnx-int8")
    assert (exported.form, exported.at_rest) == ("onnx-int8", AtRest.INT8)
    stored = initializers(exported.data)
    for node, weight in zip(graph.layers(), exported.weights, strict=True):
        codes = graph.weight(node).data
        assert codes is not None
        np.testing.assert_array_equal(stored[f"{node.name}.weight"], codes)
        assert (weight.bits, weight.stored_bits, weight.stored_bytes) == (bits, 8, codes.size)
    model = onnx.load_from_string(exported.data)
    of_constants = {node.op_type for node in model.graph.node if all(i in stored for i in node.input)}
    assert of_constants == {"DequantizeLinear"}
    assert not model.functions
    x = np.random.default_rng(bits).integers(-128, 128, (3, *graph.tensors[graph.inputs[0]].shape[1:]), dtype=np.int8)
    feed = {graph.inputs[0]: x}
    np.testing.assert_equal(onnx_run(exported.data, feed), onnx_run(file_of(name, bits, Io.INT8), feed))


def test_what_a_runtime_can_compute_is_not_stored() -> None:
    """A bias's scale is the product of two others and zero points are zeros: 8 bytes a channel that need no room."""
    b = Build(0, (40, 2, 2))
    x = b.clip("relu", b.conv("one", "input", 80))
    network = b.graph(b.conv("two", x, 80, bias=False))
    graph = compress(network, plan_for(network, 8, io=Io.INT8))
    packed, plain = (export(graph, form).data for form in ("onnx", "onnx-int8"))
    stored = [initializers(data) for data in (packed, plain)]
    nodes = onnx.load_from_string(packed).graph.node
    # Two scales of weights are left of what was two and that of the bias, and 80 zeros of int8 and int32.
    assert [sum(v.nbytes for v in s.values() if v.shape == (80,)) for s in stored] == [3 * 320, 4 * 320 + 80 + 320]
    assert len(plain) - len(packed) > 600
    writer = {name: node for node in nodes for name in node.output}
    (read,) = (node for node in nodes if node.input[0] == "one.bias")
    scale, quant = writer[read.input[1]], graph.tensors["one.bias"].quant
    assert quant is not None
    assert scale.op_type == "Mul"
    first, second = (stored[0][name] for name in scale.input)
    assert (first * second).tobytes() == quant.scale.tobytes()
    assert writer[read.input[2]].op_type == "ConstantOfShape"
    x = np.random.default_rng(0).integers(-128, 128, (4, 40, 2, 2), dtype=np.int8)
    (got,), (want,) = (onnx_run(data, {"input": x}).values() for data in (packed, plain))
    np.testing.assert_array_equal(got, want)
    found = optimized(packed)
    assert [found.operators[op] for op in ("QLinearConv", "Mul", "ConstantOfShape")] == [2, 0, 0]
    assert found.widened == ()


def test_there_is_no_other_packed_onnx() -> None:
    with pytest.raises(ExportError, match="packed natively"):
        to_onnx(compressed("plain", 4, Io.INT8), at_rest=AtRest.PACKED)
    for form in ("onnx-packed", "onnx-native", "tflite-zip", "int8"):
        with pytest.raises(ExportError, match="is unknown"):
            export(compressed("plain", 4, Io.INT8), form)


@pytest.mark.parametrize("name", ALL)
def test_equal_graphs_give_equal_bytes(name: str) -> None:
    graph = ALL[name]()
    plan = plan_for(graph, 5)
    first = to_onnx(compress(graph, plan))
    tensors = dict(reversed(graph.tensors.items()))
    again = to_onnx(compress(replace(ALL[name](), tensors=tensors), plan))
    assert again.data == first.data
    assert again.sha256() == first.sha256()
    assert first.format == "onnx"
    assert export(compress(graph, plan), "onnx").data == first.data


def test_file_sizes_follow_the_bits() -> None:
    b = Build(0, (32, 4, 4))
    graph = b.graph(b.conv("c", "input", 64, bias=False))
    size = {bits: len(to_onnx(compress(graph, plan_for(graph, bits))).data) for bits in WEIGHT_BITS}
    n = 64 * 32 * 9
    for bits, n_bytes in size.items():
        assert n * bits // 8 < n_bytes < n * bits // 8 + 3000
    assert sorted(size, key=lambda bits: size[bits]) == list(WEIGHT_BITS)


# ---- borders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_integer_borders_say_what_they_mean(name: str) -> None:
    graph = compressed(name, 4, Io.INT8)
    found = {p.key: p.value for p in onnx.load_from_string(file_of(name, 4, Io.INT8)).metadata_props}
    want = {}
    for side, tensor in (("input", graph.inputs[0]), ("output", graph.outputs[0])):
        q = graph.tensors[tensor].quant
        assert q is not None
        want |= {f"edgecomp.{side}_scale": float(q.scale), f"edgecomp.{side}_zero_point": int(q.zero_point)}
    assert {k: float(v) for k, v in found.items()} == want
    assert {k: np.float32(float(v)) for k, v in found.items()} == {k: np.float32(v) for k, v in want.items()}
    assert not onnx.load_from_string(file_of(name, 4, Io.FLOAT)).metadata_props
    assert not onnx.load_from_string(to_onnx(ALL[name]()).data).metadata_props


# ---- real numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_float_file(name: str) -> None:
    graph = ALL[name]()
    exported = to_onnx(graph)
    x = images(graph, 7)
    want = reference.run(graph, {"input": x.astype(np.float64)})[graph.outputs[0]]
    for batch in (x, x[:1]):
        (got,) = onnx_run(exported.data, {"input": batch}).values()
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want[: len(batch)], rtol=0, atol=2e-5 * np.abs(want).max())
    assert {w.bits for w in exported.weights} == {w.stored_bits for w in exported.weights} == {32}
    assert [w.stored_bytes for w in exported.weights] == [graph.weight(n).data.nbytes for n in graph.layers()]  # type: ignore[union-attr]
    stored = initializers(exported.data)
    for node in graph.layers():
        assert np.array_equal(stored[f"{node.name}.weight"], np.asarray(graph.weight(node).data))


@pytest.mark.parametrize(("low", "high"), [(-np.inf, 0.5), (-0.5, np.inf), (-0.5, 0.5), (0.0, 6.0), (0.0, np.inf)])
def test_float_clips(low: float, high: float) -> None:
    b = Build(0, (3, 4, 4))
    graph = b.graph(b.clip("clip", "input", low, high))
    x = 9 * images(graph, 3)
    (got,) = onnx_run(to_onnx(graph).data, {"input": x}).values()
    assert np.array_equal(got, np.clip(x, np.float32(low), np.float32(high)))


# ---- odd graphs ------------------------------------------------------------------------------------------------------


def add_to_itself(b: Build) -> str:
    x = b.conv("c", "input", 4)
    return b.node(Op.ADD, "add", (x, x), {})


def add_the_input_to_itself(b: Build) -> str:
    return b.node(Op.ADD, "add", ("input", "input"), {})


def clip_with_two_readers(b: Build) -> str:
    x = b.conv("c", "input", 4)
    return b.conv("d", b.node(Op.ADD, "add", (b.clip("relu", x), x), {}), 3)


def tensor_with_three_readers(b: Build) -> str:
    x = b.clip("relu", b.conv("c", "input", 3))
    y = b.node(Op.ADD, "add", (b.conv("d", x, 3), x), {})
    return b.node(Op.CONCAT, "cat", (b.max_pool("p", x), b.max_pool("q", y)), {"axis": 1})


def concat_of_the_input(b: Build) -> str:
    return b.node(Op.CONCAT, "cat", ("input", b.conv("c", "input", 4), "input"), {"axis": 1})


def product_with_itself(b: Build) -> str:
    x = b.conv("c", "input", 4)
    return b.mul("mul", x, x)


def gate_with_two_readers(b: Build) -> str:
    x, y = b.conv("c", "input", 4), b.function(Op.HARD_SIGMOID, "s", b.conv("d", "input", 4))
    return b.node(Op.CONCAT, "cat", (b.mul("m", y, x), y), {"axis": 1})


def swishes_of_the_input(b: Build) -> str:
    return b.mul("m", b.function(Op.HARD_SWISH, "h", "input"), b.function(Op.SILU, "s", "input"))


def hard_sigmoid_beside_others(b: Build) -> str:
    return b.node(Op.CONCAT, "cat", (b.function(Op.HARD_SIGMOID, "s", "input"), "input"), {"axis": 1})


def relu_of_the_input(b: Build) -> str:
    return b.conv("c", b.clip("relu", "input"), 4)


def clip_of_the_input_alone(b: Build) -> str:
    return b.clip("clip", "input", -0.5, 0.75)


def without_bias(b: Build) -> str:
    x = b.clip("relu", b.conv("c", "input", 4, bias=False))
    return b.linear("fc", b.node(Op.FLATTEN, "flat", (x,), {}), 5, bias=False)


def single_weights(b: Build) -> str:
    x = b.conv("c", b.conv("one", "input", 3, (1, 1), pads=(0, 0, 0, 0), groups=3), 1, (1, 1), pads=(0, 0, 0, 0))
    x = b.conv("d", x, 1, (1, 1), pads=(0, 0, 0, 0), bias=False)
    x = b.node(Op.FLATTEN, "flat", (b.node(Op.GLOBAL_AVG_POOL, "pool", (x,), {}),), {})
    return b.linear("fc", x, 1)


def softmax_of_the_input(b: Build) -> str:
    return b.node(Op.SOFTMAX, "softmax", ("input",), {"axis": 1})


def reshaped(b: Build) -> str:
    return b.node(Op.RESHAPE, "rows", (b.conv("c", "input", 4),), {"shape": (1, 8, 18)})


def odd_lengths(b: Build) -> str:
    """Weights of 3 * 7 * 3 = 63, 5 * 7 = 35 and 11 * 5 = 55: multiples of no plane."""
    x = b.conv("c", "input", 7, (3, 1), pads=(1, 0, 1, 0))
    return b.conv("e", b.conv("d", x, 5, (1, 1), pads=(0, 0, 0, 0)), 11, (1, 1), pads=(0, 0, 0, 0))


ODD = [
    add_to_itself,
    add_the_input_to_itself,
    clip_with_two_readers,
    tensor_with_three_readers,
    concat_of_the_input,
    product_with_itself,
    gate_with_two_readers,
    swishes_of_the_input,
    hard_sigmoid_beside_others,
    relu_of_the_input,
    clip_of_the_input_alone,
    without_bias,
    single_weights,
    softmax_of_the_input,
    reshaped,
    odd_lengths,
]


def same(graph: Graph, data: bytes, x: np.ndarray) -> bool:
    """onnxruntime gives the reference's codes, with and without its optimizations; floats to the last step."""
    q = graph.tensors["input"].quant
    inputs = {"input": x if q is None else quantmath.quantize(x, q)}
    want = reference.run(graph, inputs)
    for optimize in (True, False):
        got = onnx_run(data, inputs, optimize=optimize)
        assert list(got) == list(graph.outputs)
        for name, values in got.items():
            assert values.dtype == want[name].dtype
            atol = 1e-6 if graph.producer()[name].op is Op.SOFTMAX and q is None else 0
            np.testing.assert_allclose(values.astype(float), want[name].astype(float), rtol=0, atol=atol)
    return True


@pytest.mark.parametrize("bits", [2, 7, 8])
@pytest.mark.parametrize("io", Io)
@pytest.mark.parametrize("build", ODD, ids=lambda build: build.__name__)
def test_odd_graphs(build: Callable[[Build], str], io: Io, bits: int) -> None:
    b = Build(3, (3, 6, 6))
    graph = b.graph(build(b))
    x = images(graph, 5)
    if bits == 8 and io is Io.FLOAT:
        got = onnx_run(to_onnx(graph).data, {"input": x})[graph.outputs[0]]
        np.testing.assert_allclose(got, reference.run(graph, {"input": x})[graph.outputs[0]], rtol=0, atol=1e-5)
    quantized = compress(graph, plan_for(graph, bits, io=io))
    assert same(quantized, to_onnx(quantized).data, x)


@pytest.mark.parametrize("bits", range(2, 8))
def test_every_length_unpacks(bits: int) -> None:
    """Layers of 1 to 25 weights: with and without a remainder in each field, cut off by Slice."""
    for n in range(1, 26):
        b = Build(n, (n,))
        graph = b.graph(b.linear("fc", "input", 1))
        quantized = compress(graph, plan_for(graph, bits, io=Io.INT8))
        codes = quantized.tensors["fc.weight"].data
        proto = onnx.load_from_string(to_onnx(quantized).data)
        # Have the runtime show the unpacked codes instead of the layer's output.
        del proto.graph.output[:]
        proto.graph.output.append(onnx.helper.make_tensor_value_info("fc.weight", onnx.TensorProto.INT8, (1, n)))
        x = np.zeros((1, n), dtype=np.int8)
        got = onnx_run(proto.SerializeToString(), {"input": x}, optimize=False)["fc.weight"]
        assert np.array_equal(got, codes)
        assert {node.op_type == "Slice" for node in proto.graph.node} >= {any(n * w % 8 for w in FIELDS[bits])}


def renamed(graph: Graph, names: Mapping[str, str]) -> Graph:
    """Give nodes and tensors other names; parameters follow their layer."""

    def new(name: str) -> str:
        for old, other in names.items():
            if name == old or name.startswith(f"{old}."):
                return other + name[len(old) :]
        return name

    return Graph(
        name=graph.name,
        nodes=tuple(
            Node(
                name=new(n.name),
                op=n.op,
                inputs=tuple(map(new, n.inputs)),
                outputs=tuple(map(new, n.outputs)),
                attrs=n.attrs,
            )
            for n in graph.nodes
        ),
        tensors={new(name): replace(t, name=new(name)) for name, t in graph.tensors.items()},
        inputs=tuple(map(new, graph.inputs)),
        outputs=tuple(map(new, graph.outputs)),
    )


NAMES = {
    "like temporaries": {"conv1": "%3", "relu1": "%5", "conv2": "%12", "pool2": "%7"},
    "like constants": {"conv1": "#0", "relu1": "#1", "pool1": "#2", "fc1": "#5"},
    "like what surrounds": {"relu1": "conv1>", "relu2": "conv1>q", "pool1": "input:u8", "pool2": "fc2:u8"},
    "like packed fields": {"relu1": "conv1.weight.0", "pool1": "conv1.weight.1", "relu2": "conv2.weight.2"},
    "with odd characters": {"conv1": "a.b:2", "relu1": "a b/c", "conv2": "ä'\"\\", "fc1": "x;rm -rf", "pool1": "'"},
    "with line breaks": {"conv1": "a\nb", "relu1": "\t", "fc1": "\0"},
}


@pytest.mark.parametrize("io", [*Io, None], ids=str)
@pytest.mark.parametrize("bits", [3, 7])
@pytest.mark.parametrize("case", NAMES)
def test_names_do_not_collide(case: str, bits: int, io: Io | None) -> None:
    """Whatever a layer is called, its tensor is its own, and numbers do not change."""
    graph = renamed(GRAPHS["plain"](), NAMES[case])
    x = images(graph, 4)
    plain = GRAPHS["plain"]()
    if io is None:
        (got,) = onnx_run(to_onnx(graph).data, {"input": x}).values()
        np.testing.assert_array_equal(got, next(iter(onnx_run(to_onnx(plain).data, {"input": x}).values())))
        return
    quantized = compress(graph, plan_for(graph, bits, io=io))
    data = to_onnx(quantized).data
    assert same(quantized, data, x)
    written = [name for node in onnx.load_from_string(data).graph.node for name in node.output]
    stored = [t.name for t in onnx.load_from_string(data).graph.initializer]
    assert len(set(written + stored)) == len(written) + len(stored)
    nodes = {n.name for n in onnx.load_from_string(data).graph.node}
    assert {n.name for n in quantized.layers()} <= nodes


def test_every_tensor_can_be_an_output() -> None:
    """Integer tensors inside a network as outputs too: what checks layer by layer ask for."""
    for io in Io:
        graph = compressed("residual", 4, io)
        names = tuple(n.outputs[0] for n in graph.nodes if graph.tensors[n.outputs[0]].quant is not None)
        watched = replace(graph, outputs=names)
        assert same(watched, to_onnx(watched).data, images(graph, 3))


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_without_the_onnx_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match=r"onnx: the package is missing; install it with: pip install") as e:
        to_onnx(GRAPHS["plain"]())
    assert len(str(e.value).splitlines()) == 1


def test_what_the_onnx_package_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise onnx.checker.ValidationError("first line\nsecond line")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match=r"the onnx package refuses the model: first line$"):
        to_onnx(GRAPHS["plain"]())


def test_unknown_format() -> None:
    with pytest.raises(ExportError, match="format 'onx' is unknown; expected one of onnx, tflite"):
        export(GRAPHS["plain"](), "onx")
