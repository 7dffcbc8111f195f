"""Everything public is explained; every error is raised, tested, and has an exit code."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import edgecomp
from edgecomp import cli, errors
from tests.test_architecture import ROOT, modules, tree

ERRORS = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind)}


def undocumented(node: ast.AST, place: str) -> list[str]:
    """List public modules, classes, functions and methods without a docstring."""
    missing = []
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or child.name.startswith("_"):
            continue
        name = f"{place}.{child.name}"
        if ast.get_docstring(child) is None:
            missing.append(f"{name}:{child.lineno}")
        if isinstance(child, ast.ClassDef):
            missing += undocumented(child, name)
    return missing


@pytest.mark.parametrize("name", sorted(modules()))
def test_everything_public_has_a_docstring(name: str) -> None:
    path = modules()[name]
    assert ast.get_docstring(tree(path)), f"{path}: the module has none"
    assert undocumented(tree(path), name) == []


def test_all_lists_what_is_there() -> None:
    for name, path in modules().items():
        for node in tree(path).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                listed = ast.literal_eval(node.value)
                imports = [n for n in tree(path).body if isinstance(n, (ast.Import, ast.ImportFrom))]
                top = {alias.asname or alias.name for n in imports for alias in n.names}
                top |= {n.name for n in tree(path).body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
                top |= {ast.unparse(t) for n in tree(path).body if isinstance(n, ast.Assign) for t in n.targets}
                top |= {ast.unparse(n.target) for n in tree(path).body if isinstance(n, ast.AnnAssign)}
                assert set(listed) <= top, name
                assert len(set(listed)) == len(listed), name


def test_the_version_is_the_package_s() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert edgecomp.__version__ == project["version"]


def raised() -> set[str]:
    """Name every class that the library raises."""
    names = set()
    for path in modules().values():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                names.add(ast.unparse(node.exc.func).rpartition(".")[2])
    return names


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_every_error_is_raised_and_tested(name: str) -> None:
    kinds = {other for other, kind in ERRORS.items() if issubclass(kind, ERRORS[name])}
    assert kinds & raised(), f"nothing raises {name}"
    here = Path(__file__).name
    texts = [p.read_text("utf-8") for p in (ROOT / "tests").glob("test_*.py") if p.name != here]
    assert any(kind in text for text in texts for kind in kinds), f"no test mentions {name}"


def test_errors_are_ours_and_drawn_in_the_tree() -> None:
    drawing = inspect.getdoc(errors) or ""
    for name, kind in ERRORS.items():
        assert issubclass(kind, errors.EdgecompError)
        assert kind.__doc__
        depth = len(kind.__mro__) - len(errors.EdgecompError.__mro__)
        assert f"\n{'  ' * (depth + 2)}{name}" in drawing, f"{name} does not stand in the tree at its depth"


def test_only_errors_of_ours_are_raised_on_purpose() -> None:
    """What else is raised says that a caller inside the library, not a user, is wrong; the list is kept short."""
    allowed = {"KeyboardInterrupt", "SystemExit", "ArgumentTypeError", "AssertionError", "StopIteration"}
    # Raised to themselves, and mapped at their own border.
    readers = ("exporters.describe", "exporters.modelfacts", "exporters.read_onnx", "exporters.read_tflite",
               "exporters.flatbuffer", "exporters.unpack_tflite", "exporters.tflm_decode", "exporters.c_facts",
               "exporters.tflite_work", "exporters.answers", "benchmarks.tflm")
    inner = {name: {"ValueError"} for name in readers}
    of_onnx = ("protobuf", "onnx_parts", "onnx_decoders", "onnx_work")
    inner |= {f"exporters.{n}": {"ValueError", "TypeError"} for n in of_onnx}
    inner["exporters.unpack_onnx"] = {"ValueError"}
    inner["benchmarks.environment"] = {"ValueError", "OSError", "LookupError"}
    inner["files"] = {"OSError"}  # the system's own, with the path that the user gave
    inner["benchmarks.session"] = {"OSError"}  # runs on a device, and says there what it was
    for name, path in modules().items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                kind = ast.unparse(node.exc.func).rpartition(".")[2]
                # What is raised by a small letter is a function or a variable that gives an error.
                known = kind in ERRORS or not kind[:1].isupper() or kind in allowed or kind in inner.get(name, ())
                assert known or kind in own_classes(name), f"{name}:{node.lineno}: raises {kind}"


def own_classes(name: str) -> set[str]:
    """Exceptions that a module defines for itself; private ones never leave it."""
    return {n.name for n in ast.walk(tree(modules()[name])) if isinstance(n, ast.ClassDef) and n.name.startswith("_")}


# As documented in cli.py and the README.
EXPECTED_CODES = {
    "EdgecompError": 2,
    "UsageError": 2,
    "DataError": 2,
    "CaptureError": 2,
    "UnsupportedOp": 5,
    "PlanError": 2,
    "GraphError": 1,
    "BudgetError": 3,
    "ParityError": 4,
    "ExportError": 5,
    "TargetError": 6,
    "BundleError": 2,
}


def test_every_error_has_its_exit_code() -> None:
    found = {
        name: next(code for kind, code in cli.EXIT_CODES if issubclass(error, kind)) for name, error in ERRORS.items()
    }
    assert found == EXPECTED_CODES


def test_no_row_of_exit_codes_is_hidden_by_one_before_it() -> None:
    kinds = [kind for kind, _ in cli.EXIT_CODES]
    for i, kind in enumerate(kinds):
        assert not any(issubclass(kind, before) for before in kinds[:i]), kind.__name__
    assert kinds[-1] is errors.EdgecompError
