"""A network in C run from reset on a board that qemu-system-arm emulates: a second opinion beside Unicorn's.

With -icount shift=0 each instruction takes a nanosecond of emulated time, which the board's SysTick counts at the clock
of its core: the time of a run tells its instructions, to within one tick. QEMU counts by blocks of code, with what a
condition skips within an IT block. The input is a constant of the image; output and count come back through
semihosting, as a file.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgecomp.errors import TargetError
from edgecomp.exporters.c_facts import NetworkFacts
from edgecomp.graph import Array

from .cross_compile import Core, cross_compiler, linked

_PROGRAM = "qemu-system-arm"
_TIMEOUT_S = 300
_RAM_BYTES = 2 << 20
_OWN_BYTES = 64 << 10
"""What the program around a network takes at most of either memory, its stack among it."""
_RESULT = "result.bin"
_UNCOUNTED = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class _Board:
    """A board of QEMU's.

    Attributes:
        machine: its name there.
        flash: where the core looks for its first words.
        flash_bytes: that lie there.
        ram: where 2 MB of memory lie.
        tick_ns: of its SysTick.
    """

    machine: str
    flash: int
    flash_bytes: int
    ram: int
    tick_ns: float


_BOARDS: Mapping[str, _Board] = {
    "Cortex-M4": _Board(machine="mps2-an386", flash=0, flash_bytes=4 << 20, ram=0x2000_0000, tick_ns=40),
    "Cortex-M7": _Board(machine="mps2-an500", flash=0, flash_bytes=4 << 20, ram=0x2000_0000, tick_ns=40),
    "Cortex-M33": _Board(machine="mps2-an505", flash=0x1000_0000, flash_bytes=4 << 20, ram=0x3800_0000, tick_ns=50),
    "Cortex-M55": _Board(machine="mps3-an547", flash=0, flash_bytes=512 << 10, ram=0x3100_0000, tick_ns=31.25),
}
"""By the name that a target's file gives its cpu; of the Cortex-M0 QEMU has none with memory enough."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QemuRun:
    """What one run has shown.

    Attributes:
        emulator: with its version.
        output: int8, as the network lays it out.
        instructions: of `NAME_run`, to within one tick of the board's SysTick; None for more than it can count, 2^24
            ticks.
        stack_bytes: that it takes: what a painted memory has lost its paint of.
    """

    emulator: str
    output: Array
    instructions: int | None
    stack_bytes: int


def can_run(cpu: str | None) -> bool:
    """Tell whether qemu-system-arm is installed and has a board with that core."""
    return cpu in _BOARDS and shutil.which(_PROGRAM) is not None


def lacks(cpu: str | None, *, flash_bytes: int, ram_bytes: int) -> str | None:
    """Say which memory of the board a network, its input and output among it, does not fit into; None if it fits."""
    board = _BOARDS[str(cpu)]
    for kind, needed, there in (("flash", flash_bytes, board.flash_bytes), ("RAM", ram_bytes, _RAM_BYTES)):
        if needed + _OWN_BYTES > there:
            return f"{needed} bytes of {kind}; {board.machine}, the board of {_PROGRAM}, has {there}"
    return None


def run_in_qemu(
    files: Mapping[str, bytes],
    facts: NetworkFacts,
    core: Core,
    cpu: str | None,
    image: Array,
    folder: Path,
    compiler: str | None = None,
) -> QemuRun:
    """Run one image.

    Args:
        files: what `exporters.files_of` gives for C.
        facts: of the network.
        core: how it is named.
        cpu: as a target's file names it.
        image: int8, as the network lays it out.
        folder: an empty one, for all files.
        compiler: of `cross_compile.COMPILERS`; None for the first that is there.

    Raises:
        TargetError: a tool is missing or fails, or the network does not end.
    """
    emulator = qemu_name(cpu)
    board = _BOARDS[str(cpu)]
    sources = {**files, "main.c": _main(facts, image).encode()}
    elf = linked(cross_compiler(core, compiler), sources, _script(board), "reset", folder)
    command = [_PROGRAM, "-machine", board.machine, "-display", "none", "-monitor", "none", "-serial", "none"]
    command += ["-semihosting-config", "enable=on,target=native", "-icount", "shift=0", "-kernel", elf.name]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as e:
        raise TargetError(f"{_PROGRAM}: the network does not end within {_TIMEOUT_S} s") from e
    result = folder / _RESULT
    if done.returncode or not result.is_file():
        said = " ".join((done.stderr or "it gives no result").split())[:300]
        raise TargetError(f"{_PROGRAM} ends with {done.returncode}: {said}")
    data = result.read_bytes()
    ticks, stack = struct.unpack("<2I", data[:8])
    output = np.frombuffer(data[8:], dtype=np.int8).reshape(facts.output.shape)
    instructions = None if ticks == _UNCOUNTED else round(ticks * board.tick_ns)
    return QemuRun(emulator=emulator, output=output, instructions=instructions, stack_bytes=stack)


