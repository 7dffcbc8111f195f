"""Run .onnx files with onnxruntime, and look at what it makes of them."""

from __future__ import annotations

import json
import os
from _thread import allocate_lock
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edgecomp.errors import BundleError
from edgecomp.graph import Array, QuantParams

from .runtime import (
    Border,
    Model,
    checked_file,
    checked_threads,
    eight_bits,
    fitting,
    import_runtime,
    one_line,
    place_of,
    quiet,
    sample_image,
)

if TYPE_CHECKING:
    from edgecomp.report import Fact

INPUT_SCALE, INPUT_ZERO_POINT = "edgecomp.input_scale", "edgecomp.input_zero_point"
OUTPUT_SCALE, OUTPUT_ZERO_POINT = "edgecomp.output_scale", "edgecomp.output_zero_point"
"""Keys under which an ONNX file with integer input and output keeps what its integers mean; values as decimal text."""


_LOADING = allocate_lock()
"""Images are classified by several runners at once, and `quiet` holds back what the whole process writes to stderr."""


def saturates(cpuinfo: str, machine: str) -> bool:
    """Tell whether onnxruntime's sums of two products of uint8 and int8 saturate in 16 bits: on x86 without VNNI.

    Args:
        cpuinfo: the text of /proc/cpuinfo.
        machine: as `uname -m` says it.
    """
    return machine in ("x86_64", "AMD64") and "avx2" in cpuinfo and "vnni" not in cpuinfo


def _saturates_here() -> bool:
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return False
    return saturates(cpuinfo, os.uname().machine)


def _session_options(threads: int) -> Any:
    ort = import_runtime("onnxruntime", "onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors
    if threads > 1:
        # Idle workers would go on spinning, and slow down whatever is measured next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _session(model: Path | bytes, options: Any, place: str) -> Any:
    ort = import_runtime("onnxruntime", "onnxruntime")
    source = str(model) if isinstance(model, Path) else model
    try:
        with quiet():
            return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base below Exception
        raise BundleError(f"{place}: onnxruntime cannot load it: {one_line(error)}") from error


def _lean_session(model: Path | bytes, options: Any, place: str) -> Any:
    from edgecomp.runtime import onnx_session, unpack

    if not isinstance(model, Path):
        return _session(unpack(model), options, place)
    with quiet():
        return onnx_session(model, options=options)


_KERNEL = "_kernel_time"
"""How onnxruntime's profiler ends the names of what it times within a run."""
_ONNX_DTYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}


