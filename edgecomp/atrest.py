"""A tensor's codes as one string of bytes, as they lie in a packed TFLite file: a header, then what `coding` gives.

All numbers are little-endian. Every reader checks the length to the byte, every number, and the checksum of the result.

::

    byte  0      u8   1: dense, 2: words
          1      u8   bits of a code: 2-8, dense 2-7
          2      u8   T: bits of a word's number, 6, 8, 10 or 12; dense 0
          3      u8   G: neighbouring codes that are one symbol, 1, 2 or 4; dense 0
          4      u32  number of codes, at least 1
          8      u32  CRC-32 (that of zlib) of the codes, one byte each, in two's complement
    dense 12     the fields of `packing.pack`, one after the other
    words 12     u32  number of counts of children
          16     u32  number of words' numbers
          20     u16  K: symbols, 1-255
          22     u8   bits of a count of children, 1-8
          23     u8   0
          24     K * G codes, one byte each: the symbols, most frequent first
                 the counts of children, then the words' numbers, both as `packing.pack_unsigned` gives them

What counts and numbers mean stands in `words`. Chosen 2026-11-24; the layout is part of every packed file.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

from edgecomp.coding import GROUPS, Encoded, checked_trie, decode, decode_words
from edgecomp.errors import BundleError, GraphError
from edgecomp.graph import Array
from edgecomp.packing import (
    FIELDS,
    pack_unsigned,
    packed_bytes,
    split_unsigned,
    unpack,
    unpack_unsigned,
    unsigned_bytes,
)
from edgecomp.words import WORD_BITS

_HEAD = struct.Struct("<BBBBII")
_WORDS_HEAD = struct.Struct("<IIHBB")
_DENSE, _WORDS = 1, 2


def to_bytes(encoded: Encoded) -> bytes:
    """Write encoded codes as one string of bytes.

    Args:
        encoded: from `coding.encode`.

    Raises:
        GraphError: the codes are dense and of 8 bits, which this layout has no need of.
    """
    crc, words = zlib.crc32(decode(encoded).tobytes()), encoded.words
    if words is None:
        if encoded.bits not in FIELDS:
            raise GraphError(f"to_bytes: dense codes of {encoded.bits} bits, expected one of {sorted(FIELDS)}")
        head = _HEAD.pack(_DENSE, encoded.bits, 0, 0, encoded.n_codes, crc)
        return head + b"".join(field.tobytes() for field in encoded.fields)
    n_symbols, group = words.symbols.shape
    width = words.children_bits
    fields = (*pack_unsigned(words.children, width), *pack_unsigned(words.tokens, words.word_bits))
    return b"".join(
        (
            _HEAD.pack(_WORDS, encoded.bits, words.word_bits, group, encoded.n_codes, crc),
            _WORDS_HEAD.pack(words.children.size, words.tokens.size, n_symbols, width, 0),
            words.symbols.tobytes(),
            *(field.tobytes() for field in fields),
        )
    )


def codes_of(data: bytes, n_codes: int, where: str) -> Array:
    """Read what `to_bytes` gave.

    Memory stays within a few times n_codes and the length of data, whatever stands in it.

    Args:
        data: the whole string.
        n_codes: how many codes the tensor has by its shape.
        where: names the tensor in an error.

    Returns:
        int8 (n_codes,).

    Raises:
        BundleError: the bytes are not what `to_bytes` gives for so many codes.
    """
    if len(data) < _HEAD.size:
        raise BundleError(f"{where}: {len(data)} packed bytes, expected a header of {_HEAD.size}")
    kind, bits, word_bits, group, n, crc = _HEAD.unpack_from(data)
    if n != n_codes or not n:
        raise BundleError(f"{where}: {n} packed codes, the tensor's shape has {n_codes}")
    if kind == _DENSE:
        codes = _dense_codes(data, bits, word_bits | group, n, where)
    elif kind == _WORDS:
        codes = _words_codes(data, bits, word_bits, group, n, where)
    else:
        raise BundleError(f"{where}: packing {kind} is unknown, expected 1 (dense) or 2 (words)")
    if zlib.crc32(codes.tobytes()) != crc:
        raise BundleError(f"{where}: the checksum of the unpacked codes is another; the file is damaged")
    return codes


def facts_of(data: bytes) -> tuple[str, int, int]:
    """Read from a header, without decoding: the encoding's name as in `Encoded.kind`, bits of a code, number of codes.

    Raises:
        BundleError: it is no header.
    """
    kind = data[0] if len(data) >= _HEAD.size else 0
    if kind not in (_DENSE, _WORDS):
        raise BundleError("packed weights without a header")
    return ("dense" if kind == _DENSE else "words"), data[1], _HEAD.unpack_from(data)[4]


def _dense_codes(data: bytes, bits: int, others: int, n: int, where: str) -> Array:
    if bits not in FIELDS or others:
        raise BundleError(f"{where}: dense codes of {bits} bits, expected one of {sorted(FIELDS)}")
    if len(data) != _HEAD.size + packed_bytes(n, bits):
        raise BundleError(
            f"{where}: {len(data) - _HEAD.size} packed bytes, expected {packed_bytes(n, bits)} for {n} codes of "
            f"{bits} bits"
        )
    fields, at = [], _HEAD.size
    for width in FIELDS[bits]:
        n_bytes = -(-n * width // 8)
        fields.append(np.frombuffer(data, dtype=np.uint8, count=n_bytes, offset=at))
        at += n_bytes
    return unpack(tuple(fields), bits, n)


def _words_codes(data: bytes, bits: int, word_bits: int, group: int, n: int, where: str) -> Array:
    at = _HEAD.size + _WORDS_HEAD.size
    if len(data) < at or not 2 <= bits <= 8 or word_bits not in WORD_BITS or group not in GROUPS or n % group:
        raise BundleError(f"{where}: words of {word_bits} bits for groups of {group} codes of {bits} bits are none")
    n_counts, n_tokens, n_symbols, width, zero = _WORDS_HEAD.unpack_from(data, _HEAD.size)
    if not 1 <= width <= 8 or zero or not n_counts or not n_tokens or not n_symbols:
        raise BundleError(f"{where}: {n_symbols} symbols and {n_counts} counts of {width} bits, which no table has")
    expected = at + n_symbols * group + unsigned_bytes(n_counts, width) + unsigned_bytes(n_tokens, word_bits)
    if len(data) != expected:
        raise BundleError(f"{where}: {len(data)} packed bytes, expected {expected}")
    symbols = np.frombuffer(data, dtype=np.int8, count=n_symbols * group, offset=at).reshape(n_symbols, group)
    at += symbols.size
    counts = split_unsigned(data, width, n_counts, at)
    at += unsigned_bytes(n_counts, width)
    tokens = unpack_unsigned(split_unsigned(data, word_bits, n_tokens, at), word_bits, n_tokens)
    try:
        trie = checked_trie(
            word_bits=word_bits,
            symbols=symbols,
            children=np.concatenate(list(unpack_unsigned(counts, width, n_counts))),
            n_tokens=n_tokens,
            n_symbols=n // group,
        )
        codes: Array = np.empty(n, dtype=np.int8)
        decode_words(trie, symbols, tokens, codes)
    except GraphError as e:
        raise BundleError(f"{where}: {e}") from e
    return codes
