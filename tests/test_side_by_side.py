"""Several models in one run: in turns, with ratios, a plot, and a limit on how slow they may have become."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from edgecomp.benching import COMPRESSED, CUT, FLOAT, INT8, subjects
from edgecomp.benchmarks import bench as measuring
from edgecomp.cli import main
from edgecomp.comparing import check_not_slower, plot, read_baseline
from edgecomp.errors import BudgetError, BundleError, UsageError
from edgecomp.report import BenchReport, Comparison, Ratio, Source
from tests.built import write_folder
from tests.filemodels import conv_onnx, conv_tflite
from tests.test_bench import rng
from tests.test_report import MEASURED, NO_LATENCY

ONE = BenchReport(**{**MEASURED, "not_valid": ()})
OTHER = replace(ONE, label="other")


def comparison(low: float, median: float, high: float) -> Comparison:
    ratios = {"other": Ratio(low=low, median=median, high=high)}
    return Comparison(reports=(ONE, OTHER), baseline=ONE.label, ratios=ratios)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    small = rng().normal(size=(4, 4, 3, 3)).astype("float32")
    large = rng().normal(size=(64, 64, 3, 3)).astype("float32")
    (folder / "small.onnx").write_bytes(conv_onnx(small, 8))
    (folder / "large.onnx").write_bytes(conv_onnx(large, 24))
    (folder / "lite.tflite").write_bytes(conv_tflite(small, 8, 8))
    return folder


@pytest.fixture
def calm(monkeypatch):
    """No run drifts, however busy this machine is."""
    monkeypatch.setattr(measuring, "why_not_valid", lambda *_: [])


def test_the_command_line(models, tmp_path, capsys, calm):
    names = [str(models / name) for name in ("small.onnx", "large.onnx", "lite.tflite")]
    svg = tmp_path / "plot.svg"
    assert main(["bench", *names, "--min-secs", "0.2", "--json", "--svg", str(svg)]) == 0
    text = capsys.readouterr().out
    (found,) = json.loads(text)
    assert found["baseline"] == names[0]
    assert list(found["ratios"]) == names[1:]
    assert found["ratios"][names[1]]["low"] > 3
    assert {r["runtime"] for r in found["reports"]} == {"onnxruntime", "litert"}
    assert len({r["rounds"] for r in found["reports"]}) == 1  # in turns
    bars = ElementTree.parse(svg).getroot().findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 1 + len(names)
    before = tmp_path / "before.json"
    before.write_text(text)
    again = ["bench", *names, "--min-secs", "0.2", "--baseline", str(before)]
    assert main([*again, "--fail-if-slower", "100000%"]) == 0
    assert "time / first" in capsys.readouterr().out
    quicker = json.loads(text)
    quicker[0]["ratios"][names[1]] = {"median": 0.1, "low": 0.1, "high": 0.1}
    before.write_text(json.dumps(quicker))
    assert main([*again, "--fail-if-slower", "50%"]) == 3
    assert f"slower by more than 50 %: {names[1]}: beside {names[0]}, than before +" in capsys.readouterr().err
    assert main(["bench", names[0], names[1], "--min-secs", "0.2", "--fail-if-slower", "5"]) == 3
    assert f"{names[1]}: than {names[0]} +" in capsys.readouterr().err


def test_what_the_command_line_refuses(models, tmp_path, capsys):
    name = str(models / "small.onnx")
    for more in (
        [name],
        ["--baseline", str(tmp_path / "none.json")],
        ["--baseline", str(tmp_path / "none.json"), "--fail-if-slower", "5%"],
        ["--fail-if-slower", "5%", "--min-secs", "0.1"],
        ["--svg", str(tmp_path / "x.svg"), "--min-secs", "0.1"],
    ):
        assert main(["bench", name, *more]) == 2, more
    said = capsys.readouterr().err
    for what in ("expected each model once", "add it", "No such file", "nothing to compare with", "nothing to plot"):
        assert what in said
    with pytest.raises(SystemExit):
        main(["bench", name, "--fail-if-slower", "-1"])
    assert main(["bench", name, name, "--target", "cortex-m4"]) == 2


def no_measuring(*_, **__):
    raise AssertionError("measured before all was checked")


def test_a_plot_replaces_no_model(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measuring, "bench", no_measuring)
    names = [str(models / name) for name in ("small.onnx", "large.onnx")]
    stored = tmp_path / "before.json"
    stored.write_text(Comparison(reports=(ONE,), baseline=ONE.label, ratios={}).to_json().join("[]"))
    before = {path: path.read_bytes() for path in (*models.iterdir(), stored)}
    (tmp_path / "link.svg").symlink_to(names[1])
    (tmp_path / "there.svg").write_text("mine")
    compared = ["--baseline", str(stored), "--fail-if-slower", "5"]
    for svg, more, what in (
        (names[0], ["--force"], f"--svg {names[0]}: is {names[0]} or a file that belongs to it"),
        (str(tmp_path / "link.svg"), ["--force"], f"is {names[1]} or a file"),
        (str(stored), [*compared, "--force"], f"--svg {stored}: is {stored} or a file"),
        (str(tmp_path / "there.svg"), [], "there.svg: is there already; give --force to replace it, or another --svg"),
        (str(tmp_path / "none" / "x.svg"), [], "x.svg: cannot be written there (No such file or directory)"),
        ("/proc/x", [], "--svg /proc/x: cannot be written there"),
        ("", ["--force"], "is there and is no file"),
        ("/dev/full", ["--force"], "--svg /dev/full: is there and is no file"),
    ):
        assert main(["bench", *names, "--svg", svg, *more]) == 2, svg
        said = capsys.readouterr().err
        assert what in said
        assert "unfinished" not in said
    assert {path: path.read_bytes() for path in before} == before
    assert (tmp_path / "there.svg").read_text() == "mine"


def test_a_plot_replaces_one_by_force(models, tmp_path):
    svg = tmp_path / "there.svg"
    svg.write_text("an old plot")
    names = [str(models / name) for name in ("small.onnx", "large.onnx")]
    assert main(["bench", *names, "--min-secs", "0.1", "--svg", str(svg), "--force"]) == 0
    assert svg.read_text().startswith("<svg")


def test_a_run_that_is_not_valid_is_no_verdict(models, tmp_path, capsys, monkeypatch):
    reasons = iter([["drifted: a"], ["drifted: b"], ["drifted: c"], ["drifted: d"], ["drifted: e"], []])
    monkeypatch.setattr(measuring, "why_not_valid", lambda *_: next(reasons))
    monkeypatch.setattr(measuring.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(measuring, "STATUS", tmp_path / "none")  # no processes for memory
    names = [str(models / name) for name in ("small.onnx", "large.onnx")]
    quick = ["bench", *names, "--min-secs", "0.1"]
    assert main([*quick, "--json"]) == 0
    stored = tmp_path / "before.json"
    stored.write_text(capsys.readouterr().out)
    # Both where a model is slower and where none is.
    for percent, letter in (("5", "b"), ("100000", "c")):
        assert main([*quick, "--fail-if-slower", percent]) == 6
        wanted = f"not valid, so not judged by --fail-if-slower; measure again: side by side: drifted: {letter}\n"
        assert capsys.readouterr().err == f"edgecomp: {wanted}"
    assert main([*quick, "--fail-if-slower", "5", "--repeat", "2"]) == 3
    assert f"slower by more than 5 %: {names[1]}: than {names[0]} +" in capsys.readouterr().err
    assert next(reasons, None) is None
    assert main([*quick, "--fail-if-slower", "5", "--baseline", str(stored)]) == 2
    assert f"--baseline {stored}: is of a run that was not valid: drifted: a; measure it" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["rpi5-emulated", "cortex-m4"])
def test_what_an_emulator_cannot_answer_is_refused_before_it_runs(target, models, tmp_path, capsys):
    names = [str(models / "small.onnx"), str(models / "large.onnx")][: 1 if target == "cortex-m4" else 2]
    for more, what in (
        (["--svg", str(tmp_path / "x.svg")], "--svg is a plot of times that were measured; an emulator has none"),
        (["--fail-if-slower", "5"], "--fail-if-slower is about times that were measured; an emulator has none"),
        (["--threads", "4"], "--threads 4 with an emulated --target: one thread is emulated"),
        (["--repeat", "2"], "--profile, --cores and --repeat are for --target ssh://"),
    ):
        assert main(["bench", *names, "--target", target, *more]) == 2
        assert what in capsys.readouterr().err


def test_a_core_runs_no_onnx(models, capsys):
    for name, kind in (("small.onnx", "ONNX"), ("lite.tflite", "TFLite")):
        assert main(["bench", str(models / name), "--target", "cortex-m4"]) == 2
        assert f"{name}: cortex-m4, a core, runs the network in C; this is {kind}" in capsys.readouterr().err


def test_ratios_to_another_model_are_not_compared(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measuring, "bench", no_measuring)
    names = [str(models / name) for name in ("small.onnx", "large.onnx")]
    stored = tmp_path / "before.json"
    reports = tuple(replace(ONE, label=name) for name in names)
    ratios = {names[1]: Ratio(low=1.0, median=1.0, high=1.0)}
    stored.write_text(Comparison(reports=reports, baseline=names[0], ratios=ratios).to_json().join("[]"))
    assert main(["bench", *names[::-1], "--baseline", str(stored), "--fail-if-slower", "5%"]) == 2
    wanted = f"--baseline: its ratios are to {names[0]}, here the first is {names[1]}; give that one first"
    assert wanted in capsys.readouterr().err
    with pytest.raises(UsageError, match="its ratios are to 4 bits, here the first is other"):
        check_not_slower([replace(comparison(1, 1, 1), baseline="other", ratios={ONE.label: Ratio(
            low=1.0, median=1.0, high=1.0)})], [comparison(1, 1, 1)], 5)
    assert main(["bench", names[0], "--fail-if-slower", "5%"]) == 2
    assert "nothing to compare with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("now", "then", "percent", "slower"),
    [
        ((1.06, 1.08, 1.1), (0.9, 1.0, 1.1), 5, True),
        ((1.04, 1.08, 1.1), (0.9, 1.0, 1.1), 5, False),  # perhaps slower is not slower
        ((1.06, 1.08, 1.1), (0.9, 1.02, 1.1), 5, False),
        ((1.06, 1.08, 1.1), (0.9, 1.0, 1.1), 0, True),
        ((0.2, 0.3, 0.4), (0.1, 0.1, 0.1), 5, True),
    ],
)
def test_slower_than_before(now, then, percent, slower):
    if slower:
        with pytest.raises(BudgetError, match="other: beside 4 bits, than before"):
            check_not_slower([comparison(*now)], [comparison(*then)], percent)
    else:
        check_not_slower([comparison(*now)], [comparison(*then)], percent)
        assert True


def test_what_the_user_did_not_build_fails_no_build(tmp_path):
    (labels, _) = ([label for label, _, _ in subject.entries] for subject in subjects(write_folder(tmp_path), None))
    assert labels == [FLOAT, INT8, COMPRESSED]

    def beside(compressed: float, cut: str = "") -> Comparison:
        names = (FLOAT + cut, INT8 + cut, COMPRESSED)
        times = {FLOAT + cut: 3.0 * compressed, COMPRESSED: compressed}
        return Comparison(
            reports=tuple(replace(ONE, label=name) for name in names),
            baseline=INT8 + cut,
            ratios={name: Ratio(low=time, median=time, high=time) for name, time in times.items()},
        )

    for cut in ("", CUT):
        check_not_slower([beside(1.04, cut)], None, 5)
        with pytest.raises(BudgetError, match=f"^slower by more than 5 %: compressed: than plain int8{cut} \\+20.0%$"):
            check_not_slower([beside(1.2, cut)], None, 5)
    said = "compressed: beside plain int8, than before"
    with pytest.raises(BudgetError, match=rf"^slower by more than 5 %: {said} \+20.0%$"):
        check_not_slower([beside(1.2)], [beside(1.0)], 5)


def test_a_valid_run_is_judged_beside_one_that_is_not():
    spoilt = comparison(1.2, 1.2, 1.2)
    spoilt = replace(spoilt, reports=tuple(replace(r, not_valid=("drifted",)) for r in spoilt.reports))
    check_not_slower([spoilt, comparison(1.0, 1.0, 1.0)], None, 5)
    # Which of several runs it was is said.
    with pytest.raises(BudgetError, match=r": other \(onnxruntime, host\): than 4 bits \+10.0%$"):
        check_not_slower([spoilt, comparison(1.1, 1.1, 1.1)], None, 5)


def test_a_model_alone_is_compared_with_itself():
    alone = Comparison(reports=(ONE,), baseline=ONE.label, ratios={})
    half = BenchReport(
        **{**MEASURED, "samples_us": (5.0, 10.0, 15.0625, 20.0), "p50_us": 12.53125, "p90_us": 18.51875,
           "p99_us": 19.851875, "min_us": 5.0, "not_valid": ()}
    )  # fmt: skip
    before = Comparison(reports=(half,), baseline=half.label, ratios={})
    with pytest.raises(BudgetError, match=r"^slower by more than 5 %: 4 bits: than before \+100\.0%$"):
        check_not_slower([alone], [before], 5)
    check_not_slower([before], [alone], 5)
    elsewhere = Comparison(reports=(replace(half, target="rpi4"),), baseline=half.label, ratios={})
    with pytest.raises(UsageError, match="nothing to compare with"):
        check_not_slower([alone], [elsewhere], 5)


def test_an_emulator_has_no_time_to_compare():
    emulated = BenchReport(**{**MEASURED, **NO_LATENCY, "source": Source.EMULATED})
    with pytest.raises(UsageError, match="an emulator has none"):
        check_not_slower([Comparison(reports=(emulated,), baseline=emulated.label, ratios={})], None, 5)


def test_a_plot_says_what_it_draws():
    text = plot([comparison(0.4, 0.5, 0.6)], ["a <b> & c"])
    root = ElementTree.fromstring(text)
    written = ["".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert written == ["a <b> & c", "4 bits", "1.000, p50 0.025 ms", "other", "0.500, p50 0.025 ms"]
    widths = [float(e.get("width")) for e in root.findall("{http://www.w3.org/2000/svg}rect")[1:]]
    assert widths[1] / widths[0] == pytest.approx(0.5, abs=0.001)


def test_a_baseline_is_read_strictly(tmp_path):
    path = tmp_path / "before.json"
    for text in ("", "{}", "[]", "[1]", "[{}]", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(BundleError, match=r"before\.json"):
            read_baseline(path)
    with pytest.raises(BundleError, match=r"/dev/zero: is no plain file; .* bench --json wrote"):
        read_baseline(Path("/dev/zero"))
    path.write_text(f"[{comparison(0.4, 0.5, 0.6).to_json()}]")
    assert read_baseline(path) == [comparison(0.4, 0.5, 0.6)]
