"""What a legal graph is, for each stage. Exporters rely on `verify_quantized` and need no checks of their own."""

from __future__ import annotations

import numpy as np

from edgecomp import quantmath
from edgecomp.errors import GraphError
from edgecomp.graph import Graph, Node, Op
from edgecomp.ops import OPS, PROBABILITIES, SHARES_SCALE, clamp_codes


def verify_float(graph: Graph) -> None:
    """Check a captured graph: structure, shapes, float32 weights, nothing quantized.

    Raises:
        GraphError: naming node or tensor, what was found and what was expected.
    """
    _verify_structure(graph)
    for tensor in graph.tensors.values():
        if tensor.quant is not None:
            raise GraphError(f"tensor {tensor.name!r}: is quantized, expected a float graph")
        if tensor.data is not None and tensor.data.dtype != np.float32:
            raise GraphError(f"tensor {tensor.name!r}: is {tensor.data.dtype}, expected float32")
        if tensor.data is not None and not np.isfinite(tensor.data).all():
            raise GraphError(f"tensor {tensor.name!r}: holds NaN or infinity, expected finite weights")
    for node in graph.nodes:
        if node.op in (Op.QUANTIZE, Op.DEQUANTIZE) or "clamp" in node.attrs:
            raise GraphError(f"node {node.name!r}: belongs to a quantized graph, expected a float graph")


def verify_quantized(graph: Graph) -> None:
    """Check what every exporter may rely on.

    Float tensors occur only at the borders; weights are int8 codes within their bits with one positive scale a channel;
    biases are int32 with scale input x weight; operators that only move codes share scale and zero point; every
    conv2d, linear, add, mul and clip has a clamp.

    Raises:
        GraphError: naming node or tensor, what was found and what was expected.
    """
    _verify_structure(graph)
    for tensor in graph.tensors.values():
        q = tensor.quant
        if q is None:
            if tensor.data is not None:
                raise GraphError(f"tensor {tensor.name!r}: float weights, expected codes")
            continue
        if not (np.isfinite(q.scale).all() and (q.scale > 0).all()):
            raise GraphError(f"tensor {tensor.name!r}: scales must be positive and finite")
        if tensor.data is None and (q.bits != 8 or q.scale.shape != () or q.zero_point.shape != ()):
            raise GraphError(f"tensor {tensor.name!r}: expected 8 bits, one scale and one zero point for an activation")
        if tensor.data is None and not quantmath.ACT_MIN <= int(q.zero_point) <= quantmath.ACT_MAX:
            raise GraphError(f"tensor {tensor.name!r}: zero point {int(q.zero_point)}, expected within -128..127")
    for node in graph.nodes:
        _verify_quantized_node(graph, node)


def _verify_quantized_node(graph: Graph, node: Node) -> None:
    quants = [graph.tensors[name].quant for name in (*node.inputs, *node.outputs)]
    if node.op is Op.QUANTIZE or node.op is Op.DEQUANTIZE:
        coded = 1 if node.op is Op.QUANTIZE else 0
        if quants[coded] is None or quants[1 - coded] is not None:
            raise GraphError(f"node {node.name!r}: {node.op} must stand between a float and an integer tensor")
        return
    if node.op in PROBABILITIES and quants[0] is None and quants[1] is None:
        return
    if any(q is None for q in quants):
        raise GraphError(f"node {node.name!r}: {node.op} reads or writes a float tensor inside the quantized part")
    if node.op in (Op.CONV2D, Op.LINEAR, Op.ADD, Op.MUL, Op.CLIP):
        if "clamp" not in node.attrs:
            raise GraphError(f"node {node.name!r}: attribute 'clamp' is missing")
        low, high = clamp_codes(node)
        if not quantmath.ACT_MIN <= low <= high <= quantmath.ACT_MAX:
            raise GraphError(f"node {node.name!r}: clamp {low}..{high}, expected within -128..127")
    if node.op in SHARES_SCALE:
        pairs = {(float(q.scale), int(q.zero_point)) for q in quants if q is not None}
        if len(pairs) != 1:
            raise GraphError(f"node {node.name!r}: {node.op} must have one scale and zero point on all sides")
    if node.op in (Op.CONV2D, Op.LINEAR):
        _verify_layer(graph, node)


