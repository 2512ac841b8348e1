"""Hybrid object queries: proposals of the perspective head become queries beside the learned ones.

BEVFormer v2 (Yang et al., CVPR 2023, sections 3.5, 3.6 and A.3): the first stage's boxes, projected to the
BEV, are per-image reference points; the published code never had this part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bevperception.config_model import BEVConfig
from bevperception.models.heads.perspective.proposals import Proposals
from bevperception.models.precision import LayerNorm
from bevperception.models.selection import all_true
from bevperception.taxonomy import DETECTION_CLASSES

_FREQUENCIES = 8


@dataclass(frozen=True)
class ProposalQueries:
    """Object queries made from proposals, padded to the sample that has most.

    Attributes:
        content: (B, P, C).
        position: (B, P, C).
        reference_points: (B, P, 3) normalised (x, y, z) over the BEV range.
        padding: (B, P) bool, True where a sample has no such proposal.
    """

    content: Tensor
    position: Tensor
    reference_points: Tensor
    padding: Tensor


class HybridQueries(nn.Module):
    """Proposals to object queries: content from features and box, position from the centre.

    Gradients reach the first stage through the content; reference points and positions carry none, as in
    two-stage Deformable DETR.

    Proposals whose centres lie beyond the BEV range on the ground are left out.

    Args:
        bev: range and width of the BEV features.
    """

    range_low_m: Tensor
    range_size_m: Tensor
    frequencies: Tensor

    def __init__(self, *, bev: BEVConfig) -> None:
        super().__init__()
        channels = bev.channels
        # centre, log size, sine and cosine of yaw, velocity, score, class
        numbers = 3 + 3 + 2 + 2 + 1 + len(DETECTION_CLASSES)
        self.box = nn.Sequential(nn.Linear(numbers, channels), nn.ReLU(), nn.Linear(channels, channels))
        self.feature = nn.Linear(channels, channels)
        self.norm = LayerNorm(channels)
        self.position = nn.Sequential(
            nn.Linear(6 * _FREQUENCIES, channels), nn.ReLU(), nn.Linear(channels, channels)
        )
        low, high = torch.tensor(bev.range_m, dtype=torch.float64).chunk(2)
        self.register_buffer("range_low_m", low, persistent=False)
        self.register_buffer("range_size_m", high - low, persistent=False)
        turns = math.pi * 2.0 ** torch.arange(_FREQUENCIES, dtype=torch.float64)
        self.register_buffer("frequencies", turns, persistent=False)

    def forward(self, proposals: Sequence[Proposals]) -> ProposalQueries:
        """Make queries.

        Args:
            proposals: of B samples, each possibly empty.
        """
        queries = [self._queries(sample) for sample in proposals]
        longest = max(len(content) for content, _, _, _ in queries)

        def padded(parts: Sequence[Tensor], value: float = 0.0) -> Tensor:
            return torch.stack(
                [functional.pad(part, (0, 0, 0, longest - len(part)), value=value) for part in parts]
            )

        content, position, reference, valid = zip(*queries, strict=True)
        padding = torch.stack([functional.pad(~part, (0, longest - len(part)), value=True) for part in valid])
        # The middle of the range is as good a place as any for a query that nobody looks at.
        return ProposalQueries(padded(content), padded(position), padded(reference, 0.5), padding)

    def _queries(self, sample: Proposals) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Content, position, reference points, and which count, of those within the range."""
        values, scores, labels = sample.boxes.values, sample.boxes.scores, sample.boxes.labels
        assert scores is not None
        unit = (values[:, :3] - self.range_low_m.to(values)) / self.range_size_m.to(values)
        valid = ((unit[:, :2] >= 0) & (unit[:, :2] <= 1)).all(-1)
        features = sample.features
        if sample.valid is not None:
            valid = valid & sample.valid
            # Padding may hold anything, NaN included, and attention would spread that: zero times NaN is NaN.
            values, unit, features = (torch.where(valid[:, None], x, 0.0) for x in (values, unit, features))
            scores = torch.where(valid, scores, 0.0)
        elif not all_true(valid):
            values, unit, scores, labels, features, valid = (
                x[valid] for x in (values, unit, scores, labels, features, valid)
            )
        yaw = values[:, 6:7]
        numbers = (
            2 * unit - 1,
            values[:, 3:6].clamp_min(1e-2).log(),
            yaw.sin(),
            yaw.cos(),
            values[:, 7:9] / 10.0,
            scores[:, None],
            functional.one_hot(labels, len(DETECTION_CLASSES)).to(values),
        )
        dtype = self.feature.weight.dtype
        described = self.box(torch.cat(numbers, dim=-1).to(dtype))
        content = self.norm(self.feature(features.to(dtype)) + described)
        reference = unit.detach().clamp(0.0, 1.0).to(dtype)
        return content, self.position(self._waves(reference)), reference, valid

    def _waves(self, reference: Tensor) -> Tensor:
        """(n, 3) to (n, 6 * frequencies)."""
        # (n, 3, frequencies) -> (n, 3*frequencies)
        angles = (reference[..., None] * self.frequencies.to(reference)).flatten(1)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)
