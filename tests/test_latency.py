"""Estimates obey physics, the constants are those of the published figures, and README says how good they are."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgecomp import bundle, options
from edgecomp.artifact import FILES
from edgecomp.benchmarks.netshapes import Net
from edgecomp.benchmarks.published import NETWORKS
from edgecomp.cli import main
from edgecomp.errors import TargetError, UsageError
from edgecomp.latency import (
    PRECISIONS,
    QUANTITIES,
    RUNTIMES,
    Case,
    Layout,
    estimate,
    fits,
)
from edgecomp.processor import CORES, processor_of
from edgecomp.target import Target
from edgecomp.targets import load, names
from edgecomp.work import Kind, conv_work, linear_work, other_work, total_macs, work_of
from tests.built import write_folder
from tests.graphs import plain

ROOT = Path(__file__).parents[1]
BOARDS = [name for name in names() if load(name).clock_hz]
RASPBERRY = ("rpi-zero2w", "rpi3b", "rpi3b-plus", "rpi4", "rpi5", "armv7")


def case(target: str, net: Net, *, runtime: str | None = None, precision: str = "int8", threads: int = 1) -> Case:
    processor = processor_of(load(target))
    usual = "tflite-micro" if processor.micro else "litert"
    return Case(
        work=net.layers, processor=processor, runtime=runtime or usual, precision=precision, threads=threads
    )


def p50(target: str, net: Net, **options: object) -> float:
    return estimate(case(target, net, **options)).latency_ms.p50  # type: ignore[arg-type]


def net(channels: int = 32, layers: int = 4, size: int = 32, kernel: int = 3, groups: bool = False) -> Net:
    made = Net(16, size)
    for _ in range(layers):
        made.conv(channels, 1)
        made.conv(channels, kernel, groups=channels if groups else 1)
    made.gap()
    made.fc(10)
    return made


# ---- work ------------------------------------------------------------------------------------------------------------


def test_work_of_layers_counted_by_hand() -> None:
    first = conv_work("a", in_shape=(3, 32, 32), out_shape=(16, 16, 16), kernel=(3, 3), stride=(2, 2))
    assert (first.kind, first.macs, first.weights) == (Kind.FIRST, 16 * 16 * 16 * 27, 16 * 27)
    assert (first.inputs, first.outputs, first.summands, first.out_channels) == (3072, 4096, 27, 16)
    depthwise = conv_work("b", in_shape=(16, 8, 8), out_shape=(16, 8, 8), kernel=(3, 3), groups=16)
    assert (depthwise.kind, depthwise.macs, depthwise.summands) == (Kind.DEPTHWISE, 16 * 64 * 9, 9)
    grouped = conv_work("c", in_shape=(16, 8, 8), out_shape=(32, 8, 8), kernel=(3, 3), groups=2)
    assert (grouped.kind, grouped.macs, grouped.weights) == (Kind.DENSE, 32 * 8 * 9 * 64, 32 * 8 * 9)
    wide = conv_work("d", in_shape=(16, 8, 8), out_shape=(16, 8, 8), kernel=(3, 3))
    strided = conv_work("e", in_shape=(16, 8, 8), out_shape=(16, 4, 4), kernel=(3, 3), stride=(2, 2))
    point = conv_work("f", in_shape=(16, 8, 8), out_shape=(8, 8, 8), kernel=(1, 1))
    squeezed = conv_work("g", in_shape=(16, 1, 1), out_shape=(4, 1, 1), kernel=(1, 1))
    kinds = [Kind.DENSE3X3, Kind.DENSE, Kind.POINTWISE, Kind.LINEAR]
    assert [x.kind for x in (wide, strided, point, squeezed)] == kinds
    assert linear_work("h", 10, 3).macs == 30
    assert (other_work("i", 5, 2).macs, other_work("i", 5, 2).kind) == (0, Kind.OTHER)


def test_a_captured_network_asks_for_what_its_description_says() -> None:
    """Two ways to the same table: torchvision's module captured, and the paper's table written down."""
    from edgecomp.intake import graph_of

    found = work_of(graph_of("torchvision:mobilenet_v2", None, None, _silent))
    written = NETWORKS["MobileNet v2 1.0X", "224x224x3"]().layers
    assert [(w.kind, w.macs, w.inputs, w.outputs) for w in found] == [
        (w.kind, w.macs, w.inputs, w.outputs) for w in written
    ]


@pytest.mark.shared
def test_published_networks_have_the_published_sizes(shared: Path) -> None:
    with (shared / "latency" / "models" / "macs.csv").open(encoding="utf-8", newline="") as file:
        known = {(r["model"], r["input"]): r for r in csv.DictReader(file)}
    compared = 0
    for key, build in NETWORKS.items():
        if key in known:
            layers, row = build().layers, known[key]
            assert total_macs(layers) == int(row["macs_total"]), key
            assert sum(w.weights > 0 for w in layers) == int(row["weight_layers"]), key
            if key[0] != "blazeface":  # where padding is an operator of its own, and so a larger tensor
                assert max(max(w.outputs for w in layers), layers[0].inputs) == int(row["largest_tensor_elems"]), key
            compared += 1
    assert compared >= 45


# ---- physics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("board", BOARDS)
def test_more_work_is_never_faster(board: str) -> None:
    micro = processor_of(load(board)).micro
    for runtime in (name for name in RUNTIMES if fits(name, micro=micro)):
        for precision in RUNTIMES[runtime].precisions:
            options = {"runtime": runtime, "precision": precision}
            base = p50(board, net(), **options)
            for more in (net(channels=33), net(layers=5), net(size=33), net(kernel=5)):
                assert p50(board, more, **options) > base, (runtime, precision)


@pytest.mark.parametrize("board", RASPBERRY)
@pytest.mark.parametrize("runtime", ["litert", "ncnn", "onnxruntime"])
def test_threads_help_and_cost_little(board: str, runtime: str) -> None:
    large, small = NETWORKS["MobileNet v2 1.0X", "224x224x3"](), net(channels=4, size=4)
    times = [p50(board, large, runtime=runtime, threads=t) for t in (1, 2, 3, 4)]
    assert times == sorted(times, reverse=True)
    assert 1.2 < times[0] / times[3] <= 4
    # A tiny layer does not gain, and what waking the threads costs is microseconds a layer.
    cost_us = 1e3 * (p50(board, small, runtime=runtime, threads=4) - p50(board, small, runtime=runtime)) / 10
    assert -50 < cost_us < 50
    with pytest.raises(UsageError, match=f"threads 5: {board} has 4 cores, that is all; an estimate is for a thread"):
        p50(board, large, runtime=runtime, threads=5)


def test_faster_hardware_is_never_slower() -> None:
    rpi4, network = load("rpi4"), NETWORKS["resnet18", "224x224x3"]()

    def ms(target: Target, precision: str = "fp32", threads: int = 4) -> float:
        return estimate(
            Case(
                work=network.layers,
                processor=processor_of(target),
                runtime="ncnn",
                precision=precision,
                threads=threads,
            )
        ).latency_ms.p50

    base = ms(rpi4)
    assert rpi4.clock_hz
    assert rpi4.memory_fill_bytes_per_s
    assert rpi4.l2_bytes
    doubled = ms(replace(rpi4, clock_hz=2 * rpi4.clock_hz))
    assert base / 2 < doubled < base  # the memory does not get faster with the clock
    assert ms(replace(rpi4, memory_fill_bytes_per_s=2 * rpi4.memory_fill_bytes_per_s)) < base
    assert ms(replace(rpi4, l2_bytes=4 * rpi4.l2_bytes)) < base
    assert ms(replace(rpi4, fp32_macs_per_cycle=8)) < base
    with_dot_product = replace(rpi4, isa=(*rpi4.isa, "dotprod"))
    assert ms(with_dot_product, "int8") < ms(rpi4, "int8")
    with_halves = replace(rpi4, isa=(*rpi4.isa, "fp16"))
    assert ms(with_halves, "fp16") < ms(rpi4, "fp16")


@pytest.mark.parametrize("board", BOARDS)
def test_ranges_are_ordered_and_layers_sum_up(board: str) -> None:
    found = estimate(case(board, net()))
    whole = found.latency_ms
    assert 0 < whole.p10 < whole.p50 < whole.p90
    for end in ("p10", "p50", "p90"):
        parts = [getattr(layer.latency_ms, end) for layer in found.layers]
        assert all(part > 0 for part in parts)
        assert math.isclose(sum(parts), getattr(whole, end), rel_tol=1e-9)
    assert [layer.name for layer in found.layers] == [w.name for w in net().layers]


def test_the_formula_one_number_at_a_time() -> None:
    """The vector form against the same physics in plain Python, with constants made up."""
    rng = np.random.default_rng(0)
    processor = processor_of(load("rpi5"))
    layers = [*net(groups=True).layers, *NETWORKS["blazeface", "128x128x3"]().layers[:4]]
    logs = rng.normal(0, 0.5, (1, len(QUANTITIES)))
    made = Case(work=layers, processor=processor, runtime="ncnn", precision="fp16", threads=3)
    got = Layout([made]).layer_seconds(logs)
    q = dict(zip(QUANTITIES, map(math.exp, logs[0]), strict=True))
    l2 = 512 * 1024 + 2 * 1024**2
    total = 2 * sum(w.weights for w in layers)
    for w, seconds in zip(layers, got, strict=True):
        moved = 2 * (w.inputs + w.outputs)
        padded = 1 + (q["inputs"] / w.summands if w.summands else 0)
        padded += q["outputs"] / w.out_channels if w.out_channels and w.kind is not Kind.DEPTHWISE else 0
        if w.kind is Kind.OTHER:
            cycles = q["kind other"] * moved
        elif w.kind is Kind.FIRST:
            cycles = (q["kind first"] * w.outputs + q["kind dense"] * w.macs * padded) / 16 + q["bytes"] * moved
        else:
            cycles = q[f"kind {w.kind}"] * w.macs * padded / 16 + q["bytes"] * moved
        compute = cycles / 2.4e9 * (1 / 3 + q["serial"] * 2 / 3)
        traffic = moved**2 / (moved + l2) * (q["winograd"] if w.kind is Kind.DENSE3X3 else 1)
        weights = 2 * w.weights * total / (total + l2) * (q["weights"] if w.kind is Kind.LINEAR else 1)
        copy = 2.5e9 * (5.27e9 / 2.5e9) ** q["gain"] * q["copy"]
        fill = 5e9 * (9.985e9 / 5e9) ** q["gain"] * q["fill"]
        memory = (traffic + weights) * (1 / (3 * copy) + 1 / fill)
        p = 0.5 + q["power"]
        expected = q["whole"] * ((compute**p + memory**p) ** (1 / p) + (q["layer"] + q["fork"]) / 2.4e9)
        assert math.isclose(seconds, expected, rel_tol=1e-6), w


# ---- what is not known ----------------------------------------------------------------------------------------------


def board(**facts: object) -> Target:
    return Target(name="mine", description="mine", runtimes=("litert",), **facts)  # type: ignore[arg-type]


def test_an_unknown_core_gets_a_wider_range_and_says_so() -> None:
    network = NETWORKS["MobileNet v2 1.0X", "224x224x3"]()
    known = board(cpu="Cortex-A53", clock_hz=1_400_000_000, cores=4, isa=("aarch64", "neon"), fp32_macs_per_cycle=4)
    unknown = replace(known, cpu="Cortex-A999")

    def found(target: Target, precision: str = "int8") -> tuple[float, float, str]:
        made = estimate(
            Case(
                work=network.layers,
                processor=processor_of(target),
                runtime="litert",
                precision=precision,
                threads=4,
            )
        )
        whole = made.latency_ms
        return whole.p50, whole.p90 / whole.p10, " ".join(made.basis)

    assert found(unknown)[1] > found(known)[1]
    assert "no published row of a Cortex-A999" in found(unknown)[2]
    assert "no published row" not in found(known)[2]
    assert 0.4 < found(unknown)[0] / found(known)[0] < 2.5
    assert "memory_fill_bytes_per_s" in found(known)[2]
    # Half the clock is close to twice the time; a core of eight times the rate is faster, but not eight times.
    assert 1.3 < found(replace(unknown, clock_hz=700_000_000))[0] / found(unknown)[0] <= 2
    assert 1 < found(unknown)[0] / found(replace(unknown, isa=("aarch64", "neon", "dotprod")))[0] < 8


@pytest.mark.parametrize(
    ("isa", "like"),
    [
        (("thumb", "armv8-m.base"), "Cortex-M0+"),
        (("armv6-m",), "Cortex-M0+"),
        (("thumb", "armv7-m"), "Cortex-M3"),
        (("armv8-m.main",), "Cortex-M3"),
        (("armv8-m.main", "dsp"), "Cortex-M4"),
        (("armv7e-m",), "Cortex-M4"),
        (("armv8.1-m.main", "dsp", "mve"), "Cortex-M55"),
    ],
)
def test_an_unknown_microcontroller_computes_as_its_instructions_allow(isa: tuple[str, ...], like: str) -> None:
    """A Cortex-M23, say: ARMv8-M's baseline has no DSP instructions, so it is like a Cortex-M0+."""
    found = processor_of(board(cpu="Cortex-M23", clock_hz=64_000_000, isa=isa))
    known = processor_of(board(cpu=like, clock_hz=64_000_000, isa=isa))
    assert (found.macs_per_cycle, found.dotprod) == (known.macs_per_cycle, known.dotprod)
    assert f"what a {like} computes in a cycle" in found.assumed
    assert not found.known


