"""A graph as a TFLite file: NHWC, int8 activations, int8 or packed int4 weights; or all float32.

Written with flatbuffers and the schema alone. Operators run in stock LiteRT, in its reference, built-in and XNNPACK
kernels alike, and in TFLite Micro; what the format cannot express is refused with the node's name. How weights are
stored, `tflite_weights` says. Batch size is 1; the input can be resized to more images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from edgecomp.artifact import AtRest, Exported, StoredWeight, form_of
from edgecomp.coding import field_bits
from edgecomp.compress import fuse_clips
from edgecomp.curves import gate_codes
from edgecomp.errors import ExportError
from edgecomp.graph import Array, Graph, Node, Op, QuantParams, Tensor
from edgecomp.ops import ints
from edgecomp.quantmath import ACT_MAX, ACT_MIN, SHARES, UNIT, bias_scale, quantize

from .fused import fused_activation, limits_of
from .layout import (
    TO_NCHW,
    TO_NHWC,
    feature_orders,
    moves_data,
    never_negative,
    stored_axis,
    stored_shape,
    window_padding,
)
from .tflite_channels import write_concat, write_gather
from .tflite_schema import TfliteFile
from .tflite_weights import STORING


def to_tflite(graph: Graph, *, at_rest: AtRest = AtRest.NATIVE) -> Exported:
    """Write a graph as a TFLite file.

    Image tensors are NHWC, the graph's input and output included. Tensors keep their names in the graph.

    Args:
        graph: float (gives a float32 file) or quantized, as `verify_float` and `verify_quantized` define them.
        at_rest: how weights are stored. Packed, and once unpacked, the file is that of INT8, tensor for tensor.

    Returns:
        the file, and where its weight bytes went. Equal graphs give equal bytes.

    Raises:
        ExportError: TFLite cannot express a node, or the writer libraries are missing.
    """
    return _written(graph, "tflite", at_rest)


def to_tflm(graph: Graph, *, at_rest: AtRest = AtRest.NATIVE) -> Exported:
    """Write a graph as a TFLite file for TFLite Micro: the same operators, and weights behind DECODE (`tflm_decode`).

    Every byte is flash here: of tensors only inputs, outputs and weights keep their names, and there is no signature.

    Args:
        graph: as in `to_tflite`.
        at_rest: NATIVE, or INT8 for a file without DECODE, which needs less memory to run.

    Raises:
        ExportError: as `to_tflite`.
    """
    if at_rest is AtRest.PACKED:
        raise ExportError("tflm: weights are packed natively; there is no other packed form")
    return _written(graph, "tflm", at_rest)


def _written(graph: Graph, format_name: str, at_rest: AtRest) -> Exported:
    if all(tensor.quant is None for tensor in graph.tensors.values()):
        graph = fuse_clips(graph)
    writer = _Writer(graph, form_of(format_name, at_rest))
    for name in graph.inputs:
        writer.activation(name)
    for node in graph.nodes:
        _HANDLERS[node.op](writer, node)
    data = writer.file.to_bytes(
        inputs=[writer.number[name] for name in graph.inputs],
        outputs=[writer.number[name] for name in graph.outputs],
        signature=not writer.micro,
    )
    weights, n_stray = tuple(writer.weights), writer.n_stray
    return Exported(format=format_name, data=data, weights=weights, at_rest=at_rest, stray_transposes=n_stray)


class _Writer:
    """The file in the making, with what the handlers of all nodes share.

    Attributes:
        graph: what is written.
        form: see `artifact.form_of`.
        micro: whether it is for TFLite Micro.
        file: takes tensors and operators.
        number: tensor number by graph name.
        orders: see `layout.feature_orders`.
        weights: one entry a layer so far.
        n_stray: transposes so far that are no part of a channel shuffle.
    """

    def __init__(self, graph: Graph, form: str) -> None:
        self.graph = graph
        self.form = form
        self.micro = form.startswith("tflm")
        self.file = TfliteFile()
        self.number: dict[str, int] = {}
        self.orders = feature_orders(graph)
        self.weights: list[StoredWeight] = []
        self.n_stray = 0

    def activation(self, name: str) -> int:
        """Add an activation tensor of the graph."""
        tensor = self.graph.tensors[name]
        self.number[name] = self.scratch(name, stored_shape(tensor.shape), tensor)
        return self.number[name]

    def scratch(self, name: str, shape: Sequence[int], like: Tensor) -> int:
        """Add an activation with the type and scale of `like`."""
        name = "" if self.micro and name not in (*self.graph.inputs, *self.graph.outputs) else name
        return self.file.tensor(name, shape, "FLOAT32" if like.quant is None else "INT8", quant=like.quant)

    def constant(self, values: Array, *, quant: QuantParams | None = None) -> int:
        """Add a nameless constant: int32, int8 or float32."""
        return self.file.tensor("", values.shape, values.dtype.name.upper(), data=_little_endian(values), quant=quant)

    def source(self, node: Node) -> Tensor:
        """Look up the node's first input."""
        return self.graph.tensors[node.inputs[0]]

    def result(self, node: Node) -> Tensor:
        """Look up the node's output."""
        return self.graph.tensors[node.outputs[0]]

    def operator(self, op: str, node: Node, inputs: Sequence[int], options: str = "", **fields: object) -> None:
        """Add the operator that writes the node's output; in version 2 where its input is int8, which all such need."""
        version = 1 if self.source(node).quant is None else 2
        self.file.operator(op, version, inputs, [self.activation(node.outputs[0])], options, **fields)

    def probabilities(self, op: str, node: Node, options: str = "", **fields: object) -> None:
        """Add an operator whose codes the format fixes, and a change of scale behind it where the graph has another."""
        result, x = self.result(node), self.number[node.inputs[0]]
        if result.quant is None or (result.quant.scale, result.quant.zero_point) == (UNIT.scale, UNIT.zero_point):
            self.operator(op, node, [x], options, **fields)
            return
        fixed = self.scratch(f"{node.name}.share", stored_shape(result.shape), replace(result, quant=UNIT))
        self.file.operator(op, 2, [x], [fixed], options, **fields)
        self.file.operator("QUANTIZE", 2, [fixed], [self.activation(node.outputs[0])], "QuantizeOptions")

    def by_gate(self, node: Node) -> bool:
        """Tell whether a silu or hard_swish of codes is a product with a gate in codes."""
        source, result = self.source(node).quant, self.result(node).quant
        return source is not None and result is not None and gate_codes(node.op, source, result) is not None

    def halved(self, node: Node) -> list[int]:
        """Add x / 6 and the constant 1/2, whose sum, clamped, is the hard-sigmoid of the node's input.

        The product by 1/6 is exact: its codes are those of x, on a scale that is divided by 6.
        """
        source = self.source(node)
        assert source.quant is not None
        sixfold = replace(source.quant, scale=source.quant.scale / np.float32(6))
        inner = self.scratch(f"{node.name}.sixth", stored_shape(source.shape), replace(source, quant=sixfold))
        codes = np.full(1, ACT_MAX, dtype=np.int8)
        sixth, half = (
            self.constant(codes, quant=replace(SHARES, scale=np.array(value / ACT_MAX), zero_point=np.array(0)))
            for value in (1 / 6, 1 / 2)
        )
        self.file.operator("MUL", 2, [self.number[node.inputs[0]], sixth], [inner], "MulOptions")
        return [inner, half]

    def detour(self, node: Node, write: Callable[[_Writer, Node, int, int], None]) -> None:
        """Let `write` add a function on real numbers, from one tensor number to another, between codes."""
        shape = stored_shape(self.result(node).shape)
        real, found = (self.file.tensor(f"{node.name}.{part}", shape, "FLOAT32") for part in ("real", "found"))
        self.file.operator("DEQUANTIZE", 2, [self.number[node.inputs[0]]], [real], "DequantizeOptions")
        write(self, node, real, found)
        self.file.operator("QUANTIZE", 1, [found], [self.activation(node.outputs[0])], "QuantizeOptions")

    def reshape(self, number: int, output: int, shape: Sequence[int]) -> None:
        """Add a reshape; `shape` leaves the first axis out."""
        # -1: the batch is whatever is left, so that the input can be resized to many images.
        inputs = [number, self.constant(np.array([-1, *shape], dtype=np.int32))]
        self.file.operator("RESHAPE", 1, inputs, [output], "ReshapeOptions")

    def transpose(self, number: int, order: Sequence[int], output: int, like: Tensor, *, stray: int = 1) -> None:
        """Add a transpose; `stray` is 0 for one that is a channel shuffle."""
        self.n_stray += stray
        permutation = self.constant(np.asarray(order, dtype=np.int32))
        self.file.operator("TRANSPOSE", 1 if like.quant is None else 2, [number, permutation], [output])

    def padded(self, node: Node, kernel: Sequence[int]) -> tuple[int, int]:
        """Pad the input of a window operator, by an operator of its own where SAME and VALID do not say it.

        Returns:
            the number of the tensor to read, and the schema's Padding to read it with.

        Raises:
            ExportError: an average leaves out padding in a way that only SAME could express.
        """
        source, number, modes = self.source(node), self.number[node.inputs[0]], self.file.schema.Padding
        window = window_padding(source.shape, kernel, node)
        if not any(window.pads):
            return number, modes.VALID
        if window.same and not node.attrs.get("include_pad"):
            return number, modes.SAME
        if node.op is Op.AVG_POOL and not node.attrs["include_pad"]:
            raise ExportError(
                f"tflite: {node.name!r}: avg_pool leaves its padding {node.attrs['pads']} out of the mean, the format "
                "does so for SAME padding only; use count_include_pad=True or another padding"
            )
        top, left, bottom, right = window.pads
        n, c, h, w = source.shape
        output = self.scratch(f"{node.name}.pad", (n, top + h + bottom, left + w + right, c), source)
        margins = np.array([(0, 0), (top, bottom), (left, right), (0, 0)], dtype=np.int32)
        inputs, version = [number, self.constant(margins)], 1 if source.quant is None else 2
        # Where nothing is below zero, zeros cannot change a maximum: XNNPACK runs PAD, but not PADV2.
        if node.op is Op.MAX_POOL and not never_negative(self.graph, node.inputs[0]):
            value = np.array([np.finfo(np.float32).min], dtype=np.float32)
            value = value if source.quant is None else np.array([ACT_MIN], dtype=np.int8)
            inputs.append(self.constant(value, quant=source.quant))
            self.file.operator("PADV2", version, inputs, [output])
        else:
            # Pads with the zero point, which is a real zero.
            self.file.operator("PAD", version, inputs, [output])
        return output, modes.VALID

    def clamp(self, node: Node, number: int, output: int) -> None:
        """Clamp to limits that no activation of TFLite has, by a minimum and a maximum."""
        like = self.result(node)
        limits = np.array([limits_of(node, like)]).T.astype(np.float32 if like.quant is None else np.int8)
        low, high = (self.constant(limit, quant=like.quant) for limit in limits)
        middle = self.scratch(f"{node.name}.low", stored_shape(like.shape), like)
        version = 1 if like.quant is None else 2
        self.file.operator("MAXIMUM", version, [number, low], [middle], "MaximumMinimumOptions")
        self.file.operator("MINIMUM", version, [middle, high], [output], "MaximumMinimumOptions")

    def stored_bits(self, node: Node) -> int:
        """Give the bits that a code of the layer's weight has when the interpreter reads it: 32 for float."""
        weight = self.graph.weight(node)
        if weight.quant is None:
            return 32
        return field_bits("tflite", node, weight.quant.bits) if self.form == "tflite" else 8

    def layer(self, node: Node, values: Array, *, axis: int) -> list[int]:
        """Add weight and bias of a layer, as late as possible: TFLite Micro decodes the weight for the next operator.

        Args:
            node: the layer.
            values: its weight in the file's layout.
            axis: of the output channels in it.

        Returns:
            tensor numbers.
        """
        weight = self.graph.weight(node)
        if weight.quant is None:
            data = _little_endian(values)
            number = self.file.tensor(weight.name, values.shape, "FLOAT32", data=data)
            stored = StoredWeight(layer=node.name, bits=32, stored_bits=32, stored_bytes=len(data))
        else:
            store = STORING[self.form]
            number, stored = store(self.file, node, weight, values, axis, self.stored_bits(node))
        self.weights.append(stored)
        return [number, self._bias(node)]

    def _bias(self, node: Node) -> int:
        """Add a layer's bias: of zeros where it has none, as the kernels of convolutions insist on one."""
        bias, weight, x = self.graph.bias(node), self.graph.weight(node), self.source(node)
        name, shape = f"{node.name}.bias", (weight.shape[0],)
        if bias is None and weight.quant is None:
            bias = Tensor(name=name, shape=shape, data=np.zeros(shape, dtype=np.float32))
        elif bias is None:
            assert weight.quant is not None
            assert x.quant is not None
            scale = bias_scale(x.quant.scale, weight.quant.scale)
            quant = replace(weight.quant, bits=32, scale=scale)
            bias = Tensor(name=name, shape=shape, data=np.zeros(shape, dtype=np.int32), quant=quant)
        assert bias.data is not None
        name, kind = "" if self.micro else name, bias.data.dtype.name.upper()
        return self.file.tensor(name, shape, kind, data=_little_endian(bias.data), quant=bias.quant)

    def activated(
        self, op: str, version: int, node: Node, inputs: Sequence[int], options: str, **fields: object
    ) -> None:
        """Add an operator with a fused activation, and what it cannot fuse behind it."""
        activation = fused_activation(node, self.result(node))
        output = self.activation(node.outputs[0])
        target = output
        if activation is None:
            like = self.result(node)
            target = self.scratch(f"{node.name}.all", stored_shape(like.shape), like)
        function = getattr(self.file.schema.ActivationFunctionType, activation or "NONE")
        self.file.operator(op, version, inputs, [target], options, fusedActivationFunction=function, **fields)
        if activation is None:
            self.clamp(node, target, output)


