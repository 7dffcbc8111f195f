"""Turn what a core was emulated to execute into an estimate of time. The emulated report itself has none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecomp.cycles import REGISTERS, TABLES, cycles_of
from edgecomp.errors import BundleError, TargetError, UsageError
from edgecomp.latency import Range
from edgecomp.report import ESTIMATE_SCHEMA, Source, table
from edgecomp.strictjson import load_strict_json

if TYPE_CHECKING:
    from edgecomp.target import Target

_MOST = 10**15
"""Instructions that are believed: months of a fast core, for one image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FromCounts:
    """An estimate from executed instructions.

    Attributes:
        report, target: as the user named them.
        instructions: executed for an image.
        latency_ms: from the fewest to the most cycles that the core takes for them; p50 is the middle.
        layers: instructions by layer; each is taken to be the same mix.
        basis: what it rests on, for people.
    """

    report: str
    target: str
    instructions: int
    latency_ms: Range
    layers: Mapping[str, int]
    basis: tuple[str, ...]

    def _layer(self, n: int) -> Range:
        share = n / self.instructions
        return Range(**{end: value * share for end, value in asdict(self.latency_ms).items()})

    def to_json(self) -> dict[str, object]:
        """Give it for machines; `source` says that nothing was measured."""
        return {
            "schema": ESTIMATE_SCHEMA,
            "source": Source.ESTIMATED.value,
            "model": self.report,
            "target": self.target,
            "runtime": "c",
            "instructions": self.instructions,
            "latency_ms": asdict(self.latency_ms),
            "layers": [
                {"name": name, "instructions": n, "latency_ms": asdict(self._layer(n))}
                for name, n in self.layers.items()
            ],
            "basis": list(self.basis),
        }

    def table(self) -> str:
        """Give it for people."""
        whole = self.latency_ms
        title = (
            f"{self.report} on {self.target}: estimated {whole.p50:.4g} ms, range {whole.p10:.4g}-{whole.p90:.4g} ms, "
            f"from {self.instructions:,} emulated instructions"
        )
        rows = [
            (name, f"{n:,}", f"{self._layer(n).p50:.3g}", f"{100 * n / self.instructions:.1f} %")
            for name, n in sorted(self.layers.items(), key=lambda item: -item[1])
        ]
        lines = (title, *(f"- {line}" for line in self.basis))
        return "\n".join((*lines, "", table(rows, ("layer", "instructions", "estimated ms", "share"))))


def estimate_report(path: Path, target: Target) -> FromCounts:
    """Estimate what an image takes on a board, from `edgecomp bench --target CORE --json`.

    Args:
        path: that report.
        target: a board with the core that was emulated.

    Raises:
        BundleError: it is no such report.
        TargetError: the board's clock, or the core's cycles, are not known.
        UsageError: another core was emulated.
    """
    report = _read(path)
    if target.clock_hz is None:
        raise TargetError(f"target {target.name!r:.80}: clock_hz is not known, which an estimate needs; take a board")
    low, high = cycles_of(target.cpu, report["classes"])
    if report["cpu"] != target.cpu:
        raise UsageError(f"{path}: is of a {report['cpu']}, {target.name} has a {target.cpu}; run bench for that core")
    assert target.cpu is not None
    ms = 1e3 / target.clock_hz
    known = TABLES[target.cpu]
    return FromCounts(
        report=str(path),
        target=target.name,
        instructions=report["instructions"],
        latency_ms=Range(p10=low * ms, p50=(low + high) / 2 * ms, p90=high * ms),
        layers=report["steps"],
        basis=(
            f"cycles of each class of instructions, fewest and most: {known.source}",
            f"on published figures: {known.error}",
            "memory without wait states; slower flash comes on top",
        ),
    )


def _read(path: Path) -> Mapping[str, Any]:
    expected = "expected what edgecomp bench --target CORE --json prints"
    try:
        value = load_strict_json(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is no text"
        raise BundleError(f"{path}: cannot be read ({reason}); {expected}") from e
    if not isinstance(value, dict) or value.get("source") != Source.EMULATED.value or "classes" not in value:
        raise BundleError(f"{path}: is no emulated report with classes of instructions; {expected}")
    classes: Any = value["classes"]
    steps: Any = value.get("steps")
    n = value.get("instructions")
    for name, counts in (("classes", classes), ("steps", steps)):
        if not isinstance(counts, dict) or not all(type(v) is int and 0 <= v <= _MOST for v in counts.values()):
            raise BundleError(
                f"{path}: {name} is {json.dumps(counts):.60}, expected whole numbers by name, up to {_MOST:_}"
            )
    if not isinstance(value.get("cpu"), str):
        raise BundleError(f"{path}: cpu is missing; {expected}")
    wanted = next(iter(TABLES.values())).cycles.keys()
    if classes.keys() != wanted:
        raise BundleError(f"{path}: classes are {', '.join(classes) or 'none':.80}, expected {', '.join(wanted)}")
    if type(n) is not int or not 1 <= n <= _MOST:
        raise BundleError(f"{path}: instructions is {json.dumps(n):.60}, expected a whole number from 1 to {_MOST:_}")
    counted = {"classes": sum(classes.values()) - classes[REGISTERS], "steps": sum(steps.values())}
    if counted["classes"] != n or counted["steps"] > n:
        name = "classes" if counted["classes"] != n else "steps"
        raise BundleError(f"{path}: {name} add up to {counted[name]:_}, instructions is {n:_}: one was changed")
    return value
