"""The TFLite flatbuffer as bytes: tensors, operators and buffers in, a file out. Knows no operator's meaning.

Equal buffers, vectors, quantization tables and options are written once and shared: of a small model's file, repeated
zero points alone would be a tenth. In a packed file the contents of all buffers stand at its end, and nothing else does
there: `unpack_tflite` replaces them without leaving the old ones behind, and aligns them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgecomp.errors import ExportError
from edgecomp.graph import Array, QuantParams

from .unpack_tflite import OPERATOR

_VERSION = 3
_IDENTIFIER = b"TFL3"
_ALIGNMENT = 16
_MAX_BYTES = (1 << 31) - 1


def pack_dense(codes: Array, width: int) -> bytes:
    """Pack int8 codes as TFLite's INT2 and INT4: the first code in the lowest bits, zeros after the last.

    Args:
        codes: int8, each within -2^(width-1) .. 2^(width-1) - 1.
        width: 2 or 4 bits; 8 leaves the codes as they are.
    """
    per_byte = 8 // width
    fields = codes.reshape(-1).view(np.uint8) & np.uint8((1 << width) - 1)
    fields = np.append(fields, np.zeros(-fields.size % per_byte, dtype=np.uint8)).reshape(-1, per_byte)
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    packed: Array = np.bitwise_or.reduce(fields << shifts, axis=1)
    return packed.tobytes()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    kind: str
    buffer: int
    quant: QuantParams | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Operator:
    code: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: str
    fields: tuple[tuple[str, object], ...]


class TfliteFile:
    """A file in the making: add tensors and operators, then take the bytes.

    Raises:
        ExportError: the writer libraries are not installed.
    """

    def __init__(self) -> None:
        try:
            import flatbuffers
            from ai_edge_litert import schema_py_generated as schema
        except ImportError as e:
            raise ExportError(f"tflite: {e.name} is missing; run pip install 'edgecomp[build]'") from e
        self._flatbuffers: Any = flatbuffers
        self.schema: Any = schema
        self._tensors: list[_Tensor] = []
        self._operators: list[_Operator] = []
        self._packed: list[tuple[int, bytes]] = []
        self._codes: dict[tuple[int, int] | str, int] = {}
        self._buffers = [b""]  # the format keeps buffer 0 empty, for tensors without data
        self._shared = {b"": 0}

    def tensor(
        self, name: str, shape: Sequence[int], kind: str, *, data: bytes = b"", quant: QuantParams | None = None
    ) -> int:
        """Add a tensor.

        Args:
            name: as runtimes will show it.
            shape: as the file's reader sees it.
            kind: a name of the schema's TensorType, e.g. "INT4".
            data: the packed, little-endian elements; empty for an activation.
            quant: scales, zero points and axis in the file's layout.

        Returns:
            its number.
        """
        if data not in self._shared:
            self._shared[data] = self._buffer(data)
        return self._tensor(name, shape, kind, self._shared[data], quant)

    def packed(
        self, name: str, shape: Sequence[int], kind: str, *, data: bytes, quant: QuantParams | None = None
    ) -> int:
        """Add a tensor that an operator at the head of the file unpacks; see `unpack_tflite`.

        Args:
            name: as in `tensor`, like all but `data`.
            shape: see there.
            kind: see there.
            data: what the operator reads.
            quant: see there.

        Returns:
            its number.
        """
        number = self._tensor(name, shape, kind, self._buffer(b""), quant)
        self._packed.append((number, data))
        return number

    def _buffer(self, data: bytes) -> int:
        self._buffers.append(data)
        return len(self._buffers) - 1

    def _tensor(self, name: str, shape: Sequence[int], kind: str, buffer: int, quant: QuantParams | None) -> int:
        self._tensors.append(_Tensor(name=name, shape=tuple(shape), kind=kind, buffer=buffer, quant=quant))
        return len(self._tensors) - 1

    def operator(
        self, op: str, version: int, inputs: Sequence[int], outputs: Sequence[int], options: str = "", **fields: object
    ) -> None:
        """Add an operator.

        Args:
            op: a name of the schema's BuiltinOperator.
            version: the lowest version of it that has what is asked.
            inputs: tensor numbers; -1 for an optional one that is absent.
            outputs: tensor numbers.
            options: a name of the schema's BuiltinOptions, "" for none.
            fields: of the options.
        """
        key = (getattr(self.schema.BuiltinOperator, op), version)
        self._operators.append(
            _Operator(
                code=self._codes.setdefault(key, len(self._codes)),
                inputs=tuple(inputs),
                outputs=tuple(outputs),
                options=options,
                fields=tuple(sorted(fields.items())),
            )
        )

    def custom(self, op: str, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        """Add an operator that the schema does not know, without options, by its custom code."""
        code = self._codes.setdefault(op, len(self._codes))
        self._operators.append(
            _Operator(code=code, inputs=tuple(inputs), outputs=tuple(outputs), options="", fields=())
        )

    def to_bytes(self, *, inputs: Sequence[int], outputs: Sequence[int], signature: bool = True) -> bytes:
        """Give the file, with one subgraph.

        Args:
            inputs: tensor numbers.
            outputs: tensor numbers.
            signature: whether it names them in a signature, which some programs ask for.

        Raises:
            ExportError: the file would exceed what a flatbuffer can address.
        """
        unpacking = self._unpacking()
        n_bytes = sum(len(data) for data in self._buffers)
        if n_bytes > _MAX_BYTES:
            raise ExportError(f"tflite: the weights take {n_bytes} bytes, the format holds {_MAX_BYTES}")
        try:
            return _Packer(self._flatbuffers, self.schema).pack(
                self._tensors,
                [*unpacking, *self._operators],
                [*self._codes, *([OPERATOR] if unpacking else [])],
                self._buffers,
                tuple(inputs),
                tuple(outputs),
                signature=signature,
            )
        except self._flatbuffers.builder.BuilderSizeError as e:
            raise ExportError(f"tflite: the file exceeds the {_MAX_BYTES} bytes that the format holds") from e

    def _unpacking(self) -> list[_Operator]:
        """Give the operators that unpack, and what they read the last place among tensors and buffers."""
        operators = []
        for number, data in self._packed:
            name = f"{self._tensors[number].name}.packed"
            source = self._tensor(name, (len(data),), "UINT8", self._buffer(data), None)
            operators.append(
                _Operator(code=len(self._codes), inputs=(source,), outputs=(number,), options="", fields=())
            )
        self._packed.clear()
        return operators


class _Packer:
    """One flatbuffer under construction; children are written before parents, as the format wants it."""

    def __init__(self, flatbuffers: Any, schema: Any) -> None:
        self._builder = flatbuffers.Builder(1 << 16)
        self._schema = schema
        self._written: dict[object, int] = {}

    def _once(self, key: object, write: Callable[[], int]) -> int:
        if key not in self._written:
            self._written[key] = write()
        return self._written[key]

    def _text(self, text: str) -> int:
        return self._once(("text", text), lambda: int(self._builder.CreateString(text)))

    def _vector(self, values: Array) -> int:
        key = ("vector", values.dtype.str, values.tobytes())
        return self._once(key, lambda: int(self._builder.CreateNumpyVector(values)))

    def _numbers(self, values: Sequence[int]) -> int:
        return self._vector(np.asarray(values, dtype="<i4"))

    def _table(self, name: str, **fields: object) -> int:
        """Write a table whose fields are numbers or offsets, in the order given."""
        builder, schema = self._builder, self._schema
        getattr(schema, f"{name}Start")(builder)
        for field, value in fields.items():
            getattr(schema, f"{name}Add{field}")(builder, value)
        return int(getattr(schema, f"{name}End")(builder))

    def _tables(self, offsets: Sequence[int]) -> int:
        self._builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self._builder.PrependUOffsetTRelative(offset)
        return int(self._builder.EndVector())

    def _contents(self, data: bytes, alignment: int) -> dict[str, object]:
        if not data:
            return {}
        # Aligned elements, not merely an aligned table: kernels read them in place from a memory-mapped file.
        self._builder.Prep(alignment, len(data))
        return {"Data": self._builder.CreateByteVector(data)}

    def _all_buffers(self, buffers: Sequence[bytes], *, packed: bool) -> int:
        if packed:
            fields = [self._contents(data, 4) for data in buffers]
            return self._tables([self._table("Buffer", **each) for each in fields])
        # Each table by its contents, where it fits into what alignment leaves empty.
        return self._tables([self._table("Buffer", **self._contents(data, _ALIGNMENT)) for data in buffers])

    def _quantization(self, quant: QuantParams) -> int:
        scale = quant.scale.reshape(-1).astype("<f4")
        zero_point = quant.zero_point.reshape(-1).astype("<i8")
        axis = quant.axis or 0

        def write() -> int:
            return self._table(
                "QuantizationParameters",
                Scale=self._vector(scale),
                ZeroPoint=self._vector(zero_point),
                QuantizedDimension=axis,
            )

        vectors = (self._vector(scale), self._vector(zero_point))  # before the table starts: tables do not nest
        return self._once(("quantization", vectors, axis), write)

    def _tensor(self, tensor: _Tensor) -> int:
        fields: dict[str, object] = {
            "Name": self._text(tensor.name),
            "Shape": self._numbers(tensor.shape),
            "Type": getattr(self._schema.TensorType, tensor.kind),
            "Buffer": tensor.buffer,
        }
        if tensor.quant is not None:
            fields["Quantization"] = self._quantization(tensor.quant)
        return self._table("Tensor", **fields)

    def _options(self, operator: _Operator) -> int:
        def write() -> int:
            options = getattr(self._schema, f"{operator.options}T")()
            for field, value in operator.fields:
                if not hasattr(options, field):
                    raise ExportError(f"tflite: this ai-edge-litert's {operator.options} has no field {field!r}")
                setattr(options, field, value)
            return int(options.Pack(self._builder))

        return self._once((operator.options, operator.fields), write)

    def _operator(self, operator: _Operator) -> int:
        fields: dict[str, object] = {
            "OpcodeIndex": operator.code,
            "Inputs": self._numbers(operator.inputs),
            "Outputs": self._numbers(operator.outputs),
        }
        if operator.options:
            fields["BuiltinOptionsType"] = getattr(self._schema.BuiltinOptions, operator.options)
            fields["BuiltinOptions"] = self._options(operator)
        return self._table("Operator", **fields)

    def _code(self, code: tuple[int, int] | str) -> int:
        """Write a built-in operator with its version, or the name of a custom one."""
        if isinstance(code, str):
            name, custom = self._text(code), self._schema.BuiltinOperator.CUSTOM
            return self._table("OperatorCode", DeprecatedBuiltinCode=custom, CustomCode=name, BuiltinCode=custom)
        # Readers older than 2020 know only the first 127 operators, by a one-byte field.
        number, version = code
        return self._table("OperatorCode", DeprecatedBuiltinCode=min(number, 127), BuiltinCode=number, Version=version)

    def _signature(self, tensors: Sequence[_Tensor], inputs: Sequence[int], outputs: Sequence[int]) -> int:
        maps = [
            self._tables([self._table("TensorMap", Name=self._text(tensors[i].name), TensorIndex=i) for i in numbers])
            for numbers in (inputs, outputs)
        ]
        key = self._text("serving_default")
        return self._table("SignatureDef", Inputs=maps[0], Outputs=maps[1], SignatureKey=key)

    def pack(
        self,
        tensors: Sequence[_Tensor],
        operators: Sequence[_Operator],
        codes: Sequence[tuple[int, int] | str],
        buffers: Sequence[bytes],
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        signature: bool,
    ) -> bytes:
        """Write everything and give the finished file."""
        data = self._all_buffers(buffers, packed=OPERATOR in codes)
        main = self._table(
            "SubGraph",
            Tensors=self._tables([self._tensor(tensor) for tensor in tensors]),
            Inputs=self._numbers(inputs),
            Outputs=self._numbers(outputs),
            Operators=self._tables([self._operator(operator) for operator in operators]),
            Name=self._text("main"),
        )
        fields: dict[str, object] = {
            "Version": _VERSION,
            "OperatorCodes": self._tables([self._code(code) for code in codes]),
            "Subgraphs": self._tables([main]),
            "Description": self._text("edgecomp"),
            "Buffers": data,
        }
        if signature:
            fields["SignatureDefs"] = self._tables([self._signature(tensors, inputs, outputs)])
        model = self._table("Model", **fields)
        self._builder.Finish(model, _IDENTIFIER)
        return bytes(self._builder.Output())
