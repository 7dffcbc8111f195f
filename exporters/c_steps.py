"""A quantized graph as calls of the C kernels: which, on what constants, and which memory each reads and writes.

Images are H x W x C. What only renames (reshapes that move nothing, the borders to real numbers) makes no call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgecomp.curves import FUNCTIONS, curve_codes
from edgecomp.errors import ExportError
from edgecomp.graph import Array, Graph, Node, Op, QuantParams, Tensor
from edgecomp.ops import clamp_codes, ints
from edgecomp.quantmath import ACT_MAX, ACT_MIN, add_multipliers, multiplier

from .c_weights import FOUR_BYTES, LINEAR_RUN, PATCH_FOURS, CodeStream, channel_fours, code_stream, filter_fours
from .layout import TO_NHWC, feature_orders, moves_data, stored_axis, stored_shape

_MOST = (1 << 16) - 1
_NARROW_SHIFTS = (33, 54)
_MOST_LIFT = 8
"""Weights of 8 bits, multiplied by 2 to this power, are numbers of 16 bits."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Constant:
    """A constant of a step: an array of numbers, or a structure that may point at arrays.

    Attributes:
        name: unique in the file.
        type: in C, e.g. "int32_t" or "edgecomp_conv".
        values: numbers of an array; or the text of a structure's initializer.
    """

    name: str
    type: str
    values: Array | str

    @property
    def n_bytes(self) -> int:
        """Count the bytes of an array."""
        return 0 if isinstance(self.values, str) else self.values.nbytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """A call of a kernel.

    Attributes:
        name: of the node, or the nodes.
        kernel: the function.
        arguments: in C, with {x}, {y}, ... where pointers to tensors or {scratch} belong.
        pointers: tensor name by the name of the pointer.
        output: the tensor that is written, {y}.
        may_overwrite: tensors whose memory the output may have if nobody needs them afterwards.
        scratch_bytes: for the time of the call, at least; where the kernel is told, {scratch_bytes} in `arguments`.
        more_scratch: numbers of bytes, ascending, with each of which it does better.
        constants: in order.
        layer: the node whose weights these are, or none.
        weights: of a layer.
        macs: multiplications.
    """

    name: str
    kernel: str
    arguments: str
    pointers: Mapping[str, str]
    output: str
    may_overwrite: tuple[str, ...] = ()
    scratch_bytes: int = 0
    more_scratch: Sequence[int] = ()
    constants: tuple[Constant, ...] = ()
    layer: str = ""
    weights: CodeStream | None = None
    macs: int = 0


@dataclass
class Lowering:
    """A graph on its way to steps.

    Attributes:
        graph: quantized.
        steps: so far.
        same: the tensor whose memory a tensor's name stands for, where it is not its own.
        orders: see `layout.feature_orders`.
        fused: sums that are part of a convolution's step, by the name of the convolution's output.
        left_out: what the caller has to do on real numbers, e.g. "softmax".
        packed: whether weights take as few bytes as they can; else a byte each.
    """

    graph: Graph
    steps: list[Step] = field(default_factory=list)
    same: dict[str, str] = field(default_factory=dict)
    orders: dict[str, Array] = field(default_factory=dict)
    fused: dict[str, Node] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    packed: bool = True

    def memory_of(self, name: str) -> str:
        """Give the tensor whose memory holds what `name` says."""
        while name in self.same:
            name = self.same[name]
        return name

    def add(self, node: Node, kernel: str, arguments: str, **more: object) -> None:
        """Append a step that reads the node's inputs as {a}, {b} and writes its output as {y}."""
        pointers = {key: self.memory_of(name) for key, name in zip("ab", node.inputs, strict=False)}
        output = node.outputs[0]
        given = {"pointers": {**pointers, "y": output}, "output": output, "name": node.name, **more}
        self.steps.append(Step(kernel=kernel, arguments=arguments, **given))  # type: ignore[arg-type]

    def label(self) -> str:
        """Begin the name of a constant of the next step."""
        return f"step{len(self.steps)}"


