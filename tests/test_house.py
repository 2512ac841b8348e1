"""The house stands: set-up, pinned versions, README, imports that point one way, nothing of the workplace."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bevperception

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lock_requirements(name: str = "requirements.lock") -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def locked(name: str = "requirements.lock") -> dict[str, Requirement]:
    """The lock's entries that apply to this Python."""
    chosen = [r for r in lock_requirements(name) if r.marker is None or r.marker.evaluate()]
    names = [canonicalize_name(r.name) for r in chosen]
    assert len(set(names)) == len(names), "a package is locked twice"
    return dict(zip(names, chosen, strict=True))


def asked_for(groups: tuple[str, ...] = ("test", "lint")) -> list[Requirement]:
    optional = PROJECT["optional-dependencies"]
    return [Requirement(r) for r in PROJECT["dependencies"] + [r for g in groups for r in optional[g]]]


def test_every_lock_entry_is_one_exact_version() -> None:
    for requirement in lock_requirements() + lock_requirements("requirements-log.lock"):
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), str(requirement)
    assert str(locked()["torch"].specifier) == "==2.13.0"


def test_lock_fits_what_the_project_asks_for() -> None:
    pinned = locked()
    for requirement in asked_for():
        version = str(pinned[canonicalize_name(requirement.name)].specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{requirement} is locked at {version}"
    assert "tensorboard" in locked("requirements-log.lock")
    assert not set(locked("requirements-log.lock")) & set(pinned)


def test_lock_names_every_package_that_these_need_in_turn() -> None:
    # A CUDA build of torch brings packages of its own, which torch pins itself.
    cuda = ("nvidia-", "triton", "cuda-")
    pinned, todo, seen = locked(), asked_for(), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (name, *sorted(requirement.extras))
        if key in seen or name.startswith(cuda):
            continue
        seen.add(key)
        assert name in pinned, f"{name} is not locked"
        for text in importlib.metadata.requires(name) or []:
            child = Requirement(text)
            extras = ("", *requirement.extras)
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in extras):
                todo.append(child)
    assert len(seen) > 40


def test_only_one_opencv_is_installed_by_the_lock() -> None:
    assert [name for name in locked() if name.startswith("opencv")] == ["opencv-python-headless"]


FAKE_PYTHON = """#!/bin/sh
case "$*" in
  "-c "*) exit 0 ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  *) echo "$*" >> "$FAKE_LOG"; test ! -f "$FAKE_FAILURE" ;;
esac
"""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the Makefile with a stand-in for Python that only writes down what it is asked."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "setup.py").write_text("")
    (tmp_path / "ops").mkdir()
    (tmp_path / "bevperception").mkdir()
    (tmp_path / "ops" / "kernel.cpp").write_text("")
    fake = tmp_path / "fake_python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    return tmp_path


def make(house: Path, target: str = "slow") -> tuple[int, list[str]]:
    """Run a target; returns make's exit code and what Python was asked to do."""
    code, asked, _ = make_and_listen(house, target)
    return code, asked


def make_and_listen(house: Path, target: str) -> tuple[int, list[str], str]:
    """The same with what make printed."""
    log = house / "log.txt"
    log.write_text("")
    names = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON"}
    environment = {k: v for k, v in os.environ.items() if k not in names}
    environment |= {"FAKE_LOG": str(log), "FAKE_FAILURE": str(house / "failure")}
    command = ["make", target, f"PYTHON={house / 'fake_python'}"]
    done = subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True)
    return done.returncode, log.read_text().splitlines(), done.stdout


def test_set_up_says_what_it_does(house: Path) -> None:
    """One line a stage before its work, and pip's own progress; nothing when all is done."""
    _, asked, shown = make_and_listen(house, "slow")
    lines = [line for line in shown.splitlines() if re.match(r"\[\d/\d\]|\S+ -m pip", line)]
    assert [line[:5] if line[0] == "[" else "pip" for line in lines] == [
        "[1/3]",
        "[2/3]",
        "pip",
        "[3/3]",
        "pip",
    ]
    assert not any("-q" in line.split() or "--quiet" in line for line in asked)
    assert "[" not in make_and_listen(house, "slow")[2]


def test_set_up_runs_once_and_needs_no_network_afterwards(house: Path) -> None:
    code, first = make(house)
    assert code == 0
    assert [("requirements.lock" in line, "--editable" in line, "pytest" in line) for line in first] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    assert make(house) == (0, ["-m pytest -m slow"])


