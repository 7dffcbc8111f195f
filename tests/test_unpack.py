"""Packed TFLite files: what is in them, that unpacking gives the int8 file, and that damage gives one error."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from edgecomp.artifact import AtRest
from edgecomp.benchmarks.runners import LiteRt
from edgecomp.cli import main
from edgecomp.coding import stored_bits
from edgecomp.errors import BundleError
from edgecomp.exporters.describe import describe, describe_tables
from edgecomp.exporters.unpack_tflite import OPERATOR, is_packed, unpack_tflite
from edgecomp.planner import grids_of
from edgecomp.runtime import CPP_HEADER, load, unpack
from tests import soak_fuzz
from tests.graphs import images
from tests.packed_files import NETWORKS, exported, quantized
from tests.test_to_tflite import RESOLVERS, litert_run

BITS = (2, 3, 4, 5, 6, 7, 8)
CUSTOM = schema.BuiltinOperator.CUSTOM


def parsed(data: bytes) -> Any:
    return schema.ModelT.InitFromPackedBuf(data, 0)


def plain(value: Any) -> Any:
    """Turn a schema object into what compares by content."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(part) for part in value]
    return {key: plain(part) for key, part in vars(value).items()} if hasattr(value, "__dict__") else value


def contents(data: bytes) -> dict[str, Any]:
    """All that a file says, with every tensor's bytes in the place of its buffer's number."""
    model = parsed(data)
    buffers = [b"" if b.data is None else bytes(b.data) for b in model.buffers]
    tensors = [plain(t) | {"buffer": buffers[t.buffer]} for g in model.subgraphs for t in g.tensors]
    graphs = [
        {key: plain(part) for key, part in vars(g).items() if key != "tensors"} for g in model.subgraphs
    ]
    others = {key: plain(part) for key, part in vars(model).items() if key not in ("subgraphs", "buffers")}
    return {"tensors": tensors, "graphs": graphs, **others}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NETWORKS)
def test_unpacked_it_is_the_int8_file(name: str, bits: int) -> None:
    packed, full = exported(name, bits, AtRest.PACKED), exported(name, bits, AtRest.INT8)
    data = unpack_tflite(packed.data, "model")
    assert contents(data) == contents(full.data)
    x = images(quantized(name, bits), 2)
    assert np.array_equal(litert_run(data, x, "xnnpack"), litert_run(full.data, x, "xnnpack"))
    # Once unpacked there is nothing to unpack.
    assert unpack_tflite(data, "model") == data
    assert not is_packed(data)
    aligned = schema.Model.GetRootAs(data, 0)
    for i in range(aligned.BuffersLength()):
        table = aligned.Buffers(i)._tab
        assert not table.Offset(4) or table.Vector(table.Offset(4)) % 16 == 0
    # No packed byte stays behind: what is more than in the int8 file is structure that nobody reads, and alignment.
    model = parsed(packed.data)
    n_packed = sum(len(t.name) + 180 for t in model.subgraphs[0].tensors if t.name.endswith(b".packed"))
    assert len(data) <= len(full.data) + n_packed + 12 * len(model.buffers)


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_what_is_packed_is_smaller_and_counted(bits: int) -> None:
    packed, full = exported("wide", bits, AtRest.PACKED), exported("wide", bits, AtRest.INT8)
    native = exported("wide", bits, AtRest.NATIVE)
    assert len(packed.data) < len(native.data)
    assert (packed.form, full.form, native.form) == ("tflite-packed", "tflite-int8", "tflite")
    model = parsed(packed.data)
    main_graph = model.subgraphs[0]
    buffers = [b"" if b.data is None else bytes(b.data) for b in model.buffers]
    stored = {t.name.decode(): len(buffers[t.buffer]) for t in main_graph.tensors}
    layers = {w.layer: w for w in packed.weights}
    for name in ("conv1", "conv2"):
        assert stored[f"{name}.weight"] == 0
        assert stored[f"{name}.weight.packed"] == layers[name].stored_bytes < 9 * 40 * 48 * bits / 8
        assert layers[name].stored_bits == layers[name].bits == bits
    # 96 codes: an operator would take more than they do.
    assert (stored["fc.weight"], layers["fc"].stored_bits, layers["fc"].stored_bytes) == (96, 8, 96)
    assert layers["conv2"].encoding == "words"
    codes = [model.operatorCodes[op.opcodeIndex] for op in main_graph.operators]
    assert [c.customCode for c in codes[:2]] == [OPERATOR.encode()] * 2
    assert all(c.builtinCode != CUSTOM for c in codes[2:])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_planner_counts_what_files_take(name: str, bits: int) -> None:
    graph, stored = quantized(name, bits), {w.layer: w for w in exported(name, bits, AtRest.PACKED).weights}
    for node in graph.layers():
        data = graph.weight(node).data
        assert data is not None
        counts = np.bincount(data.reshape(-1).astype(np.int64) + 128, minlength=256)
        counted, found = stored_bits("tflite-packed", node, bits, counts) / 8, stored[node.name].stored_bytes
        # A header of 12 or 24 bytes, fields of whole bytes, and an estimate where words are used.
        assert abs(found - counted) <= (14 if stored[node.name].encoding == "dense" else 24 + 0.05 * found), node.name
        assert stored_bits("tflite-int8", node, bits, counts) == 8 * data.size


