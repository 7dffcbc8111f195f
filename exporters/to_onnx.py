"""Graph -> ONNX, with weights of 2-8 bits that standard operators unpack and a runtime folds when it loads the file.

The quantized form is QDQ. Activation codes are uint8 in the file, our int8 codes plus 128: on x86 onnxruntime turns
int8 activations into uint8 where it can and then fails to fuse where it could not; uint8 is fused everywhere.

A packed weight is an initializer of bytes followed by what `onnx_weights` writes, for example BitShift, BitwiseAnd,
BitwiseOr, Where, Cast and Reshape into int8, then DequantizeLinear: stock onnxruntime computes the first part once, at
load, and turns DequantizeLinear, Conv, QuantizeLinear into QLinearConv, so it runs at int8 speed. The usual form,
DequantizeLinear straight from INT4, is computed again in every run and is slower than float.

Opset 18 (bitwise operators) is the lowest that can say this. The batch dimension is symbolic.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecomp import __version__
from edgecomp.artifact import AtRest, Exported, StoredWeight
from edgecomp.coding import Encoded, dense, encode
from edgecomp.curves import gate_codes
from edgecomp.errors import ExportError
from edgecomp.graph import Graph, Node, Op, QuantParams, Tensor
from edgecomp.ops import clamp_codes, ints
from edgecomp.quantmath import ACT_MAX, ACT_MIN, SHARES, UNIT, quantize

from .onnx_model import DOMAIN, Model
from .onnx_weights import word_levels, write_codes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OPSET = 18
IR_VERSION = 8


def to_onnx(graph: Graph, *, at_rest: AtRest = AtRest.NATIVE) -> Exported:
    """Write a graph as an ONNX model.

    Args:
        graph: float (gives a float32 model) or quantized, with float or int8 input and output.
        at_rest: NATIVE packs weights; INT8 writes them as they are, one byte a code, as other tools do.

    Returns:
        the file; input and output are (N, ...) with symbolic N. For int8 input and output the scales stand in the
        model's metadata as edgecomp.input_scale, edgecomp.input_zero_point, and likewise for the output.

    Raises:
        ExportError: the `onnx` package is missing, it refuses the graph, or ONNX knows no such way to store weights.
    """
    if at_rest is AtRest.PACKED:
        raise ExportError("onnx: weights are packed natively; export in form 'onnx'")
    try:
        import onnx  # noqa: F401  (asked for here, used where the file is written)
    except ImportError as e:
        raise ExportError("onnx: the package is missing; install it with: pip install 'edgecomp[build]'") from e

    weights = [graph.weight(node) for node in graph.layers()]
    coded = [(w.name, w.data, w.quant.bits) for w in weights if w.quant is not None and w.data is not None]
    if at_rest is AtRest.INT8:
        codes = {name: dense(data, 8) for name, data, _ in coded}
        return replace(_written(graph, codes, folds=False), at_rest=at_rest)
    plain = _written(graph, {name: dense(data, bits) for name, data, bits in coded}, folds=True)
    encoded = {name: encode(data, bits) for name, data, bits in coded}
    if all(codes.words is None for codes in encoded.values()):
        return plain
    # The functions that decode words take some kilobytes, once a file: too much for a small one.
    return min(plain, _written(graph, encoded, folds=True), key=lambda exported: len(exported.data))


def _written(graph: Graph, codes: Mapping[str, Encoded], *, folds: bool) -> Exported:
    """Write a graph with its weights encoded as given, by name; `folds`: for runtimes that compute constants early."""
    import onnx
    from onnx import TensorProto, helper

    model = Model(graph.tensors, codes=codes, levels=word_levels(codes.values()), folds=folds)
    borders = [name for name in (*graph.inputs, *graph.outputs) if graph.tensors[name].quant is not None]
    inner = {name: model.fresh(f"{name}:u8") for name in borders}
    inside = _renamed(graph, inner)
    for name in graph.inputs:
        if name in inner:
            _shift_codes(model, graph.tensors[name], name, inner[name], (np.int8, np.uint8))
    for node in inside.nodes:
        _EMIT[node.op](model, inside, node)
    for name in graph.outputs:
        if name in inner:
            _shift_codes(model, graph.tensors[name], inner[name], name, (np.uint8, np.int8))

    def value_info(name: str) -> Any:
        tensor = graph.tensors[name]
        kind = TensorProto.FLOAT if tensor.quant is None else TensorProto.INT8
        return helper.make_tensor_value_info(name, kind, ["N", *tensor.shape[1:]])

    domains = [("", OPSET), (DOMAIN, 1)] if model.functions else [("", OPSET)]
    try:
        proto = helper.make_model(
            helper.make_graph(
                model.nodes,
                graph.name,
                [value_info(name) for name in graph.inputs],
                [value_info(name) for name in graph.outputs],
                model.initializers,
            ),
            opset_imports=[helper.make_opsetid(*domain) for domain in domains],
            functions=list(model.functions.values()),
            ir_version=IR_VERSION,
            producer_name="edgecomp",
            producer_version=__version__,
        )
        helper.set_model_props(proto, _border_metadata(graph))
        onnx.checker.check_model(proto, full_check=True)
        data = proto.SerializeToString(deterministic=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as e:
        raise ExportError(f"onnx: the onnx package refuses the model: {str(e).splitlines()[0][:200]}") from e
    return Exported(format="onnx", data=data, weights=tuple(model.stored))


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


def _shift_codes(model: Model, tensor: Tensor, source: str, target: str, kinds: tuple[Any, Any]) -> None:
    """Turn int8 codes into uint8 codes of the same values, or back, by standard operators; exact."""
    assert tensor.quant is not None
    scale = model.constant(tensor.quant.scale)
    shifts = {np.int8: 0, np.uint8: _TO_UNSIGNED}
    zero_points = [model.constant((tensor.quant.zero_point + shifts[kind]).astype(kind)) for kind in kinds]
    real = model.temporary("DequantizeLinear", [source, scale, zero_points[0]])
    model.node("QuantizeLinear", [real, scale, zero_points[1]], target)


# ---- quantization pieces ---------------------------------------------------------------------------------------------


_TO_UNSIGNED = 128
"""What is added to an int8 code to store it as uint8."""
_WORTH_A_NODE = 8
"""So many scales are shorter as a product that is computed at load."""


def _activation_params(model: Model, tensor: Tensor) -> tuple[str, str]:
    assert tensor.quant is not None
    zero_point = (tensor.quant.zero_point + _TO_UNSIGNED).astype(np.uint8)
    return model.constant(tensor.quant.scale), model.constant(zero_point)


def _parameter_params(model: Model, graph: Graph, node: Node, tensor: Tensor) -> tuple[str, str]:
    """Name scales and zero points of a layer's weight or bias: next to the codes, the most bytes of a small layer."""
    assert tensor.quant is not None
    assert not tensor.quant.zero_point.any()
    is_bias = tensor.quant.bits == 32
    zero_points = model.zeros(tensor.quant.scale.size, np.int32 if is_bias else np.int8)
    given, weight = graph.tensors[node.inputs[0]].quant, graph.weight(node).quant
    if is_bias and model.folds and given is not None and weight is not None:
        product = given.scale * weight.scale
        if product.size >= _WORTH_A_NODE and np.array_equal(product, tensor.quant.scale):
            return model.temporary("Mul", [model.constant(given.scale), model.constant(weight.scale)]), zero_points
    return model.constant(tensor.quant.scale), zero_points


