"""Every setting has its range, and values outside of it are refused with the setting's name."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from bevperception.config import (
    AugmentationConfig,
    DataConfig,
    ExperimentConfig,
    TrainingConfig,
)
from bevperception.config_io import ConfigParser, config_from_dict, load_config
from bevperception.config_model import (
    BEVConfig,
    DetectionConfig,
    ModelConfig,
    PerspectiveConfig,
    SegmentationConfig,
)
from bevperception.errors import ConfigError
from bevperception.ranges import Distinct, Increasing, Length, Range, add_number, check_settings, rules_of
from bevperception.streaming.settings import NodeSettings, spec_by_name
from bevperception.world.settings import WorldConfig

REPOSITORY = Path(__file__).parents[1]


def sections(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted section, instance) of all settings objects under one."""
    yield prefix, settings
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if is_dataclass(value):
            yield from sections(value, f"{prefix}.{entry.name}".lstrip("."))


def kinds(hint: Any) -> set[type]:
    """The scalar types inside a hint."""
    if get_origin(hint) is Annotated:
        return kinds(get_args(hint)[0])
    inner = [part for part in get_args(hint) if part is not Ellipsis and not isinstance(part, str)]
    return set().union(*map(kinds, inner)) if inner else {hint}


def numeric_fields() -> list[tuple[str, Any, str]]:
    """(dotted name, settings, field) of every number in the experiment's and the world's settings."""
    found = []
    for section, settings in [*sections(ExperimentConfig()), *sections(WorldConfig())]:
        hints = get_type_hints(type(settings), include_extras=True)
        for entry in fields(settings):
            if kinds(hints[entry.name]) & {int, float}:
                found.append((f"{section}.{entry.name}".lstrip("."), settings, entry.name))
    return found


NUMERIC = numeric_fields()


def one_range(settings: Any, name: str) -> Range:
    found = [rule for rule in rules_of(type(settings), name) if isinstance(rule, Range)]
    assert len(found) == 1, f"{type(settings).__name__}.{name} needs exactly one Range"
    return found[0]


def is_whole(settings: Any, name: str) -> bool:
    return int in kinds(get_type_hints(type(settings), include_extras=True)[name])


def outside(rule: Range, whole: bool) -> list[Any]:
    """The nearest values that a range does not hold, and those that no range does."""
    below = (
        [rule.above]
        if rule.least is None
        else [rule.least - 1 if whole else math.nextafter(rule.least, -9e99)]
    )
    above = (
        [rule.below] if rule.most is None else [rule.most + 1 if whole else math.nextafter(rule.most, 9e99)]
    )
    return [*below, *above, math.nan, math.inf, -math.inf, True, "1", 10**400]


def inside(rule: Range, whole: bool) -> list[Any]:
    """The outermost values that a range holds."""
    low = rule.least if rule.least is not None else math.nextafter(rule.above or 0.0, 9e99)
    high = rule.most if rule.most is not None else math.nextafter(rule.below or 0.0, -9e99)
    return [int(low), int(high)] if whole else [low, high]


def with_value(settings: Any, name: str, value: Any) -> Any:
    """The settings with one number changed: in a list its last item."""
    old = getattr(settings, name)
    return replace(settings, **{name: (*old[:-1], value) if isinstance(old, tuple) else value})


def complaint_about(settings: Any, name: str, value: Any) -> str:
    try:
        with_value(settings, name, value)
    except ConfigError as error:
        return str(error)
    return ""


def test_all_settings_are_walked_over() -> None:
    """The walk below sees what it should: numbers, lists of numbers, and numbers that may be None."""
    names = {name for name, _, _ in NUMERIC}
    assert {"training.steps", "augmentation.resize", "model.bev.temporal_heads", "jpeg_quality"} <= names
    assert len(names) > 80


