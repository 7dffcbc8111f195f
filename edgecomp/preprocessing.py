"""From pixels to a network's input, as a value that stands in plan and manifest so that a device can repeat it.

Not here: where images come from (`data`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from edgecomp.errors import DataError, PlanError, UsageError

Array = np.ndarray

MAX_SIDE = 4096
"""The largest `resize`, `crop` and `pad`, in pixels."""

MAX_PIXELS = 64_000_000
"""The largest image that is decoded or made by resizing, in pixels: what is beyond is a mistake or a bomb."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """What turns pixels into the network's input, in this order.

    1. resize: the shorter side becomes `resize` pixels (PIL bilinear), then the centre `resize` x `resize` is kept.
    2. crop: the centre `crop` x `crop` is kept.
    3. pixels / 255.
    4. `pad` zeros on each side. They are zero before step 5, so what the network sees there is (0 - mean) / std.
    5. (x - mean) / std per channel.

    Attributes:
        mean: one value per channel, or one for all channels.
        std: as many values, from 1e-6 to 1e6.
        resize: pixels, 1 to 4096, or None.
        pad: pixels, 0 to 4096.
        crop: pixels, 1 to 4096 and at most `resize`, or None.

    Raises:
        UsageError: a value is out of range, or `mean` and `std` differ in length.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    pad: int = 0
    crop: int | None = None

    def __post_init__(self) -> None:
        # Bounds rather than "finite" and "above zero": they keep (x - mean) / std finite in float32.
        object.__setattr__(self, "mean", _numbers("mean", self.mean, -1e6, 1e6))
        object.__setattr__(self, "std", _numbers("std", self.std, 1e-6, 1e6))
        if len(self.mean) != len(self.std):
            raise UsageError(f"mean has {len(self.mean)} values and std {len(self.std)}; give equally many")
        if self.resize is not None:
            _whole("resize", self.resize, 1)
        _whole("pad", self.pad, 0)
        if self.crop is not None:
            _whole("crop", self.crop, 1)
            if self.resize is not None and self.crop > self.resize:
                raise UsageError(f"crop is {self.crop} and resize {self.resize}; expected a crop no larger than resize")

    def to_json(self) -> dict[str, object]:
        """Give what `from_json` reads: lists and numbers only. A crop is left out where there is none."""
        crop = {} if self.crop is None else {"crop": self.crop}
        return {"mean": list(self.mean), "std": list(self.std), "resize": self.resize, "pad": self.pad, **crop}

    @classmethod
    def from_json(cls, obj: object, where: str) -> Preprocessing:
        """Read what `to_json` wrote; `where` names the place in errors.

        Raises:
            PlanError: a key is missing or unknown, or a value has the wrong type or range.
        """
        if not isinstance(obj, dict):
            raise PlanError(f"{where}: found {type(obj).__name__}, expected an object")
        keys = {"mean", "std", "resize", "pad"}
        if set(obj) - {"crop"} != keys:
            missing, unknown = sorted(keys - set(obj)), sorted(map(str, set(obj) - keys - {"crop"}))
            raise PlanError(f"{where}: missing keys {missing}, unknown keys {unknown}; expected {sorted(keys)}")
        for key in ("mean", "std"):
            if not isinstance(obj[key], list):
                raise PlanError(f"{where}: {key} is {type(obj[key]).__name__}, expected a list of numbers")
        try:
            return cls(**{**obj, "mean": tuple(obj["mean"]), "std": tuple(obj["std"])})
        except UsageError as error:
            raise PlanError(f"{where}: {error}") from error


def _numbers(name: str, values: Sequence[float], low: float, high: float) -> tuple[float, ...]:
    if not isinstance(values, (tuple, list)) or not values:
        raise UsageError(f"{name} is {values!r:.60}, expected one number per channel, or one for all")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise UsageError(f"{name} holds {value!r:.60}, expected numbers from {low:g} to {high:g}")
    return tuple(float(value) for value in values)


