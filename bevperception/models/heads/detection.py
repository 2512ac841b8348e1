"""Detection head: learned object queries, classification and box branches, NMS-free decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bevperception.models.heads.box_code import CODE_SIZE, BoxCodec
from bevperception.models.heads.decoder import DetectionDecoder
from bevperception.models.hybrid import ProposalQueries
from bevperception.models.precision import LayerNorm
from bevperception.ops.linear import Linear
from bevperception.structures import Boxes3D, DetectionOutputs
from bevperception.taxonomy import DETECTION_CLASSES

PRIOR_PROBABILITY = 0.01
"""What every class scores before training (RetinaNet, section 3.3)."""


def classification_branch(channels: int, classes: int, hidden_layers: int) -> nn.Sequential:
    """Linear, LayerNorm, ReLU per hidden layer, then class logits that start at the prior."""
    layers: list[nn.Module] = []
    for _ in range(hidden_layers):
        layers += [Linear(channels, channels), LayerNorm(channels), nn.ReLU()]
    logits = Linear(channels, classes)
    nn.init.constant_(logits.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
    return nn.Sequential(*layers, logits)


def regression_branch(channels: int, hidden_layers: int) -> nn.Sequential:
    """Linear, ReLU per hidden layer, then a box code."""
    layers: list[nn.Module] = []
    for _ in range(hidden_layers):
        layers += [Linear(channels, channels), nn.ReLU()]
    return nn.Sequential(*layers, Linear(channels, CODE_SIZE))


def class_columns(classes: Sequence[str]) -> list[int] | None:
    """Where a head's classifiers hold each class of ``taxonomy.DETECTION_CLASSES``.

    Args:
        classes: in the classifiers' order, each once.

    Returns:
        A column for every class; None where the order is the same.
    """
    columns = [classes.index(name) for name in DETECTION_CLASSES]
    return None if columns == sorted(columns) else columns


class DetectionHead(nn.Module):
    """Object queries to class logits and box codes (BEVFormer, section 3.5).

    Args:
        decoder: the deformable decoder.
        channels: width.
        classes: number of detection classes.
        queries: learned object queries.
        hidden_layers: of the branches.
        range_m: (x_min, y_min, z_min, x_max, y_max, z_max) that normalised centres span, BEV frame.
        groups: groups of learned queries in training (Group DETR); inference keeps the first.
        class_columns: where the classifiers hold each class that is given out, see :func:`class_columns`;
            None where the order is the same.
    """

    class_columns: Tensor | None
    range_low_m: Tensor
    range_size_m: Tensor

    def __init__(
        self,
        decoder: DetectionDecoder,
        channels: int,
        classes: int,
        queries: int,
        hidden_layers: int,
        range_m: tuple[float, float, float, float, float, float],
        groups: int = 1,
        class_columns: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        layers = len(decoder.layers)
        self.decoder = decoder
        self.queries, self.groups = queries, groups
        self.query_embedding = nn.Embedding(groups * queries, 2 * channels)
        self.reference_points = Linear(channels, 3)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)
        self.classification = nn.ModuleList(
            classification_branch(channels, classes, hidden_layers) for _ in range(layers)
        )
        self.regression = nn.ModuleList(regression_branch(channels, hidden_layers) for _ in range(layers))
        columns = None if class_columns is None else torch.tensor(class_columns)
        self.register_buffer("class_columns", columns, persistent=False)
        low = torch.tensor(range_m[:3], dtype=torch.float64)
        size = torch.tensor(range_m[3:], dtype=torch.float64) - low
        self.register_buffer("range_low_m", low, persistent=False)
        self.register_buffer("range_size_m", size, persistent=False)

    def forward(self, bev: Tensor, proposals: ProposalQueries | None = None) -> DetectionOutputs:
        """Detect.

        Args:
            bev: (B, C, rows, columns) BEV features.
            proposals: queries that join the learned ones in every group.

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
            bev.flatten(2).transpose(1, 2),
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
        valid = None if padding is None else ~padding
        return DetectionOutputs(logits, self._to_metres(decoded.codes), groups, valid)

    def _object_queries(
        self, batch: int, groups: int, proposals: ProposalQueries | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Content, position (B, Q, C), reference points (B, Q, 3), padding (B, Q) of all groups' queries."""
        position, content = self.query_embedding.weight[: groups * self.queries].chunk(2, dim=-1)
        reference = self.reference_points(position).sigmoid()
        learned = [x.expand(batch, -1, -1) for x in (content, position, reference)]
        if proposals is None or not proposals.padding.shape[1]:
            return learned[0], learned[1], learned[2], None
        added = (proposals.content, proposals.position, proposals.reference_points)
        joined = [
            torch.cat(
                (
                    own.unflatten(1, (groups, self.queries)),
                    other[:, None].expand(-1, groups, -1, -1).to(own.dtype),
                ),
                dim=2,
            ).flatten(1, 2)
            for own, other in zip(learned, added, strict=True)
        ]
        there = proposals.padding.new_zeros(batch, self.queries)
        padding = torch.cat((there, proposals.padding), dim=1).repeat(1, groups)
        return joined[0], joined[1], joined[2], padding

    def _to_metres(self, codes: Tensor) -> Tensor:
        low, size = self.range_low_m.to(codes.dtype), self.range_size_m.to(codes.dtype)
        planar = codes[..., 0:2] * size[:2] + low[:2]
        height = codes[..., 4:5] * size[2:] + low[2:]
        return torch.cat((planar, codes[..., 2:4], height, codes[..., 5:]), dim=-1)


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
