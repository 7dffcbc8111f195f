"""The whole way on a tiny model, through the command line: the first file to read."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from edgecomp import reference
from edgecomp.benching import _note
from edgecomp.cli import main
from edgecomp.compress import compress
from edgecomp.folder import open_folder
from tests.onnx_run import onnx_run
from tests.tiny import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    with pytest.MonkeyPatch.context() as patch:
        here = Place(tmp_path_factory.mktemp("tiny"), patch)
        assert main([*here.command(), "--avg-bits", "4"]) == 0
        return here


def test_the_folder_holds_what_the_manifest_says(place: Place) -> None:
    out = place.folder / "out"
    manifest = json.loads((out / "manifest.json").read_text())
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "graph.edgecomp", "manifest.json", "model.onnx", "model.tflite", "plan.json",
    ]  # fmt: skip
    assert manifest["schema"] == "edgecomp-manifest/2"
    assert (manifest["model"], manifest["test_share"]) == ("tiny", 0.2)
    assert manifest["budget"] == {"kind": "avg_bits", "asked": 4.0, "got": manifest["budget"]["got"], "met": True}
    assert manifest["budget"]["got"] <= 4.0
    for artifact in manifest["artifacts"]:
        data = (out / artifact["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (artifact["bytes"], manifest["files"][artifact["path"]])
        assert artifact["accuracy"]["n"] == 200
        assert artifact["parity"]["max_steps"] <= 1
        assert sum(layer["stored_bytes_by_format"][artifact["format"]] for layer in manifest["layers"]) == (
            artifact["weight_bytes"]
        )
    assert [layer["name"] for layer in manifest["layers"]] == ["conv1", "conv2", "fc"]
    assert sorted(manifest["files"]) == sorted({p.name for p in out.iterdir()} - {"manifest.json"})
    data = np.load(place.folder / "data.npz")
    test = hashlib.sha256(data["x_test"].tobytes() + data["y_test"].astype(np.int64).tobytes()).hexdigest()
    assert manifest["inputs"]["test images"] == test
    assert manifest["inputs"].keys() == {"network", "training images", "test images"}
    n_conv = 8 * 1 * 9 + 8 * 8 * 9
    assert manifest["float"]["conv_weight_bytes"] == 4 * n_conv
    assert manifest["float"]["weight_bytes"] == 4 * (n_conv + 4 * 128)


def test_accuracy_in_the_manifest_is_that_of_the_file(place: Place) -> None:
    """Measured again here with onnxruntime alone, preprocessing written out by hand."""
    manifest = json.loads((place.folder / "out" / "manifest.json").read_text())
    data = np.load(place.folder / "data.npz")
    x = (data["x_test"][:, None] / 255).astype(np.float32)
    (scores,) = onnx_run((place.folder / "out" / "model.onnx").read_bytes(), {"input": x}).values()
    right = 100 * float((scores.argmax(axis=1) == data["y_test"]).mean())
    assert manifest["artifacts"][0]["accuracy"]["value"] == pytest.approx(right)
    assert right > 95


def test_the_same_build_twice_gives_the_same_bytes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    assert main([*place.command()[:-1], "again", "--avg-bits", "4"]) == 0
    for path in (place.folder / "out").iterdir():
        assert (place.folder / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_export_writes_the_same_bytes_from_plan_and_graph(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place.folder / "out"
    argv = ["export", str(out / "plan.json"), "--graph", str(out / "graph.edgecomp"), "--format", "onnx,tflite"]
    assert main([*argv, "-o", str(tmp_path)]) == 0
    for name in ("model.onnx", "model.tflite"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    assert main([*argv, "-o", str(tmp_path)]) == 2
    assert "give --force" in capsys.readouterr().err


def test_verify_passes_and_shows_each_layer(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    assert main(["verify", "out", "--per-layer", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    for file in found["files"]:
        assert file["same_bytes"] is True
        assert {"input.quantized", "fc"} < file["by_layer"].keys() or len(file["by_layer"]) >= 4
        assert max(p["max_steps"] for p in file["by_layer"].values()) <= 2


def test_verify_gives_the_accuracy_of_the_reference(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place.folder)
    assert main(["verify", "out", "--reference", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["reference_percent"]
    built, data = open_folder(place.folder / "out"), np.load("data.npz")
    quantized = compress(built.graph, built.plan)
    x = (data["x_test"][:, None] / 255).astype(np.float32)
    scores = reference.run(quantized, {quantized.inputs[0]: x})[quantized.outputs[0]]
    assert found == pytest.approx(100 * (scores.argmax(axis=1) == data["y_test"]).mean())
    assert main(["verify", "out", "--reference"]) == 0
    assert f"integer reference | {found:.2f} % " in capsys.readouterr().out


def test_verify_refuses_a_changed_file(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    for path in (place.folder / "out").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "model.onnx").write_bytes(data)
    assert main(["verify", str(tmp_path)]) == 2
    assert "changed after the build" in capsys.readouterr().err


def test_bench_measures_beside_float_and_int8(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(place.folder / "out"), "--runtime", "onnxruntime", "--min-secs", "0.05", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert [report["label"] for report in found["reports"]] == ["float32", "plain int8", "compressed"]
    assert found["baseline"] == "plain int8"
    for report in found["reports"]:
        assert report["source"] == "measured"
        assert len(report["samples_us"]) >= 10
        assert report["min_us"] <= report["p50_us"] <= report["p90_us"]


def test_bench_names_what_it_compares_with(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Channels are gone in the float file too: it is called so, the uncut network's accuracy is not given as its."""
    monkeypatch.chdir(place.folder)
    assert main([*place.command()[:-1], "cut", "--prune", "0.5", "--classes", "0,2", "--format", "onnx"]) == 0
    capsys.readouterr()
    assert main(["bench", "cut", "--min-secs", "0.05"]) == 0
    text = capsys.readouterr().out
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    rows = {row[0]: row for row in cells[2:]}
    assert list(rows) == ["float32, cut", "plain int8, cut", "compressed"]
    manifest = json.loads((place.folder / "cut" / "manifest.json").read_text())
    assert [row[3] for row in rows.values()] == ["-", "-", f"{manifest['artifacts'][0]['accuracy']['value']:.2f} %"]
    assert rows["plain int8, cut"][7] == "1.000"
    assert re.fullmatch(r"\d+\.\d{3}", rows["compressed"][7])
    assert f"{manifest['float']['accuracy']:.2f} % accuracy in torch, 4640 bytes of float32" in text
    assert "what is left of it, channels or classes cut" in text
    assert "all of it" in _note(open_folder(place.folder / "out"))