def _little_endian(values: Array) -> bytes:
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


# ---- one handler an operator -----------------------------------------------------------------------------------------


def _conv2d(writer: _Writer, node: Node) -> None:
    weight, source = writer.graph.weight(node), writer.source(node)
    assert weight.data is not None
    groups = int(node.attrs["groups"])  # type: ignore[arg-type]
    (sh, sw), (dh, dw) = ints(node.attrs, "stride"), ints(node.attrs, "dilation")
    x, padding = writer.padded(node, weight.shape[2:])
    fields = {"padding": padding, "strideH": sh, "strideW": sw, "dilationHFactor": dh, "dilationWFactor": dw}
    if groups != 1 and groups == source.shape[1]:
        # O1HW -> 1HWO: output channel k*m+j belongs to input channel k in both worlds.
        inputs = [x, *writer.layer(node, weight.data.transpose(1, 2, 3, 0), axis=3)]
        fields["depthMultiplier"] = weight.shape[0] // groups
        version = 3 if weight.quant is not None else 2 if (dh, dw) != (1, 1) else 1
        writer.activated("DEPTHWISE_CONV_2D", version, node, inputs, "DepthwiseConv2DOptions", **fields)
        return
    width = writer.stored_bits(node)
    if width < 8 and weight.shape[2:] == (1, 1) == (sh, sw) and groups == 1 and not any(ints(node.attrs, "pads")):
        # XNNPACK reads packed weights in FULLY_CONNECTED only; a 1x1 convolution is one, at every pixel.
        _fully_connected(writer, node, weight.data.reshape(weight.shape[:2]))
        return
    inputs = [x, *writer.layer(node, weight.data.transpose(0, 2, 3, 1), axis=0)]
    version = 6 if groups != 1 else {32: 1, 8: 3, 4: 7}[width]
    writer.activated("CONV_2D", version, node, inputs, "Conv2DOptions", **fields)


