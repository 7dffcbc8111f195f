"""What is in a TFLite file, ours or anybody's, by a reader that checks every offset; damage gives a BundleError."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

from edgecomp.errors import BundleError, ExportError
from edgecomp.graph import Array

from .modelfacts import (
    MAX_RANK,
    MEANT_BY_DAMAGED,
    NO_WEIGHTS,
    affine,
    bits_of,
    check_length,
    checked_shape,
    model_facts,
    weight_row,
)

_MAX_TABLES = 1 << 18

def read_tflite(data: bytes, where: str) -> dict[str, object]:
    """Describe a TFLite model; see `describe.describe` for the keys.

    Raises:
        BundleError: the bytes are no model or damaged; `where` names them.
        ExportError: the package with TFLite's schema is missing.
    """
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ImportError as e:
        raise ExportError(f"{where}: {e.name} is missing; install it with: pip install 'edgecomp[bench]'") from e
    try:
        file = _Flatbuffer(data)
        return _tflite_model(_Table(file, file.number_at(0, "I")), schema, len(data))
    except MEANT_BY_DAMAGED as e:
        raise BundleError(f"{where}: is damaged or cut off: {str(e)[:200] or type(e).__name__}") from e


class _Flatbuffer:
    """A flatbuffer read with every offset checked.

    The reader that the schema's compiler generates trusts the file: one wrong offset costs it gigabytes or hours. This
    one reads a limited number of tables, as a damaged file can name the same table any number of times.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._tables_left = _MAX_TABLES

    def number_at(self, position: int, code: str) -> Any:
        """Read one little-endian number; `code` is struct's."""
        if not 0 <= position <= len(self.data) - struct.calcsize(f"<{code}"):
            raise ValueError(f"an offset leads to byte {position} of {len(self.data)}")
        return struct.unpack_from(f"<{code}", self.data, position)[0]

    def spend(self, tables: int) -> None:
        """Count tables that a list names.

        Raises:
            ValueError: they are more than any network has.
        """
        self._tables_left -= tables
        if self._tables_left < 0:
            raise ValueError("it names more tables than any network has")


class _Table:
    """One table; fields go by their numbers in the schema, which never change."""

    def __init__(self, file: _Flatbuffer, position: int) -> None:
        self._file = file
        self._position = position

    def _field(self, number: int) -> int:
        """Find the position of a field's value, 0 if the table lacks it."""
        vtable = self._position - self._file.number_at(self._position, "i")
        slot = 4 + 2 * number
        if slot >= self._file.number_at(vtable, "H"):
            return 0
        offset = self._file.number_at(vtable + slot, "H")
        return self._position + int(offset) if offset else 0

    def number(self, field: int, code: str) -> int:
        position = self._field(field)
        return int(self._file.number_at(position, code)) if position else 0

    def _vector(self, field: int, width: int) -> tuple[int, int]:
        """Find where the elements of a vector start, and how many there are."""
        position = self._field(field)
        if not position:
            return 0, 0
        position += self._file.number_at(position, "I")
        count = int(self._file.number_at(position, "I"))
        if position + 4 + count * width > len(self._file.data):
            raise ValueError(f"a list of {count} elements leads beyond its end")
        return position + 4, count

    def numbers(self, field: int, dtype: str) -> Array:
        start, count = self._vector(field, np.dtype(dtype).itemsize)
        return np.frombuffer(self._file.data, dtype=dtype, count=count, offset=start)

    def text(self, field: int) -> str:
        start, count = self._vector(field, 1)
        if count > 1 << 16:
            raise ValueError(f"a name has {count} bytes")
        return self._file.data[start : start + count].decode("utf-8", errors="replace")

    def table(self, field: int) -> _Table | None:
        position = self._field(field)
        return _Table(self._file, position + self._file.number_at(position, "I")) if position else None

    def tables(self, field: int) -> list[_Table]:
        start, count = self._vector(field, 4)
        self._file.spend(count)
        positions = range(start, start + 4 * count, 4)
        return [_Table(self._file, at + self._file.number_at(at, "I")) for at in positions]

    def payload(self) -> tuple[int, int]:
        """Read this table as a Buffer: where its bytes start, in the flatbuffer or behind it, and how many."""
        offset, size = self.number(1, "Q"), self.number(2, "Q")
        if offset <= 1:
            return self._vector(0, 1)
        if offset + size > len(self._file.data):
            raise ValueError(f"a buffer of {size} bytes leads beyond its end")
        return offset, size


