"""Networks in C, compiled here, beside the integer reference: every byte of every output."""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp import quantmath, reference
from edgecomp.artifact import AtRest
from edgecomp.benchmarks.compiled_c import CompiledC, host_compiler
from edgecomp.compress import border_codes, compress
from edgecomp.errors import BundleError, ExportError
from edgecomp.exporters import export, files_of
from edgecomp.exporters.c_facts import read_facts
from edgecomp.exporters.to_c import Program, program_of, to_c
from edgecomp.graph import Array, Graph, Op
from edgecomp.plan import Io
from tests.c_program import SANITIZERS, codes_for, program, with_least_scratch, written
from tests.graphs import GRAPHS, Build, dense, images, multiplied, plan_for, residual
from tests.soak_graphs import random_case

NETWORKS = {**GRAPHS, "multiplied": multiplied, "dense": dense}
STRICT = ("-Wall", "-Wextra", "-Wconversion", "-Wpedantic", "-Werror")


@cache
def mixed(name: str, io: Io = Io.FLOAT) -> Graph:
    """Bits 2, 3, 4 ... 8, 2, ... layer by layer."""
    graph = NETWORKS[name]()
    return compress(graph, plan_for(graph, {n.name: 2 + i % 7 for i, n in enumerate(graph.layers())}, io=io))


def expected(graph: Graph, x: Array) -> Array:
    """The codes that come out of the last operator on codes."""
    quant = graph.tensors[graph.inputs[0]].quant
    return reference.run(graph, {graph.inputs[0]: x if quant is None else quantmath.quantize(x, quant)})[
        border_codes(graph)[1]
    ]


# "separable" ends in a softmax, which on codes is refused.
@pytest.mark.parametrize(("name", "io"), [(n, io) for n in NETWORKS for io in Io if (n, io) != ("separable", Io.INT8)])
def test_networks_equal_the_reference(name: str, io: Io) -> None:
    graph = mixed(name, io)
    x = images(graph, 4)
    runner = CompiledC(to_c(graph).data)
    got = runner.run(x)
    np.testing.assert_array_equal(got, expected(graph, x).reshape(got.shape))
    assert CompiledC(to_c(graph, at_rest=AtRest.INT8).data).run(x).tobytes() == got.tobytes()
    # What an earlier image left in the arena is of no matter.
    np.testing.assert_array_equal(runner.run(x[::-1])[::-1], got)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 1 << 32))
def test_random_networks_equal_the_reference(seed: int) -> None:
    case = random_case(np.random.default_rng(seed))
    graph = compress(case.graph, case.plan)
    try:
        source = to_c(graph).data
    except ExportError as e:
        if not re.search("softmax on codes|image into an image|computes nothing", str(e)):
            raise
        return
    got = CompiledC(source).run(case.images)
    np.testing.assert_array_equal(got, expected(graph, case.images).reshape(got.shape))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc, for its sanitizers, is not here")
@pytest.mark.parametrize("name", NETWORKS)
def test_no_step_outside_memory_and_no_undefined_behaviour(name: str, tmp_path: Path) -> None:
    graph = mixed(name)
    run = program(graph, tmp_path, *SANITIZERS)
    inputs, outputs = codes_for(graph, images(graph, 3))
    done = subprocess.run([run], input=inputs.tobytes(), capture_output=True, check=True)
    assert done.stdout == outputs.tobytes()


def self_tested(folder: Path, name: str, *, off: int = 0) -> int:
    """What the self-test gives, with the arena `off` bytes behind a multiple of 16."""
    upper = name.upper()
    text = f"""
#include "network.h"
static int8_t in[{upper}_INPUT_BYTES], out[{upper}_OUTPUT_BYTES];
static union {{ int64_t aligned; int8_t bytes[{upper}_ARENA_BYTES + 16]; }} arena;
int main(void) {{ return {name}_self_test(in, out, arena.bytes + {off}); }}
"""
    (folder / "main.c").write_text(text)
    sources = [str(folder / name) for name in ("main.c", "network.c", "edgecomp_kernels.c")]
    options = [f"-D{upper}_SELF_TEST", "-std=c99", *STRICT, "-O1", "-o", str(folder / "run")]
    subprocess.run([*host_compiler(), *options, *sources], check=True)
    return subprocess.run([folder / "run"], check=False).returncode


