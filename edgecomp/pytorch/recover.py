"""What wins accuracy back after rounding, from images alone: layer-wise reconstruction, without labels or training.

Layers are rounded (`rounding`) in running order, on inputs that the layers before them, already rounded, really give;
first the weights move to what undoes the error of those layers (ridge regression; cf. GPTAQ, arXiv 2504.02692), then
they are rounded; what remains of the mean error behind the clip that follows goes into the bias. The result is a float
graph whose weights lie on their grids, so that `compress` finds the same codes again. Weights that a mask says are to
be 0 are 0 there, and the others make up for them.
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
from edgecomp.pytorch.rounding import (
    basis,
    choose_scale,
    corrected,
    enough,
    moments,
    prune_columns,
    round_columns,
    round_nearest,
)
from edgecomp.quantmath import Grid
from edgecomp.scales import activation_params
from edgecomp.sparsity import NOTHING, Masks

MOST_BITS = 6
"""Wider layers keep their weights: rounding them to the nearest code loses nothing one can measure."""
_SHIFT_STEPS = 6
_LEAST_FREE = 0.05
"""A step counts at least this share of the values as passing the clip: where fewer do, it would go too far."""


def reconstruct(
    graph: Graph,
    ranges: Mapping[str, ActRange],
    grids: Mapping[str, Grid],
    batches: Sequence[Array],
    *,
    masks: Masks = NOTHING,
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
        masks: of the layers in which weights are to be 0; other layers keep no zero for being one.
        progress: called after each layer with the number of its weights.

    Raises:
        DataError: no images.
    """
    activations = activation_params(compression.fuse_clips(graph), ranges)
    return _walked(graph, activations, grids, masks, batches, progress)


def make_up(
    graph: Graph,
    masks: Masks,
    batches: Sequence[Array],
    *,
    progress: Callable[[int], object] | None = None,
) -> Graph:
    """Give the graph with masked weights 0 and the others, with the biases, making up for them; nothing is rounded.

    Arguments and errors as `reconstruct`.
    """
    return _walked(graph, {}, {}, masks, batches, progress)


