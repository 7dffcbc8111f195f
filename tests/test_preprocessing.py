"""Preprocessing against a pixel at a time, and its JSON against everything it must refuse."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgecomp.errors import DataError, PlanError, UsageError
from edgecomp.preprocessing import Preprocessing, preprocess, resize_and_crop
from edgecomp.pytorch.torchvision_ops import define_missing_operators

IDENTITY = Preprocessing(mean=(0.0,), std=(1.0,))


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def slow(images: np.ndarray, p: Preprocessing) -> np.ndarray:
    """The docstring's steps 2-4, one pixel at a time, in double precision."""
    n, height, width, channels = images.shape
    mean = p.mean * channels if len(p.mean) == 1 else p.mean
    std = p.std * channels if len(p.std) == 1 else p.std
    out = np.empty((n, channels, height + 2 * p.pad, width + 2 * p.pad))
    for i, c, y, x in np.ndindex(out.shape):
        v, u = y - p.pad, x - p.pad
        pixel = images[i, v, u, c] / 255 if 0 <= v < height and 0 <= u < width else 0.0
        out[i, c, y, x] = (pixel - mean[c]) / std[c]
    return out


@given(
    n=st.integers(1, 3),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    channels=st.sampled_from([1, 2, 3, 4]),
    pad=st.integers(0, 3),
    shared=st.booleans(),
    seed=st.integers(0, 99),
)
def test_agrees_with_one_pixel_at_a_time(
    n: int, height: int, width: int, channels: int, pad: int, shared: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    k = 1 if shared else channels
    p = Preprocessing(mean=tuple(map(float, rng.random(k))), std=tuple(map(float, rng.random(k) + 0.1)), pad=pad)
    images = pixels(seed, n, height, width, channels)
    got = preprocess(images, p)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_allclose(got, slow(images, p), rtol=1e-5, atol=1e-5)


def test_padding_is_zero_before_normalisation() -> None:
    got = preprocess(np.full((1, 1, 1, 1), 255, np.uint8), Preprocessing(mean=(0.25,), std=(0.5,), pad=1))
    np.testing.assert_array_equal(got, [[[[-0.5, -0.5, -0.5], [-0.5, 1.5, -0.5], [-0.5, -0.5, -0.5]]]])


def test_float32_is_the_definition() -> None:
    """Every step rounds to float32, so that a device gets the same bits: three values worked out by hand."""
    p = Preprocessing(mean=(0.2860,), std=(0.3530,))
    got = preprocess(np.array([[[[0]], [[1]], [[200]]]], np.uint8), p).reshape(-1)
    mean, std = np.float32(0.2860), np.float32(0.3530)
    assert [v.tobytes() for v in got] == [
        ((np.float32(v) / np.float32(255) - mean) / std).tobytes() for v in (0, 1, 200)
    ]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_resize_scales_the_shorter_side_and_keeps_the_centre(channels: int) -> None:
    """By hand: 4x8 is halved to 2x4, the crop keeps columns 1 and 2; bilinear weighs four inputs by 1 3 3 1 over 8."""
    image = np.zeros((4, 8, channels), np.uint8)
    image[:, 4:, :] = 240
    got = resize_and_crop(image, 2)
    assert got.shape == (2, 2, channels)
    np.testing.assert_array_equal(got[:, 0], np.full((2, channels), 240 * 1 / 8))  # inputs 1 to 4, of which 4 is 240
    np.testing.assert_array_equal(got[:, 1], np.full((2, channels), 240 * 7 / 8))  # inputs 3 to 6


@pytest.mark.parametrize(("height", "width", "resize"), [(5, 9, 5), (9, 5, 5), (7, 7, 7), (6, 9, 6), (6, 11, 6)])
def test_crop_without_scaling_is_the_rounded_centre(height: int, width: int, resize: int) -> None:
    image = pixels(1, height, width, 3)
    top, left = round((height - resize) / 2), round((width - resize) / 2)
    np.testing.assert_array_equal(resize_and_crop(image, resize), image[top : top + resize, left : left + resize])


def test_resize_is_part_of_preprocess_and_settled_by_doing_it_first() -> None:
    images, p = pixels(2, 3, 10, 7, 3), Preprocessing(mean=(0.5,), std=(0.5,), resize=4, pad=1)
    small = np.stack([resize_and_crop(image, 4) for image in images])
    np.testing.assert_array_equal(preprocess(images, p), preprocess(small, p))
    assert preprocess(images, p).shape == (3, 3, 6, 6)
    assert preprocess(images[:0], p).shape == (0, 3, 6, 6)


@pytest.mark.parametrize(("height", "width", "crop"), [(9, 5, 5), (9, 12, 4), (256, 256, 224), (7, 8, 1), (6, 11, 6)])
def test_crop_is_torchvisions_centre(height: int, width: int, crop: int) -> None:
    define_missing_operators()
    from torchvision.transforms import CenterCrop

    images = pixels(3, 2, height, width, 3)
    p = Preprocessing(mean=(0.0,), std=(1 / 255,), crop=crop)
    expected = CenterCrop(crop)(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(preprocess(images, p), expected, atol=1e-4)


def test_crop_comes_between_resize_and_padding() -> None:
    images, p = pixels(2, 3, 10, 7, 3), Preprocessing(mean=(0.5,), std=(0.5,), resize=6, crop=4, pad=1)
    rest = Preprocessing(mean=(0.5,), std=(0.5,), pad=1)
    small = np.stack([resize_and_crop(image, 6)[1:5, 1:5] for image in images])
    np.testing.assert_array_equal(preprocess(images, p), preprocess(small, rest))
    # A set that was resized when read is cropped all the same.
    read = np.stack([resize_and_crop(image, 6) for image in images])
    np.testing.assert_array_equal(preprocess(images, p), preprocess(read, p))


def test_a_crop_larger_than_the_image_is_refused() -> None:
    p = Preprocessing(mean=(0.0,), std=(1.0,), crop=6)
    with pytest.raises(DataError, match="images of 9x5 pixels are smaller than --crop 6; give a smaller one"):
        preprocess(pixels(0, 1, 5, 9, 3), p)


def test_resize_refuses_what_would_fill_the_memory() -> None:
    with pytest.raises(DataError, match="40000x1 pixels would become 163840000x4096"):
        resize_and_crop(np.zeros((1, 40000, 1), np.uint8), 4096)


def test_missing_pillow_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"pip install 'edgecomp\[bench\]'"):
        resize_and_crop(pixels(0, 4, 4, 1), 2)


def test_wrong_number_of_channels() -> None:
    p = Preprocessing(mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    with pytest.raises(DataError, match="images have 1 channels, mean and std 3 values; give 1 or 1"):
        preprocess(pixels(0, 2, 4, 4, 1), p)
    with pytest.raises(DataError, match="give 1 or 4"):
        preprocess(np.zeros((2, 4, 3, 3), np.float32), Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3))


def test_float_images_pass_untouched_or_not_at_all() -> None:
    images = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(preprocess(images, IDENTITY), images)
    for changed in (
        Preprocessing(mean=(0.5,), std=(1.0,)),
        Preprocessing(mean=(0.0,), std=(0.5,)),
        Preprocessing(mean=(0.0,), std=(1.0,), pad=1),
        Preprocessing(mean=(0.0,), std=(1.0,), resize=4),
    ):
        with pytest.raises(UsageError, match="float images count as preprocessed"):
            preprocess(images, changed)


GOOD: dict[Any, Any] = {"mean": [0.5, 0.25, 0.0], "std": [1.0, 2.0, 0.125], "resize": 32, "pad": 2}


@pytest.mark.parametrize(
    "obj",
    [GOOD, {**GOOD, "resize": None, "pad": 0}, {**GOOD, "mean": [0.1], "std": [0.3]}, {**GOOD, "crop": 28}],
)
def test_json_round_trip(obj: dict[str, object]) -> None:
    p = Preprocessing.from_json(json.loads(json.dumps(obj)), "plan.json")
    assert p.to_json() == obj
    assert Preprocessing.from_json(json.loads(json.dumps(p.to_json())), "plan.json") == p


BAD_VALUES = [
    ("mean", [], "mean is"),
    ("mean", [True, 0.0, 0.0], "mean holds True"),
    ("mean", [math.nan, 0.0, 0.0], "mean holds nan"),
    ("mean", [math.inf, 0.0, 0.0], "mean holds inf"),
    ("mean", ["0", 0.0, 0.0], "mean holds '0'"),
    ("mean", [10**400, 0.0, 0.0], "mean holds 1000"),
    ("mean", [0.0, 0.0], "mean has 2 values and std 3"),
    ("std", [0.0, 1.0, 1.0], "std holds 0.0"),
    ("std", [-1.0, 1.0, 1.0], "std holds -1.0"),
    ("std", [1e-60, 1.0, 1.0], "std holds 1e-60"),
    ("std", [math.nan, 1.0, 1.0], "std holds nan"),
    ("resize", 0, "resize is 0"),
    ("resize", 4097, "resize is 4097"),
    ("resize", 32.0, "resize is 32.0"),
    ("resize", True, "resize is True"),
    ("crop", 0, "crop is 0"),
    ("crop", True, "crop is True"),
    ("crop", 4097, "crop is 4097"),
    ("crop", 33, "crop is 33 and resize 32; expected a crop no larger than resize"),
    ("pad", -1, "pad is -1"),
    ("pad", 4097, "pad is 4097"),
    ("pad", False, "pad is False"),
    ("pad", None, "pad is None"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_VALUES)
def test_values_out_of_range(key: str, value: object, message: str) -> None:
    with pytest.raises(PlanError, match=f"^plan.json: {message}") as caught:
        Preprocessing.from_json({**GOOD, key: value}, "plan.json")
    assert "\n" not in str(caught.value)
    arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in {**GOOD, key: value}.items()}
    with pytest.raises(UsageError, match=f"^{message}"):
        Preprocessing(**arguments)


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        (None, "found NoneType, expected an object"),
        ([GOOD], "found list"),
        ({k: v for k, v in GOOD.items() if k != "pad"}, r"missing keys \['pad'\]"),
        ({**GOOD, "clip": 1}, r"unknown keys \['clip'\]"),
        ({**GOOD, 1: 1}, r"unknown keys \['1'\]"),
        ({**GOOD, "mean": 0.5}, "mean is float, expected a list"),
        ({**GOOD, "std": "111"}, "std is str"),
    ],
)
def test_strict_shape_of_json(obj: object, message: str) -> None:
    with pytest.raises(PlanError, match=f"^plan.json: .*{message}"):
        Preprocessing.from_json(obj, "plan.json")
