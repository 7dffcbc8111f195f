"""An ONNX file of ours taken apart with numpy alone: its nodes and its constants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from edgecomp.graph import Array

from .modelfacts import checked_shape
from .onnx_model import DOMAIN
from .protobuf import fields, view, whole

FLOAT, UINT8, INT8, INT32, INT64, BOOL = 1, 2, 3, 6, 7, 9
"""Numbers of ONNX's element types."""
DTYPES = {FLOAT: "<f4", UINT8: "u1", INT8: "i1", INT32: "<i4", INT64: "<i8"}
"""Those that our files hold."""
MOST_PARTS = 1 << 18
"""Nodes and constants of a graph at most."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Node:
    """A node; names are bytes, as they stand in the file.

    Attributes:
        attributes: by name, the whole message of each.
        others: the whole fields of name, operator, domain and documentation, in the file's order, attributes among
            them under their names.
    """

    op: str
    domain: str
    inputs: tuple[bytes, ...]
    outputs: tuple[bytes, ...]
    attributes: Mapping[str, memoryview]
    others: tuple[tuple[str, memoryview], ...]

    def number(self, name: str, default: int) -> int:
        """Give an attribute that is a number."""
        found = [value for n, value, _ in fields(self.attributes[name]) if n == 3] if name in self.attributes else []
        return whole(found[-1]) if found else default

    def text(self, name: str) -> str:
        """Give an attribute that is a text, "" if there is none."""
        found = [value for n, value, _ in fields(self.attributes[name]) if n == 4] if name in self.attributes else []
        return _text(found[-1]) if found else ""


class Coded(Protocol):
    """Codes that are still to be decoded."""

    def decode(self, out: Array) -> None:
        """Write them: out int8 (n,)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Constant:
    """A tensor of the file, or one that was decoded from others.

    Attributes:
        kind: number of its element type, one of DTYPES.
        data: little-endian, C order; or what gives it.
        turned: the elements are those of a matrix with rows and columns exchanged.
        raised: the elements are int8, to be stored as uint8 with 128 added.
    """

    shape: tuple[int, ...]
    kind: int
    data: bytes | memoryview | Coded
    turned: bool = False
    raised: bool = False

    @property
    def n_bytes(self) -> int:
        """Count the bytes of its elements."""
        return math.prod(self.shape) * np.dtype(DTYPES[self.kind]).itemsize

    def values(self) -> Array:
        """Give what stands in the file, without a copy (TypeError if it is still to be decoded)."""
        if not isinstance(self.data, (bytes, memoryview)):
            raise TypeError("codes where numbers are expected")
        shape = self.shape[::-1] if self.turned else self.shape
        return np.frombuffer(self.data, dtype=DTYPES[self.kind]).reshape(shape)

    def transposed(self) -> Constant:
        """Exchange rows and columns of a matrix."""
        return replace(self, shape=self.shape[::-1], turned=not self.turned)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parts:
    """An ONNX file.

    Attributes:
        ours: whether edgecomp wrote it.
        before, behind: the whole fields of the model around its graph, without functions and what they need.
        nodes: in order.
        constants: initializers by name; empty where the file is not ours.
        around: the whole fields of the graph for its name, inputs and outputs.
        results: names of the outputs.
        given: names of the inputs.
    """

    ours: bool
    before: list[memoryview] = field(default_factory=list)
    behind: list[memoryview] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    constants: dict[bytes, Constant] = field(default_factory=dict)
    around: dict[int, list[memoryview]] = field(default_factory=dict)
    given: list[bytes] = field(default_factory=list)
    results: list[bytes] = field(default_factory=list)


GRAPH_NAME, INPUT, OUTPUT = 2, 11, 12
"""Numbers of a graph's fields that stay as they are."""
_INFORMATION = (10, 13, 16)
"""Fields of a graph that change nothing: documentation, shapes of what is inside, metadata."""


