"""Packed ONNX files made plain: the int8 file to the byte, sessions that compute the same, damage, memory."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from edgecomp.artifact import AtRest
from edgecomp.benchmarks.memory import footprint
from edgecomp.benchmarks.onnx_runtime import OnnxRuntimeLean
from edgecomp.cli import main
from edgecomp.coding import dense, encode
from edgecomp.compress import compress
from edgecomp.errors import BundleError, UsageError
from edgecomp.exporters import onnx_parts, to_onnx
from edgecomp.exporters.unpack_onnx import MODEL_FILE, WEIGHTS_FILE, plain_onnx, plain_parts
from edgecomp.graph import Graph, Op
from edgecomp.plan import Io
from edgecomp.runtime import load, onnx_session, unpack
from tests.graphs import Build, images, plan_for
from tests.onnx_run import onnx_run
from tests.packed_files import NETWORKS, in_words, quantized
from tests.test_coding import DRAWN, gaussian, network, ternary, with_codes
from tests.test_to_onnx import NAMES, renamed


def packed(graph: Graph) -> bytes:
    return to_onnx.to_onnx(graph).data


def int8(graph: Graph) -> bytes:
    return to_onnx.to_onnx(graph, at_rest=AtRest.INT8).data


@pytest.mark.parametrize("io", Io)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", NETWORKS)
def test_unpacked_it_is_the_int8_file(name: str, bits: int, io: Io) -> None:
    graph = quantized(name, bits, io)
    source, full = packed(graph), int8(graph)
    assert source != full
    assert plain_onnx(source, name) == unpack(source) == full
    assert unpack(full) == full


@pytest.mark.parametrize("case", DRAWN)
def test_unpacked_words_are_the_int8_file(case: str) -> None:
    bits, draw = DRAWN[case]
    graph = with_codes(network(bits), draw)
    source = packed(graph)
    assert b"edgecomp" in source[20:]  # the functions
    assert unpack(source) == int8(graph)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    bits=st.integers(2, 8),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 1 << 30),
)
def test_any_shape_width_and_frequency(inputs: int, outputs: int, bits: int, zeros: float, seed: int) -> None:
    rng = np.random.default_rng(seed)

    def draw(n: int) -> np.ndarray:
        half = 1 << (bits - 1)
        codes = rng.integers(-half, half, n) * (rng.random(n) >= zeros)
        return codes.astype(np.int8)

    b = Build(seed % 100, (inputs, 1, 1))
    x = b.node(Op.FLATTEN, "flatten", (b.conv("conv", "input", outputs, (1, 1), pads=(0, 0, 0, 0)),), {})
    graph = b.graph(b.linear("fc", x, inputs))
    graph = with_codes(compress(graph, plan_for(graph, bits)), draw)
    for source in (packed(graph), in_words(graph)):
        assert unpack(source) == int8(graph)


@pytest.mark.parametrize("case", NAMES)
def test_names_like_those_that_the_exporter_makes_up(case: str) -> None:
    graph = renamed(NETWORKS["plain"](), NAMES[case])
    graph = compress(graph, plan_for(graph, 3))
    x = {graph.inputs[0]: images(graph, 3)}
    full = unpack(packed(graph))
    assert full == int8(graph)
    assert same(onnx_run(full, x), onnx_run(packed(graph), x))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_equal_layers_share_what_is_computed_of_them() -> None:
    """Two layers with the same scales: the exporter stores their biases' scales once, and so does the reader."""
    b = Build(4, (30,))
    first, second = b.linear("fc1", "input", 20), b.linear("fc2", "input", 20)
    b.tensors["fc2.weight"] = replace(b.tensors["fc1.weight"], name="fc2.weight")
    graph = b.graph(b.node(Op.ADD, "sum", (first, second), {}))
    graph = compress(graph, plan_for(graph, 3))
    assert unpack(packed(graph)) == int8(graph)


def test_a_result_that_is_called_like_a_temporary_keeps_its_name() -> None:
    graph = quantized("plain", 3)
    n_nodes = len(onnx.load_from_string(packed(graph)).graph.node)
    for number in (n_nodes - 2, n_nodes - 1):
        other = renamed(graph, {graph.outputs[0]: f"%{number}"})
        data = unpack(packed(other))
        assert [value.name for value in onnx.load_from_string(data).graph.output] == [f"%{number}"]
        assert onnxruntime.InferenceSession(data, options()).get_outputs()[0].name == f"%{number}"


