"""`inspect` knows every JSON that the verbs print, as the verbs print it, and says what is wrong with a damaged one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from edgecomp.cli import main
from edgecomp.report import Parity
from edgecomp.verifying import Verification, Verified
from tests.built import write_folder
from tests.test_from_counts import REPORT

Say = Callable[..., str]


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command beside a built folder, and give what it prints."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "out")

    def run(*argv: str, code: int = 0) -> str:
        assert main(argv) == code
        output = capsys.readouterr()
        return output.err if code else output.out

    return run


def inspected(text: str, said: Say) -> dict[str, object]:
    Path("answer.json").write_text(text)
    found: dict[str, object] = json.loads(said("inspect", "answer.json", "--json"))
    assert said("inspect", "answer.json").count(f"| {found['kind']} ") == 1
    return found


def test_an_estimate(said: Say) -> None:
    printed = said("estimate", "out", "--target", "rpi4", "--json")
    found, value = inspected(printed, said), json.loads(printed)
    assert (found["kind"], found["source"], found["format_version"]) == ("estimate", "estimated", "edgecomp-estimate/1")
    assert (found["target"], found["runtime"], found["macs"]) == ("rpi4", "litert", value["macs"])
    assert [found[f"latency_ms_{end}"] for end in ("p10", "p50", "p90")] == list(value["latency_ms"].values())
    layers = found["layers"]
    assert isinstance(layers, list)
    assert [(x["name"], x["latency_ms_p50"]) for x in layers] == [
        (x["name"], x["latency_ms"]["p50"]) for x in value["layers"]
    ]
    text = said("inspect", "answer.json")
    assert re.search(r"\| conv1 +\| first +\| ", text)
    assert value["basis"][0] in text


def test_an_estimate_from_counts(said: Say) -> None:
    Path("counts.json").write_text(json.dumps(REPORT))
    found = inspected(said("estimate", "counts.json", "--target", "nucleo-l4r5zi", "--json"), said)
    assert (found["kind"], found["instructions"], found["runtime"]) == ("estimate", 861, "c")
    assert inspected(json.dumps(REPORT), said)["kind"] == "emulated report"


def test_boards(said: Say) -> None:
    boards = inspected(said("targets", "--json"), said)["boards"]
    assert isinstance(boards, list)
    assert {x["name"]: x["cpu"] for x in boards}["rpi5"] == "Cortex-A76"
    assert inspected(said("targets", "rpi4", "--json"), said)["kind"] == "boards"


def test_a_verification(said: Say) -> None:
    parity = Parity(equal_percent=99.5, max_steps=1, n=640, worst_index=(0,))
    file = Verified(
        path="model.onnx", claimed_percent=87.5, percent=87.5, n_images=64, parity=parity, agree_percent=100.0,
        same_bytes=True, by_layer={"conv1": parity},
    )  # fmt: skip
    found = inspected(json.dumps(Verification(files=(file,), reference_percent=None).to_json()), said)
    assert (found["kind"], found["passed"]) == ("verification", True)
    files, layers = found["files"], found["layers"]
    assert isinstance(files, list)
    row = files[0]
    assert (row["path"], row["accuracy_value"], row["parity_equal_percent"]) == ("model.onnx", 87.5, 99.5)
    assert layers == [{"path": "model.onnx", "tensor": "conv1", "equal_percent": 99.5, "max_steps": 1, "n": 640}]


def test_a_bill_and_what_inspect_says_itself(said: Say) -> None:
    pytest.importorskip("cyclonedx")
    bill = inspected(said("sbom", "out"), said)
    assert (bill["kind"], bill["format_version"], bill["model"]) == ("bill of materials", "CycloneDX 1.6", "plain")
    assert {"type": "file", "name": "model.onnx", "version": None} in bill["components"]  # type: ignore[operator]
    printed = said("inspect", "out/model.onnx", "--json")
    of = inspected(printed, said)["of"]
    assert of == {key: json.loads(printed)[key] for key in ("kind", "bytes", "sha256")}


def test_what_a_library_for_firmware_says(said: Say) -> None:
    plan = ["export", "out/plan.json", "--graph", "out/graph.edgecomp", "--format", "c"]
    said(*plan, "--layout", "platformio", "--name", "net", "-o", "lib")
    found = inspected((Path("lib") / "library.json").read_text(), said)
    assert (found["kind"], found["name"], found["headers"]) == ("PlatformIO library", "edgecomp_net", "net.h")


def test_every_json_in_a_folder_is_known(said: Say) -> None:
    for path in Path("out").glob("*.json"):
        assert json.loads(said("inspect", str(path), "--json"))["kind"] in ("plan", "manifest")


ESTIMATE = {
    "schema": "edgecomp-estimate/1", "source": "estimated", "model": "m", "target": "t", "basis": ["b"],
    "latency_ms": {"p10": 1, "p50": 2, "p90": 3}, "layers": [],
}  # fmt: skip


@pytest.mark.parametrize(
    "damaged",
    [
        {"schema": "edgecomp-estimate/1"},
        ESTIMATE | {"latency_ms": {"p10": 1, "p50": 2}},
        ESTIMATE | {"latency_ms": {"p10": 1, "p50": 2, "p90": "3"}},
        ESTIMATE | {"layers": [1]},
        ESTIMATE | {"layers": {}},
        ESTIMATE | {"basis": [1]},
        ESTIMATE | {"target": None},
        {"passed": True, "reference_percent": None, "files": ""},
        {"passed": True, "reference_percent": None, "files": [{"path": "x"}]},
        {"passed": True, "reference_percent": None, "files": [{"path": "x", "by_layer": {"a": 1}}]},
        {"bomFormat": "CycloneDX"},
        {"bomFormat": "CycloneDX", "specVersion": "1.6", "components": [1]},
        {"bomFormat": "CycloneDX", "specVersion": "1.6", "components": None},
        [{"name": "a", "description": "b", "runtimes": []}, 7],
    ],
)
def test_damaged_answers(damaged: object, said: Say) -> None:
    Path("answer.json").write_text(json.dumps(damaged))
    error = said("inspect", "answer.json", code=2)
    assert error.startswith("edgecomp: answer.json: ")
    assert error.count("\n") == 1


def test_numbers_that_json_could_not_say_again(said: Say) -> None:
    Path("answer.json").write_text(json.dumps(ESTIMATE).replace('"p90": 3', '"p90": 1e999'))
    assert "a number is too large" in said("inspect", "answer.json", code=2)
