"""Running sums over samples of what the backward walk finds: the memory of a scoring run, bounded by the network.

Not here: where relevance comes from (`propagate`), files and processes (`checkpoint`, `sharing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgecomp.graph import WEIGHTED, Array, Node, Op
from edgecomp.ops import ints
from edgecomp.plan import ActivationRelevance, ClassRelevance, LayerRelevance
from edgecomp.pytorch.network import Network
from edgecomp.pytorch.propagate import Step, n_classes
from edgecomp.pytorch.rules import Term

_PATCH_BYTES = 16 << 20
"""Bound on the temporary that holds the inputs of each output position."""

_BLOCK_BYTES = 1 << 20
"""Bound on the temporary that holds c_w of single samples; a block and its sums stay in the processor's cache."""

_WIDE_ELEMENTS = 1 << 20
"""Up to this many weights, sums over samples are kept in float64."""


class WeightForm(StrEnum):
    """What a weight's relevance is made of.

    OWN is R_w = w * c_w with the layer's own weights and z, whichever rule carries relevance through the network. RULE
    takes the rule's weights: under ZPlus every negative weight then gets 0. Flat has no such form and keeps OWN.
    """

    OWN = "own"
    RULE = "rule"


class Sums:
    """What `Relevance` holds as means, as sums of v_n * x_n over samples n of weight v_n.

    Attributes:
        tensors: all there is to remember, by name: whoever replaces or adds to their contents goes on from there.

    Args:
        network: whose layers are scored.
        form: of weights' relevance.
        per_class: keep relevance of channels by class as well.
        per_activation: keep relevance of each activation's elements as well.
    """

    def __init__(self, network: Network, *, form: WeightForm, per_class: bool, per_activation: bool) -> None:
        graph, double = network.graph, torch.float64
        self._network, self._form = network, form
        self._per_class, self._per_activation = per_class, per_activation
        self._layers = {node.name: i for i, node in enumerate(graph.layers())}
        self._activations = (graph.inputs[0], *(node.outputs[0] for node in graph.nodes)) if per_activation else ()
        self._scratch = _scratch(network)
        # n_samples, and the sum of their weights
        self.tensors = {"counts": torch.zeros(2, dtype=double)}
        # of the first batch, each layer's lost relevance and its whole
        self.tensors["lost"] = torch.zeros(len(self._layers), 2, dtype=double)
        classes = n_classes(graph)
        if per_class:
            self.tensors["class_counts"] = torch.zeros(classes, dtype=double)
        for node in graph.layers():
            shape = graph.weight(node).shape
            wide = network.dtype if np.prod(shape) > _WIDE_ELEMENTS else double
            self.tensors[f"gradients {node.name}"] = torch.zeros(3, *shape, dtype=wide)
            self.tensors[f"channels {node.name}"] = torch.zeros(3, shape[0], dtype=double)
            if per_class:
                self.tensors[f"classes {node.name}"] = torch.zeros(2, classes, shape[0], dtype=double)
        for name in self._activations:
            self.tensors[f"activation {name}"] = torch.zeros(2, *graph.tensors[name].shape[1:], dtype=double)

    def add(self, steps: Iterable[Step], labels: Array, factors: Array | None) -> None:
        """Take in a batch.

        Args:
            steps: what `propagate.explain` yields.
            labels: (N,).
            factors: float64 (N,), the samples' weights; None for 1.
        """
        of_image: dict[str, Tensor] = {}
        first = not self.tensors["counts"][0]
        v = torch.ones(len(labels), dtype=torch.float64) if factors is None else torch.from_numpy(factors)
        classes = torch.from_numpy(np.array(labels, dtype=np.int64))
        for step in steps:
            name = step.node.name
            if step.node.op in WEIGHTED:
                if first:
                    self.tensors["lost"][self._layers[name]] = torch.tensor(step.lost(), dtype=torch.float64)
                self._add_channels(step, classes, v)
                terms = step.terms if self._form is WeightForm.RULE else ()
                assert step.s is not None
                _add_gradients(
                    self.tensors[f"gradients {name}"],
                    step.node,
                    terms or (Term(a=step.inputs[0], s=step.s),),
                    None if factors is None else v,
                    self._scratch,
                )
            if self._per_activation and not step.aside:
                self._add_activation(step.node.outputs[0], step.r_out, v)
                for read, r_in in zip(step.node.inputs, step.r_in, strict=False):
                    if read == self._network.graph.inputs[0]:
                        of_image[read] = of_image[read] + r_in if read in of_image else r_in
        for read, relevance in of_image.items():
            self._add_activation(read, relevance, v)
        self.tensors["counts"] += torch.tensor([len(labels), v.sum()], dtype=torch.float64)
        if self._per_class:
            self.tensors["class_counts"] += torch.bincount(classes, minlength=len(self.tensors["class_counts"]))

    def _add_channels(self, step: Step, classes: Tensor, v: Tensor) -> None:
        r, s = step.r_out, step.s
        assert s is not None
        channels = r.flatten(2).sum(2, dtype=torch.float64) if r.ndim > 2 else r.double()
        squares = s.square().reshape(*s.shape[:2], -1).mean(2, dtype=torch.float64)
        self.tensors[f"channels {step.node.name}"] += torch.stack((v @ channels, v @ channels.abs(), v @ squares))
        if self._per_class:
            total = self.tensors[f"classes {step.node.name}"]
            total[0].index_add_(0, classes, channels)
            total[1].index_add_(0, classes, channels.abs())

    def _add_activation(self, name: str, relevance: Tensor, v: Tensor) -> None:
        total, flat = self.tensors[f"activation {name}"], relevance.flatten(1)
        factors = v.to(flat.dtype)
        total[0] += (factors @ flat).reshape(total.shape[1:])
        total[1] += (factors @ flat.abs()).reshape(total.shape[1:])

    def layers(self) -> dict[str, LayerRelevance]:
        """Give the means of each layer, in place where they are large: this ends the sums."""
        weights, total = self._network.weights(), float(self.tensors["counts"][1])
        found = {}
        for node in self._network.graph.layers():
            gradients = self.tensors.pop(f"gradients {node.name}").div_(total)
            weight = weights[node.inputs[1]]
            gradients[0].mul_(weight)
            gradients[1].mul_(weight.abs())
            channel, channel_abs, output = (self.tensors[f"channels {node.name}"] / total).numpy()
            found[node.name] = LayerRelevance(
                weight=gradients[0].float().numpy(),
                weight_abs=gradients[1].float().numpy(),
                weight_cost=gradients[2].float().numpy(),
                channel=channel,
                channel_abs=channel_abs,
                output_cost=output,
            )
        return found

    def classes(self) -> ClassRelevance | None:
        """Give the means of each class, 0 for one without samples; None unless `per_class`."""
        if not self._per_class:
            return None
        counts = self.tensors["class_counts"]
        means = {name: self.tensors[f"classes {name}"] / counts.clamp(min=1).unsqueeze(1) for name in self._layers}
        return ClassRelevance(
            n_samples=counts.long().numpy(),
            channel={name: both[0].numpy() for name, both in means.items()},
            channel_abs={name: both[1].numpy() for name, both in means.items()},
        )

    def activations(self) -> dict[str, ActivationRelevance]:
        """Give the means of each activation's elements, by tensor; empty unless `per_activation`."""
        means = {name: self.tensors[f"activation {name}"] / self.tensors["counts"][1] for name in self._activations}
        return {name: ActivationRelevance(mean=m[0].numpy(), mean_abs=m[1].numpy()) for name, m in means.items()}

    def conservation(self) -> dict[str, float]:
        """Give the share of relevance that each layer lost in the first batch; without layers that none reached."""
        lost = self.tensors["lost"]
        return {name: float(lost[i, 0] / lost[i, 1]) for name, i in self._layers.items() if lost[i, 1] > 0}


