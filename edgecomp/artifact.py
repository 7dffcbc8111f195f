"""What an exporter gives: the bytes of a file, and where the bytes went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType


class AtRest(StrEnum):
    """How a file stores its weights.

    NATIVE: as the format's stock runtimes read them: ONNX packed by standard operators, TFLite in int4 or int8.
    INT8: all in int8, the largest: ordinary files, also for ONNX runtimes that do not compute constants at load.
    PACKED: TFLite only: packed as in ONNX, and widened to int8 before an interpreter sees the file. (TFLite Micro's
    native form is packed, too: its interpreter widens weights layer by layer.)
    """

    NATIVE = "native"
    INT8 = "int8"
    PACKED = "packed"


def form_of(format_name: str, at_rest: AtRest) -> str:
    """Name a format and how it stores weights in one word: "onnx", "onnx-int8", "tflite", "tflite-int8", ...

    Native ONNX, TFLite Micro and C are packed already: asked for packed files, they are that.
    """
    plain = at_rest is AtRest.NATIVE or (format_name != "tflite" and at_rest is AtRest.PACKED)
    return format_name if plain else f"{format_name}-{at_rest}"


FILES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "onnx": ("model.onnx",),
        "tflite": ("model.tflite",),
        "tflm": ("model.tflm.tflite", "model.cc", "model.h"),
        "c": ("network.c", "network.h", "edgecomp_kernels.c", "edgecomp_kernels.h"),
    }
)
"""What a file of each format is called in a folder, and then what is written beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """How one layer's weight tensor lies in a file.

    Attributes:
        layer: the layer's name.
        bits: logical width of a code; 32 for float.
        stored_bits: width the format spends on a code that is stored by itself; of its index where there is a table.
        stored_bytes: bytes of the codes as they are stored, tables included; no scales, biases, graph structure.
        encoding: "dense": every code by itself; "words": numbers of words, see `coding`; "table", "bitmap": see
            `coding.MicroForm`; in C "dense", "table", "sparse", "sparse_table", see `exporters.c_weights`.
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
        format: "onnx", "tflite", "tflm" or "c".
        data: the whole file.
        weights: one entry a layer, in running order.
        at_rest: how it stores them.
        companions: what is written beside it and cannot be told from it, by name: of C header and kernels.
        flash_bytes: what a device stores of it where that is not the file: of C the constants, without code. None: the
            file.
        memory_plan: a picture of it, in lines of text; of C alone.
        stray_transposes: how many operators of a TFLite file bring images into another layout and back: those around a
            flatten or reshape, not the transpose that is a channel shuffle. 0 for ONNX, which has one layout.
    """

    format: str
    data: bytes
    weights: tuple[StoredWeight, ...]
    at_rest: AtRest = AtRest.NATIVE
    companions: Mapping[str, bytes] = field(default_factory=dict)
    flash_bytes: int | None = None
    memory_plan: str | None = None
    stray_transposes: int = 0

    @property
    def device_bytes(self) -> int:
        """Give what a device stores: what a budget of bytes is about."""
        return len(self.data) if self.flash_bytes is None else self.flash_bytes

    @property
    def name(self) -> str:
        """Give the file's name in a folder."""
        return FILES[self.format][0]

    @property
    def form(self) -> str:
        """Give what `form_of` says: `export` takes it and gives the same file."""
        return form_of(self.format, self.at_rest)

    def sha256(self) -> str:
        """Identify the file's content."""
        import hashlib  # see graph.digest

        return hashlib.sha256(self.data).hexdigest()
