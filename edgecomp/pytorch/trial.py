"""Try every grid on every layer: what it costs on disk, and what it does to the layer's outputs.

Rounding column by column (`rounding`) on the inputs of the float network, on some of the rows where there are many. The
error of an output channel counts by `LayerRelevance.output_cost`, the second-order cost of disturbing it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from edgecomp import quantmath
from edgecomp.coding import stored_bits
from edgecomp.graph import WEIGHTED, Array, Graph, Node, Op
from edgecomp.plan import Relevance
from edgecomp.planner import LayerChoices, grids_of, weighed
from edgecomp.pytorch.network import as_input, compute
from edgecomp.pytorch.rounding import basis, choose_scale, enough, moments, round_columns

_ROWS = 64
"""Rows of a group of channels that are tried."""


def trial_choices(
    graph: Graph,
    relevance: Relevance,
    batches: Sequence[Array],
    formats: Sequence[str],
    *,
    progress: Callable[[int], object] | None = None,
) -> list[LayerChoices]:
    """Weigh the grids of every layer by rounding them on real inputs.

    Deterministic for a number of threads.

    Args:
        graph: float.
        relevance: of the same graph.
        batches: preprocessed images float32 (N, C, H, W), one at least.
        formats: "onnx", "tflite".
        progress: called after each layer with the number of its weights.
    """
    weights = {name: as_input(t.data, torch.float32) for name, t in graph.tensors.items() if t.data is not None}
    last_reader = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    values = {graph.inputs[0]: [as_input(x, torch.float32) for x in batches]}
    choices = []
    with torch.no_grad():
        for i, node in enumerate(graph.nodes):
            names = [name for name in node.inputs if name not in weights]
            parameters = [weights[name] for name in node.inputs if name in weights]
            if node.op in WEIGHTED:
                cost = relevance.layers[node.name].output_cost
                choices.append(_try(graph, node, parameters[0], values[names[0]], cost, formats))
                if progress is not None:
                    progress(parameters[0].numel())
            output = node.outputs[0]
            values[output] = [compute(node, [*(values[n][b] for n in names), *parameters]) for b in range(len(batches))]
            for name in set(names):
                if last_reader[name] == i:
                    del values[name]
    return choices


def _try(
    graph: Graph, node: Node, weight: Tensor, inputs: list[Tensor], cost: Array, formats: Sequence[str]
) -> LayerChoices:
    groups = int(node.attrs["groups"]) if node.op is Op.CONV2D else 1  # type: ignore[arg-type]
    per = weight.shape[0] // groups
    used = enough(node, inputs, weight)
    n_images = sum(len(x) for x in used)
    grids = grids_of(graph, node, formats)
    steps = {grid: torch.from_numpy(quantmath.grid_scale(weight.numpy(), grid)) for grid in grids if grid.step}
    error = dict.fromkeys(grids, 0.0)
    counts = {grid: np.zeros(256) for grid in grids}
    for g in range(groups):
        rows = weight[g * per : (g + 1) * per].flatten(1)
        found = basis(moments(node, used, g, groups, weight).energy)
        pick = torch.linspace(0, per - 1, min(per, _ROWS)).long()
        share = per / len(pick)
        row_cost = cost[g * per : (g + 1) * per][pick.numpy()]
        for grid in grids:
            if grid.step is None:
                scale = choose_scale(rows[pick], found.energy, grid.bits)
            else:
                scale = steps[grid][g * per : (g + 1) * per][pick]
            rounded = round_columns(rows[pick], found, scale, grid.bits)
            error[grid] += share * float(rounded.error @ row_cost) / n_images
            counts[grid] += share * np.bincount(rounded.codes.reshape(-1).astype(np.int64) + 128, minlength=256)
    options = {
        grid: (error[grid], tuple(stored_bits(name, node, grid.bits, counts[grid]) for name in formats))
        for grid in grids
    }
    return weighed(node.name, weight.numel(), options)
