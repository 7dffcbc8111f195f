"""The boards are what their sources say, and a board's file is read strictly."""

from __future__ import annotations

import errno
import json
import os
import zipfile
from types import SimpleNamespace

import pytest

from edgecomp import latency
from edgecomp.benchmarks.runners import RUNNERS
from edgecomp.cli import main
from edgecomp.errors import TargetError, UsageError
from edgecomp.processor import check_core
from edgecomp.target import RUNTIMES, Target, parse
from edgecomp.targets import emulated, load, names

GOOD = """
name = "box"
description = "a box"
cpu = "Cortex-A53"
cores = 4
clock_hz = 1_000_000_000
isa = ["aarch64"]
ram_bytes = 1024
flash_bytes = 512
runtimes = ["litert"]
[sources]
cpu = "a"
cores = "b"
clock_hz = "c"
isa = "d"
ram_bytes = "e"
flash_bytes = "f"
"""

# Typed from the makers' documentation, not from our files.
BOARDS = {
    "rpi-zero2w": ("Cortex-A53", 4, 1.0e9, 512 * 2**20, False),
    "rpi3b": ("Cortex-A53", 4, 1.2e9, 2**30, False),
    "rpi3b-plus": ("Cortex-A53", 4, 1.4e9, 2**30, False),
    "rpi4": ("Cortex-A72", 4, 1.5e9, 2**30, False),
    "rpi5": ("Cortex-A76", 4, 2.4e9, 2**30, True),
}
MICROCONTROLLERS = {
    "nucleo-l4r5zi": ("Cortex-M4", 120e6, 640, 2048),
    "nucleo-u575zi-q": ("Cortex-M33", 160e6, 768, 2048),
    "disco-f746ng": ("Cortex-M7", 216e6, 320, 1024),
    "ek-ra8d1": ("Cortex-M85", 480e6, 1024, 2048),
    "nrf5340-dk": ("Cortex-M33", 128e6, 512, 1024),
}


def test_the_list_of_boards():
    cores = ("cortex-m0plus", "cortex-m33", "cortex-m4", "cortex-m55", "cortex-m7")
    assert set(names()) > {*cores, *BOARDS, *MICROCONTROLLERS, "host", "armv7"}
    assert len(names()) == len(cores) + len(BOARDS) + 19 + 2
    assert list(names()) == sorted(names())


@pytest.mark.parametrize("name", BOARDS)
def test_facts_of_a_board(name):
    target = load(name)
    cpu, cores, clock_hz, ram_bytes, dot_product = BOARDS[name]
    assert (target.name, target.cpu, target.cores, target.clock_hz) == (name, cpu, cores, clock_hz)
    assert (target.ram_bytes, target.flash_bytes) == (ram_bytes, None)
    assert "neon" in target.isa
    assert ("dotprod" in target.isa) is dot_product
    assert ("fp16" in target.isa) is dot_product
    facts = {"l1_bytes", "l2_bytes", "fp32_macs_per_cycle", "memory_copy_bytes_per_s", "memory_fill_bytes_per_s"}
    assert set(target.sources) - {"l3_bytes"} == {"cpu", "cores", "clock_hz", "isa", "ram_bytes", "wheels", *facts}
    assert target.fp32_macs_per_cycle == (8 if dot_product else 4)
    assert any(wheel.startswith("onnxruntime ") and wheel.endswith("_aarch64") for wheel in target.wheels)


@pytest.mark.parametrize("name", MICROCONTROLLERS)
def test_facts_of_a_microcontroller(name):
    target = load(name)
    cpu, clock_hz, ram_kib, flash_kib = MICROCONTROLLERS[name]
    assert (target.cpu, target.clock_hz, target.cores) == (cpu, clock_hz, 1)
    assert (target.ram_bytes, target.flash_bytes) == (ram_kib * 1024, flash_kib * 1024)
    assert ("helium" in target.isa) is (cpu == "Cortex-M85")


def test_the_host_has_no_facts_on_file():
    host = load("host")
    assert (host.cpu, host.cores, host.clock_hz, host.ram_bytes, host.isa) == (None, None, None, None, ())
    assert set(host.runtimes) == set(RUNNERS)


def test_boards_name_runtimes_that_exist():
    for name in names():
        assert load(name).runtimes
        assert set(load(name).runtimes) <= set(RUNNERS)


def test_a_file_may_name_the_runtimes_that_there_are():
    assert set(RUNTIMES) == {*RUNNERS, *latency.RUNTIMES}


