"""Which weights go: against a loop over all of them, one at a time, and by what masks must not do."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp.compress import cut
from edgecomp.errors import UsageError
from edgecomp.graph import Graph
from edgecomp.sparsity import Masks, cut_masks, least_worth, masked, not_above, zero_share
from tests.graphs import GRAPHS, plain, separable

often = settings(derandomize=True, deadline=None, max_examples=100)


def sizes(graph: Graph) -> dict[str, tuple[int, ...]]:
    return {node.name: graph.weight(node).shape for node in graph.layers()}


def some_scores(graph: Graph, seed: int, *, levels: int) -> dict[str, np.ndarray]:
    """Scores with ties: of few levels."""
    rng = np.random.default_rng(seed)
    return {name: rng.integers(-2, levels, shape).astype(np.float32) for name, shape in sizes(graph).items()}


def one_by_one(scores: dict[str, np.ndarray], masks: Masks, n_left: int, floor: float) -> dict[str, np.ndarray]:
    """Walk through all weights from the least worth on, as the docstring says."""
    found = {name: masks[name].copy() if name in masks else np.ones(s.shape, dtype=bool) for name, s in scores.items()}
    flat = {name: mask.reshape(-1) for name, mask in found.items()}
    order = sorted(
        (float(value), place, i)
        for place, name in enumerate(scores)
        for i, value in enumerate(scores[name].reshape(-1))
    )
    names = list(scores)
    for _, place, i in order:
        mask = flat[names[place]]
        if sum(int(m.sum()) for m in flat.values()) <= n_left:
            break
        if mask[i] and mask.sum() > max(1, math.ceil(floor * mask.size)):
            mask[i] = False
    return found


@given(
    seed=st.integers(0, 1000),
    levels=st.sampled_from([1, 4, 1000]),
    share=st.floats(0, 1),
    before=st.floats(0, 1),
    floor=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
@often
def test_the_ranking_is_that_of_a_plain_loop(
    seed: int, levels: int, share: float, before: float, floor: float
) -> None:
    graph = small()
    total = sum(int(np.prod(s)) for s in sizes(graph).values())
    masks = least_worth(graph, some_scores(graph, seed + 1, levels=levels), {}, round((1 - before) * total), floor)
    scores, n_left = some_scores(graph, seed, levels=levels), round((1 - share) * total)
    found = least_worth(graph, scores, masks, n_left, floor)
    wanted = one_by_one(scores, masks, n_left, floor)
    assert found.keys() == wanted.keys()
    for name, mask in wanted.items():
        np.testing.assert_array_equal(found[name], mask)
        assert not (found[name] & ~masks[name]).any(), "what is masked stays so"


def small() -> Graph:
    """A few dozen weights in layers of very different size."""
    graph = plain()
    rows = {"conv1": 2, "conv2": 3, "fc1": 2, "fc2": 10}
    keep = {n.name: tuple(i < rows.get(n.name, 2) for i in range(graph.weight(n).shape[0])) for n in graph.layers()}
    return cut(graph, keep)


@given(seed=st.integers(0, 1000), limit=st.sampled_from([-3.0, -1.0, 0.0, 2.0, 9.0]), floor=st.sampled_from([0.0, 0.3]))
@often
def test_all_that_is_not_above_goes_but_for_the_floor(seed: int, limit: float, floor: float) -> None:
    graph = small()
    scores = some_scores(graph, seed, levels=5)
    for name, mask in not_above(graph, scores, limit, floor).items():
        low, least = scores[name] <= limit, max(1, math.ceil(floor * mask.size))
        assert not (~mask & ~low).any()
        assert mask.sum() == max(least, int((~low).sum()))
        # Of those that stay for the floor, none is worth less than one that goes.
        if (mask & low).any() and (~mask).any():
            assert scores[name][mask & low].min() >= scores[name][~mask].max()


@pytest.mark.parametrize("name", GRAPHS)
def test_masks_set_to_zero_and_nothing_else(name: str) -> None:
    graph = GRAPHS[name]()
    first, *rest = graph.layers()
    rng = np.random.default_rng(3)
    masks = {node.name: rng.random(graph.weight(node).shape) < 0.4 for node in rest}
    found = masked(graph, masks)
    zeros, total = 0, 0
    for node in graph.layers():
        before, after = graph.weight(node).data, found.weight(node).data
        assert before is not None
        assert after is not None
        mask = masks.get(node.name, np.ones(before.shape, dtype=bool))
        assert np.array_equal(after, np.where(mask, before, 0))
        assert not np.signbit(after[~mask]).any()
        zeros, total = zeros + int((~mask).sum()), total + mask.size
    assert zero_share(masks, graph) == zeros / total
    assert found.weight(first) is graph.weight(first)


@pytest.mark.parametrize("make", [plain, separable])
def test_masks_are_cut_as_weights_are(make: Callable[[], Graph]) -> None:
    graph = make()
    rng = np.random.default_rng(1)
    masks = {node.name: rng.random(graph.weight(node).shape) < 0.5 for node in graph.layers()}
    drop = {"conv1": 2} if "conv1" in masks else {"expand": 5, "dw": 5}
    keep = {n.name: tuple(i != drop.get(n.name) for i in range(graph.weight(n).shape[0])) for n in graph.layers()}
    smaller = cut_masks(graph, masks, keep)
    # Cutting what was masked gives what masking gives of what was cut.
    assert masked(cut(graph, keep), smaller).digest() == cut(masked(graph, masks), keep).digest()
    assert cut_masks(graph, {}, keep) == {}


def test_scores_that_do_not_fit() -> None:
    graph = plain()
    scores = some_scores(graph, 0, levels=9)
    with pytest.raises(UsageError, match=r"scores of layer 'conv1': \(3,\), expected"):
        least_worth(graph, {**scores, "conv1": np.ones(3)}, {}, 10)
    with pytest.raises(UsageError, match="'conv1'"):
        not_above(graph, {**scores, "conv1": np.full(scores["conv1"].shape, np.nan)})
    with pytest.raises(UsageError, match=r"floor 1\.5"):
        least_worth(graph, scores, {}, 10, floor=1.5)
