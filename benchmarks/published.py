"""The networks whose latency others have published, as the work of their layers.

Described by hand from the sources named below, so that the estimator can be fitted without any framework. Totals are
compared with those of ../shared/latency/models/macs.csv in the tests. The ncnn networks follow the files of those names
in Tencent/ncnn:benchmark, which differ in places from the papers'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from .netshapes import Net, Shape

# ---- MobileNets ------------------------------------------------------------------------------------------------------

_V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


def _v1_body(net: Net, alpha: float = 1.0, blocks: Sequence[tuple[int, int]] = _V1, first_stride: int = 2) -> None:
    net.conv(int(32 * alpha), 3, first_stride)
    for out, s in blocks:
        net.dw(s=s)
        net.conv(int(out * alpha))


def mobilenet_v1(alpha: float = 1.0, size: int = 224, channels: int = 3, classes: int = 1000) -> Net:
    """MobileNetV1 (arXiv:1704.04861)."""
    net = Net(channels, size)
    _v1_body(net, alpha)
    net.gap()
    net.fc(classes)
    return net


def fd_mobilenet(alpha: float, size: int, classes: int) -> Net:
    """FD-MobileNet (arXiv:1802.03750)."""
    net = Net(3, size)
    blocks = ((64, 2), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 4, (1024, 1))
    _v1_body(net, alpha, blocks)
    net.gap()
    net.fc(classes)
    return net


_V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _divisible(value: float) -> int:
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


def mobilenet_v2(
    alpha: float = 1.0, size: int = 224, classes: int = 1000, *, expand_first: bool = False, stem: int | None = None
) -> Net:
    """MobileNetV2 (arXiv:1801.04381); ncnn's expands the first block too, by 1."""
    net = Net(3, size)
    net.conv(_divisible(32 * alpha) if stem is None else stem, 3, 2)
    for t, c, n, first in _V2:
        for i in range(n):
            before, s = net.shape[0], first if i == 0 else 1
            if t > 1 or expand_first:
                net.conv(before * t)
            net.dw(s=s)
            net.conv(_divisible(c * alpha))
            if s == 1 and net.shape[0] == before:
                net.add()
    net.conv(int(1280 * max(1.0, alpha)))
    net.gap()
    net.fc(classes)
    return net


# Kernel, expanded, out, squeezes, hard-swish, stride: arXiv:1905.02244, tables 1 and 2.
_V3_LARGE = (
    (3, 16, 16, False, False, 1), (3, 64, 24, False, False, 2), (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2), (5, 120, 40, True, False, 1), (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2), (3, 200, 80, False, True, 1), (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1), (3, 480, 112, True, True, 1), (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2), (5, 960, 160, True, True, 1), (5, 960, 160, True, True, 1),
)  # fmt: skip
_V3_NCNN = (*_V3_LARGE[:12], (5, 672, 160, True, True, 1), (5, 672, 160, True, True, 2), _V3_LARGE[14])
_V3_SMALL = (
    (3, 16, 16, True, False, 2), (3, 72, 24, False, False, 2), (3, 88, 24, False, False, 1), (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1), (5, 240, 40, True, True, 1), (5, 120, 48, True, True, 1), (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2), (5, 576, 96, True, True, 1), (5, 576, 96, True, True, 1),
)  # fmt: skip


def mobilenet_v3(
    blocks: Sequence[tuple[int, int, int, bool, bool, int]], last: int, hidden: int,
    squeezed: Callable[[int], int] = lambda c: _divisible(c / 4),
) -> Net:  # fmt: skip
    """MobileNetV3 (arXiv:1905.02244)."""
    net = Net(3, 224)
    net.conv(16, 3, 2)
    net.other()
    for k, expanded, out, squeezes, swish, s in blocks:
        before = net.shape[0]
        if expanded != before:
            net.conv(expanded)
            if swish:
                net.other()
        net.dw(k, s)
        if squeezes:
            net.excite(squeezed(expanded))
        if swish:
            net.other()
        net.conv(out)
        if s == 1 and out == before:
            net.add()
    net.conv(last)
    net.other()
    net.gap()
    net.fc(hidden)
    net.other()
    net.fc(1000)
    return net


# ---- plain and residual ----------------------------------------------------------------------------------------------


