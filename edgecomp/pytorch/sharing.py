"""Work shared out among the processes of a torch.distributed group; in a single process, nothing is changed.

`torchrun` starts the processes and tells them of each other. Each takes every n-th batch, and what they found is added
up at the end: on the CPU with gloo; in an nccl group, through each process's current GPU. What is not shared out is
done by the first alone (`by_first`), and what one of them cannot do ends in all (`together`).
"""

from __future__ import annotations

import atexit
import contextlib
import copyreg
import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import cache
from itertools import islice
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from edgecomp import launched
from edgecomp.errors import EdgecompError, TargetError

T = TypeVar("T")
_distributed: Any = torch.distributed  # it carries no types

_PATIENCE = timedelta(days=30)
"""The others wait as long as the first works; one that ends is noticed at once, by its closed connection."""
_LEAVING = timedelta(seconds=5)
"""How long the others let the first say why it ends: when one ends with an error, torchrun ends the rest."""
_LEFT = "edgecomp: the first process leaves"


def join() -> None:
    """Belong to torchrun's process group from now until the process ends; do nothing without torchrun, or in a group.

    The group is a gloo one, because scoring and calibrating run on the CPU; a group of the caller's own may be nccl.
    Where there are GPUs, each process on a machine gets one for fine-tuning.
    """
    started = _distributed.is_available() and _distributed.is_torchelastic_launched()
    # Left once, at the end: a second group of the same processes would meet the first one's keys in torchrun's store.
    if started and not _distributed.is_initialized():
        store, rank, n = next(_distributed.rendezvous("env://"))
        _distributed.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=_PATIENCE)
        if torch.cuda.is_available():
            torch.cuda.set_device(launched.place_on_machine() % torch.cuda.device_count())
        atexit.register(_leave, store, rank)


def _leave(store: Any, rank: int) -> None:
    with contextlib.suppress(RuntimeError):  # the store may be gone, and the first never get here
        if rank == 0:
            store.set(_LEFT, "")
        else:
            store.wait([_LEFT], _LEAVING)
    # Groups have threads, which must end before Python does: nothing may hold one any more.
    _talk.cache_clear()
    if _distributed.is_initialized():
        _distributed.destroy_process_group()


def place() -> tuple[int, int]:
    """Give this process's number and how many there are; (0, 1) without a group."""
    if not (_distributed.is_available() and _distributed.is_initialized()):
        return 0, 1
    return _distributed.get_rank(), _distributed.get_world_size()


def shard(batches: Iterable[T]) -> Iterable[T]:
    """Give this process's share: every n-th batch, beginning with its own number; all of them without a group."""
    rank, n = place()
    if n == 1:
        return batches
    # A list is not walked through, only its share is touched.
    return batches[rank::n] if isinstance(batches, Sequence) else islice(batches, rank, None, n)


# ---- sums ------------------------------------------------------------------------------------------------------------


def all_sum(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor's contents by the sum over all processes, in float64; every process brings the same ones.

    Raises:
        TargetError: another process has ended.
    """
    _reduce(tensors, "SUM")


def all_max(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor's contents by the largest over all processes, element by element; errors as `all_sum`."""
    _reduce(tensors, "MAX")


def _reduce(tensors: Iterable[Tensor], how: str) -> None:
    if place()[1] == 1:
        return
    device = "cuda" if _distributed.get_backend() == "nccl" else "cpu"
    for tensor in tensors:
        whole = tensor.to(device, torch.float64)
        with _reaching():
            _distributed.all_reduce(whole, op=getattr(_distributed.ReduceOp, how))
        tensor.copy_(whole)


# ---- what only one does, and what all must do ------------------------------------------------------------------------


def by_first(work: Callable[[], T]) -> T:
    """Let the first process do it and hand the others what it found; where it fails, all fail alike.

    Args:
        work: what it gives can be pickled; it must not need the other processes.

    Raises:
        TargetError: the first process has ended.
        Exception: as `work`.
    """
    rank, n = place()
    if n == 1:
        return work()
    if rank == 0:
        try:
            found = work()
        except Exception as e:
            with contextlib.suppress(TargetError):  # what went wrong first is what is told
                _hand(_portable(e))
            raise
        _hand(found)
        return found
    received = _hand(None)
    if isinstance(received, Exception):
        raise received
    return received  # type: ignore[no-any-return]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Wait for all processes at the end of a block; where one fails in it, all raise the error of the first that did.

    Raises:
        TargetError: another process has ended.
        Exception: as the block.
    """
    rank, n = place()
    if n == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as e:
        own = e
    errors: list[Exception | None] = [None] * n
    with _reaching():
        _distributed.all_gather_object(errors, None if own is None else _portable(own), group=_talk(_world()))
    failed = [(number, error) for number, error in enumerate(errors) if error is not None]
    if not failed:
        return
    number, error = failed[0]
    if own is not None and number == rank:
        raise own
    raise type(error)(f"process {number}: {error}") if isinstance(error, EdgecompError) else error


def _world() -> object:
    return _distributed.group.WORLD


@cache
def _talk(world: object) -> Any:
    """Open a gloo group for what is not numbers: an nccl one moves nothing else, and none waits long by default."""
    return _distributed.new_group(backend="gloo", timeout=_PATIENCE)


def _hand(value: object) -> Any:
    """Give all processes the first one's value."""
    rank, group = place()[0], _talk(_world())
    stream = io.BytesIO()
    if rank == 0:
        _Pickler(stream).dump(value)
    content = torch.frombuffer(bytearray(stream.getvalue() or b"\0"), dtype=torch.uint8)
    length = torch.tensor([len(content)])
    with _reaching():
        _distributed.broadcast(length, src=0, group=group)
        if rank != 0:
            content = torch.empty(int(length), dtype=torch.uint8)
        _distributed.broadcast(content, src=0, group=group)
    return value if rank == 0 else pickle.loads(content.numpy().tobytes())


def _read_only(mapping: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(mapping)


class _Pickler(pickle.Pickler):
    """Knows read-only mappings, which graphs and plans hold."""

    dispatch_table = copyreg.dispatch_table | {MappingProxyType: lambda m: (_read_only, (dict(m),))}


def _portable(error: Exception) -> Exception:
    """Give an error that can be pickled and says the same."""
    try:
        copied = pickle.loads(pickle.dumps(error))
    except Exception:
        copied = None
    return error if type(copied) is type(error) else RuntimeError(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:
        raise TargetError("another process of the group has ended; what it says tells why") from e
