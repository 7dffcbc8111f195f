"""Some of the classes: the same logits as before, picked by hand; images and labels to match; bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp import reference
from edgecomp.cli import main
from edgecomp.data import DataSet, LabelledImages, load
from edgecomp.errors import DataError, UsageError
from edgecomp.graph import Graph, Op
from edgecomp.selection import Selection, parse_classes, select_classes
from tests.graphs import GRAPHS, Build, images
from tests.onnx_run import onnx_run
from tests.tiny import Place

KNOWN = ("cat", "dog", "7", "a=b")


def pooled(seed: int = 0) -> Graph:
    """A classifier that ends with a convolution, ReLU, a pool and a reshape: the shape of SqueezeNet."""
    b = Build(seed, (2, 6, 6))
    x = b.clip("relu", b.conv("stem", "input", 6))
    x = b.clip("last.relu", b.conv("last", x, 5, (1, 1), pads=(0, 0, 0, 0)), 0.0, 6.0)
    x = b.node(Op.GLOBAL_AVG_POOL, "pool", (x,), {})
    return b.graph(b.node(Op.RESHAPE, "reshape", (x,), {"shape": (1, 5)}), "pooled")


def answers(graph: Graph) -> np.ndarray:
    return reference.run(graph, {"input": images(graph, 4)})[graph.outputs[0]]


LOGITS = (GRAPHS["plain"], GRAPHS["residual"], GRAPHS["branches"], pooled)


@pytest.mark.parametrize("make", LOGITS, ids=lambda make: make.__name__)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_answers_are_the_old_ones_picked(make: object, data: st.DataObject) -> None:
    graph = make()  # type: ignore[operator]
    n = graph.tensors[graph.outputs[0]].shape[1]
    picked = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))
    np.testing.assert_allclose(answers(select_classes(graph, picked)), answers(graph)[:, picked], rtol=1e-5, atol=1e-6)


def test_a_softmax_is_over_the_chosen_alone() -> None:
    graph = GRAPHS["separable"]()
    whole = answers(graph)[:, [7, 0, 3]]
    chosen = answers(select_classes(graph, (7, 0, 3)))
    np.testing.assert_allclose(chosen, whole / whole.sum(axis=1, keepdims=True), rtol=1e-4)


def test_what_stands_before_the_last_layer_is_untouched() -> None:
    graph = GRAPHS["plain"]()
    smaller = select_classes(graph, (2, 1))
    for name, tensor in graph.tensors.items():
        if not name.startswith("fc2"):
            assert smaller.tensors[name] is tensor
    assert smaller.tensors["fc2.weight"].shape == (2, 20)


def added(graph: Graph) -> Graph:
    b = Build(0, (1, 4, 4))
    x = b.node(Op.FLATTEN, "flatten", ("input",), {})
    return b.graph(b.node(Op.ADD, "sum", (b.linear("one", x, 4), b.linear("two", x, 4)), {}))


def flattened(graph: Graph) -> Graph:
    b = Build(0, (1, 4, 4))
    return b.graph(b.node(Op.FLATTEN, "flat", (b.conv("conv", "input", 2),), {}))


def depthwise(graph: Graph) -> Graph:
    b = Build(0, (4, 2, 2))
    x = b.conv("dw", "input", 4, (1, 1), pads=(0, 0, 0, 0), groups=4)
    return b.graph(b.node(Op.GLOBAL_AVG_POOL, "pool", (x,), {}))


def bare(graph: Graph) -> Graph:
    b = Build(0, (4, 2, 2))
    return b.graph(b.node(Op.GLOBAL_AVG_POOL, "pool", ("input",), {}))


def read_twice(graph: Graph) -> Graph:
    return replace(graph, outputs=(*graph.outputs, "relu3"))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (added, "sum (add) mixes the outputs"),
        (flattened, "channels are not the classes"),
        (depthwise, "has groups"),
        (bare, "come from the input"),
        (read_twice, "2 outputs"),
    ],
)
def test_networks_without_a_row_for_each_class(make: object, found: str) -> None:
    with pytest.raises(UsageError) as caught:
        select_classes(make(GRAPHS["plain"]()), (0, 1))  # type: ignore[operator]
    assert found in str(caught.value)


@pytest.mark.parametrize("indices", [(0, 10), (-1, 2), (3, 3), ()])
def test_classes_out_of_range(indices: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="from 0 to 9"):
        select_classes(GRAPHS["plain"](), indices)


# ---- names and numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "indices", "weights"),
    [
        ("cat,dog", (0, 1), (1, 1)),
        ("dog, cat", (1, 0), (1, 1)),
        ("1,0", (1, 0), (1, 1)),
        ("7,0", (2, 0), (1, 1)),  # a name comes before a number
        ("a=b,dog=2", (3, 1), (1, 2)),
        ("a=b=0.5,2", (3, 2), (0.5, 1)),
    ],
)
def test_names_and_numbers(text: str, indices: tuple[int, ...], weights: tuple[float, ...]) -> None:
    assert parse_classes(text, KNOWN) == Selection(indices=indices, weights=weights)


def test_weights_matter_only_where_they_differ() -> None:
    assert parse_classes("cat=3,dog=3", KNOWN).class_weights() is None
    found = parse_classes("cat=3,dog", KNOWN).class_weights()
    assert found is not None
    assert found.tolist() == [3.0, 1.0]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cat,cow", "known are cat, dog, 7, a=b, or 0 to 3"),
        ("cat,4", "no class '4'"),
        ("cat,", "no class ''"),
        ("cat,0", "stands twice"),
        ("cat", "at least two"),
        ("cat,dog=0", "above 0"),
        ("cat,dog=nan", "above 0"),
        ("cat,dog=much", "above 0"),
    ],
)
def test_bad_classes(text: str, found: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_classes(text, KNOWN)
    assert found in str(caught.value)


# ---- images ----------------------------------------------------------------------------------------------------------


def split(labels: list[int]) -> LabelledImages:
    pixels = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    return LabelledImages(images=pixels, labels=np.array(labels))


def test_images_are_renumbered_in_the_order_asked() -> None:
    found = split([2, 0, 1, 2, 3]).of_classes((2, 0))
    assert found.labels.tolist() == [0, 1, 0]
    assert found.images.ravel().tolist() == [0, 1, 3]
    both = DataSet(train=split([0, 1, 2]), test=split([2, 1, 0]), classes=("a", "b", "c"), spec="x")
    chosen = both.of_classes((2, 1))
    assert chosen.classes == ("c", "b")
    assert (chosen.train.labels.tolist(), chosen.test.labels.tolist()) == ([1, 0], [0, 1])


def test_a_class_without_images() -> None:
    both = DataSet(train=split([0, 1, 2]), test=split([2, 0]), classes=("a", "b", "c"), spec="x")
    with pytest.raises(DataError, match="x: no image of class 1"):
        both.of_classes((0, 1))


# ---- through the command line ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled sample, built for three of its classes."""
    out = tmp_path_factory.mktemp("classes") / "out"
    argv = ["build", "--classes", "Sneaker,Trouser=2,Bag", "--calib", "32", "--no-reconstruct", "--format", "onnx"]
    assert main([*argv, "--avg-bits", "8", "-o", str(out)]) == 0
    return out


