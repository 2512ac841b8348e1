"""The training data as Lightning takes it up, from any step on."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from bevperception.config import ExperimentConfig
from bevperception.data.loading import Failure, Loaded, SampleSource, build_loader
from bevperception.distributed import first_error
from bevperception.structures import Batch
from bevperception.training.sampler import StepSampler


class TrainingData(pl.LightningDataModule):
    """Builds the training loader when Lightning knows its processes and the step to go on from.

    Args:
        config: of the run.
        source: training samples; (index, draw) determines a sample's augmentation.
    """

    def __init__(self, config: ExperimentConfig, source: SampleSource) -> None:
        super().__init__()
        self.config, self.source = config, source

    def train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches of this process, from the trainer's (possibly restored) step on."""
        trainer = self.trainer
        assert trainer is not None
        training = self.config.training
        sampler = StepSampler(
            len(self.source),
            training.batch_size,
            training.steps,
            training.accumulate,
            training.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            first_step=trainer.global_step,
        )
        return build_loader(
            self.source,
            sampler,
            self.config.data.workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            replace=self.config.data.bad_samples == "skip",
        )

    def on_before_batch_transfer(self, batch: Loaded, dataloader_idx: int) -> Batch:
        """The batch, unless some process's could not be loaded.

        Raises:
            BevError: in every process, what the first of them met.
        """
        trainer = self.trainer
        assert trainer is not None
        error = first_error(batch.error if isinstance(batch, Failure) else None, trainer.strategy.root_device)
        if error is not None:
            raise error
        assert isinstance(batch, Batch), "training needs full batches: bad samples are replaced"
        return batch
