"""Recovery by fine-tuning as a step of a build: what a budget bought is trained, and must still be within it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from edgecomp.coding import PACKED_FORMS
from edgecomp.data import LabelledImages
from edgecomp.graph import Graph
from edgecomp.spending import Budget, BudgetKind, Candidate, Spent, largest_file

_ROOM = 0.997
"""Share of the entropy of their codes that weights may have afterwards: what a coder makes of it varies a little."""
_ROOM_IN_FILE = 0.99
"""The same where a file must not grow."""


def recover(
    spent: Spent,
    teacher: Graph,
    train: LabelledImages,
    held_out: LabelledImages,
    *,
    budget: Budget,
    formats: Sequence[str],
    epochs: int,
    seed: int,
    checkpoint: Path,
    drop_points: Callable[[Candidate], float] | None,
    progress: Callable[[int], object],
) -> Spent:
    """Train what a budget bought; give it back as it was where that gains nothing or breaks the budget.

    Args:
        spent: what the budget bought.
        teacher: the float graph.
        train: what to train with.
        held_out: what to judge by; none of `train`.
        budget: that was spent.
        formats: what is to be exported.
        epochs: at least 1.
        seed: of the order of images.
        checkpoint: see `finetune`.
        drop_points: measures how many points a candidate loses; for a budget of them.
        progress: told of images, `epochs` times as many as there are in `train`.

    Returns:
        the candidate to export; how it went stands in its plan, under "recovery".

    Raises:
        EdgecompError, KeyboardInterrupt, OSError: as `finetune`.
    """
    from edgecomp.pytorch.finetune import finetune

    room = _ROOM_IN_FILE if budget.kind is BudgetKind.MAX_SIZE else _ROOM
    found = finetune(
        teacher,
        spent.candidate.graph,
        spent.candidate.plan,
        train,
        held_out,
        epochs=epochs,
        seed=seed,
        room=room if PACKED_FORMS & set(formats) else None,  # other forms do not store codes by their frequency
        checkpoint=checkpoint,
        progress=progress,
    )
    what = f"{epochs} epochs of {len(train)} images"
    result = f"{found.before:.2f} % to {found.after:.2f} % of {len(held_out)} images held out"
    if not found.kept:
        return _told(spent, f"{what}, left out: from {result}")
    after = replace(spent, candidate=Candidate(graph=found.graph, plan=found.plan))
    match budget.kind:
        case BudgetKind.MAX_SIZE:
            after = replace(after, got=largest_file(after.candidate, formats))
            if after.got > budget.asked:
                return _told(spent, f"{what}, left out: its largest file had {after.got:.0f} bytes")
        case BudgetKind.MAX_DROP:
            assert drop_points is not None
            loss = drop_points(after.candidate)
            if loss > max(spent.got, budget.asked):
                return _told(spent, f"{what}, left out: its files lost {loss:.2f} points")
            after = replace(after, got=round(loss, 4), met=loss <= budget.asked)
        case BudgetKind.AVG_BITS:
            pass
    return _told(after, f"{what}, from {result}")


def _told(spent: Spent, text: str) -> Spent:
    plan = spent.candidate.plan
    plan = replace(plan, made_by={**plan.made_by, "recovery": text})
    return replace(spent, candidate=replace(spent.candidate, plan=plan))
