"""How good an exported file is: accuracy through its runtime, and parity with what it should compute."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgecomp.data import LabelledImages
from edgecomp.errors import DataError, ParityError, UsageError
from edgecomp.graph import Array
from edgecomp.preprocessing import Preprocessing
from edgecomp.report import Parity

from .runtime import Runner


def accuracy(
    runner: Runner,
    images: LabelledImages,
    preprocessing: Preprocessing,
    *,
    batch: int = 256,
    progress: Callable[[int], object] | None = None,
) -> tuple[float, int]:
    """Classify all images with a model: (percentage whose largest output is their label, number of images).

    Of equal outputs the first counts, which integer outputs make less rare.

    Args:
        runner: the model; integer inputs are quantized by the runner.
        images: what to classify.
        preprocessing: what turns their pixels into the network's input.
        batch: images at once.
        progress: called after each batch with the number of images in it.

    Raises:
        DataError: the images do not fit the model, or a label is beyond its outputs.
        ParityError: an output is NaN.
        UsageError: `batch` is below 1.
    """
    if batch < 1:
        raise UsageError(f"batch is {batch}, expected at least 1")
    n, right = len(images.labels), 0
    classes = int(np.prod(runner.output.shape))
    if (top := int(images.labels.max())) >= classes:
        raise DataError(
            f"the data has the label {top}, the model has {classes} outputs; expected labels below {classes}"
        )
    for start in range(0, n, batch):
        stop = min(start + batch, n)
        scores = runner.run(images.inputs(preprocessing, start, stop)).reshape(stop - start, -1)
        if np.isnan(scores).any():
            worst = start + int(np.argmax(np.isnan(scores).any(axis=1)))
            raise ParityError(f"image {worst}: the model's output is NaN, expected numbers")
        right += int((scores.argmax(axis=1) == images.labels[start:stop]).sum())
        if progress is not None:
            progress(stop - start)
    return 100 * right / n, n


def parity(expected: Array, got: Array, step: float = 1.0) -> Parity:
    """Compare two outputs in steps of the last place.

    The distance of two values in steps is, for integer codes, |expected - got|, whatever `step` says. For floats it is
    |expected - got| / step rounded to the nearest whole number, halves up, where `step` is the scale of the output
    tensor, i.e. what one code is worth. So two floats are equal when they differ by less than half a step.

    Args:
        expected: integers or floats, any shape with at least one element.
        got: the same shape; integers if `expected` are.
        step: above 0.

    Raises:
        ParityError: another shape or kind of type, no element, or NaN or infinity on one side.
        UsageError: `step` is not above 0.
    """
    expected, got = np.asarray(expected), np.asarray(got)
    if expected.shape != got.shape or not expected.size:
        raise ParityError(f"outputs have shape {got.shape}, expected {expected.shape} with at least one element")
    integers = [array.dtype.kind in "iu" for array in (expected, got)]
    if integers[0] != integers[1]:
        raise ParityError(f"outputs are {got.dtype}, expected {expected.dtype}; compare codes with codes")
    if all(integers):
        steps = np.abs(expected.astype(np.int64) - got.astype(np.int64))
    else:
        if not (np.isfinite(step) and step > 0):
            raise UsageError(f"step is {step}, expected the output's scale, above 0")
        for name, array in (("expected", expected), ("found", got)):
            if not np.isfinite(array).all():
                index = np.unravel_index(int(np.argmin(np.isfinite(array))), array.shape)
                raise ParityError(f"output {tuple(map(int, index))}: {name} {array[index]}, which is not a number")
        distance = np.abs(expected.astype(np.float64) - got.astype(np.float64)) / step
        steps = np.minimum(np.floor(distance + 0.5), 2.0**62).astype(np.int64)
    worst = np.unravel_index(int(steps.argmax()), steps.shape)
    return Parity(
        equal_percent=100 * float((steps == 0).mean()),
        max_steps=int(steps[worst]),
        worst_index=tuple(map(int, worst)),
        n=int(steps.size),
    )
