"""Networks of signals (N, C, T), as for spotting keywords: captured as images of one row, through all other rooms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgecomp import reference
from edgecomp.compress import compress
from edgecomp.errors import CaptureError
from edgecomp.exporters import export
from edgecomp.graph import Graph, Op
from edgecomp.plan import Io
from edgecomp.pytorch.capture import capture
from edgecomp.pytorch.relevance import score
from edgecomp.pytorch.rules import parse_composite
from tests.graphs import images, plan_for
from tests.soak_graphs import check_cut, check_quantized
from tests.test_capture import Function, assert_legal, ops_of, randomised
from tests.test_compress import random_keep
from tests.zoo import KeywordSpotter, SeparableKeywordSpotter

C, T = 4, 21
CONV, CLIP, MAX, AVG, MEAN, FLAT = Op.CONV2D, Op.CLIP, Op.MAX_POOL, Op.AVG_POOL, Op.GLOBAL_AVG_POOL, Op.FLATTEN


def assert_same(graph: Graph, module: nn.Module, shape: tuple[int, ...], n: int = 3) -> None:
    """The graph, given signals as images of one row, computes in float64 what torch does."""
    x = torch.randn(n, *shape, dtype=torch.float64)
    rows = x.reshape(n, *graph.tensors[graph.inputs[0]].shape[1:])
    got = reference.run(graph, {graph.inputs[0]: rows.numpy()})[graph.outputs[0]]
    with torch.no_grad():
        want = module.double()(x.clone())
    module.float()
    np.testing.assert_allclose(got.reshape(want.shape), want.numpy(), rtol=0, atol=2e-6 * float(want.abs().max()))


CASES = {
    "conv": (nn.Conv1d(C, 6, 3), [CONV]),
    "conv stride padding": (nn.Conv1d(C, 6, 4, stride=3, padding=2), [CONV]),
    "conv dilated": (nn.Conv1d(C, 6, 3, dilation=4, padding=4, bias=False), [CONV]),
    "conv same": (nn.Conv1d(C, 6, 4, padding="same", dilation=2), [CONV]),
    "conv depthwise": (nn.Conv1d(C, 2 * C, 5, groups=C, padding=2), [CONV]),
    "conv grouped": (nn.Conv1d(C, 6, 5, groups=2), [CONV]),
    "conv causal": (
        Function(lambda m, x: m.conv(F.pad(x, (4, 0))), conv=nn.Conv1d(C, 6, 3, dilation=2)),
        [CONV],
    ),
    "bn after conv": (nn.Sequential(nn.Conv1d(C, 6, 3), nn.BatchNorm1d(6), nn.ReLU()), [CONV, CLIP]),
    "bn alone": (nn.BatchNorm1d(C), [CONV]),
    "max pool": (nn.MaxPool1d(2), [MAX]),
    "max pool padded": (nn.MaxPool1d(3, 2, padding=1, ceil_mode=True), [MAX]),
    "max pool ceil": (nn.MaxPool1d(4, 4, ceil_mode=True), [MAX]),
    "avg pool": (nn.AvgPool1d(3, 2), [AVG]),
    "avg pool padded": (nn.AvgPool1d(4, 2, padding=2), [AVG]),
    "avg pool exclude": (nn.AvgPool1d(4, 4, padding=1, ceil_mode=True, count_include_pad=False), [AVG]),
    "adaptive avg one": (nn.AdaptiveAvgPool1d(1), [MEAN]),
    "adaptive avg divides": (nn.AdaptiveAvgPool1d(7), [AVG]),
    "adaptive max": (nn.AdaptiveMaxPool1d(3), [MAX]),
    "mean over time": (Function(lambda m, x: m.fc(x.mean(-1)), fc=nn.Linear(C, 3)), [MEAN, FLAT, Op.LINEAR]),
    "mean keepdim": (Function(lambda m, x: x * x.mean(2, keepdim=True)), [MEAN, Op.MUL]),
    "gate expanded": (Function(lambda m, x: x * x.mean(2, keepdim=True).sigmoid().expand_as(x)),
                      [MEAN, Op.SIGMOID, Op.MUL]),
    "residual": (Function(lambda m, x: F.relu(m.conv(x) + x), conv=nn.Conv1d(C, C, 3, padding=1)),
                 [CONV, Op.ADD, CLIP]),
    "cat": (Function(lambda m, x: torch.cat([m.conv(x), x], 1), conv=nn.Conv1d(C, 3, 1)), [CONV, Op.CONCAT]),
    "chunk": (Function(lambda m, x: torch.cat(x.split([1, 3], 1)[::-1], 1)), [Op.GATHER, Op.GATHER, Op.CONCAT]),
    "channel shuffle": (Function(lambda m, x: F.channel_shuffle(x, 2)), [Op.GATHER]),
    "shuffle by views": (
        Function(lambda m, x: x.view(-1, 2, 2, T).transpose(1, 2).reshape(-1, C, T)), [Op.GATHER]
    ),
    "shuffle of unflattened channels": (
        Function(lambda m, x: x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)), [Op.GATHER]
    ),
    "shuffle of a row": (
        Function(lambda m, x: x.view(-1, 2, 2, 1, T).transpose(1, 2).reshape(-1, C, T)), [Op.GATHER]
    ),
    "softmax over time": (nn.Softmax(dim=-1), [Op.SOFTMAX]),
    "softmax over channels": (nn.Softmax(dim=1), [Op.SOFTMAX]),
    "flatten": (nn.Sequential(nn.Flatten(), nn.Linear(C * T, 3)), [FLAT, Op.LINEAR]),
    "one row of an image": (
        Function(lambda m, x: m.image(m.signal(x).unsqueeze(2)).squeeze(2),
                 signal=nn.Conv1d(C, 5, 3), image=nn.Conv2d(5, 2, (1, 3))),
        [CONV, CONV],
    ),
    "rows made columns": (Function(lambda m, x: m.conv(x.reshape(-1, 2, 2 * T)), conv=nn.Conv1d(2, 3, 3)),
                          [Op.RESHAPE, CONV]),
    "bn after an alias of the convolution": (
        Function(lambda m, x: (lambda y: (lambda z: m.bn(y) + z.relu().squeeze(2))(y.unsqueeze(2)))(m.conv(x)),
                 conv=nn.Conv1d(C, 6, 3), bn=nn.BatchNorm1d(6)),
        [CONV, CONV, CLIP, Op.ADD],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.replace(" ", "-") for case in CASES])
def test_operator(case: str) -> None:
    torch.manual_seed(len(case))
    module, expected = CASES[case]
    graph = capture(randomised(module), (C, T), name=case)
    assert sorted(ops_of(graph)) == sorted(expected)
    assert graph.tensors[graph.inputs[0]].shape == (1, C, 1, T)
    assert_legal(graph)
    assert_same(graph, module, (C, T))


NETWORKS = {"plain": KeywordSpotter, "separable": SeparableKeywordSpotter}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Graph]:
    torch.manual_seed(1)
    module = randomised(NETWORKS[request.param](n_bands=8, width=12))
    return module, capture(module, (8, 33), name=request.param)


def test_captured(network: tuple[nn.Module, Graph]) -> None:
    module, graph = network
    assert_legal(graph)
    assert_same(graph, module, (8, 33))
    names = dict(module.named_modules())
    assert all(layer.name in names for layer in graph.layers())
    assert {graph.weight(layer).shape[2] for layer in graph.layers() if layer.op is CONV} == {1}


def test_data_of_one_row_are_signals(network: tuple[nn.Module, Graph]) -> None:
    """The shape (C, H, W) that images of one row have; and an exported program of signals."""
    module, graph = network
    assert capture(module, (8, 1, 33), name="net").digest() == graph.digest()
    program = torch.export.export(module, (torch.zeros(1, 8, 33),))
    for shape in ((8, 33), (8, 1, 33)):
        assert capture(program, shape, name="net").digest() == graph.digest()
    with pytest.raises(CaptureError, match=r"does not run on one image of C,H,W = 8,2,33 "):
        capture(module, (8, 2, 33), name="net")
    with pytest.raises(CaptureError, match=r"does not run on one signal of C,T = 9,33 "):
        capture(module, (9, 1, 33), name="net")
    with pytest.raises(CaptureError, match=r"does not run on one signal of C,T = 9,33 "):
        capture(module, (9, 33), name="net")


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_a_decomposed_program_gives_the_same(network: tuple[nn.Module, Graph]) -> None:
    module, graph = network
    program = torch.export.export(module, (torch.zeros(1, 8, 33),)).run_decompositions()
    again = capture(program, (8, 33), name="net")
    assert ops_of(again) == ops_of(graph)
    assert_same(again, module, (8, 33))


@pytest.mark.parametrize("bits", [8, 4])
def test_compressed_and_run(network: tuple[nn.Module, Graph], bits: int) -> None:
    """Whole files and every tensor in onnxruntime, XNNPACK and LiteRT's reference kernels; the input stays one row."""
    _, graph = network
    quantized = compress(graph, plan_for(graph, bits, io=Io.INT8))
    check_quantized(quantized, images(graph, 2))
    keep = random_keep(graph, np.random.default_rng(3), 0.4)
    check_cut(graph, keep, images(graph, 2))
    assert len(export(quantized, "tflite-packed").data) > 0


def test_explained(network: tuple[nn.Module, Graph]) -> None:
    _, graph = network
    composite = parse_composite("epsilon:1e-12")
    found = score(graph, [(images(graph, 4), np.arange(4))], composite=composite, dtype=torch.float64)
    assert found.conservation.keys() == {node.name for node in graph.layers()}
    assert max(found.conservation.values()) < 1e-6


def test_what_is_wrong_with_a_network_of_signals_is_said_of_signals() -> None:
    with pytest.raises(CaptureError, match="Kernel size can't be greater than actual input size"):
        capture(nn.Conv1d(C, 2, T + 1), (C, 1, T), name="net")
    # A network of images is still told of images.
    with pytest.raises(CaptureError, match="expected input"):
        capture(nn.Conv2d(C + 1, 2, 1), (C, 1, T), name="net")
