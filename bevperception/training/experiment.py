"""Build data, model, evaluation and training from a configuration, and run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from bevperception.checkpoints.backbone import load_backbone
from bevperception.checkpoints.tensors import left_aside
from bevperception.config import ExperimentConfig
from bevperception.data.dataset import build_dataset
from bevperception.data.ground_truth import needs_annotations, require_ground_truth_to_train
from bevperception.data.nuscenes import NuScenesReader
from bevperception.distributed import is_first_process
from bevperception.evaluation.runner import SplitEvaluator
from bevperception.files import output_folder
from bevperception.models import build
from bevperception.training.checkpointing import find_resume
from bevperception.training.run import RUN_FILES, RUN_FOLDERS, train


def train_experiment(config: ExperimentConfig, out: Path, resume: str | None = None) -> dict[str, Any]:
    """Train and evaluate by a configuration; the run folder is locked against other trainings meanwhile.

    Args:
        config: the whole of it.
        out: run folder; see :func:`bevperception.training.run.train`.
        resume: None, 'auto' or a checkpoint's path.

    Returns:
        Metrics of the last evaluation, nested by head.

    Raises:
        BevError: whatever the user can put right.
    """
    with output_folder(out, RUN_FILES, RUN_FOLDERS, writes=is_first_process()):
        find_resume(resume, out)  # refuses another run's checkpoints before the tables have been read
        reader = NuScenesReader(config.data)
        source = build_dataset(reader, config, config.data.train_split, training=True)
        if needs_annotations(config.model):
            usable = [token for token in source.tokens if reader.fault(token) is None]
            require_ground_truth_to_train(reader, config.data.train_split, usable)
        evaluator = SplitEvaluator(config, reader, config.data.val_split)

        def evaluate(model: nn.Module, device: torch.device, folder: Path) -> dict[str, Any]:
            return evaluator(model, device, folder).as_dict()

        return train(config, build_model(config), source, evaluate, out, resume)


def build_model(config: ExperimentConfig) -> build.Model:
    """Build the model with random weights by the seed, and the backbone's from a file if one is named.

    Raises:
        ConfigError: a part of the model is unknown.
        CheckpointError: the backbone's weights are missing or do not fit.
    """
    torch.manual_seed(config.training.seed)
    model = build.build_model(config.model)
    backbone = config.model.backbone
    if backbone.weights is not None:
        aside = load_backbone(model.backbone, backbone.variant, backbone.weights)
        if is_first_process():
            print(f"backbone weights from {backbone.weights}; left aside in it: {left_aside(aside)}")
    return model
