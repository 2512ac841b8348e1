"""Centre head: dense supervision of the BEV features, and velocities per cell.

What every cell of the BEV should know of the objects is asked of it directly: a heat map of centres per
class (Yin et al., CVPR 2021, section 4, after Zhou et al., 2019) and, around the centres, the velocity. A
query that is matched to an object reaches a few cells with a gradient, this head all of them; the velocity
above all comes from comparing two BEVs, which is not the decoder's work. The head can do it itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bevperception.config_model import BEVConfig, CentreConfig
from bevperception.geometry import BEVGrid
from bevperception.models.bev.alignment import sample_bilinear
from bevperception.models.heads.focal_loss import ReduceMean
from bevperception.structures import Boxes3D, CentreOutputs, Targets
from bevperception.taxonomy import DETECTION_CLASSES

PRIOR_PROBABILITY = 0.02
"""Initial score of every class in every cell."""
MOVING_WEIGHT = 3.0
"""How much more the velocity of what moves counts. Most objects stand, and the median of all is zero: a model
that tells moving from standing badly, as at first they all do, would not begin to."""
MOVING_M_S = 0.5
"""From which speed on it moves, in m/s."""
LEAST_WEIGHT = 0.1
"""Cells where the nearest object's bell is lower are asked for no velocity."""


