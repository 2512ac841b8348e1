"""Where converted weights came from: what it takes to write the published file again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from bevperception.errors import CheckpointError

ORIGIN_KEY = "origin"
"""Key of the metadata of weights.safetensors."""
KEPT_PREFIX = "official."
"""Beginning of the names of published tensors that are no weights here; the rest is the published name."""


@dataclass(frozen=True)
class Origin:
    """The form of a published file.

    Attributes:
        prefix: before every name.
        wrapper: key that the tensors stand under; None for none.
        parts: published beginnings of a backbone's and its neck's names; None for a whole BEVFormer.
        added: weights that the published file does not have.
    """

    prefix: str = ""
    wrapper: str | None = "state_dict"
    parts: tuple[str, ...] | None = None
    added: tuple[str, ...] = ()

    def to_json(self) -> str:
        """For the metadata of weights."""
        return json.dumps(asdict(self))


def read_origin(path: Path) -> tuple[Origin, dict[str, Tensor]]:
    """The origin of weights and the published tensors that are kept beside them.

    Args:
        path: weights as a file. Those that were not converted have the form of published files, and nothing
            is kept beside them.

    Raises:
        CheckpointError: the origin is damaged.
    """
    if path.suffix != ".safetensors":
        return Origin(), {}
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(ORIGIN_KEY)
        names = [name for name in file.keys() if name.startswith(KEPT_PREFIX)]  # noqa: SIM118
        kept = {name.removeprefix(KEPT_PREFIX): file.get_tensor(name) for name in names}
    return (Origin() if text is None else _parsed(text, path)), kept


def _parsed(text: str, path: Path) -> Origin:
    try:
        values = json.loads(text)
        prefix, wrapper, parts, added = (values[key] for key in ("prefix", "wrapper", "parts", "added"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"the origin inside {path} is damaged: {str(error)[:100]}") from None
    lists = [[] if parts is None else parts, added]
    texts = [prefix, "" if wrapper is None else wrapper, *(lists[0] or []), *(lists[1] or [])]
    if not all(isinstance(some, list) for some in lists) or not all(isinstance(t, str) for t in texts):
        raise CheckpointError(f"the origin inside {path} is damaged: texts are expected")
    return Origin(prefix, wrapper, None if parts is None else tuple(parts), tuple(added))
