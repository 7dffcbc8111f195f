"""TFLite files against the reference, in LiteRT's reference kernels and in its default (XNNPACK) ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from ai_edge_litert import interpreter as litert
from ai_edge_litert import schema_py_generated as schema

from edgecomp import quantmath, reference
from edgecomp.compress import compress
from edgecomp.errors import ExportError
from edgecomp.exporters import to_tflite as module
from edgecomp.exporters.tflite_schema import pack_dense
from edgecomp.exporters.to_tflite import to_tflite
from edgecomp.graph import Graph, Node, Op, QuantParams, Tensor
from edgecomp.ops import OPS, PROBABILITIES
from edgecomp.plan import Io
from tests.graphs import GRAPHS, Build, images, plan_for
from tests.tflite_cases import CASES, made

RESOLVERS = {
    "reference": litert.OpResolverType.BUILTIN_REF,
    "builtin": litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    "xnnpack": litert.OpResolverType.AUTO,
}
N_IMAGES = 3


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else x


def nchw(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x


def litert_run(data: bytes, x: np.ndarray, resolver: str, *, batch: int = 1) -> np.ndarray:
    """Run NCHW images through a file, `batch` at a time; the output is NCHW again."""
    interpreter = litert.Interpreter(
        model_content=data, experimental_op_resolver_type=RESOLVERS[resolver], num_threads=1
    )
    source, target = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    if batch > 1:
        interpreter.resize_tensor_input(source["index"], (batch, *source["shape"][1:]))
    interpreter.allocate_tensors()
    outputs = []
    for start in range(0, len(x), batch):
        interpreter.set_tensor(source["index"], nhwc(x[start : start + batch]))
        interpreter.invoke()
        outputs.append(nchw(interpreter.get_tensor(target["index"])))
    return np.concatenate(outputs)


def close(got: np.ndarray, want: np.ndarray, tolerance: float, what: str) -> bool:
    """Compare whole arrays; on a mismatch say where the worst element is, both values, and how many differ."""
    assert got.shape == want.shape, what
    assert got.dtype == want.dtype, what
    off = np.abs(got.astype(np.float64) - want.astype(np.float64))
    worst = np.unravel_index(off.argmax(), off.shape)
    text = f"{what}: at {worst} got {got[worst]}, want {want[worst]}; {(off > tolerance).sum()} of {off.size} are off"
    assert off[worst] <= tolerance, text
    return True


def operators(data: bytes) -> list[str]:
    """List a file's operators in running order, with their fused activation."""
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    functions = {v: k for k, v in vars(schema.ActivationFunctionType).items() if isinstance(v, int)}
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    found = []
    for op in model.subgraphs[0].operators:
        function = functions[getattr(op.builtinOptions, "fusedActivationFunction", 0)]
        name = names[model.operatorCodes[op.opcodeIndex].builtinCode]
        found.append(name if function == "NONE" else f"{name}+{function}")
    return found


VARIANTS = {
    "float": (32, Io.FLOAT),
    "int8": (8, Io.INT8),
    "int8, float io": (8, Io.FLOAT),
    "int4": (4, Io.INT8),
    "int4, float io": (3, Io.FLOAT),
}


def variant_of(graph: Graph, variant: str) -> tuple[Graph, np.ndarray]:
    """Compress as the variant says; give the graph and inputs for it."""
    bits, io = VARIANTS[variant]
    x = images(graph, N_IMAGES)
    if bits == 32:
        return graph, x
    quantized = compress(graph, plan_for(graph, bits, io=io))
    params = quantized.tensors["input"].quant
    return quantized, x if params is None else quantmath.quantize(x, params)


