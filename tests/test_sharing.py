"""Two processes under torchrun against one: the same scores, ranges, updates and plans; one writes and speaks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgecomp.cli import main
from edgecomp.pytorch import finetune, sums
from edgecomp.pytorch.sharing import all_max, all_sum, join, place, shard
from tests.graphs import plain
from tests.sharing_run import BUILDS, MODEL, RATE, REFUSED, built, findings, tuned
from tests.test_architecture import ROOT
from tests.test_finetune import rounded
from tests.tiny import Place


def torchrun(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes did all that `sharing_run` does."""
    with pytest.MonkeyPatch.context() as patch:
        folder = Place(tmp_path_factory.mktemp("two"), patch).folder
        (folder / "data-0.npz").write_bytes((folder / "data.npz").read_bytes())
        done = torchrun("-m", "tests.sharing_run", str(folder))
        assert done.returncode == 0, done.stderr[-3000:]
        return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As each of the two has: with another number of threads the last bits of float32 sums differ."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.usefixtures("one_thread")
def test_two_processes_find_what_one_finds(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {path.name for path in two.glob("sums*")} == {"sums.npz.0-of-2", "sums.npz.1-of-2"}
    monkeypatch.setattr(sums, "_WIDE_ELEMENTS", 100)
    expected = findings(None)
    both = [dict(np.load(two / f"found-{rank}-of-2.npz")) for rank in (0, 1)]
    assert both[0].keys() == both[1].keys() == expected.keys()
    for name, value in expected.items():
        assert both[0][name].tobytes() == both[1][name].tobytes(), name
        largest = np.abs(value).max()
        # Sums of float32 products: with another number of threads the last bit of the largest differs.
        np.testing.assert_allclose(both[0][name], value, rtol=1e-6, atol=1e-6 * largest, err_msg=name)
        if name.startswith(("ranges", "one batch")):
            assert both[0][name].tolist() == value.tolist()


@pytest.mark.usefixtures("one_thread")
def test_two_processes_train_as_one(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "_WEIGHT_RATE", RATE)
    monkeypatch.setattr(finetune, "_multiplies_halves", lambda device: False)  # rounding of 2^-9 would hide much
    start = rounded(plain(), 4)[0]
    expected = tuned(tmp_path / "one")
    both = [dict(np.load(two / f"tuned-{rank}-of-2.npz")) for rank in (0, 1)]
    assert both[0].pop("divergences").tolist() == both[1].pop("divergences").tolist()
    for name, found in both[0].items():
        assert found.tobytes() == both[1][name].tobytes(), name
        value, before = expected.graph.tensors[name].data, start.tensors[name].data
        assert value is not None
        assert before is not None
        assert np.abs(value - before).max() > 1e-3, name
        np.testing.assert_allclose(found, value, rtol=0, atol=1e-6, err_msg=name)
    # Only the first has written, and one process goes on from what two have done: nothing is left to do.
    assert [path.name for path in two.glob("tuned*recover")] == ["tuned-0.recover"]
    again = tuned(two / "tuned-0.recover")
    assert all(t.data is None or t.data.tobytes() == both[0][n].tobytes() for n, t in again.graph.tensors.items())


def runs(two: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Each build of two processes: its name, what the first said, what the other said."""
    both = [json.loads((two / f"built-{rank}-of-2.json").read_text()) for rank in (0, 1)]
    yield from zip([*BUILDS, *REFUSED], *both, strict=True)


@pytest.mark.usefixtures("one_thread")
def test_two_processes_build_what_one_builds(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {path.name for path in two.iterdir() if path.is_dir()} - {"__pycache__"} == set(BUILDS)
    assert not list(two.glob(".*"))
    for (name, first, other), arguments in zip(runs(two), BUILDS.values(), strict=False):
        assert first["code"] == other["code"] == 0, (name, first)
        assert first["out"].count("model.onnx") == 1
        assert (first["err"], other["err"], other["out"]) == ("", "", "")
        monkeypatch.chdir(two)
        monkeypatch.syspath_prepend(str(two))
        assert built(arguments, f"{name}-by-one")["code"] == 0
        plans = [json.loads((two / f"{name}{by}" / "plan.json").read_text()) for by in ("", "-by-one")]
        if "--recover" in arguments:
            for plan in plans:  # its weights are the same but for rounding
                plan.pop("graph_digest")
                assert plan["made_by"].pop("recovery").startswith("1 epochs of 175 images")
        assert plans[0] == plans[1], name


def test_what_is_refused_is_refused_by_both_and_told_once(two: Path) -> None:
    expected = {"plain": (2, "is there already"), "small": (3, "budget: "), "without": (2, "process 1: npz:data-1.npz")}
    for name, first, other in list(runs(two))[len(BUILDS) :]:
        code, found = expected[name]
        assert (first["code"], other["code"]) == (code, code)
        assert first["err"].startswith("edgecomp: ")
        assert first["err"].count("\n") == 1
        assert found in first["err"]
        assert (first["out"], other["out"], other["err"]) == ("", "", "")


def test_a_refused_build_ends_all_processes(two: Path) -> None:
    """Through torchrun as a user calls it; it ends by itself, and of all that torchrun says one line is ours."""
    command = ["--log-dir", str(two / "logs"), "--tee", "3", "-m", "edgecomp", "build", *MODEL, *BUILDS["plain"]]
    done = torchrun(*command, "-o", str(two / "plain"), folder=two)
    assert done.returncode == 1
    said = {path.parent.name: path.read_text() for path in two.glob("logs/*/attempt_0/*/stderr.log")}
    assert said["1"] == ""
    assert said["0"].startswith("edgecomp: ")
    assert said["0"].count("\n") == 1
    codes = re.findall(r"exitcode  : (-?\d+)", done.stderr)
    assert codes == ["2", "2"]


def test_other_verbs_are_for_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["verify", "out"]) == 2
    assert capsys.readouterr().err == (
        "edgecomp: verify is the work of one process; of the verbs torchrun shares only build\n"
    )
    monkeypatch.setenv("RANK", "1")
    assert main(["verify", "out"]) == 2
    assert capsys.readouterr().err == ""


def test_a_single_process_keeps_all_batches_and_sums() -> None:
    tensors = [torch.arange(4.0), torch.ones(2, 2, dtype=torch.float64)]
    before = [tensor.clone() for tensor in tensors]
    join()
    assert place() == (0, 1)
    assert list(shard(iter("abc"))) == ["a", "b", "c"]
    all_sum(tensors)
    all_max(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize(("rank", "expected"), [(0, "adg"), (1, "be"), (2, "cf")])
@pytest.mark.parametrize("kind", [list, iter])
def test_each_process_takes_every_nth_batch(
    rank: int, expected: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgecomp.pytorch.sharing.place", lambda: (rank, 3))
    assert "".join(shard(kind("abcdefg"))) == expected
