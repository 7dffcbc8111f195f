"""Estimate the latency of a network on a board, whatever the user names it by. Nothing here is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgecomp import bundle
from edgecomp.artifact import FILES, AtRest
from edgecomp.comparing import read_baseline
from edgecomp.compress import compress
from edgecomp.errors import BundleError, UsageError
from edgecomp.files import MANIFEST
from edgecomp.folder import open_folder, read_file
from edgecomp.footprint import Footprint, activation_bytes, layer_activation_bytes
from edgecomp.latency import (
    MICRO_RUNTIMES,
    PRECISIONS,
    RUNTIMES,
    Case,
    Estimate,
    LatencyLimit,
    LayerSource,
    Range,
    estimate,
)
from edgecomp.processor import processor_of
from edgecomp.profiled import Profile, profile_of
from edgecomp.report import ESTIMATE_SCHEMA, Source, table
from edgecomp.work import Work, total_macs, work_of

if TYPE_CHECKING:
    from edgecomp.check import Stage
    from edgecomp.graph import Graph
    from edgecomp.target import Target

_RUNTIME_OF = {"onnx": "onnxruntime", "tflite": "litert", "tflm": "tflite-micro", "c": "c"}
_IN_PLACE = {"tflite": "tflite-micro", "tflm": "tflite-micro", "c": "c"}
"""What on a microcontroller reads a file of a format where it is stored; of two, the later is made for it."""
_SOURCES = (".c", ".cc", ".h")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimated:
    """An estimate with what it was made for.

    Attributes:
        model, target: as the user named them.
        runtime, precision, threads: that were asked for, or chosen.
        macs: of the network.
        estimate: the latency, and by layer.
        memory: what the network needs of the board's.
    """

    model: str
    target: str
    runtime: str
    precision: str
    threads: int
    macs: int
    estimate: Estimate
    memory: Footprint

    def to_json(self) -> dict[str, object]:
        """Give it for machines; `source` says that nothing was measured."""
        whole = self.estimate.latency_ms
        return {
            "schema": ESTIMATE_SCHEMA,
            "source": Source.ESTIMATED.value,
            "model": self.model,
            "target": self.target,
            "runtime": self.runtime,
            "precision": self.precision,
            "threads": self.threads,
            "macs": self.macs,
            "latency_ms": asdict(whole),
            "layers": [
                {
                    "name": x.name,
                    "kind": x.kind.value,
                    "macs": x.macs,
                    "latency_ms": asdict(x.latency_ms),
                    "source": x.source.value,
                }
                for x in self.estimate.layers
            ],
            "basis": list(self.estimate.basis),
            "memory": self.memory.to_json(),
        }

    def table(self) -> str:
        """Give it for people: the whole, what it rests on, and the layers, the longest first."""
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        whole = self.estimate.latency_ms
        title = (
            f"{self.model} on {self.target}, {self.runtime}, {self.precision}, {threads}: estimated "
            f"{_ms(whole.p50)} ms, range {_range(whole)} ms; {self.macs:,} multiply-adds"
        )
        profiled = any(x.source is not LayerSource.ESTIMATED for x in self.estimate.layers)
        rows = [
            (
                x.name,
                x.kind.value,
                f"{x.macs:,}",
                _ms(x.latency_ms.p50),
                _range(x.latency_ms),
                f"{100 * x.latency_ms.p50 / whole.p50:.1f} %",
                *([x.source.value] if profiled else []),
            )
            for x in sorted(self.estimate.layers, key=lambda x: -x.latency_ms.p50)
        ]
        time = "ms" if profiled else "estimated ms"
        header = ("layer", "kind", "multiply-adds", time, "range ms", "share", *(["source"] if profiled else []))
        lines = [line for line in (self.memory.text(), *self.estimate.basis) if line]
        return "\n".join((title, *(f"- {line}" for line in lines), "", table(rows, header)))


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _range(value: Range) -> str:
    return f"{_ms(value.p10)}-{_ms(value.p90)}"


def estimate_model(
    model: str,
    *,
    target: Target,
    runtime: str | None = None,
    precision: str = "int8",
    threads: int = 1,
    profile: tuple[Path, Path] | None = None,
    weights: Path | None = None,
    input_shape: tuple[int, int, int] | None = None,
    stage: Stage,
) -> Estimated:
    """Estimate what one image takes.

    Args:
        model: a built folder, a file in one, an ONNX or TFLite file of ours from anywhere, a graph.edgecomp, or a model
            as `intake.graph_of` takes it.
        target: the board.
        runtime: one of `latency.RUNTIMES`; None for the profile's or the file's own, of a folder litert or the first
            format's own that the target has and that computes in this precision, else litert or, on a microcontroller,
            tflite-micro.
        precision: one of `latency.PRECISIONS`.
        threads: of the runtime.
        profile: see `read_profile`.
        weights: of a model; without them an untrained one serves: time does not depend on values.
        input_shape: (C, H, W) of a model.
        stage: shows how far the work is.

    Raises:
        EdgecompError: the model or file cannot be read, or no estimate can be made for the target.
    """
    processor = processor_of(target)
    network = _read(model, weights, input_shape, stage)
    own = [name for name in network.runtimes if precision in RUNTIMES[name].precisions]
    fitting = [name for name in own if (name in MICRO_RUNTIMES) == processor.micro]
    usual = fitting[0] if fitting else "tflite-micro" if processor.micro else "litert"
    measured = None if profile is None else read_profile(*profile)
    if measured is not None:
        usual = measured.report.runtime
        measured.check(target=target.name, runtime=runtime or usual, precision=precision, threads=threads)
    case = Case(
        work=network.work,
        processor=processor,
        runtime=runtime or usual,
        precision=precision,
        threads=threads,
    )
    return Estimated(
        model=model,
        target=target.name,
        runtime=case.runtime,
        precision=precision,
        threads=threads,
        macs=total_macs(case.work),
        estimate=estimate(case) if measured is None else measured.estimate(case),
        memory=_footprint(network, case, target),
    )


def _footprint(network: _Network, case: Case, target: Target) -> Footprint:
    micro, element_bytes = case.processor.micro, PRECISIONS[case.precision]
    at_once = None
    # X-CUBE-AI's plans take less than layer by layer: 220.6 KiB where Tiny YOLO v2 writes 576 (published by ST).
    if not micro or case.runtime in _IN_PLACE.values():
        # Our C adds a sum as the convolution before it writes, into what it adds.
        graph = None if case.runtime == "c" else network.graph
        by_layer = layer_activation_bytes(case.work, element_bytes)
        at_once = by_layer if graph is None else activation_bytes(graph, element_bytes)
    counted = Footprint(
        weight_bytes=element_bytes * sum(w.weights for w in case.work),
        activation_bytes=at_once,
        in_flash=micro,
        flash_bytes=target.flash_bytes,
        ram_bytes=target.ram_bytes,
    )
    # A microcontroller reads the file where it is stored; elsewhere weights are widened in RAM, however packed.
    stored = network.stored.get(case.runtime) if case.precision == "int8" else None
    if stored is None:
        return counted
    arena_bytes = at_once if stored.arena_bytes is None else stored.arena_bytes
    return replace(counted, weight_bytes=stored.n_bytes, activation_bytes=arena_bytes, file=stored.name)


def read_profile(report: Path, file: Path) -> Profile:
    """Read what a file's operators took.

    Args:
        report: what `edgecomp bench --target ssh://... --profile --json` wrote.
        file: that it measured; its layers say what was asked of the device.

    Raises:
        BundleError: one of them cannot be read.
        UsageError: the report is not about this file, or as `profiled.profile_of`.
    """
    work, _ = _of_file(file)
    digest = hashlib.sha256(read_file(file)).hexdigest()
    found = [r for comparison in read_baseline(report) for r in comparison.reports if r.sha256 == digest]
    if not found:
        raise UsageError(f"{report}: has no report of {file} (SHA-256 {digest[:12]}...); name the file it measured")
    timed = [r for r in found if r.layers_us] or found
    if len(timed) > 1:
        raise UsageError(f"{report}: has {len(timed)} reports of {file}; expected one device, one runtime")
    return profile_of(timed[0], work, str(report))


def latency_limit(
    most_ms: float,
    target: Target,
    runtime: str | None,
    formats: Sequence[str],
    threads: int,
    profile: tuple[Path, Path] | None = None,
) -> LatencyLimit:
    """Give the limit that a build's channels are cut for.

    The runtime is the profile's, or else the first format's own that the target has.

    Raises:
        BundleError, UsageError: as `LatencyLimit` and `read_profile`.
        TargetError: as `processor_of`.
    """
    processor = processor_of(target)
    own = [_RUNTIME_OF[name] for name in formats]
    fitting = [name for name in own if (name in MICRO_RUNTIMES) == processor.micro]
    usual = fitting[0] if fitting else "tflite-micro" if processor.micro else "litert"
    by = estimate
    if profile is not None:
        measured = read_profile(*profile)
        usual, by = measured.report.runtime, measured.estimate
        measured.check(target=target.name, runtime=runtime or usual, precision="int8", threads=threads)
    return LatencyLimit(most_ms=most_ms, processor=processor, runtime=runtime or usual, threads=threads, by=by)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """What of a file lies in a microcontroller's flash.

    Attributes:
        name: of the file.
        n_bytes: in flash.
        arena_bytes: RAM that its manifest says it takes; None where nothing says.
    """

    name: str
    n_bytes: int
    arena_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Network:
    """What the user named.

    Attributes:
        work: of its layers.
        runtimes: that its files are for, the first choice first; none of a model.
        graph: its operators; None of a file that lies alone.
        stored: what is known of its files, by the runtime that reads them in place.
    """

    work: Sequence[Work]
    runtimes: tuple[str, ...] = ()
    graph: Graph | None = None
    stored: Mapping[str, _Stored] = field(default_factory=dict)


def _read(model: str, weights: Path | None, input_shape: tuple[int, int, int] | None, stage: Stage) -> _Network:
    path = Path(model)
    known = {name: _RUNTIME_OF[form] for form, files in FILES.items() for name in files}
    is_file = path.suffix in (".onnx", ".tflite", ".edgecomp", *_SOURCES)
    if not (is_file or path.is_dir()):
        from edgecomp.intake import graph_of

        return _of_graph(graph_of(model, weights, input_shape, stage))
    if weights is not None or input_shape is not None:
        raise UsageError(f"{path}: is built; --weights and --input-shape are of a model, leave them out")
    if path.is_dir():
        return _of_folder(path)
    if not path.is_file():
        raise BundleError(f"{path}: no such file; expected a file or folder that edgecomp wrote, or a model")
    if path.suffix == ".edgecomp":
        return _of_graph(bundle.load(path))
    if (path.parent / MANIFEST).is_file() and path.name in known:
        return replace(_of_folder(path.parent), runtimes=(known[path.name],))
    if path.suffix in _SOURCES:
        raise UsageError(
            f"{path}: does not lie in the folder that edgecomp built it into, where its layers are read; "
            "name that folder, a graph.edgecomp, or the model"
        )
    from edgecomp.exporters.unpack_tflite import is_packed

    work, runtime = _of_file(path)
    data = read_file(path)
    # A float file is not what a microcontroller stores in int8.
    in_place = path.suffix == ".tflite" and not is_packed(data) and len(data) < 4 * sum(w.weights for w in work)
    stored = {"tflite-micro": _Stored(name=path.name, n_bytes=len(data))} if in_place else {}
    return _Network(work=work, runtimes=(runtime,), stored=stored)


def _of_graph(graph: Graph) -> _Network:
    return _Network(work=work_of(graph), graph=graph)


def _of_file(path: Path) -> tuple[Sequence[Work], str]:
    """Count the layers of a file that lies alone, from the file itself."""
    from edgecomp.exporters.onnx_work import onnx_work
    from edgecomp.exporters.tflite_work import tflite_work

    if path.suffix not in (".onnx", ".tflite"):
        raise UsageError(f"{path}: expected an .onnx or .tflite that edgecomp wrote")
    data = read_file(path)
    if path.suffix == ".onnx":
        return onnx_work(data, str(path)), _RUNTIME_OF["onnx"]
    micro = path.name.endswith(".tflm.tflite")
    return tflite_work(data, str(path)), _RUNTIME_OF["tflm" if micro else "tflite"]


def _of_folder(path: Path) -> _Network:
    folder = open_folder(path)
    artifacts = {artifact["format"]: artifact for artifact in folder.record["artifacts"]}
    stored = {}
    for form, runtime in _IN_PLACE.items():
        artifact = artifacts.get(form, {})
        n_bytes = artifact.get("flash_bytes" if form == "c" else "bytes")
        arena_bytes = artifact.get("arena_bytes" if form == "c" else "arena_head_bytes")
        packed = form == "tflite" and artifact.get("weights_at_rest") == AtRest.PACKED
        if isinstance(n_bytes, int) and isinstance(arena_bytes, int | None) and not packed:
            stored[runtime] = _Stored(name=artifact["path"], n_bytes=n_bytes, arena_bytes=arena_bytes)
    # LiteRT, as fast as ONNX Runtime there, first.
    runtimes = sorted((_RUNTIME_OF[form] for form in artifacts), key=lambda name: name != "litert")
    graph = compress(folder.graph, folder.plan)
    return _Network(work=work_of(graph), runtimes=tuple(runtimes), graph=graph, stored=stored)
