"""Fit the latency estimator to published figures, and see how far off it is on boards and networks it has not seen.

python -m edgecomp.benchmarks.latency_fit reads ../shared/latency (--data), prints the tables of README, and with
--write FILE stores the constants that edgecomp ships as latency.json. About a minute. Not here: the physics
(`edgecomp.latency`), the networks (`published`).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgecomp.errors import DataError, EdgecompError
from edgecomp.files import write_file
from edgecomp.graph import Array
from edgecomp.latency import QUANTITIES, SCHEMA, Case, Layout, class_of, constants_of
from edgecomp.processor import Processor, processor_of
from edgecomp.report import table
from edgecomp.target import Target
from edgecomp.targets import load, names
from edgecomp.work import Kind, Work

from .published import NETWORKS

FILES = ("xnnpack_readme.csv", "ncnn_benchmark.csv", "mlperf_tiny.csv", "stm32ai_modelzoo.csv")
RUNTIME_OF: tuple[tuple[str, str], ...] = (
    ("ncnn", "ncnn"),
    ("XNNPACK", "litert"),
    ("TensorFlow Lite (X-LINUX-AI", "litert"),
    ("LEIP", "leip"),
    ("X-CUBE-AI", "x-cube-ai"),
    ("STM32Cube.AI", "x-cube-ai"),
    ("tflite-micro", "tflite-micro"),
    ("TensorFlow Lite for ", "tflite-micro"),
)
"""What a source's runtime is here, by how its name begins; all else is "other"."""
_ERAS: Mapping[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    "ncnn": ((("git 2021", "git 2022"), "2023"),),
    "x-cube-ai": (((" v7.", " v8."), "9"),),
    "tflite-micro": (((" v2.3",), "2021"),),
}
"""What an older version's name holds, and before which version it was: its constants are told apart from today's."""
_MB = 1_000_000
# Copying and filling main memory, MB/s: ThomasKaiser/sbc-bench:Results.md, boards of the same chip, and for the RK3588
# its author's review of the ROCK 5B. The last five are assumed, not read: what boards of that table with similar cores
# and the kind of memory that these are sold with (LPDDR4, the last DDR3) show.
_MEMORY: Mapping[str, tuple[int, int]] = {
    "RK3399": (3_700, 8_400),
    "RK3328": (1_340, 5_700),
    "RK3228H": (1_340, 5_700),
    "RK3566": (2_980, 7_650),
    "RK3568": (2_980, 7_650),
    "RK3588": (10_830, 29_220),
    "H2+": (850, 3_450),
    "Raspberry Pi 2B": (1_000, 1_180),
    "Raspberry Pi Zero W": (415, 1_630),
    "Arduino UNO Q": (1_600, 5_370),
    "AX630C": (1_600, 5_370),
    "RDK X3": (1_600, 5_370),
    "AX620A": (1_500, 5_370),
    "Orange Pi Zero 2": (1_070, 3_680),
}
_TARGETS: Mapping[str, str] = {
    "Raspberry Pi Zero 2 W": "rpi-zero2w",
    "Raspberry Pi 3B+": "rpi3b-plus",
    "Raspberry Pi 4B": "rpi4",
    "Raspberry Pi 5": "rpi5",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A published latency.

    Attributes:
        device, model: as the source names them.
        case: what the estimator is asked.
        seconds: what was published.
    """

    device: str
    model: str
    case: Case
    seconds: float


def read_rows(folder: Path) -> list[Row]:
    """Read the published rows whose network is described in `published` and whose arithmetic is the processor's own.

    Raises:
        DataError: a file is missing.
    """
    work: dict[tuple[str, str], list[Work]] = {key: build().layers for key, build in NETWORKS.items()}
    rows = []
    for name in FILES:
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: no such file; the fit needs the published latencies, give their folder as --data")
        with path.open(encoding="utf-8", newline="") as file:
            for r in csv.DictReader(file):
                accelerated = r["cpu"].count(" + ") > 0
                key = (r["model"], r["input"])
                if key not in work or accelerated or "superseded" in r["note"] or "SUSPECT" in r["note"]:
                    continue
                runtime = _runtime(f"{r['runtime']} {r['runtime_version']}")
                threads = int(r["threads"] or 1)
                case = Case(
                    work=work[key],
                    processor=_processor(r, threads),
                    runtime=runtime,
                    precision=r["precision"],
                    threads=threads,
                )
                rows.append(Row(device=r["device"], model=r["model"], case=case, seconds=float(r["latency_ms"]) / 1e3))
    return rows


def _runtime(text: str) -> str:
    runtime = next((ours for theirs, ours in RUNTIME_OF if text.startswith(theirs)), "other")
    for marks, era in _ERAS.get(runtime, ()):
        if any(mark in text for mark in marks):
            return f"{runtime} before {era}"
    return runtime


def _processor(r: Mapping[str, str], threads: int) -> Processor:
    clock_hz, cpu, device = int(float(r["clock_mhz"]) * 1e6), r["cpu"], r["device"]
    wide = r["os_bits"] != "32"
    base = load(_TARGETS[device]) if device in _TARGETS and _TARGETS[device] in names() else None
    memory = next((v for chip, v in _MEMORY.items() if chip in device), (None, None))
    copy, fill = (None if v is None else v * _MB for v in memory)
    isa: tuple[str, ...] = ("aarch64", "neon") if wide else ("armv7", "neon")
    if cpu in ("Cortex-A55", "Cortex-A76"):
        isa += ("fp16",)
        # Figures of ncnn until 2022 show no dot product: int8 takes three times as long on the same chip as in 2023.
        isa += () if r["runtime_version"].startswith(("git 2021", "git 2022")) else ("dotprod",)
    if cpu.startswith("Cortex-M"):
        isa = ("thumb", *(("helium",) if cpu in ("Cortex-M55", "Cortex-M85") else ()))
    if base is not None:
        copy, fill = base.memory_copy_bytes_per_s, base.memory_fill_bytes_per_s
    return processor_of(
        Target(
            name=device if base is None else base.name,
            description=device,
            cpu=cpu,
            clock_hz=clock_hz,
            cores=max(threads, 1),
            isa=isa,
            l2_bytes=None if base is None else base.l2_bytes,
            l3_bytes=None if base is None else base.l3_bytes,
            memory_copy_bytes_per_s=copy,
            memory_fill_bytes_per_s=fill,
            runtimes=("c",),
        )
    )


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
_SCATTER = 0.2
"""What a row is off by, as a logarithm, beside what a fit can know: sets how much rows weigh against priors."""
_ROBUST = 1.5
_BOARDS = 0.3
"""What boards of one core differ by, as a logarithm."""


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
        return 0.0, 0.2
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
        of_rows = [constants_of(row.case) for row in rows]
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

    def solve(self, chosen: Array | None = None, start: Array | None = None, steps: int = 40) -> Array:
        """Fit by Gauss and Newton, damped, with a loss that outliers bend little: float64 (C,).

        Args:
            chosen: bool (R,), the rows that count; all by default.
            start: constants to begin with.
            steps: at most.
        """
        part = self if chosen is None else Fit([row for row, c in zip(self.rows, chosen, strict=True) if c])
        places = [self.names.index(name) for name in part.names]
        x = part.mean.copy() if start is None else start[places]
        damping = 1e-2
        residual = part.residuals(x) / _SCATTER
        loss = part._loss(residual, x)
        for _ in range(steps):
            logs = part.design @ x
            base = np.log(part.layout.seconds(logs))
            jacobian = np.zeros((len(part.rows), len(part.names)))
            for j in range(len(QUANTITIES)):
                moved = logs.copy()
                moved[:, j] += 1e-4
                slope = (np.log(part.layout.seconds(moved)) - base) / 1e-4
                jacobian -= slope[:, None] * part.design[:, j, :] / _SCATTER
            weight = 1 / np.sqrt(1 + (residual / _ROBUST) ** 2)
            normal = jacobian.T @ (jacobian * weight[:, None]) + np.diag(part.spread**-2)
            gradient = jacobian.T @ (weight * residual) + (x - part.mean) / part.spread**2
            better = False
            while damping < 1e6 and not better:
                step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -gradient)
                y = x + np.clip(step, -1, 1)
                moved_residual = part.residuals(y) / _SCATTER
                moved_loss = part._loss(moved_residual, y)
                better = moved_loss < loss
                damping *= 1 if better else 4
            if not better:
                break
            small = loss - moved_loss < 1e-5 * loss
            x, residual, loss, damping = y, moved_residual, moved_loss, max(damping / 3, 1e-6)
            if small:
                break
        whole = self.mean.copy()
        whole[places] = x
        return whole

    def _loss(self, residual: Array, x: Array) -> float:
        bent = 2 * _ROBUST**2 * (np.sqrt(1 + (residual / _ROBUST) ** 2) - 1)
        return float(np.sum(bent) + np.sum(((x - self.mean) / self.spread) ** 2))

    def held_out(self, groups: Array, start: Array) -> Array:
        """Estimate every row by constants fitted without its group: residuals as of `residuals`, float64 (R,).

        Args:
            groups: str (R,).
            start: constants of the whole fit, to begin with.
        """
        found = np.zeros(len(self.rows))
        for group in sorted(set(groups)):
            left_out = groups == group
            found[left_out] = self.residuals(self.solve(~left_out, start, steps=8))[left_out]
        return found


# ---- what is held out ------------------------------------------------------------------------------------------------


def board_of(row: Row) -> str:
    """Name the board: sources spell one in several ways."""
    return row.device.upper().removesuffix("-P")


def body_of(row: Row) -> str:
    """Tell networks apart by all but their last layers: published ones go by several names."""
    return str(sum(w.macs for w in row.case.work if w.kind is not Kind.LINEAR) or row.model)


GROUPINGS: Mapping[str, Callable[[Row], str]] = {
    "board": board_of,
    "network": body_of,
    "core": lambda row: row.case.processor.core,
    "runtime": lambda row: row.case.runtime.partition(" before ")[0],
}
_SHARE = 0.9
"""Of the rows that are to lie in the printed range."""
_MARGIN = 1.25
"""How much wider the range is than the rows it is taken from ask for: rows are many, but boards are few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A fit, and how far off rows are that it did not see.

    Attributes:
        fit: the rows.
        constants: fitted on all of them, float64 (C,).
        residuals: by grouping, published over estimated without the row's group, logarithms, float64 (R,).
        classes: of the rows' processors, str (R,).
    """

    fit: Fit
    constants: Array
    residuals: Mapping[str, Array]
    classes: Array

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


def find(rows: Sequence[Row], groupings: Sequence[str] = tuple(GROUPINGS)) -> Found:
    """Fit all rows, and each grouping's with one group left out."""
    fit = Fit(rows)
    constants = fit.solve()
    residuals = {
        name: fit.held_out(np.array([GROUPINGS[name](row) for row in rows]), constants) for name in groupings
    }
    classes = np.array([class_of(row.case.processor) for row in rows])
    return Found(fit=fit, constants=constants, residuals=residuals, classes=classes)


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
    spreads = spreads_of({name: found.residuals[name] for name in _RANGED}, found.classes)
    usual = _ends(_MARGIN * np.concatenate([found.residuals[name] for name in _RANGED]))
    for grouping in ("core", "runtime"):
        # What a group that was never seen adds to what any row may be off by.
        ends = _ends(_MARGIN * found.residuals[grouping])
        low, high = (math.sqrt(max(0.0, end**2 - least**2)) for end, least in zip(ends, usual, strict=True))
        spreads[f"another {grouping}"] = (low, high)
    value = {
        "schema": SCHEMA,
        "rows": len(found.fit.rows),
        "seen": sorted({f"{row.case.processor.core} {row.case.precision}" for row in found.fit.rows}),
        "constants": {
            name: round(float(v), 3)
            for name, v in zip(found.fit.names, found.constants, strict=True)
            if round(float(v), 3) and " before " not in name
        },
        "spreads": {name: [round(low, 3), round(high, 3)] for name, (low, high) in sorted(spreads.items())},
    }
    return json.dumps(value, indent=1) + "\n"


# ---- tables ----------------------------------------------------------------------------------------------------------


def error_percent(residuals: Array) -> float:
    """Give the median of |estimated - published| over published, in percent."""
    return float(100 * np.median(np.abs(np.expm1(-residuals))))


def tables(found: Found) -> str:
    """Show how far off estimates are, in Markdown: in all and by runtime; then by what was left out.

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

    every = np.ones(len(rows), dtype=bool)
    parts = [
        table(
            [
                line("all", every),
                *(line(name, found.classes == name) for name in sorted(set(found.classes))),
                *(line(name, kinds == name) for name in sorted(set(kinds))),
            ],
            ("rows", "n", "board left out: off by", "in range", "network left out: off by", "in range"),
        )
    ]
    for grouping, residuals in found.residuals.items():
        groups = found.groups(grouping)
        named = {group: row.model if grouping == "network" else group for group, row in zip(groups, rows, strict=True)}
        each = (
            f"{named[name]} {error_percent(residuals[groups == name]):.0f} % "
            f"({math.exp(-float(np.median(residuals[groups == name]))):.2f})"
            for name in sorted(set(groups))
        )
        parts.append(f"By {grouping} left out, {error_percent(residuals):.0f} % in all: {'; '.join(each)}.")
    return "\n\n".join(parts)


def main() -> None:
    """Fit, print the tables, and write the constants where that is asked for."""
    parser = argparse.ArgumentParser(description="fit the latency estimator to published figures")
    parser.add_argument("--data", type=Path, default=Path("../shared/latency"), metavar="DIR")
    parser.add_argument("--write", type=Path, metavar="FILE", help="edgecomp/latency.json")
    args = parser.parse_args()
    try:
        found = find(read_rows(args.data))
    except EdgecompError as e:
        raise SystemExit(f"latency_fit: {e}") from e
    print(tables(found))
    if args.write is not None:
        write_file(args.write, to_json(found).encode())


if __name__ == "__main__":
    main()
