"""The formulas of quantization against exact fractions and brute force."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp import quantmath
from edgecomp.errors import GraphError
from edgecomp.graph import QuantParams
from edgecomp.quantmath import WEIGHT_BITS

often = settings(derandomize=True, deadline=None, max_examples=200)
bounds = st.floats(-1e6, 1e6, allow_nan=False, width=32)
factors = st.floats(2.0**-40, 2.0**29, allow_nan=False, exclude_min=True)
accumulators = st.one_of(st.integers(-(2**31), 2**31 - 1), st.sampled_from([-(2**31), 2**31 - 1, 0, -1, 1]))


def exact(value: float) -> Fraction:
    return Fraction(float(value))


# ---- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (0, 255, 1, -128),
        (0, 6, 6 / 255, -128),
        (-128, 127, 1, 0),
        (-255, 0, 1, 127),
        (-3, -1, 3 / 255, 127),  # widened to hold 0
        (2, 51, 51 / 255, -128),
        (-1, 1.02, 2.02 / 255, -2),  # 126.2 steps below zero
        (0, 1e30, 1e30 / 255, -128),
        (-1e30, 0, 1e30 / 255, 127),
        (0, 0, 1 / 255, -128),  # constant on the calibration data
        (0, 1e-20, 1 / 255, -128),
        (-7, -7, 7 / 255, 127),
    ],
)
def test_activation_params(low: float, high: float, scale: float, zero_point: int) -> None:
    params = quantmath.activation_params(low, high)
    assert params.scale.shape == params.zero_point.shape == ()
    assert float(params.scale) == pytest.approx(scale, rel=1e-6)
    assert int(params.zero_point) == zero_point
    assert (params.bits, params.axis) == (8, None)


@often
@given(bounds, bounds)
def test_range_is_held(a: float, b: float) -> None:
    """0 is a code; what is inside is off by half a step, and the ends, where the zero point was rounded, by one."""
    low, high = min(a, b), max(a, b)
    params = quantmath.activation_params(low, high)
    step = float(params.scale)
    assert step > 0
    assert -128 <= int(params.zero_point) <= 127
    values = np.array([0, low, high, (low + high) / 2], dtype=np.float32)
    back = quantmath.dequantize(quantmath.quantize(values, params), params)
    assert back[0] == 0
    assert np.abs(back.astype(np.float64) - values).max() <= step * (1 + 1e-5)


@pytest.mark.parametrize(
    ("low", "high"), [(np.nan, 1), (0, np.nan), (-np.inf, 0), (0, np.inf), (1, 0), (0, -1e-30)]
)
def test_broken_range(low: float, high: float) -> None:
    with pytest.raises(GraphError, match="expected finite numbers with low <= high"):
        quantmath.activation_params(low, high)


def test_quantize_rounds_half_to_even_and_saturates() -> None:
    params = QuantParams(bits=8, scale=np.array(0.5), zero_point=np.array(3))
    values = np.array([-0.75, -0.25, 0, 0.25, 0.75, 1.25, 1e9, -1e9], dtype=np.float32)
    codes = quantmath.quantize(values, params)
    assert codes.dtype == np.int8
    assert codes.tolist() == [1, 3, 3, 3, 5, 5, 127, -128]
    back = quantmath.dequantize(codes, params)
    assert back.dtype == np.float32
    assert back.tolist() == [-1, 0, 0, 0, 1, 1, 62, -65.5]


def test_dequantize_along_an_axis() -> None:
    params = QuantParams(bits=4, scale=np.array([1, 0.25]), zero_point=np.array([0, 0]), axis=0)
    codes = np.array([[1, -2, 3], [4, 5, -6]], dtype=np.int8)
    assert quantmath.dequantize(codes, params).tolist() == [[1, -2, 3], [1, 1.25, -1.5]]


# ---- weights ---------------------------------------------------------------------------------------------------------


def rounding_error(weight: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """Squared error of each row (O,), in float64."""
    limit = 2 ** (bits - 1) - 1
    column = scale.astype(np.float64)[:, None]
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    error: np.ndarray = ((np.clip(np.rint(rows / column), -limit, limit) * column - rows) ** 2).sum(axis=1)
    return error


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("draw", ["standard_normal", "laplace", "uniform"])
def test_weight_scale_against_brute_force(draw: str, bits: int) -> None:
    rng = np.random.default_rng(bits)
    weight = (getattr(rng, draw)(size=(20, 32, 3, 3)) - 0.5 * (draw == "uniform")).astype(np.float32)
    peak = np.abs(weight).reshape(20, -1).max(axis=1)
    limit = 2 ** (bits - 1) - 1
    scale = quantmath.choose_weight_scale(weight, bits)
    error = rounding_error(weight, scale, bits)
    grid = [rounding_error(weight, peak * share / limit, bits) for share in np.linspace(0.1, 1.05, 150)]
    assert (error <= rounding_error(weight, (peak / limit).astype(np.float32), bits) * (1 + 1e-5)).all()
    assert error.sum() <= 1.05 * np.min(grid, axis=0).sum()


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_weight_codes(bits: int) -> None:
    limit = 2 ** (bits - 1) - 1
    assert quantmath.weight_limit(bits) == limit
    weight = np.random.default_rng(0).standard_normal((5, 4, 3, 3)).astype(np.float32)
    scale = quantmath.choose_weight_scale(weight, bits)
    codes = quantmath.quantize_weight(weight, scale, bits)
    assert (scale.dtype, scale.shape) == (np.float32, (5,))
    assert (codes.dtype, codes.shape) == (np.int8, weight.shape)
    assert np.abs(codes).max() <= limit
    for index in np.ndindex(weight.shape):
        near = np.clip(np.rint(weight[index] / scale[index[0]]), -limit, limit)
        assert codes[index] == near


def test_weight_scale_is_independent_of_the_other_channels() -> None:
    """Rows are worked through in blocks; a row's scale must not depend on where it stands."""
    weight = np.random.default_rng(1).standard_normal((150, 1000)).astype(np.float32)
    whole = quantmath.choose_weight_scale(weight, 3)
    for row in (0, 64, 65, 66, 149):
        assert quantmath.choose_weight_scale(weight[row : row + 1], 3) == whole[row]


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_channels_of_almost_nothing(bits: int) -> None:
    """Channels of zeros take the largest scale of the others; subnormal weights become zeros, without a warning."""
    weight = np.array([[0, 0], [1, -2], [1e-45, 1e-45], [-1e-40, 0], [0.5, 0.25]], dtype=np.float32)
    scale = quantmath.choose_weight_scale(weight, bits)
    codes = quantmath.quantize_weight(weight, scale, bits)
    assert scale[0] == scale.max() == scale[1]
    assert np.isfinite(scale).all()
    # Times the smallest input scale there is, still a normal number.
    smallest_input = quantmath.activation_params(0, 0).scale
    assert (quantmath.bias_scale(smallest_input, scale) >= np.finfo(np.float32).tiny).all()
    assert not codes[[0, 2, 3]].any()
    assert quantmath.choose_weight_scale(np.zeros((2, 3), dtype=np.float32), bits).tolist() == [1, 1]


