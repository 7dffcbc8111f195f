"""Packed weights: bytes worked out by hand, and against a packer that handles one value at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp.errors import GraphError
from edgecomp.packing import FIELDS, pack, packed_bytes, unpack
from edgecomp.quantmath import WEIGHT_BITS

CODES = [0, 1, -1, 1, -2]
# Codes -> bytes of each field. In two's complement of b bits; the first code in the lowest bits of the first byte, the
# next plane begins after ceil(n * width / 8) codes.
BY_HAND = {
    # 00 01 11 01 10 in 2 bits; 2 bytes, 4 planes: byte 0 holds codes 0, 2, 4, byte 1 holds codes 1, 3.
    2: (CODES, ["00101100", "00000101"]),
    # Low 2 bits as above; the sign bits 0 0 1 0 1 are one plane of 1 bit a code, 1 byte.
    3: (CODES, ["00101100", "00000101", "00010100"]),
    # 0000 0001 1111 0001 1110 in nibbles; 3 bytes, 2 planes: codes 0, 1, 2, then 3, 4 above 0 and 1.
    4: (CODES, ["00010000", "11100001", "00001111"]),
    5: (CODES, ["00010000", "11100001", "00001111", "00010100"]),
    # The upper 2 bits are 00 00 11 00 11: byte 0 holds codes 0, 2, 4.
    6: (CODES, ["00010000", "11100001", "00001111", "00111100", "00000000"]),
    7: (CODES, ["00010000", "11100001", "00001111", "00111100", "00000000", "00010100"]),
}

lengths = st.integers(0, 70)


@st.composite
def coded(draw: st.DrawFn) -> tuple[int, np.ndarray]:
    bits = draw(st.sampled_from(sorted(FIELDS)))
    half = 1 << (bits - 1)
    size = draw(lengths)
    return bits, np.array(draw(st.lists(st.integers(-half, half - 1), min_size=size, max_size=size)), dtype=np.int8)


def pack_one_by_one(codes: list[int], bits: int) -> list[bytearray]:
    """Follow the layout as the docstring words it, with a bit at a time."""
    fields, low = [], 0
    for width in [w for w in (4, 2, 1) if bits & w]:
        m = (len(codes) * width + 7) // 8
        field = bytearray(m)
        for number, code in enumerate(codes):
            plane, byte = divmod(number, m)
            for bit in range(width):
                if (code % (1 << bits)) >> (low + bit) & 1:
                    field[byte] |= 1 << (plane * width + bit)
        fields.append(field)
        low += width
    return fields


@pytest.mark.parametrize("bits", BY_HAND)
def test_bytes_by_hand(bits: int) -> None:
    codes, want = BY_HAND[bits]
    got = b"".join(field.tobytes() for field in pack(np.array(codes, dtype=np.int8), bits))
    assert [f"{byte:08b}" for byte in got] == want


def test_widths() -> None:
    assert FIELDS == {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


@settings(derandomize=True, deadline=None, max_examples=200)
@given(coded())
def test_round_trip_and_slow_packer(case: tuple[int, np.ndarray]) -> None:
    bits, codes = case
    fields = pack(codes, bits)
    assert all(field.dtype == np.uint8 and field.ndim == 1 for field in fields)
    assert [field.tobytes() for field in fields] == [bytes(f) for f in pack_one_by_one(codes.tolist(), bits)]
    back = unpack(fields, bits, codes.size)
    assert back.dtype == np.int8
    assert np.array_equal(back, codes)
    assert sum(field.nbytes for field in fields) == packed_bytes(codes.size, bits)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_packed_bytes(bits: int) -> None:
    """Never more than a byte for each field beyond what the bits take; exactly that for multiples of 8."""
    for n in range(71):
        least = -(-n * bits // 8)
        assert least <= packed_bytes(n, bits) <= least + 2
        assert packed_bytes(8 * n, bits) == n * bits


def test_shape_does_not_matter() -> None:
    codes = np.arange(-4, 4, dtype=np.int8).repeat(3).reshape(2, 3, 2, 2)
    for whole, flat in zip(pack(codes, 3), pack(codes.reshape(-1), 3), strict=True):
        assert np.array_equal(whole, flat)
    turned = codes.transpose(3, 1, 0, 2)
    assert np.array_equal(unpack(pack(turned, 5), 5, 24), turned.reshape(-1))


def test_input_is_left_alone() -> None:
    codes = np.array([-2, 1, 0], dtype=np.int8)
    pack(codes, 2)
    assert codes.tolist() == [-2, 1, 0]


@pytest.mark.parametrize("bits", FIELDS)
def test_out_of_range(bits: int) -> None:
    half = 1 << (bits - 1)
    for code in (half, -half - 1):
        with pytest.raises(GraphError, match=rf"{-half}\.\.{half - 1}, the range of {bits} bits"):
            pack(np.array([0, code], dtype=np.int8), bits)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, bool])
def test_wrong_dtype(dtype: type) -> None:
    with pytest.raises(GraphError, match=f"{np.dtype(dtype)}, expected int8"):
        pack(np.zeros(3, dtype=dtype), 4)


@pytest.mark.parametrize("bits", [0, 1, 8, 9, -4])
def test_wrong_width(bits: int) -> None:
    with pytest.raises(GraphError, match=f"pack: {bits} bits"):
        pack(np.zeros(3, dtype=np.int8), bits)
    with pytest.raises(GraphError, match=f"for {bits} bits"):
        unpack((), bits, 0)


def test_wrong_fields() -> None:
    low, high = pack(np.zeros(9, dtype=np.int8), 3)
    with pytest.raises(GraphError, match="1 fields for 3 bits"):
        unpack((low,), 3, 9)
    with pytest.raises(GraphError, match=r"shape \(2,\), expected 17 codes"):
        unpack((np.zeros(5, dtype=np.uint8), high), 3, 17)
    with pytest.raises(GraphError, match="field of 2 bits has shape"):
        unpack((low[:-1], high), 3, 9)
    with pytest.raises(GraphError, match="field of 1 bits has shape"):
        unpack((low, high.astype(np.int8)), 3, 9)
