"""Valid files of ours, damaged at random, given to every reader: a value or the documented error, quickly, in little
memory."""

from __future__ import annotations

import json
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edgecomp import bundle
from edgecomp.artifact import AtRest
from edgecomp.benchmarks.compression import results
from edgecomp.errors import BundleError, EdgecompError, PlanError, UsageError
from edgecomp.exporters.unpack_onnx import plain_parts
from edgecomp.folder import open_folder
from edgecomp.manifest import read_manifest
from edgecomp.plan import CompressionPlan
from edgecomp.pytorch import checkpoint, progress
from edgecomp.report import BenchReport, Comparison, Ratio, Source
from edgecomp.runtime import unpack
from edgecomp.verify import verify_float
from tests.built import write_folder
from tests.packed_files import exported, words_onnx

MAX_EXTRA_BYTES = 300 << 20
MAX_SECONDS = 10.0
JSON_ATOMS = (
    b"null", b"true", b"0", b"-1", b"1e999", b"-1e999", b"1e-400", b"99999999999999999999999", b"4294967296", b"0.5",
    b'""', b'"\\ud800"', b'"\\u0000"', b'"../x"', b"[]", b"{}", b"[[]]", b"NaN", b"Infinity", b"9" * 5000,
    b"[" * 3000, b'{"a":' * 2000, b'"' + b"x" * 5000 + b'"',
)  # fmt: skip
NUMBERS = (
    0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Target:
    """A valid file and the readers that may meet it.

    Attributes:
        name: of the file in a built folder.
        data: its bytes.
        readers: each takes the damaged bytes; raises what it documents or finds nothing wrong.
    """

    name: str
    data: bytes
    readers: tuple[Callable[[bytes], None], ...]


# ---- what is read ----------------------------------------------------------------------------------------------------


def targets(place: Path) -> list[Target]:
    """Write a valid folder and reports, and pair every file with its readers."""
    folder = write_folder(place / "built")
    report = _report()
    comparison = Comparison(
        reports=(report,), baseline=report.label, ratios={report.label: Ratio(median=1.0, low=0.9, high=1.1)}
    )

    def text(read: Callable[[str], object], error: type[EdgecompError]) -> Callable[[bytes], None]:
        def reader(data: bytes) -> None:
            try:
                decoded = data.decode("utf-8")
            except UnicodeDecodeError:
                return
            _expect(lambda: read(decoded), error)

        return reader

    def in_folder(name: str) -> Callable[[bytes], None]:
        def reader(data: bytes) -> None:
            whole = (folder / name).read_bytes()
            _write(folder / name, data)
            try:
                _expect(lambda: _use_folder(folder), BundleError, PlanError)
            finally:
                _write(folder / name, whole)

        return reader

    plan = text(lambda t: CompressionPlan.from_json(t).to_json().encode(), PlanError)
    record = text(lambda t: _use_manifest(t), BundleError)
    found = [
        Target(
            name="graph.edgecomp",
            data=(folder / "graph.edgecomp").read_bytes(),
            readers=(_graph, _described(place), in_folder("graph.edgecomp")),
        ),
        Target(
            name="plan.json",
            data=(folder / "plan.json").read_bytes(),
            readers=(plan, _described(place), in_folder("plan.json")),
        ),
        Target(
            name="manifest.json",
            data=(folder / "manifest.json").read_bytes(),
            readers=(record, _described(place), in_folder("manifest.json")),
        ),
        Target(
            name="bench.json",
            data=report.to_json().encode(),
            readers=(text(lambda t: BenchReport.from_json(t).to_json(), BundleError), _described(place)),
        ),
        Target(
            name="comparison.json",
            data=comparison.to_json().encode(),
            readers=(text(lambda t: Comparison.from_json(t).to_json(), BundleError), _described(place)),
        ),
    ]
    for name in ("model.onnx", "model.tflite"):
        data = (folder / name).read_bytes()
        readers = (_described(place), _unpacked)
        if name == "model.onnx":
            readers = (*readers, _set_aside(place))
        found.append(Target(name=name, data=data, readers=readers))
    found.append(
        Target(
            name="model.onnx, words",
            data=words_onnx(),
            readers=(_described(place), _unpacked, _set_aside(place)),
        )
    )
    for name, bits in (("dense", 5), ("words", 2)):
        data = exported("wide", bits, AtRest.PACKED).data
        found.append(Target(name=f"packed.tflite, {name}", data=data, readers=(_described(place), _unpacked)))
    found.append(
        Target(
            name="result.json",
            data=_result().to_json().encode(),
            readers=(text(_use_result, BundleError),),
        )
    )
    found += _checkpoints(place)
    for target in found:
        for reader in target.readers:
            reader(target.data)
    return found


def _write(path: Path, data: bytes) -> None:
    """Write a file that was not there: one that is cut short and written again goes to the disk at once, and slowly."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def _report() -> BenchReport:
    return BenchReport(
        label="compressed",
        artifact="model.onnx",
        artifact_bytes=1234,
        sha256="ab" * 32,
        format="onnx",
        target="host",
        runtime="onnxruntime",
        runtime_version="1.20.0",
        threads=1,
        execution={"providers": ("CPUExecutionProvider",)},
        source=Source.MEASURED,
        warmups=5,
        steady=True,
        rounds=2,
        samples_us=(10.0, 20.0, 30.0, 40.0),
        p50_us=25.0,
        p90_us=37.0,
        p99_us=39.7,
        min_us=10.0,
        load_ms=1.5,
        environment={"cpu": "x", "unread": ("governor",)},
    )


def _result() -> results.Result:
    return results.Result(
        task=results.Task(method="edgecomp", bits=4.0, seed=0),
        n_bytes=1234,
        accuracy_percent=90.0,
        n_images=100,
        source=results.Source.FILE,
        measured_in="onnxruntime",
        seconds=1.5,
        sha256="ab" * 32,
        details={"mean bits": 4},
        versions={"onnx": "1"},
    )


def _use_result(text: str) -> None:
    """Do with it what a resumed comparison does."""
    result = results.result_from_json(text, "result.json")
    assert {result.task: result}[result.task].to_json()


def _checkpoints(place: Path) -> list[Target]:
    """Give the two files that interrupted work goes on from, each with its reader."""
    key, path = {"graph": "ab" * 32}, place / "checkpoint"
    sums = {"conv.weight": torch.arange(60, dtype=torch.float64), "conv.n": torch.ones(2, 3)}
    trained = {"conv.weight": torch.linspace(-1, 1, 60), "step": torch.tensor([3])}

    def scoring() -> None:
        checkpoint.restore(path, key, {name: torch.zeros_like(tensor) for name, tensor in sums.items()})

    def recovery() -> None:
        found = progress.read(path, key)
        assert found is not None
        found.check(trained, path)

    def reader(read: Callable[[], None]) -> Callable[[bytes], None]:
        def from_bytes(data: bytes) -> None:
            _write(path, data)
            _expect(read, BundleError, UsageError)

        return from_bytes

    checkpoint.save(path, checkpoint.Saved(key=key, n_images=64, order="cd" * 32), sums)
    saved_sums = path.read_bytes()
    progress.write(path, key, progress.Progress(done=7, tensors=trained))
    return [
        Target(name="scoring checkpoint", data=saved_sums, readers=(reader(scoring),)),
        Target(name="recovery checkpoint", data=path.read_bytes(), readers=(reader(recovery),)),
    ]


def _expect(read: Callable[[], object], *errors: type[EdgecompError]) -> None:
    try:
        read()
    except errors as e:
        message = str(e)
    else:
        return
    assert message, "an error without a message"
    assert "\n" not in message, f"a message of several lines: {message!r}"
    assert len(message) < 20_000, f"a message of {len(message)} characters: {message[:200]!r}"


def _graph(data: bytes) -> None:
    def read() -> None:
        graph = bundle.from_bytes(data)
        verify_float(graph)
        again = bundle.from_bytes(bundle.to_bytes(graph))
        assert again.digest() == graph.digest(), "what was read changes when written again"

    _expect(read, BundleError)


def _unpacked(data: bytes) -> None:
    _expect(lambda: unpack(data), BundleError)


def _set_aside(place: Path) -> Callable[[bytes], None]:
    """Write what onnxruntime is handed by `onnx_session`."""
    folder = place / "aside"
    folder.mkdir(exist_ok=True)
    return lambda data: _expect(lambda: plain_parts(memoryview(data), "model", folder), BundleError)


def _use_manifest(text: str) -> None:
    """Reach for what `verify` and `bench` reach for."""
    record = read_manifest(text, "manifest.json")
    assert isinstance(record["data"], str)
    assert isinstance(record["seed"], int)
    float(record["float"]["accuracy"])
    record["tools"].get("onnx", {}).get("version")
    for artifact in record["artifacts"]:
        float(artifact["accuracy"]["value"])
        assert artifact["accuracy"]["runtime"].split()[0]
        assert Path(artifact["path"]).suffix == f".{artifact['format']}"


def _use_folder(folder: Path) -> None:
    built = open_folder(folder)
    for entry in built.record["artifacts"]:
        built.read(entry["path"])


def _described(place: Path) -> Callable[[bytes], None]:
    from edgecomp.exporters.describe import describe, describe_tables

    def reader(data: bytes) -> None:
        path = place / "damaged"
        _write(path, data)

        def read() -> None:
            found = describe(path)
            json.dumps(found, allow_nan=False)
            describe_tables(found).encode()

        _expect(read, BundleError)

    return reader


# ---- damage ----------------------------------------------------------------------------------------------------------


def damage(rng: np.random.Generator, data: bytes) -> bytes:
    """Apply one to three kinds of damage."""
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        kinds = [_truncate, _flip, _splice, _number, _swap, _grow, _zero]
        if b"{" in data[:16]:
            kinds += [_json_value, _json_value, _json_value, _json_duplicate, _json_remove, _json_swap]
        data = kinds[int(rng.integers(len(kinds)))](rng, data)
    return data


def _place(rng: np.random.Generator, data: bytes) -> int:
    # Headers are where structure is: look there half of the time.
    limit = len(data) if rng.random() < 0.5 else min(len(data), 4096)
    return int(rng.integers(max(1, limit)))


def _truncate(rng: np.random.Generator, data: bytes) -> bytes:
    return data[: _place(rng, data)]


def _flip(rng: np.random.Generator, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.choice([1, 1, 2, 8, 64]))):
        if changed:
            changed[_place(rng, data)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _splice(rng: np.random.Generator, data: bytes) -> bytes:
    source, target, length = _place(rng, data), _place(rng, data), int(rng.integers(1, 300))
    piece = data[source : source + length]
    return data[:target] + piece + data[target + (length if rng.random() < 0.5 else 0) :]


def _number(rng: np.random.Generator, data: bytes) -> bytes:
    """Overwrite an aligned number: lengths, offsets and counts become huge, zero or negative."""
    width = int(rng.choice([1, 2, 4, 8]))
    at = 0 if rng.random() < 0.2 else _place(rng, data) // width * width
    value = int(NUMBERS[int(rng.integers(len(NUMBERS)))]) & ((1 << 8 * width) - 1)
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


def _swap(rng: np.random.Generator, data: bytes) -> bytes:
    a, b = sorted((_place(rng, data), _place(rng, data)))
    length = min(int(rng.integers(1, 64)), b - a)
    return data[:a] + data[b : b + length] + data[a + length : b] + data[a : a + length] + data[b + length :]


def _grow(rng: np.random.Generator, data: bytes) -> bytes:
    """Append a little, or more than a file of ours ever holds behind its end."""
    return data + rng.bytes(int(rng.integers(1, 64)) if rng.random() < 0.9 else 1 << 20)


def _zero(rng: np.random.Generator, data: bytes) -> bytes:
    at, length = _place(rng, data), int(rng.integers(1, 64))
    return data[:at] + bytes(len(data[at : at + length])) + data[at + length :]


_SIMPLE = rb'(-?\d[\d.eE+-]*|"[^"\\]*"|true|false|null|\[[^\[\]{}]*\]|\{[^\[\]{}]*\})'
_VALUE = re.compile(rb"(?<=[:,\[])\s*" + _SIMPLE + rb"(?=[,\]}\s])")
_PAIR = re.compile(rb'"[^"\\]{1,40}":\s*' + _SIMPLE + rb",?")


def _found(rng: np.random.Generator, data: bytes, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
    found = list(pattern.finditer(data, 0, 1 << 16))
    return found[int(rng.integers(len(found)))] if found else None


def _refit(old: bytes, new: bytes) -> bytes:
    """Keep the length in front of a graph's header true, so that damage within gets through to the reader behind."""
    length = int.from_bytes(old[:8], "little")
    grown = length + len(new) - len(old)
    if old[:1] != b"{" and length < len(old) and grown >= 0:
        return grown.to_bytes(8, "little") + new[8:]
    return new


def _json_value(rng: np.random.Generator, data: bytes) -> bytes:
    match = _found(rng, data, _VALUE)
    if match is None:
        return data
    atom = JSON_ATOMS[int(rng.integers(len(JSON_ATOMS)))]
    return _refit(data, data[: match.start()] + atom + data[match.end() :])


def _json_duplicate(rng: np.random.Generator, data: bytes) -> bytes:
    match = _found(rng, data, _PAIR)
    if match is None:
        return data
    pair = match.group().rstrip(b",")
    return _refit(data, data[: match.start()] + pair + b"," + data[match.start() :])


def _json_remove(rng: np.random.Generator, data: bytes) -> bytes:
    match = _found(rng, data, _PAIR)
    return data if match is None else _refit(data, data[: match.start()] + data[match.end() :])


def _json_swap(rng: np.random.Generator, data: bytes) -> bytes:
    a, b = _found(rng, data, _VALUE), _found(rng, data, _VALUE)
    if a is None or b is None or a.end() > b.start():
        return data
    return _refit(
        data, data[: a.start()] + b.group() + data[a.end() : b.start()] + a.group() + data[b.end() :]
    )


# ---- one case --------------------------------------------------------------------------------------------------------


def peak_bytes() -> int:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)


class Fuzz:
    """Holds the valid files; `check` damages one and reads it."""

    def __init__(self) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="edgecomp-soak-")
        self.targets = targets(Path(self._place.name))
        self._floor = peak_bytes()

    def close(self) -> None:
        self._place.cleanup()

    def check(self, rng: np.random.Generator) -> str:
        """Damage one file and read it.

        Returns:
            what was done, for counting.

        Raises:
            AssertionError: a reader took too long, or took too much memory.
            Exception: anything that a reader should not have raised.
        """
        target = self.targets[int(rng.integers(len(self.targets)))]
        data = damage(rng, target.data)
        for reader in target.readers:
            start = time.monotonic()
            try:
                reader(data)
            except Exception as e:
                e.add_note(f"{target.name}, {len(data)} bytes; the first: {data[:400]!r}")
                raise
            took, extra = time.monotonic() - start, peak_bytes() - self._floor
            assert took < MAX_SECONDS, f"{target.name}: reading took {took:.1f} s"
            assert extra < MAX_EXTRA_BYTES, f"{target.name}: reading took {extra >> 20} MiB"
        return target.name
