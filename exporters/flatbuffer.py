"""A flatbuffer read table by table, with every offset checked; knows no schema. Damage gives a ValueError."""

from __future__ import annotations

import mmap
import struct
from typing import Any

import numpy as np

from edgecomp.graph import Array

_MAX_TABLES = 1 << 18


class Flatbuffer:
    """A flatbuffer read with every offset checked.

    The reader that the schema's compiler generates trusts the file: one wrong offset costs it gigabytes or hours. This
    one reads a limited number of tables, as a damaged file can name the same table any number of times.
    """

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.data = data
        self._tables_left = _MAX_TABLES

    def number_at(self, position: int, code: str) -> Any:
        """Read one little-endian number; `code` is struct's."""
        if not 0 <= position <= len(self.data) - struct.calcsize(f"<{code}"):
            raise ValueError(f"an offset leads to byte {position} of {len(self.data)}")
        return struct.unpack_from(f"<{code}", self.data, position)[0]

    def root(self) -> Table:
        """Find the outermost table."""
        return Table(self, self.number_at(0, "I"))

    def spend(self, tables: int) -> None:
        """Count tables that a list names.

        Raises:
            ValueError: they are more than any network has.
        """
        self._tables_left -= tables
        if self._tables_left < 0:
            raise ValueError("it names more tables than any network has")


class Table:
    """One table; fields go by their numbers in the schema, which never change.

    Attributes:
        file: what it lies in.
        position: where it starts.
    """

    def __init__(self, file: Flatbuffer, position: int) -> None:
        self.file = file
        self.position = position

    def field(self, number: int) -> int:
        """Find the position of a field's value, 0 if the table lacks it."""
        vtable = self.position - self.file.number_at(self.position, "i")
        slot = 4 + 2 * number
        if slot >= self.file.number_at(vtable, "H"):
            return 0
        offset = self.file.number_at(vtable + slot, "H")
        return self.position + int(offset) if offset else 0

    def number(self, field: int, code: str) -> int:
        """Read a number, 0 if the table lacks it."""
        position = self.field(field)
        return int(self.file.number_at(position, code)) if position else 0

    def vector(self, field: int, width: int) -> tuple[int, int]:
        """Find where the elements of a vector start, and how many there are."""
        position = self.field(field)
        if not position:
            return 0, 0
        position += self.file.number_at(position, "I")
        count = int(self.file.number_at(position, "I"))
        if position + 4 + count * width > len(self.file.data):
            raise ValueError(f"a list of {count} elements leads beyond its end")
        return position + 4, count

    def numbers(self, field: int, dtype: str) -> Array:
        """Read a vector of numbers."""
        start, count = self.vector(field, np.dtype(dtype).itemsize)
        return np.frombuffer(self.file.data, dtype=dtype, count=count, offset=start)

    def text(self, field: int) -> str:
        """Read a name."""
        start, count = self.vector(field, 1)
        if count > 1 << 16:
            raise ValueError(f"a name has {count} bytes")
        return self.file.data[start : start + count].decode("utf-8", errors="replace")

    def table(self, field: int) -> Table | None:
        """Find a table within this one."""
        position = self.field(field)
        return Table(self.file, position + self.file.number_at(position, "I")) if position else None

    def tables(self, field: int) -> list[Table]:
        """Find all tables of a vector."""
        start, count = self.vector(field, 4)
        self.file.spend(count)
        positions = range(start, start + 4 * count, 4)
        return [Table(self.file, at + self.file.number_at(at, "I")) for at in positions]

    def payload(self) -> tuple[int, int]:
        """Read this table as a Buffer: where its bytes start, in the flatbuffer or behind it, and how many."""
        offset, size = self.number(1, "Q"), self.number(2, "Q")
        if offset <= 1:
            return self.vector(0, 1)
        if offset + size > len(self.file.data):
            raise ValueError(f"a buffer of {size} bytes leads beyond its end")
        return offset, size
