"""Build the wheel, install it where there is no checkout, and use it there as a user would.

    .ci/check_wheel.py            dependencies come from this environment: quick, and needs no network
    .ci/check_wheel.py --full     dependencies are installed by pip, as on a fresh machine
    .ci/check_wheel.py --full --wheel dist/NAME.whl      a wheel that is there, on the Python that runs this

The wheel stays in dist/.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORLD = ("--data.root=world", "--data.version=v1.0-world")
LOCATION = "from bevperception.ops import native; print(native.__file__, native.LIBRARY_PATH)"


def build() -> Path:
    """The wheel, built anew."""
    folder = ROOT / "dist"
    # setuptools would also pack what an earlier build left behind, such as modules that have moved.
    for old in (folder, *ROOT.glob("build/lib*")):
        shutil.rmtree(old, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    if "-cp310-abi3-" not in wheel.name:
        sys.exit(f"error: {wheel.name} is no wheel for Python 3.10 and later")
    check_content(wheel)
    return wheel


def check_content(wheel: Path) -> None:
    """Compare a wheel's files with those of the checkout; leave if one lacks or is too many."""
    package = ROOT / "bevperception"
    wanted = {path.relative_to(ROOT) for path in package.rglob("*.py")}
    wanted |= {
        path.relative_to(ROOT) for path in (*package.glob("weights/*/*"), *package.glob("*/README.md"))
    }
    wanted |= {Path("bevperception") / path.relative_to(ROOT) for path in ROOT.glob("configs/**/*.*")}
    wanted |= {Path("bevperception") / name for name in ("_C.abi3.so", "py.typed")}
    names = map(Path, zipfile.ZipFile(wheel).namelist())
    found = {name for name in names if not name.parts[0].endswith(".dist-info")}
    if found != wanted:
        lacking, other = (sorted(map(str, paths)) for paths in (wanted - found, found - wanted))
        sys.exit(f"error: {wheel.name} lacks {lacking or 'nothing'} and has {other or 'nothing'} besides")


def install(wheel: Path, folder: Path, full: bool) -> Path:
    """Install the wheel into a new environment; returns its folder of programs."""
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    options = [] if full else ["--no-deps", "--no-index"]
    subprocess.run([programs / "python", "-m", "pip", "install", "--quiet", *options, wheel], check=True)
    if not full:
        # After the installation, so that pip does not look there. A path file inside it is not followed, so
        # that an editable installation of the checkout stays out of reach.
        (site,) = (folder / "lib").glob("python*/site-packages")
        (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return programs


def use(programs: Path, place: Path) -> None:
    """Perceive a small world with the shipped weights, in a folder without a checkout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*command: str) -> str:
        print("$", *command, flush=True)
        done = subprocess.run(
            [str(programs / command[0]), *command[1:]],
            cwd=place,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"error: exit code {done.returncode}\n{done.stdout}")
        return done.stdout

    for file in run("python", "-c", LOCATION).split():
        if programs.parent not in Path(file).parents or not Path(file).is_file():
            sys.exit(f"error: {file} is not the wheel's, or is not there")
    report = run("bevperception", "doctor")
    print(report)
    if "deform_attn     native" not in report:
        sys.exit("error: the native operators of the wheel do not run")
    run("bevperception", "make-world", "--scenes=2", "--frames=3", "--size=400x225", "--quiet", "world")
    run("bevperception", "predict", "--weights=world_v2", "--split=world_val", "--out=predictions", *WORLD)
    results = json.loads((place / "predictions" / "results_nusc.json").read_text(encoding="utf-8"))["results"]
    boxes = sum(len(sample) for sample in results.values())
    if len(results) != 3 or boxes < 30:
        sys.exit(f"error: {boxes} boxes in {len(results)} samples")
    run(
        "bevperception",
        "visualize",
        "--weights=world_v2",
        "--split=world_val",
        "--sample=0",
        "--out=p.png",
        *WORLD,
    )
    for config in ("bevformer_v2_world", "configs/world_micro.yaml"):
        run("bevperception", "train", "--config", config, "--help")
    size = (place / "p.png").stat().st_size
    print(f"the wheel works: {boxes} boxes in {len(results)} samples, a picture of {size} bytes")


def main() -> None:
    """Build, install, use."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="install the dependencies, too")
    parser.add_argument("--wheel", type=Path, help="the wheel to use; default: build it")
    options = parser.parse_args()
    wheel = options.wheel.resolve() if options.wheel else build()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "elsewhere"
        place.mkdir()
        use(install(wheel, Path(folder) / "environment", options.full), place)


if __name__ == "__main__":
    main()
