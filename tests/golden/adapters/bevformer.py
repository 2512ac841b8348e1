"""Golden cases of BEVFormer v1: attentions, encoder, transformer, decoder, head, coder, losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bevperception.checkpoints.official_names import DECODER, ENCODER, HEAD, TRANSFORMER
from bevperception.config_model import BEVConfig, DetectionConfig
from bevperception.geometry import BEVGrid
from bevperception.models.bev.alignment import published_shift, rotate_bev
from bevperception.models.bev.encoder import BEVEncoder, BEVEncoderLayer, CameraFeatures, PreviousBEV
from bevperception.models.bev.grid import (
    LearnedPositionalEncoding,
    pillar_reference_points,
    plane_reference_points,
)
from bevperception.models.bev.spatial_attention import SpatialCrossAttention, find_hits, project_pillars
from bevperception.models.bev.temporal_attention import TemporalSelfAttention
from bevperception.models.bev.transformer import BEVTransformer, PublishedAlignment
from bevperception.models.heads.box_code import BoxCodec, flip_yaw_convention
from bevperception.models.heads.decoder import (
    DecodedQueries,
    DecoderLayer,
    DeformableCrossAttention,
    DetectionDecoder,
)
from bevperception.models.heads.detection import (
    DetectionHead,
    classification_branch,
    decode_detections,
    regression_branch,
)
from bevperception.models.heads.detection_loss import DetectionLoss
from bevperception.models.heads.matching import assign_all, matching_cost
from bevperception.ops import CompressedRows, deform_attn
from bevperception.structures import Boxes3D, CameraFrames, DetectionOutputs
from tests.golden.case import Case, adapter

Config = dict[str, Any]


def spatial_shapes(case: Case) -> list[tuple[int, int]]:
    return [(int(h), int(w)) for h, w in case.array("in.spatial_shapes").tolist()]


def matrices(case: Case) -> Tensor:
    """Projection matrices stay float64, as the project keeps them."""
    return torch.from_numpy(case.arrays["in.lidar2img"].copy())


@adapter("tsa", uses_ops=True)
def run_tsa(case: Case) -> None:
    kwargs = case.meta["kwargs"]
    module = TemporalSelfAttention(
        kwargs["embed_dims"], kwargs["num_heads"], kwargs["num_points"], kwargs.get("num_levels", 1)
    ).eval()
    case.load_into(module, lambda name: name)
    names = ["query", "query_pos", "reference_points"] + (["value"] if case.has("in.value") else [])
    inputs = {name: case.input(name) for name in names}
    query = inputs["query"]
    given = inputs.get("value")
    value = torch.stack((query, query), dim=1) if given is None else given.unflatten(0, (-1, 2))
    out = module(
        query,
        inputs["query_pos"],
        value,
        inputs["reference_points"].unflatten(0, (-1, 2)),
        spatial_shapes(case),
    )
    case.check("out.out", out)
    case.check_gradients({"out": out}, inputs, module)


def _spatial_attention(case: Case, kwargs: Config) -> SpatialCrossAttention:
    inner = kwargs.get("deformable_attention", kwargs)
    return SpatialCrossAttention(
        inner["embed_dims"], inner["num_heads"], inner["num_points"], inner.get("num_levels", 1)
    ).eval()


@adapter("sca", uses_ops=True)
def run_sca(case: Case) -> None:
    module = _spatial_attention(case, case.meta["kwargs"])

    def rename(name: str) -> str:
        return name.removeprefix("deformable_attention.")

    case.load_into(module, rename)
    inputs = {name: case.input(name) for name in ("query", "value", "reference_points_cam")}
    visible = case.array("in.bev_mask").transpose(0, 1)
    hits = find_hits(inputs["reference_points_cam"].transpose(0, 1), visible, None, case.dtype)
    out = module(inputs["query"], inputs["value"].permute(2, 0, 1, 3), spatial_shapes(case), hits)
    case.check("out.out", out)
    case.check_gradients({"out": out}, inputs, module, rename)


@adapter("msda3d", uses_ops=True)
def run_msda3d(case: Case) -> None:
    module = _spatial_attention(case, case.meta["kwargs"])
    # The inner attention has no output projection; the case is compared before it.
    case.load_into_partial(module, missing={"output_proj.weight", "output_proj.bias"})
    inputs = {name: case.input(name) for name in ("query", "value", "reference_points")}
    shapes = spatial_shapes(case)
    batch, queries, depth_points, _ = inputs["reference_points"].shape
    rows = CompressedRows(torch.arange(batch * queries + 1), torch.arange(batch).repeat_interleave(queries))
    out = deform_attn(
        module.project_value(inputs["value"]),
        shapes,
        *module.predict(inputs["query"]),
        inputs["reference_points"].flatten(0, 1),
        [p % depth_points for _ in shapes for p in range(module.points)],
        rows=rows,
    ).unflatten(0, (batch, queries))
    case.check("out.out", out)
    case.check_gradients({"out": out}, inputs, module)


@adapter("custom_msda", uses_ops=True)
def run_custom_msda(case: Case) -> None:
    kwargs = case.meta["kwargs"]
    module = DeformableCrossAttention(
        kwargs["embed_dims"], kwargs["num_heads"], kwargs["num_points"], kwargs.get("num_levels", 1)
    ).eval()
    case.load_into(module, lambda name: name)
    inputs = {name: case.input(name) for name in ("query", "query_pos", "value", "reference_points")}
    out = module(
        inputs["query"].transpose(0, 1),
        inputs["query_pos"].transpose(0, 1),
        inputs["value"].transpose(0, 1),
        inputs["reference_points"],
        spatial_shapes(case),
    ).transpose(0, 1)
    case.check("out.out", out)
    case.check_gradients({"out": out}, inputs, module)


@adapter("refpoints")
def run_refpoints(case: Case) -> None:
    for i, item in enumerate(case.meta["items"]):
        pillars = pillar_reference_points(item["H"], item["W"], item["Z"], item["D"], case.dtype)
        plane = plane_reference_points(item["H"], item["W"], case.dtype)
        case.check(f"out.ref3d_{i}", pillars.expand(item["bs"], -1, -1, -1))
        case.check(f"out.ref2d_{i}", plane[:, None].expand(item["bs"], -1, -1, -1))


def _pillars_m(rows: int, columns: int, points: int, bev_range: list[float]) -> Tensor:
    low, high = (torch.tensor(part, dtype=torch.float64) for part in (bev_range[:3], bev_range[3:]))
    pillars = pillar_reference_points(rows, columns, bev_range[5] - bev_range[2], points)
    return pillars * (high - low) + low


@adapter("point_sampling")
def run_point_sampling(case: Case) -> None:
    meta = case.meta
    points_m = _pillars_m(meta["bev_h"], meta["bev_w"], meta["D"], meta["pc_range"])
    height, width = meta["img_shape"][:2]
    reference, visible = project_pillars(points_m, matrices(case), (height, width), (height, width))
    visible = visible.transpose(0, 1)
    case.check("out.bev_mask", visible)
    masked = torch.where(visible[..., None], reference.transpose(0, 1), 0.0)
    expected = torch.from_numpy(case.arrays["out.reference_points_cam_masked"].copy())
    assert torch.equal(expected, torch.where(visible[..., None], expected, 0.0)), "fill value is not zero"
    case.check("out.reference_points_cam_masked", masked)


@adapter("posenc")
def run_posenc(case: Case) -> None:
    rows, half = case.arrays["param.row_embed.weight"].shape
    module = LearnedPositionalEncoding(2 * half, rows, case.arrays["param.col_embed.weight"].shape[0])
    case.load_into(module, lambda name: name)
    height, width = case.meta["h"], case.meta["w"]
    encoding = module(height, width).T.unflatten(1, (height, width))
    case.check("out.pos", encoding.expand(case.arrays["out.pos"].shape[0], -1, -1, -1))


@adapter("rotate")
def run_rotate(case: Case) -> None:
    for i, item in enumerate(case.meta["items"]):
        angle = torch.tensor([item["angle"]], dtype=torch.float64)
        turned = rotate_bev(case.array(f"in.x_{i}")[None], angle, tuple(item["center"]))
        case.check(f"out.y_{i}", turned[0])


def build_encoder(cfg: Config, rows: int, columns: int) -> BEVEncoder:
    layer = cfg["transformerlayers"]
    temporal, spatial = layer["attn_cfgs"]
    inner = spatial["deformable_attention"]
    layers = [
        BEVEncoderLayer(
            inner["embed_dims"],
            inner["num_heads"],
            temporal["num_points"],
            inner["num_points"],
            inner["num_levels"],
            layer["feedforward_channels"],
        )
        for _ in range(cfg["num_layers"])
    ]
    return BEVEncoder(layers, rows, columns, tuple(cfg["pc_range"]), cfg["num_points_in_pillar"])


@adapter("encoder", uses_ops=True)
def run_encoder(case: Case) -> None:
    meta = case.meta
    module = build_encoder(meta["cfg"], meta["bev_h"], meta["bev_w"]).eval()
    case.load_into(module, ENCODER.to_own)
    names = ["bev_query", "value", "bev_pos"] + (["prev_bev"] if case.has("in.prev_bev") else [])
    inputs = {name: case.input(name) for name in names}
    previous = None
    if "prev_bev" in inputs:
        features = inputs["prev_bev"].transpose(0, 1)
        valid = torch.ones(features.shape[0], dtype=torch.bool)
        previous = PreviousBEV(features, case.array("in.shift"), valid)
    height, width = meta["img_shape"][:2]
    value = inputs["value"].permute(2, 0, 1, 3)
    cameras = CameraFeatures(value, spatial_shapes(case), matrices(case), (height, width), (height, width))
    queries, position = inputs["bev_query"].transpose(0, 1), inputs["bev_pos"].transpose(0, 1)
    out = module(queries, position, cameras, previous)
    case.check("out.out", out)
    if any(key.startswith("cot.") for key in case.arrays):
        case.check_gradients({"out": out}, inputs, module, ENCODER.to_own)


def build_decoder(cfg: Config) -> DetectionDecoder:
    layer = cfg["transformerlayers"]
    attention, cross = layer["attn_cfgs"]
    assert attention["num_heads"] == cross["num_heads"]
    return DetectionDecoder(
        [
            DecoderLayer(
                cross["embed_dims"],
                cross["num_heads"],
                cross["num_points"],
                layer["feedforward_channels"],
                levels=cross["num_levels"],
            )
            for _ in range(cfg["num_layers"])
        ]
    )


def _regression_branches(case: Case, prefix: str, layers: int, channels: int) -> nn.ModuleList | None:
    """Branches of the shapes that the case's parameters have."""
    found = [k for k in case.parameters() if k.startswith(f"{prefix}0.") and k.endswith(".weight")]
    if not found:
        return None
    return nn.ModuleList(regression_branch(channels, len(found) - 1) for _ in range(layers))


