"""How long a network takes on a processor: an estimate from physics with few constants, never a measurement.

A layer computes and moves bytes, and these overlap in part: (compute^p + memory^p)^(1/p), plus a constant a layer.

compute  multiply-adds times cycles each, relative to the core's peak, by kind of operator; activation bytes through the
         cache; both shared among threads but for a serial share.
memory   weights, and activations beyond the cache, over what so many threads can move.

The constants were fitted to published latencies (`benchmarks.latency_fit`), those of our own C to estimates from
emulated instructions (`benchmarks.latency_counted`). They stand in latency.json, with how far published rows lay from
an estimate that had not seen their board or their network. Not here: where work and processor come from (`work`,
`processor`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from edgecomp.errors import UsageError
from edgecomp.graph import Array, Graph
from edgecomp.processor import Processor
from edgecomp.work import Kind, Work, other_work, work_of

SCHEMA = "edgecomp-latency/1"
PRECISIONS: Mapping[str, int] = {"fp32": 4, "fp16": 2, "int8": 1}
"""Bytes of an element."""
KINDS = tuple(Kind)
_FIRST, _DENSE, _OTHER = (KINDS.index(kind) for kind in (Kind.FIRST, Kind.DENSE, Kind.OTHER))
_PHYSICS = (
    "bytes", "layer", "fork", "serial", "copy", "fill", "winograd", "inputs", "outputs", "power", "weights", "whole",
    "gain",
)  # fmt: skip
QUANTITIES = (*(f"kind {kind}" for kind in KINDS), *_PHYSICS)
"""What a layer's time is made of; each is the exponential of a sum of fitted constants.

kind K: cycles that a multiply-add takes, times the core's peak; of FIRST, what an output takes beside its
multiply-adds, which are as those of DENSE; of OTHER, cycles a byte. bytes: cycles a byte of activations. layer: cycles
a layer. fork: those that threads add. serial: share that threads do not share. copy, fill: what one thread, and what
all can move, over what the board's own figures say. winograd: times the activations that Winograd's algorithm moves.
inputs, outputs: how many channels more a layer seems to have, for loops that do not fill. power: p - 1/2. weights:
times the bytes of fully connected weights, which are read in order. whole: what a board that was fitted takes more or
less than others of its kind. gain: the power of the board's own bandwidth, over a usual one.
"""
_COPY, _FILL = 2.5e9, 5e9
_WINOGRAD = frozenset({"ncnn"})
"""Runtimes that compute 3x3 convolutions by Winograd's algorithm; elsewhere they are as other dense ones."""
_KIN: Mapping[str, str] = {"onnxruntime": "litert"}
"""A runtime of few published figures differs from one with kernels of the same kind, not from any."""

_ONE_AT_ONCE = 0.5
"""Multiply-adds of int8 in a cycle, beyond which a microcontroller's core multiplies two pairs at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What an estimate is asked for.

    Attributes:
        work: of the network.
        processor: that runs it.
        runtime: one of RUNTIMES.
        precision: one of PRECISIONS.
        threads: at least 1.
    """

    work: Sequence[Work]
    processor: Processor
    runtime: str
    precision: str
    threads: int


