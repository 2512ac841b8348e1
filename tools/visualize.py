"""Draw samples: six cameras with boxes, bird's-eye views of prediction and ground truth; PNG or MP4.

What is drawn is the ground truth, and beside it the boxes of a submission file (--predictions) or what a
model perceives (--weights).
"""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import DefaultHelpFormatter

from bevperception.checkpoints.weights import load_into, read_weights
from bevperception.config import ExperimentConfig
from bevperception.config_io import ConfigParser, ConfigSource
from bevperception.data.dataset import build_dataset
from bevperception.data.nuscenes import NuScenesReader, SceneRecord
from bevperception.errors import ConfigError, DataError, run_program
from bevperception.evaluation.runner import perceive
from bevperception.evaluation.submission import read_submission
from bevperception.inference import StreamingPredictor
from bevperception.models.bevformer import BEVFormer
from bevperception.visualization.bev import SegmentationLayers
from bevperception.visualization.compose import Opinion, PictureStyle
from bevperception.visualization.samples import SamplePainter, boxes_of_submission
from bevperception.visualization.video import write_picture, write_video

EXAMPLES = """examples:
  the ground truth of the first sample of a split:
    tools/visualize.py --data.root /data/nuscenes --data.version v1.0-mini --split mini_val --sample 0
  a sample by its token, beside the boxes of a submission file:
    tools/visualize.py --config configs/micro.yaml --sample ca9a282c9e77460f8360f564131a8af5 \\
        --predictions out/results_nusc.json --out out/sample.png
  what a model perceives over a scene, as a video:
    tools/visualize.py --weights out/run/weights.safetensors --scene scene-0103 --out out/scene.mp4
"""


class _Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the examples."""


def build_parser() -> ConfigParser:
    """The program's options; ``--data...`` and ``--model...`` are those of the configuration."""
    parser = ConfigParser(description=__doc__ or "", program="tools/visualize.py")
    parser.formatter_class = _Help
    parser.epilog = EXAMPLES
    parser.usage = "tools/visualize.py (--sample INDEX_OR_TOKEN | --scene NAME) [--config FILE] [options]"
    parser.add_argument("--sample", help="one picture: position in the split, or a sample token")
    parser.add_argument("--scene", help="a video: name of a scene of the split")
    parser.add_argument("--split", help="where samples and scenes are looked up; default: data.val_split")
    parser.add_argument("--predictions", metavar="JSON", help="submission file whose boxes are drawn")
    parser.add_argument("--weights", help="weights.safetensors, its folder or a .ckpt whose model is run")
    parser.add_argument("--out", metavar="FILE", help=".png or .mp4; default: under out/visualize/")
    parser.add_argument("--score", type=float, default=0.3, help="boxes with lower scores are left out")
    parser.add_argument("--range", type=float, default=52.0, help="metres shown ahead and behind")
    parser.add_argument("--width", type=int, default=1600, help="of the picture in pixels")
    parser.add_argument("--fps", type=float, default=2.0, help="pictures a second; key frames come at 2")
    parser.add_argument(
        "--history", type=int, default=4, help="earlier frames that the model sees before a single sample"
    )
    return parser


def configuration_source(found: Any) -> ConfigSource:
    """Where settings come from without ``--config``: the weights, else the defaults."""
    if found.weights is None:
        return ConfigSource()
    weights = read_weights(found.weights)
    return ConfigSource(values=weights.card.config, name=str(weights.path))


def chosen_tokens(options: Any, scenes: Sequence[SceneRecord], split: str) -> list[str]:
    """Sample tokens that the command line asks for, in time order.

    Raises:
        ConfigError: if it asks for nothing, for both, or for what the split does not hold.
    """
    if (options.sample is None) == (options.scene is None):
        raise ConfigError("give either --sample INDEX_OR_TOKEN for a picture or --scene NAME for a video")
    if options.scene is not None:
        for scene in scenes:
            if scene.name == options.scene:
                return list(scene.sample_tokens)
        names = ", ".join(scene.name for scene in scenes[:8]) + (" ..." if len(scenes) > 8 else "")
        raise ConfigError(f"split {split!r} has no scene {options.scene}; it has {names}\nor give --split")
    tokens = [token for scene in scenes for token in scene.sample_tokens]
    if options.sample in tokens:
        return [options.sample]
    if options.sample.isdigit() and int(options.sample) < len(tokens):
        return [tokens[int(options.sample)]]
    raise ConfigError(
        f"split {split!r} has no sample {options.sample!r}: give a position from 0 to {len(tokens) - 1} or a "
        f"sample token\nof that split, or another --split"
    )


