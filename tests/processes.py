"""Several processes' shares of a computation, one after the other in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def as_processes(shares: Sequence[Callable[[Callable[[Tensor], Tensor]], T]]) -> list[T]:
    """What each of several processes gets.

    Args:
        shares: what every process does with a function that gives a tensor's mean over all of them. All ask
            for equally many means in the same order, and no mean depends on another.
    """
    given = []
    for share in shares:
        values: list[Tensor] = []

        def note(value: Tensor, values: list[Tensor] = values) -> Tensor:
            values.append(value.detach().clone())
            return value

        share(note)
        given.append(values)
    means = [
        torch.stack(values).mean(0) for values in zip(*given, strict=True)
    ]  # else some would wait for ever
    found = []
    for share in shares:
        left = iter(means)
        found.append(share(lambda _, left=left: next(left)))  # type: ignore[misc]
        assert next(left, None) is None
    return found
