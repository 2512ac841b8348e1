"""BEVFormer v2 as settings of the model: hybrid queries, groups, the first stage alone, odd input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bevperception.config_model import (
    BEVConfig,
    DetectionConfig,
    ModelConfig,
    PerspectiveConfig,
    TemporalConfig,
)
from bevperception.errors import ConfigError
from bevperception.models.bevformer import BEVFormer
from bevperception.models.build import build_model
from bevperception.models.heads.decoder import DecoderLayer
from bevperception.models.heads.hybrid import HybridQueries
from bevperception.models.heads.perspective.proposals import Proposals
from bevperception.models.heads.self_attention import grouped_self_attention
from bevperception.structures import BEVMemory, Boxes3D, DetectionOutputs, Targets
from tests.models.builders import random_frames, take, tiny_config, tiny_model
from tests.models.test_bevformer import assert_same

RANGE = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)


def v2_config(threshold: float = 0.007, limit: int = 20, **detection: object) -> ModelConfig:
    config = tiny_config()
    return replace(
        config,
        temporal=TemporalConfig(mode="fusion", past=2),
        perspective=PerspectiveConfig(enabled=True, score_threshold=threshold, max_proposals=limit),
        detection=replace(config.detection, **{"query_mode": "hybrid", **detection}),
    )


def some_targets(samples: int = 2) -> Targets:
    rows = torch.tensor(
        [[10.0, 0.5, 0, 4, 2, 1.5, 0.3, 1, 0], [8.0, 6, 0, 0.7, 0.7, 1.7, 0, float("nan"), float("nan")]]
    ).double()
    boxes = [Boxes3D(rows[: b + 1], torch.tensor([0, 8])[: b + 1]) for b in range(samples)]
    maps = torch.zeros(samples, 7, 10, 10).double()
    return Targets(boxes, maps, torch.ones(samples, 7, dtype=torch.bool))


def made_up(count: int, seed: int = 0, requires_grad: bool = False) -> Proposals:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, 9, generator=generator, dtype=torch.float64) * 40 - 20
    values[:, 3:6] = values[:, 3:6].abs() * 0.1 + 0.5
    scores = torch.rand(count, generator=generator, dtype=torch.float64)
    features = torch.randn(count, 32, generator=generator, dtype=torch.float64)
    boxes = Boxes3D(values.requires_grad_(requires_grad), torch.arange(count) % 10, scores)
    return Proposals(boxes, features.requires_grad_(requires_grad))


def counts(model: BEVFormer, frames: object) -> list[int]:
    queries = model.propose(model.perspective(model.image_features(frames), frames))
    return (~queries.padding).sum(-1).tolist()


@torch.no_grad()
def test_padded_batch_equals_singles() -> None:
    model = tiny_model(v2_config(limit=500))
    # Different samples see differently much.
    mask = torch.tensor([[True, True, True], [False, False, False], [True, False, False]])
    frames = replace(random_frames(3), camera_mask=mask)
    found = counts(model, frames)
    assert found[0] > found[2] > found[1] == 0
    memory = model(random_frames(3, seed=1))[1]
    outputs, _ = model(frames, memory)
    decoded = model.decode(outputs)
    for b in range(3):
        single_memory = model(take(random_frames(3, seed=1), b))[1]
        single, _ = model(take(frames, b), single_memory)
        queries = 11 + found[b]
        assert single.detection.class_logits.shape[2] == queries
        for name in ("class_logits", "box_codes"):
            batched = getattr(outputs.detection, name)[:, b, :queries]
            torch.testing.assert_close(batched, getattr(single.detection, name)[:, 0], rtol=1e-9, atol=1e-9)
        (alone,) = model.decode(single)
        torch.testing.assert_close(decoded[b].values, alone.values)


@torch.no_grad()
def test_no_proposal_at_all_is_the_learned_model() -> None:
    model = tiny_model(v2_config(threshold=1.0))
    frames = random_frames(2)
    assert counts(model, frames) == [0, 0]
    with_hybrid, _ = model(frames)
    model.hybrid = None
    assert_same(with_hybrid, model(frames)[0])


@torch.no_grad()
def test_thousands_of_proposals() -> None:
    config = v2_config(threshold=0.0, limit=5000)
    model = tiny_model(config)
    rules = model.perspective.rules
    model.perspective.rules = replace(rules, per_image=2000, image_iou=2.0, nms_radius_ratio=0.0)
    # Everywhere, so that few stand within half a metre of each other.
    model.perspective.head.depth_scales[0].fill_(30.0)
    frames = random_frames(1, size=(160, 256))
    assert counts(model, frames)[0] > 1000
    outputs, _ = model(frames)
    assert outputs.detection.class_logits.isfinite().all()
    assert len(model.decode(outputs)[0]) <= config.detection.max_boxes


@torch.no_grad()
def test_a_masked_camera_proposes_nothing() -> None:
    model = tiny_model(v2_config())
    frames = random_frames(2, cameras=3)
    mask = torch.tensor([[True, False, True], [True, False, True]])
    frames.images[:, 1] = float("nan")
    masked, _ = model(replace(frames, camera_mask=mask))
    others = [0, 2]
    without, _ = model(
        replace(frames, images=frames.images[:, others], bev_to_image=frames.bev_to_image[:, others])
    )
    assert max(counts(model, replace(frames, camera_mask=mask))) > 0
    assert_same(masked, without, 1e-9)


def test_no_camera_at_all() -> None:
    model = tiny_model(v2_config()).train()
    frames = replace(random_frames(2), camera_mask=torch.zeros(2, 3, dtype=torch.bool))
    outputs, _ = model(frames)
    losses = model.losses(outputs, some_targets())
    assert all(value.isfinite() for value in losses.values())
    complete = model.losses(model(random_frames(2))[0], some_targets())
    assert list(losses) == list(complete)
    sum(losses.values()).backward()


def test_gradients_reach_both_stages() -> None:
    model = tiny_model(v2_config(threshold=0.0)).train()
    outputs, _ = model(random_frames(1))
    losses = model.losses(outputs, some_targets(1))
    sum(value for name, value in losses.items() if name.startswith("detection.")).backward()
    for name in (
        "class_logits",
        "centreness",
        "quaternion.0",
        "centre.0",
        "depth.0",
        "size.0",
        "confidence.0",
    ):
        weight = model.perspective.head.get_parameter(f"{name}.weight")
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.abs().max() > 0, name
    for part in (model.hybrid, model.backbone, model.neck, model.detection):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())


def test_queries_made_of_proposals() -> None:
    torch.manual_seed(0)
    module = HybridQueries(bev=BEVConfig(channels=32)).double()
    few, none, many = made_up(3), made_up(0), made_up(5, seed=1)
    many.boxes.values[2, 0] = 60.0  # beyond the range
    queries = module([few, none, many])
    assert queries.padding.tolist() == [[False] * 3 + [True], [True] * 4, [False] * 4]
    low, high = torch.tensor(RANGE[:3]).double(), torch.tensor(RANGE[3:]).double()
    expected = ((few.boxes.values[:, :3] - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(queries.reference_points[0, :3], expected)
    assert module([none, none]).padding.shape == (2, 0)
    alone = module([few])
    torch.testing.assert_close(queries.content[0, :3], alone.content[0])


def test_gradients_reach_proposals_through_the_content_alone() -> None:
    """A place that moved with the loss of what is decoded there would not be a proposal's."""
    torch.manual_seed(0)
    module = HybridQueries(bev=BEVConfig(channels=32)).double()
    proposals = made_up(4, requires_grad=True)
    queries = module([proposals, made_up(2, seed=1)])
    assert not queries.reference_points.requires_grad
    inputs = (proposals.boxes.values, proposals.features)
    for moved in torch.autograd.grad(
        queries.position.square().sum(), inputs, retain_graph=True, allow_unused=True
    ):
        assert moved is None
    by_values, by_features = torch.autograd.grad(
        (queries.content * torch.randn(2, 4, 32).double()).sum(), inputs
    )
    assert (by_values.abs().sum(-1) > 0).all()
    assert (by_features.abs().sum(-1) > 0).all()


