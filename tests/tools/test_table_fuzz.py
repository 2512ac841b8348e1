"""Tables damaged at random: doctor, evaluation and training answer each with a sentence and exit code 0 or 2.

What the doctor passes, the evaluation survives. The model is a stand-in: only reading is put to the test.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from bevperception.config import ExperimentConfig
from bevperception.config_io import load_config
from bevperception.data.nuscenes import NuScenesReader
from bevperception.data.table_rules import TABLES
from bevperception.doctor.__main__ import _report_data_root
from bevperception.errors import run_program
from bevperception.evaluation.runner import SplitEvaluator
from bevperception.structures import BEVMemory, Boxes3D, CameraFrames, ModelOutputs, Targets
from bevperception.training import experiment
from tests.fixtures import tiny_nuscenes
from tests.fixtures.damage import DamagedRoot, Tables
from tests.fixtures.tiny_nuscenes import TRAIN_SPLIT, VAL_SPLIT, VERSION
from tests.training.standin import SIDE, TinyModel

MUTATIONS = 300
TRAINED = 25
"""Every so many mutations a training run reads the tables too; in between only its data set does."""
CAMERAS = ("CAM_FRONT", "CAM_BACK")
UNUSED = "CAM_BACK_LEFT"
"""In the tables alone: whoever does without a camera may have its records damaged."""
FRAMES = 3
CELLS = 12
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7.5, 1e300, math.nan, math.inf, -math.inf, 10**30, 1e-300),
    *("", "x", "../../x", "/dev/zero", "\ud800", "\0", "samples", "sample-0001", "9" * 5000),
    *(
        [],
        [[]],
        {},
        [None],
        ["x"],
        [0, 0, 0],
        [0, 0, 0, 0],
        [math.nan] * 3,
        [1, 2, 3],
        [1, 0, 0, 0],
        [1e8, 0, 0],
    ),
    *(
        [[1, 0, 0], [0, 1], [0, 0, 1]],
        [[90, 0, 80], [0, 90, 45], [0, 0, 2]],
        ["attribute-0000", "attribute-0001"],
    ),
)
WHOLE: tuple[Any, ...] = (
    [],
    {},
    None,
    3,
    [[]],
    [None],
    b"",
    b"\x1f\x8b\x08\xff",
    b"[" * 100_000,
    b"[{]",
    b"nonsense",
)


class StandIn(TinyModel):
    """Sees nothing, but boxes of every class, and takes part in training."""

    def image_features(self, frames: CameraFrames) -> list[Tensor]:
        small = adaptive_avg_pool2d(frames.images.float().flatten(0, 1) / 255.0, SIDE)
        return super().image_features(replace(frames, images=small.unflatten(0, frames.images.shape[:2])))

    def forward(
        self, frames: CameraFrames, memory: BEVMemory | None = None
    ) -> tuple[ModelOutputs, BEVMemory]:
        outputs, remembered = super().forward(frames, memory)
        logits = outputs.bev.new_zeros(len(outputs.bev), 7, CELLS, CELLS)
        return replace(outputs, segmentation_logits=logits), remembered

    def losses(self, outputs: ModelOutputs, targets: Targets, reduce_mean: Any) -> dict[str, Tensor]:
        for boxes in targets.boxes:
            assert boxes.values[:, :7].isfinite().all()
            assert not boxes.values[:, 7:].isinf().any()
        assert targets.segmentation is not None
        assert targets.segmentation.isfinite().all()
        return {"size": outputs.bev.square().mean()}

    def decode(self, outputs: ModelOutputs) -> list[Boxes3D]:
        values = torch.tensor(
            [[float(9 * k - 40), 3.0, 0.0, 4.0, 2.0, 1.5, 0.1, 0.0, 0.0] for k in range(10)]
        )
        return [Boxes3D(values, torch.arange(10), torch.linspace(0.1, 0.9, 10)) for _ in outputs.bev]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> DamagedRoot:
    """Tables of the least that has every kind of link: chains with a middle, a camera that is not in use."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_nuscenes, "KEY_FRAMES", FRAMES)
        turns = {name: tiny_nuscenes.CAMERA_YAW_DEG[name] for name in (*CAMERAS, UNUSED)}
        patch.setattr(tiny_nuscenes, "CAMERA_YAW_DEG", turns)
        patch.setattr(tiny_nuscenes, "THINGS", tiny_nuscenes.THINGS[::2])
        sound = tiny_nuscenes.write_tiny_nuscenes(folder / "sound")
    return DamagedRoot(sound, folder / "data")


@lru_cache
def config_for(root: Path, bad_samples: str) -> ExperimentConfig:
    return load_config(
        None,
        {
            "data.root": str(root),
            "data.version": VERSION,
            "data.train_split": TRAIN_SPLIT,
            "data.val_split": VAL_SPLIT,
            "data.cameras": list(CAMERAS),
            "data.image_size": [18, 32],
            "data.history": 1,
            "data.workers": 0,
            "data.bad_samples": bad_samples,
            "model.segmentation.cell_m": 100.0 / CELLS,
            "training.steps": 1,
            "training.batch_size": 2,
            "training.accelerator": "cpu",
            "training.tensorboard": False,
        },
    )


