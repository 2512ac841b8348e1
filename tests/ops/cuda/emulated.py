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
    *("-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-DBEV_EMULATOR"),
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"),
]
# Without optimisation the sanitizers take a third of the compiler's time, and every access is made.
SANITIZERS = [
    *("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"),
]
UNITS = (
    *("csrc/cuda/deform_attn.cu", "csrc/cuda/ms_deform_attn.cu", "csrc/cuda/dcnv3.cu"),
    *("csrc/cuda/binding.cpp", "emulator/emulated.cpp"),
)
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


def compile_emulated(
    folder: Path, sanitize: bool = False, sources: Path = ROOT / "ops", units: tuple[str, ...] = UNITS
) -> list[Path]:
    """Compile kernels and binding with g++, two at a time; their objects.

    Args:
        folder: where the objects go.
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer.
        sources: the folder ``ops`` or a copy of it.
        units: what to compile.
    """
    headers = cuda_headers()
    assert headers is not None
    flags = [*FLAGS, *(SANITIZERS if sanitize else ["-O1"])]
    flags += ["-isystem", str(TORCH / "include"), "-isystem", str(headers)]
    flags += ["-include", str(sources / "emulator" / "emulator.h")]

    def compile_one(name: str) -> Path:
        target = folder / f"{Path(name).stem}.o"
        command = ["g++", *flags, "-x", "c++", "-c", str(sources / name), "-o", str(target)]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, units))


def link_emulated(objects: list[Path], library: Path, sanitize: bool = False) -> Path:
    """One library of the objects of all units."""
    extra = ["-fsanitize=address,undefined"] if sanitize else []
    command = ["g++", "-shared", *extra, *map(str, objects), "-o", str(library)]
    subprocess.run([*command, f"-L{TORCH / 'lib'}", "-ltorch_cpu"], check=True)
    return library


def set_order(library: Path, order: str) -> None:
    """In which order the emulator gives the threads of a block their turns; a key of ORDERS."""
    ctypes.CDLL(str(library)).bev_emulator_set_order(ORDERS[order])
