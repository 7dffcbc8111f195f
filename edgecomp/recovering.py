"""Recovery by fine-tuning as a step of a build: what a budget bought is trained, and must still be within it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgecomp.coding import PACKED_FORMS
from edgecomp.data import LabelledImages
from edgecomp.graph import Graph
from edgecomp.sparsity import NOTHING, Masks
from edgecomp.spending import Budget, BudgetKind, Candidate, Spent, largest_file, least_mean_bits

if TYPE_CHECKING:
    from edgecomp.pytorch.finetune import Recovered
    from edgecomp.pytorch.progress import Settings

_ROOM = 0.997
"""Share of the entropy of their codes that weights may have afterwards: what a coder makes of it varies a little."""
_ROOM_IN_FILE = 0.99
"""The same where a file must not grow."""


def recovery_settings(
    epochs: int, seed: int, budget: Budget, formats: Sequence[str], options: Mapping[str, str]
) -> Settings:
    """Say how a build trains what its budget bought; `options` are those that the result depends on."""
    from edgecomp.pytorch.progress import Settings

    room = _ROOM_IN_FILE if budget.kind is BudgetKind.MAX_SIZE else _ROOM
    # Other forms do not store codes by their frequency.
    by_frequency = bool(PACKED_FORMS & set(formats))
    return Settings(epochs=epochs, seed=seed, room=room if by_frequency else None, options=options)


def recover(
    spent: Spent,
    teacher: Graph,
    original: Graph,
    train: LabelledImages,
    held_out: LabelledImages,
    *,
    budget: Budget,
    formats: Sequence[str],
    settings: Settings,
    checkpoint: Path,
    drop_points: Callable[[Candidate], float] | None,
    progress: Callable[[int], object],
    masks: Masks = NOTHING,
) -> Spent:
    """Train what a budget bought; give it back as it was where that gains nothing or breaks the budget.

    Args:
        spent: what the budget bought.
        teacher: the float graph with all its channels.
        original: the float graph that was compressed, its channels cut.
        train: what to train with.
        held_out: what to judge by; none of `train`.
        budget: that was spent.
        formats: what is to be exported.
        settings: see `finetune`.
        checkpoint: see `finetune`.
        drop_points: measures how many points a candidate loses; for a budget of them.
        progress: told of images, `settings.epochs` times as many as there are in `train`.
        masks: of the layers in which weights stay 0.

    Returns:
        the candidate to export; how it went stands in its plan, under "recovery".

    Raises:
        EdgecompError, KeyboardInterrupt, OSError: as `finetune`.
    """
    from edgecomp.pytorch.finetune import finetune
    from edgecomp.pytorch.sharing import by_first

    found = finetune(
        teacher,
        original,
        spent.candidate.graph,
        spent.candidate.plan,
        train,
        held_out,
        settings=settings,
        checkpoint=checkpoint,
        masks=masks,
        progress=progress,
    )
    what = f"{settings.epochs} epochs of {len(train)} images"
    return by_first(lambda: _within(budget, spent, found, what, len(held_out), formats, drop_points))


def _within(
    budget: Budget,
    spent: Spent,
    found: Recovered,
    what: str,
    n_held_out: int,
    formats: Sequence[str],
    drop_points: Callable[[Candidate], float] | None,
) -> Spent:
    """Take what was trained where it gained something and keeps the budget."""
    result = (
        f"{found.before:.4f} to {found.after:.4f} divergence from the float network's answers on {n_held_out} images "
        "held out"
    )
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
        case BudgetKind.AVG_BITS if "tflm" in formats:
            # Its tables grow with every code that comes into use, whatever the entropy.
            after = replace(after, got=round(least_mean_bits(after.candidate, formats), 4))
            if after.got > budget.asked:
                return _told(spent, f"{what}, left out: its weights took {after.got:g} bits each")
        case BudgetKind.AVG_BITS:
            pass
    return _told(after, f"{what}, from {result}")


def _told(spent: Spent, text: str) -> Spent:
    plan = spent.candidate.plan
    plan = replace(plan, made_by={**plan.made_by, "recovery": text})
    return replace(spent, candidate=replace(spent.candidate, plan=plan))
