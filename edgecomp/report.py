"""What a measurement says: reports as values, their strict JSON, and the Markdown tables that people read.

A number here carries its source. A report from an emulator has no latency to fill in: an emulator's time is not a
device's. Not here: how anything is measured (`edgecomp.benchmarks`).
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields
from enum import StrEnum
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from edgecomp.errors import BundleError, PlanError, UsageError
from edgecomp.strictjson import check_keys, json_parts, load_strict_json, write_json

_T = TypeVar("_T")

REPORT_SCHEMA = "edgecomp-bench/2"
COMPARISON_SCHEMA = "edgecomp-comparison/2"
ESTIMATE_SCHEMA = "edgecomp-estimate/1"

Fact = str | int | float | bool | tuple[str, ...] | None
"""What a line of an environment may hold."""


class Source(StrEnum):
    """Where a report's numbers come from."""

    MEASURED = "measured"
    EMULATED = "emulated"
    ESTIMATED = "estimated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How far outputs are from what was expected, in steps of the last place (see `benchmarks.accuracy.parity`).

    Attributes:
        equal_percent: share of values that are 0 steps away.
        max_steps: the largest distance.
        worst_index: where that is, the first of several.
        n: values compared.
    """

    equal_percent: float
    max_steps: int
    worst_index: tuple[int, ...]
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Latency divided by the baseline's: below 1 is faster. [low, high] is the 95 % confidence interval."""

    median: float
    low: float
    high: float

    def __post_init__(self) -> None:
        for name in ("median", "low", "high"):
            value = getattr(self, name)
            if not _is_real(value) or value <= 0:
                raise UsageError(f"ratio: {name} is {value!r:.80}, expected a number above 0")
        if not self.low <= self.median <= self.high:
            raise UsageError(f"ratio: {self.median} is outside of its interval [{self.low}, {self.high}]")


def summarise(samples_us: Sequence[float]) -> tuple[float, float, float, float]:
    """Give p50, p90, p99 and the minimum of samples, as they stand in reports: percentiles interpolate linearly."""
    # As np.percentile, which loads masked arrays, 1 MB, in the process whose memory is told.
    ordered = np.sort(np.asarray(samples_us, dtype=np.float64))

    def at(share: float) -> float:
        place = (len(ordered) - 1) * share
        low, high = ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)]
        return float(low + (high - low) * (place % 1))

    return at(0.5), at(0.9), at(0.99), float(ordered[0])