class _DecoderWithBranches(nn.Module):
    def __init__(self, decoder: DetectionDecoder, branches: nn.ModuleList | None) -> None:
        super().__init__()
        self.decoder = decoder
        if branches is not None:
            self.reg_branches = branches

    @staticmethod
    def rename(name: str) -> str:
        return name if name.startswith("reg_branches.") else f"decoder.{DECODER.to_own(name)}"


@adapter("decoder", uses_ops=True)
def run_decoder(case: Case) -> None:
    decoder = build_decoder(case.meta["cfg"])
    channels = case.arrays["in.query"].shape[-1]
    branches = _regression_branches(case, "reg_branches.", len(decoder.layers), channels)
    module = _DecoderWithBranches(decoder, branches).eval()
    case.load_into(module, module.rename)
    inputs = {name: case.input(name) for name in ("query", "query_pos", "value", "reference_points")}

    def decode(with_branches: nn.ModuleList | None) -> DecodedQueries:
        decoded: DecodedQueries = decoder(
            inputs["query"].transpose(0, 1),
            inputs["query_pos"].transpose(0, 1),
            inputs["value"].transpose(0, 1),
            inputs["reference_points"],
            spatial_shapes(case),
            with_branches,
        )
        return decoded

    decoded = decode(branches)
    case.check("out.states", decoded.states.transpose(1, 2))
    case.check("out.references", decoded.references)
    if case.has("out.states_noreg"):
        without = decode(None)
        case.check("out.states_noreg", without.states.transpose(1, 2))
        case.check("out.references_noreg", without.references)
    case.check_gradients({"states": decoded.states.transpose(1, 2)}, inputs, module, module.rename)


