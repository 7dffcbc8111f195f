"""Results as rows: means over the seeds with their spread, and the Markdown table of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgecomp.report import table

from .results import Result, Source

FLOAT = "float"
"""The method that every other is compared with: the network as it came."""

HEADER = ("method", "bits asked", "seeds", "bytes", "smaller", "accuracy", "points lost", "numbers from", "seconds")

LEGEND = (
    "Means over the seeds ± their sample standard deviation. A seed draws the calibration images, the same for every "
    "method. Bytes and accuracy are those of the exported file in the runtime that is named; where it says *simulated* "
    "the tool writes no packed file: bytes are computed from its widths, and images classified inside the tool."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A method at one setting over all its seeds.

    Attributes:
        method: its name.
        bits: mean bits a weight that were asked for, or None.
        results: one for each seed, at least one, all from one source.
    """

    method: str
    bits: float | None
    results: tuple[Result, ...]

    def mean_bytes(self) -> float:
        """Average the bytes."""
        return statistics.fmean(r.n_bytes for r in self.results)

    def mean_accuracy(self) -> float:
        """Average the accuracy, in percent."""
        return statistics.fmean(r.accuracy_percent for r in self.results)

    def spread_bytes(self) -> float | None:
        """Give the sample standard deviation of the bytes; None for one seed."""
        return _spread([r.n_bytes for r in self.results])

    def spread_accuracy(self) -> float | None:
        """Give the sample standard deviation of the accuracy, in points; None for one seed."""
        return _spread([r.accuracy_percent for r in self.results])


def rows_of(results: Iterable[Result], order: Sequence[str]) -> list[Row]:
    """Gather results into rows: methods in the order given, then others by name; each by rising bits."""
    groups: dict[tuple[str, float | None], list[Result]] = {}
    for result in results:
        groups.setdefault((result.task.method, result.task.bits), []).append(result)
    place = {name: i for i, name in enumerate(order)}
    keys = sorted(groups, key=lambda key: (place.get(key[0], len(place)), key[0], -1.0 if key[1] is None else key[1]))
    return [
        Row(method=m, bits=b, results=tuple(sorted(groups[m, b], key=lambda r: r.task.seed))) for m, b in keys
    ]


def markdown(rows: Sequence[Row]) -> str:
    """Write rows as a Markdown table with its legend, and a newline at its end."""
    base = next((row for row in rows if row.method == FLOAT), None)
    return f"{table([_cells(row, base) for row in rows], HEADER)}\n\n{LEGEND}\n"


def _cells(row: Row, base: Row | None) -> tuple[object, ...]:
    first = row.results[0]
    smaller = lost = "-"
    if base is not None and row is not base:
        smaller = f"{base.mean_bytes() / row.mean_bytes():.2f}x"
        lost = f"{base.mean_accuracy() - row.mean_accuracy():.2f}"
    mark = ", *simulated*" if first.source is Source.SIMULATED else ""
    return (
        row.method,
        "-" if row.bits is None else f"{row.bits:g}",
        len(row.results),
        _with_spread(row.mean_bytes(), row.spread_bytes(), ",.0f"),
        smaller,
        f"{_with_spread(row.mean_accuracy(), row.spread_accuracy(), '.2f')} %",
        lost,
        first.measured_in + mark,
        f"{statistics.fmean(r.seconds for r in row.results):.0f}",
    )


def _with_spread(mean: float, spread: float | None, form: str) -> str:
    return f"{mean:{form}}" if spread is None else f"{mean:{form}} ± {spread:{form}}"


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
