"""Configuration files and command lines: YAML with ``base:`` and dotted overrides into typed fields.

``load_config`` reads a file for library callers; :class:`ConfigParser` is the command line of every
tool that needs an experiment: ``--config configs/x.yaml --training.steps 200 --data.root /data``.
Types, help texts and conversions are jsonargparse's over the dataclasses of ``bevperception.config``;
what is added here is the merging of base files and messages of one to three lines that say which key
of which file is wrong.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

from bevperception.config import ExperimentConfig
from bevperception.config_files import config_path, shipped_configs
from bevperception.config_help import TRAINING_SETTINGS, ShowAll, short_help
from bevperception.config_migration import replacement
from bevperception.documents import MOST_YAML_BYTES, RefusedError, check_yaml_bounds, read_text, read_yaml
from bevperception.errors import ConfigError
from bevperception.files import write_text
from bevperception.ranges import rules_text

BASE_KEY = "base"
COMMAND_LINE = "command line"
MOST_PATH = 4096
_kept = threading.local()

ConfigFiles = str | Path | Sequence[str | Path]
"""A YAML file, or several."""


@dataclass
class ConfigSource:
    """Values of a configuration before they are typed, and where each came from.

    Args:
        values: nested mapping as read; only the keys that some file sets.
        origin: dotted key to the name of the file that set it.
        name: what messages call the whole when no key is known.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    name: str = "defaults"


def load_config(path: ConfigFiles | None, overrides: Mapping[str, object] | None = None) -> ExperimentConfig:
    """Read a configuration file, its base files and overrides.

    Args:
        path: YAML file or the name of a shipped one (``world_micro``), or several, of which later ones win;
            None starts from the defaults.
        overrides: dotted key to value, for example ``{"training.steps": 200}``; these win.

    Raises:
        ConfigError: a file is missing, is not YAML or names a base that leads back to itself; a key is
            unknown; a value has the wrong type; settings contradict each other.
    """
    source = ConfigSource() if path is None else read_config_files(path)
    for key, value in (overrides or {}).items():
        _merge(source, _nest(key, value), "overrides")
    return typed_config(source)


def read_config_files(path: ConfigFiles) -> ConfigSource:
    """Read YAML files over their base files, depth first: a file's own values win over its bases'.

    Args:
        path: YAML file, or several, of which later ones win; ``base:`` in a file names one file or a list of
            files, relative to itself.

    Raises:
        ConfigError: as :func:`load_config`, but for types, which are not looked at here.
    """
    paths = [path] if isinstance(path, str | Path) else path
    source = ConfigSource(name=" and ".join(map(str, paths)))
    for file in paths:
        _read_into(source, config_path(file), ())
    return source


def typed_config(source: ConfigSource) -> ExperimentConfig:
    """Check values against the dataclasses and fill in the defaults.

    Raises:
        ConfigError: an unknown key, a wrong type or a contradiction.
    """
    parser = _values_parser()
    return parser.instantiate_config(parser.parse_values(source))


def _values_parser() -> ConfigParser:
    """This thread's parser for values: to make one takes longer than to use it."""
    parser: ConfigParser | None = getattr(_kept, "parser", None)
    if parser is None:
        parser = _kept.parser = ConfigParser()
    return parser


def config_from_dict(values: Mapping[str, Any], name: str) -> ExperimentConfig:
    """The configuration that :func:`config_to_dict` wrote.

    Args:
        values: nested mapping.
        name: what a message calls it, for example the checkpoint's path.

    Raises:
        ConfigError: it does not fit this version's fields.
    """
    source = ConfigSource(name=name)
    _merge(source, dict(values), name)
    return typed_config(source)


def config_to_dict(config: object) -> dict[str, Any]:
    """Plain containers of a configuration dataclass: tuples become lists, so YAML and JSON round-trip."""
    plain = _plain(asdict(config))  # type: ignore[call-overload]
    assert isinstance(plain, dict)
    return plain


