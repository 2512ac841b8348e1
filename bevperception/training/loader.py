"""Build the training loader for Lightning, from any step on."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from bevperception.config import ExperimentConfig
from bevperception.data.loading import Failure, Loaded, OnBad, SampleSource, build_loader
from bevperception.distributed import first_error
from bevperception.errors import ConfigError
from bevperception.structures import Batch
from bevperception.training.sampler import RunShare, StepSampler
from bevperception.training.stream import StreamSampler


@runtime_checkable
class SceneSource(Protocol):
    """A source of samples that also knows its scenes, as streaming training needs."""

    @property
    def scene_lengths(self) -> list[int]:
        """Samples of each scene, whose samples stand together and in order of time."""


class TrainingData(pl.LightningDataModule):
    """Builds the training loader once Lightning knows its processes and the step to resume from.

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
        return build_loader(
            self.source,
            self._sampler(trainer),
            self.config.data.workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            on_bad=self._on_bad(),
        )

    def _on_bad(self) -> OnBad:
        data = self.config.data
        if data.bad_samples == "stop":
            return "leave_out"  # the source raises instead
        # Another sample in a slot of a stream would break the chain of its memory.
        return "vacate" if data.stream_length else "replace"

    def _sampler(self, trainer: pl.Trainer) -> StepSampler | StreamSampler:
        training, length = self.config.training, self.config.data.stream_length
        share = RunShare(
            batch_size=training.batch_size,
            steps=training.steps,
            accumulate=training.accumulate,
            seed=training.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            first_step=trainer.global_step,
        )
        if not length:
            return StepSampler(len(self.source), share)
        if not isinstance(self.source, SceneSource):
            raise ConfigError("data.stream_length needs samples that stand in scenes, in order of time")
        turns = self.config.data.stream_turns
        return StreamSampler(self.source.scene_lengths, length, share, turns)

    def on_before_batch_transfer(self, batch: Loaded, dataloader_idx: int) -> Batch:
        """Return the batch, unless some process could not load its own.

        Raises:
            BevError: in every process, what the first of them met.
        """
        trainer = self.trainer
        assert trainer is not None
        error = first_error(batch.error if isinstance(batch, Failure) else None, trainer.strategy.root_device)
        if error is not None:
            raise error
        assert isinstance(batch, Batch), "training needs a batch in every process"
        return batch
