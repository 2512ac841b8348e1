"""Golden cases of BEVFormer v2: frame fusion, transformer, group attention, group-DETR head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bevperception.checkpoints.official_names import FUSION, HEAD, TRANSFORMER
from bevperception.geometry import BEVGrid
from bevperception.models.bev.alignment import sample_bilinear
from bevperception.models.bev.fusion import FusionNetwork
from bevperception.models.bev.grid import LearnedPositionalEncoding
from bevperception.models.bev.temporal import fuse_memory
from bevperception.models.bev.transformer import BEVTransformer
from bevperception.models.heads.detection_loss import DetectionLoss
from bevperception.models.heads.self_attention import grouped_self_attention
from bevperception.structures import BEVMemory, Boxes3D, CameraFrames, DetectionOutputs
from tests.golden.adapters.bevformer import (
    CODEC,
    Config,
    _regression_branches,
    build_decoder,
    build_detection_head,
    build_encoder,
    matrices,
    own_rows,
)
from tests.golden.case import Case, adapter


def published_fusion(channels: int, frames: int, inner: int | None, blocks: int) -> FusionNetwork:
    return FusionNetwork(
        channels, frames, inner_channels=inner, blocks=blocks, norm="batch", coverage=False, residual=False
    )


@adapter("fusion")
def run_fusion(case: Case) -> None:
    meta = case.meta
    kwargs, frames = meta["kwargs"], meta["num_frames"]
    channels = kwargs["out_channels"]
    module = published_fusion(channels, frames, kwargs["inter_channels"], kwargs["num_layer"])
    case.load_into(module, FUSION.to_own)
    module.train(meta["train"])
    inputs = {f"x_{i}": case.input(f"x_{i}") for i in range(frames)}
    out = module(list(inputs.values()), [], frames - 1).flatten(2).transpose(1, 2)
    case.check("out.out", out)
    case.check_gradients({"out": out}, inputs, module, FUSION.to_own)


@adapter("group_mha")
def run_group_mha(case: Case) -> None:
    kwargs = case.meta["kwargs"]
    attention = nn.MultiheadAttention(kwargs["embed_dims"], kwargs["num_heads"], batch_first=True)
    attention.train(case.meta["train"])

    def rename(name: str) -> str:
        return name.removeprefix("attn.")

    case.load_into(attention, rename)
    inputs = {name: case.input(name) for name in ("query", "query_pos")}
    query, position = (x.transpose(0, 1) for x in inputs.values())
    groups = kwargs["group"] if case.meta["train"] else 1
    out = (query + grouped_self_attention(attention, query, position, groups)).transpose(0, 1)
    case.check("out.out", out)
    case.check_gradients({"out": out}, inputs, attention, rename)


class _BEVPart(nn.Module):
    """BEV queries to fused BEV features, under the names that the parts have in BEVFormer."""

    def __init__(self, case: Case, cfg: Config, prefix: str = "") -> None:
        super().__init__()
        meta, parameters = case.meta, case.parameters()
        rows, columns = meta["bev_h"], meta["bev_w"]
        x0, y0, _, x1, y1, _ = meta["pc_range"]
        self.grid = BEVGrid(x0, x1, y0, y1, rows, columns)
        cameras = parameters.get(f"{prefix}cams_embeds")
        self.bev_transformer = BEVTransformer(
            build_encoder(cfg["encoder"], rows, columns),
            self.grid,
            cfg["embed_dims"],
            parameters[f"{prefix}level_embeds"].shape[0],
            camera_embeddings=0 if cameras is None else cameras.shape[0],
        )
        frames = cfg["frames"]
        self.current = frames.index(0)
        if len(frames) > 1:
            self.fusion = published_fusion(
                cfg["embed_dims"], len(frames), cfg["inter_channels"], cfg["num_fusion"]
            )

    def alone(self, case: Case, queries: Tensor, position: Tensor, features: list[Tensor]) -> Tensor:
        """(B, C, rows, columns) of the current frame, warped by the BEV augmentation if there is one."""
        height, width = case.meta["img_shape"][:2]
        batch, cameras = features[0].shape[:2]
        frames = CameraFrames(
            torch.empty(batch, cameras, 3, height, width),
            matrices(case),
            torch.eye(4).double().expand(batch, 4, 4),
            torch.zeros(batch).double(),
        )
        tokens = self.bev_transformer(features, frames, queries, position, None)
        bev = tokens.transpose(1, 2).unflatten(2, (self.grid.rows, self.grid.columns))
        if not case.has("in.bda_mat"):
            return bev
        augmented_to_bev = torch.from_numpy(case.arrays["in.bda_mat"].copy()).double()[:2, :2]
        # The published matrix acts on coordinates normalised to [-1, 1], not on metres.
        unit = BEVGrid(-1.0, 1.0, -1.0, 1.0, self.grid.rows, self.grid.columns)
        cells = unit.to_cells(unit.cell_centres() @ augmented_to_bev.T)
        return sample_bilinear(bev, cells.expand(batch, -1, -1, -1))[0]

    def fused(self, case: Case, current: Tensor) -> Tensor:
        """Fuse with the case's other frames, which the published code has made in the current frame."""
        frames = case.meta["frames"]
        if len(frames) == 1:
            return current
        batch = current.shape[0]
        pose = torch.eye(4).double().expand(batch, 4, 4)
        others = []
        for i in range(len(frames)):
            if i == self.current:
                continue
            given = case.has(f"in.prev_{i}")
            maps = torch.full_like(current, float("nan"))
            if given:
                maps = case.array(f"in.prev_{i}").transpose(1, 2).unflatten(2, current.shape[-2:])
            valid = torch.full((batch,), given)
            others.append(BEVMemory(maps, pose, torch.zeros(batch).double(), valid))
        now = BEVMemory(current, pose, torch.zeros(batch).double(), torch.ones(batch, dtype=torch.bool))
        return fuse_memory(self.fusion, self.grid, now, others, self.current, "nearest")


