"""Run networks in C on this machine: compiled by its own compiler, loaded as a library.

What they do in a firmware is the same to the last bit; how long it takes here says nothing about a microcontroller.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgecomp.errors import BundleError, TargetError
from edgecomp.graph import Array, QuantParams

from .runtime import (
    Border,
    Model,
    channels_first,
    channels_last,
    checked_file,
    checked_threads,
    fitting,
    place_of,
    sample_image,
)

if TYPE_CHECKING:
    from edgecomp.exporters.c_facts import CodeBorder
    from edgecomp.report import Fact

_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT_S = 300
_OPTIONS = ("-std=c99", "-O2", "-shared", "-fPIC")


def host_compiler() -> Sequence[str]:
    """Find a C compiler for this machine: its own, or the one of the package ziglang.

    Raises:
        TargetError: there is none.
    """
    import shutil

    for name in _COMPILERS:
        if found := shutil.which(name):
            return (found,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "cc")
    raise TargetError(
        f"no C compiler is here ({', '.join(_COMPILERS)}): install one, or the package ziglang: pip install ziglang"
    )


class CompiledC:
    """A network in C. One thread, one image at a time."""

    formats: ClassVar[tuple[str, ...]] = ("c",)

    def __init__(self, model: Model, *, threads: int = 1) -> None:
        from edgecomp.exporters.c_facts import read_facts

        self._place = place_of(model)
        checked_threads(threads)
        file = checked_file(model, "c")
        source = file.read_bytes() if isinstance(file, Path) else file
        self.facts = facts = read_facts(source, self._place)
        compiler = host_compiler()
        self._library = _compiled(source, compiler, self._place)
        self.version = _version(compiler)
        self._run = getattr(self._library, f"{facts.name}_run")
        # Words, for the alignment; the rest must stay as it is.
        self._arena = np.zeros(facts.arena_bytes // 4 + 1, dtype=np.uint32)
        self.input, self.output = _border("input", facts.input), _border("output", facts.output)
        self._image = np.ascontiguousarray(channels_last(sample_image(self.input)))
        self._result = np.empty(facts.output.n_bytes, dtype=np.int8)

    def run(self, x: Array) -> Array:
        """Give the output for N images, one by one."""
        images = np.ascontiguousarray(channels_last(fitting(x, self.input, self._place)))
        results = np.empty((len(images), *self.facts.output.shape), dtype=np.int8)
        for image, result in zip(images, results, strict=True):
            self._infer(image, result)
        return channels_first(results)

    def run_all(self, x: Array) -> dict[str, Array]:
        """Give the one output by name."""
        return {self.output.name: self.run(x)}

    def infer_once(self) -> None:
        """Run one image."""
        self._infer(self._image, self._result)

    def _infer(self, image: Array, result: Array) -> None:
        pointers = (ctypes.c_void_p(a.ctypes.data) for a in (image, result, self._arena))
        if self._run(*pointers):
            raise BundleError(f"{self._place}: the network refuses its arena")

    def describe(self) -> dict[str, Fact]:
        """Say what memory the network takes, on any machine."""
        facts = self.facts
        return {"kernels": "C", "threads": 1, "arena_bytes": facts.arena_bytes, "constant_bytes": facts.constant_bytes}


def _border(name: str, codes: CodeBorder) -> Border:
    *space, channels = codes.shape
    quant = QuantParams(bits=8, scale=np.array(codes.scale), zero_point=np.array(codes.zero_point))
    return Border(name=name, shape=(channels, *space), dtype=np.dtype(np.int8), quant=quant)


def _compiled(source: bytes, compiler: Sequence[str], place: str) -> ctypes.CDLL:
    """Compile and load; the files are gone when this returns.

    The header of the network is left empty: the source says all that it needs.
    """
    import subprocess
    import tempfile

    from edgecomp.exporters.to_c import HEADER, kernel_files

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, data in {"network.c": source, HEADER: b"#include <stdint.h>\n", **kernel_files()}.items():
            (folder / file).write_bytes(data)
        sources = [str(path) for path in sorted(folder.glob("*.c"))]
        library = folder / "network.so"
        command = [*compiler, *_OPTIONS, "-o", str(library), *sources]
        try:
            # The compiler's own temporary files go with the folder, also when it is interrupted.
            env = {**os.environ, "TMPDIR": name}
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=env)
        except (OSError, subprocess.TimeoutExpired) as e:
            raise TargetError(f"{place}: the C compiler {compiler[0]} fails: {e}") from e
        if done.returncode:
            said = " ".join(done.stderr.split())[:200]
            raise TargetError(f"{place}: the C compiler {compiler[0]} ends with {done.returncode}: {said}")
        return ctypes.CDLL(str(library))


def _version(compiler: Sequence[str]) -> str:
    import subprocess

    zig = "ziglang" in compiler
    command = [*compiler[:-1], "version"] if zig else [*compiler, "-dumpversion"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return f"by {'zig cc' if zig else Path(compiler[0]).name} {done.stdout.strip()}".strip()
