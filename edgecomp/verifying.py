"""Measure again what a built folder claims: digests, accuracy on the whole test split, parity with the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgecomp.artifact import AtRest, form_of
from edgecomp.check import LEAST_AGREEMENT_PERCENT, measure_accuracy, measure_parity, parity_by_layer
from edgecomp.compress import compress
from edgecomp.data import DataSet, load
from edgecomp.errors import DataError, ExportError
from edgecomp.files import OVERVIEW
from edgecomp.folder import BuiltFolder, open_folder
from edgecomp.provenance import tools
from edgecomp.report import Parity, table

if TYPE_CHECKING:
    from edgecomp.check import Stage

ACCURACY_TOLERANCE_POINTS = 0.2
"""How far accuracy may be from the manifest's: another processor's kernels may round single values otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """One file, measured again.

    Attributes:
        path: the file's name.
        claimed_percent: accuracy in the manifest.
        percent: accuracy now.
        n_images: of the test split.
        parity: of the outputs with the integer reference.
        agree_percent: images on which file and reference name the same class, ties aside.
        same_bytes: whether exporting plan and graph again gives the same bytes; None where the writer library is
            missing or of another version.
        by_layer: parity of every tensor inside; empty unless asked for.
    """

    path: str
    claimed_percent: float
    percent: float
    n_images: int
    parity: Parity
    agree_percent: float
    same_bytes: bool | None
    by_layer: Mapping[str, Parity]

    def faults(self) -> list[str]:
        """Say what is not as it should be."""
        found = []
        if abs(self.percent - self.claimed_percent) > ACCURACY_TOLERANCE_POINTS:
            found.append(f"accuracy is {self.percent:.2f} %, the manifest says {self.claimed_percent:.2f} %")
        if self.agree_percent < LEAST_AGREEMENT_PERCENT:
            found.append(f"names the reference's class on {self.agree_percent:.1f} % of images only")
        if self.same_bytes is False:
            found.append("exporting plan and graph again gives other bytes")
        return [f"{self.path}: {fault}" for fault in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """All files of a folder.

    Attributes:
        files: in the manifest's order.
        reference_percent: accuracy of the integer reference on the same images; None unless asked for.
    """

    files: tuple[Verified, ...]
    reference_percent: float | None = None

    @property
    def passed(self) -> bool:
        """Tell whether nothing is amiss."""
        return not any(file.faults() for file in self.files)

    def reason(self) -> str:
        """Say in one line what is amiss."""
        return "; ".join(fault for file in self.files for fault in file.faults())

    def table(self) -> str:
        """Give tables for people."""
        rows = [
            (
                f.path,
                f"{f.percent:.2f} %",
                f"{f.claimed_percent:.2f} %",
                f.n_images,
                f"{f.parity.equal_percent:.2f} %",
                f.parity.max_steps,
                f"{f.agree_percent:.1f} %",
                {True: "same", False: "DIFFER", None: "not compared"}[f.same_bytes],
                "; ".join(f.faults()) or "ok",
            )
            for f in self.files
        ]
        if self.reference_percent is not None:
            n_images = self.files[0].n_images
            rows.append(("integer reference", f"{self.reference_percent:.2f} %", "-", n_images, *"-----"))
        header = ("file", "accuracy", "claimed", "images", "equal", "max steps", "agree", "bytes again", "verdict")
        parts = [table(rows, header)]
        for f in self.files:
            if f.by_layer:
                # Rounded down: 100 % means all.
                layers = [
                    (name, f"{math.floor(1000 * p.equal_percent) / 1000:.3f} %", p.max_steps, p.n)
                    for name, p in f.by_layer.items()
                ]
                parts.append(f"{f.path}\n\n" + table(layers, ("tensor", "equal", "max steps", "values")))
        return "\n\n".join(parts)

    def to_json(self) -> dict[str, object]:
        """Give the same for machines."""

        def parity(p: Parity) -> dict[str, object]:
            return {"equal_percent": p.equal_percent, "max_steps": p.max_steps, "n": p.n}

        return {
            "passed": self.passed,
            "reference_percent": self.reference_percent,
            "files": [
                {
                    "path": f.path,
                    "accuracy": {"value": f.percent, "claimed": f.claimed_percent, "n": f.n_images},
                    "parity": {**parity(f.parity), "agree_percent": f.agree_percent},
                    "same_bytes": f.same_bytes,
                    "by_layer": {name: parity(p) for name, p in f.by_layer.items()},
                    "faults": f.faults(),
                }
                for f in self.files
            ],
        }


def verify(
    path: Path, *, data: str | None, per_layer: bool, reference: bool = False, stage: Stage
) -> Verification:
    """Measure a built folder again.

    Args:
        path: the folder.
        data: where the images are now; None for where the manifest says.
        per_layer: compare every tensor inside as well.
        reference: classify all test images by the integer reference, too, which is slow.
        stage: shows how far the work is.

    Raises:
        BundleError: a file is missing, damaged or changed.
        DataError: the images cannot be read or do not fit.
        TargetError: a runtime is missing.
    """
    folder = open_folder(path)
    files = {entry["path"]: folder.read(entry["path"]) for entry in folder.record["artifacts"]}
    images = _images(folder, data)
    quantized = compress(folder.graph, folder.plan)
    for name in folder.record["files"]:
        if name != OVERVIEW:
            folder.read(name)
    verified = []
    for entry in folder.record["artifacts"]:
        runtime = entry["accuracy"]["runtime"].split()[0]
        form = form_of(entry["format"], AtRest(entry.get("weights_at_rest", AtRest.NATIVE)))
        preprocessing = folder.plan.preprocessing
        with stage(f"{entry['path']} in {runtime}", len(images.test)) as advance:
            percent, n = measure_accuracy(files[entry["path"]], runtime, images.test, preprocessing, progress=advance)
        close, agreement = measure_parity(files[entry["path"]], runtime, quantized, images.test, preprocessing)
        layers = {}
        if per_layer:
            layers = dict(parity_by_layer(quantized, form, runtime, images.test, preprocessing))
        verified.append(
            Verified(
                path=entry["path"],
                claimed_percent=entry["accuracy"]["value"],
                percent=percent,
                n_images=n,
                parity=close,
                agree_percent=agreement,
                same_bytes=_same_bytes(folder, form, files[entry["path"]]),
                by_layer=layers,
            )
        )
    reference_percent = None
    if reference:
        with stage("integer reference", len(images.test)) as advance:
            reference_percent, _ = measure_accuracy(
                quantized, "reference", images.test, folder.plan.preprocessing, progress=advance
            )
    return Verification(files=tuple(verified), reference_percent=reference_percent)


def _images(folder: BuiltFolder, data: str | None) -> DataSet:
    seed, share = folder.record["seed"], folder.record["test_share"]
    resize = folder.plan.preprocessing.resize
    if data is not None:
        return _of_the_model(load(data, seed=seed, resize=resize, test_share=share), folder.plan.classes)
    try:
        found = load(folder.record["data"], seed=seed, resize=resize, test_share=share)
    except DataError as e:
        raise DataError(f"{e}; when the images have moved, or you have, say where they are with --data") from e
    return _of_the_model(found, folder.plan.classes)


def _of_the_model(images: DataSet, classes: tuple[str, ...]) -> DataSet:
    """Keep the classes of a model that was made for some of the data's."""
    if len(classes) in (0, len(images.classes)) and set(classes) != set(images.classes):
        return images  # the same classes by other names, as far as one can tell
    if classes == images.classes:
        return images
    if unknown := [name for name in classes if name not in images.classes]:
        raise DataError(f"{images.spec}: has no class {unknown[0]!r:.60}, which the model was made for")
    return images.of_classes([images.classes.index(name) for name in classes])


def _same_bytes(folder: BuiltFolder, form: str, data: bytes) -> bool | None:
    from edgecomp.build import rewritten

    others = {"onnx": ("onnx",), "c": ()}.get(form.partition("-")[0], ("ai-edge-litert", "flatbuffers"))
    writers = ("edgecomp", *others)
    now, then = tools(), folder.record["tools"]
    if any(now.get(name, {}).get("version") != then.get(name, {}).get("version") for name in writers):
        return None
    try:
        return rewritten(folder.plan, folder.graph, form).data == data
    except ExportError:
        return None