@pytest.mark.parametrize("name", ["residual", "gated"])
def test_the_self_test_sees_a_changed_weight(name: str, tmp_path: Path) -> None:
    source = written(mixed(name), tmp_path)["network.c"].decode()
    network = read_facts(source.encode(), "network.c").name
    assert self_tested(tmp_path, network) == 0
    assert self_tested(tmp_path, network, off=2) == 1
    head, table, rest = source.partition(" = {\n")
    first = re.match(r" *(-?\d+),", rest)
    assert first is not None
    (tmp_path / "network.c").write_text(head + table + rest.replace(first[1], str(int(first[1]) ^ 127), 1))
    assert self_tested(tmp_path, network) == 2


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
@pytest.mark.parametrize("name", ["residual", "gated"])
def test_nothing_is_read_before_it_is_written(name: str, tmp_path: Path) -> None:
    graph = mixed(name)
    inputs, outputs = codes_for(graph, images(graph, 1))
    command = ["valgrind", "--quiet", "--error-exitcode=9", str(program(graph, tmp_path, "-O1"))]
    done = subprocess.run(command, input=inputs.tobytes(), capture_output=True, check=True)
    assert done.stdout == outputs.tobytes()


def compilers() -> dict[str, list[str]]:
    found = {name: [name] for name in ("gcc", "clang") if shutil.which(name)}
    return {**found, "zig": [sys.executable, "-m", "ziglang", "cc"]}


@pytest.mark.parametrize("compiler", compilers())
def test_strict_compilers_have_nothing_to_say(compiler: str, tmp_path: Path) -> None:
    for name in ("gated", "residual"):
        facts = read_facts(written(mixed(name), tmp_path)["network.c"], "network.c")
        for source in ("network.c", "edgecomp_kernels.c"):
            for language in (["-std=c99"], ["-x", "c++", "-std=c++17"]):
                define = f"-D{facts.name.upper()}_SELF_TEST"
                command = [*compilers()[compiler], *language, *STRICT, define, "-O2", "-c", "-o", str(tmp_path / "o")]
                done = subprocess.run([*command, str(tmp_path / source)], capture_output=True, text=True, check=False)
                assert (done.returncode, done.stderr) == (0, "")


def test_the_header_tells_the_truth(tmp_path: Path) -> None:
    graph = mixed("residual")
    files = written(graph, tmp_path)
    facts = read_facts(files["network.c"], "network.c")
    header = files["network.h"].decode()
    for what, n in (("INPUT", 3 * 8 * 8), ("OUTPUT", 10), ("ARENA", facts.arena_bytes)):
        assert f"#define RESIDUAL_{what}_BYTES {n}\n" in header
    assert f"{facts.constant_bytes:,} bytes" in header
    # The arrays of numbers, by their declarations.
    sizes = {"uint8_t": 1, "int8_t": 1, "uint16_t": 2, "int32_t": 4}
    run, _, _ = files["network.c"].decode().partition("#ifdef RESIDUAL_SELF_TEST")
    arrays = re.findall(r"static const (\w+) \w+\[(\d+)\]", run)
    assert sum(sizes[kind] * int(n) for kind, n in arrays) == facts.constant_bytes
    weights = export(graph, "c").weights
    assert [w.layer for w in weights] == [node.name for node in graph.layers()]
    assert sum(w.stored_bytes for w in weights) < facts.constant_bytes


