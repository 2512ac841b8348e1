"""The whole model: batches, missing cameras, camera order, memory."""

from __future__ import annotations

import pytest
import torch

from bevperception.config_model import DetectionConfig, ModelConfig, SegmentationConfig
from bevperception.errors import ConfigError
from bevperception.models.bevformer import BEVFormer
from bevperception.structures import Boxes3D, CameraFrames, ModelOutputs, Targets
from tests.models.builders import random_frames, take, tiny_config, tiny_model


def assert_same(a: ModelOutputs, b: ModelOutputs, tolerance: float = 1e-9) -> None:
    for x, y in (
        (a.bev, b.bev),
        (a.detection.class_logits, b.detection.class_logits),
        (a.detection.box_codes, b.detection.box_codes),
        (a.segmentation_logits, b.segmentation_logits),
    ):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def select(outputs: ModelOutputs, index: int) -> ModelOutputs:
    detection = outputs.detection._map(lambda t: t[:, index : index + 1])
    return ModelOutputs(
        outputs.bev[index : index + 1], detection, outputs.segmentation_logits[index : index + 1]
    )


@torch.no_grad()
def test_batch_equals_singles_with_memory() -> None:
    model = tiny_model()
    first, second = random_frames(3, seed=0), random_frames(3, seed=1)
    _, memory = model(first)
    outputs, _ = model(second, memory)
    for b in range(3):
        _, single_memory = model(take(first, b))
        single, _ = model(take(second, b), single_memory)
        assert_same(select(outputs, b), single)


@torch.no_grad()
def test_samples_without_history_in_a_batch_with_history() -> None:
    model = tiny_model()
    first, second = random_frames(2, seed=0), random_frames(2, seed=1)
    _, memory = model(first)
    memory.features[1] = float("nan")  # whatever a forgotten sample holds must not leak
    memory.bev_to_global[1] = float("nan")
    outputs, _ = model(second, memory.keep(torch.tensor([True, False])))
    fresh, _ = model(take(second, 1))
    assert_same(select(outputs, 1), fresh)
    _, kept = model(take(first, 0))
    expected, _ = model(take(second, 0), kept)
    assert_same(select(outputs, 0), expected)


@torch.no_grad()
def test_memory_matters_and_is_not_hidden() -> None:
    model = tiny_model()
    first, second = random_frames(1, seed=0), random_frames(1, seed=1)
    before, memory = model(second)
    _, memory = model(first)
    with_memory, _ = model(second, memory)
    after, _ = model(second)
    assert_same(before, after)
    assert (with_memory.bev - after.bev).abs().max() > 1e-3


@torch.no_grad()
def test_masked_camera_is_as_if_not_there() -> None:
    model = tiny_model()
    frames = random_frames(2, cameras=4)
    for missing in range(4):
        mask = torch.ones(2, 4, dtype=torch.bool)
        mask[:, missing] = False
        images, matrices = frames.images.clone(), frames.bev_to_image.clone()
        images[:, missing], matrices[:, missing] = float("nan"), float("nan")
        masked = CameraFrames(images, matrices, frames.bev_to_global, frames.timestamps_s, mask)
        others = [n for n in range(4) if n != missing]
        without = CameraFrames(
            frames.images[:, others],
            frames.bev_to_image[:, others],
            frames.bev_to_global,
            frames.timestamps_s,
        )
        assert_same(model(masked)[0], model(without)[0], 1e-12)


@torch.no_grad()
def test_different_cameras_missing_in_one_batch_and_all_missing() -> None:
    model = tiny_model()
    frames = random_frames(3, cameras=3)
    frames.camera_mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    outputs, _ = model(frames)
    for b in range(3):
        assert_same(select(outputs, b), model(take(frames, b))[0])
    frames.camera_mask = torch.zeros(3, 3, dtype=torch.bool)
    blind, _ = model(frames)
    assert blind.bev.isfinite().all()
    torch.testing.assert_close(blind.bev[0], blind.bev[2])


def test_gradients_stay_finite_with_a_masked_broken_camera() -> None:
    model = tiny_model()
    frames = random_frames(1)
    frames.images[:, 1] = float("inf")
    frames.camera_mask = torch.tensor([[True, False, True]])
    outputs, _ = model(frames)
    outputs.bev.sum().backward()
    gradients = [p.grad for p in model.backbone.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)


@torch.no_grad()
def test_camera_order_does_not_matter() -> None:
    model = tiny_model()
    frames = random_frames(2, cameras=4)
    order = [2, 0, 3, 1]
    shuffled = CameraFrames(
        frames.images[:, order], frames.bev_to_image[:, order], frames.bev_to_global, frames.timestamps_s
    )
    assert_same(model(frames)[0], model(shuffled)[0])


@torch.no_grad()
def test_non_contiguous_images_and_float32() -> None:
    model = tiny_model(dtype=torch.float32)
    frames = random_frames(2, dtype=torch.float32)
    expected, _ = model(frames)
    frames.images = frames.images.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    assert not frames.images.is_contiguous()
    assert_same(model(frames)[0], expected, 1e-5)


def test_only_one_head() -> None:
    frames = random_frames(1)
    config = tiny_config()
    config.segmentation.enabled = False
    outputs, _ = tiny_model(config)(frames)
    assert outputs.segmentation_logits is None
    assert outputs.detection is not None
    config = tiny_config()
    config.detection.enabled = False
    model = tiny_model(config)
    outputs, _ = model(frames)
    assert outputs.detection is None
    assert [len(b) for b in model.decode(outputs)] == [0]
    with pytest.raises(ConfigError, match="nothing to predict"):
        ModelConfig(detection=DetectionConfig(enabled=False), segmentation=SegmentationConfig(enabled=False))


