"""Shipped configurations by name: from a checkout, and from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from bevperception.config_files import CONFIG_FOLDER, config_path, shipped_configs
from bevperception.config_io import ConfigParser, load_config
from bevperception.errors import ConfigError
from bevperception.training.plan import read_plan

MICRO = CONFIG_FOLDER / "world_micro.yaml"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "name", ["world_micro", "world_micro.yaml", "configs/world_micro.yaml", "./configs/world_micro"]
)
def test_a_shipped_configuration_is_found_from_any_folder(name: str) -> None:
    assert config_path(name) == MICRO
    assert load_config(name) == load_config(MICRO)


def test_those_in_folders_are_found_too() -> None:
    assert config_path("backbones/internimage_t").is_file()
    assert config_path("configs/plans/world.yaml").is_file()
    assert len(read_plan(config_path("plans/world"))) >= 2


def test_a_file_of_the_users_wins_and_a_folder_does_not(tmp_path: Path) -> None:
    (tmp_path / "world_micro").mkdir()
    assert config_path("world_micro") == MICRO
    (tmp_path / "configs").mkdir()
    own = tmp_path / "configs" / "world_micro.yaml"
    own.write_text("training: {steps: 7}")
    assert config_path("configs/world_micro.yaml").samefile(own)
    assert load_config("configs/world_micro.yaml").training.steps == 7


@pytest.mark.parametrize(
    "name", ["world_macro", "../configs/world_micro", "/configs/world_micro.yaml", "", "x" * 5000, "a\0b"]
)
def test_what_is_not_shipped_stays_as_it_is(name: str) -> None:
    assert config_path(name) == Path(name)


def test_a_file_of_the_users_may_build_on_a_shipped_one(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.yaml").write_text("base: [world_micro, backbones/internimage_t]\ntraining: {steps: 7}\n")
    config = load_config(folder / "a.yaml")
    assert config.training.steps == 7
    assert config.model.backbone.variant == "internimage_t"
    (folder / "world_micro").write_text("training: {seed: 11}\n")  # beside it: wins
    assert load_config(folder / "a.yaml").training.seed == 11
    (tmp_path / "b.yaml").write_text("{}")  # in the working directory, but not beside the file that names it
    (folder / "a.yaml").write_text("base: b.yaml\n")
    with pytest.raises(ConfigError, match=r"mine/b\.yaml"):
        load_config(folder / "a.yaml")


def test_a_plan_may_name_shipped_configurations(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("runs: {one: {config: world_micro}}")
    (run,) = read_plan(tmp_path / "plan.yaml")
    assert run.config == MICRO.resolve()


def test_a_missing_configuration_is_answered_with_the_names() -> None:
    assert {"world_micro", "nuscenes", "bevformer_tiny"} <= set(shipped_configs())
    with pytest.raises(ConfigError, match=r"is needed: .*world_micro"):
        ConfigParser("Train.", "train").parse_experiment([])