def output_path(options: Any, token: str) -> Path:
    """Where the result goes, refused before any work if its ending does not fit."""
    ending = ".png" if options.scene is None else ".mp4"
    if options.out is None:
        return Path("out") / "visualize" / f"{options.scene or token}{ending}"
    path = Path(options.out)
    if path.suffix.lower() != ending:
        raise ConfigError(
            f"--out {path}: a {'sample' if ending == '.png' else 'scene'} is written as {ending}"
        )
    return path


def predicted_boxes(file: Path, reader: NuScenesReader, tokens: Sequence[str]) -> Iterator[Opinion]:
    """The boxes of a submission file for each sample.

    Raises:
        DataError: if the file is damaged or lacks a sample.
    """
    results = read_submission(file)
    for token in tokens:
        if token not in results:
            raise DataError(f"{file} has no sample {token}: it was made for another split or data set")
        pose = reader.sample(token).bev_to_global
        yield Opinion(boxes_of_submission(results[token], pose, str(file)))


def perceived(
    options: Any, config: ExperimentConfig, reader: NuScenesReader, split: str, tokens: Sequence[str]
) -> Iterator[Opinion]:
    """What the model of ``--weights`` perceives in each sample, its memory filled by the frames before.

    Raises:
        BevError: if the weights do not fit or a sample cannot be read.
    """
    model = BEVFormer(config.model)
    load_into(model, read_weights(options.weights), config)
    predictor = StreamingPredictor(model, precision=config.training.precision)
    dataset = build_dataset(reader, config, split, training=False)
    before = reader.previous(tokens[0], options.history)[::-1]
    heads = config.model
    for seen in perceive(predictor, dataset, [*before, *tokens], config.data.workers, title="perceiving"):
        if seen.token in before:
            continue
        if seen.outputs is None:
            raise DataError(seen.bad.reason if seen.bad else f"sample {seen.token} cannot be read")
        boxes = predictor.decode(seen.outputs)[0] if heads.detection.enabled else None
        logits = seen.outputs.segmentation_logits
        layers = None
        if logits is not None:
            probabilities = logits[0].float().sigmoid().cpu()
            layers = SegmentationLayers(probabilities, heads.segmentation.classes, heads.segmentation.grid)
        yield Opinion(boxes, layers)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw what the command line asks for.

    Raises:
        BevError: a mistake of the user's.
    """
    parser = build_parser()
    config, options = parser.parse_experiment(argv, configuration_source, ("weights",))
    if options.predictions is not None and options.weights is not None:
        raise ConfigError("give either --predictions or --weights, not both")
    reader = NuScenesReader(config.data)
    split = options.split or config.data.val_split
    tokens = chosen_tokens(options, reader.scenes(split), split)
    path = output_path(options, tokens[0])
    opinions: Iterator[Opinion | None] = iter([None] * len(tokens))
    if options.predictions is not None:
        opinions = predicted_boxes(Path(options.predictions), reader, tokens)
    elif options.weights is not None:
        opinions = perceived(options, config, reader, split, tokens)
    segmentation = config.model.segmentation if config.model.segmentation.enabled else None
    style = PictureStyle(width=options.width, range_m=options.range, score_threshold=options.score)
    painter = SamplePainter(reader, segmentation, style)
    pictures = (painter.paint(token, opinion) for token, opinion in zip(tokens, opinions, strict=True))
    if options.scene is None:
        write_picture(path, next(pictures))
    else:
        write_video(path, pictures, options.fps)
    print(f"wrote {path}: {len(tokens)} sample{'s' if len(tokens) > 1 else ''}")
    return 0


if __name__ == "__main__":
    run_program(main)