def test_groups_learn_apart_and_predict_as_one() -> None:
    config = tiny_config()
    config.detection.groups = 3
    model = tiny_model(config)
    frames = random_frames(2)
    with torch.no_grad():
        evaluated, _ = model(frames)
        model.train()
        outputs, _ = model(frames)
    detection = outputs.detection
    assert detection.groups == 3
    assert detection.class_logits.shape[2] == 33
    # The first group is what inference uses, and it does not see the others.
    torch.testing.assert_close(detection.group(0).class_logits, evaluated.detection.class_logits)
    targets = some_targets()
    whole = model.losses(outputs, targets)
    parts = [
        model.losses(replace(outputs, detection=detection.group(g)), targets)["detection.box"]
        for g in range(3)
    ]
    torch.testing.assert_close(whole["detection.box"], torch.stack(parts).mean())
    assert len(model.decode(outputs)[0]) <= config.detection.max_boxes


def test_grouped_attention_with_padding_against_groups_alone() -> None:
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()
    query, position = torch.randn(2, 2, 12, 8).double().unbind(0)
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[0, [2, 3, 6, 7, 10, 11]] = True  # two of four in each of three groups
    padding[1, 4:8] = True  # all of the second group: nobody looks there, nothing breaks
    out = grouped_self_attention(attention, query, position, 3, padding)
    assert out.isfinite().all()
    for group in range(3):
        kept = slice(4 * group, 4 * group + 2)
        alone = grouped_self_attention(attention, query[:1, kept], position[:1, kept])
        torch.testing.assert_close(out[:1, kept], alone)
    layer = DecoderLayer(8, 2, 2, 16).double().eval()
    value, reference = torch.randn(2, 6, 8).double(), torch.rand(2, 12, 1, 2).double()
    result = layer(query, position, value, reference, [(2, 3)], 3, padding)
    assert result.isfinite().all()


