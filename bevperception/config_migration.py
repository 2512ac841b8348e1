"""Configurations of older versions, as cards and checkpoints hold them, in today's fields.

Version 0.1 had fields that are gone: some have a new name, some are fixed at the one value that every
published and shipped model has. Weights of another value would predict something else and are refused; a
field that only training used is left out, and named where a run is resumed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from bevperception.errors import ConfigError

_RENAMED = {
    "model.perspective.alone": "model.perspective.only",
    "model.detection.merge_share": "model.detection.nms_radius_ratio",
    "model.bev.first_reach_cells": "model.bev.initial_reach_cells",
    "model.bev.first_temporal_reach_cells": "model.bev.initial_temporal_reach_cells",
}

_FIXED: dict[str, Any] = {
    "model.bev.pillar_points": 4,
    "model.bev.spatial_points": 8,
    "model.bev.rotate_center": [100.0, 100.0],
    "model.detection.points": 4,
    "model.detection.hidden_layers": 2,
    "model.perspective.levels": None,
    "model.perspective.max_depth_m": 80.0,
    "model.perspective.per_image": 100,
    "model.perspective.image_iou": 0.6,
    "model.perspective.merge_share": 0.5,
}
"""Fields that predictions depend on, and the one value that is left."""

_TRAINING_ONLY: dict[str, Any] = {
    "model.perspective.radius": 1.5,
    "model.perspective.min_side_px": 4.0,
    "model.perspective.min_visible": 0.2,
    "model.detection.class_loss_weight": 2.0,
    "model.detection.class_cost_weight": 2.0,
    "model.detection.focal_alpha": 0.25,
    "model.detection.focal_gamma": 2.0,
    "model.segmentation.focal_alpha": -1.0,
    "model.segmentation.focal_gamma": 2.0,
    "model.temporal.history_gradients": False,
    "training.perspective_steps": 0,
}
"""Fields that only training depended on, and their value today."""

_REPLACED = {
    "model.detection.heads": "the decoder has model.bev.heads",
    "model.detection.first_reach_cells": "the decoder has model.bev.initial_reach_cells",
    "model.detection.score_range_m": "it is the range of the BEV with 10 m on every side",
    "model.detection.box_cost_weight": "matching has the weight model.detection.box_loss_weight",
    "model.bev.can_bus": "model.bev.alignment=published includes it",
    "model.bev.feature_levels_embedding": "it follows from the number of levels and model.bev.alignment",
    "model.temporal.checkpointing": "model.backbone.checkpointing includes it",
    "training.perspective_steps": "train with model.perspective.only first, and give its weights to the next "
    "run as training.initial_weights",
    **{
        f"model.temporal.{name}": "it is part of model.temporal.mode"
        for name in ("norm", "coverage", "missing", "residual", "history_frame")
    },
}
"""Fields with a replacement that is not one field of another name."""

_OWN_FUSION = {"norm": "group", "coverage": True, "missing": "zeros", "residual": True}
_PUBLISHED_FUSION = {"norm": "batch", "coverage": False, "missing": "nearest", "residual": False}


def migrate_config(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Bring a configuration up to date; one of today is returned as it is.

    Args:
        config: nested plain values, as a card or checkpoint holds them; of any version, perhaps damaged.
        where: the file, for messages.

    Returns:
        the configuration in today's fields, and the values of fields that only training used and that had
        another value than today's, by dotted key.

    Raises:
        ConfigError: a field that predictions depend on has a value that this version does not have.
    """
    new: dict[str, Any] = copy.deepcopy(dict(config))
    for old_key, new_key in _RENAMED.items():
        present, value = _take(new, old_key)
        if present:
            _put(new, new_key, value)
    for key, fixed in _FIXED.items():
        present, value = _take(new, key)
        if present and value != fixed:
            raise _refusal(where, key, value, f"it is always {fixed}")
    dropped: dict[str, Any] = {}
    for key, today in _TRAINING_ONLY.items():
        present, value = _take(new, key)
        if present and value != today:
            dropped[key] = value
    _merge_attention(new, where)
    _merge_costs(new, dropped)
    _merge_alignment(new, where)
    _merge_fusion(new, dropped, where)
    return new, dropped


def _merge_attention(new: dict[str, Any], where: str) -> None:
    """The decoder has the encoder's heads and initial offsets, and decodes up to 10 m beyond the grid."""
    _take(new, "model.detection.first_reach_cells")  # only random weights depend on it
    present, heads = _take(new, "model.detection.heads")
    if present and heads != _get(new, "model.bev.heads", heads):
        raise _refusal(where, "model.detection.heads", heads, "it is always model.bev.heads")
    present, limits = _take(new, "model.detection.score_range_m")
    (x0, x1), (y0, y1) = (_pair(_get(new, f"model.bev.{axis}_range_m", None)) for axis in "xy")
    expected = [x0 - 10.0, y0 - 10.0, -10.0, x1 + 10.0, y1 + 10.0, 10.0]
    if present and limits != expected:
        raise _refusal(where, "model.detection.score_range_m", limits, f"it is {expected} for that BEV")


