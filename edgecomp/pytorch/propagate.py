"""The walk of relevance backwards through a float graph, for one batch of images.

It starts at the output of the explained class and is shared out node by node, with stab(z) = z + epsilon * sign(z) and
sign(0) = 1:

1. conv2d and linear by the rule that the composite gives them (`rules`).
2. add, avg_pool and global_avg_pool, which are sums, by Epsilon: s = R_out / stab(z), R_in = a * (d z/d a)^T s. For
   add, both branches get their part of the sum.
3. max_pool, concat, gather, flatten and reshape, which choose or move values: R_in = (d z/d a)^T R_out; the winner
   takes all.
4. clip (ReLU), sigmoid, hard_sigmoid, silu and hard_swish hand on what they get; so do x * sigmoid(x) and the like,
   whichever way they are written, by 5.
5. mul: the signal takes all, its gate nothing (Arras et al. 2019, arXiv 1909.12114, for the products in an LSTM). The
   gate is the factor that comes from a sigmoid or hard_sigmoid, through pools or reshapes or not; where that tells
   neither or both, the factor of one value a channel. Of two equals each gets half (Achtibat et al. 2024,
   arXiv 2402.05602, for products in attention).

All this conserves relevance but for epsilon and what biases keep. The layers that compute a gate, such as those of
squeeze and excitation, get none of it; yet without them the network is lost. So the walk goes on *aside* of relevance
from each gate, by gradients: a gate g of x starts with g * sum x s, every operator hands on R_in = a * (d z/d a)^T s
with s = R_out / stab(z), and where this meets a tensor that has relevance it ends. What a layer gets in this way is of
the size of relevance (a product's gate starts with as much as its signal), and s says of it what it says everywhere:
the first-order effect of disturbing an output. It is marked, and no part of any sum of relevance.

From the loss (`Start.LOSS`, `Start.FISHER`) it is gradients that are wanted, everywhere: clips, functions and products
then share out by R_in = a * (d z/d a)^T s as sums do, both factors of a product, and nothing is aside.

Not here: sums over samples (`sums`, `relevance`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from edgecomp.curves import FUNCTIONS, GATES
from edgecomp.errors import DataError, UnsupportedOp, UsageError
from edgecomp.graph import WEIGHTED, Array, Graph, Node, Op
from edgecomp.ops import PROBABILITIES
from edgecomp.pytorch.network import Network, as_input, compute
from edgecomp.pytorch.rules import Composite, Epsilon, Term, share, stabilised

_SUMS = frozenset({Op.CONV2D, Op.LINEAR, Op.ADD, Op.AVG_POOL, Op.GLOBAL_AVG_POOL})
_MOVES = frozenset({Op.MAX_POOL, Op.CONCAT, Op.GATHER, Op.FLATTEN, Op.RESHAPE})
_BENT = FUNCTIONS | {Op.CLIP, Op.MUL}
_KEEPS_GATES = _MOVES - {Op.CONCAT} | {Op.CLIP, Op.AVG_POOL, Op.GLOBAL_AVG_POOL}
"""What may stand between a sigmoid and the product that it is a gate of."""


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
        s: R_out / stab(z) with the node's own z where it shares out by it, whatever a layer's rule; else None.
        terms: of the layer's rule; empty for Flat, and for nodes without weights.
        r_out: relevance of the node's output.
        r_in: relevance of each activation input.
        aside: whether the node acts on the explained output through gates alone: r_out and r_in are then its effect by
            gradients, not relevance.
    """

    node: Node
    inputs: tuple[Tensor, ...]
    s: Tensor | None
    terms: tuple[Term, ...]
    r_out: Tensor
    r_in: tuple[Tensor, ...]
    aside: bool = False

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
        network: with one output of one value a class; a softmax or sigmoid at its end is left out.
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
    effects: dict[str, Tensor] = {}  # of what is aside
    from_loss = start in (Start.LOSS, Start.FISHER)
    parameters = network.weights()
    del values
    while tape:
        node, inputs, out = tape.pop()
        name = node.outputs[0]
        aside = name not in relevance
        effect = effects.pop(name, None)
        r_out = effect if effect is not None and aside else relevance.pop(name)
        rule = Epsilon() if aside else rules.get(node.name, Epsilon())
        terms: tuple[Term, ...] = ()
        by_gradient = node.op in _SUMS or (node.op in _BENT and (aside or from_loss))
        s = r_out / stabilised(out.detach(), composite.epsilon) if by_gradient or node.op is Op.MUL else None
        constants = [parameters[name] for name in node.inputs if name in parameters]
        if node.op in WEIGHTED and not (isinstance(rule, Epsilon) and out.requires_grad):
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
        if aside:
            _add(effects, node.inputs, r_in)
        elif node.op is Op.MUL and not from_loss and (gate := _gate(graph, node)) is not None:
            signal = 1 - gate
            _add(effects, [node.inputs[gate]], [r_in[gate]])
            taken = r_out.sum_to_size(inputs[signal].shape)
            _add(relevance, [node.inputs[signal]], [taken])
            r_in = (taken, torch.zeros_like(r_in[1])) if gate else (torch.zeros_like(r_in[0]), taken)
        else:
            if node.op is Op.MUL and not from_loss:
                r_in = (r_out / 2, r_out / 2)
            _add(relevance, node.inputs, r_in)
        yield Step(
            node=node,
            inputs=tuple(a.detach() for a in inputs),
            s=s,
            terms=terms,
            r_out=r_out,
            r_in=r_in,
            aside=aside,
        )


def _add(total: dict[str, Tensor], names: Sequence[str], parts: Sequence[Tensor]) -> None:
    """Add what each input gets; weights, whose names come last, get nothing."""
    for name, part in zip(names, parts, strict=False):
        total[name] = total[name] + part if name in total else part


def _gate(graph: Graph, node: Node) -> int | None:
    """Tell which factor of a product is the gate: 0, 1, or None where both are of one kind."""
    producer = graph.producer()

    def from_gate(name: str) -> bool:
        while (source := producer.get(name)) is not None and source.op in _KEEPS_GATES:
            name = source.inputs[0]
        return source is not None and source.op in GATES

    kinds = [from_gate(name) for name in node.inputs]
    if kinds[0] == kinds[1]:
        kinds = [graph.tensors[name].shape != graph.tensors[node.outputs[0]].shape for name in node.inputs]
    return kinds.index(True) if kinds[0] != kinds[1] else None


def logits_name(graph: Graph) -> str:
    """Name the tensor where explaining starts: the output, or what goes into the softmax or sigmoid that makes it.

    Raises:
        UsageError: the graph has several outputs.
    """
    if len(graph.outputs) != 1:
        raise UsageError(f"graph {graph.name!r} has {len(graph.outputs)} outputs; relevance explains one")
    producer = graph.producer()
    name = graph.outputs[0]
    while name in producer and producer[name].op in PROBABILITIES | {Op.FLATTEN, Op.RESHAPE}:
        node = producer[name]
        name = node.inputs[0]
        if node.op in PROBABILITIES:
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
