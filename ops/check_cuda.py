"""Compiles the CUDA kernels for every architecture and reads what the compiler made of them.

    python ops/check_cuda.py [--archs "80 90"] [--write]

Nothing runs on a GPU. It fails if a fast path (16 bytes a load; float64, which exists for checks, is none)
spills registers, uses local memory, or has no such loads. With --write the table of computed figures goes
into ops/README.md. The disassembler is NVIDIA's nvdisasm; without it loads are not looked at, which is said.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

OPS = Path(__file__).resolve().parent
SOURCES = OPS / "csrc" / "cuda"
ARCHS = ("75", "80", "86", "89", "90", "100", "120")
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v"]
BEGIN, END = "<!-- computed: begin -->\n", "<!-- computed: end -->\n"
SHOWN = "90"
"""The architecture of the table."""

THREADS, WARP = 256, 32
REGISTERS, WARPS, SHARED_BYTES = 65536, 64, 227 * 1024  # of a multiprocessor of compute capability 9.0


@dataclass(frozen=True)
class Kernel:
    """What the compiler says of a kernel for one architecture."""

    name: str
    arch: str
    registers: int
    spilled_bytes: int
    shared_bytes: int

    @property
    def is_fast(self) -> bool:
        """Whether it moves 16 bytes a load (see WIDE in gather.cuh) of float32 or less."""
        if "<double>" in self.name:
            return False
        wide = re.search(r"_kernel<.*?, (\d+)(?:, (?:true|false))?>$", self.name)
        return wide is not None and int(wide.group(1)) > 1

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's warps that registers and shared memory allow, by calculation."""
        per_warp = -(-self.registers * WARP // 256) * 256
        by_registers = REGISTERS // per_warp // (THREADS // WARP)
        by_memory = SHARED_BYTES // (self.shared_bytes + 1024)
        blocks = min(by_registers, by_memory, WARPS * WARP // THREADS)
        return blocks * THREADS / (WARPS * WARP)


def find_tool(name: str, extra: Path | None = None) -> str | None:
    """A program in the PATH, in CUDA's usual place or in a folder."""
    places = [name, f"/usr/local/cuda/bin/{name}", *([str(extra / name)] if extra else [])]
    return next((found for place in places if (found := shutil.which(place))), None)


def demangle(names: list[str]) -> dict[str, str]:
    """Readable names, without namespaces and arguments."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    lines = (re.sub(r"^void |bevperception::cuda::", "", line) for line in done.stdout.splitlines())
    return {name: line.split(">(")[0] + ">" for name, line in zip(names, lines, strict=True)}


def parse_report(report: str, arch: str) -> list[Kernel]:
    """Kernels from the words of ``ptxas -v``."""
    parts = re.findall(
        r"Compiling entry function '(\S+)' for.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        report,
        re.DOTALL,
    )
    names = demangle([part[0] for part in parts])
    kernels = []
    for mangled, _, stores, loads, registers, rest in parts:
        shared = re.search(r"(\d+) bytes smem", rest)
        spilled = int(stores) + int(loads)
        shared_bytes = int(shared.group(1)) if shared else 0
        kernels.append(Kernel(names[mangled], arch, int(registers), spilled, shared_bytes))
    return kernels


def compile_one(nvcc: str, source: Path, arch: str, folder: Path) -> tuple[list[Kernel], Path]:
    """One source for one architecture: its kernels and its machine code."""
    target = folder / f"{source.stem}.{arch}.cubin"
    command = [nvcc, *FLAGS, f"-arch=sm_{arch}", "-cubin", "-o", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {source.name} does not compile for sm_{arch}\n{done.stderr}")
    return parse_report(done.stderr, arch), target


def narrow_gathers(disassembler: str, cubin: Path) -> Iterator[str]:
    """What is wrong with the loads of the fast paths in a file of machine code."""
    done = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True)
    sections = re.split(r"\n\s*\.section\s+\.text\.", done.stdout)[1:]
    mangled = [re.match(r"[\w$]+", section) for section in sections]
    names = demangle([match.group(0) if match else "?" for match in mangled])
    for section, name in zip(sections, names.values(), strict=True):
        if not Kernel(name, "", 0, 0, 0).is_fast:
            continue
        if "LDG.E.128" not in section:
            yield f"{cubin.name}: {name} has no loads of 16 bytes"
        if re.search(r"\b(LDL|STL)\b", section):
            yield f"{cubin.name}: {name} uses local memory"


def table(kernels: list[Kernel]) -> str:
    """The figures of the fast paths, as Markdown."""
    lines = [
        f"Computed from the compiler's report for sm_{SHOWN}, not measured: occupancy is what registers and",
        "shared memory allow.",
        "",
        "| kernel | registers | shared memory | occupancy |",
        "| --- | --- | --- | --- |",
    ]
    shown = sorted((k for k in kernels if k.arch == SHOWN and k.is_fast), key=lambda k: k.name)
    for kernel in shown:
        numbers = f"{kernel.registers} | {kernel.shared_bytes} B | {100 * kernel.occupancy:.0f} %"
        lines.append(f"| `{kernel.name}` | {numbers} |")
    return "\n".join(lines) + "\n"


GPUS = {"A100 80 GB": (2.04e12, 19.5e12), "H100 SXM": (3.35e12, 67e12)}
"""Bytes and float32 operations a second, as NVIDIA states them."""
POINT_OPERATIONS = 40
"""Of one sampling point besides its channels: position, corners, weights; about."""


def rooflines() -> str:
    """Least times of the forwards in float32 by calculation, as Markdown."""
    from bevperception.benchmarks.ops_cases import CASES, AttentionCase, ConvolutionCase

    lines = [
        "Roofline of the forward in float32, by calculation from data sheets, not measured: the larger of",
        "compulsory bytes (each tensor once) by bandwidth and operations by peak.",
        "",
        f"| case | MB | million operations | bytes gathered a point | {' | '.join(GPUS)} |",
        "| --- | --- | --- | --- |" + " --- |" * len(GPUS),
    ]
    for key, case in CASES.items():
        if isinstance(case, AttentionCase):
            rows, channels = case.batch * (case.queries or case.cells) * 8, 32
            points = rows * len(case.shapes) * case.points
            numbers = case.batch * case.cells * 8 * channels
        elif isinstance(case, ConvolutionCase):
            rows, channels = case.batch * case.height * case.width * case.groups, 16
            points, numbers = 9 * rows, rows * channels
        else:
            continue
        moved = 4 * (numbers + 3 * points + rows * channels)
        operations = points * (8 * channels + POINT_OPERATIONS)
        times = [max(moved / bandwidth, operations / peak) for bandwidth, peak in GPUS.values()]
        shown = " | ".join(f"{1e3 * seconds:.3f} ms" for seconds in times)
        gathered = 4 * channels * 4
        lines.append(
            f"| `{case.operator}` {key} | {moved / 1e6:.1f} | {operations / 1e6:.0f} | {gathered} | {shown} |"
        )
    return "\n".join(lines) + "\n"


def write_table(kernels: list[Kernel]) -> None:
    """Put the tables between its marks in ops/README.md."""
    readme = OPS / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    partial = readme.with_name(f".{readme.name}.partial")
    partial.write_text(f"{before}{BEGIN}{table(kernels)}\n{rooflines()}{END}{after}", encoding="utf-8")
    partial.replace(readme)


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archs", default=" ".join(ARCHS), help="default: %(default)s")
    parser.add_argument("--tools", type=Path, help="folder with nvdisasm, if it is not in the PATH")
    parser.add_argument("--write", action="store_true", help="write the table into ops/README.md")
    options = parser.parse_args()
    nvcc = find_tool("nvcc")
    if nvcc is None:
        print(
            "skipped: the CUDA kernels are not checked, as there is no nvcc in the PATH or in /usr/local/cuda"
        )
        return 0
    disassembler = find_tool("nvdisasm", options.tools)
    archs, sources = options.archs.split(), sorted(SOURCES.glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [(source, arch) for arch in archs for source in sources]
        done = list(pool.map(lambda job: compile_one(nvcc, *job, Path(folder)), jobs))
        kernels = [kernel for found, _ in done for kernel in found]
        faults = [
            f"sm_{k.arch}: {k.name} spills {k.spilled_bytes} bytes"
            for k in kernels
            if k.is_fast and k.spilled_bytes
        ]
        if disassembler is not None:
            checked = pool.map(lambda item: list(narrow_gathers(disassembler, item[1])), done)
            faults += [fault for found in checked for fault in found]
    for fault in faults:
        print(f"FAIL  {fault}")
    fast = sum(kernel.is_fast for kernel in kernels)
    loads = "loads of 16 bytes" if disassembler else "loads not looked at (nvdisasm is missing)"
    passed = f"{fast} of them fast paths: no spills, {loads}"
    result = f"{len(faults)} faults" if faults else passed
    print(f"{len(kernels)} kernels for {len(archs)} architectures, {result}")
    if options.write:
        write_table(kernels)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
