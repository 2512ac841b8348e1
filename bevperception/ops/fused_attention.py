"""Deformable attention from raw predictions: locations, softmax and the mean over maps in one operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bevperception.ops.backend import Backend, choose_backend
from bevperception.ops.checks import (
    misfit,
    require_dimensions,
    require_fitting_types,
    require_levels,
    working_copies,
)
from bevperception.ops.deformable_attention import ms_deform_attn

_NAME = "deform_attn"

MAX_SAMPLES = 1024
"""Points of a row and head that the fused operator takes on a GPU (ops/csrc/cuda/kernels.h)."""


@dataclass(frozen=True)
class CompressedRows:
    """Which maps each row looks into: compressed sparse rows, nothing padded.

    Args:
        row_start: (R + 1,) int64; the entries of row r are row_start[r] to row_start[r + 1] - 1.
        map_of: (E,) int64 the map that an entry looks into.
    """

    row_start: Tensor
    map_of: Tensor

    @cached_property
    def row_of(self) -> Tensor:
        """(E,) the row that an entry belongs to."""
        rows = torch.arange(self.row_start.numel() - 1, device=self.row_start.device)
        return rows.repeat_interleave(self.row_start.diff(), output_size=self.map_of.numel())

    @cached_property
    def by_map(self) -> Tensor:
        """(E,) the entries map after map, within one in the rows' order."""
        return self.map_of.argsort(stable=True)

    @cached_property
    def entries_of_map(self) -> list[tuple[int, int]]:
        """The maps that are looked into, in the order of :attr:`by_map`, and their numbers of entries."""
        maps, counts = self.map_of[self.by_map].unique_consecutive(return_counts=True)
        return list(zip(maps.tolist(), counts.tolist(), strict=True))


def deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    offsets: Tensor,
    logits: Tensor,
    references: Tensor,
    anchors: Sequence[int],
    groups: int = 1,
    rows: CompressedRows | None = None,
) -> Tensor:
    """Deformable attention from what the linear layers predict, averaged over the maps a row looks into.

    A row's sampling point p of level l lies at ``reference[anchors[l * P + p]] + offset / (w, h)``; its
    weight is the softmax over the points of all levels (of each of ``groups`` equal parts of them, whose
    results are averaged). The result is the mean over the row's entries, zero without entries.

    The native operator makes all of this in one pass, and its gradients in two. Where it does not serve
    (deterministic gradients on a GPU, the reference backend) the same is put together from
    :func:`ms_deform_attn`.

    Source: Deformable DETR (Zhu et al., ICLR 2021), equation 3; BEVFormer (Li et al., ECCV 2022),
    equations 2 and 3.

    Args:
        value: (M, sum of h*w over levels, H, C) maps, levels one after the other.
        spatial_shapes: (h, w) of each level.
        offsets: (R, H*L*P*2) as (x, y) in cells of their level, ordered head, level, point; rows may be
            parts of longer ones.
        logits: (R, H*L*P) unnormalised attention weights.
        references: (E, A, 2) points as (x, y), each map spanning 0 to 1.
        anchors: L*P indices below A: the reference point that each level's points start from.
        groups: see above; divides L*P.
        rows: which maps each row looks into; None: one map each (E = R), the maps taking R / M
            consecutive rows in turn.

    Returns:
        (R, H*C), head by head, in the dtype of ``value``; under autocast float32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        ConfigError: the native backend was asked for and is not available.
    """
    shapes = [(h, w) for h, w in spatial_shapes]
    tensors = {"value": value, "offsets": offsets, "logits": logits, "references": references}
    _check(tensors, shapes, anchors, groups, rows)
    if not _is_fused(tensors, len(anchors)):
        return deform_attn_unfused(value, shapes, offsets, logits, references, anchors, groups, rows)
    result_dtype = torch.float32 if torch.is_autocast_enabled(value.device.type) else value.dtype
    value, offsets, logits, references = working_copies(
        value, offsets, logits, references, keep_half=value.is_cuda
    )
    output: Tensor = torch.ops.bevperception.deform_attn(
        value,
        [n for shape in shapes for n in shape],
        offsets,
        logits,
        references,
        list(anchors),
        groups,
        None if rows is None else rows.row_start,
        None if rows is None else rows.map_of,
    )
    return output if output.dtype == result_dtype else output.to(result_dtype)


def _is_fused(tensors: Mapping[str, Tensor], samples: int) -> bool:
    value = tensors["value"]
    if choose_backend(_NAME, value.device) is not Backend.NATIVE:
        return False
    if not value.is_cuda:
        return True
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())
    return samples <= MAX_SAMPLES and not (wants_gradient and torch.are_deterministic_algorithms_enabled())


