"""The networks whose latency others have published, as the work of their layers.

Described by hand from the sources named below, so that the estimator can be fitted without any framework. Totals are
compared with those of ../shared/latency/models/macs.csv in the tests. The ncnn networks follow the files of those names
in Tencent/ncnn:benchmark, which differ in places from the papers'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from .classifiers import (
    V1,
    V2,
    V3_LARGE,
    V3_NCNN,
    V3_SMALL,
    alexnet,
    autoencoder,
    cifar_resnet,
    ds_cnn,
    fd_mobilenet,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3,
    regnety_400m,
    resnet18,
    vgg16,
)  # fmt: skip
from .netshapes import Net, Shape

# ---- detectors, as in Tencent/ncnn:benchmark/*.param -----------------------------------------------------------------


def mobilenet_ssd() -> Net:
    """MobileNetV1 with six heads, 300x300, 21 classes."""
    net = Net(3, 300)
    heads: list[Shape] = []
    net.conv(32, 3, 2)
    for i, (out, s) in enumerate(V1):
        net.dw(s=s)
        net.conv(out)
        heads += [net.shape] if i in (10, 12) else []
    for inner, out in ((256, 512), (128, 256), (128, 256), (64, 128)):
        net.conv(inner)
        net.conv(out, 3, 2)
        heads.append(net.shape)
    for i, shape in enumerate(heads):
        anchors = 3 if i == 0 else 6
        for out in (4, 21):
            net.conv(anchors * out, at=shape)
    return net


def mobilenet_yolo() -> Net:
    """MobileNetV1 with two separable heads, 416x416."""
    net = Net(3, 416)
    middle: Shape = net.shape
    net.conv(32, 3, 2)
    for i, (out, s) in enumerate(V1):
        net.dw(s=s)
        net.conv(out)
        middle = net.shape if i == 10 else middle
    net.dw()
    deep = net.conv(1024)
    # A transposed convolution of 4x4 and stride 2 is four of 2x2.
    net.conv(512, 2, groups=512, at=(1024, *middle[1:]))
    net.add()
    net.dw()
    net.conv(1024)
    net.conv(125)
    net.conv(125, at=deep)
    return net


def mobilenetv2_yolov3() -> Net:
    """MobileNetV2 with two separable heads, 352x352."""
    net = Net(3, 352)
    net.conv(32, 3, 2)
    middle: Shape = net.shape
    for stage, (t, c, n, _) in enumerate(V2):
        for i in range(n):
            before, s = net.shape[0], (1, 2, 2, 2, 1, 2, 1)[stage] if i == 0 else 1
            if t > 1:
                net.conv(before * t)
            middle = net.shape if (stage, i) == (5, 0) else middle
            net.dw(s=s)
            net.conv(c)
            if s == 1 and before == c:
                net.add()
    net.conv(1280)
    net.dw()
    deep = net.conv(576)
    net.dw(1)
    net.other((576, *middle[1:]))
    net.dw(at=middle)
    net.conv(576)
    net.add()
    net.dw()
    net.conv(576)
    net.conv(75)
    net.conv(75, at=deep)
    return net


def yolov4_tiny() -> Net:
    """YOLOv4-tiny (arXiv:2011.08036), 416x416, 80 classes."""
    net = Net(3, 416)
    net.conv(32, 3, 2)
    net.conv(64, 3, 2)
    kept: Shape = net.shape
    for width in (64, 128, 256):
        whole = net.conv(width, 3)
        net.shape = (width // 2, *whole[1:])
        net.other(inputs=math.prod(net.shape))
        net.conv(width // 2, 3)
        net.conv(width // 2, 3)
        net.concat(width)
        kept = net.conv(width)
        net.concat(2 * width)
        net.pool()
    net.conv(512, 3)
    neck = net.conv(256)
    net.conv(512, 3)
    net.conv(255)
    net.conv(128, at=neck)
    net.other((128, 2 * neck[1], 2 * neck[2]))
    net.concat(128 + kept[0])
    net.conv(256, 3)
    net.conv(255)
    return net


def blazeface() -> Net:
    """BlazeFace's backbone (arXiv:1907.05047), 128x128."""
    net = Net(3, 128)
    net.conv(24, 5, 2)
    outs = (24, 28, 32, 36, 42, 48, 56, 64, 72, 80, 88, 96, 96, 96, 96, 96)
    for i, out in enumerate(outs):
        s = 2 if i in (2, 5, 11) else 1
        net.dw(s=s)
        net.conv(out)
        net.add()
    return net


