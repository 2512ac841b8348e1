"""The queue of earlier frames: what reaches the current frame, and what does not."""

from __future__ import annotations

from contextlib import suppress

import torch

from bevperception.data.dataset import collate
from bevperception.structures import Batch, BEVMemory
from bevperception.training.module import evaluation_mode, memory_from_history
from tests.training.standin import TinyModel, TinySource


def queue(index: int, history: int = 3) -> Batch:
    batch = TinySource(history=history)[index, 0]
    assert isinstance(batch, Batch)
    return batch


def memory_by_hand(model: TinyModel, batch: Batch, first: int) -> BEVMemory:
    memory = None
    with torch.no_grad():
        for frames in batch.history[first:]:
            _, memory = model(frames, memory)
    assert memory is not None
    return memory


def test_memory_is_that_of_running_the_frames_in_turn() -> None:
    model = TinyModel().eval()
    batch = queue(1)
    found = memory_from_history(model, batch)
    assert found is not None
    torch.testing.assert_close(found.features, memory_by_hand(model, batch, 0).features)
    assert found.valid.tolist() == [True]


def test_placeholders_start_no_memory() -> None:
    model = TinyModel().eval()
    batch = queue(1)
    batch.history_valid = torch.tensor([[False, True, True]])
    found = memory_from_history(model, batch)
    assert found is not None
    torch.testing.assert_close(found.features, memory_by_hand(model, batch, 1).features)
    batch.history_valid = torch.tensor([[False, False, False]])
    assert memory_from_history(model, batch) is None
    assert memory_from_history(model, queue(1, history=0)) is None


def test_a_batch_of_mixed_histories_equals_its_samples() -> None:
    model = TinyModel().eval()
    singles = [queue(1), queue(2), queue(3)]
    singles[0].history_valid = torch.tensor([[False, False, False]])
    singles[1].history_valid = torch.tensor([[False, False, True]])
    joint = collate(singles)
    assert isinstance(joint, Batch)
    memory = memory_from_history(model, joint)
    assert memory is not None
    assert memory.valid.tolist() == [False, True, True]
    with torch.no_grad():
        together, _ = model(joint.frames, memory)
        for index, single in enumerate(singles):
            alone, _ = model(single.frames, memory_from_history(model, single))
            torch.testing.assert_close(together.bev[index], alone.bev[0])


def test_the_past_gets_no_gradient_and_no_drop_out() -> None:
    model = TinyModel(dropout=0.9).train()
    model.backbone.eval()  # as frozen stages are
    batch = queue(1)
    first, second = memory_from_history(model, batch), memory_from_history(model, batch)
    assert first is not None
    assert second is not None
    assert torch.equal(first.features, second.features)
    assert not first.features.requires_grad
    assert model.dropout.training
    assert not model.backbone.training


def test_evaluation_mode_gives_every_flag_back_after_an_error() -> None:
    model = TinyModel().train()
    model.backbone.eval()
    before = {name: module.training for name, module in model.named_modules()}
    with suppress(KeyError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert {name: module.training for name, module in model.named_modules()} == before
