"""Where a file comes from: versions and digests of the tools that can change a byte or a figure of it."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from edgecomp import __version__

_FOLDERS = ("edgecomp", "edgecomp.exporters", "edgecomp.benchmarks", "edgecomp.targets")
_CODE = (".py", ".c", ".h", ".hpp")
_PACKAGES = ("numpy", "torch", "torchvision", "onnx", "onnxruntime", "ai-edge-litert", "flatbuffers", "tflite-micro")


@cache
def tools() -> dict[str, dict[str, str]]:
    """Name the tools: {name: {"version": text, "sha256": 64 hexadecimal digits}}; nothing of it depends on a folder.

    The digest of edgecomp is that of its code, that of Python of its program, that of a package of what pip noted of
    its files when it installed them.
    """
    found = {
        "edgecomp": {"version": __version__, "sha256": _own_sha256()},
        "python": {"version": platform.python_version(), "sha256": _program_sha256()},
    }
    for name in _PACKAGES:
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found[name] = {"version": package.version, "sha256": _package_sha256(package)}
    return found


def _program_sha256() -> str:
    with Path(sys.executable).open("rb") as program:
        return hashlib.file_digest(program, "sha256").hexdigest()


def _own_sha256() -> str:
    """Hash names and bytes of the code: the same in a checkout, where folders lie apart, and installed."""
    code = {f"{package}/{name}": data for package in _FOLDERS for name, data in _code(files(package), package)}
    return _listed_sha256(f"{name},{hashlib.sha256(data).hexdigest()}" for name, data in sorted(code.items()))


def _code(folder: Traversable, package: str) -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            if f"{package}.{entry.name}" not in _FOLDERS:
                yield from ((f"{entry.name}/{name}", data) for name, data in _code(entry, f"{package}.{entry.name}"))
        elif entry.name.endswith(_CODE):
            yield entry.name, entry.read_bytes()


def _package_sha256(package: metadata.Distribution) -> str:
    """Hash what RECORD says of a package's files, without programs, which name the environment they are started in."""
    noted = {file: file.hash for file in package.files or () if ".." not in file.parts}
    return _listed_sha256(
        sorted(
            f"{file.as_posix()},{digest.mode}={digest.value}"
            for file, digest in noted.items()
            if digest is not None and not file.parts[0].endswith(".dist-info")
        )
    )


def _listed_sha256(lines: Iterator[str] | list[str]) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
