"""Random small networks, compressed at random, exported, and run in stock runtimes beside the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from edgecomp import quantmath, reference
from edgecomp.benchmarks.runners import RUNNERS, LiteRt, LiteRtReference, OnnxRuntime
from edgecomp.bundle import from_bytes, to_bytes
from edgecomp.compress import compress, cut
from edgecomp.errors import ExportError
from edgecomp.exporters import export
from edgecomp.exporters.layout import stored_axis, window_padding
from edgecomp.graph import Graph, Op
from edgecomp.groups import gather_nodes, is_depthwise, number_channels
from edgecomp.ops import OPS, PROBABILITIES, ints
from edgecomp.plan import ActRange, CompressionPlan, Io, LayerPlan
from edgecomp.preprocessing import Preprocessing
from edgecomp.quantmath import WEIGHT_BITS
from tests.graphs import Build

N_IMAGES = 3
MAX_CHANNELS = 12
RUNTIMES = {
    "onnxruntime": ("onnx", OnnxRuntime),
    "litert-reference": ("tflite", LiteRtReference),
    "litert": ("tflite", LiteRt),
}
assert RUNTIMES.keys() <= RUNNERS.keys()

# A node fed with the runtime's own codes may differ by the last place where runtime and reference round in different
# arithmetic. A softmax's exponential comes from a table or a polynomial: one more.
STEPS_OF_A_NODE = dict.fromkeys(Op, 1) | {Op.SOFTMAX: 2}
# Only what neither multiplies nor divides is exact.
STEPS_OF_A_NODE |= dict.fromkeys((Op.MAX_POOL, Op.CONCAT, Op.GATHER, Op.FLATTEN, Op.RESHAPE, Op.CLIP), 0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A float graph with a plan and float images (N, C, H, W) for it."""

    graph: Graph
    plan: CompressionPlan
    images: np.ndarray


def pick(rng: np.random.Generator, *choices: object) -> object:
    return choices[int(rng.integers(len(choices)))]


# ---- networks --------------------------------------------------------------------------------------------------------


