"""Manifests: the figures in them, counted by hand, and what their reader refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from edgecomp import manifest
from edgecomp.compress import compress
from edgecomp.errors import BundleError
from edgecomp.exporters import export
from edgecomp.manifest import KEYS, read_manifest
from edgecomp.overview import overview, results_table
from edgecomp.strictjson import write_json
from tests.built import MEASURED, flat_relevance, record_of
from tests.graphs import plain, plan_for, residual

# plain(): conv1 8x3x3x3, conv2 12x8x3x3, fc1 20x48, fc2 10x20
COUNTS = {"conv1": 216, "conv2": 864, "fc1": 960, "fc2": 200}
BITS = {"conv1": 8, "conv2": 3, "fc1": 4, "fc2": 8}
DROP = {"conv1": (0, 7), "fc1": (19,)}


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    graph = plain()
    return record_of(graph, plan_for(graph, BITS, drop=DROP))


def text_of(record: dict[str, Any]) -> str:
    return write_json(record)


def test_round_trip(record: dict[str, Any]) -> None:
    text = text_of(record)
    again = read_manifest(text, "m")
    assert tuple(again) == KEYS
    assert again == json.loads(json.dumps(record))
    assert write_json(again) == text


def test_float_bytes_are_those_of_the_weights_as_float32() -> None:
    graph = plain()
    assert manifest.weight_counts(graph) == COUNTS
    assert manifest.float_entry(graph, 90.25, 64) == {
        "accuracy": 90.25,
        "n": 64,
        "conv_weight_bytes": 4 * (216 + 864),
        "weight_bytes": 4 * (216 + 864 + 960 + 200),
    }


def test_artifacts_count_what_is_stored(record: dict[str, Any]) -> None:
    onnx, tflite = record["artifacts"]
    left = {"conv1": 6 * 27, "conv2": 12 * 6 * 9, "fc1": 19 * 48, "fc2": 10 * 19}
    onnx_bytes = {name: -(-n * BITS[name] // 8) for name, n in left.items()}
    tflite_bytes = {name: n if BITS[name] > 4 else -(-n // 2) for name, n in left.items()}
    for entry, stored in ((onnx, onnx_bytes), (tflite, tflite_bytes)):
        assert entry["weight_bytes"] == sum(stored.values())
        assert entry["conv_weight_bytes"] == stored["conv1"] + stored["conv2"]
        assert entry["mean_bits"] == round(8 * sum(stored.values()) / sum(left.values()), 4)
        assert entry["path"] == f"model.{entry['format']}"
        assert entry["accuracy"] == MEASURED["accuracy"]
    assert [entry["format"] for entry in (onnx, tflite)] == ["onnx", "tflite"]
    assert "stray_transposes" not in onnx
    assert tflite["stray_transposes"] == 0
    graph = plain()
    file = export(compress(graph, plan_for(graph, BITS, drop=DROP)), "onnx")
    assert onnx["bytes"] == len(file.data)


def test_layers_say_what_became_of_each(record: dict[str, Any]) -> None:
    by_name = {layer["name"]: layer for layer in record["layers"]}
    assert list(by_name) == list(COUNTS)
    assert [layer["kind"] for layer in by_name.values()] == ["conv2d", "conv2d", "linear", "linear"]
    conv1, fc2 = by_name["conv1"], by_name["fc2"]
    assert (conv1["kept_channels"], conv1["channels_before"], conv1["can_cut"]) == (6, 8, True)
    assert (fc2["kept_channels"], fc2["channels_before"], fc2["can_cut"]) == (10, 10, False)
    assert (conv1["weights"], conv1["weights_before"]) == (6 * 27, 216)
    assert {name: layer["bits"] for name, layer in by_name.items()} == BITS
    assert by_name["conv2"]["stored_bytes_by_format"] == {"onnx": 243, "tflite": 324}
    assert by_name["conv2"]["stored_bytes"] == 243
    # Every channel of relevance 1: shares go by the number of channels of the whole network.
    assert by_name["conv1"]["relevance"] == pytest.approx(100 * 8 / (8 + 12 + 20 + 10), abs=1e-4)
    assert sum(layer["relevance"] for layer in by_name.values()) == pytest.approx(100, abs=1e-3)
    graph = plain()
    codes = compress(graph, plan_for(graph, BITS, drop=DROP)).tensors["conv2.weight"].data
    assert codes is not None
    assert by_name["conv2"]["zero_percent"] == pytest.approx(100 * (codes == 0).mean(), abs=1e-3)
    assert by_name["conv2"]["zero_percent"] > 1


def test_layers_without_any_relevance_have_a_share_of_nothing() -> None:
    graph = residual()
    plan = plan_for(graph, 4)
    quantized = compress(graph, plan)
    silent = flat_relevance(graph)
    for layer in silent.layers.values():
        layer.channel_abs.flags.writeable = True
        layer.channel_abs[:] = 0
    entries = manifest.layer_entries(graph, quantized, plan, silent, [export(quantized, "onnx")])
    assert [entry["relevance"] for entry in entries] == [0.0] * len(entries)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer version": (lambda r: r.update(schema="edgecomp-manifest/3"), "edgecomp-manifest/3.*reads"),
    "no schema": (lambda r: r.pop("schema"), "schema is None"),
    "unknown key": (lambda r: r.update(extra=1), "unknown key 'extra'"),
    **{f"without {key}": (lambda r, key=key: r.pop(key), f"'{key}' is missing") for key in KEYS[1:]},  # type: ignore[misc]
    "no artifacts": (lambda r: r.update(artifacts=[]), "at least one"),
    "artifacts by name": (lambda r: r.update(artifacts={"onnx": {}}), "list of at least one"),
    "float without its bytes": (lambda r: r["float"].pop("weight_bytes"), "float: 'weight_bytes' is missing"),
    "an artifact that is a string": (lambda r: r.update(artifacts=["model.onnx"]), "artifact 0: expected an object"),
    **{
        f"artifact without {key}": (lambda r, key=key: r["artifacts"][1].pop(key), f"artifact 1: '{key}' is missing")  # type: ignore[misc]
        for key in ("format", "path", "bytes", "accuracy")
    },
    "files without the plan": (lambda r: r["files"].pop("plan.json"), "files: 'plan.json' is missing"),
    "files without an artifact": (lambda r: r["files"].pop("model.onnx"), "files: 'model.onnx' is missing"),
    "a digest that is none": (lambda r: r["files"].update({"plan.json": "AB" * 32}), "expected 64 hexadecimal digits"),
    "a tool without its digest": (lambda r: r["tools"]["numpy"].pop("sha256"), "'numpy' is .*a version and a sha256"),
    "a tool's version alone": (lambda r: r["tools"].update(numpy="2.4"), "expected a version and a sha256"),
    "bytes as text": (lambda r: r["artifacts"][0].update(bytes="12"), "not of type int"),
    "a path above": (lambda r: r["artifacts"][0].update(path="../model.onnx"), "same folder"),
    "an absolute path": (lambda r: r["artifacts"][0].update(path="/etc/passwd"), "same folder"),
    "a path with a zero byte": (lambda r: r["artifacts"][0].update(path="model.onnx\0"), "same folder"),
    "another file's path": (lambda r: r["artifacts"][0].update(path="plan.json"), "same folder"),
    "a path smuggled in by the format": (
        lambda r: r["artifacts"][0].update(format="x/../../y", path="model.x/../../y"),
        "format 'x/../../y': expected one of onnx, tflite, tflm",
    ),
    "accuracy without value": (lambda r: r["artifacts"][0]["accuracy"].pop("value"), "'value' is missing"),
    "accuracy as text": (lambda r: r["artifacts"][0]["accuracy"].update(value="90"), "'value' is missing"),
    "accuracy of a truth value": (lambda r: r["artifacts"][0]["accuracy"].update(value=True), "'value' is missing"),
    "accuracy without runtime": (lambda r: r["artifacts"][0]["accuracy"].pop("runtime"), "'runtime' is missing"),
    "an empty runtime": (lambda r: r["artifacts"][0]["accuracy"].update(runtime=" "), "'runtime' is missing"),
    "float without accuracy": (lambda r: r["float"].pop("accuracy"), "'accuracy' is missing"),
    "float as a number": (lambda r: r.update(float=1), "'float' is 1, expected dict"),
    "data as a list": (lambda r: r.update(data=["sample"]), "expected str"),
    "seed as text": (lambda r: r.update(seed="0"), "expected int"),
    "seed as truth": (lambda r: r.update(seed=True), "expected int"),
    "share as text": (lambda r: r.update(test_share="0.2"), "'test_share' is '0.2', expected a number between 0 and 1"),
    "share of nothing": (lambda r: r.update(test_share=0), "'test_share' is 0, expected"),
    "share of all": (lambda r: r.update(test_share=1.0), "'test_share' is 1.0, expected"),
    "tools as a list": (lambda r: r.update(tools=[]), "expected dict"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(case: str, record: dict[str, Any]) -> None:
    edit, reason = HOSTILE[case]
    copy = json.loads(json.dumps(record))
    edit(copy)
    with pytest.raises(BundleError, match=f"^some/manifest.json: .*{reason}"):
        read_manifest(json.dumps(copy), "some/manifest.json")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("[]", "expected an object"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"a": NaN}', "NaN"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_json_of_ours(text: str, reason: str) -> None:
    with pytest.raises(BundleError, match=reason):
        read_manifest(text, "m")


def test_the_page_for_people_says_what_the_manifest_says(record: dict[str, Any]) -> None:
    page = overview(record, {})
    assert results_table(record) in page
    onnx, tflite = record["artifacts"]
    for entry in (onnx, tflite):
        row = next(line for line in results_table(record).splitlines() if entry["path"] in line)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1] == str(entry["bytes"])
        assert cells[2] == f"{record['float']['weight_bytes'] / entry['bytes']:.1f}x"
        assert cells[4:6] == ["87.50 %", "-2.50"]
        assert cells[6] == "99.50 % (max 1)"
    assert "mean bits a weight, at most 4, came to 4." in page
    assert "(not met)" in overview({**record, "budget": {**record["budget"], "met": False}}, {})
    assert "model.tflite" not in overview({**record, "artifacts": [onnx]}, {})
