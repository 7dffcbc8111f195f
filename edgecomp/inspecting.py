"""`edgecomp inspect`: what is in a file, and what the runtime that is installed makes of one of ours."""

from __future__ import annotations

from pathlib import Path

from edgecomp.benchmarks.litert import LiteRt
from edgecomp.benchmarks.onnx_runtime import optimized
from edgecomp.errors import BundleError, TargetError, UsageError
from edgecomp.exporters.describe import describe


def inspect(path: Path, *, execution: bool = False) -> dict[str, object]:
    """Say what a file holds, and on request what the runtime that is installed makes of it.

    Args:
        path: the file.
        execution: load an ONNX file in onnxruntime, a TFLite file in LiteRT too. That costs what running it costs,
            whatever the file asks for.

    Returns:
        what `describe` gives; on request also "execution", in words, and, where the runtime is installed and loads the
        file: for ONNX "float_operators", op type -> the outputs of its nodes that compute floats from floats; for
        TFLite "left_operators", op type -> how many of them XNNPACK leaves to LiteRT's built-in kernels.

    Raises:
        BundleError: the file is missing, empty, damaged, or nothing that edgecomp knows.
        ExportError: the package that reads the format is missing.
        UsageError: what a runtime makes of it was asked, and it is no model.
    """
    found: dict[str, object] = describe(path)
    if not execution:
        return found
    if found["kind"] not in ("onnx", "tflite"):
        raise UsageError(f"{path}: is of the kind {found['kind']}, --execution is for ONNX and TFLite; leave it out")
    try:
        return {**found, **(_in_onnxruntime(path) if found["kind"] == "onnx" else _in_litert(path))}
    except (BundleError, TargetError) as e:
        return {**found, "execution": f"unknown: {e}"}


def _in_onnxruntime(path: Path) -> dict[str, object]:
    executed = optimized(path)
    n = sum(len(outputs) for outputs in executed.in_float.values())
    left = f"operators in float: {n}" if n else "all in integers between input and output"
    return {"execution": f"{executed.runtime}: {left}", "float_operators": executed.in_float}


def _in_litert(path: Path) -> dict[str, object]:
    """Give XNNPACK's own partition of the file, as LiteRT loads it: a packed one unpacked."""
    runner = LiteRt(path)
    facts = runner.describe()
    taken, nodes, parts = (facts[key] for key in ("nodes_in_xnnpack", "nodes", "xnnpack_partitions"))
    left = (entry.split(" ", 1) for entry in facts["nodes_left_to_builtin_kernels"])
    parted = f"{parts} partition{'s' * (parts != 1)}"
    text = f"litert {runner.version}: XNNPACK takes {taken} of {nodes} operators, in {parted}"
    return {"execution": text, "left_operators": {name: int(n) for n, name in left}}
