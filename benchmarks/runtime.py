"""What a runtime offers (`Runner`), and what all of them need: checks of files and images, quiet imports."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Protocol, cast

import numpy as np

from edgecomp.errors import BundleError, DataError, TargetError, UsageError
from edgecomp.graph import Array, Graph, QuantParams

if TYPE_CHECKING:
    from edgecomp.report import Fact

Model = Path | str | bytes | Graph


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Border:
    """What goes into a model or comes out of it.

    Attributes:
        name: in the file.
        shape: of one image, without N: (C, H, W) or (F,).
        dtype: float32 or an integer type.
        quant: what the integers mean; None for float, and for a file that does not say.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    quant: QuantParams | None


class Runner(Protocol):
    """What every runtime offers.

    Attributes:
        formats: file formats it reads.
        version: as the runtime gives it.
        input: the model's one input.
        output: the model's first output.
    """

    formats: ClassVar[tuple[str, ...]]
    version: str
    input: Border
    output: Border

    def __init__(self, model: Model, *, threads: int = 1) -> None:
        """Load a model.

        Raises:
            BundleError: the file cannot be read, is damaged, or is of another kind.
            TargetError: the runtime is not installed.
        """

    def run(self, x: Array) -> Array:
        """Give the first output for N images.

        Args:
            x: (N, C, H, W), float32, or integers of the model's input type. Float images for an integer input are
                quantized with the input's own scale and zero point.

        Returns:
            (N, ...), NCHW where there are four axes; of the output's own type, integers stay codes.

        Raises:
            DataError: the images do not fit the input.
            BundleError: the runtime fails on this model.
        """

    def run_all(self, x: Array) -> dict[str, Array]:
        """Give every output by name, in the file's order; else as `run`."""

    def infer_once(self) -> None:
        """Infer one image that already lies in the runtime's own input buffer: nothing but the runtime's run."""

    def describe(self) -> dict[str, Fact]:
        """Say how the runtime executes this model."""


# As in pyproject.toml.
_INSTALL = {
    "tflite-runtime": "pip install tflite-runtime",
    "tflite-micro": "pip install 'tflite-micro>=0.dev20260930204519'",
}
_INSTALL_ALL = "pip install 'edgecomp[bench]'"
# LiteRT: "INFO: Created TensorFlow Lite XNNPACK delegate for CPU."; onnxruntime: a date in colours, then
# "[W:onnxruntime:Default, device_discovery.cc:164 ...", even where there is no device to discover.
_CHATTER = re.compile(rb"(INFO|VERBOSE):|.{0,80}\[[VIW]:onnxruntime")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what native code writes to stderr, and let it through afterwards without the chatter.

    If the body fails nothing is let through: its exception says it already.
    """
    with held_back() as lines:
        yield
    for line in lines:
        if not _CHATTER.match(line):
            os.write(2, line)


@contextlib.contextmanager
def held_back() -> Iterator[list[bytes]]:
    """Keep from stderr what native code writes there; the lines are in the list afterwards, also if the body fails."""
    lines: list[bytes] = []
    saved = None
    with contextlib.suppress(OSError, ValueError, AttributeError):  # there may be no stderr, as under pythonw
        sys.stderr.flush()
        saved = os.dup(2)
    if saved is None:
        yield lines
        return
    with _nameless_file() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            lines.extend(held)


def _nameless_file() -> BinaryIO:
    """Open a file that nobody else sees; `tempfile` brings libraries for archives, 0.6 MB."""
    if sys.platform == "linux":
        return os.fdopen(os.memfd_create("stderr"), "w+b")
    import tempfile

    return cast("BinaryIO", tempfile.TemporaryFile())


def place_of(model: Model) -> str:
    """Name a model in an error: its file's or its graph's name."""
    return model.name if isinstance(model, Path | Graph) else Path(model).name if isinstance(model, str) else "model"


def one_line(error: BaseException) -> str:
    """Give an error's text without line breaks, cut where it gets too long to read."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def checked_file(model: Model, runtime: str) -> Path | bytes:
    """Check that a model is a readable file or bytes.

    Raises:
        BundleError: it cannot be read or is empty.
        UsageError: it is a Graph.
    """
    if isinstance(model, Graph):
        raise UsageError(f"runtime {runtime} runs files; a graph is run by the runtime 'reference'")
    if isinstance(model, bytes):
        if not model:
            raise BundleError("model: empty, expected an exported file")
        return model
    path = Path(model)
    try:
        with path.open("rb") as f:
            if not f.read(1):
                raise BundleError(f"{path.name}: empty, expected an exported file")
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); expected an exported file") from error
    return path