def test_the_sample_for_three_classes(sample: Path) -> None:
    """Accuracy measured again with onnxruntime alone, on images picked by hand."""
    manifest = json.loads((sample / "manifest.json").read_text())
    assert manifest["classes"] == ["Sneaker", "Trouser", "Bag"]
    linear = manifest["layers"][-1]
    assert (linear["kept_channels"], linear["channels_before"]) == (3, 10)
    assert (linear["weights"], linear["weights_before"]) == (3 * 64, 10 * 64)
    test = load("sample").test
    chosen = np.isin(test.labels, (7, 1, 8))
    p = manifest["preprocessing"]
    pixels = np.pad(test.images[chosen][..., 0], ((0, 0), (p["pad"],) * 2, (p["pad"],) * 2))[:, None] / 255
    x = ((pixels - p["mean"][0]) / p["std"][0]).astype(np.float32)
    (scores,) = onnx_run((sample / "model.onnx").read_bytes(), {"input": x}).values()
    assert scores.shape == (chosen.sum(), 3)
    right = 100 * float((np.array([7, 1, 8])[scores.argmax(axis=1)] == test.labels[chosen]).mean())
    entry = manifest["artifacts"][0]["accuracy"]
    assert (entry["value"], entry["n"]) == (pytest.approx(right, abs=1e-3), chosen.sum())
    assert right > 97
    assert manifest["float"]["accuracy"] == pytest.approx(right, abs=1)


def test_verify_measures_on_the_same_classes(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(sample), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    assert found["files"][0]["accuracy"]["n"] == json.loads((sample / "manifest.json").read_text())["float"]["n"]


@pytest.mark.parametrize(
    ("classes", "found"), [("0,9", "known are 0, 1, 2, 3"), ("1", "at least two"), ("0,1,2=-1", "above 0")]
)
def test_bad_classes_are_one_line(
    classes: str,
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = Place(tmp_path, monkeypatch)
    assert main([*place.command(), "--classes", classes]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert found in error
    assert not (tmp_path / "out").exists()
