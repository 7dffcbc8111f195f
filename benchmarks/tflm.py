"""Run .tflite files with TFLite Micro, its interpreter and reference kernels compiled for this machine."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edgecomp.errors import BundleError
from edgecomp.exporters.flatbuffer import Flatbuffer
from edgecomp.exporters.modelfacts import MEANT_BY_DAMAGED
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
    held_back,
    import_runtime,
    one_line,
    place_of,
    sample_image,
)

if TYPE_CHECKING:
    from edgecomp.report import Fact

_PACKAGE = "tflite-micro"
_ROOM_BYTES = 1 << 20
_ROOM_BYTES_AN_ELEMENT = 16
_MOST_ROOM_BYTES = (1 << 31) - 1
_BYTES_OF_TYPE = {0: 4, 2: 4, 3: 1, 9: 1}
"""Of the schema's FLOAT32, INT32, UINT8 and INT8."""
_USED = re.compile(rb"Arena allocation (total|head|tail) (\d+) bytes")


def load_package() -> Any:
    """Import TFLite Micro.

    Raises:
        TargetError: it is not installed.
    """
    return import_runtime("tflite_micro", _PACKAGE)


class TfliteMicro:
    """TFLite Micro. One thread, one image at a time."""

    formats: ClassVar[tuple[str, ...]] = ("tflm", "tflite")

    def __init__(self, model: Model, *, threads: int = 1) -> None:
        from importlib import metadata

        from edgecomp.exporters.read_tflite import read_tflite

        self._place = place_of(model)
        checked_threads(threads)
        module = load_package()
        file = checked_file(model, _PACKAGE)
        data = file.read_bytes() if isinstance(file, Path) else file
        self.version = metadata.version(_PACKAGE)
        # The interpreter trusts a file: what is damaged must not reach it. This finds most of it; files of a built
        # folder are known by their digests.
        facts = read_tflite(data, self._place)
        n_inputs, n_outputs = (len(facts[key]) for key in ("inputs", "outputs"))
        if n_inputs != 1 or not n_outputs:
            raise BundleError(
                f"{self._place}: the model has {n_inputs} inputs and {n_outputs} outputs, expected one of each"
            )
        lines: list[bytes] = []
        try:
            with held_back() as lines:
                self._interpreter = module.runtime.Interpreter.from_bytes(data, arena_size=_room_bytes(data))
                (self.input,) = self._borders(facts["inputs"], self._interpreter.get_input_details)
                self._outputs = self._borders(facts["outputs"], self._interpreter.get_output_details)
        except (*MEANT_BY_DAMAGED, struct.error, RuntimeError, MemoryError) as error:
            said = [line.decode(errors="replace").strip() for line in lines]
            why = "; ".join([one_line(error), *filter(None, said[:1])])
            raise BundleError(f"{self._place}: {_PACKAGE} cannot load it: {why}") from error
        self.output = self._outputs[0]

    def _borders(self, described: Any, details_of: Any) -> list[Border]:
        found = []
        for i, facts in enumerate(described):
            details = details_of(i)
            quant = details["quantization_parameters"]
            scale, zero_point = (values[0] if len(values) else 0 for values in (quant["scales"], quant["zero_points"]))
            shape = tuple(int(size) for size in details["shape"])
            name, dtype = str(facts["name"]), np.dtype(details["dtype"])
            found.append(channels_last_border(name, shape, dtype, float(scale), int(zero_point), self._place))
        return found

    def run(self, x: Array) -> Array:
        """Give the first output for N images, one by one."""
        return self.run_all(x)[self.output.name]

    def run_all(self, x: Array) -> dict[str, Array]:
        """Give every output by name for N images, one by one."""
        images = channels_last(fitting(x, self.input, self._place))
        parts = []
        for i in range(len(images)):
            self._infer(images[i : i + 1])
            parts.append([self._interpreter.get_output(k) for k in range(len(self._outputs))])
        columns = (np.concatenate(values) for values in zip(*parts, strict=True))
        return {output.name: channels_first(y) for output, y in zip(self._outputs, columns, strict=True)}

    def infer_once(self) -> None:
        """Run one image; it is copied to the arena first, as the interpreter reuses its place."""
        self._infer(channels_last(sample_image(self.input)))

    def _infer(self, image: Array) -> None:
        try:
            self._interpreter.set_input(image, 0)
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise BundleError(f"{self._place}: {_PACKAGE} fails to run it: {one_line(error)}") from error

    def describe(self) -> dict[str, Fact]:
        """Say what memory the model takes, as the interpreter reports it on this machine, of 64-bit pointers.

        The arena's head holds activations, decoded weights and scratch memory; its tail what lasts: tensors' and
        operators' records, and most of that is smaller where pointers are.
        """
        self.infer_once()
        with held_back() as lines:
            self._interpreter.print_allocations()
        used = {what.decode(): int(n) for what, n in _USED.findall(b"".join(lines))}
        arena = {f"arena_{what}_bytes": used[what] for what in ("total", "head", "tail") if what in used}
        return {"kernels": "reference", "threads": 1, **arena}


def _room_bytes(data: bytes) -> int:
    """Give an arena that is large enough for every tensor at once; what is not used of it is never touched.

    Raises:
        ValueError: a constant is shorter than its shape says, or an operator names no tensor.
    """
    model = Flatbuffer(data).root()
    buffers, n_all = model.tables(4), 0
    for graph in model.tables(2):
        tensors = graph.tables(0)
        for tensor in tensors:
            n = math.prod(max(0, size) for size in tensor.numbers(0, "<i4").tolist())
            n_stored = buffers[tensor.number(2, "I")].payload()[1]
            if n_stored and n_stored < n * _BYTES_OF_TYPE.get(tensor.number(1, "b"), 0):
                raise ValueError(f"a constant has {n_stored} bytes for {n} elements")
            n_all += n
        for operator in graph.tables(3):
            ends = [number for field in (1, 2) for number in operator.numbers(field, "<i4").tolist()]
            if not all(-1 <= number < len(tensors) for number in ends):
                raise ValueError("an operator names a tensor that is not there")
    return min(_ROOM_BYTES + _ROOM_BYTES_AN_ELEMENT * n_all, _MOST_ROOM_BYTES)
