"""What is in a TFLite file, ours or anybody's, by a reader that checks every offset; damage gives a BundleError."""

from __future__ import annotations

import math
from typing import Any

from edgecomp.atrest import facts_of
from edgecomp.errors import BundleError, ExportError

from .flatbuffer import Flatbuffer, Table
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
from .tflm_decode import OPERATOR as DECODE
from .tflm_decode import facts_of as decode_facts
from .unpack_tflite import OPERATOR, custom_codes


def read_tflite(data: bytes, where: str) -> dict[str, object]:
    """Describe a TFLite model; see `describe.describe` for the keys.

    Raises:
        BundleError: the bytes are no model or damaged; `where` names them.
        ExportError: the package with TFLite's schema is missing.
    """
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ImportError as e:
        raise ExportError(f"{where}: {e.name} is missing; install it with: pip install 'edgecomp[bench]'") from e
    try:
        file = Flatbuffer(data)
        return _tflite_model(file.root(), schema, len(data))
    except MEANT_BY_DAMAGED as e:
        raise BundleError(f"{where}: is damaged or cut off: {str(e)[:200] or type(e).__name__}") from e


def _tflite_model(model: Table, schema: Any, file_bytes: int) -> dict[str, object]:
    """Describe a Model table.

    Raises:
        ValueError, IndexError, KeyError: the file contradicts itself.
    """
    kinds = {number: name.lower() for name, number in vars(schema.TensorType).items() if isinstance(number, int)}

    def dtype_of(tensor: Table) -> str:
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
    packed, ancillary = _packed_sources(model, graphs, tensors)

    def payload(tensor: Table) -> tuple[int, int]:
        return buffers[number].payload() if (number := tensor.number(2, "I")) else (0, 0)

    for tensor in (t for of_graph in tensors for t in of_graph):
        source = packed.get(tensor.position, tensor)
        shape = tensor.numbers(0, "<i4")
        start, n_bytes = payload(source)
        dtype = dtype_of(tensor)
        if not n_bytes or (shape.size < 2 and source is tensor) or dtype in NO_WEIGHTS:
            continue
        name = tensor.text(3)
        dims = checked_shape(shape.tolist(), name)
        n, shown = math.prod(dims), name.removesuffix(".weight") if producer == "edgecomp" else name
        stored[start] = n_bytes
        if tensor.position in ancillary:
            at, n_more = payload(ancillary[tensor.position])
            kind, bits = decode_facts(bytes(model.file.data[at : at + min(n_more, 16)]), n_bytes, n)
            stored[at] = n_more
            weights.append({**weight_row(shown, dims, bits, n_bytes + n_more), "encoding": kind})
            continue
        if source is not tensor:
            kind, bits, n_packed = facts_of(bytes(model.file.data[start : start + min(n_bytes, 64)]))
            if n_packed != n:
                raise ValueError(f"weight {name!r:.80} has {n_packed} packed codes, expected {n}")
            weights.append({**weight_row(shown, dims, bits, n_bytes), "encoding": kind})
            continue
        if tensor.table(6) is None:  # a sparse tensor has fewer elements than its shape says
            check_length(name, n, bits_of(dtype), n_bytes)
        weights.append(weight_row(shown, dims, bits_of(dtype), n_bytes))

    def border(number: int) -> dict[str, object]:
        tensor = tensors[0][number]
        signature = tensor.numbers(7, "<i4")
        shape = signature if signature.size else tensor.numbers(0, "<i4")
        if shape.size > MAX_RANK:
            raise ValueError(f"tensor {number} has {shape.size} dimensions")
        dtype, quant = dtype_of(tensor), tensor.table(4)
        dims = [d if d >= 0 else None for d in shape.tolist()]
        found: dict[str, object] = {"name": tensor.text(3), "shape": dims, "dtype": dtype}
        if "int" in dtype and quant is not None:
            found |= affine(quant.numbers(2, "<f4"), quant.numbers(3, "<i8"))
        return found

    def borders(field: int) -> list[dict[str, object]]:
        numbers = graphs[0].numbers(field, "<i4")
        if numbers.size > len(tensors[0]) or (numbers < 0).any():
            raise ValueError("its inputs or outputs are no tensors of it")
        return [border(number) for number in numbers.tolist()]

    return model_facts(
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


def _packed_sources(
    model: Table, graphs: list[Table], tensors: list[list[Table]]
) -> tuple[dict[int, Table], dict[int, Table]]:
    """Find, by the position of a weight's tensor, the tensor that holds its packed bytes.

    Returns:
        those tensors, and those that say to TFLite Micro's DECODE how; these only of weights that it decodes.
    """
    codes = custom_codes(model)
    found, ancillary = {}, {}
    for graph, of_graph in zip(graphs, tensors, strict=True):
        for operator in graph.tables(3):
            name = codes.get(operator.number(0, "I"))
            if name not in (OPERATOR, DECODE):
                continue
            sources, weights = (operator.numbers(field, "<i4").tolist() for field in (1, 2))
            a_weight = 1 if name == OPERATOR else 2
            if len(sources) != a_weight * len(weights) or not weights or min(sources + weights) < 0:
                raise ValueError(f"{name} reads or gives no tensor, or another number of them")
            for i, weight in enumerate(weights):
                found[of_graph[weight].position] = of_graph[sources[a_weight * i]]
                if name == DECODE:
                    ancillary[of_graph[weight].position] = of_graph[sources[2 * i + 1]]
    return found, ancillary
