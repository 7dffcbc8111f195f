"""Single weights set to zero and made up for: against least squares and brain surgeon in float64, down to the file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgecomp import bundle, quantmath, reference
from edgecomp.channels import parse_pruning
from edgecomp.cli import main
from edgecomp.compress import compress
from edgecomp.graph import Graph
from edgecomp.options import SCORES
from edgecomp.packing import FIELDS, unpack
from edgecomp.plan import CompressionPlan
from edgecomp.pytorch import finetune as tuning
from edgecomp.pytorch.finetune import finetune, split
from edgecomp.pytorch.progress import Settings
from edgecomp.pytorch.rebuild import Layer, Rebuilt
from edgecomp.pytorch.recover import make_up, reconstruct
from edgecomp.pytorch.rounding import Basis, basis, choose_scale, prune_columns, round_columns
from edgecomp.pytorch.scores import Score, Scorer, score_by, worth
from edgecomp.pytorch.sparsify import sparsify
from edgecomp.pytorch.trial import try_grids
from edgecomp.quantmath import Grid
from edgecomp.sparsity import Masks, least_worth, masked, zero_share
from tests.graphs import GRAPHS, images, plain, plan_for
from tests.test_finetune import labelled
from tests.tiny import Place


def inputs_of(d: int, energy: np.ndarray, seed: int = 0) -> tuple[np.ndarray, Basis]:
    """Correlated inputs (n, d) of the given energies, and H with its damping in float64."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((6 * d, d)) @ (np.eye(d) + 0.5 * rng.standard_normal((d, d)) / np.sqrt(d))
    x *= np.sqrt(energy / np.square(x).sum(axis=0))
    h = x.T @ x
    return h + 0.01 * np.diag(h).mean() * np.eye(d), basis(torch.from_numpy(h.astype(np.float32)))


def random_masks(graph: Graph, share: float, seed: int = 0) -> Masks:
    rng = np.random.default_rng(seed)
    return {node.name: rng.random(graph.weight(node).shape) >= share for node in graph.layers()}


# ---- one layer -------------------------------------------------------------------------------------------------------


def test_what_goes_first_is_made_up_for_by_least_squares() -> None:
    """Masked columns have the most energy: all others are still free, so the solution is the best there is."""
    d, gone = 30, 12
    h, inputs = inputs_of(d, np.where(np.arange(d) < gone, 5.0, 1.0) + 0.01 * np.arange(d)[::-1])
    weight = np.random.default_rng(1).standard_normal((1, d))
    mask = np.arange(d)[None] >= gone
    found = prune_columns(torch.from_numpy(weight.astype(np.float32)), inputs, torch.from_numpy(mask)).numpy()
    # min (w' - w) H (w' - w)^T with w' = 0 where masked.
    free = mask[0]
    wanted = np.zeros(d)
    wanted[free] = weight[0, free] + np.linalg.solve(h[np.ix_(free, free)], h[np.ix_(free, ~free)] @ weight[0, ~free])
    np.testing.assert_allclose(found[0], wanted, rtol=1e-3, atol=1e-4)
    assert np.abs(found[0, free] - weight[0, free]).max() > 0.1


def test_what_goes_last_is_made_up_for_by_nobody() -> None:
    d, gone = 30, 12
    _, inputs = inputs_of(d, np.where(np.arange(d) >= d - gone, 1.0, 5.0) + 0.01 * np.arange(d)[::-1])
    weight = np.random.default_rng(1).standard_normal((3, d)).astype(np.float32)
    mask = np.broadcast_to(np.arange(d) < d - gone, weight.shape)
    found = prune_columns(torch.from_numpy(weight.copy()), inputs, torch.from_numpy(mask.copy()))
    np.testing.assert_array_equal(found.numpy(), np.where(mask, weight, 0))


