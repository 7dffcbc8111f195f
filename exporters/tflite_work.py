"""What the layers of a TFLite file of ours ask of a processor, counted from the file alone, with numpy alone.

Operators have no names there: a layer has that of its weight, any other operator that of the tensor it writes, in
files for TFLite Micro, where tensors have none, its own number. What the exporter writes as several operators, since
the format has none for it (a pad before a window, silu, a shuffle of channels), counts as one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgecomp.errors import BundleError
from edgecomp.work import Work, conv_work, linear_work, other_work

from .flatbuffer import Flatbuffer, Table
from .modelfacts import MEANT_BY_DAMAGED
from .tflm_decode import OPERATOR as DECODE
from .unpack_tflite import OPERATOR, custom_codes

OPERATORS: Mapping[int, str] = {
    0: "ADD", 1: "AVERAGE_POOL_2D", 2: "CONCATENATION", 3: "CONV_2D", 4: "DEPTHWISE_CONV_2D", 6: "DEQUANTIZE",
    9: "FULLY_CONNECTED", 14: "LOGISTIC", 17: "MAX_POOL_2D", 18: "MUL", 19: "RELU", 20: "RELU_N1_TO_1", 21: "RELU6",
    22: "RESHAPE", 25: "SOFTMAX", 34: "PAD", 36: "GATHER", 39: "TRANSPOSE", 40: "MEAN", 45: "STRIDED_SLICE",
    55: "MAXIMUM", 57: "MINIMUM", 60: "PADV2", 114: "QUANTIZE", 117: "HARD_SWISH",
}  # fmt: skip
"""Those that the exporter writes, by their numbers in TFLite's schema."""
_FREE = frozenset(
    {"DEQUANTIZE", "MAXIMUM", "MINIMUM", "QUANTIZE", "RELU", "RELU6", "RELU_N1_TO_1", "RESHAPE"}
)  # fmt: skip
_PADS = ("PAD", "PADV2")
_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_BEHIND = {".all": "MAXIMUM", ".share": "QUANTIZE", ".found": "QUANTIZE"}
"""How the exporter calls what is not yet a node's output, and what reads it."""
_MOST_JOINED = 10


def tflite_work(data: bytes, where: str) -> tuple[Work, ...]:
    """Count every operator that costs time, for one image, as `edgecomp.work.work_of` does from a graph.

    Args:
        data: a TFLite file that edgecomp wrote: float or quantized, packed or not, for TFLite Micro or not.
        where: names it in errors.

    Raises:
        BundleError: it is no TFLite file, damaged, or edgecomp did not write it.
    """
    if data[4:8] != b"TFL3":
        raise BundleError(f"{where}: is no TFLite file: bytes 4 to 8 are not TFL3")
    try:
        model = Flatbuffer(data).root()
        work = _Counting(model).work() if model.text(3) == "edgecomp" else None
    except MEANT_BY_DAMAGED as e:
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise BundleError(f"{where}: is damaged or cut off: {reason}") from e
    if work is None:
        raise BundleError(f"{where}: edgecomp did not write it; expected a file that build or export wrote, or a model")
    return work


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    fixed: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operator:
    op: str
    inputs: tuple[int, ...]
    output: int
    options: Table | None