def lower(graph: Graph, *, packed: bool = True) -> Lowering:
    """Turn a quantized graph into steps.

    Args:
        graph: as `verify_quantized` defines it.
        packed: store weights in as few bytes as they can be; else in a byte each.

    Raises:
        ExportError: the kernels cannot do a node, or the graph has several inputs or outputs.
    """
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise ExportError(
            f"c: the network has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs, expected one of each"
        )
    work = Lowering(graph, orders=feature_orders(graph), fused=_fused_sums(graph), packed=packed)
    for node in graph.nodes:
        if node.op is not Op.QUANTIZE and graph.tensors[node.inputs[0]].quant is None:
            work.left_out.append(node.op.value)
            work.same[node.outputs[0]] = node.inputs[0]
        elif node.op in _HANDLERS:
            _HANDLERS[node.op](work, node)
        else:
            raise ExportError(
                f"c: {node.name!r}: {node.op} on codes is not among the kernels; build with --io float, "
                "which leaves it to the caller"
            )
    if work.memory_of(graph.outputs[0]) == work.memory_of(graph.inputs[0]):
        raise ExportError("c: the network computes nothing between its input and its output")
    return work


def _fused_sums(graph: Graph) -> dict[str, Node]:
    """Find the sums that a convolution can add to what it writes: the last to be computed of what they add."""
    place = {name: i for i, node in enumerate(graph.nodes) for name in node.outputs}
    producer, consumers = graph.producer(), graph.consumers()
    found: dict[str, Node] = {}
    for node in graph.nodes:
        if node.op is not Op.ADD or node.inputs[0] == node.inputs[1]:
            continue
        last = max(node.inputs, key=lambda name: place.get(name, -1))
        layer = producer.get(last)
        alone = len(consumers[last]) == 1 and last not in graph.outputs
        if layer is not None and layer.op is Op.CONV2D and alone and not _is_depthwise(graph, layer):
            found[last] = node
    return found


def _is_depthwise(graph: Graph, node: Node) -> bool:
    return graph.weight(node).shape[0] == graph.tensors[node.inputs[0]].shape[1] == node.attrs["groups"]


def _quant(tensor: Tensor) -> QuantParams:
    assert tensor.quant is not None
    return tensor.quant


# ---- constants -------------------------------------------------------------------------------------------------------


def _weights(label: str, stream: CodeStream) -> tuple[list[Constant], str]:
    constants = [Constant(name=f"{label}_codes", type="uint8_t", values=np.frombuffer(stream.data, dtype=np.uint8))]
    levels = "0"
    if stream.levels:
        levels = f"{label}_levels"
        constants.append(Constant(name=levels, type="int8_t", values=np.array(stream.levels, dtype=np.int8)))
    return constants, f"{{{label}_codes, {levels}, EDGECOMP_{stream.form.name}, {stream.bits}}}"


def _scaling(
    work: Lowering, label: str, node: Node, weight: Array, *, most_lift: int = 0
) -> tuple[list[Constant], str, int]:
    """Give bias, mantissas and shifts of a layer; weight (O, taps) as its sums need it.

    Sums may be multiplied by 2 to the power of a lift of at most `most_lift`, the last that is returned: shifts grow by
    it, and those that the upper half of a product is enough for need no 64 bits.
    """
    x, y = (_quant(work.graph.tensors[name]) for name in (node.inputs[0], node.outputs[0]))
    bias, scale = work.graph.bias(node), _quant(work.graph.weight(node)).scale
    factor = multiplier(scale.astype(np.float64) * float(x.scale) / float(y.scale))
    rows = weight.astype(np.int64)
    total = -int(x.zero_point) * rows.sum(axis=1)
    if bias is not None and bias.data is not None:
        total = total + bias.data
    most = int((np.abs(total) + 128 * np.abs(rows).sum(axis=1)).max())
    if most >= 1 << 31:
        raise ExportError(f"c: {node.name!r}: its sums of products can exceed 32 bits")
    low, high = clamp_codes(node)
    least, largest = _NARROW_SHIFTS
    lift = max(0, least - int(factor.shift.min()))
    if lift > most_lift or most << lift >= 1 << 31 or int(factor.shift.max()) + lift > largest:
        lift = 0
    shift = factor.shift + lift
    arrays = {
        "bias": ("int32_t", (total << lift).astype(np.int32)),
        "mantissa": ("int32_t", factor.mantissa.astype(np.int32)),
        "shift": ("uint8_t", shift.astype(np.uint8)),
    }
    constants = [Constant(name=f"{label}_{key}", type=kind, values=v) for key, (kind, v) in arrays.items()]
    wide = int(((shift < least) | (shift > largest)).any())
    names = ", ".join(constant.name for constant in constants)
    return constants, f"{{{names}, {wide}, {int(y.zero_point)}, {low}, {high}}}", lift


