"""Recovery by fine-tuning: a compressed network is trained to answer as the float network does.

The teacher is the float graph with all its channels, the student what `rebuild` makes of the compressed one; the loss
is the divergence of their softened answers to views of the training images (`views`); views of images held out judge
the result. No label is used. The weights take no more bits than before where codes are stored by frequency
(`rebuild.Room`).

Deterministic for a seed, a device and a number of threads, interrupted or not: batches and views follow from seed and
epoch.
Under torchrun each process takes every n-th image of a batch and the gradients are added up: each update is that of
one process with the same batch, but for rounding. Checkpoints are the first process's, and fit any number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, cos, pi
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgecomp.data import LabelledImages
from edgecomp.errors import DataError, GraphError, UsageError
from edgecomp.graph import Array, Graph
from edgecomp.plan import CompressionPlan
from edgecomp.pytorch.descent import Descent, Paced
from edgecomp.pytorch.network import Network, as_input, batch_size
from edgecomp.pytorch.progress import Progress, Settings, compressed_key, damaged, read, write
from edgecomp.pytorch.rebuild import MOST_BITS, Layer, Rebuilt, Room, logits_name
from edgecomp.pytorch.sharing import all_sum, by_first, join, place
from edgecomp.pytorch.views import draw_views, look
from edgecomp.sparsity import NOTHING, Masks

_BATCH = 64
"""Images in an update, fewer where the activations are large; their gradients need three times the memory."""
_TEMPERATURE = 2.0
_WEIGHT_RATE = 0.006
"""The first update of a weight whose gradient is the root mean square of its row's, in steps of its grid. Weights
rounded for each other's errors bear no haste: at 0.02, few updates undo a reconstruction."""
_BIAS_SHARE = 5.0
"""The first update of a bias, in steps of its layer's output, to that of a weight."""
_SCALE_SHARE = 0.2
"""The same of a scale, as a share of it."""
_ROOM_EVERY = 16
"""Updates between two choices of thresholds."""
_SAVE_EVERY = 200
"""Updates between two checkpoints."""
_MOST_LATENT, _MOST_GAIN = 128.0, 16.0
"""Beyond these a checkpoint was not written by us: a code has at most 8 bits, a scale that moved by e^16 none."""
_MOST_HELD_OUT = 2000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recovered:
    """What fine-tuning gives.

    Attributes:
        graph: float, weights on their grids; the one it began with where training did not help.
        plan: for this graph.
        before: divergence of the compressed network's answers from the float one's at first, see `judge`.
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
    original: Graph,
    graph: Graph,
    plan: CompressionPlan,
    train: LabelledImages,
    held_out: LabelledImages,
    *,
    settings: Settings,
    checkpoint: Path,
    masks: Masks = NOTHING,
    progress: Callable[[int], object] | None = None,
) -> Recovered:
    """Train the weights and biases of a compressed network on images, with the float network's answers.

    Args:
        teacher: the float graph whose answers are learnt, of the same outputs.
        original: the float graph that was compressed: the teacher, or what was left when its channels had been cut. It
            says to which side of its code each weight leans.
        graph: `original` with weights rounded.
        plan: made for `graph`.
        train: what to train with.
        held_out: what decides whether the result is better; none of `train`.
        settings: how to train.
        checkpoint: a file to go on from after an interruption. At the end it holds all of training: whoever has the
            result in safety removes it.
        masks: of the layers in which weights stay 0.
        progress: called after each batch with the number of its images, those of batches done earlier included, and in
            a group those of the other processes.

    Raises:
        UsageError: the checkpoint is of other work, or nothing can be trained.
        BundleError: the checkpoint is damaged.
        GraphError: several inputs or outputs.
        TargetError: another process of the group has ended.
        KeyboardInterrupt: Ctrl-C, after the checkpoint has been written; its text says how to go on.
        OSError: the checkpoint cannot be written.
    """
    if settings.epochs < 1:
        raise UsageError(f"{settings.epochs} epochs of recovery: expected at least 1")
    if len(teacher.inputs) != 1 or len(teacher.outputs) != 1:
        raise GraphError(f"graph {teacher.name!r}: recovery needs one input and one output")
    join()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = _Work(teacher, original, graph, plan, train, settings=settings, masks=masks, device=device)
    if not work.has_parameters():
        raise UsageError(
            f"--recover: every layer has more than {MOST_BITS} bits and none a bias, so nothing can be trained; "
            "leave it out"
        )
    key = {**settings.key(teacher, train), **compressed_key(original, graph, plan, masks)}
    saved = by_first(lambda: read(checkpoint, key))
    if saved is not None:
        work.restore(saved, checkpoint)
    report, n_saved = progress or (lambda n: None), work.done
    report(work.images_done())
    try:
        while work.done < work.n_steps:
            report(work.step())
            if work.done % _SAVE_EVERY == 0 or work.done == work.n_steps:
                by_first(lambda: write(checkpoint, key, work.state()))
                n_saved = work.done
    except KeyboardInterrupt as e:
        if place()[0] == 0 and work.whole and work.done:
            write(checkpoint, key, work.state())
            n_saved = work.done
        if n_saved == 0:
            raise
        raise KeyboardInterrupt(
            f"interrupted; the same command goes on from {checkpoint}, which holds {n_saved} of {work.n_steps} steps"
        ) from e
    work.finish()
    new_graph, new_plan = work.student.trained()

    def judged() -> Recovered:
        students = [Rebuilt(g, p).to(device) for g, p in ((graph, plan), (new_graph, new_plan))]
        before, after = judge(teacher, students, held_out, plan)
        kept = after <= before
        chosen = (new_graph, new_plan) if kept else (graph, plan)
        return Recovered(graph=chosen[0], plan=chosen[1], before=before, after=after, kept=kept)

    return by_first(judged)


class _Work:
    """A student, its teacher, and how far training is."""

    def __init__(
        self,
        teacher: Graph,
        original: Graph,
        graph: Graph,
        plan: CompressionPlan,
        train: LabelledImages,
        *,
        settings: Settings,
        masks: Masks,
        device: torch.device,
    ) -> None:
        self.student = Rebuilt(graph, plan, original=original, masks=masks).to(device)
        self.done, self.whole = 0, True
        self._teacher, self._answers_at = Network(teacher).to(device), logits_name(teacher)
        self._plan, self._train, self._seed, self._device = plan, train, settings.seed, device
        self._half = _multiplies_halves(device)
        self._batch = batch_size(teacher, most=_BATCH)
        self._a_epoch = ceil(len(train) / self._batch)
        self.n_steps = settings.epochs * self._a_epoch
        self._order: tuple[int, Array] | None = None
        self._room = None if settings.room is None else Room(self.student, settings.room)
        names = [node.name for node in self.student.quantized.layers()]
        layers = {i: self.student.layer(name) for i, name in enumerate(names)}
        moving = {i: layer for i, layer in layers.items() if not layer.fixed}
        self._descent = Descent(
            [
                Paced(
                    tensors={f"{i} latent": layer.latent for i, layer in moving.items()},
                    rate=_WEIGHT_RATE,
                    masks={f"{i} latent": layer.mask for i, layer in moving.items() if layer.mask is not None},
                ),
                Paced(
                    tensors={f"{i} gain": layer.gain for i, layer in moving.items()},
                    rate=_SCALE_SHARE * _WEIGHT_RATE,
                ),
                *(
                    Paced(
                        tensors={f"{i} bias": layer.bias},
                        rate=_BIAS_SHARE * _WEIGHT_RATE * self.student.output_step(names[i]),
                    )
                    for i, layer in layers.items()
                    if layer.bias is not None
                ),
            ]
        )

    def has_parameters(self) -> bool:
        """Tell whether anything can be trained."""
        return bool(self._descent.tensors())

    def _share(self, step: int) -> float:
        """Let rates fall from 1 to 0 along half a cosine."""
        return (1 + cos(pi * min(1.0, step / self.n_steps))) / 2

    def images_done(self) -> int:
        """Count the images of the steps that are done, one that was used twice as two."""
        epochs, steps = divmod(self.done, self._a_epoch)
        return epochs * len(self._train) + steps * self._batch

    def step(self) -> int:
        """Train on the next batch: the number of its images."""
        epoch, start = divmod(self.done, self._a_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._train))
        rows = self._order[1][start * self._batch : (start + 1) * self._batch]
        rank, n = place()
        own = np.arange(len(rows))[rank::n]
        x = torch.empty(0)
        if len(own):
            x = as_input(self._train.take(rows[own]).inputs(self._plan.preprocessing), torch.float32)
            # Those of the whole batch are drawn, so that its images are seen alike however they are shared out.
            rng = np.random.default_rng([self._seed, epoch, start])
            x = look(x, draw_views(len(rows), x.shape[2], x.shape[3], rng)[own]).to(self._device)
        self._descent.forget_gradients()
        if len(own):
            wanted = self._answer(x)
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._half):
                found = self.student(x).flatten(1)
            # A share of the whole batch's mean.
            loss = divergence(found, wanted, _TEMPERATURE) * (len(own) / len(rows))
            loss.backward()  # type: ignore[no-untyped-call]
        self._add_gradients()
        # An interruption from here on would leave a state that no training passes through.
        self.whole = False
        self._descent.update(self.done, self._share(self.done))
        with torch.no_grad():
            for layer in self.student.layers:
                assert isinstance(layer, Layer)
                layer.latent.clamp_(-layer.limit - 0.5, layer.limit + 0.5)
            self.done += 1
            if self._room is not None and self.done % _ROOM_EVERY == 0:
                self._room.hold()
        self.whole = True
        return len(rows)

    def _answer(self, x: Tensor) -> Tensor:
        """Give the teacher's logits for images."""
        with torch.no_grad(), torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._half):
            return answers(self._teacher, self._answers_at, x).float()

    def _add_gradients(self) -> None:
        """Add up the gradients of all processes."""
        if place()[1] == 1:
            return
        parameters = list(self._descent.tensors().values())
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([part.flatten() for part in parts])
        all_sum([flat])
        for p, part in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def finish(self) -> None:
        """Choose the codes for the last time."""
        if self._room is not None:
            self._room.hold()

    def _tensors(self) -> dict[str, Tensor]:
        """Name every tensor that training changes."""
        found = {name: tensor.detach() for name, tensor in self._descent.tensors().items()}
        for i, layer in enumerate(self.student.layers):
            assert isinstance(layer, Layer)
            if not layer.fixed:
                found[f"{i} borders"] = layer.borders
        return {**found, **self._descent.moments}

    def state(self) -> Progress:
        """Give all that training depends on from here."""
        return Progress(done=self.done, tensors={n: t.cpu() for n, t in self._tensors().items()})

    def restore(self, saved: Progress, where: Path) -> None:
        """Go on from what `state` gave.

        Raises:
            BundleError: it does not fit.
        """
        if not 1 <= saved.done <= self.n_steps:
            raise damaged(where, f"{saved.done} of {self.n_steps} steps done")
        own = self._tensors()
        saved.check(own, where)
        for name, tensor in saved.tensors.items():
            _check_values(name, tensor, where)
            own[name].copy_(tensor)
        self.done = saved.done


