"""The command `bevperception nuscenes-to-bag` from a checkout, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bevperception.errors import importing, run_program

with importing():
    from bevperception.cli.nuscenes_to_bag import main

if __name__ == "__main__":
    run_program(main)
