"""Tiny checkpoints for the repositories of shipped recipes: the same keys and tensor names, tokenizers that differ."""

from functools import cache
from pathlib import Path

import torch
import transformers as T

from modeling_manticore.hub.recipe_schema import Recipe
from modeling_manticore.tasks.text import help_topics, train_tokenizer


def _neox(layers):
    return T.GPTNeoXConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=2048,
        rotary_pct=0.25,
        tie_word_embeddings=False,
    )


def _mamba(layers, width=24):
    return T.MambaConfig(hidden_size=width, num_hidden_layers=layers, state_size=4, time_step_rank=2)


def _mamba2(layers, width=24):
    return T.Mamba2Config(
        hidden_size=width, num_hidden_layers=layers, num_heads=6, head_dim=8, n_groups=1, state_size=8, expand=2
    )


def _gpt_neo(layers):
    return T.GPTNeoConfig(
        hidden_size=32,
        num_layers=layers,
        num_heads=4,
        attention_types=[[["global", "local"], layers // 2]],
        max_position_embeddings=2048,
        window_size=256,
    )


def _llama(layers, width=48):
    return T.LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


# repository -> (configuration, tokenizer, rows of padding beyond it, licence in its card)
STANDINS = {
    "EleutherAI/pythia-410m": (lambda: _neox(6), "neox", 27, "apache-2.0"),
    "EleutherAI/pythia-160m": (lambda: _neox(6), "neox", 27, "apache-2.0"),
    "state-spaces/mamba-370m-hf": (lambda: _mamba(8), "neox", 3, None),
    "state-spaces/mamba-130m-hf": (lambda: _mamba(6), "neox", 3, None),
    "EleutherAI/gpt-neo-125m": (lambda: _gpt_neo(4), "gpt2", 0, "mit"),
    "HuggingFaceTB/SmolLM2-135M": (lambda: _llama(6), "llama", 0, "apache-2.0"),
    "HuggingFaceTB/SmolLM2-360M": (lambda: _llama(8), "llama", 0, "apache-2.0"),
    "AntonV/mamba2-370m-hf": (lambda: _mamba2(8), "neox", 11, None),
    "runs/demo-components/prose_gpt_neox": (lambda: _neox(6), "neox", 0, None),
    "runs/demo-components/code_mamba2": (lambda: _mamba2(6), "neox", 0, None),
}


@cache
def tokenizer(kind: str):
    """Three that differ: trained on other documents, to another size."""
    first, size = {"neox": (0, 300), "gpt2": (25, 290), "llama": (50, 280)}[kind]
    return train_tokenizer(help_topics()[first : first + 12], size)


def make_standin(name: str, root: Path) -> Path:
    """The stand-in of a repository, in a folder below `root`."""
    config_of, kind, padding, licence = STANDINS[name]
    folder = root / name
    if not folder.exists():
        torch.manual_seed(0)
        own, config = tokenizer(kind), config_of()
        config.vocab_size = len(own) + padding
        config.bos_token_id = config.eos_token_id = config.pad_token_id = own.eos_token_id
        T.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        own.save_pretrained(folder)
        if licence is not None:
            (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# {name}\n")
    return folder


def substitute(recipe: Recipe, root: Path) -> Recipe:
    """The recipe with a stand-in for every repository and folder."""
    for component in recipe.components:
        if component.name is not None:
            component.folder, component.repo = str(make_standin(component.name, root)), None
            component.revision = None
    return recipe
