"""What a network needs of a board's memories: counted by hand, beside real interpreters, and as `estimate` says it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgecomp import bundle
from edgecomp.benchmarks.tflm import TfliteMicro
from edgecomp.cli import main
from edgecomp.compress import compress
from edgecomp.exporters import export
from edgecomp.exporters.to_c import program_of
from edgecomp.footprint import activation_bytes, layer_activation_bytes
from edgecomp.plan import Io
from edgecomp.work import work_of
from tests.built import write_folder
from tests.graphs import GRAPHS, gated, plain, plan_for, residual
from tests.micro import NEEDS_MICRO

WEIGHTS = 8 * 27 + 12 * 72 + 20 * 48 + 10 * 20
"""Of `plain`, by hand; its first convolution reads 3x8x8 and writes 8x8x8, more than any other needs."""
AT_ONCE = 192 + 512


def test_activations_counted_by_hand() -> None:
    """The shortcut reads the stem's 8x8x8 and writes 4x4x12 while the block's 4x4x12 wait to be added to."""
    assert activation_bytes(residual(), 1) == 512 + 192 + 192
    assert activation_bytes(residual(), 4) == 4 * activation_bytes(residual(), 1)
    assert layer_activation_bytes(work_of(residual()), 2) == 2 * (192 + 512)  # the stem: from 8x8x3
    # The expanded 8x8x12 become others twice, and what is to be added, 8x8x8, stays.
    assert activation_bytes(gated(), 1) == 2 * 768 + 512


@NEEDS_MICRO
@pytest.mark.parametrize("name", GRAPHS)
def test_interpreters_need_what_is_counted_and_little_more(name: str) -> None:
    """TFLite Micro's own count, with its kernels' scratch; of our C the arena, which a sum does not enlarge."""
    quantized = compress(GRAPHS[name](), plan_for(GRAPHS[name](), io=Io.INT8))
    counted = activation_bytes(quantized, 1)
    taken = TfliteMicro(export(quantized, "tflm-int8").data).describe()["arena_head_bytes"]
    assert 0.6 * taken < counted <= taken
    if name in ("plain", "separable"):  # where operators have no scratch
        assert counted == taken
    if name != "separable":  # whose softmax is not C's
        assert layer_activation_bytes(work_of(quantized), 1) <= program_of(quantized).arena.n_bytes


def memory(
    path: Path, capsys: pytest.CaptureFixture[str], *more: str, **facts: object
) -> tuple[dict[str, object], str]:
    """What is said of a board of some flash and RAM, to machines and to people."""
    board = path.parent / "small.toml"
    facts = {"cpu": '"Cortex-M4"', "clock_hz": 10**8, **facts}
    board.write_text("".join(f"{name} = {value}\n" for name, value in facts.items()))
    argv = ["estimate", str(path), "--target", str(board), *more]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["memory"]
    assert main(argv) == 0
    return found, capsys.readouterr().out.splitlines()[1]


@pytest.mark.parametrize(("precision", "size"), [("int8", 1), ("fp32", 4)])
def test_what_a_microcontroller_has_no_room_for_is_said(
    precision: str, size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph, asked = tmp_path / "graph.edgecomp", ("--precision", precision)
    bundle.save(plain(), graph)
    flash, ram = size * WEIGHTS, size * AT_ONCE
    found, line = memory(graph, capsys, *asked, flash_bytes=flash, ram_bytes=ram)
    assert (found["weight_bytes"], found["activation_bytes"], found["fits"]) == (flash, ram, True)
    assert (found["flash_bytes"], found["ram_bytes"]) == (flash, ram)
    assert line.startswith(f"- memory, estimated: flash {flash:,} of {flash:,} bytes (weights); RAM {ram:,} of {ram:,}")
    found, line = memory(graph, capsys, *asked, flash_bytes=flash - 1, ram_bytes=ram)
    assert found["fits"] is False
    assert line.startswith(f"- does not fit the board, estimated: flash {flash:,} of {flash - 1:,} bytes (weights): ")
    assert line.count("too much") == 1
    found, line = memory(graph, capsys, *asked, flash_bytes=flash, ram_bytes=ram - 1)
    assert found["fits"] is False
    assert f"; RAM {ram:,} of {ram - 1:,} bytes (activations): too much; code" in line
    # Nothing is said of a memory that the file of the board does not name, nor of a plan that is not ours to make.
    found, line = memory(graph, capsys, *asked)
    assert (found["fits"], found["flash_bytes"], "memory" in line) == (None, None, False)
    found, line = memory(graph, capsys, *asked, "--runtime", "x-cube-ai", flash_bytes=flash, ram_bytes=1)
    assert (found["fits"], found["activation_bytes"], "RAM" in line) == (True, None, False)


def test_without_flash_weights_are_in_ram_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "out")
    needed = WEIGHTS + AT_ONCE  # a byte each in RAM, however few bits the files have
    for path in (tmp_path / "out", tmp_path / "out" / "model.onnx"):
        for room in (needed, needed - 1):
            found, line = memory(path, capsys, cpu='"Cortex-A7"', clock_hz=10**9, flash_bytes=1, ram_bytes=room)
            assert found["fits"] is (room == needed)
            assert f"RAM {needed:,} of {room:,} bytes (weights, activations)" in line


def test_files_that_lie_in_flash_are_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, graph = write_folder(tmp_path / "out"), plain()
    quantized = compress(graph, plan_for(graph, 4))
    for form in ("tflite", "tflite-packed", "onnx"):
        name = f"alone-{form}.{form.partition('-')[0]}"
        (tmp_path / name).write_bytes(export(quantized, form).data)
    stored = (out / "model.tflite").stat().st_size
    alone = tmp_path / "alone-tflite.tflite"
    for path, expected in ((out, stored), (out / "model.tflite", stored), (alone, alone.stat().st_size)):
        found, line = memory(path, capsys, flash_bytes=expected - 1, ram_bytes=10**6)
        assert (found["weight_bytes"], found["fits"]) == (expected, False)
        assert f"flash {expected:,} of {expected - 1:,} bytes ({found['file']}): too much" in line
        assert found["file"] in ("model.tflite", "alone-tflite.tflite")
    # What is widened first, or is no file of that runtime's, does not lie there as it is.
    packed, onnx = tmp_path / "alone-tflite-packed.tflite", tmp_path / "alone-onnx.onnx"
    cases = [(packed, ()), (onnx, ()), (alone, ("--precision", "fp32")), (out, ("--runtime", "c"))]
    for path, more in cases:
        found, _ = memory(path, capsys, *more, flash_bytes=10**6)
        assert (found["weight_bytes"], found["file"]) == (WEIGHTS * (4 if "fp32" in more else 1), "")


def test_a_network_in_c_says_what_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_folder(tmp_path / "out") / "manifest.json"
    record = json.loads(path.read_text())
    any_ = record["artifacts"][0]
    source = {**any_, "format": "c", "path": "network.c", "flash_bytes": 1234, "arena_bytes": 567}
    micro = {**any_, "format": "tflm", "path": "model.tflm.tflite", "bytes": 2345, "arena_head_bytes": 890}
    record["artifacts"] += [source, micro]
    record["files"] |= dict.fromkeys(("network.c", "model.tflm.tflite"), "0" * 64)
    path.write_text(json.dumps(record))
    for runtime, expected in (("c", (1234, 567)), ("tflite-micro", (2345, 890))):
        found, _ = memory(tmp_path / "out", capsys, "--runtime", runtime, flash_bytes=2000, ram_bytes=600)
        assert (found["weight_bytes"], found["activation_bytes"]) == expected
        assert found["fits"] is (runtime == "c")
