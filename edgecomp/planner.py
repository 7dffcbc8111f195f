"""Decide what becomes of each layer: which channels go, and how many bits the weights get.

The error of rounding a layer to b bits is the relevance-weighted sum of squares  sum_w C_w (w - Q_b(w))^2  with
C_w = E[(R_w / w)^2], the second-order cost of disturbing a weight (R_w = w df/dw in the epsilon limit of LRP). Layers
add up, so the best bits under a budget are a multiple-choice knapsack, solved by dynamic programming.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from edgecomp import quantmath
from edgecomp.errors import BudgetError
from edgecomp.graph import Array, Graph
from edgecomp.groups import Channels, number_channels
from edgecomp.packing import stored_bits
from edgecomp.plan import Relevance

_BUDGET_STEPS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoices:
    """What a planner may choose for one layer.

    Attributes:
        name: the layer.
        n_weights: weights that remain after cutting.
        error: bits -> relevance-weighted squared rounding error.
        stored_bits: bits -> bits a weight takes on disk, as the budget counts them.
        per_format: bits -> bits a weight takes in each of the formats asked for.
    """

    name: str
    n_weights: int
    error: Mapping[int, float]
    stored_bits: Mapping[int, int]
    per_format: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def counted(self, count: Callable[[Sequence[int]], int]) -> LayerChoices:
        """Give the same choices with the budget counting another of the formats: `min` or `max` of their bits."""
        return replace(self, stored_bits={bits: count(stored) for bits, stored in self.per_format.items()})

    def cheapest_only(self) -> LayerChoices:
        """Give only those widths that take the least room, as the budget counts it."""
        least = min(self.stored_bits.values())
        kept = [bits for bits, stored in self.stored_bits.items() if stored == least]
        return replace(
            self,
            error={bits: self.error[bits] for bits in kept},
            stored_bits={bits: least for bits in kept},
            per_format={bits: self.per_format[bits] for bits in kept},
        )

    def cost(self, bits: int) -> int:
        """Count the bits that the layer's weights take on disk."""
        return self.n_weights * self.stored_bits[bits]

    def cheapest(self) -> int:
        """Give the width that takes the least room, in every format."""
        return min(self.error, key=lambda bits: (self.stored_bits[bits], bits))

    def dearest(self) -> int:
        """Give the width with the least error."""
        return max(self.error)


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
    for node in graph.layers():
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
    """Work out error and cost of every width of every layer.

    A width is left out when a larger one takes no more room in any of the formats: it could only lose. The budget
    counts the format that stores least, so that one that stores 3 bits as 4 does not stop another from having 3.

    Args:
        graph: float.
        relevance: of the same graph.
        keep: layer name -> keep flags.
        formats: "onnx", "tflite".
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
        per_format = {
            bits: tuple(stored_bits(name, node, bits) for name in formats)
            for bits in quantmath.WEIGHT_BITS
        }
        useful = [b for b in per_format if not any(per_format[w] == per_format[b] for w in per_format if w > b)]
        choices.append(
            LayerChoices(
                name=node.name,
                n_weights=data.size,
                error={bits: _rounding_error(data, cost, bits) for bits in useful},
                stored_bits={bits: min(per_format[bits]) for bits in useful},
                per_format={bits: per_format[bits] for bits in useful},
            )
        )
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


def _rounding_error(weight: Array, cost: Array, bits: int) -> float:
    scale = quantmath.choose_weight_scale(weight, bits)
    codes = quantmath.quantize_weight(weight, scale, bits).reshape(weight.shape[0], -1)
    off = codes * scale[:, None] - weight.reshape(weight.shape[0], -1)
    return float(np.einsum("oi,oi,oi->o", off, off, cost.reshape(off.shape), dtype=np.float32).sum(dtype=np.float64))


def solve(choices: Sequence[LayerChoices], budget_bits: float) -> dict[str, int]:
    """Choose the widths with the least error whose weights take at most `budget_bits` bits on disk.

    Exact but for rounding costs up to 1/65536 of the budget; never over the budget.

    Returns:
        layer name -> bits.

    Raises:
        BudgetError: even the smallest widths take more.
    """
    smallest = {c.name: c.cheapest() for c in choices}
    least = sum(c.cost(smallest[c.name]) for c in choices)
    if least > budget_bits:
        total = sum(c.n_weights for c in choices)
        raise BudgetError(
            f"budget: {budget_bits / 8:.0f} bytes of weights asked for, the least possible are {-(-least // 8)} "
            f"({least / total:.2f} bits a weight); allow more, or a format that stores fewer bits"
        )
    unit = max(1.0, budget_bits / _BUDGET_STEPS)
    room = int(budget_bits // unit)
    best = np.zeros(room + 1)
    picks: list[tuple[list[int], Array]] = []
    for c in choices:
        widths = sorted(c.error)
        candidates = np.full((len(widths), room + 1), np.inf)
        for row, bits in enumerate(widths):
            units = int(np.ceil(c.cost(bits) / unit))
            if units <= room:
                candidates[row, units:] = best[: room + 1 - units] + c.error[bits]
        pick = np.argmin(candidates, axis=0)
        best = np.take_along_axis(candidates, pick[None], axis=0)[0]
        picks.append((widths, pick))
    if not np.isfinite(best[room]):
        # Only rounding of the costs stands in the way: the smallest widths fit exactly.
        return _filled(choices, smallest, budget_bits)
    chosen: dict[str, int] = {}
    left = room
    for c, (widths, pick) in zip(reversed(choices), reversed(picks), strict=True):
        bits = widths[int(pick[left])]
        chosen[c.name] = bits
        left -= int(np.ceil(c.cost(bits) / unit))
    return _filled(choices, {c.name: chosen[c.name] for c in choices}, budget_bits)


def _filled(choices: Sequence[LayerChoices], bits: dict[str, int], budget_bits: float) -> dict[str, int]:
    """Spend what rounding of the costs has left over: the step with the most gain for a bit, as long as one fits."""
    left = budget_bits - sum(c.cost(bits[c.name]) for c in choices)
    while True:
        steps = [
            ((c.error[bits[c.name]] - c.error[wider]) / max(1, c.cost(wider) - c.cost(bits[c.name])), c, wider)
            for c in choices
            for wider in c.error
            if wider > bits[c.name]
            and c.error[wider] < c.error[bits[c.name]]
            and c.cost(wider) - c.cost(bits[c.name]) <= left
        ]
        if not steps:
            return bits
        _, c, wider = max(steps, key=lambda step: step[0])
        left -= c.cost(wider) - c.cost(bits[c.name])
        bits = {**bits, c.name: wider}


def mean_bits(choices: Sequence[LayerChoices], bits: Mapping[str, int]) -> float:
    """Average the logical widths over the weights that remain."""
    return sum(c.n_weights * bits[c.name] for c in choices) / sum(c.n_weights for c in choices)


def solve_mean_bits(choices: Sequence[LayerChoices], asked: float) -> dict[str, int]:
    """Choose widths whose mean over the remaining weights, as stored, is at most `asked`.

    Raises:
        BudgetError: the formats cannot store so few bits.
    """
    return solve(choices, asked * sum(c.n_weights for c in choices))


def search_file_size(
    choices: Sequence[LayerChoices], limit_bytes: int, file_bytes: Callable[[Mapping[str, int]], int]
) -> dict[str, int]:
    """Choose widths with the least error whose largest file, really written, has at most `limit_bytes`.

    Args:
        choices: of every layer.
        limit_bytes: of the largest file.
        file_bytes: widths -> bytes of the largest file.

    Raises:
        BudgetError: the smallest widths give a larger file.
    """
    smallest = {c.name: c.cheapest() for c in choices}
    overhead = 0
    for _ in range(8):
        room_bits = 8 * (limit_bytes - overhead)
        if room_bits < sum(c.cost(smallest[c.name]) for c in choices):
            break
        bits = solve(choices, room_bits)
        n_bytes = file_bytes(bits)
        if n_bytes <= limit_bytes:
            return bits
        # What is not weights hardly depends on the widths; leave that much room, and never less than before.
        weight_bytes = sum(c.cost(bits[c.name]) for c in choices) // 8
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
    drop_points: Callable[[Mapping[str, int]], float],
    *,
    progress: Callable[[int], object] | None = None,
) -> tuple[dict[str, int], float]:
    """Search the smallest weights whose measured loss of accuracy is at most `most_points`, by bisection.

    The loss is taken to fall with the bits spent; noise in it can cost some bytes, but what is returned was measured.

    Args:
        choices: of every layer.
        most_points: percentage points of accuracy that may be lost.
        drop_points: widths -> measured loss in points, negative for a gain.
        progress: called after each measurement with 1; there are at most DROP_STEPS.

    Returns:
        the widths and their measured loss; those of the largest widths where even they lose more.
    """
    largest = {c.name: c.dearest() for c in choices}
    smallest = {c.name: c.cheapest() for c in choices}
    low = float(sum(c.cost(smallest[c.name]) for c in choices))
    high = float(sum(c.cost(largest[c.name]) for c in choices))

    def measured(bits: Mapping[str, int]) -> float:
        loss = drop_points(bits)
        if progress is not None:
            progress(1)
        return loss

    best, best_loss = largest, measured(largest)
    if best_loss > most_points:
        return best, best_loss
    for _ in range(DROP_STEPS - 1):
        middle = (low + high) / 2
        bits = solve(choices, middle)
        if bits == best:
            high = middle
            continue
        loss = measured(bits)
        if loss <= most_points:
            best, best_loss, high = bits, loss, middle
        else:
            low = middle
    return best, best_loss


DROP_STEPS = 8
"""Measurements of `search_drop`: the mean width is then known to 6 / 2^7 bits."""
