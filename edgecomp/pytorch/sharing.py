"""Work shared out among the processes of a torch.distributed group; in a single process, nothing is changed.

`torchrun` starts the processes and tells them of each other. Each takes every n-th batch, and what they found is added
up at the end: on the CPU with gloo; in an nccl group, through each process's current GPU.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_distributed: Any = torch.distributed  # it carries no types


def join() -> None:
    """Belong to torchrun's process group from now until the process ends; do nothing without torchrun, or in a group.

    The group is a gloo one, because scoring and calibrating run on the CPU; a group of the caller's own may be nccl.
    """
    started = _distributed.is_available() and _distributed.is_torchelastic_launched()
    # Left once, at the end: a second group of the same processes would meet the first one's keys in torchrun's store.
    if started and not _distributed.is_initialized():
        _distributed.init_process_group("gloo")
        atexit.register(_leave)


def _leave() -> None:
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


def all_sum(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor's contents by the sum over all processes, in float64; every process brings the same ones."""
    _reduce(tensors, "SUM")


def all_max(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor's contents by the largest over all processes, element by element."""
    _reduce(tensors, "MAX")


def _reduce(tensors: Iterable[Tensor], how: str) -> None:
    if place()[1] == 1:
        return
    device = "cuda" if _distributed.get_backend() == "nccl" else "cpu"
    for tensor in tensors:
        whole = tensor.to(device, torch.float64)
        _distributed.all_reduce(whole, op=getattr(_distributed.ReduceOp, how))
        tensor.copy_(whole)