def _tflite_model(model: _Table, schema: Any, file_bytes: int) -> dict[str, object]:
    """Describe a Model table.

    Raises:
        ValueError, IndexError, KeyError: the file contradicts itself.
    """
    kinds = {number: name.lower() for name, number in vars(schema.TensorType).items() if isinstance(number, int)}

    def dtype_of(tensor: _Table) -> str:
        number = tensor.number(1, "b")
        if number not in kinds:
            raise ValueError(f"a tensor has the unknown type {number}")
        return str(kinds[number])

    names = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    producer, graphs, buffers = model.text(3), model.tables(2), model.tables(4)
    if not graphs:
        raise ValueError("it holds no network")

    # Operators up to 127 stand in the field of old files; the newer field is larger or absent.
    codes = []
    for code in model.tables(1):
        number = max(code.number(0, "b"), code.number(3, "i"))
        custom = f"CUSTOM {code.text(1)}".rstrip()
        codes.append(custom if number == schema.BuiltinOperator.CUSTOM else names.get(number, f"operator {number}"))

    tensors = [graph.tables(0) for graph in graphs]
    weights, stored = [], {}
    for tensor in (t for of_graph in tensors for t in of_graph):
        shape = tensor.numbers(0, "<i4")
        start, n_bytes = buffers[number].payload() if (number := tensor.number(2, "I")) else (0, 0)
        dtype = dtype_of(tensor)
        if not n_bytes or shape.size < 2 or dtype in NO_WEIGHTS:
            continue
        name = tensor.text(3)
        dims = checked_shape(shape.tolist(), name)
        if tensor.table(6) is None:  # a sparse tensor has fewer elements than its shape says
            check_length(name, math.prod(dims), bits_of(dtype), n_bytes)
        name = name.removesuffix(".weight") if producer == "edgecomp" else name
        weights.append(weight_row(name, dims, bits_of(dtype), n_bytes))
        stored[start] = n_bytes

    def border(number: int) -> dict[str, object]:
        tensor = tensors[0][number]
        signature = tensor.numbers(7, "<i4")
        shape = signature if signature.size else tensor.numbers(0, "<i4")
        if shape.size > MAX_RANK:
            raise ValueError(f"tensor {number} has {shape.size} dimensions")
        dtype, quant = dtype_of(tensor), tensor.table(4)
        dims = [d if d >= 0 else None for d in shape.tolist()]
        found: dict[str, object] = {"name": tensor.text(3), "shape": dims, "dtype": dtype}
        if "int" in dtype and quant is not None:
            found |= affine(quant.numbers(2, "<f4"), quant.numbers(3, "<i8"))
        return found

    def borders(field: int) -> list[dict[str, object]]:
        numbers = graphs[0].numbers(field, "<i4")
        if numbers.size > len(tensors[0]) or (numbers < 0).any():
            raise ValueError("its inputs or outputs are no tensors of it")
        return [border(number) for number in numbers.tolist()]

    return model_facts(
        kind="tflite",
        producer=producer,
        version=f"schema {model.number(0, 'I')}",
        inputs=borders(1),
        outputs=borders(2),
        operators=[codes[operator.number(0, "I")] for graph in graphs for operator in graph.tables(3)],
        weights=weights,
        weight_bytes=sum(stored.values()),
        file_bytes=file_bytes,
    )

