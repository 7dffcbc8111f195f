"""The runner as one file: run by hand, with the flags that users of other tools know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgecomp.benchmarks.archive import runner_archive
from edgecomp.cli import main
from edgecomp.report import Comparison
from tests.filemodels import conv_onnx, conv_tflite
from tests.test_bench import rng


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runner")
    weight = rng().normal(size=(8, 8, 3, 3)).astype("float32")
    (place / "model.onnx").write_bytes(conv_onnx(weight, 8))
    (place / "model.tflite").write_bytes(conv_tflite(weight, 8, 8))
    assert main(["targets", "--runner", str(place / "runner.pyz")]) == 0
    return place


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "runner.pyz", *words]  # nothing of the checkout is seen
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_archive_is_the_same_each_time(folder):
    assert (folder / "runner.pyz").read_bytes() == runner_archive() == runner_archive()


def test_flags_of_benchmark_model(folder):
    flags = ["--graph=model.onnx", "--graph=lite=model.tflite", "--num_threads=2", "--num_runs=50", "--warmup_runs=20"]
    done = run(folder, *flags, "--min_secs=0.1", "--max_secs=0.5", "--processes=1", "--enable_op_profiling=true")
    assert done.returncode in (0, 6), done.stderr  # this machine may be too busy for a valid run
    found = Comparison.from_json(done.stdout)
    assert [r.label for r in found.reports] == ["model.onnx", "lite"]
    assert [r.runtime for r in found.reports] == ["onnxruntime", "litert"]
    for report in found.reports:
        assert report.threads == 2
        assert report.warmups >= 20
        assert len(report.samples_us) >= 50
        assert report.peak_memory_bytes > 10e6
    assert found.reports[0].layers_us
    assert not found.reports[1].layers_us
    assert (done.returncode == 6) is bool(found.reports[0].not_valid)
    assert ("not valid: " in done.stderr) is bool(found.reports[0].not_valid)


def test_flags_of_onnxruntime_perf_test(folder):
    done = run(folder, "-m", "times", "-r", "30", "-x", "1", "-e", "cpu", "-I", "model.onnx", "result.json")
    assert done.returncode in (0, 6), done.stderr
    assert done.stdout == ""
    (report,) = json.loads((folder / "result.json").read_text())["reports"]
    assert len(report["samples_us"]) >= 30


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        ([], 2, "no model; expected --graph=FILE"),
        (["none.onnx"], 2, "none.onnx: no such file"),
        (["--graph=model.onnx", "--runtime=litert"], 6, "runtime litert reads tflite"),
        (["--graph=model.onnx", "--num_threads=0"], 2, "--num_threads/-x: '0': expected a whole number, 1 or more"),
        (["--graph=model.onnx", "--num_runs=-5"], 2, "--num_runs/-r: '-5': expected a whole number, 1 or more"),
        (["--graph=model.onnx", "--min_secs", "nan"], 2, "--min_secs/-t: 'nan': expected seconds, 0 or more"),
        (["--graph=model.onnx", "--max_secs", "inf"], 2, "--max_secs: 'inf': expected seconds"),
        (["model.onnx", "model.onnx"], 2, "model.onnx: is a model, and would be replaced by the result"),
        (["--graph=other=model.onnx", "model.onnx", "./model.onnx"], 2, "is a model, and would be replaced"),
        (["--graph=model.onnx", "-e", "cuda"], 2, "invalid choice: 'cuda'"),
        (["--graph=model.onnx", "--enable_op_profiling=perhaps"], 2, "expected true or false"),
        (["--graph=model.onnx", "--cores=4096"], 2, "--cores 4096: expected some of "),
    ],
)
def test_what_the_runner_refuses(words, code, what, folder):
    model = (folder / "model.onnx").read_bytes()
    done = run(folder, *words)
    assert (folder / "model.onnx").read_bytes() == model
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count("\n") == 1
    assert what in done.stderr
    assert "Traceback" not in done.stderr
