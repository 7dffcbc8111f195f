"""What measuring costs: the runner loads nothing it does not need, and the command that shows it judges rightly."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from edgecomp.benchmarks import runner_cost
from edgecomp.benchmarks.environment import PACKAGES, installed
from edgecomp.benchmarks.runner_cost import in_turns, judge_memory, judge_time
from edgecomp.benchmarks.runtime import Border, sample_image
from edgecomp.strictjson import json_parts, write_json
from tests.filemodels import conv_onnx, conv_tflite
from tests.test_bench import rng

# hashlib and numpy.random bring libcrypto, 4 and 6 MB; importlib.metadata brings email, 2 MB; numpy.ma is 1 MB.
NOT_NEEDED = {
    "edgecomp.plan", "edgecomp.quantmath", "edgecomp.preprocessing", "statistics", "numpy.ma",
    "hashlib", "_hashlib", "numpy.random", "importlib.metadata", "email", "zipfile", "onnx", "torch",
    "edgecomp.reference", "edgecomp.ops", "edgecomp.compress", "edgecomp.coding", "edgecomp.runtime",
    "edgecomp.exporters.to_c", "edgecomp.exporters.read_tflite", "edgecomp.exporters.unpack_onnx",
}  # fmt: skip
NOT_NEEDED_FOR_MEMORY = {*NOT_NEEDED, "subprocess", "argparse", "edgecomp.report"}
# They bring libraries for archives, 0.6 MB; onnxruntime loads them itself.
OF_ONNXRUNTIME = {"shutil", "tempfile"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cost")
    weight = rng().normal(size=(8, 8, 3, 3)).astype("float32")
    (place / "model.onnx").write_bytes(conv_onnx(weight, 8))
    (place / "model.tflite").write_bytes(conv_tflite(weight, 8, 8))
    return place


def loaded(program: str, folder: Path) -> set[str]:
    """Run a program in a fresh process; give the modules it ends with."""
    code = f"import sys\n{program}\nsys.stderr.write('\\n' + ' '.join(sys.modules))"
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{code}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"peak_memory_bytes"' in done.stdout or '"peak_bytes"' in done.stdout  # it did measure
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("name", ["model.onnx", "model.tflite"])
def test_the_runner_loads_nothing_that_it_does_not_need(name, folder):
    words = [name, "--min_secs=0.1", "--processes=1", "--repeat=0"]
    modules = loaded(f"from edgecomp.benchmarks.device import main\nassert main({words!r}) in (0, 6)", folder)
    assert modules & (NOT_NEEDED if name == "model.onnx" else NOT_NEEDED | OF_ONNXRUNTIME) == set()
    assert "edgecomp.benchmarks.bench" in modules


@pytest.mark.parametrize(("name", "runtime"), [("model.onnx", "onnxruntime"), ("model.tflite", "litert")])
def test_the_process_for_memory_loads_less(name, runtime, folder):
    program = f"from edgecomp.benchmarks.memory import main\nassert main([{runtime!r}, {name!r}, '1']) == 0"
    modules = loaded(program, folder)
    assert modules & NOT_NEEDED_FOR_MEMORY == set()
    assert "edgecomp.benchmarks.memory" in modules


def test_versions_are_those_of_the_packages_own_records(tmp_path):
    here = {name for name in PACKAGES if any(metadata.distributions(name=name))}
    assert installed(PACKAGES) == {name: metadata.version(name) for name in PACKAGES if name in here}
    assert here >= {"numpy", "onnxruntime", "ai-edge-litert"}
    for place, record in (
        ("a", "numpy-1.24.2.egg-info"),
        ("a", "ai_edge_litert-2.0.1.dist-info"),
        ("b", "numpy-2.0.0.dist-info"),
        ("b", "tflite_runtime-2.14.0-py3.11.egg-info"),
        ("b", "torch-1.dist-info.part"),
    ):
        (tmp_path / place / record).mkdir(parents=True)
    places = [str(tmp_path / name) for name in ("none", "a", "b")]
    assert installed(("tflite-runtime", "numpy", "torch", "ai-edge-litert"), places) == {
        "tflite-runtime": "2.14.0",
        "numpy": "1.24.2",  # of the folder that Python looks into first
        "ai-edge-litert": "2.0.1",
    }


@pytest.mark.parametrize("dtype", ["float32", "int8", "uint8"])
def test_the_image_that_is_timed_is_noise(dtype):
    border = Border(name="x", shape=(3, 64, 64), dtype=np.dtype(dtype), quant=None)
    x = sample_image(border)
    assert (x.shape, x.dtype) == ((1, 3, 64, 64), np.dtype(dtype))
    np.testing.assert_array_equal(x, sample_image(border))
    if dtype == "float32":
        assert abs(x.mean()) < 0.02
        assert abs(x.std() - 1) < 0.02
        assert len(np.unique(x)) > 10_000
    else:
        assert set(np.unique(x)) == set(range(np.iinfo(dtype).min, np.iinfo(dtype).max + 1))
    halves = x.reshape(2, -1).astype(float)
    assert abs(np.corrcoef(halves)[0, 1]) < 0.05


def test_json_of_many_numbers_is_whole():
    samples = [i / 7 for i in range(2500)]  # longer than what is written at once
    held = memoryview(np.array(samples))
    value = {"samples_us": samples, "reports": [{"samples_us": tuple(samples)}, {"samples_us": held}], "none": []}
    parts = list(json_parts(value))
    assert json.loads("".join(parts)) == {**value, "reports": [{"samples_us": samples}] * 2}
    assert write_json(value) == "".join(parts)
    assert max(map(len, parts)) < 25_000


def test_what_is_met_and_missed():
    assert judge_memory("m", "peak", 115, 100).met
    assert not judge_memory("m", "peak", 116, 100).met
    assert judge_memory("m", "peak", 60_000_000, 50_000_000).runner == "60.0 MB"
    for times, met in ((1.0, True), (1.029, True), (0.971, True), (1.04, False), (0.96, False)):
        found = judge_time("m", [100 * times] * 10, [100.0] * 10)
        assert found.met is met
        assert found.got.startswith(f"{times:.3f} (")
    # Only what differs within a round counts: here both slow down.
    rising = [100.0 * (1 + i) for i in range(10)]
    assert judge_time("m", rising, rising).got == "1.000 (1.000-1.000)"


def test_loops_take_turns():
    calls: list[str] = []
    taken = in_turns(lambda: calls.append("a"), lambda: calls.append("b"), rounds=6, turn_s=0.002)
    assert [len(each) for each in taken] == [6, 6]
    order = [name for name, before in zip(calls, ["", *calls], strict=False) if name != before]
    assert 6 <= len(order) <= 12  # a turn of one may follow the other's, or its own of the round before
    assert set(order) == {"a", "b"}


def test_the_command_shows_both(folder, capsys):
    words = ["--rounds", "2", "--turn-secs", "0.01", "--processes", "1"]
    code = runner_cost.main([str(folder / "model.onnx"), str(folder / "model.tflite"), *words])
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:8]]
    assert [row[0] for row in rows] == ["model.onnx"] * 3 + ["model.tflite"] * 3
    for row in rows:
        if row[1] == "p50":
            assert row[2].endswith(" ms")
            continue
        runner, smallest = (float(cell.removesuffix(" MB")) for cell in row[2:4])
        assert runner > smallest > 20  # Python, numpy and a runtime
        assert float(row[4]) == pytest.approx(runner / smallest, abs=0.01)
    assert code == (3 if any(row[-1] == "MISSED" for row in rows) else 0)
    assert " cores; " in lines[-1]


@pytest.mark.parametrize(("content", "what"), [(b"no model", "cannot load it|ends with"), (None, "No such file")])
def test_a_model_that_is_none_is_told(content, what, tmp_path):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    command = [sys.executable, "-m", "edgecomp.benchmarks.runner_cost", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert any(part in done.stderr for part in what.split("|"))
