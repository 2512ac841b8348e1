"""The segmentation head's resampling against PyTorch's sampler."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from bevperception.config_model import BEVConfig, SegmentationConfig
from bevperception.geometry import BEVGrid
from bevperception.models.heads.segmentation import SegmentationHead, bilinear_weights
from bevperception.taxonomy import SEGMENTATION_CLASSES

BEV = BEVGrid(-51.2, 51.2, -50.0, 51.2, 13, 17)


def head_on(grid: BEVGrid) -> SegmentationHead:
    """A head of three classes, on any grid, where settings have squares only."""

    class Settings(SegmentationConfig):
        @property
        def grid(self) -> BEVGrid:
            return grid

    settings = Settings(classes=SEGMENTATION_CLASSES[:3], channels=8, blocks=1)
    bev = BEVConfig(channels=4, x_range_m=(-51.2, 51.2), y_range_m=(-50.0, 51.2), rows=13, columns=17)
    return SegmentationHead(settings=settings, bev=bev).double()


@pytest.mark.parametrize(
    "grid",
    [
        BEVGrid(-50.0, 50.0, -55.0, 50.0, 40, 27),  # finer, one edge outside
        BEVGrid(-60.0, 90.0, -52.0, 51.0, 5, 4),  # coarser: cells in between are not looked at
        BEV,
    ],
)
def test_resampling_equals_bilinear_sampling_with_zeros_outside(grid: BEVGrid) -> None:
    head = head_on(grid)
    features = torch.randn(2, 8, 13, 17, dtype=torch.float64)
    cells = BEV.to_cells(grid.cell_centres())
    places = (2 * cells + 1) / cells.new_tensor([17, 13]) - 1
    expected = functional.grid_sample(features, places.expand(2, -1, -1, -1), align_corners=False)
    found = head.row_weights @ (features @ head.column_weights.mT)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if grid is BEV:
        torch.testing.assert_close(found, features, rtol=0, atol=1e-12)


def test_maps_of_a_batch_are_those_of_its_samples() -> None:
    head = head_on(BEVGrid(-50.0, 50.0, -55.0, 50.0, 21, 9))
    bev = torch.randn(3, 4, 13, 17, dtype=torch.float64)
    together = head(bev)
    assert together.shape == (3, 3, 21, 9)
    for index in range(3):
        torch.testing.assert_close(
            together[index : index + 1], head(bev[index : index + 1]), rtol=0, atol=1e-12
        )


def test_weights_of_a_place_outside_are_less_than_one_or_nothing() -> None:
    weights = bilinear_weights(torch.tensor([-1.0, -0.25, 0.0, 1.75, 2.5, 4.0], dtype=torch.float64), 3)
    expected = [[0, 0, 0], [0.75, 0, 0], [1, 0, 0], [0, 0.25, 0.75], [0, 0, 0.5], [0, 0, 0]]
    assert weights.tolist() == expected
