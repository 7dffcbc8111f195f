"""Networks in C on emulated cores: outputs, counts and sizes beside what the ELF file and the reference say."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

from edgecomp import options, reference
from edgecomp.benchmarks import cross_compile, qemu_arm
from edgecomp.benchmarks.cross_compile import COMPILERS, CORES, core_of, link
from edgecomp.benchmarks.firmware import emulate, emulator_name, measure_firmware
from edgecomp.benchmarks.qemu_arm import run_in_qemu
from edgecomp.benchmarks.runners import default_runtime
from edgecomp.benchmarks.thumb import CLASSES
from edgecomp.cli import main
from edgecomp.compress import border_codes, compress
from edgecomp.errors import ParityError, TargetError
from edgecomp.exporters import export, files_of
from edgecomp.exporters.c_facts import read_facts
from edgecomp.exporters.to_c import program_of
from edgecomp.graph import Array, Graph
from edgecomp.targets import load, names
from tests.c_program import with_least_scratch
from tests.graphs import GRAPHS, images, plan_for
from tests.tiny import Place

M4 = CORES["Cortex-M4"]


@cache
def network(name: str) -> Graph:
    graph = GRAPHS[name]()
    return compress(graph, plan_for(graph, {n.name: (4, 8, 3)[i % 3] for i, n in enumerate(graph.layers())}))


@cache
def codes(name: str, n: int) -> tuple[Array, Array]:
    graph = network(name)
    first, last = border_codes(graph)
    values = reference.run(graph, {graph.inputs[0]: images(graph, n)})
    x, y = (v.transpose(0, 2, 3, 1) if v.ndim == 4 else v for v in (values[first], values[last]))
    return x, y


def files(name: str) -> Mapping[str, bytes]:
    return files_of(export(network(name), "c"))


@pytest.fixture
def no_gcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler that a user without arm-none-eabi-gcc has."""
    monkeypatch.setattr(cross_compile.shutil, "which", lambda name: None)


QEMU_ALONE = "Cortex-M55"


@pytest.mark.usefixtures("no_gcc")
@pytest.mark.parametrize("cpu", [cpu for cpu in CORES if cpu != QEMU_ALONE])
@pytest.mark.parametrize("name", ["residual", "separable", "gated"])
def test_every_core_gives_the_references_bytes(name: str, cpu: str, tmp_path: Path) -> None:
    x, y = codes(name, 2)
    report = measure_firmware(files(name), "a core", cpu, x, y, tmp_path)
    assert report.compiler.startswith("zig cc 0.")
    assert (report.n_images, report.static_bytes) == (2, 0)
    # Calls and returns apart, everything happens in the kernels.
    assert 0.9 * report.instructions < sum(report.steps.values()) < report.instructions
    assert sum(report.classes[name] for name in CLASSES) == report.instructions
    assert 0 < report.classes["multiply"] < report.classes["other"] + report.classes["load"]
    assert 0 < report.stack_bytes < 4096
    assert report.to_json()["source"] == "emulated"
    assert not [key for key in report.to_json() if "latency" in key or key.endswith("_ms")]


@pytest.mark.skipif(shutil.which("qemu-system-arm") is None, reason="qemu-system-arm is not installed")
@pytest.mark.parametrize("compiler", [name for name, find in COMPILERS.items() if name != "clang" and find(M4)])
def test_a_core_that_only_qemu_has(compiler: str, tmp_path: Path) -> None:
    x, y = codes("residual", 2)
    report = measure_firmware(files("residual"), "a core", QEMU_ALONE, x, y, tmp_path, compiler=compiler)
    assert report.emulator.startswith("qemu-system-arm ")
    (tmp_path / "m33").mkdir()
    near = measure_firmware(files("residual"), "a core", "Cortex-M33", x, y, tmp_path / "m33", compiler=compiler)
    assert near.qemu_instructions is not None
    # Loops without overhead and Helium are few here; the same C is not far off.
    assert report.instructions == pytest.approx(near.qemu_instructions, rel=0.2)
    assert report.stack_bytes == pytest.approx(near.stack_bytes, abs=400)
    assert (report.steps, report.qemu) == ({}, None)
    assert "| layer" not in report.table()
    wrong = y.copy()
    wrong[1, 0] ^= 1
    (tmp_path / "wrong").mkdir()
    with pytest.raises(ParityError, match=r"image 1 does not give the reference's output in qemu"):
        measure_firmware(files("residual"), "a", QEMU_ALONE, x, wrong, tmp_path / "wrong", compiler=compiler)


