"""Layer-wise Relevance Propagation on a float graph: what each weight and channel contributes to the right answer.

The logit of the true class is shared out backwards, node by node, by three rules (Bach et al. 2015; zennit's Epsilon,
Norm and Pass), with stab(z) = z + epsilon * sign(z) and sign(0) = 1:

1. conv2d, linear, add, avg_pool, global_avg_pool, which are sums: s = R_out / stab(z), R_in = a * (d z/d a)^T s. A bias
   is part of z and keeps its share. For add, both branches get their part of the sum.
2. max_pool, concat, flatten, reshape, which choose or move values: R_in = (d z/d a)^T R_out; the winner takes all.
3. clip (ReLU) hands on what it gets.

In the limit epsilon -> 0 this is R_w = w * d logit/d w, which is what the tests hold it against.
Not here: what follows from relevance (`planner`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgecomp.errors import DataError, UnsupportedOp, UsageError
from edgecomp.graph import WEIGHTED, Array, Graph, Node, Op
from edgecomp.ops import ints
from edgecomp.plan import LayerRelevance, Relevance
from edgecomp.pytorch.network import Network, as_input, compute

Batches = Iterable[tuple[Array, Array]]

_SUMS = frozenset({Op.CONV2D, Op.LINEAR, Op.ADD, Op.AVG_POOL, Op.GLOBAL_AVG_POOL})
_MOVES = frozenset({Op.MAX_POOL, Op.CONCAT, Op.FLATTEN, Op.RESHAPE})

_CHUNK_BYTES = 128 << 20
"""Bound on the temporary that holds the weight gradients of single samples."""

_WIDE_ELEMENTS = 1 << 20
"""Up to this many weights, sums over samples are kept in float64."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """What the backward walk finds at one node, for a batch of N images.

    Attributes:
        node: where.
        inputs: the node's activation inputs a, (N, ...) each.
        s: R_out / stab(z) where the node is a sum (rule 1), else None.
        r_out: relevance of the node's output.
        r_in: relevance of each activation input.
    """

    node: Node
    inputs: tuple[Tensor, ...]
    s: Tensor | None
    r_out: Tensor
    r_in: tuple[Tensor, ...]


def score(
    graph: Graph,
    batches: Batches | Callable[[], Batches],
    *,
    epsilon: float = 1e-6,
    class_weights: Array | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], object] | None = None,
) -> Relevance:
    """Explain labelled images and average what they say of every layer.

    Deterministic; the result does not depend on how the images are cut into batches, but for rounding.

    With `class_weights` every mean is a weighted one, sum(v_y * x) / sum(v_y) with v_y the weight of the image's class.
    Each image is still explained from the logit of its own class alone, so relevance starts only at outputs of classes
    that have weight: logits of several classes in one start would cancel each other.

    Args:
        graph: float, one input, one output of one value a class; a softmax at its end is left out.
        batches: pairs of images float32 (N, C, H, W), preprocessed, and labels int64 (N,); or what gives them.
        epsilon: of the stabiliser, above 0.
        class_weights: (n_classes,), not negative; images of a class of weight 0 are left out. None: all count 1.
        dtype: of the arithmetic.
        progress: called after each batch with the number of images in it.

    Raises:
        DataError: no image (of a class with weight), images or labels that do not fit the network, or logits that are
            not finite.
        UnsupportedOp: a softmax in the middle of the network.
        GraphError: the graph is not a legal float graph, or has several inputs.
        UsageError: epsilon or class_weights out of range, or the graph has several outputs.
    """
    network = Network(graph, dtype=dtype)
    if class_weights is not None:
        class_weights = _checked_weights(class_weights, _n_classes(graph))
    sums = {node.name: _Sums(graph.weight(node).shape, dtype) for node in graph.layers()}
    scratch = _scratch(network)
    n_samples, total = 0, 0.0
    for images, labels in batches() if callable(batches) else batches:
        n_images, factors = len(labels), None
        if class_weights is not None:
            images, labels, factors = _of_weight(images, labels, class_weights)
        if factors is None or len(factors):
            for step in explain(network, images, labels, epsilon=epsilon):
                if step.node.op in WEIGHTED:
                    sums[step.node.name].add(step, scratch, factors)
        n_samples += len(labels)
        total += len(labels) if factors is None else float(factors.sum())
        if progress is not None:
            progress(n_images)
    if n_samples == 0:
        of_weight = "" if class_weights is None else " of a class with weight"
        raise DataError(f"no images to explain; expected at least one{of_weight}")
    weights = network.weights()
    layers = {
        node.name: sums.pop(node.name).means(weights[node.inputs[1]].to(dtype), total) for node in graph.layers()
    }
    return Relevance(rule=f"epsilon {epsilon:g}{_weights_text(class_weights)}", n_samples=n_samples, layers=layers)


def conservation(graph: Graph, images: Array, labels: Array, *, epsilon: float = 1e-6) -> dict[str, float]:
    """Measure the relevance that each layer loses: |sum R_out - sum R_w - sum R_b| / sum |R_out|, in float64.

    It is what epsilon takes, so it goes to 0 with epsilon. Arguments and errors as `score`; layers that no relevance
    reaches are missing.
    """
    network = Network(graph, dtype=torch.float64)
    weights = network.weights()
    scratch = _scratch(network)
    leak: dict[str, float] = {}
    for step in explain(network, images, labels, epsilon=epsilon):
        node, total = step.node, float(step.r_out.abs().sum())
        if node.op not in WEIGHTED or total == 0:
            continue
        assert step.s is not None
        sums = _Sums(graph.weight(node).shape, torch.float64)
        sums.add(step, scratch)
        kept = (sums.gradient * weights[node.inputs[1]]).sum()
        if len(node.inputs) > 2:
            kept += (step.s.transpose(0, 1).flatten(1).sum(1) * weights[node.inputs[2]]).sum()
        leak[node.name] = abs(float(step.r_out.sum() - kept)) / total
    return leak


def explain(network: Network, images: Array, labels: Array, *, epsilon: float) -> Iterator[Step]:
    """Walk one batch backwards from the true class's logit; nodes that no relevance reaches are left out.

    Args:
        network: with one output of one value a class.
        images: (N, C, H, W).
        labels: whole numbers (N,).
        epsilon: of the stabiliser, above 0.

    Raises:
        as `score`.
    """
    if not 0 < epsilon < float("inf"):
        raise UsageError(f"epsilon is {epsilon}, expected a number above 0")
    x = as_input(images, network.dtype)
    network.check(x)
    graph, start = network.graph, _logits_name(network.graph)
    nodes = _leading_to(graph, start)
    values: dict[str, Tensor] = {**network.weights(), graph.inputs[0]: x}
    tape: list[tuple[Node, tuple[Tensor, ...], Tensor]] = []
    # Each node gets a small autograd graph of its own: the transposed Jacobian is all that the rules ask of it.
    for node in nodes:
        arguments = [values[name] for name in node.inputs]
        n_activations = sum(graph.tensors[name].data is None for name in node.inputs)
        inputs = tuple(value.detach().requires_grad_() for value in arguments[:n_activations])
        with torch.enable_grad():
            out = compute(node, [*inputs, *arguments[n_activations:]])
        values[node.outputs[0]] = out.detach()
        tape.append((node, inputs, out))
    relevance = {start: _true_logit(values[start], labels)}
    del values
    while tape:
        node, inputs, out = tape.pop()
        r_out = relevance.pop(node.outputs[0])
        s = r_out / _stabilised(out.detach(), epsilon) if node.op in _SUMS else None
        if s is not None:
            gradients = torch.autograd.grad(out, inputs, s)
            r_in = tuple(a.detach() * gradient for a, gradient in zip(inputs, gradients, strict=True))
        elif node.op in _MOVES:
            r_in = torch.autograd.grad(out, inputs, r_out)
        else:
            r_in = (r_out,)
        for name, share in zip(node.inputs, r_in, strict=False):
            relevance[name] = relevance[name] + share if name in relevance else share
        yield Step(node=node, inputs=tuple(a.detach() for a in inputs), s=s, r_out=r_out, r_in=r_in)


def _logits_name(graph: Graph) -> str:
    """Find where explaining starts: the output, or what goes into the softmax that makes the output."""
    if len(graph.outputs) != 1:
        raise UsageError(f"graph {graph.name!r} has {len(graph.outputs)} outputs; relevance explains one")
    producer = graph.producer()
    name = graph.outputs[0]
    while name in producer and producer[name].op in (Op.SOFTMAX, Op.FLATTEN, Op.RESHAPE):
        node = producer[name]
        name = node.inputs[0]
        if node.op is Op.SOFTMAX:
            return name
    return graph.outputs[0]


def _leading_to(graph: Graph, name: str) -> list[Node]:
    """List the nodes that `name` is computed from, in running order."""
    needed = {name}
    nodes: list[Node] = []
    for node in reversed(graph.nodes):
        if node.outputs[0] in needed:
            if node.op is Op.SOFTMAX:
                raise UnsupportedOp(f"{node.name}: softmax in the middle of the network has no relevance rule")
            needed.update(node.inputs)
            nodes.append(node)
    return nodes[::-1]


def _n_classes(graph: Graph) -> int:
    return int(np.prod(graph.tensors[_logits_name(graph)].shape))


def _check_labels(labels: Array, n: int, n_classes: int) -> None:
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise DataError(f"labels are {labels.dtype} {labels.shape}, expected whole numbers ({n},): one an image")
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        odd = labels[(labels < 0) | (labels >= n_classes)][0]
        raise DataError(f"label {odd} is out of range, the model's are 0 to {n_classes - 1}")


def _true_logit(logits: Tensor, labels: Array) -> Tensor:
    """Keep each image's logit of its true class and make the others 0: (N, ...) like `logits`."""
    flat = logits.flatten(1)
    _check_labels(labels, *flat.shape)
    if not torch.isfinite(flat).all():
        raise DataError("the model's output is not finite; check its weights, and the images for NaN")
    index = as_input(labels, torch.int64).to(flat.device).unsqueeze(1)
    return torch.zeros_like(flat).scatter(1, index, flat.gather(1, index)).reshape(logits.shape)


