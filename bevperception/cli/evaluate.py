"""Evaluate weights on a split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from bevperception.errors import USAGE_EXIT_CODE, BevError, importing

with importing():
    from bevperception.checkpoints.weights import config_inside, load_model, read_weights
    from bevperception.config_help import HISTORY_HELP, INFERENCE_SETTINGS
    from bevperception.config_io import ConfigParser
    from bevperception.distributed import is_first_process
    from bevperception.files import output_folder
    from bevperception.processes import program_name


def main(argv: Sequence[str] | None = None) -> int | None:
    """Parse, evaluate."""
    parser = ConfigParser(
        "Evaluate weights with nuScenes' own metrics and BEV IoU. Without --config, the configuration "
        "inside the weights is used.",
        program_name("evaluate"),
        usage="--weights PATH --out FOLDER",
        settings=INFERENCE_SETTINGS,
    )
    parser.add_argument(
        "--weights", type=str, required=True, metavar="PATH", help="weights, run folder or .ckpt"
    )
    parser.add_argument("--split", type=str, metavar="NAME", help="split; default: data.val_split")
    parser.add_argument("--history", type=Literal["published", "warped"] | None, help=HISTORY_HELP)
    parser.add_argument("--out", type=str, required=True, metavar="FOLDER", help="for results and metrics")
    config, options = parser.parse_experiment(argv, fallback=config_inside, fallback_options=("weights",))
    with importing():
        from bevperception.data.nuscenes import NuScenesReader
        from bevperception.evaluation.devices import launch
        from bevperception.evaluation.runner import RESULT_FILES, SplitEvaluator

    try:
        with output_folder(options.out, RESULT_FILES, writes=is_first_process()) as out:
            device = launch(config.training)
            model = load_model(read_weights(options.weights), config)
            reader = NuScenesReader(config.data)
            evaluator = SplitEvaluator(
                config, reader, options.split or config.data.val_split, options.history
            )
            evaluator(model, device, out)
    except BevError:
        if not is_first_process():
            return USAGE_EXIT_CODE  # the first process says it
        raise
    return None
