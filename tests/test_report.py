"""Reports keep what was measured, refuse what contradicts it, and read back exactly; tables line up."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from edgecomp.errors import BundleError, UsageError
from edgecomp.report import BenchReport, Comparison, Ratio, Source, summarise, table

MEASURED = {
    "label": "4 bits",
    "artifact": "model.onnx",
    "artifact_bytes": 1234,
    "sha256": "ab" * 32,
    "format": "onnx",
    "target": "host",
    "runtime": "onnxruntime",
    "runtime_version": "1.32.0",
    "threads": 2,
    "execution": {"providers": ("CPUExecutionProvider",), "spins": False},
    "source": Source.MEASURED,
    "warmups": 50,
    "steady": True,
    "rounds": 2,
    "samples_us": (10.0, 20.0, 30.125, 40.0),
    "p50_us": 25.0625,
    "p90_us": 37.0375,
    "p99_us": 39.70375,
    "min_us": 10.0,
    "load_ms": 4.5,
    "peak_memory_bytes": 80_000_000,
    "model_memory_bytes": -4096,
    "layers_us": {"conv1 QLinearConv": 7.5},
    "instructions": {},
    "not_valid": ("drifted: it did",),
    "before": {"temperature_c": 41.5, "throttle_flags": None},
    "after": {"temperature_c": 61.0, "throttle_flags": 0},
    "environment": {"cpu": "Cortex-A72", "load_average_1min": 0.25, "governor": None, "unread": ("governor",)},
}
LATENCY = ("warmups", "steady", "rounds", "samples_us", "p50_us", "p90_us", "p99_us", "min_us", "load_ms", "layers_us",
           "not_valid")  # fmt: skip
NO_LATENCY = {**{name: None for name in LATENCY}, "samples_us": (), "layers_us": {}, "not_valid": ()}
GOOD = BenchReport(**MEASURED).to_json()


def test_percentiles_are_taken_between_samples():
    assert summarise((40.0, 10.0, 30.0, 20.0)) == (25.0, pytest.approx(37.0), pytest.approx(39.7), 10.0)
    assert summarise((7.0,)) == (7.0, 7.0, 7.0, 7.0)
    for n in range(1, 60):
        samples = np.random.default_rng(n).lognormal(size=n)
        expected = [*np.percentile(samples, (50, 90, 99)), samples.min()]
        np.testing.assert_allclose(summarise(memoryview(samples)), expected, rtol=1e-14)


def test_a_report_reads_back_as_it_was():
    report = BenchReport(**MEASURED)
    again = BenchReport.from_json(report.to_json())
    assert again == report
    assert tuple(again.samples_us) == MEASURED["samples_us"]
    assert again.environment["unread"] == ("governor",)
    assert again.to_json() == report.to_json()
    obj = json.loads(report.to_json())
    assert next(iter(obj)) == "schema"
    assert obj["schema"] == "edgecomp-bench/2"
    assert obj["samples_us"] == [10.0, 20.0, 30.125, 40.0]
    assert set(obj) == {"schema", *MEASURED}


def test_a_report_does_not_change():
    report = BenchReport(**MEASURED)
    with pytest.raises(TypeError):
        report.environment["cpu"] = "Cortex-A76"
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.p50_us = 1.0
    with pytest.raises(TypeError, match="read-only"):
        report.samples_us[0] = 1.0


@pytest.mark.parametrize("name", LATENCY)
def test_an_emulator_has_no_latency(name):
    emulated = {**MEASURED, **NO_LATENCY, "source": Source.EMULATED}
    assert BenchReport(**emulated).peak_memory_bytes == 80_000_000
    with pytest.raises(UsageError, match=f"emulated and has {name}; only a device's own run"):
        BenchReport(**{**emulated, name: MEASURED[name]})


def test_an_estimate_has_percentiles_and_no_samples():
    estimated = {**MEASURED, **NO_LATENCY, "source": Source.ESTIMATED, "p50_us": 3.0, "p90_us": 4.0}
    assert BenchReport(**estimated).p90_us == 4.0
    for name in ("samples_us", "min_us", "rounds", "load_ms"):
        with pytest.raises(UsageError, match=f"estimated and has {name}"):
            BenchReport(**{**estimated, name: MEASURED[name]})


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("p50_us", 24.0, "p50_us is 24.0, the samples give 25.0625"),
        ("p90_us", None, "p90_us is None, the samples give"),
        ("min_us", 20.0, "the samples give 10.0"),
        ("samples_us", (), "measured, with 0 samples in 2 rounds"),
        ("samples_us", (1.0, math.nan, 1.0, 1.0), "expected numbers of at least 0"),
        ("samples_us", [10.0, 20.0, 30.0, 40.0], "expected numbers"),
        ("samples_us", (10**400, 1.0), "expected numbers"),
        ("rounds", 3, "4 samples in 3 rounds"),
        ("rounds", None, "4 samples in None rounds"),
        ("rounds", 0, "rounds is 0, expected a whole number of at least 1"),
        ("threads", 0, "threads is 0"),
        ("threads", True, "threads is True"),
        ("artifact_bytes", 1.5, "artifact_bytes is 1.5"),
        ("model_memory_bytes", 0.5, "expected a whole number"),
        ("sha256", "AB" * 32, "64 hexadecimal digits"),
        ("label", None, "label is None, expected a string"),
        ("load_ms", -1, "load_ms is -1, expected a number of at least 0"),
        ("load_ms", math.inf, "load_ms is inf"),
        ("steady", "yes", "expected true or false"),
        ("source", "guessed", "source is 'guessed', expected one of measured, emulated, estimated"),
        ("environment", {"cpu": {"deep": 1}}, "environment: 'cpu' is"),
        ("environment", {"cpu": math.nan}, "environment: 'cpu' is nan"),
        ("execution", ["providers"], "execution is list, expected an object"),
    ],
)
def test_contradictions_are_refused(name, value, what):
    with pytest.raises(UsageError, match=what) as caught:
        BenchReport(**{**MEASURED, name: value})
    assert "\n" not in str(caught.value)
    if not isinstance(value, (tuple, list, float, dict)):  # a tuple becomes a list, and NaN is not JSON
        obj = {**json.loads(GOOD), name: value}
        with pytest.raises(BundleError, match=r"r\.json: "):
            BenchReport.from_json(json.dumps(obj), "r.json")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "r.json: not JSON"),
        ("[]", "r.json: expected an object, found list"),
        (GOOD[:-20], "r.json: not JSON"),
        (GOOD.replace("edgecomp-bench/2", "edgecomp-bench/1"), "schema is 'edgecomp-bench/1', this edgecomp reads"),
        (GOOD.replace('"threads": 2', '"threads": 2, "fast": 1'), "unknown key 'fast'"),
        (GOOD.replace('"threads": 2', '"threads": 2, "threads": 2'), "key 'threads' stands twice"),
        (GOOD.replace(' "threads": 2,\n', ""), "key 'threads' is missing"),
        (GOOD.replace('"load_ms": 4.5', '"load_ms": NaN'), "NaN is not a number JSON knows"),
        (GOOD.replace('"samples_us": [10.0,', '"samples_us": [true,'), "samples_us: expected numbers"),
        (GOOD.replace('"samples_us": [10.0, 20.0, 30.125, 40.0]', '"samples_us": 1'), "samples_us: expected a list"),
        (GOOD.replace('"source": "measured"', '"source": "emulated"'), "r.json: report: emulated and has"),
        ("[" * 100_000, "r.json: not JSON"),
    ],
)
def test_damaged_reports_are_one_line(text, what):
    assert text != GOOD
    with pytest.raises(BundleError) as caught:
        BenchReport.from_json(text, "r.json")
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


FAST = {**MEASURED, "label": "fast", "samples_us": (5.0, 10.0), "p50_us": 7.5, "p90_us": 9.5, "p99_us": 9.95,
        "min_us": 5.0}  # fmt: skip
COMPARISON = Comparison(
    reports=(BenchReport(**MEASURED), BenchReport(**FAST)),
    baseline="4 bits",
    ratios={"fast": Ratio(median=0.3, low=0.25, high=0.5)},
)


def test_a_comparison_reads_back_as_it_was():
    again = Comparison.from_json(COMPARISON.to_json())
    assert again == COMPARISON
    assert again.ratios["fast"] == Ratio(median=0.3, low=0.25, high=0.5)
    assert json.loads(COMPARISON.to_json())["ratios"] == {"fast": {"median": 0.3, "low": 0.25, "high": 0.5}}


def test_a_comparison_names_what_it_holds():
    one = BenchReport(**MEASURED)
    with pytest.raises(UsageError, match="expected each once"):
        Comparison(reports=(one, one), baseline="4 bits", ratios={})
    with pytest.raises(UsageError, match="no report is called '8 bits'; there are 4 bits"):
        Comparison(reports=(one,), baseline="8 bits", ratios={})
    with pytest.raises(UsageError, match="no report is called 'slow'"):
        Comparison(reports=(one,), baseline="4 bits", ratios={"slow": Ratio(median=1.0, low=1.0, high=1.0)})


@pytest.mark.parametrize("values", [(1.0, 1.1, 1.2), (0.0, 0.0, 1.0), (1.0, 0.9, math.nan), (True, 1, 1), ("1", 1, 1)])
def test_a_ratio_lies_in_its_interval(values):
    with pytest.raises(UsageError, match="ratio"):
        Ratio(median=values[0], low=values[1], high=values[2])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"median": 0.3', '"median": 0.9'),
        ('"median": 0.3', '"middle": 0.3'),
        ('"median": 0.3', '"median": null'),
        ('"baseline": "4 bits"', '"baseline": 4'),
        ('"label": "fast"', '"label": "4 bits"'),
        ('"ratios": {', '"ratios": {"nobody": {"median": 1, "low": 1, "high": 1}, '),
        ("edgecomp-comparison/2", "edgecomp-bench/2"),
        ('"p50_us": 7.5', '"p50_us": 7.0'),
    ],
)
def test_damaged_comparisons_are_one_line(old, new):
    text = COMPARISON.to_json().replace(old, new)
    assert text != COMPARISON.to_json()
    with pytest.raises(BundleError, match=r"c\.json: ") as caught:
        Comparison.from_json(text, "c.json")
    assert "\n" not in str(caught.value)


def test_the_table_of_a_comparison():
    emulated = BenchReport(**{**MEASURED, **NO_LATENCY, "source": Source.EMULATED, "label": "emu", "threads": 1})
    text = Comparison(reports=(*COMPARISON.reports, emulated), baseline="4 bits", ratios=COMPARISON.ratios).table()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[0][:7] == ["model", "runtime", "file bytes", "p50 ms", "p90 ms", "min ms", "x 4 bits"]
    assert rows[2][:7] == ["4 bits", "onnxruntime 1.32.0, 2 threads", "1234", "0.025", "0.037", "0.010", "-"]
    assert rows[3][5:9] == ["0.005", "0.300", "0.250-0.500", "4.5"]
    assert rows[4][1:7] == ["onnxruntime 1.32.0, 1 thread", "1234", "-", "-", "-", "-"]
    assert [row[-1] for row in rows[2:]] == ["measured", "measured", "emulated"]
    assert [row[-3:-1] for row in rows[2:]] == [["80.00", "-0.00"]] * 3


def test_a_table_lines_up_with_numbers_to_the_right():
    rows = [("float", 1234567, "90.92 %", 1.0, "-"), ("a|b\nc", 12, "-", 0.123456, "-")]
    assert table(rows, ("model", "bytes", "accuracy", "x", "note")) == "\n".join(
        [
            "| model  |   bytes | accuracy |      x | note |",
            "| ------ | ------: | -------: | -----: | ---- |",
            "| float  | 1234567 |  90.92 % |      1 | -    |",
            "| a\\|b c |      12 |        - | 0.1235 | -    |",
        ]
    )


@pytest.mark.parametrize(
    "cell", ["1", "-1.5", "0.35x", "12 ms", "3.4 MB", "1,234", "+0.4", "1e-05", "< 3 %", "0.25-0.50"]
)
def test_what_counts_as_a_number(cell):
    assert "-:" in table([[cell]], ["h"])


@pytest.mark.parametrize("cell", ["model", "8 layers", "1.32.0 beta", "x2", "", "-", "int8"])
def test_what_does_not_count_as_a_number(cell):
    assert "-:" not in table([[cell]], ["h"])


def test_a_table_without_rows_and_a_crooked_one():
    assert table([], ["a", "long name"]) == "| a   | long name |\n| --- | --------- |"
    with pytest.raises(UsageError, match="row 1 has 1 cells, the header 2"):
        table([(1, 2), (1,)], ["a", "b"])
