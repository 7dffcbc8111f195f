"""The runner in C, on this machine: beside the runner in Python, what it refuses, and without faults of its own."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from edgecomp.artifact import AtRest
from edgecomp.benchmarks import native_runner as native
from edgecomp.benchmarks.environment import THROTTLE_FLAGS, environment, state
from edgecomp.benchmarks.gathered import comparison_of, sent_of
from edgecomp.benchmarks.runners import LiteRt, OnnxRuntime
from edgecomp.benchmarks.runtime import channels_last
from edgecomp.cli import main
from edgecomp.errors import BundleError, TargetError, UsageError
from edgecomp.exporters.to_onnx import to_onnx
from edgecomp.exporters.to_tflite import to_tflite
from edgecomp.exporters.unpack_tflite import unpack_tflite
from edgecomp.plan import Io
from edgecomp.report import BenchReport, Comparison, Source
from tests.filemodels import conv_onnx, conv_tflite
from tests.packed_files import exported, quantized
from tests.test_bench import rng

QUICK = ("--min_secs=0.05", "--max_secs=0.1", "--processes=1")
CPU = "x86_64"


def libraries() -> dict[str, Path]:
    """The runtimes' libraries, of the packages that are installed here."""
    places = {"onnxruntime": "capi/libonnxruntime.so.*", "ai_edge_litert": "libLiteRt.so"}
    found = {}
    for package, pattern in places.items():
        spec = importlib.util.find_spec(package)
        assert spec is not None
        (path,) = Path(str(spec.submodule_search_locations[0])).glob(pattern)
        found[path.name if "so." in path.name else f"{path.name}.2.3.0"] = path
    return found


def filled(folder: Path, program: bytes) -> Path:
    (folder / native.PROGRAM).write_bytes(program)
    (folder / native.PROGRAM).chmod(0o755)
    for name, path in libraries().items():
        (folder / name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def models() -> Mapping[str, bytes]:
    weight = rng().normal(size=(8, 8, 3, 3)).astype("float32")
    made = {"model.onnx": conv_onnx(weight, 8), "model.tflite": conv_tflite(weight, 8, 8)}
    graph = quantized("residual", 8, Io.INT8)
    made |= {"codes.onnx": to_onnx(graph).data, "codes.tflite": to_tflite(graph).data}
    made["packed.tflite"] = exported("wide", 4, AtRest.PACKED).data
    return MappingProxyType(made)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, models: Mapping[str, bytes]) -> Path:
    """A runner made by this machine's own compiler, its libraries and models beside it."""
    made = filled(tmp_path_factory.mktemp("native"), native.compiled(["cc", *native.OPTIONS, *native.WARNINGS]))
    for name, data in models.items():
        (made / name).write_bytes(data)
    return made


def run(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [f"./{native.PROGRAM}", *words]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, **env}, timeout=300
    )


def judged(text: str, models: Mapping[str, bytes], *names: str) -> Comparison:
    sent = [sent_of(name, models[name], name, name.rpartition(".")[2])[0] for name in names]
    return comparison_of(text, sent, baseline=names[0], target="here")


# ---- beside the runner in Python -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.onnx", "model.tflite", "codes.onnx", "codes.tflite"])
def test_the_same_outputs(name, folder, models, tmp_path, monkeypatch):
    # Beside the stock session: on x86 without VNNI outputs would come from another one.
    monkeypatch.setattr("edgecomp.benchmarks.onnx_runtime._saturates_here", lambda: False)
    lite = name.endswith("tflite")
    runner = (LiteRt if lite else OnnxRuntime)(folder / name)
    shape, dtype = (5, *runner.input.shape), runner.input.dtype
    images = rng().normal(size=shape) if dtype.kind == "f" else rng().integers(-128, 128, size=shape)
    images = images.astype(dtype)
    expected = [channels_last(y) if lite else y for y in runner.run_all(images).values()]
    (tmp_path / "in").write_bytes((channels_last(images) if lite else images).tobytes())
    done = run(folder, "--task=outputs", f"--graph={name}", f"--inputs={tmp_path}/in", f"--result={tmp_path}/out")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out").read_bytes() == b"".join(y[i].tobytes() for i in range(len(images)) for y in expected)
    assert len({y[0].tobytes() for y in expected} | {y[1].tobytes() for y in expected}) > len(expected)


