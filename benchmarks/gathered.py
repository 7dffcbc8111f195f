"""What the runner in C gathered on a device, read strictly and judged here, by the same code as what was measured here.

It brings samples, memory and copies of the files that the device's system keeps about itself. They are data: written
into a temporary folder, under names that are known beforehand, and parsed there by `environment`.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgecomp.errors import BundleError, PlanError, UsageError
from edgecomp.exporters.unpack_tflite import is_packed, unpack_tflite
from edgecomp.report import BenchReport, Comparison, Fact, Source
from edgecomp.strictjson import check_keys, load_strict_json

from .bench import measured
from .environment import FACT_FILES, STATE_FILES, environment_elsewhere, state
from .harness import Timing, ratio
from .memory import median_footprint
from .native_runner import SCHEMA
from .onnx_runtime import mean_times
from .validity import why_not_valid

_KEYS = ("schema", "edgecomp", "threads", "machine", "kernel", "cores", "affinity", "files", "before", "after",
         "models")  # fmt: skip
_MODEL_KEYS = ("label", "bytes", "sha256", "runtime", "runtime_version", "execution", "warmups", "steady", "rounds",
               "samples_ns", "memory", "profile")  # fmt: skip
_MEMORY_KEYS = ("runtime_bytes", "loaded_bytes", "peak_bytes", "model_bytes", "load_ns")
_LEAST: Mapping[str, float] = MappingProxyType(
    {"memory_bytes": 1, "frequency_mhz": 0, "temperature_c": -273.15, "load_average_1min": 0,
     "throttle_flags": 0, "throttle_count": 0, "swapped_pages": 0}
)  # fmt: skip
"""Of facts of a machine that are numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A model as the device had it, and what stands in the report.

    Attributes:
        label: in the report.
        artifact: name of the file that the report is about.
        artifact_bytes: its length.
        sha256: of it.
        format: of it.
        sent_sha256: of the file that the device had.
        unpacked: whether that was unpacked here.
    """

    label: str
    artifact: str
    artifact_bytes: int
    sha256: str
    format: str
    sent_sha256: str
    unpacked: bool


def comparison_of(
    text: str, sent: Sequence[Sent], *, baseline: str, target: str, seed: int = 0, where: str = "gathered"
) -> Comparison:
    """Make a comparison of what was gathered.

    Args:
        text: JSON of the schema SCHEMA.
        sent: what the runner was given, in any order; it is told by its digest.
        baseline: label in the report that ratios refer to.
        target: what stands in the reports.
        seed: of the confidence intervals.
        where: it comes from, for errors.

    Raises:
        BundleError: it is something else, or about other files.
    """
    try:
        found: Mapping[str, Any] = load_strict_json(text, where)
        if found.get("schema") != SCHEMA:
            raise BundleError(f"{where}: schema is {found.get('schema')!r:.80}, this edgecomp reads {SCHEMA!r}")
        check_keys(found, _KEYS, where)
        for model in _list(found["models"], "models"):
            check_keys(model, _MODEL_KEYS, f"{where}: model")
        return _comparison(found, _paired(sent, found["models"], where), baseline, target, seed)
    except PlanError as e:
        raise BundleError(str(e)) from e
    except (UsageError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError, MemoryError) as e:
        raise BundleError(f"{where}: {' '.join(str(e).split())[:200]}; expected what the C runner writes") from e


def sent_of(label: str, data: bytes, artifact: str, format_name: str) -> tuple[Sent, bytes]:
    """Give a model as the runner in C takes it: packed TFLite is unpacked.

    Raises:
        BundleError: the file is damaged.
    """
    packed = format_name == "tflite" and is_packed(data)
    plain = unpack_tflite(data, label) if packed else data
    digest, plain_digest = (hashlib.sha256(each).hexdigest() for each in (data, plain))
    sent = Sent(
        label=label,
        artifact=artifact,
        artifact_bytes=len(data),
        sha256=digest,
        format=format_name,
        sent_sha256=plain_digest,
        unpacked=packed,
    )
    return sent, plain


def _paired(sent: Sequence[Sent], models: Sequence[Any], where: str) -> list[tuple[Sent, Mapping[str, Any]]]:
    pairs, left = [], list(models)
    for each in sent:
        of_it = [model for model in left if model["sha256"] == each.sent_sha256]
        if not of_it:
            raise BundleError(f"{where}: {each.label} was not measured, or has changed since")
        pairs.append((each, of_it[0]))
        left.remove(of_it[0])
    if left:
        raise BundleError(f"{where}: {left[0]['label']!r:.80} was measured too; expected the same models")
    return pairs


def _comparison(
    found: Mapping[str, Any], models: Sequence[tuple[Sent, Mapping[str, Any]]], baseline: str, target: str, seed: int
) -> Comparison:
    facts = _facts(found)
    threads = _whole(found["threads"], "threads", 1)
    before, after = (_with_files(name, found[name], STATE_FILES, state) for name in ("before", "after"))
    timings = {each.label: _timing(model) for each, model in models}
    not_valid = tuple(why_not_valid(before, after, timings))
    draws = random.Random(f"draws {seed}")
    reports = []
    for each, model in models:
        _whole(model["bytes"], "bytes", 1)
        runs = [_memory(run) for run in _list(model["memory"], "memory")]
        if not runs:
            raise UsageError("memory: no process")
        unpacked = {"unpacked_at_load": False, "unpacked_beforehand": each.unpacked} if each.format == "tflite" else {}
        reports.append(
            BenchReport(
                label=each.label,
                artifact=each.artifact,
                artifact_bytes=each.artifact_bytes,
                sha256=each.sha256,
                format=each.format,
                target=target,
                runtime=model["runtime"],
                runtime_version=model["runtime_version"],
                threads=threads,
                execution={**_object(model["execution"]), **unpacked},
                source=Source.MEASURED,
                **measured(timings[each.label], median_footprint(runs)),
                layers_us={} if model["profile"] is None else mean_times(json.loads(model["profile"])),
                not_valid=not_valid,
                before=before,
                after=after,
                environment=facts,
            )
        )
    base = timings[baseline]
    ratios = {label: ratio(timing, base, rng=draws) for label, timing in timings.items() if label != baseline}
    return Comparison(reports=tuple(reports), baseline=baseline, ratios=ratios)


def _timing(model: Mapping[str, Any]) -> Timing:
    samples, rounds = _list(model["samples_ns"], "samples_ns"), _whole(model["rounds"], "rounds", 1)
    if not samples or len(samples) % rounds or not isinstance(model["steady"], bool):
        raise UsageError(f"{len(samples)} samples in {rounds} rounds, steady {model['steady']!r:.20}")
    samples_us = tuple(_whole(ns, "samples_ns", 0) / 1000 for ns in samples)
    warmups = _whole(model["warmups"], "warmups", 0)
    return Timing(warmups=warmups, steady=model["steady"], rounds=rounds, samples_us=samples_us)


def _memory(run: Any) -> dict[str, float]:
    check_keys(run, _MEMORY_KEYS, "memory")
    values: dict[str, float] = {name: _whole(run[name], f"memory: {name}", 1) for name in _MEMORY_KEYS[:3]}
    # A difference of two measured peaks, which may come out below zero for a tiny model.
    model, most = run["model_bytes"], int(values["peak_bytes"] - values["runtime_bytes"])
    values["model_bytes"] = _whole(model, "memory: model_bytes", 1 - int(values["runtime_bytes"]))
    if model > most:
        raise UsageError(f"memory: model_bytes is {model}, expected at most {most}, peak_bytes less runtime_bytes")
    return {**values, "load_ms": _whole(run["load_ns"], "memory: load_ns", 0) / 1e6}


def _facts(found: Mapping[str, Any]) -> dict[str, Fact]:
    affinity = tuple(_list(found["affinity"], "affinity"))
    if not affinity or not all(isinstance(core, str) and core.isdecimal() for core in affinity):
        raise UsageError(f"affinity is {found['affinity']!r:.80}, expected numbers of cores, as texts")
    known: dict[str, Fact] = {name: found[name] for name in ("machine", "kernel", "edgecomp")}
    for name, text in known.items():
        if not isinstance(text, str):
            raise UsageError(f"{name} is {text!r:.80}, expected a text")
    known |= {"cores": _whole(found["cores"], "cores", 1), "cores_allowed": len(affinity), "affinity": affinity}
    known["runner"] = "C"
    return _with_files("files", found["files"], FACT_FILES, lambda root: environment_elsewhere(root, known))


def _with_files(where: str, files: Any, expected: Sequence[str], read: Any) -> dict[str, Fact]:
    """Read facts from copies of files, of which only those count whose names are expected; no fact is impossible."""
    legal = re.compile("|".join(re.escape(pattern).replace(r"\*", "[0-9]+") for pattern in expected))
    with tempfile.TemporaryDirectory(prefix="edgecomp-") as name:
        for path, text in _object(files).items():
            if not legal.fullmatch(path):
                raise UsageError(f"a file {path!r:.80}")
            place = Path(name) / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(text.encode("latin-1"))
        facts: dict[str, Fact] = read(Path(name))
    for name, least in _LEAST.items():
        value = facts.get(name)
        if isinstance(value, (int, float)) and not least <= value < math.inf:
            raise UsageError(f"{where}: {name} is {value:g}, expected a number of at least {least:g}")
    return facts


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{value!r:.40} is no object")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError(f"{where}: {value!r:.40} is no list")
    return value


def _whole(value: Any, where: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{where} is {value!r:.40}, expected a whole number of at least {least}")
    return value