@pytest.mark.parametrize(("key", "settings", "name"), NUMERIC, ids=[key for key, _, _ in NUMERIC])
def test_every_number_has_a_range_and_nothing_outside_passes(key: str, settings: Any, name: str) -> None:
    rule, whole = one_range(settings, name), is_whole(settings, name)
    assert (rule.least is None) != (rule.above is None), f"{key} needs a lower limit"
    assert (rule.most is None) != (rule.below is None), f"{key} needs an upper limit"
    for value in outside(rule, whole):
        with pytest.raises(ConfigError, match=f"^{key} must be ") as caught:
            with_value(settings, name, value)
        assert caught.value.key == key
    for value in inside(rule, whole):
        complaint = complaint_about(settings, name, value)  # another rule than the range may have one
        assert str(rule) not in complaint
        assert "finite" not in complaint


@pytest.mark.parametrize(
    "name", [e.name for e in fields(NodeSettings) if isinstance(e.default, (int, float))]
)
def test_every_number_of_the_node_has_a_range(name: str) -> None:
    default = getattr(NodeSettings(), name)
    if isinstance(default, bool):
        return
    spec = spec_by_name()[name]
    assert spec.low is not None
    assert spec.high is not None
    for value in (spec.low - 1, spec.high + 1, math.nan, math.inf):
        with pytest.raises(ConfigError, match=f"^{name} must "):
            NodeSettings(**{name: type(default)(value) if math.isfinite(value) else value})


