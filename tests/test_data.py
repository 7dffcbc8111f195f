"""Sources of labelled images, from files made by hand, and the ways in which they can be wrong.

CIFAR-10 and class folders have files of their own, test_cifar and test_imagefolder.
"""

from __future__ import annotations

import gzip
import io
import os
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp import data
from edgecomp.data import DataSet, LabelledImages, draw, load
from edgecomp.errors import DataError, UsageError
from edgecomp.preprocessing import Preprocessing, preprocess
from tests.sources import damaged, loads_or_is_refused, pixels, refuse, write

# --- values ----------------------------------------------------------------------------------------------------------


def test_a_split_is_read_only_and_counts() -> None:
    split = LabelledImages(images=pixels(0, 3, 4, 5), labels=np.array([2, 0, 1], np.uint8))
    assert len(split) == 3
    assert split.images.shape == (3, 4, 5, 1)
    assert split.labels.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        split.images[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        split.labels[0] = 0


def test_inputs_in_batches_are_the_whole() -> None:
    split = LabelledImages(images=pixels(0, 7, 4, 4, 3), labels=np.arange(7))
    p = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), resize=3, pad=1)
    whole = split.inputs(p)
    np.testing.assert_array_equal(whole, preprocess(split.images, p))
    batches = [split.inputs(p, start, start + 3) for start in range(0, 7, 3)]
    assert [len(batch) for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(batches), whole)


def test_take_keeps_images_and_labels_together() -> None:
    split = LabelledImages(images=pixels(0, 5, 2, 2), labels=np.arange(5))
    some = split.take(np.array([4, 0]))
    assert some.labels.tolist() == [4, 0]
    np.testing.assert_array_equal(some.images, split.images[[4, 0]])


IMAGES, LABELS = pixels(0, 4, 6, 6, 3), np.array([0, 1, 0, 1])
FLOATS = np.zeros((4, 3, 6, 6), np.float32)
NAN = FLOATS.copy()
NAN[2, 0, 0, 0] = np.nan

BAD_ARRAYS = {
    "no images": (IMAGES[:0], LABELS[:0], "no images"),
    "no pixels": (IMAGES[:, :0], LABELS, "no images"),
    "lengths differ": (IMAGES, LABELS[:3], "4 images and 3 labels"),
    "double": (FLOATS.astype(np.float64), LABELS, "images are float64"),
    "int64 images": (IMAGES.astype(np.int64), LABELS, "images are int64"),
    "bool images": (IMAGES > 9, LABELS, "images are bool"),
    "rank 2": (IMAGES[:, :, 0, 0], LABELS, r"shape \(4, 6\), expected \(N, H, W, C\) or"),
    "rank 5": (IMAGES[None], LABELS, "expected"),
    "float rank 3": (FLOATS[:, 0], LABELS, r"\(N, C, 1, T\) for signals, as float32"),
    "uint8 NCHW": (np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2)), LABELS, r"looks like \(N, C, H, W\)"),
    "float NHWC": (FLOATS.transpose(0, 2, 3, 1), LABELS, r"looks like \(N, H, W, C\)"),
    "NaN": (NAN, LABELS, "NaN or infinity, first in image 2"),
    "infinity": (FLOATS + np.float32(np.inf), LABELS, "NaN or infinity, first in image 0"),
    "negative label": (IMAGES, LABELS - 1, "label -1 is out of range"),
    "huge label": (IMAGES, LABELS.astype(np.uint64) * np.uint64(2**63), "label 9223372036854775808 is out of range"),
    "float labels": (IMAGES, LABELS.astype(np.float32), "labels are float32, expected integers"),
    "bool labels": (IMAGES, LABELS > 0, "labels are bool"),
    "text labels": (IMAGES, LABELS.astype(str), "labels are <U21"),
    "one-hot labels": (IMAGES, np.eye(4, dtype=np.int64), r"labels have shape \(4, 4\)"),
}


