"""A built folder of a small network, written without torch, data or measurement: what readers of folders run on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgecomp import bundle, manifest
from edgecomp.compress import compress
from edgecomp.exporters import export
from edgecomp.files import MANIFEST, MANIFEST_SCHEMA, PLAN_FILE
from edgecomp.graph import Graph
from edgecomp.plan import CompressionPlan, LayerRelevance, Relevance
from edgecomp.provenance import tools
from edgecomp.strictjson import write_json
from tests.graphs import plain, plan_for

FORMATS = ("onnx", "tflite")
MEASURED = {
    "accuracy": {"value": 87.5, "n": 64, "runtime": "onnxruntime 1.20.0"},
    "parity": {"equal_percent": 99.5, "max_steps": 1, "n": 640, "same_class_percent": 100.0},
}


def flat_relevance(graph: Graph) -> Relevance:
    """Every weight and channel of relevance 1."""
    layers = {}
    for node in graph.layers():
        shape = graph.weight(node).shape
        ones = np.ones(shape, dtype=np.float32)
        channels = np.ones(shape[0])
        layers[node.name] = LayerRelevance(
            weight=ones,
            weight_abs=ones,
            weight_cost=ones,
            channel=channels,
            channel_abs=channels,
            output_cost=channels,
        )
    return Relevance(rule="none", n_samples=1, layers=layers)


def record_of(graph: Graph, plan: CompressionPlan, **others: object) -> dict[str, object]:
    """The manifest that a build of this graph and plan writes, with invented measurements; `others` replace keys."""
    quantized = compress(graph, plan)
    exported = [export(quantized, name) for name in FORMATS]
    return {
        "schema": MANIFEST_SCHEMA,
        "model": graph.name,
        "data": "sample",
        "inputs": {"network": graph.digest()},
        "test_share": 0.2,
        "preprocessing": plan.preprocessing.to_json(),
        "classes": list(plan.classes),
        "io": plan.io.value,
        "budget": {"kind": "avg_bits", "asked": 4.0, "got": 4.0, "met": True},
        "float": manifest.float_entry(graph, 90.0, 64),
        "artifacts": [manifest.artifact_entry(file, quantized, MEASURED) for file in exported],
        "layers": manifest.layer_entries(graph, quantized, plan, flat_relevance(graph), exported),
        "graph_digest": graph.digest(),
        "files": {
            name: hashlib.sha256(contents).hexdigest()
            for name, contents in {
                **{file.name: file.data for file in exported},
                bundle.GRAPH_FILE: bundle.to_bytes(graph),
                PLAN_FILE: plan.to_json().encode(),
            }.items()
        },
        "seed": 0,
        "tools": tools(),
        **others,
    }


def write_folder(folder: Path, make: Callable[[], Graph] = plain, bits: int = 4) -> Path:
    """Write model.onnx, model.tflite, graph, plan and manifest, as a build does."""
    graph = make()
    plan = plan_for(graph, bits)
    quantized = compress(graph, plan)
    folder.mkdir(parents=True, exist_ok=True)
    for name in FORMATS:
        (folder / f"model.{name}").write_bytes(export(quantized, name).data)
    bundle.save(graph, folder / bundle.GRAPH_FILE)
    (folder / PLAN_FILE).write_text(plan.to_json(), "utf-8")
    (folder / MANIFEST).write_text(write_json(record_of(graph, plan)), "utf-8")
    return folder