def _walked(
    graph: Graph,
    activations: Mapping[str, QuantParams],
    grids: Mapping[str, Grid],
    masks: Masks,
    batches: Sequence[Array],
    progress: Callable[[int], object] | None,
) -> Graph:
    """Adjust layer after layer; one without a grid, or an activation without parameters, is not rounded."""
    if not batches:
        raise DataError("no images to reconstruct with; expected at least one")
    limits = {node.name: _limits(node) for node in compression.fuse_clips(graph).nodes}
    last_reader = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    tensors = dict(graph.tensors)
    weights = {name: as_input(t.data, torch.float32) for name, t in graph.tensors.items() if t.data is not None}
    source = graph.inputs[0]
    exact = {source: [as_input(x, torch.float32) for x in batches]}
    rounded = {source: [_fake_quantize(x, activations.get(source)) for x in exact[source]]}
    with torch.no_grad():
        for i, node in enumerate(graph.nodes):
            parameters = [weights[name] for name in node.inputs if name in weights]
            exact_inputs = _gather(exact, node, len(batches))
            rounded_inputs = _gather(rounded, node, len(batches))
            wanted = [compute(node, [*x, *parameters]) for x in exact_inputs]
            if node.op in WEIGHTED:
                mask = masks.get(node.name)
                found, adjusted = _adjust(
                    node,
                    parameters,
                    rounded_inputs,
                    wanted,
                    grids.get(node.name),
                    limits[node.name],
                    None if mask is None else torch.from_numpy(mask.copy()),
                )
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
    node: Node,
    parameters: list[Tensor],
    inputs: list[list[Tensor]],
    wanted: list[Tensor],
    grid: Grid | None,
    limits: tuple[float, float],
    mask: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Round one layer: (its outputs on `inputs`, the parameters to store)."""
    if grid is not None and grid.bits <= MOST_BITS:
        rounded = stored = _rounded(node, parameters, inputs, wanted, grid, limits, mask)
    else:
        # Stored unrounded: `compress` rounds it the same way.
        stored = parameters[0] if mask is None else _rounded(node, parameters, inputs, wanted, None, limits, mask)
        rounded = stored
        if grid is not None:
            scale = torch.from_numpy(quantmath.choose_weight_scale(stored.numpy(), grid.bits))
            rounded = round_nearest(stored.flatten(1), scale, grid.bits).reshape(stored.shape)
    outputs = [compute(node, [*x, rounded, *parameters[1:]]) for x in inputs]
    if len(parameters) == 1:
        return outputs, [stored]
    shift = _shift(outputs, wanted, limits)
    column = shift.reshape(1, -1, *[1] * (wanted[0].ndim - 2))
    return [y.add_(column) for y in outputs], [stored, parameters[1] + shift]


def _rounded(
    node: Node,
    parameters: list[Tensor],
    inputs: list[list[Tensor]],
    wanted: list[Tensor],
    grid: Grid | None,
    limits: tuple[float, float],
    mask: Tensor | None,
) -> Tensor:
    """Round the weight of a layer, each group of channels by itself; without a grid only the mask is heeded."""
    weight = parameters[0]
    rounded = torch.empty_like(weight)
    groups = int(node.attrs["groups"]) if node.op is Op.CONV2D else 1  # type: ignore[arg-type]
    per = weight.shape[0] // groups
    used = enough(node, [x[0] for x in inputs], weight)
    errors = None
    if groups == 1 and node.op is Op.CONV2D:
        errors = [
            (y.clamp(*limits) - compute(node, [x, *parameters]).clamp_(*limits))
            for x, y in zip(used, wanted, strict=False)
        ]
    # A step is the whole layer's, whatever the group.
    step = torch.from_numpy(quantmath.grid_scale(weight.numpy(), grid)) if grid is not None and grid.step else None
    for g in range(groups):
        part = slice(g * per, (g + 1) * per)
        sums = moments(node, used, g, groups, weight, errors)
        found = basis(sums.energy)
        rows = corrected(weight[part].flatten(1), sums)
        kept = None if mask is None else mask[part].flatten(1)
        if grid is None:
            assert kept is not None
            values = prune_columns(rows, found, kept)
        else:
            there = rows if kept is None else rows * kept
            scale = choose_scale(there, found.energy, grid.bits) if step is None else step[part]
            result = round_columns(rows, found, scale, grid.bits, kept)
            values = torch.from_numpy(result.codes.astype(np.float32) * result.scale[:, None])
        rounded[part] = values.reshape(weight[part].shape)
    return rounded


def _limits(node: Node) -> tuple[float, float]:
    """Give the limits of the clip that is fused into a node: infinite where there is none."""
    low, high = node.attrs.get("low", -np.inf), node.attrs.get("high", np.inf)
    return float(low), float(high)  # type: ignore[arg-type]


def _shift(found: list[Tensor], wanted: list[Tensor], limits: tuple[float, float]) -> Tensor:
    """Choose what each channel's bias must gain for the mean behind the clip to be kept: float32 (O,).

    The mean before a clip is no guide: what is cut off can be many times what passes. Without a clip one step is
    exact; with one, Newton's method finds the zero of a function that is piecewise linear and rises.
    """
    axes = [0, *range(2, wanted[0].ndim)]
    n_values = sum(y.numel() // y.shape[1] for y in wanted)
    low, high = limits
    total = sum((y.clamp(low, high).sum(axes, dtype=torch.float64) for y in wanted), torch.zeros(()))
    shift = torch.zeros(wanted[0].shape[1], dtype=torch.float64)
    for _ in range(_SHIFT_STEPS if np.isfinite(limits).any() else 1):
        off, n_free = total.clone(), torch.zeros_like(shift)
        for z in found:
            moved = z + shift.to(z.dtype).reshape(1, -1, *[1] * (z.ndim - 2))
            off -= moved.clamp(low, high).sum(axes, dtype=torch.float64)
            n_free += ((moved > low) & (moved < high)).sum(axes)
        shift += off / n_free.clamp_min(_LEAST_FREE * n_values)
    return shift.to(torch.float32)
