"""Convert published checkpoints to this project's weights, and back."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bevperception.errors import importing

with importing():
    from bevperception.checkpoints.conversion import Conversion, convert_back, convert_official
    from bevperception.checkpoints.tensors import left_aside, parts_of
    from bevperception.errors import CheckpointError
    from bevperception.processes import program_name

_DESCRIPTION = (
    "Convert a published checkpoint to weights of this project: BEVFormer tiny, small, base; BEVFormer v2 "
    "t1-base, t1, t2, t8; InternImage T to G; FCOS3D's backbone. No code of the file runs. Which model it "
    "is of is seen by its names."
)


def main(argv: Sequence[str] | None = None) -> int | None:
    """Parse, convert, report."""
    parser = argparse.ArgumentParser(program_name("convert"), description=_DESCRIPTION)
    parser.add_argument("source", metavar="OFFICIAL", help="the published file (.pth or .safetensors)")
    parser.add_argument("out", metavar="OUT", help="a folder, or a new .safetensors file")
    parser.add_argument(
        "--to", choices=("ours", "official"), default="ours", help="'official' goes the way back"
    )
    parser.add_argument(
        "--config",
        nargs="+",
        default=[],
        metavar="FILE",
        help="configuration of a variation of a published model",
    )
    parser.add_argument(
        "--copy",
        choices=("auto", "averaged", "training"),
        default="auto",
        help="of a file with a moving average: the average, or the weights that were trained",
    )
    options = parser.parse_args(argv)
    source, out = Path(options.source), Path(options.out)
    if out.exists() and source.exists() and out.samefile(source):
        raise CheckpointError(f"{source} cannot be written over itself: name another place")
    if options.to == "official":
        count = convert_back(options.source, out)
        print(f"wrote {out}: {count} tensors under their published names")
        return None
    print(f"reading {source}", flush=True)
    _report(convert_official(source, out, options.copy, options.config))
    return None


def _report(done: Conversion) -> None:
    """What became of every tensor, and what to do next."""
    file, match, path = done.file, done.match, done.path
    copy = ", the moving average" if file.averaged else ""
    print(f"{match.model.title}{copy}: {len(match.own)} tensors converted, 0 missing, 0 left over")
    if match.kept:
        print(f"kept for the way back only, no weights here: {left_aside(parts_of(match.kept))}")
    if file.left_out:
        print(f"not taken from the file: {left_aside(file.left_out)}")
    for note in match.notes:
        print(f"note: {note}")
    print(f"wrote {path} ({path.stat().st_size / 1e6:.0f} MB)")
    if match.model.prefixes is None:
        print(f"classes: {', '.join(match.config.model.detection.classes)}")
        print(f"evaluate it: bevperception evaluate --weights {path} --data.root FOLDER")
    else:
        print(f"start a model from it: bevperception train ... --model.backbone.weights {path}")
