"""Files that do not fit, or that nobody should trust: at every way in each gets a sentence, never a guess."""

from __future__ import annotations

import argparse
import copy
import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bevperception.checkpoints.backbone import load_backbone
from bevperception.checkpoints.card import MOST_NESTED, MOST_VALUES, Card, card_from_json, card_from_values
from bevperception.checkpoints.tensors import converted, left_aside
from bevperception.checkpoints.torch_files import read_torch_file
from bevperception.checkpoints.weights import (
    AVERAGE_KEY,
    CONFIG_KEY,
    FORMAT,
    Weights,
    check_fit,
    config_inside,
    load_into,
    load_model,
    read_weights,
    save_weights,
)
from bevperception.config import ExperimentConfig
from bevperception.config_io import config_to_dict, load_config, typed_config
from bevperception.config_model import BackboneConfig
from bevperception.errors import BevError, CheckpointError, ConfigError
from bevperception.models.backbones import build_backbone
from bevperception.models.bevformer import BEVFormer
from bevperception.streaming.loading import load_predictor
from bevperception.streaming.settings import NodeSettings
from bevperception.taxonomy import DETECTION_CLASSES
from bevperception.training.checkpointing import check_resumable
from bevperception.training.optimizer import build_optimizer
from tests.checkpoints.test_weights import SMALL, small_config

RESNET = "resnet_micro"


@pytest.fixture(scope="module")
def config() -> ExperimentConfig:
    """A small model with every kind of buffer: batch norms that count, group norms, embeddings."""
    return small_config(backbone__variant=RESNET)


@pytest.fixture(scope="module")
def state(config: ExperimentConfig) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return BEVFormer(config.model).state_dict()


def training_checkpoint(path: Path, state: object, config: object, **more: object) -> Path:
    """What Lightning writes of a run, as far as it is looked at."""
    named = {f"model.{k}": v for k, v in state.items()} if isinstance(state, dict) else state
    rest: dict[str, object] = {"optimizer_states": [], "lr_schedulers": [], "loops": {}, "callbacks": {}}
    torch.save({"state_dict": named, "global_step": 3, CONFIG_KEY: config, **rest, **more}, path)
    return path


def optimizer_state(model: BEVFormer, config: ExperimentConfig) -> dict[str, Any]:
    """Of a run's optimiser after a step."""
    optimizer, _ = build_optimizer(model, config.training)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def by_weights(folder: Path, state: dict[str, Tensor], config: ExperimentConfig) -> None:
    path = save_weights(folder, state, Card(config_to_dict(config)))
    load_model(read_weights(path), config)


def by_named_part(folder: Path, state: dict[str, Tensor], config: ExperimentConfig) -> None:
    path = save_weights(folder, state, Card(config_to_dict(config)))
    load_into(BEVFormer(config.model), read_weights(path), config, ("backbone", "neck"))


def by_checkpoint(folder: Path, state: dict[str, Tensor], config: ExperimentConfig) -> None:
    path = training_checkpoint(folder / "run.ckpt", state, config_to_dict(config))
    load_model(read_weights(path), config)


def by_average(folder: Path, state: dict[str, Tensor], config: ExperimentConfig) -> None:
    whole = BEVFormer(config.model).state_dict()
    path = training_checkpoint(folder / "a.ckpt", whole, config_to_dict(config), **{AVERAGE_KEY: state})
    load_model(read_weights(path), config)


def by_resume(folder: Path, state: dict[str, Tensor], config: ExperimentConfig) -> None:
    model = BEVFormer(config.model)
    moments = [optimizer_state(model, config)]
    path = training_checkpoint(
        folder / "resume.ckpt", state, config_to_dict(config), optimizer_states=moments
    )
    check_resumable(path, config, model)


def by_backbone(folder: Path, state: dict[str, Tensor], config: ExperimentConfig) -> None:
    torch.save({"state_dict": state}, folder / "b.pth")
    load_backbone(build_backbone(config.model.backbone), RESNET, folder / "b.pth")


