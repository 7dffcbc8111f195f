"""The walk of relevance backwards through a float graph, for one batch of images.

It starts at the output of the explained class and is shared out node by node, with stab(z) = z + epsilon * sign(z) and
sign(0) = 1:

1. conv2d and linear by the rule that the composite gives them (`rules`).
2. add, avg_pool and global_avg_pool, which are sums, by Epsilon: s = R_out / stab(z), R_in = a * (d z/d a)^T s. For
   add, both branches get their part of the sum.
3. max_pool, concat, flatten and reshape, which choose or move values: R_in = (d z/d a)^T R_out; the winner takes all.
4. clip (ReLU) hands on what it gets.

Not here: sums over samples (`sums`, `relevance`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from edgecomp.errors import DataError, UnsupportedOp, UsageError
from edgecomp.graph import WEIGHTED, Array, Graph, Node, Op
from edgecomp.pytorch.network import Network, as_input, compute
from edgecomp.pytorch.rules import Composite, Epsilon, Term, share, stabilised

_SUMS = frozenset({Op.CONV2D, Op.LINEAR, Op.ADD, Op.AVG_POOL, Op.GLOBAL_AVG_POOL})
_MOVES = frozenset({Op.MAX_POOL, Op.CONCAT, Op.FLATTEN, Op.RESHAPE})


class Start(StrEnum):
    """What relevance starts with.

    LOGIT, ONE and SOFTMAX give the true class's output its value, 1, or its probability, and the others nothing. LOSS
    gives every output k its share z_k dL/dz_k of the cross-entropy L, so that in the epsilon limit R_w = w dL/dw: first
    order Taylor (Molchanov et al. 2017), whose squares are the empirical Fisher information. FISHER does so with labels
    drawn from the network's own probabilities, by the same random numbers in every batch: squares then estimate the
    Gauss-Newton Hessian of the loss (Kunstner et al. 2019).
    """

    LOGIT = "logit"
    ONE = "one"
    SOFTMAX = "softmax"
    LOSS = "loss"
    FISHER = "fisher"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """What the backward walk finds at one node, for a batch of N images.

    Attributes:
        node: where.
        inputs: the node's activation inputs a, (N, ...) each.
        s: R_out / stab(z) with the node's own z where it is a sum, whatever its rule; else None.
        terms: of the layer's rule; empty for Flat, and for nodes without weights.
        r_out: relevance of the node's output.
        r_in: relevance of each activation input.
    """

    node: Node
    inputs: tuple[Tensor, ...]
    s: Tensor | None
    terms: tuple[Term, ...]
    r_out: Tensor
    r_in: tuple[Tensor, ...]

    def lost(self) -> tuple[float, float]:
        """Give |sum R_out - sum R_in - sum R_b| with R_b the biases' shares, and sum |R_out|: added up in float64."""
        kept = sum(float(r.sum(dtype=torch.float64)) for r in self.r_in)
        for term in self.terms:
            if term.bias is not None:
                of_channel = term.s.transpose(0, 1).flatten(1).sum(1, dtype=torch.float64)
                kept += float(of_channel @ term.bias.double())
        total = float(self.r_out.sum(dtype=torch.float64))
        return abs(total - kept), float(self.r_out.abs().sum(dtype=torch.float64))


