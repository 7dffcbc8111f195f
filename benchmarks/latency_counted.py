"""What our own C takes, estimated from emulated instructions: what the estimator's runtime `c` is fitted to.

python -m edgecomp.benchmarks.latency_counted --write stores latency_counted.csv, a row a layer: networks with random
weights of 8 bits are compiled for a Cortex-M4 and a Cortex-M0+, run in the emulator, and what they executed is
multiplied by the cycles that Arm publishes, fewest and most; latency_ms is the middle. Nothing in it is measured or
published. A layer has its share of the network's instructions and is taken to be the same mix, as in `from_counts`.
Tens of minutes. Not here: the fit (`latency_fit`).
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from edgecomp.cycles import cycles_of
from edgecomp.errors import EdgecompError
from edgecomp.files import write_file
from edgecomp.pytorch.networks import resnet8
from edgecomp.pytorch.torchvision_ops import define_missing_operators
from edgecomp.targets import load
from edgecomp.work import work_of

from . import tinyml
from .latency_rows import COUNTED

BOARDS: Mapping[str, str] = {"cortex-m4": "nucleo-l4r5zi", "cortex-m0plus": "nucleo-g0b1re"}
"""The board whose clock stands in the rows of an emulated core."""


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups), nn.ReLU()]


def _head(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def _separable(width: int, blocks: Sequence[tuple[int, int]], kernel: int, classes: int) -> nn.Module:
    """Give depthwise and pointwise convolutions in turn, after one that reads the image; blocks are (width, stride)."""
    layers = _conv(3, width, 3, 2)
    for wider, stride in blocks:
        layers += _conv(width, width, kernel, stride, width) + _conv(width, wider, 1)
        width = wider
    return nn.Sequential(*layers, *_head(width, classes))


def _plain() -> nn.Module:
    """Give convolutions of 3x3 and pooling in turn, as VGG, for small images."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        layers += [*_conv(inputs, outputs, 3), *_conv(outputs, outputs, 3), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))


def _connected(*widths: int) -> nn.Module:
    """Give fully connected layers alone."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _lenet() -> nn.Module:
    layers = [*_conv(1, 6, 5), nn.MaxPool2d(2), *_conv(6, 16, 5), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, _connected(784, 120, 84, 10))


class _Fire(nn.Module):
    """SqueezeNet's block: to few channels, and from them by 1x1 and 3x3 to many, joined."""

    def __init__(self, inputs: int, few: int, many: int) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(*_conv(inputs, few, 1))
        self.one, self.three = (nn.Sequential(*_conv(few, many, kernel)) for kernel in (1, 3))

    def forward(self, x: Tensor) -> Tensor:
        few = self.squeeze(x)
        return torch.cat((self.one(few), self.three(few)), 1)


def _squeezenet() -> nn.Module:
    return nn.Sequential(
        *_conv(3, 16, 3, 2), nn.MaxPool2d(2), _Fire(16, 8, 16), _Fire(32, 8, 16), nn.MaxPool2d(2), _Fire(32, 16, 32),
        *_conv(64, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def _mobilenet_v2() -> nn.Module:
    define_missing_operators()
    from torchvision.models import mobilenet_v2

    made: nn.Module = mobilenet_v2(width_mult=0.35, num_classes=5)
    return made


_V1_HALF = ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (256, 2), *((256, 1),) * 5, (512, 2), (512, 1))
_FIVES = ((32, 1), (48, 2), (48, 1), (96, 2))
NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "perceptron": (lambda: _connected(784, 64, 32, 10), (1, 28, 28)),
    "autoencoder": (lambda: _connected(640, 128, 128, 128, 128, 8, 128, 128, 128, 128, 640), (1, 1, 640)),
    "LeNet-like": (_lenet, (1, 28, 28)),
    "squeezenet-like": (_squeezenet, (3, 48, 48)),
    "depthwise 5x5": (lambda: _separable(16, _FIVES, 5, 10), (3, 48, 48)),
    "plain 3x3": (_plain, (3, 16, 16)),
    "DS-CNN": (tinyml.NETWORKS["DS-CNN"].build, tinyml.NETWORKS["DS-CNN"].shape),
    "MobileNetV2 0.35": (_mobilenet_v2, (3, 64, 64)),
    "MobileNetV1 0.5": (lambda: _separable(16, _V1_HALF, 3, 2), (3, 48, 48)),
    "MobileNetV1 0.25": (tinyml.NETWORKS["MobileNetV1 0.25"].build, tinyml.NETWORKS["MobileNetV1 0.25"].shape),
    "the sample": (resnet8, (1, 28, 28)),
    "ResNet-8": (tinyml.NETWORKS["ResNet-8"].build, tinyml.NETWORKS["ResNet-8"].shape),
}
"""What makes a network, and the shape of its input, (C, H, W); small ones first."""


def rows_of(name: str, core: str) -> Iterator[dict[str, object]]:
    """Run a network on an emulated core and give its layers.

    Raises:
        TargetError: the compiler or the emulator is missing.
    """
    build, shape = NETWORKS[name]
    graph = tinyml.quantized(name, build, shape, 8)
    report = tinyml.measured(graph, core, 1, None)
    board = load(BOARDS[core])
    assert board.clock_hz
    low, high = (1e3 * n / board.clock_hz / report.instructions for n in cycles_of(report.cpu, report.classes))
    # A sum that a convolution adds as it writes is in the convolution's step, "conv + add".
    steps = {step.partition(" + ")[0]: n for step, n in report.steps.items()}
    layers = work_of(graph)
    assert steps.keys() <= {work.name for work in layers}, "a step of the network in C is none of its layers"
    for work in layers:
        n = steps.get(work.name, 0)
        yield {
            "device": board.name,
            "cpu": report.cpu,
            "clock_mhz": f"{board.clock_hz / 1e6:g}",
            "model": name,
            **asdict(work),
            "instructions": n,
            "latency_ms": f"{n * (low + high) / 2:.5g}",
            "low_ms": f"{n * low:.5g}",
            "high_ms": f"{n * high:.5g}",
            "source": f"estimated: instructions in {report.emulator} ({report.compiler}) x Arm's published cycles",
        }


def to_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Give the file, rows of `rows_of`."""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def main() -> None:
    """Count all networks on all cores, print what they take, and write the rows where that is asked for."""
    parser = argparse.ArgumentParser(description="estimate what our own C takes from emulated instructions")
    parser.add_argument("--write", action="store_true", help=f"store {COUNTED}")
    args = parser.parse_args()
    rows = []
    for name in NETWORKS:
        for core, board in BOARDS.items():
            try:
                layers = list(rows_of(name, core))
            except EdgecompError as e:
                raise SystemExit(f"latency_counted: {name}: {e}") from e
            ms = sum(float(str(row["latency_ms"])) for row in layers)
            print(f"{name} on {board}: estimated {ms:.4g} ms", flush=True)
            rows += layers
    if args.write:
        write_file(Path(str(resources.files(__package__).joinpath(COUNTED))), to_csv(rows).encode())


if __name__ == "__main__":
    main()
