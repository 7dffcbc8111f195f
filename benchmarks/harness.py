"""Timing, fair to every body that is measured: all warm up until steady, then they take turns.

A round gives each body one turn, in an order drawn anew; a turn is a block of inferences, each timed by itself, after
one that is not timed and brings the body's weights back into the caches. So a drift of the clock or a busy neighbour
hits all bodies alike, and the ratio of two bodies within a round is free of it. Nothing here knows what a body does.
"""

from __future__ import annotations

import gc
import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from edgecomp.errors import UsageError
from edgecomp.graph import Array
from edgecomp.report import Ratio

Clock = Callable[[], int]
"""Gives nanoseconds from an arbitrary start, e.g. time.perf_counter_ns."""

WINDOW_S = 0.05
"""Length of a warm-up window, in seconds."""
STEADY_WINDOWS = 3
"""Warm-up is over when the medians of so many windows in a row agree."""
WARMUP_MIN_S, WARMUP_MAX_S = 0.25, 3.0
"""Shortest and longest warm-up of a body, in seconds."""
TOLERANCE = 0.03
"""Largest relative difference of window medians that counts as steady."""
BLOCK_S = 0.02
"""Length of a turn, in seconds: long against the clock's own noise, short against drifts."""
MAX_BLOCK = 100
"""Most inferences in a turn."""
ROUNDS = 10
"""Fewest rounds, unless other limits ask for less."""
MIN_ROUNDS = 5
"""So many rounds are done (or as many as were asked for, if less) however long they take: fewer give no interval."""
MIN_S, MAX_S = 2.0, 30.0
"""Seconds of measuring for each body: at least, and after which no further round is begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What `measure` gives for a body.

    Attributes:
        warmups: inferences before the first sample.
        steady: whether the warm-up ended because latency had settled.
        rounds: number of turns.
        samples_us: all samples in microseconds, in order, equally many a turn.
    """

    warmups: int
    steady: bool
    rounds: int
    samples_us: Sequence[float]


