"""The benchmark of lost cameras: who sees what, and that a lost camera is really not looked at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bevperception.benchmarks.cameras import LostCamera, WithoutCamera, format_row, main, seen_by
from bevperception.checkpoints.weights import Card, save_weights
from bevperception.config_io import config_to_dict
from bevperception.models.bevformer import BEVFormer
from tests.fixtures.tiny_nuscenes import VAL_SPLIT
from tests.models.builders import random_frames
from tests.streaming.helpers import micro_config, micro_model


def test_boxes_are_seen_by_the_cameras_that_face_them() -> None:
    # Two cameras 1.5 m above the ground, one looking along x, one along y; 100 x 60 pixels, focal length 50.
    intrinsics = torch.tensor([[50.0, 0, 50, 0], [0, 50, 30, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    ahead = torch.tensor([[0.0, -1, 0, 0], [0, 0, -1, 1.5], [1, 0, 0, 0], [0, 0, 0, 1]])
    left = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 1.5], [0, 1, 0, 0], [0, 0, 0, 1]])
    cameras = torch.stack((intrinsics @ ahead, intrinsics @ left))
    places = [(20.0, 0.0), (0.0, 20.0), (20.0, 20.0), (-20.0, -20.0), (21.0, -19.5)]
    boxes = torch.tensor([[x, y, 0.8, 4.0, 2.0, 1.6, 0.0] for x, y in places])
    expected = [[True, False], [False, True], [True, True], [False, False], [True, False]]
    assert seen_by(boxes, cameras, (60, 100)).tolist() == expected
    assert seen_by(boxes[:0], cameras, (60, 100)).shape == (0, 2)


def test_the_lost_camera_is_not_looked_at(tiny_nuscenes: Path) -> None:
    config = micro_config(tiny_nuscenes)
    model: BEVFormer = micro_model(config)
    frames = random_frames(batch=2, cameras=3, size=(96, 160), dtype=torch.float32)
    other = replace(frames, images=frames.images.clone())
    other.images[:, 1] = torch.nan
    with torch.inference_mode():
        whole, lame = model(frames)[0], WithoutCamera(model, 1)(frames)[0]
        assert torch.equal(WithoutCamera(model, 1)(other)[0].bev, lame.bev)
        assert torch.equal(WithoutCamera(model, None)(frames)[0].bev, whole.bev)
        assert not torch.equal(lame.bev, whole.bev)
        assert len(WithoutCamera(model, 1).decode(lame)) == 2


def test_rows_say_whether_the_fall_is_within_bounds() -> None:
    whole = LostCamera(None, 0.30, 0.2, 0.0)
    assert format_row(whole, whole).split() == ["none", "0.3000", "0.2000"]
    assert "within" in format_row(LostCamera("CAM_BACK", 0.21, 0.1, 0.08), whole)
    assert "more than" in format_row(LostCamera("CAM_BACK", 0.19, 0.1, 0.08), whole)


def test_the_program_prints_a_row_a_camera(
    tiny_nuscenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = micro_config(tiny_nuscenes)
    config.data.workers = 0
    save_weights(tmp_path / "weights", micro_model(config).state_dict(), Card(config_to_dict(config)))
    where = ["--weights", str(tmp_path / "weights"), "--split", VAL_SPLIT, "--out", str(tmp_path / "out")]
    assert main(where) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["lost", "none", *config.data.cameras]
    shares = [float(line.split()[4]) for line in lines[2:]]
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert sum(shares) > 0.0
    assert (tmp_path / "out" / "CAM_BACK" / "metrics.json").is_file()
