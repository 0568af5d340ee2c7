"""
Fill the parts of README.md between `<!-- part NAME -->` and `<!-- end of NAME -->` from the results of the benchmarks,
the project's settings and the commands. `make readme` runs it; a test fails where README.md is stale.
"""

import re
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
from readme_parts import PARTS  # noqa: E402
from readme_results import ROOT  # noqa: E402


README = ROOT / "README.md"
PART = re.compile(r"(<!-- part (\w+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def filled(text: str) -> str:
    """
    README's text with its parts written anew.

    Raises:
        ValueError: a part is marked that there is not, or one that there is has no place.
    """
    marked = [name for _, name, _ in PART.findall(text)]
    if sorted(marked) != sorted(PARTS) or text.count("<!-- part ") != len(PARTS):
        raise ValueError(f"README.md: got the parts {sorted(marked)}, allowed is each of {sorted(PARTS)} once.")
    return PART.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}\n{match[3]}", text)


def main() -> None:
    """Write README.md where something in it has changed."""
    before = README.read_text(encoding="utf-8")
    after = filled(before)
    if after != before:
        README.write_text(after, encoding="utf-8")
    print(f"{README.name}: {'written' if after != before else 'nothing has changed'}")


if __name__ == "__main__":
    main()
