"""A board as a value: what is known of it, and where each fact was read. Not here: the boards (`edgecomp.targets`)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from edgecomp.errors import TargetError


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A board.

    A fact that differs from one machine to the next of that name is None: the host's cores, or a memory that is sold
    in several sizes unless the smallest is given.

    Attributes:
        name: e.g. "rpi4"; also the name of its file.
        description: for people, one line.
        cpu: the core, e.g. "Cortex-A72".
        cores: number of CPU cores.
        clock_hz: of the CPU.
        isa: instruction sets that decide kernel speed, e.g. "aarch64", "neon", "dotprod".
        fp32_macs_per_cycle: most float32 multiply-adds that one core does in a cycle.
        l1_bytes: data cache of a core.
        l2_bytes: second-level cache that one core can fill.
        l3_bytes: likewise.
        memory_copy_bytes_per_s: what one thread copies in main memory.
        memory_fill_bytes_per_s: what one thread writes, about what all threads can move together.
        ram_bytes: main memory, of the smallest version on sale.
        flash_bytes: program memory of a microcontroller; None on a board that boots from a card or disk.
        runtimes: names from `benchmarks.runners.RUNNERS` that run there.
        wheels: what the Python package index has for it, e.g. "onnxruntime 1.32.0 manylinux_2_28_aarch64".
        sources: where each fact was read, by attribute name.
    """

    name: str
    description: str
    cpu: str | None = None
    cores: int | None = None
    clock_hz: int | None = None
    isa: tuple[str, ...] = ()
    fp32_macs_per_cycle: int | None = None
    l1_bytes: int | None = None
    l2_bytes: int | None = None
    l3_bytes: int | None = None
    memory_copy_bytes_per_s: int | None = None
    memory_fill_bytes_per_s: int | None = None
    ram_bytes: int | None = None
    flash_bytes: int | None = None
    runtimes: tuple[str, ...]
    wheels: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", MappingProxyType(dict(self.sources)))


_TEXTS = ("name", "description", "cpu")
_COUNTS = (
    "cores", "clock_hz", "fp32_macs_per_cycle", "l1_bytes", "l2_bytes", "l3_bytes", "memory_copy_bytes_per_s",
    "memory_fill_bytes_per_s", "ram_bytes", "flash_bytes",
)  # fmt: skip
_LISTS = ("isa", "runtimes", "wheels")
_REQUIRED = ("name", "description", "runtimes")
_FACTS = ("cpu", *_COUNTS, "isa", "wheels")


def parse(text: str, where: str) -> Target:
    """Read a board from TOML; strict. `where` names the place in errors.

    Raises:
        TargetError: not TOML, a key missing or unknown, a value of the wrong type or range, a fact without a source or
            a source without its fact.
    """
    try:
        obj = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise TargetError(f"{where}: not TOML: {error}") from error
    known = (*_TEXTS, *_COUNTS, *_LISTS, "sources")
    for key in obj:
        if key not in known:
            raise TargetError(f"{where}: unknown key {key!r:.80}; expected {', '.join(known)}")
    for key in _REQUIRED:
        if key not in obj:
            raise TargetError(f"{where}: {key} is missing; expected {', '.join(_REQUIRED)} and what is known")
    for key in (k for k in _TEXTS if k in obj):
        if not isinstance(obj[key], str) or not obj[key] or "\n" in obj[key]:
            raise TargetError(f"{where}: {key} is {obj[key]!r:.80}, expected one line of text")
    for key in (k for k in _COUNTS if k in obj):
        if isinstance(obj[key], bool) or not isinstance(obj[key], int) or obj[key] < 1:
            raise TargetError(f"{where}: {key} is {obj[key]!r:.80}, expected a whole number above 0")
    for key in (k for k in _LISTS if k in obj):
        if not isinstance(obj[key], list) or not all(isinstance(v, str) and v for v in obj[key]):
            raise TargetError(f"{where}: {key} is {obj[key]!r:.80}, expected a list of texts")
    sources = obj.get("sources", {})
    if not isinstance(sources, dict) or not all(isinstance(v, str) and v for v in sources.values()):
        raise TargetError(f"{where}: sources: expected a table of texts")
    for key in _FACTS:
        if (key in obj) != (key in sources):
            lacks = "no source says where it was read" if key in obj else "a source is given, but not the fact"
            raise TargetError(f"{where}: {key}: {lacks}")
    for key in sources:
        if key not in _FACTS:
            raise TargetError(f"{where}: sources: unknown key {key!r:.80}; expected {', '.join(_FACTS)}")
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in obj.items()}
    return Target(**values)
