"""The record that lies beside exported files: what was asked, what was done, what was measured. Strict JSON.

Nothing in it depends on the clock or the folder: the same build twice gives the same bytes but for measured figures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgecomp.artifact import FILES, AtRest, Exported
from edgecomp.errors import BundleError, PlanError
from edgecomp.files import MANIFEST_SCHEMA, PLAN_FILE
from edgecomp.graph import Graph, Op
from edgecomp.groups import number_channels
from edgecomp.plan import CompressionPlan, Relevance
from edgecomp.strictjson import check_keys, load_strict_json

KEYS = (
    "schema",
    "model",
    "data",
    "inputs",
    "test_share",
    "preprocessing",
    "classes",
    "io",
    "budget",
    "float",
    "artifacts",
    "layers",
    "graph_digest",
    "files",
    "seed",
    "tools",
)


def weight_counts(graph: Graph) -> dict[str, int]:
    """Count the weights (without biases) of every layer."""
    return {node.name: int(np.prod(graph.weight(node).shape)) for node in graph.layers()}


def float_entry(graph: Graph, accuracy_percent: float, n_images: int) -> dict[str, object]:
    """Describe the float model: accuracy, and bytes of its weights as float32, biases left out."""
    counts = weight_counts(graph)
    convolutions = {node.name for node in graph.layers() if node.op is Op.CONV2D}
    return {
        "accuracy": round(accuracy_percent, 4),
        "n": n_images,
        "conv_weight_bytes": 4 * sum(n for name, n in counts.items() if name in convolutions),
        "weight_bytes": 4 * sum(counts.values()),
    }


def artifact_entry(exported: Exported, graph: Graph, measured: Mapping[str, object]) -> dict[str, object]:
    """Describe an exported file.

    Args:
        exported: the file.
        graph: the quantized graph it holds.
        measured: accuracy and parity.
    """
    convolutions = {node.name for node in graph.layers() if node.op is Op.CONV2D}
    n_weights = sum(weight_counts(graph).values())
    weight_bytes = sum(w.stored_bytes for w in exported.weights)
    return {
        "format": exported.format,
        "path": exported.name,
        "weights_at_rest": exported.at_rest.value,
        "bytes": len(exported.data),
        **({} if exported.flash_bytes is None else {"flash_bytes": exported.flash_bytes}),
        # Whatever the C looks like, it computes this graph to the last bit.
        **({"graph_digest": graph.digest()} if exported.format == "c" else {}),
        "weight_bytes": weight_bytes,
        "conv_weight_bytes": sum(w.stored_bytes for w in exported.weights if w.layer in convolutions),
        "mean_bits": round(8 * weight_bytes / n_weights, 4),
        **({} if exported.format == "onnx" else {"stray_transposes": exported.stray_transposes}),
        **measured,
    }


def layer_entries(
    graph: Graph, quantized: Graph, plan: CompressionPlan, relevance: Relevance, exported: Sequence[Exported]
) -> list[dict[str, object]]:
    """Describe every layer; relevance is the layer's share of all absolute relevance at layer outputs, in percent.

    Args:
        graph: the float graph before anything was cut.
        quantized: what was made of it.
        plan: what was decided.
        relevance: what it was decided by.
        exported: the files; stored_bytes are those of the first.
    """
    whole = sum(float(layer.channel_abs.sum()) for layer in relevance.layers.values()) or 1.0
    channels = number_channels(graph)
    entries: list[dict[str, object]] = []
    smaller = {node.name: node for node in quantized.layers()}
    for node in graph.layers():
        weight = quantized.weight(smaller[node.name])
        assert weight.data is not None
        numbers = channels.of[node.outputs[0]]
        stored = {e.format: next(w.stored_bytes for w in e.weights if w.layer == node.name) for e in exported}
        entries.append(
            {
                "name": node.name,
                "kind": node.op.value,
                "weights": int(weight.data.size),
                "weights_before": int(np.prod(graph.weight(node).shape)),
                "kept_channels": int(sum(plan.layers[node.name].keep)),
                "channels_before": graph.weight(node).shape[0],
                "can_cut": bool((~channels.locked[numbers]).any()),
                "bits": plan.layers[node.name].weight_bits,
                "zero_percent": round(100 * float((weight.data == 0).mean()), 3),
                "relevance": round(100 * float(relevance.layers[node.name].channel_abs.sum()) / whole, 4),
                "stored_bytes": stored[exported[0].format],
                "stored_bytes_by_format": stored,
            }
        )
    return entries


def read_manifest(text: str, where: str) -> Mapping[str, Any]:
    """Read a manifest; its top level is checked, and what `verify` and `bench` rely on.

    Raises:
        BundleError: not JSON, another schema, or a key is missing or unknown.
    """
    try:
        obj: Mapping[str, Any] = load_strict_json(text, where)
        if obj.get("schema") != MANIFEST_SCHEMA:
            raise BundleError(f"{where}: schema is {obj.get('schema')!r:.60}, this edgecomp reads {MANIFEST_SCHEMA!r}")
        check_keys(obj, KEYS, where)
    except PlanError as e:
        raise BundleError(str(e)) from e
    artifacts = obj["artifacts"]
    if not isinstance(artifacts, list) or not artifacts:
        raise BundleError(f"{where}: artifacts: expected a list of at least one")
    for i, artifact in enumerate(artifacts):
        place = f"{where}: artifact {i}"
        if not isinstance(artifact, dict):
            raise BundleError(f"{place}: expected an object")
        for key, kind in (("format", str), ("path", str), ("bytes", int), ("accuracy", dict)):
            if not isinstance(artifact.get(key), kind):
                raise BundleError(f"{place}: {key!r} is missing or not of type {kind.__name__}")
        if artifact["format"] not in FILES:
            raise BundleError(f"{place}: format {artifact['format']!r:.80}: expected one of {', '.join(FILES)}")
        if artifact["path"] != (name := FILES[artifact["format"]][0]):
            raise BundleError(f"{place}: path {artifact['path']!r:.80}: expected {name}, in the same folder")
        if artifact.get("weights_at_rest", AtRest.NATIVE) not in tuple(AtRest):
            raise BundleError(f"{place}: 'weights_at_rest': expected one of {', '.join(AtRest)}")
        if not _is_number(artifact["accuracy"].get("value")):
            raise BundleError(f"{place}: accuracy: 'value' is missing")
        if not (isinstance(artifact["accuracy"].get("runtime"), str) and artifact["accuracy"]["runtime"].strip()):
            raise BundleError(f"{place}: accuracy: 'runtime' is missing")
    kinds: dict[str, type] = {"data": str, "inputs": dict, "float": dict, "files": dict, "seed": int, "tools": dict}
    for key, type_ in kinds.items():
        if not isinstance(obj[key], type_) or isinstance(obj[key], bool):
            raise BundleError(f"{where}: {key!r} is {obj[key]!r:.60}, expected {type_.__name__}")
    for name in (PLAN_FILE, *(artifact["path"] for artifact in artifacts)):
        if name not in obj["files"]:
            raise BundleError(f"{where}: files: {name!r} is missing")
    for name, digest in obj["files"].items():
        if not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
            raise BundleError(f"{where}: files: {name!r:.80} is {digest!r:.80}, expected 64 hexadecimal digits")
    for name, tool in obj["tools"].items():
        if not (isinstance(tool, dict) and all(isinstance(tool.get(key), str) for key in ("version", "sha256"))):
            raise BundleError(f"{where}: tools: {name!r:.80} is {tool!r:.80}, expected a version and a sha256")
    if not (_is_number(obj["test_share"]) and 0 < obj["test_share"] < 1):
        raise BundleError(f"{where}: 'test_share' is {obj['test_share']!r:.60}, expected a number between 0 and 1")
    if not _is_number(obj["float"].get("accuracy")):
        raise BundleError(f"{where}: float: 'accuracy' is missing")
    if not isinstance(obj["float"].get("weight_bytes"), int):
        raise BundleError(f"{where}: float: 'weight_bytes' is missing")
    return obj


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300
