"""What comes into a build: a model and images, read and found to fit each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgecomp.data import TEST_SHARE, LabelledImages, load
from edgecomp.errors import DataError, UsageError
from edgecomp.graph import Array, Graph
from edgecomp.preprocessing import Preprocessing
from edgecomp.selection import parse_classes, select_classes

if TYPE_CHECKING:
    from edgecomp.check import Stage
    from edgecomp.data import DataSet


def sample(preprocessing: Preprocessing | None) -> tuple[str, Path, Preprocessing]:
    """Name the bundled model, its weights, and what to do to images: what is asked for, or the sample's own."""
    from edgecomp.samples import sample_files

    files = sample_files()
    own = Preprocessing.from_json(files.record["preprocessing"], "sample.json")
    return files.record["model"], files.weights, preprocessing or own


def load_images(
    data: str, test_share: float | None, seed: int, preprocessing: Preprocessing, stage: Stage
) -> DataSet:
    """Read images as `data.load` does, and show how far it is.

    Raises:
        DataError: as `data.load`.
        UsageError: as there, or a share was asked for of data that have a test part.
    """

    def progress(items: Sequence[object], total: int, what: str) -> Iterator[object]:
        with stage(what, total) as advance:
            for item in items:
                yield item
                advance(1)

    images = load(
        data,
        seed=seed,
        resize=preprocessing.resize,
        test_share=TEST_SHARE if test_share is None else test_share,
        progress=progress,  # type: ignore[arg-type]
    )
    if test_share is not None and not images.held_out:
        raise UsageError(f"--test-share is of data without a test part, and {data} has one; leave it out")
    return images


def input_shape(
    images: LabelledImages, preprocessing: Preprocessing, asked: tuple[int, int, int] | None
) -> tuple[int, int, int]:
    """Give (C, H, W) of the preprocessed images.

    Raises:
        DataError: another shape was asked for.
    """
    channels, height, width = images.inputs(preprocessing, 0, 1).shape[1:]
    found = (channels, height, width)
    if asked is not None and asked != found:
        raise DataError(
            f"images are {_dims(found)} after preprocessing, --input-shape says {_dims(asked)}; "
            "change --resize, --crop or --pad, or the images"
        )
    return found


def _dims(shape: tuple[int, int, int]) -> str:
    return ",".join(map(str, shape))


def capture(model: str, weights: Path | None, shape: tuple[int, int, int], images: DataSet, stage: Stage) -> Graph:
    """Read a model into a float graph.

    Raises:
        DataError: it has fewer outputs than the images have classes.
        EdgecompError: as `pytorch.load.load_module` and `pytorch.capture.capture`.
    """
    from edgecomp.pytorch.capture import capture
    from edgecomp.pytorch.load import load_module

    with stage("reading the model", 2) as advance:
        module = load_module(model, weights)
        advance(1)
        graph = capture(module, shape, name=model.rpartition(":")[2] or model)
        advance(1)
    outputs = int(np.prod(graph.tensors[graph.outputs[0]].shape))
    labels = 1 + max(int(images.train.labels.max()), int(images.test.labels.max()))
    if labels > outputs:
        raise DataError(f"labels go up to {labels - 1}, the model has {outputs} outputs; are these its images?")
    return graph


def graph_of(model: str, weights: Path | None, shape: tuple[int, int, int] | None, stage: Stage) -> Graph:
    """Read a model for its layers alone: without weights it is untrained, with torchvision's own number of classes.

    Args:
        model: as `pytorch.load.load_module` takes it.
        weights: as there.
        shape: (C, H, W) of its input; None for torchvision's 3,224,224.
        stage: shows how far the work is.

    Raises:
        DataError: there is no such file.
        UsageError: the shape is missing.
        EdgecompError: as `pytorch.load.load_module` and `pytorch.capture.capture`.
    """
    from edgecomp.pytorch.capture import capture
    from edgecomp.pytorch.load import load_module, untrained

    if ":" not in model and not Path(model).exists():
        raise DataError(f"{model}: no such file; expected a file or folder that edgecomp wrote, or a model")
    with stage("reading the model", 2) as advance:
        module = untrained(model) if weights is None else load_module(model, weights)
        # Only now: of a model that is not there no shape is needed.
        if shape is None and not model.startswith("torchvision:"):
            raise UsageError(
                f"{model}: what shape its input has is not known; give --input-shape C,H,W, e.g. 3,224,224"
            )
        advance(1)
        graph = capture(module, shape or (3, 224, 224), name=model.rpartition(":")[2] or model)
        advance(1)
    return graph


def select(graph: Graph, images: DataSet, classes: str | None) -> tuple[Graph, DataSet, Array | None]:
    """Keep what the chosen classes need: their outputs, their images, and their weights where these differ.

    Raises:
        UsageError: see `selection.parse_classes`.
    """
    if classes is None:
        return graph, images, None
    chosen = parse_classes(classes, images.classes)
    return select_classes(graph, chosen.indices), images.of_classes(chosen.indices), chosen.class_weights()


def chosen_text(classes: str, original: Graph, selected: Graph) -> str:
    """Say how many of the classes were chosen, and which: "2 of 10 classes: cat,dog=2"."""
    n, n_all = (int(np.prod(graph.tensors[graph.outputs[0]].shape)) for graph in (selected, original))
    return f"{n} of {n_all} classes: {classes}"