def test_a_runtime_without_published_rows_gets_a_wider_range() -> None:
    known, unknown = (estimate(case("rpi4", net(), runtime=name)) for name in ("litert", "other"))
    assert unknown.latency_ms.p90 / unknown.latency_ms.p50 > known.latency_ms.p90 / known.latency_ms.p50
    assert unknown.latency_ms.p10 / unknown.latency_ms.p50 < known.latency_ms.p10 / known.latency_ms.p50
    assert any("other: as a middling runtime, nothing is known of it" in line for line in unknown.basis)
    assert estimate(case("nucleo-l4r5zi", net(), runtime="other")).latency_ms.p50 > 0
    same = [estimate(case("rpi4", net(), runtime=name)).latency_ms for name in ("litert", "tflite-runtime")]
    assert same[0] == same[1]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("core", CORES)
def test_every_core_can_be_estimated(core: str, precision: str) -> None:
    target = board(cpu=core, clock_hz=100_000_000)
    runtime = "other" if core.startswith("Cortex-M") else "litert"
    made = Case(work=net().layers, processor=processor_of(target), runtime=runtime, precision=precision, threads=1)
    assert 0 < estimate(made).latency_ms.p50 < 1e6


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(TargetError, match="target 'host': cpu is not known, which an estimate needs"):
        processor_of(load("host"))
    with pytest.raises(TargetError, match="target 'cortex-m4': clock_hz is not known"):
        processor_of(load("cortex-m4"))
    with pytest.raises(UsageError, match="nothing is known of a core 'Z80': give isa and fp32_macs_per_cycle, or"):
        processor_of(board(cpu="Z80", clock_hz=4_000_000))
    with pytest.raises(UsageError, match=r"give fp32_macs_per_cycle, or one of ARM1176JZF-S, .*Cortex-M85"):
        processor_of(board(cpu="Z80", clock_hz=4_000_000, isa=("aarch64",)))
    assert processor_of(board(cpu="Cortex-M99", clock_hz=1, isa=("thumb", "mve"))).dotprod
    fine = case("rpi4", net())
    for change, found in (
        ({"runtime": "pytorch"}, "runtime 'pytorch' is not known to the estimator; expected litert, "),
        ({"runtime": "x-cube-ai"}, "x-cube-ai is not for a Cortex-A72; expected litert, "),
        ({"precision": "int4"}, "precision 'int4'; expected fp32, fp16, int8"),
        ({"threads": 0}, "threads 0: expected 1 to 1024"),
        ({"threads": 5}, "threads 5: rpi4 has 4 cores, that is all"),
        ({"work": ()}, "no layer that takes time"),
    ):
        with pytest.raises(UsageError) as caught:
            estimate(replace(fine, **change))  # type: ignore[arg-type]
        assert found in str(caught.value)
    with pytest.raises(UsageError, match="threads 2: nucleo-l4r5zi has 1 core, that is all"):
        estimate(replace(case("nucleo-l4r5zi", net()), threads=2))
    with pytest.raises(UsageError, match="threads 5: mine has 4 cores, assumed, as its file gives no cores"):
        estimate(replace(fine, processor=processor_of(board(cpu="Cortex-A72", clock_hz=10**9)), threads=5))
    with pytest.raises(UsageError, match="litert is not for a Cortex-M4; expected tflite-micro, x-cube-ai, c"):
        estimate(replace(case("nucleo-l4r5zi", net()), runtime="litert"))


