"""What runs where: `python -m tests.matrix` measures every network of `zoo` and writes the table in README.

Each network gets BatchNorm statistics and activation ranges from random images, mixed widths of weights, and is
exported in every form. Then two things are measured in every runtime, both against the integer reference:

1. every operator fed with the reference's own inputs: how far any code is off, in steps of the last place, and what
   share of them is;
2. the file as it is: on how many images it names the class that the reference names, or one whose output there is at
   most `check.CLOSE_STEPS` steps below.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgecomp import reference
from edgecomp.benchmarks.accuracy import parity
from edgecomp.benchmarks.runners import runner_class
from edgecomp.benchmarks.runtime import quiet
from edgecomp.check import CLOSE_STEPS, output_step
from edgecomp.compress import compress
from edgecomp.errors import ExportError, UnsupportedOp
from edgecomp.exporters import export
from edgecomp.exporters.unpack_tflite import is_packed, unpack_tflite
from edgecomp.graph import Graph
from edgecomp.manifest import tool_versions
from edgecomp.plan import CompressionPlan, Io, LayerPlan
from edgecomp.preprocessing import Preprocessing
from edgecomp.pytorch.calibrate import calibrate
from edgecomp.pytorch.capture import capture
from edgecomp.report import table
from tests.onnx_run import onnx_run
from tests.zoo import N_CLASSES, NETWORKS, built

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- written by python -m tests.matrix -->", "<!-- end of what tests.matrix writes -->"
COLUMNS = {
    "ONNX, onnxruntime": ("onnx", "onnxruntime"),
    "TFLite, reference kernels": ("tflite", "litert-reference"),
    "TFLite, XNNPACK": ("tflite", "litert"),
    "packed TFLite, reference kernels": ("tflite-packed", "litert-reference"),
    "packed TFLite, XNNPACK": ("tflite-packed", "litert"),
}
"""Form of the file and runtime, by the column's title."""
N_IMAGES = 16
WIDTHS = (4, 2, 3, 5, 8, 6, 7)
"""Bits of the layers but the first and last, which have 8, by turns."""

Row = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A compressed network, images for it, and what the reference computes of them: every activation by name."""

    graph: Graph
    images: np.ndarray
    values: Mapping[str, np.ndarray]


def random_images(n: int, shape: Sequence[int], seed: int) -> np.ndarray:
    """Draw images that a network can tell apart: a coarse pattern, and noise on it."""
    rng = np.random.default_rng(seed)
    channels, *sides = shape
    blocks = [max(1, side // 4) for side in sides]
    coarse = rng.standard_normal((n, channels, *(-(-side // block) for side, block in zip(sides, blocks, strict=True))))
    for axis, (side, block) in enumerate(zip(sides, blocks, strict=True)):
        coarse = np.take(coarse.repeat(block, axis=2 + axis), range(side), axis=2 + axis)
    return (coarse + 0.3 * rng.standard_normal(coarse.shape)).astype(np.float32)


def settled(module: nn.Module, shape: Sequence[int]) -> nn.Module:
    """Make a network of random weights tell images apart; a trained one stays as it is.

    BatchNorm takes its statistics from random images, for those it starts with make activations vanish or explode. The
    last bias takes away what all images have in common, which would decide the class alone.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    if any((part.running_mean != 0).any() for part in norms):
        return module
    images = torch.from_numpy(random_images(32, shape, seed=1))
    with torch.no_grad():
        for part in norms:
            part.momentum = None  # the plain mean
            part.train()
        module(images)
        *_, bias = (value for value in module.eval().parameters() if value.shape == (N_CLASSES,))
        bias -= module(images).mean(dim=0)
    return module


