"""Golden cases of BEVFormer v2's perspective head (DD3D): outputs, targets, decoded boxes, losses."""

from __future__ import annotations

import torch
from torch import Tensor

from bevperception.checkpoints.official_names import PERSPECTIVE
from bevperception.geometry import rotation_from_quaternion
from bevperception.models.heads.perspective.camera import CameraBoxes
from bevperception.models.heads.perspective.codec import PerspectiveCodec, flatten
from bevperception.models.heads.perspective.loss import PerspectiveLoss
from bevperception.models.heads.perspective.network import NetworkSettings, PerspectiveNetwork, locations
from bevperception.models.heads.perspective.targets import Assigner, ImageTargets
from tests.golden.adapters.bevformer import Config
from tests.golden.case import Case, adapter

NORMS = {"BN": "batch", "SyncBN": "batch", "GN": "group", "": "none"}
LOSSES = {
    "loss_cls": "class",
    "loss_box2d_reg": "box2d",
    "loss_centerness": "centreness",
    "loss_conf3d": "confidence",
    "loss_box3d_quat": "quaternion",
    "loss_box3d_proj_ctr": "projected_centre",
    "loss_box3d_depth": "depth",
    "loss_box3d_size": "size",
    "loss_attr": "attribute",
    "loss_speed": "speed",
}
MAPS = {
    "logits": "class_logits",
    "box2d": "box2d",
    "centerness": "centreness",
    "quat": "quaternion",
    "ctr": "centre",
    "depth": "depth",
    "size": "size",
    "conf": "confidence",
    "attr": "attributes",
    "speed": "speed",
}


def build_head(case: Case, kwargs: Config) -> PerspectiveNetwork:
    flat, box3d = kwargs["fcos2d_cfg"], kwargs["fcos3d_cfg"]
    assert flat["norm"] == box3d["norm"]
    assert flat["use_scale"] == box3d["use_scale"]
    return PerspectiveNetwork(
        NetworkSettings(
            in_channels=kwargs["in_channels"],
            classes=kwargs["num_classes"],
            strides=kwargs["strides"],
            mean_depth_m=box3d["mean_depth_per_level"],
            std_depth_m=box3d["std_depth_per_level"],
            class_convolutions=flat["num_cls_convs"],
            box2d_convolutions=flat["num_box_convs"],
            box3d_convolutions=box3d["num_convs"],
            attributes=case.parameters()["attr_logits.weight"].shape[0],
            norm=NORMS[flat["norm"]],
            scales=box3d["use_scale"],
            class_agnostic=box3d["class_agnostic"],
            per_level_predictors=box3d["use_per_level_predictors"],
        )
    )


def build_codec(kwargs: Config) -> PerspectiveCodec:
    loss = kwargs["fcos3d_loss_cfg"]
    return PerspectiveCodec(
        torch.tensor(loss["canon_box_sizes"], dtype=torch.float64),
        loss["min_depth"],
        loss["max_depth"],
        loss["scale_depth_by_focal_lengths_factor"] if loss["scale_depth_by_focal_lengths"] else None,
        loss["predict_allocentric_rot"],
        loss["predict_distance"],
    )


def image_targets(case: Case, image: int) -> ImageTargets:
    rows, intrinsics = case.array(f"in.gt_box3d_{image}"), case.array(f"in.K_{image}")
    centre = rows[:, 4:7]
    projected = centre @ intrinsics.T
    boxes = CameraBoxes(
        rotation_from_quaternion(rows[:, :4]),
        projected[:, :2] / projected[:, 2:],
        centre[:, 2],
        rows[:, 7:10],
        torch.linalg.inv(intrinsics).expand(len(rows), 3, 3),
    )
    return ImageTargets(
        case.array(f"in.gt_boxes2d_{image}"),
        case.array(f"in.gt_classes_{image}"),
        boxes,
        case.array(f"in.gt_attr_{image}"),
        case.array(f"in.gt_speed_{image}"),
    )


def unit_quaternion(rotation: Tensor) -> Tensor:
    """(n, 4) w, x, y, z of rotations, the component of largest magnitude positive, as published."""
    m = rotation.double()
    trace = m.diagonal(dim1=1, dim2=2)
    squares = torch.stack(
        (
            1 + trace.sum(-1),
            1 + trace[:, 0] - trace[:, 1] - trace[:, 2],
            1 - trace[:, 0] + trace[:, 1] - trace[:, 2],
            1 - trace[:, 0] - trace[:, 1] + trace[:, 2],
        ),
        dim=-1,
    )
    w = torch.stack(
        (squares[:, 0], m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]), -1
    )
    x = torch.stack((w[:, 1], squares[:, 1], m[:, 1, 0] + m[:, 0, 1], m[:, 0, 2] + m[:, 2, 0]), -1)
    y = torch.stack((w[:, 2], x[:, 2], squares[:, 2], m[:, 2, 1] + m[:, 1, 2]), -1)
    z = torch.stack((w[:, 3], x[:, 3], y[:, 3], squares[:, 3]), -1)
    best = torch.stack((w, x, y, z), dim=1)[torch.arange(len(m)), squares.argmax(-1)]
    return best / best.norm(dim=-1, keepdim=True)