def _stabilised(z: Tensor, epsilon: float) -> Tensor:
    """Move z away from 0 by epsilon, 0 itself upwards."""
    return z + torch.where(z < 0, -epsilon, epsilon).to(z.dtype)


# ---- weights of classes ----------------------------------------------------------------------------------------------


def _checked_weights(weights: Array, n_classes: int) -> Array:
    """Give float64 (n_classes,) of finite weights, at least one of them above 0."""
    if weights.shape != (n_classes,) or weights.dtype.kind not in "fiub":
        raise UsageError(f"class weights are {weights.dtype} {weights.shape}, expected numbers ({n_classes},)")
    weights = weights.astype(np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise UsageError("class weights must be finite, none below 0 and one above 0")
    return weights


def _of_weight(images: Array, labels: Array, class_weights: Array) -> tuple[Array, Array, Array]:
    """Keep the images of classes with weight; give them, their labels, and each one's weight (N,)."""
    _check_labels(labels, len(images), len(class_weights))
    factors = class_weights[labels]
    chosen = factors > 0
    return images[chosen], labels[chosen], factors[chosen]


def _weights_text(weights: Array | None) -> str:
    """Name the classes that count, and their weights where these differ."""
    if weights is None:
        return ""
    chosen = np.flatnonzero(weights)
    equal = len(set(weights[chosen].tolist())) == 1
    names = [str(i) if equal else f"{i}*{weights[i]:g}" for i in chosen[:20]]
    more = f" and {len(chosen) - 20} more" if len(chosen) > 20 else ""
    return f"; classes {','.join(names)}{more}"


# ---- sums over samples -----------------------------------------------------------------------------------------------


class _Sums:
    """Running sums over samples of what `LayerRelevance` holds as means, with c_w in place of R_w = w * c_w."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        wide = dtype if np.prod(shape) > _WIDE_ELEMENTS else torch.float64
        self.gradient, self.gradient_abs, self.gradient_square = (torch.zeros(shape, dtype=wide) for _ in range(3))
        self.channel, self.channel_abs, self.output = (torch.zeros(shape[0], dtype=torch.float64) for _ in range(3))

    def add(self, step: Step, scratch: Tensor, factors: Array | None = None) -> None:
        """Take in a batch at this layer; `scratch` is from `_scratch`, `factors` (N,) are the weights of its images."""
        assert step.s is not None
        a, s = step.inputs[0], step.s
        v = torch.ones(len(s), dtype=torch.float64) if factors is None else torch.from_numpy(factors)
        channels = step.r_out.flatten(2).sum(2, dtype=torch.float64) if step.r_out.ndim > 2 else step.r_out.double()
        self.channel += v @ channels
        self.channel_abs += v @ channels.abs()
        self.output += v @ s.square().reshape(*s.shape[:2], -1).mean(2, dtype=torch.float64)
        if step.node.op is Op.LINEAR:
            # c_w of one sample is the outer product s a^T, so its sums over samples are matrix products.
            of_sample = None if factors is None else v.to(s.dtype).unsqueeze(1)
            for total, left, right in (
                (self.gradient, s, a),
                (self.gradient_abs, s.abs(), a.abs()),
                (self.gradient_square, s.square(), a.square()),
            ):
                _add_product(total, left if of_sample is None else left * of_sample, right)
            return
        shape, start = self.gradient.shape, 0
        for c in _conv_gradients(step.node, a, s, shape, scratch):
            part = None if factors is None else v[start : start + len(c)].to(c.dtype)
            start += len(c)
            self.gradient += _sum_samples(c, part).view(shape)
            self.gradient_abs += _sum_samples(c.abs_(), part).view(shape)
            self.gradient_square += _sum_samples(c.square_(), part).view(shape)

    def means(self, weight: Tensor, total: float) -> LayerRelevance:
        """Divide by the number of samples, or the sum of their weights, in place: this ends the sums."""
        self.gradient.mul_(weight).div_(total)
        self.gradient_abs.mul_(weight.abs()).div_(total)
        self.gradient_square.div_(total)
        return LayerRelevance(
            weight=self.gradient.float().numpy(),
            weight_abs=self.gradient_abs.float().numpy(),
            weight_cost=self.gradient_square.float().numpy(),
            channel=(self.channel / total).numpy(),
            channel_abs=(self.channel_abs / total).numpy(),
            output_cost=(self.output / total).numpy(),
        )


def _sum_samples(c: Tensor, factors: Tensor | None) -> Tensor:
    """Sum (n, ...) over its samples, weighted where there are factors."""
    return c.sum(0) if factors is None else factors @ c.flatten(1)


def _add_product(total: Tensor, s: Tensor, a: Tensor) -> None:
    """Add s^T a in place: (O, I), from (N, O) and (N, I)."""
    if total.dtype == a.dtype:
        total.addmm_(s.T, a)
    else:
        total += s.T @ a


def _scratch(network: Network) -> Tensor:
    """Allocate room for `_conv_gradients` once: fresh memory for each batch would cost more than the arithmetic."""
    graph = network.graph
    largest = max(
        (int(np.prod(graph.weight(node).shape)) for node in graph.layers() if node.op is Op.CONV2D), default=0
    )
    return torch.empty(max(largest, _CHUNK_BYTES // network.dtype.itemsize), dtype=network.dtype)


def _conv_gradients(node: Node, a: Tensor, s: Tensor, shape: tuple[int, ...], scratch: Tensor) -> Iterator[Tensor]:
    """Yield c_w of each sample, (n, O, I/G*KH*KW), some samples at a time, all in `scratch`."""
    top, left, bottom, right = ints(node.attrs, "pads")
    groups = node.attrs["groups"]
    assert isinstance(groups, int)
    o, patch, n_positions = shape[0], int(np.prod(shape[1:])), s.shape[2] * s.shape[3]
    n_most = max(1, len(scratch) // max(o * patch, groups * patch * n_positions))
    for a_part, s_part in zip(torch.split(a, n_most), torch.split(s, n_most), strict=True):
        n = len(a_part)
        patches = F.unfold(
            F.pad(a_part, (left, right, top, bottom)),
            shape[2:],
            dilation=ints(node.attrs, "dilation"),
            stride=ints(node.attrs, "stride"),
        ).view(n * groups, patch, n_positions)
        c = scratch[: n * o * patch].view(n * groups, o // groups, patch)
        torch.bmm(s_part.reshape(n * groups, o // groups, n_positions), patches.transpose(1, 2), out=c)
        yield c.view(n, o, patch)
