"""The arithmetic of quantization: each formula stands here once; the C kernels and every exporter follow it.

Activations: int8, asymmetric, one scale a tensor. Weights: 2-8 bits, symmetric, one scale an output channel.
Biases: int32 with scale = input scale x weight scale. Rescaling uses an integer multiplier and a shift, so that a core
without floating point computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgecomp.errors import GraphError
from edgecomp.graph import Array, QuantParams

WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8)
"""Widths a weight may have."""
ACT_MIN, ACT_MAX = -128, 127
"""Range of an activation code."""
_MULTIPLIER_BITS = 31
_CLIP_STEPS = 16
CLIP_FLOOR = {2: 0.30, 3: 0.40, 4: 0.50, 5: 0.60, 6: 0.70, 7: 0.80, 8: 0.90}
"""The smallest share of max |w| worth trying, by bits: a ternary grid wants to clip much, 8 bits hardly at all."""
_CHUNK_ELEMENTS = 1 << 16
_LEAST_RANGE = 1e-6
_GRID_LIMIT = 31
_GRID_TOLERANCE = 1e-4
# Times the smallest input scale this is still a normal float32, and not zero on a device that knows no others.
_LEAST_WEIGHT_SCALE = np.float32(2.0**-80)
# XNNPACK's kernels for int4 weights add up sixteen times each product and the bias: five bits of an int32 are not ours.
_BIAS_LIMIT = 1 << 26


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The values that the weights of a layer may take: whole multiples of a step, 2^(bits-1) - 1 of them each way.

    A coarse step makes most codes 0 or 1 and the tensor small wherever storage follows the frequency of codes, while
    the few large weights keep theirs: at the same size that loses less than a narrow grid without zeros.

    Attributes:
        bits: 2-8.
        step: in units of the root mean square of the layer's weights; None: each channel's own, for the least error.
    """

    bits: int
    step: float | None = None


def root_mean_square(weight: Array) -> np.float32:
    """Take the root of the mean square of float32 weights; the smallest scale there is where all are 0."""
    return max(np.float32(np.sqrt(np.mean(np.square(weight, dtype=np.float64)))), _LEAST_WEIGHT_SCALE)


def weight_limit(bits: int) -> int:
    """Give the largest code of a symmetric weight: 2^(bits-1) - 1, e.g. 1 for 2 bits, 127 for 8."""
    return (1 << (bits - 1)) - 1


def activation_params(low: float, high: float) -> QuantParams:
    """Choose int8 scale and zero point for values in [low, high]; the range is widened to hold 0 exactly.

    When low is 0 the zero point is -128, so that saturation of the code is the ReLU.

    Raises:
        GraphError: the range is not finite or is reversed.
    """
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        raise GraphError(f"activation range [{low}, {high}]: expected finite numbers with low <= high")
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low < _LEAST_RANGE:
        # Constant on the calibration data. A tiny scale would be no gain there, and runtimes refuse it.
        high = low + 1.0
    return params_from(low, (high - low) / (ACT_MAX - ACT_MIN))


def params_from(low: float, scale: float) -> QuantParams:
    """Give int8 parameters of a scale whose smallest code is about `low`, or 0 where that is above; 0 is exact."""
    rounded = np.array(scale, dtype=np.float32)
    zero_point = int(np.clip(np.rint(ACT_MIN - min(low, 0.0) / float(rounded)), ACT_MIN, ACT_MAX))
    return QuantParams(bits=8, scale=rounded, zero_point=np.array(zero_point))


def grid_scale(weight: Array, grid: Grid) -> Array:
    """Choose the scale of each output channel float32 (O,) for weights float32 (O, ...) on a grid."""
    if grid.step is None:
        return choose_weight_scale(weight, grid.bits)
    return np.full(len(weight), root_mean_square(weight) * np.float32(grid.step), dtype=np.float32)


