"""What is in a file: layers, bits, bytes and operators of any ONNX or TFLite file, and of every file edgecomp writes.

A file is recognised by its content. Damaged files are expected: whatever bytes come, the answer is a description or a
BundleError. Constant tensors of two dimensions and more count as weights, but for int32 and int64, which are indices.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgecomp import bundle
from edgecomp.errors import BundleError, EdgecompError, ExportError
from edgecomp.files import MANIFEST_SCHEMA
from edgecomp.graph import Array
from edgecomp.manifest import read_manifest
from edgecomp.plan import PLAN_SCHEMA, CompressionPlan, check_keys, load_strict_json
from edgecomp.report import COMPARISON_SCHEMA, REPORT_SCHEMA, BenchReport, Comparison, table

_MAX_BYTES = 1 << 32
_MAX_RANK = 64
_MAX_TABLES = 1 << 18
_MAX_CELL = 120
_NO_WEIGHTS = frozenset({"int32", "int64", "uint32", "uint64", "bool", "string", "resource", "variant", "undefined"})
_MEANT_BY_DAMAGED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def describe(path: Path) -> dict[str, object]:
    """Say what a file holds, in values that JSON knows.

    Args:
        path: an ONNX or TFLite file from anywhere, or a file of edgecomp: graph, plan, manifest, bench report.

    Returns:
        kind, bytes and sha256; for a model also producer, format_version, inputs and outputs (name, shape, dtype, and
        for integers scale and zero_point where there is one), operators (name to count), weights (name, shape, n,
        bits, stored_bytes), weight_bytes, other_bytes, mean_bits. Bits are those a code has in the file, 32 for
        float32; shapes are the file's own (TFLite: OHWI); an unknown dimension is null. A weight that several tensors
        share counts once in weight_bytes; one that lies in another file has that file's name under "external" and no
        part in other_bytes.

    Raises:
        BundleError: the file is missing, empty, damaged, or nothing that edgecomp knows.
        ExportError: the package that reads the format is missing.
    """
    data, where = _read(path), str(path)
    facts = _reader(data, path)(data, where)
    return {"kind": facts.pop("kind"), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **facts}


def describe_tables(description: Mapping[str, object]) -> str:
    """Write what `describe` gave as Markdown: a table of facts, then one a list."""
    facts = [(key, _cell(value)) for key, value in description.items() if not _is_block(value)]
    parts = [table(facts, ("fact", "value"))]
    for key, value in description.items():
        if not value or not _is_block(value):
            continue
        if isinstance(value, dict):
            rows: list[Sequence[str]] = [(_cell(name), _cell(entry)) for name, entry in value.items()]
            header = ["name", "count" if key == "operators" else "value"]
        else:
            assert isinstance(value, list)
            header = list(dict.fromkeys(name for row in value for name in row))
            rows = [[_cell(row.get(name)) for name in header] for row in value]
        parts.append(f"{key.replace('_', ' ')}:\n\n{table(rows, header)}")
    return "\n\n".join(parts)


def _is_block(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        between = ", " if all(isinstance(v, str) for v in value) else "x"
        value = between.join("?" if v is None else str(v) for v in value) or "-"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # Names in foreign files may hold anything, control codes of terminals and half surrogates included.
    text = "".join(c if c.isprintable() else "?" for c in text[: _MAX_CELL + 1])
    return text if len(text) <= _MAX_CELL else f"{text[: _MAX_CELL - 1]}…"


def _read(path: Path) -> bytes:
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise BundleError(f"{path}: is a folder; expected a file, such as {path / 'model.onnx'}")
        if not stat.S_ISREG(info.st_mode):
            raise BundleError(f"{path}: is no plain file; expected one on disk")
        if info.st_size > _MAX_BYTES:
            raise BundleError(f"{path}: has {info.st_size} bytes, inspect reads {_MAX_BYTES} at most")
        data = path.read_bytes()
    except OSError as e:
        raise BundleError(f"{path}: cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise BundleError(f"{str(path)!r:.200}: is no file name: {e}") from e
    if not data:
        raise BundleError(f"{path}: is empty")
    return data


def _reader(data: bytes, path: Path) -> Callable[[bytes, str], dict[str, object]]:
    """Choose the reader by the first bytes, by the suffix only where these say nothing."""
    if data[4:8] == b"TFL3":
        return _tflite
    if data[4:9] == b"\0\0\0\0{":
        return _graph
    if data[:64].lstrip()[:1] in (b"{", b"["):
        return _json
    # Every writer of protobuf puts field 1, ir_version, first.
    if data[:1] == b"\x08" or path.suffix == ".onnx":
        return _onnx
    raise BundleError(
        f"{path}: is damaged or of no known kind; expected an ONNX or TFLite file, a plan, manifest, bench report or "
        "graph of edgecomp"
    )


# ---- what all models have --------------------------------------------------------------------------------------------


def _model(
    *,
    kind: str,
    producer: str,
    version: str,
    inputs: list[dict[str, object]],
    outputs: list[dict[str, object]],
    operators: Iterable[str],
    weights: list[dict[str, Any]],
    weight_bytes: int,
    file_bytes: int,
) -> dict[str, object]:
    """Put a description together.

    Raises:
        ValueError: the weights take more bytes than the file has.
    """
    other = file_bytes - weight_bytes + sum(w["stored_bytes"] for w in weights if "external" in w)
    if other < 0:
        raise ValueError(f"its weights claim {weight_bytes} bytes, it has {file_bytes}")
    n = sum(weight["n"] for weight in weights)
    return {
        "kind": kind,
        "producer": producer,
        "format_version": version,
        "inputs": inputs,
        "outputs": outputs,
        "operators": dict(sorted(Counter(operators).items(), key=lambda item: (-item[1], item[0]))),
        "weights": weights,
        "weight_bytes": weight_bytes,
        "other_bytes": other,
        "mean_bits": round(8 * weight_bytes / n, 4) if n else None,
    }


def _weight(name: str, shape: Sequence[int], bits: int, stored_bytes: int) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "n": math.prod(shape), "bits": bits, "stored_bytes": stored_bytes}


def _bits(dtype: str) -> int:
    """Read the width off a type's name: int4, bfloat16, float8e4m3fn."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8


