"""Detectors whose latency others have published, as their papers and their authors' files have them.

Not here: the boxes that are decoded from what the heads write, and which of them are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from .classifiers import V3_LARGE, V3_SMALL, divisible, v2_body, v3_body
from .imagenet_nets import EFFICIENTNET, inverted_residual
from .netshapes import Net, Shape

# ---- SSD, as tensorflow/models:research/object_detection -------------------------------------------------------------

# With half as many channels in the last stage (arXiv:1905.02244, 6.3).
_V3_LARGE = (*V3_LARGE[:12], (5, 672, 80, True, True, 2), *((5, 480, 80, True, True, 1),) * 2)
_V3_SMALL = (*V3_SMALL[:8], (5, 288, 48, True, True, 2), *((5, 288, 48, True, True, 1),) * 2)


def _ssd(size: int, body: Callable[[Net], Shape], last: int, *, lite: bool, swish: bool = False) -> Net:
    """Add four more levels and the heads of 91 classes; `lite` ones are depthwise and 1x1."""
    net = Net(3, size)
    heads = [body(net), net.conv(last)]
    if swish:
        net.other()
    for inner, out in ((256, 512), (128, 256), (128, 256), (64, 128)):
        net.conv(inner)
        net.dw(s=2)
        heads.append(net.conv(out))
    for i, shape in enumerate(heads):
        anchors = 3 if i == 0 else 6
        for out in (4, 91):
            net.shape = shape
            if lite:
                net.dw()
            net.conv(anchors * out, 1 if lite else 3)
    return net


def ssd_mobilenet_v2(size: int = 300, *, lite: bool = False) -> Net:
    """MobileNetV2 with six heads (arXiv:1801.04381)."""
    return _ssd(size, v2_body, 1280, lite=lite)


def ssdlite_mobilenet_v3(*, small: bool = False) -> Net:
    """MobileNetV3 with six depthwise heads (arXiv:1905.02244), 320x320."""
    blocks, last = (_V3_SMALL, 288) if small else (_V3_LARGE, 480)
    return _ssd(320, lambda net: v3_body(net, blocks), last, lite=True, swish=True)


# ---- EfficientDet ----------------------------------------------------------------------------------------------------


def _efficientnet_body(net: Net, wide: float, deep: float, *, lite: bool) -> list[Shape]:
    """Add an EfficientNet's blocks; give what the stages of strides 8, 16 and 32 write."""
    net.conv(32, 3, 2)
    if not lite:
        net.other()
    ends = []
    for stage, (k, expansion, out, n, s) in enumerate(EFFICIENTNET):
        # Lite ones keep the first and the last stage as deep as they are.
        repeats = n if lite and stage in (0, 6) else math.ceil(n * deep)
        for i in range(repeats):
            inverted_residual(
                net, k, expansion, divisible(out * wide), 1 if i else s, swish=not lite, excites=not lite
            )
        ends += [net.shape] if stage in (2, 4, 6) else []
    return ends


def efficientnet_lite(size: int, wide: float, deep: float) -> Net:
    """EfficientNet-Lite (tensorflow/tpu:models/official/efficientnet/lite), the backbone of EfficientDet-Lite."""
    net = Net(3, size)
    _efficientnet_body(net, wide, deep, lite=True)
    net.conv(1280)
    net.gap()
    net.fc(1000)
    return net


def _fused(net: Net, to: Shape, inputs: Sequence[Shape], *, lite: bool) -> Shape:
    """Add a node of BiFPN: inputs brought to one shape, their sum, a separable convolution."""
    for shape in inputs:
        net.shape = shape
        if shape[0] != to[0]:
            net.conv(to[0])
        if shape[1:] != to[1:]:
            net.other(to)
    net.shape = to
    net.other(reads=len(inputs))
    if not lite:
        net.other()
    net.dw()
    return net.conv(to[0])


def efficientdet(size: int, channels: int, cells: int, wide: float, deep: float, *, lite: bool = True) -> Net:
    """EfficientDet (arXiv:1911.09070), 90 classes; the lite ones have ReLU6 and plain sums, and do not excite.

    Args:
        size: of the input.
        channels: of BiFPN and of the heads.
        cells: of BiFPN.
        wide: the backbone, over EfficientNet-B0.
        deep: likewise.
        lite: or D0, D1, ...
    """
    net = Net(3, size)
    found = _efficientnet_body(net, wide, deep, lite=lite)
    net.conv(channels)
    for _ in range(2):
        net.pool(2, 3)
        found.append(net.shape)
    sizes = [(channels, *shape[1:]) for shape in found]
    for _ in range(cells):
        down = [found[4]]  # from P7 to P4
        for i in (3, 2, 1):
            down.append(_fused(net, sizes[i], (found[i], down[-1]), lite=lite))
        up = [_fused(net, sizes[0], (found[0], down[-1]), lite=lite)]
        for i in (1, 2, 3):
            up.append(_fused(net, sizes[i], (found[i], down[4 - i], up[-1]), lite=lite))
        found = [*up, _fused(net, sizes[4], (found[4], up[-1]), lite=lite)]
    for shape in found:
        for out in (9 * 90, 9 * 4):
            net.shape = shape
            for _ in range(3):
                net.dw()
                net.conv(channels)
                if not lite:
                    net.other()
            net.dw()
            net.conv(out)
    return net


