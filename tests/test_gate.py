"""Budgets of a firmware: kept, broken, and which layers broke them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgecomp.cli import main
from edgecomp.exporters.c_facts import read_facts
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
    assert f"RAM is {ram:,} bytes, 4 more than --max-ram {ram - 4:,}; the arena is {ram:,}, most is needed in " in text


def test_what_has_grown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    now = entry("large")["arena_bytes"]
    record = json.loads(Path("large/manifest.json").read_text())
    for artifact in record["artifacts"]:
        artifact["arena_bytes"] = now - 8
    (tmp_path / "before.json").write_text(json.dumps(record))
    text = said(["large", "--max-ram", "8", "--baseline", str(tmp_path / "before.json")], 3, capsys)
    assert f"the arena was {now - 8:,} bytes, now it is {now:,}" in text


def test_lost_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(Path("large/manifest.json").read_text())
    drop = record["float"]["accuracy"] - entry("large")["accuracy"]["value"]
    assert "points" in said(["large", "--max-drop", f"{drop + 0.01:.4f}"], 0, capsys)
    for sign in ("", "%", " %"):  # points, whatever the sign: 0.5% of accuracy is half a point
        text = said(["large", f"--max-drop={drop - 0.01:.4f}{sign}"], 4, capsys)
        assert f"{drop:.2f} points below the float network's; --max-drop allows {drop - 0.01:g}" in text
    assert "points" in said(["large", "--max-drop", f"{drop + 0.01:.4f}%"], 0, capsys)


def test_with_a_core_the_code_counts_too(capsys: pytest.CaptureFixture[str]) -> None:
    flash = entry("small")["flash_bytes"]
    text = said(["small", "--max-flash", str(flash + 500), "--target", "cortex-m4"], 3, capsys)
    parts = re.fullmatch(
        r"edgecomp: small: flash is (.*) bytes, .* more than --max-flash .* = "
        r"code (.*) \+ weights (.*) \+ other constants (.*); the largest weights: .*\n",
        text,
    )
    assert parts is not None, text
    whole, *shares = (int(n.replace(",", "")) for n in parts.groups())
    assert whole == sum(shares)
    assert shares[1] + shares[2] >= flash
    assert "all, on cortex-m4" in said(["small", "--max-flash", "64K", "--target", "cortex-m4"], 0, capsys)


# ---- what export wrote -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(place: Place) -> Path:
    """The large network's C, and nothing beside it."""
    source, folder = place.folder / "large", place.folder / "alone"
    argv = ["export", str(source / "plan.json"), "--graph", str(source / "graph.edgecomp"), "--format", "c"]
    assert main([*argv, "-o", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("more", [[], ["--target", "cortex-m4"]])
@pytest.mark.parametrize("budget", [["--max-flash", "300"], ["--max-ram", "100"], ["--max-flash", "64K"]])
def test_an_exported_folder_is_judged_as_the_built_one(
    alone: Path, budget: list[str], more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = 0 if budget[1] == "64K" else 3
    built, exported = (said([name, *budget, *more], code, capsys) for name in ("large", str(alone)))
    if code == 0:
        (drop,) = (line for line in built.splitlines() if "points of accuracy" in line)
        built, exported = built.replace(drop, ""), "\n".join(
            "" if "points of accuracy" in line else line for line in exported.split("\n")
        )
    assert exported.replace(str(alone), "large") == built


def test_accuracy_of_an_exported_folder(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said([str(alone), "--max-drop", "50"], 2, capsys)
    assert "alone: --max-drop: nothing here says how accurate the network is; name the manifest.json" in text
    record = json.loads(Path("large/manifest.json").read_text())
    drop = record["float"]["accuracy"] - entry("large")["accuracy"]["value"]
    known = [str(alone), "--manifest", "large/manifest.json", "--max-drop"]
    assert f"{drop:.2f}" in said([*known, f"{drop + 0.01:.4f}"], 0, capsys)
    text = said([*known, f"{drop - 0.01:.4f}"], 4, capsys)
    assert f"{drop:.2f} points below the float network's; --max-drop allows" in text
    text = said([str(alone), "--manifest", "small/manifest.json", "--max-drop", "50"], 2, capsys)
    assert "small/manifest.json: is about another network (digest " in text
    text = said([str(alone), "--manifest", "other/manifest.json", "--max-drop", "50"], 2, capsys)
    assert "other/manifest.json: knows no network in C" in text
    text = said(["large", "--manifest", "large/manifest.json", "--max-drop", "50"], 2, capsys)
    assert "a built one has its own" in text


def test_a_source_is_a_baseline_as_well(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for budget in (["--max-flash", "100"], ["--max-ram", "8"]):
        by_manifest = said([str(alone), *budget, "--baseline", "small/manifest.json"], 3, capsys)
        assert said([str(alone), *budget, "--baseline", "small/network.c"], 3, capsys) == by_manifest
        assert " +" in by_manifest or "; the arena is 1,792 bytes, as before" in by_manifest


def test_the_layer_where_most_memory_is_needed(alone: Path) -> None:
    """conv2 adds to its own input what it makes: beside these two, nothing as large ever lies in the arena at once."""
    facts = read_facts((alone / "network.c").read_bytes(), "network.c")
    assert facts.peak_step.startswith("conv2")


def test_a_report_is_written_when_all_is_kept(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "gate.txt"
    assert said([str(alone), "--max-flash", "100", "--report", str(report)], 3, capsys)
    assert not report.exists()
    table = said([str(alone), "--max-flash", "64K"], 0, capsys)
    assert said([str(alone), "--max-flash", "64K", "--report", str(report)], 0, capsys) == ""
    assert report.read_text() == table


def test_a_damaged_source(alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "network.c").write_bytes((alone / "network.c").read_bytes()[40:])
    text = said([str(tmp_path), "--max-flash", "1K"], 2, capsys)
    assert "network.c: is no network in C by edgecomp, or damaged" in text


@pytest.mark.parametrize("name", ["network.c", "network.h", "edgecomp_kernels.c", "edgecomp_kernels.h"])
def test_files_that_do_not_belong_together(
    name: str, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(alone, tmp_path / "copy"))
    assert said([str(folder), "--max-flash", "64K"], 0, capsys)
    whole = (folder / name).read_bytes()
    for changed in (whole[:-3], whole.replace(b"int", b"Int", 1), whole.replace(b"\n", b"\r\n")):
        (folder / name).write_bytes(changed)
        assert said([str(folder), "--max-flash", "64K"], 2, capsys)
    (folder / name).unlink()
    assert said([str(folder), "--max-flash", "64K"], 2, capsys)


def test_two_weights_that_change_places(alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(alone, tmp_path / "copy"))
    text = (folder / "network.c").read_text()
    (folder / "network.c").write_text(re.sub(r"\n  (\d+), (\d+),", r"\n  \2, \1,", text, count=1))
    assert "are not what edgecomp wrote together" in said([str(folder), "--max-flash", "64K"], 2, capsys)


def test_a_report_replaces_nothing_but_a_report(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(alone, tmp_path / "copy"))
    before = (folder / "network.c").read_bytes()
    argv = [str(folder), "--max-flash", "64K", "--report"]
    assert "replaces only an earlier table" in said([*argv, str(folder / "network.c")], 2, capsys)
    assert (folder / "network.c").read_bytes() == before
    for _ in range(2):
        assert said([*argv, str(tmp_path / "gate.txt")], 0, capsys) == ""


def test_all_that_is_broken_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(["large", "--max-flash", "10", "--max-ram", "10", "--max-drop", "0"], 3, capsys)
    for part in ("--max-flash 10", "--max-ram 10", "the largest weights", "most is needed in"):
        assert part in text
    text = said(["large", "--max-ram", "8", "--baseline", "large/manifest.json"], 3, capsys)
    assert "bytes, as before" in text


# ---- bad use ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code", "found"),
    [
        (["large"], 2, "expected a budget"),
        (["other", "--max-ram", "1K"], 2, "build it with --format c"),
        (["nowhere", "--max-ram", "1K"], 2, "is no folder"),
        (["large", "--max-ram", "1K", "--baseline", "nowhere.json"], 2, "nowhere.json: cannot be read"),
        (["large", "--max-ram", "1K", "--baseline", "large/plan.json"], 2, "large/plan.json"),
        (["large", "--max-ram", "1K", "--target", "toaster"], 2, "target 'toaster' is unknown; see edgecomp targets"),
        (["large", "--max-ram", "1K", "--baseline", "other/manifest.json"], 2, "knows no network in C to compare"),
        (["large", "--max-ram=-1"], 2, "--max-ram -1: expected 0 or more"),
        (["large", "--max-ram", "1", "--report", "no/r.md"], 2, "--report no/r.md: cannot be written there"),
    ],
)
def test_bad_use(argv: list[str], code: int, found: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert found in said(argv, code, capsys)