def test_files_of_other_tools_stay_as_they_are() -> None:
    proto = onnx.load_from_string(packed(quantized("plain", 3)))
    proto.producer_name = "another"
    assert unpack(proto.SerializeToString()) == proto.SerializeToString()


def test_shapes_and_texts_for_people_do_no_harm() -> None:
    """A file of ours that went through ONNX's shape inference, and was given a documentation."""
    data = packed(quantized("plain", 3))
    proto = onnx.shape_inference.infer_shapes(onnx.load_from_string(data))
    assert proto.graph.value_info
    proto.graph.doc_string = "about"
    assert unpack(proto.SerializeToString()) == unpack(data)


# ---- sessions --------------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A file to write, and a folder for what is temporary."""
    (tmp_path / "temporary").mkdir()
    return tmp_path / "model.onnx", tmp_path / "temporary"


def options() -> onnxruntime.SessionOptions:
    found = onnxruntime.SessionOptions()
    found.intra_op_num_threads = found.inter_op_num_threads = 1
    return found


@pytest.mark.parametrize("io", Io)
@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_session_computes_the_same(name: str, bits: int, io: Io, places: tuple[Path, Path]) -> None:
    graph = quantized(name, bits, io)
    path, folder = places
    x = images(graph, 5)
    if io is Io.INT8:
        x = np.clip(np.rint(40 * x), -128, 127).astype(np.int8)
    for data in (packed(graph), in_words(graph), int8(graph)):
        path.write_bytes(data)
        session = onnx_session(path, options=options(), folder=folder)
        names = [output.name for output in session.get_outputs()]
        got = dict(zip(names, session.run(names, {graph.inputs[0]: x}), strict=True))
        assert same(got, onnx_run(data, {graph.inputs[0]: x}, anywhere=False))
        assert session.get_modelmeta().producer_name == "edgecomp"
        assert list(folder.iterdir()) == []


def test_what_onnxruntime_is_given(places: tuple[Path, Path]) -> None:
    """Weights aside, in pages of their own; linear layers (I, O), as ONNX's own reader sees them."""
    b = Build(1, (8, 12, 12))
    x = b.node(Op.FLATTEN, "flatten", (b.conv("conv", "input", 64),), {})
    graph = b.graph(b.linear("fc", x, 20))
    graph = compress(graph, plan_for(graph, 4))
    _, folder = places
    path = plain_parts(memoryview(packed(graph)), "model", folder)
    assert path == folder / MODEL_FILE
    assert {p.name for p in folder.iterdir()} == {MODEL_FILE, WEIGHTS_FILE}
    onnx.checker.check_model(path, full_check=True)
    proto = onnx.load(path, load_external_data=False)
    aside = {t.name: {e.key: e.value for e in t.external_data} for t in proto.graph.initializer if t.external_data}
    assert aside.keys() == {"conv.weight", "fc.weight"}
    assert all(entry["location"] == WEIGHTS_FILE and int(entry["offset"]) % 4096 == 0 for entry in aside.values())
    proto = onnx.load(path)
    stored = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    assert np.array_equal(stored["conv.weight"], graph.tensors["conv.weight"].data)
    assert np.array_equal(stored["fc.weight"], graph.tensors["fc.weight"].data.T)
    (gemm,) = [node for node in proto.graph.node if node.op_type == "Gemm"]
    (read,) = [node for node in proto.graph.node if node.output[0] == gemm.input[1]]
    assert [a.name for node in (gemm, read) for a in node.attribute] == []  # transB 0, axis 1


def test_the_file_of_another_tool_goes_to_onnxruntime_as_it_is(places: tuple[Path, Path]) -> None:
    path, folder = places
    graph = quantized("plain", 3)
    proto = onnx.load_from_string(packed(graph))
    proto.producer_name = "another"
    path.write_bytes(proto.SerializeToString())
    x = {graph.inputs[0]: images(graph, 2)}
    (got,) = onnx_session(path, options=options(), folder=folder).run(None, x)
    assert np.array_equal(got, *onnx_run(packed(graph), x).values())
    damaged = path.with_name("damaged.onnx")
    damaged.write_bytes(path.read_bytes().replace(b"QuantizeLinear", b"QuantizeLineaR"))
    with pytest.raises(BundleError, match=r"damaged.onnx: onnxruntime cannot load it: .* is an invalid model"):
        onnx_session(damaged, folder=folder)
    assert list(folder.iterdir()) == []


