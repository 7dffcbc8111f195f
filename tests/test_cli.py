"""The command line with bad input: one line, the right exit code, nothing half-written."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgecomp.arguments import read_bytes, read_c_name
from edgecomp.check import at_chance, chance_warning
from edgecomp.cli import main
from edgecomp.errors import UsageError
from edgecomp.graph import Graph
from edgecomp.preprocessing import Preprocessing
from tests.tiny import Place

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        here = Place(tmp_path_factory.mktemp("place"), patch)
        np.savez(here.folder / "empty.npz", x=np.zeros((0, 8, 8), dtype=np.uint8), y=np.zeros(0, dtype=np.int64))
        np.savez(here.folder / "large.npz", x=np.zeros((20, 12, 12), dtype=np.uint8), y=np.arange(20) % 4)
        rgb = np.zeros((20, 8, 8, 3), dtype=np.uint8)
        np.savez(here.folder / "rgb.npz", x=rgb, y=np.arange(20) % 4)
        np.savez(here.folder / "labels.npz", x=rgb[..., 0], y=np.arange(20) % 5)
        (here.folder / "torn.pt").write_bytes((here.folder / "tiny.pt").read_bytes()[:-200])
        (here.folder / "full").mkdir()
        (here.folder / "full" / "mine.txt").write_text("precious")
        yield here


BAD = {
    "missing weights": (["--weights", "no.pt"], 2, "no.pt"),
    "folder for weights": (["--weights", "full"], 2, "full"),
    "truncated weights": (["--weights", "torn.pt"], 2, "torn.pt"),
    "another model's weights": (["--weights", "wide.pt"], 2, "fc.weight"),
    "NaN in weights": (["--weights", "nan.pt"], 2, "conv2.weight"),
    "pickled module": (["--weights", "pickled.pt"], 2, "pickle"),
    "unsupported operator": (["MODEL=tinymodels:other"], 5, "sin"),
    "unknown factory": (["MODEL=tinymodels:none"], 2, "none"),
    "unknown module": (["MODEL=nowhere:tiny"], 2, "nowhere"),
    "factory that fails": (["MODEL=tinymodels:broken"], 2, "no such luck"),
    "unknown torchvision name": (["MODEL=torchvision:resnet19"], 2, "resnet18"),
    "not a model": (["MODEL=tinymodels"], 2, "tinymodels"),
    "empty data": (["--data", "npz:empty.npz"], 2, "empty.npz"),
    "missing data": (["--data", "npz:none.npz"], 2, "none.npz"),
    "unknown kind of data": (["--data", "mnist:here"], 2, "mnist"),
    "wrong image size": (["--data", "npz:large.npz"], 2, "12"),
    "wrong channels": (["--data", "npz:rgb.npz"], 2, "3"),
    "label beyond the outputs": (["--data", "npz:labels.npz"], 2, "4"),
    "input shape of another size": (["--input-shape", "1,9,9"], 2, "--input-shape"),
    "too few bits": (["--avg-bits", "0.05"], 2, "0.1 to 8"),
    "too many bits": (["--avg-bits", "9"], 2, "0.1 to 8"),
    "bits that formats cannot store": (["--avg-bits", "3", "--format", "tflite"], 3, "4.00 bits"),
    "impossible size": (["--max-size", "1000"], 3, "the smallest possible has"),
    "part of a byte": (["--max-size", "20000.5"], 2, "--max-size 20000.5: expected whole bytes, e.g. 20000"),
    "part of a byte by its unit": (["--max-size", "17.1K"], 2, "expected whole bytes, e.g. 17510"),
    "whole bytes by a unit": (["--max-size", "0.5K"], 3, "a file of 512 bytes asked for"),
    "unknown rule": (["--rule", "lrp"], 2, "epsilon-plus"),
    "rule with a number out of range": (["--rule", "gamma:-1"], 2, "-1 is out of range"),
    "no calibration": (["--calib", "0"], 2, "--calib"),
    "a share of data with a test part": (["--test-share", "0.2"], 2, "without a test part, and npz:data.npz has one"),
    "std of zero": (["--std", "0"], 2, "std"),
    "three means for one channel": (["--mean", "0,0,0", "--std", "1,1,1"], 2, "3"),
    "existing folder": (["-o", "full"], 2, "--force"),
    "another's folder by force": (["-o", "full", "--force"], 2, "did not make"),
    "file in the way": (["-o", "tiny.pt"], 2, "tiny.pt"),
    "below a file": (["-o", "tiny.pt/out"], 2, "tiny.pt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(
    case: str, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place.folder)
    changes, code, found = BAD[case]
    argv = [*place.command(), *changes]  # of an option given twice the last counts
    if changes[0].startswith("MODEL="):
        argv[1] = argv.pop().removeprefix("MODEL=")
    before = {path: path.stat().st_mtime_ns for path in place.folder.rglob("*")}
    assert main(argv) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("edgecomp: ")
    assert output.err.count("\n") == 1
    assert found in output.err
    after = {path: path.stat().st_mtime_ns for path in place.folder.rglob("*") if "__pycache__" not in path.parts}
    assert after.keys() <= before.keys() | {place.folder}
    assert (place.folder / "full" / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["build"], "-o/--output"),
        (["build", "--avg-bits", "four", "-o", "x"], "expected a number"),
        (["build", "--avg-bits", "4", "--max-size", "9", "-o", "x"], "not allowed with"),
        (["build", "--format", "pb", "-o", "x"], "onnx, tflite"),
        (["build", "--input-shape", "3", "-o", "x"], "e.g. 3,224,224"),
        (["build", "--test-share", "half", "-o", "x"], "expected a number"),
        (["gate", "x", "--max-drop", "%"], "expected a number"),
        (["build", "--max-drop", "half%", "-o", "x"], "expected a number"),
        (["fly"], "invalid choice"),
    ],
)
def test_wrong_usage_exits_with_2(argv: list[str], found: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("edgecomp: ")
    assert error.count("\n") == 1
    assert found in error


@pytest.mark.parametrize(
    ("argv", "code", "found"),
    [
        (["verify", "nowhere"], 2, "is no folder"),
        (["bench", "nowhere.onnx"], 2, "no such file"),
        (["bench", "tiny.pt"], 2, ".onnx or .tflite"),
        (["inspect", "nowhere.onnx"], 2, "nowhere.onnx"),
        (["inspect", "tiny.pt"], 2, "tiny.pt"),
        (["export", "tiny.pt", "--graph", "tiny.pt", "--format", "onnx", "-o", "x"], 2, "tiny.pt"),
        (["targets", "rpi9"], 2, "target 'rpi9' is unknown; did you mean rpi5 or rpi4? see edgecomp targets"),
        (["build", "tinymodels:tiny", "-o", "x"], 2, "--data"),
        (["bench", "full", "--seed", "-1"], 2, "--seed"),
        (["build", "--weights", "tiny.pt", "-o", "x"], 2, "MODEL"),
    ],
)
def test_other_verbs_say_what_is_wrong(
    argv: list[str],
    code: int,
    found: str,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place.folder)
    assert main(argv) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert found in error
    assert not (place.folder / "x").exists()


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ([], {}),
        (["--crop", "20"], {"crop": 20}),
        (["--pad", "0"], {"pad": 0}),
        (["--resize", "32", "--pad", "0"], {"resize": 32, "pad": 0}),
        (["--mean", "0.5"], {"mean": (0.5,)}),
        (["--std", "0.25"], {"std": (0.25,)}),
    ],
)
def test_an_option_changes_only_its_own_part_of_the_samples_preprocessing(
    options: list[str], changed: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Preprocessing] = []

    def load_images(data: str, share: float, seed: int, preprocessing: Preprocessing, stage: object) -> None:
        seen.append(preprocessing)
        raise UsageError("seen enough")

    monkeypatch.setattr("edgecomp.intake.load_images", load_images)
    assert main(["build", *options, "-o", "x"]) == 2
    own = Preprocessing(mean=(0.286,), std=(0.353,), pad=2)
    assert seen == [replace(own, **changed)]  # type: ignore[arg-type]


def test_means_that_do_not_fit_the_samples_std(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--mean", "0.1,0.2,0.3", "-o", "x"]) == 2
    assert capsys.readouterr().err == "edgecomp: mean has 3 values and std 1; give equally many\n"


def test_an_untrained_network_is_warned_of_before_the_work(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place.folder)
    data = dict(np.load("data.npz"))
    np.savez("odd.npz", **{**data, "y_test": np.random.default_rng(0).permutation(data["y_test"])})
    argv = [word for word in place.command() if word not in ("--weights", "tiny.pt")]
    said: list[str] = []

    def explain(*arguments: object) -> None:
        said.append(capsys.readouterr().err)
        raise UsageError("seen enough")

    monkeypatch.setattr("edgecomp.build._explain", explain)
    assert main([*argv, "--data", "npz:odd.npz"]) == 2
    assert said[0].startswith("edgecomp: warning: the float network is right on ")
    assert "% of 200 test images, no better than chance with 4 classes" in said[0]
    assert "is it trained (--weights was not given)" in said[0]
    assert said[0].count("\n") == 1
    capsys.readouterr()
    assert main(place.command()) == 2
    assert said[1] == ""


@pytest.mark.parametrize(
    ("percent", "n_images", "n_classes", "expected"),
    [
        (10.0, 10_000, 10, True),
        (10.89, 10_000, 10, True),  # 10 + 3 * 0.3
        (10.91, 10_000, 10, False),
        (0.0, 100, 10, True),
        (91.6, 2000, 10, False),
        (50.0, 2, 2, False),  # two images tell nothing
        (100.0, 2, 4, False),
    ],
)
def test_chance(percent: float, n_images: int, n_classes: int, expected: bool) -> None:
    assert at_chance(percent, n_images, n_classes) is expected


def test_which_of_several_are_no_better_than_chance() -> None:
    assert chance_warning({"a": 10.89, "b": 10.91, "c": 0.0}, 10_000, 10) == (
        "a is right on 10.89 % and c is right on 0.00 % of 10000 test images, no better than chance with 10 classes"
    )
    assert chance_warning({"b": 10.91}, 10_000, 10) == ""


@pytest.mark.parametrize(
    ("options", "much"),
    [
        (["--max-latency", "1s", "--target", "rpi4", "--max-size", "8K"], "--max-size 8192, --max-latency 1000ms"),
        (["--prune", "0.1", "--sparsify", "zero", "--avg-bits", "8"], "--avg-bits 8, --prune 0.1, --sparsify zero"),
    ],
)
def test_a_network_that_compression_has_ruined_is_warned_of(
    options: list[str], much: str, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if cutting channels had left a network that says the first class whatever it sees."""

    def ruined(graph: Graph, *given: object, **more: object) -> Graph:
        bias = np.array([100, 0, 0, 0], dtype=np.float32)
        return replace(graph, tensors={**graph.tensors, "fc.bias": replace(graph.tensors["fc.bias"], data=bias)})

    monkeypatch.chdir(place.folder)
    monkeypatch.setattr("edgecomp.build.pruned", ruined)
    assert main([*place.command(), "--force", "--no-reconstruct", *options]) == 0
    said = capsys.readouterr().err
    assert said.startswith("edgecomp: warning: model.onnx is right on 25.00 % and model.tflite is right on 25.00 %")
    assert f"the float network on 100.00 %; {much} is too much: ask for less, or win acc" in said
    assert said.count("\n") == 1


