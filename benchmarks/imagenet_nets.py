"""More classifiers whose latency others have published: as their papers' tables have them; ncnn's where they differ."""

from __future__ import annotations

from collections.abc import Sequence

from .netshapes import Net, Shape

# ---- one path --------------------------------------------------------------------------------------------------------

# Squeezed channels of each fire module (arXiv:1602.07360), 0 a pooling; what it writes is eight times as many.
FIRES_1_0 = (0, 16, 16, 32, 0, 32, 48, 48, 64, 0, 64)
FIRES_1_1 = (0, 16, 16, 0, 32, 32, 0, 48, 48, 64, 64)


def fires(net: Net, modules: Sequence[int], *, rounds_up: bool = True) -> None:
    """Add fire modules and poolings of 3x3 without padding."""
    for squeezed in modules:
        if not squeezed:
            # Rounded up, 3x3 over 2 writes as many as 2x2 rounded down.
            net.pool(2, 2 if rounds_up else 3, valid=True)
            continue
        found = net.conv(squeezed)
        net.conv(4 * squeezed)
        net.conv(4 * squeezed, 3, at=found)
        net.concat(8 * squeezed)


def squeezenet(
    modules: Sequence[int] = FIRES_1_1, size: int = 224, classes: int = 1000, *, pads_first: bool = False,
    pads_last: bool = False,
) -> Net:  # fmt: skip
    """SqueezeNet 1.0 and 1.1; TVM's pads the first convolution and rounds down, ncnn's pads the last one, too."""
    net = Net(3, size)
    out, k = (96, 7) if modules is FIRES_1_0 else (64, 3)
    net.conv(out, k, 2, pad=None if pads_first else 0)
    fires(net, modules, rounds_up=not pads_first)
    net.conv(classes, pad=int(pads_last))
    net.gap()
    return net


def torchvision_alexnet() -> Net:
    """AlexNet in one column (arXiv:1404.5997), 224x224, as torchvision has it."""
    net = Net(3, 224)
    net.conv(64, 11, 4, pad=2)
    net.pool(2, 3, valid=True)
    net.conv(192, 5)
    net.pool(2, 3, valid=True)
    for out in (384, 256, 256):
        net.conv(out, 3)
    net.pool(2, 3, valid=True)
    for out in (4096, 4096, 1000):
        net.fc(out)
    return net


# ---- residual --------------------------------------------------------------------------------------------------------


def bottlenecks(
    blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64, *, early: bool = False, preact: bool = False
) -> Net:
    """ResNet-50 and wider or deeper ones (arXiv:1512.03385, arXiv:1605.07146).

    Args:
        blocks: of each stage.
        width: of the first stage's 3x3 convolutions.
        early: the 1x1 convolution strides, as in the paper, not the 3x3 one.
        preact: batch norms stand before convolutions (arXiv:1603.05027): each block's first cannot be folded.
    """
    net = Net(3, 224)
    net.conv(64, 7, 2)
    net.pool(2, 3)
    for stage, n in enumerate(blocks):
        inner = width << stage
        for i in range(n):
            found, s = net.shape, 2 if stage and not i else 1
            if preact:
                net.other()
            net.conv(inner, 1, s if early else 1)
            net.conv(inner, 3, 1 if early else s)
            net.conv(256 << stage)
            if not i:
                net.conv(256 << stage, 1, s, at=found)
            net.add()
    if preact:
        net.other()
    net.gap()
    net.fc(1000)
    return net


