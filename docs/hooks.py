"""
What `make docs` adds to the pages: formulas as MathML, which needs no script, the help of every sub-command, and the
fields of recipes.
Formulas are written as GitHub reads them: a fence of the language `math`, or $`...`$ within a line.
"""

import contextlib
import io
import os
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert


FORMULA = re.compile(r"^```math\n(.*?)^```$|\$`(.+?)`\$", flags=re.MULTILINE | re.DOTALL)
RECIPES = "<!-- the fields of recipes -->"
COMMANDS = "<!-- the help of every sub-command -->"
_formulas: list[str] = []


def on_page_markdown(markdown: str, **_) -> str:
    """Put a placeholder for every formula, which Markdown leaves alone, and the help where it is asked for."""
    _formulas.clear()
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, command_help())
    if RECIPES in markdown:
        markdown = markdown.replace(RECIPES, recipe_fields())
    return FORMULA.sub(_placeholder, markdown)


def on_page_content(html: str, **_) -> str:
    """Put the formulas in."""
    return re.sub(r"formula-(\d+)-here", lambda match: _formulas[int(match.group(1))], html)


def recipe_fields() -> str:
    """The tables of docs/recipe_fields.py."""
    sys.path.insert(0, str(Path(__file__).parent))
    from recipe_fields import field_tables

    return field_tables()


def _placeholder(match: re.Match) -> str:
    displayed, inline = match.groups()
    _formulas.append(convert(displayed or inline, display="block" if displayed else "inline"))
    return f"formula-{len(_formulas) - 1}-here"


def command_help() -> str:
    """A section for each sub-command with what `--help` prints."""
    os.environ["COLUMNS"] = "100"
    from modeling_manticore.commands import COMMANDS as names
    from modeling_manticore.commands import main

    sections = []
    for name in names:
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            main([name, "--help"])
        sections.append(f"## manticore {name}\n\n```text\n{printed.getvalue().strip()}\n```\n")
    return "\n".join(sections)
