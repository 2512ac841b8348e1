"""The short help of programs with many settings: a tool's own options and the settings that go with it."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Sequence
from typing import Any, Final

DATA_SETTINGS: Final = ("data.root", "data.version", "data.workers", "data.bad_samples")
INFERENCE_SETTINGS: Final = (*DATA_SETTINGS, "training.precision", "training.accelerator")
"""What people change when a trained model runs."""
TRAINING_SETTINGS: Final = (
    *("data.root", "data.version", "data.train_split", "data.val_split"),
    *("training.steps", "training.batch_size", "training.learning_rate", "training.precision"),
    *("training.devices", "training.initial_weights"),
)
"""What people change when a model is trained."""
HISTORY_HELP: Final = (
    "how a published BEVFormer v2 sees past frames: encoded anew in the current frame as published, the "
    "default, or warped as on a vehicle"
)


class ShowAll(argparse.Action):
    """The option ``--help-all``: prints the help with all settings and ends the program."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "nargs": 0, "default": argparse.SUPPRESS})

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """See :class:`argparse.Action`."""
        parser.shows_all = True  # type: ignore[attr-defined]
        parser.print_help()
        parser.exit()


def short_help(
    parser: argparse.ArgumentParser, own: Sequence[argparse.Action], settings: Sequence[argparse.Action]
) -> str:
    """Format a program's help with a part of its options.

    Args:
        parser: of the program; its usage, description and epilog are shown.
        own: options that belong to the program alone.
        settings: options of the configuration that are shown; of their help the first sentence.
    """
    raw, wrapped = argparse.RawDescriptionHelpFormatter, argparse.HelpFormatter
    kind = raw if isinstance(parser.formatter_class(prog=""), raw) else wrapped
    formatter = kind(prog=parser.prog)
    formatter.add_usage(parser.usage, own, [])
    formatter.add_text(parser.description)
    sections = (
        ("options", [_shown(action, action.help or "") for action in own]),
        (
            "settings that are changed most (--help-all shows all)",
            [_shown(action, _first_sentence(action.help or "")) for action in settings],
        ),
    )
    for title, actions in sections:
        formatter.start_section(title)
        formatter.add_arguments(actions)
        formatter.end_section()
    formatter.add_text(parser.epilog)
    return formatter.format_help()


def _shown(action: argparse.Action, text: str) -> argparse.Action:
    """A copy of an option that says its default."""
    shown = copy.copy(action)
    if action.default not in (None, argparse.SUPPRESS) and "default" not in text:
        text += " (default: %(default)s)"
    shown.help = text
    if action.nargs != 0 and action.metavar is None:
        shown.metavar = action.dest.rsplit(".", 1)[-1].upper()
    return shown


def _first_sentence(text: str) -> str:
    """The first sentence, and the rules in brackets at the end."""
    rules = re.search(r" \[[^]]*\]$", text)
    sentence = re.split(r"[.;:](?: |$)", text, maxsplit=1)[0]
    return sentence + (rules.group() if rules and rules.group() not in sentence else "")