def deform_attn_unfused(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    offsets: Tensor,
    logits: Tensor,
    references: Tensor,
    anchors: Sequence[int],
    groups: int,
    rows: CompressedRows | None,
) -> Tensor:
    """:func:`deform_attn` as single steps around :func:`ms_deform_attn`, differentiable; args as there."""
    maps, heads, levels = value.shape[0], value.shape[2], len(spatial_shapes)
    by_point = (levels, len(anchors) // levels)
    # (R, H*L*P) -> (R, H, groups, L*P/groups)
    by_group = logits.unflatten(1, (heads, groups, len(anchors) // groups))
    # (R, H, groups, L*P/groups) -> (R, H, L, P)
    weights = (by_group.softmax(-1) / groups).view(-1, heads, *by_point)
    sizes = offsets.new_tensor([(width, height) for height, width in spatial_shapes])
    # (R, H*L*P*2) -> (R, H, L, P, 2)
    steps = offsets.unflatten(1, (heads, *by_point, 2)) / sizes[:, None, :]
    # (E, A, 2) -> (E, 1, L, P, 2)
    starts = references[:, list(anchors)].unflatten(1, by_point)[:, None]
    if rows is None:
        each = (maps, logits.shape[0] // maps if maps else 0)
        # (R, H, L, P, 2) -> (maps, R/maps, H, L, P, 2)
        locations = (starts + steps).unflatten(0, each)
        # (maps, R/maps, H*C) -> (R, H*C)
        return ms_deform_attn(value, spatial_shapes, locations, weights.unflatten(0, each)).flatten(0, 1)
    total = value.new_zeros(logits.shape[0], heads * value.shape[3])
    if rows.map_of.numel():
        # One gather and one split: a part's own gather would cost a gradient of the whole each.
        of_rows = rows.row_of[rows.by_map]
        sample = _sample_by_map if value.device.type == "cpu" else _sample_padded
        sampled = sample(value, spatial_shapes, starts[rows.by_map] + steps[of_rows], weights[of_rows], rows)
        total = total.to(sampled.dtype).index_add(0, of_rows, sampled)
    return total / rows.row_start.diff().clamp_min(1)[:, None].to(total.dtype)


def _sample_by_map(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    rows: CompressedRows,
) -> Tensor:
    """Sample the maps for all entries, map after map without padding: (E, H*C) by ``rows.by_map``."""
    counts = [count for _, count in rows.entries_of_map]
    parts = zip(rows.entries_of_map, locations.split(counts), weights.split(counts), strict=True)
    of_map = value.unbind(0)
    return torch.cat(
        [
            ms_deform_attn(of_map[index][None], spatial_shapes, where[None], weight[None])[0]
            for (index, _), where, weight in parts
        ]
    )


def _sample_padded(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    rows: CompressedRows,
) -> Tensor:
    """As :func:`_sample_by_map`, in one call on maps padded to the longest: a GPU launches slowly."""
    maps, longest = value.shape[0], max(count for _, count in rows.entries_of_map)
    of_map = rows.map_of[rows.by_map]
    first = torch.searchsorted(of_map, torch.arange(maps, device=value.device))
    place = of_map * longest + torch.arange(of_map.numel(), device=value.device) - first[of_map]
    padded = [x.new_zeros(maps * longest, *x.shape[1:]).index_copy(0, place, x) for x in (locations, weights)]
    # (maps*longest, ...) -> (maps, longest, ...)
    where, weight = (x.unflatten(0, (maps, longest)) for x in padded)
    # (maps, longest, H*C) -> (E, H*C)
    return ms_deform_attn(value, spatial_shapes, where, weight).flatten(0, 1)[place]


def _check(
    tensors: dict[str, Tensor],
    shapes: list[tuple[int, int]],
    anchors: Sequence[int],
    groups: int,
    rows: CompressedRows | None,
) -> None:
    layouts = ("maps cells heads channels", "rows offsets", "rows weights", "entries anchors xy")
    for (name, tensor), layout in zip(tensors.items(), layouts, strict=True):
        require_dimensions(_NAME, name, tensor, layout)
    require_fitting_types(_NAME, tensors)
    value, offsets, logits, references = tensors.values()
    samples = len(anchors)
    require_levels(_NAME, value, shapes)
    if samples % len(shapes) != 0 or groups <= 0 or samples % groups != 0:
        raise misfit(
            f"{_NAME}: anchors must have one entry a level and point, a multiple of groups",
            f"{samples} anchors, {len(shapes)} levels, {groups} groups",
            "Do the levels of spatial_shapes and of the linear layers agree?",
        )
    if not all(0 <= a < references.shape[1] for a in anchors):
        raise misfit(
            f"{_NAME}: anchors must be indices of the {references.shape[1]} reference points of an entry",
            f"{list(anchors)}",
            "Was another number of pillar points or levels set?",
        )
    expected = logits.shape[0], value.shape[2] * samples
    if logits.shape != expected or offsets.shape != (expected[0], 2 * expected[1]):
        raise misfit(
            f"{_NAME}: logits must have shape {expected} (rows, heads * levels * points), "
            "offsets twice as wide",
            f"logits {tuple(logits.shape)} and offsets {tuple(offsets.shape)}",
            "Heads come from value, levels and points from anchors.",
        )
    _check_rows(value.shape[0], logits.shape[0], references, rows)


def _check_rows(maps: int, count: int, references: Tensor, rows: CompressedRows | None) -> None:
    entries = count if rows is None else rows.map_of.numel()
    if references.shape != (entries, references.shape[1], 2):
        raise misfit(
            f"{_NAME}: references must have one entry a pair of row and map ({entries}), with pairs (x, y)",
            f"{tuple(references.shape)}",
            "Were they made for another grid or other cameras?",
        )
    if rows is None:
        if count and (maps == 0 or count % maps != 0):
            raise misfit(
                f"{_NAME}: without rows, their number must be a multiple of the maps ({maps})",
                f"{count} rows",
                "Does the batch of the queries fit that of the maps?",
            )
        return
    if any(t.device != references.device or t.dtype != torch.int64 for t in (rows.row_start, rows.map_of)):
        raise misfit(
            f"{_NAME}: row_start and map_of must be int64 and on the device of the other tensors "
            f"({references.device})",
            f"row_start {rows.row_start.dtype} on {rows.row_start.device}, "
            f"map_of {rows.map_of.dtype} on {rows.map_of.device}",
            "Were the rows not moved with the model?",
        )
    if rows.row_start.shape != (count + 1,) or rows.map_of.dim() != 1:
        raise misfit(
            f"{_NAME}: row_start must have shape ({count + 1},) and map_of one dimension",
            f"{tuple(rows.row_start.shape)} and {tuple(rows.map_of.shape)}",
            "Were the rows made for another number of queries?",
        )
