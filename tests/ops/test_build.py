"""setup.py where there is no compiler: it succeeds, warns once and leaves the references."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_compiler_setup_succeeds_with_one_warning(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "ops", tmp_path / "ops")
    (tmp_path / "bevperception").mkdir()
    shutil.copy(ROOT / "bevperception" / "__init__.py", tmp_path / "bevperception")  # for the version
    (tmp_path / "README.md").touch()
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, "CC": "/bin/false", "CXX": "/bin/false"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("WARNING: the native operators of bevperception were not built") == 1
    assert "install a C++ compiler" in done.stderr
    assert not list(tmp_path.rglob("*.so"))
