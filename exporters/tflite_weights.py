"""A layer's weight in a TFLite file, in each of the forms that files have: see `STORING`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from edgecomp.artifact import StoredWeight
from edgecomp.atrest import to_bytes
from edgecomp.coding import UNPACKING_BYTES, encode
from edgecomp.graph import Array, Node, Tensor

from .tflite_schema import TfliteFile, pack_dense
from .tflm_decode import OPERATOR, decodable

Storing = Callable[[TfliteFile, Node, Tensor, Array, int, int], tuple[int, StoredWeight]]
"""Adds a quantized weight, given its layer, its codes in the file's layout, the axis of the output channels in it, and
the width in which the layer reads a code; gives the number of the tensor that the layer reads, and what it takes."""


def dense(
    file: TfliteFile, node: Node, weight: Tensor, values: Array, axis: int, width: int
) -> tuple[int, StoredWeight]:
    """Add a weight as the layer reads it."""
    assert weight.quant is not None
    data, quant = pack_dense(values, width), replace(weight.quant, axis=axis)
    number = file.tensor(weight.name, values.shape, f"INT{width}", data=data, quant=quant)
    return number, StoredWeight(layer=node.name, bits=quant.bits, stored_bits=width, stored_bytes=len(data))


def packed(
    file: TfliteFile, node: Node, weight: Tensor, values: Array, axis: int, width: int
) -> tuple[int, StoredWeight]:
    """Add a weight to be unpacked before an interpreter reads the file, where that makes it smaller."""
    assert weight.quant is not None
    bits = weight.quant.bits
    encoded = encode(values, bits)
    if encoded.stored_bytes + UNPACKING_BYTES >= values.size:
        return dense(file, node, weight, values, axis, width)
    data = to_bytes(encoded)
    number = file.packed(weight.name, values.shape, "INT8", data=data, quant=replace(weight.quant, axis=axis))
    return number, StoredWeight(
        layer=node.name, bits=bits, stored_bits=bits, stored_bytes=len(data), encoding=encoded.kind
    )


def decoded(
    file: TfliteFile, node: Node, weight: Tensor, values: Array, axis: int, width: int
) -> tuple[int, StoredWeight]:
    """Add a weight that TFLite Micro decodes right before its layer runs, where that makes it smaller."""
    assert weight.quant is not None
    found = decodable(values)
    if found is None:
        return dense(file, node, weight, values, axis, width)
    inputs = [file.tensor("", (len(data),), "UINT8", data=data) for data in (found.encoded, found.ancillary)]
    number = file.tensor(weight.name, values.shape, "INT8", quant=replace(weight.quant, axis=axis))
    file.custom(OPERATOR, inputs, [number])
    return number, StoredWeight(
        layer=node.name,
        bits=weight.quant.bits,
        stored_bits=found.index_bits,
        stored_bytes=len(found.encoded) + len(found.ancillary),
        encoding=found.form.value,
    )


STORING: Mapping[str, Storing] = {
    "tflite": dense,
    "tflite-int8": dense,
    "tflite-packed": packed,
    "tflm": decoded,
    "tflm-int8": dense,
}
"""By form, see `artifact.form_of`."""
