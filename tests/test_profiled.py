"""A measured profile takes the place of an estimate for what was measured, and corrects the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgecomp.benchmarks.bench import bench
from edgecomp.cli import main
from edgecomp.compress import compress, cut
from edgecomp.errors import UsageError
from edgecomp.estimating import latency_limit
from edgecomp.exporters import export
from edgecomp.graph import Graph
from edgecomp.latency import Case, LayerSource, estimate
from edgecomp.processor import processor_of
from edgecomp.profiled import Profile, profile_of
from edgecomp.report import BenchReport, Comparison, Source, summarise
from edgecomp.targets import load
from edgecomp.work import Kind, Work, work_of
from tests.graphs import plan_for, residual, separable

RPI4 = processor_of(load("rpi4"))
OFF = {
    Kind.FIRST: 1.9, Kind.DENSE3X3: 2.5, Kind.DENSE: 0.8, Kind.POINTWISE: 3.0, Kind.DEPTHWISE: 0.4, Kind.LINEAR: 1.3,
    Kind.OTHER: 6.0,
}  # fmt: skip
"""How much longer than its estimate each kind of layer takes on a device that is made up here."""


def case(work: tuple[Work, ...]) -> Case:
    return Case(work=work, processor=RPI4, runtime="onnxruntime", precision="int8", threads=1)


def usual_us(work: tuple[Work, ...]) -> dict[str, float]:
    return {layer.name: 1e3 * layer.latency_ms.p50 for layer in estimate(case(work)).layers}


def device_us(work: tuple[Work, ...]) -> dict[str, float]:
    usual = usual_us(work)
    return {w.name: OFF[w.kind] * usual[w.name] for w in work}


def report_of(times_us: Mapping[str, float], p50_us: float, **others: object) -> BenchReport:
    samples = tuple(p50_us * f for f in (0.9, 0.95, 1.0, 1.1, 1.3))
    p50, p90, p99, least = summarise(samples)
    values = {
        "label": "net", "artifact": "net.onnx", "artifact_bytes": 1, "sha256": "0" * 64, "format": "onnx",
        "target": "rpi4", "runtime": "onnxruntime", "runtime_version": "1", "threads": 1, "source": Source.MEASURED,
        "warmups": 1, "steady": True, "rounds": 5, "samples_us": samples, "p50_us": p50, "p90_us": p90, "p99_us": p99,
        "min_us": least, "load_ms": 1.0, "layers_us": times_us,
    }  # fmt: skip
    return BenchReport(**{**values, **others})  # type: ignore[arg-type]


def profile(work: tuple[Work, ...], times_us: Mapping[str, float], p50_us: float) -> Profile:
    named = {f"{name}_token_{i} QLinearConv": us for i, (name, us) in enumerate(times_us.items())}
    return profile_of(report_of(named, p50_us), work, "report.json")


def test_the_measured_file_takes_what_was_measured() -> None:
    work = work_of(residual())
    times = {w.name: 10.0 + i for i, w in enumerate(work)}
    found = profile(work, times, 500.0).estimate(case(work))
    assert {layer.source for layer in found.layers} == {LayerSource.MEASURED}
    assert found.latency_ms.p50 == pytest.approx(0.5)
    samples = 0.5 * np.array([0.9, 0.95, 1.0, 1.1, 1.3])
    assert (found.latency_ms.p10, found.latency_ms.p90) == pytest.approx(tuple(np.percentile(samples, (10, 90))))
    shares = [layer.latency_ms.p50 / found.latency_ms.p50 for layer in found.layers]
    assert shares == pytest.approx([us / sum(times.values()) for us in times.values()])
    assert found.basis[1].startswith("9 of 9 layers, 100 % of the time, measured there")


@pytest.mark.parametrize("timed", [1.0, 0.6])
def test_a_cut_network_on_a_device_that_is_made_up(timed: float) -> None:
    """Kinds of layers are off by known factors: what was not measured, or is cut, comes out by them."""
    graph = separable()
    keep = {n.name: (True,) * graph.weight(n).shape[0] for n in graph.layers()}
    some = tuple(i % 4 != 1 for i in range(16))
    work, less = work_of(graph), work_of(cut(graph, {**keep, "expand": some, "dw": some}))
    all_us = device_us(work)
    left_out = [] if timed == 1.0 else ["add", "project"]
    times = {name: us for name, us in all_us.items() if name not in left_out}
    found = profile(work, times, sum(all_us.values())).estimate(case(less))
    expected = device_us(less)
    assert {x.name: 1e3 * x.latency_ms.p50 for x in found.layers} == pytest.approx(expected)
    assert found.latency_ms.p50 == pytest.approx(sum(expected.values()) / 1e3)
    sources = {x.name: x.source.value for x in found.layers}
    assert (sources["stem"], sources["dw"], sources["expand"]) == ("measured", "scaled", "scaled")
    assert sources["add"] == ("measured" if timed == 1.0 else "estimated")
    widths = {x.name: x.latency_ms.p90 / x.latency_ms.p10 for x in found.layers}
    assert widths["stem"] < widths["dw"]


def test_times_of_no_layer_are_spread_over_all() -> None:
    work = work_of(residual())
    times = {f"{w.name} QLinearConv": 10.0 for w in work}
    found = profile_of(report_of({**times, "Transpose_token_3 Transpose": 30.0}, 130.0), work, "r")
    assert found.rest_us == 30.0
    assert [x.latency_ms.p50 for x in found.estimate(case(work)).layers] == pytest.approx([0.130 / 9] * 9)
    assert "operators of no layer, 25 % of its time" in found.estimate(case(work)).basis[0]


def test_a_limit_is_kept_by_the_profile(tmp_path: Path) -> None:
    """The graph that is cut has the names and the work of the file that was measured."""
    graph = residual()
    file, report = measured(tmp_path, graph)
    p50_us = json.loads(report.read_text())[0]["reports"][0]["p50_us"]
    limit = latency_limit(1.0, load("rpi4"), None, ("tflite",), 1, (report, file))
    assert (limit.runtime, limit.ms(graph).p50) == ("onnxruntime", pytest.approx(p50_us / 1e3))
    assert limit.text().endswith("on rpi4, onnxruntime, 1 thread, by a measured profile")


def measured(folder: Path, graph: Graph) -> tuple[Path, Path]:
    """Write a file, and what onnxruntime's own profiler says of it here, as if it were a board."""
    file, report = folder / "net.onnx", folder / "report.json"
    file.write_bytes(export(compress(graph, plan_for(graph, 4)), "onnx").data)
    found = bench([("net", file, "onnx")], min_s=0.05, rounds=2, profile=True)
    moved = tuple(replace(r, target="rpi4", not_valid=()) for r in found.reports)
    comparison = Comparison(reports=moved, baseline=found.baseline, ratios=found.ratios)
    report.write_text(f"[{comparison.to_json()}]")
    return file, report


