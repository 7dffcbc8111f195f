"""Detectors written down by hand ask for the multiply-adds, and have the parameters, that others print for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from edgecomp.benchmarks.detectors import efficientdet, efficientnet_lite, ssd_mobilenet_v2
from edgecomp.benchmarks.ncnn_detectors import mobilenet_ssd
from edgecomp.benchmarks.netshapes import Net
from edgecomp.benchmarks.published import NETWORKS
from edgecomp.work import Kind, total_macs
from tests.test_published import parameters

# All read on 2026-11-28 at the place named.
OMZ = "openvinotoolkit/open_model_zoo:models/public/{}/README.md@{}"
V3 = "arXiv:1905.02244, table 6, {} with fewer channels: {} x 10^9 multiply-adds"
ULTRALYTICS = "ultralytics/ultralytics:docs/en/models/{}.md@{}, detection (COCO)"
YOLOX = "Megvii-BaseDetection/YOLOX:README.md@01668879"
# What builds it, floating-point operations in 10^9 (two for a multiply-add), parameters in 10^6, as printed.
PRINTED: Mapping[str, tuple[Callable[[], Net], float, float, str]] = {
    "SSDLite MobileNet v2": (
        NETWORKS["SSDLite MobileNet v2", "300x300x3"], 1.525, 4.475,
        OMZ.format("ssdlite_mobilenet_v2", "5e4842cc"),
    ),
    "SSD MobileNet v2": (
        NETWORKS["SSD MobileNet v2", "300x300x3"], 3.775, 16.818, OMZ.format("ssd_mobilenet_v2_coco", "1484ac1c"),
    ),
    "SSD MobileNet v1": (
        lambda: mobilenet_ssd(1.0, 91), 2.494, 6.807, OMZ.format("ssd_mobilenet_v1_coco", "1328eea4"),
    ),
    "SSDLite MobileNet v3 large": (
        NETWORKS["SSDLite MobileNet v3 large", "320x320x3"], 2 * 0.51, 3.22, V3.format("V3", 0.51),
    ),
    "SSDLite MobileNet v3 small": (
        NETWORKS["SSDLite MobileNet v3 small", "320x320x3"], 2 * 0.16, 1.77, V3.format("V3-Small", 0.16),
    ),
    "YOLOX-Nano": (NETWORKS["YOLOX-Nano", "416x416x3"], 1.08, 0.91, YOLOX),
    "YOLOX-Tiny": (NETWORKS["YOLOX-Tiny", "416x416x3"], 6.45, 5.06, YOLOX),
    "YOLOX-S": (NETWORKS["YOLOX-S", "640x640x3"], 26.8, 9.0, YOLOX),
    "YOLOv8n": (NETWORKS["YOLOv8n", "640x640x3"], 8.7, 3.2, ULTRALYTICS.format("yolov8", "0059318a")),
    "YOLOv8s": (NETWORKS["YOLOv8s", "640x640x3"], 28.6, 11.2, ULTRALYTICS.format("yolov8", "0059318a")),
    "YOLO11n": (NETWORKS["YOLO11n", "640x640x3"], 6.5, 2.6, ULTRALYTICS.format("yolo11", "040502be")),
    "YOLO11s": (NETWORKS["YOLO11s", "640x640x3"], 21.5, 9.4, ULTRALYTICS.format("yolo11", "040502be")),
    "YOLO11m": (NETWORKS["YOLO11m", "640x640x3"], 68.0, 20.1, ULTRALYTICS.format("yolo11", "040502be")),
    "YOLO11l": (NETWORKS["YOLO11l", "640x640x3"], 86.9, 25.3, ULTRALYTICS.format("yolo11", "040502be")),
}  # fmt: skip


@pytest.mark.parametrize("name", PRINTED)
def test_detectors_have_the_sizes_that_are_printed(name: str) -> None:
    build, operations, millions, source = PRINTED[name]
    layers = build().layers
    # Norms and activations count as operations in some of these: a few hundredths where convolutions are depthwise.
    assert 2 * total_macs(layers) / 1e9 == pytest.approx(operations, rel=0.035 if "Nano" in name else 0.02), source
    precise = 1e-4 if "open_model_zoo" in source else 0.016
    assert parameters(layers) / 1e6 == pytest.approx(millions, rel=precise), source


def test_ssdlite_is_the_papers_at_its_size() -> None:
    """arXiv:1801.04381, table 6: 0.8 x 10^9 multiply-adds at 320x320."""
    assert round(total_macs(ssd_mobilenet_v2(320, lite=True).layers) / 1e9, 1) == 0.8


def test_a_narrower_ssd_has_narrower_levels() -> None:
    """By hand: the heads' inputs at 0.75 of the width."""
    layers = NETWORKS["SSD MobileNet v1 0.75 depth (COCO)", "300x300x3"]().layers
    heads = [w for w in layers if w.weights][-12:]
    assert [w.summands for w in heads[::2]] == [384, 768, 384, 192, 192, 96]
    assert [w.out_channels for w in heads[:4]] == [12, 273, 24, 546]


