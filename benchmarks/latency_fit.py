"""Fit the latency estimator to published figures, and see how far off it is on boards and networks it has not seen.

python -m edgecomp.benchmarks.latency_fit reads ../shared/latency (--data), prints the tables of README, and with
--write stores the constants that edgecomp ships as latency.json. Ten minutes. Not here: the physics
(`edgecomp.latency`), the rows (`latency_rows`), the networks (`published`).
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from tqdm import tqdm

from edgecomp.errors import EdgecompError
from edgecomp.files import write_file
from edgecomp.graph import Array
from edgecomp.latency import QUANTITIES, SCHEMA, Layout, class_of, constants_of
from edgecomp.report import table
from edgecomp.targets import names
from edgecomp.work import Kind

from .latency_rows import Row, read_rows

# ---- the fit ---------------------------------------------------------------------------------------------------------

_KINDS: Mapping[str, Mapping[Kind, float]] = {
    "a": {Kind.FIRST: 30, Kind.DENSE3X3: 0.6, Kind.DENSE: 2, Kind.POINTWISE: 1.5, Kind.DEPTHWISE: 6, Kind.LINEAR: 1.5},
    "m": {Kind.FIRST: 20, Kind.DENSE3X3: 1.5, Kind.DENSE: 1.5, Kind.POINTWISE: 1.5, Kind.DEPTHWISE: 6, Kind.LINEAR: 2},
}
_PRIORS: Mapping[str, tuple[float, float]] = {
    "a other": (0.4, 1),
    "a bytes": (0.2, 1),
    "a layer": (10_000, 1),
    "a fork": (10_000, 1),
    "a serial": (0.05, 0.7),
    "a copy": (2, 0.7),
    "a fill": (1, 0.7),
    "a winograd": (2, 0.7),
    "a inputs": (4, 1),
    "a outputs": (4, 1),
    "a power": (2, 0.5),
    "a weights": (0.5, 0.7),
    "a gain": (0.5, 0.5),
    "a narrow": (1.1, 0.2),
    "m other": (3, 1),
    "m bytes": (1, 1),
    "m layer": (5_000, 1),
    "m fork": (1, 0.1),
    "m serial": (1, 0.1),
    "m copy": (1, 0.1),
    "m fill": (1, 0.1),
    "m winograd": (1, 0.1),
    "m inputs": (4, 1),
    "m outputs": (4, 1),
    "m power": (1.5, 0.1),
    "m weights": (1, 0.1),
    "m gain": (1, 0.1),
}
_ROBUST = 1.5
_BOARDS = 0.3
"""What boards of one core differ by, as a logarithm."""
PHONE = "a phone"
"""What phones take more or less than boards: a constant of the fit, in no estimate."""


def prior(name: str) -> tuple[float, float]:
    """Give what a constant is before any row is seen, and how sure that is: logarithms."""
    if name in _PRIORS:
        value, spread = _PRIORS[name]
        return math.log(value), spread
    first, _, rest = name.partition(" ")
    if first in _KINDS and rest.split(" ")[-1] in set(Kind):
        return math.log(_KINDS[first][Kind(rest.split(" ")[-1])]), 0.8
    if first == "board":
        return 0.0, _BOARDS
    if " before " in rest:
        return 0.0, 0.4
    if name == PHONE:
        return 0.0, _BOARDS
    if first == "runtime":
        if rest.endswith(" memory"):
            return 0.0, 0.7
        return 0.0, 0.4 if rest.count(" ") == 0 else 0.25
    return 0.0, 0.5 if rest.startswith(("group", "reorders")) else 0.2


class Fit:
    """Published rows, ready to be fitted: every quantity's logarithm is linear in the constants."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.layout = Layout([row.case for row in rows])
        self.observed = np.log([row.seconds for row in rows])
        self.scatter = np.array([row.scatter for row in rows])
        of_rows = [constants_of(row.case) for row in rows]
        for row, used in zip(rows, of_rows, strict=True):
            # What was emulated is a core, not a board.
            used["whole"] = () if row.counted else used["whole"] + (PHONE,) * row.phone
        self.names = tuple(sorted({name for row in of_rows for used in row.values() for name in used}))
        place = {name: i for i, name in enumerate(self.names)}
        self.design = np.zeros((len(rows), len(QUANTITIES), len(self.names)))
        for i, row in enumerate(of_rows):
            for j, quantity in enumerate(QUANTITIES):
                for name in row[quantity]:
                    self.design[i, j, place[name]] += 1
        priors = [prior(name) for name in self.names]
        self.mean, self.spread = (np.array(column) for column in zip(*priors, strict=True))

    def log_seconds(self, constants: Array) -> Array:
        """Estimate all rows: float64 (R,)."""
        found: Array = np.log(self.layout.seconds(self.design @ constants))
        return found

    def residuals(self, constants: Array) -> Array:
        """Give published over estimated, as logarithms: float64 (R,)."""
        found: Array = self.observed - self.log_seconds(constants)
        return found

    def solve(
        self,
        chosen: Array | None = None,
        start: Array | None = None,
        steps: int = 40,
        slopes: Array | None = None,
    ) -> Array:
        """Fit by Gauss and Newton, damped, with a loss that outliers bend little: float64 (C,).

        Args:
            chosen: bool (R,), the rows that count; all by default. A constant that none of them has stays at its prior.
            start: constants to begin with; their priors by default.
            steps: at most.
            slopes: `slopes(start)`, where it is known.
        """
        counts = np.ones(len(self.rows)) if chosen is None else chosen.astype(np.float64)
        x = self.mean.copy() if start is None else start
        damping = 1e-2 if start is None else 0.0
        residual = self.residuals(x) / self.scatter
        loss = self._loss(residual, x, counts)
        for step in range(steps):
            jacobian = self.slopes(x) if step or slopes is None else slopes
            weight = counts / np.sqrt(1 + (residual / _ROBUST) ** 2)
            normal = jacobian.T @ (jacobian * weight[:, None]) + np.diag(self.spread**-2)
            gradient = jacobian.T @ (weight * residual) + (x - self.mean) / self.spread**2
            better = False
            while damping < 1e6 and not better:
                y = x + np.clip(np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -gradient), -1, 1)
                moved_residual = self.residuals(y) / self.scatter
                moved_loss = self._loss(moved_residual, y, counts)
                better = moved_loss < loss
                damping = damping if better else max(4 * damping, 1e-3)
            if not better:
                break
            small = loss - moved_loss < 1e-5 * loss
            x, residual, loss, damping = y, moved_residual, moved_loss, damping / 3
            if small:
                break
        return x

    def slopes(self, constants: Array) -> Array:
        """Tell how each residual, over its scatter, moves with each constant: float64 (R, C)."""
        logs = self.design @ constants
        base = np.log(self.layout.seconds(logs))
        found = np.zeros((len(self.rows), len(self.names)))
        for j in range(len(QUANTITIES)):
            moved = logs.copy()
            moved[:, j] += 1e-4
            slope = (np.log(self.layout.seconds(moved)) - base) / 1e-4
            found -= slope[:, None] * self.design[:, j, :] / self.scatter[:, None]
        return found

    def _loss(self, residual: Array, x: Array, counts: Array) -> float:
        bent = 2 * _ROBUST**2 * (np.sqrt(1 + (residual / _ROBUST) ** 2) - 1)
        return float(np.sum(counts * bent) + np.sum(((x - self.mean) / self.spread) ** 2))

    def held_out(self, groups: Array, start: Array, only: Iterable[str] | None = None) -> Array:
        """Estimate every row by constants fitted without its group: residuals as of `residuals`, float64 (R,).

        Args:
            groups: str (R,).
            start: constants of the whole fit, to begin with.
            only: groups to leave out, one after the other; all by default. Rows of others stay 0.
        """
        found, slopes = np.zeros(len(self.rows)), self.slopes(start)
        for group in sorted(set(groups)) if only is None else only:
            left_out = groups == group
            found[left_out] = self.residuals(self.solve(~left_out, start, 8, slopes))[left_out]
        return found