def test_an_unknown_board_gets_a_hint():
    for name in ("rpi-4", "RPI4"):
        with pytest.raises(UsageError, match=rf"^target '{name}' is unknown; did you mean rpi4.*\? see edgecomp t"):
            load(name)
    for name in ("toaster", "../targets/rpi4", "", "__init__"):
        with pytest.raises(UsageError, match=r"is unknown; see edgecomp targets$"):
            load(name)
    with pytest.raises(UsageError, match=r"an emulated board is for bench alone; did you mean rpi4\?"):
        load("rpi4-emulated")


def test_a_users_own_file(tmp_path):
    path = tmp_path / "mine.toml"
    with pytest.raises(UsageError, match=r"mine\.toml: no such file; expected the facts of a board"):
        load(str(path))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UsageError, match=r"folder\.toml: cannot be read \(Is a directory\); expected the facts"):
        load(str(tmp_path / "folder.toml"))
    path.write_text(GOOD)
    assert load(str(path)) == parse(GOOD, "box.toml")
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())  # as Windows writes it
    assert load(str(path)) == parse(GOOD, "box.toml")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"cannot be read \(it is no text\)"):
        load(str(path))
    with pytest.raises(UsageError, match=r"cannot be read \(it is no text\)"):
        load(str(tmp_path) + "/\0.toml")


def test_the_command_shows_a_users_own_file(tmp_path, capsys):
    (tmp_path / "mine.toml").write_text(GOOD)
    assert main(["targets", str(tmp_path / "mine.toml")]) == 0
    text = capsys.readouterr().out
    assert "1000000" in text
    assert "a box" in text
    assert main(["targets", "rpi5", "--json"]) == 0
    (board,) = json.loads(capsys.readouterr().out)
    assert (board["l3_bytes"], board["sources"]["l3_bytes"][:12]) == (2 * 2**20, "raspberrypi/")


def test_the_runner_replaces_nothing_unasked(tmp_path, capsys, monkeypatch):
    precious, file = tmp_path / "graph.edgecomp", tmp_path / "runner.pyz"
    precious.write_bytes(b"precious")
    assert main(["targets", "--runner", str(file)]) == 0
    capsys.readouterr()
    for given, more, what in (
        (str(file), [], "is there already; give --force to replace it"),
        ("", [], "is there and is no file"),
        (str(precious), [], "is there already; give --force to replace it"),
        (str(precious), ["--force"], "is no runner; --force replaces only an earlier one"),
        (str(tmp_path), ["--force"], "is there and is no file"),
        (str(tmp_path), ["--cpu", "aarch64"], "holds files and no edgecomp-runner; choose a new folder"),
        (str(tmp_path), ["--cpu", "aarch64", "--force"], "holds files and no edgecomp-runner; choose a new folder"),
    ):
        assert main(["targets", "--runner", given, *more]) == 2
        said = capsys.readouterr().err
        assert what in said
        assert said.count("\n") == 1
    assert precious.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.edgecomp", "runner.pyz"]
    # Another archive that Python runs.
    with zipfile.ZipFile(precious, "w") as archive:
        archive.writestr("__main__.py", "")
    assert main(["targets", "--runner", str(precious), "--force"]) == 2
    assert "is no runner" in capsys.readouterr().err
    file.write_bytes(file.read_bytes() + b"older")

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert main(["targets", "--runner", str(file), "--force"]) == 2
        assert capsys.readouterr().err.startswith(f"edgecomp: {file}: No space left on device")
    assert main(["targets", "--runner", str(file), "--force"]) == 0
    assert not file.read_bytes().endswith(b"older")


def test_names_of_no_board(capsys):
    assert main(["targets", ""]) == 2
    assert main(["targets", "", "--json"]) == 2
    assert main(["targets", "--install", "rpi4"]) == 2
    said, shown = capsys.readouterr().err, capsys.readouterr().out
    assert said.count("target '' is unknown; see edgecomp targets") == 2
    assert "target 'rpi4' is not emulated; did you mean rpi4-emulated" in said
    assert shown == ""


def test_a_full_cache_says_what_stays(tmp_path, capsys, monkeypatch):
    def full(folder, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "x.deb"))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(emulated, "_check_tools", lambda *_: None)
    monkeypatch.setattr(emulated, "_debian_packages", full)
    assert main(["targets", "--install", "rpi4-emulated"]) == 2
    said, downloads = capsys.readouterr().err, tmp_path / "edgecomp" / "downloads"
    full_message = f"edgecomp: {downloads}/apt/x.deb: No space left on device; "
    assert said == f"{full_message}what was downloaded stays in {downloads}, for the next try\n"
    assert downloads.is_dir()
    assert not (tmp_path / "edgecomp" / "aarch64-root").exists()
    said_by_apt = "Debian packages for arm64: ended with 100: E: Unable to locate package python3"

    def misled(folder, *_):
        raise TargetError(said_by_apt)

    monkeypatch.setattr(emulated, "_debian_packages", misled)
    full_disk = f"/edgecomp: only 0.0 MB are free there; what was downloaded stays in {downloads}"
    for free, code, what in ((4096, 2, full_disk), (10**9, 6, f"edgecomp: {said_by_apt}")):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert main(["targets", "--install", "rpi4-emulated"]) == code
        assert what in capsys.readouterr().err
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert main(["targets", "--install", "rpi4-emulated"]) == 2
    assert capsys.readouterr().err.endswith("; nothing stays\n")


