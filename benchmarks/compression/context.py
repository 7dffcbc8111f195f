"""What every method is handed: one checkpoint, one data set, and what is computed from them once for all methods."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edgecomp.data import DataSet, LabelledImages, draw, load
from edgecomp.errors import UsageError
from edgecomp.graph import Array, Graph
from edgecomp.plan import ActRange, Relevance
from edgecomp.preprocessing import Preprocessing

BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The checkpoint and the images of a comparison.

    Attributes:
        model: torchvision:NAME or package.module:factory; see `pytorch.load.load_module`.
        weights: its file.
        data: see `data.load`.
        preprocessing: what turns pixels into input.
        n_calibration: training images that a method may look at.

    Raises:
        UsageError: a number is out of range.
    """

    model: str
    weights: Path
    data: str
    preprocessing: Preprocessing
    n_calibration: int

    def __post_init__(self) -> None:
        if self.n_calibration < 1:
            raise UsageError(f"--calib {self.n_calibration}: expected at least 1")

    def to_json(self) -> dict[str, Any]:
        """Give what all results of one table share.

        Raises:
            UsageError: the file of weights cannot be read.
        """
        try:
            weights = hashlib.sha256(self.weights.read_bytes()).hexdigest()
        except OSError as error:
            raise UsageError(f"--weights {self.weights}: {error.strerror}; expected a file") from error
        return {
            "model": self.model,
            "weights_sha256": weights,
            "data": self.data,
            "preprocessing": self.preprocessing.to_json(),
            "n_calibration": self.n_calibration,
        }


class Context:
    """Reads, captures and explains when first asked, and keeps it: a table of finished results needs none of it.

    Attributes:
        subject: what all this is about.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._seed: int | None = None
        self._of_seed: dict[str, Any] = {}

    @cached_property
    def images(self) -> DataSet:
        """The data set."""
        return load(self.subject.data, resize=self.subject.preprocessing.resize)

    @cached_property
    def module(self) -> Any:
        """The float network as a torch.nn.Module."""
        from edgecomp.pytorch.load import load_module

        if self.subject.model.endswith(".pt2"):
            raise UsageError(f"{self.subject.model}: peers cannot take a .pt2 file; name a package.module:factory")
        return load_module(self.subject.model, self.subject.weights)

    @cached_property
    def graph(self) -> Graph:
        """The float network, BatchNorm folded."""
        from edgecomp.pytorch.capture import capture

        _, channels, height, width = self.images.test.inputs(self.subject.preprocessing, 0, 1).shape
        name = self.subject.model.rpartition(":")[2]
        graph: Graph = capture(self.module, (channels, height, width), name=name)
        return graph

    @cached_property
    def float_file(self) -> bytes:
        """The float network as ONNX, by our own exporter."""
        from edgecomp.exporters import export

        data: bytes = export(self.graph, "onnx").data
        return data

    def calibration(self, seed: int) -> LabelledImages:
        """Draw the training images of a seed: the same ones that `edgecomp build --seed` draws."""
        return draw(self.images.train, self.subject.n_calibration, seed=seed)

    def batches(self, seed: int) -> list[Array]:
        """Give the images of a seed, preprocessed: float32 (n, C, H, W)."""

        def make() -> list[Array]:
            train = self.calibration(seed)
            return [train.inputs(self.subject.preprocessing, i, i + BATCH) for i in range(0, len(train), BATCH)]

        batches: list[Array] = self.kept(seed, "batches", make)
        return batches

    def scored(self, seed: int, kind: str) -> Relevance:
        """Score the images of a seed by one of `pytorch.scores.Score`."""

        def make() -> Relevance:
            from edgecomp.pytorch.scores import Score, score_by

            labels, batches = self.calibration(seed).labels, self.batches(seed)
            labelled = [(x, labels[i * BATCH : i * BATCH + len(x)]) for i, x in enumerate(batches)]
            return score_by(Score(kind), self.graph, labelled, seed=seed)

        relevance: Relevance = self.kept(seed, f"scored {kind}", make)
        return relevance

    def trials(self, seed: int) -> Mapping[str, Any]:
        """Round every layer to every grid on the images of a seed: layer name -> `pytorch.trial.Trial`."""

        def make() -> Mapping[str, Any]:
            from edgecomp.pytorch.trial import try_grids

            return try_grids(self.graph, self.batches(seed), ("onnx",))

        trials: Mapping[str, Any] = self.kept(seed, "trials", make)
        return trials

    def ranges(self, seed: int) -> Mapping[str, ActRange]:
        """Give the range of every activation on the images of a seed."""

        def make() -> Mapping[str, ActRange]:
            from edgecomp.pytorch.calibrate import calibrate

            return calibrate(self.graph, self.batches(seed))

        ranges: Mapping[str, ActRange] = self.kept(seed, "ranges", make)
        return ranges

    def kept(self, seed: int, what: str, make: Callable[[], Any]) -> Any:
        """Make something once for a seed; what belongs to the seed before is let go."""
        if self._seed != seed:
            self._seed, self._of_seed = seed, {}
        if what not in self._of_seed:
            self._of_seed[what] = make()
        return self._of_seed[what]

    def hand_over(self, folder: Path, seed: int, *, takes_module: bool) -> dict[str, Any]:
        """Write what a peer needs into a folder, unless it is there: the part of a job that is equal for all peers.

        Raises:
            UsageError: a peer that wants the torch module cannot have it.
        """
        job: dict[str, Any] = {
            "seed": seed,
            "onnx": str(folder / "float.onnx"),
            "calibration": str(folder / f"calibration-{seed}.npz"),
            "test": str(folder / "test.npy"),
            "network": None,
        }
        if not Path(job["onnx"]).exists():
            Path(job["onnx"]).write_bytes(self.float_file)
        if not Path(job["calibration"]).exists():
            train = self.calibration(seed)
            np.savez(job["calibration"], x=train.inputs(self.subject.preprocessing), y=train.labels)
        if takes_module:
            if not Path(job["test"]).exists():
                np.save(job["test"], self.images.test.inputs(self.subject.preprocessing))
            job["network"] = self._network(folder / "weights.npz")
        return job

    def _network(self, weights: Path) -> dict[str, Any]:
        """Say how a peer builds the torch module, and write its weights."""
        source, _, name = self.subject.model.partition(":")
        if not weights.exists():
            np.savez(weights, **{key: value.numpy() for key, value in self.module.state_dict().items()})
        record: dict[str, Any] = {"weights": str(weights), "options": {}, "torchvision": None, "file": None}
        if source == "torchvision":
            n_classes = int(np.prod(self.graph.tensors[self.graph.outputs[0]].shape))
            return {**record, "torchvision": name, "options": {"num_classes": n_classes}}
        sys.path.insert(0, os.getcwd())  # as `load_module` does
        try:
            spec = importlib.util.find_spec(source)
        finally:
            sys.path.remove(os.getcwd())
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            raise UsageError(f"{self.subject.model}: peers find no .py file of it; expected package.module:factory")
        return {**record, "file": str(Path(spec.origin).absolute()), "factory": name}
