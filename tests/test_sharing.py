"""Two processes under torchrun against one: the same scores and ranges, in both of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edgecomp.pytorch import sums
from edgecomp.pytorch.sharing import all_max, all_sum, join, place, shard
from tests.sharing_run import findings
from tests.test_architecture import ROOT


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    env = {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_two_processes_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = torchrun("-m", "tests.sharing_run", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"found-0-of-2.npz", "found-1-of-2.npz", "sums.npz.0-of-2", "sums.npz.1-of-2"}
    monkeypatch.setattr(sums, "_WIDE_ELEMENTS", 100)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two have: ranges must be equal to the bit, whatever sums do
    try:
        expected = findings(None)
    finally:
        torch.set_num_threads(n_threads)
    both = [dict(np.load(tmp_path / f"found-{rank}-of-2.npz")) for rank in (0, 1)]
    assert both[0].keys() == both[1].keys() == expected.keys()
    for name, value in expected.items():
        assert both[0][name].tobytes() == both[1][name].tobytes(), name
        largest = np.abs(value).max()
        # Sums of float32 products: with another number of threads the last bit of the largest differs.
        np.testing.assert_allclose(both[0][name], value, rtol=1e-6, atol=1e-6 * largest, err_msg=name)
        if name.startswith(("ranges", "one batch")):
            assert both[0][name].tolist() == value.tolist()


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
