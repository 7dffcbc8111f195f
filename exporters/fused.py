"""Which activation of TFLite clamps an output exactly as a node does. Decides only; writes nothing."""

from __future__ import annotations

import numpy as np

from edgecomp.graph import Node, Tensor
from edgecomp.ops import clamp_codes
from edgecomp.quantmath import ACT_MAX, ACT_MIN

_LIMITS = {"RELU": (0.0, np.inf), "RELU6": (0.0, 6.0), "RELU_N1_TO_1": (-1.0, 1.0)}
"""Real limits of the activations that TFLite can fuse."""


def limits_of(node: Node, output: Tensor) -> tuple[float, float]:
    """Give what the node clamps its output to: codes if that is quantized, else real numbers."""
    if output.quant is not None:
        return clamp_codes(node)
    low, high = node.attrs.get("low", -np.inf), node.attrs.get("high", np.inf)
    return float(low), float(high)  # type: ignore[arg-type]


def fused_activation(node: Node, output: Tensor) -> str | None:
    """Name the activation that gives exactly the node's limits; None where TFLite has none."""
    limits = limits_of(node, output)
    if output.quant is None:
        names = {limit: name for name, limit in _LIMITS.items()} | {(-np.inf, np.inf): "NONE"}
        return names.get(limits)
    scale, zero_point = np.float32(output.quant.scale), int(output.quant.zero_point)
    if limits == (ACT_MIN, ACT_MAX):
        # Saturation does it all; say RELU where it means that, for readers of the file.
        return "RELU" if zero_point == ACT_MIN else "NONE"
    for name, (low, high) in _LIMITS.items():
        if limits == (_kernel_code(low, scale, zero_point), _kernel_code(high, scale, zero_point)):
            return name
    return None


def _kernel_code(limit: float, scale: np.float32, zero_point: int) -> int:
    """Turn a limit into a code as TFLite's kernels do: float32, ties away from zero."""
    if np.isinf(limit):
        return ACT_MAX
    steps = np.float32(limit) / scale
    code = zero_point + int(np.sign(steps) * np.floor(np.abs(steps) + np.float32(0.5)))
    return max(ACT_MIN, min(ACT_MAX, code))
