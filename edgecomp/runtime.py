"""What a program on the device needs to run a packed TFLite file: numpy and these few lines.

::

    from ai_edge_litert.interpreter import Interpreter
    from edgecomp.runtime import load

    interpreter = Interpreter(model_content=load("model.tflite"))
"""

from __future__ import annotations

from pathlib import Path

from edgecomp.errors import BundleError
from edgecomp.exporters.unpack_tflite import MOST_BYTES, unpack_tflite

__all__ = ["load", "unpack"]


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
    return unpack_tflite(data, path.name, most_bytes=most_bytes)


def unpack(data: bytes, *, most_bytes: int = MOST_BYTES) -> bytes:
    """Do the same to a file that is in memory already.

    Raises:
        BundleError: as `load`.
    """
    return unpack_tflite(data, "model", most_bytes=most_bytes)