def test_a_file_becomes_a_value():
    target = parse(GOOD, "box.toml")
    assert target == Target(
        name="box",
        description="a box",
        cpu="Cortex-A53",
        cores=4,
        clock_hz=1_000_000_000,
        isa=("aarch64",),
        ram_bytes=1024,
        flash_bytes=512,
        runtimes=("litert",),
        sources=dict(zip(("cpu", "cores", "clock_hz", "isa", "ram_bytes", "flash_bytes"), "abcdef", strict=True)),
    )
    with pytest.raises(TypeError):
        target.sources["cpu"] = "z"


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("cores = 4", "cores = ", "not TOML"),
        ("cores = 4", "cores = 4\ncores = 5", "not TOML"),
        ("cores = 4", "core = 4", "unknown key 'core'; expected name"),
        ('name = "box"', "", "name is missing"),
        ('runtimes = ["litert"]', "", "runtimes is missing"),
        ("cores = 4", "cores = 0", "cores is 0, expected a whole number from 1 to 1_024"),
        ("cores = 4", "cores = true", "cores is True"),
        ("cores = 4", "cores = 4.0", "cores is 4.0"),
        ("ram_bytes = 1024", 'ram_bytes = "1 kB"', "ram_bytes is '1 kB'"),
        ('name = "box"', "name = 1", "name is 1, expected one line of text"),
        ('"a box"', '"""a\nbox"""', "description is"),
        ('isa = ["aarch64"]', 'isa = "aarch64"', "isa is 'aarch64', expected a list of texts"),
        ('isa = ["aarch64"]', "isa = [1]", "isa is [1]"),
        ('isa = ["aarch64"]', 'isa = ["aarch64", "bogus"]', "isa has 'bogus', expected of aarch64, "),
        ('isa = ["aarch64"]', f"isa = [0x{'f' * 5000}]", "isa is a number of thousands of digits"),
        ('runtimes = ["litert"]', 'runtimes = ["bogus"]', "runtimes has 'bogus', expected of onnxruntime, "),
        ("clock_hz = 1_000_000_000", f"clock_hz = 1{'0' * 400}", "expected a whole number from 1 to 100_000_000_000"),
        ("clock_hz = 1_000_000_000", f"clock_hz = 1{'0' * 5000}", "not TOML: a number is too long"),
        ("clock_hz = 1_000_000_000", f"clock_hz = 0x{'f' * 5000}", "clock_hz is a number of thousands of digits"),
        ('cpu = "Cortex-A53"', 'cpu = "Cortex\\u001b-A53"', "cpu is 'Cortex"),
        ('clock_hz = "c"\n', "", "clock_hz: no source says where it was read"),
        ("cores = 4", "", "cores: a source is given, but not the fact"),
        ('cpu = "a"', 'cpu = "a"\ncolour = "red"', "sources: unknown key 'colour'"),
        ('cpu = "a"', "cpu = 1", "sources: expected a table of texts"),
    ],
)
def test_files_are_read_strictly(old, new, what):
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    with pytest.raises(UsageError) as caught:
        parse(text, "box.toml")
    assert str(caught.value).startswith("box.toml: ")
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    ["cores", "clock_hz", "fp32_macs_per_cycle", "l1_bytes", "l2_bytes", "l3_bytes", "memory_copy_bytes_per_s",
     "memory_fill_bytes_per_s", "ram_bytes", "flash_bytes"],
)  # fmt: skip
def test_every_number_has_an_upper_bound(key, tmp_path, capsys):
    facts = {"cpu": '"Cortex-A53"', "clock_hz": "1_000_000_000", key: f"1{'0' * 400}"}
    (tmp_path / "mine.toml").write_text("\n".join(f"{name} = {value}" for name, value in facts.items()))
    assert main(["targets", str(tmp_path / "mine.toml")]) == 2
    error = capsys.readouterr().err
    assert f"mine.toml: {key} is 1000" in error
    assert error.count("\n") == 1
    assert len(error) < 400


