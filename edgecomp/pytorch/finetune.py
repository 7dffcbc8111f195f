"""Recovery by fine-tuning: a compressed network is trained to answer as the float network does.

The teacher is the float graph, the student what `rebuild` makes of the compressed one; the loss is the divergence of
their softened answers. No label is used but to judge the result, on training images held out. The weights take no more
bits than before where codes are stored by frequency (`rebuild.Room`).

Deterministic for a seed, a device and a number of threads, interrupted or not: batches follow from seed and epoch.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgecomp.data import LabelledImages
from edgecomp.errors import BundleError, DataError, GraphError, UsageError
from edgecomp.files import write_file
from edgecomp.graph import Array, Graph
from edgecomp.plan import CompressionPlan
from edgecomp.pytorch.network import Network, as_input, batch_size
from edgecomp.pytorch.rebuild import Layer, Rebuilt, Room, logits_name
from edgecomp.sparsity import NOTHING, Masks

SCHEMA = "edgecomp-recovery/1"
_BATCH = 64
"""Images in an update, fewer where the activations are large; their gradients need three times the memory."""
_TEMPERATURE = 2.0
_WEIGHT_RATE = 0.003
"""The first update of a weight, in steps of its grid. Weights rounded for each other's errors bear no haste: at 0.02,
few updates undo a reconstruction, and more do not make up for it."""
_BIAS_SHARE = 10.0
"""The first update of a bias, in steps of its layer's output, to that of a weight."""
_SCALE_SHARE = 0.2
"""The same of a scale, as a share of it."""
_PRESS = 1.0
"""Rate of `Room.press` in an update, in that of weights."""
_ROOM_EVERY = 16
"""Updates between two choices of thresholds."""
_SAVE_EVERY = 200
"""Updates between two checkpoints."""
_CACHED_BYTES = 1 << 26
_MOST_HELD_OUT = 2000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recovered:
    """What fine-tuning gives.

    Attributes:
        graph: float, weights on their grids; the one it began with where training did not help.
        plan: for this graph.
        before: percentage of held-out images that the compressed network got right at first.
        after: the same when trained.
        kept: whether `graph` is the trained one.
    """

    graph: Graph
    plan: CompressionPlan
    before: float
    after: float
    kept: bool


def finetune(
    teacher: Graph,
    graph: Graph,
    plan: CompressionPlan,
    train: LabelledImages,
    held_out: LabelledImages,
    *,
    epochs: int,
    seed: int,
    room: float | None,
    checkpoint: Path,
    masks: Masks = NOTHING,
    progress: Callable[[int], object] | None = None,
) -> Recovered:
    """Train the weights and biases of a compressed network on images, with the float network's answers.

    Args:
        teacher: the float graph that was compressed.
        graph: the same with weights rounded.
        plan: made for `graph`.
        train: what to train with.
        held_out: what decides whether the result is better; none of `train`.
        epochs: how often every image is used, at least 1.
        seed: of the order of the images.
        room: the share of the entropy of the codes that they may have afterwards; None where it does not matter,
            because every code is stored in full.
        checkpoint: a file to go on from after an interruption. At the end it holds all of training: whoever has the
            result in safety removes it.
        masks: of the layers in which weights stay 0.
        progress: called after each batch with the number of its images, those of batches done earlier included.

    Raises:
        UsageError: the checkpoint is of other work.
        BundleError: the checkpoint is damaged.
        GraphError: several inputs or outputs.
        KeyboardInterrupt: Ctrl-C, after the checkpoint has been written; its text says how to go on.
        OSError: the checkpoint cannot be written.
    """
    if epochs < 1:
        raise UsageError(f"{epochs} epochs of recovery: expected at least 1")
    if len(teacher.inputs) != 1 or len(teacher.outputs) != 1:
        raise GraphError(f"graph {teacher.name!r}: recovery needs one input and one output")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = _Work(teacher, graph, plan, train, epochs=epochs, seed=seed, room=room, masks=masks, device=device)
    key = _key(teacher, graph, plan, train, masks, epochs=epochs, seed=seed, room=room)
    saved = _read(checkpoint, key)
    if saved is not None:
        work.restore(saved, checkpoint)
    report, n_saved = progress or (lambda n: None), work.done
    report(work.images_done())
    try:
        while work.done < work.n_steps:
            report(work.step())
            if work.done % _SAVE_EVERY == 0 or work.done == work.n_steps:
                _write(checkpoint, key, work.state())
                n_saved = work.done
    except KeyboardInterrupt as e:
        if work.whole and work.done:
            _write(checkpoint, key, work.state())
            n_saved = work.done
        if n_saved == 0:
            raise
        raise KeyboardInterrupt(
            f"interrupted; the same command goes on from {checkpoint}, which holds {n_saved} of {work.n_steps} steps"
        ) from e
    work.finish()
    new_graph, new_plan = work.student.trained()
    before = _judge(Rebuilt(graph, plan).to(device), held_out, plan)
    after = _judge(Rebuilt(new_graph, new_plan).to(device), held_out, plan)
    kept = after >= before
    return Recovered(
        graph=new_graph if kept else graph, plan=new_plan if kept else plan, before=before, after=after, kept=kept
    )


