"""TFLite Micro through the command line, from a model to a firmware's array and back to the measured claims."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from edgecomp import intake, recovering
from edgecomp.benchmarks.tflm import load_package
from edgecomp.cli import main
from edgecomp.compress import compress
from edgecomp.exporters.to_tflite import to_tflm
from edgecomp.plan import CompressionPlan
from edgecomp.spending import Budget, BudgetKind, Candidate, Spent
from tests.graphs import Build, plan_for
from tests.micro import NEEDS_MICRO
from tests.tiny import Place

pytestmark = NEEDS_MICRO
TFLM = "model.tflm.tflite"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    with pytest.MonkeyPatch.context() as patch:
        here = Place(tmp_path_factory.mktemp("micro"), patch)
        assert main([*here.command(), "--avg-bits", "4", "--format", "tflite,tflm"]) == 0
        return here


@pytest.fixture(autouse=True)
def there(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)


def record() -> dict:
    return json.loads(Path("out/manifest.json").read_text())


def test_the_folder_and_its_manifest() -> None:
    names = {"README.md", "graph.edgecomp", "manifest.json", "model.tflite", TFLM, "model.cc", "model.h", "plan.json"}
    assert {path.name for path in Path("out").iterdir()} == names
    _, artifact = record()["artifacts"]
    assert (artifact["format"], artifact["path"], artifact["weights_at_rest"]) == ("tflm", TFLM, "native")
    assert artifact["bytes"] == Path("out", TFLM).stat().st_size
    assert artifact["accuracy"]["runtime"].startswith("tflite-micro 0.dev")
    assert artifact["accuracy"]["value"] > 95
    assert artifact["parity"]["max_steps"] <= 2
    stored = [layer["stored_bytes_by_format"]["tflm"] for layer in record()["layers"]]
    assert sum(stored) == artifact["weight_bytes"]
    page = Path("out/README.md").read_text("utf-8")
    assert all(f"| {name} " in page for name in (TFLM, "model.cc", "model.h"))
    assert f"Its arena took {artifact['arena_total_bytes']} bytes" in page
    # The numbers of the array are those of the file.
    text = Path("out/model.cc").read_text()
    array = bytes(int(number, 16) for number in text[text.index("{\n    0x") + 1 : text.index("};")].split(",")[:-1])
    assert array == Path("out", TFLM).read_bytes()


def test_the_arena_is_what_the_interpreter_needs() -> None:
    """It runs in that many bytes, up to alignment, and not in a tenth less."""
    _, artifact = record()["artifacts"]
    data, n = Path("out", TFLM).read_bytes(), artifact["arena_total_bytes"]
    assert n == artifact["arena_head_bytes"] + artifact["arena_tail_bytes"]
    from_bytes = load_package().runtime.Interpreter.from_bytes
    interpreter = from_bytes(data, arena_size=n + 1024)
    interpreter.set_input(np.zeros((1, 8, 8, 1), dtype=np.float32), 0)
    interpreter.invoke()
    with pytest.raises(RuntimeError, match="failed to allocate"):
        from_bytes(data, arena_size=9 * n // 10)


def test_verify(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "out", "--per-layer", "--json"]) == 0
    _, file = json.loads(capsys.readouterr().out)["files"]
    assert (file["path"], file["same_bytes"], file["faults"]) == (TFLM, True, [])
    assert len(file["by_layer"]) >= 5
    assert all(layer["max_steps"] <= 3 for layer in file["by_layer"].values())


@pytest.mark.parametrize("name", ["model.cc", "model.h"])
def test_an_array_that_was_changed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("out", name).read_bytes()
    try:
        Path("out", name).write_bytes(before.replace(b"edgecomp;", b"hand;"))
        assert main(["verify", "out"]) == 2
        error = capsys.readouterr().err
        assert f"out/{name}: sha256 is " in error
        assert error.count("\n") == 1
        Path("out", name).unlink()
        assert main(["verify", "out"]) == 2
        assert f"out/{name}: cannot be read" in capsys.readouterr().err
    finally:
        Path("out", name).write_bytes(before)


def test_export_again(capsys: pytest.CaptureFixture[str]) -> None:
    again = ["export", "out/plan.json", "--graph", "out/graph.edgecomp", "--format", "tflm", "-o"]
    assert main([*again, "same"]) == 0
    for name in (TFLM, "model.cc", "model.h"):
        assert Path("same", name).read_bytes() == Path("out", name).read_bytes()
    capsys.readouterr()
    Path("same", TFLM).unlink()
    assert main([*again, "same"]) == 2
    assert "same/model.cc: is there already" in capsys.readouterr().err
    assert not Path("same", TFLM).exists()
    assert main([*again, "int8", "--weights-at-rest", "int8"]) == 0
    assert b"TFLM_DECODE" in Path("out", TFLM).read_bytes()
    assert b"TFLM_DECODE" not in Path("int8", TFLM).read_bytes()


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"out/{TFLM}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    layers = {layer["name"]: layer["stored_bytes_by_format"]["tflm"] for layer in record()["layers"]}
    assert {weight["name"]: weight["stored_bytes"] for weight in found["weights"]} == layers
    decoded = [weight for weight in found["weights"] if weight.get("encoding") == "table"]
    assert found["operators"]["CUSTOM TFLM_DECODE"] == len(decoded) >= 1
    assert all(weight["bits"] < 8 for weight in decoded)


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    """In a folder beside plain int8 and float, and on its own: what it holds says which runtime reads it."""
    assert main(["bench", f"out/{TFLM}", "--min-secs", "0.05"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("compressed", "plain int8", "float32", ": tflite-micro 0.dev"))
    Path("alone.tflite").write_bytes(Path("out", TFLM).read_bytes())
    assert main(["bench", "alone.tflite", "--min-secs", "0.05", "--json"]) == 0
    ((report,),) = (part["reports"] for part in json.loads(capsys.readouterr().out))
    assert (report["runtime"], report["format"]) == ("tflite-micro", "tflm")
    assert report["execution"]["arena_total_bytes"] == record()["artifacts"][1]["arena_total_bytes"]


def test_bench_of_a_damaged_file_outlives_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that kills the interpreter, when it comes alone and no manifest knows its digest."""
    b = Build(0, (64,))
    graph = b.graph(b.linear("fc", "input", 64))
    data = bytearray(to_tflm(compress(graph, plan_for(graph, 2))).data)
    path = tmp_path / "alone.tflm.tflite"
    path.write_bytes(data)
    assert main(["bench", str(path), "--min-secs", "0.02"]) == 0
    data[308] ^= 1 << 4  # found by trying; what it dies of is not ours to say
    path.write_bytes(data)
    capsys.readouterr()
    assert main(["bench", str(path), "--min-secs", "0.02"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{path}: does not run in TFLite Micro, tried in a process of its own: " in error
    assert "killed by signal 11" in error


def test_without_the_package(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before the work, in one line; writing alone does not need it."""

    def work(*args: object) -> None:
        raise AssertionError("it was not said before the work")

    monkeypatch.setitem(sys.modules, "tflite_micro", None)
    monkeypatch.setattr(intake, "load_images", work)
    commands = (
        [*place.command()[:-1], "without", "--format", "tflm"],
        ["verify", "out"],
        ["bench", f"out/{TFLM}"],
    )
    for command in commands:
        assert main(command) == 6
        needed = "pip install 'tflite-micro>=0.dev20260930204519'"
        assert capsys.readouterr().err == f"edgecomp: tflite-micro is not installed: {needed}\n"
    assert not Path("without").exists()
    again = ["export", "out/plan.json", "--graph", "out/graph.edgecomp", "--format", "tflm", "-o", "unmeasured"]
    assert main(again) == 0


def test_max_size_counts_this_file(place: Place) -> None:
    limit = record()["artifacts"][1]["bytes"] - 100
    command = [*place.command()[:-1], "small", "--format", "tflm", "--max-size", str(limit)]
    assert main(command) == 0
    assert Path("small", TFLM).stat().st_size <= limit


def test_the_pages_of_other_builds_do_not_speak_of_it(place: Place) -> None:
    assert main([*place.command()[:-1], "other", "--format", "onnx"]) == 0
    page = Path("other/README.md").read_text("utf-8")
    assert "model.cc" not in page
    assert "arena" not in page


def test_training_must_not_widen_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A code that comes into use costs every index a bit, and no price of entropy knows that."""
    plan = CompressionPlan.from_json(Path("out/plan.json").read_text(), "plan.json")
    spent = Spent(candidate=Candidate(graph=None, plan=plan), got=2.9, met=True)  # type: ignore[arg-type]
    found = type("Found", (), {"before": 1.0, "after": 0.5, "kept": True, "graph": None, "plan": plan})()
    for got, taken in ((2.95, True), (3.05, False)):
        monkeypatch.setattr(recovering, "least_mean_bits", lambda candidate, formats, got=got: got)
        budget = Budget(kind=BudgetKind.AVG_BITS, asked=3.0)
        after = recovering._within(budget, spent, found, "2 epochs", 9, ("tflm",), None)
        assert after.got == (2.95 if taken else 2.9)
        assert ("left out" in after.candidate.plan.made_by["recovery"]) is not taken
