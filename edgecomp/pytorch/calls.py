"""What `aten` translates with: the values of an exported program, the graph while it grows, one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from edgecomp.errors import CaptureError, UnsupportedOp
from edgecomp.graph import Array, Attribute, Node, Op, Tensor
from edgecomp.ops import OPS, Shape

_TAUGHT = (
    "conv2d, conv1d, linear, batch_norm, relu, relu6, hardtanh, clamp, sigmoid, hardsigmoid, silu, hardswish, add, "
    "mul, cat, chunk, split, channel_shuffle, max_pool2d, max_pool1d, avg_pool2d, avg_pool1d, adaptive_avg_pool2d, "
    "adaptive_avg_pool1d, adaptive_max_pool2d, adaptive_max_pool1d, mean, flatten, reshape, dropout, softmax, pad"
)  # without the other spellings of the same
SUPPORTED = f"edgecomp takes in {_TAUGHT}"
"""The end of every UnsupportedOp message."""


@dataclass(frozen=True, slots=True)
class Activation:
    """A tensor that depends on the image.

    Attributes:
        name: in the graph.
        shape: as the model sees it, N = 1; `in_graph` gives what it is there.
    """

    name: str
    shape: Shape


def in_graph(shape: Shape) -> Shape:
    """Give the shape that a tensor has in the graph: a signal (N, C, T) is an image of one row there."""
    return (*shape[:2], 1, shape[2]) if len(shape) == 3 else shape


@dataclass(frozen=True, slots=True)
class Padded:
    """A tensor with zeros around its image, not written yet: the graph has no such operator, but convolutions pad.

    Attributes:
        inner: what is padded.
        pads: top, left, bottom, right; none is negative.
    """

    inner: Activation
    pads: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Expanded:
    """One value a channel, (N, C, 1, 1), repeated over an image: the graph has no such operator, but products repeat.

    Attributes:
        inner: what is repeated.
        shape: of the image.
    """

    inner: Activation
    shape: Shape


@dataclass(frozen=True, slots=True, eq=False)
class Arranged:
    """An activation whose channels stand in several axes, in another order: half of a channel shuffle.

    Attributes:
        inner: whose channels, (N, C, ...).
        channels: which of them stands where; its axes are those between batch and image.
    """

    inner: Activation
    channels: Array


UNFINISHED = (Padded, Expanded, Arranged)
"""What has no node of its own until an operator reads it that can."""

Value = Activation | Padded | Expanded | Arranged | torch.Tensor | tuple["Value | None", ...]
"""What a node of the exported program stands for: an activation, plain or on its way to one; a constant; several."""


def operator_name(node: fx.Node) -> str:
    """Name the ATen operator of a node, in-place form and overload left out: "relu" for aten.relu_.default."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(getattr(node.target, "__name__", node.target))
    name = str(schema.name).removeprefix("aten::")
    return name.removesuffix("_") if schema.is_mutable else name


def bind(node: fx.Node) -> dict[str, Any]:
    """Give the arguments of a node by their names in the operator's schema, defaults included."""
    arguments = cast("Any", node.target)._schema.arguments
    given = dict(zip((argument.name for argument in arguments), node.args, strict=False)) | dict(node.kwargs)
    return {argument.name: given.get(argument.name, argument.default_value) for argument in arguments}


