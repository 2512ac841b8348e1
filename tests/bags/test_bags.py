"""Bags of scenes, faults and recordings, without ROS; skipped where rosbags is not installed."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("rosbags")

from bevperception.bags.faults import Fault, FaultInjector, Played, shifted
from bevperception.bags.files import open_reader, open_writer, typestore
from bevperception.bags.messages import Messages, object_rows_of, stamp_ns_of
from bevperception.bags.playback import Playback, PlayOptions
from bevperception.bags.scene import TRUTH_TOPIC, BagOptions, write_scene_bag
from bevperception.data.nuscenes import NuScenesReader
from bevperception.errors import ConfigError, DataError
from bevperception.streaming.conversions import boxes_of_rows
from bevperception.streaming.rig import read_extrinsics
from tests.fixtures.tiny_nuscenes import IMAGE_SIZE, SCENES, camera_mount, ego_pose
from tests.streaming.helpers import micro_config

IMAGE = "sensor_msgs/msg/CompressedImage"


@pytest.fixture(scope="module")
def reader(tiny_nuscenes: Path) -> NuScenesReader:
    return NuScenesReader(micro_config(tiny_nuscenes).data)


@pytest.fixture(scope="module")
def bag(reader: NuScenesReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bags") / "scene"
    write_scene_bag(reader, reader.scene("scene-9003"), path, BagOptions())
    return path


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
@pytest.mark.parametrize("raw", [False, True])
def test_a_scene_is_in_the_bag(reader: NuScenesReader, tmp_path: Path, storage: str, raw: bool) -> None:
    path = tmp_path / "bag"
    counts = write_scene_bag(reader, reader.scene("scene-9003"), path, BagOptions(storage, raw=raw))
    assert counts["/odometry"] == 28
    scene, poses, images, truths = SCENES[2], 0, 0, 0
    with open_reader(path) as opened:
        for connection, time_ns, data in opened.messages():
            message = opened.deserialize(data, connection.msgtype)
            if connection.topic == "/odometry":
                since_s = (stamp_ns_of(message.header) - 1_600_000_120 * 10**9) * 1e-9
                place, turn = ego_pose(scene, since_s)
                p, q = message.pose.pose.position, message.pose.pose.orientation
                np.testing.assert_allclose([p.x, p.y, p.z], place, atol=1e-6)
                np.testing.assert_allclose([q.w, q.x, q.y, q.z], turn.elements, atol=1e-9)
                poses += 1
            elif connection.topic.startswith("/sensors/cam_front/image"):
                assert time_ns == stamp_ns_of(message.header)
                if raw:
                    assert (message.width, message.height, message.encoding) == (*IMAGE_SIZE, "bgr8")
                else:
                    assert cv2.imdecode(message.data, 1).shape == (IMAGE_SIZE[1], IMAGE_SIZE[0], 3)
                images += 1
            elif connection.topic == "/sensors/cam_back/camera_info":
                np.testing.assert_allclose(message.k.reshape(3, 3), camera_mount("CAM_BACK")[2])
            elif connection.topic == TRUTH_TOPIC:
                boxes = boxes_of_rows(object_rows_of(message))
                token = reader.scene("scene-9003").sample_tokens[truths]
                wanted = reader.annotations(reader.sample(token)).boxes
                np.testing.assert_allclose(boxes.values, wanted.values, atol=1e-4)
                truths += 1
    assert (poses, images, truths) == (28, 4, 4)
    mounts = read_extrinsics(path / "calibration.yaml")
    place, turn, _ = camera_mount("CAM_BACK_LEFT")
    np.testing.assert_allclose(mounts.camera_to_base["CAM_BACK_LEFT"][:3, 3], place)
    np.testing.assert_allclose(
        mounts.camera_to_base["CAM_BACK_LEFT"][:3, :3], turn.rotation_matrix, atol=1e-9
    )


def test_a_bag_is_never_half_there_nor_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "bag"
    with pytest.raises(RuntimeError, match="half way"), open_writer(path, "mcap"):
        raise RuntimeError("half way")
    assert list(tmp_path.iterdir()) == []
    path.mkdir()
    with pytest.raises(ConfigError, match="exists already"), open_writer(path, "mcap", overwrite=True):
        pass
    with pytest.raises(ConfigError, match="storage must be one of"), open_writer(tmp_path / "b", "zip"):
        pass
    with pytest.raises(DataError, match="there is no bag"), open_reader(tmp_path / "nowhere"):
        pass


def played(bag: Path, *faults: str, **options: object) -> list[Played]:
    with open_reader(bag) as opened:
        return list(Playback(opened, PlayOptions(faults=[Fault.parse(f) for f in faults], **options)))  # type: ignore[arg-type]


def stamps(messages: list[Played], word: str) -> list[float]:
    """Stamps of the topics that a word is in, seconds since the scene began."""
    store = typestore()
    found = []
    for one in messages:
        if word in one.topic:
            header = store.deserialize_cdr(one.data, one.kind).header
            found.append(round(stamp_ns_of(header) * 1e-9 - 1_600_000_120, 4))
    return found


def test_playing_keeps_order_and_goes_on_over_loops(bag: Path) -> None:
    once = played(bag)
    times = [one.time_s for one in once]
    assert times == sorted(times)
    again = played(bag, loops=3, continuous=True)
    front = stamps(again, "cam_front/image")
    assert len(front) == 12
    back = [message.time_s for message in again if "cam_back/image" in message.topic]
    for times_s in (front, back):
        np.testing.assert_allclose(np.diff(times_s), 0.5, atol=1e-3)  # from loop to loop, too
    jumping = stamps(played(bag, loops=2), "cam_front/image")
    assert jumping[4:] == jumping[:4]


@pytest.mark.parametrize(
    ("fault", "wanted"),
    [
        ("lost:CAM_FRONT:0.3:1.2", [0, 1.5]),
        ("lost:cameras:0:", []),
        ("lost:info:0:", [0, 0.5, 1.0, 1.5]),
        ("ahead:CAM_FRONT:0.3:1.2:60", [0, 60.5, 61.0, 1.5]),
        ("back:CAM_FRONT:0.3:1.2:60", [0, -59.5, -59.0, 1.5]),
        ("swap:CAM_FRONT:0::0.7", [0, -0.2, 1.0, 0.8]),
        ("delay:CAM_FRONT:0.3:0.7:1.0", [0, 1.0, 0.5, 1.5]),
    ],
)
def test_faults_do_what_they_say(bag: Path, fault: str, wanted: list[float]) -> None:
    exposure_s = -0.04
    found = [round(s - exposure_s, 4) for s in stamps(played(bag, fault), "cam_front/image")]
    assert found == wanted


def test_random_losses_are_about_as_many_as_asked_for_and_repeatable(bag: Path) -> None:
    whole, some = played(bag, loops=10), played(bag, "loss:all:0::0.3", loops=10)
    assert 0.6 < len(some) / len(whole) < 0.85  # /tf is spared
    assert [m.topic for m in some] == [m.topic for m in played(bag, "loss:all:0::0.3", loops=10)]


def test_bursts_come_a_millisecond_apart(bag: Path) -> None:
    found = stamps(played(bag, "burst:CAM_FRONT:0:0.3:50"), "cam_front/image")
    assert len(found) == 53
    np.testing.assert_allclose(np.diff(found[:50]), 1e-3, atol=1e-4)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("kind", ["black", "truncated", "wrong_size", "wrong_encoding", "frozen"])
def test_spoiled_images(raw: bool, kind: str) -> None:
    make = Messages()
    pixels = np.random.default_rng(0).integers(0, 255, (90, 160, 3), dtype=np.uint8)
    data = cv2.imencode(".jpg", pixels)[1].tobytes()
    topic = "/sensors/cam_back/image"
    injector = FaultInjector([Fault.parse(f"{kind}:CAM_BACK:0:")])
    seen = []
    for step in range(2):
        shift = np.roll(pixels, step, axis=0)
        message = (
            make.image(step * 10**9, "c", shift) if raw else make.compressed(step * 10**9, "c", data, "jpeg")
        )
        msgtype = "sensor_msgs/msg/Image" if raw else IMAGE
        cdr = bytes(make.store.serialize_cdr(message, msgtype))
        (sent,) = injector.apply(Played(float(step), topic, msgtype, cdr))
        seen.append(make.store.deserialize_cdr(sent.data, msgtype))
    assert [stamp_ns_of(one.header) for one in seen] == [0, 10**9]
    last = seen[-1]
    decoded = None if raw else cv2.imdecode(last.data, 1)
    if kind == "frozen":
        assert np.array_equal(last.data, seen[0].data)
    elif kind == "black":
        assert (last.data if raw else decoded).max() < 5
    elif kind == "truncated":
        assert len(last.data) == (pixels.size if raw else len(data)) // 2
    elif kind == "wrong_size":
        assert ((last.height, last.width) if raw else decoded.shape[:2]) == ((45, 160) if raw else (45, 80))
    else:
        assert last.encoding == "yuv422" if raw else decoded is None
    assert injector.done == {kind: 2}


def test_faults_that_are_not_written_right_are_refused() -> None:
    for text in ("lost", "lost:CAM", "melt:CAM:0:1", "lost:CAM:a:1", "lost:CAM:0:1:2:3"):
        with pytest.raises(ConfigError, match="is not KIND:TARGET:FROM:TO"):
            Fault.parse(text)


def test_messages_without_a_header_first_are_not_shifted(bag: Path) -> None:
    tf = next(one for one in played(bag) if one.topic == "/tf")
    assert shifted(tf, 5.0) is tf
