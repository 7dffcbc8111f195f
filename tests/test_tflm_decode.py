"""What TFLite Micro's DECODE reads: by hand, by a loop over bits, and in the real operator."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecomp.benchmarks.runners import TfliteMicro
from edgecomp.coding import DECODING_BYTES, MicroForm, micro_form, stored_bits
from edgecomp.errors import GraphError
from edgecomp.exporters import export
from edgecomp.exporters.tflm_decode import Decodable, decodable, facts_of
from edgecomp.graph import Graph, Node, Op, QuantParams, Tensor
from tests.micro import NEEDS_MICRO


@pytest.mark.parametrize(
    ("pattern", "encoded", "ancillary"),
    [
        # Indices 0 1 2 2 of 2 bits: 00 01 10 10.
        ([-1, 0, 1, 1], "1a", "00 01 0000 01 f2 00 000000000000000000 ff 00 01"),
        # Indices 0 1 2 3 4 5 6 0 of 3 bits: 00000101 00111001 01110000.
        ([-3, -2, -1, 0, 1, 2, 3, -3], "053970", "00 01 0000 01 f3 00 000000000000000000 fd fe ff 00 01 02 03"),
        # One bit is enough for two values.
        ([5, -7, -7, 5, -7, -7, -7, 5], "91", "00 01 0000 01 f1 00 000000000000000000 f9 05"),
    ],
)
def test_tables_by_hand(pattern: list[int], encoded: str, ancillary: str) -> None:
    found = decodable(np.array(pattern * 200, dtype=np.int8))
    assert found is not None
    assert found.encoded == bytes.fromhex(encoded) * 200
    assert found.ancillary == bytes.fromhex(ancillary)
    assert (found.form, found.index_bits) == (MicroForm.TABLE, found.ancillary[5] & 7)


def test_a_bitmap_by_hand() -> None:
    codes = np.array([0, 0, 0, 0, 0, 0, 7, 0, -5, *[0] * 23] * 40, dtype=np.int8)
    found = decodable(codes)
    assert found == Decodable(
        form=MicroForm.BITMAP,
        index_bits=8,
        encoded=bytes.fromhex("02800000") * 40,
        ancillary=bytes.fromhex("02 01 0000 01 00 00 000000000000000000") + bytes.fromhex("07fb") * 40,
    )


def decoded_by_bits(found: Decodable, n: int) -> list[int]:
    """Read one bit after the other, as the format says."""
    bits = [byte >> (7 - i) & 1 for byte in found.encoded for i in range(8)]
    values = [byte - 256 if byte > 127 else byte for byte in found.ancillary[16:]]
    if found.ancillary[0] == 2:
        out = [values.pop(0) if bits[i] else 0 for i in range(n)]
        assert not values
        return out
    width, out = found.ancillary[5] % 16, []
    for i in range(n):
        index = 0
        for bit in bits[i * width : (i + 1) * width]:
            index = 2 * index + bit
        out.append(values[index])
    return out


@st.composite
def any_codes(draw: st.DrawFn) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, limit = draw(st.integers(1, 3000)), draw(st.sampled_from([0, 1, 2, 3, 7, 15, 31, 63, 127]))
    codes = rng.integers(-limit, limit + 1, n)
    codes[rng.random(n) < draw(st.sampled_from([0, 0.5, 0.8, 0.95, 0.99]))] = 0
    return codes.astype(np.int8)


@given(codes=any_codes())
def test_nothing_is_lost_and_every_byte_is_counted(codes: np.ndarray) -> None:
    found = decodable(codes)
    form, n_bytes = micro_form(codes.size, len(set(codes.tolist())), codes.tolist().count(0))
    counts = np.bincount(codes.astype(np.int64) + 128, minlength=256)
    assert stored_bits("tflm", NODE, 8, counts) == 8 * n_bytes
    if found is None:
        assert (form, n_bytes) == (MicroForm.DENSE, codes.size)
        return
    assert decoded_by_bits(found, codes.size) == codes.tolist()
    assert len(found.encoded) + len(found.ancillary) == n_bytes < codes.size - DECODING_BYTES
    assert found.form is form
    assert facts_of(found.ancillary, len(found.encoded), codes.size) == (form.value, found.index_bits)


NODE = Node(name="fc", op=Op.LINEAR, inputs=("input", "fc.weight"), outputs=("fc",), attrs={"clamp": (-128, 127)})


@pytest.mark.parametrize("n_levels", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 32, 33, 64, 65, 127, 128])
def test_the_form_is_the_smallest(n_levels: int) -> None:
    """Against all sizes, one by one."""
    for n in (1, 100, 177, 1000, 40_000):
        for n_zeros in range(0, n + 1, max(1, n // 9)):
            index_bits = next(b for b in range(1, 8) if 1 << b >= n_levels)
            sizes = {
                MicroForm.DENSE: n - DECODING_BYTES,
                MicroForm.TABLE: 16 + -(-n * index_bits // 8) + n_levels,
                MicroForm.BITMAP: 16 + -(-n // 8) + n - n_zeros,
            }
            form, n_bytes = micro_form(n, n_levels, n_zeros)
            assert sizes[form] == min(sizes.values())
            assert n_bytes == (n if form is MicroForm.DENSE else sizes[form])


def test_more_levels_than_an_index_names() -> None:
    codes = np.arange(-128, 128).repeat(100).astype(np.int8)
    assert decodable(codes) is None
    assert micro_form(10_000, 129, 5) == (MicroForm.DENSE, 10_000)
    assert micro_form(10_000, 129, 9_000)[0] is MicroForm.BITMAP


@pytest.mark.parametrize("codes", [np.zeros(0, dtype=np.int8), np.zeros(900, dtype=np.int16)])
def test_what_is_no_weight(codes: np.ndarray) -> None:
    with pytest.raises(GraphError, match="expected int8 codes"):
        decodable(codes)


def test_lengths_that_do_not_fit() -> None:
    table, bitmap = bytes([0, 1, 0, 0, 1, 0xF3]).ljust(16, b"\0"), bytes([2, 1, 0, 0, 1, 0]).ljust(16, b"\0")
    assert facts_of(table, 3, 8) == ("table", 3)
    assert facts_of(bitmap, 2, 9) == ("bitmap", 8)
    assert facts_of(bytes([1]).ljust(16, b"\0"), 5, 9) == ("type 1", 8)
    for ancillary, n_encoded in ((table, 4), (table, 2), (bitmap, 1), (bitmap, 3), (table[:15], 3)):
        with pytest.raises(ValueError, match="TFLM_DECODE reads"):
            facts_of(ancillary, n_encoded, 9 if ancillary is bitmap else 8)


# ---- in the real operator --------------------------------------------------------------------------------------------


def unit(bits: int, axis: int | None = None, n: int = 1) -> QuantParams:
    """Codes that are their own values."""
    shape = () if axis is None else (n,)
    zeros = np.zeros(shape, dtype=np.int32)
    return QuantParams(bits=bits, scale=np.ones(shape, dtype=np.float32), zero_point=zeros, axis=axis)


def that_gives_its_weight(codes: np.ndarray) -> Graph:
    """A linear layer whose output for the k-th unit vector is the k-th column of its weight (O, I), unchanged."""
    o, i = codes.shape
    tensors = (
        Tensor(name="input", shape=(1, i), quant=unit(8)),
        Tensor(name="fc.weight", shape=(o, i), data=codes, quant=unit(8, 0, o)),
        Tensor(name="fc", shape=(1, o), quant=unit(8)),
    )
    return Graph(name="g", nodes=(NODE,), tensors={t.name: t for t in tensors}, inputs=("input",), outputs=("fc",))


@NEEDS_MICRO
@pytest.mark.parametrize("zeros", [0, 0.7, 0.97])
@pytest.mark.parametrize("n_levels", [2, 3, 4, 6, 8, 11, 16, 25, 32, 50, 64, 100, 128])
def test_the_interpreter_reads_every_code(n_levels: int, zeros: float) -> None:
    rng = np.random.default_rng(n_levels)
    levels = rng.choice(np.arange(-127, 128), n_levels, replace=False).astype(np.int8)
    if zeros:
        levels[0] = 0
    # 37 columns: rows start within bytes, and within the words that the faster decoders read.
    codes = levels[rng.integers(0, n_levels, (97, 37))]
    codes[rng.random(codes.shape) < zeros] = levels[0]
    exported = export(that_gives_its_weight(codes), "tflm")
    (weight,) = exported.weights
    if zeros != 0.7:
        assert weight.encoding == ("bitmap" if zeros and n_levels > 2 else "table")
    runner = TfliteMicro(exported.data)
    got = runner.run(np.eye(37, dtype=np.int8))
    np.testing.assert_array_equal(got.T, codes)