def test_the_report_is_one_as_python_makes_it(folder, models):
    words = ["--graph=model.onnx", "--graph=lite=model.tflite", "--num_threads=2", "--num_runs=50", "--warmup_runs=20"]
    done = run(folder, *words, *QUICK, "--cores=0", "--enable_op_profiling=true")
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["model.onnx", "lite"]
    found = judged(done.stdout, models, "model.onnx", "model.tflite")
    assert Comparison.from_json(found.to_json()) == found
    assert found.ratios.keys() == {"model.tflite"}
    # The same facts of this machine as are read by Python; those that change meanwhile are only there.
    here, now = environment(), state()
    for report, name in zip(found.reports, ("model.onnx", "model.tflite"), strict=True):
        for fact in ("cpu", "board", "machine", "cores", "governor", "temperature_c", "memory_bytes", "os", "kernel"):
            assert report.environment[fact] == here[fact], fact
        assert (report.environment["affinity"], report.environment["cores_allowed"]) == (("0",), 1)
        assert report.environment["runner"] == "C"
        assert here["runner"] == "Python"
        assert set(report.before) == set(report.after) == set(now)
        assert [f for f, value in report.after.items() if value is None] == [f for f in now if now[f] is None]
        assert report.sha256 == hashlib.sha256(models[name]).hexdigest()
        assert (report.source, report.threads, report.artifact_bytes) == (Source.MEASURED, 2, len(models[name]))
        assert report.warmups >= 20
        assert len(report.samples_us) >= 50
        assert len(report.samples_us) % report.rounds == 0
        assert 5e6 < report.peak_memory_bytes < 200e6
        assert report.model_memory_bytes < report.peak_memory_bytes
        assert report.load_ms > 0
    onnx, lite = found.reports
    assert (onnx.runtime, onnx.runtime_version) == ("onnxruntime", OnnxRuntime(folder / "model.onnx").version)
    assert (lite.runtime, lite.runtime_version) == ("litert", LiteRt(folder / "model.tflite").version)
    assert onnx.layers_us.keys() == OnnxRuntime(folder / "model.onnx").profile(2).keys()
    assert not lite.layers_us
    assert dict(onnx.execution) == OnnxRuntime(folder / "model.onnx", threads=2).describe()
    assert lite.execution["all_nodes_in_xnnpack"] is True


def test_what_xnnpack_leaves_is_told(folder, models, tmp_path):
    """Native int4 weights run in built-in kernels."""
    path = tmp_path / "int4.tflite"
    path.write_bytes(exported("wide", 4, AtRest.NATIVE).data)
    assert LiteRt(path).describe()["nodes_left_to_builtin_kernels"]
    (model,) = json.loads(run(folder, str(path), *QUICK).stdout)["models"]
    assert model["execution"]["all_nodes_in_xnnpack"] is False


def test_a_packed_file_is_unpacked_beforehand(folder, models, tmp_path):
    done = run(folder, "packed.tflite", *QUICK)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "litert cannot run it (status 3; a packed file is unpacked first, by edgecomp unpack)" in done.stderr
    plain = unpack_tflite(models["packed.tflite"], "it")
    assert sent_of("it", models["packed.tflite"], "it", "tflite")[1] == plain
    (tmp_path / "plain.tflite").write_bytes(plain)
    (report,) = judged(run(folder, f"{tmp_path}/plain.tflite", *QUICK).stdout, models, "packed.tflite").reports
    assert (report.artifact_bytes, report.execution["unpacked_beforehand"]) == (len(models["packed.tflite"]), True)


