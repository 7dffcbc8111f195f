"""Instructions of Thumb by class, as tables of cycles tell them apart. Read off their encodings; nothing is executed.

Encodings: Armv7-M Architecture Reference Manual, A5. An instruction of 32 bits begins with 0b11101, 0b11110 or 0b11111.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

CLASSES = ("load", "store", "multiple", "multiply", "divide", "branch", "float", "other")
"""multiple: loads and stores of several registers; multiply: DSP's too; branch: calls and returns too."""
REGISTERS = "multiple_registers"
"""Beside the classes: how many registers the multiple ones moved in all."""


def class_of(code: bytes) -> tuple[str, int]:
    """Tell an instruction's class, and how many registers it moves if that is "multiple", else 0.

    Args:
        code: 2 or 4 bytes, little-endian halfwords.
    """
    first = int.from_bytes(code[:2], "little")
    return _narrow(first) if len(code) == 2 else _wide(first, int.from_bytes(code[2:4], "little"))


def count_classes(instructions: Iterable[tuple[bytes, int]]) -> dict[str, int]:
    """Sum up how often each class was executed, from instructions with their counts; REGISTERS is added."""
    counts = Counter(dict.fromkeys((*CLASSES, REGISTERS), 0))
    for code, n in instructions:
        name, registers = class_of(code)
        counts[name] += n
        counts[REGISTERS] += n * registers
    return dict(counts)


def _narrow(x: int) -> tuple[str, int]:
    top, register = x >> 11, x >> 9
    if top in (0b01001, 0b01101, 0b01111, 0b10001, 0b10011) or 0b0101011 <= register <= 0b0101111:
        return "load", 0
    if top in (0b01100, 0b01110, 0b10000, 0b10010) or 0b0101000 <= register <= 0b0101010:
        return "store", 0
    if top in (0b11000, 0b11001) or register in (0b1011010, 0b1011110):
        return "multiple", (x & 0x1FF if register in (0b1011010, 0b1011110) else x & 0xFF).bit_count()
    if x >> 6 == 0b0100001101:
        return "multiply", 0
    conditional = x >> 12 == 0b1101 and (x >> 8 & 15) < 14
    compared = x & 0xF500 == 0xB100
    return ("branch" if conditional or compared or top == 0b11100 or x >> 8 == 0b01000111 else "other"), 0


def _wide(x: int, y: int) -> tuple[str, int]:
    if x >> 11 == 0b11110:
        conditional = y >> 15 and not y >> 12 & 1 and (x >> 7 & 7) != 7
        return ("branch" if y >> 15 and (y >> 12 & 1 or conditional) else "other"), 0
    if x >> 9 == 0b1110100:
        if x >> 6 & 1 == 0:
            return "multiple", y.bit_count()
        if x & 0xFFF0 == 0xE8D0 and y & 0xFFE0 == 0xF000:
            return "branch", 0
        if x >> 8 & 1 or x >> 5 & 1:
            return "multiple", 2
        return ("load" if x >> 4 & 1 else "store"), 0
    if x >> 9 == 0b1111100:
        return ("load" if x >> 4 & 1 else "store"), 0
    if x >> 7 == 0b111110110:
        return "multiply", 0
    if x >> 7 == 0b111110111:
        return ("divide" if x >> 4 & 0b1101 == 0b1001 and y >> 4 & 15 == 15 else "multiply"), 0
    return ("float" if x >> 10 & 0b111011 == 0b111011 else "other"), 0
