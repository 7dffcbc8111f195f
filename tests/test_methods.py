"""The papers' recipes: ladders against their formula, budgets against every rung, and what builds say of them."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp import bundle, methods, options
from edgecomp.benchmarks.compression.context import Context, Subject
from edgecomp.benchmarks.compression.ours import OURS
from edgecomp.channels import parse_pruning
from edgecomp.cli import main
from edgecomp.errors import BudgetError, UsageError
from edgecomp.graph import Graph
from edgecomp.methods import LRP, OPEN, PAPERS, WIDTHS, Scoring, check_method
from edgecomp.plan import CompressionPlan, LayerRelevance, Relevance
from edgecomp.planner import highest_rung, ladder, layer_scores
from edgecomp.preprocessing import Preprocessing
from edgecomp.pytorch.capture import capture
from edgecomp.pytorch.load import load_module
from edgecomp.pytorch.relevance import score
from edgecomp.quantmath import Grid
from edgecomp.spending import Budget, BudgetKind, Candidate, largest_file, least_mean_bits, spend_on_ladder
from tests.graphs import plain, plan_for
from tests.tiny import Place

often = settings(derandomize=True, deadline=None, max_examples=200)
scores = st.dictionaries(
    st.sampled_from("abcdef"), st.one_of(st.just(0.0), st.floats(1e-12, 1e12)), min_size=1, max_size=6
)
widths = st.sets(st.integers(2, 8), min_size=1).map(sorted)


def bits_of(rung: Mapping[str, Grid]) -> dict[str, int]:
    return {name: grid.bits for name, grid in rung.items()}


# ---- ladders ---------------------------------------------------------------------------------------------------------


@given(scores=scores, widths=widths)
@often
def test_higher_scores_get_more_bits_on_every_rung(scores: dict[str, float], widths: list[int]) -> None:
    rungs = ladder(scores, widths)
    for rung in rungs:
        for a, b in itertools.permutations(scores, 2):
            assert scores[a] < scores[b] or rung[a].bits >= rung[b].bits
            assert scores[a] != scores[b] or rung[a] == rung[b]
    for below, above in itertools.pairwise(map(bits_of, rungs)):
        assert below != above
        assert all(below[name] <= above[name] for name in scores)
    assert set(bits_of(rungs[0]).values()) == {widths[0]}
    assert bits_of(rungs[-1]) == {name: widths[-1] if s > 0 else widths[0] for name, s in scores.items()}


@given(scores=scores, widths=widths, level=st.floats(-60, 60))
@often
def test_every_level_is_a_rung(scores: dict[str, float], widths: list[int], level: float) -> None:
    """Nearest to c + log2(score) / 2, of two as near the larger."""
    wanted = {}
    for name, s in scores.items():
        height = level + math.log2(s) / 2 if s > 0 else -math.inf
        wanted[name] = min(widths, key=lambda w: (abs(w - height), -w)) if s > 0 else widths[0]
        if s > 0 and any(abs(height - (a + b) / 2) < 1e-9 for a, b in itertools.pairwise(widths)):
            return  # between two widths rounding decides
    assert wanted in [bits_of(rung) for rung in ladder(scores, widths)]


def test_four_times_the_score_is_a_bit() -> None:
    rungs = [bits_of(rung) for rung in ladder({"a": 1.0, "b": 4.0, "c": 0.0}, (2, 3, 4))]
    assert rungs == [
        {"a": 2, "b": 2, "c": 2},
        {"a": 2, "b": 3, "c": 2},
        {"a": 3, "b": 4, "c": 2},
        {"a": 4, "b": 4, "c": 2},
    ]


def test_the_score_of_a_layer_is_that_of_its_remaining_weights() -> None:
    weight = np.array([[4.0, -2.0], [0.0, 9.0]], dtype=np.float32)
    one = np.ones((2, 2), dtype=np.float32)
    layer = LayerRelevance(
        weight=weight, weight_abs=99 * one, weight_cost=one, channel=one[0], channel_abs=one[0], output_cost=one[0]
    )
    found = Relevance(rule="", n_samples=1, layers={"a": layer, "b": layer, "c": layer})
    masks = {"b": np.array([[True, True], [False, False]]), "c": np.zeros((2, 2), dtype=bool)}
    assert layer_scores(found, masks) == {"a": 15 / 4, "b": 3.0, "c": 0.0}


@given(n=st.integers(1, 60), border=st.integers(-1, 60))
@often
def test_the_highest_rung_is_found_by_few_questions(n: int, border: int) -> None:
    asked: list[int] = []

    def fits(rung: int) -> bool:
        asked.append(rung)
        return rung <= border

    found = highest_rung(n, fits)
    assert found == (None if border < 0 else min(border, n - 1))
    assert len(asked) == len(set(asked)) <= math.ceil(math.log2(n + 1))


# ---- budgets ---------------------------------------------------------------------------------------------------------


def made(graph: Graph, grids: Mapping[str, Grid]) -> Candidate:
    return Candidate(graph=graph, plan=plan_for(graph, bits_of(grids)))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("kind", BudgetKind)
def test_budgets_buy_what_trying_every_rung_finds(kind: BudgetKind, share: float) -> None:
    graph = plain()
    rungs = ladder({"conv1": 1.0, "conv2": 0.2, "fc1": 0.05, "fc2": 3.0}, WIDTHS)

    def points(candidate: Candidate) -> float:
        return 40 - 8 * least_mean_bits(candidate, ["onnx"])

    measure = {
        BudgetKind.AVG_BITS: lambda c: least_mean_bits(c, ["onnx"]),
        BudgetKind.MAX_SIZE: lambda c: largest_file(c, ["onnx"]),
        BudgetKind.MAX_DROP: points,
    }[kind]
    got = [float(measure(made(graph, rung))) for rung in rungs]
    asked = float(np.clip(min(got) + share * (max(got) - min(got)) + 1e-6, 0.1, None))
    if kind is BudgetKind.MAX_DROP:
        asked = float(np.clip(asked, 0, 100))
    if kind is BudgetKind.AVG_BITS:
        asked = min(asked, 8.0)
    if kind is BudgetKind.MAX_SIZE:
        asked = float(np.ceil(asked))
    steps: list[int] = []
    budget = Budget(kind=kind, asked=asked)
    spent = spend_on_ladder(
        budget, rungs, lambda g: made(graph, g), ["onnx"], points, progress=steps.append
    )
    (found,) = [i for i, r in enumerate(rungs) if spent.candidate.plan.to_json() == made(graph, r).plan.to_json()]
    assert spent.got == round(got[found], 4)
    assert len(steps) <= 6
    # Files need not grow with every bit: within the budget it is in any case, and the next rung is not.
    assert spent.met
    assert got[found] <= asked
    further = got[found - 1 :: -1][:1] if kind is BudgetKind.MAX_DROP else got[found + 1 :][:1]
    assert not further or further[0] > asked or found == 0
    if kind is BudgetKind.AVG_BITS:
        assert found == max(i for i, g in enumerate(got) if g <= asked)


def test_budgets_that_cannot_be_met() -> None:
    graph = plain()
    rungs = ladder({"conv1": 1.0, "conv2": 0.2, "fc1": 0.05, "fc2": 3.0}, WIDTHS)
    for kind, asked, found in (
        (BudgetKind.AVG_BITS, 1.0, "1 mean bits a weight asked for, the least is 2"),
        (BudgetKind.MAX_SIZE, 500, "500 bytes of the largest file asked for, the least is"),
    ):
        with pytest.raises(BudgetError, match=found):
            spend_on_ladder(Budget(kind=kind, asked=asked), rungs, lambda g: made(graph, g), ["onnx"], None)
    # No rung loses little enough: the highest is given, and it is said.
    spent = spend_on_ladder(
        Budget(kind=BudgetKind.MAX_DROP, asked=1), rungs, lambda g: made(graph, g), ["onnx"], lambda c: 5.0
    )
    assert (spent.met, spent.got) == (False, 5.0)
    assert {layer.weight_bits for layer in spent.candidate.plan.layers.values()} == {8}


# ---- builds ----------------------------------------------------------------------------------------------------------


def built(place: Place, *arguments: str, code: int = 0) -> dict[str, Any]:
    shutil.rmtree(place.folder / "out", ignore_errors=True)
    assert main([*place.command(), *arguments]) == code
    found: dict[str, Any] = json.loads((place.folder / "out" / "manifest.json").read_text())
    return found


def scored(place: Place) -> tuple[Graph, Relevance]:
    """The network and its relevance on all training images, made here."""
    graph = capture(load_module("tinymodels:tiny", place.folder / "tiny.pt"), (1, 8, 8), name="tiny")
    data = np.load(place.folder / "data.npz")
    x = (data["x_train"][:, None] / 255).astype(np.float32)
    return graph, score(graph, [(x, data["y_train"])])


@pytest.mark.parametrize(("name", "policy"), [("soroush2024", "zero"), ("ghavami2025", "nonpositive")])
def test_a_paper_builds_as_it_says(
    name: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path, monkeypatch)
    record = built(place, "--method", name, "--calib", "200", "--avg-bits", "5", "--format", "onnx")
    printed, out = capsys.readouterr().out, place.folder / "out"
    plan, graph = CompressionPlan.from_json((out / "plan.json").read_text()), bundle.load(out / "graph.edgecomp")
    float_graph, relevance = scored(place)
    zeros, total, heights = 0, 0, {}
    for node in float_graph.layers():
        layer, weight = relevance.layers[node.name], np.asarray(float_graph.weight(node).data)
        stays = layer.weight_abs != 0 if policy == "zero" else layer.weight > 0
        got = np.asarray(graph.weight(node).data)
        # What stays is as it was, and what goes is 0; sums in another order may turn the sign of what is nearly 0.
        assert (np.isclose(got, np.where(stays, weight, 0), atol=1e-6)).mean() > 0.99
        zeros, total = zeros + int((got == 0).sum()), total + got.size
        heights[node.name] = math.log2(np.abs(layer.weight[stays]).mean()) / 2
    assert plan.made_by["sparsifying"] == f"{policy}: {100 * zeros / total:.2f} % of the weights are 0"
    found = {layer: plan.layers[layer].weight_bits for layer in plan.layers}
    levels = np.arange(-10, 40, 0.001)
    assert any(
        found == {n: min(WIDTHS, key=lambda w: (abs(w - c - h), -w)) for n, h in heights.items()} for c in levels
    )
    assert record["budget"]["got"] <= 5
    assert plan.made_by["reconstruction"] == "none"
    assert "recovery" not in plan.made_by
    readme = (out / "README.md").read_text()
    for what, how in OPEN.items():
        assert plan.made_by[f"not published, chosen here: {what}"] == how
        assert f"- {what}: {how}\n" in printed
        assert f"  - {what}: {how}\n" in readme
    assert PAPERS[name].source in readme
    assert PAPERS[name].source in printed
    assert main(["verify", "out"]) == 0


def test_every_budget_and_recovery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, monkeypatch)
    small = built(place, "--method", "soroush2024", "--max-size", "3500", "--format", "onnx")
    assert small["artifacts"][0]["bytes"] <= 3500
    dropped = built(place, "--method", "soroush2024", "--max-drop", "3")
    assert dropped["budget"]["met"]
    assert dropped["budget"]["got"] <= 3
    tuned = built(place, "--method", "ghavami2025", "--recover", "3", "--avg-bits", "6", "--format", "onnx")
    made_by = json.loads((place.folder / "out" / "plan.json").read_text())["made_by"]
    assert made_by["recovery"].startswith("3 epochs")
    assert sum(x["weights"] * x["zero_percent"] for x in tuned["layers"]) / sum(
        x["weights"] for x in tuned["layers"]
    ) >= float(made_by["sparsifying"].split()[1])
    unmet = built(place, "--method", "ghavami2025", "--max-drop", "0", "--format", "onnx", code=3)
    assert not unmet["budget"]["met"]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--score", "magnitude"], "--score magnitude: its recipe has --score lrp"),
        (["--rule", "gamma"], "--rule gamma: its recipe has --rule epsilon"),
        (["--start", "one"], "--start one: its recipe has --start logit"),
        (["--prune", "0.5"], "--prune 0.5: its recipe has --prune zero"),
        (["--sparsify", "0.5"], "--sparsify 0.5: its recipe has --sparsify nonpositive"),
        (["--sparsify", "zero"], "--sparsify zero: its recipe has --sparsify nonpositive"),
    ],
)
def test_what_contradicts_a_paper_is_refused(
    arguments: list[str],
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["build", "-o", "out", "--method", "ghavami2025", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--method ghavami2025 with {found}; leave one of the two out" in error


def test_what_a_paper_has_anyway_may_be_said() -> None:
    paper = PAPERS["soroush2024"]
    fine: dict[str, Any] = {
        "scoring": Scoring(score="lrp", rule="epsilon", start="logit"),
        "pruning": parse_pruning("zero"),
        "sparsifying": parse_pruning("zero"),
        "reconstruction": False,
    }
    check_method(paper, **fine)
    check_method(None, scoring=Scoring(score="random"), pruning=parse_pruning("0.5"), sparsifying=None,
                 reconstruction=True)  # fmt: skip
    with pytest.raises(UsageError, match="with reconstruction on"):
        check_method(paper, **{**fine, "reconstruction": True})
    with pytest.raises(UsageError, match="with --sparsify none"):
        check_method(paper, **{**fine, "sparsifying": None})
    assert fine["scoring"] == LRP
    assert options.METHODS == methods.METHODS


@pytest.mark.parametrize("name", PAPERS)
def test_the_comparison_writes_the_file_of_a_build(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, monkeypatch)
    subject = Subject(
        model="tinymodels:tiny",
        weights=place.folder / "tiny.pt",
        data="npz:data.npz",
        preprocessing=Preprocessing(mean=(0.0,), std=(1.0,)),
        n_calibration=64,
    )
    made = OURS[name](Context(subject), 4, 1)
    built(place, "--method", name, "--avg-bits", "4", "--seed", "1", "--format", "onnx")
    assert made.file == (place.folder / "out" / "model.onnx").read_bytes()