def test_the_page_says_what_was_done(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    options = ["--avg-bits", "3", "--prune", "0.4", "--classes", "0,2=3,3", "--recover", "1", "--format", "onnx"]
    assert main([*place.command()[:-1], "told", *options]) == 0
    manifest = json.loads((place.folder / "told" / "manifest.json").read_text())
    made_by = json.loads((place.folder / "told" / "plan.json").read_text())["made_by"]
    page = (place.folder / "told" / "README.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("- ")]
    assert lines[0] == (
        "- For 3 of 4 classes: 0,2=3,3. Outputs, images, relevance and every figure here are theirs alone."
    )
    n_training = int(200 * 3 / 4)
    n_held_out = n_training // 8
    assert lines[1].startswith("- What matters was told by epsilon 1e-06; classes 0*1,1*3,2*1, on 64 training images.")
    left = sum(layer["weights"] for layer in manifest["layers"])
    channels = sum(layer["kept_channels"] for layer in manifest["layers"])
    assert left < 0.61 * 1160
    assert lines[2] == (
        f"- Cut: outputs of the other classes, and whole channels (--prune 0.4); {channels} of 20 output channels "
        f"are left, {left} of 1160 weights, {100 * left / 1160:.1f} %."
    )
    assert lines[4].startswith("- Recovery, fine-tuning to the uncut float network's answers: 1 epochs of ")
    assert made_by["recovery"] in lines[4]
    assert f"{n_training - n_held_out} images" in lines[4]
    assert f"{n_held_out} images held out" in lines[4]
    plain = (place.folder / "out" / "README.md").read_text()
    assert "classes" not in plain
    assert "--prune" not in plain
    assert "Recovery" not in plain


def test_int8_input_and_output(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    assert main([*place.command()[:-1], "int8", "--io", "int8", "--format", "onnx"]) == 0
    session = onnxruntime.InferenceSession(str(place.folder / "int8" / "model.onnx"))
    assert session.get_inputs()[0].type == "tensor(int8)"
    assert session.get_outputs()[0].type == "tensor(int8)"
    manifest = json.loads((place.folder / "int8" / "manifest.json").read_text())
    assert manifest["artifacts"][0]["accuracy"]["value"] > 95


def test_packed_tflite(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer bits on disk, int8 when it runs; every command takes the file as it is."""
    monkeypatch.chdir(place.folder)
    packed = ["--format", "tflite", "--weights-at-rest", "packed"]
    assert main([*place.command()[:-1], "packed", *packed, "--avg-bits", "5"]) == 0
    manifest = json.loads(Path("packed/manifest.json").read_text())
    (artifact,) = manifest["artifacts"]
    assert artifact["weights_at_rest"] == "packed"
    assert artifact["mean_bits"] <= 5
    assert artifact["accuracy"]["value"] > 95
    assert "edgecomp unpack DIR/model.tflite" in Path("packed/README.md").read_text("utf-8")
    again = ["export", "packed/plan.json", "--graph", "packed/graph.edgecomp", "-o"]
    assert main([*again, "same", *packed]) == 0
    assert Path("same/model.tflite").read_bytes() == Path("packed/model.tflite").read_bytes()
    assert main([*again, "int8", "--format", "tflite", "--weights-at-rest", "int8"]) == 0
    assert main(["unpack", "packed/model.tflite", "-o", "full.tflite"]) == 0
    assert len(Path("full.tflite").read_bytes()) >= len(Path("int8/model.tflite").read_bytes()) > artifact["bytes"]
    assert main(["verify", "packed", "--per-layer"]) == 0
    capsys.readouterr()
    assert main(["bench", "packed", "--min-secs", "0.05"]) == 0
    assert "\ncompressed: unpacked to int8 when it is loaded; load and memory include that\n" in capsys.readouterr().out
    assert main([*again, "onnx", "--format", "onnx,tflite", "--weights-at-rest", "int8"]) == 0
    assert Path("onnx/model.tflite").read_bytes() == Path("int8/model.tflite").read_bytes()
    stored = onnx.load(Path("onnx/model.onnx")).graph.initializer
    assert sum(t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1 for t in stored) == len(manifest["layers"])
    for command in ([*place.command()[:-1], "x"], [*again, "x"]):
        assert main([*command, "--format", "onnx", "--weights-at-rest", "packed"]) == 2
        assert "--weights-at-rest packed is of TFLite files; add tflite to --format" in capsys.readouterr().err


def test_max_size_is_kept_by_every_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    default = json.loads((place.folder / "out" / "manifest.json").read_text())
    limit = max(artifact["bytes"] for artifact in default["artifacts"]) + 100
    assert main([*place.command()[:-1], "sized", "--max-size", str(limit)]) == 0
    manifest = json.loads((place.folder / "sized" / "manifest.json").read_text())
    sizes = [path.stat().st_size for path in (place.folder / "sized").glob("model.*")]
    assert max(sizes) == manifest["budget"]["got"] <= limit


def test_max_drop_spends_less_than_eight_bits(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    assert main([*place.command()[:-1], "dropped", "--max-drop", "3", "--format", "onnx"]) == 0
    manifest = json.loads((place.folder / "dropped" / "manifest.json").read_text())
    assert manifest["budget"]["met"]
    assert manifest["budget"]["got"] <= 3
    assert manifest["artifacts"][0]["mean_bits"] < 8


def test_one_image_a_class_halved_and_cropped(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """No class is in both halves; the manifest holds what `verify` needs to make the same halves again."""
    monkeypatch.chdir(place.folder)
    rng = np.random.default_rng(5)
    for i in range(4):
        (place.folder / "few" / f"class{i}").mkdir(parents=True)
        pixels = rng.integers(0, 256, (12, 12), dtype=np.uint8)
        Image.fromarray(pixels).save(place.folder / "few" / f"class{i}" / "only.png")
    model = ["tinymodels:tiny", "--weights", "tiny.pt", "--data", "folder:few", "--crop", "8", "--test-share", "0.5"]
    assert main(["build", *model, "--format", "onnx", "-o", "halved"]) == 0
    manifest = json.loads((place.folder / "halved" / "manifest.json").read_text())
    assert manifest["test_share"] == 0.5
    assert manifest["preprocessing"]["crop"] == 8
    assert manifest["artifacts"][0]["accuracy"]["n"] == 2
    assert json.loads((place.folder / "halved" / "plan.json").read_text())["made_by"]["samples"] == "2"
    assert main(["verify", "halved"]) == 0


def test_inspect_names_the_layers(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(place.folder / "out" / "model.onnx"), "--execution"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("conv1", "conv2", "fc"))
    assert "all in integers between input and output" in text


def test_the_rule_of_relevance_stands_in_the_plan(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    command = [*place.command()[:-1], "ruled", "--rule", "epsilon-plus-flat", "--start", "softmax", "--format", "onnx"]
    assert main(command) == 0
    plan = json.loads((place.folder / "ruled" / "plan.json").read_text())
    assert plan["made_by"]["relevance"] == "epsilon-plus-flat, epsilon 1e-06; start softmax"
    other = json.loads((place.folder / "out" / "plan.json").read_text())
    assert other["made_by"]["relevance"] == "epsilon 1e-06"
