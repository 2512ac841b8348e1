"""Box codes, matching, losses and decoding."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bevperception.config_model import BEVConfig, DetectionConfig
from bevperception.models.heads.box_code import BoxCodec, flip_yaw_convention
from bevperception.models.heads.detection import DetectionHead, decode_detections
from bevperception.models.heads.detection_loss import DetectionLoss
from bevperception.models.heads.focal_loss import sigmoid_focal_loss
from bevperception.models.heads.matching import assign_all, matching_cost
from bevperception.models.heads.segmentation import SegmentationLoss
from bevperception.structures import Boxes3D, DetectionOutputs
from tests.angles import wrap_angle

EVERYWHERE = (-1e9, -1e9, -1e9, 1e9, 1e9, 1e9)


def random_boxes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.randn(count, 9, generator=generator, dtype=torch.float64) * 3
    boxes[:, 3:6] = boxes[:, 3:6].abs() + 0.2
    return boxes


@pytest.mark.parametrize("convention", ["standard", "mmdet3d_0.17"])
def test_codec_round_trip(convention: str) -> None:
    boxes = random_boxes(33)
    back = BoxCodec(convention).decode(BoxCodec(convention).encode(boxes))
    torch.testing.assert_close(wrap_angle(back[:, 6]), wrap_angle(boxes[:, 6]))
    rest = [0, 1, 2, 3, 4, 5, 7, 8]
    torch.testing.assert_close(back[:, rest], boxes[:, rest])


def test_published_yaw_convention() -> None:
    assert flip_yaw_convention(torch.tensor(0.0)) == pytest.approx(-math.pi / 2)
    yaw = torch.randn(9, dtype=torch.float64)
    torch.testing.assert_close(flip_yaw_convention(flip_yaw_convention(yaw)), yaw)


@settings(max_examples=30, deadline=None)
@given(queries=st.integers(0, 5), truths=st.integers(0, 5), seed=st.integers(0, 1000))
def test_assignment_is_the_cheapest(queries: int, truths: int, seed: int) -> None:
    cost = torch.rand(queries, truths, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows, columns = assign_all(cost[None, None], [cost.shape[1]])[:, 2:].T
    count = min(queries, truths)
    assert len(rows) == len(columns) == count
    small, large = (queries, truths) if queries <= truths else (truths, queries)
    table = cost if queries <= truths else cost.T
    best = min(
        sum(float(table[i, p]) for i, p in enumerate(choice))
        for choice in itertools.permutations(range(large), small)
    )
    assert float(cost[rows, columns].sum()) == pytest.approx(best)


@given(seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=30, deadline=None)
def test_assignment_of_predictions_with_holes_between_them(seed: int, data: st.DataObject) -> None:
    """As that of the predictions that take part alone."""
    masks = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=3, max_size=3)
    valid = np.array(data.draw(masks))
    counts = data.draw(st.lists(st.integers(0, 4), min_size=3, max_size=3))
    cost = torch.rand(2, 3, 6, 4, generator=torch.Generator().manual_seed(seed))
    found = {tuple(row) for row in assign_all(cost, counts, valid).tolist()}
    expected = set()
    for sample, there in enumerate(valid):
        places = there.nonzero()[0]
        alone = assign_all(cost[:, sample : sample + 1, places], [counts[sample]])
        expected |= {(s, sample, int(places[query]), truth) for s, _, query, truth in alone.tolist()}
    assert found == expected


def test_assignment_survives_non_finite_costs() -> None:
    cost = torch.tensor([[float("nan"), 1.0], [2.0, float("inf")]])
    rows, columns = assign_all(cost[None, None], [cost.shape[1]])[:, 2:].T
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 1), (1, 0)]


def test_matching_ignores_velocity() -> None:
    logits, codes = torch.zeros(3, 10), torch.randn(3, 10)
    targets = codes[[2, 0]].clone()
    targets[:, 8:] = float("nan")
    cost = matching_cost(logits, codes, torch.tensor([1, 4]), targets, 2.0, 0.25)
    assert cost.isfinite().all()
    rows, columns = assign_all(cost[None, None], [cost.shape[1]])[:, 2:].T
    assert dict(zip(rows.tolist(), columns.tolist(), strict=True)) == {2: 0, 0: 1}


@pytest.mark.parametrize("alpha", [0.25, -1.0])
def test_focal_loss_against_its_formula(alpha: float) -> None:
    logits = torch.linspace(-6, 6, 25, dtype=torch.float64)
    for target in (0.0, 1.0):
        loss = sigmoid_focal_loss(logits, torch.full_like(logits, target), alpha, 2.0)
        for x, value in zip(logits.tolist(), loss.tolist(), strict=True):
            p = 1 / (1 + math.exp(-x))
            true = p if target else 1 - p
            balance = 1.0 if alpha < 0 else (alpha if target else 1 - alpha)
            assert value == pytest.approx(-balance * (1 - true) ** 2 * math.log(true), rel=1e-9)


def make_loss(**changes: object) -> DetectionLoss:
    return DetectionLoss(BoxCodec(), 0.25, 0.25, [1.0] * 8 + [0.2, 0.2], **changes)


def test_perfect_boxes_have_no_box_loss() -> None:
    boxes = random_boxes(5)
    codes = BoxCodec().encode(boxes)[None, None]
    truth = [Boxes3D(boxes, torch.arange(5))]
    losses = make_loss()(DetectionOutputs(torch.zeros(1, 1, 5, 10).double(), codes), truth, lambda x: x)
    assert losses["box"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("holes", [False, True])
def test_more_truths_than_queries(holes: bool) -> None:
    """Losses are divided by the pairs that there are: two of five truths, and one of one."""
    boxes = random_boxes(5)
    truth = [Boxes3D(boxes, torch.arange(5)), Boxes3D(boxes[3:4], torch.tensor([7]))]
    codes = BoxCodec().encode(boxes[[1, 3, 3, 0]]).view(1, 2, 2, 10) + 0.25
    valid = None
    if holes:  # padding before, between and after
        codes = codes[:, :, [0, 0, 1, 1, 1]]
        valid = torch.tensor([[False, True, False, True, False], [True, False, True, False, False]])
        codes[:, ~valid] = 1e6
    logits = torch.zeros(*codes.shape[:3], 10).double()
    losses = make_loss()(DetectionOutputs(logits, codes, 1, valid), truth, lambda x: x)
    assert float(losses["box"]) == pytest.approx(0.25 * 0.25 * (8 + 2 * 0.2))
    # A probability of a half for each of four queries' ten classes, three of which are right.
    focal = 0.25 * math.log(2)
    assert float(losses["class"]) == pytest.approx(2.0 * focal * (3 * 0.25 + 37 * 0.75) / 3)


def test_smooth_box_loss_by_hand() -> None:
    """Half the square over beta below beta, beta / 2 below the difference above it."""
    boxes = random_boxes(1)
    codes = BoxCodec().encode(boxes)[None, None].clone()
    codes[..., 0] += 0.3
    codes[..., 1] -= 0.4
    codes[..., 4] += 2.0
    codes[..., 9] -= 0.1
    loss = make_loss(smooth=True, smooth_beta=0.4)
    found = loss(
        DetectionOutputs(torch.zeros(1, 1, 1, 10).double(), codes),
        [Boxes3D(boxes, torch.tensor([2]))],
        lambda x: x,
    )
    expected = 0.5 * 0.09 / 0.4 + 0.2 + 1.8 + 0.2 * 0.5 * 0.01 / 0.4
    assert float(found["box"]) == pytest.approx(0.25 * expected)


@pytest.mark.parametrize("keep", [False, True])
def test_unknown_velocity(keep: bool) -> None:
    boxes = random_boxes(2)
    codes = (BoxCodec().encode(boxes) + 1.0)[None, None].requires_grad_()
    boxes[0, 7:] = float("nan")
    outputs = DetectionOutputs(torch.zeros(1, 1, 2, 10).double(), codes)
    loss = make_loss(keep_unknown_velocity=keep)(outputs, [Boxes3D(boxes, torch.arange(2))], lambda x: x)[
        "box"
    ]
    entries = 8 + 2 * 0.2
    assert float(loss.detach()) == pytest.approx(0.25 * (entries + (8 if keep else 0)) / 2)
    loss.backward()
    assert codes.grad.isfinite().all()
    assert (codes.grad[0, 0, 0, 8:] == 0).all()
    assert bool((codes.grad[0, 0, 0, :8] != 0).all()) == keep


def test_segmentation_loss_counts_only_present_classes() -> None:
    torch.manual_seed(0)
    loss = SegmentationLoss(2.0, 3.0)
    logits = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    targets = (torch.rand(2, 3, 5, 7) > 0.5).double()
    present = torch.tensor([[True, False, True], [False, False, True]])
    found = loss(logits, targets, present, lambda x: x)
    focal = dice = 0.0
    for b, c in present.nonzero().tolist():
        p, t = logits[b, c].sigmoid(), targets[b, c]
        focal += float((-(t * p.log() * (1 - p) ** 2 + (1 - t) * (1 - p).log() * p**2)).mean()) / 3
        dice += float(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)) / 3
    assert float(found["focal"].detach()) == pytest.approx(2 * focal)
    assert float(found["dice"].detach()) == pytest.approx(3 * dice)
    sum(found.values()).backward()
    assert (logits.grad[~present] == 0).all()
    assert (logits.grad[present].abs().sum((-1, -2)) > 0).all()


def test_decoding_takes_the_best_pairs_in_order_and_within_range() -> None:
    logits = torch.full((4, 3), -9.0)
    logits[0, 1], logits[2, 2], logits[3, 0], logits[2, 0] = 2.0, 3.0, 1.0, 2.5
    boxes = random_boxes(4).float()
    boxes[3, 0] = 100.0
    codes = BoxCodec().encode(boxes)
    decoded = decode_detections(logits, codes, BoxCodec(), 4, (-50, -50, -50, 50, 50, 50))
    assert decoded.labels.tolist() == [2, 0, 1]
    torch.testing.assert_close(decoded.values[:, :3], boxes[[2, 2, 0], :3])
    assert decoded.scores.tolist() == sorted(decoded.scores.tolist(), reverse=True)
    assert len(decode_detections(logits[:0], codes[:0], BoxCodec(), 4, EVERYWHERE)) == 0


def test_decoding_keeps_centres_within_the_range_on_every_axis() -> None:
    limits = (-50.0, -40.0, -3.0, 45.0, 35.0, 2.0)
    middle = torch.tensor([1.0, -2.0, 0.5])
    centres = [middle]
    for axis in range(3):
        for limit, outwards in ((limits[axis], -1.0), (limits[3 + axis], 1.0)):
            for off in (0.0, 0.25 * outwards):  # on the limit, which counts as within, and beyond it
                centre = middle.clone()
                centre[axis] = limit + off
                centres.append(centre)
    boxes = random_boxes(len(centres)).float()
    boxes[:, :3] = torch.stack(centres)
    logits = torch.linspace(3, -3, len(centres))[:, None]
    decoded = decode_detections(logits, BoxCodec().encode(boxes), BoxCodec(), 99, limits)
    within = [0, *range(1, len(centres), 2)]
    torch.testing.assert_close(decoded.values[:, :3], boxes[within, :3], rtol=0, atol=0)


def test_head_starts_from_the_prior_and_inside_its_range() -> None:
    torch.manual_seed(0)
    limits = (-20.0, -10.0, -5.0, 30.0, 15.0, 3.0)
    bev = BEVConfig(
        channels=16,
        heads=2,
        feedforward_channels=16,
        x_range_m=(-20.0, 30.0),
        y_range_m=(-10.0, 15.0),
        z_range_m=(-5.0, 3.0),
    )
    head = DetectionHead(settings=DetectionConfig(queries=7, layers=1), bev=bev)
    outputs = head(torch.randn(2, 16, 3, 5))
    assert outputs.class_logits.shape == (1, 2, 7, 10)
    assert float(outputs.class_logits.detach().sigmoid().mean()) == pytest.approx(0.01, abs=0.02)
    centres = outputs.box_codes[..., [0, 1, 4]]
    assert (centres > torch.tensor(limits[:3])).all()
    assert (centres < torch.tensor(limits[3:])).all()