def test_flags_of_onnxruntime_perf_test(folder, models, tmp_path):
    done = run(folder, "-m", "times", "-r", "30", "-x", "1", "-e", "cpu", "-I", "model.onnx", f"{tmp_path}/result.json")
    assert (done.returncode, done.stdout) == (0, "")
    (report,) = judged((tmp_path / "result.json").read_text(), models, "model.onnx").reports
    assert len(report.samples_us) >= 30
    assert os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        ([], 2, "no model; expected --graph=FILE"),
        (["none.onnx"], 2, "none.onnx: no such file"),
        (["--graph"], 2, "--graph: expected one argument; see -h"),
        (["--graph=model.onnx", "--runtime=litert"], 6, "runtime litert reads tflite, not model.onnx"),
        (["--graph=model.onnx", "--runtime=tvm"], 2, "runtime 'tvm' is unknown; expected onnxruntime or litert"),
        (["edgecomp-runner"], 6, "edgecomp-runner: no runtime reads this format"),
        (["--graph=model.onnx", "--nonsense=1"], 2, "--nonsense=1: no such flag; see -h"),
        (["--graph=model.onnx", "--num_threads=0"], 2, "--num_threads: '0': expected a whole number, 1 or more"),
        (["--graph=model.onnx", "--num_threads=1025"], 2, "'1025': expected a whole number from 1 to 1024"),
        (["--graph=model.onnx", "--num_runs=-5"], 2, "--num_runs: '-5': expected a whole number, 1 or more"),
        (["--graph=model.onnx", "--min_secs", "nan"], 2, "--min_secs: 'nan': expected seconds, 0 or more"),
        (["--graph=model.onnx", "--max_secs", "inf"], 2, "--max_secs: 'inf': expected seconds"),
        (["model.onnx", "model.onnx"], 2, "model.onnx: is a model, and would be replaced by the result"),
        (["--graph=other=model.onnx", "model.onnx", "./model.onnx"], 2, "is a model, and would be replaced"),
        (["--graph=model.onnx", "model.onnx"], 2, "label model.onnx: expected each once"),
        (["model.onnx", "out", "more"], 2, "more: expected one model and one result"),
        (["--graph=model.onnx", "-e", "cuda"], 2, "-e: 'cuda': expected cpu"),
        (["--graph=model.onnx", "-m", "ever"], 2, "-m: 'ever': expected times or duration"),
        (["--graph=model.onnx", "--enable_op_profiling=perhaps"], 2, "expected true or false"),
        (["--graph=model.onnx", "--cores=4095"], 2, "--cores 4095: core"),
        (["--graph=model.onnx", "--cores=one"], 2, "--cores: 'one': expected numbers of cores"),
        (["--graph=model.onnx", "--libraries=/nowhere"], 6, "/nowhere: has no libonnxruntime.so.*"),
        (["damaged.onnx"], 2, "damaged.onnx: onnxruntime cannot load it"),
        (["damaged.tflite"], 2, "damaged.tflite: litert cannot load it"),
        (["empty.tflite"], 2, "empty.tflite: litert cannot load it"),
        (["unreadable.onnx"], 2, "unreadable.onnx: no such file"),
        (["model.onnx", "/nowhere/result.json", *QUICK], 2, "/nowhere/result.json: No such file or directory"),
    ],
)
def test_what_the_runner_refuses(words, code, what, folder, models):
    for format in ("onnx", "tflite"):
        (folder / f"damaged.{format}").write_bytes(models[f"model.{format}"][:300])
    (folder / "empty.tflite").write_bytes(b"")
    if not (folder / "unreadable.onnx").is_symlink():
        (folder / "unreadable.onnx").symlink_to("unreadable.onnx")
    done = run(folder, *words)
    assert (folder / "model.onnx").read_bytes() == models["model.onnx"]
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count("\n") == 1
    assert what in done.stderr


def test_a_library_that_is_none(folder, tmp_path):
    (tmp_path / "libonnxruntime.so.1").write_bytes(b"no library")
    done = run(folder, "model.onnx", f"--libraries={tmp_path}")
    assert (done.returncode, done.stderr.count("\n")) == (6, 1)
    assert "onnxruntime cannot be used here: " in done.stderr
    (tmp_path / "libonnxruntime.so.1").unlink()
    # Another library than the one expected.
    (tmp_path / "libonnxruntime.so.3").symlink_to(libraries()["libLiteRt.so.2.3.0"])
    done = run(folder, "model.onnx", f"--libraries={tmp_path}")
    assert (done.returncode, done.stderr.count("\n")) == (6, 1)
    assert "has no OrtGetApiBase; it is another version of the library than expected" in done.stderr