def _read(model: Model, graph: Graph, name: str) -> str:
    """Name the float value of an activation: each reader gets a DequantizeLinear of its own.

    onnxruntime turns a group of DequantizeLinear, operator and QuantizeLinear into an integer operator only when
    nothing else reads the group's own tensors.
    """
    tensor = graph.tensors[name]
    if tensor.quant is None:
        return name
    scale, zero_point = _activation_params(model, tensor)
    return model.temporary("DequantizeLinear", [name, scale, zero_point])


def _write(model: Model, graph: Graph, node: Node, op_type: str, inputs: Sequence[str], **attributes: object) -> None:
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


def _clip_codes(model: Model, codes: str, low: int, high: int, output: str) -> None:
    limits = [model.constant(np.uint8(limit + _TO_UNSIGNED)) for limit in (low, high)]
    model.node("Clip", [codes, *limits], output)


# ---- operators -------------------------------------------------------------------------------------------------------


def _parameters(model: Model, graph: Graph, node: Node) -> list[str]:
    """Store weight and bias of a layer and name their float values."""
    names = []
    weight = graph.weight(node)
    for tensor in (weight, graph.bias(node)):
        if tensor is None:
            continue
        assert tensor.data is not None
        if tensor.quant is None:
            names.append(model.weight(tensor.name, tensor.data))
            if tensor is weight:
                n_bytes = tensor.data.nbytes
                model.stored.append(StoredWeight(layer=node.name, bits=32, stored_bits=32, stored_bytes=n_bytes))
            continue
        scale, zero_point = _parameter_params(model, graph, node, tensor)
        if tensor.quant.bits == 32:
            codes = model.weight(tensor.name, tensor.data)
        else:
            encoded = model.codes[tensor.name]
            codes = write_codes(model, tensor.name, encoded, tensor.shape, model.levels)
            model.stored.append(
                StoredWeight(
                    layer=node.name,
                    bits=tensor.quant.bits,
                    stored_bits=encoded.bits,
                    stored_bytes=encoded.stored_bytes,
                    encoding=encoded.kind,
                )
            )
        names.append(model.temporary("DequantizeLinear", [codes, scale, zero_point], axis=0))
    return names


