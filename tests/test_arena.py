"""Places in an arena: legal, never worse than TFLite Micro's greedy plan, the best there is where all can be tried."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp.arena import ALIGNMENT, Arena, Buffer, arrange, drawn, widest_gap


def buffers(most: int) -> st.SearchStrategy[list[Buffer]]:
    one = st.tuples(st.integers(1, 40), st.integers(0, 7), st.integers(0, 4))
    return st.lists(one, max_size=most).map(
        lambda made: [Buffer(name=f"b{i}", n_bytes=n, first=f, last=f + k) for i, (n, f, k) in enumerate(made)]
    )


def rounded(n: int) -> int:
    return (n + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def check_legal(arena: Arena, wanted: list[Buffer]) -> None:
    assert set(arena.offsets) == {b.name for b in wanted}
    for b in wanted:
        assert arena.offsets[b.name] % ALIGNMENT == 0
        assert 0 <= arena.offsets[b.name] <= arena.n_bytes - b.n_bytes
    for step in range(20):
        taken: set[int] = set()
        for b in (b for b in wanted if b.first <= step <= b.last):
            own = set(range(arena.offsets[b.name], arena.offsets[b.name] + b.n_bytes))
            assert not taken & own
            taken |= own


def greedy_bytes(wanted: list[Buffer]) -> int:
    """TFLite Micro's plan, byte by byte: the largest first, each at the lowest place that is free in all its steps."""
    places: list[tuple[Buffer, int]] = []
    for b in sorted(wanted, key=lambda b: (-b.n_bytes, b.first)):
        others = [(at, at + rounded(o.n_bytes)) for o, at in places if o.first <= b.last and b.first <= o.last]
        size = rounded(b.n_bytes)
        at = next(a for a in itertools.count(0, ALIGNMENT) if all(a + size <= lo or a >= hi for lo, hi in others))
        places.append((b, at))
    return max((at + rounded(b.n_bytes) for b, at in places), default=0)


@settings(deadline=None)
@given(buffers(12))
def test_places_are_legal_and_no_worse_than_greedy(wanted: list[Buffer]) -> None:
    arena = arrange(wanted)
    check_legal(arena, wanted)
    assert arena.least_bytes <= arena.n_bytes <= greedy_bytes(wanted)
    assert arena.optimal or arena.n_bytes > arena.least_bytes
    assert arrange(reversed(wanted)) == arena


@settings(deadline=None)
@given(buffers(8), st.integers(0, 12))
def test_the_widest_gap_is_free_and_there_is_no_wider_one(wanted: list[Buffer], step: int) -> None:
    arena = arrange(wanted)
    offset, n_bytes = widest_gap(wanted, arena.offsets, arena.n_bytes, step)
    text = bytearray(b" " * arena.n_bytes)
    for b in wanted:
        if b.first <= step <= b.last:
            at = arena.offsets[b.name]
            text[at : at + rounded(b.n_bytes)] = b"x" * rounded(b.n_bytes)
    assert text[offset : offset + n_bytes] == b" " * n_bytes
    assert n_bytes == max(map(len, text.split(b"x")))


@settings(max_examples=60, deadline=None)
@given(buffers(3))
def test_small_ones_are_optimal(wanted: list[Buffer]) -> None:
    """Every buffer at every place below the best found: nothing smaller is legal."""
    arena = arrange(wanted)
    assert arena.optimal
    smaller = arena.n_bytes - ALIGNMENT
    choices = [range(0, smaller - rounded(b.n_bytes) + 1, ALIGNMENT) for b in wanted]
    for places in itertools.product(*choices):
        apart = (
            at + rounded(b.n_bytes) <= other_at or other_at + rounded(o.n_bytes) <= at or not b.meets(o)
            for (b, at), (o, other_at) in itertools.combinations(zip(wanted, places, strict=True), 2)
        )
        assert not all(apart) or not wanted


def test_a_plan_that_greedy_misses() -> None:
    """By size the middle buffer comes to lie above both neighbours; beside them it fits in less."""
    wanted = [
        Buffer(name="a", n_bytes=48, first=0, last=1),
        Buffer(name="b", n_bytes=40, first=1, last=2),
        Buffer(name="c", n_bytes=44, first=2, last=3),
        Buffer(name="d", n_bytes=8, first=0, last=3),
    ]
    arena = arrange(wanted)
    assert arena.n_bytes == arena.least_bytes == 96


def test_nothing_needs_nothing() -> None:
    assert arrange([]) == Arena(offsets={}, n_bytes=0, least_bytes=0, optimal=True)


def test_a_picture_drawn_by_hand() -> None:
    buffers = [
        Buffer(name="in", n_bytes=8, first=0, last=0),
        Buffer(name="a", n_bytes=16, first=0, last=1),
        Buffer(name="scratch", n_bytes=4, first=1, last=1),
        Buffer(name="b", n_bytes=8, first=1, last=2),
    ]
    places = {"in": 16, "a": 0, "scratch": 28, "b": 16}
    arena = Arena(offsets=places, n_bytes=32, least_bytes=28, optimal=False)
    assert drawn(buffers, arena, ("first", "2nd", "x"), {"scratch"}, columns=8) == [
        "       0 to 32 bytes  begins",
        "first  AAAABB..  A 16, B 8",
        "2nd    AAAACC.#  C 8, # 4",
        "x      ....CC..",
    ]


def test_the_smallest_buffer_is_seen_and_letters_begin_again() -> None:
    buffers = [Buffer(name=f"{i:02}", n_bytes=4, first=i, last=i) for i in range(53)]
    buffers.append(Buffer(name="large", n_bytes=4000, first=0, last=52))
    arena = arrange(buffers)
    lines = drawn(buffers, arena, [str(i) for i in range(53)])[1:]
    assert all(len(set(line[4:68])) == 2 for line in lines)
    large, small = ("A", "B") if lines[0].endswith("A 4,000, B 4") else ("B", "A")
    assert lines[0].endswith("A 4,000, B 4" if large == "A" else "A 4, B 4,000")
    assert lines[50].endswith("  z 4")
    assert lines[51].endswith(f"  {small} 4"), f"{large} still lives"
    assert lines[52].endswith("  C 4")