def test_grids_for_packed_files_are_those_for_onnx() -> None:
    graph = NETWORKS["wide"]()
    node = graph.layers()[0]
    assert grids_of(graph, node, ["tflite-packed"]) == grids_of(graph, node, ["onnx"])
    assert grids_of(graph, node, ["onnx", "tflite-packed"]) == grids_of(graph, node, ["onnx"])
    assert {grid.bits for grid in grids_of(graph, node, ["onnx", "tflite"])} == {2, 3, 4, 8}


def test_a_stock_interpreter_refuses_and_names_the_operator() -> None:
    data, x = exported("wide", 3, AtRest.PACKED).data, images(quantized("wide", 3), 1)
    for resolver in RESOLVERS:
        with pytest.raises(RuntimeError, match=rf"unresolved custom op: {OPERATOR}"):
            litert_run(data, x, resolver)


@pytest.mark.parametrize("name", NETWORKS)
def test_native_int4_is_widened(name: str) -> None:
    native = exported(name, 4, AtRest.NATIVE).data
    data = unpack_tflite(native, "model")
    before, after = contents(native), contents(data)
    n_widened = 0
    for old, new in zip(before["tensors"], after["tensors"], strict=True):
        if old["type"] == schema.TensorType.INT4:
            n_widened += 1
            # As TFLite's own documents say it: two codes a byte, the first in the lower half, two's complement.
            codes = [((byte >> shift & 15) ^ 8) - 8 for byte in old["buffer"] for shift in (0, 4)]
            n = int(np.prod(old["shape"]))
            assert new["buffer"] == np.array(codes[:n], dtype=np.int8).tobytes()
            old = old | {"type": schema.TensorType.INT8, "buffer": new["buffer"]}
        assert old == new
    assert n_widened
    assert {**before, "tensors": 0} == {**after, "tensors": 0}
    x = images(quantized(name, 4), 2)
    assert np.array_equal(litert_run(data, x, "reference"), litert_run(native, x, "reference"))


def foreign(data: bytes) -> bytes:
    """The same model written by the code that flatbuffers generates: another order, buffers not at the end."""
    import flatbuffers

    model = parsed(data)
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


@pytest.mark.parametrize("at_rest", [AtRest.NATIVE, AtRest.PACKED])
def test_files_that_other_tools_wrote_again(at_rest: AtRest) -> None:
    ours, theirs = exported("wide", 3, at_rest).data, foreign(exported("wide", 3, at_rest).data)
    assert ours != theirs
    assert contents(unpack_tflite(theirs, "model")) == contents(unpack_tflite(ours, "model"))


def test_load_and_unpack(tmp_path: Path) -> None:
    packed = exported("wide", 3, AtRest.PACKED).data
    path = tmp_path / "model.tflite"
    path.write_bytes(packed)
    assert load(path) == load(str(path)) == unpack(packed) == unpack_tflite(packed, "")
    with pytest.raises(BundleError, match="cannot be read: No such file"):
        load(tmp_path / "missing.tflite")
    path.write_bytes(b"\x00\x07neither")
    with pytest.raises(BundleError, match=r"/model.tflite: is no TFLite file: bytes 4 to 8 "):
        load(path)
    size = len(unpack(packed))
    assert len(unpack(packed, most_bytes=size + 100)) == size
    with pytest.raises(BundleError, match=r"takes up to \d+ bytes when unpacked, 20000 are allowed"):
        unpack(packed, most_bytes=20_000)


