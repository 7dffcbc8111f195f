"""What wins accuracy back after rounding, from images alone: layer-wise reconstruction, without labels or training.

Each layer is rounded column by column in the order of their input's energy; the error of a column is pushed into those
not rounded yet by the inverse of H = E[x x^T] (optimal brain surgeon; Frantar et al., GPTQ, arXiv 2210.17323). Layers
come in running order, on inputs that the layers before them, already rounded, really give; what remains of the mean
error goes into the bias. The result is a float graph whose weights lie on their grids, so that `compress` finds the
same codes again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgecomp import compress as compression
from edgecomp import quantmath
from edgecomp.errors import DataError
from edgecomp.graph import WEIGHTED, Array, Graph, Node, Op, QuantParams
from edgecomp.ops import ints
from edgecomp.plan import CompressionPlan
from edgecomp.pytorch.network import as_input, compute

MOST_BITS = 6
"""Wider layers are left as they are: rounding them to the nearest code loses nothing one can measure."""
_DAMPING = 0.01
_BLOCK = 128
_CLIP_STEPS = 24
_COLUMN_BYTES = 1 << 28


def reconstruct(
    graph: Graph,
    plan: CompressionPlan,
    batches: Sequence[Array],
    *,
    progress: Callable[[int], object] | None = None,
) -> Graph:
    """Give the graph with weights and biases adjusted to the widths of a plan.

    Deterministic for a number of threads. All activations of all images are held at once, for the layers being worked
    on: about twice the largest tensor times the number of images.

    Args:
        graph: float, the one the plan was made for.
        plan: bits and activation ranges; its digest is not looked at.
        batches: preprocessed images float32 (N, C, H, W); a few hundred in all.
        progress: called after each layer with the number of its weights.

    Raises:
        DataError: no images.
    """
    if not batches:
        raise DataError("no images to reconstruct with; expected at least one")
    fused = compression.fuse_clips(graph)
    activations = compression.activation_params(fused, plan)
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
                found, adjusted = _adjust(node, parameters, rounded_inputs, wanted, plan.layers[node.name].weight_bits)
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
    node: Node, parameters: list[Tensor], inputs: list[list[Tensor]], wanted: list[Tensor], bits: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Round one layer: (its outputs on `inputs`, the parameters to store)."""
    weight = parameters[0]
    if bits > MOST_BITS:
        scale = torch.from_numpy(quantmath.choose_weight_scale(weight.numpy(), bits))
        grid = _round(weight.flatten(1), scale, bits).reshape(weight.shape)
        # Stored as they were: `compress` rounds them the same way.
        return [compute(node, [*x, grid, *parameters[1:]]) for x in inputs], parameters
    grid = torch.empty_like(weight)
    groups = int(node.attrs["groups"]) if node.op is Op.CONV2D else 1  # type: ignore[arg-type]
    per = weight.shape[0] // groups
    for g in range(groups):
        h = _energy(node, [x[0] for x in inputs], g, groups, weight)
        rows = slice(g * per, (g + 1) * per)
        grid[rows] = _round_columns(weight[rows].flatten(1), h, bits).reshape(weight[rows].shape)
    found = [compute(node, [*x, grid, *parameters[1:]]) for x in inputs]
    if len(parameters) == 1:
        return found, [grid]
    axes = [0, *range(2, wanted[0].ndim)]
    n_values = sum(y.numel() // y.shape[1] for y in wanted)
    off = sum(((y - z).sum(axes, dtype=torch.float64) for y, z in zip(wanted, found, strict=True)), torch.zeros(()))
    shift = (off / n_values).to(torch.float32)
    column = shift.reshape(1, -1, *[1] * (wanted[0].ndim - 2))
    return [y + column for y in found], [grid, parameters[1] + shift]


def _energy(node: Node, inputs: list[Tensor], group: int, groups: int, weight: Tensor) -> Tensor:
    """Sum x x^T over images and positions: float32 (d, d), d = inputs of one output value."""
    d = weight[0].numel()
    h = torch.zeros(d, d)
    for x in inputs:
        if node.op is Op.LINEAR:
            h.addmm_(x.T, x)
            continue
        top, left, bottom, right = ints(node.attrs, "pads")
        channels = x.shape[1] // groups
        part = F.pad(x[:, group * channels : (group + 1) * channels], (left, right, top, bottom))
        _, _, height, width = part.shape
        step = max(1, _COLUMN_BYTES // (4 * d * height * width))
        for start in range(0, len(part), step):
            columns = F.unfold(
                part[start : start + step],
                weight.shape[2:],
                dilation=ints(node.attrs, "dilation"),
                stride=ints(node.attrs, "stride"),
            )
            flat = columns.transpose(1, 2).reshape(-1, d)
            h.addmm_(flat.T, flat)
    return h


def _round(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    limit = quantmath.weight_limit(bits)
    return torch.clamp(torch.round(rows / scale[:, None]), -limit, limit) * scale[:, None]


def _choose_scale(rows: Tensor, energy: Tensor, bits: int) -> Tensor:
    """Choose each row's scale for the least squared error weighted by its inputs' energy (d,)."""
    peak = rows.abs().amax(dim=1)
    base = torch.where(peak > 0, peak, torch.ones_like(peak)) / quantmath.weight_limit(bits)
    best, best_error = base.clone(), torch.full_like(base, torch.inf)
    for share in np.linspace(1.0, quantmath.CLIP_FLOOR[bits], _CLIP_STEPS):
        scale = base * float(share)
        error = ((_round(rows, scale, bits) - rows).square_() @ energy[:, None])[:, 0]
        better = error < best_error
        best[better], best_error[better] = scale[better], error[better]
    return best


def _round_columns(weight: Tensor, h: Tensor, bits: int) -> Tensor:
    """Round weight (O, d) column by column, errors compensated in the columns to come; h (d, d) is overwritten."""
    energy = h.diagonal().clone()
    silent = energy == 0
    rows = weight.clone()
    rows[:, silent] = 0
    if bool(silent.all()):
        return rows
    scale = _choose_scale(rows, energy, bits)
    order = torch.argsort(energy, descending=True, stable=True)
    rows, h = rows[:, order], h[order][:, order]
    h.diagonal()[energy[order] == 0] = 1
    h.diagonal().add_(_DAMPING * float(energy[~silent].mean()))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h.double())), upper=True).float()
    done = torch.empty_like(rows)
    for start in range(0, rows.shape[1], _BLOCK):
        stop = min(start + _BLOCK, rows.shape[1])
        grid, errors = _round_block(rows[:, start:stop].T, upper[start:stop, start:stop], scale, bits)
        done[:, start:stop] = torch.from_numpy(grid.T)
        rows[:, stop:] -= torch.from_numpy(errors).T @ upper[start:stop, stop:]
    result = torch.empty_like(done)
    result[:, order] = done
    return result


def _round_block(columns: Tensor, upper: Tensor, scale: Tensor, bits: int) -> tuple[Array, Array]:
    """Round columns (n, O) one after the other: (grid values, errors divided by the pivot), float32 (n, O) each.

    In numpy: the pieces are too small for torch's threads, which would wait for each other longer than they work.
    """
    left, factors, step = columns.numpy().copy(), upper.numpy(), scale.numpy()
    limit = np.float32(quantmath.weight_limit(bits))
    grid, errors = np.empty_like(left), np.empty_like(left)
    for j in range(len(left)):
        grid[j] = np.clip(np.rint(left[j] / step), -limit, limit) * step
        errors[j] = (left[j] - grid[j]) / factors[j, j]
        left[j + 1 :] -= np.outer(factors[j, j + 1 :], errors[j])
    return grid, errors
