"""The main job, whole: perceive a drive, evaluate, draw pictures and a video.

By default a small procedural world is made and the shipped weights, which have never seen it, perceive a
scene of it. With your nuScenes (--data-root, or NUSCENES=/path; v1.0-mini is enough) a small model learns its
first key frame by heart instead: a check that the whole path works on your data, not a measure of how well it
sees, as there are no weights trained on nuScenes. The folder is only read. A longer run (--steps) sees more.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from bevperception.errors import BevError, DataError, importing

with importing():
    from bevperception.files import output_folder, write_bytes
    from bevperception.processes import PROGRAM, program_name, run_beside
    from bevperception.ranges import Range, add_number

KEYFRAME_CONFIG = "keyframe_micro"
SUBSET_VERSION, SUBSET_SPLIT = "v1.0-demo", "demo"
DEFAULT_STEPS = 250

WEIGHTS = "world_v2"
WORLD_SEED = 90213
"""Of the demonstration's world: the first from 90210 on with a scene by day; no weights are trained on it."""
WORLD_SCENES = 2
WORLD_SPLIT, WORLD_SCENE = "world_val", "scene-9002"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The program's options."""
    parser = argparse.ArgumentParser(
        prog=program_name("demo"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", default=os.environ.get("NUSCENES") or None, help="nuScenes folder")
    parser.add_argument("--version", help="tables to use; default: v1.0-mini if there, else v1.0-trainval")
    parser.add_argument("--scene", help="scene to cut the key frame from; default: the first")
    add_number(
        parser,
        "--steps",
        int,
        Range(1, 1_000_000),
        default=DEFAULT_STEPS,
        help="training steps on nuScenes (default %(default)s)",
    )
    parser.add_argument(
        "--weights", default=WEIGHTS, help="that perceive the procedural world (default %(default)s)"
    )
    parser.add_argument("--out", default="out/demo", help="folder for what it makes (default %(default)s)")
    return parser.parse_args(argv)


def run(command: str, *arguments: str) -> None:
    """Run one of the project's programs as a user would, and show how.

    Raises:
        BevError: if it fails; it has said why.
    """
    print("\n$ " + " ".join(["bevperception", command, *arguments]), flush=True)
    code = run_beside([*PROGRAM, command, *arguments])
    if code:
        raise BevError(f"bevperception {command} ended with exit code {code}; its message is above")


def perceive_world(weights: str, out: Path) -> None:
    """Make a world and let weights perceive a scene of it that they have never seen."""
    world = out / "world"
    run("make-world", f"--scenes={WORLD_SCENES}", f"--seed={WORLD_SEED}", "--size=400x225", str(world))
    data = (f"--data.root={world}", "--data.version=v1.0-world")
    evaluation = out / "evaluation"
    run("evaluate", f"--weights={weights}", f"--split={WORLD_SPLIT}", f"--out={evaluation}", *data)
    write_bytes(out / "metrics.json", (evaluation / "metrics.json").read_bytes())
    draw = (f"--weights={weights}", f"--split={WORLD_SPLIT}", *data)
    run("visualize", *draw, "--sample=20", f"--out={out / 'prediction.png'}")
    run("visualize", *draw, f"--scene={WORLD_SCENE}", f"--out={out / 'scene.mp4'}")
    print(
        f"\nlook at {out / 'prediction.png'} (six cameras, prediction beside ground truth) and "
        f"{out / 'scene.mp4'}; numbers: {out / 'metrics.json'}"
    )


def choose_version(root: Path, wanted: str | None) -> str:
    """The version of a data root to use.

    Raises:
        DataError: if the root or the version is not there.
    """
    if not root.is_dir():
        raise DataError(f"the nuScenes folder {root} does not exist; is its disk mounted?")
    there = sorted(p.parent.name for p in root.glob("*/sample_data.json"))
    for version in [wanted] if wanted else ["v1.0-mini", "v1.0-trainval", *there]:
        if version in there:
            return version
    raise DataError(
        f"{root} has no tables of {wanted or 'any version'} (VERSION/sample_data.json)\n"
        f"versions there: {', '.join(there) or 'none'}"
    )


def cut_keyframe(options: argparse.Namespace, out: Path) -> list[str]:
    """Cut one key frame out of a nuScenes folder; returns where it is, as arguments.

    Raises:
        DataError: if there is no data, or it cannot be read.
    """
    with importing():
        from bevperception.data.subset import write_subset
        from bevperception.data.tables import load_tables

    root = Path(options.data_root).expanduser()
    version = choose_version(root, options.version)
    print(f"reading {root}, version {version}", flush=True)
    nusc = load_tables(root, version)
    scene = options.scene or nusc.scene[0]["name"]
    write_subset(nusc, scene, 1, out / "data", SUBSET_VERSION, SUBSET_SPLIT)
    return [
        f"--data.root={out / 'data'}",
        f"--data.version={SUBSET_VERSION}",
        f"--data.train_split={SUBSET_SPLIT}",
        f"--data.val_split={SUBSET_SPLIT}",
    ]


def learn_keyframe(options: argparse.Namespace, out: Path) -> None:
    """Learn one key frame by heart, evaluate on it, draw it."""
    data = cut_keyframe(options, out)
    run_folder, picture = out / "run", out / "prediction.png"
    shutil.rmtree(run_folder, ignore_errors=True)
    steps = f"--training.steps={options.steps}"
    run("train", f"--config={KEYFRAME_CONFIG}", f"--out={run_folder}", steps, *data)
    run("visualize", f"--weights={run_folder}", "--sample=0", f"--out={picture}")
    metrics = run_folder / "evaluation" / f"step-{options.steps:08d}" / "metrics.json"
    write_bytes(out / "metrics.json", metrics.read_bytes())
    print(f"\nlook at {picture} (six cameras, prediction and ground truth); numbers: {out / 'metrics.json'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Perceive the procedural world, or learn a key frame of the user's."""
    options = parse(argv)
    with output_folder(options.out, ("metrics.json", "prediction.png", "scene.mp4")) as out:
        if options.data_root is None:
            perceive_world(options.weights, out)
        else:
            learn_keyframe(options, out)
    return 0
