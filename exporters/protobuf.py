"""Just enough of protobuf's wire format to read and write ONNX where the `onnx` package is not: on a device.

A message is a row of fields, each a number, a kind and a value. Nothing is copied: values are views of the file.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED = {FIXED64: 8, FIXED32: 4}
_LONGEST_VARINT = 10
_LARGEST_NUMBER = (1 << 29) - 1


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview, memoryview]]:
    """Read a message field by field: number, value (a view for all kinds but varint), the whole field with its tag.

    Raises:
        ValueError: it is cut off, or no message.
    """
    at, end = 0, len(message)
    while at < end:
        start = at
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if not 1 <= number <= _LARGEST_NUMBER:
            raise ValueError(f"field {number} at byte {start} of a message of {end}")
        if kind == VARINT:
            value, at = _varint(message, at)
            yield number, value, message[start:at]
            continue
        if kind == BYTES:
            n, at = _varint(message, at)
        elif kind in _FIXED:
            n = _FIXED[kind]
        else:
            raise ValueError(f"field {number} at byte {start} is of kind {kind}")
        if n > end - at:
            raise ValueError(f"field {number} at byte {start} has {n} bytes, {end - at} are left")
        yield number, message[at : at + n], message[start : at + n]
        at += n


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for i in range(_LONGEST_VARINT):
        if at + i >= len(message):
            raise ValueError("it is cut off within a number")
        byte = message[at + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            if value >> 64:
                break
            return value, at + i + 1
    raise ValueError("a number has more than 64 bits")


def view(value: int | memoryview) -> memoryview:
    """Give a value that must be bytes (TypeError)."""
    if isinstance(value, int):
        raise TypeError("a number where bytes are expected")
    return value


def whole(value: int | memoryview) -> int:
    """Give a value that must be a number that is not negative (ValueError)."""
    if not isinstance(value, int) or value >> 63:
        raise ValueError("expected a number that is not negative")
    return value


def varint(value: int) -> bytes:
    """Write a number that is not negative."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number_field(number: int, value: int) -> bytes:
    """Write a field whose value is a number that is not negative."""
    return varint(number << 3 | VARINT) + varint(value)


def bytes_head(number: int, n_bytes: int) -> bytes:
    """Write what stands before the bytes of a field."""
    return varint(number << 3 | BYTES) + varint(n_bytes)


def bytes_field(number: int, value: bytes | memoryview) -> bytes:
    """Write a field of bytes."""
    return bytes_head(number, len(value)) + bytes(value)
