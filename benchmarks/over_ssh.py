"""Measure models on a device over SSH: the runner and the files are sent, a report comes back."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from edgecomp.errors import BundleError, TargetError
from edgecomp.folder import read_file
from edgecomp.report import Comparison
from edgecomp.targets import load
from edgecomp.targets.emulated import cache_folder, pip_download
from edgecomp.targets.ssh import NO_PROGRAM, SHELL, Address, Session, platforms_of, read_wheels

from .archive import NAME, runner_archive
from .bench import Entry
from .device import NOT_VALID
from .gathered import Sent, comparison_of, sent_of
from .native_runner import CPUS, RUNTIMES, libraries, native_runner
from .runners import default_runtime, runner_class

PACKAGES = {
    "onnxruntime": ("numpy", "onnxruntime"),
    "onnxruntime-lean": ("numpy", "onnxruntime"),
    "litert": ("numpy", "ai-edge-litert"),
    "litert-reference": ("numpy", "ai-edge-litert"),
    "tflite-runtime": ("numpy<2", "tflite-runtime"),
}
"""The wheels that each runtime needs, without those that running models does not."""
OLDEST = (3, 11)
"""Python on the device."""
SET_UP_S = 900.0
"""Seconds to bring wheels to a device and to unpack them."""
PAUSE_S = 5.0
"""Before another attempt, so that a hot board cools; seconds."""


class _NoPython(TargetError):
    """The device has no Python that the runner in Python could run in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What is asked for, see `bench_over_ssh`."""

    entries: Sequence[Entry]
    address: Address
    runtime: str | None
    threads: int
    baseline: str | None
    min_s: float
    flags: Sequence[str]
    seed: int
    step: Callable[[int], object]
    opened: Callable[[Session], object]

    @property
    def runtimes(self) -> set[str]:
        return {default_runtime(format) if self.runtime is None else self.runtime for _, _, format in self.entries}

    @property
    def attempts(self) -> int:
        return 1 + sum(int(flag.partition("=")[2]) for flag in self.flags if flag.startswith("--repeat="))

    @property
    def limit_s(self) -> float:
        """Seconds for one attempt."""
        return 300 + len(self.entries) * (10 * self.min_s + 120)

    def words(self) -> list[str]:
        """Give the flags that both runners know, but for those of the models."""
        words = [f"--num_threads={self.threads}", f"--min_secs={self.min_s:g}", f"--seed={self.seed}"]
        return [*words, *self.flags, *([f"--runtime={self.runtime}"] if self.runtime else [])]


def bench_over_ssh(
    entries: Sequence[Entry],
    address: Address,
    *,
    runtime: str | None = None,
    threads: int = 1,
    baseline: str | None = None,
    min_s: float = 2.0,
    flags: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
    opened: Callable[[Session], object] | None = None,
    told: Callable[[str], object] | None = None,
) -> Comparison:
    """Measure models on a device, in turns: by the runner in Python, or by that in C where there is no Python for it.

    Args:
        entries: what to measure; labels are unique.
        address: the device.
        runtime: for every entry; each format's default unless given.
        threads: of the runtime.
        baseline: label that ratios refer to; the first unless given.
        min_s: seconds of measuring for each model at least.
        flags: more of the runner's, see `benchmarks.device`.
        seed: of the order of turns.
        progress: called with 1 when connected, set up, and done.
        opened: is given each session, to end it from another thread.
        told: is given a line that says why it was the runner in C.

    Returns:
        measured reports, whether valid or not (`not_valid` says why).

    Raises:
        BundleError: a file cannot be read.
        TargetError: the device cannot be reached, set up, or fails; or the runtime is unknown.
    """
    asked = _Asked(
        entries=entries,
        address=address,
        runtime=runtime,
        threads=threads,
        baseline=baseline,
        min_s=min_s,
        flags=flags,
        seed=seed,
        step=progress or _ignore,
        opened=opened or _ignore,
    )
    if unknown := sorted(asked.runtimes - PACKAGES.keys()):
        raise TargetError(f"runtime {unknown[0]} does not run on a device; expected one of {', '.join(PACKAGES)}")
    try:
        return _by_python(asked)
    except _NoPython as e:
        try:
            found = _by_c(asked)
        except TargetError as native:
            raise TargetError(f"{e}; and the C runner does not run there: {native}") from native
        (told or _ignore)(f"{e}; measured by the C runner")
        return found


def _by_python(asked: _Asked) -> Comparison:
    program = resources.files(__package__).joinpath("session.py").read_bytes()
    with Session(asked.address) as session:
        asked.opened(session)
        try:
            session.start(program)
        except TargetError as e:
            if session.code == NO_PROGRAM:
                raise _NoPython(str(e)) from e
            raise
        asked.step(1)
        asked = replace(asked, runtime=_runtime_there(asked, session))
        packages = sorted({package for name in asked.runtimes for package in PACKAGES[name]})
        key = _set_up(session, asked.address, packages)
        asked.step(1)
        files, argv = {NAME: runner_archive()}, [f"@{NAME}"]
        for i, (label, model, format_name) in enumerate(asked.entries):
            files[f"{i}.{format_name}"] = _bytes_of(model)
            argv.append(f"--graph={label}=@{i}.{format_name}")
        argv += asked.words() + ([f"--baseline={asked.baseline}"] if asked.baseline else [])
        limit_s = asked.attempts * asked.limit_s
        answer, out = session.ask({"op": "run", "key": key, "argv": argv}, files, limit_s=limit_s)
        asked.step(1)
    _check_exit(answer, asked.address)
    return _read(out, asked.entries, asked.address)


def _by_c(asked: _Asked) -> Comparison:
    if unknown := sorted(asked.runtimes - RUNTIMES.keys()):
        raise TargetError(f"it has no runtime {unknown[0]}, expected one of {', '.join(RUNTIMES)}")
    with Session(asked.address, SHELL) as session:
        asked.opened(session)
        said = session.hear()
        machine, loaders = str(said.get("machine")), str(said.get("loaders")).split()
        if machine not in CPUS:
            raise TargetError(f"it is for {', '.join(CPUS)}, the device is {machine:.40}")
        if CPUS[machine].loader not in loaders:
            raise TargetError(f"it needs the GNU C library of {machine}, {CPUS[machine].loader} is not there")
        session.start(native_runner(machine))
        asked.step(1)
        libc, known = str(session.facts.get("libc")), session.facts.get("environments")
        key = _key([*(RUNTIMES[name].wheel for name in sorted(asked.runtimes)), machine, libc])
        if not isinstance(known, list) or key not in known:
            needed = libraries(machine, libc, sorted(asked.runtimes))
            session.order(("libraries", key, len(needed)), needed, (), limit_s=SET_UP_S)
        asked.step(1)
        files, sent = {}, []
        for i, (label, model, format_name) in enumerate(asked.entries):
            name = f"{i}.{format_name}"
            about, files[name] = sent_of(label, _bytes_of(model), name, format_name)
            sent.append(about)
        # Whether to repeat is judged here.
        words = [word for word in asked.words() if not word.startswith("--repeat=")]
        arguments = [*(f"--graph={name}" for name in files), *words]
        order = ("run", key, f"{asked.limit_s:g}", len(files), len(arguments))
        for attempt in range(asked.attempts):
            if attempt:
                time.sleep(PAUSE_S)
            answer, out = session.order(order, files, arguments, limit_s=asked.limit_s)
            _check_exit(answer, asked.address)
            found = _judged(out, sent, asked)
            if not found.reports[0].not_valid:
                break
        asked.step(1)
    return found


def _judged(out: bytes, sent: Sequence[Sent], asked: _Asked) -> Comparison:
    baseline = asked.entries[0][0] if asked.baseline is None else asked.baseline
    where = f"{asked.address.host}: report"
    try:
        text = out.decode("ascii")
        found = comparison_of(
            text, sent, baseline=baseline, target=asked.address.board, seed=asked.seed, where=where
        )
    except (BundleError, UnicodeDecodeError) as e:
        raise TargetError(f"{asked.address.host}: its report cannot be read: {e}") from e
    _check_board(found, asked.address)
    return found


def _bytes_of(model: Path | str | bytes) -> bytes:
    return model if isinstance(model, bytes) else read_file(Path(model))


def _check_exit(answer: Mapping[str, object], address: Address) -> None:
    if answer.get("exit") not in (0, NOT_VALID):
        lines = str(answer.get("stderr", "")).strip().splitlines() or ["no message"]
        raise TargetError(f"{address.host}: the runner ended with {answer.get('exit')!r:.20}: {lines[-1][:300]}")


def _runtime_there(asked: _Asked, session: Session) -> str | None:
    """Give the runtime, which on 32-bit Arm is the one that there is.

    Raises:
        TargetError: it does not read a model.
    """
    if asked.runtime is not None or not str(session.facts.get("machine")).startswith("armv"):
        return asked.runtime
    (there,) = load("armv7").runtimes
    if unread := sorted({format for _, _, format in asked.entries} - {*runner_class(there).formats}):
        raise TargetError(
            f"{asked.address.host}: no runtime for {unread[0]} is made for 32-bit Arm; give --runtime {there}, which "
            f"reads {', '.join(runner_class(there).formats)} alone"
        )
    return there


def _set_up(session: Session, address: Address, packages: Sequence[str]) -> str:
    """See to it that the device has an environment of these packages, and give its key."""
    facts = session.facts
    python, machine = str(facts.get("python")), str(facts.get("machine"))
    numbers = tuple(int(part) for part in python.split(".") if part.isdecimal())
    if len(numbers) != 2 or numbers < OLDEST:
        raise _NoPython(f"{address.host}: has Python {python:.20}, expected {'.'.join(map(str, OLDEST))} or newer")
    key = _key([*packages, python])
    known = facts.get("environments")
    if isinstance(known, list) and key in known:
        return key
    folder = cache_folder() / "downloads" / f"wheels-{machine}-{python}"
    wheels, trouble = _wheels(packages, folder, python, machine, str(facts.get("libc")))
    # What there is no wheel of here, as of numpy for 32-bit Arm, the device may have or know a place for.
    message: dict[str, Any] = {"op": "environment", "key": key, "packages": list(packages), "own": list(trouble)}
    try:
        session.ask(message, wheels, limit_s=SET_UP_S)
    except TargetError as there:
        if trouble:
            raise _NoPython(f"{there}; and from here: {next(iter(trouble.values()))}") from there
        raise
    return key


def _wheels(
    packages: Sequence[str], folder: Path, python: str, machine: str, libc: str
) -> tuple[dict[str, bytes], dict[str, TargetError]]:
    """Fetch wheels for a device: all at once, or, where one of them cannot be had, each for itself.

    Returns:
        the wheels, by file name; by package, why there is none.
    """
    found: dict[str, bytes] = {}
    trouble: dict[str, TargetError] = {}
    try:
        tags = platforms_of(machine, libc)
    except TargetError as e:
        return {}, dict.fromkeys(packages, e)
    try:
        return read_wheels(pip_download(packages, folder, python, tags)), {}
    except TargetError as e:
        if len(packages) == 1:
            return {}, {packages[0]: e}
    for package in packages:
        try:
            found |= read_wheels(pip_download([package], folder, python, tags))
        except TargetError as e:
            trouble[package] = e
    return found, trouble


def _key(words: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def _read(out: bytes, entries: Sequence[Entry], address: Address) -> Comparison:
    try:
        found = Comparison.from_json(out.decode("utf-8"), f"{address.host}: report")
    except (BundleError, UnicodeDecodeError) as e:
        raise TargetError(f"{address.host}: its report cannot be read: {e}") from e
    sent = {label: hashlib.sha256(_bytes_of(model)).hexdigest() for label, model, _ in entries}
    if {r.label: r.sha256 for r in found.reports} != sent:
        raise TargetError(f"{address.host}: its report is about other files than were sent")
    _check_board(found, address)
    return replace(found, reports=tuple(replace(r, target=address.board) for r in found.reports))


def _check_board(found: Comparison, address: Address) -> None:
    cpu = found.reports[0].environment.get("cpu")
    if address.known and (expected := load(address.board).cpu) not in (None, cpu):
        raise TargetError(f"{address.host}: its processor is {cpu}, a {address.board} has {expected}; correct board=")


def _ignore(said: object) -> None:
    pass
