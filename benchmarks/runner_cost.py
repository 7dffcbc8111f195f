"""What measuring costs: the runner's peak memory and p50 beside those of the smallest program for the same model.

python -m edgecomp.benchmarks.runner_cost MODEL... prints a table, two lines of memory and one of time for each model:

- the peak (VmHWM) that a report gives: that of the process in which memory is taken;
- the peak of the runner's own process, the archive `edgecomp targets --runner` writes, as it times the model;
- p50 of the runner's loop, in turns with a plain loop as that of the runtimes' own tools: one call on values that are
  made beforehand; each has a session of its own, in one process; beside the ratio stands its 95 % confidence interval.

The first two are held against the smallest Python process that loads and runs the model in the same runtime. The
runtimes' own tools in C++ (onnxruntime_perf_test, benchmark_model) come in no package of theirs and are not run here:
Python and numpy are counted on both sides. A packed TFLite file is unpacked first, as no program without edgecomp
reads it. A script: nobody imports it.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecomp.errors import EdgecompError, TargetError, UsageError
from edgecomp.exporters.unpack_tflite import is_packed
from edgecomp.report import Ratio, table
from edgecomp.runtime import unpack

from .archive import NAME, runner_archive
from .harness import Timing, measure, ratio
from .litert import LiteRt
from .memory import STATUS, footprint
from .onnx_runtime import OnnxRuntime
from .runners import default_runtime, runner_class
from .runtime import Runner, channels_last, import_runtime, quiet, sample_image

MOST_MEMORY = 1.15
"""So many times the smallest program's peak is asked for at most."""
MOST_APART = 0.03
"""So far may the p50 be from the plain loop's, as a share."""

_PEAK = "next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))"
_SMALLEST = {
    OnnxRuntime: f"""
import sys
import numpy as np
import onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
(value,) = session.get_inputs()
types = {{"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}}
x = np.zeros([n if isinstance(n, int) else 1 for n in value.shape], types[value.type])
for _ in range(20):
    session.run(None, {{value.name: x}})
print({_PEAK}, file=sys.stderr)
""",
    LiteRt: f"""
import sys
import numpy as np
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(model_path=sys.argv[1], num_threads=int(sys.argv[2]))
interpreter.allocate_tensors()
(value,) = interpreter.get_input_details()
interpreter.set_tensor(value["index"], np.zeros(value["shape"], value["dtype"]))
for _ in range(20):
    interpreter.invoke()
print({_PEAK}, file=sys.stderr)
""",
}
"""The smallest programs, by what the runner uses: FILE THREADS; the last line of stderr is the peak in kB."""
_RUNNER = f"""
import atexit, runpy, sys
atexit.register(lambda: print({_PEAK}, file=sys.stderr))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A line of the table.

    Attributes:
        model: the file's name.
        what: is compared.
        runner: the runner's value, with its unit.
        smallest: that of the smallest program.
        got: their ratio.
        limit: what is asked for.
        met: whether it is reached.
    """

    model: str
    what: str
    runner: str
    smallest: str
    got: str
    limit: str
    met: bool


def judge_memory(model: str, what: str, runner_bytes: int, smallest_bytes: int) -> Verdict:
    """Hold a peak against the smallest program's."""
    times = runner_bytes / smallest_bytes
    return Verdict(
        model=model,
        what=what,
        runner=f"{runner_bytes / 1e6:.1f} MB",
        smallest=f"{smallest_bytes / 1e6:.1f} MB",
        got=f"{times:.3f}",
        limit=f"<= {MOST_MEMORY:g}",
        met=times <= MOST_MEMORY,
    )


