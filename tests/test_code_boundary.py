"""The files that travel to the Hub import only torch, transformers and each other; modules stay small."""

import ast
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files
from travelling import TRAVELLING


PACKAGE = Path(__file__).parents[1] / "modeling_manticore"


@pytest.mark.parametrize("name", TRAVELLING)
def test_imports_of_the_files(name):
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and f"{node.module}.py" in TRAVELLING
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for module in modules:
                top = module.split(".")[0]
                assert top in ("torch", "transformers") or top in sys.stdlib_module_names, module


def test_transformers_finds_all_of_them_and_nothing_else():
    entry = PACKAGE / "modeling_manticore.py"
    assert sorted({Path(file).name for file in get_relative_import_files(entry)} | {entry.name}) == sorted(TRAVELLING)
    for name in TRAVELLING:
        assert set(get_imports(PACKAGE / name)) <= {"torch", "transformers"} | set(sys.stdlib_module_names)


def test_nothing_in_them_mentions_training_code():
    for name in TRAVELLING:
        text = (PACKAGE / name).read_text()
        assert "Trainer" not in text and "optimizer" not in text, name


def test_modules_are_small():
    long = {file.name: n for file in PACKAGE.rglob("*.py") if (n := len(file.read_text().splitlines())) > 450}
    assert long == {}
