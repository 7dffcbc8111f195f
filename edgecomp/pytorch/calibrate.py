"""The range of every activation on real images, with outliers weighed against resolution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from edgecomp import quantmath
from edgecomp.errors import DataError
from edgecomp.graph import Array, Graph
from edgecomp.plan import ActRange
from edgecomp.pytorch.network import Network, as_input
from edgecomp.pytorch.sharing import all_max, all_sum, join, shard, together

Batches = Sequence[Array] | Callable[[], Iterable[Array]]

N_BINS = 2048
FACTORS = tuple(np.linspace(1.0, 0.3, 71).tolist())
"""The shares of the full range that are tried, the largest first."""

_PIECE_ELEMENTS = 1 << 22
"""Values counted at once: torch counts in float32, which is exact up to 2^24."""


def calibrate(
    graph: Graph, batches: Batches, *, progress: Callable[[int], object] | None = None
) -> dict[str, ActRange]:
    """Choose the range of every activation tensor of a float graph, the input included.

    The images are seen twice: once for the extremes, once for a histogram of 2048 bins between them, widened to hold 0.
    Of the ranges that shrink both ends by one factor, from 1.0 down to 0.3, the one whose int8 grid gives the histogram
    the smallest squared error wins; what it cuts off counts as error too. All ranges hold 0.

    Under torchrun each process looks at its share of the batches, and all of them give the same ranges, those of a
    single process.

    Args:
        graph: float, one input.
        batches: images float32 (N, C, H, W), preprocessed: a list, or a function that starts over at each call. Every
            process of a group must be given the same.
        progress: called after each batch with the number of images in it, so twice for each image; in a group, of this
            process's batches.

    Returns:
        by tensor name; (0, 0) for a tensor that is always 0.

    Raises:
        DataError: no image, images that do not fit the network, an activation that is not finite, or `batches` that
            give other images the second time.
        GraphError: the graph is not a legal float graph, or has several inputs.
    """
    join()
    network = Network(graph)
    # of each activation how far it goes below 0 and above it
    extremes = {name: torch.zeros(2, dtype=torch.float64) for name in _activations(graph)}

    def widen(name: str, value: Tensor) -> None:
        low, high = (float(extreme) for extreme in torch.aminmax(value))
        if not np.isfinite([low, high]).all():
            raise DataError(f"activation {name!r} is not finite; check the model's weights, and the images for NaN")
        extremes[name].copy_(torch.maximum(extremes[name], torch.tensor([-low, high], dtype=torch.float64)))

    n_images = _visit(network, batches, widen, progress)
    if n_images == 0:
        raise DataError("no images to calibrate with; expected at least one")
    all_max(extremes.values())
    full = {name: (-float(both[0]), float(both[1])) for name, both in extremes.items()}
    counts = {name: torch.zeros(N_BINS, dtype=torch.float64) for name in full}

    def count(name: str, value: Tensor) -> None:
        low, high = full[name]
        for piece in torch.split(value.flatten(), _PIECE_ELEMENTS):
            counts[name] += torch.histc(piece, bins=N_BINS, min=low, max=high)

    if (again := _visit(network, batches, count, progress)) != n_images:
        raise DataError(f"batches gave {n_images} images, then {again}; expected the same twice, a list or a function")
    all_sum(counts.values())
    return {name: choose_range(counts[name].numpy(), *full[name]) for name in full}


def _activations(graph: Graph) -> tuple[str, ...]:
    return (*graph.inputs, *(node.outputs[0] for node in graph.nodes))


def choose_range(counts: Array, low: float, high: float) -> ActRange:
    """Shrink [low, high] by the factor whose int8 grid gives the smallest squared error.

    Args:
        counts: float64 (bins,), a histogram between low and high; each bin counts as its centre.
        low: at most 0.
        high: at least 0.
    """
    centres = low + (high - low) * (np.arange(len(counts)) + 0.5) / len(counts)
    # Where several are equally good, as for a tensor of zeros, the first one wins.
    errors = [float((counts * _error(centres, low * factor, high * factor) ** 2).sum()) for factor in FACTORS]
    factor = FACTORS[int(np.argmin(errors))]
    return ActRange(low=low * factor, high=high * factor)


def _error(values: Array, low: float, high: float) -> Array:
    """Give float64 values minus what remains of them on the int8 grid of [low, high]."""
    params = quantmath.activation_params(low, high)
    scale, zero_point = float(params.scale), int(params.zero_point)
    codes = np.clip(np.rint(values / scale) + zero_point, quantmath.ACT_MIN, quantmath.ACT_MAX)
    return np.asarray(values - (codes - zero_point) * scale)


def _visit(
    network: Network,
    batches: Batches,
    look: Callable[[str, Tensor], None],
    progress: Callable[[int], object] | None,
) -> int:
    """Show every activation of this process's batches to `look`; give the number of images in all processes."""
    n_images = torch.zeros(1, dtype=torch.float64)
    with together(), torch.inference_mode():
        for images in shard(batches() if callable(batches) else batches):
            for name, value in network.steps(as_input(images, network.dtype)):
                look(name, value)
            n_images += len(images)
            if progress is not None:
                progress(len(images))
    all_sum([n_images])
    return int(n_images)
