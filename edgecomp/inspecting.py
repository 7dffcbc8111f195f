"""`edgecomp inspect`: what is in a file, and what the runtime that is installed makes of one of ours."""

from __future__ import annotations

from pathlib import Path

from edgecomp.benchmarks.onnx_runtime import optimized
from edgecomp.errors import BundleError, TargetError
from edgecomp.exporters.describe import describe


def inspect(path: Path) -> dict[str, object]:
    """Say what a file holds, and of an ONNX file of ours what onnxruntime executes in float.

    Returns:
        what `describe` gives; for an ONNX file of ours also "execution", in words, and, where onnxruntime is installed
        and loads it, "float_operators": op type -> the outputs of its nodes that compute floats from floats.

    Raises:
        BundleError: the file is missing, empty, damaged, or nothing that edgecomp knows.
        ExportError: the package that reads the format is missing.
    """
    found: dict[str, object] = describe(path)
    if found["kind"] != "onnx" or not str(found["producer"]).startswith("edgecomp "):
        return found
    try:
        executed = optimized(path)
    except (BundleError, TargetError) as e:
        return {**found, "execution": f"unknown: {e}"}
    n = sum(len(outputs) for outputs in executed.in_float.values())
    left = f"{n} operators in float" if n else "all in integers between input and output"
    return {**found, "execution": f"{executed.runtime}: {left}", "float_operators": executed.in_float}
