"""The names things go by: cameras, detection classes, segmentation classes and attributes of nuScenes."""

from __future__ import annotations

from typing import Final

CAMERA_NAMES: Final = (
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_FRONT_LEFT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
    "CAM_BACK_RIGHT",
)
"""The six cameras in the order of the published BEVFormer (its camera embeddings depend on it)."""

DETECTION_CLASSES: Final = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)
"""The ten nuScenes detection classes, in the order of the published BEVFormer v1's class scores. Labels are
indices into these everywhere; a head whose own order differs (``classes`` of its settings) translates."""

SEGMENTATION_CLASSES: Final = (
    "drivable_area",
    "ped_crossing",
    "walkway",
    "stop_line",
    "carpark_area",
    "divider",
    "vehicle",
)
"""BEV segmentation layers: six of the map (the BEVFusion recipe) and the footprints of vehicles."""

MAP_CLASSES: Final = SEGMENTATION_CLASSES[:-1]
"""The segmentation layers that come from the nuScenes map expansion."""

VEHICLE_CATEGORY: Final = "vehicle."
"""How the nuScenes categories begin whose footprints make the ``vehicle`` layer. Two of the ten are no
detection class: ``vehicle.emergency.ambulance`` and ``vehicle.emergency.police``."""

DEFAULT_ATTRIBUTES: Final = {
    # class: (moving, not moving); '' where nuScenes defines no attribute for the class
    "car": ("vehicle.moving", "vehicle.parked"),
    "truck": ("vehicle.moving", "vehicle.parked"),
    "construction_vehicle": ("vehicle.moving", "vehicle.parked"),
    "bus": ("vehicle.moving", "vehicle.stopped"),
    "trailer": ("vehicle.moving", "vehicle.parked"),
    "barrier": ("", ""),
    "motorcycle": ("cycle.with_rider", "cycle.without_rider"),
    "bicycle": ("cycle.with_rider", "cycle.without_rider"),
    "pedestrian": ("pedestrian.moving", "pedestrian.standing"),
    "traffic_cone": ("", ""),
}
"""Attribute by class and speed, the rule of the published BEVFormer (mmdet3d 0.17, nuscenes_dataset)."""

_VEHICLE = ("vehicle.moving", "vehicle.parked", "vehicle.stopped")
_CYCLE = ("cycle.with_rider", "cycle.without_rider")
_PEDESTRIAN = ("pedestrian.moving", "pedestrian.standing", "pedestrian.sitting_lying_down")
ATTRIBUTES: Final[dict[str, tuple[str, ...]]] = {
    "car": _VEHICLE,
    "truck": _VEHICLE,
    "construction_vehicle": _VEHICLE,
    "bus": _VEHICLE,
    "trailer": _VEHICLE,
    "barrier": (),
    "motorcycle": _CYCLE,
    "bicycle": _CYCLE,
    "pedestrian": _PEDESTRIAN,
    "traffic_cone": (),
}
"""Attributes that a class may have; the perspective head's attribute output counts them."""

MAX_ATTRIBUTES: Final = 3
"""Most attributes of any class."""
