"""What decides how fast a board computes: facts of its target, and what is usual for its core where they are silent.

Not here: how long a network takes on it (`latency`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgecomp.errors import TargetError, UsageError
from edgecomp.target import ISA, Target

_MB = 1_000_000
_KIB = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """What is usual for a core.

    Attributes:
        fp32_macs_per_cycle: most multiply-adds of float32 in a cycle.
        int8_macs_per_cycle: of a microcontroller: what its instructions allow beside loads and branches.
        bits: 64 where it can run AArch64, 32 for the others of the A class, 0 for microcontrollers.
        l2_bytes: a middling second-level cache, with what one core can fill of a third.
        copy_bytes_per_s: what one thread copies in main memory on a middling board.
        fill_bytes_per_s: what it writes.
        reorders: whether it runs instructions out of their order, and so waits less.
        fp16: whether it adds and multiplies in half precision.
        dotprod: whether it sums products of four bytes at once, or of eight (Helium).
    """

    fp32_macs_per_cycle: float
    int8_macs_per_cycle: float = 0.0
    bits: int = 64
    l2_bytes: int = 512 * _KIB
    copy_bytes_per_s: int = 1_400 * _MB
    fill_bytes_per_s: int = 4_000 * _MB
    reorders: bool = False
    fp16: bool = False
    dotprod: bool = False


def _old(peak: float, copy: int, fill: int, *, reorders: bool = False) -> Core:
    return Core(
        fp32_macs_per_cycle=peak,
        bits=32,
        copy_bytes_per_s=copy * _MB,
        fill_bytes_per_s=fill * _MB,
        reorders=reorders,
    )


def _wide(
    peak: float, copy: int, fill: int, l2_kib: int, *, fp16: bool = False, dotprod: bool = False, reorders: bool = True
) -> Core:
    return Core(
        fp32_macs_per_cycle=peak,
        l2_bytes=l2_kib * _KIB,
        copy_bytes_per_s=copy * _MB,
        fill_bytes_per_s=fill * _MB,
        reorders=reorders,
        fp16=fp16 or dotprod,
        dotprod=dotprod,
    )


def _micro(int8_peak: float, fp32_peak: float, *, helium: bool = False) -> Core:
    return Core(
        fp32_macs_per_cycle=fp32_peak,
        int8_macs_per_cycle=int8_peak,
        bits=0,
        l2_bytes=0,
        copy_bytes_per_s=0,
        fill_bytes_per_s=0,
        dotprod=helium,
    )


CORES: Mapping[str, Core] = {
    "ARM1176JZF-S": _old(0.5, 415, 1_630),
    "Cortex-A5": _old(0.5, 500, 1_500),
    "Cortex-A7": _old(1, 900, 2_500),
    "Cortex-A8": _old(1, 500, 1_500),
    "Cortex-A9": _old(1, 900, 2_500, reorders=True),
    "Cortex-A15": _old(4, 2_000, 4_500, reorders=True),
    "Cortex-A17": _old(2, 1_500, 4_000, reorders=True),
    "Cortex-A35": Core(fp32_macs_per_cycle=2),
    "Cortex-A53": Core(fp32_macs_per_cycle=4),
    "Cortex-A55": _wide(4, 3_000, 7_000, 512, dotprod=True, reorders=False),
    "Cortex-A57": _wide(4, 3_700, 8_500, 2_048),
    "Cortex-A72": _wide(4, 3_000, 6_000, 1_024),
    "Cortex-A73": _wide(4, 4_200, 8_500, 1_024),
    "Cortex-A75": _wide(8, 6_000, 12_000, 1_024, fp16=True),  # whose chips have no dot product (Snapdragon 845, 670)
    "Cortex-A76": _wide(8, 6_000, 12_000, 2_560, dotprod=True),
    "Cortex-A77": _wide(8, 8_000, 16_000, 2_560, dotprod=True),
    "Cortex-A78": _wide(8, 8_000, 20_000, 2_560, dotprod=True),
    "Cortex-A78AE": _wide(8, 8_000, 20_000, 2_560, dotprod=True),
    "Neoverse-N1": _wide(8, 10_000, 30_000, 4_096, dotprod=True),
    "Cortex-X1": _wide(16, 10_000, 25_000, 4_096, dotprod=True),
    "Cortex-M0": _micro(0.15, 0.02),
    "Cortex-M0+": _micro(0.15, 0.02),
    "Cortex-M3": _micro(0.3, 0.02),
    "Cortex-M4": _micro(0.8, 0.3),
    "Cortex-M7": _micro(1.5, 0.5),
    "Cortex-M33": _micro(1, 0.3),
    "Cortex-M55": _micro(8, 1, helium=True),
    "Cortex-M85": _micro(8, 2, helium=True),
}
"""Peak rates of A7, A53, A55, A72 and A76 are measured (pigirons/cpufp, MegEngine/MegPeak). The others are what the
widths of their pipelines allow, those of microcontrollers too; bandwidths are middling ones of ThomasKaiser/sbc-bench's
tables. A target's own facts stand above all of these."""

