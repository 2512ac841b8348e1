"""The command line of the doctor; see :mod:`bevperception.doctor`."""

from __future__ import annotations

import argparse
import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bevperception.errors import USAGE_EXIT_CODE, BevError, importing, run_program

with importing():
    from bevperception.doctor.environment import environment, operators
    from bevperception.taxonomy import CAMERA_NAMES


def _print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    print()


def _report_data_root(root: Path, version: str | None, cameras: Sequence[str]) -> int:
    for needed in ("torch", "nuscenes"):
        if importlib.util.find_spec(needed) is None:
            raise BevError(f"{needed} is not installed, so {root} cannot be looked at: run `make install`")
    with importing():
        from bevperception.doctor.data_root import check_data_root

    print(f"Data root {root}")
    levels: Counter[str] = Counter()
    for finding in check_data_root(root, version, cameras):
        levels[finding.level] += 1
        first, *details = finding.text.split("\n")
        print(f"  {finding.level:<4}  {finding.subject:<13}  {first}", flush=True)
        for line in details:
            print(f"  {'':<4}  {'':<13}  {line}", flush=True)
    if levels["FAIL"]:
        print("\nThis data root cannot be used.")
        return USAGE_EXIT_CODE
    print("\nThis data root can be used" + (", less what is lost above." if levels["lost"] else "."))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report.

    Args:
        argv: arguments; None takes the program's own.

    Returns:
        0, or 2 if the data root is unusable or an operator wrong.

    Raises:
        BevError: if torch or the devkit is not installed, or the environment asks for an unknown operator
            backend.
    """
    parser = argparse.ArgumentParser(
        prog="bevperception doctor",
        description="Says what is installed, which operators run, and whether a data root can be used.",
        epilog="example: bevperception doctor /data/nuscenes --version v1.0-mini",
    )
    parser.add_argument("dataroot", nargs="?", type=Path, help="folder with samples/, maps/ and v1.0-.../")
    parser.add_argument("--version", help="default: v1.0-trainval if it is there, else the first one found")
    parser.add_argument(
        "--cameras", nargs="+", default=list(CAMERA_NAMES), metavar="CHANNEL", help="default: the six"
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="verify every operator on the GPU against the float64 reference, and time it; without a GPU the "
        "same on the CPU, for practice",
    )
    options = parser.parse_args(argv)
    _print_rows("Environment", environment())
    _print_rows("Operators", operators())
    if options.gpu:
        from bevperception.doctor.device import report_device

        return 0 if report_device() else USAGE_EXIT_CODE
    if options.dataroot is None:
        print("Give a data root to have it checked: bevperception doctor /data/nuscenes")
        return 0
    return _report_data_root(options.dataroot.expanduser(), options.version, options.cameras)


if __name__ == "__main__":
    run_program(main)
