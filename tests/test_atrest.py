"""Packed codes as bytes: written by hand, there and back, and damage of every kind."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp.atrest import codes_of, facts_of, to_bytes
from edgecomp.coding import Encoded, Words, dense, encode
from edgecomp.errors import BundleError, GraphError
from edgecomp.packing import packed_bytes
from tests.test_coding import gaussian, tensors, ternary


def crc(codes: np.ndarray) -> bytes:
    return zlib.crc32(codes.astype(np.int8).tobytes()).to_bytes(4, "little")


def test_dense_by_hand() -> None:
    """Three bits: five low fields of 2 bits in planes of two bytes, then five high bits in one byte."""
    codes = np.array([1, -2, 3, -4, 0], dtype=np.int8)  # 001 110 011 100 000
    # Low two bits, codes 0 and 1 first: 1 2 | 3 0 | 0 - -> bytes 0b00001101, 0b00000010; highest bits 0 1 0 1 0.
    expected = bytes([1, 3, 0, 0, 5, 0, 0, 0]) + crc(codes) + bytes([0b00001101, 0b00000010, 0b00001010])
    assert to_bytes(dense(codes, 3)) == expected
    assert np.array_equal(codes_of(expected, 5, "w"), codes)
    assert facts_of(expected) == ("dense", 3, 5)


def by_hand() -> Encoded:
    """The words of `test_coding.test_words_by_hand`."""
    words = Words(
        word_bits=6,
        symbols=np.array([[0], [1], [-1]], dtype=np.int8),
        children=np.array([1, 0, 0, 0, 0, 0, 3, 0, 0, 0], dtype=np.uint8),
        tokens=np.array([3, 1, 63, 1, 2, 63, 2, 0], dtype=np.uint16),
        n_symbols=12,
    )
    return replace(dense(np.zeros(12, dtype=np.int8), 2), fields=(), words=words)


def test_words_by_hand() -> None:
    codes = np.array([0, 0, 1, -1, 0, 1, 0, 0, 0, 0, -1, 1], dtype=np.int8)  # aab c a b aaa a c b
    # Counts of 2 bits in planes of 3 bytes: 1 0 0 | 0 0 0 | 3 0 0 | 0. Numbers: 4 bits in two planes of 4 bytes
    # (3 1 15 1 | 2 15 2 0), then 2 bits in planes of 2 bytes (0 0 | 3 0 | 0 3 | 0 0).
    expected = (
        bytes([2, 2, 6, 1, 12, 0, 0, 0])
        + crc(codes)
        + bytes([10, 0, 0, 0, 8, 0, 0, 0, 3, 0, 2, 0])
        + bytes([0, 1, 255])
        + bytes([0b00110001, 0, 0])
        + bytes([0x23, 0xF1, 0x2F, 0x01])
        + bytes([0b00001100, 0b00110000])
    )
    assert to_bytes(by_hand()) == expected
    assert np.array_equal(codes_of(expected, 12, "w"), codes)
    assert facts_of(expected) == ("words", 2, 12)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(tensors())
def test_round_trip(case: tuple[np.ndarray, int]) -> None:
    codes, bits = case
    encoded = encode(codes, bits)
    if encoded.kind == "dense" and bits == 8:
        with pytest.raises(GraphError, match="dense codes of 8 bits"):
            to_bytes(encoded)
        return
    data = to_bytes(encoded)
    assert len(data) == encoded.stored_bytes + (12 if encoded.kind == "dense" else 24)
    back = codes_of(data, codes.size, "w")
    assert back.dtype == np.int8
    assert np.array_equal(back, codes)


def test_groups_of_codes() -> None:
    codes = gaussian(1 << 20, 2.2, 3)
    encoded = encode(codes, 3)
    assert encoded.words is not None
    assert encoded.words.symbols.shape[1] > 1
    assert np.array_equal(codes_of(to_bytes(encoded), codes.size, "w"), codes)


STREAMS = {
    "dense": to_bytes(dense(gaussian(301, 1.0, 15), 5)),
    "words": to_bytes(encode(ternary(9000, 0.9), 2)),
    "words by hand": to_bytes(by_hand()),
}
N_CODES = {"dense": 301, "words": 9000, "words by hand": 12}


def test_the_streams_are_what_they_are_called() -> None:
    assert {name: facts_of(data)[0] for name, data in STREAMS.items()} == {
        "dense": "dense", "words": "words", "words by hand": "words",
    }  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
@settings(derandomize=True, deadline=None, max_examples=300)
@given(data=st.data())
def test_damage_is_found(name: str, data: st.DataObject) -> None:
    """No flipped bit, cut or added byte passes: the checksum is of the codes themselves."""
    good = STREAMS[name]
    original = codes_of(good, N_CODES[name], "w")
    at = data.draw(st.integers(0, len(good) - 1))
    at = data.draw(st.sampled_from([at, min(at, 40)]))
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "byte"]))
    if kind == "cut":
        bad = good[:at]
    elif kind == "grow":
        bad = good[:at] + data.draw(st.binary(min_size=1, max_size=8)) + good[at:]
    else:
        byte = good[at] ^ (1 << data.draw(st.integers(0, 7))) if kind == "flip" else data.draw(st.integers(0, 255))
        bad = good[:at] + bytes([byte]) + good[at + 1 :]
    codes, message = original, ""
    try:
        codes = codes_of(bad, N_CODES[name], "layer")
    except BundleError as e:
        message = str(e)
    assert message == "" or (message.startswith("layer: ") and "\n" not in message)
    # What passes: bits behind the last code, the width that words merely name, or nothing was changed.
    assert np.array_equal(codes, original)


# what is changed in the words by hand -> what is said
BROKEN: dict[str, tuple[int, bytes, str]] = {
    "kind": (0, b"\3", "packing 3 is unknown"),
    "bits": (1, b"\1", "words of 6 bits for groups of 1 codes of 1 bits are none"),
    "word bits": (2, b"\7", "words of 7 bits"),
    "group": (3, b"\3", "groups of 3"),
    "group of none": (3, b"\0", "groups of 0"),
    "number of codes": (4, b"\x0b", "11 packed codes, the tensor's shape has 12"),
    "counts without end": (12, b"\xff\xff\xff\xff", "36 packed bytes, expected 1073741857"),
    "words without end": (16, b"\xff\xff\xff\xff", "36 packed bytes, expected 3221225502"),
    "no symbols": (20, b"\0\0", "0 symbols"),
    "more symbols than numbers": (20, b"\x21\0", "36 packed bytes, expected 66"),
    "width of a count": (22, b"\x09", "counts of 9 bits"),
    "reserved": (23, b"\1", "which no table has"),
    "length": (16, b"\x09", "packed bytes, expected"),
    "a tree with another end": (27, b"\x32", "the counts of children are no tree's"),
    "a node before its parent": (27, b"\xc0\0\x10", "the counts of children are no tree's"),
    "a number of no word": (30, b"\x29", "the words do not give the 12 symbols expected"),
    "checksum": (8, b"\0", "checksum"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_words(case: str) -> None:
    at, value, message = BROKEN[case]
    good = STREAMS["words by hand"]
    with pytest.raises(BundleError, match=message):
        codes_of(good[:at] + value + good[at + len(value) :], 12, "w")


@pytest.mark.parametrize(
    ("bad", "n", "message"),
    [
        (b"", 5, "0 packed bytes, expected a header of 12"),
        (STREAMS["dense"][:11], 301, "11 packed bytes"),
        (STREAMS["dense"], 302, "301 packed codes, the tensor's shape has 302"),
        (STREAMS["dense"][:1] + b"\x08" + STREAMS["dense"][2:], 301, "dense codes of 8 bits"),
        (STREAMS["dense"][:2] + b"\1" + STREAMS["dense"][3:], 301, "dense codes of 5 bits"),
        (STREAMS["dense"] + b"\0", 301, f"{packed_bytes(301, 5) + 1} packed bytes, expected {packed_bytes(301, 5)}"),
        (STREAMS["words"][:20], 9000, "are none"),
    ],
)
def test_broken_headers(bad: bytes, n: int, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        codes_of(bad, n, "w")


def test_facts_of_nothing() -> None:
    for bad in (b"", b"\1" * 11, b"\0" * 12):
        with pytest.raises(BundleError, match="without a header"):
            facts_of(bad)


def test_words_that_claim_more_than_they_are_take_no_memory() -> None:
    """A few bytes whose tensor has 2^30 codes: refused before anything of that size is made."""
    good = STREAMS["words by hand"]
    with pytest.raises(BundleError, match="the words do not give"):
        codes_of(good[:4] + (1 << 30).to_bytes(4, "little") + good[8:], 1 << 30, "w")
