"""Options of the sub-commands: dataclasses, flags, and a YAML or JSON file as the only positional argument."""

import difflib
import json
import sys
import textwrap
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import yaml


def _parser_class() -> type:
    """
    `HfArgumentParser` out of its file, which needs nothing else of transformers: an import of the package around it
    takes longer than a command may take to say its help.
    """
    if "transformers" in sys.modules:
        return import_module("transformers").HfArgumentParser
    folder = find_spec("transformers").submodule_search_locations[0]
    spec = spec_from_file_location("hf_argparser", Path(folder, "hf_argparser.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HfArgumentParser


LINE = 80  # columns of texts that argparse prints as they are


TEXT_CACHE = "Where texts are kept (default: manticore in $XDG_CACHE_HOME, else in ~/.cache)."


class HelpFormatter(RawDescriptionHelpFormatter):
    """One spelling for each option, one way to tell defaults, texts around the options as they are."""

    def _format_action_invocation(self, action: Action) -> str:
        long = [name for name in action.option_strings if name.startswith("--")]
        if action.dest == "help" or not long:
            return super()._format_action_invocation(action)
        if action.const is True:
            return long[0] if action.default is False else f"{long[0]} true|false"
        if getattr(action.type, "__name__", "") == "string_to_bool":
            return f"{long[0]} true|false"
        return f"{long[0]} {self._format_args(action, {int: 'N', float: 'X'}.get(action.type, 'TEXT'))}"

    def _get_help_string(self, action: Action) -> str:
        if action.dest == "help":
            return "Show this help."
        text = (action.help or "").removesuffix(".")
        if action.required:
            return f"{text} (required)."
        default = action.default
        if default is None or default is False or default in (SUPPRESS, []) or "(default" in text:
            return f"{text}."
        words = default if isinstance(default, list) else [default]
        shown = " ".join(_as_word(word) for word in words)
        return f"{text} (default: {shown.replace('%', '%%')})."


class Failure(ValueError):
    """The options were right, and what they ask for failed."""

    exit_code = 1


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a text that says how to go on."""


SETTINGS = (".yaml", ".yml", ".json")


class OptionParser(_parser_class()):
    """`HfArgumentParser` whose complaints are ValueErrors, for one place that prints them."""

    def error(self, message: str):
        """
        Raises:
            ValueError: always, with argparse's message.
        """
        raise ValueError(message)


def parse_options(kinds: tuple[type, ...], arguments: list[str], command: str, epilog: str | None = None) -> tuple:
    """
    Instances of the given dataclasses, from `arguments` (without the command's name). A first argument that is not a
    flag names a YAML or JSON file with the same option names; flags after it win.

    Args:
        epilog: stands below the options in the help, line by line.

    Raises:
        ValueError: unknown, missing or ill-typed options, or a file that cannot be read.
    """
    parser = parser_of(kinds, command, epilog)
    if arguments and not arguments[0].startswith("-"):
        arguments = _as_flags(parser, Path(arguments[0])) + arguments[1:]
    _refuse_unknown(parser, arguments)
    try:
        *made, rest = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except TypeError as error:
        raise ValueError(str(error)) from error
    if rest:
        before = arguments[max(arguments.index(rest[0]) - 2, 0) : arguments.index(rest[0])]
        after = f" after {' '.join(before)!r}" if before else ""
        raise ValueError(f"got {rest[0]!r}{after}, which no option takes; {parser.prog} --help shows their forms.")
    return tuple(made)


def parser_of(kinds: tuple[type, ...], command: str, epilog: str | None = None) -> OptionParser:
    """The parser of a command, with the help that all of them share."""
    from . import COMMANDS, OWN_FILE, POSITIONAL

    text = COMMANDS[command]
    parser = OptionParser(
        kinds,
        prog=f"manticore {command}",
        description=textwrap.fill(f"{text[0].upper()}{text[1:]}.", LINE),
        epilog=epilog,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    for action in parser._actions:
        if any(name.startswith("--no_") for name in action.option_strings):
            action.help = SUPPRESS  # the other half of a switch that is on by default
    forms = [] if command in OWN_FILE else ["[FILE.yaml | FILE.json]"]
    forms += [POSITIONAL[command]] if command in POSITIONAL else []
    parser.usage = "\n       ".join(f"manticore {command} {form} [--option value ...]" for form in forms)
    return parser


def positional_first(arguments: list[str], *names: str) -> list[str]:
    """
    Arguments in which the first words, where they are no flags and no settings file, are the named options.

    Raises:
        ValueError: more words than names.
    """
    words = []
    while len(words) < len(arguments) and not arguments[len(words)].startswith("-"):
        words.append(arguments[len(words)])
    if not words or Path(words[0]).suffix in SETTINGS:
        return arguments
    if len(words) > len(names):
        raise ValueError(f"got {words[len(names)]!r}, allowed are {', '.join(names)} and then --options.")
    return [f"--{name}={word}" for name, word in zip(names, words)] + arguments[len(words) :]


def _refuse_unknown(parser: OptionParser, arguments: list[str]) -> None:
    """
    Raises:
        ValueError: an option that the command does not have; before argparse complains of what is missing for that.
    """
    known = [name for name in parser._option_string_actions if name.startswith("--")]
    for word in arguments:
        name = word.split("=")[0]
        if name.startswith("--") and name != "--" and name not in known:
            raise ValueError(
                f"{name}: there is no such option; {meant(name, known, f'{parser.prog} --help lists them.')}"
            )


def meant(word: str, known: Iterable[str], otherwise: str) -> str:
    """`did you mean 'x'?` without a stop, or what to say where nothing known is similar."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise


def _as_flags(parser: OptionParser, file: Path) -> list[str]:
    """The settings of a file as flags, so that they are checked and converted in the same way."""
    known = {action.dest for action in parser._actions if action.option_strings and action.dest != "help"}
    flags = []
    for key, value in _read_settings(file).items():
        if key not in known:
            raise ValueError(f"{file}: {key!r} is no option; {meant(str(key), known, 'see --help.')}")
        if value is None:
            continue
        if isinstance(value, list):
            flags += [f"--{key}", *map(_as_word, value)]
        else:
            flags.append(f"--{key}={_as_word(value)}")
    return flags


def _as_word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list, bool)) else str(value)


def _read_settings(file: Path) -> dict:
    if file.suffix not in SETTINGS:
        raise ValueError(f"got {str(file)!r}, allowed as the positional argument is a .yaml, .yml or .json file.")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: it cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    try:
        settings = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: it is not valid {file.suffix[1:]} ({' '.join(str(error).split())}).") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{file}: it holds {type(settings).__name__}, allowed is a mapping of option names to values."
        )
    return settings


def require(condition: bool, message: str) -> None:
    """
    Raises:
        ValueError: with the message, unless the condition holds.
    """
    if not condition:
        raise ValueError(message)


def require_positive(options: object, *names: str) -> None:
    """
    Raises:
        ValueError: one of the named integer options is below 1.
    """
    for name in names:
        value = getattr(options, name)
        require(value is None or value >= 1, f"{name}: got {value}, allowed is a positive integer.")
