"""The node as a process: results, life cycle, parameters, services, ending."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.srv import DescribeParameters
from std_srvs.srv import SetBool, Trigger

from bevperception.streaming.settings import spec_by_name
from tests.ros2.system import NODE, PACKAGE, NodeProcess, Probe, Replay, environment

OUTPUT = f"{NODE}/output"


def change_state(probe: Probe, transition: int) -> bool:
    request = ChangeState.Request()
    request.transition.id = transition
    return bool(probe.call(ChangeState, f"{NODE}/change_state", request).success)


def test_results_of_every_kind_come_for_every_set(
    running: NodeProcess, probe: Probe, domain: int, bag: Path
) -> None:
    with Replay(domain, bag, "--loops", "2", "--rate", "0.5") as replay:
        probe.until(lambda: len(probe.seen.objects) >= 8, 40, "eight results")
        replay.finish()
    stamps = [stamp for _, stamp, _ in probe.seen.objects]
    assert stamps[:4] == stamps[4:] == sorted(set(stamps))
    assert all(rows.shape == (40, 11) for _, _, rows in probe.seen.objects)
    for topic in ("markers", "bev_image", "segmentation/vehicle", "segmentation/drivable_area"):
        assert len(probe.seen.others[f"{OUTPUT}/{topic}"]) == 8, topic
    grid = probe.seen.others[f"{OUTPUT}/segmentation/vehicle"][0]
    assert (grid.header.frame_id, grid.info.width, grid.info.resolution) == ("base_link", 200, 0.5)
    assert (grid.info.origin.position.x, grid.info.origin.position.y) == (-50.0, -50.0)
    cells = np.frombuffer(memoryview(grid.data), dtype=np.int8)
    assert (cells.min() >= 0, cells.max() <= 100, cells.size) == (True, True, 40000)
    picture = probe.seen.others[f"{OUTPUT}/bev_image"][0]
    assert (picture.width, picture.height, picture.encoding, len(picture.data)) == (400, 400, "rgb8", 480000)
    first = probe.seen.others[f"{OUTPUT}/markers"][0].markers
    assert {marker.ns for marker in first[1:]} >= {"boxes", "headings", "labels"}
    assert first[0].action == 3  # DELETEALL
    assert probe.says("perception", "^running$")


def test_empty_results_are_published_too(running: NodeProcess, probe: Probe, domain: int, bag: Path) -> None:
    (verdict,) = probe.set_parameters(score_threshold=1.0)
    assert verdict.successful
    try:
        with Replay(domain, bag, "--rate", "0.5"):
            probe.until(lambda: len(probe.seen.objects) >= 4, 40, "four results")
        assert all(len(rows) == 0 for _, _, rows in probe.seen.objects)
    finally:
        probe.set_parameters(score_threshold=0.0)


def test_parameters_are_described_and_wrong_ones_refused_with_a_reason(
    running: NodeProcess, probe: Probe
) -> None:
    refused = probe.set_parameters(
        score_threshold=1.5, min_cameras="two", classes=["tree"], anchor="CAM_BACK", error_after_s=0.5
    )
    assert [verdict.successful for verdict in refused] == [False] * 5
    reasons = [verdict.reason for verdict in refused]
    assert "tree" in reasons[2]
    assert "cannot change while the node is configured" in reasons[3]
    assert "must not be below warn_after_s" in reasons[4]
    assert all(reasons)
    names = list(spec_by_name())
    request = DescribeParameters.Request(names=names)
    found = probe.call(DescribeParameters, f"{NODE}/describe_parameters", request).descriptors
    assert [d.description for d in found] == [spec.description for spec in spec_by_name().values()]


def test_services_reset_and_switch(running: NodeProcess, probe: Probe, domain: int, bag: Path) -> None:
    answer = probe.call(Trigger, f"{NODE}/reset_memory", Trigger.Request())
    assert (answer.success, answer.message) == (True, "the memory is empty")
    assert probe.call(SetBool, f"{NODE}/enable", SetBool.Request(data=False)).message == "inference is off"
    with Replay(domain, bag, "--loops", "0", "--rate", "2"):
        probe.until(lambda: probe.says("perception", "switched off"), 20)
        time.sleep(1.0)
        assert probe.seen.objects == []
        assert probe.call(SetBool, f"{NODE}/enable", SetBool.Request(data=True)).success
        probe.until(lambda: len(probe.seen.objects) > 2, 20, "results after switching on")


def test_life_cycle_pauses_frees_and_loads_again(
    running: NodeProcess, probe: Probe, domain: int, bag: Path
) -> None:
    with Replay(domain, bag, "--loops", "0", "--rate", "2"):
        probe.until(lambda: probe.seen.objects, 20, "results")
        assert change_state(probe, Transition.TRANSITION_DEACTIVATE)
        probe.until(lambda: probe.says("perception", "configured, not active"), 10)
        count = len(probe.seen.objects)
        time.sleep(0.7)
        assert len(probe.seen.objects) == count
        assert change_state(probe, Transition.TRANSITION_CLEANUP)
        probe.until(lambda: probe.says("perception", "^not configured$"), 10)
        (bad,) = probe.set_parameters(weights="/nowhere")
        assert bad.successful
        assert not change_state(probe, Transition.TRANSITION_CONFIGURE)
        probe.until(lambda: probe.says("perception", "configuring failed: no .* /nowhere"), 10)
        good = str(running.weights)
        (again,) = probe.set_parameters(weights=good)
        assert again.successful
        assert change_state(probe, Transition.TRANSITION_CONFIGURE)
        assert change_state(probe, Transition.TRANSITION_ACTIVATE)
        probe.until(lambda: len(probe.seen.objects) > count, 20, "results again")


def test_sigint_ends_the_node_cleanly_and_a_new_one_takes_over(
    domain: int, weights: Path, bag: Path, tmp_path: Path
) -> None:
    other = domain + 100
    with Probe(other) as probe, Replay(other, bag, "--loops", "0", "--rate", "2"):
        with NodeProcess(other, weights, bag, tmp_path) as node:
            probe.until(lambda: len(probe.seen.objects) > 2, 20, "results")
            code, spent_s = node.stop(signal.SIGINT)
            assert (code, spent_s < 2.5) == (0, True), node.text
            assert "Traceback" not in node.text
        (tmp_path / "killed").mkdir()
        with NodeProcess(other, weights, bag, tmp_path / "killed") as node:
            count = len(probe.seen.objects)
            probe.until(lambda: len(probe.seen.objects) > count + 2, 20, "results of a second node")
            node.stop(signal.SIGKILL)
        (tmp_path / "third").mkdir()
        with NodeProcess(other, weights, bag, tmp_path / "third"):
            count = len(probe.seen.objects)
            probe.until(lambda: len(probe.seen.objects) > count + 2, 20, "results after a kill")


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("weights:=/nowhere", "no .*/nowhere"),
        ("min_cameras:=7", "min_cameras is 7, the model has 6 cameras"),
        ("image_transport:=theora", "image_transport must be one of compressed, raw"),
    ],
)
def test_wrong_parameters_at_the_start_end_with_a_message(
    weights: Path, domain: int, parameter: str, message: str
) -> None:
    command = [sys.executable, "-m", "bev_perception.main", "--ros-args", "-p", f"weights:={weights}"]
    done = subprocess.run(
        [*command, "-p", parameter], env=environment(domain + 100), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(f"error: .*{message}", done.stderr), done.stderr


def test_the_package_lists_what_it_ships() -> None:
    setup = (PACKAGE / "setup.py").read_text()
    for path in (PACKAGE / "config").iterdir():
        assert f"config/{path.name}" in setup


def test_the_node_imports_no_devkit() -> None:
    """A vehicle has no data set."""
    program = "import sys, bev_perception.node; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(0), check=True
    )
    assert "bev_perception" in done.stdout
    assert "nuscenes" not in done.stdout.split()