def masked_brain_surgeon(
    weight: np.ndarray, h: np.ndarray, scale: np.ndarray, limit: int, mask: np.ndarray
) -> np.ndarray:
    """Round or zero column by column, in falling order of energy, by elimination in H's inverse; float64."""
    rows, inverse = weight.astype(np.float64).copy(), np.linalg.inv(h)
    left = list(np.argsort(-np.diag(h), kind="stable"))
    while left:
        q = left.pop(0)
        value = np.where(mask[:, q], np.clip(np.rint(rows[:, q] / scale), -limit, limit) * scale, 0.0)
        rows[:, left] -= np.outer((rows[:, q] - value) / inverse[q, q], inverse[q, left])
        rows[:, q] = value
        inverse = inverse - np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return rows


@pytest.mark.parametrize(("d", "bits"), [(20, 3), (150, 4), (90, 8)])
def test_rounding_with_a_mask_is_optimal_brain_surgeon(d: int, bits: int) -> None:
    rng = np.random.default_rng(d)
    h, inputs = inputs_of(d, rng.uniform(1, 3, d), seed=d)
    weight, mask = rng.standard_normal((7, d)).astype(np.float32), rng.random((7, d)) < 0.4
    steps = choose_scale(torch.from_numpy(weight * mask), inputs.energy, bits)
    rounded = round_columns(torch.from_numpy(weight.copy()), inputs, steps, bits, torch.from_numpy(mask))
    found = rounded.codes * rounded.scale[:, None]
    wanted = masked_brain_surgeon(weight, h, steps.numpy(), quantmath.weight_limit(bits), mask)
    # As without a mask: a column within rounding of a tie may go the other way, and what follows with it.
    assert (np.abs(found - wanted).max(axis=1) < 1e-4).sum() >= 6
    assert not rounded.codes[~mask].any()
    off = (found - weight).astype(np.float64)
    np.testing.assert_allclose(rounded.error, np.einsum("oi,ij,oj->o", off, h, off), rtol=1e-3)
    # Better than to round first and to mask then.
    dense = round_columns(torch.from_numpy(weight.copy()), inputs, steps, bits)
    after = dense.codes * dense.scale[:, None] * mask - weight
    assert rounded.error.sum() < 0.97 * np.einsum("oi,ij,oj->", after, h, after)


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("bits", [3, 8])
def test_masks_survive_reconstruction_down_to_the_codes(name: str, bits: int) -> None:
    graph = GRAPHS[name]()
    masks, plan, x = random_masks(graph, 0.5), plan_for(graph, bits), images(graph, 64, seed=3)
    grids = {node.name: Grid(bits=bits) for node in graph.layers()}
    found = reconstruct(graph, plan.ranges, grids, [x[:20], x[20:]], masks=masks)
    quantized = compress(found, replace(plan, graph_digest=found.digest()))
    for node in graph.layers():
        codes, values = quantized.weight(node).data, found.weight(node).data
        assert codes is not None
        assert values is not None
        assert not codes[~masks[node.name]].any()
        assert not values[~masks[node.name]].any()
        assert np.count_nonzero(values[masks[node.name]]) > 0.3 * masks[node.name].sum()


@pytest.mark.parametrize("bits", [3, 8])
def test_rounding_and_masking_at_once_come_nearer_to_the_float_network(bits: int) -> None:
    """On images it has not seen; and twice the same."""
    graph = plain()
    masks, plan, x = random_masks(graph, 0.5), plan_for(graph, bits), images(graph, 96, seed=3)
    grids = {node.name: Grid(bits=bits) for node in graph.layers()}
    found = [reconstruct(graph, plan.ranges, grids, [x[:40], x[40:]], masks=masks) for _ in range(2)]
    assert found[0].digest() == found[1].digest()
    fresh = images(graph, 64, seed=9)
    wanted = reference.run(graph, {"input": fresh})[graph.outputs[0]]

    def error(g: Graph) -> float:
        quantized = compress(g, replace(plan, graph_digest=g.digest()))
        return float(np.square(reference.run(quantized, {"input": fresh})[quantized.outputs[0]] - wanted).mean())

    assert error(found[0]) < 0.8 * error(masked(graph, masks))