def alexnet() -> Net:
    """AlexNet as Caffe has it: two groups, 227x227."""
    net = Net(3, 227)
    net.conv(96, 11, 4, valid=True)
    net.other()
    net.pool(2, 3, valid=True)
    net.conv(256, 5, groups=2)
    net.other()
    net.pool(2, 3, valid=True)
    net.conv(384, 3)
    net.conv(384, 3, groups=2)
    net.conv(256, 3, groups=2)
    net.pool(2, 3, valid=True)
    for out in (4096, 4096, 1000):
        net.fc(out)
    return net


def vgg16() -> Net:
    """VGG16 (arXiv:1409.1556)."""
    net = Net(3, 224)
    for out, n in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(n):
            net.conv(out, 3)
        net.pool()
    for out in (4096, 4096, 1000):
        net.fc(out)
    return net


def resnet18() -> Net:
    """ResNet-18 (arXiv:1512.03385); ncnn's convolves on the way around the first block, too."""
    net = Net(3, 224)
    net.conv(64, 7, 2)
    net.pool(2, 3)
    for i, out in enumerate((64, 64, 128, 128, 256, 256, 512, 512)):
        found, s = net.shape, 2 if i in (2, 4, 6) else 1
        net.conv(out, 3, s)
        net.conv(out, 3)
        if i % 2 == 0:
            net.conv(out, 1, s, at=found)
        net.add()
    net.gap()
    net.fc(1000)
    return net


def cifar_resnet(blocks: int, classes: int, widths: Sequence[int] = (16, 32, 64)) -> Net:
    """ResNet for 32x32 (arXiv:1512.03385, 4.2) with convolutions on the way around; with one block, MLPerf Tiny's."""
    net = Net(3, 32)
    net.conv(widths[0], 3)
    for stage, out in enumerate(widths):
        for i in range(blocks):
            found, s = net.shape, 2 if stage and not i else 1
            net.conv(out, 3, s)
            net.conv(out, 3)
            if s == 2:
                net.conv(out, 1, s, at=found)
            net.add()
    net.gap()
    net.fc(classes)
    return net


def regnety_400m() -> Net:
    """RegNetY-400MF (arXiv:2003.13678)."""
    net = Net(3, 224)
    net.conv(32, 3, 2)
    for out, n in ((48, 1), (104, 3), (208, 6), (440, 6)):
        for i in range(n):
            found, s = net.shape, 2 if i == 0 else 1
            net.conv(out)
            net.conv(out, 3, s, groups=out // 8)
            net.excite(round(found[0] / 4))
            net.conv(out)
            if i == 0:
                net.conv(out, 1, 2, at=found)
            net.add()
    net.gap()
    net.fc(1000)
    return net


# ---- detectors, as in Tencent/ncnn:benchmark/*.param -----------------------------------------------------------------


def mobilenet_ssd() -> Net:
    """MobileNetV1 with six heads, 300x300, 21 classes."""
    net = Net(3, 300)
    heads: list[Shape] = []
    net.conv(32, 3, 2)
    for i, (out, s) in enumerate(_V1):
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
    for i, (out, s) in enumerate(_V1):
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
    for stage, (t, c, n, _) in enumerate(_V2):
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


# ---- MLPerf Tiny -----------------------------------------------------------------------------------------------------


def ds_cnn() -> Net:
    """MLPerf Tiny's keyword spotting: 49x10, twelve words."""
    net = Net(1, 49, 10)
    net.conv(64, (10, 4), 2)
    for _ in range(4):
        net.dw()
        net.conv(64)
    net.gap()
    net.fc(12)
    return net


def autoencoder() -> Net:
    """MLPerf Tiny's anomaly detection: 640 values."""
    net = Net(640, 1)
    for out in (128, 128, 128, 128, 8, 128, 128, 128, 128, 640):
        net.fc(out)
    return net


def _squeezed_by_four(channels: int) -> int:
    return channels // 4


NETWORKS: Mapping[tuple[str, str], Callable[[], Net]] = {
    ("alexnet", "227x227x3"): alexnet,
    ("blazeface", "128x128x3"): blazeface,
    ("mobilenet", "224x224x3"): mobilenet_v1,
    ("mobilenet_ssd", "300x300x3"): mobilenet_ssd,
    ("mobilenet_v2", "224x224x3"): lambda: mobilenet_v2(expand_first=True),
    ("mobilenet_v3", "224x224x3"): lambda: mobilenet_v3(_V3_NCNN, 960, 1280, _squeezed_by_four),
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
    ("MobileNet v3 Large", "224x224x3"): lambda: mobilenet_v3(_V3_LARGE, 960, 1280),
    ("MobileNet v3 Small", "224x224x3"): lambda: mobilenet_v3(_V3_SMALL, 576, 1024),
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