def output_step(graph: Graph, want: np.ndarray) -> float:
    """The unit an output is judged in: one for codes, the last step before a float border, or a float tolerance."""
    if want.dtype == np.int8:
        return 1.0
    last = graph.producer()[graph.outputs[0]]
    params = graph.tensors[last.inputs[0]].quant
    if last.op is Op.DEQUANTIZE and params is not None:
        return 1.001 * float(params.scale)
    return 1e-4 * float(np.abs(want).max())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_parity(case: str, variant: str) -> None:
    graph, x = variant_of(made(case), variant)
    want = reference.run(graph, {"input": x})[graph.outputs[0]]
    exported = to_tflite(graph)
    if variant == "int8":
        assert operators(exported.data) == CASES[case].ops.split()
        # A shuffle transposes between two reshapes; what remains brings images into another layout.
        strays = CASES[case].ops.replace("RESHAPE TRANSPOSE RESHAPE", "").split()
        assert exported.stray_transposes == strays.count("TRANSPOSE")
    tolerance = CASES[case].steps * output_step(graph, want)
    if graph.producer()[graph.outputs[0]].op in PROBABILITIES and variant.endswith("float io"):
        # The softmax or sigmoid runs in float behind the border, on logits equal to the last step.
        tolerance = 1e-4
    for resolver in RESOLVERS:
        got = litert_run(exported.data, x, resolver)
        assert close(got, want.astype(got.dtype), tolerance, f"{case}, {variant}, {resolver}")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_tensor_of_whole_networks(name: str, bits: int) -> None:
    """Each node is within one step of the reference, given the runtime's own codes as input."""
    graph = compress(GRAPHS[name](), plan_for(GRAPHS[name](), bits, io=Io.INT8))
    data = to_tflite(graph).data
    orders = module.feature_orders(graph)
    interpreter = litert.Interpreter(
        model_content=data, experimental_op_resolver_type=RESOLVERS["reference"], experimental_preserve_all_tensors=True
    )
    interpreter.allocate_tensors()
    numbers = {detail["name"]: detail["index"] for detail in interpreter.get_tensor_details()}
    params = graph.tensors["input"].quant
    assert params is not None
    interpreter.set_tensor(numbers["input"], nhwc(quantmath.quantize(images(graph, 1), params)))
    interpreter.invoke()
    values: dict[str, np.ndarray] = {}
    for tensor in graph.tensors.values():
        if tensor.data is not None:
            values[tensor.name] = tensor.data
            continue
        value = nchw(interpreter.get_tensor(numbers[tensor.name]))
        if tensor.name in orders:
            value = value[:, np.argsort(orders[tensor.name])]
        values[tensor.name] = value
    for node in graph.nodes:
        compute = OPS[node.op].compute_integer
        assert compute is not None
        assert close(values[node.outputs[0]], compute(node, graph.tensors, values), 1, f"{name}, {bits}, {node.name}")


@pytest.mark.parametrize("resolver", RESOLVERS)
@pytest.mark.parametrize("variant", ["float", "int8", "int4"])
@pytest.mark.parametrize("name", GRAPHS)
def test_more_images_at_once_give_the_same(name: str, variant: str, resolver: str) -> None:
    graph, x = variant_of(GRAPHS[name](), variant)
    data = to_tflite(graph).data
    one, three = litert_run(data, x, resolver), litert_run(data, x, resolver, batch=3)
    assert close(three, one, 1e-5 if variant == "float" else 0, f"{name}, {variant}, {resolver}")


# ---- activations -----------------------------------------------------------------------------------------------------


# scale, zero point, clamp -> operators
CLAMPS = {
    "relu": (0.1, 0, (0, 127), "ADD+RELU"),
    "relu that saturation implies": (0.1, -128, (-128, 127), "ADD+RELU"),
    "none": (0.1, 3, (-128, 127), "ADD"),
    "relu6 above": (0.05, -128, (-128, -8), "ADD+RELU6"),
    "relu6 between two codes": (0.07, -10, (-10, 76), "ADD+RELU6"),
    "relu6 within": (0.1, -10, (-10, 50), "ADD+RELU6"),
    "hardtanh": (0.1, -10, (-20, 0), "ADD+RELU_N1_TO_1"),
    "one step off relu6": (0.1, -10, (-10, 49), "ADD MAXIMUM MINIMUM"),
    "low only": (0.1, 0, (-5, 127), "ADD MAXIMUM MINIMUM"),
}


