"""YAML and JSON of a user are read within bounds, and every mistake gets a message."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bevperception import documents
from bevperception.config_io import ConfigParser, load_config
from bevperception.data.splits import custom_splits
from bevperception.documents import parse_json, parse_yaml, read_json, read_yaml
from bevperception.errors import BevError, ConfigError, DataError
from bevperception.evaluation.submission import read_submission
from bevperception.streaming.rig import read_extrinsics
from bevperception.training.plan import Run, read_plan
from bevperception.training.record import record


def bomb(levels: int = 14, width: int = 9) -> str:
    """Each line stands for ``width`` times the line before."""
    lines = [f"a0: &a0 [{', '.join('x' * width)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


HOSTILE = {
    "bomb": (bomb(), r"line 5, column \d+: more than 50000 values, aliases written out"),
    "itself": ("a: &a {b: *a}", r"the alias \*a stands for something it is in"),
    "deep flow": ("[" * 100_000, "more than 32 levels inside each other"),
    "deep blocks": ("- " * 100_000, "more than 32 levels inside each other"),
    "long": (
        "# " + "x" * 300_000,
        r"it has \d+ bytes, more than the 262144 allowed; likely cause: the wrong file",
    ),
    "unhashable": ("{[1]: 2}", "line 1, column 2: a key must be a single word or number"),
    "tag": ("a: !!set {b, c}", r"line 1, column 4: the tag !!set is not read: write the plain value"),
    "code": ("a: !!python/object/apply:os.getcwd []", r"the tag !!python/object/apply:os.getcwd is not read"),
    "foreign tag": ("a: !x b", "could not determine a constructor for the tag '!x'"),
    "no date": ("a: 2001-99-99", "line 1, column 4: this is no timestamp that can be read"),
    "no number": ("a: " + "9" * 6000, "this is no int that can be read"),
    "twice": ("a: {b: 1, b: 2}", "line 1, column 11: the key 'b' is given twice"),
    "two": ("a: 1\n---\nb: 2", "but found another document"),
}
READERS: dict[str, Callable[[Path], object]] = {
    "configuration": load_config,
    "plan": read_plan,
    "calibration": read_extrinsics,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_yaml_is_refused_by_every_reader(case: str, reader: str, tmp_path: Path) -> None:
    text, message = HOSTILE[case]
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"a\.yaml.*: .*{message}") as caught:
        READERS[reader](path)
    assert len(str(caught.value).splitlines()) == 1


def test_aliases_count_as_what_they_stand_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """a and its list are 5 nodes with the mapping, b with three aliases of 3 nodes each 2 + 9 more."""
    text = "a: &a [1, 2]\nb: [*a, *a, *a]\n"
    monkeypatch.setattr(documents, "MOST_NODES", 16)
    assert parse_yaml(text, "here") == {"a": [1, 2], "b": [[1, 2]] * 3}
    monkeypatch.setattr(documents, "MOST_NODES", 15)
    with pytest.raises(ConfigError, match="here is not valid YAML: line 2, column 13: more than 15 values"):
        parse_yaml(text, "here")
    scalars = "a: &n 7\nb: [*n, *n]\n"
    monkeypatch.setattr(documents, "MOST_NODES", 7)
    assert parse_yaml(scalars, "here") == {"a": 7, "b": [7, 7]}
    monkeypatch.setattr(documents, "MOST_NODES", 6)
    with pytest.raises(ConfigError, match="more than 6 values"):
        parse_yaml(scalars, "here")


def test_depth_is_counted_to_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_DEPTH", 3)
    assert parse_yaml("[[[1]]]", "here") == parse_json("[[[1]]]", "here") == [[[1]]]
    assert parse_json('{"a": [{"b": 1}]}', "here") == {"a": [{"b": 1}]}
    for parse in (parse_yaml, parse_json):
        with pytest.raises(ConfigError, match="more than 3 levels"):
            parse("[[[[1]]]]", "here")


def test_plain_yaml_reads_as_ever() -> None:
    text = "\ufeffbase: &b {steps: 3, list: [1.5, x, null]}\nmore: {<<: *b, steps: 4}\nday: 2001-02-03\n"
    found = parse_yaml(text.removeprefix("\ufeff"), "here")
    assert found["more"] == {"steps": 4, "list": [1.5, "x", None]}
    assert parse_yaml("", "here") is None


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 40 + "1" + "}" * 40, "{", "nope"])
def test_hostile_json_is_refused_by_every_reader(text: str, tmp_path: Path) -> None:
    (tmp_path / "splits.json").write_text(text)
    (tmp_path / "card.json").write_text(text)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"submission .*card\.json is not valid JSON"):
        read_submission(tmp_path / "card.json")
    with pytest.raises(DataError, match=r"splits\.json is not valid JSON"):
        custom_splits(tmp_path)
    with pytest.raises(DataError, match=r"card of run .* is not valid JSON"):
        record(tmp_path)
    with pytest.raises(DataError, match="is not valid JSON"):
        Run(tmp_path.name, tmp_path / "a.yaml", {}).metrics(tmp_path.parent)


@pytest.mark.parametrize("content", [[], 3, {"metrics": 3}, {"metrics": None}])
def test_a_card_of_another_shape_is_no_complete_run(content: object, tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(json.dumps(content))
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert Run(tmp_path.name, tmp_path / "a.yaml", {}).metrics(tmp_path.parent) is None


def test_only_regular_files_of_text_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"a: \xff\xfe")
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbfa: 1")
    cases = {
        "pipe": "it is a pipe or a device, not a file",
        ".": "it is a folder, not a file",
        "missing": "No such file",
        "bytes": "the file is not UTF-8 text",
        "a\0b": "NUL character in its path",
    }
    for name, message in cases.items():
        with pytest.raises(BevError, match=message):
            read_yaml(tmp_path / name, "the file")
    with pytest.raises(DataError, match="not a file"):
        read_json(Path("/dev/zero"), "the file", DataError)
    assert read_yaml(tmp_path / "bom", "the file") == {"a": 1}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("data.cameras", "{[1]: 2}", "expected tuple"),
        ("data.cameras", "!!timestamp x", "the tag !!timestamp is not read"),
        ("data.cameras", "[" * 9000, "more than 32 levels"),
        ("training.steps", "&a [*a]", r"the alias \*a stands for"),
        ("model", "BOMB", "more than 50000 values"),
        ("model", "LONG", "more than the 262144 allowed"),
    ],
)
def test_options_are_bounded_as_files_are(option: str, value: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("training: {steps: 3}\n")
    (tmp_path / "BOMB").write_text(bomb())
    (tmp_path / "LONG").write_text(HOSTILE["long"][0])
    given = str(tmp_path / value) if value.isupper() else value
    for arguments in ([f"--{option}", given], [f"--{option}={given}"]):
        with pytest.raises(ConfigError, match=rf"command line: {option}.*: .*{message}"):
            ConfigParser("Train.", "train").parse_experiment(
                ["--config", str(tmp_path / "a.yaml"), *arguments]
            )


def test_texts_inside_a_file_are_bounded_too(tmp_path: Path) -> None:
    """jsonargparse reads them as YAML once more."""
    path = tmp_path / "a.yaml"
    inner = "[&a [x,x,x,x], " + ", ".join(
        f"&{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefg", "bcdefgh", strict=True)
    )
    path.write_text(json.dumps({"data": {"cameras": inner + "]"}}))
    with pytest.raises(ConfigError, match=r"a\.yaml: data\.cameras: more than 50000 values"):
        load_config(path)
