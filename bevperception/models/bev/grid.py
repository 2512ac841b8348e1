"""Positions of the BEV queries: reference points on the plane and in pillars, and positional encoding.

A query's index is ``row * columns + column``; normalised coordinates are (x, y[, z]) in [0, 1] over
the BEV range, as in BEVFormer (Li et al., ECCV 2022, section 3.2 and 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bevperception.geometry import BEVGrid


def plane_reference_points(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Centres of the cells, normalised.

    Args:
        rows, columns: size of the BEV grid.
        dtype: of the result.

    Returns:
        (rows * columns, 2) x and y in [0, 1].
    """
    unit = BEVGrid(0.0, 1.0, 0.0, 1.0, rows, columns)
    return unit.cell_centres(dtype).reshape(-1, 2)  # (rows, columns, 2) -> (rows*columns, 2)


def pillar_reference_points(
    rows: int, columns: int, height_m: float, points: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Points of the pillars above the cells, normalised; heights half a metre inside both ends.

    Args:
        rows, columns: size of the BEV grid.
        height_m: extent of the BEV range along z in metres.
        points: points a pillar.
        dtype: of the result.

    Returns:
        (points, rows * columns, 3) x, y and z in [0, 1].
    """
    z = torch.linspace(0.5, height_m - 0.5, points, dtype=dtype) / height_m
    plane = plane_reference_points(rows, columns, dtype)
    cells = plane.shape[0]
    return torch.cat((plane.expand(points, cells, 2), z[:, None, None].expand(points, cells, 1)), dim=-1)


class LearnedPositionalEncoding(nn.Module):
    """One learned vector a row and one a column (DETR; mmdet's LearnedPositionalEncoding).

    Args:
        channels: width of the encoding, even: the first half tells the column, the second the row.
        rows, columns: size of the BEV grid.
    """

    def __init__(self, channels: int, rows: int, columns: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(rows, channels // 2)
        self.col_embed = nn.Embedding(columns, channels // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, rows: int, columns: int) -> Tensor:
        """Encoding of the first rows and columns.

        Args:
            rows, columns: at most the sizes given at construction.

        Returns:
            (rows * columns, channels).
        """
        x = self.col_embed.weight[:columns].expand(rows, columns, -1)
        y = self.row_embed.weight[:rows, None].expand(rows, columns, -1)
        return torch.cat((x, y), dim=-1).flatten(0, 1)  # (rows, columns, C) -> (rows*columns, C)
