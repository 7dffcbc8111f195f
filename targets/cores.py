"""Cores that QEMU's user mode knows, the boards that have them, and what a file system for them is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from edgecomp.errors import UsageError
from edgecomp.targets import SUFFIX, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A kind of processor, with a root file system of its own.

    Attributes:
        name: as `uname -m` says it.
        debian: as Debian calls it.
        qemu: the emulator.
        packages: of Debian, in the root file system; apt adds what they depend on.
        wheels: those that run in this machine's version where this machine has it, so that outputs can be compared;
            without what they name as dependencies: running models needs none of it.
        platforms: of the wheels.
        modules: what is imported to try the file system.
        runtimes: by name in `benchmarks.runners`; the value runs on this machine, for outputs to compare with.
        classes: whether instructions are told apart.
    """

    name: str
    debian: str
    qemu: str
    packages: tuple[str, ...]
    wheels: tuple[str, ...]
    platforms: tuple[str, ...]
    modules: tuple[str, ...]
    runtimes: Mapping[str, str]
    classes: bool


_PACKAGES = ("python3", "libgomp1", "libstdc++6", "coreutils", "dash", "tar")
AARCH64 = Machine(
    name="aarch64",
    debian="arm64",
    qemu="qemu-aarch64",
    packages=_PACKAGES,
    wheels=("numpy", "onnxruntime", "ai-edge-litert"),
    platforms=("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"),
    modules=("numpy", "onnxruntime", "ai_edge_litert.interpreter"),
    runtimes=MappingProxyType(
        {name: name for name in ("onnxruntime", "onnxruntime-lean", "litert", "litert-reference")}
    ),
    classes=True,
)
# PyPI has neither numpy nor onnxruntime nor LiteRT for it: numpy is Debian's, for which this runtime was made.
ARMV7 = Machine(
    name="armv7l",
    debian="armhf",
    qemu="qemu-arm",
    packages=(*_PACKAGES, "python3-numpy"),
    wheels=("tflite-runtime",),
    platforms=("manylinux_2_34_armv7l",),
    modules=("numpy", "tflite_runtime.interpreter"),
    runtimes=MappingProxyType({"tflite-runtime": "litert"}),
    classes=False,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """A core that QEMU knows.

    Attributes:
        machine: its kind.
        name: as people say it.
        qemu: what `-cpu` takes.
        cpuinfo: the lines of /proc/cpuinfo that say which core and which instructions: a program asks there, and would
            see this machine's processor. After Linux 6.1 on the board of that core.
    """

    machine: Machine
    name: str
    qemu: str
    cpuinfo: Mapping[str, str]


def _core(name: str, qemu: str, features: str, part: str, variant: str, revision: str) -> Core:
    lines = {
        "BogoMIPS": "108.00",
        "Features": features,
        "CPU implementer": "0x41",
        "CPU architecture": "8",
        "CPU variant": variant,
        "CPU part": part,
        "CPU revision": revision,
    }
    return Core(machine=AARCH64, name=name, qemu=qemu, cpuinfo=MappingProxyType(lines))


_V8 = "fp asimd evtstrm crc32 cpuid"
_V82 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
_A53 = _core("Cortex-A53", "cortex-a53", _V8, "0xd03", "0x0", "4")
_A72 = _core("Cortex-A72", "cortex-a72", _V8, "0xd08", "0x0", "3")
_A76 = _core("Cortex-A76", "cortex-a76", _V82, "0xd0b", "0x4", "1")
# Linux 6.1 for 32 bits on a Raspberry Pi 2; the kernel of such a system may have 64.
_A7 = Core(
    machine=ARMV7,
    name="Cortex-A7",
    qemu="cortex-a7",
    cpuinfo=MappingProxyType(
        {
            "model name": "ARMv7 Processor rev 5 (v7l)",
            "BogoMIPS": "38.40",
            "Features": "half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae evtstrm",
            "CPU implementer": "0x41",
            "CPU architecture": "7",
            "CPU variant": "0x0",
            "CPU part": "0xc07",
            "CPU revision": "5",
        }
    ),
)
EMULATED: Mapping[str, Core] = MappingProxyType(
    {
        "rpi-zero2w-emulated": _A53,
        "rpi3b-emulated": _A53,
        "rpi4-emulated": _A72,
        "rpi5-emulated": _A76,
        "armv7-emulated": _A7,
    }
)
"""Emulated boards by name: that of the board, and SUFFIX."""


def core_of(target: str) -> Core:
    """Look up the core of an emulated board.

    Raises:
        UsageError: it is none.
    """
    if target not in EMULATED:
        hint = nearest(target.removesuffix(SUFFIX) + SUFFIX, EMULATED)
        raise UsageError(f"target {target!r:.80} is not emulated; {hint}")
    return EMULATED[target]
