"""The CUDA kernels built for the emulator, and the compilers that they need."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ROOT / "ops" / "csrc" / "cuda"
TORCH = Path(torch.__file__).parent
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-DBEV_EMULATOR"),
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"),
]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}


def find_nvcc() -> Path | None:
    """The CUDA compiler, if there is one."""
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    return Path(found).resolve() if found else None


def cuda_headers() -> Path | None:
    """Folder of cuda_fp16.h, which a C++ compiler takes too."""
    nvcc = find_nvcc()
    for folder in [nvcc.parent.parent / "include", Path("/usr/local/cuda/include")] if nvcc else []:
        if (folder / "cuda_fp16.h").is_file():
            return folder
    return None


def build_emulated(folder: Path, sanitize: bool = False, sources: Path = ROOT / "ops") -> Path:
    """Compile kernels and binding with g++.

    Args:
        folder: where the library goes.
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer.
        sources: the folder ``ops`` or a copy of it.
    """
    headers = cuda_headers()
    assert headers is not None
    flags = [*FLAGS, *(SANITIZERS if sanitize else [])]
    flags += ["-isystem", str(TORCH / "include"), "-isystem", str(headers)]

    def compile_one(name: str) -> str:
        target = folder / f"{Path(name).name}.o"
        subprocess.run(["g++", *flags, "-c", str(sources / name), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, ("csrc/cuda/binding.cpp", "emulator/emulated.cpp")))
    library = folder / "emulated.so"
    extra = SANITIZERS[:1] if sanitize else []
    command = ["g++", "-shared", *extra, *objects, "-o", str(library), f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    return library


def set_order(library: Path, order: str) -> None:
    """In which order the emulator gives the threads of a block their turns; a key of ORDERS."""
    ctypes.CDLL(str(library)).bev_emulator_set_order(ORDERS[order])
