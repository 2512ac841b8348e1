"""Measure speed and memory: one benchmark a sub-command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from bevperception.errors import ConfigError, importing
from bevperception.processes import program_name

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
    return "\n".join([f"usage: {program_name('benchmark')} SUBCOMMAND [options]", "", "subcommands:", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the rest of the command line to the subcommand."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] not in SUBCOMMANDS:
        raise ConfigError(f"there is no subcommand {arguments[0]!r}\n{usage()}")
    with importing():
        module = importlib.import_module(SUBCOMMANDS[arguments[0]][0])
    code: int = module.main(arguments[1:])
    return code
