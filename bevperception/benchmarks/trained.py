"""What the benchmarks of trained weights share: their command line, the model, a quiet evaluation."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from bevperception.checkpoints.weights import config_inside, load_model, read_weights
from bevperception.config import ExperimentConfig
from bevperception.config_help import INFERENCE_SETTINGS
from bevperception.config_io import ConfigParser
from bevperception.errors import ConfigError
from bevperception.evaluation.detection import DetectionSummary
from bevperception.evaluation.devices import launch
from bevperception.evaluation.runner import SplitEvaluator
from bevperception.models.bevformer import BEVFormer
from bevperception.processes import program_name


def parse_trained(
    argv: Sequence[str] | None, subcommand: str, description: str, *, writes: bool
) -> tuple[ExperimentConfig, argparse.Namespace]:
    """Read the command line of a benchmark that evaluates trained weights.

    Args:
        argv: arguments after the subcommand; None takes the program's own.
        subcommand: of ``bevperception benchmark``.
        description: for ``--help``.
        writes: whether it takes ``--out FOLDER``.

    Returns:
        The configuration inside the weights with the command line's settings, and ``weights``, ``split`` and,
        if it writes, ``out``.

    Raises:
        BevError: a setting or the weights do not suffice.
    """
    usage = "--weights PATH --out FOLDER" if writes else "--weights PATH"
    parser = ConfigParser(
        description, f"{program_name('benchmark')} {subcommand}", usage=usage, settings=INFERENCE_SETTINGS
    )
    parser.add_argument("--weights", type=str, required=True, metavar="PATH", help="weights")
    parser.add_argument("--split", type=str, metavar="NAME", help="split; default: data.val_split")
    if writes:
        parser.add_argument(
            "--out", type=str, required=True, metavar="FOLDER", help="for results and metrics"
        )
    config, options = parser.parse_experiment(argv, fallback=config_inside, fallback_options=("weights",))
    options.split = options.split or config.data.val_split
    return config, options


def load_trained(config: ExperimentConfig, weights: str) -> tuple[BEVFormer, torch.device]:
    """Fill the model of a configuration, and choose where this one process runs it.

    Args:
        config: of the run.
        weights: a path, or the name of shipped weights.

    Raises:
        ConfigError: the configuration asks for several processes.
        CheckpointError: there are no such weights, or they are of another architecture.
    """
    if config.training.devices * config.training.nodes > 1:
        raise ConfigError("this benchmark runs in one process: training.devices and nodes must be 1")
    device = launch(config.training)
    model = load_model(read_weights(weights), config)
    if not isinstance(model, BEVFormer):
        raise ConfigError("this benchmark measures models with a BEV: model.perspective.only must be false")
    return model, device


def detect(
    evaluator: SplitEvaluator, model: nn.Module, device: torch.device, folder: Path
) -> DetectionSummary:
    """Evaluate a model with a detection head without its tables on the terminal.

    Args:
        evaluator: of the split.
        model: a BEVFormer, or what behaves as one.
        device: where it runs.
        folder: for the submission and the metrics.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        result = evaluator(model, device, folder).detection
    assert result is not None
    return result.overall
