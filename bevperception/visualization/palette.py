"""Colours and line widths of every picture: one fixed colour a class, on a dark ground.

All colours are RGB in 0 to 255. The class colours are bright enough to read on photographs and on the
dark bird's-eye view; the segmentation layers stay dark so that boxes stand out on them.
"""

from __future__ import annotations

from typing import Final

RGB = tuple[int, int, int]

BACKGROUND: Final[RGB] = (18, 21, 26)
PANEL: Final[RGB] = (26, 30, 37)
RING: Final[RGB] = (66, 74, 86)
MUTED: Final[RGB] = (138, 148, 161)
INK: Final[RGB] = (232, 236, 241)
EGO: Final[RGB] = (245, 247, 250)
VELOCITY: Final[RGB] = (255, 255, 255)

DETECTION_COLOURS: Final[dict[str, RGB]] = {
    "car": (77, 182, 255),
    "truck": (255, 167, 64),
    "construction_vehicle": (201, 139, 94),
    "bus": (255, 107, 107),
    "trailer": (186, 140, 240),
    "barrier": (160, 172, 186),
    "motorcycle": (255, 92, 184),
    "bicycle": (64, 224, 208),
    "pedestrian": (140, 233, 102),
    "traffic_cone": (255, 224, 82),
}
"""One colour for each of ``taxonomy.DETECTION_CLASSES``."""

SEGMENTATION_COLOURS: Final[dict[str, RGB]] = {
    "drivable_area": (48, 57, 70),
    "carpark_area": (64, 62, 92),
    "walkway": (74, 68, 56),
    "ped_crossing": (52, 98, 98),
    "stop_line": (134, 62, 62),
    "divider": (168, 154, 112),
    "vehicle": (58, 104, 148),
}
"""One colour for each of ``taxonomy.SEGMENTATION_CLASSES``, in the order in which they are painted."""


def mix(colour: RGB, other: RGB, share: float) -> RGB:
    """A colour between two.

    Args:
        colour: where ``share`` is 0.
        other: where ``share`` is 1.
        share: in [0, 1].
    """
    r, g, b = (round(a + (c - a) * share) for a, c in zip(colour, other, strict=True))
    return (r, g, b)
