"""Names of the published perspective head's parameters (NuscenesDD3D) in this project's module."""

from __future__ import annotations

import re

_RULES = (
    (r"^fcos[23]d_head\.", ""),
    (r"^cls_tower\.", "class_tower."),
    (r"^(class_tower|box2d_tower|box3d_tower)\.(\d+)\.norm\.", r"\1.\2.norms."),
    (r"^(class_tower|box2d_tower|box3d_tower)\.(\d+)\.(weight|bias)$", r"\1.\2.conv.\3"),
    (r"^cls_logits\.", "class_logits."),
    (r"^box2d_reg\.", "box2d."),
    (r"^centerness\.", "centreness."),
    (r"^box3d_quat\.", "quaternion."),
    (r"^box3d_ctr\.", "centre."),
    (r"^box3d_depth\.", "depth."),
    (r"^box3d_size\.", "size."),
    (r"^box3d_conf\.", "confidence."),
    (r"^attr_logits\.", "attributes."),
    (r"^scales_box2d_reg\.(\d+)\.scale$", r"box2d_scales.\1"),
    (r"^scales_proj_ctr\.(\d+)\.scale$", r"centre_scales.\1"),
    (r"^scales_size\.(\d+)\.scale$", r"size_scales.\1"),
    (r"^scales_conf\.(\d+)\.scale$", r"confidence_scales.\1"),
    (r"^scales_depth\.(\d+)\.scale$", r"depth_scales.\1"),
    (r"^offsets_depth\.(\d+)\.bias$", r"depth_offsets.\1"),
)


def perspective_key(name: str) -> str:
    """A name within NuscenesDD3D to one of ``heads.perspective.network.PerspectiveHead``.

    Args:
        name: without the ``fcos3d_bbox_head.`` prefix; its two buffers ``*_depth_per_level`` have no
            counterpart: they only say where training began.
    """
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name
