"""Graph and plan in, quantized graph out. Pure, without data, deterministic: the same two values give the same bytes.

The passes run in the order of `compress`; each takes a graph and gives a new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from edgecomp import quantmath, reference
from edgecomp.errors import GraphError, PlanError
from edgecomp.graph import Array, Attribute, Graph, Node, Op, QuantParams
from edgecomp.groups import is_depthwise, kept_numbers, number_channels
from edgecomp.ops import OPS, PROBABILITIES, ints
from edgecomp.plan import CompressionPlan, Io, validate
from edgecomp.quantmath import Grid
from edgecomp.scales import activation_params
from edgecomp.verify import verify_float, verify_quantized

_CLAMPING = frozenset({Op.CONV2D, Op.LINEAR, Op.ADD, Op.MUL})


def compress(graph: Graph, plan: CompressionPlan) -> Graph:
    """Cut channels, round weights, and annotate activations as the plan says.

    Args:
        graph: float, the one the plan was made for.
        plan: the decisions.

    Returns:
        the quantized graph (see `verify.verify_quantized` for what that means).

    Raises:
        PlanError: the plan belongs to another graph or cuts what cannot be cut.
    """
    validate(plan, graph)
    try:
        smaller = cut(graph, {name: layer.keep for name, layer in plan.layers.items()})
    except GraphError as e:
        raise PlanError(f"plan: {e}") from e
    fused = fuse_clips(smaller)
    activations = activation_params(fused, plan.ranges)
    quantized = quantize_layers(fused, activations, {name: layer.weight_bits for name, layer in plan.layers.items()})
    bordered = insert_borders(quantized, plan.io)
    verify_quantized(bordered)
    return bordered


def cut(graph: Graph, keep: Mapping[str, tuple[bool, ...]]) -> Graph:
    """Remove output channels, and what reads them, physically.

    Args:
        graph: float.
        keep: layer name -> a flag for each output channel.

    Raises:
        GraphError: coupled channels are treated differently, or one that cannot be cut is.
    """
    if all(all(flags) for flags in keep.values()):
        return graph
    channels = number_channels(graph)
    kept = kept_numbers(graph, channels, keep)
    tensors = dict(graph.tensors)
    nodes = []
    for original in graph.nodes:
        node = original
        if node.op in (Op.CONV2D, Op.LINEAR):
            rows = kept[channels.of[node.outputs[0]]]
            columns = kept[channels.of[node.inputs[0]]]
            weight = graph.weight(node)
            assert weight.data is not None
            data = weight.data[rows]
            if is_depthwise(graph, node):
                node = replace(node, attrs={**node.attrs, "groups": int(columns.sum())})
            elif node.attrs.get("groups", 1) == 1:
                data = data[:, columns]
            tensors[weight.name] = replace(weight, data=data, shape=data.shape)
            bias = graph.bias(node)
            if bias is not None:
                assert bias.data is not None
                tensors[bias.name] = replace(bias, data=bias.data[rows], shape=(int(rows.sum()),))
        if node.op is Op.RESHAPE and not kept[channels.of[node.outputs[0]]].all():
            n, _, *rest = ints(node.attrs, "shape")
            node = replace(node, attrs={"shape": (n, int(kept[channels.of[node.outputs[0]]].sum()), *rest)})
        if node.op is Op.GATHER:
            there = kept[channels.of[node.inputs[0]]]
            place = np.cumsum(there) - 1
            indices = tuple(int(place[i]) for i in ints(node.attrs, "indices") if there[i])
            node = replace(node, attrs={"indices": indices})
        nodes.append(node)
        shape = OPS[node.op].shape([tensors[name].shape for name in node.inputs], node.attrs)
        tensors[node.outputs[0]] = replace(tensors[node.outputs[0]], shape=shape)
    smaller = replace(graph, nodes=tuple(nodes), tensors=tensors)
    verify_float(smaller)
    return smaller


def fuse_clips(graph: Graph) -> Graph:
    """Let a conv2d, linear, add or mul write the tensor of the clip behind it, when nobody else reads its own.

    What the clip limited becomes the node's clamp later, in codes: the attributes low and high travel with the node.
    """
    consumers, producer = graph.consumers(), graph.producer()
    gone: set[str] = set()
    fused: dict[str, Node] = {}
    for node in graph.nodes:
        if node.op is not Op.CLIP:
            continue
        source = producer.get(node.inputs[0])
        if source is None or source.op not in _CLAMPING or len(consumers[node.inputs[0]]) != 1:
            continue
        if node.inputs[0] in graph.outputs:
            continue
        gone.add(node.name)
        fused[source.name] = replace(
            source, outputs=node.outputs, attrs={**source.attrs, "low": node.attrs["low"], "high": node.attrs["high"]}
        )
    nodes = tuple(fused.get(node.name, node) for node in graph.nodes if node.name not in gone)
    written = {name for node in nodes for name in node.outputs}
    tensors = {
        name: t for name, t in graph.tensors.items() if t.data is not None or name in written or name in graph.inputs
    }
    return replace(graph, nodes=nodes, tensors=tensors)


def quantize_layers(graph: Graph, activations: Mapping[str, QuantParams], weight_bits: Mapping[str, int]) -> Graph:
    """Round weights and biases to codes, give activations their parameters, turn limits into clamps.

    Args:
        graph: after `fuse_clips`.
        activations: parameters of every activation.
        weight_bits: by layer name.
    """
    tensors = {
        name: replace(tensor, quant=activations[name]) if tensor.data is None else tensor
        for name, tensor in graph.tensors.items()
    }
    nodes = []
    for node in graph.nodes:
        if node.op in (Op.CONV2D, Op.LINEAR):
            bits = weight_bits[node.name]
            weight, bias = graph.weight(node), graph.bias(node)
            assert weight.data is not None
            scale = quantmath.choose_weight_scale(weight.data, bits)
            input_scale = activations[node.inputs[0]].scale
            if bias is not None:
                assert bias.data is not None
                scale = quantmath.widen_for_bias(scale, bias.data, input_scale)
            codes = quantmath.quantize_weight(weight.data, scale, bits)
            tensors[weight.name] = replace(weight, data=codes, quant=_symmetric(bits, scale))
            if bias is not None:
                assert bias.data is not None
                tensors[bias.name] = replace(
                    bias,
                    data=quantmath.quantize_bias(bias.data, input_scale, scale),
                    quant=_symmetric(32, quantmath.bias_scale(input_scale, scale)),
                )
        nodes.append(replace(node, attrs=_integer_attributes(node, activations[node.outputs[0]])))
    return replace(graph, nodes=tuple(nodes), tensors=tensors)


def _integer_attributes(node: Node, output: QuantParams) -> dict[str, Attribute]:
    attrs = dict(node.attrs)
    if node.op not in _CLAMPING and node.op is not Op.CLIP:
        return attrs
    limits = (attrs["low"], attrs["high"]) if "low" in attrs else (-np.inf, np.inf)
    if node.op is not Op.CLIP:
        attrs.pop("low", None)
        attrs.pop("high", None)
    low, high = (float(limit) for limit in limits)  # type: ignore[arg-type]
    attrs["clamp"] = (_limit_code(low, output), _limit_code(high, output))
    return attrs


def _limit_code(limit: float, params: QuantParams) -> int:
    if np.isinf(limit):
        return quantmath.ACT_MIN if limit < 0 else quantmath.ACT_MAX
    return int(quantmath.quantize(np.array(limit), params))


def _symmetric(bits: int, scale: Array) -> QuantParams:
    return QuantParams(bits=bits, scale=scale, zero_point=np.zeros(scale.shape, dtype=np.int32), axis=0)


def on_grids(graph: Graph, grids: Mapping[str, Grid]) -> Graph:
    """Round weights to the nearest point of their grid where it has a step; `compress` finds the same codes again.

    Args:
        graph: float.
        grids: of every layer; one without a step leaves the weights as they are.
    """
    tensors = dict(graph.tensors)
    for node in graph.layers():
        weight, grid = graph.weight(node), grids[node.name]
        if grid.step is not None:
            assert weight.data is not None
            scale = quantmath.grid_scale(weight.data, grid)
            codes = quantmath.quantize_weight(weight.data, scale, grid.bits)
            data = codes * scale.reshape(-1, *[1] * (codes.ndim - 1))
            tensors[weight.name] = replace(weight, data=data.astype(np.float32))
    return replace(graph, tensors=tensors)


def narrowest_bits(graph: Graph, name: str, grid: Grid) -> int:
    """Give the width that the codes of a layer on a grid need, which may be less than the grid's.

    Args:
        graph: float, its weights on their grids.
        name: the layer.
        grid: of the layer.
    """
    if grid.step is None:
        return grid.bits
    weight = next(graph.weight(node).data for node in graph.layers() if node.name == name)
    assert weight is not None
    codes = quantmath.quantize_weight(weight, quantmath.choose_weight_scale(weight, grid.bits), grid.bits)
    largest = int(np.abs(codes).max(initial=0))
    return next(bits for bits in quantmath.WEIGHT_BITS if quantmath.weight_limit(bits) >= largest)


def insert_borders(graph: Graph, io: Io) -> Graph:
    """Put quantize and dequantize at the ends for float input and output; leave an int8 model as it is.

    A softmax or sigmoid that ends the model then works on real numbers: 1/256 is too coarse to tell unlikely classes
    apart.
    """
    if io is Io.INT8:
        return graph
    tensors, nodes = dict(graph.tensors), list(graph.nodes)
    producer, consumers = graph.producer(), graph.consumers()
    for name in graph.inputs:
        codes = f"{name}.quantized"
        tensors[codes] = replace(tensors[name], name=codes)
        tensors[name] = replace(tensors[name], quant=None)
        nodes = [replace(n, inputs=tuple(codes if i == name else i for i in n.inputs)) for n in nodes]
        nodes.insert(0, Node(name=codes, op=Op.QUANTIZE, inputs=(name,), outputs=(codes,)))
    outputs = []
    for name in graph.outputs:
        last = producer.get(name)
        if last is not None and last.op in PROBABILITIES and not consumers[name]:
            place = next(i for i, n in enumerate(nodes) if n.name == last.name)
            source, real = nodes[place].inputs[0], f"{name}.logits"
            tensors[real] = replace(tensors[source], name=real, quant=None)
            tensors[name] = replace(tensors[name], quant=None)
            nodes[place] = replace(nodes[place], inputs=(real,))
            nodes.insert(place, Node(name=real, op=Op.DEQUANTIZE, inputs=(source,), outputs=(real,)))
            outputs.append(name)
        else:
            real = f"{name}.dequantized"
            tensors[real] = replace(tensors[name], name=real, quant=None)
            nodes.append(Node(name=real, op=Op.DEQUANTIZE, inputs=(name,), outputs=(real,)))
            outputs.append(real)
    return replace(graph, nodes=tuple(nodes), tensors=tensors, outputs=tuple(outputs))


def border_codes(graph: Graph) -> tuple[str, str]:
    """Name the first and the last tensor of codes of a quantized graph with one input and one output.

    They are input and output themselves where these are integers; else what lies behind the quantize and before the
    dequantize at the borders, and before a softmax on real numbers.
    """
    first, last = graph.inputs[0], graph.outputs[0]
    producer = graph.producer()
    for node in graph.nodes:
        if node.op is Op.QUANTIZE and node.inputs[0] == first:
            first = node.outputs[0]
    while graph.tensors[last].quant is None:
        last = producer[last].inputs[0]
    return first, last


def run_codes(graph: Graph, codes: Array) -> Array:
    """Compute what a quantized graph makes of codes, without what stands on real numbers around them.

    Args:
        graph: with one input and one output.
        codes: int8 (N, C, H, W) or (N, F), at the first of `border_codes`.

    Returns:
        int8, at the last of them.
    """
    first, last = border_codes(graph)
    nodes = tuple(node for node in graph.nodes if first not in node.outputs)
    result: Array = reference.run(replace(graph, nodes=nodes, inputs=(first,)), {first: codes})[last]
    return result