# ---- biases ----------------------------------------------------------------------------------------------------------


def test_bias() -> None:
    input_scale, weight_scale = np.float32(0.5), np.array([0.25, 2, 1e-20, 1e-20], dtype=np.float32)
    assert quantmath.bias_scale(input_scale, weight_scale).tolist() == [0.125, 1, *[np.float32(0.5e-20)] * 2]
    codes = quantmath.quantize_bias(np.array([1, -2.5, 3, -3], dtype=np.float32), input_scale, weight_scale)
    assert codes.dtype == np.int32
    assert codes.tolist() == [8, -2, 2**26, -(2**26)]


def test_widened_scale_holds_the_bias() -> None:
    """A channel whose weights have all but died keeps its bias; the others keep their scale to the bit."""
    bias = np.array([0.3, -0.3, 0, 0.3], dtype=np.float32)
    weight_scale = np.array([0.01, 1e-13, 1e-13, 1e-25], dtype=np.float32)
    widened = quantmath.widen_for_bias(weight_scale, bias, np.float32(0.02))
    assert widened[[0, 2]].tolist() == weight_scale[[0, 2]].tolist()
    codes = quantmath.quantize_bias(bias, np.float32(0.02), widened)
    back = codes * quantmath.bias_scale(np.float32(0.02), widened).astype(np.float64)
    assert np.abs(back - bias).max() <= 0.02 * 0.01 / 2
    assert back[1] == pytest.approx(-0.3, rel=1e-6)
    assert back[3] == pytest.approx(0.3, rel=1e-6)


