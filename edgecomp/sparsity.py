"""Which single weights go next: all layers ranked together, none below its floor.

What is decided is a mask for each layer. It travels beside the graph: a weight that happens to be 0 is no masked one.
A score says what a weight is worth, see `pytorch.scores.Scorer.weights`; what is worth least goes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from edgecomp.compress import cut
from edgecomp.errors import UsageError
from edgecomp.graph import Array, Graph

Masks = Mapping[str, Array]
"""Layer name -> bool, the weight's shape: True where the weight stays. A layer that is missing keeps all of them."""

NOTHING: Masks = MappingProxyType({})
"""No weight is masked."""

WeightScores = Mapping[str, Array]
"""Layer name -> float, the weight's shape: what each weight is worth."""

FLOOR = 0.01
"""Share of its weights that every layer keeps."""


def masked(graph: Graph, masks: Masks) -> Graph:
    """Set masked weights of a float graph to 0."""
    tensors = dict(graph.tensors)
    for node in graph.layers():
        if node.name in masks:
            weight = graph.weight(node)
            assert weight.data is not None
            # Not a product: -1 * 0 would be -0, and inf * 0 no number.
            data = np.where(masks[node.name], weight.data, np.float32(0))
            tensors[weight.name] = replace(weight, data=data)
    return replace(graph, tensors=tensors)


def cut_masks(graph: Graph, masks: Masks, keep: Mapping[str, tuple[bool, ...]]) -> Masks:
    """Give the masks of what `compress.cut` leaves of a graph.

    Args:
        graph: float, the masks are of.
        masks: of its layers.
        keep: layer name -> a flag for each output channel.
    """
    if not masks:
        return masks
    tensors = dict(graph.tensors)
    for node in graph.layers():
        if node.name in masks:
            weight = graph.weight(node)
            tensors[weight.name] = replace(weight, data=masks[node.name].astype(np.float32))
    smaller = cut(replace(graph, tensors=tensors), keep)
    return {
        node.name: np.asarray(smaller.weight(node).data, dtype=bool) for node in smaller.layers() if node.name in masks
    }


def zero_share(masks: Masks, graph: Graph) -> float:
    """Give the share of all weights that masks set to 0."""
    n_weights = sum(int(np.prod(graph.weight(node).shape)) for node in graph.layers())
    return sum(int(np.count_nonzero(~mask)) for mask in masks.values()) / n_weights


def least_worth(graph: Graph, scores: WeightScores, masks: Masks, n_left: int, floor: float = FLOOR) -> Masks:
    """Mask the weights worth least, just enough that at most `n_left` remain, or all that the floors allow.

    Of equal scores the earlier layer, and in it the earlier weight, goes first.

    Args:
        graph: float.
        scores: of its layers.
        masks: what is masked already, and stays so.
        n_left: weights that may remain.
        floor: share of its weights that every layer keeps; at least one is kept in any case.

    Returns:
        a mask for every layer.

    Raises:
        UsageError: the floor is out of range, or scores do not fit the graph or hold NaN.
    """
    free = _free(graph, scores, masks, floor)
    values = np.concatenate([score[flags] for flags, score in free.values()])
    there = sum(int(_mask(graph, masks, name).sum()) for name in free)
    gone = _smallest(values, min(len(values), max(0, there - n_left)))
    found, start = {}, 0
    for name, (flags, _) in free.items():
        mask = _mask(graph, masks, name).copy()
        n = int(flags.sum())
        mask[flags] = ~gone[start : start + n]
        found[name] = mask
        start += n
    return found


def not_above(graph: Graph, scores: WeightScores, limit: float = 0.0, floor: float = FLOOR) -> Masks:
    """Mask every weight whose score is at most `limit`, as far as the floors allow.

    Arguments, errors and result as `least_worth`.
    """
    free = _free(graph, scores, NOTHING, floor)
    return {name: ~(flags & (score <= limit)) for name, (flags, score) in free.items()}


def _mask(graph: Graph, masks: Masks, name: str) -> Array:
    if name in masks:
        return masks[name]
    return np.ones(next(graph.weight(node).shape for node in graph.layers() if node.name == name), dtype=bool)


def _free(graph: Graph, scores: WeightScores, masks: Masks, floor: float) -> dict[str, tuple[Array, Array]]:
    """Flag, in each layer, the weights that are there and may go; with them the layer's scores."""
    if not 0 <= floor <= 1:
        raise UsageError(f"floor {floor:g}: expected a share of each layer's weights, from 0 to 1")
    found = {}
    for node in graph.layers():
        shape = graph.weight(node).shape
        score = np.asarray(scores.get(node.name, np.empty(0)))
        if score.shape != shape or not np.isfinite(score).all():
            raise UsageError(f"scores of layer {node.name!r}: {score.shape}, expected {shape} finite numbers")
        there = _mask(graph, masks, node.name)
        least = max(1, int(np.ceil(floor * there.size)))
        flags = np.zeros(shape, dtype=bool)
        flags[there] = _smallest(score[there], max(0, int(there.sum()) - least))
        found[node.name] = (flags, score)
    return found


def _smallest(values: Array, count: int) -> Array:
    """Flag the smallest `count` of values (n,); of equal ones the first."""
    if count == 0:
        return np.zeros(len(values), dtype=bool)
    border = np.partition(values, count - 1)[count - 1]
    flags: Array = np.asarray(values < border)
    flags[np.flatnonzero(values == border)[: count - int(flags.sum())]] = True
    return flags
