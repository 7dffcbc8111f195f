"""The runner as one file, an archive that Python runs: all that is needed beside numpy and a runtime."""

from __future__ import annotations

import io
import zipfile
from importlib import resources
from pathlib import Path

PACKAGES = ("edgecomp", "edgecomp.exporters", "edgecomp.benchmarks", "edgecomp.targets")
"""What is inside: their modules, not those of folders within them. Above `compress` nothing is needed on a device."""
NAME = "runner.pyz"
_MAIN = b"from edgecomp.benchmarks.device import main\n\nraise SystemExit(main())\n"


def runner_archive() -> bytes:
    """Give the archive; the same bytes for the same edgecomp."""
    files = {"__main__.py": _MAIN}
    for package in PACKAGES:
        for entry in resources.files(package).iterdir():
            if entry.is_file() and entry.name.endswith(".py"):
                files[f"{package.replace('.', '/')}/{entry.name}"] = entry.read_bytes()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name), files[name], zipfile.ZIP_DEFLATED)
    return out.getvalue()


def is_runner(file: Path) -> bool:
    """Tell whether a file is the archive, of this edgecomp or of another."""
    try:
        with zipfile.ZipFile(file) as archive:
            return {"__main__.py", "edgecomp/benchmarks/device.py"} <= {*archive.namelist()}
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False
