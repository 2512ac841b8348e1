"""Make a procedural world in nuScenes' format: six cameras, boxes, maps and CAN bus, read by the devkit.

The same settings give the same bytes, on any number of workers. A run that was cut off goes on where it
stopped when the same command is given again; until it is complete, the folder does not exist (its parts lie
in .NAME.partial beside it). A folder that holds anything else is never touched.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bevperception.errors import importing

with importing():
    from bevperception.processes import program_name
    from bevperception.ranges import Range, add_number, rules_of
    from bevperception.world import WorldConfig, make_world
    from bevperception.world.settings import (
        MINI_VERSION,
        TRAIN_SPLIT,
        VAL_SPLIT,
        WORLD_VERSION,
        parse_size,
    )
    from bevperception.world.writer import finished_scenes, partial_folder

EXAMPLES = f"""examples:
  a world to train on:            bevperception make-world --scenes 120 --seed 7 --size 400x225 out/world
  a small one, made in seconds:   bevperception make-world --scenes 2 --frames 4 --size 400x225 out/small
  as nuScenes' ten mini scenes:   bevperception make-world --scenes 10 --version v1.0-mini out/mini
  what it looks like:             bevperception visualize --data.root out/small \\
                                    --data.version {WORLD_VERSION} --split {VAL_SPLIT} --sample 0
Use it by data.root, data.version {WORLD_VERSION}, data.train_split {TRAIN_SPLIT} and
data.val_split {VAL_SPLIT}; {MINI_VERSION} has the splits mini_train and mini_val.
"""


def build_parser() -> argparse.ArgumentParser:
    """The program's options; defaults are those of :class:`WorldConfig`."""
    default = WorldConfig()
    parser = argparse.ArgumentParser(
        prog=program_name("make_world"),
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def number(option: str, kind: type[int] | type[float], text: str) -> None:
        name = option.removeprefix("--").replace("-", "_")
        rule = next(rule for rule in rules_of(WorldConfig, name) if isinstance(rule, Range))
        value = getattr(default, name)
        add_number(parser, option, kind, rule, default=value, help=f"{text} (%(default)s)")

    parser.add_argument("root", type=Path, help="data root to make")
    number("--scenes", int, "number of scenes")
    number("--seed", int, "of everything random")
    number("--frames", int, "key frames a scene, at 2 Hz")
    parser.add_argument(
        "--size", default="1600x900", help="of the images, WIDTHxHEIGHT, 16k x 9k pixels (%(default)s)"
    )
    parser.add_argument("--sweeps", action="store_true", help="write camera images between key frames, 12 Hz")
    parser.add_argument(
        "--version",
        default=default.version,
        help=f"{WORLD_VERSION}, or {MINI_VERSION} with the scene names of nuScenes' mini set (%(default)s)",
    )
    number("--val-share", float, "of the scenes, the last ones")
    number("--jpeg-quality", int, "of the images")
    workers = "processes; the result is the same (%(default)s)"
    add_number(parser, "--workers", int, Range(0, 1024), default=os.cpu_count() or 1, help=workers)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Make the world."""
    options = build_parser().parse_args(argv)
    config = WorldConfig(
        scenes=options.scenes,
        seed=options.seed,
        frames=options.frames,
        image_size=parse_size(options.size),
        sweeps=options.sweeps,
        version=options.version,
        val_share=options.val_share,
        jpeg_quality=options.jpeg_quality,
    )
    try:
        root = make_world(config, options.root, workers=options.workers, progress=not options.quiet)
    except KeyboardInterrupt:
        partial = partial_folder(options.root)
        if count := finished_scenes(partial):
            print(
                f"{count} finished scenes stay in {partial}: the same command goes on there", file=sys.stderr
            )
            print(f"to remove them: rm -r {shlex.quote(str(partial))}", file=sys.stderr)
        raise
    splits = ", ".join(f"{name} {len(scenes)}" for name, scenes in config.splits.items())
    print(f"{root}: version {config.version}, {config.scenes} scenes ({splits})")
    return 0
