"""A compressed network as a torch module that can be trained, and back: rounded weights, int8 activations.

What it computes is what `compress` makes of the graph, in real numbers: every weight is a code times its row's scale,
every activation is rounded and clamped as in the quantized graph. Gradients pass rounding as if it were not there and
stop at a clamp (straight-through). BatchNorm is folded at capture; the biases, trained too, stand in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from edgecomp import quantmath
from edgecomp.compress import compress, cut
from edgecomp.curves import FUNCTIONS, curve_codes
from edgecomp.graph import Array, Graph, Node, Op, QuantParams
from edgecomp.groups import is_depthwise, kept_numbers, number_channels
from edgecomp.ops import PROBABILITIES, clamp_codes
from edgecomp.plan import CompressionPlan, Io
from edgecomp.pytorch.network import as_input, compute
from edgecomp.sparsity import NOTHING, Masks, cut_masks

MOST_BITS = 6
"""Weights of wider layers stay as they are, their biases are trained: `compress` keeps a grid of at most 6 bits."""
_SLACK = 0.2
"""How far a weight may lean towards the next code at first, in steps. What reconstruction rounded against its leaning
would sit at the border otherwise, and few updates of noise take it over."""
_EXACT = frozenset({Op.MAX_POOL, Op.CONCAT, Op.GATHER, Op.FLATTEN, Op.RESHAPE})
_DOUBLINGS = 12
_HALVINGS = 12


class Layer(torch.nn.Module):
    """The weights of a layer as real numbers in units of a step, and what rounds them.

    Args:
        codes: int8 (O, ...), where the weights start.
        scale: float32 (O,).
        bits: of a code.
        original: float32 (O, ...), the weights before any rounding: they say to which side of its code each one leans.
        bias: float32 (O,), or None.
        mask: bool (O, ...), False where the code stays 0; None for everywhere True.
    """

    scale: Tensor
    borders: Tensor
    mask: Tensor | None

    def __init__(
        self, codes: Array, scale: Array, bits: int, original: Array, bias: Array | None, mask: Array | None = None
    ) -> None:
        super().__init__()
        self.limit = quantmath.weight_limit(bits)
        start, steps = as_input(codes, torch.float32), as_input(scale, torch.float32)
        column = steps.reshape(-1, *[1] * (start.ndim - 1))
        leaning = torch.clamp(as_input(original, torch.float32) / column - start, -_SLACK, _SLACK)
        # In a row of zeros the scale means nothing, nor would a weight measured in it.
        leaning[(start == 0).flatten(1).all(dim=1)] = 0
        # Follows from what is trained, not trained itself: no part of a checkpoint.
        self.register_buffer("mask", None if mask is None else torch.from_numpy(mask.copy()), persistent=False)
        if self.mask is not None:
            leaning *= self.mask
        self.fixed = bits > MOST_BITS
        self.latent = torch.nn.Parameter(start if self.fixed else start + leaning, requires_grad=not self.fixed)
        self.gain = torch.nn.Parameter(torch.zeros_like(steps), requires_grad=not self.fixed)
        self.bias = None if bias is None else torch.nn.Parameter(as_input(bias, torch.float32))
        self.register_buffer("scale", steps)
        # Where each code ends and the next one, higher by 1, begins.
        self.register_buffer("borders", torch.arange(-self.limit, self.limit) + 0.5)

    def codes(self) -> Tensor:
        """Round: float32 (O, ...), whole numbers within +-limit."""
        found = torch.bucketize(self.latent.detach(), self.borders, out_int32=True)
        codes = found.to(self.latent.dtype).sub_(self.limit)
        return codes if self.mask is None else codes.mul_(self.mask)

    def weight(self) -> Tensor:
        """Give the rounded weights (O, ...); their gradient reaches `latent` and, as in LSQ, `gain`."""
        latent = self.latent if self.mask is None else self.latent * self.mask
        through = latent + (self.codes() - latent).detach()
        return through * (self.scale * self.gain.exp()).reshape(-1, *[1] * (self.latent.ndim - 1))

    def rounded_bias(self, input_scale: float) -> Tensor | None:
        """Give the bias (O,) on the grid of the sums it is added to: with few bits a step of these is not small."""
        if self.bias is None:
            return None
        step = (self.scale * self.gain.exp() * input_scale).detach()
        return self.bias + (torch.round(self.bias / step) * step - self.bias).detach()

    def histogram(self) -> Array:
        """Count the codes: float64 (2 limit + 1,)."""
        counts = torch.bincount((self.codes() + self.limit).flatten().long(), minlength=2 * self.limit + 1)
        return np.asarray(counts.cpu().numpy(), dtype=np.float64)


class Rebuilt(torch.nn.Module):
    """A compressed network, to be trained.

    Args:
        graph: float, its weights on their grids where they have at most MOST_BITS bits.
        plan: made for it.
        original: the same graph before rounding; None for `graph` itself.
        masks: of the layers in which weights stay 0.

    Raises:
        PlanError: the plan is not for this graph.
    """

    def __init__(
        self, graph: Graph, plan: CompressionPlan, *, original: Graph | None = None, masks: Masks = NOTHING
    ) -> None:
        super().__init__()
        self.graph, self.plan = graph, plan
        # With integer ends every tensor between them has its parameters; the ends themselves compute nothing.
        self.quantized = compress(graph, replace(plan, io=Io.INT8))
        keep = {name: layer.keep for name, layer in plan.layers.items()}
        before, now = cut(original or graph, keep), cut(graph, keep)
        smaller = cut_masks(graph, masks, keep)
        self.layers = torch.nn.ModuleList()
        self._place: dict[str, int] = {}
        for node in self.quantized.layers():
            weight, bias = self.quantized.weight(node), self.quantized.bias(node)
            params, first = weight.quant, before.tensors[weight.name].data
            assert params is not None
            assert weight.data is not None
            assert first is not None
            values = None if bias is None else now.tensors[bias.name].data
            self._place[node.name] = len(self.layers)
            self.layers.append(Layer(weight.data, params.scale, params.bits, first, values, smaller.get(node.name)))

    def layer(self, name: str) -> Layer:
        """Look up a layer by its name in the graph."""
        found = self.layers[self._place[name]]
        assert isinstance(found, Layer)
        return found

    def output_step(self, name: str) -> float:
        """Give the step of the activation that a layer writes."""
        node = next(node for node in self.quantized.layers() if node.name == name)
        params = self.quantized.tensors[node.outputs[0]].quant
        assert params is not None
        return float(params.scale)

    def steps(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the rounded input, then what each node writes, as real numbers on the grids of the quantized graph.

        Args:
            x: float32 (N, C, H, W), preprocessed.
        """
        graph = self.quantized
        source = graph.inputs[0]
        last_reader = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
        values = {source: _rounded(x, _params(graph, source), (quantmath.ACT_MIN, quantmath.ACT_MAX))}
        yield source, values[source]
        for i, node in enumerate(graph.nodes):
            inputs = [values[name] for name in node.inputs if name in values]
            if node.name in self._place:
                layer = self.layer(node.name)
                bias = layer.rounded_bias(float(_params(graph, node.inputs[0]).scale))
                inputs += [layer.weight()] if bias is None else [layer.weight(), bias]
            params = _params(graph, node.outputs[0])
            if node.op in _EXACT:
                out = compute(node, inputs)
            elif node.op in FUNCTIONS:
                real = _rounded(compute(node, inputs), params, _codes(node))
                found = _looked_up(node.op, inputs[0].detach(), _params(graph, node.inputs[0]), params)
                out = real + (found - real).detach()
            elif node.op is Op.AVG_POOL:
                # Ties are common among means, and seen only in whole numbers.
                scale = float(params.scale)
                out = _round(compute(node, [_round(inputs[0] / scale, 1.0)]), 1.0) * scale
            else:
                # Under autocast products come in half precision; codes need more.
                out = _rounded(compute(node, inputs).float(), params, _codes(node))
            for name in set(node.inputs) & values.keys():
                if last_reader[name] == i:
                    del values[name]
            values[node.outputs[0]] = out
            yield node.outputs[0], out

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits (N, ...): the output, or what a softmax or sigmoid at the end reads."""
        wanted = logits_name(self.quantized)
        for name, value in self.steps(x):
            if name == wanted:
                return value
        raise AssertionError(wanted)

    def trained(self) -> tuple[Graph, CompressionPlan]:
        """Write the weights back into the float graph, on their grids: `compress` finds the same codes again."""
        keep = {name: layer.keep for name, layer in self.plan.layers.items()}
        channels = number_channels(self.graph)
        kept = kept_numbers(self.graph, channels, keep)
        tensors = dict(self.graph.tensors)
        for node in self.graph.layers():
            layer = self.layer(node.name)
            rows, columns = kept[channels.of[node.outputs[0]]], kept[channels.of[node.inputs[0]]]
            weight, bias = self.graph.weight(node), self.graph.bias(node)
            assert weight.data is not None
            if not layer.fixed:
                data = weight.data.copy()
                part = np.flatnonzero(rows)
                found = layer.weight().detach().cpu().numpy()
                if node.attrs.get("groups", 1) == 1 and not is_depthwise(self.graph, node):
                    data[np.ix_(part, np.flatnonzero(columns))] = found
                else:
                    data[part] = found
                tensors[weight.name] = replace(weight, data=data)
            if bias is not None:
                assert bias.data is not None
                assert layer.bias is not None
                data = bias.data.copy()
                data[rows] = layer.bias.detach().cpu().numpy()
                tensors[bias.name] = replace(bias, data=data)
        graph = replace(self.graph, tensors=tensors)
        return graph, replace(self.plan, graph_digest=graph.digest())


def logits_name(graph: Graph) -> str:
    """Name the tensor to compare networks by: the output, or what a softmax or sigmoid that writes it reads."""
    last = graph.producer().get(graph.outputs[0])
    return last.inputs[0] if last is not None and last.op in PROBABILITIES else graph.outputs[0]


def entropy_bits(counts: Array) -> float:
    """Give n H, the bits that codes with this histogram (K,) take at least when each is stored by its frequency."""
    n = counts[counts > 0]
    return float((n * np.log2(n.sum() / n)).sum())


class Room:
    """The bits that the weights of a module take where codes are stored by frequency, held at what they were.

    Rounding each weight to the nearest code spreads codes while they are trained. Each gets instead the code with the
    least (distance in steps)^2 + price x (bits of the code), bits by the first histogram; the price is the least that
    brings all the weights together down to what they took at first. Bits may move from one layer to another.

    Args:
        module: where it begins.
        share: of what they take there.

    Attributes:
        bits: what they may take.
    """

    def __init__(self, module: Rebuilt, share: float = 1.0) -> None:
        self._layers = [layer for layer in module.layers if isinstance(layer, Layer) and not layer.fixed]
        counts = [layer.histogram() for layer in self._layers]
        self.bits = share * sum(entropy_bits(found) for found in counts)
        # Codes that were not there cost as if half a weight had them. More bits from each code to the next one:
        self._more = [np.diff(-np.log2(np.maximum(found, 0.5) / found.sum())) for found in counts]

    def hold(self) -> None:
        """Set the borders between codes, at as low a price as does."""
        if self._taken(0.0) <= self.bits:
            return
        low, high = 0.0, 1 / 16
        for _ in range(_DOUBLINGS):
            if self._taken(high) <= self.bits:
                break
            low, high = high, 2 * high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self._taken(middle) <= self.bits else (middle, high)
        self._taken(high)

    def _taken(self, price: float) -> float:
        total = 0.0
        for layer, more in zip(self._layers, self._more, strict=True):
            borders = _borders(more, price, layer.limit)
            layer.borders.copy_(torch.from_numpy(borders.astype(np.float32)))
            total += entropy_bits(layer.histogram())
        return total


def _borders(more: Array, price: float, limit: int) -> Array:
    """Place the borders (2 limit,) between neighbours at equal cost; none lies beyond zero, or before another."""
    borders = np.arange(-limit, limit) + 0.5 + price * more / 2
    below, above = np.minimum(borders[:limit], 0), np.maximum(borders[limit:], 0)
    return np.concatenate([np.minimum.accumulate(below[::-1])[::-1], np.maximum.accumulate(above)])


def _params(graph: Graph, name: str) -> QuantParams:
    params = graph.tensors[name].quant
    assert params is not None
    return params


def _codes(node: Node) -> tuple[int, int]:
    return clamp_codes(node) if "clamp" in node.attrs else (quantmath.ACT_MIN, quantmath.ACT_MAX)


def _rounded(x: Tensor, params: QuantParams, codes: tuple[int, int]) -> Tensor:
    """Clamp to codes and round half to even; the gradient passes where nothing was clamped."""
    scale, zero_point = float(params.scale), int(params.zero_point)
    low, high = ((code - zero_point) * scale for code in codes)
    return _round(x.clamp(low, high), scale)


def _looked_up(op: Op, x: Tensor, source: QuantParams, target: QuantParams) -> Tensor:
    """Give the real values of the codes that a function has in the integer graph, for x on the grid of its source."""
    table = torch.from_numpy(curve_codes(op, source, target).astype(np.float32)).to(x.device)
    codes = torch.round(x / float(source.scale)).long() + (int(source.zero_point) - quantmath.ACT_MIN)
    return (table[codes] - int(target.zero_point)) * float(target.scale)


def _round(x: Tensor, step: float) -> Tensor:
    """Round to multiples of a step, half to even; x is at most 512 steps."""
    rounded: Tensor = torch.fake_quantize_per_tensor_affine(x, step, 0, -512, 512)
    return rounded
