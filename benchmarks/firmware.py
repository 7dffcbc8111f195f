"""Networks in C on emulated microcontrollers: what they execute, and what flash and RAM they take. Never a time.

The image is the network, its kernels and what the compiler's library must add; nothing else is linked, so that every
byte counted is the network's. Unicorn runs it, instruction by instruction: counts are those executed (what a condition
skips within an IT block is not), the same in every run. Stack is what a painted memory has lost its paint of.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgecomp.errors import ParityError, TargetError
from edgecomp.graph import Array
from edgecomp.report import table

from .cross_compile import FLASH, RAM, Core, Firmware, core_of, link, open_elf
from .qemu_arm import QemuRun, can_run, lacks, qemu_name, run_in_qemu
from .thumb import count_classes

_END = 0x3000_0000
_MAPPED_BYTES = 16 << 20
_ARENA, _IN, _OUT, _STACK_TOP = RAM, RAM + (10 << 20), RAM + (12 << 20), RAM + (15 << 20)
_STACK_BYTES = 1 << 16
_PAINT = 0xA5
_TIMEOUT_S = 300
_SLICE_US = 500_000


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
        instructions: executed for an image; in QEMU alone by blocks, see `qemu_arm`.
        steps, classes: instructions by layer, and by class as in `thumb`; of QEMU alone none.
        code_bytes, weight_bytes, constant_bytes: flash.
        arena_bytes, static_bytes, stack_bytes, border_bytes: RAM.
        border_name: what the last is: the output, and the input where that cannot lie in the arena.
        qemu: the second emulator with its version, whose output is the same; None where it is not installed, or where
            its board has too little memory.
        qemu_instructions: as it counts, by blocks of code: those skipped within an IT block too; None for more than it
            can count.
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
    qemu: str | None = None
    qemu_instructions: int | None = None

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
        if self.qemu is not None:
            n = self.qemu_instructions
            count = "more than it counts" if n is None else f"{n:,}, by blocks"
            parts += (f"in {self.qemu}: {count}; the same output",)
        rows = [
            (name, f"{n:,}", f"{100 * n / max(1, self.instructions):.1f} %")
            for name, n in sorted(self.steps.items(), key=lambda step: -step[1])
        ]
        title = f"{self.target}, emulated by {self.emulator}, compiled by {self.compiler}"
        layers = ("", table(rows, ("layer", "instructions", "share"))) if rows else ()
        return "\n".join((title, "", *parts, *layers))

    def to_json(self) -> dict[str, object]:
        """Give it for machines."""
        return {"source": "emulated", **asdict(self), "steps": dict(self.steps)}


def emulate(firmware: Firmware, core: Core, images: Array, *, counting: bool = True) -> Emulated:
    """Run images, int8 (N, ...) as the network lays them out; counting takes a hundred times as long.

    Raises:
        TargetError: the emulator is missing or stops, or the network does not end.
    """
    unicorn, arm = _unicorn()
    facts = firmware.facts
    with open_elf(firmware.path) as elf:
        segments = [(s["p_vaddr"], s.data()) for s in elf.iter_segments() if s["p_type"] == "PT_LOAD" and s["p_filesz"]]
        (run,) = (s for s in elf.get_section_by_name(".symtab").iter_symbols() if s.name == f"{facts.name}_run")
        begin, size = run["st_value"] & ~1, run["st_size"]
    machine = unicorn.Uc(unicorn.UC_ARCH_ARM, unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS)
    assert core.unicorn is not None
    machine.ctl_set_cpu_model(getattr(arm, core.unicorn))
    for start in (FLASH, RAM):
        machine.mem_map(start, _MAPPED_BYTES)
    machine.mem_map(_END, 1 << 12)
    for address, data in segments:
        machine.mem_write(address, data)
    counted = _Counted()
    if counting:
        machine.hook_add(unicorn.UC_HOOK_CODE, counted.instruction, begin=FLASH, end=FLASH + _MAPPED_BYTES)
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
    compiler: str | None = None,
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
        compiler: of `cross_compile.COMPILERS`; None for the first that is there.

    Raises:
        ParityError: an output is not the reference's.
        TargetError: a tool is missing, or fails.
    """
    core = core_of(cpu, target)
    emulator = qemu_name(cpu) if core.unicorn is None else emulator_name()
    firmware = link(files, core, folder, compiler)
    facts = firmware.facts
    no_room = None
    if can_run(cpu):
        flash_bytes = firmware.code_bytes + firmware.weight_bytes + firmware.constant_bytes + images[0].nbytes
        ram_bytes = facts.arena_bytes + firmware.static_bytes + images[0].nbytes + expected[0].nbytes
        no_room = lacks(cpu, flash_bytes=flash_bytes, ram_bytes=ram_bytes)
        if no_room and core.unicorn is None:
            raise TargetError(f"target {target}: the network takes {no_room}; expected one that fits")

    def in_qemu(i: int) -> QemuRun:
        place = folder / f"qemu{i}"
        place.mkdir()
        return run_in_qemu(files, facts, core, cpu, images[i], place, compiler)

    def check(i: int, output: Array, where: str) -> None:
        if not np.array_equal(output, expected[i]):
            raise ParityError(
                f"target {target}: image {i} does not give the reference's output in {where}: the files were changed, "
                "or it is a defect of edgecomp or of the compiler"
            )

    stack, instructions, second = 0, 0, None
    counts: dict[str, int] = {}
    classes: Mapping[str, int] = {}
    for i in range(len(images)):
        if core.unicorn is None:
            alone = in_qemu(i)
            check(i, alone.output, emulator)
            if alone.instructions is None:
                raise TargetError(f"target {target}: {emulator} cannot count as many instructions as the network takes")
            instructions, stack = alone.instructions, max(stack, alone.stack_bytes)
        else:
            run = emulate(firmware, core, images[i : i + 1], counting=i == len(images) - 1)
            check(i, run.outputs[0], emulator)
            instructions, stack = run.instructions, max(stack, run.stack_bytes)
        progress(1)
    if core.unicorn is not None:
        classes = run.classes
        counts = dict.fromkeys(facts.steps, 0)
        for name, n in zip(facts.steps, run.step_instructions, strict=True):
            counts[name] += n
        if can_run(cpu) and no_room is None:
            second = in_qemu(len(images) - 1)
            check(len(images) - 1, second.output, second.emulator)
    return FirmwareReport(
        target=target,
        cpu=str(cpu),
        compiler=firmware.compiler,
        emulator=emulator,
        n_images=len(images),
        instructions=instructions,
        steps=counts,
        classes=classes,
        code_bytes=firmware.code_bytes,
        weight_bytes=firmware.weight_bytes,
        constant_bytes=firmware.constant_bytes,
        arena_bytes=facts.arena_bytes,
        static_bytes=firmware.static_bytes,
        stack_bytes=stack,
        border_bytes=facts.border_bytes,
        border_name=facts.border_name,
        qemu=None if second is None else second.emulator,
        qemu_instructions=None if second is None else second.instructions,
    )
