"""Relevance of real architectures against zennit, in float64 and with the same weights, for every rule."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecomp.graph import Array, Graph
from edgecomp.pytorch.capture import capture
from edgecomp.pytorch.network import Network
from edgecomp.pytorch.propagate import Start, explain
from edgecomp.pytorch.relevance import score
from edgecomp.pytorch.rules import parse_composite
from edgecomp.pytorch.torchvision_ops import define_missing_operators

SHAPES = {"vgg16": (3, 32, 32), "resnet18": (3, 64, 32), "mobilenet_v2": (3, 64, 32)}
"""The last two end in more than one position, so that their average pooling has something to share out."""
EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network for zennit, BatchNorm folded by torch, and the graph captured from it."""

    module: nn.Module
    graph: Graph
    canonizers: tuple[Any, ...]


def fused(module: nn.Module) -> nn.Module:
    """Fold each BatchNorm into the convolution before it with torch's own function; nothing is in place."""
    module = module.eval()
    for parent in list(module.modules()):
        children = list(parent.named_children())
        for (name, child), (after, norm) in pairwise(children):
            if isinstance(child, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, torch.nn.utils.fusion.fuse_conv_bn_eval(child, norm))
                setattr(parent, after, nn.Identity())
        if hasattr(parent, "inplace"):
            parent.inplace = False
    return module


def untrained(name: str) -> nn.Module:
    """A torchvision network for small images, without what only large images need, with uneven BatchNorms."""
    define_missing_operators()
    from torchvision import models

    torch.manual_seed(7)
    module: nn.Module = getattr(models, name)(num_classes=10)
    if name == "vgg16":
        head = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
        module = nn.Sequential(OrderedDict(features=module.features, flatten=nn.Flatten(), classifier=head))
    if name == "mobilenet_v2":
        # torchvision pools by a function there, which zennit cannot see.
        parts = OrderedDict(
            features=module.features,
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=module.classifier,
        )
        module = nn.Sequential(parts)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
            part.weight.data.uniform_(0.8, 1.2)
            part.bias.data.normal_(0, 0.1)
        if isinstance(part, (nn.Conv2d, nn.Linear)) and part.bias is not None:
            part.bias.data.normal_(0, 0.02)
    return module.eval()


@cache
def case(name: str) -> Case:
    module = fused(untrained(name))
    graph = capture(module, SHAPES[name], name=name)
    return Case(module=module.double(), graph=graph, canonizers=(canonizer(name),) if name != "vgg16" else ())


def canonizer(name: str) -> Any:
    """What makes a sum of two branches a module, so that zennit can give it a rule."""
    from torchvision.models.mobilenetv2 import InvertedResidual
    from torchvision.models.resnet import BasicBlock
    from zennit.canonizers import AttributeCanonizer
    from zennit.layer import Sum

    def residual(self: Any, x: Tensor) -> Tensor:
        if not self.use_res_connect:
            return self.conv(x)
        return self.added(torch.stack([x, self.conv(x)], dim=-1))

    def basic(self: Any, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu2(self.added(torch.stack([y, shortcut], dim=-1)))

    def changed(_: str, module: nn.Module) -> dict[str, Any] | None:
        if isinstance(module, InvertedResidual):
            return {"forward": residual.__get__(module), "added": Sum()}
        if isinstance(module, BasicBlock):
            # One ReLU used twice would be one place to zennit.
            return {"forward": basic.__get__(module), "added": Sum(), "relu1": nn.ReLU(), "relu2": nn.ReLU()}
        return None

    return AttributeCanonizer(changed)


def zennit_rules(text: str) -> tuple[Any, Any, Any]:
    """zennit's rules for the first layer, convolutions and linear layers."""
    from zennit.rules import AlphaBeta, Epsilon, Flat, Gamma, WSquare, ZPlus

    epsilon = Epsilon(epsilon=EPSILON)
    table = {
        "epsilon": (epsilon, epsilon, epsilon),
        "gamma:0.25": (Gamma(gamma=0.25, stabilizer=EPSILON),) * 3,
        "plus": (ZPlus(stabilizer=EPSILON),) * 3,
        "alpha2-beta1": (AlphaBeta(alpha=2, beta=1, stabilizer=EPSILON),) * 3,
        "epsilon-plus-flat": (Flat(stabilizer=EPSILON), ZPlus(stabilizer=EPSILON), epsilon),
        "epsilon-alpha2-beta1-wsquare": (
            WSquare(stabilizer=EPSILON, zero_params="bias"),
            AlphaBeta(alpha=2, beta=1, stabilizer=EPSILON),
            epsilon,
        ),
    }
    return table[text]


def by_zennit(case: Case, text: str, x: Tensor, started: Tensor) -> dict[str, Tensor]:
    """Relevance of the input and of each layer's output, by name."""
    from zennit.attribution import Gradient
    from zennit.composites import SpecialFirstLayerMapComposite
    from zennit.layer import Sum
    from zennit.rules import Norm, Pass
    from zennit.types import Activation, AvgPool, Convolution, Linear

    first, conv, linear = zennit_rules(text)
    sums = [(Activation, Pass()), (AvgPool, Norm(stabilizer=EPSILON)), (Sum, Norm(stabilizer=EPSILON))]
    composite = SpecialFirstLayerMapComposite(
        layer_map=[*sums, (Convolution, conv), (Linear, linear)],
        first_map=[(Convolution, first)],
        canonizers=list(case.canonizers),
    )
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: output.register_hook(lambda r: found.__setitem__(name, r)) and None

    module = copy.deepcopy(case.module)
    with Gradient(model=module, composite=composite) as attributor:
        for name, part in module.named_modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                part.register_forward_hook(keep(name))
        _, found["input"] = attributor(x, lambda logits: started)
    return found


def inputs_of(case: Case) -> tuple[Array, Array]:
    x = (
        np.random.default_rng(3)
        .standard_normal((2, *case.graph.tensors[case.graph.inputs[0]].shape[1:]))
        .astype(np.float32)
    )
    return x, np.array([4, 9])


def assert_same(found: Any, expected: Any, where: str) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    largest = float(np.abs(expected).max())
    assert largest > 0, where
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9 * largest, err_msg=where)


