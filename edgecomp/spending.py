"""Spend a budget: from what each layer could have to one candidate that was really compressed and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from edgecomp import planner
from edgecomp.compress import compress
from edgecomp.errors import BudgetError, UsageError
from edgecomp.graph import Graph
from edgecomp.plan import CompressionPlan
from edgecomp.quantmath import Grid

_MEAN_BITS_STEPS = 6
"""Candidates made for a mean width: each costs a reconstruction."""
_MOST_PLANS = 16
"""Plans made for them; many turn out to be one that was tried."""
_LITTLE_LESS = 0.99
"""What is aimed at, as a share of what is asked: a little more would be too much."""
_NEAR = 0.98
"""What is near enough, as a share of what is asked."""


class BudgetKind(StrEnum):
    """What a budget limits."""

    AVG_BITS = "avg_bits"
    MAX_SIZE = "max_size"
    MAX_DROP = "max_drop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What may be spent.

    Attributes:
        kind: mean bits a remaining weight, bytes of the largest exported file, or percentage points of accuracy.
        asked: the limit.

    Raises:
        UsageError: the limit is out of range.
    """

    kind: BudgetKind
    asked: float

    def __post_init__(self) -> None:
        match self.kind:
            case BudgetKind.AVG_BITS if not 0.1 <= self.asked <= 8:
                raise UsageError(f"--avg-bits {self.asked:g}: expected 0.1 to 8")
            case BudgetKind.MAX_SIZE if not 1 <= self.asked < 2**40:
                raise UsageError(f"--max-size {self.asked:g}: expected bytes, from 1 to 2^40")
            case BudgetKind.MAX_SIZE if self.asked % 1:
                raise UsageError(f"--max-size {self.asked}: expected whole bytes, e.g. {self.asked // 1:.0f}")
            case BudgetKind.MAX_DROP if not 0 <= self.asked <= 100:
                raise UsageError(f"--max-drop {self.asked:g}: expected percentage points from 0 to 100")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """A plan with the float graph it is for: the captured one, or one with weights adjusted to the plan's widths."""

    graph: Graph
    plan: CompressionPlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spent:
    """What a budget bought.

    Attributes:
        candidate: what to export.
        got: in the budget's own measure.
        met: False where even the most precise candidate loses more accuracy than allowed.
    """

    candidate: Candidate
    got: float
    met: bool


Make = Callable[[Mapping[str, Grid]], Candidate]
"""Layer name -> grid to a candidate."""


def spend(
    budget: Budget,
    choices: Sequence[planner.LayerChoices],
    draft: Make,
    make: Make,
    formats: Sequence[str],
    drop_points: Callable[[Candidate], float] | None,
    *,
    progress: Callable[[int], object] | None = None,
) -> Spent:
    """Spend a budget on what each layer could have.

    Args:
        budget: of any kind.
        choices: of every layer.
        draft: makes a candidate fast, whose files have about the right size.
        make: makes the candidate to keep.
        formats: what is to be exported.
        drop_points: measures how many points a candidate loses; for a budget of them.
        progress: called after each measurement of these with 1; there are at most `planner.DROP_STEPS`.

    Raises:
        BudgetError: even the smallest candidate takes more.
    """
    match budget.kind:
        case BudgetKind.AVG_BITS:
            return spend_mean_bits(choices, budget.asked, formats, make)
        case BudgetKind.MAX_SIZE:
            return spend_file_size(choices, int(budget.asked), formats, draft, make)
        case BudgetKind.MAX_DROP:
            assert drop_points is not None
            return spend_drop(choices, budget.asked, make, drop_points, progress=progress)