def build_transformer(case: Case, cfg: Config, bev_range: list[float]) -> BEVTransformer:
    rows, columns = case.meta["bev_h"], case.meta["bev_w"]
    x0, y0, _, x1, y1, _ = bev_range
    parameters = case.parameters()
    prefix = "transformer." if any(k.startswith("transformer.") for k in parameters) else ""
    has_norm = f"{prefix}can_bus_mlp.norm.weight" in parameters
    return BEVTransformer(
        build_encoder(cfg["encoder"], rows, columns),
        BEVGrid(x0, x1, y0, y1, rows, columns),
        cfg["embed_dims"],
        parameters[f"{prefix}level_embeds"].shape[0],
        camera_embeddings=parameters[f"{prefix}cams_embeds"].shape[0],
        published=PublishedAlignment(
            rotate_center=tuple(cfg["rotate_center"]),
            rotate=cfg["rotate_prev_bev"],
            shift=cfg["use_shift"],
            can_bus_norm=has_norm,
        ),
    )


def _without_unused(module: BEVTransformer, cfg: Config) -> None:
    """The published module holds parameters of parts that are switched off; here those parts are absent."""
    if not cfg["use_can_bus"]:
        module.can_bus_embedding = None
    if not cfg["use_cams_embeds"]:
        module.camera_embeds = None