def choose_weight_scale(weight: Array, bits: int) -> Array:
    """Choose the scale of each output channel that minimises the squared rounding error, by a fixed grid of clips.

    A channel that lies on a grid of at most 6 bits already, because a reconstruction put it there, keeps that grid, so
    rounding it again changes nothing. A channel of zeros gets the largest scale of the others, which suits its bias; 1
    when all are zero. Deterministic and data-free.

    Args:
        weight: float32 (O, ...).
        bits: one of WEIGHT_BITS.

    Returns:
        float32 (O,), above zero.
    """
    rows = np.ascontiguousarray(weight, dtype=np.float32).reshape(weight.shape[0], -1)
    limit = weight_limit(bits)
    scales = np.zeros(rows.shape[0], dtype=np.float32)
    shares = np.linspace(1.0, CLIP_FLOOR[bits], _CLIP_STEPS, dtype=np.float32)
    step = max(1, _CHUNK_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        block = rows[start : start + step]
        peak = np.abs(block).max(axis=1)
        alive = peak > 0
        base = np.maximum(np.where(alive, peak, 1).astype(np.float32) / np.float32(limit), _LEAST_WEIGHT_SCALE)
        best_error = np.full(block.shape[0], np.inf, dtype=np.float32)
        best_scale = base.copy()
        for share in shares:
            scale = (base * share).astype(np.float32)
            codes = np.rint(block / scale[:, None])
            np.clip(codes, -limit, limit, out=codes)
            codes *= scale[:, None]
            codes -= block
            error = np.einsum("oi,oi->o", codes, codes)
            better = error < best_error
            best_error[better] = error[better]
            best_scale[better] = scale[better]
        best_scale = np.where(best_error > 0, _scale_on_grid(block, peak, limit, best_scale), best_scale)
        scales[start : start + step] = np.where(alive, np.maximum(best_scale, _LEAST_WEIGHT_SCALE), np.float32(0))
    dead = scales == 0
    scales[dead] = 1 if dead.all() else scales.max()
    return scales


def _scale_on_grid(block: Array, peak: Array, limit: int, otherwise: Array) -> Array:
    """Give each row's scale peak / k of which the whole row is multiples, k <= limit; else `otherwise` (O,)."""
    found = otherwise.copy()
    open_rows = np.flatnonzero(peak > 0)
    for k in range(1, limit + 1 if limit <= _GRID_LIMIT else 0):
        scale = (peak[open_rows] / np.float32(k)).astype(np.float32)
        few = block[open_rows, :64] / scale[:, None]
        likely = np.abs(few - np.rint(few)).max(axis=1) < _GRID_TOLERANCE
        whole = block[open_rows[likely]] / scale[likely, None]
        fits = np.abs(whole - np.rint(whole)).max(axis=1, initial=0) < _GRID_TOLERANCE
        on_grid = np.zeros(len(open_rows), dtype=bool)
        on_grid[np.flatnonzero(likely)[fits]] = True
        found[open_rows[on_grid]] = scale[on_grid]
        open_rows = open_rows[~on_grid]
    return found


def widen_for_bias(weight_scale: Array, bias: Array, input_scale: Array) -> Array:
    """Raise scales float32 (O,) where a bias float32 (O,) would saturate: channels whose weights have nearly died.

    What is lost of such a channel's weights is less than a millionth of its bias.
    """
    least = np.abs(bias.astype(np.float64)) / (float(input_scale) * _BIAS_LIMIT)
    return np.maximum(weight_scale, least.astype(np.float32))


def quantize_weight(weight: Array, scale: Array, bits: int) -> Array:
    """Round to codes: weight float32 (O, ...), scale float32 (O,) -> int8 (O, ...) within +-weight_limit(bits)."""
    limit = weight_limit(bits)
    column = scale.reshape((-1,) + (1,) * (weight.ndim - 1))
    return np.clip(np.rint(np.asarray(weight, dtype=np.float32) / column), -limit, limit).astype(np.int8)


def quantize_bias(bias: Array, input_scale: Array, weight_scale: Array) -> Array:
    """Round a bias float32 (O,) to int32 codes of scale input_scale x weight_scale (O,), saturating."""
    codes = np.rint(bias.astype(np.float64) / bias_scale(input_scale, weight_scale).astype(np.float64))
    # The rest of the int32 range stays free for the sum of products, so that the accumulator cannot overflow.
    return np.clip(codes, -_BIAS_LIMIT, _BIAS_LIMIT).astype(np.int32)


def bias_scale(input_scale: Array, weight_scale: Array) -> Array:
    """Give the scale of the accumulator: float32 (O,) = input scale () x weight scale (O,), multiplied in float32."""
    return (np.float32(input_scale) * weight_scale.astype(np.float32)).astype(np.float32)


def quantize(values: Array, params: QuantParams) -> Array:
    """Round real activations to int8 codes (half to even, as onnxruntime and XNNPACK do), saturating."""
    scaled = np.rint(np.asarray(values, dtype=np.float32) / params.scale) + params.zero_point
    result: Array = np.clip(scaled, ACT_MIN, ACT_MAX).astype(np.int8)
    return result


def dequantize(codes: Array, params: QuantParams) -> Array:
    """Turn codes into float32: scale * (code - zero_point), along `params.axis` where the scale has several values."""
    scale, zero_point = params.scale, params.zero_point
    if params.axis is not None:
        shape = [1] * codes.ndim
        shape[params.axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    return ((codes.astype(np.int32) - zero_point).astype(np.float32) * scale).astype(np.float32)


UNIT = QuantParams(bits=8, scale=np.array(1 / 256), zero_point=np.array(ACT_MIN))
"""Steps of 1/256 from 0: what TFLite demands of an int8 softmax and sigmoid."""


SHARES = QuantParams(bits=8, scale=np.array(1 / 255), zero_point=np.array(ACT_MIN))
"""Steps of 1/255 from 0 to 1, both exact."""


def table(function: Callable[[Array], Array], source: QuantParams, target: QuantParams) -> Array:
    """Work out what a function of one number makes of every code: int8 (256,), entry i for code i - 128.

    Exact but for one rounding, half to even, on float64; saturating.

    Args:
        function: on float64 arrays, element by element.
        source: of the codes that are read; one scale.
        target: of those that are written; one scale.
    """
    codes = np.arange(ACT_MIN, ACT_MAX + 1)
    real = function((codes - int(source.zero_point)) * float(source.scale))
    found: Array = np.clip(np.rint(real / float(target.scale)) + int(target.zero_point), ACT_MIN, ACT_MAX)
    return found.astype(np.int8)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Multiplier:
    """A positive real factor as integers: value = mantissa / 2^shift.

    Attributes:
        mantissa: int64 array, below 2^31.
        shift: int64 array of the same shape, 1 to 62.
    """

    mantissa: Array
    shift: Array


def multiplier(real: Array) -> Multiplier:
    """Write positive factors as 31-bit mantissa and shift.

    Raises:
        GraphError: a factor is not positive and finite, or is 2^30 or more.
    """
    real = np.asarray(real, dtype=np.float64)
    if not (np.isfinite(real).all() and (real > 0).all()):
        raise GraphError("rescaling factor: expected positive finite numbers; a scale in the graph is broken")
    fraction, exponent = np.frexp(real)
    mantissa = np.rint(fraction * (1 << _MULTIPLIER_BITS)).astype(np.int64)
    shift = _MULTIPLIER_BITS - exponent.astype(np.int64)
    overflow = mantissa == 1 << _MULTIPLIER_BITS
    mantissa, shift = np.where(overflow, mantissa >> 1, mantissa), np.where(overflow, shift - 1, shift)
    # Factors too small to matter: give up mantissa bits rather than shift past the width of the product.
    excess = np.clip(shift - 62, 0, 62)
    mantissa, shift = mantissa >> excess, shift - excess
    if (shift < 1).any():
        raise GraphError(f"rescaling factor {real.max()}: expected below 2^30; a scale in the graph is broken")
    return Multiplier(mantissa=mantissa, shift=shift)


def rescale(accumulator: Array, factor: Multiplier) -> Array:
    """Multiply and round: (accumulator * mantissa + 2^(shift-1)) >> shift, i.e. round half up. int64 in and out.

    The product of a 32-bit accumulator and a 31-bit mantissa fits 63 bits: one 32x32->64 multiply on a small core.
    """
    result: Array = (accumulator * factor.mantissa + (np.int64(1) << (factor.shift - 1))) >> factor.shift
    return result


def requantize(
    accumulator: Array, factor: Multiplier, zero_point: int, *, low: int = ACT_MIN, high: int = ACT_MAX
) -> Array:
    """Rescale an int64 accumulator, add the zero point and clamp to [low, high]: int8 codes."""
    result: Array = np.clip(rescale(accumulator, factor) + zero_point, low, high).astype(np.int8)
    return result


def multiply(a: Array, b: Array, quants: tuple[QuantParams, QuantParams], target: QuantParams) -> Array:
    """Multiply codes of activations and rescale to those of `target`: int8, not clamped any further."""
    x, y = (codes.astype(np.int64) - int(q.zero_point) for codes, q in zip((a, b), quants, strict=True))
    factor = multiplier(np.array(float(quants[0].scale) * float(quants[1].scale) / float(target.scale)))
    return requantize(x * y, factor, int(target.zero_point))


def add_multipliers(scale_a: float, scale_b: float, scale_out: float) -> tuple[int, int, int]:
    """Give (m_a, m_b, shift) with scale_a/scale_out ~ m_a / 2^shift and likewise for b: one shift for both summands.

    The larger mantissa has at most 22 bits, so that the sum of two products of 9-bit codes fits 32 bits.
    """
    largest = max(scale_a, scale_b) / scale_out
    _, exponent = np.frexp(largest)
    shift = int(min(22 - int(exponent), 30))
    if shift < 1:
        raise GraphError(f"add: input scale is {largest:.3g} times the output scale; a scale in the graph is broken")
    return (
        int(np.rint(scale_a / scale_out * 2.0**shift)),
        int(np.rint(scale_b / scale_out * 2.0**shift)),
        shift,
    )
