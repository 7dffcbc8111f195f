"""The reader of protobuf's wire format, beside google's own, on files and on bytes that are none."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp.artifact import AtRest
from edgecomp.exporters.protobuf import bytes_field, fields, number_field, varint, view, whole
from edgecomp.exporters.to_onnx import to_onnx
from tests.packed_files import quantized


def test_fields_of_a_model_as_protobuf_reads_them() -> None:
    data = to_onnx(quantized("residual", 5), at_rest=AtRest.NATIVE).data
    proto = onnx.load_from_string(data)
    found = list(fields(memoryview(data)))
    assert b"".join(raw for _, _, raw in found) == data
    assert [number for number, _, _ in found] == [f.number for f, value in proto.ListFields()
                                                  for _ in (value if f.is_repeated else (value,))]  # fmt: skip
    graph = next(view(value) for number, value, _ in found if number == 7)
    assert bytes(graph) == proto.graph.SerializeToString(deterministic=True)
    nodes = [view(value) for number, value, _ in fields(graph) if number == 1]
    assert [bytes(node) for node in nodes] == [node.SerializeToString(deterministic=True) for node in proto.graph.node]


@settings(derandomize=True, deadline=None)
@given(value=st.integers(0, (1 << 63) - 1), text=st.binary(max_size=300))
def test_what_is_written_protobuf_reads(value: int, text: bytes) -> None:
    data = number_field(3, value) + bytes_field(4, text)  # i and s of an attribute
    proto = onnx.AttributeProto.FromString(data)
    assert (proto.i, proto.s) == (value, text)
    assert [(number, v if isinstance(v, int) else bytes(v)) for number, v, _ in fields(memoryview(data))] == [
        (3, value), (4, text),
    ]  # fmt: skip


def test_fixed_numbers_and_negative_ones() -> None:
    proto = onnx.AttributeProto(f=1.5, i=-2)
    proto.type = onnx.AttributeProto.INT
    found = {number: value for number, value, _ in fields(memoryview(proto.SerializeToString()))}
    assert found[2] == bytes.fromhex("0000c03f")
    assert found[3] == (1 << 64) - 2
    with pytest.raises(ValueError, match="not negative"):
        whole(found[3])
    with pytest.raises(ValueError, match="not negative"):
        whole(found[2])
    with pytest.raises(TypeError, match="a number where bytes"):
        view(found[3])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("08", "cut off within a number"),
        ("0880", "cut off within a number"),
        ("08ffffffffffffffffff7f", "more than 64 bits"),
        ("08ffffffffffffffffffff01", "more than 64 bits"),
        ("0a02ff", "field 1 at byte 0 has 2 bytes, 1 are left"),
        ("0affffffffffffffffff01", "are left"),
        ("0dffffff", "field 1 at byte 0 has 4 bytes, 3 are left"),
        ("09ffffff", "field 1 at byte 0 has 8 bytes, 3 are left"),
        ("0b", "field 1 at byte 0 is of kind 3"),
        ("0f", "is of kind 7"),
        ("0000", "field 0 at byte 0"),
        ("808080801000", "field 536870912 at byte 0"),
    ],
)
def test_no_message(data: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(fields(memoryview(bytes.fromhex(data))))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.binary(max_size=60))
def test_any_bytes(data: bytes) -> None:
    """Whole fields in their order, or a ValueError."""
    at = 0
    try:
        for number, _, raw in fields(memoryview(data)):
            assert raw == data[at : at + len(raw)]
            assert raw.tobytes().startswith(varint(number << 3 | raw[0] & 7)) or len(varint(number << 3)) < len(raw)
            at += len(raw)
    except ValueError:
        return
    assert at == len(data)
