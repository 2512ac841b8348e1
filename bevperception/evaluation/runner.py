"""Evaluate a model on a split: whole scenes in time order, with streaming memory, on several processes."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bevperception.config import ExperimentConfig
from bevperception.data.dataset import NuScenesDataset, SkippedBatch, build_dataset
from bevperception.data.ground_truth import needs_annotations, require_ground_truth_to_evaluate
from bevperception.data.loading import build_loader, require_loaded
from bevperception.data.nuscenes import NuScenesReader
from bevperception.distributed import first_error, gather_objects, rank, world_size
from bevperception.errors import BevError, DataError
from bevperception.evaluation.detection import (
    METRICS_FILE,
    RESULTS_FILE,
    DetectionResult,
    class_range_by_name,
    evaluate_detection,
)
from bevperception.evaluation.history import History, with_history
from bevperception.evaluation.segmentation import SegmentationMetric, SegmentationResult
from bevperception.evaluation.submission import SubmissionBox, submission_boxes
from bevperception.files import write_json
from bevperception.inference import StreamingPredictor
from bevperception.structures import BadSample, Batch, ModelOutputs

METRICS_NAME = "metrics.json"
RESULT_FILES = (RESULTS_FILE, METRICS_FILE, METRICS_NAME)
"""Files that an evaluation writes into its folder."""


@dataclass(frozen=True)
class EvaluationResult:
    """Detection and segmentation metrics of a model on a split.

    Attributes:
        detection: None without a detection head.
        segmentation: None without a segmentation head.
        skipped: samples that could not be read; they count as frames without any detection.
        samples: number of samples of the split.
    """

    detection: DetectionResult | None
    segmentation: SegmentationResult | None
    skipped: list[BadSample]
    samples: int

    def as_dict(self) -> dict[str, Any]:
        """Plain nested values for a metrics file or a logger; NaN becomes None, as JSON has no NaN."""
        plain = {
            "samples": self.samples,
            "skipped": {bad.token: bad.reason for bad in self.skipped},
            "detection": None if self.detection is None else self.detection.as_dict(),
            "segmentation": None if self.segmentation is None else self.segmentation.as_dict(),
        }
        return {key: _without_nan(value) for key, value in plain.items()}

    def table(self) -> str:
        """Format the metrics as tables for a terminal."""
        parts = [part.table() for part in (self.detection, self.segmentation) if part is not None]
        if self.skipped:
            first = self.skipped[0]
            parts.append(
                f"{len(self.skipped)} of {self.samples} samples could not be read and count as empty, "
                f"first {first.token}: {first.reason}"
            )
        return "\n\n".join(parts)


@dataclass(frozen=True)
class Perceived:
    """One sample with the model's raw outputs for it.

    Attributes:
        token: of the sample.
        batch: the sample; None if it could not be read.
        outputs: raw; None if it could not be read.
        bad: why it could not be read.
    """

    token: str
    batch: Batch | None
    outputs: ModelOutputs | None
    bad: BadSample | None = None


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def share_scenes(lengths: Sequence[int], processes: int) -> list[list[int]]:
    """Distribute whole scenes so that processes have about equally many samples.

    Args:
        lengths: samples of every scene.
        processes: how many share them; some may get none.

    Returns:
        scene indices of every process, ascending; every scene once.
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for scene in sorted(range(len(lengths)), key=lambda s: (-lengths[s], s)):
        least = loads.index(min(loads))
        shares[least].append(scene)
        loads[least] += lengths[scene]
    return [sorted(share) for share in shares]


def perceive(
    predictor: StreamingPredictor,
    dataset: NuScenesDataset,
    tokens: Sequence[str],
    workers: int,
    title: str = "evaluating",
) -> Iterator[Perceived]:
    """Run a predictor over samples in the given order.

    Args:
        predictor: its memory begins anew.
        dataset: holds the samples; single frames without augmentation.
        tokens: sample tokens, scene by scene and in time order within.
        workers: loader processes.
        title: of the progress bar, which only the first process shows, on a terminal.

    Raises:
        BevError: a sample cannot be read and bad samples are to stop the run.
    """
    predictor.reset()
    index_of = {token: index for index, token in enumerate(dataset.tokens)}
    batches = [[(index_of[token], 0)] for token in tokens]
    loader = build_loader(dataset, batches, workers, pin_memory=predictor.device.type == "cuda")
    quiet = rank() != 0 or not sys.stderr.isatty()
    shown = tqdm(loader, desc=title, total=len(batches), disable=quiet, leave=False)
    for token, loaded in zip(tokens, shown, strict=True):
        batch = require_loaded(loaded)
        if isinstance(batch, SkippedBatch):
            yield Perceived(token, None, None, batch.skipped[0])
        else:
            yield Perceived(token, batch, predictor.observe(batch.frames, batch.scene_tokens[0]))