def _conv(model: Model, graph: Graph, node: Node) -> None:
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


def _linear(model: Model, graph: Graph, node: Node) -> None:
    inputs = [_read(model, graph, node.inputs[0]), *_parameters(model, graph, node)]
    _write(model, graph, node, "Gemm", inputs, transB=1)


def _add(model: Model, graph: Graph, node: Node) -> None:
    a = _read(model, graph, node.inputs[0])
    # Adding a tensor to itself: the second reading needs no node of its own.
    b = a if node.inputs[1] == node.inputs[0] else _read(model, graph, node.inputs[1])
    _write(model, graph, node, "Add", [a, b])


def _mul(model: Model, graph: Graph, node: Node) -> None:
    a = _read(model, graph, node.inputs[0])
    b = a if node.inputs[1] == node.inputs[0] else _read(model, graph, node.inputs[1])
    _write(model, graph, node, "Mul", [a, b])


def _sigmoid(model: Model, graph: Graph, node: Node) -> None:
    _write(model, graph, node, "Sigmoid", [_read(model, graph, node.inputs[0])])


def _hard_sigmoid(model: Model, graph: Graph, node: Node) -> None:
    """Write relu6(x + 3) / 6; of codes, a sum with 3 on six times the output's scale, clamped."""
    output = graph.tensors[node.outputs[0]]
    if output.quant is None:
        model.node("HardSigmoid", [node.inputs[0]], output.name, name=node.name, alpha=1 / 6, beta=0.5)
        return
    sixfold = replace(output, quant=replace(output.quant, scale=output.quant.scale * np.float32(6)))
    summed = model.temporary("Add", [_read(model, graph, node.inputs[0]), _three(model)], name=node.name)
    low, high = (int(quantize(np.array(limit), output.quant)) for limit in (0.0, 1.0))
    if (low, high) == (ACT_MIN, ACT_MAX):
        model.node("QuantizeLinear", [summed, *_activation_params(model, sixfold)], output.name)
        return
    codes = model.temporary("QuantizeLinear", [summed, *_activation_params(model, sixfold)])
    _clip_codes(model, codes, low, high, output.name)


def _three(model: Model) -> str:
    codes, scale, zero_point = (np.uint8([255]), np.float32(3 / 255), np.uint8(0))
    return model.temporary("DequantizeLinear", [model.constant(np.asarray(v)) for v in (codes, scale, zero_point)])


def _by_gate(graph: Graph, node: Node) -> bool:
    """Tell whether a silu or hard_swish is a product of codes."""
    source, target = graph.tensors[node.inputs[0]].quant, graph.tensors[node.outputs[0]].quant
    return source is not None and target is not None and gate_codes(node.op, source, target) is not None


def _silu(model: Model, graph: Graph, node: Node) -> None:
    if not _by_gate(graph, node):
        x = _read(model, graph, node.inputs[0])
        _write(model, graph, node, "Mul", [x, model.temporary("Sigmoid", [x])])
        return
    gate = model.temporary("Sigmoid", [_read(model, graph, node.inputs[0])])
    _weigh(model, graph, node, gate, UNIT, UNIT)


def _hard_swish(model: Model, graph: Graph, node: Node) -> None:
    x = _read(model, graph, node.inputs[0])
    if not _by_gate(graph, node):
        _write(model, graph, node, "HardSwish", [x])
        return
    # relu6(x + 3) in steps of 6/255, read as steps of 1/255
    gate = model.temporary("Add", [x, _three(model)])
    _weigh(model, graph, node, gate, replace(SHARES, scale=np.float32(6) * SHARES.scale), SHARES)


