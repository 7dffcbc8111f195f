"""A packed TFLite file made plain: every weight int8, as XNNPACK runs it at full speed. Needs numpy alone.

A packed file is a TFLite file. Its first operators have the custom code OPERATOR, one input and one output: what they
read is a constant uint8 tensor with the bytes that `edgecomp.atrest` describes, what they give is an int8 weight. An
interpreter that does not know the operator refuses the file instead of computing with wrong weights.

Unpacking changes the file in few places and moves nothing but the contents of buffers:

1. The operators are taken from the front of their list, the tensors they read from the end of theirs, the operator's
   code from the end of its. (A list is shortened in place: its length is written again, further on for operators.)
2. In the list of buffers the packed one and the empty one of the weight change places. The buffer that is the weight's
   now gets the unpacked codes.
3. A tensor of type INT4 becomes INT8, and its buffer gets one byte a code.
4. The contents of buffers that stand at the end of the file are cut off, and all contents that were cut off or are new
   are written there, in the order of buffers, on multiples of 16 bytes. Contents that do not stand at the end,
   as in files that are not packed or not ours, stay there, unused.

`edgecomp_unpack.hpp` does the same in C++, to the byte. Chosen 2026-11-24.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from edgecomp.errors import BundleError
from edgecomp.graph import Array

from .flatbuffer import Flatbuffer, Table
from .modelfacts import MEANT_BY_DAMAGED, checked_shape

OPERATOR = "edgecomp.Unpack.1"
"""Custom code of the operator; the number is that of the layout."""
MOST_BYTES = (1 << 31) - 1
"""What a flatbuffer can hold."""
_IDENTIFIER = b"TFL3"
_ALIGNMENT = 16
_CUSTOM = 32
_UINT8, _INT8, _INT4 = 3, 9, 17


def unpack_tflite(data: bytes, where: str, *, most_bytes: int = MOST_BYTES) -> bytes:
    """Widen every packed and every int4 weight of a TFLite file to int8.

    Args:
        data: a TFLite file, packed or not; one without such weights is given back as it is.
        where: names it in errors.
        most_bytes: that the unpacked file may have.

    Returns:
        a file with the same inputs, outputs and results, for any TFLite interpreter.

    Raises:
        BundleError: it is none, damaged, of a later layout, or larger than allowed when unpacked.
    """
    if data[4:8] != _IDENTIFIER:
        raise BundleError(f"{where}: is no TFLite file: bytes 4 to 8 are not TFL3; expected what build or export wrote")
    if len(data) > MOST_BYTES:
        raise BundleError(f"{where}: has {len(data)} bytes, a TFLite file can have {MOST_BYTES}")
    try:
        return _unpack(data, where, most_bytes)
    except MEANT_BY_DAMAGED as e:
        raise BundleError(f"{where}: is damaged or cut off: {str(e)[:200] or type(e).__name__}") from e


def is_packed(data: bytes | mmap.mmap) -> bool:
    """Tell whether a file needs unpacking before an interpreter takes it; False for damaged and foreign files."""
    return has_custom(data, OPERATOR)


def has_custom(data: bytes | mmap.mmap, operator: str) -> bool:
    """Tell whether a file knows a custom operator; False for damaged and foreign files."""
    if data[4:8] != _IDENTIFIER:
        return False
    try:
        return operator in custom_codes(Flatbuffer(data).root()).values()
    except MEANT_BY_DAMAGED:
        return False


def custom_codes(model: Table) -> dict[int, str]:
    """Name the custom operators of a model by their number in its list of codes."""
    codes = enumerate(model.tables(1))
    return {n: code.text(1) for n, code in codes if max(code.number(0, "b"), code.number(3, "i")) == _CUSTOM}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Widened:
    """A buffer that gets other contents: int8 codes of what it holds now, packed by us or as INT4."""

    name: str
    n_codes: int
    packed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Changes:
    """What is to be done: bytes by position, and new contents by number of the buffer."""

    data: bytes
    patches: dict[int, bytes] = field(default_factory=dict)
    buffers: dict[int, _Widened] = field(default_factory=dict)

    def write(self, position: int, value: bytes) -> None:
        """Overwrite bytes, none of them twice.

        Raises:
            ValueError: they were overwritten already.
        """
        for start in range(position - 3, position + len(value)):
            if start in self.patches and start + len(self.patches[start]) > position:
                raise ValueError(f"two things lie at byte {position}")
        self.patches[position] = value

    def write_offset(self, position: int, target: int) -> None:
        """Overwrite an offset.

        Raises:
            ValueError: it would not lead forward.
        """
        if target <= position:
            raise ValueError(f"what byte {position} speaks of stands before it")
        self.write(position, struct.pack("<I", target - position))

    def shorten(self, table: Table, number: int, by: int) -> None:
        """Leave the last elements out of a table's list."""
        start, count = table.vector(number, 4)
        self.write(start - 4, struct.pack("<I", count - by))


