"""Cut whole channels slice by slice, and make up for each slice: from images alone, without labels or training.

After a slice is cut, the layers behind it are solved again in running order: new weights and biases that give, on what
the smaller network really feeds them, what the uncut network's layer gave (least squares, drawn to the old weights
where the images do not tell). Then the channels that remain are ranked anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgecomp.channels import CutPolicy, Pruning, Scores, floors, next_slice, not_above
from edgecomp.compress import cut
from edgecomp.errors import BudgetError, DataError
from edgecomp.graph import WEIGHTED, Array, Graph, Node, Op
from edgecomp.graph import Tensor as Value
from edgecomp.groups import kept_numbers, number_channels
from edgecomp.ops import ints
from edgecomp.pytorch.network import as_input, compute
from edgecomp.pytorch.scores import Scorer
from edgecomp.pytorch.sharing import by_first

_POSITIONS = 24
"""Positions of the output that are looked at, for each input of one output value."""
_CHEAP_POSITIONS = 1 << 14
"""Up to so many are looked at in any case."""
_COLUMN_BYTES = 1 << 28
DAMPING = 0.03
"""How strongly new weights are drawn to the old ones, as a share of the inputs' mean variance."""
FLOOR = 0.02
"""Share of its channels that every layer keeps."""

Criterion = Callable[[Graph], Scores]
"""Scores the channels of a network; called again for each smaller one."""


def prune(
    graph: Graph,
    batches: Sequence[Array],
    *,
    shares: Sequence[float],
    criterion: Criterion,
    floor: float = FLOOR,
    compensation: bool = True,
    progress: Callable[[int], object] | None = None,
) -> Iterator[tuple[Graph, dict[str, tuple[bool, ...]]]]:
    """Cut more and more channels; yield after each slice, so that whoever asks can measure and stop.

    Deterministic for a number of threads. As in `recover.reconstruct`, all images' activations are held for the layers
    being worked on, twice.

    Args:
        graph: float.
        batches: preprocessed images float32 (N, C, H, W); a few hundred in all.
        shares: of the weights to be gone after each slice, rising.
        criterion: what ranks the channels.
        floor: share of its channels that every layer keeps.
        compensation: solve the layers again after each slice.
        progress: called after each slice with 1.

    Yields:
        the smaller graph, and by layer name a flag for each output channel of `graph`: True where it is still there.

    Raises:
        DataError: no images.
        UsageError: the floor is out of range, or the criterion's scores do not fit.
    """
    least = floors(graph, floor)
    n_weights = sum(int(np.prod(graph.weight(node).shape)) for node in graph.layers())
    keep = {node.name: np.ones(graph.weight(node).shape[0], dtype=bool) for node in graph.layers()}
    smaller = graph
    for share in shares:
        flags = next_slice(smaller, criterion(smaller), least, round((1 - share) * n_weights))
        smaller = cut(smaller, flags)
        for name, flag in flags.items():
            keep[name][keep[name]] = flag
        given = {name: tuple(flag.tolist()) for name, flag in keep.items()}
        if compensation:
            smaller = by_first(partial(compensate, graph, smaller, given, batches))
        if progress is not None:
            progress(1)
        yield smaller, given


