"""Recovery by fine-tuning: it helps, it goes on where it was interrupted, and it refuses what it cannot go on from."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgecomp.cli import main
from edgecomp.compress import cut, on_grids
from edgecomp.data import LabelledImages
from edgecomp.errors import DataError, UsageError
from edgecomp.graph import Graph
from edgecomp.plan import CompressionPlan
from edgecomp.preprocessing import Preprocessing
from edgecomp.pytorch import finetune as tuning
from edgecomp.pytorch.finetune import Recovered, divergence, finetune, split
from edgecomp.pytorch.network import Network, accuracy
from edgecomp.pytorch.progress import Settings
from edgecomp.pytorch.rebuild import Layer, Rebuilt, entropy_bits
from edgecomp.quantmath import Grid
from tests.graphs import Build, images, plain, plan_for, separable
from tests.tiny import Place


@pytest.fixture(autouse=True)
def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests have time for few updates: each goes further."""
    monkeypatch.setattr(tuning, "_WEIGHT_RATE", 0.02)


def labelled(graph: Graph, n: int, seed: int = 7) -> LabelledImages:
    """Noise, labelled by the float network itself: what is lost by rounding can be seen in it."""
    x = images(graph, n, seed=seed)
    with torch.no_grad():
        labels = Network(graph)(torch.from_numpy(x)).flatten(1).argmax(1).numpy()
    return LabelledImages(images=x, labels=labels)


def rounded(graph: Graph, bits: int) -> tuple[Graph, CompressionPlan]:
    """Rounded to a coarse grid, as for storage by frequency: mostly zeros, and much is lost."""
    found = on_grids(graph, {node.name: Grid(bits=bits, step=2.0) for node in graph.layers()})
    return found, replace(plan_for(graph, bits), graph_digest=found.digest())


def tuned(
    checkpoint: Path,
    *,
    graph: Graph | None = None,
    bits: int = 4,
    epochs: int = 2,
    n: int = 512,
    seed: int = 0,
    room: float | None = 1.0,
    progress: Callable[[int], object] | None = None,
) -> Recovered:
    graph = graph or plain()
    train, held_out = split(labelled(graph, n), seed=0)
    return finetune(
        graph,
        graph,
        *rounded(graph, bits),
        train,
        held_out,
        settings=Settings(epochs=epochs, seed=seed, room=room),
        checkpoint=checkpoint,
        progress=progress,
    )


def test_it_recovers_at_the_same_entropy(tmp_path: Path) -> None:
    graph = plain()
    seen: list[int] = []
    start = rounded(graph, 4)
    found = tuned(tmp_path / "c", graph=graph, epochs=6, n=1024, progress=seen.append)
    assert found.kept
    assert found.after < 0.5 * found.before
    assert sum(seen) == 6 * (1024 - 128)
    # On images of another seed, and by the module made anew of what was written.
    fresh = labelled(graph, 512, seed=99)
    x = torch.from_numpy(np.array(fresh.images))
    right = []
    for module in (Rebuilt(*start), Rebuilt(found.graph, found.plan)):
        with torch.no_grad():
            right.append(float((module(x).argmax(1).numpy() == fresh.labels).mean()))
    assert right[1] > right[0] + 0.05
    assert entropy(found.graph, found.plan) <= entropy(*start) * (1 + 1e-6)


def entropy(graph: Graph, plan: CompressionPlan) -> float:
    layers = Rebuilt(graph, plan).layers
    return sum(entropy_bits(layer.histogram()) for layer in layers if isinstance(layer, Layer))


def test_codes_may_spread_where_each_is_stored_in_full(tmp_path: Path) -> None:
    free = tuned(tmp_path / "free", room=None)
    held = tuned(tmp_path / "held", room=0.97)
    before = entropy(*rounded(plain(), 4))
    assert free.kept
    assert held.kept
    assert entropy(held.graph, held.plan) <= 0.97 * before * (1 + 1e-6)
    assert entropy(free.graph, free.plan) > before


def test_what_is_worse_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_WEIGHT_RATE", 5.0)
    graph = plain()
    train, held_out = split(labelled(graph, 512), seed=0)
    settings = Settings(epochs=1, seed=0, room=1.0)
    found = finetune(
        graph, graph, graph, plan_for(graph, 6), train, held_out, settings=settings, checkpoint=tmp_path / "c"
    )
    assert not found.kept
    assert found.after > found.before
    assert found.graph is graph