def test_help_shows_the_range_of_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ConfigParser("Train.", "bevperception train").parse_experiment(["--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    for key, settings, name in NUMERIC:
        if "." in key:
            option = text[text.index(f"--{key} ") :]
            assert str(one_range(settings, name)) in option[: option.index("(type:")], key


SENSELESS: dict[str, Callable[[], object]] = {
    r"augmentation\.resize must be 0.1 to 10, got \(0, 0\)": lambda: AugmentationConfig(resize=(0, 0)),
    r"augmentation\.resize must be in ascending order \(or equal\), got \(2, 1\)": lambda: AugmentationConfig(
        resize=(2, 1)
    ),
    r"augmentation\.bev_scale must be": lambda: AugmentationConfig(bev_scale=(0.0, 0.0)),
    r"data\.cameras must be without repetition": lambda: DataConfig(cameras=("CAM_FRONT", "CAM_FRONT")),
    r"data\.cameras must be not empty, got \(\)": lambda: DataConfig(cameras=()),
    r"data\.cameras must be a list, each not empty": lambda: DataConfig(cameras=("",)),
    r"data\.image_size must be a list of 2, got": lambda: DataConfig(image_size=(3, 4, 5)),  # type: ignore[arg-type]
    r"data\.root must be text without NUL": lambda: DataConfig(root="a\0b"),
    r"data\.root must be not empty": lambda: DataConfig(root=""),
    r"data\.bev_frame must be 'ego' or 'lidar', got 'map'": lambda: DataConfig(
        bev_frame="map"  # type: ignore[arg-type]
    ),
    r"training\.tensorboard must be true or false, got 1": lambda: TrainingConfig(
        tensorboard=1  # type: ignore[arg-type]
    ),
    r"training\.learning_rate must be a finite number, got nan": lambda: TrainingConfig(
        learning_rate=math.nan
    ),
    r"training\.steps must be a whole number, got 3.0": lambda: TrainingConfig(steps=3.0),  # type: ignore[arg-type]
    r"training\.steps must be 1 to .*, got a number of thousands of digits": lambda: TrainingConfig(
        steps=10**5000
    ),
    r"detection\.code_weights must be 10 long, got \(1.0,\)": lambda: DetectionConfig(code_weights=(1.0,)),
    r"perspective\.size_limits_px must be in ascending order": lambda: PerspectiveConfig(
        size_limits_px=(2.0, 2.0)
    ),
    r"segmentation\.classes must be without repetition": lambda: SegmentationConfig(
        classes=("vehicle", "vehicle")
    ),
    r"a grid of 1 to 4096 cells a side, got 100000": lambda: SegmentationConfig(cell_m=1e-3),
    r"bev\.y_range_m \(0, 0.1\) over 101 cells": lambda: BEVConfig(y_range_m=(0.0, 0.1), rows=101),
    r"a grid of 1 to 4096 cells a side, got 0": lambda: SegmentationConfig(cell_m=1e3),
    r"model\.bev\.camera_embedding \(2\) must be 0 or at least the number of data\.cameras \(3\)": (
        lambda: ExperimentConfig(
            ModelConfig(bev=BEVConfig(camera_embedding=2)), DataConfig(cameras=("a", "b", "c"))
        )
    ),
}


@pytest.mark.parametrize("message", SENSELESS)
def test_senseless_settings_are_refused(message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SENSELESS[message]()


def test_a_file_is_blamed_for_its_value_and_the_command_line_for_its_own(tmp_path: Path) -> None:
    base, top = tmp_path / "base.yaml", tmp_path / "top.yaml"
    base.write_text("data: {workers: -1}\n")
    top.write_text("base: base.yaml\ntraining: {steps: 3}\n")
    with pytest.raises(ConfigError, match=r"base\.yaml: data\.workers must be 0 to 1024, got -1$"):
        load_config(top)
    parser = ConfigParser("Train.", "tools/train.py")
    with pytest.raises(ConfigError, match=r"^command line: training\.steps must be 1 to .*, got 0$"):
        parser.parse_experiment(["--config", str(top), "--data.workers=0", "--training.steps", "0"])


def test_shipped_configurations_and_weights_are_inside_their_ranges() -> None:
    from bevperception.checkpoints.weights import read_weights

    # tests/test_configs_v2.py loads those that begin with bevformer_v2.
    paths = [p for p in REPOSITORY.glob("configs/*.yaml") if not p.name.startswith("bevformer_v2")]
    assert len(paths) >= 7
    for path in paths:
        load_config(path)
    for name in ("world_v2", "world_micro", "world_micro_single"):
        weights = read_weights(name)
        assert weights.card is not None
        config_from_dict(weights.card.config, name)


@pytest.mark.parametrize("parser", [argparse.ArgumentParser, lambda: ConfigParser("Try.", "try")])
@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (int, "0", "must be 1 to 5, got 0"),
        (int, "6", "must be 1 to 5, got 6"),
        (int, "2.0", "must be a whole number, got '2.0'"),
        (int, "9" * 5000, "must be a whole number, got '999"),
        (float, "nan", "must be 1 to 5, got nan"),
        (float, "-inf", "must be 1 to 5, got -inf"),
        (float, "x", "must be a number, got 'x'"),
    ],
)
def test_an_option_outside_its_range_is_refused(parser: Any, kind: Any, text: str, message: str) -> None:
    program = parser()
    add_number(program, "--some", kind, Range(1, 5), default=2, help="how many (%(default)s)")
    with pytest.raises(ConfigError, match=rf"^command line: --some {message}"):
        program.parse_args([f"--some={text}"])
    assert program.parse_args(["--some=3"]).some == 3
    assert program.parse_args([]).some == 2
    assert "how many (2) [1 to 5]" in " ".join(program.format_help().split())


def test_every_number_of_the_programs_has_a_range() -> None:
    """Options come by add_number; only ros2_ws, which has parameters of its own, does without."""
    paths = [*REPOSITORY.glob("tools/*.py"), *REPOSITORY.glob("bevperception/**/*.py")]
    bare = [path.name for path in paths if re.search(r"type=(int|float)\b", path.read_text(encoding="utf-8"))]
    assert bare == []


def test_rules_in_words() -> None:
    @dataclass
    class Settings:
        few: Annotated[tuple[Annotated[int, Range(0, 3)], ...] | None, Length(2, 3), Distinct()] = None
        inner: TrainingConfig = field(default_factory=TrainingConfig)

    check_settings(Settings(), "here")
    check_settings(Settings((0, 3)), "here")
    for value, message in (((1,), "2 to 3 long"), ((1, 1), "without repetition"), ((1, 4), "each 0 to 3")):
        with pytest.raises(ConfigError, match=rf"here\.few must be .*{message}"):
            check_settings(Settings(value), "here")
    texts = [
        str(r) for r in (Range(above=0.0, most=2.5), Range(0, below=1), Range(-1, 1), Length(2), Increasing())
    ]
    assert texts == [
        "above 0 and at most 2.5",
        "at least 0 and below 1",
        "-1 to 1",
        "2 or more long",
        "in ascending order",
    ]
