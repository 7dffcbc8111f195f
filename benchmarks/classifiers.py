"""Classifiers whose latency others have published, as their papers' tables have them; ncnn's where they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .netshapes import Net, Shape

# ---- MobileNets ------------------------------------------------------------------------------------------------------

V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


def v1_body(net: Net, alpha: float = 1.0, blocks: Sequence[tuple[int, int]] = V1) -> None:
    """Add MobileNetV1's blocks: out and stride of each."""
    net.conv(int(32 * alpha), 3, 2)
    for out, s in blocks:
        net.dw(s=s)
        net.conv(int(out * alpha))


def mobilenet_v1(alpha: float = 1.0, size: int = 224, channels: int = 3, classes: int = 1000) -> Net:
    """MobileNetV1 (arXiv:1704.04861)."""
    net = Net(channels, size)
    v1_body(net, alpha)
    net.gap()
    net.fc(classes)
    return net


def fd_mobilenet(alpha: float, size: int, classes: int) -> Net:
    """FD-MobileNet (arXiv:1802.03750)."""
    net = Net(3, size)
    blocks = ((64, 2), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 4, (1024, 1))
    v1_body(net, alpha, blocks)
    net.gap()
    net.fc(classes)
    return net


V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def divisible(value: float) -> int:
    """Round to a multiple of eight, not below nine tenths."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


def v2_body(net: Net, alpha: float = 1.0, *, expand_first: bool = False) -> Shape:
    """Add MobileNetV2's blocks; give what the last that strides expands to."""
    expanded = net.conv(divisible(32 * alpha), 3, 2)
    for t, c, n, first in V2:
        for i in range(n):
            before, s = net.shape[0], first if i == 0 else 1
            if t > 1 or expand_first:
                net.conv(before * t)
            expanded = net.shape if s == 2 else expanded
            net.dw(s=s)
            net.conv(divisible(c * alpha))
            if s == 1 and net.shape[0] == before:
                net.add()
    return expanded


def mobilenet_v2(
    alpha: float = 1.0, size: int = 224, classes: int = 1000, *, expand_first: bool = False, last: int | None = None
) -> Net:
    """MobileNetV2 (arXiv:1801.04381); ncnn's expands the first block too, by 1; `last` writes the last convolution."""
    net = Net(3, size)
    v2_body(net, alpha, expand_first=expand_first)
    net.conv(int(1280 * max(1.0, alpha)) if last is None else last)
    net.gap()
    net.fc(classes)
    return net


# Kernel, expanded, out, squeezes, hard-swish, stride: arXiv:1905.02244, tables 1 and 2.
V3_LARGE = (
    (3, 16, 16, False, False, 1), (3, 64, 24, False, False, 2), (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2), (5, 120, 40, True, False, 1), (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2), (3, 200, 80, False, True, 1), (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1), (3, 480, 112, True, True, 1), (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2), (5, 960, 160, True, True, 1), (5, 960, 160, True, True, 1),
)  # fmt: skip
V3_NCNN = (*V3_LARGE[:12], (5, 672, 160, True, True, 1), (5, 672, 160, True, True, 2), V3_LARGE[14])
V3_SMALL = (
    (3, 16, 16, True, False, 2), (3, 72, 24, False, False, 2), (3, 88, 24, False, False, 1), (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1), (5, 240, 40, True, True, 1), (5, 120, 48, True, True, 1), (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2), (5, 576, 96, True, True, 1), (5, 576, 96, True, True, 1),
)  # fmt: skip


def squeezed_by_four(channels: int) -> int:
    """Give the squeezed channels of ncnn's and PaddleClas's MobileNetV3."""
    return channels // 4


def _squeezed(channels: int) -> int:
    return divisible(channels / 4)


def v3_body(
    net: Net, blocks: Sequence[tuple[int, int, int, bool, bool, int]], squeezed: Callable[[int], int] = _squeezed
) -> Shape:
    """Add MobileNetV3's blocks; give what the last that strides expands to."""
    kept = net.conv(16, 3, 2)
    net.other()
    for k, expanded, out, squeezes, swish, s in blocks:
        before = net.shape[0]
        if expanded != before:
            net.conv(expanded)
            if swish:
                net.other()
        kept = net.shape if s == 2 else kept
        net.dw(k, s)
        if squeezes:
            net.excite(squeezed(expanded))
        if swish:
            net.other()
        net.conv(out)
        if s == 1 and out == before:
            net.add()
    return kept


def mobilenet_v3(
    blocks: Sequence[tuple[int, int, int, bool, bool, int]], last: int, hidden: int,
    squeezed: Callable[[int], int] = _squeezed,
) -> Net:  # fmt: skip
    """MobileNetV3 (arXiv:1905.02244)."""
    net = Net(3, 224)
    v3_body(net, blocks, squeezed)
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
    net.conv(96, 11, 4, pad=0)
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


def resnet18(*, first: bool = True, preact: bool = False) -> Net:
    """ResNet-18 (arXiv:1512.03385).

    Args:
        first: the way around the first block convolves, too, as ncnn's and TVM's.
        preact: batch norms stand before convolutions (arXiv:1603.05027): each block's first cannot be folded.
    """
    net = Net(3, 224)
    net.conv(64, 7, 2)
    net.pool(2, 3)
    for i, out in enumerate((64, 64, 128, 128, 256, 256, 512, 512)):
        found, s = net.shape, 2 if i in (2, 4, 6) else 1
        if preact:
            net.other()
        net.conv(out, 3, s)
        net.conv(out, 3)
        if s == 2 or (first and i == 0):
            net.conv(out, 1, s, at=found)
        net.add()
    if preact:
        net.other()
    net.gap()
    net.fc(1000)
    return net


def cifar_resnet(blocks: int, classes: int) -> Net:
    """ResNet for 32x32 (arXiv:1512.03385, 4.2) with convolutions on the way around; with one block, MLPerf Tiny's."""
    net = Net(3, 32)
    net.conv(16, 3)
    for stage, out in enumerate((16, 32, 64)):
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
