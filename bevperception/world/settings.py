"""Settings of a world and their allowed ranges."""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Final

from bevperception.errors import ConfigError
from bevperception.ranges import Range, check_settings

FORMAT: Final = 2
"""Raised when the same settings begin to give other files."""

WORLD_VERSION: Final = "v1.0-world"
TRAIN_SPLIT: Final = "world_train"
VAL_SPLIT: Final = "world_val"
MINI_VERSION: Final = "v1.0-mini"
MINI_TRAIN: Final = tuple(f"scene-{n:04d}" for n in (61, 553, 655, 757, 796, 1077, 1094, 1100))
MINI_VAL: Final = tuple(f"scene-{n:04d}" for n in (103, 916))
FIRST_SCENE: Final = 9001
MAX_SCENES: Final = 999
LOCATIONS: Final = (
    "boston-seaport",
    "singapore-onenorth",
    "singapore-queenstown",
    "singapore-hollandvillage",
)
KEY_FRAME_PERIOD_US: Final = 500_000
SWEEP_PERIOD_US: Final = 83_333
"""Cameras of nuScenes take 12 pictures a second; every sixth belongs to a key frame."""


@dataclass(frozen=True)
class WorldConfig:
    """Settings of a world; with the same ones every table and image has the same bytes.

    Attributes:
        scenes: number of scenes, 1 to 999 (10 at most as v1.0-mini).
        seed: of everything random, 0 or more.
        frames: key frames a scene, at 2 Hz; at least 2.
        image_size: (height, width) of the images: 9 k and 16 k pixels with k from 8 to 100.
        sweeps: also write the camera images between key frames, 12 a second in all.
        version: v1.0-world, or v1.0-mini with the scene names of nuScenes' ten mini scenes.
        val_share: share of the scenes, the last ones, that make up the split world_val; from 0 to below 1.
        jpeg_quality: 1 to 100.

    Raises:
        ConfigError: if a setting is outside what is allowed.
    """

    scenes: Annotated[int, Range(1, MAX_SCENES)] = 20
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    frames: Annotated[int, Range(2, 1000)] = 40
    image_size: Annotated[tuple[int, int], Range(72, 1600)] = (900, 1600)
    sweeps: bool = False
    version: str = WORLD_VERSION
    val_share: Annotated[float, Range(0.0, below=1.0)] = 0.2
    jpeg_quality: Annotated[int, Range(1, 100)] = 90

    def __post_init__(self) -> None:
        check_settings(self, "")
        most = len(MINI_TRAIN) + len(MINI_VAL) if self.version == MINI_VERSION else MAX_SCENES
        height, width = self.image_size
        checks = (
            (
                self.version in (WORLD_VERSION, MINI_VERSION),
                f"version must be {WORLD_VERSION} or {MINI_VERSION}, got {self.version!r}",
            ),
            (self.scenes <= most, f"scenes must be 1 to {most} in {self.version}, got {self.scenes}"),
            (
                width % 16 == 0 and height * 16 == width * 9 and 8 <= width // 16 <= 100,
                "image size must be 16k x 9k pixels with k from 8 to 100, as 400x225, 800x450 or 1600x900; "
                f"got {width}x{height}",
            ),
        )
        for good, message in checks:
            if not good:
                raise ConfigError(message)

    @property
    def scene_names(self) -> tuple[str, ...]:
        """Names of the scenes in order; the last ones are for validation."""
        if self.version == MINI_VERSION:
            val = self._val_scenes
            return MINI_TRAIN[: self.scenes - val] + MINI_VAL[:val]
        return tuple(f"scene-{FIRST_SCENE + i:04d}" for i in range(self.scenes))

    @property
    def splits(self) -> dict[str, list[str]]:
        """The content of ``splits.json``: scene names by split.

        The devkit keeps the names train and val for the scenes of nuScenes itself, so they are called
        :data:`TRAIN_SPLIT` and :data:`VAL_SPLIT`, or mini_train and mini_val, whose scenes they are part of.
        """
        names, val = list(self.scene_names), self._val_scenes
        train, held_out = names[: len(names) - val], names[len(names) - val :]
        split_names = ("mini_train", "mini_val") if self.version == MINI_VERSION else (TRAIN_SPLIT, VAL_SPLIT)
        return {split_names[0]: train, split_names[1]: held_out}

    @property
    def _val_scenes(self) -> int:
        if self.version == MINI_VERSION:
            least = max(0, self.scenes - len(MINI_TRAIN))
            return min(len(MINI_VAL), max(least, 1 if self.scenes > 1 else 0))
        wanted = round(self.scenes * self.val_share)
        if self.val_share > 0 and self.scenes > 1:
            wanted = max(wanted, 1)
        return min(wanted, self.scenes - 1)

    def record(self) -> dict[str, Any]:
        """The settings as plain JSON, for ``world.json`` and to tell one world from another."""
        return {"format": FORMAT, **asdict(self), "image_size": list(self.image_size)}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> WorldConfig | None:
        """The settings in a ``world.json``; None if this version of the program does not make such worlds."""
        if record.get("format") != FORMAT or set(record) != {"format", *(f.name for f in fields(cls))}:
            return None
        given = {name: value for name, value in record.items() if name != "format"}
        try:
            return cls(**{**given, "image_size": tuple(given["image_size"])})
        except (ConfigError, TypeError):
            return None

    def command(self, root: Path) -> str:
        """The command line that makes this world.

        Args:
            root: data root.
        """
        default = WorldConfig()
        words = [
            "bevperception",
            "make-world",
            "--scenes",
            self.scenes,
            "--seed",
            self.seed,
            "--frames",
            self.frames,
        ]
        words += ["--size", "{1}x{0}".format(*self.image_size), *(["--sweeps"] if self.sweeps else [])]
        for name in ("version", "val_share", "jpeg_quality"):
            if getattr(self, name) != getattr(default, name):
                words += [f"--{name.replace('_', '-')}", getattr(self, name)]
        return shlex.join([str(word) for word in [*words, root]])


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of WIDTHxHEIGHT; since images are wider than high, either order will do.

    Raises:
        ConfigError: if the text is not two whole numbers with an x between.
    """
    match = re.fullmatch(r"\s*(\d{1,5})\s*[xX×]\s*(\d{1,5})\s*", text)
    if match is None:
        raise ConfigError(f"size must be like 400x225, got {text!r}")
    first, second = int(match[1]), int(match[2])
    return min(first, second), max(first, second)
