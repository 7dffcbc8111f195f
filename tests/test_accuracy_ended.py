"""Classifying images on all cores ends on all of them when one fails or is interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from edgecomp.check import measure_accuracy
from edgecomp.data import LabelledImages
from edgecomp.preprocessing import Preprocessing

BATCHES = 100_000


def test_interrupted_on_one_core_no_other_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[int] = []
    batches, at_work = [0], threading.Event()

    def accuracy(
        runner: object, images: LabelledImages, preprocessing: object, *, progress: Callable[[int], object]
    ) -> tuple[float, int]:
        shares.append(len(images))
        if len(shares) == 1:
            at_work.wait(60)
            raise KeyboardInterrupt
        for _ in range(BATCHES):
            progress(1)
            batches[0] += 1
            at_work.set()
            threading.Event().wait(0.001)
        return 100.0, len(images)

    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("edgecomp.benchmarks.accuracy.accuracy", accuracy)
    monkeypatch.setattr("edgecomp.benchmarks.runners.runner_class", lambda name: lambda model, threads: object())
    images = LabelledImages(images=np.zeros((4, 8, 8, 1), dtype=np.uint8), labels=np.zeros(4, dtype=np.int64))
    with pytest.raises(KeyboardInterrupt):
        measure_accuracy(b"", "onnxruntime", images, Preprocessing(mean=(0.0,), std=(1.0,)))
    assert shares == [2, 2]
    assert 0 < batches[0] < BATCHES