def test_sums_are_fused_and_written_over_what_they_add() -> None:
    def block(*, twice: bool) -> Graph:
        b = Build(0, (4, 16, 16))
        x = b.clip("stem.relu", b.conv("stem", "input", 8))
        y = b.conv("conv2", b.clip("conv1.relu", b.conv("conv1", x, 8)), 8)
        x = b.clip("add.relu", b.node(Op.ADD, "add", (y, x), {}))
        x = b.node(Op.ADD, "again", (x, "stem.relu"), {}) if twice else x
        return b.graph(b.linear("fc", b.node(Op.FLATTEN, "flatten", (x,), {}), 4), "block")

    def planned(*, twice: bool) -> Program:
        graph = block(twice=twice)
        return program_of(compress(graph, plan_for(graph, 4)))

    once, twice = planned(twice=False), planned(twice=True)
    names = [step.name for step in once.steps]
    assert any("conv2 + add" in name for name in names)
    assert "edgecomp_add" not in {step.kernel for step in once.steps}
    map_bytes = 8 * 16 * 16
    assert 2 * map_bytes <= once.arena.n_bytes < 3 * map_bytes
    # Read once more behind the sum: it must not be written over.
    assert 3 * map_bytes <= twice.arena.n_bytes
    assert once.arena.optimal


@pytest.mark.parametrize("name", NETWORKS)
def test_scratch_memory_lies_where_nobody_else_does_and_more_of_it_changes_no_result(name: str) -> None:
    graph = mixed(name)
    found = program_of(graph)
    text = to_c(graph).data.decode()
    lives: dict[str, list[int]] = {}
    for i, step in enumerate(found.steps):
        for tensor in step.pointers.values():
            lives.setdefault(found.place[tensor], []).append(i)
    sizes = {found.place[t]: graph.tensors[t].shape for step in found.steps for t in step.pointers.values()}
    for i, (offset, n_bytes) in found.scratch.items():
        step = found.steps[i]
        assert n_bytes in {step.scratch_bytes, *step.more_scratch}
        assert n_bytes >= step.scratch_bytes
        assert offset + n_bytes <= found.arena.n_bytes
        for place in (found.place[t] for t in step.pointers.values()):
            if place.startswith("memory"):
                start = int(place.removeprefix("memory + "))
                assert offset + n_bytes <= start or start + math.prod(sizes[place]) <= offset
    least = with_least_scratch(text, found)
    x = images(graph, 3)
    assert CompiledC(least.encode()).run(x).tobytes() == CompiledC(text.encode()).run(x).tobytes()


def test_a_step_takes_what_the_arena_has_anyway() -> None:
    """Four filters at a time are enough for a first layer of three channels; behind it more memory is needed."""
    b = Build(0, (3, 12, 12))
    x = b.conv("wide", b.conv("stem", "input", 8), 32)
    graph = b.graph(b.linear("fc", b.node(Op.FLATTEN, "flatten", (b.avg_pool("pool", x),), {}), 4), "growing")
    found = program_of(compress(graph, plan_for(graph, 4)))
    (stem, *_), (_, given), taps = found.steps, found.scratch[0], 28
    assert (stem.scratch_bytes, given) == ((8 + 7) * taps + 64, (2 * 8 + 7) * taps + 2 * 64)
    assert found.arena.n_bytes == found.arena.least_bytes


def test_sums_are_lifted_so_that_few_layers_need_64_bits() -> None:
    text = to_c(mixed("separable")).data.decode()
    layers = re.findall(r"step\d+_shift, (\d), [^}]*}, [^,]*, \d+, -?\d+, (\d+)};", text)
    assert len(layers) == 5
    assert {wide for wide, _ in layers} == {"0"}
    assert sum(lift != "0" for _, lift in layers) >= 2


def test_an_arena_out_of_line_is_refused() -> None:
    runner = CompiledC(to_c(mixed("plain")).data)
    memory = np.zeros(runner.facts.arena_bytes + 8, dtype=np.uint8)
    odd = memory.ctypes.data + (1 if memory.ctypes.data % 4 != 3 else 2)
    image, result = np.zeros(runner.facts.input.n_bytes, np.int8), np.full(10, 77, np.int8)
    assert runner._run(*map(ctypes.c_void_p, (image.ctypes.data, result.ctypes.data, odd))) == 1
    assert (result == 77).all()


