"""What an exporter gives: the bytes of a file, and where the bytes went."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """How one layer's weight tensor lies in a file.

    Attributes:
        layer: the layer's name.
        bits: logical width of a code; 32 for float.
        stored_bits: width the format spends on a code that is stored by itself.
        stored_bytes: bytes of the codes as they are stored, tables included; no scales, biases, graph structure.
        encoding: "dense": every code by itself; "words": numbers of words, see `coding`.
    """

    layer: str
    bits: int
    stored_bits: int
    stored_bytes: int
    encoding: str = "dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A file before it is on disk.

    Attributes:
        format: "onnx" or "tflite".
        data: the whole file.
        weights: one entry a layer, in running order.
    """

    format: str
    data: bytes
    weights: tuple[StoredWeight, ...]

    def sha256(self) -> str:
        """Identify the file's content."""
        return hashlib.sha256(self.data).hexdigest()