def test_interrupted_set_up_is_made_anew(house: Path) -> None:
    (house / "failure").touch()
    code, _ = make(house)
    assert code != 0
    leftover = house / ".venv" / "half"
    leftover.touch()
    assert make(house)[0] != 0  # still failing, and still not believed complete
    assert not leftover.exists()
    (house / "failure").unlink()
    leftover.touch()
    code, steps = make(house)
    assert code == 0
    assert len(steps) == 3
    assert not leftover.exists()


def test_failed_build_of_the_package_is_tried_again(house: Path) -> None:
    assert make(house)[0] == 0
    (house / "failure").touch()
    (house / "ops" / "kernel.cpp").write_text("changed")
    assert make(house)[0] != 0
    (house / "failure").unlink()
    code, steps = make(house)
    assert code == 0
    assert ["--editable" in line for line in steps] == [True, False]


@pytest.mark.parametrize(
    ("changed", "steps"),
    [("requirements.lock", 3), ("setup.py", 2), ("pyproject.toml", 2), ("ops/kernel.cpp", 2)],
)
def test_changes_redo_what_depends_on_them_in_place(house: Path, changed: str, steps: int) -> None:
    assert make(house)[0] == 0
    kept = house / ".venv" / "kept"
    kept.touch()
    future = (house / ".venv" / "package.stamp").stat().st_mtime + 10
    os.utime(house / changed, (future, future))
    code, done = make(house)
    assert (code, len(done)) == (0, steps)
    assert kept.exists()


