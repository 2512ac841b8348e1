"""What runs on a vehicle needs no data set: the devkit must not be imported there."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NODE = ROOT / "ros2_ws" / "src" / "bev_perception" / "bev_perception"
DATA_PACKAGES = {"nuscenes", "lightning", "pycocotools", "sklearn", "matplotlib"}

PERCEIVE = """
import sys
from bevperception.streaming.settings import NodeSettings

settings = NodeSettings(weights="world_micro", device="cpu")
loaded = bevperception.streaming.loading.load_predictor(settings)
pipeline = bevperception.streaming.pipeline.Pipeline(loaded.predictor, loaded.channels, settings)
pipeline.warm_up()
"""
"""Imports inside functions count, too: load shipped weights and run the model as the node does."""


def modules_of_the_node() -> set[str]:
    """The modules of bevperception that the node imports; overhead.py, a benchmark, is no part of it."""
    names: set[str] = set()
    for path in NODE.glob("*.py"):
        if path.name == "overhead.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bevperception"):
                names.add(node.module)
    return names


def test_the_node_imports_no_devkit() -> None:
    names = modules_of_the_node()
    assert {"bevperception.streaming.pipeline", "bevperception.streaming.loading"} <= names
    lines = [f"import {name}" for name in sorted(names)]
    program = "\n".join([*lines, PERCEIVE, "print(*{name.split('.')[0] for name in sys.modules})"])
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    imported = set(done.stdout.split())
    assert {"bevperception", "torch"} <= imported
    assert not imported & DATA_PACKAGES