_LATENCY = (
    "warmups", "steady", "rounds", "samples_us", "p50_us", "p90_us", "p99_us", "min_us", "load_ms", "layers_us",
    "not_valid",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """One file on one target by one runtime.

    Attributes:
        label: what the user calls it.
        artifact: the file's name, without its folder.
        artifact_bytes: its length.
        sha256: of its bytes.
        format: "onnx", "tflite", ...
        target: a name from `edgecomp.targets`.
        runtime: a name from `benchmarks.runners.RUNNERS`.
        runtime_version: as the runtime gives it.
        threads: the number it was told to use.
        execution: what else decides how it ran: providers, delegates.
        source: decides which of the numbers below there can be. Measured: all of the latency group. Emulated: none of
            it. Estimated: p50_us and p90_us only.
        warmups: inferences before the first sample.
        steady: whether the warm-up ended because latency had settled, not because its time was over.
        rounds: turns this model had; each gave equally many samples, in order.
        samples_us: latency of every inference, microseconds. Given as a tuple or an array, held in eight bytes each.
        p50_us: median of the samples.
        p90_us: 90th percentile of the samples.
        p99_us: 99th percentile of the samples.
        min_us: smallest sample.
        load_ms: from the file to ready to run, runtime already initialised; belongs to the latency group.
        peak_memory_bytes: the process's peak resident memory, interpreter and runtime included.
        model_memory_bytes: what the model added to it.
        layers_us: mean time of each operator by the runtime's own profiler, in a run of its own that is slower for it;
            empty where there was none, or the runtime has no profiler. Belongs to the latency group.
        instructions: of one inference by class, counted by the emulator; empty where nothing was emulated.
        not_valid: why a measured run does not count: it was throttled, swapped or drifted. Empty is good.
        before: the machine's state before the run: clock, governor, temperature, throttle flags, swapped pages.
        after: the same after it.
        environment: see `benchmarks.environment`; what could not be read is named under "unread".

    Raises:
        UsageError: a value of the wrong type or range, or a number that `source` or the samples contradict.
    """

    label: str
    artifact: str
    artifact_bytes: int
    sha256: str
    format: str
    target: str
    runtime: str
    runtime_version: str
    threads: int
    execution: Mapping[str, Fact] = field(default_factory=dict)
    source: Source
    warmups: int | None = None
    steady: bool | None = None
    rounds: int | None = None
    samples_us: Sequence[float] = ()
    p50_us: float | None = None
    p90_us: float | None = None
    p99_us: float | None = None
    min_us: float | None = None
    load_ms: float | None = None
    peak_memory_bytes: int | None = None
    model_memory_bytes: int | None = None
    layers_us: Mapping[str, float] = field(default_factory=dict)
    instructions: Mapping[str, int] = field(default_factory=dict)
    not_valid: tuple[str, ...] = ()
    before: Mapping[str, Fact] = field(default_factory=dict)
    after: Mapping[str, Fact] = field(default_factory=dict)
    environment: Mapping[str, Fact] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("label", "artifact", "sha256", "format", "target", "runtime", "runtime_version"):
            if not isinstance(getattr(self, name), str):
                raise UsageError(f"report: {name} is {getattr(self, name)!r:.80}, expected a string")
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise UsageError(f"report: sha256 is {self.sha256!r:.80}, expected 64 hexadecimal digits")
        _count("threads", self.threads, 1)
        _count("artifact_bytes", self.artifact_bytes, 1)
        # What a model adds is a difference of two measured peaks, which may come out below zero for a tiny model.
        for name, least in (("warmups", 0), ("rounds", 1), ("peak_memory_bytes", 1), ("model_memory_bytes", None)):
            if getattr(self, name) is not None:
                _count(name, getattr(self, name), least)
        for name in ("p50_us", "p90_us", "p99_us", "min_us", "load_ms"):
            value = getattr(self, name)
            if value is not None and not (_is_real(value) and value >= 0):
                raise UsageError(f"report: {name} is {value!r:.80}, expected a number of at least 0")
        samples = self.samples_us
        if not isinstance(samples, (tuple, array, memoryview)) or not all(_is_real(s) and s >= 0 for s in samples):
            raise UsageError("report: samples_us: expected numbers of at least 0")
        # There may be tens of thousands, in the process whose memory is told; a tuple takes four times as much.
        object.__setattr__(self, "samples_us", memoryview(array("d", samples)).toreadonly())
        if self.steady is not None and not isinstance(self.steady, bool):
            raise UsageError(f"report: steady is {self.steady!r:.80}, expected true or false")
        if self.source not in tuple(Source):
            raise UsageError(f"report: source is {self.source!r:.80}, expected one of {', '.join(Source)}")
        object.__setattr__(self, "source", Source(self.source))
        for name in ("execution", "layers_us", "instructions", "before", "after", "environment"):
            object.__setattr__(self, name, _facts(name, getattr(self, name)))
        if not all(_is_real(us) and us >= 0 for us in self.layers_us.values()):
            raise UsageError("report: layers_us: expected numbers of at least 0")
        for name, count in self.instructions.items():
            _count(f"instructions: {name}", count, 0)
        if not isinstance(self.not_valid, tuple) or not all(isinstance(reason, str) for reason in self.not_valid):
            raise UsageError("report: not_valid: expected texts")
        self._check_latency()

    def _check_latency(self) -> None:
        allowed = {
            Source.MEASURED: {*_LATENCY},
            Source.EMULATED: set(),
            Source.ESTIMATED: {"p50_us", "p90_us"},
        }
        for name in sorted(allowed[Source.MEASURED] - allowed[self.source]):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Sized) and len(value) == 0):
                raise UsageError(f"report: {self.source} and has {name}; only a device's own run can give that")
        if self.instructions and self.source is not Source.EMULATED:
            raise UsageError(f"report: {self.source} and has instructions; only an emulator counts them")
        if self.source is not Source.MEASURED:
            return
        if not self.samples_us or not self.rounds or len(self.samples_us) % self.rounds:
            raise UsageError(f"report: measured, with {len(self.samples_us)} samples in {self.rounds} rounds")
        given = (self.p50_us, self.p90_us, self.p99_us, self.min_us)
        names = ("p50_us", "p90_us", "p99_us", "min_us")
        for name, value, computed in zip(names, given, summarise(self.samples_us), strict=True):
            if value is None or not math.isclose(value, computed, rel_tol=1e-9, abs_tol=1e-9):
                raise UsageError(f"report: {name} is {value}, the samples give {computed}")

    def to_json(self) -> str:
        """Write as JSON text."""
        return write_json({"schema": REPORT_SCHEMA, **_report_object(self)})

    @staticmethod
    def from_json(text: str, where: str = "report") -> BenchReport:
        """Read what `to_json` wrote; strict.

        Raises:
            BundleError: not JSON, unknown version, a key missing, unknown or twice, a value of the wrong type or range.
        """
        obj = dict(_read(text, REPORT_SCHEMA, where))
        return _report_from(obj, where)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Several models, measured in one run, in turns.

    Attributes:
        reports: one a model; labels are unique.
        baseline: the label that the ratios refer to.
        ratios: by label, one for each report with samples; empty where nothing was measured.

    Raises:
        UsageError: labels are not unique, or baseline or ratios name a model that is not there.
    """

    reports: tuple[BenchReport, ...]
    baseline: str
    ratios: Mapping[str, Ratio]

    def __post_init__(self) -> None:
        labels = [report.label for report in self.reports]
        if len(set(labels)) != len(labels):
            raise UsageError(f"comparison: labels {', '.join(labels)}; expected each once")
        for name in (self.baseline, *self.ratios):
            if name not in labels:
                raise UsageError(f"comparison: no report is called {name!r:.80}; there are {', '.join(labels)}")
        object.__setattr__(self, "ratios", MappingProxyType(dict(self.ratios)))

    def to_json(self) -> str:
        """Write as JSON text."""
        return "".join(self.json_parts())

    def json_parts(self) -> Iterator[str]:
        """Give the text of `to_json` in parts, for where memory counts."""
        ratios = {name: {"median": r.median, "low": r.low, "high": r.high} for name, r in self.ratios.items()}
        reports = [_report_object(report) for report in self.reports]
        return json_parts(
            {"schema": COMPARISON_SCHEMA, "baseline": self.baseline, "ratios": ratios, "reports": reports}
        )

    @staticmethod
    def from_json(text: str, where: str = "comparison") -> Comparison:
        """Read what `to_json` wrote; strict.

        Raises:
            BundleError: as `BenchReport.from_json`.
        """
        obj = _read(text, COMPARISON_SCHEMA, where)
        _keys(obj, ("baseline", "ratios", "reports"), where)
        baseline, ratios, reports = obj["baseline"], obj["ratios"], obj["reports"]
        if not (isinstance(baseline, str) and isinstance(ratios, dict) and isinstance(reports, list)):
            raise BundleError(f"{where}: expected a string baseline, an object ratios and a list reports")
        read = {}
        for name, value in ratios.items():
            place = f"{where}: ratio of {name!r:.80}"
            read[name] = _built(Ratio, _keys(value, ("median", "low", "high"), place), place)
        return _built(
            Comparison,
            {
                "baseline": baseline,
                "ratios": read,
                "reports": tuple(_report_from(report, f"{where}: report {i}") for i, report in enumerate(reports)),
            },
            where,
        )

    def table(self) -> str:
        """Give the Markdown table: bytes, latency in ms with the ratio to the baseline, memory in MB (10^6 bytes)."""
        header = ("model", "runtime", "file bytes", "p50 ms", "p90 ms", "min ms", f"x {self.baseline}", "95 %",
                  "load ms", "peak MB", "model MB", "source")  # fmt: skip
        rows = []
        for r in self.reports:
            ratio = self.ratios.get(r.label)
            rows.append(
                (
                    r.label,
                    f"{r.runtime} {r.runtime_version}, {r.threads} thread{'s' if r.threads > 1 else ''}",
                    r.artifact_bytes,
                    *("-" if us is None else f"{us / 1e3:.3f}" for us in (r.p50_us, r.p90_us, r.min_us)),
                    "-" if ratio is None else f"{ratio.median:.3f}",
                    "-" if ratio is None else f"{ratio.low:.3f}-{ratio.high:.3f}",
                    "-" if r.load_ms is None else f"{r.load_ms:.1f}",
                    *("-" if b is None else f"{b / 1e6:.2f}" for b in (r.peak_memory_bytes, r.model_memory_bytes)),
                    r.source.value,
                )
            )
        return table(rows, header)


_NUMERIC = re.compile(r"[-+±~<>=≤≥ ]*\d[\d.,_eE+\-]*( ?(%|x|[kMG]?i?B|[munµ]?s|[kMG]?Hz|bits?))?")


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Write an aligned Markdown table, without a newline at its end.

    A column whose cells are all numbers ("12", 3.4, "90.9 %", "0.35x", or "-" and "" for none) stands to the right.
    Floats are given four significant digits; who wants others passes strings.

    Raises:
        UsageError: a row has another length than the header.
    """
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise UsageError(f"table: row {i} has {len(row)} cells, the header {len(header)}")
    lines = [[_cell(value) for value in row] for row in (header, *rows)]
    columns = list(zip(*lines, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    right = [
        any(map(_NUMERIC.fullmatch, column[1:]))
        and all(cell in ("", "-") or _NUMERIC.fullmatch(cell) for cell in column[1:])
        for column in columns
    ]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (w - 1) + ":") if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(lines[0]), line(rule), *(line(cells) for cells in lines[1:])])


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


