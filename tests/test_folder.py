"""A built folder is taken as it was written or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgecomp import bundle
from edgecomp.errors import BundleError, EdgecompError, PlanError
from edgecomp.folder import open_folder
from edgecomp.plan import CompressionPlan
from tests.built import write_folder
from tests.graphs import plain, plan_for


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("built") / "out")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "out"))


def test_an_exported_folder_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "network.c").touch()
    with pytest.raises(BundleError, match=r"has no manifest\.json; expected the folder that edgecomp build wrote;"):
        open_folder(tmp_path)


def test_what_was_written_is_read(folder: Path) -> None:
    built = open_folder(folder)
    assert built.path == folder
    assert built.graph.digest() == plain().digest() == built.plan.graph_digest
    assert built.plan == CompressionPlan.from_json((folder / "plan.json").read_text())
    assert built.record["model"] == "plain"
    for entry in built.record["artifacts"]:
        assert built.read(entry["path"]) == (folder / entry["path"]).read_bytes()


@pytest.mark.parametrize("name", ["model.onnx", "model.tflite"])
def test_a_changed_artifact_is_refused(name: str, folder: Path) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    built = open_folder(folder)
    with pytest.raises(BundleError, match=f"{name}: sha256 is .*the manifest says {built.record['files'][name][:12]}"):
        built.read(name)


@pytest.mark.parametrize("name", ["plan.json", "graph.edgecomp"])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: cannot be read: No such file"):
        open_folder(folder)


def test_a_missing_artifact_is_named(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    built = open_folder(folder)
    with pytest.raises(BundleError, match=r"model\.onnx: cannot be read"):
        built.read(built.record["artifacts"][0]["path"])


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_text_that_is_none(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"\xff\xfe{}")
    with pytest.raises(BundleError, match=rf"{name}: is not UTF-8"):
        open_folder(folder)


def test_no_folder(folder: Path) -> None:
    for place in (folder / "none", folder / "plan.json"):
        with pytest.raises(BundleError, match="is no folder"):
            open_folder(place)


def test_an_edited_plan_is_not_the_one_that_was_built(folder: Path) -> None:
    text = (folder / "plan.json").read_text()
    (folder / "plan.json").write_text(text.replace('"weight_bits": 4', '"weight_bits": 8', 1))
    with pytest.raises(BundleError, match=r"changed after the build; .*edgecomp export"):
        open_folder(folder)


def test_the_graph_of_another_model(folder: Path) -> None:
    bundle.save(plain(seed=1), folder / "graph.edgecomp")
    with pytest.raises(PlanError, match="made for the graph"):
        open_folder(folder)


def test_plan_and_manifest_of_another_model(folder: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", lambda: plain(seed=1))
    for name in ("plan.json", "manifest.json"):
        shutil.copy(other / name, folder / name)
    with pytest.raises(PlanError, match="made for the graph"):
        open_folder(folder)
    shutil.copy(other / "graph.edgecomp", folder / "graph.edgecomp")
    built = open_folder(folder)
    with pytest.raises(BundleError, match="sha256"):
        built.read(built.record["artifacts"][0]["path"])


def test_files_of_two_builds_of_one_model(folder: Path) -> None:
    (folder / "plan.json").write_text(plan_for(plain(), 8).to_json())
    with pytest.raises(BundleError, match="changed after the build"):
        open_folder(folder)


def test_an_artifact_cannot_lie_elsewhere(folder: Path) -> None:
    record = json.loads((folder / "manifest.json").read_text())
    record["artifacts"][0]["path"] = "../../secret"
    (folder / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(EdgecompError, match="same folder"):
        open_folder(folder)