def _merge_costs(new: dict[str, Any], dropped: dict[str, Any]) -> None:
    """The cost of a box in matching has the weight of its loss."""
    present, cost = _take(new, "model.detection.box_cost_weight")
    if present and cost != _get(new, "model.detection.box_loss_weight", 0.25):
        dropped["model.detection.box_cost_weight"] = cost


def _merge_alignment(new: dict[str, Any], where: str) -> None:
    """The published alignment includes the CAN-bus embedding and a level embedding of at least four rows."""
    published = _get(new, "model.bev.alignment", "warp") == "published"
    present, can_bus = _take(new, "model.bev.can_bus")
    if present and can_bus != published:
        raise _refusal(where, "model.bev.can_bus", can_bus, "it goes with model.bev.alignment=published")
    levels = _get(new, "model.bev.feature_levels", None) or _get(new, "model.neck.levels", 3)
    present, rows = _take(new, "model.bev.feature_levels_embedding")
    if present and rows not in (None, levels, 4 if published else None):
        raise _refusal(
            where, "model.bev.feature_levels_embedding", rows, "it follows from the number of levels"
        )


def _merge_fusion(new: dict[str, Any], dropped: dict[str, Any], where: str) -> None:
    """The settings of a fusion are one of two modes."""
    values = {}
    for name in (*_OWN_FUSION, "history_frame"):
        present, value = _take(new, f"model.temporal.{name}")
        if present:
            values[name] = value
    present, checkpointing = _take(new, "model.temporal.checkpointing")
    if present and checkpointing:
        _put(new, "model.backbone.checkpointing", True)
    history_frame = values.pop("history_frame", "own")
    frames = (_get(new, "model.temporal.past", 1), _get(new, "model.temporal.future", 0))
    if _get(new, "model.temporal.mode", "recurrent") != "fusion" or frames == (0, 0):
        return  # nothing is fused
    network = _OWN_FUSION | values
    if network == _PUBLISHED_FUSION:
        _put(new, "model.temporal.mode", "fusion_published")
    elif network != _OWN_FUSION:
        raise _refusal(where, "model.temporal", network, "it is one of the modes fusion and fusion_published")
    if history_frame != ("current" if network == _PUBLISHED_FUSION else "own"):
        dropped["model.temporal.history_frame"] = history_frame


def replacement(key: str) -> str | None:
    """Advice for a setting of an older version, in words; None for a key that never was a setting.

    Args:
        key: dotted.
    """
    if key in _RENAMED:
        return f"it is called {_RENAMED[key]} now"
    if key in _REPLACED:
        return _REPLACED[key]
    if key in _FIXED or key in _TRAINING_ONLY:
        return f"it is always {_FIXED.get(key, _TRAINING_ONLY.get(key))} now"
    return None


def _refusal(where: str, key: str, value: object, today: str) -> ConfigError:
    return ConfigError(
        f"{where}: {key} is {value} in the weights, which this version does not have: {today}\n"
        "use version 0.1 of this project for them"
    )


def _pair(value: object) -> tuple[float, float]:
    """The two edges of a range; the default where the card has none or a damaged one."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, int | float) for v in value):
        return value[0], value[1]
    return -51.2, 51.2


def _section(values: dict[str, Any], key: str, make: bool = False) -> dict[str, Any] | None:
    """The mapping that holds the last part of a dotted key; None where there is none."""
    for part in key.split(".")[:-1]:
        if make and part not in values:
            values[part] = {}
        inner = values.get(part)
        if not isinstance(inner, dict):
            return None
        values = inner
    return values


def _take(values: dict[str, Any], key: str) -> tuple[bool, Any]:
    """Remove a dotted key: whether it was present, and its value."""
    section, name = _section(values, key), key.rsplit(".", 1)[-1]
    if section is None or name not in section:
        return False, None
    return True, section.pop(name)


def _get(values: dict[str, Any], key: str, default: Any) -> Any:
    section = _section(values, key)
    return default if section is None else section.get(key.rsplit(".", 1)[-1], default)


def _put(values: dict[str, Any], key: str, value: object) -> None:
    section = _section(values, key, make=True)
    if section is not None:
        section[key.rsplit(".", 1)[-1]] = value