# ---- by itself -------------------------------------------------------------------------------------------------------

DIGESTS = """#define main runner_main
#include "edgecomp_runner.c"
#undef main
int main(int argc, char **argv) {
  char text[65];
  long long n;
  messages = stderr;
  for (int i = 1; i < argc; i++) { digest(argv[i], text, &n); printf("%s %lld\\n", text, n); }
  return 0;
}
"""


def test_digests(tmp_path):
    for name, data in native.sources().items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "digests.c").write_text(DIGESTS)
    others = ["digests.c", "edgecomp_runtimes.c", "edgecomp_session.c"]
    subprocess.run(["cc", *native.OPTIONS, "-o", "digests", *others, *native.LIBRARIES], cwd=tmp_path, check=True)
    contents = [rng().bytes(n) for n in [*range(131), 4096, 100_001]]
    names = []
    for i, data in enumerate(contents):
        (tmp_path / f"{i}.bin").write_bytes(data)
        names.append(f"{i}.bin")
    said = subprocess.run([tmp_path / "digests", *names], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert said.stdout.splitlines() == [f"{hashlib.sha256(data).hexdigest()} {len(data)}" for data in contents]


def test_no_fault_of_its_own(models, tmp_path):
    """Memory is used as it should be and given back, and nothing is done that C leaves undefined."""
    checks = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    filled(tmp_path, native.compiled(["cc", *native.OPTIONS, *native.WARNINGS, *checks]))
    for name in ("model.onnx", "model.tflite", "codes.tflite"):
        (tmp_path / name).write_bytes(models[name])
    (tmp_path / "theirs").write_text("leak:libonnxruntime\nleak:libLiteRt\n")
    (tmp_path / "in").write_bytes(bytes(2 * 4 * 8 * 8 * 8))
    env = {"LSAN_OPTIONS": "suppressions=theirs:print_suppressions=0"}
    graphs = ["--graph=model.onnx", "--graph=model.tflite", "--graph=third=codes.tflite"]
    done = run(tmp_path, *graphs, *QUICK, "--enable_op_profiling", "--num_threads=2", **env)
    assert "Sanitizer" not in done.stderr
    assert "runtime error" not in done.stderr
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["models"]) == 3
    for words in (["--task=outputs", "model.tflite", "--inputs=in"], ["--task=memory", "model.onnx"]):
        done = subprocess.run([f"./{native.PROGRAM}", *words], cwd=tmp_path, capture_output=True, check=False,
                              env={**os.environ, **env})  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b"")


