"""Train a model, evaluate it and export its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bevperception.errors import USAGE_EXIT_CODE, BevError, importing

with importing():
    from bevperception.config_io import ConfigParser
    from bevperception.distributed import is_first_process
    from bevperception.processes import program_name
    from bevperception.training.announce import run_line


def main(argv: Sequence[str] | None = None) -> int | None:
    """Parse, train."""
    parser = ConfigParser("Train a model, evaluate it and export its weights.", program_name("train"))
    parser.add_argument("--out", type=str, required=True, metavar="FOLDER", help="run folder")
    parser.add_argument(
        "--resume",
        type=str,
        metavar="auto|PATH",
        help="go on from the run folder's newest checkpoint, or from a given one",
    )
    config, options = parser.parse_experiment(argv)
    if is_first_process():
        print(run_line(config, Path(options.out)), flush=True)
    with importing():  # after mistakes have been said, as it takes long
        from bevperception.training.experiment import train_experiment

    try:
        train_experiment(config, Path(options.out), options.resume)
    except BevError:
        if not is_first_process():
            return USAGE_EXIT_CODE  # the first process says it
        raise
    return None
