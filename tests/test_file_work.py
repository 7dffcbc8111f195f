"""What a file's layers ask for, counted from the file alone, is what the graph it was made from says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from edgecomp.cli import main
from edgecomp.compress import compress, fuse_clips
from edgecomp.errors import BundleError
from edgecomp.exporters import export
from edgecomp.exporters.onnx_work import onnx_work
from edgecomp.exporters.tflite_work import OPERATORS, tflite_work
from edgecomp.exporters.unpack_onnx import plain_onnx
from edgecomp.exporters.unpack_tflite import unpack_tflite
from edgecomp.graph import Graph, Op
from edgecomp.plan import ActRange, Io
from edgecomp.work import Kind, Work, work_of
from tests.built import write_folder
from tests.graphs import Build, dense, multiplied, plan_for
from tests.packed_files import NETWORKS, in_words, quantized

GRAPHS: Mapping[str, Callable[[], Graph]] = {**NETWORKS, "multiplied": multiplied, "dense": dense}
LITE = ("tflite", "tflite-int8", "tflite-packed")
MICRO = ("tflm", "tflm-int8")


@cache
def compressed(name: str, bits: int, io: Io) -> Graph:
    graph = GRAPHS[name]()
    return compress(graph, plan_for(graph, bits, io=io))


def check_tflite(found: tuple[Work, ...], graph: Graph, *, named: bool = True) -> None:
    """Compare with the graph; an operator without weights has the name of what it writes, if any."""
    expected = work_of(graph)
    assert [replace(w, name="") for w in found] == [replace(w, name="") for w in expected]
    nodes = {node.name: node for node in graph.nodes}
    for here, there in zip(found, expected, strict=True):
        weighted = there.kind is not Kind.OTHER
        if weighted or named:
            assert here.name in (there.name, *(() if weighted else nodes[there.name].outputs))


@pytest.mark.parametrize("io", list(Io))
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_file_asks_for_what_its_graph_does(name: str, bits: int, io: Io) -> None:
    graph = compressed(name, bits, io)
    for form in ("onnx", "onnx-int8"):
        assert onnx_work(export(graph, form).data, form) == work_of(graph), form
    for form in (*LITE, *MICRO):
        check_tflite(tflite_work(export(graph, form).data, form), graph, named=form in LITE)


@pytest.mark.parametrize("name", GRAPHS)
def test_float_files(name: str) -> None:
    graph = GRAPHS[name]()
    assert onnx_work(export(graph, "onnx").data, "onnx") == work_of(graph)
    check_tflite(tflite_work(export(graph, "tflite").data, "tflite"), fuse_clips(graph))


def test_cut_channels_are_not_counted() -> None:
    graph = GRAPHS["residual"]()
    cut = compress(graph, plan_for(graph, 4, drop={"block.conv1": (0, 3, 4), "stem": (1,)}))
    assert onnx_work(export(cut, "onnx").data, "onnx") == work_of(cut)
    check_tflite(tflite_work(export(cut, "tflite").data, "tflite"), cut)
    assert work_of(cut) != work_of(compress(graph, plan_for(graph, 4)))


def test_weights_in_words_and_files_made_plain() -> None:
    graph = quantized("wide", 2)
    words = in_words(graph)
    assert onnx_work(words, "words") == onnx_work(plain_onnx(words, "words"), "plain") == work_of(graph)
    for form in LITE:
        check_tflite(tflite_work(unpack_tflite(export(graph, form).data, form), form), graph)


def test_functions_on_reals_between_codes() -> None:
    """Where the range of a function leaves no gate in codes, other operators stand in both files."""
    graph = GRAPHS["gated"]()
    plan = plan_for(graph, 8)
    swishes = [n.outputs[0] for n in graph.nodes if n.op in (Op.SILU, Op.HARD_SWISH)]
    narrow = {name: ActRange(low=-0.3, high=0.2) for name in swishes}
    detours = compress(graph, replace(plan, ranges={**plan.ranges, **narrow}))
    assert [b".real" in export(g, "tflite").data for g in (compress(graph, plan), detours)] == [False, True]
    assert onnx_work(export(detours, "onnx").data, "onnx") == work_of(detours)
    check_tflite(tflite_work(export(detours, "tflite").data, "tflite"), detours)


def strided(seed: int = 0) -> Graph:
    """3x3 convolutions that Winograd's algorithm is for, and such of other strides that it is not for."""
    b = Build(seed, (16, 8, 8))
    x = b.conv("two", b.conv("one", "input", 16), 16, stride=(2, 2))
    x = b.conv("grouped", b.conv("wide", x, 32, stride=(1, 2)), 32, groups=2)
    return b.graph(b.conv("last", x, 16))


def test_strides_decide_the_kind() -> None:
    graph = compress(strided(), plan_for(strided(), 8))
    assert {w.name: w.kind.value for w in work_of(graph)} == {
        "one": "dense3x3", "two": "dense", "wide": "dense", "grouped": "dense3x3", "last": "dense3x3",
    }  # fmt: skip
    assert onnx_work(export(graph, "onnx").data, "onnx") == work_of(graph)
    check_tflite(tflite_work(export(graph, "tflite").data, "tflite"), graph)


def own_products() -> Graph:
    """A product with a sigmoid that is the network's own, not a silu; limits that no activation of TFLite has."""
    b = Build(0, (3, 8, 8))
    x = b.clip("limited", b.conv("stem", "input", 8), -0.5, 1.5)
    x = b.mul("own", x, b.function(Op.SIGMOID, "side", x))
    x = b.clip("sum.limited", b.node(Op.ADD, "sum", (x, x), {}), -0.25, 2.0)
    x = b.function(Op.HARD_SIGMOID, "last", b.function(Op.HARD_SIGMOID, "first", x))
    parts = tuple(b.conv(f"part{i}", x, 2) for i in range(23))
    x = b.node(Op.CONCAT, "cat", parts, {"axis": 1})
    x = b.node(Op.RESHAPE, "turned", (x,), {"shape": (1, 8, 23 * 16)})
    return b.graph(b.node(Op.FLATTEN, "flatten", (x,), {}), "own")