# ---- what is held out ------------------------------------------------------------------------------------------------


def board_of(row: Row) -> str:
    """Name the board: sources spell one in several ways."""
    return row.device.upper().removesuffix("-P")


def body_of(row: Row) -> str:
    """Tell networks apart by all but their last layers: published ones go by several names."""
    return str(sum(w.macs for w in row.part_of or row.case.work if w.kind is not Kind.LINEAR) or row.model)


GROUPINGS: Mapping[str, Callable[[Row], str]] = {
    "board": board_of,
    "network": body_of,
    "core": lambda row: row.case.processor.core,
    "runtime": lambda row: row.case.runtime.partition(" before ")[0],
}
_SHARE = 0.9
"""Of the rows that are to lie in the printed range."""
_ENOUGH = 4
"""Rows of a core without which its range is that of a core that was not fitted."""
_MARGIN = 1.25
"""How much wider the range is than the rows it is taken from ask for: rows are many, but boards are few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A fit, and how far off rows are that it did not see.

    Attributes:
        fit: the rows.
        constants: fitted on all of them, float64 (C,).
        residuals: by grouping, published over estimated without the row's group, logarithms, float64 (R,).
        classes: of the rows' processors, str (R,); what comes from counts is a class of its own.
    """

    fit: Fit
    constants: Array
    residuals: Mapping[str, Array]
    classes: Array

    @property
    def published(self) -> Array:
        """Tell which rows were published: ranges and errors are theirs alone, bool (R,)."""
        return np.array([not row.counted for row in self.fit.rows])

    def groups(self, grouping: str) -> Array:
        """Name each row's group: str (R,)."""
        return np.array([GROUPINGS[grouping](row) for row in self.fit.rows])

    def inside(self, grouping: str) -> Array:
        """Tell which rows lie in a range that was taken from the other groups' rows alone: bool (R,)."""
        residuals, groups = self.residuals[grouping], self.groups(grouping)
        found = np.zeros(len(residuals), dtype=bool)
        for group in set(groups):
            others = groups != group
            spreads = spreads_of({name: self.residuals[name][others] for name in _RANGED}, self.classes[others])
            for i in np.flatnonzero(~others):
                low, high = spreads[self.classes[i]]
                found[i] = -low <= residuals[i] <= high
        return found


