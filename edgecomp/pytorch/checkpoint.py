"""The file that an interrupted scoring run goes on from: running sums, and what they were made of.

An .npz of numpy's, without pickle: a JSON text under "made_of", and the sums by name. It is written beside its place
and renamed, so a run that is killed leaves the last one whole.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgecomp.errors import BundleError, UsageError
from edgecomp.files import write_file
from edgecomp.graph import Array

SCHEMA = "edgecomp-sums/1"
_MADE_OF = "made_of"


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What a file says of itself beside its sums.

    Attributes:
        key: what the sums depend on, but for the images: graph, rules and options.
        n_images: how many were read, those of classes without weight included.
        order: sha256 over these images and labels, in order.
    """

    key: Mapping[str, str]
    n_images: int
    order: str


class Order:
    """A running digest of images and labels; how they are cut into batches makes no difference."""

    def __init__(self) -> None:
        self.n_images = 0
        self._images, self._labels = hashlib.sha256(), hashlib.sha256()

    def add(self, images: Array, labels: Array) -> None:
        """Take in a batch."""
        self.n_images += len(labels)
        self._images.update(np.ascontiguousarray(images).data)
        self._labels.update(labels.astype("<i8").tobytes())

    def digest(self) -> str:
        """Give 64 hexadecimal digits."""
        return hashlib.sha256(self._images.digest() + self._labels.digest()).hexdigest()


def save(path: Path, saved: Saved, sums: Mapping[str, Tensor]) -> None:
    """Write sums, whole or not at all.

    Raises:
        OSError: as the system reports it.
    """
    made_of = {"schema": SCHEMA, "key": dict(saved.key), "n_images": saved.n_images, "order": saved.order}
    stream = io.BytesIO()
    text = np.array(json.dumps(made_of, sort_keys=True))
    np.savez(stream, allow_pickle=False, **{_MADE_OF: text}, **{f"sum {k}": v.numpy() for k, v in sums.items()})
    write_file(path, stream.getvalue())


def restore(path: Path, key: Mapping[str, str], sums: Mapping[str, Tensor]) -> Saved | None:
    """Read sums into tensors of the same names; None where there is no file.

    Raises:
        BundleError: the file is damaged, or no file of this kind.
        UsageError: its sums are of something else than `key`.
        OSError: the file cannot be read.
    """
    if not path.exists():
        return None
    content = io.BytesIO(path.read_bytes())
    try:
        with np.load(content, allow_pickle=False) as file:
            made_of = json.loads(str(file[_MADE_OF]))
            if made_of["schema"] != SCHEMA:
                raise BundleError(f"{path}: schema is {made_of['schema']!r:.80}, this edgecomp reads {SCHEMA!r}")
            saved = Saved(key=dict(made_of["key"]), n_images=int(made_of["n_images"]), order=str(made_of["order"]))
            odd = [name for name in sorted(key.keys() | saved.key.keys()) if key.get(name) != saved.key.get(name)]
            if odd:
                raise UsageError(
                    f"{path}: was written with {odd[0]} {saved.key.get(odd[0])!s:.80}, now it is "
                    f"{key.get(odd[0])!s:.80}; delete it, or name another checkpoint"
                )
            read = {name: torch.from_numpy(file[f"sum {name}"]) for name in sums}
    except (BundleError, UsageError):
        raise
    except Exception as e:
        # numpy's reader, and the one of zip files below it, have no list of what they raise.
        why = " ".join(str(e).split())[:80] or type(e).__name__
        raise BundleError(f"{path}: is damaged or no checkpoint ({why}); delete it to start over") from e
    for name, tensor in sums.items():
        if (tensor.shape, tensor.dtype) != (read[name].shape, read[name].dtype):
            raise BundleError(f"{path}: {name} is damaged: {read[name].dtype} {tuple(read[name].shape)}")
        tensor.copy_(read[name])
    return saved


def remaining(
    batches: Iterable[tuple[Array, Array]], saved: Saved | None, order: Order, where: Path
) -> Iterator[tuple[Array, Array]]:
    """Yield what comes after the images that were read already; `order` holds these and all that was yielded.

    Raises:
        UsageError: these are not the images that the checkpoint was made with.
    """
    to_skip = 0 if saved is None else saved.n_images
    for images, labels in batches:
        n = min(to_skip - order.n_images, len(labels))
        if n > 0:
            order.add(images[:n], labels[:n])
            images, labels = images[n:], labels[n:]
        if saved is not None and n > 0 and order.n_images == to_skip and order.digest() != saved.order:
            raise UsageError(_other_images(where))
        if len(labels):
            order.add(images, labels)
            yield images, labels
    if order.n_images < to_skip:
        raise UsageError(_other_images(where))


def _other_images(where: Path) -> str:
    return f"{where}: was written with other images, or another order of them; delete it, or name another checkpoint"
