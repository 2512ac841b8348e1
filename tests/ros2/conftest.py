"""Processes, bags and a listening node for the tests with real ROS 2."""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "ros2_ws" / "src" / "bev_perception"))

if importlib.util.find_spec("rclpy") is None or importlib.util.find_spec("rosbags") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.ros2.system import DOMAINS, NodeProcess, Probe, make_bag, make_weights

_FREE_DOMAINS = itertools.count(int(os.environ.get("BEV_TEST_DOMAIN", "120")))


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory, tiny_nuscenes: Path) -> Path:
    """Random weights of the micro model."""
    return make_weights(tmp_path_factory.mktemp("weights"), tiny_nuscenes)


@pytest.fixture(scope="session")
def bag(tmp_path_factory: pytest.TempPathFactory, tiny_nuscenes: Path) -> Path:
    """A scene as compressed images."""
    return make_bag(tmp_path_factory.mktemp("bags") / "tiny", tiny_nuscenes)


@pytest.fixture(scope="session")
def raw_bag(tmp_path_factory: pytest.TempPathFactory, tiny_nuscenes: Path) -> Path:
    """The same scene as raw images, in sqlite3."""
    return make_bag(tmp_path_factory.mktemp("bags") / "raw", tiny_nuscenes, raw=True, storage="sqlite3")


@pytest.fixture(scope="module")
def domain() -> int:
    """A ROS domain of the test module's own."""
    return 20 + next(_FREE_DOMAINS) % DOMAINS


@pytest.fixture(scope="module")
def running(
    domain: int, weights: Path, bag: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NodeProcess]:
    """One active node for a module's tests."""
    with NodeProcess(domain, weights, bag, tmp_path_factory.mktemp("node")) as node:
        yield node


@pytest.fixture
def probe(domain: int) -> Iterator[Probe]:
    """A node that listens to everything."""
    with Probe(domain) as listening:
        yield listening
