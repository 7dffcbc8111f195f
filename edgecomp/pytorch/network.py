"""Run a float graph in torch, on batches: the fast twin of `reference.run`, for scoring, calibrating and measuring."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgecomp.errors import DataError, GraphError
from edgecomp.graph import Array, Attribute, Graph, Node, Op
from edgecomp.ops import ints
from edgecomp.preprocessing import Preprocessing
from edgecomp.verify import verify_float

if TYPE_CHECKING:
    from edgecomp.data import LabelledImages

Attrs = Mapping[str, Attribute]

_ACTIVATION_VALUES = 1 << 27


class Network(torch.nn.Module):
    """A float graph as a torch module.

    The weights are buffers, so `.to(device)` moves them; nothing in it is trained.

    Args:
        graph: float, with one input.
        dtype: of the weights and of all arithmetic: torch.float32 or torch.float64.

    Raises:
        GraphError: the graph is not a legal float graph, or has several inputs.
    """

    def __init__(self, graph: Graph, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        verify_float(graph)
        if len(graph.inputs) != 1:
            raise GraphError(f"graph {graph.name!r} has {len(graph.inputs)} inputs, expected one")
        self.graph = graph
        self.dtype = dtype
        self._buffer_names: dict[str, str] = {}
        for name, tensor in graph.tensors.items():
            if tensor.data is not None:
                # Names of buffers may hold no dots.
                self._buffer_names[name] = f"weight{len(self._buffer_names)}"
                self.register_buffer(self._buffer_names[name], torch.tensor(tensor.data, dtype=dtype))

    def weights(self) -> dict[str, Tensor]:
        """Give the constant tensors by their names in the graph."""
        return {name: self.get_buffer(buffer) for name, buffer in self._buffer_names.items()}

    def check(self, x: Tensor) -> None:
        """Refuse an input of another shape or dtype, or without an image in it.

        Raises:
            DataError: with both.
        """
        expected = self.graph.tensors[self.graph.inputs[0]].shape[1:]
        if x.dtype != self.dtype or tuple(x.shape[1:]) != expected or len(x) == 0:
            shape = ", ".join(map(str, ("N", *expected)))
            raise DataError(f"input is {x.dtype} {tuple(x.shape)}, the model takes {self.dtype} ({shape})")

    def steps(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the input, then each node's output in running order, forgetting what no later node reads.

        Args:
            x: (N, ...), the stored shape with any N, on the module's device and of its dtype.

        Raises:
            DataError: as `check`.
        """
        self.check(x)
        graph = self.graph
        values = self.weights()
        last_reader = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
        values[graph.inputs[0]] = x
        yield graph.inputs[0], x
        for i, node in enumerate(graph.nodes):
            out = compute(node, [values[name] for name in node.inputs])
            for name in set(node.inputs):
                if last_reader[name] == i:
                    del values[name]
            values[node.outputs[0]] = out
            yield node.outputs[0], out

    def run(self, x: Tensor) -> dict[str, Tensor]:
        """Compute every activation tensor by name, the input included; arguments and errors as `steps`."""
        return dict(self.steps(x))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Compute the graph's output, or a tuple of them where it has several; arguments and errors as `steps`."""
        wanted = {name: value for name, value in self.steps(x) if name in self.graph.outputs}
        outputs = tuple(wanted[name] for name in self.graph.outputs)
        return outputs if len(outputs) > 1 else outputs[0]


def compute(node: Node, values: Sequence[Tensor]) -> Tensor:
    """Compute one float node from its inputs, weights included, as `ops.OPS[node.op].compute` does in numpy."""
    return _COMPUTE[node.op](values, node.attrs)


def as_input(x: Array, dtype: torch.dtype) -> Tensor:
    """Copy an array into a tensor: torch shares memory otherwise, and warns where an array is read-only."""
    return torch.from_numpy(np.array(x)).to(dtype)


