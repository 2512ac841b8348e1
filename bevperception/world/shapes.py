"""Build the meshes of each class: bodies, windows, lights and wheels, so that a front differs from a back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from bevperception.world.catalogue import CLOTHES, Colour, draw_colour
from bevperception.world.meshes import Mesh, MeshBuilder

GLASS: Final = (34, 44, 54)
TYRE: Final = (22, 22, 24)
RIM: Final = (120, 122, 126)
HEADLIGHT: Final = (255, 250, 220)
TAILLIGHT: Final = (206, 20, 24)
DARK: Final = (40, 40, 44)
SKINS: Final = ((224, 180, 150), (190, 138, 104), (120, 82, 60))
HAIRS: Final = ((36, 28, 24), (90, 62, 40), (160, 130, 80), (60, 60, 64))

Size = tuple[float, float, float]


def shade(colour: Colour, factor: float) -> Colour:
    """A darker or lighter colour."""
    red, green, blue = (int(np.clip(c * factor, 0, 255)) for c in colour)
    return red, green, blue


def make_mesh(kind: str, size_m: Size, colour: Colour, rider: bool, rng: np.random.Generator) -> Mesh:
    """Build the mesh of one object; it fills its box and stays inside.

    Args:
        kind: detection class.
        size_m: length, width, height.
        colour: main colour.
        rider: whether a bicycle or motorcycle is ridden, or a pedestrian walks.
        rng: for what varies within a class.
    """
    if kind in _RIDDEN:
        return _RIDDEN[kind](size_m, colour, rider, rng)
    return _PLAIN[kind](size_m, colour, rng)


def _wheels(builder: MeshBuilder, part: int, places: list[float], radius: float, half_width: float) -> None:
    for side in (-1, 1):
        for x in places:
            builder.disc(part, side, x, radius, radius, side * half_width, TYRE)
            builder.disc(part, side, x, radius, 0.55 * radius, side * half_width, RIM)


def _lights(builder: MeshBuilder, part: int, low: float, high: float, width: float = 0.2) -> None:
    for u in ((0.04, 0.04 + width), (0.96 - width, 0.96)):
        builder.mark(part, "front", u, (low, high), HEADLIGHT, glow=1.0, fine=False)
        builder.mark(part, "back", u, (low, high), TAILLIGHT, glow=0.6, fine=False)


def _car(size: Size, colour: Colour, rng: np.random.Generator) -> Mesh:
    length, width, height = size
    a, b, ground = length / 2, width / 2, 0.16 * height
    style = int(rng.integers(3))  # saloon, hatchback, van
    belt = (0.55, 0.57, 0.56)[style] * height
    bonnet = (0.26, 0.22, 0.12)[style] * length
    boot = (0.15, 0.02, 0.0)[style] * length
    screen, rear = (0.13, 0.12, 0.10)[style] * length, (0.12, 0.06, 0.02)[style] * length
    builder = MeshBuilder()
    body = builder.solid(
        (-a, a, -b, b, ground),
        (-a + 0.02, a - 0.06, -b + 0.03, b - 0.03, belt),
        colour,
        colours={"bottom": DARK},
    )
    builder.mark(body, "front", (0.27, 0.73), (0.38, 0.72), DARK, fine=False)
    builder.mark(body, "front", (0.0, 1.0), (0.0, 0.2), shade(colour, 0.5))
    builder.mark(body, "back", (0.0, 1.0), (0.0, 0.24), shade(colour, 0.5))
    builder.mark(body, "back", (0.36, 0.64), (0.34, 0.56), (226, 226, 214))
    for side in ("left", "right"):
        builder.mark(body, side, (0.0, 1.0), (0.0, 0.14), shade(colour, 0.45))
    _lights(builder, body, 0.55, 0.88, 0.22)
    _wheels(builder, body, [-0.30 * length, 0.31 * length], 0.2 * height, b)
    for x in (-0.30 * length, 0.31 * length):
        for inner in (-b + 0.02, b - 0.24):
            builder.box((x - 0.14 * height, x + 0.14 * height), (inner, inner + 0.22), (0.0, ground), TYRE)
    below = (-a + boot + 0.04, a - bonnet, -b + 0.05, b - 0.05, belt)
    above = (-a + boot + rear, a - bonnet - screen, -b + 0.22, b - 0.22, height)
    cabin = builder.solid(below, above, colour, layer=1)
    builder.mark(cabin, "front", (0.05, 0.95), (0.06, 0.92), GLASS, fine=False)
    builder.mark(cabin, "back", (0.12, 0.88), (0.3, 0.88), shade(GLASS, 0.8), fine=False)
    for side in ("left", "right"):
        builder.mark(cabin, side, (0.08, 0.5), (0.12, 0.86), GLASS, fine=False)
        builder.mark(cabin, side, (0.54, 0.92), (0.12, 0.86), GLASS, fine=False)
    return builder.build()


def _truck(size: Size, colour: Colour, rng: np.random.Generator) -> Mesh:
    length, width, height = size
    a, b = length / 2, width / 2
    cab_start, cab_height = a - max(1.7, 0.27 * length), height * float(rng.uniform(0.74, 0.86))
    cargo = draw_colour(((222, 222, 220), (196, 200, 204), (120, 132, 150), (176, 150, 110)), rng)
    builder = MeshBuilder()
    chassis = builder.box((-a, a - 0.1), (-b + 0.15, b - 0.15), (0.35, 0.75), DARK)
    radius = 0.48
    _wheels(builder, chassis, [-a + 0.18 * length, a - 0.75], radius, b - 0.1)
    bed = builder.box((-a, cab_start - 0.2), (-b, b), (0.72, height), cargo, layer=1)
    builder.mark(bed, "back", (0.06, 0.49), (0.05, 0.95), shade(cargo, 0.82), fine=False)
    builder.mark(bed, "back", (0.51, 0.94), (0.05, 0.95), shade(cargo, 0.82), fine=False)
    for u in ((0.0, 0.14), (0.86, 1.0)):
        builder.mark(bed, "back", u, (0.0, 0.1), TAILLIGHT, glow=0.6, fine=False)
    for side in ("left", "right"):
        builder.mark(bed, side, (0.15, 0.85), (0.35, 0.65), colour)
    cab = builder.solid(
        (cab_start, a, -b + 0.04, b - 0.04, 0.4),
        (cab_start, a - 0.25, -b + 0.1, b - 0.1, cab_height),
        colour,
        1,
    )
    builder.mark(cab, "front", (0.06, 0.94), (0.52, 0.88), GLASS, fine=False)
    builder.mark(cab, "front", (0.25, 0.75), (0.12, 0.36), DARK)
    for u in ((0.03, 0.2), (0.8, 0.97)):
        builder.mark(cab, "front", u, (0.1, 0.24), HEADLIGHT, glow=1.0, fine=False)
    for side in ("left", "right"):
        builder.mark(cab, side, (0.3, 0.88), (0.5, 0.86), GLASS, fine=False)
    return builder.build()


def _bus(size: Size, colour: Colour, rng: np.random.Generator) -> Mesh:
    length, width, height = size
    a, b = length / 2, width / 2
    builder = MeshBuilder()
    body = builder.solid(
        (-a, a, -b, b, 0.32),
        (-a + 0.04, a - 0.12, -b + 0.08, b - 0.08, height),
        colour,
        colours={"top": (206, 206, 206)},
    )
    builder.mark(body, "front", (0.05, 0.95), (0.34, 0.8), GLASS, fine=False)
    builder.mark(body, "front", (0.2, 0.8), (0.84, 0.95), (250, 190, 60), glow=0.8)
    builder.mark(body, "back", (0.15, 0.85), (0.56, 0.82), shade(GLASS, 0.8), fine=False)
    builder.mark(body, "back", (0.1, 0.9), (0.1, 0.42), shade(colour, 0.6))
    for u in ((0.04, 0.18), (0.82, 0.96)):
        builder.mark(body, "front", u, (0.08, 0.18), HEADLIGHT, glow=1.0, fine=False)
        builder.mark(body, "back", u, (0.1, 0.3), TAILLIGHT, glow=0.6, fine=False)
    for side in ("left", "right"):
        builder.mark(body, side, (0.0, 1.0), (0.0, 0.12), shade(colour, 0.5))
        for start in np.linspace(0.03, 0.79, 6).tolist():
            builder.mark(body, side, (start, start + 0.11), (0.42, 0.8), GLASS, fine=False, glow=0.25)
    builder.mark(body, "right", (0.88, 0.97), (0.05, 0.8), shade(GLASS, 1.3), fine=False)
    builder.mark(body, "left", (0.9, 0.97), (0.42, 0.8), GLASS)
    _wheels(builder, body, [-0.26 * length, 0.3 * length], 0.5, b)
    return builder.build()


def _trailer(size: Size, colour: Colour, rng: np.random.Generator) -> Mesh:
    length, width, height = size
    a, b = length / 2, width / 2
    builder = MeshBuilder()
    frame = builder.box((-a + 0.1, a - 0.1), (-b + 0.25, b - 0.25), (0.75, 1.1), DARK)
    _wheels(builder, frame, [-a + 1.2, -a + 2.4, -a + 3.6], 0.5, b - 0.08)
    for side in (-1, 1):
        builder.box((a - 2.6, a - 2.4), tuple(sorted((side * 0.7, side * 0.9))), (0.0, 0.8), DARK)  # type: ignore[arg-type]
    bed = builder.box((-a, a), (-b, b), (1.05, height), colour, layer=1)
    for start in np.linspace(0.02, 0.9, 7).tolist():
        for face in ("left", "right"):
            builder.mark(bed, face, (start, start + 0.02), (0.02, 0.98), shade(colour, 0.72))
    for face in ("left", "right"):
        builder.mark(bed, face, (0.0, 1.0), (0.0, 0.05), (190, 40, 36))
    builder.mark(bed, "back", (0.04, 0.49), (0.06, 0.97), shade(colour, 0.78), fine=False)
    builder.mark(bed, "back", (0.51, 0.96), (0.06, 0.97), shade(colour, 0.78), fine=False)
    for u in ((0.0, 0.16), (0.84, 1.0)):
        builder.mark(bed, "back", u, (0.0, 0.05), TAILLIGHT, glow=0.6, fine=False)
    builder.mark(bed, "front", (0.25, 0.75), (0.55, 0.85), DARK, fine=False)
    return builder.build()


def _construction_vehicle(size: Size, colour: Colour, rng: np.random.Generator) -> Mesh:
    length, width, height = size
    a, b = length / 2, width / 2
    builder = MeshBuilder()
    for side in (-1, 1):
        y = sorted((side * b, side * (b - 0.55)))
        builder.solid(
            (-0.3 * length, 0.2 * length, y[0], y[1], 0.0),
            (-0.36 * length, 0.26 * length, y[0], y[1], 0.85),
            TYRE,
        )
    deck = builder.box((-a, 0.2 * length), (-b + 0.2, b - 0.2), (0.85, 1.75), colour, layer=1)
    builder.mark(deck, "back", (0.1, 0.9), (0.2, 0.8), DARK, fine=False)
    for face in ("left", "right"):
        builder.mark(deck, face, (0.05, 0.35), (0.3, 0.8), shade(colour, 0.6))
    cab = builder.solid(
        (-0.12 * length, 0.16 * length, 0.02, b - 0.22, 1.75),
        (-0.1 * length, 0.13 * length, 0.08, b - 0.26, height),
        colour,
        2,
    )
    for face in ("front", "back", "left", "right"):
        builder.mark(cab, face, (0.1, 0.9), (0.18, 0.9), GLASS, fine=False)
    boom = builder.solid(
        (0.12 * length, 0.3 * length, -0.75, -0.25, 1.5),
        (0.3 * length, 0.4 * length, -0.7, -0.3, height - 0.1),
        colour,
        2,
    )
    builder.mark(boom, "left", (0.1, 0.9), (0.1, 0.3), DARK)
    builder.solid(
        (0.36 * length, 0.46 * length, -0.72, -0.28, 0.9),
        (0.32 * length, 0.4 * length, -0.7, -0.3, height - 0.15),
        shade(colour, 0.85),
        2,
    )
    builder.solid(
        (0.34 * length, a, -b + 0.5, b - 0.5, 0.0),
        (0.38 * length, a - 0.1, -b + 0.5, b - 0.5, 1.0),
        (70, 66, 60),
        2,
    )
    return builder.build()


def _barrier(size: Size, colour: Colour, rng: np.random.Generator) -> Mesh:
    length, width, height = size
    a, b = length / 2, width / 2
    builder = MeshBuilder()
    if min(colour) > 150:  # concrete
        foot = builder.solid((-a, a, -b, b, 0.0), (-0.5 * a, 0.5 * a, -b, b, 0.4 * height), colour)
        wall = builder.solid(
            (-0.5 * a, 0.5 * a, -b, b, 0.4 * height), (-0.35 * a, 0.35 * a, -b, b, height), colour, layer=1
        )
        for part, face in ((foot, "front"), (wall, "back")):
            builder.mark(part, face, (0.46, 0.54), (0.0, 1.0), shade(colour, 0.7))
        return builder.build()
    for y in (-b + 0.1, b - 0.4):
        builder.box((-a, a), (y, y + 0.3), (0.0, 0.12), DARK)
    board = builder.box((-0.3 * a, 0.3 * a), (-b, b), (0.12, height), colour, layer=1)
    for face in ("front", "back"):
        for start in np.linspace(0.08, 0.83, 4).tolist():
            builder.mark(board, face, (start, start + 0.1), (0.1, 0.95), (232, 232, 228), fine=False)
    return builder.build()


def _cone(size: Size, colour: Colour, rng: np.random.Generator) -> Mesh:
    length, width, height = size
    a, b = length / 2, width / 2
    builder = MeshBuilder()
    builder.box((-a, a), (-b, b), (0.0, 0.06 * height), DARK)
    white = (238, 238, 234)
    levels = (
        (0.06, 0.36, colour),
        (0.36, 0.58, white),
        (0.58, 0.76, colour),
        (0.76, 0.86, white),
        (0.86, 1.0, colour),
    )
    for layer, (low, high, paint) in enumerate(levels, start=1):
        wide, slim = (0.72 * (1 - low) + 0.1, 0.72 * (1 - high) + 0.1)
        builder.solid(
            (-wide * a, wide * a, -wide * b, wide * b, low * height),
            (-slim * a, slim * a, -slim * b, slim * b, high * height),
            paint,
            layer,
        )
    return builder.build()


def _person(
    builder: MeshBuilder,
    x: float,
    feet: float,
    height: float,
    half_width: float,
    colour: Colour,
    rng: np.random.Generator,
) -> None:
    """Torso, arms and head above ``feet``, looking along x; the face is light in front and hair behind."""
    skin, hair = SKINS[int(rng.integers(3))], HAIRS[int(rng.integers(4))]
    rise = height - feet
    neck = feet + 0.7 * rise
    builder.solid(
        (x - 0.14, x + 0.14, -0.72 * half_width, 0.72 * half_width, feet),
        (x - 0.13, x + 0.13, -half_width, half_width, neck),
        colour,
        layer=2,
    )
    head = builder.box(
        (x - 0.11, x + 0.13), (-0.1, 0.1), (neck, height), hair, layer=3, colours={"front": skin}
    )
    builder.mark(head, "front", (0.0, 1.0), (0.75, 1.0), hair, fine=False)
    for side in ("left", "right"):
        builder.mark(head, side, (0.55, 1.0), (0.0, 0.75), skin, fine=False)


def _pedestrian(size: Size, colour: Colour, walks: bool, rng: np.random.Generator) -> Mesh:
    length, width, height = size
    builder = MeshBuilder()
    trousers = draw_colour(((40, 46, 70), (34, 34, 36), (90, 82, 70), (70, 74, 80)), rng)
    hip = 0.5 * height
    step = 0.5 * length - 0.1 if walks else 0.02
    for side, x in ((1, step), (-1, -step)):
        y = sorted((side * 0.02, side * 0.2))
        builder.solid((x - 0.1, x + 0.1, y[0], y[1], 0.0), (-0.11, 0.11, y[0], y[1], hip), trousers, layer=1)
    _person(builder, 0.0, hip, height, min(0.3, width / 2), colour, rng)
    if rng.random() < 0.3:
        builder.box(
            (-0.3, -0.14), (-0.16, 0.16), (0.55 * height, 0.8 * height), draw_colour(CLOTHES, rng), layer=2
        )
    return builder.build()


def _bicycle(size: Size, colour: Colour, rider: bool, rng: np.random.Generator) -> Mesh:
    length, width, height = size
    a, radius = length / 2, 0.34
    bars = 1.0 if rider else height
    builder = MeshBuilder()
    frame = builder.solid(
        (-0.28 * length, 0.2 * length, -0.05, 0.05, 0.32),
        (-0.2 * length, 0.28 * length, -0.05, 0.05, 0.75 * bars),
        colour,
        0,
    )
    for x in (-a + radius, a - radius):
        wheel = builder.box((x - 0.75 * radius, x + 0.75 * radius), (-0.03, 0.03), (0.0, 1.7 * radius), TYRE)
        for side in (-1, 1):
            builder.disc(wheel, side, x, radius, radius, side * 0.04, TYRE)
            builder.disc(wheel, side, x, radius, 0.8 * radius, side * 0.04, (150, 152, 156))
    builder.mark(frame, "left", (0.2, 0.8), (0.0, 0.6), shade(colour, 0.6))
    builder.box((0.24 * length, 0.3 * length), (-width / 2, width / 2), (0.92 * bars, bars), DARK, layer=2)
    lamp = builder.box((0.24 * length, 0.3 * length), (-0.06, 0.06), (0.6 * bars, 0.92 * bars), DARK, layer=1)
    builder.mark(lamp, "front", (0.0, 1.0), (0.4, 0.9), HEADLIGHT, glow=1.0)
    seat = builder.box(
        (-0.24 * length, -0.1 * length), (-0.08, 0.08), (0.7 * bars, 0.86 * bars), DARK, layer=1
    )
    builder.mark(seat, "back", (0.0, 1.0), (0.0, 0.6), TAILLIGHT, glow=0.6)
    if rider:
        _rider(builder, -0.1 * length, 0.8, height, width, colour, rng)
    return builder.build()


def _motorcycle(size: Size, colour: Colour, rider: bool, rng: np.random.Generator) -> Mesh:
    length, width, height = size
    a, radius = length / 2, 0.33
    bars = 1.1 if rider else height
    builder = MeshBuilder()
    for x in (-a + radius, a - radius):
        wheel = builder.box((x - 0.75 * radius, x + 0.75 * radius), (-0.1, 0.1), (0.0, 1.8 * radius), TYRE)
        for side in (-1, 1):
            builder.disc(wheel, side, x, radius, radius, side * 0.11, TYRE)
            builder.disc(wheel, side, x, radius, 0.5 * radius, side * 0.11, RIM)
    builder.solid(
        (-0.3 * length, 0.25 * length, -0.2, 0.2, 0.28),
        (-0.4 * length, 0.28 * length, -0.16, 0.16, 0.82),
        colour,
        1,
    )
    seat = builder.box((-0.42 * length, 0.02), (-0.17, 0.17), (0.78, 0.9), DARK, layer=2)
    builder.mark(seat, "back", (0.1, 0.9), (0.0, 1.0), TAILLIGHT, glow=0.6, fine=False)
    fairing = builder.solid(
        (0.2 * length, 0.36 * length, -0.2, 0.2, 0.7),
        (0.2 * length, 0.28 * length, -0.14, 0.14, bars),
        shade(colour, 0.9),
        2,
    )
    builder.mark(fairing, "front", (0.2, 0.8), (0.15, 0.55), HEADLIGHT, glow=1.0, fine=False)
    builder.box(
        (0.2 * length, 0.26 * length), (-width / 2, width / 2), (0.9 * bars, 0.98 * bars), DARK, layer=2
    )
    if rider:
        _rider(builder, -0.1 * length, 0.85, height, width, colour, rng)
    return builder.build()


def _rider(
    builder: MeshBuilder,
    x: float,
    seat: float,
    height: float,
    width: float,
    colour: Colour,
    rng: np.random.Generator,
) -> None:
    clothes = draw_colour(CLOTHES, rng)
    for side in (-1, 1):
        y = sorted((side * 0.1, side * 0.26))
        builder.solid(
            (x + 0.1, x + 0.3, y[0], y[1], 0.3),
            (x - 0.1, x + 0.35, y[0], y[1], seat + 0.1),
            (44, 48, 66),
            layer=2,
        )
    _person(builder, x, seat, height, min(0.28, width / 2), clothes, rng)


_PLAIN: Final[dict[str, Callable[[Size, Colour, np.random.Generator], Mesh]]] = {
    "car": _car,
    "truck": _truck,
    "bus": _bus,
    "trailer": _trailer,
    "construction_vehicle": _construction_vehicle,
    "barrier": _barrier,
    "traffic_cone": _cone,
}
_RIDDEN: Final[dict[str, Callable[[Size, Colour, bool, np.random.Generator], Mesh]]] = {
    "bicycle": _bicycle,
    "motorcycle": _motorcycle,
    "pedestrian": _pedestrian,
}