def test_what_only_looks_like_one_operator() -> None:
    graph = own_products()
    for network in (graph, compress(graph, plan_for(graph, 4))):
        fused = fuse_clips(graph) if network is graph else network
        assert onnx_work(export(network, "onnx").data, "onnx") == work_of(network)
        check_tflite(tflite_work(export(network, "tflite").data, "tflite"), fused)


def test_more_tensors_than_micro_joins_at_once() -> None:
    b = Build(0, (3, 8, 8))
    parts = tuple(b.conv(f"part{i}", "input", 2) for i in range(23))
    graph = b.graph(b.node(Op.CONCAT, "cat", parts, {"axis": 1}))
    graph = compress(graph, plan_for(graph, 4))
    for form in MICRO:
        check_tflite(tflite_work(export(graph, form).data, form), graph, named=False)


def test_operators_have_the_numbers_of_the_schema() -> None:
    from ai_edge_litert import schema_py_generated as schema

    assert {number: getattr(schema.BuiltinOperator, name) for number, name in OPERATORS.items()} == {
        number: number for number in OPERATORS
    }


# ---- files of others, and damaged ones -------------------------------------------------------------------------------


def test_files_of_others_are_refused() -> None:
    graph = compressed("plain", 8, Io.FLOAT)
    for form, read in (("onnx", onnx_work), ("tflite", tflite_work)):
        foreign = export(graph, form).data.replace(b"edgecomp", b"pytorch_")
        with pytest.raises(BundleError, match=f"^net.{form}: edgecomp did not write it; expected"):
            read(foreign, f"net.{form}")


def test_what_could_be_anything_is_named() -> None:
    graph = compressed("plain", 8, Io.FLOAT)
    with pytest.raises(BundleError, match="given by 'Xonv', which edgecomp does not write"):
        onnx_work(export(graph, "onnx-int8").data.replace(b"Conv", b"Xonv"), "x")
    later = export(compressed("plain", 4, Io.FLOAT), "tflite-packed").data.replace(b"Unpack.1", b"Unpack.2")
    with pytest.raises(BundleError, match=r"an operator 'edgecomp\.Unpack\.2', which this edgecomp does not write"):
        tflite_work(later, "x")
    with pytest.raises(BundleError, match="not printable"):
        onnx_work(export(graph, "onnx").data.replace(b"conv1", b"con\x1b1"), "x")
    with pytest.raises(BundleError, match="not printable"):
        tflite_work(export(graph, "tflite").data.replace(b"conv1", b"con\x1b1"), "x")


def test_weights_that_do_not_fit_are_named() -> None:
    import onnx

    graph = compressed("plain", 8, Io.FLOAT)
    for op, attribute, value, found in (("Conv", "group", 3, "does not fit"), ("Conv", "strides", 0, "its window")):
        proto = onnx.load_from_string(export(graph, "onnx").data)
        node = next(n for n in proto.graph.node if n.op_type == op)
        (changed,) = (a for a in node.attribute if a.name == attribute)
        changed.i, changed.ints[:] = value, [value] * len(changed.ints)
        with pytest.raises(BundleError, match=found):
            onnx_work(proto.SerializeToString(), "x")
    proto = onnx.load_from_string(export(graph, "onnx").data)
    next(n for n in proto.graph.node if n.op_type == "Conv").ClearField("name")
    with pytest.raises(BundleError, match="is given by a Conv without a name"):
        onnx_work(proto.SerializeToString(), "x")


@pytest.mark.parametrize("form", ["onnx", "onnx-int8", "tflite", "tflite-packed", "tflm"])
def test_damage_is_one_line(form: str) -> None:
    data, rng = export(compressed("residual", 4, Io.FLOAT), form).data, np.random.default_rng(0)
    refused: list[str] = []
    read = onnx_work if form.startswith("onnx") else tflite_work
    damaged = [data[:n] for n in range(0, len(data), max(1, len(data) // 60))]
    for _ in range(400):
        changed = np.frombuffer(data, dtype=np.uint8).copy()
        changed[rng.integers(0, changed.size, 3)] = rng.integers(0, 256, 3)
        damaged.append(changed.tobytes())
    for each in damaged:
        try:
            read(each, "net")
        except BundleError as e:
            refused.append(str(e))
    assert len(refused) > 60
    assert [line for line in refused if not line.startswith("net: ") or not line.isprintable()] == []


# ---- the command line ------------------------------------------------------------------------------------------------


def test_a_lone_file_is_estimated_as_its_folder_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "out")

    def estimated(path: Path, *options: str) -> dict[str, object]:
        assert main(["estimate", str(path), "--target", "rpi4", "--json", *options]) == 0
        value = json.loads(capsys.readouterr().out)
        del value["model"]
        value["layers"] = [{**layer, "name": ""} for layer in value["layers"]]
        return dict(value)

    (tmp_path / "away").mkdir()
    for name, runtime in (("model.onnx", "onnxruntime"), ("model.tflite", "litert")):
        lone = tmp_path / "away" / f"net-{name}"
        lone.write_bytes((tmp_path / "out" / name).read_bytes())
        found = estimated(lone)
        assert found == estimated(tmp_path / "out" / name)
        assert found["runtime"] == runtime
        assert found["source"] == "estimated"
