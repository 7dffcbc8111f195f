"""Timing is right on a clock we wind ourselves, memory is what a model weighs, accuracy and parity are counted."""

from __future__ import annotations

import gc
import statistics
import sys
from pathlib import Path
from random import Random

import numpy as np
import onnx
import pytest
from onnx import helper

from edgecomp.benchmarks import memory
from edgecomp.benchmarks.accuracy import accuracy, parity
from edgecomp.benchmarks.bench import bench
from edgecomp.benchmarks.environment import environment
from edgecomp.benchmarks.harness import MIN_ROUNDS, Timing, measure, median, ratio
from edgecomp.benchmarks.memory import TINY, footprint
from edgecomp.benchmarks.runners import LiteRt, OnnxRuntime
from edgecomp.data import LabelledImages
from edgecomp.errors import BundleError, DataError, ParityError, TargetError, UsageError
from edgecomp.preprocessing import Preprocessing
from edgecomp.report import Comparison, Source
from tests.filemodels import conv_onnx, conv_tflite, onnx_model

MS = 1_000_000


class Clock:
    """A clock that only the bodies move."""

    def __init__(self) -> None:
        self.ns = 0
        self.calls: list[str] = []

    def __call__(self) -> int:
        return self.ns

    def body(self, name: str, cost):
        def run() -> None:
            self.calls.append(name)
            self.ns += int(cost() if callable(cost) else cost)

        return run


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---- timing ----------------------------------------------------------------------------------------------------------


def test_steady_bodies_are_timed_exactly():
    clock = Clock()
    bodies = {"a": clock.body("a", 1 * MS), "b": clock.body("b", 3 * MS)}
    timings = measure(bodies, clock=clock, rng=Random(0), min_s=1.0)
    assert set(timings["a"].samples_us) == {1000.0}
    assert set(timings["b"].samples_us) == {3000.0}
    assert timings["a"].steady
    assert timings["a"].rounds == timings["b"].rounds >= 10
    assert len(timings["a"].samples_us) == 20 * timings["a"].rounds  # a turn of 20 ms
    assert len(timings["b"].samples_us) == 6 * timings["b"].rounds
    r = ratio(timings["b"], timings["a"], rng=Random(0))
    assert (r.median, r.low, r.high) == (3.0, 3.0, 3.0)
    # Every call is accounted for: warm-ups, one untimed call a turn, samples.
    for name, timing in timings.items():
        assert clock.calls.count(name) == timing.warmups + timing.rounds + len(timing.samples_us)
    assert 2.0 <= clock.ns / 1e9 < 2.9  # min_s for each body, and the warm-ups


def test_a_drift_hits_all_bodies_alike():
    clock = Clock()

    def slower() -> float:  # twice as slow after two seconds, as a throttled board
        return 1 + clock.ns / 2e9

    bodies = {"a": clock.body("a", lambda: MS * slower()), "b": clock.body("b", lambda: 1.25 * MS * slower())}
    timings = measure(bodies, clock=clock, rng=Random(0), min_s=1.5, tolerance=0.2)
    r = ratio(timings["b"], timings["a"], rng=Random(0))
    assert max(timings["a"].samples_us) / min(timings["a"].samples_us) > 1.5
    assert r.median == pytest.approx(1.25, rel=0.02)
    assert r.low <= 1.25 <= r.high
    assert r.high - r.low < 0.05


def test_slow_first_runs_are_warmed_away():
    clock = Clock()

    def settling() -> float:  # 10 ms, and a little less each time; 1 ms from the 91st call on
        return max(1, 10 - 0.1 * len(clock.calls)) * MS

    (timing,) = measure({"a": clock.body("a", settling)}, clock=clock, rng=Random(0), min_s=0.1).values()
    assert timing.steady
    assert timing.warmups > 90
    assert set(timing.samples_us) == {1000.0}


