"""The perspective head: assignment, losses, decoding, suppression of duplicates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bevperception.models.heads.focal_loss import sigmoid_focal_loss
from bevperception.models.heads.perspective.camera import (
    PinholeCameras,
    allocentric_frame,
    boxes_to_camera,
    image_rectangles,
)
from bevperception.models.heads.perspective.codec import (
    CANONICAL_SIZES_M,
    PerspectiveCodec,
    by_image,
    flatten,
)
from bevperception.models.heads.perspective.loss import (
    PerspectiveLoss,
    centreness_targets,
    iou_loss,
    single_precision_focal_loss,
)
from bevperception.models.heads.perspective.network import NetworkSettings, PerspectiveNetwork, locations
from bevperception.models.heads.perspective.proposals import ProposalRules, proposal_nms, propose
from bevperception.models.heads.perspective.targets import Assigner, ImageTargets, image_targets
from bevperception.structures import Boxes3D, PerspectiveOutputs
from bevperception.taxonomy import DETECTION_CLASSES
from tests.models.builders import camera_ring
from tests.models.perspective.scenes import SIZE, STRIDES, empty_levels, perfect_levels, ring, some_boxes

CODEC = PerspectiveCodec(torch.tensor([CANONICAL_SIZES_M[name] for name in DETECTION_CLASSES]).double())
ASSIGNER = Assigner(10, STRIDES, ((-1.0, 40.0), (40.0, 80.0), (80.0, float("inf"))), 1.5)


def fitting_boxes(count: int = 12) -> Boxes3D:
    """Boxes of sizes that the codec can express."""
    boxes = some_boxes(count, seed=5)
    sizes = CODEC.canonical_sizes_m[boxes.labels]
    boxes.values[:, 3:6] = sizes[:, [1, 0, 2]] * (0.7 + 0.05 * torch.arange(count).double()[:, None])
    return boxes


def targets_of(boxes: Boxes3D, cameras: PinholeCameras) -> list[ImageTargets]:
    return image_targets([boxes] * len(cameras.intrinsics), cameras, SIZE, 3)


def test_assignment_against_a_slow_one() -> None:
    cameras = ring()
    targets = targets_of(some_boxes(60, seed=1), cameras)
    assert sum(map(len, targets)) > 20
    places = locations(empty_levels(4), STRIDES)
    assigned = ASSIGNER(places, targets)
    row, first = 0, [0]
    for target in targets:
        first.append(first[-1] + len(target))
    for level, stride in enumerate(STRIDES):
        low, high = ASSIGNER.sizes_of_interest_px[level]
        for image, target in enumerate(targets):
            for x, y in places[level].tolist():
                best, area = None, float("inf")
                for k, (x0, y0, x1, y1) in enumerate(target.rectangles.tolist()):
                    sides = (x - x0, y - y0, x1 - x, y1 - y)
                    centred = max(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2)) < 1.5 * stride
                    size = (x1 - x0) * (y1 - y0)
                    if min(sides) > 0 and centred and low <= max(sides) <= high and size < area:
                        best, area = k, size
                expected = 10 if best is None else int(target.labels[best])
                assert int(assigned.labels[row]) == expected
                if best is not None:
                    assert int(assigned.objects[row]) == first[image] + best
                    assert int(assigned.images[row]) == image
                row += 1
    assert row == len(assigned.labels)
    assert len(assigned.positives) > 20


def test_what_is_hardly_in_the_image_is_no_target() -> None:
    """A box that leaves the image to the left, step by step: kept while enough of its rectangle shows."""
    seen = {0.0: [], 0.35: [], 0.8: []}
    camera = ring(1)
    shares = []
    for y in (0.0, 7.0, 7.5, 8.0, 8.5, 9.0, 9.3, 9.8, 14.0):
        boxes = Boxes3D(
            torch.tensor([[10.0, y, 1.0, 2.0, 2.0, 1.5, 0.0, 0.0, 0.0]]).double(), torch.tensor([4])
        )
        whole, _ = boxes_to_camera(boxes.values, camera)
        shares.append(float(image_rectangles(whole, camera.intrinsics, SIZE)[1]))
        for least, counts in seen.items():
            (target,) = image_targets([boxes], camera, SIZE, 3, 0.0, least)
            counts.append(len(target))
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    for least, counts in seen.items():
        assert counts[:-1] == [int(share >= least) for share in shares[:-1]], least
    assert sum(seen[0.8]) < sum(seen[0.35]) < sum(seen[0.0])


def test_perfect_predictions_cost_nothing_in_space_and_decode_to_the_truth() -> None:
    cameras = ring()
    boxes = fitting_boxes()
    targets = targets_of(boxes, cameras)
    assigned = ASSIGNER(locations(empty_levels(4), STRIDES), targets)
    levels = perfect_levels(assigned, targets, cameras, CODEC, 10)
    losses = PerspectiveLoss(CODEC)(flatten(levels), assigned, targets, torch.linalg.inv(cameras.intrinsics))
    for name in ("class", "box2d", "quaternion", "projected_centre", "depth", "size", "speed", "confidence"):
        assert float(losses[name]) < 1e-3, name
    outputs = PerspectiveOutputs(
        levels,
        [torch.zeros(4, 5, *level.class_logits.shape[-2:]).double() for level in levels],
        torch.arange(4),
        camera_ring(4, *SIZE),
        SIZE,
        (1, 4),
    )
    (found,) = propose(outputs, STRIDES, CODEC, ProposalRules(score_threshold=0.5, limit=100))
    objects = {int(o) for o in assigned.objects[assigned.positives]}
    assert len(objects) > 5
    for row, label in zip(found.boxes.values, found.boxes.labels, strict=True):
        distance = (boxes.values[:, :3] - row[:3]).norm(dim=-1)
        nearest = int(distance.argmin())
        assert distance[nearest] < 1e-4
        assert label == boxes.labels[nearest]
        torch.testing.assert_close(row[3:6], boxes.values[nearest, 3:6], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(row[7:9], boxes.values[nearest, 7:9], rtol=1e-4, atol=1e-4)
        assert (row[6] - boxes.values[nearest, 6]).sin().abs() < 1e-5
    # One box an object, although neighbouring cameras and many places see the same.
    centres = found.boxes.values[:, :2]
    assert (torch.cdist(centres, centres) + 10 * torch.eye(len(centres)) > 0.5).all()
    assert found.features.shape == (len(centres), 5)


def test_losses_without_ground_truth_and_without_images() -> None:
    head = PerspectiveNetwork(
        NetworkSettings(6, 10, STRIDES, (40, 20, 10), (20, 10, 5), norm="group")
    ).double()
    loss = PerspectiveLoss(CODEC)
    for images in (2, 0):
        features = [
            torch.randn(images, 6, *level.class_logits.shape[-2:]).double() for level in empty_levels(1)
        ]
        levels = head(features)
        none = some_boxes(3)[torch.zeros(0, dtype=torch.long)]
        cameras = ring()[torch.arange(images)]
        targets = targets_of(none, cameras)
        losses = loss(
            flatten(levels),
            ASSIGNER(locations(levels, STRIDES), targets),
            targets,
            torch.linalg.inv(cameras.intrinsics),
        )
        assert len(losses) == 10
        assert all(value.isfinite() for value in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())


def test_gradients_of_the_3d_terms() -> None:
    cameras = ring()
    targets = targets_of(fitting_boxes(), cameras)
    assigned = ASSIGNER(locations(empty_levels(4), STRIDES), targets)
    torch.manual_seed(0)
    levels = [level._map(lambda x: (x + 0.3 * torch.randn_like(x)).clamp(-3, 3)) for level in empty_levels(4)]
    fixed = flatten(levels)
    sizes = {"quaternion": 4, "centre": 2, "size": 3}
    names = [*sizes, "depth"]
    loss, inverse = PerspectiveLoss(CODEC, box3d_weight=1.0), torch.linalg.inv(cameras.intrinsics)
    places = assigned.positives[:4]
    few = type(assigned)(
        **{k: v[places] for k, v in vars(assigned).items() if k != "positives"}, positives=torch.arange(4)
    )

    def total(*parts: Tensor) -> Tensor:
        values = vars(fixed[places]) | dict(zip(names, parts, strict=True))
        found = loss(type(fixed)(**values), few, targets, inverse)
        return torch.stack([found[k] for k in ("quaternion", "projected_centre", "depth", "size")])

    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(4, sizes.get(name, 1), 10, generator=generator).double() for name in names]
    parts[3] = parts[3].abs() * 10 + 5
    assert torch.autograd.gradcheck(total, [p.requires_grad_() for p in parts], atol=1e-4)


def test_a_rotation_of_zeros_is_none_and_has_a_finite_gradient() -> None:
    """One NaN among the proposals would reach all object queries by self-attention."""
    predicted = flatten([level._map(torch.zeros_like) for level in empty_levels(1)])
    quaternion = predicted.quaternion.clone().requires_grad_()
    inverse = torch.linalg.inv(ring(1).intrinsics).expand(len(quaternion), 3, 3)
    labels = torch.zeros(len(quaternion), dtype=torch.long)
    places = torch.full((len(quaternion), 2), 7.0).double()
    boxes = CODEC.boxes(replace(predicted, quaternion=quaternion), labels, places, inverse)
    torch.testing.assert_close(boxes.rotation, allocentric_frame(boxes.centre_px, inverse))
    boxes.corners_m().square().sum().backward()
    assert quaternion.grad.isfinite().all()


def test_focal_loss_is_the_projects_own() -> None:
    logits, wanted = torch.randn(7, 3).double(), (torch.rand(7, 3) > 0.7).double()
    for alpha in (0.25, -1.0):
        own = sigmoid_focal_loss(logits, wanted, alpha, 2.0)
        torch.testing.assert_close(
            single_precision_focal_loss(logits, wanted, alpha, 2.0).double(), own, rtol=1e-5, atol=1e-6
        )


def test_iou_losses_and_centreness_by_hand() -> None:
    box = torch.tensor([[2.0, 3.0, 4.0, 1.0]]).double()
    other = torch.tensor([[1.0, 3.0, 2.0, 2.0]]).double()
    inter, union, hull = 3 * 4.0, 6 * 4 + 3 * 5 - 12.0, 6 * 5.0
    iou = (inter + 1) / (union + 1)
    torch.testing.assert_close(iou_loss(box, other, "linear_iou"), torch.tensor([1 - iou]).double())
    torch.testing.assert_close(iou_loss(box, other, "iou"), -torch.tensor([iou]).double().log())
    expected = 1 - (iou - (hull - union) / hull)
    torch.testing.assert_close(iou_loss(box, other, "giou"), torch.tensor([expected]).double())
    torch.testing.assert_close(centreness_targets(box), torch.tensor([(2 / 4 * 1 / 3) ** 0.5]).double())


def test_a_norm_of_every_levels_own_and_shared_convolutions() -> None:
    head = PerspectiveNetwork(NetworkSettings(8, 10, STRIDES, (40, 20, 10), (20, 10, 5))).eval()
    x = torch.randn(2, 8, 5, 7)
    with torch.no_grad():
        before = head([x, x, x])
        head.class_tower[0].norms[1].bias += 1.0
        after = head([x, x, x])
    same = [torch.equal(a.class_logits, b.class_logits) for a, b in zip(before, after, strict=True)]
    assert same == [True, False, True]


def test_orders_of_places_agree() -> None:
    levels = [level._map(lambda x: torch.randn_like(x)) for level in empty_levels(3)]
    level_first, image_first = flatten(levels), by_image(levels)
    counts = [len(p) for p in locations(levels, STRIDES)]
    row = sum(3 * c for c in counts[:1]) + 2 * counts[1] + 5  # level 1, image 2, place 5
    assert torch.equal(level_first.class_logits[row], image_first.class_logits[2, counts[0] + 5])
    assert torch.equal(level_first.size[row], image_first.size[2, counts[0] + 5])


def test_doubles_are_suppressed_within_images_and_over_cameras() -> None:
    rectangle = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [1, 0, 11, 10], [50, 50, 60, 60], [0, 0, 10, 10.0]])
    values = np.zeros((5, 9))
    values[:, 3] = 4.0
    values[:, 0] = [10.0, 30.0, 50.0, 11.0, 70.0]
    images, labels = np.array([0.0, 0, 1, 1, 0]), np.array([0.0, 0, 0, 0, 3])
    # 1 overlaps 0 in its image; 3 stands a metre from 0, seen by another camera; 4 is of another class.
    assert proposal_nms(rectangle, values, images, labels, ProposalRules(0.05, 100)).tolist() == [0, 2, 4]
    assert proposal_nms(rectangle, values, images, labels, ProposalRules(0.05, 2)).tolist() == [0, 2]
    nothing = np.zeros(0)
    assert proposal_nms(rectangle[:0], values[:0], nothing, nothing, ProposalRules(0.05, 100)).tolist() == []
