"""Relevance against three oracles that share no code with it: zennit, dense matrices in numpy, and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from edgecomp import reference
from edgecomp.errors import DataError, EdgecompError, UnsupportedOp, UsageError
from edgecomp.graph import Array, Graph, Op
from edgecomp.ops import OPS
from edgecomp.plan import LayerRelevance
from edgecomp.pytorch import sums as sums_module
from edgecomp.pytorch.network import Network
from edgecomp.pytorch.propagate import explain
from edgecomp.pytorch.relevance import conservation, score
from edgecomp.pytorch.rules import Composite
from edgecomp.pytorch.torchvision_ops import define_missing_operators
from tests.graphs import GRAPHS, Build, images

FIELDS = ("weight", "weight_abs", "weight_cost", "channel", "channel_abs", "output_cost")


def labels_for(n: int, classes: int = 10) -> Array:
    return np.random.default_rng(2).integers(0, classes, n)


def assert_close(found: LayerRelevance, expected: dict[str, Array], tolerance: float, where: str) -> None:
    """Compare to `tolerance` of the largest value, in each field."""
    for field in FIELDS:
        value, wanted = getattr(found, field), expected[field]
        assert value.shape == wanted.shape
        assert np.abs(wanted).max() > 0
        np.testing.assert_allclose(
            value, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max(), err_msg=f"{where} {field}"
        )


# ---- zennit ----------------------------------------------------------------------------------------------------------


def sequential() -> tuple[Graph, nn.Sequential]:
    """One network twice: as a graph, and as torch modules with the same weights and the nodes' names."""
    b = Build(11, (3, 12, 12))
    x = b.clip("relu1", b.conv("conv1", "input", 6, (3, 3), stride=(1, 2)))
    x = b.conv("conv2", b.max_pool("pool1", x), 8, (3, 3), groups=2, dilation=(2, 1), pads=(2, 1, 2, 1))
    x = b.clip("relu2", x)
    x = b.node(Op.FLATTEN, "flatten", (b.avg_pool("pool2", x, (3, 2), stride=(1, 1)),), {})
    graph = b.graph(b.linear("fc2", b.clip("relu3", b.linear("fc1", x, 16)), 5))
    module = nn.Sequential()
    parts = {
        "conv1": nn.Conv2d(3, 6, 3, stride=(1, 2), padding=1),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(6, 8, 3, groups=2, dilation=(2, 1), padding=(2, 1)),
        "relu2": nn.ReLU(),
        "pool2": nn.AvgPool2d((3, 2), stride=1),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(graph.tensors["flatten"].shape[1], 16),
        "relu3": nn.ReLU(),
        "fc2": nn.Linear(16, 5),
    }
    for name, part in parts.items():
        module.add_module(name, part)
    module.double()
    module.load_state_dict(
        {name: torch.tensor(t.data, dtype=torch.float64) for name, t in graph.tensors.items() if t.data is not None}
    )
    return graph, module


@pytest.mark.parametrize("epsilon", [1e-6, 0.1])
def test_relevance_of_every_activation_is_zennits(epsilon: float) -> None:
    define_missing_operators()
    from zennit.attribution import Gradient
    from zennit.composites import LayerMapComposite
    from zennit.rules import Epsilon, Norm, Pass
    from zennit.types import Activation, AvgPool, Convolution, Linear

    graph, module = sequential()
    x, labels = images(graph, 6).astype(np.float64), labels_for(6, 5)
    rules = [
        (Activation, Pass()),
        (AvgPool, Norm(stabilizer=epsilon)),
        (Convolution, Epsilon(epsilon=epsilon)),
        (Linear, Epsilon(epsilon=epsilon)),
    ]
    expected: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            output.register_hook(lambda gradient: expected.__setitem__(name, gradient))

        return hook

    one_hot = torch.eye(5, dtype=torch.float64)[torch.from_numpy(labels)]
    with Gradient(model=module, composite=LayerMapComposite(layer_map=rules)) as attributor:
        for name, part in module.named_children():
            part.register_forward_hook(keep(name))
        _, expected["input"] = attributor(torch.from_numpy(x), lambda logits: logits.detach() * one_hot)
    found: dict[str, torch.Tensor] = {}
    for step in explain(Network(graph, dtype=torch.float64), x, labels, composite=Composite(epsilon=epsilon)):
        found[step.node.outputs[0]] = step.r_out
        if step.node.inputs[0] == "input":
            (found["input"],) = step.r_in
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-9 * scale, err_msg=name)


