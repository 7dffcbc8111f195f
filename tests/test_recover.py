"""Reconstruction: against optimal brain surgeon written out plainly, and by what it must leave behind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp import quantmath, reference
from edgecomp.compress import compress
from edgecomp.errors import DataError
from edgecomp.graph import Graph, Op
from edgecomp.plan import CompressionPlan
from edgecomp.pytorch import recover
from edgecomp.pytorch.recover import reconstruct
from edgecomp.pytorch.rounding import basis, choose_scale, corrected, moments, round_columns
from edgecomp.quantmath import Grid
from tests.graphs import GRAPHS, images, plan_for


def adjusted(graph: Graph, plan: CompressionPlan, n: int = 96) -> tuple[Graph, CompressionPlan]:
    x = images(graph, n, seed=3)
    found = reconstruct(graph, plan.ranges, grids_of(plan), [x[:40], x[40:]])
    return found, replace(plan, graph_digest=found.digest())


def grids_of(plan: CompressionPlan) -> dict[str, Grid]:
    return {name: Grid(bits=layer.weight_bits) for name, layer in plan.layers.items()}


def plain_brain_surgeon(weight: np.ndarray, h: np.ndarray, scale: np.ndarray, limit: int) -> np.ndarray:
    """Round column by column in falling order of energy, H's inverse updated by elimination each time; float64."""
    d = weight.shape[1]
    order = np.argsort(-np.diag(h), kind="stable")
    inverse = np.linalg.inv(h + 0.01 * np.diag(h).mean() * np.eye(d))
    rows, left = weight.astype(np.float64).copy(), list(order)
    while left:
        q = left.pop(0)
        grid = np.clip(np.rint(rows[:, q] / scale), -limit, limit) * scale
        rows[:, left] -= np.outer((rows[:, q] - grid) / inverse[q, q], inverse[q, left])
        rows[:, q] = grid
        inverse = inverse - np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return rows