def by_backbone_safetensors(folder: Path, state: dict[str, Tensor], config: ExperimentConfig) -> None:
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "b.safetensors")
    load_backbone(build_backbone(config.model.backbone), RESNET, folder / "b.safetensors")


def by_node(folder: Path, state: dict[str, Tensor], config: ExperimentConfig) -> None:
    save_weights(folder, state, Card(config_to_dict(config)))
    load_predictor(NodeSettings(weights=str(folder), device="cpu"))


Door = Callable[[Path, dict[str, Tensor], ExperimentConfig], None]
DOORS: tuple[Door, ...] = (
    by_weights,
    by_named_part,
    by_checkpoint,
    by_average,
    by_resume,
    by_backbone,
    by_backbone_safetensors,
    by_node,
)
WEIGHT, COUNTER = "backbone.layer1.0.conv1.weight", "backbone.bn1.num_batches_tracked"
NAN, ONE = float("nan"), torch.tensor(1)
DAMAGES: tuple[tuple[str, Callable[[Tensor], Tensor], str], ...] = (
    (WEIGHT, lambda w: (w * 100).to(torch.int32), r"1 of \d+ .*layer1\.0\.conv1\.weight is int32"),
    (WEIGHT, lambda w: w.index_fill(0, ONE, NAN), r"NaN or infinite weights in .*layer1"),
    (WEIGHT, lambda w: w.to(torch.float8_e4m3fn), "is float8_e4m3fn"),
    (WEIGHT, lambda w: w.to(torch.complex64), "is complex64"),
    (WEIGHT, lambda w: w > 0, "is bool"),
    (COUNTER, lambda w: w.float(), "num_batches_tracked is float32"),
    (WEIGHT, lambda w: w.index_fill(0, ONE, -float("inf")), "NaN or infinite"),
    (WEIGHT, lambda w: w.double().index_fill(0, ONE, 1e300), "too large for float32"),
    (WEIGHT, lambda w: w[..., :0], "shape"),
)


@pytest.mark.parametrize("door", DOORS, ids=lambda d: d.__name__)
def test_numbers_that_are_no_weights_are_refused_at_every_door(
    door: Door, tmp_path: Path, state: dict[str, Tensor], config: ExperimentConfig
) -> None:
    door(tmp_path, state, config)  # as it should be
    # All damages where it is fast; the other doors lead to the same function.
    for name, damage, complaint in DAMAGES if door in (by_backbone, by_resume) else DAMAGES[:3]:
        with pytest.raises(CheckpointError, match=complaint) as told:
            door(tmp_path, state | {name: damage(state[name])}, config)
        assert len(str(told.value).splitlines()) <= 3


def test_sparse_and_empty_tensors_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    value = state[WEIGHT]
    for changed, complaint in ((value.to_sparse(), "sparse_coo"), (value.to("meta"), "without values")):
        with pytest.raises(CheckpointError, match=complaint):
            converted({WEIGHT: changed}, state, "file")


def test_real_floating_point_of_any_width_is_taken_exactly(state: dict[str, Tensor]) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        found = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()
        }
        for name, value in converted(found, state, "file").items():
            assert value.dtype == state[name].dtype
            assert torch.equal(value, found[name].to(state[name].dtype))
    few = converted({COUNTER: torch.tensor(7, dtype=torch.int32)}, state, "file")
    assert few[COUNTER].dtype == torch.int64
    assert int(few[COUNTER]) == 7


def test_nan_in_a_part_that_is_not_asked_for_is_no_matter(
    tmp_path: Path, state: dict[str, Tensor], config: ExperimentConfig
) -> None:
    broken = state | {"segmentation.stem.0.weight": torch.full((1,), float("nan"))}
    aside = load_into(
        BEVFormer(config.model), Weights(broken, Card({}), tmp_path), config, ("backbone", "neck")
    )
    assert "backbone" not in aside
    assert sum(aside.values()) == sum(not name.startswith(("backbone.", "neck.")) for name in broken)
    assert left_aside({"a": 2, "b": 3}) == "a (2), b (3)"
    assert left_aside({}) == "nothing"