def judge_time(model: str, runner_us: Sequence[float], plain_us: Sequence[float]) -> Verdict:
    """Hold the runner's p50 against the plain loop's.

    Args:
        model: the file's name.
        runner_us: p50 of the runner's turn in each round, microseconds.
        plain_us: the same of the plain loop.
    """
    turns = [Timing(warmups=0, steady=True, rounds=len(us), samples_us=tuple(us)) for us in (runner_us, plain_us)]
    times: Ratio = ratio(*turns, rng=random.Random(0))
    p50s = [f"{statistics.median(us) / 1e3:.4g} ms" for us in (runner_us, plain_us)]
    return Verdict(
        model=model,
        what="p50",
        runner=p50s[0],
        smallest=p50s[1],
        got=f"{times.median:.3f} ({times.low:.3f}-{times.high:.3f})",
        limit=f"{1 - MOST_APART:g}-{1 + MOST_APART:g}",
        met=abs(times.median - 1) <= MOST_APART,
    )


# ---- memory ----------------------------------------------------------------------------------------------------------


def smallest_peak_bytes(file: Path, kind: type[Runner], *, threads: int, processes: int) -> int:
    """Give the peak of the smallest process, the median of some."""
    command = [sys.executable, "-I", "-c", _SMALLEST[kind], str(file), str(threads)]
    return statistics.median_low(_peak_bytes(command, file) for _ in range(processes))


def runner_peak_bytes(archive: Path, file: Path, *, threads: int, processes: int) -> int:
    """Give the peak of the process in which the archive times a model, the median of some.

    Args:
        archive: the runner.
        file: the model.
        threads: of the runtime.
        processes: how many.
    """
    words = [str(archive), f"--graph={file}", f"--num_threads={threads}", "--processes=1"]
    command = [sys.executable, "-I", "-c", _RUNNER, *words]
    # 6: it measured, and the machine was too busy for the times to count.
    return statistics.median_low(_peak_bytes(command, file, codes=(0, 6)) for _ in range(processes))


def _peak_bytes(command: Sequence[str], file: Path, *, codes: Sequence[int] = (0,)) -> int:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    lines = done.stderr.strip().splitlines() or ["no message"]
    if done.returncode not in codes or not lines[-1].isdecimal():
        said = next((line for line in reversed(lines) if not line.isdecimal()), "no message")
        raise TargetError(f"memory of {file.name}: the process ends with {done.returncode}: {said[:300]}")
    return int(lines[-1]) * 1024


# ---- time ------------------------------------------------------------------------------------------------------------


def plain_run(file: Path, runner: Runner, *, threads: int) -> Callable[[], object]:
    """Make what a plain loop calls: the runtime's own call for the runner's image, in a session of its own.

    Values of input and output are made once and kept, as in onnxruntime_perf_test (its `outputs_`) and benchmark_model.
    """
    x = sample_image(runner.input)
    with quiet():
        if isinstance(runner, OnnxRuntime):
            ort = import_runtime("onnxruntime", "onnxruntime")
            options = ort.SessionOptions()
            options.intra_op_num_threads = threads
            session: Any = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            values = [ort.OrtValue.ortvalue_from_numpy(a) for a in (x, *session.run(None, {runner.input.name: x}))]
            binding: Any = session.io_binding()
            binding.bind_ortvalue_input(runner.input.name, values[0])
            for output, value in zip(session.get_outputs(), values[1:], strict=True):
                binding.bind_ortvalue_output(output.name, value)

            def once(kept: object = values) -> None:  # the binding does not keep the memory of its values alive
                session.run_with_iobinding(binding)

            return once
        litert = import_runtime("ai_edge_litert.interpreter", "ai-edge-litert")
        interpreter: Any = litert.Interpreter(model_path=str(file), num_threads=threads)
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], channels_last(x))
        invoke: Callable[[], object] = interpreter.invoke
        return invoke


