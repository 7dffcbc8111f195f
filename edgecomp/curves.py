"""Curved functions of one number: sigmoid, silu and their hard forms, on real numbers and as tables of 256 codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from edgecomp import quantmath
from edgecomp.graph import Array, Op, QuantParams

GATES = frozenset({Op.SIGMOID, Op.HARD_SIGMOID})
"""Those that give a share, from 0 to 1, and 1/2 for 0."""


def _sigmoid(x: Array) -> Array:
    result: Array = np.exp(-np.logaddexp(0, -x)).astype(x.dtype, copy=False)
    return result


def _hard_sigmoid(x: Array) -> Array:
    result: Array = (np.clip(x + 3, 0, 6) / 6).astype(x.dtype, copy=False)
    return result


CURVES: Mapping[Op, Callable[[Array], Array]] = {
    Op.SIGMOID: _sigmoid,
    Op.HARD_SIGMOID: _hard_sigmoid,
    Op.SILU: lambda x: x * _sigmoid(x),
    Op.HARD_SWISH: lambda x: x * _hard_sigmoid(x),
}
"""1 / (1 + e^-x); relu6(x + 3) / 6; x times the first; x times the second. The dtype stays."""
FUNCTIONS = frozenset(CURVES)
_GATE_OF = {Op.SILU: (_sigmoid, quantmath.UNIT), Op.HARD_SWISH: (_hard_sigmoid, quantmath.SHARES)}
"""What x is multiplied by, and the codes that it has in runtimes without the operator."""


def curve_codes(op: Op, source: QuantParams, target: QuantParams) -> Array:
    """Give what a function writes for each code that it reads: int8 (256,), entry i for code i - 128.

    For silu and hard_swish this is x times the codes of a gate wherever that is at most one step from the function: the
    stock runtimes have no such operators on codes, but are fast at sigmoids, sums and products.
    """
    by_gate = gate_codes(op, source, target)
    return quantmath.table(CURVES[op], source, target) if by_gate is None else by_gate


def gate_codes(op: Op, source: QuantParams, target: QuantParams) -> Array | None:
    """Give what x times a gate in codes is, where that serves for a silu or hard_swish: int8 (256,); else None."""
    if op not in _GATE_OF:
        return None
    gate, params = _GATE_OF[op]
    codes = np.arange(quantmath.ACT_MIN, quantmath.ACT_MAX + 1)
    found = quantmath.multiply(codes, quantmath.table(gate, source, params), (source, params), target)
    off = np.abs(found.astype(np.int64) - quantmath.table(CURVES[op], source, target))
    return found if off.max() <= 1 else None