def randomised(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer different from what any start makes of it."""
    return {
        name: torch.rand_like(value) + 0.5 if value.is_floating_point() else torch.full_like(value, 17)
        for name, value in module.state_dict().items()
    }


@pytest.mark.parametrize("variant", [RESNET, "internimage_micro"])
def test_all_of_a_backbone_is_filled_and_the_rest_counted_by_part(tmp_path: Path, variant: str) -> None:
    torch.manual_seed(3)
    fresh = build_backbone(BackboneConfig(variant))
    source = randomised(fresh)
    file = {f"img_backbone.{name}": value for name, value in source.items()}
    file |= {f"img_neck.{i}.weight": torch.zeros(1) for i in range(4)} | {
        "head.fc": torch.zeros(1, dtype=torch.int8)
    }
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "groups": [{"lr": 0.1}]}
    torch.save({"state_dict": file, "optimizer": optimizer, "epoch": 3}, tmp_path / "d.pth")
    aside = load_backbone(fresh, variant, tmp_path / "d.pth")
    assert aside == {"img_neck": 4, "head": 1, "optimizer": 1}
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, source[name]), name


def test_tensors_without_use_inside_a_built_part_are_refused(tmp_path: Path) -> None:
    micro = build_backbone(BackboneConfig("internimage_micro", out_indices=(1, 2))).state_dict()
    extra = {"stages.1.blocks.0.dcn.center_scale.weight": torch.zeros(2)}
    save_file({**micro, **extra, "stages.3.norm.weight": torch.zeros(2)}, tmp_path / "m.safetensors")
    model = build_backbone(BackboneConfig("internimage_micro", out_indices=(1, 2)))
    with pytest.raises(CheckpointError, match=r"1 tensors that .* no use for \(stages\.1\.blocks\.0"):
        load_backbone(model, "internimage_micro", tmp_path / "m.safetensors")
    save_file({**micro, "stages.3.norm.weight": torch.zeros(2)}, tmp_path / "m.safetensors")
    assert load_backbone(model, "internimage_micro", tmp_path / "m.safetensors") == {"stages.3": 1}
    names = [n for n in micro if n.endswith(".scale1")]
    if names:
        save_file({n: v for n, v in micro.items() if n != names[0]}, tmp_path / "m.safetensors")
        with pytest.raises(CheckpointError, match="only some blocks have scale1"):
            load_backbone(model, "internimage_micro", tmp_path / "m.safetensors")


def test_a_deformable_resnet_does_not_fit_a_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Path(__file__).parents[1] / "golden" / "manifests" / "bevformer_base.json"
    names = json.loads(manifest.read_text(encoding="utf-8"))["state_dict"]
    with torch.device("meta"):
        model = build_backbone(BackboneConfig("resnet101_caffe"))
        tensors = {
            name.removeprefix("img_backbone."): torch.empty(shape)
            for name, (shape, _) in names.items()
            if name.startswith("img_backbone.")
        }
    monkeypatch.setattr("bevperception.checkpoints.backbone._tensors", lambda path: (tensors, {}))
    with pytest.raises(CheckpointError, match=r"52 tensors .* no use for \(layer3\.0\.conv2\.conv_offset"):
        load_backbone(model, "resnet101_caffe", "r101_dcn.pth")


def test_numpy_numbers_beside_the_weights_are_read(tmp_path: Path) -> None:
    beside = {
        "best": np.float64(0.5),
        "loss": np.float32(2.0),
        "step": np.int64(7),
        "done": np.bool_(True),
        "name": np.str_("run"),
    }
    for zipped in (True, False):
        torch.save({"meta": beside}, tmp_path / "n.pth", _use_new_zipfile_serialization=zipped)
        content: Any = read_torch_file(tmp_path / "n.pth")
        assert content["meta"] == beside
        assert {type(v) for v in content["meta"].values()} == {type(v) for v in beside.values()}


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    sound, bomb = tmp_path / "sound.pth", tmp_path / "bomb.pth"
    torch.save({"state_dict": {"zeros": torch.zeros(1000, 1000)}}, sound)
    assert isinstance(read_torch_file(sound), dict)
    with zipfile.ZipFile(sound) as stored, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in stored.infolist():
            packed.writestr(part.filename, stored.read(part), zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=r"unpacks to 4\d{6}; torch.save does not compress"):
        read_torch_file(bomb)


@pytest.mark.parametrize("zipped", [True, False])
def test_other_objects_are_named_instead_of_damage(tmp_path: Path, zipped: bool) -> None:
    for value, name in (
        (argparse.Namespace(rate=0.1), r"argparse\.Namespace"),
        (np.zeros(2), r"numpy\.core\.multiarray\._reconstruct"),
        (Path("x"), r"pathlib\.PosixPath"),
    ):
        path = tmp_path / "o.pth"
        torch.save({"meta": value, "state_dict": {}}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=rf"holds an object of {name}; only tensors") as told:
            read_torch_file(path)
        assert "damaged" not in str(told.value)


@pytest.mark.parametrize(
    ("state_dict", "more", "complaint"),
    [
        ([1, 2], {}, "state_dict of .* must be tensors by name, got a list of 2"),
        (None, {}, "got nothing"),
        ({1: torch.zeros(1)}, {}, "got a key that is a int"),
        ({"model.a": 3.0}, {}, "got a float for 'model.a'"),
        ({"model.a": torch.zeros(1), "b": torch.zeros(1)}, {}, "1 tensors that are none of the model's: b"),
        ({"model.a": torch.zeros(1)}, {AVERAGE_KEY: [1]}, f"{AVERAGE_KEY} of .* got a list of 1"),
        ({"model.a": torch.zeros(1)}, {"global_step": "3"}, "step must be a whole number, got a str"),
        ({"model.a": torch.zeros(1)}, {CONFIG_KEY: None}, "config must be a mapping.*, got nothing"),
        ({"model.a": torch.zeros(1)}, {CONFIG_KEY: {"model": {1: 2}}}, "a key that is a int instead of text"),
        ({"model.a": torch.zeros(1)}, {CONFIG_KEY: {"x": torch.zeros(1)}}, "config holds a Tensor instead"),
    ],
)
def test_checkpoints_that_hold_something_else(
    tmp_path: Path, state_dict: object, more: dict[str, object], complaint: str
) -> None:
    content = {"state_dict": state_dict, "global_step": 3, CONFIG_KEY: {}, **more}
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=complaint):
        read_weights(tmp_path / "x.ckpt")


def test_a_step_that_numpy_counted_is_one(
    tmp_path: Path, state: dict[str, Tensor], config: ExperimentConfig
) -> None:
    path = training_checkpoint(tmp_path / "n.ckpt", state, config_to_dict(config), global_step=np.int64(3))
    step = read_weights(path).card.step
    assert (step, type(step)) == (3, int)
    for wrong in (np.float64(3.0), np.bool_(True)):
        training_checkpoint(path, state, config_to_dict(config), global_step=wrong)
        with pytest.raises(CheckpointError, match="step must be a whole number"):
            read_weights(path)


def test_weights_alone_cannot_be_resumed(
    tmp_path: Path, state: dict[str, Tensor], config: ExperimentConfig
) -> None:
    path = training_checkpoint(tmp_path / "w.ckpt", state, config_to_dict(config), optimizer_states=None)
    with pytest.raises(CheckpointError, match=r"has no optimizer_states.*\n.*initial_weights"):
        check_resumable(path, config, BEVFormer(config.model))
    foreign = training_checkpoint(tmp_path / "f.ckpt", {"a": torch.zeros(1)}, config_to_dict(config))
    with pytest.raises(CheckpointError, match="another architecture"):
        check_resumable(foreign, config, BEVFormer(config.model))


def _lose_a_moment(saved: dict[str, Any]) -> object:
    del saved["state"][2]["exp_avg_sq"]
    return [saved]


def _lose_a_parameter(saved: dict[str, Any]) -> object:
    del saved["state"][2]
    return [saved]


def _change(moment: str, change: Callable[[Tensor], object]) -> Callable[[dict[str, Any]], object]:
    def damage(saved: dict[str, Any]) -> object:
        saved["state"][2][moment] = change(saved["state"][2][moment])
        return [saved]

    return damage


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda saved: [], "not one of AdamW"),
        (lambda saved: [saved, saved], "not one of AdamW"),
        (lambda saved: [None], "not one of AdamW"),
        (lambda saved: [saved | {"param_groups": saved["param_groups"][1:]}], r"groups of \[.*instead of"),
        (lambda saved: [saved | {"state": {}}], "moments of 0 parameters instead of"),
        (_lose_a_parameter, r"moments of \d+ parameters instead of"),
        (_lose_a_moment, "not one of AdamW.*exp_avg_sq"),
        (_change("exp_avg", lambda moment: moment[None]), "other shapes in exp_avg of parameter 2"),
        (_change("exp_avg", lambda moment: moment.to(torch.int32)), "exp_avg of parameter 2 is int32"),
        (_change("exp_avg_sq", lambda moment: moment + NAN), "NaN or infinite weights in exp_avg_sq of par"),
        (_change("step", lambda step: step - 2), "number of steps is less than 1"),
        (_change("step", lambda step: "1.x"), "not one of AdamW"),
    ],
)
def test_a_damaged_optimiser_state_cannot_be_resumed(
    tmp_path: Path, config: ExperimentConfig, damage: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    model = BEVFormer(config.model)
    states = damage(optimizer_state(model, config))
    path = training_checkpoint(
        tmp_path / "o.ckpt", model.state_dict(), config_to_dict(config), optimizer_states=states
    )
    with pytest.raises(CheckpointError, match=complaint):
        check_resumable(path, config, model)


@pytest.mark.parametrize(
    ("setting", "there", "here"),
    [
        ("detection.classes", tuple(sorted(DETECTION_CLASSES)), DETECTION_CLASSES),
        ("detection.classes", None, tuple(sorted(DETECTION_CLASSES))),
        ("detection.yaw_convention", "mmdet3d_0.17", "standard"),
        ("segmentation.classes", ("vehicle", "divider"), ("divider", "vehicle")),
    ],
)
def test_weights_whose_outputs_mean_something_else_are_refused(
    tmp_path: Path, setting: str, there: object, here: object
) -> None:
    same = {"segmentation.classes": ("divider", "vehicle")}
    theirs = load_config(None, SMALL | {f"model.{k}": v for k, v in (same | {setting: there}).items() if v})
    ours = load_config(None, SMALL | {f"model.{k}": v for k, v in (same | {setting: here}).items()})
    plain = config_to_dict(theirs)
    if there is None:  # a card from before the setting was there
        del plain["model"]["detection"]["classes"]
    model = BEVFormer(ours.model)
    weights = Weights(model.state_dict(), Card(plain), tmp_path / "w")
    with pytest.raises(CheckpointError, match=rf"model\.{setting} is .* in the weights, but .* is asked for"):
        load_model(weights, ours)
    load_model(weights, theirs)
    # The parts that it does not touch may be taken.
    assert load_into(model, weights, ours, ("backbone", "neck"))


def written(path: Path, card: str) -> Path:
    """Our format with any text for a card."""
    header = json.dumps({"__metadata__": {"format": FORMAT, "card": card}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


@pytest.mark.parametrize(
    ("card", "complaint"),
    [
        ("null", "must be a mapping, got nothing"),
        ("[1, 2]", "must be a mapping, got a list of 2"),
        ("{", "is not JSON"),
        ("{}", "has no configuration"),
        ('{"config": null}', "config must be a mapping, the configuration of the run, got nothing"),
        ('{"config": [1]}', "config must be a mapping.*, got a list of 1"),
        ('{"config": "x"}', "config must be a mapping.*, got a str"),
        ('{"config": {}, "wings": 2}', "fields that are not known: wings"),
        ('{"config": {}, "step": "3"}', "step must be a whole number, got a str"),
        ('{"config": {}, "step": true}', "step must be a whole number, got a bool"),
        ('{"config": {}, "step": 1e400}', "step must be a whole number, got a float"),
        ('{"config": {}, "averaged": 1}', "averaged must be true or false"),
        ('{"config": {}, "metrics": []}', "metrics must be a mapping, got a list of 0"),
        ('{"config": {}, "commit": 3}', "commit must be text"),
        ("[" * 100_000, "nested too deeply"),
        ('{"config": ' + '{"a": ' * 60 + "1" + "}" * 61, f"nested more than {MOST_NESTED} deep"),
        ('{"config": {"a": [' + "1, " * 100_000 + "1]}}", f"more than {MOST_VALUES} values"),
        ('{"config": {}, "step": ' + "9" * 5000 + "}", "is not JSON"),
    ],
)
def test_cards_that_are_none(tmp_path: Path, card: str, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint) as told:
        read_weights(written(tmp_path / "w.safetensors", card))
    assert len(str(told.value)) < 500
    with pytest.raises(CheckpointError, match=complaint):
        config_inside(argparse.Namespace(weights=str(tmp_path / "w.safetensors")))


def test_a_card_that_is_no_text_or_holds_itself(tmp_path: Path) -> None:
    header = b'{"__metadata__": {"format": "bevperception-1", "card": "\xff\xfe"}}'
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="is damaged or not a safetensors file"):
        read_weights(tmp_path / "w.safetensors")
    endless: list[object] = []
    endless += [endless] * 10
    with pytest.raises(CheckpointError, match=r"nested more than|more than"):
        card_from_values({"config": {"a": endless}}, "file")


def test_sizes_of_a_card_ask_for_no_memory(state: dict[str, Tensor], config: ExperimentConfig) -> None:
    plain = config_to_dict(config)
    plain["model"]["bev"] |= {"rows": 4096, "columns": 4096, "channels": 4096}  # 275 GB of queries
    weights = Weights(state, Card(plain), Path("w"))
    with pytest.raises(CheckpointError, match="another architecture"):
        load_model(weights, weights.config())
    plain["model"]["bev"] |= {"rows": 10**30}
    with pytest.raises(BevError, match=r"model\.bev\.rows"):
        Weights(state, Card(plain), Path("w")).config()


ANYTHING = (
    *(None, True, -1, 0, 10**30, -0.5, 1e308, NAN, "", "x", "\ud800"),
    *([], {}, [None], {"a": 1}, [[1, 2], [3]]),
)


@pytest.mark.parametrize("seed", range(3))
def test_a_card_with_anything_anywhere_is_refused_in_words_or_used(
    seed: int, state: dict[str, Tensor], config: ExperimentConfig
) -> None:
    draw, outcomes = random.Random(seed), set()
    for _ in range(12):
        card: dict[str, Any] = {"config": config_to_dict(config), "step": 3, "metrics": {"a": 1.0}}
        section, key = card, draw.choice(sorted(card))
        while isinstance(section[key], dict) and section[key] and draw.random() < 0.9:
            section = section[key]
            key = draw.choice(sorted(section))
        if draw.random() < 0.2:
            del section[key]
        else:
            section[key] = copy.deepcopy(draw.choice(ANYTHING))
        try:
            found = Weights(state, card_from_json(json.dumps(card), "file"), Path("file"))
            there = found.config()
            with torch.device("meta"):
                check_fit(BEVFormer(there.model).state_dict(), found, there)
        except (CheckpointError, ConfigError) as error:
            outcomes.add(len(str(error)) < 1500)
        else:
            outcomes.add(True)
    assert outcomes == {True}


def test_the_commands_way_in_types_what_a_card_says(
    tmp_path: Path, state: dict[str, Tensor], config: ExperimentConfig
) -> None:
    plain = config_to_dict(config)
    for section in (None, [1], "x"):
        path = save_weights(tmp_path, state, Card(plain | {"model": section}))
        with pytest.raises(ConfigError, match="model is a section"):
            typed_config(config_inside(argparse.Namespace(weights=str(path))))
