"""`inspect` names what onnxruntime leaves in float, and does not need onnxruntime."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest

from edgecomp.inspecting import inspect
from edgecomp.plan import Io
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
