"""Budgets of a firmware: kept, broken, and which layers broke them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgecomp.cli import main
from tests.tiny import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    with pytest.MonkeyPatch.context() as patch:
        here = Place(tmp_path_factory.mktemp("gate"), patch)
        *start, _ = here.command()
        for bits, name in (("3", "small"), ("8", "large")):
            assert main([*start, name, "--avg-bits", bits, "--format", "c"]) == 0
        assert main([*start, "other", "--avg-bits", "4", "--format", "onnx"]) == 0
        return here


@pytest.fixture(autouse=True)
def there(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)


def entry(folder: str) -> dict[str, Any]:
    (found,) = json.loads(Path(folder, "manifest.json").read_text())["artifacts"]
    return found


def said(argv: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["gate", *argv]) == code
    out, err = capsys.readouterr()
    if code:
        assert (out, err.count("\n")) == ("", 1)
    return out + err


def test_a_budget_is_kept_to_the_byte(capsys: pytest.CaptureFixture[str]) -> None:
    flash, ram = entry("large")["flash_bytes"], entry("large")["arena_bytes"]
    out = said(["large", "--max-flash", str(flash), "--max-ram", str(ram), "--max-drop", "50"], 0, capsys)
    assert f"{flash:,}" in out
    assert f"{ram:,}" in out
    text = said(["large", "--max-flash", str(flash - 1)], 3, capsys)
    assert f"flash is {flash:,} bytes, 1 more than --max-flash {flash - 1:,}; the largest weights: " in text
    text = said(["large", "--max-ram", str(ram - 4)], 3, capsys)
    assert f"RAM is {ram:,} bytes, 4 more than --max-ram {ram - 4:,}" in text


def test_what_has_grown(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(["large", "--max-flash", "1K", "--baseline", "small/manifest.json"], 3, capsys)
    layers = {
        folder: {
            layer["name"]: layer["stored_bytes"]
            for layer in json.loads(Path(folder, "manifest.json").read_text())["layers"]
        }
        for folder in ("small", "large")
    }
    name, n = max(((k, v - layers["small"][k]) for k, v in layers["large"].items()), key=lambda grown: grown[1])
    assert f"grown most: {name} +{n:,}" in text
    text = said(["small", "--max-flash", "100", "--baseline", "large/manifest.json"], 3, capsys)
    assert "no layer's weights have grown" in text
    text = said(["large", "--max-ram", "8", "--baseline", "small/manifest.json"], 3, capsys)
    assert f"the arena was {entry('small')['arena_bytes']:,} bytes, now it is {entry('large')['arena_bytes']:,}" in text


def test_lost_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(Path("large/manifest.json").read_text())
    drop = record["float"]["accuracy"] - entry("large")["accuracy"]["value"]
    assert "points" in said(["large", "--max-drop", f"{drop + 0.01:.4f}"], 0, capsys)
    text = said(["large", "--max-drop", f"{drop - 0.01:.4f}"], 4, capsys)
    assert f"{drop:.2f} points below the float network's; --max-drop allows" in text


def test_with_a_core_the_code_counts_too(capsys: pytest.CaptureFixture[str]) -> None:
    flash = entry("small")["flash_bytes"]
    text = said(["small", "--max-flash", str(flash + 500), "--target", "cortex-m4"], 3, capsys)
    assert "more than --max-flash" in text
    assert "all, on cortex-m4" in said(["small", "--max-flash", "64K", "--target", "cortex-m4"], 0, capsys)


@pytest.mark.parametrize(
    ("argv", "code", "found"),
    [
        (["large"], 2, "expected a budget"),
        (["other", "--max-ram", "1K"], 2, "build it with --format c"),
        (["nowhere", "--max-ram", "1K"], 2, "is no folder"),
        (["large", "--max-ram", "1K", "--baseline", "nowhere.json"], 2, "nowhere.json: cannot be read"),
        (["large", "--max-ram", "1K", "--baseline", "large/plan.json"], 2, "large/plan.json"),
        (["large", "--max-ram", "1K", "--target", "toaster"], 6, "is unknown"),
    ],
)
def test_bad_use(argv: list[str], code: int, found: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert found in said(argv, code, capsys)