def _unpack(data: bytes, where: str, most_bytes: int) -> bytes:
    model = Flatbuffer(data).root()
    graphs, buffers = model.tables(2), model.tables(4)
    ours = set()
    for number, text in custom_codes(model).items():
        if text == OPERATOR:
            ours.add(number)
        elif text.startswith(OPERATOR[:-1]):
            raise BundleError(f"{where}: operator {text!r:.60} is of a later edgecomp, this one reads {OPERATOR!r}")
    tensors = [graph.tables(0) for graph in graphs]
    used = Counter(tensor.number(2, "I") for of_graph in tensors for tensor in of_graph)
    changes = _Changes(data=data)
    for graph, of_graph in zip(graphs, tensors, strict=True):
        n_packed = _take_operators(graph, of_graph, ours, model, buffers, used, changes)
        for tensor in of_graph[: len(of_graph) - n_packed]:
            _widen_int4(tensor, buffers, used, changes)
    if ours:
        n_codes = model.vector(1, 4)[1]
        if ours != {n_codes - 1}:
            raise ValueError(f"the code of {OPERATOR} is not the last of {n_codes}")
        changes.shorten(model, 1, 1)
    for number in changes.buffers:
        if used[number]:
            raise ValueError(f"buffer {number} holds packed codes and is used for something else, too")
    return _written(changes, buffers, where, most_bytes) if changes.patches else data


def _take_operators(
    graph: Table,
    tensors: Sequence[Table],
    ours: set[int],
    model: Table,
    buffers: Sequence[Table],
    used: Counter[int],
    changes: _Changes,
) -> int:
    """Take our operators out of a subgraph; give their number."""
    operators = graph.tables(3)
    is_ours = [operator.number(0, "I") in ours for operator in operators]
    n = sum(is_ours)
    if not n:
        return 0
    if not all(is_ours[:n]):
        raise ValueError(f"not all operators {OPERATOR} stand at the front")
    read = set()
    for operator in operators[:n]:
        ends = [operator.numbers(1, "<i4"), operator.numbers(2, "<i4")]
        if any(end.size != 1 or not 0 <= end[0] < len(tensors) for end in ends):
            raise ValueError(f"{OPERATOR} has other inputs or outputs than one tensor each")
        source, weight = (tensors[int(end[0])] for end in ends)
        read.add(int(ends[0][0]))
        _swap(source, weight, model, buffers, used, changes)
    if read != set(range(len(tensors) - n, len(tensors))):
        raise ValueError("the packed tensors are not the last")
    start, count = graph.vector(3, 4)
    at = graph.field(3)
    changes.write_offset(at, start - 4 + 4 * n)
    changes.write(start - 4 + 4 * n, struct.pack("<I", count - n))
    changes.shorten(graph, 0, n)
    return n


def _swap(
    source: Table, weight: Table, model: Table, buffers: Sequence[Table], used: Counter[int], changes: _Changes
) -> None:
    """Let the packed buffer and the weight's empty one change places."""
    full, empty = source.number(2, "I"), weight.number(2, "I")
    if source.number(1, "b") != _UINT8 or weight.number(1, "b") != _INT8:
        raise ValueError(f"{OPERATOR} reads or gives another type than uint8 and int8")
    lone = full != empty and used[full] == used[empty] == 1
    if not lone or not buffers[full].field(0) or buffers[empty].payload()[1]:
        raise ValueError("a packed tensor has no bytes of its own, or its weight has some already")
    entries = model.vector(4, 4)[0]
    changes.write_offset(entries + 4 * full, buffers[empty].position)
    changes.write_offset(entries + 4 * empty, buffers[full].position)
    used[full] = used[empty] = 0
    changes.buffers[full] = _Widened(name=weight.text(3), n_codes=_n_codes(weight), packed=True)


