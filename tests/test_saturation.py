"""Outputs do not depend on whether this processor's 16-bit sums saturate: x86 without VNNI has a session for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgecomp import reference
from edgecomp.benchmarks import onnx_runtime
from edgecomp.benchmarks.onnx_runtime import OnnxRuntime, saturates
from edgecomp.exporters.to_onnx import to_onnx
from edgecomp.plan import Io
from tests.graphs import GRAPHS
from tests.onnx_run import SATURATES
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
    sessions: list[str] = []

    def load(model: Any, options: Any, place: str) -> Any:
        try:
            sessions.append(options.get_session_config_entry("session.disable_quant_qdq"))
        except RuntimeError:
            sessions.append("stock")
        return onnx_runtime._session(model, options, place)

    monkeypatch.setattr(OnnxRuntime, "_load", staticmethod(load))
    asked = pretended or SATURATES
    monkeypatch.setattr(onnx_runtime, "_saturates_here", lambda: asked)
    runner = OnnxRuntime(to_onnx(graph).data)
    runner.infer_once()
    assert sessions == ["stock"]
    np.testing.assert_array_equal(runner.run(x), reference.run(graph, {"input": x})[graph.outputs[0]])
    assert sessions == (["stock", "1"] if asked else ["stock"])
