"""Run firmware.elf in an emulated Cortex-M4 and print what comes out of its serial port.

    python run.py build/firmware.elf

Needs the packages unicorn and pyelftools: pip install 'edgecomp[firmware]'.
"""

from __future__ import annotations

import sys

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from unicorn import UC_ARCH_ARM, UC_HOOK_MEM_WRITE, UC_MODE_MCLASS, UC_MODE_THUMB, Uc
from unicorn import arm_const as arm

FLASH, RAM, UART, SYSTEM = 0x0000_0000, 0x2000_0000, 0x4000_4000, 0xE000_E000
MOST_US = 60_000_000


def run(path: str) -> bytes:
    """Run a firmware from reset until it halts.

    Args:
        path: of the ELF file.

    Returns:
        the bytes that it has sent.

    Raises:
        SystemExit: it does not halt.
    """
    machine = Uc(UC_ARCH_ARM, UC_MODE_THUMB | UC_MODE_MCLASS)
    machine.ctl_set_cpu_model(arm.UC_CPU_ARM_CORTEX_M4)
    for start, n_bytes in ((FLASH, 64 << 10), (RAM, 48 << 10), (UART, 4 << 10), (SYSTEM, 4 << 10)):
        machine.mem_map(start, n_bytes)
    with ELFFile.load_from_path(path) as elf:
        for segment in elf.iter_segments("PT_LOAD"):
            # From flash, where a programmer would have put it: the firmware itself fills its RAM.
            machine.mem_write(segment["p_paddr"], segment.data())
        (halt,) = elf.get_section_by_name(".symtab").get_symbol_by_name("halt")
    sent = bytearray()

    def written(_: object, kind: int, address: int, n_bytes: int, value: int, data: object) -> None:
        if address == UART:
            sent.append(value & 0xFF)

    machine.hook_add(UC_HOOK_MEM_WRITE, written, begin=UART, end=UART + 3)
    stack, reset = (int.from_bytes(machine.mem_read(FLASH + 4 * i, 4), "little") for i in range(2))
    machine.reg_write(arm.UC_ARM_REG_SP, stack)
    end = halt["st_value"] & ~1
    machine.emu_start(reset | 1, end, timeout=MOST_US)
    if machine.reg_read(arm.UC_ARM_REG_PC) != end:
        raise SystemExit(f"{path}: does not halt within {MOST_US // 1_000_000} s; it has sent {bytes(sent)!r}")
    return bytes(sent)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("expected one argument: firmware.elf")
    try:
        print(run(sys.argv[1]).decode("ascii"), end="")
    except (OSError, ELFError) as e:
        raise SystemExit(f"{sys.argv[1]}: is no firmware.elf: {e}") from e
