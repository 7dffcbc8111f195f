"""What the tests of data sources share: making files, damaging them, and seeing them refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from edgecomp.data import load
from edgecomp.errors import DataError

Files = dict[str, bytes]


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def refuse(spec: str, message: str, **options: Any) -> None:
    """The source is refused in one line that starts with it."""
    with pytest.raises(DataError, match=message) as caught:
        load(spec, **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(spec)


def write(root: Path, files: Files) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def damaged(draw_from: st.DataObject, content: bytes) -> bytes:
    """Cut the content short, or turn over a few of its bits."""
    if draw_from.draw(st.booleans(), label="truncate"):
        return content[: draw_from.draw(st.integers(0, len(content) - 1), label="length")]
    changed = bytearray(content)
    for bit in draw_from.draw(st.lists(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=4), label="bits"):
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def loads_or_is_refused(spec: str) -> None:
    try:
        got = load(spec)
    except DataError as error:
        message = str(error)
    else:
        message = ""
        assert len(got.train) > 0
        assert len(got.test) > 0
    assert "\n" not in message
