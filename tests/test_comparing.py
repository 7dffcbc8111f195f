"""The comparison at work on a tiny network: our methods against `edgecomp build`, a peer in a process, resumption."""

from __future__ import annotations

import dataclasses
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from edgecomp import cli
from edgecomp.benchmarks.compression import __main__ as command
from edgecomp.benchmarks.compression import driver, methods, ours, peers
from edgecomp.benchmarks.compression.context import Context, Subject
from edgecomp.benchmarks.compression.results import Compressed, Simulated, Source, Task
from edgecomp.build import yardsticks
from edgecomp.check import measure_accuracy
from edgecomp.data import draw, load
from edgecomp.errors import BudgetError, TargetError, UsageError
from edgecomp.preprocessing import Preprocessing
from edgecomp.quantmath import Grid
from tests.onnx_run import onnx_run
from tests.test_architecture import modules
from tests.tiny import Place

SUBJECT = Subject(
    model="tinymodels:tiny",
    weights=Path("tiny.pt"),
    data="npz:data.npz",
    preprocessing=Preprocessing(mean=(0.0,), std=(1.0,)),
    n_calibration=64,
)
FLOAT = methods.METHODS["float"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    (tmp_path / "user").mkdir()
    return Place(tmp_path / "user", monkeypatch)


def test_a_peer_can_load_our_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their file alone, as `peer_entry` does where edgecomp is not installed."""
    file = modules()["pytorch.networks"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "edgecomp"]:
        monkeypatch.setitem(sys.modules, name, None)
    names = runpy.run_path(str(file))
    assert sum(p.numel() for p in names["vgg16_bn_cifar"]().parameters()) > 14_000_000


@pytest.fixture(autouse=True)
def plain_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand for matplotlib, which is tested in test_compression."""
    monkeypatch.setattr(driver, "check_matplotlib", lambda: None)
    monkeypatch.setattr(driver, "svg", lambda rows, title: f"<svg>{len(rows)} {title}</svg>".encode())


def expected_accuracy() -> float:
    """What torch itself says of the tiny network."""
    import tinymodels

    model = tinymodels.tiny().eval()
    model.load_state_dict(torch.load("tiny.pt", weights_only=True))
    with np.load("data.npz") as data, torch.no_grad():
        x = torch.from_numpy(data["x_test"][:, None].astype(np.float32) / np.float32(255))
        return 100 * float((model(x).argmax(1).numpy() == data["y_test"]).mean())


def method(name: str, run: methods.Run, asks: methods.Asks = methods.Asks.BITS) -> methods.Method:
    return methods.Method(name=name, asks=asks, run=run)


def compare(which: list[methods.Method], folder: Path, **options: object) -> driver.Compared:
    settings = {"bits": [4.0], "seeds": [0], "order": ["float"], **options}
    return driver.compare(Context(SUBJECT), which, folder=folder, **settings)  # type: ignore[arg-type]


# ---- our methods -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "seed"), [(4.0, 0), (2.5, 1)])
def test_the_default_writes_the_file_of_a_build(place: Place, bits: float, seed: int) -> None:
    arguments = [*place.command(), "--format", "onnx", "--avg-bits", str(bits), "--seed", str(seed)]
    assert cli.main(arguments) == 0
    made = ours.OURS["edgecomp"](Context(SUBJECT), bits, seed)
    assert made.file == Path("out/model.onnx").read_bytes()


def test_uniform_at_eight_bits_is_the_yardstick(place: Place) -> None:
    context = Context(SUBJECT)
    plan = ours._uniform_plan(context, 3, 0)
    made = ours.OURS["uniform-nearest"](context, 8, 0)
    # The same codes and scales; the yardstick also spells out what a runtime can compute when it loads the file.
    yardstick = yardsticks(plan, context.graph, "onnx")["int8"].data
    assert made.file is not None
    x = np.random.default_rng(0).standard_normal((16, 1, 8, 8)).astype(np.float32)
    np.testing.assert_equal(onnx_run(made.file, {"input": x}), onnx_run(yardstick, {"input": x}))
    stored = [
        {t.name: t.raw_data for t in onnx.load_from_string(data).graph.initializer if not t.name.startswith("#")}
        for data in (made.file, yardstick)
    ]
    assert stored[0] == stored[1]
    assert set(made.details["bits"].values()) == {8}
    reconstructed = ours.OURS["uniform"](context, 3, 0)
    assert set(reconstructed.details["bits"].values()) == {3}
    assert reconstructed.file != ours.OURS["uniform-nearest"](context, 3, 0).file


def test_what_belongs_to_a_seed_is_made_once(place: Place) -> None:
    context = Context(SUBJECT)
    assert context.ranges(0) is context.ranges(0)
    relevance, labels = context.scored(1, "lrp"), context.calibration(1).labels
    assert context.scored(1, "lrp") is relevance
    images = load(SUBJECT.data).train
    expected = draw(images, 64, seed=1)
    assert np.array_equal(np.concatenate(context.batches(1)), expected.inputs(SUBJECT.preprocessing))
    assert np.array_equal(labels, expected.labels)
    assert relevance.n_samples == 64
    assert not np.array_equal(context.batches(2)[0], context.batches(1)[0])


def test_scores_that_choose_the_same_grids_share_a_file_and_its_measure(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, asked = Context(SUBJECT), []
    grids = {node.name: Grid(bits=3) for node in context.graph.layers()}
    made = ours._on_grids(context, grids, 0)
    assert ours._on_grids(context, dict(reversed(grids.items())), 0) is made
    other = ours._on_grids(context, {**grids, next(iter(grids)): Grid(bits=2)}, 0)
    assert other.file != made.file
    assert ours._on_grids(context, grids, 1).file != made.file

    def counted(data: bytes, *rest: object) -> tuple[float, int]:
        asked.append(data)
        return measure_accuracy(data, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(driver, "measure_accuracy", counted)
    files = {"one": made, "same": made, "other": other}
    which = [method(name, lambda c, t, p: files[t.method]) for name in files]
    results = compare(which, Path("compared")).results
    assert asked == [made.file, other.file]
    found = {task.method: result for task, result in results.items()}
    assert found["one"].accuracy_percent == found["same"].accuracy_percent
    assert found["one"].sha256 == found["same"].sha256 != found["other"].sha256


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_the_tasks_of_each_kind_of_method() -> None:
    def none(context: Context, task: Task, place: methods.Place) -> methods.Made:
        raise AssertionError

    bits, seeds = [2.0, 2.5], [0, 1]
    tasks = {asks: [(t.bits, t.seed) for t in method("m", none, asks).tasks(bits, seeds)] for asks in methods.Asks}
    assert tasks == {
        methods.Asks.BITS: [(2.0, 0), (2.5, 0), (2.0, 1), (2.5, 1)],
        methods.Asks.WHOLE_BITS: [(2.0, 0), (2.0, 1)],
        methods.Asks.NOTHING: [(None, 0), (None, 1)],
    }
    assert FLOAT.tasks(bits, [5, 6]) == [Task(method="float", bits=None, seed=0)]
    names = [m.name for m in methods.chosen(["uniform", "ort-int8", "edgecomp"])]
    assert names == ["float", "edgecomp", "uniform", "ort-int8"]
    with pytest.raises(UsageError, match="method 'magic' is not known; expected some of float, edgecomp"):
        methods.chosen(["magic"])


def test_bits_in_names_do_not_collide() -> None:
    tasks = [Task(method="m", bits=b, seed=s) for b in (None, 2.0, 2.5, 3.0) for s in (0, 1, 10)]
    assert len({task.name() for task in tasks}) == len(tasks)


# ---- the driver ------------------------------------------------------------------------------------------------------


def test_what_is_done_is_not_done_again(place: Place) -> None:
    ran: list[Task] = []

    def copy(context: Context, task: Task, place: methods.Place) -> methods.Made:
        if task == stop:
            raise KeyboardInterrupt
        ran.append(task)
        return Compressed(file=context.float_file)

    stop = Task(method="copy", bits=4.0, seed=1)
    which, folder = [FLOAT, method("copy", copy)], Path("results")
    options = {"bits": [2.0, 4.0], "seeds": [0, 1, 2]}
    with pytest.raises(KeyboardInterrupt):
        compare(which, folder, **options)
    assert [(t.bits, t.seed) for t in ran] == [(2.0, 0), (4.0, 0), (2.0, 1)]
    assert not (folder / driver.TABLE).exists()
    ran.clear()
    stop, begun = Task(method="none", bits=None, seed=0), []
    compared = compare(which, folder, began=lambda task, number, count: begun.append((number, count)), **options)
    assert [(t.bits, t.seed) for t in ran] == [(4.0, 1), (2.0, 2), (4.0, 2)]
    assert begun == [(0, 3), (1, 3), (2, 3)]
    assert compared.failures == ()
    assert len(compared.results) == 7
    assert {r.accuracy_percent for r in compared.results.values()} == {expected_accuracy()}
    assert {r.n_bytes for r in compared.results.values()} == {len(Context(SUBJECT).float_file)}
    assert {r.source for r in compared.results.values()} == {Source.FILE}
    assert (folder / driver.TABLE).read_text() == compared.table
    assert (folder / driver.PLOT).read_bytes().startswith(b"<svg>3 ")
    ran.clear()
    compare(which, folder, again=["copy"], keep_files=True, **options)
    assert len(ran) == 6
    kept = sorted(path.name for path in (folder / driver.FILES).iterdir())
    assert kept == sorted(f"{task.name()}.onnx" for task in ran)


def test_a_finished_table_needs_no_model(place: Place) -> None:
    compare([FLOAT], Path("results"))

    class Untouchable(Context):
        images = property(lambda self: pytest.fail("read the images for nothing"))  # type: ignore[assignment]

    compared = driver.compare(
        Untouchable(SUBJECT), [FLOAT], bits=[4.0], seeds=[0], folder=Path("results"), order=["float"]
    )
    assert len(compared.results) == 1


def test_a_method_that_fails_does_not_stop_the_others(place: Place) -> None:
    def fail(context: Context, task: Task, place: methods.Place) -> methods.Made:
        raise BudgetError("too little")

    def misfit(context: Context, task: Task, place: methods.Place) -> methods.Made:
        return Simulated(n_bytes=1, logits=np.zeros((3, 4)), versions={"tool": "1"})

    compared = compare([method("fail", fail), method("misfit", misfit), FLOAT], Path("results"))
    reasons = [(failure.task.method, failure.reason) for failure in compared.failures]
    misfits = "misfit-4-0: outputs (3, 4), expected one row for each of 200"
    assert reasons == [("fail", "too little"), ("misfit", misfits)]
    assert [task.method for task in compared.results] == ["float"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"bits": [4, 0.05]}, "--bits 0.05: expected 0.1 to 8"),
        ({"bits": [float("nan")]}, "--bits nan: expected 0.1 to 8"),
        ({"seeds": []}, "--seeds : expected whole numbers from 0"),
        ({"seeds": [-1]}, "--seeds -1"),
    ],
)
def test_numbers_out_of_range_are_refused(place: Place, options: dict[str, object], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        compare([FLOAT], Path("results"), **options)
    assert not Path("results").exists()


def test_another_checkpoint_is_another_experiment(place: Place) -> None:
    compare([FLOAT], Path("results"))
    other = dataclasses.replace(SUBJECT, weights=Path("wide.pt"))
    with pytest.raises(UsageError, match=r"weights_sha256 is .* choose another -o"):
        driver.compare(Context(other), [FLOAT], bits=[4.0], seeds=[0], folder=Path("results"), order=[])
    with pytest.raises(UsageError, match=r"--weights none\.pt: No such file"):
        dataclasses.replace(SUBJECT, weights=Path("none.pt")).to_json()


# ---- peers -----------------------------------------------------------------------------------------------------------

SCRIPT = '''
def compress(job):
    images, labels = job.calibration()
    details = {"seen": [len(images), len(labels)], "batches": [len(b) for b in job.batches(40)], "bits": job.bits}
    details["took"] = job.onnx.name
    if job.options["simulate"]:
        module = job.module()
        return {"logits": job.save_logits(module), "n_bytes": 1234, "details": details}
    (job.folder / "model.onnx").write_bytes(job.onnx.read_bytes())
    return {"file": "model.onnx", "details": details}
'''


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two peers whose environment is this process's own, with a real script."""
    home = tmp_path / "scripts"
    home.mkdir()
    (home / "peer_entry.py").write_text(modules()["benchmarks.compression.peer_entry"].read_text("utf-8"))
    monkeypatch.setattr(peers, "_HERE", home)
    for name, takes_module in (("copier", False), ("simulator", True)):
        (home / f"peer_{name}.py").write_text(SCRIPT)
        monkeypatch.setitem(peers.PEERS, name, peers.Peer(name=name, packages=("numpy",), takes_module=takes_module))
    monkeypatch.setattr(methods, "environment_python", lambda folder, which: Path(sys.executable))


def test_peers_are_measured_as_we_are(place: Place, scripted: None) -> None:
    copier = methods.Step(peer="copier", options={"simulate": False})
    simulator = methods.Step(peer="simulator", options={"simulate": True})
    which = [
        method("copied", methods._by_peers(copier, copier), methods.Asks.NOTHING),
        method("simulated", methods._by_peers(simulator)),
        FLOAT,
    ]
    compared = compare(which, Path("results"), seeds=[1])
    assert compared.failures == ()
    by_method = {task.method: result for task, result in compared.results.items()}
    copied, simulated = by_method["copied"], by_method["simulated"]
    assert copied.sha256 == by_method["float"].sha256
    assert copied.accuracy_percent == simulated.accuracy_percent == expected_accuracy()
    assert (simulated.source, simulated.n_bytes, simulated.sha256) == (Source.SIMULATED, 1234, None)
    assert simulated.measured_in == f"numpy {np.__version__}"
    assert simulated.details == {"seen": [64, 64], "batches": [40, 24], "bits": 4.0, "took": "float.onnx"}
    assert copied.details["bits"] == 8
    assert copied.details["took"] == "model.onnx", "the second step takes what the first wrote"
    assert "*simulated*" in compared.table


def test_an_answer_that_lacks_something(place: Place, scripted: None, tmp_path: Path) -> None:
    (tmp_path / "scripts" / "peer_copier.py").write_text("def compress(job):\n    return {'file': 'model.onnx'}\n")
    run = methods._by_peers(methods.Step(peer="copier"))
    (failure,) = compare([method("broken", run)], Path("results")).failures
    assert failure.reason.startswith("broken-4-0: the answer lacks 'details'; its output is in")


def test_missing_environments_are_said_before_anything_runs(place: Place) -> None:
    with pytest.raises(TargetError, match="mct: no environment in"):
        compare(methods.chosen(["mct"]), Path("results"), peers=Path("nowhere"))
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("model", "what"),
    [("json:loads", None), ("sys:exit", "no .py file"), ("nowhere:f", "no .py file"), ("net.pt2", "take a .pt2")],
)
def test_what_peers_can_be_handed(place: Place, tmp_path: Path, model: str, what: str | None) -> None:
    context = Context(dataclasses.replace(SUBJECT, model=model))
    (tmp_path / "weights.npz").write_bytes(b"there")
    if what is None:
        network = context._network(tmp_path / "weights.npz")
        assert Path(network["file"]).name == "__init__.py"
        assert network["factory"] == "loads"
    else:
        with pytest.raises(UsageError, match=what):
            context._network(tmp_path / "weights.npz") if not model.endswith(".pt2") else context.module