def test_zeros_by_accident_are_not_masks() -> None:
    """A weight that happens to be 0 in a layer without a mask makes up for others like any."""
    graph = plain()
    name = "fc1.weight"
    data = np.array(graph.tensors[name].data)
    chance = np.random.default_rng(0).random(data.shape) < 0.5
    data[chance] = 0
    graph = replace(graph, tensors={**graph.tensors, name: replace(graph.tensors[name], data=data)})
    x, plan = images(graph, 96, seed=3), plan_for(graph, 4)
    grids = {node.name: Grid(bits=4) for node in graph.layers()}
    masks = {"conv2": random_masks(graph, 0.5)["conv2"]}
    found = reconstruct(graph, plan.ranges, grids, [x], masks=masks)
    assert np.count_nonzero(np.asarray(found.tensors[name].data)[chance]) > 0
    assert not np.asarray(found.tensors["conv2.weight"].data)[~masks["conv2"]].any()


@pytest.mark.parametrize("name", GRAPHS)
def test_what_remains_makes_up_for_what_went(name: str) -> None:
    """On images it has not seen; without masks nothing changes."""
    graph = GRAPHS[name]()
    masks, x, fresh = random_masks(graph, 0.3), images(graph, 160), images(graph, 32, seed=9)
    wanted = reference.run(graph, {"input": fresh})[graph.outputs[0]]
    found = make_up(graph, masks, [x[:60], x[60:]])
    off = [
        float(np.square(reference.run(g, {"input": fresh})[g.outputs[0]] - wanted).sum())
        for g in (masked(graph, masks), found)
    ]
    assert off[1] < 0.75 * off[0]
    same = make_up(graph, {}, [x[:20]])
    for node in graph.layers():
        assert not np.asarray(found.weight(node).data)[~masks[node.name]].any()
        np.testing.assert_array_equal(same.weight(node).data, graph.weight(node).data)


def test_trials_count_what_masks_cost() -> None:
    graph = plain()
    x, masks = images(graph, 64), random_masks(graph, 0.6)
    dense = try_grids(graph, [x], ["onnx"])
    sparse = try_grids(graph, [x], ["onnx"], masks=masks)
    for node in graph.layers():
        for counts in sparse[node.name].counts.values():
            assert counts[128] >= 0.99 * (~masks[node.name]).sum()
            assert counts.sum() == pytest.approx(masks[node.name].size)
        finest = Grid(bits=8)
        assert sparse[node.name].errors[finest].sum() > 10 * dense[node.name].errors[finest].sum()


# ---- which weights ---------------------------------------------------------------------------------------------------


def scorer(graph: Graph, kind: Score = Score.LRP) -> Scorer:
    return Scorer(kind=kind, batches=[(images(graph, 30), np.arange(30) % 10)])


@pytest.mark.parametrize("kind", Score)
def test_every_score_says_what_weights_are_worth(kind: Score) -> None:
    graph = plain()
    found = scorer(graph, kind).weights(graph)
    weight = np.asarray(graph.tensors["conv2.weight"].data)
    assert found["conv2"].shape == weight.shape
    assert (found["conv2"] >= 0).all()
    masks = sparsify(graph, parse_pruning("0.5"), scorer(graph, kind))
    assert zero_share(masks, graph) == pytest.approx(0.5, abs=0.001)
    if kind is Score.MAGNITUDE:
        np.testing.assert_array_equal(found["conv2"], np.abs(weight))
    if kind is Score.RANDOM:
        again = replace(scorer(graph, kind), seed=1).weights(graph)
        assert np.corrcoef(found["conv2"].ravel(), again["conv2"].ravel())[0, 1] < 0.2
        assert np.corrcoef(found["conv2"].ravel(), np.abs(weight).ravel())[0, 1] < 0.2