@pytest.mark.parametrize(("images", "labels", "message"), BAD_ARRAYS.values(), ids=list(BAD_ARRAYS))
def test_arrays_that_are_no_split(tmp_path: Path, images: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        LabelledImages(images=images, labels=labels)
    np.savez(tmp_path / "a.npz", x=images, y=labels)
    refuse(f"npz:{tmp_path}/a.npz", message)
    np.savez(tmp_path / "b.npz", x_train=IMAGES, y_train=LABELS, x_test=images, y_test=labels)
    refuse(f"npz:{tmp_path}/b.npz", f"test: .*{message}")


@pytest.mark.parametrize("length", [1, 3, 50])
def test_signals_may_be_short(length: int) -> None:
    signals = np.zeros((4, 8, 1, length), np.float32)
    assert LabelledImages(images=signals, labels=LABELS).images.shape == signals.shape


def test_splits_that_do_not_fit_together() -> None:
    train = LabelledImages(images=IMAGES, labels=LABELS)
    with pytest.raises(DataError, match="test: label 1 is out of range, expected 0 to 0"):
        DataSet(train=train.take(np.array([0])), test=train, classes=("a",), spec="x")
    smaller = LabelledImages(images=IMAGES[:, :5], labels=LABELS)
    with pytest.raises(DataError, match=r"train images are uint8 \(6, 6, 3\), test images uint8 \(5, 6, 3\)"):
        DataSet(train=train, test=smaller, classes=("a", "b"), spec="x")


@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=60), count=st.integers(1, 70), seed=st.integers(0, 9))
def test_draw_is_balanced_seeded_and_without_replacement(labels: list[int], count: int, seed: int) -> None:
    n = len(labels)
    images = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1)
    split = LabelledImages(images=images, labels=np.array(labels))
    drawn = draw(split, count, seed=seed)
    which = drawn.images.reshape(-1).tolist()
    assert len(which) == len(set(which)) == min(count, n)
    assert drawn.labels.tolist() == [labels[i] for i in which]
    # Balanced: a class that is not used up has at most one image less than any other.
    got = np.bincount(drawn.labels, minlength=6)
    left = np.bincount(labels, minlength=6) - got
    assert all(got[c] + 1 >= got.max() for c in range(6) if left[c])
    assert draw(split, count, seed=seed).images.tobytes() == drawn.images.tobytes()


def test_draw_depends_on_the_seed_and_refuses_nonsense() -> None:
    split = LabelledImages(images=pixels(0, 100, 2, 2), labels=np.arange(100) % 10)
    assert draw(split, 20, seed=1).images.tobytes() != draw(split, 20, seed=2).images.tobytes()
    with pytest.raises(UsageError, match="asked for 0 images"):
        draw(split, 0, seed=1)
    with pytest.raises(UsageError, match="seed is -1"):
        draw(split, 5, seed=-1)


# --- the spec --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["", "foo", "samples", "folder", "folder:", "npz:", "cifar:/x", "a.b:c.d", "sample:x y"]
)
def test_unknown_kind_lists_the_known_ones(spec: str) -> None:
    refuse(spec, "unknown source, expected one of: sample, fashion-mnist:ROOT, cifar10:ROOT, folder:PATH")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("fashion-mnist", "no file .*FashionMNIST/raw/train-images-idx3-ubyte or train-images-idx3-ubyte.gz beside it"),
        ("cifar10", "no folder cifar-10-batches-py or cifar-10-batches-bin in .*nowhere"),
        ("folder", "no directory or .zip at .*nowhere"),
        ("npz", "no file .*nowhere"),
    ],
)
@pytest.mark.parametrize("tail", ["", "\0", "/" + "x" * 300])
def test_missing_path_says_what_was_looked_for(tmp_path: Path, kind: str, message: str, tail: str) -> None:
    refuse(f"{kind}:{tmp_path}/nowhere{tail}", message)


def test_a_line_end_in_the_path_stays_one_line() -> None:
    with pytest.raises(DataError, match=r"^npz:a b: no file a b$"):
        load("npz:a\nb")


def test_seed_and_resize_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="seed is -1"):
        load(f"folder:{tmp_path}", seed=-1)
    with pytest.raises(UsageError, match="resize is 0"):
        load(f"folder:{tmp_path}", resize=0)


def test_unreadable_and_too_large_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> list[Any]:
        raise PermissionError(13, "Permission denied", str(path))

    def full(path: Path) -> list[Any]:
        raise MemoryError

    monkeypatch.setattr(data, "_npz", denied)
    refuse("npz:secret", "npz:secret: secret: Permission denied")
    monkeypatch.setattr(data, "_npz", full)
    refuse("npz:big", "too large for this machine's memory")


