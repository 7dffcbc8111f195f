"""Class folders in directories and .zip files, made on the spot, and the ways in which they can be wrong."""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from edgecomp import imagefolder
from edgecomp.data import load
from edgecomp.preprocessing import Preprocessing
from tests.sources import Files, damaged, loads_or_is_refused, pixels, refuse, write


def image(seed: int, *, mode: str = "RGB", width: int = 5, height: int = 4, suffix: str = "png") -> bytes:
    pixel_bytes = pixels(seed, height, width, 3 if mode == "RGB" else 1)
    file = io.BytesIO()
    picture = Image.fromarray(pixel_bytes if mode == "RGB" else pixel_bytes[:, :, 0])
    picture.convert(mode).save(file, {"jpg": "jpeg", "pgm": "ppm"}.get(suffix, suffix))
    return file.getvalue()


def flat(n: int = 5, **options: Any) -> Files:
    return {f"{name}/{i}.png": image(10 * c + i, **options) for c, name in enumerate(("ant", "bee")) for i in range(n)}


def both(files: Files, prefix: str = "") -> Files:
    """The same files under train/, and two of each class under test/."""
    test = {name: content for name, content in files.items() if name.endswith(("/0.png", "/1.png"))}
    split = {f"train/{n}": c for n, c in files.items()} | {f"test/{n}": c for n, c in test.items()}
    return {prefix + name: content for name, content in split.items()}


Made = Callable[[Files], str]


@pytest.fixture(params=["directory", "zip", "stored zip with folders"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    """Put files into a directory or a .zip and give its spec."""

    def make(files: Files) -> str:
        if request.param == "directory":
            write(tmp_path / "set", files)
            return f"folder:{tmp_path}/set"
        with_folders = "folders" in request.param
        with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_STORED if with_folders else 8) as archive:
            if with_folders:
                folders = {str(parent) + "/" for name in files for parent in Path(name).parents[:-1]}
                for folder in sorted(folders, reverse=True):
                    archive.writestr(folder, b"")
            for name, content in reversed(files.items()):
                archive.writestr(name, content)
        return f"folder:{tmp_path}/set.zip"

    return make


def test_train_and_test_folders(made: Made) -> None:
    got = load(made(both(flat())))
    assert got.classes == ("ant", "bee")
    assert got.train.labels.tolist() == [0] * 5 + [1] * 5
    assert got.test.labels.tolist() == [0, 0, 1, 1]
    want = [pixels(seed, 4, 5, 3) for seed in (0, 1, 10, 11)]
    np.testing.assert_array_equal(got.test.images, want)


def test_flat_folders_are_split(made: Made) -> None:
    spec = made(flat(10))
    got = load(spec, seed=1)
    assert np.bincount(got.train.labels).tolist() == [8, 8]
    assert np.bincount(got.test.labels).tolist() == [2, 2]
    all_images = {bytes(pixels(10 * c + i, 4, 5, 3)) for c in range(2) for i in range(10)}
    assert {bytes(i) for split in (got.train, got.test) for i in split.images} == all_images
    assert load(spec, seed=1).test.images.tobytes() == got.test.images.tobytes()


@pytest.mark.parametrize("wrap", ["data/", "a/b/"])
def test_a_wrapping_folder_val_and_rubbish(made: Made, wrap: str) -> None:
    files = {wrap + name.replace("test/", "val/"): content for name, content in both(flat()).items()}
    rubbish = [
        "__MACOSX/train/ant/._0.png", ".hidden/x.png", f"{wrap}.git/x.png", f"{wrap}train/ant/.DS_Store",
        f"{wrap}train/ant/._1.png", f"{wrap}train/ant/Thumbs.db", f"{wrap}README.md", f"{wrap}train/list.txt",
    ]  # fmt: skip
    got = load(made({**files, **dict.fromkeys(rubbish, b"no image")}))
    assert got.classes == ("ant", "bee")
    assert (len(got.train), len(got.test)) == (10, 4)


def test_test_is_preferred_to_val_and_other_folders_are_left_out(made: Made) -> None:
    files = both(flat()) | {"val/ant/0.png": image(0), "extra/0.png": image(0)}
    assert len(load(made(files)).test) == 4


def test_train_alone_is_a_class_among_others_or_a_wrapper(made: Made) -> None:
    assert load(made({"train/0.png": image(0), "bus/0.png": image(1)})).classes == ("bus", "train")


def test_images_deeper_in_a_class_and_capital_suffixes_count(made: Made) -> None:
    got = load(made({"a/x/1.PNG": image(0), "a/2.Png": image(1), "b/y/z/1.png": image(2)}))
    assert len(got.train) + len(got.test) == 3


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "jpg", "webp"])
def test_formats(made: Made, suffix: str) -> None:
    files = {f"{c}/0.{suffix}": image(i, suffix=suffix) for i, c in enumerate("ab")}
    got = load(made(files))
    together = np.concatenate([got.train.images, got.test.images])[np.argsort([*got.train.labels, *got.test.labels])]
    assert together.shape == (2, 4, 5, 3)
    if suffix in ("png", "bmp", "ppm"):
        np.testing.assert_array_equal(together, [pixels(0, 4, 5, 3), pixels(1, 4, 5, 3)])


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_all_grey_is_one_channel(made: Made, mode: str) -> None:
    assert load(made(flat(mode=mode))).train.images.shape == (8, 4, 5, 1)


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_other_colour_modes_become_rgb(made: Made, mode: str) -> None:
    assert load(made(flat(mode=mode))).train.images.shape == (8, 4, 5, 3)


