"""Run .tflite files with LiteRT or with its predecessor, the TFLite runtime; packed ones are unpacked first."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edgecomp.errors import BundleError
from edgecomp.exporters.unpack_tflite import is_packed, unpack_tflite
from edgecomp.graph import Array

from .runtime import (
    Border,
    Model,
    channels_first,
    channels_last,
    channels_last_border,
    checked_file,
    checked_threads,
    fitting,
    import_runtime,
    one_line,
    place_of,
    quiet,
    sample_image,
    version_of,
)

if TYPE_CHECKING:
    from edgecomp.report import Fact


class LiteRt:
    """Google's LiteRT interpreter with its default kernels: XNNPACK, built-in kernels for what that refuses."""

    formats: ClassVar[tuple[str, ...]] = ("tflite",)
    _name: ClassVar[str] = "litert"
    _module: ClassVar[str] = "ai_edge_litert.interpreter"
    _package: ClassVar[str] = "ai-edge-litert"
    _resolver: ClassVar[str] = "AUTO"

    def __init__(self, model: Model, *, threads: int = 1) -> None:
        self._place = place_of(model)
        self._threads = checked_threads(threads)
        module = import_runtime(self._module, self._package)
        file = checked_file(model, self._name)
        self._unpacked = _needs_unpacking(file)
        if self._unpacked:
            file = unpack_tflite(file.read_bytes() if isinstance(file, Path) else file, self._place)
        self.version = version_of(self._module.partition(".")[0], self._package)
        source: dict[str, object] = {"model_path": str(file)} if isinstance(file, Path) else {"model_content": file}
        try:
            with quiet():
                self._interpreter = module.Interpreter(
                    **source,
                    num_threads=threads,
                    experimental_op_resolver_type=getattr(module.OpResolverType, self._resolver),
                )
                self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise BundleError(f"{self._place}: {self._name} cannot load it: {one_line(error)}") from error
        inputs, self._outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        if len(inputs) != 1 or not self._outputs:
            raise BundleError(f"{self._place}: the model has {len(inputs)} inputs and {len(self._outputs)} outputs")
        self._index = inputs[0]["index"]
        self.input, self.output = self._border(inputs[0]), self._border(self._outputs[0])
        self._ready = False

    def _border(self, details: Mapping[str, Any]) -> Border:
        shape, dtype = tuple(int(size) for size in details["shape"]), np.dtype(details["dtype"])
        scale, zero_point = details["quantization"]
        return channels_last_border(str(details["name"]), shape, dtype, float(scale), int(zero_point), self._place)

    def run(self, x: Array) -> Array:
        """Give the first output for N images, one by one."""
        return self.run_all(x)[self.output.name]

    def run_all(self, x: Array) -> dict[str, Array]:
        """Give every output by name for N images, one by one."""
        x = fitting(x, self.input, self._place)
        self._ready = False
        images = channels_last(x)
        parts: list[list[Array]] = []
        for i in range(len(images)):
            self._interpreter.set_tensor(self._index, images[i : i + 1])
            self._invoke()
            parts.append([self._interpreter.get_tensor(details["index"]) for details in self._outputs])
        columns = (np.concatenate(values) for values in zip(*parts, strict=True))
        named = zip(self._outputs, columns, strict=True)
        return {str(details["name"]): channels_first(y) for details, y in named}

    def infer_once(self) -> None:
        """Run one image; the input lies in the interpreter's tensor, the outputs stay in theirs."""
        if not self._ready:
            self._interpreter.set_tensor(self._index, channels_last(sample_image(self.input)))
            self._ready = True
        self._invoke()

    def _invoke(self) -> None:
        try:
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise BundleError(f"{self._place}: {self._name} fails to run it: {one_line(error)}") from error

    def describe(self) -> dict[str, Fact]:
        """Say how the interpreter executes this model: which operators the XNNPACK delegate took, and which it left.

        What it took runs in so many partitions: between two of them tensors go through the built-in kernels.
        """
        ops = self._interpreter._get_ops_details()  # no public way to ask
        left = _undelegated(ops)
        partitions = sum(op["op_name"] == "DELEGATE" for op in ops)
        nodes = len(ops) - partitions
        return {
            "kernels": "reference" if self._resolver == "BUILTIN_REF" else "default",
            "xnnpack": len(left) < nodes,
            "nodes": nodes,
            "nodes_in_xnnpack": nodes - len(left),
            "xnnpack_partitions": partitions,
            "nodes_left_to_builtin_kernels": tuple(f"{n} {name}" for name, n in sorted(Counter(left).items())),
            "threads": self._threads,
            "unpacked_at_load": self._unpacked,
        }


def _needs_unpacking(file: Path | bytes) -> bool:
    """Tell whether a file is packed, from its structure alone: weights are not read."""
    if isinstance(file, bytes):
        return is_packed(file)
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return is_packed(mapped)


def _undelegated(ops: list[Mapping[str, Any]]) -> list[str]:
    """List the op names of nodes that no delegate took over.

    The interpreter lists the file's nodes and, after them, a DELEGATE node for each part that it handed over; which
    nodes these parts hold follows from their inputs and outputs.
    """
    writer = {int(t): i for i, op in enumerate(ops) if op["op_name"] != "DELEGATE" for t in op["outputs"]}
    taken: set[int] = set()
    for part in (op for op in ops if op["op_name"] == "DELEGATE"):
        border = {int(t) for t in part["inputs"]}
        todo = [int(t) for t in part["outputs"]]
        while todo:
            node = writer.get(todo.pop())
            if node is not None and node not in taken:
                taken.add(node)
                todo.extend(int(t) for t in ops[node]["inputs"] if int(t) not in border)
    return [str(op["op_name"]) for i, op in enumerate(ops) if op["op_name"] != "DELEGATE" and i not in taken]


class LiteRtReference(LiteRt):
    """LiteRT with its plain reference kernels: slow, for comparing outputs."""

    _name: ClassVar[str] = "litert-reference"
    _resolver: ClassVar[str] = "BUILTIN_REF"


class TfliteRuntime(LiteRt):
    """LiteRT's predecessor, for boards that have no newer wheel."""

    _name: ClassVar[str] = "tflite-runtime"
    _module: ClassVar[str] = "tflite_runtime.interpreter"
    _package: ClassVar[str] = "tflite-runtime"