# ---- dense matrices --------------------------------------------------------------------------------------------------


def stabilised(z: Array, epsilon: float) -> Array:
    return z + epsilon * np.where(z >= 0, 1, -1)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_means_over_samples_are_those_of_the_matrix_form(groups: int) -> None:
    epsilon = 0.02
    b = Build(12, (4, 5, 4))
    x = b.conv("conv", "input", 8, (3, 2), stride=(2, 1), pads=(1, 0, 2, 1), dilation=(1, 2), groups=groups)
    graph = b.graph(b.linear("fc", b.node(Op.FLATTEN, "flatten", (x,), {}), 3))
    x, labels = images(graph, 5), labels_for(5, 3)
    tensors = {name: np.asarray(t.data, dtype=np.float64) for name, t in graph.tensors.items() if t.data is not None}
    kernel, attrs = tensors["conv.weight"], graph.nodes[0].attrs
    n_in, shape = x[0].size, graph.tensors["conv"].shape[1:]

    def matrix(weight: Array) -> Array:
        """The convolution as a dense matrix (outputs, inputs): what it does to each unit vector."""
        units = np.eye(n_in).reshape(n_in, *x.shape[1:])
        return OPS[Op.CONV2D].compute([units, weight], attrs).reshape(n_in, -1).T

    m, bias = matrix(kernel), np.repeat(tensors["conv.bias"], shape[1] * shape[2])
    of_one_weight = [matrix(unit.reshape(kernel.shape)) for unit in np.eye(kernel.size)]
    c: dict[str, list[Array]] = {"conv": [], "fc": []}
    r: dict[str, list[Array]] = {"conv": [], "fc": []}
    s: dict[str, list[Array]] = {"conv": [], "fc": []}
    for image, label in zip(x.astype(np.float64), labels, strict=True):
        a0 = image.ravel()
        a1 = m @ a0 + bias
        logits = tensors["fc.weight"] @ a1 + tensors["fc.bias"]
        r2 = logits * np.eye(3)[label]
        s2 = r2 / stabilised(logits, epsilon)
        r1 = a1 * (tensors["fc.weight"].T @ s2)
        s1 = r1 / stabilised(a1, epsilon)
        r["fc"].append(r2)
        c["fc"].append(np.outer(s2, a1))
        s["fc"].append(s2**2)
        s["conv"].append((s1**2).reshape(len(kernel), -1).mean(axis=1))
        r["conv"].append(r1.reshape(shape).sum(axis=(1, 2)))
        c["conv"].append(np.array([s1 @ part @ a0 for part in of_one_weight]).reshape(kernel.shape))
    batches = [(x[:2], labels[:2]), (x[2:], labels[2:])]
    found = score(graph, batches, composite=Composite(epsilon=epsilon), dtype=torch.float64)
    assert (found.rule, found.n_samples) == ("epsilon 0.02", 5)
    for name in ("conv", "fc"):
        weight = tensors[f"{name}.weight"]
        expected = {
            "weight": np.mean([weight * part for part in c[name]], axis=0),
            "weight_abs": np.mean([np.abs(weight * part) for part in c[name]], axis=0),
            "weight_cost": np.mean([part**2 for part in c[name]], axis=0),
            "channel": np.mean(r[name], axis=0),
            "channel_abs": np.mean(np.abs(r[name]), axis=0),
            "output_cost": np.mean(s[name], axis=0),
        }
        assert_close(found.layers[name], expected, 1e-6, name)


# ---- gradients -------------------------------------------------------------------------------------------------------


def conv_head() -> Graph:
    """A classifier without a linear layer: 1x1 convolution, mean, softmax, and only then flatten."""
    b = Build(13, (2, 6, 6))
    x = b.clip("relu", b.conv("conv", "input", 6))
    x = b.node(Op.GLOBAL_AVG_POOL, "mean", (b.conv("head", x, 10, (1, 1), pads=(0, 0, 0, 0)),), {})
    x = b.node(Op.SOFTMAX, "softmax", (x,), {"axis": 1})
    return b.graph(b.node(Op.FLATTEN, "flatten", (x,), {}))


