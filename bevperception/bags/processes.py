"""Start the node, a replay and a recorder as processes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bevperception.errors import BevError
from bevperception.taxonomy import CAMERA_NAMES

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "ros2_ws" / "src" / "bev_perception"
NODE = "/bev_perception"
_START_S = 180.0
_END_S = 30.0


def environment(domain: int) -> dict[str, str]:
    """Environment variables of ROS processes on this machine alone, with room for images in shared memory.

    Args:
        domain: ROS domain.
    """
    paths = [str(PACKAGE), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "ROS_DOMAIN_ID": str(domain),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "FASTDDS_DEFAULT_PROFILES_FILE": str(PACKAGE / "config" / "fastdds.xml"),
    }


def remappings(raw: bool) -> list[str]:
    """The node's arguments that connect its inputs to a scene bag's topics."""
    pairs = {"odometry": "/odometry", "sweep": "/sensors/sweep"}
    for channel in CAMERA_NAMES:
        name = channel.lower()
        for topic in ("camera_info", "image" if raw else "image/compressed"):
            pairs[f"{name}/{topic}"] = f"/sensors/{name}/{topic}"
    return [part for name, topic in pairs.items() for part in ("-r", f"{NODE}/input/{name}:={topic}")]


def node_command(parameters: Mapping[str, object], raw: bool = False) -> list[str]:
    """The command that starts the node on a scene bag's topics."""
    command = [sys.executable, "-m", "bev_perception.main", "--ros-args", *remappings(raw)]
    for name, value in parameters.items():
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        command += ["-p", f"{name}:={shown}"]
    return command


def tool_command(tool: str, *arguments: str) -> list[str]:
    """The command that runs one of the programs of tools/."""
    return [sys.executable, str(REPOSITORY / "tools" / tool), *arguments]


@contextmanager
def background(
    command: Sequence[str], domain: int, log: Path, ready: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process until the block ends, then interrupt it.

    Args:
        command: to run.
        domain: ROS domain.
        log: file for its output.
        ready: text in its output that says that it is ready; the block begins then.

    Raises:
        BevError: if it ends before it is ready, does not become ready, or does not end.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment(domain), stdout=file, stderr=subprocess.STDOUT)
    try:
        _await(process, log, ready)
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise BevError(f"{command[1]} did not end within {_END_S:.0f} s of SIGINT; see {log}") from None


def _await(process: subprocess.Popen[bytes], log: Path, ready: str) -> None:
    end_s = time.monotonic() + _START_S
    while ready not in log.read_text(errors="replace"):
        if process.poll() is not None:
            last_lines = log.read_text(errors="replace").strip().splitlines()[-3:]
            raise BevError("a process ended before it was ready:\n" + "\n".join(last_lines))
        if time.monotonic() > end_s:
            raise BevError(f"a process was not ready after {_START_S:.0f} s; see {log}")
        time.sleep(0.05)
