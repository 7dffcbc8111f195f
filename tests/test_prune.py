"""Channels cut and made up for: against numpy's least squares, where nothing is lost, and as far as was asked."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecomp import reference
from edgecomp.channels import floors, parse_pruning, rank
from edgecomp.cli import main
from edgecomp.compress import cut
from edgecomp.errors import DataError, UsageError
from edgecomp.graph import Graph, Op
from edgecomp.groups import number_channels
from edgecomp.pytorch.prune import compensate, prune, prune_as_asked, with_biases
from edgecomp.pytorch.relevance import score, score_channels
from edgecomp.pytorch.scores import Score, Scorer
from tests.graphs import GRAPHS, Build, dense, images, multiplied
from tests.soak_graphs import random_graph, random_keep
from tests.tiny import Place

ALL = {**GRAPHS, "multiplied": multiplied, "dense": dense}


def flags(graph: Graph, drop: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[bool, ...]]:
    return {
        node.name: tuple(i not in drop.get(node.name, ()) for i in range(graph.weight(node).shape[0]))
        for node in graph.layers()
    }


def with_data(graph: Graph, changes: Mapping[str, np.ndarray]) -> Graph:
    tensors = dict(graph.tensors)
    for name, data in changes.items():
        tensors[name] = replace(tensors[name], data=data.astype(np.float32))
    return replace(graph, tensors=tensors)


def answers(graph: Graph, x: np.ndarray) -> np.ndarray:
    return reference.run(graph, {"input": x.astype(np.float64)})[graph.outputs[0]]


def magnitude(graph: Graph) -> dict[str, np.ndarray]:
    found = {}
    for node in graph.layers():
        data = graph.weight(node).data
        assert data is not None
        found[node.name] = np.abs(data.astype(np.float64)).reshape(len(data), -1).mean(axis=1)
    return found


# ---- the solution ----------------------------------------------------------------------------------------------------


def test_a_linear_layer_is_solved_as_numpy_does() -> None:
    """Ordinary least squares with an intercept, by numpy's SVD."""
    b = Build(0, (1, 3, 3))
    x = b.clip("relu", b.linear("first", b.node(Op.FLATTEN, "flatten", ("input",), {}), 7))
    graph = b.graph(b.linear("second", x, 4))
    data = images(graph, 300)
    keep = flags(graph, {"first": (1, 4)})
    smaller = compensate(graph, cut(graph, keep), keep, [data[:200], data[200:]], damping=1e-7)
    values = reference.run(graph, {"input": data.astype(np.float64)})
    inputs = np.delete(values["relu"], (1, 4), axis=1)
    want, *_ = np.linalg.lstsq(np.column_stack([inputs, np.ones(len(inputs))]), values["second"], rcond=None)
    np.testing.assert_allclose(smaller.tensors["second.weight"].data, want[:-1].T, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(smaller.tensors["second.bias"].data, want[-1], rtol=1e-3, atol=1e-4)
    assert smaller.tensors["first.weight"].shape == (5, 9)


def test_a_convolution_is_solved_as_numpy_does() -> None:
    """The patches are cut out by hand, padding and stride included."""
    b = Build(1, (2, 5, 5))
    x = b.clip("relu", b.conv("first", "input", 4))
    graph = b.graph(b.conv("second", x, 3, (2, 3), stride=(2, 1), pads=(1, 0, 0, 1), bias=False))
    data = images(graph, 60)
    keep = flags(graph, {"first": (2,)})
    smaller = compensate(graph, cut(graph, keep), keep, [data], damping=1e-7)
    values = reference.run(graph, {"input": data.astype(np.float64)})
    padded = np.pad(np.delete(values["relu"], 2, axis=1), ((0, 0), (0, 0), (1, 0), (0, 1)))
    rows, columns = values["second"].shape[2:]
    patches = np.array([
        padded[n, :, 2 * i : 2 * i + 2, j : j + 3].reshape(-1)
        for n in range(60) for i in range(rows) for j in range(columns)
    ])  # fmt: skip
    targets = values["second"].transpose(0, 2, 3, 1).reshape(-1, 3)
    want, *_ = np.linalg.lstsq(np.column_stack([patches, np.ones(len(patches))]), targets, rcond=None)
    found = smaller.tensors["second.weight"].data
    assert found is not None
    np.testing.assert_allclose(found.reshape(3, -1), want[:-1].T, rtol=2e-3, atol=1e-3)
    bias = smaller.bias(smaller.layers()[1])
    assert bias is not None
    np.testing.assert_allclose(bias.data, want[-1], rtol=2e-3, atol=1e-3)


def test_damping_draws_to_the_old_weights() -> None:
    graph = GRAPHS["plain"]()
    keep = flags(graph, {"conv1": (3,)})
    smaller = cut(graph, keep)
    data = images(graph, 20)
    off = []
    for damping in (0.01, 1.0, 1e6):
        solved = compensate(graph, smaller, keep, [data], damping=damping)
        change = solved.tensors["conv2.weight"].data - smaller.tensors["conv2.weight"].data  # type: ignore[operator]
        off.append(float(np.abs(change).mean()))
    assert off[0] > off[1] > off[2]
    assert off[2] < 1e-5


# ---- where nothing is lost -------------------------------------------------------------------------------------------


def sums_of_others(name: str) -> tuple[Graph, dict[str, tuple[bool, ...]]]:
    """A graph one of whose channels is a sum of two others of the same layer, before anything that is not linear."""
    match name:
        case "residual":
            # Both tensors that are added have it, and what is added last as well.
            graph, drop = GRAPHS["residual"](), {n: (4,) for n in ("block.conv2", "block.shortcut", "end.conv")}
        case _:
            graph, drop = GRAPHS["plain"](), {"conv2": (4,)}
    changes = {}
    for node in graph.layers():
        for tensor in (graph.weight(node), graph.bias(node)) if node.name in drop else ():
            if tensor is not None and tensor.data is not None:
                data = tensor.data.copy()
                # Twins: the ReLU behind keeps them equal.
                data[4] = 2 * data[0]
                changes[tensor.name] = data
    return with_data(graph, changes), flags(graph, drop)


@pytest.mark.parametrize("name", ["plain", "residual"])
def test_what_others_can_say_is_not_lost(name: str) -> None:
    """The cut channel is twice another one, through ReLU and additions: the answers stay, on new images as well."""
    graph, keep = sums_of_others(name)
    fit, fresh = images(graph, 400), images(graph, 50, seed=9)
    smaller = compensate(graph, cut(graph, keep), keep, [fit], damping=1e-6)
    want = answers(graph, fresh)
    assert np.abs(answers(cut(graph, keep), fresh) - want).max() > 0.1
    np.testing.assert_allclose(answers(smaller, fresh), want, atol=0.01 * np.abs(want).max())


def test_sums_of_several_before_a_linear_reader() -> None:
    b = Build(2, (2, 6, 6))
    x = b.max_pool("pool", b.conv("first", b.clip("relu", b.conv("stem", "input", 5)), 6), (1, 1), stride=(1, 1))
    graph = b.graph(b.conv("second", x, 4, pads=(0, 0, 0, 0)))
    weight, bias = graph.tensors["first.weight"].data, graph.tensors["first.bias"].data
    assert weight is not None
    assert bias is not None
    weight, bias = weight.copy(), bias.copy()
    weight[2] = weight[0] - 0.5 * weight[5]
    bias[2] = 3.0  # the constant part goes into the reader's bias
    graph = with_data(graph, {"first.weight": weight, "first.bias": bias})
    keep = flags(graph, {"first": (2,)})
    smaller = compensate(graph, cut(graph, keep), keep, [images(graph, 200)], damping=1e-7)
    fresh = images(graph, 20, seed=5)
    np.testing.assert_allclose(answers(smaller, fresh), answers(graph, fresh), rtol=1e-3, atol=2e-3)


def test_a_constant_channel_goes_into_the_biases() -> None:
    """Even where the reader had none, and through a depthwise convolution that is not solved."""
    b = Build(3, (2, 6, 6))
    x = b.conv("dw", b.clip("relu", b.conv("stem", "input", 5)), 5, groups=5, pads=(0, 0, 0, 0))
    graph = b.graph(b.conv("last", x, 3, bias=False, pads=(0, 0, 0, 0)))
    weight, bias = np.array(graph.tensors["stem.weight"].data), np.array(graph.tensors["stem.bias"].data)
    weight[3], bias[3] = 0, 2.5
    graph = with_data(graph, {"stem.weight": weight, "stem.bias": bias})
    keep = flags(graph, {"stem": (3,), "dw": (3,)})
    smaller = compensate(graph, cut(graph, keep), keep, [images(graph, 64)])
    fresh = images(graph, 20, seed=5)
    np.testing.assert_allclose(answers(smaller, fresh), answers(graph, fresh), rtol=1e-4, atol=1e-4)


def test_depthwise_biases_take_the_mean_error() -> None:
    graph = GRAPHS["separable"]()
    keep = flags(graph, {"expand": (0, 5, 9), "dw": (0, 5, 9)})
    data = images(graph, 64)
    smaller = compensate(graph, cut(graph, keep), keep, [data])
    want, got = (reference.run(g, {"input": data.astype(np.float64)}) for g in (graph, smaller))
    np.testing.assert_allclose(got["grouped"].mean(axis=(0, 2, 3)), want["grouped"].mean(axis=(0, 2, 3)), atol=1e-4)
    before = reference.run(cut(graph, keep), {"input": data.astype(np.float64)})
    assert np.square(got["fc"] - want["fc"]).sum() < 0.5 * np.square(before["fc"] - want["fc"]).sum()
    assert np.array_equal(got["dw"], before["dw"])


@pytest.mark.parametrize("seed", range(30))
def test_random_networks_keep_their_shapes_and_gain(seed: int) -> None:
    """Cut at random; what stands before the first cut channel's readers is as `cut` left it, nothing is not finite."""
    rng = np.random.default_rng(seed)
    graph = random_graph(rng)
    keep = random_keep(rng, graph)
    data = rng.standard_normal((24, *graph.tensors["input"].shape[1:])).astype(np.float32)
    small = cut(graph, keep)
    solved = compensate(graph, small, keep, [data[:16], data[16:]])
    assert [n.name for n in solved.nodes] == [n.name for n in graph.nodes]
    for node, other in zip(small.layers(), solved.layers(), strict=True):
        assert solved.weight(other).shape == small.weight(node).shape
        assert np.isfinite(np.asarray(solved.weight(other).data)).all()
    if small is graph:
        np.testing.assert_array_equal(answers(solved, data), answers(graph, data))
    last = graph.nodes[-1]
    if last.op in (Op.CONV2D, Op.LINEAR):
        # Ridge regression never fits the images it was given worse than what it starts from, were inputs the same;
        # the last layer's bias alone makes its mean error vanish.
        off = answers(solved, data) - answers(graph, data)
        axes = (0, *range(2, off.ndim))
        scale = 1 + float(np.abs(answers(graph, data)).max())
        assert np.abs(off.mean(axis=axes)).max() < 1e-3 * scale


# ---- slice by slice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_as_many_weights_go_as_asked(name: str) -> None:
    graph = ALL[name]()
    shares = (0.2, 0.4)
    total = sum(np.asarray(graph.weight(n).data).size for n in graph.layers())
    steps: list[int] = []
    found = list(prune(graph, [images(graph, 32)], shares=shares, criterion=magnitude, progress=steps.append))
    assert steps == [1, 1]
    before = {node.name: np.ones(graph.weight(node).shape[0], dtype=bool) for node in graph.layers()}
    for share, (smaller, keep) in zip(shares, found, strict=True):
        left = sum(np.asarray(smaller.weight(n).data).size for n in smaller.layers())
        stuck = not rank(smaller, number_channels(smaller), magnitude(smaller), floors(smaller, 1 / 8))
        assert left <= (1 - share) * total + 1 or stuck or name in ("separable", "multiplied")
        for node in smaller.layers():
            assert smaller.weight(node).shape[0] == sum(keep[node.name])
            assert (before[node.name] | ~np.array(keep[node.name])).all(), "what is gone stays gone"
            before[node.name] = np.array(keep[node.name])
    assert found[-1][0].digest() == list(prune(
        graph, [images(graph, 32)], shares=shares, criterion=magnitude
    ))[-1][0].digest()  # fmt: skip


def test_channels_are_scored_anew_for_each_smaller_network() -> None:
    graph = GRAPHS["plain"]()
    seen: list[Graph] = []

    def criterion(g: Graph) -> dict[str, np.ndarray]:
        seen.append(g)
        return magnitude(g)

    found = [g for g, _ in prune(graph, [images(graph, 32)], shares=(0.2, 0.4, 0.6), criterion=criterion)]
    assert seen == [graph, *found[:2]]
    for a, b in itertools.pairwise([graph, *found]):
        assert b.tensors["fc1.weight"].shape <= a.tensors["fc1.weight"].shape


def test_without_compensation_it_is_a_cut() -> None:
    graph = GRAPHS["residual"]()
    ((smaller, keep),) = prune(graph, [images(graph, 8)], shares=(0.5,), criterion=magnitude, compensation=False)
    assert smaller.digest() == cut(graph, keep).digest()


def test_bad_arguments() -> None:
    graph = GRAPHS["plain"]()
    with pytest.raises(DataError, match="no images to compensate with"):
        compensate(graph, graph, flags(graph, {}), [])
    with pytest.raises(UsageError, match="floor 2"):
        next(prune(graph, [images(graph, 4)], shares=(0.1,), criterion=magnitude, floor=2))


def test_biases_of_zero_change_nothing() -> None:
    graph = with_biases(GRAPHS["residual"]())
    assert all(graph.bias(node) is not None for node in graph.layers())
    x = images(graph, 3)
    np.testing.assert_array_equal(answers(graph, x), answers(GRAPHS["residual"](), x))


# ---- the short form of relevance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, np.array([0, 2, 1, 0.5, *[0] * 6])])
def test_channel_scores_are_those_of_the_whole_relevance(weights: np.ndarray | None) -> None:
    graph = GRAPHS["residual"]()
    labels = np.arange(20) % 10
    batches = [(images(graph, 12), labels[:12]), (images(graph, 8, seed=2), labels[12:])]
    whole = score(graph, batches, class_weights=weights)
    short = score_channels(graph, batches, class_weights=weights)
    assert short.keys() == whole.layers.keys()
    for name, found in short.items():
        np.testing.assert_allclose(found, whole.layers[name].channel_abs, rtol=1e-6)
    with pytest.raises(DataError, match="no images to explain"):
        score_channels(graph, [])


# ---- as --prune asks -------------------------------------------------------------------------------------------------


def scorer(graph: Graph, kind: Score = Score.LRP) -> Scorer:
    return Scorer(kind=kind, batches=[(images(graph, 30), np.arange(30) % 10)])


@pytest.mark.parametrize("kind", Score)
def test_every_score_ranks_channels_as_its_relevance_does(kind: Score) -> None:
    graph = GRAPHS["plain"]()
    found = scorer(graph, kind).channels(graph)
    whole = scorer(graph, kind).relevance(graph)
    for name, layer in whole.layers.items():
        np.testing.assert_allclose(found[name], layer.channel_abs, rtol=1e-5)


def test_policies() -> None:
    graph = GRAPHS["plain"]()
    asked = scorer(graph)
    assert prune_as_asked(graph, parse_pruning("zero"), asked) is graph
    signed = asked.relevance(graph).layers
    smaller = prune_as_asked(graph, parse_pruning("nonpositive"), asked, compensation=False)
    for name in ("conv1", "conv2", "fc1"):
        want = graph.tensors[f"{name}.bias"].data[signed[name].channel > 0]  # type: ignore[index]
        np.testing.assert_array_equal(smaller.tensors[f"{name}.bias"].data, want)  # type: ignore[arg-type]
    sizes: list[int] = []

    def within(g: Graph) -> bool:
        sizes.append(g.tensors["fc1.weight"].data.size)  # type: ignore[union-attr]
        return len(sizes) < 3

    last = prune_as_asked(graph, parse_pruning("auto"), asked, within=within)
    assert len(sizes) == 3
    assert last.tensors["fc1.weight"].data.size == sizes[1] >= sizes[2]  # type: ignore[union-attr]
    half = prune_as_asked(graph, parse_pruning("0.5"), asked)
    left, total = (sum(np.asarray(g.weight(n).data).size for n in g.layers()) for g in (half, graph))
    assert 0.4 * total < left <= 0.5 * total


@pytest.mark.parametrize("text", ["1", "-0.1", "half", "nan", "smallest", ""])
def test_prunings_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="expected zero, nonpositive, auto, or a share"):
        parse_pruning(text)