class _Draw(Build):
    """Draws nodes; what it draws is legal and something that PyTorch can express."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
        super().__init__(int(rng.integers(1 << 30)), shape)
        self.draw = rng

    def count(self, low: int, high: int) -> int:
        return int(self.draw.integers(low, high + 1))

    def chance(self, share: float) -> bool:
        return bool(self.draw.random() < share)

    def name(self, stem: str) -> str:
        return f"{stem}{len(self.nodes)}"

    def shape(self, x: str) -> tuple[int, ...]:
        return self.tensors[x].shape

    def window(self, x: str, *, pool: bool, dilated: bool) -> dict[str, tuple[int, ...]]:
        """Kernel, stride, pads, dilation that give at least one pixel; a pool pads half its window at most."""
        kernel, stride, dilation, pads = [], [], [], [[0, 0], [0, 0]]
        for axis in (0, 1):
            extent = self.shape(x)[2 + axis]
            spread = self.count(1, 2) if dilated and self.chance(0.3) else 1
            taps = self.count(1, max(1, min(4, (extent - 1) // spread + 1)))
            most = taps // 2 if pool else spread * (taps - 1)
            if self.chance(0.6):
                before = self.count(0, most)
                pads[axis] = [before, before if self.chance(0.6) else self.count(0, most)]
            kernel.append(taps)
            dilation.append(spread)
            stride.append(self.count(1, 2) if self.chance(0.7) else self.count(1, 3))
        return {
            "kernel": tuple(kernel),
            "stride": tuple(stride),
            "pads": (pads[0][0], pads[1][0], pads[0][1], pads[1][1]),
            "dilation": tuple(dilation),
        }

    def some_conv(self, x: str) -> str:
        channels = self.shape(x)[1]
        window = self.window(x, pool=False, dilated=True)
        kernel = window.pop("kernel")
        out, groups = self.count(1, MAX_CHANNELS), 1
        kind = pick(self.draw, "dense", "dense", "dense", "pointwise", "depthwise", "grouped")
        if kind == "pointwise":
            kernel, window["pads"], window["dilation"] = (1, 1), (0, 0, 0, 0), (1, 1)
        if kind == "depthwise":
            groups, out = channels, channels * (2 if self.chance(0.3) and channels <= 6 else 1)
        if kind == "grouped":
            groups = int(self.draw.choice([g for g in range(1, channels + 1) if channels % g == 0]))
            out = groups * self.count(1, max(1, MAX_CHANNELS // groups))
        return self.conv(self.name("conv"), x, out, kernel, groups=groups, bias=self.chance(0.8), **window)  # type: ignore[arg-type]

    def some_clip(self, x: str) -> str:
        low, high = pick(
            self.draw,
            (0.0, np.inf),
            (0.0, np.inf),
            (0.0, 6.0),
            (-1.0, 1.0),
            (-np.inf, round(float(self.draw.normal()), 3)),
            tuple(sorted(np.round(self.draw.normal(size=2), 3).tolist())),
        )  # type: ignore[misc]
        return self.clip(self.name("clip"), x, low, high)

    def some_pool(self, x: str) -> str:
        if self.chance(0.5):
            window = self.window(x, pool=True, dilated=self.chance(0.1))
            return self.node(Op.MAX_POOL, self.name("max"), (x,), window)
        window = self.window(x, pool=True, dilated=False)
        del window["dilation"]
        return self.node(Op.AVG_POOL, self.name("avg"), (x,), {**window, "include_pad": self.count(0, 1)})

    def partner(self, x: str, axis: int | None) -> str:
        """Find or make a tensor that can be added to x, or stand beside it along `axis`."""

        def rest(shape: tuple[int, ...]) -> tuple[int, ...]:
            return shape if axis is None else shape[:axis] + shape[axis + 1 :]

        wanted = self.shape(x)
        fits = [
            t.name
            for t in self.tensors.values()
            if t.data is None and len(t.shape) == len(wanted) and rest(t.shape) == rest(wanted)
        ]
        if self.chance(0.5):
            return str(self.draw.choice(fits))
        if len(wanted) == 2:
            return self.linear(self.name("branch"), x, wanted[1], bias=self.chance(0.8))
        return self.conv(self.name("branch"), x, wanted[1], bias=self.chance(0.8))

    def some_add(self, x: str) -> str:
        return self.node(Op.ADD, self.name("add"), (x, self.partner(x, None)), {})

    def some_function(self, x: str) -> str:
        op = Op(str(pick(self.draw, "sigmoid", "hard_sigmoid", "silu", "silu", "hard_swish", "hard_swish")))
        return self.function(op, self.name(op.value), x)

    def some_product(self, x: str) -> str:
        """A gate of each channel, or of each value; or any two."""
        if self.chance(0.2):
            return self.mul(self.name("mul"), x, self.partner(x, None))
        gate = Op(str(pick(self.draw, "sigmoid", "hard_sigmoid")))
        if len(self.shape(x)) == 4 and self.chance(0.6):
            return self.squeezed(self.name("se"), x, self.count(1, 4), Op.SILU if self.chance(0.5) else None, gate)
        return self.mul(self.name("mul"), self.function(gate, self.name("gate"), self.partner(x, None)), x)

    def some_concat(self, x: str) -> str:
        axis = int(pick(self.draw, 1, 1, 1, 2, 3)) if len(self.shape(x)) == 4 else 1  # type: ignore[call-overload]
        parts = (x, *(self.partner(x, axis) for _ in range(self.count(1, 2))))
        if sum(self.shape(p)[axis] for p in parts) > 3 * MAX_CHANNELS and len(self.shape(x)) == 4:
            return x
        return self.node(Op.CONCAT, self.name("cat"), parts, {"axis": axis})

    def some_gather(self, x: str) -> str:
        """A channel shuffle, a run of channels, or any."""
        n = self.shape(x)[1]
        groups = int(self.draw.choice([g for g in range(1, n + 1) if n % g == 0]))
        indices = np.arange(n).reshape(groups, -1).T.ravel()
        if self.chance(0.5):
            start = self.count(0, n - 1)
            indices = np.arange(start, self.count(start + 1, n))
        elif self.chance(0.3):
            indices = self.draw.integers(n, size=self.count(1, n))
        return self.node(Op.GATHER, self.name("gather"), (x,), {"indices": tuple(indices.tolist())})

    def body(self, x: str) -> str:
        for _ in range(self.count(1, 6)):
            match pick(
                self.draw, "conv", "conv", "conv", "clip", "clip", "pool", "add", "concat", "gather", "function",
                "product",
            ):  # fmt: skip
                case "gather":
                    x = self.some_gather(x)
                case "function":
                    x = self.some_function(x)
                case "product":
                    x = self.some_product(x)
                case "conv":
                    x = self.some_conv(x)
                case "clip":
                    x = self.some_clip(x)
                case "pool":
                    x = self.some_pool(x)
                case "add":
                    x = self.some_add(x)
                case "concat":
                    x = self.some_concat(x)
        return x

    def head(self, x: str) -> str:
        if self.chance(0.1):
            return x
        if self.chance(0.5):
            x = self.node(Op.GLOBAL_AVG_POOL, self.name("gap"), (x,), {})
        shape = self.shape(x)
        if self.chance(0.15):
            factor = int(self.draw.choice([f for f in range(1, 5) if shape[1] * shape[3] % f == 0]))
            new = (1, factor, shape[2], shape[1] * shape[3] // factor)
            x = self.node(Op.RESHAPE, self.name("reshape"), (x,), {"shape": new})
        if self.chance(0.15):
            x = self.node(Op.RESHAPE, self.name("rows"), (x,), {"shape": (1, int(np.prod(self.shape(x))))})
        else:
            x = self.node(Op.FLATTEN, self.name("flatten"), (x,), {})
        for _ in range(self.count(0, 2)):
            x = self.linear(self.name("fc"), x, self.count(1, MAX_CHANNELS), bias=self.chance(0.8))
            match pick(self.draw, "clip", "clip", "add", "concat", "gather", "function", "product", "nothing"):
                case "gather":
                    x = self.some_gather(x)
                case "function":
                    x = self.some_function(x)
                case "product":
                    x = self.some_product(x)
                case "clip":
                    x = self.some_clip(x)
                case "add":
                    x = self.some_add(x)
                case "concat":
                    x = self.some_concat(x)
        if self.chance(0.3):
            x = self.node(Op.SOFTMAX, self.name("softmax"), (x,), {"axis": 1})
        return x


def random_graph(rng: np.random.Generator) -> Graph:
    """Draw a legal float graph whose last node is its output; what nothing reads is left out."""
    while True:
        draw = _Draw(rng, (int(rng.integers(1, 5)), int(rng.integers(1, 13)), int(rng.integers(1, 13))))
        output = draw.head(draw.body("input"))
        graph = _living(draw.graph(output, "random"))
        if graph.nodes and graph.inputs[0] in {name for node in graph.nodes for name in node.inputs}:
            return graph


def _living(graph: Graph) -> Graph:
    needed = set(graph.outputs)
    nodes = []
    for node in reversed(graph.nodes):
        if node.outputs[0] in needed:
            needed |= set(node.inputs)
            nodes.append(node)
    tensors = {name: t for name, t in graph.tensors.items() if name in needed or name in graph.inputs}
    return replace(graph, nodes=tuple(reversed(nodes)), tensors=tensors)


def random_keep(rng: np.random.Generator, graph: Graph) -> dict[str, tuple[bool, ...]]:
    """Draw a consistent choice of channels; every layer and every gather keeps one at least."""
    channels = number_channels(graph)
    kept = channels.locked | (rng.random(len(channels.locked)) < pick(rng, 0.3, 0.7, 1.0))
    for node in (*graph.layers(), *gather_nodes(graph)):
        numbers = channels.of[node.outputs[0]]
        if not kept[numbers].any():
            kept[rng.choice(numbers)] = True
    return {node.name: tuple(kept[channels.of[node.outputs[0]]].tolist()) for node in graph.layers()}


def random_case(rng: np.random.Generator) -> Case:
    graph = random_graph(rng)
    shape = graph.tensors["input"].shape[1:]
    values = reference.run(graph, {"input": rng.standard_normal((8, *shape)).astype(np.float32)})
    share = rng.uniform(0.6, 1.2)  # of what was seen: outliers saturate, or the range has room left
    plan = CompressionPlan(
        graph_digest=graph.digest(),
        io=Io(str(pick(rng, "float", "int8"))),
        layers={
            name: LayerPlan(keep=keep, weight_bits=int(rng.choice(WEIGHT_BITS)))
            for name, keep in random_keep(rng, graph).items()
        },
        ranges={
            name: ActRange(low=float(v.min()) * share, high=float(v.max()) * share)
            if float(v.min()) <= 0 <= float(v.max())
            else ActRange(low=float(v.min()), high=float(v.max()))
            for name, v in values.items()
        },
        preprocessing=Preprocessing(mean=(0.0,), std=(1.0,)),
    )
    return Case(graph=graph, plan=plan, images=rng.standard_normal((N_IMAGES, *shape)).astype(np.float32))


def drawing(graph: Graph) -> str:
    """Write a graph down so that a person can build it again."""
    lines = [f"input {graph.tensors[graph.inputs[0]].shape}"]
    for node in graph.nodes:
        inputs = ", ".join(f"{name}{list(graph.tensors[name].shape)}" for name in node.inputs)
        lines.append(f"  {node.op.value} {node.name}({inputs}) {dict(node.attrs)} -> "
                     f"{node.outputs[0]}{list(graph.tensors[node.outputs[0]].shape)}")  # fmt: skip
    return "\n".join(lines)


# ---- checks ----------------------------------------------------------------------------------------------------------


def refused_by_tflite(graph: Graph) -> bool:
    """Tell whether the format lacks something that the graph has; the three documented cases."""
    for node in graph.nodes:
        shape = graph.tensors[node.inputs[0]].shape
        if node.op is Op.MAX_POOL and ints(node.attrs, "dilation") != (1, 1):
            return True
        if node.op is Op.AVG_POOL and not node.attrs["include_pad"]:
            window = window_padding(shape, ints(node.attrs, "kernel"), node)
            if any(window.pads) and not window.same:
                return True
        if node.op is Op.SOFTMAX and stored_axis(int(node.attrs["axis"]), len(shape)) != len(shape) - 1:  # type: ignore[arg-type]
            return True
    return False


def check(case: Case) -> None:
    """Compare everything that can be compared.

    Raises:
        AssertionError: with what differs where.
    """
    check_bundle(case.graph)
    keep = {name: layer.keep for name, layer in case.plan.layers.items()}
    check_cut(case.graph, keep, case.images)
    quantized = compress(case.graph, case.plan)
    again = compress(from_bytes(to_bytes(case.graph)), CompressionPlan.from_json(case.plan.to_json()))
    assert again.digest() == quantized.digest(), "the same plan and graph gave another quantized graph"
    check_float(cut(case.graph, keep), case.images)
    check_quantized(quantized, case.images)


def check_bundle(graph: Graph) -> None:
    data = to_bytes(graph)
    again = from_bytes(data)
    assert again.digest() == graph.digest(), "graph file: another digest after reading"
    assert to_bytes(again) == data, "graph file: other bytes when written again"


def check_cut(graph: Graph, keep: Mapping[str, tuple[bool, ...]], images: np.ndarray) -> None:
    """A cut channel is one whose readers have weight 0 for it: in float64, equal but for the order of sums."""
    channels = number_channels(graph)
    kept = np.ones(len(channels.locked), dtype=bool)
    tensors = dict(graph.tensors)
    for node in graph.layers():
        kept[channels.of[node.outputs[0]]] = keep[node.name]
    for node in graph.layers():
        if not is_depthwise(graph, node) and node.attrs.get("groups", 1) == 1:
            weight = graph.weight(node)
            assert weight.data is not None
            mask = kept[channels.of[node.inputs[0]]].reshape(1, -1, *(1,) * (weight.data.ndim - 2))
            tensors[weight.name] = replace(weight, data=(weight.data * mask).astype(np.float32))
    x = {graph.inputs[0]: images.astype(np.float64)}
    want = reference.run(replace(graph, tensors=tensors), x)[graph.outputs[0]]
    got = reference.run(cut(graph, keep), x)[graph.outputs[0]]
    _close(got, want, 1e-9 * (1 + float(np.abs(want).max())), "cut against mask")


def check_float(graph: Graph, images: np.ndarray) -> None:
    """Float files of all runtimes against float64: tolerance of float32 sums, relative to the largest activation."""
    values = reference.run(graph, {graph.inputs[0]: images.astype(np.float64)})
    want = values[graph.outputs[0]]
    # Cancellation: a small output may be the sum of large values further up.
    tolerance = 2e-5 * (1 + max(float(np.abs(v).max()) for v in values.values()))
    for runtime, got in run_all(graph, images).items():
        _close(got[graph.outputs[0]], want, tolerance, f"float in {runtime}")


def check_quantized(graph: Graph, images: np.ndarray) -> None:
    quant = graph.tensors[graph.inputs[0]].quant
    x = images if quant is None else quantmath.quantize(images, quant)
    want = reference.run(graph, {graph.inputs[0]: x})[graph.outputs[0]]
    step, slack = unit(graph), sensitivity(graph, x, want)
    for runtime, values in run_all(graph, x).items():
        _close(values[graph.outputs[0]], want, slack, f"whole file in {runtime} (one step is {step:.3g})")
    integers = [n for n in graph.nodes if graph.tensors[n.outputs[0]].quant is not None]
    if not integers:
        return
    # The same file with every integer tensor as an output: each node is judged on the codes that the runtime gave it.
    watched = replace(graph, outputs=tuple(n.outputs[0] for n in integers))
    for runtime, values in run_all(watched, x).items():
        codes = {t.name: t.data for t in graph.tensors.values() if t.data is not None} | {graph.inputs[0]: x}
        codes |= {name: v.reshape(len(x), *graph.tensors[name].shape[1:]) for name, v in values.items()}
        for node in integers:
            row = OPS[node.op]
            assert row.compute_integer is not None
            alone = row.compute_integer(node, graph.tensors, codes)
            _close(codes[node.outputs[0]], alone, STEPS_OF_A_NODE[node.op], f"node {node.name!r} in {runtime}")


def unit(graph: Graph) -> float:
    """Give what one code of the output is worth in the numbers the file gives."""
    last = graph.producer()[graph.outputs[0]]
    quant = graph.tensors[last.inputs[0]].quant
    return float(quant.scale) if last.op is Op.DEQUANTIZE and quant is not None else 1.0


def sensitivity(graph: Graph, x: np.ndarray, want: np.ndarray) -> float:
    """How far the output moves when every code that a node rounds is off by 1, up or down at random.

    A runtime rounds few codes otherwise, but those of a small tensor may all go the same way; three times the largest
    movement in eight such runs, and one step, covers that. Each node is judged on its own, too, and far more sharply:
    this is for what goes wrong only in the file as it is, where a runtime fuses nodes.
    """
    rng, largest = np.random.default_rng(0), 0.0
    for _ in range(8):
        values = {t.name: t.data for t in graph.tensors.values() if t.data is not None} | {graph.inputs[0]: x}
        for node in graph.nodes:
            row, output = OPS[node.op], graph.tensors[node.outputs[0]]
            if output.quant is None and node.op is not Op.DEQUANTIZE:
                values[output.name] = row.compute([values[name] for name in node.inputs], node.attrs)
                continue
            assert row.compute_integer is not None
            value = row.compute_integer(node, graph.tensors, values)
            if node.op is not Op.DEQUANTIZE and STEPS_OF_A_NODE[node.op]:
                noise = rng.choice((-1, 1), size=value.shape)
                value = np.clip(value.astype(np.int64) + noise, -128, 127).astype(np.int8)
            values[output.name] = value
        largest = max(largest, float(np.abs(values[graph.outputs[0]].astype(np.float64) - want).max()))
    real = graph.producer()[graph.outputs[0]].op in PROBABILITIES and want.dtype != np.int8
    return 3 * largest + (1e-5 if real else 1.001 * unit(graph))


def run_all(graph: Graph, x: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Export and run in every runtime: outputs by name, by runtime. A refusal is an error unless documented."""
    files, results = {"onnx": export(graph, "onnx").data}, {}
    assert export(graph, "onnx").data == files["onnx"], "onnx: other bytes when exported again"
    reason = ""
    try:
        files["tflite"] = export(graph, "tflite").data
    except ExportError as e:
        reason = str(e)
    assert bool(reason) == refused_by_tflite(graph), f"tflite: refused with {reason!r}; documented otherwise"
    for runtime, (format_name, runner) in RUNTIMES.items():
        if format_name in files:
            results[runtime] = dict(runner(files[format_name]).run_all(x))
    return results


def _close(got: np.ndarray, want: np.ndarray, tolerance: float, what: str) -> None:
    assert got.size == want.size, f"{what}: {got.shape} for {want.shape}"
    off = np.abs(got.reshape(want.shape).astype(np.float64) - want.astype(np.float64))
    worst = np.unravel_index(off.argmax(), off.shape)
    place = tuple(int(i) for i in worst)
    assert off[worst] <= tolerance, (
        f"{what}: at {place} got {got.reshape(want.shape)[worst]}, want {want[worst]}, tolerance {tolerance:.4g}; "
        f"{int((off > tolerance).sum())} of {off.size} are off"
    )