def reused() -> Graph:
    """One tensor that feeds both sides of an add and of a concat, and a node that nothing reads."""
    b = Build(14, (2, 6, 6))
    x = b.clip("relu", b.conv("conv", "input", 4))
    x = b.node(Op.ADD, "twice", (x, x), {})
    y = b.avg_pool("pool", x, stride=(1, 1), pads=(0, 0, 1, 1), include_pad=0)
    x = b.node(Op.CONCAT, "cat", (x, y, x), {"axis": 1})
    x = b.node(Op.RESHAPE, "reshape", (x,), {"shape": (1, 12 * 36)})
    x = b.linear("fc", x, 10)
    b.linear("aside", x, 2)
    return b.graph(x)


LOGITS = {
    "plain": (GRAPHS["plain"], "fc2"),
    "residual": (GRAPHS["residual"], "fc"),
    "separable": (GRAPHS["separable"], "fc"),
    "branches": (GRAPHS["branches"], "fc"),
    "shuffled": (GRAPHS["shuffled"], "fc"),
    "conv head": (conv_head, "mean"),
    "reused": (reused, "fc"),
}


@pytest.mark.parametrize("name", LOGITS)
def test_without_epsilon_relevance_is_weight_times_gradient(name: str) -> None:
    make, logits_name = LOGITS[name]
    graph = make()
    # Small images: where ReLU6 saturates, its gradient is 0 and the rule for activations is another.
    x, labels = images(graph, 5) * np.float32(0.3), labels_for(5)
    network = Network(graph, dtype=torch.float64)
    weights = {name: weight.requires_grad_() for name, weight in network.weights().items()}
    layers = {node.name: node for node in graph.layers() if node.name != "aside"}
    gradients: dict[str, list[Array]] = {name: [] for name in layers}
    channels: dict[str, list[Array]] = {name: [] for name in layers}
    output: dict[str, list[Array]] = {name: [] for name in layers}
    for image, label in zip(x, labels, strict=True):
        values = network.run(torch.from_numpy(image[None]).double())
        assert all(float(value.detach().max()) < 6 for value in values.values())
        outputs = [values[node.outputs[0]] for node in layers.values()]
        kernels = [weights[node.inputs[1]] for node in layers.values()]
        taken = torch.autograd.grad(values[logits_name].flatten()[label], [*kernels, *outputs])
        for i, layer in enumerate(layers):
            gradients[layer].append(taken[i].numpy())
            contribution = (taken[len(layers) + i] * outputs[i]).detach()[0]
            channels[layer].append(contribution.reshape(len(contribution), -1).sum(1).numpy())
            output[layer].append((taken[len(layers) + i][0] ** 2).reshape(len(contribution), -1).mean(1).numpy())
    found = score(graph, [(x, labels)], composite=Composite(epsilon=1e-13), dtype=torch.float64)
    assert found.layers.keys() == {node.name for node in graph.layers()}
    for layer, node in layers.items():
        weight = weights[node.inputs[1]].detach().numpy()
        expected = {
            "weight": np.mean([weight * part for part in gradients[layer]], axis=0),
            "weight_abs": np.mean([np.abs(weight * part) for part in gradients[layer]], axis=0),
            "weight_cost": np.mean([part**2 for part in gradients[layer]], axis=0),
            "channel": np.mean(channels[layer], axis=0),
            "channel_abs": np.mean(np.abs(channels[layer]), axis=0),
            "output_cost": np.mean(output[layer], axis=0),
        }
        assert_close(found.layers[layer], expected, 1e-6, layer)
    if "aside" in found.layers:
        assert not found.layers["aside"].weight_abs.any()


# ---- conservation ----------------------------------------------------------------------------------------------------


def test_relevance_is_conserved_but_for_epsilon() -> None:
    graph = GRAPHS["branches"]()
    x, labels = images(graph, 4), labels_for(4)
    kept = conservation(graph, x, labels, composite=Composite(epsilon=1e-12))
    assert kept.keys() == {node.name for node in graph.layers()}
    assert max(kept.values()) < 1e-9
    lost = conservation(graph, x, labels, composite=Composite(epsilon=0.05))
    assert min(lost.values()) > 1e-4