def test_the_majority_decides_between_grey_and_colour(made: Made) -> None:
    """Four grey and two coloured, and the other way; luma of ITU-R 601 as Pillow documents it."""
    grey = {f"ant/{i}.png": image(i, mode="L") for i in range(4)}
    colour = {f"bee/{i}.png": image(10 + i) for i in range(2)}
    got = load(made(both(grey | colour)))
    assert got.train.images.shape == (6, 4, 5, 1)
    luma = pixels(10, 4, 5, 3) @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(got.train.images[4, :, :, 0], luma, atol=0.51)
    np.testing.assert_array_equal(got.train.images[1], pixels(1, 4, 5, 1))


def test_grey_among_colours_is_repeated(made: Made) -> None:
    got = load(made(both({**flat(), "ant/1.png": image(1, mode="L")})))
    np.testing.assert_array_equal(got.train.images[1], np.repeat(pixels(1, 4, 5, 1), 3, axis=2))


def test_resize_makes_sizes_common(made: Made) -> None:
    spec = made(both({**flat(), "ant/1.png": image(1, width=9, height=20)}))
    refuse(spec, r"'train/ant/1.png' has 9x20 pixels and 'train/ant/0.png' 5x4; give --resize N")
    got = load(spec, resize=4)
    assert got.train.images.shape == (10, 4, 4, 3)
    np.testing.assert_array_equal(got.train.images[0], pixels(0, 4, 5, 3)[:, :4])  # crop at round(0.5) = 0
    p = Preprocessing(mean=(0.0,), std=(1.0,), resize=4)
    np.testing.assert_allclose(got.train.inputs(p), got.train.images.transpose(0, 3, 1, 2) / 255, rtol=1e-6)


