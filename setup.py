"""Builds the native operators, if there is a C++ compiler; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import platform
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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
ISA_FLAGS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma"],
    "isa_avx512.cpp": [
        "-mavx512f",
        "-mavx512vl",
        "-mavx512bw",
        "-mavx512dq",
        "-mfma",
        "-mprefer-vector-width=512",
    ],
}


def native_extension() -> Extension:
    """The library of all native operators."""
    sources = [*ROOT.glob(f"{SOURCES}/*.cpp"), *ROOT.glob(f"{SOURCES}/cpu/*.cpp")]
    if platform.machine() not in ("x86_64", "AMD64"):
        sources = [source for source in sources if source.name not in ISA_FLAGS]
    headers = ROOT.glob(f"{SOURCES}/**/*.h")
    return Extension(
        "bevperception._C",
        sorted(str(source.relative_to(ROOT)) for source in sources),
        depends=["setup.py", *sorted(str(header.relative_to(ROOT)) for header in headers)],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        py_limited_api=True,
        language="c++",
    )


class BuildNative(build_ext):
    """Compiles the sources side by side, each with its own flags; a failure is a warning."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            self._warn(textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ..."))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        inputs = [Path(path) for path in (*ext.sources, *ext.depends)]
        if not self.force and target.is_file():
            built = target.stat().st_mtime
            if all(path.stat().st_mtime < built for path in inputs):
                return
        import torch

        torch_folder = Path(torch.__file__).parent
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: self._compile(source, ext, torch_folder), ext.sources))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a running process may have the old library mapped.
        partial = target.with_name(f"{target.name}.partial{os.getpid()}")
        self.compiler.link_shared_object(
            objects,
            str(partial),
            libraries=["torch_cpu"],
            library_dirs=[str(torch_folder / "lib")],
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


setup(ext_modules=[native_extension()], cmdclass={"build_ext": BuildNative})
