"""Places that programs write to: tried first, full, taken by another program; and interrupted imports."""

from __future__ import annotations

import ast
import importlib.util
import io
import os
import resource
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml

from bevperception.checkpoints.weights import read_checkpoint, read_weights
from bevperception.config import ExperimentConfig
from bevperception.errors import OutputError
from bevperception.files import output_folder
from bevperception.training.checkpointing import list_checkpoints
from bevperception.training.experiment import train_experiment
from bevperception.training.logs import RunLogger
from bevperception.training.run import train
from tests.fixtures.full_disk import limited_files
from tests.training.standin import TinyModel, TinySource, no_evaluation, tiny_config

REPOSITORY = Path(__file__).resolve().parents[2]
NODE = REPOSITORY / "ros2_ws" / "src" / "bev_perception" / "bev_perception" / "main.py"
DOCTOR = REPOSITORY / "bevperception" / "doctor" / "__main__.py"
TOOLS = [*sorted((REPOSITORY / "tools").glob("*.py")), NODE, DOCTOR]

COMMANDS = {
    "train": ("train", "--config", "PLAN_CONFIG", "--data.root", "none", "--out", "OUT"),
    "evaluate": ("evaluate", "--weights", "world_micro", "--data.root", "none", "--out", "OUT"),
    "predict": ("predict", "--weights", "world_micro", "--data.root", "none", "--split", "x", "--out", "OUT"),
    "picture": ("visualize", "--data.root", "none", "--sample", "0", "--out", "OUT.png"),
    "video": ("visualize", "--data.root", "none", "--scene", "x", "--out", "OUT.mp4"),
    "ops": ("benchmark", "ops", "--cases", "i", "--json", "OUT"),
    "cameras": ("benchmark", "cameras", "--weights", "world_micro", "--data.root", "none", "--out", "OUT"),
    "deformation": (
        "benchmark",
        "deformation",
        "--weights",
        "world_micro_single",
        "--data.root",
        "none",
        "--out",
        "OUT",
    ),
    "run_plan": ("run_plan", "PLAN", "--out", "OUT"),
    "make_world": ("make_world", "--scenes", "2", "--frames", "4", "--size", "128x72", "--quiet", "OUT"),
    "demo": ("demo", "--out", "OUT"),
    "ros_demo": ("ros_demo", "--weights", "w", "--data-root", "none", "--version", "v", "--out", "OUT"),
    "ros_soak": ("ros_soak", "--weights", "w", "--bag", "none", "--out", "OUT"),
    "nuscenes_to_bag": (
        *("nuscenes_to_bag", "--data-root", "none", "--version", "v", "--scene", "x", "--out", "OUT"),
    ),
    "evaluate_bag": (
        *("evaluate_bag", "--bag", "none", "--weights", "world_micro", "--data-root", "none"),
        *("--version", "v", "--split", "s", "--out", "OUT"),
    ),
}
"""By a name: a command that would fail for its data, if it got that far."""
_NEEDS_ROSBAGS = ("nuscenes_to_bag", "evaluate_bag")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("{}")
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"runs": {"one": {"config": "config.yaml"}}}))
    return path


def run(program: str, *arguments: object) -> tuple[int, str]:
    """Run a program in this process; returns its exit code and what it said on stderr."""
    argv, error = sys.argv, io.StringIO()
    path = str(REPOSITORY / "tools" / f"{program}.py")
    sys.argv = [path, *map(str, arguments)]
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(error), pytest.raises(SystemExit) as left:
            runpy.run_path(path, run_name="__main__")
    finally:
        sys.argv = argv
    assert isinstance(left.value.code, int)
    return left.value.code, error.getvalue()


def filled_in(name: str, plan: Path, out: Path) -> list[str]:
    places = {"PLAN": str(plan), "PLAN_CONFIG": str(plan.with_name("config.yaml"))}
    return [places.get(part, part.replace("OUT", str(out))) for part in COMMANDS[name]]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    name: str, plan: Path, tmp_path: Path
) -> None:
    if name in _NEEDS_ROSBAGS and importlib.util.find_spec("rosbags") is None:
        pytest.skip("rosbags is not installed")
    (tmp_path / "thesis").write_text("a file")
    code, said = run(*filled_in(name, plan, tmp_path / "thesis" / "out"))
    assert code == 2, said
    assert "error: cannot write " in said
    assert "something else is in the way" in said
    assert "Traceback" not in said
    assert (tmp_path / "thesis").read_text() == "a file"