def _window(work: Lowering, node: Node, kernel: Sequence[int], *, depthwise: bool = False) -> str:
    (_, c, h, w), (_, o, oh, ow) = (work.graph.tensors[name].shape for name in (node.inputs[0], node.outputs[0]))
    stride, (top, left, *_) = ints(node.attrs, "stride"), ints(node.attrs, "pads")
    dilation = ints(node.attrs, "dilation") if "dilation" in node.attrs else (1, 1)
    alone = (*kernel, *stride, top, left) == (1, 1, 1, 1, 0, 0) and (oh, ow) == (h, w)
    if alone and not depthwise and h * w <= _MOST:
        # Every pixel by itself: one long row. Depthwise, rows are copied into scratch memory, where a long one is dear.
        h, w, oh, ow = 1, h * w, 1, oh * ow
    numbers = (h, w, c, oh, ow, o, *kernel, *stride, top, left, *dilation)
    if max(numbers) > _MOST:
        raise ExportError(f"c: {node.name!r}: a size of {max(numbers)}, the kernels take up to {_MOST}")
    return f"{{{', '.join(map(str, numbers))}}}"


def _sum(node: Node, a: QuantParams, b: QuantParams, y: QuantParams) -> str:
    factors = add_multipliers(float(a.scale), float(b.scale), float(y.scale))
    *both, shift = factors
    reach = [max(ACT_MAX - int(q.zero_point), int(q.zero_point) - ACT_MIN) for q in (a, b)]
    if sum(f * r for f, r in zip(both, reach, strict=True)) + (1 << shift >> 1) >= 1 << 31:
        raise ExportError(f"c: {node.name!r}: its sums can exceed 32 bits: a scale is far from the others")
    low, high = clamp_codes(node)
    zeros = (int(q.zero_point) for q in (a, b, y))
    return f"{{{', '.join(map(str, (*factors, *zeros, low, high)))}}}"


# ---- one handler an operator -----------------------------------------------------------------------------------------


def _conv2d(work: Lowering, node: Node) -> None:
    graph, label = work.graph, work.label()
    tensor = graph.weight(node)
    assert tensor.data is not None
    o, n, kh, kw = tensor.shape
    groups = int(node.attrs["groups"])  # type: ignore[arg-type]
    depthwise = _is_depthwise(graph, node)
    rows = tensor.data.transpose(TO_NHWC).reshape(o, -1)
    contiguous = groups == 1 and ints(node.attrs, "dilation")[1] == 1 and not depthwise
    run = n if not contiguous else n * kw if n % 4 == 0 else n * kw * kh
    parts = channel_fours(rows) if depthwise else filter_fours(rows, groups, run)
    stream = code_stream(list(parts), packed=work.packed)
    constants, weights = _weights(label, stream)
    more, scaling, lift = _scaling(work, label, node, rows, most_lift=_MOST_LIFT)
    constants += more
    pointers, output, name = {"a": work.memory_of(node.inputs[0])}, node.outputs[0], node.name
    summed, residual = "0", "0"
    if (added := work.fused.get(output)) is not None:
        (other,) = (i for i in added.inputs if i != output)
        quants = [_quant(graph.tensors[i]) for i in (output, other, added.outputs[0])]
        constants.append(Constant(name=f"{label}_sum", type="edgecomp_sum", values=_sum(added, *quants)))
        summed, residual = f"&{label}_sum", "{b}"
        pointers["b"] = work.memory_of(other)
        output, name = added.outputs[0], f"{node.name} + {added.name}"
    zero = int(_quant(graph.tensors[node.inputs[0]]).zero_point)
    window = _window(work, node, (kh, kw), depthwise=depthwise)
    text = f"{{{window}, {weights}, {scaling}, {summed}, {groups}, {zero}, {lift}}}"
    constants.append(Constant(name=label, type="edgecomp_conv", values=text))
    if depthwise:
        scratch, better = _depthwise_scratch(work, node, kh, kw)
    else:
        scratch, better = _conv_scratch(node, tensor.shape, contiguous=contiguous)
    _, _, *space = graph.tensors[output].shape
    work.steps.append(
        Step(
            name=name,
            kernel="edgecomp_depthwise" if depthwise else "edgecomp_conv2d",
            arguments=f"&{label}, {{a}}, {'' if depthwise else f'{residual}, '}{{y}}, {{scratch}}, {{scratch_bytes}}u",
            pointers={**pointers, "y": output},
            output=output,
            may_overwrite=(pointers["b"],) if "b" in pointers and pointers["b"] != pointers["a"] else (),
            scratch_bytes=scratch,
            more_scratch=better,
            constants=tuple(constants),
            layer=node.name,
            weights=stream,
            macs=tensor.data.size * math.prod(space),
        )
    )