def checked_threads(threads: int) -> int:
    """Give back a number of threads.

    Raises:
        UsageError: not a whole number from 1 to 1024.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise UsageError(f"threads is {threads!r:.80}, expected a whole number from 1 to 1024")
    return threads


def import_runtime(module: str, package: str) -> Any:
    """Import a runtime's module.

    Raises:
        TargetError: its package is missing or broken; the message says how to install it.
    """
    try:
        with quiet():
            return importlib.import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and module.startswith(str(error.name)):
            what = "is not installed"
        else:
            what = f"cannot be imported ({one_line(error)})"
        raise TargetError(f"{package} {what}: {_INSTALL.get(package, _INSTALL_ALL)}") from error


def version_of(module: str, package: str) -> str:
    """Give an imported runtime's version, as it says itself; reading its package's description would take 2 MB.

    Args:
        module: its top-level name.
        package: which is asked where the module does not say.
    """
    version = getattr(sys.modules[module], "__version__", None)
    if version is None:
        from importlib import metadata

        version = metadata.version(package)
    return str(version)


def fitting(x: Array, border: Border, place: str) -> Array:
    """Bring images to the input's type: (N, C, H, W), NCHW still.

    Raises:
        DataError: another shape or type.
    """
    x = np.asarray(x)
    if x.ndim < 1 or not len(x) or x.shape[1:] != border.shape:
        expected = ", ".join(["N", *map(str, border.shape)])
        raise DataError(f"{place}: images have shape {x.shape}, the model takes ({expected})")
    if x.dtype == border.dtype:
        return np.ascontiguousarray(x)
    if x.dtype.kind == "f" and border.dtype.kind == "f":
        return np.ascontiguousarray(x, dtype=border.dtype)
    if x.dtype.kind != "f" or border.dtype != np.int8:
        raise DataError(f"{place}: images are {x.dtype}, the model takes {border.dtype}")
    if border.quant is None:
        raise DataError(
            f"{place}: the model takes int8 and does not say what its codes mean; quantize the images first"
        )
    from edgecomp.quantmath import quantize

    return quantize(x, border.quant)


MOST_NUMBERS = 1 << 28
"""Of an image: a gigabyte of float32, far more than any network for these devices reads."""


def sample_image(border: Border) -> Array:
    """Make the image (1, C, H, W) that latency is measured with: noise, as zeros could take shortcuts.

    Even noise: over all codes, or real numbers of mean 0 and variance 1. Not by numpy.random, which with what it loads
    takes 6 MB that would be counted as the runtime's.

    Raises:
        BundleError: an image is larger than MOST_NUMBERS.
    """
    rng, shape = random.Random(0), (1, *border.shape)
    n = math.prod(shape)
    if n > MOST_NUMBERS:
        raise BundleError(f"{border.name!r:.80} takes {n} numbers an image, expected at most {MOST_NUMBERS}")
    if border.dtype.kind == "f":
        steps = np.frombuffer(rng.randbytes(2 * n), dtype="<u2").astype(np.float32)
        steps -= 32767.5
        steps *= math.sqrt(12) / 65536
        return steps.reshape(shape).astype(border.dtype, copy=False)
    codes = np.frombuffer(bytearray(rng.randbytes(n * border.dtype.itemsize)), dtype=border.dtype)
    return codes.reshape(shape)


def channels_last(x: Array) -> Array:
    """Turn NCHW images into NHWC; leave features as they are."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else x


def channels_first(x: Array) -> Array:
    """Turn NHWC images into NCHW; leave features as they are."""
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x


def channels_last_border(
    name: str, shape: tuple[int, ...], dtype: np.dtype[Any], scale: float, zero_point: int, place: str
) -> Border:
    """Describe a border of a channels-last file.

    Args:
        name: in the file.
        shape: in the file, N included.
        dtype: of its elements.
        scale: of integers; 0 where the file does not say.
        zero_point: of integers.
        place: the file, for errors.

    Raises:
        BundleError: another type, or N is not 1.
    """
    if not shape or shape[0] != 1 or dtype not in (np.float32, np.int8, np.uint8):
        raise BundleError(f"{place}: {name!r:.80} is {dtype} {shape}, expected float, int8 or uint8 with N = 1")
    shape = (shape[3], shape[1], shape[2]) if len(shape) == 4 else shape[1:]
    quant = None if dtype.kind == "f" or not scale else eight_bits(scale, zero_point, place)
    return Border(name=name, shape=shape, dtype=dtype, quant=quant)


def eight_bits(scale: float, zero_point: int, place: str) -> QuantParams:
    """Make the parameters of an 8-bit border from what a file says.

    Raises:
        BundleError: a scale that is not above 0, or a zero point that is no 8-bit code.
    """
    if not (math.isfinite(scale) and np.float32(scale) > 0) or not -128 <= zero_point <= 255:
        raise BundleError(f"{place}: scale {scale} and zero point {zero_point}: expected above 0, and an 8-bit code")
    return QuantParams(bits=8, scale=np.array(scale), zero_point=np.array(zero_point))