@pytest.mark.parametrize(
    ("runtime", "precision", "said"),
    [
        ("c", "fp32", "only in int8; in fp32 on a Cortex-M4: tflite-micro, x-cube-ai, other"),
        ("c", "fp16", "only in int8; in fp16 on a Cortex-M4: other"),
        ("tflite-micro", "fp16", "only in fp32 and int8; in fp16 on a Cortex-M4: other"),
        ("x-cube-ai", "fp16", "only in fp32 and int8; in fp16 on a Cortex-M4: other"),
    ],
)
def test_a_runtime_is_not_asked_for_what_it_does_not_compute_in(runtime: str, precision: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        estimate(case("nucleo-l4r5zi", net(), runtime=runtime, precision=precision))
    assert str(caught.value) == f"{runtime} does not compute in {precision}, {said}"


def test_the_command_line_names_what_the_estimator_knows() -> None:
    for micro, named in ((False, options.RUNTIMES), (True, options.MICRO_RUNTIMES)):
        assert set(named) == {name for name in RUNTIMES if fits(name, micro=micro)}
    assert set(options.PRECISIONS) == PRECISIONS.keys()


# ---- the command line ------------------------------------------------------------------------------------------------

MINE = """
name = "mine"
description = "a board of mine"
cpu = "Cortex-A35"
clock_hz = 2_000_000_000
runtimes = ["litert"]
[sources]
cpu = "a"
clock_hz = "b"
"""


def _silent(name: str, total: int) -> object:
    import contextlib

    return contextlib.nullcontext(lambda n: None)


def test_estimate_of_a_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = plain()
    bundle.save(graph, tmp_path / "graph.edgecomp")
    (tmp_path / "mine.toml").write_text(MINE)
    options = ["--target", str(tmp_path / "mine.toml"), "--threads", "2", "--precision", "fp32"]
    assert main(["estimate", str(tmp_path / "graph.edgecomp"), *options, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["source"] == "estimated"
    assert (value["target"], value["runtime"], value["precision"], value["threads"]) == ("mine", "litert", "fp32", 2)
    assert value["latency_ms"].keys() == {"p10", "p50", "p90"}
    assert value["latency_ms"]["p10"] < value["latency_ms"]["p50"] < value["latency_ms"]["p90"]
    assert value["macs"] == sum(layer["macs"] for layer in value["layers"]) == total_macs(work_of(graph))
    weighted = [layer["name"] for layer in value["layers"] if layer["macs"]]
    assert weighted == [node.name for node in graph.layers()]
    assert any("Cortex-A35" in line for line in value["basis"])
    assert main(["estimate", str(tmp_path / "graph.edgecomp"), *options]) == 0
    text = capsys.readouterr().out
    assert "estimated" in text.splitlines()[0]
    assert "range" in text.splitlines()[0]
    assert "measured" not in text
    assert all(name in text for name in weighted)


def test_estimate_of_a_built_folder_and_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "out")

    def runtime(path: str, target: str, *more: str) -> str:
        assert main(["estimate", str(tmp_path / path), "--target", target, "--json", *more]) == 0
        return str(json.loads(capsys.readouterr().out)["runtime"])

    assert runtime("out", "rpi4") == "litert"
    assert runtime("out/model.onnx", "rpi4") == "onnxruntime"
    assert runtime("out/model.tflite", "rpi4") == "litert"
    assert runtime("out/model.tflite", "rpi4", "--runtime", "ncnn") == "ncnn"
    assert runtime("out", "disco-f746ng") == "tflite-micro"
    assert runtime("out/model.onnx", "disco-f746ng") == "tflite-micro"
    assert runtime("out", "disco-f746ng", "--runtime", "c") == "c"


@pytest.mark.parametrize(
    ("formats", "board", "runtime"),
    [
        (["onnx"], "rpi4", "onnxruntime"),
        (["onnx", "tflite"], "rpi4", "litert"),
        (["c"], "rpi4", "litert"),
        (["onnx", "c"], "disco-f746ng", "c"),
        (["tflm", "c"], "disco-f746ng", "tflite-micro"),
        (["c", "tflm"], "disco-f746ng", "c"),
    ],
)
def test_a_folder_is_estimated_for_the_runtime_of_its_formats(
    formats: list[str], board: str, runtime: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_folder(tmp_path / "out") / "manifest.json"
    record = json.loads(path.read_text())
    (artifact, *_) = record["artifacts"]
    record["artifacts"] = [{**artifact, "format": name, "path": FILES[name][0]} for name in formats]
    record["files"] |= {FILES[name][0]: "0" * 64 for name in formats}
    path.write_text(json.dumps(record))
    argv = ["estimate", str(tmp_path / "out"), "--target", board, "--json"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["runtime"] == runtime
    assert main([*argv, "--precision", "fp32"]) == 0  # in which C is not to be had
    assert json.loads(capsys.readouterr().out)["runtime"] == ("tflite-micro" if runtime == "c" else runtime)


@pytest.mark.parametrize(
    ("argv", "code", "found"),
    [
        (["net.edgecomp", "--target", "rpi44"], 2, "target 'rpi44' is unknown; did you mean rpi4"),
        (["net.edgecomp", "--target", "host"], 6, "cpu is not known"),
        (["net.edgecomp", "--target", "none.toml"], 2, "none.toml: no such file"),
        (["net.edgecomp", "--target", "rpi4"], 2, "net.edgecomp: no such file"),
        (["lone.c", "--target", "rpi4"], 2, "does not lie in the folder that edgecomp built it into"),
        (["lone.cc", "--target", "rpi4"], 2, "does not lie in the folder that edgecomp built it into"),
        (["lone.onnx", "--target", "rpi4"], 2, "lone.onnx: is damaged or no ONNX file: it holds no network"),
        (["lone.tflite", "--target", "rpi4"], 2, "lone.tflite: is no TFLite file"),
        ([".", "--target", "rpi4"], 2, "manifest.json"),
        (["torchvision:resnet19", "--target", "rpi4"], 2, "torchvision has no classifier 'resnet19'"),
        (["nowhere:net", "--target", "rpi4"], 2, "No module named 'nowhere'"),
        (["here:net", "--target", "rpi4"], 2, "here:net: what shape its input has is not known; give --input-shape"),
        (["/nosuch", "--target", "rpi4"], 2, "/nosuch: no such file; expected"),
        (["nosuch.pt2", "--target", "rpi4"], 2, "nosuch.pt2: no such file; expected"),
        (["lone.onnx", "--target", "rpi4", "--input-shape", "1,8,8"], 2, "leave them out"),
        (["torchvision:alexnet", "--target", "rpi4", "--threads", "0"], 2, "threads 0: expected 1 to 1024"),
        (["torchvision:alexnet", "--target", "rpi4", "--runtime", "c"], 2, "c is not for a Cortex-A72"),
        (
            ["torchvision:alexnet", "--target", "disco-f746ng", "--runtime", "c", "--precision", "fp32"],
            2,
            "c does not compute in fp32, only in int8; in fp32 on a Cortex-M7: tflite-micro, x-cube-ai, other",
        ),
    ],
)
def test_wrong_use_is_one_line(
    argv: list[str], code: int, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("lone.onnx", "lone.tflite", "lone.c", "lone.cc"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "here.py").write_text("import torch\n\n\ndef net():\n    return torch.nn.Flatten()\n")
    assert main(["estimate", *argv]) == code
    error = capsys.readouterr().err
    assert found in error
    assert error.count("\n") == 1
