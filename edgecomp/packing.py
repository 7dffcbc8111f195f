"""Codes of 2-8 bits as bytes, and back.

A width is stored as fields of 4, 2 and 1 bits (7 = 4 + 2 + 1), each field packed by itself: a runtime then needs only
shifts and masks on whole arrays to unpack, whatever the width, and no bit is wasted. Codes of b bits are stored in
two's complement of b bits. A field of w bits of n codes is one byte array of ceil(n*w/8) bytes, in planes: with m bytes
and k = 8/w planes, code number p*m + i stands in byte i at bit p*w. The first field holds the lowest bits. Chosen
2026-11-23; the order is part of the format of every exported file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from edgecomp.errors import GraphError
from edgecomp.graph import Array
from edgecomp.quantmath import WEIGHT_BITS

FIELDS: dict[int, tuple[int, ...]] = {
    bits: tuple(width for width in (4, 2, 1) if bits & width) for bits in WEIGHT_BITS if bits < 8
}
"""Bits of a code -> widths of its fields, lowest bits first. 8 bits are stored as they are."""
_CHUNK = 1 << 16
_PART = 1 << 14


def packed_bytes(n_codes: int, bits: int) -> int:
    """Count the bytes that `pack` gives."""
    if bits == 8:
        return n_codes
    return sum(-(-n_codes * width // 8) for width in FIELDS[bits])


def pack(codes: Array, bits: int) -> tuple[Array, ...]:
    """Pack codes into one byte array a field.

    Args:
        codes: int8, any shape, each within -2^(bits-1) .. 2^(bits-1) - 1.
        bits: 2-7.

    Returns:
        uint8 arrays, in the order of FIELDS[bits].

    Raises:
        GraphError: wrong dtype or width, or a code out of range.
    """
    if bits not in FIELDS:
        raise GraphError(f"pack: {bits} bits, expected one of {sorted(FIELDS)}")
    if codes.dtype != np.int8:
        raise GraphError(f"pack: codes are {codes.dtype}, expected int8")
    half = 1 << (bits - 1)
    flat = np.ascontiguousarray(codes).reshape(-1)
    if flat.size and not (-half <= int(flat.min()) and int(flat.max()) < half):
        raise GraphError(f"pack: a code is outside {-half}..{half - 1}, the range of {bits} bits")
    unsigned = flat.view(np.uint8) & np.uint8((1 << bits) - 1)
    fields, low = [], 0
    for width in FIELDS[bits]:
        fields.append(_pack_field((unsigned >> low) & ((1 << width) - 1), width))
        low += width
    return tuple(fields)


def unpack(fields: tuple[Array, ...], bits: int, n_codes: int, out: Array | None = None) -> Array:
    """Undo `pack`, in little memory beside the result.

    Args:
        fields: as `pack` gave them.
        bits: 2-7.
        n_codes: how many codes there are.
        out: int8 (n_codes,), where to write; a new array when not given.

    Returns:
        int8 (n_codes,).

    Raises:
        GraphError: number or length of the fields does not fit.
    """
    if bits not in FIELDS or len(fields) != len(FIELDS[bits]):
        raise GraphError(f"unpack: {len(fields)} fields for {bits} bits")
    codes: Array = np.empty(n_codes, dtype=np.int8) if out is None else out
    unsigned, low = codes.view(np.uint8), 0
    unsigned[:] = 0
    for field, width in zip(fields, FIELDS[bits], strict=True):
        n_bytes, mask = -(-n_codes * width // 8), np.uint8((1 << width) - 1)
        if field.dtype != np.uint8 or field.shape != (n_bytes,):
            raise GraphError(f"unpack: field of {width} bits has shape {field.shape}, expected {n_codes} codes' worth")
        for plane in range(8 // width):
            for at in range(plane * n_bytes, min((plane + 1) * n_bytes, n_codes), _CHUNK):
                end = min(at + _CHUNK, (plane + 1) * n_bytes, n_codes)
                part = field[at - plane * n_bytes : end - plane * n_bytes] >> np.uint8(plane * width)
                unsigned[at:end] |= (part & mask) << np.uint8(low)
        low += width
    unsigned <<= np.uint8(8 - bits)
    codes >>= np.int8(8 - bits)  # copies the sign
    return codes


def unsigned_fields(bits: int) -> tuple[int, ...]:
    """Split a width of 1-15 bits into widths of fields, lowest bits first: 8, 4, 2 and 1 as needed."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def pack_unsigned(values: Array, bits: int) -> tuple[Array, ...]:
    """Pack numbers below 2^bits, any integer dtype (n,), as `pack` does: uint8 arrays as unsigned_fields has them."""
    fields, low = [], 0
    for width in unsigned_fields(bits):
        fields.append(_pack_field(((values >> low) & ((1 << width) - 1)).astype(np.uint8), width))
        low += width
    return tuple(fields)


def unsigned_bytes(n_values: int, bits: int) -> int:
    """Count the bytes that `pack_unsigned` gives."""
    return sum(-(-n_values * width // 8) for width in unsigned_fields(bits))


def split_unsigned(data: bytes, bits: int, n_values: int, offset: int = 0) -> tuple[Array, ...]:
    """Find the fields of `pack_unsigned` where they lie one after the other in data: views, uint8.

    Args:
        data: at least offset + unsigned_bytes(n_values, bits) bytes.
        bits: of a number, 1-15.
        n_values: how many numbers there are.
        offset: where the first field starts.
    """
    fields = []
    for width in unsigned_fields(bits):
        n_bytes = -(-n_values * width // 8)
        fields.append(np.frombuffer(data, dtype=np.uint8, count=n_bytes, offset=offset))
        offset += n_bytes
    return tuple(fields)


def unpack_unsigned(fields: Sequence[Array], bits: int, n_values: int) -> Iterator[Array]:
    """Undo `pack_unsigned`, in little memory: uint16, one part after the other, at least one.

    Raises:
        GraphError: number or length of the fields does not fit.
    """
    widths = unsigned_fields(bits)
    if [field.size for field in fields] != [-(-n_values * width // 8) for width in widths]:
        raise GraphError(f"unpack: fields of {[field.size for field in fields]} bytes for {n_values} of {bits} bits")
    for start in range(0, max(n_values, 1), _PART):
        at = np.arange(start, min(start + _PART, n_values))
        values, low = np.zeros(at.size, dtype=np.uint16), 0
        for field, width in zip(fields, widths, strict=True):
            plane, place = np.divmod(at, max(field.size, 1))
            part = (field[place] >> (plane * width).astype(np.uint8)) & np.uint8((1 << width) - 1)
            values |= part.astype(np.uint16) << np.uint16(low)
            low += width
        yield values


def _pack_field(values: Array, width: int) -> Array:
    planes = 8 // width
    n_bytes = -(-values.size // planes)
    padded = np.zeros(planes * n_bytes, dtype=np.uint8)
    padded[: values.size] = values
    out = np.zeros(n_bytes, dtype=np.uint8)
    for plane in range(planes):
        out |= padded[plane * n_bytes : (plane + 1) * n_bytes] << np.uint8(plane * width)
    return out