@pytest.mark.parametrize("case", CLAMPS)
def test_clamps(case: str) -> None:
    scale, zero_point, clamp, ops = CLAMPS[case]
    params = QuantParams(bits=8, scale=np.array(scale), zero_point=np.array(zero_point))
    inner = QuantParams(bits=8, scale=np.array(0.11), zero_point=np.array(5))
    tensors = [Tensor(name="input", shape=(1, 256), quant=inner), Tensor(name="sum", shape=(1, 256), quant=params)]
    node = Node(name="sum", op=Op.ADD, inputs=("input", "input"), outputs=("sum",), attrs={"clamp": clamp})
    graph = Graph(name="g", nodes=(node,), tensors={t.name: t for t in tensors}, inputs=("input",), outputs=("sum",))
    x = np.arange(-128, 128).astype(np.int8)[None]
    want = reference.run(graph, {"input": x})["sum"]
    data = to_tflite(graph).data
    assert operators(data) == ops.split()
    assert (want.min(), want.max()) == clamp or case == "none"
    for resolver in RESOLVERS:
        got = litert_run(data, x, resolver)
        assert close(got, want, 1, f"{case}, {resolver}")
        assert clamp[0] <= got.min() <= got.max() <= clamp[1]


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "codes", "packed"),
    [
        (4, [1, -2, 7, -7, 3], "e1 97 03"),
        (4, [0, 1], "10"),
        (2, [1, -1, 0, -2, 1], "8d 01"),
        (8, [1, -2], "01 fe"),
        (4, [], ""),
    ],
)
def test_packing_by_hand(width: int, codes: list[int], packed: str) -> None:
    assert pack_dense(np.array(codes, dtype=np.int8), width) == bytes.fromhex(packed)


def stored(data: bytes) -> dict[str, tuple[object, bytes]]:
    """Map tensor names to (tensor, its bytes)."""
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    buffers = [b"" if b.data is None else bytes(b.data) for b in model.buffers]
    return {t.name.decode(): (t, buffers[t.buffer]) for t in model.subgraphs[0].tensors}


def test_a_kernel_in_the_file_is_ohwi_low_nibble_first() -> None:
    b = Build(0, (2, 4, 4))
    graph = compress(*(g := b.graph(b.conv("c", "input", 3, (1, 2), pads=(0, 0, 0, 0))), plan_for(g, 4, io=Io.INT8)))
    codes = np.array([1, -2, 3, -4, 5, -6, 7, -7, 0, 1, 2, 3], dtype=np.int8).reshape(3, 2, 1, 2)  # O I H W
    graph = replace(graph, tensors={**graph.tensors, "c.weight": replace(graph.tensors["c.weight"], data=codes)})
    tensor, data = stored(to_tflite(graph).data)["c.weight"]
    # row 0 is W=0: 1, 3; W=1: -2, -4; and so on
    assert data == bytes.fromhex("31 ce 75 9a 20 31")
    assert tuple(tensor.shape) == (3, 1, 2, 2)  # type: ignore[attr-defined]
    assert tensor.type == schema.TensorType.INT4  # type: ignore[attr-defined]