def qemu_name(cpu: str | None) -> str:
    """Name the emulator with its version.

    Raises:
        TargetError: it is not installed, or has no board with that core.
    """
    if not can_run(cpu):
        what = f"{cpu or 'the core'} is run by {_PROGRAM}, which is not installed"
        raise TargetError(f"{what}; on Debian: apt install {_PROGRAM}")
    said = subprocess.run([_PROGRAM, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    found = re.search(r"version (\S+)", said)
    return f"{_PROGRAM} {found[1] if found else ''}, -icount"


def _script(board: _Board) -> str:
    return f"""\
MEMORY {{
  FLASH (rx): ORIGIN = {board.flash:#x}, LENGTH = {board.flash_bytes}
  RAM (rwx): ORIGIN = {board.ram:#x}, LENGTH = {_RAM_BYTES}
}}
SECTIONS {{
  .vectors : {{ KEEP(*(.vectors)) }} > FLASH
  .text : {{ *(.text*) }} > FLASH
  .rodata : {{ *(.rodata*) }} > FLASH
  .data : {{ *(.data*) }} > RAM AT> FLASH
  .bss : {{ *(.bss*) *(COMMON) }} > RAM
  stack_top = ORIGIN(RAM) + LENGTH(RAM);
  /DISCARD/ : {{ *(.ARM.exidx*) *(.ARM.extab*) *(.comment) *(.ARM.attributes) *(.debug*) }}
}}
"""


def _main(facts: NetworkFacts, image: Array) -> str:
    """Write the program around the network; static memory is as QEMU begins, zero."""
    codes = ",".join(map(str, np.asarray(image, dtype=np.int8).reshape(-1).tolist()))
    name, upper = facts.name, facts.name.upper()
    start = "in" if facts.input_offset is None else f"(int8_t *)arena + {facts.input_offset}"
    return f"""\
#include <stdint.h>
#include <string.h>

#include "network.h"

#define SYSTICK ((volatile uint32_t *)0xE000E010u) /* control, reload, now: it counts down */
#define PAINT 0xA5A5A5A5u
#define PAINTED 4096 /* words below the stack pointer */
#define CPACR ((volatile uint32_t *)0xE000ED88u)

extern uint32_t stack_top[];
void reset(void);
__attribute__((section(".vectors"), used)) static const void *const vectors[2] = {{
  (const void *)stack_top, (const void *)(uintptr_t)reset}};

static const int8_t image[{upper}_INPUT_BYTES] = {{{codes}}};
static int8_t in[{upper}_INPUT_BYTES];
static int32_t arena[{upper}_ARENA_BYTES / 4 + 1];
static struct {{
  uint32_t ticks, stack;
  int8_t out[{upper}_OUTPUT_BYTES];
}} result;

static int32_t semihost(int32_t operation, const void *argument) {{
  register int32_t r0 __asm("r0") = operation;
  register const void *r1 __asm("r1") = argument;
  __asm volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
  return r0;
}}

void reset(void) {{
  const struct {{
    const char *name;
    int32_t mode, length;
  }} open = {{"{_RESULT}", 5, {len(_RESULT)}}};
  struct {{
    int32_t file;
    const void *data;
    int32_t n;
  }} write = {{0, &result, 8 + {upper}_OUTPUT_BYTES}};
  int8_t *place = {start};
  uint32_t start;
  volatile uint32_t *paint, *top;
  *CPACR |= 0xFu << 20; /* the floating-point unit, where there is one */
  memcpy(place, image, sizeof image);
  SYSTICK[1] = 0xFFFFFFu;
  SYSTICK[2] = 0;
  SYSTICK[0] = 5;
  while (SYSTICK[2] == 0) {{
  }}
  __asm volatile("mov %0, sp" : "=r"(top));
  for (paint = top - PAINTED; paint < top; paint++) *paint = PAINT;
  (void)SYSTICK[0]; /* reading it forgets that it has passed 0 */
  start = SYSTICK[2];
  if ({name}_run(place, result.out, arena) == 0) {{
    result.ticks = (start - SYSTICK[2]) & 0xFFFFFFu;
    if (SYSTICK[0] & 0x10000u) result.ticks = {_UNCOUNTED:#x}u;
    for (paint = top - PAINTED; paint < top && *paint == PAINT; paint++) {{
    }}
    result.stack = (uint32_t)((const volatile char *)top - (const volatile char *)paint);
    write.file = semihost(1, &open);
    semihost(5, &write);
    semihost(2, &write.file);
  }}
  (void)in;
  semihost(0x18, (const void *)0x20026u);
  for (;;) {{
  }}
}}
"""
