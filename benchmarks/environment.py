"""What a measurement depends on beside the model: processor, clock, load, versions. What cannot be read is named."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import edgecomp
from edgecomp.report import Fact

PACKAGES = ("numpy", "onnx", "onnxruntime", "ai-edge-litert", "tflite-runtime", "tflite-micro", "torch")
"""Packages whose versions belong to a report, where they are installed."""

# Arm cores name themselves by number: implementer 0x41, then these (Arm's MIDR_EL1 part numbers).
_ARM_PARTS = {
    "0xb76": "ARM1176",
    "0xc07": "Cortex-A7",
    "0xd03": "Cortex-A53",
    "0xd05": "Cortex-A55",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
}


def environment(root: Path = Path("/")) -> dict[str, Fact]:
    """Describe the machine.

    Args:
        root: where proc/ and sys/ are looked for.

    Returns:
        by name: text, numbers, or None where a fact could not be read; "unread" lists these.
    """
    facts: dict[str, Fact] = {}
    for name, read in _FACTS.items():
        try:
            facts[name] = read(root)
        except (OSError, ValueError, LookupError, AttributeError):
            facts[name] = None
    unread = tuple(name for name, value in facts.items() if value is None)
    facts["python"] = platform.python_version()
    facts["edgecomp"] = edgecomp.__version__
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {**facts, "unread": unread}


def _text(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    if not text:
        raise ValueError(f"{path} is empty")
    return text


def _cpu(root: Path) -> str:
    fields: dict[str, str] = {}
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    if "model name" in fields and "CPU part" not in fields:
        return fields["model name"]
    part = fields["CPU part"]
    return _ARM_PARTS.get(part, f"Arm part {part}") if fields["CPU implementer"] == "0x41" else f"part {part}"


def _board(root: Path) -> str:
    for path in ("proc/device-tree/model", "sys/class/dmi/id/product_name"):
        if (root / path).is_file():
            return _text(root / path)
    raise OSError("neither device tree nor DMI")


def _frequency_mhz(root: Path) -> float:
    path = root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"
    if path.is_file():
        return int(_text(path)) / 1000  # kHz
    for line in _text(root / "proc/cpuinfo").splitlines():
        if line.startswith("cpu MHz"):
            return float(line.partition(":")[2])
    raise OSError("neither cpufreq nor cpuinfo")


def _temperature_c(root: Path) -> float:
    # Of all sensors the hottest: which one is the processor's differs from board to board.
    zones = (root / "sys/class/thermal").glob("thermal_zone*/temp")
    return max(int(_text(zone)) for zone in zones) / 1000  # ValueError where there is none


def _memory_bytes(root: Path) -> int:
    lines = _text(root / "proc/meminfo").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))


def _os(root: Path) -> str:
    for line in _text(root / "etc/os-release").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip("\"'")
    raise LookupError("no PRETTY_NAME")


_FACTS: dict[str, Callable[[Path], Fact]] = {
    "cpu": _cpu,
    "board": _board,
    "machine": lambda root: platform.machine() or None,
    "cores": lambda root: os.cpu_count(),
    "cores_allowed": lambda root: len(os.sched_getaffinity(0)),
    "governor": lambda root: _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
    "frequency_mhz": _frequency_mhz,
    "temperature_c": _temperature_c,
    "load_average_1min": lambda root: float(_text(root / "proc/loadavg").split()[0]),
    "memory_bytes": _memory_bytes,
    "os": _os,
    "kernel": lambda root: platform.release() or None,
}
