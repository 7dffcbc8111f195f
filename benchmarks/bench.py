"""Measure models side by side on this machine: latency in turns, memory and load time in fresh processes."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edgecomp.errors import BundleError, TargetError, UsageError
from edgecomp.report import BenchReport, Comparison, Source, summarise

from .environment import environment, state
from .harness import MAX_S, MIN_S, ROUNDS, WARMUP_MAX_S, Clock, Timing, measure, ratio
from .memory import PROCESSES, STATUS, Footprint, footprint, settle
from .runners import OnnxRuntime, Runner, default_runtime, runner_class
from .validity import why_not_valid

PROFILED_RUNS = 20
"""Inferences that an operator's mean time is of."""
Entry = tuple[str, Path | str | bytes, str]
"""Label, file (or its bytes), format."""

_DIGEST = "import hashlib, sys; print(hashlib.file_digest(open(sys.argv[1], 'rb'), 'sha256').hexdigest())"


def bench(
    entries: Sequence[Entry],
    *,
    runtime: str | None = None,
    threads: int = 1,
    baseline: str | None = None,
    min_s: float = MIN_S,
    max_s: float = MAX_S,
    rounds: int = ROUNDS,
    seed: int = 0,
    clock: Clock = time.perf_counter_ns,
    progress: Callable[[str, float], object] | None = None,
    warmup_runs: int = 0,
    samples: int = 1,
    profile: bool = False,
    attempts: int = 1,
    pause_s: float = 5.0,
    processes: int = PROCESSES,
) -> Comparison:
    """Measure several models in one run, in turns; one inference is one image.

    Args:
        entries: what to measure; labels are unique.
        runtime: used for every entry whose format it reads; the others run in their format's default runtime.
        threads: given to every runtime.
        baseline: label that ratios refer to; the first unless given.
        min_s: see `harness.measure`, as `max_s` and `rounds`.
        max_s: see there.
        rounds: see there.
        seed: of the order within rounds and of the confidence intervals.
        clock: nanoseconds.
        progress: called with a stage's name and the share of it that is done, 0 to 1.
        warmup_runs: fewest inferences of a warm-up.
        samples: fewest samples of each model.
        profile: also time each operator, where the runtime has a profiler.
        attempts: so often at most is measured, until a run is valid.
        pause_s: before another attempt, so that a hot board cools; seconds.
        processes: fresh ones in which memory and load time of a model are taken.

    Raises:
        BundleError: a file cannot be read, or its runtime refuses it.
        TargetError: a runtime is missing, or reads none of the formats; or a process for memory fails.
        UsageError: no entry, labels that are not unique, or a number out of range.
    """
    labels = [label for label, _, _ in entries]
    if not labels or len(set(labels)) != len(labels):
        raise UsageError(f"labels {', '.join(labels) or '(none)'}: expected at least one, and each once")
    baseline = labels[0] if baseline is None else baseline
    if baseline not in labels:
        raise UsageError(f"baseline {baseline!r:.80} is not measured; there are {', '.join(labels)}")
    runtimes = _runtimes(entries, runtime)
    # Not numpy.random: see `runtime.sample_image`.
    order, draws = random.Random(f"order {seed}"), random.Random(f"draws {seed}")
    report = progress if progress is not None else _ignore
    facts = environment()
    with ExitStack() as stack:
        files = [_on_disk(entry, stack) for entry in entries]
        settle()
        runners = {
            label: runner_class(name)(file, threads=threads)
            for label, name, file in zip(labels, runtimes, files, strict=True)
        }
        for attempt in range(attempts):
            before = state()
            timings = measure(
                {label: runner.infer_once for label, runner in runners.items()},
                clock=clock,
                rng=order,
                rounds=rounds,
                warmup_runs=warmup_runs,
                warmup_max_s=max(WARMUP_MAX_S, warmup_runs and max_s),
                min_s=min_s,
                max_s=max_s,
                samples=samples,
                progress=lambda share: report("latency", share),
            )
            after = state()
            not_valid = tuple(why_not_valid(before, after, timings))
            if not not_valid:
                break
            if attempt + 1 < attempts:
                time.sleep(pause_s)
        layers = {label: _layer_times(runner) if profile else {} for label, runner in runners.items()}
        footprints: list[Footprint | None] = []
        for i, (file, name) in enumerate(zip(files, runtimes, strict=True)):
            there = STATUS.exists()
            footprints.append(footprint(file, name, threads=threads, processes=processes) if there else None)
            report("memory", (i + 1) / len(files))
        ratios = {label: ratio(timings[label], timings[baseline], rng=draws) for label in labels if label != baseline}
        reports = []
        for (label, _, format), file, name, taken in zip(entries, files, runtimes, footprints, strict=True):
            reports.append(
                BenchReport(
                    label=label,
                    artifact=file.name,
                    artifact_bytes=file.stat().st_size,
                    sha256=_sha256(file),
                    format=format,
                    target="host",
                    runtime=name,
                    runtime_version=runners[label].version,
                    threads=threads,
                    execution=runners[label].describe(),
                    source=Source.MEASURED,
                    **measured(timings[label], taken),
                    layers_us=layers[label],
                    not_valid=not_valid,
                    before=before,
                    after=after,
                    environment=facts,
                )
            )
    return Comparison(reports=tuple(reports), baseline=baseline, ratios=ratios)


