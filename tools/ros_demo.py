"""The ROS 2 node at work: bag, node, replay and recorder as processes; then metrics, video and timings.

A scene of a nuScenes-format data set becomes a bag; the bag is replayed to the node, what the node publishes
is recorded, and the recording is evaluated against the ground truth beside an offline evaluation of the same
weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bevperception.errors import BevError, importing, run_program

with importing():
    from bevperception.files import output_folder
    from bevperception.processes import run_beside
    from bevperception.ranges import Range, add_number

VERSION, SPLIT = "v1.0-demo", "demo"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The program's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--weights", required=True, help="weights.safetensors, a run's folder or the name of shipped weights"
    )
    parser.add_argument("--data-root", required=True, help="nuScenes-format data")
    parser.add_argument("--version", required=True, help="of its tables")
    parser.add_argument("--scene", help="name of the scene; default: the last one")
    parser.add_argument("--out", default="out/ros-demo", help="folder for what it makes (%(default)s)")
    add_number(
        parser,
        "--sets-per-second",
        float,
        Range(0.01, 1000.0),
        default=5.0,
        help="of six images (%(default)s)",
    )
    add_number(
        parser,
        "--key-frames",
        int,
        Range(2, 1_000_000),
        default=40,
        help="of the scene, at most (%(default)s)",
    )
    parser.add_argument("--precision", default="auto", help="auto, 32-true or bf16-mixed (%(default)s)")
    add_number(parser, "--domain", int, Range(0, 232), default=73, help="ROS domain (%(default)s)")
    return parser.parse_args(argv)


def show(*command: str) -> None:
    """Run a program of tools/ and show how.

    Raises:
        BevError: if it fails; it has said why.
    """
    from bevperception.bags.processes import tool_command

    print("\n$ tools/" + " ".join(command), flush=True)
    code = run_beside(tool_command(*command), {**os.environ, "PYTHONUNBUFFERED": "1"})
    if code:
        raise BevError(f"tools/{command[0]} ended with exit code {code}; its message is above")


def cut_scene(options: argparse.Namespace, out: Path) -> tuple[str, float]:
    """Cut the scene out of its data set.

    Returns:
        name of the scene, and its key frames a second.
    """
    with importing():
        from bevperception.data.subset import write_subset
        from bevperception.data.tables import load_tables

    nusc = load_tables(Path(options.data_root).expanduser(), options.version)
    scene = options.scene or nusc.scene[-1]["name"]
    tokens = write_subset(nusc, scene, options.key_frames, out / "data", VERSION, SPLIT)
    times_us = [nusc.get("sample", token)["timestamp"] for token in tokens]
    return scene, (len(tokens) - 1) / ((times_us[-1] - times_us[0]) * 1e-6)


def play(options: argparse.Namespace, out: Path, rate: float) -> dict[str, Any]:
    """Run node, recorder and replay.

    Returns:
        what the replay says it sent.
    """
    from bevperception.bags.processes import NODE, background, environment, node_command, tool_command
    from bevperception.checkpoints.weights import absolute_weights

    parameters = {
        "weights": absolute_weights(options.weights),
        "calibration_file": out / "bag" / "calibration.yaml",
        "sweep_trigger": True,
        "score_threshold": 0.0,
        "precision": options.precision,
        "image_reliability": "reliable",
    }
    print(f"\nstarting the node, a recorder and the replay at {rate:.2f} times its speed", flush=True)
    record = tool_command(
        "record_bag.py", "--overwrite", "--out", str(out / "recording"), f"{NODE}/output/", "/diagnostics"
    )
    node = background(node_command(parameters), options.domain, out / "node.log", "warm: ")
    recorder = background(record, options.domain, out / "record.log", f"recording {NODE}/output/objects")
    replay = tool_command(
        "replay_bag.py", str(out / "bag"), "--rate", f"{rate:.4f}", "--reliable", "--wait-for", "30"
    )
    with node, recorder:
        done = subprocess.run(
            replay, env=environment(options.domain), check=False, capture_output=True, text=True
        )
        # A last result and a last line of diagnostics are still to come.
        subprocess.run([sys.executable, "-c", "import time; time.sleep(2.5)"], check=True)
    if done.returncode:
        raise BevError(f"the replay failed: {done.stderr.strip()}")
    sent: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return sent


def report(out: Path, sent: dict[str, Any], sets: int) -> None:
    """Print what was published, how fast, and how online and offline metrics compare."""
    from bevperception.bags.recording import read_recording

    recording = read_recording(out / "recording")
    share = len(recording.objects) / sets
    print(f"\n{len(recording.objects)} results for {sets} sets of six images ({100 * share:.1f} %)")
    print(f"worst lag of the replay {1e3 * sent['worst_lag_s']:.0f} ms")
    for part in ("perception", "timing", "synchronisation", "ego motion"):
        values = dict(recording.diagnostics.get(part, {}))
        print(f"{part}: {values.pop('message', 'never heard of')}")
        values.pop("level", None)
        for name, value in sorted(values.items()):
            print(f"    {name}: {value}")
    online = json.loads((out / "online" / "metrics.json").read_text())
    offline = json.loads((out / "offline" / "metrics.json").read_text())
    print(f"\n{'':<12}{'online':>10}{'offline':>10}")
    for name in ("NDS", "mAP", "mATE", "mAVE"):
        pair = [metrics["detection"]["overall"][name] for metrics in (online, offline)]
        print(f"{name:<12}{pair[0]:>10.4f}{pair[1]:>10.4f}")
    if online["segmentation"]:
        pair = [metrics["segmentation"]["mean_iou"] for metrics in (online, offline)]
        print(
            "mean IoU    "
            + "".join(f"{value:>10.4f}" if value is not None else f"{'-':>10}" for value in pair)
        )


def main() -> int:
    """Parse, open the folder, run."""
    options = parse()
    with output_folder(Path(options.out).resolve(), ("ros-demo.mp4", "node.log", "record.log")) as out:
        demonstrate(options, out)
    return 0


def demonstrate(options: argparse.Namespace, out: Path) -> None:
    """Cut, play, evaluate, draw, report."""
    scene, key_frames_per_s = cut_scene(options, out)
    data = ("--data-root", str(out / "data"), "--version", VERSION)
    show("nuscenes_to_bag.py", *data, "--scene", scene, "--out", str(out / "bag"), "--overwrite")
    sent = play(options, out, options.sets_per_second / key_frames_per_s)
    recording, video = str(out / "recording"), str(out / "ros-demo.mp4")
    evaluation = ("--bag", recording, "--weights", options.weights, "--split", SPLIT)
    show("evaluate_bag.py", *evaluation, *data, "--out", str(out / "online"), "--video", video)
    settings = {"root": out / "data", "version": VERSION, "val_split": SPLIT, "workers": 0}
    overrides = [f"--data.{name}={value}" for name, value in settings.items()]
    overrides.append(f"--training.precision={options.precision}")
    show("evaluate.py", "--weights", options.weights, "--out", str(out / "offline"), *overrides)
    report(out, sent, sent["sent"]["/sensors/sweep"])
    print(f"\nlook at {video}")


if __name__ == "__main__":
    run_program(main)