def test_a_core_that_only_qemu_has_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_compile.shutil, "which", lambda name: None)
    x, y = codes("residual", 1)
    with pytest.raises(TargetError, match="apt install qemu-system-arm"):
        measure_firmware(files("residual"), "a core", QEMU_ALONE, x, y, tmp_path)


@pytest.mark.skipif(shutil.which("qemu-system-arm") is None, reason="qemu-system-arm is not installed")
@pytest.mark.parametrize("cpu", [cpu for cpu in CORES if cpu != QEMU_ALONE])
def test_a_second_emulator_gives_the_same(cpu: str, tmp_path: Path) -> None:
    """From reset on a whole board; counted by blocks, so that what a condition skips is counted too."""
    x, y = codes("gated", 1)
    report = measure_firmware(files("gated"), "a core", cpu, x, y, tmp_path)
    assert (report.qemu is None) == (cpu == "Cortex-M0+"), "of the M0 QEMU has no board with memory enough"
    if report.qemu is not None:
        assert report.qemu_instructions is not None
        assert 1 <= report.qemu_instructions / report.instructions < 1.03
        assert f"{report.qemu}: {report.qemu_instructions:,}, by blocks" in report.table()
        again = tmp_path / "again"
        again.mkdir()
        facts = read_facts(files("gated")["network.c"], "network.c")
        assert run_in_qemu(files("gated"), facts, CORES[cpu], cpu, x[0], again).output.tobytes() == y.tobytes()


