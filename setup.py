"""Builds the native operators, if there is a C++ compiler; everything else is in pyproject.toml.

BEVPERCEPTION_CUDA: 1 builds the CUDA kernels too, 0 does not; unset: if PyTorch has CUDA and nvcc is found.
BEVPERCEPTION_CUDA_ARCHS: what for, such as "80 90"; all that are known otherwise.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SOURCES = Path("ops") / "csrc"

# The oldest PyTorch that the library loads into: 2.10, as its stable ABI counts.
TORCH_TARGET_VERSION = "0x020a000000000000"

COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # Without these two, floor() and comparisons are not vectorised.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
]
AVX512_FLAGS = [
    "-mavx512f",
    "-mavx512vl",
    "-mavx512bw",
    "-mavx512dq",
    "-mfma",
    "-mprefer-vector-width=512",
]
ISA_FLAGS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma"],
    "isa_avx512.cpp": AVX512_FLAGS,
}

CUDA_SOURCES = SOURCES / "cuda"
CUDA_ARCHS = "75 80 86 89 90 100 120"
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def find_nvcc() -> Path | None:
    """The CUDA compiler: that of CUDA_HOME, the PATH's, or the usual place's."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((Path(found) for place in places if (found := shutil.which(place))), None)


def wants_cuda() -> bool:
    """Whether the CUDA kernels are to be built."""
    asked = os.environ.get("BEVPERCEPTION_CUDA", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"BEVPERCEPTION_CUDA must be 0, 1 or unset, got {asked!r}")
    if asked == "1" and find_nvcc() is None:
        raise FileNotFoundError("BEVPERCEPTION_CUDA=1, but nvcc is neither in CUDA_HOME nor in the PATH")
    if asked:
        return asked == "1"
    import torch

    return torch.version.cuda is not None and find_nvcc() is not None


def cuda_library_folder(nvcc: Path) -> Path:
    """Where libcudart_static.a lies; nvcc itself may be a link or a script that calls the real one."""
    dryrun = subprocess.run(
        [str(nvcc), "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    tops = [line.split("=", 1)[1].strip() for line in dryrun.stderr.splitlines() if "TOP=" in line]
    homes = [Path(top) for top in tops] + [nvcc.resolve().parent.parent, Path("/usr/local/cuda")]
    folders = [home / name for home in homes for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
    for folder in folders:
        if (folder / "libcudart_static.a").is_file():
            return folder
    raise FileNotFoundError(f"libcudart_static.a is in none of {', '.join(map(str, folders))}")


def nvcc_command(nvcc: Path, source: Path | str, target: Path | str, archs: list[str]) -> list[str]:
    """How a kernel source is compiled: machine code for all architectures, and the last one's PTX."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    # The blanks are the string's own: the macro becomes a literal.
    named = f"-DBEV_CUDA_ARCHS={' '.join(archs)}"
    return [str(nvcc), *NVCC_FLAGS, *codes, named, "-c", str(source), "-o", str(target)]


def native_extension() -> Extension:
    """The library of all native operators."""
    sources = [*ROOT.glob(f"{SOURCES}/binding/*.cpp"), *ROOT.glob(f"{SOURCES}/cpu/*.cpp")]
    if platform.machine() not in ("x86_64", "AMD64"):
        sources = [source for source in sources if source.name not in ISA_FLAGS]
    headers = ROOT.glob(f"{SOURCES}/**/*.h")
    return Extension(
        "bevperception._C",
        sorted(str(source.relative_to(ROOT)) for source in sources),
        depends=["setup.py", *sorted(str(header.relative_to(ROOT)) for header in headers)],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("Py_LIMITED_API", "0x030a0000")],
        py_limited_api=True,
        language="c++",
    )


class BuildNative(build_ext):
    """Compiles the sources side by side, each with its own flags; a failure is a warning."""

    def run(self) -> None:
        try:
            if wants_cuda():
                for extension in self.extensions:
                    extension.sources.append(str(CUDA_SOURCES / "binding.cpp"))
            super().run()
        except Exception as error:
            self._warn(textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ..."))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        with_cuda = str(CUDA_SOURCES / "binding.cpp") in ext.sources
        if not self.force and target.is_file() and not with_cuda:
            built = target.stat().st_mtime
            if all(Path(path).stat().st_mtime < built for path in (*ext.sources, *ext.depends)):
                return
        import torch

        torch_folder = Path(torch.__file__).parent
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            kernels = pool.map(self._compile_kernels, sorted(CUDA_SOURCES.glob("*.cu")) if with_cuda else [])
            objects = list(pool.map(lambda source: self._compile(source, ext, torch_folder), ext.sources))
            objects.extend(kernels)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a running process may have the old library mapped.
        partial = target.with_name(f"{target.name}.partial{os.getpid()}")
        self.compiler.link_shared_object(
            objects,
            str(partial),
            libraries=["torch_cpu", *(["cudart_static", "dl", "rt", "pthread"] if with_cuda else [])],
            library_dirs=[str(torch_folder / "lib"), *self._cuda_folders(with_cuda)],
            target_lang="c++",
        )
        partial.replace(target)

    def _compile(self, source: str, ext: Extension, torch_folder: Path) -> str:
        objects = self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            macros=ext.define_macros,
            include_dirs=[],
            extra_postargs=[
                "-isystem",
                str(torch_folder / "include"),
                *COMPILE_FLAGS,
                *ISA_FLAGS.get(Path(source).name, []),
            ],
        )
        return objects[0]

    def _compile_kernels(self, source: Path) -> str:
        nvcc = find_nvcc()
        assert nvcc is not None
        target = Path(self.build_temp) / f"{source.name}.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        archs = os.environ.get("BEVPERCEPTION_CUDA_ARCHS", CUDA_ARCHS).split()
        subprocess.run(nvcc_command(nvcc, source, target, archs), check=True)
        return str(target)

    def _cuda_folders(self, with_cuda: bool) -> list[str]:
        nvcc = find_nvcc() if with_cuda else None
        return [str(cuda_library_folder(nvcc))] if nvcc else []

    def _warn(self, why: str) -> None:
        print(
            "\nWARNING: the native operators of bevperception were not built, so deformable attention and\n"
            "DCNv3 will run as plain PyTorch, about 10 times slower. Everything else works.\n"
            f"Reason (the compiler's own words, if any, are above): {why}\n"
            "To build them, install a C++ compiler (g++ 12 or clang 15, or newer) and run:\n"
            "    pip install -e . --no-build-isolation\n",
            file=sys.stderr,
        )

    def copy_extensions_to_source(self) -> None:
        if all(Path(self.build_lib, self.get_ext_filename(ext.name)).is_file() for ext in self.extensions):
            super().copy_extensions_to_source()


class BuildPackage(build_py):
    """Puts the configurations into the wheel; in a checkout the library finds them beside the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "bevperception" / "configs"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "configs", target)


setup(
    ext_modules=[native_extension()],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPackage},
    # The library uses the limited API of Python 3.10: one wheel for all versions from there on.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
