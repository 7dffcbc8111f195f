"""Graph files: golden bytes, exact round trips, and refusal of everything that is not what a writer wrote."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecomp import bundle
from edgecomp.bundle import from_bytes, to_bytes
from edgecomp.compress import compress
from edgecomp.errors import BundleError, GraphError
from edgecomp.graph import Graph, Node, Op, Tensor
from tests.graphs import GRAPHS, Build, plain, plan_for

CANONICAL = b"""edgecomp graph 1
inputs ('input',)
outputs ('fc',)
node 'fc' linear ('input', 'fc.weight', 'fc.bias') ('fc',) {}
tensor 'fc' (1, 1) - -
tensor 'fc.bias' (1,) float32 -
tensor 'fc.weight' (1, 2) float32 -
tensor 'input' (1, 2) - -
fc.bias\0\x00\x00\x00\x3ffc.weight\0\x00\x00\x80\x3f\x00\x00\x00\xc0"""
"""What the digest of `linear()` is taken of, written by hand: a changed byte here makes every plan on disk stale."""
DIGEST = hashlib.sha256(CANONICAL).hexdigest()


def linear() -> Graph:
    """One node: y = [1, -2] x + 0.5."""
    tensors = {
        "input": Tensor(name="input", shape=(1, 2)),
        "fc": Tensor(name="fc", shape=(1, 1)),
        "fc.weight": Tensor(name="fc.weight", shape=(1, 2), data=np.array([[1, -2]], dtype=np.float32)),
        "fc.bias": Tensor(name="fc.bias", shape=(1,), data=np.array([0.5], dtype=np.float32)),
    }
    node = Node(name="fc", op=Op.LINEAR, inputs=("input", "fc.weight", "fc.bias"), outputs=("fc",))
    return Graph(name="tiny", nodes=(node,), tensors=tensors, inputs=("input",), outputs=("fc",))


GOLDEN_HEADER = (
    '{"schema":"edgecomp-graph/1","digest":"' + DIGEST + '","name":"tiny","inputs":["input"],"outputs":["fc"],'
    '"nodes":[{"name":"fc","op":"linear","inputs":["input","fc.weight","fc.bias"],"outputs":["fc"],"attrs":{}}],'
    '"weights":{"fc.bias":[1],"fc.weight":[1,2]},"activations":{"fc":[1,1],"input":[1,2]}}'
).encode()
GOLDEN = (
    struct.pack("<Q", len(GOLDEN_HEADER))
    + GOLDEN_HEADER
    + bytes.fromhex("0000003f")  # fc.bias: 0.5
    + bytes.fromhex("0000803f 000000c0")  # fc.weight: 1, -2
)


def header_of(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    found: dict[str, Any] = json.loads(data[8 : 8 + length])
    return found


def with_header(data: bytes, header: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def changed(edit: Callable[[dict[str, Any]], object], data: bytes = GOLDEN) -> bytes:
    header = header_of(data)
    edit(header)
    return with_header(data, json.dumps(header, separators=(",", ":")).encode())


def test_golden_bytes() -> None:
    assert to_bytes(linear()) == GOLDEN
    graph = from_bytes(GOLDEN)
    assert graph.name == "tiny"
    assert [(n.name, n.op, n.inputs, n.outputs, dict(n.attrs)) for n in graph.nodes] == [
        ("fc", Op.LINEAR, ("input", "fc.weight", "fc.bias"), ("fc",), {})
    ]
    weight, bias = graph.tensors["fc.weight"], graph.tensors["fc.bias"]
    assert weight.data is not None
    assert bias.data is not None
    assert weight.data.dtype == np.float32
    assert weight.data.tolist() == [[1.0, -2.0]]
    assert bias.data.tolist() == [0.5]
    assert {name: t.shape for name, t in graph.tensors.items() if t.data is None} == {"fc": (1, 1), "input": (1, 2)}


@pytest.mark.parametrize("name", GRAPHS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    graph = GRAPHS[name]()
    bundle.save(graph, tmp_path / "g")
    again = bundle.load(tmp_path / "g")
    assert again.digest() == graph.digest()
    assert again.name == graph.name
    assert again.nodes == graph.nodes
    assert again.tensors.keys() == graph.tensors.keys()
    for key, tensor in graph.tensors.items():
        other = again.tensors[key]
        assert other.shape == tensor.shape
        if tensor.data is not None:
            assert other.data is not None
            assert np.array_equal(other.data, tensor.data)
            assert not other.data.flags.writeable
    assert to_bytes(again) == to_bytes(graph)


def test_the_order_of_tensors_does_not_matter() -> None:
    graph = plain()
    turned = replace(graph, tensors=dict(reversed(graph.tensors.items())))
    assert to_bytes(turned) == to_bytes(graph)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, math.inf), (-math.inf, 6.0), (-math.inf, math.inf), (-1.0, 1.0), (0.1, 1e-45)]
)
def test_open_and_odd_limits_of_clips(low: float, high: float) -> None:
    b = Build(0, (2, 3, 3))
    graph = b.graph(b.clip("clip", "input", min(low, high), max(low, high)))
    attrs = from_bytes(to_bytes(graph)).nodes[0].attrs
    assert attrs == {"low": min(low, high), "high": max(low, high)}
    assert all(isinstance(value, float) for value in attrs.values())


def test_whole_numbers_as_limits_keep_their_meaning() -> None:
    b = Build(0, (2, 3, 3))
    graph = b.graph(b.clip("clip", "input", 0, 6))
    again = from_bytes(to_bytes(graph))
    assert again.digest() == graph.digest()
    assert again.nodes[0].attrs == {"low": 0, "high": 6}


def test_special_floats_and_names_survive() -> None:
    values = np.array([[-0.0, 1e-45, 3.4028235e38, 1 / 3]], dtype=np.float32)
    name = 'ä"\\\n\0\u2028層'
    tensors = {
        "x": Tensor(name="x", shape=(1, 4)),
        name: Tensor(name=name, shape=(1, 1)),
        f"{name}.weight": Tensor(name=f"{name}.weight", shape=(1, 4), data=values),
    }
    node = Node(name=name, op=Op.LINEAR, inputs=("x", f"{name}.weight"), outputs=(name,))
    graph = Graph(name="", nodes=(node,), tensors=tensors, inputs=("x",), outputs=(name,))
    data = from_bytes(to_bytes(graph)).tensors[f"{name}.weight"].data
    assert data is not None
    assert data.tobytes() == values.tobytes()


def test_only_float_graphs_are_written() -> None:
    graph = plain()
    with pytest.raises(GraphError, match="float"):
        to_bytes(compress(graph, plan_for(graph)))


def test_every_cut_is_noticed() -> None:
    assert all(_refused(GOLDEN[:length]) for length in range(len(GOLDEN)))


def test_every_flipped_bit_is_noticed() -> None:
    """But for bits that change nothing a reader gets: the model's name is for people."""
    name = range(GOLDEN.index(b"tiny"), GOLDEN.index(b"tiny") + 4)
    for position in range(len(GOLDEN)):
        for bit in range(8):
            damaged = bytearray(GOLDEN)
            damaged[position] ^= 1 << bit
            assert position in name or _refused(bytes(damaged)), f"byte {position}, bit {bit}"


