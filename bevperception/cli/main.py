"""The command `bevperception`: hands the command line to a sub-command, which is imported only then."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

import bevperception
from bevperception.errors import ConfigError, importing, run_program

COMMANDS = {
    "demo": ("bevperception.cli.demo", "perceive a small procedural world: picture, video, metrics"),
    "doctor": ("bevperception.doctor.__main__", "say what is installed and whether a data root can be used"),
    "make-world": ("bevperception.cli.make_world", "make a procedural world in nuScenes' format"),
    "train": ("bevperception.cli.train", "train a model, evaluate it and export its weights"),
    "run-plan": ("bevperception.cli.run_plan", "train several models by a plan and compare them"),
    "evaluate": ("bevperception.cli.evaluate", "evaluate weights on a split"),
    "predict": ("bevperception.cli.predict", "write predictions as a nuScenes submission"),
    "visualize": ("bevperception.cli.visualize", "draw samples and scenes: PNG or MP4"),
    "convert": ("bevperception.cli.convert", "make weights of a published checkpoint, or the way back"),
    "benchmark": ("bevperception.cli.benchmark", "measure speed and memory"),
    "nuscenes-to-bag": ("bevperception.cli.nuscenes_to_bag", "write a scene as a rosbag2"),
    "evaluate-bag": ("bevperception.cli.evaluate_bag", "evaluate what the ROS 2 node published"),
}
"""Name: a module with ``main(arguments)``, and what it does."""
ROS_TOOLS = ("record-bag", "replay-bag", "ros-demo", "ros-soak")
"""Programs of tools/ that need ROS 2 and a checkout."""


def usage() -> str:
    """The sub-commands and what they do."""
    lines = [f"  {name:<17}{summary}" for name, (_, summary) in COMMANDS.items()]
    head = ["usage: bevperception COMMAND [options]", "", "commands:"]
    return "\n".join([*head, *lines, "", "options of a command: bevperception COMMAND --help"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command.

    Args:
        argv: its name and its arguments; None takes the program's own.

    Returns:
        The exit code.

    Raises:
        ConfigError: there is no such command.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"bevperception {bevperception.__version__}")
        return 0
    name = arguments[0].replace("_", "-")
    if name not in COMMANDS:
        raise ConfigError(_unknown(arguments[0], name))
    with importing():
        module = importlib.import_module(COMMANDS[name][0])
    return module.main(arguments[1:]) or 0


def entry_point() -> None:
    """The console script."""
    run_program(main)


def _unknown(given: str, name: str) -> str:
    """The message for a command that is not there."""
    if name in ROS_TOOLS:
        tool = f"tools/{name.replace('-', '_')}.py"
        return f"{given} needs ROS 2 and a checkout of the project: run {tool} there"
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(COMMANDS)}"
    return f"there is no command {given!r}. {hint}"
