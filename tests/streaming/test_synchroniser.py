"""Sets of images: complete, with gaps, without an anchor, out of order; and never many in memory."""

from __future__ import annotations

import gc
import random
import weakref

import pytest

from bevperception.streaming.images import CameraImage
from bevperception.streaming.synchroniser import SWEEP, ImageSet, Synchroniser, SyncSettings

CAMERAS = ("A", "B", "C")
PERIOD_NS = 200_000_000


def image(channel: str, stamp_s: float, arrived_s: float | None = None) -> CameraImage:
    at = stamp_s if arrived_s is None else arrived_s
    return CameraImage(channel, round(stamp_s * 1e9), at, b"")


def known(stamp_ns: int) -> bool:
    return True


def make(**settings: float | str | bool) -> Synchroniser:
    return Synchroniser(CAMERAS, SyncSettings(**{"anchor": "A", **settings}))  # type: ignore[arg-type]


def feed(sync: Synchroniser, stamp_s: float, channels: str = "ABC") -> ImageSet | None:
    for channel in channels:
        sync.add_image(image(channel, stamp_s))
    return sync.poll(stamp_s, known)


def test_a_set_is_ready_when_all_cameras_are_in_it() -> None:
    sync = make()
    sync.add_image(image("B", 0.98))
    sync.add_image(image("A", 1.00))
    assert sync.poll(1.01, known) is None
    sync.add_image(image("C", 1.03))
    found = sync.poll(1.03, known)
    assert found is not None
    assert (found.stamp_ns, found.trigger, found.last_arrival_s) == (1_000_000_000, "A", 1.03)
    assert {c: i.stamp_ns for c, i in found.images.items()} == {
        "A": 1_000_000_000,
        "B": 980_000_000,
        "C": 1_030_000_000,
    }
    assert sync.poll(1.04, known) is None, "a set comes once"


def test_a_set_waits_for_the_odometry_of_its_newest_image_but_not_for_ever() -> None:
    sync = make(max_wait_s=0.1)
    for channel, stamp_s in (("A", 1.0), ("B", 1.02), ("C", 0.99)):
        sync.add_image(image(channel, stamp_s, 1.0))
    asked: list[int] = []
    assert sync.poll(1.05, lambda stamp: bool(asked.append(stamp))) is None
    assert asked == [1_020_000_000]
    assert sync.wait_s(1.05) == pytest.approx(0.05)
    assert sync.poll(1.1, lambda stamp: False) is not None


def test_the_nearest_image_of_a_camera_is_taken() -> None:
    sync = make(tolerance_s=0.05)
    sync.add_image(image("A", 1.0))
    sync.add_image(image("B", 0.96))
    sync.add_image(image("B", 1.01))
    sync.add_image(image("B", 1.04))
    sync.add_image(image("C", 1.0))
    found = sync.poll(1.05, known)
    assert found is not None
    assert found.images["B"].stamp_ns == 1_010_000_000
    assert sync.counts["replaced by a nearer image"] == 1


def test_a_lost_camera_costs_two_waits_and_then_none() -> None:
    sync = make(max_wait_s=0.1)
    assert feed(sync, 1.0) is not None
    for stamp_s in (1.2, 1.4):
        assert feed(sync, stamp_s, "AB") is None
        late = sync.poll(stamp_s + 0.1, known)
        assert late is not None
        assert set(late.images) == {"A", "B"}
    assert feed(sync, 1.6, "AB") is not None
    sync.add_image(image("C", 1.6, 1.65))  # it is back, too late for the set
    assert feed(sync, 1.8, "AB") is None, "and is waited for again"
    sync.add_image(image("C", 1.8))
    found = sync.poll(1.81, known)
    assert found is not None
    assert set(found.images) == set(CAMERAS)


def test_another_camera_stands_in_for_a_silent_anchor_and_hands_back() -> None:
    sync = make(trigger_timeout_s=0.5, max_wait_s=0.1)
    assert feed(sync, 1.0) is not None
    found = []
    for step in range(1, 8):
        at_once = feed(sync, 1.0 + 0.2 * step, "CB")
        found.append(at_once or sync.poll(1.1 + 0.2 * step, known))
    assert [f.trigger if f else None for f in found] == [None, None, "B", "B", "B", "B", "B"]
    back = feed(sync, 2.6)
    assert back is not None
    assert (back.trigger, set(back.images)) == ("A", set(CAMERAS))


