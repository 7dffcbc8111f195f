"""Weights in fewer bits than their width: words by hand, round trips, entropy, and what onnxruntime decodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp import quantmath, reference
from edgecomp.benchmarks.onnx_runtime import optimized
from edgecomp.coding import Words, checked_trie, decode, dense, encode, estimated_bits
from edgecomp.compress import compress
from edgecomp.errors import GraphError
from edgecomp.exporters.describe import describe
from edgecomp.exporters.to_onnx import to_onnx
from edgecomp.graph import Graph, Op
from edgecomp.packing import pack, pack_unsigned, packed_bytes, unsigned_fields
from edgecomp.plan import Io
from edgecomp.words import WORD_BITS
from tests.graphs import Build, images, plan_for
from tests.onnx_run import onnx_run


def entropy_bits(codes: np.ndarray) -> float:
    """What independent codes of these frequencies hold, all together."""
    share = np.unique(codes, return_counts=True)[1] / codes.size
    return float(-codes.size * (share * np.log2(share)).sum())


def ternary(n: int, zeros: float, seed: int = 0) -> np.ndarray:
    side = (1 - zeros) / 2
    return np.random.default_rng(seed).choice(np.array([0, 1, -1], dtype=np.int8), n, p=[zeros, side, side])


def gaussian(n: int, step: float, limit: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.rint(np.random.default_rng(seed).standard_normal(n) / step), -limit, limit).astype(np.int8)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    bits = draw(st.integers(2, 8))
    half = 1 << (bits - 1)
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    levels = rng.permutation(np.arange(-half, half))[: draw(st.integers(1, 2 * half))].astype(np.int8)
    weights = rng.random(levels.size) ** draw(st.sampled_from([0.0, 1.0, 4.0, 40.0])) + 1e-9
    n = draw(st.integers(1, 5000)) * draw(st.sampled_from([1, 1, 1, 4]))
    return rng.choice(levels, n, p=weights / weights.sum()), bits


@settings(derandomize=True, deadline=None, max_examples=25)
@given(tensors())
def test_round_trip(case: tuple[np.ndarray, int]) -> None:
    codes, bits = case
    encoded = encode(codes, bits)
    back = decode(encoded)
    assert back.dtype == np.int8
    assert np.array_equal(back, codes)
    assert encoded.stored_bytes <= packed_bytes(codes.size, bits)
    again = encode(codes.copy(), bits)
    assert (again.kind, again.stored_bytes) == (encoded.kind, encoded.stored_bytes)
    if encoded.words is not None and again.words is not None:
        assert np.array_equal(again.words.tokens, encoded.words.tokens)
        assert np.array_equal(again.words.children, encoded.words.children)


@pytest.mark.parametrize("value", [0, 1, -1])
@pytest.mark.parametrize("n", [1, 7, 5000, 300_000])
def test_one_level(n: int, value: int) -> None:
    codes = np.full(n, value, dtype=np.int8)
    encoded = encode(codes, 2)
    assert np.array_equal(decode(encoded), codes)
    assert encoded.kind == ("dense" if n < 5000 else "words")
    assert encoded.stored_bytes <= max(2, n / 50)


def test_groups_of_codes() -> None:
    """Above a million codes, two or four of them are one symbol; odd numbers of codes have none to spare."""
    for n in (1 << 20, (1 << 20) + 1):
        codes = gaussian(n, 2.2, 3)
        encoded = encode(codes, 3)
        assert encoded.words is not None
        assert (encoded.words.symbols.shape[1] > 1) == (n % 2 == 0)
        assert np.array_equal(decode(encoded), codes)


def test_words_by_hand() -> None:
    """Three symbols a, b, c; T = 6. First chapter: a has the child aa, aa all three; second: nothing but symbols.

    Nodes: 0 and 1 roots; 2-4 a, b, c; 5-7 a, b, c of the second chapter; 8 aa; 9-11 aaa, aab, aac.
    Leaves of the first chapter: b 0, c 1, aaa 2, aab 3, aac 4; its inner word: a 63. aa is none. Second: a, b, c 0-2.
    So the second chapter holds after 63 alone.
    """
    text, numbers = "aab" "c" "a" "b" "aaa" "a" "c" "b", [3, 1, 63, 1, 2, 63, 2, 0]
    words = Words(
        word_bits=6,
        symbols=np.array([[0], [1], [-1]], dtype=np.int8),
        children=np.array([1, 0, 0, 0, 0, 0, 3, 0, 0, 0], dtype=np.uint8),
        tokens=np.array(numbers, dtype=np.uint16),
        n_symbols=len(text),
    )
    encoded = replace(dense(np.zeros(len(text), dtype=np.int8), 2), fields=(), words=words)
    assert "".join("abc"[v] for v in decode(encoded)) == text
    assert words.levels == 2
    # 8 numbers of 6 bits in fields of 4 and 2, 10 counts of 2 bits, 3 symbols.
    assert words.stored_bytes == encoded.stored_bytes == 4 + 2 + 3 + 3


@pytest.mark.parametrize(
    ("codes", "bits", "most"),
    [
        (ternary(400_000, 0.5), 2, 1.005),
        (ternary(400_000, 0.75), 2, 1.02),
        (ternary(400_000, 0.9), 2, 1.06),
        (gaussian(400_000, 2.2, 3), 3, 1.05),
        (gaussian(400_000, 1.3, 3), 3, 1.055),
        (gaussian(400_000, 0.8, 7), 4, 1.05),
    ],
    ids=["ternary 1.5", "ternary 1.06", "ternary 0.57", "7 levels 1.12", "7 levels 1.76", "15 levels 2.4"],
)
def test_near_the_entropy(codes: np.ndarray, bits: int, most: float) -> None:
    encoded = encode(codes, bits)
    assert entropy_bits(codes) < 8 * encoded.stored_bytes < most * entropy_bits(codes)
    limit = (1 << (bits - 1)) - 1
    counts = np.bincount(codes.astype(int) + limit, minlength=2 * limit + 1)
    assert estimated_bits(counts) == pytest.approx(8 * encoded.stored_bytes, rel=0.03)


def test_even_codes_stay_dense() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, 20_000).astype(np.int8)
    assert encode(codes, 4).kind == "dense"
    assert [f.tobytes() for f in encode(codes, 4).fields] == [f.tobytes() for f in pack(codes, 4)]
    counts = np.bincount(codes.astype(int) + 8)
    assert estimated_bits(counts) == 8 * packed_bytes(20_000, 4)
    assert estimated_bits(np.zeros(15, dtype=np.int64)) == 0


@pytest.mark.parametrize("bits", [6, 7, 8, 10, 12])
def test_unsigned_fields_follow_the_layout_of_packing(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, 101)
    low = 0
    for field, width in zip(pack_unsigned(values, bits), unsigned_fields(bits), strict=True):
        k = 8 // width
        planes = np.concatenate([(field >> (p * width)) & ((1 << width) - 1) for p in range(k)])[:101]
        assert np.array_equal(planes, (values >> low) & ((1 << width) - 1))
        low += width
    assert low == bits
    assert set(unsigned_fields(bits)) <= {8, 4, 2, 1}


@pytest.mark.parametrize(
    ("codes", "bits"),
    [(np.zeros(3, dtype=np.int16), 4), (np.zeros(3, dtype=np.int8), 9), (np.zeros(0, dtype=np.int8), 4)],
)
def test_refused(codes: np.ndarray, bits: int) -> None:
    with pytest.raises(GraphError, match="expected int8 codes of 2-8 bits"):
        encode(codes, bits)
    with pytest.raises(GraphError, match=r"outside -2\.\.1"):
        encode(np.array([2], dtype=np.int8), 2)


SYMBOLS = np.array([[0], [1], [-1]], dtype=np.int8)
# what differs from a flat table of three symbols -> what is said
BENT = {
    "word bits": ({"word_bits": 7}, "words of 7 bits for symbols of shape"),
    "group": ({"symbols": np.zeros((3, 3), dtype=np.int8)}, "are none"),
    "no symbols": ({"symbols": SYMBOLS[:0]}, "0 symbols, which no table has"),
    "more symbols than half the numbers": ({"symbols": np.zeros((33, 1), dtype=np.int8)}, "33 symbols"),
    "few counts": ({"children": np.zeros(5, dtype=np.uint8)}, "5 counts and 8 words"),
    "many counts": ({"children": np.zeros(1 << 12, dtype=np.uint8)}, "4096 counts and 8 words"),
    "no words": ({"n_tokens": 0}, "and 0 words, which 12 symbols cannot have"),
    "more words than symbols": ({"n_tokens": 13}, "and 13 words, which 12 symbols cannot have"),
    "a negative count": ({"children": np.array([-1, 1, 0, 0, 0, 0])}, "no tree's"),
    "more children than symbols": ({"children": np.array([4, 0, 0, 0, 0, 0, 0, 0, 0, 0])}, "no tree's"),
    "a tree with another end": ({"children": np.array([1, 0, 0, 0, 0, 0])}, "no tree's"),
    "symbols beyond all words": ({"n_symbols": 8 * 1 + 1}, "the words do not give the 9 symbols expected"),
}


@pytest.mark.parametrize("case", BENT)
def test_tables_that_are_none(case: str) -> None:
    """A flat table, in which every word is a symbol: refused before anything of the size that it claims is made."""
    table: dict[str, Any] = {
        "word_bits": 6, "symbols": SYMBOLS, "children": np.zeros(6, dtype=np.uint8), "n_tokens": 8, "n_symbols": 8,
    }  # fmt: skip
    assert checked_trie(**table).depth.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    change, message = BENT[case]
    if "n_tokens" in change:
        change = {**change, "n_symbols": 12}
    with pytest.raises(GraphError, match=message):
        checked_trie(**{**table, **change})


# ---- in ONNX ---------------------------------------------------------------------------------------------------------


def with_codes(graph: Graph, draw: Callable[[int], np.ndarray]) -> Graph:
    """Replace every weight's codes by drawn ones."""
    tensors = dict(graph.tensors)
    for node in graph.layers():
        weight = graph.weight(node)
        assert weight.data is not None
        tensors[weight.name] = replace(weight, data=draw(weight.data.size).reshape(weight.shape))
    return replace(graph, tensors=tensors)