def test_lrp_and_hessian_rank_by_the_second_order_cost() -> None:
    """E[(R_w)^2], image by image, in a layer that is read once: tempered for LRP, plain for the Hessian."""
    graph = plain()
    x, labels = images(graph, 12), np.arange(12) % 10
    weight = np.abs(np.asarray(graph.tensors["fc1.weight"].data).astype(np.float64))
    found = score_by(Score.LRP, graph, [(x, labels)])
    squares = [np.square(score_by(Score.LRP, graph, [(x[i : i + 1], labels[i : i + 1])]).layers["fc1"].weight)
               for i in range(12)]  # fmt: skip
    wanted = weight ** (3 / 4) * np.mean(squares, axis=0, dtype=np.float64) ** (1 / 8)
    np.testing.assert_allclose(worth(Score.LRP, graph, found)["fc1"], wanted, rtol=2e-3, atol=1e-7)
    curved = score_by(Score.HESSIAN, graph, [(x, labels)])
    wanted = np.square(weight) * curved.layers["fc1"].weight_cost
    np.testing.assert_allclose(worth(Score.HESSIAN, graph, curved)["fc1"], wanted, rtol=1e-5)


def test_policies() -> None:
    graph = plain()
    asked = scorer(graph)
    layers = asked.relevance(graph).layers
    signed = sparsify(graph, parse_pruning("nonpositive"), asked, floor=0)
    for name, layer in layers.items():
        np.testing.assert_array_equal(signed[name], layer.weight > 0)
    # A channel of conv1 that is never active: nothing flows through what reads it, nor through itself.
    bias = np.array(graph.tensors["conv1.bias"].data)
    bias[2] = -1e3
    silent = replace(
        graph, tensors={**graph.tensors, "conv1.bias": replace(graph.tensors["conv1.bias"], data=bias)}
    )
    zero = sparsify(silent, parse_pruning("zero"), scorer(silent))
    assert not zero["conv1"][2].any()
    assert not zero["conv2"][:, 2].any()
    assert zero["fc2"].mean() > 0.5
    x = images(graph, 30)
    # Relevance starts at the true class's output: that stays, but where a pool or a ReLU now has another winner.
    before, after = (
        reference.run(g, {"input": x})["fc2"][np.arange(30), np.arange(30) % 10] for g in (silent, masked(silent, zero))
    )
    assert np.isclose(after, before, rtol=1e-4, atol=1e-4).sum() >= 27


def test_weights_are_scored_anew_after_each_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = plain()
    seen: list[Graph] = []
    real = Scorer.weights

    def watched(self: Scorer, g: Graph) -> dict[str, np.ndarray]:
        seen.append(g)
        return real(self, g)

    monkeypatch.setattr(Scorer, "weights", watched)
    steps: list[int] = []
    asked, kind = parse_pruning("0.8"), scorer(graph)
    masks = sparsify(graph, asked, kind, progress=steps.append)
    shares = asked.slices()
    assert len(seen) == len(steps) == len(shares) == 4
    total = sum(mask.size for mask in masks.values())
    wanted: Masks = {}
    for number, share in enumerate(shares):
        assert seen[number].digest() == (make_up(graph, wanted, [kind.batches[0][0]]) if wanted else graph).digest()
        wanted = least_worth(graph, real(kind, seen[number]), wanted, round((1 - share) * total))
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask, wanted[name])
        assert mask.sum() >= np.ceil(0.01 * mask.size)
    plain_way = sparsify(graph, asked, kind, compensation=False)
    assert seen[-1].digest() == masked(graph, {n: seen[-1].weight(node).data != 0 for n, node in
                                               ((node.name, node) for node in graph.layers())}).digest()  # fmt: skip
    assert zero_share(plain_way, graph) == pytest.approx(0.8, abs=0.001)


