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
from tests.micro import NEEDS_MICRO
from tests.zoo import N_CLASSES, NETWORKS

NEEDS_REAL = pytest.mark.skipif(not matrix.REAL.exists(), reason=f"real images come from {matrix.REAL}")
SMALL = ("keywords_conv1d", "keywords_separable_conv1d", pytest.param("squeezenet1_1", marks=NEEDS_REAL))
COLUMNS = [pytest.param(*column, marks=[NEEDS_MICRO] * (column[0] == "tflm")) for column in matrix.COLUMNS.values()]


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
        entry = NETWORKS[row["network"]]
        for title in matrix.COLUMNS:
            match = matrix.CELL.fullmatch(row[title])
            assert match or row[title].startswith("refused: "), row
            if match:
                assert int(match["n"]) == matrix.N_IMAGES * (1 + (len(entry.shape) == 3)), row
                assert (match["labelled"] == str(matrix.N_LABELLED)) == entry.trained, row


def test_every_operator_is_within_a_step(table: list[matrix.Row]) -> None:
    for row in table:
        for title in matrix.COLUMNS:
            match = matrix.CELL.fullmatch(row[title])
            assert not match or match["near"].startswith(("exact", "1 step ")), (row["network"], title)


def test_the_summary_is_of_the_table(table: list[matrix.Row]) -> None:
    assert matrix.summary(table) in matrix.README.read_text("utf-8")


@NEEDS_MICRO
@pytest.mark.parametrize("name", SMALL)
def test_small_networks_give_what_the_table_says(name: str, table: list[matrix.Row]) -> None:
    """But for two images: processors differ in the last bit of the float ranges that activations are coded by."""
    (said,) = (row for row in table if row["network"] == name)
    found = matrix.row(name)
    assert found.keys() == said.keys()
    for title in matrix.COLUMNS:
        cells = [matrix.CELL.fullmatch(row[title]) for row in (found, said)]
        if None in cells:
            assert found[title] == said[title], title
            continue
        now, then = (cell.groupdict() for cell in cells if cell is not None)
        assert now["near"].partition(" in ")[0] == then["near"].partition(" in ")[0], title
        assert {k: now[k] for k in ("n", "labelled")} == {k: then[k] for k in ("n", "labelled")}, title
        for count in ("same", "close"):
            assert abs(int(now[count] or now["same"]) - int(then[count] or then["same"])) <= 2, title


def test_what_random_weights_answer_tells_images_apart(case: matrix.Case) -> None:
    """On the images the last layer is made of, each output has mean 0 and variance 1, so that every class is named."""
    _, settling = matrix.images_for(NETWORKS["keywords_separable_conv1d"].shape)
    (y,) = case.graph.outputs
    got = matrix.reference_outputs(case.graph, settling.reshape(-1, *case.images.shape[1:]), (y,))[y]
    assert np.abs(got.mean(axis=0)).max() < 0.05
    assert np.abs(got.std(axis=0) - 1).max() < 0.05
    assert set(got.argmax(axis=1)) == set(range(N_CLASSES))


def damaged(graph: Graph, op: Op) -> Graph:
    """Turn the weight codes of the last layer of a kind round, as an exporter with a defect might."""
    layer = [node for node in graph.layers() if node.op is op][-1]
    weight = graph.weight(layer)
    assert weight.data is not None
    turned = replace(weight, data=np.ascontiguousarray(weight.data[:, ::-1]))
    return replace(graph, tensors={**graph.tensors, weight.name: turned})


@pytest.mark.parametrize(("form", "runtime"), COLUMNS)
def test_defects_are_found(case: matrix.Case, form: str, runtime: str) -> None:
    wrong = damaged(case.graph, Op.LINEAR)
    assert max(matrix.agreeing(case, export(wrong, form).data, runtime)) < 0.9 * matrix.N_IMAGES
    found = matrix.nearness(case, export(matrix.apart(wrong), form).data, runtime)
    match = re.match(r"(\d+) steps in", found)
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
        return {"network": name, "cell": f"exact; {len(measured)} of 3"}

    monkeypatch.setattr(matrix, "README", readme)
    monkeypatch.setattr(matrix, "COLUMNS", {"cell": ("onnx", "onnxruntime")})
    monkeypatch.setattr(matrix, "REAL", readme)
    monkeypatch.setattr(matrix, "row", row)
    monkeypatch.setattr(matrix, "NETWORKS", dict.fromkeys("abc"))
    assert matrix.main(["--keep", str(kept)]) == 0
    assert [r["cell"] for r in matrix.read(readme.read_text("utf-8"))] == [f"exact; {n} of 3" for n in (1, 2, 3)]
    assert matrix.main(["--keep", str(kept)]) == 0
    assert measured == ["a", "b", "c"]
    assert matrix.main(["--only", "b"]) == 0
    text = readme.read_text("utf-8")
    assert [r["cell"] for r in matrix.read(text)] == [f"exact; {n} of 3" for n in (1, 4, 3)]
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    readme.write_text("nothing\n", "utf-8")
    with pytest.raises(SystemExit):
        matrix.main([])
    assert readme.read_text("utf-8") == "nothing\n"


def test_without_real_images_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "REAL", tmp_path / "images.zip")
    monkeypatch.setattr(matrix, "row", lambda name: pytest.fail("measured"))
    assert matrix.main([]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "images.zip: not there" in err


def test_the_summary_counts_cells_and_names_those_that_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "COLUMNS", {"A": ("onnx", "onnxruntime"), "B": ("tflm", "tflite-micro")})
    rows = [
        {"network": "a", "A": "exact; 128 of 128", "B": "1 step in < 1 %; 120 of 128, 127 with ties"},
        {"network": "b", "A": "1 step in < 10 %; 100 of 128, 126 with ties", "B": "refused: no"},
    ]
    assert matrix.summary(rows) == (
        "4 cells: 1 exact, 1 refused, 2 within 1 step. The class is the reference's on at least 99 % of images in "
        "1 of 3, with ties in 2. Not in: A: b 126."
    )