def _linear(writer: _Writer, node: Node) -> None:
    weight, order = writer.graph.weight(node).data, writer.orders.get(node.inputs[0])
    assert weight is not None
    _fully_connected(writer, node, weight if order is None else weight[:, order])


def _fully_connected(writer: _Writer, node: Node, values: Array) -> None:
    """Multiply the last axis of the input by values (O, I)."""
    inputs = [writer.number[node.inputs[0]], *writer.layer(node, values, axis=0)]
    version = {32: 1, 8: 4, 4: 10, 2: 14}[writer.stored_bits(node)]
    keep = len(writer.source(node).shape) > 2
    writer.activated("FULLY_CONNECTED", version, node, inputs, "FullyConnectedOptions", keepNumDims=keep)


def _add(writer: _Writer, node: Node) -> None:
    version = 1 if writer.result(node).quant is None else 2
    writer.activated("ADD", version, node, [writer.number[name] for name in node.inputs], "AddOptions")


def _mul(writer: _Writer, node: Node) -> None:
    version = 1 if writer.result(node).quant is None else 2
    writer.activated("MUL", version, node, [writer.number[name] for name in node.inputs], "MulOptions")


def _logistic(writer: _Writer, node: Node) -> None:
    writer.probabilities("LOGISTIC", node)


