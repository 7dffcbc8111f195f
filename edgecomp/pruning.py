"""Pruning as a step of a build: channels cut as --prune asks, as far as --max-drop allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edgecomp.channels import CutPolicy, Pruning
from edgecomp.data import LabelledImages
from edgecomp.errors import UsageError
from edgecomp.graph import Graph
from edgecomp.preprocessing import Preprocessing
from edgecomp.spending import Budget, BudgetKind

if TYPE_CHECKING:
    from edgecomp.pytorch.scores import Scorer

_SHARE_OF_DROP = 0.5
"""Of the points that may be lost, what cutting may lose; the rest is left to rounding."""


def check_pruning(pruning: Pruning, budget: Budget) -> None:
    """Refuse what cannot be done, before long work.

    Raises:
        UsageError: AUTO without a limit of what may be lost.
    """
    if pruning.policy is CutPolicy.AUTO and budget.kind is not BudgetKind.MAX_DROP:
        raise UsageError("--prune auto without --max-drop: say how many points of accuracy may be lost")


def pruned(
    graph: Graph,
    pruning: Pruning,
    scorer: Scorer,
    held_out: LabelledImages | None,
    preprocessing: Preprocessing,
    *,
    budget: Budget,
    compensation: bool,
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
        progress: called after each slice with 1.

    Raises:
        as `pytorch.prune.prune_as_asked`.
    """
    from edgecomp.pytorch.network import accuracy
    from edgecomp.pytorch.prune import prune_as_asked
    from edgecomp.pytorch.sharing import by_first

    if pruning.policy is not CutPolicy.AUTO:
        return prune_as_asked(graph, pruning, scorer, compensation=compensation, progress=progress)
    assert held_out is not None
    least = by_first(lambda: accuracy(graph, held_out, preprocessing)) - _SHARE_OF_DROP * budget.asked

    def within(smaller: Graph) -> bool:
        return by_first(lambda: accuracy(smaller, held_out, preprocessing)) >= least

    return prune_as_asked(graph, pruning, scorer, compensation=compensation, within=within, progress=progress)
