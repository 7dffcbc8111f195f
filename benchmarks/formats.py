"""What weights of 4 bits cost and save in the stock runtimes, beside the other ways to store them.

python -m edgecomp.benchmarks.formats prints a table: torchvision's resnet18 and mobilenet_v2, with random weights
unless `--weights resnet18=FILE` gives others, and efficientnet_lite0 with its package's trained ones; images of
224x224, every weight rounded to the nearest of 4 bits. Six files of one network and the same codes take turns in one
process, one thread:

- ONNX: ours; plain int8; INT4 as other tools write it, `DequantizeLinear` straight from INT4 initializers.
- TFLite: ours, packed, through `edgecomp.runtime.load`; plain int8; native int4.

Activation ranges come from noise: bytes and speed are judged, not accuracy. A script: nobody imports it.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgecomp.compress import compress
from edgecomp.errors import EdgecompError, UsageError
from edgecomp.exporters import export
from edgecomp.files import write_files
from edgecomp.graph import Array, Graph
from edgecomp.plan import CompressionPlan, Io, LayerPlan
from edgecomp.preprocessing import Preprocessing
from edgecomp.pytorch.calibrate import calibrate
from edgecomp.pytorch.capture import capture
from edgecomp.pytorch.load import load_module
from edgecomp.pytorch.torchvision_ops import define_missing_operators
from edgecomp.report import Ratio, table
from edgecomp.runtime import unpack

from .harness import Timing, measure, ratio
from .runners import LiteRt, OnnxRuntime, Runner

NETWORKS = ("resnet18", "mobilenet_v2", "efficientnet_lite0")
SHAPE = (3, 224, 224)
BITS = 4
ONNX, ONNX_INT8, ONNX_INT4 = "ONNX", "ONNX, int8", "ONNX, INT4"
TFLITE, TFLITE_INT8, TFLITE_INT4 = "TFLite, packed", "TFLite, int8", "TFLite, int4"
BYTES_TIMES, BYTES_MORE = 1.03, 32_000
"""How many bytes an ONNX file may have for each byte of weights, and beside them."""
SPEEDS = (
    (ONNX, ONNX_INT8, 0.97),
    (ONNX, ONNX_INT4, 4.0),
    (TFLITE, TFLITE_INT8, 0.95),
    (TFLITE, TFLITE_INT4, None),
)
"""A file, the one its speed is compared with, and how many times as fast it has to be; None: only told."""
_N_IMAGES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A line of acceptance.

    Attributes:
        network: name.
        what: is judged.
        got: bytes or a ratio of speeds.
        limit: what is asked for; empty where nothing is.
        met: whether it is reached; None where nothing is asked for.
    """

    network: str
    what: str
    got: str
    limit: str
    met: bool | None


# ---- networks and files ----------------------------------------------------------------------------------------------


def network(name: str, weights: Path | None) -> Graph:
    """Capture a network; one of torchvision's without a file of weights has those that it is born with, seed 0."""
    if name == "efficientnet_lite0":
        module: Any = load_module(f"edgecomp.pytorch.networks:{name}", weights)
    elif weights is not None:
        module = load_module(f"torchvision:{name}", weights)
    else:
        define_missing_operators()
        import torchvision.models as zoo

        torch.manual_seed(0)
        module = zoo.get_model(name, weights=None).eval()
    return capture(module, SHAPE, name=name)


def quantized(graph: Graph) -> Graph:
    """Compress to BITS a weight in every layer, rounded to nearest, for integer input and output."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((_N_IMAGES, *graph.tensors[graph.inputs[0]].shape[1:])).astype(np.float32)
    layers = {
        node.name: LayerPlan(keep=(True,) * graph.weight(node).shape[0], weight_bits=BITS) for node in graph.layers()
    }
    plan = CompressionPlan(
        graph_digest=graph.digest(),
        io=Io.INT8,
        layers=layers,
        ranges=calibrate(graph, [images[i : i + 1] for i in range(_N_IMAGES)]),
        preprocessing=Preprocessing(mean=(0.0,), std=(1.0,)),
    )
    return compress(graph, plan)


def files(graph: Graph) -> dict[str, bytes]:
    """Write a quantized graph in every way that is compared."""
    forms = {
        ONNX: "onnx",
        ONNX_INT8: "onnx-int8",
        TFLITE: "tflite-packed",
        TFLITE_INT8: "tflite-int8",
        TFLITE_INT4: "tflite",
    }
    found = {name: export(graph, form).data for name, form in forms.items()}
    return {**found, ONNX_INT4: standard_int4(found[ONNX_INT8], {graph.weight(node).name for node in graph.layers()})}


def standard_int4(data: bytes, weights: set[str]) -> bytes:
    """Turn a plain int8 ONNX file of ours into the standard form of INT4: opset 21, two codes in a byte.

    Args:
        data: what `--weights-at-rest int8` writes.
        weights: names of the initializers to store in INT4, by rows of one scale each; their codes are -8 to 7.

    Raises:
        UsageError: a weight is missing.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load_model_from_string(data)
    missing = set(weights)
    zero_points = {}
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            codes = numpy_helper.to_array(tensor)
            assert codes.dtype == np.int8
            tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.INT4, codes.shape, _nibbles(codes), raw=True))
            zeros = np.zeros(codes.shape[0], dtype=np.int8)
            zero_points[tensor.name] = helper.make_tensor(
                f"{tensor.name}.zero", TensorProto.INT4, zeros.shape, _nibbles(zeros), raw=True
            )
            missing.remove(tensor.name)
    if missing:
        raise UsageError(f"the file has no weight {sorted(missing)[0]!r}; expected one of `--weights-at-rest int8`")
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in zero_points:
            node.input[2] = zero_points[node.input[0]].name
    model.graph.initializer.extend(zero_points.values())
    model.opset_import[0].version, model.ir_version = 21, 10
    onnx.checker.check_model(model, full_check=True)
    written: bytes = model.SerializeToString(deterministic=True)
    return written


