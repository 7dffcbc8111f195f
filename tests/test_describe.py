"""What `inspect` says of files: ours as the exporters count them, foreign ones against literals; and of broken ones."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgecomp import bundle, manifest
from edgecomp.artifact import Exported
from edgecomp.compress import compress
from edgecomp.errors import BundleError, ExportError
from edgecomp.exporters import describe as module
from edgecomp.exporters import flatbuffer
from edgecomp.exporters.describe import describe, describe_tables
from edgecomp.exporters.to_c import to_c
from edgecomp.exporters.to_onnx import to_onnx
from edgecomp.exporters.to_tflite import to_tflite
from edgecomp.graph import Graph
from edgecomp.plan import Io
from edgecomp.report import BenchReport, Comparison, Ratio
from edgecomp.strictjson import write_json
from tests.graphs import GRAPHS, plan_for
from tests.test_report import MEASURED, NO_LATENCY

onnx = pytest.importorskip("onnx")
flatbuffers = pytest.importorskip("flatbuffers")
schema = pytest.importorskip("ai_edge_litert.schema_py_generated")

from tests.filemodels import conv_onnx, conv_tflite, onnx_model  # noqa: E402  (needs onnx and the schema)

WRITERS: dict[str, Callable[[Graph], Exported]] = {"onnx": to_onnx, "tflite": to_tflite}


@pytest.fixture
def say(tmp_path: Path) -> Callable[..., dict]:
    """Describe bytes, through a file whose name says nothing, and check what must hold of every description."""

    def described(data: bytes, name: str = "file") -> dict:
        path = tmp_path / name
        path.write_bytes(data)
        found = describe(path)
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert found["bytes"] == len(data)
        lines = describe_tables(found).splitlines()
        assert all(line.isprintable() for line in lines)
        blocks = "\n".join(lines).split("\n\n")
        assert all(len(set(map(len, block.splitlines()))) == 1 for block in blocks if block.startswith("|"))
        return found

    return described


def mixed(name: str, io: Io = Io.FLOAT, shift: int = 0) -> Graph:
    """A graph whose layers have all widths in turn."""
    graph = GRAPHS[name]()
    bits = {node.name: 2 + (i + shift) % 7 for i, node in enumerate(graph.layers())}
    return compress(graph, plan_for(graph, bits, io=io))


# ---- files we export -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("io", list(Io))
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("format_name", WRITERS)
def test_weights_are_those_that_the_exporter_counts(say, format_name, name, io):
    for shift in (0, 3):
        graph = mixed(name, io, shift)
        exported = WRITERS[format_name](graph)
        found = say(exported.data)
        assert (found["kind"], found["sha256"]) == (format_name, exported.sha256())
        assert found["producer"].split()[0] == "edgecomp"
        got = {w["name"]: (w["bits"], w["stored_bytes"]) for w in found["weights"]}
        bits = "bits" if format_name == "onnx" else "stored_bits"
        assert got == {w.layer: (getattr(w, bits), w.stored_bytes) for w in exported.weights}
        shapes = {node.name: graph.weight(node).shape for node in graph.layers()}
        assert {w["name"]: w["n"] for w in found["weights"]} == {k: math.prod(v) for k, v in shapes.items()}
        if format_name == "onnx":
            assert {w["name"]: tuple(w["shape"]) for w in found["weights"]} == shapes
        total, n = sum(w.stored_bytes for w in exported.weights), sum(math.prod(s) for s in shapes.values())
        assert found["weight_bytes"] == total
        assert found["other_bytes"] == len(exported.data) - total
        assert found["mean_bits"] == pytest.approx(8 * total / n, abs=1e-4)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_is_read_off_the_packed_fields(say, bits):
    graph = GRAPHS["plain"]()
    found = say(to_onnx(compress(graph, plan_for(graph, bits))).data)
    assert {w["name"]: w["bits"] for w in found["weights"]} == dict.fromkeys(("conv1", "conv2", "fc1", "fc2"), bits)
    assert found["mean_bits"] == pytest.approx(bits, abs=0.02)
    assert found["weights"][0]["shape"] == [8, 3, 3, 3]


@pytest.mark.parametrize("format_name", WRITERS)
def test_a_float_file(say, format_name):
    graph = GRAPHS["separable"]()
    exported = WRITERS[format_name](graph)
    found = say(exported.data)
    assert {w["name"]: w["stored_bytes"] for w in found["weights"]} == {
        node.name: graph.weight(node).data.nbytes for node in graph.layers()
    }
    assert found["mean_bits"] == 32
    assert [v["dtype"] for v in (*found["inputs"], *found["outputs"])] == ["float32", "float32"]
    assert "scale" not in found["inputs"][0]


@pytest.mark.parametrize("format_name", WRITERS)
@pytest.mark.parametrize("name", GRAPHS)
def test_integer_borders_carry_scale_and_zero_point(say, format_name, name):
    graph = mixed(name, Io.INT8)
    found = say(WRITERS[format_name](graph).data)
    for side, names in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        tensor = graph.tensors[names[0]]
        n, *rest = tensor.shape
        shape = ["N", *rest] if format_name == "onnx" else [n, *(rest[1:] + rest[:1])]
        assert found[side] == [
            {
                "name": names[0],
                "shape": shape,
                "dtype": "int8",
                "scale": float(tensor.quant.scale),
                "zero_point": int(tensor.quant.zero_point),
            }
        ]


def test_operators_are_counted_as_the_formats_own_readers_do(say):
    graph = mixed("separable")
    data = to_onnx(graph).data
    assert say(data)["operators"] == Counter(node.op_type for node in onnx.load_from_string(data).graph.node)
    assert say(data)["format_version"] == "opset 18"
    data = to_tflite(graph).data
    model = schema.ModelT.InitFromPackedBuf(data)
    names = {value: key for key, value in vars(schema.BuiltinOperator).items()}
    codes = [names[model.operatorCodes[op.opcodeIndex].builtinCode] for op in model.subgraphs[0].operators]
    assert say(data)["operators"] == Counter(codes)
    assert say(data)["format_version"] == "schema 3"


# ---- foreign files ---------------------------------------------------------------------------------------------------


def test_foreign_onnx_counts_packed_and_typed_weights(say):
    helper, kinds = onnx.helper, onnx.TensorProto
    extra = [
        helper.make_tensor("four", kinds.INT4, (3, 5), np.zeros(15, dtype=np.int8)),
        helper.make_tensor("ufour", kinds.UINT4, (2, 2), bytes(2), raw=True),
        helper.make_tensor("typed", kinds.FLOAT, (1, 2, 3), [0.5] * 6),
        helper.make_tensor("half", kinds.FLOAT16, (2, 2), bytes(8), raw=True),
        helper.make_tensor("indices", kinds.INT64, (2, 2), [0] * 4),
        helper.make_tensor("bias", kinds.FLOAT, (7,), [0.0] * 7),
    ]
    if hasattr(kinds, "INT2"):
        extra.append(helper.make_tensor("two", kinds.INT2, (3, 3), bytes(3), raw=True))
    constant = helper.make_tensor("", kinds.INT8, (2, 3), bytes(6), raw=True)
    nodes = [helper.make_node("Constant", [], ["inside"], value=constant), helper.make_node("Relu", ["x"], ["y"])]
    data = onnx_model(nodes, ["batch", 4], weights={"layer.weight": np.zeros((4, 4), dtype=np.uint8)}, extra=extra)
    found = say(data)
    rows = {w["name"]: (w["shape"], w["n"], w["bits"], w["stored_bytes"]) for w in found["weights"]}
    if hasattr(kinds, "INT2"):
        assert rows.pop("two") == ([3, 3], 9, 2, 3)
    typed = rows.pop("typed")
    assert typed[:3] == ([1, 2, 3], 6, 32)
    assert 24 <= typed[3] <= 27  # 4 bytes each, and what says so
    assert rows.pop("four")[:3] == ([3, 5], 15, 4)
    assert rows == {
        "layer.weight": ([4, 4], 16, 8, 16),
        "ufour": ([2, 2], 4, 4, 2),
        "half": ([2, 2], 4, 16, 8),
        "inside": ([2, 3], 6, 8, 6),
    }
    assert found["inputs"] == [{"name": "x", "shape": ["batch", 4], "dtype": "float32"}]
    assert found["outputs"] == [{"name": "y", "shape": None, "dtype": "float32"}]
    assert found["weight_bytes"] + found["other_bytes"] == len(data)
    assert found["format_version"] == "opset 21"


def test_foreign_onnx_with_weights_in_another_file(say):
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[100, 100])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    data = onnx_model([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], ["N", 100], extra=[tensor])
    found = say(data)
    assert found["weights"] == [
        {"name": "w", "shape": [100, 100], "n": 10000, "bits": 32, "stored_bytes": 40000, "external": "weights.bin"}
    ]
    assert (found["weight_bytes"], found["other_bytes"]) == (40000, len(data))


def test_a_foreign_onnx_file_is_known_by_content_not_suffix(say):
    data = conv_onnx(np.ones((2, 3, 3, 3), dtype=np.float32), 8)
    assert say(data, "model.tflite")["kind"] == say(data, "model.onnx")["kind"] == "onnx"
    assert say(data)["weights"] == [{"name": "w", "shape": [2, 3, 3, 3], "n": 54, "bits": 32, "stored_bytes": 216}]
    assert say(conv_tflite(np.ones((2, 3, 3, 3), dtype=np.float32), 8, 8), "model.onnx")["kind"] == "tflite"


def test_files_without_weights(say):
    found = say(onnx_model([onnx.helper.make_node("Relu", ["x"], ["y"])], ["N", 4]))
    assert (found["weights"], found["weight_bytes"], found["mean_bits"]) == ([], 0, None)


def foreign_tflite(change: Callable[[object], None]) -> bytes:
    """A convolution with 2x3x3x3 float weights, changed as an object and written again."""
    model = schema.ModelT.InitFromPackedBuf(conv_tflite(np.ones((2, 3, 3, 3), dtype=np.float32), 8, 8))
    change(model)
    builder = flatbuffers.Builder(0)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def test_foreign_tflite(say):
    found = say(foreign_tflite(lambda model: None))
    assert found["weights"] == [{"name": "t1", "shape": [2, 3, 3, 3], "n": 54, "bits": 32, "stored_bytes": 216}]
    assert found["operators"] == {"CONV_2D": 1}
    assert found["inputs"] == [{"name": "t0", "shape": [1, 8, 8, 3], "dtype": "float32"}]
    assert found["outputs"] == [{"name": "t3", "shape": [1, 6, 6, 2], "dtype": "float32"}]
    assert found["producer"] == ""


def test_foreign_tflite_int4_custom_operator_and_open_batch(say):
    def change(model):
        weight, first = model.subgraphs[0].tensors[1], model.subgraphs[0].tensors[0]
        weight.type, weight.shape = schema.TensorType.INT4, [3, 1, 1, 5]
        model.buffers[weight.buffer].data = np.zeros(8, dtype=np.uint8)
        first.shapeSignature, first.type = [-1, 8, 8, 3], schema.TensorType.UINT8
        first.quantization = schema.QuantizationParametersT()
        first.quantization.scale, first.quantization.zeroPoint = np.float32([0.5]), np.int64([7])
        code = model.operatorCodes[0]
        code.deprecatedBuiltinCode = code.builtinCode = schema.BuiltinOperator.CUSTOM
        code.customCode = "Blur"
        model.description = "another\nmaker"

    found = say(foreign_tflite(change))
    assert found["weights"] == [{"name": "t1", "shape": [3, 1, 1, 5], "n": 15, "bits": 4, "stored_bytes": 8}]
    assert found["mean_bits"] == pytest.approx(8 * 8 / 15, abs=1e-4)
    assert found["operators"] == {"CUSTOM Blur": 1}
    assert found["inputs"] == [
        {"name": "t0", "shape": [None, 8, 8, 3], "dtype": "uint8", "scale": 0.5, "zero_point": 7}
    ]
    assert found["producer"] == "another\nmaker"
    assert "another?maker" in describe_tables(found)


def test_a_tflite_operator_above_127(say):
    def change(model):
        code = model.operatorCodes[0]
        code.deprecatedBuiltinCode, code.builtinCode = 127, schema.BuiltinOperator.GELU

    assert say(foreign_tflite(change))["operators"] == {"GELU": 1}


def test_tflite_weights_behind_the_flatbuffer(say):
    def change(model):
        buffer = model.buffers[model.subgraphs[0].tensors[1].buffer]
        buffer.data, buffer.offset, buffer.size = None, 4096, 216

    data = foreign_tflite(change).ljust(4096, b"\0") + bytes(216)
    found = say(data)
    assert [w["stored_bytes"] for w in found["weights"]] == [216]
    assert found["other_bytes"] == 4096
    with pytest.raises(BundleError, match="a buffer of 216 bytes leads beyond its end"):
        say(data[:-1])


def test_a_tflite_buffer_that_two_weights_share_counts_once(say):
    def change(model):
        first = model.subgraphs[0].tensors[1]
        again = schema.TensorT()
        again.name, again.shape, again.type, again.buffer = "again", list(first.shape), first.type, first.buffer
        model.subgraphs[0].tensors.append(again)

    data = foreign_tflite(change)
    found = say(data)
    assert [w["name"] for w in found["weights"]] == ["t1", "again"]
    assert (found["weight_bytes"], found["other_bytes"]) == (216, len(data) - 216)


# ---- edgecomp's own files --------------------------------------------------------------------------------------------


def manifest_text(graph: Graph) -> str:
    exported = to_onnx(graph)
    measured = {
        "accuracy": {"value": 91.25, "n": 2000, "runtime": "onnxruntime 1.32.0"},
        "parity": {"equal_percent": 99.5, "max_steps": 1, "n": 100, "same_class_percent": 100.0},
    }
    names = ("name", "kind", "weights", "kept_channels", "bits", "zero_percent", "relevance", "stored_bytes")
    values = {
        "schema": "edgecomp-manifest/2",
        "model": "plain",
        "data": "sample",
        "io": "float",
        "artifacts": [manifest.artifact_entry(exported, graph, measured)],
        "layers": [dict(zip(names, ("conv1", "conv2d", 216, 8, 4, 0.5, 12.5, 108), strict=True))],
        "budget": {"kind": "avg-bits", "asked": 4.0, "got": 3.9, "met": True},
        "float": {"accuracy": 92.0, "n": 2000, "weight_bytes": 864},
        "classes": ["shirt", "shoe"],
        "test_share": 0.2,
        "files": {"model.onnx": exported.sha256(), "plan.json": "ab" * 32},
        "seed": 7,
    }
    return write_json({key: values.get(key, {}) for key in manifest.KEYS})


def comparison() -> Comparison:
    reports = (
        BenchReport(**MEASURED),
        BenchReport(**{**MEASURED, **NO_LATENCY, "source": "emulated", "label": "emulated"}),
    )
    return Comparison(
        reports=reports, baseline="4 bits", ratios={"4 bits": Ratio(median=1.0, low=1.0, high=1.0)}
    )


def samples() -> dict[str, bytes]:
    """One small file of each kind."""
    graph = GRAPHS["plain"]()
    plan = plan_for(graph, 3, drop={"conv1": (2, 5)})
    quantized = mixed("plain", Io.INT8)
    return {
        "onnx": to_onnx(quantized).data,
        "foreign onnx": conv_onnx(np.ones((2, 3, 3, 3), dtype=np.float32), 8),
        "tflite": to_tflite(quantized).data,
        "foreign tflite": conv_tflite(np.ones((2, 3, 3, 3), dtype=np.float32), 8, 8),
        "network in C": to_c(quantized).data,
        "graph": bundle.to_bytes(graph),
        "plan": plan.to_json().encode(),
        "manifest": manifest_text(quantized).encode(),
        "bench": BenchReport(**MEASURED).to_json().encode(),
        "comparison": comparison().to_json().encode(),
        "comparisons": f"[{comparison().to_json()}]".encode(),
    }


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return samples()


def test_a_graph_file(say, files):
    graph = GRAPHS["plain"]()
    found = say(files["graph"])
    assert (found["kind"], found["model"], found["graph_digest"]) == ("graph", "plain", graph.digest())
    assert found["operators"] == Counter(node.op.value for node in graph.nodes)
    assert {w["name"]: w["stored_bytes"] for w in found["weights"]} == {
        node.name: graph.weight(node).data.nbytes for node in graph.layers()
    }
    assert found["other_bytes"] == len(files["graph"]) - found["weight_bytes"]


def test_a_plan(say, files):
    found = say(files["plan"])
    assert (found["kind"], found["format_version"], found["io"]) == ("plan", "edgecomp-plan/1", "float")
    assert found["layers"][0] == {"name": "conv1", "kept_channels": 6, "channels_before": 8, "bits": 3}
    assert [layer["name"] for layer in found["layers"]] == ["conv1", "conv2", "fc1", "fc2"]
    assert "weight_bytes" not in found


def test_a_manifest(say, files):
    found = say(files["manifest"])
    assert (found["kind"], found["model"], found["budget"]["got"]) == ("manifest", "plain", 3.9)
    (artifact,) = found["artifacts"]
    assert (artifact["path"], artifact["accuracy_value"], artifact["max_steps"]) == ("model.onnx", 91.25, 1)
    assert artifact["bytes"] == len(files["onnx"])
    assert found["layers"][0]["stored_bytes"] == 108
    text = describe_tables(found)
    assert "| conv1 |" in text
    assert "shirt, shoe" in text


def test_reports(say, files):
    found = say(files["bench"])
    assert (found["kind"], found["reports"][0]["p50_us"], found["reports"][0]["samples"]) == ("bench", 25.0625, 4)
    for name in ("comparison", "comparisons"):
        found = say(files[name])
        assert found["kind"] == "comparison"
        assert [(r["label"], r["ratio"], r["source"]) for r in found["reports"]] == [
            ("4 bits", 1.0, "measured"),
            ("emulated", None, "emulated"),
        ]
        assert found["reports"][1]["p50_us"] is None


def test_tables_say_what_the_description_says(say, files):
    text = describe_tables(say(files["onnx"]))
    assert "| conv1 | 8x3x3x3  | 216 |    2 |           54 |" in text
    assert "| input | Nx3x8x8 | int8  |" in text
    assert "weights:\n\n|" in text


def test_a_runtimes_reason_is_shown_whole():
    reason = f"unknown: onnxruntime cannot load it: {'reason ' * 50}end"
    assert f"| {reason} |" in describe_tables({"kind": "onnx", "execution": reason})
    assert "…" in describe_tables({"kind": "onnx", "producer": "x" * 5000})


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_places_that_are_no_files(tmp_path):
    with pytest.raises(BundleError, match=r"is a folder; expected a file, such as .*model\.onnx$"):
        describe(tmp_path)
    (tmp_path / "only for Micro").mkdir()
    (tmp_path / "only for Micro" / "model.tflm.tflite").touch()
    with pytest.raises(BundleError, match=r"is a folder; expected a file, such as .*/model\.tflm\.tflite$"):
        describe(tmp_path / "only for Micro")
    with pytest.raises(BundleError, match=r"nothing: cannot be read: No such file"):
        describe(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match=r"pipe: is no plain file"):
        describe(tmp_path / "pipe")
    with pytest.raises(BundleError, match="no file name"):
        describe(tmp_path / "a\0b")


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "big").write_bytes(bytes(101))
    monkeypatch.setattr(module, "_MAX_BYTES", 100)
    with pytest.raises(BundleError, match=r"has 101 bytes, inspect reads 100 at most"):
        describe(tmp_path / "big")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"\0", "of no known kind"),
        (b"PK\3\4" + bytes(100), "of no known kind"),
        (b"\x08", "damaged or no ONNX file"),
        (b"\x08\x08", "holds no network"),
        (b"\x1c\0\0\0TFL3", "damaged or cut off"),
        (b"{", "not JSON"),
        (b"{}", "schema is None; expected one of edgecomp-plan/1, edgecomp-manifest/2"),
        (b'{"schema": "edgecomp-plan/2"}', "schema is 'edgecomp-plan/2'; expected one of"),
        (b'{"schema": ["edgecomp-plan/1"]}', "schema is \\['edgecomp"),
        (b"[]", "lists no comparison"),
        (b'[], "more": [1]', "unknown key 'more'"),
        (b"[7]", "expected an object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"schema": "\xff"}', "damaged"),
        (b"\x02\0\0\0\0\0\0\0{}", "schema is None"),
    ],
)
def test_what_is_no_file_of_a_known_kind(say, data, reason):
    with pytest.raises(BundleError, match=reason) as caught:
        say(data)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_json_could_not_say_again(say, files):
    for damage, reason in ((b"1e999", "too large"), (b"[" * 300 + b"]" * 300, "nested too deeply")):
        with pytest.raises(BundleError, match=reason):
            say(files["manifest"].replace(b"3.9", damage))
    found = say(files["manifest"].replace(b'"shirt"', b'"\\ud800\\u001b[2J"'))
    assert found["classes"][0] == "\ud800\x1b[2J"  # say checks that the tables stay printable


@pytest.mark.parametrize(("kind", "package"), [("onnx", "onnx"), ("tflite", "ai_edge_litert")])
def test_a_missing_package_is_named_with_the_extra(say, files, monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"file: {package} is missing; .*pip install 'edgecomp\[bench\]'"):
        say(files[kind])


def test_weights_that_contradict_their_shape(say):
    model = onnx.load_from_string(conv_onnx(np.ones((2, 3, 3, 3), dtype=np.float32), 8))
    model.graph.initializer[0].dims[0] = 3
    with pytest.raises(BundleError, match="weight 'w' has 216 bytes, expected 81 codes of 32 bits"):
        say(model.SerializeToString())
    model.graph.initializer[0].dims[0] = -2
    with pytest.raises(BundleError, match="no legal shape"):
        say(model.SerializeToString())

    def change(model):
        model.subgraphs[0].tensors[1].shape = [3, 3, 3, 3]

    with pytest.raises(BundleError, match="weight 't1' has 216 bytes, expected 81 codes"):
        say(foreign_tflite(change))


def test_packed_fields_are_joined_whatever_else_has_their_name(say, files):
    model = onnx.load_from_string(files["onnx"])
    field = next(t for t in model.graph.initializer if t.name == "conv2.weight.1")
    node = next(n for n in model.graph.node if n.input[0] == field.name)
    field.name = node.input[0] = "conv2.weight.1'"
    assert say(model.SerializeToString())["weights"] == say(files["onnx"])["weights"]


def test_a_packed_field_that_is_too_short(say, files):
    model = onnx.load_from_string(files["onnx"])
    field = next(t for t in model.graph.initializer if t.name == "conv2.weight.0")
    field.raw_data = field.raw_data[:-1]
    with pytest.raises(BundleError, match=r"weight 'conv2\.weight\.0' has 215 bytes, expected 864 codes of 2 bits"):
        say(model.SerializeToString())


def test_a_flatbuffer_list_that_leads_beyond_the_end(say):
    def change(model):
        model.description = "maker"

    data = foreign_tflite(change)
    assert data.count(b"\5\0\0\0maker") == 1
    with pytest.raises(BundleError, match="a list of 60000 elements leads beyond its end"):
        say(data.replace(b"\5\0\0\0maker", struct.pack("<I", 60000) + b"maker"))


def test_a_flatbuffer_that_names_one_table_without_end(say, monkeypatch):
    """100 times one sub-graph, which has 100 times one tensor: 10,100 tables in 900 bytes."""
    n = 100
    parts = bytearray(b"\x10\0\0\0TFL3")

    def put(code: str, *values: int) -> int:
        parts.extend(struct.pack(f"<{code}", *values))
        return len(parts) - struct.calcsize(f"<{code}")

    def table_with_list(field: int) -> None:
        """A table whose one field is a list right behind it, whose elements all are the table behind the list."""
        parts.extend(bytes(-len(parts) % 4))
        vtable = put(f"{3 + field}H", 6 + 2 * field, 8, *[0] * field, 4)
        tables.append(put("i", 0))
        struct.pack_into("<i", parts, tables[-1], tables[-1] - vtable)
        put("II", 4, n)
        lists.append(put(f"{n}I", *[0] * n))

    tables: list[int] = []
    lists: list[int] = []
    table_with_list(2)  # the model's sub-graphs
    table_with_list(0)  # a sub-graph's tensors
    table_with_list(0)  # a tensor; its list is its shape, which nobody reads without data
    struct.pack_into("<I", parts, 0, tables[0])
    for start, table in zip(lists, tables[1:], strict=False):
        for at in range(start, start + 4 * n, 4):
            struct.pack_into("<I", parts, at, table - at)
    assert say(bytes(parts))["producer"] == ""
    monkeypatch.setattr(flatbuffer, "_MAX_TABLES", 10_000)
    with pytest.raises(BundleError, match="more tables than any network has"):
        say(bytes(parts))


# ---- damage ----------------------------------------------------------------------------------------------------------


def damaged(data: bytes, rng: np.random.Generator, count: int) -> list[bytes]:
    """Cut files, files with flipped bits, and files with a word of all ones, a large number or zero somewhere."""
    cases = [data[: int(n)] for n in rng.integers(0, len(data), count // 4)]
    for i in range(count - len(cases)):
        changed = bytearray(data)
        # Half of the damage goes where structure is dense: the beginning and the end.
        edge = min(len(data), 1200)
        at = int(rng.integers(len(data))) if i % 2 else int(rng.integers(-edge // 2, edge // 2)) % len(data)
        if i % 3:
            for _ in range(int(rng.integers(1, 4))):
                changed[at] ^= 1 << int(rng.integers(8))
                at = int(rng.integers(len(data)))
        else:
            word = (0xFFFFFFFF, 0x7FFFFFFF, 0, len(data), 0x00FFFFFF)[i // 3 % 5]
            changed[at : at + 4] = struct.pack("<I", word)
        cases.append(bytes(changed))
    return cases


@pytest.mark.parametrize(
    "name",
    ["onnx", "foreign onnx", "tflite", "foreign tflite", "graph", "plan", "manifest", "bench", "comparison",
     "comparisons"],
)  # fmt: skip
def test_damaged_files_are_described_or_refused(say, files, name):
    rng = np.random.default_rng(20261123)
    say(files[name])
    refused: list[str] = []
    slowest = 0.0
    for data in damaged(files[name], rng, 240):
        begin = time.perf_counter()
        try:
            say(data)
        except BundleError as e:
            refused.append(str(e))
        slowest = max(slowest, time.perf_counter() - begin)
    assert len(refused) >= 30, "the damage does not reach what is read"
    assert [reason for reason in refused if "\n" in reason or len(reason) > 1000] == []
    assert slowest < 5
