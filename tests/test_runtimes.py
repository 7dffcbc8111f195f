"""The matrix of runtimes: what it runs, what it notices; and itself, where its environments are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from edgecomp.compress import compress
from edgecomp.exporters import export
from edgecomp.graph import Array, Op
from tests import runtimes
from tests.graphs import plan_for, separable
from tests.runtimes import Case, Ran, pins

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".runtimes"
PINS = pins((ROOT / "tests" / "runtimes.txt").read_text("utf-8"))


@pytest.mark.runtimes
def test_the_matrix() -> None:
    missing = [name for name, packages in PINS.items() if not runtimes.is_ready(ENVIRONMENTS / name, packages)]
    if missing:
        pytest.skip(f"{missing[0]} is not in .runtimes; make runtimes installs it there, from the network")
    table, defects = runtimes.matrix(ENVIRONMENTS, list(PINS))
    assert defects == []
    assert len(table.split("\n\n")[0].splitlines()) == 2 + 4 + 2 * 3


def test_the_environments_are_those_that_are_promised() -> None:
    versions = Counter(".".join(packages[0].split(".")[:2]) for packages in PINS.values())
    assert versions == Counter(
        ["onnxruntime==1.17", "onnxruntime==1.20", "onnxruntime==1.23", "onnxruntime==1.32", "tflite-runtime==2.14",
         "ai-edge-litert==2.3"]
    )  # fmt: skip


@pytest.mark.parametrize("text", ["a", "a onnxruntime", "a onnxruntime>=1.17", "a x==1\na y==1"])
def test_what_is_no_list_of_environments(text: str) -> None:
    with pytest.raises(ValueError, match=r"runtimes.txt:\d: found '.*', expected a new NAME and PACKAGE==VERSION"):
        pins(f"# comment\n{text}")


@pytest.fixture(scope="module")
def found() -> dict[str, Case]:
    return runtimes.cases()


def test_the_files_cover_what_they_should(found: dict[str, Case]) -> None:
    networks = [case.graph for case in found.values() if not case.kind]
    stored: Counter[str] = Counter()
    for graph in networks:
        stored += runtimes.encodings(graph)
    assert {f"dense {bits} bits" for bits in range(2, 9)} <= stored.keys()
    assert {f"words, groups of {n}" for n in (1, 2, 4)} <= stored.keys()
    nodes = [node for graph in networks for node in graph.nodes]
    assert {node.op for node in nodes} == set(Op)
    groups = {node.attrs["groups"] for node in nodes if node.op is Op.CONV2D}
    assert groups == {1, 2, 6, 12, 16}
    assert {case.kind for case in found.values()} >= {"depthwise", "linear", "add", "concat", "avg_pool", "silu", "mul"}
    assert all(len(np.unique(case.want)) > 1 for case in found.values()), "an output says nothing"


def _optimized(data: bytes, level: onnxruntime.GraphOptimizationLevel, folder: Path) -> onnx.ModelProto:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx")


def test_weights_that_are_not_folded_are_noticed(tmp_path: Path) -> None:
    graph = separable()
    quantized = compress(graph, plan_for(graph, 3))
    data, levels = export(quantized, "onnx").data, onnxruntime.GraphOptimizationLevel
    n_layers = len(quantized.layers())
    folded = _optimized(data, levels.ORT_ENABLE_ALL, tmp_path)
    assert runtimes.not_folded(folded, n_layers) == ""
    assert "QLinearConv and QGemm for 7 layers" in runtimes.not_folded(folded, n_layers + 1)
    left = runtimes.not_folded(_optimized(data, levels.ORT_DISABLE_ALL, tmp_path), n_layers)
    assert left.startswith("computed from constants in every run: 18 BitShift, 18 BitwiseAnd")


def _ran(runtime: str, outputs: dict[tuple[str, str], Array | str], machine: str = "x86_64") -> Ran:
    facts = {"runtime": runtime, "numpy": "2", "machine": machine, "in_xnnpack": []}
    return Ran(facts=facts, outputs=outputs, folder=Path())


def _codes(*values: int) -> Array:
    return np.array([values], dtype=np.int8)


def test_an_output_that_differs_is_noticed_in_onnx() -> None:
    newest, same = (_ran(f"onnxruntime {v}", {("a.onnx", "default"): _codes(1, 2, 3)}) for v in (2, 1))
    assert runtimes.onnx_defects(same, newest, {}) == []
    for other in (_codes(1, 2, 4), _codes(1, 2), np.float32([[1, 2, 3]])):
        old = _ran("onnxruntime 1", {("a.onnx", "default"): other})
        (line,) = runtimes.onnx_defects(old, newest, {})
        assert line.startswith("onnxruntime 1: a.onnx: not the bytes of onnxruntime 2, up to ")
    # Zeros of two signs are equal numbers and other bytes.
    zeros = (_ran("r", {("a.onnx", "default"): np.float32([[zero]])}) for zero in (0.0, -0.0))
    assert len(runtimes.onnx_defects(*zeros, {})) == 1
    # A last bit is forgiven to another processor, a step is not.
    newest = _ran("r", {("a.onnx", "default"): np.float32([[0.5]])})
    for machine, value, count in (("aarch64", 0.5 + 2**-23, 0), ("x86_64", 0.5 + 2**-23, 1), ("aarch64", 0.504, 1)):
        other = _ran("r", {("a.onnx", "default"): np.float32([[value]])}, machine)
        assert len(runtimes.onnx_defects(other, newest, {})) == count


def _case(kind: str, *want: int) -> Case:
    graph = separable()
    return Case(graph=graph, inputs=(), want=_codes(*want), kind=kind)


def test_an_output_that_differs_is_noticed_in_tflite() -> None:
    good: dict[tuple[str, str], Array | str] = {
        (f"{file}.tflite", kernels): _codes(1, 2, 3)
        for kernels in ("default", "built-in", "reference")
        for file in ("n.int8", "n.packed", "n", "n.widened", "n@conv.int8")
    }
    found = {"n": _case("", 1, 2, 3), "n@conv": _case("conv2d", 1, 2, 3)}
    newest = _ran("litert", good)

    def defects(file: str, kernels: str, *codes: int, kind: str = "conv2d") -> list[str]:
        old = _ran("old", {**good, (f"{file}.tflite", kernels): _codes(*codes)})
        return runtimes.tflite_defects(old, newest, {**found, "n@conv": _case(kind, 1, 2, 3)})

    assert runtimes.tflite_defects(newest, newest, found) == []
    # Packed files are the int8 files, whatever kernels run them.
    for kernels in ("default", "built-in", "reference"):
        assert len(defects("n.packed", kernels, 1, 2, 2)) == 1
    assert [len(defects("n.widened", kernels, 1, 2, 2)) for kernels in ("built-in", "default")] == [1, 0]
    # An operator: one step from the reference anywhere, and other bytes only where that is known.
    assert [len(defects("n@conv.int8", kernels, 1, 2, 4)) for kernels in ("built-in", "default")] == [1, 0]
    assert [len(defects("n@conv.int8", kernels, 1, 2, 5)) for kernels in ("built-in", "default")] == [2, 1]
    assert defects("n@conv.int8", "reference", 1, 2, 4, kind="linear") == []
    assert len(defects("n@conv.int8", "reference", 1, 2, 5, kind="linear")) == 1
    # A whole network may drift by a step at each of its operators.
    assert defects("n", "default", 1, 2, 9) == []


def test_a_defect_ends_the_command_with_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtimes, "make", lambda home, packages: None)
    for defects, code in ((["old: a.onnx: not the bytes"], 1), ([], 0)):
        monkeypatch.setattr(runtimes, "matrix", lambda folder, names, _, d=defects: (f"{folder.name} {names}", d))
        assert runtimes.main(["--folder", str(tmp_path), "--only", "onnxruntime-1.20"]) == code
        out, err = capsys.readouterr()
        assert out == f"{tmp_path.name} ['onnxruntime-1.20']\n"
        assert err.splitlines() == defects
    with pytest.raises(SystemExit):
        runtimes.main(["--only", "onnxruntime-0.1"])
    assert "there are onnxruntime-1.17, onnxruntime-1.20," in capsys.readouterr().err
