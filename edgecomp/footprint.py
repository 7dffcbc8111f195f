"""What a network needs of a board's memories, and whether it can be there at all: estimated, as its time is.

Weights lie in a microcontroller's flash; elsewhere they are in RAM, beside the activations that are needed at once.
Code, a runtime's own memory and an operating system come on top: what does not fit here cannot run, what fits here may
still not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from edgecomp.arena import Buffer, least_bytes
from edgecomp.graph import Graph, Op
from edgecomp.work import Work

_OVERWRITES = frozenset(
    {Op.ADD, Op.MUL, Op.CLIP, Op.SIGMOID, Op.HARD_SIGMOID, Op.SILU, Op.HARD_SWISH, Op.FLATTEN, Op.RESHAPE, Op.SOFTMAX,
     Op.QUANTIZE, Op.DEQUANTIZE}
)  # fmt: skip
"""Operators that can write over what they read, element by element."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes that a network needs, and that a board has.

    Attributes:
        weight_bytes: that are stored, of a file with all that is in it.
        activation_bytes: that are needed at once; None where that is the runtime's affair.
        in_flash: whether weights lie in flash; else in RAM.
        flash_bytes, ram_bytes: of the board; None where that is not known.
        file: that weight_bytes are of; "" where the weights were counted.
    """

    weight_bytes: int
    activation_bytes: int | None
    in_flash: bool
    flash_bytes: int | None
    ram_bytes: int | None
    file: str = ""

    def _needs(self) -> Iterable[tuple[str, int, int, str]]:
        """Give every memory whose size is known: its name, what is needed, what there is, and for what."""
        weights = self.file or "weights"
        if self.in_flash and self.flash_bytes is not None:
            yield "flash", self.weight_bytes, self.flash_bytes, weights
        if self.ram_bytes is not None and self.activation_bytes is not None:
            more = 0 if self.in_flash else self.weight_bytes
            what = "activations" if self.in_flash else f"{weights}, activations"
            yield "RAM", more + self.activation_bytes, self.ram_bytes, what

    @property
    def fits(self) -> bool | None:
        """Tell whether all that was counted fits; None where no size is known."""
        found = [needed <= there for _, needed, there, _ in self._needs()]
        return all(found) if found else None

    def to_json(self) -> dict[str, object]:
        """Give it for machines."""
        return {**asdict(self), "fits": self.fits}

    def text(self) -> str:
        """Say it in one line; "" where no size is known."""
        parts = [
            f"{name} {needed:,} of {there:,} bytes ({what}){': too much' * (needed > there)}"
            for name, needed, there, what in self._needs()
        ]
        start = {True: "memory, estimated", False: "does not fit the board, estimated", None: ""}[self.fits]
        return f"{start}: {'; '.join(parts)}; code and the runtime's own come on top" if parts else ""


def activation_bytes(graph: Graph, element_bytes: int) -> int:
    """Give what activations need at once, at least: what an operator reads and writes, and what later ones still read.

    Args:
        graph: float or quantized.
        element_bytes: of one value.
    """
    last = {name: step for step, node in enumerate(graph.nodes) for name in node.inputs}
    last |= dict.fromkeys(graph.outputs, len(graph.nodes))
    size = {name: math.prod(t.shape) for name, t in graph.tensors.items() if t.data is None}
    # Of whatever holds a value: the first operator that needs it, and the last.
    lives = {name: (0, last.get(name, 0)) for name in graph.inputs}
    held_by = {name: name for name in graph.inputs}
    for step, node in enumerate(graph.nodes):
        read = [held_by[name] for name in node.inputs if name in held_by]
        for name in node.outputs:
            end = last.get(name, step)
            free = (b for b in read if lives[b][1] == step and size[b] == size[name])
            buffer = next(free, name) if node.op in _OVERWRITES else name
            held_by[name] = buffer
            lives[buffer] = (lives.get(buffer, (step, 0))[0], end)
    return least_bytes(
        [Buffer(name=b, n_bytes=size[b] * element_bytes, first=first, last=end) for b, (first, end) in lives.items()]
    )


def layer_activation_bytes(work: Iterable[Work], element_bytes: int) -> int:
    """Give the same where only the layers are known, one by one: what is kept for later ones is not in it."""
    return element_bytes * max(w.inputs + w.outputs if w.weights else max(w.inputs, w.outputs) for w in work)
