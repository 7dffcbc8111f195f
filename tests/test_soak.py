"""A slice of the soak, with a fixed seed; and that a failure is reported so that it can be repeated."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from edgecomp.artifact import Exported
from edgecomp.exporters import to_onnx
from edgecomp.graph import Graph
from tests import soak, soak_fuzz, soak_graphs

SEED = 20261123


def test_damaged_files() -> None:
    done = soak.soak(SEED, ["fuzz"], seconds=60, most=2000)
    assert sum(done.values()) == 2000
    assert len(done) == 13, f"not every kind of file was damaged: {done}"


def test_random_networks() -> None:
    done = soak.soak(SEED, ["graphs"], seconds=60, most=60)
    assert done == {"network": 60}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc, for its sanitizers, is not here")
def test_random_networks_in_c() -> None:
    done = soak.soak(SEED, ["c"], seconds=300, most=12)
    assert sum(done.values()) == 12
    assert done["network in C, emulated too"] >= 1


def test_random_networks_cover_what_they_should() -> None:
    cases = [soak_graphs.random_case(soak.rng_of(SEED, "graphs", i)) for i in range(150)]
    ops = {node.op.value for case in cases for node in case.graph.nodes}
    assert ops == {
        "conv2d", "linear", "add", "concat", "max_pool", "avg_pool", "global_avg_pool", "clip", "flatten", "reshape",
        "softmax", "mul", "sigmoid", "hard_sigmoid", "silu", "hard_swish", "gather",
    }  # fmt: skip
    convs = [n.attrs for case in cases for n in case.graph.nodes if n.op == "conv2d"]
    assert any(a["groups"] != 1 for a in convs)
    assert any(a["dilation"] != (1, 1) for a in convs)
    assert any(len(set(a["pads"])) > 2 for a in convs)  # type: ignore[arg-type]
    layers = [layer for case in cases for layer in case.plan.layers.values()]
    assert {layer.weight_bits for layer in layers} == {2, 3, 4, 5, 6, 7, 8}
    assert any(not all(layer.keep) for layer in layers)
    assert {case.plan.io for case in cases} == {"float", "int8"}
    assert sum(soak_graphs.refused_by_tflite(case.graph) for case in cases) < len(cases) // 5


def test_a_case_is_a_function_of_seed_and_number() -> None:
    first, again, other = (soak_graphs.random_case(soak.rng_of(SEED, "graphs", i)) for i in (3, 3, 4))
    assert first.graph.digest() == again.graph.digest() != other.graph.digest()
    assert first.plan == again.plan
    data = bytes(range(256)) * 4
    damaged = [soak_fuzz.damage(soak.rng_of(SEED, "fuzz", i), data) for i in (3, 3, 4)]
    assert damaged[0] == damaged[1] != damaged[2]


def _one_code_off(graph: Graph) -> Exported:
    """Export with the last weight of the first layer off by a few steps: a defect of an exporter."""
    layers = graph.layers()
    if not layers:
        return to_onnx.to_onnx(graph)
    weight = graph.weight(layers[0])
    assert weight.data is not None
    data = weight.data.copy()
    limit = 1 if weight.quant is None else (1 << (weight.quant.bits - 1)) - 1
    data.reshape(-1)[-1] = -limit if data.reshape(-1)[-1] > 0 else limit
    changed = {**graph.tensors, weight.name: replace(weight, data=data)}
    return to_onnx.to_onnx(replace(graph, tensors=changed))


def test_a_wrong_weight_is_found_and_can_be_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = soak_graphs.export
    monkeypatch.setattr(soak_graphs, "export", lambda g, name: _one_code_off(g) if name == "onnx" else real(g, name))
    assert soak.main(["--minutes", "1", "--seed", str(SEED), "--only", "graphs"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == f"seed {SEED}"
    command = err.splitlines()[0].partition("again with: ")[2]
    assert command.startswith(f"python -m tests.soak --only graphs --seed {SEED} --case ")
    assert "onnxruntime" in err
    assert "input (1, " in err, "the network is not printed"
    assert soak.main(command.split()[3:]) == 1
    monkeypatch.undo()
    assert soak.main(command.split()[3:]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 cases in ")


def test_a_reader_that_raises_anything_else_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(soak_fuzz.bundle, "_MAX_HEADER_BYTES", 1 << 70)
    monkeypatch.setattr(soak_fuzz.bundle, "check_keys", lambda *args: None)
    monkeypatch.setattr(soak_fuzz.bundle, "EdgecompError", ())
    assert soak.main(["--minutes", "1", "--seed", str(SEED), "--only", "fuzz"]) == 1
    assert "--only fuzz" in capsys.readouterr().err




def test_cases_are_counted_instead_of_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--seed", str(SEED), "--only", "fuzz", "--cases", "30"]
    assert soak.main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("30 cases in ")
    assert soak.main([*command, "--minutes", "0"]) == 1
    assert capsys.readouterr().err == "the time was over before 30 cases of each kind: none\n"
