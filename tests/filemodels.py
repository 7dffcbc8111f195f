"""Tiny exported files, written with the format's own tools and not with our exporters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import flatbuffers
import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as schema
from onnx import TensorProto, helper, numpy_helper

ONNX_TYPES = {"float32": TensorProto.FLOAT, "int8": TensorProto.INT8, "uint8": TensorProto.UINT8}


def onnx_model(
    nodes: Sequence[onnx.NodeProto],
    shape: Sequence[int | str],
    *,
    dtype: str = "float32",
    out_dtype: str | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    facts: Mapping[str, str] | None = None,
    opset: int = 21,
    extra: Sequence[onnx.TensorProto] = (),
) -> bytes:
    """x -> nodes -> y; `shape` with N first."""
    graph = helper.make_graph(
        list(nodes),
        "tiny",
        [helper.make_tensor_value_info("x", ONNX_TYPES[dtype], list(shape))],
        [helper.make_tensor_value_info("y", ONNX_TYPES[out_dtype or dtype], None)],
        [*(numpy_helper.from_array(array, name) for name, array in (weights or {}).items()), *extra],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    helper.set_model_props(model, dict(facts or {}))
    return model.SerializeToString()


def conv_onnx(weight: np.ndarray, side: int, *, batch: int | str = "N") -> bytes:
    """Float convolution without padding: weight OIHW, square images."""
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    return onnx_model([node], [batch, weight.shape[1], side, side], weights={"w": weight})


def tflite_model(
    ops: Sequence[tuple[int, Sequence[int], int]],
    shapes: Sequence[Sequence[int]],
    *,
    type: int = schema.TensorType.FLOAT32,
    quant: tuple[float, int] | None = None,
    data: Mapping[int, np.ndarray] | None = None,
    conv: int | None = None,
) -> bytes:
    """Operators (builtin code, input tensors, output tensor) over tensors of `shapes`; tensor 0 in, the last out.

    `data` fills constant tensors; the operator `conv` gets Conv2D's options: stride 1, no padding.
    """
    model = schema.ModelT()
    model.version, model.buffers = 3, [schema.BufferT()]
    graph = schema.SubGraphT()
    graph.tensors, graph.operators, model.operatorCodes = [], [], []
    for i, shape in enumerate(shapes):
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = f"t{i}", list(shape), type, 0
        if data and i in data:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(data[i].tobytes(), dtype=np.uint8)
            model.buffers.append(buffer)
            tensor.buffer = len(model.buffers) - 1
            if data[i].dtype == np.int32:
                tensor.type = schema.TensorType.INT32
        if quant:
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = np.array([quant[0]], dtype=np.float32)
            tensor.quantization.zeroPoint = np.array([quant[1]], dtype=np.int64)
        graph.tensors.append(tensor)
    for i, (builtin, inputs, output) in enumerate(ops):
        code = schema.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode, code.version = builtin, min(builtin, 127), 1
        model.operatorCodes.append(code)
        op = schema.OperatorT()
        op.opcodeIndex, op.inputs, op.outputs = i, list(inputs), [output]
        if i == conv:
            op.builtinOptionsType, op.builtinOptions = schema.BuiltinOptions.Conv2DOptions, schema.Conv2DOptionsT()
            op.builtinOptions.padding = schema.Padding.VALID
            op.builtinOptions.strideH = op.builtinOptions.strideW = 1
        graph.operators.append(op)
    graph.inputs, graph.outputs, model.subgraphs = [0], [len(shapes) - 1], [graph]
    builder = flatbuffers.Builder(0)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def conv_tflite(weight: np.ndarray, height: int, width: int) -> bytes:
    """Float convolution without padding: weight OIHW."""
    o, i, kh, kw = weight.shape
    ohwi = np.ascontiguousarray(weight.transpose(0, 2, 3, 1))
    return tflite_model(
        [(schema.BuiltinOperator.CONV_2D, (0, 1, 2), 3)],
        [(1, height, width, i), ohwi.shape, (o,), (1, height - kh + 1, width - kw + 1, o)],
        data={1: ohwi, 2: np.zeros(o, dtype=np.float32)},
        conv=0,
    )
