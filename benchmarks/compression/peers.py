"""Other tools, each in a virtual environment of its own, made from a file of pinned versions and run as a process.

Their dependencies contradict each other's and ours, and none of them is a dependency of edgecomp.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecomp.errors import TargetError, UsageError
from edgecomp.files import write_file

COMMAND = "python -m edgecomp.benchmarks.compression"
READY = "edgecomp-ready.json"
_HERE = Path(__file__).parent
_PINNED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+_-]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A tool beside which edgecomp is measured.

    Attributes:
        name: of its environment; its script and its versions lie beside this file as peer_NAME.py and peer_NAME.txt.
        packages: whose versions are recorded, the tool itself first.
        takes_module: it wants the torch module; else it takes the ONNX file.
    """

    name: str
    packages: tuple[str, ...]
    takes_module: bool

    def script(self) -> Path:
        """Give the script that runs in its environment."""
        return _HERE / f"peer_{self.name}.py"

    def requirements(self) -> str:
        """Give the text of its pinned versions."""
        return (_HERE / f"peer_{self.name}.txt").read_text("utf-8")


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(name="ort", packages=("onnxruntime", "onnx"), takes_module=False),
        Peer(name="nncf", packages=("nncf", "onnxruntime", "onnx"), takes_module=False),
        Peer(name="mct", packages=("model_compression_toolkit", "torch"), takes_module=True),
        Peer(name="torch_pruning", packages=("torch-pruning", "torch", "onnx"), takes_module=True),
    )
}


def peer(name: str) -> Peer:
    """Find a peer by its name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in PEERS:
        raise UsageError(f"peer {name!r:.80} is not known; expected {', '.join(PEERS)}")
    return PEERS[name]


def pinned(text: str, where: str) -> dict[str, str]:
    """Read a file of requirements: package -> version.

    Raises:
        UsageError: a line does not pin one version of one package, or a package stands twice.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = _PINNED.fullmatch(line)
        if match is None:
            raise UsageError(f"{where}:{number}: found {line!r:.80}, expected PACKAGE==VERSION")
        name = re.sub(r"[-_.]+", "-", match[1]).lower()
        if name in found:
            raise UsageError(f"{where}:{number}: {name} stands twice; keep one line")
        found[name] = match[2]
    return found


# ---- environments ----------------------------------------------------------------------------------------------------


def make_environment(folder: Path, which: Peer) -> Path:
    """Make a peer's environment with pip, unless it is there and up to date: its python.

    Args:
        folder: of all environments; made when missing.
        which: the peer.

    Raises:
        TargetError: venv or pip fails; what they say goes to this process's own output.
        UsageError: the peer's requirements are not pinned.
        OSError: as the system reports it.
    """
    text = which.requirements()
    pinned(text, f"peer_{which.name}.txt")
    home = folder / which.name
    if _state(home, text) is None:
        return _python(home)
    home.mkdir(parents=True, exist_ok=True)
    (home / READY).unlink(missing_ok=True)
    listed = _HERE / f"peer_{which.name}.txt"
    for step in (
        [sys.executable, "-m", "venv", "--clear", str(home)],
        [str(_python(home)), "-I", "-m", "pip", "install", "--disable-pip-version-check", "--requirement", str(listed)],
    ):
        try:
            code = subprocess.run(step, stdout=sys.stderr, stdin=subprocess.DEVNULL, check=False).returncode
        except OSError as error:
            raise TargetError(f"{which.name}: cannot start {step[0]}: {error.strerror}") from error
        if code:
            raise TargetError(f"{which.name}: {' '.join(step[1:5])} ended with code {code}; its own output says why")
    write_file(home / READY, json.dumps({"requirements_sha256": _digest(text)}).encode())
    return _python(home)


def environment_python(folder: Path | None, which: Peer) -> Path:
    """Find the python of a peer's environment.

    Raises:
        TargetError: it is missing or out of date; the message says how to make it.
    """
    if folder is None:
        raise TargetError(f"{which.name}: runs in an environment of its own; name their folder with --peers DIR")
    home = folder / which.name
    if (found := _state(home, which.requirements())) is not None:
        make = f"{COMMAND} --peers {folder} --make-peers {which.name}"
        raise TargetError(f"{which.name}: {found} in {home}; make it with: {make}")
    return _python(home)


def _state(home: Path, requirements: str) -> str | None:
    """Say what is wrong with an environment; None when it can be used."""
    try:
        record = json.loads((home / READY).read_text("utf-8"))
    except (OSError, ValueError):
        return "no environment"
    if not isinstance(record, dict) or record.get("requirements_sha256") != _digest(requirements):
        return "an environment of other versions"
    return None if _python(home).exists() else "no python"


def _python(home: Path) -> Path:
    return (home / "bin" / "python").absolute()  # not resolved: the link's place is what makes it an environment


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---- runs ------------------------------------------------------------------------------------------------------------


def run_peer(python: Path, which: Peer, job: Mapping[str, Any], log: Path) -> dict[str, Any]:
    """Run a peer on a job and give what it wrote: "versions", and the keys that its script documents.

    Args:
        python: of its environment.
        which: the peer.
        job: what `peer_entry.Job` reads, without "script" and "packages"; its "folder" exists.
        log: where all output of the process is kept.

    Raises:
        TargetError: the process cannot be started, fails, or leaves no result.
    """
    folder = Path(job["folder"])
    record = {**job, "script": str(which.script().absolute()), "packages": list(which.packages)}
    file = folder / f"job-{which.name}.json"
    file.write_text(json.dumps(record, indent=1), "utf-8")
    (folder / "result.json").unlink(missing_ok=True)
    # -I: neither this process's PYTHONPATH nor the current folder may put our packages before the peer's.
    command = [str(python), "-I", str((_HERE / "peer_entry.py").absolute()), str(file.absolute())]
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("ab") as stream:
            done = subprocess.run(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, check=False
            )
    except OSError as error:
        raise TargetError(f"{which.name}: cannot start {python}: {error.strerror}") from error
    if done.returncode:
        lines = log.read_text("utf-8", errors="replace").strip().splitlines() or ["no message"]
        raise TargetError(f"{which.name}: ended with code {done.returncode}: {lines[-1][:200]}; all of it is in {log}")
    try:
        result = json.loads((folder / "result.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TargetError(f"{which.name}: left no result; its output is in {log}") from error
    assert isinstance(result, dict)
    return result