@pytest.mark.parametrize(("d", "bits"), [(5, 2), (40, 3), (200, 4), (300, 6)])
def test_rounding_is_optimal_brain_surgeon(d: int, bits: int) -> None:
    rng = np.random.default_rng(d)
    x = rng.standard_normal((4 * d, d)) @ rng.standard_normal((d, d)) / np.sqrt(d)
    h = (x.T @ x).astype(np.float32)
    weight = rng.standard_normal((7, d)).astype(np.float32)
    inputs = basis(torch.from_numpy(h.copy()))
    steps = choose_scale(torch.from_numpy(weight), inputs.energy, bits)
    rounded = round_columns(torch.from_numpy(weight.copy()), inputs, steps, bits)
    scale, found = steps.numpy(), rounded.codes * rounded.scale[:, None]
    wanted = plain_brain_surgeon(weight, h.astype(np.float64), scale, quantmath.weight_limit(bits))
    # A column within rounding of a tie may go the other way, and what follows with it: in at most one row here.
    assert (np.abs(found - wanted).max(axis=1) < 1e-4).sum() >= 6
    nearest = np.clip(np.rint(weight / scale[:, None]), -quantmath.weight_limit(bits), quantmath.weight_limit(bits))
    error = [float(np.square(x @ (w - weight).T).sum()) for w in (found, nearest * scale[:, None])]
    assert error[0] < 0.8 * error[1]
    # What it says of the error is that of the damped H, by the same elimination.
    damped = h + 0.01 * np.diag(h).mean() * np.eye(d)
    off = (found - weight).astype(np.float64)
    np.testing.assert_allclose(rounded.error, np.einsum("oi,ij,oj->o", off, damped, off), rtol=1e-3)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_compress_finds_the_same_codes_again(name: str, bits: int) -> None:
    graph = GRAPHS[name]()
    found, plan = adjusted(graph, plan_for(graph, bits))
    quantized = compress(found, plan)
    for node in quantized.layers():
        weight = quantized.weight(node)
        assert weight.quant is not None
        assert weight.data is not None
        again, wanted = quantmath.dequantize(weight.data, weight.quant), found.tensors[weight.name].data
        assert wanted is not None
        np.testing.assert_allclose(again, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("name", GRAPHS)
def test_outputs_come_nearer_to_the_float_network(name: str) -> None:
    """On images that the reconstruction has not seen."""
    graph = GRAPHS[name]()
    plan = plan_for(graph, 3)
    found, new_plan = adjusted(graph, plan, n=256)
    x = images(graph, 64, seed=9)
    wanted = reference.run(graph, {"input": x})[graph.outputs[0]]

    def error(g: Graph, p: CompressionPlan) -> float:
        quantized = compress(g, p)
        return float(np.square(reference.run(quantized, {"input": x})[quantized.outputs[0]] - wanted).mean())

    assert error(found, new_plan) < 0.75 * error(graph, plan)


def test_the_mean_of_each_channel_is_kept() -> None:
    graph = GRAPHS["plain"]()
    plan = plan_for(graph, 3)
    x = images(graph, 96, seed=3)
    found = reconstruct(graph, plan.ranges, grids_of(plan), [x])
    # Behind its clip; the first layer sees the same input in both, but for its rounding to int8.
    means = [reference.run(g, {"input": x})["relu1"].mean(axis=(0, 2, 3)) for g in (graph, found)]
    untouched = {**graph.tensors, "conv1.weight": found.tensors["conv1.weight"]}
    without = reference.run(replace(graph, tensors=untouched), {"input": x})["relu1"].mean(axis=(0, 2, 3))
    assert np.abs(means[1] - means[0]).max() < 0.2 * np.abs(without - means[0]).max()


@pytest.mark.parametrize("limits", [(0.0, 6.0), (0.0, np.inf), (-np.inf, np.inf)])
def test_the_mean_behind_a_clip_is_kept(limits: tuple[float, float]) -> None:
    """Pre-activations as trained networks have them: most far outside the limits, the error proportional to them."""
    rng = np.random.default_rng(4)
    wanted = rng.normal(rng.uniform(-10, 10, (1, 12, 1, 1)), 15, (40, 12, 6, 6)).astype(np.float32)
    found = (wanted * 0.9 + rng.normal(0.5, 0.5, wanted.shape)).astype(np.float32)
    parts = [[torch.from_numpy(x[:15]), torch.from_numpy(x[15:])] for x in (found, wanted)]
    shift = recover._shift(*parts, limits).numpy()
    assert shift.shape == (12,)
    for c in range(12):
        low, high = -50.0, 50.0  # bisection: the mean behind the clip rises with the shift
        for _ in range(60):
            middle = (low + high) / 2
            above = np.clip(found[:, c] + middle, *limits).mean() > np.clip(wanted[:, c], *limits).mean()
            low, high = (low, middle) if above else (middle, high)
        assert shift[c] == pytest.approx(middle, abs=0.02)


def test_weights_move_to_undo_errors() -> None:
    """Ridge regression in numpy; errors that are a linear function of the inputs vanish as the inputs get many."""
    graph = GRAPHS["plain"]()
    node = next(node for node in graph.layers() if node.op is Op.LINEAR)
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((5, 7)).astype(np.float32)
    x, e = rng.standard_normal((50, 7)).astype(np.float32), rng.standard_normal((50, 5)).astype(np.float32)
    w = torch.from_numpy(weight)
    sums = moments(node, [torch.from_numpy(x)], 0, 1, w, [torch.from_numpy(e)])
    h = x.T.astype(np.float64) @ x
    wanted = weight + e.T @ x @ np.linalg.inv(h + 0.5 * np.diag(h).mean() * np.eye(7))
    np.testing.assert_allclose(corrected(w, sums).numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_wide_layers_stay_as_they_are_and_the_graph_is_not_touched() -> None:
    graph = GRAPHS["residual"]()
    before = graph.digest()
    bits = {node.name: 8 if node.name == "stem" else 4 for node in graph.layers()}
    found, _ = adjusted(graph, plan_for(graph, bits))
    assert graph.digest() == before
    for node in graph.layers():
        same = np.array_equal(graph.weight(node).data, found.weight(node).data)  # type: ignore[arg-type]
        assert same == (node.name == "stem")


def test_the_same_twice() -> None:
    graph = GRAPHS["separable"]()
    plan = plan_for(graph, 3)
    assert adjusted(graph, plan)[0].digest() == adjusted(graph, plan)[0].digest()


def test_channels_that_never_fire_are_harmless() -> None:
    graph = GRAPHS["plain"]()
    plan = plan_for(graph, 3)
    found = reconstruct(graph, plan.ranges, grids_of(plan), [np.zeros((4, 3, 8, 8), dtype=np.float32)])
    for tensor in found.tensors.values():
        assert tensor.data is None or np.isfinite(tensor.data).all()


def test_no_images() -> None:
    graph = GRAPHS["plain"]()
    with pytest.raises(DataError, match="no images"):
        reconstruct(graph, plan_for(graph, 3).ranges, {}, [])


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_weights_on_a_grid_stay_on_it(bits: int, n_rows: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    limit = quantmath.weight_limit(bits)
    codes = rng.integers(-limit, limit + 1, (n_rows, n))
    weight = (codes * rng.uniform(1e-3, 10, (n_rows, 1)).astype(np.float32)).astype(np.float32)
    scale = quantmath.choose_weight_scale(weight, bits)
    again = quantmath.quantize_weight(weight, scale, bits) * scale[:, None]
    np.testing.assert_allclose(again, weight, rtol=1e-5)
