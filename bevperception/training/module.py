"""One training step in Lightning: the queue of frames, losses, gradients, and the checks on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from bevperception.checkpoints.weights import CONFIG_KEY
from bevperception.config import ExperimentConfig
from bevperception.config_io import config_to_dict
from bevperception.config_model import TemporalConfig
from bevperception.data.image_input import ImageInput
from bevperception.distributed import gather_objects, mean_over_processes, rank
from bevperception.errors import NonFiniteLossError
from bevperception.models.bev.alignment import seen_from
from bevperception.models.bev.temporal import Temporal
from bevperception.models.heads.focal_loss import ReduceMean
from bevperception.structures import (
    Batch,
    BEVMemory,
    CameraFrames,
    ModelOutputs,
    Targets,
)
from bevperception.training.optimizer import build_optimizer
from bevperception.training.seeding import PADDING, STEP, derive_seed
from bevperception.training.stream import StreamMemory

SKIPPED_KEY = "bevperception_skipped"
"""Key of a checkpoint for the samples that were skipped: reason by token."""
STREAM_KEY = "bevperception_stream"
"""Key of a checkpoint for the memory of a streaming run; see :class:`StreamMemory`."""


class TrainableModel(Protocol):
    """Interface of a model to train; :class:`bevperception.models.bevformer.BEVFormer` has it."""

    def __call__(self, frames: CameraFrames, memory: BEVMemory | None) -> tuple[ModelOutputs, BEVMemory]:
        """Outputs of a frame, and the memory for the next."""

    temporal: Temporal
    """How frames are remembered."""

    def image_features(self, frames: CameraFrames) -> list[Tensor]:
        """Backbone and neck."""

    def encode(self, features: list[Tensor], frames: CameraFrames, memory: BEVMemory | None) -> Tensor:
        """BEV features of one frame."""

    def losses(self, outputs: ModelOutputs, targets: Targets, reduce_mean: ReduceMean) -> dict[str, Tensor]:
        """Weighted losses by name."""


def memory_from_history(
    model: TrainableModel, batch: Batch, temporal: TemporalConfig | None = None
) -> BEVMemory | None:
    """Encode the other frames of a queue without gradient or drop-out, as the papers train.

    Args:
        model: run frame by frame, oldest first, up to the BEV features (no heads).
        batch: a queue. Where ``history_valid`` is false a sample has not seen the frame.
        temporal: the published fusion encodes all frames in the current BEV frame.

    Returns:
        The memory before the current frame; None without any valid other frame.

    Source: BEVFormer (ECCV 2022), section 3.6; ``obtain_history_bev`` of its published code.
    """
    in_current_frame = temporal is not None and temporal.published_fusion
    memory: BEVMemory | None = None
    with torch.no_grad(), evaluation_mode(model):
        for index, frames in enumerate(batch.history):
            valid = batch.history_valid[:, index]
            if memory is None and not bool(valid.any()):
                continue  # nothing but placeholders so far
            if in_current_frame:
                frames = seen_from(frames, batch.frames.bev_to_global)
            bev = model.encode(model.image_features(frames), frames, memory)
            memory = model.temporal.remember(bev, frames, memory, valid)
    return memory


@contextmanager
def evaluation_mode(model: object) -> Iterator[None]:
    """Put every submodule into evaluation mode inside the block, and back into its own mode after it."""
    assert isinstance(model, nn.Module)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def normalised(batch: Batch, images: ImageInput) -> Batch:
    """Normalise the images of a batch that the data set left as pixels."""
    history = [images.normalise(frames) for frames in batch.history]
    return replace(batch, frames=images.normalise(batch.frames), history=history)


def padded(batch: Batch, bottom: int, right: int) -> Batch:
    """Add pixels of the mean colour to all images of a batch.

    Args:
        batch: with normalised images.
        bottom, right: how many rows and columns of pixels.
    """

    def pad(frames: CameraFrames) -> CameraFrames:
        return replace(frames, images=functional.pad(frames.images, (0, right, 0, bottom)))

    return replace(batch, frames=pad(batch.frames), history=[pad(frames) for frames in batch.history])


def in_single_precision(outputs: ModelOutputs) -> ModelOutputs:
    """Convert predictions to float32 at least: half precision is too coarse for losses and metres."""

    def widen(value: Tensor) -> Tensor:
        return value.float() if value.is_floating_point() and value.dtype.itemsize < 4 else value

    return outputs._map(widen)


class _Reach(torch.autograd.Function):
    """Hands a loss on and stands in the graph of parameters, to which it gives no gradient.

    The reverse of a sum of zeros would do the same with several kernels a parameter.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = len(parameters)
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*gradients, *(None for _ in range(ctx.parameters)))


