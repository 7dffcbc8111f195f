"""Does an exported file do what it should: accuracy through its runtime, and parity with the integer reference."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecomp import reference
from edgecomp.artifact import Exported
from edgecomp.compress import border_codes
from edgecomp.data import LabelledImages
from edgecomp.errors import GraphError, ParityError, TargetError
from edgecomp.graph import Array, Graph, Op
from edgecomp.preprocessing import Preprocessing
from edgecomp.report import Parity

if TYPE_CHECKING:
    from edgecomp.benchmarks.runtime import Runner

Stage = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""Opens a stage of known length: a name and a number of units; what it gives is told of each step."""

PARITY_IMAGES = 128
"""Images of the test split whose outputs are compared one by one."""
LEAST_AGREEMENT_PERCENT = 99.0
"""Share of images on which a file must name a class that the reference ranks first, within CLOSE_STEPS."""
CLOSE_STEPS = 4
"""Outputs this near are a tie: a runtime that rounds every layer otherwise may rank them the other way round."""
_BATCH = 32


def measure_accuracy(
    model: bytes | Graph,
    runtime: str,
    images: LabelledImages,
    preprocessing: Preprocessing,
    *,
    progress: Callable[[int], object] | None = None,
) -> tuple[float, int]:
    """Classify every image through a runtime: (percent right, number of images).

    Each core gets its own session of one thread and its share of the images: some kernels use one thread whatever they
    are told, and the runtimes let go of Python's lock while they compute.

    Raises:
        TargetError: the runtime is missing.
        BundleError: the runtime refuses the file.
        DataError: the images do not fit.
    """
    from edgecomp.benchmarks.accuracy import accuracy
    from edgecomp.benchmarks.runners import runner_class

    shares = np.array_split(np.arange(len(images)), min(os.cpu_count() or 1, len(images)))

    # Loaded one after the other: what native code prints meanwhile is held back, and there is one stderr for all.
    runners = [runner_class(runtime)(model, threads=1) for _ in shares]

    ended = threading.Event()

    def step(done: int) -> None:
        if ended.is_set():
            raise TargetError("interrupted")
        if progress is not None:
            progress(done)

    def right(runner: Runner, share: Array) -> int:
        percent, n = accuracy(runner, images.take(share), preprocessing, progress=step)
        n_right: int = round(percent * n / 100)
        return n_right

    with ThreadPoolExecutor(len(shares)) as pool:
        try:
            total = sum(pool.map(right, runners, shares))
        except BaseException:  # Ctrl-C, or one of them failed: the others end with their batch
            ended.set()
            raise
    return 100 * total / len(images), len(images)


def at_chance(percent: float, n_images: int, n_classes: int) -> bool:
    """Tell whether an accuracy is within three standard errors of guessing, or below it.

    Of so few images that not even all of them right would tell, nothing is said.
    """
    chance = 1 / n_classes
    most = chance + 3 * math.sqrt(chance * (1 - chance) / n_images)
    return percent / 100 <= most < 1


def chance_warning(percents: Mapping[str, float], n_images: int, n_classes: int) -> str:
    """Say which of several accuracies are no better than chance; nothing where all are better.

    Args:
        percents: right on the images, by what classified them.
        n_images: that were classified.
        n_classes: there are.
    """
    found = [f"{name} is right on {percent:.2f} %" for name, percent in percents.items()
             if at_chance(percent, n_images, n_classes)]  # fmt: skip
    if not found:
        return ""
    return f"{' and '.join(found)} of {n_images} test images, no better than chance with {n_classes} classes"


def output_step(graph: Graph) -> float:
    """Give the difference of two neighbouring outputs: 1 for codes, what a code is worth for floats.

    A float softmax at the end is measured in steps of 1/256.
    """
    if graph.tensors[graph.outputs[0]].quant is not None:
        return 1.0
    last = graph.producer()[graph.outputs[0]]
    quant = graph.tensors[last.inputs[0] if last.op is Op.DEQUANTIZE else last.outputs[0]].quant
    return 1 / 256 if quant is None else float(quant.scale)