class _Work:
    """A student, its teacher, and how far training is."""

    def __init__(
        self,
        teacher: Graph,
        graph: Graph,
        plan: CompressionPlan,
        train: LabelledImages,
        *,
        epochs: int,
        seed: int,
        room: float | None,
        masks: Masks,
        device: torch.device,
    ) -> None:
        self.student = Rebuilt(graph, plan, original=teacher, masks=masks).to(device)
        self.done, self.whole = 0, True
        self._teacher, self._answers_at = Network(teacher).to(device), logits_name(teacher)
        self._plan, self._train, self._seed, self._device = plan, train, seed, device
        self._half = _multiplies_halves(device)
        self._batch = batch_size(teacher, most=_BATCH)
        self._a_epoch = ceil(len(train) / self._batch)
        self.n_steps = epochs * self._a_epoch
        self._order: tuple[int, Array] | None = None
        n_answers = int(np.prod(teacher.tensors[self._answers_at].shape))
        # Kept where they are asked for again; of many images with many classes it is cheaper to ask.
        n_kept = len(train) if epochs > 1 and 4 * n_answers * len(train) <= _CACHED_BYTES else 0
        self._answers, self._known = torch.zeros(n_kept, n_answers), torch.zeros(n_kept, dtype=torch.bool)
        rate = _WEIGHT_RATE
        self._room = None if room is None else Room(self.student, room)
        layers = {node.name: self.student.layer(node.name) for node in self.student.quantized.layers()}
        latents = [layer.latent for layer in layers.values() if not layer.fixed]
        gains = [layer.gain for layer in layers.values() if not layer.fixed]
        groups: list[dict[str, Any]] = []
        if latents:
            groups += [{"params": latents, "lr": rate}, {"params": gains, "lr": _SCALE_SHARE * rate}]
        groups += [
            {"params": [layer.bias], "lr": _BIAS_SHARE * rate * self.student.output_step(name)}
            for name, layer in layers.items()
            if layer.bias is not None
        ]
        self._optimizer = torch.optim.Adam(groups, lr=rate)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._share)

    def _share(self, step: int) -> float:
        """Let rates fall from 1 to 0 along half a cosine."""
        return (1 + cos(pi * min(1.0, step / self.n_steps))) / 2

    def images_done(self) -> int:
        """Count the images of the steps that are done, one that was used twice as two."""
        epochs, steps = divmod(self.done, self._a_epoch)
        return epochs * len(self._train) + steps * self._batch

    def step(self) -> int:
        """Train on the next batch: the number of its images."""
        epoch, place = divmod(self.done, self._a_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._train))
        rows = self._order[1][place * self._batch : (place + 1) * self._batch]
        batch = self._train.take(rows)
        x = as_input(batch.inputs(self._plan.preprocessing), torch.float32).to(self._device)
        wanted = self._answer(x, torch.from_numpy(rows))
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._half):
            found = self.student(x).flatten(1)
        divergence(found, wanted, _TEMPERATURE).backward()  # type: ignore[no-untyped-call]
        # An interruption from here on would leave a state that no training passes through.
        self.whole = False
        self._optimizer.step()
        self._schedule.step()
        with torch.no_grad():
            for layer in self.student.layers:
                assert isinstance(layer, Layer)
                layer.latent.clamp_(-layer.limit - 0.5, layer.limit + 0.5)
            self.done += 1
            if self._room is not None:
                self._room.press(_PRESS * _WEIGHT_RATE * self._share(self.done))
                if self.done % _ROOM_EVERY == 0:
                    self._room.hold()
        self.whole = True
        return len(batch)

    def _answer(self, x: Tensor, rows: Tensor) -> Tensor:
        """Give the teacher's logits for images x, which are these of the training images."""
        if len(self._known) and bool(self._known[rows].all()):
            return self._answers[rows].to(x.device)
        with torch.no_grad():
            found = next(value for name, value in self._teacher.steps(x) if name == self._answers_at).flatten(1)
        if len(self._known):
            self._answers[rows], self._known[rows] = found.cpu(), True
        return found

    def finish(self) -> None:
        """Choose the codes for the last time."""
        if self._room is not None:
            self._room.hold()

    def state(self) -> dict[str, Any]:
        """Give all that training depends on from here."""
        return {
            "done": self.done,
            "student": self.student.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "answers": self._answers,
            "known": self._known,
            "price": 0.0 if self._room is None else self._room.price,
        }

    def restore(self, state: Mapping[str, Any], where: Path) -> None:
        """Go on from what `state` gave.

        Raises:
            BundleError: it does not fit.
        """
        try:
            self.student.load_state_dict(state["student"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._schedule.load_state_dict(state["schedule"])
            self._answers.copy_(state["answers"])
            self._known.copy_(state["known"])
            self.done, price = int(state["done"]), float(state["price"])
        except (KeyError, ValueError, TypeError, RuntimeError) as e:
            raise BundleError(f"{where}: is damaged ({str(e)[:80]}); delete it to start over") from e
        if self._room is not None:
            self._room.price = price


def _multiplies_halves(device: torch.device) -> bool:
    """Tell whether a device has instructions for products of bfloat16: they halve the time, emulation multiplies it."""
    if device.type != "cpu":
        return True
    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def divergence(found: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Give the mean Kullback-Leibler divergence of softened answers, logits (N, classes) each, times temperature^2."""
    p = F.log_softmax(wanted / temperature, dim=1)
    q = F.log_softmax(found / temperature, dim=1)
    return F.kl_div(q, p, log_target=True, reduction="batchmean") * temperature**2


def _judge(student: Rebuilt, images: LabelledImages, plan: CompressionPlan) -> float:
    """Give the percentage of images that a compressed network gets right."""
    device, n = next(student.parameters()).device, batch_size(student.graph, most=_BATCH)
    right = 0
    with torch.inference_mode():
        for start in range(0, len(images), n):
            x = as_input(images.inputs(plan.preprocessing, start, start + n), torch.float32)
            found = student(x.to(device)).flatten(1).argmax(1).cpu().numpy()
            right += int((found == images.labels[start : start + n]).sum())
    return 100 * right / len(images)


# ---- checkpoint ------------------------------------------------------------------------------------------------------


def _key(
    teacher: Graph,
    graph: Graph,
    plan: CompressionPlan,
    train: LabelledImages,
    masks: Masks,
    **settings: float | None,
) -> dict[str, str]:
    images = hashlib.sha256(np.ascontiguousarray(train.images).data)
    images.update(train.labels.astype("<i8").tobytes())
    zeros = hashlib.sha256()
    for name, mask in sorted(masks.items()):
        zeros.update(name.encode() + np.packbits(mask).tobytes())
    return {
        "model": teacher.digest(),
        "compressed model": graph.digest(),
        "plan": hashlib.sha256(plan.to_json().encode()).hexdigest(),
        "training images": images.hexdigest(),
        "masks": zeros.hexdigest(),
        **{name.replace("_", " "): str(value) for name, value in settings.items()},
    }


def _write(path: Path, key: Mapping[str, str], state: Mapping[str, Any]) -> None:
    stream = io.BytesIO()
    torch.save({"schema": SCHEMA, "key": dict(key), "state": dict(state)}, stream)
    write_file(path, stream.getvalue())


def _read(path: Path, key: Mapping[str, str]) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    content = io.BytesIO(path.read_bytes())
    try:
        found = torch.load(content, map_location="cpu", weights_only=True)
        schema, old, state = found["schema"], dict(found["key"]), dict(found["state"])
    except Exception as e:
        # torch's reader has no list of what it raises.
        raise BundleError(f"{path}: is no checkpoint of a recovery, or damaged; name another --checkpoint") from e
    if schema != SCHEMA:
        raise BundleError(f"{path}: schema is {schema!r:.60}, this edgecomp reads {SCHEMA!r}; delete it to start over")
    odd = [name for name in key if key[name] != old.get(name)]
    if odd:
        raise UsageError(
            f"{path}: holds the recovery of something else: {odd[0]} was {str(old.get(odd[0]))[:12]}, "
            f"is {key[odd[0]][:12]}; delete it, or name another --checkpoint"
        )
    return state


def check(checkpoint: Path, teacher: Graph) -> None:
    """Refuse a checkpoint that cannot be of this model, and a place where none can be written: before long work.

    Raises:
        UsageError: it is of another model, or its folder does not exist.
        BundleError: it is damaged.
    """
    if not checkpoint.absolute().parent.is_dir():
        raise UsageError(f"{checkpoint}: {checkpoint.absolute().parent} is no folder; name another --checkpoint")
    if checkpoint.is_dir():
        raise UsageError(f"{checkpoint}: is a folder, expected a file; name another --checkpoint")
    if not os.access(checkpoint.absolute().parent, os.W_OK):
        raise UsageError(f"{checkpoint}: its folder cannot be written; name another --checkpoint")
    _read(checkpoint, {"model": teacher.digest()})


def split(train: LabelledImages, *, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Divide training images: most to train with, an eighth but at most 2000 to judge by.

    Raises:
        DataError: there are too few.
    """
    n = min(_MOST_HELD_OUT, len(train) // 8)
    if n < 1:
        raise DataError(f"--recover needs at least 8 training images, there are {len(train)}")
    order = np.random.default_rng(seed).permutation(len(train))
    return train.take(order[n:]), train.take(order[:n])
