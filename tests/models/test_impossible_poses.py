"""One sample's impossible pose: it is forgotten, and the rest of its batch never knows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bevperception.config_model import CentreConfig, ModelConfig, TemporalConfig
from bevperception.geometry import BEVGrid, planar_pose
from bevperception.models.bev.alignment import known_poses, rotate_bev, sample_bilinear, seen_from, warp_bev
from bevperception.models.bevformer import BEVFormer
from bevperception.structures import BEVMemory, CameraFrames, ModelOutputs
from tests.models.builders import random_frames, take, tiny_config, tiny_model

GRID = BEVGrid(-10, 11, -8, 8, 5, 7)
BAD = {
    "NaN": torch.full((4, 4), math.nan).double(),
    "NaN position": planar_pose(math.nan, 0.0, 0.3),
    "infinite": planar_pose(0.0, math.inf, 0.3),
    "off the Earth": planar_pose(1e300, 0.0, 0.3),
    "zeros": torch.zeros(4, 4).double(),
}
MODELS = ("warp", "published", "fusion", "interval")


def model_of(kind: str) -> BEVFormer:
    if kind == "published":
        return tiny_model(tiny_config(alignment="published"))
    config: ModelConfig = tiny_config()
    temporal = {
        "warp": TemporalConfig(),
        "fusion": TemporalConfig(mode="fusion_published", past=2),
        "interval": TemporalConfig(interval_s=0.5),
    }[kind]
    centres = CentreConfig(enabled=True, compare=True)
    model = tiny_model(replace(config, temporal=temporal, centres=centres))
    if model.fusion is not None:  # its last layer begins with zeros
        with torch.no_grad():
            model.fusion.projection.weight.normal_(0, 0.3)
    return model


def drive(batch: int, steps: int) -> list[CameraFrames]:
    """Frames half a second apart, with CAN-bus vectors."""
    found = []
    for step in range(steps):
        frames = random_frames(batch, cameras=2, size=(33, 47), seed=step)
        can_bus = torch.randn(batch, 18, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        found.append(replace(frames, timestamps_s=torch.full((batch,), 0.5 * step).double(), can_bus=can_bus))
    return found


def spoiled(frames: CameraFrames, sample: int, pose: Tensor) -> CameraFrames:
    """The same frames, one of whose samples has another pose, in the CAN-bus vector, too."""
    poses, can_bus = frames.bev_to_global.clone(), frames.can_bus.clone()  # type: ignore[union-attr]
    poses[sample] = pose
    can_bus[sample] = pose.sum()
    return replace(frames, bev_to_global=poses, can_bus=can_bus)


def run(model: BEVFormer, frames: list[CameraFrames]) -> list[ModelOutputs]:
    memory: BEVMemory | None = None
    found = []
    for now in frames:
        outputs, memory = model(now, memory)
        found.append(outputs)
    return found


def values(outputs: ModelOutputs, sample: int) -> list[Tensor]:
    assert outputs.detection is not None
    assert outputs.segmentation_logits is not None
    codes, logits = outputs.detection.box_codes[:, sample], outputs.detection.class_logits[:, sample]
    return [outputs.bev[sample], outputs.segmentation_logits[sample], codes, logits]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_bad_samples_leave_the_others_alone(kind: str) -> None:
    """A batch with a sample of every bad kind between good ones."""
    model, good = model_of(kind), drive(len(BAD) + 2, 4)
    frames = good[2]
    for sample, pose in enumerate(BAD.values(), start=1):
        frames = spoiled(frames, sample, pose)
    bad = [good[0], good[1], frames, good[3]]
    found, wanted = run(model, bad), run(model, good)
    for step in range(4):
        for sample in (0, len(BAD) + 1):
            assert_same(values(found[step], sample), values(wanted[step], sample))
    for sample in range(1, len(BAD) + 1):
        single = run(model, [take(frames, sample) for frames in bad])
        for step in range(4):
            assert_same(values(found[step], sample), values(single[step], 0))
            assert all(bool(part.isfinite().all()) for part in values(found[step], sample))


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_bad_sample_has_no_memory_and_becomes_none(kind: str) -> None:
    names = ("NaN", "NaN position", "infinite", "off the Earth")
    model, good = model_of(kind), drive(5, 4)
    bad = good[1]
    for sample, name in enumerate(names):
        bad = spoiled(bad, sample, BAD[name])
    _, memory = model(good[0])
    outputs, memory = model(bad, memory)
    harmless = replace(good[1], can_bus=torch.zeros(5, 18).double())
    fresh, _ = model(harmless)
    after, _ = model(good[2], memory)
    afresh, _ = model(good[2])
    assert memory.valid.tolist() == [False] * 4 + [True]
    for sample in range(4):
        assert_same(values(outputs, sample), values(fresh, sample))
        if kind in ("warp", "published"):
            assert_same(values(after, sample), values(afresh, sample))
    if kind in ("fusion", "interval"):
        # These remember more than one frame: the good one a second ago is still there.
        assert [frame.valid.tolist() for frame in memory.older] == [[True] * 5]


@torch.no_grad()
def test_a_batch_with_a_bad_first_frame_goes_on() -> None:
    model, good = model_of("warp"), drive(2, 2)
    _, memory = model(spoiled(good[0], 1, BAD["NaN"]))
    outputs, _ = model(good[1], memory)
    assert_same(values(outputs, 1), values(model(good[1])[0], 1))


def test_known_poses_look_at_pose_and_can_bus() -> None:
    frames = random_frames(4)
    assert known_poses(frames).tolist() == [True] * 4
    frames = spoiled(spoiled(drive(4, 1)[0], 1, BAD["NaN position"]), 2, BAD["off the Earth"])
    assert known_poses(frames).tolist() == [True, False, False, True]
    assert frames.can_bus is not None
    frames.can_bus[3, 17] = -math.inf
    assert known_poses(frames).tolist() == [True, False, False, False]


@pytest.mark.parametrize("side", ["current", "previous"])
@pytest.mark.parametrize("name", BAD)
def test_a_warp_with_a_bad_pose_covers_nothing_and_spares_the_others(name: str, side: str) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 2, 5, 7, generator=generator)
    current = torch.stack([planar_pose(3.0 + b, 1.0, 0.1 * b) for b in range(3)])
    previous = torch.stack([planar_pose(2.0 + b, 1.5, 0.2) for b in range(3)])
    wanted = [warp_bev(features[b : b + 1], GRID, current[b : b + 1], previous[b : b + 1]) for b in range(3)]
    (current if side == "current" else previous)[1] = BAD[name]
    warped, coverage = warp_bev(features, GRID, current, previous)
    for b in (0, 2):
        assert torch.equal(warped[b], wanted[b][0][0])
        assert torch.equal(coverage[b], wanted[b][1][0])
    if (side, name) != ("current", "zeros"):  # zeros times any pose is a place: the origin of the earlier map
        assert bool((coverage[1] == 0).all())
        assert bool((warped[1] == 0).all())
    assert bool(warped.isfinite().all())


def test_cells_that_are_no_numbers_are_outside() -> None:
    features = torch.ones(1, 1, 3, 4)
    cells = torch.tensor(
        [[1.0, 1.0], [math.nan, 1.0], [1.0, math.inf], [-math.inf, math.nan], [1e300, -1e300]]
    )
    samples, coverage = sample_bilinear(features, cells.double()[None, None])
    assert samples[0, 0, 0].tolist() == coverage[0, 0].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("angle", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_turn_by_no_angle_is_zeros_and_spares_the_others(angle: float, dtype: torch.dtype) -> None:
    features = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    angles = torch.tensor([30.0, angle, -75.0])
    turned = rotate_bev(features, angles, (3.5, 2.0))
    for b in (0, 2):
        assert torch.equal(turned[b], rotate_bev(features[b : b + 1], angles[b : b + 1], (3.5, 2.0))[0])
    assert bool((turned[1] == 0).all())


@pytest.mark.parametrize("name", BAD)
def test_another_view_of_a_bad_sample_spares_the_others(name: str) -> None:
    frames, later = drive(3, 2)
    wanted = seen_from(frames, later.bev_to_global).bev_to_image
    found = seen_from(spoiled(frames, 1, BAD[name]), later.bev_to_global).bev_to_image
    assert torch.equal(found[[0, 2]], wanted[[0, 2]])
    visible = ((found[1] > -1e12) & (found[1] < 1e12)).flatten(1).all(1)
    assert not bool(visible.any())
