"""Layer-wise Relevance Propagation on a float graph: what each weight and channel contributes to the right answer.

The output of the true class is shared out backwards (`propagate`) by rules (`rules`), and what each layer gets is added
up over samples (`sums`). By default it is the Epsilon rule from the logit: in the limit epsilon -> 0 that is
R_w = w * d logit/d w, which is what the tests hold it against. Not so in front of products, where the signal takes what
a gradient shares with the gate, and of functions like silu, which hand on relevance where gradients bend. A layer that
only computes a gate has no relevance; its numbers are its effect by gradients (`propagate`, "aside").

Under torchrun each process explains its share of the batches, and all of them give the same result. Not here: what
follows from relevance (`planner`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from edgecomp.errors import DataError, UsageError
from edgecomp.graph import WEIGHTED, Array, Graph
from edgecomp.plan import Relevance
from edgecomp.pytorch import checkpoint as checkpoints
from edgecomp.pytorch.network import Network
from edgecomp.pytorch.propagate import Start, check_labels, explain, n_classes
from edgecomp.pytorch.rules import Composite
from edgecomp.pytorch.sharing import all_sum, join, place, shard, together
from edgecomp.pytorch.sums import Sums, WeightForm

Batches = Iterable[tuple[Array, Array]]

CHECKPOINT_IMAGES = 1024
"""A checkpoint is written after so many images at least, and at the end."""


def score(
    graph: Graph,
    batches: Batches | Callable[[], Batches],
    *,
    composite: Composite | None = None,
    start: Start = Start.LOGIT,
    weight_form: WeightForm = WeightForm.OWN,
    class_weights: Array | None = None,
    per_class: bool = False,
    per_activation: bool = False,
    checkpoint: Path | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], object] | None = None,
) -> Relevance:
    """Explain labelled images and average what they say of every layer.

    Deterministic; the result does not depend on how the images are cut into batches or shared out among processes, but
    for rounding. Memory is bounded by the network and the largest batch, not by the number of images.

    With `class_weights` every mean is a weighted one, sum(v_y * x) / sum(v_y) with v_y the weight of the image's class.
    Each image is still explained from the output of its own class alone, so relevance starts only at outputs of classes
    that have weight: outputs of several classes in one start would cancel each other.

    Args:
        graph: float, one input, one output of one value a class; a softmax at its end is left out.
        batches: pairs of images float32 (N, C, H, W), preprocessed, and labels int64 (N,); or what gives them. Every
            process of a group must be given the same.
        composite: which layer gets which rule; None for Epsilon everywhere.
        start: the relevance that the true class's output starts with.
        weight_form: what a weight's relevance is made of.
        class_weights: (n_classes,), not negative; images of a class of weight 0 are left out. None: all count 1.
        per_class: give the relevance of channels for each class as well.
        per_activation: give the relevance of each activation's elements as well.
        checkpoint: a file to go on from where it exists, and to write to as the work proceeds; in a group of processes
            each has its own, with its number behind the name.
        dtype: of the arithmetic.
        progress: called after each batch with the number of images in it; in a group, of this process's batches.

    Raises:
        DataError: no image (of a class with weight), images or labels that do not fit the network, or logits that are
            not finite.
        UnsupportedOp: a softmax in the middle of the network.
        GraphError: the graph is not a legal float graph, or has several inputs.
        UsageError: class_weights out of range, the graph has several outputs, or the checkpoint is of other work.
        BundleError: the checkpoint is damaged.
        OSError: the checkpoint cannot be read or written.
    """
    composite = composite or Composite()
    network = Network(graph, dtype=dtype)
    if class_weights is not None:
        class_weights = _checked_weights(class_weights, n_classes(graph))
    rule = _text(composite, start, weight_form, class_weights)
    sums = Sums(network, form=weight_form, per_class=per_class, per_activation=per_activation)

    def take(images: Array, labels: Array) -> None:
        factors = None
        if class_weights is not None:
            images, labels, factors = _of_weight(images, labels, class_weights)
        if factors is None or len(factors):
            sums.add(explain(network, images, labels, composite=composite, start=start), labels, factors)

    join()
    with together():
        own = shard(batches() if callable(batches) else batches)
        if checkpoint is not None:
            weights_digest = b"" if class_weights is None else class_weights.tobytes()
            key = {
                "graph": graph.digest(),
                "composite": f"{composite!r}",
                "rule": rule,
                "class weights": hashlib.sha256(weights_digest).hexdigest(),
                "options": f"{dtype}, per class {per_class}, per activation {per_activation}",
                "process": "{} of {}".format(*place()),
            }
            _run_on(own, take, sums, _own_file(checkpoint), key, progress)
        else:
            for images, labels in own:
                take(images, labels)
                if progress is not None:
                    progress(len(labels))
    all_sum(sums.tensors.values())
    n_samples = int(sums.tensors["counts"][0])
    if n_samples == 0:
        of_weight = "" if class_weights is None else " of a class with weight"
        raise DataError(f"no images to explain; expected at least one{of_weight}")
    layers = sums.layers()
    totals = [float(layer.channel_abs.sum()) for layer in layers.values()]
    if not np.isfinite(totals).all():
        raise DataError(f"relevance by {rule} is not finite; choose another --rule")
    # The last layer has what the start gave it, whatever the rule.
    if not any(totals[:-1] or totals):
        raise DataError(f"relevance by {rule} is zero everywhere; choose another --rule")
    return Relevance(
        rule=rule,
        n_samples=n_samples,
        conservation=sums.conservation(),
        per_class=sums.classes(),
        activations=sums.activations(),
        layers=layers,
    )


def score_channels(
    graph: Graph,
    batches: Batches,
    *,
    composite: Composite | None = None,
    start: Start = Start.LOGIT,
    class_weights: Array | None = None,
) -> dict[str, Array]:
    """Give each layer's `LayerRelevance.channel_abs` alone, which takes a fraction of the time.

    Arguments and errors as `score`.

    Returns:
        layer name -> float64 (O,).
    """
    network = Network(graph)
    if class_weights is not None:
        class_weights = _checked_weights(class_weights, n_classes(graph))
    found = {node.name: np.zeros(graph.weight(node).shape[0]) for node in graph.layers()}
    total = np.zeros(1)
    join()
    with together():
        for every_image, every_label in shard(batches):
            images, labels, factors = every_image, every_label, np.ones(len(every_label))
            if class_weights is not None:
                images, labels, factors = _of_weight(images, labels, class_weights)
            if len(factors) == 0:
                continue
            for step in explain(network, images, labels, composite=composite, start=start):
                if step.node.op in WEIGHTED:
                    of_image = step.r_out.reshape(*step.r_out.shape[:2], -1).sum(2, dtype=torch.float64)
                    found[step.node.name] += factors @ of_image.abs().numpy()
            total += factors.sum()
    all_sum([torch.from_numpy(value) for value in (*found.values(), total)])  # in place: they share their memory
    if total == 0:
        raise DataError("no images to explain; expected at least one, of a class with weight")
    return {name: value / total for name, value in found.items()}


def conservation(graph: Graph, images: Array, labels: Array, *, composite: Composite | None = None) -> dict[str, float]:
    """Measure the share of its relevance that each layer loses, in float64, as `Relevance.conservation`.

    For Epsilon it is what epsilon takes; AlphaBeta also loses, or gains, where an output has contributions of one sign
    only; Gamma and ZPlus where an output has none. Arguments and errors as `score`.
    """
    network = Network(graph, dtype=torch.float64)
    lost = {
        step.node.name: step.lost()
        for step in explain(network, images, labels, composite=composite)
        if step.node.op in WEIGHTED
    }
    return {name: part / whole for name, (part, whole) in lost.items() if whole > 0}


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def _own_file(path: Path) -> Path:
    rank, n = place()
    return path if n == 1 else path.with_name(f"{path.name}.{rank}-of-{n}")


def _run_on(
    batches: Batches,
    take: Callable[[Array, Array], None],
    sums: Sums,
    path: Path,
    key: dict[str, str],
    progress: Callable[[int], object] | None,
) -> None:
    """Take the batches that a checkpoint does not hold yet, and write it anew every so often."""
    saved = checkpoints.restore(path, key, sums.tensors)
    order = checkpoints.Order()
    written = 0
    if saved is not None:
        written = saved.n_images
        if progress is not None:
            progress(written)

    def write() -> None:
        made_of = checkpoints.Saved(key=key, n_images=order.n_images, order=order.digest())
        checkpoints.save(path, made_of, sums.tensors)

    for images, labels in checkpoints.remaining(batches, saved, order, path):
        take(images, labels)
        if progress is not None:
            progress(len(labels))
        if order.n_images - written >= CHECKPOINT_IMAGES:
            write()
            written = order.n_images
    if order.n_images > written:
        write()


# ---- weights of classes ----------------------------------------------------------------------------------------------


def _checked_weights(weights: Array, classes: int) -> Array:
    """Give float64 (n_classes,) of finite weights, at least one of them above 0."""
    if weights.shape != (classes,) or weights.dtype.kind not in "fiub":
        raise UsageError(f"class weights are {weights.dtype} {weights.shape}, expected numbers ({classes},)")
    weights = weights.astype(np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise UsageError("class weights must be finite, none below 0 and one above 0")
    return weights


def _of_weight(images: Array, labels: Array, class_weights: Array) -> tuple[Array, Array, Array]:
    """Keep the images of classes with weight; give them, their labels, and each one's weight (N,)."""
    check_labels(labels, len(images), len(class_weights))
    factors = class_weights[labels]
    chosen = factors > 0
    return images[chosen], labels[chosen], factors[chosen]


def _text(composite: Composite, start: Start, form: WeightForm, weights: Array | None) -> str:
    """Say how relevance is made: the composite, then what differs from the default."""
    parts = [str(composite)]
    if start is not Start.LOGIT:
        parts.append(f"start {start}")
    if form is not WeightForm.OWN:
        parts.append("weights as the rule sees them")
    if weights is not None:
        chosen = np.flatnonzero(weights)
        equal = len(set(weights[chosen].tolist())) == 1
        names = [str(i) if equal else f"{i}*{weights[i]:g}" for i in chosen[:20]]
        more = f" and {len(chosen) - 20} more" if len(chosen) > 20 else ""
        parts.append(f"classes {','.join(names)}{more}")
    return "; ".join(parts)