def _verify_layer(graph: Graph, node: Node) -> None:
    weight, bias = graph.weight(node), graph.bias(node)
    q, x = weight.quant, graph.tensors[node.inputs[0]].quant
    assert q is not None
    assert x is not None
    if weight.data is None or weight.data.dtype != np.int8 or q.bits not in quantmath.WEIGHT_BITS:
        raise GraphError(f"layer {node.name!r}: expected int8-held weight codes of 2-8 bits")
    limit = quantmath.weight_limit(q.bits)
    if weight.data.size and max(int(weight.data.max()), -int(weight.data.min())) > limit:
        raise GraphError(f"layer {node.name!r}: a weight code is beyond ±{limit}, the range of {q.bits} bits")
    if q.scale.shape != (weight.shape[0],) or q.axis != 0 or q.zero_point.any():
        raise GraphError(f"layer {node.name!r}: expected one scale an output channel and no zero point")
    if bias is not None:
        expected = quantmath.bias_scale(x.scale, q.scale)
        if bias.quant is None or bias.data is None or bias.data.dtype != np.int32:
            raise GraphError(f"layer {node.name!r}: expected an int32 bias")
        if not np.array_equal(bias.quant.scale, expected):
            raise GraphError(f"layer {node.name!r}: bias scale differs from input scale x weight scale")


_LEAST = {"kernel": 1, "stride": 1, "dilation": 1, "groups": 1, "pads": 0, "include_pad": 0, "indices": 0}


def _verify_attributes(node: Node) -> None:
    for key, value in node.attrs.items():
        if key in ("low", "high"):
            if not isinstance(value, float) or np.isnan(value):
                raise GraphError(f"node {node.name!r}: {key} is {value!r:.40}, expected a float")
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        least = _LEAST.get(key, -128)
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in numbers):
            raise GraphError(f"node {node.name!r}: {key} is {value!r:.60}, expected whole numbers from {least} up")


def _verify_structure(graph: Graph) -> None:
    known = set(graph.inputs) | {name for name, tensor in graph.tensors.items() if tensor.data is not None}
    names: set[str] = set()
    for name, tensor in graph.tensors.items():
        if tensor.name != name:
            raise GraphError(f"tensor {tensor.name!r}: is filed under the name {name!r}")
    for name in (*graph.inputs, *graph.outputs):
        if name not in graph.tensors:
            raise GraphError(f"graph: input or output {name!r} is not a tensor")
    if not graph.inputs or not graph.outputs:
        raise GraphError("graph: expected at least one input and one output")
    for node in graph.nodes:
        row = OPS[node.op]
        if node.name in names:
            raise GraphError(f"node {node.name!r}: the name stands twice")
        names.add(node.name)
        if not row.arity[0] <= len(node.inputs) <= row.arity[1] or len(node.outputs) != 1:
            raise GraphError(f"node {node.name!r}: {node.op} takes {row.arity} inputs and gives 1 output")
        allowed = {*row.attributes, *row.optional}
        if set(row.attributes) - node.attrs.keys() or node.attrs.keys() - allowed:
            raise GraphError(f"node {node.name!r}: attributes {sorted(node.attrs)}, expected {sorted(row.attributes)}")
        _verify_attributes(node)
        for name in node.inputs:
            if name not in known:
                raise GraphError(f"node {node.name!r}: reads {name!r}, which nothing before it writes")
        if node.outputs[0] not in graph.tensors or node.outputs[0] in known:
            raise GraphError(f"node {node.name!r}: writes {node.outputs[0]!r}, which is unknown or written already")
        known.add(node.outputs[0])
        try:
            shape = row.shape([graph.tensors[name].shape for name in node.inputs], node.attrs)
        except GraphError as e:
            raise GraphError(f"node {node.name!r}: {e}") from e
        if shape != graph.tensors[node.outputs[0]].shape:
            raise GraphError(
                f"node {node.name!r}: gives shape {shape}, its tensor says {graph.tensors[node.outputs[0]].shape}"
            )
    unwritten = graph.tensors.keys() - known
    if unwritten:
        raise GraphError(f"graph: nothing writes tensor {sorted(unwritten)[0]!r}")
