"""CIFAR-10 batches written by every protocol, some by hand, and pickles that must not run."""

from __future__ import annotations

import os
import pickle
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp.data import load
from tests.sources import Files, damaged, loads_or_is_refused, pixels, refuse, write

PLANES = pixels(5, 6, 2, 3, 32, 32)  # six batches of two images
CIFAR_LABELS = [[2 * i % 10, (2 * i + 1) % 10] for i in range(6)]
BATCHES = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]


def batch(i: int) -> dict[Any, Any]:
    return {"data": PLANES[i].reshape(2, 3072), "labels": CIFAR_LABELS[i], "filenames": ["a.png", "b.png"]}


def python2_batch(i: int) -> bytes:
    """Opcode by opcode what Python 2 wrote in the original files: text as bytes, numpy 1's names."""
    raw: bytes = PLANES[i].tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"  # the empty array
        b"(K\x01(K\x02M\x00\x0ctcnumpy\ndtype\n(U\x02u1K\x00K\x01tR"  # version, shape (2, 3072), dtype u1
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    )
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in CIFAR_LABELS[i]) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + labels + b"U\x0bbatch_labelU\x01au."


def pickled(protocol: int, *, keys: Callable[[str], Any] = str, labels: Callable[..., Any] = list) -> Files:
    files = {}
    for i, name in enumerate(BATCHES):
        fields = {keys(key): value for key, value in batch(i).items()}
        fields[keys("labels")] = labels(CIFAR_LABELS[i])
        files["cifar-10-batches-py/" + name] = pickle.dumps(fields, protocol=protocol)
    return files


CIFAR = {
    "python 2": {"cifar-10-batches-py/" + name: python2_batch(i) for i, name in enumerate(BATCHES)},
    **{f"protocol {protocol}": pickled(protocol) for protocol in (0, 2, 4, 5)},
    "bytes as keys": pickled(2, keys=str.encode),
    "labels as an array": pickled(2, labels=lambda labels: np.array(labels, np.uint8)),
    "binary": {
        f"cifar-10-batches-bin/{name}.bin": b"".join(
            bytes([CIFAR_LABELS[i][k]]) + PLANES[i, k].tobytes() for k in range(2)
        )
        for i, name in enumerate(BATCHES)
    },
}


@pytest.mark.parametrize("files", CIFAR.values(), ids=list(CIFAR))
def test_cifar_batches(tmp_path: Path, files: Files) -> None:
    write(tmp_path, files)
    got = load(f"cifar10:{tmp_path}")
    np.testing.assert_array_equal(got.train.images, PLANES[:5].reshape(10, 3, 32, 32).transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(got.test.images, PLANES[5].transpose(0, 2, 3, 1))
    assert got.train.labels.tolist() == [label for labels in CIFAR_LABELS[:5] for label in labels]
    assert got.test.labels.tolist() == CIFAR_LABELS[5]
    assert (len(got.classes), got.classes[3]) == (10, "cat")


class Runs:
    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_malicious_pickle_does_not_run(tmp_path: Path, protocol: int) -> None:
    write(tmp_path, pickled(2))
    mark = tmp_path / "ran"
    for i, attack in enumerate(
        (Runs(os.mkdir, str(mark)), Runs(eval, f"__import__('os').mkdir({str(mark)!r})"), Runs(np.save, str(mark), [1]))
    ):
        content = pickle.dumps({**batch(0), "labels": attack}, protocol=protocol)
        (tmp_path / "cifar-10-batches-py" / BATCHES[i]).write_bytes(content)
        refuse(f"cifar10:{tmp_path}", f"{BATCHES[i]}: the pickle asks for '.*', which a CIFAR-10 batch has no use for")
        assert not list(tmp_path.glob("ran*"))
        write(tmp_path, pickled(2))


def test_the_attack_would_have_worked(tmp_path: Path) -> None:
    """Else the test above proves nothing."""
    pickle.loads(pickle.dumps(Runs(os.mkdir, str(tmp_path / "ran"))))
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a CIFAR-10 batch with data and labels: EOFError"),
        (b"garbage", "is not a CIFAR-10 batch"),
        (python2_batch(0)[:-3000], "is not a CIFAR-10 batch"),
        (pickle.dumps([1, 2]), "is not a CIFAR-10 batch"),
        (pickle.dumps({"data": batch(0)["data"]}), "is not a CIFAR-10 batch with data and labels: KeyError: 'labels'"),
        (pickle.dumps({**batch(0), "data": [1, 2]}), r"data has shape \(0,\), expected uint8 \(N, 3072\)"),
        (pickle.dumps({**batch(0), "data": PLANES[0]}), r"data has shape \(2, 3, 32, 32\)"),
        (pickle.dumps({**batch(0), "data": batch(0)["data"] * 1.0}), "data is of type 'f8', expected uint8"),
        (pickle.dumps({**batch(0), "data": np.asfortranarray(batch(0)["data"])}), "expected uint8 in C order"),
        (pickle.dumps({**batch(0), "labels": [1]}), "train: 10 images and 9 labels"),
        (pickle.dumps({**batch(0), "labels": [1, 10]}), "train: label 10 is out of range, expected 0 to 9"),
        (pickle.dumps({**batch(0), "labels": [1, -1]}), "train: label -1 is out of range"),
        (pickle.dumps({**batch(0), "labels": [1, 2.5]}), "train: labels are float64"),
        (pickle.dumps({**batch(0), "labels": [[1], [2, 3]]}), "is not a CIFAR-10 batch"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00bz2\x86R.", "asks for the codec 'bz2'"),
    ],
)
def test_cifar_pickle_that_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path, {**pickled(2), "cifar-10-batches-py/data_batch_3": content})
    refuse(f"cifar10:{tmp_path}", message)


def test_a_large_memo_index_takes_no_memory(tmp_path: Path) -> None:
    """Eight bytes make C's unpickler reserve 16 bytes for each of 16 million indices, and up to 64 GB with more."""
    write(tmp_path, {**pickled(2), "cifar-10-batches-py/data_batch_1": b"\x80\x02K\x01r\xff\xff\xff\x00."})
    tracemalloc.start()
    refuse(f"cifar10:{tmp_path}", "data_batch_1 is not a CIFAR-10 batch")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


@settings(max_examples=200, deadline=None)
@given(draw_from=st.data())
def test_damaged_cifar_pickle_gives_a_data_error_or_a_set(draw_from: st.DataObject) -> None:
    content = pickled(4)["cifar-10-batches-py/test_batch"]
    start = content.index(PLANES[5].tobytes())
    # All but the pixels, where another bit changes nothing.
    ends = damaged(draw_from, content[:start] + content[start + 6144 :])
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), pickled(2))
        Path(folder, "cifar-10-batches-py/test_batch").write_bytes(ends[:start] + PLANES[5].tobytes() + ends[start:])
        loads_or_is_refused(f"cifar10:{folder}")


@pytest.mark.parametrize("n_bytes", [0, 1, 3072, 2 * 3073 - 1])
def test_cifar_binary_that_is_wrong(tmp_path: Path, n_bytes: int) -> None:
    write(tmp_path, {**CIFAR["binary"], "cifar-10-batches-bin/test_batch.bin": bytes(n_bytes)})
    refuse(f"cifar10:{tmp_path}", f"test_batch.bin has {n_bytes} bytes, expected a multiple of 3073")


def test_cifar_missing_batch(tmp_path: Path) -> None:
    write(tmp_path, CIFAR["python 2"])
    (tmp_path / "cifar-10-batches-py/data_batch_4").unlink()
    refuse(f"cifar10:{tmp_path}", "data_batch_4: No such file")
