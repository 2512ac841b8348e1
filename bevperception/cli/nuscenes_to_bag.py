"""Write a scene of a nuScenes-format data set as a rosbag2."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bevperception.errors import importing

with importing():
    from bevperception.processes import program_name


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The program's options."""
    parser = argparse.ArgumentParser(
        prog=program_name("nuscenes_to_bag"),
        description="Write a scene as a rosbag2: images, calibration, TF, odometry and ground truth.",
    )
    parser.add_argument("--data-root", required=True, help="folder with samples/ and the version's tables")
    parser.add_argument("--version", required=True, help="for example v1.0-mini")
    parser.add_argument("--scene", required=True, help="name or token of the scene")
    parser.add_argument("--out", required=True, help="folder of the bag, which must not exist")
    parser.add_argument("--storage", default="mcap", help="mcap (default) or sqlite3")
    parser.add_argument("--raw", action="store_true", help="uncompressed images")
    parser.add_argument("--sweeps", action="store_true", help="all camera records, not only key frames")
    parser.add_argument(
        "--lidar-frame", action="store_true", help="for models that reason in the lidar's frame"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a bag of that name")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int | None:
    """Read the tables, write the bag, say what is in it."""
    options = parse(argv)
    with importing():
        from bevperception.bags.files import check_place
        from bevperception.bags.scene import BagOptions, write_scene_bag
        from bevperception.config import DataConfig
        from bevperception.data.nuscenes import NuScenesReader

    check_place(Path(options.out), options.storage, options.overwrite)
    data = DataConfig(root=options.data_root, version=options.version)
    data.bev_frame = "lidar" if options.lidar_frame else "ego"
    reader = NuScenesReader(data)
    what = BagOptions(options.storage, options.raw, options.sweeps, options.overwrite)
    counts = write_scene_bag(reader, reader.scene(options.scene), Path(options.out), what)
    for topic, count in sorted(counts.items()):
        print(f"{count:7d}  {topic}")
    print(f"wrote {options.out}")
    return None