def _head(channels: int) -> int:
    """Count one level's heads: three separable convolutions each, then 90 classes or 4 sides for nine anchors."""
    separable = 9 * channels + channels + channels * channels + channels
    depthwise = 9 * channels + channels
    return 2 * (3 * separable + depthwise) + (channels + 1) * 9 * (90 + 4)


# Size, channels, cells, width and depth of the backbone, lite; 10^9 multiply-adds, 10^6 parameters.
EFFICIENTDETS = [
    ((512, 64, 3, 1.0, 1.0), 2.54, 3.9),
    ((640, 88, 4, 1.0, 1.1), 6.10, 6.6),
    ((768, 112, 5, 1.1, 1.2), 11.0, 8.1),
]


@pytest.mark.parametrize(("sizes", "macs", "millions"), EFFICIENTDETS)
def test_efficientdets_are_the_papers(sizes: tuple[int, int, int, float, float], macs: float, millions: float) -> None:
    """google/automl:efficientdet/README.md@06888d12, D0 to D2: BiFPN and heads of the lite ones, shared by levels."""
    layers = efficientdet(*sizes, lite=False).layers
    assert total_macs(layers) / 1e9 == pytest.approx(macs, rel=0.025)
    assert (parameters(layers) - 4 * _head(sizes[1])) / 1e6 == pytest.approx(millions, rel=0.015)
    lite = efficientdet(*sizes).layers
    assert len([w for w in lite if w.weights]) < len([w for w in layers if w.weights])


@pytest.mark.parametrize("i", [0, 1, 2])
def test_lite_ones_differ_from_them_in_the_backbone_and_the_size(i: int) -> None:
    sizes, (size, wide, deep) = EFFICIENTDETS[i][0], [(320, 1.0, 1.0), (384, 1.0, 1.1), (448, 1.1, 1.2)][i]
    written = NETWORKS[f"EfficientDet-lite{i}", f"{size}x{size}x3"]().layers
    assert [(w.weights, w.summands) for w in written] == [
        (w.weights, w.summands) for w in efficientdet(*sizes).layers
    ]
    assert written[0].inputs == 3 * size * size
    backbone = [w for w in efficientnet_lite(size, wide, deep).layers if w.weights][:-2]
    assert [(w.kind, w.macs) for w in written if w.weights][: len(backbone)] == [(w.kind, w.macs) for w in backbone]


@pytest.mark.parametrize(
    ("size", "wide", "deep", "macs", "millions"),
    [(224, 1.0, 1.0, 407, 4.7), (240, 1.0, 1.1, 631, 5.4), (260, 1.1, 1.2, 899, 6.1)],
)
def test_lite_backbones_are_efficientnet_lites(size: int, wide: float, deep: float, macs: int, millions: float) -> None:
    """tensorflow/tpu:models/official/efficientnet/lite/README.md@07e173cc, which counts norms and activations, too."""
    layers = efficientnet_lite(size, wide, deep).layers
    assert 0.94 < total_macs(layers) / 1e6 / macs < 0.96
    norms = sum(w.weights // w.summands for w in layers if w.weights)
    assert (parameters(layers) + norms) / 1e6 == pytest.approx(millions, abs=0.05)


def test_efficientnet_lite0_has_the_weights_of_its_package() -> None:
    """As tests/test_efficientnet.py finds them in a capture of efficientnet-lite-pytorch."""
    layers = [w for w in efficientnet_lite(224, 1.0, 1.0).layers if w.weights]
    assert (len(layers), sum(w.weights for w in layers)) == (50, 4_608_992)


@pytest.mark.parametrize("size", [192, 224, 416])
def test_tiny_yolo_has_the_bytes_that_st_prints(size: int) -> None:
    """STMicroelectronics/stm32ai-modelzoo:object_detection/tiny_yolo_v2/README.md@6f10965e: 10775.98 KiB in flash."""
    layers = NETWORKS["Tiny YOLO v2 (1 class)", f"{size}x{size}x3"]().layers
    biases = sum(w.weights // w.summands for w in layers if w.weights)
    assert round((sum(w.weights for w in layers) + 4 * biases) / 1024, 2) == 10775.98
    assert (layers[-1].outputs, layers[0].kind) == (30 * (size // 32) ** 2, Kind.FIRST)


def test_attention_multiplies_activations() -> None:
    """YOLO11n by hand: two heads over 20x20 places; keys of 32, values of 64; no weights."""
    products = [w for w in NETWORKS["YOLO11n", "640x640x3"]().layers if w.macs and not w.weights]
    assert [w.macs for w in products] == [2 * 400 * 400 * 32, 2 * 400 * 400 * 64]
    assert [w.inputs for w in products] == [2 * 2 * 32 * 400, 2 * (64 + 400) * 400]
    assert [w.outputs for w in products] == [2 * 400 * 400, 2 * 64 * 400]
