"""build --max-latency: what comes out is estimated to be fast enough, and what cannot be is refused."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest

from edgecomp.arguments import read_milliseconds
from edgecomp.benchmarks.bench import bench
from edgecomp.cli import main
from tests.tiny import Place

BOARD = ["--target", "nucleo-l4r5zi"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        yield Place(tmp_path_factory.mktemp("place"), patch)


def estimated_ms(what: str, capsys: pytest.CaptureFixture[str], *more: str) -> float:
    assert main(["estimate", what, *BOARD, "--runtime", "tflite-micro", "--json", *more]) == 0
    return float(json.loads(capsys.readouterr().out)["latency_ms"]["p50"])


def test_channels_are_cut_until_it_is_fast_enough(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place.folder)
    command = [*place.command()[:-1], "fast", "--no-reconstruct", "--avg-bits", "8"]
    whole = estimated_ms("tinymodels:tiny", capsys, "--input-shape", "1,8,8")
    assert main([*command, *BOARD, "--max-latency", f"{0.8 * whole}ms"]) == 0
    said = capsys.readouterr().out
    took = estimated_ms("fast", capsys)
    assert took <= 0.8 * whole
    assert f"\nlatency: {took:.3g} ms, range " in said
    assert f"; asked for: at most {0.8 * whole:g} ms estimated on nucleo-l4r5zi, tflite-micro, 1 thread\n" in said
    assert "Cut: whole channels, for a latency of at most " in (place.folder / "fast" / "README.md").read_text()
    made_by = (place.folder / "fast" / "plan.json").read_text()
    assert "ms estimated on nucleo-l4r5zi, tflite-micro, 1 thread" in made_by
    # What is fast enough as it is loses no channel but those without relevance.
    assert main([*command, "--force", *BOARD, "--max-latency", "1s"]) == 0
    capsys.readouterr()
    assert estimated_ms("fast", capsys) > 0.8 * whole


def test_channels_are_cut_by_a_measured_profile(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What onnxruntime took here, as if a board had: far from what the board is estimated to take."""
    monkeypatch.chdir(place.folder)
    command = [*place.command()[:-1]]
    options = ["--no-reconstruct", "--avg-bits", "8", "--force"]
    assert main([*command, "whole", *options]) == 0
    found = bench([("whole", place.folder / "whole" / "model.onnx", "onnx")], min_s=0.05, rounds=2, profile=True)
    there = replace(found, reports=tuple(replace(r, target="rpi4", not_valid=()) for r in found.reports))
    (place.folder / "report.json").write_text(f"[{there.to_json()}]")
    whole_ms = (found.reports[0].p50_us or 0) / 1e3
    profile = ["--target", "rpi4", "--profile", "report.json", "whole/model.onnx"]
    assert main([*command, "fast", *options, *profile, "--max-latency", f"{0.95 * whole_ms}ms"]) == 0
    capsys.readouterr()
    assert main(["estimate", "fast/model.onnx", *profile, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["latency_ms"]["p50"] <= 0.95 * whole_ms
    assert "scaled" in [layer["source"] for layer in value["layers"]]
    assert "onnxruntime, 1 thread, by a measured profile" in (place.folder / "fast" / "plan.json").read_text()


def test_what_was_met_for_c_is_met_by_the_folders_estimate(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place.folder)
    whole = estimated_ms("tinymodels:tiny", capsys, "--input-shape", "1,8,8", "--runtime", "c")
    command = [*place.command()[:-1], "firmware", "--no-reconstruct", "--avg-bits", "8", "--format", "c"]
    assert main([*command, *BOARD, "--max-latency", f"{0.8 * whole}ms"]) == 0
    capsys.readouterr()
    assert main(["estimate", "firmware", *BOARD, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["runtime"] == "c"
    assert 0.2 * whole < value["latency_ms"]["p50"] <= 0.8 * whole


@pytest.mark.parametrize(
    ("argv", "code", "found"),
    [
        (["--max-latency", "1us", *BOARD], 3, "--max-latency: not met with 95% of the weights cut"),
        (["--max-latency", "1us", *BOARD], 3, "allow more time: estimated are 0."),
        (["--max-latency", "20ms", *BOARD, "--threads", "2"], 2, "threads 2: nucleo-l4r5zi has 1 core"),
        (["--max-latency", "20ms", *BOARD, "--threads", "0"], 2, "threads 0: expected 1 to 1024"),
        (["--max-latency", "20ms"], 2, "--max-latency without --target"),
        ([*BOARD], 2, "--target, --runtime, --threads and --profile are of --max-latency"),
        (["--max-latency", "20ms", *BOARD, "--prune", "0.5"], 2, "--max-latency with --prune 0.5"),
        (["--max-latency", "0", *BOARD], 2, "--max-latency 0: expected milliseconds above 0"),
        (["--max-latency", "20ms", *BOARD, "--runtime", "litert"], 2, "litert is not for a Cortex-M4"),
        (["--max-latency", "20ms", "--target", "host"], 6, "cpu is not known"),
        (["--max-latency", "20ms", "--target", "rpi9"], 2, "target 'rpi9' is unknown; did you mean rpi5 or rpi4?"),
    ],
)
def test_what_cannot_be(
    argv: list[str], code: int, found: str, place: Place, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(place.folder)
    assert main([*place.command()[:-1], "never", "--no-reconstruct", "--avg-bits", "8", *argv]) == code
    error = capsys.readouterr().err
    assert found in error
    assert error.count("\n") == 1
    assert not (place.folder / "never").exists()


def test_times_with_units() -> None:
    assert [read_milliseconds(text) for text in ("20ms", "0.02s", "20", "20000 us")] == pytest.approx([20.0] * 4)
    for text in ("", "ms", "fast", "inf"):
        with pytest.raises(argparse.ArgumentTypeError):
            read_milliseconds(text)