class _Counting:
    """The tensors of a file, and who reads them."""

    def __init__(self, model: Table) -> None:
        graphs, buffers = model.tables(2), model.tables(4)
        if len(graphs) != 1:
            raise ValueError(f"it holds {len(graphs)} networks, expected one")
        tables = graphs[0].tables(0)
        operators = _operators(model, graphs[0], len(tables))
        unpacked = {operator.output for operator in operators if operator.op in (OPERATOR, DECODE)}
        full = [bool(buffer.payload()[1]) for buffer in buffers]
        self._tensors = [
            _tensor(table, fixed=number in unpacked or full[table.number(2, "I")])
            for number, table in enumerate(tables)
        ]
        self._operators = [operator for operator in operators if operator.op not in (OPERATOR, DECODE)]
        self._readers: dict[int, list[_Operator]] = {}
        for operator in self._operators:
            for number in dict.fromkeys(operator.inputs):
                self._readers.setdefault(number, []).append(operator)
        self._padded: dict[int, int] = {}
        self._sources: dict[int, int] = {}
        self._begun: dict[int, int] = {}

    def work(self) -> tuple[Work, ...]:
        found = []
        for place, operator in enumerate(self._operators):
            read = [n for n in operator.inputs if n >= 0 and not self._tensors[n].fixed]
            if not read:
                raise ValueError(f"operator {place}, a {operator.op}, reads no activation")
            work = self._counted(place, operator, read)
            if work is not None:
                found.append(work)
        return tuple(found)

    def _counted(self, place: int, operator: _Operator, read: list[int]) -> Work | None:
        """Count an operator; None for one that is free, or a part of a later one."""
        op, output, source = operator.op, self._tensors[operator.output], self._tensors[read[0]]
        if op in _PADS:
            self._padded[operator.output] = read[0]
            return None
        if op in _FREE or (op == "TRANSPOSE" and len(output.shape) != 3):
            return None
        if op in _WEIGHTED:
            return self._weighted(operator, self._tensors[self._padded.get(read[0], read[0])])
        inputs = sum(self._tensors[self._padded.get(n, n)].size for n in read)
        if op in ("ADD", "MUL") and len(read) < len(operator.inputs):
            # By a constant: two such steps are a hard-sigmoid.
            if read[0] not in self._begun:
                self._begun[operator.output] = read[0]
                return None
            source_number = self._begun[read[0]]
            inputs = self._tensors[source_number].size
            if self._is_gate(operator.output, source_number):
                return None
        elif op == "LOGISTIC" and self._is_gate(operator.output, read[0]):
            return None
        elif op == "MUL" and any(n in self._sources for n in read):
            inputs = sum(self._tensors[n].size for n in read if n not in self._sources)
        elif op == "CONCATENATION" and self._is_joined_on(operator):
            return None
        elif op == "TRANSPOSE":
            inputs = source.size
        return other_work(self._name(place, operator), inputs, output.size)

    def _weighted(self, operator: _Operator, given: _Tensor) -> Work:
        weight, output = self._tensors[operator.inputs[1]], self._tensors[operator.output]
        name = weight.name.removesuffix(".weight")
        if not name:
            raise ValueError(f"the weight of a {operator.op} has no name")
        if operator.op == "FULLY_CONNECTED":
            outputs, inputs = weight.shape
            if given.shape[-1] != inputs or output.shape[-1] != outputs:
                raise ValueError(f"{name!r:.80}: a weight {outputs}x{inputs} does not fit {list(given.shape)}")
            if len(given.shape) != 4:
                return linear_work(name, inputs, outputs)
            return conv_work(name, in_shape=_chw(given), out_shape=_chw(output), kernel=(1, 1))
        options = operator.options
        if options is None or len(weight.shape) != 4:
            raise ValueError(f"{name!r:.80} has no options, or a weight that has not four axes")
        depthwise = operator.op == "DEPTHWISE_CONV_2D"
        channels = _chw(given)[0]
        in_group = 1 if depthwise else weight.shape[3]
        if channels % in_group or weight.shape[3 if depthwise else 0] != _chw(output)[0]:
            raise ValueError(f"{name!r:.80}: a weight {list(weight.shape)} does not fit {list(given.shape)}")
        return conv_work(
            name,
            in_shape=_chw(given),
            out_shape=_chw(output),
            kernel=(weight.shape[1], weight.shape[2]),
            stride=(options.number(2, "i"), options.number(1, "i")),
            groups=channels // in_group,
        )

    def _is_gate(self, number: int, source: int) -> bool:
        """Tell whether a tensor is only there to be multiplied with what it was computed from: silu, hard-swish."""
        readers = self._readers.get(number, [])
        if len(readers) != 1 or readers[0].op != "MUL" or set(readers[0].inputs) != {number, source}:
            return False
        gate, product = self._tensors[number].name, self._tensors[readers[0].output].name
        # A network may have such a product of its own: there the tensor has the name of the network's sigmoid.
        if gate and gate != f"{product.removesuffix('.found')}.gate":
            return False
        self._sources[number] = source
        return True

    def _is_joined_on(self, operator: _Operator) -> bool:
        """Tell whether TFLite Micro, which joins ten tensors at most, goes on to join others to these."""
        readers = self._readers.get(operator.output, [])
        unnamed = not self._tensors[operator.output].name
        goes_on = len(readers) == 1 and readers[0].op == operator.op and readers[0].inputs[0] == operator.output
        return unnamed and len(operator.inputs) == _MOST_JOINED and goes_on

    def _name(self, place: int, operator: _Operator) -> str:
        output, readers = operator.output, self._readers.get(operator.output, [])
        if operator.op == "TRANSPOSE" and len(readers) == 1:
            output = readers[0].output
        name = self._tensors[output].name
        for suffix, reader in _BEHIND.items():
            if name.endswith(suffix) and [r.op for r in readers] == [reader]:
                name = name.removesuffix(suffix)
        return name or f"{operator.op.lower()} {place}"


def _operators(model: Table, graph: Table, n_tensors: int) -> list[_Operator]:
    codes, custom = model.tables(1), custom_codes(model)
    numbers = [max(code.number(0, "b"), code.number(3, "i")) for code in codes]
    names = [custom.get(place) or OPERATORS.get(number, "") for place, number in enumerate(numbers)]
    found = []
    for table in graph.tables(3):
        name, number = names[table.number(0, "I")], numbers[table.number(0, "I")]
        if not name or (number not in OPERATORS and name not in (OPERATOR, DECODE)):
            raise ValueError(f"it has an operator {name or number!r:.60}, which this edgecomp does not write")
        inputs, outputs = (tuple(table.numbers(field, "<i4").tolist()) for field in (1, 2))
        if not inputs or not outputs or not all(-1 <= n < n_tensors for n in inputs):
            raise ValueError(f"a {name} reads or writes no tensor")
        if not all(0 <= n < n_tensors for n in outputs) or (len(outputs) > 1 and name != DECODE):
            raise ValueError(f"a {name} writes {len(outputs)} tensors, or none that there is")
        if name in _WEIGHTED and (len(inputs) < 2 or inputs[1] < 0):
            raise ValueError(f"a {name} has no weight")
        # DECODE may write several weights.
        options = table.table(4)
        found += [_Operator(op=name, inputs=inputs, output=output, options=options) for output in outputs]
    return found


def _tensor(table: Table, *, fixed: bool) -> _Tensor:
    name, shape = table.text(3), tuple(int(d) for d in table.numbers(0, "<i4"))
    if len(shape) > 8 or any(d < 1 for d in shape) or not name.isprintable():
        raise ValueError(f"tensor {name!r:.80} has the shape {list(shape[:9])}, or a name that is not printable")
    return _Tensor(name=name, shape=shape, fixed=fixed)


def _chw(tensor: _Tensor) -> tuple[int, int, int]:
    _, height, width, channels = tensor.shape
    return channels, height, width
