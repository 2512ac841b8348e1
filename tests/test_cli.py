"""The command `bevperception`: sub-commands, names in messages, configurations by name."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bevperception
from bevperception.cli.main import COMMANDS, main
from bevperception.config_files import config_path, shipped_configs
from bevperception.config_io import load_config
from bevperception.errors import ConfigError
from bevperception.processes import PROGRAM, program_name

ROOT = Path(__file__).resolve().parents[1]
LONG_NAMES = {"convert": "convert_checkpoint"}
"""Commands whose file in tools/ says more."""
WITHOUT_DOOR = {"doctor"}  # python -m bevperception.doctor
ROS_TOOLS = {"record_bag", "replay_bag", "ros_demo", "ros_soak"}  # they start ROS 2 processes, or are ones


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([command, "--help"])
    except SystemExit as left:
        code = int(left.code or 0)
    shown = capsys.readouterr().out
    assert code == 0
    assert shown.startswith(f"usage: bevperception {command} ")
    assert "<function" not in shown
    assert "tools/" not in shown


def test_every_tool_is_a_door_to_a_command() -> None:
    doors = {path.stem for path in (ROOT / "tools").glob("*.py")} - ROS_TOOLS
    commands = {LONG_NAMES.get(name, name.replace("-", "_")): name for name in COMMANDS}
    assert doors == commands.keys() - WITHOUT_DOOR
    for name in doors:
        tree = ast.parse((ROOT / "tools" / f"{name}.py").read_text(encoding="utf-8"))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert modules == {
            "pathlib",
            "bevperception.errors",
            f"bevperception.cli.{commands[name].replace('-', '_')}",
        }


def test_the_list_of_commands_imports_no_pytorch() -> None:
    program = (
        "import sys; from bevperception.cli.main import main; main(['--help']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS)
    assert done.stdout.endswith("False\n")


def test_a_command_that_is_none_is_refused() -> None:
    done = subprocess.run([sys.executable, "-m", "bevperception", "fly"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no command 'fly'" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(ConfigError, match="there is no command"):
        main(["fly"])
    assert main([]) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("trian", r"there is no command 'trian'\. Did you mean train\?"),
        ("x", r"there is no command 'x'\. There are: demo, "),
        ("record-bag", r"record-bag needs ROS 2 and a checkout .*: run tools/record_bag\.py there"),
    ],
)
def test_the_message_names_the_nearest_command(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        main([given])


@pytest.mark.parametrize("name", ["make-world", "make_world"])
def test_arguments_reach_the_command_and_sys_argv_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    module = importlib.import_module("bevperception.cli.make_world")
    monkeypatch.setattr(module, "main", lambda argv: seen.append(argv))
    monkeypatch.setattr(sys, "argv", ["/bin/bevperception", name, "--seed", "3", "out"])
    assert main() == 0
    assert seen == [["--seed", "3", "out"]]
    assert sys.argv[1] == name, "Lightning starts its other processes with sys.argv"


def test_a_program_of_its_own_is_of_this_copy_and_hides_no_modules(tmp_path: Path) -> None:
    decoy = tmp_path / "bevperception"
    decoy.mkdir()
    for name in ("__init__", "__main__"):
        (decoy / f"{name}.py").write_text("raise SystemExit('the wrong copy')")
    for command in ([*PROGRAM, "--version"], [sys.executable, str(ROOT / "tools" / "train.py"), "--help"]):
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        first = done.stdout.splitlines()[0]
        assert first.startswith((f"bevperception {bevperception.__version__}", "usage: tools/train.py"))
    folder = str(ROOT / "bevperception")  # where Python looks first when it is given a file there
    code = f"import runpy, sys; sys.argv = [{PROGRAM[1]!r}, '--version']; sys.path[0] = {folder!r}\n"
    code += "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += f"except SystemExit: assert {folder!r} not in sys.path\n"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_programs_are_named_as_they_were_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for started, name in (
        ("tools/make_world.py", "tools/make_world.py"),
        ("/a/checkout/tools/make_world.py", "tools/make_world.py"),
        ("/usr/bin/bevperception", "bevperception make-world"),
        ("/x/bevperception/__main__.py", "bevperception make-world"),
    ):
        monkeypatch.setattr(sys, "argv", [started])
        assert program_name("make_world") == name


def test_configurations_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").glob("**/*.yaml")}
    plans = {path for path in files if path.parts[0] == "plans"}
    assert set(shipped_configs()) == {path.with_suffix("").as_posix() for path in files - plans}
    assert load_config("world_micro") == load_config(ROOT / "configs" / "world_micro.yaml")
    both = load_config(["bevformer_v2_r50_t2", "backbones/internimage_s"])
    assert both.model.backbone.variant == "internimage_s"
    # A file of the user's own wins over a shipped one of its name.
    monkeypatch.chdir(tmp_path)
    Path("world_micro").write_text("training: {steps: 7}\n", encoding="utf-8")
    assert config_path("world_micro") == Path("world_micro")
    assert load_config("world_micro").training.steps == 7
    with pytest.raises(ConfigError, match="world_macro"):
        load_config("world_macro")
