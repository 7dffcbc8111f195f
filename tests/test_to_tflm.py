"""TFLite Micro files in its real interpreter: beside the undecoded file, LiteRT's reference kernels, the reference."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp import planner, quantmath, reference
from edgecomp.artifact import AtRest
from edgecomp.benchmarks import runtime
from edgecomp.benchmarks.runners import LiteRt, LiteRtReference, TfliteMicro
from edgecomp.benchmarks.tflm import load_package
from edgecomp.coding import DECODING_BYTES, stored_bits
from edgecomp.compress import compress
from edgecomp.errors import BundleError, ExportError, TargetError
from edgecomp.exporters import export, files_of
from edgecomp.exporters.read_tflite import read_tflite
from edgecomp.exporters.to_tflite import to_tflm
from edgecomp.graph import Array, Graph, Op
from edgecomp.ops import PROBABILITIES
from edgecomp.plan import Io
from tests.graphs import GRAPHS, Build, dense, images, multiplied, plan_for
from tests.micro import NEEDS_MICRO, wide
from tests.test_parity import alone
from tests.tflite_cases import CASES, made

pytestmark = NEEDS_MICRO
NETWORKS = {**GRAPHS, "multiplied": multiplied, "dense": dense, "wide": wide}


@cache
def mixed(name: str, io: Io = Io.INT8) -> Graph:
    """Bits 2, 3, 4 ... 7, 2, ... layer by layer."""
    graph = NETWORKS[name]()
    bits = {node.name: 2 + i % 6 for i, node in enumerate(graph.layers())}
    return compress(graph, plan_for(graph, bits, io=io))


def inputs_of(graph: Graph, n: int = 6) -> Array:
    x, quant = images(graph, n), graph.tensors[graph.inputs[0]].quant
    return x if quant is None else quantmath.quantize(x, quant)


def off(got: Array, want: Array) -> tuple[int, float]:
    """The largest difference in steps, and the share of values that differ."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype == np.int8
    steps = np.abs(got.astype(int) - want.astype(int))
    return int(steps.max()), float((steps > 0).mean())


@pytest.mark.parametrize("name", NETWORKS)
def test_decoded_weights_are_those_of_the_undecoded_file(name: str) -> None:
    graph = mixed(name)
    packed, plain = (export(graph, form) for form in ("tflm", "tflm-int8"))
    x = inputs_of(graph)
    got = TfliteMicro(packed.data).run(x)
    np.testing.assert_array_equal(got, TfliteMicro(plain.data).run(x))
    assert off(got, LiteRtReference(plain.data).run(x))[0] <= 2
    decoded = [weight for weight in packed.weights if weight.encoding != "dense"]
    assert (len(packed.data) < len(plain.data)) == bool(decoded)
    assert decoded or name in ("multiplied", "dense", "separable", "shuffled")


