"""Devices over SSH: a real sshd, whose sessions are on emulated 64-bit Arm, and everything that goes wrong with one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgecomp.benchmarks import over_ssh
from edgecomp.benchmarks.over_ssh import bench_over_ssh
from edgecomp.cli import main
from edgecomp.errors import EdgecompError, TargetError, UsageError
from edgecomp.report import BenchReport, Source
from edgecomp.targets.ssh import Address, Session, parse_address, platforms_of
from tests.filemodels import conv_onnx
from tests.ssh_device import Device
from tests.test_bench import rng
from tests.test_report import COMPARISON

SET_UP = over_ssh._set_up
FLAGS = ("--processes=1", "--max_secs=1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    path.write_bytes(conv_onnx(rng().normal(size=(8, 8, 3, 3)).astype("float32"), 8))
    return path


def measured(device: Device, model: Path, *more: str, min_s: float = 0.1) -> BenchReport:
    address = parse_address(device.address)
    (report,) = bench_over_ssh([("it", model, "onnx")], address, min_s=min_s, flags=(*FLAGS, *more)).reports
    return report


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def is_measuring(device: Device) -> bool:
    """Tell whether a runner has begun: its model lies there, and the lock is held."""
    return bool(list((device.place / "tmp").glob("edgecomp-*/0.onnx")))


# ---- what works ------------------------------------------------------------------------------------------------------


@pytest.mark.devices
def test_first_connection_then_a_report_and_nothing_left_behind(device, model):
    device.trust(None)
    with pytest.raises(TargetError, match=r"^127\.0\.0\.1: the host key is not known yet; connect once with: ssh 127"):
        measured(device, model)
    assert (device.place / "known_hosts").read_text() == ""  # nobody trusted it behind the user's back
    device.trust("host")
    report = measured(device, model, "--enable_op_profiling=true", "--num_runs=30", "--cores=0")
    assert report.environment["machine"] == "aarch64"
    assert report.environment["cpu"] == "Cortex-A72"
    assert report.environment["affinity"] == ("0",)
    assert (report.target, report.source, report.threads) == ("rpi4", Source.MEASURED, 1)
    assert len(report.samples_us) >= 30
    assert 0 < report.min_us <= report.p50_us <= report.p90_us <= report.p99_us
    assert report.load_ms > 0
    assert report.peak_memory_bytes > 30e6
    assert any(name.endswith(("Conv", "FusedConv")) for name in report.layers_us)
    assert set(report.before) == set(report.after) >= {"governor", "temperature_c", "throttle_flags", "swapped_pages"}
    assert device.left_behind() == []
    (made,) = (device.place / "home/.cache/edgecomp").glob("venv-*")
    stamp = (made / "ready").stat().st_mtime_ns
    assert measured(device, model).runtime == "onnxruntime"
    assert (made / "ready").stat().st_mtime_ns == stamp  # once made, used again


@pytest.mark.devices
def test_two_runs_at_once_take_turns(device, model):
    reports: list[BenchReport] = []
    threads = [threading.Thread(target=lambda: reports.append(measured(device, model))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == 2
    assert all(report.p50_us > 0 for report in reports)
    assert device.left_behind() == []


@pytest.mark.devices
def test_a_throttled_board_is_exit_6_with_the_report(device, model, capsys):
    flags = "$root/sys/devices/platform/soc/soc:firmware"
    device.extra(f"mount -t tmpfs none $root/sys; mkdir -p {flags}; echo 50004 > {flags}/get_throttled")
    assert main(["bench", str(model), "--target", device.address, "--min-secs", "0.1", "--json"]) == 6
    out, err = capsys.readouterr()
    assert "not valid: " in err
    assert "throttled: the board's firmware reports throttled" in err
    ((report,),) = (comparison["reports"] for comparison in json.loads(out))
    assert report["after"]["throttle_flags"] == 0x50004
    assert report["not_valid"][0].startswith("throttled: ")
    assert report["samples_us"]


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.devices
def test_a_key_that_the_device_does_not_know(device, model):
    device.key("stranger")
    with pytest.raises(TargetError, match=r"127\.0\.0\.1: login refused; is the key on the device"):
        measured(device, model)


@pytest.mark.devices
def test_a_changed_host_key(device, model):
    device.trust("other_host")
    with pytest.raises(TargetError, match=r"the host key is not the one that is known.*ssh-keygen -R"):
        measured(device, model)


@pytest.mark.devices
def test_a_connection_that_drops_in_mid_run(device, model):
    found: list[EdgecompError] = []

    def run() -> None:
        try:
            measured(device, model, "--max_secs=500", min_s=500)
        except EdgecompError as e:
            found.append(e)

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
    until(lambda: not any("runner.pyz" in line for line in commands()), 20)


@pytest.mark.devices
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_client_leaves_nothing_there(number, device, model):
    command = [sys.executable, "-m", "edgecomp", "bench", str(model), "--target", device.address, "--min-secs", "500"]
    client = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until(lambda: is_measuring(device))
    client.send_signal(number)
    _, said = client.communicate(timeout=60)
    assert client.returncode == (130 if number == signal.SIGINT else -number)
    assert ("interrupted" in said) is (number == signal.SIGINT)
    until(lambda: device.left_behind() == [], 20)
    until(lambda: not any("runner.pyz" in line for line in commands()), 20)


@pytest.mark.devices
@pytest.mark.parametrize("full", ["tmp", "root"])
def test_a_full_disk(full, device, model):
    device.extra(f"mount -t tmpfs -o size=64k none $root/{full}")
    with pytest.raises(TargetError, match=r"127\.0\.0\.1: .*No space left on device"):
        measured(device, model)
    device.extra("")
    assert device.left_behind() == []


@pytest.mark.devices
def test_one_of_two_devices_fails_and_the_other_is_let_go(device, model, capsys):
    gone = f"ssh://127.0.0.1:{device.port + 1}"
    started = time.monotonic()
    code = main(["bench", str(model), "--target", device.address, "--target", gone, "--min-secs", "500"])
    assert code == 6
    assert "refused" in capsys.readouterr().err
    assert time.monotonic() - started < 60
    until(lambda: device.left_behind() == [], 20)


@pytest.mark.devices
def test_another_board_than_was_said(device, model):
    address = parse_address(device.address.replace("rpi4", "rpi5"))
    with pytest.raises(TargetError, match="its processor is Cortex-A72, a rpi5 has Cortex-A76; correct board="):
        bench_over_ssh([("it", model, "onnx")], address, min_s=0.1, flags=FLAGS)


def commands() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # ended meanwhile
            continue
    return found


# ---- what a device says is data --------------------------------------------------------------------------------------


def answering(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Session:
    """A session with a device that runs a shell script in the place of everything."""
    fake = folder / "ssh"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return Session(Address(host="box", port=None, board="box", known=False))


@pytest.mark.parametrize(
    ("script", "what"),
    [
        ("echo Welcome to the box!", "box: answer: 'Welcome to the box!' is no line of JSON; does its shell print"),
        ("echo '{\"a\": 1}'", "is no line of JSON"),
        ("echo '{\"a\": 1, \"a\": 2, \"bytes\": 0}'", "is no line of JSON"),
        ("echo '{\"bytes\": -1}'", "-1 bytes, expected up to"),
        ("echo '{\"bytes\": 99999999999}'", "99999999999 bytes, expected up to"),
        ("echo '{\"bytes\": true}'", "True bytes"),
        ("head -c 100000 /dev/zero; sleep 5", "a line of more than 65536 bytes"),
        ("echo '{\"bytes\": 5}'; printf abc", "box: the connection ended"),
        ("echo '{\"error\": \"the roof\nis on fire\", \"bytes\": 0}'", "is no line of JSON"),
        ("echo '{\"error\": \"the roof is on fire\", \"bytes\": 0}'", "^box: the roof is on fire$"),
        ("echo 'ssh: connect to host box port 22: Connection refused' >&2; exit 255", "connection refused"),
        ("echo something odd >&2; exit 255", "the connection ended: something odd"),
        ("exit 127", "has no python3"),
    ],
)
def test_what_is_no_answer(script, what, tmp_path, monkeypatch):
    with answering(tmp_path, monkeypatch, script) as session, pytest.raises(TargetError, match=what) as caught:
        session.start(b"pass")
    assert "\n" not in str(caught.value)


def test_a_silent_device(tmp_path, monkeypatch):
    monkeypatch.setattr("edgecomp.targets.ssh.FIRST_ANSWER_S", 0.5)
    with answering(tmp_path, monkeypatch, "exec sleep 20") as session, pytest.raises(TargetError, match="no answer"):
        session.start(b"pass")


def test_a_report_of_something_else(tmp_path, monkeypatch, model):
    facts = {"session": 1, "machine": "aarch64", "python": "3.11", "libc": "2.36", "environments": [], "bytes": 0}
    text = COMPARISON.to_json()
    for python, size, body, what in (
        ("3.9", 0, "", r"has Python 3\.9, expected 3\.11 or newer; and the C runner does not run there: it needs"),
        ("3.11", len(text), text, "its report is about other files than were sent"),
        ("3.11", 3, "{]}", "its report cannot be read"),
    ):
        monkeypatch.setattr("edgecomp.benchmarks.over_ssh._set_up", SET_UP if python == "3.9" else lambda *a: "key")
        (tmp_path / "body").write_text(body)
        lines = [json.dumps({**facts, "python": python}), json.dumps({"exit": 0, "stderr": "", "bytes": size})]
        (tmp_path / "lines").write_text("\n".join(lines) + "\n")
        answering(tmp_path, monkeypatch, f"cat {tmp_path}/lines {tmp_path}/body; exec cat > /dev/null").close()
        with pytest.raises(TargetError, match=what):
            bench_over_ssh([("it", model, "onnx")], parse_address("ssh://box"))


# ---- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port", "board", "known"),
    [
        ("ssh://pi@raspberrypi.local:2222?board=rpi4", "pi@raspberrypi.local", 2222, "rpi4", True),
        ("ssh://MyPi", "MyPi", None, "MyPi", False),  # an alias of ssh's configuration
        ("ssh://10.0.0.7/", "10.0.0.7", None, "10.0.0.7", False),
    ],
)
def test_addresses(text, host, port, board, known):
    assert parse_address(text) == Address(host=host, port=port, board=board, known=known)


@pytest.mark.parametrize(
    "text",
    [
        "ssh://-oProxyCommand=sh", "ssh://pi@-x", "ssh://-l@box", "ssh://pi:secret@box", "ssh://", "ssh://box:99999",
        "ssh://box/path", "ssh://box?bored=rpi4", "ssh://box?board", "http://box", "ssh://b ox", "ssh://box#x",
        "ssh://$(id)@box",
    ],
)  # fmt: skip
def test_what_is_no_address(text):
    with pytest.raises(UsageError, match=r"expected ssh://\[user@\]host"):
        parse_address(text)


def test_platforms_of_a_device():
    assert platforms_of("aarch64", "2.19") == (
        "manylinux_2_19_aarch64", "manylinux_2_18_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64",
    )  # fmt: skip
    with pytest.raises(TargetError, match="C library says ''; expected glibc"):
        platforms_of("aarch64", "")


def test_what_the_command_line_refuses(model, capsys):
    for more in (
        ["--target", "ssh://a", "--target", "rpi4-emulated"],
        ["--target", "ssh://a", "--target", "ssh://a"],
        ["--target", "ssh://a", "--cores", "one"],
        ["--target", "ssh://a", "--repeat", "-1"],
        ["--target", "ssh://a", "--threads", "0"],
        ["--cores", "1"],
    ):
        assert main(["bench", str(model), *more]) == 2, more
    assert main(["bench", str(model), "--target", "ssh://a?board=rpi9"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 7