def _silu(writer: _Writer, node: Node) -> None:
    """Write x * sigmoid(x): the format has no operator for it."""
    x, source = writer.number[node.inputs[0]], writer.source(node)
    if source.quant is not None and not writer.by_gate(node):
        writer.detour(node, _silu_of_reals)
        return
    like = source if source.quant is None else replace(source, quant=UNIT)
    gate = writer.scratch(f"{node.name}.gate", stored_shape(source.shape), like)
    version = 1 if source.quant is None else 2
    writer.file.operator("LOGISTIC", version, [x], [gate])
    writer.operator("MUL", node, [x, gate], "MulOptions")


def _silu_of_reals(writer: _Writer, node: Node, x: int, output: int) -> None:
    gate = writer.file.tensor(f"{node.name}.gate", stored_shape(writer.result(node).shape), "FLOAT32")
    writer.file.operator("LOGISTIC", 1, [x], [gate])
    writer.file.operator("MUL", 1, [x, gate], [output], "MulOptions")


def _hard_swish(writer: _Writer, node: Node) -> None:
    """Write the operator on real numbers, but as a product with a hard-sigmoid on codes.

    XNNPACK does not take the operator on codes, and the built-in kernel is many times slower than three that it takes.
    """
    source = writer.source(node)
    if source.quant is None:
        writer.operator("HARD_SWISH", node, [writer.number[node.inputs[0]]])
    elif not writer.by_gate(node):
        writer.detour(node, lambda w, _, x, y: w.file.operator("HARD_SWISH", 1, [x], [y]))
    else:
        gate = writer.scratch(f"{node.name}.gate", stored_shape(source.shape), replace(source, quant=SHARES))
        writer.file.operator("ADD", 2, writer.halved(node), [gate], "AddOptions")
        writer.operator("MUL", node, [writer.number[node.inputs[0]], gate], "MulOptions")


