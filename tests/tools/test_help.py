"""Every tool's --help works without the extras that its work may need."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

TOOLS = sorted((Path(__file__).resolve().parents[2] / "tools").glob("*.py"))
EXTRAS = ("rosbags", "rosbags.highlevel", "rosbags.typesys", "rclpy", "psutil", "tensorboard")


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_help_needs_no_extras(
    tool: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in EXTRAS:
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("bevperception.bags")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", [str(tool), "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(tool), run_name="__main__")
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "usage" in shown.lower()
    assert tool.name in shown