def _nibbles(codes: Array) -> bytes:
    """Pack as ONNX does: the first of two codes in the lower half of a byte."""
    flat = codes.reshape(-1).astype(np.uint8) & 15
    flat = np.append(flat, np.zeros(flat.size % 2, dtype=np.uint8))
    return bytes(flat[::2] | flat[1::2] << 4)


# ---- measured and judged ---------------------------------------------------------------------------------------------


def judge(
    name: str, weight_bytes: float, sizes: Mapping[str, int], speeds: Mapping[tuple[str, str], Ratio]
) -> list[Verdict]:
    """Hold what was measured against what is asked for.

    Args:
        name: of the network.
        weight_bytes: sum over all weights of bits / 8.
        sizes: bytes of each file.
        speeds: how many times as fast the first file is as the second.
    """
    most = math.floor(BYTES_TIMES * weight_bytes + BYTES_MORE)
    found = [
        Verdict(
            network=name,
            what=f"{ONNX}: bytes",
            got=f"{sizes[ONNX]:,}",
            limit=f"<= {most:,}",
            met=sizes[ONNX] <= most,
        )
    ]
    for ours, other, least in SPEEDS:
        speed = speeds[ours, other]
        found.append(
            Verdict(
                network=name,
                what=f"{ours}: speed / {other.partition(', ')[2]}",
                got=f"{speed.median:.3f} ({speed.low:.3f}-{speed.high:.3f})",
                limit="" if least is None else f">= {least:g}",
                met=None if least is None else speed.median >= least,
            )
        )
    return found


def timed(models: Mapping[str, bytes], *, rounds: int) -> dict[str, Timing]:
    """Let all files of a network take turns, one thread; the packed TFLite file is unpacked first."""
    runners: dict[str, Runner] = {}
    for name, data in models.items():
        runner = OnnxRuntime if name.startswith(ONNX) else LiteRt
        runners[name] = runner(unpack(data) if name == TFLITE else data)
    return measure(
        {name: runner.infer_once for name, runner in runners.items()},
        clock=time.perf_counter_ns,
        rng=random.Random(0),
        rounds=rounds,
        min_s=0.0,
        max_s=300.0,
    )


def check_same_outputs(models: Mapping[str, bytes]) -> None:
    """See that files that are compared compute the same: ours the bytes of plain int8.

    Raises:
        UsageError: they do not.
    """
    for runner, ours, other in ((OnnxRuntime, ONNX, ONNX_INT8), (LiteRt, TFLITE, TFLITE_INT8)):
        one, two = (runner(models[name]) for name in (ours, other))
        x = np.random.default_rng(1).integers(-128, 128, (2, *one.input.shape)).astype(np.int8)
        if not np.array_equal(one.run(x), two.run(x)):
            raise UsageError(f"{ours} and {other} give different outputs; expected the same network in both files")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 3 if a line of acceptance is missed."""
    p = argparse.ArgumentParser(prog="python -m edgecomp.benchmarks.formats")
    p.add_argument("--networks", default=",".join(NETWORKS), help="some of them, with commas between")
    p.add_argument("--weights", action="append", default=[], metavar="NETWORK=FILE", help="trained weights")
    p.add_argument("--rounds", type=int, default=30)
    p.add_argument("--write", type=Path, metavar="DIR", help="write our files there instead, to run them elsewhere")
    args = p.parse_args(argv)
    if args.rounds < 1 or not all("=" in text for text in args.weights):
        p.error("expected --rounds of at least 1, and --weights NETWORK=FILE")
    given = dict(text.partition("=")[::2] for text in args.weights)
    names = args.networks.split(",")
    if unknown := {*names, *given} - set(NETWORKS):
        p.error(f"network {sorted(unknown)[0]!r}; expected some of {', '.join(NETWORKS)}")
    sizes, verdicts = [], []
    for name in names:
        graph = quantized(network(name, Path(given[name]) if name in given else None))
        models = files(graph)
        check_same_outputs(models)
        if args.write is not None:
            write_files(args.write, {f"{name}.onnx": models[ONNX], f"{name}.tflite": models[TFLITE]})
            continue
        timings = timed(models, rounds=args.rounds)
        n_weights = sum(math.prod(graph.weight(node).shape) for node in graph.layers())
        rng = random.Random(0)
        speeds = {(a, b): ratio(timings[b], timings[a], rng=rng) for a, b, _ in SPEEDS}
        weight_bytes = n_weights * BITS / 8
        verdicts += judge(name, weight_bytes, {file: len(data) for file, data in models.items()}, speeds)
        for file, data in models.items():
            ms = np.median(timings[file].samples_us) / 1e3
            sizes.append((name, file, f"{len(data):,}", f"{8 * len(data) / n_weights:.2f}", f"{ms:.2f}"))
    if args.write is not None:
        return 0
    print(table(sizes, ("network", "file", "bytes", "bits a weight", "ms")))
    words = {True: "pass", False: "MISS", None: ""}
    rows = [(v.network, v.what, v.got, v.limit, words[v.met]) for v in verdicts]
    print("\n" + table(rows, ("network", "what", "measured", "asked for", "verdict")))
    return 3 if any(v.met is False for v in verdicts) else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except EdgecompError as e:
        raise SystemExit(f"edgecomp.benchmarks.formats: {e}") from None
