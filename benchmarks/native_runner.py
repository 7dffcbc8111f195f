"""The runner in C, for devices without Python: its sources, its compilation for them, and the libraries that it needs.

What it gathers becomes a report in `gathered`.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType

import edgecomp
from edgecomp.errors import TargetError, UsageError
from edgecomp.targets.emulated import cache_folder, pip_download
from edgecomp.targets.ssh import platforms_of

from . import bench, environment, harness, memory

SCHEMA = "edgecomp-gathered/1"
PROGRAM = "edgecomp-runner"
WARNINGS = ("-Wall", "-Wextra", "-Werror")
OPTIONS = ("-std=c99", "-D_GNU_SOURCE", "-O2")
LIBRARIES = ("-lm", "-ldl")
_TIMEOUT_S = 600
_PYTHON = "3.11"
"""Wheels are made for a Python; the library in them is the same for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """A processor that the runner is compiled for.

    Attributes:
        zig: of zig cc, -target, with the oldest C library that onnxruntime's wheel is for.
        loader: of the C library, which must be on the device.
    """

    zig: str
    loader: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """Where a runtime's library comes from.

    Attributes:
        wheel: as pip takes it.
        begins: how the library's name in it begins.
    """

    wheel: str
    begins: str


CPUS: Mapping[str, Cpu] = MappingProxyType(
    {
        "aarch64": Cpu(zig="aarch64-linux-gnu.2.28", loader="/lib/ld-linux-aarch64.so.1"),
        "x86_64": Cpu(zig="x86_64-linux-gnu.2.28", loader="/lib64/ld-linux-x86-64.so.2"),
    }
)
"""By what `uname -m` says."""
_WITHOUT_LIBRARIES = ("armv6l", "armv7l", "armv8l", "i686", "riscv64")
"""Other processors of boards with Linux: no package has a library of a runtime for them with an interface for C."""

RUNTIMES: Mapping[str, Library] = MappingProxyType(
    {
        "onnxruntime": Library(wheel="onnxruntime", begins="libonnxruntime.so"),
        # LiteRT's interface for C is not the same in all versions; edgecomp_runtimes.c speaks that of this one.
        "litert": Library(wheel="ai-edge-litert==2.3.0", begins="libLiteRt.so"),
    }
)
"""By name of the runtime."""
NEWEST_LIBC = "2.40"
"""Wheels for this version of the C library, or any older one, are given away."""


def sources() -> dict[str, bytes]:
    """Give the sources by name; the same bytes for the same edgecomp."""
    here = resources.files(__package__)
    names = ("edgecomp_runner.c", "edgecomp_runner.h", "edgecomp_runtimes.c", "edgecomp_session.c")
    return {**{name: here.joinpath(name).read_bytes() for name in names}, "edgecomp_shared.h": _shared()}


def _shared() -> bytes:
    """Write what the Python runner and that in C must have in common."""
    names = ("WINDOW_S", "STEADY_WINDOWS", "WARMUP_MIN_S", "WARMUP_MAX_S", "TOLERANCE", "BLOCK_S", "MAX_BLOCK",
             "ROUNDS", "MIN_ROUNDS", "MIN_S", "MAX_S")  # fmt: skip
    values: dict[str, object] = {name: getattr(harness, name) for name in names}
    values |= {"MEMORY_RUNS": memory.RUNS, "PROCESSES": memory.PROCESSES, "PROFILED_RUNS": bench.PROFILED_RUNS}
    values |= {"SCHEMA": _quoted(SCHEMA), "VERSION": _quoted(edgecomp.__version__)}
    values["THROTTLE_FLAGS"] = _quoted(environment.THROTTLE_FLAGS)
    for name, files in (("FACT_FILES", environment.FACT_FILES), ("STATE_FILES", environment.STATE_FILES)):
        values[name] = ", ".join(map(_quoted, files))
    for format in ("onnx", "tflite"):
        values[f"TINY_{format.upper()}"] = ", ".join(map(str, memory.TINY[format]))
    return "".join(f"#define {name} {value}\n" for name, value in values.items()).encode()


def _quoted(text: str) -> str:
    assert text.isascii()
    assert not set(text) & set('"\\')
    return f'"{text}"'


def check_cpu(cpu: str) -> None:
    """Refuse a processor that the runner is not compiled for.

    Args:
        cpu: as `uname -m` says it.

    Raises:
        TargetError: there is no library of a runtime for it.
        UsageError: no processor is called so.
    """
    if cpu in CPUS:
        return
    expected = f"expected one of {', '.join(CPUS)}"
    if cpu in _WITHOUT_LIBRARIES:
        raise TargetError(f"the C runner is not made for {cpu!r}; {expected}")
    close = difflib.get_close_matches(cpu.lower(), CPUS, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    raise UsageError(f"--cpu {cpu!r:.80} is unknown; {expected}, as uname -m says it there{meant}")


@cache
def native_runner(cpu: str) -> bytes:
    """Compile the runner; the same bytes for the same edgecomp and compiler, wherever.

    Args:
        cpu: as `uname -m` says it, of CPUS.

    Raises:
        TargetError: there is none for this processor, the compiler is missing or fails.
        UsageError: no processor is called so.
    """
    check_cpu(cpu)
    if importlib.util.find_spec("ziglang") is None:
        raise TargetError("the C runner is compiled by the package ziglang: pip install 'edgecomp[boards]'")
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", CPUS[cpu].zig]
    # Without what debuggers read, which names folders.
    return compiled([*zig, *OPTIONS, *WARNINGS, "-g0", "-s"])


def compiled(command: Sequence[str]) -> bytes:
    """Compile the runner by a compiler with its options.

    Raises:
        TargetError: it fails.
    """
    with tempfile.TemporaryDirectory(prefix="edgecomp-") as name:
        folder = Path(name)
        for file, data in sources().items():
            (folder / file).write_bytes(data)
        names = sorted(path.name for path in folder.glob("*.c"))
        try:
            # The compiler's own temporary files go with the folder, also when it is interrupted.
            done = subprocess.run(
                [*command, "-o", PROGRAM, *names, *LIBRARIES],
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
                cwd=folder,
                env={**os.environ, "TMPDIR": name},
            )
        except (OSError, subprocess.TimeoutExpired) as e:
            raise TargetError(f"the C runner cannot be compiled: {e}") from e
        if done.returncode:
            said = " ".join(done.stderr.split())[:300]
            raise TargetError(f"the C runner cannot be compiled: it ended with {done.returncode}: {said}")
        return (folder / PROGRAM).read_bytes()


def libraries(cpu: str, libc: str, runtimes: Sequence[str]) -> dict[str, bytes]:
    """Give the runtimes' libraries by file name, from their wheels; the name ends with the version.

    Args:
        cpu: of CPUS.
        libc: version of the device's C library.
        runtimes: of RUNTIMES.

    Raises:
        TargetError: there is no such wheel, or no library in it.
    """
    folder = cache_folder() / "downloads" / f"libraries-{cpu}"
    found = {}
    for name in runtimes:
        library = RUNTIMES[name]
        (wheel,) = pip_download([library.wheel], folder, _PYTHON, platforms_of(cpu, libc))
        version = wheel.name.split("-")[1]
        with zipfile.ZipFile(wheel) as archive:
            names = [place for place in archive.namelist() if Path(place).name.startswith(library.begins)]
            if not names:
                raise TargetError(f"{wheel.name}: has no {library.begins}*; expected the runtime's library")
            found[f"{library.begins}.{version}"] = archive.read(names[0])
    return found
