"""Devices over SSH without Python: the runner in C, on emulated 64-bit Arm, and everything that goes wrong with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from edgecomp.benchmarks import over_ssh
from edgecomp.benchmarks.over_ssh import bench_over_ssh
from edgecomp.cli import main
from edgecomp.errors import TargetError
from edgecomp.report import Comparison, Source
from edgecomp.targets.ssh import Session, parse_address
from tests.filemodels import conv_onnx
from tests.packed_files import AtRest, exported
from tests.ssh_device import POSIX, Device
from tests.test_bench import rng
from tests.test_report import COMPARISON
from tests.test_ssh import FLAGS, answering, commands, until


@pytest.fixture
def device(device: Device) -> Device:
    """A device that has what POSIX asks for and no Python."""
    device.only(*POSIX)
    return device


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path, str]]:
    place = tmp_path_factory.mktemp("models")
    (place / "model.onnx").write_bytes(conv_onnx(rng().normal(size=(8, 8, 3, 3)).astype("float32"), 8))
    (place / "model.tflite").write_bytes(exported("wide", 4, AtRest.PACKED).data)
    return [("it", place / "model.onnx", "onnx"), ("with = and space", place / "model.tflite", "tflite")]


def measured(device: Device, models: list[tuple[str, Path, str]], *more: str, min_s: float = 0.1) -> Comparison:
    return bench_over_ssh(models, parse_address(device.address), min_s=min_s, flags=(*FLAGS, *more))


def is_measuring(device: Device) -> bool:
    return bool(list((device.place / "tmp").glob("edgecomp-*/out")))


@pytest.mark.devices
def test_a_report_as_from_python_and_nothing_left_behind(device, models, monkeypatch):
    told: list[str] = []
    flags = (*FLAGS, "--enable_op_profiling=true", "--num_runs=30", "--cores=0")
    found = bench_over_ssh(models, parse_address(device.address), min_s=0.1, flags=flags, told=told.append)
    assert told == ["127.0.0.1: has no python3 (there: apt-get install python3); measured by the C runner"]
    assert Comparison.from_json(found.to_json()) == found
    assert found.ratios.keys() == {"with = and space"}
    for report, (label, path, _) in zip(found.reports, models, strict=True):
        assert (report.label, report.artifact_bytes) == (label, path.stat().st_size)
        assert (report.target, report.source, report.threads) == ("rpi4", Source.MEASURED, 1)
        assert (report.environment["machine"], report.environment["cpu"]) == ("aarch64", "Cortex-A72")
        assert (report.environment["runner"], report.environment["affinity"]) == ("C", ("0",))
        assert len(report.samples_us) >= 30
        assert 0 < report.min_us <= report.p50_us <= report.p90_us <= report.p99_us
        assert report.load_ms > 0
        assert report.peak_memory_bytes > 10e6
        assert set(report.before) == set(report.after) >= {"governor", "temperature_c", "throttle_flags"}
    onnx, lite = found.reports
    assert any(name.endswith(("Conv", "FusedConv")) for name in onnx.layers_us)
    assert lite.execution["unpacked_beforehand"] is True
    assert device.left_behind() == []
    (made,) = (device.place / "home/.cache/edgecomp").glob("native-*")
    stamps = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    # Once there, used again, and not even fetched.
    monkeypatch.setattr(over_ssh, "libraries", lambda *a: pytest.fail("fetched again"))
    assert measured(device, models).reports[0].runtime == "onnxruntime"
    assert stamps == {path.name: path.stat().st_mtime_ns for path in made.iterdir()}


@pytest.mark.devices
def test_a_throttled_board_is_exit_6_with_the_report(device, models, monkeypatch, capsys):
    flags = "$root/sys/devices/platform/soc/soc:firmware"
    more = f"mount -t tmpfs none $root/sys; mkdir -p {flags}; echo 50004 > {flags}/get_throttled"
    device.only(*POSIX, more=more)
    monkeypatch.setattr(over_ssh, "PAUSE_S", 0.0)
    orders = []
    order = Session.order
    monkeypatch.setattr(Session, "order", lambda *a, **k: orders.append(a[1][0]) or order(*a, **k))
    words = ["bench", str(models[0][1]), "--target", device.address, "--min-secs", "0.1", "--json", "--repeat", "1"]
    assert main(words) == 6
    out, err = capsys.readouterr()
    assert "throttled: the board's firmware reports throttled" in err
    ((report,),) = (comparison["reports"] for comparison in json.loads(out))
    assert (report["after"]["throttle_flags"], report["environment"]["runner"]) == (0x50004, "C")
    assert report["samples_us"]
    assert orders == ["libraries", "run", "run"]


def test_the_table_says_who_measured(models, monkeypatch, capsys):
    def bench(*args, told, **how):
        told("box: has no python3; measured by the C runner")
        return replace(COMPARISON, reports=tuple(replace(r, not_valid=()) for r in COMPARISON.reports))

    monkeypatch.setattr(over_ssh, "bench_over_ssh", bench)
    assert main(["bench", str(models[0][1]), "--target", "ssh://box"]) == 0
    assert "\n\nbox: has no python3; measured by the C runner\n" in capsys.readouterr().out


@pytest.mark.devices
def test_an_interrupted_client_leaves_nothing_there(device, models):
    command = [sys.executable, "-m", "edgecomp", "bench", models[0][1], "--target", device.address, "--min-secs", "500"]
    client = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until(lambda: is_measuring(device))
    client.send_signal(signal.SIGINT)
    _, said = client.communicate(timeout=60)
    assert client.returncode == 130
    assert "interrupted" in said
    until(lambda: device.left_behind() == [], 20)
    until(lambda: not any("--task=session" in line for line in commands()), 20)


@pytest.mark.devices
def test_a_connection_that_drops_in_mid_run(device, models):
    found: list[TargetError] = []

    def run() -> None:
        with pytest.raises(TargetError) as caught:
            measured(device, models[:1], "--max_secs=500", min_s=500)
        found.append(caught.value)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: is_measuring(device))
    time.sleep(1)
    for process in device.sessions():
        os.kill(process, signal.SIGKILL)
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert "127.0.0.1: the connection ended" in str(found[0])
    until(lambda: device.left_behind() == [], 20)


@pytest.mark.devices
@pytest.mark.parametrize("full", ["tmp", "root"])
def test_a_full_disk(full, device, models, monkeypatch):
    # A cache of its own, which is empty.
    device.only(*POSIX, more=f"mount -t tmpfs -o size=32k none $root/{full}")
    with pytest.raises(TargetError, match=r"127\.0\.0\.1: .*No space left on device"):
        measured(device, models[:1])
    device.extra("")
    assert device.left_behind() == []


@pytest.mark.devices
@pytest.mark.parametrize(
    ("programs", "machine", "more", "what"),
    [
        (POSIX, "armv7l", "", r"it is for aarch64, x86_64, the device is armv7l"),
        ((), None, "", r"127\.0\.0\.1: has not all programs of a POSIX system"),
        (POSIX, None, "mount -t tmpfs -o noexec none $root/tmp", "it does not start: .*ermission denied"),
        (POSIX, None, "mount -t tmpfs -o ro none $root/tmp", "no folder can be made in /tmp"),
    ],
)
def test_a_device_that_neither_runner_is_for(programs, machine, more, what, device, models):
    device.only(*programs, machine=machine, more=more)
    expected = rf"^127\.0\.0\.1: has no python3 .*; and the C runner does not run there: .*{what}"
    with pytest.raises(TargetError, match=expected) as caught:
        measured(device, models[:1])
    assert "\n" not in str(caught.value)
    device.extra("")
    assert device.left_behind() == []


@pytest.mark.devices
def test_a_runtime_that_only_python_has(device, models):
    with pytest.raises(TargetError, match=r"it has no runtime onnxruntime-lean, expected one of onnxruntime, litert"):
        bench_over_ssh(models[:1], parse_address(device.address), runtime="onnxruntime-lean", flags=FLAGS)


@pytest.mark.devices
def test_a_damaged_model(device, models, tmp_path):
    (tmp_path / "damaged.onnx").write_bytes(models[0][1].read_bytes()[:300])
    with pytest.raises(TargetError, match=r"the runner ended with 2: 0\.onnx: onnxruntime cannot load it: ") as caught:
        measured(device, [("it", tmp_path / "damaged.onnx", "onnx")])
    assert "\n" not in str(caught.value)
    until(lambda: device.left_behind() == [], 20)


def test_a_device_with_another_c_library(tmp_path, monkeypatch, models):
    monkeypatch.setattr(over_ssh, "_by_python", lambda asked: (_ for _ in ()).throw(over_ssh._NoPython("old")))
    line = '{"machine": "aarch64", "loaders": " /lib/ld-linux-armhf.so.3", "bytes": 0}'
    answering(tmp_path, monkeypatch, f"echo '{line}'; exec cat > /dev/null").close()
    what = r"^old; and .*: it needs the GNU C library of aarch64, /lib/ld-linux-aarch64\.so\.1 is not there"
    with pytest.raises(TargetError, match=what):
        bench_over_ssh(models[:1], parse_address("ssh://box"))


def test_what_is_no_report(tmp_path, monkeypatch, models):
    monkeypatch.setattr(over_ssh, "_by_python", lambda asked: (_ for _ in ()).throw(over_ssh._NoPython("old")))
    monkeypatch.setattr(over_ssh, "native_runner", lambda machine: b"")
    monkeypatch.setattr(over_ssh, "libraries", lambda *a: {})
    lines = ['{"machine": "aarch64", "loaders": "/lib/ld-linux-aarch64.so.1", "bytes": 0}']
    lines += ['{"session": 1, "libc": "2.36", "environments": [], "bytes": 0}', '{"done": true, "bytes": 0}']
    for body in ("{]}", "\xff", '{"schema": "edgecomp-comparison/2"}'):
        data = body.encode("latin-1")
        (tmp_path / "body").write_bytes(data)
        last = json.dumps({"exit": 0, "stderr": "", "bytes": len(data)})
        (tmp_path / "lines").write_text("\n".join([*lines, last]) + "\n")
        answering(tmp_path, monkeypatch, f"cat {tmp_path}/lines {tmp_path}/body; exec cat > /dev/null").close()
        with pytest.raises(TargetError, match=r"^old; and the C runner .* box: its report cannot be read: ") as caught:
            bench_over_ssh(models[:1], parse_address("ssh://box"))
        assert "\n" not in str(caught.value)
