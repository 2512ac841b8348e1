"""The few collective operations that training and evaluation need; the identity in one process."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, distributed

from bevperception.errors import BevError

T = TypeVar("T")


def world_size() -> int:
    """Number of processes that work together; 1 when torch.distributed is not in use."""
    return distributed.get_world_size() if _in_use() else 1


def rank() -> int:
    """Number of this process among them, from 0."""
    return distributed.get_rank() if _in_use() else 0


def mean_over_processes(value: Tensor) -> Tensor:
    """Element-wise mean of a tensor over all processes, without a gradient.

    Args:
        value: any shape, the same in every process.

    Returns:
        The same shape; every process gets the same values, so decisions taken on it agree.
    """
    if world_size() == 1:
        return value
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total / world_size()


def gather_objects(value: T) -> list[T]:
    """One picklable object of every process, in order of rank, in every process."""
    if world_size() == 1:
        return [value]
    gathered: list[T | None] = [None] * world_size()
    distributed.all_gather_object(gathered, value)
    return gathered  # type: ignore[return-value]


def first_error(error: BevError | None, device: torch.device) -> BevError | None:
    """What the first process that met an error met; None if none did. Every process gets the same.

    So that all of them stop together, instead of one stopping and the others waiting for it.

    Args:
        error: of this process.
        device: where small tensors of this process are exchanged.
    """
    if world_size() == 1:
        return error
    met = mean_over_processes(torch.tensor(float(error is not None), device=device))
    if met.item() == 0.0:
        return None
    return next(found for found in gather_objects(error) if found is not None)


@contextlib.contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Let an error that one process meets in a block end all of them, at the end of the block.

    All processes run the block, in which they must not wait for each other.

    Args:
        device: see :func:`first_error`.

    Raises:
        BevError: in every process, what the first of them met.
    """
    error: BevError | None = None
    try:
        yield
    except BevError as met:
        error = met
    error = first_error(error, device)
    if error is not None:
        raise error


def is_first_process() -> bool:
    """Whether this process speaks to the user; known before torch.distributed starts, too."""
    if _in_use():
        return rank() == 0
    return all(int(os.environ.get(name, "0") or 0) == 0 for name in ("RANK", "NODE_RANK", "LOCAL_RANK"))


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        # An all-reduce instead of distributed.barrier(): it needs no device ids under NCCL.
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        distributed.all_reduce(torch.zeros(1, device=device))


def leave_at_exit() -> None:
    """Let this process leave its group before the interpreter ends.

    Lightning does that for NCCL alone. Threads of gloo that are still there when the interpreter takes itself
    apart have aborted a program that had done all its work.
    """
    atexit.register(_leave)


def _leave() -> None:
    if _in_use():
        distributed.destroy_process_group()


def _in_use() -> bool:
    return distributed.is_available() and distributed.is_initialized()
