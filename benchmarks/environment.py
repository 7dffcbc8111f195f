"""What a measurement depends on beside the model: processor, clock, load, versions, and what can spoil a run.

What cannot be read is named.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import edgecomp
from edgecomp.report import Fact

PACKAGES = ("numpy", "onnx", "onnxruntime", "ai-edge-litert", "tflite-runtime", "tflite-micro", "torch")
"""Packages whose versions belong to a report, where they are installed."""

THROTTLE_FLAGS = "sys/devices/platform/soc/soc:firmware/get_throttled"
_GOVERNOR = "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
_FREQUENCY = "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"
_ZONES = "sys/class/thermal/thermal_zone*/temp"
_BOARDS = ("proc/device-tree/model", "sys/class/dmi/id/product_name")
_COUNTS = "sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count"
FACT_FILES = ("proc/cpuinfo", *_BOARDS, _GOVERNOR, _FREQUENCY, _ZONES, "proc/loadavg", "proc/meminfo", "etc/os-release")
STATE_FILES = ("proc/cpuinfo", _GOVERNOR, _FREQUENCY, _ZONES, THROTTLE_FLAGS, _COUNTS, "proc/vmstat")
"""What `environment` and `state` read below the root, * for a number; the C runner brings copies of them."""

# Of a wheel, or of a package of Debian.
_RECORD = re.compile(r"(?P<name>[A-Za-z0-9._]+)-(?P<version>[^-]+)(-py[0-9.]+)?\.(dist|egg)-info")

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
    facts = _read(_FACTS, root)
    unread = tuple(name for name, value in facts.items() if value is None)
    facts["runner"] = "Python"
    facts["python"] = platform.python_version()
    facts["edgecomp"] = edgecomp.__version__
    return {**facts, **installed(PACKAGES), "unread": unread}


def environment_elsewhere(root: Path, known: Mapping[str, Fact]) -> dict[str, Fact]:
    """Describe another machine as `environment` describes this one.

    Args:
        root: where copies of its files lie, see FACT_FILES.
        known: what is known of it beside these.
    """
    facts = _read(_FILE_FACTS, root)
    unread = tuple(name for name, value in facts.items() if value is None)
    return {**facts, **known, "unread": unread}


def installed(packages: Sequence[str], places: Sequence[str] | None = None) -> dict[str, str]:
    """Give the versions of packages that are installed, as the names of their records say them.

    importlib.metadata says the same, and takes 2 MB that would stand in the peak memory of a small model.

    Args:
        packages: their names, in the order of the answer.
        places: folders; those that Python imports from when not given. The first that has a package counts.
    """
    versions: dict[str, str] = {}
    for place in sys.path if places is None else places:
        for record in sorted(os.listdir(place or ".")) if os.path.isdir(place or ".") else ():
            if found := _RECORD.fullmatch(record):
                versions.setdefault(re.sub("[-_.]+", "-", found["name"]).lower(), found["version"])
    return {package: versions[package] for package in packages if package in versions}


def state(root: Path = Path("/")) -> dict[str, Fact]:
    """Read what can spoil a run: clock, governor, temperature, throttle flags and counts, swapped pages.

    Args:
        root: where proc/, sys/ and usr/bin/vcgencmd are looked for.

    Returns:
        by name, None where it cannot be read.
    """
    return _read(_STATE, root)


def _read(readers: Mapping[str, Callable[[Path], Fact]], root: Path) -> dict[str, Fact]:
    facts: dict[str, Fact] = {}
    for name, read in readers.items():
        try:
            facts[name] = read(root)
        except (OSError, ValueError, LookupError, AttributeError, subprocess.SubprocessError):
            facts[name] = None
    return facts


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
    for path in _BOARDS:
        if (root / path).is_file():
            return _text(root / path)
    raise OSError("neither device tree nor DMI")


def _frequency_mhz(root: Path) -> float:
    path = root / _FREQUENCY
    if path.is_file():
        return int(_text(path)) / 1000  # kHz
    for line in _text(root / "proc/cpuinfo").splitlines():
        if line.startswith("cpu MHz"):
            return float(line.partition(":")[2])
    raise OSError("neither cpufreq nor cpuinfo")


def _temperature_c(root: Path) -> float:
    # Of all sensors the hottest: which one is the processor's differs from board to board.
    zones = root.glob(_ZONES)
    return max(int(_text(zone)) for zone in zones) / 1000  # ValueError where there is none


def _memory_bytes(root: Path) -> int:
    lines = _text(root / "proc/meminfo").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))


def _os(root: Path) -> str:
    for line in _text(root / "etc/os-release").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip("\"'")
    raise LookupError("no PRETTY_NAME")


def _governor(root: Path) -> str:
    return _text(root / _GOVERNOR)


def _throttle_flags(root: Path) -> int:
    """Read the Raspberry Pi's own flags: bits 0-3 hold now, 16-19 since it was switched on."""
    path = root / THROTTLE_FLAGS
    if path.is_file():
        return int(_text(path), 16)
    program = root / "usr/bin/vcgencmd"
    if not os.access(program, os.X_OK):
        raise OSError("no vcgencmd")
    done = subprocess.run([program, "get_throttled"], capture_output=True, text=True, timeout=5, check=True)
    return int(done.stdout.strip().rpartition("=")[2], 16)


def _throttle_count(root: Path) -> int:
    """Count how often x86 cores were slowed down because of heat."""
    paths = list(root.glob(_COUNTS))
    if not paths:
        raise OSError("no thermal_throttle")
    return sum(int(_text(path)) for path in paths)


def _swapped_pages(root: Path) -> int:
    lines = (line.split() for line in _text(root / "proc/vmstat").splitlines())
    counts = {name: int(value) for name, value in lines}
    return counts["pswpin"] + counts["pswpout"]


_STATE: Mapping[str, Callable[[Path], Fact]] = {
    "governor": _governor,
    "frequency_mhz": _frequency_mhz,
    "temperature_c": _temperature_c,
    "throttle_flags": _throttle_flags,
    "throttle_count": _throttle_count,
    "swapped_pages": _swapped_pages,
}
_FILE_FACTS: Mapping[str, Callable[[Path], Fact]] = {
    "cpu": _cpu,
    "board": _board,
    "governor": _governor,
    "frequency_mhz": _frequency_mhz,
    "temperature_c": _temperature_c,
    "load_average_1min": lambda root: float(_text(root / "proc/loadavg").split()[0]),
    "memory_bytes": _memory_bytes,
    "os": _os,
}
_FACTS: Mapping[str, Callable[[Path], Fact]] = {
    **_FILE_FACTS,
    "machine": lambda root: platform.machine() or None,
    "cores": lambda root: os.cpu_count(),
    "cores_allowed": lambda root: len(os.sched_getaffinity(0)),
    "affinity": lambda root: tuple(str(core) for core in sorted(os.sched_getaffinity(0))),
    "kernel": lambda root: platform.release() or None,
}
