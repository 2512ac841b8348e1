"""Runs of the tiny model as a program, which Lightning starts once more for every further process.

Arguments: a folder for the runs, the number of processes, and what to do, one after the other ('train',
'stream', 'poison', 'unreadable'), each in a folder of its name. An error ends the program.
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


def work(out: Path, devices: int, what: str) -> None:
    """Train; the global batch is the same for any number of processes."""
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
    torch.manual_seed(0)
    metrics = train(config, TinyModel(), source, no_evaluation, out)
    if is_first_process():
        (out / "result.json").write_text(json.dumps(metrics))


def main() -> int | None:
    torch.set_num_threads(1)
    try:
        for what in sys.argv[3:]:
            work(Path(sys.argv[1], what), int(sys.argv[2]), what)
    except BevError:
        if not is_first_process():
            return USAGE_EXIT_CODE
        raise
    return None


if __name__ == "__main__":
    run_program(main)
