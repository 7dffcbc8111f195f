"""The file that an interrupted recovery goes on from: how far training is, and what it is the training of.

Written by torch.save, read without running code. Whatever else stands in it is refused: what is read has the types,
names and shapes of what would be written, and finite values.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgecomp.data import LabelledImages
from edgecomp.errors import BundleError, UsageError
from edgecomp.files import write_file
from edgecomp.graph import Graph
from edgecomp.plan import CompressionPlan
from edgecomp.sparsity import NOTHING, Masks

SCHEMA = "edgecomp-recovery/4"
_DIGEST = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a compressed network is trained, all of it known before it is compressed.

    Attributes:
        epochs: how often every image is used, at least 1.
        seed: of the order of the images.
        room: the share of the entropy of the codes that they may have afterwards; None where it does not matter,
            because every code is stored in full.
        options: what else the compressed network depends on, by name: it tells early whether a checkpoint can be its.
    """

    epochs: int
    seed: int
    room: float | None
    options: Mapping[str, str] = field(default_factory=dict)

    def key(self, teacher: Graph, train: LabelledImages) -> dict[str, str]:
        """Say what of a checkpoint must be the same, as far as it is known before the network is compressed."""
        return {
            **self.options,
            "epochs": str(self.epochs),
            "seed": str(self.seed),
            "room": str(self.room),
            "model": teacher.digest(),
            "training images": train.digest(),
        }


def compressed_key(
    original: Graph, graph: Graph, plan: CompressionPlan, masks: Masks = NOTHING
) -> dict[str, str]:
    """Say what else must be the same once the network is compressed; arguments as `finetune.finetune`."""
    zeros = hashlib.sha256()
    for name, mask in sorted(masks.items()):
        zeros.update(name.encode() + np.packbits(mask).tobytes())
    return {
        "model without the channels cut": original.digest(),
        "compressed model": graph.digest(),
        "plan": hashlib.sha256(plan.to_json().encode()).hexdigest(),
        "masks": zeros.hexdigest(),
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Progress:
    """How far training is.

    Attributes:
        done: updates.
        tensors: all that training changes, on the CPU, by name.
    """

    done: int
    tensors: Mapping[str, Tensor]

    def check(self, expected: Mapping[str, Tensor], where: Path) -> None:
        """Refuse tensors that are not of these names, shapes and types, or hold NaN or infinity.

        Raises:
            BundleError: they are not.
        """
        if odd := sorted(self.tensors.keys() ^ expected.keys()):
            raise damaged(where, f"{odd[0]} is missing or should not be there")
        for name, own in expected.items():
            found = self.tensors[name]
            plain = found.layout is torch.strided and not found.is_meta
            if not plain or (found.dtype, found.shape) != (own.dtype, own.shape):
                raise damaged(where, f"{name} is not {own.dtype} {tuple(own.shape)}")
            if found.is_floating_point() and not bool(torch.isfinite(found).all()):
                raise damaged(where, f"{name} holds NaN or infinity")


def damaged(where: Path, why: str) -> BundleError:
    """Make the error for a file that is not as it was written."""
    return BundleError(f"{where}: is no checkpoint of a recovery, or damaged ({why}); delete it to start over")


def write(path: Path, key: Mapping[str, str], progress: Progress) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        OSError: as the system reports it.
    """
    stream = io.BytesIO()
    state = {"done": progress.done, "tensors": dict(progress.tensors)}
    torch.save({"schema": SCHEMA, "key": dict(key), "state": state}, stream)
    write_file(path, stream.getvalue())


def read(path: Path, key: Mapping[str, str]) -> Progress | None:
    """Read a checkpoint; None where there is no file.

    Args:
        path: the file.
        key: what it must have been written with; what else it was written with is not looked at.

    Raises:
        BundleError: it is damaged, or something else.
        UsageError: it is of other work.
        OSError: the file cannot be read.
    """
    if not path.exists():
        return None
    content = io.BytesIO(path.read_bytes())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what torch suspects of a damaged file, before it refuses it
            found = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as e:
        # torch's reader has no list of what it raises.
        raise damaged(path, "torch cannot read it") from e
    if type(found) is not dict or not isinstance(found.get("schema"), str):
        raise damaged(path, "it names no schema")
    if found["schema"] != SCHEMA:
        raise BundleError(
            f"{path}: schema is {found['schema']!r:.60}, this edgecomp reads {SCHEMA!r}; delete it to start over"
        )
    old = found.get("key")
    if type(old) is not dict or not all(isinstance(text, str) for pair in old.items() for text in pair):
        raise damaged(path, "it does not say what it is of")
    odd = [name for name in key if key[name] != old.get(name)]
    if odd:
        raise UsageError(
            f"{path}: holds the recovery of something else: {odd[0]} was {_short(old.get(odd[0]))}, "
            f"is {_short(key[odd[0]])}; delete it, or name another --checkpoint"
        )
    return _progress(found.get("state"), path)


def _progress(state: object, where: Path) -> Progress:
    if type(state) is not dict or state.keys() != {"done", "tensors"}:
        raise damaged(where, "its state is not complete")
    done, tensors = state["done"], state["tensors"]
    if type(done) is not int:
        raise damaged(where, "it does not say how far training is")
    if type(tensors) is not dict or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise damaged(where, "its state holds something else than tensors")
    return Progress(done=done, tensors=tensors)


def _short(text: str | None) -> str:
    if text is None:
        return "not said"
    return text[:12] if len(text) == _DIGEST else f"{text:.60}"


def check(checkpoint: Path, key: Mapping[str, str]) -> None:
    """Refuse a checkpoint that cannot be of this work, and a place where none can be written: before long work.

    Args:
        checkpoint: the file.
        key: see `Settings.key`.

    Raises:
        UsageError: it is of other work, or its folder cannot be written.
        BundleError: it is damaged.
    """
    if not checkpoint.absolute().parent.is_dir():
        raise UsageError(f"{checkpoint}: {checkpoint.absolute().parent} is no folder; name another --checkpoint")
    if checkpoint.is_dir():
        raise UsageError(f"{checkpoint}: is a folder, expected a file; name another --checkpoint")
    if not os.access(checkpoint.absolute().parent, os.W_OK):
        raise UsageError(f"{checkpoint}: its folder cannot be written; name another --checkpoint")
    read(checkpoint, key)
