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


def six_layer_components(root: Path) -> Path:
    """`root` with the folders a-gpt-neox and a-mamba2, of six layers, and notes.txt, paragraphs with lines between."""
    texts = help_topics()[:30]
    tokenizer = train_tokenizer(texts, 300)
    for name, family in (("a-gpt-neox", "gpt_neox"), ("a-mamba2", "mamba2")):
        torch.manual_seed(0)
        config = FAMILIES[family]()
        config.vocab_size, config.num_hidden_layers = len(tokenizer), 6
        if hasattr(config, "max_position_embeddings"):
            config.max_position_embeddings = 2048
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    paragraphs = [line for text in texts for line in text.splitlines() if len(line) > 30][:300]
    (root / "notes.txt").write_text("\n\n".join(paragraphs))
    return root


def options(**settings) -> list[str]:
    """Settings as words of a command line."""
    words = []
    for key, value in settings.items():
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return words