def constants_of(case: Case) -> dict[str, tuple[str, ...]]:
    """Name the constants whose sum is the logarithm of each quantity; one that was not fitted is 0."""
    processor, precision = case.processor, case.precision
    runtime, _, era = case.runtime.partition(" before ")
    family = "m" if processor.micro else "a"
    group = f"{precision} dotprod" if precision == "int8" and processor.dotprod else precision
    shared = [
        f"{family} group {group}",
        f"{family} core {processor.core}",
        f"{family} core {processor.core} {precision}",
    ]
    if processor.reorders:
        shared.append(f"{family} reorders")
    if era:
        shared += [f"runtime {case.runtime}", f"runtime {case.runtime} {precision}"]
    if processor.narrow:
        shared.append(f"{family} narrow")
    names: dict[str, tuple[str, ...]] = {}
    runtimes = (runtime, _KIN[runtime]) if runtime in _KIN else (runtime,)
    shared += [f"runtime {name}{of}" for name in runtimes for of in ("", f" {precision}")]
    for kind in KINDS:
        if kind is Kind.OTHER:
            own = tuple(f"runtime {name}{of}" for name in runtimes for of in (" other", ""))
            names["kind other"] = (f"{family} other", *own)
            continue
        as_kind = Kind.DENSE if kind is Kind.DENSE3X3 and runtime not in _WINOGRAD else kind
        own = tuple(f"runtime {name} {as_kind}" for name in runtimes)
        if runtime == "c":
            # Cores whose instructions multiply two pairs at once have other kernels than those without.
            pairs = "pairs" if processor.macs_per_cycle["int8"] > _ONE_AT_ONCE else "single"
            own += (f"runtime c {pairs} {as_kind}",)
        names[f"kind {kind}"] = (f"{family} {precision} {as_kind}", *own, *shared)
    names |= {quantity: (f"{family} {quantity}",) for quantity in _PHYSICS}
    names["layer"] += tuple(f"runtime {name} layer" for name in runtimes)
    # What a runtime writes beside the activations (im2col, packing) moves through the same memory.
    for quantity in ("copy", "fill"):
        names[quantity] += tuple(f"runtime {name} memory" for name in runtimes)
    names["whole"] = (f"board {processor.board}",)
    if runtime not in _WINOGRAD:
        names["winograd"] = ()
    return names


class Layout:
    """Cases as arrays, R rows and L layers in all, so that all are estimated at once."""

    def __init__(self, cases: Sequence[Case]) -> None:
        layers = [(i, w, PRECISIONS[case.precision]) for i, case in enumerate(cases) for w in case.work]
        self.n_rows = len(cases)
        self.row = np.array([i for i, _, _ in layers], dtype=np.int64)
        self.kind = np.array([KINDS.index(w.kind) for _, w, _ in layers], dtype=np.int64)
        self.macs = np.array([w.macs for _, w, _ in layers], dtype=np.float64)
        self.weight_bytes = np.array([w.weights * size for _, w, size in layers], dtype=np.float64)
        self.act_bytes = np.array([(w.inputs + w.outputs) * size for _, w, size in layers], dtype=np.float64)
        self.outputs = np.array([w.outputs for _, w, _ in layers], dtype=np.float64)
        self.inverse_in = np.array([_inverse(w.summands) for _, w, _ in layers])
        self.inverse_out = np.array([_inverse(w.out_channels * (w.kind is not Kind.DEPTHWISE)) for _, w, _ in layers])
        total = np.bincount(self.row, self.weight_bytes, self.n_rows)

        def each(values: Sequence[float]) -> Array:
            return np.array(values, dtype=np.float64)[self.row]

        p = [case.processor for case in cases]
        l2 = np.array([x.l2_bytes for x in p], dtype=np.float64)
        self.threads = each([min(case.threads, case.processor.cores) for case in cases])
        self.clock = each([x.clock_hz for x in p])
        self.peak = each([x.macs_per_cycle[case.precision] for x, case in zip(p, cases, strict=True)])
        self.copy = each([x.copy_bytes_per_s or np.inf for x in p])
        self.fill = each([x.fill_bytes_per_s or np.inf for x in p])
        # A network whose weights fit in the cache finds them there; an activation is in memory as far as it does not.
        self.weight_bytes_moved = self.weight_bytes * (total / np.maximum(total + l2, 1))[self.row]
        self.act_bytes_moved = self.act_bytes**2 / (self.act_bytes + l2[self.row])

    def layer_seconds(self, logs: Array) -> Array:
        """Estimate each layer: float64 (L,), from the logarithms of the quantities, float64 (R, len(QUANTITIES))."""
        value = np.exp(logs)[self.row]
        q = {name: value[:, len(KINDS) + i] for i, name in enumerate(_PHYSICS)}
        cost = np.take_along_axis(value, self.kind[:, None], axis=1)[:, 0]
        other = self.kind == _OTHER
        padded = 1 + q["inputs"] * self.inverse_in + q["outputs"] * self.inverse_out
        first = self.kind == _FIRST
        counted = np.where(first, self.outputs, self.macs * padded)
        counted = cost * counted + np.where(first, value[:, _DENSE] * self.macs * padded, 0)
        cycles = np.where(other, cost * self.act_bytes, counted / self.peak + q["bytes"] * self.act_bytes)
        shared = 1 / self.threads + q["serial"] * (1 - 1 / self.threads)
        compute = cycles / self.clock * shared
        traffic = np.where(self.kind == KINDS.index(Kind.DENSE3X3), q["winograd"], 1) * self.act_bytes_moved
        traffic += np.where(self.kind == KINDS.index(Kind.LINEAR), q["weights"], 1) * self.weight_bytes_moved
        # A board of twice the bandwidth does not gain as much: kernels read ahead, and not all comes from memory.
        # Bandwidths add up like resistors: what the threads ask for, and what the memory gives.
        one, all_ = (usual * (rate / usual) ** q["gain"] for rate, usual in ((self.copy, _COPY), (self.fill, _FILL)))
        memory = traffic * (1 / (self.threads * one * q["copy"]) + 1 / (all_ * q["fill"]))
        power = 0.5 + q["power"]
        fixed = (q["layer"] + np.where(self.threads > 1, q["fork"], 0)) / self.clock
        seconds: Array = q["whole"] * ((compute**power + memory**power + 1e-30) ** (1 / power) + fixed)
        return seconds

    def seconds(self, logs: Array) -> Array:
        """Estimate each row: float64 (R,)."""
        total: Array = np.bincount(self.row, self.layer_seconds(logs), self.n_rows)
        return total


