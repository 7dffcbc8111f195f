"""Every runtime computes the same network on NCHW images, says how, and refuses what it cannot run in one line."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from ai_edge_litert.schema_py_generated import BuiltinOperator, TensorType
from onnx import TensorProto, helper

from edgecomp import reference
from edgecomp.benchmarks import runners, runtime
from edgecomp.benchmarks.runners import (
    RUNNERS,
    LiteRt,
    LiteRtReference,
    OnnxRuntime,
    Reference,
    default_runtime,
    optimized,
    runner_class,
)
from edgecomp.errors import BundleError, DataError, TargetError, UsageError
from edgecomp.graph import Graph, Node, Op, QuantParams, Tensor
from tests.filemodels import conv_tflite, onnx_model, tflite_model
from tests.graphs import GRAPHS, images

RNG = np.random.default_rng(5)
WEIGHT = RNG.normal(size=(4, 3, 3, 2)).astype(np.float32)
IMAGES = RNG.normal(size=(5, 3, 6, 7)).astype(np.float32)
IDENTITY = [helper.make_node("Identity", ["x"], ["y"])]
SCALE, ZERO_POINT = 0.05, -3


def convolve(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Loop over output pixels, in float64."""
    o, _, kh, kw = weight.shape
    out = np.zeros((len(x), o, x.shape[2] - kh + 1, x.shape[3] - kw + 1))
    for row in range(out.shape[2]):
        for column in range(out.shape[3]):
            patch = x[:, :, row : row + kh, column : column + kw].astype(np.float64)
            out[:, :, row, column] = np.tensordot(patch, weight.astype(np.float64), axes=((1, 2, 3), (1, 2, 3)))
    return out


def conv_graph() -> Graph:
    tensors = [
        Tensor(name="input", shape=(1, 3, 6, 7)),
        Tensor(name="conv.weight", shape=WEIGHT.shape, data=WEIGHT),
        Tensor(name="conv", shape=(1, 4, 4, 6)),
    ]
    attrs = {"stride": (1, 1), "pads": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1}
    node = Node(name="conv", op=Op.CONV2D, inputs=("input", "conv.weight"), outputs=("conv",), attrs=attrs)
    return Graph(name="g", nodes=(node,), tensors={t.name: t for t in tensors}, inputs=("input",), outputs=("conv",))


def clip_graph() -> Graph:
    quant = QuantParams(bits=8, scale=np.float32(SCALE), zero_point=np.int32(ZERO_POINT))
    tensors = {name: Tensor(name=name, shape=(1, 2, 2, 3), quant=quant) for name in ("input", "clip")}
    attrs = {"low": 0.0, "high": np.inf, "clamp": (ZERO_POINT, 127)}
    node = Node(name="clip", op=Op.CLIP, inputs=("input",), outputs=("clip",), attrs=attrs)
    return Graph(name="g", nodes=(node,), tensors=tensors, inputs=("input",), outputs=("clip",))


ONNX_CONV = onnx_model([helper.make_node("Conv", ["x", "w"], ["y"])], ["N", 3, 6, 7], weights={"w": WEIGHT})
ONNX_CONV_ONE = onnx_model([helper.make_node("Conv", ["x", "w"], ["y"])], [1, 3, 6, 7], weights={"w": WEIGHT})
TFLITE_CONV = conv_tflite(WEIGHT, 6, 7)
FLOAT_MODELS = {
    "onnxruntime": (OnnxRuntime, ONNX_CONV),
    "onnxruntime, N = 1": (OnnxRuntime, ONNX_CONV_ONE),
    "litert": (LiteRt, TFLITE_CONV),
    "litert-reference": (LiteRtReference, TFLITE_CONV),
    "reference": (Reference, conv_graph()),
}


@pytest.mark.parametrize("case", FLOAT_MODELS)
@pytest.mark.parametrize("threads", [1, 2])
def test_convolution_of_nchw_images(case, threads):
    runner, model = FLOAT_MODELS[case]
    loaded = runner(model, threads=threads)
    out = loaded.run(IMAGES)
    assert out.shape == (5, 4, 4, 6)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, convolve(IMAGES, WEIGHT), rtol=1e-4, atol=1e-5)
    assert loaded.input.shape == (3, 6, 7)
    assert loaded.output.shape == (4, 4, 6)
    assert loaded.input.quant is None
    assert loaded.version.split(".")[0].isdigit()


