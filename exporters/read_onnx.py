"""What is in an ONNX file, ours or anybody's; damaged files give a BundleError."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgecomp.errors import BundleError, ExportError
from edgecomp.graph import Array

from .modelfacts import (
    MAX_RANK,
    MEANT_BY_DAMAGED,
    NO_WEIGHTS,
    affine,
    bits_of,
    check_length,
    checked_shape,
    model_facts,
    weight_row,
)
from .onnx_model import DOMAIN


def read_onnx(data: bytes, where: str) -> dict[str, object]:
    """Describe an ONNX model; see `describe.describe` for the keys.

    Raises:
        BundleError: the bytes are no model or damaged; `where` names them.
        ExportError: the `onnx` package is missing.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError as e:
        raise ExportError(f"{where}: {e.name} is missing; install it with: pip install 'edgecomp[bench]'") from e
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
        return _OnnxGraph(proto).describe(len(data))
    except (DecodeError, *MEANT_BY_DAMAGED) as e:
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
        return model_facts(
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
                return found if scale is None or zero_point is None else {**found, **affine(scale, zero_point)}
        return found

    def _small(self, name: str | bytes) -> Array | None:
        """Read a constant of a few elements; None if there is none of that name and size."""
        from onnx import numpy_helper

        tensor = self._tensors.get(_text(name))
        if tensor is None or math.prod(checked_shape(tensor.dims, _text(name))) > MAX_RANK or tensor.external_data:
            return None
        values: Array = numpy_helper.to_array(tensor)
        return values

    def _weights(self) -> list[dict[str, Any]]:
        shapes, widths = self._unpacked_shapes(), self._field_widths()
        rows = self._words(shapes)
        in_words = {name for row in rows.values() for name in row.pop("parts")}
        for name, tensor in self._tensors.items():
            if name in in_words:
                continue
            dtype, shape = _onnx_dtype(tensor.data_type), checked_shape(tensor.dims, name)
            whole, _, number = name.rpartition(".")
            # The exporter appends "'" to names that a layer has already.
            if name in widths and number.rstrip("'").isdecimal() and whole in shapes:
                n, n_bytes = math.prod(shapes[whole]), len(tensor.raw_data)
                check_length(name, n, widths[name], n_bytes)
                row = rows.setdefault(whole, weight_row(self._layer(whole), shapes[whole], 0, 0))
                row["bits"] += widths[name]
                row["stored_bytes"] += n_bytes
            elif len(shape) >= 2 and dtype not in NO_WEIGHTS and not (self._ours and name.startswith("#")):
                n_bytes, bits = _onnx_payload(tensor, dtype, shape, name), bits_of(dtype)
                rows[name] = weight_row(self._layer(name), shape, bits, n_bytes)
                if tensor.external_data:
                    rows[name]["external"] = {_text(e.key): _text(e.value) for e in tensor.external_data}["location"]
        return list(rows.values())

    def _words(self, shapes: Mapping[str, list[int]]) -> dict[str, dict[str, Any]]:
        """Find our weights that are stored as words: what stands before a Reshape of a function's result."""
        writers = {_text(o): node for node in self._graph.node for o in node.output}
        rows: dict[str, dict[str, Any]] = {}
        for node in writers.values():
            source = writers.get(_text(node.input[0])) if node.op_type == "Reshape" and node.input else None
            if source is None or _text(source.domain) != DOMAIN or not self._ours:
                continue
            whole = _text(node.output[0])
            parts, seen, left = set(), {whole}, [_text(name) for name in source.input]
            while left:
                name = left.pop()
                if name in seen:
                    continue
                seen.add(name)
                if name in self._tensors and name.startswith(f"{whole}."):
                    parts.add(name)
                elif name in writers:
                    left.extend(_text(i) for i in writers[name].input)
            symbols = [self._tensors[name] for name in parts if _onnx_dtype(self._tensors[name].data_type) == "int8"]
            if whole not in shapes or len(symbols) != 1:
                raise ValueError(f"weight {whole!r:.80} is stored in words, but has no table of symbols or no shape")
            codes = np.frombuffer(symbols[0].raw_data, dtype=np.int8)
            limit = max(1, -int(codes.min()), int(codes.max()))
            n_bytes = sum(len(self._tensors[name].raw_data) for name in parts)
            rows[whole] = weight_row(self._layer(whole), shapes[whole], limit.bit_length() + 1, n_bytes)
            rows[whole] |= {"encoding": "words", "parts": parts}
        return rows

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
    n, bits = math.prod(shape), bits_of(dtype)
    if tensor.external_data:
        return -(-n * bits // 8)
    if tensor.raw_data or not n:
        check_length(name, n, bits, len(tensor.raw_data))
        return len(tensor.raw_data)
    fields = [field for field, _ in tensor.ListFields() if field.name in ("float_data", "double_data", "int32_data")]
    if len(fields) != 1:
        raise ValueError(f"weight {name!r:.80} has no elements, expected {n}")
    # Numbers are written in as many bytes as each needs: count what the file loses without them.
    empty = type(tensor)()
    empty.CopyFrom(tensor)
    empty.ClearField(fields[0].name)
    return int(tensor.ByteSize() - empty.ByteSize())

