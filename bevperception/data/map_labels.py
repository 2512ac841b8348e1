"""BEV segmentation labels: layers of the map expansion and footprints of vehicles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import torch
from numpy.typing import NDArray
from nuscenes.map_expansion.map_api import NuScenesMap
from shapely.geometry import LineString, Polygon
from torch import Tensor

from bevperception.config_model import SegmentationConfig
from bevperception.data.rasterise import Edges, box_edges, polygon_edges, rasterise
from bevperception.errors import DataError
from bevperception.geometry import MAX_COORDINATE_M, BEVGrid
from bevperception.names import check_name, has_file
from bevperception.taxonomy import MAP_CLASSES

LAYERS_OF_CLASS = {name: (name,) for name in MAP_CLASSES} | {"divider": ("road_divider", "lane_divider")}
"""Map layers that make up a class (the recipe of BEVFusion)."""
MOST_MAP_BYTES = 256 * 1024**2
"""Of a map expansion; nuScenes' largest has about 60 MB."""


@dataclass(frozen=True)
class Layer:
    """The polygons of one class of a map, ready to be drawn.

    Attributes:
        edges: of each polygon, global frame.
        tree: over the polygons' bounding boxes.
    """

    edges: list[Edges]
    tree: shapely.STRtree

    @classmethod
    def of(cls, polygons: list[Polygon]) -> Layer:
        """Prepare polygons (global frame, metres)."""
        return cls([polygon_edges(polygon) for polygon in polygons], shapely.STRtree(polygons))

    def draw(self, frame: _GroundFrame) -> Tensor:
        """(rows, columns) bool, true where a cell's centre is inside one of the polygons."""
        edges = [self.edges[index] for index in self.tree.query(frame.patch)]
        if not edges:
            return torch.zeros((frame.grid.rows, frame.grid.columns), dtype=torch.bool)
        local = (np.concatenate(edges) - frame.offset) @ frame.global_to_bev.T
        return torch.from_numpy(rasterise(local, frame.grid))


@dataclass(frozen=True)
class _GroundFrame:
    """The ground plane of a BEV frame in the flat map: ``bev = global_to_bev @ (map - offset)``.

    A point of the map stands for a vertical line, which meets the BEV frame's ground plane at the cell it
    colours, whatever the roll and pitch.
    """

    grid: BEVGrid
    global_to_bev: NDArray[np.float64]
    offset: NDArray[np.float64]
    patch: Polygon

    @classmethod
    def of(cls, bev_to_global: Tensor, grid: BEVGrid) -> _GroundFrame:
        planar = bev_to_global.numpy()[:2, [0, 1, 3]]
        corners = [(x, y) for x in (grid.x_min_m, grid.x_max_m) for y in (grid.y_min_m, grid.y_max_m)]
        patch = np.array(corners) @ planar[:, :2].T + planar[:, 2]
        box = shapely.box(*patch.min(axis=0), *patch.max(axis=0))
        return cls(grid, np.linalg.inv(planar[:, :2]), planar[:, 2], box)


def expansion_path(root: Path, location: str) -> Path:
    """Path of a location's map expansion: ``maps/expansion/{location}.json``.

    Raises:
        DataError: the location is not a valid name.
    """
    check_name(location, "map name")
    return root / "maps" / "expansion" / f"{location}.json"


@lru_cache(maxsize=16)
def load_map(root: Path, location: str, divider_width_m: float) -> dict[str, Layer] | None:
    """Load the map classes of a location; they are kept in memory.

    Args:
        root: data root.
        location: for example singapore-onenorth.
        divider_width_m: width that dividers are drawn with.

    Returns:
        layers by class of ``taxonomy.MAP_CLASSES``; None if the location has no map expansion.

    Raises:
        DataError: if the file is damaged, too large, no regular file, outdated, or for a place the devkit
            does not know.
    """
    path = expansion_path(root, location)
    if not has_file(path, MOST_MAP_BYTES, f"map expansion {path}"):
        return None
    try:
        nusc_map = NuScenesMap(dataroot=str(root), map_name=location)
        _check_nodes(nusc_map.node)
        _check_layers(nusc_map)
        return {name: Layer.of(list(_polygons(nusc_map, name, divider_width_m))) for name in MAP_CLASSES}
    except _DAMAGE as error:
        raise DataError(
            f"map expansion {path} cannot be used ({type(error).__name__}: {error}); probably the file is "
            "truncated, edited or outdated: install version 1.3"
        ) from error
    except Exception as error:  # the devkit answers an outdated map by a bare Exception
        if type(error) is not Exception:
            raise
        raise DataError(f"map expansion {path} is outdated; install version 1.3") from error


