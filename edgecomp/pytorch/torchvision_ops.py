"""Let torchvision be imported beside a CPU-only torch.

torchvision's wheel on PyPI is built for CUDA. Beside a torch without CUDA its compiled half cannot be loaded, and
`import torchvision` then stops with "operator torchvision::nms does not exist", though the classification models that
edgecomp takes in never call that operator. Declaring the operators' schemas beforehand is enough.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_torch: Any = torch  # these parts of torch carry no types
_declared: list[Any] = []  # torch forgets the schemas when their Library is collected


def define_missing_operators() -> None:
    """Declare those operators that `import torchvision` looks up and does not have; call it before that import.

    Does nothing where torchvision's compiled half loads, where torchvision is missing, and on a second call.
    """
    if _missing():
        _load_compiled_half()
    missing = _missing()
    if missing and importlib.util.find_spec("torchvision") is not None:
        library = _torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(_SCHEMAS[name])
        _declared.append(library)


def _missing() -> list[str]:
    return [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]


def _load_compiled_half() -> None:
    """Load torchvision's own operators, as its import will: a schema declared twice would be an error."""
    spec = importlib.util.find_spec("torchvision")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted((*Path(folder).glob("_C*.so"), *Path(folder).glob("_C*.pyd"))):
            try:
                _torch.ops.load_library(path)
            except OSError:
                continue  # made for another torch: the very case this file is for