def test_sessions_that_cannot_be_made(places: tuple[Path, Path]) -> None:
    path, folder = places
    with pytest.raises(BundleError, match=r"model.onnx': cannot be read: No such file"):
        onnx_session(path, folder=folder)
    path.write_bytes(b"")
    with pytest.raises(BundleError, match="cannot be read: cannot mmap an empty file"):
        onnx_session(path, folder=folder)
    path.write_bytes(b"TFL3")
    with pytest.raises(BundleError, match="is no ONNX file: its first byte is not 8"):
        onnx_session(str(path), folder=folder)
    data = packed(quantized("plain", 3))
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"takes up to \d+ bytes when unpacked, 1000 are allowed"):
        onnx_session(path, folder=folder, most_bytes=1000)
    with pytest.raises(UsageError, match=r"/no: does not take the weights while they are loaded \(No such file"):
        onnx_session(path, folder=folder / "no")
    path.write_bytes(data[:-100])
    with pytest.raises(BundleError, match=r"model.onnx: is damaged or no ONNX file: "):
        onnx_session(path, folder=folder)
    with pytest.raises(BundleError, match=r"cannot be read: Is a directory"):
        onnx_session(folder, folder=folder)
    assert list(folder.iterdir()) == []


def test_a_disk_that_is_full(places: tuple[Path, Path]) -> None:
    """No file may have more than 8 kB in this process: as if the disk were full, to the system's own error."""
    path, folder = places
    path.write_bytes(packed(quantized("wide", 4)))
    code = f"""
    import resource
    from edgecomp.errors import UsageError
    from edgecomp.runtime import onnx_session
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    try:
        onnx_session({str(path)!r}, folder={str(folder)!r})
    except UsageError as error:
        print(error)
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    reason = os.strerror(errno.EFBIG)
    assert ran.stdout == (
        f"{folder}: does not take the weights while they are loaded ({reason}); give onnx_session another folder=\n"
    )
    assert list(folder.iterdir()) == []


def test_memory(tmp_path: Path) -> None:
    """Linear layers of 4 M codes: less than the runtime takes of the int8 file, and a fraction of the packed one."""
    b = Build(0, (2048,))
    graph = b.graph(b.linear("fc2", b.linear("fc1", "input", 2048), 2048))
    graph = with_codes(compress(graph, plan_for(graph, 3)), lambda n: gaussian(n, 1.0, 3, n))
    codes = {graph.weight(node).name: dense(graph.weight(node).data, 3) for node in graph.layers()}
    path, full = tmp_path / "model.onnx", tmp_path / "full.onnx"
    path.write_bytes(to_onnx._written(graph, codes, folds=True).data)
    full.write_bytes(unpack(path.read_bytes()))
    taken = {
        case: footprint(file, runtime, processes=1).model_bytes
        for case, file, runtime in (
            ("lean", path, "onnxruntime-lean"),
            ("packed", path, "onnxruntime"),
            ("int8", full, "onnxruntime"),
        )
    }
    assert taken["lean"] < 2.5 * 2 * 2048 * 2048
    assert taken["lean"] < taken["int8"] < 0.5 * taken["packed"]


def test_the_runner(tmp_path: Path) -> None:
    graph = quantized("wide", 3)
    path = tmp_path / "model.onnx"
    path.write_bytes(packed(graph))
    x = images(graph, 3)
    (want,) = onnx_run(path.read_bytes(), {graph.inputs[0]: x}).values()
    for model in (path, path.read_bytes()):
        runner = OnnxRuntimeLean(model)
        assert np.array_equal(runner.run(x), want)
        assert runner.describe()["loaded_by"] == "edgecomp.runtime.onnx_session"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "model.onnx", tmp_path / "new" / "full.onnx"
    graph = quantized("wide", 3)
    source.write_bytes(packed(graph))
    assert main(["unpack", str(source), "-o", str(target)]) == 0
    assert target.read_bytes() == load(source) == int8(graph)
    assert f"{target.stat().st_size}" in capsys.readouterr().out
    source.write_bytes(source.read_bytes()[:-700])
    assert main(["unpack", str(source), "-o", str(tmp_path / "no.onnx")]) == 2
    assert capsys.readouterr().err.startswith(f"edgecomp: {source}: is damaged or no ONNX file: ")
    assert not (tmp_path / "no.onnx").exists()


# ---- damage ----------------------------------------------------------------------------------------------------------


def small(form: str) -> tuple[Graph, bytes]:
    b = Build(3, (60,))
    graph = b.graph(b.linear("fc", "input", 100))
    bits, draw = {"dense": (5, lambda n: gaussian(n, 0.2, 15)), "words": (2, lambda n: ternary(n, 0.8))}[form]
    graph = with_codes(compress(graph, plan_for(graph, bits)), draw)
    codes = {name: (encode if form == "words" else dense)(graph.tensors[name].data, bits) for name in ("fc.weight",)}
    assert codes["fc.weight"].kind == form
    return graph, to_onnx._written(graph, codes, folds=True).data


def damaged(data: bytes, n: int) -> Iterator[bytes]:
    rng = np.random.default_rng(5)
    for at in rng.integers(0, len(data), n).tolist():
        yield data[:at]
        yield data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
        yield data[:at] + data[at + 1 :]


@pytest.mark.parametrize("form", ["dense", "words"])
def test_damage_gives_one_error_or_what_a_runtime_makes_of_it(form: str) -> None:
    """Nothing is taken for a packing that is none: what can be unpacked computes what stock onnxruntime computes."""
    graph, good = small(form)
    x = {graph.inputs[0]: images(graph, 4)}
    n_same = n_refused = 0
    for data in damaged(good, 250):
        plain, message = b"", ""
        try:
            plain = plain_onnx(data, "model")
        except BundleError as e:
            message = str(e)
        if not plain:
            assert message.startswith("model: ")
            assert "\n" not in message
            n_refused += 1
            continue
        try:
            want = onnx_run(data, x)
        except Exception:  # onnxruntime refuses it; it refuses the plain one, or the damage is gone with the packing
            continue
        got = onnx_run(plain, x)
        assert got.keys() == want.keys()
        assert all(np.array_equal(got[name], want[name], equal_nan=True) for name in want)
        n_same += 1
    assert n_refused > 100
    assert n_same > 10


def edited(form: str, edit: Callable[[onnx.ModelProto], None]) -> bytes:
    proto = onnx.load_from_string(small(form)[1])
    edit(proto)
    return proto.SerializeToString()


def node(proto: onnx.ModelProto, op: str, number: int = 0) -> onnx.NodeProto:
    return [n for n in proto.graph.node if n.op_type == op][number]


def constant(name_of: Callable[[onnx.ModelProto], str], values: np.ndarray) -> Callable[[onnx.ModelProto], None]:
    """Put another constant in the place of one."""

    def edit(proto: onnx.ModelProto) -> None:
        old, new = name_of(proto), f"other{len(proto.graph.initializer)}"
        proto.graph.initializer.append(numpy_helper.from_array(values, new))
        for n in proto.graph.node:
            for i, name in enumerate(n.input):
                if name == old:
                    n.input[i] = new

    return edit


def u8(value: object) -> np.ndarray:
    return np.array(value, dtype=np.uint8)


def grow(proto: onnx.ModelProto) -> None:
    proto.graph.node.extend([node(proto, "Reshape")] * 3)


BENT: dict[str, tuple[str, Callable[[onnx.ModelProto], None], str]] = {
    "mask": ("dense", constant(lambda p: node(p, "BitwiseAnd").input[1], u8(7)), "is not 15"),
    "shifts": ("dense", constant(lambda p: node(p, "BitShift").input[1], u8([[0], [3]])), r"is not \[\[0\], \[4\]\]"),
    "sign": ("dense", constant(lambda p: node(p, "Where").input[1], u8(192)), "is not 224"),
    "sign bit": ("dense", constant(lambda p: node(p, "BitwiseAnd", -1).input[1], u8(8)), r"is not 240|is not that of"),
    "shift of a field": ("dense", constant(lambda p: node(p, "BitShift", -1).input[1], u8(3)), "is not 4"),
    "direction": (
        "dense",
        lambda p: node(p, "BitShift").attribute[0].CopyFrom(onnx.helper.make_attribute("direction", "LEFT")),
        "is shifted 'LEFT', expected RIGHT",
    ),
    "type": ("dense", lambda p: node(p, "Cast", -1).attribute[0].CopyFrom(onnx.helper.make_attribute("to", 2)), "sign"),
    "length": (
        "dense",
        constant(lambda p: node(p, "BitShift").input[0], u8(np.zeros((1, 2999)))),
        r"has the shape \[1, 2999\], expected 6000 numbers of 4 bits",
    ),
    "shape": (
        "dense",
        constant(lambda p: node(p, "Reshape", -1).input[1], np.array([1 << 40, 1 << 40])),
        "a weight has the shape",
    ),
    "another decoder": (
        "dense",
        lambda p: setattr(node(p, "Where"), "op_type", "Add"),
        "is not what a Where gives; the packing is of another edgecomp",
    ),
    "two of a name": ("dense", grow, "two nodes or constants give"),
    "no source": ("dense", lambda p: p.graph.node.remove(node(p, "Where")), "is not what a Where gives"),
    "later functions": (
        "words",
        lambda p: setattr(p.opset_import[1], "version", 2),
        "functions are of version 2, this edgecomp reads version 1",
    ),
    "another function": ("words", lambda p: setattr(node(p, "t"), "op_type", "u"), "is not what a t gives"),
    "another book": ("words", lambda p: setattr(node(p, "b5"), "op_type", "b1"), "is not 2"),
    "longer words": (
        "words",
        lambda p: (
            constant(lambda q: node(q, "b5").input[4], np.array(8, dtype=np.int32))(p),
            setattr(node(p, "b5"), "op_type", "b3"),
        )[0],
        "symbols, the function b3 spells fewer",
    ),
    "size": (
        "words",
        constant(lambda p: node(p, "t").input[5], np.array(1 << 13, dtype=np.int32)),
        "are of another edgecomp, or damaged",
    ),
    "number of symbols": ("words", constant(lambda p: node(p, "t").input[6], np.array([5999])), r"is not \[6000\]"),
    "words for more": (
        "words",
        lambda p: (
            constant(lambda q: node(q, "t").input[6], np.array([1 << 30]))(p),
            p.graph.initializer.append(numpy_helper.from_array(np.array([1 << 15, 1 << 15]), "huge")),
            node(p, "Reshape", -1).input.__setitem__(1, "huge"),
        )[0],
        "are too few for the shape",
    ),
    "a number of no word": (
        "words",
        lambda p: setattr(p.graph.initializer[4], "raw_data", b"\xff" * 494),
        "decode: the words do not give the 6000 symbols expected",
    ),
    "sparse": ("dense", lambda p: p.graph.sparse_initializer.add(), "field 15, which edgecomp does not write"),
    "a loop": ("dense", lambda p: node(p, "Gemm").attribute.append(
        onnx.helper.make_attribute("body", onnx.helper.make_graph([], "g", [], []))), "a node holds a graph"),
    "elements elsewhere": (
        "dense",
        lambda p: p.graph.initializer[0].external_data.add(key="location", value="/etc/passwd"),
        "has a field 13, which edgecomp does not write",
    ),
    "constant twice": ("dense", lambda p: p.graph.initializer.append(p.graph.initializer[0]), "two constants are"),
    "nothing gives it": ("dense", lambda p: p.graph.output[0].__setattr__("name", "no"), "nothing gives one of 'no'"),
    "elements for another shape": (
        "dense",
        lambda p: p.graph.initializer[0].dims.append(2),
        r"has 4 bytes, its shape \[2\] takes 8",
    ),
    "made of nothing": ("dense", lambda p: node(p, "Gemm").input.__setitem__(0, "no"), "is made of what nothing gives"),
    "another way to unpack": (
        "dense",
        lambda p: setattr(node(p, "Reshape", -1), "op_type", "Expand"),
        "is unpacked in a way that this edgecomp does not know",
    ),
    "two graphs": ("dense", lambda p: p.ClearField("graph"), "it holds no network"),
    "zeros that are none": (
        "dense",
        lambda p: node(p, "ConstantOfShape").attribute[0].t.int32_data.__setitem__(0, 1),
        "is not made of zeros",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BENT)
def test_bent_files(case: str) -> None:
    form, edit, message = BENT[case]
    data = edited(form, edit)
    with pytest.raises(BundleError, match=message):
        plain_onnx(data, "model")


def test_parts_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = small("dense")[1]
    monkeypatch.setattr(onnx_parts, "MOST_PARTS", 10)
    with pytest.raises(BundleError, match="has more than 10 nodes and constants"):
        plain_onnx(data, "model")


def test_a_small_file_that_asks_for_much_takes_no_memory() -> None:
    """A thousand weights decoded from one field: refused by their sum, before any is decoded."""

    def edit(proto: onnx.ModelProto) -> None:
        for i in range(1000):
            copy = proto.graph.node.add()
            copy.CopyFrom(node(proto, "Reshape", -1))
            copy.output[0] = f"w{i}"

    data = edited("dense", edit)
    with pytest.raises(BundleError, match=r"takes up to \d+ bytes when unpacked, 500000 are allowed"):
        plain_onnx(data, "model", most_bytes=500_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(plain_onnx(data, "model")) < 10_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