@pytest.mark.parametrize("make", [plain, separable])
def test_interrupted_gives_the_same_as_not(
    make: Callable[[], Graph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Often enough for borders that moved to be in the checkpoint.
    monkeypatch.setattr(tuning, "_ROOM_EVERY", 2)
    whole = tuned(tmp_path / "whole", graph=make())
    calls = iter(range(100))

    def interrupt(n: int) -> None:
        if next(calls) == 9:  # within the second epoch: the first call comes before all steps
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"goes on from .*part, which holds 9 of 14 steps"):
        tuned(tmp_path / "part", graph=make(), progress=interrupt)
    seen: list[int] = []
    again = tuned(tmp_path / "part", graph=make(), progress=seen.append)
    assert seen[0] == 9 * 64
    assert again.graph.digest() == whole.graph.digest()
    assert again.plan.to_json() == whole.plan.to_json()
    # What is complete is not trained again, should the interruption come later.
    once_more = tuned(tmp_path / "part", graph=make(), progress=seen.append)
    assert seen[-1] == 2 * 448
    assert once_more.graph.digest() == whole.graph.digest()


def test_answers_are_the_teachers_and_leanings_those_of_the_cut_graph(tmp_path: Path) -> None:
    teacher = plain(seed=5)
    keep = {node.name: (True,) * plain().weight(node).shape[0] for node in plain().layers()}
    original = cut(plain(), {**keep, "conv1": (*keep["conv1"][1:], False)})
    compressed, plan = rounded(original, 4)
    train, cpu = labelled(teacher, 64), torch.device("cpu")
    settings = Settings(epochs=2, seed=0, room=None)
    work = tuning._Work(teacher, original, compressed, plan, train, settings=settings, masks={}, device=cpu)
    latent, layer = work.student.layer("conv1").latent.detach().numpy(), work.student.layer("conv1")
    first, code = original.tensors["conv1.weight"].data, layer.codes().numpy()
    assert first is not None
    leaning = np.clip(first / layer.scale.numpy()[:, None, None, None] - code, -0.2, 0.2)
    np.testing.assert_allclose(latent, code + leaning, atol=1e-6)
    work._half = False
    x = torch.from_numpy(np.array(train.images))
    with torch.no_grad():
        wanted = Network(teacher)(x).flatten(1)
    np.testing.assert_allclose(work._answer(x).numpy(), wanted.numpy(), atol=1e-5)


def test_where_nothing_can_be_trained_it_says_so(tmp_path: Path) -> None:
    b = Build(0, (3, 8, 8))
    graph = b.graph(b.conv("c", "input", 4, bias=False))
    train, held_out = split(LabelledImages(images=images(graph, 64), labels=np.arange(64) % 2), seed=0)
    settings = Settings(epochs=1, seed=0, room=None)
    with pytest.raises(UsageError, match="nothing can be trained"):
        finetune(graph, graph, graph, plan_for(graph, 8), train, held_out, settings=settings, checkpoint=tmp_path / "c")


def test_another_seed_is_another_result(tmp_path: Path) -> None:
    assert tuned(tmp_path / "1", seed=1).graph.digest() != tuned(tmp_path / "2", seed=2).graph.digest()


def test_divergence_is_kullback_leibler() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, 4))
    p, q = (np.exp(v / 3) / np.exp(v / 3).sum(1, keepdims=True) for v in (b, a))
    found = divergence(torch.from_numpy(a), torch.from_numpy(b), 3.0)
    assert float(found) == pytest.approx(9 * (p * np.log(p / q)).sum() / 5)


def test_split_needs_images() -> None:
    few = LabelledImages(images=np.zeros((7, 4, 4), dtype=np.uint8), labels=np.zeros(7, dtype=np.int64))
    with pytest.raises(DataError, match="at least 8 training images, there are 7"):
        split(few, seed=0)