class _TransformerV2(_BEVPart):
    def __init__(self, case: Case) -> None:
        cfg = case.meta["cfg"]
        super().__init__(case, cfg)
        self.detection = nn.Module()
        self.detection.decoder = build_decoder(cfg["decoder"])
        self.detection.reference_points = nn.Linear(cfg["embed_dims"], 3)
        branches = _regression_branches(
            case, "reg_branches.", cfg["decoder"]["num_layers"], cfg["embed_dims"]
        )
        if branches is not None:
            self.detection.regression = branches

    @staticmethod
    def rename(name: str) -> str:
        if name.startswith("reg_branches."):
            return name.replace("reg_branches.", "detection.regression.", 1)
        return str(TRANSFORMER.to_own(name))


@adapter("transformerV2", uses_ops=True)
def run_transformer_v2(case: Case) -> None:
    module = _TransformerV2(case).eval()
    case.load_into(module, module.rename)
    count = sum(key.startswith("in.feat_") for key in case.arrays)
    names = ["bev_queries", "bev_pos", "object_query_embed", *(f"feat_{i}" for i in range(count))]
    inputs = {name: case.input(name) for name in names}
    features = [inputs[f"feat_{i}"] for i in range(count)]
    position = inputs["bev_pos"].flatten(2).transpose(1, 2)[0]
    alone = module.alone(case, inputs["bev_queries"], position, features)
    case.check("out.cur_bev", alone.flatten(2).transpose(1, 2))
    bev = module.fused(case, alone).flatten(2).transpose(1, 2)
    case.check("out.bev_embed", bev.transpose(0, 1))
    query_position, content = inputs["object_query_embed"].chunk(2, dim=-1)
    batch = bev.shape[0]
    reference = module.detection.reference_points(query_position).sigmoid().expand(batch, -1, -1)
    case.check("out.init_reference", reference)
    decoded = module.detection.decoder(
        content.expand(batch, -1, -1),
        query_position.expand(batch, -1, -1),
        bev,
        reference,
        [tuple(alone.shape[-2:])],
        getattr(module.detection, "regression", None),
    )
    states = decoded.states.transpose(1, 2)
    case.check("out.inter_states", states)
    case.check("out.inter_references", decoded.references)
    if any(key.startswith("cot.") for key in case.arrays):
        outputs = {"bev_embed": bev.transpose(0, 1), "inter_states": states}
        case.check_gradients(outputs, inputs, module, module.rename)


