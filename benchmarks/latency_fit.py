"""Fit the latency estimator to published figures, and see how far off it is on boards and networks it has not seen.

python -m edgecomp.benchmarks.latency_fit reads ../shared/latency (--data), prints the tables of README, and with
--write FILE stores the constants that edgecomp ships as latency.json. About a minute. Not here: the physics
(`edgecomp.latency`), the networks (`published`).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgecomp.errors import DataError
from edgecomp.graph import Array
from edgecomp.latency import QUANTITIES, Case, Layout, constants_of
from edgecomp.processor import Processor, processor_of
from edgecomp.target import Target
from edgecomp.targets import load, names
from edgecomp.work import Kind, Work

from .published import NETWORKS

FILES = ("xnnpack_readme.csv", "ncnn_benchmark.csv", "mlperf_tiny.csv", "stm32ai_modelzoo.csv")
RUNTIME_OF: tuple[tuple[str, str], ...] = (
    ("ncnn", "ncnn"),
    ("XNNPACK", "litert"),
    ("TensorFlow Lite (X-LINUX-AI", "litert"),
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
"""What an older version's name holds, and the version before which it was: its constants are told apart from today's."""
_MB = 1_000_000
# Copying and filling main memory, MB/s: ThomasKaiser/sbc-bench:Results.md, boards of the same chip.
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
    return next((f"{runtime} before {era}" for marks, era in _ERAS.get(runtime, ()) if any(m in text for m in marks)), runtime)


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


# ---- the fit -----------------------------------------------------------------------------------------------------------

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
        return 0.0, 0.4 if rest.count(" ") == 0 else 0.25
    return 0.0, 0.5 if rest.startswith("group") else 0.25


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

    def held_out(self, group_of: Callable[[Row], str], start: Array, advance: Callable[[str], object]) -> Array:
        """Estimate every row by constants fitted without its group: residuals as of `residuals`, float64 (R,)."""
        groups = np.array([group_of(row) for row in self.rows])
        found = np.zeros(len(self.rows))
        for group in sorted(set(groups)):
            left_out = groups == group
            advance(group)
            found[left_out] = self.residuals(self.solve(~left_out, start, steps=8))[left_out]
        return found