def test_what_never_settles_is_said_and_bounded():
    clock = Clock()
    growing = clock.body("a", lambda: MS * 1.02 ** len(clock.calls))
    (timing,) = measure({"a": growing}, clock=clock, rng=Random(0), warmup_max_s=2.0, rounds=1, min_s=0.0).values()
    assert not timing.steady
    assert 180 < timing.warmups < 200  # 2 s are over after 187 runs, and a window is finished
    clock = Clock()
    timing = measure({"a": clock.body("a", MS)}, clock=clock, rng=Random(0), warmup_min_s=0.0, min_s=0.0)["a"]
    assert timing.warmups == 150  # three windows of 50 ms agree, not fewer
    clock = Clock()
    (timing,) = measure({"a": clock.body("a", MS)}, clock=clock, rng=Random(0), warmup_min_s=0.5, min_s=0.0).values()
    assert timing.steady
    assert 500 <= timing.warmups <= 600


def test_the_first_run_of_a_turn_is_not_a_sample():
    clock = Clock()

    def cold(name: str):
        return lambda: 5 * MS if clock.calls[-2:-1] != [name] else MS

    bodies = {name: clock.body(name, cold(name)) for name in "ab"}
    timings = measure(bodies, clock=clock, rng=Random(0), min_s=0.2)
    assert set(timings["a"].samples_us) | set(timings["b"].samples_us) == {1000.0}