def spend_on_ladder(
    budget: Budget,
    rungs: Sequence[Mapping[str, Grid]],
    make: Make,
    formats: Sequence[str],
    drop_points: Callable[[Candidate], float] | None,
    *,
    progress: Callable[[int], object] | None = None,
) -> Spent:
    """Spend a budget on a ladder: the highest rung within bits or bytes, the lowest within points of accuracy.

    Args:
        budget: of any kind.
        rungs: as `planner.ladder` gives them.
        make: makes a candidate.
        formats: what is to be exported.
        drop_points: measures how many points a candidate loses; for a budget of them.
        progress: called after each measurement with 1.

    Raises:
        BudgetError: even the lowest rung takes more bits or bytes.
    """
    by_points = budget.kind is BudgetKind.MAX_DROP
    found: dict[int, Spent] = {}

    def spent(rung: int) -> Spent:
        if rung not in found:
            candidate = make(rungs[rung])
            match budget.kind:
                case BudgetKind.AVG_BITS:
                    got = least_mean_bits(candidate, formats)
                case BudgetKind.MAX_SIZE:
                    got = largest_file(candidate, formats)
                case BudgetKind.MAX_DROP:
                    assert drop_points is not None
                    got = drop_points(candidate)
            found[rung] = Spent(candidate=candidate, got=round(got, 4), met=got <= budget.asked)
            if progress is not None:
                progress(1)
        return found[rung]

    top = len(rungs) - 1
    if by_points:
        # Walked from the top: what is within the points is as low as the bisection finds.
        down = planner.highest_rung(len(rungs), lambda steps: spent(top - steps).met)
        return spent(top if down is None else top - down)
    up = planner.highest_rung(len(rungs), lambda rung: spent(rung).met)
    if up is None:
        unit = "mean bits a weight" if budget.kind is BudgetKind.AVG_BITS else "bytes of the largest file"
        raise BudgetError(f"budget: {budget.asked:g} {unit} asked for, the least is {spent(0).got:g}; allow more")
    return spent(up)


def spend_mean_bits(
    choices: Sequence[planner.LayerChoices], asked: float, formats: Sequence[str], make: Make
) -> Spent:
    """Spend mean bits a weight, as the format that stores least really writes them.

    The first candidate that comes to 98 % of the limit or more is taken; else the best of a few within it.

    Args:
        choices: of every layer.
        asked: the limit.
        formats: what is to be exported.
        make: makes a candidate.

    Raises:
        BudgetError: the formats cannot store so few bits.
    """
    # In a small file a decoder of words costs more than words save, and codes are stored in full after all.
    variants, in_full = [choices], [c.in_full() for c in choices]
    if "onnx" in formats and planner.mean_bits(in_full, {c.name: c.cheapest() for c in in_full}) <= asked:
        variants.append(in_full)
    least = math.inf
    for variant in variants:
        try:
            return _spend_mean_bits(variant, asked, formats, make)
        except _NoneFits as e:
            least = min(least, e.least)
    raise BudgetError(
        f"budget: a mean of {asked:g} bits a weight asked for, the least that was found is {least:.2f}; allow more"
    )


class _NoneFits(Exception):
    """No candidate was within the limit; the least was this."""

    def __init__(self, least: float) -> None:
        super().__init__(least)
        self.least = least


def _spend_mean_bits(
    choices: Sequence[planner.LayerChoices], asked: float, formats: Sequence[str], make: Make
) -> Spent:
    search = _Search(least=planner.mean_bits(choices, {c.name: c.cheapest() for c in choices}), asked=asked)
    kept, got = None, 0.0
    tried: dict[tuple[Grid, ...], float] = {}
    for _ in range(_MOST_PLANS):
        grids = planner.solve_mean_bits(choices, search.room)
        what = tuple(grids[c.name] for c in choices)
        if what not in tried:
            if len(tried) == _MEAN_BITS_STEPS:
                break
            candidate = make(grids)
            tried[what] = least_mean_bits(candidate, formats)
            if tried[what] <= asked:
                kept, got = candidate, tried[what]
        if search.seen(tried[what]):
            break
    if kept is None:
        raise _NoneFits(min(tried.values()))
    return Spent(candidate=kept, got=round(got, 4), met=True)


class _Search:
    """Looks for the room at which what comes of it is just within what was asked.

    More room means a smaller error, so of what fits the last is kept: it had more room than any before.

    Args:
        least: the room below which there is nothing.
        asked: what may come of it.

    Attributes:
        room: to be tried next.
    """

    def __init__(self, *, least: float, asked: float) -> None:
        self.room = asked
        self._least, self._asked = least, asked
        self._fits, self._over = (0.0, 0.0), (math.inf, math.inf)

    def seen(self, got: float) -> bool:
        """Take in what came of the room; tell whether nothing better is to be expected."""
        asked = self._asked
        if got <= asked:
            self._fits = self.room, got
            if got >= _NEAR * asked:
                return True
        else:
            self._over = self.room, got
            if self.room <= self._least:
                return True
        (fits, fits_got), (over, over_got) = self._fits, self._over
        if fits == 0:
            # Weights that make up for others end on less frequent codes than in their trial.
            self.room = max(self._least, over * asked / over_got * _LITTLE_LESS)
        elif math.isinf(over):
            self.room = fits * max(asked / fits_got * _LITTLE_LESS, 2 - _NEAR)
        else:
            share = (_LITTLE_LESS * asked - fits_got) / (over_got - fits_got)
            self.room = fits + (over - fits) * min(max(share, 0.25), 0.75)
        return over - fits < (1 - _NEAR) / 4 * asked


