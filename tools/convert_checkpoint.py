"""The command `bevperception convert` from a checkout, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bevperception.errors import importing, run_program

with importing():
    from bevperception.cli.convert import main

if __name__ == "__main__":
    run_program(main)