@pytest.mark.parametrize("case", FLOAT_MODELS)
def test_timing_an_image_leaves_run_right(case):
    runner, model = FLOAT_MODELS[case]
    loaded = runner(model)
    loaded.infer_once()
    first = loaded.run(IMAGES[:2])
    loaded.infer_once()
    loaded.infer_once()
    np.testing.assert_array_equal(loaded.run(IMAGES[:2]), first)
    np.testing.assert_allclose(first, convolve(IMAGES[:2], WEIGHT), rtol=1e-4, atol=1e-5)


def test_infer_once_of_onnxruntime_runs_the_sample_image():
    loaded = OnnxRuntime(ONNX_CONV)
    loaded.infer_once()
    x = runtime.sample_image(loaded.input)
    for value in loaded._bound[1:]:
        value.update_inplace(np.zeros((1, 4, 4, 6), dtype=np.float32))
    loaded.infer_once()
    np.testing.assert_allclose(loaded._bound[1].numpy(), convolve(x, WEIGHT), rtol=1e-4, atol=1e-5)


def test_infer_once_of_litert_runs_the_sample_image():
    loaded = LiteRt(TFLITE_CONV)
    loaded.infer_once()
    loaded.run(IMAGES)  # leaves its last image in the input tensor
    loaded.infer_once()
    x = runtime.sample_image(loaded.input)
    got = loaded._interpreter.get_tensor(loaded._outputs[0]["index"]).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got, convolve(x, WEIGHT), rtol=1e-4, atol=1e-5)


ONNX_INT8 = onnx_model(
    [helper.make_node("Max", ["x", "floor"], ["y"])],
    ["N", 2, 2, 3],
    dtype="int8",
    weights={"floor": np.array(ZERO_POINT, dtype=np.int8)},
    facts={
        "edgecomp.input_scale": str(SCALE),
        "edgecomp.input_zero_point": str(ZERO_POINT),
        "edgecomp.output_scale": str(SCALE),
        "edgecomp.output_zero_point": str(ZERO_POINT),
    },
)
TFLITE_INT8 = tflite_model(
    [(BuiltinOperator.RELU, (0,), 1)], [(1, 2, 3, 2)] * 2, type=TensorType.INT8, quant=(SCALE, ZERO_POINT)
)
INT8_MODELS = {
    "onnxruntime": (OnnxRuntime, ONNX_INT8),
    "litert": (LiteRt, TFLITE_INT8),
    "litert-reference": (LiteRtReference, TFLITE_INT8),
    "reference": (Reference, clip_graph()),
}


@pytest.mark.parametrize("case", INT8_MODELS)
def test_float_images_are_quantized_for_an_integer_input(case):
    runner, model = INT8_MODELS[case]
    loaded = runner(model)
    x = RNG.uniform(-9, 9, size=(3, 2, 2, 3)).astype(np.float32)
    x[0, 0, 0] = (0.0, -0.051, 0.1)
    expected = np.clip(np.round(x.astype(np.float64) / SCALE) + ZERO_POINT, -128, 127)
    expected = np.maximum(expected, ZERO_POINT).astype(np.int8)  # the ReLU
    out = loaded.run(x)
    assert out.dtype == np.int8
    np.testing.assert_array_equal(out, expected)
    assert out[0, 0, 0].tolist() == [-3, -3, -1]
    codes = RNG.integers(-128, 128, size=x.shape, dtype=np.int8)
    np.testing.assert_array_equal(loaded.run(codes), np.maximum(codes, ZERO_POINT))
    for border in (loaded.input, loaded.output):
        assert float(border.quant.scale) == pytest.approx(SCALE)
        assert int(border.quant.zero_point) == ZERO_POINT
    loaded.infer_once()


def test_an_integer_input_without_a_scale_wants_codes():
    loaded = OnnxRuntime(onnx_model(IDENTITY, ["N", 2], dtype="int8"))
    assert loaded.run(np.array([[3, -4]], dtype=np.int8)).tolist() == [[3, -4]]
    with pytest.raises(DataError, match="does not say what its codes mean"):
        loaded.run(np.zeros((1, 2), dtype=np.float32))


