"""The bundled sample: a small trained CNN and a slice of Fashion-MNIST; README.md beside this file says more.

`train.py`, which made it, is a script: it needs torch, and nothing imports it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgecomp.errors import DataError

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """Where the sample's files lie, and what is on record about them.

    Attributes:
        weights: safetensors, the state_dict of `edgecomp.pytorch.networks.resnet8`, float32 (and BatchNorm's counters).
        images: .npz with calib_x uint8 (512, 28, 28), calib_y uint8 (512,), test_x (2000, 28, 28), test_y (2000,).
        record: sample.json: model, classes, input_shape (C, H, W), preprocessing (pixels / 255, pad, mean, std),
            accuracy as counts, and the command that made it.
    """

    weights: Path
    images: Path
    record: Mapping[str, Any]


def sample_files() -> Sample:
    """Find the sample's files.

    Raises:
        DataError: a file is missing from this installation.
    """
    path = _HERE / "sample.json"
    _require(path)
    record = json.loads(path.read_text(encoding="utf-8"))
    weights, images = _HERE / record["weights"], _HERE / record["images"]
    _require(weights)
    _require(images)
    return Sample(weights=weights, images=images, record=MappingProxyType(record))


def _require(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: missing, expected a file of the bundled sample; install edgecomp again")