def test_auto_stops_where_too_much_is_lost() -> None:
    graph = plain()
    shares: list[float] = []

    def within(sparse: Graph) -> bool:
        data = [np.asarray(sparse.weight(node).data) for node in sparse.layers()]
        shares.append(sum(int((d == 0).sum()) for d in data) / sum(d.size for d in data))
        return len(shares) < 3

    masks = sparsify(graph, parse_pruning("auto"), scorer(graph), within=within)
    assert len(shares) == 3
    assert shares == sorted(shares)
    assert zero_share(masks, graph) == pytest.approx(shares[1])
    assert sparsify(graph, parse_pruning("auto"), scorer(graph), within=lambda g: False) == {}


# ---- recovery --------------------------------------------------------------------------------------------------------


def test_fine_tuning_leaves_masked_weights_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_WEIGHT_RATE", 0.05)  # few updates, each goes further
    graph = plain()
    masks, x, plan = random_masks(graph, 0.6), images(graph, 96, seed=3), plan_for(graph, 4)
    plan = replace(plan, layers={**plan.layers, "conv1": replace(
        plan.layers["conv1"], keep=(False,) + (True,) * 7
    )})  # fmt: skip
    grids = {node.name: Grid(bits=4) for node in graph.layers()}
    found = reconstruct(graph, plan.ranges, grids, [x], masks=masks)
    plan = replace(plan, graph_digest=found.digest())
    train, held_out = split(labelled(graph, 512), seed=0)

    def tuned(masks: Masks, where: str) -> Graph:
        settings = Settings(epochs=2, seed=0, room=None)
        return finetune(
            graph, graph, found, plan, train, held_out,
            settings=settings, checkpoint=tmp_path / where, masks=masks,
        ).graph  # fmt: skip

    with_masks, without = tuned(masks, "with"), tuned({}, "without")
    moved, back = 0, 0
    for node in graph.layers():
        mask = masks[node.name]
        after = np.asarray(with_masks.weight(node).data)
        assert not after[~mask].any()
        moved += int((after != np.asarray(found.weight(node).data)).sum())
        back += np.count_nonzero(np.asarray(without.weight(node).data)[~mask])
    assert moved > 100
    assert back > 10, "without the masks training would have filled them"
    codes = compress(with_masks, replace(plan, graph_digest=with_masks.digest()))
    assert not np.asarray(codes.tensors["fc1.weight"].data)[~masks["fc1"]].any()
    module = Rebuilt(found, plan, original=graph, masks=masks)
    layer = module.layer("conv2")
    assert isinstance(layer, Layer)
    assert layer.mask is not None
    assert layer.mask.shape == (12, 7, 3, 3), "masks are cut as the channels of their layer are"
    with torch.no_grad():
        layer.latent.add_(3.0)
    assert not layer.codes()[~layer.mask].any()
    assert not layer.weight()[~layer.mask].any()


def test_a_checkpoint_of_other_masks_is_refused(tmp_path: Path) -> None:
    from edgecomp.errors import UsageError

    graph, plan = plain(), plan_for(plain(), 4)
    train, held_out = split(labelled(graph, 128), seed=0)
    for masks in ({}, random_masks(graph, 0.5)):
        sparse = masked(graph, random_masks(graph, 0.5))
        arguments = (graph, graph, sparse, replace(plan, graph_digest=sparse.digest()), train, held_out)
        settings = Settings(epochs=1, seed=0, room=1.0)
        options: dict[str, Any] = {"settings": settings, "checkpoint": tmp_path / "c", "masks": masks}
        if not masks:
            finetune(*arguments, **options)
            continue
        with pytest.raises(UsageError, match="something else: masks was"):
            finetune(*arguments, **options)


# ---- through the command line ----------------------------------------------------------------------------------------


def built(place: Place, *arguments: str, code: int = 0) -> dict[str, Any]:
    shutil.rmtree(place.folder / "out", ignore_errors=True)
    assert main([*place.command(), *arguments]) == code
    found: dict[str, Any] = json.loads((place.folder / "out" / "manifest.json").read_text())
    return found


