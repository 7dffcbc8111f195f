"""Small float graphs built by hand, and plans for them: what most tests run on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from edgecomp import reference
from edgecomp.graph import Attribute, Graph, Node, Op, Tensor
from edgecomp.ops import OPS
from edgecomp.plan import ActRange, CompressionPlan, Io, LayerPlan
from edgecomp.preprocessing import Preprocessing


class Build:
    """Collects nodes; every method gives the name of the tensor it writes."""

    def __init__(self, seed: int, shape: tuple[int, ...]) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Node] = []
        self.tensors = {"input": Tensor(name="input", shape=(1, *shape))}

    def node(self, op: Op, name: str, inputs: tuple[str, ...], attrs: Mapping[str, Attribute]) -> str:
        shape = OPS[op].shape([self.tensors[i].shape for i in inputs], attrs)
        self.nodes.append(Node(name=name, op=op, inputs=inputs, outputs=(name,), attrs=attrs))
        self.tensors[name] = Tensor(name=name, shape=shape)
        return name

    def parameters(self, name: str, shape: tuple[int, ...], bias: bool) -> tuple[str, ...]:
        fan_in = int(np.prod(shape[1:]))
        weight = self.rng.standard_normal(shape) * np.sqrt(2 / fan_in)
        self.tensors[f"{name}.weight"] = Tensor(name=f"{name}.weight", shape=shape, data=weight.astype(np.float32))
        if not bias:
            return (f"{name}.weight",)
        data = (self.rng.standard_normal(shape[0]) * 0.1).astype(np.float32)
        self.tensors[f"{name}.bias"] = Tensor(name=f"{name}.bias", shape=data.shape, data=data)
        return (f"{name}.weight", f"{name}.bias")

    def conv(
        self,
        name: str,
        x: str,
        out: int,
        kernel: tuple[int, int] = (3, 3),
        *,
        stride: tuple[int, int] = (1, 1),
        pads: tuple[int, int, int, int] = (1, 1, 1, 1),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        bias: bool = True,
    ) -> str:
        shape = (out, self.tensors[x].shape[1] // groups, *kernel)
        inputs = (x, *self.parameters(name, shape, bias))
        attrs = {"stride": stride, "pads": pads, "dilation": dilation, "groups": groups}
        return self.node(Op.CONV2D, name, inputs, attrs)

    def linear(self, name: str, x: str, out: int, *, bias: bool = True) -> str:
        return self.node(Op.LINEAR, name, (x, *self.parameters(name, (out, self.tensors[x].shape[1]), bias)), {})

    def clip(self, name: str, x: str, low: float = 0.0, high: float = np.inf) -> str:
        return self.node(Op.CLIP, name, (x,), {"low": low, "high": high})

    def max_pool(
        self,
        name: str,
        x: str,
        kernel: tuple[int, int] = (2, 2),
        *,
        stride: tuple[int, int] = (2, 2),
        pads: tuple[int, int, int, int] = (0, 0, 0, 0),
        dilation: tuple[int, int] = (1, 1),
    ) -> str:
        attrs = {"kernel": kernel, "stride": stride, "pads": pads, "dilation": dilation}
        return self.node(Op.MAX_POOL, name, (x,), attrs)

    def avg_pool(
        self,
        name: str,
        x: str,
        kernel: tuple[int, int] = (2, 2),
        *,
        stride: tuple[int, int] = (2, 2),
        pads: tuple[int, int, int, int] = (0, 0, 0, 0),
        include_pad: int = 1,
    ) -> str:
        attrs = {"kernel": kernel, "stride": stride, "pads": pads, "include_pad": include_pad}
        return self.node(Op.AVG_POOL, name, (x,), attrs)

    def function(self, op: Op, name: str, x: str) -> str:
        return self.node(op, name, (x,), {})

    def mul(self, name: str, x: str, y: str) -> str:
        return self.node(Op.MUL, name, (x, y), {})

    def squeezed(self, name: str, x: str, squeeze: int, inner: Op | None, gate: Op) -> str:
        """Squeeze and excitation: mean over space, two 1x1 convolutions, a gate for each channel of x."""
        point = {"kernel": (1, 1), "pads": (0, 0, 0, 0)}
        y = self.conv(f"{name}.fc1", self.node(Op.GLOBAL_AVG_POOL, f"{name}.pool", (x,), {}), squeeze, **point)  # type: ignore[arg-type]
        y = self.clip(f"{name}.act", y) if inner is None else self.function(inner, f"{name}.act", y)
        y = self.conv(f"{name}.fc2", y, self.tensors[x].shape[1], **point)  # type: ignore[arg-type]
        return self.mul(f"{name}.mul", self.function(gate, f"{name}.gate", y), x)

    def graph(self, output: str, name: str = "net") -> Graph:
        return Graph(
            name=name, nodes=tuple(self.nodes), tensors=self.tensors, inputs=("input",), outputs=(output,)
        )


def plain(seed: int = 0) -> Graph:
    """Conv-relu-pool twice, flatten, two linear layers: the shape of AlexNet and VGG."""
    b = Build(seed, (3, 8, 8))
    x = b.max_pool("pool1", b.clip("relu1", b.conv("conv1", "input", 8)))
    x = b.clip("relu2", b.conv("conv2", x, 12))
    x = b.node(Op.FLATTEN, "flatten", (b.max_pool("pool2", x),), {})
    x = b.clip("relu3", b.linear("fc1", x, 20))
    return b.graph(b.linear("fc2", x, 10), "plain")


def residual(seed: int = 0) -> Graph:
    """A residual block with a strided shortcut, then global average pooling: the shape of ResNet."""
    b = Build(seed, (3, 8, 8))
    x = b.clip("relu", b.conv("stem", "input", 8))
    y = b.clip("block.relu", b.conv("block.conv1", x, 12, stride=(2, 2)))
    y = b.conv("block.conv2", y, 12, bias=False)
    s = b.conv("block.shortcut", x, 12, (1, 1), stride=(2, 2), pads=(0, 0, 0, 0))
    x = b.clip("out.relu", b.node(Op.ADD, "block.add", (y, s), {}))
    x = b.clip("end.relu", b.node(Op.ADD, "end.add", (b.conv("end.conv", x, 12), x), {}))
    x = b.node(Op.FLATTEN, "flatten", (b.node(Op.GLOBAL_AVG_POOL, "pool", (x,), {}),), {})
    return b.graph(b.linear("fc", x, 10), "residual")


def separable(seed: int = 0) -> Graph:
    """Depthwise-separable blocks with ReLU6 and a linear bottleneck added back: the shape of MobileNetV2."""
    b = Build(seed, (3, 8, 8))
    x = b.conv("stem", "input", 8)
    y = b.clip("expand.relu6", b.conv("expand", x, 16, (1, 1), pads=(0, 0, 0, 0)), 0, 6)
    y = b.clip("dw.relu6", b.conv("dw", y, 16, groups=16), 0, 6)
    x = b.node(Op.ADD, "add", (b.conv("project", y, 8, (1, 1), pads=(0, 0, 0, 0)), x), {})
    x = b.clip("grouped.relu", b.conv("grouped", x, 8, groups=2))
    x = b.avg_pool("pool", x)
    x = b.node(Op.FLATTEN, "flatten", (x,), {})
    x = b.linear("fc", x, 10)
    return b.graph(b.node(Op.SOFTMAX, "softmax", (x,), {"axis": 1}), "separable")


def branches(seed: int = 0) -> Graph:
    """Branches concatenated, one of them without ReLU, one pooled with padding: the shape of Inception and DenseNet."""
    b = Build(seed, (2, 9, 9))
    x = b.clip("relu", b.conv("stem", "input", 6))
    p = b.clip("a.relu", b.conv("a", x, 4, (1, 1), pads=(0, 0, 0, 0)))
    q = b.conv("b", x, 5, (3, 3), pads=(2, 2, 2, 2), dilation=(2, 2))
    r = b.max_pool("c", x, (3, 3), stride=(1, 1), pads=(1, 1, 1, 1))
    x = b.node(Op.CONCAT, "cat", (p, q, r), {"axis": 1})
    x = b.clip("cat.relu", x)
    x = b.avg_pool("pool", b.conv("mix", x, 8, stride=(2, 2), pads=(0, 1, 1, 0)), (3, 3), pads=(1, 1, 1, 1))
    x = b.node(Op.FLATTEN, "flatten", (x,), {})
    return b.graph(b.linear("fc", x, 10), "branches")


def multiplied(seed: int = 0) -> Graph:
    """Depthwise convolutions with two outputs an input, one behind the other: where channel numbers repeat."""
    b = Build(seed, (2, 6, 6))
    x = b.clip("relu", b.conv("stem", "input", 4))
    x = b.clip("dw1.relu6", b.conv("dw1", x, 8, groups=4), 0, 6)
    x = b.conv("dw2", b.max_pool("pool", x), 16, groups=8)
    x = b.node(Op.FLATTEN, "flatten", (x,), {})
    return b.graph(b.linear("fc", x, 5), "multiplied")


def dense(seed: int = 0) -> Graph:
    """Growing concats, then flattened images and features side by side: the shape of DenseNet with a wide head."""
    b = Build(seed, (2, 6, 6))
    x = b.clip("relu", b.conv("stem", "input", 4))
    for i in (1, 2):
        y = b.clip(f"relu{i}", b.conv(f"conv{i}", x, 3))
        x = b.node(Op.CONCAT, f"cat{i}", (x, y), {"axis": 1})
    x = b.node(Op.FLATTEN, "flatten", (b.max_pool("pool", x),), {})
    y = b.clip("side.relu", b.linear("side", x, 6))
    x = b.node(Op.CONCAT, "cat", (x, y), {"axis": 1})
    return b.graph(b.linear("fc", x, 5), "dense")


def gated(seed: int = 0) -> Graph:
    """Every gate and every function of one number: the shape of EfficientNet, then of MobileNetV3."""
    b = Build(seed, (3, 8, 8))
    x = b.function(Op.HARD_SWISH, "stem.act", b.conv("stem", "input", 8))
    y = b.function(Op.SILU, "expand.act", b.conv("expand", x, 12, (1, 1), pads=(0, 0, 0, 0)))
    y = b.function(Op.SILU, "dw.act", b.conv("dw", y, 12, groups=12))
    y = b.squeezed("se", y, 6, Op.SILU, Op.SIGMOID)
    x = b.node(Op.ADD, "add", (b.conv("project", y, 8, (1, 1), pads=(0, 0, 0, 0)), x), {})
    y = b.function(Op.HARD_SWISH, "conv.act", b.conv("conv", x, 10, stride=(2, 2)))
    y = b.squeezed("se2", y, 5, None, Op.HARD_SIGMOID)
    # A product of equal shapes, limited behind it.
    y = b.clip("both.relu6", b.mul("both", y, b.function(Op.SIGMOID, "side.gate", b.conv("side", y, 10))), 0, 6)
    x = b.node(Op.FLATTEN, "flatten", (b.node(Op.GLOBAL_AVG_POOL, "pool", (y,), {}),), {})
    x = b.function(Op.HARD_SWISH, "fc1.act", b.linear("fc1", x, 14))
    return b.graph(b.linear("fc2", x, 10), "gated")


def shuffled(seed: int = 0) -> Graph:
    """Channels shuffled, cut in two, one half passed on; then some, in any order: the shape of ShuffleNet."""
    b = Build(seed, (3, 8, 8))
    point = {"kernel": (1, 1), "pads": (0, 0, 0, 0)}
    x = b.clip("stem.relu", b.conv("stem", "input", 6))
    y = b.clip("right.relu", b.conv("right", x, 6, **point))  # type: ignore[arg-type]
    x = b.node(Op.CONCAT, "cat1", (x, y), {"axis": 1})
    x = b.node(Op.GATHER, "shuffle1", (x,), {"indices": tuple(i + 6 * j for i in range(6) for j in range(2))})
    kept = b.node(Op.GATHER, "chunk1", (x,), {"indices": tuple(range(6))})
    y = b.node(Op.GATHER, "chunk2", (x,), {"indices": tuple(range(6, 12))})
    y = b.conv("dw", b.clip("expand.relu", b.conv("expand", y, 6, **point)), 6, groups=6)  # type: ignore[arg-type]
    y = b.clip("project.relu", b.conv("project", y, 6, **point))  # type: ignore[arg-type]
    x = b.node(Op.CONCAT, "cat2", (kept, y), {"axis": 1})
    x = b.node(Op.GATHER, "shuffle2", (x,), {"indices": tuple(i + 4 * j for i in range(4) for j in range(3))})
    x = b.clip("end.relu", b.conv("end", x, 8, stride=(2, 2)))
    x = b.node(Op.FLATTEN, "flatten", (b.node(Op.GLOBAL_AVG_POOL, "pool", (x,), {}),), {})
    x = b.node(Op.GATHER, "some", (x,), {"indices": (7, 0, 1, 2, 4, 4)})
    return b.graph(b.linear("fc", x, 10), "shuffled")


GRAPHS = {
    "plain": plain,
    "residual": residual,
    "separable": separable,
    "branches": branches,
    "gated": gated,
    "shuffled": shuffled,
}


def alone(graph: Graph, node: Node) -> Graph:
    """The graph of one node, its activations as inputs."""
    inputs = tuple(name for name in dict.fromkeys(node.inputs) if graph.tensors[name].data is None)
    tensors = {name: graph.tensors[name] for name in (*node.inputs, *node.outputs)}
    return replace(graph, nodes=(node,), tensors=tensors, inputs=inputs, outputs=node.outputs)


def images(graph: Graph, count: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, *graph.tensors[graph.inputs[0]].shape[1:])).astype(np.float32)


def plan_for(
    graph: Graph,
    bits: int | Mapping[str, int] = 8,
    *,
    io: Io = Io.FLOAT,
    drop: Mapping[str, tuple[int, ...]] | None = None,
) -> CompressionPlan:
    """A plan with ranges from 32 random images and the given bits and dropped channels."""
    values = reference.run(graph, {graph.inputs[0]: images(graph, 32)})
    layers = {}
    for node in graph.layers():
        dropped = (drop or {}).get(node.name, ())
        keep = tuple(i not in dropped for i in range(graph.weight(node).shape[0]))
        layers[node.name] = LayerPlan(keep=keep, weight_bits=bits if isinstance(bits, int) else bits[node.name])
    return CompressionPlan(
        graph_digest=graph.digest(),
        io=io,
        layers=layers,
        ranges={name: ActRange(low=float(v.min()), high=float(v.max())) for name, v in values.items()},
        preprocessing=Preprocessing(mean=(0.0,), std=(1.0,)),
    )
