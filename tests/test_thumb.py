"""Classes of instructions against what a disassembler calls them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from edgecomp.benchmarks.thumb import CLASSES, REGISTERS, class_of, count_classes

# Mnemonics by class, as binutils writes them, without width and condition.
MNEMONICS = {
    "load": r"ldr(b|h|sb|sh|t|bt|ht)?",
    "store": r"str(b|h|t|bt|ht)?",
    "multiple": r"(push|pop|ldm|stm|ldrd|strd)(ia|db|mia)?",
    "multiply": r"(muls?|mla|mls|[su]mull|[su]mlal|sm(la|ul)[bt][bt]|sm(lad|uad|mul|lald))",
    "divide": r"[su]div",
    "branch": r"(b|bl|blx|bx|cbz|cbnz|tbb|tbh)",
    "float": r"v\w+",
}
CONDITION = r"(eq|ne|cs|cc|mi|pl|vs|vc|hi|ls|ge|lt|gt|le|al)?"
SOURCE = """
.syntax unified
.thumb
.cpu cortex-m4
.fpu fpv4-sp-d16
a: ldr r0, [r1]; ldr r0, [r1, r2]; ldrb r0, [r1, #3]; ldrh r3, [r1, #2]; ldrsb r0, [r1, r2]; ldrsh r0, [r1, r2]
ldr r0, =0x12345678; ldr r0, [sp, #8]; ldr.w r9, [r1, #400]; ldrsb.w r9, [r1, #-4]; ldr r8, [r1], #4
str r0, [r1]; str r0, [r1, r2]; strb r0, [r1, #3]; strh r3, [r1, #2]; str r0, [sp, #8]; str.w r9, [r1, #400]
ldrsh.w r9, [r2, #8]; str r8, [r1], #4
push {r4, r5, lr}; pop {r4, r5, pc}; ldmia r0!, {r1, r2, r3}; stmia r0!, {r1, r2}; push {r4-r11, lr}; ldmdb r0, {r1, r9}
ldrd r0, r1, [r2, #8]; strd r0, r1, [r2], #8; ldrd r0, r1, [r2, #-8]!; stmdb r0!, {r1, r2, r9}
muls r0, r1, r0; mul r0, r9, r1; mla r0, r1, r2, r3; mls r0, r1, r2, r3; smull r0, r1, r2, r3; umull r0, r1, r2, r3
smlal r0, r1, r2, r3; smlad r0, r1, r2, r3; smlabb r0, r1, r2, r3; smulbt r0, r1, r2; smmul r0, r1, r2; smuad r0, r1, r2
smlald r0, r1, r2, r3; sdiv r0, r1, r2; udiv r0, r1, r2
b a; beq a; bl a; bx lr; blx r3; cbz r0, b; cbnz r0, b; tbb [pc, r0]; tbh [pc, r0, lsl #1]; b.w a; bne.w a; b: nop
vadd.f32 s0, s1, s2; vldr s0, [r0]; vmla.f32 s0, s1, s2; vmov r0, s0; vcvt.s32.f32 s0, s0
adds r0, r1, r2; add r0, sp, #8; movw r0, #1234; movt r0, #1234; sxtb16 r0, r1; pkhbt r0, r1, r2; ssat r0, #8, r1
sxtab16 r0, r1, r2; lsls r0, r1, #2; ror.w r0, r1, #8; cmp r0, #0; it eq; moveq r0, r1; uxtb r0, r1; mov r0, r1
add r9, r1; sub sp, #16; ubfx r0, r1, #2, #3; adds.w r0, r1, r9; rev r0, r1; qadd r0, r1, r2; clz r0, r1; nop.w; dmb
"""


def test_classes_are_those_of_a_disassembler(tmp_path: Path) -> None:
    assembler, reader = (shutil.which(f"arm-none-eabi-{tool}") for tool in ("as", "objdump"))
    if assembler is None or reader is None:
        pytest.skip("arm-none-eabi binutils are not installed")
    (tmp_path / "a.s").write_text(SOURCE)
    subprocess.run([assembler, "-mthumb", "-o", tmp_path / "a.o", tmp_path / "a.s"], check=True)
    command = [reader, "-d", "-M", "force-thumb", tmp_path / "a.o"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seen = set()
    for line in text.splitlines():
        found = re.match(r"\s+[0-9a-f]+:\s+([0-9a-f]{4})(?: ([0-9a-f]{4}))?\s+([a-z0-9.]+)\s*(.*)", line)
        if found is None or found[3].startswith("."):
            continue
        halves = [int(h, 16).to_bytes(2, "little") for h in found.groups()[:2] if h]
        name = found[3].removesuffix(".w").removesuffix(".n").split(".")[0]
        matching = [c for c, pattern in MNEMONICS.items() if re.fullmatch(pattern + CONDITION, name)]
        got, registers = class_of(b"".join(halves))
        assert got == (matching[0] if matching else "other"), line
        seen.add(got)
        if got == "multiple":
            written = found[4].partition("{")[2].partition("}")[0]
            n = 0
            for part in filter(None, written.replace(" ", "").split(",")):
                first, _, last = part.partition("-")
                n += 1 if not last else {"fp": 11, "sl": 10}.get(last, 0) - int(first[1:]) + 1
            assert registers == (n or 2), line
    assert seen == set(CLASSES)


def test_counts_are_summed_by_class() -> None:
    push, mul, nop = b"\x30\xb5", b"\x48\x43", b"\x00\xbf"
    counts = count_classes([(push, 2), (mul, 5), (nop, 1), (push, 1)])
    assert counts == dict.fromkeys((*CLASSES, REGISTERS), 0) | {"multiple": 3, "multiply": 5, "other": 1, REGISTERS: 9}