_UNKNOWN_64, _UNKNOWN_32 = Core(fp32_macs_per_cycle=4, reorders=True), _old(1, 900, 2_500)
_HELIUM = frozenset({"helium", "mve"})
_UNKNOWN_DOTPROD = _wide(8, 6_000, 12_000, 1_024, dotprod=True)
_LIKE: Sequence[tuple[str, frozenset[str]]] = (
    ("Cortex-M55", _HELIUM),
    ("Cortex-M0+", frozenset({"armv6-m", "armv8-m.base"})),
    ("Cortex-M4", frozenset({"armv7e-m", "dsp"})),
    ("Cortex-M3", frozenset({"armv7-m", "armv8-m.main", "armv8.1-m.main"})),
)
"""What an unknown microcontroller computes like: the first core of whose instruction sets it has one. The DSP
extension, which multiplies two numbers at once, is an option from ARMv8-M on, and in the baseline is not to be had."""
_MICRO = frozenset(name for name in ISA if name.endswith(("-m", "-m.base", "-m.main"))) | _HELIUM
_OTHERS = frozenset({"aarch64", "armv6", "armv7", "neon", "dotprod", "i8mm"})
"""What only microcontrollers have, and what none of them has."""
_SLOWEST_HZ, _SLOWEST_MICRO_HZ = 10_000_000, 32_768
"""Less than any core of the A class runs at, and a watch crystal's, the slowest clock of a microcontroller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """A board as an estimate sees it.

    Attributes:
        board: the target's name.
        core: its name.
        known: whether the core is one of CORES.
        micro: whether it is a microcontroller: one core, and no main memory behind a cache.
        narrow: whether a 64-bit core runs 32-bit programs.
        reorders: whether it runs instructions out of their order.
        cores: of this kind.
        clock_hz: of a core.
        macs_per_cycle: most of a core, by precision.
        dotprod, fp16: whether the instructions are there.
        l2_bytes: second- and third-level cache that one core can fill.
        copy_bytes_per_s: what one thread copies in main memory; 0 for a microcontroller.
        fill_bytes_per_s: what it writes.
        assumed: facts that the target does not give.
    """

    board: str
    core: str
    known: bool
    micro: bool
    narrow: bool
    reorders: bool
    cores: int
    clock_hz: float
    macs_per_cycle: Mapping[str, float]
    dotprod: bool
    fp16: bool
    l2_bytes: float
    copy_bytes_per_s: float
    fill_bytes_per_s: float
    assumed: tuple[str, ...]


def core_name(cpu: str) -> str:
    """Spell a core as CORES does, whatever its capitals; one that is not there stays as it is."""
    return next((name for name in CORES if name.lower() == cpu.strip().lower()), cpu)


def is_micro(cpu: str) -> bool:
    """Tell whether a core is a microcontroller's."""
    return cpu.lower().startswith("cortex-m")


def check_core(target: Target, where: str) -> None:
    """Refuse facts that a core cannot have; of one that is neither known nor a Cortex, all but a clock are believed.

    Args:
        target: with its core spelled as `core_name` does.
        where: names it in errors.

    Raises:
        UsageError: isa names instructions that the core is without, or clock_hz is not in Hz.
    """
    cpu = target.cpu
    if cpu is None:
        return
    of_a_class = not is_micro(cpu) and (cpu in CORES or cpu.lower().startswith("cortex-a"))
    least_hz = _SLOWEST_HZ if of_a_class else _SLOWEST_MICRO_HZ
    if target.clock_hz is not None and target.clock_hz < least_hz:
        unit, factor = ("MHz", 10**6) if target.clock_hz < 10_000 else ("kHz", 10**3)
        raise UsageError(
            f"{where}: clock_hz is {target.clock_hz}, and no {cpu:.80} is slower than {least_hz:_}; it is in Hz: "
            f"{target.clock_hz} {unit} are {target.clock_hz * factor:_}"
        )
    lacking = _lacking(cpu) if is_micro(cpu) or of_a_class else frozenset()
    for name in target.isa:
        if name in lacking:
            possible = ", ".join(each for each in ISA if each not in lacking)
            raise UsageError(f"{where}: isa has {name!r}, which a {cpu:.80} is without; expected of {possible}")


