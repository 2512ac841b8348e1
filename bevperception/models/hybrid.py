"""Hybrid object queries: proposals of the perspective head become queries beside the learned ones.

BEVFormer v2 (Yang et al., CVPR 2023, section 3.3): the first stage's boxes, projected to the BEV, are
per-image reference points; the published code never had this part.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
