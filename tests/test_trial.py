"""Trials of grids: what they say of errors and bytes, against the layer really rounded and the file really written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgecomp import quantmath
from edgecomp.compress import on_grids
from edgecomp.graph import Graph, Node, Op, Tensor
from edgecomp.plan import LayerRelevance, Relevance
from edgecomp.planner import LayerChoices
from edgecomp.pytorch.rounding import basis, choose_scale, round_columns
from edgecomp.pytorch.trial import trial_choices, try_grids
from edgecomp.quantmath import Grid
from tests.graphs import GRAPHS, images


def wide(n_out: int = 40, n_in: int = 400, seed: int = 0) -> Graph:
    """One linear layer on a (C, 1, 1) image."""
    rng = np.random.default_rng(seed)
    weight = rng.laplace(size=(n_out, n_in)).astype(np.float32)
    return Graph(
        name="wide",
        nodes=(
            Node(name="flat", op=Op.FLATTEN, inputs=("input",), outputs=("flat",)),
            Node(name="fc", op=Op.LINEAR, inputs=("flat", "fc.weight"), outputs=("fc",)),
        ),
        tensors={
            "input": Tensor(name="input", shape=(1, n_in, 1, 1)),
            "flat": Tensor(name="flat", shape=(1, n_in)),
            "fc.weight": Tensor(name="fc.weight", shape=weight.shape, data=weight),
            "fc": Tensor(name="fc", shape=(1, n_out)),
        },
        inputs=("input",),
        outputs=("fc",),
    )


def relevance_of(graph: Graph, seed: int = 1) -> Relevance:
    rng = np.random.default_rng(seed)
    layers = {}
    for node in graph.layers():
        shape = graph.weight(node).shape
        ones, cost = np.ones(shape, dtype=np.float32), rng.uniform(0.1, 2, shape[0])
        layers[node.name] = LayerRelevance(
            weight=ones, weight_abs=ones, weight_cost=ones, channel=cost, channel_abs=cost, output_cost=cost
        )
    return Relevance(rule="made up", n_samples=1, layers=layers)


def choices_of(graph: Graph, relevance: Relevance, batches: list[np.ndarray], formats: list[str]) -> list[LayerChoices]:
    return trial_choices(graph, try_grids(graph, batches, formats), relevance, formats)


def test_errors_are_those_of_the_outputs() -> None:
    graph = wide()
    relevance = relevance_of(graph)
    mix = np.random.default_rng(2).standard_normal((400, 400)) / 20
    x = (np.random.default_rng(3).standard_normal((6400, 400)) @ mix).astype(np.float32)
    (choices,) = choices_of(graph, relevance, [x.reshape(-1, 400, 1, 1)], ["onnx"])
    coarse = [grid for grid in choices.error if grid.step is not None]
    assert len(coarse) >= 5
    weight = np.asarray(graph.tensors["fc.weight"].data)
    inputs = basis(torch.from_numpy(x.T @ x))
    for grid in choices.error:
        if grid.step is None:
            scale = choose_scale(torch.from_numpy(weight.copy()), inputs.energy, grid.bits)
        else:
            scale = torch.full((40,), grid.step * float(np.sqrt((weight.astype(np.float64) ** 2).mean())))
        rounded = round_columns(torch.from_numpy(weight.copy()), inputs, scale, grid.bits)
        off = x.astype(np.float64) @ (rounded.codes * rounded.scale[:, None] - weight).T
        wanted = float(((off**2).sum(axis=0) * relevance.layers["fc"].output_cost).sum()) / len(x)
        # H is damped by 1 % of its mean; what little that adds weighs most where little else is wrong.
        assert choices.error[grid] == pytest.approx(wanted, rel=0.25)
        if grid.step is not None and grid.step >= 1:
            assert choices.error[grid] == pytest.approx(wanted, rel=0.1)


def test_coarser_grids_take_less_room_and_err_more() -> None:
    (choices,) = choices_of(wide(64, 900), relevance_of(wide(64, 900)), [np.ones((9, 900, 1, 1), "f4")], ["onnx"])
    steps = sorted((grid for grid in choices.error if grid.step is not None), key=lambda grid: grid.step or 0)
    bits = [choices.stored_bits[grid] / choices.n_weights for grid in steps]
    assert bits == sorted(bits, reverse=True)
    assert bits[-1] < 0.6


@pytest.mark.parametrize("name", GRAPHS)
def test_every_layer_has_choices_that_formats_can_store(name: str) -> None:
    graph = GRAPHS[name]()
    x = images(graph, 24, seed=1)
    steps: list[int] = []
    trials = try_grids(graph, [x[:16], x[16:]], ["onnx", "tflite"], progress=steps.append)
    found = trial_choices(graph, trials, relevance_of(graph), ["onnx", "tflite"])
    assert [c.name for c in found] == [node.name for node in graph.layers()]
    assert steps == [c.n_weights for c in found]
    for c in found:
        assert min(c.error.values()) >= 0
        assert all(per_format[1] in (4 * c.n_weights, 8 * c.n_weights) for per_format in c.per_format.values())
    again = choices_of(graph, relevance_of(graph), [x[:16], x[16:]], ["onnx", "tflite"])
    assert [dict(c.error) for c in found] == [dict(c.error) for c in again]


@pytest.mark.parametrize("step", [0.3, 1.0, 2.5])
def test_weights_put_on_a_grid_are_found_there(step: float) -> None:
    graph = wide()
    rounded = on_grids(graph, {"fc": Grid(bits=6, step=step)})
    weight = np.asarray(rounded.tensors["fc.weight"].data)
    codes = quantmath.quantize_weight(weight, quantmath.choose_weight_scale(weight, 6), 6)
    width = step * np.sqrt((np.asarray(graph.tensors["fc.weight"].data, dtype=np.float64) ** 2).mean())
    np.testing.assert_allclose(weight / width, np.rint(weight / width), atol=1e-4)
    np.testing.assert_allclose(codes * quantmath.choose_weight_scale(weight, 6)[:, None], weight, rtol=1e-5)
    assert np.abs(weight - np.asarray(graph.tensors["fc.weight"].data)).max() <= width * 0.5001 or step < 0.5
