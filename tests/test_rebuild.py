"""The trainable form of a compressed network: against the integer reference, and against its formulas in two lines."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp import quantmath, reference
from edgecomp.compress import compress
from edgecomp.graph import Graph
from edgecomp.plan import CompressionPlan, Io
from edgecomp.pytorch.rebuild import Layer, Rebuilt, Room, _borders, entropy_bits
from tests.graphs import GRAPHS, dense, images, multiplied, plain, plan_for, residual

ALL = {**GRAPHS, "multiplied": multiplied, "dense": dense}


def as_if_trained(graph: Graph, plan: CompressionPlan, seed: int = 0) -> Rebuilt:
    """A module whose weights, scales and biases have all moved, as training would move them."""
    module = Rebuilt(graph, plan)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.layers:
            assert isinstance(layer, Layer)
            if not layer.fixed:
                layer.latent.add_(0.4 * torch.randn(layer.latent.shape, generator=generator))
                layer.gain.add_(0.05 * torch.randn(layer.gain.shape, generator=generator))
            if layer.bias is not None:
                layer.bias.add_(0.02 * torch.randn(layer.bias.shape, generator=generator))
    return module


def steps_apart(module: Rebuilt, quantized: Graph, n: int = 16) -> dict[str, int]:
    """The largest distance of every activation from the integer reference, in steps of the last place."""
    x = images(quantized, n, seed=5)
    source = quantized.tensors[quantized.inputs[0]].quant
    assert source is not None
    wanted = reference.run(quantized, {quantized.inputs[0]: quantmath.quantize(x, source)})
    found = {}
    with torch.no_grad():
        for name, value in module.steps(torch.from_numpy(x)):
            params = quantized.tensors[name].quant
            assert params is not None
            codes = np.rint(value.numpy() / float(params.scale)) + int(params.zero_point)
            found[name] = int(np.abs(codes - wanted[name]).max())
    assert found.keys() == wanted.keys()
    return found


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bits", [2, 3, 6, 8])
def test_what_is_exported_is_what_was_trained(name: str, bits: int) -> None:
    graph = ALL[name]()
    module = as_if_trained(graph, plan_for(graph, bits))
    found, plan = module.trained()
    quantized = compress(found, replace(plan, io=Io.INT8))
    for node in quantized.layers():
        weight = quantized.weight(node)
        assert weight.data is not None
        assert weight.quant is not None
        trained = module.layer(node.name).weight().detach().numpy()
        again = quantmath.dequantize(weight.data, weight.quant)
        np.testing.assert_allclose(again, trained, rtol=1e-5, atol=1e-6 * np.abs(trained).max())
    apart = steps_apart(module, quantized)
    assert max(apart.values()) <= 1, apart


@pytest.mark.parametrize("io", Io)
def test_cut_channels_stay_cut(io: Io) -> None:
    graph = residual()
    plan = plan_for(graph, 3, io=io, drop={"block.conv1": (1, 4)})
    module = as_if_trained(graph, plan)
    found, new_plan = module.trained()
    before, after = graph.tensors["block.conv1.weight"].data, found.tensors["block.conv1.weight"].data
    assert before is not None
    assert after is not None
    np.testing.assert_array_equal(after[[1, 4]], before[[1, 4]])
    assert not np.allclose(after[0], before[0])
    assert max(steps_apart(module, compress(found, replace(new_plan, io=Io.INT8))).values()) <= 1
    assert compress(found, new_plan).tensors["block.conv1.weight"].shape[0] == 10


def test_it_starts_where_compress_is() -> None:
    graph = plain()
    plan = plan_for(graph, {"conv1": 8, "conv2": 4, "fc1": 2, "fc2": 3})
    module = Rebuilt(graph, plan)
    quantized = compress(graph, plan)
    for node in quantized.layers():
        np.testing.assert_array_equal(module.layer(node.name).codes().numpy(), quantized.weight(node).data)
    assert module.layer("conv1").fixed
    assert not module.layer("conv1").latent.requires_grad


def test_weights_lean_to_where_they_came_from() -> None:
    graph = plain()
    layer = Rebuilt(graph, plan_for(graph, 4)).layer("fc1")
    weight = graph.tensors["fc1.weight"].data
    assert weight is not None
    exact = weight / layer.scale.numpy()[:, None]
    code = np.clip(np.rint(exact), -7, 7)
    latent = layer.latent.detach().numpy()
    np.testing.assert_allclose(latent, code + np.clip(exact - code, -0.2, 0.2), atol=1e-4)
    assert (np.sign(latent - code) * np.sign(exact - code) >= 0).all()


def test_without_a_price_weights_are_rounded_to_the_nearest_code() -> None:
    layer = Rebuilt(plain(), plan_for(plain(), 4)).layer("fc1")
    values = np.random.default_rng(0).uniform(-9, 9, layer.latent.shape).astype(np.float32)
    with torch.no_grad():
        layer.latent.copy_(torch.from_numpy(values))
    np.testing.assert_array_equal(layer.codes().numpy(), np.clip(np.rint(values), -7, 7))


def test_gradients_pass_rounding() -> None:
    graph = plain()
    layer = Rebuilt(graph, plan_for(graph, 3)).layer("fc2")
    g = torch.randn(layer.latent.shape, generator=torch.Generator().manual_seed(1))
    (layer.weight() * g).sum().backward()  # type: ignore[no-untyped-call]
    assert layer.latent.grad is not None
    assert layer.gain.grad is not None
    torch.testing.assert_close(layer.latent.grad, g * layer.scale[:, None])
    torch.testing.assert_close(layer.gain.grad, (g * layer.codes()).sum(1) * layer.scale)


@given(st.lists(st.integers(0, 500), min_size=1, max_size=20))
def test_entropy(counts: list[int]) -> None:
    n = sum(counts)
    wanted = -sum(c * math.log2(c / n) for c in counts if c)
    assert entropy_bits(np.array(counts, dtype=np.float64)) == pytest.approx(wanted, abs=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([2, 3, 4]), st.floats(0.05, 0.45), st.integers(0, 99))
def test_room_is_held(bits: int, spread: float, seed: int) -> None:
    graph = plain(seed)
    # Mostly zeros, as a coarse grid makes them: there is much to spread.
    module = Rebuilt(graph, plan_for(graph, bits))
    layers = [layer for layer in module.layers if isinstance(layer, Layer)]
    with torch.no_grad():
        for layer in layers:
            layer.latent.mul_(0.5)
    room = Room(module)
    before = sum(entropy_bits(layer.histogram()) for layer in layers)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers:
            layer.latent.add_(spread * torch.randn(layer.latent.shape, generator=generator))
        room.hold()
    assert room.bits == pytest.approx(before)
    assert sum(entropy_bits(layer.histogram()) for layer in layers) <= before * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0, 6), min_size=3, max_size=3),
    st.lists(st.floats(0, 6), min_size=3, max_size=3),
    st.floats(0, 2),
    st.integers(0, 99),
)
def test_borders_give_the_cheapest_code(up: list[float], down: list[float], price: float, seed: int) -> None:
    """Where codes cost more and more towards both ends, no code is better than the one the borders give."""
    lengths = np.concatenate([np.cumsum(sorted(down))[::-1], [0.0], np.cumsum(sorted(up))])
    borders = _borders(np.diff(lengths), price, 3)
    latent = np.random.default_rng(seed).uniform(-4, 4, 200)
    found = np.searchsorted(borders, latent) - 3
    cost = np.square(latent[:, None] - np.arange(-3, 4)) + price * lengths
    np.testing.assert_allclose(cost[np.arange(200), found + 3], cost.min(axis=1), atol=1e-9)
