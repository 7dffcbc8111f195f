"""32-bit Arm: an emulated board, and a device over SSH that brings its own numpy, as there is no wheel of one."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgecomp.benchmarks import session as device_end
from edgecomp.benchmarks.emulated import bench_emulated
from edgecomp.benchmarks.over_ssh import bench_over_ssh
from edgecomp.cli import main
from edgecomp.compress import compress
from edgecomp.exporters import export
from edgecomp.plan import Io
from edgecomp.targets.ssh import Address, Session, parse_address
from tests.filemodels import conv_onnx
from tests.graphs import GRAPHS, plan_for
from tests.ssh_device import Device, running
from tests.test_bench import rng
from tests.test_ssh import until

BOARD = "armv7-emulated"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a file whose weights are words, which are made plain on the device."""
    path = tmp_path_factory.mktemp("packed") / "plain.tflite"
    quantized = compress(GRAPHS["plain"](), plan_for(GRAPHS["plain"](), 4, io=Io.INT8))
    path.write_bytes(export(quantized, "tflite-packed").data)
    return path


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    path.write_bytes(conv_onnx(rng().normal(size=(8, 8, 3, 3)).astype("float32"), 8))
    return path


@pytest.mark.devices
def test_an_emulated_board_of_32_bits(root_32, packed, onnx_file, capsys):
    (report,) = bench_emulated([("it", packed, "tflite")], BOARD).reports
    assert (report.runtime, report.runtime_version, report.target) == ("tflite-runtime", "2.14.0", BOARD)
    assert report.environment["machine"] == "armv7l"
    assert report.environment["cpu"] == "Cortex-A7"
    assert str(report.environment["numpy"]).startswith("1.")
    assert report.execution["outputs_are_codes"]
    assert report.execution["values_compared"] == 20
    assert report.execution["largest_difference"] <= 1  # the runtime is years older than this machine's LiteRT
    assert 10_000 < report.instructions["total"] < 10_000_000
    assert 15e6 < report.peak_memory_bytes < 60e6
    assert 0 <= report.model_memory_bytes < 10e6
    assert main(["bench", str(packed), "--target", BOARD]) == 0
    title, _, _, _, row = capsys.readouterr().out.splitlines()
    assert "armv7-emulated (qemu-arm -cpu cortex-a7); emulated" in title
    assert [cell.strip() for cell in row.split("|")][4:9] == [str(report.instructions["total"]), "1.000", *"---"]
    assert report.instructions.keys() == {"total"}
    assert main(["bench", str(onnx_file), "--target", BOARD]) == 6
    assert capsys.readouterr().err == "edgecomp: armv7-emulated: tflite-runtime does not read onnx\n"
    assert main(["targets", "--install", BOARD]) == 0
    assert capsys.readouterr().out.strip() == str(root_32)


@pytest.fixture
def device(root_32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    with running(tmp_path, root_32, BOARD) as made:
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
        yield made


@pytest.mark.devices
def test_a_device_of_32_bits_over_ssh(device, packed, onnx_file, capsys):
    command = ["bench", "--target", device.address, "--min-secs", "0.1", "--json"]
    device.extra("mount -t tmpfs none $root/usr/lib/python3/dist-packages")
    assert main([*command, str(packed)]) == 6
    said = capsys.readouterr().err
    assert said.startswith("edgecomp: 127.0.0.1: has no numpy<2 and cannot install it: ")
    assert "; there: apt-get install python3-numpy; and from here: wheels numpy<2 for Python 3.11" in said
    assert said.count("\n") == 1
    device.extra("")
    address = parse_address(device.address)
    flags = ("--processes=1", "--max_secs=1")
    (report,) = bench_over_ssh([("it", packed, "tflite")], address, min_s=0.1, flags=flags).reports
    assert (report.runtime, report.runtime_version, report.target) == ("tflite-runtime", "2.14.0", "armv7")
    assert report.environment["machine"] == "armv7l"
    assert str(report.environment["numpy"]).startswith("1.")
    assert report.peak_memory_bytes > 15e6
    (made,) = (device.place / "home/.cache/edgecomp").glob("venv-*")
    assert (made / "lib/python3.11/site-packages/tflite_runtime").is_dir()
    assert not (made / "lib/python3.11/site-packages/numpy").exists()
    assert main([*command, str(onnx_file)]) == 6
    said = capsys.readouterr().err
    assert said.startswith("edgecomp: 127.0.0.1: no runtime for onnx is made for 32-bit Arm; give --runtime tflite-run")
    until(lambda: device.left_behind() == [], 30)


def test_a_system_of_32_bits_on_a_kernel_of_64(monkeypatch):
    for name, largest, expected in (
        ("aarch64", 2**63 - 1, "aarch64"),
        ("aarch64", 2**31 - 1, "armv7l"),
        ("armv7l", 2**31 - 1, "armv7l"),
        ("armv6l", 2**31 - 1, "armv6l"),
        ("x86_64", 2**63 - 1, "x86_64"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr("platform.machine", lambda name=name: name)
            patched.setattr(sys, "maxsize", largest)
            assert device_end.machine() == expected


def test_what_a_device_has_of_its_own():
    words = ["numpy", "numpy<1", "numpy<9", "of-that-there-is-none", "of-that-there-is-none<2"]
    command = [sys.executable, "-c", device_end.LACKING, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["numpy<1", "of-that-there-is-none", "of-that-there-is-none<2"]


def test_what_no_wheel_was_sent_of_is_installed_there(tmp_path, monkeypatch):
    """The device's end, here: what ssh is given to run is run by this machine's shell."""
    script = f'#!/bin/sh\npython3() {{ exec {sys.executable} "$@"; }}\nfor last; do :; done\neval "$last"\n'
    (tmp_path / "ssh").write_text(script)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "madeup-1.5-py3-none-any.whl", "w") as wheel:
        folder = "madeup-1.5.dist-info"
        wheel.writestr("madeup.py", "")
        wheel.writestr(f"{folder}/METADATA", "Metadata-Version: 2.1\nName: madeup\nVersion: 1.5\n")
        wheel.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{folder}/RECORD", "")
    message = {"op": "environment", "key": "k", "packages": ["madeup<2"], "own": ["madeup<2"]}
    with Session(Address(host="box", port=None, board="box", known=False)) as session:
        session.start(Path(device_end.__file__).read_bytes())
        session.ask(message, limit_s=100)
        assert list((tmp_path / "cache/edgecomp/venv-k").glob("lib/python*/site-packages/madeup.py"))
        assert (tmp_path / "cache/edgecomp/venv-k/ready").read_text() == "madeup<2"
