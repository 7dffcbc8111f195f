"""What runs where: `python -m tests.matrix` measures every network of `zoo` and writes the table in README.

Each network gets mixed widths of weights and is exported in every form. Random weights are made to tell images apart
first (`settled`, `told_apart`). Then, on 64 random images and 64 real ones, two things are measured in every runtime,
both against the integer reference:

1. every operator fed with the reference's own inputs: how far any code is off, in steps of the last place, and what
   share of them is;
2. the file as it is: on how many images it names the class that the reference names, and on how many one whose output
   there is at most `check.CLOSE_STEPS` steps below. Where images have labels, also how many of 500 are right.

Real images are those of ../shared; networks of signals get random ones alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgecomp.benchmarks.accuracy import parity
from edgecomp.benchmarks.runners import runner_class
from edgecomp.benchmarks.runtime import channels_first, channels_last, quiet
from edgecomp.benchmarks.tflm import load_package
from edgecomp.check import CLOSE_STEPS, output_step, reference_outputs
from edgecomp.compress import compress
from edgecomp.data import LabelledImages
from edgecomp.errors import BundleError, ExportError, UnsupportedOp
from edgecomp.exporters import export
from edgecomp.exporters.unpack_tflite import is_packed, unpack_tflite
from edgecomp.graph import Graph
from edgecomp.imagefolder import read_folder
from edgecomp.plan import CompressionPlan, Io, LayerPlan
from edgecomp.preprocessing import Preprocessing
from edgecomp.provenance import tools
from edgecomp.pytorch.calibrate import calibrate
from edgecomp.pytorch.capture import capture
from edgecomp.quantmath import dequantize
from edgecomp.report import table
from tests.onnx_run import onnx_run
from tests.zoo import N_CLASSES, NETWORKS, WIDTHS, built

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
REAL = ROOT.parent / "shared" / "data" / "imagenet1k-one-per-class.zip"
BEGIN, END = "<!-- written by python -m tests.matrix -->", "<!-- end of what tests.matrix writes -->"
COLUMNS = {
    "ONNX, onnxruntime": ("onnx", "onnxruntime"),
    "TFLite, reference kernels": ("tflite", "litert-reference"),
    "TFLite, XNNPACK": ("tflite", "litert"),
    "packed TFLite, reference kernels": ("tflite-packed", "litert-reference"),
    "packed TFLite, XNNPACK": ("tflite-packed", "litert"),
    "TFLite Micro": ("tflm", "tflite-micro"),
}
"""Form of the file and runtime, by the column's title."""
N_IMAGES = 64
"""Of each kind."""
N_SETTLING = 128
"""Of each kind: other images, from which come ranges and what random weights need."""
N_LABELLED = 500
LEAST_AGREEMENT = 0.99
CELL = re.compile(
    r"(?P<near>exact|\d+ steps? in < [\d.e-]+ %); (?P<same>\d+) of (?P<n>\d+)(, (?P<close>\d+) with ties)?"
    r"(; right (?P<right>\d+), reference (?P<reference>\d+) of (?P<labelled>\d+))?"
)
"""What a cell says, unless it is a refusal."""

Row = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A compressed network, images for it, and what the reference computes of them.

    Attributes:
        graph: quantized.
        images: random ones, then real ones.
        values: every activation by name.
        labelled: real images with the classes that the network was trained for, and the reference's output.
    """

    graph: Graph
    images: np.ndarray
    values: Mapping[str, np.ndarray]
    labelled: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None


def random_images(n: int, shape: Sequence[int], seed: int) -> np.ndarray:
    """Draw images that a network can tell apart: a coarse pattern, and noise on it; most pixels from -1 to 1."""
    rng = np.random.default_rng(seed)
    channels, *sides = shape
    blocks = [max(1, side // 4) for side in sides]
    coarse = rng.standard_normal((n, channels, *(-(-side // block) for side, block in zip(sides, blocks, strict=True))))
    for axis, (side, block) in enumerate(zip(sides, blocks, strict=True)):
        coarse = np.take(coarse.repeat(block, axis=2 + axis), range(side), axis=2 + axis)
    return (0.5 * coarse + 0.15 * rng.standard_normal(coarse.shape)).astype(np.float32)


@functools.cache
def real_images(side: int) -> LabelledImages:
    """Read the images of ImageNet, one a class, in an order in which neighbours have nothing in common."""
    ((images, labels),), _ = read_folder(REAL, resize=side)
    return LabelledImages(images=images, labels=labels).take(np.random.default_rng(0).permutation(len(labels)))


PIXELS = Preprocessing(mean=(127 / 255,), std=(128 / 255,))
"""From -1 to 1, as EfficientNet-Lite0 was trained."""


def images_for(shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Give the images that are measured, and others to settle a network with: random ones, then real ones."""
    measured, settling = [random_images(N_IMAGES, shape, seed=3)], [random_images(N_SETTLING, shape, seed=2)]
    if len(shape) == 3:
        real = real_images(shape[-1])
        measured.append(real.inputs(PIXELS, 0, N_IMAGES))
        settling.append(real.inputs(PIXELS, len(real) - N_SETTLING))
    return np.concatenate(measured), np.concatenate(settling)