def test_the_logit_is_shared_out_among_pixels_and_biases() -> None:
    graph = GRAPHS["residual"]()
    x, labels = images(graph, 4), labels_for(4)
    logits = reference.run(graph, {"input": x.astype(np.float64)})["fc"]
    total = np.zeros(4)
    for step in explain(Network(graph, dtype=torch.float64), x, labels, composite=Composite(epsilon=1e-13)):
        bias = graph.bias(step.node) if step.node in graph.layers() else None
        if bias is not None:
            per_channel = step.s.reshape(4, bias.shape[0], -1).sum(2).numpy()
            total += (per_channel * bias.data).sum(axis=1)
        if "input" in step.node.inputs:
            total += step.r_in[0].reshape(4, -1).sum(1).numpy()
    np.testing.assert_allclose(total, logits[np.arange(4), labels], rtol=1e-8)


# ---- batches, precision, refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_and_chunks_change_nothing_but_rounding(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = GRAPHS["separable"]()
    x, labels = images(graph, 9), labels_for(9)
    whole = score(graph, [(x, labels)], dtype=dtype)
    monkeypatch.setattr(sums_module, "_PATCH_BYTES", 16 * 8 * 64 * 9 * 2)
    monkeypatch.setattr(sums_module, "_BLOCK_BYTES", 4 * 9 * 8 * 3)
    seen: list[int] = []

    def batches() -> Iterator[tuple[Array, Array]]:
        yield x[:5], labels[:5]
        yield x[5:], labels[5:]

    parts = score(graph, batches, dtype=dtype, progress=seen.append)
    assert seen == [5, 4]
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4
    for name, layer in whole.layers.items():
        assert_close(parts.layers[name], {field: getattr(layer, field) for field in FIELDS}, tolerance, name)


def test_sums_of_wide_layers_stay_narrow_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = GRAPHS["plain"]()
    x, labels = images(graph, 6), labels_for(6)
    expected = score(graph, [(x, labels)])
    monkeypatch.setattr(sums_module, "_WIDE_ELEMENTS", 1)
    found = score(graph, [(x[:3], labels[:3]), (x[3:], labels[3:])])
    for name, layer in expected.layers.items():
        assert_close(found.layers[name], {field: getattr(layer, field) for field in FIELDS}, 1e-5, name)


def test_the_same_twice_is_the_same_to_the_bit() -> None:
    graph = GRAPHS["residual"]()
    x, labels = images(graph, 8), labels_for(8)
    first, second = (score(graph, [(x, labels)]) for _ in range(2))
    for name, layer in first.layers.items():
        for field in FIELDS:
            assert getattr(layer, field).tobytes() == getattr(second.layers[name], field).tobytes()
            dtype = np.float32 if field.startswith("weight") else np.float64
            assert getattr(layer, field).dtype == dtype


def test_float32_is_close_to_float64() -> None:
    graph = GRAPHS["branches"]()
    x, labels = images(graph, 8), labels_for(8)
    single, double = (score(graph, [(x, labels)], dtype=dtype) for dtype in (torch.float32, torch.float64))
    for name, layer in double.layers.items():
        assert_close(single.layers[name], {field: getattr(layer, field) for field in FIELDS}, 1e-3, name)


def test_class_weights_make_weighted_means() -> None:
    graph = GRAPHS["residual"]()
    x, labels = images(graph, 9), np.arange(9) % 5
    weights = np.array([0.5, 0, 3, 1, 1, 0, 0, 0, 0, 0])
    found = score(graph, [(x[:5], labels[:5]), (x[5:], labels[5:])], class_weights=weights, dtype=torch.float64)
    assert found.n_samples == 7
    assert found.rule == "epsilon 1e-06; classes 0*0.5,2*3,3*1,4*1"
    alone = [score(graph, [(x[i : i + 1], labels[i : i + 1])], dtype=torch.float64).layers for i in range(len(labels))]
    for name, layer in found.layers.items():
        expected = {
            field: np.average([getattr(one[name], field) for one in alone], axis=0, weights=weights[labels])
            for field in FIELDS
        }
        assert_close(layer, expected, 1e-6, name)


