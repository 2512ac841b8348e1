"""The configuration files that come with the package: where they lie, and how a name finds one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_PACKAGE: Final = Path(__file__).resolve().parent
_SUFFIX: Final = ".yaml"

CONFIG_FOLDER: Final = next(
    (folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()),
    _PACKAGE / "configs",
)
"""``configs/``: inside an installed package, beside it in a checkout."""


def config_path(given: str | Path, folder: Path | None = None) -> Path:
    """The file that a user names: a path, or the name of a shipped configuration.

    Args:
        given: a path, which wins where there is such a file; or ``world_micro``, ``backbones/internimage_t``
            or ``configs/world_micro.yaml``, wherever the program runs.
        folder: that the path is relative to; None for the working directory.

    Returns:
        The path in its folder where no shipped file is of that name, too.
    """
    path = Path(given) if folder is None else folder / given
    parts = Path(given).parts
    there = os.path.exists(path) and not os.path.isdir(path)
    if there or not parts or ".." in parts or Path(given).is_absolute():
        return path
    if parts[0] == CONFIG_FOLDER.name:
        parts = parts[1:]
    shipped = os.path.join(CONFIG_FOLDER, *parts)
    if not shipped.endswith(_SUFFIX):
        shipped += _SUFFIX
    return Path(shipped) if os.path.isfile(shipped) else path


def shipped_configs() -> dict[str, Path]:
    """The shipped configurations by name, such as ``backbones/internimage_s``; plans are not among them."""
    files = sorted([*CONFIG_FOLDER.glob(f"*{_SUFFIX}"), *CONFIG_FOLDER.glob(f"backbones/*{_SUFFIX}")])
    return {path.relative_to(CONFIG_FOLDER).with_suffix("").as_posix(): path for path in files}
