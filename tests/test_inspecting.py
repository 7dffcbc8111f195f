"""`inspect` names what onnxruntime leaves in float, and does not need onnxruntime."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import onnx
import pytest

from edgecomp.artifact import AtRest
from edgecomp.cli import main
from edgecomp.compress import compress
from edgecomp.errors import BundleError
from edgecomp.exporters.to_c import to_c
from edgecomp.exporters.to_tflite import to_tflite, to_tflm
from edgecomp.graph import Op
from edgecomp.inspecting import inspect
from edgecomp.plan import Io
from tests.graphs import GRAPHS, Build, plan_for
from tests.test_to_onnx import file_of


def written(folder: Path, data: bytes) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(data)
    return path


def test_an_operator_that_is_not_wrapped_in_integers_is_named(tmp_path: Path) -> None:
    proto = onnx.load_from_string(file_of("plain", 4, Io.FLOAT))
    assert inspect(written(tmp_path, proto.SerializeToString()), execution=True)["float_operators"] == {}
    # The same network with its answers' signs turned, on real numbers.
    last = proto.graph.output[0].name
    for node in proto.graph.node:
        node.output[:] = ["before" if name == last else name for name in node.output]
    proto.graph.node.append(onnx.helper.make_node("Neg", ["before"], [last]))
    found = inspect(written(tmp_path, proto.SerializeToString()), execution=True)
    assert found["float_operators"] == {"Neg": [last]}
    assert str(found["execution"]).endswith("operators in float: 1")


def test_without_onnxruntime_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, file_of("plain", 4, Io.FLOAT))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = inspect(path, execution=True)
    assert "onnxruntime" in str(found["execution"])
    assert "float_operators" not in found
    assert found["weights"]


def test_a_file_is_run_on_request_only(tmp_path: Path) -> None:
    assert "execution" not in inspect(written(tmp_path, file_of("plain", 4, Io.FLOAT)))


def test_xnnpacks_partition_of_a_tflite_file(tmp_path: Path) -> None:
    """Operators it takes whole; a GATHER of codes in the middle, which it leaves, parts the network in two."""
    b = Build(0, (3, 8, 8))
    whole = b.conv("conv", "input", 6)
    b2 = Build(0, (3, 8, 8))
    parted = b2.conv("last", b2.node(Op.GATHER, "pick", (b2.conv("conv", "input", 6),), {"indices": (0, 2, 1)}), 4)
    found = {}
    for name, graph in (("whole", b.graph(whole)), ("parted", b2.graph(parted))):
        quantized = compress(graph, plan_for(graph, 8, io=Io.INT8))
        for at_rest in (AtRest.NATIVE, AtRest.PACKED):
            path = tmp_path / f"{name}-{at_rest}.tflite"
            path.write_bytes(to_tflite(quantized, at_rest=at_rest).data)
            found[name, at_rest] = inspect(path, execution=True)
            assert "execution" not in inspect(path)
    version = metadata.version("ai-edge-litert")
    for at_rest in (AtRest.NATIVE, AtRest.PACKED):
        taken = f"litert {version}: XNNPACK takes 1 of 1 operators, in 1 partition"
        assert found["whole", at_rest]["execution"] == taken
        assert found["whole", at_rest]["left_operators"] == {}
        taken = f"litert {version}: XNNPACK takes 2 of 3 operators, in 2 partitions"
        assert found["parted", at_rest]["execution"] == taken
        assert found["parted", at_rest]["left_operators"] == {"GATHER": 1}


def test_a_tflite_file_for_tflite_micro_is_not_run_in_litert(tmp_path: Path) -> None:
    graph = Build(0, (64,))
    graph = graph.graph(graph.linear("fc", "input", 64))
    path = tmp_path / "model.tflite"
    path.write_bytes(to_tflm(compress(graph, plan_for(graph, 2))).data)
    found = inspect(path, execution=True)
    assert str(found["execution"]).startswith("unknown: model.tflite: litert cannot load it: ")
    assert "left_operators" not in found


def test_a_network_in_c(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = GRAPHS["plain"]()
    quantized = compress(graph, plan_for(graph, 3))
    exported, path = to_c(quantized), tmp_path / "network.c"
    path.write_bytes(exported.data)
    found = inspect(path)
    assert (found["kind"], found["model"], found["graph_digest"]) == ("network in C", "plain", quantized.digest())
    assert found["weights"] == [{"name": w.layer, "stored_bytes": w.stored_bytes} for w in exported.weights]
    assert found["constant_bytes"] == exported.flash_bytes
    ((given,), (got,)) = found["inputs"], found["outputs"]
    assert (given["dtype"], given["shape"], got["shape"]) == ("int8", [8, 8, 3], [10])
    assert main(["inspect", str(path)]) == 0
    assert "network in C" in capsys.readouterr().out
    text = exported.data.decode()
    for part in ("/* edgecomp-network {}", text[:60], text.replace('"macs":', '"maks":', 1)):
        path.write_text(part)
        with pytest.raises(BundleError, match="is no network in C by edgecomp, or damaged"):
            inspect(path)
