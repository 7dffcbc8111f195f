"""Results of a comparison, their table and plot, and the environments of peers."""

from __future__ import annotations

import ast
import json
import statistics
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecomp.benchmarks.compression import peers, plot, results, table
from edgecomp.benchmarks.compression.results import Result, Source, Task
from edgecomp.errors import BundleError, TargetError, UsageError
from tests.test_architecture import imports, modules

SUBJECT = {"model": "m:f", "n_calibration": 4}


def result(
    method: str = "ours",
    bits: float | None = 4.0,
    seed: int = 0,
    *,
    n_bytes: int = 100,
    accuracy: float = 90.0,
    source: Source = Source.FILE,
) -> Result:
    return Result(
        task=Task(method=method, bits=bits, seed=seed),
        n_bytes=n_bytes,
        accuracy_percent=accuracy,
        n_images=200,
        source=source,
        measured_in="onnxruntime 1.2.3",
        seconds=1.5,
        sha256=None,
        details={"bits": {"conv": 4}},
        versions={"tool": "1"},
    )


# ---- results ---------------------------------------------------------------------------------------------------------


@given(
    bits=st.none() | st.floats(2, 8),
    seed=st.integers(0, 2**31),
    n_bytes=st.integers(1, 2**40),
    accuracy=st.floats(0, 100),
    source=st.sampled_from(Source),
)
def test_a_result_reads_back_as_it_was(
    bits: float | None, seed: int, n_bytes: int, accuracy: float, source: Source
) -> None:
    written = result(bits=bits, seed=seed, n_bytes=n_bytes, accuracy=accuracy, source=source)
    assert results.result_from_json(written.to_json(), "r") == written


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('"n_bytes": 100', '"n_bytes": 0', "0 bytes"),
        ('"n_bytes": 100', '"n_bytes": 1.5', "1.5 bytes"),
        ('"accuracy_percent": 90.0', '"accuracy_percent": 101', "101 %"),
        ('"accuracy_percent": 90.0', '"accuracy_percent": NaN', "NaN is not a number"),
        ('"accuracy_percent": 90.0', '"accuracy_percent": "x"', "'x' %"),
        ('"source": "file"', '"source": "guess"', "guess"),
        ('"seed": 0', '"sead": 0', "sead"),
        ('"seed": 0', '"seed": 0, "seed": 1', "'seed' stands twice"),
        ('"seed": 0', '"seed": ' + '{"a":' * 2000, "not JSON"),
        ('"n_images"', '"images"', "expected"),
        ("edgecomp-compression/1", "edgecomp-compression/9", "this edgecomp reads"),
        ("{", "[", "damaged"),
    ],
)
def test_damaged_results_are_one_line(old: str, new: str, what: str) -> None:
    text = result().to_json()
    assert old in text
    with pytest.raises(BundleError, match=what) as caught:
        results.result_from_json(text.replace(old, new, 1), "r.json")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("r.json")


def test_results_are_found_again(tmp_path: Path) -> None:
    assert results.open_results(tmp_path / "a" / "b", SUBJECT) == {}
    kept = [result(), result(seed=1), result("other", None), result("other", 2.5)]
    for one in kept:
        results.save(tmp_path / "a" / "b", one)
    assert results.open_results(tmp_path / "a" / "b", SUBJECT) == {one.task: one for one in kept}
    results.forget(tmp_path / "a" / "b", kept[0].task)
    assert results.open_results(tmp_path / "a" / "b", SUBJECT).keys() == {one.task for one in kept[1:]}


def test_results_of_two_experiments_do_not_mix(tmp_path: Path) -> None:
    results.open_results(tmp_path, SUBJECT)
    with pytest.raises(UsageError, match="n_calibration is 4, this run has 8; choose another -o"):
        results.open_results(tmp_path, {**SUBJECT, "n_calibration": 8})
    (tmp_path / results.EXPERIMENT).write_text("{")
    with pytest.raises(BundleError, match="is no JSON"):
        results.open_results(tmp_path, SUBJECT)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match=r"holds files but no experiment\.json"):
        results.open_results(tmp_path, SUBJECT)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


# ---- table -----------------------------------------------------------------------------------------------------------