@pytest.mark.skipif(shutil.which("qemu-system-arm") is None, reason="qemu-system-arm is not installed")
@pytest.mark.parametrize("memory", ["flash", "RAM"])
def test_a_board_too_small_for_the_network_is_not_asked(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second emulator is left out; where there is no other the reason is told."""
    small = {cpu: replace(board, flash_bytes=70_000) for cpu, board in qemu_arm._BOARDS.items()}
    if memory == "flash":
        monkeypatch.setattr(qemu_arm, "_BOARDS", small)
    else:
        monkeypatch.setattr(qemu_arm, "_RAM_BYTES", 66_000)
    x, y = codes("residual", 1)
    (tmp_path / "first").mkdir()
    assert measure_firmware(files("residual"), "a", "Cortex-M4", x, y, tmp_path / "first").qemu is None
    (tmp_path / "alone").mkdir()
    with pytest.raises(TargetError, match=rf"target a: the network takes \d+ bytes of {memory}; mps3-an547"):
        measure_firmware(files("residual"), "a", QEMU_ALONE, x, y, tmp_path / "alone")


@pytest.mark.skipif(shutil.which("qemu-system-arm") is None, reason="qemu-system-arm is not installed")
def test_more_ticks_than_the_boards_timer_has_are_no_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = codes("residual", 1)
    source = files("residual")["network.c"]
    slow = b"""(const int8_t *in, int8_t *out, void *arena) {
  for (volatile uint32_t i = 0; i < 100000000u; i++) {
  }
  return residual_once(in, out, arena);
}
"""
    once = source.replace(b"int residual_run(", b"static int residual_once(")
    assert once != source
    given = {**files("residual"), "network.c": once + b"int residual_run" + slow}
    facts = read_facts(source, "network.c")
    found = run_in_qemu(given, facts, CORES[QEMU_ALONE], QEMU_ALONE, x[0], tmp_path)
    assert found.instructions is None
    np.testing.assert_array_equal(found.output, y[0])


@pytest.mark.parametrize("name", ["separable", "gated"])
def test_outputs_are_the_same_with_the_least_scratch_memory(name: str, tmp_path: Path) -> None:
    """Patches of all filters or of four, strips of all rows or of one window's."""
    x, y = codes(name, 1)
    given = dict(files(name))
    given["network.c"] = with_least_scratch(given["network.c"].decode(), program_of(network(name))).encode()
    assert given != files(name)
    least, most = tmp_path / "least", tmp_path / "most"
    for folder in (least, most):
        folder.mkdir()
    runs = [emulate(link(f, M4, folder), M4, x) for f, folder in ((given, least), (files(name), most))]
    for run in runs:
        np.testing.assert_array_equal(run.outputs, y)
    assert runs[0].instructions > runs[1].instructions


def test_counts_are_the_same_in_every_run_and_for_every_image(tmp_path: Path) -> None:
    x, _ = codes("residual", 3)
    built = link(files("residual"), M4, tmp_path)
    counts = [emulate(built, M4, x[i : i + 1]) for i in (0, 1, 1)]
    assert counts[1].instructions == counts[2].instructions
    assert counts[1].step_instructions == counts[2].step_instructions
    # Only rounding and clamping branch on data.
    assert counts[0].instructions == pytest.approx(counts[1].instructions, rel=0.01)


def test_products_come_two_an_instruction_where_there_is_a_dsp(tmp_path: Path) -> None:
    x, y = codes("residual", 1)
    counts = {}
    for cpu in ("Cortex-M4", "Cortex-M0+"):
        (tmp_path / cpu).mkdir()
        counts[cpu] = measure_firmware(files("residual"), cpu, cpu, x, y, tmp_path / cpu).instructions
    assert counts["Cortex-M4"] < 0.5 * counts["Cortex-M0+"]


def test_sizes_are_those_of_the_image(tmp_path: Path) -> None:
    exported = export(network("residual"), "c")
    built = link(files_of(exported), M4, tmp_path)
    assert built.weight_bytes == sum(w.stored_bytes for w in exported.weights)
    assert exported.flash_bytes is not None
    assert built.weight_bytes + built.constant_bytes >= exported.flash_bytes
    with ELFFile.load_from_path(built.path) as elf:
        loaded = sum(s["p_filesz"] for s in elf.iter_segments() if s["p_type"] == "PT_LOAD")
    # Up to the alignment between sections.
    assert built.flash_bytes <= loaded < built.flash_bytes + 32


@pytest.mark.parametrize("compiler", COMPILERS)
def test_two_builds_on_two_paths_give_the_same_image(compiler: str, tmp_path: Path) -> None:
    if COMPILERS[compiler](M4) is None:
        pytest.skip(f"{compiler} for Cortex-M is not installed")
    made = []
    for place in (tmp_path / "here", tmp_path / "quite" / "another place"):
        place.mkdir(parents=True)
        built = link(files("residual"), M4, place, compiler)
        assert compiler in built.compiler
        made.append(built.path.read_bytes())
    assert made[0] == made[1]
    assert str(tmp_path).encode() not in made[0]
    x, y = codes("residual", 1)
    assert emulate(built, M4, x, counting=False).outputs.tobytes() == y.tobytes()


def test_a_wrong_output_is_an_error(tmp_path: Path) -> None:
    x, y = codes("residual", 1)
    wrong = y.copy()
    wrong[0, 3] ^= 1
    with pytest.raises(ParityError, match="image 0 does not give the reference's output"):
        measure_firmware(files("residual"), "a core", "Cortex-M4", x, wrong, tmp_path)


def test_what_writes_behind_its_arena_is_found(tmp_path: Path) -> None:
    x, _ = codes("residual", 1)
    built = link(files("residual"), M4, tmp_path)
    small = replace(built, facts=replace(built.facts, arena_bytes=built.facts.arena_bytes - 4))
    with pytest.raises(TargetError, match="behind its arena"):
        emulate(small, M4, x)


@pytest.mark.parametrize("counting", [True, False])
def test_an_interruption_ends_the_emulation(counting: bool, tmp_path: Path) -> None:
    """A kernel that never ends, and Ctrl-C: in the middle of native code, and in calls out of it."""
    x, _ = codes("residual", 1)
    start = b"int8_t out_zero, const int8_t *x, int8_t *y) {\n  uint32_t c, i;\n"
    kernels = files("residual")["edgecomp_kernels.c"]
    assert kernels.count(start) == 1
    endless = kernels.replace(start, start + b"  for (;;) *(volatile int8_t *)y = out_zero;\n")
    built = link({**files("residual"), "edgecomp_kernels.c": endless}, M4, tmp_path)
    signal.setitimer(signal.ITIMER_REAL, 2)
    before = signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            emulate(built, M4, x, counting=counting)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 30
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sources_that_do_not_compile_are_one_line(tmp_path: Path) -> None:
    broken = {**files("residual"), "edgecomp_kernels.h": b"#error broken\n"}
    with pytest.raises(TargetError, match=r"ends with 1: .*broken") as error:
        link(broken, M4, tmp_path)
    assert "\n" not in str(error.value)


def test_the_command_line_knows_every_compiler() -> None:
    assert tuple(COMPILERS) == options.COMPILERS


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cross_compile.shutil, "which", lambda name: None)
    monkeypatch.setattr(cross_compile.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"no compiler for Cortex-M .*edgecomp\[firmware\]"):
        link(files("residual"), M4, tmp_path)

    def missing(name: str) -> None:
        raise ImportError(name=name)

    monkeypatch.setattr(cross_compile.importlib, "import_module", missing)
    with pytest.raises(TargetError, match=r"unicorn is missing; .*edgecomp\[firmware\]"):
        emulator_name()


