"""What a network in C says of itself, in the first line of its source: for tools that compile and measure it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgecomp.errors import BundleError

BEGIN, _END = "/* edgecomp-network ", " */"
_COUNTS = ("arena_bytes", "constant_bytes", "macs")
_BORDERS = ("input", "output")


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeBorder:
    """The codes that go into a network or come out of it; real = scale * (code - zero_point).

    Attributes:
        shape: H, W, C, or F.
        scale: above zero.
        zero_point: -128 to 127.
    """

    shape: tuple[int, ...]
    scale: np.float32
    zero_point: int

    @property
    def n_bytes(self) -> int:
        """Count the codes."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFacts:
    """What a caller and a linker have to know.

    Attributes:
        name: what its functions begin with.
        graph_digest: of the quantized graph that it computes, to the last bit: whatever the C looks like.
        input: of images.
        output: of results.
        arena_bytes: memory that the caller gives.
        input_offset: where in it the input may lie; None where it may not.
        constant_bytes: weights and scales, in flash.
        macs: multiplications a run.
        steps: the calls of kernels, by the names of their layers.
        peak_step: the one that needs most of the arena at once.
        weight_bytes: of every layer's weights as they are stored, without scales; a part of constant_bytes.
        files_sha256: of the source behind its first line, the header and the kernels: see `digest_of`.
    """

    name: str
    graph_digest: str
    input: CodeBorder
    output: CodeBorder
    arena_bytes: int
    input_offset: int | None
    constant_bytes: int
    macs: int
    steps: tuple[str, ...]
    peak_step: str
    weight_bytes: Mapping[str, int]
    files_sha256: str = ""

    @property
    def border_name(self) -> str:
        """Name what the caller gives beside the arena."""
        return "input and output" if self.input_offset is None else "output (the input lies in the arena)"

    @property
    def border_bytes(self) -> int:
        """Count its bytes."""
        return self.output.n_bytes + (self.input.n_bytes if self.input_offset is None else 0)

    def to_line(self) -> str:
        """Give the comment that `read_facts` reads."""
        values = asdict(self)
        for key in _BORDERS:
            values[key]["scale"] = float(values[key]["scale"])
        # Nothing in a name may end the comment.
        text = json.dumps(values, separators=(",", ":")).replace("/", "\\u002f")
        return f"{BEGIN}{text}{_END}"


def digest_of(body: bytes, companions: Mapping[str, bytes]) -> str:
    """Identify a network's files: a sha256.

    Args:
        body: the source behind its first line.
        companions: header and kernels, by name.
    """
    both = hashlib.sha256(hashlib.sha256(body).digest())
    for name, data in sorted(companions.items()):
        both.update(name.encode() + hashlib.sha256(data).digest())
    return both.hexdigest()


def check_files(files: Mapping[str, bytes], source: str, where: str) -> None:
    """Check that a network's files are as they were written.

    Args:
        files: all of them, by name.
        source: the name of the one that speaks for all.
        where: for errors.

    Raises:
        BundleError: one was changed, cut, or is of another network.
    """
    facts = read_facts(files[source], f"{where}/{source}")
    body = files[source].partition(b"\n")[2]
    if digest_of(body, {name: data for name, data in files.items() if name != source}) != facts.files_sha256:
        raise BundleError(
            f"{where}: {', '.join(files)} are not what edgecomp wrote together: one was changed or damaged; write them "
            "again with edgecomp export, or build again"
        )


def read_facts(source: bytes, where: str) -> NetworkFacts:
    """Read the first line of a source.

    Raises:
        BundleError: it is not what `to_c` writes; `where` names it.
    """
    line = source.split(b"\n", 1)[0].decode("utf-8", errors="replace")
    try:
        if not (line.startswith(BEGIN) and line.endswith(_END)):
            raise ValueError("it does not begin with a comment edgecomp-network")
        found = json.loads(line[len(BEGIN) : -len(_END)])
        return _facts(found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise BundleError(f"{where}: is no network in C by edgecomp, or damaged: {e}") from e


def _facts(found: Mapping[str, Any]) -> NetworkFacts:
    expected = {"name", "graph_digest", *_BORDERS, *_COUNTS, "input_offset", "steps", "peak_step", "weight_bytes",
                "files_sha256"}  # fmt: skip
    if set(found) != expected:
        raise ValueError(f"its first line says {sorted(found)!r:.80}, expected {sorted(expected)}")
    name = found["name"]
    if not (isinstance(name, str) and name.isascii() and name.isidentifier()):
        raise ValueError(f"name is {name!r:.60}")
    for key in _COUNTS:
        if not isinstance(found[key], int) or not 0 <= found[key] < 1 << 32:
            raise ValueError(f"{key} is {found[key]!r:.60}")
    offset, n_input = found["input_offset"], _read_border(found["input"]).n_bytes
    if offset is not None and not (isinstance(offset, int) and 0 <= offset <= found["arena_bytes"] - n_input):
        raise ValueError(f"input_offset is {offset!r:.60}")
    weights = found["weight_bytes"]
    for layer, n_bytes in weights.items():
        if not isinstance(n_bytes, int) or not 0 <= n_bytes <= found["constant_bytes"]:
            raise ValueError(f"weight_bytes of {layer!r:.60} is {n_bytes!r:.60}")
    return NetworkFacts(
        name=name,
        graph_digest=str(found["graph_digest"]),
        input=_read_border(found["input"]),
        output=_read_border(found["output"]),
        **{key: found[key] for key in _COUNTS},
        input_offset=offset,
        steps=tuple(str(step) for step in found["steps"]),
        peak_step=str(found["peak_step"]),
        weight_bytes=weights,
        files_sha256=str(found["files_sha256"]),
    )


def _read_border(found: Mapping[str, Any]) -> CodeBorder:
    shape, scale, zero_point = found["shape"], found["scale"], found["zero_point"]
    if not all(isinstance(n, int) and 0 < n < 1 << 31 for n in shape) or math.prod(shape) >= 1 << 31:
        raise ValueError(f"a shape is {shape!r:.60}")
    if not (isinstance(scale, float) and 0 < scale < 1e30 and isinstance(zero_point, int) and -128 <= zero_point < 128):
        raise ValueError(f"a scale is {scale!r:.30}, a zero point {zero_point!r:.30}")
    return CodeBorder(shape=tuple(shape), scale=np.float32(scale), zero_point=zero_point)