def _check_values(name: str, tensor: Tensor, where: Path) -> None:
    """Refuse what no training gives, and from which none could go on.

    Raises:
        BundleError: it is that.
    """
    kind = name.rpartition(" ")[2]
    wrong = {
        "latent": lambda: tensor.abs().max() > _MOST_LATENT,
        "gain": lambda: tensor.abs().max() > _MOST_GAIN,
        "square": lambda: (tensor < 0).any(),
        "borders": lambda: (tensor.diff() < 0).any(),
    }.get(kind)
    if tensor.numel() and wrong is not None and bool(wrong()):
        raise damaged(where, f"{name} has values that cannot be")


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


def answers(network: Network, name: str, x: Tensor) -> Tensor:
    """Give a tensor of a float network, its logits, for images: (N, classes)."""
    return next(value for found, value in network.steps(x) if found == name).flatten(1)


def judge(teacher: Graph, students: Sequence[Rebuilt], images: LabelledImages, plan: CompressionPlan) -> list[float]:
    """Give the mean divergence of each student's answers from the teacher's, on a view of each image.

    Not the share of labels they get right: a student that was only rounded still knows by heart some of what its
    teacher learnt by heart, the images held out of this training among it, and forgets that as it learns.
    """
    device, n = next(students[0].parameters()).device, batch_size(teacher, most=_BATCH)
    network, name, rng = Network(teacher).to(device), logits_name(teacher), np.random.default_rng(0)
    total = np.zeros(len(students))
    with torch.inference_mode():
        for start in range(0, len(images), n):
            x = as_input(images.inputs(plan.preprocessing, start, start + n), torch.float32).to(device)
            x = look(x, draw_views(len(x), x.shape[2], x.shape[3], rng))
            wanted = answers(network, name, x)
            found = [divergence(student(x).flatten(1), wanted, _TEMPERATURE) for student in students]
            total += len(x) * np.array([float(value) for value in found])
    return [float(value) for value in total / len(images)]


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
