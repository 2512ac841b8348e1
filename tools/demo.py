"""The main job on one real key frame: train a small model on it, evaluate, draw.

Data: a nuScenes folder given by --data-root or NUSCENES=/path (its first key frame is cut out; the folder is
only read), else the key frame that BEVPERCEPTION_KEYFRAME names. There are no trained weights to show yet, so
the model learns this one frame by heart: a check that the whole path works on your data, not a measure of how
well it sees. A longer run (--steps) sees more.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bevperception.errors import BevError, ConfigError, DataError, run_program

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = REPOSITORY / "configs" / "keyframe_micro.yaml"
KEYFRAME_SETTINGS = {"version": "v1.0-mini", "train_split": "mini_train", "val_split": "mini_train"}
SUBSET_VERSION, SUBSET_SPLIT = "v1.0-demo", "demo"
DEFAULT_STEPS = 250


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The program's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", default=os.environ.get("NUSCENES") or None, help="nuScenes folder")
    parser.add_argument("--version", help="tables to use; default: v1.0-mini if there, else v1.0-trainval")
    parser.add_argument("--scene", help="scene to cut the key frame from; default: the first")
    parser.add_argument(
        "--steps", type=int, default=DEFAULT_STEPS, help="training steps (default %(default)s)"
    )
    parser.add_argument("--out", default="out/demo", help="folder for what it makes (default %(default)s)")
    options = parser.parse_args(argv)
    if options.steps < 1:
        raise ConfigError(f"--steps must be at least 1, got {options.steps}")
    return options


def choose_version(root: Path, wanted: str | None) -> str:
    """The version of a data root to use.

    Raises:
        DataError: if the root or the version is not there.
    """
    there = sorted(p.parent.name for p in root.glob("*/sample_data.json"))
    for version in [wanted] if wanted else ["v1.0-mini", "v1.0-trainval", *there]:
        if version in there:
            return version
    raise DataError(
        f"{root} has no tables of {wanted or 'any version'} (VERSION/sample_data.json)\n"
        f"versions there: {', '.join(there) or 'none'}"
    )


def data_settings(options: argparse.Namespace, out: Path) -> dict[str, str]:
    """Where the key frame is: settings of ``data``.

    Raises:
        DataError: if there is no data, or it cannot be read.
    """
    if options.data_root is not None:
        from bevperception.data.nuscenes import load_tables
        from bevperception.data.subset import write_subset

        root = Path(options.data_root).expanduser()
        version = choose_version(root, options.version)
        print(f"reading {root}, version {version}", flush=True)
        nusc = load_tables(root, version)
        scene = options.scene or nusc.scene[0]["name"]
        write_subset(nusc, scene, 1, out / "data", SUBSET_VERSION, SUBSET_SPLIT)
        split = {"train_split": SUBSET_SPLIT, "val_split": SUBSET_SPLIT}
        return {"root": str(out / "data"), "version": SUBSET_VERSION, **split}
    keyframe = os.environ.get("BEVPERCEPTION_KEYFRAME")
    if keyframe and (Path(keyframe) / KEYFRAME_SETTINGS["version"]).is_dir():
        return {"root": keyframe, **KEYFRAME_SETTINGS}
    raise DataError(
        "the demo needs data, and found none\n"
        "give it a nuScenes folder (make demo NUSCENES=/data/nuscenes; v1.0-mini is enough),\n"
        "or set BEVPERCEPTION_KEYFRAME to the folder of a single key frame"
    )


def run(tool: str, *arguments: str) -> None:
    """Run one of the project's programs as a user would, and show how.

    Raises:
        BevError: if it fails; it has said why.
    """
    command = [sys.executable, str(REPOSITORY / "tools" / tool), *arguments]
    print("\n$ " + " ".join(["tools/" + tool, *arguments]), flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise BevError(f"tools/{tool} ended with exit code {code}; its message is above")


def main() -> int:
    """Train, evaluate, draw."""
    options = parse()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = [f"--data.{key}={value}" for key, value in data_settings(options, out).items()]
    run_folder, picture = out / "run", out / "prediction.png"
    shutil.rmtree(run_folder, ignore_errors=True)
    steps = f"--training.steps={options.steps}"
    run("train.py", f"--config={CONFIG}", f"--out={run_folder}", steps, *settings)
    run("visualize.py", f"--weights={run_folder}", "--sample=0", f"--out={picture}")
    metrics = run_folder / "evaluation" / f"step-{options.steps:08d}" / "metrics.json"
    shutil.copyfile(metrics, out / "metrics.json")
    print(f"\nlook at {picture} (six cameras, prediction and ground truth); numbers: {out / 'metrics.json'}")
    return 0


if __name__ == "__main__":
    run_program(main)
