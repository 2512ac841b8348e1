"""Options and fixtures that every test may use."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from bevperception.ops import backend

# The same examples every time, so that a change and not luck decides; `explore` looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# In the background (nohup, &) a shell ignores SIGINT, and every program that a test starts inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# PyTorch's cache of compiled kernels does not know for which instructions they are: one cache for each set.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    f"{tempfile.gettempdir()}/bevperception-inductor-{os.getuid()}-{torch.backends.cpu.get_cpu_capability()}",
)

KEYFRAME_VARIABLE = "BEVPERCEPTION_KEYFRAME"


_THREADS = torch.get_num_threads()
_THREADED = ("ops", "golden")
"""Folders of tests in which PyTorch computes with as many threads as this machine gives it."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compute with one thread but where threads are tested: several wait for each other at every tiny tensor.

    Where cores are shared that takes most of the time. A hook, as it comes before fixtures of any scope.
    """
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    torch.set_num_threads(_THREADS if folder in _THREADED else 1)


@pytest.fixture(autouse=True)
def _choice_of_operators_stays_inside_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that chooses the operators' backend must not choose it for the next one."""
    monkeypatch.setattr(backend._State, "requested", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=Path(__file__).parent / "golden" / "cases",
        help="folder of golden cases (NAME.npz) that tests/golden runs; default: the project's own",
    )


@pytest.fixture(scope="session")
def real_keyframe() -> Path:
    """Root of the real nuScenes key frame (version v1.0-mini, split mini_train); skips without it."""
    default = Path(__file__).resolve().parents[2] / "shared" / "real_keyframe"
    root = Path(os.environ.get(KEYFRAME_VARIABLE) or default)
    if not (root / "v1.0-mini" / "sample.json").is_file():
        pytest.skip(f"no real key frame at {root}; set {KEYFRAME_VARIABLE} to its folder")
    return root


@pytest.fixture(scope="session")
def tiny_nuscenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a tiny data set in nuScenes format, written once a session; not to be changed by tests.

    Version ``v1.0-tiny``, splits ``tiny_train`` (2 scenes) and ``tiny_val`` (1 scene) of 4 key frames; see
    tests/fixtures/tiny_nuscenes.py. A test that damages files writes its own copy.
    """
    from tests.fixtures.tiny_nuscenes import write_tiny_nuscenes

    return write_tiny_nuscenes(tmp_path_factory.mktemp("tiny_nuscenes"))