@pytest.mark.parametrize("name", ["train", "evaluate", "predict", "cameras", "run_plan", "demo"])
def test_a_folder_that_another_program_writes_into_is_refused(name: str, plan: Path, tmp_path: Path) -> None:
    with output_folder(tmp_path / "out"):
        code, said = run(*filled_in(name, plan, tmp_path / "out"))
    assert code == 2
    assert f"another program is writing into {tmp_path / 'out'}" in said


def test_what_fails_later_leaves_no_folder(tmp_path: Path, plan: Path) -> None:
    code, said = run(*filled_in("evaluate", plan, tmp_path / "new" / "out"))
    assert code == 2
    assert "data root" in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["results_nusc.json", "metrics.json", "metrics_summary.json"])
def test_a_folder_where_a_result_will_be_is_found_first(name: str, tmp_path: Path, plan: Path) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    code, said = run(*filled_in("evaluate", plan, tmp_path / "out"))
    assert code == 2
    assert f"{name} is a folder where a file will be written" in said


class FillsDisk(TinySource):
    """Takes the room away while sample of draw 4 is loaded: the checkpoints before it are written."""

    def __getitem__(self, item: tuple[int, int]) -> object:
        if item[1] == 4:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        return super().__getitem__(item)


def test_a_disk_that_fills_up_stops_training_and_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    config = tiny_config(steps=8, batch_size=1, checkpoint_every=1, keep_checkpoints=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    torch.manual_seed(0)
    try:
        with pytest.raises(OutputError, match=r"cannot write .*step-\d+\.ckpt: File too large\n"):
            train(config, TinyModel(), FillsDisk(), no_evaluation, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (checkpoint,) = list_checkpoints(tmp_path / "checkpoints")
    assert read_checkpoint(checkpoint)["global_step"] == 4
    assert read_weights(checkpoint).state
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [checkpoint.name]
    train(config, TinyModel(), TinySource(), no_evaluation, tmp_path, resume="auto")
    assert read_weights(tmp_path).card.step == 8


def test_a_log_on_a_full_disk_keeps_its_lines_whole(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, name="logs", flush_logs_every_n_steps=1)
    path = tmp_path / "logs" / "version_0" / "metrics.csv"

    def fill() -> None:
        for step in range(1000):
            logger.log_metrics({"loss": 1.0 / 3.0}, step)

    with limited_files(4096):
        with pytest.raises(OutputError, match=r"cannot write .*metrics\.csv: File too large"):
            fill()
        whole = path.read_text()
        assert whole.endswith("\n")
        with pytest.raises(OutputError):
            logger.log_metrics({"val/NDS": 0.5}, 2000)  # another column: all lines are written anew
    assert path.read_text() == whole


def test_a_training_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    config = ExperimentConfig()
    config.data.root = str(tmp_path / "none")
    with output_folder(tmp_path / "run"), pytest.raises(OutputError, match="another program is writing"):
        train_experiment(config, tmp_path / "run")


def module_imports(tree: ast.Module) -> Iterator[ast.stmt]:
    """Imports that run with the module, but for those under ``with importing()``."""
    for node in tree.body:
        if isinstance(node, ast.With):
            assert ast.unparse(node.items[0]) == "importing()"
        else:
            yield node


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_programs_import_what_takes_long_where_an_interrupt_is_one_word(path: Path) -> None:
    for node in module_imports(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.split(".")[0] in sys.stdlib_module_names or name == "bevperception.errors", (
                f"{path.name}: {name}"
            )


INTERRUPTED = """
import os, runpy, signal, sys

wanted, path, *arguments = sys.argv[1:]

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGINT)
            try:
                os.getpid()
            except BaseException:  # as some libraries do around their imports
                raise ImportError(name)

sys.meta_path.insert(0, Interrupt())
sys.argv = [path, *arguments]
runpy.run_path(path, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("program", "module"),
    [
        ("tools/visualize.py", "jsonargparse"),
        ("tools/evaluate.py", "torch"),
        ("tools/make_world.py", "numpy"),
        ("tools/benchmark.py", "torch"),
        ("bevperception/doctor/__main__.py", "bevperception.doctor.environment"),
        ("bevperception/__main__.py train", "jsonargparse"),
    ],
)
def test_an_interrupt_of_an_import_is_one_word(program: str, module: str) -> None:
    arguments = ["ops", "--help"] if "benchmark" in program else ["--help"]
    program, *command = program.split()
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, str(REPOSITORY / program), *command, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