def test_every_kind_of_layer_is_decoded_in_the_wide_network() -> None:
    weights = {weight.layer: weight for weight in export(mixed("wide"), "tflm").weights}
    assert {name: (w.encoding, w.bits, w.stored_bits) for name, w in weights.items()} == {
        "stem": ("table", 2, 2),
        "dw": ("table", 3, 3),
        "project": ("table", 4, 4),
        "grouped": ("table", 5, 5),
        "fc": ("table", 6, 6),
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_every_operator_on_the_references_inputs(name: str) -> None:
    """Within one step of the reference, and equal to LiteRT's reference kernels but for linear layers."""
    graph = mixed(name)
    values = reference.run(graph, {"input": inputs_of(graph)})
    n = n_linear = n_linear_off = 0
    for node in graph.nodes:
        single = alone(graph, node)
        if len(single.inputs) != 1:
            continue  # add, mul and concat: in whole networks below
        x = values[single.inputs[0]]
        got = TfliteMicro(export(single, "tflm").data).run(x)
        assert off(got, values[node.outputs[0]])[0] <= 1, (node.name, node.op)
        steps, share = off(got, LiteRtReference(export(single, "tflm-int8").data).run(x))
        if node.op is Op.LINEAR:
            n_linear, n_linear_off = n_linear + got.size, n_linear_off + round(share * got.size)
            assert steps <= 1, node.name
        else:
            assert steps == 0, (node.name, node.op)
        n += 1
    assert n >= 6
    assert n_linear_off <= 0.1 * n_linear


@pytest.mark.parametrize("case", CASES)
def test_every_operator_that_the_writer_uses(case: str) -> None:
    graph = compress(made(case), plan_for(made(case), 4, io=Io.INT8))
    x = inputs_of(graph, 3)
    want = reference.run(graph, {"input": x})[graph.outputs[0]]
    exported = export(graph, "tflm")
    got = TfliteMicro(exported.data).run(x)
    # A step more than in LiteRT for what is rounded half away from zero here.
    assert off(got, want)[0] <= CASES[case].steps + 1


def many_joined(seed: int = 0) -> Graph:
    """More tensors in one concat than the interpreter joins at once, as at the end of a block of DenseNet."""
    b = Build(seed, (3, 6, 6))
    parts = tuple(b.conv(f"conv{i}", "input", 1 + i % 3, (1, 1), pads=(0, 0, 0, 0)) for i in range(23))
    return b.graph(b.node(Op.CONCAT, "cat", parts, {"axis": 1}), "many")


def test_a_concat_of_more_tensors_than_the_interpreter_joins_at_once() -> None:
    graph = compress(many_joined(), plan_for(many_joined(), io=Io.INT8))
    x = inputs_of(graph)
    files = {form: export(graph, form).data for form in ("tflm", "tflite")}
    assert off(TfliteMicro(files["tflm"]).run(x), reference.run(graph, {"input": x})["cat"])[0] <= 1
    np.testing.assert_array_equal(TfliteMicro(files["tflm"]).run(x), LiteRtReference(files["tflite"]).run(x))
    joins = {form: read_tflite(data, form)["operators"]["CONCATENATION"] for form, data in files.items()}
    assert joins == {"tflm": 3, "tflite": 1}


@pytest.mark.parametrize("name", ["plain", "separable", "gated"])
def test_float_borders_and_float_networks(name: str) -> None:
    graph = mixed(name, Io.FLOAT)
    x = images(graph, 4)
    want = reference.run(graph, {"input": x})[graph.outputs[0]]
    got = TfliteMicro(export(graph, "tflm").data).run(x)
    assert got.dtype == np.float32
    last = graph.producer()[graph.outputs[0]]
    quant = graph.tensors[last.inputs[0]].quant
    step = 0.02 if last.op in PROBABILITIES or quant is None else float(quant.scale)
    assert np.abs(got - want).max() <= 3.001 * step
    real = NETWORKS[name]()
    np.testing.assert_allclose(
        TfliteMicro(export(real, "tflm").data).run(x),
        reference.run(real, {"input": x})[real.outputs[0]],
        rtol=1e-4,
        atol=1e-5,
    )


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", ["wide", "residual", "separable"])
def test_the_planner_counts_what_is_written(name: str, bits: int) -> None:
    graph = compress(NETWORKS[name](), plan_for(NETWORKS[name](), bits))
    exported = export(graph, "tflm")
    for node, weight in zip(graph.layers(), exported.weights, strict=True):
        codes = graph.weight(node).data
        assert codes is not None
        counts = np.bincount(codes.reshape(-1).astype(np.int64) + 128, minlength=256)
        assert stored_bits("tflm", node, bits, counts) == 8 * weight.stored_bytes
        assert stored_bits("tflm-int8", node, bits, counts) == 8 * codes.size


def test_what_a_file_holds_is_what_its_weights_say() -> None:
    """Constants in the file, by the schema's own reader; equal headers of two weights stand there once."""
    exported = export(mixed("wide"), "tflm")
    graph = schema.ModelT.InitFromPackedBuf(exported.data, 0)
    (main,), codes = graph.subgraphs, graph.operatorCodes
    n_decoded = 0
    for i, operator in enumerate(main.operators):
        if codes[operator.opcodeIndex].customCode != b"TFLM_DECODE":
            continue
        encoded, ancillary = (main.tensors[k] for k in operator.inputs)
        (weight,) = (main.tensors[k] for k in operator.outputs)
        assert (encoded.type, ancillary.type, weight.type) == (
            schema.TensorType.UINT8,
            schema.TensorType.UINT8,
            schema.TensorType.INT8,
        )
        n_bytes = [len(graph.buffers[tensor.buffer].data) for tensor in (encoded, ancillary)]
        assert [encoded.shape.tolist(), ancillary.shape.tolist()] == [[n] for n in n_bytes]
        assert graph.buffers[weight.buffer].data is None
        # What is decoded is read by the very next operator.
        assert operator.outputs[0] in main.operators[i + 1].inputs
        layer = weight.name.decode().removesuffix(".weight")
        assert sum(n_bytes) == next(w.stored_bytes for w in exported.weights if w.layer == layer)
        n_decoded += 1
    assert n_decoded == 5
    assert graph.signatureDefs is None
    names = [tensor.name.decode() for tensor in main.tensors]
    assert {name for name in names if name and not name.endswith(".weight")} == {"input", "fc"}


@settings(max_examples=60, deadline=None)
@given(out=st.integers(1, 40), width=st.integers(1, 40), bits=st.integers(2, 7), seed=st.integers(0, 99))
def test_decoding_never_makes_a_file_larger(out: int, width: int, bits: int, seed: int) -> None:
    b = Build(seed, (width,))
    graph = b.graph(b.linear("fc", "input", out))
    graph = compress(graph, plan_for(graph, bits, io=Io.INT8))
    packed, plain = (export(graph, form) for form in ("tflm", "tflm-int8"))
    assert len(packed.data) <= len(plain.data)
    more = len(packed.data) - len(plain.data) + plain.weights[0].stored_bytes - packed.weights[0].stored_bytes
    assert more <= DECODING_BYTES


def test_equal_graphs_give_equal_bytes() -> None:
    first, again = (files_of(export(graph, "tflm")) for graph in (mixed("wide"), mixed.__wrapped__("wide")))
    assert dict(first) == dict(again)
    assert list(first) == ["model.tflm.tflite", "model.cc", "model.h"]


def test_the_array_is_the_file(tmp_path: Path) -> None:
    """Compiled as a firmware would, and asked for its address and its bytes."""
    exported = export(mixed("wide"), "tflm")
    for name, contents in files_of(exported).items():
        (tmp_path / name).write_bytes(contents)
    (tmp_path / "main.cc").write_text(
        "#include <cstdint>\n#include <cstdio>\n#include \"model.h\"\n"
        "int main() {\n"
        "  static_assert(sizeof edgecomp::kModel == edgecomp::kModelSize, \"\");\n"
        "  if (reinterpret_cast<std::uintptr_t>(edgecomp::kModel) % 16 != 0) return 1;\n"
        "  return std::fwrite(edgecomp::kModel, 1, edgecomp::kModelSize, stdout) != edgecomp::kModelSize;\n"
        "}\n"
    )  # fmt: skip
    flags = ["-std=c++11", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"]
    subprocess.run(["g++", *flags, "main.cc", "model.cc", "-o", "main"], cwd=tmp_path, check=True)
    assert subprocess.run([tmp_path / "main"], check=True, capture_output=True).stdout == exported.data
    assert re.search(r"alignas\(16\) const unsigned char kModel", (tmp_path / "model.cc").read_text())


def test_coarse_grids_are_weighed_for_it() -> None:
    """Zeros cost a bit: grids that make most codes 0 reach below 2 bits."""
    node = mixed("wide").layers()[0]
    forms = {form: planner.grids_of(wide(), node, (form,)) for form in ("tflm", "tflite", "onnx")}
    assert forms["tflm"] == forms["onnx"] != forms["tflite"]
    counts = np.zeros(256)
    counts[[127, 128, 129]] = [200, 9_600, 200]
    assert stored_bits("tflm", node, 4, counts) == 8 * (16 + 10_000 // 8 + 400) < 2 * 10_000


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_there_is_no_other_packed_form() -> None:
    with pytest.raises(ExportError, match="tflm: weights are packed natively"):
        to_tflm(mixed("plain"), at_rest=AtRest.PACKED)
    with pytest.raises(ExportError, match="'tflm-packed' is unknown; expected one of onnx, tflite, tflm"):
        export(mixed("plain"), "tflm-packed")


def test_what_the_format_cannot_express_is_refused_by_name() -> None:
    b = Build(0, (3, 9, 9))
    graph = b.graph(b.max_pool("p", "input", (3, 3), stride=(1, 1), dilation=(2, 2)))
    with pytest.raises(ExportError, match="'p': max_pool has dilation"):
        export(compress(graph, plan_for(graph)), "tflm")


def test_other_interpreters_refuse_the_file() -> None:
    with pytest.raises(BundleError, match="TFLM_DECODE"):
        LiteRt(export(mixed("wide"), "tflm").data)


def test_damage_does_not_reach_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*args: object, **others: object) -> None:
        raise AssertionError

    monkeypatch.setattr(load_package().runtime.Interpreter, "from_bytes", reached)
    data = export(mixed("wide"), "tflm").data
    for n in (0, 1, 8, 20, len(data) // 2, len(data) - 30):
        with pytest.raises(BundleError, match=r"^model: "):
            TfliteMicro(data[:n])
    graph = schema.ModelT.InitFromPackedBuf(data, 0)
    encoded = graph.subgraphs[0].tensors[graph.subgraphs[0].operators[0].inputs[0]]
    assert graph.buffers[encoded.buffer].data is not None
    graph.buffers[encoded.buffer].data = graph.buffers[encoded.buffer].data[:-1]
    with pytest.raises(BundleError, match="TFLM_DECODE reads 215 bytes, expected 864 fields of 2 bits"):
        TfliteMicro(packed_again(graph))


BENT = {
    "operator without input": (lambda main: setattr(main.operators[1], "inputs", [999]), "names a tensor that is not"),
    "operator without output": (lambda main: setattr(main.operators[1], "outputs", [-2]), "names a tensor that is not"),
    "bias too short": (lambda main: setattr(bias_of(main), "shape", [33]), "a constant has 128 bytes for 33 elements"),
}


def bias_of(main: schema.SubGraphT) -> schema.TensorT:
    return next(tensor for tensor in main.tensors if tensor.type == schema.TensorType.INT32 and tensor.shape[0] == 32)


@pytest.mark.parametrize("case", BENT)
def test_bent_structure_does_not_reach_the_interpreter(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_package().runtime.Interpreter, "from_bytes", lambda *_, **__: pytest.fail("reached"))
    graph = schema.ModelT.InitFromPackedBuf(export(mixed("wide"), "tflm").data, 0)
    change, message = BENT[case]
    change(graph.subgraphs[0])
    with pytest.raises(BundleError, match=rf"^model: tflite-micro cannot load it: .*{message}"):
        TfliteMicro(packed_again(graph))


def packed_again(graph: schema.ModelT) -> bytes:
    import flatbuffers

    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(graph.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def test_an_operator_that_the_interpreter_lacks_is_named() -> None:
    data = export(mixed("wide"), "tflm").data.replace(b"TFLM_DECODE", b"TFLM_DECODX")
    with pytest.raises(BundleError, match=r"tflite-micro cannot load it: .*registration from op code CUSTOM"):
        TfliteMicro(data)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tflite_micro", None)
    with pytest.raises(TargetError, match=r"^tflite-micro is not installed: pip install 'tflite-micro>=0\.dev\d+'$"):
        TfliteMicro(export(mixed("plain"), "tflm").data)


# ---- the runner ------------------------------------------------------------------------------------------------------


def test_the_arena_grows_by_the_largest_decoded_weight() -> None:
    arenas = {form: TfliteMicro(export(mixed("wide"), form).data).describe() for form in ("tflm", "tflm-int8")}
    for arena in arenas.values():
        assert arena["arena_total_bytes"] == arena["arena_head_bytes"] + arena["arena_tail_bytes"]  # type: ignore[operator]
        assert arena["kernels"] == "reference"
    more = arenas["tflm"]["arena_head_bytes"] - arenas["tflm-int8"]["arena_head_bytes"]  # type: ignore[operator]
    assert 0 < more <= max(w.data.size for w in mixed("wide").tensors.values() if w.data is not None)


def test_every_output_by_name() -> None:
    graph = mixed("residual")
    names = tuple(node.outputs[0] for node in graph.nodes)
    watched = replace(graph, outputs=names)
    x = inputs_of(graph, 2)
    got = TfliteMicro(export(watched, "tflm").data).run_all(x)
    want = LiteRtReference(export(watched, "tflm-int8").data).run_all(x)
    assert tuple(got) == tuple(want) == names
    for name in names:
        assert off(got[name], want[name])[0] <= (name == "fc")


def test_timing_an_image_leaves_run_right() -> None:
    graph = mixed("plain")
    runner = TfliteMicro(export(graph, "tflm").data)
    x = inputs_of(graph, 3)
    first = runner.run(x)
    runner.infer_once()
    runner.describe()
    np.testing.assert_array_equal(runner.run(x), first)
    sample = runtime.sample_image(runner.input)
    runner.infer_once()
    np.testing.assert_array_equal(runner._interpreter.get_output(0), runner.run(sample))


def test_plain_tflite_files_run_too() -> None:
    graph = mixed("wide")
    x = inputs_of(graph)
    plain, named = (export(graph, form).data for form in ("tflm-int8", "tflite-int8"))
    np.testing.assert_array_equal(TfliteMicro(named).run(x), TfliteMicro(plain).run(x))
    assert len(plain) < len(named), "names and a signature are left out"
