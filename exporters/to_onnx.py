"""Graph -> ONNX, with weights of 2-7 bits packed by standard operators that a runtime folds when it loads the file.

The quantized form is QDQ. Activation codes are uint8 in the file, our int8 codes plus 128: on x86 onnxruntime turns
int8 activations into uint8 where it can and then fails to fuse where it could not; uint8 is fused everywhere.

A packed weight is an initializer of bytes followed by BitShift, BitwiseAnd, BitwiseOr, Where, Cast and Reshape into
int8, then DequantizeLinear: stock onnxruntime computes the first part once, at load, and turns DequantizeLinear, Conv,
QuantizeLinear into QLinearConv, so it runs at int8 speed. The usual form, DequantizeLinear straight from INT4, is
computed again in every run and is slower than float.

Opset 18 (bitwise operators) is the lowest that can say this. The batch dimension is symbolic.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecomp import __version__
from edgecomp.artifact import Exported, StoredWeight
from edgecomp.errors import ExportError
from edgecomp.graph import Array, Graph, Node, Op, Tensor
from edgecomp.ops import clamp_codes, ints
from edgecomp.packing import FIELDS, pack, packed_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

OPSET = 18
IR_VERSION = 8


class _Model:
    """The nodes and initializers written so far; equal small constants are stored once.

    Names that the exporter makes up give way to those of the graph.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def fresh(self, wanted: str) -> str:
        """Give a tensor name that nothing else has: the one wanted, or as near as possible."""
        while wanted in self._names:
            wanted += "'"
        self._names.add(wanted)
        return wanted

    def node(self, op_type: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))
        return output

    def temporary(self, op_type: str, inputs: Sequence[str], **attributes: object) -> str:
        """Append a node whose output needs no name that says something: bytes on disk count."""
        return self.node(op_type, inputs, self.fresh(f"%{len(self.nodes)}"), **attributes)

    def weight(self, name: str, values: Array) -> str:
        from onnx import numpy_helper

        self.initializers.append(numpy_helper.from_array(np.asarray(values, order="C"), name))
        return name

    def constant(self, values: Array) -> str:
        """Store a constant once for equal values, under a short name: bytes on disk count."""
        values = np.asarray(values, order="C")
        key = (values.dtype.name, values.shape, values.tobytes())
        if key not in self._constants:
            self._constants[key] = self.weight(self.fresh(f"#{len(self._constants)}"), values)
        return self._constants[key]