class _GroupHead(_BEVPart):
    def __init__(self, case: Case) -> None:
        cfg = case.meta["cfg"]
        transformer = cfg["transformer"]
        super().__init__(case, transformer, "transformer.")
        channels, rows, columns = transformer["embed_dims"], cfg["bev_h"], cfg["bev_w"]
        self.bev_queries = nn.Embedding(rows * columns, channels)
        self.bev_position = LearnedPositionalEncoding(channels, rows, columns)
        self.detection = build_detection_head(case, cfg)


@adapter("head_groupdetr", uses_ops=True)
def run_head_groupdetr(case: Case) -> None:
    cfg = case.meta["cfg"]
    module = _GroupHead(case)
    case.load_into(module, lambda name: str(HEAD.to_own(name)), skip=["code_weights"])
    features = [case.input(f"feat_{i}") for i in range(sum(k.startswith("in.feat_") for k in case.arrays))]
    position = module.bev_position(cfg["bev_h"], cfg["bev_w"])
    for mode in ("eval", "train"):
        module.train(mode == "train")
        bev = module.fused(case, module.alone(case, module.bev_queries.weight, position, features))
        case.check(f"out.{mode}_bev_embed", bev.flatten(2).permute(2, 0, 1))
        outputs = module.detection(bev)
        case.check(f"out.{mode}_all_cls_scores", outputs.class_logits)
        case.check(f"out.{mode}_all_bbox_preds", outputs.box_codes)
    _check_group_loss(case, cfg, outputs)


def _check_group_loss(case: Case, cfg: Config, outputs: DetectionOutputs) -> None:
    # A leaf, so that the gradients stop here; the published values, so that they are compared alone.
    logits = case.array("out.train_all_cls_scores").requires_grad_()
    codes = case.array("out.train_all_bbox_preds").requires_grad_()
    rows = case.array("in.gt_boxes").clone()
    rows[:, 2] += 0.5 * rows[:, 5]
    targets = [Boxes3D(own_rows(rows), case.array("in.gt_labels"))]
    box, assigner = cfg["loss_bbox"], cfg["train_cfg"]["assigner"]
    loss = DetectionLoss(
        CODEC,
        box_weight=box["loss_weight"],
        box_cost=assigner["reg_cost"]["weight"],
        code_weights=case.array("param.code_weights").tolist(),
        class_weight=cfg["loss_cls"]["loss_weight"],
        class_cost=assigner["cls_cost"]["weight"],
        alpha=cfg["loss_cls"]["alpha"],
        gamma=cfg["loss_cls"]["gamma"],
        smooth=box["type"] == "SmoothL1Loss",
        smooth_cost=assigner["reg_cost"]["type"] == "SmoothL1Cost",
        smooth_beta=box.get("beta", 1.0),
    )
    found = loss(DetectionOutputs(logits, codes, outputs.groups), targets, lambda x: x)
    last = logits.shape[0] - 1
    own = {"loss_cls": "class", "loss_bbox": "box"}
    values = []
    for key in case.meta["loss_keys"]:
        layer, _, name = key.rpartition(".")
        values.append(found[f"layer{layer.removeprefix('d')}.{own[name]}" if layer else own[name]])
    assert len(values) == len(found) == 2 * (last + 1)
    case.check("out.loss", torch.stack(values))
    torch.stack(values).sum().backward()
    case.check("gin.train_all_cls_scores", logits.grad)
    case.check("gin.train_all_bbox_preds", codes.grad)