def explain(
    network: Network, images: Array, labels: Array, *, composite: Composite | None = None, start: Start = Start.LOGIT
) -> Iterator[Step]:
    """Walk one batch backwards from the true class's output; nodes that no relevance reaches are left out.

    Args:
        network: with one output of one value a class; a softmax at its end is left out.
        images: (N, C, H, W).
        labels: whole numbers (N,).
        composite: which layer gets which rule; None for Epsilon everywhere.
        start: the relevance that the explained class's output starts with.

    Raises:
        DataError: images or labels that do not fit the network, or logits that are not finite.
        UnsupportedOp: a softmax in the middle of the network.
        UsageError: the graph has several outputs.
    """
    composite = composite or Composite()
    x = as_input(images, network.dtype)
    network.check(x)
    graph, first = network.graph, logits_name(network.graph)
    nodes = _leading_to(graph, first)
    rules = composite.rules(graph)
    values: dict[str, Tensor] = {**network.weights(), graph.inputs[0]: x}
    tape: list[tuple[Node, tuple[Tensor, ...], Tensor]] = []
    # Each node gets a small autograd graph of its own: the transposed Jacobian is all that the rules ask of it.
    for node in nodes:
        arguments = [values[name] for name in node.inputs]
        n_activations = sum(graph.tensors[name].data is None for name in node.inputs)
        inputs = tuple(value.detach().requires_grad_() for value in arguments[:n_activations])
        with torch.set_grad_enabled(isinstance(rules.get(node.name, Epsilon()), Epsilon)):
            out = compute(node, [*inputs, *arguments[n_activations:]])
        values[node.outputs[0]] = out.detach()
        tape.append((node, inputs, out))
    relevance = {first: _started(values[first], labels, start)}
    parameters = network.weights()
    del values
    while tape:
        node, inputs, out = tape.pop()
        r_out = relevance.pop(node.outputs[0])
        rule = rules.get(node.name, Epsilon())
        terms: tuple[Term, ...] = ()
        s = r_out / stabilised(out.detach(), composite.epsilon) if node.op in _SUMS else None
        constants = [parameters[name] for name in node.inputs if name in parameters]
        if node.op in WEIGHTED and not isinstance(rule, Epsilon):
            values_here = [inputs[0].detach(), *constants]
            shared, terms = share(rule, node, values_here, out, r_out, epsilon=composite.epsilon)
            r_in: tuple[Tensor, ...] = (shared,)
        elif s is not None:
            gradients = torch.autograd.grad(out, inputs, s)
            r_in = tuple(a.detach() * gradient for a, gradient in zip(inputs, gradients, strict=True))
            if node.op in WEIGHTED:
                terms = (Term(a=inputs[0].detach(), s=s, bias=constants[1] if len(constants) > 1 else None),)
        elif node.op in _MOVES:
            r_in = torch.autograd.grad(out, inputs, r_out)
        else:
            r_in = (r_out,)
        for name, part in zip(node.inputs, r_in, strict=False):
            relevance[name] = relevance[name] + part if name in relevance else part
        yield Step(node=node, inputs=tuple(a.detach() for a in inputs), s=s, terms=terms, r_out=r_out, r_in=r_in)


def logits_name(graph: Graph) -> str:
    """Name the tensor where explaining starts: the output, or what goes into the softmax that makes the output.

    Raises:
        UsageError: the graph has several outputs.
    """
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


def n_classes(graph: Graph) -> int:
    """Count the classes; errors as `logits_name`."""
    return int(np.prod(graph.tensors[logits_name(graph)].shape))


def check_labels(labels: Array, n: int, classes: int) -> None:
    """Refuse what is not one class number an image.

    Raises:
        DataError: another shape or dtype than whole numbers (n,), or a label that is no class.
    """
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise DataError(f"labels are {labels.dtype} {labels.shape}, expected whole numbers ({n},): one an image")
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        odd = labels[(labels < 0) | (labels >= classes)][0]
        raise DataError(f"label {odd} is out of range, the model's are 0 to {classes - 1}")


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


def _started(logits: Tensor, labels: Array, start: Start) -> Tensor:
    """Give each image's output of its true class what it starts with and the others 0: (N, ...) like `logits`."""
    flat = logits.flatten(1)
    check_labels(labels, *flat.shape)
    if not torch.isfinite(flat).all():
        raise DataError("the model's output is not finite; check its weights, and the images for NaN")
    index = as_input(labels, torch.int64).to(flat.device).unsqueeze(1)
    match start:
        case Start.LOGIT:
            source = flat
        case Start.ONE:
            source = torch.ones_like(flat)
        case Start.SOFTMAX:
            source = flat.softmax(1)
        case Start.LOSS | Start.FISHER:
            slope = flat.softmax(1)
            if start is Start.FISHER:
                index = torch.multinomial(slope, 1, generator=torch.Generator(flat.device).manual_seed(0))
            slope.scatter_add_(1, index, torch.full_like(index, -1, dtype=flat.dtype))
            return (flat * slope).reshape(logits.shape)
    return torch.zeros_like(flat).scatter(1, index, source.gather(1, index)).reshape(logits.shape)