def prune_as_asked(
    graph: Graph,
    pruning: Pruning,
    scorer: Scorer,
    *,
    compensation: bool = True,
    within: Callable[[Graph], bool] = lambda smaller: True,
    progress: Callable[[int], object] | None = None,
) -> Graph:
    """Cut the channels that a policy names; NONPOSITIVE at once, by signed relevance, the others as `prune`.

    Args:
        graph: float.
        pruning: what is asked; ZERO leaves the graph to `planner.irrelevant_channels`.
        scorer: what ranks the channels; its images are those of the compensation.
        compensation: solve the layers again after each slice.
        within: for AUTO, whether a smaller graph is still good enough; the last that was is given back. For ENOUGH,
            whether a graph is fast enough; the first that is, is given back.
        progress: called after each slice with 1.

    Raises:
        BudgetError: none is fast enough.
        as `prune`.
    """
    if pruning.policy is CutPolicy.ENOUGH and within(graph):
        return graph
    if pruning.policy is CutPolicy.ZERO:
        return graph
    batches = [images for images, _ in scorer.batches]
    if pruning.policy is CutPolicy.NONPOSITIVE:
        signed = {name: layer.channel for name, layer in scorer.relevance(graph).layers.items()}
        keep = not_above(graph, signed, floors(graph, FLOOR))
        smaller = cut(graph, keep)
        return by_first(lambda: compensate(graph, smaller, keep, batches)) if compensation else smaller
    shares, criterion = pruning.slices(), scorer.channels
    for smaller, _ in prune(
        graph, batches, shares=shares, criterion=criterion, compensation=compensation, progress=progress
    ):
        if pruning.policy is CutPolicy.AUTO and not within(smaller):
            break
        graph = smaller
        if pruning.policy is CutPolicy.ENOUGH and within(graph):
            return graph
    if pruning.policy is CutPolicy.ENOUGH:
        raise BudgetError(f"--max-latency: not met with {pruning.slices()[-1]:.0%} of the weights cut; allow more time")
    return graph


def compensate(
    graph: Graph,
    smaller: Graph,
    keep: Mapping[str, tuple[bool, ...]],
    batches: Sequence[Array],
    *,
    damping: float = DAMPING,
) -> Graph:
    """Solve the layers of a cut graph again, so that each gives what the uncut graph's gives in the same channels.

    Convolutions with groups only get their biases moved by the mean error. A layer that reads nothing which was cut
    stays as it is.

    Args:
        graph: float, uncut.
        smaller: the same with channels cut; its weights are where the solution starts from.
        keep: layer name -> a flag for each output channel of `graph`: True where `smaller` has it.
        batches: preprocessed images float32 (N, C, H, W).
        damping: how strongly weights are drawn to those of `smaller`, as a share of the inputs' mean variance.

    Raises:
        DataError: no images.
        GraphError: the flags cut what cannot be cut.
    """
    if not batches:
        raise DataError("no images to compensate with; expected at least one")
    channels = number_channels(graph)
    kept = kept_numbers(graph, channels, keep)
    smaller = with_biases(smaller)
    last_reader = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    tensors = dict(smaller.tensors)
    before = _constants(graph)
    after = _constants(smaller)
    source = graph.inputs[0]
    exact = {source: [as_input(x, torch.float32) for x in batches]}
    found = dict(exact)
    # Tensors that are as in the uncut graph, none of their channels missing.
    intact = {source}
    with torch.no_grad():
        for i, (node, small) in enumerate(zip(graph.nodes, smaller.nodes, strict=True)):
            output, read = node.outputs[0], [name for name in node.inputs if name not in before]
            wanted = _run(node, exact, before, len(batches))
            there = torch.from_numpy(kept[channels.of[output]])
            untouched = intact.issuperset(read)
            if untouched and node.op not in WEIGHTED:
                got = wanted
            elif untouched:
                got = wanted if bool(there.all()) else [y[:, there] for y in wanted]
            else:
                if node.op in WEIGHTED:
                    targets = [y[:, there] for y in wanted]
                    weight, bias = (after[name] for name in small.inputs[1:])
                    solved = _solve(small, weight, bias, found[small.inputs[0]], targets, damping)
                    for name, value in zip(small.inputs[1:], solved, strict=True):
                        after[name] = value
                        tensors[name] = replace(tensors[name], data=value.numpy())
                got = _run(small, found, after, len(batches))
            if untouched and bool(there.all()):
                intact.add(output)
            exact[output], found[output] = wanted, got
            for name in set(read):
                if last_reader[name] == i:
                    del exact[name], found[name]
    return replace(smaller, tensors=tensors)


def with_biases(graph: Graph) -> Graph:
    """Give every layer a bias, of zeros where it had none: what is constant in a cut channel has to go somewhere."""
    tensors, nodes = dict(graph.tensors), []
    for original in graph.nodes:
        node = original
        if node.op in WEIGHTED and graph.bias(node) is None:
            name = f"{node.inputs[1]}.bias"
            while name in tensors:
                name += "_"
            zeros = np.zeros(graph.weight(node).shape[0], dtype=np.float32)
            tensors[name] = Value(name=name, shape=zeros.shape, data=zeros)
            node = replace(node, inputs=(*node.inputs, name))
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes), tensors=tensors)


