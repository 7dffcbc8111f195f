"""What every model file has: borders, operators, weights and where the bytes went; shared by the readers of formats."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from edgecomp.graph import Array

MAX_RANK = 64
NO_WEIGHTS = frozenset({"int32", "int64", "uint32", "uint64", "bool", "string", "resource", "variant", "undefined"})
"""Types of constants that are indices, paddings or names, never weights."""
MEANT_BY_DAMAGED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What reading a damaged file can raise from within."""

def model_facts(
    *,
    kind: str,
    producer: str,
    version: str,
    inputs: list[dict[str, object]],
    outputs: list[dict[str, object]],
    operators: Iterable[str],
    weights: list[dict[str, Any]],
    weight_bytes: int,
    file_bytes: int,
) -> dict[str, object]:
    """Put a description together.

    Raises:
        ValueError: the weights take more bytes than the file has.
    """
    other = file_bytes - weight_bytes + sum(w["stored_bytes"] for w in weights if "external" in w)
    if other < 0:
        raise ValueError(f"its weights claim {weight_bytes} bytes, it has {file_bytes}")
    n = sum(weight["n"] for weight in weights)
    return {
        "kind": kind,
        "producer": producer,
        "format_version": version,
        "inputs": inputs,
        "outputs": outputs,
        "operators": dict(sorted(Counter(operators).items(), key=lambda item: (-item[1], item[0]))),
        "weights": weights,
        "weight_bytes": weight_bytes,
        "other_bytes": other,
        "mean_bits": round(8 * weight_bytes / n, 4) if n else None,
    }


def weight_row(name: str, shape: Sequence[int], bits: int, stored_bytes: int) -> dict[str, Any]:
    """Describe one weight: n codes of `bits` bits each."""
    return {"name": name, "shape": list(shape), "n": math.prod(shape), "bits": bits, "stored_bytes": stored_bytes}


def bits_of(dtype: str) -> int:
    """Read the width off a type's name: int4, bfloat16, float8e4m3fn."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8


def check_length(name: str, n: int, bits: int, stored_bytes: int) -> None:
    """Refuse a weight whose bytes do not fit its shape (ValueError)."""
    # How 6-bit floats lie in a file is not settled.
    if bits != 6 and stored_bytes != -(-n * bits // 8):
        raise ValueError(f"weight {name!r:.80} has {stored_bytes} bytes, expected {n} codes of {bits} bits")


def checked_shape(dims: Sequence[int], name: str) -> list[int]:
    """Refuse a shape that no tensor has (ValueError)."""
    if len(dims) > MAX_RANK or any(d < 0 for d in dims):
        raise ValueError(f"{name!r:.80} has no legal shape")
    return [int(d) for d in dims]


def affine(scale: Array, zero_point: Array) -> dict[str, object]:
    """Give scale and zero point for a description, if there is one pair for the whole tensor."""
    if scale.size != 1 or zero_point.size > 1:
        return {}
    value = float(scale.reshape(-1)[0])
    if not math.isfinite(value):
        raise ValueError(f"a scale is {value}")
    return {"scale": value, "zero_point": int(zero_point.reshape(-1)[0]) if zero_point.size else 0}

