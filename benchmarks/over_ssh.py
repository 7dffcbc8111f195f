"""Measure models on a device over SSH: the runner and the files are sent, a report comes back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from edgecomp.errors import BundleError, TargetError
from edgecomp.folder import read_file
from edgecomp.report import Comparison
from edgecomp.targets import load
from edgecomp.targets.emulated import cache_folder, pip_download
from edgecomp.targets.ssh import Address, Session, platforms_of, read_wheels

from .archive import NAME, runner_archive
from .bench import Entry
from .device import NOT_VALID
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
) -> Comparison:
    """Measure models on a device, in turns.

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
        opened: is given the session, to end it from another thread.

    Returns:
        measured reports, whether valid or not (`not_valid` says why).

    Raises:
        BundleError: a file cannot be read.
        TargetError: the device cannot be reached, set up, or fails; or the runtime is unknown.
    """
    step = progress if progress is not None else _ignore
    _packages(entries, runtime)
    program = resources.files(__package__).joinpath("session.py").read_bytes()
    with Session(address) as session:
        if opened is not None:
            opened(session)
        session.start(program)
        step(1)
        runtime = _runtime_there(entries, runtime, session, address)
        key = _set_up(session, address, _packages(entries, runtime))
        step(1)
        files, argv = {NAME: runner_archive()}, [f"@{NAME}"]
        for i, (label, model, format_name) in enumerate(entries):
            data = model if isinstance(model, bytes) else read_file(Path(model))
            files[f"{i}.{format_name}"] = data
            argv.append(f"--graph={label}=@{i}.{format_name}")
        argv += [f"--num_threads={threads}", f"--min_secs={min_s:g}", f"--seed={seed}", *flags]
        argv += [f"--runtime={runtime}"] if runtime else []
        argv += [f"--baseline={baseline}"] if baseline else []
        attempts = 1 + sum(int(flag.partition("=")[2]) for flag in flags if flag.startswith("--repeat="))
        limit_s = 300 + attempts * len(entries) * (10 * min_s + 120)
        answer, out = session.ask({"op": "run", "key": key, "argv": argv}, files, limit_s=limit_s)
        step(1)
    if answer.get("exit") not in (0, NOT_VALID):
        lines = str(answer.get("stderr", "")).strip().splitlines() or ["no message"]
        raise TargetError(f"{address.host}: the runner ended with {answer.get('exit')!r:.20}: {lines[-1][:300]}")
    return _read(out, entries, address)


def _packages(entries: Sequence[Entry], runtime: str | None) -> list[str]:
    """Name what the models need, without duplicates.

    Raises:
        TargetError: a runtime does not run on devices.
    """
    names = {default_runtime(format) if runtime is None else runtime for _, _, format in entries}
    if unknown := sorted(names - PACKAGES.keys()):
        raise TargetError(f"runtime {unknown[0]} does not run on a device; expected one of {', '.join(PACKAGES)}")
    return sorted({package for name in names for package in PACKAGES[name]})


def _runtime_there(
    entries: Sequence[Entry], runtime: str | None, session: Session, address: Address
) -> str | None:
    """Give the runtime, which on 32-bit Arm is the one that there is.

    Raises:
        TargetError: it does not read a model.
    """
    if runtime is not None or not str(session.facts.get("machine")).startswith("armv"):
        return runtime
    (there,) = load("armv7").runtimes
    if unread := sorted({format for _, _, format in entries} - {*runner_class(there).formats}):
        raise TargetError(
            f"{address.host}: no runtime for {unread[0]} is made for 32-bit Arm; give --runtime {there}, which reads "
            f"{', '.join(runner_class(there).formats)} alone"
        )
    return there


def _set_up(session: Session, address: Address, packages: Sequence[str]) -> str:
    """See to it that the device has an environment of these packages, and give its key."""
    facts = session.facts
    python, machine = str(facts.get("python")), str(facts.get("machine"))
    numbers = tuple(int(part) for part in python.split(".") if part.isdecimal())
    if len(numbers) != 2 or numbers < OLDEST:
        raise TargetError(f"{address.host}: has Python {python:.20}, expected {'.'.join(map(str, OLDEST))} or newer")
    text = " ".join([*packages, python])
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
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
            raise TargetError(f"{there}; and from here: {next(iter(trouble.values()))}") from there
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


def _read(out: bytes, entries: Sequence[Entry], address: Address) -> Comparison:
    try:
        found = Comparison.from_json(out.decode("utf-8"), f"{address.host}: report")
    except (BundleError, UnicodeDecodeError) as e:
        raise TargetError(f"{address.host}: its report cannot be read: {e}") from e
    sent = {
        label: hashlib.sha256(model if isinstance(model, bytes) else read_file(Path(model))).hexdigest()
        for label, model, _ in entries
    }
    if {r.label: r.sha256 for r in found.reports} != sent:
        raise TargetError(f"{address.host}: its report is about other files than were sent")
    cpu = found.reports[0].environment.get("cpu")
    if address.known and (expected := load(address.board).cpu) not in (None, cpu):
        raise TargetError(f"{address.host}: its processor is {cpu}, a {address.board} has {expected}; correct board=")
    return replace(found, reports=tuple(replace(r, target=address.board) for r in found.reports))


def _ignore(done: int) -> None:
    pass
