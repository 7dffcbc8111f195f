"""Weight codes in fewer bits than their width, in a form that whole-array operators can take apart again.

Two encodings; the smaller one is taken. `dense` is `packing`: every code in its full width. `words` is a
variable-to-fixed code: numbers of T bits each name a string of codes, so that a decoder needs no loop over bits, only
table look-ups, running sums and one scatter (see `exporters.onnx_weights`; `decode` here is the same in numpy).

What the strings are and how they are numbered stands in `words`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from edgecomp.errors import GraphError
from edgecomp.graph import Array, Node, Op
from edgecomp.packing import pack, pack_unsigned, packed_bytes, unpack
from edgecomp.quantmath import WEIGHT_BITS
from edgecomp.words import MOST_SYMBOLS, STRUCTURE_BITS, WORD_BITS, Book, Trie, best_book, tokens_of, trie_of

GROUPS = (1, 2, 4)
"""Codes a symbol; more than one in large tensors only."""
_SMALLEST_GROUPED = 1 << 20
_QUICK_ROUNDS = 2
_CHUNK = 1 << 16
LONGEST_WORD = 255
"""Symbols of a word at most."""
# Bits that a tensor holds -> where the next width of a number begins to pay.
_CONTENT_LIMITS = (5e4, 2e5, 2e6)
_GROUP_WORTH = 1.02


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Words:
    """A tensor as numbers of words.

    Attributes:
        word_bits: T.
        symbols: int8 (K, G), the most frequent first; G neighbouring codes are one symbol.
        children: uint8, how many children every node behind the two roots has.
        tokens: uint16, the numbers.
        n_symbols: how many symbols they stand for; the last word may be longer.
    """

    word_bits: int
    symbols: Array
    children: Array
    tokens: Array
    n_symbols: int

    @property
    def children_bits(self) -> int:
        """Give the width that a count of children is stored in."""
        return max(1, int(self.children.max(initial=0)).bit_length())

    @property
    def levels(self) -> int:
        """Give the least L for which every word has less than 2^L symbols."""
        return int(trie_of(self.children, len(self.symbols), self.word_bits).depth.max()).bit_length()

    @property
    def stored_bytes(self) -> int:
        """Count the bytes of numbers, counts and symbols."""
        fields = (*pack_unsigned(self.tokens, self.word_bits), *pack_unsigned(self.children, self.children_bits))
        return self.symbols.nbytes + sum(field.nbytes for field in fields)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """A tensor of codes as it is stored.

    Attributes:
        bits: width of a code, 2-8.
        n_codes: how many there are.
        fields: dense: what `packing.pack` gives, for 8 bits the codes themselves; empty otherwise.
        words: not dense: the words.
    """

    bits: int
    n_codes: int
    fields: tuple[Array, ...] = ()
    words: Words | None = None

    @property
    def kind(self) -> str:
        """Name the encoding: "dense" or "words"."""
        return "dense" if self.words is None else "words"

    @property
    def stored_bytes(self) -> int:
        """Count the bytes of what is stored, tables included, without the structure of a file."""
        return sum(field.nbytes for field in self.fields) if self.words is None else self.words.stored_bytes


def encode(codes: Array, bits: int) -> Encoded:
    """Store codes in the smaller of the encodings; deterministic.

    Args:
        codes: int8, any shape, at least one.
        bits: 2-8; the codes fit in it.

    Raises:
        GraphError: wrong dtype or width, no codes, or a code out of range.
    """
    if codes.dtype != np.int8 or bits not in WEIGHT_BITS or not codes.size:
        raise GraphError(f"encode: {codes.size} {codes.dtype} codes of {bits} bits, expected int8 codes of 2-8 bits")
    flat = np.ascontiguousarray(codes).reshape(-1)
    plain = dense(flat, bits)
    n_levels = np.count_nonzero(np.bincount(flat.view(np.uint8)))
    groups = [g for g in GROUPS if flat.size % g == 0 and n_levels**g <= MOST_SYMBOLS]
    chosen: tuple[Book, Array, Array] | None = None
    least = 8.0 * plain.stored_bytes
    for group in groups if flat.size >= _SMALLEST_GROUPED else (1,):
        symbols, ranks, counts = _ranked(flat, group)
        book = best_book(tuple(counts.tolist()), group)
        # Groups are decoded faster and in less memory: worth some bytes.
        if book is not None and book.total_bits < (_GROUP_WORTH * least if chosen else least):
            chosen, least = (book, symbols, ranks), min(least, book.total_bits)
    if chosen is None:
        return plain
    book, symbols, ranks = chosen
    words = Words(
        word_bits=book.word_bits,
        symbols=symbols,
        children=book.trie.children[2:].astype(np.uint8),
        tokens=tokens_of(book.trie, ranks),
        n_symbols=ranks.size,
    )
    found = Encoded(bits=bits, n_codes=flat.size, words=words)
    return found if 8 * found.stored_bytes + STRUCTURE_BITS < 8 * plain.stored_bytes else plain


def dense(codes: Array, bits: int) -> Encoded:
    """Store every code by itself: int8 codes, any shape, of 2-8 bits.

    Raises:
        GraphError: wrong dtype or width, or a code out of range.
    """
    flat = np.ascontiguousarray(codes).reshape(-1)
    return Encoded(bits=bits, n_codes=flat.size, fields=(flat,) if bits == 8 else pack(flat, bits))


def decode(encoded: Encoded) -> Array:
    """Undo `encode`: int8 (n_codes,)."""
    words = encoded.words
    if words is None:
        return encoded.fields[0] if encoded.bits == 8 else unpack(encoded.fields, encoded.bits, encoded.n_codes)
    codes: Array = np.empty(encoded.n_codes, dtype=np.int8)
    trie = trie_of(words.children, len(words.symbols), words.word_bits)
    tokens = (words.tokens[start : start + _CHUNK] for start in range(0, words.tokens.size, _CHUNK))
    decode_words(trie, words.symbols, tokens, codes)
    return codes


def checked_trie(*, word_bits: int, symbols: Array, children: Array, n_tokens: int, n_symbols: int) -> Trie:
    """Work out the table of words from numbers that may be damaged.

    Args:
        word_bits: T.
        symbols: int8 (K, G).
        children: any integers, counts of children.
        n_tokens: how many numbers of words there are.
        n_symbols: how many symbols they stand for.

    Returns:
        the table; only whether the numbers name words is left to `decode_words`.

    Raises:
        GraphError: no tensor is stored so.
    """
    room, n_different, n_counts = 1 << word_bits, len(symbols), children.size
    if word_bits not in WORD_BITS or symbols.ndim != 2 or symbols.shape[1] not in GROUPS:
        raise GraphError(f"words of {word_bits} bits for symbols of shape {symbols.shape} are none")
    if not 1 <= n_different <= min(MOST_SYMBOLS, room // 2):
        raise GraphError(f"{n_different} symbols, which no table has")
    # A node that is no word has at least two children, or is one of a chain of a single symbol.
    if not 2 * n_different <= n_counts <= 4 * room + 2 * LONGEST_WORD or not 1 <= n_tokens <= n_symbols:
        raise GraphError(f"{n_counts} counts and {n_tokens} words, which {n_symbols} symbols cannot have")
    below = children.astype(np.int64)
    # Breadth first: a node stands behind its parent, and the last node is the last child.
    first = 2 + 2 * n_different + np.cumsum(below) - below
    in_order = (first > np.arange(2, 2 + n_counts)).all() and first[-1] + below[-1] == 2 + n_counts
    if below.min() < 0 or below.max() > n_different or not in_order:
        raise GraphError("the counts of children are no tree's")
    trie = trie_of(below, n_different, word_bits)
    if trie.depth.max() > LONGEST_WORD:
        raise GraphError(f"a word has {trie.depth.max()} symbols, at most {LONGEST_WORD} are possible")
    if not trie.fits:
        raise GraphError(f"the table has more words than numbers of {word_bits} bits")
    if n_symbols > n_tokens * int(trie.depth.max()):
        raise GraphError(f"decode: the words do not give the {n_symbols} symbols expected")
    return trie


def decode_words(trie: Trie, symbols: Array, tokens: Iterable[Array], out: Array) -> None:
    """Write words one after the other, in little memory beside the result.

    Args:
        trie: of the table.
        symbols: int8 (K, G).
        tokens: uint16, numbers of words, in parts of at least one.
        out: int8 (n_symbols * G,), gets the codes.

    Raises:
        GraphError: a number names no word, or the words are too few or too many.
    """
    rows = out.reshape(-1, symbols.shape[1])
    texts = _texts(trie)
    done, second = 0, False
    for part in tokens:
        numbers = part.astype(np.int64)
        follows = numbers >= trie.boundary
        nodes = trie.node_of[np.concatenate([[second], follows[:-1]]).astype(np.int64), numbers]
        second = bool(follows[-1])
        # No word begins where the text has ended.
        if not nodes.all() or done + int(trie.depth[nodes[:-1]].sum()) >= len(rows):
            raise GraphError(f"decode: the words do not give the {len(rows)} symbols expected")
        done = _write_words(nodes, trie.depth, texts, symbols, rows, done)
    if done < len(rows):
        raise GraphError(f"decode: the words do not give the {len(rows)} symbols expected")


def _write_words(nodes: Array, depth: Array, texts: tuple[Array, Array], symbols: Array, rows: Array, done: int) -> int:
    """Write the symbols of some words into rows, from row `done` on and no further than rows go; give the end."""
    places, of_words = texts
    ends = done + np.cumsum(depth[nodes])
    low = 0
    while low < nodes.size:
        high = max(low + 1, int(np.searchsorted(ends, done + _CHUNK, side="right")))
        lengths = depth[nodes[low:high]]
        start_of = places[nodes[low:high]] - (ends[low:high] - lengths - done)
        at = np.repeat(start_of, lengths.astype(np.intp)) + np.arange(int(lengths.sum()))
        part = symbols[of_words[at[: len(rows) - done]]]
        rows[done : done + len(part)] = part
        low, done = high, int(ends[high - 1])
    return done


def _texts(trie: Trie) -> tuple[Array, Array]:
    """Spell every node: where its symbols start, and the ranks of all of them, one node after the other."""
    starts = np.cumsum(trie.depth) - trie.depth
    ranks = np.zeros(int(trie.depth.sum()), dtype=np.uint8)
    nodes = np.flatnonzero(trie.depth)
    left, begin = trie.depth[nodes], starts[nodes]
    # Walk from each node up to its root: the last symbol comes first.
    while nodes.size:
        ranks[begin + left - 1] = trie.rank[nodes]
        left = left - 1
        open_ = left > 0
        nodes, begin, left = trie.parent[nodes[open_]], begin[open_], left[open_]
    return starts, ranks


def estimated_bits(counts: Array) -> float:
    """Estimate from a histogram how many bits a tensor takes in a file, tables and structure included.

    Codes are taken to follow each other without memory, as those of trained weights nearly do.

    Args:
        counts: how many codes there are of every level, at least 3 levels; the width is the least that holds them.
    """
    n, bits = int(counts.sum()), max(2, int(len(counts) - 1).bit_length())
    plain = 8.0 * packed_bytes(n, bits)
    present = np.sort(counts[counts > 0])[::-1]
    share = present / max(n, 1)
    content = -n * float(share @ np.log2(share, where=share > 0, out=np.zeros_like(share)))
    word_bits = WORD_BITS[int(np.searchsorted(_CONTENT_LIMITS, content))]
    while 2 * present.size > 1 << word_bits:
        word_bits += 2
    book = best_book(tuple(present.tolist()), 1, (word_bits,), _QUICK_ROUNDS) if n else None
    return plain if book is None else min(plain, book.total_bits)


def _ranked(flat: Array, group: int) -> tuple[Array, Array, Array]:
    """Number the distinct groups of int8 (n,) by falling frequency: symbols (K, G), ranks (n / G,), counts (K,)."""
    levels = np.flatnonzero(np.bincount(flat.view(np.uint8), minlength=256))
    place = np.zeros(256, dtype=np.int32)
    place[levels] = np.arange(levels.size, dtype=np.int32)
    digits = place[flat.view(np.uint8)].reshape(-1, group)
    keys = digits[:, 0]
    for column in range(1, group):
        keys = keys * np.int32(levels.size) + digits[:, column]
    counts = np.bincount(keys, minlength=levels.size**group)
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    rank_of = np.zeros(counts.size, dtype=np.int32)
    rank_of[order] = np.arange(order.size, dtype=np.int32)
    powers = levels.size ** np.arange(group - 1, -1, -1)
    symbols = levels[order[:, None] // powers % levels.size].astype(np.uint8).view(np.int8)
    return symbols, rank_of[keys], counts[order]


# ---- what a planner counts with --------------------------------------------------------------------------------------


PACKED_FORMS = frozenset({"onnx", "tflite-packed", "tflm", "c"})
"""Those that reach every width, and store frequent codes in fewer bits, TFLite Micro and C zeros; see `form_of`."""
UNPACKING_BYTES = 200
"""What unpacking a weight takes in a TFLite file beside its bytes, about: an operator, a tensor, its name."""
DECODING_BYTES = 240
"""What decoding a weight takes in a TFLite Micro file beside its bytes, at most: an operator, its name, two tensors.