def dump_config(config: ExperimentConfig, path: str | Path) -> None:
    """Write every value of a configuration as YAML that :func:`load_config` reads back; atomically."""
    write_text(path, yaml.safe_dump(config_to_dict(config), sort_keys=False))


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping; an empty mapping has none."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class ConfigParser(ArgumentParser):
    """A command line whose options are the fields of :class:`ExperimentConfig` and a tool's own.

    Args:
        description: what the program does, for ``--help``.
        program: how messages and ``--help`` call it, for example ``bevperception train``.
        usage: its mandatory options, for ``--help``.
        settings: dotted keys that ``--help`` shows; ``--help-all`` shows all.
    """

    def __init__(
        self,
        description: str = "",
        program: str = "",
        usage: str = "--config FILE",
        settings: Sequence[str] = TRAINING_SETTINGS,
    ) -> None:
        super().__init__(
            prog=program or None,
            usage=f"{program} {usage} [--section.key VALUE ...] [options]",
            description=description,
            allow_abbrev=False,
            exit_on_error=False,
        )
        self._origin = ConfigSource(name=COMMAND_LINE)
        self.add_argument(
            "--config",
            metavar="FILE",
            nargs="+",
            help="YAML files or names of shipped configurations, of which later ones win; 'base:' in one "
            "names files it builds on",
        )
        self.add_argument("--help-all", action=ShowAll, help="show all settings with their ranges and exit")
        self.add_class_arguments(ExperimentConfig, None)
        _tell_rules(self)
        self.shows_all = False
        self._shown_settings = settings

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """The short help, or after ``--help-all`` that with all settings."""
        if self.shows_all:
            return _without_addresses(super().format_help())
        by_key = {action.dest: action for action in self._actions}
        own = [a for a in self._actions if a.dest not in _KEYS | _SECTIONS]
        return short_help(self, own, [by_key[key] for key in self._shown_settings])

    def parse_experiment(
        self,
        argv: Sequence[str] | None = None,
        fallback: Callable[[argparse.Namespace], ConfigSource] | None = None,
        fallback_options: Sequence[str] = (),
    ) -> tuple[ExperimentConfig, Namespace]:
        """Parse a command line over the configuration file that it names.

        Args:
            argv: arguments; None takes the program's own.
            fallback: where values come from without ``--config``, for example the configuration inside
                the weights; called with the ``fallback_options`` found on the command line. None
                makes ``--config`` mandatory.
            fallback_options: names without dashes.

        Returns:
            The typed configuration, and all options (the tool's own among them).

        Raises:
            ConfigError: as :func:`load_config`; an unknown or incomplete option.
        """
        argv = sys.argv[1:] if argv is None else argv
        _check_options(argv)
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        for name in fallback_options:
            early.add_argument(f"--{name}", nargs="?")
        found, rest = early.parse_known_args(argv)
        asks_for_help = any(option in rest for option in ("-h", "--help", "--help-all"))
        source = ConfigSource()
        files = _config_files(argv)
        if files:
            source = read_config_files(files)
        elif fallback is not None and not asks_for_help:
            source = fallback(found)
        elif not asks_for_help:
            names = ", ".join(shipped_configs())
            raise ConfigError(f"--config FILE is needed: a YAML file, or the name of a shipped one: {names}")
        # Another parser, as this one may have mandatory options that a file cannot give.
        base_values = _values_parser().parse_values(source)
        self.set_defaults(dict(flatten(_only_sections(base_values.as_dict()))))
        self._origin = ConfigSource(name=COMMAND_LINE)
        options = self.parse_args(argv)
        self._origin = _with_command_line(source, argv)
        return self.instantiate_config(options), options

    def parse_values(self, source: ConfigSource) -> Namespace:
        """Check nested values against the fields; see :func:`typed_config`."""
        self._origin = source
        _refuse_unknown(source)
        _check_texts(source)
        values: Namespace = self.parse_object(source.values, defaults=True)
        return values

    def instantiate_config(self, values: Namespace) -> ExperimentConfig:
        """The dataclasses of checked values.

        Raises:
            ConfigError: settings that contradict each other.
        """
        try:
            groups = self.instantiate(values)
        except ConfigError as error:
            where = self._origin.origin.get(error.key or "", self._origin.name)
            raise ConfigError(f"{where}: {error}", error.key) from None
        return ExperimentConfig(**{f.name: groups[f.name] for f in fields(ExperimentConfig)})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Called by jsonargparse for every mistake; turns its message into ours."""
        raise ConfigError(self._translate(message)) from None

    def _translate(self, message: str) -> str:
        wrong_type = re.search(r'Parser key "(.+?)":\s+(.*)', message, re.DOTALL)
        if wrong_type:
            key, complaint = wrong_type.group(1), " ".join(wrong_type.group(2).split())
            complaint = re.sub(r"<class '(\w+)'>", r"\1", complaint).replace("typing.", "")
            complaint = re.sub(r"^Expected an? (.*?)\. Got value: (.*)", r"expected \1, got \2", complaint)
            where = self._origin.origin.get(key, self._origin.name)
            hint = ". Write lists as '[a,b]'" if where == COMMAND_LINE and "tuple" in complaint else ""
            return f"{where}: {key}: {complaint[:300]}{hint}"
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if unknown:
            option = unknown.group(1).split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            old = replacement(option.removeprefix("--"))
            hint = f" In older versions it was a setting: {old}." if old else _nearest(option, known)
            return f"{COMMAND_LINE}: unknown option {unknown.group(1)}.{hint}"
        required = re.search(r"arguments are required: (.*)", message)
        if required:
            return f"{COMMAND_LINE}: --{required.group(1).replace(', ', ', --')} is needed"
        return f"{self._origin.name}: {' '.join(message.split())[:300]}"


def _without_addresses(text: str) -> str:
    """A help text without the addresses of functions that convert values."""
    return re.sub(r"\(type:\s+<function\s+\S+\s+at\s+\w+>,\s+", "(", text)


def _config_files(argv: Sequence[str]) -> list[str]:
    """The files behind ``--config``; argparse would also take options whose values hold blanks."""
    files: list[str] = []
    reading = False
    for argument in argv:
        name, equals, value = argument.partition("=")
        if argument.startswith("-"):
            reading = name == "--config"
            files += [value] if reading and equals else []
        elif reading:
            files.append(argument)
    return files


def _read_into(source: ConfigSource, path: Path, parents: tuple[Path, ...]) -> None:
    """Merge a file's bases, then the file itself."""
    resolved = path.resolve()
    if resolved in parents:
        chain = " -> ".join(p.name for p in (*parents, resolved))
        raise ConfigError(f"{parents[0]}: its base files lead back to themselves: {chain}")
    values = _read_yaml(path, parents)
    bases = values.pop(BASE_KEY, None) or []
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or "\0" in base:
            raise ConfigError(f"{path}: base must be a file name or a list of file names, got {base!r}")
        _read_into(source, config_path(base, path.parent), (*parents, resolved))
    _merge(source, values, str(path))