# ---- the command, the runner, the description ------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "model.tflite", tmp_path / "new" / "full.tflite"
    source.write_bytes(exported("wide", 3, AtRest.PACKED).data)
    assert main(["unpack", str(source), "-o", str(target)]) == 0
    assert target.read_bytes() == load(source)
    out = capsys.readouterr().out
    assert f"{source.stat().st_size}" in out
    assert f"{target.stat().st_size}" in out
    assert main(["unpack", str(source), "-o", str(target)]) == 2
    assert "is there already; give --force" in capsys.readouterr().err
    before = source.read_bytes()
    assert main(["unpack", str(source), "-o", str(source), "--force"]) == 2
    assert "is the file to unpack" in capsys.readouterr().err
    assert source.read_bytes() == before
    assert main(["unpack", str(source), "-o", str(target), "--force"]) == 0
    damaged = tmp_path / "damaged.tflite"
    damaged.write_bytes(source.read_bytes()[:-700])
    capsys.readouterr()
    assert main(["unpack", str(damaged), "-o", str(tmp_path / "no.tflite")]) == 2
    assert capsys.readouterr().err.startswith(f"edgecomp: {damaged}: is damaged or cut off")
    assert not (tmp_path / "no.tflite").exists()
    for arguments in ([], [str(source)], ["--cpp-header", str(source)]):
        assert main(["unpack", *arguments]) == 2
    capsys.readouterr()
    assert main(["unpack", "--cpp-header"]) == 0
    assert "EDGECOMP_UNPACK_HPP" in Path(capsys.readouterr().out.strip()).read_text("utf-8")


def test_the_runner_unpacks_and_says_so(tmp_path: Path) -> None:
    packed, full = exported("wide", 3, AtRest.PACKED), exported("wide", 3, AtRest.INT8)
    path = tmp_path / "model.tflite"
    path.write_bytes(packed.data)
    x = images(quantized("wide", 3), 2)
    plain_runner = LiteRt(full.data)
    for model in (packed.data, path):
        runner = LiteRt(model)
        assert np.array_equal(runner.run(x), plain_runner.run(x))
        assert runner.describe() == plain_runner.describe() | {"unpacked_at_load": True}
    path.write_bytes(packed.data[:-1])
    with pytest.raises(BundleError, match=r"^model.tflite: "):
        LiteRt(path)


def test_description_tells_the_bytes_that_are_stored(tmp_path: Path) -> None:
    packed = exported("wide", 3, AtRest.PACKED)
    path = tmp_path / "model.tflite"
    path.write_bytes(packed.data)
    found = describe(path)
    layers = {w.layer: w for w in packed.weights}
    rows = {row["name"]: row for row in found["weights"]}  # type: ignore[attr-defined]
    assert rows.keys() == layers.keys()
    for name in ("conv1", "conv2"):
        row, layer = rows[name], layers[name]
        assert (row["bits"], row["stored_bytes"], row["encoding"]) == (3, layer.stored_bytes, layer.encoding)
    assert [rows[name]["shape"] for name in rows] == [[40, 3, 3, 8], [48, 3, 3, 40], [2, 48]]
    assert "encoding" not in rows["fc"]
    assert found["weight_bytes"] == sum(w.stored_bytes for w in packed.weights)
    assert found["operators"][f"CUSTOM {OPERATOR}"] == 2  # type: ignore[index]
    assert OPERATOR in describe_tables(found)


# ---- damage ----------------------------------------------------------------------------------------------------------


def bent(data: bytes, change: Any) -> bytes:
    """Change a file through the schema's own objects and write it again."""
    import flatbuffers

    model = parsed(data)
    change(model)
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _tensor(model: Any, name: str) -> Any:
    return next(t for t in model.subgraphs[0].tensors if t.name == name.encode())


def _set(thing: Any, **values: Any) -> None:
    for key, value in values.items():
        assert hasattr(thing, key)
        setattr(thing, key, value)


def _later(model: Any) -> None:
    model.operatorCodes[-1].customCode = b"edgecomp.Unpack.2"


def _turn(items: list[Any]) -> None:
    items.append(items.pop(0))


def _packed_stream(model: Any, at: int, value: int) -> None:
    data = model.buffers[_tensor(model, "conv1.weight.packed").buffer].data
    data = np.array(data, dtype=np.uint8)
    data[at] ^= value
    model.buffers[_tensor(model, "conv1.weight.packed").buffer].data = data


