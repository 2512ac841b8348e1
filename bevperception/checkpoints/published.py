"""Names of parameters in published checkpoints, translated to this project's.

Only names differ: no weight is changed in shape or value.
"""

from __future__ import annotations

import re

_INTERNIMAGE_RULES = (
    (r"^patch_embed\.", "stem."),
    (r"^levels\.(\d+)\.downsample\.", r"downsamples.\1."),
    (r"^levels\.", "stages."),
    (r"\bgamma([12])$", r"scale\1"),
    (r"\bcenter_feature_scale_proj_(weight|bias)$", r"center_scale.\1"),
    (r"\bdw_conv\.0\.", "depthwise."),
    (r"\bdw_conv\.1\.[01]\.", "depthwise_norm."),
    (r"\b(input|output)_proj\.", r"\1_projection."),
    (r"\bres_post_norm([12])\.0\.", r"post_norm\1."),
    # A norm stands in a sequence with the permutations around it, hence its number.
    (r"\b(norm[12]?|post_norms\.\d+)\.[01]\.", r"\1."),
)


def internimage_key(key: str, post_norm: bool = False) -> str:
    """Translate a parameter name of InternImage or its DCNv3 (OpenGVLab, detection or classification).

    Args:
        key: name without a prefix such as ``backbone.``.
        post_norm: whether the model is post-norm: published blocks call their norms norm1 and norm2
            whether these stand before or after the operator.

    Returns:
        The name in :class:`bevperception.models.backbones.internimage.InternImage`.
    """
    place = "post" if post_norm else "pre"
    key = re.sub(r"\bblocks\.(\d+)\.norm([12])\.0\.", rf"blocks.\1.{place}_norm\2.", key)
    for pattern, replacement in _INTERNIMAGE_RULES:
        key = re.sub(pattern, replacement, key)
    return key


def fpn_key(key: str) -> str:
    """Translate a parameter name of mmdet's FPN to :class:`bevperception.models.necks.FPN`'s."""
    key = re.sub(r"^lateral_convs\.(\d+)\.conv\.", r"laterals.\1.", key)
    return re.sub(r"^fpn_convs\.(\d+)\.conv\.", r"outputs.\1.", key)
