"""The float graph as one file, so that a plan can be compressed and exported again without torch and without data.

Layout (version 1, 2026-11-23): 8 bytes little-endian length of the header; the header, UTF-8 JSON; then the weights as
little-endian float32, in the order of their names, without gaps. The header holds schema, digest, name, inputs,
outputs, nodes and tensors; the digest is `Graph.digest()` of what the file holds, so any flipped bit is noticed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from edgecomp.errors import BundleError, EdgecompError, GraphError
from edgecomp.files import write_file
from edgecomp.graph import Graph, Node, Op, Tensor
from edgecomp.strictjson import check_keys, load_strict_json
from edgecomp.verify import verify_float

GRAPH_SCHEMA = "edgecomp-graph/1"
GRAPH_FILE = "graph.edgecomp"
_MAX_HEADER_BYTES = 1 << 26


def to_bytes(graph: Graph) -> bytes:
    """Write a float graph: equal graphs give equal bytes.

    Raises:
        GraphError: the graph is not a legal float graph.
    """
    verify_float(graph)
    weights = sorted((t for t in graph.tensors.values() if t.data is not None), key=lambda t: t.name)
    header = {
        "schema": GRAPH_SCHEMA,
        "digest": graph.digest(),
        "name": graph.name,
        "inputs": list(graph.inputs),
        "outputs": list(graph.outputs),
        "nodes": [
            {
                "name": node.name,
                "op": node.op.value,
                "inputs": list(node.inputs),
                "outputs": list(node.outputs),
                # JSON knows no infinity: an open limit of a clip is written as null.
                "attrs": {key: _attribute_to_json(value) for key, value in node.attrs.items()},
            }
            for node in graph.nodes
        ],
        "weights": {t.name: list(t.shape) for t in weights},
        "activations": {
            t.name: list(t.shape) for t in sorted(graph.tensors.values(), key=lambda t: t.name) if t.data is None
        },
    }
    text = json.dumps(header, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()
    arrays = [np.ascontiguousarray(t.data, dtype="<f4").tobytes() for t in weights]
    return b"".join([len(text).to_bytes(8, "little"), text, *arrays])


def from_bytes(data: bytes, where: str = "graph") -> Graph:
    """Read what `to_bytes` wrote; strict.

    Raises:
        BundleError: truncated, damaged, of an unknown version, or not a legal float graph.
    """
    try:
        return _read(data, where)
    except BundleError:
        raise
    except (EdgecompError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError) as e:
        raise BundleError(f"{where}: is damaged: {str(e)[:200] or type(e).__name__}; build it again") from e


def save(graph: Graph, path: Path) -> None:
    """Write a graph to a file at once.

    Raises:
        OSError: as the system reports it.
    """
    write_file(path, to_bytes(graph))


def load(path: Path) -> Graph:
    """Read a graph file.

    Raises:
        BundleError: the file is missing, unreadable or damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise BundleError(f"{path}: cannot be read: {e.strerror}") from e
    return from_bytes(data, str(path))


def _attribute_to_json(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, float) and math.isinf(value):
        return None
    return value


def _attribute_from_json(key: str, value: Any, where: str) -> Any:
    if value is None and key in ("low", "high"):
        return -math.inf if key == "low" else math.inf
    if key in ("low", "high") and isinstance(value, float):
        return value
    numbers = value if isinstance(value, list) and key not in ("low", "high") else [value]
    # A limit given as a whole number stays one: the digest tells 6 from 6.0.
    whole = all(isinstance(v, int) and not isinstance(v, bool) and abs(v) < 1 << 31 for v in numbers)
    if not whole or len(numbers) > 16:
        raise BundleError(f"{where}: attribute {key!r:.80} is {value!r:.80}, expected small whole numbers")
    return tuple(value) if isinstance(value, list) else value


def _read(data: bytes, where: str) -> Graph:
    if len(data) < 8:
        raise BundleError(f"{where}: has {len(data)} bytes, too few for a graph file")
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, len(data) - 8):
        raise BundleError(f"{where}: is no graph file of edgecomp, or is cut off")
    header: Any = load_strict_json(data[8 : 8 + length].decode("utf-8"), where)
    schema = header.get("schema")
    if schema != GRAPH_SCHEMA:
        raise BundleError(f"{where}: schema is {schema!r:.60}, this edgecomp reads {GRAPH_SCHEMA!r}")
    check_keys(header, ("schema", "digest", "name", "inputs", "outputs", "nodes", "weights", "activations"), where)
    tensors: dict[str, Tensor] = {}
    position = 8 + length
    if list(header["weights"]) != sorted(header["weights"]):
        raise BundleError(f"{where}: weights do not stand in the order of their names")
    for name, dims in header["weights"].items():
        shape = _shape(dims, f"{where}: weight {name!r:.80}")
        n_bytes = 4 * math.prod(shape)
        if position + n_bytes > len(data):
            raise BundleError(f"{where}: is cut off within weight {name!r:.80}")
        values = np.frombuffer(data, dtype="<f4", count=n_bytes // 4, offset=position).astype(np.float32)
        tensors[name] = Tensor(name=name, shape=shape, data=values.reshape(shape))
        position += n_bytes
    if position != len(data):
        raise BundleError(f"{where}: {len(data) - position} bytes stand behind the last weight")
    for name, dims in header["activations"].items():
        if name in tensors:
            raise BundleError(f"{where}: {name!r:.80} is both weight and activation")
        tensors[name] = Tensor(name=name, shape=_shape(dims, f"{where}: activation {name!r:.80}"))
    graph = Graph(
        name=_text(header["name"], where),
        nodes=tuple(_node(value, where) for value in header["nodes"]),
        tensors=tensors,
        inputs=_texts(header["inputs"], where),
        outputs=_texts(header["outputs"], where),
    )
    verify_float(graph)
    if graph.digest() != header["digest"]:
        raise BundleError(f"{where}: content and digest differ; the file is damaged, build it again")
    return graph


def _node(value: Any, where: str) -> Node:
    check_keys(value, ("name", "op", "inputs", "outputs", "attrs"), f"{where}: node")
    name = _text(value["name"], where)
    if value["op"] not in tuple(Op):
        raise BundleError(f"{where}: node {name!r:.80} has the unknown operator {value['op']!r:.40}")
    return Node(
        name=name,
        op=Op(value["op"]),
        inputs=_texts(value["inputs"], where),
        outputs=_texts(value["outputs"], where),
        attrs={key: _attribute_from_json(key, v, f"{where}: node {name!r:.80}") for key, v in value["attrs"].items()},
    )


def _shape(dims: Any, where: str) -> tuple[int, ...]:
    if not (
        isinstance(dims, list)
        and len(dims) <= 6
        and all(isinstance(d, int) and not isinstance(d, bool) and 0 < d < 1 << 31 for d in dims)
    ):
        raise BundleError(f"{where}: has no legal shape")
    if math.prod(dims) >= 1 << 40:
        raise GraphError(f"{where}: is larger than any tensor we know")
    return tuple(dims)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BundleError(f"{where}: expected a name, found {type(value).__name__}")
    value.encode()  # half a surrogate pair passes JSON and could not be written again
    return value


def _texts(values: Any, where: str) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise BundleError(f"{where}: expected a list of names, found {type(values).__name__}")
    return tuple(_text(value, where) for value in values)