def in_turns(
    runner: Callable[[], object], plain: Callable[[], object], *, rounds: int, turn_s: float
) -> tuple[list[float], list[float]]:
    """Let the runner's loop and a plain one take turns.

    Args:
        runner: one inference, as the harness calls it.
        plain: one inference, in a loop that knows nothing of the harness.
        rounds: how many; who begins is drawn.
        turn_s: how long a turn is at least, seconds.

    Returns:
        p50 of each turn in microseconds: the runner's, the plain loop's.
    """
    order = random.Random(0)
    taken: tuple[list[float], list[float]] = ([], [])

    def ours() -> list[float]:
        timing = measure(
            {"": runner}, clock=time.perf_counter_ns, rng=order, warmup_min_s=0.0, rounds=1, min_s=turn_s
        )
        return list(timing[""].samples_us)

    def theirs() -> list[float]:
        samples: list[float] = []
        for _ in range(3):
            plain()
        end = time.perf_counter() + turn_s
        while time.perf_counter() < end or len(samples) < 3:
            start = time.perf_counter()
            plain()
            samples.append((time.perf_counter() - start) * 1e6)
        return samples

    loops = (ours, theirs)
    for _ in range(rounds):
        for which in order.sample((0, 1), 2):
            gc.collect()
            taken[which].append(statistics.median(loops[which]()))
    return taken


# ---- all of it -------------------------------------------------------------------------------------------------------


def cost(file: Path, archive: Path, *, threads: int, rounds: int, turn_s: float, processes: int) -> list[Verdict]:
    """Measure one model: what a report says of memory, the runner's own process, and time.

    Args:
        file: a plain model.
        archive: the runner.
        threads: of the runtime.
        rounds: of time.
        turn_s: seconds of a turn.
        processes: in which each peak is taken.

    Raises:
        BundleError: the model cannot be loaded.
        TargetError: its runtime is missing, or a process fails.
    """
    runtime = default_runtime(file.suffix.removeprefix("."))
    kind = runner_class(runtime)
    if kind not in _SMALLEST:
        raise UsageError(f"{file.name}: expected an .onnx or .tflite file")
    smallest = smallest_peak_bytes(file, kind, threads=threads, processes=processes)
    reported = footprint(file, runtime, threads=threads, processes=processes).peak_bytes
    own = runner_peak_bytes(archive, file, threads=threads, processes=processes)
    runner = kind(file, threads=threads)
    plain = plain_run(file, runner, threads=threads)
    return [
        judge_memory(file.name, "peak memory, as reported", reported, smallest),
        judge_memory(file.name, "peak memory, the process that times", own, smallest),
        judge_time(file.name, *in_turns(runner.infer_once, plain, rounds=rounds, turn_s=turn_s)),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 3 if a line is missed."""
    p = argparse.ArgumentParser(prog="python -m edgecomp.benchmarks.runner_cost")
    p.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="an .onnx or .tflite file")
    p.add_argument("--threads", type=int, default=1, metavar="N")
    p.add_argument("--rounds", type=int, default=20, metavar="N", help="of time (default: 20)")
    p.add_argument("--turn-secs", type=float, default=0.5, metavar="S", help="length of a turn (default: 0.5)")
    p.add_argument("--processes", type=int, default=3, metavar="N", help="in which each peak is taken (default: 3)")
    args = p.parse_args(argv)
    if min(args.threads, args.rounds, args.processes) < 1 or not args.turn_secs > 0:
        p.error("expected numbers of at least 1, and seconds above 0")
    if not STATUS.exists():
        raise TargetError(f"peak memory is read from {STATUS}, which this system lacks")
    load_before, verdicts = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory(prefix="edgecomp-") as folder:
        archive = Path(folder) / NAME
        archive.write_bytes(runner_archive())
        for i, model in enumerate(args.models):
            file = Path(folder) / str(i) / model.name
            file.parent.mkdir()
            data = model.read_bytes()
            file.write_bytes(unpack(data) if is_packed(data) else data)
            del data
            verdicts += cost(
                file,
                archive,
                threads=args.threads,
                rounds=args.rounds,
                turn_s=args.turn_secs,
                processes=args.processes,
            )
    rows = [(v.model, v.what, v.runner, v.smallest, v.got, v.limit, "met" if v.met else "MISSED") for v in verdicts]
    print(table(rows, ("model", "what", "runner", "smallest program", "ratio", "asked for", "verdict")))
    print(f"\nload when it began: {load_before:.1f} on {os.cpu_count()} cores; memory does not depend on it, time does")
    return 3 if any(not v.met for v in verdicts) else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (EdgecompError, OSError) as e:
        raise SystemExit(f"edgecomp.benchmarks.runner_cost: {e}") from None
