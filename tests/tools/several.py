"""Several programs of tools/, one after the other in one process, or in as many as the first one starts.

A program, ``python -m tests.tools.several``: to start processes takes longer than what tests do in them.
What to run is in the variable :data:`PLAN`, a JSON list of ``[NAME, ARGUMENT, ...]``: Lightning starts other
processes with its own idea of the arguments, but with these variables. Before each its name is printed.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

from bevperception.distributed import is_first_process
from bevperception.errors import run_program

PLAN = "BEVPERCEPTION_TEST_PLAN"
TOOLS = Path(__file__).resolve().parents[2] / "tools"
START = "--- "
"""Before the name of a program in the output."""


def main() -> None:
    """Run all; the first that fails ends it with its exit code."""
    for name, *arguments in json.loads(os.environ[PLAN]):
        if is_first_process():
            print(START + name, flush=True)
        sys.argv = [str(TOOLS / f"{name}.py"), *arguments]
        program = runpy.run_path(sys.argv[0])["main"]  # this module stays __main__, which is started again
        try:
            run_program(program)
        except SystemExit as left:
            if left.code:
                raise


if __name__ == "__main__":
    main()
