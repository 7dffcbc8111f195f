"""Run every file of a folder in the one runtime that an environment has: what `tests.runtimes` starts there.

`ENVIRONMENT/bin/python -I tests/runtimes_run.py CHECKOUT FILES RESULTS`. Beside the runtime there is numpy alone. For
FILES/NAME.SUFFIX and FILES/NAME.npz, its inputs in order, it writes RESULTS/NAME.SUFFIX.KERNELS.npy with the first
output, or .txt with the reason why the runtime does not take the file; for ONNX also the optimized model, as the
runtime saves it; RESULTS/facts.json last.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

MODULES = {
    "onnxruntime": "onnxruntime",
    "tflite-runtime": "tflite_runtime.interpreter",
    "ai-edge-litert": "ai_edge_litert.interpreter",
}
# Files that a program does not hand to the interpreter as they are: packed ones, and int4 ones that it wants in int8.
LOADED = (".packed.tflite", ".widened.tflite")
KERNELS = {"default": "AUTO", "built-in": "BUILTIN_WITHOUT_DEFAULT_DELEGATES", "reference": "BUILTIN_REF"}


def run_onnx(ort: Any, file: Path, inputs: list[np.ndarray], results: Path) -> bool:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(results / f"{file.name}.optimized.onnx")
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {i.name: x for i, x in zip(session.get_inputs(), inputs, strict=True)})
    np.save(results / f"{file.name}.default.npy", output)
    # What needs less memory to load computes the same.
    from edgecomp.runtime import onnx_session

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    lean = onnx_session(file, options=options, folder=results)
    (same,) = lean.run(None, {i.name: x for i, x in zip(lean.get_inputs(), inputs, strict=True)})
    assert np.array_equal(output, same), f"{file.name}: another result by onnx_session"
    return False


def run_tflite(module: Any, file: Path, inputs: list[np.ndarray], results: Path) -> bool:
    """Run by each kind of kernels; tell whether XNNPACK took over any of the default ones."""
    in_xnnpack = False
    for kernels, resolver in KERNELS.items():
        stem = f"{file.name}.{kernels}"
        try:
            interpreter = module.Interpreter(
                model_content=as_read(file, results),
                num_threads=1,
                experimental_op_resolver_type=getattr(module.OpResolverType, resolver),
            )
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            (results / f"{stem}.txt").write_text(" ".join(str(error).split()))
            continue
        delegated = any(op["op_name"] == "DELEGATE" for op in interpreter._get_ops_details())
        assert kernels == "default" or not delegated, f"{file.name}: {kernels} kernels, but delegated"
        in_xnnpack |= delegated
        sources, target = interpreter.get_input_details(), interpreter.get_output_details()[0]
        outputs = []
        for images in zip(*inputs, strict=True):
            for source, image in zip(sources, images, strict=True):
                nhwc = image.transpose(1, 2, 0) if image.ndim == 3 else image
                interpreter.set_tensor(source["index"], np.ascontiguousarray(nhwc[None]))
            interpreter.invoke()
            output = interpreter.get_tensor(target["index"])
            outputs.append(output.transpose(0, 3, 1, 2) if output.ndim == 4 else output)
        np.save(results / f"{stem}.npy", np.concatenate(outputs))
    return in_xnnpack


def as_read(file: Path, results: Path) -> bytes:
    """Give what a program hands to the interpreter: what our own reader gives, and the shell's command too."""
    if not file.name.endswith(LOADED):
        return file.read_bytes()
    from edgecomp.cli import main
    from edgecomp.runtime import load

    data = load(file)
    unpacked = results / "unpacked.tflite"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["unpack", str(file), "-o", str(unpacked), "--force"]) == 0
    assert unpacked.read_bytes() == data
    unpacked.unlink()
    return data


def inputs_of(path: Path) -> list[np.ndarray]:
    with np.load(path) as arrays:
        return [arrays[str(i)] for i in range(len(arrays.files))]


def main(checkout: Path, files: Path, results: Path) -> None:
    sys.path.append(str(checkout))
    versions = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    # Of an emulated board, which has two, the first: it is for the ONNX files.
    package = next(name for name in MODULES if name in versions)
    module = importlib.import_module(MODULES[package])
    run, suffix = (run_onnx, ".onnx") if package == "onnxruntime" else (run_tflite, ".tflite")
    in_xnnpack = [
        file.name
        for file in sorted(files.glob(f"*{suffix}"))
        if run(module, file, inputs_of(files / f"{file.name.partition('.')[0]}.npz"), results)
    ]
    facts = {
        "runtime": f"{package} {versions[package]}",
        "numpy": np.__version__,
        "machine": platform.machine(),
        "in_xnnpack": in_xnnpack,
    }
    (results / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
