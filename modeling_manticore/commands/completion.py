"""`manticore completion SHELL`: a script that completes commands, options and file names."""

from dataclasses import dataclass, field
from importlib import import_module

from . import COMMANDS
from .parsing import parse_options, parser_of, positional_first, require


SHELLS = ("bash", "zsh", "fish")


@dataclass
class CompletionOptions:
    shell: str = field(metadata={"help": f"For which shell: {', '.join(SHELLS)}."})


KINDS = (CompletionOptions,)


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: another shell.
    """
    (options,) = parse_options(KINDS, positional_first(arguments, "shell"), "completion")
    require(options.shell in SHELLS, f"shell: got {options.shell!r}, allowed are {', '.join(SHELLS)}.")
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[options.shell]({name: flags_of(name) for name in COMMANDS}))


def flags_of(command: str) -> dict[str, str]:
    """The long options of a command, and the first line of their help."""
    module = import_module(f".{command}", __package__)
    kinds = module.kinds() if hasattr(module, "kinds") else module.KINDS
    flags = {}
    for action in parser_of(kinds, command)._actions:
        for name in action.option_strings:
            if name.startswith("--") and not name.startswith("--no_") and name.replace("-", "_") not in flags:
                flags[name] = (action.help or "").splitlines()[0].replace("%%", "%") if action.help else ""
    return {name: text for name, text in flags.items() if "-" not in name[2:]}


def _bash(flags: dict[str, dict[str, str]]) -> str:
    cases = "\n".join(f'    {name}) flags="{" ".join(own)}" ;;' for name, own in flags.items())
    return f"""_manticore() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" flags=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{" ".join(flags)} --help --version" -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  case "$word" in
    -*) COMPREPLY=($(compgen -W "$flags" -- "$word")) ;;
    *) COMPREPLY=($(compgen -f -- "$word")) ;;
  esac
}}
complete -o filenames -F _manticore manticore"""


def _zsh(flags: dict[str, dict[str, str]]) -> str:
    names = "\n".join(f"      {_quoted(f'{name}:{text}')}" for name, text in COMMANDS.items())
    cases = "\n".join(f"    {name}) flags=({' '.join(own)}) ;;" for name, own in flags.items())
    return f"""#compdef manticore
_manticore() {{
  local -a commands flags
  if (( CURRENT == 2 )); then
    commands=(
{names}
    )
    _describe command commands
    return
  fi
  case $words[2] in
{cases}
  esac
  if [[ $PREFIX == -* ]]; then compadd -- $flags; else _files; fi
}}
compdef _manticore manticore"""


def _fish(flags: dict[str, dict[str, str]]) -> str:
    lines = [f"complete -c manticore -n __fish_use_subcommand -f -a {n} -d {_quoted(t)}" for n, t in COMMANDS.items()]
    for name, own in flags.items():
        seen = f"complete -c manticore -n '__fish_seen_subcommand_from {name}'"
        lines += [f"{seen} -l {flag[2:]} -d {_quoted(text)}" for flag, text in own.items()]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", " ").replace("'", "\u2019") + "'"
