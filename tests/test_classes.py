"""The benchmark of chosen classes: its verdict by hand, its file against the float network."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from edgecomp import reference
from edgecomp.benchmarks.classes import Point, int8_file, judge, main, mean_sizes
from edgecomp.graph import Op
from tests.graphs import Build, images
from tests.onnx_run import onnx_run


def points(*rows: tuple[int, float]) -> list[Point]:
    return [Point(share=0.0, n_bytes=n, percent=percent) for n, percent in rows]


def test_the_verdict_by_hand() -> None:
    rival = points((1000, 95.0), (800, 94.0), (600, 88.0))  # has lost 5 at 800 - 4/6 * 200
    ours = points((990, 95.0), (700, 94.8), (660, 94.5), (300, 94.0), (240, 93.0))
    verdict = judge(95.0, 1000, ours, rival)
    assert verdict.rival_bytes == 667
    assert verdict.lost_there == pytest.approx(0.5)
    assert verdict.lost_at_quarter == pytest.approx(2.0)


def test_a_rival_that_never_loses_is_compared_at_its_smallest() -> None:
    verdict = judge(90.0, 4000, points((1000, 90.0), (400, 80.0)), points((1000, 90.0), (500, 89.0)))
    assert verdict.rival_bytes == 500
    assert verdict.lost_there == pytest.approx(10.0)


def test_files_of_the_benchmark_are_the_network() -> None:
    b = Build(0, (3, 8, 8))
    x = b.clip("relu", b.conv("conv", "input", 4))
    graph = b.graph(b.linear("fc", b.node(Op.FLATTEN, "flatten", (x,), {}), 3))
    x = images(graph, 16)
    (got,) = onnx_run(int8_file(graph, [x]), {"input": x}).values()
    want = reference.run(graph, {"input": x})["fc"]
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()
    weight = graph.tensors["conv.weight"].data
    assert weight is not None
    np.testing.assert_allclose(mean_sizes(graph)["conv"], [np.mean(np.abs(w)) for w in weight], rtol=1e-6)


def test_what_cannot_be_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with patch.object(sys, "argv", ["classes", "--weights", str(tmp_path / "no.pt"), "--data", "sample"]):
        assert main() == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m edgecomp.benchmarks.classes: ")
    assert "no.pt" in error
    assert error.count("\n") == 1
