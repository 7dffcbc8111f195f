"""Options that mean nothing are refused, and what is wrong with options is said before a place that is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgecomp.cli import main
from tests.built import write_folder

EMULATED, CORE, SSH = (["--target", name] for name in ("rpi4-emulated", "cortex-m4", "ssh://pi"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with another's folder and file in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    (tmp_path / "taken").write_text("precious")
    library = {"name": "net", "version": "1", "frameworks": "*", "platforms": "*", "headers": "net.h"}
    (tmp_path / "library.json").write_text(json.dumps(library))

    def long_work(*given: object, **options: object) -> None:
        raise AssertionError("got as far as the long work")

    for name in ("edgecomp.boards.install_root", "edgecomp.targets.ssh.Session", "edgecomp.intake.load_images"):
        monkeypatch.setattr(name, long_work)
    return tmp_path


def refused(argv: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> str:
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    assert main(argv) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("edgecomp: ")
    assert output.err.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    return output.err


NO_TIMES = "--min-secs is of times that are measured; an emulator has none"
NO_CORE = "--compiler gcc is for a --target with a Cortex-M"


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["build", "--score", "magnitude", "--rule", "gamma:0.5", "-o", "x"], "--rule is of --score lrp, not of magn"),
        (["build", "--score", "taylor", "--start", "one", "-o", "x"], "--start is of --score lrp, not of taylor"),
        (["bench", "x.onnx", "--min-secs", "2", *EMULATED], NO_TIMES),
        (["bench", "x.onnx", "--min-secs", "2", *CORE], NO_TIMES),
        (["bench", "x.onnx", "--threads", "2", *CORE], "--threads 2 with an emulated --target: one thread is emulated"),
        (["bench", "x.onnx", "--compiler", "gcc"], NO_CORE),
        (["bench", "x.onnx", "--repeat", "-1"], "--repeat -1: expected 0 to 100"),
        (["bench", "x.onnx", "--repeat", "1", *EMULATED], "--repeat are for --target ssh://..., --repeat for this"),
        (["bench", "x.onnx", "--compiler", "gcc", *EMULATED], NO_CORE),
        (["bench", "x.onnx", "--compiler", "gcc", *SSH], NO_CORE),
        (["bench", "full", "--seed=-1", *CORE], "--seed -1: expected 0 or more"),
        (["bench", "x.onnx", "--force"], "--force is of --svg, which is not given"),
        (["inspect", "library.json", "--execution"], "is of the kind PlatformIO library, --execution is for ONNX"),
        (["sbom", "full", "--force"], "--force is of -o, which is not given"),
        (["unpack", "--cpp-header", "--force"], "expected IN and -o OUT, or --cpp-header alone"),
        (["targets", "rpi4", "--force"], "--force is of --runner, which is not given"),
        (["targets", "rpi4", "--runner", "x"], "--runner with 'rpi4': the runner is the same for all boards"),
        (["targets", "--runner", "x", "--json"], "--json is of what is known of boards"),
        (["targets", "rpi4-emulated", "--install", "--json"], "--json is of what is known of boards"),
        (["targets", "rpi4-emulated", "--install", "--runner", "x"], "--install with --runner: one at a time"),
    ],
)
def test_options_without_a_meaning(
    argv: list[str], found: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert found in refused(argv, here, capsys)


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["build", "--calib", "0", "-o", "full"], "--calib 0: expected at least 1"),
        (["build", "--rule", "lrp", "-o", "full"], "rule 'lrp' is unknown"),
        (["build", "--prune", "auto", "-o", "full"], "--prune auto without --max-drop"),
        (["bench", "x.onnx", "--svg", "taken", "--cores", "1"], "--profile, --cores and --repeat are for --target ssh"),
        (["bench", "x.onnx", "--svg", "taken", *SSH, "--repeat", "101"], "--repeat 101: expected 0 to 100"),
        (
            ["bench", "x.onnx", "--svg", "taken", "--baseline", "no.json", "--fail-if-slower", "1"],
            "no.json: cannot be read: No such file or directory; expected what edgecomp bench --json wrote",
        ),
        (["gate", "full", "--report", "taken"], "gate: expected a budget"),
        (["gate", "full", "--max-ram", "1", "--report", "taken"], "full: has no manifest.json"),
        (["sbom", "full", "-o", "taken"], "full: has no manifest.json"),
    ],
)
def test_a_taken_place_is_said_last(
    argv: list[str], found: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert found in refused(argv, here, capsys)


def test_one_thread_is_all_that_tflite_micro_has(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(here / "out")
    argv = ["bench", "out/model.tflite", "--runtime", "tflite-micro", "--threads", "4"]
    assert "--threads 4: tflite-micro has one; leave --threads out" in refused(argv, here, capsys)
