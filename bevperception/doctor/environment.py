"""Report what is installed on this machine, and which operators run on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

PACKAGES: Final = (
    *("torch", "numpy", "nuscenes-devkit", "lightning", "jsonargparse", "opencv-python-headless"),
    *("scipy", "shapely", "safetensors", "tensorboard"),
)


def environment() -> list[tuple[str, str]]:
    """Report the versions and the hardware that this package runs on.

    Returns:
        (name, value) pairs in the order of printing.
    """
    rows = [("python", f"{platform.python_version()}  {sys.executable}"), ("platform", platform.platform())]
    rows += [(package, _version(package)) for package in PACKAGES]
    rows.append(("C++ compiler", _compiler()))
    rows.append(("CPU", f"{_cpu_name()}, {_usable_cores()} cores usable"))
    if importlib.util.find_spec("torch") is None:
        return rows
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    threads = os.environ.get("OMP_NUM_THREADS")
    limit = "OMP_NUM_THREADS is not set" if threads is None else f"OMP_NUM_THREADS={threads}"
    rows.append(("vector units", f"{capability} (what torch uses)"))
    rows.append(("threads", f"{torch.get_num_threads()} in torch; {limit}"))
    rows.append(("GPU", _gpu()))
    return rows


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiler() -> str:
    name = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if name is None:
        return "none found; the native operators cannot be built"
    try:
        shown = subprocess.run([*name.split(), "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{name} does not run ({error})"
    return shown.stdout.partition("\n")[0] or f"{name} says nothing to --version"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpu() -> str:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{', '.join(names)}; CUDA {torch.version.cuda}"
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        return "a driver is there, but this torch is a CPU build; install a CUDA build to use it"
    return "none" + (" (CPU build of torch)" if torch.version.cuda is None else "")


def operators() -> list[tuple[str, str]]:
    """Report which implementation each operator uses, and why.

    Returns:
        (operator, backend) pairs, and the reasons after them.

    Raises:
        ConfigError: if the environment asks for an unknown backend.
    """
    if importlib.util.find_spec("torch") is None:
        return [("all", "torch is not installed: run `make install`")]
    from bevperception.ops import backend_report

    report = backend_report().operators
    rows = [(o.operator, o.backend.value) for o in report]
    return rows + [("because", reason) for reason in dict.fromkeys(o.reason for o in report)]
