"""Where buffers lie in one block of memory that a network runs in, by when each of them is needed."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

ALIGNMENT = 4
"""Every offset is a multiple of it: kernels read words."""
_MOST_LOOKED_AT = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """A need of memory.

    Attributes:
        name: unique.
        n_bytes: how much, at least one.
        first: the first step during which it is needed.
        last: the last one.
    """

    name: str
    n_bytes: int
    first: int
    last: int

    def meets(self, other: Buffer) -> bool:
        """Tell whether there is a step that needs both."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True, slots=True, kw_only=True)
class Arena:
    """Buffers with their places.

    Attributes:
        offsets: by buffer name, in bytes.
        n_bytes: of the whole block.
        least_bytes: what no arrangement can do without: the most that is needed in one step.
        optimal: there is none with fewer bytes; else the search was given up, and there may be.
    """

    offsets: Mapping[str, int]
    n_bytes: int
    least_bytes: int
    optimal: bool


def arrange(buffers: Iterable[Buffer]) -> Arena:
    """Give every buffer a place, in as little memory as can be found.

    Each buffer of a list goes into the lowest gap between those before it that live at the same time; some order of the
    list gives the optimum. First come the orders by size (what TensorFlow Lite Micro's greedy planner does, so that
    this is never worse), by size times life, by life, and by time; then a search through all, which is given up after
    100,000 looks at one buffer beside another.

    Args:
        buffers: with names of their own.

    Returns:
        the same arrangement for the same buffers in any order.
    """
    wanted = sorted(buffers, key=lambda b: (b.first, b.last, b.name))
    least = least_bytes(wanted)
    orders: list[Sequence[Buffer]] = [
        sorted(wanted, key=lambda b: (-b.n_bytes, b.first)),
        sorted(wanted, key=lambda b: (-b.n_bytes * (b.last - b.first + 1), b.first)),
        sorted(wanted, key=lambda b: (b.first - b.last, -b.n_bytes)),
        wanted,
    ]
    placed = min((_placed(order) for order in orders), key=_end)
    placed, finished = _searched(orders[0], placed, least)
    return Arena(
        offsets={b.name: offset for b, offset in placed},
        n_bytes=_end(placed),
        least_bytes=least,
        optimal=finished or _end(placed) == least,
    )


def least_bytes(buffers: Sequence[Buffer]) -> int:
    """Give the most that buffers need at once, each rounded up to the alignment."""
    steps = {b.first for b in buffers}
    return max((sum(_rounded(b) for b in buffers if b.first <= s <= b.last) for s in steps), default=0)


def widest_gap(buffers: Iterable[Buffer], offsets: Mapping[str, int], n_bytes: int, step: int) -> tuple[int, int]:
    """Find the largest part of a block that no buffer has during a step.

    Args:
        buffers: those that count.
        offsets: where they lie, as `arrange` gives them.
        n_bytes: of the block.
        step: which.

    Returns:
        its offset and its bytes; the first of equal ones.
    """
    placed = sorted((offsets[b.name], _rounded(b)) for b in buffers if b.first <= step <= b.last)
    found, end = (0, 0), 0
    for offset, taken in [*placed, (n_bytes, 0)]:
        found = max(found, (end, offset - end), key=lambda gap: gap[1])
        end = max(end, offset + taken)
    return found


Placed = tuple[tuple[Buffer, int], ...]


def _placed(order: Sequence[Buffer]) -> Placed:
    done: Placed = ()
    for buffer in order:
        done = (*done, (buffer, _lowest(buffer, done)))
    return done


def _lowest(buffer: Buffer, done: Placed) -> int:
    """Find the lowest gap that the others leave."""
    offset = 0
    for other, start in sorted((p for p in done if p[0].meets(buffer)), key=lambda p: p[1]):
        if start >= offset + _rounded(buffer):
            break
        offset = max(offset, start + _rounded(other))
    return offset


def _searched(order: Sequence[Buffer], best: Placed, least: int) -> tuple[Placed, bool]:
    """Try all orders, but those that begin no better than the best; tell whether the search came to its end."""
    n_looked_at = 0
    open_orders: list[tuple[Placed, tuple[Buffer, ...]]] = [((), tuple(order))]
    while open_orders and _end(best) > least and n_looked_at < _MOST_LOOKED_AT:
        done, rest = open_orders.pop()
        if _end(done) >= _end(best):
            continue
        if not rest:
            best = done
        # The first of `rest` is tried first: it is pushed last.
        for i in reversed(range(len(rest))):
            n_looked_at += len(done) + 1
            open_orders.append(((*done, (rest[i], _lowest(rest[i], done))), rest[:i] + rest[i + 1 :]))
    return best, not open_orders


def _end(placed: Placed) -> int:
    return max((offset + _rounded(b) for b, offset in placed), default=0)


def _rounded(buffer: Buffer) -> int:
    return -(-buffer.n_bytes // ALIGNMENT) * ALIGNMENT


# ---- a picture -------------------------------------------------------------------------------------------------------

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FREE, SCRATCH = ".", "#"


def drawn(
    buffers: Iterable[Buffer], arena: Arena, steps: Sequence[str], scratch: Container[str] = (), *, columns: int = 64
) -> list[str]:
    """Draw where everything lies, a line a step: a column is 1 / `columns` of the arena.

    Args:
        buffers: that `arena` has places for. Each has a letter, in the order in which they begin; after z comes A,
            if it is free again.
        arena: their places.
        steps: the steps by name.
        scratch: the buffers that hold nothing from one step to the next; drawn as # instead.
        columns: of the picture.

    Returns:
        a line for what the columns are, and one a step: its name, the arena, and what begins in it, with its bytes.
    """
    placed = sorted(buffers, key=lambda b: (b.first, b.name in scratch, arena.offsets[b.name]))
    letter: dict[str, str] = {}
    following = itertools.cycle(_LETTERS)
    for b in (b for b in placed if b.name not in scratch):
        taken = {letter[other.name] for other in placed if other.name in letter and other.meets(b)}
        letter[b.name] = next((c for c in itertools.islice(following, len(_LETTERS)) if c not in taken), "?")
    width = max((len(name) for name in steps), default=0)
    lines = [f"{'':{width}}  {f'0 to {arena.n_bytes:,} bytes':{columns}}  begins".rstrip()]
    for step, name in enumerate(steps):
        row = [FREE] * columns
        alive = [b for b in placed if b.first <= step <= b.last]
        # The small last: what takes less than a column is not to be covered.
        for b in sorted(alive, key=lambda b: -b.n_bytes):
            start = arena.offsets[b.name]
            # A column shows what lies in its middle; whatever is alive has one at least.
            first = min(columns - 1, (2 * start * columns + arena.n_bytes) // (2 * arena.n_bytes))
            end = max(first + 1, (2 * (start + b.n_bytes) * columns + arena.n_bytes) // (2 * arena.n_bytes))
            row[first:end] = letter.get(b.name, SCRATCH) * (min(end, columns) - first)
        begins = ", ".join(f"{letter.get(b.name, SCRATCH)} {b.n_bytes:,}" for b in alive if b.first == step)
        lines.append(f"{name:{width}}  {''.join(row)}  {begins}".rstrip())
    return lines
