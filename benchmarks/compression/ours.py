"""Our own methods: each makes one ONNX file through the same exporter. A new method is one function and one line."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from edgecomp.build import build
from edgecomp.compress import compress
from edgecomp.graph import Graph
from edgecomp.plan import CompressionPlan, Io, LayerPlan
from edgecomp.quantmath import Grid
from edgecomp.spending import Budget, BudgetKind

from .context import Context
from .results import Compressed

Ours = Callable[[Context, float, int], Compressed]
"""Context, mean bits a weight, seed -> the file. Bytes and accuracy are measured by the driver."""


def default(context: Context, bits: float, seed: int) -> Compressed:
    """Do what `edgecomp build --avg-bits BITS --format onnx` does, by doing it."""
    subject = context.subject
    with tempfile.TemporaryDirectory(prefix="edgecomp-compare-") as folder:
        built = build(
            model=subject.model,
            weights=subject.weights,
            data=subject.data,
            preprocessing=subject.preprocessing,
            input_shape=None,
            n_calibration=subject.n_calibration,
            budget=Budget(kind=BudgetKind.AVG_BITS, asked=bits),
            formats=("onnx",),
            io=Io.FLOAT,
            reconstruction=True,
            seed=seed,
            folder=Path(folder) / "built",
            force=False,
        )
        file = (built.folder / "model.onnx").read_bytes()
        return Compressed(file=file, details={"layers": built.manifest["layers"]})


def uniform(context: Context, bits: float, seed: int) -> Compressed:
    """Give every layer the same whole width and keep every channel; weights are reconstructed as by default."""
    return _reconstructed(context, _uniform_plan(context, bits, seed), seed)


def uniform_nearest(context: Context, bits: float, seed: int) -> Compressed:
    """Give every layer the same whole width and round to nearest: what a plain int8 or int4 export does."""
    return _exported(context.graph, _uniform_plan(context, bits, seed))


def _uniform_plan(context: Context, bits: float, seed: int) -> CompressionPlan:
    channels = {node.name: context.graph.weight(node).shape[0] for node in context.graph.layers()}
    return CompressionPlan(
        graph_digest=context.graph.digest(),
        io=Io.FLOAT,
        layers={name: LayerPlan(keep=(True,) * n, weight_bits=int(bits)) for name, n in channels.items()},
        ranges=context.ranges(seed),
        preprocessing=context.subject.preprocessing,
        classes=context.images.classes,
        made_by={},
    )


def _reconstructed(context: Context, plan: CompressionPlan, seed: int) -> Compressed:
    from edgecomp.pytorch.recover import reconstruct

    grids = {name: Grid(bits=layer.weight_bits) for name, layer in plan.layers.items()}
    graph = reconstruct(context.graph, plan.ranges, grids, context.batches(seed))
    return _exported(graph, replace(plan, graph_digest=graph.digest()))


def _exported(graph: Graph, plan: CompressionPlan) -> Compressed:
    from edgecomp.exporters import export

    bits = {name: layer.weight_bits for name, layer in plan.layers.items()}
    return Compressed(file=export(compress(graph, plan), "onnx").data, details={"bits": bits})


OURS: Mapping[str, Ours] = {"edgecomp": default, "uniform": uniform, "uniform-nearest": uniform_nearest}