FLOATS = st.one_of(st.floats(-300, 300, width=32), st.floats(width=32), st.integers(-600, 600).map(lambda k: k / 2))


@settings(max_examples=200, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=20))
def test_real_numbers_become_codes_as_in_the_reference(values: list[float]) -> None:
    quant = quantmath.QuantParams(bits=8, scale=np.array(0.5), zero_point=np.array(3))
    real = np.array(values, dtype=np.float32)
    kernel = kernels().edgecomp_code
    kernel.restype, kernel.argtypes = ctypes.c_int8, (ctypes.c_float, ctypes.c_float, ctypes.c_int32)
    got = [kernel(float(v), 0.5, 3) for v in real]
    with np.errstate(over="ignore"):
        want = quantmath.quantize(np.where(np.isnan(real), 0, real).astype(np.float32), quant)
    assert got == want.tolist()


@cache
def kernels() -> ctypes.CDLL:
    return CompiledC(to_c(mixed("plain")).data)._library


def test_borders_in_c_are_those_of_the_graph() -> None:
    graph = mixed("plain")
    runner = CompiledC(to_c(graph).data)
    real = images(graph, 1)[0].transpose(1, 2, 0).copy()
    codes = np.empty(real.shape, dtype=np.int8)
    pointers = (ctypes.c_void_p(a.ctypes.data) for a in (real, codes))
    runner._library.plain_quantize(*pointers)
    assert runner.input.quant is not None
    np.testing.assert_array_equal(codes, quantmath.quantize(real, runner.input.quant))
    out = runner.run(images(graph, 1))[0]
    back = np.empty(out.shape, dtype=np.float32)
    runner._library.plain_dequantize(*(ctypes.c_void_p(a.ctypes.data) for a in (out, back)))
    assert runner.output.quant is not None
    np.testing.assert_array_equal(back, quantmath.dequantize(out, runner.output.quant))


@pytest.mark.parametrize("name", ["residual", "gated", "shuffled"])
def test_the_input_may_lie_in_the_arena(name: str) -> None:
    graph = mixed(name)
    runner = CompiledC(to_c(graph).data)
    x = images(graph, 3)
    want = runner.run(x)
    offset, n = runner.facts.input_offset, runner.facts.input.n_bytes
    assert offset is not None
    assert runner.input.quant is not None
    for image, result in zip(quantmath.quantize(x, runner.input.quant), want, strict=True):
        memory, got = np.full(runner.facts.arena_bytes, 0x55, dtype=np.uint8), np.empty_like(result)
        memory[offset : offset + n] = np.frombuffer(image.transpose(1, 2, 0).tobytes(), dtype=np.uint8)
        start = memory.ctypes.data
        assert start % 4 == 0
        assert runner._run(*map(ctypes.c_void_p, (start + offset, got.ctypes.data, start))) == 0
        np.testing.assert_array_equal(got, result)


def test_an_input_that_would_cost_memory_stays_outside() -> None:
    """Read by the first layer and by the last, which needs all of the arena."""
    b = Build(0, (8, 16, 16))
    x = b.conv("conv2", b.conv("conv1", "input", 8), 8)
    graph = b.graph(b.linear("fc", b.node(Op.FLATTEN, "flatten", (b.node(Op.ADD, "add", (x, "input"), {}),), {}), 4))
    found = program_of(compress(graph, plan_for(graph, 4, io=Io.INT8)))
    assert found.input_offset is None
    assert b"INPUT_OFFSET" not in files_of(to_c(found.graph))["network.h"]


def test_the_same_bytes_again() -> None:
    one, two = (files_of(to_c(compress(residual(), plan_for(residual(), 3)))) for _ in range(2))
    assert one == two


