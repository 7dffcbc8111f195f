"""Files and folders are whole or not there, whatever happens to who writes them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from edgecomp.errors import UsageError
from edgecomp.files import MANIFEST, check_new_files, check_output_folder, new_folder, write_file, write_files

ROOT = Path(__file__).parents[1]
OURS = json.dumps({"schema": "edgecomp-manifest/2"})


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def earlier_build(folder: Path) -> Path:
    folder.mkdir()
    (folder / MANIFEST).write_text(OURS)
    (folder / "model.onnx").write_text("old")
    return folder


def rebuild(out: Path, then: Callable[[Path], object], *, force: bool = True) -> None:
    """Write a folder, with something that happens before its end."""
    with new_folder(out, force=force) as work:
        (work / "model.onnx").write_text("new")
        then(work)


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


# ---- one file --------------------------------------------------------------------------------------------------------


def test_write_file_replaces_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_file(path, b"one")
    inode = path.stat().st_ino
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_ino != inode, "written in place: a reader could have seen half of it"
    assert listing(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_write_file_on_a_full_disk_leaves_the_old_file(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    write_file(path, b"old")

    def full(*args: object) -> object:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "write":
        real_open = Path.open

        def opened(self: Path, *args: str) -> object:
            stream = real_open(self, *args)
            return type("Full", (), {"__enter__": lambda s: s, "__exit__": lambda *a: stream.close(), "write": full})()

        monkeypatch.setattr(Path, "open", opened)
    else:
        monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_file(path, b"new")
    monkeypatch.undo()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == ["model.onnx"]


def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here; the same is simulated above")
    try:
        earlier_build(disk / "out")
        with pytest.raises(OSError, match="No space left"):
            rebuild(disk / "out", lambda work: write_file(work / "model.onnx", bytes(1 << 20)))
        assert listing(disk) == ["out", f"out/{MANIFEST}", "out/model.onnx"]
        assert (disk / "out" / "model.onnx").read_text() == "old"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- where one may write ---------------------------------------------------------------------------------------------


def a_file(place: Path) -> Path:
    place.write_text("x")
    return place


def below_a_file(place: Path) -> Path:
    return a_file(place) / "deep" / "out"


def a_link(place: Path) -> Path:
    earlier_build(place.with_name("real"))
    place.symlink_to(place.with_name("real"))
    return place


def a_dangling_link(place: Path) -> Path:
    place.symlink_to(place.with_name("nowhere"))
    return place


def a_foreign_folder(place: Path) -> Path:
    place.mkdir()
    (place / "thesis.tex").write_text("years of work")
    return place


def a_foreign_manifest(place: Path) -> Path:
    place.mkdir()
    (place / MANIFEST).write_text('{"schema": "somebody-else/1"}')
    return place


def a_manifest_that_is_no_object(place: Path) -> Path:
    place.mkdir()
    (place / MANIFEST).write_text('["edgecomp-manifest/2"]')
    return place


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        a_file,
        below_a_file,
        a_link,
        a_dangling_link,
        a_foreign_folder,
        a_foreign_manifest,
        a_manifest_that_is_no_object,
    ],
)
def test_refused_with_and_without_force(make: Callable[[Path], Path], force: bool, tmp_path: Path) -> None:
    place = make(tmp_path / "out")
    before = listing(tmp_path)
    with pytest.raises(UsageError, match=r"out: .*(another|earlier build)"):
        check_output_folder(place, force=force)
    with pytest.raises(UsageError), new_folder(place, force=force):
        pytest.fail("nothing may be written here")
    assert listing(tmp_path) == before


def test_force_replaces_an_earlier_build_whole(tmp_path: Path) -> None:
    out = earlier_build(tmp_path / "out")
    with pytest.raises(UsageError, match="--force"):
        check_output_folder(out, force=False)
    with new_folder(out, force=True) as work:
        (work / "new").write_text("new")
        assert (out / "model.onnx").read_text() == "old"
    assert listing(tmp_path) == ["out", "out/new"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc")
@pytest.mark.parametrize("place", ["/proc/edgecomp-out", "/proc/self/a/b"])
def test_a_place_that_takes_no_folders_is_refused_early(place: str) -> None:
    """Its flags may say that one may write there, and for root they always do."""
    with pytest.raises(UsageError, match=r"is not a folder one may write to .*choose another -o") as caught:
        check_output_folder(Path(place), force=False)
    assert "\n" not in str(caught.value)


def test_an_earlier_build_in_a_folder_that_takes_no_other_is_refused_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = earlier_build(tmp_path / "out")
    check_output_folder(out, force=True)
    assert listing(tmp_path)[0] == "out"

    def refuse(path: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UsageError, match="Permission denied"):
        check_output_folder(out, force=True)


def test_new_and_empty_folders_need_no_force(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        with new_folder(place, force=False) as work:
            (work / "x").write_text("x")
        assert listing(place) == ["x"]
        assert listing(place.parent)[0] == place.name, "something hidden stayed beside it"


def test_the_current_folder_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in (Path(), Path(".."), tmp_path / "here"):
        with pytest.raises(UsageError, match=r"current folder|did not make|--force"):
            check_output_folder(place, force=False)
    with pytest.raises(UsageError, match="current folder"):
        check_output_folder(Path(), force=True)
    check_output_folder(Path("below"), force=False)


def test_a_mount_point_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path)
    with pytest.raises(UsageError, match="mount point"):
        check_output_folder(tmp_path, force=True)
    check_output_folder(tmp_path / "below", force=False)


# ---- what may happen on the way --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError, ValueError])
def test_an_exception_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    out = earlier_build(tmp_path / "out")

    def interrupted(work: Path) -> None:
        raise error

    with pytest.raises(error):
        rebuild(out, interrupted)
    assert listing(tmp_path) == ["out", f"out/{MANIFEST}", "out/model.onnx"]
    assert (out / "model.onnx").read_text() == "old"
    with pytest.raises(error):
        rebuild(tmp_path / "fresh", interrupted)
    assert not (tmp_path / "fresh").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failing_rename_puts_the_old_folder_back(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = earlier_build(tmp_path / "out"), Path.rename

    def fails(self: Path, target: Path) -> Path:
        if target == out and not self.name.endswith("-old"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(error), new_folder(out, force=True) as work:
        (work / "model.onnx").write_text("new")
    assert listing(tmp_path) == ["out", f"out/{MANIFEST}", "out/model.onnx"]


def test_somebody_else_was_faster(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="holds files that edgecomp did not make"):
        rebuild(out, lambda work: a_foreign_folder(out))
    assert listing(tmp_path) == ["out", "out/thesis.tex"]


def test_somebody_else_built_there_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="--force"):
        rebuild(out, lambda work: earlier_build(out), force=False)
    assert listing(tmp_path) == ["out", f"out/{MANIFEST}", "out/model.onnx"]


WRITER = """
    import sys, time
    from pathlib import Path
    from edgecomp.files import new_folder
    with new_folder(Path(sys.argv[1]), force=True) as work:
        (work / "manifest.json").write_text('{"schema": "edgecomp-manifest/2"}')
        print("ready", flush=True)
        time.sleep(60)