def test_classes_without_weight_are_as_if_not_there() -> None:
    graph = GRAPHS["plain"]()
    x, labels = images(graph, 8), np.array([1, 2, 1, 5, 5, 2, 2, 1])
    seen: list[int] = []
    chosen = np.isin(np.arange(10), [1, 5])
    found = score(
        graph,
        [(x[i : i + 2], labels[i : i + 2]) for i in (0, 2, 4, 6)] + [(x[1:2], labels[1:2])],
        class_weights=chosen,
        progress=seen.append,
    )
    assert (found.rule, found.n_samples, seen) == ("epsilon 1e-06; classes 1,5", 5, [2, 2, 2, 2, 1])
    expected = score(graph, [(x[chosen[labels]], labels[chosen[labels]])])
    for name, layer in expected.layers.items():
        assert_close(found.layers[name], {field: getattr(layer, field) for field in FIELDS}, 1e-5, name)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(9), r"class weights are float64 \(9,\), expected numbers \(10,\)"),
        (np.array(["1"] * 10), "expected numbers"),
        (np.zeros(10), "none below 0 and one above 0"),
        (np.full(10, -1.0), "none below 0"),
        (np.full(10, np.nan), "must be finite"),
    ],
)
def test_class_weights_that_do_not_fit_are_refused(weights: Array, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        score(GRAPHS["plain"](), [(X, Y)], class_weights=weights)


def test_no_image_of_a_class_with_weight_is_refused() -> None:
    with pytest.raises(DataError, match="no images to explain; expected at least one of a class with weight"):
        score(GRAPHS["plain"](), [(X, Y)], class_weights=np.arange(10) == 3)
    with pytest.raises(DataError, match="label 10 is out of range"):
        score(GRAPHS["plain"](), [(X, Y + 1)], class_weights=np.arange(10) == 3)


X = images(GRAPHS["plain"](), 3)
Y = np.array([0, 9, 4])


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (X, np.array([0, 10, 4]), "label 10 is out of range, the model's are 0 to 9"),
        (X, np.array([0, -1, 4]), "label -1 is out of range"),
        (X, Y[:2], r"labels are int64 \(2,\), expected whole numbers \(3,\)"),
        (X, Y.astype(np.float32), "labels are float32"),
        (X[:, :2], Y, r"the model takes torch.float32 \(N, 3, 8, 8\)"),
        (X * np.float32(np.nan), Y, "output is not finite"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(x: Array, labels: Array, message: str) -> None:
    with pytest.raises(DataError, match=message):
        score(GRAPHS["plain"](), [(x, labels)])


def test_no_images_are_refused() -> None:
    with pytest.raises(DataError, match="no images to explain"):
        score(GRAPHS["plain"](), [])


@pytest.mark.parametrize("epsilon", [0.0, -1e-6, float("nan"), float("inf")])
def test_epsilon_must_be_positive(epsilon: float) -> None:
    with pytest.raises(UsageError, match="epsilon is"):
        score(GRAPHS["plain"](), [(X, Y)], composite=Composite(epsilon=epsilon))


def test_graphs_without_one_row_of_logits_are_refused() -> None:
    b = Build(15, (3, 8, 8))
    x = b.node(Op.SOFTMAX, "attention", (b.conv("conv", "input", 4),), {"axis": 1})
    x = b.linear("fc", b.node(Op.FLATTEN, "flatten", (x,), {}), 10)
    middle = b.graph(x)
    two = Graph(name="two", nodes=middle.nodes, tensors=middle.tensors, inputs=("input",), outputs=("fc", "conv"))
    cases: list[tuple[Graph, type[EdgecompError], str]] = [
        (middle, UnsupportedOp, "attention: softmax in the middle"),
        (two, UsageError, "'two' has 2 outputs"),
    ]
    for graph, error, message in cases:
        with pytest.raises(error, match=message):
            score(graph, [(X, Y)])


def test_relevance_that_is_zero_everywhere_is_refused() -> None:
    """A stabiliser beside which every sum vanishes leaves nothing to rank by."""
    graph = GRAPHS["plain"]()
    x, labels = images(graph, 4), np.zeros(4, dtype=np.int64)
    with pytest.raises(DataError, match="is zero everywhere; choose another --rule"):
        score(graph, [(np.zeros_like(x), labels)], composite=Composite(epsilon=1e39))