def test_two_facts_are_enough_in_a_users_own_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('cpu = "cortex-a72"\nclock_hz = 1_800_000_000\n')
    mine = load(str(path))
    assert (mine.name, mine.cpu, mine.clock_hz, mine.sources) == ("mine", "Cortex-A72", 1_800_000_000, {})
    path.write_text('name = "shed"\ncpu = "CORTEX-M0+"\nclock_hz = 32_768\n[sources]\ncpu = "label"\n')
    mine = load(str(path))
    assert (mine.name, mine.cpu, dict(mine.sources)) == ("shed", "Cortex-M0+", {"cpu": "label"})


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("cpu = ", "not TOML"),
        ("clock_hz = 1", "cpu is missing; expected cpu, clock_hz and what is known"),
        ('cpu = "Cortex-A72"', "clock_hz is missing"),
        ('cpu = "Cortex-A72"\nclock_hz = "fast"', "clock_hz is 'fast'"),
        ('cpu = "Cortex-A72"\nclock_hz = 1\ncolour = 1', "unknown key 'colour'"),
        ('cpu = "Z80"\nclock_hz = 4_000_000', "nothing is known of a core 'Z80': give isa and fp32_macs_per_cycle, or"),
        ('cpu = "Cortex-M99"\nclock_hz = 4_000_000', "of a core 'Cortex-M99': give isa, or one of ARM1176JZF"),
        (
            'cpu = "Cortex-M23"\nclock_hz = 4_000_000\nisa = ["thumb"]',
            "isa does not say what it is like: expected one of helium, mve, armv6-m, armv8-m.base, armv7e-m, dsp",
        ),
    ],
)
def test_a_users_own_file_that_is_of_no_use_is_wrong_usage(text, what, tmp_path, capsys):
    (tmp_path / "mine.toml").write_text(text)
    assert main(["estimate", "net.edgecomp", "--target", str(tmp_path / "mine.toml")]) == 2
    error = capsys.readouterr().err
    assert what in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("cpu", "clock_hz", "isa", "what"),
    [
        ("Cortex-M4", 168, "", "clock_hz is 168, and no Cortex-M4 is slower than 32_768; it is in Hz: 168 MHz are"),
        ("Cortex-M99", 32_767, "thumb", "is slower than 32_768; it is in Hz: 32767 kHz are 32_767_000"),
        ("cortex-a73", 1800, "", "no Cortex-A73 is slower than 10_000_000; it is in Hz: 1800 MHz are 1_800_000_000"),
        ("Cortex-A73", 1_800_000, "", "it is in Hz: 1800000 kHz are 1_800_000_000"),
        ("Cortex-A999", 2400, "aarch64", "no Cortex-A999 is slower than 10_000_000"),
        ("Z80", 4, "", "no Z80 is slower than 32_768"),
        ("Cortex-M4", 10**8, "aarch64", "isa has 'aarch64', which a Cortex-M4 is without; expected of thumb, armv6-m"),
        ("cortex-m4", 10**8, "thumb neon", "isa has 'neon', which a Cortex-M4 is without"),
        ("Cortex-M4", 10**8, "thumb mve", "isa has 'mve', which a Cortex-M4 is without"),
        ("Cortex-M99", 10**8, "armv7", "isa has 'armv7', which a Cortex-M99 is without"),
        ("Cortex-A53", 10**9, "neon armv7e-m", "isa has 'armv7e-m', which a Cortex-A53 is without; expected of"),
        ("Cortex-A53", 10**9, "aarch64 dotprod", "isa has 'dotprod', which a Cortex-A53 is without"),
        ("Cortex-A7", 10**9, "aarch64", "isa has 'aarch64', which a Cortex-A7 is without; expected of armv6, armv7"),
        ("Cortex-A999", 10**9, "helium", "isa has 'helium', which a Cortex-A999 is without"),
    ],
)
def test_a_users_own_file_gives_no_core_what_it_has_not(cpu, clock_hz, isa, what, tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text(f'cpu = "{cpu}"\nclock_hz = {clock_hz}\nisa = {json.dumps(isa.split())}\n')
    for argv in (["estimate", "net.edgecomp", "--target", str(path)], ["targets", str(path)]):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"edgecomp: {path}: ")
        assert what in error
        assert error.count("\n") == 1


def test_what_a_core_may_have_is_believed(tmp_path):
    """Ours are as they say; of cores that are not known, or are no Cortex, a little or all."""
    for name in names():
        check_core(load(name), name)
    path = tmp_path / "mine.toml"
    for cpu, isa in (
        ("Cortex-A75", "aarch64 fp16 dotprod"), ("Cortex-A53", "armv7 neon"), ("Cortex-A999", "aarch64 i8mm"),
        ("Cortex-M85", "thumb armv8.1-m.main dsp mve helium fp16"), ("Cortex-M99", "helium"),
        ("STAR-MC1", "armv8-m.main"),
    ):  # fmt: skip
        path.write_text(f'cpu = "{cpu}"\nclock_hz = 10_000_000\nisa = {json.dumps(isa.split())}\n')
        assert load(str(path)).isa == tuple(isa.split())
