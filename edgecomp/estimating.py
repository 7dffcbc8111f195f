"""Estimate the latency of a network on a board, whatever the user names it by. Nothing here is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgecomp import bundle
from edgecomp.artifact import FILES
from edgecomp.compress import compress
from edgecomp.errors import BundleError, UsageError
from edgecomp.files import MANIFEST
from edgecomp.folder import open_folder
from edgecomp.graph import Graph
from edgecomp.latency import MICRO_RUNTIMES, Case, Estimate, LatencyLimit, Range, estimate
from edgecomp.processor import processor_of
from edgecomp.report import Source, table
from edgecomp.work import total_macs, work_of

if TYPE_CHECKING:
    from edgecomp.check import Stage
    from edgecomp.target import Target

SCHEMA = "edgecomp-estimate/1"
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
            "schema": SCHEMA,
            "source": Source.ESTIMATED.value,
            "model": self.model,
            "target": self.target,
            "runtime": self.runtime,
            "precision": self.precision,
            "threads": self.threads,
            "macs": self.macs,
            "latency_ms": asdict(whole),
            "layers": [
                {"name": x.name, "kind": x.kind.value, "macs": x.macs, "latency_ms": asdict(x.latency_ms)}
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
        rows = [
            (
                x.name,
                x.kind.value,
                f"{x.macs:,}",
                _ms(x.latency_ms.p50),
                _range(x.latency_ms),
                f"{100 * x.latency_ms.p50 / whole.p50:.1f} %",
            )
            for x in sorted(self.estimate.layers, key=lambda x: -x.latency_ms.p50)
        ]
        header = ("layer", "kind", "multiply-adds", "estimated ms", "range ms", "share")
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
    weights: Path | None = None,
    input_shape: tuple[int, int, int] | None = None,
    stage: Stage,
) -> Estimated:
    """Estimate what one image takes.

    Args:
        model: a built folder, a file in one, a graph.edgecomp, or a model as `intake.graph_of` takes it.
        target: the board.
        runtime: one of `latency.RUNTIMES`; None for the file's own, of a folder litert or the first format's own that
            the target has, else litert or, on a microcontroller, tflite-micro.
        precision: one of `latency.PRECISIONS`.
        threads: of the runtime.
        weights: of a model; without them an untrained one serves: time does not depend on values.
        input_shape: (C, H, W) of a model.
        stage: shows how far the work is.

    Raises:
        EdgecompError: the model or file cannot be read, or no estimate can be made for the target.
    """
    processor = processor_of(target)
    graph, own = _read(model, weights, input_shape, stage)
    usual = "tflite-micro" if processor.micro else "litert"
    if Path(model).is_dir():
        own = _of_formats(Path(model), micro=processor.micro)
    if own is not None and (own in MICRO_RUNTIMES) == processor.micro:
        usual = own
    case = Case(
        work=work_of(graph),
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
        estimate=estimate(case),
    )


def latency_limit(
    most_ms: float, target: Target, runtime: str | None, formats: Sequence[str], threads: int
) -> LatencyLimit:
    """Give the limit that a build's channels are cut for; the runtime is the first format's own that the target has.

    Raises:
        UsageError: as `LatencyLimit`.
        TargetError: as `processor_of`.
    """
    processor = processor_of(target)
    own = [_RUNTIME_OF[name] for name in formats]
    fitting = [name for name in own if (name in MICRO_RUNTIMES) == processor.micro]
    usual = fitting[0] if fitting else "tflite-micro" if processor.micro else "litert"
    return LatencyLimit(most_ms=most_ms, processor=processor, runtime=runtime or usual, threads=threads)


def _read(
    model: str, weights: Path | None, input_shape: tuple[int, int, int] | None, stage: Stage
) -> tuple[Graph, str | None]:
    """Give the graph, and the runtime of the file that was named, if that decides it."""
    path = Path(model)
    known = {name: _RUNTIME_OF[form] for form, files in FILES.items() for name in files if form in _RUNTIME_OF}
    is_file = path.suffix in (".onnx", ".tflite", ".edgecomp", ".c", ".h")
    if not (is_file or path.is_dir()):
        from edgecomp.intake import graph_of

        return graph_of(model, weights, input_shape, stage), None
    if weights is not None or input_shape is not None:
        raise UsageError(f"{path}: is built; --weights and --input-shape are of a model, leave them out")
    if path.is_dir():
        return _of_folder(path), None
    if not path.is_file():
        raise BundleError(f"{path}: no such file; expected a file or folder that edgecomp wrote, or a model")
    if path.suffix == ".edgecomp":
        return bundle.load(path), None
    if not (path.parent / MANIFEST).is_file() or path.name not in known:
        raise UsageError(
            f"{path}: does not lie in the folder that edgecomp built it into, where its layers are read; "
            "name that folder, a graph.edgecomp, or the model"
        )
    return _of_folder(path.parent), known[path.name]


def _of_formats(path: Path, *, micro: bool) -> str | None:
    """Choose the runtime of a built folder as `latency_limit` does; LiteRT, as fast as ONNX Runtime there, first."""
    record = open_folder(path).record
    own = [_RUNTIME_OF[artifact["format"]] for artifact in record["artifacts"]]
    fitting = [name for name in own if (name in MICRO_RUNTIMES) == micro]
    return "litert" if "litert" in fitting else fitting[0] if fitting else None


def _of_folder(path: Path) -> Graph:
    folder = open_folder(path)
    return compress(folder.graph, folder.plan)
