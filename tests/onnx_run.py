"""Run ONNX files in stock onnxruntime, by its own interface."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from edgecomp.benchmarks.onnx_runtime import saturates

SATURATES = saturates(Path("/proc/cpuinfo").read_text(), os.uname().machine)


def onnx_run(
    data: bytes, inputs: Mapping[str, np.ndarray], *, optimize: bool = True, anywhere: bool = True
) -> dict[str, np.ndarray]:
    """Give every output by name; one thread.

    Args:
        data: the file.
        inputs: by name.
        optimize: all optimizations, or none.
        anywhere: what it gives on every processor, also where this one's sums would saturate.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if anywhere and optimize and SATURATES:
        data = unsigned(data)
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def unsigned(data: bytes) -> bytes:
    """Let onnxruntime itself add 128 to the codes of weights before they are used, whatever it makes them of."""
    model = onnx.load_from_string(data)
    graph = model.graph
    of_layers = {n.input[1] for n in graph.node if n.op_type in ("Conv", "Gemm", "MatMul")}
    graph.initializer.append(numpy_helper.from_array(np.int32(128), "tests.128"))
    nodes = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.output[0] in of_layers and len(node.input) == 3:
            for place in (0, 2):
                name = f"tests.{node.output[0]}.{place}"
                nodes += [
                    helper.make_node("Cast", [node.input[place]], [f"{name}.wide"], to=TensorProto.INT32),
                    helper.make_node("Add", [f"{name}.wide", "tests.128"], [f"{name}.raised"]),
                    helper.make_node("Cast", [f"{name}.raised"], [name], to=TensorProto.UINT8),
                ]
                node.input[place] = name
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return model.SerializeToString()
