"""Measure a built folder or a file on other machines than this: emulated boards, and devices over SSH."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgecomp.benching import subjects
from edgecomp.report import BenchReport, Comparison, table

if TYPE_CHECKING:
    from edgecomp.check import Stage


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Emulated:
    """One file's run on an emulated core, beside the float and the plain int8 model.

    Attributes:
        title: the file.
        comparison: what came out.
        accuracy_percent: by label, of those that it was measured on.
        note: what the other models are.
    """

    title: str
    comparison: Comparison
    accuracy_percent: Mapping[str, float]
    note: str = ""

    def table(self) -> str:
        """Give the table for people: bytes, accuracy, instructions, memory, outputs beside this machine's."""
        reports = {r.label: r for r in self.comparison.reports}
        base = reports[self.comparison.baseline]
        rows = [self._row(r, base) for r in reports.values()]
        header = (
            "model", "file bytes", "accuracy", "instructions", "/ int8", "vector", "dot product", "load and store",
            "peak MB", "model MB", "outputs",
        )  # fmt: skip
        first = self.comparison.reports[0]
        where = f"{first.target} ({first.environment['emulator']})"
        title = f"{self.title}: {first.runtime} {first.runtime_version}, {where}; emulated, one inference, one thread"
        return "\n\n".join(part for part in (title, table(rows, header), self.note) if part)

    def _row(self, r: BenchReport, base: BenchReport) -> tuple[object, ...]:
        counts = r.instructions
        accuracy = self.accuracy_percent.get(r.label)
        assert r.peak_memory_bytes is not None
        assert r.model_memory_bytes is not None
        return (
            r.label,
            r.artifact_bytes,
            "-" if accuracy is None else f"{accuracy:.2f} %",
            counts["total"],
            f"{counts['total'] / base.instructions['total']:.3f}",
            counts["simd_integer"] + counts["float"],
            counts["dot_product"],
            sum(counts[kind] for kind in ("load", "store", "simd_load", "simd_store")),
            f"{r.peak_memory_bytes / 1e6:.1f}",
            f"{r.model_memory_bytes / 1e6:.1f}",
            _outputs(r),
        )


def _outputs(r: BenchReport) -> str:
    n, different = r.execution["values_compared"], r.execution["values_different"]
    if not different:
        return f"all {n} as on this machine"
    largest, why = r.execution["largest_difference"], r.execution["computed_otherwise"]
    assert isinstance(why, tuple)
    return f"{different} of {n} not as on this machine, by {largest:.3g} at most: {', '.join(why) or 'real numbers'}"


def bench_emulated_board(
    path: Path, target: str, *, runtime: str | None, seed: int, stage: Stage
) -> list[Emulated]:
    """Run a folder's models, or a file, on an emulated board.

    Args:
        path: see `benching.subjects`.
        target: its name, see `targets.emulated`.
        runtime: None for each format's own.
        seed: of the images.
        stage: shows how far the work is.

    Raises:
        BundleError: a file is missing, damaged, or not the one its manifest speaks of.
        ParityError: a code is not the one that this machine computes.
        TargetError: the board or the runtime is unknown or not installed, or a run fails.
        UsageError: nothing can be run.
    """
    from edgecomp.benchmarks.emulated import bench_emulated
    from edgecomp.targets.emulated import core_of

    core_of(target)
    benched = []
    for subject in subjects(path, runtime):
        with stage(f"{target}: {Path(subject.title).name}", 2 * len(subject.entries)) as advance:
            comparison: Comparison = bench_emulated(
                subject.entries, target, runtime=runtime, seed=seed, progress=advance, baseline=subject.baseline
            )
        benched.append(
            Emulated(
                title=subject.title,
                comparison=comparison,
                accuracy_percent=subject.accuracy_percent,
                note=subject.note,
            )
        )
    return benched
