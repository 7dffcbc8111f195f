"""Run every method at every setting with every seed, measure what it makes the same way, and write table and plot.

Each result is a file of its own: an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgecomp.check import measure_accuracy
from edgecomp.errors import DataError, EdgecompError, UsageError
from edgecomp.files import write_file

from .context import Context
from .methods import Made, Method, Place
from .peers import PEERS, environment_python
from .plot import check_matplotlib, svg
from .results import Compressed, Result, Source, Task, forget, open_results, save
from .table import markdown, rows_of

RUNTIME = "onnxruntime"
TABLE = "table.md"
PLOT = "plot.svg"
FILES = "files"
LOGS = "logs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A task that gave no result.

    Attributes:
        task: what was asked for.
        reason: one line.
    """

    task: Task
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What a run leaves.

    Attributes:
        results: all of the folder, those of earlier runs too.
        failures: of this run.
        table: Markdown.
    """

    results: Mapping[Task, Result]
    failures: tuple[Failure, ...]
    table: str


def compare(
    context: Context,
    methods: Sequence[Method],
    *,
    bits: Sequence[float],
    seeds: Sequence[int],
    folder: Path,
    order: Sequence[str],
    peers: Path | None = None,
    again: Sequence[str] = (),
    keep_files: bool = False,
    began: Callable[[Task, int, int], object] | None = None,
) -> Compared:
    """Run what is not done yet, and write table.md and plot.svg of all results in the folder.

    Seeds come outermost, so that an interrupted run leaves a table that is complete for the first of them. A method
    that fails is reported and the others go on.

    Args:
        context: the checkpoint and its images.
        methods: what to run.
        bits: mean bits a weight, 0.1 to 8.
        seeds: whole numbers from 0.
        folder: where results are collected.
        order: names of methods, as rows of the table.
        peers: the folder of the peers' environments.
        again: methods whose earlier results are forgotten.
        keep_files: keep the ONNX files too.
        began: called before each task that has to be run, with its number from 0 and their count.

    Raises:
        TargetError: a peer's environment or matplotlib is missing; nothing was run.
        UsageError: a number is out of range, or the folder belongs to another experiment.
        BundleError: a result in the folder is damaged.
        OSError: as the system reports it.
    """
    for b in bits:
        if not 0.1 <= b <= 8:
            raise UsageError(f"--bits {b:g}: expected 0.1 to 8")
    if not seeds or min(seeds) < 0:
        raise UsageError(f"--seeds {' '.join(map(str, seeds))}: expected whole numbers from 0")
    check_matplotlib()
    for name in dict.fromkeys(name for method in methods for name in method.peers):
        environment_python(peers, PEERS[name])
    results = open_results(folder, context.subject.to_json())
    for task in [t for t in results if t.method in again]:
        forget(folder, task)
        del results[task]
    tasks = [task for method in methods for task in method.tasks(bits, seeds) if task not in results]
    todo = sorted(tasks, key=lambda task: seeds.index(task.seed) if task.seed in seeds else -1)
    by_name = {method.name: method for method in methods}
    failures = []
    with tempfile.TemporaryDirectory(prefix="edgecomp-compare-") as work:
        for number, task in enumerate(todo):
            if began is not None:
                began(task, number, len(todo))
            place = Place(peers=peers, work=Path(work), log=(folder / LOGS / f"{task.name()}.log").absolute())
            start = time.monotonic()
            try:
                made = by_name[task.method].run(context, task, place)
                result = measured(context, task, made, time.monotonic() - start, known=results.values())
            except EdgecompError as error:
                failures.append(Failure(task=task, reason=str(error)))
                continue
            if keep_files and isinstance(made, Compressed):
                (folder / FILES).mkdir(exist_ok=True)
                write_file(folder / FILES / f"{task.name()}.onnx", made.file)
            save(folder, result)
            results[task] = result
    rows = rows_of(results.values(), order)
    text = markdown(rows) if rows else ""
    if rows:
        write_file(folder / TABLE, text.encode())
        write_file(folder / PLOT, svg(rows, f"{context.subject.model}, {len(seeds)} seeds"))
    return Compared(results=results, failures=tuple(failures), table=text)


def measured(
    context: Context, task: Task, made: Made, seconds: float, *, known: Collection[Result] = ()
) -> Result:
    """Measure what a method made: a file in onnxruntime, a simulation by its outputs; all test images both times.

    A file whose very bytes are known already, in the same runtime, is not measured again.

    Raises:
        BundleError: onnxruntime refuses the file.
        DataError: outputs and images do not belong together.
    """
    test = context.images.test
    if isinstance(made, Compressed):
        from edgecomp.benchmarks.runners import runner_class

        source, n_bytes, digest = Source.FILE, len(made.file), hashlib.sha256(made.file).hexdigest()
        where = f"{RUNTIME} {runner_class(RUNTIME)(made.file).version}"
        same = next((r for r in known if (r.sha256, r.measured_in) == (digest, where)), None)
        if same is None:
            percent, n = measure_accuracy(made.file, RUNTIME, test, context.subject.preprocessing)
        else:
            percent, n = same.accuracy_percent, same.n_images
    else:
        if made.logits.ndim != 2 or len(made.logits) != len(test):
            raise DataError(f"{task.name()}: outputs {made.logits.shape}, expected one row for each of {len(test)}")
        n = len(test)
        percent = 100 * float((made.logits.argmax(axis=1) == test.labels).mean())
        source, n_bytes, digest = Source.SIMULATED, made.n_bytes, None
        tool = next(iter(made.versions))
        where = f"{tool} {made.versions[tool]}"
    return Result(
        task=task,
        n_bytes=n_bytes,
        accuracy_percent=round(percent, 4),
        n_images=n,
        source=source,
        measured_in=where,
        seconds=round(seconds, 1),
        sha256=digest,
        details=dict(made.details),
        versions=dict(made.versions),
    )