def encode_case(
    case: Case, module: BEVTransformer, queries: Tensor, position: Tensor, features: list[Tensor]
) -> tuple[Tensor, PreviousBEV | None, Tensor]:
    """Run a BEVTransformer the way the published code is called: with a relative CAN bus and prev_bev.

    Returns:
        BEV tokens (B, Q, C), the aligned earlier BEV, and the encoder's queries (B, Q, C).
    """
    height, width = case.meta["img_shape"][:2]
    relative_can = torch.from_numpy(case.arrays["in.can_bus"].copy())
    batch, cameras = features[0].shape[:2]
    frames = CameraFrames(
        torch.empty(batch, cameras, 3, height, width),
        matrices(case),
        torch.eye(4).double().expand(batch, 4, 4),
        torch.zeros(batch).double(),
    )
    previous = None
    if case.has("in.prev_bev"):
        rows, columns = module.encoder.rows, module.encoder.columns
        maps = case.array("in.prev_bev").transpose(1, 2).unflatten(2, (rows, columns))
        previous = module.published_previous(maps, relative_can, torch.ones(batch, dtype=torch.bool))
    embedded = module.embed_queries(queries.expand(batch, -1, -1), relative_can)
    tokens = module.encoder(embedded, position, module.camera_features(features, frames), previous)
    return tokens, previous, embedded