class OnnxRuntime:
    """Microsoft's onnxruntime on the CPU: all optimizations, `threads` within an operator, one operator at a time.

    Where its sums would saturate (`saturates`), outputs come from a second session, of the same network with unsigned
    weights: what the file gives on every other processor. What is timed is always the first.
    """

    formats: ClassVar[tuple[str, ...]] = ("onnx",)
    _load: ClassVar[Callable[[Path | bytes, Any, str], Any]] = staticmethod(_session)

    def __init__(self, model: Model, *, threads: int = 1) -> None:
        self._place = place_of(model)
        self._threads = checked_threads(threads)
        self._file = file = checked_file(model, "onnxruntime")
        self.version = str(import_runtime("onnxruntime", "onnxruntime").__version__)
        self._session = self._load(file, _session_options(threads), self._place)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1:
            raise BundleError(f"{self._place}: the model has {len(inputs)} inputs, expected one")
        if not outputs:
            raise BundleError(f"{self._place}: the model has no outputs, expected at least one")
        facts = self._session.get_modelmeta().custom_metadata_map
        self.input = self._border(inputs[0], _onnx_quant(facts, INPUT_SCALE, INPUT_ZERO_POINT, self._place))
        self.output = self._border(outputs[0], _onnx_quant(facts, OUTPUT_SCALE, OUTPUT_ZERO_POINT, self._place))
        self._names = [value.name for value in outputs]
        self._batched = not isinstance(inputs[0].shape[0], int)
        if not self._batched and inputs[0].shape[0] != 1:
            raise BundleError(f"{self._place}: takes {inputs[0].shape[0]} images at once, expected 1 or any number")
        self._exact: Any = None
        self._binding: Any = None
        self._bound: list[Any] = []

    def _border(self, value: Any, quant: QuantParams | None) -> Border:
        shape = tuple((value.shape or [])[1:])
        if not shape or value.type not in _ONNX_DTYPES or not all(isinstance(size, int) for size in shape):
            raise BundleError(
                f"{self._place}: {value.name!r:.80} is {value.type} {value.shape}, expected float, int8 or uint8 of a "
                "fixed shape (N may be free)"
            )
        dtype = np.dtype(_ONNX_DTYPES[value.type])
        return Border(name=value.name, shape=shape, dtype=dtype, quant=None if dtype.kind == "f" else quant)

    def run(self, x: Array) -> Array:
        """Give the first output for N images."""
        return self.run_all(x)[self.output.name]

    def run_all(self, x: Array) -> dict[str, Array]:
        """Give every output by name for N images, all at once where the file leaves N free."""
        x = fitting(x, self.input, self._place)
        step = len(x) if self._batched else 1
        parts = [self._outputs(x[start : start + step]) for start in range(0, len(x), step)]
        whole = (np.concatenate(values) for values in zip(*parts, strict=True))
        return dict(zip(self._names, whole, strict=True))

    def _outputs(self, x: Array) -> list[Array]:
        return self._results(self._for_outputs(), x)

    def _for_outputs(self) -> Any:
        with _LOADING:
            if self._exact is None:
                self._exact = self._exact_session() if _saturates_here() else self._session
        return self._exact

    def _exact_session(self) -> Any:
        from edgecomp.exporters.unpack_onnx import plain_onnx

        stored = self._file.read_bytes() if isinstance(self._file, Path) else self._file
        try:
            exact = plain_onnx(stored, self._place, unsigned=True)
        except BundleError:  # onnxruntime has loaded it, so it is one of another layout
            exact = stored
        # Another tool's file stays as it is, and with it what it gives on this processor.
        return self._session if exact is stored else _session(exact, _session_options(self._threads), self._place)

    def may_saturate(self) -> bool:
        """Tell whether outputs may be others than on processors whose sums do not saturate; loads a second session."""
        return _saturates_here() and self._for_outputs() is self._session

    def _results(self, session: Any, x: Array) -> list[Array]:
        try:
            return list(session.run(self._names, {self.input.name: x}))
        except Exception as error:  # see _session
            raise BundleError(f"{self._place}: onnxruntime fails to run it: {one_line(error)}") from error

    def infer_once(self) -> None:
        """Run one image; input and outputs stay in buffers that were bound beforehand."""
        if self._binding is None:
            self._bind()
        self._session.run_with_iobinding(self._binding)

    def _bind(self) -> None:
        ort = import_runtime("onnxruntime", "onnxruntime")
        x = sample_image(self.input)
        # The binding uses the memory of these arrays and does not keep them alive.
        self._bound = [ort.OrtValue.ortvalue_from_numpy(value) for value in (x, *self._results(self._session, x))]
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self.input.name, self._bound[0])
        for name, value in zip(self._names, self._bound[1:], strict=True):
            binding.bind_ortvalue_output(name, value)
        self._binding = binding

    def profile(self, runs: int) -> dict[str, float]:
        """Give each operator's mean time in microseconds, by onnxruntime's profiler in a session of its own.

        Args:
            runs: of which the first is not counted.

        Returns:
            by the node's name, a space and its type, in the order of the first run.
        """
        import tempfile

        x = sample_image(self.input)
        with tempfile.TemporaryDirectory(prefix="edgecomp-") as folder:
            options = _session_options(self._threads)
            options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
            session = self._load(self._file, options, self._place)
            for _ in range(runs + 1):
                session.run(self._names, {self.input.name: x})
            events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
        return mean_times(events)

    def describe(self) -> dict[str, Fact]:
        """Say how the runtime executes this model."""
        return {
            "providers": tuple(self._session.get_providers()),
            "graph_optimization": "all",
            "intra_op_threads": self._threads,
            "inter_op_threads": 1,
            "spins_between_runs": False,
        }


