"""Detection head: object queries, classification and box branches, losses and NMS-free decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bevperception.config_model import BEVConfig, DetectionConfig
from bevperception.geometry import BEVGrid
from bevperception.models.heads.box_code import CODE_SIZE, BoxCodec
from bevperception.models.heads.centres import add_cell_velocity
from bevperception.models.heads.decoder import DecoderLayer, DetectionDecoder
from bevperception.models.heads.detection_loss import DetectionLoss
from bevperception.models.heads.focal_loss import ReduceMean
from bevperception.models.heads.hybrid import ProposalQueries
from bevperception.models.heads.suppression import circle_nms
from bevperception.models.precision import LayerNorm
from bevperception.ops.linear import Linear
from bevperception.structures import Boxes3D, DetectionOutputs, Targets, select
from bevperception.taxonomy import DETECTION_CLASSES

PRIOR_PROBABILITY = 0.01
"""Initial score of every class (RetinaNet, section 3.3)."""
POINTS = 4
"""Sampling points per head in the decoder's cross-attention, as in all published models."""


def classification_branch(channels: int, classes: int, hidden_layers: int = 2) -> nn.Sequential:
    """Linear, LayerNorm, ReLU per hidden layer, then class logits that start at the prior."""
    layers: list[nn.Module] = []
    for _ in range(hidden_layers):
        layers += [Linear(channels, channels), LayerNorm(channels), nn.ReLU()]
    logits = Linear(channels, classes)
    nn.init.constant_(logits.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
    return nn.Sequential(*layers, logits)


def regression_branch(channels: int, hidden_layers: int = 2) -> nn.Sequential:
    """Linear, ReLU per hidden layer, then a box code."""
    layers: list[nn.Module] = []
    for _ in range(hidden_layers):
        layers += [Linear(channels, channels), nn.ReLU()]
    return nn.Sequential(*layers, Linear(channels, CODE_SIZE))


def class_columns(classes: Sequence[str]) -> list[int] | None:
    """Columns of a head's classifiers for the classes of ``taxonomy.DETECTION_CLASSES``.

    Args:
        classes: in the classifiers' order, each once.

    Returns:
        A column for every class; None where the order is the same.
    """
    columns = [classes.index(name) for name in DETECTION_CLASSES]
    return None if columns == sorted(columns) else columns


class DetectionHead(nn.Module):
    """Predicts boxes from BEV features by object queries (BEVFormer, section 3.5).

    Args:
        settings: of the head.
        bev: grid and width of the BEV features; heads, feed-forward width and drop-out of the decoder.
    """

    class_columns: Tensor | None
    range_low_m: Tensor
    range_size_m: Tensor

    def __init__(self, *, settings: DetectionConfig, bev: BEVConfig) -> None:
        super().__init__()
        self.settings, self.grid = settings, bev.grid
        self.decoder = build_decoder(settings, bev)
        self.queries, self.groups = settings.queries, settings.groups
        self.query_embedding = nn.Embedding(self.groups * self.queries, 2 * bev.channels)
        self.reference_points = Linear(bev.channels, 3)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)
        classes, layers = len(settings.classes), range(settings.layers)
        self.classification = nn.ModuleList(classification_branch(bev.channels, classes) for _ in layers)
        self.regression = nn.ModuleList(regression_branch(bev.channels) for _ in layers)
        columns = class_columns(settings.classes)
        self.register_buffer(
            "class_columns", None if columns is None else torch.tensor(columns), persistent=False
        )
        low, high = torch.tensor(bev.range_m, dtype=torch.float64).chunk(2)
        self.register_buffer("range_low_m", low, persistent=False)
        self.register_buffer("range_size_m", high - low, persistent=False)
        self.codec = BoxCodec(settings.yaw_convention)
        self.loss = DetectionLoss.of(settings, self.codec)

    def forward(
        self, bev: Tensor, proposals: ProposalQueries | None = None, cell_velocity: Tensor | None = None
    ) -> DetectionOutputs:
        """Predict class logits and box codes.

        Args:
            bev: (B, C, rows, columns) BEV features.
            proposals: queries that join the learned ones in every group.
            cell_velocity: (B, 2, rows, columns) m/s; each box's velocity is that of the cells at its centre,
                with the query's added. None leaves velocities to the queries.

        Returns:
            Logits and codes of all layers, centres in metres, classes in the project's order; a group's
            learned queries stand before its proposals.
        """
        rows, columns = bev.shape[-2:]
        groups = self.groups if self.training else 1
        content, position, reference_points, padding = self._object_queries(bev.shape[0], groups, proposals)
        decoded = self.decoder(
            content,
            position,
            bev.flatten(2).transpose(1, 2),  # (B, C, rows, columns) -> (B, rows*columns, C)
            reference_points,
            [(rows, columns)],
            list(self.regression),
            groups,
            padding,
        )
        assert decoded.codes is not None
        logits = torch.stack(
            [branch(s) for branch, s in zip(self.classification, decoded.states, strict=True)]
        )
        # The one place that knows the order of the classifiers' classes: losses and decoding come after it.
        if self.class_columns is not None:
            logits = logits.index_select(-1, self.class_columns)
        codes = self._to_metres(decoded.codes)
        if cell_velocity is not None:
            codes = add_cell_velocity(codes, cell_velocity, self.grid)
        return DetectionOutputs(logits, codes, groups, None if padding is None else ~padding)

    def losses(
        self, outputs: DetectionOutputs, targets: Targets, reduce_mean: ReduceMean
    ) -> dict[str, Tensor]:
        """Weighted losses by name, see :class:`~bevperception.models.heads.detection_loss.DetectionLoss`.

        Boxes with centres outside the BEV grid are left out, as no prediction can reach them (the published
        pipeline's ObjectRangeFilter).

        Args:
            outputs: of :meth:`forward`.
            targets: ground truth of the same frame.
            reduce_mean: over processes.
        """
        return self.loss(outputs, select(targets.boxes, self.grid.contains), reduce_mean)

    def decode(self, outputs: DetectionOutputs) -> list[Boxes3D]:
        """Boxes of every sample in the BEV frame, best first, from the last layer and the first group.

        Args:
            outputs: of :meth:`forward`.
        """
        first = outputs.group(0)
        logits, codes = first.class_logits[-1].float(), first.box_codes[-1].float()
        valid = torch.ones(logits.shape[:2], dtype=torch.bool) if first.valid is None else first.valid
        limits_m = score_range_m(self.grid)
        decoded = [
            decode_detections(
                logits[b][valid[b]], codes[b][valid[b]], self.codec, self.settings.max_boxes, limits_m
            )
            for b in range(len(logits))
        ]
        ratio = self.settings.nms_radius_ratio
        return [circle_nms(boxes, ratio) for boxes in decoded] if ratio else decoded

    def _object_queries(
        self, batch: int, groups: int, proposals: ProposalQueries | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Content, position (B, Q, C), reference points (B, Q, 3), padding (B, Q) of all groups' queries."""
        position, content = self.query_embedding.weight[: groups * self.queries].chunk(2, dim=-1)
        reference = self.reference_points(position).sigmoid()
        # (groups*queries, C) -> (B, groups*queries, C)
        learned = [x.expand(batch, -1, -1) for x in (content, position, reference)]
        if proposals is None or not proposals.padding.shape[1]:
            return learned[0], learned[1], learned[2], None
        added = (proposals.content, proposals.position, proposals.reference_points)
        joined = [
            # (B, groups, queries, C) and (B, groups, P, C) -> (B, groups*(queries + P), C)
            torch.cat(
                (
                    query.unflatten(1, (groups, self.queries)),
                    proposal[:, None].expand(-1, groups, -1, -1).to(query.dtype),
                ),
                dim=2,
            ).flatten(1, 2)
            for query, proposal in zip(learned, added, strict=True)
        ]
        not_padding = proposals.padding.new_zeros(batch, self.queries)
        padding = torch.cat((not_padding, proposals.padding), dim=1).repeat(1, groups)
        return joined[0], joined[1], joined[2], padding

    def _to_metres(self, codes: Tensor) -> Tensor:
        """Codes with centres as fractions of the BEV range to codes with centres in metres."""
        low, size = self.range_low_m.to(codes.dtype), self.range_size_m.to(codes.dtype)
        planar = codes[..., 0:2] * size[:2] + low[:2]
        height = codes[..., 4:5] * size[2:] + low[2:]
        return torch.cat((planar, codes[..., 2:4], height, codes[..., 5:]), dim=-1)


def build_decoder(settings: DetectionConfig, bev: BEVConfig) -> DetectionDecoder:
    """The decoder of a head, with its initial sampling offsets.

    Args:
        settings: for the number of layers.
        bev: for their sizes.
    """
    layers = [
        DecoderLayer(
            channels=bev.channels,
            heads=bev.heads,
            points=POINTS,
            feedforward_channels=bev.feedforward_channels,
            dropout=bev.dropout,
        )
        for _ in range(settings.layers)
    ]
    for layer in layers:
        layer.cross_attention.init_offsets(bev.initial_reach_cells)
    return DetectionDecoder(layers)


def score_range_m(grid: BEVGrid) -> tuple[float, float, float, float, float, float]:
    """The box that decoded centres lie within: 10 m beyond the grid, as the published post_center_range.

    Args:
        grid: BEV grid.

    Returns:
        (x_min, y_min, z_min, x_max, y_max, z_max) in metres, BEV frame.
    """
    margin = 10.0
    return (
        grid.x_min_m - margin,
        grid.y_min_m - margin,
        -10.0,
        grid.x_max_m + margin,
        grid.y_max_m + margin,
        10.0,
    )


def decode_detections(
    class_logits: Tensor,
    box_codes: Tensor,
    codec: BoxCodec,
    max_boxes: int,
    center_range_m: tuple[float, float, float, float, float, float],
    score_threshold: float | None = None,
) -> Boxes3D:
    """Boxes of one sample without non-maximum suppression: the best (query, class) pairs.

    The order is the published NMSFreeCoder's: top-k over queries x classes, then the range, inclusive.

    Args:
        class_logits: (Q, classes) of the last layer.
        box_codes: (Q, 10), centres in metres.
        codec: how codes become boxes.
        max_boxes: k.
        center_range_m: (x_min, y_min, z_min, x_max, y_max, z_max) that centres must lie within.
        score_threshold: keep scores above it; where none is, it is lowered by tenths until one is, and
            below 0.01 everything is kept. None keeps everything.

    Returns:
        Boxes in descending order of score.
    """
    queries, classes = class_logits.shape
    # (Q, classes) -> (k,) of Q*classes
    scores, index = class_logits.sigmoid().flatten().topk(min(max_boxes, queries * classes))
    labels = index % classes
    boxes = codec.decode(box_codes[torch.div(index, classes, rounding_mode="floor")])
    limits = boxes.new_tensor(center_range_m)
    keep = ((boxes[:, :3] >= limits[:3]) & (boxes[:, :3] <= limits[3:])).all(-1)
    if score_threshold is not None:
        keep &= _above_relaxed(scores, score_threshold)
    return Boxes3D(boxes[keep], labels[keep], scores[keep])


def _above_relaxed(scores: Tensor, threshold: float) -> Tensor:
    above = scores > threshold
    while not above.any():
        threshold *= 0.9
        if threshold < 0.01:
            return torch.ones_like(above)
        above = scores >= threshold
    return above
