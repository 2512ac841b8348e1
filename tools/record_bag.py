"""Record topics into a rosbag2 until interrupted: tools/record_bag.py --out BAG TOPIC ..."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from bevperception.errors import ConfigError, importing, run_program


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The program's options."""
    parser = argparse.ArgumentParser(
        description="Record topics as they come, until SIGINT. Topics may appear later; a name that ends "
        "in / takes all topics below it."
    )
    parser.add_argument("topics", nargs="+", help="names")
    parser.add_argument("--out", required=True, help="folder of the bag, which must not exist")
    parser.add_argument("--storage", default="mcap", help="mcap (default) or sqlite3")
    parser.add_argument("--overwrite", action="store_true", help="replace a bag of that name")
    return parser.parse_args(argv)


class Recorder:
    """Subscribes to topics as they appear and writes what comes.

    Args:
        node: an rclpy node.
        writer: an open bag.
        wanted: topics, or beginnings of topics that end in /.
    """

    def __init__(self, node: Any, writer: Any, wanted: list[str]) -> None:
        from bevperception.bags.files import typestore

        self._node, self._writer, self._wanted = node, writer, wanted
        self._store = typestore()
        self._connections: dict[str, Any] = {}
        self.counts: dict[str, int] = {}
        node.create_timer(0.2, self.look)

    def look(self) -> None:
        """Subscribe to wanted topics that have appeared."""
        for topic, kinds in self._node.get_topic_names_and_types():
            known = topic in self.counts
            if not known and any(
                topic == w or (w.endswith("/") and topic.startswith(w)) for w in self._wanted
            ):
                self._subscribe(topic, kinds[0])

    def _subscribe(self, topic: str, kind: str) -> None:
        package, name = kind.split("/")[0], kind.split("/")[-1]
        self.counts[topic] = 0
        try:
            message_type = getattr(importlib.import_module(f"{package}.msg"), name)
        except ImportError:
            print(f"{topic} is left out: {package} is not installed", flush=True)
            return
        if f"{package}/msg/{name}" not in self._store.types:
            self._register(package)
        self._connections[topic] = self._writer.add_connection(topic, kind, typestore=self._store)
        self._node.create_subscription(
            message_type, topic, lambda data: self._write(topic, data), 50, raw=True
        )
        print(f"recording {topic}", flush=True)

    def _register(self, package: str) -> None:
        """Teach rosbags the messages of a package that it does not know, from the package's own files."""
        from rosbags.typesys import get_types_from_msg

        prefixes = [*os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep), sys.prefix]
        folders = [Path(prefix) / "share" / package / "msg" for prefix in prefixes if prefix]
        folder = next((folder for folder in folders if folder.is_dir()), folders[-1])
        for path in sorted(folder.glob("*.msg")):
            self._store.register(get_types_from_msg(path.read_text(), f"{package}/msg/{path.stem}"))

    def _write(self, topic: str, data: bytes) -> None:
        self._writer.write(self._connections[topic], time.time_ns(), data)
        self.counts[topic] += 1


def main() -> int | None:
    """Record until interrupted, say what was recorded."""
    options = parse()
    with importing():
        from bevperception.bags.files import open_writer
    try:
        with importing():
            import rclpy
            from rclpy.executors import ExternalShutdownException
    except ImportError as error:
        raise ConfigError("recording needs rclpy: source a ROS 2 installation, or make ros") from error
    with open_writer(Path(options.out), options.storage, options.overwrite) as writer:
        rclpy.init()
        node = rclpy.create_node("record_bag")
        recorder = Recorder(node, writer, options.topics)
        try:
            rclpy.spin(node)
        except (KeyboardInterrupt, ExternalShutdownException):
            print("interrupted: closing the bag", flush=True)
        finally:
            node.destroy_node()
            rclpy.try_shutdown()
    for topic, count in sorted(recorder.counts.items()):
        print(f"{count:7d}  {topic}")
    return None


if __name__ == "__main__":
    run_program(main)
