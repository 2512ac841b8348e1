"""A run of the tiny model as a program, which Lightning starts once more for every further process.

Arguments: the run folder, the number of processes, and what to do ('train', 'stream', 'poison',
'unreadable').
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from bevperception.distributed import is_first_process
from bevperception.errors import USAGE_EXIT_CODE, BevError, SampleError, run_program
from bevperception.structures import Batch
from bevperception.training.run import train
from tests.training.standin import TinyModel, TinyScenes, TinySource, no_evaluation, tiny_config


class OneUnreadable(TinySource):
    """Sample 3 raises."""

    def __getitem__(self, item: tuple[int, int]) -> Batch:
        if item[0] == 3:
            raise SampleError("sample token-3: its image is truncated", "token-3")
        batch = super().__getitem__(item)
        assert isinstance(batch, Batch)
        return batch


def main() -> int | None:
    out, devices, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    config = tiny_config(
        steps=6,
        accumulate=2,
        batch_size=4 // devices,
        devices=devices,
        ema_decay=0.9,
        checkpoint_every=3,
        stream_length=3 if what == "stream" else 0,
    )
    source: TinySource = OneUnreadable(history=1) if what == "unreadable" else TinySource(history=1)
    if what == "stream":
        source = TinyScenes()
    if what == "poison":
        source.poison = 3
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        metrics = train(config, TinyModel(), source, no_evaluation, out)
    except BevError:
        if not is_first_process():
            return USAGE_EXIT_CODE
        raise
    if is_first_process():
        (out / "result.json").write_text(json.dumps(metrics))
    return None


if __name__ == "__main__":
    run_program(main)
