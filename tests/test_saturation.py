"""Outputs do not depend on whether this processor's 16-bit sums saturate: x86 without VNNI has a session for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgecomp import reference
from edgecomp.artifact import AtRest
from edgecomp.benchmarks import onnx_runtime
from edgecomp.benchmarks.onnx_runtime import OnnxRuntime, saturates
from edgecomp.cli import main
from edgecomp.exporters.to_onnx import to_onnx
from edgecomp.exporters.to_tflite import to_tflite
from edgecomp.graph import Op
from edgecomp.plan import Io
from edgecomp.runtime import load, unpack
from tests.graphs import GRAPHS
from tests.onnx_run import SATURATES, onnx_run
from tests.test_parity import quantized_with_input

X86 = "flags\t\t: fpu sse4_2 avx avx2 fma"


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "said"),
    [
        (X86, "x86_64", True),
        (f"{X86} avx512f avx512bw", "x86_64", True),
        (f"{X86} avx512f avx512_vnni", "x86_64", False),
        (f"{X86} avx_vnni", "x86_64", False),
        ("flags\t\t: fpu sse4_2", "x86_64", False),  # too old for these kernels
        ("Features\t: fp asimd", "aarch64", False),
    ],
)
def test_which_processors(cpuinfo: str, machine: str, said: bool) -> None:
    assert saturates(cpuinfo, machine) == said


@pytest.mark.parametrize("pretended", [True, False])
def test_outputs_are_the_references_and_times_the_stock_sessions(
    pretended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, x = quantized_with_input(GRAPHS["residual"](), 8, Io.INT8)
    data = to_onnx(graph).data
    loaded: list[bytes] = []

    def load(model: Any, options: Any, place: str) -> Any:
        loaded.append(model)
        return session(model, options, place)

    session = onnx_runtime._session
    monkeypatch.setattr(onnx_runtime, "_session", load)
    monkeypatch.setattr(OnnxRuntime, "_load", staticmethod(load))
    asked = pretended or SATURATES
    monkeypatch.setattr(onnx_runtime, "_saturates_here", lambda: asked)
    runner = OnnxRuntime(data)
    runner.infer_once()
    assert loaded == [data]
    np.testing.assert_array_equal(runner.run(x), reference.run(graph, {"input": x})[graph.outputs[0]])
    assert loaded == ([data, unpack(data, unsigned=True)] if asked else [data])


@pytest.mark.parametrize("at_rest", [AtRest.NATIVE, AtRest.INT8])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("name", GRAPHS)
def test_unsigned_weights_are_the_same_numbers(name: str, bits: int, at_rest: list(AtRest)) -> None:
    graph, x = quantized_with_input(GRAPHS[name](), bits, Io.FLOAT)
    data = to_onnx(graph, at_rest=at_rest).data
    raised = unpack(data, unsigned=True)
    onnx.checker.check_model(onnx.load_from_string(raised), full_check=True)
    before, after = (weights(each) for each in (unpack(data), raised))
    assert before.keys() == after.keys()
    assert len(before) == sum(node.op in (Op.CONV2D, Op.LINEAR) for node in graph.nodes)
    for node, (codes, zero_point) in before.items():
        assert codes.dtype == np.int8
        assert after[node][0].dtype == after[node][1].dtype == np.uint8
        np.testing.assert_array_equal(after[node][0].astype(int), codes.astype(int) + 128)
        np.testing.assert_array_equal(after[node][1].astype(int), zero_point.astype(int) + 128)
    (given,) = [value.name for value in onnx.load_from_string(data).graph.input]
    np.testing.assert_equal(onnx_run(raised, {given: x}, anywhere=False), onnx_run(data, {given: x}))


def weights(data: bytes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read what layers multiply by with the onnx package: codes and zero points by the layer's output."""
    graph = onnx.load_from_string(data).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    read = {node.output[0]: made[node.input[1]].input for node in layers}
    return {output: (constants[names[0]], constants[names[2]]) for output, names in read.items()}


def test_another_tools_file_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load_from_string(to_onnx(quantized_with_input(GRAPHS["residual"](), 8, Io.INT8)[0]).data)
    model.producer_name = "another"
    data = model.SerializeToString()
    assert unpack(data, unsigned=True) == data
    ours = to_onnx(quantized_with_input(GRAPHS["residual"](), 8, Io.INT8)[0]).data
    for asked in (True, False):
        monkeypatch.setattr(onnx_runtime, "_saturates_here", lambda asked=asked: asked)
        assert OnnxRuntime(data).may_saturate() is asked
        assert not OnnxRuntime(ours).may_saturate()


def test_the_command_writes_such_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "model.onnx", tmp_path / "exact.onnx"
    source.write_bytes(to_onnx(quantized_with_input(GRAPHS["residual"](), 4, Io.INT8)[0]).data)
    assert main(["unpack", str(source), "-o", str(target), "--unsigned"]) == 0
    assert target.read_bytes() == unpack(source.read_bytes(), unsigned=True) == load(source, unsigned=True)
    source.write_bytes(to_tflite(quantized_with_input(GRAPHS["residual"](), 4, Io.INT8)[0]).data)
    capsys.readouterr()
    assert main(["unpack", str(source), "-o", str(tmp_path / "no"), "--unsigned"]) == 2
    assert "is TFLite, whose weights are int8 everywhere" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