def test_losses_without_boxes_and_without_map() -> None:
    model = tiny_model()
    outputs, _ = model(random_frames(2))
    none = Boxes3D(torch.zeros(0, 9).double(), torch.zeros(0, dtype=torch.long))
    maps = torch.full_like(outputs.segmentation_logits, float("nan"))
    present = torch.zeros(2, 7, dtype=torch.bool)
    losses = model.losses(outputs, Targets([none, none], maps, present))
    assert all(value.isfinite() for value in losses.values())
    assert losses["segmentation.focal"] == 0
    assert losses["segmentation.dice"] == 0
    assert losses["detection.box"] == 0
    assert losses["detection.class"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_losses_split_over_processes_add_up() -> None:
    """Each process divides by the mean count over processes; the mean over them is the whole batch's loss."""
    model = tiny_model()
    frames = random_frames(2)
    generator = torch.Generator().manual_seed(3)
    counts = (4, 1)
    boxes = [
        Boxes3D(torch.rand(n, 9, generator=generator).double() * 5 + 0.5, torch.arange(n)) for n in counts
    ]
    maps = (torch.rand(2, 7, 10, 10, generator=generator) > 0.5).double()
    present = torch.ones(2, 7, dtype=torch.bool)
    present[0, :3] = False
    whole = model.losses(model(frames)[0], Targets(boxes, maps, present))
    means = iter([torch.tensor(2.5).double(), torch.tensor(5.5).double()] * 2)
    parts = [
        model.losses(
            model(take(frames, b))[0],
            Targets(boxes[b : b + 1], maps[b : b + 1], present[b : b + 1]),
            lambda _: next(means),
        )
        for b in range(2)
    ]
    for name, value in whole.items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2, msg=name)


def test_camera_embedding_needs_enough_rows() -> None:
    model = tiny_model(tiny_config(camera_embedding=2))
    with pytest.raises(ValueError, match="embeddings for 2 cameras but got 3"):
        model(random_frames(1, cameras=3))


@torch.no_grad()
def test_published_alignment_needs_can_bus() -> None:
    model = tiny_model(tiny_config(alignment="published"))
    frames = random_frames(1)
    _, memory = model(frames)
    with pytest.raises(ValueError, match="needs the CAN-bus vector"):
        model(frames, memory)
    frames.can_bus = torch.randn(1, 18, dtype=torch.float64)
    _, memory = model(frames)
    outputs, _ = model(frames, memory)
    assert outputs.bev.isfinite().all()


def test_gradient_flows_through_current_frame_only_when_detached() -> None:
    model = tiny_model()
    first, second = random_frames(1, seed=0), random_frames(1, seed=1)
    first.images.requires_grad_()
    second.images.requires_grad_()
    _, memory = model(first)
    model(second, memory.detach())[0].bev.sum().backward()
    assert first.images.grad is None
    assert second.images.grad.abs().max() > 0
    model(second, memory)[0].bev.sum().backward()
    assert first.images.grad.abs().max() > 0


def test_unknown_backbone_is_a_config_error() -> None:
    config = tiny_config()
    config.backbone.variant = "internimage_q"
    with pytest.raises(ConfigError, match="internimage_q"):
        BEVFormer(config)


def test_boxes_beyond_the_grid_are_no_ground_truth() -> None:
    model = tiny_model()
    outputs, _ = model(random_frames(1))
    maps, present = torch.zeros(1, 7, 10, 10).double(), torch.ones(1, 7, dtype=torch.bool)
    boxes = torch.tensor([[5.0, -7, 0, 4, 2, 1.5, 0.3, 1, 0]] * 3, dtype=torch.float64)
    boxes[1, 0], boxes[2, 1] = 51.3, -60.0
    labels = torch.tensor([0, 1, 2])
    with_far = model.losses(outputs, Targets([Boxes3D(boxes, labels)], maps, present))
    without = model.losses(outputs, Targets([Boxes3D(boxes[:1], labels[:1])], maps, present))
    for name, value in without.items():
        torch.testing.assert_close(with_far[name], value, msg=name)
    assert without["detection.box"] > 0


@torch.no_grad()
def test_autocast_keeps_centres_to_centimetres() -> None:
    model = tiny_model(dtype=torch.float32)
    frames = random_frames(1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, _ = model(frames)
    codes = outputs.detection.box_codes
    assert codes.dtype == torch.float32
    exact = model(frames)[0].detection.box_codes
    # What is left comes from bfloat16 inside the layers, not from rounding centres to its 0.25 m steps.
    assert (codes - exact)[..., [0, 1, 4]].abs().mean() < 0.1
    assert not torch.equal(codes, codes.bfloat16().float())


def test_each_attention_starts_within_its_own_reach() -> None:
    config = tiny_config(initial_reach_cells=1.5, initial_temporal_reach_cells=3.0)
    model = BEVFormer(config)
    layer = model.bev_transformer.encoder.layers[0]
    decoder = model.detection.decoder.layers[0]
    attentions = (layer.spatial_attention, layer.temporal_attention, decoder.cross_attention)
    reached = [attention.sampling_offsets.bias.abs().max().item() for attention in attentions]
    assert reached == pytest.approx([1.5, 3.0, 1.5])
    published = BEVFormer(tiny_config()).bev_transformer.encoder.layers[0].temporal_attention
    assert published.sampling_offsets.bias.abs().max().item() == pytest.approx(published.points)