def _hard_sigmoid(writer: _Writer, node: Node) -> None:
    """Write relu6(x + 3) / 6: the format has no operator for it."""
    source, result = writer.source(node), writer.result(node)
    if source.quant is not None:
        assert result.quant is not None
        limits = tuple(int(quantize(np.array(limit), result.quant)) for limit in (0.0, 1.0))
        clamped = replace(node, attrs={"clamp": limits})
        writer.activated("ADD", 2, clamped, writer.halved(node), "AddOptions")
        return
    three, sixth = (writer.constant(np.full(1, v, dtype=np.float32)) for v in (3, 1 / 6))
    inner = writer.scratch(f"{node.name}.relu6", stored_shape(source.shape), source)
    function = writer.file.schema.ActivationFunctionType.RELU6
    inputs = [writer.number[node.inputs[0]], three]
    writer.file.operator("ADD", 1, inputs, [inner], "AddOptions", fusedActivationFunction=function)
    writer.operator("MUL", node, [inner, sixth], "MulOptions")


def _pool(writer: _Writer, node: Node) -> None:
    kernel, (sh, sw) = ints(node.attrs, "kernel"), ints(node.attrs, "stride")
    op = "MAX_POOL_2D" if node.op is Op.MAX_POOL else "AVERAGE_POOL_2D"
    if node.op is Op.MAX_POOL and ints(node.attrs, "dilation") != (1, 1):
        raise ExportError(f"tflite: {node.name!r}: max_pool has dilation, the format has none; remove it")
    x, padding = writer.padded(node, kernel)
    fields = {"padding": padding, "strideH": sh, "strideW": sw, "filterHeight": kernel[0], "filterWidth": kernel[1]}
    writer.operator(op, node, [x], "Pool2DOptions", **fields)


