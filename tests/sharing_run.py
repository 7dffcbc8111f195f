"""What a process of `test_sharing` does: score and calibrate, and write what it found. Run by torchrun."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from edgecomp.graph import Array
from edgecomp.pytorch import sums
from edgecomp.pytorch.calibrate import calibrate
from edgecomp.pytorch.relevance import score
from edgecomp.pytorch.rules import parse_composite
from edgecomp.pytorch.sharing import place
from tests.graphs import GRAPHS, images

N = 22


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
    return found


def main(folder: Path) -> None:
    """Write findings to a file with the process's number in its name."""
    sums._WIDE_ELEMENTS = 100
    found = findings(folder / "sums.npz")
    rank, n = place()
    np.savez(folder / f"found-{rank}-of-{n}.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
