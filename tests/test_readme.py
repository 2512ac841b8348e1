"""README's script runs as it stands: the shipped model on six images of one's own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2

from bevperception.config import DataConfig
from bevperception.data.nuscenes import NuScenesReader
from bevperception.world import WorldConfig, make_world

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 170


def test_the_script_for_six_images_of_ones_own(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in script.splitlines() if line]) <= 28
    config = WorldConfig(scenes=1, frames=2, seed=90213, image_size=(225, 400))
    root = make_world(config, tmp_path / "world", progress=False)
    data = DataConfig(root=str(root), version=config.version)
    reader = NuScenesReader(data)
    token, _ = reader.scenes("world_train")[0].sample_tokens
    rig = {
        camera.channel: {
            "image": str(camera.path),
            "width": 400,
            "height": 225,
            "intrinsics": camera.pinhole.intrinsics.tolist(),
            "camera_to_ego": camera.pinhole.camera_to_ego.tolist(),
        }
        for camera in reader.sample(token).cameras
    }
    (tmp_path / "rig.json").write_text(json.dumps(rig), encoding="utf-8")
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 20
    assert all(re.fullmatch(r"\w+ [01]\.\d\d at x -?\d+\.\d m, y -?\d+\.\d m", line) for line in lines)
    picture = cv2.imread(str(tmp_path / "bev.png"))
    assert picture.shape == (600, 600, 3)
    assert picture.std() > 1
