"""The planner against brute force, and its searches against made-up files and accuracies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp import quantmath
from edgecomp.compress import cut
from edgecomp.errors import BudgetError
from edgecomp.graph import Graph
from edgecomp.groups import number_channels
from edgecomp.plan import LayerRelevance, Relevance
from edgecomp.planner import (
    DROP_STEPS,
    LayerChoices,
    irrelevant_channels,
    layer_choices,
    mean_bits,
    search_drop,
    search_file_size,
    solve,
    solve_mean_bits,
    total_bits,
    weighed,
)
from edgecomp.quantmath import Grid
from tests.graphs import GRAPHS, dense, multiplied, plan_for

often = settings(derandomize=True, deadline=None, max_examples=150)
ALL = {**GRAPHS, "multiplied": multiplied, "dense": dense}

# ---- solve -----------------------------------------------------------------------------------------------------------


@st.composite
def instances(draw: st.DrawFn, most_weights: int = 200) -> tuple[list[LayerChoices], float]:
    """A few layers with random errors (mostly falling with the bits), and a budget between least and most."""
    choices = []
    for i in range(draw(st.integers(1, 4))):
        widths = sorted(draw(st.sets(st.integers(2, 8), min_size=1, max_size=4)))
        errors = sorted(draw(st.lists(st.floats(0, 100), min_size=len(widths), max_size=len(widths))), reverse=True)
        if draw(st.integers(0, 4)) == 0:
            errors.reverse()
        stored = {b: (4 if b <= 4 else 8) if draw(st.booleans()) else b for b in widths}
        n = draw(st.integers(1, most_weights))
        choices.append(choice(f"layer{i}", n, dict(zip(widths, errors, strict=True)), stored))
    least = sum(min(c.stored_bits.values()) for c in choices)
    most = sum(max(c.stored_bits.values()) for c in choices)
    return choices, least + draw(st.floats(0, 1)) * (most - least + 10)


def choice(name: str, n_weights: int, error: dict[int, float], stored: dict[int, int] | None = None) -> LayerChoices:
    """Make choices of errors by width, and of the bits that a weight takes, by width."""
    return LayerChoices(
        name=name,
        n_weights=n_weights,
        error={Grid(bits=b): e for b, e in error.items()},
        stored_bits={Grid(bits=b): n_weights * (stored[b] if stored else b) for b in error},
    )


def total_error(choices: Sequence[LayerChoices], grids: Mapping[str, Grid]) -> float:
    return sum(c.error[grids[c.name]] for c in choices)


def total_cost(choices: Sequence[LayerChoices], grids: Mapping[str, Grid]) -> int:
    return sum(c.stored_bits[grids[c.name]] for c in choices)


def best_of_all(choices: Sequence[LayerChoices], budget: float) -> float:
    """Try every combination."""
    found = np.inf
    for widths in itertools.product(*(c.error for c in choices)):
        bits = {c.name: b for c, b in zip(choices, widths, strict=True)}
        if total_cost(choices, bits) <= budget:
            found = min(found, total_error(choices, bits))
    return found


@often
@given(instances())
def test_solve_is_optimal(case: tuple[list[LayerChoices], float]) -> None:
    """Below 65536 bits nothing is rounded."""
    choices, budget = case
    bits = solve(choices, budget)
    assert list(bits) == [c.name for c in choices]
    assert all(bits[c.name] in c.error for c in choices)
    assert total_cost(choices, bits) <= budget
    assert total_error(choices, bits) == pytest.approx(best_of_all(choices, budget), rel=1e-9, abs=1e-12)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(instances(most_weights=3_000_000))
def test_solve_rounds_by_a_65536th(case: tuple[list[LayerChoices], float]) -> None:
    """Never over the budget; as good as the best for a budget smaller by one unit a layer."""
    choices, budget = case
    bits = solve(choices, budget)
    assert total_cost(choices, bits) <= budget
    smaller = budget - (len(choices) + 1) * max(1.0, budget / 65536)
    assert total_error(choices, bits) <= best_of_all(choices, smaller) + 1e-9


@pytest.mark.parametrize("mean", [2.3, 4.1, 6.7])
def test_many_layers_fill_the_budget_and_stay_within(mean: float) -> None:
    """With 40 layers, costs rounded down would add up to some units too many."""
    rng = np.random.default_rng(0)
    layers = [
        choice(f"l{i}", int(n), {b: float(rng.uniform(0.5, 2) * n * 4.0**-b) for b in range(2, 9)})
        for i, n in enumerate(rng.integers(20_000, 60_000, 40))
    ]
    budget = mean * sum(c.n_weights for c in layers)
    cost = total_cost(layers, solve(layers, budget))
    assert budget * (1 - 2 * 40 / 65536) <= cost <= budget


@often
@given(instances())
def test_too_small_a_budget(case: tuple[list[LayerChoices], float]) -> None:
    choices, _ = case
    least = sum(min(c.stored_bits.values()) for c in choices)
    assert total_cost(choices, solve(choices, least)) == least
    with pytest.raises(BudgetError, match=f"the least possible are {-(-least // 8)} ") as e:
        solve(choices, least - 0.5)
    assert "\n" not in str(e.value)


def test_cheapest_and_best() -> None:
    coarse, fine, wide = Grid(bits=4, step=2.0), Grid(bits=4), Grid(bits=8)
    found = {coarse: (9.0, (15, 40)), fine: (1.0, (40, 40)), wide: (0.5, (80, 80)), Grid(bits=5): (0.9, (81, 80))}
    c = weighed("a", 10, found)
    assert c.error == {coarse: 9.0, fine: 1.0, wide: 0.5}
    assert c.stored_bits == {coarse: 15, fine: 40, wide: 80}
    assert (c.cheapest(), c.best()) == (coarse, wide)
    tflite = c.counted(max)
    # Of equal costs the one that is smaller in another format counts.
    assert (tflite.stored_bits[coarse], tflite.cheapest()) == (40, coarse)
    assert tflite.cheapest_only().error.keys() == {coarse, fine}
    assert total_bits([c], {"a": fine}) == 40


@often
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=9))
def test_only_what_nothing_beats_is_weighed(options: list[tuple[int, int, int]]) -> None:
    found = {Grid(bits=8, step=1.0 + i): (float(e), (a, b)) for i, (e, a, b) in enumerate(options)}
    kept = weighed("a", 1, found).per_format
    for grid, (error, stored) in found.items():
        beaten = [
            (e, *s) < (error, *stored) and e <= error and s[0] <= stored[0] and s[1] <= stored[1]
            for e, s in found.values()
        ]
        if grid in kept:
            assert not any(beaten)
        else:
            twins = [other for other, value in found.items() if value == found[grid] and other in kept]
            assert any(beaten) or twins


LADDER = [choice(f"l{i}", 100 * (i + 1), {b: 4.0 ** (8 - b) * (i + 1) for b in range(2, 9)}) for i in range(4)]


def test_mean_bits() -> None:
    grids = {"l0": Grid(bits=8), "l1": Grid(bits=2), "l2": Grid(bits=4), "l3": Grid(bits=5)}
    assert mean_bits(LADDER, grids) == (8 * 1 + 2 * 2 + 4 * 3 + 5 * 4) / 10
    for asked in (2, 2.5, 3.3, 5, 8):
        found = mean_bits(LADDER, solve_mean_bits(LADDER, asked))
        assert asked - 0.4 <= found <= asked
    with pytest.raises(BudgetError, match=r"\(2\.00 bits a weight\)"):
        solve_mean_bits(LADDER, 1.99)


# ---- search_file_size ------------------------------------------------------------------------------------------------


@often
@given(
    instances(),
    st.integers(0, 400),
    st.lists(st.integers(0, 40), min_size=9, max_size=9),
    st.integers(0, 3000),
)
def test_file_size_search(
    case: tuple[list[LayerChoices], float], fixed: int, by_width: list[int], limit: int
) -> None:
    """Whatever a file holds beside the weights, it is within the limit, or the smallest widths are beyond it too."""
    choices, _ = case
    written: list[int] = []

    def counted(grids: Mapping[str, Grid]) -> int:
        return fixed + sum(-(-c.stored_bits[grids[c.name]] // 8) + by_width[grids[c.name].bits] for c in choices)

    def file_bytes(grids: Mapping[str, Grid]) -> int:
        written.append(counted(grids))
        return written[-1]

    least = counted({c.name: c.cheapest() for c in choices})
    if least > limit:
        with pytest.raises(BudgetError, match=f"a file of {limit} bytes .* the smallest possible has {least} bytes"):
            search_file_size(choices, limit, file_bytes)
    else:
        assert file_bytes(search_file_size(choices, limit, file_bytes)) <= limit
    assert len(written) <= 10


def test_file_size_search_uses_the_room() -> None:
    def file_bytes(grids: Mapping[str, Grid]) -> int:
        return 777 + total_cost(LADDER, grids) // 8

    for limit in (1030, 1100, 1300, 1600):
        bits = search_file_size(LADDER, limit, file_bytes)
        assert limit - 14 <= file_bytes(bits) <= limit  # a step of the smallest layer is 12.5 bytes
        assert total_error(LADDER, bits) == best_of_all(LADDER, 8 * (limit - 777))
    everything = search_file_size(LADDER, 10**6, file_bytes)
    assert set(everything.values()) == {Grid(bits=8)}


# ---- search_drop -----------------------------------------------------------------------------------------------------


def monotone(bits: Mapping[str, Grid]) -> float:
    return 12.0 * (1 - (mean_bits(LADDER, bits) - 2) / 6) ** 2


def noisy(bits: Mapping[str, Grid]) -> float:
    wobble = np.random.default_rng([bits[name].bits for name in sorted(bits)]).normal()
    return monotone(bits) + 0.5 * float(wobble)


@pytest.mark.parametrize("drop", [monotone, noisy])
@pytest.mark.parametrize("most", [0.3, 1.0, 4.0, 11.0, 50.0])
def test_drop_search(drop: Callable[[Mapping[str, Grid]], float], most: float) -> None:
    """What comes back was measured and is within what was asked, or is the best there is."""
    measured: dict[tuple[Grid, ...], float] = {}
    steps = []

    def points(bits: Mapping[str, Grid]) -> float:
        measured[tuple(bits.values())] = drop(bits)
        return drop(bits)

    bits, loss = search_drop(LADDER, most, points, progress=steps.append)
    assert measured[tuple(bits.values())] == loss
    assert len(steps) <= DROP_STEPS
    assert set(steps) == {1}
    if loss > most:
        assert set(bits.values()) == {Grid(bits=8)}
    if drop is monotone:
        # The true answer by scanning every budget; bisection knows it to a 4^(1 / 2^(DROP_STEPS - 1))th.
        budgets = np.linspace(2, 8, 200) * 1000
        within = [mean_bits(LADDER, b) for b in (solve(LADDER, x) for x in budgets) if monotone(b) <= most]
        assert loss <= most
        assert mean_bits(LADDER, bits) <= 0.1 + min(within) * 4.0 ** (1 / 2 ** (DROP_STEPS - 2))


def test_drop_that_cannot_be_had() -> None:
    bits, loss = search_drop(LADDER, 0.5, lambda bits: 3.0)
    assert (set(bits.values()), loss) == ({Grid(bits=8)}, 3.0)


def test_drop_search_of_one_choice() -> None:
    calls = []

    def points(bits: Mapping[str, Grid]) -> float:
        calls.append(dict(bits))
        return -0.2

    bits, loss = search_drop([choice("a", 10, {8: 0.0})], 0.0, points)
    assert (bits, loss, len(calls)) == ({"a": Grid(bits=8)}, -0.2, 1)


# ---- channels --------------------------------------------------------------------------------------------------------


def relevance_of(graph: Graph, zero: Mapping[str, Sequence[int]], seed: int = 0) -> Relevance:
    """Random relevance; none for the channels in `zero`."""
    rng = np.random.default_rng(seed)
    layers = {}
    for node in graph.layers():
        shape = graph.weight(node).shape
        channel = rng.uniform(0.1, 1, shape[0])
        channel[list(zero.get(node.name, ()))] = 0
        weight = rng.standard_normal(shape).astype(np.float32)
        layers[node.name] = LayerRelevance(
            weight=weight,
            weight_abs=np.abs(weight),
            weight_cost=weight**2,
            channel=channel,
            channel_abs=channel,
            output_cost=channel,
        )
    return Relevance(rule="made up", n_samples=1, layers=layers)


def dropped(keep: Mapping[str, tuple[bool, ...]]) -> dict[str, list[int]]:
    return {n: [i for i, k in enumerate(flags) if not k] for n, flags in keep.items() if not all(flags)}


@pytest.mark.parametrize(
    ("name", "zero", "want"),
    [
        ("plain", {}, {}),
        ("plain", {"conv1": [0, 3], "fc1": [19]}, {"conv1": [0, 3], "fc1": [19]}),
        # The output of the model cannot be cut.
        ("plain", {"fc2": [0]}, {}),
        # One channel stays, whichever has the lowest number.
        ("plain", {"conv2": range(12)}, {"conv2": list(range(1, 12))}),
        # Coupled channels go when all of them are irrelevant.
        ("residual", {"block.conv2": [3], "block.shortcut": [3]}, {}),
        (
            "residual",
            {"block.conv2": [3, 4], "block.shortcut": [3], "end.conv": [3]},
            {"block.conv2": [3], "block.shortcut": [3], "end.conv": [3]},
        ),
        ("separable", {"expand": [2], "dw": [2]}, {"expand": [2], "dw": [2]}),
        ("separable", {"stem": [1], "project": [1], "grouped": [1]}, {}),
        (
            "multiplied",
            {"stem": [1], "dw1": [2, 3], "dw2": [4, 5, 6, 7]},
            {"stem": [1], "dw1": [2, 3], "dw2": [4, 5, 6, 7]},
        ),
        ("multiplied", {"stem": [1], "dw1": [2, 3], "dw2": [4, 5, 6]}, {}),
        # What reads the first half of the shuffled channels is left one of them.
        ("shuffled", {"stem": [0, 1, 2], "right": [0, 1, 2]}, {"stem": [1, 2], "right": [0, 1, 2]}),
    ],
)
def test_irrelevant_channels(name: str, zero: dict[str, list[int]], want: dict[str, list[int]]) -> None:
    graph = ALL[name]()
    assert dropped(irrelevant_channels(graph, relevance_of(graph, zero))) == want


@pytest.mark.parametrize("name", ALL)
def test_without_any_relevance_a_network_remains(name: str) -> None:
    graph = ALL[name]()
    everything = {n.name: range(graph.weight(n).shape[0]) for n in graph.layers()}
    keep = irrelevant_channels(graph, relevance_of(graph, everything))
    assert all(any(flags) for flags in keep.values())
    smaller = cut(graph, keep)
    assert smaller.tensors[graph.outputs[0]].shape == graph.tensors[graph.outputs[0]].shape


# ---- what a width costs ----------------------------------------------------------------------------------------------


def test_layer_choices_by_hand() -> None:
    """Weights that remain on both sides, errors weighted with their cost, bits as the formats store them."""
    graph = ALL["plain"]()
    relevance = relevance_of(graph, {})
    keep = {n.name: (True,) * graph.weight(n).shape[0] for n in graph.layers()}
    keep["conv1"], keep["conv2"] = (False, True) * 4, (True, True, False) * 4
    steps: list[int] = []
    choices = {
        c.name: c for c in layer_choices(graph, relevance, keep, ["onnx"], progress=steps.append)
    }
    assert [c.n_weights for c in choices.values()] == [4 * 3 * 9, 8 * 4 * 9, 20 * 8 * 4, 10 * 20]
    assert steps == [graph.weight(n).data.size for n in graph.layers()]  # type: ignore[union-attr]
    conv2 = choices["conv2"]
    dense = {grid: stored for grid, stored in conv2.stored_bits.items() if grid.step is None}
    assert all(stored <= grid.bits * conv2.n_weights for grid, stored in dense.items())
    rows, columns = np.array(keep["conv2"]), np.array(keep["conv1"])
    weight = np.asarray(graph.tensors["conv2.weight"].data)[rows][:, columns].astype(np.float64)
    cost = relevance.layers["conv2"].weight_cost[rows][:, columns]
    for grid, error in conv2.error.items():
        scale = quantmath.choose_weight_scale(weight, grid.bits)[:, None, None, None]
        if grid.step is not None:
            scale = np.full_like(scale, grid.step * np.sqrt((weight**2).mean()))
        limit = 2 ** (grid.bits - 1) - 1
        off = np.clip(np.rint(weight / scale), -limit, limit) * scale - weight
        assert error == pytest.approx(float((off**2 * cost).sum()), rel=1e-3)


def test_grids_that_formats_can_use() -> None:
    """TFLite has 4 and 8 bits, and 8 in depthwise layers; ONNX every width, and less where zeros are frequent."""
    graph = ALL["separable"]()
    keep = {n.name: (True,) * graph.weight(n).shape[0] for n in graph.layers()}

    def chosen(*formats: str) -> dict[str, LayerChoices]:
        return {c.name: c for c in layer_choices(graph, relevance_of(graph, {}), keep, formats)}

    tflite, onnx, both = chosen("tflite"), chosen("onnx"), chosen("onnx", "tflite")
    n = tflite["project"].n_weights
    assert tflite["project"].stored_bits == {Grid(bits=4): 4 * n, Grid(bits=8): 8 * n}
    assert tflite["dw"].stored_bits == {Grid(bits=8): 8 * 16 * 9}
    assert set(onnx["dw"].stored_bits.values()) <= {b * 16 * 9 for b in range(2, 9)}
    assert both["project"].per_format[both["project"].cheapest()][1] == 4 * n
    for choices in (tflite, onnx, both):
        for c in choices.values():
            assert c.error.keys() == c.stored_bits.keys() == c.per_format.keys()
            assert all(min(stored) == c.stored_bits[grid] for grid, stored in c.per_format.items())


def test_choices_of_a_cut_depthwise_layer() -> None:
    """A depthwise weight has one input column, which stays; a grouped one keeps all of its own."""
    graph = ALL["separable"]()
    keep = irrelevant_channels(graph, relevance_of(graph, {"expand": [2, 5], "dw": [2, 5]}))
    choices = {c.name: c for c in layer_choices(graph, relevance_of(graph, {}), keep, ["onnx"])}
    small = cut(graph, keep)
    assert {n: c.n_weights for n, c in choices.items()} == {n.name: small.weight(n).data.size for n in small.layers()}  # type: ignore[union-attr]
    assert not number_channels(small).locked[number_channels(small).of["expand"]].any()


def test_a_budget_for_everything_buys_everything() -> None:
    rng = np.random.default_rng(4)
    choices = [choice(f"l{i}", int(rng.integers(10, 9999)), {b: 2.0**-b for b in range(2, 9)}) for i in range(9)]
    assert solve(choices, 8 * sum(c.n_weights for c in choices)) == {c.name: Grid(bits=8) for c in choices}


def test_a_size_for_both_formats_is_used_up() -> None:
    """Where the ONNX file is the larger one, TFLite stays at 4 bits a code and ONNX has the widths that fit."""
    from edgecomp.compress import narrowest_bits, on_grids
    from edgecomp.spending import Candidate, largest_file, spend_file_size

    graph = ALL["plain"]()
    keep = {n.name: (True,) * graph.weight(n).shape[0] for n in graph.layers()}
    choices = layer_choices(graph, relevance_of(graph, {}), keep, ["onnx", "tflite"])

    def make(grids: Mapping[str, Grid]) -> Candidate:
        rounded = on_grids(graph, grids)
        plan = plan_for(rounded, {name: narrowest_bits(rounded, name, grid) for name, grid in grids.items()})
        return Candidate(graph=rounded, plan=plan)

    sizes = {
        b: largest_file(make({n.name: Grid(bits=b) for n in graph.layers()}), ["onnx", "tflite"]) for b in (2, 3, 4)
    }
    for limit in sizes.values():
        spent = spend_file_size(choices, limit, ["onnx", "tflite"], make, make)
        assert spent.got == largest_file(spent.candidate, ["onnx", "tflite"]) <= limit
    roomy = spend_file_size(choices, sizes[4], ["onnx", "tflite"], make, make)
    assert max(layer.weight_bits for layer in roomy.candidate.plan.layers.values()) >= 4


def test_a_mean_width_is_never_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written may be more than the trials said: then less is asked for, down to the least there is."""
    from edgecomp import spending

    asked_for: list[float] = []

    def make(grids: Mapping[str, Grid]) -> Mapping[str, Grid]:
        asked_for.append(mean_bits(LADDER, grids))
        return grids

    for inflation in (1.0, 1.1, 1.4):
        monkeypatch.setattr(spending, "least_mean_bits", lambda grids, _, by=inflation: by * mean_bits(LADDER, grids))
        spent = spending.spend_mean_bits(LADDER, 4.0, ["onnx"], make)  # type: ignore[arg-type]
        assert 3.3 <= spent.got <= 4.0
        assert spent.met
    with pytest.raises(BudgetError, match=r"a mean of 2\.5 bits a weight asked for, the least that was found is 2\.8"):
        spending.spend_mean_bits(LADDER, 2.5, ["onnx"], make)  # type: ignore[arg-type]
    assert asked_for[-1] == 2.0


