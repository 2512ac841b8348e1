"""Messages for arguments that do not fit: the rule, what came instead, the likely cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

WORKING_DTYPES = (torch.float32, torch.float64)
_DTYPES = frozenset((*WORKING_DTYPES, torch.float16, torch.bfloat16))


def misfit(rule: str, came: str, cause: str) -> ValueError:
    """The error for an argument that does not fit.

    Raised after an ``if`` of its own: to put the words together takes longer than all the checks of a call.
    """
    return ValueError(f"{rule}; got {came}. {cause}")


def require_dimensions(operator: str, name: str, tensor: Tensor, layout: str) -> None:
    """Check the number of dimensions.

    Args:
        operator: for the message.
        name: the argument's name.
        tensor: the argument.
        layout: its dimensions, blank-separated, such as ``"batch heads channels"``.
    """
    names = layout.split()
    if tensor.dim() != len(names):
        raise misfit(
            f"{operator}: {name} must have {len(names)} dimensions ({', '.join(names)})",
            f"shape {tuple(tensor.shape)}",
            "Was a dimension squeezed, or were dimensions flattened?",
        )


def require_fitting_types(operator: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that all tensors lie on one device and have dtypes that can be computed together.

    float16, bfloat16 and float32 may be mixed (the work is done in float32); float64 only with itself.
    """
    if len({tensor.device for tensor in tensors.values()}) != 1:
        raise misfit(
            f"{operator}: all tensors must be on one device",
            ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items()),
            "Was one of them not moved with the model?",
        )
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if not dtypes.issubset(_DTYPES):
        raise misfit(
            f"{operator}: tensors must be float16, bfloat16, float32 or float64",
            _dtypes_of(tensors),
            "Was a tensor of integers passed, or the arguments in another order?",
        )
    if torch.float64 in dtypes and len(dtypes) != 1:
        raise misfit(
            f"{operator}: float64 may not be mixed with other dtypes",
            _dtypes_of(tensors),
            "Was a part of the model converted, or a tensor made from NumPy without a dtype?",
        )


def _dtypes_of(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())


def require_levels(operator: str, value: Tensor, shapes: Sequence[tuple[int, int]]) -> None:
    """Check that the feature levels make up the maps.

    Args:
        operator: for the message.
        value: (maps, cells, heads, channels).
        shapes: (height, width) of each level.
    """
    if not shapes or any(h <= 0 or w <= 0 for h, w in shapes):
        raise misfit(
            f"{operator}: spatial_shapes must hold at least one (height, width), all positive",
            f"{shapes}",
            "Is the feature pyramid empty, or the image smaller than a stride?",
        )
    cells = sum(h * w for h, w in shapes)
    if value.shape[1] != cells:
        raise misfit(
            f"{operator}: value must have as many cells as the levels of spatial_shapes together ({cells})",
            f"value {tuple(value.shape)} and spatial_shapes {shapes}",
            "Are the shapes (height, width) of these very maps?",
        )


def working_copies(maps: Tensor, *others: Tensor, keep_half: bool = False) -> tuple[Tensor, ...]:
    """The tensors in the dtype the work is done in: float64 if they are, else float32.

    Args:
        maps: what is sampled; with ``keep_half`` it stays as it is.
        others: positions and weights.
        keep_half: for kernels that read half-precision maps and compute in float32.
    """
    kept = maps if keep_half else _widened(maps)
    return kept, *(_widened(t) for t in others)


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in WORKING_DTYPES else tensor.float()