# ---- weights ---------------------------------------------------------------------------------------------------------


def _scratch(network: Network) -> Tensor:
    """Allocate room for c_w once: a block, and at least one row of any layer, one sample of any grouped one."""
    most = _BLOCK_BYTES // network.dtype.itemsize
    for node in network.graph.layers():
        shape = network.graph.weight(node).shape
        most = max(most, int(np.prod(shape if node.attrs.get("groups", 1) != 1 else shape[1:])))
    return torch.empty(2, most, dtype=network.dtype)


def _add_gradients(total: Tensor, node: Node, terms: tuple[Term, ...], v: Tensor | None, scratch: Tensor) -> None:
    """Add v_n c_w, v_n |c_w| and v_n c_w^2 of each sample to `total` (3, ...); c_w sums slope * s a^T over terms."""
    if node.op is Op.LINEAR and len(terms) == 1:
        # c_w of one sample is an outer product, so its sums over samples are matrix products.
        a, s, slope = terms[0].a, terms[0].s, terms[0].slope
        f = 1 if v is None else v.to(s.dtype).unsqueeze(1)
        _add_product(total[0], f * s, a, slope)
        _add_product(total[1], f * s.abs(), a.abs(), None if slope is None else slope.abs())
        _add_product(total[2], f * s.square(), a.square(), None if slope is None else slope.square())
        return
    shape = total.shape[1:]
    groups = node.attrs.get("groups", 1)
    assert isinstance(groups, int)
    o, patch, item = shape[0], int(np.prod(shape[1:])), scratch.itemsize
    n, n_positions = len(terms[0].s), int(np.prod(terms[0].s.shape[2:]))
    flat = total.view(3, o, patch)
    slopes = [None if term.slope is None else term.slope.reshape(o, patch) for term in terms]
    n_rows = o if groups > 1 else max(1, min(o, _BLOCK_BYTES // (patch * item)))
    n_together = max(1, _BLOCK_BYTES // (o * patch * item))
    n_most = max(1, _PATCH_BYTES // (len(terms) * groups * patch * n_positions * item))
    for start, stop in _ranges(n, n_most):
        inputs = [_patches(node, term.a[start:stop], shape, groups, n_positions) for term in terms]
        outputs = [term.s[start:stop].reshape(stop - start, groups, o // groups, n_positions) for term in terms]
        for row, last in _ranges(o, n_rows):
            part = torch.zeros(3, last - row, patch, dtype=scratch.dtype)
            for i, j in _ranges(stop - start, n_together):
                c = _of_samples(
                    [x[i:j] for x in inputs],
                    [s[i:j] if groups > 1 else s[i:j, :, row:last] for s in outputs],
                    [None if slope is None else slope[row:last] for slope in slopes],
                    scratch,
                )
                _add_samples(part, c, None if v is None else v[start + i : start + j].to(c.dtype))
            flat[:, row:last] += part


def _ranges(n: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut 0..n into pieces of at most `step`."""
    return pairwise([*range(0, n, step), n])


def _patches(node: Node, a: Tensor, shape: tuple[int, ...], groups: int, n_positions: int) -> Tensor:
    """Give what each output position reads: (n, G, I/G*KH*KW, positions)."""
    if node.op is Op.LINEAR:
        return a.reshape(len(a), 1, -1, n_positions)
    top, left, bottom, right = ints(node.attrs, "pads")
    return F.unfold(
        F.pad(a, (left, right, top, bottom)),
        shape[2:],
        dilation=ints(node.attrs, "dilation"),
        stride=ints(node.attrs, "stride"),
    ).view(len(a), groups, -1, n_positions)


def _of_samples(inputs: list[Tensor], outputs: list[Tensor], slopes: list[Tensor | None], scratch: Tensor) -> Tensor:
    """Give c_w of each sample, (m, rows, I/G*KH*KW), in `scratch`.

    Args:
        inputs: for each term (m, G, patch, positions).
        outputs: for each term (m, G, rows/G, positions).
        slopes: for each term (rows, patch), or None for 1.
        scratch: (2, elements).
    """
    m, groups, rows, _ = outputs[0].shape
    patch = inputs[0].shape[2]
    c: Tensor | None = None
    for x, s, slope in zip(inputs, outputs, slopes, strict=True):
        room = scratch[0 if c is None else 1, : m * groups * rows * patch].view(m * groups, rows, patch)
        torch.bmm(s.flatten(0, 1), x.flatten(0, 1).transpose(1, 2), out=room)
        found = room.view(m, groups * rows, patch)
        if slope is not None:
            found *= slope
        c = found if c is None else c.add_(found)
    assert c is not None
    return c


def _add_samples(part: Tensor, c: Tensor, v: Tensor | None) -> None:
    """Add the three sums over the samples of c (m, rows, patch) to `part` (3, rows, patch); c is used up."""
    if len(c) == 1:
        factor = 1.0 if v is None else float(v[0])
        part[0].add_(c[0], alpha=factor)
        part[2].addcmul_(c[0], c[0], value=factor)
        part[1].add_(c[0].abs_(), alpha=factor)
        return
    for i, change in enumerate((Tensor.detach, Tensor.abs_, Tensor.square_)):
        value = change(c)
        part[i] += value.sum(0) if v is None else (v @ value.flatten(1)).view(part.shape[1:])


def _add_product(total: Tensor, s: Tensor, a: Tensor, slope: Tensor | None) -> None:
    """Add slope * s^T a in place: (O, I), from (N, O) and (N, I)."""
    if slope is None and total.dtype == a.dtype:
        total.addmm_(s.T, a)
    else:
        total += s.T @ a if slope is None else slope * (s.T @ a)