class _Transformer(nn.Module):
    """The parts of the published PerceptionTransformer under this project's names."""

    def __init__(self, bev_transformer: BEVTransformer, decoder: DetectionDecoder, channels: int) -> None:
        super().__init__()
        self.bev_transformer = bev_transformer
        self.detection = nn.Module()
        self.detection.decoder = decoder
        self.detection.reference_points = nn.Linear(channels, 3)

    @staticmethod
    def rename(name: str) -> str:
        if name.startswith("reg_branches."):
            return name.replace("reg_branches.", "detection.regression.", 1)
        return str(TRANSFORMER.to_own(name))


@adapter("transformer", uses_ops=True)
def run_transformer(case: Case) -> None:
    cfg = case.meta["cfg"]
    channels = cfg["embed_dims"]
    module = _Transformer(
        build_transformer(case, cfg, case.meta["pc_range"]), build_decoder(cfg["decoder"]), channels
    ).eval()
    branches = _regression_branches(case, "reg_branches.", cfg["decoder"]["num_layers"], channels)
    if branches is not None:
        module.detection.regression = branches
    case.load_into(module, module.rename)
    _without_unused(module.bev_transformer, cfg)
    count = sum(key.startswith("in.feat_") for key in case.arrays)
    names = ["bev_queries", "bev_pos", "object_query_embed", *(f"feat_{i}" for i in range(count))]
    inputs = {name: case.input(name) for name in names}
    bev, previous, embedded = encode_case(
        case,
        module.bev_transformer,
        inputs["bev_queries"],
        inputs["bev_pos"].flatten(2).transpose(1, 2),
        [inputs[f"feat_{i}"] for i in range(count)],
    )
    case.check("out.enc_bev_query", embedded.transpose(0, 1))
    case.check("out.bev_embed", bev.transpose(0, 1))
    if previous is not None:
        case.check("out.rotated_prev_bev", previous.features.transpose(0, 1))
        case.check("out.shift", previous.shift)
    else:
        relative_can = torch.from_numpy(case.arrays["in.can_bus"].copy())
        shift = published_shift(relative_can, module.bev_transformer.grid)
        case.check("out.shift", shift if cfg["use_shift"] else torch.zeros_like(shift))
    position, content = inputs["object_query_embed"].chunk(2, dim=-1)
    batch = bev.shape[0]
    reference = module.detection.reference_points(position).sigmoid().expand(batch, -1, -1)
    case.check("out.init_reference", reference)
    shapes = [(module.bev_transformer.encoder.rows, module.bev_transformer.encoder.columns)]
    decoded = module.detection.decoder(
        content.expand(batch, -1, -1), position.expand(batch, -1, -1), bev, reference, shapes, branches
    )
    states = decoded.states.transpose(1, 2)
    case.check("out.inter_states", states)
    case.check("out.inter_references", decoded.references)
    if any(key.startswith("cot.") for key in case.arrays):
        outputs = {"bev_embed": bev.transpose(0, 1), "inter_states": states}
        case.check_gradients(outputs, inputs, module, module.rename)