@pytest.mark.parametrize("case", [*FLOAT_MODELS, *(f"int8 {name}" for name in INT8_MODELS)])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5, 3, 6, 8), "float32"), ((3, 6, 7), "float32"), ((0, 3, 6, 7), "float32"), ((5, 3, 6, 7), "int32")],
)
def test_images_that_do_not_fit_are_refused(case, shape, dtype):
    runner, model = INT8_MODELS[case[5:]] if case.startswith("int8") else FLOAT_MODELS[case]
    if case.startswith("int8") and shape == (5, 3, 6, 7):
        shape = (5, 2, 2, 3)
    with pytest.raises(DataError, match=r"the model takes (\(N, |float32|int8)") as caught:
        runner(model).run(np.zeros(shape, dtype=dtype))
    assert "\n" not in str(caught.value)


def test_an_image_that_fits_no_memory_is_refused():
    border = runtime.Border(name="x", shape=(3, 100_000, 100_000), dtype=np.dtype("float32"), quant=None)
    with pytest.raises(BundleError, match=r"^'x' takes 30000000000 numbers an image, expected at most 268435456$"):
        runtime.sample_image(border)


def test_float64_images_are_taken():
    np.testing.assert_array_equal(LiteRt(TFLITE_CONV).run(IMAGES.astype(np.float64)), LiteRt(TFLITE_CONV).run(IMAGES))


def test_all_outputs_by_name():
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["z"])]
    model = onnx.load_from_string(onnx_model(nodes, ["N", 2]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 2]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2]))
    out = OnnxRuntime(model.SerializeToString()).run_all(np.array([[-1.0, 2.0], [3.0, -4.0]], dtype=np.float32))
    assert {name: value.tolist() for name, value in out.items()} == {
        "y": [[0.0, 2.0], [3.0, 0.0]],
        "z": [[1.0, -2.0], [-3.0, 4.0]],
    }


DAMAGED = {
    "empty": b"",
    "text": b"hello, this is not a model",
    "zeros": bytes(500),
    "half": None,
    "other format": None,
}


@pytest.mark.parametrize(("runner", "own", "other"), [
    (OnnxRuntime, ONNX_CONV, TFLITE_CONV),
    (LiteRt, TFLITE_CONV, ONNX_CONV),
    (LiteRtReference, TFLITE_CONV, ONNX_CONV),
])  # fmt: skip
@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("as_file", [False, True])
def test_damaged_and_foreign_files_are_one_line(runner, own, other, damage, as_file, tmp_path, capfd):
    data = {"half": own[: len(own) // 2], "other format": other}.get(damage, DAMAGED[damage])
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    with pytest.raises(BundleError) as caught:
        runner(path if as_file else data)
    assert str(caught.value).startswith("model.bin: " if as_file else "model: ")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("runner", [OnnxRuntime, LiteRt])
def test_a_missing_file_is_named(runner, tmp_path):
    with pytest.raises(BundleError, match=r"nowhere\.onnx: cannot be read \(No such file"):
        runner(tmp_path / "nowhere.onnx")


def test_graphs_and_files_are_not_mixed_up(tmp_path):
    with pytest.raises(UsageError, match="a graph is run by the runtime 'reference'"):
        OnnxRuntime(conv_graph())
    with pytest.raises(UsageError, match="runs graphs, not files"):
        Reference(tmp_path / "model.onnx")


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, 5000])
@pytest.mark.parametrize("case", FLOAT_MODELS)
def test_a_number_of_threads_must_be_one(case, threads):
    runner, model = FLOAT_MODELS[case]
    with pytest.raises(UsageError, match="threads is"):
        runner(model, threads=threads)


def scaled(scale: str, zero_point: str) -> bytes:
    facts = {"edgecomp.input_scale": scale, "edgecomp.input_zero_point": zero_point}
    return onnx_model(IDENTITY, ["N", 2], dtype="int8", facts=facts)


def without_outputs() -> bytes:
    model = onnx.load_from_string(onnx_model(IDENTITY, ["N", 2]))
    del model.graph.output[:]
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (onnx_model(IDENTITY, ["N", "C", 2]), "fixed shape"),
        (onnx_model(IDENTITY, []), "fixed shape"),
        (onnx_model(IDENTITY, [3, 2]), "takes 3 images at once"),
        (without_outputs(), "no outputs"),
        (scaled("x", "0"), "not a number"),
        (scaled("0", "0"), "expected above 0"),
        (scaled("nan", "0"), "expected above 0"),
        (scaled("1", "999"), "8-bit code"),
    ],
    ids=[
        "free shape", "scalar", "three at once", "no outputs", "scale is text",
        "scale is zero", "scale is nan", "zero point is wide",
    ],
)
def test_models_we_do_not_run_are_refused(model, what):
    with pytest.raises(BundleError, match=what):
        OnnxRuntime(model)