# layer kind -> type in the file of a 4-bit weight, shape, axis of the scales
LAYOUTS = {
    "conv": ("INT4", (5, 3, 3, 3), 0),
    "conv without bias": ("INT4", (5, 3, 3, 3), 0),
    "conv 1x1": ("INT4", (7, 5), 0),
    "conv 1x1 stride 2": ("INT4", (7, 1, 1, 3), 0),
    "conv depthwise multiplier": ("INT8", (1, 3, 3, 9), 3),
    "conv grouped": ("INT8", (4, 3, 3, 3), 0),
    "linear": ("INT4", (9, 17), 0),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_weights_are_stored_packed(case: str) -> None:
    graph, _ = variant_of(made(case), "int4")
    layer = graph.layers()[0]
    exported = to_tflite(graph)
    tensor, data = stored(exported.data)[f"{layer.name}.weight"]
    kind, shape, axis = LAYOUTS[case]
    width = {"INT4": 4, "INT8": 8}[kind]
    assert tensor.type == getattr(schema.TensorType, kind)  # type: ignore[attr-defined]
    assert (tuple(tensor.shape), tensor.quantization.quantizedDimension) == (shape, axis)  # type: ignore[attr-defined]
    assert len(data) == (np.prod(shape) * width + 7) // 8
    (weight,) = exported.weights
    assert (weight.layer, weight.bits, weight.stored_bits, weight.stored_bytes) == (layer.name, 4, width, len(data))
    quant = graph.weight(layer).quant
    assert quant is not None
    np.testing.assert_array_equal(tensor.quantization.scale, quant.scale)  # type: ignore[attr-defined]
    assert not np.any(tensor.quantization.zeroPoint)  # type: ignore[attr-defined]
    bias, _ = stored(exported.data)[f"{layer.name}.bias"]
    source = graph.tensors["input"].quant
    assert source is not None
    np.testing.assert_array_equal(
        bias.quantization.scale,  # type: ignore[attr-defined]
        quantmath.bias_scale(source.scale, quant.scale),
    )
    assert bias.type == schema.TensorType.INT32  # type: ignore[attr-defined]


def test_packed_1x1_convolutions_run_where_xnnpack_reads_them() -> None:
    graph, _ = variant_of(made("conv 1x1"), "int4")
    assert operators(to_tflite(graph).data) == ["FULLY_CONNECTED+RELU"]


@pytest.mark.parametrize("resolver", RESOLVERS)
def test_a_channel_whose_weights_have_nearly_died_keeps_its_bias(resolver: str) -> None:
    """XNNPACK's kernels for int4 add up sixteen times the products and the bias in an int32."""
    build = Build(0, (8, 4, 4))
    graph = build.graph(build.conv("pointwise", "input", 16, (1, 1), pads=(0, 0, 0, 0)))
    weight, bias = (graph.tensors[name] for name in graph.nodes[0].inputs[1:])
    assert weight.data is not None
    assert bias.data is not None
    dying = np.where(np.arange(16) == 3, 1e-9, 1).astype(np.float32)
    tensors = {
        weight.name: replace(weight, data=weight.data * dying[:, None, None, None]),
        bias.name: replace(bias, data=bias.data + np.where(np.arange(16) == 3, np.float32(0.7), 0).astype(np.float32)),
    }
    graph = replace(graph, tensors={**graph.tensors, **tensors})
    quantized, x = variant_of(graph, "int4")
    want = reference.run(quantized, {"input": x})[quantized.outputs[0]]
    assert close(litert_run(to_tflite(quantized).data, x, resolver), want, 1, resolver)


@pytest.mark.parametrize("case", ["linear", "conv 1x1"])
def test_two_bit_weights_when_the_table_has_them(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "field_bits", lambda *_: 2)
    graph = compress(made(case), plan_for(made(case), 2, io=Io.INT8))
    params = graph.tensors["input"].quant
    assert params is not None
    x = quantmath.quantize(images(graph, N_IMAGES), params)
    exported = to_tflite(graph)
    assert exported.weights[0].stored_bytes == -(-graph.weight(graph.layers()[0]).data.size // 4)  # type: ignore[union-attr]
    for resolver in RESOLVERS:
        got = litert_run(exported.data, x, resolver)
        assert close(got, reference.run(graph, {"input": x})[graph.outputs[0]], 1, f"{case}, {resolver}")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", GRAPHS)
def test_files(name: str, variant: str) -> None:
    graph, _ = variant_of(GRAPHS[name](), variant)
    exported = to_tflite(graph)
    assert to_tflite(replace(graph, tensors=dict(reversed(list(graph.tensors.items()))))).data == exported.data
    assert [w.layer for w in exported.weights] == [node.name for node in graph.layers()]
    model = schema.ModelT.InitFromPackedBuf(exported.data, 0)
    main = model.subgraphs[0]
    assert exported.data[4:8] == b"TFL3"
    assert (model.version, model.description, main.name) == (3, b"edgecomp", b"main")
    names = [t.name.decode() for t in main.tensors]
    assert [names[i] for i in main.inputs] == list(graph.inputs)
    assert [names[i] for i in main.outputs] == list(graph.outputs)
    activations = {name for name, tensor in graph.tensors.items() if tensor.data is None}
    assert variant == "float" or activations <= set(names)
    buffers = [bytes(b.data) for b in model.buffers[1:]]
    assert model.buffers[0].data is None
    assert len(set(buffers)) == len(buffers)
    packed = schema.Model.GetRootAs(exported.data, 0)
    for i in range(1, packed.BuffersLength()):
        table = packed.Buffers(i)._tab
        assert table.Vector(table.Offset(4)) % 16 == 0
    # Beside buffers: 8 bytes a channel for scales of weights and biases, shared zero points, and graph structure.
    channels = sum(graph.weight(node).shape[0] for node in graph.layers()) if variant != "float" else 0
    structure = len(exported.data) - sum(len(b) + 28 for b in buffers) - 8 * channels
    assert structure < 1000 + 220 * len(main.tensors)


def test_names_and_scales_reach_the_runtime() -> None:
    graph, _ = variant_of(GRAPHS["residual"](), "int8")
    interpreter = litert.Interpreter(model_content=to_tflite(graph).data)
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    assert interpreter.get_signature_list() == {"serving_default": {"inputs": ["input"], "outputs": ["fc"]}}
    for detail, name in ((source, "input"), (target, "fc")):
        params = graph.tensors[name].quant
        assert params is not None
        assert detail["name"] == name
        assert detail["quantization"] == (float(params.scale), int(params.zero_point))
    assert tuple(source["shape"]) == (1, 8, 8, 3)


# ---- refusals --------------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[Callable[[Build], str], str]] = {
    "max pool with dilation": (
        lambda b: b.max_pool("layer.p", "input", (2, 2), dilation=(2, 2)),
        "tflite: 'layer.p': max_pool has dilation, the format has none; remove it",
    ),
    "avg pool that leaves padding out": (
        lambda b: b.avg_pool("layer.p", "input", (3, 3), pads=(1, 1, 1, 1), include_pad=0),
        "tflite: 'layer.p': avg_pool leaves its padding (1, 1, 1, 1) out of the mean, the format does so for SAME "
        "padding only; use count_include_pad=True or another padding",
    ),
    "softmax over rows": (
        lambda b: b.node(Op.SOFTMAX, "layer.s", ("input",), {"axis": 2}),
        "tflite: 'layer.s': softmax over axis 2, the format has channels only (images: 1)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    b = Build(0, (3, 8, 8))
    build, message = REFUSED[case]
    graph = b.graph(build(b))
    for variant in ("float", "int8"):
        with pytest.raises(ExportError) as caught:
            to_tflite(variant_of(graph, variant)[0])
        assert str(caught.value) == message


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ExportError, match=r"^tflite: flatbuffers is missing; run pip install 'edgecomp\[build\]'$"):
        to_tflite(made("conv"))


def test_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgecomp.exporters import tflite_schema

    monkeypatch.setattr(tflite_schema, "_MAX_BYTES", 500)
    with pytest.raises(ExportError, match=r"^tflite: the weights take \d+ bytes, the format holds 500"):
        to_tflite(made("conv"))