def _refused(data: bytes) -> bool:
    with pytest.raises(BundleError) as caught:
        from_bytes(data, "graph.edgecomp")
    message = str(caught.value)
    return message.startswith("graph.edgecomp") and "\n" not in message


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "length of nothing": (struct.pack("<Q", 0) + GOLDEN[8:], "cut off"),
    "huge length": (struct.pack("<Q", 1 << 63) + GOLDEN[8:], "cut off"),
    "length beyond the end": (struct.pack("<Q", len(GOLDEN)) + GOLDEN[8:], "cut off"),
    "bytes behind the end": (GOLDEN + b"\0", "1 bytes stand behind"),
    "not UTF-8": (with_header(GOLDEN, b"\xff" + GOLDEN_HEADER[1:]), "decode"),
    "not JSON": (with_header(GOLDEN, b"{" + GOLDEN_HEADER), "not JSON"),
    "a list": (with_header(GOLDEN, b"[1,2]"), "expected an object"),
    "deep": (with_header(GOLDEN, b"[" * 100_000), "not JSON"),
    "duplicate key": (with_header(GOLDEN, b'{"name":"tiny",' + GOLDEN_HEADER[1:]), "'name' stands twice"),
    "duplicate weight": (
        with_header(GOLDEN, GOLDEN_HEADER.replace(b'"fc.bias":[1],', b'"fc.bias":[1],"fc.bias":[1],')),
        "'fc.bias' stands twice",
    ),
    "newer version": (changed(lambda h: h.update(schema="edgecomp-graph/2")), "edgecomp-graph/2.*reads"),
    "no schema": (changed(lambda h: h.pop("schema")), "schema is None"),
    "unknown key": (changed(lambda h: h.update(extra=1)), "unknown key 'extra'"),
    "missing key": (changed(lambda h: h.pop("name")), "'name' is missing"),
    "unknown key in a node": (changed(lambda h: h["nodes"][0].update(color="red")), "unknown key 'color'"),
    "another digest": (changed(lambda h: h.update(digest="0" * 64)), "digest differ"),
    "weights out of order": (
        changed(lambda h: h.update(weights=dict(reversed(h["weights"].items())))),
        "order of their names",
    ),
    "a weight too large": (changed(lambda h: h["weights"].update({"fc.bias": [3]})), "cut off within weight"),
    "a weight too small": (changed(lambda h: h["weights"].update({"fc.weight": [1, 1]})), "behind the last weight"),
    "a huge weight": (changed(lambda h: h["weights"].update({"fc.bias": [2**30] * 6})), "larger than any tensor"),
    "a negative size": (changed(lambda h: h["weights"].update({"fc.bias": [-1]})), "no legal shape"),
    "a size of no number": (changed(lambda h: h["weights"].update({"fc.bias": [True]})), "no legal shape"),
    "a fraction as size": (changed(lambda h: h["activations"].update(fc=[1.0, 1])), "no legal shape"),
    "seven dimensions": (changed(lambda h: h["activations"].update(fc=[1] * 7)), "no legal shape"),
    "weight and activation": (changed(lambda h: h["activations"].update({"fc.bias": [1]})), "both weight and"),
    "another shape": (changed(lambda h: h["activations"].update(fc=[1, 9])), "gives shape"),
    "unknown operator": (changed(lambda h: h["nodes"][0].update(op="rm -rf")), "unknown operator"),
    "an operator of quantized graphs": (changed(lambda h: h["nodes"][0].update(op="quantize")), "damaged"),
    "an operator that is a list": (changed(lambda h: h["nodes"][0].update(op=["linear"])), "unknown operator"),
    "a node that is a number": (changed(lambda h: h.update(nodes=[7])), "damaged"),
    "nodes that are a number": (changed(lambda h: h.update(nodes=7)), "damaged"),
    "a node twice": (changed(lambda h: h["nodes"].append(h["nodes"][0])), "stands twice"),
    "inputs that are a string": (changed(lambda h: h.update(inputs="input")), "list of names"),
    "an input of no name": (changed(lambda h: h.update(inputs=[None])), "expected a name"),
    "an unknown input": (changed(lambda h: h.update(inputs=["nowhere"])), "not a tensor"),
    "attributes of nobody": (changed(lambda h: h["nodes"][0].update(attrs={"stride": [1, 1]})), "attributes"),
    "attributes that are a list": (changed(lambda h: h["nodes"][0].update(attrs=[1])), "damaged"),
    "a name of half a surrogate": (changed(lambda h: h.update(name="\ud800")), "surrogates"),
    "NaN": (with_header(GOLDEN, GOLDEN_HEADER.replace(b'"tiny"', b"NaN")), "NaN is not a number"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(case: str) -> None:
    data, reason = HOSTILE[case]
    with pytest.raises(BundleError, match=rf"^some/graph: .*{reason}"):
        from_bytes(data, "some/graph")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"stride":[1,1]', '"stride":[0,0]'),
        ('"stride":[1,1]', '"stride":[]'),
        ('"stride":[1,1]', '"stride":1'),
        ('"stride":[1,1]', '"stride":[1,"1"]'),
        ('"stride":[1,1]', '"stride":[1,true]'),
        ('"stride":[1,1]', '"stride":[1.5,1]'),
        ('"stride":[1,1]', '"stride":[1e400,1]'),
        ('"stride":[1,1]', '"stride":[4294967296,1]'),
        ('"groups":1', '"groups":0'),
        ('"groups":1', '"groups":[1]'),
        ('"groups":1', '"groups":null'),
        ('"low":0.0', '"low":"0"'),
        ('"low":0.0', '"low":false'),
        ('"low":0.0', '"low":[0]'),
    ],
)
def test_hostile_attributes(old: str, new: str) -> None:
    data = to_bytes(plain())
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].decode()
    assert old in header
    with pytest.raises(BundleError):
        from_bytes(with_header(data, header.replace(old, new, 1).encode()))


def test_weights_that_are_no_numbers_are_refused() -> None:
    at = len(GOLDEN) - 4
    with pytest.raises(BundleError, match="NaN"):
        from_bytes(GOLDEN[:at] + struct.pack("<f", math.nan))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="none: cannot be read: No such file"):
        bundle.load(tmp_path / "none")
    with pytest.raises(BundleError, match="cannot be read: Is a directory"):
        bundle.load(tmp_path)
