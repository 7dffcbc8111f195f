"""The checkpoint of a recovery: it goes on with what it was made for; anything else in the file is one clear line."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp.cli import main
from edgecomp.errors import BundleError, UsageError
from edgecomp.pytorch import finetune as tuning
from edgecomp.pytorch.finetune import split
from edgecomp.pytorch.progress import SCHEMA, Settings, check
from tests.graphs import plain
from tests.test_finetune import labelled, tuned
from tests.tiny import Place


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """The checkpoint of an interrupted recovery."""
    path = tmp_path / "part"

    def interrupt(n: int) -> None:
        if n:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(path, progress=interrupt)
    return path


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"graph": plain(seed=5)}, "model"),
        ({"bits": 3}, "plan"),
        ({"n": 256}, "training images"),
        ({"seed": 3}, "seed was 0, is 3"),
        ({"epochs": 3}, "epochs was 2, is 3"),
        ({"room": None}, "room"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(changed: dict[str, object], found: str, part: Path) -> None:
    before = part.read_bytes()
    with pytest.raises(UsageError, match=f"something else: .*{found}.*--checkpoint") as caught:
        tuned(part, **changed)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert part.read_bytes() == before


def test_early_check(part: Path, tmp_path: Path) -> None:
    def key(seed: int = 0, **options: str) -> dict[str, str]:
        train, _ = split(labelled(plain(), 512), seed=0)
        return Settings(epochs=2, seed=seed, room=1.0, options=options).key(plain(), train)

    check(part, key())
    check(tmp_path / "none", key(seed=1))
    with pytest.raises(UsageError, match="something else: seed was 0, is 1"):
        check(part, key(seed=1))
    with pytest.raises(UsageError, match="something else: format was not said, is onnx"):
        check(part, key(format="onnx"))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"mine" * 99])
def test_a_damaged_checkpoint_is_refused(damage: Callable[[bytes], bytes], part: Path) -> None:
    part.write_bytes(damage(part.read_bytes()))
    with pytest.raises(BundleError, match="no checkpoint of a recovery, or damaged"):
        tuned(part)


def test_a_checkpoint_runs_no_code(part: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"schema": SCHEMA, "key": Trap(), "state": {}}, part)
    with pytest.raises(BundleError, match="damaged"):
        tuned(part)
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder, expected a file"):
        check(tmp_path, {})
    with pytest.raises(UsageError, match="is no folder; name another --checkpoint"):
        check(tmp_path / "missing" / "file", {})


# ---- what torch can read and we did not write ------------------------------------------------------------------------

VALUES: dict[str, object] = {
    "nothing": None,
    "a flag": True,
    "below": -1,
    "beyond": 10**9,
    "a fraction": -2.5,
    "not a number": float("nan"),
    "text": "x",
    "a list": [],
    "a dictionary": {},
    "numbered": {0: torch.zeros(1)},
    "a tensor": torch.zeros(3),
    "whole": torch.zeros(8, dtype=torch.int64),
    "complex": torch.zeros(8, dtype=torch.complex64),
    "sparse": torch.zeros(8, 1).to_sparse(),
    "without values": torch.zeros(8, device="meta"),
}
OTHER_VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "not finite": lambda t: torch.full_like(t, float("nan")),
    "longer": lambda t: torch.cat([t, t]),
    "flat": lambda t: t.flatten()[None],
    "double": lambda t: t.double(),
}
IMPOSSIBLE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "latent": lambda t: t + 1e6,
    "gain": lambda t: t - 100,
    "square": lambda t: t - 1,
    "borders": lambda t: t.flip(0),
}


def paths(value: object, here: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The way to everything in nested dictionaries."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield (*here, name)
            yield from paths(inner, (*here, name))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A place for checkpoints, and what stands in a good one."""
    path = tmp_path_factory.mktemp("fuzz") / "c"

    def interrupt(n: int) -> None:
        if n:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(path, progress=interrupt)
    return path, torch.load(path, weights_only=True)