def parts_of(data: memoryview) -> Parts:
    """Take a file apart; one that is not ours only so far that this is seen.

    Raises:
        ValueError: it is damaged, or of a later edgecomp.
    """
    graphs, producer, has_version = [], "", False
    for number, value, _ in fields(data):
        if number == 1:
            has_version = True
        elif number == 2:
            producer = _text(value)
        elif number == 7:
            graphs.append(view(value))
    if len(graphs) != 1 or not has_version:
        raise ValueError("it holds no network")
    parts = Parts(ours=producer == "edgecomp")
    if not parts.ours:
        return parts
    for number, value, raw in fields(data):
        if number == 8 and _is_own_domain(view(value)):
            continue
        if number not in (7, 25):
            (parts.before if number < 7 else parts.behind).append(raw)
    for number, value, raw in fields(graphs[0]):
        if len(parts.nodes) + len(parts.constants) > MOST_PARTS:
            raise ValueError(f"it has more than {MOST_PARTS} nodes and constants")
        if number == 1:
            parts.nodes.append(_node(view(value)))
        elif number == 5:
            name, constant = _constant(view(value))
            if name in parts.constants:
                raise ValueError(f"two constants are called {shown(name)}")
            parts.constants[name] = constant
        elif number in (GRAPH_NAME, INPUT, OUTPUT):
            parts.around.setdefault(number, []).append(raw)
            if number != GRAPH_NAME:
                names = [bytes(view(v)) for n, v, _ in fields(view(value)) if n == 1]
                (parts.given if number == INPUT else parts.results).extend(names[-1:])
        elif number not in _INFORMATION:
            raise ValueError(f"its graph has a field {number}, which edgecomp does not write")
    return parts


def _is_own_domain(opset: memoryview) -> bool:
    """Tell whether an entry is that of our functions (ValueError: of a later edgecomp)."""
    entry = {number: value for number, value, _ in fields(opset)}
    if _text(entry.get(1, memoryview(b""))) != DOMAIN:
        return False
    if entry.get(2) != 1:
        raise ValueError(f"its functions are of version {entry.get(2)}, this edgecomp reads version 1")
    return True


def _text(value: int | memoryview) -> str:
    return bytes(view(value)).decode("utf-8")


def shown(*names: bytes) -> str:
    """Write names for a message."""
    return ", ".join(repr(name.decode("utf-8", errors="replace"))[:80] for name in names[:8])


def _node(message: memoryview) -> Node:
    inputs, outputs, op, domain = [], [], "", ""
    attributes: dict[str, memoryview] = {}
    others = []
    for number, value, raw in fields(message):
        if number == 1:
            inputs.append(bytes(view(value)))
            continue
        if number == 2:
            outputs.append(bytes(view(value)))
            continue
        attribute = ""
        if number == 4:
            op = _text(value)
        elif number == 5:
            inside = {n: v for n, v, _ in fields(view(value))}
            attribute = _text(inside.get(1, memoryview(b"")))
            if 6 in inside or 11 in inside or not attribute or attribute in attributes:
                raise ValueError("a node holds a graph, or two attributes of a name, which edgecomp does not write")
            attributes[attribute] = view(value)
        elif number == 7:
            domain = _text(value)
        others.append((attribute, raw))
    return Node(
        op=op,
        domain=domain,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        attributes=attributes,
        others=tuple(others),
    )


def _constant(message: memoryview) -> tuple[bytes, Constant]:
    """Read an initializer: name and values."""
    dims: list[int] = []
    name, kind, data = b"", 0, None
    for number, value, _ in fields(message):
        if number == 1:
            dims.append(whole(value))
        elif number == 2:
            kind = whole(value)
        elif number == 8:
            name = bytes(view(value))
        elif number == 9:
            data = view(value)
        else:
            raise ValueError(f"constant {shown(name)} has a field {number}, which edgecomp does not write")
    shape = tuple(checked_shape(dims, shown(name)))
    if kind not in DTYPES or data is None:
        raise ValueError(f"constant {shown(name)} is of type {kind}, or has no bytes")
    found = Constant(shape=shape, kind=kind, data=data)
    if found.n_bytes != len(data):
        raise ValueError(f"constant {shown(name)} has {len(data)} bytes, its shape {list(shape)} takes {found.n_bytes}")
    return name, found
