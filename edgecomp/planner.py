"""Decide what becomes of each layer: which channels go, and on which grid the weights are rounded.

Every grid costs bits on disk, and an error: what rounding does to the layer's outputs, weighted by what each output
channel means to the explained answer. Layers add up, so the best grids under a budget are a multiple-choice knapsack,
solved by dynamic programming. Errors and costs come from rounding itself: with reconstruction from trials
(`pytorch.trial`), without it from `layer_choices`.

A ladder is the other way, that of papers in which higher scores get more bits: widths follow from a score of each layer
and one level for all of them, and no error is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from edgecomp import quantmath
from edgecomp.coding import PACKED_FORMS, stored_bits
from edgecomp.errors import BudgetError
from edgecomp.graph import Array, Graph, Node
from edgecomp.groups import Channels, gather_nodes, number_channels
from edgecomp.plan import Relevance
from edgecomp.quantmath import Grid
from edgecomp.sparsity import Masks

_BUDGET_STEPS = 1 << 16

_DENSE = tuple(Grid(bits=bits) for bits in quantmath.WEIGHT_BITS)
_STEPS = (0.2, 0.28, 0.4, 0.55, 0.75, 1.0, 1.4, 1.9, 2.6, 3.6, 5.0, 7.0, 10.0)
_FOUR_BIT_STEP = 0.7
"""From this step on, 7 steps each way hold all weights but a few; finer grids need more of them."""
_COARSE = tuple(Grid(bits=4 if step > _FOUR_BIT_STEP else 6, step=step) for step in _STEPS)


def grids_of(graph: Graph, node: Node, formats: Sequence[str]) -> tuple[Grid, ...]:
    """List the grids worth weighing for a layer.

    Grids with a step of their own pay where a format stores frequent codes in fewer bits, and a layer is large enough
    for that; in layers with one input channel a group there is too little to gain. TFLite that is not packed stores 5
    to 7 bits as 8: where it is asked for, what the other format would gain by them is not worth a file of twice the
    size.
    """
    if graph.weight(node).shape[1] == 1:
        return _DENSE
    grids = (*_COARSE, *_DENSE) if PACKED_FORMS & set(formats) else _DENSE
    return grids if set(formats) <= PACKED_FORMS else tuple(grid for grid in grids if grid.bits in (2, 3, 4, 8))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoices:
    """What a planner may choose for one layer.

    Attributes:
        name: the layer.
        n_weights: weights that remain after cutting.
        error: grid -> weighted squared error of what the layer gives.
        stored_bits: grid -> bits all its weights take on disk, as the budget counts them.
        per_format: grid -> bits all its weights take in each of the formats asked for.
    """

    name: str
    n_weights: int
    error: Mapping[Grid, float]
    stored_bits: Mapping[Grid, int]
    per_format: Mapping[Grid, tuple[int, ...]] = field(default_factory=dict)

    def counted(self, count: Callable[[Sequence[int]], int]) -> LayerChoices:
        """Give the same choices with the budget counting another of the formats: `min` or `max` of their bits."""
        return replace(self, stored_bits={grid: count(stored) for grid, stored in self.per_format.items()})

    def cheapest_only(self) -> LayerChoices:
        """Give only those grids that take the least room, as the budget counts it."""
        least = min(self.stored_bits.values())
        kept = [grid for grid, stored in self.stored_bits.items() if stored == least]
        return replace(
            self,
            error={grid: self.error[grid] for grid in kept},
            stored_bits={grid: least for grid in kept},
            per_format={grid: self.per_format[grid] for grid in kept},
        )

    def in_full(self) -> LayerChoices:
        """Give only the whole widths, every code counted with all its bits, as ONNX stores them in any case."""
        kept = [grid for grid in self.error if grid.step is None]
        return replace(
            self,
            error={grid: self.error[grid] for grid in kept},
            stored_bits={grid: self.n_weights * grid.bits for grid in kept},
            per_format={grid: self.per_format[grid] for grid in kept if grid in self.per_format},
        )

    def cheapest(self) -> Grid:
        """Give the grid that takes the least room in every format."""
        return min(self.error, key=lambda g: (self.stored_bits[g], self.per_format.get(g, ()), self.error[g]))

    def best(self) -> Grid:
        """Give the grid with the least error."""
        return min(self.error, key=lambda grid: (self.error[grid], self.stored_bits[grid]))


def weighed(name: str, n_weights: int, found: Mapping[Grid, tuple[float, tuple[int, ...]]]) -> LayerChoices:
    """Make a layer's choices of what was found for each grid; those that another beats everywhere are left out.

    The budget counts the format that stores least, so that one that stores 3 bits as 4 does not stop another from
    having 3.

    Args:
        name: the layer.
        n_weights: weights that remain.
        found: grid -> (error, bits on disk in each format).
    """
    kept: dict[Grid, tuple[float, tuple[int, ...]]] = {}
    for grid, (error, stored) in sorted(found.items(), key=lambda item: (item[1][0], item[1][1])):
        if not any(all(a <= b for a, b in zip(other, stored, strict=True)) for _, other in kept.values()):
            kept[grid] = (error, stored)
    return LayerChoices(
        name=name,
        n_weights=n_weights,
        error={grid: error for grid, (error, _) in kept.items()},
        stored_bits={grid: min(stored) for grid, (_, stored) in kept.items()},
        per_format={grid: stored for grid, (_, stored) in kept.items()},
    )


def irrelevant_channels(graph: Graph, relevance: Relevance) -> dict[str, tuple[bool, ...]]:
    """Keep every channel that got any relevance in any sample; drop coupled channels only together.

    Such a channel never took part in a decision on the samples: its activation or all that reads it is zero. At least
    one channel of each layer stays.

    Args:
        graph: float.
        relevance: of the same graph.

    Returns:
        layer name -> keep flag of each output channel.
    """
    channels = number_channels(graph)
    total = np.zeros(len(channels.locked))
    for node in graph.layers():
        np.add.at(total, channels.of[node.outputs[0]], relevance.layers[node.name].channel_abs)
    kept = channels.locked | (total > 0)
    for node in (*graph.layers(), *gather_nodes(graph)):
        numbers = channels.of[node.outputs[0]]
        if not kept[numbers].any():
            kept[numbers[0]] = True
    return {node.name: tuple(kept[channels.of[node.outputs[0]]].tolist()) for node in graph.layers()}


def layer_choices(
    graph: Graph,
    relevance: Relevance,
    keep: Mapping[str, tuple[bool, ...]],
    formats: Sequence[str],
    *,
    progress: Callable[[int], object] | None = None,
) -> list[LayerChoices]:
    """Weigh the grids of every layer when weights are rounded to the nearest code.

    The error is the relevance-weighted sum of squares  sum_w C_w (w - Q(w))^2  with C_w = E[(R_w / w)^2], the
    second-order cost of disturbing a weight (R_w = w df/dw in the epsilon limit of LRP).

    Args:
        graph: float.
        relevance: of the same graph.
        keep: layer name -> keep flags.
        formats: "onnx", "tflite", "tflm"; see `artifact.form_of`.
        progress: called after each layer with the number of its weights.
    """
    channels = number_channels(graph)
    kept_inputs = _kept_inputs(graph, channels, keep)
    choices = []
    for node in graph.layers():
        weight = graph.weight(node).data
        assert weight is not None
        rows, columns = np.array(keep[node.name]), kept_inputs[node.name]
        data = weight[rows][:, columns]
        cost = relevance.layers[node.name].weight_cost[rows][:, columns]
        found = {}
        for grid in grids_of(graph, node, formats):
            scale = quantmath.grid_scale(data, grid)
            codes = quantmath.quantize_weight(data, scale, grid.bits)
            off = codes.reshape(len(data), -1) * scale[:, None] - data.reshape(len(data), -1)
            error = np.einsum("oi,oi,oi->o", off, off, cost.reshape(off.shape), dtype=np.float32)
            counts = np.bincount(codes.reshape(-1).astype(np.intp) + 128, minlength=256)
            stored = tuple(stored_bits(name, node, grid.bits, counts) for name in formats)
            found[grid] = (float(error.sum(dtype=np.float64)), stored)
        choices.append(weighed(node.name, data.size, found))
        if progress is not None:
            progress(weight.size)
    return choices


def _kept_inputs(graph: Graph, channels: Channels, keep: Mapping[str, tuple[bool, ...]]) -> dict[str, Array]:
    """Give, for each layer, a flag for each input channel of its weight: True where it remains."""
    kept = np.ones(len(channels.locked), dtype=bool)
    for node in graph.layers():
        kept[channels.of[node.outputs[0]]] = keep[node.name]
    inputs = {}
    for node in graph.layers():
        width = graph.weight(node).shape[1]
        numbers = channels.of[node.inputs[0]]
        inputs[node.name] = kept[numbers] if len(numbers) == width else np.ones(width, dtype=bool)
    return inputs


def solve(choices: Sequence[LayerChoices], budget_bits: float) -> dict[str, Grid]:
    """Choose the grids with the least error whose weights take at most `budget_bits` bits on disk.

    Exact but for rounding costs up to 1/65536 of the budget; never over the budget.

    Returns:
        layer name -> grid.

    Raises:
        BudgetError: even the smallest grids take more.
    """
    smallest = {c.name: c.cheapest() for c in choices}
    least = total_bits(choices, smallest)
    if least > budget_bits:
        total = sum(c.n_weights for c in choices)
        raise BudgetError(
            f"budget: {budget_bits / 8:.0f} bytes of weights asked for, the least possible are {-(-least // 8)} "
            f"({least / total:.2f} bits a weight); allow more, or a format that stores fewer bits"
        )
    unit = max(1.0, budget_bits / _BUDGET_STEPS)
    room = int(budget_bits // unit)
    best = np.zeros(room + 1)
    picks: list[tuple[list[Grid], Array]] = []
    for c in choices:
        grids = list(c.error)
        candidates = np.full((len(grids), room + 1), np.inf)
        for row, grid in enumerate(grids):
            units = int(np.ceil(c.stored_bits[grid] / unit))
            if units <= room:
                candidates[row, units:] = best[: room + 1 - units] + c.error[grid]
        pick = np.argmin(candidates, axis=0)
        best = np.take_along_axis(candidates, pick[None], axis=0)[0]
        picks.append((grids, pick))
    if not np.isfinite(best[room]):
        # Only rounding of the costs stands in the way: the smallest grids fit exactly.
        return _filled(choices, smallest, budget_bits)
    chosen: dict[str, Grid] = {}
    left = room
    for c, (grids, pick) in zip(reversed(choices), reversed(picks), strict=True):
        grid = grids[int(pick[left])]
        chosen[c.name] = grid
        left -= int(np.ceil(c.stored_bits[grid] / unit))
    return _filled(choices, {c.name: chosen[c.name] for c in choices}, budget_bits)


def _filled(choices: Sequence[LayerChoices], grids: dict[str, Grid], budget_bits: float) -> dict[str, Grid]:
    """Spend what rounding of the costs has left over: the step with the most gain for a bit, as long as one fits."""
    left = budget_bits - total_bits(choices, grids)
    while True:
        steps = []
        for c in choices:
            now = grids[c.name]
            for grid, error in c.error.items():
                more = c.stored_bits[grid] - c.stored_bits[now]
                if error < c.error[now] and more <= left:
                    steps.append(((c.error[now] - error) / max(1, more), more, c, grid))
        if not steps:
            return grids
        _, more, c, grid = max(steps, key=lambda step: step[0])
        left -= more
        grids = {**grids, c.name: grid}


def total_bits(choices: Sequence[LayerChoices], grids: Mapping[str, Grid]) -> int:
    """Add up the bits that the weights take on disk."""
    return sum(c.stored_bits[grids[c.name]] for c in choices)


def mean_bits(choices: Sequence[LayerChoices], grids: Mapping[str, Grid]) -> float:
    """Average the bits on disk over the weights that remain."""
    return total_bits(choices, grids) / sum(c.n_weights for c in choices)


def solve_mean_bits(choices: Sequence[LayerChoices], asked: float) -> dict[str, Grid]:
    """Choose grids whose mean over the remaining weights, as stored, is at most `asked`.

    Raises:
        BudgetError: the formats cannot store so few bits.
    """
    return solve(choices, asked * sum(c.n_weights for c in choices))


def search_file_size(
    choices: Sequence[LayerChoices], limit_bytes: int, file_bytes: Callable[[Mapping[str, Grid]], int]
) -> dict[str, Grid]:
    """Choose grids with the least error whose largest file, really written, has at most `limit_bytes`.

    Args:
        choices: of every layer.
        limit_bytes: of the largest file.
        file_bytes: grids -> bytes of the largest file.

    Raises:
        BudgetError: the smallest grids give a larger file.
    """
    smallest = {c.name: c.cheapest() for c in choices}
    overhead = 0
    for _ in range(8):
        room_bits = 8 * (limit_bytes - overhead)
        if room_bits < total_bits(choices, smallest):
            break
        grids = solve(choices, room_bits)
        n_bytes = file_bytes(grids)
        if n_bytes <= limit_bytes:
            return grids
        # What is not weights hardly depends on the grids; leave that much room, and never less than before.
        weight_bytes = total_bits(choices, grids) // 8
        overhead = max(overhead + 1, n_bytes - weight_bytes)
    least = file_bytes(smallest)
    if least <= limit_bytes:
        return smallest
    raise BudgetError(
        f"budget: a file of {limit_bytes} bytes asked for, the smallest possible has {least} bytes; allow more"
    )


def search_drop(
    choices: Sequence[LayerChoices],
    most_points: float,
    drop_points: Callable[[Mapping[str, Grid]], float],
    *,
    progress: Callable[[int], object] | None = None,
) -> tuple[dict[str, Grid], float]:
    """Search the smallest weights whose measured loss of accuracy is at most `most_points`, by bisection.

    The loss is taken to fall with the bits spent; noise in it can cost some bytes, but what is returned was measured.

    Args:
        choices: of every layer.
        most_points: percentage points of accuracy that may be lost.
        drop_points: grids -> measured loss in points, negative for a gain.
        progress: called after each measurement with 1; there are at most DROP_STEPS.

    Returns:
        the grids and their measured loss; those with the least error where even they lose more.
    """
    finest = {c.name: c.best() for c in choices}
    low = float(total_bits(choices, {c.name: c.cheapest() for c in choices}))
    high = float(total_bits(choices, finest))

    def measured(grids: Mapping[str, Grid]) -> float:
        loss = drop_points(grids)
        if progress is not None:
            progress(1)
        return loss

    best, best_loss = finest, measured(finest)
    if best_loss > most_points:
        return best, best_loss
    for _ in range(DROP_STEPS - 1):
        # In the middle of the ratio: sizes worth having lie far below that of the finest grids.
        middle = (low * high) ** 0.5
        grids = solve(choices, middle)
        if grids == best:
            high = middle
            continue
        loss = measured(grids)
        if loss <= most_points:
            best, best_loss, high = grids, loss, middle
        else:
            low = middle
    return best, best_loss


DROP_STEPS = 8
"""Measurements of `search_drop`: a range of 1 to 16 in size is then narrowed to 2 %."""


# ---- ladders ---------------------------------------------------------------------------------------------------------


def layer_scores(relevance: Relevance, masks: Masks) -> dict[str, float]:
    """Average the absolute value of the mean relevance over the weights of each layer that are not masked.

    Returns:
        by layer name; 0 where all weights are masked.
    """
    found = {}
    for name, layer in relevance.layers.items():
        size = np.abs(layer.weight[masks[name]] if name in masks else layer.weight)
        found[name] = float(size.mean(dtype=np.float64)) if size.size else 0.0
    return found


def ladder(scores: Mapping[str, float], widths: Sequence[int]) -> list[dict[str, Grid]]:
    """List the ways to give layers widths by their scores: each rung as a level c rises, from the fewest bits on.

    At level c a layer has the width nearest to c + log2(score) / 2, the larger of two as near: four times the score is
    worth a bit. Where scores are second moments of errors that a width should even out, this is what theory asks for
    (reverse water-filling); the papers publish no table. A layer of score 0 has the least width at every level.

    Args:
        scores: layer name -> 0 or more.
        widths: to choose from, rising.

    Returns:
        layer name -> grid for every rung; of neighbours one or more layers differ, always upwards.
    """
    middles = [(a + b) / 2 for a, b in pairwise(widths)]
    heights = {name: 0.5 * float(np.log2(score)) for name, score in scores.items() if score > 0}
    # The level from which on a layer has at least a width.
    starts = {name: [middle - height for middle in middles] for name, height in heights.items()}
    levels = sorted({start for of_layer in starts.values() for start in of_layer})

    def width(name: str, level: float) -> int:
        return widths[sum(start <= level for start in starts.get(name, ()))]

    return [{name: Grid(bits=width(name, level)) for name in scores} for level in (-np.inf, *levels)]


def highest_rung(n_rungs: int, fits: Callable[[int], bool]) -> int | None:
    """Search the highest rung that fits, by bisection; None where not even the lowest does.

    What is measured is taken to rise with the rung; where it does not, a higher one may be missed.
    """
    low, high = -1, n_rungs
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low if low >= 0 else None