class TrainingModule(pl.LightningModule):
    """A model with its optimiser, for ``lightning.pytorch.Trainer``.

    Args:
        config: of the run; a checkpoint carries it.
        model: what to train; see :class:`TrainableModel`.
    """

    def __init__(self, config: ExperimentConfig, model: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self._images = ImageInput(config.data)
        self.skipped: dict[str, str] = {}
        self._stream = StreamMemory(config.training.batch_size) if config.data.stream_length else None
        self._tokens: list[str] = []

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule, stepped at every optimiser step."""
        optimizer, schedule = build_optimizer(self.model, self.config.training)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Take the next step's rate from this run's own schedule.

        A checkpoint brings the rate that its run would have gone on with. That is another one where the
        number of steps has been changed.
        """
        schedule = self.lr_schedulers()
        assert isinstance(schedule, LambdaLR)
        rates = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
        for group, base, factor in rates:
            group["lr"] = base * factor(schedule.last_epoch)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalise images that came as pixels, on the model's device."""
        return normalised(batch, self._images)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed drop-out and drop-path from the step, so that a resumed run draws the same."""
        training = self.config.training
        micro_batch = batch_idx % training.accumulate
        torch.manual_seed(derive_seed(STEP, training.seed, self.global_step, micro_batch, rank()))
        self._tokens = [*(self._tokens if micro_batch else []), *batch.tokens]
        self.skipped |= {bad.token: bad.reason for bad in batch.skipped}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch of this process.

        Raises:
            NonFiniteLossError: in every process, when it is NaN or infinite in any.
        """
        model: Any = self.model
        if self.config.augmentation.padding_px:
            batch = self.pad_at_random(batch, batch_idx)
        outputs = self._forward(model, batch, batch_idx)
        assert batch.targets is not None
        with torch.autocast(self.device.type, enabled=False):
            losses = self._losses(in_single_precision(outputs), batch)
        total = torch.stack(list(losses.values())).sum()
        self._report(total.detach(), {name: value.detach() for name, value in losses.items()}, batch)
        return self._reach_all_parameters(total)

    def pad_at_random(self, batch: Batch, batch_idx: int) -> Batch:
        """Pad images by up to ``augmentation.padding_px``; the draw is a function of the step."""
        training, most = self.config.training, self.config.augmentation.padding_px
        seed = derive_seed(PADDING, training.seed, self.global_step, batch_idx % training.accumulate, rank())
        bottom, right = np.random.default_rng(seed).integers(-most, most, size=2, endpoint=True).clip(0)
        return padded(batch, int(bottom), int(right))

    def _losses(self, outputs: ModelOutputs, batch: Batch) -> dict[str, Tensor]:
        """Losses by name; a stand-in has zeros, and no share in what losses are divided by."""
        losses: dict[str, Tensor]
        model: Any = self.model
        if not batch.is_stand_in:
            losses = model.losses(outputs, batch.targets, mean_over_processes)
            return losses
        # Made all the same: the other processes wait for this one's part in every mean.
        losses = model.losses(outputs, batch.targets, lambda value: mean_over_processes(0.0 * value))
        return {name: torch.zeros_like(value) for name, value in losses.items()}

    def _forward(self, model: Any, batch: Batch, batch_idx: int) -> ModelOutputs:
        """Outputs of the current frames with the memory of their queue or stream."""
        outputs: ModelOutputs
        if self.config.model.perspective.only:
            outputs, _ = model(batch.frames)
        elif self._stream is None:
            memory = memory_from_history(model, batch, self.config.model.temporal)
            outputs, _ = model(batch.frames, memory)
        else:
            self._stream.to(self.device)
            accumulate = self.config.training.accumulate
            turn = self.global_step * accumulate + batch_idx % accumulate
            turn %= self.config.data.stream_turns
            outputs, memory = model(batch.frames, self._stream.memory_for(batch, turn))
            self._stream.remember(batch, memory, turn)
        return outputs

    def _report(self, total: Tensor, losses: dict[str, Tensor], batch: Batch) -> None:
        """Log the losses' means over processes; stop all of them if one is not finite."""
        local = torch.stack([total, *losses.values()])
        means = mean_over_processes(local)
        values = dict(zip(("loss", *losses), means.tolist(), strict=True))
        if not bool(torch.isfinite(means).all()):
            mine = batch.tokens if not bool(torch.isfinite(local).all()) else []
            names = [name for name, value in values.items() if not _is_finite(value) and name != "loss"]
            raise NonFiniteLossError(
                self._non_finite_message(f"loss ({', '.join(names[:4])})", gather_objects(mine))
            )
        logged = {f"train/{name}": value for name, value in values.items()}
        self.log_dict(logged, batch_size=len(batch))
        self.log("loss", values["loss"], prog_bar=True, logger=False, batch_size=len(batch))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of the whole gradient.

        Raises:
            NonFiniteLossError: when it is NaN or infinite, before the weights are touched. Under
                16-mixed Lightning's loss scaling skips such a step instead.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not bool(torch.isfinite(norm)) and self.config.training.precision != "16-mixed":
            tokens = gather_objects(self._tokens)
            raise NonFiniteLossError(self._non_finite_message("gradient", tokens))
        limit = self.config.training.gradient_clip
        if limit > 0.0:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        rate = optimizer.param_groups[-1]["lr"]
        self.log_dict(
            {"train/gradient_norm": norm, "train/learning_rate": rate, "train/skipped": self._skips()}
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the configuration, the skipped samples and the stream's memory into the checkpoint."""
        checkpoint[CONFIG_KEY] = config_to_dict(self.config)
        checkpoint[SKIPPED_KEY] = dict(self.skipped)
        if self._stream is not None:
            checkpoint[STREAM_KEY] = self._stream.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the skipped samples and the stream's memory again."""
        self.skipped = dict(checkpoint.get(SKIPPED_KEY, {}))
        if self._stream is not None:
            self._stream.load_state(checkpoint.get(STREAM_KEY, []))

    def _skips(self) -> float:
        return float(len(self.skipped))

    def _reach_all_parameters(self, total: Tensor) -> Tensor:
        """Connect the loss to every trainable parameter, without changing its value or its gradients.

        A part of the model may have had no part in this process's loss; DistributedDataParallel waits
        for its gradient all the same.
        """
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        reached: Tensor = _Reach.apply(total, *parameters)  # type: ignore[no-untyped-call]
        return reached

    def on_after_backward(self) -> None:
        """Give every trainable parameter a gradient: AdamW would decay some in one run and not in another."""
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _non_finite_message(self, what: str, tokens: Sequence[Sequence[str]]) -> str:
        listed = [token for part in tokens for token in part]
        return (
            f"the {what} is NaN or infinite at step {self.global_step + 1}, sample {', '.join(listed[:8])}\n"
            "the weights before this step are in the newest checkpoint; likely causes: a damaged sample, a "
            "learning rate too high, or half precision"
        )


def _is_finite(value: float) -> bool:
    return value - value == 0.0