def _check_length(name: str, n: int, bits: int, stored_bytes: int) -> None:
    # How 6-bit floats lie in a file is not settled.
    if bits != 6 and stored_bytes != -(-n * bits // 8):
        raise ValueError(f"weight {name!r:.80} has {stored_bytes} bytes, expected {n} codes of {bits} bits")


def _checked(dims: Sequence[int], name: str) -> list[int]:
    if len(dims) > _MAX_RANK or any(d < 0 for d in dims):
        raise ValueError(f"{name!r:.80} has no legal shape")
    return [int(d) for d in dims]


def _affine(scale: Array, zero_point: Array) -> dict[str, object]:
    """Give scale and zero point for a description, if there is one pair for the whole tensor."""
    if scale.size != 1 or zero_point.size > 1:
        return {}
    value = float(scale.reshape(-1)[0])
    if not math.isfinite(value):
        raise ValueError(f"a scale is {value}")
    return {"scale": value, "zero_point": int(zero_point.reshape(-1)[0]) if zero_point.size else 0}


# ---- ONNX ------------------------------------------------------------------------------------------------------------


def _onnx(data: bytes, where: str) -> dict[str, object]:
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError as e:
        raise ExportError(f"{where}: {e.name} is missing; install it with: pip install 'edgecomp[bench]'") from e
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
        return _OnnxGraph(proto).describe(len(data))
    except (DecodeError, *_MEANT_BY_DAMAGED) as e:
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise BundleError(f"{where}: is damaged or no ONNX file: {reason}") from e


class _OnnxGraph:
    """The main graph of an ONNX file, with what its readers look up."""

    def __init__(self, proto: Any) -> None:
        self._proto = proto
        self._graph = proto.graph
        if not proto.HasField("graph") or not (self._graph.node or self._graph.initializer):
            raise ValueError("it holds no network")
        constants = [(a.t, _text(n.output[0])) for n in self._graph.node if n.op_type == "Constant" and n.output
                     for a in n.attribute if a.HasField("t")]  # fmt: skip
        self._tensors = {_text(t.name): t for t in self._graph.initializer} | {name: t for t, name in constants}
        self._ours = _text(proto.producer_name) == "edgecomp"

    def describe(self, file_bytes: int) -> dict[str, object]:
        weights = self._weights()
        domains = [f"{_text(o.domain)} {o.version}".strip() for o in self._proto.opset_import]
        return _model(
            kind="onnx",
            producer=f"{_text(self._proto.producer_name)} {_text(self._proto.producer_version)}".strip(),
            version=f"opset {', '.join(domains)}",
            inputs=[self._border(v) for v in self._graph.input if _text(v.name) not in self._tensors],
            outputs=[self._border(v) for v in self._graph.output],
            operators=[_text(node.op_type) for node in self._graph.node],
            weights=weights,
            weight_bytes=sum(weight["stored_bytes"] for weight in weights),
            file_bytes=file_bytes,
        )

    def _border(self, value: Any) -> dict[str, object]:
        kind, name = value.type.tensor_type, _text(value.name)
        shape = [
            d.dim_value if d.HasField("dim_value") else _text(d.dim_param) if d.HasField("dim_param") else None
            for d in kind.shape.dim
        ]
        dtype = _onnx_dtype(kind.elem_type)
        found: dict[str, object] = {
            "name": name,
            "shape": shape if kind.HasField("shape") else None,
            "dtype": dtype,
        }
        if "int" not in dtype:
            return found
        for node in self._graph.node:
            reads = node.op_type == "DequantizeLinear" and node.input and _text(node.input[0]) == name
            writes = node.op_type == "QuantizeLinear" and node.output and _text(node.output[0]) == name
            if reads or writes:
                scale = self._small(node.input[1])
                zero_point = self._small(node.input[2]) if len(node.input) > 2 else np.zeros(1, dtype=np.int64)
                return found if scale is None or zero_point is None else {**found, **_affine(scale, zero_point)}
        return found

    def _small(self, name: str | bytes) -> Array | None:
        """Read a constant of a few elements; None if there is none of that name and size."""
        from onnx import numpy_helper

        tensor = self._tensors.get(_text(name))
        if tensor is None or math.prod(_checked(tensor.dims, _text(name))) > _MAX_RANK or tensor.external_data:
            return None
        values: Array = numpy_helper.to_array(tensor)
        return values

    def _weights(self) -> list[dict[str, Any]]:
        shapes, widths = self._unpacked_shapes(), self._field_widths()
        rows: dict[str, dict[str, Any]] = {}
        for name, tensor in self._tensors.items():
            dtype, shape = _onnx_dtype(tensor.data_type), _checked(tensor.dims, name)
            whole, _, number = name.rpartition(".")
            # The exporter appends "'" to names that a layer has already.
            if name in widths and number.rstrip("'").isdecimal() and whole in shapes:
                n, n_bytes = math.prod(shapes[whole]), len(tensor.raw_data)
                _check_length(name, n, widths[name], n_bytes)
                row = rows.setdefault(whole, _weight(self._layer(whole), shapes[whole], 0, 0))
                row["bits"] += widths[name]
                row["stored_bytes"] += n_bytes
            elif len(shape) >= 2 and dtype not in _NO_WEIGHTS and not (self._ours and name.startswith("#")):
                n_bytes, bits = _onnx_payload(tensor, dtype, shape, name), _bits(dtype)
                rows[name] = _weight(self._layer(name), shape, bits, n_bytes)
                if tensor.external_data:
                    rows[name]["external"] = {_text(e.key): _text(e.value) for e in tensor.external_data}["location"]
        return list(rows.values())

    def _layer(self, name: str) -> str:
        return name.removesuffix(".weight") if self._ours else name

    def _unpacked_shapes(self) -> dict[str, list[int]]:
        """Find the shapes that Reshape nodes give by constants: the last step of unpacking a weight."""
        shapes = {}
        for node in self._graph.node:
            if node.op_type != "Reshape" or len(node.input) < 2 or not node.output:
                continue
            shape = self._small(node.input[1])
            if shape is not None and shape.ndim == 1 and all(d > 0 for d in shape.tolist()):
                shapes[_text(node.output[0])] = [int(d) for d in shape.tolist()]
        return shapes

    def _field_widths(self) -> dict[str, int]:
        """Find the bits that each packed field holds of a code, by the mask that follows its shift to the right."""
        shifted, widths = {}, {}
        for node in self._graph.node:
            if len(node.input) < 2 or not node.output:
                continue
            source = _text(node.input[0])
            if node.op_type == "BitShift" and source in self._tensors and self._tensors[source].raw_data:
                shifted[_text(node.output[0])] = source
            elif node.op_type == "BitwiseAnd" and source in shifted:
                mask = self._small(node.input[1])
                if mask is not None and mask.size == 1:
                    widths[shifted[source]] = int(mask.reshape(-1)[0]).bit_length()
        return widths


def _text(value: str | bytes) -> str:
    # Protobuf gives bytes where a name is not UTF-8.
    return value if isinstance(value, str) else value.decode("utf-8", errors="replace")


def _onnx_dtype(number: int) -> str:
    from onnx import TensorProto

    name = str(TensorProto.DataType.Name(number)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _onnx_payload(tensor: Any, dtype: str, shape: list[int], name: str) -> int:
    """Count the bytes of a tensor's elements, wherever they lie.

    Raises:
        ValueError: there are too few or too many of them for the shape.
    """
    n, bits = math.prod(shape), _bits(dtype)
    if tensor.external_data:
        return -(-n * bits // 8)
    if tensor.raw_data or not n:
        _check_length(name, n, bits, len(tensor.raw_data))
        return len(tensor.raw_data)
    fields = [field for field, _ in tensor.ListFields() if field.name in ("float_data", "double_data", "int32_data")]
    if len(fields) != 1:
        raise ValueError(f"weight {name!r:.80} has no elements, expected {n}")
    # Numbers are written in as many bytes as each needs: count what the file loses without them.
    empty = type(tensor)()
    empty.CopyFrom(tensor)
    empty.ClearField(fields[0].name)
    return int(tensor.ByteSize() - empty.ByteSize())


# ---- TFLite ----------------------------------------------------------------------------------------------------------


def _tflite(data: bytes, where: str) -> dict[str, object]:
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ImportError as e:
        raise ExportError(f"{where}: {e.name} is missing; install it with: pip install 'edgecomp[bench]'") from e
    try:
        file = _Flatbuffer(data)
        return _tflite_model(file.table_at(file.number_at(0, "I")), schema, len(data))
    except _MEANT_BY_DAMAGED as e:
        raise BundleError(f"{where}: is damaged or cut off: {str(e)[:200] or type(e).__name__}") from e


class _Flatbuffer:
    """A flatbuffer read with every offset checked.

    The reader that the schema's compiler generates trusts the file: one wrong offset costs it gigabytes or hours. This
    one reads a limited number of tables, as a damaged file can name the same table any number of times.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._tables_left = _MAX_TABLES

    def number_at(self, position: int, code: str) -> Any:
        """Read one little-endian number; `code` is struct's."""
        if not 0 <= position <= len(self.data) - struct.calcsize(f"<{code}"):
            raise ValueError(f"an offset leads to byte {position} of {len(self.data)}")
        return struct.unpack_from(f"<{code}", self.data, position)[0]

    def table_at(self, position: int) -> _Table:
        self.spend(1)
        return _Table(self, position)

    def spend(self, tables: int) -> None:
        self._tables_left -= tables
        if self._tables_left < 0:
            raise ValueError("it names more tables than any network has")


class _Table:
    """One table; fields go by their numbers in the schema, which never change."""

    def __init__(self, file: _Flatbuffer, position: int) -> None:
        self._file = file
        self._position = position

    def _field(self, number: int) -> int:
        """Find the position of a field's value, 0 if the table lacks it."""
        vtable = self._position - self._file.number_at(self._position, "i")
        slot = 4 + 2 * number
        if slot >= self._file.number_at(vtable, "H"):
            return 0
        offset = self._file.number_at(vtable + slot, "H")
        return self._position + int(offset) if offset else 0

    def number(self, field: int, code: str) -> int:
        position = self._field(field)
        return int(self._file.number_at(position, code)) if position else 0

    def _vector(self, field: int, width: int) -> tuple[int, int]:
        """Find where the elements of a vector start, and how many there are."""
        position = self._field(field)
        if not position:
            return 0, 0
        position += self._file.number_at(position, "I")
        count = int(self._file.number_at(position, "I"))
        if position + 4 + count * width > len(self._file.data):
            raise ValueError(f"a list of {count} elements leads beyond its end")
        return position + 4, count

    def numbers(self, field: int, dtype: str) -> Array:
        start, count = self._vector(field, np.dtype(dtype).itemsize)
        return np.frombuffer(self._file.data, dtype=dtype, count=count, offset=start)

    def text(self, field: int) -> str:
        start, count = self._vector(field, 1)
        if count > 1 << 16:
            raise ValueError(f"a name has {count} bytes")
        return self._file.data[start : start + count].decode("utf-8", errors="replace")

    def table(self, field: int) -> _Table | None:
        position = self._field(field)
        return self._file.table_at(position + self._file.number_at(position, "I")) if position else None

    def tables(self, field: int) -> list[_Table]:
        start, count = self._vector(field, 4)
        self._file.spend(count)
        positions = range(start, start + 4 * count, 4)
        return [_Table(self._file, at + self._file.number_at(at, "I")) for at in positions]

    def payload(self) -> tuple[int, int]:
        """Read this table as a Buffer: where its bytes start, in the flatbuffer or behind it, and how many."""
        offset, size = self.number(1, "Q"), self.number(2, "Q")
        if offset <= 1:
            return self._vector(0, 1)
        if offset + size > len(self._file.data):
            raise ValueError(f"a buffer of {size} bytes leads beyond its end")
        return offset, size


def _tflite_model(model: _Table, schema: Any, file_bytes: int) -> dict[str, object]:
    """Describe a Model table.

    Raises:
        ValueError, IndexError, KeyError: the file contradicts itself.
    """
    kinds = {number: name.lower() for name, number in vars(schema.TensorType).items() if isinstance(number, int)}

    def dtype_of(tensor: _Table) -> str:
        number = tensor.number(1, "b")
        if number not in kinds:
            raise ValueError(f"a tensor has the unknown type {number}")
        return str(kinds[number])

    names = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    producer, graphs, buffers = model.text(3), model.tables(2), model.tables(4)
    if not graphs:
        raise ValueError("it holds no network")

    # Operators up to 127 stand in the field of old files; the newer field is larger or absent.
    codes = []
    for code in model.tables(1):
        number = max(code.number(0, "b"), code.number(3, "i"))
        custom = f"CUSTOM {code.text(1)}".rstrip()
        codes.append(custom if number == schema.BuiltinOperator.CUSTOM else names.get(number, f"operator {number}"))

    tensors = [graph.tables(0) for graph in graphs]
    weights, stored = [], {}
    for tensor in (t for of_graph in tensors for t in of_graph):
        shape = tensor.numbers(0, "<i4")
        start, n_bytes = buffers[number].payload() if (number := tensor.number(2, "I")) else (0, 0)
        dtype = dtype_of(tensor)
        if not n_bytes or shape.size < 2 or dtype in _NO_WEIGHTS:
            continue
        name = tensor.text(3)
        dims = _checked(shape.tolist(), name)
        if tensor.table(6) is None:  # a sparse tensor has fewer elements than its shape says
            _check_length(name, math.prod(dims), _bits(dtype), n_bytes)
        name = name.removesuffix(".weight") if producer == "edgecomp" else name
        weights.append(_weight(name, dims, _bits(dtype), n_bytes))
        stored[start] = n_bytes

    def border(number: int) -> dict[str, object]:
        tensor = tensors[0][number]
        signature = tensor.numbers(7, "<i4")
        shape = signature if signature.size else tensor.numbers(0, "<i4")
        if shape.size > _MAX_RANK:
            raise ValueError(f"tensor {number} has {shape.size} dimensions")
        dtype, quant = dtype_of(tensor), tensor.table(4)
        dims = [d if d >= 0 else None for d in shape.tolist()]
        found: dict[str, object] = {"name": tensor.text(3), "shape": dims, "dtype": dtype}
        if "int" in dtype and quant is not None:
            found |= _affine(quant.numbers(2, "<f4"), quant.numbers(3, "<i8"))
        return found

    def borders(field: int) -> list[dict[str, object]]:
        numbers = graphs[0].numbers(field, "<i4")
        if numbers.size > len(tensors[0]) or (numbers < 0).any():
            raise ValueError("its inputs or outputs are no tensors of it")
        return [border(number) for number in numbers.tolist()]

    return _model(
        kind="tflite",
        producer=producer,
        version=f"schema {model.number(0, 'I')}",
        inputs=borders(1),
        outputs=borders(2),
        operators=[codes[operator.number(0, "I")] for graph in graphs for operator in graph.tables(3)],
        weights=weights,
        weight_bytes=sum(stored.values()),
        file_bytes=file_bytes,
    )


# ---- edgecomp's own files --------------------------------------------------------------------------------------------


def _graph(data: bytes, where: str) -> dict[str, object]:
    try:
        graph = bundle.from_bytes(data, where)
    except _MEANT_BY_DAMAGED as e:
        raise BundleError(f"{where}: is damaged: {str(e)[:200] or type(e).__name__}; build it again") from e
    weights = [_weight(node.name, graph.weight(node).shape, 32, 4 * math.prod(graph.weight(node).shape))
               for node in graph.layers()]  # fmt: skip

    def borders(names: Sequence[str]) -> list[dict[str, object]]:
        return [{"name": name, "shape": ["N", *graph.tensors[name].shape[1:]], "dtype": "float32"} for name in names]

    found = _model(
        kind="graph",
        producer="edgecomp",
        version=bundle.GRAPH_SCHEMA,
        inputs=borders(graph.inputs),
        outputs=borders(graph.outputs),
        operators=[node.op.value for node in graph.nodes],
        weights=weights,
        weight_bytes=sum(weight["stored_bytes"] for weight in weights),
        file_bytes=len(data),
    )
    return {**found, "model": graph.name, "graph_digest": graph.digest()}


def _json(data: bytes, where: str) -> dict[str, object]:
    try:
        text = data.decode("utf-8")
        if text.lstrip().startswith("["):
            # What `bench --json` prints: a comparison for each runtime.
            listed = load_strict_json(f'{{"list": {text}}}', where)
            check_keys(listed, ("list",), where)
            parts = listed["list"]
            return _reports([Comparison.from_json(json.dumps(part), where) for part in parts])  # type: ignore[attr-defined]
        schema = load_strict_json(text, where).get("schema")
        for known, read in _JSON.items():
            if schema == known:
                return read(text, where)
    except BundleError:
        raise
    except EdgecompError as e:
        raise BundleError(str(e)) from e
    except _MEANT_BY_DAMAGED as e:
        raise BundleError(f"{where}: is damaged: {' '.join(str(e).split())[:200] or type(e).__name__}") from e
    raise BundleError(f"{where}: schema is {schema!r:.60}; expected one of {', '.join(_JSON)}")


def _plan(text: str, where: str) -> dict[str, object]:
    plan = CompressionPlan.from_json(text, where)
    layers = [
        {
            "name": name,
            "kept_channels": sum(layer.keep),
            "channels_before": len(layer.keep),
            "bits": layer.weight_bits,
        }
        for name, layer in plan.layers.items()
    ]
    return {
        "kind": "plan",
        "format_version": PLAN_SCHEMA,
        "graph_digest": plan.graph_digest,
        "io": plan.io.value,
        "classes": list(plan.classes),
        "ranges": len(plan.ranges),
        "preprocessing": plan.preprocessing.to_json(),
        "made_by": dict(plan.made_by),
        "layers": layers,
    }


def _manifest(text: str, where: str) -> dict[str, object]:
    record = read_manifest(text, where)
    _check_plain(record, 6)
    artifacts = [
        {
            **{key: a.get(key) for key in ("path", "format", "bytes", "weight_bytes", "mean_bits", "sha256")},
            **{f"accuracy_{key}": a["accuracy"].get(key) for key in ("value", "n", "runtime")},
            **{key: a.get("parity", {}).get(key) for key in ("equal_percent", "max_steps")},
        }
        for a in record["artifacts"]
    ]
    columns = ("name", "kind", "weights", "kept_channels", "bits", "zero_percent", "relevance", "stored_bytes")
    layers = [{key: layer.get(key) for key in columns} for layer in record["layers"]]
    plain = ("model", "data", "io", "classes", "graph_digest", "plan_sha256", "seed", "budget", "float", "tools")
    return {
        "kind": "manifest",
        "format_version": MANIFEST_SCHEMA,
        **{key: record[key] for key in (*plain, "preprocessing")},
        "artifacts": artifacts,
        "layers": layers,
    }


def _check_plain(value: object, depth: int) -> None:
    """Refuse what could not be written as JSON again: numbers beyond float64, lists nested without end.

    Raises:
        ValueError: there is such a thing.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is too large")
    if isinstance(value, (dict, list)):
        if not depth:
            raise ValueError("it is nested too deeply")
        for part in value.values() if isinstance(value, dict) else value:
            _check_plain(part, depth - 1)


def _report(report: BenchReport) -> dict[str, object]:
    names = ("label", "artifact", "artifact_bytes", "format", "target", "runtime", "runtime_version", "threads",
             "p50_us", "p90_us", "min_us", "load_ms", "peak_memory_bytes", "model_memory_bytes")  # fmt: skip
    values = {name: getattr(report, name) for name in names}
    return {**values, "samples": len(report.samples_us), "source": report.source.value}


def _reports(comparisons: Sequence[Comparison]) -> dict[str, object]:
    if not comparisons:
        raise ValueError("it lists no comparison")
    rows = []
    for comparison in comparisons:
        for report in comparison.reports:
            ratio = comparison.ratios.get(report.label)
            versus = {"baseline": comparison.baseline, "ratio": ratio.median if ratio else None}
            rows.append({**_report(report), **versus})
    return {"kind": "comparison", "format_version": COMPARISON_SCHEMA, "reports": rows}


_JSON: dict[str, Callable[[str, str], dict[str, object]]] = {
    PLAN_SCHEMA: _plan,
    MANIFEST_SCHEMA: _manifest,
    REPORT_SCHEMA: lambda text, where: {
        "kind": "bench",
        "format_version": REPORT_SCHEMA,
        "reports": [_report(BenchReport.from_json(text, where))],
    },
    COMPARISON_SCHEMA: lambda text, where: _reports([Comparison.from_json(text, where)]),
}