COMPOSITES = ("epsilon", "gamma:0.25", "plus", "alpha2-beta1", "epsilon-plus-flat", "epsilon-alpha2-beta1-wsquare")
CASES = [
    *(("vgg16", text) for text in ("epsilon", "epsilon-plus-flat")),
    *(("resnet18", text) for text in ("epsilon", "gamma:0.25", "epsilon-alpha2-beta1-wsquare")),
    *(("mobilenet_v2", text) for text in COMPOSITES),
]


@pytest.mark.parametrize(("name", "text"), CASES)
def test_relevance_of_input_and_layers_is_zennits(name: str, text: str) -> None:
    net = case(name)
    x, labels = inputs_of(net)
    logits = net.module(torch.from_numpy(x).double()).detach()
    expected = by_zennit(net, text, torch.from_numpy(x).double(), logits * torch.eye(10, dtype=torch.float64)[labels])
    found: dict[str, Tensor] = {}
    for step in explain(Network(net.graph, dtype=torch.float64), x, labels, composite=parse_composite(text)):
        if step.node.name in expected:
            found[step.node.name] = step.r_out
        if step.node.inputs[0] == net.graph.inputs[0]:
            found["input"] = step.r_in[0]
    assert found.keys() == expected.keys()
    for layer, relevance in expected.items():
        assert_same(found[layer], relevance, layer)


WEIGHTS = [
    ("vgg16", "epsilon", Start.SOFTMAX, ("features.0", "features.28", "classifier.2")),
    ("resnet18", "epsilon-plus-flat", Start.LOGIT, ("conv1", "layer2.0.downsample.0", "layer4.1.conv2", "fc")),
    ("mobilenet_v2", "gamma:0.25", Start.ONE, ("features.1.conv.0.0", "features.4.conv.1.0", "classifier.1")),
]


@pytest.mark.parametrize(("name", "text", "start", "layers"), WEIGHTS)
def test_relevance_of_weights_follows_from_zennits(name: str, text: str, start: Start, layers: tuple[str, ...]) -> None:
    """zennit gives R_out; w times torch's weight gradient for R_out / stab(z) must be what we give."""
    net = case(name)
    x, labels = inputs_of(net)
    one_hot = torch.eye(10, dtype=torch.float64)[labels]
    parts = {key: part for key, part in net.module.named_modules() if key in layers}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        part.register_forward_hook(lambda m, a, z, key=key: seen.__setitem__(key, (a[0].detach(), z.detach().clone())))
        for key, part in parts.items()
    ]
    logits = net.module(torch.from_numpy(x).double()).detach()
    for handle in handles:
        handle.remove()
    starts = {Start.LOGIT: logits, Start.ONE: torch.ones_like(logits), Start.SOFTMAX: torch.softmax(logits, 1)}
    relevance = by_zennit(net, text, torch.from_numpy(x).double(), starts[start] * one_hot)
    found = score(net.graph, [(x, labels)], composite=parse_composite(text), start=start, dtype=torch.float64)
    for key, part in parts.items():
        assert isinstance(part, (nn.Conv2d, nn.Linear))
        a, z = seen[key]
        s = relevance[key] / (z + EPSILON * torch.where(z < 0, -1.0, 1.0))
        if isinstance(part, nn.Linear):
            c = s.unsqueeze(2) * a.unsqueeze(1)
        else:
            options = (part.weight.shape, part.stride, part.padding, part.dilation, part.groups)
            c = torch.stack(
                [nn.grad.conv2d_weight(a[i : i + 1], options[0], s[i : i + 1], *options[1:]) for i in range(len(x))]
            )
        weight = part.weight.detach()
        layer = found.layers[key]
        assert_same(layer.weight, (weight * c).mean(0), f"{key} weight")
        assert_same(layer.weight_abs, (weight * c).abs().mean(0), f"{key} weight_abs")
        assert_same(layer.weight_cost, c.square().mean(0), f"{key} weight_cost")
        assert_same(
            layer.channel, relevance[key].flatten(2).sum(2).mean(0) if z.ndim > 2 else relevance[key].mean(0), key
        )


def test_folded_batch_norm_gives_zennits_relevance_of_the_unfolded_network() -> None:
    """Weights folded by us in float32 against zennit's own folding in float64: close, as float32 is."""
    from zennit.canonizers import CompositeCanonizer, SequentialMergeBatchNorm

    module = untrained("resnet18")
    graph = capture(module, SHAPES["resnet18"], name="resnet18")
    both = CompositeCanonizer([SequentialMergeBatchNorm(), canonizer("resnet18")])
    net = Case(module=module.double(), graph=graph, canonizers=(both,))
    x, labels = inputs_of(net)
    logits = net.module(torch.from_numpy(x).double()).detach()
    started = logits * torch.eye(10, dtype=torch.float64)[labels]
    expected = by_zennit(net, "plus", torch.from_numpy(x).double(), started)["input"].numpy()
    steps = list(explain(Network(graph, dtype=torch.float64), x, labels, composite=parse_composite("plus")))
    assert steps[-1].node.inputs[0] == graph.inputs[0]
    np.testing.assert_allclose(steps[-1].r_in[0], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
