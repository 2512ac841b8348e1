"""Evaluate what the ROS 2 node published, from a recording: metrics and a video."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bevperception.errors import importing

with importing():
    from bevperception.files import check_output_file, output_folder
    from bevperception.processes import program_name
    from bevperception.ranges import Range, add_number


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The program's options."""
    parser = argparse.ArgumentParser(
        prog=program_name("evaluate_bag"),
        description="Evaluate a recording of the node's outputs against the scenes that were played.",
    )
    parser.add_argument("--bag", required=True, help="recording of the node's output topics")
    parser.add_argument("--weights", required=True, help="that the node ran")
    parser.add_argument("--data-root", required=True, help="nuScenes-format data that was played")
    parser.add_argument("--version", required=True, help="of its tables")
    parser.add_argument("--split", required=True, help="whose scenes were played")
    parser.add_argument("--out", required=True, help="folder for metrics.json and the submission")
    parser.add_argument("--video", help="MP4 file to write as well")
    add_number(parser, "--fps", float, Range(0.1, 240.0), default=2.0, help="pictures a second of the video")
    add_number(parser, "--score-threshold", float, Range(0.0, 1.0), default=0.3, help="of boxes in the video")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int | None:
    """Read, evaluate, draw."""
    options = parse(argv)
    with importing():
        from bevperception.bags.evaluation import evaluate_recording, pictures_of
        from bevperception.bags.recording import read_recording
        from bevperception.checkpoints.weights import read_weights
        from bevperception.config_io import config_from_dict
        from bevperception.data.nuscenes import NuScenesReader
        from bevperception.evaluation.runner import RESULT_FILES
        from bevperception.visualization.video import write_video

    if options.video:
        check_output_file(options.video)
    weights = read_weights(options.weights)
    config = config_from_dict(weights.card.config, str(weights.path))
    config.data.root, config.data.version = options.data_root, options.version
    with output_folder(options.out, RESULT_FILES) as out:
        reader = NuScenesReader(config.data)
        recording = read_recording(Path(options.bag))
        result = evaluate_recording(recording, config, reader, options.split, out)
    print(result.table())
    if options.video:
        pictures = pictures_of(recording, config, reader, options.split, options.score_threshold)
        count = write_video(options.video, pictures, options.fps)
        print(f"wrote {count} pictures to {options.video}")
    return None