def answer(program: Callable[[], int | None]) -> tuple[int, str, str]:
    """Exit code, output and errors of a program; an exception that is none of its answers goes through."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        run_program(program)
    code = int(left.value.code or 0)
    assert code in (0, 2)
    if code == 2 and "cannot be used" not in out.getvalue():
        said = [line for line in err.getvalue().split("error: ", 1)[1].splitlines() if line]
        assert 1 <= len(said) <= 3
    return code, out.getvalue(), err.getvalue()


def evaluate(root: Path, bad_samples: str, out: Path) -> tuple[int, str, str]:
    config = config_for(root, bad_samples)

    def program() -> None:
        SplitEvaluator(config, NuScenesReader(config.data), VAL_SPLIT)(StandIn(), torch.device("cpu"), out)

    return answer(program)


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple[str, int, str, int, Any]]:
    """One to three: table, row, what is done, which field, and with what."""
    kinds = (
        "set",
        "set",
        "set",
        "delete",
        "swap",
        "swap",
        "inside",
        "drop",
        "repeat",
        "again",
        "record",
        "whole",
    )
    one = st.tuples(
        st.sampled_from(
            (*TABLES, "sample", "scene", "sample_data", "sample_annotation", "sample_annotation")
        ),
        st.integers(0, 10**6),
        st.sampled_from(kinds),
        st.integers(0, 10**6),
        st.tuples(st.sampled_from(HOSTILE), st.sampled_from(WHOLE), st.integers(0, 10**6)),
    )
    return draw(st.lists(one, min_size=1, max_size=3))


def mutate(tables: Tables, table: str, row: int, kind: str, field: int, values: tuple[Any, Any, int]) -> None:
    records = tables[table]
    hostile, whole, other = values
    if kind == "whole":
        tables[table] = whole
        return
    if not isinstance(records, list) or not records or not all(isinstance(r, dict) for r in records):
        return
    place = row % len(records)
    record = records[place]
    names = sorted(record)
    name = names[field % len(names)] if names else "token"
    if kind == "set":
        record[name] = hostile
    elif kind == "delete":
        record.pop(name, None)
    elif kind == "swap":
        record[name] = records[other % len(records)].get(name)
    elif kind == "inside" and isinstance(record.get(name), list) and record[name]:
        record[name] = [*record[name]]
        record[name][other % len(record[name])] = hostile
    elif kind == "drop":
        del records[place]
    elif kind == "repeat":
        records.append(dict(record))
    elif kind == "again":
        records.append({**record, "token": f"again-{other}"})
    elif kind == "record":
        records[place] = hostile


def test_every_damage_is_answered_in_a_sentence(
    damaged: DamagedRoot, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "build_model", lambda _: StandIn())
    out = tmp_path_factory.mktemp("out")
    seen = {"runs": 0, "passed": 0, "lost": 0, "fatal": 0}

    @settings(max_examples=MUTATIONS, suppress_health_check=list(HealthCheck))
    @given(changes=mutations())
    def check(changes: list[tuple[str, int, str, int, Any]]) -> None:
        tables = damaged.tables()
        for change in changes:
            mutate(tables, *change)
        damaged.write(tables)
        seen["runs"] += 1
        code, told, _ = answer(lambda: _report_data_root(damaged.root, VERSION, CAMERAS))
        assert "cannot be used." in told if code else "can be used" in told
        stopping, _, first = evaluate(damaged.root, "stop", out / "evaluation")
        skipping, _, second = evaluate(damaged.root, "skip", out / "evaluation")
        if code:
            seen["fatal"] += 1
        else:
            said = lines_of(told)
            splits = "\n".join(said["splits"])
            unusable = (
                VAL_SPLIT not in splits.splitlines()[0]
                or f": {VAL_SPLIT}" in splits
                or f", {VAL_SPLIT}" in (splits.partition("\n")[2])
            )
            assert skipping == (2 if unusable else 0), told + second
            if not said["levels"] & {"records", "sensors", "images", "decoding", "usable"}:
                assert stopping == skipping, told + first
            seen["passed" if stopping == 0 else "lost"] += 1
        train(damaged.root, out / f"train-{seen['runs']}", whole=seen["runs"] % TRAINED == 0)

    check()
    assert seen["runs"] >= MUTATIONS
    assert min(seen["passed"], seen["lost"], seen["fatal"]) > MUTATIONS / 20, seen


def lines_of(told: str) -> dict[str, Any]:
    """The doctor's findings: lines by subject, and as 'levels' the subjects that are not 'ok'."""
    found: dict[str, Any] = {"levels": set()}
    subject = ""
    for line in told.splitlines():
        if line[:2] != "  ":
            continue
        level, name, text = line[2:6].strip(), line[8:21].strip(), line[23:]
        subject = name or subject
        found.setdefault(subject, []).append(text)
        if level in ("lost", "FAIL"):
            found["levels"].add(subject)
    return found


def train(root: Path, out: Path, whole: bool) -> None:
    config = config_for(root, "skip")
    if whole:
        answer(lambda: experiment.train_experiment(config, out) and None)
        return

    def program() -> None:
        source = experiment.build_dataset(NuScenesReader(config.data), config, TRAIN_SPLIT, training=True)
        model = StandIn()
        for index in range(len(source)):
            batch = source[index]
            if hasattr(batch, "targets"):
                model.losses(model(source._images.normalise(batch.frames))[0], batch.targets, None)

    answer(program)


def test_the_fuzz_would_notice(damaged: DamagedRoot, tmp_path: Path) -> None:
    """Sound tables pass all three, so that a damage's answer is the damage's."""
    damaged.write(damaged.tables())
    assert answer(lambda: _report_data_root(damaged.root, VERSION, CAMERAS))[0] == 0
    code, told, _ = evaluate(damaged.root, "stop", tmp_path)
    assert code == 0
    assert "NDS" in told
    assert len(json.loads((tmp_path / "results_nusc.json").read_text())["results"]) == FRAMES
