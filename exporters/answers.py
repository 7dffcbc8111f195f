"""What the verbs print with --json, and the other JSON that edgecomp writes, as facts and rows for `inspect`.

Not here: what is read back strictly because work is done with it: plans, manifests, reports of bench (`describe`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Facts = dict[str, object]


def estimate_facts(record: Mapping[str, object]) -> Facts:
    """Say what `estimate --json` printed.

    Raises:
        KeyError, ValueError: something is missing, or is of another type.
    """
    latency = record["latency_ms"]
    if not isinstance(latency, dict) or not all(type(latency[end]) in (int, float) for end in ("p10", "p50", "p90")):
        raise ValueError("latency_ms is not p10, p50 and p90 in milliseconds")
    texts = {key: record[key] for key in ("source", "model", "target")}
    plain = {key: value for key, value in record.items() if key not in ("schema", "layers", "basis", *texts)}
    basis, layers = record["basis"], _rows(record["layers"], "layers")
    if not isinstance(basis, list) or not all(isinstance(text, str) for text in (*basis, *texts.values())):
        raise ValueError(f"expected texts for basis, {', '.join(texts)}")
    facts = {"kind": "estimate", "format_version": record["schema"], **texts, **_flat(plain)}
    return {**facts, "basis": [{"rests on": text} for text in basis], "layers": layers}


def other_facts(record: Mapping[str, object]) -> Facts | None:
    """Say what is in JSON of ours that names no schema; None where it is none of ours.

    Raises:
        KeyError, ValueError: as `estimate_facts`.
    """
    if record.keys() == {"passed", "reference_percent", "files"}:
        return _verification(record)
    if record.get("bomFormat") == "CycloneDX":
        return _bill(record)
    if {"kind", "bytes", "sha256"} <= record.keys():
        return {"kind": "description by inspect", "of": {key: record[key] for key in ("kind", "bytes", "sha256")}}
    if {"name", "version", "frameworks", "platforms", "headers"} <= record.keys():
        return {"kind": "PlatformIO library", **{key: record[key] for key in ("name", "version", "headers")}}
    return None


def are_boards(parts: Sequence[object]) -> bool:
    """Tell whether a list is what `targets --json` prints."""
    return bool(parts) and all(isinstance(x, dict) and {"name", "description", "runtimes"} <= x.keys() for x in parts)


def board_facts(parts: Sequence[object]) -> Facts:
    """Say what `targets --json` printed; sources and wheels are left out."""
    return {"kind": "boards", "boards": _rows(list(parts), "list", leave=("sources", "wheels"))}


def _verification(record: Mapping[str, object]) -> Facts:
    files: Any = record["files"]
    rows, layers = _rows(files, "files", leave=("by_layer",)), []
    for file in files:
        for tensor, parity in file["by_layer"].items():
            layers.append({"path": file["path"], "tensor": tensor, **dict(parity)})
    facts = {key: record[key] for key in ("passed", "reference_percent")}
    return {"kind": "verification", **facts, "files": rows, "layers": layers}


def _bill(record: Mapping[str, object]) -> Facts:
    metadata = record.get("metadata")
    about = metadata.get("component") if isinstance(metadata, dict) else None
    parts = [{key: row.get(key) for key in ("type", "name", "version")} for row in _rows(record["components"], "list")]
    name = about.get("name") if isinstance(about, dict) else None
    return {"kind": "bill of materials", "format_version": f"CycloneDX {record['specVersion']}", "model": name,
            "components": parts}  # fmt: skip


def _rows(value: object, name: str, *, leave: Sequence[str] = ()) -> list[Facts]:
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError(f"{name}: expected a list of objects")
    return [_flat({key: cell for key, cell in row.items() if key not in leave}) for row in value]


def _flat(values: Mapping[str, object]) -> Facts:
    """Name what stands in objects of an object by both their keys."""
    flat: Facts = {}
    for key, value in values.items():
        flat |= {f"{key}_{name}": cell for name, cell in value.items()} if isinstance(value, dict) else {key: value}
    return flat
