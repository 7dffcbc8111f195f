"""Below the line of data everything runs where torch is not: on the board itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from edgecomp.artifact import AtRest
from edgecomp.exporters.to_onnx import to_onnx
from tests.built import write_folder
from tests.packed_files import exported, quantized

ROOT = Path(__file__).parents[1]

# As if these were not installed: they cannot be found, so importing them raises.
BLOCKED = """
import sys
from importlib.machinery import PathFinder

real = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in {blocked} else real(name, *rest)
"""
TORCH = ("torch", "torchvision", "safetensors")
ALL_BUT_NUMPY = (*TORCH, "onnx", "onnxruntime", "ai_edge_litert", "flatbuffers", "PIL", "tqdm", "google")


def python(code: str, *arguments: object, blocked: tuple[str, ...] = TORCH) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that lacks the blocked packages."""
    whole = BLOCKED.format(blocked=set(blocked)) + textwrap.dedent(code)
    command = [sys.executable, "-W", "error", "-c", whole, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def edgecomp(*arguments: object, blocked: tuple[str, ...] = TORCH) -> subprocess.CompletedProcess[str]:
    code = "from edgecomp.cli import main\nraise SystemExit(main(sys.argv[1:]))"
    return python(code, *arguments, blocked=blocked)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("built") / "out")


def test_the_block_blocks() -> None:
    ran = python("import torch")
    assert ran.returncode == 1
    assert "No module named 'torch'" in ran.stderr


