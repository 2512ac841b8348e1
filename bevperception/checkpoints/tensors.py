"""Checks of tensors from files before they fill a model; every loader uses them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from bevperception.errors import CheckpointError

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes of weights. Float8 is not among them: such numbers mean something only with a scale beside them."""
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""Dtypes of counters, such as a batch norm's ``num_batches_tracked``."""

_SHOWN = 3


def some(names: Sequence[str]) -> str:
    """The first few of many names, for a message."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def named_tensors(values: object, what: str) -> dict[str, Tensor]:
    """Tensors by name, of what should be a state dict.

    Args:
        values: as read.
        what: what a message calls it, with the file's path.

    Raises:
        CheckpointError: it is something else.
    """
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{what} must be tensors by name, got {kind_of(values)}")
    tensors: dict[str, Tensor] = {}
    for name, value in values.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{what} must be tensors by name, got a key that is {kind_of(name)}")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{what} must be tensors by name, got {kind_of(value)} for {name!r}")
        tensors[name] = value
    return tensors


def kind_of(value: object) -> str:
    """The kind of a value, in words for a message."""
    if value is None:
        return "nothing"
    kind = type(value).__name__
    return f"a {kind} of {len(value)}" if isinstance(value, (list, tuple, dict)) else f"a {kind}"


def parts_of(names: Iterable[str]) -> dict[str, int]:
    """How many tensors each part of a model has; a part is what a name begins with, up to the first dot."""
    return dict(Counter(name.split(".", 1)[0] for name in names))


def left_aside(parts: Mapping[str, int]) -> str:
    """The unused parts of a file, in words: 'nothing', or the parts with their numbers of tensors."""
    return ", ".join(f"{part} ({count})" for part, count in parts.items()) or "nothing"


def check_values(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that cannot be a model's weights, whatever their shapes.

    Args:
        found: as read.
        expected: the model's own, at least those found; only whether they are floating-point counts.
        where: the file, for messages.

    Raises:
        CheckpointError: numbers of another kind (whole, complex, Boolean, float8, quantised or sparse ones
            for weights), NaN or infinity.
    """
    wrong = [
        f"{name} is {_storage(tensor)}" for name, tensor in found.items() if not _fits(tensor, expected[name])
    ]
    if wrong:
        raise CheckpointError(
            f"{where} holds {len(wrong)} of {len(found)} tensors in a wrong form: {some(wrong)}\n"
            "weights must be dense real floating point of 16 to 64 bits, counters whole numbers; "
            "convert quantised weights back first"
        )
    broken = [name for name, tensor in found.items() if not _is_finite(tensor)]
    if broken:
        raise CheckpointError(f"{where} holds NaN or infinite weights in {some(broken)}")


def count_tensors(value: object) -> int:
    """How many tensors nested containers hold."""
    count, waiting, seen = 0, [value], set[int]()
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            count += 1
        elif id(item) in seen:  # a container may hold itself
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple)):
            waiting.extend(item)
    return count


def converted(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Tensors in the dtypes of a model that they are to fill.

    Args:
        found: as read, each of the model's shape.
        expected: the model's own, at least those found.
        where: the file, for messages.

    Raises:
        CheckpointError: as :func:`check_values`, or numbers that are too large for the model's dtype.
    """
    check_values(found, expected, where)
    result = {name: tensor.to(expected[name].dtype) for name, tensor in found.items()}
    large = [n for n, tensor in result.items() if tensor is not found[n] and not _is_finite(tensor)]
    if large:
        kind = str(expected[large[0]].dtype).removeprefix("torch.")
        raise CheckpointError(f"{where} holds weights that are too large for {kind} in {some(large)}")
    return result


def _fits(tensor: Tensor, expected: Tensor) -> bool:
    dense = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta
    allowed = FLOATING if expected.dtype.is_floating_point else WHOLE
    return dense and tensor.dtype in allowed


def _storage(tensor: Tensor) -> str:
    """How a tensor holds its numbers, for a message."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta:
        return f"{dtype} without values"
    return dtype if tensor.layout is torch.strided else f"{dtype}, {tensor.layout}"


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
