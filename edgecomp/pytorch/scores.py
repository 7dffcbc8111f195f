"""Rivals of relevance: what else could say which channels and weights matter, in the same form.

Each fills a `Relevance`, so that whatever follows (channels to cut, grids, output channels to be careful with) is done
in the same way and only the score differs. What a score means for the fields:

- channel_abs ranks channels; weight_abs ranks weights; weight_cost is the cost of disturbing a weight by one;
- output_cost is the cost of disturbing a layer's output by one: the weight of its rounding error.

Magnitude and Wanda know nothing behind a layer: to the one all weights are equal (output_cost turns an error of the
outputs into one of the weights), to the other all outputs are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from edgecomp.curves import FUNCTIONS
from edgecomp.errors import DataError
from edgecomp.graph import Array, Graph, Node, Op
from edgecomp.plan import LayerRelevance, Relevance
from edgecomp.pytorch.network import Network, as_input, compute
from edgecomp.pytorch.propagate import Start, Step, logits_name
from edgecomp.pytorch.relevance import score, score_channels
from edgecomp.pytorch.rules import Composite
from edgecomp.pytorch.sharing import all_sum, join, shard, together
from edgecomp.pytorch.sums import Sums, WeightForm

_SAME = 1e-6


class Score(StrEnum):
    """What tells important from unimportant."""

    LRP = "lrp"
    MAGNITUDE = "magnitude"
    TAYLOR = "taylor"
    HESSIAN = "hessian"
    WANDA = "wanda"
    DEEPLIFT = "deeplift"
    RANDOM = "random"


def score_by(
    kind: Score,
    graph: Graph,
    batches: Sequence[tuple[Array, Array]],
    *,
    composite: Composite | None = None,
    start: Start = Start.LOGIT,
    class_weights: Array | None = None,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Relevance:
    """Score every layer.

    Args:
        kind: LRP is `relevance.score`. TAYLOR and HESSIAN are the same walk from the loss (`Start.LOSS`, `FISHER`).
            WANDA: |w| times the root of its input's energy (Sun et al., arXiv 2306.11695). DEEPLIFT: the Rescale rule
            against an image of zeros (Shrikumar et al., arXiv 1704.02685), products shared equally. RANDOM: log-normal,
            for layers and channels.
        graph: float.
        batches: pairs of images float32 (N, C, H, W), preprocessed, and labels int64 (N,).
        composite: of LRP.
        start: of LRP.
        class_weights: of LRP, Taylor and Hessian: (n_classes,), see `relevance.score`.
        seed: of RANDOM.
        progress: called after each batch with the number of images in it.

    Raises:
        as `relevance.score`.
    """
    match kind:
        case Score.LRP:
            return score(
                graph, batches, composite=composite, start=start, class_weights=class_weights, progress=progress
            )
        case Score.TAYLOR | Score.HESSIAN:
            begun = Start.LOSS if kind is Score.TAYLOR else Start.FISHER
            found = score(graph, batches, start=begun, class_weights=class_weights, progress=progress)
            return replace(found, rule=kind.value)
        case Score.DEEPLIFT:
            return _deeplift(graph, batches, progress)
        case _:
            return _by_energy(kind, graph, batches, seed, progress)


def channel_scores(
    kind: Score,
    graph: Graph,
    batches: Sequence[tuple[Array, Array]],
    *,
    composite: Composite | None = None,
    start: Start = Start.LOGIT,
    class_weights: Array | None = None,
    seed: int = 0,
) -> dict[str, Array]:
    """Score channels alone: what `score_by` gives as channel_abs, by layer name, faster where it can be.

    Arguments and errors as `score_by`.
    """
    walks = {Score.LRP: start, Score.TAYLOR: Start.LOSS, Score.HESSIAN: Start.FISHER}
    if kind in walks:
        rules = composite if kind is Score.LRP else None
        return score_channels(graph, batches, composite=rules, start=walks[kind], class_weights=class_weights)
    found = score_by(kind, graph, batches, seed=seed)
    return {name: layer.channel_abs for name, layer in found.layers.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scorer:
    """A score with all that it asks for but the network: to rank one that gets smaller again and again.

    Attributes:
        kind: which score.
        batches: pairs of images float32 (N, C, H, W), preprocessed, and labels int64 (N,).
        composite, start, class_weights, seed: see `score_by`.
    """

    kind: Score
    batches: Sequence[tuple[Array, Array]]
    composite: Composite | None = None
    start: Start = Start.LOGIT
    class_weights: Array | None = None
    seed: int = 0

    def relevance(self, graph: Graph, *, progress: Callable[[int], object] | None = None) -> Relevance:
        """Score a network as `score_by`."""
        return score_by(
            self.kind,
            graph,
            self.batches,
            composite=self.composite,
            start=self.start,
            class_weights=self.class_weights,
            seed=self.seed,
            progress=progress,
        )

    def channels(self, graph: Graph) -> dict[str, Array]:
        """Score the channels of a network alone, as `channel_scores`."""
        return channel_scores(
            self.kind,
            graph,
            self.batches,
            composite=self.composite,
            start=self.start,
            class_weights=self.class_weights,
            seed=self.seed,
        )


def _by_energy(
    kind: Score,
    graph: Graph,
    batches: Iterable[tuple[Array, Array]],
    seed: int,
    progress: Callable[[int], object] | None,
) -> Relevance:
    """Score by weights and by the mean square of each layer's inputs (I,), float64."""
    network = Network(graph)
    read = {node.inputs[0] for node in graph.layers()}
    energy = {name: torch.zeros(graph.tensors[name].shape[1], dtype=torch.float64) for name in sorted(read)}
    count = torch.zeros(1, dtype=torch.float64)
    join()
    with together(), torch.no_grad():
        for images, _ in shard(batches):
            for name, value in network.steps(as_input(images, torch.float32)):
                if name in read:
                    square = value.square().flatten(2).mean(2) if value.ndim > 2 else value.square()
                    energy[name] += square.sum(0, dtype=torch.float64)
            count += len(images)
            if progress is not None:
                progress(len(images))
    all_sum([*energy.values(), count])
    n_images = int(count)
    if n_images == 0:
        raise DataError("no images to score with; expected at least one")
    rng = np.random.default_rng(seed)
    layers = {}
    for node in graph.layers():
        found = (energy[node.inputs[0]] / n_images).numpy()
        layers[node.name] = _layer(kind, graph, node, found, rng)
    return Relevance(rule=kind.value, n_samples=n_images, layers=layers)


