"""Shipped weights score the same at any height of the network's input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ALLOWED_MAP = 0.01


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration's world: images of 225 x 400 pixels, a scene of 40 frames to evaluate on."""
    root = tmp_path_factory.mktemp("sizes") / "world"
    program = [sys.executable, str(REPOSITORY / "tools" / "make_world.py")]
    subprocess.run([*program, "--scenes=2", "--seed=90210", "--size=400x225", str(root)], check=True)
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(225, 400), (450, 800), (900, 1600)])
def test_a_height_between_multiples_of_the_stride(
    world: Path, tmp_path: Path, height: int, width: int
) -> None:
    """The images' own height, the multiple of 32 below (rows cut off) and the one above (blank rows)."""

    def mean_ap(rows: int) -> float:
        out = tmp_path / str(rows)
        command = [sys.executable, str(REPOSITORY / "tools" / "evaluate.py"), "--weights=world_v2"]
        data = (f"--data.root={world}", "--data.version=v1.0-world", f"--data.image_size=[{rows},{width}]")
        subprocess.run([*command, "--split=world_val", f"--out={out}", *data], check=True)
        return float(json.loads((out / "metrics.json").read_text())["detection"]["overall"]["mAP"])

    own, cut, padded = mean_ap(height), mean_ap(height // 32 * 32), mean_ap(-(-height // 32) * 32)
    assert abs(own - cut) <= ALLOWED_MAP
    assert abs(own - padded) <= ALLOWED_MAP