class SplitEvaluator:
    """Evaluates models on a split; called by every process of a group, which share the scenes.

    Args:
        config: of the run; the model's heads and the data are used.
        reader: open tables.
        split: predefined, or named in splits.json.
        history: see :func:`~bevperception.evaluation.history.with_history`.

    Raises:
        ConfigError: if no such split exists.
        DataError: if none of its scenes is in the tables, or the split has no ground truth.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        reader: NuScenesReader,
        split: str,
        history: History | None = None,
    ) -> None:
        self.config, self.reader, self.split, self.history = config, reader, split, history
        self.dataset = build_dataset(reader, config, split, training=False)
        if needs_annotations(config.model):
            require_ground_truth_to_evaluate(reader, split, self.dataset.tokens, class_range_by_name())

    def __call__(self, model: nn.Module, device: torch.device, folder: Path) -> EvaluationResult:
        """Evaluate; the first process writes the submission, the metrics and prints the table.

        Args:
            model: a BEVFormer.
            device: of this process.
            folder: for results_nusc.json and metrics.json.

        Returns:
            The same in every process.

        Raises:
            BevError: in every process, what the first of them met.
        """
        model = with_history(model, self.config.model, self.history)
        predictor = StreamingPredictor(model, device, self.config.training.precision)
        boxes: dict[str, list[SubmissionBox]] = {}
        metric = SegmentationMetric(self.config.model.segmentation.classes)
        skipped: list[BadSample] = []
        error: BevError | None = None
        try:
            self._perceive_share(predictor, boxes, metric, skipped)
        except BevError as met:
            error = met
        error = first_error(error, device)
        if error is not None:
            raise error
        return self._merge_and_measure(boxes, metric, skipped, device, folder)

    def _perceive_share(
        self,
        predictor: StreamingPredictor,
        boxes: dict[str, list[SubmissionBox]],
        metric: SegmentationMetric,
        skipped: list[BadSample],
    ) -> None:
        """Run the predictor over this process's scenes; adds to the last three arguments."""
        scenes = self.dataset.scenes
        mine = share_scenes([len(s.sample_tokens) for s in scenes], world_size())[rank()]
        tokens = [token for scene in mine for token in scenes[scene].sample_tokens]
        for sample in perceive(predictor, self.dataset, tokens, self.config.data.workers):
            boxes[sample.token] = []
            if sample.bad is not None:
                skipped.append(sample.bad)
            if sample.batch is None or sample.outputs is None:
                continue
            pose = sample.batch.frames.bev_to_global[0]
            boxes[sample.token] = submission_boxes(predictor.decode(sample.outputs)[0], pose, sample.token)
            targets, logits = sample.batch.targets, sample.outputs.segmentation_logits
            if logits is not None and targets is not None and targets.segmentation is not None:
                assert targets.segmentation_present is not None
                labels = targets.segmentation.to(logits.device)
                metric.update(logits, labels, targets.segmentation_present)

    def _merge_and_measure(
        self,
        boxes: dict[str, list[SubmissionBox]],
        metric: SegmentationMetric,
        skipped: list[BadSample],
        device: torch.device,
        folder: Path,
    ) -> EvaluationResult:
        """Gather the results of all processes and compute the metrics in the first."""
        parts = gather_objects((boxes, metric, skipped))
        result: EvaluationResult | None = None
        error: BevError | None = None
        if rank() == 0:
            try:
                result = self._measure(parts, folder)
            except BevError as met:
                error = met
        error = first_error(error, device)
        if error is not None:
            raise error
        shared = gather_objects(result)[0]
        assert shared is not None
        return shared

    def _measure(
        self,
        parts: Sequence[tuple[dict[str, list[SubmissionBox]], SegmentationMetric, list[BadSample]]],
        folder: Path,
    ) -> EvaluationResult:
        boxes: dict[str, list[SubmissionBox]] = {}
        total = SegmentationMetric(self.config.model.segmentation.classes)
        skipped: list[BadSample] = []
        for part_boxes, part_metric, part_skipped in parts:
            boxes |= part_boxes
            total.merge(part_metric)
            skipped += part_skipped
        if len(skipped) == len(self.dataset):
            raise DataError(
                f"none of the {len(skipped)} samples of split {self.split!r} can be read; the first: "
                f"{skipped[0].reason}"
            )
        heads = self.config.model
        result = EvaluationResult(
            detection=evaluate_detection(self.reader, self.split, boxes, folder)
            if heads.detection.enabled
            else None,
            segmentation=total.result() if heads.segmentation.enabled else None,
            skipped=skipped,
            samples=len(self.dataset),
        )
        write_json(folder / METRICS_NAME, result.as_dict())
        print(result.table(), flush=True)
        return result
