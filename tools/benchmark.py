"""Measure speed and memory: tools/benchmark.py SUBCOMMAND --help."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bevperception.errors import ConfigError, importing, run_program

SUBCOMMANDS = {
    "ops": ("bevperception.benchmarks.ops", "the native operators against the reference and PyPI peers"),
    "data": ("bevperception.benchmarks.data", "samples a second, and the wait for them in training"),
    "streaming": ("bevperception.benchmarks.streaming", "time per frame by length of history"),
    "frames": ("bevperception.benchmarks.frames", "frames a second of trained models, in turns"),
    "cameras": ("bevperception.benchmarks.cameras", "what a lost camera costs in NDS"),
    "proposals": ("bevperception.benchmarks.proposals", "which objects hybrid queries could add"),
    "deformation": ("bevperception.benchmarks.deformation", "what a trained InternImage owes to deformation"),
    "model": ("bevperception.benchmarks.model", "parameters, time per stage and peak memory of a model"),
}
"""Name: a module with ``main(arguments) -> int``, and what it measures."""


def usage() -> str:
    """The subcommands and what they measure."""
    lines = [f"  {name:<13}{summary}" for name, (_, summary) in SUBCOMMANDS.items()]
    return "\n".join(["usage: tools/benchmark.py SUBCOMMAND [options]", "", "subcommands:", *lines])


def main() -> int:
    """Hand the rest of the command line to the subcommand."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] not in SUBCOMMANDS:
        raise ConfigError(f"there is no subcommand {arguments[0]!r}\n{usage()}")
    with importing():
        module = importlib.import_module(SUBCOMMANDS[arguments[0]][0])
    code: int = module.main(arguments[1:])
    return code


if __name__ == "__main__":
    run_program(main)