# --- npz, module, sample ---------------------------------------------------------------------------------------------


def test_npz_with_four_arrays(tmp_path: Path) -> None:
    x, y = pixels(1, 3, 6, 6, 3), np.array([2, 0, 1], ">i2")
    np.savez(tmp_path / "a.npz", x_train=IMAGES, y_train=LABELS, x_test=x, y_test=y)
    got = load(f"npz:{tmp_path}/a.npz")
    np.testing.assert_array_equal(got.train.images, IMAGES)
    np.testing.assert_array_equal(got.test.images, x)
    assert got.test.labels.tolist() == [2, 0, 1]
    assert got.classes == ("0", "1", "2")
    assert got.spec == f"npz:{tmp_path}/a.npz"


@pytest.mark.parametrize("per_class", [1, 2, 5, 10, 23])
def test_npz_with_two_arrays_is_split_evenly(tmp_path: Path, per_class: int) -> None:
    n = 10 * per_class
    x = np.arange(n, dtype=np.uint8).reshape(n, 1, 1)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(n) % 10)
    got = load(f"npz:{tmp_path}/a.npz", seed=3)
    assert len(got.test) == n // 5
    together = np.concatenate([got.train.images.reshape(-1), got.test.images.reshape(-1)])
    np.testing.assert_array_equal(np.sort(together), np.arange(n))
    np.testing.assert_array_equal(got.test.labels, got.test.images.reshape(-1) % 10)
    np.testing.assert_allclose(np.bincount(got.test.labels, minlength=10), per_class / 5, atol=0.99)
    again, other = load(f"npz:{tmp_path}/a.npz", seed=3), load(f"npz:{tmp_path}/a.npz", seed=4)
    assert again.test.images.tobytes() == got.test.images.tobytes()
    assert other.test.images.tobytes() != got.test.images.tobytes()


@settings(max_examples=60, deadline=None)
@given(
    n_classes=st.integers(1, 40),
    per_class=st.integers(1, 6),
    percent=st.integers(1, 99),
    seed=st.integers(0, 9),
)
def test_any_share_is_split_off_evenly(n_classes: int, per_class: int, percent: int, seed: int) -> None:
    n = n_classes * per_class
    if n < 2:
        return
    x, labels = np.arange(n, dtype=np.uint8).reshape(n, 1, 1), np.arange(n) % n_classes
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/a.npz", x=x, y=labels)
        got = load(f"npz:{folder}/a.npz", seed=seed, test_share=percent / 100)
    assert len(got.test) == min(max(n * percent // 100, 1), n - 1)
    together = np.concatenate([got.train.images.reshape(-1), got.test.images.reshape(-1)])
    np.testing.assert_array_equal(np.sort(together), np.arange(n))
    # Each class gives its share, rounded up or down; with one image a class, that is all or nothing.
    counts = np.bincount(got.test.labels, minlength=n_classes)
    assert (np.abs(counts - per_class * percent / 100) < 1 + 1e-9).all()
    assert got.classes == tuple(map(str, range(n_classes)))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan"), 50])
def test_a_share_that_leaves_one_part_empty_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match=r"share of test images is .*, expected a number between 0 and 1"):
        load("sample", test_share=share)


def test_the_smallest_set_that_can_be_split(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", x=IMAGES[:2], y=LABELS[:2])
    got = load(f"npz:{tmp_path}/two.npz")
    assert (len(got.train), len(got.test), got.held_out) == (1, 1, True)
    assert not load("sample").held_out
    np.savez(tmp_path / "one.npz", x=IMAGES[:1], y=LABELS[:1])
    refuse(f"npz:{tmp_path}/one.npz", "one image, expected at least two")


def test_npz_of_floats_stays_float(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((5, 3, 6, 6)).astype(">f4")
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(5), x_test=x, y_test=np.arange(5))
    split = load(f"npz:{tmp_path}/a.npz").test
    got = split.inputs(Preprocessing(mean=(0.0,), std=(1.0,)), 1, 3)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, x[1:3])
    with pytest.raises(UsageError, match="float images count as preprocessed"):
        split.inputs(Preprocessing(mean=(0.5,), std=(1.0,)))


def test_npz_with_other_content(tmp_path: Path) -> None:
    np.savez(tmp_path / "names.npz", a=IMAGES, y=LABELS)
    refuse(f"npz:{tmp_path}/names.npz", r"holds arrays \['a', 'y'\], expected x, y or x_train")
    np.savez(tmp_path / "objects.npz", x=np.array([{}, None]), y=LABELS)
    refuse(f"npz:{tmp_path}/objects.npz", "Object arrays cannot be loaded")
    np.save(tmp_path / "a.npy", IMAGES)
    refuse(f"npz:{tmp_path}/a.npy", "is not a complete .npz file")
    (tmp_path / "a.txt").write_text("x,y")
    refuse(f"npz:{tmp_path}/a.txt", "is not a complete .npz file")


def npz_bytes() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, x=pixels(0, 10, 4, 4, 3), y=np.arange(10) % 3)
    return file.getvalue()