def _inverse(count: int) -> float:
    """Give 1 / count, and 0 where there is nothing to count."""
    return 1 / count if count else 0.0


def log_quantities(names: Mapping[str, Sequence[str]], constants: Mapping[str, float]) -> Array:
    """Sum up the constants of one row: float64 (len(QUANTITIES),)."""
    return np.array([sum(constants.get(name, 0.0) for name in names[q]) for q in QUANTITIES])


# ---- the fitted estimator --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """A runtime that estimates are made for.

    Attributes:
        like: the fitted runtime whose constants it takes; its own name where it was fitted.
        because: why, for people.
        same: whether its kernels are those of `like`, so that the range is, too.
        counted: whether it was not fitted to published figures, but to emulated instructions times Arm's cycles.
        precisions: that it computes in.
    """

    like: str
    because: str = ""
    same: bool = False
    counted: bool = False
    precisions: tuple[str, ...] = tuple(PRECISIONS)


# No operator of TFLite Micro takes half precision (tensorflow/tflite-micro issue 2587); ST names float32 and 8 bits
# (STEdgeAI-Core's data brief).
_NO_HALVES = tuple(name for name in PRECISIONS if name != "fp16")
_XNNPACK = Runtime(like="litert", because="the same kernels (XNNPACK)", same=True)
RUNTIMES: Mapping[str, Runtime] = {
    "litert": Runtime(like="litert"),
    "tflite-runtime": _XNNPACK,
    "executorch": _XNNPACK,
    "onnxruntime": Runtime(like="onnxruntime"),
    "onnxruntime-lean": Runtime(like="onnxruntime", because="the same kernels", same=True),
    "ncnn": Runtime(like="ncnn"),
    "paddle-lite": Runtime(like="paddle-lite"),
    "tnn": Runtime(like="tnn"),
    "tflite-micro": Runtime(like="tflite-micro", precisions=_NO_HALVES),
    "x-cube-ai": Runtime(like="x-cube-ai", precisions=_NO_HALVES),
    "c": Runtime(like="c", counted=True, precisions=("int8",)),
    "other": Runtime(like="a middling runtime", because="nothing is known of it"),
}
"""By the name that --runtime takes. litert is XNNPACK; tflite-micro has CMSIS-NN's kernels; c is edgecomp's own; other
is one that is none of these, on any processor."""
MICRO_RUNTIMES = ("tflite-micro", "x-cube-ai", "c")


def fits(runtime: str, *, micro: bool) -> bool:
    """Tell whether there is such a runtime for microcontrollers, or for the others."""
    return runtime == "other" or (runtime in MICRO_RUNTIMES) == micro


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Milliseconds. p50 is the estimate; from p10 to p90 lay nine of ten published rows that the fit had not seen."""

    p10: float
    p50: float
    p90: float


