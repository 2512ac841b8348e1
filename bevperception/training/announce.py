"""Describe a training run before its first step, so that wrong settings are noticed at once."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from bevperception.config import ExperimentConfig


def run_line(config: ExperimentConfig, out: Path) -> str:
    """Say which model is trained on which data for how long, from the settings alone."""
    data, training = config.data, config.training
    samples = training.batch_size * training.accumulate * training.devices * training.nodes
    return (
        f"training {config.model.backbone.variant} for {training.steps} steps of {samples} "
        f"{'sample' if samples == 1 else 'samples'} on {data.train_split} of {data.root} ({data.version}); "
        f"results go to {out}"
    )


def start_line(config: ExperimentConfig, model: nn.Module, samples: int, device: str, precision: str) -> str:
    """Say how large data and model are and where they run, once both are built.

    Args:
        config: of the run.
        model: that is trained.
        samples: of the training split.
        device: type of device, such as cpu.
        precision: Lightning's.
    """
    count = config.training.devices * config.training.nodes
    processes = f"{count} {'process' if count == 1 else 'processes'}"
    parameters = [p.numel() for p in model.parameters() if p.requires_grad]
    return (
        f"{samples} samples; {sum(parameters) / 1e6:.2f} M parameters that learn; on {device} in "
        f"{precision}, {processes}; the first step takes longest"
    )