def settled(module: nn.Module, images: np.ndarray) -> nn.Module:
    """Make a network of random weights behave as a trained one does.

    BatchNorm takes its statistics from images, for with those it starts with activations vanish or explode. And it
    shifts them by 1: where ReLU cuts off half of all normal values, a small difference, be it a rounding, grows against
    the rest by sqrt(pi / (pi - 1)) = 1.21 a layer, until it decides the class. Trained networks do no such thing.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    with torch.no_grad():
        for part in norms:
            part.momentum = None  # the plain mean
            part.bias.fill_(1)
            part.train()
        module(torch.from_numpy(images))
    return module.eval()


def told_apart(graph: Graph, images: np.ndarray) -> Graph:
    """Give a network of random weights a last layer that tells images apart.

    Its outputs are the principal components of what it reads in the compressed network, each with variance 1.
    """
    last = graph.layers()[-1]
    quantized = compress(graph, plan_for(graph, images))
    (source,) = (node.inputs[0] for node in quantized.nodes if node.name == last.name)
    quant = quantized.tensors[source].quant
    assert quant is not None
    codes = reference_outputs(quantized, images, (source,))[source]
    features = dequantize(codes, quant).astype(np.float64).reshape(*codes.shape[:2], -1).mean(axis=2)
    mean = features.mean(axis=0)
    _, sizes, directions = np.linalg.svd(features - mean, full_matrices=False)
    weight = directions[:N_CLASSES] / sizes[:N_CLASSES, None] * np.sqrt(len(features))
    tensors = dict(graph.tensors)
    for name, data in zip(last.inputs[1:], (weight, -weight @ mean), strict=True):
        old = tensors[name]
        tensors[name] = replace(old, data=data.reshape(old.shape).astype(np.float32))
    return replace(graph, tensors=tensors)


def case_of(name: str) -> Case:
    """Build, capture and compress a network, and run the reference.

    Raises:
        UnsupportedOp: capture refuses it.
    """
    entry = NETWORKS[name]
    measured, settling = images_for(entry.shape)
    with one_thread():
        module = built(name).eval()
        graph = capture(module if entry.trained else settled(module, settling), entry.shape, name=name)
        settling = settling.reshape(len(settling), *graph.tensors[graph.inputs[0]].shape[1:])
        if not entry.trained:
            graph = told_apart(graph, settling)
        quantized = compress(graph, plan_for(graph, settling, entry.widths))
    measured = measured.reshape(len(measured), *settling.shape[1:])
    values = reference_outputs(quantized, measured, tuple(n for n, t in quantized.tensors.items() if t.data is None))
    labelled = None
    if entry.trained:
        real = real_images(entry.shape[-1]).take(np.arange(N_LABELLED))
        x, (output,) = real.inputs(PIXELS), quantized.outputs
        labelled = x, real.labels, reference_outputs(quantized, x, (output,))[output]
    return Case(graph=quantized, images=measured, values=values, labelled=labelled)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch add up in one order, whatever the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def plan_for(graph: Graph, images: np.ndarray, widths: Sequence[int] = WIDTHS) -> CompressionPlan:
    """Give the first and the last layer 8 bits, the others some width by turns."""
    layers, by_turns = graph.layers(), itertools.cycle(widths)
    return CompressionPlan(
        graph_digest=graph.digest(),
        io=Io.FLOAT,
        layers={
            node.name: LayerPlan(
                keep=(True,) * graph.weight(node).shape[0],
                weight_bits=8 if node in (layers[0], layers[-1]) else next(by_turns),
            )
            for node in layers
        },
        ranges=calibrate(graph, np.array_split(images, len(images) // 32)),
        preprocessing=Preprocessing(mean=(0.0,), std=(1.0,)),
    )


# ---- every operator by itself ----------------------------------------------------------------------------------------


def apart(graph: Graph) -> Graph:
    """Let every node read inputs of the graph and write outputs of it: one file, in which no error travels."""
    reads = dict.fromkeys(name for node in graph.nodes for name in node.inputs if graph.tensors[name].data is None)
    tensors = {name: t for name, t in graph.tensors.items() if t.data is not None or name in reads}
    nodes = []
    for node in graph.nodes:
        output = f"{node.outputs[0]}:out"
        tensors[output] = replace(graph.tensors[node.outputs[0]], name=output)
        nodes.append(replace(node, outputs=(output,)))
    outputs = tuple(node.outputs[0] for node in nodes)
    return replace(graph, nodes=tuple(nodes), tensors=tensors, inputs=tuple(reads), outputs=outputs)


def litert_run(data: bytes, inputs: Mapping[str, np.ndarray], runtime: str) -> dict[str, np.ndarray]:
    """Give every output by name, images NCHW, of a file with any number of inputs."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    unpacked = unpack_tflite(data, "model") if is_packed(data) else data
    kernels = OpResolverType.BUILTIN_REF if runtime == "litert-reference" else OpResolverType.AUTO
    with quiet():
        interpreter = Interpreter(model_content=unpacked, num_threads=1, experimental_op_resolver_type=kernels)
        interpreter.allocate_tensors()
    found: dict[str, list[np.ndarray]] = {}
    for i in range(len(next(iter(inputs.values())))):
        for detail in interpreter.get_input_details():
            x = inputs[detail["name"]][i : i + 1]
            interpreter.set_tensor(detail["index"], channels_last(x))
        interpreter.invoke()
        for detail in interpreter.get_output_details():
            y = interpreter.get_tensor(detail["index"])
            found.setdefault(detail["name"], []).append(channels_first(y))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def micro_run(data: bytes, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
    """The same in TFLite Micro, whose interpreter knows inputs and outputs by their places in the graph alone."""
    n_elements = sum(x[0].size for x in inputs.values())
    interpreter = load_package().runtime.Interpreter.from_bytes(data, arena_size=(64 << 20) + 64 * n_elements)
    found: dict[str, list[np.ndarray]] = {name: [] for name in outputs}
    for i in range(len(next(iter(inputs.values())))):
        for place, x in enumerate(inputs.values()):
            interpreter.set_input(channels_last(x[i : i + 1]), place)
        interpreter.invoke()
        for place, name in enumerate(outputs):
            found[name].append(channels_first(interpreter.get_output(place)))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def nearness(case: Case, data: bytes, runtime: str) -> str:
    """Say how far operators are from the reference, each on the reference's own inputs, and how often.

    Args:
        case: the network.
        data: the file of `apart`.
        runtime: which.
    """
    single = apart(case.graph)
    inputs = {name: case.values[name] for name in single.inputs}
    match runtime:
        case "onnxruntime":
            found = onnx_run(data, inputs)
        case "tflite-micro":
            found = micro_run(data, inputs, single.outputs)
        case _:
            found = litert_run(data, inputs, runtime)
    steps, n_off, n = 0, 0.0, 0
    for node in case.graph.nodes:
        want = case.values[node.outputs[0]]
        step = 1.0 if want.dtype == np.int8 else output_step(case.graph)
        got = found[f"{node.outputs[0]}:out"].reshape(want.shape)
        n += want.size
        if (differs := want != got).any():
            close = parity(want[differs], got[differs], step)
            steps, n_off = max(steps, close.max_steps), n_off + (1 - close.equal_percent / 100) * close.n
    if not steps:
        return "exact"
    # A power of ten: processors differ in the last digits.
    below = 10.0 ** (np.floor(np.log10(100 * n_off / n)) + 1)
    return f"{steps} step{'s' * (steps > 1)} in < {below:g} %"


# ---- the table -------------------------------------------------------------------------------------------------------


def agreeing(case: Case, data: bytes, runtime: str) -> tuple[int, int]:
    """Count the images on which a file names the reference's class, and those where it is that or about as good."""
    got = runner_class(runtime)(data).run(case.images).reshape(len(case.images), -1).argmax(axis=1)
    want = case.values[case.graph.outputs[0]].reshape(len(case.images), -1)
    behind = want.max(axis=1) - np.take_along_axis(want, got[:, None], axis=1)[:, 0]
    close = behind <= (CLOSE_STEPS + 0.5) * output_step(case.graph)
    return int((got == want.argmax(axis=1)).sum()), int(close.sum())


def right(case: Case, data: bytes, runtime: str) -> str:
    """Say on how many labelled images a file is right, and the reference; nothing where there are none."""
    if case.labelled is None:
        return ""
    images, labels, want = case.labelled
    got = runner_class(runtime)(data).run(images)
    n_right, n_reference = (int((y.reshape(len(labels), -1).argmax(axis=1) == labels).sum()) for y in (got, want))
    return f"; right {n_right}, reference {n_reference} of {len(labels)}"


def cell(case: Case, whole: bytes, parts: bytes, runtime: str) -> str:
    """Say how the file of a network, and the file of `apart`, run in a runtime."""
    same, close = agreeing(case, whole, runtime)
    ties = f", {close} with ties" if close != same else ""
    return f"{nearness(case, parts, runtime)}; {same} of {len(case.images)}{ties}{right(case, whole, runtime)}"


def cells(case: Case) -> Row:
    """Say how a network runs in each form and runtime."""
    single, found = apart(case.graph), dict[str, str]()
    for form, group in itertools.groupby(COLUMNS.items(), key=lambda column: column[1][0]):
        columns = {title: runtime for title, (_, runtime) in group}
        try:
            whole, parts = export(case.graph, form).data, export(single, form).data
        except ExportError as e:
            found |= dict.fromkeys(columns, f"refused: {e}")
            continue
        for title, runtime in columns.items():
            try:
                found[title] = cell(case, whole, parts, runtime)
            except BundleError as e:
                found[title] = f"refused: {e}"
    return found


def row(name: str) -> Row:
    """Measure one network."""
    shape = "x".join(map(str, NETWORKS[name].shape))
    try:
        case = case_of(name)
    except UnsupportedOp as e:
        return {"network": name, "input": shape, "classes": "-"} | dict.fromkeys(COLUMNS, f"refused: {e}")
    named = np.unique(case.values[case.graph.outputs[0]].reshape(len(case.images), -1).argmax(axis=1))
    return {"network": name, "input": shape, "classes": str(len(named)), **cells(case)}


def summary(rows: Sequence[Row]) -> str:
    """Count the cells, and name those that miss LEAST_AGREEMENT even with ties."""
    near, agreed, missed = Counter[str](), Counter[str](), list[str]()
    for title in COLUMNS:
        below = list[str]()
        for r in rows:
            match = CELL.fullmatch(r[title])
            steps = match and match["near"].partition(" in ")[0]
            near["refused" if not steps else steps if steps == "exact" else f"within {steps}"] += 1
            if match:
                same, n = int(match["same"]), int(match["n"])
                close = int(match["close"] or same)
                agreed["same"] += same >= LEAST_AGREEMENT * n
                agreed["close"] += close >= LEAST_AGREEMENT * n
                if close < LEAST_AGREEMENT * n:
                    below.append(f"{r['network']} {close}")
        if below:
            missed.append(f"{title}: {', '.join(below)}")
    counts = ", ".join(f"{near[kind]} {kind}" for kind in sorted(near))
    least, n_run = f"{100 * LEAST_AGREEMENT:g} %", near.total() - near["refused"]
    return (
        f"{near.total()} cells: {counts}. The class is the reference's on at least {least} of images in "
        f"{agreed['same']} of {n_run}, with ties in {agreed['close']}. Not in: {'; '.join(missed) or 'none'}."
    )


def written(rows: Sequence[Row]) -> str:
    """Give the table, what it says in short, and what it was measured with."""
    known = tools()
    names = ("torch", "torchvision", "onnxruntime", "ai-edge-litert", "tflite-micro")
    used = ", ".join(f"{name} {known[name]['version']}" for name in names)
    header = tuple(rows[0])
    return f"{table([tuple(r.values()) for r in rows], header)}\n\n{summary(rows)}\n\nMeasured with {used}."


def read(text: str) -> list[Row]:
    """Read the rows back from README's text."""
    lines = [line for line in text.partition(BEGIN)[2].partition(END)[0].splitlines() if line.startswith("|")]
    header, _, *rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, parts, strict=True)) for parts in rows]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NETWORK,...", help="measure these again; the others keep what README says")
    parser.add_argument("--keep", metavar="FILE", type=Path, help="keep rows here once measured, and go on from them")
    args = parser.parse_args(argv)
    if not REAL.exists():
        print(f"{REAL}: not there; the real images of this table come from it", file=sys.stderr)
        return 2
    text = README.read_text("utf-8")
    if not -1 < text.find(BEGIN) < text.find(END):
        parser.error(f"{README}: expected a line {BEGIN} and after it {END}")
    kept: dict[str, Row] = {}
    if args.only:
        kept = {r["network"]: r for r in read(text) if r["network"] not in args.only.split(",")}
    if args.keep and args.keep.exists():
        kept |= json.loads(args.keep.read_text("utf-8"))
    for name in NETWORKS:
        if name not in kept:
            kept[name] = row(name)
            print(" | ".join(kept[name].values()), flush=True)
            if args.keep:
                args.keep.write_text(json.dumps(kept, indent=1), "utf-8")
    # Others may have edited the text around the table meanwhile.
    before, _, rest = README.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n{written([kept[name] for name in NETWORKS])}\n{END}{after}", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
