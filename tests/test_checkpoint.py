"""Interrupted scoring goes on where it was, to the bit; a checkpoint of anything else is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgecomp.errors import BundleError, UsageError
from edgecomp.graph import Array
from edgecomp.plan import Relevance
from edgecomp.pytorch import relevance as relevance_module
from edgecomp.pytorch.checkpoint import Order
from edgecomp.pytorch.propagate import Start
from edgecomp.pytorch.relevance import score
from edgecomp.pytorch.rules import parse_composite
from edgecomp.pytorch.sums import WeightForm
from tests.graphs import GRAPHS, images
from tests.test_architecture import ROOT

GRAPH = GRAPHS["residual"]()
X, Y = images(GRAPH, 20), np.random.default_rng(2).integers(0, 10, 20)
EVERYTHING: dict[str, Any] = {"per_class": True, "per_activation": True}


def batches(n: int = 4) -> list[tuple[Array, Array]]:
    return [(X[i : i + n], Y[i : i + n]) for i in range(0, len(X), n)]


def stopping(after: int) -> Iterator[tuple[Array, Array]]:
    yield from batches()[:after]
    raise KeyboardInterrupt


def content(found: Relevance) -> dict[str, bytes]:
    arrays = {f"{n} {f}": getattr(r, f) for n, r in found.layers.items() for f in r.__dataclass_fields__}
    arrays |= {f"{n} {f}": getattr(r, f) for n, r in found.activations.items() for f in r.__dataclass_fields__}
    if found.per_class is not None:
        arrays |= {f"{n} class": a for n, a in found.per_class.channel.items()}
        arrays["n"] = found.per_class.n_samples
    arrays["conservation"] = np.array(sorted(found.conservation.items()))
    return {name: array.tobytes() for name, array in arrays.items()} | {"rule": found.rule.encode()}


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relevance_module, "CHECKPOINT_IMAGES", 8)


@pytest.mark.parametrize("weights", [None, np.arange(10) % 3], ids=["all", "some classes"])
@pytest.mark.parametrize("after", [0, 1, 2, 3, 5])
def test_what_was_interrupted_goes_on_to_the_same_bits(after: int, weights: Array | None, tmp_path: Path) -> None:
    path = tmp_path / "sums.npz"
    options = {**EVERYTHING, "class_weights": weights}
    expected = score(GRAPH, batches(), **options)
    with pytest.raises(KeyboardInterrupt):
        score(GRAPH, stopping(after), checkpoint=path, **options)
    assert path.exists() == (after >= 2)
    seen: list[int] = []
    found = score(GRAPH, batches(), checkpoint=path, progress=seen.append, **options)
    kept = after // 2 * 8
    assert seen == ([kept] if kept else []) + [4] * ((20 - kept) // 4)
    assert content(found) == content(expected)
    assert found.n_samples == expected.n_samples
    # Finished work is kept as well: a third run explains nothing.
    seen.clear()
    assert content(score(GRAPH, batches, checkpoint=path, progress=seen.append, **options)) == content(expected)
    assert seen == [20]
    assert [p.name for p in tmp_path.iterdir()] == ["sums.npz"]


def test_other_batch_sizes_may_go_on(tmp_path: Path) -> None:
    path = tmp_path / "sums.npz"
    with pytest.raises(KeyboardInterrupt):
        score(GRAPH, stopping(3), checkpoint=path, dtype=torch.float64)
    found = score(GRAPH, batches(3), checkpoint=path, dtype=torch.float64)
    expected = score(GRAPH, batches(20), dtype=torch.float64)
    for name, layer in expected.layers.items():
        np.testing.assert_allclose(found.layers[name].channel, layer.channel, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.layers[name].weight, layer.weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"composite": parse_composite("plus")}, "was written with composite"),
        ({"composite": parse_composite("epsilon:0.1")}, "was written with composite"),
        ({"start": Start.ONE}, "was written with rule epsilon 1e-06, now it is epsilon 1e-06; start one"),
        ({"weight_form": WeightForm.RULE}, "was written with rule"),
        ({"class_weights": np.ones(10)}, "was written with class weights"),
        ({"dtype": torch.float64}, "was written with options"),
        ({"per_class": True}, "was written with options"),
        ({"graph": GRAPHS["residual"](9)}, "was written with graph"),
        ({"batches": batches()[::-1]}, "other images, or another order of them"),
        ({"batches": [(X + 1, Y)]}, "other images"),
        ({"batches": [(X, (Y + 1) % 10)]}, "other images"),
        ({"batches": batches()[:2]}, "other images"),
    ],
)
def test_a_checkpoint_of_other_work_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "sums.npz"
    score(GRAPH, batches(), checkpoint=path)
    before = path.read_bytes()
    options = {"graph": GRAPH, "batches": batches(), **change}
    with pytest.raises(UsageError, match=message) as caught:
        score(checkpoint=path, **options)
    assert "\n" not in str(caught.value)
    assert "delete it, or name another" in str(caught.value)
    assert path.read_bytes() == before


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


def pickled(data: bytes) -> bytes:
    import pickle

    return pickle.dumps({"made_of": 1})


def other_compression(data: bytes) -> bytes:
    """Set the compression method of every member to one that there is not; numpy's reader does not expect it."""
    for header, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        start = 0
        while (start := data.find(header, start)) >= 0:
            data = data[: start + at] + b"\x63\x00" + data[start + at + 2 :]
            start += 4
    return data


@pytest.mark.parametrize(
    "damage", [cut, flip, pickled, other_compression, lambda data: b"", lambda data: b"PK\x03\x04"]
)
def test_a_damaged_checkpoint_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "sums.npz"
    score(GRAPH, batches(), checkpoint=path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BundleError, match="is damaged") as caught:
        score(GRAPH, batches(), checkpoint=path)
    assert "\n" not in str(caught.value)


def test_sums_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sums.npz"
    score(GRAPH, batches(), checkpoint=path)
    arrays = dict(np.load(path))
    name = next(name for name in arrays if name.startswith("sum channels"))
    np.savez(path, **{**arrays, name: arrays[name][:, :-1]})
    with pytest.raises(BundleError, match=r"channels .* is damaged: torch.float64"):
        score(GRAPH, batches(), checkpoint=path)


def test_the_order_of_images_has_one_digest_however_they_are_cut() -> None:
    digests = []
    for n in (1, 7, 20):
        order = Order()
        for x, y in batches(n):
            order.add(x, y)
        digests.append((order.n_images, order.digest()))
    assert digests[0] == digests[1] == digests[2]
    assert digests[0][0] == 20


CHILD = """
import sys
from pathlib import Path
from edgecomp.pytorch import relevance
from tests.test_checkpoint import GRAPH, X, Y
relevance.CHECKPOINT_IMAGES = 1
many = ((X[i % 20 : i % 20 + 1], Y[i % 20 : i % 20 + 1]) for i in range(10**9))
relevance.score(GRAPH, many, checkpoint=Path(sys.argv[1]))
"""


def test_a_killed_run_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "sums.npz"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], cwd=ROOT, env={**os.environ, "PYTHONPATH": "."})
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until
        assert child.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    many = [(X[i % 20 : i % 20 + 1], Y[i % 20 : i % 20 + 1]) for i in range(10_000)]
    seen: list[int] = []

    def stop_at_two(n: int) -> None:
        seen.append(n)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(GRAPH, many, checkpoint=path, progress=stop_at_two)
    assert seen[0] >= 1
    assert seen[1] == 1