class CentreHead(nn.Module):
    """One 3x3 convolution, then a classifier and a velocity per cell.

    With ``settings.compare`` it reads velocities from the BEV and the previous BEV in the current frame: two
    more 3x3 convolutions over both, whose result, zero at first, is added to the BEV before the head's own.

    Args:
        settings: of the head.
        bev: grid and width of the BEV features.
    """

    def __init__(self, *, settings: CentreConfig, bev: BEVConfig) -> None:
        super().__init__()
        channels, self.grid = bev.channels, bev.grid
        self.stem = nn.Conv2d(channels, channels, 3, padding=1)
        self.heat = nn.Conv2d(channels, len(DETECTION_CLASSES), 1)
        self.velocity = nn.Conv2d(channels, 2, 1)
        assert self.heat.bias is not None
        nn.init.constant_(self.heat.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        self.motion: nn.Sequential | None = None
        if settings.compare:
            last = nn.Conv2d(channels, channels, 3, padding=1)
            nn.init.zeros_(last.weight)
            assert last.bias is not None
            nn.init.zeros_(last.bias)
            self.motion = nn.Sequential(nn.Conv2d(2 * channels + 1, channels, 3, padding=1), nn.ReLU(), last)
        self.loss = CentreLoss(settings.heat_weight, settings.velocity_weight)

    @property
    def compares(self) -> bool:
        """Whether it reads the previous BEV too."""
        return self.motion is not None

    def forward(self, bev: Tensor, previous: tuple[Tensor, Tensor] | None = None) -> CentreOutputs:
        """Predict centres and velocities.

        Args:
            bev: (B, channels, rows, columns) BEV features.
            previous: the BEV features of the frame before, warped into the current frame, and how much of
                every cell they cover (B, rows, columns) in [0, 1]; None without a frame before. Used only
                with ``compare``.
        """
        features = torch.relu(self.stem(bev))
        heat = self.heat(features)
        if self.motion is not None:
            before, coverage = previous or (torch.zeros_like(bev), torch.zeros_like(bev[:, 0]))
            pair = torch.cat((bev, before.to(bev.dtype), coverage[:, None].to(bev.dtype)), dim=1)
            features = torch.relu(self.stem(bev + self.motion(pair)))
        return CentreOutputs(heat, self.velocity(features))

    def losses(self, outputs: CentreOutputs, targets: Targets, reduce_mean: ReduceMean) -> dict[str, Tensor]:
        """Weighted losses ``heat`` and ``velocity``, see :class:`CentreLoss`.

        Args:
            outputs: of :meth:`forward`.
            targets: ground truth of the same frame.
            reduce_mean: over processes.
        """
        classes = outputs.heat_logits.shape[1]
        return self.loss(outputs, centre_targets(targets.boxes, self.grid, classes), reduce_mean)


def velocities_at(velocity: Tensor, cells: Tensor) -> Tensor:
    """Bilinear samples of a map of velocities; no gradient reaches the places.

    Args:
        velocity: (B, 2, rows, columns) m/s.
        cells: (B, h, w, 2) continuous (column, row); those beyond the map take its border's.

    Returns:
        (B, h, w, 2) m/s.
    """
    rows, columns = velocity.shape[-2:]
    last = cells.new_tensor([columns - 1, rows - 1])
    within = torch.minimum(cells.detach().clamp_min(0), last)
    samples, _ = sample_bilinear(velocity, within)
    return samples.permute(0, 2, 3, 1)  # (B, 2, h, w) -> (B, h, w, 2)


def add_cell_velocity(codes: Tensor, velocity: Tensor, grid: BEVGrid) -> Tensor:
    """Add to every box's velocity that of the cells at its centre.

    Args:
        codes: (layers, B, queries, 10) box codes, centres in metres.
        velocity: (B, 2, rows, columns) m/s.
        grid: of the velocities.

    Returns:
        (layers, B, queries, 10).
    """
    cells = grid.to_cells(codes[..., :2].transpose(0, 1))  # (B, layers, queries, 2)
    # (B, layers, queries, 2) -> (layers, B, queries, 2)
    added = velocities_at(velocity.to(codes.dtype), cells).transpose(0, 1)
    return torch.cat((codes[..., :8], codes[..., 8:] + added), dim=-1)


@dataclass(frozen=True)
class CentreTargets:
    """Ground truth of a centre head.

    Attributes:
        heat: (B, classes, rows, columns) in 0 to 1; exactly 1 in the cell of every centre.
        velocity: (B, 2, rows, columns) vx, vy in m/s, BEV frame, of the nearest object, or 0.
        weight: (B, rows, columns) of the velocity's loss, 0 away from objects with a known velocity.
        objects: cells that hold a centre of a class; two centres in one cell count once.
    """

    heat: Tensor
    velocity: Tensor
    weight: Tensor
    objects: int


@torch.no_grad()
def centre_targets(boxes: Sequence[Boxes3D], grid: BEVGrid, classes: int) -> CentreTargets:
    """Draw ground truth as bells around the centres.

    A bell's deviation is a third of the box's side (the square root of its area), or of a cell's where that
    is longer. Boxes outside the grid are left out.

    Args:
        boxes: of B samples, BEV frame, velocity possibly NaN.
        grid: of the BEV features.
        classes: number of classes.
    """
    drawn = [_draw(sample, grid, classes) for sample in boxes]
    heat, velocity, weight = (torch.stack([sample[i] for sample in drawn]) for i in range(3))
    return CentreTargets(heat, velocity, weight, int((heat == 1).sum()))


def _draw(boxes: Boxes3D, grid: BEVGrid, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """One sample's heat, velocity and weight."""
    values, labels = boxes.values, boxes.labels
    inside = grid.contains(values)
    values, labels = values[inside], labels[inside]
    rows, columns = grid.rows, grid.columns
    heat = values.new_zeros(classes, rows * columns)
    if not len(values):
        zeros = values.new_zeros(3, rows, columns)
        return heat.unflatten(1, (rows, columns)), zeros[:2], zeros[2]
    cells = grid.to_cells(values).round()
    column, row = cells[:, 0].clamp(0, columns - 1), cells[:, 1].clamp(0, rows - 1)
    # (rows, columns, 2) -> (rows*columns, 2)
    points = grid.cell_centres(values.dtype).to(values.device).flatten(0, 1)
    nearest = (row * columns + column).long()
    away_m2 = (points[None] - points[nearest][:, None]).square().sum(-1)
    side_m = (values[:, 3] * values[:, 4]).sqrt().clamp_min(max(grid.cell_x_m, grid.cell_y_m))
    bells = torch.exp(-0.5 * away_m2 / (side_m[:, None] / 3).square())
    heat.scatter_reduce_(0, labels[:, None].expand_as(bells), bells, "amax")
    weight, owner = bells.max(0)
    velocity = values[owner, 7:9]
    known = velocity.isfinite().all(-1) & (weight >= LEAST_WEIGHT)
    velocity = torch.where(known[:, None], velocity, 0.0)
    weight = torch.where(velocity.norm(dim=-1) >= MOVING_M_S, MOVING_WEIGHT * weight, weight)
    shape = (rows, columns)
    return (
        heat.unflatten(1, shape),  # (classes, rows*columns) -> (classes, rows, columns)
        velocity.T.unflatten(1, shape),  # (rows*columns, 2) -> (2, rows, columns)
        torch.where(known, weight, 0.0).unflatten(0, shape),  # (rows*columns,) -> (rows, columns)
    )


@dataclass(frozen=True)
class CentreLoss:
    """Penalty-reduced focal loss of the heat (Law and Deng, ECCV 2018, equation 1) and L1 of the velocity.

    Attributes:
        heat_weight, velocity_weight: of the two.
        alpha: focusing exponent.
        beta: how much less cells near a centre count as negatives.
    """

    heat_weight: float
    velocity_weight: float
    alpha: float = 2.0
    beta: float = 4.0

    def __call__(
        self, outputs: CentreOutputs, targets: CentreTargets, reduce_mean: ReduceMean
    ) -> dict[str, Tensor]:
        """Weighted losses ``heat`` (per object) and ``velocity`` (m/s, weighted mean over cells).

        Args:
            outputs: of :class:`CentreHead`.
            targets: of the same samples.
            reduce_mean: mean of a scalar tensor over processes.
        """
        wide = torch.promote_types(outputs.heat_logits.dtype, torch.float32)
        logits, wanted = outputs.heat_logits.to(wide), targets.heat.to(wide)
        p = logits.sigmoid()
        positive = (1 - p) ** self.alpha * functional.softplus(-logits)
        negative = (1 - wanted) ** self.beta * p**self.alpha * functional.softplus(logits)
        heat = torch.where(wanted == 1, positive, negative).sum()
        objects = reduce_mean(logits.new_tensor(float(targets.objects))).clamp_min(1.0)
        off = (outputs.velocity.to(wide) - targets.velocity).abs().sum(1)
        weights = reduce_mean(targets.weight.sum()).clamp_min(1.0)
        return {
            "heat": self.heat_weight * heat / objects,
            "velocity": self.velocity_weight * (off * targets.weight).sum() / weights,
        }
