"""Parameters: every one described, checked, and refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest

from bevperception.errors import ConfigError
from bevperception.streaming.settings import NodeSettings, defaults


def test_every_parameter_is_described_and_its_default_lies_in_its_range() -> None:
    assert NodeSettings() == NodeSettings(**{name: value for name, value, _ in defaults()})
    for name, value, spec in defaults():
        assert spec.description, name
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        assert number == (spec.low is not None and spec.high is not None), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"score_threshold": 1.5}, r"score_threshold must lie between 0\.0 and 1\.0, got 1\.5"),
        ({"score_threshold": float("nan")}, "score_threshold must lie between"),
        ({"min_cameras": 0}, "min_cameras must lie between 1"),
        ({"min_cameras": 2.5}, "min_cameras must be of type int"),
        ({"min_cameras": True}, "min_cameras must be of type int"),
        ({"undistort": 1}, "undistort must be of type bool"),
        ({"image_transport": "theora"}, "image_transport must be one of compressed, raw"),
        ({"classes": ["car", "tree"]}, "unknown tree"),
        ({"warn_after_s": 5.0}, r"error_after_s \(3\.0\) must not be below warn_after_s \(5\.0\)"),
        ({"colour": "red"}, "there is no parameter colour"),
    ],
)
def test_wrong_values_are_refused_with_a_reason(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NodeSettings().changed(values, configured=False)


def test_only_live_parameters_change_while_configured() -> None:
    settings = NodeSettings().changed({"score_threshold": 1, "classes": ["car", ""]}, configured=True)
    assert (settings.score_threshold, settings.classes) == (1.0, ("car",))
    with pytest.raises(ConfigError, match="anchor cannot change while the node is configured"):
        settings.changed({"anchor": "CAM_BACK"}, configured=True)
    assert settings.changed({"anchor": "CAM_FRONT", "classes": [""]}, configured=True).classes == ()
