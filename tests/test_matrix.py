"""README's table of what runs where: it is complete, and small networks give again what it says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgecomp.errors import ExportError, UnsupportedOp
from edgecomp.exporters import export
from edgecomp.graph import Graph, Op
from tests import matrix
from tests.zoo import NETWORKS

SMALL = ("keywords_conv1d", "keywords_separable_conv1d", "squeezenet1_1")
CELL = re.compile(r"(exact|within \d+ steps? in < [\d.e-]+ %), \d+ of 16|refused: .+")


@pytest.fixture(scope="module")
def table() -> list[matrix.Row]:
    return matrix.read(matrix.README.read_text("utf-8"))


@pytest.fixture(scope="module")
def case() -> matrix.Case:
    return matrix.case_of("keywords_separable_conv1d")


def test_every_network_stands_in_the_table(table: list[matrix.Row]) -> None:
    assert [row["network"] for row in table] == list(NETWORKS)
    for row in table:
        assert list(row) == ["network", "input", "classes", *matrix.COLUMNS]
        cells = [row[title] for title in matrix.COLUMNS]
        assert all(map(CELL.fullmatch, cells)), row


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_give_what_the_table_says(name: str, table: list[matrix.Row]) -> None:
    (said,) = (row for row in table if row["network"] == name)
    assert matrix.row(name) == said


def damaged(graph: Graph, op: Op) -> Graph:
    """Turn the weight codes of the last layer of a kind round, as an exporter with a defect might."""
    layer = [node for node in graph.layers() if node.op is op][-1]
    weight = graph.weight(layer)
    assert weight.data is not None
    turned = replace(weight, data=np.ascontiguousarray(weight.data[:, ::-1]))
    return replace(graph, tensors={**graph.tensors, weight.name: turned})


@pytest.mark.parametrize(("form", "runtime"), matrix.COLUMNS.values())
def test_defects_are_found(case: matrix.Case, form: str, runtime: str) -> None:
    wrong = damaged(case.graph, Op.LINEAR)
    assert matrix.agreeing(case, export(wrong, form).data, runtime) < matrix.N_IMAGES
    found = matrix.nearness(case, export(matrix.apart(wrong), form).data, runtime)
    match = re.match(r"within (\d+) steps in", found)
    assert match
    assert int(match[1]) > 10


def test_no_error_travels(case: matrix.Case) -> None:
    """A convolution in the middle goes wrong, and nothing behind it."""
    single = matrix.apart(damaged(case.graph, Op.CONV2D))
    inputs = {name: case.values[name] for name in single.inputs}
    found = matrix.onnx_run(export(single, "onnx").data, inputs)
    off = []
    for node in case.graph.nodes:
        want, got = case.values[node.outputs[0]], found[f"{node.outputs[0]}:out"]
        if np.abs(got.astype(np.float64) - want).max() > 1:
            off.append(node.op)
    assert off == [Op.CONV2D]


@pytest.mark.parametrize("error", [UnsupportedOp("layer 'x': no"), ExportError("tflite: no")])
def test_refusals_stand_in_cells(error: Exception, case: matrix.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise error

    monkeypatch.setattr(matrix, "case_of", refuse if isinstance(error, UnsupportedOp) else lambda name: case)
    monkeypatch.setattr(matrix, "export", refuse)
    row = matrix.row("resnet18")
    assert {row[title] for title in matrix.COLUMNS} == {f"refused: {error}"}


def test_the_command_writes_its_part_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme, kept = tmp_path / "README.md", tmp_path / "rows.json"
    readme.write_text(f"before\n{matrix.BEGIN}\n{matrix.END}\nafter\n", "utf-8")
    measured: list[str] = []

    def row(name: str) -> matrix.Row:
        measured.append(name)
        return {"network": name, "cell": f"exact, {len(measured)}"}

    monkeypatch.setattr(matrix, "README", readme)
    monkeypatch.setattr(matrix, "row", row)
    monkeypatch.setattr(matrix, "NETWORKS", dict.fromkeys("abc"))
    assert matrix.main(["--keep", str(kept)]) == 0
    assert [r["cell"] for r in matrix.read(readme.read_text("utf-8"))] == ["exact, 1", "exact, 2", "exact, 3"]
    assert matrix.main(["--keep", str(kept)]) == 0
    assert measured == ["a", "b", "c"]
    assert matrix.main(["--only", "b"]) == 0
    text = readme.read_text("utf-8")
    assert [r["cell"] for r in matrix.read(text)] == ["exact, 1", "exact, 4", "exact, 3"]
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    readme.write_text("nothing\n", "utf-8")
    with pytest.raises(SystemExit):
        matrix.main([])
    assert readme.read_text("utf-8") == "nothing\n"