def case_of(name: str) -> Case:
    """Build, capture and compress a network, and run the reference.

    Raises:
        UnsupportedOp: capture refuses it.
    """
    with one_thread():
        quantized = compressed(name)
    images = random_images(N_IMAGES, quantized.tensors[quantized.inputs[0]].shape[1:], seed=3)
    return Case(graph=quantized, images=images, values=reference.run(quantized, {quantized.inputs[0]: images}))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch add up in one order, whatever the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compressed(name: str) -> Graph:
    """Build, capture and compress a network; errors as `case_of`."""
    graph = capture(settled(built(name).eval(), NETWORKS[name].shape), NETWORKS[name].shape, name=name)
    shape = graph.tensors[graph.inputs[0]].shape[1:]
    layers, widths = graph.layers(), itertools.cycle(WIDTHS)
    plan = CompressionPlan(
        graph_digest=graph.digest(),
        io=Io.FLOAT,
        layers={
            node.name: LayerPlan(
                keep=(True,) * graph.weight(node).shape[0],
                weight_bits=8 if node in (layers[0], layers[-1]) else next(widths),
            )
            for node in layers
        },
        ranges=calibrate(graph, [random_images(32, shape, seed=2)]),
        preprocessing=Preprocessing(mean=(0.0,), std=(1.0,)),
    )
    return compress(graph, plan)


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
            interpreter.set_tensor(detail["index"], np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else x)
        interpreter.invoke()
        for detail in interpreter.get_output_details():
            y = interpreter.get_tensor(detail["index"])
            found.setdefault(detail["name"], []).append(y.transpose(0, 3, 1, 2) if y.ndim == 4 else y)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def nearness(case: Case, data: bytes, runtime: str) -> str:
    """Say how far operators are from the reference, each on the reference's own inputs, and how often.

    Args:
        case: the network.
        data: the file of `apart`.
        runtime: which.
    """
    inputs = {name: case.values[name] for name in apart(case.graph).inputs}
    found = onnx_run(data, inputs) if runtime == "onnxruntime" else litert_run(data, inputs, runtime)
    steps, n_off, n = 0, 0.0, 0
    for node in case.graph.nodes:
        want = case.values[node.outputs[0]]
        step = 1.0 if want.dtype == np.int8 else output_step(case.graph)
        close = parity(want, found[f"{node.outputs[0]}:out"].reshape(want.shape), step)
        steps, n_off, n = max(steps, close.max_steps), n_off + (1 - close.equal_percent / 100) * close.n, n + close.n
    if not steps:
        return "exact"
    # A power of ten: processors differ in the last digits.
    below = 10.0 ** (np.floor(np.log10(100 * n_off / n)) + 1)
    return f"within {steps} step{'s' * (steps > 1)} in < {below:g} %"


# ---- the table -------------------------------------------------------------------------------------------------------


def agreeing(case: Case, data: bytes, runtime: str) -> int:
    """Count the images on which a file names the reference's class, or one that is about as good there."""
    got = runner_class(runtime)(data).run(case.images).reshape(N_IMAGES, -1)
    want = case.values[case.graph.outputs[0]].reshape(N_IMAGES, -1)
    behind = want.max(axis=1) - np.take_along_axis(want, got.argmax(axis=1)[:, None], axis=1)[:, 0]
    return int((behind <= (CLOSE_STEPS + 0.5) * output_step(case.graph)).sum())


def cells(case: Case) -> Row:
    """Say how a network runs in each form and runtime."""
    single, found = apart(case.graph), dict[str, str]()
    for form, columns in itertools.groupby(COLUMNS.items(), key=lambda column: column[1][0]):
        try:
            whole, parts = export(case.graph, form).data, export(single, form).data
        except ExportError as e:
            found |= {title: f"refused: {e}" for title, _ in columns}
            continue
        for title, (_, runtime) in columns:
            near, agree = nearness(case, parts, runtime), agreeing(case, whole, runtime)
            found[title] = f"{near}, {agree} of {N_IMAGES}"
    return found


def row(name: str) -> Row:
    """Measure one network."""
    shape = "x".join(map(str, NETWORKS[name].shape))
    try:
        case = case_of(name)
    except UnsupportedOp as e:
        return {"network": name, "input": shape, "classes": "-"} | dict.fromkeys(COLUMNS, f"refused: {e}")
    named = np.unique(case.values[case.graph.outputs[0]].reshape(N_IMAGES, -1).argmax(axis=1))
    return {"network": name, "input": shape, "classes": str(len(named)), **cells(case)}


def written(rows: Sequence[Row]) -> str:
    """Give the table, and what it was measured with."""
    versions = tool_versions()
    tools = ", ".join(f"{tool} {versions[tool]}" for tool in ("torch", "torchvision", "onnxruntime", "ai-edge-litert"))
    header = tuple(rows[0])
    return f"{table([tuple(r.values()) for r in rows], header)}\n\nMeasured with {tools}."


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
