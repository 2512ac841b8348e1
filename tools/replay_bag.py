"""Play a rosbag2 through ROS 2: tools/replay_bag.py BAG --rate 1 --loops 0 --fault lost:CAM_FRONT:2:5."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bevperception.errors import BevError, ConfigError, importing, run_program

with importing():
    from bevperception.ranges import Range, add_number

_SETTLING_S = 0.5
"""Between the last match of publisher and subscriber and the first message."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The program's options."""
    from bevperception.bags import faults

    parser = argparse.ArgumentParser(
        description="Publish the messages of a bag at their times, with /clock.",
        epilog=faults.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bag", help="folder of a rosbag2 (mcap or sqlite3)")
    add_number(
        parser,
        "--rate",
        float,
        Range(0.0, 1000.0),
        default=1.0,
        help="2 plays twice as fast; 0 as fast as possible",
    )
    add_number(parser, "--loops", int, Range(0, 1_000_000), default=1, help="how often; 0 for ever")
    parser.add_argument("--continuous", action="store_true", help="stamps go on from loop to loop")
    add_number(
        parser, "--start", float, Range(0.0, 1e9), default=0.0, help="begin so many seconds into the bag"
    )
    parser.add_argument("--topics", nargs="*", default=[], help="only these topics")
    parser.add_argument("--fault", action="append", default=[], help="KIND:TARGET:FROM:TO[:VALUE], see below")
    add_number(parser, "--seed", int, Range(0, 2**63 - 1), default=0, help="of random faults")
    add_number(
        parser, "--clock-hz", float, Range(0.0, 10_000.0), default=50.0, help="rate of /clock; 0 for none"
    )
    parser.add_argument(
        "--remap", action="append", default=[], metavar="FROM:=TO", help="publish a topic under another name"
    )
    parser.add_argument("--reliable", action="store_true", help="images reliably, not at best effort")
    add_number(
        parser,
        "--wait-for",
        float,
        Range(0.0, 86_400.0),
        default=0.0,
        help="wait so long for a subscriber of every image topic",
    )
    options = parser.parse_args(argv)
    for remap in options.remap:
        if ":=" not in remap:
            raise ConfigError(f"--remap is written FROM:=TO, got {remap!r}")
    return options


class Replayer:
    """Publishes what a playback yields.

    Args:
        node: an rclpy node.
        playback: the messages.
        options: of the program.
    """

    def __init__(self, node: Any, playback: Any, options: argparse.Namespace) -> None:
        self._node, self._playback, self._options = node, playback, options
        self._remaps = dict(remap.split(":=", 1) for remap in options.remap)
        self._publishers: dict[str, Any] = {}
        self._clock: Any = None
        self.sent: Counter[str] = Counter()
        self.worst_lag_s = 0.0

    def prepare(self, kinds: dict[str, str]) -> None:
        """Make all publishers, so that subscribers find them before the first message."""
        for topic, kind in kinds.items():
            self._publisher(topic, kind)
        if self._options.clock_hz > 0:
            clock = importlib.import_module("rosgraph_msgs.msg").Clock
            self._clock = self._node.create_publisher(clock, "/clock", 10)

    def wait(self, seconds: float) -> None:
        """Wait until every image topic has a subscriber, and a moment for the subscribers to know it too.

        Matching is seen from the publisher's side; a message sent before the other side has matched is lost.

        Raises:
            BevError: if one has none after so long.
        """
        end_s = time.monotonic() + seconds
        lacking = [t for t, p in self._publishers.items() if "/image" in t and p is not None]
        while lacking and time.monotonic() < end_s:
            lacking = [t for t in lacking if self._publishers[t].get_subscription_count() == 0]
            time.sleep(0.02)
        if lacking and seconds > 0:
            raise BevError(f"after {seconds:g} s nobody subscribes to {', '.join(lacking)}")
        if seconds > 0:
            time.sleep(_SETTLING_S)

    def play(self) -> None:
        """Send everything."""
        begin_s, rate = time.monotonic(), self._options.rate
        for message in self._playback:
            if rate > 0:
                self._sleep_until(begin_s, message.time_s)
                lag_s = time.monotonic() - begin_s - message.time_s / rate
                self.worst_lag_s = max(self.worst_lag_s, lag_s)
            publisher = self._publisher(message.topic, message.kind)
            if publisher is not None:
                publisher.publish(message.data)
                self.sent[message.topic] += 1

    def _sleep_until(self, begin_s: float, time_s: float) -> None:
        """Sleep, and let /clock run meanwhile."""
        rate = self._options.rate
        while True:
            now_s = (time.monotonic() - begin_s) * rate
            if self._clock is not None:
                self._tick(min(now_s, time_s))
            left_s = (time_s - now_s) / rate
            if left_s <= 0:
                return
            step_s = 1 / self._options.clock_hz if self._clock is not None else 1.0
            time.sleep(min(left_s, step_s))

    def _tick(self, time_s: float) -> None:
        now_ns = self._playback.clock_ns(time_s)
        message = importlib.import_module("rosgraph_msgs.msg").Clock()
        message.clock.sec, message.clock.nanosec = now_ns // 10**9, now_ns % 10**9
        self._clock.publish(message)

    def _publisher(self, topic: str, kind: str) -> Any:
        if topic not in self._publishers:
            self._publishers[topic] = self._make(topic, kind)
        return self._publishers[topic]

    def _make(self, topic: str, kind: str) -> Any:
        from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

        package, name = kind.split("/")[0], kind.split("/")[-1]
        try:
            message_type = getattr(importlib.import_module(f"{package}.msg"), name)
        except ImportError:
            print(f"{topic} is left out: {package} is not installed", file=sys.stderr)
            return None
        qos = QoSProfile(depth=100)
        if topic == "/tf_static":
            qos = QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        elif "/image" in topic:
            best_effort = ReliabilityPolicy.BEST_EFFORT
            wanted = ReliabilityPolicy.RELIABLE if self._options.reliable else best_effort
            qos = QoSProfile(depth=5, reliability=wanted)
        return self._node.create_publisher(message_type, self._remaps.get(topic, topic), qos)


def main() -> int | None:
    """Open the bag, play it, say what was sent."""
    options = parse()
    with importing():
        from bevperception.bags.faults import Fault
        from bevperception.bags.files import open_reader
        from bevperception.bags.playback import Playback, PlayOptions
    try:
        with importing():
            import rclpy
    except ImportError as error:
        raise ConfigError("replaying needs rclpy: source a ROS 2 installation, or make ros") from error
    what = PlayOptions(
        loops=options.loops,
        continuous=options.continuous,
        topics=tuple(options.topics),
        faults=[Fault.parse(text) for text in options.fault],
        seed=options.seed,
        start_s=options.start,
    )
    with open_reader(Path(options.bag)) as reader:
        playback = Playback(reader, what)
        kinds = {c.topic: c.msgtype for c in reader.connections if not what.topics or c.topic in what.topics}
    rclpy.init()
    node = rclpy.create_node("replay_bag")
    replayer = Replayer(node, playback, options)
    try:
        replayer.prepare(kinds)
        replayer.wait(options.wait_for)
        replayer.play()
        time.sleep(0.3)  # for the last messages to leave
    finally:
        node.destroy_node()
        rclpy.try_shutdown()
    summary = {
        "sent": dict(replayer.sent),
        "worst_lag_s": replayer.worst_lag_s,
        "faults": dict(playback.injector.done),
    }
    print(json.dumps(summary), flush=True)
    return None


if __name__ == "__main__":
    run_program(main)
