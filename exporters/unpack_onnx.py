"""A packed ONNX file made plain: every weight int8, as `export --weights-at-rest int8` writes it. Needs numpy alone.

What the file would have a runtime compute while it loads is computed here: weights, the scales of biases, zeros. The
nodes that are left are numbered anew and the constants stored in the order of their first use, so the plain file is
the exporter's, to the byte.

`plain_onnx` gives one file. `plain_parts` writes the weights aside, for a runtime that maps them into memory instead of
reading them. There linear layers are transposed, which onnxruntime would do otherwise, in memory of its own.
Chosen 2026-11-26.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgecomp.errors import BundleError, GraphError
from edgecomp.graph import Array

from .modelfacts import MEANT_BY_DAMAGED
from .onnx_decoders import Decoders
from .onnx_model import DOMAIN
from .onnx_parts import GRAPH_NAME, INPUT, INT8, OUTPUT, UINT8, Constant, Node, Parts, parts_of, shown
from .protobuf import bytes_field, bytes_head, number_field

MOST_BYTES = (1 << 31) - 1
"""What a protobuf message can hold."""
MODEL_FILE, WEIGHTS_FILE = "model.onnx", "weights"
_PAGE = 4096
_CHUNK = 1 << 20


def plain_onnx(data: bytes, where: str, *, most_bytes: int = MOST_BYTES, unsigned: bool = False) -> bytes:
    """Widen every packed weight of an ONNX file to int8.

    Args:
        data: an ONNX file, packed or not; one that edgecomp did not write is given back as it is.
        where: names it in errors.
        most_bytes: that the plain file may have.
        unsigned: store the weights of layers as uint8 with a zero point of 128: the same numbers.

    Returns:
        a file with the same inputs, outputs and results, in which nothing is left to compute beforehand.

    Raises:
        BundleError: it is none, damaged, of a later layout, or larger than allowed when unpacked.
    """
    with _damage_named(where):
        parts = parts_of(memoryview(data))
        plain = _plain(parts, where, most_bytes) if parts.ours else None
        if plain is None or not (plain.folded or unsigned):
            return data
        if unsigned:
            plain = _unsigned(plain)
        tensors = []
        for name, constant in plain.constants:
            tensors.append((_head(name, constant) + bytes_head(9, constant.n_bytes), constant))
        out = io.BytesIO()  # gives its bytes away without a copy
        for piece in _model(plain, tensors):
            out.write(piece)
        return out.getvalue()


def plain_parts(data: memoryview, where: str, folder: Path, *, most_bytes: int = MOST_BYTES) -> Path | None:
    """Write a plain file in two parts: its structure, and its weights as ONNX external data.

    Args:
        data: an ONNX file.
        where: names it in errors.
        folder: an empty one, gets MODEL_FILE and WEIGHTS_FILE.
        most_bytes: that both may have.

    Returns:
        the file to be loaded; None if edgecomp did not write this one: then nothing was written.

    Raises:
        BundleError: as `plain_onnx`.
        OSError: as the system reports it.
    """
    with _damage_named(where):
        parts = parts_of(data)
        if not parts.ours:
            return None
        plain = _transposed(_plain(parts, where, most_bytes))
        tensors: list[tuple[bytes, Constant | None]] = []
        with (folder / WEIGHTS_FILE).open("wb") as stream:
            for name, constant in plain.constants:
                if constant.n_bytes < _PAGE:
                    tensors.append((_head(name, constant) + bytes_head(9, constant.n_bytes), constant))
                    continue
                stream.write(bytes(-stream.tell() % _PAGE))
                tensors.append((_head(name, constant) + _aside(stream.tell(), constant.n_bytes), None))
                for piece in _content(constant):
                    stream.write(piece)
        with (folder / MODEL_FILE).open("wb") as stream:
            for piece in _model(plain, tensors):
                stream.write(piece)
    return folder / MODEL_FILE


@contextlib.contextmanager
def _damage_named(where: str) -> Iterator[None]:
    """Turn what reading a damaged file raises into the one error that is documented."""
    try:
        yield
    except (GraphError, *MEANT_BY_DAMAGED) as e:
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise BundleError(f"{where}: is damaged or no ONNX file: {reason}") from e


# ---- the plain network -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Plain:
    """A file without anything to compute beforehand.

    Attributes:
        parts: what it was made from, for all that stays as it is.
        folded: whether it differs from that.
        nodes: in order.
        constants: name and values, in the order in which they are stored.
    """

    parts: Parts
    folded: bool
    nodes: Sequence[Node]
    constants: Sequence[tuple[bytes, Constant]]


def _plain(parts: Parts, where: str, most_bytes: int) -> _Plain:
    folded, weights = _folded(parts, where, most_bytes)
    constants = parts.constants | folded
    needed, kept = set(parts.results), []
    for node in reversed(parts.nodes):
        if any(name in needed and name not in folded for name in node.outputs):
            kept.append(node)
            needed.update(node.inputs)
    kept.reverse()
    known = {b"", *parts.given, *constants}
    for node in kept:
        if node.domain == DOMAIN or node.op == "BitShift":
            raise ValueError(f"{shown(*node.outputs)} is unpacked in a way that this edgecomp does not know")
        if not known.issuperset(node.inputs):
            raise ValueError(f"{shown(*node.outputs)} is made of what nothing gives")
        known.update(node.outputs)
    if not known.issuperset(parts.results):
        raise ValueError(f"nothing gives one of {shown(*parts.results)}")
    numbered, stored = _numbered(parts, kept, constants, weights)
    return _Plain(parts=parts, folded=bool(folded), nodes=numbered, constants=stored)


def _folded(parts: Parts, where: str, most_bytes: int) -> tuple[dict[bytes, Constant], set[bytes]]:
    """Compute what needs no input, by name; also give the names of the weights among it."""
    decoders = Decoders(parts)
    folded: dict[bytes, Constant] = {}
    n_bytes = sum(constant.n_bytes for constant in parts.constants.values())

    def fold(name: bytes, constant: Constant | None) -> None:
        nonlocal n_bytes
        if constant is not None:
            folded[name] = constant
            n_bytes += constant.n_bytes
        if n_bytes > most_bytes:
            raise BundleError(f"{where}: takes up to {n_bytes} bytes when unpacked, {most_bytes} are allowed")

    for node in parts.nodes:
        fold(node.outputs[0], decoders.weight(node))
    weights = set(folded)
    for node in parts.nodes:
        if node.op != "DequantizeLinear" or len(node.inputs) != 3:
            continue
        _, scale, zero_point = node.inputs
        if scale not in folded:
            fold(scale, decoders.product(scale))
        scales = folded.get(scale, parts.constants.get(scale))
        if scales is not None and len(scales.shape) == 1 and zero_point not in folded:
            fold(zero_point, decoders.zeros(zero_point, scales.shape[0]))
    return folded, weights


_CONSTANT = re.compile(rb"#\d+'*")


def _numbered(
    parts: Parts, kept: Sequence[Node], constants: dict[bytes, Constant], weights: set[bytes]
) -> tuple[list[Node], list[tuple[bytes, Constant]]]:
    """Give nodes and constants the names and the order that the exporter would have given them."""
    made_up = {name: b"%%%d" % n for n, node in enumerate(parts.nodes) for name in node.outputs
               if name.rstrip(b"'") == b"%%%d" % n and name not in parts.results}  # fmt: skip
    loose = {name for name in constants if name not in weights and (name in made_up or _CONSTANT.fullmatch(name))}
    new = {name: name for name in parts.given}
    new |= {name: name for node in kept for name in node.outputs if name not in made_up}
    new |= {name: name for name in constants if name not in loose}
    taken = set(new) | set(parts.results)

    def fresh(wanted: bytes) -> bytes:
        while wanted in taken:
            wanted += b"'"
        taken.add(wanted)
        return wanted

    stored: dict[bytes, Constant] = {}
    equal: dict[tuple[int, tuple[int, ...], bytes], bytes] = {}

    def store(name: bytes) -> None:
        constant = constants[name]
        if name in loose:
            key = (constant.kind, constant.shape, constant.values().tobytes())
            if key not in equal:
                equal[key] = fresh(b"#%d" % len(equal))
            new[name] = equal[key]
        stored.setdefault(new[name], constant)

    nodes = []
    for number, node in enumerate(kept):
        of_weight = node.op == "DequantizeLinear" and node.inputs[0] in constants and node.inputs[0] not in loose
        # The exporter stores a weight behind what its codes mean.
        for name in node.inputs[::-1] if of_weight else node.inputs:
            if name in constants:
                store(name)
        for name in node.outputs:
            if name in made_up:
                new[name] = fresh(b"%%%d" % number)
        inputs = tuple(new.get(name, name) for name in node.inputs)
        nodes.append(replace(node, inputs=inputs, outputs=tuple(new[name] for name in node.outputs)))
    for name in parts.results:
        if name in constants:
            store(name)
    return nodes, list(stored.items())


def _transposed(plain: _Plain) -> _Plain:
    """Store the weights of linear layers (I, O), where nothing else uses them."""
    readers: dict[bytes, list[Node]] = {name: [] for name in plain.parts.results}
    for node in plain.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    changed: dict[int, Node] = {}
    constants = dict(plain.constants)
    for node in plain.nodes:
        if node.op != "DequantizeLinear" or not node.inputs or len(constants.get(node.inputs[0], _NONE).shape) != 2:
            continue
        users = readers.get(node.outputs[0], [])
        fits = len(readers[node.inputs[0]]) == len(users) == 1 and node.number("axis", 1) == 0
        if not fits or users[0].op != "Gemm" or users[0].inputs[1] != node.outputs[0]:
            continue
        if users[0].number("transB", 0) == 1 and node.outputs[0] not in plain.parts.results:
            # Left out, they are 1 and 0.
            changed |= {id(node): _without(node, "axis"), id(users[0]): _without(users[0], "transB")}
            constants[node.inputs[0]] = constants[node.inputs[0]].transposed()
    nodes = [changed.get(id(node), node) for node in plain.nodes]
    return replace(plain, nodes=nodes, constants=list(constants.items()))


_LAYERS = ("Conv", "Gemm", "MatMul")


def _unsigned(plain: _Plain) -> _Plain:
    """Store the weights of layers as uint8.

    On x86 without VNNI onnxruntime adds two products of uint8 and int8 in 16 bits, which saturate; those of uint8 and
    uint8 it adds in 32 (MLAS, 1.32.0).
    """
    readers: dict[bytes, list[Node]] = {}
    for node in plain.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    constants = dict(plain.constants)
    raised: dict[bytes, Constant] = {}
    changed: dict[int, Node] = {}
    for node in plain.nodes:
        if node.op != "DequantizeLinear" or len(node.inputs) != 3 or node.outputs[0] in plain.parts.results:
            continue
        weight, scale, zero_point = node.inputs
        users = readers.get(node.outputs[0], [])
        of_layers = all(user.op in _LAYERS and user.inputs[1:2] == node.outputs for user in users)
        ours = all(constants.get(name, _NONE).kind == INT8 for name in (weight, zero_point))
        if not (users and of_layers and ours and len(readers[weight]) == 1):
            continue
        constants[weight] = replace(constants[weight], kind=UINT8, raised=True)
        name = zero_point + b".unsigned"
        raised[name] = replace(constants[zero_point], kind=UINT8, raised=True)
        changed[id(node)] = replace(node, inputs=(weight, scale, name))
    nodes = [changed.get(id(node), node) for node in plain.nodes]
    return replace(plain, nodes=nodes, constants=[*raised.items(), *constants.items()])


_NONE = Constant(shape=(), kind=0, data=b"")


def _without(node: Node, attribute: str) -> Node:
    return replace(node, others=tuple(entry for entry in node.others if entry[0] != attribute))


# ---- writing ---------------------------------------------------------------------------------------------------------


def _model(plain: _Plain, tensors: Sequence[tuple[bytes, Constant | None]]) -> Iterator[bytes | memoryview]:
    """Write the file piece by piece.

    Args:
        plain: the network.
        tensors: what stands before the elements of each constant, and the constant where these follow.
    """
    around = plain.parts.around
    nodes = [bytes_field(1, _node_bytes(node)) for node in plain.nodes]
    lengths = [len(head) + (constant.n_bytes if constant else 0) for head, constant in tensors]
    heads = [bytes_head(5, n) for n in lengths]
    n_bytes = sum(len(piece) for pieces in (nodes, heads, *around.values()) for piece in pieces) + sum(lengths)
    yield from plain.parts.before
    yield bytes_head(7, n_bytes)
    yield from nodes
    yield from around.get(GRAPH_NAME, ())
    for head, (start, constant) in zip(heads, tensors, strict=True):
        yield head + start
        if constant is not None:
            yield from _content(constant)
    yield from around.get(INPUT, ())
    yield from around.get(OUTPUT, ())
    yield from plain.parts.behind


def _node_bytes(node: Node) -> bytes:
    pieces: Iterable[bytes | memoryview] = (
        *(bytes_field(1, name) for name in node.inputs),
        *(bytes_field(2, name) for name in node.outputs),
        *(raw for _, raw in node.others),
    )
    return b"".join(pieces)


def _head(name: bytes, constant: Constant) -> bytes:
    """Write shape, type and name of a constant."""
    dims = b"".join(number_field(1, dim) for dim in constant.shape)
    return dims + number_field(2, constant.kind) + bytes_field(8, name)


def _aside(offset: int, n_bytes: int) -> bytes:
    """Say where the elements of a constant lie."""
    place = {b"location": WEIGHTS_FILE.encode(), b"offset": b"%d" % offset, b"length": b"%d" % n_bytes}
    entries = [bytes_field(1, key) + bytes_field(2, value) for key, value in place.items()]
    return b"".join(bytes_field(13, entry) for entry in entries) + number_field(14, 1)


def _content(constant: Constant) -> Iterator[bytes | memoryview]:
    """Give the elements of a constant, decoded."""
    if constant.raised:
        for piece in _content(replace(constant, raised=False)):
            yield (np.frombuffer(piece, dtype=np.uint8) ^ 0x80).data
        return
    data = constant.data
    if isinstance(data, (bytes, memoryview)):
        codes: Array = constant.values()
        if not constant.turned:
            yield data
            return
    else:
        # Memory of its own, which goes back to the system at once: what malloc keeps would add to the runtime's peak.
        codes = np.frombuffer(mmap.mmap(-1, constant.n_bytes), dtype=np.int8)
        data.decode(codes)
    if not constant.turned:
        yield codes.data
        return
    rows = codes.reshape(constant.shape[::-1])
    step = max(1, _CHUNK // len(rows))
    for start in range(0, rows.shape[1], step):
        yield np.ascontiguousarray(rows[:, start : start + step].T).data
