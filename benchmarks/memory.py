"""Peak memory and load time of a model, each taken in a fresh process.

What a process needs is read from the kernel (VmHWM, the peak of resident memory) at three points: (a) the runtime is
imported and has run a model of one Relu, (b) the model is loaded, (c) it has run. What the model adds is the peak over
(b) and (c) minus what is resident at (a); the peak is reset after (a), so that what importing took does not hide it.

Parent: `footprint`. Child: `python -m edgecomp.benchmarks.memory RUNTIME FILE THREADS`, which writes one JSON object.
"""

from __future__ import annotations

import base64
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import edgecomp
from edgecomp.errors import EdgecompError, TargetError

RUNS = 3
"""Inferences of a process."""
PROCESSES = 3
"""Fresh processes a model; medians are reported."""

STATUS = Path("/proc/self/status")

# y = Relu(x), float (1, 1), the smallest models that make a runtime set itself up (tests/test_bench.py looks inside).
_TINY_TFLITE = base64.b64decode(
    "GAAAAFRGTDMAAA4AFAAQAAwACAAAAAQADgAAABAAAAAcAAAA2AAAAAMAAAABAAAACAAAAAQABAAEAAAAAQAAABAAAAAMABQAEAAMAAgABAAM"
    "AAAAEAAAADwAAABAAAAARAAAAAEAAAAQAAAAAAAKAAwAAAAIAAQACgAAAAgAAAAMAAAAAQAAAAEAAAABAAAAAAAAAAEAAAABAAAAAQAAAAAA"
    "AAACAAAANAAAAAQAAADg////CAAAAAwAAAABAAAAeQAAAAIAAAABAAAAAQAAAAwADAAIAAAAAAAEAAwAAAAIAAAADAAAAAEAAAB4AAAAAgAA"
    "AAEAAAABAAAAAQAAABAAAAAMAAwACwAAAAAABAAMAAAAEwAAAAAAABM="
)
TINY: Mapping[str, bytes] = {
    "onnx": base64.b64decode(
        "CAgSADo+CgwKAXgSAXkiBFJlbHUSBHRpbnlaEwoBeBIOCgwIARIICgIIAQoCCAFiEwoBeRIOCgwIARIICgIIAQoCCAFCBAoAEA0="
    ),
    "tflite": _TINY_TFLITE,
    "tflm": _TINY_TFLITE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a model costs a process.

    Attributes:
        runtime_bytes: resident with the runtime set up and no model: point (a).
        loaded_bytes: peak with the model loaded, before it ran: point (b).
        peak_bytes: peak over the process's whole life.
        model_bytes: what the model added, peak over (b) and (c) minus (a).
        load_ms: from the file to ready to run.
    """

    runtime_bytes: int
    loaded_bytes: int
    peak_bytes: int
    model_bytes: int
    load_ms: float


def footprint(
    file: Path, runtime: str, *, threads: int = 1, timeout_s: float = 120.0, processes: int = PROCESSES
) -> Footprint:
    """Measure a model in fresh processes, and give the median of each number.

    Raises:
        TargetError: this system does not tell peak memory, or a process fails, dies or does not end in time.
    """
    if not STATUS.exists():
        raise TargetError(f"peak memory is read from {STATUS}, which this system lacks")
    return median_footprint([_child(file, runtime, threads=threads, timeout_s=timeout_s) for _ in range(processes)])


def median_footprint(runs: Sequence[Mapping[str, float]]) -> Footprint:
    """Give the median of each number that processes found; see `take`."""

    def middle(name: str) -> float:  # of an even number the lower one; `statistics` would take 0.4 MB
        return sorted(run[name] for run in runs)[(len(runs) - 1) // 2]

    return Footprint(
        runtime_bytes=int(middle("runtime_bytes")),
        loaded_bytes=int(middle("loaded_bytes")),
        peak_bytes=int(middle("peak_bytes")),
        model_bytes=int(middle("model_bytes")),
        load_ms=middle("load_ms"),
    )


def _child(file: Path, runtime: str, *, threads: int, timeout_s: float) -> dict[str, float]:
    import subprocess

    command = [sys.executable, "-m", "edgecomp.benchmarks.memory", runtime, str(file.absolute()), str(threads)]
    # The child must find this very edgecomp, installed or not.
    here = str(Path(edgecomp.__file__).parents[1])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    where = f"memory of {file.name}"
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired as error:
        raise TargetError(f"{where}: not done after {timeout_s:g} s; give it more time, or a smaller model") from error
    except OSError as error:
        raise TargetError(f"{where}: cannot start {sys.executable}: {error.strerror}") from error
    if done.returncode < 0:
        raise TargetError(f"{where}: the process was killed by signal {-done.returncode}; is there memory enough?")
    lines = done.stderr.strip().splitlines() or ["no message"]
    if done.returncode:
        raise TargetError(f"{where}: {lines[-1][:300]}")
    names = ("runtime_bytes", "loaded_bytes", "peak_bytes", "model_bytes", "load_ms")
    try:
        run = json.loads(done.stdout)
        return {name: float(run[name]) for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{where}: the process wrote {done.stdout[:80]!r}, expected one JSON object") from error


# ---- in the child ----------------------------------------------------------------------------------------------------


def _status_bytes(name: str) -> int:
    for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise TargetError(f"{STATUS} has no {name}")


def settle() -> None:
    """Give freed memory back, so that a model cannot hide in it."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # not glibc
        return


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # a kernel or a container that forbids it
        return False
    return True


def take(runtime: str, file: Path, threads: int, *, emulated: bool = False) -> dict[str, float]:
    """Measure this process while it loads and runs a model; it must be a fresh one.

    Args:
        runtime: its name.
        file: the model.
        threads: of the runtime.
        emulated: this is QEMU's user mode, whose own memory is not to be counted. The model is run once beforehand, so
            that its instructions are translated; what QEMU itself grows by afterwards is taken off. At (a) only what
            the program itself has mapped is counted, and the peak is that and what the model adds.

    Raises:
        BundleError: the file cannot be loaded.
        TargetError: the runtime is unknown or missing, or runs no files.
    """
    from .runners import runner_class

    runner = runner_class(runtime)
    formats = [format for format in runner.formats if format in TINY]
    if not formats:
        raise TargetError(f"runtime {runtime} runs no files, so its memory is not measured")
    empty = runner(TINY[formats[0]], threads=threads)
    empty.infer_once()
    del empty
    if emulated:
        rehearsal = runner(file, threads=threads)
        for _ in range(RUNS):
            rehearsal.infer_once()
        del rehearsal
    settle()
    before = _status_bytes("VmHWM")
    base = _status_bytes("VmRSS") if _reset_peak() else before
    resident = _guest_bytes() if emulated else base
    start = time.perf_counter_ns()
    model = runner(file, threads=threads)
    load_ms = (time.perf_counter_ns() - start) / 1e6
    loaded = _status_bytes("VmHWM")
    for _ in range(RUNS):
        model.infer_once()
    after = _status_bytes("VmHWM")
    if emulated:
        grown = (_status_bytes("VmRSS") - _guest_bytes()) - (base - resident)
        loaded, after = (resident + max(0, peak - base - grown) for peak in (loaded, after))
        base, before = resident, 0
    return {
        "runtime_bytes": base,
        "loaded_bytes": loaded,
        "peak_bytes": max(before, after),
        "model_bytes": after - base,
        "load_ms": load_ms,
    }


def _guest_bytes() -> int:
    """Count what an emulated program has in memory, without QEMU itself.

    QEMU 7.2 shows a program its own mappings as /proc/self/maps, and its smaps as they are, QEMU's among them; a newer
    one shows the program's own in both. A program of 32 bits lies at other addresses than it sees: how far away is told
    by the first file that is mapped.
    """
    own = [line.split() for line in Path("/proc/self/maps").read_text("utf-8").splitlines()]
    all_ = [line.split() for line in Path("/proc/self/smaps").read_text("utf-8").splitlines()]
    ranges = [(_low(words), int(words[0].split("-")[1], 16)) for words in own]
    first = next(words for words in own if "/" in words[-1])
    shift = _low(next(words for words in all_ if words[-1] == first[-1])) - _low(first)
    total, counted = 0, False
    for words in all_:
        if words[0].endswith(":"):
            total += int(words[1]) * 1024 if words[0] == "Rss:" and counted else 0
        else:
            counted = any(low <= _low(words) - shift < high for low, high in ranges)
    return total


def _low(words: list[str]) -> int:
    """Give the address where a mapping begins."""
    return int(words[0].split("-")[0], 16)


def main(argv: list[str]) -> int:
    """Run the child: RUNTIME FILE THREADS, and "emulated" where it is."""
    runtime, file, threads, *rest = argv
    try:
        result = take(runtime, Path(file), int(threads), emulated=rest == ["emulated"])
    except EdgecompError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