def measure(
    bodies: Mapping[str, Callable[[], object]],
    *,
    clock: Clock,
    rng: random.Random,
    warmup_min_s: float = WARMUP_MIN_S,
    warmup_max_s: float = WARMUP_MAX_S,
    warmup_runs: int = 0,
    tolerance: float = TOLERANCE,
    rounds: int = ROUNDS,
    min_s: float = MIN_S,
    max_s: float = MAX_S,
    samples: int = 1,
    progress: Callable[[float], object] | None = None,
) -> dict[str, Timing]:
    """Time several bodies in turns.

    Args:
        bodies: by name; a call is one inference.
        clock: nanoseconds.
        rng: draws the order of each round.
        warmup_min_s: shortest warm-up of a body, seconds.
        warmup_max_s: longest warm-up of a body, seconds; the window that runs then is still finished.
        warmup_runs: fewest inferences of a warm-up.
        tolerance: largest relative difference of window medians that counts as steady.
        rounds: fewest rounds.
        min_s: fewest seconds of measuring, for each body on average.
        max_s: seconds for each body on average after which no further round is begun, once there are MIN_ROUNDS.
        samples: fewest samples of each body.
        progress: called with the share done, 0 to 1.

    Returns:
        by name; all bodies have equally many rounds.

    Raises:
        UsageError: no body, or a number out of range.
    """
    if not bodies:
        raise UsageError("nothing to measure: expected at least one model")
    if (
        min(rounds, samples) < 1
        or warmup_runs < 0
        or not 0 <= min_s <= max_s
        or not 0 <= warmup_min_s <= warmup_max_s
        or tolerance <= 0
    ):
        raise UsageError(
            f"rounds {rounds}, seconds {min_s} to {max_s}, warm-up {warmup_min_s} to {warmup_max_s}, tolerance "
            f"{tolerance}; expected at least one round, rising seconds, a tolerance above 0"
        )
    report = progress if progress is not None else _ignore
    names = list(bodies)
    warm: dict[str, _Warm] = {}
    taken = {name: array("q") for name in names}
    with _no_garbage_collection():
        for i, name in enumerate(names):
            warm[name] = _warm_up(
                bodies[name],
                clock=clock,
                min_s=warmup_min_s,
                max_s=warmup_max_s,
                least=warmup_runs,
                tolerance=tolerance,
            )
            report(0.2 * (i + 1) / len(names))
        start, done = clock(), 0
        shortest, longest = (round(seconds * len(names) * 1e9) for seconds in (min_s, max_s))
        elapsed = 0
        rounds = max([rounds, *(-(-samples // warm[name].block) for name in names)])
        while (done < rounds or elapsed < shortest) and (done < min(rounds, MIN_ROUNDS) or elapsed < longest):
            for name in rng.sample(names, len(names)):
                _turn(bodies[name], warm[name].block, clock, taken[name])
            done += 1
            elapsed = clock() - start
            report(0.2 + 0.8 * min(1.0, done / rounds, elapsed / shortest if shortest else 1.0))
    return {
        name: Timing(
            warmups=warm[name].runs,
            steady=warm[name].steady,
            rounds=done,
            samples_us=array("d", (ns / 1000 for ns in taken[name])),
        )
        for name in names
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Warm:
    runs: int
    steady: bool
    block: int


def _warm_up(
    body: Callable[[], object], *, clock: Clock, min_s: float, max_s: float, least: int, tolerance: float
) -> _Warm:
    start = clock()
    runs, medians, steady = 0, [], False
    while not steady:
        window: list[int] = []
        window_start = clock()
        while len(window) < 3 or clock() - window_start < WINDOW_S * 1e9:
            before = clock()
            body()
            window.append(clock() - before)
        runs += len(window)
        medians.append(max(median(window), 1.0))
        last = medians[-STEADY_WINDOWS:]
        elapsed = (clock() - start) / 1e9
        settled = len(last) == STEADY_WINDOWS and max(last) / min(last) - 1 <= tolerance
        steady = settled and elapsed >= min_s and runs >= least
        if elapsed >= max_s and runs >= least:
            break
    block = int(np.clip(BLOCK_S * 1e9 // medians[-1], 1, MAX_BLOCK))
    return _Warm(runs=runs, steady=steady, block=block)


def _turn(body: Callable[[], object], block: int, clock: Clock, samples: array[int]) -> None:
    body()
    for _ in range(block):
        before = clock()
        body()
        samples.append(clock() - before)


def median(values: Sequence[float]) -> float:
    """Give the median, of an even number the mean of the middle two; numpy's loads masked arrays for it, 1 MB."""
    low, high = (len(values) - 1) // 2, len(values) // 2
    ordered = sorted(values)
    return (ordered[low] + ordered[high]) / 2


def medians(timing: Timing) -> Array:
    """Give the median of each round, in microseconds: float64 (rounds,)."""
    n = len(timing.samples_us) // timing.rounds
    # Round by round: of a small model there are many samples, and they are not to be in memory twice.
    return np.array([median(timing.samples_us[i * n : (i + 1) * n]) for i in range(timing.rounds)])


def ratio(timing: Timing, baseline: Timing, *, rng: random.Random, resamples: int = 2000) -> Ratio:
    """Compare two bodies of one `measure`.

    In each round the median of the body's turn is divided by the median of the baseline's. The result is the median of
    these ratios; its 95 % confidence interval comes from drawing rounds with replacement (percentile bootstrap).

    Args:
        timing: the body.
        baseline: what it is compared with.
        rng: draws the resamples.
        resamples: how many.

    Raises:
        UsageError: the two have different numbers of rounds, so they are not of one run.
    """
    if timing.rounds != baseline.rounds:
        raise UsageError(f"{timing.rounds} and {baseline.rounds} rounds: expected two bodies measured in one run")
    above, below = medians(timing), medians(baseline)
    # A clock too coarse for the body may say 0; a nanosecond keeps the ratio a number.
    ratios = np.maximum(above, 1e-3) / np.maximum(below, 1e-3)
    words = np.frombuffer(rng.randbytes(4 * resamples * len(ratios)), dtype="<u4")
    drawn = np.sort(ratios[words.reshape(resamples, -1) % len(ratios)], axis=1)
    drawn = (drawn[:, (len(ratios) - 1) // 2] + drawn[:, len(ratios) // 2]) / 2
    middle = median(ratios.tolist())
    low, high = (float(bound) for bound in np.percentile(drawn, (2.5, 97.5)))
    return Ratio(median=middle, low=min(low, middle), high=max(high, middle))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector out of the samples, as timeit does."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _ignore(share: float) -> None:
    pass
