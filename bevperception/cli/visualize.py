"""Draw samples: six cameras with boxes, bird's-eye views of prediction and ground truth; PNG or MP4.

What is drawn is the ground truth, and beside it the boxes of a submission file (--predictions) or what a
model perceives (--weights). Without --config, the configuration inside the weights is used, or the defaults.
"""

from __future__ import annotations

from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bevperception.errors import ConfigError, DataError, importing

with importing():
    from jsonargparse import DefaultHelpFormatter

    from bevperception.checkpoints.weights import config_inside, load_model, read_weights
    from bevperception.config import ExperimentConfig
    from bevperception.config_help import INFERENCE_SETTINGS
    from bevperception.config_io import ConfigParser, ConfigSource
    from bevperception.data.dataset import build_dataset
    from bevperception.data.nuscenes import NuScenesReader
    from bevperception.evaluation.devices import launch
    from bevperception.evaluation.history import with_history
    from bevperception.evaluation.predictions import ChosenSamples, choose_samples
    from bevperception.evaluation.runner import perceive
    from bevperception.evaluation.submission import read_submission
    from bevperception.files import check_output_file
    from bevperception.inference import StreamingPredictor
    from bevperception.names import check_name
    from bevperception.processes import program_name
    from bevperception.ranges import Range, add_number
    from bevperception.visualization.bev import SegmentationLayers
    from bevperception.visualization.compose import RANGE_M, WIDTH_PX, Opinion, PictureStyle
    from bevperception.visualization.samples import SamplePainter, boxes_of_submission
    from bevperception.visualization.video import write_picture, write_video

EXAMPLES = """examples:
  the ground truth of the first sample of a split:
    bevperception visualize --data.root /data/nuscenes --data.version v1.0-mini --split mini_val --sample 0
  a sample by its token, beside the boxes of a submission file:
    bevperception visualize --config nuscenes --sample ca9a282c9e77460f8360f564131a8af5 \\
        --predictions out/results_nusc.json --out out/sample.png
  what a model perceives over a scene, as a video:
    bevperception visualize --weights out/run/weights.safetensors --scene scene-0103 --out out/scene.mp4
"""


class _Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the examples."""


def build_parser() -> ConfigParser:
    """The program's options, over those of the configuration."""
    usage = "(--sample TOKEN | --scene NAME)"
    parser = ConfigParser(__doc__ or "", program_name("visualize"), usage=usage, settings=INFERENCE_SETTINGS)
    parser.formatter_class = _Help
    parser.epilog = EXAMPLES
    parser.add_argument("--sample", metavar="TOKEN", help="a picture: sample token, or position in --split")
    parser.add_argument("--scene", metavar="NAME", help="a video: name or token of a scene")
    parser.add_argument("--split", metavar="NAME", help="what a position counts in; default: data.val_split")
    parser.add_argument("--predictions", metavar="JSON", help="submission file whose boxes are drawn")
    parser.add_argument("--weights", metavar="PATH", help="weights, run folder or .ckpt of a model to run")
    parser.add_argument("--out", metavar="FILE", help=".png or .mp4; default: under out/visualize/")
    for name, kind, default, rule, text in (
        ("score", float, 0.3, Range(0.0, 1.0), "boxes with lower scores are left out"),
        ("range", float, 52.0, RANGE_M, "metres shown ahead and behind"),
        ("width", int, 1600, WIDTH_PX, "of the picture in pixels"),
        ("fps", float, 2.0, Range(0.1, 240.0), "pictures a second; key frames come at 2"),
    ):
        add_number(parser, f"--{name}", kind, rule, default=default, help=text)
    return parser


def settings_source(options: Namespace) -> ConfigSource:
    """The source of settings without ``--config``: the weights, else the defaults."""
    return ConfigSource() if options.weights is None else config_inside(options)


def chosen_samples(options: Any, config: ExperimentConfig, reader: NuScenesReader) -> ChosenSamples:
    """The sample or scene that the command line asks for.

    Raises:
        ConfigError: if it asks for nothing or for both, or for a position beyond the split.
        DataError: if the data set has no such sample or scene.
    """
    if (options.sample is None) == (options.scene is None):
        raise ConfigError("give either --sample TOKEN for a picture or --scene NAME for a video")
    sample = options.sample
    if sample is not None and sample.isdecimal() and len(sample) < 12:  # tokens have 32 hexadecimal digits
        split = options.split or config.data.val_split
        tokens = [token for scene in reader.scenes(split) for token in scene.sample_tokens]
        if int(sample) >= len(tokens):
            raise ConfigError(f"--sample {sample}: split {split!r} counts from 0 to {len(tokens) - 1}")
        sample = tokens[int(sample)]
    return choose_samples(reader, sample, options.scene, None)


def output_path(options: Any, token: str) -> Path:
    """The path of the result.

    Raises:
        ConfigError: if the name's ending does not fit.
    """
    ending = ".png" if options.scene is None else ".mp4"
    if options.out is None:
        name = check_name(options.scene or token, "the scene or sample", ConfigError)
        return Path("out") / "visualize" / f"{name}{ending}"
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
    weights: str, config: ExperimentConfig, reader: NuScenesReader, chosen: ChosenSamples
) -> Iterator[Opinion]:
    """Predictions for each wanted sample, with a memory of its scene's earlier frames.

    Raises:
        BevError: if the weights do not fit or a sample cannot be read.
    """
    config.training.devices = config.training.nodes = 1
    model = with_history(load_model(read_weights(weights), config), config.model)
    predictor = StreamingPredictor(model, launch(config.training), config.training.precision)
    dataset = build_dataset(reader, config, chosen.scenes, training=False)
    heads = config.model
    for seen in perceive(predictor, dataset, chosen.tokens, config.data.workers, title="perceiving"):
        if seen.token not in chosen.wanted:
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
    config, options = build_parser().parse_experiment(argv, settings_source, ("weights",))
    if options.predictions is not None and options.weights is not None:
        raise ConfigError("give either --predictions or --weights, not both")
    if options.out is not None:
        check_output_file(output_path(options, ""))
    reader = NuScenesReader(config.data)
    chosen = chosen_samples(options, config, reader)
    tokens = [token for token in chosen.tokens if token in chosen.wanted]
    path = output_path(options, tokens[0])
    check_output_file(path)
    opinions: Iterator[Opinion | None] = iter([None] * len(tokens))
    if options.predictions is not None:
        opinions = predicted_boxes(Path(options.predictions), reader, tokens)
    elif options.weights is not None:
        opinions = perceived(options.weights, config, reader, chosen)
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
