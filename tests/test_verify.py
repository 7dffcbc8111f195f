"""Each rule of a legal graph has a case that breaks it, and the message says where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from edgecomp.compress import compress
from edgecomp.errors import GraphError
from edgecomp.graph import Graph, Node, Op, QuantParams, Tensor
from edgecomp.plan import Io
from edgecomp.verify import verify_float, verify_quantized
from tests.graphs import GRAPHS, plan_for


def with_tensor(graph: Graph, name: str, /, **changes: object) -> Graph:
    return replace(graph, tensors={**graph.tensors, name: replace(graph.tensors[name], **changes)})  # type: ignore[arg-type]


def with_quant(graph: Graph, name: str, /, **changes: object) -> Graph:
    quant = graph.tensors[name].quant
    assert quant is not None
    return with_tensor(graph, name, quant=replace(quant, **changes))  # type: ignore[arg-type]


def with_node(graph: Graph, name: str, /, **changes: object) -> Graph:
    nodes = tuple(replace(n, **changes) if n.name == name else n for n in graph.nodes)  # type: ignore[arg-type]
    return replace(graph, nodes=nodes)


def node(graph: Graph, name: str) -> Node:
    return next(n for n in graph.nodes if n.name == name)


def without_attribute(graph: Graph, name: str, attribute: str) -> Graph:
    attrs = {k: v for k, v in node(graph, name).attrs.items() if k != attribute}
    return with_node(graph, name, attrs=attrs)


def with_attribute(graph: Graph, name: str, attribute: str, value: object) -> Graph:
    return with_node(graph, name, attrs={**node(graph, name).attrs, attribute: value})


def with_code(graph: Graph, name: str, code: int) -> Graph:
    data = np.array(graph.tensors[name].data)
    data.flat[3] = code
    return with_tensor(graph, name, data=data)


def data_of(graph: Graph, name: str) -> np.ndarray:
    data = graph.tensors[name].data
    assert data is not None
    return data


FLOAT = GRAPHS["residual"]()
INTEGER = compress(FLOAT, plan_for(FLOAT, 4, io=Io.INT8))
BORDERED = compress(FLOAT, plan_for(FLOAT, 4))
BRANCHES = compress(GRAPHS["branches"](), plan_for(GRAPHS["branches"](), 4, io=Io.INT8))
NAN = np.full(FLOAT.tensors["stem.bias"].shape, np.nan, dtype=np.float32)

STRUCTURE: dict[str, tuple[Callable[[Graph], Graph], str]] = {
    "tensor under another name": (
        lambda g: with_tensor(g, "relu", name="other"),
        "tensor 'other': is filed under the name 'relu'",
    ),
    "output is no tensor": (lambda g: replace(g, outputs=("nowhere",)), "input or output 'nowhere' is not a tensor"),
    "input is no tensor": (lambda g: replace(g, inputs=("nowhere",)), "input or output 'nowhere' is not a tensor"),
    "no input": (lambda g: replace(g, inputs=()), "at least one input and one output"),
    "no output": (lambda g: replace(g, outputs=()), "at least one input and one output"),
    "a name twice": (lambda g: with_node(g, "fc", name="stem"), "node 'stem': the name stands twice"),
    "too few inputs": (
        lambda g: with_node(g, "block.add", inputs=node(g, "block.add").inputs[:1]),
        r"node 'block.add': add takes \(2, 2\) inputs",
    ),
    "too many inputs": (
        lambda g: with_node(g, "flatten", inputs=("pool", "pool")),
        r"node 'flatten': flatten takes \(1, 1\) inputs",
    ),
    "two outputs": (lambda g: with_node(g, "flatten", outputs=("flatten", "x")), "node 'flatten': .* gives 1 output"),
    "attribute missing": (
        lambda g: without_attribute(g, "stem", "stride"),
        "node 'stem': attributes .*expected .*'stride'",
    ),
    "attribute unknown": (lambda g: with_attribute(g, "fc", "alpha", 1), "node 'fc': attributes .*'alpha'"),
    "reads what is not written yet": (
        lambda g: replace(g, nodes=g.nodes[1:] + g.nodes[:1]),
        "node '.*': reads '.*', which nothing before it writes",
    ),
    "reads what does not exist": (
        lambda g: with_node(g, "pool", inputs=("nowhere",)),
        "node 'pool': reads 'nowhere', which nothing before it writes",
    ),
    "writes an unknown tensor": (
        lambda g: with_node(g, "flatten", outputs=("nowhere",)),
        "node 'flatten': writes 'nowhere', which is unknown or written already",
    ),
    "writes a tensor twice": (
        lambda g: with_node(g, "flatten", outputs=("pool",)),
        "node 'flatten': writes 'pool', which is unknown or written already",
    ),
    "writes a weight": (
        lambda g: with_node(g, "flatten", outputs=("fc.weight",)),
        "node 'flatten': writes 'fc.weight', which is unknown or written already",
    ),
    "another shape": (
        lambda g: with_tensor(g, "flatten", shape=(1, 11)),
        r"node 'flatten': gives shape \(1, 12\), its tensor says \(1, 11\)",
    ),
    "shapes that do not fit": (
        lambda g: with_tensor(g, "stem.weight", data=data_of(g, "stem.weight")[:, :2], shape=(8, 2, 3, 3)),
        "node 'stem': conv2d: input .* do not fit together",
    ),
    "a tensor nobody writes": (
        lambda g: replace(g, tensors={**g.tensors, "idle": Tensor(name="idle", shape=(1, 2))}),
        "nothing writes tensor 'idle'",
    ),
}

FLOAT_ONLY: dict[str, tuple[Callable[[Graph], Graph], str]] = {
    "quantized tensor": (
        lambda g: with_tensor(g, "relu", quant=INTEGER.tensors["relu"].quant),
        "tensor 'relu': is quantized, expected a float graph",
    ),
    "float64 weight": (
        lambda g: with_tensor(g, "fc.weight", data=data_of(g, "fc.weight").astype(np.float64)),
        "tensor 'fc.weight': is float64, expected float32",
    ),
    "NaN": (lambda g: with_tensor(g, "stem.bias", data=NAN), "tensor 'stem.bias': holds NaN or infinity"),
    "infinity": (
        lambda g: with_tensor(g, "stem.bias", data=np.full_like(NAN, np.inf)),
        "tensor 'stem.bias': holds NaN or infinity",
    ),
    "clamp": (
        lambda g: with_attribute(g, "stem", "clamp", (-128, 127)),
        "node 'stem': belongs to a quantized graph, expected a float graph",
    ),
    "quantize": (
        lambda g: with_node(g, "end.relu", op=Op.QUANTIZE, attrs={}),
        "node 'end.relu': belongs to a quantized graph, expected a float graph",
    ),
}
QUANTIZED: dict[str, tuple[Graph, Callable[[Graph], Graph], str]] = {
    "float weight": (
        INTEGER,
        lambda g: with_tensor(g, "fc.weight", data=data_of(FLOAT, "fc.weight"), quant=None),
        "tensor 'fc.weight': float weights, expected codes",
    ),
    "scale of zero": (
        INTEGER,
        lambda g: with_quant(g, "relu", scale=np.array(0)),
        "tensor 'relu': scales must be positive and finite",
    ),
    "negative weight scale": (
        INTEGER,
        lambda g: with_quant(g, "fc.weight", scale=-np.ones(10)),
        "tensor 'fc.weight': scales must be positive and finite",
    ),
    "infinite scale": (
        INTEGER,
        lambda g: with_quant(g, "relu", scale=np.array(np.inf)),
        "tensor 'relu': scales must be positive and finite",
    ),
    "activation of 4 bits": (INTEGER, lambda g: with_quant(g, "relu", bits=4), "tensor 'relu': expected 8 bits"),
    "activation with a scale a channel": (
        INTEGER,
        lambda g: with_quant(g, "relu", scale=np.ones(8)),
        "tensor 'relu': expected 8 bits, one scale",
    ),
    "activation with a zero point a channel": (
        INTEGER,
        lambda g: with_quant(g, "relu", zero_point=np.zeros(8)),
        "tensor 'relu': expected 8 bits, one scale and one zero point",
    ),
    "zero point of 128": (
        INTEGER,
        lambda g: with_quant(g, "relu", zero_point=np.array(128)),
        r"tensor 'relu': zero point 128, expected within -128\.\.127",
    ),
    "zero point of -129": (
        INTEGER,
        lambda g: with_quant(g, "relu", zero_point=np.array(-129)),
        "tensor 'relu': zero point -129",
    ),
    "quantize of codes": (
        BORDERED,
        lambda g: with_tensor(g, "input", quant=g.tensors["input.quantized"].quant),
        "node 'input.quantized': quantize must stand between a float and an integer tensor",
    ),
    "dequantize to codes": (
        BORDERED,
        lambda g: with_tensor(g, "fc.dequantized", quant=g.tensors["fc"].quant),
        "node 'fc.dequantized': dequantize must stand between",
    ),
    "float inside": (
        INTEGER,
        lambda g: with_tensor(g, "pool", quant=None),
        "node 'pool': global_avg_pool reads or writes a float tensor inside the quantized part",
    ),
    **{
        f"no clamp: {name}": (
            graph,
            lambda g, name=name: without_attribute(g, name, "clamp"),  # type: ignore[misc]
            f"node '{name}': attribute 'clamp' is missing",
        )
        for name, graph in (("stem", INTEGER), ("fc", INTEGER), ("block.add", INTEGER), ("cat.relu", BRANCHES))
    },
    "clamp reversed": (
        INTEGER,
        lambda g: with_attribute(g, "stem", "clamp", (3, 2)),
        r"node 'stem': clamp 3\.\.2, expected within -128\.\.127",
    ),
    "clamp too wide": (
        INTEGER,
        lambda g: with_attribute(g, "stem", "clamp", (-128, 128)),
        r"node 'stem': clamp -128\.\.128",
    ),
    **{
        f"other scale: {tensor}": (
            graph,
            lambda g, tensor=tensor: with_quant(g, tensor, scale=np.array(0.125)),  # type: ignore[misc]
            f"node '{name}': .* must have one scale and zero point on all sides",
        )
        for name, tensor, graph in (
            ("flatten", "flatten", INTEGER),
            ("c", "c", BRANCHES),
            ("cat", "b", BRANCHES),
            ("pool", "pool", BRANCHES),
        )
    },
    "other zero point": (
        BRANCHES,
        lambda g: with_quant(g, "cat.relu", zero_point=np.array(1)),
        "node 'cat.relu': clip must have one scale and zero point",
    ),
    "weights of 1 bit": (
        INTEGER,
        lambda g: with_quant(g, "fc.weight", bits=1),
        "layer 'fc': expected int8-held weight codes of 2-8 bits",
    ),
    "weights held as int32": (
        INTEGER,
        lambda g: with_tensor(g, "fc.weight", data=data_of(g, "fc.weight").astype(np.int32)),
        "layer 'fc': expected int8-held weight codes",
    ),
    "code above its bits": (INTEGER, lambda g: with_code(g, "fc.weight", 8), "layer 'fc': a weight code is beyond ±7"),
    "code below its bits": (INTEGER, lambda g: with_code(g, "fc.weight", -8), "layer 'fc': a weight code is beyond ±7"),
    "one scale for a layer": (
        INTEGER,
        lambda g: with_quant(g, "fc.weight", scale=np.array(1.0)),
        "layer 'fc': expected one scale an output channel",
    ),
    "scales along the inputs": (
        INTEGER,
        lambda g: with_quant(g, "fc.weight", axis=1),
        "layer 'fc': expected one scale an output channel",
    ),
    "weight zero point": (
        INTEGER,
        lambda g: with_quant(g, "fc.weight", zero_point=np.ones(10)),
        "layer 'fc': .* no zero point",
    ),
    "bias of int8": (
        INTEGER,
        lambda g: with_tensor(g, "fc.bias", data=np.zeros(10, dtype=np.int8)),
        "layer 'fc': expected an int32 bias",
    ),
    "bias of another scale": (
        INTEGER,
        lambda g: with_quant(g, "fc.bias", scale=np.nextafter(g.tensors["fc.bias"].quant.scale, np.float32(9))),  # type: ignore[union-attr]
        "layer 'fc': bias scale differs from input scale x weight scale",
    ),
}


def refused(verify: Callable[[Graph], None], graph: Graph, message: str) -> None:
    with pytest.raises(GraphError, match=message) as e:
        verify(graph)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", GRAPHS)
def test_legal_graphs_pass(name: str) -> None:
    graph = GRAPHS[name]()
    assert verify_float(graph) is None  # type: ignore[func-returns-value]
    for io in Io:
        assert verify_quantized(compress(graph, plan_for(graph, 3, io=io))) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize("case", STRUCTURE)
def test_structure(case: str) -> None:
    change, message = STRUCTURE[case]
    refused(verify_float, change(FLOAT), message)
    refused(verify_quantized, change(INTEGER), message)


@pytest.mark.parametrize("case", FLOAT_ONLY)
def test_float(case: str) -> None:
    change, message = FLOAT_ONLY[case]
    refused(verify_float, change(FLOAT), message)


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized(case: str) -> None:
    graph, change, message = QUANTIZED[case]
    refused(verify_quantized, change(graph), message)


def test_each_stage_refuses_the_other() -> None:
    refused(verify_float, INTEGER, "is quantized, expected a float graph")
    refused(verify_quantized, FLOAT, "float weights, expected codes")


def test_bordered_softmax_may_be_float_on_both_sides_only() -> None:
    graph = GRAPHS["separable"]()
    quantized = compress(graph, plan_for(graph, 4))
    probabilities = QuantParams(bits=8, scale=np.array(1 / 256), zero_point=np.array(-128))
    half = with_tensor(quantized, "softmax", quant=probabilities)
    refused(verify_quantized, half, "node 'softmax': softmax reads or writes a float tensor")