def test_a_missing_runtime_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(TargetError, match=r"onnxruntime is not installed: pip install 'edgecomp\[bench\]'"):
        OnnxRuntime(ONNX_CONV)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(TargetError, match=r"ai-edge-litert is not installed: pip install 'edgecomp\[bench\]'"):
        LiteRt(TFLITE_CONV)
    monkeypatch.setitem(sys.modules, "tflite_runtime", None)
    monkeypatch.setitem(sys.modules, "tflite_micro", None)
    needed = re.search(r'"(tflite-micro[^;]*);', (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    assert needed is not None
    with pytest.raises(TargetError, match=re.escape(f"tflite-micro is not installed: pip install '{needed[1]}'")):
        RUNNERS["tflite-micro"](TFLITE_CONV)
    with pytest.raises(TargetError, match="tflite-runtime is not installed: pip install tflite-runtime"):
        RUNNERS["tflite-runtime"](TFLITE_CONV)


def test_a_broken_runtime_says_why(tmp_path, monkeypatch):
    (tmp_path / "tflite_runtime").mkdir()
    (tmp_path / "tflite_runtime" / "__init__.py").write_text("")
    (tmp_path / "tflite_runtime" / "interpreter.py").write_text("import numpy_of_another_age\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(TargetError, match=r"tflite-runtime cannot be imported.*numpy_of_another_age"):
        RUNNERS["tflite-runtime"](TFLITE_CONV)


def test_the_table_of_runtimes():
    assert list(RUNNERS) == [
        "onnxruntime", "onnxruntime-lean", "litert", "litert-reference", "tflite-runtime", "tflite-micro", "c",
        "reference",
    ]  # fmt: skip
    assert {name: default_runtime(name) for name in ("onnx", "tflite", "tflm", "graph")} == {
        "onnx": "onnxruntime",
        "tflite": "litert",
        "tflm": "tflite-micro",
        "graph": "reference",
    }
    assert runner_class("litert") is LiteRt
    with pytest.raises(UsageError, match="'tensorrt' is unknown; expected one of onnxruntime, onnxruntime-lean"):
        runner_class("tensorrt")
    with pytest.raises(TargetError, match="no runtime reads the format 'pb'; expected one of c, graph, onnx, tflite"):
        default_runtime("pb")


# ---- what the runtimes say of themselves -----------------------------------------------------------------------------


def test_onnxruntime_says_how_it_runs():
    facts = OnnxRuntime(ONNX_CONV, threads=2).describe()
    assert facts["providers"] == ("CPUExecutionProvider",)
    assert (facts["intra_op_threads"], facts["inter_op_threads"], facts["graph_optimization"]) == (2, 1, "all")


@pytest.mark.parametrize("threads", [1, 2])
def test_onnxruntime_is_told_what_we_say(threads):
    options = OnnxRuntime(ONNX_CONV, threads=threads)._session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (threads, 1)
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL


def test_litert_says_what_xnnpack_took():
    default = LiteRt(TFLITE_CONV).describe()
    assert (default["xnnpack"], default["nodes"], default["nodes_in_xnnpack"]) == (True, 1, 1)
    plain = LiteRtReference(TFLITE_CONV).describe()
    assert (plain["xnnpack"], plain["nodes"], plain["nodes_in_xnnpack"]) == (False, 1, 0)


def test_litert_says_what_xnnpack_left():
    # XNNPACK knows no FLOOR_MOD, so the graph falls into two parts around it.
    model = tflite_model(
        [
            (BuiltinOperator.RELU, (0,), 1),
            (BuiltinOperator.FLOOR_MOD, (1, 1), 2),
            (BuiltinOperator.RELU, (2,), 3),
            (BuiltinOperator.ADD, (3, 1), 4),
        ],
        [(1, 4, 4, 2)] * 5,
    )
    facts = LiteRt(model).describe()
    assert facts["xnnpack"] is True
    assert (facts["nodes"], facts["nodes_in_xnnpack"]) == (4, 3)
    assert facts["nodes_left_to_builtin_kernels"] == ("1 FLOOR_MOD",)


def qdq_conv(weight_type: str) -> bytes:
    """QDQ convolution; weights as int8, or as INT4 widened by DequantizeLinear in every run."""
    rng = np.random.default_rng(2)
    codes = rng.integers(-7, 8, size=(8, 4, 3, 3)).astype(np.int8)
    weights = {
        "s": np.array(0.1, dtype=np.float32),
        "z": np.array(0, dtype=np.uint8),
        "ws": np.full(8, 0.02, dtype=np.float32),
        "bs": np.full(8, 0.002, dtype=np.float32),
        "b": np.zeros(8, dtype=np.int32),
    }
    extra = []
    if weight_type == "int8":
        weights["w"] = codes
    else:
        extra = [helper.make_tensor("w", TensorProto.INT4, codes.shape, codes.reshape(-1).tolist())]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], axis=0, name="widen"),
        helper.make_node("DequantizeLinear", ["b", "bs"], ["bd"], axis=0),
        helper.make_node("Conv", ["xd", "wd", "bd"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "s", "z"], ["y"]),
    ]
    return onnx_model(nodes, ["N", 4, 8, 8], weights=weights, extra=extra)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_onnxruntime_executes_tells_integer_convolutions_from_widened_ones(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(qdq_conv("int8"))
    found = optimized(path)
    assert found.operators["QLinearConv"] == 1
    assert found.operators["Conv"] == 0
    assert found.widened == ()
    assert found.in_float == {}
    found = optimized(qdq_conv("int4"))
    assert found.operators["QLinearConv"] == 0
    assert "widen" in found.widened
    # Without integers to multiply, the convolution between the conversions is what is left in float.
    assert [op for op in found.in_float if "Conv" in op]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]
    with pytest.raises(BundleError, match="model: onnxruntime cannot load it"):
        optimized(b"not a model")