_RANGED = ("board", "network")
COUNTED = "c, estimated from emulated instructions"
_PART = f"{COUNTED}, layers of a kind"
HELD_OUT = "latency_held_out.json"
"""Beside this file: how far every row lay from a fit without its board, network, core, runtime."""


def find(rows: Sequence[Row], residuals: Mapping[str, Array] | None = None) -> Found:
    """Fit all rows, and each grouping's with one group left out.

    Args:
        rows: to fit.
        residuals: those of an earlier run with the same rows; found anew by default, which takes minutes.
    """
    fit = Fit(rows)
    constants = fit.solve()
    if residuals is None:
        groups = {name: np.array([group(row) for row in rows]) for name, group in GROUPINGS.items()}
        residuals = {
            # Rounded as they are stored, so that everything follows from what is.
            name: fit.held_out(each, constants, tqdm(sorted(set(each)), desc=f"without each {name}")).round(3)
            for name, each in groups.items()
        }
    counted = [_PART if row.part_of else COUNTED for row in rows]
    classes = [c if row.counted else class_of(row.case.processor) for row, c in zip(rows, counted, strict=True)]
    return Found(fit=fit, constants=constants, residuals=residuals, classes=np.array(classes))


def held_out_json(found: Found) -> str:
    """Give the residuals of what was left out, a line a grouping, so that tests need not find all of them again."""
    lines = (
        f' "{name}": [{", ".join(f"{v:.3f}" for v in found.residuals[name])}]' for name in sorted(found.residuals)
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_held_out() -> dict[str, Array]:
    """Read what `held_out_json` wrote."""
    text = resources.files(__package__).joinpath(HELD_OUT).read_text("utf-8")
    return {name: np.array(values) for name, values in json.loads(text).items()}


def spreads_of(residuals: Mapping[str, Array], classes: Array) -> dict[str, tuple[float, float]]:
    """Give, by class, how far published lies below and above an estimate at most, in nine of ten rows: logarithms."""
    spreads = {}
    for name in sorted(set(classes)):
        chosen = classes == name
        ends = [_ends(_MARGIN * each[chosen]) for each in residuals.values()]
        spreads[str(name)] = (max(low for low, _ in ends), max(high for _, high in ends))
    return spreads


def _ends(residuals: Array) -> tuple[float, float]:
    low, high = np.quantile(residuals, ((1 - _SHARE) / 2, (1 + _SHARE) / 2))
    return -float(low), float(high)


def to_json(found: Found) -> str:
    """Give what latency.json holds: rounded, sorted, the same for the same rows."""
    published = found.published
    residuals = {name: values[published] for name, values in found.residuals.items()}
    spreads = spreads_of({name: residuals[name] for name in _RANGED}, found.classes[published])
    usual = _ends(_MARGIN * np.concatenate([residuals[name] for name in _RANGED]))
    for grouping in ("core", "runtime"):
        # What a group that was never seen adds to what any row may be off by.
        ends = _ends(_MARGIN * residuals[grouping])
        low, high = (math.sqrt(max(0.0, end**2 - least**2)) for end, least in zip(ends, usual, strict=True))
        spreads[f"another {grouping}"] = (low, high)
    spreads["counted"] = _counted_spread(found)
    rows = found.fit.rows
    value = {
        "schema": SCHEMA,
        "rows": int(published.sum()),
        "seen": _cores(row for row in rows if not row.counted),
        "counted": _cores(row for row in rows if row.counted),
        "constants": {
            name: round(float(v), 3)
            for name, v in zip(found.fit.names, found.constants, strict=True)
            if round(float(v), 3) and not _of_the_fit_alone(name)
        },
        "spreads": {name: [round(low, 3), round(high, 3)] for name, (low, high) in sorted(spreads.items())},
    }
    return json.dumps(value, indent=1) + "\n"


def _counted_spread(found: Found) -> tuple[float, float]:
    """Give how far counts lie from estimates that had not seen the network, with what Arm's cycles leave open."""
    whole = found.classes == COUNTED
    off = _MARGIN * found.residuals["network"][whole]
    below, above = np.array([row.open for row, chosen in zip(found.fit.rows, whole, strict=True) if chosen]).T
    return _ends(off - below)[0], _ends(off + above)[1]


def _cores(rows: Iterable[Row]) -> list[str]:
    """Name the cores, and what they computed in, that enough rows are of to say that they were fitted."""
    found = Counter(f"{row.case.processor.core} {row.case.precision}" for row in rows)
    return sorted(name for name, n in found.items() if n >= _ENOUGH)


def _of_the_fit_alone(name: str) -> bool:
    first, _, rest = name.partition(" ")
    return name == PHONE or " before " in name or (first == "board" and rest not in names())


# ---- tables ----------------------------------------------------------------------------------------------------------


def error_percent(residuals: Array) -> float:
    """Give the median of |estimated - published| over published, in percent."""
    return float(100 * np.median(np.abs(np.expm1(-residuals))))


def tables(found: Found) -> str:
    """Show how far off estimates are, in Markdown: in all and by runtime; then by core and runtime that were left out.

    Behind each name stand the median of how far off it is, and in brackets the median of estimated over published.
    """
    rows = found.fit.rows
    kinds = np.array([f"{GROUPINGS['runtime'](row)}, {row.case.precision}" for row in rows])
    inside = {name: found.inside(name) for name in _RANGED}

    def line(name: str, chosen: Array) -> tuple[str, ...]:
        cells = [name, str(int(chosen.sum()))]
        for grouping in _RANGED:
            cells += [
                f"{error_percent(found.residuals[grouping][chosen]):.0f} %",
                f"{100 * inside[grouping][chosen].mean():.0f} %",
            ]
        return tuple(cells)

    published, counted = found.published, found.classes == COUNTED
    off = error_percent(found.residuals["network"][counted])
    elsewhere = np.array([row.elsewhere for row in rows])
    parts = [
        table(
            [
                line("../shared/latency", published & ~elsewhere),
                line("read elsewhere", elsewhere),
                line("all", published),
                *(line(name, found.classes == name) for name in sorted(set(found.classes[published]))),
                *(line(name, kinds == name) for name in sorted(set(kinds[published]))),
                (COUNTED, str(int(counted.sum())), "-", "-", f"{off:.0f} %", "-"),
            ],
            ("rows", "n", "board left out: off by", "in range", "network left out: off by", "in range"),
        )
    ]
    return "\n\n".join([*parts, *(left_out(found, grouping) for grouping in ("core", "runtime"))])


def left_out(found: Found, grouping: str) -> str:
    """Tell by group how far off rows are that were estimated without it."""
    published = found.published
    residuals, groups = found.residuals[grouping][published], found.groups(grouping)[published]
    rows = [row for row in found.fit.rows if not row.counted]
    named = {group: row.model if grouping == "network" else group for group, row in zip(groups, rows, strict=True)}
    each = (
        f"{named[name]} {error_percent(residuals[groups == name]):.0f} % "
        f"({math.exp(-float(np.median(residuals[groups == name]))):.2f})"
        for name in sorted(set(groups))
    )
    return f"By {grouping} left out, {error_percent(residuals):.0f} % in all: {'; '.join(each)}."


def _place(name: str, package: str) -> Path:
    return Path(str(resources.files(package).joinpath(name)))


def main() -> None:
    """Fit, print the tables, and write the constants where that is asked for."""
    parser = argparse.ArgumentParser(description="fit the latency estimator to published figures")
    parser.add_argument("--data", type=Path, default=Path("../shared/latency"), metavar="DIR")
    parser.add_argument("--write", action="store_true", help=f"store latency.json and {HELD_OUT}")
    args = parser.parse_args()
    try:
        found = find(read_rows(args.data))
    except EdgecompError as e:
        raise SystemExit(f"latency_fit: {e}") from e
    print(tables(found), *(left_out(found, grouping) for grouping in _RANGED), sep="\n\n")
    if args.write:
        write_file(_place(HELD_OUT, __package__), held_out_json(found).encode())
        write_file(_place("latency.json", "edgecomp"), to_json(found).encode())


if __name__ == "__main__":
    main()