def test_the_table_by_hand() -> None:
    rows = table.rows_of(
        [
            result("late", 3.0, 0, n_bytes=50, accuracy=80.0, source=Source.SIMULATED),
            result("early", 4.0, 2, n_bytes=104, accuracy=91.0),
            result("early", 4.0, 0, n_bytes=100, accuracy=90.0),
            result("early", 2.5, 0, n_bytes=80, accuracy=85.0),
            result(table.FLOAT, None, 0, n_bytes=408, accuracy=92.0),
        ],
        [table.FLOAT, "early"],
    )
    lines = table.markdown(rows).splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:6]] == [
        ["float", "-", "1", "408", "-", "92.00 %", "-", "onnxruntime 1.2.3", "2"],
        ["early", "2.5", "1", "80", "5.10x", "85.00 %", "7.00", "onnxruntime 1.2.3", "2"],
        ["early", "4", "2", "102 ± 3", "4.00x", "90.50 ± 0.71 %", "1.50", "onnxruntime 1.2.3", "2"],
        ["late", "3", "1", "50", "8.16x", "80.00 %", "12.00", "onnxruntime 1.2.3, *simulated*", "2"],
    ]
    assert table.LEGEND in lines


@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(0, 100)), min_size=2, max_size=5))
def test_means_and_spreads(values: list[tuple[int, float]]) -> None:
    (row,) = table.rows_of([result(seed=i, n_bytes=b, accuracy=a) for i, (b, a) in enumerate(values)], [])
    for mean, spread, column in (
        (row.mean_bytes(), row.spread_bytes(), [b for b, _ in values]),
        (row.mean_accuracy(), row.spread_accuracy(), [a for _, a in values]),
    ):
        assert mean == pytest.approx(sum(column) / len(column))
        variance = sum((x - sum(column) / len(column)) ** 2 for x in column) / (len(column) - 1)
        assert spread == pytest.approx(variance**0.5, abs=1e-6)
    assert statistics.fmean([r.task.seed for r in row.results]) == (len(values) - 1) / 2


# ---- plot ------------------------------------------------------------------------------------------------------------


def drawn() -> list[table.Row]:
    return table.rows_of(
        [
            result(table.FLOAT, None, n_bytes=10**8, accuracy=91.0),
            *(result("ours", b, s, n_bytes=10**6 * int(b), accuracy=90 + s) for b in (2, 4) for s in (0, 1)),
            result("sim", 3.0, n_bytes=3 * 10**6, accuracy=89.0, source=Source.SIMULATED),
            result("broken", 3.0, n_bytes=2 * 10**6, accuracy=10.0),
        ],
        [table.FLOAT, "ours"],
    )


def test_the_plot_is_an_svg_that_names_every_method() -> None:
    pytest.importorskip("matplotlib", reason="the plot needs edgecomp[compare]")
    picture = plot.svg(drawn(), "net & data")
    root = ElementTree.fromstring(picture)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    wanted = {"float", "ours", "sim, simulated", "broken (1 below the frame)", "net & data", "accuracy, %", "3 MB"}
    assert wanted <= set(texts)
    assert plot.svg(drawn(), "net & data") == picture


def test_a_plot_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="no results to draw"):
        plot.svg([], "t")


def test_a_missing_matplotlib_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TargetError, match=r"pip install 'edgecomp\[compare\]'"):
        plot.check_matplotlib()


# ---- peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(peers.PEERS))
def test_each_peer_has_a_script_and_pinned_versions(name: str) -> None:
    peer = peers.PEERS[name]
    versions = peers.pinned(peer.requirements(), name)
    for package in (*peer.packages, "numpy"):
        assert package.replace("_", "-") in versions
    functions = [n.name for n in ast.parse(peer.script().read_text("utf-8")).body if isinstance(n, ast.FunctionDef)]
    assert "compress" in functions


def test_peers_stand_alone() -> None:
    scripts = [name for name in modules() if name.startswith("benchmarks.compression.peer_")]
    assert len(scripts) == 1 + len(peers.PEERS)
    for name in scripts:
        assert [i.name for i in imports(name) if i.name.startswith("edgecomp") and not i.typing] == [], name


NAMES = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True)
VERSIONS = st.from_regex(r"[0-9]{1,3}(\.[0-9]+){0,2}", fullmatch=True)


@given(st.dictionaries(NAMES, VERSIONS))
def test_pinned_versions_read_back(versions: dict[str, str]) -> None:
    lines = [f"{name}=={version}" for name, version in versions.items()]
    text = "\n# a comment\n\n".join(lines)
    assert peers.pinned(text, "p") == versions
    assert peers.pinned("\n".join(f"  {line}  # why" for line in lines), "p") == versions


@pytest.mark.parametrize("line", ["numpy", "numpy>=2", "numpy==", "-e .", "--index-url x", "numpy==2; extra=='a'"])
def test_a_version_that_is_not_pinned_is_refused(line: str) -> None:
    with pytest.raises(UsageError, match=r"p:2: .* expected PACKAGE==VERSION"):
        peers.pinned(f"torch==2\n{line}\n", "p")