NPZ = npz_bytes()


@settings(max_examples=300, deadline=None)
@given(draw_from=st.data())
def test_damaged_npz_gives_a_data_error_or_a_set(draw_from: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.npz")
        path.write_bytes(damaged(draw_from, NPZ))
        loads_or_is_refused(f"npz:{path}")


MODULE = """
import sys
import numpy as np
x, y = np.zeros((10, 4, 4, 3), np.uint8), np.arange(10)
class Weird(Exception):
    pass
def two(): return x, y
def four(): return [x, y, x[:3], y[:3]]
def lists(): return np.zeros((4, 1, 2, 2), np.float32), [0, 1, 0, 1]
def three(): return x, y, x
def nothing(): pass
def ragged(): return [[1], [1, 2]], y
def fails(): raise Weird("two\\nlines")
def leaves(): sys.exit("done")
def argument(a): return x, y
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, of a name of its own so that no test sees another's."""
    name = f"mine_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_broken.py").write_text("def (")
    monkeypatch.chdir(tmp_path)
    return name


def test_module_functions(module: str) -> None:
    assert (len(load(f"{module}:two").train), len(load(f"{module}:two").test)) == (8, 2)
    assert (len(load(f"{module}:four").train), len(load(f"{module}:four").test)) == (10, 3)
    assert load(f"{module}:lists").train.images.dtype == np.float32
    assert os.getcwd() not in sys.path


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("three", "returned 3 values, expected"),
        ("nothing", "returned NoneType, expected"),
        ("ragged", "ValueError: setting an array element"),
        ("fails", "Weird: two lines"),
        ("leaves", "SystemExit: done"),
        ("argument", "TypeError: .*missing 1 required positional argument"),
        ("absent", "AttributeError: .*absent"),
        ("x", "TypeError: 'numpy.ndarray' object is not callable"),
    ],
)
def test_module_that_does_not_give_data(module: str, function: str, message: str) -> None:
    refuse(f"{module}:{function}", message)


def test_module_that_cannot_be_imported(module: str) -> None:
    refuse(f"{module}_broken:two", "SyntaxError")
    refuse(f"{module}_absent:two", "ModuleNotFoundError: .*; known sources: sample, ")


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(data, "_SAMPLES", tmp_path)
    x = IMAGES[..., 0]
    np.savez(tmp_path / "images.npz", calib_x=x, calib_y=LABELS, test_x=x[:2], test_y=LABELS[:2])
    (tmp_path / "sample.json").write_text('{"classes": ["shirt", "bag"]}')
    return tmp_path


def test_sample_gives_calibration_and_test(sample: Path) -> None:
    got = load("sample")
    assert (len(got.train), len(got.test), got.classes) == (4, 2, ("shirt", "bag"))
    np.testing.assert_array_equal(got.train.images, IMAGES[..., :1])


@pytest.mark.parametrize("record", ["{", "{}", "[]", '{"classes": 1}'])
def test_damaged_sample(sample: Path, record: str) -> None:
    (sample / "sample.json").write_text(record)
    refuse("sample", "the bundled sample is damaged, install edgecomp again")


def test_missing_sample(sample: Path) -> None:
    (sample / "images.npz").unlink()
    refuse("sample", "no file .*images.npz")


# --- Fashion-MNIST ---------------------------------------------------------------------------------------------------

