"""Read a `.pt2` archive of torch.export without running anything that it brings along.

`torch.export.load` trusts its file: tensors may be stored as pickles, sample inputs that the restricted unpickler
refuses go to the unrestricted one, an archive may hold compiled libraries, sizes are evaluated as sympy expressions,
and names end up in Python source that is then executed. So the archive is looked through first, and refused when it
holds more than plain tensors, plain names and ATen operators.
"""

from __future__ import annotations

import io
import json
import keyword
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveReader
from torch.export.pt2_archive._package import load_pt2

from edgecomp.errors import CaptureError

_MODEL = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_TENSOR_FILE = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
# What torch.export.save writes beside those; none of it is interpreted.
_BOOKKEEPING = {"archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id"}
# Operators on tensors, but those on files; and the arithmetic of dynamic sizes.
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!from_file|save|load)\w+\.\w+|_operator\.(getitem|add|sub|mul|floordiv|eq|ne|lt|le|gt|ge)"
)
_PLAIN = re.compile(r"[\w.:+ -]*")
# A dynamic size, e.g. Symbol('s77', positive=True, integer=True), or a sum or product of such.
_SIZE = re.compile(r"(Symbol|Integer|Mul|Add|positive|integer|nonnegative|True|'[su]\d+'|-?\d{1,9}|[(),= ])*+")
_TREE_TYPES = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None}
# Free text that torch keeps for people.
_METADATA = {"stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom", "from_node"}


def load_pt2_archive(path: Path) -> ExportedProgram:
    """Load the exported program of a `.pt2` file.

    Raises:
        CaptureError: the file cannot be read, is no such archive, or holds what could run code.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CaptureError(f"{path}: cannot be read ({error.strerror}); expected a .pt2 archive") from error
    archives = logging.getLogger("torch.export.pt2_archive")
    level = archives.level
    archives.setLevel(logging.CRITICAL)
    try:
        _look_through(path, content)
        # The very bytes that were looked through, by torch's own reader both times.
        return load_pt2(io.BytesIO(content)).exported_programs["model"]
    except CaptureError:
        raise
    except Exception as error:  # torch raises all kinds on a damaged archive
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise CaptureError(
            f"{path}: not a .pt2 archive that torch {torch.__version__} reads ({type(error).__name__}: {reason}); "
            "save it again with torch.export.save"
        ) from error
    finally:
        archives.setLevel(level)


def _look_through(path: Path, content: bytes) -> None:
    def refuse(found: str) -> CaptureError:
        return CaptureError(
            f"{path}: {found}, and loading that could run code; "
            "save it again with torch.export.save from plain tensors, or use package.module:factory with --weights"
        )

    archive = PT2ArchiveReader(io.BytesIO(content))
    for name in archive.get_file_names():
        expected = name in (_MODEL, _SAMPLES, *_CONFIGS) or name in _BOOKKEEPING or name.startswith("extra/")
        if not expected and not _TENSOR_FILE.fullmatch(name):
            raise refuse(f"holds {name!r}, which is neither a tensor nor part of the program")
    for config in _CONFIGS:
        for key, entry in json.loads(archive.read_string(config))["config"].items():
            if entry["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
                raise refuse(f"stores {key!r} as a pickle")
            for text in _strings(entry):
                if not _PLAIN.fullmatch(text):
                    raise refuse(f"describes {key!r} by {text[:40]!r}")
    samples = archive.read_bytes(_SAMPLES)
    if samples:
        try:
            torch.load(io.BytesIO(samples), weights_only=True)
        except Exception as error:
            raise refuse("holds sample inputs that are no plain tensors") from error
    program = json.loads(archive.read_string(_MODEL))
    if program.get("guards_code"):
        raise refuse("holds Python source (guards_code)")
    for problem in _problems(program):
        raise refuse(problem)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _problems(value: Any, key: str = "") -> Iterator[str]:
    """Find every string in the program that is not of the plain kind that its place allows."""
    if key in ("in_spec", "out_spec") and isinstance(value, str):
        yield from _tree_problems(json.loads(value))
    elif isinstance(value, str):
        if not _allowed(value, key):
            yield f"its program has {value[:60]!r} as {key or 'an item'}"
    elif isinstance(value, list):
        for item in value:
            yield from _problems(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            if key == "metadata" and name in _METADATA and isinstance(item, str):
                continue
            if name in ("as_graph", "as_operator", "as_custom_obj", "custom_obj"):
                yield f"its program uses {name}"
            elif not _PLAIN.fullmatch(name):
                yield f"its program has {name[:60]!r} as a name"
            else:
                yield from _problems(item, name)


def _allowed(text: str, key: str) -> bool:
    if key == "target":
        return _OPERATOR.fullmatch(text) is not None
    if key == "expr_str":
        return len(text) < 1000 and _SIZE.fullmatch(text) is not None
    if key == "as_string":
        return True  # an argument of an operator; torch quotes it
    if key in ("name", "as_name", "forward_arg_names"):
        return text == "" or (text.isidentifier() and not keyword.iskeyword(text))
    return _PLAIN.fullmatch(text) is not None


def _tree_problems(value: Any) -> Iterator[str]:
    """Check how inputs and outputs are nested: built-in containers only, for others are imported by name."""
    if isinstance(value, list):
        for item in value:
            yield from _tree_problems(item)
    elif isinstance(value, dict):
        if value.get("type") not in _TREE_TYPES:
            yield f"its inputs or outputs are nested in {str(value.get('type'))[:60]!r}"
        elif any(not re.fullmatch(r"[\w-]*", text) for text in _strings(json.loads(value.get("context") or "null"))):
            yield f"its inputs or outputs are named {str(value['context'])[:60]!r}"
        else:
            yield from _tree_problems(value.get("children_spec", []))
