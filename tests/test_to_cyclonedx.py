"""A bill of materials is valid by the published schema, says what the manifest says, and is the same every time."""

from __future__ import annotations

import builtins
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgecomp.cli import main
from tests.built import write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "out")


def bill(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["sbom", str(folder)]) == 0
    return capsys.readouterr().out


def test_it_is_valid_cyclonedx(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = bill(folder, capsys)
    check = JsonStrictValidator(SchemaVersion.V1_6)
    assert check.validate_str(text) is None
    assert check.validate_str(text.replace('"machine-learning-model"', '"network"')) is not None


def test_model_files_and_tools_are_in_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(bill(folder, capsys))
    model = found["metadata"]["component"]
    assert (model["type"], model["name"]) == ("machine-learning-model", "plain")
    assert {"name": "edgecomp:float_accuracy_percent", "value": "90.0"} in model["properties"]
    files = {c["name"]: c for c in found["components"]}
    assert sorted(files) == ["graph.edgecomp", "model.onnx", "model.tflite", "plan.json"]
    for name, part in files.items():
        data = (folder / name).read_bytes()
        assert part["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(data).hexdigest()}]
        assert {"name": "edgecomp:bytes", "value": str(len(data))} in part["properties"]
    assert {"name": "edgecomp:accuracy_percent", "value": "87.5"} in files["model.onnx"]["properties"]
    tools = {c["name"]: c for c in found["metadata"]["tools"]["components"]}
    record = json.loads((folder / "manifest.json").read_text())
    assert {name: c["version"] for name, c in tools.items()} == {n: t["version"] for n, t in record["tools"].items()}
    assert tools["numpy"]["purl"] == f"pkg:pypi/numpy@{tools['numpy']['version']}"
    needs = {d["ref"]: d.get("dependsOn", []) for d in found["dependencies"]}
    assert needs["model"] == sorted(f"file:{name}" for name in files)
    assert needs["file:model.onnx"] == ["file:graph.edgecomp", "file:plan.json"]


def test_equal_folders_have_equal_bills(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert bill(folder, capsys) == bill(again, capsys)
    other = write_folder(tmp_path / "other", bits=3)
    assert json.loads(bill(other, capsys))["serialNumber"] != json.loads(bill(folder, capsys))["serialNumber"]


def test_written_to_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, place = bill(folder, capsys), tmp_path / "bom.cdx.json"
    argv = ["sbom", str(folder), "-o", str(place)]
    assert main(argv) == 0
    assert place.read_text() == text
    assert main(argv) == 2
    assert "bom.cdx.json: is there already; give --force" in capsys.readouterr().err
    assert main([*argv, "--force"]) == 0


def test_it_replaces_no_file_that_it_is_about(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("manifest.json", "model.onnx"):
        before = (folder / name).read_bytes()
        assert main(["sbom", str(folder), "-o", str(folder / name), "--force"]) == 2
        assert f"{name}: is a file that the bill is about" in capsys.readouterr().err
        assert (folder / name).read_bytes() == before


def break_weight(folder: Path) -> None:
    data = bytearray((folder / "model.onnx").read_bytes())
    data[-9] ^= 1
    (folder / "model.onnx").write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (break_weight, "model.onnx: sha256 is"),
        (lambda folder: (folder / "model.tflite").unlink(), "model.tflite: cannot be read"),
        (lambda folder: shutil.rmtree(folder), "is no folder"),
    ],
)
def test_nothing_is_said_of_what_was_changed(
    harm: Callable[[Path], Any], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(folder)
    assert main(["sbom", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err


def test_without_the_library_the_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true_import = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "cyclonedx":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return true_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert main(["sbom", str(folder)]) == 6
    assert "pip install 'edgecomp[sbom]'" in capsys.readouterr().err
