"""Estimate the latency of a network on a board, whatever the user names it by. Nothing here is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgecomp import bundle
from edgecomp.artifact import FILES
from edgecomp.comparing import read_baseline
from edgecomp.compress import compress
from edgecomp.errors import BundleError, UsageError
from edgecomp.files import MANIFEST
from edgecomp.folder import open_folder, read_file
from edgecomp.latency import MICRO_RUNTIMES, Case, Estimate, LatencyLimit, LayerSource, Range, estimate
from edgecomp.processor import processor_of
from edgecomp.profiled import Profile, profile_of
from edgecomp.report import ESTIMATE_SCHEMA, Source, table
from edgecomp.work import Work, total_macs, work_of

if TYPE_CHECKING:
    from edgecomp.check import Stage
    from edgecomp.target import Target

_RUNTIME_OF = {"onnx": "onnxruntime", "tflite": "litert", "tflm": "tflite-micro", "c": "c"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimated:
    """An estimate with what it was made for.

    Attributes:
        model, target: as the user named them.
        runtime, precision, threads: that were asked for, or chosen.
        macs: of the network.
        estimate: the latency, and by layer.
    """

    model: str
    target: str
    runtime: str
    precision: str
    threads: int
    macs: int
    estimate: Estimate

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
        return "\n".join((title, *(f"- {line}" for line in self.estimate.basis), "", table(rows, header)))


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
            format's own that the target has, else litert or, on a microcontroller, tflite-micro.
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
    work, own = _read(model, weights, input_shape, stage)
    usual = "tflite-micro" if processor.micro else "litert"
    if Path(model).is_dir():
        own = _of_formats(Path(model), micro=processor.micro)
    if own is not None and (own in MICRO_RUNTIMES) == processor.micro:
        usual = own
    measured = None if profile is None else read_profile(*profile)
    if measured is not None:
        usual = measured.report.runtime
        measured.check(target=target.name, runtime=runtime or usual, precision=precision, threads=threads)
    case = Case(
        work=work,
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
    )


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


def _read(
    model: str, weights: Path | None, input_shape: tuple[int, int, int] | None, stage: Stage
) -> tuple[Sequence[Work], str | None]:
    """Give the work of the layers, and the runtime of the file that was named, if that decides it."""
    path = Path(model)
    known = {name: _RUNTIME_OF[form] for form, files in FILES.items() for name in files if form in _RUNTIME_OF}
    is_file = path.suffix in (".onnx", ".tflite", ".edgecomp", ".c", ".h")
    if not (is_file or path.is_dir()):
        from edgecomp.intake import graph_of

        return work_of(graph_of(model, weights, input_shape, stage)), None
    if weights is not None or input_shape is not None:
        raise UsageError(f"{path}: is built; --weights and --input-shape are of a model, leave them out")
    if path.is_dir():
        return _of_folder(path), None
    if not path.is_file():
        raise BundleError(f"{path}: no such file; expected a file or folder that edgecomp wrote, or a model")
    if path.suffix == ".edgecomp":
        return work_of(bundle.load(path)), None
    if (path.parent / MANIFEST).is_file() and path.name in known:
        return _of_folder(path.parent), known[path.name]
    if path.suffix in (".c", ".h"):
        raise UsageError(
            f"{path}: does not lie in the folder that edgecomp built it into, where its layers are read; "
            "name that folder, a graph.edgecomp, or the model"
        )
    return _of_file(path)


def _of_formats(path: Path, *, micro: bool) -> str | None:
    """Choose the runtime of a built folder as `latency_limit` does; LiteRT, as fast as ONNX Runtime there, first."""
    record = open_folder(path).record
    own = [_RUNTIME_OF[artifact["format"]] for artifact in record["artifacts"]]
    fitting = [name for name in own if (name in MICRO_RUNTIMES) == micro]
    return "litert" if "litert" in fitting else fitting[0] if fitting else None


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


def _of_folder(path: Path) -> Sequence[Work]:
    folder = open_folder(path)
    return work_of(compress(folder.graph, folder.plan))