def _global_avg_pool(writer: _Writer, node: Node) -> None:
    axes = writer.constant(np.array([1, 2], dtype=np.int32))
    writer.operator("MEAN", node, [writer.number[node.inputs[0]], axes], "ReducerOptions", keepDims=True)


def _clip(writer: _Writer, node: Node) -> None:
    activation = fused_activation(node, writer.result(node))
    x = writer.number[node.inputs[0]]
    if activation in ("RELU", "RELU6"):
        writer.operator(activation, node, [x])
    else:
        writer.clamp(node, x, writer.activation(node.outputs[0]))


def _reshape(writer: _Writer, node: Node) -> None:
    """Reshape in the graph's order of elements, by transposes around it where an image's differs."""
    source, result = writer.source(node), writer.result(node)
    x = writer.number[node.inputs[0]]
    if moves_data(source.shape) and node.outputs[0] not in writer.orders:
        nchw = writer.scratch(f"{node.name}.nchw", source.shape, source)
        writer.transpose(x, TO_NCHW, nchw, source)
        x = nchw
    y = writer.activation(node.outputs[0])
    turned = moves_data(result.shape)
    target = writer.scratch(f"{node.name}.out", result.shape, result) if turned else y
    shape = result.shape if turned else stored_shape(result.shape)
    writer.reshape(x, target, shape[1:])
    if turned:
        writer.transpose(target, TO_NHWC, y, result)


def _softmax(writer: _Writer, node: Node) -> None:
    rank = len(writer.result(node).shape)
    axis = int(node.attrs["axis"])  # type: ignore[arg-type]
    if stored_axis(axis, rank) != rank - 1:
        raise ExportError(f"tflite: {node.name!r}: softmax over axis {axis}, the format has channels only (images: 1)")
    writer.probabilities("SOFTMAX", node, "SoftmaxOptions", beta=1.0)


def _quantize(writer: _Writer, node: Node) -> None:
    writer.operator("QUANTIZE", node, [writer.number[node.inputs[0]]], "QuantizeOptions")


def _dequantize(writer: _Writer, node: Node) -> None:
    writer.operator("DEQUANTIZE", node, [writer.number[node.inputs[0]]], "DequantizeOptions")


_HANDLERS: Mapping[Op, Callable[[_Writer, Node], None]] = {
    Op.CONV2D: _conv2d,
    Op.LINEAR: _linear,
    Op.ADD: _add,
    Op.MUL: _mul,
    Op.SIGMOID: _logistic,
    Op.HARD_SIGMOID: _hard_sigmoid,
    Op.SILU: _silu,
    Op.HARD_SWISH: _hard_swish,
    Op.CONCAT: write_concat,
    Op.GATHER: write_gather,
    Op.MAX_POOL: _pool,
    Op.AVG_POOL: _pool,
    Op.GLOBAL_AVG_POOL: _global_avg_pool,
    Op.CLIP: _clip,
    Op.FLATTEN: _reshape,
    Op.RESHAPE: _reshape,
    Op.SOFTMAX: _softmax,
    Op.QUANTIZE: _quantize,
    Op.DEQUANTIZE: _dequantize,
}
