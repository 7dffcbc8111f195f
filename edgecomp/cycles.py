"""Cycles that a microcontroller's core takes for instructions of a class, as Arm publishes them: fewest and most.

Memory without wait states and branches that are taken are assumed. Not here: how instructions are counted
(`benchmarks.firmware`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgecomp.errors import TargetError

REGISTERS = "multiple_registers"
"""Beside the classes, of which each instruction has one: the registers that those of class "multiple" move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleTable:
    """What a core takes.

    Attributes:
        cycles: fewest and most, by class as `benchmarks.thumb` names them; "multiple_registers" is for each register
            that loads and stores of several move, beside the instruction's own.
        source: where it was read.
        error: what it showed on published figures, for people.
    """

    cycles: Mapping[str, tuple[float, float]]
    source: str
    error: str


_M4: Mapping[str, tuple[float, float]] = {
    "load": (1, 2),
    "store": (1, 2),
    "multiple": (1, 1),
    "multiple_registers": (1, 1),
    "multiply": (1, 1),
    "divide": (2, 12),
    "branch": (2, 4),
    "float": (1, 3),
    "other": (1, 1),
}
_M0PLUS: Mapping[str, tuple[float, float]] = {
    "load": (2, 2),
    "store": (2, 2),
    "multiple": (1, 1),
    "multiple_registers": (1, 1),
    "multiply": (1, 1),
    "divide": (1, 1),
    "branch": (1, 3),
    "float": (1, 1),
    "other": (1, 1),
}
TABLES: Mapping[str, CycleTable] = {
    "Cortex-M4": CycleTable(
        cycles=_M4,
        source="Arm Cortex-M4 Processor Technical Reference Manual, instruction set summary",
        error="the middle of the range was 3 % off at most on three networks with CMSIS-NN's kernels (NUCLEO-L4R5ZI)",
    ),
    "Cortex-M33": CycleTable(
        cycles=_M4,
        source="as the Cortex-M4's: Arm publishes no table of the Cortex-M33",
        error="the middle of the range was 2 % below to 24 % above published figures (nRF5340, RA6M4)",
    ),
    "Cortex-M0+": CycleTable(
        cycles=_M0PLUS,
        source="Arm Cortex-M0+ Processor Technical Reference Manual, instruction set summary; multiplier of one cycle",
        error="not compared with published figures: there are none of the same kernels",
    ),
}
"""By the core's name. The Cortex-M7 issues two instructions at once, by rules nobody publishes: it has no table."""


def cycles_of(cpu: str | None, counts: Mapping[str, int]) -> tuple[float, float]:
    """Give the fewest and the most cycles that instructions take.

    Args:
        cpu: the core's name.
        counts: executed instructions by class, and "multiple_registers".

    Raises:
        TargetError: no table of that core is published.
    """
    if cpu is None or cpu not in TABLES:
        raise TargetError(
            f"no cycles of instructions are published for a {cpu}, only for {', '.join(TABLES)}; "
            "estimate the folder instead of its report"
        )
    table = TABLES[cpu].cycles
    low, high = (sum(n * table[name][i] for name, n in counts.items()) for i in (0, 1))
    return low, high
