"""The words of `coding`: which strings of symbols get a number, and the parse of a text into them.

The strings are the words of two chapters. A chapter is a trie over symbols in order of falling frequency, in which the
children of a node are the most frequent continuations; so the number of children of every node, breadth first, is all
that has to be stored of it. A node with all children is no word. A node without children is a leaf, others are inner
words. The coder always takes the longest word that fits; hence what follows an inner word cannot begin with the most
frequent symbol. Those places are coded by the second chapter, which spends nearly nothing on that symbol: this takes
away more than half of what a single table of this kind wastes (of Gaussian weights in 7 levels, at 1.76 bits of entropy
and T = 12, one chapter wastes 6.7 %, two 3.6 %; T = 8: 10 % and 5.5 %). The idea of tables that depend on how the word
before ended is that of Marlin (Martinez et al., Data Compression Conference 2017).

Nodes are numbered breadth first through both tries, roots first: 0 and 1 are the roots, 2 .. K+1 the symbols in the
first chapter, K+2 .. 2K+1 in the second. Within a chapter of 2^T numbers, leaves are counted upwards from 0 and inner
words downwards from 2^T - 1, each in the order of nodes. The second chapter holds after every number that is not below
the larger of the two counts of leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from edgecomp.graph import Array

WORD_BITS = (6, 8, 10, 12)
"""Widths T that a word's number may have."""
STRUCTURE_BITS = 8 * 150
"""What the structure of a tensor in words takes in an ONNX file, beyond that of a dense one, about."""
_TABLE_SHARE = 0.05
_ROUNDS = 4
_STATIONARY_ROUNDS = 60
_LEAST_CHANCE = 1e-12
MOST_SYMBOLS = 255
"""Different symbols at most."""
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trie:
    """Both chapters, by node; see the module's docstring.

    Attributes:
        children: (N,), roots first.
        parent, rank, depth: (N,); a root is its own parent.
        number: (N,) a word's number in its chapter, -1 where a node is no word.
        second: (N,) whether the second chapter holds after this word.
        node_of: (2, 2^T) the node of each number; 0 where there is none.
        boundary: the first number after which the second chapter holds.
        fits: whether each chapter has numbers for all its words.
    """

    children: Array
    parent: Array
    rank: Array
    depth: Array
    number: Array
    second: Array
    node_of: Array
    boundary: int
    fits: bool