@adapter("dd3d")
def run_dd3d(case: Case) -> None:
    kwargs = case.meta["kwargs"]
    module = build_head(case, kwargs)
    buffers = ["fcos3d_head.mean_depth_per_level", "fcos3d_head.std_depth_per_level"]
    case.load_into(module, PERSPECTIVE.to_own, skip=buffers)
    features = {
        name.removeprefix("in."): case.input(name.removeprefix("in."))
        for name in case.arrays
        if name.startswith("in.feat_")
    }
    images = features["feat_0"].shape[0]
    intrinsics = torch.stack([case.array(f"in.K_{i}") for i in range(images)])
    codec = build_codec(kwargs)
    module.eval()
    levels = module(list(features.values()))
    for index, level in enumerate(levels):
        for theirs, ours in MAPS.items():
            case.check(f"out.eval_{theirs}_{index}", getattr(level, ours))
    places = locations(levels, kwargs["strides"])
    if kwargs["feature_locations_offset"] == "half":
        places = [place + stride // 2 for place, stride in zip(places, kwargs["strides"], strict=True)]
    _check_decoding(case, codec, levels, places, torch.linalg.inv(intrinsics))
    targets = [image_targets(case, i) for i in range(images)]
    _check_training(case, module, codec, features, targets, torch.linalg.inv(intrinsics), places)


def _check_decoding(case, codec, levels, places, inverse) -> None:
    """The case holds boxes of one image and level: those whose places it lists."""
    wanted = case.array("out.dec_locations")
    labels = case.array("out.dec_class")
    matches = [
        i for i, place in enumerate(places) if place.shape == wanted.shape and torch.equal(place, wanted)
    ]
    assert len(matches) == 1, matches
    level = levels[matches[0]]._map(lambda x: x[:1])
    boxes = codec.boxes(flatten([level]), labels, places[matches[0]], inverse[:1].expand(len(labels), 3, 3))
    case.check("out.dec_quat", unit_quaternion(boxes.rotation))
    case.check("out.dec_tvec", boxes.centre_m())
    case.check("out.dec_size", boxes.size_m)
    case.check("out.dec_corners", boxes.corners_m())


def _check_training(case, module, codec, features, targets, inverse, places) -> None:
    kwargs = case.meta["kwargs"]
    assign = kwargs["target_assign_cfg"]
    assigner = Assigner(
        kwargs["num_classes"],
        tuple(kwargs["strides"]),
        tuple(tuple(pair) for pair in assign["sizes_of_interest"]),
        assign["pos_radius"] if assign["center_sample"] else None,
    )
    module.train()
    levels = module(list(features.values()))
    assigned = assigner(places, targets)
    case.check("out.t_labels", assigned.labels)
    case.check("out.t_box2d", assigned.box2d)
    case.check("out.t_target_inds", assigned.objects)
    case.check("out.t_pos_inds", assigned.positives)
    case.check("out.t_attributes", assigned.attributes)
    case.check("out.t_speeds", assigned.speeds)
    case.check("out.t_im_inds", assigned.images)
    case.check("out.t_fpn_levels", assigned.levels)
    flat, box3d = kwargs["fcos2d_loss_cfg"], kwargs["fcos3d_loss_cfg"]
    loss = PerspectiveLoss(
        codec,
        flat["focal_loss_alpha"],
        flat["focal_loss_gamma"],
        flat["loc_loss_type"],
        box3d["box3d_loss_weight"],
        box3d["conf3d_loss_weight"],
        kwargs["nusc_loss_weight"]["attr_loss_weight"],
        kwargs["nusc_loss_weight"]["speed_loss_weight"],
        box3d["conf_3d_temperature"],
        box3d["smooth_l1_loss_beta"],
    )
    found = loss(flatten(levels), assigned, targets, inverse)
    assert set(found) == {LOSSES[key] for key in case.meta["loss_keys"]}
    values = torch.stack([found[LOSSES[key]] for key in case.meta["loss_keys"]])
    case.check("out.loss", values)
    values.sum().backward()
    parameters = dict(module.named_parameters())
    for key in case.arrays:
        if key.startswith("gin."):
            case.check(key, features[key.removeprefix("gin.")].grad)
        elif key.startswith("gparam."):
            case.check(key, parameters[PERSPECTIVE.to_own(key.removeprefix("gparam."))].grad)