def batch_size(graph: Graph, *, most: int) -> int:
    """Give how many images to run at once: at most `most`, and as many as keep all activations near 512 MB in float32.

    Beyond that memory runs out first, and speed is lost with the caches long before.
    """
    values = sum(math.prod(tensor.shape) for tensor in graph.tensors.values() if tensor.data is None)
    return max(1, min(most, _ACTIVATION_VALUES // values))


def predict(
    graph: Graph,
    images: LabelledImages,
    preprocessing: Preprocessing,
    *,
    batch: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Array:
    """Give the class with the largest output for each image: int64 (N,).

    Args:
        graph: float, with one output of one value a class.
        images: what to classify.
        preprocessing: what turns their pixels into the network's input.
        batch: images at once; None for `batch_size`.
        progress: called after each batch with the number of images in it.

    Raises:
        DataError: the images do not fit the network.
        GraphError: the graph is not a legal float graph, or has several inputs or outputs.
    """
    if len(graph.outputs) != 1:
        raise GraphError(f"graph {graph.name!r} has {len(graph.outputs)} outputs, a classifier has one")
    network = Network(graph)
    batch = batch or batch_size(graph, most=256)
    n = len(images.labels)
    classes = np.empty(n, dtype=np.int64)
    with torch.inference_mode():
        for start in range(0, n, batch):
            stop = min(start + batch, n)
            scores = cast("Tensor", network(as_input(images.inputs(preprocessing, start, stop), torch.float32)))
            classes[start:stop] = scores.flatten(1).argmax(1).numpy()
            if progress is not None:
                progress(stop - start)
    return classes


def accuracy(
    graph: Graph,
    images: LabelledImages,
    preprocessing: Preprocessing,
    *,
    batch: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> float:
    """Give the percentage of images whose largest output is their label; arguments and errors as `predict`."""
    classes = predict(graph, images, preprocessing, batch=batch, progress=progress)
    return float((classes == images.labels).mean() * 100)


# ---- operators -------------------------------------------------------------------------------------------------------


def _pad(x: Tensor, attrs: Attrs, fill: float) -> Tensor:
    top, left, bottom, right = ints(attrs, "pads")
    return F.pad(x, (left, right, top, bottom), value=fill) if top or left or bottom or right else x


def _pair(attrs: Attrs, name: str) -> tuple[int, int]:
    first, second = ints(attrs, name)
    return first, second


def _conv2d(values: Sequence[Tensor], attrs: Attrs) -> Tensor:
    x, weight, *bias = values
    top, left, bottom, right = ints(attrs, "pads")
    padding = (top, left)
    if (top, left) != (bottom, right):
        x, padding = _pad(x, attrs, 0.0), (0, 0)
    return F.conv2d(
        x,
        weight,
        bias[0] if bias else None,
        stride=_pair(attrs, "stride"),
        padding=padding,
        dilation=_pair(attrs, "dilation"),
        groups=cast("int", attrs["groups"]),
    )


def _max_pool(values: Sequence[Tensor], attrs: Attrs) -> Tensor:
    # Padded here, because torch's own padding is symmetric and at most half a window.
    x = _pad(values[0], attrs, -torch.inf)
    return F.max_pool2d(x, _pair(attrs, "kernel"), stride=_pair(attrs, "stride"), dilation=_pair(attrs, "dilation"))


def _avg_pool(values: Sequence[Tensor], attrs: Attrs) -> Tensor:
    kernel, stride = _pair(attrs, "kernel"), _pair(attrs, "stride")

    def window_sums(x: Tensor) -> Tensor:
        return F.avg_pool2d(_pad(x, attrs, 0.0), kernel, stride=stride, divisor_override=1)

    x = values[0]
    if attrs["include_pad"]:
        return window_sums(x) / (kernel[0] * kernel[1])
    return window_sums(x) / window_sums(torch.ones_like(x[:1, :1]))


def _clip(values: Sequence[Tensor], attrs: Attrs) -> Tensor:
    return values[0].clamp(cast("float", attrs["low"]), cast("float", attrs["high"]))


def _reshape(values: Sequence[Tensor], attrs: Attrs) -> Tensor:
    return values[0].reshape(values[0].shape[0], *ints(attrs, "shape")[1:])


_COMPUTE: Mapping[Op, Callable[[Sequence[Tensor], Attrs], Tensor]] = {
    Op.CONV2D: _conv2d,
    Op.LINEAR: lambda values, attrs: F.linear(*values),
    Op.ADD: lambda values, attrs: values[0] + values[1],
    Op.MUL: lambda values, attrs: values[0] * values[1],
    Op.SIGMOID: lambda values, attrs: torch.sigmoid(values[0]),
    Op.HARD_SIGMOID: lambda values, attrs: F.hardsigmoid(values[0]),
    Op.SILU: lambda values, attrs: F.silu(values[0]),
    Op.HARD_SWISH: lambda values, attrs: F.hardswish(values[0]),
    Op.CONCAT: lambda values, attrs: torch.cat(tuple(values), dim=cast("int", attrs["axis"])),
    Op.GATHER: lambda values, attrs: values[0][:, list(ints(attrs, "indices"))],
    Op.MAX_POOL: _max_pool,
    Op.AVG_POOL: _avg_pool,
    Op.GLOBAL_AVG_POOL: lambda values, attrs: values[0].mean(dim=(2, 3), keepdim=True),
    Op.CLIP: _clip,
    Op.FLATTEN: lambda values, attrs: values[0].flatten(1),
    Op.RESHAPE: _reshape,
    Op.SOFTMAX: lambda values, attrs: torch.softmax(values[0], dim=cast("int", attrs["axis"])),
}