def test_the_bundled_network_recovers(tmp_path: Path) -> None:
    """All weights at 2 bits to the nearest code: little is left, and a few images bring much of it back."""
    from edgecomp.data import draw, load
    from edgecomp.plan import ActRange, LayerPlan
    from edgecomp.pytorch.calibrate import calibrate
    from edgecomp.pytorch.capture import capture
    from edgecomp.pytorch.load import load_module
    from edgecomp.samples import sample_files

    files, data = sample_files(), load("sample")
    graph = capture(load_module(files.record["model"], files.weights), (1, 32, 32), name="resnet8")
    p = Preprocessing.from_json(files.record["preprocessing"], "sample.json")
    ranges: dict[str, ActRange] = dict(calibrate(graph, [data.train.inputs(p, 0, 64)]))
    layers = {
        node.name: LayerPlan(keep=(True,) * graph.weight(node).shape[0], weight_bits=2) for node in graph.layers()
    }
    plan = CompressionPlan(
        graph_digest=graph.digest(), io=plan_for(plain()).io, layers=layers, ranges=ranges, preprocessing=p
    )
    test = draw(data.test, 300, seed=0)
    train, held_out = split(data.train, seed=0)
    assert accuracy(graph, test, p) > 88
    settings = Settings(epochs=2, seed=0, room=1.0)
    found = finetune(graph, graph, graph, plan, train, held_out, settings=settings, checkpoint=tmp_path / "c")
    x, right = torch.from_numpy(test.inputs(p)), []
    for g, q in ((graph, plan), (found.graph, found.plan)):
        with torch.no_grad():
            right.append(100 * float((Rebuilt(g, q)(x).argmax(1).numpy() == test.labels).mean()))
    assert right[1] > right[0] + 10


# ---- through the command line ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        yield Place(tmp_path_factory.mktemp("place"), patch)


BUDGETS = {"avg bits": ["--avg-bits", "2"], "max size": ["--max-size", "4800"], "max drop": ["--max-drop", "30"]}


@pytest.mark.parametrize("budget", BUDGETS)
def test_build_recovers(budget: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    out = tmp_path / "out"
    argv = [*place.command()[:-1], str(out), *BUDGETS[budget], "--format", "onnx", "--recover", "2"]
    assert main(argv) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    made_by = json.loads((out / "plan.json").read_text())["made_by"]
    assert made_by["recovery"].startswith("2 epochs of ")
    assert "held out" in made_by["recovery"]
    assert main(["verify", str(out)]) == 0
    if budget == "max size":
        assert (out / "model.onnx").stat().st_size <= 4800


def test_the_uncut_network_teaches(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With channels cut and for some of the classes: the answers are those of the network before any channel went."""
    monkeypatch.chdir(place.folder)
    seen: list[tuple[Graph, Graph]] = []

    def spied(teacher: Graph, original: Graph, *others: object, **more: object) -> Recovered:
        seen.append((teacher, original))
        return finetune(teacher, original, *others, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(tuning, "finetune", spied)
    argv = [*place.command()[:-1], str(tmp_path / "out"), "--avg-bits", "4", "--format", "onnx", "--recover", "1"]
    assert main([*argv, "--classes", "0,2,3", "--prune", "0.4"]) == 0
    (teacher, original), = seen
    trained = torch.load(place.folder / "tiny.pt", weights_only=True)
    shapes = {name: t.shape for name, t in teacher.tensors.items() if t.data is not None}
    assert shapes["conv2.weight"] == trained["conv2.weight"].shape
    found = teacher.tensors["fc.weight"].data
    assert found is not None
    np.testing.assert_array_equal(found, trained["fc.weight"][[0, 2, 3]].numpy())
    cut_weights = sum(t.data.size for t in original.tensors.values() if t.data is not None and t.data.ndim > 1)
    assert cut_weights < 0.61 * sum(np.prod(shape) for shape in shapes.values() if len(shape) > 1)


def test_build_goes_on_after_ctrl_c(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place.folder)
    command = [*place.command()[:-2], "--avg-bits", "2", "--format", "onnx", "--recover", "4", "-o"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    step = tuning._Work.step

    def interrupted(work: tuning._Work) -> int:
        if work.done == 5:
            signal.raise_signal(signal.SIGINT)
        return step(work)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(tuning._Work, "step", interrupted)
        assert main([*command, str(tmp_path / "part")]) == 130
    error = capsys.readouterr().err
    assert error.startswith("edgecomp: interrupted; the same command goes on from")
    assert "part.recover, which holds 5 of 12 steps" in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.recover", "whole"]
    assert main([*command, str(tmp_path / "part")]) == 0
    for name in ("model.onnx", "plan.json"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "part.recover").exists()


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--recover", "-1"], "--recover -1: expected epochs"),
        (["--checkpoint", "c"], "--checkpoint without --recover"),
        (["--recover", "1", "--checkpoint", "nowhere/c"], "is no folder"),
        (["--recover", "1", "--checkpoint", "tiny.pt"], "no checkpoint of a recovery"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str],
    found: str,
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place.folder)
    assert main([*place.command()[:-1], str(tmp_path / "x"), *arguments]) == 2
    error = capsys.readouterr().err
    assert found in error
    assert error.count("\n") == 1
