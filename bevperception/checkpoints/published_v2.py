"""Names of the published BEVFormer v2's parameters in this project's model."""

from __future__ import annotations

from bevperception.checkpoints.published import fpn_key
from bevperception.checkpoints.published_perspective import perspective_key
from bevperception.checkpoints.published_transformer import head_key


def model_key(name: str) -> str | None:
    """Translate a parameter or buffer name of a BEVFormerV2 with a ResNet backbone.

    Args:
        name: as in the published checkpoint.

    Returns:
        The name in :class:`~bevperception.models.bevformer.BEVFormer`; None for what is no weight here.
    """
    part, _, rest = name.partition(".")
    if part == "pts_bbox_head":
        return head_key(rest)
    if part == "img_backbone":
        return "backbone." + rest
    if part == "img_neck":
        return "neck." + fpn_key(rest)
    if part == "fcos3d_bbox_head":
        return None if rest.endswith("_depth_per_level") else "perspective.head." + perspective_key(rest)
    raise KeyError(f"{name!r} is no parameter of the published BEVFormer v2")