# ---- YOLO ------------------------------------------------------------------------------------------------------------


def tiny_yolo_v2(size: int) -> Net:
    """Tiny YOLO v2 with five anchors and one class, as STMicroelectronics/stm32ai-modelzoo has it."""
    net = Net(3, size)
    for out in (16, 32, 64, 128, 256):
        net.conv(out, 3)
        net.pool()
    net.conv(512, 3)
    net.pool(1, 2)
    net.conv(1024, 3)
    net.conv(512, 3)
    net.conv(5 * (5 + 1))
    return net


def _silu(net: Net, out: int, k: int = 1, s: int = 1, *, at: Shape | None = None) -> Shape:
    net.conv(out, k, s, at=at)
    return net.other()


def _dw_silu(net: Net, out: int, k: int, s: int = 1) -> Shape:
    net.dw(k, s)
    net.other()
    return _silu(net, out)


def _spp(net: Net, out: int) -> Shape:
    """Add poolings of three sizes, joined."""
    inner = _silu(net, net.shape[0] // 2)
    for _ in range(3):
        net.other()
    net.concat(4 * inner[0])
    return _silu(net, out)


def _conv3(net: Net, out: int, s: int = 1, *, depthwise: bool) -> Shape:
    return _dw_silu(net, out, 3, s) if depthwise else _silu(net, out, 3, s)


def _csp(net: Net, out: int, n: int = 1, *, depthwise: bool = False, adds: bool = False, k: int = 1) -> Shape:
    """Add YOLOX's cross-stage block; `k` is the kernel of its bottlenecks' first convolution."""
    found = net.shape
    around = _silu(net, out // 2)
    _silu(net, out // 2, at=found)
    for _ in range(n):
        _silu(net, around[0], k)
        _conv3(net, around[0], depthwise=depthwise)
        if adds:
            net.add()
    net.concat(2 * around[0])
    return _silu(net, out)


def yolox(size: int, width: float, *, depthwise: bool = False) -> Net:
    """YOLOX of a third of the depth (arXiv:2107.08430), 80 classes."""
    net = Net(3, size)
    c = int(64 * width)
    net.other((12, size // 2, size // 2))
    _silu(net, c, 3)
    ends = []
    for times, n in ((2, 1), (4, 3), (8, 3)):
        _conv3(net, times * c, 2, depthwise=depthwise)
        ends.append(_csp(net, times * c, n, depthwise=depthwise, adds=True))
    _conv3(net, 16 * c, 2, depthwise=depthwise)
    _spp(net, 16 * c)
    _csp(net, 16 * c, depthwise=depthwise)
    lateral = []
    for shape in (ends[2], ends[1]):
        lateral.append(_silu(net, shape[0]))
        net.other(shape)
        net.concat(2 * shape[0])
        _csp(net, shape[0], depthwise=depthwise)
    levels = [net.shape]
    for around in reversed(lateral):
        _conv3(net, around[0], 2, depthwise=depthwise)
        net.concat(2 * around[0])
        levels.append(_csp(net, 2 * around[0], depthwise=depthwise))
    for level in levels:
        stem = _silu(net, 4 * c, at=level)
        for outs in ((80,), (4, 1)):
            net.shape = stem
            for _ in range(2):
                _conv3(net, 4 * c, depthwise=depthwise)
            for out in outs:
                net.conv(out, at=stem)
        net.shape = (85, *level[1:])
        net.other()
        net.concat(85)
    return net


def _split(net: Net, out: int, n: int, block: Callable[[int], object], share: float = 0.5) -> Shape:
    """Add YOLOv8's cross-stage block: each of n blocks reads what the one before wrote, and all are joined."""
    inner = int(out * share)
    whole = _silu(net, 2 * inner)
    net.shape = (inner, *whole[1:])
    net.other(inputs=math.prod(whole))
    for _ in range(n):
        block(inner)
    net.concat((2 + n) * inner)
    return _silu(net, out)


def _attended(net: Net, c: int) -> None:
    """Add attention over all places in heads of 64 channels, keys of 32, and two more layers."""
    found = net.shape
    heads, places = c // 64, found[1] * found[2]
    net.conv(2 * c)
    net.product((heads * places, *found[1:]), 32, c * places)
    net.other()
    net.product(found, places, (c + heads * places) * places)
    net.dw(at=found)
    net.add()
    net.conv(c)
    net.add()
    _silu(net, 2 * c)
    net.conv(c)
    net.add()


def _paths(
    net: Net, found: Sequence[Shape], outs: Sequence[int], block: Callable[[int], Shape],
    last: Callable[[int], Shape],
) -> list[Shape]:  # fmt: skip
    """Join three levels, first upwards, then downwards, with a block after each; the last block is of its own kind."""
    net.shape = found[2]
    ends = [found[2]]
    for i in (1, 0):
        coarse = net.shape
        net.other((coarse[0], *found[i][1:]))
        net.concat(coarse[0] + found[i][0])
        ends.append(block(outs[i]))
    levels = [ends[2]]
    for i, around in ((1, ends[1]), (2, ends[0])):
        _silu(net, outs[i - 1], 3, 2)
        net.concat(outs[i - 1] + around[0])
        levels.append((last if i == 2 else block)(outs[i]))
    return levels


def _distances(net: Net, levels: Sequence[Shape]) -> None:
    """Join what the heads write for every place; 16 bins a side of a box become one distance."""
    places = sum(h * w for _, h, w in levels)
    net.shape = (64 + 80, places, 1)
    net.concat(64 + 80)
    net.other((64, places, 1), inputs=64 * places)
    net.other((4, places, 1))
    net.other((80, places, 1), inputs=80 * places)


def yolov8(width: float) -> Net:
    """YOLOv8 n and s (Ultralytics), a third of the depth; 640x640, 80 classes."""
    net = Net(3, 640)

    def split(out: int, n: int = 1, *, adds: bool = False) -> Shape:
        def block(inner: int) -> None:
            _silu(net, inner, 3)
            _silu(net, inner, 3)
            if adds:
                net.add()

        return _split(net, out, n, block)

    c = int(64 * width)
    _silu(net, c, 3, 2)
    ends = []
    for times, n in ((2, 1), (4, 2), (8, 2), (16, 1)):
        _silu(net, times * c, 3, 2)
        ends.append(split(times * c, n, adds=True))
    ends[3] = _spp(net, 16 * c)
    levels = _paths(net, ends[1:], (4 * c, 8 * c, 16 * c), split, split)
    for level in levels:
        for out, inner in ((64, max(64, c)), (80, max(80, 4 * c))):
            _silu(net, inner, 3, at=level)
            _silu(net, inner, 3)
            net.conv(out)
    _distances(net, levels)
    return net


def yolo11(width: float, *, n: int = 1, widest: int = 1024, large: bool = False) -> Net:
    """YOLO11 (Ultralytics), 640x640, 80 classes; `n` blocks each, `large` ones with cross-stage blocks everywhere."""
    net = Net(3, 640)
    c = int(64 * width)

    def split(out: int, *, crosses: bool = False, share: float = 0.5) -> Shape:
        def block(inner: int) -> None:
            if crosses or large:
                _csp(net, inner, 2, adds=True, k=3)
            else:
                _silu(net, inner // 2, 3)
                _silu(net, inner, 3)
                net.add()

        return _split(net, out, n, block, share)

    last = int(widest * width)
    _silu(net, c, 3, 2)
    _silu(net, 2 * c, 3, 2)
    split(4 * c, share=0.25)
    _silu(net, 4 * c, 3, 2)
    fine = split(8 * c, share=0.25)
    _silu(net, 8 * c, 3, 2)
    middle = split(8 * c, crosses=True)
    _silu(net, last, 3, 2)
    split(last, crosses=True)
    _spp(net, last)
    whole = _silu(net, last)
    net.shape = (last // 2, *whole[1:])
    net.other(inputs=math.prod(whole))
    for _ in range(n):
        _attended(net, last // 2)
    net.concat(last)
    coarse = _silu(net, last)
    crossing = partial(split, crosses=True)
    levels = _paths(net, (fine, middle, coarse), (4 * c, 8 * c, last), split, crossing)
    for level in levels:
        net.shape = level
        for _ in range(2):
            _silu(net, max(64, c), 3)
        net.conv(64)
        net.shape = level
        for _ in range(2):
            _dw_silu(net, max(80, 4 * c), 3)
        net.conv(80)
    _distances(net, levels)
    return net