def _read_yaml(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    asked_by = f" (a base of {parents[-1].name})" if parents else ""
    values = read_yaml(path, f"the config file {path}{asked_by}")
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must hold sections such as 'training:', got {type(values).__name__}")
    return values


def _merge(source: ConfigSource, values: Mapping[str, Any], origin: str) -> None:
    """Lay nested values over the source's, section by section; lists are replaced as a whole."""

    def lay(over: Mapping[str, Any], under: dict[str, Any], prefix: str) -> None:
        for key, value in over.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping):
                section = under.get(key)
                under[key] = section if isinstance(section, dict) else {}
                lay(value, under[key], f"{name}.")
            elif value is None and name in _SECTIONS:
                under.setdefault(key, {})  # a section whose lines are all commented out
            else:
                under[key] = value
            source.origin[name] = origin

    lay(values, source.values, "")


def _check_texts(source: ConfigSource) -> None:
    """Bound the texts among the values: jsonargparse reads them as YAML once more."""
    for key, value in flatten(source.values):
        if isinstance(value, str):
            _check_text(value, f"{source.origin.get(key, source.name)}: {key}")


def _check_options(argv: Sequence[str]) -> None:
    """Bound what jsonargparse reads from a command line: values, and the files that sections may name."""
    option = ""
    for argument in argv:
        value = argument
        if argument.startswith("--"):
            option, _, value = argument.removeprefix("--").partition("=")
        name = f"{COMMAND_LINE}: {option}"
        if option in _SECTIONS and value and len(value) < MOST_PATH and Path(value).is_file():
            value = read_text(Path(value), f"{name}: {value}", MOST_YAML_BYTES)
        _check_text(value, name)


