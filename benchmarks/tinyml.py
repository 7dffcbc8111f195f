"""What networks in C take on an emulated Cortex-M, beside TFLite Micro with CMSIS-NN on the same shapes.

python -m edgecomp.benchmarks.tinyml prints a table: three networks of MLPerf Tiny's shapes with random weights, every
weight rounded to the nearest of 8 and of 4 bits. Instructions, flash and RAM depend on shapes and bits, not on what was
learned. What TFLite Micro takes was measured once, with the same compiler, options and counter (arm-none-eabi-gcc 12.2,
-O2, hard float; instructions executed in Unicorn, of a Cortex-M4), and stands below as constants. A script;
`latency_counted` takes its networks.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgecomp import reference
from edgecomp.compress import compress
from edgecomp.errors import EdgecompError
from edgecomp.exporters import export, files_of
from edgecomp.graph import Graph
from edgecomp.plan import CompressionPlan, Io, LayerPlan
from edgecomp.preprocessing import Preprocessing
from edgecomp.pytorch.calibrate import calibrate
from edgecomp.pytorch.capture import capture
from edgecomp.pytorch.networks import resnet8
from edgecomp.report import table
from edgecomp.targets import load

from .cross_compile import COMPILERS
from .firmware import FirmwareReport, measure_firmware

BITS = (8, 4)
_N_IMAGES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What TFLite Micro takes, and what share of it is asked for at most.

    Attributes:
        instructions, flash_bytes, ram_bytes: of TFLite Micro with int8 weights.
        instructions_share, flash_share, ram_share: by bits of a weight; where none is asked for, none.
    """

    instructions: int
    flash_bytes: int
    ram_bytes: int
    instructions_share: Mapping[int, float]
    flash_share: Mapping[int, float]
    ram_share: Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A network.

    Attributes:
        build: makes it.
        shape: of its input, (C, H, W).
        goal: what it is compared with.
    """

    build: type[nn.Module]
    shape: tuple[int, int, int]
    goal: Goal


def _conv(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


class ResNet8(nn.Sequential):
    """Images of 32x32 in ten classes: image classification."""

    def __init__(self) -> None:
        super().__init__(resnet8(3))


class MobileNet(nn.Sequential):
    """MobileNetV1 of a quarter of its width, images of 96x96 in two classes: visual wake words."""

    def __init__(self) -> None:
        layers, width = _conv(3, 8, 3, 2), 8
        for wider, stride in (
            (16, 1),
            (32, 2),
            (32, 1),
            (64, 2),
            (64, 1),
            (128, 2),
            *((128, 1),) * 5,
            (256, 2),
            (256, 1),
        ):
            layers += _conv(width, width, 3, stride, width) + _conv(width, wider, 1, 1)
            width = wider
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2))


class DsCnn(nn.Sequential):
    """A depthwise-separable network, spectra of 49x10 in twelve words: keyword spotting."""

    def __init__(self) -> None:
        first = [nn.ZeroPad2d((1, 1, 4, 5)), nn.Conv2d(1, 64, (10, 4), 2, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        blocks = [part for _ in range(4) for part in _conv(64, 64, 3, 1, 64) + _conv(64, 64, 1, 1)]
        super().__init__(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 12))


NETWORKS: Mapping[str, Entry] = {
    "ResNet-8": Entry(
        build=ResNet8,
        shape=(3, 32, 32),
        goal=Goal(
            instructions=29_470_000,
            flash_bytes=149_200,
            ram_bytes=56_500,
            instructions_share={8: 0.55, 4: 0.58},
            flash_share={8: 0.62, 4: 0.36},
            ram_share={8: 0.70, 4: 0.72},
        ),
    ),
    "MobileNetV1 0.25": Entry(
        build=MobileNet,
        shape=(3, 96, 96),
        goal=Goal(
            instructions=23_470_000,
            flash_bytes=386_200,
            ram_bytes=100_700,
            instructions_share={4: 0.65},
            flash_share={4: 0.45},
            ram_share={4: 0.80},
        ),
    ),
    "DS-CNN": Entry(
        build=DsCnn,
        shape=(1, 49, 10),
        goal=Goal(
            instructions=7_520_000,
            flash_bytes=106_800,
            ram_bytes=22_800,
            instructions_share={4: 0.65},
            flash_share={4: 0.45},
            ram_share={4: 0.80},
        ),
    ),
}
"""RAM of TFLite Micro: the arena, in which input and output lie; for ResNet-8 static memory and stack as well."""


def quantized(name: str, build: Callable[[], nn.Module], shape: tuple[int, int, int], bits: int) -> Graph:
    """Build, capture and compress a network, for integer input (C, H, W) and output."""
    torch.manual_seed(0)
    graph = capture(build().eval(), shape, name=name)
    images = np.random.default_rng(0).standard_normal((_N_IMAGES, *shape)).astype(np.float32)
    plan = CompressionPlan(
        graph_digest=graph.digest(),
        io=Io.INT8,
        layers={n.name: LayerPlan(keep=(True,) * graph.weight(n).shape[0], weight_bits=bits) for n in graph.layers()},
        ranges=calibrate(graph, [images]),
        preprocessing=Preprocessing(mean=(0.0,), std=(1.0,)),
    )
    return compress(graph, plan)


def measured(graph: Graph, target: str, n_images: int, compiler: str | None) -> FirmwareReport:
    """Run a compressed network on a core, on random codes.

    Raises:
        ParityError: an output is not the reference's.
        TargetError: a tool is missing, or fails.
    """
    shape = graph.tensors[graph.inputs[0]].shape[1:]
    codes = np.random.default_rng(1).integers(-128, 128, size=(n_images, *shape), dtype=np.int8)
    wanted = reference.run(graph, {graph.inputs[0]: codes})[graph.outputs[0]]
    with tempfile.TemporaryDirectory() as folder:
        files = files_of(export(graph, "c"))
        images = codes.transpose(0, 2, 3, 1)
        return measure_firmware(files, target, load(target).cpu, images, wanted, Path(folder), compiler=compiler)


def row(name: str, bits: int, report: FirmwareReport) -> tuple[str, ...]:
    """Give the table's row: figures, and in brackets the share of TFLite Micro's and what was asked for."""
    goal = NETWORKS[name].goal

    def cell(got: int, theirs: int, asked: Mapping[int, float]) -> str:
        share = f"{got:,} ({got / theirs:.2f}x"
        if bits not in asked:
            return f"{share})"
        return f"{share}, at most {asked[bits]:.2f}x: {'met' if got <= asked[bits] * theirs else 'missed'})"

    return (
        name,
        str(bits),
        cell(report.instructions, goal.instructions, goal.instructions_share),
        cell(report.flash_bytes, goal.flash_bytes, goal.flash_share),
        cell(report.ram_bytes, goal.ram_bytes, goal.ram_share),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m edgecomp.benchmarks.tinyml", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--target", default="cortex-m4", help="a core of edgecomp targets; the goals are of the default"
    )
    parser.add_argument("--images", type=int, default=1, help="run so many and compare them with the reference")
    parser.add_argument("--compiler", choices=COMPILERS, help="the goals are of gcc; default: the first that is there")
    args = parser.parse_args(argv)
    rows, report = [], None
    try:
        for name in NETWORKS:
            for bits in BITS:
                graph = quantized(name, NETWORKS[name].build, NETWORKS[name].shape, bits)
                report = measured(graph, args.target, max(1, args.images), args.compiler)
                rows.append(row(name, bits, report))
                print(" | ".join(rows[-1]), flush=True)
    except EdgecompError as e:
        parser.error(str(e))
    header = ("network", "bits", "instructions (of TFLite Micro's, int8)", "flash bytes", "RAM bytes")
    print(f"\n{table(rows, header)}\n")
    assert report is not None
    print(f"Emulated: {args.target} by {report.emulator}, compiled by {report.compiler}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
