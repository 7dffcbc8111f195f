"""What a process of `test_sharing` does: score, calibrate, fine-tune and build. Run by torchrun.

The folder holds what `tests.tiny` puts there.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from edgecomp.cli import main as edgecomp
from edgecomp.graph import Array
from edgecomp.pytorch import finetune as finetuning
from edgecomp.pytorch import sums
from edgecomp.pytorch.calibrate import calibrate
from edgecomp.pytorch.finetune import Recovered, finetune
from edgecomp.pytorch.progress import Settings
from edgecomp.pytorch.relevance import score, score_channels
from edgecomp.pytorch.rules import parse_composite
from edgecomp.pytorch.scores import Score, score_by
from edgecomp.pytorch.sharing import place
from tests.graphs import GRAPHS, images, plain
from tests.test_finetune import labelled, rounded

N = 22
RATE = 0.02
"""Of fine-tuning: so that a few updates change some codes."""
N_TRAIN = 161
"""The last batch has 33 images: one process more than the other."""
MODEL = ["tinymodels:tiny", "--weights", "tiny.pt", "--calib", "64", "--format", "onnx"]
DATA = ["--data", "npz:data.npz"]
BUILDS = {
    "plain": [*DATA, "--avg-bits", "4"],
    "pruned": [*DATA, "--avg-bits", "2.5", "--prune", "0.3", "--recover", "1"],
    "dropped": [*DATA, "--max-drop", "5", "--prune", "auto", "--score", "wanda"],
}
REFUSED = {
    "plain": [*DATA, "--avg-bits", "4"],  # the folder is there already
    "small": [*DATA, "--avg-bits", "0.2"],
    "without": ["--data", "npz:data-{rank}.npz"],  # only the first has it
}


def batches() -> list[tuple[Array, Array]]:
    """Eight batches, the last one smaller."""
    x = images(GRAPHS["separable"](), N)
    labels = np.random.default_rng(2).integers(0, 10, N)
    return [(x[i : i + 3], labels[i : i + 3]) for i in range(0, N, 3)]


def stream() -> Iterator[tuple[Array, Array]]:
    """The same, not as a list."""
    yield from batches()


def findings(checkpoint: Path | None) -> dict[str, Array]:
    """Every number that scoring and calibrating give."""
    graph, found = GRAPHS["separable"](), {}
    asked = {
        "default": score(graph, batches(), checkpoint=checkpoint),
        "double": score(graph, stream, dtype=torch.float64, composite=parse_composite("epsilon-plus-flat")),
        "more": score(graph, batches(), class_weights=np.arange(10) * 0.5, per_class=True, per_activation=True),
    }
    for title, relevance in asked.items():
        found[f"{title} n"] = np.array(relevance.n_samples)
        for name, layer in relevance.layers.items():
            found |= {f"{title} {name} {f}": getattr(layer, f) for f in layer.__dataclass_fields__}
        for name, activation in relevance.activations.items():
            found[f"{title} {name} activation"] = activation.mean
        if relevance.per_class is not None:
            found |= {f"{title} {name} class": a for name, a in relevance.per_class.channel_abs.items()}
    # One batch: the other process has nothing to look at.
    for title, given in (("ranges", [x for x, _ in batches()]), ("one batch", [batches()[0][0]])):
        ranges = calibrate(graph, given)
        found |= {f"{title} {name}": np.array([r.low, r.high]) for name, r in ranges.items()}
    found |= {f"channels {name}": value for name, value in score_channels(graph, batches()).items()}
    for kind in (Score.WANDA, Score.DEEPLIFT):
        for name, layer in score_by(kind, graph, batches()).layers.items():
            found |= {f"{kind} {name} {f}": getattr(layer, f) for f in layer.__dataclass_fields__}
    return found


def tuned(checkpoint: Path) -> Recovered:
    """Fine-tune for two epochs of three updates."""
    graph = plain()
    train, held_out = labelled(graph, N_TRAIN), labelled(graph, 64, seed=8)
    compressed = rounded(graph, 4)
    settings = Settings(epochs=2, seed=0, room=1.0)
    return finetune(graph, graph, *compressed, train, held_out, settings=settings, checkpoint=checkpoint)


def built(arguments: list[str], folder: str) -> dict[str, object]:
    """Build through the command line, in the folder one stands in: exit code and what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = edgecomp(["build", *MODEL, *(a.format(rank=place()[0]) for a in arguments), "-o", folder])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def main(folder: Path) -> None:
    """Write findings to files with the process's number in their names."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sums._WIDE_ELEMENTS, finetuning._WEIGHT_RATE = 100, RATE
    finetuning._multiplies_halves = lambda device: False
    found = findings(folder / "sums.npz")
    rank, n = place()
    np.savez(folder / f"found-{rank}-of-{n}.npz", **found)
    recovered = tuned(folder / f"tuned-{rank}.recover")
    parameters = {name: t.data for name, t in recovered.graph.tensors.items() if t.data is not None}
    np.savez(folder / f"tuned-{rank}-of-{n}.npz", divergences=[recovered.before, recovered.after], **parameters)
    runs = [built(arguments, name) for group in (BUILDS, REFUSED) for name, arguments in group.items()]
    (folder / f"built-{rank}-of-{n}.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
