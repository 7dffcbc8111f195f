"""Weights as the C kernels read them: a stream of bits for every four filters, in the order of the inner loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from edgecomp.graph import Array

LINEAR_RUN = 128
"""So many taps of a linear layer are decoded at a time: EDGECOMP_LINEAR_RUN of the kernels."""
PATCH_FOURS = 6
"""ENOUGH_FOURS of the kernels: with so many fours of filters in scratch memory a convolution is computed on patches."""
FOUR_BYTES = 64
"""EDGECOMP_FOUR_BYTES of the kernels."""
_OF_FOUR = (0, 2, 1, 3)
"""The order in which one instruction widens the bytes of a word, two by two."""


class Form(IntEnum):
    """How codes are stored; see `enum edgecomp_form` in edgecomp_kernels.h, which has the same numbers."""

    DENSE = 0
    TABLE = 1
    SPARSE = 2
    SPARSE_TABLE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeStream:
    """The weights of a layer.

    Attributes:
        form: how each code is stored.
        bits: of a code, or of its place in `levels`.
        levels: the codes that occur, where places are stored.
        data: the stream.
    """

    form: Form
    bits: int
    levels: tuple[int, ...]
    data: bytes

    @property
    def n_bytes(self) -> int:
        """Count what the layer takes."""
        return len(self.data) + len(self.levels)


def filter_fours(weight: Array, groups: int, run: int) -> Iterator[Array]:
    """Give the codes of every four filters in the order of the stream; the last of a group may be fewer.

    Args:
        weight: int8 (O, taps), in the order of the image in memory.
        groups: of filters; no four belong to two.
        run: taps that lie side by side in what the kernel reads; divides their number, but for linear layers.
    """
    n_taps = weight.shape[1]
    for group in np.split(weight, groups):
        for first in range(0, len(group), 4):
            filters = group[first : first + 4]
            parts = []
            for start in range(0, n_taps, run):
                taps = filters[:, start : start + run]
                whole = taps.shape[1] // 4 * 4
                fours = taps[:, :whole].reshape(len(filters), -1, 4)[:, :, _OF_FOUR].reshape(len(filters), -1, 2, 2)
                parts += [fours.transpose(1, 2, 0, 3).ravel(), taps[:, whole:].T.ravel()]
            yield np.concatenate(parts)


def channel_fours(weight: Array) -> Iterator[Array]:
    """Give the codes of a depthwise layer, int8 (C, taps): of every four channels each tap in turn."""
    for start in range(0, len(weight), 4):
        yield weight[start : start + 4].T.ravel()


def code_stream(parts: list[Array], *, packed: bool = True) -> CodeStream:
    """Store codes in the form that takes the fewest bytes; of equal ones the one that is decoded fastest.

    Args:
        parts: int8 arrays, each of which starts on a byte.
        packed: false for a byte a code.
    """
    codes = np.concatenate(parts)
    if not packed:
        return _stream(parts, Form.DENSE, 8, codes)
    levels = np.unique(codes)
    others = levels[levels != 0]
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    # In two's complement.
    width = 1 + max(high.bit_length(), (-1 - low).bit_length() if low < 0 else 0)
    options = [_stream(parts, Form.DENSE, width, levels)]
    if len(levels) <= 128:
        options.append(_stream(parts, Form.TABLE, max(1, (len(levels) - 1).bit_length()), levels))
    if 0 < len(others) < len(codes) and (codes == 0).mean() > 1 / 16:
        options.append(_stream(parts, Form.SPARSE, width, levels))
        if len(others) <= 128:
            options.append(_stream(parts, Form.SPARSE_TABLE, max(1, (len(others) - 1).bit_length()), others))
    return min(options, key=lambda stream: (stream.n_bytes, stream.form))


def _stream(parts: list[Array], form: Form, bits: int, levels: Array) -> CodeStream:
    packed = bytearray()
    for part in parts:
        values = part.astype(np.int64) & ((1 << bits) - 1)
        if form in (Form.TABLE, Form.SPARSE_TABLE):
            values = np.searchsorted(levels, part)
        fields = values[:, None] >> np.arange(bits) & 1
        if form >= Form.SPARSE:
            there = (part != 0)[:, None]
            flat = np.concatenate([there, fields], axis=1)
            flat = flat[np.concatenate([np.ones_like(there), np.repeat(there, bits, axis=1)], axis=1)]
        else:
            flat = fields.ravel()
        packed += np.packbits(flat.astype(np.uint8), bitorder="little").tobytes()
    kept = tuple(int(v) for v in levels) if form in (Form.TABLE, Form.SPARSE_TABLE) else ()
    return CodeStream(form=form, bits=bits, levels=kept, data=bytes(packed))