def build_detection_head(case: Case, cfg: Config) -> DetectionHead:
    """The detection head of a case, whose branches may be deeper than published."""
    layer = cfg["transformer"]["decoder"]["transformerlayers"]
    attention, cross = layer["attn_cfgs"]
    assert (cross["num_points"], cfg["num_classes"]) == (4, 10)
    x0, y0, z0, x1, y1, z1 = case.meta["pc_range"]
    head = DetectionHead(
        settings=DetectionConfig(
            queries=cfg["num_query"],
            groups=cfg.get("group_detr", 1),
            layers=cfg["transformer"]["decoder"]["num_layers"],
        ),
        bev=BEVConfig(
            channels=cross["embed_dims"],
            heads=attention["num_heads"],
            feedforward_channels=layer["feedforward_channels"],
            x_range_m=(x0, x1),
            y_range_m=(y0, y1),
            z_range_m=(z0, z1),
        ),
    )
    layers, channels = head.settings.layers, cross["embed_dims"]
    branches = _regression_branches(case, "reg_branches.", layers, channels)
    assert branches is not None
    head.regression = branches
    weights = [k for k in case.parameters() if k.startswith("cls_branches.0.") and k.endswith(".weight")]
    head.classification = nn.ModuleList(
        classification_branch(channels, cfg["num_classes"], len(weights) // 2) for _ in range(layers)
    )
    return head


class _Head(nn.Module):
    """The published head's parts under the names that they have in BEVFormer."""

    def __init__(self, case: Case, cfg: Config) -> None:
        super().__init__()
        transformer = cfg["transformer"]
        channels, rows, columns = transformer["embed_dims"], cfg["bev_h"], cfg["bev_w"]
        bev_range = case.meta["pc_range"]
        self.bev_queries = nn.Embedding(rows * columns, channels)
        self.bev_position = LearnedPositionalEncoding(channels, rows, columns)
        self.bev_transformer = build_transformer(case, transformer, bev_range)
        self.detection = build_detection_head(case, cfg)


@adapter("head", uses_ops=True)
def run_head(case: Case) -> None:
    cfg = case.meta["cfg"]
    module = _Head(case, cfg).eval()
    case.load_into(module, lambda name: str(HEAD.to_own(name)), skip=["code_weights"])
    _without_unused(module.bev_transformer, cfg["transformer"])
    count = sum(key.startswith("in.feat_") for key in case.arrays)
    features = [case.input(f"feat_{i}") for i in range(count)]
    rows, columns = cfg["bev_h"], cfg["bev_w"]
    bev, _, _ = encode_case(
        case,
        module.bev_transformer,
        module.bev_queries.weight,
        module.bev_position(rows, columns)[None],
        features,
    )
    case.check("out.only_bev", bev)
    case.check("out.bev_embed", bev.transpose(0, 1))
    outputs = module.detection(bev.transpose(1, 2).unflatten(2, (rows, columns)))
    case.check("out.all_cls_scores", outputs.class_logits)
    case.check("out.all_bbox_preds", outputs.box_codes)
    coder = cfg["bbox_coder"]
    for b in range(bev.shape[0]):
        if case.has(f"out.decoded_bboxes_{b}"):
            boxes = _decode(outputs.class_logits[-1, b], outputs.box_codes[-1, b], coder)
            case.check(f"out.decoded_bboxes_{b}", published_rows(boxes.values))
            case.check(f"out.decoded_scores_{b}", boxes.scores)
            case.check(f"out.decoded_labels_{b}", boxes.labels)
    if any(key.startswith("cot.") for key in case.arrays):
        tensors = {"all_cls_scores": outputs.class_logits, "all_bbox_preds": outputs.box_codes}
        inputs = {f"feat_{i}": f for i, f in enumerate(features)}
        case.check_gradients(tensors, inputs, module, lambda name: str(HEAD.to_own(name)))


CODEC = BoxCodec("mmdet3d_0.17")


def published_rows(boxes: Tensor) -> Tensor:
    """Our rows as the published (x, y, z, w, l, h, mmdet3d yaw, vx, vy), z the centre."""
    columns = boxes[..., [0, 1, 2, 4, 3, 5, 6, 7, 8]].clone()
    columns[..., 6] = flip_yaw_convention(columns[..., 6])
    return columns


def own_rows(rows: Tensor) -> Tensor:
    """The inverse of :func:`published_rows`, which it happens to be itself."""
    return published_rows(rows)


def _decode(logits: Tensor, codes: Tensor, coder: Config) -> Boxes3D:
    return decode_detections(
        logits,
        codes,
        CODEC,
        coder["max_num"],
        tuple(coder["post_center_range"]),
        coder.get("score_threshold"),
    )


@adapter("coder")
def run_coder(case: Case) -> None:
    coder = case.meta["cfg"]
    logits, codes = case.array("in.all_cls_scores"), case.array("in.all_bbox_preds")
    case.check("out.normalized", CODEC.encode(own_rows(case.array("in.boxes"))))
    case.check("out.denormalized", published_rows(CODEC.decode(codes[-1, 0])))
    for b in range(logits.shape[1]):
        boxes = _decode(logits[-1, b], codes[-1, b], coder)
        case.check(f"out.bboxes_{b}", published_rows(boxes.values))
        case.check(f"out.scores_{b}", boxes.scores)
        case.check(f"out.labels_{b}", boxes.labels)


def _targets(case: Case, samples: int) -> list[Boxes3D]:
    """Ground truth with the published bottom centre lifted to the volume's centre."""
    targets = []
    for b in range(samples):
        rows = case.array(f"in.gt_boxes_{b}").clone()
        rows[:, 2] += 0.5 * rows[:, 5]
        targets.append(Boxes3D(own_rows(rows), case.array(f"in.gt_labels_{b}")))
    return targets


def _loss(case: Case) -> DetectionLoss:
    cfg = case.meta["cfg"]
    box, assigner = cfg["loss_bbox"], cfg["train_cfg"]["assigner"]
    return DetectionLoss(
        CODEC,
        box_weight=box["loss_weight"],
        box_cost=assigner["reg_cost"]["weight"],
        code_weights=case.meta["code_weights"],
        class_weight=cfg["loss_cls"]["loss_weight"],
        class_cost=assigner["cls_cost"]["weight"],
        alpha=cfg["loss_cls"]["alpha"],
        gamma=cfg["loss_cls"]["gamma"],
        smooth=box["type"] == "SmoothL1Loss",
        smooth_cost=assigner["reg_cost"]["type"] == "SmoothL1Cost",
        smooth_beta=box.get("beta", 1.0),
    )


@adapter("loss")
def run_loss(case: Case) -> None:
    logits, codes = case.input("all_cls_scores"), case.input("all_bbox_preds")
    targets, loss = _targets(case, logits.shape[1]), _loss(case)
    background = logits.shape[-1]
    for layer in range(logits.shape[0]):
        for b, boxes in enumerate(targets):
            cost = matching_cost(
                logits[layer, b],
                codes[layer, b],
                boxes.labels,
                CODEC.encode(boxes.values),
                loss.class_cost,
                loss.box_cost,
                smooth=loss.smooth_cost,
            )
            case.check(f"out.cost_{layer}_{b}", cost)
            pairs = assign_all(cost[None, None], [len(boxes)])[:, 2:]
            queries, truths = torch.from_numpy(pairs).unbind(-1)
            assigned = torch.zeros(logits.shape[2], dtype=torch.long)
            assigned[queries] = truths + 1
            case.check(f"out.assigned_{layer}_{b}", assigned)
            if case.has(f"out.assigned_labels_{layer}_{b}"):
                labels = torch.full((logits.shape[2],), background)
                labels[queries] = boxes.labels[truths]
                expected = case.array(f"out.assigned_labels_{layer}_{b}")
                # The published assigner marks unassigned queries -1, the head counts them as background.
                assert torch.equal(labels, torch.where(expected < 0, background, expected))
    found = loss(DetectionOutputs(logits, codes), targets, lambda x: x)
    last = logits.shape[0] - 1
    values = [found[_own_loss_key(key, last)] for key in case.meta["loss_keys"]]
    case.check("out.loss", torch.stack(values))
    assert len(values) == len(found)
    torch.stack(values).sum().backward()
    case.check("gin.all_cls_scores", logits.grad)
    case.check("gin.all_bbox_preds", codes.grad)


def _own_loss_key(key: str, last: int) -> str:
    layer, _, name = key.rpartition(".")
    own = {"loss_cls": "class", "loss_bbox": "box"}[name]
    return f"layer{layer.removeprefix('d')}.{own}" if layer else own
