"""Everything that goes wrong on a vehicle, with real processes: perception goes on, and says what is wrong.

The scene is played at 1.25 times its speed (sets at 2.5 Hz) with stamps that go on over the loops. Times in
faults are the bag's: the fault begins 3 s after the first message and ends at 7 s, 3.2 s of wall time later.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ros2.system import NodeProcess, Probe, Replay

RATE = 1.25
BEGIN_S, END_S = 3.0, 7.0
"""Of every fault, in the bag's time."""
PERIOD_S = 0.5
"""Between sets, in the bag's time."""
LAST_S = 10.0


@dataclass(frozen=True)
class Case:
    """A fault and what is to come of it.

    Attributes:
        fault: KIND:TARGET and perhaps a value.
        part: of the diagnostics that tells.
        words: pattern that it matches during the fault.
        share: of the sets that have results during the fault, at least.
        usable: pattern of "cameras used" that shows during the fault; '' for any.
        stops: whether there must be no result during (the later half of) the fault.
    """

    fault: str
    part: str
    words: str
    share: float = 0.8
    usable: str = ""
    stops: bool = False


CAMERA = "camera CAM_BACK"
CASES = {
    "one camera lost": Case("lost:CAM_BACK", CAMERA, "stale: no image for", usable="5 of 6"),
    "the anchor lost": Case("lost:CAM_FRONT", "camera CAM_FRONT", "stale: no image for", usable="5 of 6"),
    "all cameras lost": Case("lost:cameras", "perception", "no result for", 0.0, stops=True),
    "sweeps lost": Case("lost:/sensors/sweep", "synchronisation", "CAM_FRONT opens sets", 0.4),
    "odometry lost": Case("lost:odometry", "ego motion", "ego motion is lost.*stands alone"),
    "frozen": Case("frozen:CAM_BACK", CAMERA, "masked: frozen: the same image", usable="5 of 6"),
    "black": Case("black:CAM_BACK", CAMERA, "masked: black", usable="5 of 6"),
    "all black": Case("black:cameras", "perception", "only 0 of 6 cameras usable", 0.0, stops=True),
    "truncated": Case("truncated:CAM_BACK", CAMERA, "masked: .*truncated", usable="5 of 6"),
    "wrong size": Case("wrong_size:CAM_BACK", CAMERA, "masked: .*80x45 pixels where", usable="5 of 6"),
    "not an image": Case("wrong_encoding:CAM_BACK", CAMERA, "masked: .*cannot be decoded", usable="5 of 6"),
    "stamps far ahead": Case("ahead:CAM_BACK", CAMERA, "waiting|active", usable="5 of 6"),
    "stamps far back": Case("back:CAM_BACK", CAMERA, "waiting|active", usable="5 of 6"),
    "stamps out of order": Case("swap:CAM_BACK:0.7", CAMERA, "active", 0.6),
    "late images": Case("delay:CAM_BACK:0.6", CAMERA, "active|stale", usable="5 of 6"),
    "30 % of all messages lost": Case("loss:all:0.3", "perception", ".*", 0.4),
    "a burst of 50 frames": Case("burst:cameras:50", "perception", ".*", 0.3),
    "odometry of the past": Case("back:odometry", "ego motion", "ego motion is lost"),
}


def spec(case: Case) -> str:
    kind, target, *value = case.fault.split(":")
    return ":".join([kind, target, str(BEGIN_S), str(END_S), *value])