def _check_text(text: str, name: str) -> None:
    try:
        check_yaml_bounds(text)
    except RefusedError as error:
        raise ConfigError(f"{name}: {error.problem}") from None
    except yaml.YAMLError:
        return  # no YAML, which most texts need not be; where one has to be, jsonargparse says so


def _with_command_line(source: ConfigSource, argv: Sequence[str]) -> ConfigSource:
    """The source of values when options are laid over a file's."""
    name = f"{source.name} with the command line"
    given = {argument.removeprefix("--").split("=")[0] for argument in argv if argument.startswith("--")}
    sections = tuple(f"{option}." for option in given if option in _SECTIONS)
    origin = {key: where for key, where in source.origin.items() if not key.startswith(sections)}
    return ConfigSource(origin=origin | dict.fromkeys(given & _KEYS, COMMAND_LINE), name=name)


def _tell_rules(parser: ArgumentParser) -> None:
    """Add to every option's help what its value must be."""
    for action in parser._actions:
        owner, name = _KEY_OWNERS.get(action.dest, (None, ""))
        rules = "" if owner is None else rules_text(owner, name)
        if rules:
            action.help = f"{action.help} [{rules}]"


def _nest(dotted: str, value: object) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _refuse_unknown(source: ConfigSource) -> None:
    """Raise ConfigError at the first key that no dataclass has, or a section that is not a mapping."""

    def look(values: Mapping[str, Any], prefix: str) -> None:
        for key, value in values.items():
            name = f"{prefix}{key}"
            where = source.origin.get(name, source.name)
            if name in _SECTIONS:
                if not isinstance(value, Mapping):
                    raise ConfigError(f"{where}: {name} is a section with keys of its own, got {value!r}")
                look(value, f"{name}.")
            elif name not in _KEYS:
                known = [*_KEYS, *_SECTIONS, BASE_KEY]
                hint = f" In older versions it was a setting: {old}." if (old := replacement(name)) else ""
                raise ConfigError(f"{where}: unknown key {name}.{hint or _nearest(name, known)}")

    look(source.values, "")


def _nearest(name: str, known: Sequence[str]) -> str:
    """' Did you mean ...?' for a key of the same name in another section, else for a similar one."""
    last = name.rsplit(".", 1)[-1].lstrip("-")
    found = [k for k in known if k.rsplit(".", 1)[-1].lstrip("-") == last][:1]
    found = found or difflib.get_close_matches(name, known, 1, 0.6)
    return f" Did you mean {found[0]}?" if found else " See --help-all for all of them."


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _only_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's part of parsed options, without the tool's own."""
    return {f.name: values[f.name] for f in fields(ExperimentConfig)}


def _field_names() -> tuple[dict[str, tuple[type, str]], frozenset[str]]:
    """Dataclass and field of every dotted key, and the dotted sections."""
    keys: dict[str, tuple[type, str]] = {}
    sections: set[str] = set()

    def walk(instance: object, prefix: str) -> None:
        for f in fields(instance):  # type: ignore[arg-type]
            name, value = f"{prefix}{f.name}", getattr(instance, f.name)
            if is_dataclass(value):
                sections.add(name)
                walk(value, f"{name}.")
            else:
                keys[name] = (type(instance), f.name)

    walk(ExperimentConfig(), "")
    return keys, frozenset(sections)


_KEY_OWNERS, _SECTIONS = _field_names()
_KEYS = frozenset(_KEY_OWNERS)
