"""A graph run by torch: parity with the reference interpreter for every float operator, refusals, accuracy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from edgecomp import reference
from edgecomp.compress import compress
from edgecomp.data import LabelledImages
from edgecomp.errors import DataError, GraphError
from edgecomp.graph import Graph, Op
from edgecomp.preprocessing import Preprocessing
from edgecomp.pytorch.network import Network, accuracy, batch_size, predict
from tests.graphs import GRAPHS, Build, images, plan_for


def conv_oddly() -> Graph:
    b = Build(3, (4, 9, 7))
    x = b.conv("a", "input", 6, (3, 2), stride=(2, 1), pads=(1, 0, 2, 3), dilation=(1, 2), groups=2)
    return b.graph(b.conv("b", x, 12, (1, 3), pads=(0, 1, 0, 1), groups=6, bias=False))


def depthwise() -> Graph:
    b = Build(4, (5, 6, 6))
    return b.graph(b.conv("a", "input", 10, (3, 3), pads=(0, 1, 1, 0), groups=5))


def max_pools() -> Graph:
    b = Build(5, (2, 9, 8))
    x = b.max_pool("a", "input", (3, 2), stride=(2, 1), pads=(2, 0, 1, 1))
    return b.graph(b.max_pool("b", x, (2, 2), stride=(1, 2), dilation=(2, 3)))


def avg_pools() -> Graph:
    b = Build(6, (2, 9, 8))
    x = b.avg_pool("a", "input", (3, 2), stride=(2, 1), pads=(2, 0, 1, 1), include_pad=0)
    x = b.avg_pool("b", x, (2, 2), stride=(1, 2), pads=(0, 1, 1, 0), include_pad=1)
    return b.graph(b.avg_pool("c", x, (2, 2), stride=(1, 1), include_pad=0))


def shapes() -> Graph:
    b = Build(7, (4, 2, 6))
    x = b.node(Op.SOFTMAX, "soft", (b.clip("hard", "input", -0.5, 0.75),), {"axis": 2})
    x = b.node(Op.RESHAPE, "reshape", (x,), {"shape": (1, 3, 4, 4)})
    x = b.node(Op.CONCAT, "cat", (x, x, b.node(Op.ADD, "twice", (x, x), {})), {"axis": 3})
    return b.graph(b.node(Op.FLATTEN, "flat", (b.node(Op.GLOBAL_AVG_POOL, "mean", (x,), {}),), {}))


CASES: dict[str, Callable[[], Graph]] = {
    **GRAPHS,
    "conv oddly": conv_oddly,
    "depthwise": depthwise,
    "max pools": max_pools,
    "avg pools": avg_pools,
    "shapes": shapes,
}


@pytest.mark.parametrize("name", CASES)
def test_every_activation_is_that_of_the_reference(name: str) -> None:
    graph = CASES[name]()
    x = images(graph, 3).astype(np.float64)
    expected = reference.run(graph, {"input": x})
    values = Network(graph, dtype=torch.float64).run(torch.from_numpy(x))
    assert values.keys() == expected.keys()
    for tensor, value in values.items():
        assert value.dtype == torch.float64
        np.testing.assert_allclose(value.numpy(), expected[tensor], rtol=1e-9, atol=1e-12, err_msg=tensor)


def test_the_cases_hold_every_float_operator() -> None:
    seen = {node.op for case in CASES.values() for node in case().nodes}
    assert seen == set(Op) - {Op.QUANTIZE, Op.DEQUANTIZE}


def test_float32_is_the_default_and_close() -> None:
    graph = GRAPHS["branches"]()
    x = images(graph, 4)
    out = Network(graph)(torch.from_numpy(x))
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), reference.run(graph, {"input": x})["fc"], rtol=1e-4, atol=1e-5)


def test_forward_gives_the_outputs_in_the_graphs_order() -> None:
    graph = GRAPHS["plain"]()
    both = Graph(name="two", nodes=graph.nodes, tensors=graph.tensors, inputs=graph.inputs, outputs=("fc2", "relu1"))
    x = images(graph, 2)
    first, second = Network(both)(torch.from_numpy(x))
    values = Network(graph).run(torch.from_numpy(x))
    assert torch.equal(first, values["fc2"])
    assert torch.equal(second, values["relu1"])
    with pytest.raises(GraphError, match="2 outputs, a classifier has one"):
        predict(both, labelled(both, 1), Preprocessing(mean=(0.0,), std=(1.0,)))


def test_a_quantized_graph_is_refused() -> None:
    graph = GRAPHS["plain"]()
    with pytest.raises(GraphError, match="expected a float graph"):
        Network(compress(graph, plan_for(graph)))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 3, 8, 7), torch.float32),
        ((2, 3, 8, 8), torch.float64),
        ((3, 8, 8), torch.float32),
        ((0, 3, 8, 8), torch.float32),
    ],
)
def test_an_input_that_does_not_fit_is_refused(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with pytest.raises(DataError, match=r"the model takes torch.float32 \(N, 3, 8, 8\)"):
        Network(GRAPHS["plain"]())(torch.zeros(shape, dtype=dtype))


def labelled(graph: Graph, n: int) -> LabelledImages:
    rng = np.random.default_rng(8)
    pixels = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return LabelledImages(images=pixels, labels=rng.integers(0, 10, n))


def test_as_many_images_at_once_as_memory_bears() -> None:
    graph = GRAPHS["plain"]()
    values = sum(int(np.prod(t.shape)) for t in graph.tensors.values() if t.data is None)
    assert batch_size(graph, most=64) == 64
    most = (1 << 27) // values
    assert batch_size(graph, most=10**9) == most
    assert 4 * most * values <= 512 * 2**20 < 4 * (most + 1) * values
    huge = Build(0, (1, 1 << 14, 1 << 14))
    assert batch_size(huge.graph(huge.clip("relu", "input", 0, 6)), most=64) == 1


def test_accuracy_counts_what_the_reference_classifies_rightly() -> None:
    graph = GRAPHS["residual"]()
    preprocessing = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    split = labelled(graph, 37)
    scores = reference.run(graph, {"input": split.inputs(preprocessing)})["fc"]
    expected = scores.argmax(axis=1)
    seen: list[int] = []
    np.testing.assert_array_equal(predict(graph, split, preprocessing, batch=10, progress=seen.append), expected)
    assert seen == [10, 10, 10, 7]
    right = LabelledImages(images=split.images, labels=np.where(np.arange(37) < 9, expected, (expected + 1) % 10))
    assert accuracy(graph, right, preprocessing, batch=16) == pytest.approx(100 * 9 / 37)
