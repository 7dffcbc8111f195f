"""Detectors whose latency ncnn publishes, as the files of those names in Tencent/ncnn:benchmark have them."""

from __future__ import annotations

import math

from .classifiers import V1, v2_body
from .imagenet_nets import FIRES_1_1, fires, shuffle_stages
from .netshapes import Net, Shape


def mobilenet_ssd(alpha: float = 1.0, classes: int = 21) -> Net:
    """MobileNetV1 with six heads, 300x300; TensorFlow's for COCO has 91 classes."""
    net = Net(3, 300)
    heads: list[Shape] = []
    net.conv(int(32 * alpha), 3, 2)
    for i, (out, s) in enumerate(V1):
        net.dw(s=s)
        net.conv(int(out * alpha))
        heads += [net.shape] if i in (10, 12) else []
    for inner, out in ((256, 512), (128, 256), (128, 256), (64, 128)):
        net.conv(int(inner * alpha))
        net.conv(int(out * alpha), 3, 2)
        heads.append(net.shape)
    for i, shape in enumerate(heads):
        anchors = 3 if i == 0 else 6
        for out in (4, classes):
            net.conv(anchors * out, at=shape)
    return net


def squeezenet_ssd() -> Net:
    """SqueezeNet 1.1 with six heads, 300x300, 21 classes."""
    net = Net(3, 300)
    net.conv(64, 3, 2, pad=0)
    heads: list[Shape] = []
    for modules in (FIRES_1_1[:6], FIRES_1_1[6:], (0, 96), (0, 96)):
        fires(net, modules)
        heads.append(net.shape)
    for inner, out in ((128, 256), (64, 128)):
        net.conv(inner)
        net.conv(out, 3, 2)
        heads.append(net.shape)
    net.other(heads[0], inputs=math.prod(heads[0]))
    for i, shape in enumerate(heads):
        anchors = 4 if i in (0, 5) else 6
        for out in (4, 21):
            net.conv(anchors * out, 3, at=shape)
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
    middle = v2_body(net)
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


def nanodet_m() -> Net:
    """NanoDet-m, 320x320."""
    net = Net(3, 320)
    net.conv(24, 3, 2)
    net.pool(2, 3)
    levels = [net.conv(96, at=end) for end in shuffle_stages(net, (116, 232, 464))]
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
    _, middle, last = shuffle_stages(net, (48, 96, 192))
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
    _, middle, _ = shuffle_stages(net, (48, 96, 192))
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
