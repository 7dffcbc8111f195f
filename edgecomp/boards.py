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
from edgecomp.targets.emulated import EMULATED, core_of, is_installed
from edgecomp.targets.emulated import install as install_root

if TYPE_CHECKING:
    from edgecomp.check import Stage


def board_facts(name: str | None) -> list[dict[str, object]]:
    """Give the facts of one board, or of all, for programs.

    Raises:
        TargetError: no board has that name, or its file is damaged.
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
    state = "installed" if is_installed() else "to be had by: edgecomp targets --install NAME"
    rows += [(name, "-", f"emulated: QEMU -cpu {core.qemu}; {state}") for name, core in EMULATED.items()]
    return table(rows, ("target", "cores", "description"))


def install(name: str | None, *, stage: Stage) -> str:
    """Make what an emulated board needs, one file system for all of them, and say where it lies.

    Raises:
        TargetError: it is none, or a tool or a package is missing.
        UsageError: no name.
    """
    if name is None:
        raise UsageError(f"--install needs a NAME: {', '.join(EMULATED)}")
    core_of(name)
    return str(install_root(stage))


def write_runner(file: Path, *, force: bool) -> str:
    """Write the runner for devices, one file for Python, and say where.

    Raises:
        OSError: as the system reports it.
        UsageError: a file is there, and no `force`.
    """
    from edgecomp.benchmarks.archive import runner_archive

    check_new_file(file, "--runner", force=force)
    write_file(file, runner_archive())
    return str(file)


def write_native_runner(folder: Path, cpu: str, *, force: bool) -> str:
    """Write the runner in C with the libraries that it needs into a folder, and say where.

    Raises:
        OSError: as the system reports it.
        TargetError: there is none for this processor, or a compiler or a wheel is missing.
        UsageError: a runner is there, and no `force`; or what is there is no folder.
    """
    from edgecomp.benchmarks.native_runner import NEWEST_LIBC, PROGRAM, RUNTIMES, libraries, native_runner

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--runner {folder}: is there and is no folder; with --cpu a folder is written")
    if folder.is_dir():
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
