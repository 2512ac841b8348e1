"""Random padding of images in training (``augmentation.padding_px``)."""

from __future__ import annotations

import torch

from bevperception.config import AugmentationConfig, ExperimentConfig, TrainingConfig
from bevperception.data.dataset import collate
from bevperception.structures import Batch
from bevperception.training.module import TrainingModule, padded
from tests.training.standin import TinyModel, TinySource


def queue(index: int) -> Batch:
    batch = TinySource(history=2)[index, 0]
    assert isinstance(batch, Batch)
    return batch


def batch_of_two() -> Batch:
    joint = collate([queue(1), queue(2)])
    assert isinstance(joint, Batch)
    return joint


def test_all_frames_of_a_batch_are_padded_at_the_bottom_and_the_right() -> None:
    batch = batch_of_two()
    wide = padded(batch, bottom=3, right=5)
    for frames, other in zip((*wide.history, wide.frames), (*batch.history, batch.frames), strict=True):
        height, width = other.images.shape[-2:]
        assert tuple(frames.images.shape[-2:]) == (height + 3, width + 5)
        assert torch.equal(frames.images[..., :height, :width], other.images)
        assert not frames.images[..., height:, :].any()
        assert not frames.images[..., width:].any()
        assert frames.bev_to_image is other.bev_to_image


def test_half_of_the_steps_are_padded_on_each_side_and_a_step_draws_the_same_again() -> None:
    micro_batches = 200
    config = ExperimentConfig(
        augmentation=AugmentationConfig(padding_px=4), training=TrainingConfig(accumulate=micro_batches)
    )
    batch = queue(1)
    height, width = batch.frames.images.shape[-2:]

    def added() -> list[tuple[int, int]]:
        module = TrainingModule(config, TinyModel())
        shapes = [module.pad_at_random(batch, index).frames.images.shape for index in range(micro_batches)]
        return [(shape[-2] - height, shape[-1] - width) for shape in shapes]

    draws = added()
    assert draws == added()
    for side in zip(*draws, strict=True):
        assert set(side) == {0, 1, 2, 3, 4}
        assert 0.4 < sum(pixels == 0 for pixels in side) / micro_batches < 0.7
    assert len({(bottom > 0, right > 0) for bottom, right in draws}) == 4
