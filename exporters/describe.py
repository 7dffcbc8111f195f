"""What is in a file: layers, bits, bytes and operators of any ONNX or TFLite file, and of every file edgecomp writes.

A file is recognised by its content. Damaged files are expected: whatever bytes come, the answer is a description or a
BundleError. Constant tensors of two dimensions and more count as weights, but for int32 and int64, which are indices.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from edgecomp import bundle
from edgecomp.artifact import FILES
from edgecomp.errors import BundleError, EdgecompError
from edgecomp.files import MANIFEST_SCHEMA
from edgecomp.manifest import read_manifest
from edgecomp.plan import PLAN_SCHEMA, CompressionPlan
from edgecomp.report import (
    COMPARISON_SCHEMA,
    ESTIMATE_SCHEMA,
    REPORT_SCHEMA,
    BenchReport,
    Comparison,
    Source,
    table,
)
from edgecomp.strictjson import check_keys, load_strict_json

from .answers import are_boards, board_facts, estimate_facts, other_facts
from .c_facts import BEGIN, CodeBorder, read_facts
from .modelfacts import MEANT_BY_DAMAGED, model_facts, weight_row
from .read_onnx import read_onnx
from .read_tflite import read_tflite

_MAX_BYTES = 1 << 32
_HEADER = ("kind", "bytes", "sha256")
"""What `describe` itself says of every file."""
_MAX_CELL, _MAX_FACT = 120, 600


def describe(path: Path) -> dict[str, object]:
    """Say what a file holds, in values that JSON knows.

    Args:
        path: an ONNX or TFLite file from anywhere, or a file of edgecomp: graph, plan, manifest, network.c, and what
            the verbs print with --json.

    Returns:
        kind, bytes and sha256; for a model also producer, format_version, inputs and outputs (name, shape, dtype, and
        for integers scale and zero_point where there is one), operators (name to count), weights (name, shape, n,
        bits, stored_bytes), weight_bytes, other_bytes, mean_bits. Bits are those a code has in the file, 32 for
        float32; shapes are the file's own (TFLite: OHWI); an unknown dimension is null. A weight that edgecomp stores
        as numbers of words has "words" under "encoding"; its bits are what its codes would need one by one. A weight
        that several tensors share counts once in weight_bytes; one that lies in another file has that file's name
        under "external" and no part in other_bytes.

    Raises:
        BundleError: the file is missing, empty, damaged, or nothing that edgecomp knows.
        ExportError: the package that reads the format is missing.
    """
    data, where = _read(path), str(path)
    facts = _reader(data, path)(data, where)
    return {"kind": facts.pop("kind"), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **facts}


def describe_tables(description: Mapping[str, object]) -> str:
    """Write what `describe` gave as Markdown: a table of facts, then one a list."""
    facts = [(key, _cell(value, _MAX_FACT)) for key, value in description.items() if not _is_block(value)]
    parts = [table(facts, ("fact", "value"))]
    for key, value in description.items():
        if not value or not _is_block(value):
            continue
        if isinstance(value, dict):
            rows: list[Sequence[str]] = [(_cell(name), _cell(entry)) for name, entry in value.items()]
            header = ["name", "count" if key == "operators" else "value"]
        else:
            assert isinstance(value, list)
            header = list(dict.fromkeys(name for row in value for name in row))
            rows = [[_cell(row.get(name)) for name in header] for row in value]
        parts.append(f"{key.replace('_', ' ')}:\n\n{table(rows, header)}")
    return "\n\n".join(parts)


def _is_block(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _cell(value: object, most: int = _MAX_CELL) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        between = ", " if all(isinstance(v, str) for v in value) else "x"
        value = between.join("?" if v is None else str(v) for v in value) or "-"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # Names in foreign files may hold anything, control codes of terminals and half surrogates included.
    text = "".join(c if c.isprintable() else "?" for c in text[: most + 1])
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _read(path: Path) -> bytes:
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            names = [names[0] for names in FILES.values()]
            one = next((name for name in names if (path / name).is_file()), names[0])
            raise BundleError(f"{path}: is a folder; expected a file, such as {path / one}")
        if not stat.S_ISREG(info.st_mode):
            raise BundleError(f"{path}: is no plain file; expected one on disk")
        if info.st_size > _MAX_BYTES:
            raise BundleError(f"{path}: has {info.st_size} bytes, inspect reads {_MAX_BYTES} at most")
        data = path.read_bytes()
    except OSError as e:
        raise BundleError(f"{path}: cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise BundleError(f"{str(path)!r:.200}: is no file name: {e}") from e
    if not data:
        raise BundleError(f"{path}: is empty")
    return data


def _reader(data: bytes, path: Path) -> Callable[[bytes, str], dict[str, object]]:
    """Choose the reader by the first bytes, by the suffix only where these say nothing."""
    if data[4:8] == b"TFL3":
        return read_tflite
    if data[4:9] == b"\0\0\0\0{":
        return _graph
    if data.startswith(BEGIN.encode()):
        return _network
    if data[:64].lstrip()[:1] in (b"{", b"["):
        return _json
    # Every writer of protobuf puts field 1, ir_version, first.
    if data[:1] == b"\x08" or path.suffix == ".onnx":
        return read_onnx
    raise BundleError(
        f"{path}: is damaged or of no known kind; expected an ONNX or TFLite file, a plan, manifest, bench report, "
        "graph or network.c of edgecomp"
    )


# ---- edgecomp's own files --------------------------------------------------------------------------------------------


def _graph(data: bytes, where: str) -> dict[str, object]:
    try:
        graph = bundle.from_bytes(data, where)
    except MEANT_BY_DAMAGED as e:
        raise BundleError(f"{where}: is damaged: {str(e)[:200] or type(e).__name__}; build it again") from e
    weights = [weight_row(node.name, graph.weight(node).shape, 32, 4 * math.prod(graph.weight(node).shape))
               for node in graph.layers()]  # fmt: skip

    def borders(names: Sequence[str]) -> list[dict[str, object]]:
        return [{"name": name, "shape": ["N", *graph.tensors[name].shape[1:]], "dtype": "float32"} for name in names]

    found = model_facts(
        kind="graph",
        producer="edgecomp",
        version=bundle.GRAPH_SCHEMA,
        inputs=borders(graph.inputs),
        outputs=borders(graph.outputs),
        operators=[node.op.value for node in graph.nodes],
        weights=weights,
        weight_bytes=sum(weight["stored_bytes"] for weight in weights),
        file_bytes=len(data),
    )
    return {**found, "model": graph.name, "graph_digest": graph.digest()}


def _json(data: bytes, where: str) -> dict[str, object]:
    try:
        text = data.decode("utf-8")
        if text.lstrip().startswith("["):
            # What `bench --json` prints: a comparison for each runtime.
            listed = load_strict_json(f'{{"list": {text}}}', where)
            check_keys(listed, ("list",), where)
            parts = listed["list"]
            _check_plain(parts, 8)
            assert isinstance(parts, list)
            if are_boards(parts):
                return board_facts(parts)
            return _reports([Comparison.from_json(json.dumps(part), where) for part in parts])
        record = load_strict_json(text, where)
        schema = record.get("schema")
        for known, read in _JSON.items():
            if schema == known:
                return read(text, where)
        if schema is None and record.get("source") == Source.EMULATED.value:
            return _emulated(record, where)
        if schema is None:
            _check_plain(record, 12)
            if (found := other_facts(record)) is not None:
                return found
    except BundleError:
        raise
    except EdgecompError as e:
        raise BundleError(str(e)) from e
    except MEANT_BY_DAMAGED as e:
        raise BundleError(f"{where}: is damaged: {' '.join(str(e).split())[:200] or type(e).__name__}") from e
    if schema == "edgecomp-gathered/1":
        raise BundleError(f"{where}: was gathered by the C runner; edgecomp bench MODEL --gathered {where} shows it")
    raise BundleError(
        f"{where}: schema is {schema!r:.60}; expected one of {', '.join(_JSON)}, or what a verb prints with "
        "--json"
    )


def _plan(text: str, where: str) -> dict[str, object]:
    plan = CompressionPlan.from_json(text, where)
    layers = [
        {
            "name": name,
            "kept_channels": sum(layer.keep),
            "channels_before": len(layer.keep),
            "bits": layer.weight_bits,
        }
        for name, layer in plan.layers.items()
    ]
    return {
        "kind": "plan",
        "format_version": PLAN_SCHEMA,
        "graph_digest": plan.graph_digest,
        "io": plan.io.value,
        "classes": list(plan.classes),
        "ranges": len(plan.ranges),
        "preprocessing": plan.preprocessing.to_json(),
        "made_by": dict(plan.made_by),
        "layers": layers,
    }


def _network(data: bytes, where: str) -> dict[str, object]:
    """Say what a network in C says of itself, in its first line."""
    facts = read_facts(data, where)

    def border(name: str, codes: CodeBorder) -> dict[str, object]:
        quant = {"scale": float(codes.scale), "zero_point": codes.zero_point}
        return {"name": name, "shape": list(codes.shape), "dtype": "int8", **quant}

    return {
        "kind": "network in C",
        "model": facts.name,
        "graph_digest": facts.graph_digest,
        "inputs": [border("in", facts.input)],
        "outputs": [border("out", facts.output)],
        "arena_bytes": facts.arena_bytes,
        "input_offset": facts.input_offset,
        "peak_step": facts.peak_step,
        "constant_bytes": facts.constant_bytes,
        "macs": facts.macs,
        "steps": list(facts.steps),
        "weights": [{"name": layer, "stored_bytes": n_bytes} for layer, n_bytes in facts.weight_bytes.items()],
    }


def _manifest(text: str, where: str) -> dict[str, object]:
    record = read_manifest(text, where)
    _check_plain(record, 6)
    artifacts = [
        {
            **{key: a.get(key) for key in ("path", "format", "bytes", "weight_bytes", "mean_bits")},
            "sha256": record["files"][a["path"]],
            **{f"accuracy_{key}": a["accuracy"].get(key) for key in ("value", "n", "runtime")},
            **{key: a.get("parity", {}).get(key) for key in ("equal_percent", "max_steps")},
        }
        for a in record["artifacts"]
    ]
    columns = ("name", "kind", "weights", "kept_channels", "bits", "zero_percent", "relevance", "stored_bytes")
    layers = [{key: layer.get(key) for key in columns} for layer in record["layers"]]
    plain = ("model", "data", "io", "classes", "inputs", "graph_digest", "files", "seed", "budget", "float", "tools")
    return {
        "kind": "manifest",
        "format_version": MANIFEST_SCHEMA,
        **{key: record[key] for key in (*plain, "preprocessing")},
        "artifacts": artifacts,
        "layers": layers,
    }


def _emulated(record: Mapping[str, object], where: str) -> dict[str, object]:
    """Say what `bench --target CORE --json` printed: a core's report, which has instructions and no time."""
    _check_plain(record, 2)
    counts = [record.get(key) for key in ("steps", "classes")]
    numbers = [n for each in counts if isinstance(each, dict) for n in each.values()]
    if (
        not isinstance(record.get("cpu"), str)
        or not all(isinstance(each, dict) for each in counts)
        or not all(type(n) is int for n in (record.get("instructions"), *numbers))
    ):
        raise BundleError(f"{where}: expected an emulated report's cpu, instructions, and these by steps and classes")
    return {"kind": "emulated report", **{key: value for key, value in record.items() if key not in _HEADER}}


