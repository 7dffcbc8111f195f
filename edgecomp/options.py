"""What each verb of the command line takes, and what that means as values."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecomp.arguments import (
    read_bytes,
    read_c_name,
    read_formats,
    read_milliseconds,
    read_number,
    read_numbers,
    read_percent,
    read_points,
    read_shape,
)
from edgecomp.errors import UsageError

if TYPE_CHECKING:
    from edgecomp.latency import LatencyLimit
    from edgecomp.methods import Scoring
    from edgecomp.preprocessing import Preprocessing
    from edgecomp.spending import Budget

SCORES = ("lrp", "magnitude", "taylor", "hessian", "wanda", "deeplift", "random")
"""What --score takes: `pytorch.scores.Score`, which is not imported before it is needed."""
LAYOUTS = ("flat", "arduino", "platformio", "zephyr")
"""What --layout takes: `exporters.c_layouts.LAYOUTS`, likewise."""
METHODS = ("edgecomp", "soroush2024", "ghavami2025")
"""What --method takes: `methods.METHODS`, likewise."""
COMPILERS = ("gcc", "zig", "clang")
"""What --compiler takes: `benchmarks.cross_compile.COMPILERS`, likewise."""
RUNTIMES = (
    "litert", "tflite-runtime", "executorch", "onnxruntime", "onnxruntime-lean", "ncnn", "paddle-lite", "tnn", "other"
)  # fmt: skip
MICRO_RUNTIMES = ("tflite-micro", "x-cube-ai", "c", "other")
"""What --runtime of estimate takes, elsewhere and on Cortex-M: `latency.RUNTIMES`, likewise."""
PRECISIONS = ("int8", "fp32", "fp16")
"""What --precision takes: `latency.PRECISIONS`, likewise."""


def add_verbs(verbs: Any) -> None:
    """Add every verb with its arguments to what `ArgumentParser.add_subparsers` gives."""
    for add in (
        _add_build,
        _add_export,
        _add_unpack,
        _add_verify,
        _add_bench,
        _add_gate,
        _add_inspect,
        _add_sbom,
        _add_estimate,
        _add_targets,
    ):
        add(verbs)


def _add_build(verbs: Any) -> None:
    p = verbs.add_parser("build", help="model and images in, a folder of compressed files with their proof out")
    p.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="torchvision:NAME, package.module:factory, or a .pt2 file; without it the bundled sample is built",
    )
    p.add_argument("--weights", type=Path, metavar="FILE", help="safetensors, or a state_dict saved by torch")
    p.add_argument("--input-shape", type=read_shape, metavar="C,H,W", help="checked against the preprocessed images")
    p.add_argument(
        "--data",
        metavar="D",
        help="sample, fashion-mnist:ROOT, cifar10:ROOT, folder:PATH (directory or .zip), npz:PATH, module:function",
    )
    p.add_argument("--test-share", type=read_number, metavar="P", help="of data without a test part (default 0.2)")
    p.add_argument("--mean", type=read_numbers, metavar="M", help="per channel, of pixels / 255; default 0")
    p.add_argument("--std", type=read_numbers, metavar="S", help="per channel, of pixels / 255; default 1")
    p.add_argument("--resize", type=int, metavar="N", help="shorter side to N, then the centre N x N")
    p.add_argument("--crop", type=int, metavar="N", help="the centre N x N of what --resize gives")
    p.add_argument("--pad", type=int, metavar="N", help="black pixels on each side, before normalisation")
    p.add_argument("--calib", type=int, default=512, metavar="N", help="training images to look at (default 512)")
    p.add_argument(
        "--classes", metavar="A,B,C", help="names or numbers of the classes the device is for, each with =WEIGHT or not"
    )
    p.add_argument(
        "--prune",
        metavar="P",
        help="whole channels: a share of the weights, e.g. 0.5; auto: as --max-drop allows; nonpositive; default zero",
    )
    about = "estimated, in int8 on --target: whole channels are cut until it is met, e.g. 20ms"
    p.add_argument("--max-latency", type=read_milliseconds, metavar="MS", help=about)
    p.add_argument("--target", metavar="NAME", help="of --max-latency: a board of edgecomp targets, or your FILE.toml")
    p.add_argument("--runtime", metavar="R", help="of --max-latency, as estimate takes it (default the format's own)")
    p.add_argument("--threads", type=int, metavar="N", help="of --max-latency (default 1)")
    _add_profile(p)
    p.add_argument(
        "--sparsify",
        metavar="P",
        help="single weights to zero: a share of those left, e.g. 0.7; auto: as --max-drop allows; zero; nonpositive",
    )
    limits = p.add_mutually_exclusive_group()
    limits.add_argument("--avg-bits", type=read_number, metavar="X", help="mean bits a weight on disk (default 4)")
    limits.add_argument("--max-size", type=read_bytes, metavar="BYTES", help="of every file; K = 1024, kB = 1000, so M")
    limits.add_argument("--max-drop", type=read_points, metavar="P", help="points, on held-out training images")
    about = "onnx, tflite, tflm (TFLite Micro), c (firmware), with commas between; default onnx,tflite"
    p.add_argument("--format", type=read_formats, default=("onnx", "tflite"), metavar="F", help=about)
    _add_at_rest(p, ("native", "packed"))
    p.add_argument("--io", choices=("float", "int8"), default="float", help="what the files take and give")
    p.add_argument("--score", choices=SCORES, help="what tells important from unimportant (default lrp)")
    p.add_argument("--rule", metavar="R", help="of relevance: epsilon (default), epsilon-plus-flat, gamma:0.5, ...")
    p.add_argument("--start", choices=("logit", "one", "softmax"), help="what relevance starts with (default logit)")
    p.add_argument("--method", choices=METHODS, default="edgecomp", help="or a paper's own recipe, as far as published")
    p.add_argument("--no-reconstruct", action="store_true", help="round to nearest: faster, worse below 6 bits")
    p.add_argument("--recover", type=int, default=0, metavar="EPOCHS", help="of fine-tuning, on all training images")
    p.add_argument("--checkpoint", type=Path, metavar="FILE", help="of --recover, to go on from (default DIR.recover)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of every random choice (default 0)")
    p.add_argument("--force", action="store_true", help="replace an earlier build in DIR")
    p.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")


def _add_export(verbs: Any) -> None:
    p = verbs.add_parser("export", help="write a file again from a plan and its graph; needs no torch and no data")
    p.add_argument("plan", type=Path, metavar="PLAN")
    p.add_argument("--graph", type=Path, required=True, metavar="FILE", help="graph.edgecomp, beside the plan")
    p.add_argument("--format", type=read_formats, required=True, metavar="F", help="onnx, tflite, tflm, c, with commas")
    _add_at_rest(p, ("native", "int8", "packed"))
    about = "of C: a library for Arduino and PlatformIO, a Zephyr module, or (default) flat, only sources"
    p.add_argument("--layout", choices=LAYOUTS, default="flat", help=about)
    about = "what the functions in C begin with, where a firmware has two networks of one name"
    p.add_argument("--name", type=read_c_name, metavar="NAME", help=about)
    p.add_argument("--force", action="store_true", help="replace files in DIR")
    p.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")


def _add_at_rest(p: Any, choices: Sequence[str]) -> None:
    said = {
        "native": "native (default; any interpreter runs it)",
        "int8": "int8 (a byte a weight, ONNX too, for runtimes that unpack nothing)",
        "packed": "packed (TFLite at its smallest; unpack before use)",
    }
    about = f"in what form files hold weights: {', '.join(said[name] for name in choices)}"
    p.add_argument("--weights-at-rest", choices=choices, default="native", help=about)


def _add_unpack(verbs: Any) -> None:
    p = verbs.add_parser("unpack", help="widen an ONNX or TFLite file's packed weights to int8; needs numpy alone")
    p.add_argument("file", type=Path, nargs="?", metavar="IN")
    p.add_argument("-o", "--output", type=Path, metavar="OUT")
    p.add_argument("--force", action="store_true", help="replace OUT")
    p.add_argument(
        "--unsigned", action="store_true", help="ONNX: uint8 around 128, for x86 without VNNI, where sums saturate"
    )
    p.add_argument("--cpp-header", action="store_true", help="print where the C++ reader of packed TFLite files lies")


def _add_verify(verbs: Any) -> None:
    p = verbs.add_parser("verify", help="measure digests, accuracy and parity of a built folder again")
    p.add_argument("folder", type=Path, metavar="DIR")
    p.add_argument("--data", metavar="D", help="when the images have moved; else as in the manifest")
    p.add_argument("--per-layer", action="store_true", help="compare every tensor inside the network as well")
    p.add_argument("--reference", action="store_true", help="all test images by the integer reference, too; slow")
    p.add_argument("--json", action="store_true")


def _add_bench(verbs: Any) -> None:
    p = verbs.add_parser("bench", help="latency and memory on this machine, beside the float and plain int8 model")
    about = "a built folder, or an .onnx or .tflite file; several take turns, and are compared with the first"
    p.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT", help=about)
    p.add_argument("--runtime", metavar="R", help="onnxruntime, onnxruntime-lean, litert, tflite-micro and others")
    about = (
        "ssh://[user@]host[:port][?board=NAME]: measured there, may be given several times; rpi4-emulated, ...: ONNX "
        "and TFLite, emulated; cortex-m4, ...: the network in C, emulated"
    )
    p.add_argument("--target", metavar="T", action="append", default=[], help=about)
    p.add_argument("--compiler", choices=COMPILERS, help="for a core; default: the first that is installed")
    p.add_argument("--threads", type=int, default=1, metavar="N")
    p.add_argument("--min-secs", type=float, metavar="S", help="measuring time for each model at least (default 2)")
    p.add_argument("--baseline", type=Path, metavar="FILE", help="what --json printed before, for --fail-if-slower")
    slower = "exit code 3 where a model is surely more than P %% slower than before, or than the first"
    p.add_argument("--fail-if-slower", type=read_percent, metavar="P", help=slower)
    p.add_argument("--svg", type=Path, metavar="FILE", help="a plot of the ratios of times")
    p.add_argument("--force", action="store_true", help="replace FILE of --svg")
    p.add_argument("--profile", action="store_true", help="over SSH: also time each operator, in onnxruntime")
    p.add_argument("--cores", metavar="A,B", help="over SSH: run on these cores alone")
    p.add_argument("--repeat", type=int, default=0, metavar="N", help="up to N times again, until a run is valid")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of the runs")
    about = "what the C runner wrote elsewhere, by hand, of these files: judge and show it; nothing is measured"
    p.add_argument("--gathered", type=Path, metavar="FILE", help=about)
    p.add_argument("--json", action="store_true", help="everything, all raw samples included")


def _add_gate(verbs: Any) -> None:
    p = verbs.add_parser("gate", help="fail where a folder's network in C breaks a budget; for build pipelines")
    p.add_argument("folder", type=Path, metavar="DIR", help="that build wrote, or export --format c")
    p.add_argument("--max-flash", type=read_bytes, metavar="BYTES", help="of weights, scales; with --target code too")
    p.add_argument("--max-ram", type=read_bytes, metavar="BYTES", help="of the arena; with --target of the stack too")
    about = "points of accuracy below the float network's; 0.5%% is half a point, too"
    p.add_argument("--max-drop", type=read_points, metavar="P", help=about)
    p.add_argument("--target", metavar="NAME", help="the core to build and run it for: cortex-m4, ...")
    p.add_argument(
        "--baseline", type=Path, metavar="FILE", help="an earlier manifest.json or network.c: what has grown since?"
    )
    about = "manifest.json of the build that an exported folder is of: it knows the accuracy"
    p.add_argument("--manifest", type=Path, metavar="FILE", help=about)
    about = "write the table there instead, when all is kept: what make takes for done"
    p.add_argument("--report", type=Path, metavar="FILE", help=about)


def _add_inspect(verbs: Any) -> None:
    p = verbs.add_parser("inspect", help="say what is in a file: layers, bits, bytes, operators")
    p.add_argument("file", type=Path, metavar="FILE")
    p.add_argument("--execution", action="store_true", help="load it: what is left in float, or by XNNPACK?")
    p.add_argument("--json", action="store_true")


def _add_sbom(verbs: Any) -> None:
    p = verbs.add_parser("sbom", help="a built folder's bill of materials, with the model in it: CycloneDX 1.6, JSON")
    p.add_argument("folder", type=Path, metavar="DIR")
    p.add_argument("--force", action="store_true", help="replace FILE")
    p.add_argument("-o", "--output", type=Path, metavar="FILE", help="e.g. bom.cdx.json; default: print it")


def _add_estimate(verbs: Any) -> None:
    p = verbs.add_parser("estimate", help="latency on a board that is not at hand: estimated, with its range")
    about = (
        "a built folder, an .onnx or .tflite of ours, a graph.edgecomp, torchvision:NAME, package.module:factory, "
        "a .pt2 file, or the .json that bench --target CORE --json prints"
    )
    p.add_argument("model", metavar="MODEL", help=about)
    p.add_argument("--target", required=True, metavar="NAME", help="of edgecomp targets, or your FILE.toml")
    about = f"{', '.join(RUNTIMES)}; on Cortex-M {', '.join(MICRO_RUNTIMES)}; default: the file's, else the first"
    p.add_argument("--runtime", metavar="R", help=about)
    p.add_argument("--precision", choices=PRECISIONS, help="default int8, in which alone c computes")
    p.add_argument("--threads", type=int, metavar="N", help="default 1")
    _add_profile(p)
    p.add_argument("--weights", type=Path, metavar="FILE", help="of a model; not needed where untrained will do")
    p.add_argument("--input-shape", type=read_shape, metavar="C,H,W", help="of a model (torchvision: 3,224,224)")
    p.add_argument("--json", action="store_true")


def _add_profile(p: argparse.ArgumentParser) -> None:
    about = "what bench --target ssh://... --profile --json printed, and the file it measured: corrects the estimate"
    p.add_argument("--profile", type=Path, nargs=2, metavar=("REPORT", "FILE"), help=about)


def _add_targets(verbs: Any) -> None:
    p = verbs.add_parser("targets", help="the boards edgecomp knows; makes what an emulated one needs")
    p.add_argument("name", nargs="?", metavar="NAME", help="or a file of yours, FILE.toml")
    p.add_argument("--install", action="store_true", help="of NAME, e.g. rpi4-emulated: fetch and set up, into a cache")
    p.add_argument("--runner", type=Path, metavar="FILE", help="write the runner, to measure by hand: python3 FILE -h")
    about = "with --runner: the one in C, for a device without Python; FILE is then a folder: FILE/edgecomp-runner -h"
    p.add_argument("--cpu", metavar="CPU", help=f"{about}; what uname -m says there, e.g. aarch64")
    p.add_argument("--force", action="store_true", help="replace the runner that FILE of --runner is")
    p.add_argument("--json", action="store_true")


# ---- as values -------------------------------------------------------------------------------------------------------


def preprocessing_of(args: argparse.Namespace) -> Preprocessing | None:
    """Give what `build` was told of preprocessing; None where it was told nothing."""
    from edgecomp.preprocessing import Preprocessing

    given = {name: getattr(args, name) for name in ("mean", "std", "resize", "pad", "crop")}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return None
    if args.model is None:
        from edgecomp.intake import sample

        # The bundled network was trained with its own: each option changes what it names.
        return replace(sample(None)[2], **given)
    return Preprocessing(
        mean=args.mean or (0.0,) * len(args.std or (1.0,)),
        std=args.std or (1.0,) * len(args.mean or (0.0,)),
        resize=args.resize,
        pad=args.pad or 0,
        crop=args.crop,
    )


def budget_of(args: argparse.Namespace) -> Budget:
    """Give what `build` may spend."""
    from edgecomp.spending import Budget, BudgetKind

    if args.max_size is not None:
        return Budget(kind=BudgetKind.MAX_SIZE, asked=args.max_size)
    if args.max_drop is not None:
        return Budget(kind=BudgetKind.MAX_DROP, asked=args.max_drop)
    return Budget(kind=BudgetKind.AVG_BITS, asked=4.0 if args.avg_bits is None else args.avg_bits)


def scoring_of(args: argparse.Namespace, usual: Scoring) -> Scoring:
    """Give what tells important from unimportant.

    Raises:
        UsageError: a rule or start of relevance is given to another score.
    """
    score = args.score or usual.score
    if score != SCORES[0]:
        for option in ("rule", "start"):
            if getattr(args, option) is not None:
                raise UsageError(f"--{option} is of --score {SCORES[0]}, not of {score}; leave one out")
    return replace(usual, score=score, rule=args.rule or usual.rule, start=args.start or usual.start)


def latency_limit_of(args: argparse.Namespace) -> LatencyLimit | None:
    """Give the latency that `build` must keep to; None where none is asked for.

    Raises:
        TargetError: the board's core or clock is not known.
        UsageError: the board is missing or unknown, or is named for nothing.
    """
    from edgecomp.estimating import latency_limit
    from edgecomp.targets import load

    if args.max_latency is None:
        if any(given is not None for given in (args.target, args.runtime, args.threads, args.profile)):
            raise UsageError("--target, --runtime, --threads and --profile are of --max-latency, which is not given")
        return None
    if args.target is None:
        raise UsageError("--max-latency without --target: on which board? see edgecomp targets")
    board, threads = load(args.target), 1 if args.threads is None else args.threads
    return latency_limit(args.max_latency, board, args.runtime, args.format, threads, args.profile)
