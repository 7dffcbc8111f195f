"""What a device for three of ten classes gains: channels cut for these classes, beside class-blind magnitude.

python -m edgecomp.benchmarks.classes --weights ../shared/models/vgg16_bn_cifar.pt --data D

with D = folder:../shared/data/cifar10-jpeg.zip takes VGG16-BN on CIFAR-10 and random triples of classes. Ours:
`edgecomp build --classes ... --prune SHARE`, scored and made up for with training images of the triple. The rival cuts
channels of the ten-class network by the mean size of their weights, in one global ranking, without images, and then
answers with the triple alone. No training. Every row is an int8 ONNX file, measured in onnxruntime on all test images
of the triple. A script: nobody imports it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edgecomp.channels import floors, next_slice, slices
from edgecomp.compress import compress, cut
from edgecomp.data import DataSet, LabelledImages, draw, load
from edgecomp.errors import EdgecompError
from edgecomp.exporters import export
from edgecomp.graph import Array, Graph
from edgecomp.plan import CompressionPlan, Io, LayerPlan
from edgecomp.preprocessing import Preprocessing
from edgecomp.pytorch.calibrate import calibrate
from edgecomp.pytorch.capture import capture
from edgecomp.pytorch.load import load_module
from edgecomp.pytorch.prune import FLOOR, prune
from edgecomp.pytorch.scores import Score, Scorer
from edgecomp.report import table
from edgecomp.selection import select_classes

from .accuracy import accuracy
from .runners import OnnxRuntime

MODEL = "edgecomp.pytorch.networks:vgg16_bn_cifar"
PREPROCESSING = Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
RIVAL_SHARES = (0.05, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.3, 0.4, 0.5)
LOST = 5.0
"""Points that class-blind magnitude pruning has lost where sizes are compared."""
_RANGE_IMAGES = 128
_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One file.

    Attributes:
        share: of the network's weights that were cut.
        n_bytes: of the ONNX file.
        percent: of the test images right.
    """

    share: float
    n_bytes: int
    percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How a triple came out; points lost are against the uncut float network on the same classes.

    Attributes:
        rival_bytes: where the rival has lost LOST points, between its measured files.
        lost_there: points that ours has lost in its largest file of at most that size.
        lost_at_quarter: points that ours has lost in its largest file of at most a quarter of the ten-class file.
    """

    rival_bytes: int
    lost_there: float
    lost_at_quarter: float


def judge(uncut_percent: float, ten_class_bytes: int, ours: Sequence[Point], rival: Sequence[Point]) -> Verdict:
    """Compare by bytes.

    Args:
        uncut_percent: accuracy of the uncut network.
        ten_class_bytes: of the int8 file with all classes.
        ours: by falling size, beginning with nothing cut.
        rival: the same.
    """
    rival_bytes = rival[-1].n_bytes
    for before, after in itertools.pairwise(rival):
        lost_before, lost_after = uncut_percent - before.percent, uncut_percent - after.percent
        if lost_after >= LOST:
            part = max(0.0, LOST - lost_before) / (lost_after - lost_before)
            rival_bytes = round(before.n_bytes + part * (after.n_bytes - before.n_bytes))
            break

    def lost_within(limit: float) -> float:
        return uncut_percent - next((p.percent for p in ours if p.n_bytes <= limit), 0.0)

    return Verdict(
        rival_bytes=rival_bytes,
        lost_there=lost_within(rival_bytes),
        lost_at_quarter=lost_within(ten_class_bytes / 4),
    )


def int8_file(graph: Graph, batches: Sequence[Array]) -> bytes:
    """Export at 8 bits, rounded to nearest, with activation ranges of these images."""
    layers = {
        node.name: LayerPlan(keep=(True,) * graph.weight(node).shape[0], weight_bits=8) for node in graph.layers()
    }
    plan = CompressionPlan(
        graph_digest=graph.digest(),
        io=Io.FLOAT,
        layers=layers,
        ranges=calibrate(graph, batches),
        preprocessing=PREPROCESSING,
    )
    data: bytes = export(compress(graph, plan), "onnx").data
    return data


def _point(share: float, graph: Graph, batches: Sequence[Array], test: LabelledImages) -> Point:
    data = int8_file(graph, batches[: max(1, _RANGE_IMAGES // _BATCH)])
    percent, _ = accuracy(OnnxRuntime(data, threads=torch.get_num_threads()), test, PREPROCESSING)
    return Point(share=share, n_bytes=len(data), percent=percent)


def mean_sizes(graph: Graph) -> dict[str, Array]:
    """Give the mean absolute weight of each output channel: layer name -> float64 (O,)."""
    found = {}
    for node in graph.layers():
        data = graph.weight(node).data
        assert data is not None
        found[node.name] = np.abs(data).reshape(len(data), -1).mean(axis=1, dtype=np.float64)
    return found


def _batches(images: LabelledImages) -> list[tuple[Array, Array]]:
    starts = range(0, len(images), _BATCH)
    return [(images.inputs(PREPROCESSING, i, i + _BATCH), images.labels[i : i + _BATCH]) for i in starts]


def _rival(whole: Graph, triple: Sequence[int], batches: Sequence[Array], test: LabelledImages) -> list[Point]:
    n_weights = sum(int(np.prod(whole.weight(node).shape)) for node in whole.layers())
    points = []
    for share in (0.0, *RIVAL_SHARES):
        keep = next_slice(whole, mean_sizes(whole), floors(whole, FLOOR), round((1 - share) * n_weights))
        points.append(_point(share, select_classes(cut(whole, keep), triple), batches, test))
        if points[0].percent - points[-1].percent > 2 * LOST:
            break
    return points


def _ours(graph: Graph, train: LabelledImages, test: LabelledImages, shares: Sequence[float]) -> list[Point]:
    scorer = Scorer(kind=Score.LRP, batches=_batches(train))
    batches = [images for images, _ in scorer.batches]
    points = [_point(0.0, graph, batches, test)]
    for share, (smaller, _) in zip(
        shares, prune(graph, batches, shares=shares, criterion=scorer.channels), strict=True
    ):
        points.append(_point(share, smaller, batches, test))
    return points


def _uncut(graph: Graph, test: LabelledImages) -> float:
    percent, _ = accuracy(OnnxRuntime(export(graph, "onnx").data, threads=torch.get_num_threads()), test, PREPROCESSING)
    return percent


def _run(whole: Graph, data: DataSet, triples: Sequence[Sequence[int]], shares: Sequence[float], n: int) -> None:
    any_class = [x for x, _ in _batches(draw(data.train, _RANGE_IMAGES, seed=0))]
    ten_bytes = len(int8_file(whole, any_class))
    print(f"ten classes, int8 ONNX: {ten_bytes} bytes", flush=True)
    verdicts = []
    for triple in triples:
        chosen = data.of_classes(triple)
        graph = select_classes(whole, triple)
        uncut = _uncut(graph, chosen.test)
        train = draw(chosen.train, n, seed=0)
        rival = _rival(whole, triple, [x for x, _ in _batches(train)], chosen.test)
        ours = _ours(graph, train, chosen.test, shares)
        rows = [
            (
                name,
                f"{p.share:.3f}",
                p.n_bytes,
                f"{p.n_bytes / ten_bytes:.3f}",
                f"{p.percent:.2f}",
                f"{p.percent - uncut:+.2f}",
            )
            for name, points in (("magnitude, all classes", rival), ("relevance, these classes", ours))
            for p in points
        ]
        print(f"\n{', '.join(chosen.classes)}: float {uncut:.2f} % of {len(chosen.test)}\n")
        print(
            table(rows, ("channels cut by", "weights cut", "bytes", "of ten classes", "accuracy", "points")), flush=True
        )
        verdicts.append((chosen.classes, judge(uncut, ten_bytes, ours, rival)))
    summary = [
        (", ".join(names), v.rival_bytes, f"{v.lost_there:.2f}", f"{v.lost_at_quarter:.2f}") for names, v in verdicts
    ]
    there, quarter = (
        float(np.mean([getattr(v, key) for _, v in verdicts])) for key in ("lost_there", "lost_at_quarter")
    )
    summary.append(("mean", "", f"{there:.2f}", f"{quarter:.2f}"))
    header = ("classes", f"bytes where magnitude lost {LOST:g}", "ours lost there", "ours lost at a quarter")
    print("\n" + table(summary, header))


def main() -> int:
    """Measure and print; 2 with one line where what was asked for cannot be."""
    p = argparse.ArgumentParser(prog="python -m edgecomp.benchmarks.classes")
    p.add_argument("--weights", type=Path, required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--triples", type=int, choices=range(1, 121), default=5, metavar="N", help="how many random triples")
    p.add_argument("--calib", type=int, default=512, help="training images to score and make up with")
    p.add_argument("--share", type=float, default=0.95, help="of the weights to be cut in the end")
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    triples: list[list[int]] = []
    while len(triples) < args.triples:
        drawn = sorted(rng.choice(10, 3, replace=False).tolist())
        if drawn not in triples:
            triples.append(drawn)
    try:
        whole = capture(load_module(MODEL, args.weights), (3, 32, 32), name="vgg16_bn_cifar")
        _run(whole, load(args.data), triples, slices(args.share), args.calib)
    except EdgecompError as e:
        print(f"{p.prog}: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
