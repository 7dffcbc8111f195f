"""The table of methods: ours and the peers', each as one function from context, bits and seed to what it made."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from edgecomp import __version__
from edgecomp.errors import TargetError, UsageError

from .context import Context
from .ours import OURS, Ours
from .peers import PEERS, environment_python, run_peer
from .results import Compressed, Simulated, Task
from .table import FLOAT

Made = Compressed | Simulated


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a method may write.

    Attributes:
        peers: the folder of environments, or None.
        work: what peers are handed lies here; removed after the run.
        log: of this task.
    """

    peers: Path | None
    work: Path
    log: Path


Run = Callable[[Context, Task, Place], Made]


class Asks(StrEnum):
    """What a method can be asked for."""

    BITS = "bits"
    """Any mean width."""
    WHOLE_BITS = "whole bits"
    NOTHING = "nothing"
    """It has a size of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to compress.

    Attributes:
        name: unique.
        asks: which budgets it can be given.
        peers: environments that must be there.
        run: does it.
        seeded: False where every seed gives the same.
    """

    name: str
    asks: Asks
    peers: tuple[str, ...] = ()
    run: Run
    seeded: bool = True

    def tasks(self, bits: Sequence[float], seeds: Sequence[int]) -> list[Task]:
        """List what is to be done for these budgets and seeds; what needs no seed is done once, as seed 0."""
        settings: Sequence[float | None] = [None]
        if self.asks is not Asks.NOTHING:
            settings = [b for b in bits if self.asks is Asks.BITS or b == int(b)]
        return [Task(method=self.name, bits=b, seed=s) for s in (seeds if self.seeded else (0,)) for b in settings]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One peer's part in a method.

    Attributes:
        peer: its name.
        options: that its script reads.
    """

    peer: str
    options: Mapping[str, Any] = field(default_factory=dict)


def _float(context: Context, task: Task, place: Place) -> Made:
    return Compressed(file=context.float_file, versions={"edgecomp": __version__})


def _ours(function: Ours) -> Run:
    def run(context: Context, task: Task, place: Place) -> Made:
        assert task.bits is not None
        made = function(context, task.bits, task.seed)
        return Compressed(file=made.file, details=made.details, versions={"edgecomp": __version__, **made.versions})

    return run


def _by_peers(*steps: Step) -> Run:
    """Run peers one after the other, each on the file that the one before wrote."""

    def run(context: Context, task: Task, place: Place) -> Made:
        details: dict[str, Any] = {}
        versions: dict[str, str] = {}
        made: Made | None = None
        folder = place.work / task.name()
        place.log.unlink(missing_ok=True)
        try:
            for number, step in enumerate(steps):
                peer = PEERS[step.peer]
                own = folder / str(number)
                own.mkdir(parents=True, exist_ok=True)
                job = context.hand_over(place.work, task.seed, takes_module=peer.takes_module)
                # 8 bits is what a method without a budget has, and what a second step brings a pruned file to.
                job |= {"bits": task.bits or 8, "options": dict(step.options), "folder": str(own)}
                if isinstance(made, Compressed):
                    job["onnx"] = str(folder / str(number - 1) / "model.onnx")
                answer = run_peer(environment_python(place.peers, peer), peer, job, place.log)
                details |= answer["details"]
                versions |= answer["versions"]
                made = _made(own, answer, details, versions)
        except (KeyError, TypeError) as error:
            raise TargetError(f"{task.name()}: the answer lacks {error}; its output is in {place.log}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        assert made is not None
        return made

    return run


def _made(folder: Path, answer: Mapping[str, Any], details: Mapping[str, Any], versions: Mapping[str, str]) -> Made:
    if "logits" in answer:
        logits = np.load(folder / answer["logits"], allow_pickle=False)
        return Simulated(n_bytes=int(answer["n_bytes"]), logits=logits, details=details, versions=versions)
    return Compressed(file=(folder / answer["file"]).read_bytes(), details=details, versions=versions)


_ORT = Step(peer="ort", options={"calibrate": "MinMax"})
_PEER_METHODS: tuple[tuple[str, Asks, tuple[Step, ...]], ...] = (
    ("ort-int8", Asks.NOTHING, (_ORT,)),
    ("nncf-int8", Asks.NOTHING, (Step(peer="nncf"),)),
    ("mct", Asks.BITS, (Step(peer="mct", options={"epochs": 0}),)),
    ("mct-gptq", Asks.BITS, (Step(peer="mct", options={"epochs": 10}),)),
    (
        "torch-pruning-magnitude",
        Asks.BITS,
        (Step(peer="torch_pruning", options={"importance": "magnitude"}), _ORT),
    ),
    ("torch-pruning-taylor", Asks.BITS, (Step(peer="torch_pruning", options={"importance": "taylor"}), _ORT)),
)
_WHOLE = ("uniform", "uniform-nearest")

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(name=FLOAT, asks=Asks.NOTHING, run=_float, seeded=False),
        *(
            Method(name=name, asks=Asks.WHOLE_BITS if name in _WHOLE else Asks.BITS, run=_ours(function))
            for name, function in OURS.items()
        ),
        *(
            Method(name=name, asks=asks, peers=tuple(dict.fromkeys(s.peer for s in steps)), run=_by_peers(*steps))
            for name, asks, steps in _PEER_METHODS
        ),
    )
}
"""In the order of the table's rows."""


def chosen(names: Sequence[str], methods: Mapping[str, Method] = METHODS) -> list[Method]:
    """Give the methods of these names in the table's order; the float network is always one of them.

    Raises:
        UsageError: there is none of that name.
    """
    for name in names:
        if name not in methods:
            raise UsageError(f"method {name!r:.80} is not known; expected some of {', '.join(methods)}")
    return [method for name, method in methods.items() if name in names or name == FLOAT]