# ---- checks ----------------------------------------------------------------------------------------------------------


def _is_real(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _count(name: str, value: object, least: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise UsageError(f"report: {name} is {value!r:.80}, expected a whole number{bound}")


def _facts(name: str, facts: Mapping[str, Fact]) -> Mapping[str, Fact]:
    if not isinstance(facts, Mapping):
        raise UsageError(f"report: {name} is {type(facts).__name__}, expected an object")
    kept: dict[str, Fact] = {}
    for key, value in facts.items():
        if isinstance(value, (list, tuple)):
            value = tuple(value)
            legal = all(isinstance(v, str) for v in value)
        else:
            legal = value is None or isinstance(value, (str, bool)) or _is_real(value)
        if not isinstance(key, str) or not legal:
            raise UsageError(f"report: {name}: {key!r:.80} is {value!r:.80}, expected text, number or list of texts")
        kept[key] = value
    return MappingProxyType(kept)


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _report_object(report: BenchReport) -> dict[str, object]:
    values = {f.name: getattr(report, f.name) for f in fields(report)}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def _report_from(value: object, where: str) -> BenchReport:
    obj = _keys(value, tuple(f.name for f in fields(BenchReport)), where)
    lists = {}
    for name in ("samples_us", "not_valid"):
        if not isinstance(obj[name], list):
            raise BundleError(f"{where}: {name}: expected a list")
        lists[name] = tuple(obj[name])
    return _built(BenchReport, {**obj, **lists}, where)


def _read(text: str, schema: str, where: str) -> Mapping[str, object]:
    try:
        obj = dict(load_strict_json(text, where))
    except PlanError as error:
        raise BundleError(str(error)) from error
    if (found := obj.pop("schema", None)) != schema:
        raise BundleError(f"{where}: schema is {found!r:.80}, this edgecomp reads {schema!r}")
    return obj


def _keys(value: object, expected: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BundleError(f"{where}: expected an object, found {type(value).__name__}")
    try:
        check_keys(value, expected, where)
    except PlanError as error:
        raise BundleError(str(error)) from error
    return value


def _built(kind: type[_T], values: Mapping[str, Any], where: str) -> _T:
    try:
        return kind(**values)
    except UsageError as error:
        raise BundleError(f"{where}: {error}") from error
