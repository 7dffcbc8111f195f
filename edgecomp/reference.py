"""Run a graph with numpy, slowly: the definition of correct for float and for quantized graphs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgecomp.errors import GraphError
from edgecomp.graph import Array, Graph, Op
from edgecomp.ops import OPS


def run(graph: Graph, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Compute every activation tensor.

    A node runs in integers when its output has quantization parameters (or when it is the dequantize at a border), else
    on real numbers in the dtype of the input.

    Args:
        graph: float or quantized.
        inputs: by name; the stored shape with any number N of images; float32 or float64, int8 for an integer input.

    Returns:
        every activation by name, inputs included.

    Raises:
        GraphError: an input is missing, or has another shape or dtype.
    """
    values: dict[str, Array] = {}
    for name in graph.inputs:
        tensor = graph.tensors[name]
        if name not in inputs:
            raise GraphError(f"input {name!r} is missing; the graph takes {', '.join(graph.inputs)}")
        value = np.asarray(inputs[name])
        if value.shape[1:] != tensor.shape[1:]:
            raise GraphError(f"input {name!r} has shape {value.shape}, expected (N, {str(tensor.shape[1:])[1:-1]})")
        if (value.dtype == np.int8) != (tensor.quant is not None):
            raise GraphError(f"input {name!r} is {value.dtype}, expected {'int8' if tensor.quant else 'float'}")
        values[name] = value
    for name, tensor in graph.tensors.items():
        if tensor.data is not None:
            values[name] = tensor.data
    for node in graph.nodes:
        row = OPS[node.op]
        if graph.tensors[node.outputs[0]].quant is not None or node.op is Op.DEQUANTIZE:
            if row.compute_integer is None:
                raise GraphError(f"{node.name}: {node.op} has no integer form")
            values[node.outputs[0]] = row.compute_integer(node, graph.tensors, values)
        else:
            values[node.outputs[0]] = row.compute([values[name] for name in node.inputs], node.attrs)
    return {name: value for name, value in values.items() if graph.tensors[name].data is None}