# what was done to the packed file -> what is said
BENT: dict[str, tuple[Any, str]] = {
    "later layout": (_later, "'edgecomp.Unpack.2' is of a later edgecomp, this one reads 'edgecomp.Unpack.1'"),
    "operators behind": (lambda m: _turn(m.subgraphs[0].operators), "not all operators edgecomp.Unpack.1 stand at the"),
    "code not last": (
        lambda m: m.operatorCodes.append(schema.OperatorCodeT()),
        "the code of edgecomp.Unpack.1 is not the last",
    ),
    "tensor behind": (lambda m: m.subgraphs[0].tensors.append(schema.TensorT()), "the packed tensors are not the last"),
    "two inputs": (lambda m: _set(m.subgraphs[0].operators[0], inputs=[0, 1]), "other inputs or outputs than one"),
    "no output": (lambda m: _set(m.subgraphs[0].operators[0], outputs=[]), "other inputs or outputs than one"),
    "absent input": (lambda m: _set(m.subgraphs[0].operators[0], inputs=[-1]), "other inputs or outputs than one"),
    "same input": (
        lambda m: _set(m.subgraphs[0].operators[0], inputs=m.subgraphs[0].operators[1].inputs),
        "has no bytes of its own",
    ),
    "other type": (lambda m: _set(_tensor(m, "conv1.weight"), type=0), "another type than uint8 and int8"),
    "other packed type": (lambda m: _set(_tensor(m, "conv1.weight.packed"), type=9), "another type than uint8"),
    "weight with bytes": (
        lambda m: _set(_tensor(m, "conv1.weight"), buffer=_tensor(m, "fc.weight").buffer),
        "has no bytes of its own, or its weight has some already",
    ),
    "shared bytes": (
        lambda m: _set(_tensor(m, "conv1.weight.packed"), buffer=_tensor(m, "conv2.weight.packed").buffer),
        "has no bytes of its own",
    ),
    "buffer that is none": (lambda m: _set(_tensor(m, "conv1.weight.packed"), buffer=9999), "is damaged or cut off"),
    "other shape": (lambda m: _set(_tensor(m, "conv1.weight"), shape=[41, 3, 3, 8]), "the tensor's shape has 2952"),
    "shape without end": (lambda m: _set(_tensor(m, "conv1.weight"), shape=[65536] * 9), "has 2230"),
    "negative shape": (lambda m: _set(_tensor(m, "conv1.weight"), shape=[-40, 3, 3, 8]), "has no legal shape"),
    "empty shape": (lambda m: _set(_tensor(m, "conv1.weight"), shape=[0, 3]), "has 0 codes"),
    "checksum": (lambda m: _packed_stream(m, 9, 1), "conv1.weight.*checksum"),
}


@pytest.mark.parametrize("case", BENT)
def test_bent_files(case: str) -> None:
    change, message = BENT[case]
    data = bent(exported("wide", 3, AtRest.PACKED).data, change)
    with pytest.raises(BundleError, match=message) as caught:
        unpack_tflite(data, "a.tflite")
    assert "\n" not in str(caught.value)


BENT_INT4: dict[str, tuple[Any, str]] = {
    "bytes missing": (lambda m: _set(_tensor(m, "conv1.weight"), shape=[40, 3, 3, 9]), "expected two codes in each"),
    "sparse": (
        lambda m: _set(_tensor(m, "conv1.weight"), sparsity=schema.SparsityParametersT()),
        "expected two codes in each",
    ),
    "read as something else": (
        lambda m: _set(_tensor(m, "conv1.bias"), buffer=_tensor(m, "conv1.weight").buffer),
        "is used for something else, too",
    ),
    "read in another shape": (
        lambda m: _set(_tensor(m, "conv2.weight"), buffer=_tensor(m, "conv1.weight").buffer, shape=[5, 575]),
        "expected two codes|different shape",
    ),
}


@pytest.mark.parametrize("case", BENT_INT4)
def test_bent_int4_files(case: str) -> None:
    change, message = BENT_INT4[case]
    with pytest.raises(BundleError, match=message):
        unpack_tflite(bent(exported("wide", 4, AtRest.NATIVE).data, change), "a.tflite")


