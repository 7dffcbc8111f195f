"""Rivals of relevance against their textbook definitions, in plain numpy or plain autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgecomp.errors import DataError
from edgecomp.graph import Array, Graph, Op
from edgecomp.pytorch.network import Network, compute
from edgecomp.pytorch.scores import Score, score_by
from tests.graphs import GRAPHS, images

N = 20


def labelled(graph: Graph, n: int = N) -> list[tuple[Array, Array]]:
    classes = int(np.prod(graph.tensors[graph.outputs[0]].shape))
    x, labels = images(graph, n, seed=5), np.arange(n) % classes
    return [(x[:12], labels[:12]), (x[12:], labels[12:])]


def run_with_layers(graph: Graph, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Run in float64, keeping each layer's output to differentiate by."""
    network = Network(graph, dtype=torch.float64)
    values = {**network.weights(), graph.inputs[0]: x}
    kept = {}
    for node in graph.nodes:
        if node.op is Op.SOFTMAX:
            break
        out = compute(node, [values[name] for name in node.inputs])
        values[node.outputs[0]] = out.requires_grad_() if not kept else out
        kept[node.name] = values[node.outputs[0]]
    last = next(reversed(kept.values()))
    return last.flatten(1), {node.name: kept[node.name] for node in graph.layers()}


@pytest.mark.parametrize("name", ["residual", "branches", "gated"])
def test_taylor_is_the_gradient_of_the_loss(name: str) -> None:
    graph = GRAPHS[name]()
    found = score_by(Score.TAYLOR, graph, labelled(graph))
    x = torch.from_numpy(np.concatenate([x for x, _ in labelled(graph)])).double().requires_grad_()
    labels = torch.from_numpy(np.concatenate([y for _, y in labelled(graph)]))
    logits, outputs = run_with_layers(graph, x)
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), list(outputs.values()))
    for (layer, z), slope in zip(outputs.items(), gradients, strict=True):
        share = z * slope
        share = share.flatten(2).sum(2) if share.ndim > 2 else share
        squares = slope.square().flatten(2).mean(2) if slope.ndim > 2 else slope.square()
        got = found.layers[layer]
        scale = float(share.abs().mean().detach())
        np.testing.assert_allclose(got.channel_abs, share.abs().mean(0).detach(), rtol=2e-2, atol=1e-3 * scale)
        np.testing.assert_allclose(got.output_cost, squares.mean(0), rtol=2e-2, atol=1e-3 * float(squares.mean()))


def test_hessian_is_the_gauss_newton_diagonal() -> None:
    """For one image, seen many times: sum_k p_k (d log p_k / dz)^2."""
    graph = GRAPHS["plain"]()
    x = images(graph, 1, seed=5)
    batch = (np.repeat(x, 3000, axis=0), np.zeros(3000, dtype=np.int64))
    found = score_by(Score.HESSIAN, graph, [batch])
    logits, outputs = run_with_layers(graph, torch.from_numpy(x).double().requires_grad_())
    chances = logits.softmax(1).detach()[0]
    wanted = {layer: torch.zeros(z.shape[1], dtype=torch.float64) for layer, z in outputs.items()}
    for k, chance in enumerate(chances):
        gradients = torch.autograd.grad(logits.log_softmax(1)[0, k], list(outputs.values()), retain_graph=True)
        for layer, slope in zip(outputs, gradients, strict=True):
            square = slope.square()[0]
            wanted[layer] += chance * (square.flatten(1).mean(1) if square.ndim > 1 else square)
    for layer, cost in wanted.items():
        assert found.layers[layer].output_cost.sum() == pytest.approx(float(cost.sum()), rel=0.15)
    again = score_by(Score.HESSIAN, graph, [batch])
    assert all(np.array_equal(again.layers[n].output_cost, found.layers[n].output_cost) for n in wanted)


def test_wanda_and_magnitude_by_hand() -> None:
    graph = GRAPHS["separable"]()
    x = np.concatenate([x for x, _ in labelled(graph)])
    values = Network(graph).run(torch.from_numpy(x))
    wanda, magnitude = (score_by(kind, graph, labelled(graph)) for kind in (Score.WANDA, Score.MAGNITUDE))
    for node in graph.layers():
        weight = np.asarray(graph.weight(node).data)
        a = values[node.inputs[0]].numpy()
        groups = int(node.attrs.get("groups", 1))  # type: ignore[arg-type]
        per_out, per_in = len(weight) // groups, weight.shape[1]
        for o in (0, len(weight) // 2, len(weight) - 1):
            for i in (0, per_in - 1):
                channel = a[:, o // per_out * per_in + i]
                wanted = np.abs(weight[o, i]) * np.sqrt((channel.astype(np.float64) ** 2).mean())
                np.testing.assert_allclose(wanda.layers[node.name].weight_abs[o, i], wanted, rtol=1e-4)
        np.testing.assert_allclose(
            magnitude.layers[node.name].channel_abs, np.abs(weight).reshape(len(weight), -1).sum(1), rtol=1e-5
        )
        assert set(wanda.layers[node.name].output_cost) == {1.0}
        energy = float((a.astype(np.float64) ** 2).mean())
        np.testing.assert_allclose(magnitude.layers[node.name].output_cost, 1 / energy, rtol=1e-4)


@pytest.mark.parametrize("name", ["plain", "residual", "gated"])
def test_deeplift_sums_to_the_difference(name: str) -> None:
    """What all channels of a layer on the only path contribute is the output's difference from the reference's."""
    graph = GRAPHS[name]()
    x = np.concatenate([x for x, _ in labelled(graph)])
    labels = np.concatenate([y for _, y in labelled(graph)])
    found = score_by(Score.DEEPLIFT, graph, labelled(graph))
    logits, _ = run_with_layers(graph, torch.from_numpy(x).double())
    zero, _ = run_with_layers(graph, torch.zeros(1, *x.shape[1:], dtype=torch.float64))
    wanted = float((logits - zero).detach()[np.arange(N), labels].mean())
    first, last = graph.layers()[0].name, graph.layers()[-1].name
    # Max-pooling hands everything to the winner, which may be another in the reference: only behind it is it exact.
    pooled = any(node.op is Op.MAX_POOL for node in graph.nodes)
    for layer in (last,) if pooled else (first, last):
        assert found.layers[layer].channel.sum() == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_random_follows_its_seed() -> None:
    graph = GRAPHS["plain"]()
    a, b, c = (score_by(Score.RANDOM, graph, labelled(graph), seed=seed) for seed in (1, 1, 2))
    name = graph.layers()[0].name
    assert np.array_equal(a.layers[name].output_cost, b.layers[name].output_cost)
    assert not np.array_equal(a.layers[name].output_cost, c.layers[name].output_cost)


@pytest.mark.parametrize("kind", Score)
def test_every_score_fills_every_layer(kind: Score) -> None:
    graph = GRAPHS["separable"]()
    found = score_by(kind, graph, labelled(graph))
    for node in graph.layers():
        layer, shape = found.layers[node.name], graph.weight(node).shape
        assert layer.weight_cost.shape == layer.weight_abs.shape == shape
        assert layer.channel_abs.shape == layer.output_cost.shape == shape[:1]
        assert min(layer.weight_cost.min(), layer.weight_abs.min(), layer.output_cost.min()) >= 0
    with pytest.raises(DataError, match="expected at least one"):
        score_by(kind, graph, [])


def test_the_command_line_knows_every_score() -> None:
    from edgecomp.options import SCORES

    assert tuple(Score) == SCORES
