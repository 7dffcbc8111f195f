"""`python -m edgecomp.benchmarks.compression`: compare methods on one checkpoint, or make the peers' environments.

Exit codes are those of `edgecomp`; 6 also where some method failed and the others stand in the table.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from edgecomp import cli
from edgecomp.errors import EdgecompError, UsageError
from edgecomp.preprocessing import Preprocessing

from .context import Context, Subject
from .driver import compare
from .methods import METHODS, chosen
from .peers import COMMAND, PEERS, make_environment, peer
from .results import Task

FAILED = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        with _terminated_as_interrupted():
            return _make(args) if args.make_peers is not None else _compare(args)
    except EdgecompError as error:
        print(f"{COMMAND}: {' '.join(str(error).split())}", file=sys.stderr)
        return next(code for kind, code in cli.EXIT_CODES if isinstance(error, kind))
    except KeyboardInterrupt:
        print(f"{COMMAND}: interrupted; the same command goes on where it was", file=sys.stderr)
        return cli.INTERRUPTED
    except OSError as error:
        print(f"{COMMAND}: {error.filename or args.output}: {error.strerror or error}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C: a peer that is running is ended too, and temporary files are removed."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # only the main thread may set handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog=COMMAND, description="Compare methods of compression on one checkpoint.")
    p.add_argument("--model", metavar="MODEL", help="torchvision:NAME or package.module:factory")
    p.add_argument("--weights", type=Path, metavar="FILE", help="safetensors, or a state_dict saved by torch")
    p.add_argument("--data", metavar="D", help="as of edgecomp build")
    p.add_argument("--mean", type=_numbers, metavar="M", help="per channel, of pixels / 255; default 0")
    p.add_argument("--std", type=_numbers, metavar="S", help="per channel, of pixels / 255; default 1")
    p.add_argument("--resize", type=int, metavar="N", help="shorter side to N, then the centre N x N")
    p.add_argument("--pad", type=int, metavar="N", help="black pixels on each side, before normalisation")
    p.add_argument("--calib", type=int, default=512, metavar="N", help="training images to look at (default 512)")
    p.add_argument("--methods", nargs="+", default=[], metavar="NAME", help=f"some of: {', '.join(METHODS)}")
    p.add_argument("--bits", nargs="+", type=float, default=[4.0], metavar="X", help="mean bits a weight, 0.1 to 8")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default 0 1 2")
    p.add_argument("--again", nargs="+", default=[], metavar="NAME", help="forget earlier results of these methods")
    p.add_argument("--keep-files", action="store_true", help="keep every ONNX file in DIR/files")
    p.add_argument("--peers", type=Path, metavar="DIR", help="folder of the peers' environments")
    p.add_argument("--make-peers", nargs="*", metavar="NAME", help=f"only make environments: {', '.join(PEERS)}")
    p.add_argument("-o", "--output", type=Path, metavar="DIR", help="results; a second run goes on where one was")
    return p


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _preprocessing(args: argparse.Namespace) -> Preprocessing:
    return Preprocessing(
        mean=args.mean or (0.0,) * len(args.std or (1.0,)),
        std=args.std or (1.0,) * len(args.mean or (0.0,)),
        resize=args.resize,
        pad=args.pad or 0,
    )


def _make(args: argparse.Namespace) -> int:
    if args.peers is None:
        raise UsageError("--make-peers needs --peers DIR, the folder to make environments in")
    for which in [peer(name) for name in args.make_peers or PEERS]:
        print(f"{which.name}: {make_environment(args.peers, which)}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    for name in ("model", "weights", "data", "output"):
        if getattr(args, name) is None:
            raise UsageError(f"--{name} is missing; see {COMMAND} --help")
    context = Context(
        Subject(
            model=args.model,
            weights=args.weights,
            data=args.data,
            preprocessing=_preprocessing(args),
            n_calibration=args.calib,
        )
    )
    methods = chosen([*args.methods, *args.again])
    with _Bar() as bar:
        compared = compare(
            context,
            methods,
            bits=args.bits,
            seeds=args.seeds,
            folder=args.output,
            order=tuple(METHODS),
            peers=args.peers,
            again=args.again,
            keep_files=args.keep_files,
            began=bar.began,
        )
    print(compared.table, end="")
    for failure in compared.failures:
        print(f"{COMMAND}: {failure.task.name()}: {' '.join(failure.reason.split())}", file=sys.stderr)
    return FAILED if compared.failures else 0


class _Bar:
    """Shows which task is running and the time left, on a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def began(self, task: Task, number: int, count: int) -> None:
        """Show that a task begins."""
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=count, file=sys.stderr, disable=None)
        self._bar.set_description(task.name())
        self._bar.update(number - self._bar.n)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


if __name__ == "__main__":
    raise SystemExit(main())
