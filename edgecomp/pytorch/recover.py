"""What wins accuracy back after rounding, from images alone: layer-wise reconstruction, without labels or training.

Layers are rounded (`rounding`) in running order, on inputs that the layers before them, already rounded, really give;
what remains of the mean error goes into the bias. The result is a float graph whose weights lie on their grids, so that
`compress` finds the same codes again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from edgecomp import compress as compression
from edgecomp import quantmath
from edgecomp.errors import DataError
from edgecomp.graph import WEIGHTED, Array, Graph, Node, Op, QuantParams
from edgecomp.plan import ActRange
from edgecomp.pytorch.network import as_input, compute
from edgecomp.pytorch.rounding import basis, choose_scale, enough, input_energy, round_columns, round_nearest
from edgecomp.quantmath import Grid

MOST_BITS = 6
"""Wider layers are left as they are: rounding them to the nearest code loses nothing one can measure."""


def reconstruct(
    graph: Graph,
    ranges: Mapping[str, ActRange],
    grids: Mapping[str, Grid],
    batches: Sequence[Array],
    *,
    progress: Callable[[int], object] | None = None,
) -> Graph:
    """Give the graph with weights on their grids and biases adjusted to them.

    Deterministic for a number of threads. All activations of all images are held at once, for the layers being worked
    on: about twice the largest tensor times the number of images.

    Args:
        graph: float.
        ranges: of every activation.
        grids: of every layer.
        batches: preprocessed images float32 (N, C, H, W); a few hundred in all.
        progress: called after each layer with the number of its weights.

    Raises:
        DataError: no images.
    """
    if not batches:
        raise DataError("no images to reconstruct with; expected at least one")
    fused = compression.fuse_clips(graph)
    activations = compression.activation_params(fused, ranges)
    last_reader = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    tensors = dict(graph.tensors)
    weights = {name: as_input(t.data, torch.float32) for name, t in graph.tensors.items() if t.data is not None}
    source = graph.inputs[0]
    exact = {source: [as_input(x, torch.float32) for x in batches]}
    rounded = {source: [_fake_quantize(x, activations[source]) for x in exact[source]]}
    with torch.no_grad():
        for i, node in enumerate(graph.nodes):
            parameters = [weights[name] for name in node.inputs if name in weights]
            exact_inputs = _gather(exact, node, len(batches))
            rounded_inputs = _gather(rounded, node, len(batches))
            wanted = [compute(node, [*x, *parameters]) for x in exact_inputs]
            if node.op in WEIGHTED:
                found, adjusted = _adjust(node, parameters, rounded_inputs, wanted, grids[node.name])
                for name, value in zip(node.inputs[1:], adjusted, strict=True):
                    tensors[name] = replace(tensors[name], data=value.numpy())
                if progress is not None:
                    progress(parameters[0].numel())
            else:
                found = [compute(node, [*x, *parameters]) for x in rounded_inputs]
            output = node.outputs[0]
            exact[output] = wanted
            rounded[output] = [_fake_quantize(y, activations.get(output)) for y in found]
            for name in set(node.inputs) - weights.keys():
                if last_reader[name] == i:
                    del exact[name], rounded[name]
    return replace(graph, tensors=tensors)


def _gather(values: Mapping[str, list[Tensor]], node: Node, n_batches: int) -> list[list[Tensor]]:
    names = [name for name in node.inputs if name in values]
    return [[values[name][b] for name in names] for b in range(n_batches)]


def _fake_quantize(x: Tensor, params: QuantParams | None) -> Tensor:
    """Round to the codes a quantized graph would hold; a tensor that is fused away there has no parameters."""
    if params is None:
        return x
    scale, zero_point = float(params.scale), int(params.zero_point)
    low, high = quantmath.ACT_MIN - zero_point, quantmath.ACT_MAX - zero_point
    return torch.clamp(torch.round(x / scale), low, high) * scale


def _adjust(
    node: Node, parameters: list[Tensor], inputs: list[list[Tensor]], wanted: list[Tensor], grid: Grid
) -> tuple[list[Tensor], list[Tensor]]:
    """Round one layer: (its outputs on `inputs`, the parameters to store)."""
    weight = parameters[0]
    if grid.bits > MOST_BITS:
        scale = torch.from_numpy(quantmath.choose_weight_scale(weight.numpy(), grid.bits))
        near = round_nearest(weight.flatten(1), scale, grid.bits).reshape(weight.shape)
        # Stored as they were: `compress` rounds them the same way.
        return [compute(node, [*x, near, *parameters[1:]]) for x in inputs], parameters
    rounded = torch.empty_like(weight)
    groups = int(node.attrs["groups"]) if node.op is Op.CONV2D else 1  # type: ignore[arg-type]
    per = weight.shape[0] // groups
    used = enough(node, [x[0] for x in inputs], weight)
    # A step is the whole layer's, whatever the group.
    step = torch.from_numpy(quantmath.grid_scale(weight.numpy(), grid)) if grid.step is not None else None
    for g in range(groups):
        rows = slice(g * per, (g + 1) * per)
        found = basis(input_energy(node, used, g, groups, weight))
        scale = choose_scale(weight[rows].flatten(1), found.energy, grid.bits) if step is None else step[rows]
        result = round_columns(weight[rows].flatten(1), found, scale, grid.bits)
        values = torch.from_numpy(result.codes.astype(np.float32) * result.scale[:, None])
        rounded[rows] = values.reshape(weight[rows].shape)
    outputs = [compute(node, [*x, rounded, *parameters[1:]]) for x in inputs]
    if len(parameters) == 1:
        return outputs, [rounded]
    axes = [0, *range(2, wanted[0].ndim)]
    n_values = sum(y.numel() // y.shape[1] for y in wanted)
    off = sum(((y - z).sum(axes, dtype=torch.float64) for y, z in zip(wanted, outputs, strict=True)), torch.zeros(()))
    shift = (off / n_values).to(torch.float32)
    column = shift.reshape(1, -1, *[1] * (wanted[0].ndim - 2))
    return [y + column for y in outputs], [rounded, parameters[1] + shift]