def test_targets_that_are_emulated_say_so() -> None:
    emulated = [name for name in names() if load(name).runtimes == ("c",)]
    assert emulated == ["cortex-m0plus", "cortex-m33", "cortex-m4", "cortex-m55", "cortex-m7"]
    assert sorted(load(name).cpu or "" for name in emulated) == sorted(CORES)
    with pytest.raises(TargetError, match="rpi4: Cortex-A72 is not emulated"):
        core_of(load("rpi4").cpu, "rpi4")


# ---- through the command line ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    with pytest.MonkeyPatch.context() as patch:
        here = Place(tmp_path_factory.mktemp("firmware"), patch)
        assert main([*here.command(), "--avg-bits", "4", "--format", "c,onnx"]) == 0
        return here


@pytest.fixture
def there(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)


@pytest.mark.usefixtures("there")
def test_a_built_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert default_runtime("c") == "c"
    first, _ = json.loads(Path("out/manifest.json").read_text())["artifacts"]
    assert (first["path"], first["parity"]["equal_percent"], first["parity"]["max_steps"]) == ("network.c", 100.0, 0)
    assert first["weight_bytes"] < first["flash_bytes"] < first["bytes"] == Path("out/network.c").stat().st_size
    page = Path("out/README.md").read_text("utf-8")
    assert f"The caller gives {first['arena_bytes']} bytes of RAM" in page
    assert all(f"| {name} " in page for name in ("network.c", "network.h", "edgecomp_kernels.c", "model.onnx"))
    assert main(["verify", "out", "--per-layer", "--json"]) == 0
    file = json.loads(capsys.readouterr().out)["files"][0]
    assert (file["path"], file["same_bytes"], file["faults"]) == ("network.c", True, [])
    assert len(file["by_layer"]) >= 5
    assert all(layer["max_steps"] == 0 for layer in file["by_layer"].values())


@pytest.mark.usefixtures("there")
def test_bench_on_a_core(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "out", "--target", "cortex-m4"]) == 0
    text = capsys.readouterr().out
    assert "cortex-m4, emulated by Unicorn" in text
    assert "outputs equal the reference's on 2 images" in text
    assert main(["bench", "out", "--target", "cortex-m4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert f"{found['instructions']:,}" in text
    facts = json.loads(Path("out/network.c").read_text().splitlines()[0].split(" ", 2)[2].removesuffix(" */"))
    assert list(found["steps"]) == facts["steps"]


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(
    ("argv", "code", "found"),
    [
        (["bench", "out", "--target", "cortex-m5"], 2, "did you mean cortex-m"),
        (["bench", "out", "--target", "rpi4"], 2, "--target rpi4-emulated emulates it, --target ssh://HOST?board=rpi4"),
        (["bench", "out", "--target", "rpi3b-plus"], 6, "is not emulated; those that are"),
        (["bench", "nowhere", "--target", "cortex-m4"], 2, "is no folder"),
        (["bench", "out/network.c"], 2, "add --target NAME"),
        (["bench", "out", "--target", "cortex-m4", "--runtime", "litert"], 2, "leave one out"),
        (["bench", "out", "--target", ""], 2, "target '' is unknown; see edgecomp targets"),
        (["export", "out/plan.json", "--graph", "out/graph.edgecomp", "--format", "c", "-o", "out"], 2, "give --force"),
    ],
)
def test_bad_use(argv: list[str], code: int, found: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == code
    error = capsys.readouterr().err
    assert found in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("there")
def test_changed_companions_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    kernels = Path("out/edgecomp_kernels.c")
    before = kernels.read_bytes()
    try:
        kernels.write_bytes(before + b"\n")
        for argv in (["verify", "out"], ["bench", "out", "--target", "cortex-m4"]):
            assert main(argv) == 2
            assert "edgecomp_kernels.c: sha256 is " in capsys.readouterr().err
    finally:
        kernels.write_bytes(before)


@pytest.mark.usefixtures("there")
def test_exported_again_it_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["export", "out/plan.json", "--graph", "out/graph.edgecomp", "--format", "c", "-o", str(tmp_path / "again")]
    assert main(argv) == 0
    assert "network.c" in capsys.readouterr().out
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert len(again) == 4
    assert again == {name: Path("out", name).read_bytes() for name in again}