# ---- silence ---------------------------------------------------------------------------------------------------------


def test_chatter_is_dropped_and_the_rest_is_not(capfd):
    with runtime.quiet():
        os.write(2, b"INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\n")
        os.write(2, b"\x1b[0;93m2026-01-01 00:00:00 [W:onnxruntime:Default, device_discovery.cc:164] no GPU\x1b[m\n")
        os.write(2, b"ERROR: something is wrong\nsecond line\n")
        os.write(2, b"2026-01-01 00:00:00 [E:onnxruntime:Default, x.cc:1] bad")
    assert capfd.readouterr().err == (
        "ERROR: something is wrong\nsecond line\n2026-01-01 00:00:00 [E:onnxruntime:Default, x.cc:1] bad"
    )
    os.write(2, b"INFO: afterwards\n")
    assert capfd.readouterr().err == "INFO: afterwards\n"


def test_what_fails_is_left_to_its_exception(capfd):
    def fail() -> None:
        with runtime.quiet():
            os.write(2, b"ERROR: said twice\n")
            raise BundleError("said once")

    with pytest.raises(BundleError):
        fail()
    os.write(2, b"still here\n")
    assert capfd.readouterr().err == "still here\n"


def test_without_stderr_things_go_on(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with runtime.quiet():
        value = 1
    assert value == 1


@pytest.mark.parametrize("quiet", [True, False])
def test_a_fresh_process_is_silent(quiet, tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(TFLITE_CONV)
    (tmp_path / "m.onnx").write_bytes(ONNX_CONV)
    plain = f"from ai_edge_litert.interpreter import Interpreter as I; I({str(path)!r}).allocate_tensors()"
    ours = (
        "from edgecomp.benchmarks.runners import LiteRt, OnnxRuntime; "
        f"LiteRt({str(path)!r}).infer_once(); OnnxRuntime({str(tmp_path / 'm.onnx')!r}).infer_once()"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", ours if quiet else plain], capture_output=True, text=True, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (done.stderr == "") is quiet  # the plain interpreter chats, or this test would prove nothing


def test_the_reference_takes_many_images_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = GRAPHS["residual"]()
    x = images(graph, 5)
    whole = reference.run(graph, {graph.inputs[0]: x})[graph.outputs[0]]
    seen: list[int] = []
    inner = reference.run

    def run(graph: Graph, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append(len(inputs[graph.inputs[0]]))
        return inner(graph, inputs)

    monkeypatch.setattr(reference, "run", run)
    one_image = 8 * sum(math.prod(t.shape[1:]) for t in graph.tensors.values() if t.data is None)
    monkeypatch.setattr(runners, "_KEPT_BYTES", 2 * one_image)
    np.testing.assert_allclose(runner_class("reference")(graph).run(x), whole, rtol=1e-5, atol=1e-6)
    assert seen == [2, 2, 1]
