"""Estimates from emulated instructions: by hand, on published figures, and with reports that are none."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from edgecomp import cycles
from edgecomp.benchmarks.thumb import CLASSES, REGISTERS
from edgecomp.cli import main
from edgecomp.cycles import TABLES, cycles_of
from edgecomp.errors import TargetError

COUNTS = dict.fromkeys((*CLASSES, REGISTERS), 0) | {
    "load": 100, "store": 10, "multiple": 20, REGISTERS: 80, "multiply": 500, "divide": 1, "branch": 30, "other": 200,
}  # fmt: skip
REPORT = {
    "source": "emulated",
    "target": "cortex-m4",
    "cpu": "Cortex-M4",
    "instructions": 861,
    "steps": {"conv1": 800, "fc": 61},
    "classes": COUNTS,
}


def test_cycles_by_hand() -> None:
    low = 100 + 10 + 20 + 80 + 500 + 2 + 60 + 200
    high = 200 + 20 + 20 + 80 + 500 + 12 + 120 + 200
    assert cycles_of("Cortex-M4", COUNTS) == (low, high)
    assert cycles_of("Cortex-M0+", COUNTS)[0] == 200 + 20 + 20 + 80 + 500 + 1 + 30 + 200
    for cpu in ("Cortex-M7", None):
        with pytest.raises(TargetError, match="no cycles of instructions are published for a"):
            cycles_of(cpu, COUNTS)


def test_tables_cover_every_class() -> None:
    assert cycles.REGISTERS == REGISTERS
    for table in TABLES.values():
        assert table.cycles.keys() == {*CLASSES, REGISTERS}
        assert all(0 < low <= high for low, high in table.cycles.values())


def test_a_report_becomes_an_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m4.json").write_text(json.dumps(REPORT))
    command = ["estimate", str(tmp_path / "m4.json"), "--target", "nucleo-l4r5zi"]
    assert main([*command, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["source"] == "estimated"
    assert value["latency_ms"]["p10"] == pytest.approx(972 / 120e3)
    assert value["latency_ms"]["p90"] == pytest.approx(1152 / 120e3)
    assert value["latency_ms"]["p50"] == pytest.approx((972 + 1152) / 2 / 120e3)
    assert [layer["name"] for layer in value["layers"]] == ["conv1", "fc"]
    assert sum(layer["latency_ms"]["p50"] for layer in value["layers"]) == pytest.approx(value["latency_ms"]["p50"])
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "estimated 0.00885 ms, range 0.0081-0.0096 ms, from 861 emulated instructions" in text
    assert "latency" not in json.dumps(REPORT)


@pytest.mark.parametrize(
    ("change", "target", "code", "found"),
    [
        ({"source": "measured"}, "nucleo-l4r5zi", 2, "is no emulated report"),
        ({"classes": {"load": 1}}, "nucleo-l4r5zi", 2, "classes are load, expected load, store"),
        ({"classes": COUNTS | {"load": -1}}, "nucleo-l4r5zi", 2, "expected whole numbers by name"),
        ({"classes": {}}, "nucleo-l4r5zi", 2, "classes are none, expected load, store"),
        ({"cpu": 4}, "nucleo-l4r5zi", 2, "cpu is missing"),
        ({"instructions": 0}, "nucleo-l4r5zi", 2, "instructions is 0, expected a whole number from 1 to"),
        ({"instructions": None}, "nucleo-l4r5zi", 2, "instructions is null, expected a whole number from 1 to"),
        ({"instructions": 10**400}, "nucleo-l4r5zi", 2, "expected a whole number from 1 to 1_000_000_000_000_000"),
        ({"classes": COUNTS | {"load": 10**400}}, "nucleo-l4r5zi", 2, "expected whole numbers by name, up to"),
        ({"classes": COUNTS | {REGISTERS: 10**400}}, "nucleo-l4r5zi", 2, "expected whole numbers by name, up to"),
        ({"steps": {"fc": 10**400}}, "nucleo-l4r5zi", 2, "expected whole numbers by name, up to"),
        ({"classes": dict.fromkeys(COUNTS, 0)}, "nucleo-l4r5zi", 2, "classes add up to 0, instructions is 861"),
        ({"classes": COUNTS | {"load": 101}}, "nucleo-l4r5zi", 2, "classes add up to 862, instructions is 861"),
        ({"steps": {"conv1": 862}}, "nucleo-l4r5zi", 2, "steps add up to 862, instructions is 861"),
        ({}, "nucleo-u575zi-q", 2, "is of a Cortex-M4, nucleo-u575zi-q has a Cortex-M33"),
        ({}, "disco-f746ng", 6, "no cycles of instructions are published for a Cortex-M7"),
        ({}, "cortex-m4", 6, "clock_hz is not known"),
    ],
)
def test_what_is_no_report_of_that_core(
    change: dict[str, object], target: str, code: int, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.json").write_text(json.dumps(REPORT | change))
    assert main(["estimate", str(tmp_path / "r.json"), "--target", target]) == code
    error = capsys.readouterr().err
    assert found in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--runtime", "c"),
        ("--precision", "fp32"),
        ("--precision", "int8"),
        ("--threads", "2"),
        ("--threads", "1"),
        ("--weights", "w.pt"),
        ("--input-shape", "1,8,8"),
    ],
)
def test_options_that_a_report_has_no_use_for(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.json").write_text(json.dumps(REPORT))
    assert main(["estimate", str(tmp_path / "r.json"), "--target", "nucleo-l4r5zi", option, value]) == 2
    error = capsys.readouterr().err
    assert f"{option} is not for a report of executed instructions" in error
    assert error.count("\n") == 1


def test_inspect_knows_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(REPORT))
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "emulated report"
    assert {key: found[key] for key in REPORT} == REPORT
    assert main(["inspect", str(path)]) == 0
    assert re.search(r"\| conv1 +\| +800 \|", capsys.readouterr().out)
    for change in ({"cpu": 1}, {"instructions": "many"}, {"steps": []}, {"classes": {"load": {}}}, {"x": 1e999}):
        path.write_text(json.dumps(REPORT | change).replace("Infinity", "1e999"))
        assert main(["inspect", str(path)]) == 2
        error = capsys.readouterr().err
        assert "r.json" in error
        assert error.count("\n") == 1


def test_no_report_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, found in (("{", "r.json"), ("[]", "r.json"), ("{}", "is no emulated report")):
        (tmp_path / "r.json").write_text(text)
        assert main(["estimate", str(tmp_path / "r.json"), "--target", "nucleo-l4r5zi"]) == 2
        assert found in capsys.readouterr().err
    assert main(["estimate", str(tmp_path / "none.json"), "--target", "nucleo-l4r5zi"]) == 2
    assert "none.json: cannot be read (No such file or directory); expected" in capsys.readouterr().err


# Instructions of TFLite Micro with CMSIS-NN, in millions, as README has them; cycles an instruction of our own firmware
# for the same networks, fewest and most, from its classes on a Cortex-M4 (8 bits).
NETWORKS = {
    "IC ResNet-8": (29.47, 1.531, 1.727),
    "VWW MobileNetV1": (23.47, 1.393, 1.680),
    "KWS DS-CNN": (7.52, 1.446, 1.728),
}


@pytest.mark.shared
def test_the_errors_that_tables_name(shared: Path) -> None:
    """What the tables say they showed on published figures of the same kernels is what they show."""
    off: dict[str, list[float]] = {"NUCLEO-L4R5ZI": [], "nRF5340 DK": [], "EK-RA6M4": []}
    with (shared / "latency" / "mlperf_tiny.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            device, system = row["device"], row["note"].lower().replace("-", "_")
            same_kernels = "cmsis_nn" in system or row["runtime"] == "tflite-micro"
            network = next((n for n in NETWORKS if row["model"].startswith(f"MLPerfTiny {n}")), None)
            if device in off and same_kernels and network is not None:
                millions, low, high = NETWORKS[network]
                cycles = float(row["latency_ms"]) * float(row["clock_mhz"]) / 1e3
                off[device].append(millions * (low + high) / 2 / cycles - 1)
    assert min(map(len, off.values())) >= 3
    assert max(map(abs, off["NUCLEO-L4R5ZI"])) <= 0.035
    others = [*off["nRF5340 DK"], *off["EK-RA6M4"]]
    assert min(others) > -0.025
    assert max(others) < 0.245
    assert "3 % off at most" in TABLES["Cortex-M4"].error
    assert "2 % below to 24 % above" in TABLES["Cortex-M33"].error