def test_a_session_without_a_fault(tmp_path):
    """It stores libraries, runs, and removes what it was sent when its input ends."""
    checks = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = tmp_path / native.PROGRAM
    program.write_bytes(native.compiled(["cc", *native.OPTIONS, *native.WARNINGS, *checks]))
    program.chmod(0o755)
    (tmp_path / "work").mkdir()
    data, key = rng().bytes(100_000), b"0123456789abcdef"
    words = [program, "--task=session", f"--folder={tmp_path}/work"]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with subprocess.Popen(words, stdin=-1, stdout=-1, stderr=-1, env=env) as session:
        facts = json.loads(session.stdout.readline())
        assert facts["environments"] == []
        assert facts["machine"] == CPU
        assert facts["free_bytes"] > 0
        for _ in range(2):  # as another session might have done it meanwhile
            session.stdin.write(b"libraries %s 2\n%d lib.so\n0 empty.so\n%s" % (key, len(data), data))
            session.stdin.flush()
            assert json.loads(session.stdout.readline()) == {"done": True, "bytes": 0}
        for words, code, said in ((b"-h", 0, ""), (b"--nonsense", 2, "--nonsense: no such flag; see -h\n")):
            session.stdin.write(b"run %s 60 1 1\n3 0.onnx\n%s\nabc" % (key, words))
            session.stdin.flush()
            answer = json.loads(session.stdout.readline())
            assert (answer["exit"], answer["stderr"]) == (code, said)
            out = session.stdout.read(answer["bytes"])
            assert out.startswith(b"usage: edgecomp-runner" if code == 0 else b"")
            assert (tmp_path / "work/0.onnx").read_bytes() == b"abc"
        # A library whose opening takes for ever.
        (tmp_path / "slow").mkdir()
        os.mkfifo(tmp_path / "slow" / "libonnxruntime.so.1")
        slow = b"--libraries=%s/slow" % str(tmp_path).encode()
        session.stdin.write(b"run %s 0.5 1 2\n3 0.onnx\n%s\n0.onnx\nabc" % (key, slow))
        session.stdin.flush()
        assert "the runner: not done when its time was over" in json.loads(session.stdout.readline())["error"]
        # A measurement by another session, in Python or in C, is waited for.
        with (tmp_path / "cache/edgecomp/run.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            session.stdin.write(b"run %s 0.5 0 1\n-h\n" % key)
            session.stdin.flush()
            assert "another measurement holds it" in json.loads(session.stdout.readline())["error"]
        session.stdin.close()
        assert session.wait(timeout=60) == 0
        assert session.stderr.read() == b""
    stored = tmp_path / "cache/edgecomp" / f"native-{key.decode()}"
    assert (stored / "lib.so").read_bytes() == data
    assert {path.name for path in stored.parent.iterdir()} == {stored.name, "run.lock"}
    assert not (tmp_path / "work").exists()
    # Where no cache folder can be made, libraries stay for the session alone.
    (tmp_path / "work").mkdir()
    env["XDG_CACHE_HOME"] = str(program)
    order = b"libraries %s 1\n3 lib.so\nabc" % key
    done = subprocess.run([program, "--task=session", f"--folder={tmp_path}/work"], input=order, capture_output=True,
                          check=True, env=env)  # fmt: skip
    assert json.loads(done.stdout.splitlines()[1]) == {"done": True, "bytes": 0}
    assert not (tmp_path / "work").exists()


# ---- for devices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cpu", "number"), [("aarch64", 183), ("x86_64", 62)])
def test_the_compiled_runner_is_the_same_each_time(cpu, number):
    program = native.native_runner(cpu)
    assert program[:6] == b"\x7fELF\x02\x01"
    assert int.from_bytes(program[18:20], "little") == number
    assert native.native_runner.__wrapped__(cpu) == program  # in another folder
    assert b"/tmp/" not in program.replace(b"/tmp\0", b"")
    assert native.CPUS[cpu].loader.encode() + b"\0" in program


def test_the_compiled_runner_runs(folder, models, tmp_path):
    filled(tmp_path, native.native_runner(CPU))
    (tmp_path / "model.onnx").write_bytes(models["model.onnx"])
    done = run(tmp_path, "model.onnx", *QUICK)
    assert done.returncode == 0, done.stderr
    assert judged(done.stdout, models, "model.onnx").reports[0].p50_us > 0


def test_what_cannot_be_compiled(monkeypatch):
    with pytest.raises(TargetError, match=r"the C runner is not made for 'armv7l'; expected one of aarch64, x86_64"):
        native.native_runner("armv7l")
    with pytest.raises(TargetError, match=r"the C runner cannot be compiled: it ended with 1: "):
        native.compiled(["cc", "--no-such-option"])
    with pytest.raises(TargetError, match=r"the C runner cannot be compiled: .*No such file"):
        native.compiled(["/nowhere/cc"])
    for mistyped, close in (("aarch46", "aarch64"), ("arm64", "aarch64"), ("pentium", ""), ("", "")):
        meant = f"; did you mean {close}?" if close else ""
        said = f"--cpu {mistyped!r} is unknown; expected one of aarch64, x86_64, as uname -m says it there{meant}"
        with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
            native.native_runner(mistyped)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"compiled by the package ziglang: pip install 'edgecomp\[boards\]'"):
        native.native_runner.__wrapped__(CPU)


def a_wheel(folder: Path, package: str, names: Mapping[str, bytes]) -> Path:
    path = folder / f"{package.partition('==')[0].replace('-', '_')}-9.8-cp311-cp311-manylinux_2_28_aarch64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in names.items():
            archive.writestr(name, data)
    return path