Another weight takes about a third of it, as the name is there already, but also some 200 bytes of RAM.
"""
MICRO_HEADER_BYTES = 16
"""Of what TFLite Micro's DECODE reads, before the values."""


class MicroForm(StrEnum):
    """How a TFLite Micro file stores the codes of a weight.

    DENSE: a byte each.
    TABLE: indices into a table of the values that occur.
    BITMAP: a bit each that says whether it is 0, and the others in a byte each.
    """

    DENSE = "dense"
    TABLE = "table"
    BITMAP = "bitmap"


def micro_form(n: int, n_levels: int, n_zeros: int) -> tuple[MicroForm, int]:
    """Choose how a TFLite Micro file stores a weight: in the fewest bytes.

    Args:
        n: codes, at least one.
        n_levels: different ones among them.
        n_zeros: zeros among them.

    Returns:
        the form and its bytes: header, values and indices.
    """
    index_bits = max(1, (n_levels - 1).bit_length())
    bitmap = MICRO_HEADER_BYTES + -(-n // 8) + n - n_zeros
    table = MICRO_HEADER_BYTES + -(-n * index_bits // 8) + n_levels
    least, form = (table, MicroForm.TABLE) if index_bits < 8 and table <= bitmap else (bitmap, MicroForm.BITMAP)
    return (form, least) if least + DECODING_BYTES < n else (MicroForm.DENSE, n)


def plain_c_bits(counts: Array) -> int:
    """Count the bits of a weight's codes in C source: each in as many bits as all need, or zeros in a bit, or levels.

    What `exporters.c_weights.code_stream` chooses from, but for the rest of a byte after every four filters.

    Args:
        counts: (256,), how many codes there are of -128, -127, ... 127.
    """
    n, n_zeros = float(counts.sum()), float(counts[128])
    used = np.flatnonzero(np.delete(counts, 128)) + (np.flatnonzero(np.delete(counts, 128)) >= 128) - 128
    highest = max((int(v) if v >= 0 else -1 - int(v) for v in used), default=0)
    width, n_levels = 1 + highest.bit_length(), len(used)
    n_with_zero = n_levels + (n_zeros > 0)
    table, others = (max(1, (max(1, n_different) - 1).bit_length()) for n_different in (n_with_zero, n_levels))
    return int(
        np.ceil(
            min(
                n * width,
                n * table + 8 * n_with_zero,
                n + (n - n_zeros) * width,
                n + (n - n_zeros) * others + 8 * n_levels,
            )
        )
    )


def field_bits(form: str, node: Node, bits: int) -> int:
    """Give the bits a form of file spends on a code of a layer where every code takes the same.

    ONNX, packed TFLite and TFLite Micro reach every width. LiteRT's kernels read 4 bits in convolutions and linear
    layers; in depthwise and grouped convolutions they do too, but 10 to 50 times slower than 8.

    Args:
        form: see `artifact.form_of`.
        node: the layer.
        bits: logical width.
    """
    if form in PACKED_FORMS:
        return bits
    if form.endswith("-int8"):
        return 8
    dense = node.op is Op.LINEAR or node.attrs["groups"] == 1
    return 4 if bits <= 4 and dense else 8


def stored_bits(form: str, node: Node, bits: int, counts: Array) -> int:
    """Count the bits that all codes of a layer take in a form of file: what a planner must count with.

    An estimate where frequent codes may take fewer bits.

    Args:
        form: see `artifact.form_of`.
        node: the layer.
        bits: logical width.
        counts: (256,), how many codes there are of -128, -127, ... 127; may be fractions.
    """
    n = round(float(counts.sum()))
    if form == "c" and n:
        return plain_c_bits(counts)
    if form == "tflm" and n:
        return 8 * micro_form(n, int((counts > 0).sum()), round(float(counts[128])))[1]
    plain = n * field_bits(form, node, bits)
    if form not in PACKED_FORMS or n == 0:
        return plain
    limit = (1 << (bits - 1)) - 1
    least = min(plain, int(np.ceil(estimated_bits(np.rint(counts[128 - limit : 129 + limit]).astype(np.int64)))))
    # A weight that packing hardly makes smaller stays as it is.
    return 8 * n if form == "tflite-packed" and least + 8 * UNPACKING_BYTES >= 8 * n else least
