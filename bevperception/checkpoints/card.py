"""The card of weights: what they are. Cards come from files, so nothing in them is trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from bevperception.checkpoints.tensors import kind_of, some
from bevperception.config_migration import migrate_config
from bevperception.errors import CheckpointError, ConfigError

MOST_NESTED = 20
"""Deepest nesting of a card; the configuration needs four."""
MOST_VALUES = 100_000
"""Most values of one of its fields; the configuration has some two hundred."""


@dataclass(frozen=True)
class Card:
    """Description of weights: enough to build their model and to know their origin.

    Args:
        config: of the run, as :func:`~bevperception.config_io.config_to_dict` gives it.
        step: optimiser steps taken; None for converted weights.
        averaged: whether these are the moving average.
        metrics: of the evaluation of these weights, if there was one.
        commit: of the code that wrote them, if known.
        source: file they were converted from, if any.
    """

    config: dict[str, Any]
    step: int | None = None
    averaged: bool = False
    metrics: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    source: str | None = None


_WANTED: dict[str, tuple[tuple[type, ...], str]] = {
    "config": ((dict,), "a mapping, the configuration of the run"),
    "step": ((int, type(None)), "a whole number"),
    "averaged": ((bool,), "true or false"),
    "metrics": ((dict,), "a mapping"),
    "commit": ((str, type(None)), "text"),
    "source": ((str, type(None)), "text"),
}
"""Types of a card's fields, and what they are in words."""


def card_from_json(text: str, where: str) -> Card:
    """The card that weights carry as JSON.

    Args:
        text: JSON.
        where: the file, for messages.

    Raises:
        CheckpointError: it is not JSON, or a field is missing, unknown or of a wrong type.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"the card inside {where} is not JSON: {str(error)[:160]}") from None
    except RecursionError:
        raise CheckpointError(f"the card inside {where} is nested too deeply to be one") from None
    return card_from_values(values, where)


def card_from_values(values: object, where: str) -> Card:
    """A card of its fields.

    Args:
        values: a mapping with the fields of :class:`Card`.
        where: the file, for messages.

    Raises:
        CheckpointError: a field is missing, unknown or of a wrong type, or values are not plain.
    """
    if not isinstance(values, Mapping):
        raise CheckpointError(f"the card inside {where} must be a mapping, got {kind_of(values)}")
    unknown = [str(name)[:40] for name in values if name not in {f.name for f in fields(Card)}]
    if unknown:
        raise CheckpointError(
            f"the card inside {where} has fields that are not known: {some(unknown)}\n"
            "perhaps a later version of this project wrote it"
        )
    if "config" not in values:
        raise CheckpointError(f"the card inside {where} has no configuration (config)")
    for name, value in values.items():
        types, words = _WANTED[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise CheckpointError(f"the card inside {where}: {name} must be {words}, got {kind_of(value)}")
        problem = _problem(value)
        if problem is not None:
            raise CheckpointError(f"the card inside {where}: {name} {problem}")
    try:
        config, _ = migrate_config(values["config"], f"the card inside {where}")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    return Card(**{**values, "config": config})


def _problem(value: object) -> str | None:
    """Why a value is not a plain one, in words; None where it is."""
    waiting, looked_at = [(value, 1)], 0
    while waiting:
        item, depth = waiting.pop()
        looked_at += 1
        if looked_at > MOST_VALUES:  # containers of a checkpoint may even hold themselves
            return f"has more than {MOST_VALUES} values"
        if depth > MOST_NESTED:
            return f"is nested more than {MOST_NESTED} deep"
        if isinstance(item, dict):
            strange = next((key for key in item if not isinstance(key, str)), None)
            if strange is not None:
                return f"has a key that is {kind_of(strange)} instead of text"
            waiting.extend((inner, depth + 1) for inner in item.values())
        elif isinstance(item, (list, tuple)):
            waiting.extend((inner, depth + 1) for inner in item)
        elif not (item is None or isinstance(item, (str, int, float, bool))):
            return f"holds {kind_of(item)} instead of plain values"
    return None