# ---- the command -----------------------------------------------------------------------------------------------------

ARGUMENTS = ["--model", "tinymodels:tiny", "--weights", "tiny.pt", "--data", "npz:data.npz", "--calib", "64"]


def test_the_command_prints_the_table(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*ARGUMENTS, "--methods", "uniform-nearest", "--bits", "3", "2.5", "--seeds", "0", "-o", "results"]
    assert command.main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == Path("results/table.md").read_text("utf-8")
    assert [line.split()[1] for line in printed.out.splitlines()[2:4]] == ["float", "uniform-nearest"]
    assert printed.err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        ([], 2, "--model is missing"),
        ([*ARGUMENTS], 2, "--output is missing"),
        ([*ARGUMENTS, "--methods", "magic", "-o", "r"], 2, "'magic' is not known"),
        ([*ARGUMENTS, "--methods", "ort-int8", "-o", "r"], 6, "name their folder with --peers DIR"),
        ([*ARGUMENTS, "--methods", "mct", "--peers", "p", "-o", "r"], 6, "--peers p --make-peers mct"),
        (["--make-peers"], 2, "needs --peers DIR"),
        (["--make-peers", "tvm", "--peers", "p"], 2, "peer 'tvm' is not known"),
        ([*ARGUMENTS, "--calib", "0", "-o", "r"], 2, "--calib 0"),
    ],
)
def test_errors_are_one_line(
    place: Place, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, what: str
) -> None:
    assert command.main(arguments) == code
    printed = capsys.readouterr()
    assert what in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_failure_is_said_below_the_table(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(context: Context, task: Task, place: methods.Place) -> methods.Made:
        raise BudgetError("too little\nreally")

    monkeypatch.setitem(methods.METHODS, "uniform", method("uniform", fail))
    assert command.main([*ARGUMENTS, "--methods", "uniform", "--seeds", "0", "-o", "results"]) == command.FAILED
    printed = capsys.readouterr()
    assert "| float" in printed.out
    assert printed.err == "python -m edgecomp.benchmarks.compression: uniform-4-0: too little really\n"


def test_sigterm_ends_the_peer_too(place: Place) -> None:
    """A process of the command, sent SIGTERM while a peer works, leaves no peer behind and says how to go on."""
    code = f"""
import sys
from edgecomp.benchmarks.compression import __main__ as command, driver, methods
driver.check_matplotlib = lambda: None
def wait(context, task, place):
    import subprocess
    subprocess.run([sys.executable, "-c", "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"])
methods.METHODS["uniform"] = methods.Method(name="uniform", asks=methods.Asks.BITS, run=wait)
raise SystemExit(command.main({[*ARGUMENTS, "--methods", "uniform", "-o", "results"]!r}))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(modules()["edgecomp"].parents[1]), os.getcwd()])}
    pid = Path("pid")
    with subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED
    assert said == "python -m edgecomp.benchmarks.compression: interrupted; the same command goes on where it was\n"
    # It is gone, or dead and not yet fetched by its new parent.
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"
    assert [path.name for path in Path("results/results").iterdir()] == ["float-own-0.json"]
