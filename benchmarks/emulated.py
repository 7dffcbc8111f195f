"""Run exported models on an emulated Raspberry Pi-class core: outputs, memory and instruction counts, never a time.

The runtimes are the real ones for Arm, in a root file system of `edgecomp.targets.emulated`. Outputs are compared with
those that the same runtime gives on this machine for the same images; on 32 bits, LiteRT for its predecessor.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edgecomp.errors import ParityError, TargetError, UsageError
from edgecomp.folder import read_file
from edgecomp.graph import Array
from edgecomp.report import BenchReport, Comparison, Fact, Source
from edgecomp.scales import sums_are_exact
from edgecomp.targets.cores import Core, core_of
from edgecomp.targets.emulated import COUNTS, WORK, inside, is_installed, read_counts, root_folder

from .archive import runner_archive
from .bench import Entry
from .device import MARKED
from .environment import PACKAGES, installed
from .runners import OnnxRuntime, optimized, runner_class
from .runtime import Border, Runner

LIMIT_S = 3600.0
"""For one process; a network of a few billion multiplications takes minutes."""
_RUNNER = "runner"
# Not -E or -I: the seed of hashes comes by the environment.
_PYTHON = ("/usr/bin/python3", "-s", "-P", "-B", f"{WORK}/{_RUNNER}")


def bench_emulated(
    entries: Sequence[Entry],
    target: str,
    *,
    runtime: str | None = None,
    baseline: str | None = None,
    n_images: int = 2,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
    cache: Path | None = None,
) -> Comparison:
    """Run models on an emulated core.

    Args:
        entries: what to run; labels are unique.
        target: one of `targets.emulated.EMULATED`.
        runtime: for every entry; each format's default unless given.
        baseline: label that the others are compared with; the first unless given.
        n_images: of noise, at least one.
        seed: of the noise.
        progress: called with 1 after each of the two runs of an entry.
        cache: where the root file system lies.

    Returns:
        emulated reports: memory, instructions of one inference by class; in `execution` how outputs compare.

    Raises:
        BundleError: a file cannot be read, or its runtime refuses it.
        ParityError: a code is not the one that this machine computes, where all kernels are known to compute alike.
        TargetError: the target is not installed, the runtime is not there, or a run fails.
        UsageError: the target is unknown, no model or no images, or a negative seed.
    """
    core = core_of(target)
    if n_images < 1 or seed < 0 or not entries:
        raise UsageError(f"{len(entries)} models, {n_images} images, seed {seed}: expected at least one, one and 0")
    if not is_installed(cache, core.machine):
        raise TargetError(f"{target} is not installed, or was for other versions: edgecomp targets --install {target}")
    names = [_runtime_for(format, runtime, core, target) for _, _, format in entries]
    reports = []
    with tempfile.TemporaryDirectory(prefix="edgecomp-emulated-") as folder:
        place = _Place(Path(folder), root_folder(cache, core.machine), core, target)
        for entry, name in zip(entries, names, strict=True):
            reports.append(_report(entry, name, place, n_images, seed, progress or _ignore))
            for path in (f for f in place.folder.iterdir() if f.is_file()):
                path.unlink()
    return Comparison(reports=tuple(reports), baseline=baseline or reports[0].label, ratios={})


def _runtime_for(format: str, runtime: str | None, core: Core, target: str) -> str:
    there = core.machine.runtimes
    if runtime is not None and runtime not in there:
        raise TargetError(f"runtime {runtime} is not there on {target}; expected one of {', '.join(there)}")
    for name in there if runtime is None else (runtime,):
        if format in runner_class(name).formats:
            return name
    raise TargetError(f"{target}: {runtime or ', '.join(there)} does not read {format}")


class _Place:
    """A folder that is seen in the root file system, and how to run something on its files."""

    def __init__(self, folder: Path, root: Path, core: Core, target: str) -> None:
        self.folder, self.root, self.core, self.target = folder, root, core, target
        with zipfile.ZipFile(io.BytesIO(runner_archive())) as archive:
            archive.extractall(folder / _RUNNER)
        # If the Python inside is of this one's version it need not compile all this, at an emulator's speed. It must be
        # the same bytes each time, or other steps are counted: by a fresh process, without this folder's name.
        names = ["-s", str(folder), "-p", WORK, str(folder / _RUNNER)]
        compile_all = [sys.executable, "-I", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", *names]
        _ran(compile_all, "compiling the runner")

    def run(self, file: str, runtime: str, *words: str, count: bool = False) -> str:
        for path in (self.folder, *self.folder.rglob("*")):  # when they were made is nothing to count by
            os.utime(path, (0, 0))
        flags = [f"--graph={WORK}/{file}", f"--runtime={runtime}", *words]
        command = inside(self.root, self.core, self.folder, [*_PYTHON, *flags], count=count)
        return _ran(command, f"{file} in {runtime} on {self.target}")


def _report(
    entry: Entry, runtime: str, place: _Place, n_images: int, seed: int, progress: Callable[[int], object]
) -> BenchReport:
    label, model, format_name = entry
    data = model if isinstance(model, bytes) else read_file(Path(model))
    file = place.folder / f"model.{format_name}"
    file.write_bytes(data)
    here = place.core.machine.runtimes[runtime]
    runner = runner_class(here)(file, threads=1)
    images = _noise(runner.input, n_images, seed)
    expected = list(runner.run_all(images).values())
    np.save(place.folder / "inputs.npy", images)
    words = ("--task=outputs", f"--inputs={WORK}/inputs.npy", f"--result={WORK}/outputs.npz")
    place.run(file.name, runtime, *words, count=True)
    versions = installed(PACKAGES, [str(place.root / "usr/lib/python3/dist-packages")])
    if here == runtime:
        version, unlike = runner.version, _unlike(file, runner)
    else:  # releases of years between them, and kernels for 32 bits: a code may be a step apart
        version = versions[runtime]
        unlike = (f"{runtime} {version} beside {here} {runner.version}",)
    what = f"{label}: {runtime} on {place.target}"
    compared = _compared(place.folder / "outputs.npz", expected, what, alike=not unlike)
    instructions = one_inference(read_counts(place.folder / COUNTS))
    if not place.core.machine.classes:
        instructions = {"total": instructions["total"]}
    progress(1)
    memory = _memory(place.run(file.name, runtime, "--task=memory", "--emulated"), file.name)
    progress(1)
    return BenchReport(
        label=label,
        artifact=file.name if isinstance(model, bytes) else Path(model).name,
        artifact_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        format=format_name,
        target=place.target,
        runtime=runtime,
        runtime_version=version,
        threads=1,
        execution={
            **compared,
            "computed_otherwise": unlike,
            "counted": f"one inference, the last of {MARKED} after {n_images + 2}, without the marks around it",
        },
        source=Source.EMULATED,
        peak_memory_bytes=memory["peak_bytes"],
        model_memory_bytes=memory["model_bytes"],
        instructions=instructions,
        environment={
            "cpu": place.core.name,
            "machine": place.core.machine.name,
            "emulator": f"{place.core.machine.qemu} -cpu {place.core.qemu}",
            **versions,
        },
    )


def one_inference(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    """Give the instructions of the last marked inference, by class and in all, without those of marking.

    Args:
        counts: at each mark: twice with nothing after it, then before and after each inference, and at the end.

    Raises:
        TargetError: other marks than these.
    """
    if len(counts) != MARKED + 4:
        raise TargetError(f"{len(counts)} marks in the counts of instructions, expected {MARKED + 4}")
    kinds = counts[0].keys()
    marking = {kind: counts[2][kind] - counts[1][kind] for kind in kinds}
    found = {kind: counts[-2][kind] - counts[-3][kind] - marking[kind] for kind in kinds}
    return {**found, "total": sum(found.values())}


def _noise(border: Border, n: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    if border.dtype.kind == "f":
        return rng.standard_normal((n, *border.shape), dtype=np.float32)
    info = np.iinfo(border.dtype)
    return rng.integers(info.min, info.max, size=(n, *border.shape), dtype=border.dtype, endpoint=True)


def _ran(command: Sequence[str], what: str) -> str:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise TargetError(f"{what}: {e}") from e
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise TargetError(f"{what}: ended with {done.returncode}: {lines[-1][:300]}")
    return done.stdout.decode(errors="replace")


def _unlike(file: Path, runner: Runner) -> tuple[str, ...]:
    """Name what a runtime computes in another way on 64-bit Arm than on x86, so that codes may be a step apart.

    LiteRT's built-in kernels round an accumulator once there and twice here; they run what XNNPACK does not take,
    convolutions with int4 weights among it. onnxruntime multiplies two activations in real numbers, there with fused
    instructions, here with two roundings; it adds them in integers there, in real numbers here, which is the same where
    no sum lies near the middle between two codes. In another tool's file its layers may saturate here.
    """
    if isinstance(runner, OnnxRuntime):
        executed = optimized(file)
        unlike = {*executed.in_float, *(executed.operators.keys() & {"QLinearMul"})}
        if not all(sums_are_exact(*scales) for scales in executed.sums):
            unlike.add("QLinearAdd")
        if runner.may_saturate():
            unlike |= executed.operators.keys() & {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat"}
        return tuple(sorted(unlike))
    left = runner.describe()["nodes_left_to_builtin_kernels"]
    return left if isinstance(left, tuple) else ()


def _compared(path: Path, expected: Sequence[Array], what: str, *, alike: bool) -> dict[str, Fact]:
    """Compare all outputs: codes must be the same if kernels compute alike, else the largest difference is told.

    Raises:
        ParityError: a code differs, or outputs of another kind came out.
        TargetError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            got = [arrays[name] for name in arrays.files]
    except (OSError, ValueError, KeyError, EOFError) as e:
        raise TargetError(f"{what}: no outputs: {e}") from e
    kinds, wanted = ([(y.dtype.str, y.shape) for y in each] for each in (got, expected))
    if kinds != wanted:
        raise ParityError(f"{what}: outputs are {kinds}, here they are {wanted}")
    different, largest, integer = 0, 0.0, True
    for y, want in zip(got, expected, strict=True):
        apart = np.abs(y.astype(np.float64) - want.astype(np.float64))
        n_apart = int(np.count_nonzero(apart))
        if n_apart and y.dtype.kind != "f" and alike:
            worst = tuple(int(i) for i in np.unravel_index(int(apart.argmax()), apart.shape))
            raise ParityError(
                f"{what}: {n_apart} of {y.size} codes differ from this machine's, the most at {worst}: {y[worst]}, "
                f"here {want[worst]}"
            )
        different, largest = different + n_apart, max(largest, float(apart.max(initial=0.0)))
        integer &= y.dtype.kind != "f"
    return {
        "outputs_are_codes": integer,
        "values_compared": sum(y.size for y in got),
        "values_different": different,
        "largest_difference": largest,
    }


def _memory(text: str, what: str) -> dict[str, int]:
    try:
        run = json.loads(text)
        return {name: int(run[name]) for name in ("runtime_bytes", "peak_bytes", "model_bytes")}
    except (ValueError, KeyError, TypeError) as e:
        raise TargetError(f"memory of {what}: the process wrote {text[:80]!r}, expected one JSON object") from e


def _ignore(done: int) -> None:
    pass
