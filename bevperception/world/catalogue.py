"""Kinds of objects: categories, sizes and colours.

Mean sizes are those of nuScenes' annotations by class, with a spread; colours are red, green, blue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Kind:
    """Category, size and colours of one kind of object.

    Attributes:
        category: nuScenes category.
        size_m: mean length, width and height.
        spread: standard deviation of the sizes, as a share of them.
        colours: what it may be painted in.
    """

    category: str
    size_m: tuple[float, float, float]
    spread: float
    colours: tuple[Colour, ...]


PAINTS: Final = (
    (228, 228, 226),
    (186, 190, 194),
    (44, 46, 50),
    (108, 112, 118),
    (168, 32, 34),
    (34, 70, 150),
    (26, 92, 68),
    (206, 168, 60),
    (96, 34, 48),
    (74, 128, 176),
)
CLOTHES: Final = (
    (186, 40, 44),
    (36, 66, 150),
    (226, 226, 220),
    (44, 44, 48),
    (60, 130, 72),
    (226, 190, 60),
    (120, 60, 130),
    (206, 110, 60),
    (90, 150, 190),
)

KINDS: Final = {
    "car": Kind("vehicle.car", (4.63, 1.96, 1.74), 0.05, PAINTS),
    "truck": Kind(
        "vehicle.truck",
        (6.94, 2.52, 2.85),
        0.07,
        ((214, 214, 210), (42, 82, 150), (170, 44, 40), (60, 110, 84), (206, 160, 52)),
    ),
    "construction_vehicle": Kind(
        "vehicle.construction", (6.4, 2.75, 3.2), 0.06, ((226, 164, 24), (224, 138, 30), (208, 178, 60))
    ),
    "bus": Kind(
        "vehicle.bus.rigid",
        (11.1, 2.9, 3.47),
        0.04,
        ((178, 36, 44), (36, 120, 76), (40, 84, 168), (224, 150, 30), (210, 210, 214)),
    ),
    "trailer": Kind(
        "vehicle.trailer",
        (12.0, 2.85, 3.85),
        0.05,
        ((222, 222, 220), (128, 146, 166), (60, 92, 140), (148, 70, 52), (70, 118, 98)),
    ),
    "barrier": Kind(
        "movable_object.barrier",
        (0.5, 2.5, 0.98),
        0.03,
        ((222, 96, 32), (200, 44, 40), (196, 194, 188)),
    ),
    "motorcycle": Kind(
        "vehicle.motorcycle",
        (2.11, 0.77, 1.46),
        0.05,
        ((160, 28, 30), (34, 36, 40), (38, 66, 150), (206, 206, 204)),
    ),
    "bicycle": Kind(
        "vehicle.bicycle",
        (1.72, 0.6, 1.28),
        0.05,
        ((30, 110, 120), (170, 40, 44), (40, 42, 46), (210, 180, 60)),
    ),
    "pedestrian": Kind("human.pedestrian.adult", (0.72, 0.67, 1.77), 0.05, CLOTHES),
    "traffic_cone": Kind("movable_object.trafficcone", (0.41, 0.41, 1.05), 0.06, ((230, 88, 24),)),
}
"""By detection class."""

RIDDEN_HEIGHT_M: Final = 1.72
"""Height of the box of a bicycle or motorcycle with its rider."""


def draw_size(kind: str, rng: np.random.Generator) -> tuple[float, float, float]:
    """Length, width and height of one thing, in centimetres' steps."""
    mean, spread = KINDS[kind].size_m, KINDS[kind].spread
    scale = 1.0 + spread * np.clip(rng.normal(size=3), -1.8, 1.8)
    length, width, height = (round(float(m * s), 2) for m, s in zip(mean, scale, strict=True))
    return length, min(width, 2.95), height


def draw_colour(choices: tuple[Colour, ...], rng: np.random.Generator) -> Colour:
    """One of some colours, slightly changed."""
    base = choices[int(rng.integers(len(choices)))]
    red, green, blue = (int(np.clip(c + rng.integers(-10, 11), 8, 245)) for c in base)
    return red, green, blue