def test_a_runner_to_use_by_hand(folder, models, tmp_path, monkeypatch, capsys):
    held = {"onnxruntime": {"onnxruntime/capi/libonnxruntime.so.9.8": b"1"}}
    held["ai-edge-litert==2.3.0"] = {"ai_edge_litert/libLiteRt.so": b"2"}
    asked = []

    def download(packages, place, python, platforms):
        asked.append((packages, platforms[-1]))
        return [a_wheel(tmp_path, packages[0], held[packages[0]])]

    monkeypatch.setattr(native, "pip_download", download)
    place = tmp_path / "runner"
    assert main(["targets", "--runner", str(place), "--cpu", "aarch64"]) == 0
    assert capsys.readouterr().out == f"{place}\n"
    assert asked == [([name], "manylinux2014_aarch64") for name in held]
    assert {path.name for path in place.iterdir()} == {native.PROGRAM, "libonnxruntime.so.9.8", "libLiteRt.so.9.8"}
    assert (place / native.PROGRAM).read_bytes() == native.native_runner("aarch64")
    assert os.access(place / native.PROGRAM, os.X_OK)
    assert (place / "libLiteRt.so.9.8").read_bytes() == b"2"
    assert main(["targets", "--runner", str(place), "--cpu", "aarch64"]) == 2
    assert "edgecomp-runner: is there already; give --force" in capsys.readouterr().err
    (place / "libLiteRt.so.9.7").touch()
    assert main(["targets", "--runner", str(place), "--cpu", "aarch64", "--force"]) == 0
    assert not (place / "libLiteRt.so.9.7").exists()
    assert main(["targets", "--runner", str(place / native.PROGRAM), "--cpu", "aarch64", "--force"]) == 2
    assert "is there and is no folder; with --cpu a folder is written" in capsys.readouterr().err
    held["onnxruntime"] = {"onnxruntime/nothing.py": b""}
    assert main(["targets", "--runner", str(tmp_path / "other"), "--cpu", "aarch64"]) == 6
    assert "has no libonnxruntime.so*; expected the runtime's library" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert main(["targets", "--cpu", "aarch64"]) == 2
    # A processor that is none is said before a place that is taken.
    for cpu, code in (("aarch46", 2), ("armv7l", 6)):
        assert main(["targets", "--runner", str(place), "--cpu", cpu]) == code
        assert repr(cpu) in capsys.readouterr().err