def to_onnx(graph: Graph) -> Exported:
    """Write a graph as an ONNX model.

    Args:
        graph: float (gives a float32 model) or quantized, with float or int8 input and output.

    Returns:
        the file; input and output are (N, ...) with symbolic N. For int8 input and output the scales stand in the
        model's metadata as edgecomp.input_scale, edgecomp.input_zero_point, and likewise for the output.

    Raises:
        ExportError: the `onnx` package is missing, or it refuses the graph.
    """
    try:
        import onnx
        from onnx import TensorProto, helper
    except ImportError as e:
        raise ExportError("onnx: the package is missing; install it with: pip install 'edgecomp[build]'") from e

    model = _Model(graph.tensors)
    stored = []
    borders = [name for name in (*graph.inputs, *graph.outputs) if graph.tensors[name].quant is not None]
    inner = {name: model.fresh(f"{name}:u8") for name in borders}
    inside = _renamed(graph, inner)
    for name in graph.inputs:
        if name in inner:
            _shift_codes(model, graph.tensors[name], name, inner[name], (np.int8, np.uint8))
    for node in inside.nodes:
        if node.op in (Op.CONV2D, Op.LINEAR):
            stored.append(_stored_weight(inside, node))
        _EMIT[node.op](model, inside, node)
    for name in graph.outputs:
        if name in inner:
            _shift_codes(model, graph.tensors[name], inner[name], name, (np.uint8, np.int8))

    def value_info(name: str) -> Any:
        tensor = graph.tensors[name]
        kind = TensorProto.FLOAT if tensor.quant is None else TensorProto.INT8
        return helper.make_tensor_value_info(name, kind, ["N", *tensor.shape[1:]])

    try:
        proto = helper.make_model(
            helper.make_graph(
                model.nodes,
                graph.name,
                [value_info(name) for name in graph.inputs],
                [value_info(name) for name in graph.outputs],
                model.initializers,
            ),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="edgecomp",
            producer_version=__version__,
        )
        helper.set_model_props(proto, _border_metadata(graph))
        onnx.checker.check_model(proto, full_check=True)
        data = proto.SerializeToString(deterministic=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as e:
        raise ExportError(f"onnx: the onnx package refuses the model: {str(e).splitlines()[0][:200]}") from e
    return Exported(format="onnx", data=data, weights=tuple(stored))


def _border_metadata(graph: Graph) -> dict[str, str]:
    found = {}
    for side, names in (("input", graph.inputs), ("output", graph.outputs)):
        quant = graph.tensors[names[0]].quant
        if quant is not None:
            found[f"edgecomp.{side}_scale"] = repr(float(quant.scale))
            found[f"edgecomp.{side}_zero_point"] = str(int(quant.zero_point))
    return found


def _renamed(graph: Graph, inner: Mapping[str, str]) -> Graph:
    """Rename integer inputs and outputs inside the graph, so that their own names are free for the int8 borders."""

    def names(outer: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(inner.get(name, name) for name in outer)

    return replace(
        graph,
        nodes=tuple(replace(node, inputs=names(node.inputs), outputs=names(node.outputs)) for node in graph.nodes),
        tensors={inner.get(name, name): replace(t, name=inner.get(name, name)) for name, t in graph.tensors.items()},
        inputs=names(graph.inputs),
        outputs=names(graph.outputs),
    )


def _shift_codes(model: _Model, tensor: Tensor, source: str, target: str, kinds: tuple[Any, Any]) -> None:
    """Turn int8 codes into uint8 codes of the same values, or back, by standard operators; exact."""
    assert tensor.quant is not None
    scale = model.constant(tensor.quant.scale)
    shifts = {np.int8: 0, np.uint8: _TO_UNSIGNED}
    zero_points = [model.constant((tensor.quant.zero_point + shifts[kind]).astype(kind)) for kind in kinds]
    real = model.temporary("DequantizeLinear", [source, scale, zero_points[0]])
    model.node("QuantizeLinear", [real, scale, zero_points[1]], target)


def _stored_weight(graph: Graph, node: Node) -> StoredWeight:
    weight = graph.weight(node)
    assert weight.data is not None
    if weight.quant is None:
        return StoredWeight(layer=node.name, bits=32, stored_bits=32, stored_bytes=weight.data.nbytes)
    bits = weight.quant.bits
    n_bytes = packed_bytes(weight.data.size, bits)
    return StoredWeight(layer=node.name, bits=bits, stored_bits=bits, stored_bytes=n_bytes)


# ---- quantization pieces ---------------------------------------------------------------------------------------------


_TO_UNSIGNED = 128
"""What is added to an int8 code to store it as uint8."""


def _activation_params(model: _Model, tensor: Tensor) -> tuple[str, str]:
    assert tensor.quant is not None
    zero_point = (tensor.quant.zero_point + _TO_UNSIGNED).astype(np.uint8)
    return model.constant(tensor.quant.scale), model.constant(zero_point)


def _parameter_params(model: _Model, tensor: Tensor) -> tuple[str, str]:
    assert tensor.quant is not None
    dtype = np.int32 if tensor.quant.bits == 32 else np.int8
    return model.constant(tensor.quant.scale), model.constant(tensor.quant.zero_point.astype(dtype))


def _read(model: _Model, graph: Graph, name: str) -> str:
    """Name the float value of an activation: each reader gets a DequantizeLinear of its own.

    onnxruntime turns a group of DequantizeLinear, operator and QuantizeLinear into an integer operator only when
    nothing else reads the group's own tensors.
    """
    tensor = graph.tensors[name]
    if tensor.quant is None:
        return name
    scale, zero_point = _activation_params(model, tensor)
    return model.temporary("DequantizeLinear", [name, scale, zero_point])


def _write(model: _Model, graph: Graph, node: Node, op_type: str, inputs: Sequence[str], **attributes: object) -> None:
    """Append an operator on float values, and the QuantizeLinear (and clamp) behind it when its output is codes."""
    output = graph.tensors[node.outputs[0]]
    if output.quant is None:
        model.node(op_type, inputs, output.name, name=node.name, **attributes)
        return
    scale, zero_point = _activation_params(model, output)
    real = model.temporary(op_type, inputs, name=node.name, **attributes)
    low, high = clamp_codes(node) if "clamp" in node.attrs else (-128, 127)
    if (low, high) == (-128, 127):
        model.node("QuantizeLinear", [real, scale, zero_point], output.name)
        return
    codes = model.temporary("QuantizeLinear", [real, scale, zero_point])
    _clip_codes(model, codes, low, high, output.name)


def _clip_codes(model: _Model, codes: str, low: int, high: int, output: str) -> None:
    limits = [model.constant(np.uint8(limit + _TO_UNSIGNED)) for limit in (low, high)]
    model.node("Clip", [codes, *limits], output)


def _packed_codes(model: _Model, name: str, codes: Array, bits: int) -> str:
    """Store int8 codes packed; give the name of the int8 tensor that the runtime unpacks them to.

    The fields are put together to two's complement of `bits` bits in a byte; the sign is then copied into the upper
    bits, and Cast reinterprets the byte (ONNX defines a cast out of range so). Subtraction would be shorter, but
    onnxruntime 1.17 cannot subtract bytes.
    """
    from onnx import TensorProto

    if bits == 8:
        return model.weight(name, codes)
    value, low = "", 0
    for number, (field, width) in enumerate(zip(pack(codes, bits), FIELDS[bits], strict=True)):
        planes = 8 // width
        shifts = model.constant(np.arange(0, 8, width, dtype=np.uint8)[:, None])
        part = model.weight(model.fresh(f"{name}.{number}"), field[None, :])
        part = model.temporary("BitShift", [part, shifts], direction="RIGHT")
        part = model.temporary("BitwiseAnd", [part, model.constant(np.uint8((1 << width) - 1))])
        part = model.temporary("Reshape", [part, model.constant(np.array([-1], dtype=np.int64))])
        if planes * field.size != codes.size:
            limits = (np.array([v], dtype=np.int64) for v in (0, codes.size))
            part = model.temporary("Slice", [part, *(model.constant(v) for v in limits)])
        if low:
            part = model.temporary("BitShift", [part, model.constant(np.uint8(low))], direction="LEFT")
            part = model.temporary("BitwiseOr", [value, part])
        value, low = part, low + width
    sign = model.temporary("BitwiseAnd", [value, model.constant(np.uint8(1 << (bits - 1)))])
    negative = model.temporary("Cast", [sign], to=TensorProto.BOOL)
    upper = [model.constant(np.uint8(256 - (1 << bits))), model.constant(np.uint8(0))]
    value = model.temporary("BitwiseOr", [value, model.temporary("Where", [negative, *upper])])
    value = model.temporary("Cast", [value], to=TensorProto.INT8)
    return model.node("Reshape", [value, model.constant(np.array(codes.shape, dtype=np.int64))], name)


# ---- operators -------------------------------------------------------------------------------------------------------


def _parameters(model: _Model, graph: Graph, node: Node) -> list[str]:
    """Store weight and bias of a layer and name their float values."""
    names = []
    for tensor in (graph.weight(node), graph.bias(node)):
        if tensor is None:
            continue
        assert tensor.data is not None
        if tensor.quant is None:
            names.append(model.weight(tensor.name, tensor.data))
            continue
        scale, zero_point = _parameter_params(model, tensor)
        if tensor.quant.bits == 32:
            codes = model.weight(tensor.name, tensor.data)
        else:
            codes = _packed_codes(model, tensor.name, tensor.data, tensor.quant.bits)
        names.append(model.temporary("DequantizeLinear", [codes, scale, zero_point], axis=0))
    return names


def _conv(model: _Model, graph: Graph, node: Node) -> None:
    inputs = [_read(model, graph, node.inputs[0]), *_parameters(model, graph, node)]
    _write(
        model,
        graph,
        node,
        "Conv",
        inputs,
        kernel_shape=list(graph.weight(node).shape[2:]),
        strides=list(ints(node.attrs, "stride")),
        pads=list(ints(node.attrs, "pads")),
        dilations=list(ints(node.attrs, "dilation")),
        group=node.attrs["groups"],
    )


def _linear(model: _Model, graph: Graph, node: Node) -> None:
    inputs = [_read(model, graph, node.inputs[0]), *_parameters(model, graph, node)]
    _write(model, graph, node, "Gemm", inputs, transB=1)


def _add(model: _Model, graph: Graph, node: Node) -> None:
    a = _read(model, graph, node.inputs[0])
    # Adding a tensor to itself: the second reading needs no node of its own.
    b = a if node.inputs[1] == node.inputs[0] else _read(model, graph, node.inputs[1])
    _write(model, graph, node, "Add", [a, b])


def _clip(model: _Model, graph: Graph, node: Node) -> None:
    output = graph.tensors[node.outputs[0]]
    if output.quant is not None:
        _clip_codes(model, node.inputs[0], *clamp_codes(node), output.name)
    elif (node.attrs["low"], node.attrs["high"]) == (0, np.inf):
        model.node("Relu", [node.inputs[0]], output.name, name=node.name)
    else:
        limits = [
            model.constant(np.float32(node.attrs[side])) if np.isfinite(node.attrs[side]) else ""  # type: ignore[arg-type]
            for side in ("low", "high")
        ]
        model.node("Clip", [node.inputs[0], *limits], output.name, name=node.name)


def _window(node: Node) -> dict[str, object]:
    return {
        "kernel_shape": list(ints(node.attrs, "kernel")),
        "strides": list(ints(node.attrs, "stride")),
        "pads": list(ints(node.attrs, "pads")),
    }


def _avg_pool(model: _Model, graph: Graph, node: Node) -> None:
    inputs = [_read(model, graph, node.inputs[0])]
    _write(model, graph, node, "AveragePool", inputs, **_window(node), count_include_pad=node.attrs["include_pad"])


# Max pool, concat, flatten and reshape only move codes: ONNX's own operators do that on int8 as well as on floats
# (MaxPool pads with the smallest code), so nothing is dequantized.


def _max_pool(model: _Model, graph: Graph, node: Node) -> None:
    dilations = list(ints(node.attrs, "dilation"))
    model.node("MaxPool", node.inputs, node.outputs[0], name=node.name, **_window(node), dilations=dilations)


def _flatten(model: _Model, graph: Graph, node: Node) -> None:
    model.node("Flatten", node.inputs, node.outputs[0], name=node.name, axis=1)


def _global_avg_pool(model: _Model, graph: Graph, node: Node) -> None:
    _write(model, graph, node, "GlobalAveragePool", [_read(model, graph, node.inputs[0])])


def _concat(model: _Model, graph: Graph, node: Node) -> None:
    model.node("Concat", node.inputs, node.outputs[0], name=node.name, axis=node.attrs["axis"])


def _reshape(model: _Model, graph: Graph, node: Node) -> None:
    shape = model.constant(np.array([0, *ints(node.attrs, "shape")[1:]], dtype=np.int64))
    model.node("Reshape", [node.inputs[0], shape], node.outputs[0], name=node.name)


def _softmax(model: _Model, graph: Graph, node: Node) -> None:
    _write(model, graph, node, "Softmax", [_read(model, graph, node.inputs[0])], axis=node.attrs["axis"])


def _quantize(model: _Model, graph: Graph, node: Node) -> None:
    scale, zero_point = _activation_params(model, graph.tensors[node.outputs[0]])
    model.node("QuantizeLinear", [node.inputs[0], scale, zero_point], node.outputs[0], name=node.name)


def _dequantize(model: _Model, graph: Graph, node: Node) -> None:
    scale, zero_point = _activation_params(model, graph.tensors[node.inputs[0]])
    model.node("DequantizeLinear", [node.inputs[0], scale, zero_point], node.outputs[0], name=node.name)


_EMIT: dict[Op, Any] = {
    Op.CONV2D: _conv,
    Op.LINEAR: _linear,
    Op.ADD: _add,
    Op.CLIP: _clip,
    Op.MAX_POOL: _max_pool,
    Op.AVG_POOL: _avg_pool,
    Op.GLOBAL_AVG_POOL: _global_avg_pool,
    Op.CONCAT: _concat,
    Op.FLATTEN: _flatten,
    Op.RESHAPE: _reshape,
    Op.SOFTMAX: _softmax,
    Op.QUANTIZE: _quantize,
    Op.DEQUANTIZE: _dequantize,
}