def test_a_package_pinned_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="p:2: my-tool stands twice"):
        peers.pinned("My_tool==1\nmy-tool==2\n", "p")


def test_a_missing_environment_is_one_line_that_says_how_to_make_it(tmp_path: Path) -> None:
    peer = peers.PEERS["ort"]
    with pytest.raises(TargetError) as caught:
        peers.environment_python(tmp_path, peer)
    assert str(caught.value) == (
        f"ort: no environment in {tmp_path}/ort; make it with: "
        f"python -m edgecomp.benchmarks.compression --peers {tmp_path} --make-peers ort"
    )
    with pytest.raises(TargetError, match="name their folder with --peers DIR"):
        peers.environment_python(None, peer)
    (tmp_path / "ort").mkdir()
    for text, what in (("{", "no environment"), ('{"requirements_sha256": "0"}', "an environment of other versions")):
        (tmp_path / "ort" / peers.READY).write_text(text)
        with pytest.raises(TargetError, match=f"ort: {what} in"):
            peers.environment_python(tmp_path, peer)
    with pytest.raises(UsageError, match="peer 'tvm' is not known; expected ort, nncf"):
        peers.peer("tvm")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> peers.Peer:
    """A peer without requirements, whose script lies in a folder of its own beside the real entry."""
    home = tmp_path / "scripts"
    home.mkdir()
    (home / "peer_entry.py").write_text(modules()["benchmarks.compression.peer_entry"].read_text("utf-8"))
    (home / "peer_fake.txt").write_text("# needs nothing\n")
    monkeypatch.setattr(peers, "_HERE", home)
    return peers.Peer(name="fake", packages=("numpy",), takes_module=False)


def test_an_environment_is_made_and_found(tmp_path: Path, fake: peers.Peer, capfd: pytest.CaptureFixture[str]) -> None:
    python = peers.make_environment(tmp_path / "env", fake)
    assert peers.environment_python(tmp_path / "env", fake) == python
    made = python.stat().st_ctime_ns
    assert peers.make_environment(tmp_path / "env", fake).stat().st_ctime_ns == made, "made again for nothing"
    (tmp_path / "scripts" / "peer_fake.txt").write_text("numpy==0.0.0.0\n")
    with pytest.raises(TargetError, match="an environment of other versions"):
        peers.environment_python(tmp_path / "env", fake)
    (tmp_path / "scripts" / "peer_fake.txt").write_text("numpy\n")
    with pytest.raises(UsageError, match="expected PACKAGE==VERSION"):
        peers.make_environment(tmp_path / "env", fake)
    assert capfd.readouterr().out == ""


def job(folder: Path) -> dict[str, object]:
    folder.mkdir()
    keys = {"bits": 4, "seed": 3, "options": {"a": 1}, "onnx": "x", "calibration": "c", "test": "t", "network": None}
    return {**keys, "folder": str(folder)}


def test_a_peer_runs_and_answers(tmp_path: Path, fake: peers.Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    # What this process has on its path must not reach the peer's.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "poison"))
    fake.script().write_text(
        "import random, sys\n"
        "def compress(job):\n"
        "    print('working')\n"
        "    poison = any('poison' in p for p in sys.path)\n"
        "    return {'bits': job.bits, 'options': job.options, 'drawn': random.random(), 'poison': poison}\n"
    )
    import random

    answer = peers.run_peer(Path(sys.executable), fake, job(tmp_path / "job"), tmp_path / "log")
    assert answer.pop("versions").keys() == {"numpy"}
    assert answer == {"bits": 4.0, "options": {"a": 1}, "drawn": random.Random(3).random(), "poison": False}
    assert "working" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("raise ValueError('no luck')", r"fake: ended with code 1: ValueError: no luck; all of it is in .*log"),
        ("return {'a': object()}", "fake: ended with code 1: TypeError"),
        ("import os; os._exit(0)", "fake: left no result"),
    ],
)
def test_a_peer_that_fails_is_one_line(tmp_path: Path, fake: peers.Peer, body: str, what: str) -> None:
    fake.script().write_text(f"def compress(job):\n    {body}\n")
    with pytest.raises(TargetError, match=what) as caught:
        peers.run_peer(Path(sys.executable), fake, job(tmp_path / "job"), tmp_path / "log")
    assert "\n" not in str(caught.value)


def test_a_python_that_is_not_there(tmp_path: Path, fake: peers.Peer) -> None:
    with pytest.raises(TargetError, match="cannot start"):
        peers.run_peer(tmp_path / "python", fake, job(tmp_path / "job"), tmp_path / "log")
    assert json.loads((tmp_path / "job" / "job-fake.json").read_text())["packages"] == ["numpy"]
