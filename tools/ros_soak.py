"""The ROS 2 node for minutes on end: share of sets with results, latency, and whether memory grows.

A scene bag is looped with stamps that go on. Give it the bag of tools/nuscenes_to_bag.py.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bevperception.errors import BevError, importing, run_program

with importing():
    from bevperception.files import output_folder, write_json
    from bevperception.ranges import Range, add_number

SETTLED_S = 120.0
"""Memory is compared with what it was after this long."""
_SAMPLE_S = 5.0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The program's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bag", required=True, help="scene bag with compressed images")
    parser.add_argument(
        "--weights", required=True, help="weights.safetensors, a run's folder or the name of shipped weights"
    )
    add_number(parser, "--minutes", float, Range(0.01, 10_000.0), default=15.0, help="how long (%(default)s)")
    add_number(
        parser,
        "--rate",
        float,
        Range(0.01, 1000.0),
        default=2.5,
        help="2.5 plays 2 Hz key frames at 5 Hz (%(default)s)",
    )
    parser.add_argument("--precision", default="auto", help="auto, 32-true or bf16-mixed (%(default)s)")
    parser.add_argument("--fault", action="append", default=[], help="as for tools/replay_bag.py")
    parser.add_argument("--out", default="out/ros-soak", help="folder for logs and report.json (%(default)s)")
    add_number(parser, "--domain", int, Range(0, 232), default=74, help="ROS domain (%(default)s)")
    return parser.parse_args(argv)


def watch(replay: subprocess.Popen[bytes], node_pid: int, seconds: float) -> list[tuple[float, float]]:
    """Sample the node's memory while the replay runs.

    Returns:
        (seconds since the beginning, resident MB).

    Raises:
        BevError: if the replay ends early.
    """
    import psutil

    node, begin_s = psutil.Process(node_pid), time.monotonic()
    samples = []
    while (now_s := time.monotonic() - begin_s) < seconds:
        if replay.poll() is not None:
            raise BevError("the replay ended early; see replay.log")
        samples.append((now_s, node.memory_info().rss / 2**20))
        time.sleep(_SAMPLE_S)
    return samples


def growth_mb(samples: list[tuple[float, float]]) -> float:
    """Growth of memory after :data:`SETTLED_S` (half of shorter runs): the last minute against the first."""
    start_s = min(SETTLED_S, samples[-1][0] / 2)
    later = [memory for at_s, memory in samples if at_s >= start_s]
    some = max(1, min(len(later) // 2, 12))
    return sum(later[-some:]) / some - sum(later[:some]) / some


def run(options: argparse.Namespace, out: Path) -> list[tuple[float, float]]:
    """Node, recorder of diagnostics, a listener of results, replay."""
    from bevperception.bags.processes import NODE, background, environment, node_command, tool_command
    from bevperception.checkpoints.weights import absolute_weights

    parameters = {
        "weights": absolute_weights(options.weights),
        "calibration_file": Path(options.bag).resolve() / "calibration.yaml",
        "sweep_trigger": True,
        "precision": options.precision,
        "image_reliability": "reliable",
    }
    record = tool_command(
        "record_bag.py",
        "--overwrite",
        "--out",
        str(out / "recording"),
        f"{NODE}/output/objects",
        "/diagnostics",
    )
    command = tool_command("replay_bag.py", options.bag, "--rate", str(options.rate), "--loops", "0")
    command += ["--continuous", "--reliable", "--wait-for", "30"]
    for fault in options.fault:
        command += ["--fault", fault]
    node = background(node_command(parameters), options.domain, out / "node.log", "warm: ")
    recorder = background(record, options.domain, out / "record.log", f"recording {NODE}/output/objects")
    with node as running, recorder, (out / "replay.log").open("wb") as log:
        replay = subprocess.Popen(
            command, env=environment(options.domain), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            return watch(replay, running.pid, 60 * options.minutes)
        finally:
            replay.terminate()
            replay.wait(20)


def count_sets(stamps_ns: Sequence[int]) -> int:
    """Sets that must have been there, each about as long after the other as the results mostly are.

    Args:
        stamps_ns: of the results, in order; a gap of about k periods lacks k - 1 of them.
    """
    gaps = [later - earlier for earlier, later in itertools.pairwise(stamps_ns)]
    if not gaps:
        return len(stamps_ns)
    period_ns = max(1, sorted(gaps)[len(gaps) // 2])
    return 1 + sum(max(1, round(gap / period_ns)) for gap in gaps)


def main() -> int:
    """Parse, open the folder, run."""
    options = parse()
    with output_folder(Path(options.out).resolve(), ("report.json", "node.log", "record.log")) as out:
        soak(options, out)
    return 0


def soak(options: argparse.Namespace, out: Path) -> None:
    """Run, count, report."""
    samples = run(options, out)
    from bevperception.bags.recording import read_recording

    recording = read_recording(out / "recording")
    stamps = sorted(recording.objects)
    expected = count_sets(stamps)
    report: dict[str, Any] = {
        "minutes": options.minutes,
        "results": len(stamps),
        "sets": expected,
        "share": len(stamps) / expected if expected else 0.0,
        "memory_mb": samples[-1][1],
        "growth_mb": growth_mb(samples),
        "worst_latency_p95_ms": max(recording.latency_p95_ms, default=None),
        "timing": recording.diagnostics.get("timing", {}),
        "synchronisation": recording.diagnostics.get("synchronisation", {}),
        "memory": samples,
    }
    write_json(out / "report.json", report, indent=2)
    for name, value in report.items():
        if name != "memory":
            print(f"{name}: {value}")


if __name__ == "__main__":
    run_program(main)
