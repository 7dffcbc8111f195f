"""Latencies that others have published, as what an estimate would be asked for.

Those of ../shared/latency, and more, read in public sources since (`latency_elsewhere.csv`: the same columns, each row
with its source; nothing in it was measured here). Beside them, and told apart, what our own C takes: estimated from
emulated instructions (`latency_counted`). Not here: the fit (`latency_fit`), the networks (`published`).
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from edgecomp.errors import DataError
from edgecomp.latency import Case
from edgecomp.processor import CORES, Processor, processor_of
from edgecomp.target import Target
from edgecomp.targets import load
from edgecomp.work import Kind, Work

from .published import NETWORKS

FILES = ("xnnpack_readme.csv", "ncnn_benchmark.csv", "mlperf_tiny.csv", "stm32ai_modelzoo.csv")
ELSEWHERE = "latency_elsewhere.csv"
COUNTED = "latency_counted.csv"
"""Neither published nor measured: what our own C takes, estimated from emulated instructions; see `latency_counted`."""
RUNTIME_OF: tuple[tuple[str, str], ...] = (
    ("ncnn", "ncnn"),
    ("onnxruntime", "onnxruntime"),
    ("XNNPACK", "litert"),
    ("ExecuTorch + XNNPACK", "litert"),
    ("TensorFlow Lite for ", "tflite-micro"),
    ("TFLite Micro", "tflite-micro"),
    ("tflite-micro", "tflite-micro"),
    ("TensorFlow Lite", "litert"),
    ("X-CUBE-AI", "x-cube-ai"),
    ("STM32Cube.AI", "x-cube-ai"),
    ("PyTorch (QNNPACK", "qnnpack"),
    ("Arm NN", "arm-nn"),
)
"""What a source's runtime is here, by how its name begins; all others go by their first word."""
_ERAS: Mapping[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    "ncnn": ((("README as of 2021",), "2022"), (("git 2021", "git 2022"), "2023")),
    "litert": ((("built-in int8 kernels", "Lite about 2020"), "xnnpack"),),
    "x-cube-ai": (((" v7.", " v8.", " 7."), "9"),),
    "tflite-micro": (((" v2.3",), "2021"),),
}
"""What an older version's name holds, and before which version it was: its constants are told apart from today's."""
_PHONE = re.compile(r"phone|Pixel|Galaxy|Huawei|Oppo|Xiaomi")
_SURE, _UNSURE = 0.2, 0.4  # In rows read elsewhere, the clock or the threads often are what is usual for the board.
_COUNTS = ("macs", "weights", "inputs", "outputs", "summands", "out_channels")
_MB = 1_000_000
# Copying and filling main memory, MB/s: ThomasKaiser/sbc-bench:Results.md, boards of the same chip, and for the RK3588
# its author's review of the ROCK 5B. The last five are assumed, not read: what boards of that table with similar cores
# and the kind of memory that these are sold with (LPDDR4, the last DDR3) show.
_MEMORY: Mapping[str, tuple[int, int]] = {
    "RK3399": (3_700, 8_400),
    "RK3328": (1_340, 5_700),
    "RK3228H": (1_340, 5_700),
    "RK3566": (2_980, 7_650),
    "RK3568": (2_980, 7_650),
    "RK3588": (10_830, 29_220),
    "H2+": (850, 3_450),
    "Raspberry Pi 2B": (1_000, 1_180),
    "Raspberry Pi Zero W": (415, 1_630),
    "Arduino UNO Q": (1_600, 5_370),
    "AX630C": (1_600, 5_370),
    "RDK X3": (1_600, 5_370),
    "AX620A": (1_500, 5_370),
    "Orange Pi Zero 2": (1_070, 3_680),
}
_TARGETS: Mapping[str, str] = {
    "Raspberry Pi Zero 2 W": "rpi-zero2w",
    "Raspberry Pi 3B+": "rpi3b-plus",
    "Raspberry Pi 4B": "rpi4",
    "Raspberry Pi 5": "rpi5",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A published latency, or one of our own C that was estimated from emulated instructions.

    Attributes:
        device, model: as the source names them.
        case: what the estimator is asked.
        seconds: what was published.
        open: how far below and above `seconds` it may be by the cycles that Arm publishes, logarithms; (0, 0) where it
            was published.
        elsewhere: whether it is not of ../shared/latency.
        phone: whether it is a phone, whose memory and cooling differ from a board's.
        part_of: all layers of the network, where `case` has those of one kind; else empty.
    """

    device: str
    model: str
    case: Case
    seconds: float
    open: tuple[float, float] = (0.0, 0.0)
    elsewhere: bool = False
    phone: bool = False
    part_of: Sequence[Work] = ()

    @property
    def counted(self) -> bool:
        """Tell whether it comes from emulated instructions: such a row says nothing of how far off estimates are."""
        return self.case.runtime == "c"

    @property
    def scatter(self) -> float:
        """Give what it may be off by beside what a fit can know, as a logarithm: sets how much it weighs."""
        return _UNSURE if self.elsewhere or self.part_of else _SURE


def read_rows(folder: Path) -> list[Row]:
    """Read the published rows whose network is described in `published` and whose arithmetic is the processor's own.

    Behind them come those of our own C.

    Args:
        folder: ../shared/latency.

    Raises:
        DataError: a file is missing.
    """
    texts = []
    for name in FILES:
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: no such file; the fit needs the published latencies, give their folder as --data")
        texts.append((path.read_text("utf-8"), False))
    texts.append((resources.files(__package__).joinpath(ELSEWHERE).read_text("utf-8"), True))
    work: dict[tuple[str, str], list[Work]] = {key: build().layers for key, build in NETWORKS.items()}
    published = [row for text, elsewhere in texts for row in _rows(text, work, elsewhere)]
    return [*published, *_counted_rows(resources.files(__package__).joinpath(COUNTED).read_text("utf-8"))]


def _counted_rows(text: str) -> Iterator[Row]:
    """Give the networks of `latency_counted`, whose rows are layers, and of each its layers of one kind."""
    layers = list(csv.DictReader(text.splitlines()))
    for board, model in dict.fromkeys((r["device"], r["model"]) for r in layers):
        found = [r for r in layers if (r["device"], r["model"]) == (board, model)]
        whole, kinds = _counted_row(found), sorted({r["kind"] for r in found})
        yield whole
        for kind in kinds if len(kinds) > 1 else ():
            part = [r for r in found if r["kind"] == kind]
            # A sum that a convolution adds as it writes has no instructions of its own.
            if any(float(r["latency_ms"]) for r in part):
                yield replace(_counted_row(part), part_of=whole.case.work)


def _counted_row(layers: Sequence[Mapping[str, str]]) -> Row:
    board = load(layers[0]["device"])
    low, ms, high = (sum(float(r[name]) for r in layers) for name in ("low_ms", "latency_ms", "high_ms"))
    work = [Work(name=r["name"], kind=Kind(r["kind"]), **{name: int(r[name]) for name in _COUNTS}) for r in layers]
    return Row(
        device=f"{board.name}, emulated",
        model=layers[0]["model"],
        case=Case(work=work, processor=processor_of(board), runtime="c", precision="int8", threads=1),
        seconds=ms / 1e3,
        open=(math.log(ms / low), math.log(high / ms)),
    )


def _rows(text: str, work: Mapping[tuple[str, str], list[Work]], elsewhere: bool) -> Iterator[Row]:
    for r in csv.DictReader(text.splitlines()):
        accelerated = " + " in r["cpu"]
        key = (r["model"], r["input"])
        if key not in work or accelerated or "superseded" in r["note"] or "SUSPECT" in r["note"]:
            continue
        threads = int(r["threads"] or 1)
        case = Case(
            work=work[key],
            processor=_processor(r, threads),
            runtime=_runtime(f"{r['runtime']} {r['runtime_version']}"),
            precision=r["precision"],
            threads=threads,
        )
        yield Row(
            device=r["device"],
            model=r["model"],
            case=case,
            seconds=float(r["latency_ms"]) / 1e3,
            elsewhere=elsewhere,
            phone=_PHONE.search(r["device"]) is not None,
        )


def _runtime(text: str) -> str:
    first = text.partition(" ")[0].lower()
    runtime = next((ours for theirs, ours in RUNTIME_OF if text.startswith(theirs)), first)
    for marks, era in _ERAS.get(runtime, ()):
        if any(mark in text for mark in marks):
            return f"{runtime} before {era}"
    return runtime


def _processor(r: Mapping[str, str], threads: int) -> Processor:
    clock_hz, cpu, device = int(float(r["clock_mhz"]) * 1e6), r["cpu"], r["device"]
    wide = r["os_bits"] != "32"
    base = load(_TARGETS[device]) if device in _TARGETS else None
    memory = next((v for chip, v in _MEMORY.items() if chip in device), (None, None))
    copy, fill = (None if v is None else v * _MB for v in memory)
    isa: tuple[str, ...] = ("aarch64", "neon") if wide else ("armv7", "neon")
    usual = CORES[cpu]
    if wide and usual.fp16:
        isa += ("fp16",)
    # Figures of ncnn until 2022 show no dot product: int8 takes three times as long on the same chip as in 2023.
    if wide and usual.dotprod and not r["runtime_version"].startswith(("git 2021", "git 2022")):
        isa += ("dotprod",)
    if cpu.startswith("Cortex-M"):
        isa = ("thumb", *(("helium",) if usual.dotprod else ()))
    if base is not None:
        copy, fill = base.memory_copy_bytes_per_s, base.memory_fill_bytes_per_s
    return processor_of(
        Target(
            name=device if base is None else base.name,
            description=device,
            cpu=cpu,
            clock_hz=clock_hz,
            cores=max(threads, 1),
            isa=isa,
            l2_bytes=None if base is None else base.l2_bytes,
            l3_bytes=None if base is None else base.l3_bytes,
            memory_copy_bytes_per_s=copy,
            memory_fill_bytes_per_s=fill,
            runtimes=(),
        )
    )