@dataclass(slots=True, kw_only=True)
class Builder:
    """The graph while it grows.

    Attributes:
        used: names that are taken.
        nodes: in running order.
        tensors: by name.
        reserved: names of modules, which a functional operator may not take.
    """

    used: set[str]
    reserved: frozenset[str]
    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def unique(self, name: str, *, functional: bool) -> str:
        """Take a name: `name` itself, or `name:2`, `name:3` ... where it is taken."""
        n, candidate = 1, name
        while candidate in self.used or (functional and candidate in self.reserved):
            n += 1
            candidate = f"{name}:{n}"
        self.used.add(candidate)
        return candidate

    def emit(
        self,
        name: str,
        op: Op,
        inputs: Sequence[Activation],
        *,
        weights: Mapping[str, Array] | None = None,
        **attrs: Attribute,
    ) -> Activation:
        """Append a node that writes the tensor `name`.

        Raises:
            GraphError: the inputs do not fit together.
        """
        names = [x.name for x in inputs]
        for role, data in (weights or {}).items():
            names.append(f"{name}.{role}")
            self.store(names[-1], data)
        shapes = [self.tensors[x].shape for x in names]
        shape = OPS[op].shape(shapes, attrs)
        self.tensors[name] = Tensor(name=name, shape=shape)
        self.nodes.append(Node(name=name, op=op, inputs=tuple(names), outputs=(name,), attrs=attrs))
        return Activation(name, shape)

    def store(self, name: str, data: Array) -> None:
        """Keep a weight as float32."""
        with np.errstate(over="ignore"):  # the result is checked, and named, just below
            data = np.array(data, dtype=np.float32)
        if not np.isfinite(data).all():
            raise CaptureError(f"weight {name!r} holds NaN or infinity; expected finite numbers: check the training")
        self.tensors[name] = Tensor(name=name, shape=data.shape, data=data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One operator of the exported program about to be translated.

    Attributes:
        build: where nodes go.
        node: the call itself.
        layer: where it stands, for people and for names: "layer1.0.conv2" or "stack1.add".
        functional: whether `layer` ends in an operator's name rather than being a module's own.
        args: by schema name; activations and constants in the place of fx nodes.
        sole: whether nothing but this call reads a given activation.
    """

    build: Builder
    node: fx.Node
    layer: str
    functional: bool
    args: Mapping[str, Any]
    sole: Callable[[Activation], bool]

    def refuse(self, found: str) -> UnsupportedOp:
        """Make the error for this call; `found` says what of it edgecomp does not know."""
        return UnsupportedOp(f"layer {self.layer!r}: {operator_name(self.node)} {found}; {SUPPORTED}")

    def activation(self, name: str, *, ndim: int | None = None) -> Activation:
        """Read an argument that must depend on the image."""
        value = self.args[name]
        self.refuse_unfinished(value)
        if not isinstance(value, Activation):
            kind = "a constant tensor" if isinstance(value, torch.Tensor) else f"the constant {value!r}"
            raise self.refuse(f"with {kind} for {name!r} is not supported")
        if ndim is not None and len(value.shape) != ndim:
            raise self.refuse(f"on a tensor of shape {value.shape} is not supported, only {ndim} dimensions")
        return value

    def refuse_unfinished(self, value: object) -> None:
        """Refuse what only some operators can read.

        Raises:
            UnsupportedOp: with what those are.
        """
        if isinstance(value, Padded):
            raise self.refuse("of a tensor with zeros around it is not supported, only conv2d of such")
        if isinstance(value, Expanded):
            raise self.refuse("of a tensor that was expanded is not supported, only mul of such")
        if isinstance(value, Arranged):
            raise self.refuse("of channels that were transposed is not supported, only view(N, C, H, W) of such")

    def padded(self, name: str, *, ndim: int) -> tuple[Activation, tuple[int, int, int, int]]:
        """Read an argument as `activation` does, and the zeros that stand around it: top, left, bottom, right."""
        value = self.args[name]
        if isinstance(value, Padded) and len(value.inner.shape) == ndim:
            return value.inner, value.pads
        return self.activation(name, ndim=ndim), (0,) * 4

    def constant(self, name: str) -> Array | None:
        """Read an argument that must be a weight, or absent."""
        value = self.args[name]
        if value is None:
            return None
        if not isinstance(value, torch.Tensor):
            raise self.refuse(f"with a {name!r} that is computed from the image is not supported")
        return value.detach().cpu().numpy()

    def weight(self, name: str) -> Array:
        """Read an argument that must be a weight."""
        value = self.constant(name)
        if value is None:
            raise self.refuse(f"without {name!r} is not supported")
        return value

    def pair(self, name: str) -> tuple[int, int]:
        """Read an argument that is one or two whole numbers; an empty stride means the kernel's size.

        That of an operator on signals is one number, along the row.
        """
        value = self.args[name]
        numbers = [int(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
        if not numbers and name == "stride":
            return self.pair("kernel_size")
        if len(self.out_shape()) == 3:
            return (0 if name == "padding" else 1, numbers[0])
        return (numbers[0], numbers[-1])

    def out_shape(self) -> Shape:
        """Give the shape that torch found for the first output."""
        value = self.node.meta["val"]
        return tuple(int(n) for n in (value[0] if isinstance(value, (list, tuple)) else value).shape)

    def emit(
        self, op: Op, inputs: Sequence[Activation], *, weights: Mapping[str, Array] | None = None, **attrs: Attribute
    ) -> Activation:
        """Append the node of this call, under its own name; where torch gives a signal, give one."""
        name = self.build.unique(self.layer, functional=self.functional)
        out = self.build.emit(name, op, inputs, weights=weights, **attrs)
        return Activation(name, (*out.shape[:2], out.shape[3])) if len(self.out_shape()) == 3 else out
