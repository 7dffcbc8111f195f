"""What a program on the device needs to run a packed TFLite file: numpy and these few lines.

::

    from ai_edge_litert.interpreter import Interpreter
    from edgecomp.runtime import load

    interpreter = Interpreter(model_content=load("model.tflite"))
"""

from __future__ import annotations

from pathlib import Path

from edgecomp import exporters
from edgecomp.errors import BundleError, UsageError
from edgecomp.exporters.unpack_tflite import MOST_BYTES, unpack_tflite
from edgecomp.files import write_file

__all__ = ["CPP_HEADER", "load", "unpack", "unpack_file"]

CPP_HEADER = Path(exporters.__file__).with_name("edgecomp_unpack.hpp")
"""The C++ reader of the same files: one header, no dependency."""


def load(path: Path | str, *, most_bytes: int = MOST_BYTES) -> bytes:
    """Read a TFLite file and widen its packed and int4 weights to int8, for any TFLite interpreter.

    Args:
        path: a TFLite file, packed or not.
        most_bytes: that the unpacked file may have.

    Raises:
        BundleError: it cannot be read, is no TFLite file, damaged, or larger than allowed when unpacked.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as e:
        raise BundleError(f"{str(path)!r:.200}: cannot be read: {getattr(e, 'strerror', None) or e}") from e
    unpacked: bytes = unpack_tflite(data, str(path), most_bytes=most_bytes)
    return unpacked


def unpack(data: bytes, *, most_bytes: int = MOST_BYTES) -> bytes:
    """Do the same to a file that is in memory already.

    Raises:
        BundleError: as `load`.
        UsageError: `data` is not bytes.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise UsageError(f"unpack takes the bytes of a file, not {type(data).__name__}; load(path) reads one")
    unpacked: bytes = unpack_tflite(bytes(data), "model", most_bytes=most_bytes)
    return unpacked


def unpack_file(source: Path, target: Path, *, force: bool = False) -> dict[str, int]:
    """Write what `load` gives to a file, whole or not at all.

    Args:
        source: a TFLite file.
        target: where to write.
        force: replace what is there.

    Returns:
        the bytes of both, by name.

    Raises:
        BundleError: as `load`.
        UsageError: the target is there already.
        OSError: it cannot be written.
    """
    if target.exists() and not force:
        raise UsageError(f"{target}: is there already; give --force to replace it, or another -o")
    n_before, data = source.stat().st_size if source.is_file() else 0, load(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, data)
    return {str(source): n_before, str(target): len(data)}