def test_int4_weights_that_are_one() -> None:
    def share(model: Any) -> None:
        _set(_tensor(model, "fc.weight"), buffer=_tensor(model, "conv1.weight").buffer, shape=[2, 1440])

    data = unpack_tflite(bent(exported("wide", 4, AtRest.NATIVE).data, share), "a.tflite")
    tensors = {t["name"]: t for t in contents(data)["tensors"]}
    assert tensors[b"fc.weight"]["buffer"] == tensors[b"conv1.weight"]["buffer"]
    assert len(tensors[b"fc.weight"]["buffer"]) == 2880
    assert tensors[b"fc.weight"]["type"] == schema.TensorType.INT8


def damaged_files(n: int) -> list[bytes]:
    rng = np.random.default_rng(20261124)
    sources = [exported(name, bits, at_rest).data
               for name, bits in (("wide", 2), ("wide", 5), ("residual", 3))
               for at_rest in (AtRest.NATIVE, AtRest.PACKED)]  # fmt: skip
    found = [*sources, b"", b"TFL3", *(foreign(data) for data in sources)]
    while len(found) < n:
        found.append(soak_fuzz.damage(rng, sources[int(rng.integers(len(sources)))]))
    return found


def result(data: bytes) -> bytes | None:
    try:
        return unpack_tflite(data, "a.tflite")
    except BundleError as e:
        message = str(e)
    assert message.startswith("a.tflite: ")
    assert "\n" not in message
    return None


def test_damage_gives_one_error_and_never_other_weights() -> None:
    """A file that passes in spite of damage has the weights it had: the checksum sees to it."""
    good = exported("wide", 2, AtRest.PACKED).data
    whole = contents(unpack_tflite(good, "model"))
    codes = {t["name"]: t["buffer"] for t in whole["tensors"] if t["name"] in (b"conv1.weight", b"conv2.weight")}
    rng = np.random.default_rng(7)
    n_refused = 0
    structure = good.find(b"conv1.weight")
    for _ in range(400):
        at = int(rng.integers(structure, len(good)))
        data = good[:at] + bytes([good[at] ^ (1 << int(rng.integers(8)))]) + good[at + 1 :]
        unpacked = result(data)
        n_refused += unpacked is None
        if unpacked is not None and unpacked != data:
            assert all(code in unpacked for code in codes.values())
        elif unpacked is not None:
            assert OPERATOR.encode() not in data
    assert n_refused > 200


# ---- in C++ ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the header with warnings as errors, and with sanitizers that end the process at the first fault."""
    program = tmp_path_factory.mktemp("cpp") / "unpack"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-O1", "-g"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    source = Path(__file__).with_name("unpack_main.cpp")
    command = ["g++", *flags, *sanitizers, f"-I{CPP_HEADER.parent}", str(source), "-o", str(program)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return program


def test_cpp_gives_the_same_bytes(cpp: Path, tmp_path: Path) -> None:
    files = [*damaged_files(1200), *(exported(n, b, AtRest.PACKED).data for n in NETWORKS for b in BITS)]
    paths = [tmp_path / str(i) for i in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    ran = subprocess.run([cpp, *paths], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    n_good = 0
    for path, data in zip(paths, files, strict=True):
        expected, out, error = result(data), path.with_suffix(".out"), path.with_suffix(".error")
        assert out.exists() != error.exists()
        if expected is None:
            assert error.exists(), f"{path.name}: C++ takes what Python refuses"
            assert error.read_text("utf-8")
        else:
            n_good += 1
            assert out.exists(), f"{path.name}: C++ says {error.read_text('utf-8')!r}, Python takes it"
            assert out.read_bytes() == expected
    assert 200 < n_good < len(files) - 200


def test_cpp_header_stands_alone(tmp_path: Path) -> None:
    """Included twice, in two files of one program, without exceptions."""
    (tmp_path / "a.cpp").write_text('#include "edgecomp_unpack.hpp"\n#include "edgecomp_unpack.hpp"\n')
    (tmp_path / "b.cpp").write_text('#include "edgecomp_unpack.hpp"\nint main() { return !edgecomp::kMostBytes; }\n')
    command = ["g++", "-std=c++17", "-fno-exceptions", "-Wall", "-Wextra", "-Werror", f"-I{CPP_HEADER.parent}"]
    command += [str(tmp_path / "a.cpp"), str(tmp_path / "b.cpp"), "-o", str(tmp_path / "both")]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert subprocess.run([tmp_path / "both"], check=False).returncode == 0
