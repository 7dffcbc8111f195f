"""Plans as JSON: read back to the same bits, one line a layer, and nothing else is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp.errors import PlanError
from edgecomp.plan import ActRange, CompressionPlan, Io, LayerPlan, validate
from edgecomp.preprocessing import Preprocessing
from tests.graphs import GRAPHS, plan_for

GRAPH = GRAPHS["plain"]()
PLAN = replace(
    plan_for(GRAPH, {"conv1": 8, "conv2": 3, "fc1": 2, "fc2": 8}, drop={"conv2": (0, 7)}),
    classes=("coat", "bag", "Stiefel, groß"),
    made_by={"rule": "epsilon 1e-06", "seed": "0"},
)
names = st.text(max_size=20).filter(lambda text: text.isprintable())
ends = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e29, max_value=1e29)


@st.composite
def plans(draw: st.DrawFn) -> CompressionPlan:
    layers = draw(
        st.dictionaries(
            names,
            st.builds(
                LayerPlan,
                keep=st.lists(st.booleans(), min_size=1, max_size=20).map(tuple),
                weight_bits=st.integers(2, 8),
            ),
            max_size=5,
        )
    )
    ranges = draw(st.dictionaries(names, st.tuples(ends, ends).map(sorted), max_size=5))
    return CompressionPlan(
        graph_digest=draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
        io=draw(st.sampled_from(Io)),
        layers=layers,
        ranges={name: ActRange(low=low, high=high) for name, (low, high) in ranges.items()},
        preprocessing=draw(
            st.builds(
                Preprocessing,
                mean=st.tuples(st.floats(-2, 2)),
                std=st.tuples(st.floats(0.01, 2)),
                resize=st.none() | st.integers(1, 300),
                pad=st.integers(0, 9),
            )
        ),
        classes=tuple(draw(st.lists(names, max_size=3))),
        made_by=draw(st.dictionaries(names, names, max_size=3)),
    )


@settings(derandomize=True, deadline=None, max_examples=100)
@given(plans())
def test_round_trip(plan: CompressionPlan) -> None:
    text = plan.to_json()
    back = CompressionPlan.from_json(text)
    for field in ("graph_digest", "io", "layers", "ranges", "preprocessing", "classes", "made_by"):
        assert getattr(back, field) == getattr(plan, field)
    assert isinstance(back.io, Io)
    assert list(back.layers) == list(plan.layers)
    assert [(r.low.hex(), r.high.hex()) for r in back.ranges.values()] == [
        (float(r.low).hex(), float(r.high).hex()) for r in plan.ranges.values()
    ]
    assert back.to_json() == text


def test_text() -> None:
    """What a person reads: a line for each layer and range, dropped channels by number."""
    lines = PLAN.to_json().splitlines()
    assert lines[1] == ' "schema": "edgecomp-plan/1",'
    assert '  "conv1": {"out_channels": 8, "dropped": [], "weight_bits": 8},' in lines
    assert '  "conv2": {"out_channels": 12, "dropped": [0, 7], "weight_bits": 3},' in lines
    assert ' "classes": ["coat", "bag", "Stiefel, groß"],' in lines
    assert sum(line.lstrip().startswith('"fc1":') for line in lines) == 2  # layer and range
    blocks = (PLAN.preprocessing.to_json(), PLAN.layers, PLAN.ranges, PLAN.made_by)
    assert len(lines) == 2 + 8 + sum(len(block) + 1 for block in blocks)
    assert PLAN.to_json().endswith("}\n")
    assert list(json.loads(PLAN.to_json())) == [
        "schema", "graph_digest", "io", "preprocessing", "classes", "layers", "ranges", "made_by"
    ]  # fmt: skip


def test_text_does_not_depend_on_the_order_of_notes() -> None:
    turned = replace(PLAN, made_by=dict(reversed(PLAN.made_by.items())))
    assert turned.to_json() == PLAN.to_json()


# ---- strict ----------------------------------------------------------------------------------------------------------


def put(*path: str | int, value: object) -> Callable[[dict[str, object]], object]:
    def change(obj: dict[str, object]) -> None:
        place: dict[str | int, object] = obj  # type: ignore[assignment]
        for key in path[:-1]:
            place = place[key]  # type: ignore[assignment]
        place[path[-1]] = value

    return change


def drop(*path: str) -> Callable[[dict[str, object]], object]:
    def change(obj: dict[str, object]) -> None:
        for key in path[:-1]:
            obj = obj[key]  # type: ignore[assignment]
        del obj[path[-1]]

    return change


LAYER = ("layers", "conv2")
REFUSED: dict[str, tuple[Callable[[dict[str, object]], object], str]] = {
    "unknown key": (put("colour", value=1), "unknown key 'colour'"),
    "unknown key of a layer": (put(*LAYER, "colour", value=1), "layer 'conv2': unknown key 'colour'"),
    "unknown key of preprocessing": (put("preprocessing", "clip", value=1), r"unknown keys \['clip'\]"),
    "schema missing": (drop("schema"), "key 'schema' is missing"),
    "layers missing": (drop("layers"), "key 'layers' is missing"),
    "bits missing": (drop(*LAYER, "weight_bits"), "layer 'conv2': key 'weight_bits' is missing"),
    "pad missing": (drop("preprocessing", "pad"), r"missing keys \['pad'\]"),
    "schema of another version": (put("schema", value="edgecomp-plan/2"), "reads 'edgecomp-plan/1'"),
    "schema a number": (put("schema", value=1), "schema is 1"),
    "digest short": (put("graph_digest", value="ab"), "graph_digest is 'ab', expected 64"),
    "digest upper case": (put("graph_digest", value="A" * 64), "expected 64 hexadecimal digits"),
    "digest null": (put("graph_digest", value=None), "graph_digest is None"),
    "io unknown": (put("io", value="uint8"), "io is 'uint8', expected one of float, int8"),
    "io a list": (put("io", value=["float"]), "io is "),
    "classes a string": (put("classes", value="coat"), "classes: expected a list of strings"),
    "classes of numbers": (put("classes", value=[1]), "classes: expected a list of strings"),
    "notes of numbers": (put("made_by", "seed", value=3), "made_by: expected strings"),
    "notes a list": (put("made_by", value=[]), "made_by: expected an object, found list"),
    "layers a list": (put("layers", value=[]), "layers: expected an object, found list"),
    "layer a list": (put(*LAYER, value=[12, [], 3]), "layer 'conv2': expected an object, found list"),
    "out_channels true": (put(*LAYER, "out_channels", value=True), "out_channels is True"),
    "out_channels 0": (put(*LAYER, "out_channels", value=0), "out_channels is 0, expected a whole number above 0"),
    "out_channels a float": (put(*LAYER, "out_channels", value=12.0), "out_channels is 12.0"),
    "out_channels huge": (put(*LAYER, "out_channels", value=10**12), "out_channels is 10+, expected"),
    "bits 1": (put(*LAYER, "weight_bits", value=1), "weight_bits is 1, expected one of 2, 3, 4, 5, 6, 7, 8"),
    "bits 9": (put(*LAYER, "weight_bits", value=9), "weight_bits is 9"),
    "bits true": (put(*LAYER, "weight_bits", value=True), "weight_bits is True"),
    "bits a float": (put(*LAYER, "weight_bits", value=4.0), "weight_bits is 4.0"),
    "bits a string": (put(*LAYER, "weight_bits", value="4"), "weight_bits is '4'"),
    "bits a list": (put(*LAYER, "weight_bits", value=[4]), r"weight_bits is \[4\]"),
    "dropped beyond": (put(*LAYER, "dropped", value=[12]), "dropped: expected channel numbers from 0 to 11"),
    "dropped below": (put(*LAYER, "dropped", value=[-1]), "dropped: expected channel numbers from 0 to 11"),
    "dropped true": (put(*LAYER, "dropped", value=[True]), "dropped: expected channel numbers"),
    "dropped a number": (put(*LAYER, "dropped", value=3), "dropped: expected channel numbers"),
    "dropped twice": (put(*LAYER, "dropped", value=[3, 3]), "each channel once, in rising order"),
    "dropped falling": (put(*LAYER, "dropped", value=[7, 3]), "each channel once, in rising order"),
    "range of one": (put("ranges", "fc1", value=[1]), r"range of 'fc1': expected \[low, high\]"),
    "range an object": (put("ranges", "fc1", value={"low": 0}), r"range of 'fc1': expected \[low, high\]"),
    "range of strings": (put("ranges", "fc1", value=["0", "1"]), r"range of 'fc1': expected \[low, high\]"),
    "range of truths": (put("ranges", "fc1", value=[False, True]), r"range of 'fc1': expected \[low, high\]"),
    "range reversed": (put("ranges", "fc1", value=[1, 0]), "range of 'fc1': .*with low <= high"),
    "range beyond floats": (put("ranges", "fc1", value=[0, 10**400]), "range of 'fc1': a number is too large"),
    "range huge": (put("ranges", "fc1", value=[0, 1e31]), "range of 'fc1': .*expected finite numbers"),
    "ranges a list": (put("ranges", value=[]), "ranges: expected an object, found list"),
    "preprocessing a list": (put("preprocessing", value=[]), "found list, expected an object"),
    "std of zero": (put("preprocessing", "std", value=[0]), "std"),
    "line break in a key": (put("a\nb", value=1), "unknown key"),
    "line break in a layer": (put("layers", "a\nb", value=1), "layer"),
    "line break in a range": (put("ranges", "a\nb", value=1), "range of"),
    "line break in a value": (put("io", value="a\nb"), "io is"),
}


def refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message) as e:
        CompressionPlan.from_json(text, "the/plan.json")
    said = str(e.value)
    assert said.startswith("the/plan.json")
    assert len(said.splitlines()) == 1
    assert len(said) < 400


@pytest.mark.parametrize("case", REFUSED)
def test_strict(case: str) -> None:
    change, message = REFUSED[case]
    obj = json.loads(PLAN.to_json())
    change(obj)
    refused(json.dumps(obj), message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "expected an object, found list"),
        ("null", "expected an object, found NoneType"),
        ("3", "expected an object, found int"),
        (PLAN.to_json() + "x", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"schema": ' + "9" * 5000 + "}", "not JSON"),
        (PLAN.to_json().replace('"io": "float"', '"io": "float", "io": "int8"'), "key 'io' stands twice"),
        (PLAN.to_json().replace('"dropped": [0, 7]', '"dropped": [0], "dropped": [7]'), "key 'dropped' stands twice"),
        (PLAN.to_json().replace('"conv1": {', '"conv2": {', 1), "key 'conv2' stands twice"),
        *(
            (PLAN.to_json().replace('"pad": 0', f'"pad": {number}'), f"{number} is not a number JSON knows")
            for number in ("NaN", "Infinity", "-Infinity")
        ),
    ],
    ids=range(14),
)
def test_what_is_not_one_json_object(text: str, message: str) -> None:
    refused(text, message)


def test_numbers_that_overflow_are_no_range() -> None:
    """JSON may say 1e999; Python reads infinity without calling it a constant."""
    start = PLAN.to_json().index('"input": [')
    end = PLAN.to_json().index("]", start)
    refused(PLAN.to_json()[:start] + '"input": [0, 1e999' + PLAN.to_json()[end:], "range of 'input': .*expected finite")


# ---- does it fit the graph -------------------------------------------------------------------------------------------


def layers_with(**changes: LayerPlan | None) -> dict[str, LayerPlan]:
    merged = {**PLAN.layers, **changes}
    return {name: layer for name, layer in merged.items() if layer is not None}


SPARE = LayerPlan(keep=(True,), weight_bits=4)
MISFITS: dict[str, tuple[CompressionPlan, str]] = {
    "another digest": (replace(PLAN, graph_digest="0" * 64), "made for the graph 000000000000…, this one is"),
    "a layer less": (replace(PLAN, layers=layers_with(fc1=None)), "layers and the model's differ in fc1"),
    "a layer more": (replace(PLAN, layers=layers_with(extra=SPARE)), "layers and the model's differ in extra"),
    "channels": (
        replace(PLAN, layers=layers_with(conv1=LayerPlan(keep=(True,) * 7, weight_bits=4))),
        "layer 'conv1' has 7 channels, the model's has 8",
    ),
    "no channel": (
        replace(PLAN, layers=layers_with(conv1=LayerPlan(keep=(False,) * 8, weight_bits=4))),
        "layer 'conv1' keeps no channel; expected at least one",
    ),
    "bits": (
        replace(PLAN, layers=layers_with(conv1=LayerPlan(keep=(True,) * 8, weight_bits=9))),
        "layer 'conv1' has 9 bits, expected one of",
    ),
    "a range less": (
        replace(PLAN, ranges={n: r for n, r in PLAN.ranges.items() if n != "relu1"}),
        "ranges and the model's activations differ in relu1",
    ),
    "a range more": (
        replace(PLAN, ranges={**PLAN.ranges, "fc1.weight": ActRange(low=0, high=1)}),
        r"ranges and the model's activations differ in fc1\.weight",
    ),
}


def test_fitting_plan() -> None:
    assert validate(PLAN, GRAPH) is None  # type: ignore[func-returns-value]
    assert validate(CompressionPlan.from_json(PLAN.to_json()), GRAPHS["plain"]()) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize("case", MISFITS)
def test_misfits(case: str) -> None:
    plan, message = MISFITS[case]
    with pytest.raises(PlanError, match=message) as e:
        validate(plan, GRAPH)
    assert len(str(e.value).splitlines()) == 1


# ---- variants --------------------------------------------------------------------------------------------------------


def test_uniform_bits() -> None:
    plan = PLAN.with_uniform_bits(5)
    assert {n: (layer.keep, layer.weight_bits) for n, layer in plan.layers.items()} == {
        n: (layer.keep, 5) for n, layer in PLAN.layers.items()
    }
    assert replace(plan, layers=PLAN.layers).to_json() == PLAN.to_json()


def test_without_pruning() -> None:
    plan = PLAN.without_pruning()
    assert {n: (sum(layer.keep), len(layer.keep), layer.weight_bits) for n, layer in plan.layers.items()} == {
        "conv1": (8, 8, 8), "conv2": (12, 12, 3), "fc1": (20, 20, 2), "fc2": (10, 10, 8)
    }  # fmt: skip
    assert replace(plan, layers=PLAN.layers).to_json() == PLAN.to_json()


def test_plans_do_not_change() -> None:
    layers = dict(PLAN.layers)
    plan = replace(PLAN, layers=layers)
    layers["conv1"] = SPARE
    assert plan.layers["conv1"] == PLAN.layers["conv1"]
    with pytest.raises(TypeError):
        plan.layers["conv1"] = SPARE  # type: ignore[index]