def network(bits: int, io: Io = Io.INT8) -> Graph:
    b = Build(5, (16, 6, 6))
    x = b.clip("relu", b.conv("conv", "input", 64))
    x = b.conv("deep", x, 48)
    x = b.linear("fc", b.node(Op.FLATTEN, "flat", (x,), {}), 20)
    graph = b.graph(x)
    return compress(graph, plan_for(graph, bits, io=io))


DRAWN: dict[str, tuple[int, Callable[[int], np.ndarray]]] = {
    "ternary, half zeros": (2, lambda n: ternary(n, 0.5, n)),
    "ternary": (2, lambda n: ternary(n, 0.8, n)),
    "nearly all zeros": (3, lambda n: ternary(n, 0.98, n)),
    "all zeros": (2, lambda n: np.zeros(n, dtype=np.int8)),
    "7 levels": (3, lambda n: gaussian(n, 1.5, 3, n)),
    "15 levels": (4, lambda n: gaussian(n, 1.0, 7, n)),
    "many levels": (8, lambda n: gaussian(n, 0.12, 127, n)),
}


@pytest.mark.parametrize("case", DRAWN)
def test_onnxruntime_decodes_and_folds(case: str, tmp_path: Path) -> None:
    bits, draw = DRAWN[case]
    graph = with_codes(network(bits), draw)
    exported = to_onnx(graph)
    assert [w.encoding for w in exported.weights].count("words") >= 2
    assert onnx.checker.check_model(onnx.load_from_string(exported.data), full_check=True) is None
    q = graph.tensors["input"].quant
    assert q is not None
    x = quantmath.quantize(images(graph, 3), q)
    want = reference.run(graph, {"input": x})[graph.outputs[0]]
    for optimize in (True, False):
        (got,) = onnx_run(exported.data, {"input": x}, optimize=optimize).values()
        assert np.array_equal(got, want)
    found = optimized(exported.data)
    assert found.widened == ()
    # The convolutions may run in another layout, behind a Transpose; nothing of the decoding is left.
    known = {"QLinearConv", "QGemm", "QuantizeLinear", "DequantizeLinear", "Flatten", "Reshape", "Transpose"}
    assert set(found.operators) <= known
    assert (found.operators["QLinearConv"], found.operators["QGemm"]) == (2, 1)
    # What is counted is what stands in the file.
    proto = onnx.load_from_string(exported.data)
    sizes = {t.name: len(t.raw_data) for t in proto.graph.initializer}
    for weight, node in zip(exported.weights, graph.layers(), strict=True):
        parts = [n for name, n in sizes.items() if name.startswith(f"{node.name}.weight")]
        assert sum(parts) == weight.stored_bytes
    path = tmp_path / "model.onnx"
    path.write_bytes(exported.data)
    found = {w["name"]: w for w in describe(path)["weights"]}  # type: ignore[attr-defined]
    for weight, node in zip(exported.weights, graph.layers(), strict=True):
        row = found[node.name]
        assert (row["shape"], row["stored_bytes"]) == (list(graph.weight(node).shape), weight.stored_bytes)
        assert row.get("encoding", "dense") == weight.encoding
        codes = graph.weight(node).data
        assert codes is not None
        needed = max(2, int(np.abs(codes).max()).bit_length() + 1)
        assert row["bits"] == (bits if weight.encoding == "dense" else needed)


