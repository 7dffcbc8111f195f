"""An estimate corrected by what one file took on the device itself, operator by operator: where a profile was measured.

A layer that asks for the same as the measured one of its name takes the measured time. One that was cut since takes
that time by the ratio of the two estimates; any other its estimate, by how far estimates of its kind were off. The
whole stays an estimate: a profile is of one run of one file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgecomp.errors import UsageError
from edgecomp.latency import Case, Estimate, LayerEstimate, LayerSource, Range, estimate
from edgecomp.report import BenchReport, Source
from edgecomp.work import Kind, Work

_FUSED = re.compile(r"_token_\d+$")
"""What onnxruntime appends to the name of an operator that it fused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What a file's operators took on a device.

    Attributes:
        work: of that file.
        times_us: by layer; what the profiler did not time is missing.
        rest_us: of operators that are no layer: codes made, layouts changed, gates.
        report: which says it, with the whole's latency.
        where: names it in errors.
    """

    work: Sequence[Work]
    times_us: Mapping[str, float]
    rest_us: float
    report: BenchReport
    where: str

    def check(self, *, target: str, runtime: str, precision: str, threads: int) -> None:
        """Refuse to answer for what was not measured.

        Raises:
            UsageError: another board, runtime, precision or number of threads.
        """
        asked = {"target": target, "runtime": runtime, "threads": threads}
        for name, value in asked.items():
            measured = getattr(self.report, name)
            if value != measured:
                raise UsageError(f"{self.where}: was measured with {name} {measured}, asked for is {value}")
        if precision != "int8":
            raise UsageError(f"{self.where}: was measured in int8, asked for is {precision}")

    def estimate(self, case: Case) -> Estimate:
        """Estimate a network by this profile.

        Args:
            case: of the measured runtime, threads and board (see `check`).

        Raises:
            UsageError: as `latency.check_case`.
        """
        plain, file = estimate(case), estimate(replace(case, work=self.work))
        usual_us = {layer.name: 1e3 * layer.latency_ms.p50 for layer in file.layers}
        off = _off(self.work, self.times_us, usual_us)
        # What is no layer, and what the profiler itself takes, is spread over all: the sum is the measured latency.
        stand_in = {w.name: self.times_us.get(w.name, off[w.kind] * usual_us[w.name]) for w in self.work}
        p50_us = self.report.p50_us
        assert p50_us is not None
        share = p50_us / sum(stand_in.values())
        low, high = (float(np.percentile(self.report.samples_us, p)) / p50_us for p in (10, 90))
        known = {w.name: w for w in self.work if w.name in self.times_us}
        layers = []
        for work, layer in zip(case.work, plain.layers, strict=True):
            usual = layer.latency_ms
            ends, source = (usual.p10 / usual.p50, usual.p90 / usual.p50), LayerSource.ESTIMATED
            ms = share * off[work.kind] * usual.p50
            if work.name in known:
                source = LayerSource.SCALED
                ms = share * self.times_us[work.name] * usual.p50 / usual_us[work.name]
            if work == known.get(work.name):
                ms, ends, source = share * self.times_us[work.name] / 1e3, (low, high), LayerSource.MEASURED
            latency = Range(p10=ms * ends[0], p50=ms, p90=ms * ends[1])
            layers.append(replace(layer, latency_ms=latency, source=source))
        whole = Range(**{end: sum(getattr(layer.latency_ms, end) for layer in layers) for end in ("p10", "p50", "p90")})
        return Estimate(latency_ms=whole, layers=tuple(layers), basis=(*self._basis(layers, whole), *plain.basis))

    def _basis(self, layers: Sequence[LayerEstimate], whole: Range) -> list[str]:
        found = []
        for source, text in _TEXTS.items():
            of_source = [layer.latency_ms.p50 for layer in layers if layer.source is source]
            if of_source:
                percent = 100 * sum(of_source) / whole.p50
                found.append(f"{len(of_source)} of {len(layers)} layers, {percent:.0f} % of the time, {text}")
        total = self.rest_us + sum(self.times_us.values())
        report = self.report
        return [
            f"profile of {report.artifact} on {report.target}: operators of no layer, {100 * self.rest_us / total:.0f} "
            f"% of its time, are spread over all; scaled to its measured {(report.p50_us or 0) / 1e3:.3g} ms",
            *found,
        ]


_TEXTS = {
    LayerSource.MEASURED: "measured there; their range is that of the samples",
    LayerSource.SCALED: "measured there before they were cut, times the ratio of two estimates",
    LayerSource.ESTIMATED: "not measured: estimated, times how far estimates of their kind were off there",
}


def _off(work: Sequence[Work], times_us: Mapping[str, float], usual_us: Mapping[str, float]) -> Mapping[str, float]:
    """Give by kind what was measured over what was estimated; for a kind that was not measured, that of all."""

    def ratio(layers: Sequence[Work]) -> float:
        return sum(times_us[w.name] for w in layers) / sum(usual_us[w.name] for w in layers)

    timed = [w for w in work if w.name in times_us]
    by_kind = {kind: [w for w in timed if w.kind is kind] for kind in Kind}
    return {kind: ratio(layers or timed) for kind, layers in by_kind.items()}


def profile_of(report: BenchReport, work: Sequence[Work], where: str) -> Profile:
    """Find the layers of a file among the operators that a report of it timed.

    Args:
        report: of the file.
        work: of the file.
        where: names the report in errors.

    Raises:
        UsageError: nothing was measured, it does not count, or its operators are none of the file's.
    """
    if report.source is not Source.MEASURED:
        raise UsageError(f"{where}: is {report.source}; a profile is what a device's own run gives")
    if report.not_valid:
        raise UsageError(f"{where}: is not valid: {'; '.join(report.not_valid)[:200]}; measure again")
    if not report.layers_us:
        raise UsageError(f"{where}: has no times of operators; measure with --profile, a file in ONNX")
    names, times, rest = {w.name for w in work}, dict[str, float](), 0.0
    for operator, us in report.layers_us.items():
        name = operator.rpartition(" ")[0]
        layer = name if name in names else _FUSED.sub("", name)
        if layer in names:
            times[layer] = times.get(layer, 0.0) + us
        else:
            rest += us
    if not sum(times.values()) or not report.p50_us:
        raise UsageError(f"{where}: times no layer of the file that it is of; measure with onnxruntime")
    return Profile(work=work, times_us=times, rest_us=rest, report=report, where=where)