def test_what_onnxruntime_times_is_found_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, report = measured(tmp_path, separable())
    command = ["estimate", str(file), "--target", "rpi4", "--profile", str(report), str(file)]
    assert main([*command, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["source"], value["runtime"]) == ("estimated", "onnxruntime")
    assert [layer["source"] for layer in value["layers"]] == ["measured"] * 9
    assert value["latency_ms"]["p50"] == pytest.approx(json.loads(report.read_text())[0]["reports"][0]["p50_us"] / 1e3)
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "estimated" in lines[0]
    assert sum(line.endswith("| measured |") for line in lines) == 9


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["--threads", "2"], "was measured with threads 1, asked for is 2"),
        (["--runtime", "litert"], "was measured with runtime onnxruntime, asked for is litert"),
        (["--precision", "fp32"], "was measured in int8, asked for is fp32"),
        (["--target", "rpi5"], "was measured with target rpi4, asked for is rpi5"),
        (["--profile", "report.json", "other.onnx"], "has no report of other.onnx"),
        (["--profile", "report.json", "report.json"], "expected an .onnx or .tflite that edgecomp wrote"),
        (["--profile", "none.json", "net.onnx"], "none.json: cannot be read: No such file"),
    ],
)
def test_what_was_not_measured_is_refused(
    argv: list[str], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    measured(tmp_path, residual())
    other = residual(1)
    Path("other.onnx").write_bytes(export(compress(other, plan_for(other, 4)), "onnx").data)
    command = ["estimate", "net.onnx", "--target", "rpi4", "--profile", "report.json", "net.onnx", *argv]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert found in error
    assert error.count("\n") == 1


def test_reports_that_are_no_profile() -> None:
    work = work_of(residual())
    good = report_of({"stem QLinearConv": 5.0}, 10.0)
    assert profile_of(good, work, "r").times_us == {"stem": 5.0}
    for changes, found in (
        ({"not_valid": ("throttled",)}, "r: is not valid: throttled; measure again"),
        ({"layers_us": {}}, "r: has no times of operators"),
        ({"layers_us": {"another Conv": 5.0}}, "r: times no layer of the file"),
    ):
        with pytest.raises(UsageError, match=found):
            profile_of(replace(good, **changes), work, "r")  # type: ignore[arg-type]