def _shuffle_stages(net: Net, widths: Sequence[int], repeats: Sequence[int]) -> list[Shape]:
    """Add the stages of ShuffleNetV2 (arXiv:1807.11164); give what each wrote."""
    ends = []
    for width, n in zip(widths, repeats, strict=True):
        half, found = width // 2, net.shape
        net.dw(s=2)
        net.conv(half)
        net.conv(half, at=found)
        net.dw(s=2)
        net.conv(half)
        net.concat(width)
        net.other()
        for _ in range(n - 1):
            net.shape = (half, *net.shape[1:])
            net.other()
            net.conv(half)
            net.dw()
            net.conv(half)
            net.concat(width)
            net.other()
        ends.append(net.shape)
    return ends


def nanodet_m() -> Net:
    """NanoDet-m, 320x320."""
    net = Net(3, 320)
    net.conv(24, 3, 2)
    net.pool(2, 3)
    levels = [net.conv(96, at=end) for end in _shuffle_stages(net, (116, 232, 464), (4, 8, 4))]
    for to in (levels[1], levels[0], levels[1], levels[2]):
        net.other(to)
        net.add()
    for level in levels:
        net.shape = level
        for _ in range(2):
            net.dw()
            net.conv(96)
        net.conv(112)
        net.other()
    return net


def yolo_fastest() -> Net:
    """YOLO-Fastest 1.1, 320x320."""
    net = Net(3, 320)
    net.conv(8, 3, 2)
    net.conv(8)
    net.dw()
    net.conv(4)
    # Expanded and out of each block, its stride, and whether what it read is added.
    blocks = (
        (8, 4, 1, True), (24, 8, 2, False), *((32, 8, 1, True),) * 2, (32, 8, 2, False), *((48, 8, 1, True),) * 2,
        (48, 16, 1, False), *((96, 16, 1, True),) * 4, (96, 24, 2, False), *((136, 24, 1, True),) * 4,
    )  # fmt: skip
    for expanded, out, s, adds in blocks:
        net.conv(expanded)
        net.dw(s=s)
        net.conv(out)
        if adds:
            net.add()
    fine = net.conv(136)
    net.dw(s=2)
    net.conv(48)
    for _ in range(5):
        net.conv(224)
        net.dw()
        net.conv(48)
        net.add()
    for _ in range(3):
        net.other()
    net.concat(192)
    coarse = net.conv(96)
    for shape in (coarse, (120, *fine[1:])):
        net.shape = shape
        if shape is not coarse:
            net.other()
        for _ in range(2):
            net.dw(5)
            net.conv(shape[0])
        net.conv(255)
    return net


def yolo_fastestv2() -> Net:
    """Yolo-FastestV2, 352x352."""
    net = Net(3, 352)
    net.conv(24, 3, 2)
    net.pool(2, 3)
    _, middle, last = _shuffle_stages(net, (48, 96, 192), (4, 8, 4))
    for shape in (last, (288, *middle[1:])):
        net.shape = shape
        if shape is not last:
            net.other()
        found = net.conv(72)
        for _ in range(2):
            net.shape = found
            for _ in range(2):
                net.dw(5)
                net.conv(72)
        for out in (12, 3, 80):
            net.conv(out, at=found)
    net.other()
    return net


def fastest_det() -> Net:
    """FastestDet, 352x352."""
    net = Net(3, 352)
    net.conv(24, 3, 2)
    net.pool(2, 3)
    _, middle, _ = _shuffle_stages(net, (48, 96, 192), (4, 8, 4))
    net.shape = (336, *middle[1:])
    net.other()
    found = net.conv(96)
    for _ in range(6):
        net.dw(5)
    net.conv(96, at=(288, *found[1:]))
    net.add()
    found = net.conv(96)
    for out in (80, 4, 1):
        net.dw(5, at=found)
        net.conv(out)
    net.other()
    return net


def _squeezed_by_four(channels: int) -> int:
    return channels // 4