def _constants(graph: Graph) -> dict[str, Tensor]:
    return {name: as_input(t.data, torch.float32) for name, t in graph.tensors.items() if t.data is not None}


def _run(
    node: Node, values: Mapping[str, list[Tensor]], constants: Mapping[str, Tensor], n_batches: int
) -> list[Tensor]:
    return [
        compute(node, [constants[name] if name in constants else values[name][b] for name in node.inputs])
        for b in range(n_batches)
    ]


def _solve(
    node: Node, weight: Tensor, bias: Tensor, inputs: list[Tensor], targets: list[Tensor], damping: float
) -> tuple[Tensor, Tensor]:
    """Find weight and bias that give the targets (N, O, ...) from the inputs: W + (C - W H)(H + damping)^-1, centred.

    H = sum x x^T and C = sum y x^T over positions, about the means, which the bias accounts for.
    """
    if node.op is Op.CONV2D and node.attrs["groups"] != 1:
        off = torch.zeros(len(bias), dtype=torch.float64)
        for x, y in zip(inputs, targets, strict=True):
            off += _rows(y - compute(node, [x, weight, bias])).sum(0, dtype=torch.float64)
        return weight, bias + (off / sum(y.numel() // y.shape[1] for y in targets)).float()
    flat = weight.flatten(1)
    n_rows, d = flat.shape
    n_positions = sum(y.numel() // y.shape[1] for y in targets)
    # Odd, so that it does not stay in one column of an image.
    every = max(1, n_positions // max(_CHEAP_POSITIONS, _POSITIONS * d)) | 1
    h, c = torch.zeros(d, d), torch.zeros(n_rows, d)
    sum_x, sum_y = torch.zeros(d, dtype=torch.float64), torch.zeros(n_rows, dtype=torch.float64)
    n, at_x, at_y = 0, torch.zeros(d), torch.zeros(n_rows)
    for batch_x, batch_y in zip(inputs, targets, strict=True):
        for x, y in _positions(node, weight, batch_x, batch_y, every):
            if n == 0:  # sums about a point near the means lose fewer digits
                at_x, at_y = x.mean(0), y.mean(0)
            x, y = x - at_x, y - at_y
            h.addmm_(x.T, x)
            c.addmm_(y.T, x)
            sum_x += x.sum(0, dtype=torch.float64)
            sum_y += y.sum(0, dtype=torch.float64)
            n += len(x)
    mean_x, mean_y = (sum_x / n).float(), (sum_y / n).float()
    h -= n * torch.outer(mean_x, mean_x)
    c -= n * torch.outer(mean_y, mean_x)
    variance = float(h.diagonal().mean())
    if variance > 0:
        damped = h.clone()
        damped.diagonal().add_(damping * variance)
        factor = torch.linalg.cholesky(damped)
        flat = flat + torch.cholesky_solve((c - flat @ h).T, factor).T
    return flat.reshape(weight.shape), at_y + mean_y - flat @ (at_x + mean_x)


def _rows(y: Tensor) -> Tensor:
    """Lay out (N, O, ...) as (N * positions, O)."""
    return y.flatten(2).transpose(1, 2).reshape(-1, y.shape[1]) if y.ndim > 2 else y


def _positions(node: Node, weight: Tensor, x: Tensor, y: Tensor, every: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what each looked-at output position reads (n, d), and what it should give (n, O), some images at a time."""
    if node.op is Op.LINEAR:
        yield x[::every], y[::every]
        return
    top, left, bottom, right = ints(node.attrs, "pads")
    part = F.pad(x, (left, right, top, bottom))
    step = max(1, _COLUMN_BYTES // (4 * weight[0].numel() * y.shape[2] * y.shape[3]))
    for start in range(0, len(part), step):
        columns = F.unfold(
            part[start : start + step],
            weight.shape[2:],
            dilation=ints(node.attrs, "dilation"),
            stride=ints(node.attrs, "stride"),
        )
        rows = columns.transpose(1, 2).reshape(-1, columns.shape[1])
        yield rows[::every], _rows(y[start : start + step])[::every]