def mean_times(events: Sequence[Any]) -> dict[str, float]:
    """Give each operator's mean time in microseconds from what onnxruntime's profiler wrote, but for the first run.

    Raises:
        KeyError: an event is none of onnxruntime's; TypeError and ValueError likewise.
    """
    times: dict[str, list[float]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(_KERNEL):
            place = f"{name.removesuffix(_KERNEL)} {event['args']['op_name']}"
            times.setdefault(place, []).append(float(event["dur"]))
    return {place: sum(each[1:]) / max(1, len(each) - 1) for place, each in times.items()}


class OnnxRuntimeLean(OnnxRuntime):
    """The same, loaded by `edgecomp.runtime.onnx_session`: unpacked before onnxruntime sees it."""

    _load: ClassVar[Callable[[Path | bytes, Any, str], Any]] = staticmethod(_lean_session)

    def describe(self) -> dict[str, Fact]:
        """Say how the runtime executes this model."""
        return {**super().describe(), "loaded_by": "edgecomp.runtime.onnx_session"}


def _onnx_quant(facts: Mapping[str, str], scale_key: str, zero_point_key: str, place: str) -> QuantParams | None:
    if scale_key not in facts or zero_point_key not in facts:
        return None
    try:
        scale, zero_point = float(facts[scale_key]), int(facts[zero_point_key])
    except ValueError as error:
        raise BundleError(f"{place}: {scale_key} or {zero_point_key} is not a number: {error}") from error
    return eight_bits(scale, zero_point, place)


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimized:
    """What onnxruntime really executes, read from the graph it saves after all its optimizations.

    Attributes:
        runtime: onnxruntime and its version.
        operators: how many nodes of each op type.
        widened: the names of the DequantizeLinear nodes whose first input is constant: weights that are widened to
            float again in every run. Empty is good.
        in_float: op type -> the outputs of its nodes that compute floats from floats. Conversions at the borders of
            integer arithmetic are none of them.
        sums: of each QLinearAdd the scales of its two terms and of the sum; NaN for one that is no constant.
    """

    runtime: str
    operators: Counter[str]
    widened: tuple[str, ...]
    in_float: dict[str, list[str]]
    sums: tuple[tuple[float, float, float], ...]


_FLOATS = {1, 10, 11, 16}
"""Numbers of ONNX's element types float, float16, double and bfloat16."""
_FROM_FLOATS = {"QuantizeLinear", "DynamicQuantizeLinear", "Cast", "Shape", "Size", "ArgMax", "ArgMin"}
"""What makes integers of floats."""


def optimized(model: Path | str | bytes) -> Optimized:
    """Tell what onnxruntime makes of a model.

    Raises:
        BundleError: the file cannot be read, or is damaged or foreign.
        TargetError: onnxruntime or onnx is not installed.
    """
    import tempfile

    onnx = import_runtime("onnx", "onnx")
    file, place = checked_file(model, "onnxruntime"), place_of(model)
    with tempfile.TemporaryDirectory(prefix="edgecomp-") as folder:
        saved = Path(folder) / "optimized.onnx"
        options = _session_options(1)
        options.optimized_model_filepath = str(saved)
        _session(file, options, place)
        graph = onnx.load(saved).graph
    constant = {initializer.name for initializer in graph.initializer}
    constant |= {initializer.values.name for initializer in graph.sparse_initializer}
    # The saved graph gives types at its borders only. Between them what is made of floats is float, but for these.
    floats = {value.name for value in graph.input if value.type.tensor_type.elem_type in _FLOATS}
    widened: list[str] = []
    in_float: dict[str, list[str]] = {}
    for node in graph.node:
        if all(name in constant for name in node.input if name):
            constant.update(node.output)
            if node.op_type == "DequantizeLinear":
                widened.append(node.name or node.output[0])
        elif node.op_type == "DequantizeLinear":
            floats.update(node.output)
        elif floats.intersection(node.input) and node.op_type not in _FROM_FLOATS:
            floats.update(node.output)
            in_float.setdefault(node.op_type, []).append(node.output[0])
    scales = {t.name: t for t in graph.initializer}

    def scale(name: str) -> float:
        return float(onnx.numpy_helper.to_array(scales[name])) if name in scales else float("nan")

    added = [node.input for node in graph.node if node.op_type == "QLinearAdd"]
    return Optimized(
        runtime=f"onnxruntime {import_runtime('onnxruntime', 'onnxruntime').__version__}",
        operators=Counter(node.op_type for node in graph.node),
        widened=tuple(widened),
        in_float=in_float,
        sums=tuple((scale(names[1]), scale(names[4]), scale(names[6])) for names in added),
    )
