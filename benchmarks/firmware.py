"""Networks in C on emulated microcontrollers: what they execute, and what flash and RAM they take. Never a time.

The image is the network, its kernels and what the compiler's library must add; nothing else is linked, so that every
byte counted is the network's. Unicorn runs it, instruction by instruction: counts are those executed (what a condition
skips within an IT block is not), the same in every run. Stack is what a painted memory has lost its paint of.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgecomp.errors import ParityError, TargetError
from edgecomp.exporters.c_facts import NetworkFacts, read_facts
from edgecomp.graph import Array
from edgecomp.report import table

from .thumb import count_classes

_FLASH, _RAM, _END = 0x0800_0000, 0x2000_0000, 0x3000_0000
_MAPPED_BYTES = 16 << 20
_ARENA, _IN, _OUT, _STACK_TOP = _RAM, _RAM + (10 << 20), _RAM + (12 << 20), _RAM + (15 << 20)
_STACK_BYTES = 1 << 16
_PAINT = 0xA5
_TIMEOUT_S = 300
_SLICE_US = 500_000
_WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Wpedantic", "-Werror")
_OPTIONS = ("-std=c99", "-O2", "-mthumb", "-ffunction-sections", "-fdata-sections")
_LINK_SCRIPT = f"""\
MEMORY {{
  FLASH (rx): ORIGIN = {_FLASH:#x}, LENGTH = 16M
  RAM (rwx): ORIGIN = {_RAM:#x}, LENGTH = 8M
}}
SECTIONS {{
  .text : {{ *(.text*) }} > FLASH
  .rodata : {{ *(.rodata*) }} > FLASH
  .data : {{ *(.data*) }} > RAM AT> FLASH
  .bss : {{ *(.bss*) *(COMMON) }} > RAM
  /DISCARD/ : {{ *(.ARM.exidx*) *(.ARM.extab*) *(.comment) *(.ARM.attributes) }}
}}
"""
# What a freestanding compiler without a C library must find: four functions are what it may always call.
_STRING_H = """\
#include <stddef.h>
void *memcpy(void *, const void *, size_t);
void *memmove(void *, const void *, size_t);
void *memset(void *, int, size_t);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """How a core is named.

    Attributes:
        gcc: options of arm-none-eabi-gcc.
        zig: of zig cc, -mcpu.
        unicorn: the name of its model.
    """

    gcc: tuple[str, ...]
    zig: str
    unicorn: str


CORES: Mapping[str, Core] = {
    "Cortex-M0+": Core(gcc=("-mcpu=cortex-m0plus",), zig="cortex_m0plus", unicorn="UC_CPU_ARM_CORTEX_M0"),
    "Cortex-M4": Core(
        gcc=("-mcpu=cortex-m4", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"),
        zig="cortex_m4",
        unicorn="UC_CPU_ARM_CORTEX_M4",
    ),
    "Cortex-M7": Core(
        gcc=("-mcpu=cortex-m7", "-mfloat-abi=hard", "-mfpu=fpv5-d16"), zig="cortex_m7", unicorn="UC_CPU_ARM_CORTEX_M7"
    ),
    "Cortex-M33": Core(
        gcc=("-mcpu=cortex-m33", "-mfloat-abi=hard", "-mfpu=fpv5-sp-d16"),
        zig="cortex_m33+dsp",
        unicorn="UC_CPU_ARM_CORTEX_M33",
    ),
}
"""By the name that a target's file gives its cpu."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Firmware:
    """A linked image.

    Attributes:
        path: of the ELF file.
        compiler: that made it, with its version.
        facts: of the network.
        code_bytes: in flash.
        weight_bytes: packed codes and their levels, in flash.
        constant_bytes: all other constants, in flash.
        static_bytes: in RAM, beside arena and stack.
    """

    path: Path
    compiler: str
    facts: NetworkFacts
    code_bytes: int
    weight_bytes: int
    constant_bytes: int
    static_bytes: int

    @property
    def flash_bytes(self) -> int:
        """Sum up what the image takes of flash."""
        return self.code_bytes + self.weight_bytes + self.constant_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Emulated:
    """What running images has shown.

    Attributes:
        outputs: int8 (N, ...), as the network lays them out.
        instructions: executed for the last image; 0 if they were not counted.
        step_instructions: of it by call of a kernel, in order.
        classes: of it, see `thumb`.
        stack_bytes: the most of all images.
    """

    outputs: Array
    instructions: int
    step_instructions: tuple[int, ...]
    classes: Mapping[str, int]
    stack_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FirmwareReport:
    """What an emulated core says of a network: no latency is in it.

    Attributes:
        target, cpu: the core, by its target's name and by its own.
        compiler: with its version.
        emulator: with its version.
        n_images: that were run; every output equals the reference's.
        instructions: executed for an image.
        steps, classes: instructions by layer, and by class as in `thumb`.
        code_bytes, weight_bytes, constant_bytes: flash.
        arena_bytes, static_bytes, stack_bytes, border_bytes: RAM.
        border_name: what the last is: the output, and the input where that cannot lie in the arena.
    """

    target: str
    cpu: str
    compiler: str
    emulator: str
    n_images: int
    instructions: int
    steps: Mapping[str, int]
    classes: Mapping[str, int]
    code_bytes: int
    weight_bytes: int
    constant_bytes: int
    arena_bytes: int
    static_bytes: int
    stack_bytes: int
    border_bytes: int
    border_name: str

    @property
    def flash_bytes(self) -> int:
        """Sum up what the image takes of flash."""
        return self.code_bytes + self.weight_bytes + self.constant_bytes

    @property
    def ram_bytes(self) -> int:
        """Sum up what a run takes of RAM."""
        return self.arena_bytes + self.static_bytes + self.stack_bytes + self.border_bytes

    def table(self) -> str:
        """Give it for people."""
        parts = (
            f"flash: {self.flash_bytes:,} bytes = code {self.code_bytes:,} + weights {self.weight_bytes:,} + other "
            f"constants {self.constant_bytes:,}",
            f"RAM: {self.ram_bytes:,} bytes = arena {self.arena_bytes:,} + static {self.static_bytes:,} + stack "
            f"{self.stack_bytes:,} + {self.border_name} {self.border_bytes:,}",
            f"instructions an image: {self.instructions:,}; outputs equal the reference's on {self.n_images} "
            f"image{'s' * (self.n_images != 1)}",
        )
        rows = [
            (name, f"{n:,}", f"{100 * n / max(1, self.instructions):.1f} %")
            for name, n in sorted(self.steps.items(), key=lambda step: -step[1])
        ]
        title = f"{self.target}, emulated by {self.emulator}, compiled by {self.compiler}"
        return "\n".join((title, "", *parts, "", table(rows, ("layer", "instructions", "share"))))

    def to_json(self) -> dict[str, object]:
        """Give it for machines."""
        return {"source": "emulated", **asdict(self), "steps": dict(self.steps)}


def core_of(cpu: str | None, target: str) -> Core:
    """Look up how a target's core is named.

    Raises:
        TargetError: it is none that can be emulated here.
    """
    if cpu not in CORES:
        known = ", ".join(name.lower().replace("+", "plus") for name in CORES)
        raise TargetError(f"target {target}: {cpu or 'its core'} is not emulated; those that are: {known}")
    return CORES[cpu]


def cross_compiler(core: Core) -> tuple[list[str], str]:
    """Find a compiler for a core: arm-none-eabi-gcc, else the one of the package ziglang.

    Returns:
        the command, and its name with the version.

    Raises:
        TargetError: there is none.
    """
    if found := shutil.which("arm-none-eabi-gcc"):
        version = _said([found, "-dumpversion"])
        return [found, *core.gcc, "--specs=nano.specs", "-nostartfiles"], f"arm-none-eabi-gcc {version}"
    if importlib.util.find_spec("ziglang") is not None:
        zig = [sys.executable, "-m", "ziglang"]
        command = [*zig, "cc", "-target", "thumb-freestanding-eabi", f"-mcpu={core.zig}", "-nostdlib"]
        return command, f"zig cc {_said([*zig, 'version'])}"
    raise TargetError(
        "no compiler for Cortex-M is here: install arm-none-eabi-gcc, or the package ziglang: "
        "pip install 'edgecomp[firmware]'"
    )


def _said(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.strip()


def link(files: Mapping[str, bytes], core: Core, folder: Path) -> Firmware:
    """Compile and link a network.

    Args:
        files: what `exporters.files_of` gives for C.
        core: that it is for.
        folder: an empty one, for all files.

    Raises:
        TargetError: no compiler is there, or it refuses the sources.
        BundleError: the files hold no network in C.
    """
    source = next(name for name in files if name.startswith("network") and name.endswith(".c"))
    facts = read_facts(files[source], source)
    command, compiler = cross_compiler(core)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "image.ld").write_text(_LINK_SCRIPT, "utf-8")
    extra: list[str] = []
    if "ziglang" in command:
        (folder / "include").mkdir()
        (folder / "include" / "string.h").write_text(_STRING_H, "utf-8")
        extra = ["-I", str(folder / "include"), "-lcompiler_rt"]
    sources = [str(folder / name) for name in sorted(files) if name.endswith(".c")]
    image = folder / "image.elf"
    entry = (f"-Wl,-e,{facts.name}_run", "-T", str(folder / "image.ld"))
    whole = [*command, *_OPTIONS, "-Wl,--gc-sections", *_WARNINGS, *extra, *entry, "-o", str(image), *sources]
    try:
        # The compiler's own temporary files go with the folder, also when it is interrupted.
        env = {**os.environ, "TMPDIR": str(folder)}
        done = subprocess.run(whole, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=env)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise TargetError(f"{compiler} fails: {e}") from e
    if done.returncode:
        raise TargetError(f"{compiler} ends with {done.returncode}: {' '.join(done.stderr.split())[:300]}")
    return Firmware(path=image, compiler=compiler, facts=facts, **_sizes(image))


def _elf(path: Path) -> Any:
    try:
        module = importlib.import_module("elftools.elf.elffile")
    except ImportError as e:
        raise TargetError(f"{e.name} is missing; install it with: pip install 'edgecomp[firmware]'") from e
    return module.ELFFile.load_from_path(path)


def _sizes(image: Path) -> dict[str, int]:
    with _elf(image) as elf:
        sections = {s.name: s["sh_size"] for s in elf.iter_sections() if s["sh_flags"] & 2}
        symbols = list(elf.get_section_by_name(".symtab").iter_symbols())
    weights = sum(s["st_size"] for s in symbols if s.name.startswith("step") and s.name.endswith(("_codes", "_levels")))
    ram = sections.pop(".bss", 0) + sections.get(".data", 0)
    code = sections.pop(".text", 0)
    return {
        "code_bytes": code,
        "weight_bytes": weights,
        "constant_bytes": sum(sections.values()) - weights,
        "static_bytes": ram,
    }


def emulate(firmware: Firmware, core: Core, images: Array, *, counting: bool = True) -> Emulated:
    """Run images, int8 (N, ...) as the network lays them out; counting takes a hundred times as long.

    Raises:
        TargetError: the emulator is missing or stops, or the network does not end.
    """
    unicorn, arm = _unicorn()
    facts = firmware.facts
    with _elf(firmware.path) as elf:
        segments = [(s["p_vaddr"], s.data()) for s in elf.iter_segments() if s["p_type"] == "PT_LOAD" and s["p_filesz"]]
        (run,) = (s for s in elf.get_section_by_name(".symtab").iter_symbols() if s.name == f"{facts.name}_run")
        begin, size = run["st_value"] & ~1, run["st_size"]
    machine = unicorn.Uc(unicorn.UC_ARCH_ARM, unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS)
    machine.ctl_set_cpu_model(getattr(arm, core.unicorn))
    for start in (_FLASH, _RAM):
        machine.mem_map(start, _MAPPED_BYTES)
    machine.mem_map(_END, 1 << 12)
    for address, data in segments:
        machine.mem_write(address, data)
    counted = _Counted()
    if counting:
        machine.hook_add(unicorn.UC_HOOK_CODE, counted.instruction, begin=_FLASH, end=_FLASH + _MAPPED_BYTES)
        machine.hook_add(unicorn.UC_HOOK_CODE, counted.between_steps, begin=begin, end=begin + size - 1)
    outputs, stack_bytes = np.empty((len(images), *facts.output.shape), dtype=np.int8), 0
    for image, output in zip(images, outputs, strict=True):
        counted.start()
        # Nothing that an earlier image has left may matter.
        machine.mem_write(_ARENA, bytes([_PAINT]) * (facts.arena_bytes + _STACK_BYTES))
        machine.mem_write(_STACK_TOP - _STACK_BYTES, bytes([_PAINT]) * _STACK_BYTES)
        place = _IN if facts.input_offset is None else _ARENA + facts.input_offset
        machine.mem_write(place, np.ascontiguousarray(image, dtype=np.int8).tobytes())
        registers = {"SP": _STACK_TOP, "LR": _END | 1, "R0": place, "R1": _OUT, "R2": _ARENA}
        for name, value in registers.items():
            machine.reg_write(getattr(arm, f"UC_ARM_REG_{name}"), value)
        try:
            _run(machine, begin, arm.UC_ARM_REG_PC, counting=counting)
        except unicorn.UcError as e:
            raise TargetError(f"the emulated network stops: {e}") from e
        result = bytes(machine.mem_read(_OUT, facts.output.n_bytes))
        output[...] = np.frombuffer(result, dtype=np.int8).reshape(facts.output.shape)
        stack = np.frombuffer(bytes(machine.mem_read(_STACK_TOP - _STACK_BYTES, _STACK_BYTES)), dtype=np.uint8)
        touched = np.flatnonzero(stack != _PAINT)
        stack_bytes = max(stack_bytes, _STACK_BYTES - int(touched[0]) if len(touched) else 0)
        beyond = bytes(machine.mem_read(_ARENA + facts.arena_bytes, _STACK_BYTES))
        if beyond != bytes([_PAINT]) * _STACK_BYTES:
            raise TargetError("the emulated network writes behind its arena")
    return Emulated(
        outputs=outputs,
        instructions=counted.n,
        step_instructions=counted.steps(),
        classes=count_classes((bytes(machine.mem_read(*place)), n) for place, n in counted.at.items()),
        stack_bytes=stack_bytes,
    )


def _run(machine: Any, begin: int, pc: int, *, counting: bool) -> None:
    """Run from `begin` until the end.

    Python cannot raise out of the emulator's calls, nor act on a signal while it runs native code: a signal stops it,
    and is then handled as it would have been; native code gives way every now and then.

    Raises:
        TargetError: there is no end.
    """
    signals: list[int] = []

    def stop(number: int, frame: object) -> None:
        signals.append(number)
        machine.emu_stop()

    handlers: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, stop)
    until = time.monotonic() + _TIMEOUT_S
    try:
        address = begin
        while address != _END and not signals:
            if time.monotonic() > until:
                raise TargetError(f"the emulated network does not end within {_TIMEOUT_S} s")
            # Counted, it must not be cut into slices, where an instruction might be counted twice.
            machine.emu_start(address | 1, _END, timeout=0 if counting else _SLICE_US)
            address = machine.reg_read(pc)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in signals:
        signal.raise_signal(number)


class _Counted:
    """Counts instructions, all and by call of a kernel: what is executed between two visits to the calling function."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.n = 0
        self._own = 0
        self._calls: list[int] = []
        self.at: dict[tuple[int, int], int] = {}

    def instruction(self, _: object, address: int, size: int, *__: object) -> None:
        self.n += 1
        self.at[address, size] = self.at.get((address, size), 0) + 1

    def between_steps(self, *_: object) -> None:
        # This hook follows the other: an instruction of the caller has been counted once since the one before it.
        if self.n - self._own > 1 and self._own:
            self._calls.append(self.n - self._own - 1)
        self._own = self.n

    def steps(self) -> tuple[int, ...]:
        return tuple(self._calls)


def _unicorn() -> tuple[Any, Any]:
    try:
        return importlib.import_module("unicorn"), importlib.import_module("unicorn.arm_const")
    except ImportError as e:
        raise TargetError(f"{e.name} is missing; install it with: pip install 'edgecomp[firmware]'") from e


def emulator_name() -> str:
    """Name the emulator with its version.

    Raises:
        TargetError: it is missing.
    """
    return f"Unicorn {_unicorn()[0].__version__}"


def measure_firmware(
    files: Mapping[str, bytes],
    target: str,
    cpu: str | None,
    images: Array,
    expected: Array,
    folder: Path,
    progress: Callable[[int], object] = lambda n: None,
) -> FirmwareReport:
    """Build a network for a core, run images, and compare every output byte.

    Args:
        files: as `link` takes them.
        target: its name, for the report.
        cpu: as its file names the core.
        images: int8 (N, ...), as the network lays them out.
        expected: int8 (N, ...), the reference's outputs.
        folder: an empty one.
        progress: told how many images more are done.

    Raises:
        ParityError: an output is not the reference's.
        TargetError: a tool is missing, or fails.
    """
    core = core_of(cpu, target)
    emulator = emulator_name()
    firmware = link(files, core, folder)
    stack = 0
    for i in range(len(images)):
        run = emulate(firmware, core, images[i : i + 1], counting=i == len(images) - 1)
        stack = max(stack, run.stack_bytes)
        if not np.array_equal(run.outputs[0], expected[i]):
            raise ParityError(
                f"target {target}: image {i} does not give the reference's output: the files were changed, or it is a "
                "defect of edgecomp or of the compiler"
            )
        progress(1)
    facts = firmware.facts
    names = facts.steps
    counts = dict.fromkeys(names, 0)
    for name, n in zip(names, run.step_instructions, strict=True):
        counts[name] += n
    return FirmwareReport(
        target=target,
        cpu=str(cpu),
        compiler=firmware.compiler,
        emulator=emulator,
        n_images=len(images),
        instructions=run.instructions,
        steps=counts,
        classes=run.classes,
        code_bytes=firmware.code_bytes,
        weight_bytes=firmware.weight_bytes,
        constant_bytes=firmware.constant_bytes,
        arena_bytes=facts.arena_bytes,
        static_bytes=firmware.static_bytes,
        stack_bytes=stack,
        border_bytes=facts.output.n_bytes + (facts.input.n_bytes if facts.input_offset is None else 0),
        border_name="input and output" if facts.input_offset is None else "output (the input lies in the arena)",
    )
