"""Ranges that several settings of the model share."""

from __future__ import annotations

from typing import Annotated

from bevperception.ranges import Increasing, Range

# Upper limits are far beyond anything sensible. They keep a damaged file from asking for all the memory.
MOST_CELLS = 4096
SMALLEST_CELL_M = 0.001
BOX_CODE = 10
Width = Annotated[int, Range(1, 65_536)]
Depth = Annotated[int, Range(1, 100)]
Count = Annotated[int, Range(1, 1024)]
Boxes = Annotated[int, Range(1, 100_000)]
Levels = Annotated[int, Range(1, 10)]
Cells = Annotated[int, Range(1, MOST_CELLS)]
Extent = Annotated[tuple[float, float], Range(-10000.0, 10000.0), Increasing()]
Reach = Annotated[float, Range(0.0, 1000.0)]
Weight = Annotated[float, Range(0.0, 1e6)]
