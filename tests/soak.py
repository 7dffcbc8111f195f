"""Long random checks: `python -m tests.soak --minutes 10`. Stops at the first failure, and says how to repeat it.

Three kinds of work, in turns: damaged files for every reader (`soak_fuzz`), random networks through compression, export
and the stock runtimes (`soak_graphs`), and such networks as C (`soak_c`). A case is a function of seed and number only.
"""

from __future__ import annotations

import argparse
import math
import secrets
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from typing import Any

import numpy as np

from tests import soak_c, soak_graphs
from tests.soak_fuzz import Fuzz

KINDS = ("fuzz", "graphs", "c")
# Seconds of one kind before it is the next one's turn.
_TURN_S = 5.0


class Failed(Exception):
    """A case went wrong; the text is a reproducer."""


def rng_of(seed: int, kind: str, case: int) -> np.random.Generator:
    return np.random.default_rng([seed, KINDS.index(kind), case])


def check_graph(rng: np.random.Generator) -> str:
    """Draw a network and check it; a failure's note shows it."""
    return _checked(rng, lambda case: soak_graphs.check(case) or "network")


def check_c(rng: np.random.Generator) -> str:
    """The same for it as C."""
    return _checked(rng, lambda case: soak_c.check(case, rng))


def _checked(rng: np.random.Generator, check: Callable[[soak_graphs.Case], str]) -> str:
    case = soak_graphs.random_case(rng)
    try:
        return check(case)
    except Exception as e:
        bits = {n: (f"{sum(p.keep)}/{len(p.keep)}", p.weight_bits) for n, p in case.plan.layers.items()}
        e.add_note(f"{soak_graphs.drawing(case.graph)}\nio {case.plan.io}, kept channels and bits: {bits}")
        raise


def soak(
    seed: int,
    kinds: Sequence[str],
    *,
    seconds: float,
    first: int = 0,
    most: int | None = None,
    step: Callable[[float], object] = lambda s: None,
) -> Counter[str]:
    """Work until the time is over, or `most` cases of each kind are done.

    Args:
        seed: of all cases.
        kinds: "fuzz", "graphs", "c".
        seconds: to work for.
        first: number of the first case of each kind.
        most: cases of each kind.
        step: is told of the seconds that went by.

    Returns:
        what was checked, counted.

    Raises:
        Failed: at the first case that fails.
    """
    done: Counter[str] = Counter()
    number = dict.fromkeys(kinds, first)
    start = last = time.monotonic()
    with closing(Fuzz()) if "fuzz" in kinds else nullcontext() as fuzz:
        check = {"fuzz": fuzz.check if fuzz else check_graph, "graphs": check_graph, "c": check_c}
        while time.monotonic() - start < seconds and any(most is None or n < first + most for n in number.values()):
            for kind in kinds:
                turn = time.monotonic()
                while time.monotonic() < min(turn + _TURN_S, start + seconds):
                    if most is not None and number[kind] >= first + most:
                        break
                    try:
                        done[check[kind](rng_of(seed, kind, number[kind]))] += 1
                    except Exception as e:
                        again = f"python -m tests.soak --only {kind} --seed {seed} --case {number[kind]}"
                        raise Failed(f"again with: {again}\n{''.join(traceback.format_exception(e))}") from e
                    number[kind] += 1
                    now = time.monotonic()
                    step(now - last)
                    last = now
    return done


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="10 by default; with --cases as long as they take")
    parser.add_argument("--cases", type=int, help="so many of each kind; of damaged files, a minute does thousands")
    parser.add_argument("--seed", type=int, help="a new one each time by default")
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--case", type=int, help="one case only, by its number")
    args = parser.parse_args(argv)
    seed = secrets.randbelow(1 << 32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    kinds = (args.only,) if args.only else KINDS
    most = args.cases if args.case is None else 1
    seconds = 60 * args.minutes if args.minutes is not None else 600.0 if most is None else math.inf
    start = time.monotonic()
    try:
        with _bar(seconds, most and most * len(kinds)) as step:
            done = soak(seed, kinds, seconds=seconds, first=args.case or 0, most=most, step=step)
    except Failed as e:
        print(e, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing had failed", file=sys.stderr)
        return 130
    counts = ", ".join(f"{count} x {name}" for name, count in sorted(done.items()))
    if args.cases is not None and sum(done.values()) < args.cases * len(kinds):
        print(f"the time was over before {args.cases} cases of each kind: {counts or 'none'}", file=sys.stderr)
        return 1
    print(f"{sum(done.values())} cases in {time.monotonic() - start:.0f} s, none failed: {counts}")
    return 0


def _bar(seconds: float, cases: int | None) -> Any:
    """Show how far the work is, by cases where their number is given, else by time."""
    if not sys.stderr.isatty():
        return nullcontext(lambda s: None)
    from contextlib import contextmanager

    from tqdm import tqdm

    @contextmanager
    def shown() -> Any:
        total, unit = (cases, "cases") if cases else (seconds, "s")
        layout = "{percentage:3.0f} % |{bar}| {n:.0f}/{total:.0f} " + unit
        with tqdm(total=total, unit=unit, bar_format=layout) as bar:
            yield lambda s: bar.update(1 if cases else min(s, bar.total - bar.n))

    return shown()


if __name__ == "__main__":
    raise SystemExit(main())
