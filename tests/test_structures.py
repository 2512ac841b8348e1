"""The travelling structures: moving, batching, forgetting."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

from bevperception.errors import SampleError
from bevperception.structures import (
    Batch,
    BEVMemory,
    Boxes3D,
    CameraFrames,
    DetectionOutputs,
    Targets,
    concatenate_frames,
    select,
)


def frames(
    batch: int = 1, cameras: int = 2, mask: bool = False, can_bus: bool = False, fill: float = 0.0
) -> CameraFrames:
    return CameraFrames(
        images=torch.full((batch, cameras, 3, 4, 6), fill),
        bev_to_image=torch.full((batch, cameras, 4, 4), fill),
        bev_to_global=torch.full((batch, 4, 4), fill, dtype=torch.float64),
        timestamps_s=torch.full((batch,), fill, dtype=torch.float64),
        camera_mask=torch.zeros(batch, cameras, dtype=torch.bool) if mask else None,
        can_bus=torch.full((batch, 18), fill, dtype=torch.float64) if can_bus else None,
    )


def boxes(count: int, scored: bool = True) -> Boxes3D:
    scores = torch.linspace(0.1, 0.9, count) if scored else None
    return Boxes3D(torch.arange(count * 9.0).reshape(count, 9), torch.arange(count), scores)


def test_boxes_are_counted_and_picked_by_slice_mask_and_index() -> None:
    all_boxes = boxes(4)
    assert len(all_boxes) == 4
    assert all_boxes.scores is not None
    for index in (slice(1, 3), torch.tensor([1, 2]), torch.tensor([False, True, True, False])):
        picked = all_boxes[index]
        assert picked.scores is not None
        assert picked.values[:, 0].tolist() == [9.0, 18.0]
        assert picked.labels.tolist() == [1, 2]
        torch.testing.assert_close(picked.scores, all_boxes.scores[1:3])
    assert boxes(3, scored=False)[:1].scores is None
    assert len(boxes(2)[:0]) == 0


def test_picked_boxes_keep_their_attributes() -> None:
    attributes = torch.tensor([3, -1, 0, 5])
    all_boxes = replace(boxes(4), attributes=attributes)
    for index in (slice(1, 3), torch.tensor([3, 0]), torch.tensor([False, True, True, False])):
        picked = all_boxes[index]
        assert picked.attributes is not None
        assert torch.equal(picked.attributes, attributes[index])
    assert boxes(2)[:1].attributes is None


def test_a_group_of_queries_keeps_its_own_validity() -> None:
    layers, batch, groups, queries = 2, 3, 2, 5
    shape = (layers, batch, groups * queries)
    generator = torch.Generator().manual_seed(0)
    valid = torch.rand(batch, groups * queries, generator=generator) > 0.5
    outputs = DetectionOutputs(
        torch.randn(*shape, 4, generator=generator),
        torch.randn(*shape, 10, generator=generator),
        groups,
        valid,
    )
    for index in range(groups):
        part, group = slice(index * queries, (index + 1) * queries), outputs.group(index)
        assert group.groups == 1
        assert torch.equal(group.class_logits, outputs.class_logits[:, :, part])
        assert torch.equal(group.box_codes, outputs.box_codes[:, :, part])
        assert group.valid is not None
        assert torch.equal(group.valid, valid[:, part])
    assert not torch.equal(valid[:, :queries], valid[:, queries:])
    assert replace(outputs, valid=None).group(1).valid is None


@pytest.mark.parametrize("scored", [False, True])
def test_boxes_of_several_samples_are_picked_as_one_by_one(scored: bool) -> None:
    samples = [boxes(count, scored) for count in (3, 0, 5, 1)]

    def odd(values: torch.Tensor) -> torch.Tensor:
        return values[:, 0] % 2 == 1

    for found, sample in zip(select(samples, odd), samples, strict=True):
        expected = sample[odd(sample.values)]
        torch.testing.assert_close(found.values, expected.values)
        assert found.labels.tolist() == expected.labels.tolist()
        assert (found.scores is None) == (not scored)
        if found.scores is not None and expected.scores is not None:
            torch.testing.assert_close(found.scores, expected.scores)
    assert select([], odd) == []


def test_moving_follows_lists_and_nested_structures_and_leaves_the_original() -> None:
    batch = Batch(
        history=[frames(), frames(mask=True)],
        history_valid=torch.ones(1, 2, dtype=torch.bool),
        frames=frames(can_bus=True),
        targets=Targets(boxes=[boxes(2)], segmentation=torch.zeros(1, 7, 4, 4)),
        tokens=["sample"],
        scene_tokens=["scene"],
    )
    moved = batch.to("meta")
    assert moved.targets is not None
    assert moved.targets.segmentation is not None
    tensors = [
        moved.history[1].camera_mask,
        moved.history[0].images,
        moved.frames.can_bus,
        moved.targets.boxes[0].scores,
        moved.targets.segmentation,
        moved.history_valid,
    ]
    assert all(t is not None and t.device.type == "meta" for t in tensors)
    assert moved.history[0].camera_mask is None
    assert (moved.tokens, moved.scene_tokens) == (["sample"], ["scene"])
    assert batch.frames.images.device.type == "cpu"
    assert type(moved.history[0]) is CameraFrames
    assert len(batch) == 1


def test_concatenated_frames_hold_each_in_its_place() -> None:
    joined = concatenate_frames([frames(1, fill=1.0), frames(2, fill=2.0)])
    assert joined.batch_size == 3
    assert joined.camera_mask is None
    assert joined.can_bus is None
    assert joined.timestamps_s.tolist() == [1.0, 2.0, 2.0]
    assert joined.bev_to_global.dtype == torch.float64
    assert joined.images[:, 0, 0, 0, 0].tolist() == [1.0, 2.0, 2.0]


def test_a_frame_without_mask_has_all_its_cameras_beside_one_with_a_mask() -> None:
    joined = concatenate_frames([frames(1, mask=True), frames(2)])
    assert joined.camera_mask is not None
    assert joined.camera_mask.tolist() == [[False, False], [True, True], [True, True]]


def test_can_bus_is_joined_if_all_have_it_and_refused_if_some_have() -> None:
    joined = concatenate_frames([frames(can_bus=True, fill=1.0), frames(can_bus=True, fill=2.0)])
    assert joined.can_bus is not None
    assert joined.can_bus[:, 0].tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="CAN-bus"):
        concatenate_frames([frames(can_bus=True), frames()])
    with pytest.raises(ValueError, match="at least one"):
        concatenate_frames([])


def test_memory_forgets_single_samples_and_cuts_gradients() -> None:
    features = torch.randn(3, 2, 4, 4, requires_grad=True)
    memory = BEVMemory(
        features=features * 1.0,
        bev_to_global=torch.eye(4, dtype=torch.float64).repeat(3, 1, 1),
        timestamps_s=torch.zeros(3, dtype=torch.float64),
        valid=torch.tensor([True, True, False]),
    )
    kept = memory.keep(torch.tensor([True, False, True]))
    assert kept.valid.tolist() == [True, False, False]
    assert memory.valid.tolist() == [True, True, False]
    assert kept.features is memory.features
    assert memory.features.requires_grad
    assert not memory.detach().features.requires_grad


def test_sample_error_crosses_processes_with_its_token() -> None:
    error = pickle.loads(pickle.dumps(SampleError("image is missing", "token-7")))
    assert isinstance(error, SampleError)
    assert (str(error), error.token) == ("image is missing", "token-7")