def densenet121() -> Net:
    """DenseNet-121 (arXiv:1608.06993); a batch norm of what was joined cannot be folded."""
    net = Net(3, 224)
    net.conv(64, 7, 2)
    net.pool(2, 3)
    for stage, n in enumerate((6, 12, 24, 16)):
        if stage:
            net.other()
            net.conv(net.shape[0] // 2)
            net.pool()
        for _ in range(n):
            channels = net.shape[0]
            net.other()
            net.conv(128)
            net.conv(32, 3)
            net.concat(channels + 32)
    net.other()
    net.gap()
    net.fc(1000)
    return net


# ---- searched --------------------------------------------------------------------------------------------------------

# Kernel, expansion, out, repeats, first stride.
MNASNET = (
    (3, 3, 24, 3, 2), (5, 3, 40, 3, 2), (5, 6, 80, 3, 2), (3, 6, 96, 2, 1), (5, 6, 192, 4, 2), (3, 6, 320, 1, 1),
)  # fmt: skip
# ProxylessNAS for mobiles, one block after the other.
PROXYLESS = (
    (5, 1.5, 32, 1, 2), (3, 3, 32, 1, 1), (7, 3, 40, 1, 2), (3, 3, 40, 1, 1), (5, 3, 40, 2, 1), (7, 6, 80, 1, 2),
    (5, 3, 80, 3, 1), (5, 6, 96, 1, 1), (5, 3, 96, 3, 1), (7, 6, 192, 1, 2), (7, 6, 192, 1, 1), (7, 3, 192, 2, 1),
    (7, 6, 320, 1, 1),
)  # fmt: skip
EFFICIENTNET = (
    (3, 1, 16, 1, 1), (3, 6, 24, 2, 2), (5, 6, 40, 2, 2), (3, 6, 80, 3, 2), (5, 6, 112, 3, 1), (5, 6, 192, 4, 2),
    (3, 6, 320, 1, 1),
)  # fmt: skip


def inverted_residual(
    net: Net, k: int, expansion: float, out: int, s: int, *, swish: bool = False, excites: bool = False
) -> None:
    """Add a block of MobileNetV2's kind; excitation squeezes to a quarter of what the block read."""
    before = net.shape[0]
    if expansion > 1:
        net.conv(int(before * expansion))
        if swish:
            net.other()
    net.dw(k, s)
    if swish:
        net.other()
    if excites:
        net.excite(before // 4, swish=swish)
    net.conv(out)
    if s == 1 and out == before:
        net.add()


def searched(blocks: Sequence[tuple[int, float, int, int, int]], first: int) -> Net:
    """MnasNet-B1 (arXiv:1807.11626) and ProxylessNAS (arXiv:1812.00332), `first` what its first block writes."""
    net = Net(3, 224)
    net.conv(32, 3, 2)
    net.dw()
    net.conv(first)
    for k, expansion, out, n, s in blocks:
        for i in range(n):
            inverted_residual(net, k, expansion, out, 1 if i else s)
    net.conv(1280)
    net.gap()
    net.fc(1000)
    return net


def efficientnet_b0() -> Net:
    """EfficientNet-B0 (arXiv:1905.11946)."""
    net = Net(3, 224)
    net.conv(32, 3, 2)
    net.other()
    for k, expansion, out, n, s in EFFICIENTNET:
        for i in range(n):
            inverted_residual(net, k, expansion, out, 1 if i else s, swish=True, excites=True)
    net.conv(1280)
    net.other()
    net.gap()
    net.fc(1000)
    return net


# Out, expansion, repeats, first stride; whether a 3x3 convolution expands instead of 1x1 and depthwise.
EFFICIENTNET_V2 = (
    (16, 1, 1, 1, True), (32, 4, 2, 2, True), (48, 4, 2, 2, True), (96, 4, 3, 2, False), (112, 6, 5, 1, False),
    (192, 6, 8, 2, False),
)  # fmt: skip


def efficientnetv2_b0() -> Net:
    """EfficientNetV2-B0 (arXiv:2104.00298)."""
    net = Net(3, 224)
    net.conv(32, 3, 2)
    net.other()
    for out, expansion, n, first, fused in EFFICIENTNET_V2:
        for i in range(n):
            before, s = net.shape[0], 1 if i else first
            if not fused:
                inverted_residual(net, 3, expansion, out, s, swish=True, excites=True)
                continue
            net.conv(before * expansion if expansion > 1 else out, 3, s)
            net.other()
            if expansion > 1:
                net.conv(out)
                if s == 1 and out == before:
                    net.add()
    net.conv(1280)
    net.other()
    net.gap()
    net.fc(1000)
    return net


# ---- shuffled --------------------------------------------------------------------------------------------------------


def shufflenet() -> Net:
    """ShuffleNet in three groups (arXiv:1707.01083)."""
    net = Net(3, 224)
    net.conv(24, 3, 2)
    net.pool(2, 3)
    for out, n in ((240, 4), (480, 8), (960, 4)):
        for i in range(n):
            found, s = net.shape, 1 if i else 2
            written = out if i else out - found[0]
            groups = 1 if found[0] == 24 else 3
            net.conv(written // 4, groups=groups)
            if groups > 1:
                net.other()
            net.dw(s=s)
            net.conv(written, groups=3)
            if i:
                net.add()
            else:
                net.other(inputs=found[0] * found[1] * found[2])
                net.concat(out)
    net.gap()
    net.fc(1000)
    return net


def shuffle_stages(net: Net, widths: Sequence[int]) -> list[Shape]:
    """Add the stages of ShuffleNetV2 (arXiv:1807.11164); give what each wrote."""
    ends = []
    for width, n in zip(widths, (4, 8, 4), strict=True):
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


def shufflenet_v2(widths: Sequence[int] = (116, 232, 464), last: int = 1024) -> Net:
    """ShuffleNetV2 (arXiv:1807.11164), width 1.0 unless told."""
    net = Net(3, 224)
    net.conv(24, 3, 2)
    net.pool(2, 3)
    shuffle_stages(net, widths)
    net.conv(last)
    net.gap()
    net.fc(1000)
    return net


# ---- inception -------------------------------------------------------------------------------------------------------

Kernel = int | tuple[int, int]


def _branch(net: Net, found: Shape, *convs: tuple[int, Kernel], s: int = 1) -> Shape:
    """Add convolutions (out, kernel) one after the other; with a stride, the last one has it, without padding."""
    net.shape = found
    for i, (out, k) in enumerate(convs):
        strides = s > 1 and i == len(convs) - 1
        net.conv(out, k, s if strides else 1, pad=0 if strides else None)
    return net.shape


def _join(net: Net, ends: Sequence[Shape]) -> None:
    net.shape = ends[-1]
    net.concat(sum(end[0] for end in ends))


# Out of 1x1, into and out of 3x3, into and out of 5x5, out of the pooled one.
GOOGLENET = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    ((192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64), (112, 144, 288, 32, 64, 64),
     (256, 160, 320, 32, 128, 128)),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)  # fmt: skip


def googlenet(*, torchvision: bool = False) -> Net:
    """GoogLeNet (arXiv:1409.4842); torchvision's has 3x3 where the paper has 5x5, and no normalisation of responses."""
    net = Net(3, 224)
    net.conv(64, 7, 2)
    net.pool(2, 3)
    if not torchvision:
        net.other()
    net.conv(64)
    net.conv(192, 3)
    if not torchvision:
        net.other()
    for stage in GOOGLENET:
        net.pool(2, 3)
        for one, into3, three, into5, five, pooled in stage:
            found = net.shape
            ends = [_branch(net, found, (one, 1)), _branch(net, found, (into3, 1), (three, 3))]
            ends.append(_branch(net, found, (into5, 1), (five, 3 if torchvision else 5)))
            net.shape = found
            net.other()
            ends.append(net.conv(pooled))
            _join(net, ends)
    net.gap()
    net.fc(1000)
    return net


def _pooled(net: Net, found: Shape, out: int) -> Shape:
    net.shape = found
    net.other()
    return net.conv(out)


def _halved(net: Net, found: Shape, ends: list[Shape]) -> None:
    net.shape = found
    net.pool(2, 3, valid=True)
    _join(net, [*ends, net.shape])


def inception_v3() -> Net:
    """Inception-v3 (arXiv:1512.00567), 299x299."""
    net = Net(3, 299)
    net.conv(32, 3, 2, pad=0)
    net.conv(32, 3, pad=0)
    net.conv(64, 3)
    net.pool(2, 3, valid=True)
    net.conv(80)
    net.conv(192, 3, pad=0)
    net.pool(2, 3, valid=True)
    wide: Kernel = (1, 7)
    tall: Kernel = (7, 1)
    for pooled in (32, 64, 64):
        found = net.shape
        ends = [_branch(net, found, (64, 1)), _branch(net, found, (48, 1), (64, 5))]
        ends += [_branch(net, found, (64, 1), (96, 3), (96, 3)), _pooled(net, found, pooled)]
        _join(net, ends)
    found = net.shape
    _halved(net, found, [_branch(net, found, (384, 3), s=2), _branch(net, found, (64, 1), (96, 3), (96, 3), s=2)])
    for c in (128, 160, 160, 192):
        found = net.shape
        ends = [_branch(net, found, (192, 1)), _branch(net, found, (c, 1), (c, wide), (192, tall))]
        ends.append(_branch(net, found, (c, 1), (c, tall), (c, wide), (c, tall), (192, wide)))
        _join(net, [*ends, _pooled(net, found, 192)])
    found = net.shape
    ends = [_branch(net, found, (192, 1), (320, 3), s=2)]
    ends.append(_branch(net, found, (192, 1), (192, wide), (192, tall), (192, 3), s=2))
    _halved(net, found, ends)
    for _ in range(2):
        found = net.shape
        ends = [_branch(net, found, (320, 1))]
        for into in (((384, 1),), ((448, 1), (384, 3))):
            split = _branch(net, found, *into)
            halves = [_branch(net, split, (384, kernel)) for kernel in ((1, 3), (3, 1))]
            _join(net, halves)
            ends.append(net.shape)
        _join(net, [*ends, _pooled(net, found, 192)])
    net.gap()
    net.fc(1000)
    return net