def run(*argv: str, folder: Path, **options: object) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-m", "edgecomp", *argv], cwd=folder, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_in_the_middle_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process = run("build", "--max-drop", "0.1", "-o", "out", folder=tmp_path)
    # Long enough to be at work, too short to be done, however busy the machine is.
    stat = Path(f"/proc/{process.pid}/stat")
    while sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13])) < 3 * os.sysconf("SC_CLK_TCK"):
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err == "edgecomp: interrupted; nothing was left half-written\n"
    assert list(tmp_path.iterdir()) == []


def test_interrupted_inside_exec(tmp_path: Path) -> None:
    """Where dataclasses make their methods, for one: `python -m` would die of the signal although it was handled."""
    module = "import os, signal\ndef images(): exec('os.kill(os.getpid(), signal.SIGINT)')\n"
    (tmp_path / "stopping.py").write_text(module)
    process = run("build", "--data", "stopping:images", "-o", "out", folder=tmp_path)
    assert process.communicate(timeout=60) == ("", "edgecomp: interrupted; nothing was left half-written\n")
    assert process.returncode == 130


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_full_disk_is_one_line(place: Place, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        process = run(*place.command()[:-1], str(small / "out"), folder=place.folder)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2
        assert out == ""
        assert err.count("\n") == 1
        assert "No space left on device" in err
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    process = run("targets", "--json", folder=tmp_path)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()


def test_without_standard_streams(tmp_path: Path) -> None:
    """Started with all three closed, a program must not print into its own files."""
    command = f"{sys.executable} -m edgecomp targets --json <&- >&- 2>&-"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, env=env, check=False).returncode == 0


