"""A board as a value: what is known of it, and where each fact was read. Not here: the boards (`edgecomp.targets`)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from edgecomp.errors import UsageError


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
        runtimes: names from RUNTIMES that run there; of a user's own file () where it does not say.
        wheels: what the Python package index has for it, e.g. "onnxruntime 1.32.0 manylinux_2_28_aarch64".
        sources: where each fact was read, by attribute name; a user's own file may leave them out.
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


ISA = (
    "aarch64", "armv6", "armv7", "neon", "fp16", "dotprod", "i8mm", "thumb", "armv6-m", "armv7-m", "armv7e-m",
    "armv8-m.base", "armv8-m.main", "armv8.1-m.main", "dsp", "mve", "helium",
)  # fmt: skip
"""What `Target.isa` may name; Helium is Arm's name of MVE."""
RUNTIMES = (
    "onnxruntime", "onnxruntime-lean", "litert", "litert-reference", "tflite-runtime", "executorch", "ncnn",
    "paddle-lite", "tnn", "tflite-micro", "x-cube-ai", "c", "other", "reference",
)  # fmt: skip
"""What `Target.runtimes` may name."""
_TEXTS = ("name", "description", "cpu")
_MOST: Mapping[str, int] = {
    "cores": 1024,
    "clock_hz": 10**11,
    "fp32_macs_per_cycle": 4096,
    **dict.fromkeys(("l1_bytes", "l2_bytes", "l3_bytes"), 2**40),
    **dict.fromkeys(("memory_copy_bytes_per_s", "memory_fill_bytes_per_s"), 10**15),
    **dict.fromkeys(("ram_bytes", "flash_bytes"), 2**50),
}
"""More than any board has: what is above was mistyped, and would not fit into the arithmetic of estimates."""
_NAMES: Mapping[str, tuple[str, ...]] = {"isa": ISA, "runtimes": RUNTIMES, "wheels": ()}
_FACTS = ("cpu", *_MOST, "isa", "wheels")


def parse(text: str, where: str, *, stem: str | None = None) -> Target:
    """Read a board from TOML; strict.

    Args:
        text: of the file.
        where: names the place in errors.
        stem: of a user's own file: the board's name unless it says another; such a file needs cpu and clock_hz, and no
            sources. None for a board of ours, which has a name, a description, runtimes, and a source for each fact.

    Raises:
        UsageError: not TOML, a key missing or unknown, a value of the wrong type or range, a name that is not known,
            a fact without a source or a source without its fact.
    """
    try:
        obj = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        what = error if isinstance(error, tomllib.TOMLDecodeError) else "a number is too long, or nested too deeply"
        raise UsageError(f"{where}: not TOML: {what}") from error
    known = (*_TEXTS, *_MOST, *_NAMES, "sources")
    required = ("name", "description", "runtimes") if stem is None else ("cpu", "clock_hz")
    for key in obj:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r:.80}; expected {', '.join(known)}")
    for key in required:
        if key not in obj:
            raise UsageError(f"{where}: {key} is missing; expected {', '.join(required)} and what is known")
    for key in (k for k in _TEXTS if k in obj):
        if not isinstance(obj[key], str) or not obj[key].strip() or not obj[key].isprintable():
            raise UsageError(f"{where}: {key} is {_shown(obj[key])}, expected one line of text")
    for key, most in _MOST.items():
        if key in obj and not (type(obj[key]) is int and 1 <= obj[key] <= most):
            raise UsageError(f"{where}: {key} is {_shown(obj[key])}, expected a whole number from 1 to {most:_}")
    for key, names in _NAMES.items():
        if key in obj and not (isinstance(obj[key], list) and all(isinstance(v, str) and v for v in obj[key])):
            raise UsageError(f"{where}: {key} is {_shown(obj[key])}, expected a list of texts")
        strange = [v for v in obj.get(key, ()) if names and v not in names]
        if strange:
            raise UsageError(f"{where}: {key} has {strange[0]!r:.80}, expected of {', '.join(names)}")
    sources = obj.get("sources", {})
    if not isinstance(sources, dict) or not all(isinstance(v, str) and v for v in sources.values()):
        raise UsageError(f"{where}: sources: expected a table of texts")
    for key in _FACTS:
        if key in obj and key not in sources and stem is None:
            raise UsageError(f"{where}: {key}: no source says where it was read")
        if key in sources and key not in obj:
            raise UsageError(f"{where}: {key}: a source is given, but not the fact")
    for key in sources:
        if key not in _FACTS:
            raise UsageError(f"{where}: sources: unknown key {key!r:.80}; expected {', '.join(_FACTS)}")
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in obj.items()}
    if stem is not None:
        own = f"{obj['cpu']} at {obj['clock_hz'] / 1e6:g} MHz"
        values = {"name": stem, "description": own, "runtimes": (), **values}
    return Target(**values)


def _shown(value: object) -> str:
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python writes no number of more than 4300 digits, and hexadecimal ones may be longer
        return "a number of thousands of digits"