def _widen_int4(tensor: Table, buffers: Sequence[Table], used: Counter[int], changes: _Changes) -> None:
    number = tensor.number(2, "I")
    if tensor.number(1, "b") != _INT4 or not number or not any(buffers[number].payload()):
        return
    found = _Widened(name=tensor.text(3), n_codes=_n_codes(tensor), packed=False)
    start, n_bytes = buffers[number].vector(0, 1)
    if tensor.table(6) is not None or not start or n_bytes != -(-found.n_codes // 2):
        raise ValueError(f"tensor {found.name!r:.80} of type INT4 has {n_bytes} bytes, expected two codes in each")
    if changes.buffers.setdefault(number, found).n_codes != found.n_codes:
        raise ValueError(f"buffer {number} belongs to tensors of different shape")
    changes.write(tensor.field(1), bytes([_INT8]))
    used[number] -= 1


def _n_codes(tensor: Table) -> int:
    name = tensor.text(3)
    n = math.prod(checked_shape(tensor.numbers(0, "<i4").tolist(), name))
    if not 0 < n <= MOST_BYTES:
        raise ValueError(f"weight {name!r:.80} has {n} codes")
    return n


def _written(changes: _Changes, buffers: Sequence[Table], where: str, most_bytes: int) -> bytes:
    """Write the file with its changes; contents of buffers go to its end."""
    data, contents = changes.data, {}
    for number, buffer in enumerate(buffers):
        if buffer.field(0):
            start, n_bytes = buffer.vector(0, 1)
            contents[number] = (start - 4, start + n_bytes)
    in_file = sorted(contents.values())
    if any(low[1] > high[0] for low, high in pairwise(in_file)):
        raise ValueError("the contents of two buffers overlap")
    cut = len(data)
    for start, end in reversed(in_file):
        if cut - end >= _ALIGNMENT or any(data[end:cut]):
            break
        cut = start
    moved = [number for number, (start, _) in contents.items() if start >= cut or number in changes.buffers]
    n_new = {number: contents[number][1] - contents[number][0] for number in moved}
    n_new |= {number: widened.n_codes for number, widened in changes.buffers.items()}
    most_new = cut + sum(n_new.values()) + (4 + _ALIGNMENT) * len(moved)
    if most_new > most_bytes:
        raise BundleError(f"{where}: takes up to {most_new} bytes when unpacked, {most_bytes} are allowed")
    out = io.BytesIO()  # gives its bytes away without a copy
    out.write(data[:cut])
    for number in moved:
        start, end = contents[number]
        old = data[start + 4 : end]
        widened = changes.buffers.get(number)
        new = old if widened is None else _codes(widened, old, where)
        out.write(bytes(-(out.tell() + 4) % _ALIGNMENT))
        changes.write_offset(buffers[number].field(0), out.tell())
        out.write(struct.pack("<I", len(new)))
        out.write(new)
    for position, value in changes.patches.items():
        if position + len(value) > cut:
            raise ValueError("its structure lies within the contents of buffers")
        out.seek(position)
        out.write(value)
    return out.getvalue()


def _codes(widened: _Widened, old: bytes, where: str) -> bytes | memoryview:
    if widened.packed:
        from edgecomp.atrest import codes_of  # here: to know a packed file takes none of it

        return codes_of(old, widened.n_codes, f"{where}: {widened.name!r:.80}").data
    nibbles: Array = np.frombuffer(old, dtype=np.uint8)[:, None] >> np.array([0, 4], dtype=np.uint8)
    signed = ((nibbles << 4).view(np.int8) >> 4).reshape(-1)
    return signed[: widened.n_codes].tobytes()