def test_padding_takes_no_part_in_the_loss() -> None:
    """A sample's padding, whatever it holds, changes no loss and has no gradient."""
    model = tiny_model(v2_config(limit=6)).train()
    outputs, _ = model(random_frames(2))
    queries = outputs.detection.class_logits.shape[2]
    assert queries == 17
    valid = torch.ones(2, queries, dtype=torch.bool)
    valid[0, 12:] = False
    found = []
    for logit, code in ((50.0, 1e6), (-3.0, 0.0)):
        logits, codes = (
            x.detach().clone() for x in (outputs.detection.class_logits, outputs.detection.box_codes)
        )
        logits[:, 0, 12:], codes[:, 0, 12:] = logit, code
        padded = DetectionOutputs(logits.requires_grad_(), codes.requires_grad_(), 1, valid)
        found.append(model.losses(replace(outputs, detection=padded), some_targets()))
        for gradient in torch.autograd.grad(sum(found[-1].values()), (logits, codes)):
            assert (gradient[:, 0, 12:] == 0).all()
            assert (gradient[:, 1, 12:] != 0).any()
    assert found[0] == found[1]


def test_the_first_stage_alone() -> None:
    config = v2_config(query_mode="learned")
    config.perspective.only = True
    model = build_model(config).double().eval()
    frames = random_frames(2)
    outputs, memory = model(frames)
    assert outputs.detection is None
    found = model.decode(outputs)
    assert [len(boxes) > 0 for boxes in found] == [True, True]
    assert all((boxes.scores[:-1] >= boxes.scores[1:]).all() for boxes in found)
    model.train()
    losses = model.losses(model(frames, memory)[0], some_targets())
    assert all(name.startswith("perspective.") for name in losses)
    sum(losses.values()).backward()
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "neck", "perspective"}
    # Its weights are among those of the whole model.
    whole = BEVFormer(v2_config(query_mode="learned"))
    assert set(model.state_dict()) < set(whole.state_dict())


def test_the_head_costs_nothing_at_inference_with_learned_queries() -> None:
    model = tiny_model(v2_config(query_mode="learned"))
    frames = random_frames(1)
    assert model(frames)[0].perspective is None
    assert model.train()(frames)[0].perspective is not None


def test_v1_is_untouched_by_v2s_parts() -> None:
    model = tiny_model()
    assert not any(name.startswith(("fusion", "perspective", "hybrid")) for name in model.state_dict())
    both = tiny_model(v2_config())
    for name, value in model.state_dict().items():
        if "sampling_offsets" not in name and "attention_weights" not in name:  # the builder draws those anew
            assert torch.equal(value, both.state_dict()[name]), name


@torch.no_grad()
def test_fewer_levels_for_the_bev_than_for_the_perspective_head() -> None:
    config = v2_config()
    config.bev.feature_levels = 1
    model = tiny_model(config)
    frames = random_frames(1)
    features = model.image_features(frames)
    expected = model.encode(features, frames, None)
    features[1] = features[1] * float("nan")
    assert torch.equal(model.encode(features, frames, None), expected)


@torch.no_grad()
def test_autocast() -> None:
    model = tiny_model(v2_config(), dtype=torch.float32).train()
    frames = random_frames(1, dtype=torch.float32)
    memory: BEVMemory | None = None
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            outputs, memory = model(frames, memory)
    assert outputs.detection.box_codes.isfinite().all()


def test_settings_that_contradict() -> None:
    with pytest.raises(ConfigError, match="query_mode=hybrid needs"):
        ModelConfig(detection=DetectionConfig(query_mode="hybrid"))
    with pytest.raises(ConfigError, match=r"perspective\.only needs"):
        PerspectiveConfig(only=True)
    with pytest.raises(ConfigError, match="hold each of car"):
        PerspectiveConfig(classes=("car",))
    with pytest.raises(ConfigError, match="looks at 3 levels"):
        ModelConfig(perspective=PerspectiveConfig(enabled=True, mean_depth_m=(1.0,)))
    with pytest.raises(ConfigError, match=r"bev\.feature_levels must lie in 1 to"):
        tiny_config(feature_levels=4)
