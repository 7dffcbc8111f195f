"""Image files in class folders, in a directory or a .zip, decoded to one array.

Nothing is extracted to disk, and no file is trusted: a damaged or hostile one is a DataError that names it.
"""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgecomp.errors import DataError
from edgecomp.preprocessing import MAX_PIXELS, pillow, resize_and_crop

Array = np.ndarray
Entry = tuple[str, ...]  # the parts of a path; a folder ends with ""
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""Wraps an iterable of a known length under a caption, as tqdm does, and gives the same items."""

MAX_SET_BYTES = 16 << 30
MAX_FILE_BYTES = 1 << 30

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm")
_DECODERS = ("JPEG", "PNG", "BMP", "WEBP", "PPM")
_GREY = ("1", "L", "LA")
_COLOUR = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr")


def read_folder(
    path: Path, *, resize: int | None = None, progress: Progress | None = None
) -> tuple[list[tuple[Array, Array]], tuple[str, ...]]:
    """Decode all images below `path`, class by class in alphabetical order.

    Above the class folders may stand train/ and test/, or train/ and val/. Dot files, `__MACOSX`, files that are not
    images and images outside any class folder are left out. Orientation marks of cameras are not applied.

    Args:
        path: directory or .zip.
        resize: see `Preprocessing`; without it all images must be of one size.
        progress: told of the decoding.

    Returns:
        For each of train and test, or for the whole, images uint8 (N, H, W, 1 or 3) and labels int64 (N,); and the
        names of the classes.

    Raises:
        DataError: a file is missing or damaged, a class has no images, or the sizes differ.
    """
    with _opened(path) as (entries, read):
        entries, prefix = _unwrapped(entries)
        tops = {entry[0] for entry in entries if len(entry) > 1}
        test = "test" if "test" in tops else "val"
        splits = ["train", test] if {"train", test} <= tops else [""]
        found = []
        for split in splits:
            inside = [entry[1:] for entry in entries if entry[0] == split] if split else entries
            found.append(_images_by_class(inside, prefix + split + "/" if split else prefix))
        classes = tuple(sorted(found[0]))
        if len(found) == 2 and set(found[1]) != set(classes):
            odd = sorted(set(found[1]) ^ set(classes))[0]
            raise DataError(f"class {odd!r} is in only one of train/ and {test}/, expected the same classes in both")
        counts = [sum(map(len, by_class.values())) for by_class in found]
        names = [name for by_class in found for label in classes for name in by_class[label]]
        images = _read_images(names, read, resize, progress)
    labels = [np.repeat(np.arange(len(classes)), [len(by_class[label]) for label in classes]) for by_class in found]
    return list(zip(np.split(images, np.cumsum(counts)[:-1]), labels, strict=True)), classes


@contextmanager
def _opened(path: Path) -> Iterator[tuple[list[Entry], Callable[[str], bytes]]]:
    """List a directory or .zip, and give a function that reads one of its files."""
    if path.is_dir():
        yield _visible(_walk(path)), lambda name: (path / name).read_bytes()
        return
    if not path.is_file():
        raise DataError(f"no directory or .zip at {path}")
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # zipfile raises much besides BadZipFile on damage
        raise DataError(f"cannot read {path} as .zip: {brief(error)}") from error

    def read(name: str) -> bytes:
        info = archive.getinfo(name)
        if info.file_size > MAX_FILE_BYTES:
            raise DataError(f"{name!r} claims {info.file_size} bytes")
        return archive.read(info)

    with archive:
        yield _visible(archive.namelist()), read


def _walk(root: Path) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise error

    seen = set()  # links are followed, but not in circles
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        relative = Path(folder).relative_to(root)
        yield from ((relative / name).as_posix() + "/" for name in folders)
        yield from ((relative / name).as_posix() for name in files)


def _visible(names: Iterable[str]) -> list[Entry]:
    """Split the names, sorted; leave out dot files and what macOS adds to archives."""
    entries = [tuple(name.split("/")) for name in sorted(set(names))]
    return [entry for entry in entries if not any(_hidden(part) for part in entry)]


def _hidden(part: str) -> bool:
    return part == "__MACOSX" or (part.startswith(".") and part != ".")


def _is_image(entry: Entry) -> bool:
    return entry[-1].lower().endswith(_SUFFIXES)


def _unwrapped(entries: list[Entry]) -> tuple[list[Entry], str]:
    """Enter a lone folder as long as it has no images of its own: archives often wrap everything in one."""
    prefix = ""
    while len(tops := {entry[0] for entry in entries if len(entry) > 1}) == 1:
        inner = [entry[1:] for entry in entries if len(entry) > 1]
        if not any(len(entry) > 1 for entry in inner) or any(len(e) == 1 and _is_image(e) for e in inner):
            break
        entries, prefix = inner, prefix + tops.pop() + "/"
    return entries, prefix


def _images_by_class(entries: list[Entry], prefix: str) -> dict[str, list[str]]:
    """Map each class folder to the full names of the images anywhere in it."""
    by_class: dict[str, list[str]] = {entry[0]: [] for entry in entries if len(entry) > 1}
    for entry in entries:
        if len(entry) > 1 and _is_image(entry):
            by_class[entry[0]].append(prefix + "/".join(entry))
    if not by_class:
        raise DataError(f"no class folders in {prefix or 'it'}, expected one folder of images per class")
    for name, images in by_class.items():
        if not images:
            raise DataError(f"no images in class folder {prefix + name!r}, expected {' '.join(_SUFFIXES)}")
    return by_class


def _read_images(
    names: list[str], read: Callable[[str], bytes], resize: int | None, progress: Progress | None
) -> Array:
    """Decode to uint8 (N, H, W, 1 or 3): grey if more than half of the files are."""
    decoded: list[Array] = []
    with warnings.catch_warnings(action="ignore"):  # Pillow's, on metadata and large images; both are dealt with here
        for name in progress(names, len(names), "reading images") if progress else names:
            try:
                image = _decode(read(name))
                decoded.append(resize_and_crop(image, resize) if resize is not None else image)
            except (DataError, MemoryError) as error:
                raise type(error)(f"{name!r}: {error}") from error
            except Exception as error:  # damage surfaces as whatever Pillow's decoders and zipfile happen to raise
                raise DataError(f"cannot read {name!r}: {brief(error)}") from error
            if decoded[-1].shape[:2] != decoded[0].shape[:2]:
                sizes = [f"{array.shape[1]}x{array.shape[0]}" for array in (decoded[-1], decoded[0])]
                raise DataError(f"{name!r} has {sizes[0]} pixels and {names[0]!r} {sizes[1]}; give --resize N")
            if len(names) * decoded[0].size > MAX_SET_BYTES:
                raise DataError(f"{len(names)} images of {decoded[0].shape} are too large together; give --resize N")
    n_grey = sum(image.shape[2] == 1 for image in decoded)
    channels = 1 if 2 * n_grey > len(decoded) else 3
    images = np.empty((len(decoded), *decoded[0].shape[:2], channels), dtype=np.uint8)
    for i, image in enumerate(decoded):
        if image.shape[2] > channels:
            image = np.asarray(pillow().fromarray(image).convert("L"))[..., np.newaxis]
        images[i] = image  # grey into three channels: numpy repeats it
    return images


def _decode(content: bytes) -> Array:
    """Decode one file to uint8 (H, W, 1) if it is grey, else (H, W, 3); transparency is dropped."""
    image_module = pillow()
    try:
        opened = image_module.open(io.BytesIO(content), formats=_DECODERS)
    except image_module.UnidentifiedImageError as error:
        raise DataError(f"neither a whole nor a known image file, expected one of {' '.join(_DECODERS)}") from error
    with opened as image:
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{image.width}x{image.height} pixels, expected at most {MAX_PIXELS} in all")
        if image.mode not in _GREY + _COLOUR:
            raise DataError(f"pixels of mode {image.mode}, expected 8-bit grey or colour")
        if image.mode in _GREY:
            return np.asarray(image.convert("L"))[..., np.newaxis]
        return np.asarray(image.convert("RGB"))


def brief(error: BaseException) -> str:
    """Name the type and the message of an exception of others, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
