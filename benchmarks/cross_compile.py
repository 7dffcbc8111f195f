"""Networks in C compiled and linked for a microcontroller's core, with nothing else: every byte is theirs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecomp.errors import TargetError
from edgecomp.exporters.c_facts import NetworkFacts, read_facts

FLASH, RAM = 0x0800_0000, 0x2000_0000
_TIMEOUT_S = 300
_WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Wpedantic", "-Werror")
_OPTIONS = ("-std=c99", "-O2", "-ffunction-sections", "-fdata-sections")
_LINK_SCRIPT = f"""\
MEMORY {{
  FLASH (rx): ORIGIN = {FLASH:#x}, LENGTH = 16M
  RAM (rwx): ORIGIN = {RAM:#x}, LENGTH = 8M
}}
SECTIONS {{
  .text : {{ *(.text*) }} > FLASH
  .rodata : {{ *(.rodata*) }} > FLASH
  .data : {{ *(.data*) }} > RAM AT> FLASH
  .bss : {{ *(.bss*) *(COMMON) }} > RAM
  /DISCARD/ : {{ *(.ARM.exidx*) *(.ARM.extab*) *(.comment) *(.ARM.attributes) *(.debug*) }}
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
        gcc: options of arm-none-eabi-gcc and clang.
        zig: of zig cc, -mcpu.
        unicorn: the name of its model; None where only QEMU has the core.
    """

    gcc: tuple[str, ...]
    zig: str
    unicorn: str | None


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
    "Cortex-M55": Core(gcc=("-mcpu=cortex-m55", "-mfloat-abi=hard"), zig="cortex_m55", unicorn=None),
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


def core_of(cpu: str | None, target: str) -> Core:
    """Look up how a target's core is named.

    Raises:
        TargetError: it is none that can be emulated here.
    """
    if cpu not in CORES:
        known = ", ".join(name.lower().replace("+", "plus") for name in CORES)
        raise TargetError(f"target {target}: {cpu or 'its core'} is not emulated; those that are: {known}")
    return CORES[cpu]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """A compiler for a core.

    Attributes:
        name: with its version.
        compile_command: to which options and a source are added.
        link_command: to which options and objects are added.
        bare: there is no C library that it knows of, not even headers.
        libraries: what the image may need of its own.
    """

    name: str
    compile_command: Sequence[str]
    link_command: Sequence[str]
    bare: bool
    libraries: Sequence[str] = ()


def _gcc(core: Core) -> Compiler | None:
    found = shutil.which("arm-none-eabi-gcc")
    if found is None:
        return None
    command = [found, *core.gcc, "-mthumb"]
    link_command = [*command, "--specs=nano.specs", "-nostartfiles"]
    name = f"arm-none-eabi-gcc {_said([found, '-dumpversion'])}"
    return Compiler(name=name, compile_command=command, link_command=link_command, bare=False)


def _zig(core: Core) -> Compiler | None:
    if importlib.util.find_spec("ziglang") is None:
        return None
    zig = [sys.executable, "-m", "ziglang"]
    command = [*zig, "cc", "-target", "thumb-freestanding-eabi", f"-mcpu={core.zig}", "-nostdlib"]
    name = f"zig cc {_said([*zig, 'version'])}"
    return Compiler(
        name=name, compile_command=command, link_command=command, bare=True, libraries=("-lcompiler_rt",)
    )


def _clang(core: Core) -> Compiler | None:
    """Find clang; it has no linker of its own and no library for the core, for which there must be GCC's."""
    found, gcc = shutil.which("clang"), _gcc(core)
    if found is None or gcc is None:
        return None
    version = re.search(r"version (\S+)", _said([found, "--version"]))
    name = f"clang {version[1] if version else ''}, linked by {gcc.name}"
    command = [found, "--target=arm-none-eabi", *core.gcc, "-mthumb", "-ffreestanding"]
    return Compiler(name=name, compile_command=command, link_command=gcc.link_command, bare=True)


COMPILERS: Mapping[str, Callable[[Core], Compiler | None]] = {"gcc": _gcc, "zig": _zig, "clang": _clang}
"""By the name that --compiler takes; the first that is there is the default."""


def cross_compiler(core: Core, wanted: str | None = None) -> Compiler:
    """Find a compiler for a core.

    Args:
        core: the core.
        wanted: of `COMPILERS`; None for the first that is there.

    Raises:
        TargetError: there is none, or not the one that is wanted.
    """
    for name in COMPILERS if wanted is None else (wanted,):
        if (found := COMPILERS[name](core)) is not None:
            return found
    what = "no compiler for Cortex-M" if wanted is None else f"{wanted} for Cortex-M"
    raise TargetError(
        f"{what} is {'' if wanted is None else 'not '}here: install arm-none-eabi-gcc (clang needs it too), or the "
        "package ziglang: pip install 'edgecomp[firmware]'"
    )


def _said(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.strip()


def link(files: Mapping[str, bytes], core: Core, folder: Path, wanted: str | None = None) -> Firmware:
    """Compile and link a network.

    Args:
        files: what `exporters.files_of` gives for C.
        core: that it is for.
        folder: an empty one, for all files.
        wanted: as for `cross_compiler`.

    Raises:
        TargetError: no compiler is there, or it refuses the sources.
        BundleError: the files hold no network in C.
    """
    source = next(name for name in files if name.startswith("network") and name.endswith(".c"))
    facts = read_facts(files[source], source)
    compiler = cross_compiler(core, wanted)
    image = linked(compiler, files, _LINK_SCRIPT, f"{facts.name}_run", folder)
    return Firmware(path=image, compiler=compiler.name, facts=facts, **_sizes(image))


def linked(compiler: Compiler, files: Mapping[str, bytes], script: str, entry: str, folder: Path) -> Path:
    """Compile sources and link them.

    Args:
        compiler: for the core.
        files: the sources, which end in .c, and what they include.
        script: for the linker.
        entry: the function that the image begins with.
        folder: an empty one, for all files.

    Returns:
        the ELF file.

    Raises:
        TargetError: the compiler refuses the sources.
    """
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "image.ld").write_text(script, "utf-8")
    extra: list[str] = []
    if compiler.bare:
        (folder / "include").mkdir()
        (folder / "include" / "string.h").write_text(_STRING_H, "utf-8")
        extra = ["-I", "include"]
    objects = []
    for name in sorted(name for name in files if name.endswith(".c")):
        objects.append(f"{name}.o")
        whole = [*compiler.compile_command, *_OPTIONS, *_WARNINGS, *extra, "-c", "-o", objects[-1], name]
        _compile(compiler, whole, folder)
    options = (f"-Wl,-e,{entry}", "-Wl,--gc-sections", "-T", "image.ld")
    _compile(compiler, [*compiler.link_command, *options, "-o", "image.elf", *objects, *compiler.libraries], folder)
    return folder / "image.elf"


def _compile(compiler: Compiler, command: Sequence[str], folder: Path) -> None:
    try:
        # The compiler's own temporary files go with the folder, also when it is interrupted.
        env = {**os.environ, "TMPDIR": str(folder)}
        # From within it, and (image.ld) without what debuggers read, which names it: the image is the same anywhere.
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=env, cwd=folder
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise TargetError(f"{compiler.name} fails: {e}") from e
    if done.returncode:
        raise TargetError(f"{compiler.name} ends with {done.returncode}: {' '.join(done.stderr.split())[:300]}")


def open_elf(path: Path) -> Any:
    """Open an ELF file for reading, as a context.

    Raises:
        TargetError: pyelftools is missing.
    """
    try:
        module = importlib.import_module("elftools.elf.elffile")
    except ImportError as e:
        raise TargetError(f"{e.name} is missing; install it with: pip install 'edgecomp[firmware]'") from e
    return module.ELFFile.load_from_path(path)


def _sizes(image: Path) -> dict[str, int]:
    with open_elf(image) as elf:
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