def _conv_scratch(node: Node, shape: Sequence[int], *, contiguous: bool) -> tuple[int, Sequence[int]]:
    """Give the bytes that `edgecomp_conv2d` needs, and those that are of use to it: see there."""
    o, n, kh, kw = shape
    n_fours, taps = -(-o // 4), -(-kh * kw * n // 4) * 4
    if contiguous and n % 4:
        first, *more = ((8 * taps + FOUR_BYTES) * k + 7 * taps for k in range(1, n_fours + 1))
        return first, more
    least = 8 * kh * kw * n + (16 * kw * (kh + 1) if any(ints(node.attrs, "pads")) else 0)
    enough = min(n_fours, PATCH_FOURS) if kh * kw == 1 else PATCH_FOURS
    fours = range(enough, n_fours + 1) if contiguous else ()
    return least, [n_bytes for k in fours if (n_bytes := (8 * taps + FOUR_BYTES) * k + 6 * taps) > least]


def _depthwise_scratch(work: Lowering, node: Node, kh: int, kw: int) -> tuple[int, Sequence[int]]:
    """The same for `edgecomp_depthwise`."""
    (oh, ow), stride = work.graph.tensors[node.outputs[0]].shape[2:], ints(node.attrs, "stride")
    dilation = ints(node.attrs, "dilation")
    row = 4 * (-(-((ow - 1) * stride[1] + (kw - 1) * dilation[1] + 1) // 4) * 4)
    first, *more = (8 * kh * kw + row * (k * stride[0] + (kh - 1) * dilation[0] + 1) for k in range(oh))
    return first, more


def _linear(work: Lowering, node: Node) -> None:
    graph, label = work.graph, work.label()
    rows, order = graph.weight(node).data, work.orders.get(node.inputs[0])
    assert rows is not None
    rows = rows if order is None else rows[:, order]
    if len(rows) > _MOST:
        raise ExportError(f"c: {node.name!r}: {len(rows)} outputs, the kernels take up to {_MOST}")
    stream = code_stream(list(filter_fours(rows, 1, LINEAR_RUN)), packed=work.packed)
    constants, weights = _weights(label, stream)
    more, scaling, _ = _scaling(work, label, node, rows)
    text = f"{{{weights}, {scaling}, {rows.shape[1]}, {rows.shape[0]}}}"
    constants += [*more, Constant(name=label, type="edgecomp_linear", values=text)]
    work.add(
        node,
        "edgecomp_fully_connected",
        f"&{label}, {{a}}, {{y}}, {{scratch}}",
        pointers={"a": work.memory_of(node.inputs[0]), "y": node.outputs[0]},
        scratch_bytes=8 * min(rows.shape[1], LINEAR_RUN),
        constants=tuple(constants),
        layer=node.name,
        weights=stream,
        macs=rows.size,
    )


def _add(work: Lowering, node: Node) -> None:
    if node in work.fused.values():
        return
    label = work.label()
    quants = [_quant(work.graph.tensors[name]) for name in (*node.inputs, node.outputs[0])]
    constant = Constant(name=label, type="edgecomp_sum", values=_sum(node, *quants))
    _elementwise(work, node, "edgecomp_add", f"&{label}, {{n}}u, {{{{a}}}}, {{{{b}}}}, {{{{y}}}}", (constant,))


def _elementwise(work: Lowering, node: Node, kernel: str, arguments: str, constants: tuple[Constant, ...]) -> None:
    """Add a step that goes through all elements, and may write over what it reads."""
    n = math.prod(work.graph.tensors[node.outputs[0]].shape)
    over = tuple(work.memory_of(name) for name in node.inputs)
    work.add(node, kernel, arguments.format(n=n), may_overwrite=over, constants=constants)


def _mul(work: Lowering, node: Node) -> None:
    label, tensors = work.label(), work.graph.tensors
    names = sorted(node.inputs, key=lambda name: -math.prod(tensors[name].shape))
    a, b, y = (_quant(tensors[name]) for name in (*names, node.outputs[0]))
    factor = multiplier(np.array(float(a.scale) * float(b.scale) / float(y.scale)))
    zeros = (int(q.zero_point) for q in (a, b, y))
    numbers = (int(factor.mantissa), int(factor.shift), *zeros, *clamp_codes(node))
    constant = Constant(name=label, type="edgecomp_product", values=f"{{{', '.join(map(str, numbers))}}}")
    shape = tensors[names[0]].shape
    memory = [work.memory_of(name) for name in names]
    given = {"pointers": {"a": memory[0], "b": memory[1], "y": node.outputs[0]}, "constants": (constant,)}
    if tensors[names[1]].shape == shape:
        arguments = f"&{label}, {math.prod(shape)}u, {{a}}, {{b}}, {{y}}"
        work.add(node, "edgecomp_mul", arguments, may_overwrite=tuple(memory), **given)
    else:
        arguments = f"&{label}, {shape[2] * shape[3]}u, {shape[1]}u, {{a}}, {{b}}, {{y}}"
        over = memory[:1] if memory[0] != memory[1] else ()
        work.add(node, "edgecomp_mul_channels", arguments, may_overwrite=tuple(over), **given)


def _curve(work: Lowering, node: Node) -> None:
    label = work.label()
    source, target = (_quant(work.graph.tensors[name]) for name in (node.inputs[0], node.outputs[0]))
    constant = Constant(name=label, type="int8_t", values=curve_codes(node.op, source, target))
    _elementwise(work, node, "edgecomp_lookup", f"{{n}}u, {label}, {{{{a}}}}, {{{{y}}}}", (constant,))


def _clip(work: Lowering, node: Node) -> None:
    low, high = clamp_codes(node)
    _elementwise(work, node, "edgecomp_clip", f"{{n}}u, {low}, {high}, {{{{a}}}}, {{{{y}}}}", ())


def _pool(work: Lowering, node: Node) -> None:
    label = work.label()
    window = _window(work, node, ints(node.attrs, "kernel"))
    constant = Constant(name=label, type="edgecomp_window", values=window)
    if node.op is Op.MAX_POOL:
        work.add(node, "edgecomp_max_pool", f"&{label}, {{a}}, {{y}}", constants=(constant,))
        return
    zero = int(_quant(work.graph.tensors[node.inputs[0]]).zero_point)
    arguments = f"&{label}, {node.attrs['include_pad']}, {zero}, {{a}}, {{y}}"
    work.add(node, "edgecomp_avg_pool", arguments, constants=(constant,))


def _global_avg_pool(work: Lowering, node: Node) -> None:
    shape = work.graph.tensors[node.inputs[0]].shape
    x, y = (_quant(work.graph.tensors[name]) for name in (node.inputs[0], node.outputs[0]))
    n_pixels = shape[2] * shape[3]
    factor = multiplier(np.float64(x.scale) / (float(y.scale) * shape[2] * shape[3]))
    numbers = f"{int(x.zero_point)}, {int(factor.mantissa)}, {int(factor.shift)}, {int(y.zero_point)}"
    work.add(node, "edgecomp_mean", f"{n_pixels}u, {shape[1]}u, {numbers}, {{a}}, {{y}}")


def _concat(work: Lowering, node: Node) -> None:
    shape = work.graph.tensors[node.outputs[0]].shape
    axis = stored_axis(int(node.attrs["axis"]), len(shape))  # type: ignore[arg-type]
    row = math.prod(stored_shape(shape)[axis:])
    n, start = math.prod(shape) // row, 0
    for name in node.inputs:
        run = math.prod(stored_shape(work.graph.tensors[name].shape)[axis:])
        arguments = f"{n}u, {run}u, {{a}}, {run}u, {{y}} + {start}, {row}u"
        pointers = {"a": work.memory_of(name), "y": node.outputs[0]}
        work.add(node, "edgecomp_copy", arguments, pointers=pointers)
        start += run


def _gather(work: Lowering, node: Node) -> None:
    label, shape = work.label(), work.graph.tensors[node.inputs[0]].shape
    indices = np.array(ints(node.attrs, "indices"))
    if shape[1] > _MOST:
        raise ExportError(f"c: {node.name!r}: {shape[1]} channels, the kernels take up to {_MOST}")
    n_pixels = math.prod(shape) // shape[1]
    if len(shape) not in (2, 4):
        raise ExportError(f"c: {node.name!r}: gather of rank {len(shape)}, the kernels take 2 and 4")
    first = int(indices[0])
    if np.array_equal(indices, np.arange(first, first + len(indices))):
        arguments = f"{n_pixels}u, {len(indices)}u, {{a}} + {first}, {shape[1]}u, {{y}}, {len(indices)}u"
        work.add(node, "edgecomp_copy", arguments)
        return
    constant = Constant(name=label, type="uint16_t", values=indices.astype(np.uint16))
    arguments = f"{n_pixels}u, {shape[1]}u, {len(indices)}u, {label}, {{a}}, {{y}}"
    work.add(node, "edgecomp_gather", arguments, constants=(constant,))


def _reshape(work: Lowering, node: Node) -> None:
    """Restore the graph's order of elements where an image's differs and no linear layer has taken that over."""
    source, result = (work.graph.tensors[name] for name in (node.inputs[0], node.outputs[0]))
    gone, come = moves_data(source.shape) and node.outputs[0] not in work.orders, moves_data(result.shape)
    if gone and come and source.shape == result.shape:
        gone = come = False
    if gone and come:
        raise ExportError(f"c: {node.name!r}: reshape of an image into an image, the kernels have none; flatten first")
    if gone:
        _, c, h, w = source.shape
        work.add(node, "edgecomp_transpose", f"{h * w}u, {c}u, {{a}}, {{y}}")
    elif come:
        _, c, h, w = result.shape
        work.add(node, "edgecomp_transpose", f"{c}u, {h * w}u, {{a}}, {{y}}")
    else:
        _same(work, node)


def _same(work: Lowering, node: Node) -> None:
    work.same[node.outputs[0]] = node.inputs[0]


_HANDLERS: Mapping[Op, Callable[[Lowering, Node], None]] = {
    Op.CONV2D: _conv2d,
    Op.LINEAR: _linear,
    Op.ADD: _add,
    Op.MUL: _mul,
    Op.CLIP: _clip,
    **dict.fromkeys(FUNCTIONS, _curve),
    Op.MAX_POOL: _pool,
    Op.AVG_POOL: _pool,
    Op.GLOBAL_AVG_POOL: _global_avg_pool,
    Op.CONCAT: _concat,
    Op.GATHER: _gather,
    Op.FLATTEN: _reshape,
    Op.RESHAPE: _reshape,
    Op.QUANTIZE: _same,
    Op.DEQUANTIZE: _same,
}
"""All that a quantized graph may hold, but a softmax on codes."""