def _whole(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_SIDE:
        raise UsageError(f"{name} is {value!r:.60}, expected a whole number from {low} to {MAX_SIDE}")


def preprocess(images: Array, p: Preprocessing) -> Array:
    """Turn images into a network's input, all arithmetic in float32.

    Args:
        images: uint8 (N, H, W, C); or float32 (N, C, H, W), which is taken as preprocessed and given back as it is.
        p: what to do.

    Returns:
        float32 (N, C, H', W').

    Raises:
        DataError: `p.mean` has neither 1 nor C values, or an image cannot be resized or is smaller than the crop.
        UsageError: `images` are float and `p` would change them.
    """
    if images.dtype == np.float32:
        if p.resize is not None or p.crop is not None or p.pad or any(p.mean) or any(value != 1 for value in p.std):
            raise UsageError(
                "float images count as preprocessed: leave out --resize, --crop and --pad, "
                "use mean 0 and std 1, or bring uint8"
            )
        _check_channels(p, images.shape[1])
        return images
    _check_channels(p, images.shape[3])
    if p.resize is not None and images.shape[1:3] != (p.resize, p.resize):
        resized = np.empty((len(images), p.resize, p.resize, images.shape[3]), dtype=np.uint8)
        for i, image in enumerate(images):
            resized[i] = resize_and_crop(image, p.resize)
        images = resized
    if p.crop is not None:
        if min(images.shape[1:3]) < p.crop:
            raise DataError(
                f"images of {images.shape[2]}x{images.shape[1]} pixels are smaller than --crop {p.crop}; "
                "give a smaller one, or --resize N"
            )
        images = _centre(images, p.crop)
    n, height, width, channels = images.shape
    x = np.zeros((n, channels, height + 2 * p.pad, width + 2 * p.pad), dtype=np.float32)
    inner = x[:, :, p.pad : p.pad + height, p.pad : p.pad + width]
    inner[...] = images.transpose(0, 3, 1, 2)
    inner /= np.float32(255)
    x -= np.array(p.mean, dtype=np.float32).reshape(-1, 1, 1)
    x /= np.array(p.std, dtype=np.float32).reshape(-1, 1, 1)
    return x


def _centre(images: Array, side: int) -> Array:
    """Keep the centre of (..., H, W, C) as torchvision's CenterCrop does: (..., side, side, C)."""
    top, left = (round((n - side) / 2) for n in images.shape[-3:-1])
    return images[..., top : top + side, left : left + side, :]


def _check_channels(p: Preprocessing, channels: int) -> None:
    if len(p.mean) not in (1, channels):
        raise DataError(f"images have {channels} channels, mean and std {len(p.mean)} values; give 1 or {channels}")


def resize_and_crop(image: Array, resize: int) -> Array:
    """Scale the shorter side of uint8 (H, W, C) to `resize` pixels and keep the centre: uint8 (resize, resize, C).

    Rounds as torchvision's Resize and CenterCrop do on PIL images.

    Raises:
        DataError: the scaled image would be absurdly large, or Pillow is missing.
    """
    height, width, channels = image.shape
    if channels not in (1, 3):
        planes = [resize_and_crop(image[:, :, c : c + 1], resize) for c in range(channels)]
        return np.concatenate(planes, axis=2)
    short = min(height, width)
    height, width = int(resize * height / short), int(resize * width / short)
    if height * width > MAX_PIXELS:
        raise DataError(f"image of {image.shape[1]}x{image.shape[0]} pixels would become {width}x{height} by --resize")
    image_module = pillow()
    scaled = image_module.fromarray(np.ascontiguousarray(image[:, :, 0] if channels == 1 else image)).resize(
        (width, height), image_module.Resampling.BILINEAR
    )
    left, top = round((width - resize) / 2), round((height - resize) / 2)
    return np.asarray(scaled.crop((left, top, left + resize, top + resize))).reshape(resize, resize, channels)


def pillow() -> ModuleType:
    """Import PIL.Image.

    Raises:
        DataError: it is not installed; the message says how to install it.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("image files and --resize need Pillow: pip install 'edgecomp[bench]'") from error
    return Image