def _estimate(text: str, where: str) -> dict[str, object]:
    record = load_strict_json(text, where)
    _check_plain(record, 6)
    return estimate_facts(record)


def _check_plain(value: object, depth: int) -> None:
    """Refuse what could not be written as JSON again: numbers beyond float64, lists nested without end.

    Raises:
        ValueError: there is such a thing.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is too large")
    if isinstance(value, (dict, list)):
        if not depth:
            raise ValueError("it is nested too deeply")
        for part in value.values() if isinstance(value, dict) else value:
            _check_plain(part, depth - 1)


def _report(report: BenchReport) -> dict[str, object]:
    names = ("label", "artifact", "artifact_bytes", "format", "target", "runtime", "runtime_version", "threads",
             "p50_us", "p90_us", "p99_us", "min_us", "load_ms", "peak_memory_bytes", "model_memory_bytes")  # fmt: skip
    values = {name: getattr(report, name) for name in names}
    return {**values, "samples": len(report.samples_us), "source": report.source.value}


def _reports(comparisons: Sequence[Comparison]) -> dict[str, object]:
    if not comparisons:
        raise ValueError("it lists no comparison")
    rows = []
    for comparison in comparisons:
        for report in comparison.reports:
            ratio = comparison.ratios.get(report.label)
            versus = {"baseline": comparison.baseline, "ratio": ratio.median if ratio else None}
            rows.append({**_report(report), **versus})
    return {"kind": "comparison", "format_version": COMPARISON_SCHEMA, "reports": rows}


_JSON: dict[str, Callable[[str, str], dict[str, object]]] = {
    PLAN_SCHEMA: _plan,
    MANIFEST_SCHEMA: _manifest,
    REPORT_SCHEMA: lambda text, where: {
        "kind": "bench",
        "format_version": REPORT_SCHEMA,
        "reports": [_report(BenchReport.from_json(text, where))],
    },
    COMPARISON_SCHEMA: lambda text, where: _reports([Comparison.from_json(text, where)]),
    ESTIMATE_SCHEMA: _estimate,
}
