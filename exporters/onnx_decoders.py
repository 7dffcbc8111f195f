"""The weights that an ONNX file of ours decodes, recognised and decoded with numpy alone.

`onnx_weights` writes what is recognised here. Every constant that stands in a decoder is checked: what is decoded is
what a runtime would have computed, or there is an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgecomp.coding import checked_trie, decode_words
from edgecomp.errors import GraphError
from edgecomp.graph import Array
from edgecomp.packing import FIELDS, unpack, unpack_unsigned, unsigned_fields
from edgecomp.words import WORD_BITS

from .modelfacts import checked_shape
from .onnx_model import DOMAIN
from .onnx_parts import BOOL, DTYPES, FLOAT, INT8, INT32, INT64, UINT8, Constant, Node, Parts, shown
from .protobuf import fields, view


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dense:
    """A weight of codes of 2-7 bits, as `packing.pack` gives them: one uint8 array a field."""

    shape: tuple[int, ...]
    bits: int
    fields: tuple[Array, ...]

    def decode(self, out: Array) -> None:
        """Write the codes: out int8 (n,)."""
        unpack(self.fields, self.bits, out.size, out)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Worded:
    """A weight in words: fields of `packing.pack_unsigned`, and how many numbers they hold; see `coding.Words`."""

    shape: tuple[int, ...]
    word_bits: int
    levels: int
    symbols: Array
    children: tuple[tuple[Array, ...], int, int]
    tokens: tuple[tuple[Array, ...], int, int]

    def decode(self, out: Array) -> None:
        """Write the codes: out int8 (n,).

        Raises:
            GraphError: these words give no such weight.
        """
        trie = checked_trie(
            word_bits=self.word_bits,
            symbols=self.symbols,
            children=np.concatenate(list(unpack_unsigned(*self.children))),
            n_tokens=self.tokens[2],
            n_symbols=out.size // self.symbols.shape[1],
        )
        if int(trie.depth.max()) >> self.levels:
            raise GraphError(f"a word has {trie.depth.max()} symbols, the function b{self.levels} spells fewer")
        decode_words(trie, self.symbols, unpack_unsigned(*self.tokens), out)


class Decoders:
    """The nodes of a file by what they write, to be followed back from a weight to what is stored of it."""

    def __init__(self, parts: Parts) -> None:
        """Look up the writer of every tensor.

        Raises:
            ValueError: a tensor has two.
        """
        self._constants = parts.constants
        self._writers: dict[bytes, Node] = {}
        for node in parts.nodes:
            for name in node.outputs:
                if name in self._writers or name in parts.constants or name in parts.given:
                    raise ValueError(f"two nodes or constants give {shown(name)}")
                self._writers[name] = node

    def weight(self, node: Node) -> Constant | None:
        """Read the weight that a node is the last to decode; None if it is no such node.

        Raises:
            ValueError: it is one, and what stands before it is not what edgecomp writes.
        """
        if node.op != "Reshape" or len(node.inputs) != 2 or node.inputs[0] not in self._writers:
            return None
        last = self._writers[node.inputs[0]]
        if last.domain == DOMAIN:
            return self._worded(node, last)
        before = self._writers.get(last.inputs[0]) if last.op == "Cast" and last.inputs else None
        return self._dense(node, last) if before is not None and before.op == "BitwiseOr" else None

    def product(self, name: bytes) -> Constant | None:
        """Multiply a number and a list of numbers, where a node does; None where it does something else."""
        node = self._writers.get(name)
        if node is None or node.op != "Mul" or len(node.inputs) != 2:
            return None
        a, b = (self._constants.get(part) for part in node.inputs)
        if a is None or b is None or a.kind != FLOAT or b.kind != FLOAT or a.shape != () or len(b.shape) != 1:
            return None
        with np.errstate(over="ignore", invalid="ignore"):  # as the runtime would; a damaged file may hold anything
            product = a.values() * b.values()
        return Constant(shape=b.shape, kind=FLOAT, data=product.astype("<f4").tobytes())

    def zeros(self, name: bytes, n: int) -> Constant | None:
        """Write out n zeros where a node gives them; None where it gives something else."""
        node = self._writers.get(name)
        if node is None or node.op != "ConstantOfShape" or len(node.inputs) != 1 or "value" not in node.attributes:
            return None
        (value,) = [view(v) for number, v, _ in fields(node.attributes["value"]) if number == 5] or [memoryview(b"")]
        tensor = [(number, v) for number, v, _ in fields(value)]
        kind = next((v for number, v in tensor if number == 2), 0)
        content = [v for number, v in tensor if number not in (1, 2, 8)]
        if kind not in (INT8, INT32) or any(any(view(v)) for v in content if v != 0):
            raise ValueError(f"{shown(name)} is not made of zeros")
        self._expect(node.inputs[0], INT64, [n])
        assert isinstance(kind, int)
        return Constant(shape=(n,), kind=kind, data=bytes(n * np.dtype(DTYPES[kind]).itemsize))

    def _stored(self, name: bytes, kind: int) -> Array:
        constant = self._constants.get(name)
        if constant is None or constant.kind != kind:
            raise ValueError(f"{shown(name)} is not a constant of type {kind}")
        return constant.values()

    def _step(self, name: bytes, op: str, n_inputs: int, domain: str = "") -> Node:
        node = self._writers.get(name)
        if node is None or node.op != op or node.domain != domain or len(node.inputs) != n_inputs:
            raise ValueError(f"{shown(name)} is not what a {op} gives; the packing is of another edgecomp, or damaged")
        return node

    def _expect(self, name: bytes, kind: int, values: object) -> None:
        if not np.array_equal(self._stored(name, kind), np.asarray(values)):
            raise ValueError(f"{shown(name)} is not {values!s:.40}; the packing is of another edgecomp, or damaged")

    def _number(self, name: bytes, kind: int) -> int:
        values = self._stored(name, kind)
        if values.size != 1:
            raise ValueError(f"{shown(name)} is not one number")
        return int(values.reshape(-1)[0])

    def _shape(self, name: bytes) -> tuple[int, ...]:
        values = self._stored(name, INT64)
        shape = tuple(checked_shape(values.reshape(-1).tolist()[:100], shown(name)))
        if not all(shape) or math.prod(shape) >> 31:
            raise ValueError(f"a weight has the shape {list(shape)}")
        return shape

    def _dense(self, node: Node, cast: Node) -> Constant:
        """Follow what `onnx_weights._dense` writes."""
        shape = self._shape(node.inputs[1])
        value, upper = self._step(cast.inputs[0], "BitwiseOr", 2).inputs
        negative, *signs = self._step(upper, "Where", 3).inputs
        to_bool = self._step(negative, "Cast", 1)
        sign = self._step(to_bool.inputs[0], "BitwiseAnd", 2)
        mask = self._number(sign.inputs[1], UINT8)
        bits = mask.bit_length()
        types = [cast.number("to", 0), to_bool.number("to", 0)]
        if bits not in FIELDS or mask != 1 << (bits - 1) or sign.inputs[0] != value or types != [INT8, BOOL]:
            raise ValueError(f"the sign of {shown(node.outputs[0])} is not that of 2-7 bits")
        self._expect(signs[0], UINT8, 256 - (1 << bits))
        self._expect(signs[1], UINT8, 0)
        found, low = [], bits
        for width in reversed(FIELDS[bits]):
            low -= width
            part = value
            if low:
                value, shifted = self._step(value, "BitwiseOr", 2).inputs
                left = self._step(shifted, "BitShift", 2)
                self._expect(left.inputs[1], UINT8, low)
                _check_direction(left, "LEFT")
                part = left.inputs[0]
            found.append(self._field(part, width, math.prod(shape)))
        return Constant(shape=shape, kind=INT8, data=Dense(shape=shape, bits=bits, fields=tuple(reversed(found))))

    def _field(self, name: bytes, width: int, n: int) -> Array:
        sliced = self._writers.get(name)
        if sliced is not None and sliced.op == "Slice" and len(sliced.inputs) == 3:
            self._expect(sliced.inputs[1], INT64, [0])
            self._expect(sliced.inputs[2], INT64, [n])
            name = sliced.inputs[0]
        flat = self._step(name, "Reshape", 2)
        self._expect(flat.inputs[1], INT64, [-1])
        masked = self._step(flat.inputs[0], "BitwiseAnd", 2)
        self._expect(masked.inputs[1], UINT8, (1 << width) - 1)
        moved = self._step(masked.inputs[0], "BitShift", 2)
        self._expect(moved.inputs[1], UINT8, [[shift] for shift in range(0, 8, width)])
        _check_direction(moved, "RIGHT")
        return self._bytes(moved.inputs[0], width, n, (1,))

    def _bytes(self, name: bytes, width: int, n: int, more: tuple[int, ...]) -> Array:
        """Give the bytes of a field of n numbers."""
        stored = self._stored(name, UINT8)
        if stored.shape != (*more, -(-n * width // 8)):
            raise ValueError(f"{shown(name)} has the shape {list(stored.shape)}, expected {n} numbers of {width} bits")
        return stored.reshape(-1)

    def _worded(self, node: Node, call: Node) -> Constant:
        """Follow what `onnx_weights._words` writes."""
        shape = self._shape(node.inputs[1])
        text = self._step(node.inputs[0], "t", 7, DOMAIN)
        spelled, *book, size, n = text.inputs
        writer = self._writers.get(book[0])
        levels = int(writer.op[1:]) if writer is not None and writer.op[:1] == "b" and writer.op[1:].isdecimal() else -1
        looked_up = self._step(book[0], f"b{levels}", 5, DOMAIN)
        children, symbols, same_size, room, width = looked_up.inputs
        word_bits = self._number(size, INT32).bit_length() - 1
        if looked_up.outputs != tuple(book) or same_size != size or word_bits not in WORD_BITS or not 0 <= levels <= 8:
            raise ValueError(f"the words of {shown(node.outputs[0])} are of another edgecomp, or damaged")
        of_symbols = self._stored(symbols, INT8)
        if of_symbols.ndim != 2 or not of_symbols.size or math.prod(shape) % of_symbols.shape[1]:
            raise ValueError(f"the symbols {shown(symbols)} have the shape {list(of_symbols.shape)}")
        self._expect(size, INT32, 1 << word_bits)
        self._expect(room, INT64, [(2 << word_bits) + 1])
        self._expect(width, INT32, 1 << levels)
        self._expect(n, INT64, [math.prod(shape) // of_symbols.shape[1]])
        counts, tokens = self._numbers(children), self._numbers(spelled)
        if not 1 <= counts[1] <= 8 or tokens[1] != word_bits:
            raise ValueError(f"the words of {shown(node.outputs[0])} have {tokens[1]} bits, counts {counts[1]}")
        # Before memory is taken for them: no word has 2^levels symbols.
        if math.prod(shape) > (tokens[2] * of_symbols.shape[1]) << levels:
            raise ValueError(f"the words of {shown(node.outputs[0])} are too few for the shape {list(shape)}")
        found = Worded(
            shape=shape, word_bits=word_bits, levels=levels, symbols=of_symbols, children=counts, tokens=tokens
        )
        return Constant(shape=shape, kind=INT8, data=found)

    def _numbers(self, name: bytes) -> tuple[tuple[Array, ...], int, int]:
        """Follow back how numbers are put together: fields, lowest bits first, bits of a number, how many numbers."""
        found: list[tuple[bytes, int, int | None]] = []
        lows: list[int] = []
        node = self._writers.get(name)
        while node is not None and node.op == "Add" and len(node.inputs) == 2 and len(found) < len(unsigned_fields(15)):
            name, upper = node.inputs
            times = self._step(upper, "Mul", 2)
            lows.append(self._number(times.inputs[1], INT32))
            found.append(self._part(times.inputs[0]))
            node = self._writers.get(name)
        found.append(self._part(name))
        found.reverse()
        widths = [width for _, width, _ in found]
        bits, factors = sum(widths), [1 << sum(widths[:i]) for i in range(1, len(widths))]
        if tuple(widths) != unsigned_fields(bits) or lows[::-1] != factors:
            raise ValueError(f"{shown(name)} is put together from fields of {widths} bits")
        counts = {self._stored(part, UINT8).size if n is None else n for part, _, n in found}
        if len(counts) != 1:
            raise ValueError(f"{shown(name)} is put together from fields of different length")
        (n_values,) = counts
        arrays = [self._bytes(part, width, n_values, () if width == 8 else (1,)) for part, width, _ in found]
        return tuple(arrays), bits, n_values

    def _part(self, name: bytes) -> tuple[bytes, int, int | None]:
        """Read one field: what is stored, bits, how many numbers where that is said."""
        node = self._writers.get(name)
        if node is not None and node.domain == DOMAIN and node.op in ("f1", "f2", "f4") and len(node.inputs) == 2:
            return node.inputs[0], int(node.op[1]), math.prod(self._shape(node.inputs[1]))
        cast = self._step(name, "Cast", 1)
        if cast.number("to", 0) != INT32:
            raise ValueError(f"{shown(name)} is of type {cast.number('to', 0)}, expected int32")
        return cast.inputs[0], 8, None


def _check_direction(node: Node, direction: str) -> None:
    if node.text("direction") != direction:
        raise ValueError(f"{shown(node.outputs[0])} is shifted {node.text('direction')!r:.20}, expected {direction}")