def _layer(kind: Score, graph: Graph, node: Node, energy: Array, rng: np.random.Generator) -> LayerRelevance:
    weight = graph.weight(node).data
    assert weight is not None
    n_out, ones = len(weight), (1,) * (weight.ndim - 2)
    size: Array = np.asarray(np.abs(weight))
    if kind is Score.RANDOM:
        size = np.asarray(rng.lognormal(size=weight.shape))
        channel: Array = np.asarray(rng.lognormal(size=n_out))
        cost: Array = rng.lognormal(sigma=2.0) * channel
        weight_cost = np.broadcast_to(cost.reshape(-1, 1, *ones), weight.shape)
    elif kind is Score.WANDA:
        groups = int(node.attrs["groups"]) if node.op is Op.CONV2D else 1  # type: ignore[arg-type]
        # of the input channels that each output channel reads
        read = energy.reshape(groups, 1, -1).repeat(n_out // groups, axis=1).reshape(n_out, -1, *ones)
        weight_cost = np.broadcast_to(read, weight.shape)
        size = size * np.sqrt(weight_cost)
        channel, cost = size.reshape(n_out, -1).sum(1, dtype=np.float64), np.ones(n_out)
    else:
        weight_cost = np.ones(weight.shape)
        channel = size.reshape(n_out, -1).sum(1, dtype=np.float64)
        cost = np.full(n_out, 1 / max(float(energy.mean()), 1e-30))
    return LayerRelevance(
        weight=size.astype(np.float32),
        weight_abs=size.astype(np.float32),
        weight_cost=weight_cost.astype(np.float32),
        channel=channel,
        channel_abs=channel,
        output_cost=cost,
    )


# ---- DeepLIFT --------------------------------------------------------------------------------------------------------


def _deeplift(
    graph: Graph, batches: Iterable[tuple[Array, Array]], progress: Callable[[int], object] | None
) -> Relevance:
    network = Network(graph)
    sums = Sums(network, form=WeightForm.OWN, per_class=False, per_activation=False)
    join()
    with together():
        for images, labels in shard(batches):
            sums.add(_multipliers(network, as_input(images, torch.float32), labels), labels, None)
            if progress is not None:
                progress(len(images))
    all_sum(sums.tensors.values())
    n_images = int(sums.tensors["counts"][0])
    if n_images == 0:
        raise DataError("no images to score with; expected at least one")
    return Relevance(rule="deeplift", n_samples=n_images, layers=sums.layers())


def _rescaled(node: Node, value: Tensor, reference: Tensor) -> Tensor:
    """Compute a function of one number whose gradient is the slope between the reference and the value."""
    point = value.detach().requires_grad_()
    with torch.enable_grad():
        out = compute(node, [point])
    (near,) = torch.autograd.grad(out.sum(), point)
    off = value.detach() - reference
    slope = torch.where(off.abs() > _SAME, (out.detach() - compute(node, [reference])) / off, near)
    return _with_slopes(out.detach(), [value], [slope])


def _product(values: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    """Multiply, with gradients a + a0 and b + b0, halved: what both changes give together is shared equally."""
    a, b = (((x.detach() + x0) / 2) for x, x0 in zip(values, references, strict=True))
    return _with_slopes(values[0].detach() * values[1].detach(), values, [b, a])


def _with_slopes(out: Tensor, values: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
    """Give `out` a gradient: that of the sum of values times slopes."""
    linear = sum((value * slope for value, slope in zip(values[1:], slopes[1:], strict=True)), values[0] * slopes[0])
    return linear + (out - linear.detach())


def _multipliers(network: Network, x: Tensor, labels: Array) -> Iterator[Step]:
    """Yield each layer with its inputs' difference from the reference and the multipliers of its outputs as s."""
    graph, last = network.graph, logits_name(network.graph)
    reference = dict(network.steps(torch.zeros_like(x[:1])))
    values = {**network.weights(), graph.inputs[0]: x.requires_grad_()}
    for node in graph.nodes:
        if node.op in FUNCTIONS or node.op is Op.CLIP:
            out = _rescaled(node, values[node.inputs[0]], reference[node.inputs[0]])
        elif node.op is Op.MUL:
            out = _product([values[name] for name in node.inputs], [reference[name] for name in node.inputs])
        else:
            out = compute(node, [values[name] for name in node.inputs])
        values[node.outputs[0]] = out
        if node.outputs[0] == last:
            break
    layers = [node for node in graph.layers() if node.outputs[0] in values]
    index = as_input(labels, torch.int64).unsqueeze(1)
    explained = values[last].flatten(1).gather(1, index).sum()
    found = torch.autograd.grad(explained, [values[node.outputs[0]] for node in layers])
    for node, slope in zip(layers, found, strict=True):
        off = (values[node.inputs[0]] - reference[node.inputs[0]]).detach()
        r_out = slope * (values[node.outputs[0]] - reference[node.outputs[0]]).detach()
        yield Step(node=node, inputs=(off,), s=slope, terms=(), r_out=r_out, r_in=(r_out,))
