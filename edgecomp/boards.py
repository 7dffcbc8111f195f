"""What is known of boards, for people and for programs."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from edgecomp.errors import UsageError
from edgecomp.files import check_new_file, write_file, write_files
from edgecomp.report import table
from edgecomp.target import Target
from edgecomp.targets import load, names
from edgecomp.targets.cores import EMULATED, Core, core_of
from edgecomp.targets.emulated import install as install_root
from edgecomp.targets.emulated import is_installed

if TYPE_CHECKING:
    from edgecomp.check import Stage


def board_facts(name: str | None) -> list[dict[str, object]]:
    """Give the facts of one board, or of all, for programs.

    Raises:
        UsageError: no board has that name, or the user's own file is of no use.
    """
    boards: list[Target] = [load(known) for known in (names() if name is None else [name])]
    return [{**_facts(board), "sources": dict(board.sources)} for board in boards]


def board_table(name: str) -> str:
    """Show the facts of a board with their sources; errors as `board_facts`."""
    target: Target = load(name)
    rows = [(fact, _shown(value), target.sources.get(fact, "")) for fact, value in _facts(target).items()]
    return table(rows, ("fact", "value", "source"))


def boards_table() -> str:
    """List the boards, and which of them are emulated."""
    known: list[Target] = [load(name) for name in names()]
    rows: list[tuple[object, ...]] = [(t.name, t.cores or "-", t.description) for t in known]
    rows += [(name, "-", f"emulated: QEMU -cpu {core.qemu}; {_state(core)}") for name, core in EMULATED.items()]
    return table(rows, ("target", "cores", "description"))


def _state(core: Core) -> str:
    return "installed" if is_installed(None, core.machine) else "to be had by: edgecomp targets --install NAME"


def install(name: str | None, *, stage: Stage) -> str:
    """Make what an emulated board needs, one file system for all of 64 bits, and say where it lies.

    Raises:
        TargetError: a tool or a package is missing.
        UsageError: no name, or that of no emulated board.
    """
    if name is None:
        raise UsageError(f"--install needs a NAME: {', '.join(EMULATED)}")
    return str(install_root(stage, machine=core_of(name).machine))


def check_asked(name: str | None, *, install: bool, runner: Path | None, force: bool, as_json: bool) -> None:
    """Refuse options of `targets` that have no meaning together.

    Raises:
        UsageError: with what to leave out.
    """
    if install and runner is not None:
        raise UsageError("--install with --runner: one at a time; leave one out")
    if runner is not None and name is not None:
        raise UsageError(f"--runner with {name!r:.80}: the runner is the same for all boards; leave the name out")
    if as_json and (install or runner is not None):
        raise UsageError("--json is of what is known of boards; leave it out")
    if force and runner is None:
        raise UsageError("--force is of --runner, which is not given")


def write_runner(file: Path, *, force: bool) -> str:
    """Write the runner for devices, one file for Python, and say where.

    Raises:
        OSError: as the system reports it.
        UsageError: a file is there, and no `force`, or it is no runner.
    """
    from edgecomp.benchmarks.archive import is_runner, runner_archive

    check_new_file(file, "--runner", force=force)
    if file.exists() and not is_runner(file):
        raise UsageError(f"--runner {file}: is no runner; --force replaces only an earlier one; choose another")
    write_file(file, runner_archive())
    return str(file)


def write_native_runner(folder: Path, cpu: str, *, force: bool) -> str:
    """Write the runner in C with the libraries that it needs into a folder, and say where.

    Raises:
        OSError: as the system reports it.
        TargetError: there is none for this processor, or a compiler or a wheel is missing.
        UsageError: no processor is called so; a runner is there, and no `force`; or what is there is no folder of one.
    """
    from edgecomp.benchmarks.native_runner import NEWEST_LIBC, PROGRAM, RUNTIMES, check_cpu, libraries, native_runner

    check_cpu(cpu)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--runner {folder}: is there and is no folder; with --cpu a folder is written")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / PROGRAM).is_file():
            raise UsageError(f"--runner {folder}: holds files and no {PROGRAM}; choose a new folder as --runner")
        check_new_file(folder / PROGRAM, "--runner", force=force)
    files = {PROGRAM: native_runner(cpu), **libraries(cpu, NEWEST_LIBC, list(RUNTIMES))}
    write_files(folder, files)
    (folder / PROGRAM).chmod(0o755)
    for path in folder.iterdir():
        # A library of another version, from before.
        if path.name not in files and path.name.startswith(tuple(each.begins for each in RUNTIMES.values())):
            path.unlink()
    return str(folder)


def _facts(target: Target) -> dict[str, object]:
    return {field.name: getattr(target, field.name) for field in fields(target) if field.name != "sources"}


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
