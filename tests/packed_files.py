"""Packed files for tests: dense and in words, in several widths, beside the same in int8 and native."""

from __future__ import annotations

from functools import cache

from edgecomp.artifact import AtRest, Exported
from edgecomp.coding import encode
from edgecomp.compress import compress
from edgecomp.exporters.to_onnx import _written
from edgecomp.exporters.to_tflite import to_tflite
from edgecomp.graph import Graph, Op
from edgecomp.plan import Io
from tests.graphs import GRAPHS, Build, plan_for


def wide(seed: int = 0) -> Graph:
    """Layers large enough for words, and one that no packing makes smaller."""
    b = Build(seed, (8, 6, 6))
    x = b.clip("relu1", b.conv("conv1", "input", 40))
    x = b.clip("relu2", b.conv("conv2", b.max_pool("pool", x), 48))
    x = b.node(Op.FLATTEN, "flatten", (b.node(Op.GLOBAL_AVG_POOL, "mean", (x,), {}),), {})
    return b.graph(b.linear("fc", x, 2), "wide")


NETWORKS = {**GRAPHS, "wide": wide}


@cache
def quantized(name: str, bits: int, io: Io = Io.FLOAT) -> Graph:
    graph = NETWORKS[name]()
    return compress(graph, plan_for(graph, bits, io=io))


@cache
def exported(name: str, bits: int, at_rest: AtRest) -> Exported:
    return to_tflite(quantized(name, bits), at_rest=at_rest)


def in_words(graph: Graph) -> bytes:
    """Store weights in an ONNX file in words wherever the coder finds that smaller, even if the file then is not."""
    codes = {}
    for node in graph.layers():
        weight = graph.weight(node)
        assert weight.data is not None
        assert weight.quant is not None
        codes[weight.name] = encode(weight.data, weight.quant.bits)
    data: bytes = _written(graph, codes, folds=True).data
    return data


def words_onnx() -> bytes:
    return in_words(quantized("wide", 2))
