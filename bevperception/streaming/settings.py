"""The node's parameters: type, default, range and description of each, and their checks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from bevperception.errors import ConfigError
from bevperception.taxonomy import DETECTION_CLASSES


@dataclass(frozen=True)
class Spec:
    """Description, range and choices of one parameter.

    Attributes:
        description: for people.
        low, high: range of a number, both ends allowed; None for no range.
        choices: allowed strings; empty for any.
        live: may be changed while the node is configured.
    """

    description: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    live: bool = False


def _setting(default: Any, description: str, **more: Any) -> Any:
    return field(default=default, metadata={"spec": Spec(description, **more)})


@dataclass(frozen=True)
class NodeSettings:
    """Values of all parameters; ``spec_of`` gives each one's specification.

    Raises:
        ConfigError: on construction, if a value is outside of its range or choices, or has the wrong type.
    """

    weights: str = _setting("", "weights.safetensors, a run's folder or a training checkpoint")
    config: str = _setting("", "YAML configuration of the model; empty takes the one inside the weights")
    device: str = _setting("auto", "where the model runs", choices=("auto", "cpu", "cuda"))
    precision: str = _setting("32-true", "of the arithmetic", choices=("auto", "32-true", "bf16-mixed"))
    compiled: bool = _setting(False, "run the backbone through torch.compile; activation takes minutes")
    threads: int = _setting(0, "PyTorch's threads; 0 leaves them as they are", low=0, high=256)

    image_transport: str = _setting("compressed", "type of the image topics", choices=("compressed", "raw"))
    image_reliability: str = _setting(
        "best_effort", "quality of service of the image topics", choices=("best_effort", "reliable")
    )
    rectified: bool = _setting(False, "the images are rectified: P of camera_info holds, not K and D")
    undistort: bool = _setting(True, "undistort distorted images; otherwise their cameras are masked")
    calibration_file: str = _setting("", "YAML file with the cameras' poses; empty relies on TF")
    use_tf: bool = _setting(True, "listen to TF, where tf2_msgs is installed")
    base_frame: str = _setting("base_link", "the vehicle's frame; results are in it")
    tf_check_m: float = _setting(
        0.05, "farthest that TF and calibration file may differ, metres", low=0.0, high=10.0
    )
    tf_check_deg: float = _setting(
        0.5, "farthest that TF and calibration file may differ, degrees", low=0.0, high=180.0
    )

    motion_source: str = _setting(
        "odometry", "where ego motion comes from", choices=("odometry", "tf", "none")
    )
    odom_frame: str = _setting("odom", "fixed frame of ego motion from TF")
    without_motion: str = _setting(
        "single_frame",
        "when ego motion is unknown: look at each frame alone, or stop publishing",
        choices=("single_frame", "stop"),
    )
    max_extrapolation_s: float = _setting(
        0.25, "longest time that ego motion goes on beyond its messages", low=0.0, high=5.0
    )

    anchor: str = _setting("CAM_FRONT", "camera whose images open a set")
    sweep_trigger: bool = _setting(False, "std_msgs/Header messages on ~/input/sweep open sets instead")
    sync_tolerance_s: float = _setting(
        0.05, "farthest that an image's stamp lies from its set's", low=0.001, high=1.0
    )
    max_wait_s: float = _setting(0.1, "longest wait for cameras after the trigger", low=0.0, high=5.0)
    min_period_s: float = _setting(0.0, "sets come at least so far apart", low=0.0, high=60.0)
    trigger_timeout_s: float = _setting(
        1.0, "an anchor that is silent for longer is replaced by another camera", low=0.05, high=60.0
    )
    reference_offset_s: float = _setting(
        0.0, "a set's instant is its anchor's stamp plus this", low=-1.0, high=1.0
    )
    clock_jump_s: float = _setting(
        1.0, "stamps that leap farther than this are suspect; three in a row reset all", low=0.1, high=3600.0
    )

    min_cameras: int = _setting(
        3, "with fewer usable cameras nothing is published", low=1, high=64, live=True
    )
    camera_timeout_s: float = _setting(
        1.0, "a camera without an image for longer is stale", low=0.05, high=60.0, live=True
    )
    black_level: int = _setting(
        10, "images whose pixels are all but darker are masked; 0 masks none", low=0, high=255, live=True
    )
    frozen_after: int = _setting(
        3,
        "a camera that sent the same image so often in a row is masked; 0 never",
        low=0,
        high=1000,
        live=True,
    )
    max_gap_s: float = _setting(2.0, "a longer pause forgets the memory", low=0.01, high=60.0)
    max_jump_m: float = _setting(80.0, "a longer leap of the pose forgets the memory", low=0.1, high=1e6)

    score_threshold: float = _setting(
        0.1, "boxes with lower scores are in no message", low=0.0, high=1.0, live=True
    )
    marker_threshold: float = _setting(
        0.3, "boxes with lower scores have no marker and are not in the picture", low=0.0, high=1.0, live=True
    )
    classes: tuple[str, ...] = _setting((), "classes that are published; none given means all", live=True)
    bev_image_size: int = _setting(400, "side of the BEV picture in pixels", low=64, high=2048)

    diagnostics_period_s: float = _setting(1.0, "time between diagnostics", low=0.05, high=60.0)
    warn_after_s: float = _setting(1.0, "no result for longer is a warning", low=0.05, high=600.0, live=True)
    error_after_s: float = _setting(3.0, "no result for longer is an error", low=0.05, high=600.0, live=True)

    def __post_init__(self) -> None:
        for entry in fields(self):
            object.__setattr__(self, entry.name, _checked(entry, getattr(self, entry.name)))
        unknown = [name for name in self.classes if name not in DETECTION_CLASSES]
        if unknown:
            raise ConfigError(
                f"classes: unknown {', '.join(unknown)}; there are {', '.join(DETECTION_CLASSES)}"
            )
        if self.error_after_s < self.warn_after_s:
            raise ConfigError(
                f"error_after_s ({self.error_after_s}) must not be below warn_after_s ({self.warn_after_s})"
            )

    def changed(self, values: Mapping[str, Any], configured: bool) -> NodeSettings:
        """Change some of the settings.

        Args:
            values: by name.
            configured: whether only live parameters may change.

        Raises:
            ConfigError: if a parameter is unknown, may not change now, or has a wrong value.
        """
        for name, value in values.items():
            if name not in spec_by_name():
                raise ConfigError(f"there is no parameter {name}")
            # A node takes its parameters in as arrays, which equal no tuple.
            same = _plain(value) == _plain(getattr(self, name))
            if configured and not spec_by_name()[name].live and not same:
                raise ConfigError(f"{name} cannot change while the node is configured: clean it up first")
        return replace(self, **dict(values))


def spec_of(entry: Field[Any]) -> Spec:
    """Specification of a field of :class:`NodeSettings`."""
    spec = entry.metadata["spec"]
    assert isinstance(spec, Spec)
    return spec


def spec_by_name() -> dict[str, Spec]:
    """All parameters in order."""
    return {entry.name: spec_of(entry) for entry in fields(NodeSettings)}


def defaults() -> Iterator[tuple[str, Any, Spec]]:
    """Name, default and specification of every parameter."""
    for entry in fields(NodeSettings):
        yield entry.name, entry.default, spec_of(entry)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) or hasattr(value, "tolist") else value


def _checked(entry: Field[Any], value: Any) -> Any:
    spec, kind = spec_of(entry), type(entry.default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is tuple and not isinstance(value, str):
        # An empty list is how a YAML file says none; ROS makes [''] of it.
        value = tuple(str(item) for item in value or () if str(item))
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{entry.name} must be of type {kind.__name__}, got {value!r}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        below = spec.low is not None and value < spec.low
        above = spec.high is not None and value > spec.high
        if below or above or not math.isfinite(value):
            raise ConfigError(f"{entry.name} must lie between {spec.low} and {spec.high}, got {value}")
    if spec.choices and value not in spec.choices:
        raise ConfigError(f"{entry.name} must be one of {', '.join(spec.choices)}, got {value!r}")
    return value