@pytest.mark.parametrize("offset_s", [0.03, -0.02])
def test_the_instant_of_a_set_may_lie_beside_the_anchors_stamp(offset_s: float) -> None:
    sync = make(reference_offset_s=offset_s)
    sync.add_image(image("B", 1.0 + offset_s - 0.049, 1.0))
    sync.add_image(image("A", 1.0))
    sync.add_image(image("C", 1.0 + offset_s + 0.049, 1.0))
    found = sync.poll(1.01, known)
    assert found is not None
    assert found.stamp_ns == 1_000_000_000 + round(offset_s * 1e9)
    assert set(found.images) == set(CAMERAS)


def test_a_returning_anchor_opens_no_second_set_of_the_instant_of_its_stand_in() -> None:
    sync = make(trigger_timeout_s=0.5, max_wait_s=0.1, tolerance_s=0.05)
    assert feed(sync, 1.0) is not None
    for step in range(1, 6):
        feed(sync, 1.0 + 0.2 * step, "BC")
        sync.poll(1.1 + 0.2 * step, known)
    for channel, stamp_s in (("B", 2.2), ("C", 2.2), ("A", 2.22)):
        sync.add_image(image(channel, stamp_s))
    found = sync.poll(2.22, known)
    assert found is not None
    assert (found.stamp_ns, found.trigger, set(found.images)) == (2_200_000_000, "B", set(CAMERAS))
    assert sync.poll(2.4, known) is None
    assert sync.counts["sets replaced by a newer set"] == 0


def test_sweeps_open_sets_while_they_come() -> None:
    sync = make(sweep=True, trigger_timeout_s=0.5)
    sync.add_sweep(1_020_000_000, 1.0)
    found = feed(sync, 1.0)
    assert found is not None
    assert (found.stamp_ns, found.trigger) == (1_020_000_000, SWEEP)
    assert feed(sync, 1.2) is None
    third = feed(sync, 1.6)
    assert third is not None
    assert third.trigger == "A", "the sweeps stopped"


def test_of_two_closed_sets_only_the_newer_is_kept() -> None:
    sync = make(max_wait_s=10.0)
    for stamp_s in (1.0, 1.2, 1.4):
        for channel in CAMERAS:
            sync.add_image(image(channel, stamp_s))
    found = sync.poll(1.4, known)
    assert found is not None
    assert found.stamp_ns == 1_400_000_000
    assert sync.counts["sets replaced by a newer set"] == 2
    assert sync.poll(1.4, known) is None


def test_images_out_of_order_and_twice_are_refused_and_counted() -> None:
    sync = make()
    assert feed(sync, 1.0) is not None
    assert not sync.add_image(image("B", 0.9, 1.1))
    assert not sync.add_image(image("B", 1.0, 1.1))
    assert sync.counts["out of order"] == 2


def test_an_image_far_from_its_set_is_left_out() -> None:
    sync = make(tolerance_s=0.05, max_wait_s=0.1)
    sync.add_image(image("C", 0.9))
    sync.add_image(image("A", 1.0))
    sync.add_image(image("B", 1.06))
    found = sync.poll(1.2, known)
    assert found is not None
    assert set(found.images) == {"A"}
    assert sync.counts["outside of every set"] == 1


def test_min_period_thins_out_sets() -> None:
    sync = make(min_period_s=0.35)
    assert [feed(sync, 1.0 + 0.2 * k) is not None for k in range(5)] == [True, False, True, False, True]


def test_nothing_grows_whatever_comes() -> None:
    sync = make(sweep=True)
    rng = random.Random(0)
    sent: weakref.WeakSet[CameraImage] = weakref.WeakSet()
    for step in range(3000):
        now_s = 0.01 * step
        jitter_s = rng.uniform(-0.3, 0.3)
        one = image(rng.choice(CAMERAS), now_s + jitter_s, now_s)
        sent.add(one)
        sync.add_image(one)
        if rng.random() < 0.1:
            sync.add_sweep(round((now_s + jitter_s) * 1e9), now_s)
        if rng.random() < 0.02:
            sync.poll(now_s, lambda stamp: rng.random() < 0.5)
    gc.collect()
    assert len(sent) <= 3 * len(CAMERAS) + 1