NETWORKS: Mapping[tuple[str, str], Callable[[], Net]] = {
    ("alexnet", "227x227x3"): alexnet,
    ("blazeface", "128x128x3"): blazeface,
    ("mobilenet", "224x224x3"): mobilenet_v1,
    ("mobilenet_ssd", "300x300x3"): mobilenet_ssd,
    ("mobilenet_v2", "224x224x3"): lambda: mobilenet_v2(expand_first=True),
    ("mobilenet_v3", "224x224x3"): lambda: mobilenet_v3(V3_NCNN, 960, 1280, _squeezed_by_four),
    ("mobilenet_yolo", "416x416x3"): mobilenet_yolo,
    ("mobilenetv2_yolov3", "352x352x3"): mobilenetv2_yolov3,
    ("nanodet_m", "320x320x3"): nanodet_m,
    ("regnety_400m", "224x224x3"): regnety_400m,
    ("resnet18", "224x224x3"): resnet18,
    ("vgg16", "224x224x3"): vgg16,
    ("yolo-fastest-1.1", "320x320x3"): yolo_fastest,
    ("yolo-fastestv2", "352x352x3"): yolo_fastestv2,
    ("FastestDet", "352x352x3"): fastest_det,
    ("yolov4-tiny", "416x416x3"): yolov4_tiny,
    ("MobileNet v1 1.0X", "224x224x3"): mobilenet_v1,
    ("MobileNet v2 1.0X", "224x224x3"): mobilenet_v2,
    ("MobileNet v3 Large", "224x224x3"): lambda: mobilenet_v3(V3_LARGE, 960, 1280),
    ("MobileNet v3 Small", "224x224x3"): lambda: mobilenet_v3(V3_SMALL, 576, 1024),
    ("MLPerfTiny IC ResNet-8 (CIFAR-10)", "32x32x3"): lambda: cifar_resnet(1, 10),
    ("MLPerfTiny KWS DS-CNN", "49x10x1"): ds_cnn,
    ("MLPerfTiny VWW MobileNetV1-0.25", "96x96x3"): lambda: mobilenet_v1(0.25, 96, 3, 2),
    ("MLPerfTiny AD FC-autoencoder", "640"): autoencoder,
    ("FdMobileNet 0.25 (5 classes)", "128x128x3"): lambda: fd_mobilenet(0.25, 128, 5),
    ("FdMobileNet 0.25 (5 classes)", "224x224x3"): lambda: fd_mobilenet(0.25, 224, 5),
    ("MobileNetV1-0.25 (1000 classes)", "224x224x3"): lambda: mobilenet_v1(0.25),
    ("MobileNetV1-0.25 (1000 classes)", "160x160x3"): lambda: mobilenet_v1(0.25, 160),
    ("MobileNetV1-0.25 (5 classes)", "224x224x3"): lambda: mobilenet_v1(0.25, 224, 3, 5),
    ("MobileNetV1-0.25 (5 classes)", "96x96x3"): lambda: mobilenet_v1(0.25, 96, 3, 5),
    ("MobileNetV1-0.25 (5 classes)", "96x96x1"): lambda: mobilenet_v1(0.25, 96, 1, 5),
    ("MobileNetV1-0.5 (1000 classes)", "224x224x3"): lambda: mobilenet_v1(0.5),
    ("MobileNetV1-0.5 (5 classes)", "224x224x3"): lambda: mobilenet_v1(0.5, 224, 3, 5),
    ("MobileNetV1-1.0 (1000 classes)", "224x224x3"): mobilenet_v1,
    ("MobileNetV2-0.35 (1000 classes)", "128x128x3"): lambda: mobilenet_v2(0.35, 128),
    ("MobileNetV2-0.35 (1000 classes)", "224x224x3"): lambda: mobilenet_v2(0.35),
    ("MobileNetV2-0.35 (5 classes)", "128x128x3"): lambda: mobilenet_v2(0.35, 128, 5),
    ("MobileNetV2-0.35 (5 classes)", "224x224x3"): lambda: mobilenet_v2(0.35, 224, 5),
    ("MobileNetV2-1.0 (1000 classes)", "128x128x3"): lambda: mobilenet_v2(1.0, 128),
    ("MobileNetV2-1.0 (1000 classes)", "224x224x3"): mobilenet_v2,
    ("MobileNetV2-1.4 (1000 classes)", "224x224x3"): lambda: mobilenet_v2(1.4),
    ("ResNet v1 8 (CIFAR-10)", "32x32x3"): lambda: cifar_resnet(1, 10),
    ("ResNet v1 32 (CIFAR-100)", "32x32x3"): lambda: cifar_resnet(5, 100),
}
"""By the name and the input (height, width, channels) that the latency tables give."""
