"""A small world that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest
from nuscenes.nuscenes import NuScenes

from bevperception.world import WorldConfig, make_world

SMALL = WorldConfig(scenes=2, seed=7, frames=4, image_size=(225, 400), val_share=0.5)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a world of two scenes; not to be changed by tests."""
    return make_world(SMALL, tmp_path_factory.mktemp("world") / "world", progress=False)


@pytest.fixture(scope="session")
def nusc(world: Path) -> NuScenes:
    """The devkit's view of it."""
    return NuScenes(version=SMALL.version, dataroot=str(world), verbose=False)
