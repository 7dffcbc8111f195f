"""Measure a built folder or a file on other machines than this: emulated boards, and devices over SSH."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgecomp.benching import INT8, Benched, Subject, side_by_side
from edgecomp.errors import TargetError, UsageError
from edgecomp.report import BenchReport, Comparison, table

if TYPE_CHECKING:
    from edgecomp.check import Stage
    from edgecomp.targets.ssh import Address, Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """What else may be asked of a device.

    Attributes:
        profile: time each operator, too.
        cores: numbers of cores with commas between them; None for all.
        repeat: so many times again, while a run is not valid.
    """

    profile: bool = False
    cores: str | None = None
    repeat: int = 0

    def words(self) -> list[str]:
        """Give the runner's flags.

        Raises:
            UsageError: a number is out of range.
        """
        if not 0 <= self.repeat <= 100:
            raise UsageError(f"--repeat {self.repeat}: expected 0 to 100")
        if self.cores is not None and not all(part.isdecimal() for part in self.cores.split(",")):
            raise UsageError(f"--cores {self.cores!r:.80}: expected numbers of cores, e.g. 2,3")
        words = ["--enable_op_profiling=true"] if self.profile else []
        words += [] if self.cores is None else [f"--cores={self.cores}"]
        return words + ([f"--repeat={self.repeat}"] if self.repeat else [])


def kind_of(targets: Sequence[str], gathered: Path | None = None) -> str:
    """Tell what `--target` and `--gathered` ask for: "host", "ssh", "emulated", "core" or "gathered".

    Raises:
        UsageError: several that are not all devices, or one beside what was gathered elsewhere; a name that is none, or
            of a board that is not here.
    """
    from edgecomp.targets import SUFFIX, names, nearest
    from edgecomp.targets.cores import EMULATED
    from edgecomp.targets.ssh import SCHEME

    if gathered is not None and targets:
        raise UsageError(f"--gathered {gathered} and --target {targets[0]}: what is gathered was measured already")
    if gathered is not None:
        return "gathered"
    if not targets or list(targets) == ["host"]:
        return "host"
    if all(target.startswith(SCHEME) for target in targets):
        return "ssh"
    if len(targets) > 1:
        raise UsageError(f"--target {' --target '.join(targets)}: several may be given where all are ssh://...")
    (name,) = targets
    known = (*names(), *EMULATED)
    if name not in known and not name.endswith(".toml"):
        raise UsageError(f"target {name!r:.80} is unknown; {nearest(name, known)}")
    if name + SUFFIX in EMULATED:
        ways = f"--target {name}{SUFFIX} emulates it, --target ssh://HOST?board={name} measures on one"
        raise UsageError(f"target {name!r}: is a board, and not here: {ways}")
    return "emulated" if name in EMULATED else "core"


def check_options(kind: str, flags: Flags, *, threads: int, min_s: float | None, compiler: str | None) -> None:
    """Refuse options that have no meaning where it is to be measured; None is what was not given.

    Raises:
        UsageError: with what to leave out.
    """
    if kind in ("core", "emulated"):
        if threads != 1:
            raise UsageError(f"--threads {threads} with an emulated --target: one thread is emulated; leave it out")
        if min_s is not None:
            raise UsageError("--min-secs is of times that are measured; an emulator has none: leave it out")
    if kind == "gathered" and min_s is not None:
        raise UsageError("--min-secs with --gathered: it was measured already")
    if compiler is not None and kind != "core":
        raise UsageError(f"--compiler {compiler} is for a --target with a Cortex-M, e.g. cortex-m4; leave it out")
    if kind != "ssh" and flags != (Flags(repeat=flags.repeat) if kind == "host" else Flags()):
        raise UsageError("--profile, --cores and --repeat are for --target ssh://..., --repeat for this machine, too")
    flags.words()


_SUMS = (("simd_integer", "float"), ("dot_product",), ("load", "store", "simd_load", "simd_store"))
"""Classes of instructions that a column of the table adds up; on 32 bits they are not told apart."""


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
        against = "int8" if self.comparison.baseline.startswith(INT8) else "first"
        header = (
            "model", "file bytes", "accuracy", "instructions", f"/ {against}", "vector", "dot product",
            "load and store", "peak MB", "model MB", "outputs",
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
            *(sum(counts[kind] for kind in kinds) if kinds[0] in counts else "-" for kinds in _SUMS),
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
    paths: Sequence[Path], target: str, *, runtime: str | None, seed: int, stage: Stage
) -> list[Emulated]:
    """Run a folder's models, or a file, on an emulated board.

    Args:
        paths: see `benching.side_by_side`.
        target: its name, see `targets.emulated`.
        runtime: None for each format's own.
        seed: of the images.
        stage: shows how far the work is.

    Raises:
        BundleError: a file is missing, damaged, or not the one its manifest speaks of.
        ParityError: a code is not the one that this machine computes.
        TargetError: the board or the runtime is not installed, or a run fails.
        UsageError: nothing can be run.
    """
    from edgecomp.benchmarks.emulated import bench_emulated
    from edgecomp.targets.cores import core_of

    there = core_of(target).machine.runtimes
    if runtime is None and len(there) == 1:
        (runtime,) = there  # leaves out, of a folder, what it does not read
    benched = []
    for subject in side_by_side(paths, runtime):
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


def bench_devices(
    paths: Sequence[Path],
    targets: Sequence[str],
    *,
    runtime: str | None,
    threads: int,
    min_s: float,
    flags: Flags,
    seed: int,
    stage: Stage,
) -> list[Benched]:
    """Measure a folder's models, or a file, on devices over SSH: on all of them at once, on each its models in turns.

    Args:
        paths: see `benching.side_by_side`.
        targets: ssh://[user@]host[:port][?board=NAME], each once.
        runtime: None for each format's own.
        threads: of each runtime.
        min_s: measuring time for each model at least, seconds.
        flags: what else is asked for.
        seed: of the order of turns.
        stage: shows how far the work is.

    Returns:
        by device, then by format; a run that is not valid is among them.

    Raises:
        BundleError: a file is missing, damaged, or not the one its manifest speaks of.
        TargetError: a device fails; all the others are ended.
        UsageError: an address or a number is unusable.
    """
    from edgecomp.targets import load
    from edgecomp.targets.ssh import parse_address

    if not 0 < min_s <= 3600 or not 1 <= threads <= 1024 or seed < 0:
        numbers = f"--min-secs {min_s:g}, --threads {threads}, --seed {seed}"
        raise UsageError(f"{numbers}: expected up to 3600 s, 1 to 1024, 0 or more")
    if len(set(targets)) < len(targets):
        raise UsageError(f"--target {' --target '.join(targets)}: expected each device once")
    addresses = [parse_address(target) for target in targets]
    for address in addresses:
        if address.known:
            load(address.board)
    words, found = flags.words(), side_by_side(paths, runtime)
    jobs = [(address, subject) for address in addresses for subject in found]
    sessions = _Sessions()

    def measure(address: Address) -> list[Benched]:
        return [_on_device(s, address, runtime, threads, min_s, words, seed, sessions, advance) for s in found]

    with stage("measuring over SSH", 3 * len(jobs)) as advance, ThreadPoolExecutor(len(addresses)) as pool:
        try:
            work = [pool.submit(measure, address) for address in addresses]
            done, _ = wait(work, return_when=FIRST_EXCEPTION)
            if failed := [e for each in done if (e := each.exception()) is not None]:
                raise failed[0]
            return [benched for each in work for benched in each.result()]
        except BaseException:  # Ctrl-C, or one of them failed: no device goes on for nobody
            sessions.end()
            raise


def bench_gathered(paths: Sequence[Path], gathered: Path, *, seed: int) -> Benched:
    """Judge what the runner in C gathered when it was run by hand.

    Args:
        paths: the .onnx and .tflite files that it measured; ratios refer to the first. Of packed TFLite files what
            `edgecomp unpack` makes of them was measured.
        gathered: what it wrote.
        seed: of the confidence intervals.

    Raises:
        UsageError: one of the paths is a folder.
        BundleError: a file cannot be read, or what was gathered is of other files.
    """
    from edgecomp.benchmarks.gathered import comparison_of, sent_of
    from edgecomp.folder import read_file

    if folder := next((path for path in paths if path.is_dir()), None):
        raise UsageError(f"{folder}: is a folder; expected the files that were measured, e.g. {folder / 'model.onnx'}")
    sent = [sent_of(str(path), read_file(path), path.name, path.suffix.removeprefix("."))[0] for path in paths]
    text = read_file(gathered).decode("utf-8", "replace")
    found = comparison_of(text, sent, baseline=sent[0].label, target="device", seed=seed, where=str(gathered))
    return Benched(title=str(gathered), comparison=found, accuracy_percent={})


class _Sessions:
    """Connections that are open, to be ended from another thread."""

    def __init__(self) -> None:
        self._lock, self._open, self._ended = threading.Lock(), set[object](), False

    def add(self, session: Session) -> None:
        with self._lock:
            if self._ended:
                raise TargetError("interrupted")
            self._open.add(session)

    def end(self) -> None:
        with self._lock:
            self._ended = True
            for session in self._open:
                session.end()  # type: ignore[attr-defined]


def _on_device(
    subject: Subject,
    address: Address,
    runtime: str | None,
    threads: int,
    min_s: float,
    words: Sequence[str],
    seed: int,
    sessions: _Sessions,
    advance: object,
) -> Benched:
    from edgecomp.benchmarks.over_ssh import bench_over_ssh

    said: list[str] = []
    comparison: Comparison = bench_over_ssh(
        subject.entries,
        address,
        runtime=runtime,
        threads=threads,
        baseline=subject.baseline,
        min_s=min_s,
        flags=words,
        seed=seed,
        progress=advance,
        opened=sessions.add,
        told=said.append,
    )
    title = f"{subject.title} on {address.host}" + (f", {address.board}" if address.known else "")
    note = "\n".join(line for line in (*said, subject.note) if line)
    return Benched(title=title, comparison=comparison, accuracy_percent=subject.accuracy_percent, note=note)