def built(place: Place, *arguments: str) -> dict[str, Any]:
    shutil.rmtree(place.folder / "out", ignore_errors=True)
    assert main([*place.command(), *arguments]) == 0
    found: dict[str, Any] = json.loads((place.folder / "out" / "manifest.json").read_text())
    return found


def test_through_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, monkeypatch)
    found = built(place, "--prune", "0.5", "--avg-bits", "8", "--classes", "0,3")
    before, left = (sum(layer[key] for layer in found["layers"]) for key in ("weights_before", "weights"))
    assert before == 8 * 9 + 8 * 8 * 9 + 4 * 128
    # A share of what the network for two classes has.
    assert left <= 0.5 * (before - 2 * 128)
    assert [layer["channels_before"] for layer in found["layers"]] == [8, 8, 4]
    assert found["artifacts"][0]["accuracy"]["value"] > 95
    assert main(["verify", "out"]) == 0
    auto = built(place, "--prune", "auto", "--max-drop", "4", "--format", "onnx")
    assert auto["budget"]["met"]
    assert sum(layer["weights"] for layer in auto["layers"]) < before
    built(place, "--prune", "nonpositive", "--no-reconstruct", "--format", "onnx", "--avg-bits", "8")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [(["--prune", "1"], "a share from 0 to below 1"), (["--prune", "auto"], "--prune auto without --max-drop")],
)
def test_bad_prunings_are_one_line(
    arguments: list[str],
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["build", "-o", "out", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert found in error
