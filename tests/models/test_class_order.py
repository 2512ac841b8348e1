"""The order of a head's classes belongs to its weights: everything after the head has the right names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bevperception.config_io import load_config
from bevperception.config_model import DetectionConfig, ModelConfig, PerspectiveConfig
from bevperception.errors import ConfigError
from bevperception.evaluation.submission import submission_boxes
from bevperception.inference import StreamingPredictor
from bevperception.models.bevformer import BEVFormer
from bevperception.models.heads.detection import DetectionHead
from bevperception.models.heads.perspective.head import PerspectiveHead
from bevperception.streaming import conversions
from bevperception.structures import Boxes3D, Targets
from bevperception.taxonomy import DETECTION_CLASSES
from bevperception.visualization import cameras
from bevperception.visualization.bev import BEVView, render_bev
from bevperception.visualization.palette import DETECTION_COLOURS
from tests.models.builders import random_frames, tiny_config, tiny_model
from tests.models.perspective.scenes import STRIDES
from tests.visualization.test_cameras import forward_camera

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ALPHABETICAL = tuple(sorted(DETECTION_CLASSES))
"""``class_names`` of the published BEVFormer v2 configurations (bevformerv2-r50-t1-base-24ep.py)."""
IDENTITY = torch.eye(4, dtype=torch.float64)


def config_with(classes: tuple[str, ...]) -> ModelConfig:
    config = tiny_config()
    return replace(config, detection=replace(config.detection, classes=classes))


def firing(column: int) -> BEVFormer:
    """A model whose head scores one column of its classifiers alone, with boxes of 5 m a side."""
    model = tiny_model(config_with(ALPHABETICAL), dtype=torch.float32)
    assert model.detection is not None
    for classifier, regressor in zip(model.detection.classification, model.detection.regression, strict=True):
        torch.nn.init.zeros_(classifier[-1].weight)
        torch.nn.init.constant_(classifier[-1].bias, -9.0)
        classifier[-1].bias.data[column] = 2.0
        torch.nn.init.zeros_(regressor[-1].weight)
        regressor[-1].bias.data[[2, 3, 5]] = 1.6
    return model


@pytest.mark.parametrize("column", range(10))
def test_a_columns_name_reaches_submission_picture_and_message(column: int) -> None:
    name = ALPHABETICAL[column]
    predictor = StreamingPredictor(firing(column))
    (boxes,) = predictor.decode(predictor.observe(random_frames(1, dtype=torch.float32), "scene"))
    assert len(boxes) == 9
    entries = submission_boxes(boxes, IDENTITY, "token")
    assert {entry["detection_name"] for entry in entries} == {name}
    assert {found.class_name for found in conversions.detections(boxes)} == {name}
    assert set(conversions.object_rows(boxes)[:, -1]) == {DETECTION_CLASSES.index(name)}
    assert len(conversions.select(boxes, 0.5, (name,))) == 9
    assert len(conversions.select(boxes, 0.0, tuple(set(DETECTION_CLASSES) - {name}))) == 0
    # One box ahead of a camera; its lines and, in the cameras, its score have the colour of the class.
    values = torch.tensor([[12.0, 0.0, 0.0, 4.0, 4.0, 3.0, 0.2, 0.0, 0.0]])
    shown = Boxes3D(values, boxes.labels[:1], boxes.scores[:1])
    camera = np.zeros((90, 160, 3), np.uint8)
    cameras.draw_boxes(camera, shown, forward_camera())
    for picture in (render_bev(BEVView(200, 200, 20.0), shown), camera):
        there = {n for n, c in DETECTION_COLOURS.items() if (picture == np.array(c)).all(-1).sum() > 5}
        assert there == {name}


@pytest.mark.parametrize(
    "classes", [ALPHABETICAL, DETECTION_CLASSES, DETECTION_CLASSES[3:] + DETECTION_CLASSES[:3]]
)
def test_ground_truth_pulls_at_the_column_of_its_name(classes: tuple[str, ...]) -> None:
    # Random weights, so that no logit is special; the head alone, for speed.
    torch.manual_seed(0)
    config = config_with(classes)
    head = DetectionHead(settings=config.detection, bev=config.bev).double().train()
    outputs = head(torch.randn(1, 32, 9, 7, dtype=torch.float64))
    row = torch.tensor([[10.0, 0.5, 0, 4, 2, 1.5, 0.3, 1, 0]], dtype=torch.float64)
    bias = head.classification[-1][-1].bias
    for label, name in enumerate(DETECTION_CLASSES):
        targets = Targets([Boxes3D(row, torch.tensor([label]))])
        found = head.losses(outputs, targets, lambda x: x)["class"]
        (gradient,) = torch.autograd.grad(found, bias, retain_graph=True)
        (pulled,) = (gradient < 0).nonzero().flatten().tolist()
        assert classes[pulled] == name


@torch.no_grad()
def test_the_order_is_a_matter_of_the_classifiers_rows_alone() -> None:
    house = tiny_model(config_with(DETECTION_CLASSES))
    other = tiny_model(config_with(ALPHABETICAL))
    rows = [DETECTION_CLASSES.index(name) for name in ALPHABETICAL]
    for classifier in other.detection.classification:
        classifier[-1].weight.copy_(classifier[-1].weight[rows])
        classifier[-1].bias.copy_(torch.arange(10.0)[rows] / 10)
    for classifier in house.detection.classification:
        classifier[-1].bias.copy_(torch.arange(10.0) / 10)
    assert other.state_dict().keys() == house.state_dict().keys()
    frames = random_frames(2)
    expected, found = house(frames)[0], other(frames)[0]
    torch.testing.assert_close(found.detection.class_logits, expected.detection.class_logits, rtol=0, atol=0)
    for one, two in zip(house.decode(expected), other.decode(found), strict=True):
        assert one.labels.tolist() == two.labels.tolist()


@pytest.mark.parametrize("setting", [DetectionConfig, PerspectiveConfig])
def test_an_order_that_is_none_is_refused(setting: type) -> None:
    for classes, wrong in (
        (DETECTION_CLASSES[1:], "missing: car"),
        ((*DETECTION_CLASSES[1:], "truck"), "missing: car; twice: truck"),
        ((*DETECTION_CLASSES, "horse"), "unknown: horse"),
        ((), "missing: car, truck"),
    ):
        with pytest.raises(ConfigError, match=rf"classes must hold each of car, .* once; {wrong}"):
            setting(classes=classes)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_published_v2_configurations_have_the_published_order(path: Path) -> None:
    model = load_config(path).model
    published = path.stem.startswith("bevformer_v2_") and path.stem != "bevformer_v2_world"
    wanted = ALPHABETICAL if published else DETECTION_CLASSES
    assert model.detection.classes == model.perspective.classes == wanted


def test_proposals_have_the_projects_labels() -> None:
    torch.manual_seed(0)
    settings = PerspectiveConfig(enabled=True, classes=ALPHABETICAL, norm="none")
    head = PerspectiveHead(settings=settings, in_channels=8, strides=STRIDES)
    frames = random_frames(1, size=(128, 224), dtype=torch.float32)
    sizes = [(-(-128 // s), -(-224 // s)) for s in STRIDES]
    features = [torch.randn(1, 3, 8, *size) for size in sizes]
    for column, name in enumerate(ALPHABETICAL):
        with torch.no_grad():
            head.head.class_logits.weight.zero_()
            head.head.class_logits.bias.fill_(-9.0)[column] = 9.0
            (found,) = head.proposals(head(features, frames))
        assert len(found.boxes) > 3
        assert {DETECTION_CLASSES[label] for label in found.boxes.labels.tolist()} == {name}
