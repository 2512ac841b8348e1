"""Boxes as mmdet3d 0.17 (published checkpoints) and the nuScenes devkit have them, for comparison with ours.

| | centre | size | yaw |
| --- | --- | --- | --- |
| ours (``geometry.BOX_COLUMNS``) | of the volume | length, width, height | from x, counter-clockwise |
| mmdet3d 0.17 ("published") | of the volume, or of the bottom face | width, length, height | -ours - pi/2 |
| nuScenes | of the volume | width, length, height | ours, as a quaternion |

All three in one right-handed frame with z up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bevperception.geometry import box_corners
from bevperception.models.heads.box_code import flip_yaw_convention

# mmdet3d's corner k is our corner _CORNERS_PUBLISHED[k]; the devkit's likewise. See box_corners.
_CORNERS_PUBLISHED = (3, 7, 6, 2, 0, 4, 5, 1)
_CORNERS_DEVKIT = (4, 7, 3, 0, 5, 6, 2, 1)


def boxes_to_published(boxes: Tensor) -> Tensor:
    """Our rows in mmdet3d 0.17's order.

    Args:
        boxes: (n, 9) rows as in ``geometry.BOX_COLUMNS``.

    Returns:
        (n, 9) x, y, z (centre of the volume), width, length, height, yaw, vx, vy.
    """
    return torch.cat(
        (boxes[:, [0, 1, 2, 4, 3, 5]], flip_yaw_convention(boxes[:, 6:7]), boxes[:, 7:9]), dim=-1
    )


def boxes_from_published(boxes: Tensor) -> Tensor:
    """mmdet3d 0.17's rows (centre of the volume) as ours.

    Args:
        boxes: (n, 9) x, y, z, width, length, height, yaw, vx, vy.

    Returns:
        (n, 9) rows as in ``geometry.BOX_COLUMNS``; yaw not wrapped.
    """
    return boxes_to_published(boxes)


def published_bottom_boxes(boxes: Tensor) -> Tensor:
    """Our rows as mmdet3d 0.17 stores them: z is the bottom face's.

    Args:
        boxes: (n, 9) rows as in ``geometry.BOX_COLUMNS``.

    Returns:
        (n, 9) x, y, z (bottom), width, length, height, yaw, vx, vy.
    """
    published = boxes_to_published(boxes)
    bottom = published[:, 2:3] - published[:, 5:6] / 2
    return torch.cat((published[:, :2], bottom, published[:, 3:]), dim=-1)


def published_bev_boxes(boxes: Tensor) -> Tensor:
    """Our rows as mmdet3d 0.17's bird's-eye-view boxes.

    Args:
        boxes: (n, 9) rows as in ``geometry.BOX_COLUMNS``.

    Returns:
        (n, 5) x, y, width, length, yaw.
    """
    return boxes_to_published(boxes)[:, [0, 1, 3, 4, 6]]


def published_corners(boxes: Tensor) -> Tensor:
    """Corners in mmdet3d 0.17's order.

    Args:
        boxes: (n, 9) rows as in ``geometry.BOX_COLUMNS``.

    Returns:
        (n, 8, 3).
    """
    return box_corners(boxes)[:, _CORNERS_PUBLISHED]


def devkit_corners(boxes: Tensor) -> Tensor:
    """Corners in the nuScenes devkit's order (``Box.corners``, transposed): front face, then back face.

    Args:
        boxes: (n, 9) rows as in ``geometry.BOX_COLUMNS``.

    Returns:
        (n, 8, 3).
    """
    return box_corners(boxes)[:, _CORNERS_DEVKIT]
