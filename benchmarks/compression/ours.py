"""Our own methods: each makes one ONNX file through the same exporter. A new method is one function and one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from edgecomp import planner
from edgecomp.compress import compress
from edgecomp.graph import Graph
from edgecomp.plan import CompressionPlan, Io, LayerPlan

from .context import Context
from .results import Compressed

Ours = Callable[[Context, float, int], Compressed]
"""Context, mean bits a weight, seed -> the file. Bytes and accuracy are measured by the driver."""


def default(context: Context, bits: float, seed: int) -> Compressed:
    """Do what `edgecomp build --avg-bits BITS --format onnx` does; a test compares the bytes."""
    explained = context.explained(seed)
    keep = planner.irrelevant_channels(context.graph, explained.relevance)
    choices = planner.layer_choices(context.graph, explained.relevance, keep, ("onnx",))
    return _reconstructed(context, _plan(context, keep, planner.solve_mean_bits(choices, bits), seed), seed)


def uniform(context: Context, bits: float, seed: int) -> Compressed:
    """Give every layer the same whole width and keep every channel; weights are reconstructed as by default."""
    return _reconstructed(context, _uniform_plan(context, bits, seed), seed)


def uniform_nearest(context: Context, bits: float, seed: int) -> Compressed:
    """Give every layer the same whole width and round to nearest: what a plain int8 or int4 export does."""
    return _exported(context.graph, _uniform_plan(context, bits, seed))


def _uniform_plan(context: Context, bits: float, seed: int) -> CompressionPlan:
    nodes = context.graph.layers()
    keep = {node.name: (True,) * context.graph.weight(node).shape[0] for node in nodes}
    return _plan(context, keep, dict.fromkeys(keep, int(bits)), seed)


def _plan(
    context: Context, keep: Mapping[str, tuple[bool, ...]], bits: Mapping[str, int], seed: int
) -> CompressionPlan:
    return CompressionPlan(
        graph_digest=context.graph.digest(),
        io=Io("float"),
        layers={name: LayerPlan(keep=keep[name], weight_bits=bits[name]) for name in keep},
        ranges=context.explained(seed).ranges,
        preprocessing=context.subject.preprocessing,
        classes=context.images.classes,
        made_by={},
    )


def _reconstructed(context: Context, plan: CompressionPlan, seed: int) -> Compressed:
    from edgecomp.pytorch.recover import reconstruct

    graph = reconstruct(context.graph, plan, context.explained(seed).batches)
    return _exported(graph, replace(plan, graph_digest=graph.digest()))


def _exported(graph: Graph, plan: CompressionPlan) -> Compressed:
    from edgecomp.exporters import export

    bits = {name: layer.weight_bits for name, layer in plan.layers.items()}
    kept = {name: sum(layer.keep) / len(layer.keep) for name, layer in plan.layers.items()}
    details = {"bits": bits, "channels_kept": kept}
    return Compressed(file=export(compress(graph, plan), "onnx").data, details=details)


OURS: Mapping[str, Ours] = {"edgecomp": default, "uniform": uniform, "uniform-nearest": uniform_nearest}