def test_progress_is_told(made: Made) -> None:
    told: list[tuple[int, str]] = []

    def progress(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
        told.append((total, what))
        return items

    assert len(load(made(flat()), progress=progress).test) == 2
    assert told == [(10, "reading images")]


BAD_FILES = {
    "empty": ({}, "no class folders in it"),
    "no folders": ({"0.png": image(0)}, "no class folders in it"),
    "no images": ({"ant/x.txt": b"", "bee/0.png": image(0)}, r"no images in class folder 'ant', expected .jpg"),
    "no images in test": (both(flat()) | {"test/cat/x.txt": b""}, "no images in class folder 'test/cat'"),
    "class only in test": (both(flat()) | {"test/cat/0.png": image(0)}, "class 'cat' is in only one of train/"),
    "class only in train": (both(flat()) | {"train/cat/0.png": image(0)}, "class 'cat' is in only one of train/"),
    "one image": ({"ant/0.png": image(0)}, "one image, expected at least two"),
    "truncated": (flat() | {"bee/3.png": image(0)[:-30]}, "cannot read 'bee/3.png'"),
    "truncated jpeg": (flat() | {"bee/3.jpg": image(0, suffix="jpg")[:-40]}, "cannot read 'bee/3.jpg': OSError"),
    "empty file": (flat() | {"bee/3.png": b""}, "'bee/3.png': neither a whole nor a known image file"),
    "text": (flat() | {"bee/3.png": b"hello"}, "'bee/3.png': neither a whole nor a known image file"),
    "a gif": (flat() | {"bee/3.png": image(0, suffix="gif")}, "'bee/3.png': neither a whole nor a known image file"),
    "16 bit": (flat() | {"bee/3.pgm": b"P5 5 4 65535\n" + bytes(40)}, "'bee/3.pgm': pixels of mode I.*expected 8-bit"),
    "bomb, passed by Pillow": (flat() | {"bee/3.pgm": b"P5 8001 8000 255\n0"}, "8001x8000 pixels, expected at most"),
    "bomb, warned of by Pillow": (flat() | {"bee/3.pgm": b"P5 10000 10000 255\n0"}, "10000x10000 pixels, expected"),
    "bomb, refused by Pillow": (flat() | {"bee/3.pgm": b"P5 60000 60000 255\n0"}, "read 'bee/3.pgm': Decompression"),
    "a line end in the name": (flat() | {"bee/3\n.png": b""}, r"'bee/3\\n.png': neither"),
}


@pytest.mark.parametrize(("files", "message"), BAD_FILES.values(), ids=list(BAD_FILES))
def test_folders_that_are_wrong(tmp_path: Path, made: Made, files: Files, message: str) -> None:
    (tmp_path / "set").mkdir()
    refuse(made(files), message)


def test_empty_class_directory(tmp_path: Path) -> None:
    write(tmp_path, flat())
    (tmp_path / "cat").mkdir()
    refuse(f"folder:{tmp_path}", "no images in class folder 'cat'")


def test_sets_and_files_beyond_memory_are_refused_before_they_fill_it(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = made(flat())
    monkeypatch.setattr(imagefolder, "MAX_SET_BYTES", 599)
    refuse(spec, r"10 images of \(4, 5, 3\) are too large together; give --resize N")
    monkeypatch.setattr(imagefolder, "MAX_SET_BYTES", 600)
    assert len(load(spec).train) == 8


def test_a_large_file_in_a_zip_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ant/0.png", bytes(1 << 20))
    monkeypatch.setattr(imagefolder, "MAX_FILE_BYTES", 1 << 19)
    refuse(f"folder:{tmp_path}/a.zip", "'ant/0.png' claims 1048576 bytes")


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write(tmp_path, {f"real/{name}": content for name, content in flat().items()})
    (tmp_path / "set").mkdir()
    for name in ("ant", "bee"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real/ant/again").symlink_to(tmp_path / "set")
    got = load(f"folder:{tmp_path}/set")
    assert got.classes == ("ant", "bee")
    assert len(got.train) + len(got.test) == 10


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06", b"hello"])
def test_a_file_that_is_no_zip(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    refuse(f"folder:{tmp_path}/a.zip", "cannot read .*a.zip as .zip: BadZipFile")


def zip_bytes() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in flat(2).items():
            archive.writestr(name, content)
    return file.getvalue()


ZIP = zip_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(draw_from=st.data())
def test_damaged_zip_gives_a_data_error_or_a_set(draw_from: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.zip")
        path.write_bytes(damaged(draw_from, ZIP))
        loads_or_is_refused(f"folder:{path}")


@pytest.mark.shared
def test_imagenet_has_a_thousand_classes(shared: Path) -> None:
    got = load(f"folder:{shared}/data/imagenet1k-one-per-class.zip")
    assert (len(got.classes), len(got.train), len(got.test)) == (1000, 800, 200)
    assert got.classes[0].startswith("n01440764")
    assert got.train.images.shape[1:] == (256, 256, 3)
    half = load(f"folder:{shared}/data/imagenet1k-one-per-class.zip", test_share=0.5)
    assert (len(half.train), len(half.test)) == (500, 500)
    assert sorted([*half.train.labels, *half.test.labels]) == list(range(1000))
