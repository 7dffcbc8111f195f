"""Networks with gates as torchvision builds them, shortened: captured, cut, compressed, and run in stock runtimes."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from edgecomp.benchmarks.onnx_runtime import optimized
from edgecomp.benchmarks.runners import LiteRt
from edgecomp.compress import compress, cut
from edgecomp.curves import gate_codes
from edgecomp.exporters import export
from edgecomp.graph import Graph, Op
from edgecomp.plan import Io
from edgecomp.pytorch.capture import capture
from edgecomp.pytorch.relevance import score
from edgecomp.pytorch.rules import parse_composite
from edgecomp.pytorch.torchvision_ops import define_missing_operators
from tests.graphs import images, plan_for
from tests.soak_graphs import check_cut, check_quantized
from tests.test_capture import assert_legal, assert_same, randomised
from tests.test_compress import masked, output, random_keep

SIDE = 48


def mobilenet_v3() -> nn.Module:
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    def block(*settings: object) -> InvertedResidualConfig:
        return InvertedResidualConfig(*settings, 1, 1.0)

    blocks = [
        block(16, 3, 16, 16, True, "RE", 2),
        block(16, 5, 40, 24, True, "HS", 2),
        block(24, 5, 56, 24, True, "HS", 1),
    ]
    return MobileNetV3(blocks, last_channel=64, num_classes=10)


def efficientnet() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    blocks = [
        MBConvConfig(1, 3, 1, 24, 16, 1, 1.0, 1.0),
        MBConvConfig(4, 5, 2, 16, 16, 2, 1.0, 1.0),
    ]
    return EfficientNet(blocks, dropout=0.2, num_classes=10, last_channel=64)


def regnet_y() -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    params = BlockParams([1, 2], [16, 32], [8, 8], [1.0, 1.0], [2, 2], 0.25)
    return RegNet(params, num_classes=10)


NETWORKS = {"mobilenet_v3": mobilenet_v3, "efficientnet": efficientnet, "regnet_y": regnet_y}
GATES = {"mobilenet_v3": (Op.HARD_SIGMOID, 3), "efficientnet": (Op.SIGMOID, 3), "regnet_y": (Op.SIGMOID, 3)}
SWISHES = {"mobilenet_v3": Op.HARD_SWISH, "efficientnet": Op.SILU}


@cache
def case(name: str) -> tuple[nn.Module, Graph]:
    define_missing_operators()
    torch.manual_seed(11)
    module = randomised(NETWORKS[name]())
    return module, capture(module, (3, SIDE, SIDE), name=name)


@pytest.mark.parametrize("name", NETWORKS)
def test_captured(name: str) -> None:
    module, graph = case(name)
    assert_legal(graph)
    assert_same(graph, module, (3, SIDE, SIDE), n=2)
    gate, count = GATES[name]
    ops = [node.op for node in graph.nodes]
    assert ops.count(gate) == ops.count(Op.MUL) == count
    assert (SWISHES[name] in ops) if name in SWISHES else not {Op.SILU, Op.HARD_SWISH} & set(ops)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_compressed_and_run(name: str, bits: int) -> None:
    """The files, and every tensor in them, in onnxruntime, XNNPACK and LiteRT's reference kernels."""
    _, graph = case(name)
    quantized = compress(graph, plan_for(graph, bits, io=Io.INT8))
    check_quantized(quantized, images(graph, 2))
    swishes = [n for n in quantized.nodes if n.op in (Op.SILU, Op.HARD_SWISH)]
    for node in swishes:
        source, target = (quantized.tensors[t].quant for t in (node.inputs[0], node.outputs[0]))
        assert source is not None
        assert target is not None
        assert gate_codes(node.op, source, target) is not None
    found = optimized(export(quantized, "onnx").data)
    assert found.widened == ()
    assert not found.in_float
    assert found.operators["QLinearMul"] == GATES[name][1] + len(swishes)
    left = LiteRt(export(quantized, "tflite").data).describe()["nodes_left_to_builtin_kernels"]
    assert isinstance(left, tuple)
    assert not [of_a_kind for of_a_kind in left if bits == 8 or "CONV_2D" not in of_a_kind]


@pytest.mark.parametrize("name", NETWORKS)
def test_cut(name: str) -> None:
    """Gates go with what they gate; the layers in between can be cut as well."""
    _, graph = case(name)
    keep = random_keep(graph, np.random.default_rng(2), 0.4)
    check_cut(graph, keep, images(graph, 2))
    smaller, x = cut(graph, keep), images(graph, 2).astype(np.float64)
    np.testing.assert_allclose(output(smaller, x), output(masked(graph, keep), x), rtol=0, atol=1e-9)
    n_cut = {n.name: smaller.weight(n).shape[0] < graph.weight(n).shape[0] for n in graph.layers()}
    inner = [name for name in n_cut if name.endswith(("fc1", "fc2"))]
    assert inner
    if name != "regnet_y":  # whose convolutions have groups
        assert sum(n_cut[name] for name in inner) > len(inner) / 2


@pytest.mark.parametrize("name", NETWORKS)
def test_explained(name: str) -> None:
    _, graph = case(name)
    composite = parse_composite("epsilon:1e-12")
    found = score(graph, [(images(graph, 4), np.arange(4))], composite=composite, dtype=torch.float64)
    assert found.conservation.keys() == {node.name for node in graph.layers()}
    assert max(found.conservation.values()) < 1e-6
    assert all(layer.output_cost.any() for layer in found.layers.values())
