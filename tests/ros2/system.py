"""Starting the node and the replay as processes, and listening to what they say."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from nav_msgs.msg import OccupancyGrid
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.parameter_client import AsyncParameterClient
from sensor_msgs.msg import Image, PointCloud2
from visualization_msgs.msg import MarkerArray

from bevperception.bags import processes
from bevperception.bags.messages import object_rows_of, stamp_ns_of
from bevperception.bags.scene import BagOptions, write_scene_bag
from bevperception.checkpoints.weights import Card, save_weights
from bevperception.config_io import config_to_dict
from bevperception.data.nuscenes import NuScenesReader
from tests.streaming.helpers import micro_config, micro_model

ROOT, PACKAGE, NODE = processes.REPOSITORY, processes.PACKAGE, processes.NODE
SCENE = "scene-9003"
DOMAINS = 80
START_S = 60.0


def make_weights(folder: Path, root: Path) -> Path:
    """Save the micro model with its configuration."""
    config = micro_config(root)
    save_weights(folder, micro_model(config).state_dict(), Card(config_to_dict(config)))
    return folder


def make_bag(path: Path, root: Path, **options: Any) -> Path:
    """Write the scene as a bag."""
    reader = NuScenesReader(micro_config(root).data)
    write_scene_bag(reader, reader.scene(SCENE), path, BagOptions(**options))
    return path


def environment(domain: int) -> dict[str, str]:
    """Of the processes: the demonstration's, with one thread each."""
    return {**processes.environment(domain), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class Process:
    """A process with its output in a file, ended with the block.

    Args:
        command: to run.
        domain: ROS domain.
        log: file for its output.
    """

    def __init__(self, command: list[str], domain: int, log: Path) -> None:
        self.log = log
        self._file = log.open("ab")
        self.popen = subprocess.Popen(
            command, env=environment(domain), stdout=self._file, stderr=subprocess.STDOUT, cwd=ROOT
        )

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._file.close()

    @property
    def text(self) -> str:
        """What it has said so far."""
        return self.log.read_text(errors="replace")

    def stop(self, how: int = signal.SIGINT, patience_s: float = 10.0) -> tuple[int, float]:
        """End it; its exit code and how long that took in seconds."""
        begin_s = time.monotonic()
        if self.popen.poll() is None:
            self.popen.send_signal(how)
        try:
            code = self.popen.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise AssertionError(f"the process did not end:\n{self.text}") from None
        return code, time.monotonic() - begin_s

    def memory_mb(self) -> float:
        """Resident memory."""
        return float(psutil.Process(self.popen.pid).memory_info().rss) / 2**20


class NodeProcess(Process):
    """The perception node, active when the block begins.

    Args:
        domain: ROS domain.
        weights: to load.
        bag: whose calibration file is used.
        folder: for its log.
        parameters: beyond those of every test.
        raw: uncompressed images.
    """

    def __init__(
        self, domain: int, weights: Path, bag: Path, folder: Path, raw: bool = False, **parameters: Any
    ) -> None:
        values: dict[str, Any] = {
            "weights": weights,
            "calibration_file": bag / "calibration.yaml",
            "sweep_trigger": True,
            "score_threshold": 0.0,
            "marker_threshold": 0.0,
            "diagnostics_period_s": 0.1,
            "image_transport": "raw" if raw else "compressed",
            "image_reliability": "reliable",
            **parameters,
        }
        command = processes.node_command(values, raw)
        self.weights = weights
        super().__init__(command, domain, folder / "node.log")

    def __enter__(self) -> NodeProcess:
        end_s = time.monotonic() + START_S
        while "warm: " not in self.text:
            assert self.popen.poll() is None, self.text
            assert time.monotonic() < end_s, self.text
            time.sleep(0.05)
        return self


class Replay(Process):
    """tools/replay_bag.py, waiting for the node's subscriptions.

    Args:
        domain: ROS domain.
        bag: to play.
        arguments: beyond those of every test.
    """

    def __init__(self, domain: int, bag: Path, *arguments: str) -> None:
        log = bag.parent / f"replay-{time.monotonic_ns()}.log"
        waiting = ("--wait-for", "20", "--reliable")
        super().__init__(processes.tool_command("replay_bag.py", str(bag), *waiting, *arguments), domain, log)

    def finish(self, patience_s: float = 60.0) -> str:
        """Wait for its end; what it said."""
        code = self.popen.wait(patience_s)
        assert code == 0, self.text
        return self.text


@dataclass
class Seen:
    """What the probe heard.

    Attributes:
        objects: (arrival on the monotonic clock, stamp in nanoseconds, rows (n, 11)) of every result.
        lines: (arrival, name of the part, level, message, values) of diagnostics.
        others: messages by topic.
    """

    objects: list[tuple[float, int, Any]] = field(default_factory=list)
    lines: list[tuple[float, str, int, str, dict[str, str]]] = field(default_factory=list)
    others: dict[str, list[Any]] = field(default_factory=dict)


class Probe:
    """Listens to the node's results and diagnostics in a thread of its own.

    Args:
        domain: ROS domain.
    """

    def __init__(self, domain: int) -> None:
        self.seen = Seen()
        self.context = rclpy.Context()
        os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
        os.environ["FASTDDS_DEFAULT_PROFILES_FILE"] = str(PACKAGE / "config" / "fastdds.xml")
        rclpy.init(context=self.context, domain_id=domain)
        self.node = rclpy.create_node("probe", context=self.context)
        output = f"{NODE}/output"
        self.node.create_subscription(PointCloud2, f"{output}/objects", self._on_objects, 10)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        for kind, topic in (
            (MarkerArray, f"{output}/markers"),
            (Image, f"{output}/bev_image"),
            (OccupancyGrid, f"{output}/segmentation/vehicle"),
            (OccupancyGrid, f"{output}/segmentation/drivable_area"),
        ):
            self.listen(kind, topic)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)
        self._thread = threading.Thread(target=self._spin, daemon=True)

    def listen(self, kind: Any, topic: str) -> None:
        """Keep the messages of one more topic."""
        kept = self.seen.others.setdefault(topic, [])
        self.node.create_subscription(kind, topic, kept.append, 10)

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()
        self._thread.join(5.0)
        self.node.destroy_node()
        rclpy.try_shutdown(context=self.context)

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except ExternalShutdownException:
            return

    def _on_objects(self, message: PointCloud2) -> None:
        entry = (time.monotonic(), stamp_ns_of(message.header), object_rows_of(message))
        self.seen.objects.append(entry)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        now_s = time.monotonic()
        for status in message.status:
            level = status.level[0] if isinstance(status.level, bytes) else int(status.level)
            values = {pair.key: pair.value for pair in status.values}
            name = status.name.partition(": ")[2]
            self.seen.lines.append((now_s, name, level, status.message, values))

    def until(self, condition: Callable[[], Any], patience_s: float, what: str = "") -> Any:
        """Wait for a condition; its value.

        Raises:
            AssertionError: if it does not come true.
        """
        end_s = time.monotonic() + patience_s
        while time.monotonic() < end_s:
            value = condition()
            if value:
                return value
            time.sleep(0.01)
        last = {name: message for _, name, _, message, _ in self.seen.lines[-12:]}
        raise AssertionError(f"{what or 'the condition'} did not come true in {patience_s} s; last: {last}")

    def says(self, name: str, pattern: str, since_s: float = 0.0) -> float | None:
        """When a part's diagnostics first matched a pattern; None if they did not."""
        for at_s, part, _, message, _ in list(self.seen.lines):
            if at_s >= since_s and part == name and re.search(pattern, message):
                return at_s
        return None

    def call(self, kind: Any, service: str, request: Any, patience_s: float = 20.0) -> Any:
        """Call a service; its response."""
        client = self.node.create_client(kind, service)
        try:
            assert client.wait_for_service(patience_s), f"no service {service}"
            future = client.call_async(request)
            self.until(future.done, patience_s, service)
            return future.result()
        finally:
            self.node.destroy_client(client)

    def set_parameters(self, **values: Any) -> list[Any]:
        """Set parameters of the node; the results."""
        client = AsyncParameterClient(self.node, NODE)
        assert client.wait_for_services(20.0)
        parameters = [rclpy.Parameter(name, value=value) for name, value in values.items()]
        future = client.set_parameters(parameters)
        self.until(future.done, 20.0, "setting parameters")
        return list(future.result().results)