def reference_outputs(graph: Graph, inputs: Array, names: tuple[str, ...]) -> dict[str, Array]:
    """Run the reference in batches that fit a small machine; give the named tensors.

    Args:
        graph: quantized.
        inputs: float32 (N, C, H, W), preprocessed; quantized here for a model with int8 input.
        names: of activations.
    """
    from edgecomp.quantmath import quantize

    quant = graph.tensors[graph.inputs[0]].quant
    parts: list[dict[str, Array]] = []
    for start in range(0, len(inputs), _BATCH):
        x = inputs[start : start + _BATCH]
        values = reference.run(graph, {graph.inputs[0]: x if quant is None else quantize(x, quant)})
        parts.append({name: values[name] for name in names})
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def measure_parity(
    data: bytes, runtime: str, graph: Graph, images: LabelledImages, preprocessing: Preprocessing
) -> tuple[Parity, float]:
    """Compare a file's outputs with the reference's.

    Returns:
        parity of the outputs, and the percentage of images on which the file's class is the reference's, or one whose
        output in the reference is at most CLOSE_STEPS below the largest.
    """
    from edgecomp.benchmarks.accuracy import parity
    from edgecomp.benchmarks.runners import runner_class

    inputs = images.inputs(preprocessing, 0, min(PARITY_IMAGES, len(images)))
    runner = runner_class(runtime)(data, threads=os.cpu_count() or 1)
    got = runner.run(inputs)
    # A network in C ends with codes, whatever is made of them behind it.
    compared = border_codes(graph)[1] if runner.output.dtype == np.int8 else graph.outputs[0]
    expected = reference_outputs(graph, inputs, (compared,))[compared].reshape(got.shape)
    scores = expected.reshape(len(inputs), -1)
    chosen = np.take_along_axis(scores, got.reshape(len(inputs), -1).argmax(axis=1)[:, None], axis=1)[:, 0]
    step = 1.0 if got.dtype == np.int8 else output_step(graph)
    behind = scores.max(axis=1).astype(np.float64) - chosen
    return parity(expected, got, step=step), 100 * float((behind <= (CLOSE_STEPS + 0.5) * step).mean())


def measure(
    exported: Exported, quantized: Graph, test: LabelledImages, preprocessing: Preprocessing, stage: Stage
) -> dict[str, Any]:
    """Measure accuracy on the whole test split and parity on some of it, through the file's runtime.

    Returns:
        the entries "accuracy" and "parity" of the manifest, and for TFLite Micro bytes of its arena.

    Raises:
        ParityError: the runtime names other classes than the reference.
        EdgecompError: as `measure_accuracy`.
    """
    from edgecomp.benchmarks.runners import default_runtime, runner_class

    runtime = default_runtime(exported.format)
    with stage(f"accuracy in {runtime}", len(test)) as advance:
        value, n = measure_accuracy(exported.data, runtime, test, preprocessing, progress=advance)
    close, agreement = measure_parity(exported.data, runtime, quantized, test, preprocessing)
    if agreement < LEAST_AGREEMENT_PERCENT:
        raise ParityError(
            f"{exported.name}: {runtime} names another class than the reference, beyond ties, on "
            f"{100 - agreement:.1f} % of images, at most {100 - LEAST_AGREEMENT_PERCENT:.0f} % are allowed; "
            "nothing was written"
        )
    runner = runner_class(runtime)(exported.data)
    # Only what runs on microcontrollers has to be told how much memory it may use.
    arena = {"tflm": {f"arena_{part}_bytes" for part in ("total", "head", "tail")}, "c": {"arena_bytes"}}.get(
        exported.format, set()
    )
    return {
        "accuracy": {"value": round(value, 4), "n": n, "runtime": f"{runtime} {runner.version}"},
        "parity": {
            "equal_percent": round(close.equal_percent, 4),
            "max_steps": close.max_steps,
            "n": close.n,
            "agree_percent": round(agreement, 4),
        },
        **{name: value for name, value in runner.describe().items() if name in arena},
    }


def parity_by_layer(
    graph: Graph, form: str, runtime: str, images: LabelledImages, preprocessing: Preprocessing
) -> Mapping[str, Parity]:
    """Compare every integer tensor inside the network with the reference's, by tensor, in running order.

    The file is exported again with all of them as outputs: the same nodes and weights, but a runtime may fuse less. In
    C, which has one output, as often as there are tensors, each time up to one of them.

    Raises:
        GraphError: the runtime gives a tensor that the graph does not know.
    """
    from edgecomp.benchmarks.accuracy import parity
    from edgecomp.benchmarks.runners import runner_class
    from edgecomp.exporters import export

    names = tuple(node.outputs[0] for node in graph.nodes if graph.tensors[node.outputs[0]].quant is not None)
    watched = replace(graph, outputs=names)
    inputs = images.inputs(preprocessing, 0, min(PARITY_IMAGES, len(images)))
    expected = reference_outputs(graph, inputs, names)
    if form.startswith("c"):
        got = {}
        for name in names:
            if name == border_codes(graph)[0]:
                got[name] = expected[name]  # the input itself
                continue
            last = next(i for i, node in enumerate(graph.nodes) if name in node.outputs)
            part = replace(graph, nodes=graph.nodes[: last + 1], outputs=(name,))
            got[name] = runner_class(runtime)(export(part, form).data).run(inputs)
    else:
        got = runner_class(runtime)(export(watched, form).data, threads=os.cpu_count() or 1).run_all(inputs)
    if missing := [name for name in names if name not in got]:
        raise GraphError(f"{runtime}: gives no tensor {missing[0]!r}; expected {', '.join(names)}")
    return {name: parity(expected[name], got[name].reshape(expected[name].shape)) for name in names}
