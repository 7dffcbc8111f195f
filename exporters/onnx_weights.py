"""Encoded weights as ONNX nodes: standard operators that onnxruntime computes once, when it loads the file.

Every shape is known before anything is computed. It must be: from 1.27 on onnxruntime does not fold a node whose
output's shape it cannot infer, such as Compress or NonZero, and would unpack the weights again in every run. What words
need stands in functions of the model, once a file: a layer is a few calls. onnxruntime puts their bodies in place of
the calls before it folds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgecomp.coding import Encoded, Words
from edgecomp.graph import Array
from edgecomp.packing import FIELDS, pack_unsigned, unsigned_fields

from .onnx_model import DOMAIN, Model

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_MODERATE_TABLE = 1 << 19
_INT32, _INT8, _BOOL = 6, 3, 9


def write_codes(model: Model, name: str, encoded: Encoded, shape: tuple[int, ...], levels: Mapping[int, int]) -> str:
    """Store codes as they are encoded; give the name of the int8 tensor that the runtime decodes them to.

    Args:
        model: gets the nodes and initializers; what is stored is called name.0, name.1 and so on.
        name: of the decoded tensor.
        encoded: the codes.
        shape: of the decoded tensor.
        levels: what `word_levels` gives.
    """
    if encoded.words is not None:
        return _words(model, name, encoded.words, shape, levels[encoded.words.levels])
    if encoded.bits == 8:
        return model.weight(name, encoded.fields[0].reshape(shape))
    return _dense(model, name, encoded, shape)


def _shape(model: Model, shape: tuple[int, ...]) -> str:
    return model.constant(np.array(shape, dtype=np.int64))


def _dense(model: Model, name: str, encoded: Encoded, shape: tuple[int, ...]) -> str:
    """Put fields of 4, 2 and 1 bits together to two's complement of `bits` bits in a byte.

    The sign is then copied into the upper bits, and Cast reinterprets the byte (ONNX defines a cast out of range so).
    Subtraction would be shorter, but onnxruntime 1.17 cannot subtract bytes.
    """
    bits = encoded.bits
    value, low = "", 0
    for number, (field, width) in enumerate(zip(encoded.fields, FIELDS[bits], strict=True)):
        planes = 8 // width
        shifts = model.constant(np.arange(0, 8, width, dtype=np.uint8)[:, None])
        part = model.weight(model.fresh(f"{name}.{number}"), field[None, :])
        part = model.temporary("BitShift", [part, shifts], direction="RIGHT")
        part = model.temporary("BitwiseAnd", [part, model.constant(np.uint8((1 << width) - 1))])
        part = model.temporary("Reshape", [part, _shape(model, (-1,))])
        if planes * field.size != encoded.n_codes:
            limits = (np.array([v], dtype=np.int64) for v in (0, encoded.n_codes))
            part = model.temporary("Slice", [part, *(model.constant(v) for v in limits)])
        if low:
            part = model.temporary("BitShift", [part, model.constant(np.uint8(low))], direction="LEFT")
            part = model.temporary("BitwiseOr", [value, part])
        value, low = part, low + width
    sign = model.temporary("BitwiseAnd", [value, model.constant(np.uint8(1 << (bits - 1)))])
    negative = model.temporary("Cast", [sign], to=_BOOL)
    upper = [model.constant(np.uint8(256 - (1 << bits))), model.constant(np.uint8(0))]
    value = model.temporary("BitwiseOr", [value, model.temporary("Where", [negative, *upper])])
    value = model.temporary("Cast", [value], to=_INT8)
    return model.node("Reshape", [value, _shape(model, shape)], name)


# ---- words -----------------------------------------------------------------------------------------------------------


def word_levels(encoded: Iterable[Encoded]) -> dict[int, int]:
    """Choose how long the rows of each book are: as few lengths as tables of moderate size allow.

    Args:
        encoded: all weights of a file.

    Returns:
        own level -> level to write: rows of 2^level.
    """
    books = [e.words for e in encoded if e.words is not None]
    longest = max((words.levels for words in books), default=0)
    return {
        words.levels: longest
        if max(w.children.size for w in books if w.levels == words.levels) << longest <= _MODERATE_TABLE
        else words.levels
        for words in books
    }


def _words(model: Model, name: str, words: Words, shape: tuple[int, ...], levels: int) -> str:
    n_stored = 0

    def stored(values: Array) -> str:
        nonlocal n_stored
        n_stored += 1
        return model.weight(model.fresh(f"{name}.{n_stored - 1}"), values)

    def numbers(values: Array, bits: int) -> str:
        """Unpack `pack_unsigned` to int32."""
        whole, low = "", 0
        for field, width in zip(pack_unsigned(values, bits), unsigned_fields(bits), strict=True):
            if width == 8:
                part = model.temporary("Cast", [stored(field)], to=_INT32)
            else:
                (part,) = model.call(_field_text(width), [stored(field[None, :]), _shape(model, (values.size,))])
            if low:
                part = model.temporary("Mul", [part, model.constant(np.int32(1 << low))])
                part = model.temporary("Add", [whole, part])
            whole, low = part, low + width
        return whole

    tokens = numbers(words.tokens, words.word_bits)
    children = numbers(words.children, words.children_bits)
    size = model.constant(np.int32(1 << words.word_bits))
    room = _shape(model, ((2 << words.word_bits) + 1,))
    width = model.constant(np.int32(1 << levels))
    model.define(_step_text())
    book = model.call(_book_text(levels), [children, stored(words.symbols), size, room, width])
    (codes,) = model.call(_text_text(), [tokens, *book, size, _shape(model, (words.n_symbols,))])
    return model.node("Reshape", [codes, _shape(model, shape)], name)


def _function(signature: str, lines: list[str]) -> str:
    return f'<domain: "{DOMAIN}", opset_import: ["" : 18, "{DOMAIN}" : 1]>\n{signature} {{\n' + "\n".join(lines) + "\n}"


def _field_text(width: int) -> str:
    """Unpack a field of `width` bits: f uint8 (1, bytes), n int64 (1,) -> v int32 (n,)."""
    lines = [
        f"shifts = Constant <value = uint8[{8 // width},1] {{{','.join(str(s) for s in range(0, 8, width))}}}> ()",
        f"mask = Constant <value = uint8 {{{(1 << width) - 1}}}> ()",
        "from = Constant <value = int64[1] {0}> ()",
        "any = Constant <value_ints = [-1]> ()",
        'moved = BitShift <direction = "RIGHT"> (f, shifts)',
        "part = BitwiseAnd (moved, mask)",
        "flat = Reshape (part, any)",
        "cut = Slice (flat, from, n)",
        f"v = Cast <to = {_INT32}> (cut)",
    ]
    return _function(f"f{width} (f, n) => (v)", lines)


def _book_text(levels: int) -> str:
    """Work out the words, as `coding.decode` does.

    Inputs: c int32 (N - 2,) counts of children; s int8 (K, G) symbols; m int32 (), 2^T; e int64 (1,), 2 * 2^T + 1;
    l int32 (), 2^levels.
    Results: by number, both chapters one after the other, d int32 how many symbols a word has and r int32 where in t it
    ends, i.e. the row behind its first symbol; t int8 (N * 2^levels, G), in rows of 2^levels the symbols of each node's
    word, the last one first; b int32 (), from where on a number sends to the second chapter.
    """
    lines = [
        "z = Constant <value = int32 {0}> ()",
        "one = Constant <value = int32[1] {1}> ()",
        "two = Constant <value = int32[1] {2}> ()",
        "roots = Constant <value = int32[2] {0, 1}> ()",
        "k64 = Shape <start = 0, end = 1> (s)",
        f"k = Cast <to = {_INT32}> (k64)",
        "all = Concat <axis = 0> (k, k, c)",
        "before = CumSum <exclusive = 1> (all, z)",
        "first = Add (before, two)",
        "zeros = Mul (all, z)",
        "ones = Add (zeros, one)",
        "v = CumSum <exclusive = 1> (ones, z)",
        # A node's parent is the last whose first child does not come after it.
        "room = Concat <axis = 0> (zeros, one)",
        'marks = ScatterElements <axis = 0, reduction = "add"> (room, first, ones)',
        "passed = CumSum (marks, z)",
        "from2 = Constant <value = int64[1] {2}> ()",
        "to1 = Constant <value = int64[1] {-1}> ()",
        "inside = Slice (passed, from2, to1)",
        "up = Sub (inside, one)",
        "a0 = Concat <axis = 0> (roots, up)",
        "begin = Gather (first, a0)",
        "place = Sub (v, begin)",
        "rank = Max (place, z)",
        # The symbols of a node, its parent, the parent of that, and so on; how many of these nodes are no root; the
        # next of them.
        "last = Constant <value = int64[1] {1}> ()",
        "own = Gather (s, rank)",
        "t0 = Unsqueeze (own, last)",
        "below = Greater (v, one)",
        f"d0 = Cast <to = {_INT32}> (below)",
    ]
    for i in range(levels):
        lines += [f"t{i + 1}, d{i + 1}, a{i + 1} = {DOMAIN}.s (t{i}, d{i}, a{i})"]
    length, root = f"d{levels}", f"a{levels}"
    lines += [
        f"t = Flatten <axis = 2> (t{levels})",
        # Numbers: leaves upwards, inner words downwards, in each chapter; the rest to a place of no use.
        "leaf = Equal (all, z)",
        f"leaf1 = Cast <to = {_INT32}> (leaf)",
        "full = Equal (all, k)",
        f"full1 = Cast <to = {_INT32}> (full)",
        "four = Constant <value = int32 {4}> ()",
        f"x1 = Mul ({root}, two)",
        "x2 = Sub (x1, leaf1)",
        "x3 = Mul (full1, four)",
        "x4 = Add (x2, x3)",
        "kinds = Constant <value = int32[4,1] {-1, 0, 1, 2}> ()",
        "is = Equal (x4, kinds)",
        f"hot = Cast <to = {_INT32}> (is)",
        "axis1 = Constant <value = int32 {1}> ()",
        "count = CumSum (hot, axis1)",
        "signs = Constant <value = int32[4,1] {1, -1, 1, -1}> ()",
        # Less 2 * 2^T: -1 - 2 * 2^T, -2^T, -1 - 2^T, 0.
        "times = Constant <value = int32[4,1] {-2, -1, -1, 0}> ()",
        "pick = Constant <value = int32[4,1] {1, 0, 1, 0}> ()",
        "y0 = Mul (times, m)",
        "bases = Sub (y0, pick)",
        "y1 = Mul (count, signs)",
        "y2 = Add (y1, bases)",
        "y3 = Mul (y2, hot)",
        "axis0 = Constant <value = int64[1] {0}> ()",
        "y4 = ReduceSum <keepdims = 0> (y3, axis0)",
        "y5 = Add (m, m)",
        "slot = Add (y4, y5)",
        "empty = ConstantOfShape <value = int32[1] {0}> (e)",
        "node = ScatterElements <axis = 0> (empty, slot, v)",
        "w1 = Mul (count, pick)",
        "b = ReduceMax <keepdims = 0> (w1)",
        # By number: the symbols of its word, the row behind the word's first symbol.
        f"d = Gather ({length}, node)",
        "w2 = Mul (node, l)",
        "r = Add (w2, d)",
    ]
    return _function(f"b{levels} (c, s, m, e, l) => (d, r, t, b)", lines)


def _step_text() -> str:
    """Follow every node twice as far up.

    Inputs: t int8 (N, P, G) the symbols of the node and its next P - 1 ancestors; d int32 (N,) how many of these nodes
    are no root; a int32 (N,) the ancestor P above, a root where there is none. Results: the same for 2 P.

    In symbols, bytes, and not in ranks or nodes: all that is folded stays in memory until onnxruntime has folded
    everything.
    """
    lines = [
        "above = Gather (t, a)",
        "texts = Concat <axis = 1> (t, above)",
        "more = Gather (d, a)",
        "depth = Add (d, more)",
        "next = Gather (a, a)",
    ]
    return _function("s (t, d, a) => (texts, depth, next)", lines)


def _text_text() -> str:
    """Write the words one after the other.

    Inputs: q int32 (numbers,); what the book gives; m int32 (), 2^T; n int64 (1,).
    Result: w int8 (n, G).

    Every place of the text gets its row of t. Within a word rows go down by one from place to place, so the differences
    are -1 but where a word begins; the row is their running sum. Pad moves a list by one place.
    """
    lines = [
        "zero = Constant <value = int32 {0}> ()",
        "by1 = Constant <value = int64[2] {1, -1}> ()",
        "high = GreaterOrEqual (q, b)",
        f"second = Cast <to = {_INT32}> (high)",
        "moved = Pad (second, by1)",
        "offset = Mul (moved, m)",
        "number = Add (q, offset)",
        "length = Gather (d, number)",
        "start = CumSum <exclusive = 1> (length, zero)",
        "row = Gather (r, number)",
        "value = Add (row, start)",
        "earlier = Pad (value, by1)",
        "jump = Sub (value, earlier)",
        "level = ConstantOfShape <value = int32[1] {-1}> (n)",
        'change = ScatterElements <axis = 0, reduction = "add"> (level, start, jump)',
        "at = CumSum (change, zero)",
        "w = Gather (t, at)",
    ]
    return _function("t (q, d, r, t, b, m, n) => (w)", lines)
