"""Activation ranges against brute force: every factor tried on the values themselves, without a histogram."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch

from edgecomp.errors import DataError
from edgecomp.graph import Array, Graph, Op
from edgecomp.plan import ActRange
from edgecomp.pytorch import calibrate as calibrate_module
from edgecomp.pytorch.calibrate import calibrate, choose_range
from edgecomp.pytorch.network import Network
from tests.graphs import GRAPHS, Build, images

SHRINKING = [1 - 0.01 * i for i in range(71)]


def squared_error(values: Array, low: float, high: float) -> float:
    """Mean squared error of the 255-step grid over [low, high] that holds 0, written without quantmath."""
    step = (high - low) / 255
    first = np.rint(low / step)
    return float(((np.clip(np.rint(values / step), first, first + 255) * step - values) ** 2).mean())


def flat(size: int) -> Graph:
    """A graph that only flattens (1, size, 1, 1)."""
    b = Build(0, (size, 1, 1))
    return b.graph(b.node(Op.FLATTEN, "flatten", ("input",), {}))


def range_of(values: Array) -> ActRange:
    return calibrate(flat(values.size), [values.astype(np.float32).reshape(1, -1, 1, 1)])["flatten"]


@pytest.mark.parametrize("name", GRAPHS)
def test_ranges_are_as_good_as_the_best_of_a_brute_search(name: str) -> None:
    graph = GRAPHS[name]()
    x = images(graph, 200)
    found = calibrate(graph, [x])
    values = Network(graph).run(torch.from_numpy(x))
    assert found.keys() == {name for name, tensor in graph.tensors.items() if tensor.data is None}
    shrunk = 0
    for tensor, value in values.items():
        v = value.double().numpy()
        low, high = min(0.0, v.min()), max(0.0, v.max())
        best = min(squared_error(v, low * f, high * f) for f in SHRINKING)
        chosen = found[tensor]
        assert squared_error(v, chosen.low, chosen.high) <= 1.05 * best, tensor
        assert low <= chosen.low <= 0 <= chosen.high <= high
        assert chosen.low == (0 if low == 0 else pytest.approx(low * chosen.high / high))
        shrunk += chosen.high < 0.95 * high
    assert shrunk > 0


def test_a_histogram_is_quantized_bin_by_bin() -> None:
    rng = np.random.default_rng(5)
    counts = np.floor(1000 * np.exp(-np.linspace(0, 12, 300))) + (rng.random(300) < 0.05)
    low, high = -1.5, 4.5
    centres = [low + (k + 0.5) * (high - low) / 300 for k in range(300)]
    errors = [
        sum(n * squared_error(np.array([c]), low * f, high * f) for n, c in zip(counts, centres, strict=True))
        for f in SHRINKING
    ]
    best = SHRINKING[int(np.argmin(errors))]
    assert 0.3 < best < 1
    chosen = choose_range(counts, low, high)
    assert (chosen.low, chosen.high) == pytest.approx((low * best, high * best))


def test_outliers_are_cut_and_even_values_are_not() -> None:
    even = np.linspace(-1, 3, 20_000)
    assert (range_of(even).low, range_of(even).high) == (-1, 3)
    tail = range_of(np.concatenate([np.random.default_rng(6).normal(0, 0.1, 1_000_000), [1.0]]))
    assert 0.35 < tail.high < 0.8
    assert tail.low < -0.1


def test_signs() -> None:
    assert range_of(np.linspace(-2, -1, 5000)).high == 0
    assert range_of(np.linspace(1, 2, 5000)).low == 0
    constant = range_of(np.full(100, 5.0))
    assert constant.low == 0
    assert constant.high == pytest.approx(5, abs=5 / 128)
    assert range_of(np.zeros(100)) == ActRange(low=0.0, high=0.0)


def test_a_bounded_activation_stays_within_its_bound() -> None:
    b = Build(1, (1, 8, 8))
    graph = b.graph(b.clip("dead", b.clip("relu6", "input", 0, 6), -5, 0))
    found = calibrate(graph, [images(graph, 20) * 10])
    assert 5.5 < found["relu6"].high <= 6
    assert found["dead"] == ActRange(low=0.0, high=0.0)


def test_batches_change_nothing() -> None:
    graph = GRAPHS["residual"]()
    x = images(graph, 30)
    # Of two images at least: for one, torch multiplies matrices in another order.
    cuts = [x[:2], x[2:17], x[17:]]
    seen: list[int] = []
    streamed = calibrate(graph, lambda: iter(cuts), progress=seen.append)
    assert seen == [2, 15, 13] * 2
    assert streamed == calibrate(graph, cuts)
    for name, whole in calibrate(graph, [x]).items():
        assert streamed[name].low == pytest.approx(whole.low, rel=0.02)
        assert streamed[name].high == pytest.approx(whole.high, rel=0.02)


def test_many_equal_values_are_counted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2^24 + 1 is not a float32, so a bin that counts in float32 stops there.
    size = (1 << 24) + 100
    values = np.zeros((1, size, 1, 1), dtype=np.float32)
    values[0, :50] = 1
    counted: list[Array] = []

    def keep(counts: Array, low: float, high: float) -> ActRange:
        counted.append(counts)
        return ActRange(low=low, high=high)

    monkeypatch.setattr(calibrate_module, "choose_range", keep)
    calibrate(flat(size), [values])
    assert [(counts[0], counts[-1], counts.sum()) for counts in counted] == [(size - 50, 50, size)] * 2


def once(x: Array) -> Iterable[Array]:
    return iter([x])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (lambda x: [], "no images to calibrate with"),
        (lambda x: [x[:, :2]], r"the model takes torch.float32 \(N, 3, 8, 8\)"),
        (lambda x: [x * np.float32(np.nan)], "activation 'input' is not finite"),
        (lambda x: [x * np.float32(1e38)], "activation 'conv1' is not finite"),
        (once, "batches gave 3 images, then 0"),
    ],
)
def test_what_does_not_fit_is_refused(batches: Callable[[Array], list[Array]], message: str) -> None:
    graph = GRAPHS["plain"]()
    with pytest.raises(DataError, match=message):
        calibrate(graph, batches(images(graph, 3)))
