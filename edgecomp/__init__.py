"""edgecomp puts trained CNNs on devices that are too small for them."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

# In a checkout, exporters/, benchmarks/ and targets/ lie beside this folder; the wheel maps them inside it
# (pyproject.toml). Look beside us too, in a checkout only.
_ROOT = Path(__file__).parents[1]
if (_ROOT / "exporters" / "to_onnx.py").is_file():
    __path__.append(str(_ROOT))
