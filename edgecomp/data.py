"""Labelled images: one value for a split, one for a data set, and a reader for each kind of source.

Nothing is downloaded, nothing is extracted to disk, and no file is trusted: a damaged or hostile one is a DataError
that names it. Images stay uint8 until `LabelledImages.inputs` turns some of them into a network's input.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import re
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from edgecomp.errors import DataError, UsageError
from edgecomp.graph import frozen
from edgecomp.imagefolder import MAX_FILE_BYTES, Progress, brief, read_folder
from edgecomp.preprocessing import Preprocessing, preprocess

Array = np.ndarray

KINDS = "sample, fashion-mnist:ROOT, cifar10:ROOT, folder:PATH (directory or .zip), npz:FILE, package.module:function"

MAX_CLASSES = 100_000
TEST_SHARE = 0.2
"""How much of a source without a test part becomes one, unless told otherwise."""

_SAMPLES = Path(__file__).with_name("samples")

_FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledImages:
    """One split of a data set.

    Attributes:
        images: uint8 (N, H, W, C), also given as (N, H, W); or float32 (N, C, H, W), already preprocessed. Read-only.
        labels: int64 (N,), also given as another integer type; at least 0. Read-only.

    Raises:
        DataError: nothing in it, another type or rank, lengths that differ, a negative label, NaN or infinity.
    """

    images: Array
    labels: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", frozen(_checked_images(self.images)))
        object.__setattr__(self, "labels", frozen(_checked_labels(self.labels)))
        if len(self.images) != len(self.labels):
            raise DataError(f"{len(self.images)} images and {len(self.labels)} labels, expected as many")

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, p: Preprocessing, start: int = 0, stop: int | None = None) -> Array:
        """Turn images start:stop into a network's input: float32 (n, C, H, W).

        Meant to be called batch by batch, so that a large set never becomes float at once.

        Raises:
            DataError: `p` is for another number of channels.
            UsageError: the images are float already and `p` would change them.
        """
        return preprocess(self.images[start:stop], p)

    def digest(self) -> str:
        """Identify the images, as they are before preprocessing, with their labels, in their order: a sha256."""
        both = hashlib.sha256(np.ascontiguousarray(self.images).data)
        both.update(self.labels.astype("<i8").tobytes())
        return both.hexdigest()

    def take(self, indices: Array) -> LabelledImages:
        """Pick images by index, in the order given."""
        return LabelledImages(images=self.images[indices], labels=self.labels[indices])

    def of_classes(self, indices: Sequence[int]) -> LabelledImages:
        """Pick the images of some classes, in their order here; class indices[k] gets the label k.

        Raises:
            DataError: a class has no image here.
        """
        number = np.full(max(*indices, int(self.labels.max())) + 1, -1)
        number[list(indices)] = np.arange(len(indices))
        labels = number[self.labels]
        for k, index in enumerate(indices):
            if not (labels == k).any():
                raise DataError(f"no image of class {index}; leave that class out")
        chosen = labels >= 0
        return LabelledImages(images=self.images[chosen], labels=labels[chosen])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DataSet:
    """Two splits of one kind.

    Attributes:
        train: what calibration and relevance may look at.
        test: what accuracy is measured on.
        classes: the name of each label.
        spec: where it came from, as the user wrote it.
        held_out: whether the source had no test part, so that one was held out of it.

    Raises:
        DataError: a label has no class, or the splits differ in shape or type.
    """

    train: LabelledImages
    test: LabelledImages
    classes: tuple[str, ...]
    spec: str
    held_out: bool = False

    def __post_init__(self) -> None:
        for name, split in (("train", self.train), ("test", self.test)):
            if (top := int(split.labels.max())) >= len(self.classes):
                raise DataError(f"{name}: label {top} is out of range, expected 0 to {len(self.classes) - 1}")
        a, b = self.train.images, self.test.images
        if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
            raise DataError(f"train images are {a.dtype} {a.shape[1:]}, test images {b.dtype} {b.shape[1:]}")

    def of_classes(self, indices: Sequence[int]) -> DataSet:
        """Keep the images of some classes, renumbered in the order given.

        Raises:
            DataError: a split has no image of one of them.
        """
        try:
            train, test = self.train.of_classes(indices), self.test.of_classes(indices)
        except DataError as error:
            raise DataError(f"{self.spec}: {error}") from error
        return replace(self, train=train, test=test, classes=tuple(self.classes[i] for i in indices))


def _checked_images(images: Array) -> Array:
    images = np.asarray(images)
    if images.dtype.kind == "f" and images.dtype.itemsize == 4:
        images = images.astype(np.float32, copy=False)  # the other byte order
    if images.dtype != np.uint8 and images.dtype != np.float32:
        raise DataError(f"images are {images.dtype}, expected uint8 (N, H, W, C) or float32 (N, C, H, W)")
    if images.dtype == np.uint8 and images.ndim == 3:
        images = images[..., np.newaxis]
    if images.ndim != 4:
        layout = "(N, H, W, C) or (N, H, W)" if images.dtype == np.uint8 else "(N, C, H, W), (N, C, 1, T) for signals,"
        raise DataError(f"images have shape {images.shape}, expected {layout} as {images.dtype}")
    if not images.size:
        raise DataError(f"no images: shape {images.shape}")
    # A set in the other layout would go through everything and only score badly, so it is worth a guess.
    first, last = images.shape[1], images.shape[3]
    if images.dtype == np.uint8 and first in (1, 3) and last > 4:
        raise DataError(f"uint8 images have shape {images.shape}, which looks like (N, C, H, W); expected (N, H, W, C)")
    # A signal (N, C, 1, T) may be as short as that.
    if images.dtype == np.float32 and last in (1, 3) and first > 4 and images.shape[2] > 1:
        raise DataError(f"float images have shape {images.shape}, which looks like (N, H, W, C); expected (N, C, H, W)")
    if images.dtype == np.float32 and not np.isfinite(images).all():
        worst = int(np.argmin(np.isfinite(images).all(axis=(1, 2, 3))))
        raise DataError(f"float images hold NaN or infinity, first in image {worst}")
    return images


def _checked_labels(labels: Array) -> Array:
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise DataError(f"labels are {labels.dtype}, expected integers")
    if labels.ndim != 1:
        raise DataError(f"labels have shape {labels.shape}, expected (N,)")
    for worst in (labels.min(), labels.max()) if len(labels) else ():
        if not 0 <= int(worst) < MAX_CLASSES:
            raise DataError(f"label {worst} is out of range, expected 0 to the number of classes - 1")
    return labels.astype(np.int64)


def draw(split: LabelledImages, count: int, *, seed: int) -> LabelledImages:
    """Draw min(count, N) images without replacement, as evenly over the classes as the set allows.

    They come in turns, one of each class, so that a part from the front is balanced too.

    Raises:
        UsageError: `count` is below 1, or `seed` below 0.
    """
    if count < 1:
        raise UsageError(f"asked for {count} images, expected at least 1")
    return split.take(_in_turns(split.labels, _generator(seed))[:count])


def _in_turns(labels: Array, rng: np.random.Generator) -> Array:
    """Order all indices at random, but the k-th of every class before the (k + 1)-th of any."""
    order = rng.permutation(len(labels))
    by_class = np.argsort(labels[order], kind="stable")
    turn = np.empty(len(labels), dtype=np.int64)
    turn[by_class] = np.arange(len(labels)) - np.searchsorted(labels[order][by_class], labels[order][by_class])
    return order[np.argsort(turn, kind="stable")]


def _generator(seed: int) -> np.random.Generator:
    if seed < 0:
        raise UsageError(f"seed is {seed}, expected 0 or more")
    return np.random.default_rng(seed)


def load(
    spec: str,
    *,
    seed: int = 0,
    resize: int | None = None,
    test_share: float = TEST_SHARE,
    progress: Progress | None = None,
) -> DataSet:
    """Read a data set.

    ==========================  =====================================================================================
    `sample`                    the bundled slice of Fashion-MNIST
    `fashion-mnist:ROOT`        ROOT/FashionMNIST/raw/*-ubyte, gzipped or not, as torchvision keeps it
    `cifar10:ROOT`              ROOT/cifar-10-batches-py (torchvision) or ROOT/cifar-10-batches-bin
    `folder:PATH`               directory or .zip of class sub-folders, under train/ and test/ (or val/) if these exist
    `npz:FILE`                  x, y or x_train, y_train, x_test, y_test
    `package.module:function`   called without arguments; gives (x, y) or (x_train, y_train, x_test, y_test)
    ==========================  =====================================================================================

    A source without a test part is split, seeded, as evenly over the classes as it allows. A class with few images may
    then be in one part only.

    Args:
        spec: one of the above.
        seed: for the split.
        resize: for `folder:`, whose images may differ in size: see `Preprocessing`. Others are resized when used.
        test_share: how much of a source without a test part becomes one, above 0 and below 1.
        progress: told of long work; None for silence.

    Raises:
        DataError: the source is unknown, missing, damaged or breaks a rule of `LabelledImages` or `DataSet`.
        UsageError: `seed`, `resize` or `test_share` is out of range.
    """
    if not 0 < test_share < 1:
        raise UsageError(f"share of test images is {test_share:g}, expected a number between 0 and 1")
    Preprocessing(mean=(0.0,), std=(1.0,), resize=resize)  # checks the range of resize
    rng = _generator(seed)
    kind, _, rest = spec.partition(":")
    path = Path(os.path.expanduser(rest))
    classes: tuple[str, ...] | None = None
    try:
        if spec == "sample":
            parts, classes = _sample()
        elif kind == "fashion-mnist" and rest:
            parts, classes = _idx(path / "FashionMNIST" / "raw"), _FASHION
        elif kind == "cifar10" and rest:
            parts, classes = _cifar10(path), _CIFAR10
        elif kind == "folder" and rest:
            parts, classes = read_folder(path, resize=resize, progress=progress)
        elif kind == "npz" and rest:
            parts = _npz(path)
        elif re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", spec):
            parts = _call(kind, rest)
        else:
            raise DataError(f"unknown source, expected one of: {KINDS}")
        names = ("train: ", "test: ") if len(parts) == 2 else ("",)
        splits = [_split(name, images, labels) for name, (images, labels) in zip(names, parts, strict=True)]
        train, test = splits if len(splits) == 2 else _held_out(splits[0], test_share, rng)
        if classes is None:
            classes = tuple(str(i) for i in range(1 + max(int(s.labels.max()) for s in splits)))
        return DataSet(train=train, test=test, classes=classes, spec=spec, held_out=len(splits) == 1)
    except DataError as error:
        raise DataError(" ".join(f"{spec}: {error}".splitlines())) from error  # file names may hold line ends
    except OSError as error:
        raise DataError(f"{spec}: {error.filename}: {error.strerror}") from error
    except MemoryError as error:
        raise DataError(f"{spec}: too large for this machine's memory; give fewer or smaller images") from error


Part = tuple[Array, Array]  # images and labels as a source has them, not yet checked


def _split(name: str, images: Array, labels: Array) -> LabelledImages:
    try:
        return LabelledImages(images=images, labels=labels)
    except DataError as error:
        raise DataError(f"{name}{error}") from error


def _held_out(
    split: LabelledImages, test_share: float, rng: np.random.Generator
) -> tuple[LabelledImages, LabelledImages]:
    """Split evenly, e.g. every fifth image for the test, counted through the classes, which come in random order."""
    n = len(split)
    if n < 2:
        raise DataError("one image, expected at least two to split into train and test")
    shuffled = rng.permutation(n)
    place = rng.permutation(1 + int(split.labels.max()))
    shuffled = shuffled[np.argsort(place[split.labels[shuffled]], kind="stable")]
    share = Fraction(test_share).limit_denominator(MAX_CLASSES)  # 0.2 is 1/5: no rounding moves an image
    ends = np.arange(n + 1, dtype=np.int64) * share.numerator // share.denominator
    picked = np.flatnonzero(np.diff(ends))
    if len(picked) in (0, n):
        picked = np.array([n - 1]) if len(picked) == 0 else np.arange(1, n)  # no part may be empty
    is_test = np.zeros(n, dtype=bool)
    is_test[shuffled[picked]] = True
    return split.take(np.flatnonzero(~is_test)), split.take(np.flatnonzero(is_test))


# --- sample, npz, module:function --------------------------------------------------------------------------------


def _sample() -> tuple[list[Part], tuple[str, ...]]:
    arrays = _arrays(_SAMPLES / "images.npz")
    try:
        classes = tuple(str(name) for name in json.loads((_SAMPLES / "sample.json").read_bytes())["classes"])
        return [(arrays["calib_x"], arrays["calib_y"]), (arrays["test_x"], arrays["test_y"])], classes
    except (ValueError, KeyError, TypeError) as error:
        raise DataError("the bundled sample is damaged, install edgecomp again") from error


def _npz(path: Path) -> list[Part]:
    arrays = _arrays(path)
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        return [(arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])]
    if {"x", "y"} <= arrays.keys():
        return [(arrays["x"], arrays["y"])]
    raise DataError(f"holds arrays {sorted(arrays)}, expected x, y or x_train, y_train, x_test, y_test")


def _arrays(path: Path) -> Mapping[str, Array]:
    if not path.is_file():
        raise DataError(f"no file {path}")
    if not zipfile.is_zipfile(path):  # np.load would talk about pickles
        raise DataError(f"{path} is not a complete .npz file, which is a zip of arrays; write one with numpy.savez")
    try:
        # Opened here, because numpy leaves a damaged archive's file open.
        with warnings.catch_warnings(action="ignore"), path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            return {name: archive[name] for name in archive.files}
    except MemoryError:
        raise
    except Exception as error:  # damage surfaces as whatever numpy, zipfile, zlib or ast happen to raise
        raise DataError(f"cannot read {path} as .npz of plain arrays: {brief(error)}") from error


def _call(module: str, function: str) -> list[Part]:
    where = os.getcwd()
    sys.path.insert(0, where)
    try:
        result = getattr(importlib.import_module(module), function)()
        if not isinstance(result, (tuple, list)) or len(result) not in (2, 4):
            got = f"{len(result)} values" if isinstance(result, (tuple, list)) else type(result).__name__
            raise DataError(f"returned {got}, expected (x, y) or (x_train, y_train, x_test, y_test)")
        arrays = [np.asarray(item) for item in result]
    except (MemoryError, DataError):
        raise
    except (Exception, SystemExit) as error:  # a user's code raises what it likes
        hint = f"; known sources: {KINDS}" if isinstance(error, ModuleNotFoundError) and error.name == module else ""
        raise DataError(f"{brief(error)}{hint}") from error
    finally:
        if where in sys.path:  # the code may have changed it
            sys.path.remove(where)
    return list(zip(arrays[::2], arrays[1::2], strict=True))


# --- Fashion-MNIST: IDX files ----------------------------------------------------------------------------------------


def _idx(raw: Path) -> list[Part]:
    return [
        (_idx_array(raw / f"{stem}-images-idx3-ubyte", 3), _idx_array(raw / f"{stem}-labels-idx1-ubyte", 1))
        for stem in ("train", "t10k")
    ]


def _idx_array(path: Path, n_dims: int) -> Array:
    """Read `path` or `path`.gz: big-endian magic 0, 0, 8 (uint8), rank; the shape as uint32; the bytes."""
    plain, packed = path, path.with_name(path.name + ".gz")
    path = plain if plain.is_file() else packed
    if not path.is_file():
        raise DataError(f"no file {plain} or {packed.name} beside it")
    with gzip.open(path) if path == packed else path.open("rb") as file:
        try:
            head = file.read(4 + 4 * n_dims)
            if len(head) < 4 + 4 * n_dims or head[:4] != bytes((0, 0, 8, n_dims)):
                raise DataError(f"{path} starts with {head[:4].hex()}, expected the IDX mark 000008{n_dims:02x}")
            shape = struct.unpack(f">{n_dims}I", head[4:])
            expected = math.prod(shape)
            if expected > MAX_FILE_BYTES:
                raise DataError(f"{path} claims shape {shape}, which is more than {MAX_FILE_BYTES} bytes")
            body = file.read(expected + 1)
        except (EOFError, zlib.error, struct.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is damaged: {brief(error)}") from error
    if len(body) != expected:
        raise DataError(f"{path} is truncated or too long: {len(body)} or more bytes for shape {shape}")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


# --- CIFAR-10 --------------------------------------------------------------------------------------------------------


def _cifar10(root: Path) -> list[Part]:
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    for folder, suffix, read in (
        (root / "cifar-10-batches-py", "", _cifar_pickle),
        (root / "cifar-10-batches-bin", ".bin", _cifar_binary),
    ):
        if folder.is_dir():
            parts = [read(folder / (name + suffix)) for name in (*batches, "test_batch")]
            train = tuple(np.concatenate(arrays) for arrays in zip(*parts[:5], strict=True))
            return [(train[0], train[1]), parts[5]]
    raise DataError(f"no folder cifar-10-batches-py or cifar-10-batches-bin in {root}")


def _cifar_images(planes: Array) -> Array:
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _cifar_binary(path: Path) -> Part:
    """Read records of one label byte and 3 x 32 x 32 bytes."""
    content = path.read_bytes()
    if not content or len(content) % 3073:
        raise DataError(f"{path} has {len(content)} bytes, expected a multiple of 3073")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, 3073)
    return _cifar_images(records[:, 1:]), records[:, 0]


def _cifar_pickle(path: Path) -> Part:
    content = path.read_bytes()
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
        # Written by Python 2 or by 3, the keys come as str or as bytes.
        fields = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in batch.items()}
        data, labels = fields["data"], fields["labels"]
        images = data.array() if isinstance(data, _Inert) else np.empty(0)
        labels = labels.array() if isinstance(labels, _Inert) else np.array(labels)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle is a damaged program: it may fail in any way
        raise DataError(f"{path} is not a CIFAR-10 batch with data and labels: {brief(error)}") from error
    if images.ndim != 2 or images.shape[1] != 3072:
        raise DataError(f"{path}: data has shape {images.shape}, expected uint8 (N, 3072)")
    return _cifar_images(images), labels


class _Inert:
    """Stands for numpy's array and dtype while a pickle is read: keeps what it is handed and runs nothing.

    Not even numpy's own classes are let in, because their __setstate__ trusts the file.
    """

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> Array:
        """Give the uint8 array that was pickled, by protocols 0-4 as a state, or by protocol 5 as arguments."""
        if self.state is not None:
            _, shape, dtype, fortran, raw = self.state
        else:
            raw, dtype, shape, order = self.args
            fortran = order == "F"
        if dtype.args[0] not in ("u1", "uint8") or fortran:
            raise DataError(f"data is of type {dtype.args[0]!r:.20}, expected uint8 in C order")
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        return np.frombuffer(raw, dtype=np.uint8).reshape(shape)


def _latin1(text: str, encoding: str) -> bytes:
    """Stand for `_codecs.encode`, by which Python 3 writes bytes in old protocols."""
    if encoding != "latin1":
        raise DataError(f"the pickle asks for the codec {encoding!r:.40}")
    return text.encode("latin1")


# The Python unpickler, not the C one: that reserves memory for whatever memo index a damaged file names.
class _ArraysOnly(pickle._Unpickler):
    """Reads containers, numbers, strings and uint8 arrays; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy") and name in ("ndarray", "dtype", "_reconstruct", "_frombuffer"):
            return _Inert
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise DataError(f"the pickle asks for {f'{module}.{name}'!r:.80}, which a CIFAR-10 batch has no use for")
