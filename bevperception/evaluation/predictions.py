"""Write predictions of chosen samples as files: a submission, and BEV probabilities."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bevperception.config import ExperimentConfig
from bevperception.config_model import SegmentationConfig
from bevperception.data.dataset import build_dataset
from bevperception.data.nuscenes import NuScenesReader, SceneRecord
from bevperception.errors import ConfigError, DataError
from bevperception.evaluation.detection import RESULTS_FILE
from bevperception.evaluation.history import History, with_history
from bevperception.evaluation.runner import perceive
from bevperception.evaluation.submission import SubmissionBox, submission_boxes, write_submission
from bevperception.files import write_bytes
from bevperception.inference import StreamingPredictor
from bevperception.names import check_name

MAPS_FOLDER = "segmentation"
"""Below the folder of predictions, for BEV probabilities."""


@dataclass(frozen=True)
class ChosenSamples:
    """The samples to predict, and those to run for the memory before them.

    Attributes:
        scenes: that the samples belong to.
        tokens: to run the model over, scene by scene and in time order; earlier frames of a scene
            fill the memory.
        wanted: those whose predictions are written.
    """

    scenes: Sequence[SceneRecord]
    tokens: Sequence[str]
    wanted: frozenset[str]


def choose_samples(
    reader: NuScenesReader, sample: str | None, scene: str | None, split: str | None
) -> ChosenSamples:
    """Choose samples by split, scene or token; exactly one of the three.

    Args:
        reader: open tables.
        sample: token of one sample; the model sees its scene up to it.
        scene: name or token of a scene.
        split: predefined, or named in splits.json.

    Raises:
        ConfigError: none or several are given, or the split does not exist.
        DataError: the sample or the scene is not in the tables.
    """
    if sum(choice is not None for choice in (sample, scene, split)) != 1:
        raise ConfigError("give exactly one of --sample TOKEN, --scene NAME and --split NAME")
    if sample is not None:
        record = reader.scene(sample)
        if sample not in record.sample_tokens:
            raise ConfigError(f"--sample {sample} is a scene; give it as --scene")
        upto = record.sample_tokens[: record.sample_tokens.index(sample) + 1]
        return ChosenSamples([record], upto, frozenset([sample]))
    scenes = reader.scenes(split) if split is not None else [reader.scene(str(scene))]
    tokens = [token for record in scenes for token in record.sample_tokens]
    return ChosenSamples(scenes, tokens, frozenset(tokens))


def write_predictions(
    model: nn.Module,
    config: ExperimentConfig,
    reader: NuScenesReader,
    chosen: ChosenSamples,
    device: torch.device,
    folder: Path,
    segmentation: bool = False,
    history: History | None = None,
) -> Path:
    """Predict and write ``results_nusc.json``, and ``segmentation/TOKEN.npz`` if asked for.

    Args:
        model: a BEVFormer of this configuration.
        config: data, precision and segmentation settings.
        reader: open tables.
        chosen: samples.
        device: where to run.
        folder: for the files.
        segmentation: write probabilities (classes, rows, columns) float16 with their class names and
            range in metres (BEV frame, row 0 at y_min, column 0 at x_min).
        history: see :func:`~bevperception.evaluation.history.with_history`.

    Returns:
        The submission's path.

    Raises:
        ConfigError: segmentation of a model without that head.
        DataError: none of the samples can be read.
        BevError: a sample cannot be read and bad samples are to stop the run.
    """
    if segmentation and not config.model.segmentation.enabled:
        raise ConfigError("the model has no segmentation head: leave out --segmentation")
    for token in chosen.wanted:
        check_name(token, "sample token")  # before the work, as files are named after them
    dataset = build_dataset(reader, config, chosen.scenes, training=False)
    model = with_history(model, config.model, history)
    predictor = StreamingPredictor(model, device, config.training.precision)
    results: dict[str, list[SubmissionBox]] = {token: [] for token in chosen.wanted}
    skipped: dict[str, str] = {}
    for sample in perceive(predictor, dataset, chosen.tokens, config.data.workers, "predicting"):
        if sample.bad is not None:
            print(f"skipped sample {sample.bad.token}: {sample.bad.reason}")
            skipped[sample.token] = sample.bad.reason
        if sample.token not in chosen.wanted or sample.batch is None or sample.outputs is None:
            continue
        pose = sample.batch.frames.bev_to_global[0]
        results[sample.token] = submission_boxes(predictor.decode(sample.outputs)[0], pose, sample.token)
        logits = sample.outputs.segmentation_logits
        if segmentation and logits is not None:
            path = folder / MAPS_FOLDER / f"{sample.token}.npz"
            _write_maps(path, logits[0].float().sigmoid(), pose, config.model.segmentation)
    if skipped.keys() >= chosen.wanted:
        reason = skipped[min(chosen.wanted)]
        raise DataError(f"none of the {len(chosen.wanted)} chosen samples can be read; one of them: {reason}")
    path = folder / RESULTS_FILE
    write_submission(path, results)
    return path


def _write_maps(path: Path, probabilities: Tensor, bev_to_global: Tensor, head: SegmentationConfig) -> None:
    archive = io.BytesIO()  # a ZipFile on a full disk would print a traceback when it is thrown away
    np.savez_compressed(
        archive,
        probabilities=probabilities.cpu().numpy().astype(np.float16),
        classes=np.array(head.classes),
        range_m=np.array([-head.range_m, head.range_m]),
        bev_to_global=bev_to_global.numpy(),
    )
    write_bytes(path, archive.getvalue())
