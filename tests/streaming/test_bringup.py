"""What the bring-up package ships fits the node: parameters, topics, files."""

from __future__ import annotations

import ast
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import yaml

from bevperception.streaming.settings import NodeSettings, defaults
from bevperception.taxonomy import CAMERA_NAMES, SEGMENTATION_CLASSES

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "ros2_ws" / "src"
BRINGUP, NODE = SOURCES / "bev_perception_bringup", SOURCES / "bev_perception"


def test_the_parameter_file_holds_every_parameter_with_its_default() -> None:
    content = yaml.safe_load((BRINGUP / "config" / "bev_perception.yaml").read_text())
    values = content["/**"]["ros__parameters"]
    assert values.pop("autostart") is True
    assert list(values) == [name for name, _, _ in defaults()]
    assert NodeSettings().changed(values, configured=False) == NodeSettings()


def test_launch_files_compile_and_describe_themselves() -> None:
    for path in (BRINGUP / "launch").iterdir():
        tree = ast.parse(path.read_text())
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert "generate_launch_description" in names
        assert ast.get_docstring(tree)
    text = (BRINGUP / "launch" / "bev_perception.launch.py").read_text()
    for channel in CAMERA_NAMES:
        assert f'"{channel.lower()}"' in text


def test_every_shipped_file_is_installed() -> None:
    for package in (BRINGUP, NODE):
        setup = (package / "setup.py").read_text()
        name = ElementTree.parse(package / "package.xml").getroot().findtext("name")
        assert name == package.name
        assert (package / "resource" / package.name).is_file()
        for folder in ("launch", "config", "rviz", "foxglove"):
            for path in (package / folder).glob("*"):
                assert f"{folder}/{path.name}" in setup, path


def test_layouts_name_the_nodes_topics() -> None:
    rviz = yaml.safe_load((BRINGUP / "rviz" / "bev_perception.rviz").read_text())
    shown = {d["Topic"]["Value"] for d in rviz["Visualization Manager"]["Displays"] if "Topic" in d}
    wanted = {f"/bev_perception/output/segmentation/{name}" for name in SEGMENTATION_CLASSES}
    wanted |= {"/bev_perception/output/markers", "/bev_perception/output/bev_image"}
    assert shown == wanted
    foxglove = json.dumps(json.loads((BRINGUP / "foxglove" / "bev_perception.json").read_text()))
    for topic in (*wanted, "/diagnostics", *(f"/sensors/{c.lower()}/image/compressed" for c in CAMERA_NAMES)):
        assert topic in foxglove


def test_the_fast_dds_profile_is_well_formed() -> None:
    root = ElementTree.parse(NODE / "config" / "fastdds.xml").getroot()
    sizes = [int(element.text or 0) for element in root.iter() if element.tag.endswith("segment_size")]
    assert sizes == [64 * 2**20]
