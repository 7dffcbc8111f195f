"""The runtimes that execute exported files, by name, all behind one interface; images are NCHW for every one of them.

A runner is made from a file (or from its bytes; the reference interpreter, from a Graph) and runs images; it measures
nothing itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import numpy as np

import edgecomp
from edgecomp.errors import BundleError, TargetError, UsageError
from edgecomp.graph import Array, Graph

from .compiled_c import CompiledC
from .litert import LiteRt, LiteRtReference, TfliteRuntime
from .onnx_runtime import OnnxRuntime, OnnxRuntimeLean, optimized
from .runtime import Border, Model, Runner, checked_threads, fitting, place_of, sample_image
from .tflm import TfliteMicro

if TYPE_CHECKING:
    from edgecomp.report import Fact

__all__ = [
    "RUNNERS",
    "Border",
    "CompiledC",
    "LiteRt",
    "LiteRtReference",
    "Model",
    "OnnxRuntime",
    "OnnxRuntimeLean",
    "Reference",
    "Runner",
    "TfliteMicro",
    "TfliteRuntime",
    "default_runtime",
    "optimized",
    "runner_class",
]
_KEPT_BYTES = 1 << 28


class Reference:
    """Our own interpreter, on a Graph: the definition of correct, not fast."""

    formats: ClassVar[tuple[str, ...]] = ("graph",)

    def __init__(self, model: Model, *, threads: int = 1) -> None:
        if not isinstance(model, Graph):
            raise UsageError(f"{place_of(model)}: the runtime 'reference' runs graphs, not files; load the graph first")
        if len(model.inputs) != 1:
            raise BundleError(f"{model.name}: the model has {len(model.inputs)} inputs, expected one")
        self._graph, self._threads = model, checked_threads(threads)
        self.version = edgecomp.__version__
        self.input, self.output = self._border(model.inputs[0]), self._border(model.outputs[0])
        self._image = sample_image(self.input)
        # The interpreter keeps every activation, and computes integers in 64 bits.
        kept = 8 * sum(math.prod(t.shape[1:]) for t in model.tensors.values() if t.data is None)
        self._at_once = max(1, _KEPT_BYTES // kept)

    def _border(self, name: str) -> Border:
        tensor = self._graph.tensors[name]
        dtype = np.dtype(np.float32 if tensor.quant is None else np.int8)
        return Border(name=name, shape=tensor.shape[1:], dtype=dtype, quant=tensor.quant)

    def run(self, x: Array) -> Array:
        """Give the first output for N images."""
        return self.run_all(x)[self.output.name]

    def run_all(self, x: Array) -> dict[str, Array]:
        """Give every output by name for N images."""
        from edgecomp import reference

        x = fitting(x, self.input, self._graph.name)
        parts = []
        for start in range(0, max(1, len(x)), self._at_once):
            values = reference.run(self._graph, {self.input.name: x[start : start + self._at_once]})
            parts.append({name: values[name] for name in self._graph.outputs})
        return {name: np.concatenate([part[name] for part in parts]) for name in self._graph.outputs}

    def infer_once(self) -> None:
        """Run one image."""
        from edgecomp import reference

        reference.run(self._graph, {self.input.name: self._image})

    def describe(self) -> dict[str, Fact]:
        """Say how the interpreter executes this model."""
        return {"kernels": "numpy"}


RUNNERS: Mapping[str, type[Runner]] = MappingProxyType(
    {
        "onnxruntime": OnnxRuntime,
        "onnxruntime-lean": OnnxRuntimeLean,
        "litert": LiteRt,
        "litert-reference": LiteRtReference,
        "tflite-runtime": TfliteRuntime,
        "tflite-micro": TfliteMicro,
        "c": CompiledC,
        "reference": Reference,
    }
)
"""Every runtime by name; for a format, the first that reads it is the default."""


def default_runtime(format: str) -> str:
    """Name the runtime that a format is measured with unless the user says otherwise.

    Raises:
        TargetError: no runtime reads it.
    """
    for name, runner in RUNNERS.items():
        if format in runner.formats:
            return name
    formats = sorted({format for runner in RUNNERS.values() for format in runner.formats})
    raise TargetError(f"no runtime reads the format {format!r:.80}; expected one of {', '.join(formats)}")


def runner_class(runtime: str) -> type[Runner]:
    """Look up a runtime by name.

    Raises:
        UsageError: there is none of that name.
    """
    if runtime not in RUNNERS:
        raise UsageError(f"runtime {runtime!r:.80} is unknown; expected one of {', '.join(RUNNERS)}")
    return RUNNERS[runtime]
