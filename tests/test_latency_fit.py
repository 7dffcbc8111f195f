"""The estimator's constants are those of the published figures, and README says how good they are."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgecomp.benchmarks import latency_fit
from edgecomp.benchmarks.latency_fit import (
    Found,
    board_of,
    error_percent,
    find,
    read_held_out,
    read_rows,
    spreads_of,
    tables,
    to_json,
)
from edgecomp.benchmarks.published import NETWORKS
from edgecomp.errors import DataError
from edgecomp.latency import (
    KINDS,
    QUANTITIES,
    Case,
    estimate,
    fitted,
)
from edgecomp.processor import processor_of
from edgecomp.targets import load
from tests.test_latency import case, net

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found() -> Found:
    """The fit anew, with what rows are off by without their board, network, ... as `latency_fit --write` stored it."""
    folder = ROOT.parent / "shared" / "latency"
    if not folder.is_dir():
        pytest.skip("../shared with published latencies is not here")
    return find(read_rows(folder), read_held_out())


@pytest.mark.shared
def test_the_shipped_constants_are_those_of_the_fit(found: Found) -> None:
    again, shipped = json.loads(to_json(found)), fitted()
    assert (again["rows"], again["seen"]) == (shipped["rows"], shipped["seen"])
    for part in ("constants", "spreads"):
        assert again[part].keys() == shipped[part].keys()
        for name, value in again[part].items():
            np.testing.assert_allclose(value, shipped[part][name], atol=0.02, err_msg=name)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("grouping", "group"),
    [
        ("board", "RASPBERRY PI 5"),
        ("board", "NUCLEO-U575ZI-Q"),
        ("network", "1826406400"),
        ("core", "Cortex-A72"),
        ("runtime", "x-cube-ai"),
    ],
)
def test_what_is_stored_of_rows_left_out_is_what_a_fit_without_them_says(
    found: Found, grouping: str, group: str
) -> None:
    left_out = found.groups(grouping) == group
    assert left_out.sum() > 3
    again = found.fit.held_out(found.groups(grouping), found.constants, [group])
    np.testing.assert_allclose(again[left_out], found.residuals[grouping][left_out], atol=0.03)
    assert not again[~left_out].any()


@pytest.mark.shared
def test_readme_tells_how_far_off_the_estimates_are(found: Found) -> None:
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    for line in tables(found).splitlines():
        assert " ".join(line.split()) in readme, line


@pytest.mark.shared
def test_what_was_asked_of_the_estimates(found: Found) -> None:
    """At most 20 % off in the median, nine of ten in the range: in ../shared/latency, and in what was read since."""
    elsewhere = np.array([row.elsewhere for row in found.fit.rows])
    for grouping in ("board", "network"):
        for chosen in (found.published & ~elsewhere, elsewhere):
            assert error_percent(found.residuals[grouping][chosen]) <= 20
            assert found.inside(grouping)[chosen].mean() >= 0.9
    # The board that is left out is out: no constant of its name is used.
    left = np.array([board_of(row) != "RASPBERRY PI 5" for row in found.fit.rows])
    alone = found.fit.solve(left, found.constants, steps=8)
    place = found.fit.names.index("board rpi5")
    assert ((~left & ~elsewhere).sum(), round(alone[place], 6)) == (40, 0)
    assert found.constants[place] != 0


def test_the_fit_finds_constants_that_it_was_not_told() -> None:
    """Rows made up from known constants, noise of 2 %: the fit estimates them within a few percent."""
    rng = np.random.default_rng(1)
    processor = processor_of(load("rpi4"))
    networks = [NETWORKS[key]() for key in NETWORKS if key[1] == "224x224x3" and "(" not in key[0]]
    rows = [
        latency_fit.Row(
            device="rpi4",
            model=str(i),
            case=Case(work=x.layers, processor=processor, runtime="ncnn", precision="fp32", threads=t),
            seconds=1.0,
        )
        for i, x in enumerate(networks)
        for t in (1, 2, 4)
    ]
    blank = latency_fit.Fit(rows)
    truth = blank.mean + rng.normal(0, 0.3, len(blank.mean)) * blank.spread
    seconds = np.exp(blank.log_seconds(truth) + rng.normal(0, 0.02, len(rows)))
    fit = latency_fit.Fit([replace(row, seconds=float(s)) for row, s in zip(rows, seconds, strict=True)])
    assert np.abs(fit.residuals(fit.mean)).max() > 0.3
    assert np.median(np.abs(fit.residuals(fit.solve()))) < 0.05


def test_counted_rows_are_in_no_figure_of_published_ones() -> None:
    """Ranges, errors and their number are those of published rows, however far off counted ones are."""
    rng = np.random.default_rng(2)
    processor = processor_of(load("nucleo-l4r5zi"))
    published, counted = (
        [
            latency_fit.Row(
                device=f"{runtime} {i % 3}",
                model=str(i),
                case=Case(work=net(8 + i).layers, processor=processor, runtime=runtime, precision="int8", threads=1),
                seconds=1.0,
                elsewhere=runtime != "c" and i % 2 == 0,
            )
            for i in range(9)
        ]
        for runtime in ("tflite-micro", "c")
    )
    off = {name: rng.normal(0, 0.1, 9) for name in latency_fit.GROUPINGS}
    alone = find(published, off)
    both = find([*published, *counted], {name: np.concatenate([each, each + 9]) for name, each in off.items()})
    stored = json.loads(to_json(both))
    assert stored["spreads"].pop("counted")[0] < -9
    assert (stored["rows"], stored["seen"], stored["counted"]) == (9, ["Cortex-M4 int8"], ["Cortex-M4 int8"])
    expected = spreads_of({name: off[name] for name in ("board", "network")}, np.array(["microcontroller"] * 9))
    (class_,) = expected
    np.testing.assert_allclose(stored["spreads"][class_], expected[class_], atol=1e-3)
    lines = [[cell.strip() for cell in line.split("|")][1:-1] for line in tables(both).splitlines()]
    theirs = next(line for line in lines if line[:1] == ["all"])
    assert theirs[1:4:2] == ["9", f"{100 * alone.inside('board').mean():.0f} %"]
    assert theirs[2] == f"{error_percent(off['board']):.0f} %"
    ours = next(line for line in lines if line and line[0] == latency_fit.COUNTED)
    assert ours[1:4] == ["9", "-", "-"]
    assert not any("By runtime" in cell and " c " in cell for line in lines for cell in line)


@pytest.mark.parametrize(("network", "name"), [("MobileNetV1 0.25, 96x96x3", "MobileNetV1 0.25")])
def test_counted_rows_are_what_readme_says_of_the_same_networks(network: str, name: str) -> None:
    """Instructions of the table that `tinyml` printed, and cycles an instruction as README has them."""
    text = (ROOT / "benchmarks" / "latency_counted.csv").read_text("utf-8")
    rows = [r for r in csv.DictReader(text.splitlines()) if (r["model"], r["cpu"]) == (name, "Cortex-M4")]
    assert all(r["source"].startswith("estimated: ") for r in csv.DictReader(text.splitlines()))
    n = sum(int(r["instructions"]) for r in rows)
    (line,) = (x for x in (ROOT / "README.md").read_text("utf-8").splitlines() if x.startswith(f"| {network} | 8 |"))
    assert n == pytest.approx(int(line.split("|")[3].split()[0].replace(",", "")), rel=1e-3)
    cycles = [sum(float(r[end]) for r in rows) * 120e3 / n for end in ("low_ms", "latency_ms", "high_ms")]
    np.testing.assert_allclose(cycles, [1.39, (1.39 + 1.68) / 2, 1.68], atol=0.01)


def test_our_own_c_is_estimated_from_counts_and_says_so() -> None:
    c, theirs = (estimate(case("nucleo-l4r5zi", net(), runtime=name)) for name in ("c", "tflite-micro"))
    assert c.latency_ms.p50 < theirs.latency_ms.p50
    assert c.latency_ms.p90 / c.latency_ms.p10 > theirs.latency_ms.p90 / theirs.latency_ms.p10
    (said,) = (line for line in c.basis if line.startswith("c: "))
    assert "no published row; fitted to instructions of emulated networks times the cycles that Arm publishes" in said
    assert "(Cortex-M0+ int8, Cortex-M4 int8), estimates themselves" in said
    for other in ("nucleo-g0b1re", "disco-f746ng"):
        assert "no published row of a" not in " ".join(estimate(case(other, net(), runtime="c")).basis)
    # What was emulated stands for our own C alone.
    assert "no published row of a Cortex-M0+" in " ".join(estimate(case("nucleo-g0b1re", net())).basis)


def test_the_fit_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"xnnpack_readme\.csv: no such file; the fit needs the published latencies"):
        read_rows(tmp_path)


def test_kinds_are_the_first_quantities() -> None:
    assert [name.removeprefix("kind ") for name in QUANTITIES[: len(KINDS)]] == [str(kind) for kind in KINDS]