"""


def writer(out: Path) -> subprocess.Popen[str]:
    """Start a process that stops within the block."""
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(out)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.stdout.close()
    return child


def test_a_killed_writer_leaves_the_old_folder_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    out = earlier_build(tmp_path / "out")
    child = writer(out)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (out / "model.onnx").read_text() == "old"
    hidden = [p for p in tmp_path.iterdir() if p != out]
    assert [p.name for p in hidden] == [f".out.unfinished-{child.pid}"]
    with new_folder(out, force=True) as work:
        assert not hidden[0].exists()
        (work / "new").write_text("new")
    assert listing(tmp_path) == ["out", "out/new"]


def test_a_running_writer_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = writer(out)
    try:
        with new_folder(out, force=False) as work:
            (work / "x").write_text("x")
        assert (tmp_path / f".out.unfinished-{child.pid}" / "manifest.json").is_file()
    finally:
        child.send_signal(signal.SIGINT)
        child.wait()
    assert listing(tmp_path) == ["out", "out/x"]


@pytest.mark.parametrize("number", [os.getpid, dead_process])
def test_a_writer_killed_between_the_two_renames(number: Callable[[], int], tmp_path: Path) -> None:
    """The earlier build stands aside, the new one has not yet its place; both numbers are those of no other writer."""
    process = number()
    old = earlier_build(tmp_path / f".out.unfinished-{process}-old")
    (tmp_path / f".out.unfinished-{process}").mkdir()
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="--force"), new_folder(out, force=False):
        pytest.fail("the earlier build was put back, so --force is needed")
    assert not old.exists()
    assert listing(tmp_path) == ["out", f"out/{MANIFEST}", "out/model.onnx"]


def test_only_leftovers_of_this_folder_are_removed(tmp_path: Path) -> None:
    process = dead_process()
    others = [f".other.unfinished-{process}", ".*.unfinished-x", ".[o]ut.unfinished-", ".*.unfinished-1-old", ".out"]
    mine = [f".*.unfinished-{process}", f".*.unfinished-{'9' * 30}"]
    for name in others + mine:
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "*", force=False) as work:
        (work / "x").write_text("x")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "*"])


def test_writers_of_many_processes_end_with_a_whole_folder(tmp_path: Path) -> None:
    """Several at once with --force: one wins, and whoever comes later finds nothing of the others beside it."""
    code = """
        import sys
        from pathlib import Path
        from edgecomp.errors import UsageError
        from edgecomp.files import new_folder
        for i in range(20):
            try:
                with new_folder(Path(sys.argv[1]), force=True) as work:
                    (work / "manifest.json").write_text('{"schema": "edgecomp-manifest/2"}')
                    (work / "b").write_text("b")
            except (OSError, UsageError):
                pass
    """
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(code), str(out)]
    children = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    for child in children:
        child.wait(timeout=30)
    assert [child.returncode for child in children] == [0, 0, 0]
    assert listing(out) == ["b", MANIFEST]
    with new_folder(out, force=True) as work:
        (work / "x").write_text("x")
    assert listing(tmp_path) == ["out", "out/x"]


def test_errors_name_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_file(tmp_path / "none" / "x", b"")
    assert caught.value.filename == str(tmp_path / "none" / "x")
    with pytest.raises(IsADirectoryError):
        write_file(Path(""), b"")

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught_too:
        write_files(tmp_path / "new", {"a": b"", "b": b""})
    assert caught_too.value.filename == str(tmp_path / "new" / "a")
    with pytest.raises(OSError, match="No space left") as caught_too, new_folder(tmp_path / "out", force=False) as work:
        write_file(work / "a", b"")
    assert caught_too.value.filename == str(tmp_path / "out" / "a")
    assert listing(tmp_path) == []


def test_files_that_stand_in_the_way(tmp_path: Path) -> None:
    for force in (False, True):
        check_new_files(tmp_path / "new", ["a", "b"], force=force)
        for place in (Path("/dev/full"), Path(__file__)):
            with pytest.raises(UsageError, match=f"{place}: is there and is no folder; choose another -o"):
                check_new_files(place, ["a"], force=force)
    (tmp_path / "b").touch()
    check_new_files(tmp_path, ["a", "b"], force=True)
    with pytest.raises(UsageError, match="b: is there already; give --force to replace it, or another -o"):
        check_new_files(tmp_path, ["a", "b"], force=False)
