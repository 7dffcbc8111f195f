"""Relevance through gates and curved functions: zennit, gradients, and formulas of two lines."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecomp.graph import Array, Graph, Op
from edgecomp.planner import irrelevant_channels
from edgecomp.pytorch.capture import capture
from edgecomp.pytorch.network import Network
from edgecomp.pytorch.propagate import Start, Step, explain
from edgecomp.pytorch.relevance import score
from edgecomp.pytorch.rules import Composite, parse_composite
from edgecomp.pytorch.torchvision_ops import define_missing_operators
from tests.graphs import Build, gated, images
from tests.test_ops import CURVES

EPSILON = 1e-6


# ---- zennit ----------------------------------------------------------------------------------------------------------


class Weighed(nn.Module):
    """A signal times a gate that explains nothing: a module of one input, so that zennit can hand relevance through."""

    gate: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate


class Squeezed(nn.Module):
    def __init__(self, channels: int, squeeze: int, inner: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.act, self.fc2 = nn.Conv2d(channels, squeeze, 1), inner, nn.Conv2d(squeeze, channels, 1)
        self.gate, self.weighed = gate, Weighed()

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(self.fc2(self.act(self.fc1(self.pool(x)))))
        if torch.compiler.is_exporting():
            return x * gate
        self.weighed.gate = gate.detach()
        return self.weighed(x)


def squeezing() -> nn.Sequential:
    """The operators of EfficientNet and MobileNetV3 in one row; layers behind hard-swish and silu read both signs."""
    torch.manual_seed(3)
    parts = OrderedDict(
        stem=nn.Conv2d(3, 8, 3, padding=1),
        swish=nn.Hardswish(),
        depthwise=nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=8),
        silu=nn.SiLU(),
        squeezed=Squeezed(16, 4, nn.SiLU(), nn.Sigmoid()),
        project=nn.Conv2d(16, 6, 1, bias=False),
        expand=nn.Conv2d(6, 12, 1),
        relu=nn.ReLU(),
        squeezed2=Squeezed(12, 4, nn.ReLU(), nn.Hardsigmoid()),
        swish2=nn.Hardswish(),
        sigmoid=nn.Sigmoid(),
        flatten=nn.Flatten(),
        fc1=nn.Linear(12 * 16, 12),
        swish3=nn.SiLU(),
        fc2=nn.Linear(12, 5),
    )
    module = nn.Sequential(parts)
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            part.weight.data.mul_(2)
    return module.eval()


def zennit_rule(text: str) -> Any:
    from zennit.rules import AlphaBeta, Epsilon, Gamma, ZPlus

    return {
        "epsilon": Epsilon(epsilon=EPSILON),
        "gamma:0.25": Gamma(gamma=0.25, stabilizer=EPSILON),
        "plus": ZPlus(stabilizer=EPSILON),
        "alpha2-beta1": AlphaBeta(alpha=2, beta=1, stabilizer=EPSILON),
    }[text]


@pytest.mark.parametrize("text", ["epsilon", "gamma:0.25", "plus", "alpha2-beta1"])
def test_relevance_is_zennits(text: str) -> None:
    define_missing_operators()
    from zennit.attribution import Gradient
    from zennit.composites import LayerMapComposite
    from zennit.rules import Pass

    module = squeezing()
    graph = capture(module, (3, 8, 8), name="squeezing")
    assert [n.op for n in graph.nodes].count(Op.MUL) == 2
    module = module.double()
    x, labels = images(graph, 4), np.array([0, 4, 2, 2])
    passing = (nn.Hardswish, nn.SiLU, nn.ReLU, nn.Sigmoid, nn.Hardsigmoid, Weighed)
    rules = [(passing, Pass()), ((nn.Conv2d, nn.Linear), zennit_rule(text))]
    expected: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda part, inputs, output: output.register_hook(lambda r: expected.__setitem__(name, r)) and None

    one_hot = torch.eye(5, dtype=torch.float64)[torch.from_numpy(labels)]
    images_ = torch.from_numpy(x).double()
    with Gradient(model=module, composite=LayerMapComposite(layer_map=rules)) as attributor:
        for name, part in module.named_children():
            part.register_forward_hook(keep(name))
        _, expected["input"] = attributor(images_, lambda logits: logits.detach() * one_hot)
    found: dict[str, Tensor] = {}
    for step in explain(Network(graph, dtype=torch.float64), x, labels, composite=parse_composite(text)):
        assert step.aside == ("fc" in step.node.name.partition(".")[2] or step.node.op is Op.GLOBAL_AVG_POOL
                              or step.node.name.endswith((".act", ".gate"))), step.node.name  # fmt: skip
        name = step.node.name.removesuffix(".mul")
        if name in expected:
            found[name] = step.r_out
        if step.node.inputs[0] == "input":
            found["input"] = step.r_in[0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest = float(value.abs().max())
        assert largest > 0
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-9 * largest, err_msg=name)


# ---- who takes what --------------------------------------------------------------------------------------------------


def steps_of(graph: Graph, x: Array, labels: Array, start: Start = Start.LOGIT, epsilon: float = 1e-12) -> list[Step]:
    network = Network(graph, dtype=torch.float64)
    return list(explain(network, x, labels, composite=Composite(epsilon=epsilon), start=start))


def headed(b: Build, x: str) -> Graph:
    x = b.node(Op.FLATTEN, "flatten", (x,), {}) if len(b.tensors[x].shape) == 4 else x
    return b.graph(b.linear("fc", x, 3))


def products() -> Iterator[tuple[str, Graph, tuple[float, float]]]:
    """Name, a graph with a product "m", and the share of relevance that its factors take."""

    def built(name: str, gates: tuple[Op | None, Op | None], sizes: tuple[int, int], pooled: bool = False) -> Graph:
        b = Build(len(name), (3, 4, 4))
        factors = []
        for i, (op, size) in enumerate(zip(gates, sizes, strict=True)):
            y = b.conv(f"c{i}", "input", 4)
            y = b.node(Op.GLOBAL_AVG_POOL, f"p{i}", (y,), {}) if size == 1 else y
            y = y if op is None else b.function(op, f"g{i}", y)
            factors.append(b.avg_pool(f"q{i}", b.clip(f"r{i}", y, 0.1, 0.9), (1, 1), stride=(1, 1)) if pooled else y)
        return headed(b, b.mul("m", *factors))

    s, h = Op.SIGMOID, Op.HARD_SIGMOID
    yield "signal first", built("signal first", (None, s), (4, 4)), (1, 0)
    yield "gate first", built("gate first", (h, Op.SILU), (4, 4)), (0, 1)
    yield "a value a channel", built("a value a channel", (s, None), (1, 4)), (0, 1)
    yield "limited gate", built("limited gate", (Op.SILU, s), (4, 4), pooled=True), (1, 0)
    yield "gate of one value's size", built("gate of one value's size", (s, None), (4, 1)), (0, 1)
    yield "swish as a gate", built("swish as a gate", (Op.HARD_SWISH, None), (1, 4)), (0, 1)
    yield "two gates", built("two gates", (s, h), (4, 4)), (0.5, 0.5)
    yield "two gates of two sizes", built("two gates of two sizes", (s, h), (4, 1)), (1, 0)
    yield "no gate", built("no gate", (None, None), (4, 4)), (0.5, 0.5)


PRODUCTS = {name: (graph, shares) for name, graph, shares in products()}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    graph, shares = PRODUCTS[name]
    x, labels = images(graph, 3), np.array([0, 1, 2])
    steps = {step.node.name: step for step in steps_of(graph, x, labels)}
    product = steps["m"]
    for r_in, a, share in zip(product.r_in, product.inputs, shares, strict=True):
        assert r_in.shape == a.shape
        wanted = share * product.r_out
        wanted = wanted.sum((2, 3), keepdim=True) if a.shape[2] == 1 else wanted
        np.testing.assert_allclose(r_in, wanted, atol=1e-12)
    for i, share in enumerate(shares):
        assert steps[f"c{i}"].aside == (share == 0)


def test_a_square_takes_all() -> None:
    b = Build(0, (3, 4, 4))
    graph = headed(b, b.mul("m", b.conv("c", "input", 4), "c"))
    steps = {step.node.name: step for step in steps_of(graph, images(graph, 2), np.array([0, 1]))}
    np.testing.assert_allclose(steps["c"].r_out, steps["m"].r_out)


@pytest.mark.parametrize("op", CURVES)
def test_functions_hand_on(op: Op) -> None:
    b = Build(0, (3, 4, 4))
    graph = headed(b, b.function(op, "f", b.conv("c", "input", 4)))
    x, labels = images(graph, 2), np.array([0, 1])
    steps = {step.node.name: step for step in steps_of(graph, x, labels)}
    assert torch.equal(steps["f"].r_in[0], steps["f"].r_out)
    # From the loss: a times the slope, by torch.
    steps = {step.node.name: step for step in steps_of(graph, x, labels, Start.LOSS)}
    a = steps["f"].inputs[0].clone().requires_grad_()
    y = CURVES[op](a)
    (slope,) = torch.autograd.grad(y.sum(), a)
    np.testing.assert_allclose(steps["f"].r_in[0], (a * slope * steps["f"].r_out / y).detach(), rtol=1e-6, atol=1e-9)


def test_written_out_or_not_silu_is_one() -> None:
    """x * sigmoid(x) as two operators or as one: the same relevance everywhere before it."""
    found = []
    for written_out in (True, False):
        b = Build(0, (3, 4, 4))
        y = b.conv("c", "input", 4)
        y = b.mul("m", y, b.function(Op.SIGMOID, "s", y)) if written_out else b.function(Op.SILU, "m", y)
        graph = headed(b, y)
        steps = {step.node.name: step for step in steps_of(graph, images(graph, 2), np.array([0, 1]))}
        found.append(steps["c"].r_in[0])
        assert not steps["c"].aside
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9)


# ---- conservation ----------------------------------------------------------------------------------------------------


def test_relevance_is_conserved_by_every_node() -> None:
    graph = gated()
    x, labels = images(graph, 4), np.array([0, 9, 5, 5])
    total = to_biases = 0.0
    steps = steps_of(graph, x, labels)
    for step in steps:
        lost, whole = step.lost()
        if not step.aside:
            assert lost <= 1e-8 * whole, step.node.name
            to_biases += float(step.r_out.sum()) - sum(float(r.sum()) for r in step.r_in)
        elif step.node.op in (Op.CONV2D, Op.GLOBAL_AVG_POOL):
            assert lost <= 1e-8 * whole, step.node.name
    total = float(steps[0].r_out.sum())
    of_image = sum(float(s.r_in[0].sum()) for s in steps if s.node.inputs[0] == "input")
    assert of_image + to_biases == pytest.approx(total)
    reported = score(graph, [(x, labels)], composite=Composite(epsilon=1e-12), dtype=torch.float64).conservation
    assert reported.keys() == {node.name for node in graph.layers()}
    assert max(reported.values()) < 1e-8


# ---- aside -----------------------------------------------------------------------------------------------------------


def test_gates_get_their_gradient() -> None:
    """What reaches the logit through a gate alone: w times d logit/d w, where all behind the product is linear."""
    b = Build(5, (3, 6, 6))
    x = b.clip("relu", b.conv("c", "input", 8))
    graph = headed(b, b.conv("d", b.squeezed("se", x, 4, Op.SILU, Op.SIGMOID), 4))
    x, labels = images(graph, 5), np.array([0, 1, 2, 2, 0])
    network = Network(graph, dtype=torch.float64)
    weights = {name: weight.requires_grad_() for name, weight in network.weights().items()}
    found = score(graph, [(x, labels)], composite=Composite(epsilon=1e-13), dtype=torch.float64)
    for layer in ("se.fc1", "se.fc2"):
        weight = weights[f"{layer}.weight"]
        taken, slopes = [], []
        for image, label in zip(x, labels, strict=True):
            values = network.run(torch.from_numpy(image[None]).double())
            dw, dz = torch.autograd.grad(values["fc"][0, label], [weight, values[layer]])
            taken.append((weight * dw).detach().numpy())
            slopes.append(dz[0].square().flatten(1).mean(1).numpy())
        got = found.layers[layer]
        np.testing.assert_allclose(got.weight, np.mean(taken, axis=0), rtol=1e-5, atol=1e-7 * np.abs(taken).max())
        np.testing.assert_allclose(got.weight_abs, np.abs(taken).mean(0), rtol=1e-5, atol=1e-7 * np.abs(taken).max())
        np.testing.assert_allclose(got.output_cost, np.mean(slopes, axis=0), rtol=1e-5)


def test_gates_have_no_relevance_but_are_not_cut_as_irrelevant() -> None:
    graph = gated()
    found = score(graph, [(images(graph, 8), np.arange(8))], per_activation=True)
    for name in ("se.gate", "se.fc2", "se.act", "se.fc1", "se.pool", "se2.fc1", "side", "side.gate"):
        assert not found.activations[name].mean_abs.any(), name
    for name in ("se.mul", "dw.act", "both.relu6", "conv", "input"):
        assert found.activations[name].mean_abs.any(), name
    assert all(layer.output_cost.any() for layer in found.layers.values())
    keep = irrelevant_channels(graph, found)
    assert all(all(keep[name]) for name in ("se.fc1", "se.fc2", "side"))