def least_mean_bits(candidate: Candidate, formats: Sequence[str]) -> float:
    """Export a candidate and average the bits on disk over its weights, in the format that stores least."""
    from edgecomp.exporters import export

    quantized = compress(candidate.graph, candidate.plan)
    n_weights = sum(math.prod(quantized.weight(node).shape) for node in quantized.layers())
    n_bytes: int = min(sum(w.stored_bytes for w in export(quantized, name).weights) for name in formats)
    return 8 * n_bytes / n_weights


def spend_file_size(
    choices: Sequence[planner.LayerChoices], limit_bytes: int, formats: Sequence[str], draft: Make, make: Make
) -> Spent:
    """Spend bytes of the largest file.

    Args:
        choices: of every layer.
        limit_bytes: of the largest file.
        formats: what is to be exported.
        draft: makes a candidate fast: its files have the right size but for a few bytes.
        make: makes the candidate to keep.

    Raises:
        BudgetError: the smallest widths give a larger file.
    """
    room = limit_bytes
    for _ in range(4):
        grids = _search(choices, room, lambda grids: largest_file(draft(grids), formats))
        candidate = make(grids)
        got = largest_file(candidate, formats)
        if got <= limit_bytes:
            return Spent(candidate=candidate, got=got, met=True)
        # Constants that happened to be equal in the draft, and stood in the file once, are not any more.
        room -= got - limit_bytes
    raise BudgetError(f"budget: a file of {limit_bytes} bytes asked for, the smallest found has {got}; allow more")


def _search(
    choices: Sequence[planner.LayerChoices], room: int, file_bytes: Callable[[Mapping[str, Grid]], int]
) -> dict[str, Grid]:
    """Search with the budget counting the format that stores most, and the one that stores least; take the better.

    Usually the first makes the largest file. Near the smallest size the other can: its weights are narrower, but what
    lies beside them may be more. Then the first is held at its smallest, and the other has what fits.
    """
    found, refusals = [], []
    for variant in ([c.counted(max) for c in choices], [c.counted(max).cheapest_only().counted(min) for c in choices]):
        try:
            found.append(planner.search_file_size(variant, room, file_bytes))
        except BudgetError as e:
            refusals.append(e)
    if not found:
        raise refusals[0]
    return min(found, key=lambda grids: sum(c.error[grids[c.name]] for c in choices))


def spend_drop(
    choices: Sequence[planner.LayerChoices],
    most_points: float,
    make: Make,
    drop_points: Callable[[Candidate], float],
    *,
    progress: Callable[[int], object] | None = None,
) -> Spent:
    """Spend percentage points of accuracy.

    Args:
        choices: of every layer.
        most_points: that may be lost.
        make: makes a candidate.
        drop_points: measures how many points a candidate loses.
        progress: called after each measurement with 1.
    """
    # Candidates can be large: only the last that was good enough is kept.
    kept: dict[str, tuple[Mapping[str, Grid], Candidate]] = {}

    def measure(grids: Mapping[str, Grid]) -> float:
        candidate = make(grids)
        loss = drop_points(candidate)
        if loss <= most_points or not kept:
            kept["best"] = (dict(grids), candidate)
        return loss

    bits, loss = planner.search_drop(choices, most_points, measure, progress=progress)
    assert kept["best"][0] == bits
    return Spent(candidate=kept["best"][1], got=round(loss, 4), met=loss <= most_points)


def largest_file(candidate: Candidate, formats: Sequence[str]) -> int:
    """Export a candidate and count the bytes of the largest file."""
    from edgecomp.exporters import export

    quantized = compress(candidate.graph, candidate.plan)
    sizes: list[int] = [export(quantized, name).device_bytes for name in formats]
    return max(sizes)
