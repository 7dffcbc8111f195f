"""Set single weights to zero slice by slice; what is decided is where (`sparsity.Masks`).

After a slice the weights that remain make up for those that went, on what the sparse network really feeds each layer
(`recover.make_up`), and all are scored anew. The values of the last slice serve to score and to measure: whoever rounds
starts from the dense weights and does both at once, which loses less than one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from edgecomp.channels import CutPolicy, Pruning
from edgecomp.graph import Graph
from edgecomp.pytorch.recover import make_up
from edgecomp.pytorch.scores import Scorer
from edgecomp.pytorch.sharing import by_first
from edgecomp.sparsity import FLOOR, NOTHING, Masks, least_worth, masked, not_above


def sparsify(
    graph: Graph,
    sparsifying: Pruning,
    scorer: Scorer,
    *,
    floor: float = FLOOR,
    compensation: bool = True,
    within: Callable[[Graph], bool] = lambda sparse: True,
    progress: Callable[[int], object] | None = None,
) -> Masks:
    """Choose the weights that a policy names.

    ZERO and NONPOSITIVE are chosen at once, by unsigned and by signed relevance of each weight; the others slice by
    slice, by `Scorer.weights`.

    Args:
        graph: float.
        sparsifying: what is asked; a share is one of all weights of the graph.
        scorer: what ranks weights; its images are those of the compensation.
        floor: share of its weights that every layer keeps.
        compensation: have the weights that remain make up for the others after each slice.
        within: for AUTO, whether a sparse graph is still good enough; the last that was is taken.
        progress: called after each slice with 1.

    Raises:
        as `Scorer.relevance`, `sparsity.least_worth`.
    """
    report = progress or (lambda n: None)
    if sparsifying.policy in (CutPolicy.ZERO, CutPolicy.NONPOSITIVE):
        layers = scorer.relevance(graph).layers
        signed = sparsifying.policy is CutPolicy.NONPOSITIVE
        scores = {name: layer.weight if signed else layer.weight_abs for name, layer in layers.items()}
        report(1)
        return not_above(graph, scores, floor=floor)
    n_weights = sum(int(np.prod(graph.weight(node).shape)) for node in graph.layers())
    batches = [images for images, _ in scorer.batches]
    shares, masks, sparse = sparsifying.slices(), NOTHING, graph
    for number, share in enumerate(shares):
        more = least_worth(graph, scorer.weights(sparse), masks, round((1 - share) * n_weights), floor)
        # The last slice needs values only where it is measured.
        if sparsifying.policy is CutPolicy.AUTO or number < len(shares) - 1:
            sparse = by_first(partial(make_up, graph, more, batches)) if compensation else masked(graph, more)
        if sparsifying.policy is CutPolicy.AUTO and not within(sparse):
            break
        masks = more
        report(1)
    return masks
