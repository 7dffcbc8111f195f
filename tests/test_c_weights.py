"""Weights as streams of bits for the C kernels, read back bit by bit from strings of 0 and 1."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecomp.coding import plain_c_bits
from edgecomp.exporters.c_weights import (
    FOUR_BYTES,
    LINEAR_RUN,
    PATCH_FOURS,
    CodeStream,
    Form,
    channel_fours,
    code_stream,
    filter_fours,
)
from edgecomp.exporters.to_c import kernel_files
from edgecomp.graph import Array


def read(stream: CodeStream, sizes: list[int]) -> list[list[int]]:
    """Decode parts of the given numbers of codes."""
    bits, found = "".join(f"{byte:08b}"[::-1] for byte in stream.data), []

    def take(n: int) -> str:
        nonlocal bits
        text, bits = bits[:n], bits[n:]
        assert len(text) == n
        return text[::-1]

    for size in sizes:
        before, codes = len(bits), []
        for _ in range(size):
            if stream.form in (Form.SPARSE, Form.SPARSE_TABLE) and take(1) == "0":
                codes.append(0)
                continue
            value = int(take(stream.bits), 2)
            if stream.levels:
                codes.append(stream.levels[value])
            else:
                codes.append(value - (1 << stream.bits) if value >> (stream.bits - 1) else value)
        take((len(bits) - before) % 8)  # the rest of the part's last byte
        found.append(codes)
    assert not bits
    return found


CODES = st.sampled_from(
    ([-1, 0, 1], [0], [5], [-8, 7], [0, 0, 0, 0, 0, 0, 100], [-127, 127], list(range(-127, 128)), [0, 0, 0, 3, -5, 90])
)


@given(CODES, st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(0, 1 << 30), st.booleans())
def test_streams_hold_the_codes(values: list[int], sizes: list[int], seed: int, packed: bool) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.choice(np.array(values, dtype=np.int8), size) for size in sizes]
    stream = code_stream(parts, packed=packed)
    assert read(stream, sizes) == [part.tolist() for part in parts]
    assert stream.n_bytes == len(stream.data) + len(stream.levels)
    counts = np.bincount(np.concatenate(parts).astype(int) + 128, minlength=256)
    if packed:
        # What a planner counts with leaves out only the ends of parts.
        assert 0 <= 8 * stream.n_bytes - plain_c_bits(counts) < 8 * len(parts)
    else:
        assert len(stream.data) == sum(sizes)


@pytest.mark.parametrize(
    ("values", "form", "bits"),
    [
        (list(range(-8, 8)), Form.DENSE, 4),
        ([-1, 0], Form.DENSE, 1),
        ([-100, -7, 0, 55], Form.TABLE, 2),
        ([0] * 90 + list(range(-7, 8)), Form.SPARSE, 4),
        ([0] * 30 + [-90, 77], Form.SPARSE_TABLE, 1),
        (list(range(-127, 128)), Form.DENSE, 8),
    ],
)
def test_the_smallest_form_is_taken(values: list[int], form: Form, bits: int) -> None:
    stream = code_stream([np.resize(np.array(values, dtype=np.int8), 4096)])
    assert (stream.form, stream.bits) == (form, bits)


def slow_order(weight: Array, groups: int, run: int) -> list[list[int]]:
    """The order that edgecomp_kernels.h tells, in loops."""
    per = len(weight) // groups
    found = []
    for g in range(groups):
        for first in range(0, per, 4):
            filters = [weight[g * per + f] for f in range(first, min(first + 4, per))]
            codes: list[int] = []
            for start in range(0, weight.shape[1], run):
                length = min(run, weight.shape[1] - start)
                whole = length - length % 4
                for four in range(0, whole, 4):
                    for pair in ((0, 2), (1, 3)):
                        codes += [int(f[start + four + tap]) for f in filters for tap in pair]
                codes += [int(f[start + tap]) for tap in range(whole, length) for f in filters]
            found.append(codes)
    return found


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 11), st.integers(1, 4))
def test_filters_by_fours(groups: int, per_group: int, run: int, n_runs: int) -> None:
    shape = (groups * per_group, run * n_runs)
    weight = np.random.default_rng(0).integers(-127, 128, size=shape).astype(np.int8)
    assert [part.tolist() for part in filter_fours(weight, groups, run)] == slow_order(weight, groups, run)


def test_a_linear_layers_last_run_may_be_shorter() -> None:
    weight = np.arange(-70, 70, dtype=np.int8).reshape(2, 70)
    assert [part.tolist() for part in filter_fours(weight, 1, 64)] == slow_order(weight, 1, 64)


def test_channels_by_fours() -> None:
    weight = np.arange(18, dtype=np.int8).reshape(6, 3)
    first, last = channel_fours(weight)
    assert first.tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert last.tolist() == [12, 15, 13, 16, 14, 17]


def test_the_kernels_have_the_same_numbers() -> None:
    text = b"".join(kernel_files().values()).decode()
    found = {name: int(value) for name, value in re.findall(r"#define (\w+) (\d+)u\n", text)}
    assert found["EDGECOMP_LINEAR_RUN"] == LINEAR_RUN
    assert found["EDGECOMP_FOUR_BYTES"] == FOUR_BYTES
    assert found["ENOUGH_FOURS"] == PATCH_FOURS
