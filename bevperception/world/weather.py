"""Light and weather of a scene."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Weather:
    """Light and haze of a scene. Colours are blue, green, red, 0 to 255.

    Attributes:
        name: for the scene's description.
        sun: (3,) unit vector towards the sun, global frame.
        ambient, direct: (3,) light from everywhere and from the sun, 1 for full.
        sky_top, sky_low: (3,) colours straight up and at the horizon.
        haze: (3,) what distant things fade into.
        haze_m: distance at which a third of a thing's own colour is left.
        ground: (3,) factor on the ground's colours.
        shadow: factor on the ground's colours under things, 1 for no shadow.
        noise: standard deviation of the sensor's noise.
        night: 0 to 1, how strongly lamps shine.
    """

    name: str
    sun: Array
    ambient: Array
    direct: Array
    sky_top: Array
    sky_low: Array
    haze: Array
    haze_m: float
    ground: Array
    shadow: float
    noise: float
    night: float


_KINDS: Final = {
    # name: (share, elevation deg, ambient, direct, sky top, sky low, haze m, shadow, noise, night); RGB
    "clear": (
        0.38,
        (30, 60),
        (0.55, 0.58, 0.62),
        (0.5, 0.48, 0.44),
        (86, 136, 206),
        (196, 214, 232),
        420,
        0.58,
        1.6,
        0.0,
    ),
    "low sun": (
        0.16,
        (12, 22),
        (0.5, 0.48, 0.5),
        (0.56, 0.46, 0.32),
        (98, 128, 186),
        (244, 206, 160),
        330,
        0.62,
        1.8,
        0.0,
    ),
    "overcast": (
        0.22,
        (40, 60),
        (0.82, 0.83, 0.85),
        (0.1, 0.1, 0.1),
        (178, 184, 192),
        (212, 216, 220),
        260,
        0.78,
        1.8,
        0.0,
    ),
    "rain": (
        0.12,
        (40, 60),
        (0.64, 0.67, 0.71),
        (0.06, 0.06, 0.06),
        (132, 138, 146),
        (176, 182, 188),
        120,
        0.84,
        2.8,
        0.3,
    ),
    "dusk": (
        0.07,
        (8, 14),
        (0.42, 0.42, 0.5),
        (0.2, 0.15, 0.1),
        (52, 62, 106),
        (196, 148, 122),
        240,
        0.75,
        2.8,
        0.6,
    ),
    "night": (
        0.05,
        (40, 60),
        (0.34, 0.35, 0.42),
        (0.06, 0.06, 0.08),
        (14, 18, 32),
        (44, 48, 66),
        160,
        0.82,
        3.6,
        1.0,
    ),
}


def draw_weather(rng: np.random.Generator) -> Weather:
    """Draw the weather of one scene."""
    names = list(_KINDS)
    shares = np.array([_KINDS[name][0] for name in names])
    name = names[int(rng.choice(len(names), p=shares / shares.sum()))]
    _, elevation, ambient, direct, top, low, haze_m, shadow, noise, night = _KINDS[name]
    azimuth, height = float(rng.uniform(-np.pi, np.pi)), np.deg2rad(float(rng.uniform(*elevation)))
    sun = np.array([np.cos(height) * np.cos(azimuth), np.cos(height) * np.sin(azimuth), np.sin(height)])
    exposure = float(rng.uniform(0.9, 1.08))
    ambient_bgr = np.array(ambient[::-1]) * exposure
    direct_bgr = np.array(direct[::-1]) * exposure
    wet = 0.78 if name == "rain" else 1.0
    return Weather(
        name=name,
        sun=sun,
        ambient=ambient_bgr,
        direct=direct_bgr,
        sky_top=np.array(top[::-1], dtype=np.float64),
        sky_low=np.array(low[::-1], dtype=np.float64),
        haze=np.array(low[::-1], dtype=np.float64) * 0.96,
        haze_m=float(haze_m),
        ground=(ambient_bgr + direct_bgr * max(sun[2], 0.35)) * wet,
        shadow=shadow,
        noise=noise,
        night=night,
    )
