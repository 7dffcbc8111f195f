"""Our own methods: each makes one ONNX file through the same exporter. A new method is one function and one line."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from edgecomp.build import build
from edgecomp.compress import compress, narrowest_bits
from edgecomp.graph import Graph
from edgecomp.methods import PAPERS, Paper
from edgecomp.options import SCORES
from edgecomp.plan import CompressionPlan, Io, LayerPlan
from edgecomp.planner import mean_bits, solve_mean_bits
from edgecomp.quantmath import Grid
from edgecomp.spending import Budget, BudgetKind

from .context import Context
from .results import Compressed

Ours = Callable[[Context, float, int], Compressed]
"""Context, mean bits a weight, seed -> the file. Bytes and accuracy are measured by the driver."""


def default(context: Context, bits: float, seed: int) -> Compressed:
    """Do what `edgecomp build --avg-bits BITS --format onnx` does, by doing it."""
    return _built(context, bits, seed, None)


def _by_paper(name: str) -> Ours:
    """Do what `edgecomp build --method NAME --avg-bits BITS --format onnx` does, by doing it."""

    def method(context: Context, bits: float, seed: int) -> Compressed:
        return _built(context, bits, seed, PAPERS[name])

    return method


def _built(context: Context, bits: float, seed: int, paper: Paper | None) -> Compressed:
    subject = context.subject
    with tempfile.TemporaryDirectory(prefix="edgecomp-compare-") as folder:
        built = build(
            model=subject.model,
            weights=subject.weights,
            data=subject.data,
            test_share=None,
            preprocessing=subject.preprocessing,
            input_shape=None,
            n_calibration=subject.n_calibration,
            budget=Budget(kind=BudgetKind.AVG_BITS, asked=bits),
            formats=("onnx",),
            io=Io.FLOAT,
            reconstruction=paper is None,
            seed=seed,
            folder=Path(folder) / "built",
            force=False,
            sparsifying=None if paper is None else paper.sparsifying,
            paper=paper,
        )
        file = (built.folder / "model.onnx").read_bytes()
        return Compressed(file=file, details={"layers": built.manifest["layers"]})


def uniform(context: Context, bits: float, seed: int) -> Compressed:
    """Give every layer the same whole width and keep every channel; weights are reconstructed as by default."""
    return _reconstructed(context, _uniform_plan(context, bits, seed), seed)


def uniform_nearest(context: Context, bits: float, seed: int) -> Compressed:
    """Give every layer the same whole width and round to nearest: what a plain int8 or int4 export does."""
    return _exported(context.graph, _uniform_plan(context, bits, seed))


def _scored(kind: str) -> Ours:
    """Choose each layer's grid by a score and reconstruct: only the score differs, and no channel is cut."""

    def method(context: Context, bits: float, seed: int) -> Compressed:
        from edgecomp.pytorch.trial import trial_choices

        choices = trial_choices(context.graph, context.trials(seed), context.scored(seed, kind), ("onnx",))
        return _on_grids(context, solve_mean_bits(choices, bits), seed)

    return method


def same_step(context: Context, bits: float, seed: int) -> Compressed:
    """Give every layer the same step in units of its weights, the finest that fits: grids without any score."""
    from edgecomp.pytorch.trial import trial_choices

    nothing = context.scored(seed, "wanda")
    choices = trial_choices(context.graph, context.trials(seed), nothing, ("onnx",))
    grids = sorted({grid for c in choices for grid in c.error}, key=lambda grid: (grid.step or 0.0, -grid.bits))
    for grid in grids:
        # A layer in which another grid is better and smaller has the next finer one it can have.
        chosen = {
            c.name: min(c.error, key=lambda g: (abs((g.step or 0.1) - (grid.step or 0.1)), -g.bits)) for c in choices
        }
        if mean_bits(choices, chosen) <= bits:
            return _on_grids(context, chosen, seed)
    return _on_grids(context, {c.name: c.cheapest() for c in choices}, seed)


def _on_grids(context: Context, grids: Mapping[str, Grid], seed: int) -> Compressed:
    """Reconstruct and export; scores that choose the same grids have the same file, which is made once."""

    def make() -> Compressed:
        from edgecomp.pytorch.recover import reconstruct

        graph = reconstruct(context.graph, context.ranges(seed), grids, context.batches(seed))
        widths = {name: narrowest_bits(graph, name, grid) for name, grid in grids.items()}
        return _exported(graph, _plan(context, graph, widths, seed))

    made: Compressed = context.kept(seed, f"on {sorted(grids.items())}", make)
    return made


def _uniform_plan(context: Context, bits: float, seed: int) -> CompressionPlan:
    widths = {node.name: int(bits) for node in context.graph.layers()}
    return _plan(context, context.graph, widths, seed)


def _plan(context: Context, graph: Graph, widths: Mapping[str, int], seed: int) -> CompressionPlan:
    channels = {node.name: graph.weight(node).shape[0] for node in graph.layers()}
    return CompressionPlan(
        graph_digest=graph.digest(),
        io=Io.FLOAT,
        layers={name: LayerPlan(keep=(True,) * n, weight_bits=widths[name]) for name, n in channels.items()},
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


OURS: Mapping[str, Ours] = {
    "edgecomp": default,
    **{name: _by_paper(name) for name in PAPERS},
    "uniform": uniform,
    "uniform-nearest": uniform_nearest,
    "same-step": same_step,
    **{f"score-{kind}": _scored(kind) for kind in SCORES},
}