# ---- rescaling -------------------------------------------------------------------------------------------------------


@often
@given(factors)
def test_multiplier(real: float) -> None:
    factor = quantmath.multiplier(np.array(real))
    mantissa, shift = int(factor.mantissa), int(factor.shift)
    assert 0 < mantissa < 2**31
    assert 1 <= shift <= 62
    # 31 bits of mantissa; a factor below 2^-31 has fewer, and an absolute error instead.
    assert abs(Fraction(mantissa, 2**shift) - exact(real)) <= max(exact(real) / 2**31, Fraction(1, 2**62))


@often
@given(factors, accumulators, st.integers(-128, 127))
def test_requantize_against_fractions(real: float, accumulator: int, zero_point: int) -> None:
    factor = quantmath.multiplier(np.array(real))
    product = accumulator * Fraction(int(factor.mantissa), 2 ** int(factor.shift))
    rounded = (product + Fraction(1, 2)).__floor__()  # half up
    total = np.array(accumulator, dtype=np.int64)
    assert int(quantmath.rescale(total, factor)) == rounded
    got = quantmath.requantize(total, factor, zero_point)
    assert got.dtype == np.int8
    assert int(got) == min(max(rounded + zero_point, -128), 127)
    assert int(quantmath.requantize(total, factor, zero_point, low=-5, high=9)) == min(max(rounded + zero_point, -5), 9)
    # Against the real factor: the right neighbour, unless the product is within rounding of a tie or beyond a byte.
    true = accumulator * exact(real)
    if abs(true) < 2**10 and abs(true - true.__floor__() - Fraction(1, 2)) > Fraction(1, 2**20):
        assert rounded == (true + Fraction(1, 2)).__floor__()


@pytest.mark.parametrize(
    ("accumulator", "want"), [(-5, -1), (-6, -1), (-2, 0), (2, 1), (3, 1), (-1, 0), (6, 2), (-10, -2), (10, 3)]
)
def test_ties_go_up(accumulator: int, want: int) -> None:
    assert int(quantmath.rescale(np.array(accumulator), quantmath.multiplier(np.array(0.25)))) == want


def test_factors_by_channel() -> None:
    factor = quantmath.multiplier(np.array([0.5, 0.25, 2]))
    totals = np.array([[8, 8, 8], [-6, -6, -6]])
    assert quantmath.rescale(totals, factor).tolist() == [[4, 2, 16], [-3, -1, -12]]


@pytest.mark.parametrize("real", [0, -1, np.nan, np.inf, 2.0**30, np.nextafter(2.0**30, 0), 1e300])
def test_broken_factor(real: float) -> None:
    with pytest.raises(GraphError, match="rescaling factor"):
        quantmath.multiplier(np.array([0.5, real]))


def test_smallest_factors_vanish() -> None:
    factor = quantmath.multiplier(np.array([1e-30, 1e-300, 5e-324]))
    assert quantmath.rescale(np.full(3, 2**31 - 1), factor).tolist() == [0, 0, 0]


@often
@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.floats(1e-6, 1e3))
def test_add_multipliers(scale_a: float, scale_b: float, scale_out: float) -> None:
    larger = max(scale_a, scale_b) / scale_out
    if larger >= 2**20:
        return
    m_a, m_b, shift = quantmath.add_multipliers(scale_a, scale_b, scale_out)
    assert 1 <= shift <= 30
    for mantissa, scale in ((m_a, scale_a), (m_b, scale_b)):
        true = exact(scale) / exact(scale_out)
        assert abs(Fraction(mantissa, 2**shift) - true) <= Fraction(1, 2 ** (shift + 1)) + true / 2**50
        assert 0 <= mantissa <= 2**22
    # 22 bits of the larger one, or an error that 255 codes cannot make visible.
    assert max(m_a, m_b) >= 2**21 or shift == 30
    assert 2 * 255 * max(m_a, m_b) < 2**31


def test_add_of_too_large_a_scale() -> None:
    with pytest.raises(GraphError, match=r"add: input scale is 4\.19e\+06 times the output scale"):
        quantmath.add_multipliers(2.0**22, 1, 1)
