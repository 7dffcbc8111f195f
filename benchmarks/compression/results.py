"""What a method gave and what was measured of it; one JSON file for each result, so that a run can be resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from edgecomp.errors import BundleError, PlanError, UsageError
from edgecomp.files import write_file
from edgecomp.strictjson import load_strict_json

RESULT_SCHEMA = "edgecomp-compression/1"
EXPERIMENT_SCHEMA = "edgecomp-compression-experiment/1"
EXPERIMENT = "experiment.json"
RESULTS = "results"


class Source(StrEnum):
    """Where bytes and accuracy come from."""

    FILE = "file"
    """Bytes of a file on disk, classified by the runtime that is named."""
    SIMULATED = "simulated"
    """A tool that writes no packed file: bytes computed from widths, images classified inside the tool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed:
    """What a method gives that writes a file.

    Attributes:
        file: ONNX, float input (N, C, H, W).
        details: what is worth knowing beside bytes and accuracy; JSON values.
        versions: of the tools that made it.
    """

    file: bytes
    details: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Simulated:
    """What a method gives that only simulates.

    Attributes:
        n_bytes: that a packed file would spend on parameters.
        logits: (N, classes), one row for each test image.
        details: as in `Compressed`.
        versions: as in `Compressed`; the first is the tool that simulated.
    """

    n_bytes: int
    logits: np.ndarray
    details: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One cell of the comparison.

    Attributes:
        method: its name in the table of methods.
        bits: mean bits a weight that are asked for; None for a method that takes no budget.
        seed: of the calibration images and of every random choice.
    """

    method: str
    bits: float | None
    seed: int

    def name(self) -> str:
        """Name the task's files."""
        bits = "own" if self.bits is None else f"{self.bits:g}"
        return f"{self.method}-{bits}-{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came out of a task.

    Attributes:
        task: what was asked for.
        n_bytes: of the file, or computed.
        accuracy_percent: of all test images.
        n_images: how many those are.
        source: where both come from.
        measured_in: runtime or tool, with its version.
        seconds: that the method took, without the measuring.
        sha256: of the file; None where there is none.
        details: see `Compressed`.
        versions: see `Compressed`.

    Raises:
        UsageError: a number is out of range.
    """

    task: Task
    n_bytes: int
    accuracy_percent: float
    n_images: int
    source: Source
    measured_in: str
    seconds: float
    sha256: str | None
    details: Mapping[str, Any]
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        whole = all(isinstance(n, int) and n > 0 for n in (self.n_bytes, self.n_images))
        real = isinstance(self.accuracy_percent, (int, float)) and isinstance(self.seconds, (int, float))
        if not (whole and real and 0 <= self.accuracy_percent <= 100 and 0 <= self.seconds < math.inf):
            raise UsageError(
                f"{self.task.name()}: {self.n_bytes!r} bytes, {self.accuracy_percent!r} % of {self.n_images!r} "
                f"images, {self.seconds!r} s; expected whole numbers above 0, 0 to 100 %, and a time"
            )

    def to_json(self) -> str:
        """Write what `result_from_json` reads."""
        return json.dumps({"schema": RESULT_SCHEMA, **asdict(self)}, indent=1, sort_keys=True) + "\n"


def result_from_json(text: str, where: str) -> Result:
    """Read a result.

    Raises:
        BundleError: the text is damaged, of another version, or says something impossible.
    """
    try:
        obj: dict[str, Any] = dict(load_strict_json(text, where))
        schema = obj.pop("schema")
        if schema != RESULT_SCHEMA:
            raise BundleError(f"{where}: schema is {schema!r:.80}, this edgecomp reads {RESULT_SCHEMA!r}")
        if set(obj) != {f.name for f in fields(Result)}:
            raise BundleError(f"{where}: has {sorted(obj)}, expected {sorted(f.name for f in fields(Result))}")
        return Result(**{**obj, "task": Task(**obj["task"]), "source": Source(obj["source"])})
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, PlanError, UsageError) as error:
        raise BundleError(f"{where}: damaged ({' '.join(str(error).split())}); remove it to run it again") from error


def open_results(folder: Path, experiment: Mapping[str, Any]) -> dict[Task, Result]:
    """Give the results that a folder holds already; an empty or missing folder becomes one for this experiment.

    Args:
        folder: where results are collected.
        experiment: all that results must share to stand in one table; JSON values.

    Raises:
        BundleError: a result is damaged.
        UsageError: the folder belongs to another experiment, or holds something else.
        OSError: as the system reports it.
    """
    head = folder / EXPERIMENT
    wanted = {"schema": EXPERIMENT_SCHEMA, **experiment}
    if head.is_file():
        try:
            found = load_strict_json(head.read_text("utf-8"), str(head))
        except (ValueError, PlanError) as error:
            raise BundleError(f"{head}: is no JSON; choose another -o") from error
        differ = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        if differ:
            key = differ[0]
            raise UsageError(
                f"{head}: {key} is {found.get(key)!r:.80}, this run has {wanted.get(key)!r:.80}; choose another -o"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder}: holds files but no {EXPERIMENT}; choose another -o")
    (folder / RESULTS).mkdir(parents=True, exist_ok=True)
    if not head.is_file():
        write_file(head, (json.dumps(wanted, indent=1, sort_keys=True) + "\n").encode())
    results = {}
    for path in sorted((folder / RESULTS).glob("*.json")):
        result = result_from_json(path.read_text("utf-8"), str(path))
        results[result.task] = result
    return results


def save(folder: Path, result: Result) -> None:
    """Write a result into its folder, whole or not at all.

    Raises:
        OSError: as the system reports it.
    """
    write_file(folder / RESULTS / f"{result.task.name()}.json", result.to_json().encode())


def forget(folder: Path, task: Task) -> None:
    """Remove a result, so that its task is run again."""
    (folder / RESULTS / f"{task.name()}.json").unlink(missing_ok=True)