def test_a_tflite_file_that_is_cut_off_is_said_in_a_line(folder, models):
    data = models["model.tflite"]
    for sixteenth in range(1, 16):
        (folder / "cut.tflite").write_bytes(data[: len(data) * sixteenth // 16])
        done = run(folder, "cut.tflite")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_a_tflite_file_that_crashes_the_runtime_is_said_in_a_line(folder):
    data = exported("wide", 4, AtRest.NATIVE).data
    shape = struct.pack("<5i", 4, 1, 6, 6, 8)
    assert data.count(shape) == 1
    (folder / "larger.tflite").write_bytes(data.replace(shape, struct.pack("<5i", 4, 1000, 6, 6, 8)))
    said = "larger.tflite: the runtime crashed running it; is the file damaged or cut off?\n"
    (folder / "in").write_bytes(bytes(4 * 1000 * 6 * 6 * 8))
    for words in (["--graph=model.tflite"], ["--task=memory"], ["--task=outputs", "--inputs=in", "--result=out"]):
        done = run(folder, *words, "larger.tflite", *QUICK)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", said), words
    # What C++ throws and nobody catches ends in abort.
    assert data[126] == 4
    (folder / "thrown.tflite").write_bytes(data[:126] + b"\x96" + data[127:])
    done = run(folder, "thrown.tflite")
    said = "thrown.tflite: the runtime crashed loading it; is the file damaged or cut off?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_what_was_gathered_by_hand_is_judged_here(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    done = run(folder, "--graph=a=model.onnx", "--graph=b=model.tflite", *QUICK)
    (folder / "gathered.json").write_text(done.stdout)
    capsys.readouterr()
    code = main(["bench", "model.tflite", "model.onnx", "--gathered", "gathered.json", "--json"])
    ((first, second),) = (comparison["reports"] for comparison in json.loads(capsys.readouterr().out))
    assert (code == 6) is bool(first["not_valid"])  # this machine may be too busy for a valid run
    assert (first["label"], second["label"], first["target"]) == ("model.tflite", "model.onnx", "device")
    text = json.loads(done.stdout)
    text["after"] |= {"sys/devices/platform/soc/soc:firmware/get_throttled": "4\n"}
    (folder / "gathered.json").write_text(json.dumps(text))
    assert main(["bench", "model.onnx", "model.tflite", "--gathered", "gathered.json"]) == 6
    assert "throttled: the board's firmware reports throttled" in capsys.readouterr().err
    assert main(["inspect", "gathered.json"]) == 2
    assert "edgecomp bench MODEL --gathered gathered.json shows it" in capsys.readouterr().err
    for words, code, what in (
        (["model.onnx"], 2, "'b' was measured too; expected the same models"),
        (["model.onnx", "codes.onnx"], 2, "codes.onnx was not measured, or has changed since"),
        (["none.onnx"], 2, "none.onnx: cannot be read"),
        (["."], 2, ".: is a folder; expected the files that were measured, e.g. model.onnx"),
        (["model.onnx", "--target", "ssh://a"], 2, "what is gathered was measured already"),
        (["model.onnx", "--threads", "2"], 2, "it was measured already"),
        (["model.onnx", "--repeat", "2"], 2, "--profile, --cores and --repeat are for --target ssh"),
    ):
        assert main(["bench", *words, "--gathered", "gathered.json"]) == code
        said = capsys.readouterr().err
        assert what in said
        assert said.count("\n") == 1


# ---- what comes back is data -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gathered(folder: Path) -> str:
    return run(folder, "model.onnx", *QUICK, "--enable_op_profiling").stdout


NEGATIVE = json.dumps([{"cat": "Node", "name": "x_kernel_time", "dur": -5, "args": {"op_name": "Conv"}}] * 2)
FREQUENCY = "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"
ZONE = "sys/class/thermal/thermal_zone0/temp"
THROTTLED = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        (("schema",), "edgecomp-gathered/2", "schema is 'edgecomp-gathered/2', this edgecomp reads"),
        (("more",), 1, "unknown key 'more'"),
        (("threads",), 0, "threads is 0"),
        (("threads",), True, "threads is True"),
        (("models",), [], "model.onnx was not measured"),
        (("models",), 7, "models: 7 is no list"),
        (("models", 0), 7, "expected what the C runner writes"),
        (("models", 0, "sha256"), "0" * 64, "model.onnx was not measured, or has changed since"),
        (("models", 0, "more"), 1, "unknown key 'more'"),
        (("models", 0, "samples_ns"), [], "0 samples"),
        (("models", 0, "samples_ns", 0), 1.5, "samples_ns is 1.5, expected a whole number of at least 0"),
        (("models", 0, "samples_ns", 0), -5, "samples_ns is -5, expected a whole number of at least 0"),
        (("models", 0, "samples_ns", 0), True, "samples_ns is True"),
        (("models", 0, "rounds"), 7919, "samples in 7919 rounds"),
        (("models", 0, "rounds"), 0, "rounds is 0, expected a whole number of at least 1"),
        (("models", 0, "steady"), 1, "steady 1"),
        (("models", 0, "warmups"), -1, "warmups is -1"),
        (("models", 0, "runtime"), 5, "runtime is 5"),
        (("models", 0, "execution"), [], "is no object"),
        (("models", 0, "execution", "x"), {"y": 1}, "execution: 'x'"),
        (("models", 0, "memory"), [], "expected what the C runner writes"),
        (("models", 0, "bytes"), 0, "bytes is 0, expected a whole number of at least 1"),
        (("models", 0, "memory", 0, "peak_bytes"), 1e9, "memory: peak_bytes is 1000000000.0, expected a whole number"),
        (("models", 0, "memory", 0, "runtime_bytes"), -1, "memory: runtime_bytes is -1, expected a whole number of at"),
        (("models", 0, "memory", 0, "loaded_bytes"), 0, "memory: loaded_bytes is 0, expected a whole number of at le"),
        (("models", 0, "memory", 0, "model_bytes"), -(10**15), "memory: model_bytes is -1000000000000000, expected a "),
        (("models", 0, "memory", 0, "model_bytes"), 10**15, "memory: model_bytes is 1000000000000000, expected at mo"),
        (("models", 0, "memory", 0, "load_ns"), -1, "memory: load_ns is -1, expected a whole number of at least 0"),
        (("models", 0, "profile"), "{", "expected what the C runner writes"),
        (("models", 0, "profile"), "[1]", "expected what the C runner writes"),
        (("models", 0, "profile"), '[{"cat": "Node", "name": "x_kernel_time"}]', "expected what the C runner writes"),
        (("models", 0, "profile"), NEGATIVE, "layers_us: expected numbers of at least 0"),
        (("affinity",), 1, "affinity: 1 is no list"),
        (("affinity",), [], "affinity is [], expected numbers of cores, as texts"),
        (("affinity",), ["-1"], "affinity is ['-1'], expected numbers of cores, as texts"),
        (("cores",), [1], "cores is [1], expected a whole number of at least 1"),
        (("cores",), 0, "cores is 0, expected a whole number of at least 1"),
        (("machine",), 7, "machine is 7, expected a text"),
        (("kernel",), None, "kernel is None, expected a text"),
        (("files", "proc/meminfo"), "MemTotal: -4 kB\n", "files: memory_bytes is -4096, expected a number of"),
        (("files", FREQUENCY), "-600000\n", "files: frequency_mhz is -600, expected a number of at least 0"),
        (("files", "proc/loadavg"), "-0.5 0 0 1/1 1\n", "files: load_average_1min is -0.5, expected a number"),
        (("files", "proc/loadavg"), "nan 0 0 1/1 1\n", "files: load_average_1min is nan, expected a number"),
        (("before", FREQUENCY), "-1\n", "before: frequency_mhz is -0.001, expected a number of at least 0"),
        (("after", ZONE), "-273151\n", "after: temperature_c is -273.151, expected a number of at least -273.15"),
        (("after", THROTTLE_FLAGS), "-4\n", "after: throttle_flags is -4, expected a number of at least 0"),
        (("after", THROTTLED), "-4\n", "after: throttle_count is -4, expected a number of at least 0"),
        (("after", "proc/vmstat"), "pswpin -3\npswpout 2\n", "after: swapped_pages is -1, expected a number of"),
        (("files", "../../outside"), "x", "a file '../../outside'"),
        (("files", "sys/class/thermal/thermal_zone/../x/temp"), "1", "a file 'sys/class/thermal"),
        (("before", "usr/bin/vcgencmd"), "#!/bin/sh", "a file 'usr/bin/vcgencmd'"),
        (("before", "proc/vmstat"), 5, "expected what the C runner writes"),
        (("before", "proc/vmstat"), "\u20ac", "expected what the C runner writes"),
        (("after",), None, "is no object"),
    ],
)
def test_what_is_no_gathered_run(place, value, what, gathered, models, tmp_path, monkeypatch):
    # A name that leads out of the temporary folder would, were it taken, lead into this one.
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    changed = json.loads(gathered)
    at = changed
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    with pytest.raises(BundleError, match=re.escape(what)) as caught:
        judged(json.dumps(changed), models, "model.onnx")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["temporary"]
    assert not os.listdir(tmp_path / "temporary")


def test_text_that_is_no_gathered_run(gathered, models):
    report: BenchReport = judged(gathered, models, "model.onnx").reports[0]
    assert report.layers_us
    for text in ("", "[]", "{}", gathered[:-3], gathered.replace('"threads"', '"threads": 1, "threads"', 1),
                 gathered.replace("1,", "NaN,", 1)):  # fmt: skip
        with pytest.raises(BundleError, match="gathered: "):
            judged(text, models, "model.onnx")


def test_what_is_sent_is_in_the_wheel():
    assert set(native.sources()) >= {"edgecomp_runner.c", "edgecomp_shared.h"}
    assert sys.version_info >= tuple(map(int, native._PYTHON.split(".")))
