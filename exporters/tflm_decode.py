"""Weight codes as the DECODE operator of TFLite Micro reads them: two constant uint8 tensors for each weight.

DECODE (custom code OPERATOR) takes pairs of tensors, encoded and ancillary, and gives an int8 tensor for each. The
ancillary bytes say how::

    byte  0      u8   type: 0, a table of values (LUT); 2, a bitmap (pruning)
          1      u8   1: version of this header
          2      u16  0
          4      u8   1: version of the type
          5      u8   table: bits of an index, 1-7, plus 15 * 16: one table for all channels; bitmap 0
          6      u8   how far the tables of two channels are apart: 0, as there is one
          7      9    zeros
         16           table: the values that indices name; bitmap: the values that are not 0, in their order

The encoded bytes are indices of b bits, or one bit a code that says whether it is not 0; across the borders of bytes,
the highest bit of a byte first, zeros after the last. Which of the two is smaller, `coding.micro_form` says.

Runtimes of 2025 take no notice of the 15 and give every channel of the scales its own table, at that distance: 0 has
them all read the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgecomp.coding import MICRO_HEADER_BYTES, MicroForm, micro_form
from edgecomp.errors import GraphError
from edgecomp.graph import Array

OPERATOR = "TFLM_DECODE"
_TABLE, _BITMAP = 0, 2
_ONE_TABLE = 15 << 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Decodable:
    """A weight as DECODE reads it.

    Attributes:
        form: table or bitmap.
        index_bits: table: of an index; bitmap 8, those of a value.
        encoded: the first input.
        ancillary: the second.
    """

    form: MicroForm
    index_bits: int
    encoded: bytes
    ancillary: bytes


def decodable(codes: Array) -> Decodable | None:
    """Encode the codes of a weight in the fewest bytes; None where they are smallest as they are.

    Args:
        codes: int8, any shape, at least one.

    Raises:
        GraphError: wrong dtype, or no codes.
    """
    if codes.dtype != np.int8 or not codes.size:
        raise GraphError(f"decodable: {codes.size} {codes.dtype} codes, expected int8 codes")
    flat = np.ascontiguousarray(codes).reshape(-1)
    values, indices = np.unique(flat, return_inverse=True)
    form, _ = micro_form(flat.size, values.size, int((flat == 0).sum()))
    if form is MicroForm.TABLE:
        bits = max(1, int(values.size - 1).bit_length())
        fields = np.unpackbits(indices.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :]
        ancillary = _header(_TABLE, _ONE_TABLE | bits) + values.tobytes()
        return Decodable(form=form, index_bits=bits, encoded=np.packbits(fields).tobytes(), ancillary=ancillary)
    if form is MicroForm.BITMAP:
        ancillary = _header(_BITMAP, 0) + flat[flat != 0].tobytes()
        return Decodable(form=form, index_bits=8, encoded=np.packbits(flat != 0).tobytes(), ancillary=ancillary)
    return None


def _header(kind: int, parameters: int) -> bytes:
    return bytes([kind, 1, 0, 0, 1, parameters]).ljust(MICRO_HEADER_BYTES, b"\0")


def facts_of(ancillary: bytes, n_encoded: int, n_codes: int) -> tuple[str, int]:
    """Read from anybody's file the form's name, and bits of what stands for a code.

    Args:
        ancillary: the second input.
        n_encoded: bytes of the first.
        n_codes: how many codes are to come of it.

    Raises:
        ValueError: the bytes cannot be for so many codes.
    """
    if len(ancillary) < MICRO_HEADER_BYTES:
        raise ValueError(f"{OPERATOR} reads a header of {len(ancillary)} bytes, expected {MICRO_HEADER_BYTES}")
    kind = ancillary[0]
    found, bits, index_bits = f"type {kind}", 8, 0
    if kind == _TABLE:
        found, bits = MicroForm.TABLE.value, ancillary[5] & 7
        index_bits = bits
    elif kind == _BITMAP:
        found, index_bits = MicroForm.BITMAP.value, 1
    if index_bits and n_encoded != -(-n_codes * index_bits // 8):
        raise ValueError(f"{OPERATOR} reads {n_encoded} bytes, expected {n_codes} fields of {index_bits} bits")
    return found, bits