def test_export_to_a_full_disk_leaves_nothing(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgecomp import files
    from tests.built import write_folder

    folder = tmp_path / "built"
    write_folder(folder)
    written = files.write_file

    def full(path: Path, data: bytes) -> None:
        if "tflite" in path.name:
            raise OSError(28, "No space left on device", str(path))
        written(path, data)

    monkeypatch.setattr(files, "write_file", full)
    argv = ["export", str(folder / "plan.json"), "--graph", str(folder / "graph.edgecomp"), "--format", "onnx,tflite"]
    assert main([*argv, "-o", str(tmp_path / "new")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from edgecomp.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "heavy = {'numpy', 'torch', 'onnx', 'onnxruntime', 'ai_edge_litert', 'PIL', 'tqdm'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "VERB" in done.stdout


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("64000", 64000), ("64K", 65536), ("64kB", 64000), ("1.5 MiB", 1572864), ("2MB", 2e6), ("7b", 7)],
)
def test_bytes_have_units(text: str, n_bytes: float) -> None:
    assert read_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["40Q", "K", "", "4,000", "inf", "1e999K"])
def test_bytes_that_are_none_name_the_units(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected bytes, e\.g\. 64000, 64K or 64kB .*kB = 1000"):
        read_bytes(text)


@pytest.mark.parametrize("text", ["string", "stdint", "arduino", "math", "network", "a" * 49, "9net", "Net", ""])
def test_names_that_a_network_in_c_cannot_have(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        read_c_name(text)


def test_a_full_standard_output_is_one_line() -> None:
    command = [sys.executable, "-m", "edgecomp", "--cmake-dir"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "edgecomp: standard output: No space left on device\n")


def test_options_of_a_latency_need_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--threads", "4", "-o", "nowhere"]) == 2
    assert "are of --max-latency, which is not given" in capsys.readouterr().err
