"""A hybrid in a folder with a tiny tokenizer, as libraries that take a path find it."""

from pathlib import Path

import torch
from tiny import FAMILIES
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from modeling_manticore import ManticoreForCausalLM, discretize
from modeling_manticore.tasks.text import help_topics, train_tokenizer


TEXTS = help_topics()[:30]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens; the one special token ends texts and pads rows."""
    return train_tokenizer(TEXTS, 300)


def hybrid(families: tuple[str, ...], choice: list[int] | None = None, **changes) -> ManticoreForCausalLM:
    """A supernet of the families for `tiny_tokenizer`, or the discretized hybrid of the choice."""
    components = []
    for seed, family in enumerate(families):
        torch.manual_seed(seed)
        config = FAMILIES[family]()
        config.vocab_size = 300
        config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
        for key, value in changes.items():
            if hasattr(config, key):
                setattr(config, key, value)
        components.append(AutoModelForCausalLM.from_config(config).eval())
    model = ManticoreForCausalLM.from_components(components, num_blocks=2)
    return model if choice is None else discretize(model, choice)


def saved(folder: Path, families: tuple[str, ...], choice: list[int] | None = None, **changes) -> ManticoreForCausalLM:
    """`hybrid`, saved with its tokenizer."""
    model = hybrid(families, choice, **changes)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model
