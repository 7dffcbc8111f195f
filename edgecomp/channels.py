"""Which channels go next: all layers ranked together, coupled channels as one, none below its layer's floor.

A score says what a channel is worth, usually its mean |relevance|. LRP hands about the same total through every
layer, so scores compare across layers as they are, and wide layers give most; dividing them by the weights that a
channel takes was tried and lost accuracy. Grouped convolutions that are not depthwise keep all their channels, as do
those around them (`groups`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from edgecomp.errors import UsageError
from edgecomp.graph import WEIGHTED, Array, Graph
from edgecomp.groups import Channels, gather_nodes, number_channels

Scores = Mapping[str, Array]
"""Layer name -> float64 (O,): what each output channel is worth; the least goes first."""

MOST_SHARE = 0.95
"""As far as CutPolicy.AUTO and ENOUGH go."""


class CutPolicy(StrEnum):
    """Which channels go, or which single weights.

    ZERO: those that got no relevance in any sample. NONPOSITIVE: those whose relevance is 0 or less on the mean.
    SMALLEST: those worth least, up to a share of the weights. AUTO: the same, as far as measured accuracy allows.
    ENOUGH: the same, until what is left is fast enough.
    """

    ZERO = "zero"
    NONPOSITIVE = "nonpositive"
    SMALLEST = "smallest"
    AUTO = "auto"
    ENOUGH = "enough"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning:
    """What is to be cut: channels, or single weights to be set to 0.

    Attributes:
        policy: which ones.
        share: of the weights, for SMALLEST.
    """

    policy: CutPolicy = CutPolicy.ZERO
    share: float = 0.0

    def slices(self) -> Sequence[float]:
        """Give the shares of the weights to be gone after each round; one round for what is cut at once."""
        if self.policy in (CutPolicy.ZERO, CutPolicy.NONPOSITIVE):
            return (0.0,)
        return slices(MOST_SHARE if self.policy in (CutPolicy.AUTO, CutPolicy.ENOUGH) else self.share)

    def text(self) -> str:
        """Say it as --prune and --sparsify take it."""
        return f"{self.share:g}" if self.policy is CutPolicy.SMALLEST else self.policy.value


IRRELEVANT = Pruning()
"""Only what got no relevance at all."""


def parse_pruning(text: str, option: str = "--prune") -> Pruning:
    """Read what --prune and --sparsify take: zero, nonpositive, auto, or a share of the weights from 0 to below 1.

    Raises:
        UsageError: anything else.
    """
    if text in ("zero", "nonpositive", "auto"):
        return Pruning(policy=CutPolicy(text))
    try:
        share = float(text)
    except ValueError:
        share = float("nan")
    if not 0 <= share < 1:
        raise UsageError(f"{option} {text!r:.40}: expected zero, nonpositive, auto, or a share from 0 to below 1")
    return Pruning(policy=CutPolicy.SMALLEST, share=share)


def floors(graph: Graph, share: float) -> dict[str, int]:
    """Give the least number of output channels that each layer keeps: this share of them, and at least one.

    Raises:
        UsageError: the share is not within 0..1.
    """
    if not 0 <= share <= 1:
        raise UsageError(f"floor {share:g}: expected a share of each layer's channels, from 0 to 1")
    return {node.name: max(1, int(np.ceil(share * graph.weight(node).shape[0]))) for node in graph.layers()}


def weights_left(graph: Graph, channels: Channels, kept: Array) -> int:
    """Count the weights (biases left out) that remain when only the channel numbers flagged in `kept` do."""
    total = 0
    for node in graph.layers():
        _, width, *kernel = graph.weight(node).shape
        rows = int(kept[channels.of[node.outputs[0]]].sum())
        if node.attrs.get("groups", 1) == 1:
            width = int(kept[channels.of[node.inputs[0]]].sum())
        total += rows * width * int(np.prod(kernel))
    return total


def rank(graph: Graph, channels: Channels, scores: Scores, least: Mapping[str, int]) -> list[int]:
    """Order the channel numbers that can go, the least worth first.

    Args:
        graph: float.
        channels: of `graph`.
        scores: of its layers; coupled channels count together.
        least: layer name -> output channels that stay; a number that would break one is passed over.

    Raises:
        UsageError: scores do not fit the graph, or hold NaN.
    """
    total = np.zeros(len(channels.locked))
    owners: dict[int, list[tuple[str, int]]] = {}
    left: dict[str, int] = {}
    for node in (*graph.layers(), *gather_nodes(graph)):
        numbers = channels.of[node.outputs[0]]
        if node.op in WEIGHTED:
            score = np.asarray(scores.get(node.name, np.empty(0)), dtype=np.float64)
            if score.shape != numbers.shape or not np.isfinite(score).all():
                raise UsageError(
                    f"scores of layer {node.name!r}: {score.shape}, expected {numbers.shape} finite numbers"
                )
            np.add.at(total, numbers, score)
        left[node.name] = len(numbers)
        for number, count in zip(*np.unique(numbers, return_counts=True), strict=True):
            owners.setdefault(int(number), []).append((node.name, int(count)))
    free = np.array([n for n in sorted(owners) if not channels.locked[n]], dtype=np.int64)
    order = []
    for number in free[np.argsort(total[free], kind="stable")].tolist():
        if all(left[name] - count >= least.get(name, 1) for name, count in owners[number]):
            order.append(number)
            for name, count in owners[number]:
                left[name] -= count
    return order


def keep_flags(graph: Graph, channels: Channels, kept: Array) -> dict[str, tuple[bool, ...]]:
    """Turn flags by channel number into flags by layer, as `compress.cut` takes them."""
    return {node.name: tuple(kept[channels.of[node.outputs[0]]].tolist()) for node in graph.layers()}


def next_slice(graph: Graph, scores: Scores, least: Mapping[str, int], n_weights: int) -> dict[str, tuple[bool, ...]]:
    """Drop the channels worth least, just enough that at most `n_weights` weights remain, or all that the floors allow.

    Arguments and errors as `rank`.

    Returns:
        layer name -> keep flag of each output channel.
    """
    channels = number_channels(graph)
    order = rank(graph, channels, scores, least)

    def kept(count: int) -> Array:
        flags = np.ones(len(channels.locked), dtype=bool)
        flags[order[:count]] = False
        return flags

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if weights_left(graph, channels, kept(middle)) <= n_weights:
            high = middle
        else:
            low = middle + 1
    return keep_flags(graph, channels, kept(low))


def not_above(
    graph: Graph, scores: Scores, least: Mapping[str, int], limit: float = 0.0
) -> dict[str, tuple[bool, ...]]:
    """Drop every channel whose score, coupled ones added up, is at most `limit`, as far as the floors allow.

    With signed relevance and 0 this is the rule of Soroush et al.: what speaks against the decisions goes.

    Arguments and errors as `rank`; returns what `next_slice` does.
    """
    channels = number_channels(graph)
    total = np.zeros(len(channels.locked))
    for node in graph.layers():
        np.add.at(total, channels.of[node.outputs[0]], scores[node.name])
    flags = np.ones(len(channels.locked), dtype=bool)
    for number in rank(graph, channels, scores, least):
        flags[number] = total[number] > limit
    return keep_flags(graph, channels, flags)


def slices(share: float, step: float = 0.6) -> Sequence[float]:
    """Divide the way to a share of the weights cut: of what is there, each round leaves at least `step`.

    Raises:
        UsageError: the share is not within 0..1, or 1 itself.
    """
    if not 0 <= share < 1:
        raise UsageError(f"{share:g}: expected a share of the weights, from 0 to below 1")
    rounds = max(1, int(np.ceil(np.log(1 - share) / np.log(step) - 1e-9)))
    return [1 - (1 - share) ** (k / rounds) for k in range(1, rounds + 1)]
