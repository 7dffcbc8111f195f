"""The networks that README says to run: torchvision's classifiers and others, each with the input it is tried on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from edgecomp.pytorch.load import load_module
from edgecomp.pytorch.torchvision_ops import define_missing_operators

N_CLASSES = 10
WIDTHS = (4, 2, 3, 5, 8, 6, 7)
"""Bits of the layers but the first and last, which have 8, by turns."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A network.

    Attributes:
        build: makes it.
        shape: of its input, without N.
        trained: on ImageNet, with weights in a package of its own; else they are random.
        widths: bits of the layers but the first and last, which have 8, by turns.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 64, 64)
    trained: bool = False
    widths: tuple[int, ...] = WIDTHS


class KeywordSpotter(nn.Module):
    """Convolutions over time on spectra (N, bands, frames), as for keywords: plain ones, pools, a mean over time."""

    def __init__(self, n_bands: int = 40, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(n_bands, width, 5, padding=2, bias=False)
        self.bn1 = nn.BatchNorm1d(width)
        self.pool1 = nn.MaxPool1d(2)
        self.conv2 = nn.Conv1d(width, width, 3, padding="same", dilation=2)
        self.bn2 = nn.BatchNorm1d(width)
        self.pool2 = nn.AvgPool1d(2)
        self.conv3 = nn.Conv1d(width, 2 * width, 3)
        self.fc = nn.Linear(2 * width, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool1(torch.relu(self.bn1(self.conv1(x))))
        x = self.pool2(torch.relu(self.bn2(self.conv2(x))))
        x = torch.relu(self.conv3(x)).mean(dim=-1)
        logits: torch.Tensor = self.fc(x)
        return logits


class SeparableKeywordSpotter(nn.Module):
    """The same by depthwise-separable convolutions and residual sums, causal: each frame hears the past alone."""

    def __init__(self, n_bands: int = 40, width: int = 64, n_blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(n_bands, width, 1, bias=False), nn.BatchNorm1d(width), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ConstantPad1d((8 * 2**i, 0), 0.0),
                nn.Conv1d(width, width, 9, groups=width, dilation=2**i, bias=False),
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.Conv1d(width, width, 1, bias=False),
                nn.BatchNorm1d(width),
            )
            for i in range(n_blocks)
        )
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.fc = nn.Linear(width, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(block(x) + x)
        logits: torch.Tensor = self.fc(self.pool(x).flatten(1))
        return logits


def _torchvision(name: str, **options: object) -> nn.Module:
    define_missing_operators()
    import torchvision.models as zoo

    module: nn.Module = zoo.get_model(name, weights=None, num_classes=N_CLASSES, **options)
    return module


def _pooled_to_a_pixel(name: str, n_features: int, place: int) -> nn.Module:
    """Give a network made for 224x224 the head that small images need: its pool gives one pixel, not 6x6 or 7x7."""
    module = _torchvision(name)
    module.avgpool = nn.AdaptiveAvgPool2d(1)
    first = module.classifier[place]  # type: ignore[index, operator]
    module.classifier[place] = nn.Linear(n_features, first.out_features)  # type: ignore[index, operator]
    return module


NETWORKS: Mapping[str, Entry] = {
    "alexnet": Entry(build=partial(_pooled_to_a_pixel, "alexnet", 256, 1)),
    **{
        name: Entry(build=partial(_pooled_to_a_pixel, name, 512, 0), shape=(3, 32, 32))
        for name in ("vgg11", "vgg16", "vgg11_bn", "vgg16_bn")
    },
    **{
        name: Entry(build=partial(_torchvision, name))
        for name in (
            "resnet18", "resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "squeezenet1_1", "mobilenet_v2",
            "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet1_0", "shufflenet_v2_x1_0", "efficientnet_b0",
            "densenet121", "regnet_y_400mf",
        )
    },
    "googlenet": Entry(build=partial(_torchvision, "googlenet", aux_logits=False, init_weights=False)),
    "inception_v3": Entry(
        build=partial(_torchvision, "inception_v3", aux_logits=False, init_weights=False), shape=(3, 96, 96)
    ),
    "keywords_conv1d": Entry(build=KeywordSpotter, shape=(40, 101)),
    "keywords_separable_conv1d": Entry(build=SeparableKeywordSpotter, shape=(40, 101)),
    "efficientnet_lite0": Entry(
        build=partial(load_module, "edgecomp.pytorch.networks:efficientnet_lite0", None),
        shape=(3, 160, 160),
        trained=True,
        widths=(4, 5, 6, 7, 8),  # rounding to 2 bits without more leaves nothing of what it was trained for
    ),
}  # fmt: skip


def built(name: str) -> nn.Module:
    """Build a network, the same at each call."""
    torch.manual_seed(0)
    return NETWORKS[name].build()