def measured(timing: Timing, taken: Footprint | None) -> dict[str, Any]:
    """Give the fields of a report that come from samples and from memory, whichever runner took them."""
    p50, p90, p99, smallest = summarise(timing.samples_us)
    return {
        "warmups": timing.warmups,
        "steady": timing.steady,
        "rounds": timing.rounds,
        "samples_us": timing.samples_us,
        "p50_us": p50,
        "p90_us": p90,
        "p99_us": p99,
        "min_us": smallest,
        "load_ms": None if taken is None else taken.load_ms,
        "peak_memory_bytes": None if taken is None else taken.peak_bytes,
        "model_memory_bytes": None if taken is None else taken.model_bytes,
    }


def _layer_times(runner: Runner) -> dict[str, float]:
    """Time each operator, in microseconds, by the runtime's own profiler; LiteRT's has no way to it from Python."""
    return runner.profile(PROFILED_RUNS) if isinstance(runner, OnnxRuntime) else {}


def _runtimes(entries: Sequence[Entry], runtime: str | None) -> list[str]:
    names = [default_runtime(format) for _, _, format in entries]
    if runtime is None:
        return names
    reads = runner_class(runtime).formats
    if not any(format in reads for _, _, format in entries):
        formats = sorted({format for _, _, format in entries})
        raise TargetError(f"runtime {runtime} reads {', '.join(reads)}, the models are {', '.join(formats)}")
    return [runtime if format in reads else name for (_, _, format), name in zip(entries, names, strict=True)]


def _on_disk(entry: Entry, stack: ExitStack) -> Path:
    """Give the entry's file; bytes are written to one, named after the label, in a folder of its own."""
    label, model, format = entry
    if not isinstance(model, bytes):
        path = Path(model)
        if not path.is_file():
            raise BundleError(f"{path}: no such file; expected an exported model")
        return path
    import tempfile  # brings libraries for archives, 0.6 MB

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgecomp-bench-")))
    path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', label)[:100] or 'model'}.{format}"
    path.write_bytes(model)
    return path


def _sha256(file: Path) -> str:
    """Identify a file's content, in a process of its own: hashlib loads a library of 4 MB."""
    command = [sys.executable, "-I", "-c", _DIGEST, str(file.absolute())]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise BundleError(f"{file}: its digest cannot be computed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout.strip()


def _ignore(stage: str, share: float) -> None:
    pass