def test_export_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    ran = edgecomp(
        "export", folder / "plan.json", "--graph", folder / "graph.edgecomp", "--format", "onnx,tflite", "-o", tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    for name in ("model.onnx", "model.tflite"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("name", ["model.onnx", "model.tflite", "graph.edgecomp", "plan.json", "manifest.json"])
def test_inspect(name: str, folder: Path) -> None:
    ran = edgecomp("inspect", folder / name, "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["bytes"] == (folder / name).stat().st_size


@pytest.mark.parametrize("name", ["model.onnx", "model.tflite"])
def test_bench(name: str, folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / f"alone.{name.partition('.')[2]}"
    alone.write_bytes((folder / name).read_bytes())
    ran = edgecomp("bench", alone, "--min-secs", "0.02", "--json")
    assert ran.returncode == 0, ran.stderr
    (comparison,) = json.loads(ran.stdout)
    assert comparison["reports"][0]["samples_us"]


def test_reference_and_runtimes_agree(folder: Path) -> None:
    ran = python(
        """
        from pathlib import Path
        import numpy as np
        from edgecomp.compress import compress
        from edgecomp.benchmarks.runners import RUNNERS
        from edgecomp.folder import open_folder

        built = open_folder(Path(sys.argv[1]))
        graph = compress(built.graph, built.plan)
        x = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
        want = RUNNERS["reference"](graph).run(x)
        for entry in built.record["artifacts"]:
            runtime = {"onnx": "onnxruntime", "tflite": "litert"}[entry["format"]]
            got = RUNNERS[runtime](built.read(entry["path"])).run(x)
            assert np.abs(got - want).max() < 0.1 * np.abs(want).max(), runtime
        assert "torch" not in sys.modules
        print("agree")
        """,
        folder,
    )
    assert ran.stdout == "agree\n", ran.stderr


def test_a_build_says_what_is_missing(tmp_path: Path) -> None:
    ran = edgecomp("build", "-o", tmp_path / "out")
    assert ran.returncode == 6
    assert ran.stderr.count("\n") == 1
    assert "pip install 'edgecomp[build]'" in ran.stderr
    assert not (tmp_path / "out").exists()


def test_with_numpy_alone(folder: Path, tmp_path: Path) -> None:
    """The base install: what it can do, it does; what it cannot, it says in one line."""
    for name in ("graph.edgecomp", "plan.json", "manifest.json"):
        ran = edgecomp("inspect", folder / name, blocked=ALL_BUT_NUMPY)
        assert ran.returncode == 0, ran.stderr
    for arguments in (
        ("inspect", folder / "model.onnx"),
        ("inspect", folder / "model.tflite"),
        ("bench", folder / "model.onnx"),
        ("export", folder / "plan.json", "--graph", folder / "graph.edgecomp", "--format", "onnx", "-o", tmp_path),
        ("export", folder / "plan.json", "--graph", folder / "graph.edgecomp", "--format", "tflite", "-o", tmp_path),
    ):
        ran = edgecomp(*arguments, blocked=ALL_BUT_NUMPY)
        assert ran.returncode in (5, 6), f"{arguments}: {ran.returncode} {ran.stdout} {ran.stderr}"
        assert ran.stderr.count("\n") == 1, ran.stderr
        assert "pip install" in ran.stderr
    assert list(tmp_path.iterdir()) == []
    targets = edgecomp("targets", blocked=ALL_BUT_NUMPY)
    assert "rpi4" in targets.stdout


def test_unpacking_needs_numpy_alone(tmp_path: Path) -> None:
    packed, full = (exported("wide", 3, at_rest).data for at_rest in (AtRest.PACKED, AtRest.INT8))
    source, target = tmp_path / "model.tflite", tmp_path / "full.tflite"
    source.write_bytes(packed)
    ran = edgecomp("unpack", source, "-o", target, blocked=ALL_BUT_NUMPY)
    assert ran.returncode == 0, ran.stderr
    assert len(packed) < len(full) <= target.stat().st_size
    code = "from edgecomp.runtime import load; print(load(sys.argv[1]) == open(sys.argv[2], 'rb').read())"
    assert python(code, source, target, blocked=ALL_BUT_NUMPY).stdout == "True\n"


def test_onnx_needs_onnxruntime_alone(tmp_path: Path) -> None:
    """The `onnx` package and protobuf are not there: a file is unpacked, and a session made of it."""
    graph = quantized("wide", 3)
    source, target = tmp_path / "model.onnx", tmp_path / "full.onnx"
    source.write_bytes(to_onnx(graph).data)
    ran = edgecomp("unpack", source, "-o", target, blocked=ALL_BUT_NUMPY)
    assert ran.returncode == 0, ran.stderr
    assert target.read_bytes() == to_onnx(graph, at_rest=AtRest.INT8).data
    code = """
    import numpy as np
    from edgecomp.runtime import onnx_session
    session = onnx_session(sys.argv[1])
    (y,) = session.run(None, {"input": np.zeros((1, 8, 6, 6), np.float32)})
    print(y.shape, sorted({"onnx", "google", "torch"} & sys.modules.keys()))
    """
    ran = python(code, source, blocked=tuple(set(ALL_BUT_NUMPY) - {"onnxruntime"}))
    assert ran.stdout == "(1, 2) []\n", ran.stderr
    ran = python("from edgecomp.runtime import onnx_session; onnx_session(sys.argv[1])", source, blocked=ALL_BUT_NUMPY)
    assert ran.stderr.splitlines()[-1].startswith("edgecomp.errors.TargetError: onnxruntime cannot be imported (")
    assert ran.stderr.splitlines()[-1].endswith("install it with: pip install onnxruntime")


def test_importing_edgecomp_imports_next_to_nothing() -> None:
    ran = python("import edgecomp; print(sorted({name.partition('.')[0] for name in sys.modules}))", blocked=())
    assert ran.returncode == 0, ran.stderr
    found = set(ran.stdout.replace("'", "").strip("[]\n").split(", "))
    assert "edgecomp" in found
    assert not found & {"numpy", "argparse", *ALL_BUT_NUMPY}


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["--version"]])
def test_help_needs_nothing(arguments: list[str]) -> None:
    blocked = (*ALL_BUT_NUMPY, "numpy")
    ran = edgecomp(*arguments, blocked=blocked)
    assert ran.returncode == 0, ran.stderr
    assert "edgecomp" in ran.stdout
    assert ran.stderr == ""


def test_python_m_edgecomp() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-m", "edgecomp", "--help"], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0
    assert ran.stdout.startswith("usage: edgecomp ")
    assert {"build", "export", "verify", "bench", "inspect"} <= set(ran.stdout.split())