def trie_of(below: Array, n_symbols: int, word_bits: int) -> Trie:
    """Work out all about the nodes from the counts of children (N - 2,) behind the roots."""
    children = np.concatenate([[n_symbols, n_symbols], below.astype(np.int64)])
    n = children.size
    first = 2 + np.cumsum(children) - children
    # intp: where addresses have 32 bits, numpy repeats and counts nothing by numbers of 64.
    parent = np.concatenate([[0, 1], np.repeat(np.arange(n), children.astype(np.intp))[: n - 2]])
    rank = np.maximum(np.arange(n) - first[parent], 0)
    depth, chapter = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    chapter[1] = 1
    low, high = 2, min(n, 2 + 2 * n_symbols)
    while low < high:
        depth[low:high] = depth[parent[low:high]] + 1
        chapter[low:high] = chapter[parent[low:high]]
        low, high = high, min(n, int(first[high - 1] + children[high - 1]))
    size = 1 << word_bits
    number = np.full(n, -1)
    boundary, most = 0, 0
    for which in (0, 1):
        leaves = np.flatnonzero((chapter == which) & (children == 0))
        inner = np.flatnonzero((chapter == which) & (children > 0) & (children < n_symbols))
        number[leaves] = np.arange(leaves.size)
        number[inner] = size - 1 - np.arange(inner.size)
        boundary, most = max(boundary, leaves.size), max(most, leaves.size + inner.size)
    node_of = np.zeros((2, size), dtype=np.int64)
    words = np.flatnonzero((number >= 0) & (number < size))
    node_of[chapter[words], number[words]] = words
    return Trie(
        children=children,
        parent=parent,
        rank=rank,
        depth=depth,
        number=number,
        second=number >= boundary,
        node_of=node_of,
        boundary=boundary,
        fits=most <= size,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Chapter:
    """A trie while it is designed, nodes breadth first without the root.

    Attributes:
        children, depth: (N,).
        first: rank of the word's first symbol (N,).
        chance: probability of the symbols behind the first (N,).
    """

    children: Array
    depth: Array
    first: Array
    chance: Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Book:
    """A pair of chapters, and what a tensor takes with them, tables and structure included."""

    word_bits: int
    trie: Trie
    total_bits: float


@lru_cache(maxsize=64)
def best_book(
    counts: tuple[int, ...], group: int, widths: tuple[int, ...] = WORD_BITS, rounds: int = _ROUNDS
) -> Book | None:
    """Design chapters for symbols with these counts, the largest first, and choose the width of a word's number."""
    n, n_symbols = sum(counts), len(counts)
    if n_symbols > MOST_SYMBOLS:
        return None
    p = np.array(counts) / n
    best = None
    for word_bits in widths:
        if 2 * n_symbols > 1 << word_bits:
            continue
        pair, bits_a_symbol = _chapters(p, 1 << word_bits, rounds)
        below = _merged(pair)
        width = max(1, int(below.max()).bit_length())
        table = below.size * width + 8 * n_symbols * group
        total = n * bits_a_symbol + table + STRUCTURE_BITS
        if best is None or total < best[0]:
            best = total, word_bits, below
        if table > _TABLE_SHARE * total:
            break
    if best is None:
        return None
    return Book(word_bits=best[1], trie=trie_of(best[2], n_symbols, best[1]), total_bits=best[0])


def _chapters(p: Array, size: int, rounds: int) -> tuple[tuple[_Chapter, _Chapter], float]:
    """Design two chapters of `size` numbers; also give bits a symbol, for symbols drawn independently from p (K,)."""
    n_symbols = p.size
    tail = np.append(np.cumsum(p[::-1])[::-1], 0.0)
    found: tuple[tuple[_Chapter, _Chapter], float] | None = None
    for join in sorted({0, _join(p, tail), n_symbols - 1}):
        gain = p.copy()
        if join < n_symbols - 1:
            gain[join:] = tail[join] / (n_symbols - 1 - join)
        gain = np.minimum.accumulate(gain)
        start = [p, np.append(0.0, p[1:])]
        for _ in range(rounds):
            pair = (_grow(p, gain, start[0], size), _grow(p, gain, start[1], size))
            rates, n_a_word = _stationary(p, tail, pair, size)
            bits = float(np.log2(size)) / n_a_word
            if found is None or bits < found[1]:
                found = pair, bits
            start = [(s + r / max(r.sum(), 1e-300)) / 2 for s, r in zip(start, rates, strict=True)]
    assert found is not None
    return found


def _join(p: Array, tail: Array) -> int:
    """Find the rank from which on all children are best added at once.

    The last child costs no number, since its parent then is no word any more; so K - r children cost K - r - 1.
    """
    for r in range(p.size - 1):
        if tail[r] >= p[r] * (p.size - 1 - r):
            return r
    return p.size - 1


def _grow(p: Array, gain: Array, start: Array, size: int) -> _Chapter:
    """Take the nodes that lengthen words most, until there are `size` words.

    Args:
        p: probabilities of the symbols (K,), falling.
        gain: what the r-th child of a node adds, as a share of the node's own probability (K,), falling.
        start: probabilities of the first symbol (K,).
        size: words at most, at least K.
    """
    k = p.size
    deepest = min(255, (1 << 20) // size)
    threshold = 1 / (4 * size)
    while True:
        levels = [(start, np.full(k, np.inf), np.full(k, -1), np.arange(k), np.arange(k), np.ones(k))]
        below, n = 0, k
        while len(levels) < deepest and levels[-1][0].size and n < 64 * size:
            reach, key, _, _, first, chance = levels[-1]
            wanted = np.divide(threshold, reach, out=np.full(reach.size, np.inf), where=reach > 0)
            counts = np.searchsorted(-gain, -wanted, side="right")
            at = np.repeat(np.arange(reach.size), counts)
            rank = np.arange(at.size) - np.repeat(np.cumsum(counts) - counts, counts)
            levels.append(
                (
                    reach[at] * p[rank],
                    np.minimum(reach[at] * gain[rank], key[at]),
                    at + below,
                    rank,
                    first[at],
                    chance[at] * p[rank],
                )
            )
            below, n = n, n + at.size
        key, parent, rank, first, chance = (np.concatenate([lv[i] for lv in levels]) for i in (1, 2, 3, 4, 5))
        order = np.argsort(-key, kind="stable")
        words = np.cumsum(1 - ((rank == k - 1) & (parent >= 0))[order].astype(np.int64))
        if words[-1] >= size or threshold < _LEAST_CHANCE or k == 1:
            break
        threshold /= 8
    taken = np.sort(order[: int(np.searchsorted(words, size, side="right"))])
    depth = np.repeat(np.arange(1, len(levels) + 1), [lv[0].size for lv in levels])
    new = np.zeros(n, dtype=np.intp)
    new[taken] = np.arange(taken.size)
    inside = parent[taken] >= 0
    children = np.bincount(new[parent[taken][inside]], minlength=taken.size)
    return _Chapter(children=children, depth=depth[taken], first=first[taken], chance=chance[taken])


def _stationary(p: Array, tail: Array, pair: tuple[_Chapter, _Chapter], size: int) -> tuple[tuple[Array, Array], float]:
    """Follow the longest-word parse of independent symbols to its stationary state.

    Returns:
        for each chapter, how often a word of it begins with each symbol (K,), all together 1; symbols a word.
    """
    k = p.size
    boundary = max(int((chapter.children == 0).sum()) for chapter in pair)
    ends, lengths = [], []
    for chapter in pair:
        inner = (chapter.children > 0) & (chapter.children < k)
        second = inner & (np.cumsum(inner) <= size - boundary)
        weight = np.where(chapter.children < k, chapter.chance * tail[chapter.children], 0.0)
        if k == 1:
            weight = np.where(chapter.children == 0, 1.0, 0.0)
        cell = (chapter.first * 2 + second) * k + np.minimum(chapter.children, k - 1)
        ends.append(np.bincount(cell, weights=weight, minlength=2 * k * k).reshape(k, 2, k))
        lengths.append(np.bincount(chapter.first, weights=chapter.chance, minlength=k))
    rates = (p, np.zeros(k))
    for _ in range(_STATIONARY_ROUNDS):
        left = np.einsum("f,fsc->sc", rates[0], ends[0]) + np.einsum("f,fsc->sc", rates[1], ends[1])
        # After a word with c children the next symbol has rank c or more.
        following = np.cumsum(left / np.maximum(tail[:k], 1e-300), axis=1) * p
        following /= following.sum()
        change = np.abs(following[0] - rates[0]).max() + np.abs(following[1] - rates[1]).max()
        rates = (following[0], following[1])
        if change < 1e-7:
            break
    return rates, float(rates[0] @ lengths[0] + rates[1] @ lengths[1])


def _merged(pair: tuple[_Chapter, _Chapter]) -> Array:
    """Put two chapters' counts of children together, breadth first."""
    depth = np.concatenate([pair[0].depth, pair[1].depth])
    order = np.argsort(depth, kind="stable")
    return np.concatenate([pair[0].children, pair[1].children])[order]


# ---- parsing ---------------------------------------------------------------------------------------------------------


def tokens_of(trie: Trie, ranks: Array) -> Array:
    """Name the longest words one after the other: ranks (n,) -> uint16."""
    n, k = trie.children.size, int(trie.children[0])
    step = np.full((n, k), -1, dtype=np.int64)
    step[trie.parent[2:], trie.rank[2:]] = np.arange(2, n)
    ends = step < 0
    after = 2 + k * trie.second[:, None] + np.arange(k)
    # Lists and rows' beginnings instead of arrays and nodes: a loop over symbols is what takes the time here.
    next_row = (k * np.where(ends, after, step)).reshape(-1).tolist()
    word_ends = ends.reshape(-1).tolist()
    row, rows = 0, []
    for low in range(0, ranks.size, _CHUNK):
        for rank in ranks[low : low + _CHUNK].tolist():
            cell = row + rank
            if word_ends[cell]:
                rows.append(row)
            row = next_row[cell]
    while trie.number[row // k] < 0:
        row = next_row[row]
    rows.append(row)
    nodes = np.array(rows) // k
    return np.asarray(trie.number[nodes], dtype=np.uint16)