class LayerSource(StrEnum):
    """Where a layer's time in an estimate comes from; see `profiled` for all but ESTIMATED."""

    MEASURED = "measured"
    SCALED = "scaled"
    ESTIMATED = "estimated"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEstimate:
    """One layer's share of an estimate."""

    name: str
    kind: Kind
    macs: int
    latency_ms: Range
    source: LayerSource = LayerSource.ESTIMATED


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An estimate, and what it rests on.

    Attributes:
        latency_ms: of the whole network.
        layers: in running order; their p50 sum up to the whole's, as do the ends of their ranges.
        basis: what the constants and the range were taken from, for people.
    """

    latency_ms: Range
    layers: tuple[LayerEstimate, ...]
    basis: tuple[str, ...]


@cache
def fitted() -> Mapping[str, Any]:
    """Read latency.json: the constants, and the ranges of published over estimated, as logarithms, by class."""
    text = resources.files(__package__).joinpath("latency.json").read_text("utf-8")
    found: Mapping[str, Any] = json.loads(text)
    assert found["schema"] == SCHEMA, "latency.json is of another version than the code beside it"
    return found


def class_of(processor: Processor) -> str:
    """Name the class of processors whose held-out rows give the range."""
    if processor.micro:
        return "microcontroller"
    return "with fp16 or dotprod" if processor.fp16 or processor.dotprod else "without fp16 and dotprod"


def check_case(case: Case) -> None:
    """Refuse what no estimate can be made for.

    Raises:
        UsageError: runtime, precision or threads are unknown or out of range, or do not fit the processor, or the
            runtime does not compute in that precision.
    """
    if case.runtime not in RUNTIMES:
        raise UsageError(f"runtime {case.runtime!r:.80} is not known to the estimator; expected {', '.join(RUNTIMES)}")
    if not fits(case.runtime, micro=case.processor.micro):
        fitting = [name for name in RUNTIMES if fits(name, micro=case.processor.micro)]
        raise UsageError(f"{case.runtime} is not for a {case.processor.core}; expected {', '.join(fitting)}")
    if case.precision not in PRECISIONS:
        raise UsageError(f"precision {case.precision!r:.80}; expected {', '.join(PRECISIONS)}")
    if case.precision not in (possible := RUNTIMES[case.runtime].precisions):
        others = [name for name, other in RUNTIMES.items() if case.precision in other.precisions]
        there = ", ".join(name for name in others if fits(name, micro=case.processor.micro))
        raise UsageError(
            f"{case.runtime} does not compute in {case.precision}, only in {' and '.join(possible)}; "
            f"in {case.precision} on a {case.processor.core}: {there}"
        )
    if not 1 <= case.threads <= 1024:
        raise UsageError(f"threads {case.threads}: expected 1 to 1024")
    if case.threads > (cores := case.processor.cores):
        given = "assumed, as its file gives no cores" if "cores" in case.processor.assumed else "that is all"
        raise UsageError(
            f"threads {case.threads}: {case.processor.board} has {cores} core{'s' * (cores != 1)}, {given}; "
            "an estimate is for a thread a core at most"
        )
    if not case.work:
        raise UsageError("the network has no layer that takes time")


def estimate(case: Case) -> Estimate:
    """Estimate a network's latency on a processor.

    Raises:
        UsageError: as `check_case`.
    """
    check_case(case)
    runtime = RUNTIMES[case.runtime]
    taken = replace(case, runtime=runtime.like)
    layout = Layout([taken])
    logs = log_quantities(constants_of(taken), fitted()["constants"])[None, :]
    ms = layout.layer_seconds(logs) * 1e3
    low, high, basis = _spread(case, runtime)

    def ranged(p50: float) -> Range:
        return Range(p10=p50 * low, p50=p50, p90=p50 * high)

    layers = tuple(
        LayerEstimate(name=w.name, kind=w.kind, macs=w.macs, latency_ms=ranged(float(t)))
        for w, t in zip(case.work, ms, strict=True)
    )
    return Estimate(latency_ms=ranged(float(ms.sum())), layers=layers, basis=basis)


def _spread(case: Case, runtime: Runtime) -> tuple[float, float, tuple[str, ...]]:
    """Give the range as factors, and what it rests on; each part that is not known widens it by itself."""
    spreads, processor = fitted()["spreads"], case.processor
    parts = [spreads[class_of(processor)]]
    basis = [f"range: nine of ten published rows of boards or networks not fitted, {class_of(processor)}"]
    if runtime.like != case.runtime:
        basis.append(f"{case.runtime}: as {runtime.like}, {runtime.because}")
        if not runtime.same:
            parts.append(spreads["another runtime"])
    cores = fitted()["seen"]
    if runtime.counted:
        counted = fitted()["counted"]
        cores = [*cores, *counted]
        basis.append(
            f"{case.runtime}: no published row; fitted to instructions of emulated networks times the cycles that Arm "
            f"publishes ({', '.join(counted)}), estimates themselves; range widened by what they leave open"
        )
        parts.append(spreads["counted"])
    if f"{processor.core} {case.precision}" not in cores:
        basis.append(f"no published row of a {processor.core} in {case.precision} was fitted; range widened")
        parts.append(spreads["another core"])
    if processor.assumed:
        basis.append(f"not given by the target, usual for the core: {', '.join(processor.assumed)}")
    low, high = (math.sqrt(sum(part[i] ** 2 for part in parts)) for i in (0, 1))
    return math.exp(-low), math.exp(high), tuple(basis)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyLimit:
    """What a network may take on a board, by its estimate with weights of 8 bits.

    Attributes:
        most_ms: p50 at most, milliseconds.
        processor: of the board.
        runtime: one of RUNTIMES.
        threads: at least 1.
        by: what estimates.

    Raises:
        UsageError: as `check_case`, or no time is left.
    """

    most_ms: float
    processor: Processor
    runtime: str
    threads: int
    by: Callable[[Case], Estimate] = estimate

    def __post_init__(self) -> None:
        if not 0 < self.most_ms < math.inf:
            raise UsageError(f"--max-latency {self.most_ms:g}: expected milliseconds above 0")
        check_case(self._case((other_work("none", 1, 1),)))

    def _case(self, work: Sequence[Work]) -> Case:
        return Case(
            work=work, processor=self.processor, runtime=self.runtime, precision="int8", threads=self.threads
        )

    def ms(self, graph: Graph) -> Range:
        """Estimate a network."""
        return self.by(self._case(work_of(graph))).latency_ms

    def told(self, graph: Graph) -> str:
        """Say what a network is estimated to take, and what was asked for."""
        found = self.ms(graph)
        return f"latency: {found.p50:.3g} ms, range {found.p10:.3g}-{found.p90:.3g} ms; asked for: {self.text()}"

    def text(self) -> str:
        """Say it, for the record."""
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        profiled = "" if self.by is estimate else ", by a measured profile"
        return f"at most {self.most_ms:g} ms estimated on {self.processor.board}, {self.runtime}, {threads}{profiled}"
