"""Ranking of channels: counts against tensors really cut, order and floors by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp.channels import floors, keep_flags, next_slice, not_above, rank, slices, weights_left
from edgecomp.compress import cut
from edgecomp.errors import UsageError
from edgecomp.graph import Graph
from edgecomp.groups import number_channels
from edgecomp.planner import irrelevant_channels
from tests.built import flat_relevance
from tests.graphs import GRAPHS, dense, multiplied
from tests.soak_graphs import random_graph, random_keep

ALL = {**GRAPHS, "multiplied": multiplied, "dense": dense}


def n_weights(graph: Graph) -> int:
    return sum(int(np.prod(graph.weight(node).shape)) for node in graph.layers())


def random_scores(graph: Graph, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {node.name: rng.standard_normal(graph.weight(node).shape[0]) for node in graph.layers()}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_weights_left_are_those_of_the_cut_graph(seed: int) -> None:
    rng = np.random.default_rng(seed)
    graph = random_graph(rng)
    keep = random_keep(rng, graph)
    channels = number_channels(graph)
    kept = np.ones(len(channels.locked), dtype=bool)
    for node in graph.layers():
        kept[channels.of[node.outputs[0]]] = keep[node.name]
    assert weights_left(graph, channels, kept) == n_weights(cut(graph, keep))
    assert keep_flags(graph, channels, kept) == keep


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), share=st.floats(0, 1), floor=st.floats(0, 1))
def test_a_slice_is_just_enough(seed: int, share: float, floor: float) -> None:
    """At most as many weights remain as asked for, and one channel less would not do; or the floors are reached."""
    rng = np.random.default_rng(seed)
    graph = random_graph(rng)
    scores, least = random_scores(graph, rng), floors(graph, floor)
    target = round(share * n_weights(graph))
    keep = next_slice(graph, scores, least, target)
    assert all(sum(flags) >= least[name] for name, flags in keep.items())
    smaller = cut(graph, keep)
    channels = number_channels(graph)
    order = rank(graph, channels, scores, least)
    kept = np.ones(len(channels.locked), dtype=bool)
    n_cut = 0
    for number in order:
        if keep_flags(graph, channels, kept) == keep:
            break
        kept[number] = False
        n_cut += 1
    assert keep_flags(graph, channels, kept) == keep
    assert n_weights(smaller) <= target or n_cut == len(order)
    if n_cut:
        kept[order[n_cut - 1]] = True
        assert weights_left(graph, channels, kept) > target


def test_the_least_worth_goes_first() -> None:
    """Worked by hand: block.conv2, block.shortcut and end.conv of `residual` are coupled, their scores add up."""
    graph = GRAPHS["residual"]()
    channels = number_channels(graph)
    scores = {node.name: np.full(graph.weight(node).shape[0], 100.0) for node in graph.layers()}
    for name, value in (("block.conv2", 1.0), ("block.shortcut", 2.0), ("end.conv", 3.0)):
        scores[name] = scores[name].copy()
        scores[name][4] = value
    scores["stem"][2], scores["block.conv1"][7] = 5.0, 7.0
    order = rank(graph, channels, scores, floors(graph, 0.5))
    wanted = [channels.of["stem"][2], channels.of["end.conv"][4], channels.of["block.conv1"][7]]
    assert order[:3] == [int(n) for n in wanted]
    assert len(order) == 4 + 6 + 6
    assert not {int(n) for n in channels.of["fc"]} & set(order)


def test_a_gather_keeps_a_channel() -> None:
    """One half of the channels, which come from two layers, is worth nothing; one of them stays."""
    graph = GRAPHS["shuffled"]()
    channels = number_channels(graph)
    scores = {node.name: np.ones(graph.weight(node).shape[0]) for node in graph.layers()}
    scores["stem"][:3] = scores["right"][:3] = 0
    keep = not_above(graph, scores, floors(graph, 0))
    assert sum(keep["stem"]) + sum(keep["right"]) == 7
    smaller = cut(graph, keep)
    assert smaller.tensors["chunk1"].shape[1] == 1
    assert smaller.tensors["chunk2"].shape[1] == 6
    least = floors(graph, 0)
    gone = set(rank(graph, channels, scores, least))
    assert not gone.issuperset(channels.of["chunk1"].tolist())


@pytest.mark.parametrize("name", ALL)
def test_nothing_above_zero_is_what_the_planner_calls_irrelevant(name: str) -> None:
    graph = ALL[name]()
    flat, rng = flat_relevance(graph), np.random.default_rng(3)
    layers = {}
    for node in graph.layers():
        worth = (rng.random(graph.weight(node).shape[0]) < 0.3).astype(np.float64)
        worth[-1] = 1  # where all are 0, which one stays is a matter of taste
        layers[node.name] = replace(flat.layers[node.name], channel_abs=worth)
    scores = {layer: r.channel_abs for layer, r in layers.items()}
    keep = not_above(graph, scores, floors(graph, 0))
    assert keep == irrelevant_channels(graph, replace(flat, layers=layers))
    assert not all(map(all, keep.values())) or name == "multiplied", "all its layers are coupled"


def test_negative_relevance_goes_as_far_as_floors_allow() -> None:
    graph = GRAPHS["plain"]()
    scores = {node.name: np.ones(graph.weight(node).shape[0]) for node in graph.layers()}
    scores["conv1"] = np.array([-1.0, 2, 0, 3, -4, -2, 1, 1])
    keep = not_above(graph, scores, floors(graph, 0))
    assert keep["conv1"] == (False, True, False, True, False, False, True, True)
    assert all(keep["conv2"])
    # At a floor of 6 of 8 only the two worst go.
    keep = not_above(graph, scores, floors(graph, 0.75))
    assert keep["conv1"] == (True, True, True, True, False, False, True, True)


@given(share=st.floats(0, 0.99), step=st.floats(0.3, 0.95))
def test_slices_rise_to_the_share(share: float, step: float) -> None:
    found = [0.0, *slices(share, step)]
    assert found[-1] == pytest.approx(share)
    for before, after in itertools.pairwise(found):
        assert before <= after
        assert (1 - after) / (1 - before) >= step - 1e-6


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_shares_out_of_range(share: float) -> None:
    with pytest.raises(UsageError, match="expected a share"):
        slices(share)
    with pytest.raises(UsageError, match="expected a share"):
        floors(GRAPHS["plain"](), 2 + share)


@pytest.mark.parametrize("bad", [np.ones(3), np.full(8, np.nan)])
def test_scores_that_do_not_fit(bad: np.ndarray) -> None:
    graph = GRAPHS["plain"]()
    scores = {node.name: np.ones(graph.weight(node).shape[0]) for node in graph.layers()}
    scores["conv1"] = bad
    with pytest.raises(UsageError, match="'conv1'"):
        rank(graph, number_channels(graph), scores, floors(graph, 0))