def _weigh(model: Model, graph: Graph, node: Node, gate: str, written: QuantParams, read: QuantParams) -> None:
    """Multiply the node's input by a gate that is rounded to codes; these may be written and read by two scales."""
    scale, zero_point = model.constant(written.scale), model.constant(np.asarray(np.uint8(0)))
    codes = model.temporary("QuantizeLinear", [gate, scale, zero_point])
    share = model.temporary("DequantizeLinear", [codes, model.constant(read.scale), zero_point])
    _write(model, graph, node, "Mul", [_read(model, graph, node.inputs[0]), share])


def _clip(model: Model, graph: Graph, node: Node) -> None:
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


def _avg_pool(model: Model, graph: Graph, node: Node) -> None:
    inputs = [_read(model, graph, node.inputs[0])]
    _write(model, graph, node, "AveragePool", inputs, **_window(node), count_include_pad=node.attrs["include_pad"])


# Max pool, concat, gather, flatten and reshape only move codes: ONNX's own operators do that on int8 as well as on
# floats (MaxPool pads with the smallest code), so nothing is dequantized.


def _max_pool(model: Model, graph: Graph, node: Node) -> None:
    dilations = list(ints(node.attrs, "dilation"))
    model.node("MaxPool", node.inputs, node.outputs[0], name=node.name, **_window(node), dilations=dilations)


def _flatten(model: Model, graph: Graph, node: Node) -> None:
    model.node("Flatten", node.inputs, node.outputs[0], name=node.name, axis=1)


def _global_avg_pool(model: Model, graph: Graph, node: Node) -> None:
    _write(model, graph, node, "GlobalAveragePool", [_read(model, graph, node.inputs[0])])


def _concat(model: Model, graph: Graph, node: Node) -> None:
    model.node("Concat", node.inputs, node.outputs[0], name=node.name, axis=node.attrs["axis"])


def _gather(model: Model, graph: Graph, node: Node) -> None:
    indices = ints(node.attrs, "indices")
    first, stop = indices[0], indices[0] + len(indices)
    if indices == tuple(range(first, stop)):
        numbers = [model.constant(np.array([n], dtype=np.int64)) for n in (first, stop, 1)]  # start, end, axis
        model.node("Slice", [node.inputs[0], *numbers], node.outputs[0], name=node.name)
    else:
        order = model.constant(np.array(indices, dtype=np.int32))
        model.node("Gather", [node.inputs[0], order], node.outputs[0], name=node.name, axis=1)


def _reshape(model: Model, graph: Graph, node: Node) -> None:
    shape = model.constant(np.array([0, *ints(node.attrs, "shape")[1:]], dtype=np.int64))
    model.node("Reshape", [node.inputs[0], shape], node.outputs[0], name=node.name)


def _softmax(model: Model, graph: Graph, node: Node) -> None:
    _write(model, graph, node, "Softmax", [_read(model, graph, node.inputs[0])], axis=node.attrs["axis"])


def _quantize(model: Model, graph: Graph, node: Node) -> None:
    scale, zero_point = _activation_params(model, graph.tensors[node.outputs[0]])
    model.node("QuantizeLinear", [node.inputs[0], scale, zero_point], node.outputs[0], name=node.name)


def _dequantize(model: Model, graph: Graph, node: Node) -> None:
    scale, zero_point = _activation_params(model, graph.tensors[node.inputs[0]])
    model.node("DequantizeLinear", [node.inputs[0], scale, zero_point], node.outputs[0], name=node.name)


_EMIT: dict[Op, Any] = {
    Op.CONV2D: _conv,
    Op.LINEAR: _linear,
    Op.ADD: _add,
    Op.MUL: _mul,
    Op.SIGMOID: _sigmoid,
    Op.HARD_SIGMOID: _hard_sigmoid,
    Op.SILU: _silu,
    Op.HARD_SWISH: _hard_swish,
    Op.CLIP: _clip,
    Op.MAX_POOL: _max_pool,
    Op.AVG_POOL: _avg_pool,
    Op.GLOBAL_AVG_POOL: _global_avg_pool,
    Op.CONCAT: _concat,
    Op.GATHER: _gather,
    Op.FLATTEN: _flatten,
    Op.RESHAPE: _reshape,
    Op.SOFTMAX: _softmax,
    Op.QUANTIZE: _quantize,
    Op.DEQUANTIZE: _dequantize,
}
