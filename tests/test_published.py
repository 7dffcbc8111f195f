"""Networks written down by hand are those of their sources: torchvision's modules, and what their authors publish."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import pytest

from edgecomp.benchmarks.classifiers import V3_LARGE, V3_SMALL, mobilenet_v3, resnet18
from edgecomp.benchmarks.imagenet_nets import googlenet, squeezenet
from edgecomp.benchmarks.netshapes import Net
from edgecomp.benchmarks.published import NETWORKS
from edgecomp.work import Kind, Work, total_macs, work_of

TORCHVISION: Mapping[str, Callable[[], Net]] = {
    "alexnet": NETWORKS["alexnet", "224x224x3"],
    "densenet121": NETWORKS["densenet-121", "224x224x3"],
    "efficientnet_b0": NETWORKS["efficientnet_b0", "224x224x3"],
    "googlenet": lambda: googlenet(torchvision=True),
    "inception_v3": NETWORKS["inception-v3", "299x299x3"],
    "mnasnet1_0": NETWORKS["mnasnet", "224x224x3"],
    "mobilenet_v3_large": lambda: mobilenet_v3(V3_LARGE, 960, 1280),
    "mobilenet_v3_small": lambda: mobilenet_v3(V3_SMALL, 576, 1024),
    "resnet18": lambda: resnet18(first=False),
    "resnet50": NETWORKS["ResNet50", "224x224x3"],
    "shufflenet_v2_x0_5": NETWORKS["shufflenet_v2_x0_5", "224x224x3"],
    "shufflenet_v2_x1_0": NETWORKS["shufflenet_v2_x1_0", "224x224x3"],
    "shufflenet_v2_x1_5": NETWORKS["shufflenet_v2_x1_5", "224x224x3"],
    "shufflenet_v2_x2_0": NETWORKS["shufflenet_v2_x2_0", "224x224x3"],
    "squeezenet1_0": NETWORKS["squeezenet1_0", "224x224x3"],
    "squeezenet1_1": squeezenet,
}


def counted(layers: Iterable[Work]) -> Counter[tuple[int, int, int, int, int]]:
    """Count layers that ask for the same; kinds follow from these."""
    return Counter((w.macs, w.weights, w.inputs, w.outputs, w.summands) for w in layers)


def captured(name: str) -> tuple[Work, ...]:
    """Give the layers of torchvision's network as `edgecomp` captures them."""
    from edgecomp.intake import graph_of

    def silent(name: str, total: int) -> object:
        return contextlib.nullcontext(lambda n: None)

    shape = (3, 299, 299) if name == "inception_v3" else None
    return work_of(graph_of(f"torchvision:{name}", None, shape, silent))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TORCHVISION)
def test_written_networks_are_torchvisions_layer_by_layer(name: str) -> None:
    found, written = captured(name), TORCHVISION[name]().layers
    if name == "densenet121":  # its batch norms of what was joined are depthwise convolutions of 1x1 in a capture
        norms = [w for w in found if w.kind is Kind.DEPTHWISE]
        assert {w.summands for w in norms} == {1}
        assert Counter((w.inputs, w.outputs) for w in norms) <= Counter(
            (w.inputs, w.outputs) for w in written if w.kind is Kind.OTHER
        )
        found = tuple(w for w in found if w.kind is not Kind.DEPTHWISE)
    weighted = [w for w in found if w.weights]
    assert counted(weighted) == counted(w for w in written if w.weights)
    # In a capture of ShuffleNetV2, each half that a slice gives is an operator.
    if name != "densenet121" and "shufflenet" not in name:
        assert counted(found) == counted(written)


