"""The command ``bevperception`` where its script is not in the PATH: ``python -m bevperception COMMAND``."""

from __future__ import annotations

import os
import sys

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
if sys.path[0] == _PACKAGE:  # started by its file's name: the package's modules would hide others
    sys.path[0] = os.path.dirname(_PACKAGE)

from bevperception.cli.main import entry_point  # noqa: E402 (not before the path is right)

if __name__ == "__main__":
    entry_point()