def _lacking(cpu: str) -> frozenset[str]:
    """Name the instruction sets that a core is surely without; of one that is not in CORES, those of the other kind."""
    core = CORES.get(cpu)
    if is_micro(cpu):
        return _OTHERS if core is None or core.dotprod else _OTHERS | _HELIUM | {"armv8.1-m.main", "fp16"}
    if core is not None and core.bits == 32:
        return _MICRO | {"aarch64", "fp16", "dotprod", "i8mm"}
    return _MICRO if core is None or core.fp16 else _MICRO | {"fp16", "dotprod", "i8mm"}


def processor_of(target: Target) -> Processor:
    """Give what an estimate needs of a target.

    Raises:
        TargetError: the core or its clock is not given.
        UsageError: the core is not one of CORES, and the target does not give what stands for it: isa, of a
            microcontroller one of _LIKE, and, of the A class, fp32_macs_per_cycle.
    """
    if target.cpu is None or target.clock_hz is None:
        missing = "cpu" if target.cpu is None else "clock_hz"
        raise TargetError(
            f"target {target.name!r:.80}: {missing} is not known, which an estimate needs; "
            "take a board, or copy the target's file, add it, and give --target FILE.toml"
        )
    micro = is_micro(target.cpu)
    core, like = CORES.get(target.cpu), _like(target.isa) if micro else None
    if core is None:
        needed = ("isa",) if micro else ("isa", "fp32_macs_per_cycle")
        missing = " and ".join(fact for fact in needed if not getattr(target, fact))
        if missing:
            raise UsageError(
                f"target {target.name!r:.80}: nothing is known of a core {target.cpu!r:.80}: give {missing}, or one of "
                f"{', '.join(CORES)}"
            )
        if micro and like is None:
            sets = ", ".join(name for _, names in _LIKE for name in sorted(names))
            raise UsageError(
                f"target {target.name!r:.80}: nothing is known of a core {target.cpu!r:.80}, and isa does not say what "
                f"it is like: expected one of {sets} in it"
            )
    usual = core or (CORES[like] if like is not None else _usual(target.isa))
    assumed = [] if core else ["core" if like is None else f"what a {like} computes in a cycle"]
    isa = target.isa
    if not isa:
        assumed.append("isa")
    dotprod = not _HELIUM.isdisjoint(isa) or "dotprod" in isa if isa else usual.dotprod
    fp16 = "fp16" in isa if isa else usual.fp16

    def fact(name: str, value: int | None, otherwise: float) -> float:
        if value is not None:
            return value
        assumed.append(name)
        return otherwise

    if micro:
        fp32 = usual.fp32_macs_per_cycle
        peak = {"fp32": fp32, "fp16": fp32, "int8": usual.int8_macs_per_cycle}
        l2 = copy = fill = 0.0
    else:
        fp32 = float(target.fp32_macs_per_cycle or usual.fp32_macs_per_cycle)
        peak = {"fp32": fp32, "fp16": fp32 * (2 if fp16 else 1), "int8": fp32 * (4 if dotprod else 1)}
        l2 = fact("l2_bytes", target.l2_bytes, usual.l2_bytes) + (target.l3_bytes or 0)
        copy = fact("memory_copy_bytes_per_s", target.memory_copy_bytes_per_s, usual.copy_bytes_per_s)
        fill = fact("memory_fill_bytes_per_s", target.memory_fill_bytes_per_s, usual.fill_bytes_per_s)
    return Processor(
        board=target.name,
        core=target.cpu,
        known=core is not None,
        micro=micro,
        narrow=not micro and usual.bits == 64 and bool(isa) and "aarch64" not in isa,
        reorders=usual.reorders,
        cores=int(fact("cores", target.cores, 1 if micro else 4)),
        clock_hz=target.clock_hz,
        macs_per_cycle=peak,
        dotprod=dotprod,
        fp16=fp16,
        l2_bytes=l2,
        copy_bytes_per_s=copy,
        fill_bytes_per_s=fill,
        assumed=tuple(assumed),
    )


def _like(isa: tuple[str, ...]) -> str | None:
    return next((core for core, sets in _LIKE if not sets.isdisjoint(isa)), None)


def _usual(isa: tuple[str, ...]) -> Core:
    if "dotprod" in isa:
        return _UNKNOWN_DOTPROD
    return _UNKNOWN_64 if "aarch64" in isa or not isa else _UNKNOWN_32
