"""The demonstration, as `make demo` runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_shipped_weights_perceive_a_new_world(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / "demo.py"), f"--out={tmp_path}"]
    for _ in range(2):  # the second time the world is there already
        subprocess.run(command, check=True)
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        assert {"detection", "segmentation"} <= set(metrics)
        assert cv2.imread(str(tmp_path / "prediction.png")).shape[1] == 1600
        video = cv2.VideoCapture(str(tmp_path / "scene.mp4"))
        assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 40