def test_decoded_codes_are_the_codes() -> None:
    """The runtime shows the decoded tensor itself, for every width of a number that small tensors choose."""
    seen = set()
    for n, bits, codes in ((9_000, 2, ternary(9_000, 0.8)), (90_000, 4, gaussian(90_000, 1.0, 7)),
                           (400_000, 3, gaussian(400_000, 1.5, 3))):  # fmt: skip
        b = Build(0, (n // 10,))
        graph = b.graph(b.linear("fc", "input", 10))
        graph = with_codes(compress(graph, plan_for(graph, bits, io=Io.INT8)), lambda _, codes=codes: codes)
        words = encode(codes, bits).words
        assert words is not None
        seen.add(words.word_bits)
        proto = onnx.load_from_string(to_onnx(graph).data)
        del proto.graph.output[:]
        proto.graph.output.append(onnx.helper.make_tensor_value_info("fc.weight", onnx.TensorProto.INT8, (10, n // 10)))
        x = np.zeros((1, n // 10), dtype=np.int8)
        got = onnx_run(proto.SerializeToString(), {"input": x}, optimize=False)["fc.weight"]
        assert np.array_equal(got.reshape(-1), codes)
    assert seen == {6, 8, 10}
    assert seen < set(WORD_BITS)


def test_a_file_is_never_larger_than_with_dense_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgecomp.exporters import to_onnx as module

    sizes = {}
    for out in (4, 40, 400, 4000):
        b = Build(0, (100,))
        graph = b.graph(b.linear("fc", "input", out))
        graph = with_codes(compress(graph, plan_for(graph, 3)), lambda n: gaussian(n, 1.5, 3))
        got = to_onnx(graph)
        with monkeypatch.context() as patched:
            patched.setattr(module, "encode", dense)
            plain = to_onnx(graph)
        assert {w.encoding for w in plain.weights} == {"dense"}
        assert len(got.data) <= len(plain.data)
        assert (got.data == plain.data) == (got.weights[0].encoding == "dense")
        sizes[out] = got.weights[0].encoding
    assert sizes == {4: "dense", 40: "dense", 400: "words", 4000: "words"}


def test_a_layer_in_words_costs_little_structure() -> None:
    """The functions stand in the file once; the second layer costs not more than `encode` reckons with."""
    sizes = []
    for layers in (1, 2):
        b = Build(0, (300,))
        x = "input"
        for i in range(layers):
            x = b.linear(f"fc{i}", x, 300, bias=False)
        graph = b.graph(x)
        exported = to_onnx(with_codes(compress(graph, plan_for(graph, 2)), lambda n: ternary(n, 0.7, n)))
        sizes.append(len(exported.data) - sum(w.stored_bytes for w in exported.weights))
        assert {w.encoding for w in exported.weights} == {"words"}
    # Scales 4 and zero points 1 a channel; QuantizeLinear and so on of a dense layer take some 300 bytes.
    assert sizes[1] - sizes[0] < 5 * 300 + 300 + 500