_DAMAGE = (
    *(AssertionError, LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError),
    *(MemoryError, OSError, shapely.errors.ShapelyError),
)
"""Errors that the devkit and shapely raise for JSON that is not a map."""


def _check_nodes(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for a node that lies nowhere: shapely would drop its polygons without a word."""
    places = np.array([(node["x"], node["y"]) for node in nodes]).reshape(-1, 2)
    if places.dtype.kind not in "fiu":
        raise TypeError("a node whose x or y is no number")
    for row in np.flatnonzero(~(np.abs(places) <= MAX_COORDINATE_M).all(axis=-1))[:1].tolist():
        raise ValueError(f"node {nodes[row].get('token')!r} lies at {places[row].tolist()} m")


def _check_layers(nusc_map: NuScenesMap) -> None:
    """Raise TypeError for a layer that is no list: an empty object would be drawn as an empty layer."""
    for layer in (layer for layers in LAYERS_OF_CLASS.values() for layer in layers):
        records = getattr(nusc_map, layer)
        if not isinstance(records, list):
            raise TypeError(f"{layer} must be a list of records, got a {type(records).__name__}")


def _polygons(nusc_map: NuScenesMap, name: str, divider_width_m: float) -> Iterator[Polygon]:
    for layer in LAYERS_OF_CLASS[name]:
        for record in getattr(nusc_map, layer):
            if "line_token" in record:
                line: LineString = nusc_map.extract_line(record["line_token"])
                if not line.is_empty:
                    yield line.buffer(divider_width_m / 2, quad_segs=8)
                continue
            for token in record.get("polygon_tokens") or [record["polygon_token"]]:
                polygon = nusc_map.extract_polygon(token)
                if not polygon.is_empty:
                    yield polygon


class SegmentationLabels:
    """Draws the segmentation targets of samples.

    Args:
        root: data root.
        config: classes and grid.
        divider_width_m: width that road and lane dividers are drawn with.
    """

    def __init__(self, root: Path, config: SegmentationConfig, divider_width_m: float) -> None:
        self._root = root
        self._classes = config.classes
        self._grid = config.grid
        self._divider_width_m = divider_width_m
        self._needs_map = any(name in MAP_CLASSES for name in config.classes)

    def preload(self, locations: Iterable[str]) -> None:
        """Load the maps of some locations now, in this process, if any class needs a map.

        Raises:
            DataError: see :func:`load_map`.
        """
        if self._needs_map:
            for location in sorted(set(locations)):
                load_map(self._root, location, self._divider_width_m)

    def draw(self, location: str, bev_to_global: Tensor, vehicles: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the labels of one sample.

        Args:
            location: of the sample's log.
            bev_to_global: (4, 4) float64, BEV augmentation included.
            vehicles: (n, 9) boxes in the same BEV frame, see ``Annotations.vehicles``.

        Returns:
            (classes, rows, columns) float32 0 or 1;
            (classes,) bool, False for map classes where the location has no map expansion.
        """
        layers = None
        if self._needs_map:
            layers = load_map(self._root, location, self._divider_width_m)
        frame = _GroundFrame.of(bev_to_global, self._grid)
        labels = torch.zeros((len(self._classes), self._grid.rows, self._grid.columns))
        for index, name in enumerate(self._classes):
            if name == "vehicle":
                labels[index] = draw_footprints(vehicles, self._grid)
            elif layers is not None:
                labels[index] = layers[name].draw(frame)
        present = [name == "vehicle" or layers is not None for name in self._classes]
        return labels, torch.tensor(present, dtype=torch.bool)


def draw_footprints(boxes: Tensor, grid: BEVGrid) -> Tensor:
    """Rasterise the footprints of boxes.

    Args:
        boxes: (n, 9) BEV frame.
        grid: BEV frame.

    Returns:
        (rows, columns) bool, true where a cell's centre lies in a footprint.
    """
    return torch.from_numpy(rasterise(box_edges(boxes), grid))