def test_a_softmax_is_left_to_the_caller_or_refused() -> None:
    b = Build(0, (3, 8, 8))
    x = b.node(Op.FLATTEN, "flatten", (b.conv("conv", "input", 4),), {})
    graph = b.graph(b.node(Op.SOFTMAX, "softmax", (b.linear("fc", x, 5),), {"axis": 1}))
    on_reals = compress(graph, plan_for(graph, 4))
    assert b"softmax" in files_of(to_c(on_reals))["network.h"]
    x = images(graph, 3)
    np.testing.assert_array_equal(CompiledC(to_c(on_reals).data).run(x), expected(on_reals, x))
    with pytest.raises(ExportError, match=r"'softmax': softmax on codes .*--io float"):
        to_c(compress(graph, plan_for(graph, 4, io=Io.INT8)))


def test_what_is_refused() -> None:
    with pytest.raises(ExportError, match="is float"):
        to_c(residual())
    graph = mixed("plain")
    with pytest.raises(ExportError, match="1 inputs and 2 outputs"):
        to_c(replace(graph, outputs=(graph.outputs[0], graph.nodes[2].outputs[0])))


def test_names_cannot_leave_their_comments() -> None:
    graph = mixed("plain")
    nodes = tuple(replace(n, name=f"*/ evil(); /* ??/ {n.name}\n\u00e9") for n in graph.nodes)
    hostile = replace(graph, name='*/ int x; "', nodes=nodes)
    x = images(graph, 2)
    np.testing.assert_array_equal(CompiledC(to_c(hostile).data).run(x), expected(graph, x))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"int x;",
        b"/* edgecomp-network {} */",
        b'/* edgecomp-network {"name": "a"} */',
        b"/* edgecomp-network " + b"[" * 100_000 + b" */",
        b"\xff\xfe",
    ],
)
def test_other_sources_are_refused(line: bytes) -> None:
    with pytest.raises(BundleError, match=r"a\.c: is no network in C by edgecomp, or damaged"):
        read_facts(line + b"\nint main;", "a.c")


@settings(max_examples=200)
@given(st.integers(0, 1 << 30), st.binary(min_size=1, max_size=3))
def test_a_damaged_first_line_is_an_error_of_ours(place: int, damage: bytes) -> None:
    source = bytearray(to_c(mixed("plain")).data.split(b"\n", 1)[0])
    place %= len(source)
    source[place : place + len(damage)] = damage
    try:
        facts = read_facts(bytes(source), "a.c")
    except BundleError:
        return
    assert facts.name.isidentifier()


@pytest.mark.parametrize(
    ("name", "in_c"),
    [("string", "net_string"), ("Net 1.0", "net_1_0"), ("", "net"), ("8 bits", "net_8_bits"), ("x" * 200, "x" * 48)],
)
def test_a_network_is_called_what_c_allows(name: str, in_c: str) -> None:
    assert program_of(replace(mixed("plain"), name=name)).name == in_c


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc, for its sanitizers, is not here")
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [
        ((1, 1), (1, 1), (1, 1)),  # every pixel by itself, which other convolutions take as one long row
        ((1, 1), (2, 3), (1, 1)),
        ((1, 2), (1, 1), (1, 2)),
        ((5, 1), (2, 1), (1, 1)),
        ((3, 3), (1, 2), (2, 1)),
    ],
)
def test_a_depthwise_layer_alone_stays_within_its_scratch_memory(
    kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int], tmp_path: Path
) -> None:
    b = Build(0, (5, 9, 11))
    y = b.conv("dw", "input", 5, kernel, stride=stride, pads=(0, 0, 0, 0), dilation=dilation, groups=5)
    float_graph = b.graph(y, "depthwise")
    graph = compress(float_graph, plan_for(float_graph, 4))
    run = program(graph, tmp_path, *SANITIZERS)
    inputs, outputs = codes_for(graph, images(graph, 2))
    done = subprocess.run([run], input=inputs.tobytes(), capture_output=True, check=True)
    assert done.stdout == outputs.tobytes()
