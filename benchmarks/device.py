"""The runner on a device: measures exported models there and writes a comparison as JSON.

    python3 runner.pyz --graph=model.onnx --num_threads=4 --min_secs=2 --enable_op_profiling=true
    python3 runner.pyz -x 4 -t 2 model.onnx result.json

Flags are named as those of LiteRT's benchmark_model, the short ones as those of onnxruntime_perf_test. The measuring is
that of `edgecomp bench` on this machine, by the same modules; `archive` puts them into one file. Exit codes are those
of the command line: 6 also where the run is not valid, whose report is written all the same.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np

from edgecomp.errors import BundleError, EdgecompError, TargetError, UsageError

from .bench import Entry, bench
from .harness import MAX_S, MIN_S
from .memory import PROCESSES
from .memory import main as weigh
from .runners import default_runtime, runner_class
from .runtime import Runner

MARK = -31337
"""Closing this file does nothing, and tells edgecomp_count.c to write down its counts."""
MARKED = 5
"""Marked inferences; the last is reported."""
NOT_VALID = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Run the device's side, and give the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if args.cores and not set(args.cores) <= os.sched_getaffinity(0):
            there = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            raise UsageError(f"--cores {','.join(map(str, args.cores))}: expected some of {there}")
        if args.cores:
            os.sched_setaffinity(0, args.cores)
        if args.task == "memory":
            (_, file, format_name), *_ = _entries(args)
            where = "emulated" if args.emulated else "device"
            return weigh([args.runtime or default_runtime(format_name), str(file), str(args.num_threads), where])
        if args.task == "outputs":
            _outputs(args)
            return 0
        return _time(args)
    except EdgecompError as e:
        sys.stderr.write(f"{' '.join(str(e).split())}\n")
        return 6 if isinstance(e, TargetError) else 2
    except (OSError, ValueError) as e:
        sys.stderr.write(f"{e}\n")
        return 2


def _time(args: argparse.Namespace) -> int:
    entries = _entries(args)
    if args.result is not None and args.result.exists():
        for _, file, _ in entries:
            if args.result.samefile(file):
                raise UsageError(f"{args.result}: is a model, and would be replaced by the result; choose another file")
    comparison = bench(
        entries,
        runtime=args.runtime,
        threads=args.num_threads,
        baseline=args.baseline,
        min_s=args.min_secs,
        max_s=max(args.max_secs, args.min_secs),
        samples=args.num_runs,
        warmup_runs=args.warmup_runs,
        seed=args.seed,
        profile=args.enable_op_profiling,
        attempts=1 + args.repeat,
        processes=args.processes,
    )
    if args.result is None:
        sys.stdout.writelines(comparison.json_parts())
    else:
        from edgecomp.files import write_file  # with shutil, which loads libraries for archives

        write_file(args.result, comparison.to_json().encode())
    not_valid = comparison.reports[0].not_valid
    for reason in not_valid:
        sys.stderr.write(f"not valid: {reason}\n")
    return NOT_VALID if not_valid else 0


def _outputs(args: argparse.Namespace) -> None:
    """Compute the outputs for given images, then infer a few times with a mark before and after each."""
    ((_, file, format_name),) = _entries(args)
    if args.inputs is None or args.result_file is None:
        raise UsageError("--task outputs needs --inputs and --result")
    runner: Runner = runner_class(args.runtime or default_runtime(format_name))(file, threads=args.num_threads)
    outputs = runner.run_all(np.load(args.inputs))
    np.savez(args.result_file, *outputs.values())
    runner.infer_once()
    gc.collect()
    gc.disable()
    _mark()
    _mark()
    _mark()
    for _ in range(MARKED):
        runner.infer_once()
        _mark()


def _mark() -> None:
    try:
        os.close(MARK)
    except OSError:
        return


def _entries(args: argparse.Namespace) -> list[Entry]:
    entries: list[Entry] = []
    for text in args.graph + ([args.model] if args.model else []):
        label, equals, path = text.rpartition("=")
        if not equals or Path(text).is_file():
            label, path = "", text
        format_name = Path(path).suffix.removeprefix(".")
        if not Path(path).is_file():
            raise BundleError(f"{path}: no such file; expected an exported model")
        entries.append((label or Path(path).name, Path(path), format_name))
    if not entries:
        raise UsageError("no model; expected --graph=FILE")
    return entries


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected true or false")
    return text.lower() in ("true", "1")


def _cores(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers of cores, e.g. 2,3") from None


def _count(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not least <= int(text) < 1 << 31:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, {least} or more")
        return int(text)

    return read


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r}: expected seconds, 0 or more")
    return value


class _OneLine(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{' '.join(message.split())}; see -h\n")


class _How(argparse.Action):
    """-m times counts inferences, -m duration seconds: what the other would ask for is left out."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, *(("min_secs", 0.0) if values == "times" else ("num_runs", 1)))


def _parser() -> argparse.ArgumentParser:
    parser = _OneLine(
        prog="runner.pyz",
        description="measure models on this device; JSON on stdout",
        # Asked for the terminal's width, argparse loads libraries for archives, 0.4 MB.
        formatter_class=partial(argparse.HelpFormatter, width=100),
    )
    add = parser.add_argument
    add("model", nargs="?", help="an .onnx or .tflite file")
    add("result", nargs="?", type=Path, help="where to write; standard output by default")
    add("--graph", action="append", default=[], metavar="[LABEL=]FILE", help="a model; several take turns")
    add("--baseline", metavar="LABEL", help="what ratios refer to; the first by default")
    add("--runtime", metavar="R", help="onnxruntime, onnxruntime-lean, litert, tflite-runtime")
    add("--num_threads", "-x", type=_count(1), default=1, metavar="N")
    add("--num_runs", "-r", type=_count(1), default=1, metavar="N", help="samples of each model at least")
    add("--warmup_runs", type=_count(0), default=0, metavar="N", help="at least; it goes on until latency is steady")
    add("--min_secs", "-t", type=_seconds, default=MIN_S, metavar="S", help="for each model at least")
    add("--max_secs", type=_seconds, default=MAX_S, metavar="S", help="for each model, when 5 rounds are done")
    add("--enable_op_profiling", type=_truth, nargs="?", const=True, default=False, help="time each operator")
    add("--cores", type=_cores, default=(), metavar="A,B", help="run on these cores alone")
    add("--repeat", type=_count(0), default=0, metavar="N", help="again up to N times while the run is not valid")
    add("--processes", type=_count(1), default=PROCESSES, metavar="N", help="in which memory and load time are taken")
    add("--seed", type=_count(0), default=0, metavar="N", help="of the order of turns")
    add("-m", dest="how", action=_How, choices=("times", "duration"), help="-r or -t alone decides how long it takes")
    add("-e", dest="provider", choices=("cpu",), default="cpu", help="there is no other")
    add("-I", dest="made_up", action="store_true", help="made-up input: always so")
    add("--task", choices=("time", "memory", "outputs"), default="time", help=argparse.SUPPRESS)
    add("--result", dest="result_file", type=Path, help=argparse.SUPPRESS)
    add("--inputs", type=Path, help=argparse.SUPPRESS)
    add("--emulated", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