@pytest.mark.parametrize(("name", "weights"), [("resnet101", "ResNet101"), ("wide_resnet50_2", "Wide_ResNet50_2")])
def test_large_networks_have_the_sizes_that_torchvision_states(name: str, weights: str) -> None:
    from edgecomp.pytorch.torchvision_ops import define_missing_operators

    define_missing_operators()
    from torchvision import models

    meta = getattr(models, f"{weights}_Weights").IMAGENET1K_V1.meta
    layers = [w for w in NETWORKS[name, "224x224x3"]().layers if w.weights]
    # A batch norm has two parameters a channel, the last layer a bias.
    norms = sum(2 * w.weights // w.summands for w in layers[:-1])
    assert sum(w.weights for w in layers) + norms + 1000 == meta["num_params"]
    assert round(total_macs(layers) / 1e9, 3) == meta["_ops"]


def of(key: tuple[str, str]) -> list[Work]:
    return NETWORKS[key]().layers


def parameters(layers: Iterable[Work]) -> int:
    """Count weights and a bias for every channel."""
    return sum(w.weights + w.weights // w.summands for w in layers if w.weights)


# Multiply-adds and parameters in millions, as printed.
PUBLISHED: Mapping[tuple[str, str], tuple[float | None, float | None, str]] = {
    ("MobileNet v1 0.75", "224x224x3"): (325, 2.6, "arXiv:1704.04861, table 6"),
    ("MobileNet v1 0.50", "224x224x3"): (149, 1.3, "arXiv:1704.04861, table 6"),
    ("MobileNet v1 1.0", "128x128x3"): (186, 4.2, "arXiv:1704.04861, table 7"),
    ("mbv2-w0.35", "144x144x3"): (23.5, 0.75, "mit-han-lab/mcunet:README.md"),
    ("MobileNetV3_large_x1_0", "224x224x3"): (None, 5.47, "PaddlePaddle/PaddleClas, MobileNetV3_large_x1_0"),
    ("MobileNetV3_small_x1_0", "224x224x3"): (None, 2.94, "PaddlePaddle/PaddleClas, MobileNetV3_small_x1_0"),
}


@pytest.mark.parametrize("key", PUBLISHED, ids=str)
def test_networks_have_the_sizes_that_their_authors_print(key: tuple[str, str]) -> None:
    macs, millions, source = PUBLISHED[key]
    if macs is not None:
        assert total_macs(of(key)) / 1e6 == pytest.approx(macs, rel=0.01), source
    if millions is not None:
        assert parameters(of(key)) / 1e6 == pytest.approx(millions, rel=0.01, abs=0.05), source


def test_batch_norms_before_convolutions_are_work_of_their_own() -> None:
    plain, early, preact = (of((name, "224x224x3")) for name in ("ResNet50 v1", "resnet50", "resnet-50"))
    assert counted(plain) == counted(early)
    assert len(preact) == len(plain) + 17  # one a block, and the last
    assert counted(w for w in preact if w.weights) == counted(w for w in plain if w.weights)
    late, second = (of((name, "224x224x3")) for name in ("ResNet50", "ResNet50 v2"))
    assert counted(w for w in second if w.weights) == counted(w for w in late if w.weights)
    assert len(second) == len(late) + 17
    assert len(of(("resnet-18", "224x224x3"))) == len(of(("resnet18", "224x224x3"))) + 9


def test_squeezenets_differ_in_padding_and_classes() -> None:
    """By hand: what a padded first convolution writes, and five classes instead of a thousand."""
    (first, *_), (padded, *_) = of(("squeezenet1_0", "224x224x3")), of(("squeezenet-v1.0", "224x224x3"))
    assert (first.outputs, padded.outputs) == (96 * 109 * 109, 96 * 112 * 112)
    assert of(("squeezenet-v1.1", "224x224x3"))[0].outputs == 64 * 112 * 112
    thousand, five = squeezenet().layers, of(("SqueezeNet v1.1 (5 classes)", "224x224x3"))
    assert total_macs(thousand) - total_macs(five) == 13 * 13 * 512 * 995
    assert of(("SqueezeNet v1.1 (5 classes)", "128x128x3"))[-1].inputs == 5 * 7 * 7
    tvm = [w.outputs for w in of(("squeezenet-v1.0", "224x224x3")) if w.kind is Kind.OTHER]
    assert tvm[0] == 96 * 55 * 55