FINE = [choice(f"l{i}", 20 + 7 * i, {b: 4.0 ** (8 - b) * (i + 1) for b in range(2, 9)}) for i in range(40)]


@pytest.mark.parametrize("asked", [2.5, 3.0, 4.0, 5.5])
@pytest.mark.parametrize(
    ("written", "most_tries"),
    [
        (lambda mean: mean, 1),
        (lambda mean: 0.985 * mean, 1),
        (lambda mean: 0.8 * mean, 3),
        (lambda mean: mean - 0.3, 4),
        (lambda mean: mean + 0.3, 5),
        (lambda mean: 0.4 * np.ceil(mean / 0.4), 6),
    ],
)
def test_a_mean_width_is_spent(
    asked: float, written: Callable[[float], float], most_tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written may be less than the trials said: then more is tried, but not where it is near already."""
    from edgecomp import spending

    tried: list[float] = []

    def make(grids: Mapping[str, Grid]) -> float:
        tried.append(written(mean_bits(FINE, grids)))
        return tried[-1]

    monkeypatch.setattr(spending, "least_mean_bits", lambda candidate, _: candidate)
    spent = spending.spend_mean_bits(FINE, asked, ["onnx"], make)  # type: ignore[arg-type]
    assert spent.candidate == max(found for found in tried if found <= asked)
    assert spent.got == pytest.approx(spent.candidate, abs=1e-4)
    assert len(tried) <= most_tries
    if most_tries < 6:  # the last is written in steps too large for it
        assert spent.got >= 0.98 * asked


@often
@given(instances(), st.floats(2, 8), st.lists(st.floats(0.6, 1.5), min_size=16, max_size=16))
def test_whatever_is_written_the_limit_holds(
    case: tuple[list[LayerChoices], float], asked: float, factors: list[float]
) -> None:
    from edgecomp import spending

    choices, _ = case
    tried: list[float] = []

    def make(grids: Mapping[str, Grid]) -> float:
        tried.append(mean_bits(choices, grids) * factors[len(tried)])
        return tried[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spending, "least_mean_bits", lambda candidate, _: candidate)
        try:
            spent = spending.spend_mean_bits(choices, asked, ["onnx"], make)  # type: ignore[arg-type]
        except BudgetError:
            assert not any(found <= asked for found in tried)
        else:
            assert spent.candidate in tried
            assert spent.candidate <= asked
    assert len(tried) <= 6


def test_where_words_do_not_pay_whole_widths_are_bought(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a small file codes are stored in full after all: grids that were to be cheap by their zeros are not."""
    from edgecomp import spending

    grids = {Grid(bits=4, step=2.0): (1.0, 100), **{Grid(bits=b): (2.0**-b, 100 * b) for b in (2, 3, 4)}}
    choices = [
        LayerChoices(
            name=name,
            n_weights=100,
            error={grid: error for grid, (error, _) in grids.items()},
            stored_bits={grid: stored for grid, (_, stored) in grids.items()},
            per_format={grid: (stored,) for grid, (_, stored) in grids.items()},
        )
        for name in ("a", "b")
    ]
    monkeypatch.setattr(spending, "least_mean_bits", lambda made, formats: sum(g.bits for g in made.values()) / 2)
    spent = spending.spend_mean_bits(choices, 3.5, ["onnx"], dict)
    assert sorted(g.bits for g in spent.candidate.values()) == [3, 4]
    assert spent.got == 3.5
    with pytest.raises(BudgetError, match=r"1.5 bits a weight asked for, the least that was found"):
        spending.spend_mean_bits(choices, 1.5, ["onnx"], dict)