def test_turns_are_blocks_in_an_order_drawn_anew():
    def order(seed: int) -> list[str]:
        clock = Clock()
        bodies = {name: clock.body(name, 15 * MS) for name in "abc"}
        warmups = sum(t.warmups for t in measure(bodies, clock=clock, rng=Random(seed), min_s=0.5).values())
        return clock.calls[warmups:]

    calls = order(1)
    assert calls[::2] == calls[1::2]  # one untimed, one timed
    rounds = [tuple(calls[i : i + 6 : 2]) for i in range(0, len(calls), 6)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 2
    assert order(1) == calls
    assert order(2) != calls


@pytest.mark.parametrize(
    ("cost_s", "options", "rounds"),
    [
        (0.01, {"rounds": 30, "min_s": 0.0}, 30),
        (10.0, {"rounds": 30, "min_s": 0.0, "max_s": 1.0}, MIN_ROUNDS),
        (10.0, {"rounds": 2, "min_s": 0.0, "max_s": 1.0}, 2),
        (1.0, {"rounds": 30, "min_s": 0.0, "max_s": 20.0}, 10),  # an untimed run and a sample a round
        (1.0, {"rounds": 3, "min_s": 20.0, "max_s": 30.0}, 10),
    ],
)
def test_how_long_measuring_takes(cost_s, options, rounds):
    clock = Clock()
    (timing,) = measure({"a": clock.body("a", cost_s * 1e9)}, clock=clock, rng=Random(0), **options).values()
    assert timing.rounds == rounds


def test_progress_rises_to_the_end():
    clock, shares = Clock(), []
    measure({n: clock.body(n, MS) for n in "ab"}, clock=clock, rng=Random(0), min_s=0.3, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert shares[0] < 0.2


def test_garbage_collection_pauses_and_comes_back():
    clock, seen = Clock(), []

    def body() -> None:
        seen.append(gc.isenabled())
        clock.ns += MS

    def failing() -> None:
        raise BundleError("no")

    assert gc.isenabled()
    measure({"a": body}, clock=clock, rng=Random(0), min_s=0.0)
    assert set(seen) == {False}
    assert gc.isenabled()
    with pytest.raises(BundleError):
        measure({"a": failing}, clock=clock, rng=Random(0))
    assert gc.isenabled()


@pytest.mark.parametrize(
    "options",
    [{"rounds": 0}, {"min_s": 3.0, "max_s": 2.0}, {"min_s": -1.0}, {"tolerance": 0.0}, {"warmup_max_s": 0.1}],
)
def test_senseless_options_are_refused(options):
    with pytest.raises(UsageError, match="expected at least one round"):
        measure({"a": lambda: None}, clock=Clock(), rng=Random(0), **options)
    with pytest.raises(UsageError, match="nothing to measure"):
        measure({}, clock=Clock(), rng=Random(0))


def timing(per_round: np.ndarray) -> Timing:
    samples = tuple(np.repeat(per_round, 3).tolist())
    return Timing(warmups=0, steady=True, rounds=len(per_round), samples_us=samples)


def test_the_median_is_that_of_statistics():
    for n in range(1, 30):
        values = rng(n).integers(0, 20, size=n).tolist()
        assert median(values) == statistics.median(values)


def test_the_interval_of_a_ratio_holds_the_truth_as_often_as_it_says():
    draw, turns, held = rng(3), Random(3), 0
    for _ in range(200):
        base = draw.lognormal(0, 0.05, size=40)
        above = 2 * base * draw.lognormal(0, 0.05, size=40)
        r = ratio(timing(above), timing(base), rng=turns, resamples=400)
        held += r.low <= 2 <= r.high
    assert 180 <= held <= 199  # 95 % of 200 is 190


def test_a_ratio_is_paired_by_round_and_repeats_with_its_seed():
    base = np.array([1.0, 10.0, 100.0, 1000.0])
    r = ratio(timing(2 * base), timing(base), rng=Random(0))
    assert (r.median, r.low, r.high) == (2.0, 2.0, 2.0)
    above = np.array([2.0, 30.0, 100.0, 5000.0])
    assert ratio(timing(above), timing(base), rng=Random(7)) == ratio(timing(above), timing(base), rng=Random(7))
    assert ratio(timing(above), timing(base), rng=Random(7)).median == 2.5
    with pytest.raises(UsageError, match="4 and 3 rounds"):
        ratio(timing(above), timing(base[:3]), rng=Random(0))


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_the_tiny_models_are_one_relu():
    (node,) = onnx.load_from_string(TINY["onnx"]).graph.node
    assert node.op_type == "Relu"
    assert len(TINY["onnx"]) < 100
    assert len(TINY["tflite"]) < 300
    for runner, model in ((OnnxRuntime, TINY["onnx"]), (LiteRt, TINY["tflite"])):
        assert [float(runner(model).run(np.array([[v]]))[0, 0]) for v in (-2.0, 3.0)] == [0.0, 3.0]


@pytest.mark.parametrize(("format", "runtime"), [("onnx", "onnxruntime"), ("tflite", "litert")])
def test_a_models_memory_is_at_least_its_weights(format, runtime, tmp_path):
    weight = np.ones((1024, 1024, 2, 2), dtype=np.float32)  # 16 MiB
    data = conv_onnx(weight, 2) if format == "onnx" else conv_tflite(weight, 2, 2)
    path = tmp_path / f"model.{format}"
    path.write_bytes(data)
    big = footprint(path, runtime, processes=1)
    path.write_bytes(TINY[format])
    small = footprint(path, runtime, processes=1)
    assert weight.nbytes <= big.model_bytes < 6 * weight.nbytes
    assert small.model_bytes < 2_000_000
    assert small.peak_bytes < big.peak_bytes
    assert big.runtime_bytes < big.loaded_bytes <= big.peak_bytes
    assert 10_000_000 < big.runtime_bytes < 200_000_000
    assert 0 < small.load_ms < big.load_ms


def test_memory_that_cannot_be_measured_says_why(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(TargetError, match=r"^memory of model.onnx: model.onnx: onnxruntime cannot load it") as caught:
        footprint(path, "onnxruntime", processes=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(TargetError, match="runtime 'magic' is unknown"):
        footprint(path, "magic", processes=1)
    with pytest.raises(TargetError, match="runs no files"):
        footprint(path, "reference", processes=1)
    with pytest.raises(TargetError, match=r"not done after 0\.01 s"):
        footprint(path, "onnxruntime", processes=1, timeout_s=0.01)
    for script, what in {
        "kill -9 $$": "killed by signal 9",
        "echo nonsense": "wrote 'nonsense",
        "exit 3": "no message",
        "echo one >&2; echo two >&2; exit 1": "memory of model.onnx: two$",
    }.items():
        fake = tmp_path / "python"
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(fake))
        with pytest.raises(TargetError, match=what):
            footprint(path, "onnxruntime", processes=1)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    with pytest.raises(TargetError, match="cannot start"):
        footprint(path, "onnxruntime", processes=1)
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    with pytest.raises(TargetError, match="which this system lacks"):
        footprint(path, "onnxruntime", processes=1)


# ---- environment -----------------------------------------------------------------------------------------------------

PI = {
    "proc/cpuinfo": "processor : 0\nCPU implementer : 0x41\nCPU part : 0xd08\n\nHardware : BCM2835\n",
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "proc/loadavg": "0.52 0.58 0.59 1/389 12345\n",
    "proc/meminfo": "MemTotal:        3884000 kB\nMemFree: 1 kB\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1800000\n",
    "sys/class/thermal/thermal_zone0/temp": "48312\n",
    "sys/class/thermal/thermal_zone1/temp": "51200\n",
    "etc/os-release": 'ID=debian\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
}


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_machine_that_tells_everything(tmp_path):
    facts = environment(machine(tmp_path, PI))
    assert facts["cpu"] == "Cortex-A72"
    assert facts["board"] == "Raspberry Pi 4 Model B Rev 1.4"
    assert facts["governor"] == "ondemand"
    assert facts["frequency_mhz"] == 1800.0
    assert facts["temperature_c"] == 51.2
    assert facts["load_average_1min"] == 0.52
    assert facts["memory_bytes"] == 3884000 * 1024
    assert facts["os"] == "Debian GNU/Linux 12 (bookworm)"
    assert facts["unread"] == ()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["onnxruntime"] == OnnxRuntime(TINY["onnx"]).version


def test_what_cannot_be_read_is_named(tmp_path):
    facts = environment(tmp_path)
    expected = {"cpu", "board", "governor", "frequency_mhz", "temperature_c", "load_average_1min", "memory_bytes", "os"}
    assert set(facts["unread"]) == expected
    assert all(facts[name] is None for name in expected)
    broken = {**PI, "sys/class/thermal/thermal_zone1/temp": "hot", "proc/cpuinfo": "", "proc/loadavg": "\n"}
    facts = environment(machine(tmp_path, broken))
    assert facts["unread"] == ("cpu", "temperature_c", "load_average_1min")


def test_an_x86_machine(tmp_path):
    text = "model name\t: Intel(R) Xeon(R)\ncpu MHz\t\t: 2793.438\n\nmodel name\t: other\ncpu MHz : 1\n"
    facts = environment(machine(tmp_path, {"proc/cpuinfo": text, "sys/class/dmi/id/product_name": "KVM\n"}))
    assert (facts["cpu"], facts["frequency_mhz"], facts["board"]) == ("Intel(R) Xeon(R)", 2793.438, "KVM")


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_models_side_by_side(tmp_path):
    generator = np.random.default_rng(0)
    small = generator.normal(size=(4, 4, 3, 3)).astype(np.float32)
    large = generator.normal(size=(64, 64, 3, 3)).astype(np.float32)
    path = tmp_path / "large.onnx"
    path.write_bytes(conv_onnx(large, 24))
    stages: dict[str, float] = {}
    entries = [
        ("small net", conv_onnx(small, 8), "onnx"),
        ("large", path, "onnx"),
        ("lite", conv_tflite(small, 8, 8), "tflite"),
    ]
    comparison = bench(entries, min_s=0.1, rounds=5, progress=stages.__setitem__)
    assert comparison.baseline == "small net"
    assert set(comparison.ratios) == {"large", "lite"}
    assert comparison.ratios["large"].low > 3  # 2,000 times the work
    assert [r.runtime for r in comparison.reports] == ["onnxruntime", "onnxruntime", "litert"]
    assert [r.artifact for r in comparison.reports] == ["small_net.onnx", "large.onnx", "lite.tflite"]
    assert [r.artifact_bytes for r in comparison.reports][1] == path.stat().st_size
    for report in comparison.reports:
        assert report.source is Source.MEASURED
        assert report.target == "host"
        assert report.rounds >= 5
        assert report.peak_memory_bytes > 10_000_000
        assert report.load_ms > 0
    assert comparison.reports[2].execution["xnnpack"] is True
    assert stages == {"latency": pytest.approx(1.0), "memory": 1.0}
    assert Comparison.from_json(comparison.to_json()) == comparison
    assert comparison.table().count("\n") == 4
    assert [p.name for p in tmp_path.iterdir()] == ["large.onnx"]


def test_what_bench_refuses(tmp_path):
    model = conv_onnx(np.ones((1, 1, 1, 1), dtype=np.float32), 2)
    with pytest.raises(UsageError, match=r"labels \(none\)"):
        bench([])
    with pytest.raises(UsageError, match="labels a, a: expected at least one, and each once"):
        bench([("a", model, "onnx"), ("a", model, "onnx")])
    with pytest.raises(UsageError, match="baseline 'b' is not measured; there are a"):
        bench([("a", model, "onnx")], baseline="b")
    with pytest.raises(TargetError, match="runtime litert reads tflite, the models are onnx"):
        bench([("a", model, "onnx")], runtime="litert")
    with pytest.raises(UsageError, match="runtime 'magic' is unknown"):
        bench([("a", model, "onnx")], runtime="magic")
    with pytest.raises(TargetError, match="no runtime reads the format 'pb'"):
        bench([("a", model, "pb")])
    with pytest.raises(BundleError, match=r"nowhere\.onnx: no such file"):
        bench([("a", tmp_path / "nowhere.onnx", "onnx")])
    with pytest.raises(BundleError, match=r"a\.onnx: onnxruntime cannot load it"):
        bench([("a", b"damaged", "onnx")])


def test_a_runtime_is_used_where_it_fits(monkeypatch):
    monkeypatch.setattr(memory, "STATUS", Path("/nowhere"))
    monkeypatch.setattr("edgecomp.benchmarks.bench.STATUS", Path("/nowhere"))
    weight = np.ones((1, 1, 1, 1), dtype=np.float32)
    comparison = bench(
        [("a", conv_onnx(weight, 2), "onnx"), ("b", conv_tflite(weight, 2, 2), "tflite")],
        runtime="litert-reference",
        baseline="b",
        min_s=0.0,
        rounds=1,
    )
    assert [r.runtime for r in comparison.reports] == ["onnxruntime", "litert-reference"]
    assert list(comparison.ratios) == ["a"]
    assert comparison.reports[0].model_memory_bytes is None
    assert comparison.reports[0].load_ms is None


# ---- accuracy and parity ---------------------------------------------------------------------------------------------

PLAIN = Preprocessing(mean=(0.0,), std=(1.0,))
FLATTEN = [helper.make_node("Flatten", ["x"], ["y"])]
# The network's largest output is the brightest of four pixels.
PIXELS = np.array([[9, 1, 2, 3], [1, 9, 2, 3], [1, 2, 9, 3], [9, 2, 1, 3], [5, 5, 5, 5]], dtype=np.uint8)
IMAGES = LabelledImages(images=PIXELS.reshape(5, 2, 2, 1), labels=np.array([0, 1, 0, 1, 0]))


@pytest.fixture(scope="module")
def brightest() -> OnnxRuntime:
    return OnnxRuntime(typed(FLATTEN, "float32"))


def typed(nodes, dtype: str, **options) -> bytes:
    model = onnx.load_from_string(onnx_model(nodes, ["N", 1, 2, 2], dtype=dtype, **options))
    value = helper.make_tensor_value_info("y", model.graph.output[0].type.tensor_type.elem_type, ["N", 4])
    model.graph.output[0].CopyFrom(value)
    return model.SerializeToString()


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_accuracy_counts_every_image_once(batch, brightest):
    seen: list[int] = []
    assert accuracy(brightest, IMAGES, PLAIN, batch=batch, progress=seen.append) == (60.0, 5)
    assert sum(seen) == 5
    assert len(seen) == -(-5 // batch)


def test_accuracy_of_an_integer_model():
    facts = {"edgecomp.input_scale": str(1 / 255), "edgecomp.input_zero_point": "-128"}
    runner = OnnxRuntime(typed(FLATTEN, "int8", facts=facts))
    assert accuracy(runner, IMAGES, PLAIN) == (60.0, 5)
    coarse = {"edgecomp.input_scale": "1.0", "edgecomp.input_zero_point": "-128"}  # all pixels fall on one code
    assert accuracy(OnnxRuntime(typed(FLATTEN, "int8", facts=coarse)), IMAGES, PLAIN) == (60.0, 5)
    ones = LabelledImages(images=IMAGES.images, labels=np.ones(5, dtype=np.int64))
    assert accuracy(OnnxRuntime(typed(FLATTEN, "int8", facts=coarse)), ones, PLAIN) == (0.0, 5)


def test_accuracy_refuses_what_does_not_fit(brightest):
    far = LabelledImages(images=IMAGES.images, labels=np.array([0, 1, 2, 3, 4]))
    with pytest.raises(DataError, match="label 4, the model has 4 outputs"):
        accuracy(brightest, far, PLAIN)
    wide = LabelledImages(images=np.zeros((2, 3, 3, 1), dtype=np.uint8), labels=np.array([0, 1]))
    with pytest.raises(DataError, match=r"the model takes \(N, 1, 2, 2\)"):
        accuracy(brightest, wide, PLAIN)
    with pytest.raises(UsageError, match="batch is 0"):
        accuracy(brightest, IMAGES, PLAIN, batch=0)
    log = typed([helper.make_node("Log", ["x"], ["l"]), helper.make_node("Flatten", ["l"], ["y"])], "float32")
    dark = Preprocessing(mean=(0.03,), std=(1.0,))  # image 4 stays below zero, the others hold a dark pixel too
    with pytest.raises(ParityError, match="image 0: the model's output is NaN"):
        accuracy(OnnxRuntime(log), IMAGES, dark)


@pytest.mark.parametrize(
    ("expected", "got", "step", "result"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0, (100.0, 0, (0,), 4)),
        ([1, 2, 3, 4], [1, 5, 3, 6], 99.0, (50.0, 3, (1,), 4)),
        ([[-128], [0]], [[127], [1]], 1.0, (0.0, 255, (0, 0), 2)),
        ([0.0, 1.0], [0.0499, 1.05], 0.1, (50.0, 1, (1,), 2)),
        ([0.0, 0.0, 0.0, 0.0], [0.124, 0.125, -0.375, 0.374], 0.25, (25.0, 2, (2,), 4)),
        ([[0.0, 0.0], [0.0, 1e30]], [[0.0, 0.0], [0.0, 0.0]], 0.5, (75.0, 2**62, (1, 1), 4)),
    ],
    ids=["same", "codes", "extremes", "half a step", "rounding", "far"],
)
def test_parity_in_steps(expected, got, step, result):
    kind = np.float64 if isinstance(np.ravel(expected)[0], np.floating) else np.int8
    p = parity(np.array(expected, dtype=kind), np.array(got, dtype=kind), step)
    assert (p.equal_percent, p.max_steps, p.worst_index, p.n) == result
    assert all(type(v) is int for v in (p.max_steps, p.n, *p.worst_index))


def test_parity_refuses_what_cannot_be_compared():
    codes, reals = np.zeros((2, 3), dtype=np.int8), np.zeros((2, 3), dtype=np.float32)
    with pytest.raises(ParityError, match=r"shape \(3, 2\), expected \(2, 3\)"):
        parity(codes, codes.T)
    with pytest.raises(ParityError, match="at least one element"):
        parity(codes[:0], codes[:0])
    with pytest.raises(ParityError, match="outputs are float32, expected int8; compare codes with codes"):
        parity(codes, reals)
    for step in (0.0, -1.0, np.nan):
        with pytest.raises(UsageError, match="expected the output's scale"):
            parity(reals, reals, step)
    broken = reals.copy()
    broken[1, 2] = np.nan
    with pytest.raises(ParityError, match=r"output \(1, 2\): found nan, which is not a number"):
        parity(reals, broken)
    with pytest.raises(ParityError, match=r"output \(1, 2\): expected nan"):
        parity(broken, reals)
