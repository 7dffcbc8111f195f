"""The benchmark of formats: its verdicts by hand, and that the files it compares are what it calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from edgecomp import reference
from edgecomp.benchmarks import formats
from edgecomp.benchmarks.formats import ONNX, ONNX_INT4, ONNX_INT8, SPEEDS, TFLITE, TFLITE_INT4, TFLITE_INT8
from edgecomp.benchmarks.harness import Timing
from edgecomp.benchmarks.runners import LiteRt, OnnxRuntime, optimized
from edgecomp.errors import UsageError
from edgecomp.graph import Graph
from edgecomp.report import Ratio
from tests.graphs import residual


@pytest.fixture(scope="module")
def graph() -> Graph:
    return formats.quantized(residual())


@pytest.fixture(scope="module")
def models(graph: Graph) -> dict[str, bytes]:
    return formats.files(graph)


def test_every_file_computes_the_network(graph: Graph, models: dict[str, bytes]) -> None:
    assert set(models) == {ONNX, ONNX_INT8, ONNX_INT4, TFLITE, TFLITE_INT8, TFLITE_INT4}
    x = np.random.default_rng(2).integers(-128, 128, (8, 3, 8, 8)).astype(np.int8)
    want = reference.run(graph, {"input": x})[graph.outputs[0]].astype(int)
    for name, data in models.items():
        got = (OnnxRuntime if name.startswith(ONNX) else LiteRt)(data).run(x).astype(int)
        assert np.abs(got - want).max() <= (2 if name in (ONNX_INT4, TFLITE_INT4) else 0), name
        assert len(np.unique(got)) > 10, name


def test_the_standard_form_is_int4_and_is_widened_in_every_run(graph: Graph, models: dict[str, bytes]) -> None:
    model = onnx.load_model_from_string(models[ONNX_INT4])
    assert model.opset_import[0].version == 21
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    read = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.layers():
        weight = graph.weight(node)
        assert stored[weight.name].data_type == TensorProto.INT4
        assert np.array_equal(numpy_helper.to_array(stored[weight.name]).astype(np.int8), weight.data)
        assert weight.name in read, "something stands between the weight and its DequantizeLinear"
    found = optimized(models[ONNX_INT4])
    assert len(found.widened) >= 5
    assert found.operators["QLinearConv"] == 0
    for name in (ONNX, ONNX_INT8):
        found = optimized(models[name])
        assert (found.operators["QLinearConv"], found.operators["QGemm"], found.widened) == (5, 1, ())


def test_two_codes_in_a_byte() -> None:
    assert formats._nibbles(np.array([[1, -1], [-8, 7], [3, 0]], dtype=np.int8)) == b"\xf1\x78\x03"
    assert formats._nibbles(np.array([-2, 5, -7], dtype=np.int8)) == b"\x5e\x09"


def test_a_weight_that_is_not_there(models: dict[str, bytes]) -> None:
    with pytest.raises(UsageError, match=r"no weight 'other\.weight'; expected one of `--weights-at-rest int8`"):
        formats.standard_int4(models[ONNX_INT8], {"stem.weight", "other.weight"})


@pytest.mark.parametrize(("ours", "other"), [(ONNX, ONNX_INT8), (TFLITE, TFLITE_INT8)])
def test_files_of_two_networks_are_not_compared(
    graph: Graph, models: dict[str, bytes], ours: str, other: str
) -> None:
    formats.check_same_outputs(models)
    weight = graph.weight(graph.layers()[-1])
    assert weight.data is not None
    changed = replace(weight, data=np.where(weight.data == weight.data.max(), -7, weight.data).astype(np.int8))
    wrong = formats.files(replace(graph, tensors={**graph.tensors, weight.name: changed}))
    with pytest.raises(UsageError, match=f"{ours} and {other} give different outputs"):
        formats.check_same_outputs({**models, other: wrong[other]})


def _ratio(median: float) -> Ratio:
    return Ratio(median=median, low=median - 0.01, high=median + 0.01)


def test_verdicts_by_hand() -> None:
    # 1,000,000 weights of 4 bits: 1.03 * 500,000 + 32,000.
    medians = (0.97, 3.99, 0.96, 2.0)
    speeds = {(a, b): _ratio(median) for (a, b, _), median in zip(SPEEDS, medians, strict=True)}
    for n_bytes, met in ((547_000, True), (547_001, False)):
        rows = formats.judge("net", 500_000, {ONNX: n_bytes}, speeds)
        assert [row.met for row in rows] == [met, True, False, True, None]
    assert [(row.what, row.got, row.limit) for row in rows] == [
        ("ONNX: bytes", "547,001", "<= 547,000"),
        ("ONNX: speed / int8", "0.970 (0.960-0.980)", ">= 0.97"),
        ("ONNX: speed / INT4", "3.990 (3.980-4.000)", ">= 4"),
        ("TFLite, packed: speed / int8", "0.960 (0.950-0.970)", ">= 0.95"),
        ("TFLite, packed: speed / int4", "2.000 (1.990-2.010)", ""),
    ]


def _times(ms: dict[str, float]) -> Callable[..., dict[str, Timing]]:
    return lambda models, *, rounds: {
        name: Timing(warmups=1, steady=True, rounds=rounds, samples_us=(1000 * ms[name],) * rounds) for name in models
    }


def test_a_missed_line_ends_the_command_with_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(formats, "network", lambda name, weights: residual())
    ms = {ONNX: 1.0, ONNX_INT8: 1.0, ONNX_INT4: 4.5, TFLITE: 2.0, TFLITE_INT8: 2.0, TFLITE_INT4: 5.0}
    for int8, code, word in ((2.0, 0, "pass"), (1.8, 3, "MISS")):
        monkeypatch.setattr(formats, "timed", _times({**ms, TFLITE_INT8: int8}))
        assert formats.main(["--networks", "resnet18", "--rounds", "3"]) == code
        lines = capsys.readouterr().out.splitlines()
        (line,) = (line for line in lines if "TFLite, packed: speed / int8" in line)
        assert [cell.strip() for cell in line.strip("|").split("|")][2:] == [
            f"{int8 / 2:.3f} ({int8 / 2:.3f}-{int8 / 2:.3f})", ">= 0.95", word,
        ]  # fmt: skip
        assert any("ONNX: speed / INT4" in line and "4.500" in line and "pass" in line for line in lines)
    with pytest.raises(SystemExit):
        formats.main(["--networks", "resnet99"])


def test_what_is_timed_are_the_files(models: dict[str, bytes]) -> None:
    timings = formats.timed(models, rounds=2)
    assert timings.keys() == models.keys()
    assert {timing.rounds for timing in timings.values()} == {2}
    assert all(min(timing.samples_us) > 0 for timing in timings.values())
