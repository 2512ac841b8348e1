"""Learning one real key frame by heart, from random weights, through the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
OUT = REPOSITORY / "out" / "keyframe"


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, check=True)


@pytest.mark.slow
def test_micro_model_learns_the_real_keyframe(real_keyframe: Path) -> None:
    """Boxes and vehicle footprints of the frame, by the devkit's metrics over the classes present."""
    shutil.rmtree(OUT, ignore_errors=True)  # of an earlier time
    start_s = time.monotonic()
    run(
        "tools/train.py",
        "--config=configs/keyframe_micro.yaml",
        f"--data.root={real_keyframe}",
        f"--out={OUT}",
    )
    minutes = (time.monotonic() - start_s) / 60
    run("tools/visualize.py", f"--weights={OUT}", "--sample=0", f"--out={OUT / 'prediction.png'}")
    (metrics_file,) = OUT.glob("evaluation/step-*/metrics.json")
    metrics = json.loads(metrics_file.read_text())
    present = metrics["detection"]["present"]
    vehicle_iou = metrics["segmentation"]["iou"]["vehicle"]
    print(f"{minutes:.1f} minutes", present, {"vehicle IoU": vehicle_iou})
    assert present["mAP"] >= 0.95
    assert present["mATE"] <= 0.20
    assert present["mASE"] <= 0.12
    assert present["mAOE"] <= 0.20
    assert vehicle_iou >= 0.85
    assert cv2.imread(str(OUT / "prediction.png")).shape[1] == 1600