TRAIN = pixels(1, 3, 2, 4)
IDX = {
    "train-images-idx3-ubyte": b"\0\0\x08\x03" + struct.pack(">III", 3, 2, 4) + TRAIN.tobytes(),
    "train-labels-idx1-ubyte": b"\0\0\x08\x01\0\0\0\x03" + bytes([9, 0, 3]),
    "t10k-images-idx3-ubyte": b"\0\0\x08\x03" + struct.pack(">III", 1, 2, 4) + bytes(range(8)),
    "t10k-labels-idx1-ubyte": b"\0\0\x08\x01\0\0\0\x01" + bytes([7]),
}


def idx(root: Path, *, packed: bool = False, **changed: bytes) -> str:
    """Write the four files, with some replaced (a dash is an underscore here)."""
    files = {**IDX, **{name.replace("_", "-"): content for name, content in changed.items()}}
    raw = "FashionMNIST/raw/"
    write(root, {raw + n + (".gz" if packed else ""): gzip.compress(c) if packed else c for n, c in files.items()})
    return f"fashion-mnist:{root}"


@pytest.mark.parametrize("packed", [False, True])
def test_idx_bytes(tmp_path: Path, packed: bool) -> None:
    got = load(idx(tmp_path, packed=packed))
    np.testing.assert_array_equal(got.train.images, TRAIN[..., np.newaxis])
    assert got.train.labels.tolist() == [9, 0, 3]
    assert got.test.images.reshape(-1).tolist() == list(range(8))
    assert got.test.labels.tolist() == [7]
    assert (len(got.classes), got.classes[9]) == (10, "Ankle boot")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with , expected the IDX mark 00000801"),
        (b"\0\0\x08\x01\0\0", "starts with 00000801"),
        (b"\0\0\x08\x03\0\0\0\x03" + bytes(3), "starts with 00000803, expected the IDX mark 00000801"),
        (b"\0\0\x0d\x01\0\0\0\x03" + bytes(3), "starts with 00000d01"),
        (b"\0\0\x08\x01\0\0\0\x03" + bytes(2), r"truncated or too long: 2 or more bytes for shape \(3,\)"),
        (b"\0\0\x08\x01\0\0\0\x03" + bytes(9), "truncated or too long: 4 or more bytes"),
        (b"\0\0\x08\x01\xff\xff\xff\xff", "claims shape"),
        (b"\0\0\x08\x01\0\0\0\0", "3 images and 0 labels"),
        (b"\0\0\x08\x01\0\0\0\x02" + bytes(2), "3 images and 2 labels"),
        (b"\0\0\x08\x01\0\0\0\x03" + bytes([0, 10, 1]), "label 10 is out of range, expected 0 to 9"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_idx_that_is_wrong(tmp_path: Path, packed: bool, content: bytes, message: str) -> None:
    refuse(idx(tmp_path, packed=packed, train_labels_idx1_ubyte=content), message)


@pytest.mark.parametrize(
    "content", [b"", b"\x1f\x8b", b"no gzip", gzip.compress(IDX["t10k-labels-idx1-ubyte"], mtime=0)[:-9]]
)
def test_gzip_that_is_wrong(tmp_path: Path, content: bytes) -> None:
    spec = idx(tmp_path, packed=True)
    (tmp_path / "FashionMNIST/raw/t10k-labels-idx1-ubyte.gz").write_bytes(content)
    refuse(spec, "t10k-labels-idx1-ubyte.gz (is damaged|starts with)")


@settings(max_examples=300, deadline=None)
@given(draw_from=st.data(), name=st.sampled_from(sorted(IDX)), packed=st.booleans())
def test_damaged_idx_gives_a_data_error_or_a_set(draw_from: st.DataObject, name: str, packed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        spec = idx(Path(folder), packed=packed)
        path = Path(folder, "FashionMNIST/raw", name + (".gz" if packed else ""))
        path.write_bytes(damaged(draw_from, path.read_bytes()))
        loads_or_is_refused(spec)


@pytest.mark.shared
def test_fashion_mnist_as_it_is(shared: Path) -> None:
    got = load(f"fashion-mnist:{shared}/data")
    assert got.train.images.shape == (60000, 28, 28, 1)
    assert got.test.images.shape == (10000, 28, 28, 1)
    assert got.train.labels[:5].tolist() == [9, 0, 0, 3, 0]
    assert got.test.labels[:5].tolist() == [9, 2, 1, 1, 6]
