"""Train several models by a plan and compare them in a table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bevperception.errors import ConfigError, importing

with importing():
    from bevperception.config_files import config_path
    from bevperception.files import output_folder
    from bevperception.processes import program_name
    from bevperception.ranges import Range, add_number


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, train what is not complete, print the table."""
    parser = argparse.ArgumentParser(
        prog=program_name("run_plan"),
        description="Train the models of a plan, some from others' weights, and compare them in a table. "
        "A complete run is left alone and one that was cut off goes on, so the same command may be repeated.",
        epilog="further options go to every run, for example: --data.root=/data/world --data.workers=4",
    )
    parser.add_argument("plan", type=Path, help="YAML file, or the name of a shipped one: plans/world")
    parser.add_argument("--out", type=Path, required=True, help="a folder a run, and table.md")
    add_number(parser, "--jobs", int, Range(1, 1024), default=1, help="runs side by side (1)")
    parser.add_argument("--only", metavar="NAME,...", help="these runs alone")
    options, extra = parser.parse_known_args(argv)
    with importing():  # after mistakes have been said, as it takes long
        from bevperception.training.plan import RECORD_FOLDER, TABLE_NAME, read_plan, run_plan

    runs = read_plan(config_path(options.plan))
    if options.only:
        wanted = options.only.split(",")
        unknown = [name for name in wanted if name not in [run.name for run in runs]]
        if unknown:
            raise ConfigError(f"no run {', '.join(unknown)}; the plan has {', '.join(r.name for r in runs)}")
        runs = [run for run in runs if run.name in wanted]
    folders = (RECORD_FOLDER, *(run.name for run in runs))
    with output_folder(options.out, (TABLE_NAME,), folders) as out:
        print(run_plan(runs, out, options.jobs, extra))
