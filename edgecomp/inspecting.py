"""`edgecomp inspect`: what is in a file, and what the runtime that is installed makes of one of ours."""

from __future__ import annotations

from pathlib import Path

from edgecomp.benchmarks.onnx_runtime import optimized
from edgecomp.errors import BundleError, TargetError
from edgecomp.exporters.describe import describe


def inspect(path: Path, *, execution: bool = False) -> dict[str, object]:
    """Say what a file holds, and on request what onnxruntime computes of it in float.

    Args:
        path: the file.
        execution: load an ONNX file in onnxruntime too. That costs what running it costs, whatever the file asks for.

    Returns:
        what `describe` gives; on request also "execution", in words, and, where onnxruntime is installed and loads the
        file, "float_operators": op type -> the outputs of its nodes that compute floats from floats.

    Raises:
        BundleError: the file is missing, empty, damaged, or nothing that edgecomp knows.
        ExportError: the package that reads the format is missing.
    """
    found: dict[str, object] = describe(path)
    if not execution or found["kind"] != "onnx":
        return found
    try:
        executed = optimized(path)
    except (BundleError, TargetError) as e:
        return {**found, "execution": f"unknown: {e}"}
    n = sum(len(outputs) for outputs in executed.in_float.values())
    left = f"operators in float: {n}" if n else "all in integers between input and output"
    return {**found, "execution": f"{executed.runtime}: {left}", "float_operators": executed.in_float}
