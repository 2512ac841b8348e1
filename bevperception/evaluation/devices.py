"""Start the processes and devices that a configuration asks for, outside of training."""

from __future__ import annotations

import logging

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException

from bevperception.config import TrainingConfig
from bevperception.distributed import leave_at_exit
from bevperception.errors import ConfigError
from bevperception.malloc import keep_freed_memory


def launch(config: TrainingConfig) -> torch.device:
    """Start the processes of a configuration (accelerator, devices, nodes, strategy).

    On a CPU they keep the memory that they free.

    Returns:
        The device of this process. With several devices Lightning starts the program again for each, so
        call this before anything costly.

    Raises:
        ConfigError: this machine does not have them.
    """
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    strategy = config.strategy
    if strategy == "auto" and config.devices * config.nodes > 1:
        strategy = "ddp"
    try:
        fabric = Fabric(
            accelerator=config.accelerator, devices=config.devices, num_nodes=config.nodes, strategy=strategy
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"training.accelerator, devices or strategy: {message}") from None
    fabric.launch()
    leave_at_exit()
    if fabric.device.type == "cpu":
        keep_freed_memory()
    return fabric.device
