"""Relevance by class and by activation, against single images explained one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgecomp.graph import Array
from edgecomp.plan import LayerRelevance
from edgecomp.pytorch import sums as sums_module
from edgecomp.pytorch.network import Network
from edgecomp.pytorch.propagate import explain
from edgecomp.pytorch.relevance import score
from edgecomp.pytorch.rules import parse_composite
from edgecomp.pytorch.sums import WeightForm
from tests.graphs import GRAPHS, images, multiplied

LABELS = np.array([1, 2, 1, 5, 5, 1, 2])


@pytest.mark.parametrize("name", GRAPHS)
def test_relevance_by_class_is_that_of_its_images_alone(name: str) -> None:
    graph = GRAPHS[name]()
    x = images(graph, len(LABELS))
    batches = [(x[:3], LABELS[:3]), (x[3:], LABELS[3:])]
    found = score(graph, batches, per_class=True, dtype=torch.float64).per_class
    assert found is not None
    assert found.n_samples.tolist() == [0, 3, 2, 0, 0, 2, 0, 0, 0, 0]
    for label in (1, 2, 5):
        alone = score(graph, [(x[label == LABELS], LABELS[label == LABELS])], dtype=torch.float64)
        for layer, expected in alone.layers.items():
            np.testing.assert_allclose(found.channel[layer][label], expected.channel, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(found.channel_abs[layer][label], expected.channel_abs, rtol=1e-9)
    for layer in found.channel:
        assert not found.channel[layer][[0, 3, 4, 6, 7, 8, 9]].any()
        assert found.channel[layer].shape == (10, graph.tensors[f"{layer}.weight"].shape[0])


def test_weights_of_classes_change_nothing_within_a_class() -> None:
    graph = GRAPHS["plain"]()
    x = images(graph, len(LABELS))
    weights = np.array([0, 0.5, 3, 0, 0, 0, 0, 0, 0, 0])
    found = score(graph, [(x, LABELS)], per_class=True, class_weights=weights, dtype=torch.float64).per_class
    free = score(graph, [(x, LABELS)], per_class=True, dtype=torch.float64).per_class
    assert found is not None
    assert free is not None
    assert found.n_samples.tolist() == [0, 3, 2, 0, 0, 0, 0, 0, 0, 0]
    for layer, channel in free.channel.items():
        np.testing.assert_allclose(found.channel[layer][[1, 2]], channel[[1, 2]], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["residual", "branches"])
def test_relevance_of_activations_is_that_of_the_walk(name: str, weighted: bool) -> None:
    graph = GRAPHS[name]()
    x = images(graph, len(LABELS))
    class_weights = np.arange(10) * 1.0 if weighted else None
    found = score(
        graph,
        [(x[:4], LABELS[:4]), (x[4:], LABELS[4:])],
        composite=parse_composite("epsilon-plus"),
        class_weights=class_weights,
        per_activation=True,
        dtype=torch.float64,
    ).activations
    each: dict[str, Array] = {"input": np.zeros(x.shape)}
    network = Network(graph, dtype=torch.float64)
    for step in explain(network, x, LABELS, composite=parse_composite("epsilon-plus")):
        each[step.node.outputs[0]] = step.r_out.numpy()
        for read, r in zip(step.node.inputs, step.r_in, strict=False):
            if read == "input":
                each["input"] = each["input"] + r.numpy()
    assert found.keys() == {name for name, tensor in graph.tensors.items() if tensor.data is None}
    factors = None if class_weights is None else class_weights[LABELS]
    for tensor, activation in found.items():
        assert activation.mean.shape == graph.tensors[tensor].shape[1:]
        wanted = np.average(each[tensor], axis=0, weights=factors)
        np.testing.assert_allclose(activation.mean, wanted, rtol=1e-9, atol=1e-12, err_msg=tensor)
        wanted = np.average(np.abs(each[tensor]), axis=0, weights=factors)
        np.testing.assert_allclose(activation.mean_abs, wanted, rtol=1e-9, atol=1e-12, err_msg=tensor)


def test_nothing_more_than_was_asked_for() -> None:
    graph = GRAPHS["plain"]()
    found = score(graph, [(images(graph, 2), LABELS[:2])])
    assert found.per_class is None
    assert found.activations == {}
    assert found.conservation.keys() == found.layers.keys()


def same(found: LayerRelevance, expected: LayerRelevance, where: str) -> None:
    for field in ("weight", "weight_abs", "weight_cost", "channel", "channel_abs", "output_cost"):
        wanted = getattr(expected, field)
        np.testing.assert_allclose(
            getattr(found, field), wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max(), err_msg=f"{where} {field}"
        )


@pytest.mark.parametrize("block", [1, 200, 1000])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", WeightForm)
def test_blocks_change_nothing(form: WeightForm, weighted: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (GRAPHS["separable"], multiplied, GRAPHS["plain"]):
        graph = make()
        x, labels = images(graph, 7), LABELS % 5
        n_classes = graph.tensors[graph.outputs[0]].shape[1]
        options = {
            "composite": parse_composite("alpha2-beta1"),
            "weight_form": form,
            "class_weights": np.arange(n_classes) + 0.5 if weighted else None,
            "dtype": torch.float64,
        }
        expected = score(graph, [(x, labels)], **options)  # type: ignore[arg-type]
        with monkeypatch.context() as m:
            m.setattr(sums_module, "_BLOCK_BYTES", block)
            m.setattr(sums_module, "_PATCH_BYTES", 5 * block)
            found = score(graph, [(x, labels)], **options)  # type: ignore[arg-type]
        for name, layer in expected.layers.items():
            same(found.layers[name], layer, name)