class Timeline:
    """Wall times of the bag's times, from the first result on."""

    def __init__(self, probe: Probe, replay: Replay) -> None:
        self.probe = probe
        at_s, stamp_ns, _ = probe.until(lambda: probe.seen.objects, 30, f"the first result ({replay.text})")[
            0
        ]
        self._first = (at_s, stamp_ns)

    def wall_s(self, bag_s: float) -> float:
        return self._first[0] + bag_s / RATE

    def sleep_until(self, bag_s: float) -> None:
        time.sleep(max(0.0, self.wall_s(bag_s) - time.monotonic()))

    def results(self, begin_s: float, end_s: float) -> int:
        """Results with stamps between two of the bag's times."""
        low, high = (self._first[1] + round(s * 1e9) for s in (begin_s, end_s))
        return sum(low <= stamp < high for _, stamp, _ in self.probe.seen.objects)

    def used(self, begin_s: float, end_s: float) -> list[str]:
        """What the diagnostics said about used cameras between two of the bag's times."""
        low, high = self.wall_s(begin_s), self.wall_s(end_s)
        return [
            values["cameras used"]
            for at_s, part, _, _, values in list(self.probe.seen.lines)
            if part == "perception" and low <= at_s < high and "cameras used" in values
        ]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_perception_goes_on_and_says_what_is_wrong(
    case: Case, running: NodeProcess, probe: Probe, domain: int, bag: Path
) -> None:
    with Replay(
        domain, bag, "--loops", "0", "--rate", str(RATE), "--continuous", "--fault", spec(case)
    ) as replay:
        timeline = Timeline(probe, replay)
        timeline.sleep_until(LAST_S)
        replay.stop()
    assert running.popen.poll() is None, running.text
    assert "Traceback" not in running.text
    assert "unexpectedly" not in running.text
    said = probe.says(case.part, case.words, timeline.wall_s(BEGIN_S))
    assert said is not None, f"{case.part} never said {case.words!r}"
    assert said < timeline.wall_s(END_S) + 0.5
    # Two periods are given for masking, and two for coming back.
    inner = (BEGIN_S + 2 * PERIOD_S, END_S)
    sets = (inner[1] - inner[0]) / PERIOD_S
    assert timeline.results(*inner) >= case.share * sets
    if case.stops:
        assert timeline.results(*inner) == 0
    if case.usable:
        # The first result, from which wall times are counted, was late itself.
        used = timeline.used(BEGIN_S + 2 * PERIOD_S + 0.4, END_S - 1.0)
        assert used
        assert set(used) == {case.usable}
    after = (END_S + 2 * PERIOD_S, LAST_S - 2 * PERIOD_S)
    assert timeline.results(*after) >= 0.75 * (after[1] - after[0]) / PERIOD_S
    assert timeline.used(END_S + 2 * PERIOD_S + 0.4, LAST_S)[-1] == "6 of 6"


def test_camera_info_that_comes_late_is_waited_for(
    domain: int, weights: Path, bag: Path, tmp_path: Path
) -> None:
    own = domain + 90
    with Probe(own) as probe, NodeProcess(own, weights, bag, tmp_path):
        fault = "lost:info/CAM_BACK:0:4"
        arguments = ("--loops", "0", "--rate", str(RATE), "--continuous", "--fault", fault)
        with Replay(own, bag, *arguments) as replay:
            timeline = Timeline(probe, replay)
            probe.until(lambda: probe.says(CAMERA, "waiting: waiting for camera info"), 10)
            timeline.sleep_until(7.0)
        assert set(timeline.used(0.8, 3.0)) == {"5 of 6"}
        assert timeline.used(5.5, 7.0)[-1] == "6 of 6"


def test_a_bag_that_loops_jumps_back_and_goes_on(
    running: NodeProcess, probe: Probe, domain: int, bag: Path
) -> None:
    with Replay(domain, bag, "--loops", "4", "--rate", "1") as replay:
        replay.finish()
        time.sleep(0.5)
    stamps = [stamp for _, stamp, _ in probe.seen.objects]
    assert len(stamps) == 16
    assert len(set(stamps)) == 4
    resets = [values["memory resets"] for _, part, _, _, values in probe.seen.lines if part == "perception"]
    assert "the clock jumped back" in resets[-1]


def test_raw_images_and_their_faults(domain: int, weights: Path, raw_bag: Path, tmp_path: Path) -> None:
    own = domain + 91
    with Probe(own) as probe, NodeProcess(own, weights, raw_bag, tmp_path, raw=True) as node:
        for kind, words in (
            ("wrong_encoding", "masked: encoding 'yuv422' is not understood"),
            ("truncated", "masked: the image is truncated"),
            ("wrong_size", "masked: the image has 160x45 pixels where"),
            ("black", "masked: black"),
        ):
            fault = f"{kind}:CAM_BACK:1:4"
            arguments = ("--loops", "0", "--rate", str(RATE), "--continuous", "--fault", fault)
            begin_s, count = time.monotonic(), len(probe.seen.objects)
            with Replay(own, raw_bag, *arguments):
                probe.until(lambda: probe.says(CAMERA, words, begin_s), 15, words)  # noqa: B023
                spoiled_s = time.monotonic()
                probe.until(lambda: probe.says(CAMERA, "^active$", spoiled_s), 15, "active again")  # noqa: B023
            assert len(probe.seen.objects) > count + 2
        assert "unexpectedly" not in node.text
