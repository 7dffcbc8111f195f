"""Emulated boards compute what this machine does, count the same instructions every time, and never tell a time."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgecomp.benchmarks import emulated as bench_module
from edgecomp.benchmarks.emulated import bench_emulated, one_inference
from edgecomp.benchmarks.runners import runner_class
from edgecomp.cli import main
from edgecomp.compress import compress
from edgecomp.errors import ParityError, TargetError, UsageError
from edgecomp.exporters import export
from edgecomp.plan import Io
from edgecomp.report import Source
from edgecomp.targets import emulated
from edgecomp.targets.cores import EMULATED
from edgecomp.targets.emulated import CLASSES, COUNTS, WORK, inside, read_counts
from tests.filemodels import conv_onnx
from tests.graphs import GRAPHS, plan_for

# An instruction of each kind that decides how fast a kernel is, as an assembler writes it: x1 points to memory.
INSTRUCTIONS = {
    "integer": [
        "add x2, x3, x4", "movz x2, #7", "madd x2, x3, x4, x5", "udiv x2, x3, x4", "ubfx x2, x3, #3, #4", "adr x2, .",
        "csel x2, x3, x4, eq", "cmp x2, x3", "clz x2, x3",
    ],
    "branch": ["b .+4", "cbz x2, .+4", "tbz x2, #3, .+4", "b.eq .+4", "bl .+4"],
    "load": [
        "ldr x2, [x1]", "ldrb w2, [x1, #3]", "ldp x2, x3, [x1]", "ldur x2, [x1, #-8]", "ldr x2, [x1, x9]", "ldr x2, .",
        "ldrsw x2, [x1]", "ldaxr x2, [x1]", "ldar x2, [x1]", "prfm pldl1keep, [x1]", "ldadd x9, x2, [x1]",
        "cas x2, x3, [x1]", "ldr x2, [x1], #0",
    ],
    "store": [
        "str x2, [x1]", "strb w2, [x1, #3]", "stp x2, x3, [x1]", "stur x2, [x1, #-8]", "str x2, [x1, x9]",
        "stlr x2, [x1]", "stlxr w2, x3, [x1]",
    ],
    "simd_load": [
        "ldr q2, [x1]", "ldr s2, [x1, #4]", "ldp q2, q3, [x1]", "ld1 {v2.16b}, [x1]", "ld1r {v2.4s}, [x1]",
        "ld4 {v2.8b-v5.8b}, [x1]", "ldur d2, [x1, #-8]", "ldr q2, .", "ld1 {v2.b}[3], [x1]",
    ],
    "simd_store": [
        "str q2, [x1]", "stp d2, d3, [x1]", "st1 {v2.16b}, [x1]", "st1 {v2.s}[1], [x1]", "stur q2, [x1, #-16]",
    ],
    "simd_integer": [
        "add v2.4s, v3.4s, v4.4s", "mla v2.8h, v3.8h, v4.8h", "smlal v2.4s, v3.4h, v4.4h", "smull v2.8h, v3.8b, v4.8b",
        "smlal v2.4s, v3.4h, v4.h[2]", "mla v2.4s, v3.4s, v4.s[1]", "mul v2.4s, v3.4s, v4.s[1]", "sadalp v2.4s, v3.8h",
        "sqrdmulh v2.4s, v3.4s, v4.4s", "sqrdmulh v2.4s, v3.4s, v4.s[0]", "srshl v2.4s, v3.4s, v4.4s", "addv s2, v3.4s",
        "sqxtn v2.4h, v3.4s", "zip1 v2.8b, v3.8b, v4.8b", "dup v2.4s, w3", "umov w2, v3.s[1]",
        "ext v2.16b, v3.16b, v4.16b, #3", "movi v2.4s, #1", "movi v2.2d, #0",
        "sshr v2.4s, v3.4s, #3", "ushll v2.8h, v3.8b, #0", "sqrshrn v2.4h, v3.4s, #3",
        "smax v2.16b, v3.16b, v4.16b", "bsl v2.16b, v3.16b, v4.16b", "tbl v2.16b, {v3.16b}, v4.16b", "abs v2.4s, v3.4s",
        "cmgt v2.4s, v3.4s, #0", "xtn v2.4h, v3.4s", "orr v2.16b, v3.16b, v3.16b", "sqrdmlah v2.4s, v3.4s, v4.4s",
    ],
    "dot_product": [
        "sdot v2.4s, v3.16b, v4.16b", "udot v2.2s, v3.8b, v4.8b", "sdot v2.4s, v3.16b, v4.4b[2]",
        "udot v2.4s, v3.16b, v4.4b[0]",
    ],
    "float": [
        "fadd s2, s3, s4", "fmadd s2, s3, s4, s5", "fmla v2.4s, v3.4s, v4.4s", "fmla v2.4s, v3.4s, v4.s[1]",
        "fmul v2.4s, v3.4s, v4.4s", "fmul v2.4s, v3.4s, v4.s[3]", "scvtf v2.4s, v3.4s", "fcvtns v2.4s, v3.4s",
        "fcvtzs w2, s3", "scvtf s2, w3", "fmov s2, w3", "fmov v2.4s, #1.0", "frintn v2.4s, v3.4s",
        "fdiv v2.4s, v3.4s, v4.4s",
        "fmax v2.4s, v3.4s, v4.4s", "fsqrt v2.4s, v3.4s", "fneg v2.4s, v3.4s", "fcmgt v2.4s, v3.4s, #0.0",
        "fcmp s2, s3",
        "fmla v2.8h, v3.8h, v4.8h", "fmla v2.8h, v3.8h, v4.h[1]", "fcvtn v2.4h, v3.4s", "fcvtl v2.4s, v3.4h",
        "faddp v2.4s, v3.4s, v4.4s", "faddp s2, v3.2s", "fmaxv s2, v3.4s", "scvtf v2.4s, v3.4s, #4",
        "fcvtzs v2.4s, v3.4s, #4", "frecpe v2.4s, v3.4s", "fcsel s2, s3, s4, eq", "fabs v2.8h, v3.8h",
    ],
    "other": ["nop", "mrs x2, fpcr", "dmb ish", "aese v2.16b, v3.16b", "sha1h s2, s3", "sha256su0 v2.4s, v3.4s"],
}  # fmt: skip
MARKING = {"integer": 2, "other": 1}  # two movs and a svc
TIMES = 7


def zeros(**counts: int) -> dict[str, int]:
    return {name: counts.get(name, 0) for name in CLASSES}


@pytest.mark.devices
def test_every_instruction_is_counted_in_its_class(root, tmp_path):
    lines = [line for each in INSTRUCTIONS.values() for line in each]
    mark = ["movn x0, #31336", "mov x8, #57", "svc #0"]
    text = [".globl _start", "_start: sub x1, sp, #256", "mov x9, #0", "mov x30, #0", *mark]
    for line in lines:
        text += [*([line] * TIMES), *mark]
    text += ["mov x0, #0", "mov x8, #93", "svc #0", ""]
    (tmp_path / "all.s").write_text("\n".join(text))
    target = ["-target", "aarch64-linux-musl", "-mcpu=cortex_a76+aes+sha2", "-nostdlib", "-static"]
    command = [sys.executable, "-m", "ziglang", "cc", *target, "all.s", "-o", "all"]
    subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(tmp_path / "zig")})
    run = inside(root, EMULATED["rpi5-emulated"], tmp_path, [f"{WORK}/all"], count=True)
    subprocess.run(run, check=True, capture_output=True)
    counts = read_counts(tmp_path / COUNTS)
    assert len(counts) == len(lines) + 2
    wrong = []
    for i, (kind, line) in enumerate((kind, line) for kind, each in INSTRUCTIONS.items() for line in each):
        between = {name: counts[i + 1][name] - counts[i][name] - MARKING.get(name, 0) for name in CLASSES}
        if between != zeros(**{kind: TIMES}):
            wrong.append((line, {name: n for name, n in between.items() if n}))
    assert wrong == []


def integer_files(tmp_path: Path, name: str, bits: int = 4) -> dict[str, Path]:
    quantized = compress(GRAPHS[name](), plan_for(GRAPHS[name](), bits, io=Io.INT8))
    files = {}
    for form, file in (("onnx", f"{name}.onnx"), ("tflite-packed", f"{name}.tflite")):
        files[file] = tmp_path / file
        files[file].write_bytes(export(quantized, form).data)
    return files


@pytest.mark.devices
@pytest.mark.parametrize(("target", "dot_product"), [("rpi3b", False), ("rpi4", False), ("rpi5", True)])
def test_a_core_computes_the_same_codes(target, dot_product, root, tmp_path):
    files = integer_files(tmp_path, "plain") | integer_files(tmp_path, "residual")
    entries = [(n, path, path.suffix[1:]) for n, path in files.items()]
    comparison = bench_emulated(entries, f"{target}-emulated", n_images=4)
    for report in comparison.reports:
        assert report.source is Source.EMULATED
        assert report.execution["outputs_are_codes"]
        assert report.execution["values_compared"] == 40, report.execution
        assert report.execution["values_different"] == 0
        assert report.execution["computed_otherwise"] == ()
        assert (report.instructions["dot_product"] > 0) is dot_product
        assert report.instructions["total"] == sum(report.instructions[kind] for kind in CLASSES)
        assert report.instructions["simd_integer"] > 0
        assert (report.p50_us, report.load_ms, tuple(report.samples_us)) == (None, None, ())
        assert 30e6 < report.peak_memory_bytes < 120e6
        assert 0 <= report.model_memory_bytes < 10e6


@pytest.mark.devices
def test_instructions_of_one_inference_are_the_same_in_every_run(root, tmp_path):
    for name, path in integer_files(tmp_path, "residual").items():
        entries = [(name, path, path.suffix[1:])]
        runs = [bench_emulated(entries, "rpi4-emulated").reports[0].instructions for _ in range(3)]
        assert runs[0] == runs[1] == runs[2]
        assert runs[0]["total"] > 10_000


@pytest.mark.devices
def test_a_counted_program_sees_the_same_in_every_run(root, tmp_path):
    code = "import os, time; print(os.getpid(), time.time_ns(), time.monotonic_ns(), time.process_time_ns())"
    said = []
    for name in ("a", "another-place"):
        (tmp_path / name).mkdir()
        run = inside(root, EMULATED["rpi4-emulated"], tmp_path / name, ["/usr/bin/python3", "-c", code], count=True)
        said.append(subprocess.run(run, check=True, capture_output=True, stdin=subprocess.DEVNULL, text=True).stdout)
        said.append(read_counts(tmp_path / name / COUNTS))
    assert said[0].startswith("1 17040672")
    assert said[:2] == said[2:]


@pytest.mark.devices
def test_the_command_counts_the_same_from_another_folder(root, tmp_path, capsys, monkeypatch):
    files = integer_files(tmp_path, "residual")
    counts = []
    for name in ("a", "another-place"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / name))
        for file in files.values():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
            assert main(["bench", str(tmp_path / name / file.name), "--target", "rpi4-emulated", "--json"]) == 0
            counts.append(json.loads(capsys.readouterr().out)[0]["reports"][0]["instructions"])
    assert counts[:2] == counts[2:]


@pytest.mark.devices
def test_memory_is_the_programs_own(root, tmp_path):
    weight = np.ones((1024, 1024, 2, 2), dtype=np.float32)  # 16 MiB
    path = tmp_path / "large.onnx"
    path.write_bytes(conv_onnx(weight, 2))
    (report,) = bench_emulated([("large", path, "onnx")], "rpi4-emulated", n_images=1).reports
    assert weight.nbytes <= report.model_memory_bytes < 6 * weight.nbytes
    assert report.model_memory_bytes + 30e6 < report.peak_memory_bytes < report.model_memory_bytes + 120e6


@pytest.mark.devices
def test_the_command_line(root, tmp_path, capsys):
    path = integer_files(tmp_path, "plain")["plain.onnx"]
    assert main(["bench", str(path), "--target", "rpi3b-emulated"]) == 0
    text = capsys.readouterr().out
    assert "rpi3b-emulated (qemu-aarch64 -cpu cortex-a53); emulated, one inference" in text
    assert "all 20 as on this machine" in text
    assert " ms" not in text
    assert main(["targets", "--install", "rpi4-emulated"]) == 0
    assert capsys.readouterr().out.strip() == str(root)


@pytest.mark.devices
def test_a_half_made_file_system_is_none(root, tmp_path, monkeypatch):
    (tmp_path / "downloads").symlink_to(root.parent / "downloads")
    seen = []

    @contextlib.contextmanager
    def stage(name, total):
        yield seen.append

    def fail(work: Path, *_: object) -> None:
        assert (work / "usr/bin/python3").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(emulated, "_check_imports", fail)
        with pytest.raises(KeyboardInterrupt):
            emulated.install(stage, tmp_path)
    assert not emulated.is_installed(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["downloads", "install.lock"]
    seen.clear()
    assert emulated.is_installed(tmp_path) is False
    made = emulated.install(stage, tmp_path)
    assert sum(seen) == 100
    assert emulated.is_installed(tmp_path)
    (made / "usr/bin/python3").unlink()  # whoever asks again is not kept waiting
    assert emulated.install(stage, tmp_path) == made
    assert not (made / "usr/bin/python3").exists()
    monkeypatch.setattr(emulated, "wanted_wheels", lambda *_: ("numpy==0",))
    assert not emulated.is_installed(tmp_path)


def test_what_cannot_be_emulated(tmp_path, monkeypatch, capsys):
    entries = [("a", b"x", "onnx")]
    with pytest.raises(UsageError, match=r"target 'rpi9-emulated' is not emulated; did you mean rpi.-emulated or rpi"):
        bench_emulated(entries, "rpi9-emulated")
    assert main(["bench", "x.onnx", "--target", "rpi9-emulated"]) == 2
    assert "target 'rpi9-emulated' is unknown; did you mean rpi" in capsys.readouterr().err
    with pytest.raises(TargetError, match=r"rpi4-emulated is not installed.*edgecomp targets --install rpi4-emulated"):
        bench_emulated(entries, "rpi4-emulated", cache=tmp_path)
    with pytest.raises(UsageError, match="0 images"):
        bench_emulated(entries, "rpi4-emulated", n_images=0)
    monkeypatch.setattr(bench_module, "is_installed", lambda *_: True)
    with pytest.raises(TargetError, match="runtime tflite-micro is not there on rpi4-emulated"):
        bench_emulated(entries, "rpi4-emulated", runtime="tflite-micro")
    assert main(["targets", "--install"]) == 2
    assert main(["targets", "--install", "rpi4"]) == 2
    assert main(["bench", "x.onnx", "--target", "rpi4-emulated", "--target", "rpi5-emulated"]) == 2
    assert main(["bench", "x.onnx", "--target", "rpi4-emulated", "--repeat", "2"]) == 2
    assert main(["bench", "x.onnx", "--target", "rpi4-emulated", "--threads", "4"]) == 2
    said = capsys.readouterr().err
    assert "--install needs a NAME: rpi-zero2w-emulated" in said
    assert "target 'rpi4' is not emulated" in said
    assert "several may be given where all are ssh://" in said
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "defpath", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda tool, path=None: None if tool in ("qemu-aarch64", "cc") else tool)
    lacking = "^qemu-aarch64, cc not found; install: apt-get install gcc libc6-dev qemu-user"
    with pytest.raises(TargetError, match=lacking):
        emulated.install(lambda name, total: contextlib.nullcontext(print), tmp_path)
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(TargetError, match="run on Linux on x86-64, this is linux on riscv64"):
        emulated.install(lambda name, total: contextlib.nullcontext(print), tmp_path)


def test_an_inference_is_the_difference_of_two_marks():
    def at(integer: int, branch: int) -> dict[str, int]:
        return zeros(integer=integer, branch=branch)

    marks = [at(1000, 50), at(1010, 52), at(1020, 54), *(at(1020 + 110 * i, 54 + 12 * i) for i in range(1, 5))]
    marks += [at(1485, 117), at(9999, 999)]
    found = one_inference(marks)
    assert {kind: n for kind, n in found.items() if n} == {"integer": 15, "branch": 13, "total": 28}
    with pytest.raises(TargetError, match="8 marks in the counts of instructions, expected 9"):
        one_inference(marks[1:])


def test_counts_are_read_strictly(tmp_path):
    path = tmp_path / COUNTS
    with pytest.raises(TargetError, match="no counts of instructions"):
        read_counts(path)
    for text in ("", "1 2 3\n", "1 2 3 4 5 6 7 8 9 ten\n"):
        path.write_text(text)
        with pytest.raises(TargetError, match=r"counts\.txt: "):
            read_counts(path)
    path.write_text("1 2 3 4 5 6 7 8 9 10\n")
    assert read_counts(path) == [dict(zip(CLASSES, range(1, 11), strict=True))]


def test_codes_must_be_the_same_where_kernels_compute_alike(tmp_path):
    path, codes = tmp_path / "out.npz", np.arange(6, dtype=np.int8).reshape(2, 3)
    np.savez(path, codes)
    same = bench_module._compared(path, [codes], "x", alike=True)
    assert same == {
        "outputs_are_codes": True,
        "values_compared": 6,
        "values_different": 0,
        "largest_difference": 0.0,
    }
    other = codes.copy()
    other[1, 2] -= 3
    apart = r"^x: 1 of 6 codes differ from this machine's, the most at \(1, 2\): 5, here 2$"
    with pytest.raises(ParityError, match=apart):
        bench_module._compared(path, [other], "x", alike=True)
    told = bench_module._compared(path, [other], "x", alike=False)
    assert (told["values_different"], told["largest_difference"]) == (1, 3.0)
    with pytest.raises(ParityError, match="outputs are"):
        bench_module._compared(path, [codes.astype(np.uint8)], "x", alike=False)
    np.savez(path, np.array([object()]))
    with pytest.raises(TargetError, match="x: no outputs: "):  # nothing is unpickled
        bench_module._compared(path, [codes], "x", alike=True)
    np.savez(path, codes.astype(np.float32))
    real = bench_module._compared(path, [other.astype(np.float32)], "x", alike=True)
    assert (real["outputs_are_codes"], real["values_different"]) == (False, 1)


def test_sums_that_lie_near_the_middle_of_two_codes_are_told(tmp_path):
    quantized = compress(GRAPHS["residual"](), plan_for(GRAPHS["residual"](), 4, io=Io.INT8))
    last = quantized.tensors["end.relu"]
    assert last.quant is not None
    free = replace(last, quant=replace(last.quant, scale=last.quant.scale * np.float32(1.0003)))
    path = tmp_path / "sum.onnx"
    for tensor, told in ((last, ()), (free, ("QLinearAdd",))):
        graph = replace(quantized, tensors={**quantized.tensors, "end.relu": tensor})
        path.write_bytes(export(graph, "onnx").data)
        assert bench_module._unlike(path, runner_class("onnxruntime")(path, threads=1)) == told


def test_emulated_boards_are_listed(capsys):
    assert main(["targets"]) == 0
    assert "emulated: QEMU -cpu cortex-a72" in capsys.readouterr().out
    assert main(["targets", "--json"]) == 0
    assert all("emulated" not in board["name"] for board in json.loads(capsys.readouterr().out))