def test_wrong_python_is_refused_with_a_message(house: Path) -> None:
    (house / "fake_python").write_text("#!/bin/sh\nexit 1\n")
    done = subprocess.run(
        ["make", "install", f"PYTHON={house / 'fake_python'}"], cwd=house, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "is not Python 3.10 to 3.12" in done.stderr
    assert not (house / ".venv").exists()


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_readme_names_only_commands_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`?make ([a-z][a-z-]*)", text))
    assert {"demo", "test", "lint", "slow", "install"} <= named <= make_targets()
    for tool in set(re.findall(r"\btools/(\w+\.py)", text)):
        assert (ROOT / "tools" / tool).is_file(), f"README names tools/{tool}"
    for module in set(re.findall(r"python -m (bevperception[\w.]*)", text)):
        assert importlib.util.find_spec(f"{module}.__main__") or importlib.util.find_spec(module)
    for path in set(re.findall(r"`((?:bevperception|tools|tests|configs|ops)/[\w/.]*)`", text)):
        assert (ROOT / path).exists(), f"README names {path}"
    for name in ("requirements.lock", "requirements-log.lock", "LICENSE"):
        assert name in text
        assert (ROOT / name).is_file()


def test_makefile_describes_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    described = set(re.findall(r'"make ([\w-]+) ', text))
    assert described == make_targets() - {"help"}
    assert set(" ".join(re.findall(r"\.PHONY: (.*)", text)).split()) == make_targets()


def test_ci_runs_lint_and_tests_and_stops_at_a_failure() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert [line for line in lines if line.startswith("make")] == [
        "make lint",
        "make cuda",
        "make test",
        "make package",
    ]


def test_workflows_run_ci_on_every_supported_python() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    supported = re.findall(r"python(3\.\d+)", (ROOT / "Makefile").read_text())
    assert sorted(set(supported)) == jobs["checks"]["strategy"]["matrix"]["python"]
    assert jobs["installed"]["strategy"]["matrix"]["python"] == jobs["checks"]["strategy"]["matrix"]["python"]
    steps = [str(step.get("run", "")) for job in jobs.values() for step in job["steps"]]
    assert ".ci/run" in steps
    for command in steps:
        for script in re.findall(r"\.ci/\S+", command):
            assert (ROOT / script).is_file(), script
    assert PROJECT["requires-python"] == ">=3.10"
    for template in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(template.read_text()), template


def test_hooks_are_those_of_make_lint() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    programs = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in local["hooks"]}
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    assert programs == set(re.findall(r"\$\(BIN\)/(\w+)", lint)) == {"ruff", "mypy"}


def test_version_has_one_home_and_an_entry_in_the_change_log() -> None:
    assert PROJECT["dynamic"] == ["version"]
    version = bevperception.__version__
    log = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(
        rf"^## \[(Unreleased\] \({version}\)|{version}\] - 20\d\d-\d\d-\d\d)$", log, re.MULTILINE
    )
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


def definitions(path: Path) -> set[str]:
    """Functions of a file, and methods as ``Class.method``."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found.update(
                f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)
            )
    return found


def test_walks_through_the_code_can_be_followed() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (.+?) \|", text, re.MULTILINE)
    assert len(rows) >= 30
    for path, functions in rows:
        named = re.findall(r"`([\w.]+)`", functions)
        assert named
        lost = set(named) - definitions(ROOT / path)
        assert not lost, f"CONTRIBUTING names {', '.join(lost)} in {path}"
    for path in re.findall(r"`((?:bevperception|configs|ops|ros2_ws|tests|\.ci)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), f"CONTRIBUTING names {path}"
    for target in re.findall(r"\bmake ([a-z][a-z-]*)", text):
        assert target in make_targets()


def test_licence_is_apache_2() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_names_a_machine_or_a_registry() -> None:
    hosts = "|".join(["py" + "pi.org", "python" + "hosted", "index" + "-url", "find" + "-links"])
    forbidden = re.compile(rf"(?<![\w./-])/(?:work|root|home/\w+)/|\b(?:{hosts})\b")
    found = []
    for path in tracked_files():
        if path.suffix in (".npz", ".png", ".safetensors"):
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            if forbidden.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_nothing_of_the_real_key_frame_is_tracked() -> None:
    pictures = ROOT / "bevperception" / "world" / "pictures"  # of the procedural world
    names = [path.name for path in tracked_files() if path.parent != pictures]
    assert not [name for name in names if name.endswith((".jpg", ".pcd.bin", ".mp4"))]
    assert not [name for name in names if re.match(r"n0\d\d-20", name)]


FLOORS = (
    {"errors", "malloc", "taxonomy"},
    {"config_files", "config_help", "documents", "files", "geometry", "names", "processes", "ranges"},
    {"config", "config_heads", "config_limits", "config_migration", "config_model"}
    | {"structures", "can_bus", "distributed", "calibration"},
    {"ops", "config_io", "frame_checks", "world"},
    {"models", "data"},
    {"checkpoints", "inference", "visualization"},
    {"evaluation", "streaming"},
    {"training", "bags"},
    {"benchmarks"},
    {"doctor"},
    {"cli", "__main__"},
)
"""The parts of the package from the deepest up, as README claims; a part imports none that lies higher."""
LAYERS = {part: depth for depth, floor in enumerate(FLOORS) for part in floor}


ROS_PACKAGES = {
    "rclpy",
    "bev_perception",
    "builtin_interfaces",
    "rcl_interfaces",
    "vision_msgs",
    "tf2_msgs",
} | {f"{name}_msgs" for name in ("diagnostic", "geometry", "nav", "sensor", "std", "visualization")}


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def part_of(dotted: str) -> str:
    return dotted.split(".")[1] if dotted.startswith("bevperception.") else ""


def test_imports_point_one_way() -> None:
    wrong: list[str] = []
    beside: dict[str, set[str]] = {}
    for path in sorted((ROOT / "bevperception").rglob("*.py")):
        part = path.relative_to(ROOT / "bevperception").parts[0].removesuffix(".py")
        same_floor = beside.setdefault(part, set())
        for name in imports_of(path):
            other = part_of(name)
            if part in LAYERS and LAYERS.get(other, -1) > LAYERS[part]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            if other != part and LAYERS.get(other, -1) == LAYERS.get(part):
                same_floor.add(other)
            if {part, other} == {"models", "data"}:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            if name.split(".")[0] in ROS_PACKAGES | {"tools", "ros2_ws", "tests"}:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []
    assert set(beside) - {"__init__"} == set(LAYERS), "a part has no floor"
    graphlib.TopologicalSorter(beside).prepare()  # raises if parts of one floor import each other in a circle


def test_functions_are_short_and_take_few_parameters() -> None:
    long, many = [], []
    for folder in ("bevperception", "tools", "ros2_ws"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.FunctionDef):
                    continue
                where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                if (node.end_lineno or 0) - node.lineno + 1 > 70:
                    long.append(where)
                if node.name == "__init__" and len(node.args.args) + len(node.args.kwonlyargs) > 9:
                    many.append(where)
    assert long == []
    assert many == []
    assert len((ROOT / "bevperception/models/bevformer.py").read_text().splitlines()) <= 260
