"""Hostile arguments to the native operators: refused or served, in code built with sanitizers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.ops.problems import ISAS, needs_native

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "ops" / "csrc"
TORCH = Path(torch.__file__).parent
CALLS = 3000
FLAGS = [
    # Not optimised: with the sanitizers that takes a third of the compiler's time, and every access is made.
    *("-std=c++17", "-O0", "-g1", "-fPIC", "-fno-omit-frame-pointer", "-fno-math-errno"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-Wno-psabi"),
    "--param=asan-instrumentation-with-call-threshold=0",  # checks by calls: less to compile
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
AVX512_FLAGS = [*(f"-mavx512{part}" for part in ("f", "vl", "bw", "dq")), "-mfma"]
FLAGS_OF = {
    "isa_avx2.cpp": ["-mavx2", "-mfma"],
    "isa_avx512.cpp": AVX512_FLAGS,
}


def find_runtime(name: str) -> str | None:
    """A library of the compiler's own; None where it has none."""
    if shutil.which("g++") is None:
        return None
    command = ["g++", f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return path if Path(path).is_absolute() else None


needs_sanitizers = pytest.mark.skipif(
    find_runtime("libasan.so") is None or platform.machine() not in ("x86_64", "AMD64"),
    reason="needs g++ with its sanitizers, on x86-64",
)


def build(sources: Path, names: list[str], folder: Path) -> list[Path]:
    """Compile files of a tree of sources, two at a time; their objects."""

    def compile_one(name: str) -> Path:
        target = folder / f"{Path(name).name}.o"
        flags = [*FLAGS, *FLAGS_OF.get(Path(name).name, []), "-isystem", str(TORCH / "include")]
        subprocess.run(["g++", *flags, "-c", str(sources / name), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, names))


def link(objects: list[Path], target: Path) -> Path:
    """One library of objects."""
    command = ["g++", "-shared", "-fsanitize=address,undefined", *map(str, objects), "-o", str(target)]
    subprocess.run([*command, f"-L{TORCH / 'lib'}", "-ltorch_cpu"], check=True)
    return target


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with sanitizers; its objects lie beside it."""
    folder = tmp_path_factory.mktemp("sanitized")
    names = [
        f"{folder}/{path.name}" for folder in ("binding", "cpu") for path in (SOURCES / folder).glob("*.cpp")
    ]
    return link(build(SOURCES, names, folder), folder / "operators.so")


def run(program: str, library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program beside this file on a library built with sanitizers."""
    runtimes = [find_runtime("libasan.so"), find_runtime("libstdc++.so")]
    return subprocess.run(
        [sys.executable, str(ROOT / "tests" / "ops" / program), str(library), *arguments],
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(filter(None, runtimes)),
            # Python itself leaks what it keeps to its end.
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def hostile_calls(sanitized: Path) -> subprocess.CompletedProcess[str]:
    """With every instruction set: one process for all, since to start it takes longer than the calls."""
    return run("hostile.py", sanitized, str(CALLS), *ISAS)


@needs_native
@needs_sanitizers
@pytest.mark.parametrize("isa", ISAS)
def test_hostile_calls_are_refused_or_served(
    hostile_calls: subprocess.CompletedProcess[str], isa: str
) -> None:
    lines = {line.split()[0]: line.split()[1:] for line in hostile_calls.stdout.splitlines()}
    assert isa in lines, hostile_calls.stderr[-4000:]
    _, ran, _, refused = lines[isa]
    assert int(ran) + int(refused) == CALLS
    assert min(int(ran), int(refused)) > CALLS // 5


@needs_native
@needs_sanitizers
def test_the_process_survives_the_hostile_calls(hostile_calls: subprocess.CompletedProcess[str]) -> None:
    assert hostile_calls.returncode == 0, hostile_calls.stderr[-4000:]


@needs_native
@needs_sanitizers
def test_a_planted_read_beyond_the_map_is_caught(sanitized: Path, tmp_path: Path) -> None:
    planted = tmp_path / "csrc"
    shutil.copytree(SOURCES, planted)
    header = planted / "common" / "bilinear.h"
    clamp = "sample.high = sample.high < cells ? sample.high : cells - 1;"
    text = header.read_text()
    assert text.count(clamp) == 1
    header.write_text(text.replace(clamp, ""))
    wrong = build(planted, ["cpu/isa_baseline.cpp"], tmp_path)
    right = [path for path in sanitized.parent.glob("*.o") if path.name != wrong[0].name]
    done = run("hostile.py", link([*right, *wrong], tmp_path / "planted.so"), str(CALLS), "baseline")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
