"""Predict a sample, a scene or a split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from bevperception.errors import importing

with importing():
    from bevperception.checkpoints.weights import config_inside, load_model, read_weights
    from bevperception.config_help import HISTORY_HELP, INFERENCE_SETTINGS
    from bevperception.config_io import ConfigParser
    from bevperception.files import output_folder
    from bevperception.processes import program_name


def main(argv: Sequence[str] | None = None) -> int | None:
    """Parse, predict."""
    parser = ConfigParser(
        "Write predictions as a nuScenes submission. Without --config, the configuration inside the "
        "weights is used.",
        program_name("predict"),
        usage="--weights PATH --out FOLDER",
        settings=INFERENCE_SETTINGS,
    )
    parser.add_argument(
        "--weights", type=str, required=True, metavar="PATH", help="weights, run folder or .ckpt"
    )
    parser.add_argument(
        "--sample", type=str, metavar="TOKEN", help="one sample, after its scene's earlier ones"
    )
    parser.add_argument("--scene", type=str, metavar="NAME", help="one scene, by name or token")
    parser.add_argument("--split", type=str, metavar="NAME", help="all scenes of a split")
    parser.add_argument(
        "--segmentation", type=bool, default=False, help="write BEV probabilities as .npz too"
    )
    parser.add_argument("--history", type=Literal["published", "warped"] | None, help=HISTORY_HELP)
    parser.add_argument("--out", type=str, required=True, metavar="FOLDER", help="for the results")
    config, options = parser.parse_experiment(argv, fallback=config_inside, fallback_options=("weights",))
    with importing():
        from bevperception.data.nuscenes import NuScenesReader
        from bevperception.evaluation.detection import RESULTS_FILE
        from bevperception.evaluation.devices import launch
        from bevperception.evaluation.predictions import MAPS_FOLDER, choose_samples, write_predictions

    folders = (MAPS_FOLDER,) if options.segmentation else ()
    with output_folder(options.out, (RESULTS_FILE,), folders) as out:
        reader = NuScenesReader(config.data)
        chosen = choose_samples(reader, options.sample, options.scene, options.split)
        config.training.devices = config.training.nodes = 1
        model = load_model(read_weights(options.weights), config)
        device = launch(config.training)
        path = write_predictions(
            model, config, reader, chosen, device, out, options.segmentation, options.history
        )
    print(f"wrote {path}")
    return None