def changes(good: dict[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """Every place in a checkpoint, with everything that can be done to it."""
    found = []
    for way in paths(good):
        old: Any = good
        for name in way:
            old = old[name]
        kinds = ["removed", "renamed", *VALUES]
        if isinstance(old, torch.Tensor):
            kinds += [kind for kind in OTHER_VALUES if old.is_floating_point()]
            kinds += [kind for kind in IMPOSSIBLE if way[-1].endswith(kind)]
        found += [(way, kind) for kind in kinds]
    return found


@settings(deadline=None, max_examples=150)
@given(number=st.integers(0, 1 << 20))
def test_whatever_else_stands_in_it_is_refused_in_one_line(written: tuple[Path, dict[str, Any]], number: int) -> None:
    path, good = written
    known = changes(good)
    way, kind = known[number % len(known)]
    found: Any = copy.deepcopy(good)
    inner = found
    for name in way[:-1]:
        inner = inner[name]
    old = inner.pop(way[-1])
    if kind == "renamed":
        inner["other"] = old
    elif kind in VALUES:
        inner[way[-1]] = VALUES[kind]
    elif kind != "removed":
        inner[way[-1]] = (OTHER_VALUES | IMPOSSIBLE)[kind](old)
    torch.save(found, path)
    with pytest.raises((BundleError, UsageError)) as caught:
        tuned(path)
    assert "\n" not in str(caught.value), (way, kind)
    assert caught.type is BundleError or way[0] == "key", (way, kind)


@pytest.mark.parametrize("value", sorted(VALUES))
def test_a_file_of_one_value_is_refused(value: str, written: tuple[Path, dict[str, Any]]) -> None:
    torch.save(VALUES[value], written[0])
    with pytest.raises(BundleError, match="damaged"):
        tuned(written[0])


# ---- through the command line ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        here = Place(tmp_path_factory.mktemp("place"), patch)
        step = tuning._Work.step

        def interrupted(work: tuning._Work) -> int:
            if work.done == 2:
                raise KeyboardInterrupt
            return step(work)

        patch.setattr(tuning._Work, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main([*recovery(here), "-o", "out"])
        yield here


def recovery(place: Place) -> list[str]:
    return [*place.command()[:-2], "--avg-bits", "3", "--format", "onnx", "--recover", "2", "--checkpoint", "kept"]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--avg-bits", "4"], "budget was avg_bits 3, is avg_bits 4"),
        (["--recover", "3"], "epochs was 2, is 3"),
        (["--seed", "1"], "seed was 0, is 1"),
        (["--format", "tflite"], "formats was onnx, is tflite"),
        (["--score", "wanda"], "score was"),
        (["--rule", "gamma"], "score was"),
        (["--start", "one"], "score was"),
        (["--classes", "0,1"], "classes was not said, is 2 of 4 classes: 0,1"),
        (["--prune", "0.5"], "pruning was zero, is 0.5"),
        (["--calib", "50"], "calibration was 64, is 50"),
        (["--io", "int8"], "io was float, is int8"),
        (["--no-reconstruct"], "reconstruction was"),
        (["--pad", "0", "--mean", "0.1"], "input was"),
        (["--data", "npz:other.npz"], "training images was"),
    ],
)
def test_other_options_are_refused_before_the_work(
    options: list[str],
    found: str,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place.folder)
    data = dict(np.load("data.npz"))
    np.savez("other.npz", **{**data, "x_train": data["x_train"][::-1]})
    monkeypatch.setattr("edgecomp.build.pruned", None)
    monkeypatch.setattr("edgecomp.build._explain", None)
    capsys.readouterr()
    assert main([*recovery(place), *options, "-o", "out"]) == 2
    error = capsys.readouterr().err
    assert f"kept: holds the recovery of something else: {found}" in error
    assert error.count("\n") == 1
