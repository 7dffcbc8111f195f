"""Pruning as steps of a build: channels cut as --prune asks, weights set to 0 as --sparsify does, within --max-drop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgecomp.channels import CutPolicy, Pruning
from edgecomp.data import LabelledImages
from edgecomp.errors import BudgetError, UsageError
from edgecomp.graph import Graph
from edgecomp.preprocessing import Preprocessing
from edgecomp.sparsity import Masks
from edgecomp.spending import Budget, BudgetKind

if TYPE_CHECKING:
    from edgecomp.latency import LatencyLimit
    from edgecomp.pytorch.scores import Scorer

_SHARE_OF_DROP = 0.5
"""Of the points that may be lost, what cutting may lose; the rest is left to rounding."""


def check_pruning(pruning: Pruning, sparsifying: Pruning | None, budget: Budget) -> None:
    """Refuse what cannot be done, before long work.

    Raises:
        UsageError: AUTO without a limit of what may be lost.
    """
    for option, asked in (("--prune", pruning), ("--sparsify", sparsifying)):
        if asked is not None and asked.policy is CutPolicy.AUTO and budget.kind is not BudgetKind.MAX_DROP:
            raise UsageError(f"{option} auto without --max-drop: say how many points of accuracy may be lost")


def pruned(
    graph: Graph,
    pruning: Pruning,
    scorer: Scorer,
    held_out: LabelledImages | None,
    preprocessing: Preprocessing,
    *,
    budget: Budget,
    compensation: bool,
    limit: LatencyLimit | None = None,
    progress: Callable[[int], object],
) -> Graph:
    """Cut channels; ZERO is left to `planner.irrelevant_channels`.

    Args:
        graph: float.
        pruning: what is asked.
        scorer: what ranks channels, with the images to make up with.
        held_out: training images of which AUTO measures how many points are lost.
        preprocessing: of these images.
        budget: whose points AUTO spends half of.
        compensation: solve the layers again after each slice.
        limit: what ENOUGH cuts for.
        progress: called after each slice with 1.

    Raises:
        BudgetError: ENOUGH does not reach the limit.
        as `pytorch.prune.prune_as_asked`.
    """
    from edgecomp.pytorch.network import accuracy
    from edgecomp.pytorch.prune import prune_as_asked
    from edgecomp.pytorch.sharing import by_first

    if pruning.policy is not CutPolicy.AUTO:
        reached_ms = math.inf

        def fast_enough(smaller: Graph) -> bool:
            nonlocal reached_ms
            if limit is None:
                return True
            reached_ms = min(reached_ms, limit.ms(smaller).p50)
            return reached_ms <= limit.most_ms

        try:
            return prune_as_asked(
                graph, pruning, scorer, compensation=compensation, within=fast_enough, progress=progress
            )
        except BudgetError as e:
            raise BudgetError(f"{e}: estimated are {reached_ms:.3g} ms at least") from e
    assert held_out is not None
    least = by_first(lambda: accuracy(graph, held_out, preprocessing)) - _SHARE_OF_DROP * budget.asked

    def within(smaller: Graph) -> bool:
        return by_first(lambda: accuracy(smaller, held_out, preprocessing)) >= least

    return prune_as_asked(graph, pruning, scorer, compensation=compensation, within=within, progress=progress)


def sparsified(
    graph: Graph,
    uncut: Graph,
    sparsifying: Pruning,
    pruning: Pruning,
    scorer: Scorer,
    held_out: LabelledImages | None,
    preprocessing: Preprocessing,
    *,
    budget: Budget,
    compensation: bool,
    progress: Callable[[int], object],
) -> Masks:
    """Choose the weights that become 0.

    Args:
        graph: float, channels cut.
        uncut: what AUTO compares with.
        sparsifying: what is asked.
        pruning: what was asked of `pruned`.
        scorer: what ranks weights, with the images to make up with.
        held_out: training images of which AUTO measures how many points are lost.
        preprocessing: of these images.
        budget: whose points AUTO spends half of; half of the other half where `pruned` had that.
        compensation: have the weights that remain make up for the others.
        progress: called after each slice with 1.

    Raises:
        as `pytorch.sparsify.sparsify`.
    """
    from edgecomp.pytorch.network import accuracy
    from edgecomp.pytorch.sharing import by_first
    from edgecomp.pytorch.sparsify import sparsify

    if sparsifying.policy is not CutPolicy.AUTO:
        return sparsify(graph, sparsifying, scorer, compensation=compensation, progress=progress)
    assert held_out is not None
    share = 1 - (1 - _SHARE_OF_DROP) ** (2 if pruning.policy is CutPolicy.AUTO else 1)
    least = by_first(lambda: accuracy(uncut, held_out, preprocessing)) - share * budget.asked

    def within(sparse: Graph) -> bool:
        return by_first(lambda: accuracy(sparse, held_out, preprocessing)) >= least

    return sparsify(graph, sparsifying, scorer, compensation=compensation, within=within, progress=progress)
