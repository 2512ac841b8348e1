"""What comes over the topics equals tools/predict.py and offline metrics; TF serves instead of files."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from bevperception.bags.evaluation import evaluate_recording, reference_stamp_ns
from bevperception.bags.processes import background, tool_command
from bevperception.bags.recording import read_recording
from bevperception.config import ExperimentConfig
from bevperception.data.nuscenes import NuScenesReader
from bevperception.evaluation.submission import read_submission
from bevperception.visualization.samples import boxes_of_submission
from tests.bags.differences import largest_box_difference
from tests.fixtures.tiny_nuscenes import VAL_SPLIT
from tests.ros2.system import NODE, NodeProcess, Probe, Replay, environment
from tests.streaming.helpers import micro_config


@pytest.fixture(scope="module")
def recording(running: NodeProcess, domain: int, bag: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bag of what the node published about the scene, each set given its time."""
    folder = tmp_path_factory.mktemp("recording")
    path = folder / "bag"
    command = tool_command("record_bag.py", "--out", str(path), f"{NODE}/output/", "/diagnostics")
    with background(command, domain, folder / "log", f"recording {NODE}/output/objects"):
        with Replay(domain, bag, "--rate", "0.7") as replay:
            replay.finish()
        subprocess.run(["sleep", "1.5"], check=True)
    return path


def run_tool(*command: str, domain: int) -> None:
    done = subprocess.run(tool_command(*command), env=environment(domain), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def offline(config: ExperimentConfig) -> list[str]:
    data = config.data
    return [
        f"--data.root={data.root}",
        f"--data.version={data.version}",
        f"--data.val_split={data.val_split}",
    ]


def test_boxes_and_metrics_equal_those_of_the_offline_tools(
    recording: Path, weights: Path, domain: int, tiny_nuscenes: Path, tmp_path: Path
) -> None:
    config = micro_config(tiny_nuscenes)
    data = offline(config)
    predict = ("--weights", str(weights), "--split", VAL_SPLIT, "--out", str(tmp_path / "predict"))
    run_tool("predict.py", *predict, *data, domain=domain)
    run_tool(
        "evaluate.py", "--weights", str(weights), "--out", str(tmp_path / "offline"), *data, domain=domain
    )
    predicted = read_submission(tmp_path / "predict" / "results_nusc.json")
    reader = NuScenesReader(config.data)
    published = read_recording(recording)
    assert len(published.objects) == len(predicted) == 4
    for token, entries in predicted.items():
        wanted = boxes_of_submission(entries, reader.sample(token).ego_to_global, "predict")
        found = published.objects[reference_stamp_ns(reader, token)]
        assert len(found) == 40
        assert largest_box_difference(found, wanted) < 1e-3
        assert set(published.segmentation[reference_stamp_ns(reader, token)]) == {"drivable_area", "vehicle"}
    online = evaluate_recording(published, config, reader, VAL_SPLIT, tmp_path / "online").as_dict()
    other = json.loads((tmp_path / "offline" / "metrics.json").read_text())
    for name, value in other["detection"]["overall"].items():
        assert online["detection"]["overall"][name] == pytest.approx(value, abs=0.01), name
    for name, value in other["segmentation"]["iou"].items():
        assert online["segmentation"]["iou"][name] == pytest.approx(value, abs=0.01), name


def test_the_comparison_of_boxes_sees_small_differences(recording: Path) -> None:
    boxes = next(iter(read_recording(recording).objects.values()))
    assert largest_box_difference(boxes, boxes[torch.randperm(len(boxes))]) == 0.0
    assert largest_box_difference(boxes, boxes[1:]) == float("inf")
    moved = boxes[:]
    moved.values = moved.values.clone()
    moved.values[3, 1] += 0.01
    assert largest_box_difference(boxes, moved) == pytest.approx(0.01, rel=1e-3)


def test_every_p95_of_the_latency_is_read_back(recording: Path) -> None:
    published = read_recording(recording)
    newest = published.diagnostics["timing"]["latency p95"]
    assert published.latency_p95_ms[-1] == float(newest.removesuffix(" ms"))
    assert min(published.latency_p95_ms) > 0


def test_detection_arrays_hold_the_same_boxes(
    running: NodeProcess, probe: Probe, domain: int, bag: Path
) -> None:
    vision_msgs = pytest.importorskip("vision_msgs.msg", reason="vision_msgs is not built")
    topic = f"{NODE}/output/detections"
    probe.listen(vision_msgs.Detection3DArray, topic)
    with Replay(domain, bag, "--rate", "0.5") as replay:
        replay.finish()
    probe.until(
        lambda: len(probe.seen.others[topic]) == 4 and len(probe.seen.objects) == 4, 10, "four results"
    )
    for (_, _, rows), message in zip(probe.seen.objects, probe.seen.others[topic], strict=True):
        assert len(message.detections) == len(rows)
        for row, one in zip(rows, message.detections, strict=True):
            place, size = one.bbox.center.position, one.bbox.size
            values = [place.x, place.y, place.z, size.x, size.y, size.z]
            assert values == pytest.approx(row[:6].tolist(), abs=1e-5)
            assert one.results[0].hypothesis.score == pytest.approx(float(row[9]), abs=1e-6)


def test_tf_serves_instead_of_a_calibration_file_and_odometry(
    domain: int, weights: Path, bag: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tf2_msgs.msg", reason="tf2_msgs is not built")
    own = domain + 95
    parameters = {"calibration_file": "''", "motion_source": "tf"}
    with Probe(own) as probe, NodeProcess(own, weights, bag, tmp_path, **parameters):
        probe.until(lambda: probe.says("camera CAM_BACK", "waiting: waiting for"), 10)
        with Replay(own, bag, "--loops", "3", "--rate", "0.5", "--continuous"):
            probe.until(lambda: len(probe.seen.objects) >= 6, 40, "results")
            last = probe.says("perception", "^running$")
        assert last is not None
