"""What the tests of the sub-commands share: component folders with one tokenizer, a text, words of options."""

from pathlib import Path

import torch
from tiny import FAMILIES
from transformers import AutoModelForCausalLM

from modeling_manticore.tasks.text import help_topics, train_tokenizer


def component_folders(root: Path) -> Path:
    """`root` with the folders gpt_neox and mamba2, and text.txt."""
    texts = help_topics()[:12]
    tokenizer = train_tokenizer(texts, 300)
    for family in ("gpt_neox", "mamba2"):
        torch.manual_seed(0)
        config = FAMILIES[family]()
        config.vocab_size = len(tokenizer)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
    (root / "text.txt").write_text("\n".join(texts)[:20_000])
    return root


def options(**settings) -> list[str]:
    """Settings as words of a command line."""
    words = []
    for key, value in settings.items():
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return words
