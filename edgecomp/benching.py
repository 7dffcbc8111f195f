"""Measure a built folder or a single file on this machine, beside the float and the plain int8 form of the model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecomp import manifest
from edgecomp.artifact import FILES
from edgecomp.compress import border_codes, compress, run_codes
from edgecomp.errors import BundleError, TargetError, UsageError
from edgecomp.files import MANIFEST
from edgecomp.folder import BuiltFolder, open_folder, read_file
from edgecomp.report import BenchReport, Comparison, table

if TYPE_CHECKING:
    from edgecomp.benchmarks.firmware import FirmwareReport
    from edgecomp.check import Stage

COMPRESSED, INT8, FLOAT = "compressed", "plain int8", "float32"
CUT = ", cut"
"""Behind the names of the other models where they lack channels or classes of the network that was compressed."""
YARDSTICKS = tuple(name + cut for name in (INT8, FLOAT) for cut in ("", CUT))
"""What models are called that stand beside a folder's, which nobody built."""
MIN_S = 2.0
"""Measuring time for each model at least, seconds, unless another is asked for."""
_TRIAL_S = 60.0


_UNPACKED = {
    "unpacked_at_load": "unpacked to int8 when it is loaded; load and memory include that",
    "unpacked_beforehand": "unpacked to int8 beforehand, on another machine; load and memory do not include that",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Benched:
    """One file's comparison, with the accuracies that its manifest knows.

    Attributes:
        title: the file.
        comparison: the measurements.
        accuracy_percent: by label of the comparison, of those that it was measured on.
        note: what the other models are, to stand below the table.
    """

    title: str
    comparison: Comparison
    accuracy_percent: Mapping[str, float]
    note: str = ""

    def table(self) -> str:
        """Give the table for people: bytes, accuracy, latency, memory; ratios of medians from the one run."""
        reports = {r.label.removesuffix(CUT): r for r in self.comparison.reports}
        rows = [self._row(r, reports) for r in reports.values()]
        base = "int8" if self.comparison.baseline.startswith(INT8) else "first"
        header = (
            "model", "file bytes", "smaller", "accuracy", "p50 ms", "p90 ms", "min ms", f"time / {base}", "95 %",
            "time / float", "load ms", "peak MB", "model MB",
        )  # fmt: skip
        first = self.comparison.reports[0]
        threads = f"{first.threads} thread{'s' if first.threads > 1 else ''}"
        cpu = first.environment.get("cpu", "unknown processor")
        runtimes = dict.fromkeys(f"{r.runtime} {r.runtime_version}" for r in reports.values())
        title = f"{self.title}: {', '.join(runtimes)}, {threads}, {cpu}; measured"
        if first.not_valid:
            title += f"\nnot valid: {'; '.join(first.not_valid)}"
        for when, what in _UNPACKED.items():
            if unpacked := [r.label for r in reports.values() if r.execution.get(when)]:
                title += f"\n{', '.join(unpacked)}: {what}"
        return "\n\n".join(part for part in (title, table(rows, header), self.note) if part)

    def _row(self, r: BenchReport, reports: Mapping[str, BenchReport]) -> tuple[object, ...]:
        assert r.p50_us is not None
        assert r.p90_us is not None
        assert r.min_us is not None
        ratio = self.comparison.ratios.get(r.label)
        float_report = reports.get(FLOAT)
        accuracy = self.accuracy_percent.get(r.label)
        return (
            r.label,
            r.artifact_bytes,
            "-" if float_report is None else f"{float_report.artifact_bytes / r.artifact_bytes:.1f}x",
            "-" if accuracy is None else f"{accuracy:.2f} %",
            f"{r.p50_us / 1e3:.3f}",
            f"{r.p90_us / 1e3:.3f}",
            f"{r.min_us / 1e3:.3f}",
            "1.000" if r.label == self.comparison.baseline else "-" if ratio is None else f"{ratio.median:.3f}",
            "-" if ratio is None else f"{ratio.low:.3f}-{ratio.high:.3f}",
            "-" if float_report is None or float_report.p50_us is None else f"{r.p50_us / float_report.p50_us:.3f}",
            "-" if r.load_ms is None else f"{r.load_ms:.1f}",
            "-" if r.peak_memory_bytes is None else f"{r.peak_memory_bytes / 1e6:.1f}",
            "-" if r.model_memory_bytes is None else f"{r.model_memory_bytes / 1e6:.1f}",
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """Models that are measured side by side.

    Attributes:
        title: the file they are about, with its folder.
        entries: label, file or its bytes, format of each.
        baseline: the label that ratios refer to.
        accuracy_percent: by label, of those that it was measured on.
        note: what the other models are, to stand below a table.
    """

    title: str
    entries: tuple[tuple[str, Path | bytes, str], ...]
    baseline: str
    accuracy_percent: Mapping[str, float]
    note: str = ""


def side_by_side(paths: Sequence[Path], runtime: str | None) -> list[Subject]:
    """Say what is to be measured for several paths, all of them in turns; for one as `subjects` does.

    Args:
        paths: files, and built folders, whose compressed files are taken.
        runtime: leaves out formats that it does not read.

    Raises:
        BundleError: as `subjects`.
        UsageError: a path stands twice, or nothing is left.
    """
    if len(paths) == 1:
        return subjects(paths[0], runtime)
    entries: list[tuple[str, Path | bytes, str]] = []
    for path in paths:
        for subject in subjects(path, runtime):
            _, model, format_name = subject.entries[-1]
            entries.append((subject.title, model, format_name))
    labels = [label for label, _, _ in entries]
    if len(set(labels)) < len(labels):
        raise UsageError(f"{', '.join(labels)}: expected each model once")
    return [Subject(title="side by side", entries=tuple(entries), baseline=labels[0], accuracy_percent={})]


def bench_artifact(
    paths: Sequence[Path],
    *,
    runtime: str | None,
    threads: int,
    min_s: float,
    repeat: int = 0,
    seed: int,
    stage: Stage,
) -> list[Benched]:
    """Measure on this machine, the models of each comparison in turns within one process.

    Args:
        paths: see `side_by_side`.
        runtime: see `benchmarks.runners.RUNNERS`; None for each format's own.
        threads: of each runtime.
        min_s: measuring time for each model at least, seconds.
        repeat: so many times again, while a run is not valid.
        seed: of the order of the runs.
        stage: shows how far the work is.

    Raises:
        BundleError: a file is missing, damaged, or not the one its manifest speaks of.
        TargetError: the runtime is missing.
        UsageError: the runtime is unknown, or threads or min_s are out of range.
    """
    if not 0 < min_s <= 3600:
        raise UsageError(f"--min-secs {min_s:g}: expected seconds, above 0 and up to 3600")
    if seed < 0:
        raise UsageError(f"--seed {seed}: expected 0 or more")
    found, benched = side_by_side(paths, runtime), []
    if threads > 1 and any(_in_micro(subject, runtime) for subject in found):
        raise UsageError(f"--threads {threads}: tflite-micro has one; leave --threads out, or name another --runtime")
    for subject in found:
        if _in_micro(subject, runtime):
            for _, model, _ in subject.entries:
                if isinstance(model, Path):
                    _try_in_micro(model)
        comparison = _run(
            subject, runtime, threads=threads, min_s=min_s, attempts=1 + repeat, seed=seed, stage=stage
        )
        benched.append(
            Benched(
                title=subject.title,
                comparison=comparison,
                accuracy_percent=subject.accuracy_percent,
                note=subject.note,
            )
        )
    return benched


def subjects(path: Path, runtime: str | None) -> list[Subject]:
    """Say what is to be measured for a path, by format.

    Args:
        path: a built folder, or an .onnx or .tflite file; beside a file of a built folder the float and the plain int8
            model are measured too, a file on its own is measured alone.
        runtime: leaves out formats that it does not read.

    Raises:
        BundleError: a file is missing, damaged, or not the one its manifest speaks of.
        UsageError: the runtime is unknown, or nothing is left.
    """
    if path.is_dir():
        return _of_folder(path, None, runtime)
    if not path.is_file():
        raise BundleError(f"{path}: no such file or folder; expected a built folder, an .onnx or a .tflite file")
    if not stands_alone(path):
        return _of_folder(path.parent, path.name, runtime)
    format_name = path.suffix.removeprefix(".")
    if format_name not in ("onnx", "tflite"):
        raise BundleError(f"{path}: expected a file that ends in .onnx or .tflite")
    if format_name == "tflite" and _is_for_micro(path):
        format_name = "tflm"
    entries = ((path.name, path, format_name),)
    return [Subject(title=str(path), entries=entries, baseline=path.name, accuracy_percent={})]


def stands_alone(path: Path) -> bool:
    """Tell whether a file is of no built folder, so that nothing is measured beside it."""
    of_folder = (path.parent / MANIFEST).is_file() and path.name in {names[0] for names in FILES.values()}
    return path.is_file() and not of_folder


def _in_micro(subject: Subject, runtime: str | None) -> bool:
    return runtime == "tflite-micro" or any(format == "tflm" for _, _, format in subject.entries)


def _is_for_micro(path: Path) -> bool:
    """Tell whether a TFLite file has weights that only TFLite Micro decodes."""
    from edgecomp.exporters.tflm_decode import OPERATOR
    from edgecomp.exporters.unpack_tflite import has_custom

    return bool(has_custom(read_file(path), OPERATOR))


def _try_in_micro(path: Path) -> None:
    """Run a file of unknown origin once in a process of its own: TFLite Micro trusts it, and a damaged one may kill it.

    Raises:
        BundleError: it does not end well.
        TargetError: TFLite Micro is not installed.
    """
    from edgecomp.benchmarks.memory import footprint
    from edgecomp.benchmarks.tflm import load_package

    load_package()
    try:
        footprint(path, "tflite-micro", timeout_s=_TRIAL_S, processes=1)
    except TargetError as e:
        raise BundleError(f"{path}: does not run in TFLite Micro, tried in a process of its own: {e}") from e


def _of_folder(path: Path, only: str | None, runtime: str | None) -> list[Subject]:
    from edgecomp.benchmarks.runners import runner_class
    from edgecomp.build import yardsticks

    folder = open_folder(path)
    artifacts: list[Mapping[str, Any]] = [a for a in folder.record["artifacts"] if only in (None, a["path"])]
    in_c = [a for a in artifacts if a["format"] == "c"]
    artifacts = [a for a in artifacts if a not in in_c]
    if in_c and not artifacts:
        raise UsageError(f"{path}: a network in C is measured on a core: add --target NAME, e.g. cortex-m4")
    if runtime is not None:
        artifacts = [a for a in artifacts if a["format"] in runner_class(runtime).formats]
    if not artifacts:
        found = only or "its files"
        raise UsageError(f"{path}: {found} cannot run in {runtime}; leave --runtime out for each format's own")
    cut = CUT if _is_cut(folder) else ""
    kept = []
    for entry in artifacts:
        others = yardsticks(folder.plan, folder.graph, entry["format"])
        entries = (
            (FLOAT + cut, others["fp32"].data, entry["format"]),
            (INT8 + cut, others["int8"].data, entry["format"]),
            (COMPRESSED, folder.read(entry["path"]), entry["format"]),
        )
        kept.append(
            Subject(
                title=str(path / entry["path"]),
                entries=entries,
                baseline=INT8 + cut,
                accuracy_percent={COMPRESSED: entry["accuracy"]["value"]},
                note=_note(folder),
            )
        )
    return kept


def _is_cut(folder: BuiltFolder) -> bool:
    """Tell whether the float graph in a folder has fewer weights than the network that was compressed."""
    n_weights = sum(manifest.weight_counts(folder.graph).values())
    return 4 * n_weights < int(folder.record["float"]["weight_bytes"])


def _note(folder: BuiltFolder) -> str:
    """Say what the float and the plain int8 model are, and what the network before compression was."""
    before = folder.record["float"]
    what = "what is left of it, channels or classes cut" if _is_cut(folder) else "all of it"
    return (
        f"Before compression: {before['accuracy']:.2f} % accuracy in torch, {before['weight_bytes']} bytes of float32 "
        f"weights.\n{FLOAT} and {INT8} are {what}, with weights adjusted to the plan: for time and memory, no "
        "accuracy was measured on them."
    )


def _run(
    subject: Subject,
    runtime: str | None,
    *,
    threads: int,
    min_s: float,
    attempts: int,
    seed: int,
    stage: Stage,
) -> Comparison:
    from edgecomp.benchmarks.bench import bench

    with stage(f"measuring {Path(subject.title).name}", 200) as advance:
        done = {"latency": 0, "memory": 0}

        def progress(part: str, share: float) -> None:
            now = int(100 * share)
            advance(now - done[part])
            done[part] = now

        comparison: Comparison = bench(
            subject.entries,
            runtime=runtime,
            threads=threads,
            baseline=subject.baseline,
            min_s=min_s,
            max_s=max(30.0, 10 * min_s),
            attempts=attempts,
            seed=seed,
            progress=progress,
        )
        return comparison


def bench_target(
    path: Path,
    target: str,
    *,
    n_images: int = 2,
    seed: int,
    stage: Stage,
    runtime: str | None = None,
    compiler: str | None = None,
) -> FirmwareReport:
    """Run the network in C of a built folder on an emulated core, and compare its outputs with the reference's.

    Args:
        path: a folder that was built with format c, or its network.c.
        target: the name of a core, see `edgecomp targets`.
        n_images: of random codes, at least one.
        seed: of these.
        stage: shows how far the work is.
        runtime: none: a core has no choice of them.
        compiler: "gcc", "zig" or "clang"; None for the first that is installed.

    Raises:
        BundleError: a file is missing, damaged, or not the one its manifest speaks of.
        ParityError: an output is not the reference's.
        TargetError: the core cannot be emulated, or a tool is missing.
        UsageError: the core is unknown, the seed negative, no network in C is there, or a runtime is asked for.
    """
    from edgecomp.benchmarks.cross_compile import core_of
    from edgecomp.benchmarks.firmware import measure_firmware
    from edgecomp.targets import load

    if path.is_file() and (kind := {".onnx": "ONNX", ".tflite": "TFLite"}.get(path.suffix)):
        raise UsageError(f"{path}: {target}, a core, runs the network in C; this is {kind}: give a built folder")
    if runtime is not None:
        raise UsageError(f"--runtime {runtime} with --target {target}: a core runs the network in C; leave one out")
    if seed < 0:
        raise UsageError(f"--seed {seed}: expected 0 or more")
    known = load(target)
    core_of(known.cpu, target)
    folder = open_folder(path.parent if path.is_file() else path)
    entry = next((a for a in folder.record["artifacts"] if a["format"] == "c"), None)
    if entry is None:
        raise UsageError(f"{path}: has no network in C, which is what {target} runs; build it with --format c")
    files = {name: folder.read(name) for name in FILES["c"]}
    quantized = compress(folder.graph, folder.plan)
    shape = quantized.tensors[border_codes(quantized)[0]].shape[1:]
    codes = np.random.default_rng(seed).integers(-128, 128, size=(n_images, *shape), dtype=np.int8)
    expected = run_codes(quantized, codes)
    with stage(f"running in {target}", n_images) as advance, tempfile.TemporaryDirectory() as place:
        images, results = (x.transpose(0, 2, 3, 1) if x.ndim == 4 else x for x in (codes, expected))
        report: FirmwareReport = measure_firmware(
            files, target, known.cpu, images, results, Path(place), advance, compiler
        )
        return report
