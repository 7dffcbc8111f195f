"""Try every grid on every layer: what it costs on disk, and what it does to the layer's outputs.

Rounding column by column (`rounding`) on the inputs of the float network, on some of the rows where there are many. The
error of an output channel counts by `LayerRelevance.output_cost`, the second-order cost of disturbing it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
from edgecomp.quantmath import Grid
from edgecomp.sparsity import NOTHING, Masks

_ROWS = 64
"""Rows of a group of channels that are tried."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trial:
    """What became of a layer on each grid.

    Attributes:
        rows: int64 (R,): the output channels that were tried.
        share: output channels for each that was tried.
        errors: grid -> float64 (R,): sum of squares of each output's error, over positions, mean over images.
        counts: grid -> (256,): how many codes of -128, -127, ... 127 the whole layer has, as the rows tell.
    """

    rows: Array
    share: float
    errors: Mapping[Grid, Array]
    counts: Mapping[Grid, Array]


def try_grids(
    graph: Graph,
    batches: Sequence[Array],
    formats: Sequence[str],
    *,
    masks: Masks = NOTHING,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Trial]:
    """Round every layer to every grid that is worth weighing, on the inputs of the float network.

    Deterministic for a number of threads.

    Args:
        graph: float.
        batches: preprocessed images float32 (N, C, H, W), one at least.
        formats: "onnx", "tflite", "tflm"; see `artifact.form_of`.
        masks: of the layers in which weights are to be 0; what that costs counts to every grid.
        progress: called after each layer with the number of its weights.

    Returns:
        by layer name.
    """
    weights = {name: as_input(t.data, torch.float32) for name, t in graph.tensors.items() if t.data is not None}
    last_reader = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    values = {graph.inputs[0]: [as_input(x, torch.float32) for x in batches]}
    trials = {}
    with torch.no_grad():
        for i, node in enumerate(graph.nodes):
            names = [name for name in node.inputs if name not in weights]
            parameters = [weights[name] for name in node.inputs if name in weights]
            if node.op in WEIGHTED:
                trials[node.name] = _try(
                    node, parameters[0], values[names[0]], grids_of(graph, node, formats), masks.get(node.name)
                )
                if progress is not None:
                    progress(parameters[0].numel())
            output = node.outputs[0]
            values[output] = [compute(node, [*(values[n][b] for n in names), *parameters]) for b in range(len(batches))]
            for name in set(names):
                if last_reader[name] == i:
                    del values[name]
    return trials


def trial_choices(
    graph: Graph, trials: Mapping[str, Trial], relevance: Relevance, formats: Sequence[str]
) -> list[LayerChoices]:
    """Weigh the grids of every layer by what they did in trials.

    Args:
        graph: float.
        trials: of the same graph, for the same formats.
        relevance: of the same graph.
        formats: "onnx", "tflite", "tflm"; see `artifact.form_of`.
    """
    choices = []
    for node in graph.layers():
        trial = trials[node.name]
        cost = relevance.layers[node.name].output_cost[trial.rows]
        found = {
            grid: (
                trial.share * float(errors @ cost),
                tuple(stored_bits(name, node, grid.bits, trial.counts[grid]) for name in formats),
            )
            for grid, errors in trial.errors.items()
        }
        choices.append(weighed(node.name, int(np.prod(graph.weight(node).shape)), found))
    return choices


def _try(
    node: Node, weight: Tensor, inputs: list[Tensor], grids: Sequence[Grid], mask: Array | None
) -> Trial:
    groups = int(node.attrs["groups"]) if node.op is Op.CONV2D else 1  # type: ignore[arg-type]
    per = weight.shape[0] // groups
    used = enough(node, inputs, weight)
    n_images = sum(len(x) for x in used)
    pick = torch.linspace(0, per - 1, min(per, _ROWS)).long()
    share = per / len(pick)
    steps = {grid: torch.from_numpy(quantmath.grid_scale(weight.numpy(), grid)) for grid in grids if grid.step}
    errors: dict[Grid, list[Array]] = {grid: [] for grid in grids}
    counts = {grid: np.zeros(256) for grid in grids}
    for g in range(groups):
        rows = weight[g * per : (g + 1) * per].flatten(1)[pick]
        kept = None if mask is None else torch.from_numpy(mask[g * per + pick.numpy()]).flatten(1)
        there = rows if kept is None else rows * kept
        found = basis(moments(node, used, g, groups, weight).energy)
        for grid in grids:
            if grid.step is None:
                scale = choose_scale(there, found.energy, grid.bits)
            else:
                scale = steps[grid][g * per : (g + 1) * per][pick]
            rounded = round_columns(rows, found, scale, grid.bits, kept)
            errors[grid].append(rounded.error / n_images)
            counts[grid] += share * np.bincount(rounded.codes.reshape(-1).astype(np.int64) + 128, minlength=256)
    return Trial(
        rows=np.concatenate([g * per + pick.numpy() for g in range(groups)]),
        share=share,
        errors={grid: np.concatenate(of_grid) for grid, of_grid in errors.items()},
        counts=counts,
    )