def codes_in(file: Path, graph: Graph) -> dict[str, np.ndarray]:
    """The weights of an ONNX file, read by the onnx package and unpacked."""
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(file)).graph.initializer}
    found = {}
    for node in graph.layers():
        name, weight = f"{node.name}.weight", graph.weight(node)
        if name in stored:
            found[node.name] = stored[name]
            continue
        n_fields = sum(key.startswith(f"{name}.") and key.removeprefix(f"{name}.").isdigit() for key in stored)
        bits = next(b for b, fields in FIELDS.items() if len(fields) == n_fields and weight.quant is not None
                    and weight.quant.bits == b)  # fmt: skip
        fields = tuple(stored[f"{name}.{i}"].reshape(-1) for i in range(n_fields))
        found[node.name] = unpack(fields, bits, int(np.prod(weight.shape))).reshape(weight.shape)
    return found


@pytest.mark.parametrize("more", [(), ("--no-reconstruct",), ("--recover", "2")])
def test_zeros_stand_in_the_file(more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, monkeypatch)
    options = ("--sparsify", "0.7", "--avg-bits", "8", "--format", "onnx", *more)
    record = built(place, *options)
    out = place.folder / "out"
    plan, graph = CompressionPlan.from_json((out / "plan.json").read_text()), bundle.load(out / "graph.edgecomp")
    assert plan.made_by["sparsifying"] == "0.7: 70.00 % of the weights are 0"
    codes = codes_in(out / "model.onnx", compress(graph, plan))
    zeros, total = sum(int((c == 0).sum()) for c in codes.values()), sum(c.size for c in codes.values())
    assert zeros >= 0.69 * total
    assert [layer["zero_percent"] for layer in record["layers"]] == [
        pytest.approx(100 * float((codes[layer["name"]] == 0).mean()), abs=0.001) for layer in record["layers"]
    ]
    if "--no-reconstruct" not in more:
        assert record["artifacts"][0]["accuracy"]["value"] > 95
    assert main(["verify", "out"]) == 0
    first = (out / "model.onnx").read_bytes()
    built(place, *options)
    assert (out / "model.onnx").read_bytes() == first


@pytest.mark.parametrize("score", SCORES)
def test_every_score_builds(score: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = built(Place(tmp_path, monkeypatch), "--sparsify", "0.5", "--score", score, "--format", "onnx")
    n = [(layer["weights"], layer["zero_percent"]) for layer in record["layers"]]
    assert sum(w * z for w, z in n) / sum(w for w, _ in n) >= 49


def test_auto_and_the_other_policies_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, monkeypatch)
    auto = built(place, "--sparsify", "auto", "--max-drop", "8", "--format", "onnx", "--prune", "auto")
    assert auto["budget"]["met"]
    assert max(layer["zero_percent"] for layer in auto["layers"]) > 30
    for policy in ("zero", "nonpositive"):
        built(place, "--sparsify", policy, "--avg-bits", "8")
        made_by = json.loads((place.folder / "out" / "plan.json").read_text())["made_by"]
        assert made_by["sparsifying"].startswith(f"{policy}: ")
        assert f"{policy}: " in (place.folder / "out" / "README.md").read_text()
    built(place)
    assert json.loads((place.folder / "out" / "plan.json").read_text())["made_by"]["sparsifying"] == "none"


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--sparsify", "1"], "--sparsify '1': expected zero, nonpositive, auto, or a share from 0 to below 1"),
        (["--sparsify", "-0.1"], "--sparsify '-0.1'"),
        (["--sparsify", "foo"], "--sparsify 'foo'"),
        (["--sparsify", "auto"], "--sparsify auto without --max-drop"),
    ],
)
def test_bad_input_is_one_line(
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
    assert not (tmp_path / "out").exists()
