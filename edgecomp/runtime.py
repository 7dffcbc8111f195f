"""What a program on the device needs to run a packed file: numpy and these few lines.

TFLite::

    from ai_edge_litert.interpreter import Interpreter
    from edgecomp.runtime import load

    interpreter = Interpreter(model_content=load("model.tflite"))

ONNX runs anywhere as it is; this way onnxruntime needs less memory while it loads the file::

    from edgecomp.runtime import onnx_session

    session = onnx_session("model.onnx")

and this way its sums do not saturate on x86 without VNNI, where 8-bit weights otherwise give other codes::

    session = onnxruntime.InferenceSession(load("model.onnx", unsigned=True))
"""

from __future__ import annotations

import importlib
import mmap
import stat
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from edgecomp import exporters
from edgecomp.errors import BundleError, TargetError, UsageError
from edgecomp.exporters.unpack_onnx import plain_onnx, plain_parts
from edgecomp.exporters.unpack_tflite import MOST_BYTES, unpack_tflite
from edgecomp.files import write_file

__all__ = ["CPP_HEADER", "load", "onnx_session", "unpack", "unpack_file"]

CPP_HEADER = Path(exporters.__file__).with_name("edgecomp_unpack.hpp")
"""The C++ reader of packed TFLite files: one header, no dependency."""


def load(path: Path | str, *, most_bytes: int = MOST_BYTES, unsigned: bool = False) -> bytes:
    """Read a TFLite or ONNX file and widen its packed and int4 weights to int8, for any runtime.

    Args:
        path: a file, packed or not.
        most_bytes: that the unpacked file may have.
        unsigned: store the weights of layers as uint8 around 128: the same numbers, for onnxruntime on x86 without
            VNNI, where it adds two products of uint8 and int8 in 16 bits. A file of another tool stays as it is.

    Raises:
        BundleError: it cannot be read, is of another kind, damaged, or larger than allowed when unpacked.
        UsageError: unsigned weights are asked for in a TFLite file.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as e:
        raise _unreadable(path, e) from e
    return _unpacked(data, str(path), most_bytes, unsigned)


def unpack(data: bytes, *, most_bytes: int = MOST_BYTES, unsigned: bool = False) -> bytes:
    """Do the same to a file that is in memory already.

    Raises:
        BundleError: as `load`.
        UsageError: `data` is not bytes, or as `load`.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise UsageError(f"unpack takes the bytes of a file, not {type(data).__name__}; load(path) reads one")
    return _unpacked(bytes(data), "model", most_bytes, unsigned)


def _unpacked(data: bytes, where: str, most_bytes: int, unsigned: bool) -> bytes:
    if data[4:8] != b"TFL3" and not _is_onnx(data[:1]):
        raise BundleError(
            f"{where}: is no TFLite file: bytes 4 to 8 are not TFL3; and no ONNX file: the first is not 8; expected "
            "what build or export wrote"
        )
    if unsigned and data[4:8] == b"TFL3":
        raise UsageError(f"{where}: is TFLite, whose weights are int8 everywhere; unsigned weights are of ONNX files")
    unpacker = partial(plain_onnx, unsigned=unsigned) if data[4:8] != b"TFL3" else unpack_tflite
    unpacked: bytes = unpacker(data, where, most_bytes=most_bytes)
    return unpacked


def _is_onnx(start: bytes) -> bool:
    # Every writer of protobuf puts field 1, ir_version, first.
    return start == b"\x08"


def _unreadable(path: Path, error: Exception) -> BundleError:
    return BundleError(f"{str(path)!r:.200}: cannot be read: {getattr(error, 'strerror', None) or error}")


def unpack_file(source: Path, target: Path, *, force: bool = False, unsigned: bool = False) -> dict[str, int]:
    """Write what `load` gives to a file, whole or not at all.

    Args:
        source: a TFLite or ONNX file.
        target: where to write.
        force: replace what is there.
        unsigned: as `load`.

    Returns:
        the bytes of both, by name.

    Raises:
        BundleError: as `load`.
        UsageError: the target is there already, or is the source; or as `load`.
        OSError: it cannot be written.
    """
    if source.exists() and target.exists() and target.samefile(source):
        raise UsageError(f"{target}: is the file to unpack, and what comes out of it does not replace it; name another")
    if target.exists() and not force:
        raise UsageError(f"{target}: is there already; give --force to replace it, or another -o")
    n_before, data = source.stat().st_size if source.is_file() else 0, load(source, unsigned=unsigned)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, data)
    return {str(source): n_before, str(target): len(data)}


def onnx_session(
    path: Path | str,
    *,
    options: Any = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    folder: Path | str | None = None,
    most_bytes: int = MOST_BYTES,
) -> Any:
    """Make an `onnxruntime.InferenceSession` of an ONNX file, in as little memory as onnxruntime allows.

    The weights are decoded one by one into a temporary file, which onnxruntime maps into memory, layer by layer, while
    it arranges them for its kernels. What the session computes, and how fast, is the same as without this.

    Args:
        path: a file of ours, packed or not. Any other one is given to onnxruntime as it is.
        options: `onnxruntime.SessionOptions`.
        providers: as for InferenceSession.
        folder: where the temporary file goes, a byte for each weight; the system's own place when not given. Where that
            lies in memory (Linux: `df /tmp` says tmpfs), a folder on disk needs less. The file is gone when this
            returns; what onnxruntime still has mapped stays on disk, without a name, as long as the session.
        most_bytes: that the unpacked model may have.

    Raises:
        BundleError: the file cannot be read, is damaged, larger than allowed when unpacked, or onnxruntime refuses it.
        TargetError: onnxruntime is not installed.
        UsageError: the folder does not take the temporary file.
    """
    path = Path(path)
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError as e:
        raise TargetError(f"onnxruntime cannot be imported ({e}); install it with: pip install onnxruntime") from e
    try:
        temporary = tempfile.TemporaryDirectory(prefix="edgecomp-", dir=folder, ignore_cleanup_errors=True)
    except OSError as e:
        raise _no_room(folder, e) from e
    with temporary as place:
        with _mapped(path) as data:
            try:
                plain = plain_parts(data, str(path), Path(place), most_bytes=most_bytes)
            except OSError as e:
                raise _no_room(folder, e) from e
        try:
            return ort.InferenceSession(str(plain or path), options, providers=list(providers))
        except Exception as e:  # onnxruntime's exceptions have no common base below Exception
            reason = " ".join(str(e).split())[:200]
            raise BundleError(f"{path}: onnxruntime cannot load it: {reason}") from e


def _no_room(folder: Path | str | None, error: OSError) -> UsageError:
    return UsageError(
        f"{folder or tempfile.gettempdir()}: does not take the weights while they are loaded ({error.strerror}); give "
        "onnx_session another folder="
    )


def _mapped(path: Path) -> memoryview:
    """Map a file into memory, so that the system can take back what was read."""
    try:
        with path.open("rb") as stream:
            if not stat.S_ISREG(path.stat().st_mode):
                raise BundleError(f"{path}: is no plain file; expected one on disk")
            # Freed with the last view of it.
            data = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as e:
        raise _unreadable(path, e) from e
    if not _is_onnx(data[:1].tobytes()):
        raise BundleError(f"{path}: is no ONNX file: its first byte is not 8; expected what build or export wrote")
    return data
