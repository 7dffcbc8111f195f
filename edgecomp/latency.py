"""How long a network takes on a processor: an estimate from physics with few constants, never a measurement.

A layer computes and moves bytes, and these overlap in part: (compute^p + memory^p)^(1/p), plus a constant a layer.

compute  multiply-adds times cycles each, relative to the core's peak, by kind of operator; activation bytes through the
         cache; both shared among threads but for a serial share.
memory   weights, and activations beyond the cache, over what so many threads can move.

The constants were fitted to published latencies (`benchmarks.latency_fit`) and stand in latency.json, with how far
published rows lay from an estimate that had not seen their board or their network. Not here: where work and processor
come from (`work`, `processor`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from edgecomp.errors import UsageError
from edgecomp.graph import Array
from edgecomp.processor import Processor
from edgecomp.work import Kind, Work

PRECISIONS: Mapping[str, int] = {"fp32": 4, "fp16": 2, "int8": 1}
"""Bytes of an element."""
KINDS = tuple(Kind)
_FIRST, _DENSE, _OTHER = (KINDS.index(kind) for kind in (Kind.FIRST, Kind.DENSE, Kind.OTHER))
_PHYSICS = ("bytes", "layer", "fork", "serial", "copy", "fill", "winograd", "inputs", "outputs", "power", "weights", "whole")
QUANTITIES = (*(f"kind {kind}" for kind in KINDS), *_PHYSICS)
"""What a layer's time is made of; each is the exponential of a sum of fitted constants.

kind K: cycles that a multiply-add takes, times the core's peak; of FIRST, what an output takes beside its multiply-adds,
which are as those of DENSE; of OTHER, cycles a byte. bytes: cycles a byte of
activations. layer: cycles a layer. fork: those that threads add. serial: share that threads do not share. copy, fill: what
one thread, and what all can move, over what the board's own figures say. winograd: times the activations that Winograd's
algorithm moves. inputs, outputs: how many channels more a layer seems to have, for loops that do not fill. power: p - 1/2.
weights: times the bytes of fully connected weights, which are read in order. whole: what a board that was fitted takes more
or less than others of its kind.
"""
_WINOGRAD = frozenset({"ncnn"})
"""Runtimes that compute 3x3 convolutions by Winograd's algorithm; elsewhere they are as other dense ones."""


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
        f"{family} core {processor.core} {precision}",
        f"runtime {runtime}",
        f"runtime {runtime} {precision}",
    ]
    if era:
        shared += [f"runtime {case.runtime}", f"runtime {case.runtime} {precision}"]
    if processor.narrow:
        shared.append(f"{family} narrow")
    names: dict[str, tuple[str, ...]] = {}
    for kind in KINDS:
        if kind is Kind.OTHER:
            names["kind other"] = (f"{family} other", f"runtime {runtime} other", f"runtime {runtime}")
            continue
        as_kind = Kind.DENSE if kind is Kind.DENSE3X3 and runtime not in _WINOGRAD else kind
        names[f"kind {kind}"] = (f"{family} {precision} {as_kind}", f"runtime {runtime} {as_kind}", *shared)
    names |= {quantity: (f"{family} {quantity}",) for quantity in _PHYSICS}
    names["layer"] += (f"runtime {runtime} layer",)
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
        # Bandwidths add up like resistors: what the threads ask for, and what the memory gives.
        memory = traffic * (1 / (self.threads * self.copy * q["copy"]) + 1 / (self.fill * q["fill"]))
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


# ---- the fitted estimator ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Milliseconds: p50 is the estimate; of published rows that it had not seen, nine of ten lay from p10 to p90."""

    p10: float
    p50: float
    p90: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEstimate:
    """One layer's share of an estimate."""

    name: str
    kind: Kind
    macs: int
    latency_ms: Range


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An estimate, and what it rests on.

    Attributes:
        latency_ms: of the whole network.
        layers: in running order; their p50 sum up to the whole's, their ranges do not.
        basis: what the range was taken from, for people.
    """

    latency_ms: Range
    layers: tuple[LayerEstimate, ...]
    basis: str


@cache
def fitted() -> Mapping[str, Any]:
    """Read latency.json: constants, and logarithms of published over estimated by class."""
    text = resources.files(__package__).joinpath("latency.json").read_text("utf-8")
    found: Mapping[str, Any] = json.loads(text)
    return found
