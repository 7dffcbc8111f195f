"""Files that are whole or not there: written beside their place and renamed when complete."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from edgecomp.errors import UsageError

MANIFEST = "manifest.json"
PLAN_FILE = "plan.json"
OVERVIEW = "README.md"
MANIFEST_SCHEMA = "edgecomp-manifest/2"
_UNFINISHED = ".unfinished-"


def write_file(path: Path, data: bytes) -> None:
    """Write a file at once: readers see the old one or the new one, never a part.

    Raises:
        OSError: as the system reports it, of `path`; nothing is left behind.
    """
    if not path.name:
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    beside = path.with_name(f"{path.name}{_UNFINISHED}{os.getpid()}")
    try:
        with beside.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(e, OSError):
            # Of a full disk the system names no file, else the one beside: neither is what the user asked for.
            raise OSError(e.errno, e.strerror or str(e), str(path)) from e
        raise


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write several files into a folder, all or none: what was there is replaced only when all the new are on disk.

    Args:
        folder: made when missing.
        files: name -> content; a name may be a path within the folder, with "/" between.

    Raises:
        OSError: as the system reports it; nothing is left behind.
    """
    made = [place for place in (folder, *((folder / name).parent for name in files)) if not place.exists()]
    beside = {name: folder / f"{name}{_UNFINISHED}{os.getpid()}" for name in files}
    try:
        for place in (folder, *made):
            place.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_file(beside[name], data)
        for name, path in beside.items():
            path.replace(folder / name)
    except BaseException as e:
        for path in beside.values():
            with contextlib.suppress(OSError):
                path.unlink()
        for place in made:
            shutil.rmtree(place, ignore_errors=True)
        if isinstance(e, OSError) and isinstance(e.filename, str):
            raise OSError(e.errno, e.strerror, e.filename.removesuffix(f"{_UNFINISHED}{os.getpid()}")) from e
        raise


def check_new_files(folder: Path, names: Iterable[str], *, force: bool) -> None:
    """Refuse files that are there already, without `force`, and a folder that is none; cheap.

    Raises:
        UsageError: what stands in the way.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is there and is no folder; choose another -o")
    for path in (folder / name for name in names):
        if path.exists() and not force:
            raise UsageError(f"{path}: is there already; give --force to replace it, or another -o")


def check_new_file(path: Path, option: str, *, force: bool) -> None:
    """Refuse a place where a file cannot be written, or, without `force`, stands one; cheap, to be asked before work.

    Args:
        path: of the file.
        option: that gave it.
        force: whether a file may be replaced; nothing else is.

    Raises:
        UsageError: what stands in the way.
    """
    if os.path.lexists(path) and not path.is_file():
        raise UsageError(f"{option} {path}: is there and is no file; expected a FILE to write")
    if path.exists() and not force:
        raise UsageError(f"{option} {path}: is there already; give --force to replace it, or another {option}")
    probe = path.with_name(f".{path.name}{_UNFINISHED}{os.getpid()}-probe")
    try:
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise UsageError(f"{option} {path}: cannot be written there ({e.strerror}); choose another {option}") from e


def check_output_folder(folder: Path, *, force: bool) -> None:
    """Refuse a place where nothing new may be written; cheap, to be asked before long work.

    Raises:
        UsageError: the folder exists (without `force`), is a file, holds something that no build of ours made, or
            stands where no other folder can be made.
    """
    if not folder.exists() and not folder.is_symlink():
        _check_parent(folder, next(p for p in folder.absolute().parents if p.exists()))
        return
    if not folder.is_dir() or folder.is_symlink():
        raise UsageError(f"{folder}: is there and is not a plain folder; choose another -o")
    if folder.is_mount() or Path.cwd().is_relative_to(folder.resolve()):
        # Neither can be replaced by another folder: a mount refuses, and who stands there would see the old one.
        raise UsageError(f"{folder}: is a mount point or the current folder; choose a folder within it as -o")
    if any(folder.iterdir()):
        if not force:
            raise UsageError(f"{folder}: is there already; give --force to replace it, or another -o")
        if not _is_ours(folder):
            raise UsageError(
                f"{folder}: holds files that edgecomp did not make; --force replaces only an earlier build"
            )
    _check_parent(folder, folder.absolute().parent)


def _check_parent(folder: Path, parent: Path) -> None:
    """Refuse a folder in which no other can be made; one that may be written by its flags may still take none."""
    probe = parent / f".{folder.name}{_UNFINISHED}{os.getpid()}-probe"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as e:
        raise UsageError(
            f"{folder}: {parent} is not a folder one may write to ({e.strerror}); choose another -o"
        ) from e


def _is_ours(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and str(manifest.get("schema", "")).startswith("edgecomp-")


@contextlib.contextmanager
def new_folder(folder: Path, *, force: bool) -> Iterator[Path]:
    """Give a hidden folder beside `folder` to write in; it takes the name when the block ends well.

    After an exception, Ctrl-C included, it is removed; leftovers of a killed run are removed by the next one.

    Raises:
        UsageError: see `check_output_folder`.
        OSError: as the system reports it.
    """
    _remove_leftovers(folder.absolute())
    check_output_folder(folder, force=force)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f".{folder.name}{_UNFINISHED}{os.getpid()}")
    work.mkdir()
    try:
        yield work
        check_output_folder(folder, force=force)
        old = folder.with_name(f".{folder.name}{_UNFINISHED}{os.getpid()}-old")
        try:
            if folder.exists():
                folder.rename(old)
            work.rename(folder)
        except BaseException:
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as e:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(e, OSError) and isinstance(e.filename, str) and Path(e.filename).is_relative_to(work):
            place = folder / Path(e.filename).relative_to(work)
            raise OSError(e.errno, e.strerror, str(place)) from e
        raise


def _remove_leftovers(folder: Path) -> None:
    for path in folder.parent.glob(f".{glob.escape(folder.name)}{_UNFINISHED}*"):
        owner = path.name.rpartition(_UNFINISHED)[2].partition("-")[0]
        # Our own number is that of a dead process, too: in a container every run may get the same.
        if not owner.isdecimal() or (int(owner) != os.getpid() and _is_running(int(owner))):
            continue
        if path.name.endswith("-old") and not folder.exists():
            # Killed between the two renames: the earlier build is put back before anything else.
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
